// Stage 7: models behind HTTP: in a browser, and as OpenAI's API has them.
//
//     ./serve runs/demo/ppo                           one model, on http://127.0.0.1:8080
//     ./serve base=runs/demo/base ppo=runs/demo/ppo   several, by name
//     ./serve model.gguf --port 9000 --weights q8_0
//     ./serve sft=runs/demo/sft ppo=runs/demo/ppo --votes votes.db    with an arena on the page
//     ./serve export votes.db -o preferences.jsonl    its votes, as ./reward reads them
//
// The page is serve_page.cpp's, the arena serve_arena.cpp's; the API is under /v1. Any client of
// OpenAI's API works with it: curl, openai-python, Open WebUI. The same seed gives the same text,
// whatever else is served at the time: a row of the engine is computed alone (cake/generate.h), and
// its samples are a function of the seed and the number of the choice.
//
// How a request becomes an answer:
//
//     HttpServer (serve_http.cpp)     a connection's thread reads the request; who may not ask is
//                                     refused before its body is read
//     read_chat, make_requests        JSON -> ids; what is wrong is refused here, with the name of
//     (serve_api.cpp)                 the field
//     Engine::submit                  -> a queue of bounded length; beyond it: 503 at once
//     (serve_engine.cpp)                 one thread decodes the rows of all calls together
//     Mailbox::wait                   -> tokens, on the connection's thread again
//     AnswerWriter (serve_answer.cpp) -> JSON, or a chunk of the stream
//
// The status is sent when the engine has begun with the call. From then on errors are events of the
// stream. When the client leaves, whether its call is queued, read or answered, the engine forgets
// the call.
//
// The server listens first and loads the models then: meanwhile every answer is 503. The first
// signal lets the calls in work end, --grace seconds at most. The second one ends the process.
//
// The order of this file: the server from its first to its last moment; routes; a call and its
// stream; the smaller answers; the command line.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cake/arena.h"
#include "cake/charset.h"
#include "cake/checkpoint.h"
#include "cake/flags.h"
#include "cake/json.h"
#include "cake/page.h"
#include "cake/run.h"
#include "cake/serve.h"
#include "cake/votes.h"

namespace cake {
namespace {

using Strings = std::vector<std::string>;
using Handler = std::function<void(const httplib::Request&, httplib::Response&)>;

constexpr double kPollSeconds = .1;      // how long a client that left goes unnoticed, at most
constexpr double kLastWordsSeconds = 1;  // for answers to be sent once the engine has stopped

}  // namespace

// ---------------------------------------------------------------------------------------------
// The server, from its first to its last moment

struct Server::State {
  explicit State(const ServeOptions&);

  int run();
  void serve_until_stopped();
  void announce() const;
  void close();
  void print(const std::string& line) const {
    if (options.print) options.print(line);
  }

  // Routes
  void add_routes();
  void add_route(const std::string& method, const std::string& path, const Handler& handler);
  void expect_ready() const;
  size_t find_model(const std::string& name) const;
  [[noreturn]] void refuse_model(const std::string& name) const;
  const ServedModel& model_of(const OrderedJson& body) const;
  void log(const std::string& route, const httplib::Response& response, double seconds) const;

  // Handlers
  void answer(const httplib::Request&, httplib::Response&, bool chat);
  void next_token(const httplib::Request&, httplib::Response&);
  BattleArena& arena_or_error() const;
  OrderedJson models_json() const;
  OrderedJson props_json(size_t model) const;
  OrderedJson tokenizer_info() const;
  OrderedJson tokenize(const OrderedJson& body) const;
  OrderedJson detokenize(const OrderedJson& body) const;
  OrderedJson apply_template(const OrderedJson& body) const;
  std::string metrics() const;

  ServeOptions options;
  HttpServer http;
  int port;
  LoadedModels loaded;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<BattleArena> arena;  // null: without --votes
  std::atomic<bool> ready{false}, stopped{false};
  std::mutex mutex;
  std::condition_variable stop_called;
};

static ServeOptions with_derived_options(ServeOptions o) {
  o.http.public_paths = page_paths();
  o.http.public_paths.insert(o.http.public_paths.end(), {"/health", "/v1/health"});
  o.engine.threads = o.model.threads;
  o.limits.max_choices = o.engine.rows + o.engine.queue;  // more could never be queued
  return o;
}

Server::State::State(const ServeOptions& o) : options(with_derived_options(o)), http(options.http) {
  add_routes();
  port = http.bind();
}

int Server::State::run() {
  std::thread accepting([this] { http.run(); });
  try {
    print(concat("listening on port ", port, "; answers 503 until the models are loaded"));
    loaded = load_models(options, options.print);
    engine = std::make_unique<Engine>(loaded.models, loaded.caches, options.engine);
    if (!options.arena.votes.empty()) {
      arena = std::make_unique<BattleArena>(options.arena, loaded.models, *engine, options.limits);
    }
    ready = true;
    serve_until_stopped();
  } catch (const Interrupted&) {  // while a model was loaded
  } catch (...) {
    close();
    accepting.join();
    throw;
  }
  close();
  accepting.join();
  print("stopped");
  return 0;
}

void Server::State::serve_until_stopped() {
  if (!stopped && !stop_signal) announce();
  std::unique_lock lock(mutex);
  while (!stopped && !stop_signal) {  // a signal handler may not notify
    stop_called.wait_for(lock, std::chrono::milliseconds(50));
  }
}

void Server::State::announce() const {
  const std::string& host = options.http.host;
  const bool any = host == "0.0.0.0" || host == "::";
  const std::string url = concat("http://",
                                 any                                   ? "127.0.0.1"
                                 : host.find(':') != std::string::npos ? "[" + host + "]"
                                                                       : host,
                                 ":", port);
  Strings names;
  const ServedModel* example = &loaded.models[0];
  for (const ServedModel& m : loaded.models) {
    names.push_back(m.id);
    if (!example->text.chat) example = &m;
  }
  std::string list;
  for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
  const bool chat = example->text.chat.has_value();
  OrderedJson body{{"model", example->id}};
  if (chat) body["messages"] = {{{"role", "user"}, {"content", "Hello"}}};
  if (!chat) body["prompt"] = "Once upon a time";
  std::string quoted = json_line(body);
  quoted.pop_back();
  for (size_t i = 0; (i = quoted.find('\'', i)) != std::string::npos; i += 4) {
    quoted.replace(i, 1, "'\\''");  // for the shell
  }
  print(concat("ready: ", url, " in a browser, ", url, "/v1 for programs",
               any ? ", and every other address of this machine" : "", "; ",
               names.size() == 1 ? "model " : "models ", list));
  print(concat("  curl ", url, "/v1", chat ? "/chat/completions" : "/completions",
               options.http.keys.empty() ? "" : " -H \"Authorization: Bearer $KEY\"", " -d '",
               quoted, "'"));
}

// What is in work may end, within the grace; then every connection is closed.
void Server::State::close() {
  http.stop();
  if (engine) engine->drain(options.grace_seconds);
  if (!http.wait_until_closed(kLastWordsSeconds)) {
    http.close_all();
    while (!http.wait_until_closed(1)) http.close_all();
  }
}

Server::Server(const ServeOptions& options) : state_(std::make_unique<State>(options)) {}
Server::~Server() = default;
int Server::port() const { return state_->port; }
int Server::run() { return state_->run(); }
void Server::stop() {
  const std::lock_guard lock(state_->mutex);
  state_->stopped = true;
  state_->stop_called.notify_all();
}

// ---------------------------------------------------------------------------------------------
// Routes. Each has two paths: with and without /v1, because a base URL without it is the usual
// mistake. Nothing in a URL starts a generation: web pages can make a browser open any URL.

namespace {

void send_json(httplib::Response& response, const OrderedJson& json) {
  response.set_content(json_line(json), "application/json");
}

}  // namespace

void Server::State::add_routes() {
  using httplib::Request, httplib::Response;
  add_route("GET", "/health", [](const Request&, Response& response) {
    send_json(response, {{"status", "ok"}});
  });
  add_route("GET", "/models", [this](const Request&, Response& response) {
    send_json(response, {{"object", "list"}, {"data", models_json()}});
  });
  add_route("GET", "/models/*", [this](const Request& request, Response& response) {
    constexpr std::string_view kModels = "/models/";  // an id may hold slashes
    const std::string id = request.path.substr(request.path.find(kModels) + kModels.size());
    for (const OrderedJson& model : models_json()) {
      if (model["id"] == id) return send_json(response, model);
    }
    refuse_model(id);
  });
  add_route("GET", "/props", [this](const Request&, Response& response) {
    OrderedJson json = props_json(0);
    json["models"] = OrderedJson::array();
    for (size_t i = 0; i < loaded.models.size(); i++) json["models"].push_back(props_json(i));
    json["arena"] = arena ? arena->state() : OrderedJson();
    send_json(response, json);
  });
  add_route("GET", "/tokenizer_info",
            [this](const Request&, Response& response) { send_json(response, tokenizer_info()); });
  add_route("GET", "/metrics", [this](const Request&, Response& response) {
    response.set_content(metrics(), "text/plain; version=0.0.4; charset=utf-8");
  });
  for (const bool chat : {true, false}) {
    add_route("POST", chat ? "/chat/completions" : "/completions",
              [this, chat](const Request& request, Response& response) {
                answer(request, response, chat);
              });
  }
  add_route("POST", "/next_token",
            [this](const Request& request, Response& response) { next_token(request, response); });
  using JsonHandler = OrderedJson (State::*)(const OrderedJson&) const;
  const auto add_json_route = [this](const char* path, JsonHandler handler) {
    add_route("POST", path, [this, handler](const Request& request, Response& response) {
      send_json(response, (this->*handler)(read_body(request.body, options.limits)));
    });
  };
  add_json_route("/tokenize", &State::tokenize);
  add_json_route("/detokenize", &State::detokenize);
  add_json_route("/apply-template", &State::apply_template);
  add_route("POST", "/arena/battle", [this](const Request& request, Response& response) {
    arena_or_error().battle(request, response);
  });
  using ArenaHandler = OrderedJson (BattleArena::*)(const OrderedJson&);
  const auto add_arena_route = [this](const char* path, ArenaHandler handler) {
    add_route("POST", path, [this, handler](const Request& request, Response& response) {
      BattleArena& a = arena_or_error();
      send_json(response, (a.*handler)(read_body(request.body, options.limits)));
    });
  };
  add_arena_route("/arena/vote", &BattleArena::vote);
  add_arena_route("/arena/stop", &BattleArena::stop);
  add_arena_route("/arena/undo", &BattleArena::undo);
  add_arena_route("/arena/leaderboard", &BattleArena::leaderboard);
  add_page(http, options.web);
}

void Server::State::add_route(const std::string& method, const std::string& path,
                              const Handler& handler) {
  for (const char* prefix : {"", "/v1"}) {
    const std::string route = prefix + path;
    const Handler whole = [this, method, route, handler](const auto& request, auto& response) {
      const double begin = now();
      try {
        expect_ready();
        response.set_header("Cache-Control", "no-store");
        handler(request, response);
      } catch (const ApiError& e) {
        set_error(response, e);
      }
      log(method + " " + route, response, now() - begin);
    };
    method == "GET" ? http.Get(route, whole) : http.Post(route, whole);
  }
}

void Server::State::expect_ready() const {
  if (http.stopping()) {
    throw ApiError(503, "server_error", "shutting_down", "", "the server is shutting down");
  }
  if (!ready) throw ApiError(503, "unavailable_error", "loading_model", "", "Loading model");
}

// The model of a request: by its id. Where there is only one, or with --any-model, every other name
// means the first one: many clients have a name of OpenAI's built in. The answer says which it is.
size_t Server::State::find_model(const std::string& name) const {
  for (size_t i = 0; i < loaded.models.size(); i++) {
    if (loaded.models[i].id == name) return i;
  }
  if (name.empty() || options.any_model || loaded.models.size() == 1) return 0;
  refuse_model(name);
}

BattleArena& Server::State::arena_or_error() const {
  if (arena) return *arena;
  throw ApiError(404, "not_found_error", "no_arena", "",
                 "this server collects no votes: start it with --votes FILE");
}

void Server::State::refuse_model(const std::string& name) const {
  std::string served;
  for (const ServedModel& m : loaded.models) served += (served.empty() ? "" : ", ") + m.id;
  throw ApiError(404, "not_found_error", "model_not_found", "model",
                 concat("model: found ", json_text(name), ", expected one of: ", served));
}

const ServedModel& Server::State::model_of(const OrderedJson& body) const {
  return loaded.models[find_model(requested_model(body))];
}

// --verbose: no text of the user's, not even a path that is not in the table above.
void Server::State::log(const std::string& route, const httplib::Response& response,
                        double seconds) const {
  if (!options.verbose) return;
  const std::time_t time = std::time(nullptr);
  std::tm local{};
  localtime_r(&time, &local);
  const int status = response.status < 0 ? 200 : response.status;
  print(format("%02d:%02d:%02d %s %d %.3f s", local.tm_hour, local.tm_min, local.tm_sec,
               route.c_str(), status, seconds));
}

// ---------------------------------------------------------------------------------------------
// A call and its answer

namespace {

struct ClientLeft {};

// Whoever holds this waits for its answer: the engine forgets the call with it.
struct CallInWork {
  CallInWork(ApiCall api_call, const ServedModel& model, std::vector<std::vector<int>> prompts,
             std::shared_ptr<Mailbox> events)
      : api(std::move(api_call)),
        writer(api, model, std::move(prompts)),
        mailbox(std::move(events)) {}
  CallInWork(const CallInWork&) = delete;
  CallInWork& operator=(const CallInWork&) = delete;
  ~CallInWork() { mailbox->cancel(); }

  ApiCall api;
  AnswerWriter writer;
  std::shared_ptr<Mailbox> mailbox;
};

struct CancelAtEnd {
  std::shared_ptr<Mailbox> mailbox;
  ~CancelAtEnd() { mailbox->cancel(); }
};

// Waits for events before the status is sent, so that errors still have one of their own. Throws
// ClientLeft, and ApiError for a call that failed.
std::vector<Event> wait_for_events(Mailbox& mailbox, bool until_over) {
  for (;;) {
    std::vector<Event> events = mailbox.wait(kPollSeconds, until_over);
    for (const Event& e : events) {
      if (e.kind != Event::failed) continue;
      throw ApiError(e.status, e.status == 503 ? "unavailable_error" : "server_error", e.code, "",
                     e.text);
    }
    if (mailbox.over()) return events;
    if (client_left()) throw ClientLeft();
    if (!events.empty()) return events;
  }
}

// Of answers that are there already.
std::shared_ptr<Mailbox> mailbox_of_complete(const std::vector<cake::Request>& requests) {
  auto mailbox = std::make_shared<Mailbox>(int(requests.size()));
  for (size_t i = 0; i < requests.size(); i++) {
    mailbox->put({.kind = Event::finished,
                  .choice = int(i),
                  .finish = Finish::stop_token,
                  .prompt_tokens = int(requests[i].prompt.size())});
  }
  return mailbox;
}

std::string whole_answer(CallInWork& call) {
  while (!call.mailbox->over()) call.writer.add(wait_for_events(*call.mailbox, true));
  return call.writer.whole();
}

// Writes the stream from its first to its last event, `events` first. A chunk holds what is there;
// none waits for more. `keep_alive`: seconds of silence, after which an empty delta is sent. False
// when the client has left.
bool write_stream(CallInWork& call, std::span<const Event> events, double keep_alive,
                  httplib::DataSink& sink) {
  double written = now(), looked = written;
  const auto write = [&](const std::string& text) {
    if (text.empty()) return true;
    written = now();
    return sink.write(text.data(), text.size());
  };
  if (!write(call.writer.begin() + call.writer.add(events))) return false;
  while (!call.writer.failed() && !call.mailbox->over()) {
    const std::vector<Event> more = call.mailbox->wait(kPollSeconds);
    const double t = now();
    if (t - looked >= kPollSeconds / 2) {
      if (client_left()) return false;
      looked = t;
    }
    std::string text = call.writer.add(more);
    if (text.empty() && t - written >= keep_alive) text = call.writer.keep_alive();
    if (!write(text)) return false;
  }
  if (!call.writer.failed() && !write(call.writer.end())) return false;
  sink.done();
  return true;
}

}  // namespace

void Server::State::answer(const httplib::Request& request, httplib::Response& response,
                           bool chat) {
  engine->expect_room();  // a flood is refused before its JSON is read
  const OrderedJson body = read_body(request.body, options.limits);
  const size_t number = find_model(requested_model(body));
  const ServedModel& model = loaded.models[number];
  ApiCall api =
      chat ? read_chat(body, model, options.limits) : read_completion(body, model, options.limits);
  std::vector<cake::Request> requests = make_requests(api, model, options.limits);
  std::vector<std::vector<int>> prompts;
  for (size_t i = 0; i < requests.size(); i += size_t(api.n)) prompts.push_back(requests[i].prompt);
  std::shared_ptr<Mailbox> mailbox = is_complete(api, model)
                                         ? mailbox_of_complete(requests)
                                         : engine->submit(number, std::move(requests));
  const auto call =
      std::make_shared<CallInWork>(std::move(api), model, std::move(prompts), std::move(mailbox));
  try {
    if (!call->api.stream) {
      return response.set_content(whole_answer(*call), "application/json");
    }
    std::vector<Event> events = wait_for_events(*call->mailbox, false);
    const double keep_alive = options.keep_alive_seconds;
    set_event_stream(response,
                     [call, events = std::move(events), keep_alive](httplib::DataSink& sink) {
                       return write_stream(*call, events, keep_alive, sink);
                     });
  } catch (const ClientLeft&) {
    response.status = 499;  // nobody reads it; as nginx logs it
  }
}

// What the first token of an answer would be sampled from.
void Server::State::next_token(const httplib::Request& request, httplib::Response& response) {
  const OrderedJson body = read_body(request.body, options.limits);
  const size_t number = find_model(requested_model(body));
  const ServedModel& model = loaded.models[number];
  const ApiCall api = read_next_token(body, model, options.limits);
  const std::shared_ptr<Mailbox> mailbox =
      engine->submit(number, make_requests(api, model, options.limits));
  const CancelAtEnd cancel{mailbox};
  try {
    std::shared_ptr<const Distribution> distribution;
    while (!mailbox->over()) {
      for (const Event& e : wait_for_events(*mailbox, true)) {
        if (e.distribution) distribution = e.distribution;
      }
    }
    require(distribution != nullptr, "/next_token: the engine gave no distribution");
    OrderedJson json = next_token_json(*distribution, model.text.tokenizer, api.next_tokens);
    json["model"] = model.id;
    send_json(response, json);
  } catch (const ClientLeft&) {
    response.status = 499;
  }
}

// ---------------------------------------------------------------------------------------------
// The smaller answers

namespace {

// The text of a token: a string, or the bytes of what is no text.
OrderedJson piece_json(std::string_view bytes) {
  if (is_utf8(bytes)) return bytes;
  OrderedJson list = OrderedJson::array();
  for (const char byte : bytes) list.push_back(int(static_cast<unsigned char>(byte)));
  return list;
}

void add_origin(OrderedJson& json, const PromptOrigin& origin) {
  json["source"] = origin.source;
  json["message"] = origin.message < 0 ? OrderedJson() : OrderedJson(origin.message);
}

// What compiled this: the same weights may round otherwise in another build.
std::string build_text() {
#ifdef __clang__
  std::string text = concat("clang++ ", __clang_version__);
#else
  std::string text = concat("g++ ", __VERSION__);
#endif
#if defined(__AVX512F__)
  text += ", AVX-512";
#elif defined(__AVX2__)
  text += ", AVX2";
#endif
  return text;
}

}  // namespace

// "created" and "owned_by" are what openai-python wants, "meta" is llama.cpp's, and "max_model_len"
// vLLM's.
OrderedJson Server::State::models_json() const {
  OrderedJson list = OrderedJson::array();
  for (const ServedModel& m : loaded.models) {
    list.push_back({{"id", m.id},
                    {"object", "model"},
                    {"created", m.created},
                    {"owned_by", "cake"},
                    {"max_model_len", m.context},
                    {"meta",
                     {{"n_vocab", m.text.tokenizer.vocab_size()},
                      {"n_ctx", m.context},
                      {"n_ctx_train", m.text.config.T},
                      {"n_params", m.text.gpt->table().parameters()}}}});
  }
  return list;
}

// In llama.cpp's form, without its path of the model's file.
OrderedJson Server::State::props_json(size_t number) const {
  const ServedModel& m = loaded.models[number];
  OrderedJson json{{"model", m.id},
                   {"default_generation_settings",
                    {{"n_ctx", m.context},
                     {"params",
                      {{"temperature", m.sampling.temperature},
                       {"top_k", m.sampling.top_k},
                       {"top_p", m.sampling.top_p},
                       {"min_p", m.sampling.min_p},
                       {"repeat_penalty", m.sampling.repetition_penalty}}}}},
                   {"total_slots", options.engine.rows},
                   {"is_chat", m.text.chat.has_value()},
                   {"chat_template", m.text.chat ? m.text.chat->text() : ""},
                   {"tools", OrderedJson::array()},
                   {"deterministic", m.deterministic},
                   {"system_fingerprint", m.fingerprint},
                   {"build_info", build_text()}};
  for (const std::string& tool : m.tools) json["tools"].push_back(OrderedJson::parse(tool)["name"]);
  return json;
}

// Of the first model: what lm-evaluation-harness asks before it uses /tokenize.
OrderedJson Server::State::tokenizer_info() const {
  const ServedModel& m = loaded.models[0];
  const Config& c = m.text.config;
  const auto token = [&](int id) {
    return id < 0 ? OrderedJson() : OrderedJson(m.text.tokenizer.token_bytes(id));
  };
  const std::vector<int> ends = c.all_end_tokens();
  return {{"eos_token", token(ends.empty() ? m.text.document_start : ends[0])},
          {"bos_token", token(c.bos)},
          {"pad_token", token(c.pad)},
          {"chat_template", m.text.chat ? OrderedJson(m.text.chat->text()) : OrderedJson()}};
}

// llama.cpp's form, {"content", "add_special", "parse_special", "with_pieces"}, and vLLM's,
// {"prompt", "add_special_tokens"} or {"messages"}, whose answer has "count" and "max_model_len".
// "with_places" is our own: where each token is in the text (of messages: in the text that the
// tokens make), in bytes, and whether it is special. So is "origins", of messages: what each token
// is from (PromptOrigin).
OrderedJson Server::State::tokenize(const OrderedJson& body) const {
  const ServedModel& m = model_of(body);
  const bool is_content = body.contains("content"), is_prompt = body.contains("prompt");
  const bool is_messages = body.contains("messages");
  if (is_content + is_prompt + is_messages != 1) {
    bad_request(is_content || is_prompt ? "messages" : "content",
                "found none or several of content, prompt and messages, expected one of them");
  }
  const bool with_places = body_value(body, "with_places", false);
  std::vector<TokenPlace> places;
  std::vector<PromptOrigin> origins;
  if (is_messages) {
    const ApiCall call = read_chat(body, m, options.limits);
    if (body_value(body, "origins", false)) origins = prompt_origins(call, m);
    for (const int id : prompt_of(call)) {
      const size_t begin = places.empty() ? 0 : places.back().end;
      places.push_back({id, begin, begin + m.text.tokenizer.token_bytes(id).size()});
    }
  } else {
    const char* key = is_content ? "content" : "prompt";
    const auto text = body_value<std::string>(body, key, "");
    const bool add = is_content ? body_value(body, "add_special", false)
                                : body_value(body, "add_special_tokens", true);
    const bool parse = body_value(body, "parse_special", true);
    if (add && m.text.document_start >= 0) places.push_back({m.text.document_start, 0, 0});
    const std::vector<TokenPlace> more = m.text.tokenizer.encode_places(text, parse);
    places.insert(places.end(), more.begin(), more.end());
  }
  OrderedJson tokens = OrderedJson::array();
  const bool pieces = body_value(body, "with_pieces", false);
  for (size_t i = 0; i < places.size(); i++) {
    const auto [id, begin, end] = places[i];
    if (!pieces && !with_places && origins.empty()) {
      tokens.push_back(id);
      continue;
    }
    OrderedJson token{{"id", id}};
    if (pieces) token["piece"] = piece_json(m.text.tokenizer.token_bytes(id));
    token["special"] = m.text.tokenizer.is_special(id);
    if (with_places) token["begin"] = begin, token["end"] = end;
    if (!origins.empty()) add_origin(token, origins[i]);
    tokens.push_back(token);
  }
  OrderedJson json{{"tokens", std::move(tokens)}};
  if (!is_content) json["count"] = places.size(), json["max_model_len"] = m.context;
  return json;
}

OrderedJson Server::State::detokenize(const OrderedJson& body) const {
  const ServedModel& m = model_of(body);
  const auto it = body.find("tokens");
  if (it == body.end() || !it->is_array()) {
    bad_request("tokens", concat("tokens: found ", it == body.end() ? "none" : json_text(*it),
                                 ", expected an array of ids"));
  }
  std::vector<int> ids;
  const int vocab = m.text.tokenizer.vocab_size();
  for (size_t i = 0; i < it->size(); i++) {
    const OrderedJson& id = (*it)[i];
    if (!id.is_number_integer() || id < 0 || id >= vocab) {
      const std::string key = concat("tokens[", i, "]");
      bad_request(key,
                  concat(key, ": found ", json_text(id), ", expected an id, 0 to ", vocab - 1));
    }
    ids.push_back(id.get<int>());
  }
  const std::string text = m.text.tokenizer.decode(ids);
  return {{"content", text}, {"prompt", text}};  // llama.cpp's name, and vLLM's
}

// llama.cpp's form. "origins" is our own: the prompt in stretches, each of one origin, where each
// special token is a stretch of its own.
OrderedJson Server::State::apply_template(const OrderedJson& body) const {
  const ServedModel& m = model_of(body);
  const Tokenizer& tokenizer = m.text.tokenizer;
  const ApiCall call = read_chat(body, m, options.limits);
  const std::vector<int> ids = prompt_of(call);
  OrderedJson json{{"prompt", tokenizer.decode(ids)}};
  if (!body_value(body, "origins", false)) return json;
  const std::vector<PromptOrigin> origins = prompt_origins(call, m);
  json["stretches"] = OrderedJson::array();
  for (size_t begin = 0, end = 0; begin < ids.size(); begin = end) {
    const bool special = tokenizer.is_special(ids[begin]);
    const auto belongs = [&](size_t i) {
      return !special && !tokenizer.is_special(ids[i]) && origins[i] == origins[begin];
    };
    for (end = begin + 1; end < ids.size() && belongs(end);) end++;
    const auto part = std::span(ids).subspan(begin, end - begin);
    OrderedJson stretch{{"text", piece_json(tokenizer.decode(part))}};
    add_origin(stretch, origins[begin]);
    stretch["special"] = special;
    json["stretches"].push_back(std::move(stretch));
  }
  return json;
}

// Prometheus's text format, 0.0.4.
std::string Server::State::metrics() const {
  const EngineCounts c = engine->counts();
  const HttpCounts h = http.counts();
  std::string text;
  const auto head = [&](const char* name, const char* type, const char* help) {
    text += concat("# HELP cake_", name, " ", help, "\n# TYPE cake_", name, " ", type, "\n");
  };
  const auto value = [&](const char* name, const char* type, const char* help, auto x) {
    head(name, type, help);
    text += concat("cake_", name, " ", x, "\n");
  };
  const auto counter = [&](const char* name, const char* help, auto x) {
    value(name, "counter", help, x);
  };
  const auto histogram = [&](const char* name, const char* help,
                             const EngineCounts::Histogram& values) {
    head(name, "histogram", help);
    int64_t count = 0;
    for (size_t i = 0; i < values.counts.size(); i++) {
      count += values.counts[i];
      const bool last = i == values.bounds.size();
      text += concat("cake_", name, "_bucket{le=\"", last ? "+Inf" : format("%g", values.bounds[i]),
                     "\"} ", count, "\n");
    }
    text += concat("cake_", name, "_sum ", format("%.9g", values.sum), "\ncake_", name, "_count ",
                   count, "\n");
  };
  value("requests_running", "gauge", "Choices that are being answered.", c.running);
  value("requests_queued", "gauge", "Choices that wait for a row.", c.queued);
  counter("requests_total", "Choices that were asked for.", c.requests);
  counter("requests_finished_total", "Choices that were answered.", c.finished);
  counter("requests_cancelled_total", "Choices whose client left.", c.cancelled);
  counter("requests_refused_total", "Choices that found the queue full or waited too long.",
          c.refused);
  counter("prompt_tokens_total", "Tokens of prompts that were computed.", c.prompt_tokens);
  counter("reused_tokens_total", "Tokens of prompts that were found in the cache.",
          c.reused_tokens);
  counter("generated_tokens_total", "Tokens that were sampled.", c.new_tokens);
  counter("preemptions_total", "Rows that gave up their memory for others.", c.preemptions);
  counter("busy_seconds_total", "Time in which the engine computed.",
          format("%.9g", c.busy_seconds));
  histogram("first_token_seconds", "From a request to its first token.", c.first_token_seconds);
  histogram("between_tokens_seconds", "Between two tokens of a choice.", c.between_tokens_seconds);
  histogram("queue_seconds", "From a request to its row.", c.queue_seconds);
  value("connections_open", "gauge", "Connections that are open.", h.open);
  counter("connections_total", "Connections that were accepted.", h.accepted);
  counter("connections_refused_total", "Connections that were one too many.", h.refused);
  counter("connections_closed_idle_total", "Connections that were closed while idle.",
          h.closed_idle);
  counter("connections_timed_out_total", "Connections whose request took too long.", h.timed_out);
  return text;
}

// ---------------------------------------------------------------------------------------------
// The command line

namespace {

// A key on each line. A key on the command line would be in every list of processes.
void read_keys(const std::string& path, Strings& keys) {
  std::istringstream lines(read_file(path));
  int number = 0;
  const size_t before = keys.size();
  for (std::string line; std::getline(lines, line);) {
    number++;
    const std::string key(strip_ascii(line));
    if (key.empty()) continue;
    for (const char c : key) {
      if (c <= ' ' || c > '~') {
        fail(path, ":", number, ": found a key with a space or a character that is not ASCII, ",
             "expected one key on each line");
      }
    }
    keys.push_back(key);
  }
  if (keys.size() == before) fail(path, ": found no key, expected one on each line");
}

void add_flags(CLI::App& app, ServeOptions& o, std::string& key_file) {
  app.add_option("model", o.models,
                 "PATH or NAME=PATH of each model: a run, a model directory or a .gguf file; NAME "
                 "is the model's name in requests");
  app.add_option("--port", o.http.port, "to listen on; 0: any that is free");
  app.add_option("--host", o.http.host,
                 "address to listen on; any but this machine's own (127.0.0.1, ::1) needs a key");
  add_engine_flags(app, o.model);
  app.add_option("--rows", o.engine.rows, "answers of one model that are written together");
  app.add_option("--queue", o.engine.queue,
                 "answers that may wait for a row; more are refused with status 503");
  app.add_option("--queue-seconds", o.engine.queue_seconds,
                 "answers that wait longer are refused with status 503");
  app.add_option("--cache-mb", o.cache_mb,
                 "memory for keys and values of each model, in MiB; 0: what --memory-mb leaves");
  app.add_option("--memory-mb", o.memory_mb,
                 "memory for weights, keys and values of all models, in MiB; 0: what is free");
  app.add_option("--max-tokens", o.limits.max_tokens,
                 "longest answer, in tokens; 0: as many as the context holds");
  add_template_flags(app, o.chat_template, "none (base models); ");
  app.add_flag("--calculator", o.calculator, "assistants may use a calculator, on this server");
  app.add_option("--documents", o.documents,
                 "file of documents in which assistants may search, on this server: records with "
                 "\"text\", or plain text; empty: no search");
  app.add_option("--votes", o.arena.votes,
                 "SQLite file that people's votes are added to; with it the page has an arena");
  app.add_option("--arena", o.arena.mode,
                 "compare: two models by their answers; collect: several answers of one model, to "
                 "train on; auto: compare where there are several models");
  app.add_option("--answers", o.arena.answers, "of one model, for a voter of the arena to rank");
  app.add_option("--prompts", o.arena.prompts,
                 "records with prompts that the arena shows, each once; empty: voters write them");
  app.add_option("--seed", o.arena.seed, "of the order of --prompts");
  app.add_option("--web", o.web,
                 "directory whose files are the page, read at each request, for those who work on "
                 "it; empty: the page in this program");
  app.add_flag("--any-model", o.any_model,
               "a name that no model has means the first one; so it is where there is one model");
  app.add_option("--api-key-file", key_file,
                 "file with a key on each line; requests need one of them, or the one in the "
                 "environment variable CAKE_API_KEY");
  app.add_flag("--no-key", o.http.no_key,
               "any --host without a key: everyone in the network may ask");
  app.add_option("--allow-host", o.http.hosts,
                 "name by which clients may call this server, besides localhost; may be given "
                 "several times")
      ->allow_extra_args(false);
  app.add_option("--allow-origin", o.http.origins,
                 "web pages that may call this server, as in https://chat.example; may be given "
                 "several times")
      ->allow_extra_args(false);
  app.add_option("--connections", o.http.connections, "that may be open at one time");
  app.add_option("--request-seconds", o.http.request_seconds,
                 "for a request to arrive, from its first to its last byte");
  app.add_option("--idle-seconds", o.http.idle_seconds,
                 "between two requests of a connection; it is closed then");
  app.add_option("--write-seconds", o.http.write_seconds,
                 "a client that takes no byte for so long is closed");
  app.add_option("--grace", o.grace_seconds,
                 "seconds that answers in work may take when Ctrl+C or SIGTERM stops the server");
  app.add_flag("--verbose", o.verbose,
               "print a line for each request: time, path, status; never its texts");
}

void check(const ServeOptions& o) {
  check_model_options(o.model, {});
  template_options(o.chat_template);
  const auto check_seconds = [](const char* flag, double value) {
    need(value > 0 && value <= 1e6, flag, value, "above 0, at most 1000000");
  };
  need(o.engine.rows >= 1 && o.engine.rows <= 4096, "--rows", o.engine.rows, "1 to 4096");
  need(o.engine.queue >= 1 && o.engine.queue <= 1 << 20, "--queue", o.engine.queue, "1 to 1048576");
  need(o.http.connections >= 1 && o.http.connections <= 1 << 16, "--connections",
       o.http.connections, "1 to 65536");
  need(o.cache_mb >= 0, "--cache-mb", o.cache_mb, "0 or more");
  need(o.memory_mb >= 0, "--memory-mb", o.memory_mb, "0 or more");
  need(o.limits.max_tokens >= 0, "--max-tokens", o.limits.max_tokens, "0 or more");
  need(o.grace_seconds >= 0 && o.grace_seconds <= 3600, "--grace", o.grace_seconds, "0 to 3600");
  need(o.arena.answers >= 2 && o.arena.answers <= 9, "--answers", o.arena.answers, "2 to 9");
  need(o.arena.mode == "auto" || o.arena.mode == "compare" || o.arena.mode == "collect", "--arena",
       o.arena.mode, "compare, collect or auto");
  check_seconds("--queue-seconds", o.engine.queue_seconds);
  check_seconds("--request-seconds", o.http.request_seconds);
  check_seconds("--idle-seconds", o.http.idle_seconds);
  check_seconds("--write-seconds", o.http.write_seconds);
}

void add_export_flags(CLI::App& app, ExportVotesOptions& o) {
  app.add_option("votes", o.votes, "SQLite file of --votes; a server may be adding to it")
      ->required();
  app.add_option("-o,--output", o.output,
                 "file to write, JSON lines; empty: standard output, unless there is a --backup");
  app.add_flag("--raw", o.records.raw,
               "every vote with all that is known of it, instead of what training reads");
  app.add_flag("--cut", o.records.keep_cut,
               "answers that a limit or the voter cut off, too: they teach to stop anywhere");
  app.add_option("--seed", o.records.seed, "of the order of the records");
  app.add_option("--backup", o.backup,
                 "file for a copy of the votes, whole although votes are being cast");
}

int serve(int argc, char** argv) {
  CLI::App app("Serves models over HTTP, in a browser and as OpenAI's API: ./serve MODEL");
  app.option_defaults()->always_capture_default();
  app.require_subcommand(0, 1);
  ServeOptions o;
  std::string key_file;
  add_flags(app, o, key_file);
  ExportVotesOptions votes;
  CLI::App* export_command =
      app.add_subcommand("export", "write people's votes as preferences to train on");
  add_export_flags(*export_command, votes);
  const std::vector<HelpPage> pages = {
      {&app,
       {"model", "--port", "--host", "--weights", "--context", "--memory-mb", "--max-tokens",
        "--calculator", "--documents", "--votes", "--api-key-file", "--allow-origin"}},
      {export_command, {"votes", "--output", "--raw", "--cut", "--seed", "--backup"}}};
  if (!parse_flags(app, argc, argv, pages)) return 0;
  if (export_command->parsed()) {
    if (!o.models.empty()) {
      fail("export: found model ", o.models[0], ", expected only its own flags");
    }
    return export_votes_command(votes);
  }
  if (o.models.empty()) fail("model is required (see --help)");
  for (const char* flag : {"--arena", "--answers", "--prompts", "--seed"}) {
    if (app.count(flag) > 0 && o.arena.votes.empty()) {
      fail("--votes is missing: the file for the votes of the arena, to which ", flag, " belongs");
    }
  }
  check(o);
  if (!key_file.empty()) read_keys(key_file, o.http.keys);
  if (const char* key = std::getenv("CAKE_API_KEY"); key && *key) o.http.keys.push_back(key);
  o.print = [](const std::string& line) { std::fprintf(stderr, "%s\n", line.c_str()); };
  return Server(o).run();
}

}  // namespace
}  // namespace cake

// Weak: programs that link this file as a library have a main of their own.
__attribute__((weak)) int main(int argc, char** argv) {
  cake::spin_briefly(argv);
  std::signal(SIGPIPE, SIG_IGN);
  cake::watch_signals();
  return cake::guarded_main([&] { return cake::serve(argc, argv); });
}
