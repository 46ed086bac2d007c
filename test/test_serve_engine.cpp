// The engine's thread of ./serve: events in their order, all choices or none, cancels, a full
// queue, errors of the engine, fairness, shutting down; and the models: names, templates, memory,
// fingerprints. Most tests use a stand-in for a model, whose every step the test can hold or fail.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <atomic>
#include <ctime>
#include <set>
#include <thread>

#include "cake/serve.h"
#include "test/scripted_model.h"
#include "test/serve_support.h"
#include "test/support.h"

namespace {

using namespace cake;

// ---------------------------------------------------------------------------------------------
// A model whose next token is a hash of all tokens, the seed and the stream. `on_step` runs before
// every step on the engine's thread: it may wait, or throw.

constexpr uint64_t kNotFinite = 666;  // a seed: the logits of this row are not finite

class SteppedGpt : public FakeGpt {
 public:
  SteppedGpt(int V, int T)
      : FakeGpt({.V = V, .T = T, .L = 1, .C = 2, .NH = 1, .NKV = 1, .HS = 2, .F = 2}) {}
  static int next(std::span<const int> history, const Sampling& s, int V) {
    uint64_t h = mix64(s.seed, s.stream);
    for (const int t : history) h = mix64(h, uint64_t(t));
    return int(h % uint64_t(V));
  }
  std::unique_ptr<KvCache> make_cache(int64_t limit, CacheType) override {
    auto cache = std::make_unique<KvCache>(limit);
    cache_in_use = cache.get();
    return cache;
  }
  void decode(KvCache& cache, std::span<const DecodeRow> rows, DecodeResult& result,
              bool) override {
    if (on_step) on_step(rows);
    NewPositions room(cache, rows, [](int, int) {});
    result.ids.clear();
    for (const DecodeRow& r : rows) {
      const bool fails = r.sampling.seed == kNotFinite && r.history.size() >= 6;
      result.ids.push_back(fails ? -1 : next(r.history, r.sampling, config_.V));
    }
    result.logp.assign(rows.size(), 0);
    result.make_scores(rows);
    for (const int id : result.ids) {
      if (id < 0) fail("decode: found logits that are not finite, expected numbers");
    }
    room.keep();
    steps++;
  }

  std::function<void(std::span<const DecodeRow>)> on_step;
  std::atomic<int64_t> steps{0};
  const KvCache* cache_in_use = nullptr;
};

const Tokenizer& engine_test_tokenizer() {
  static const ScriptedModel scripted;
  return scripted.tokenizer();
}

ServedModel stepped_model(int T = 4096, const std::string& id = "stepped") {
  const Tokenizer& tokenizer = engine_test_tokenizer();
  auto gpt = std::make_unique<SteppedGpt>(tokenizer.vocab_size(), T);
  const Config config = gpt->config();
  return {.id = id,
          .text = {.config = config, .tokenizer = tokenizer, .gpt = std::move(gpt)},
          .context = T};
}
SteppedGpt& gpt_of(ServedModel& m) { return static_cast<SteppedGpt&>(*m.text.gpt); }

GeneratorOptions cache_of(const ServedModel& m, int rows) {
  return {.rows = rows, .cache_positions = int64_t(rows + 1) * m.context, .prefill_tokens = 64};
}

Request request_of(uint64_t seed, int max_new, uint64_t stream = 0, int prompt = 4) {
  Request r{.max_new = max_new, .sampling = {.seed = seed, .stream = stream}};
  for (int i = 0; i < prompt; i++) r.prompt.push_back(int(mix64(seed, uint64_t(i)) % 200));
  return r;
}

// The ids that the stand-in writes for a request.
std::vector<int> expected_ids(const Request& r) {
  std::vector<int> tokens = r.prompt;
  for (int i = 0; i < r.max_new; i++) {
    tokens.push_back(SteppedGpt::next(tokens, r.sampling, engine_test_tokenizer().vocab_size()));
  }
  return {tokens.begin() + int64_t(r.prompt.size()), tokens.end()};
}

// An engine for one stand-in.
struct SteppedEngine {
  explicit SteppedEngine(EngineOptions options = {.rows = 4}, int T = 4096) : rows(options.rows) {
    options.threads = 1;
    models.push_back(stepped_model(T));
    gpt = &gpt_of(models[0]);
    make = [this, options] {
      engine.emplace(models, std::vector{cache_of(models[0], rows)}, options);
    };
  }
  // After `on_step` is set.
  Engine& start() {
    make();
    return *engine;
  }
  int rows;
  std::vector<ServedModel> models;
  SteppedGpt* gpt;
  std::function<void()> make;
  std::optional<Engine> engine;
};

// All events until the call is over; fails the test when that takes too long.
std::vector<Event> all_events(Mailbox& mailbox, bool until_over = false) {
  std::vector<Event> all;
  for (const double end = now() + 30; !mailbox.over();) {
    REQUIRE(now() < end);
    for (Event& e : mailbox.wait(1, until_over)) all.push_back(std::move(e));
  }
  CHECK(mailbox.wait(0).empty());
  return all;
}
std::vector<int> ids_of(const std::vector<Event>& events, int choice = 0) {
  std::vector<int> ids;
  for (const Event& e : events) {
    if (e.kind == Event::token && e.choice == choice) ids.push_back(e.id);
  }
  return ids;
}
std::string kinds_of(const std::vector<Event>& events, int choice = 0) {
  std::string kinds;
  for (const Event& e : events) {
    if (e.choice == choice || e.kind == Event::failed) kinds += "aptfx"[e.kind];
  }
  return kinds;
}
// Waits until the call has a token.
void wait_for_token(Mailbox& mailbox, std::vector<Event>& events) {
  for (const double end = now() + 30; ids_of(events).empty();) {
    REQUIRE(now() < end);
    for (Event& e : mailbox.wait(1)) events.push_back(std::move(e));
  }
}
int64_t all_counted(const EngineCounts& c) {
  return c.queued + c.running + c.finished + c.cancelled + c.failed + c.refused;
}
template <class Call>
std::pair<int, std::string> api_error_of(Call&& call) {
  try {
    call();
  } catch (const ApiError& e) {
    return {e.status, e.code};
  }
  return {0, ""};
}
void pause_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// ---------------------------------------------------------------------------------------------

TEST_CASE("the engine's events come in their order, with the finish of each choice") {
  SteppedEngine e({.rows = 4}, 64);
  Engine& engine = e.start();
  SUBCASE("length") {
    const Request r = request_of(1, 7);
    const auto events = all_events(*engine.submit(0, {r}));
    CHECK(kinds_of(events) == "atttttttf");
    CHECK(ids_of(events) == expected_ids(r));
    const Event& last = events.back();
    CHECK(last.finish == Finish::length);
    CHECK(last.prompt_tokens == 4);
    CHECK(last.sampled_tokens == 7);
    CHECK(events[events.size() - 2].turn_ends);
  }
  SUBCASE("context") {
    const auto events = all_events(*engine.submit(0, {request_of(2, 1000)}));
    CHECK(events.back().finish == Finish::context);
    CHECK(events.back().sampled_tokens == 60);
  }
  SUBCASE("a stop token") {
    Request r = request_of(3, 9);
    r.stop_ids = {expected_ids(r)[4]};
    const auto events = all_events(*engine.submit(0, {r}));
    CHECK(kinds_of(events) == "atttttf");
    CHECK(events.back().finish == Finish::stop_token);
  }
  SUBCASE("a stop string") {
    Request r = request_of(4, 40);
    std::string text;
    for (const int id : expected_ids(r)) text += engine_test_tokenizer().token_bytes(id);
    const size_t letter = text.find_first_of("abcdefghijklmnopqrstuvwxyz", 8);
    REQUIRE(letter != std::string::npos);
    r.stop_strings = {text.substr(letter, 1)};
    std::string expected, found;
    Utf8Stream utf8;
    utf8.feed(text.substr(0, text.find(r.stop_strings[0])), expected);
    utf8.finish(expected);
    const auto events = all_events(*engine.submit(0, {r}));
    for (const Event& event : events) found += event.kind == Event::token ? event.text : "";
    CHECK(events.back().finish == Finish::stop_string);
    CHECK(found == expected);
  }
  SUBCASE("several choices, each with its own events") {
    std::vector<Request> requests;
    for (uint64_t c = 0; c < 9; c++) requests.push_back(request_of(5, 3 + int(c), c));
    const auto events = all_events(*engine.submit(0, requests));
    for (size_t c = 0; c < 9; c++) {
      CAPTURE(c);
      CHECK(kinds_of(events, int(c)) == "a" + std::string(3 + c, 't') + "f");
      CHECK(ids_of(events, int(c)) == expected_ids(requests[c]));
    }
  }
  SUBCASE("a turn after which the caller appends ids") {
    Request r = request_of(6, 9);
    r.stop_ids = {expected_ids(r)[2]};
    r.max_inserted = 2;
    int turns = 0;
    r.on_turn = [&](int, std::span<const int> turn) {
      CHECK(turn.size() == 3);
      return turns++ == 0 ? std::vector<int>{1, 2} : std::vector<int>{};
    };
    const auto events = all_events(*engine.submit(0, {r}));
    REQUIRE(events.size() == 11);
    CHECK(events[3].turn_ends);
    CHECK(!events[4].turn_ends);
    CHECK(events.back().sampled_tokens == 9);
  }
  const EngineCounts counts = engine.counts();
  CHECK(counts.running + counts.queued == 0);
  CHECK(counts.requests == all_counted(counts));
}

TEST_CASE("the scores of a prompt come before its first token") {
  SteppedEngine e;
  Engine& engine = e.start();
  Request r = request_of(1, 3);
  r.score_prompt = true;
  const auto events = all_events(*engine.submit(0, {r}));
  CHECK(kinds_of(events) == "aptttf");
  CHECK(events[1].scores.size() == 3);
}

TEST_CASE("an answer that is awaited as a whole comes with one wake-up") {
  SteppedEngine e;
  Engine& engine = e.start();
  const Request r = request_of(1, 200);
  const auto mailbox = engine.submit(0, {r});
  const double begin = now();
  const auto events = mailbox->wait(60, true);
  CHECK(now() - begin < 30);
  CHECK(mailbox->over());
  CHECK(ids_of(events) == expected_ids(r));
}

TEST_CASE("nothing of a call is left in the engine when it is over") {
  SteppedEngine stepped;
  Engine& engine = stepped.start();
  for (const bool until_over : {false, true}) {
    std::vector<std::weak_ptr<Mailbox>> over;
    for (uint64_t seed = 0; seed < 20; seed++) {
      const auto mailbox = engine.submit(0, {request_of(seed, 5)});
      all_events(*mailbox, until_over);
      over.push_back(mailbox);
    }
    const auto forgotten = [&] {
      return std::all_of(over.begin(), over.end(), [](const auto& m) { return m.expired(); });
    };
    for (const double end = now() + 10; !forgotten() && now() < end;) usleep(1000);
    CHECK(forgotten());
  }
}

TEST_CASE("a connection hears of a token before the step that follows, where steps take long") {
  SteppedEngine stepped;
  std::atomic<int64_t> received{0};
  std::atomic<int> unheard{0};
  // Longer than the interval of wake-ups. Then the step waits until the token before it is heard
  // of.
  stepped.gpt->on_step = [&](auto) {
    usleep(2000);
    const int64_t before = stepped.gpt->steps;  // each step made a token
    const double end = now() + 10;
    while (received < before && now() < end) usleep(100);
    unheard += received < before;
  };
  const auto mailbox = stepped.start().submit(0, {request_of(1, 10)});
  std::vector<Event> events;
  while (!mailbox->over()) {
    for (Event& e : mailbox->wait(30)) {
      received += e.kind == Event::token;
      events.push_back(std::move(e));
    }
  }
  CHECK(ids_of(events).size() == 10);
  CHECK(unheard == 0);
}

TEST_CASE("a mailbox gives what it has when the time has passed") {
  Mailbox mailbox(2);
  CHECK(mailbox.wait(.01).empty());
  mailbox.put({.kind = Event::token, .choice = 0, .id = 7});
  const double begin = now();
  CHECK(mailbox.wait(.1, true).size() == 1);
  CHECK(now() - begin >= .1);
  CHECK(!mailbox.over());
  mailbox.put({.kind = Event::finished, .choice = 1});
  CHECK(mailbox.wait(10).size() == 1);
  CHECK(!mailbox.over());
  std::thread other([&] { mailbox.put({.kind = Event::finished, .choice = 0}); });
  CHECK(mailbox.wait(60, true).size() == 1);
  CHECK(mailbox.over());
  CHECK(mailbox.wait(60).empty());
  CHECK(now() - begin < 30);
  other.join();
}

TEST_CASE("a connection that was away takes all tokens at once") {
  SteppedEngine e;
  Engine& engine = e.start();
  const Request r = request_of(1, 500);
  const auto mailbox = engine.submit(0, {r});
  REQUIRE(wait_until([&] { return engine.counts().finished == 1; }));
  CHECK(wait_until([&] { return mailbox->wait(0).size() == 502; }, 0) == true);
  CHECK(mailbox->over());
}

TEST_CASE("a call is queued with all its choices, or refused") {
  SteppedEngine e({.rows = 2, .queue = 3});
  std::atomic<bool> hold{true};
  e.gpt->on_step = [&](auto) {
    while (hold) pause_ms(1);
  };
  Engine& engine = e.start();
  const auto choices = [](int n) {
    std::vector<Request> all;
    for (int c = 0; c < n; c++) all.push_back(request_of(1, 2, uint64_t(c)));
    return all;
  };
  CHECK(api_error_of([&] { engine.submit(0, choices(6)); }) == std::pair(400, std::string()));
  const auto four = engine.submit(0, choices(4));  // two wait
  CHECK(api_error_of([&] { engine.submit(0, choices(2)); }) ==
        std::pair(503, std::string("queue_full")));
  CHECK_NOTHROW(engine.expect_room());  // for one
  const auto one = engine.submit(0, choices(1));
  CHECK(api_error_of([&] { engine.submit(0, choices(1)); }).first == 503);
  CHECK(api_error_of([&] { engine.expect_room(); }) == std::pair(503, std::string("queue_full")));
  EngineCounts counts = engine.counts();
  CHECK(counts.refused == 6 + 2 + 1 + 1);
  CHECK(counts.queued + counts.running == 5);
  hold = false;
  CHECK(all_events(*four).size() == 4 * 4);
  CHECK(all_events(*one).size() == 4);
  counts = engine.counts();
  CHECK(counts.finished == 5);
  CHECK(counts.queued + counts.running == 0);
  CHECK(counts.requests == all_counted(counts));
  CHECK(all_events(*engine.submit(0, choices(5))).size() == 5 * 4);  // there is room again
}

TEST_CASE("a cancelled call leaves at once, and the others' texts keep their bits") {
  SteppedEngine e({.rows = 2});
  std::atomic<bool> slow{true};
  e.gpt->on_step = [&](auto) {
    if (slow) pause_ms(1);
  };
  Engine& engine = e.start();
  const Request kept = request_of(1, 300);
  const auto other = engine.submit(0, {kept});
  std::vector<Event> events;
  SUBCASE("while it decodes") {
    const auto mailbox = engine.submit(0, {request_of(2, 4000)});
    wait_for_token(*mailbox, events);
    mailbox->cancel();
    for (Event& event : all_events(*mailbox)) events.push_back(std::move(event));
    CHECK(events.back().finish == Finish::cancelled);
    CHECK(events.back().sampled_tokens == int(ids_of(events).size()));
  }
  SUBCASE("while its prompt is read") {
    const auto mailbox = engine.submit(0, {request_of(2, 10, 0, 4000)});  // 64 tokens a step
    REQUIRE(!mailbox->wait(30).empty());                                  // admitted
    mailbox->cancel();
    events = all_events(*mailbox);
    CHECK(kinds_of(events) == "f");
    CHECK(events.back().finish == Finish::cancelled);
  }
  SUBCASE("while it is queued") {
    const auto running = engine.submit(0, {request_of(2, 4000)});
    REQUIRE(!running->wait(30).empty());
    const auto mailbox = engine.submit(0, {request_of(3, 10), request_of(3, 10, 1)});
    mailbox->cancel();
    events = all_events(*mailbox);
    CHECK(kinds_of(events, 0) == "f");
    CHECK(kinds_of(events, 1) == "f");
    CHECK(events.back().finish == Finish::cancelled);
    running->cancel();
    all_events(*running);
  }
  SUBCASE("when it is over") {
    const auto mailbox = engine.submit(0, {request_of(2, 1)});
    events = all_events(*mailbox);
    mailbox->cancel();
    CHECK(events.back().finish == Finish::length);
  }
  slow = false;
  CHECK(ids_of(all_events(*other)) == expected_ids(kept));
  const EngineCounts counts = engine.counts();
  CHECK(counts.running + counts.queued == 0);
  CHECK(counts.requests == all_counted(counts));
}

TEST_CASE("a call that gets no row in time is refused before its answer begins") {
  SteppedEngine e({.rows = 1, .queue_seconds = .05});
  e.gpt->on_step = [](auto) { pause_ms(1); };
  Engine& engine = e.start();
  const auto running = engine.submit(0, {request_of(1, 4000), request_of(1, 4000, 1)});
  const auto late = engine.submit(0, {request_of(2, 5)});
  const auto events = all_events(*late);
  REQUIRE(events.size() == 1);
  CHECK(events[0].kind == Event::failed);
  CHECK(events[0].status == 503);
  CHECK(events[0].code == "queue_timeout");
  CHECK(engine.counts().refused == 1);
  // The running call's second choice waits on: the answer has begun.
  CHECK(engine.counts().queued == 1);
  running->cancel();
  all_events(*running);
}

TEST_CASE("a call that waits for room in the cache is refused in time too") {
  std::vector<ServedModel> models;
  models.push_back(stepped_model(128));
  gpt_of(models[0]).on_step = [](auto) { pause_ms(5); };
  const GeneratorOptions cache{.rows = 4, .cache_positions = 128, .prefill_tokens = 64};
  Engine engine(models, {cache}, {.rows = 4, .queue_seconds = .05, .threads = 1});
  const Request r = request_of(1, 100, 0, 20);
  const auto running = engine.submit(0, {r});
  std::vector<Event> begun;
  wait_for_token(*running, begun);
  const auto late = engine.submit(0, {request_of(2, 100, 0, 100)});
  const auto events = all_events(*late);
  CHECK(kinds_of(events) == "x");
  CHECK(events[0].code == "queue_timeout");
  CHECK(engine.counts().queued == 0);
  for (Event& event : all_events(*running)) begun.push_back(std::move(event));
  CHECK(ids_of(begun) == expected_ids(r));
  CHECK(ids_of(all_events(*engine.submit(0, {request_of(2, 20, 0, 100)}))).size() == 20);
}

TEST_CASE("an error of the engine fails the call that came last, and the server goes on") {
  SteppedEngine e;
  std::atomic<int> failures{0};
  e.gpt->on_step = [&](std::span<const DecodeRow> rows) {
    pause_ms(1);
    for (const DecodeRow& r : rows) {
      if (r.sampling.seed == 2 && failures++ >= 0) fail("out of memory: none for the KV cache");
    }
  };
  Engine& engine = e.start();
  const Request kept = request_of(1, 50);
  const auto other = engine.submit(0, {kept});
  const auto events = all_events(*engine.submit(0, {request_of(2, 5), request_of(2, 5, 1)}));
  CHECK(events.back().kind == Event::failed);
  CHECK(events.back().status == 500);
  CHECK(events.back().text.find("out of memory") != std::string::npos);
  CHECK(ids_of(all_events(*other)) == expected_ids(kept));
  CHECK(failures == 1);
  const Request after = request_of(3, 5);
  CHECK(ids_of(all_events(*engine.submit(0, {after}))) == expected_ids(after));
  const EngineCounts counts = engine.counts();
  CHECK(counts.failed == 2);
  CHECK(counts.running + counts.queued == 0);
  CHECK(counts.requests == all_counted(counts));
}

TEST_CASE("logits that are not finite fail their own call alone") {
  SteppedEngine e({.rows = 8});
  std::atomic<bool> hold{true};
  e.gpt->on_step = [&](auto) {
    while (hold) pause_ms(1);
  };
  Engine& engine = e.start();
  std::vector<std::shared_ptr<Mailbox>> others;
  for (uint64_t seed = 0; seed < 3; seed++) {
    others.push_back(engine.submit(0, {request_of(seed, 20)}));
    if (seed == 1) others.push_back(engine.submit(0, {request_of(kNotFinite, 20)}));
  }
  hold = false;
  const auto failed = all_events(*others[2]);
  CHECK(kinds_of(failed) == "attx");
  CHECK(failed.back().text.find("not finite") != std::string::npos);
  for (const size_t i : {0, 1, 3}) {
    CHECK(ids_of(all_events(*others[i])) == expected_ids(request_of(i == 3 ? 2 : i, 20)));
  }
  const EngineCounts counts = engine.counts();
  CHECK(counts.failed == 1);
  CHECK(counts.finished == 3);
  CHECK(counts.running + counts.queued == 0);
}

TEST_CASE("a tool that throws fails its call alone") {
  SteppedEngine e;
  std::atomic<bool> hold{false};
  e.gpt->on_step = [&](auto) {
    while (hold) pause_ms(1);
  };
  Engine& engine = e.start();
  Request r = request_of(1, 9);
  r.stop_ids = {expected_ids(r)[2]};
  r.max_inserted = 2;
  r.on_turn = [](int, std::span<const int>) -> std::vector<int> { fail("the tool broke"); };
  const Request kept = request_of(2, 50);
  hold = true;
  const auto mailbox = engine.submit(0, {r});
  const auto other = engine.submit(0, {kept});
  hold = false;
  const auto events = all_events(*mailbox);
  CHECK(kinds_of(events) == "atttx");
  CHECK(events.back().text == "the tool broke");
  CHECK(ids_of(all_events(*other)) == expected_ids(kept));
}

TEST_CASE("a request that the generator refuses fails its call alone") {
  SteppedEngine e({.rows = 4}, 64);
  Engine& engine = e.start();
  const auto events = all_events(*engine.submit(0, {request_of(1, 5), request_of(2, 5, 0, 100)}));
  CHECK(events.back().kind == Event::failed);
  const Request after = request_of(3, 5);
  CHECK(ids_of(all_events(*engine.submit(0, {after}))) == expected_ids(after));
  CHECK(engine.counts().running == 0);
}

TEST_CASE("a call of many choices does not keep the rows from calls of one") {
  SteppedEngine e({.rows = 2});
  std::mutex mutex;
  std::vector<uint64_t> order;  // seeds, in the order of their first step
  std::atomic<bool> hold{true};
  e.gpt->on_step = [&](std::span<const DecodeRow> rows) {
    while (hold) pause_ms(1);
    std::lock_guard lock(mutex);
    for (const DecodeRow& r : rows) {
      if (r.history.size() == 4) order.push_back(r.sampling.seed);
    }
  };
  Engine& engine = e.start();
  std::vector<Request> many;
  for (uint64_t c = 0; c < 8; c++) many.push_back(request_of(1, 3, c));
  const auto large = engine.submit(0, many);
  std::vector<std::shared_ptr<Mailbox>> small;
  for (uint64_t seed = 2; seed < 5; seed++) {
    small.push_back(engine.submit(0, {request_of(seed, 3)}));
  }
  hold = false;
  for (const auto& mailbox : small) all_events(*mailbox);
  all_events(*large);
  std::vector<size_t> places;
  for (uint64_t seed = 2; seed < 5; seed++) {
    places.push_back(size_t(std::find(order.begin(), order.end(), seed) - order.begin()));
  }
  CHECK(std::is_sorted(places.begin(), places.end()));  // calls of one choice: in their order
  CHECK(places.back() < 8);                             // before the large one is through
  CHECK(std::count(order.begin(), order.begin() + 8, 1u) >= 3);  // which goes on beside them
}

TEST_CASE("of several models each gets its share of the time") {
  std::vector<ServedModel> models;
  models.push_back(stepped_model(4096, "fast"));
  models.push_back(stepped_model(4096, "slow"));
  gpt_of(models[1]).on_step = [](auto) { pause_ms(10); };
  gpt_of(models[0]).on_step = [](auto) { pause_ms(1); };
  Engine engine(models, {cache_of(models[0], 4), cache_of(models[1], 4)},
                {.rows = 4, .threads = 1});
  const Request a = request_of(1, 2000), b = request_of(1, 30);
  const auto fast = engine.submit(0, {a}), slow = engine.submit(1, {b});
  CHECK(ids_of(all_events(*slow)) == expected_ids(b));
  const int64_t steps = gpt_of(models[0]).steps;  // about 300, where turns would give 30
  CHECK(steps > 60);
  CHECK(steps < 1500);
  CHECK(engine.counts().running == 1);
  fast->cancel();
  all_events(*fast);
  CHECK(api_error_of([&] {
          for (int i = 0;; i++) engine.submit(size_t(i % 2), {request_of(1, 4000)});
        }) == std::pair(503, std::string("queue_full")));  // one queue for both
}

TEST_CASE("shutting down: calls in work end, then fail, and no more are taken") {
  SteppedEngine e({.rows = 1});
  e.gpt->on_step = [](auto) { pause_ms(1); };
  Engine& engine = e.start();
  SUBCASE("in time") {
    const Request r = request_of(1, 20);
    const auto one = engine.submit(0, {r}), two = engine.submit(0, {r});
    engine.drain(30);
    CHECK(ids_of(all_events(*one)) == expected_ids(r));
    CHECK(ids_of(all_events(*two)) == expected_ids(r));
    CHECK(engine.counts().finished == 2);
  }
  SUBCASE("not in time") {
    const auto running = engine.submit(0, {request_of(1, 4000)});
    const auto queued = engine.submit(0, {request_of(2, 4000)});
    engine.drain(.05);
    const auto events = all_events(*running);
    CHECK(events.back().kind == Event::failed);
    CHECK(events.back().status == 503);
    CHECK(events.back().code == "shutting_down");
    CHECK(kinds_of(all_events(*queued)) == "x");
    CHECK(engine.counts().failed == 1);
    CHECK(engine.counts().refused == 1);
  }
  SUBCASE("with nothing in work") { engine.drain(30); }
  CHECK(api_error_of([&] { engine.submit(0, {request_of(1, 1)}); }) ==
        std::pair(503, std::string("shutting_down")));
  const EngineCounts counts = engine.counts();
  CHECK(counts.running + counts.queued == 0);
  CHECK(counts.requests == all_counted(counts));
}

TEST_CASE("an engine that is destroyed ends every call") {
  std::shared_ptr<Mailbox> running, queued;
  {
    SteppedEngine e({.rows = 1});
    e.gpt->on_step = [](auto) { pause_ms(1); };
    Engine& engine = e.start();
    running = engine.submit(0, {request_of(1, 4000)});
    queued = engine.submit(0, {request_of(2, 4000)});
    REQUIRE(!running->wait(30).empty());
    e.engine.reset();
  }
  CHECK(kinds_of(all_events(*running)).back() == 'x');
  CHECK(kinds_of(all_events(*queued)) == "x");
}

TEST_CASE("an engine without work sleeps") {
  SteppedEngine e;
  Engine& engine = e.start();
  all_events(*engine.submit(0, {request_of(1, 5)}));
  const int64_t steps = e.gpt->steps;
  const std::clock_t before = std::clock();
  pause_ms(300);
  CHECK(double(std::clock() - before) / CLOCKS_PER_SEC < .03);  // of all threads
  CHECK(e.gpt->steps == steps);
}

TEST_CASE("many threads submit and cancel at once: every text is right, and nothing is left") {
  SteppedEngine e({.rows = 8, .queue = 24}, 256);
  Engine& engine = e.start();
  std::atomic<int> wrong{0}, whole{0}, cancelled{0}, refused{0}, choices{0};
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 8; t++) {
    threads.emplace_back([&, t] {
      for (uint64_t i = 0; i < 60; i++) {
        Rng rng{mix64(t, i)};
        std::vector<Request> requests;
        for (uint64_t c = 0; c < 1 + rng.below(4); c++) {
          requests.push_back(request_of(1 + rng.below(5), 1 + int(rng.below(60)), c));
        }
        choices += int(requests.size());
        std::shared_ptr<Mailbox> mailbox;
        try {
          mailbox = engine.submit(0, requests);
        } catch (const ApiError&) {
          refused += int(requests.size());
          continue;
        }
        std::vector<Event> events;
        const bool cancels = rng.below(3) == 0;
        for (uint64_t waits = rng.below(8); cancels && waits > 0; waits--) {
          for (Event& event : mailbox->wait(.001)) events.push_back(std::move(event));
        }
        if (cancels) mailbox->cancel();
        if (cancels && rng.below(2) == 0) continue;  // and never reads again
        for (const double end = now() + 60; !mailbox->over() && now() < end;) {
          for (Event& event : mailbox->wait(1, rng.below(2) == 0)) {
            events.push_back(std::move(event));
          }
        }
        for (size_t c = 0; c < requests.size(); c++) {
          const std::vector<int> ids = ids_of(events, int(c)), all = expected_ids(requests[c]);
          const bool is_whole = ids == all;
          const bool begins =
              ids.size() <= all.size() && std::equal(ids.begin(), ids.end(), all.begin());
          if (!(is_whole || (cancels && begins))) wrong++;
          (is_whole ? whole : cancelled)++;
        }
      }
    });
  }
  for (std::thread& t : threads) t.join();
  CHECK(wrong == 0);
  CHECK(whole > 0);
  REQUIRE(wait_until([&] { return engine.counts().running + engine.counts().queued == 0; }));
  const EngineCounts counts = engine.counts();
  CHECK(counts.requests == choices);
  CHECK(counts.refused == refused);
  CHECK(counts.requests == all_counted(counts));
  int64_t first_tokens = 0, gaps = 0;
  for (const int64_t n : counts.first_token_seconds.counts) first_tokens += n;
  for (const int64_t n : counts.between_tokens_seconds.counts) gaps += n;
  CHECK(first_tokens + gaps == counts.new_tokens);
  // The finished sequences that are kept for their prefixes, one for each row, are all that is
  // left in the cache.
  CHECK(e.gpt->cache_in_use->free_positions() >= 9 * 256 - 8 * 256);
}

// ---------------------------------------------------------------------------------------------
// Real models

struct ServedFiles {
  ScriptedModel scripted{256};
  std::string model = scripted.save(), random = save_random_model(scripted, "random");
};
const ServedFiles& served_files() {
  static const ServedFiles files;
  return files;
}

ServeOptions options_for(const std::vector<std::string>& models) {
  ServeOptions o = serve_options(models[0]);
  o.models = models;
  o.chat_template.choice = "auto";
  o.engine.threads = 1;
  return o;
}

std::string load_error(const ServeOptions& o) {
  try {
    load_models(o);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST_CASE("the same seed gives the same text alone and beside others that come and go") {
  for (const std::string weights : {"f32", "bf16", "q8_0"}) {
    CAPTURE(weights);
    ServeOptions o = options_for({served_files().random});
    o.model.weights = weights;
    LoadedModels loaded = load_models(o);
    const auto request = [&](uint64_t seed) {
      Request r = request_of(seed, 30, seed % 3, 4 + int(seed % 4) * 20);
      r.sampling.vocab = loaded.models[0].text.tokenizer.vocab_size();
      if (seed % 2 == 0) std::fill(r.prompt.begin(), r.prompt.begin() + 4, 7);  // shared beginnings
      return r;
    };
    std::map<uint64_t, std::vector<int>> alone;
    {
      Engine engine(loaded.models, loaded.caches, o.engine);
      for (uint64_t seed = 0; seed < 24; seed++) {
        alone[seed] = ids_of(all_events(*engine.submit(0, {request(seed)})));
      }
    }
    CHECK(alone[1] != alone[3]);
    // Room for a few sequences alone: rows are preempted.
    std::vector<GeneratorOptions> small = loaded.caches;
    small[0].cache_positions = 512;
    for (const auto& caches : {loaded.caches, small}) {
      Engine engine(loaded.models, caches, o.engine);
      std::map<uint64_t, std::shared_ptr<Mailbox>> mailboxes, others;
      for (uint64_t seed = 0; seed < 24; seed++) {
        mailboxes[seed] = engine.submit(0, {request(seed)});
        others[seed] = engine.submit(0, {request(100 + seed), request(200 + seed)});
        if (seed >= 4) others[seed - 4]->cancel();
      }
      for (uint64_t seed = 0; seed < 24; seed++) {
        CAPTURE(seed);
        CHECK(ids_of(all_events(*mailboxes[seed])) == alone[seed]);
      }
    }
  }
}

TEST_CASE("models are served under the names that they were given") {
  const ServedFiles& f = served_files();
  const LoadedModels loaded = load_models(options_for({f.model, "r=" + f.random}));
  REQUIRE(loaded.models.size() == 2);
  CHECK(loaded.models[0].id == f.model);
  CHECK(loaded.models[1].id == "r");
  CHECK(loaded.models[0].context == 256);
  CHECK(loaded.models[0].deterministic);
  CHECK(loaded.models[0].sampling.vocab == f.scripted.tokenizer().vocab_size());
  CHECK(std::abs(double(loaded.models[0].created) - double(std::time(nullptr))) < 3600);
  CHECK(loaded.caches[1].rows == 16);
  CHECK(loaded.caches[1].context == 256);
  CHECK(load_error(options_for({f.model, f.model})).find("twice") != std::string::npos);
  CHECK(load_error(options_for({"a=" + f.model, "a=" + f.random})).find("twice") !=
        std::string::npos);
  CHECK(load_error(options_for({"=" + f.model})).find("NAME=PATH") != std::string::npos);
  CHECK(load_error(options_for({"a="})).find("NAME=PATH") != std::string::npos);
  CHECK(load_error(options_for({"a=/nowhere"})).find("/nowhere: not found") != std::string::npos);
}

TEST_CASE("a fingerprint differs when what decides the text differs, and agrees otherwise") {
  const ServedFiles& f = served_files();
  const auto fingerprint_of = [](const ServeOptions& o) {
    return load_models(o).models[0].fingerprint;
  };
  const ServeOptions o = options_for({f.random});
  const std::string print = fingerprint_of(o);
  CHECK(print.starts_with("fp_"));
  CHECK(print.ends_with("-deterministic"));
  ServeOptions other = o;
  other.model.threads = 2, other.engine.rows = 3, other.models = {"name=" + f.random};
  CHECK(fingerprint_of(other) == print);
  CHECK(fingerprint_of(options_for({f.model})) != print);
  other = o, other.model.weights = "bf16";
  CHECK(fingerprint_of(other) != print);
  other = o, other.model.cache_type = "bf16";
  CHECK(fingerprint_of(other) != print);
  other = o, other.chat_template.choice = "none";
  CHECK(fingerprint_of(other) != print);
  other = o, other.chat_template.values = {"enable_thinking=false"};
  CHECK(fingerprint_of(other) != print);
  // One bit of one weight.
  const std::filesystem::path copy = f.scripted.dir() / "copy";
  std::filesystem::copy(f.random, copy);
  CHECK(fingerprint_of(options_for({copy.string()})) == print);
  std::string bytes = read_file(copy / "model.safetensors");
  bytes[bytes.size() - 4] ^= 1;
  write_file(copy / "model.safetensors", bytes);
  CHECK(fingerprint_of(options_for({copy.string()})) != print);
}

TEST_CASE("the default sampling is what generation_config.json says") {
  const TempDir dir;
  const auto sampling_of = [&](const std::string& text) {
    write_file(dir / "generation_config.json", text);
    return default_sampling(dir.path(), 300);
  };
  const auto error_of = [&](const std::string& text) {
    try {
      sampling_of(text);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  CHECK(default_sampling(dir.path(), 300).temperature == 1);
  const Sampling s = sampling_of(
      R"({"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": null,
          "repetition_penalty": 1.05, "eos_token_id": 1})");
  CHECK(s.temperature == .7f);
  CHECK(s.top_p == .8f);
  CHECK(s.top_k == 20);
  CHECK(s.min_p == 0);
  CHECK(s.repetition_penalty == 1.05f);
  CHECK(s.vocab == 300);
  CHECK(sampling_of(R"({"do_sample": false, "temperature": 0.7})").temperature == 0);
  CHECK(error_of(R"({"temperature": "hot"})").find("temperature: found \"hot\"") !=
        std::string::npos);
  CHECK(error_of(R"({"top_p": 1.5})").find("top_p: found 1.5, expected 0 to 1") !=
        std::string::npos);
}

TEST_CASE("a base model that comes with a template for assistants answers no conversation") {
  const ServedFiles& f = served_files();
  const auto has_template = [&](const std::string& end_tokens, const std::string& name) {
    const std::filesystem::path copy = f.scripted.dir() / "base_copy";
    std::filesystem::remove_all(copy);
    std::filesystem::copy(f.random, copy);
    OrderedJson config = parse_json<OrderedJson>(read_file(copy / "config.json"), "config.json");
    config["eos_token_id"] = OrderedJson::parse(end_tokens);
    write_file(copy / "config.json", config.dump());
    std::filesystem::remove(copy / "generation_config.json");
    ServeOptions o = options_for({copy.string()});
    o.chat_template.choice = name;
    return load_models(o).models[0].text.chat.has_value();
  };
  const std::string end_of_turn = concat(f.scripted.tokenizer().special("<|im_end|>"));
  CHECK_FALSE(has_template("[5]", "auto"));
  CHECK(has_template("[5]", "chatml"));
  CHECK(has_template("[5, " + end_of_turn + "]", "auto"));
  CHECK_FALSE(has_template("[5, " + end_of_turn + "]", "none"));
  CHECK(has_template("null", "auto"));
}

TEST_CASE("tools run on the server for the models that can call them; documents are read once") {
  const ServedFiles& f = served_files();
  const std::filesystem::path pipe = f.scripted.dir() / "documents.txt";
  REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
  std::thread writer([&] { std::ofstream(pipe) << "The baker of Olm is Ada.\n"; });
  ServeOptions o = options_for({f.model, "b=" + f.random});
  o.chat_template.choice = "chatml", o.calculator = true, o.documents = pipe.string();
  const LoadedModels loaded = load_models(o);
  writer.join();
  for (const ServedModel& m : loaded.models) {
    CHECK(m.tools == std::vector<std::string>{kCalculatorTool, kSearchTool});
    REQUIRE(m.search);
    CHECK(m.search->best("baker") == "The baker of Olm is Ada.");
  }
  o.chat_template.choice = "none", o.documents = "";
  CHECK(load_error(o).find("--calculator, --documents: found no model") != std::string::npos);
}

TEST_CASE("the models fit into the memory that is stated, or an error says what lowers it") {
  const ServedFiles& f = served_files();
  std::vector<std::string> lines;
  ServeOptions o = options_for({f.random, "b=" + f.random});
  o.cache_mb = 0;
  o.memory_mb = 40;
  LoadedModels loaded = load_models(o, [&](const std::string& line) { lines.push_back(line); });
  CAPTURE(lines);
  REQUIRE(lines.size() == 3);
  CHECK(lines[0].starts_with(f.random + ": weights f32 "));
  CHECK(lines[0].find("context 256, 16 rows") != std::string::npos);
  CHECK(lines[1].starts_with("b: "));
  CHECK(lines[2].starts_with("memory: up to "));
  CHECK(lines[2].ends_with(" of 41.9 MB"));
  CHECK(loaded.caches[0].cache_positions == 16 * 256);  // as many as the rows can use
  // The least memory that will do for whole contexts: the caches share what is left.
  o.model.context = 256;
  for (o.memory_mb = 1; load_error(o) != "no error"; o.memory_mb++) REQUIRE(o.memory_mb < 40);
  loaded = load_models(o);
  for (const GeneratorOptions& cache : loaded.caches) {
    CHECK(cache.cache_positions < 16 * 256);
    CHECK(cache.cache_positions >= 256);
  }
  o.model.context = 0;
  o.memory_mb = 1;
  CHECK(load_error(o).find("--weights bf16 or q8_0") != std::string::npos);
  CHECK(load_error(o).find("found 1.0 MB (--memory-mb); raise it, ") != std::string::npos);
  o.memory_mb = 40, o.cache_mb = 1000;
  CHECK(load_error(o) == "no error");  // the rows use no more than their contexts
  o.memory_mb = 0, o.cache_mb = 0, o.model.context = 1000;
  CHECK(load_error(o).find("--context: found 1000, expected 2 to 256") != std::string::npos);
  o.model.context = 100;
  CHECK(load_models(o).models[1].context == 100);
}

}  // namespace
