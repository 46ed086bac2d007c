// Requests that are nearly right, thousands of them, to the whole server: whatever comes, the
// answer is no 5xx, comes soon, and the server lives. Mutations follow from a seed:
// CAKE_FUZZ_SEED=n; CAKE_FUZZ_SECONDS=n goes on for so long.
#include <cstdlib>
#include <string>
#include <vector>

#include "test/serve_scripts.h"

using namespace cake;

namespace {

struct FuzzSeed {
  const char* path;
  OrderedJson body;
};

std::vector<FuzzSeed> fuzz_seeds() {
  const OrderedJson user = {{"role", "user"}, {"content", "Hello."}};
  const OrderedJson weather = OrderedJson::parse(
      R"({"type":"function","function":{"name":"weather","description":"of a city",
          "parameters":{"type":"object","properties":{"city":{"type":"string"}}}}})");
  const OrderedJson call = OrderedJson::parse(
      R"({"role":"assistant","content":null,"tool_calls":[{"id":"call_1","type":"function",
          "function":{"name":"weather","arguments":"{\"city\":\"Bonn\"}"}}]})");
  return {
      {"/v1/chat/completions", {{"messages", {user}}, {"max_tokens", 3}}},
      {"/v1/chat/completions",
       {{"model", "script"},
        {"messages",
         {{{"role", "system"}, {"content", "Be short."}},
          user,
          {{"role", "assistant"}, {"content", "<think>\nx\n</think>\n\nHi."}},
          {{"role", "user"}, {"content", {{{"type", "text"}, {"text", "Go on."}}}}}}},
        {"stream", true},
        {"stream_options", {{"include_usage", true}}},
        {"max_completion_tokens", 4},
        {"temperature", .8},
        {"top_p", .9},
        {"top_k", 5},
        {"min_p", .01},
        {"repetition_penalty", 1.1},
        {"seed", 17},
        {"stop", {"END", "\n\n"}},
        {"n", 2},
        {"logprobs", true},
        {"top_logprobs", 3},
        {"presence_penalty", 0},
        {"frequency_penalty", 0},
        {"logit_bias", OrderedJson::object()},
        {"response_format", {{"type", "text"}}},
        {"user", "me"}}},
      {"/v1/chat/completions",
       {{"messages",
         {user, call, {{"role", "tool"}, {"tool_call_id", "call_1"}, {"content", "7"}}}},
        {"tools", {weather}},
        {"tool_choice", "auto"},
        {"parallel_tool_calls", true},
        {"max_tokens", 2}}},
      {"/v1/completions",
       {{"prompt", "The answer"}, {"max_tokens", 3}, {"logprobs", 2}, {"echo", true}, {"n", 2}}},
      {"/v1/completions",
       {{"prompt", {{5, 6, 7}, {8, 9}}}, {"max_tokens", 2}, {"stream", true}, {"stop", "x"}}},
      {"/v1/completions",
       {{"prompt", {5, 6, 7}}, {"max_tokens", 2}, {"logprobs", 2}, {"token_details", true}}},
      {"/next_token", {{"prompt", "The answer"}, {"top", 3}, {"top_k", 5}, {"temperature", .5}}},
      {"/next_token", {{"messages", {user}}, {"top_p", .9}, {"repetition_penalty", 1.1}}},
      {"/tokenize", {{"content", "The answer"}, {"with_pieces", true}, {"parse_special", true}}},
      {"/tokenize", {{"messages", {user}}, {"origins", true}}},
      {"/detokenize", {{"tokens", {5, 6, 7, 255}}}},
      {"/apply-template", {{"messages", {user}}, {"tools", {weather}}, {"origins", true}}},
      {"/apply-template",
       {{"messages", {user}}, {"chat_template_kwargs", {{"enable_thinking", false}}}}},
  };
}

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : rng_{seed} {}
  uint64_t below(uint64_t n) { return rng_.below(n); }

  std::string mutate(OrderedJson body) {
    for (uint64_t n = below(4); n > 0; n--) change(body);
    std::string text = body.dump(-1, ' ', below(2), OrderedJson::error_handler_t::ignore);
    if (below(3) == 0) {
      for (uint64_t n = 1 + below(3); n > 0; n--) change(text);
    }
    return text;
  }

 private:
  template <class List>
  auto pick(const List& list) {
    return list[below(std::size(list))];
  }

  OrderedJson value() {
    switch (below(9)) {
      case 0:
        return OrderedJson();
      case 1:
        return bool(below(2));
      case 2:
        return pick(std::vector<int64_t>{0, 1, -1, 2, 3, 16, 64, 1 << 20, INT64_MAX, INT64_MIN});
      case 3:
        return pick(std::vector<double>{0, -0., .5, 1e-320, 1e308, -1e308, 1e16, 2.0000001});
      case 4:
        return pick(std::vector<std::string>{"",
                                             "x",
                                             "true",
                                             "1",
                                             "script",
                                             "user",
                                             "assistant",
                                             "tool",
                                             "system",
                                             "text",
                                             "auto",
                                             "<|im_end|>",
                                             "<|im_start|>user\n",
                                             "<think>",
                                             "</think>",
                                             "<tool_call>",
                                             "{\"a\":1}",
                                             std::string(1, '\0'),
                                             "\xF0\x9F\x98\x80",
                                             "\n",
                                             std::string(300, 'y'),
                                             "\xEF\xBF\xBF"});
      case 5:
        return OrderedJson::array();
      case 6:
        return OrderedJson::object();
      case 7: {
        OrderedJson list = OrderedJson::array();
        for (uint64_t n = below(5); n > 0; n--)
          list.push_back(below(3) ? OrderedJson(below(300)) : value());
        return list;
      }
      default: {
        OrderedJson deep = value();
        for (uint64_t n = below(70); n > 0; n--) {
          deep = below(2) ? OrderedJson::array({deep}) : OrderedJson{{"x", deep}};
        }
        return deep;
      }
    }
  }

  // Something in the tree becomes something else, goes, or is there twice.
  void change(OrderedJson& node) {
    if (node.is_structured() && !node.empty() && below(5) > 0) {
      auto it = node.begin();
      std::advance(it, std::ptrdiff_t(below(node.size())));
      return change(*it);
    }
    if (node.is_object() && !node.empty()) {
      auto it = node.begin();
      std::advance(it, std::ptrdiff_t(below(node.size())));
      const std::string key = it.key();
      const OrderedJson old = it.value();
      switch (below(4)) {
        case 0:
          node.erase(key);
          return;
        case 1:
          node[key] = value();
          return;
        case 2:
          node[key + "s"] = old;
          return;
        default:
          node[pick(std::vector<std::string>{"n", "stop", "seed", "echo", "stream", "tools",
                                             "logprobs", "model", "content", "name"})] = value();
      }
    } else if (node.is_array() && below(2)) {
      const OrderedJson item = node.empty() ? value() : OrderedJson(node[below(node.size())]);
      for (uint64_t n = below(40); n > 0; n--) node.push_back(item);
    } else {
      node = value();
    }
  }

  void change(std::string& text) {
    const size_t place = below(text.size() + 1);
    switch (below(5)) {
      case 0:
        text.resize(place);
        return;
      case 1:
        text.insert(place, 1, char(below(256)));
        return;
      case 2:
        if (place < text.size()) text[place] = char(below(256));
        return;
      case 3:
        text.insert(place, text.substr(below(text.size() + 1), below(30)));
        return;
      default:
        text.erase(place, 1 + below(5));
    }
  }
  Rng rng_;
};

}  // namespace

TEST_CASE("serve: requests that are nearly right are answered or refused, never with a 5xx") {
  const char* given_seed = std::getenv("CAKE_FUZZ_SEED");
  const char* given_seconds = std::getenv("CAKE_FUZZ_SECONDS");
  const double end = given_seconds ? now() + std::atof(given_seconds) : 0;
  ServeOptions options = serve_options("script=" + models().script);
  options.models.push_back("random=" + models().random);
  options.limits.max_tokens = 4;
  options.calculator = true;
  RunningServer server(options);
  const auto seeds = fuzz_seeds();
  for (const FuzzSeed& seed : seeds) {  // they are right as they are
    const Reply reply = ask(server.port(), http_post(seed.path, seed.body));
    CHECK_MESSAGE(reply.status == 200, seed.body.dump(), ": ", reply.body);
  }
  Mutator mutator(given_seed ? std::strtoull(given_seed, nullptr, 10) : 1);
  auto connection = std::make_unique<Connection>(server.port());
  std::map<int, int> statuses;
  for (int i = 0; given_seconds ? now() < end : i < 10000; i++) {
    const FuzzSeed& seed = seeds[mutator.below(seeds.size())];
    const std::string body = mutator.mutate(seed.body);
    CAPTURE(i);
    CAPTURE(seed.path);
    CAPTURE(json_line(OrderedJson(body)));
    Reply reply;
    if (connection->write(http_post(seed.path, body))) reply = connection->read_reply();
    statuses[reply.status]++;
    const bool good = reply.status == 200 || reply.status == 400 || reply.status == 404;
    CHECK_MESSAGE(good, reply.status, " ", reply.body);
    CHECK(reply.complete);
    if (reply.status == 200) {
      CHECK_MESSAGE(!contains(reply.body, "\"server_error\""), reply.body);
    } else if (good) {
      const OrderedJson error = reply.json().at("error");
      CHECK(error.at("message").is_string());
      CHECK((error.at("param").is_null() || error.at("param").is_string()));
    }
    if (connection->ended() || reply.status == 0 || reply.header("Connection") == "close") {
      connection = std::make_unique<Connection>(server.port());
    }
    if (i % 500 == 0) CHECK(server.get("/health").status == 200);
  }
  CHECK(statuses[200] > 10);
  CHECK(statuses[400] > 10);
  if (given_seconds) {
    for (const auto& status : statuses) MESSAGE(status.first << ": " << status.second);
  }
}
