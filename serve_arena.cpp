// The arena of ./serve: battles, which people decide.
//
//     POST /arena/battle {"voter", "messages", "stream", "answers", sampling fields}
//          without messages: the next of --prompts
//       -> {"battle", "token", "mode", "answers": K, "prompt": [messages]}
//          {"delta": ["text of the left", "text of the right"]} ...
//          {"done": [{"finish": "stop" | "length" | "stopped"}, ...]}    or {"same": true}
//          [DONE]
//          not streamed: {"battle", "token", "mode", "prompt", "answers": [{"text", "finish"}]}, or
//          "same": true in place of the answers
//     POST /arena/vote {"battle", "token", "vote": "left" | "right" | "tie", "good": [bool, bool]}
//          or {"ranking": [1, 2, 2, 4], "good"}
//       -> {"models": [...], "votes": of this voter, "leaked"}
//     POST /arena/stop, /arena/undo {"battle", "token"},  /arena/leaderboard {"voter"}
//
// How a battle goes, on the thread of its connection:
//
//     draw      which models answer, and who stands left: every ordered pair is equally likely
//     answers   a call of the engine for each, with the same sampling and streams of one seed
//     settle    equal answers are drawn again, up to three times: nobody can choose between them
//     pace      characters are shown by time, the same number of each answer
//     vote      on the disk before its reply is sent
//
// Blindness. What a voter could tell models apart by is not sent: names, fingerprints, seeds,
// counts of tokens. One event holds the text of all answers, cut by characters and not by tokens.
// While two answers or more are being written, the slowest one decides how many characters of each
// are shown. Once an answer has ended, the others go on no faster than before, so that it stays
// unknown whether the longer one was written by the faster model. A refusal depends on what all
// models of the arena would say, never on those that were drawn.
//
// An answer is the text as it was sampled, <think> and all. Tools are not offered: a preference is
// between two texts. The first model's default sampling is everyone's.
//
// Battles live in memory until their vote is cast, and are forgotten when the server ends. Those
// that nobody votes on give way to newer ones.
#include <sys/random.h>

#include <atomic>
#include <cstdio>
#include <ctime>
#include <deque>
#include <list>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>

#include "cake/arena.h"
#include "cake/leaderboard.h"
#include "cake/problems.h"
#include "cake/votes.h"

namespace cake {
namespace {

constexpr int kDraws = 4;             // of answers that are equal: the first one, and three more
constexpr double kTickSeconds = .05;  // between two events of a stream
constexpr double kCharactersPerSecond = 500;  // that are shown: about as fast as anyone can skim
constexpr double kPollSeconds = .1;           // how long a client that left goes unnoticed
constexpr double kKeepAliveSeconds = 15;      // of silence in a stream; then an empty delta is sent
constexpr int kVotesBeforeLeaderboard = 10;   // so that nobody votes as others did
constexpr double kLeaderboardSeconds = 2;     // it is computed no more often
constexpr size_t kVoterCharacters = 64;

// ---------------------------------------------------------------------------------------------
// Texts

// The number of bytes that the first `n` characters of valid UTF-8 take.
size_t bytes_of_characters(std::string_view text, size_t n) {
  size_t i = 0;
  for (; i < text.size(); i++) {
    const bool begins = (text[i] & 0xc0) != 0x80;
    if (begins && n-- == 0) break;
  }
  return i;
}
size_t count_characters(std::string_view text) {
  return size_t(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

// Whether two answers differ, or will whatever is still written. White space at their ends is no
// difference: training drops it.
bool will_differ(std::string_view a, bool a_is_over, std::string_view b, bool b_is_over) {
  a = strip(a), b = strip(b);
  const size_t n = std::min(a.size(), b.size());
  if (a.substr(0, n) != b.substr(0, n)) return true;
  return (a.size() > n && b_is_over) || (b.size() > n && a_is_over);
}

// Names by which an answer could give its model away, in lower case: the id, its last part, and
// the first word of that: of models/SmolLM2-135M.gguf also "smollm2". Two letters could be any
// word.
std::vector<std::string> names_in_answers(const std::string& id) {
  std::set<std::string> names;
  std::string name = ascii_lower(id);
  const auto add = [&] {
    if (name.size() > 2) names.insert(name);
  };
  add();
  while (name.ends_with('/')) name.pop_back();
  name.erase(0, name.rfind('/') + 1);
  add();
  name.resize(std::min(name.size(), name.find_first_of("-_. ")));
  add();
  return {names.begin(), names.end()};
}

bool has_word(const std::string& text, const std::string& word) {
  const auto is_letter = [&](size_t i) {
    return i < text.size() && std::isalnum(static_cast<unsigned char>(text[i]));
  };
  for (size_t i = 0; (i = text.find(word, i)) != std::string::npos; i++) {
    if ((i == 0 || !is_letter(i - 1)) && !is_letter(i + word.size())) return true;
  }
  return false;
}

uint64_t system_random() {
  uint64_t bits;
  require(getrandom(&bits, sizeof bits, 0) == sizeof bits, "getrandom: ", errno_text());
  return bits;
}
std::string random_name() {  // 128 bits
  return format("%016llx%016llx", static_cast<unsigned long long>(system_random()),
                static_cast<unsigned long long>(system_random()));
}

std::string time_text() {
  const std::time_t time = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&time, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

// ---------------------------------------------------------------------------------------------
// The pace at which answers are shown

class Pace {
 public:
  // How many characters of each answer are shown from `time` (seconds) on. `written`: the fewest
  // characters of an answer that is not over; where all are over, the most. `ended`: the fewest of
  // one that is over.
  size_t advance(double time, size_t written, size_t ended) {
    if (begin_ < 0) begin_ = since_ = time;
    const size_t due = base_ + size_t((time - since_) * rate_);
    shown_ = std::max(shown_, std::min({due, written, ended_ ? written : ended}));
    if (shown_ < due) base_ = shown_, since_ = time;  // what was late is not caught up with
    if (!ended_ && ended <= shown_) {  // from here on no faster than on average so far
      ended_ = true;
      if (shown_ > 0 && time > begin_) rate_ = std::min(rate_, double(shown_) / (time - begin_));
      base_ = shown_, since_ = time;
    }
    return shown_;
  }

 private:
  double begin_ = -1, rate_ = kCharactersPerSecond;
  size_t shown_ = 0;
  bool ended_ = false;  // an answer was shown whole
  size_t base_ = 0;     // characters that were due at `since_`
  double since_ = 0;
};

// ---------------------------------------------------------------------------------------------
// Battles

struct Battle {
  enum class Phase {
    running,
    over,     // a vote may be cast
    writing,  // a vote is being stored, or taken back
    voted,
    undone,
    same,  // equal answers: there is nothing to vote on
  };
  Vote vote;          // without the ranks; the answers from `over` on
  std::string token;  // whoever has it may vote
  int prompt = -1;    // number in --prompts; -1: the voter's own
  std::atomic<bool> stopped{false};
  // Of the arena's mutex:
  Phase phase = Phase::running;
  double ended = 0;  // when, by now()
  size_t bytes = 0;  // of its texts
};

struct Prompts {                      // of --prompts; of the arena's mutex
  std::vector<OrderedJson> messages;  // of each
  std::deque<int> waiting;            // their numbers, in the order in which they are shown
};

// The last message as the model reads it, the others as they were sent; without what the arena has
// no use for.
OrderedJson messages_json(const Conversation& conversation) {
  OrderedJson list = OrderedJson::array();
  for (const Message& m : conversation.messages) {
    list.push_back({{"role", m.role}, {"content", m.content}});
  }
  return list;
}

OrderedJson sampling_json(const Request& r) {
  const Sampling& s = r.sampling;
  return {{"temperature", s.temperature},
          {"top_p", s.top_p},
          {"top_k", s.top_k},
          {"min_p", s.min_p},
          {"repetition_penalty", s.repetition_penalty},
          {"presence_penalty", r.presence_penalty},
          {"frequency_penalty", r.frequency_penalty},
          {"max_tokens", r.max_new}};
}

[[noreturn]] void refuse_state(const char* code, const std::string& what) {
  throw ApiError(409, "invalid_request_error", code, "battle", what);
}

// The vote could not be stored. What the file system said is for whoever runs the server.
[[noreturn]] void refuse_storing(const std::exception& e) {
  std::fprintf(stderr, "error: a vote was not stored: %s\n", e.what());
  throw ApiError(507, "server_error", "not_stored", "",
                 "the vote was not stored; the server's own output says why");
}

std::string read_voter(const OrderedJson& body) {
  const auto voter = body_value<std::string>(body, "voter", "");
  const bool known = std::all_of(voter.begin(), voter.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '-';
  });
  if (voter.empty() || voter.size() > kVoterCharacters || !known) {
    bad_request("voter", concat("voter: found ", json_text(voter), ", expected 1 to ",
                                kVoterCharacters, " letters, digits, _ or -"));
  }
  return voter;
}

// Ranks and verdicts of a vote, checked against the number of answers.
void read_vote(const OrderedJson& body, std::vector<VotedAnswer>& answers) {
  const size_t n = answers.size();
  const auto refuse = [&](const char* key, const std::string& expected) {
    const auto it = body.find(key);
    bad_request(key, concat(key, ": found ", it == body.end() ? "none" : json_text(Json(*it)),
                            ", expected ", expected));
  };
  const auto has = [&](const char* key) {
    const auto it = body.find(key);
    return it != body.end() && !it->is_null();
  };
  const auto is_list = [&](const char* key, auto&& is_item) {
    const auto it = body.find(key);
    return it->is_array() && it->size() == n && std::all_of(it->begin(), it->end(), is_item);
  };
  if (has("vote") == has("ranking")) {
    bad_request("vote", "vote: found both or none of vote and ranking, expected one of them");
  }
  if (has("vote")) {
    const OrderedJson& side = body["vote"];
    if (n != 2) refuse("vote", concat("a ranking of ", n, " answers"));
    if (side != "left" && side != "right" && side != "tie") {
      refuse("vote", "\"left\", \"right\" or \"tie\"");
    }
    answers[0].rank = side == "right" ? 2 : 1;
    answers[1].rank = side == "left" ? 2 : 1;
  } else {
    const auto is_rank = [&](const OrderedJson& r) {
      return r.is_number_integer() && r >= 1 && r <= n;
    };
    if (!is_list("ranking", is_rank)) refuse("ranking", concat(n, " integers from 1 to ", n));
    std::vector<int> given = body["ranking"];
    for (size_t i = 0; i < n; i++) {  // 1 + how many are better
      answers[i].rank = 1 + int(std::count_if(given.begin(), given.end(),
                                              [&](int other) { return other < given[i]; }));
    }
  }
  if (!has("good")) return;
  if (!is_list("good", [](const OrderedJson& g) { return g.is_boolean(); })) {
    refuse("good", concat(n, " of true or false"));
  }
  for (size_t i = 0; i < n; i++) answers[i].good = body["good"][i];
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// The arena: what all battles share

struct BattleArena::State {
  State(const ArenaOptions&, std::span<const ServedModel>, Engine&, const ApiLimits&);

  // What was asked for, checked for every model of the arena: its requests, in the order of
  // `players`.
  struct Question {
    OrderedJson prompt;
    std::vector<Request> requests;
  };
  Question read_question(OrderedJson body) const;
  ApiCall read_call(const OrderedJson& body, const ServedModel&) const;
  int answers_of(const OrderedJson& body) const;
  bool fits(const OrderedJson& messages) const;
  void read_prompts(const std::string& path, uint64_t seed);
  int take_prompt();
  void put_back_prompt(int number, bool first);

  std::vector<size_t> draw(int n);  // numbers in `players`
  void add(std::shared_ptr<Battle>);
  void forget(const std::string& battle);
  void end(Battle&, Battle::Phase, std::vector<VotedAnswer>);
  std::shared_ptr<Battle> find(const OrderedJson& body);
  void make_room();
  bool names_a_model(const Vote&) const;

  ArenaOptions options;
  std::span<const ServedModel> models;
  Engine& engine;
  ApiLimits limits;
  std::vector<size_t> players;  // numbers of the models that answer conversations
  std::vector<std::string> names;
  bool collects = false;
  Votes votes;

  mutable std::mutex mutex;  // of what follows
  Prompts prompts;
  std::list<std::shared_ptr<Battle>> battles;  // the oldest first
  std::unordered_map<std::string, std::list<std::shared_ptr<Battle>>::iterator> by_name;
  size_t bytes = 0;  // of battles that are over
  size_t over = 0;   // how many these are

  std::mutex leaderboard_mutex;  // of what follows
  OrderedJson shown_leaderboard;
  double leaderboard_time = 0;
  int64_t leaderboard_changes = -1;
  std::atomic<int64_t> changes{0};  // of the votes
};

BattleArena::State::State(const ArenaOptions& o, std::span<const ServedModel> served, Engine& e,
                          const ApiLimits& l)
    : options(o), models(served), engine(e), limits(l), votes(o.votes) {
  if (!options.random) options.random = system_random;
  for (size_t i = 0; i < models.size(); i++) {
    if (!models[i].text.chat) continue;
    players.push_back(i);
    for (std::string& name : names_in_answers(models[i].id)) names.push_back(std::move(name));
  }
  require(!players.empty(), "--votes: found no model that answers conversations, expected one");
  require(options.mode != "compare" || players.size() > 1,
          "--arena: found compare, and one model that answers conversations, expected two or more");
  collects = options.mode == "collect" || players.size() == 1;
  if (collects) players.resize(1);
  if (!options.prompts.empty()) read_prompts(options.prompts, options.seed);
}

// ---------------------------------------------------------------------------------------------
// Prompts

// A call whose conversation ends with the user. Error 400.
ApiCall BattleArena::State::read_call(const OrderedJson& body, const ServedModel& model) const {
  ApiCall call = read_chat(body, model, limits);
  const std::vector<Message>& messages = call.conversation.messages;
  for (size_t i = 0; i < messages.size(); i++) {
    if (messages[i].role != "tool" && messages[i].tool_calls.empty()) continue;
    const std::string path = concat("messages[", i, "]");
    bad_request(path, concat(path, ": found a tool's call or result, expected text: the arena ",
                             "has no tools"));
  }
  if (messages.back().role != "user") {
    bad_request("messages", concat("messages: found a last message of the ", messages.back().role,
                                   ", expected the user's"));
  }
  return call;
}

bool BattleArena::State::fits(const OrderedJson& messages) const {
  const OrderedJson body{{"messages", messages}, {"tool_choice", "none"}};
  return std::all_of(players.begin(), players.end(), [&](size_t player) {
    const ServedModel& m = models[player];
    return prompt_of(read_call(body, m)).size() < size_t(m.context);
  });
}

// Those that some model has no room for are left out, and those that were voted on are not shown
// again. The order is the same whatever was voted on.
void BattleArena::State::read_prompts(const std::string& path, uint64_t seed) {
  std::set<std::string> seen;
  LeftOut left_out;
  for_each_record({path}, {}, left_out, [&](const Record& record) -> const char* {
    Problem problem = parse_problem(record);
    Conversation c = std::move(problem.chat);
    require(c.tools.empty(), record.where, ": found tools, expected none: the arena has none");
    if (c.messages.empty()) c.messages = {{.role = "user", .content = problem.question}};
    if (!problem.choices.empty()) c.messages.back().content = question_with_choices(problem);
    OrderedJson messages = messages_json(c);
    try {
      if (!fits(messages)) return "too long";
    } catch (const ApiError& e) {
      fail(record.where, ": ", e.what());
    }
    if (seen.insert(json_line(messages)).second) prompts.messages.push_back(std::move(messages));
    return nullptr;
  });
  for (size_t i = 0; i < prompts.messages.size(); i++) prompts.waiting.push_back(int(i));
  Rng rng{mix64(seed)};
  shuffle(prompts.waiting, rng);
  std::set<std::string> voted;
  votes.for_each([&](const Vote& vote) {
    const bool counts = !vote.undone && vote.mode == (collects ? "collect" : "compare");
    if (counts) voted.insert(json_line(vote.prompt));
  });
  std::erase_if(prompts.waiting, [&](int number) {
    return voted.contains(json_line(prompts.messages[size_t(number)]));
  });
}

int BattleArena::State::take_prompt() {
  const std::lock_guard lock(mutex);
  if (prompts.waiting.empty()) {
    throw ApiError(404, "not_found_error", "no_prompts_left", "messages",
                   "every prompt was shown; \"messages\" may hold one of your own");
  }
  const int number = prompts.waiting.front();
  prompts.waiting.pop_front();
  return number;
}

void BattleArena::State::put_back_prompt(int number, bool first) {  // under the mutex
  if (number < 0) return;
  first ? prompts.waiting.push_front(number) : prompts.waiting.push_back(number);
}

// ---------------------------------------------------------------------------------------------
// Questions

int BattleArena::State::answers_of(const OrderedJson& body) const {
  const int n = body_value<int>(body, "answers", collects ? options.answers : 2);
  if (collects ? n < 2 || n > 9 : n != 2) {
    bad_request("answers", concat("answers: found ", n, ", expected ", collects ? "2 to 9" : "2"));
  }
  return n;
}

// Every model of the arena reads the question, so that a refusal says nothing of those that are
// drawn.
BattleArena::State::Question BattleArena::State::read_question(OrderedJson body) const {
  for (const char* key :
       {"model", "seed", "n", "logprobs", "top_logprobs", "logit_bias", "tools", "functions",
        "stream_options", "answer_ids", "return_token_ids", "token_details"}) {
    const auto it = body.find(key);
    if (it == body.end() || it->is_null()) continue;
    bad_request(key, concat(key, ": found ", json_text(Json(*it)), ", expected none in the arena"));
  }
  body["tool_choice"] = "none";
  Question question;
  Sampling sampling;
  for (const size_t player : players) {
    const ServedModel& m = models[player];
    ApiCall call = read_call(body, m);
    if (player == players[0]) {
      sampling = call.sampling;
      question.prompt = messages_json(call.conversation);
    }
    call.sampling = sampling;
    call.stream = false;
    try {
      question.requests.push_back(std::move(make_requests(call, m, limits)[0]));
    } catch (const ApiError& e) {
      if (e.code != "context_length_exceeded") throw;
      throw ApiError(400, e.type, e.code, "messages",
                     "messages: found a prompt that leaves no room for the answer in the context "
                     "of every model here, expected a shorter one, or fewer max_tokens");
    }
  }
  int most = question.requests[0].max_new;
  for (const Request& r : question.requests) most = std::min(most, r.max_new);
  for (Request& r : question.requests) r.max_new = most;
  return question;
}

// ---------------------------------------------------------------------------------------------
// Which battles there are

std::vector<size_t> BattleArena::State::draw(int n) {
  if (collects) return std::vector<size_t>(size_t(n), 0);
  const std::lock_guard lock(mutex);
  const auto below = [&](size_t k) { return size_t((__uint128_t(options.random()) * k) >> 64); };
  const size_t left = below(players.size());
  size_t right = below(players.size() - 1);
  if (right >= left) right++;
  return {left, right};
}

void BattleArena::State::add(std::shared_ptr<Battle> battle) {
  const std::lock_guard lock(mutex);
  const std::string name = battle->vote.battle;
  by_name[name] = battles.insert(battles.end(), std::move(battle));
}

// A battle that did not come to its end: its prompt is the next one again.
void BattleArena::State::forget(const std::string& name) {
  const std::lock_guard lock(mutex);
  const auto it = by_name.find(name);
  if (it == by_name.end() || (*it->second)->phase != Battle::Phase::running) return;
  put_back_prompt((*it->second)->prompt, true);
  battles.erase(it->second);
  by_name.erase(it);
}

void BattleArena::State::end(Battle& battle, Battle::Phase phase,
                             std::vector<VotedAnswer> answers) {
  const std::lock_guard lock(mutex);
  battle.phase = phase;
  battle.ended = now();
  battle.vote.answers = std::move(answers);
  battle.bytes = json_line(battle.vote.prompt).size();
  for (const VotedAnswer& a : battle.vote.answers) battle.bytes += a.text.size();
  bytes += battle.bytes;
  over++;
  make_room();
}

// Forgets the oldest battles that are over. The prompts of those without a vote are shown again.
void BattleArena::State::make_room() {  // under the mutex
  for (auto it = battles.begin(); it != battles.end();) {
    if (bytes <= options.battle_bytes && over <= options.battles) return;
    const Battle& battle = **it;
    const bool stays =
        battle.phase == Battle::Phase::running || battle.phase == Battle::Phase::writing;
    if (stays) {
      it++;
      continue;
    }
    if (battle.phase == Battle::Phase::over) put_back_prompt(battle.prompt, false);
    bytes -= battle.bytes;
    over--;
    by_name.erase(battle.vote.battle);
    it = battles.erase(it);
  }
}

std::shared_ptr<Battle> BattleArena::State::find(const OrderedJson& body) {
  const auto name = body_value<std::string>(body, "battle", "");
  const auto token = body_value<std::string>(body, "token", "");
  const std::lock_guard lock(mutex);
  const auto it = by_name.find(name);
  if (it == by_name.end() || (*it->second)->token != token) {
    throw ApiError(404, "not_found_error", "unknown_battle", "battle",
                   concat("battle: found ", json_text(name), ", expected one of this server, with ",
                          "its token; those that nobody votes on are forgotten in time"));
  }
  return *it->second;
}

bool BattleArena::State::names_a_model(const Vote& vote) const {
  for (const VotedAnswer& a : vote.answers) {
    const std::string text = ascii_lower(a.text);
    for (const std::string& name : names) {
      if (has_word(text, name)) return true;
    }
  }
  return false;
}

// ---------------------------------------------------------------------------------------------
// A battle, from its draw to its last event, on the thread of its connection

namespace {

struct ClientLeft {};

struct Side {  // an answer
  size_t model = 0;
  Request request;
  std::shared_ptr<Mailbox> mailbox;
  std::string text;
  size_t characters = 0, shown_bytes = 0;
  std::string finish = "stop";
  int tokens = 0;
  bool begun = false, over = false;
};

}  // namespace

class BattleInWork {
 public:
  explicit BattleInWork(BattleArena::State& arena)
      : arena_(arena), battle_(std::make_shared<Battle>()) {}
  BattleInWork(const BattleInWork&) = delete;
  BattleInWork& operator=(const BattleInWork&) = delete;
  ~BattleInWork() {  // whose client has left: the engine forgets its calls
    for (const Side& side : sides_) {
      if (side.mailbox) side.mailbox->cancel();
    }
    arena_.forget(battle_->vote.battle);
  }
  void begin(OrderedJson body);
  // Until the engine has begun with every answer: before that, an error has a status of its own.
  void wait_until_begun();
  OrderedJson whole();
  bool write_stream(httplib::DataSink&);

 private:
  void submit(Side&);
  void take_events(Side&, double seconds, bool until_over = false);
  bool settle();
  bool all_over() const {
    return std::all_of(sides_.begin(), sides_.end(), [](const Side& s) { return s.over; });
  }
  bool all_differ() const;
  void stop_now();
  OrderedJson show(double time);
  bool is_complete() const {  // nothing more is to be shown
    const bool shown = std::all_of(sides_.begin(), sides_.end(), [](const Side& s) {
      return s.over && s.shown_bytes == s.text.size();
    });
    return was_stopped_ || (is_settled_ && (shown || sides_.size() == 1));
  }
  std::vector<OrderedJson> next_events(double silence);
  OrderedJson end();
  std::vector<VotedAnswer> answers() const;
  OrderedJson head() const;

  BattleArena::State& arena_;
  const std::shared_ptr<Battle> battle_;
  std::vector<Side> sides_;
  std::vector<VotedAnswer> equal_;  // all answers, where they were equal to the last
  uint64_t streams_ = 0;            // of the seed, that were used
  int draws_ = 1;
  bool is_settled_ = false;  // the answers differ: they may be shown
  bool was_stopped_ = false;
  Pace pace_;
};

void BattleInWork::begin(OrderedJson body) {
  Vote& vote = battle_->vote;
  vote.voter = read_voter(body);
  const int n = arena_.answers_of(body);
  const auto messages = body.find("messages");
  const bool is_own = messages != body.end() && !messages->is_null();
  if (!is_own && !arena_.options.prompts.empty()) {
    battle_->prompt = arena_.take_prompt();
    body["messages"] = arena_.prompts.messages[size_t(battle_->prompt)];
  }
  vote.battle = random_name();
  battle_->token = random_name();
  vote.mode = arena_.collects ? "collect" : "compare";
  arena_.add(battle_);
  const BattleArena::State::Question question = arena_.read_question(std::move(body));
  vote.prompt = question.prompt;
  vote.sampling = sampling_json(question.requests[0]);
  const uint64_t seed = system_random() >> 11;  // 53 bits, which every reader of JSON keeps
  for (const size_t player : arena_.draw(n)) {
    Side side{.model = arena_.players[player], .request = question.requests[player]};
    side.request.sampling.seed = seed;
    sides_.push_back(std::move(side));
  }
  const Sampling& s = sides_[0].request.sampling;
  if (s.temperature == 0 || s.top_k == 1) draws_ = kDraws;  // others would be the same
  for (Side& side : sides_) submit(side);
}

void BattleInWork::submit(Side& side) {
  side.request.sampling.stream = streams_++;
  side.text.clear();
  side.characters = 0;
  side.begun = side.over = false;
  side.mailbox = arena_.engine.submit(side.model, {side.request});
}

void BattleInWork::take_events(Side& side, double seconds, bool until_over) {
  for (Event& e : side.mailbox->wait(seconds, until_over)) {
    side.begun = true;
    if (e.kind == Event::failed) {
      const bool busy = e.status == 503;  // what else is said of a model might name it
      throw ApiError(e.status, "server_error", e.code, "", busy ? e.text : "a model has failed");
    }
    if (e.kind == Event::token) {
      side.text += e.text;
      side.characters += count_characters(e.text);
    }
    if (e.kind != Event::finished) continue;
    side.over = true;
    side.tokens = e.sampled_tokens;
    const bool ended = e.finish == Finish::stop_token || e.finish == Finish::stop_string;
    side.finish = ended ? "stop" : "length";
  }
}

void BattleInWork::wait_until_begun() {
  for (Side& side : sides_) {
    while (!side.begun) {
      take_events(side, kPollSeconds);
      if (client_left()) throw ClientLeft();
    }
  }
}

bool BattleInWork::all_differ() const {
  for (size_t a = 0; a < sides_.size(); a++) {
    for (size_t b = 0; b < a; b++) {
      const Side &x = sides_[a], &y = sides_[b];
      if (!will_differ(x.text, x.over, y.text, y.over)) return false;
    }
  }
  return true;
}

// All answers are over. Those that are equal are drawn again, both, so that no model's answers are
// favoured: then it is false. The last time, one of them stays.
bool BattleInWork::settle() {
  const auto equal = [](const Side& a, const Side& b) { return strip(a.text) == strip(b.text); };
  if (draws_ < kDraws) {
    std::vector<Side*> again;
    for (Side& a : sides_) {
      const bool twice = std::any_of(sides_.begin(), sides_.end(),
                                     [&](const Side& b) { return &a != &b && equal(a, b); });
      if (twice) again.push_back(&a);
    }
    if (!again.empty()) {
      draws_++;
      for (Side* side : again) submit(*side);
      return false;
    }
  }
  equal_ = answers();
  for (size_t a = 1; a < sides_.size();) {
    const bool twice = std::any_of(sides_.begin(), sides_.begin() + long(a),
                                   [&](const Side& b) { return equal(sides_[a], b); });
    twice ? void(sides_.erase(sides_.begin() + long(a))) : void(a++);
  }
  return is_settled_ = true;
}

std::vector<VotedAnswer> BattleInWork::answers() const {
  std::vector<VotedAnswer> list;
  for (const Side& side : sides_) {
    const ServedModel& m = arena_.models[side.model];
    list.push_back({.model = m.id,
                    .weights = m.fingerprint,
                    .text = side.text,
                    .tokens = side.tokens,
                    .finish = side.finish,
                    .seed = side.request.sampling.seed,
                    .stream = side.request.sampling.stream});
  }
  return list;
}

OrderedJson BattleInWork::head() const {
  const Vote& v = battle_->vote;
  return {{"battle", v.battle}, {"token", battle_->token}, {"mode", v.mode}};
}

// The battle is over: {"done"} or {"same"}.
OrderedJson BattleInWork::end() {
  using Phase = Battle::Phase;
  if (sides_.size() > 1 && all_differ()) {
    arena_.end(*battle_, Phase::over, answers());
    OrderedJson done = OrderedJson::array();
    for (const Side& side : sides_) done.push_back({{"finish", side.finish}});
    return {{"done", std::move(done)}};
  }
  if (!was_stopped_) {  // a vote of its own kind: how often models agree is of interest
    Vote vote = battle_->vote;
    vote.answers = equal_;
    vote.same = true;
    vote.time = time_text();
    try {
      arena_.votes.add(vote);
    } catch (const std::exception& e) {
      refuse_storing(e);
    }
    arena_.changes++;
    arena_.end(*battle_, Phase::same, {});
  }
  return {{"same", true}};
}

OrderedJson BattleInWork::whole() {
  do {
    for (Side& side : sides_) {
      while (!side.over) {
        take_events(side, kPollSeconds, true);
        if (!side.over && client_left()) throw ClientLeft();
      }
    }
  } while (!settle());
  OrderedJson json = head();
  json["prompt"] = battle_->vote.prompt;
  if (end().contains("same")) {
    json["same"] = true;
    return json;
  }
  json["answers"] = OrderedJson::array();
  for (const Side& side : sides_) {
    json["answers"].push_back({{"text", side.text}, {"finish", side.finish}});
  }
  return json;
}

// What is new of each answer, for everyone to see.
OrderedJson BattleInWork::show(double time) {
  size_t written = std::string::npos, most = 0, ended = std::string::npos;
  for (const Side& side : sides_) {
    size_t& fewest = side.over ? ended : written;
    fewest = std::min(fewest, side.characters);
    most = std::max(most, side.characters);
  }
  const size_t shown = pace_.advance(time, std::min(written, most), ended);
  OrderedJson delta = OrderedJson::array();
  for (Side& side : sides_) {
    const size_t begin = side.shown_bytes;
    side.shown_bytes = bytes_of_characters(side.text, shown);
    delta.push_back(side.text.substr(begin, side.shown_bytes - begin));
  }
  return delta;
}

// The answers are what was shown of them.
void BattleInWork::stop_now() {
  was_stopped_ = true;
  for (Side& side : sides_) {
    side.mailbox->cancel();
    if (side.over && side.shown_bytes == side.text.size()) continue;
    side.text.resize(side.shown_bytes);
    side.finish = "stopped";
    side.over = true;
  }
}

// What there is to send at this moment; `silence`: seconds since the last event.
std::vector<OrderedJson> BattleInWork::next_events(double silence) {
  std::vector<OrderedJson> events;
  if (battle_->stopped) {
    stop_now();
    return events;
  }
  for (Side& side : sides_) {
    if (!side.over) take_events(side, 0);
  }
  const size_t n = sides_.size();
  if (!is_settled_) is_settled_ = all_differ();
  if (!is_settled_ && all_over() && settle() && sides_.size() < n && sides_.size() > 1) {
    events.push_back({{"answers", sides_.size()}});
  }
  if (is_settled_ && sides_.size() > 1) {
    OrderedJson delta = show(now());
    if (std::any_of(delta.begin(), delta.end(), [](const OrderedJson& text) { return text != ""; }))
      events.push_back({{"delta", std::move(delta)}});
  }
  if (events.empty() && silence >= kKeepAliveSeconds) {
    events.push_back({{"delta", std::vector<std::string>(sides_.size())}});
  }
  return events;
}

// False when the client has left.
bool BattleInWork::write_stream(httplib::DataSink& sink) {
  double sent = now();
  const auto send = [&](const std::string& line) {
    sent = now();
    const std::string event = "data: " + line + "\n";
    return sink.write(event.data(), event.size());
  };
  try {
    OrderedJson first = head();
    first["answers"] = sides_.size();
    first["prompt"] = battle_->vote.prompt;
    if (!send(json_line(first))) return false;
    while (!is_complete()) {
      std::this_thread::sleep_for(std::chrono::duration<double>(kTickSeconds));
      if (client_left()) return false;
      for (const OrderedJson& event : next_events(now() - sent)) {
        if (!send(json_line(event))) return false;
      }
    }
    if (!send(json_line(end())) || !send("[DONE]\n")) return false;
  } catch (const ApiError& e) {
    send(error_body(e));  // the stream ends without [DONE]
  }
  sink.done();
  return true;
}

// ---------------------------------------------------------------------------------------------
// Requests

BattleArena::BattleArena(const ArenaOptions& options, std::span<const ServedModel> models,
                         Engine& engine, const ApiLimits& limits)
    : state_(std::make_unique<State>(options, models, engine, limits)) {}
BattleArena::~BattleArena() = default;

void BattleArena::battle(const httplib::Request& request, httplib::Response& response) {
  const OrderedJson body = read_body(request.body, state_->limits);
  const auto work = std::make_shared<BattleInWork>(*state_);
  work->begin(body);
  try {
    if (!body_value(body, "stream", false)) {
      return response.set_content(json_line(work->whole()), "application/json");
    }
    work->wait_until_begun();
  } catch (const ClientLeft&) {
    response.status = 499;  // nobody reads it
    return;
  }
  set_event_stream(response, [work](httplib::DataSink& sink) { return work->write_stream(sink); });
}

OrderedJson BattleArena::vote(const OrderedJson& body) {
  using Phase = Battle::Phase;
  State& s = *state_;
  const std::shared_ptr<Battle> battle = s.find(body);
  Vote vote;
  {
    const std::lock_guard lock(s.mutex);
    if (battle->phase == Phase::running) {
      refuse_state("not_over", "battle: found one that is not over, expected both answers whole");
    }
    if (battle->phase == Phase::same) {
      refuse_state("nothing_to_vote_on", "battle: found equal answers, expected different ones");
    }
    if (battle->phase != Phase::over) {
      refuse_state("already_voted", "battle: found one with a vote, expected one without");
    }
    vote = battle->vote;
    read_vote(body, vote.answers);
    vote.time = time_text();
    vote.seconds = now() - battle->ended;
    vote.leaked = s.names_a_model(vote);
    battle->phase = Phase::writing;
  }
  try {
    s.votes.add(vote);
  } catch (const std::exception& e) {
    const std::lock_guard lock(s.mutex);
    battle->phase = Phase::over;
    refuse_storing(e);
  }
  s.changes++;
  OrderedJson names = OrderedJson::array();
  for (const VotedAnswer& a : vote.answers) names.push_back(a.model);
  {
    const std::lock_guard lock(s.mutex);
    battle->phase = Phase::voted;
    s.bytes -= std::exchange(battle->bytes, 0);
    battle->vote.answers.clear();
    battle->vote.prompt = nullptr;
  }
  return {{"models", std::move(names)},
          {"votes", s.votes.count_of(vote.voter)},
          {"leaked", vote.leaked}};
}

OrderedJson BattleArena::stop(const OrderedJson& body) {
  const std::shared_ptr<Battle> battle = state_->find(body);
  const std::lock_guard lock(state_->mutex);
  const bool runs = battle->phase == Battle::Phase::running;
  if (runs) battle->stopped = true;
  return {{"stopped", runs}};
}

OrderedJson BattleArena::undo(const OrderedJson& body) {
  using Phase = Battle::Phase;
  State& s = *state_;
  const std::shared_ptr<Battle> battle = s.find(body);
  {
    const std::lock_guard lock(s.mutex);
    if (battle->phase != Phase::voted) {
      refuse_state("not_voted", "battle: found one without a vote, expected one with a vote");
    }
    battle->phase = Phase::writing;
  }
  try {
    s.votes.undo(battle->vote.battle);
  } catch (const std::exception& e) {
    const std::lock_guard lock(s.mutex);
    battle->phase = Phase::voted;
    refuse_storing(e);
  }
  s.changes++;
  const std::lock_guard lock(s.mutex);
  battle->phase = Phase::undone;
  s.put_back_prompt(battle->prompt, false);
  return {{"undone", true}};
}

OrderedJson BattleArena::leaderboard(const OrderedJson& body) {
  State& s = *state_;
  const int64_t cast = s.votes.count_of(read_voter(body));
  if (cast < kVotesBeforeLeaderboard) {
    return {{"hidden", true}, {"votes_left", kVotesBeforeLeaderboard - cast}};
  }
  const std::lock_guard lock(s.leaderboard_mutex);
  const int64_t changes = s.changes;
  const bool is_old =
      changes != s.leaderboard_changes && now() - s.leaderboard_time >= kLeaderboardSeconds;
  if (s.shown_leaderboard.is_null() || is_old) {
    std::vector<Vote> votes;
    s.votes.for_each([&](const Vote& vote) {
      votes.push_back(vote);
      votes.back().prompt = votes.back().sampling = nullptr;  // what it has no use for
    });
    s.shown_leaderboard = cake::leaderboard(votes);
    s.leaderboard_changes = changes;
    s.leaderboard_time = now();
  }
  return s.shown_leaderboard;
}

OrderedJson BattleArena::state() const {
  const State& s = *state_;
  const std::lock_guard lock(s.mutex);
  const bool own = s.options.prompts.empty();
  return {{"mode", s.collects ? "collect" : "compare"},
          {"answers", s.collects ? s.options.answers : 2},
          {"prompts", own ? OrderedJson() : OrderedJson(s.prompts.waiting.size())}};
}

}  // namespace cake
