// The parts of ./serve, and what they hand each other.
//
//     HTTP request -> read_chat, read_completion (serve_api.cpp)   JSON -> ApiCall, or ApiError
//                  -> make_requests (serve_api.cpp)                ApiCall -> Requests, as ids
//                  -> Engine::submit (serve_engine.cpp)            Requests -> Mailbox
//     Mailbox::wait -> events -> AnswerWriter (serve_answer.cpp)    events -> JSON, or chunks of it
//
// Threads of connections read requests and write answers. One thread, the Engine's, owns the
// generators. Whatever can be refused is refused before the answer's status 200 is sent.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "cake/generate.h"
#include "cake/http.h"
#include "cake/json.h"
#include "cake/text_model.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Models that are served

struct ServedModel {
  std::string id;  // in `model`: NAME of NAME=PATH, otherwise the path as it was given
  TextModel text;
  int context = 0;                 // tokens of the longest sequence, prompt included
  int64_t created = 0;             // seconds since 1970, of its files
  std::string fingerprint;         // "fp_" and a hash of what decides the text beside the request
  bool deterministic = false;      // the same seed gives the same text, whatever else is served
  Sampling sampling;               // the default: generation_config.json's, else temperature 1
  std::vector<std::string> tools;  // that run on this server: declarations of cake/tools.h
  std::shared_ptr<const Search> search;  // of --documents; null: none
};

// ---------------------------------------------------------------------------------------------
// Requests (serve_api.cpp)

struct ApiCall {
  bool chat = false;  // /v1/chat/completions; otherwise /v1/completions
  std::string model;  // "": not given
  // chat
  Conversation conversation;
  std::optional<ChatTemplate> chat_template;  // with the variables of chat_template_kwargs
  bool continues = false;     // the last message is the assistant's: the answer goes on with it
  Rendered rendered;          // what the model reads before answer_ids
  bool in_reasoning = false;  // it ends inside of reasoning, with which the answer goes on
  bool turns_begin_in_reasoning = false;  // so does the header of the turn behind a tool's result
  // The answer begins with these, with what the server's tools put behind its turns too. They are
  // returned as the beginning of the answer.
  std::vector<int> answer_ids;
  bool has_tools = false;      // of the request; calls of these are returned to the client
  bool parallel_calls = true;  // false: a turn ends behind its first call
  std::vector<std::string> server_tools;  // names: those of the model that this call may use
  // completions: each a text or ids
  std::vector<std::variant<std::string, std::vector<int>>> prompts;
  bool echo = false;
  // both
  bool stream = false, include_usage = false;
  int64_t max_tokens = -1;     // asked for; -1: not given; 0: with echo alone
  int64_t default_tokens = 0;  // at most, where none are asked for; 0: what the context leaves
  int n = 1;                   // choices for each prompt
  Sampling sampling;           // what the request leaves open is the model's default
  bool has_seed = false;       // otherwise sampling.seed is a random number
  float presence_penalty = 0, frequency_penalty = 0;
  std::vector<LogitBias> logit_bias;
  std::vector<std::string> stop;
  int top_logprobs = -1;       // -1: no log-probabilities
  bool token_details = false;  // with log-probabilities: each token's id, its rank, its kind
  // /next_token: no text, but what the first token is sampled from; so many tokens of it.
  bool next_token = false;
  int next_tokens = 20;
  bool return_ids = false;  // the answer has its ids too, with those of the server's tools
};

struct ApiLimits {
  int max_choices = 64;    // n times prompts
  int64_t max_tokens = 0;  // of an answer; 0: what the context leaves
  int depth = 64;          // of JSON
  int keys = 1024;         // of an object
  int messages = 1000, stop_strings = 16;
  size_t stop_bytes = 256;
};

// The body as JSON: ApiError 400 for what is no JSON, too deep, or not valid UTF-8. Of two equal
// keys the last one holds.
OrderedJson read_body(const std::string& body, const ApiLimits&);
// The value of a key of the body, of exactly this type; ApiError 400 for another. An absent key and
// null are the fallback.
template <class T>
T body_value(const OrderedJson& body, const std::string& key, T fallback) {
  const auto it = body.find(key);
  if (it == body.end() || it->is_null()) return fallback;
  try {
    return json_as<T>(Json(*it), key, "body");
  } catch (const Error& e) {
    bad_request(key, e.what());
  }
}
// "": not given. It is read first, to find the model that reads the rest.
std::string requested_model(const OrderedJson& body);
// Checks every field that is known, for type and range; ApiError 400 with its `param`.
ApiCall read_chat(const OrderedJson& body, const ServedModel&, const ApiLimits&);
ApiCall read_completion(const OrderedJson& body, const ServedModel&, const ApiLimits&);
// Of one prompt, or of messages.
ApiCall read_next_token(const OrderedJson& body, const ServedModel&, const ApiLimits&);
// The ids that the model reads in a chat: the template's and answer_ids.
std::vector<int> prompt_of(const ApiCall&);
// The template of a chat's call.
const ChatTemplate& template_of(const ApiCall&, const ServedModel&);
// The ids that end a turn of the answer.
std::vector<int> end_ids(const ApiCall&, const ServedModel&);

// Where an id of a prompt is from: the template, a part of a message, or the answer so far.
struct PromptOrigin {
  const char* source;  // "template", "role", "content", "reasoning", "tool_call", "tools"; of
                       // answer_ids "answer", or "result" for what the server's tools put there
  int message = -1;    // the number of the message; -1: of none
  bool operator==(const PromptOrigin&) const = default;
};
std::vector<PromptOrigin> prompt_origins(const ApiCall&, const ServedModel&);  // of prompt_of()

struct ToolResult {  // of a tool that ran on the server
  ToolCall call;
  std::string result;
};
// Whether the calls of a turn run here, and the model goes on: all call tools of the server, or the
// client has none of its own. Otherwise the answer ends with the turn.
bool runs_on_server(const ApiCall&, const Message& turn);
// Runs the calls of a turn. The tools are functions of their arguments alone: the engine's thread
// runs them for the ids that follow, and the connection's thread again to tell the client.
std::vector<ToolResult> run_calls(const ServedModel&, const Message& turn);
// What the server's tools put behind a turn that ended with a stop token; none: it was the last.
std::vector<int> ids_behind_turn(const ApiCall&, const ServedModel&, std::span<const int> turn);

struct BegunTurn {  // ids [begin, end) of ApiCall::answer_ids; the next turn begins at `next`
  size_t begin, end, next;
  bool ended;  // by a stop token
};
// The turns of answer_ids. ApiError 400 when ids follow the end of a turn that called no tools.
std::vector<BegunTurn> begun_turns(const ApiCall&, const ServedModel&);
// Whether answer_ids are a whole answer, to its last stop token: then nothing is sampled.
bool is_complete(const ApiCall&, const ServedModel&);
// The bytes of the character that answer_ids end in, where it is not complete.
std::string held_bytes(const ApiCall&, const ServedModel&);

// One Request for each choice, prompt-major: prompt * n + choice. Error 400
// context_length_exceeded when prompt and max_tokens do not fit. Sets stop ids and strings,
// sampling with stream = choice, scores; on_turn is set where tools run on the server.
std::vector<Request> make_requests(const ApiCall&, const ServedModel&, const ApiLimits&);

// ---------------------------------------------------------------------------------------------
// The engine's thread and its mailboxes (serve_engine.cpp)
//
// A call waits in its model's queue until its choices get rows. A free row goes to the call that
// has the fewest rows at the moment, the one that waits longest among equals: a call with 64
// choices and a call with one both advance, and calls of one choice are served in order. Of
// several models that have work, the one whose steps took the least time is stepped next.

struct Event {
  enum Kind {
    admitted,       // the choice has a row: its prompt is being read
    prompt_scores,  // `scores`: of prompt[1], ...
    token,          // `id`, `text`, `score` if asked for; `turn_ends`
    finished,       // `finish`, and the counts; the choice's last event
    failed,         // `text`, `status`, `code`: an Error; the last event of every choice
  };
  Kind kind = token;
  int choice = 0;
  int id = -1;
  std::string text;        // the characters that the token completes; may be empty
  bool turn_ends = false;  // the token ends a turn; unless `finished` follows, tools have run
  std::optional<TokenScore> score;
  std::vector<TokenScore> scores;
  std::shared_ptr<const Distribution> distribution;  // of `token`, if asked for
  Finish finish = Finish::length;
  int prompt_tokens = 0, cached_tokens = 0, sampled_tokens = 0;
  // Of `failed`. 503: queue_timeout (then no choice was admitted) or shutting_down. 500: the engine
  // itself failed.
  int status = 500;
  std::string code;
};

// The mailbox of one call: the engine's thread puts events in, the connection's thread takes them.
// The engine never waits for a connection. A mailbox whose events nobody takes holds at most the
// tokens of the call's choices, each of which ends with the context.
class Mailbox {
 public:
  explicit Mailbox(int choices) : choices_(choices) {}
  int choices() const { return choices_; }
  // Waits for events, `seconds` at most, and takes all there are. Empty: none came in time, or
  // there will be no more. `until_over`: waits until every choice has its last event, and returns
  // what there is when the time has passed before: an answer that is not streamed needs no wake-up
  // for each token.
  std::vector<Event> wait(double seconds, bool until_over = false);
  bool over() const;  // every choice has its last event, and it was taken
  // The engine forgets the call as soon as it can. From any thread, at any time.
  void cancel() { cancelled_ = true; }

  // The engine's side.
  void put(std::span<Event>);  // moves them in, and wakes the thread that waits for them
  // Moves them in. True: a thread waits for them, and wake() is due. So it is once for each wait().
  bool put_without_waking(std::span<Event>);
  void wake() { arrived_.notify_one(); }
  void put(Event&& e) { put({&e, 1}); }
  bool cancelled() const { return cancelled_; }

 private:
  enum class Waiting { no, for_events, for_the_end };
  const int choices_;
  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<Event> events_;
  int ended_ = 0;  // choices that have their last event
  Waiting waiting_ = Waiting::no;
  bool wake_is_due_ = false;
  std::atomic<bool> cancelled_{false};
};

struct EngineOptions {
  int rows = 64;              // sequences decoded together, of one model
  int queue = 256;            // choices that may wait for a row; more are refused
  double queue_seconds = 60;  // a call that waits longer is refused: 503
  int threads = 0;            // that compute; 0: one for each physical core
};

// Choices are counted, not calls: requests = queued + running + finished + cancelled + failed +
// refused.
struct EngineCounts {               // since the start, but for `queued` and `running`
  int64_t queued = 0, running = 0;  // without and with a row
  int64_t requests = 0, finished = 0, cancelled = 0, failed = 0;
  int64_t refused = 0;  // the queue was full, the wait too long, or the server was shutting down
  int64_t prompt_tokens = 0;  // fed; those of preempted choices count again
  int64_t reused_tokens = 0;  // of prompts, found in the cache
  int64_t new_tokens = 0;     // sampled
  int64_t preemptions = 0;
  double busy_seconds = 0;  // of the engine's thread, in steps
  struct Histogram {        // counts of values up to each bound, and the sum: Prometheus's
    std::vector<double> bounds;
    std::vector<int64_t> counts;  // one more than bounds
    double sum = 0;
    explicit Histogram(std::vector<double> upper = {})
        : bounds(std::move(upper)), counts(bounds.size() + 1) {}
    void add(double value) {
      const auto bound = std::lower_bound(bounds.begin(), bounds.end(), value);
      counts[size_t(bound - bounds.begin())]++;
      sum += value;
    }
  };
  Histogram first_token_seconds{{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}};
  Histogram between_tokens_seconds{{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}};
  Histogram queue_seconds{{.001, .01, .1, .5, 1, 2.5, 5, 10, 30, 60, 120}};
};

class Engine {
 public:
  // The models stay where they are. `caches`: GeneratorOptions of each.
  Engine(std::span<ServedModel> models, std::vector<GeneratorOptions> caches, EngineOptions);
  ~Engine();  // every call that is not over fails
  // Queues the choices of one call, all or none. ApiError: 503 queue_full or shutting_down, 400 for
  // more choices than rows and queue can hold. The requests' on_turn runs on
  // the engine's thread; their other callbacks are the engine's. From any thread.
  std::shared_ptr<Mailbox> submit(size_t model, std::vector<Request> requests);
  // ApiError 503 queue_full when no model could queue one choice more, which counts as a refused
  // one. What is refused so needs not even be read.
  void expect_room();
  EngineCounts counts() const;
  // No call is taken from here on; those in work end within `seconds`, or fail then.
  void drain(double seconds);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// ---------------------------------------------------------------------------------------------
// Loading (serve_models.cpp)

struct ServeOptions;
struct LoadedModels {
  std::vector<ServedModel> models;
  std::vector<GeneratorOptions> caches;  // of each
};
// Opens the models, divides the memory among them, and loads their weights. `print` gets lines that
// say what each model takes, before any weights are read. Error where one cannot be served, or
// where they do not fit into the memory: it names the flag that lowers what they take.
LoadedModels load_models(const ServeOptions&,
                         const std::function<void(const std::string&)>& print = {});
// The default sampling of the model in `dir`, of `vocab` tokens: what its generation_config.json
// says, otherwise temperature 1.
Sampling default_sampling(const std::filesystem::path& dir, int vocab);

// ---------------------------------------------------------------------------------------------
// Answers (serve_answer.cpp). The same writer makes the stream and the whole answer, so that both
// hold the same text.

class AnswerWriter {
 public:
  // `prompts`: the ids of each prompt, for echo. The call and the model must outlive the writer.
  AnswerWriter(const ApiCall&, const ServedModel&, std::vector<std::vector<int>> prompts);
  ~AnswerWriter();
  // Streams: the chunks of these events, as server-sent events. Several tokens of a choice become
  // one chunk, in which each has its own logprobs entry.
  std::string begin();  // the chunk with the role of each choice
  std::string add(std::span<const Event>);
  std::string keep_alive();  // an empty delta
  std::string end();         // usage if asked for, then [DONE]
  // Whole answers: add() every event, then this.
  std::string whole();
  bool failed() const;  // an event told of an error; the stream ends with it, without [DONE]
  std::string error() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// What /next_token answers: the `count` likeliest tokens by the model's own logp, with
// `probability` after penalties, biases, temperature and truncation; "rest": the probability of all
// others; "kept": how many tokens have any; "entropy" of the model's distribution and
// "entropy_after" of the one that is sampled from, in bits.
OrderedJson next_token_json(const Distribution&, const Tokenizer&, int count);

// ---------------------------------------------------------------------------------------------
// The server (serve.cpp)

struct ArenaOptions {         // cake/arena.h
  std::string votes;          // SQLite file; "": no arena
  std::string mode = "auto";  // "compare", "collect"; auto: compare where there are several models
  std::string prompts;  // records with prompts that voters are shown; "": they write their own
  int answers = 4;      // to rank, of "collect": 2 to 9
  uint64_t seed = 0;    // of the order of the prompts
  // Random bits, for which models answer and on which side; empty: the system's, which nobody can
  // foresee. Tests have their own.
  std::function<uint64_t()> random;
  // Battles that are over, in memory: beyond either limit the oldest are forgotten.
  size_t battle_bytes = 64 << 20;  // of their texts
  size_t battles = 10000;
};

struct ServeOptions {
  std::vector<std::string> models;  // PATH or NAME=PATH
  ModelOptions model;               // device, threads, context, cache type, weights: of each
  HttpOptions http;
  EngineOptions engine;
  ApiLimits limits;
  int cache_mb = 0;   // KV cache of each model; 0: what the budget leaves
  int memory_mb = 0;  // weights and caches of all models; 0: what is free
  ArenaOptions arena;
  std::string web;  // directory whose files are the page; "": those in the binary
  std::string documents;
  TemplateFlags chat_template;  // its choice may be "none" too
  bool calculator = false, any_model = false;
  bool verbose = false;            // a line for each request, without its texts
  double grace_seconds = 5;        // after stop(), for the calls in work
  double keep_alive_seconds = 15;  // of silence in a stream; then an empty delta is sent
  std::function<void(const std::string&)> print;  // gets the lines that say what the server does
};

class Server {
 public:
  explicit Server(const ServeOptions&);  // listens; Error when it cannot
  ~Server();
  int port() const;
  // Loads the models, and answers 503 until then. Serves until stop() or a signal. Returns 0; Error
  // when a model cannot be loaded.
  int run();
  void stop();  // from any thread
  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace cake
