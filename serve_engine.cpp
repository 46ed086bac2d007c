// The engine's thread: it owns a Generator for each model, and does everything that computes.
//
//     submit -> Call in its model's queue -> choices get rows of the Generator -> step
//            -> events, gathered during the step -> mailboxes
//
// One loop serves all models. Between two steps of a generator it takes what was submitted, forgets
// what was cancelled, refuses what waited too long, and gives free rows to waiting choices. When
// there is nothing to do, it sleeps until a call arrives.
//
// What a connection does reaches the generators in two ways alone: a call that is submitted, and a
// flag that says it was cancelled. Neither changes what another row computes (cake/generate.h).
#include <chrono>
#include <deque>
#include <thread>
#include <unordered_map>

#include "cake/serve.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Mailbox

std::vector<Event> Mailbox::wait(double seconds, bool until_over) {
  std::unique_lock lock(mutex_);
  const auto ready = [&] { return ended_ == choices_ || (!until_over && !events_.empty()); };
  waiting_ = until_over ? Waiting::for_the_end : Waiting::for_events;
  arrived_.wait_for(lock, std::chrono::duration<double>(seconds), ready);
  waiting_ = Waiting::no;
  wake_is_due_ = false;
  return std::exchange(events_, {});
}

bool Mailbox::over() const {
  std::lock_guard lock(mutex_);
  return ended_ == choices_ && events_.empty();
}

bool Mailbox::put_without_waking(std::span<Event> events) {
  std::lock_guard lock(mutex_);
  for (Event& e : events) {
    if (e.kind == Event::finished) ended_++;
    if (e.kind == Event::failed) ended_ = choices_;
    events_.push_back(std::move(e));
  }
  const bool awaited =
      waiting_ == Waiting::for_events || (waiting_ == Waiting::for_the_end && ended_ == choices_);
  return awaited && !std::exchange(wake_is_due_, true);
}

void Mailbox::put(std::span<Event> events) {
  if (put_without_waking(events)) wake();
}

// ---------------------------------------------------------------------------------------------
// What the engine's thread knows of calls and models

namespace {

struct Call {
  std::shared_ptr<Mailbox> mailbox;
  std::vector<Request> requests;  // moved to the generator in this order
  double submitted = 0;           // when, by now()
  size_t given = 0;               // requests that the generator has, or had
  size_t over = 0;                // of all requests
  int running = 0;                // that have a row
  bool admitted = false;          // one has, or had, a row
  std::string error;              // of one choice: the call fails after the step
  int in_generator() const { return int(given - over); }
  bool is_over() const { return over == requests.size(); }
};

struct Choice {  // that the generator has
  Call* call = nullptr;
  int index = 0;  // of the call
  int prompt_tokens = 0, sampled_tokens = 0;
  bool admitted = false;
  double last_token = 0;  // when
};

struct ModelState {  // a model with its calls
  ModelState(size_t number, ServedModel& served, const GeneratorOptions& options)
      : index(number),
        id(served.id),
        rows(options.rows),
        generator(
            *served.text.gpt,
            [tokenizer = &served.text.tokenizer](int token) {
              return tokenizer->token_bytes(token);
            },
            options) {}
  const size_t index;
  const std::string id;
  const int rows;
  Generator generator;
  std::deque<std::unique_ptr<Call>> calls;                   // that are not over, the oldest first
  std::unordered_map<int, std::unique_ptr<Choice>> choices;  // by the generator's number
  double seconds = 0;    // that its steps took, in comparison with the other models
  double last_step = 0;  // seconds
};

}  // namespace

struct Engine::State {
  State(std::span<ServedModel> served, const std::vector<GeneratorOptions>& caches,
        EngineOptions engine_options)
      : options(engine_options) {
    require(served.size() == caches.size(), "engine: found ", caches.size(),
            " caches, expected one for each of ", served.size(), " models");
    for (size_t m = 0; m < served.size(); m++) {
      models.push_back(std::make_unique<ModelState>(m, served[m], caches[m]));
    }
    arrived.resize(models.size());
    load.resize(models.size());
  }

  void run();
  bool has_work() const {
    return std::any_of(models.begin(), models.end(),
                       [](const auto& model) { return !model->calls.empty(); });
  }
  // The loop's parts.
  void drop_cancelled(ModelState&);
  void refuse_late(ModelState&);
  void fill_rows(ModelState&);
  ModelState* next_model();
  void step(ModelState&);
  void fail_all(const std::string& why);

  // What happens to calls and choices.
  void give_next_choice(ModelState&, Call&);
  void admit(Choice&);
  void take_token(Choice&, const Token&);
  void collect_finished(ModelState&);
  void fail_call(ModelState&, Call&, int status, const std::string& code, const std::string& why);
  void end_choices(ModelState&, Call&, size_t n, int running, int64_t EngineCounts::*how);

  void post(const Call& call, Event&& event, bool urgent = true) {
    events.push_back(std::move(event));
    mailboxes.push_back(call.mailbox);
    if (urgent) urgent_mailboxes.push_back(call.mailbox);
  }
  void deliver();
  double wake_interval() const;
  void wake_sleepers();

  const EngineOptions options;
  std::vector<std::unique_ptr<ModelState>> models;
  // Of the current round, in the order in which they happened. Mailboxes get them at the end of a
  // step, so that no connection wakes up before the step's work is done, and only once.
  std::vector<Event> events;
  std::vector<std::shared_ptr<Mailbox>> mailboxes;         // of each event
  std::vector<std::shared_ptr<Mailbox>> urgent_mailboxes;  // of first and last events
  // Whose threads wait for events that are there.
  std::vector<std::shared_ptr<Mailbox>> sleepers;
  double next_wake = 0;  // when they may be woken

  mutable std::mutex mutex;  // of what follows
  std::condition_variable work, idle;
  std::vector<std::vector<std::unique_ptr<Call>>> arrived;  // for each model
  std::vector<int64_t> load;                                // choices of each that are not over
  bool draining = false, failing = false, stopping = false;
  EngineCounts counts;

  std::thread thread;
};

// ---------------------------------------------------------------------------------------------
// The loop

void Engine::State::run() {
  set_threads(options.threads);  // holds for the thread that calls it
  for (;;) {
    bool fail_calls;
    {
      std::unique_lock lock(mutex);
      work.wait(lock, [&] {
        const auto empty = [](const auto& calls) { return calls.empty(); };
        return stopping || has_work() || !std::all_of(arrived.begin(), arrived.end(), empty);
      });
      for (size_t m = 0; m < models.size(); m++) {
        for (auto& call : arrived[m]) models[m]->calls.push_back(std::move(call));
        arrived[m].clear();
      }
      fail_calls = stopping || failing;
      if (stopping && !has_work()) return;
    }
    if (fail_calls) fail_all("the server is shutting down");
    for (const auto& model : models) {
      drop_cancelled(*model);
      refuse_late(*model);
      fill_rows(*model);
    }
    deliver();
    if (ModelState* model = next_model()) {
      // Tokens of a fast model do not wait for a slow one's step.
      if (!sleepers.empty() && now() + model->last_step > next_wake) wake_sleepers();
      step(*model);
    }
    deliver();
  }
}

// Of the models with choices in work, the one whose steps took the least time. A model that had
// nothing to do for a while gets no more than the others on that account.
ModelState* Engine::State::next_model() {
  ModelState* best = nullptr;
  for (const auto& model : models) {
    if (!model->choices.empty() && (!best || model->seconds < best->seconds)) best = model.get();
  }
  if (!best) return nullptr;
  for (const auto& model : models) {
    if (model->choices.empty()) model->seconds = std::max(model->seconds, best->seconds);
  }
  return best;
}

void Engine::State::step(ModelState& model) {
  const double start = now();
  std::string error;
  try {
    model.generator.step();
  } catch (const std::bad_alloc&) {
    error = "out of memory";
  } catch (const std::exception& e) {
    error = e.what();
  }
  const double seconds = now() - start;
  model.seconds += seconds, model.last_step = seconds;
  for (const auto& call : model.calls) {
    if (call->error.empty()) continue;
    std::fprintf(stderr, "error: %s: %s\n", model.id.c_str(), call->error.c_str());
    fail_call(model, *call, 500, "engine", call->error);
  }
  collect_finished(model);
  if (!error.empty()) {
    // The call that came last is given up: what usually lacks is memory.
    std::fprintf(stderr, "error: %s: %s\n", model.id.c_str(), error.c_str());
    for (size_t i = model.calls.size(); i-- > 0;) {
      if (model.calls[i]->in_generator() == 0) continue;
      fail_call(model, *model.calls[i], 500, "engine", error);
      model.calls.erase(model.calls.begin() + int64_t(i));
      break;
    }
  }
  std::lock_guard lock(mutex);
  counts.busy_seconds += seconds;
  counts.prompt_tokens = counts.reused_tokens = counts.preemptions = 0;
  for (const auto& m : models) {
    const GeneratorStats& stats = m->generator.stats();
    counts.prompt_tokens += stats.prompt_tokens;
    counts.reused_tokens += stats.reused_tokens;
    counts.preemptions += stats.preemptions;
  }
}

// ---------------------------------------------------------------------------------------------
// Between steps

void Engine::State::drop_cancelled(ModelState& model) {
  bool found = false;
  for (const auto& call : model.calls) {
    if (!call->mailbox->cancelled()) continue;
    found = true;
    for (const auto& [number, choice] : model.choices) {
      if (choice->call == call.get()) model.generator.cancel(number);
    }
    for (size_t c = call->given; c < call->requests.size(); c++) {  // these never had a row
      post(*call, {.kind = Event::finished,
                   .choice = int(c),
                   .finish = Finish::cancelled,
                   .prompt_tokens = int(call->requests[c].prompt.size())});
    }
    end_choices(model, *call, call->requests.size() - call->given, 0, &EngineCounts::cancelled);
    call->given = call->requests.size();
  }
  if (found) collect_finished(model);
}

// A call of which no choice got a row in time. The others go on waiting: their answers have begun.
void Engine::State::refuse_late(ModelState& model) {
  const double limit = now() - options.queue_seconds;
  for (const auto& call : model.calls) {
    if (call->admitted || call->submitted > limit) continue;
    fail_call(model, *call, 503, "queue_timeout",
              concat("the server is busy: the request waited ", options.queue_seconds,
                     " seconds for a free row"));
  }
  std::erase_if(model.calls, [](const auto& call) { return call->is_over(); });
}

void Engine::State::fail_all(const std::string& why) {
  for (const auto& model : models) {
    for (const auto& call : model->calls) fail_call(*model, *call, 503, "shutting_down", why);
    model->calls.clear();
  }
}

void Engine::State::fill_rows(ModelState& model) {
  while (int(model.choices.size()) < model.rows) {
    Call* next = nullptr;
    for (const auto& call : model.calls) {
      const bool waits = call->given < call->requests.size();
      if (waits && (!next || call->in_generator() < next->in_generator())) next = call.get();
    }
    if (!next) return;
    give_next_choice(model, *next);
    if (next->is_over()) {  // the generator refused it
      std::erase_if(model.calls, [](const auto& call) { return call->is_over(); });
    }
  }
}

void Engine::State::give_next_choice(ModelState& model, Call& call) {
  auto choice = std::make_unique<Choice>();
  Choice* c = choice.get();
  c->call = &call;
  c->index = int(call.given);
  Request request = std::move(call.requests[call.given]);
  c->prompt_tokens = int(request.prompt.size());
  request.on_admitted = [this, c] { admit(*c); };
  request.on_failed = [c](const std::string& error) { c->call->error = error; };
  request.on_token = [this, c](const Token& token) { take_token(*c, token); };
  if (request.score_prompt) {
    request.on_prompt_scores = [this, c](std::vector<TokenScore> scores) {
      post(*c->call,
           {.kind = Event::prompt_scores, .choice = c->index, .scores = std::move(scores)});
    };
  }
  try {
    const int number = model.generator.submit(std::move(request));
    model.choices.emplace(number, std::move(choice));
    call.given++;
  } catch (const Error& e) {
    fail_call(model, call, 500, "engine", e.what());
  }
}

// ---------------------------------------------------------------------------------------------
// What happens to a choice

void Engine::State::admit(Choice& choice) {
  choice.admitted = choice.call->admitted = true;
  choice.call->running++;
  // At once: the answer can begin while the prompt is read.
  choice.call->mailbox->put({.kind = Event::admitted, .choice = choice.index});
  std::lock_guard lock(mutex);
  counts.running++;
  counts.queue_seconds.add(now() - choice.call->submitted);
}

void Engine::State::take_token(Choice& choice, const Token& token) {
  const double t = now();
  Event event{.kind = Event::token,
              .choice = choice.index,
              .id = token.id,
              .text = std::string(token.text),
              .turn_ends = token.last};
  if (token.score) event.score = *token.score;
  if (token.distribution) {
    event.distribution = std::make_shared<const Distribution>(*token.distribution);
  }
  post(*choice.call, std::move(event), choice.sampled_tokens == 0);
  std::lock_guard lock(mutex);
  counts.new_tokens++;
  if (choice.sampled_tokens++ == 0) {
    counts.first_token_seconds.add(t - choice.call->submitted);
  } else {
    counts.between_tokens_seconds.add(t - choice.last_token);
  }
  choice.last_token = t;
}

// The choices that the generator is done with.
void Engine::State::collect_finished(ModelState& model) {
  for (auto it = model.choices.begin(); it != model.choices.end();) {
    if (!model.generator.done(it->first)) {
      it++;
      continue;
    }
    const Completion completion = model.generator.pop(it->first);
    const std::unique_ptr<Choice> choice = std::move(it->second);
    it = model.choices.erase(it);
    post(*choice->call, {.kind = Event::finished,
                         .choice = choice->index,
                         .finish = completion.finish,
                         .prompt_tokens = choice->prompt_tokens,
                         .cached_tokens = completion.cached_tokens,
                         .sampled_tokens = choice->sampled_tokens});
    const bool cancelled = completion.finish == Finish::cancelled;
    end_choices(model, *choice->call, 1, choice->admitted,
                cancelled ? &EngineCounts::cancelled : &EngineCounts::finished);
  }
  std::erase_if(model.calls, [](const auto& call) { return call->is_over(); });
}

// All choices of the call end, with one event. The caller removes the call.
void Engine::State::fail_call(ModelState& model, Call& call, int status, const std::string& code,
                              const std::string& why) {
  for (auto it = model.choices.begin(); it != model.choices.end();) {
    if (it->second->call != &call) {
      it++;
      continue;
    }
    if (!model.generator.done(it->first)) model.generator.cancel(it->first);
    model.generator.pop(it->first);
    it = model.choices.erase(it);
  }
  post(call, {.kind = Event::failed, .text = why, .status = status, .code = code});
  end_choices(model, call, call.requests.size() - call.over, call.running,
              status == 503 && !call.admitted ? &EngineCounts::refused : &EngineCounts::failed);
}

// `n` choices of the call are over, of which so many have a row.
void Engine::State::end_choices(ModelState& model, Call& call, size_t n, int running,
                                int64_t EngineCounts::*how) {
  call.over += n;
  call.running -= running;
  std::lock_guard lock(mutex);
  counts.running -= running;
  counts.*how += int64_t(n);
  load[model.index] -= int64_t(n);
}

// A token that reaches its client costs about 25 us of a core besides the engine's work: its
// connection's thread wakes up, sends a chunk, and the client reads it. A small model writes a
// token for each of 64 clients in 2 ms, so two cores would spend half of their time on it. So the
// threads are woken at intervals, of 200 us for each of them, and a chunk has the tokens of several
// steps: a token waits 13 ms at most, where 64 clients read. First tokens and ends wait for
// nothing, and neither does any token of a model whose steps take longer than the interval.
constexpr double kWakeSeconds = 200e-6;

double Engine::State::wake_interval() const {
  return kWakeSeconds * double(std::min<size_t>(64, sleepers.size()));
}

void Engine::State::wake_sleepers() {
  next_wake = now() + wake_interval();
  for (const auto& mailbox : sleepers) mailbox->wake();
  sleepers.clear();
}

void Engine::State::deliver() {
  for (size_t begin = 0, end = 0; begin < events.size(); begin = end) {
    while (end < events.size() && mailboxes[end] == mailboxes[begin]) end++;
    if (mailboxes[begin]->put_without_waking(std::span(events).subspan(begin, end - begin))) {
      sleepers.push_back(mailboxes[begin]);
    }
  }
  for (const auto& mailbox : urgent_mailboxes) {
    mailbox->wake();
    std::erase(sleepers, mailbox);
  }
  if (!sleepers.empty() && now() >= next_wake) wake_sleepers();
  if (!events.empty()) idle.notify_all();
  events.clear();
  mailboxes.clear();
  urgent_mailboxes.clear();
}

// ---------------------------------------------------------------------------------------------
// The other threads' side

Engine::Engine(std::span<ServedModel> models, std::vector<GeneratorOptions> caches,
               EngineOptions options)
    : state_(std::make_unique<State>(models, caches, options)) {
  state_->thread = std::thread([state = state_.get()] { state->run(); });
}

Engine::~Engine() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->work.notify_one();
  state_->thread.join();
}

[[noreturn]] static void refuse_full_queue() {
  throw ApiError(503, "server_error", "queue_full", "",
                 "the server is busy: its queue is full, try again later");
}

void Engine::expect_room() {
  State& s = *state_;
  std::lock_guard lock(s.mutex);
  if (s.draining || s.stopping) return;  // submit says so
  int64_t waiting = 0;
  for (size_t m = 0; m < s.models.size(); m++) {
    if (s.load[m] < s.models[m]->rows) return;
    waiting += s.load[m] - s.models[m]->rows;
  }
  if (waiting < s.options.queue) return;
  s.counts.requests++, s.counts.refused++;
  refuse_full_queue();
}

std::shared_ptr<Mailbox> Engine::submit(size_t model, std::vector<Request> requests) {
  State& s = *state_;
  const auto n = int64_t(requests.size());
  require(n >= 1 && model < s.models.size(), "submit: found ", n, " choices for model ", model);
  auto call = std::make_unique<Call>();
  call->mailbox = std::make_shared<Mailbox>(int(n));
  call->requests = std::move(requests);
  call->submitted = now();
  const std::shared_ptr<Mailbox> mailbox = call->mailbox;
  {
    std::lock_guard lock(s.mutex);
    s.counts.requests += n;
    const auto refuse = [&](int status, const std::string& code, const std::string& why) {
      s.counts.refused += n;
      const bool full = status == 400;
      throw ApiError(status, full ? "invalid_request_error" : "server_error", code, full ? "n" : "",
                     why);
    };
    if (s.draining || s.stopping) refuse(503, "shutting_down", "the server is shutting down");
    const int rows = s.models[model]->rows;
    if (n > int64_t(rows) + s.options.queue) {
      refuse(400, "",
             concat("n: found ", n, " choices in all, expected at most ",
                    int64_t(rows) + s.options.queue, ", the server's rows and its queue"));
    }
    int64_t waiting = 0;  // with this call
    for (size_t m = 0; m < s.models.size(); m++) {
      const int64_t load = s.load[m] + (m == model ? n : 0);
      waiting += std::max<int64_t>(0, load - s.models[m]->rows);
    }
    if (waiting > s.options.queue) {
      s.counts.refused += n;
      refuse_full_queue();
    }
    s.load[model] += n;
    s.arrived[model].push_back(std::move(call));
  }
  s.work.notify_one();
  return mailbox;
}

EngineCounts Engine::counts() const {
  std::lock_guard lock(state_->mutex);
  EngineCounts counts = state_->counts;
  counts.queued = -counts.running;
  for (const int64_t load : state_->load) counts.queued += load;
  return counts;
}

void Engine::drain(double seconds) {
  State& s = *state_;
  const auto nothing_left = [&] {
    return std::all_of(s.load.begin(), s.load.end(), [](int64_t load) { return load == 0; });
  };
  std::unique_lock lock(s.mutex);
  s.draining = true;
  if (s.idle.wait_for(lock, std::chrono::duration<double>(seconds), nothing_left)) return;
  s.failing = true;
  s.idle.wait(lock, nothing_left);
}

}  // namespace cake
