// The arena of ./serve over real sockets: battles at one pace, blind, on sides by chance; votes;
// what is drawn again, what is left out, and what happens when something goes wrong. Most tests use
// a stand-in for a model, which writes what the test tells it to, as fast as the test lets it.
#include <doctest/doctest.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cake/arena.h"
#include "cake/votes.h"
#include "test/chatml.h"
#include "test/http_client.h"
#include "test/scripted_model.h"
#include "test/serve_support.h"
#include "test/support.h"

namespace {

using namespace cake;

// ---------------------------------------------------------------------------------------------
// A model that writes a text for each stream of a seed, whatever it is asked

const Tokenizer& arena_tokenizer() {
  static const ScriptedModel scripted;
  return scripted.tokenizer();
}

class WritingGpt : public FakeGpt {
 public:
  using Script = std::function<std::string(uint64_t stream)>;
  WritingGpt(Script script, int T)
      : FakeGpt({.V = arena_tokenizer().vocab_size(),
                 .T = T,
                 .L = 1,
                 .C = 2,
                 .NH = 1,
                 .NKV = 1,
                 .HS = 2,
                 .F = 2}),
        script_(std::move(script)) {}
  std::unique_ptr<KvCache> make_cache(int64_t limit, CacheType) override {
    return std::make_unique<KvCache>(limit);
  }
  // A token is a byte, so that the number of tokens is known. The answer begins behind the last
  // header, "<|im_start|>assistant\n".
  void decode(KvCache& cache, std::span<const DecodeRow> rows, DecodeResult& result,
              bool) override {
    NewPositions room(cache, rows, [](int, int) {});
    result.ids.clear();
    for (const DecodeRow& row : rows) {
      const int start = arena_tokenizer().special("<|im_start|>");
      const auto header = std::find(row.history.rbegin(), row.history.rend(), start);
      const size_t behind = size_t(header - row.history.rbegin()) + 1;
      const size_t header_tokens = arena_tokenizer().encode("<|im_start|>assistant\n", true).size();
      const std::string text = script_(row.sampling.stream);
      const size_t i = behind - std::min(behind, header_tokens);
      if (on_token && behind >= header_tokens) on_token(i);
      result.ids.push_back(i < text.size() ? byte_token(text[i])
                                           : arena_tokenizer().special("<|im_end|>"));
    }
    result.logp.assign(rows.size(), 0);
    result.make_scores(rows);
    room.keep();
  }
  std::function<void(size_t i)>
      on_token;  // before the i-th token is written, on the engine's thread

 private:
  static int byte_token(char c) {
    static const std::vector<int> ids = [] {
      std::vector<int> list(256);
      for (int id = 0; id < 256; id++) {
        list[static_cast<unsigned char>(arena_tokenizer().token_bytes(id)[0])] = id;
      }
      return list;
    }();
    return ids[static_cast<unsigned char>(c)];
  }
  Script script_;
};

ServedModel writing_model(const std::string& id, WritingGpt::Script script, int T = 2048) {
  auto gpt = std::make_unique<WritingGpt>(std::move(script), T);
  const Config config = gpt->config();
  ServedModel m{.id = id,
                .text = {.config = config, .tokenizer = arena_tokenizer(), .gpt = std::move(gpt)},
                .context = T,
                .fingerprint = "fp_" + id};
  use_template(m.text, chatml_template(arena_tokenizer()));
  return m;
}
WritingGpt& gpt_of(ServedModel& m) { return static_cast<WritingGpt&>(*m.text.gpt); }
WritingGpt::Script always(const std::string& text) {
  return [text](uint64_t) { return text; };
}

// ---------------------------------------------------------------------------------------------
// A server of an arena alone

class ArenaServer {
 public:
  explicit ArenaServer(std::vector<ServedModel> served, ArenaOptions arena_options = {},
                       EngineOptions engine_options = {.rows = 16})
      : models(std::move(served)), options(std::move(arena_options)) {
    if (options.votes.empty()) options.votes = (dir / "votes.db").string();
    engine_options.threads = 1;
    std::vector<GeneratorOptions> caches;
    for (const ServedModel& m : models) {
      caches.push_back({.rows = engine_options.rows,
                        .cache_positions = int64_t(engine_options.rows + 1) * m.context,
                        .prefill_tokens = 64,
                        .context = m.context});
    }
    engine.emplace(models, std::move(caches), engine_options);
    start();
  }
  ~ArenaServer() { stop(); }
  // A new arena on the same votes, as after a restart.
  void restart() {
    stop();
    start();
  }

  Reply post(const std::string& path, const OrderedJson& body) {
    return ask(port, http_post("/arena/" + path, body));
  }
  OrderedJson ok(const std::string& path, const OrderedJson& body) {
    const Reply reply = post(path, body);
    INFO(path << " " << body.dump() << ": " << reply.body);
    REQUIRE(reply.status == 200);
    return reply.json();
  }
  // "409 already_voted"
  std::string error_of(const std::string& path, const OrderedJson& body) {
    const Reply reply = post(path, body);
    if (reply.status == 200) return "200";
    const OrderedJson code = reply.json()["error"]["code"];
    return concat(reply.status, " ", code.is_string() ? std::string(code) : "");
  }
  OrderedJson battle(OrderedJson more = OrderedJson::object()) {
    return ok("battle", question(std::move(more)));
  }
  StreamedReply stream(OrderedJson more = OrderedJson::object()) {
    more["stream"] = true;
    return ask_stream(port, http_post("/arena/battle", question(std::move(more))));
  }
  static OrderedJson question(OrderedJson more = OrderedJson::object()) {
    OrderedJson body{{"voter", "tester"}, {"messages", {{{"role", "user"}, {"content", "hi"}}}}};
    for (const auto& [key, value] : more.items()) body[key] = value;
    return body;
  }
  OrderedJson vote(const OrderedJson& battle, OrderedJson more) {
    return ok("vote", ballot(battle, std::move(more)));
  }
  static OrderedJson ballot(const OrderedJson& battle, OrderedJson more) {
    more["battle"] = battle["battle"];
    more["token"] = battle["token"];
    return more;
  }
  std::vector<Vote> votes() const {
    std::vector<Vote> list;
    Votes(options.votes, Votes::Access::read).for_each([&](const Vote& v) { list.push_back(v); });
    return list;
  }

  TempDir dir;
  std::vector<ServedModel> models;
  ArenaOptions options;
  std::optional<Engine> engine;
  std::optional<BattleArena> arena;
  int port = 0;

 private:
  void start() {
    arena.emplace(options, models, *engine, ApiLimits{});
    http.emplace(HttpOptions{.port = 0});
    http->Post("/arena/battle",
               [this](const auto& request, auto& response) { arena->battle(request, response); });
    using ArenaHandler = OrderedJson (BattleArena::*)(const OrderedJson&);
    const auto add = [this](const char* path, ArenaHandler handler) {
      http->Post(path, [this, handler](const auto& request, auto& response) {
        response.set_content(json_line(((*arena).*handler)(read_body(request.body, {}))),
                             "application/json");
      });
    };
    add("/arena/vote", &BattleArena::vote);
    add("/arena/stop", &BattleArena::stop);
    add("/arena/undo", &BattleArena::undo);
    add("/arena/leaderboard", &BattleArena::leaderboard);
    port = http->bind();
    thread = std::thread([this] { http->run(); });
  }
  void stop() {
    http->stop();
    http->close_all();
    http->wait_until_closed(10);
    thread.join();
    http.reset();
    arena.reset();
  }
  std::optional<HttpServer> http;
  std::thread thread;
};

std::vector<ServedModel> models_of(std::vector<std::pair<std::string, std::string>> list) {
  std::vector<ServedModel> models;
  for (const auto& [id, text] : list) models.push_back(writing_model(id, always(text)));
  return models;
}
std::vector<ServedModel> two_models() {
  return models_of({{"harbour", "The ferry leaves at nine."}, {"meadow", "Sheep graze there."}});
}

// Holds a model's step, however slow the machine is.
template <class Condition>
void hold_until(Condition&& condition) {
  wait_until(condition, 60);
}

// Lets a model of a battle write so many tokens of its answer. The engine has one thread: the first
// token waits until both calls have reached it, for the stream begins when both have begun.
struct Gate {
  explicit Gate(size_t tokens) : allowed(tokens) {}
  void attach(ArenaServer& of) { server = &of; }
  void hold(size_t i) {
    if (i == 0) hold_until([&] { return server->engine->counts().requests % 2 == 0; });
    if (i > 0) hold_until([&] { return i < allowed; });
  }
  ArenaServer* server = nullptr;
  std::atomic<size_t> allowed;
};

// The deltas of a stream, joined, and the keys of its events in their order.
struct Read {
  std::vector<std::string> texts;
  std::string kinds;  // begin, delta, Done, Same, Answers, Error, [DONE]: "bddD."
  OrderedJson first, last;
  double begin = 0, end = 0;  // of the deltas
};
Read read(const StreamedReply& stream) {
  Read r;
  for (const ServerEvent& event : stream.events) {
    if (event.is_done()) {
      r.kinds += '.';
      continue;
    }
    const OrderedJson json = event.json();
    if (json.contains("battle")) {
      r.kinds += 'b';
      r.first = json;
    } else if (json.contains("delta")) {
      if (r.begin == 0) r.begin = event.time;
      r.end = event.time;
      r.kinds += 'd';
      r.texts.resize(json["delta"].size());
      for (size_t i = 0; i < r.texts.size(); i++) r.texts[i] += std::string(json["delta"][i]);
    } else {
      r.kinds += char(std::toupper(json.begin().key()[0]));
      r.last = json;
    }
  }
  return r;
}
std::string without_repeats(std::string text) {
  text.erase(std::unique(text.begin(), text.end()), text.end());
  return text;
}

// ---------------------------------------------------------------------------------------------
// Battles and votes

TEST_CASE("arena: a battle shows both answers, and its vote is stored as it was shown") {
  ArenaServer server(two_models());
  OrderedJson battle;
  std::vector<std::string> shown;
  SUBCASE("streamed") {
    const StreamedReply stream = server.stream({{"temperature", .5}, {"max_tokens", 100}});
    CHECK(stream.reply.header("Content-Type") == "text/event-stream");
    const Read r = read(stream);
    CHECK(without_repeats(r.kinds) == "bdD.");
    battle = r.first;
    shown = r.texts;
    CHECK(r.last == OrderedJson{{"done", {{{"finish", "stop"}}, {{"finish", "stop"}}}}});
    CHECK(battle["answers"] == 2);
  }
  SUBCASE("whole") {
    battle = server.battle({{"temperature", .5}, {"max_tokens", 100}});
    for (const auto& answer : battle["answers"]) {
      shown.push_back(answer["text"]);
      CHECK(answer["finish"] == "stop");
    }
  }
  CHECK(battle["mode"] == "compare");
  CHECK(battle["prompt"] == OrderedJson::array({{{"role", "user"}, {"content", "hi"}}}));
  REQUIRE(shown.size() == 2);
  const auto model_of = [](const std::string& text) {
    return text[0] == 'T' ? "harbour" : "meadow";
  };
  CHECK(std::set(shown.begin(), shown.end()) ==
        std::set<std::string>{"The ferry leaves at nine.", "Sheep graze there."});

  const OrderedJson reply = server.vote(battle, {{"vote", "right"}, {"good", {false, true}}});
  CHECK(reply == OrderedJson{{"models", {model_of(shown[0]), model_of(shown[1])}},
                             {"votes", 1},
                             {"leaked", false}});
  const std::vector<Vote> votes = server.votes();
  REQUIRE(votes.size() == 1);
  const Vote& v = votes[0];
  CHECK(v.battle == battle["battle"]);
  CHECK(v.mode == "compare");
  CHECK(v.voter == "tester");
  CHECK(v.prompt == battle["prompt"]);
  CHECK(v.sampling["temperature"] == .5);
  CHECK(v.sampling["max_tokens"] == 100);
  CHECK(v.anonymous);
  CHECK(!v.leaked);
  CHECK(!v.same);
  CHECK(v.seconds >= 0);
  CHECK(v.time.size() == 20);
  REQUIRE(v.answers.size() == 2);
  for (size_t i = 0; i < 2; i++) {
    CHECK(v.answers[i].text == shown[i]);
    CHECK(v.answers[i].model == model_of(shown[i]));
    CHECK(v.answers[i].weights == std::string("fp_") + model_of(shown[i]));
    CHECK(v.answers[i].tokens == int(shown[i].size()) + 1);
    CHECK(v.answers[i].finish == "stop");
    CHECK(v.answers[i].seed == v.answers[0].seed);
    CHECK(v.answers[i].stream == i);
    CHECK(v.answers[i].rank == 2 - int(i));
    CHECK(v.answers[i].good == (i == 1));
  }
}

TEST_CASE("arena: a vote without its battle, its token, its end or for a second time is refused") {
  Gate gate(5);
  std::vector<ServedModel> models = two_models();
  gpt_of(models[1]).on_token = [&](size_t i) { gate.hold(i); };
  ArenaServer server(std::move(models));
  gate.attach(server);
  Connection connection(server.port);
  connection.write(http_post("/arena/battle", ArenaServer::question({{"stream", true}})));
  REQUIRE(connection.read_head().status == 200);
  EventReader events(connection);
  const OrderedJson battle = events.next()->json();
  const OrderedJson ballot = ArenaServer::ballot(battle, {{"vote", "left"}});
  CHECK(server.error_of("vote", ballot) == "409 not_over");
  CHECK(server.error_of("undo", ballot) == "409 not_voted");
  gate.allowed = 1000;
  while (events.next()) {
  }

  OrderedJson other = ballot;
  other["token"] = std::string(32, '0');
  CHECK(server.error_of("vote", other) == "404 unknown_battle");
  other = ballot;
  other["battle"] = std::string(32, '0');
  CHECK(server.error_of("vote", other) == "404 unknown_battle");
  CHECK(server.error_of("vote", {{"vote", "left"}}) == "404 unknown_battle");
  CHECK(server.error_of("undo", ballot) == "409 not_voted");
  CHECK(server.votes().empty());
  CHECK(server.ok("vote", ballot)["votes"] == 1);
  CHECK(server.error_of("vote", ballot) == "409 already_voted");
  CHECK(server.error_of("vote", ArenaServer::ballot(battle, {{"vote", "right"}})) ==
        "409 already_voted");
  CHECK(server.votes().size() == 1);
  CHECK(server.ok("undo", ballot) == OrderedJson{{"undone", true}});
  CHECK(server.error_of("undo", ballot) == "409 not_voted");
  CHECK(server.error_of("vote", ballot) == "409 already_voted");  // the names are known
  REQUIRE(server.votes().size() == 1);
  CHECK(server.votes()[0].undone);
}

TEST_CASE("arena: of two votes at the same moment one is stored") {
  ArenaServer server(two_models());
  for (int round = 0; round < 5; round++) {
    const OrderedJson ballot = ArenaServer::ballot(server.battle(), {{"vote", "tie"}});
    std::atomic<int> stored{0}, refused{0};
    std::vector<std::thread> voters;
    for (int i = 0; i < 4; i++) {
      voters.emplace_back([&] {
        const int status = ask(server.port, http_post("/arena/vote", ballot)).status;
        (status == 200 ? stored : refused) += status == 200 || status == 409;
      });
    }
    for (std::thread& voter : voters) voter.join();
    CHECK(stored == 1);
    CHECK(refused == 3);
  }
  CHECK(server.votes().size() == 5);
}

TEST_CASE("arena: a request or a vote with a wrong field is refused with its name") {
  ArenaServer server(two_models());
  const auto param_of = [&](const std::string& path, const OrderedJson& body) {
    const Reply reply = server.post(path, body);
    CHECK(reply.status == 400);
    const OrderedJson param = reply.json()["error"]["param"];
    return param.is_string() ? std::string(param) : "";
  };
  const auto refused = [&](OrderedJson more) {
    return param_of("battle", ArenaServer::question(std::move(more)));
  };
  CHECK(refused({{"voter", ""}}) == "voter");
  CHECK(refused({{"voter", "a b"}}) == "voter");
  CHECK(refused({{"voter", std::string(65, 'a')}}) == "voter");
  CHECK(refused({{"voter", 7}}) == "voter");
  CHECK(refused({{"answers", 3}}) == "answers");
  CHECK(refused({{"temperature", 3}}) == "temperature");
  CHECK(refused({{"stream", "yes"}}) == "stream");
  CHECK(refused({{"model", "harbour"}}) == "model");
  CHECK(refused({{"seed", 1}}) == "seed");
  CHECK(refused({{"n", 2}}) == "n");
  CHECK(refused({{"logprobs", true}}) == "logprobs");
  CHECK(refused({{"messages", nullptr}}) == "messages");
  CHECK(refused({{"messages", OrderedJson::array()}}) == "messages");
  CHECK(refused({{"messages", {{{"role", "assistant"}, {"content", "x"}}}}}) == "messages");
  CHECK(refused({{"max_tokens", 100000}}) == "messages");
  CHECK(server.engine->counts().requests == 0);

  const OrderedJson battle = server.battle();
  const auto refused_vote = [&](OrderedJson more) {
    return param_of("vote", ArenaServer::ballot(battle, std::move(more)));
  };
  CHECK(refused_vote({}) == "vote");
  CHECK(refused_vote({{"vote", "left"}, {"ranking", {1, 2}}}) == "vote");
  CHECK(refused_vote({{"vote", "Left"}}) == "vote");
  CHECK(refused_vote({{"vote", 1}}) == "vote");
  CHECK(refused_vote({{"ranking", {1}}}) == "ranking");
  CHECK(refused_vote({{"ranking", {0, 1}}}) == "ranking");
  CHECK(refused_vote({{"ranking", {1, 3}}}) == "ranking");
  CHECK(refused_vote({{"ranking", {1, 1.5}}}) == "ranking");
  CHECK(refused_vote({{"ranking", "12"}}) == "ranking");
  CHECK(refused_vote({{"vote", "left"}, {"good", true}}) == "good");
  CHECK(refused_vote({{"vote", "left"}, {"good", {true}}}) == "good");
  CHECK(refused_vote({{"vote", "left"}, {"good", {1, 0}}}) == "good");
  CHECK(server.votes().empty());
  CHECK(server.vote(battle, {{"ranking", {2, 2}}})["votes"] ==
        1);  // nothing of these cost the vote
  CHECK(server.votes()[0].answers[0].rank == 1);
}

TEST_CASE("arena: collecting ranks several answers of one model") {
  std::vector<ServedModel> models;
  models.push_back(
      writing_model("policy", [](uint64_t stream) { return concat("Answer ", stream); }));
  ArenaServer server(std::move(models));
  OrderedJson battle;
  SUBCASE("four, as by default") {
    battle = server.battle();
    REQUIRE(battle["answers"].size() == 4);
    CHECK(battle["mode"] == "collect");
    CHECK(server.error_of("vote", ArenaServer::ballot(battle, {{"vote", "left"}})) == "400 ");
    const OrderedJson reply =
        server.vote(battle, {{"ranking", {3, 1, 3, 4}}, {"good", {true, true, false, false}}});
    CHECK(reply["models"] == OrderedJson{"policy", "policy", "policy", "policy"});
    const Vote v = server.votes().at(0);
    CHECK(v.mode == "collect");
    std::vector<int> ranks;
    std::set<std::string> texts;
    for (const VotedAnswer& a : v.answers) ranks.push_back(a.rank), texts.insert(a.text);
    CHECK(ranks == std::vector<int>{2, 1, 2, 4});  // places as in sports, whatever was sent
    CHECK(texts.size() == 4);
    CHECK(!v.answers[3].good);
  }
  SUBCASE("two, with sides") {
    battle = server.battle({{"answers", 2}});
    CHECK(server.vote(battle, {{"vote", "left"}})["votes"] == 1);
  }
  SUBCASE("nine, streamed") {
    const Read r = read(server.stream({{"answers", 9}}));
    CHECK(r.first["answers"] == 9);
    CHECK(std::set(r.texts.begin(), r.texts.end()).size() == 9);
  }
  SUBCASE("ten are too many") {
    CHECK(server.error_of("battle", ArenaServer::question({{"answers", 10}})) == "400 ");
    CHECK(server.error_of("battle", ArenaServer::question({{"answers", 1}})) == "400 ");
  }
}

// ---------------------------------------------------------------------------------------------
// Pace

TEST_CASE("arena: a slow model slows both sides, and every event has both") {
  const std::string fast(60, 'f'), slow = "f" + std::string(59, 's');
  std::vector<ServedModel> models = models_of({{"fast", fast}, {"slow", slow}});
  Gate gate(1);
  gpt_of(models[1]).on_token = [&](size_t i) { gate.hold(i); };
  ArenaServer server(std::move(models));
  gate.attach(server);
  Connection connection(server.port);
  connection.write(http_post("/arena/battle", ArenaServer::question({{"stream", true}})));
  REQUIRE(connection.read_head().status == 200);
  EventReader events(connection);
  events.next();
  CHECK(!connection.receive(.3));  // they could be the same
  std::vector<std::string> texts(2);
  for (const size_t next : {2, 3, 10, 30, 59}) {
    gate.allowed = next;
    while (texts[0].size() < next) {
      const OrderedJson delta = events.next()->json()["delta"];
      REQUIRE(delta.size() == 2);
      for (size_t i = 0; i < 2; i++) texts[i] += std::string(delta[i]);
      CHECK(texts[0].size() == texts[1].size());
      CHECK(texts[0].size() <= next);
    }
  }
  gate.allowed = 1000;
  while (const auto event = events.next()) {
    if (event->is_done() || !event->json().contains("delta")) continue;
    const OrderedJson delta = event->json()["delta"];
    for (size_t i = 0; i < 2; i++) texts[i] += std::string(delta[i]);
  }
  CHECK(std::set(texts.begin(), texts.end()) == std::set{fast, slow});
}

TEST_CASE("arena: text is shown by time, whatever the models' tokens and speeds are") {
  // Characters of one to four bytes, of which a token is a byte.
  std::string wide;
  for (int i = 0; i < 50; i++) wide += "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x8d\xb0";
  ArenaServer server(models_of({{"wide", wide}, {"plain", std::string(300, 'p')}}));
  const double asked = now();
  const StreamedReply stream = server.stream();
  // 300 characters at 500/s take .6 s, on any machine.
  CHECK(read(stream).end - asked >= .55);
  size_t left = 0, right = 0;
  for (const OrderedJson& event : stream.chunks()) {
    if (!event.contains("delta")) continue;
    const auto count = [&](const std::string& text) {
      CHECK(is_utf8(text));
      return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; });
    };
    left += size_t(count(event["delta"][0]));
    right += size_t(count(event["delta"][1]));
    CHECK(std::min<size_t>(200, std::max(left, right)) == std::min(left, right));
  }
  CHECK(std::max(left, right) == 300);
}

TEST_CASE("arena: once an answer has ended, the other goes on no faster than before") {
  // The slow one writes a character each 20 ms and ends with the tenth. The other one is done long
  // before: the 40 characters that it has more take .8 s at that pace.
  std::vector<ServedModel> models =
      models_of({{"slow", std::string(10, 's')}, {"fast", std::string(50, 'f')}});
  gpt_of(models[0]).on_token = [](size_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  };
  ArenaServer server(std::move(models));
  const StreamedReply stream = server.stream();
  double all_of_slow = 0;
  size_t most = 0;
  for (const ServerEvent& event : stream.events) {
    if (event.is_done() || !event.json().contains("delta")) continue;
    most += std::max(std::string(event.json()["delta"][0]).size(),
                     std::string(event.json()["delta"][1]).size());
    if (most >= 10 && all_of_slow == 0) all_of_slow = event.time;
  }
  CHECK(most == 50);
  CHECK(read(stream).end - all_of_slow > .4);
}

TEST_CASE("arena: answers are held back as long as they could be the same") {
  std::vector<ServedModel> models =
      models_of({{"short", "The answer is 7."}, {"long", "The answer is 7. It is odd."}});
  Gate gate(16);
  gpt_of(models[1]).on_token = [&](size_t i) { gate.hold(i); };
  ArenaServer server(std::move(models));
  gate.attach(server);
  Connection connection(server.port);
  connection.write(http_post("/arena/battle", ArenaServer::question({{"stream", true}})));
  REQUIRE(connection.read_head().status == 200);
  EventReader events(connection);
  events.next();
  CHECK(!connection.receive(.3));
  gate.allowed = 17;  // a space is no difference
  CHECK(!connection.receive(.3));
  gate.allowed = 1000;
  CHECK(events.next()->json().contains("delta"));
}

// ---------------------------------------------------------------------------------------------
// Equal answers

TEST_CASE("arena: equal answers are drawn again, three times at most") {
  // Stream s of both models: the first `equal` draws give both the same text, but for white space.
  int equal = 0;
  std::vector<ServedModel> models;
  for (const std::string name : {"harbour", "meadow"}) {
    models.push_back(writing_model(name, [&equal, name](uint64_t stream) {
      if (int(stream / 2) >= equal) return concat("Own text of ", name.substr(0, 3), stream);
      return concat(name == "meadow" ? " " : "", "Draw ", stream / 2, stream % 2 ? " \n" : "");
    }));
  }
  SUBCASE("different at once") { equal = 0; }
  SUBCASE("different in the third draw") { equal = 2; }
  SUBCASE("different in the last draw") { equal = 3; }
  SUBCASE("never different") { equal = 1000; }
  const bool streamed = equal % 2 == 1;
  ArenaServer server(std::move(models));
  OrderedJson battle;
  if (streamed) {
    const Read r = read(server.stream());
    battle = r.first;
    CHECK(without_repeats(r.kinds) == "bdD.");
    for (const std::string& text : r.texts) CHECK(text.starts_with("Own text"));
  } else {
    battle = server.battle();
  }
  const int draws = std::min(4, equal + 1);
  CHECK(wait_until([&] { return server.engine->counts().finished == 2 * draws; }));
  const OrderedJson ballot = ArenaServer::ballot(battle, {{"vote", "left"}});
  if (equal < 4) {
    CHECK(server.ok("vote", ballot)["votes"] == 1);
    CHECK(!server.votes().at(0).same);
    CHECK(server.votes()[0].answers[1].stream == uint64_t(2 * draws - 1));
  } else {
    CHECK(battle["same"] == true);
    CHECK(!battle.contains("answers"));
    CHECK(server.error_of("vote", ballot) == "409 nothing_to_vote_on");
    REQUIRE(server.votes().size() == 1);  // that they are the same is worth knowing
    CHECK(server.votes()[0].same);
    CHECK(server.votes()[0].answers.size() == 2);
    CHECK(server.ok("leaderboard", {{"voter", "tester"}})["votes_left"] == 10);
  }
}

TEST_CASE("arena: a stream of equal answers shows none of them") {
  ArenaServer server(models_of({{"one", "The same."}, {"two", "The same."}}));
  const StreamedReply stream = server.stream();
  CHECK(read(stream).kinds == "bS.");
  CHECK(stream.reply.body.find("The same") == std::string::npos);
  CHECK(server.engine->counts().finished == 8);
  // At temperature 0 another draw would give the same.
  CHECK(server.battle({{"temperature", 0}})["same"] == true);
  CHECK(server.engine->counts().finished == 10);
}

TEST_CASE("arena: of several answers those that stay equal are shown once") {
  std::vector<ServedModel> models;
  int different = 0;
  models.push_back(writing_model("policy", [&](uint64_t stream) {
    return int(stream) < different ? concat("Answer ", stream) : std::string("Again");
  }));
  ArenaServer server(std::move(models));
  SUBCASE("two are left") {
    different = 1;
    const Read r = read(server.stream());
    CHECK(r.first["answers"] == 4);
    CHECK(without_repeats(r.kinds) == "bAdD.");
    CHECK(r.texts == std::vector<std::string>{"Answer 0", "Again"});
    CHECK(server.vote(r.first, {{"vote", "right"}})["models"].size() == 2);
  }
  SUBCASE("two are left, whole") {
    different = 1;
    const OrderedJson battle = server.battle();
    CHECK(battle["answers"].size() == 2);
  }
  SUBCASE("one is left") { CHECK(server.battle()["same"] == true); }
}

// ---------------------------------------------------------------------------------------------
// Blindness

TEST_CASE("arena: before the vote no byte tells which model wrote what") {
  std::vector<ServedModel> models;
  models.push_back(writing_model("harbour", always("The ferry leaves at nine."), 2048));
  models.push_back(writing_model("models/meadow-7b", always("Sheep graze there."), 96));
  ArenaServer server(std::move(models));
  const auto expect_blind = [](const Reply& reply) {
    for (const std::string& text : {reply.head, reply.body}) {
      for (const char* secret : {"harbour", "meadow", "fp_", "seed", "tokens\":", "model\":"}) {
        CHECK(text.find(secret) == std::string::npos);
      }
    }
  };
  const auto keys_of = [](const OrderedJson& json) {
    std::string keys;
    for (const auto& [key, value] : json.items()) keys += key + " ";
    return keys;
  };
  for (int i = 0; i < 8; i++) {  // sides are drawn each time
    const StreamedReply stream = server.stream();
    expect_blind(stream.reply);
    std::set<std::string> keys;
    for (const OrderedJson& event : stream.chunks()) keys.insert(keys_of(event));
    CHECK(keys == std::set<std::string>{"battle token mode answers prompt ", "delta ", "done "});
    const Reply whole = server.post("battle", ArenaServer::question());
    expect_blind(whole);
    CHECK(keys_of(whole.json()) == "battle token mode prompt answers ");
    CHECK(keys_of(whole.json()["answers"][0]) == "text finish ");
    expect_blind(server.post("vote", ArenaServer::ballot(whole.json(), {{"vote", "best"}})));
    expect_blind(server.post("stop", ArenaServer::ballot(whole.json(), {})));
    expect_blind(server.post("leaderboard", {{"voter", "tester"}}));
  }
  // What one model alone would refuse is refused whoever is drawn, without a name.
  std::set<std::string> refusals;
  for (int i = 0; i < 20; i++) {
    const Reply reply = server.post("battle", ArenaServer::question({{"max_tokens", 90}}));
    CHECK(reply.status == 400);
    expect_blind(reply);
    refusals.insert(reply.body);
  }
  CHECK(refusals.size() == 1);
}

TEST_CASE("arena: models share the limit of the one with the shortest context") {
  std::vector<ServedModel> models;
  models.push_back(writing_model("long", always(std::string(500, 'l')), 2048));
  models.push_back(writing_model("short", always(std::string(500, 's')), 96));
  ArenaServer server(std::move(models));
  const OrderedJson battle = server.battle();
  const std::string left = battle["answers"][0]["text"], right = battle["answers"][1]["text"];
  CHECK(left.size() == right.size());
  CHECK(left.size() < 96);
  CHECK(battle["answers"][0]["finish"] == "length");
  CHECK(battle["answers"][1]["finish"] == "length");
}

TEST_CASE("arena: a failed model ends the battle without its name") {
  std::vector<ServedModel> models = two_models();
  std::atomic<bool> fails{true};
  Gate gate(1000);
  gpt_of(models[0]).on_token = [&](size_t i) {
    gate.hold(i);
    if (i == 3 && fails) fail("harbour: found logits that are not finite, expected numbers");
  };
  ArenaServer server(std::move(models));
  gate.attach(server);
  const Reply reply = server.post("battle", ArenaServer::question());
  CHECK(reply.status == 500);
  CHECK(reply.body.find("harbour") == std::string::npos);
  gate.allowed = 3;
  Connection connection(server.port);
  connection.write(http_post("/arena/battle", ArenaServer::question({{"stream", true}})));
  REQUIRE(connection.read_head().status == 200);
  EventReader events(connection);
  const OrderedJson battle = events.next()->json();
  gate.allowed = 1000;  // amid the stream
  std::string last;
  while (const auto event = events.next()) last = event->text;
  CHECK(parse_json(last, "the last event").contains("error"));
  CHECK(events.raw().find("harbour") == std::string::npos);
  CHECK(wait_until([&] { return server.engine->counts().running == 0; }));
  CHECK(wait_until([&] {
    return server.error_of("vote", ArenaServer::ballot(battle, {{"vote", "left"}})) ==
           "404 unknown_battle";
  }));
  fails = false;
  CHECK(server.battle()["answers"].size() == 2);
}

TEST_CASE("arena: each model stands left in half of its battles, and meets every other one") {
  Rng rng{11};
  ArenaOptions options;
  options.random = [&rng] { return rng.next(); };
  ArenaServer server(models_of({{"a1", "x"}, {"b2", "y"}, {"c3", "z"}}), options);
  std::map<std::string, int> left, all, pairs;
  for (int i = 0; i < 1000; i++) {
    const OrderedJson battle = server.battle();
    const std::string l = battle["answers"][0]["text"], r = battle["answers"][1]["text"];
    left[l]++, all[l]++, all[r]++, pairs[std::min(l, r) + std::max(l, r)]++;
  }
  CHECK(all.size() == 3);
  for (const auto& [model, n] : all) {
    CHECK(std::fabs(left[model] - n / 2.) < 3 * std::sqrt(n * .25));
  }
  CHECK(pairs.size() == 3);
  for (const auto& [pair, n] : pairs) {
    CHECK(std::fabs(n - 1000 / 3.) < 3 * std::sqrt(1000 * 2 / 9.));
  }
}

TEST_CASE("arena: without a source of the test's, the system decides the sides") {
  ArenaServer server(two_models());
  std::set<std::string> left, names;
  for (int i = 0; i < 64; i++) {  // all on one side: once in 2^63 times
    const OrderedJson battle = server.battle();
    left.insert(battle["answers"][0]["text"]);
    names.insert(battle["battle"]), names.insert(battle["token"]);
    CHECK(std::string(battle["token"]).size() == 32);
  }
  CHECK(left.size() == 2);
  CHECK(names.size() == 128);
}

TEST_CASE("arena: an answer that names a model is marked as leaked") {
  const auto leaks = [](const std::string& text) {
    ArenaServer server(models_of({{"runs/demo/Harbour-7b", text}, {"pp", "Sheep graze there."}}));
    const bool leaked = server.vote(server.battle(), {{"vote", "tie"}})["leaked"];
    CHECK(server.votes().at(0).leaked == leaked);
    return leaked;
  };
  CHECK(leaks("I am HARBOUR, a model."));
  CHECK(leaks("runs/demo/harbour-7b"));
  CHECK(leaks("harbour"));
  CHECK(!leaks("All harbours are full."));
  CHECK(!leaks("In xharbour."));
  CHECK(!leaks("pp"));  // too short to be looked for
}

TEST_CASE("arena: the leaderboard is hidden from a voter until the tenth vote") {
  ArenaServer server(two_models());
  for (int i = 0; i < 10; i++) {
    CHECK(server.ok("leaderboard", {{"voter", "tester"}}) ==
          OrderedJson{{"hidden", true}, {"votes_left", 10 - i}});
    server.vote(server.battle(), {{"vote", "left"}});
  }
  CHECK(!server.ok("leaderboard", {{"voter", "tester"}}).contains("hidden"));
  CHECK(server.ok("leaderboard", {{"voter", "other"}})["votes_left"] == 10);
  CHECK(server.error_of("leaderboard", OrderedJson::object()) == "400 ");
}

TEST_CASE("arena: votes of known taste, cast over HTTP, give the models' strengths back") {
  const std::map<std::string, double> strengths{{"weak", 0}, {"middle", .5}, {"strong", 1}};
  constexpr double kLeftBias = .3, kTies = .15;
  Rng sides{3}, taste{4};
  ArenaOptions options;
  options.random = [&] { return sides.next(); };
  ArenaServer server(models_of({{"m-one", "middle"}, {"m-two", "weak"}, {"m-three", "strong"}}),
                     options);
  for (int i = 0; i < 300; i++) {
    const OrderedJson battle = server.battle();
    const double left = strengths.at(battle["answers"][0]["text"]);
    const double right = strengths.at(battle["answers"][1]["text"]);
    const bool tie = taste.uniform() < kTies;
    const bool prefers_left = taste.uniform() < 1 / (1 + std::exp(right - left - kLeftBias));
    server.vote(battle, {{"vote", tie ? "tie" : prefers_left ? "left" : "right"}});
  }
  const OrderedJson board = server.ok("leaderboard", {{"voter", "tester"}});
  INFO(board.dump());
  CHECK(board["votes"] == 300);
  REQUIRE(board["players"].size() == 3);
  const char* const order[] = {"m-three", "m-one", "m-two"};
  for (size_t i = 0; i < 3; i++) {
    const OrderedJson& player = board["players"][i];
    CHECK(player["model"] == order[i]);
    const double rating = 1000 + 400 / std::log(10.) * (.5 - .5 * double(i));
    CHECK(double(player["low"]) < rating);
    CHECK(double(player["high"]) > rating);
  }
  CHECK(double(board["left"]["bias_low"]) < kLeftBias);
  CHECK(double(board["left"]["bias_high"]) > kLeftBias);
}

// ---------------------------------------------------------------------------------------------
// Stop, and clients that leave

TEST_CASE("arena: stop ends both answers with what was shown of them") {
  std::vector<ServedModel> models =
      models_of({{"harbour", std::string(1500, 'h')}, {"meadow", std::string(1500, 'm')}});
  ArenaServer server(std::move(models));
  Connection connection(server.port);
  connection.write(http_post("/arena/battle", ArenaServer::question({{"stream", true}})));
  REQUIRE(connection.read_head().status == 200);
  EventReader events(connection);
  const OrderedJson battle = events.next()->json();
  std::vector<std::string> texts(2);
  OrderedJson done;
  while (const auto event = events.next()) {
    if (event->is_done()) break;
    const OrderedJson json = event->json();
    if (!json.contains("delta")) {
      done = json;
      continue;
    }
    if (texts[0].empty()) {
      CHECK(server.ok("stop", ArenaServer::ballot(battle, {})) == OrderedJson{{"stopped", true}});
    }
    for (size_t i = 0; i < 2; i++) texts[i] += std::string(json["delta"][i]);
  }
  CHECK(done == OrderedJson{{"done", {{{"finish", "stopped"}}, {{"finish", "stopped"}}}}});
  CHECK(texts[0].size() < 1500);
  CHECK(wait_until([&] { return server.engine->counts().running == 0; }));
  CHECK(server.ok("stop", ArenaServer::ballot(battle, {})) == OrderedJson{{"stopped", false}});
  server.vote(battle, {{"vote", "left"}});
  const Vote v = server.votes().at(0);
  for (size_t i = 0; i < 2; i++) {
    CHECK(v.answers[i].text == texts[i]);
    CHECK(v.answers[i].finish == "stopped");
  }
}

TEST_CASE("arena: a battle that is stopped before anything was shown has nothing to vote on") {
  std::vector<ServedModel> models = models_of({{"one", "The ferry."}, {"two", "The sheep."}});
  Gate gate(1);
  gpt_of(models[0]).on_token = [&](size_t i) { gate.hold(i); };
  ArenaServer server(std::move(models));
  gate.attach(server);
  Connection connection(server.port);
  connection.write(http_post("/arena/battle", ArenaServer::question({{"stream", true}})));
  REQUIRE(connection.read_head().status == 200);
  EventReader events(connection);
  const OrderedJson battle = events.next()->json();
  server.ok("stop", ArenaServer::ballot(battle, {}));
  CHECK(events.next()->json() == OrderedJson{{"same", true}});
  CHECK(events.next()->is_done());
  gate.allowed = 1000;
  CHECK(server.votes().empty());
}

TEST_CASE("arena: a client that leaves ends both calls, and the prompt comes again") {
  std::vector<ServedModel> models = models_of({{"one", std::string(1500, 'o')}, {"two", "t"}});
  for (ServedModel& m : models) {
    gpt_of(m).on_token = [](size_t) { std::this_thread::sleep_for(std::chrono::milliseconds(5)); };
  }
  gpt_of(models[1]).on_token = [](size_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  };
  const TempDir prompts;
  write_file(prompts / "p.jsonl", "{\"question\": \"Why?\"}\n");
  ArenaServer server(std::move(models), {.prompts = prompts / "p.jsonl"});
  OrderedJson body{{"voter", "tester"}};
  for (const bool streamed : {true, false}) {
    const int64_t before = server.engine->counts().cancelled;
    CHECK(server.arena->state()["prompts"] == 1);
    body["stream"] = streamed;
    Connection connection(server.port);
    connection.write(http_post("/arena/battle", body));
    REQUIRE(wait_until([&] { return server.engine->counts().running > 0; }));
    CHECK(server.arena->state()["prompts"] == 0);
    connection.reset();
    CHECK(wait_until([&] { return server.engine->counts().running == 0; }));
    CHECK(wait_until([&] { return server.engine->counts().cancelled > before; }));
    CHECK(wait_until([&] { return server.arena->state()["prompts"] == 1; }));
  }
  CHECK(server.votes().empty());
}

TEST_CASE("arena: sixty-four battles at once are all fought, at their own pace each") {
  ArenaServer server(two_models());
  std::atomic<int> whole{0};
  std::vector<std::thread> voters;
  for (int i = 0; i < 64; i++) {
    voters.emplace_back([&, i] {
      const OrderedJson question =
          ArenaServer::question({{"voter", concat("v", i)}, {"stream", true}});
      const Read r = read(ask_stream(server.port, http_post("/arena/battle", question)));
      const bool right = std::set(r.texts.begin(), r.texts.end()) ==
                         std::set<std::string>{"The ferry leaves at nine.", "Sheep graze there."};
      const OrderedJson ballot = ArenaServer::ballot(r.first, {{"vote", "tie"}});
      whole += right && ask(server.port, http_post("/arena/vote", ballot)).status == 200;
    });
  }
  for (std::thread& voter : voters) voter.join();
  CHECK(whole == 64);
  CHECK(server.votes().size() == 64);
}

TEST_CASE("arena: a full queue refuses a battle before its stream begins") {
  std::vector<ServedModel> models = two_models();
  std::atomic<bool> may_go_on{false};
  for (ServedModel& m : models) {
    gpt_of(m).on_token = [&](size_t) { hold_until([&] { return may_go_on.load(); }); };
  }
  ArenaServer server(std::move(models), {}, {.rows = 1, .queue = 1});
  std::vector<Connection> connections;
  for (int i = 0; i < 4; i++) {
    connections.emplace_back(server.port);
    connections.back().write(http_post("/arena/battle", ArenaServer::question()));
  }
  REQUIRE(wait_until([&] { return server.engine->counts().refused > 0; }));
  may_go_on = true;
  int fought = 0;
  for (Connection& c : connections) {
    const Reply reply = c.read_reply();
    CHECK((reply.status == 200 || reply.status == 503));
    fought += reply.status == 200;
  }
  CHECK(fought >= 1);
  CHECK(fought < 4);
  CHECK(wait_until([&] { return server.engine->counts().queued == 0; }));
  CHECK(server.battle()["answers"].size() == 2);
}

// ---------------------------------------------------------------------------------------------
// Prompts

TEST_CASE("arena: prompts of a file are shown once each, in an order of the seed") {
  const TempDir dir;
  std::string lines;
  for (int i = 0; i < 6; i++) lines += concat("{\"question\": \"Number ", i, "?\"}\n");
  lines += "{\"question\": \"Number 3?\"}\n";  // once is enough
  lines += "{\"prompt\": \"As text\"}\n";      // the user says it
  lines +=
      "{\"messages\": [{\"role\": \"system\", \"content\": \"S\"}, "
      "{\"role\": \"user\", \"content\": \"U\"}]}\n";
  lines += concat("{\"question\": \"", std::string(3000, 'x'), "\"}\n");  // no room for an answer
  write_file(dir / "p.jsonl", lines);
  const auto shown = [](ArenaServer& server) {
    return std::string(server.ok("battle", {{"voter", "v"}})["prompt"].back()["content"]);
  };
  const auto order_of = [&](uint64_t seed) {
    ArenaServer server(two_models(), {.prompts = dir / "p.jsonl", .seed = seed});
    CHECK(server.arena->state()["prompts"] == 8);
    std::vector<std::string> order;
    for (int i = 0; i < 8; i++) order.push_back(shown(server));
    CHECK(server.error_of("battle", {{"voter", "v"}}) == "404 no_prompts_left");
    CHECK(server.error_of("battle", ArenaServer::question()) == "200");  // one of their own
    return order;
  };
  const std::vector<std::string> first = order_of(1);
  CHECK(std::set(first.begin(), first.end()).size() == 8);
  CHECK(order_of(1) == first);
  CHECK(order_of(2) != first);

  ArenaServer server(two_models(), {.prompts = dir / "p.jsonl", .seed = 1});
  const OrderedJson bad{{"voter", "v"}, {"max_tokens", 100000}};
  CHECK(server.error_of("battle", bad) == "400 context_length_exceeded");
  CHECK(server.arena->state()["prompts"] == 8);  // a request that was wrong takes none
  OrderedJson battle = server.ok("battle", {{"voter", "v"}});
  CHECK(battle["prompt"].back()["content"] == first[0]);
  server.vote(battle, {{"vote", "left"}});
  CHECK(shown(server) == first[1]);  // without a vote
  server.restart();                  // those without a vote come again
  CHECK(server.arena->state()["prompts"] == 7);
  CHECK(shown(server) == first[1]);
  battle = server.ok("battle", {{"voter", "v"}});
  server.vote(battle, {{"vote", "left"}});
  server.ok("undo", ArenaServer::ballot(battle, {}));
  CHECK(server.arena->state()["prompts"] == 6);  // and so does that of a vote taken back
}

TEST_CASE("arena: prompts that are none are an error with their line") {
  const TempDir dir;
  const auto error_of = [&](const std::string& line) {
    write_file(dir / "p.jsonl", line + "\n");
    return cake::error_of([&] { ArenaServer server(two_models(), {.prompts = dir / "p.jsonl"}); });
  };
  CHECK(contains(error_of("{\"number\": 7}"), "p.jsonl:1"));
  CHECK(contains(error_of("{\"messages\": [{\"role\": \"user\", \"content\": \"U\"}, {\"role\": "
                          "\"assistant\", \"content\": \"A\"}]}"),
                 "p.jsonl:1"));
  CHECK(contains(error_of(concat("{\"question\": \"", std::string(3000, 'x'), "\"}")), "too long"));
}

// ---------------------------------------------------------------------------------------------
// What stays, and what is forgotten

TEST_CASE("arena: after a restart the votes are there, and battles without one are unknown") {
  ArenaServer server(two_models());
  const OrderedJson voted = server.battle(), open = server.battle();
  server.vote(voted, {{"vote", "left"}});
  server.restart();
  CHECK(server.votes().size() == 1);
  CHECK(server.error_of("vote", ArenaServer::ballot(open, {{"vote", "left"}})) ==
        "404 unknown_battle");
  CHECK(server.error_of("vote", ArenaServer::ballot(voted, {{"vote", "left"}})) ==
        "404 unknown_battle");
  CHECK(server.vote(server.battle(), {{"vote", "left"}})["votes"] == 2);
}

TEST_CASE("arena: battles that nobody votes on give way to newer ones") {
  ArenaOptions options;
  SUBCASE("by their number") { options.battles = 5; }
  SUBCASE("by their texts") { options.battle_bytes = 500; }
  ArenaServer server(two_models(), options);
  std::vector<OrderedJson> battles;
  for (int i = 0; i < 20; i++) battles.push_back(server.battle());
  int known = 0;
  for (const OrderedJson& battle : battles) {
    const OrderedJson ballot = ArenaServer::ballot(battle, {{"vote", "left"}});
    const std::string error = server.error_of("vote", ballot);
    CHECK((error == "200" || error == "404 unknown_battle"));
    known += error == "200";
    CHECK((known == 0 || error == "200"));  // the oldest are forgotten
  }
  CHECK(known >= 5);
  CHECK(known <= 8);
}

TEST_CASE("arena: where the vote does not fit on the disk it is refused, and the server lives") {
  ArenaServer server(two_models());
  server.vote(server.battle(), {{"vote", "left"}});
  const OrderedJson battle = server.battle();
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  const auto before = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit full{.rlim_cur = 1, .rlim_max = limit.rlim_max};
  setrlimit(RLIMIT_FSIZE, &full);
  const Reply reply = server.post("vote", ArenaServer::ballot(battle, {{"vote", "left"}}));
  setrlimit(RLIMIT_FSIZE, &limit);
  std::signal(SIGXFSZ, before);
  CHECK(reply.status == 507);
  CHECK(reply.json()["error"]["code"] == "not_stored");
  CHECK(reply.body.find("votes.db") == std::string::npos);
  CHECK(server.votes().size() == 1);
  CHECK(server.vote(battle, {{"vote", "left"}})["votes"] == 2);  // the vote can be cast again
}

TEST_CASE("arena: models that cannot compete are an error") {
  const auto error_of = [](std::vector<ServedModel> models, const std::string& mode) {
    return cake::error_of([&] { ArenaServer server(std::move(models), {.mode = mode}); });
  };
  CHECK(contains(error_of(models_of({{"one", "x"}}), "compare"), "--arena: found compare"));
  std::vector<ServedModel> base = two_models();
  for (ServedModel& m : base) m.text.chat.reset();
  CHECK(contains(error_of(std::move(base), "auto"), "no model that answers conversations"));
  std::vector<ServedModel> with_base = two_models();
  with_base[0].text.chat.reset();
  ArenaServer server(std::move(with_base));
  CHECK(server.arena->state()["mode"] == "collect");
  ArenaServer collecting(two_models(), {.mode = "collect"});
  CHECK(collecting.battle({{"answers", 2}})["same"] == true);
}

TEST_CASE("serve: --votes opens the arena, with and without /v1") {
  ScriptedModel scripted;
  ServeOptions options = serve_options("one=" + save_random_model(scripted, "one"));
  options.models.push_back("two=" + save_random_model(scripted, "two", 256, .2));
  {
    RunningServer server(options);
    CHECK(server.get("/props").json()["arena"].is_null());
    CHECK(server.post("/arena/battle", ArenaServer::question()).status == 404);
  }
  options.arena.votes = (scripted.dir() / "votes.db").string();
  RunningServer server(options);
  CHECK(server.get("/props").json()["arena"] ==
        OrderedJson{{"mode", "compare"}, {"answers", 2}, {"prompts", nullptr}});
  const OrderedJson question = ArenaServer::question({{"max_tokens", 8}});
  const OrderedJson battle = server.post("/v1/arena/battle", question).json();
  REQUIRE(battle["answers"].size() == 2);
  const Reply vote = server.post("/arena/vote", ArenaServer::ballot(battle, {{"vote", "left"}}));
  CHECK(vote.json()["models"].size() == 2);
}

}  // namespace
