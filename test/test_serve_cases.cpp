// What users of other servers ran into, as public bug reports tell it, on ./serve from end to end:
// real sockets, exact expectations. Each test states what is right; a comment may name the report.
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "test/chatml.h"
#include "test/serve_scripts.h"

using namespace cake;

namespace {

OrderedJson completion(const OrderedJson& prompt, int max_tokens) {
  return {{"prompt", prompt}, {"max_tokens", max_tokens}, {"temperature", 0}};
}

// An error as OpenAI's clients read it: an object with a string message.
void check_error(const Reply& reply, int status, const std::string& param = "") {
  CAPTURE(reply.head);
  CAPTURE(reply.body);
  CHECK(reply.status == status);
  CHECK(reply.header("Content-Type") == "application/json");
  const OrderedJson json = reply.json();  // fails unless it is valid UTF-8
  REQUIRE(json.contains("error"));
  const OrderedJson& error = json.at("error");
  CHECK((error.at("message").is_string() && !error.at("message").get<std::string>().empty()));
  CHECK(error.at("type").is_string());
  CHECK((error.at("param").is_string() || error.at("param").is_null()));
  CHECK((error.at("code").is_string() || error.at("code").is_null()));
  if (!param.empty()) CHECK(error.at("param") == param);
}

int64_t running(RunningServer& server) { return int64_t(server.metric("cake_requests_running")); }
int64_t queued(RunningServer& server) { return int64_t(server.metric("cake_requests_queued")); }
int64_t cancelled(RunningServer& server) {
  return int64_t(server.metric("cake_requests_cancelled_total"));
}

size_t entries_of(const std::string& dir) {
  size_t n = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(dir)) n++;
  return n;
}
size_t threads_of_process() { return entries_of("/proc/self/task"); }
size_t descriptors_of_process() { return entries_of("/proc/self/fd"); }

}  // namespace

// -------------------------------------------------------------------------------------------------
// Clients that leave

TEST_CASE("serve: a client that leaves while tokens come, streamed or not, ends the generation") {
  // llama.cpp#24496, #13262, ik_llama.cpp#1020
  RunningServer server(models().endless);
  for (const Way& way : kWays) {
    CAPTURE(way_name(way));
    const int64_t before = cancelled(server);
    const double generated = server.metric("cake_generated_tokens_total");
    OrderedJson body = {{"temperature", 0}, {"max_tokens", 3900}};
    if (way.chat) {
      body["messages"] = {{{"role", "user"}, {"content", "Go on."}}};
    } else {
      body["prompt"] = "Go on.";
    }
    body["stream"] = way.stream;
    Connection connection(server.port());
    connection.write(http_post(path_of(way), body));
    REQUIRE(wait_until([&] { return running(server) == 1; }));
    if (way.stream) {
      REQUIRE(connection.read_head().status == 200);
      EventReader events(connection);
      for (int i = 0; i < 5; i++) REQUIRE(events.next());
    }
    connection.reset();
    CHECK(wait_until([&] { return running(server) == 0; }));
    CHECK(cancelled(server) == before + 1);  // it did not run to its end
    CHECK(server.metric("cake_generated_tokens_total") < generated + 3900);
  }
}

TEST_CASE("serve: a client that leaves with a whole close, not a reset, is noticed too") {
  RunningServer server(models().endless);
  Connection connection(server.port());
  connection.write(http_post("/v1/completions", completion("Go on.", 3900)));
  REQUIRE(wait_until([&] { return running(server) == 1; }));
  connection.close();
  CHECK(wait_until([&] { return running(server) == 0; }));
  CHECK(cancelled(server) == 1);
}

TEST_CASE(
    "serve: a client that leaves while it is queued leaves the queue, and no other text changes") {
  // ik_llama.cpp#1929: one client's cancel ended another's generation
  ServeOptions options = serve_options(models().endless);
  options.engine.rows = 1;
  RunningServer server(options);
  OrderedJson body = completion("Go on.", 3900);
  body["stream"] = true;
  Connection first(server.port());
  first.write(http_post("/v1/completions", body));
  REQUIRE(wait_until([&] { return running(server) == 1; }));
  for (const bool stream : {false, true}) {
    Connection second(server.port());
    OrderedJson other = completion("And on.", 5);
    other["stream"] = stream;
    second.write(http_post("/v1/completions", other));
    REQUIRE(wait_until([&] { return queued(server) == 1; }));
    second.reset();
    CHECK(wait_until([&] { return queued(server) == 0; }));
  }
  CHECK(running(server) == 1);  // otherwise the first ended too soon for this test
  const SentAnswer answer = read_answer(first, {.chat = false, .stream = true}, body);
  REQUIRE(answer.choices.size() == 1);
  CHECK(answer.choices[0].text == std::string(3900, 'x'));
  CHECK(answer.choices[0].finish == "length");
  CHECK(cancelled(server) == 2);
}

TEST_CASE("serve: a client that leaves while its prompt is read ends the reading") {
  // llama.cpp#11720
  RunningServer server(models().endless);
  for (const bool stream : {false, true}) {
    CAPTURE(stream);
    const int64_t before = cancelled(server);
    // Many choices, so that none of them can have finished: rows are read one after the other.
    OrderedJson prompts = OrderedJson::array();
    for (int i = 0; i < 8; i++) {
      std::vector<int> prompt = models().prompt(4000);
      prompt[0] = models().tokenizer().encode(std::string(1, char('a' + i)))[0];
      prompts.push_back(prompt);
    }
    OrderedJson body = completion(prompts, 90);
    body["stream"] = stream;
    const double generated = server.metric("cake_generated_tokens_total");
    Connection connection(server.port());
    connection.write(http_post("/v1/completions", body));
    REQUIRE(wait_until([&] { return running(server) > 0; }));
    connection.reset();
    CHECK(wait_until([&] { return running(server) == 0 && queued(server) == 0; }));
    CHECK(cancelled(server) > before);
    CHECK(server.metric("cake_generated_tokens_total") < generated + 8 * 90);
  }
}

TEST_CASE("serve: after clients that left at every moment the next text is right") {
  RunningServer server(models().script);
  const std::string request =
      http_post("/v1/chat/completions",
                OrderedJson{{"messages", models().messages("merged")}, {"stream", true}});
  for (size_t sent = 1; sent <= request.size(); sent += sent < 120 ? 17 : 61) {
    Connection connection(server.port());
    connection.write(std::string_view(request).substr(0, sent));
    connection.reset();
  }
  for (int read = 0; read < 8; read++) {
    Connection connection(server.port());
    connection.write(request);
    for (int i = 0; i < read; i++) connection.receive(.01);
    connection.close();
  }
  CHECK(wait_until([&] { return running(server) == 0 && queued(server) == 0; }));
  check_next_text(server);
}

// -------------------------------------------------------------------------------------------------
// Bytes that are no UTF-8

TEST_CASE("serve: an answer cut inside of a character is valid UTF-8, the same in all four ways") {
  // llama.cpp#9195, #11738: the server ended with type_error.316
  RunningServer server(models().script);
  const std::string emoji = "\xF0\x9F\x98\x80", lost = "\xEF\xBF\xBD";
  const std::string expected[] = {"a",        "a" + lost,  "a" + lost,
                                  "a" + lost, "a" + emoji, "a" + emoji + "b"};
  for (const Way& way : kWays) {
    for (int n = 1; n <= 6; n++) {
      CAPTURE(way_name(way));
      CAPTURE(n);
      OrderedJson body = scripted_request(way, "emoji");
      body["max_tokens"] = n;
      const SentAnswer answer = answer_to(server.port(), way, body);
      REQUIRE_MESSAGE(answer.status == 200, answer.body);
      CHECK(answer.choices.at(0).text == expected[n - 1]);
      CHECK(answer.choices.at(0).finish == "length");
      CHECK(answer.usage.at("completion_tokens") == n);
    }
  }
}

TEST_CASE("serve: bytes that are no character become U+FFFD, the same in all four ways") {
  RunningServer server(models().script);
  const std::string lost = "\xEF\xBF\xBD";
  for (const Way& way : kWays) {
    CAPTURE(way_name(way));
    const SentAnswer answer = answer_to(server.port(), way, scripted_request(way, "broken"));
    REQUIRE_MESSAGE(answer.status == 200, answer.body);
    CHECK(answer.choices.at(0).text == "a" + lost + lost + "b" + lost);
  }
}

TEST_CASE("serve: a request that is no UTF-8 is refused, and its error is valid UTF-8") {
  // llama.cpp#14937, #6396: a prompt in GBK
  RunningServer server(models().script);
  const std::string gbk = "\xC4\xE3\xBA\xC3", lone = "\\ud800";
  for (const std::string& bad : {gbk, std::string("\xC3"), std::string("\xED\xA0\x80"), lone}) {
    CAPTURE(bad);
    for (const std::string path : {"/v1/completions", "/tokenize", "/v1/chat/completions"}) {
      const std::string key = path == "/tokenize" ? "content" : "prompt";
      check_error(ask(server.port(), http_post(path, "{\"" + key + "\":\"" + bad + "\"}")), 400);
      check_error(ask(server.port(), http_post(path, "{\"" + bad + "\":1}")), 400);
      check_error(ask(server.port(), http_post(path, bad)), 400);
    }
    check_error(
        ask(server.port(), http_post("/v1/chat/completions",
                                     R"({"messages":[{"role":"user","content":")" + bad + "\"}]}")),
        400);
  }
  check_next_text(server);
}

TEST_CASE("serve: an error that names bad bytes of a path or a header is valid UTF-8") {
  RunningServer server(models().script);
  for (const std::string path : {"/%ff%fe", "/v1/models/%ff", "/v1/models/%C3", "/\xff"}) {
    CAPTURE(path);
    const Reply reply = server.get(path);
    CHECK((reply.status == 404 || reply.status == 400));
    check_error(reply, reply.status);
  }
  check_error(server.get("/health", {{"Host", "\xff.example"}}), 403);
  check_error(server.get("/health", {{"Origin", "http://\xff\xfe"}}), 403);
}

TEST_CASE("serve: ids that are parts of characters are text of U+FFFD, and make prompts") {
  RunningServer server(models().script);
  const auto ids = models().bytes_of("a\xF0\x9F\x98\x80\xF0\x9F");
  const Reply reply = server.post("/detokenize", {{"tokens", ids}});
  REQUIRE_MESSAGE(reply.status == 200, reply.body);
  CHECK(reply.json().at("content") == "a\xF0\x9F\x98\x80\xEF\xBF\xBD");
  const Reply echo =
      server.post("/v1/completions", {{"prompt", ids}, {"max_tokens", 1}, {"echo", true}});
  REQUIRE_MESSAGE(echo.status == 200, echo.body);
  CHECK(
      echo.json().at("choices")[0].at("text").get<std::string>().starts_with("a\xF0\x9F\x98\x80"));
}

// -------------------------------------------------------------------------------------------------
// Bodies that are wrong

TEST_CASE("serve: deeply nested JSON is refused on every route") {
  // llama.cpp#27434: 3,000 brackets ended the process
  RunningServer server(models().script);
  for (const std::string path :
       {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/apply-template"}) {
    CAPTURE(path);
    for (const int n : {65, 3000, 100000}) {
      CAPTURE(n);
      const std::string open(size_t(n), '['), close(size_t(n), ']');
      check_error(ask(server.port(), http_post(path, open)), 400);
      check_error(ask(server.port(), http_post(path, open + close)), 400);
      check_error(ask(server.port(), http_post(path, "{\"x\":" + open + close + "}")), 400);
      std::string objects;
      for (int i = 0; i < n; i++) objects += "{\"x\":";
      check_error(ask(server.port(), http_post(path, objects)), 400);
    }
  }
  check_next_text(server);
}

TEST_CASE("serve: every known field of a wrong type or range is 400 and names the field") {
  // llamafile#160: "stream": "true" ended the server
  RunningServer server(models().script);
  const OrderedJson chat = {{"messages", {{{"role", "user"}, {"content", "x"}}}},
                            {"max_tokens", 1}};
  const OrderedJson text = {{"prompt", "x"}, {"max_tokens", 1}};
  const std::vector<OrderedJson> all = {"true", "1", 1.5, -7, 1e300, true, {1, "a"}, {{"a", 1}}};
  const auto others = [&](const std::vector<int>& good) {
    std::vector<OrderedJson> bad;
    for (size_t i = 0; i < all.size(); i++) {
      if (std::find(good.begin(), good.end(), int(i)) == good.end()) bad.push_back(all[i]);
    }
    return bad;
  };
  struct Field {
    std::string name;
    int where;              // 1: chat, 2: completions, 3: both
    std::vector<int> good;  // indices in `all` that are right
  };
  const Field fields[] = {{"model", 3, {0, 1}},
                          {"messages", 1, {}},
                          {"prompt", 2, {0, 1}},
                          {"stream", 3, {5}},
                          {"stream_options", 3, {7}},
                          {"max_tokens", 3, {}},
                          {"max_completion_tokens", 1, {}},
                          {"temperature", 3, {2}},
                          {"top_p", 3, {}},
                          {"top_k", 3, {}},
                          {"min_p", 3, {}},
                          {"repetition_penalty", 3, {2}},
                          {"seed", 3, {3}},
                          {"stop", 3, {0, 1}},
                          {"n", 3, {}},
                          {"top_logprobs", 1, {}},
                          {"logprobs", 1, {5}},
                          {"logprobs", 2, {}},
                          {"parallel_tool_calls", 1, {5}},
                          {"suffix", 2, {}},
                          {"presence_penalty", 3, {2}},
                          {"frequency_penalty", 3, {2}},
                          {"logit_bias", 3, {}},
                          {"response_format", 1, {}},
                          {"tools", 1, {}},
                          {"tool_choice", 1, {}},
                          {"echo", 2, {5}}};
  Connection connection(server.port());
  for (const Field& field : fields) {
    for (const int chat_or_text : {1, 2}) {
      if (!(field.where & chat_or_text)) continue;
      for (const OrderedJson& value : others(field.good)) {
        if (field.name == "model" && value.is_string()) continue;
        OrderedJson body = chat_or_text == 1 ? chat : text;
        body[field.name] = value;
        CAPTURE(body.dump());
        const char* path = chat_or_text == 1 ? "/v1/chat/completions" : "/v1/completions";
        const Reply reply = connection.ask(http_post(path, body));
        REQUIRE_MESSAGE(reply.status == 400, reply.body);
        check_error(reply, 400);
        const OrderedJson param = reply.json().at("error").at("param");
        CHECK_MESSAGE((param.is_string() && param.get<std::string>().starts_with(field.name)),
                      reply.body);
      }
    }
  }
}

TEST_CASE("serve: messages of any other shape are 400, never a crash") {
  RunningServer server(models().script);
  Connection connection(server.port());
  for (const char* messages :
       {"null",
        "[]",
        "{}",
        "\"x\"",
        "5",
        "[null]",
        "[5]",
        "[[]]",
        "[{}]",
        R"(["x"])",
        R"([{"role":"user"}])",
        R"([{"content":"x"}])",
        R"([{"role":null,"content":"x"}])",
        R"([{"role":5,"content":"x"}])",
        R"([{"role":"king","content":"x"}])",
        R"([{"role":"user","content":5}])",
        R"([{"role":"user","content":{}}])",
        R"([{"role":"user","content":[5]}])",
        R"([{"role":"user","content":[{}]}])",
        R"([{"role":"user","content":[{"type":"text"}]}])",
        R"([{"role":"user","content":[{"type":"text","text":5}]}])",
        R"([{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:,"}}]}])",
        R"([{"role":"user","content":"x"},5])",
        R"([{"role":"assistant","content":"x"},{"role":"assistant","content":"y"}])"}) {
    CAPTURE(messages);
    const Reply reply = connection.ask(
        http_post("/v1/chat/completions", concat(R"({"max_tokens":1,"messages":)", messages, "}")));
    check_error(reply, 400);
    const OrderedJson param = reply.json().at("error").at("param");
    CHECK_MESSAGE((param.is_string() && param.get<std::string>().starts_with("messages")),
                  reply.body);
  }
}

TEST_CASE("serve: messages with empty, null or divided contents are accepted") {
  // vllm#21089, lmstudio#2, #261
  RunningServer server(models().script);
  for (
      const char* messages :
      {R"([{"role":"user","content":"x"},{"role":"assistant","content":""},{"role":"user","content":"y"}])",
       R"([{"role":"user","content":"x"},{"role":"assistant","content":null},{"role":"user","content":"y"}])",
       R"([{"role":"system","content":""},{"role":"user","content":"x"}])",
       R"([{"role":"developer","content":"x"},{"role":"user","content":"x"}])",
       R"([{"role":"user","content":""}])",
       R"([{"role":"user","name":"a","content":[{"type":"text","text":"x","cache_control":{}},{"type":"text","text":"y"}]}])"}) {
    const Reply reply = ask(
        server.port(),
        http_post("/v1/chat/completions", concat(R"({"max_tokens":2,"messages":)", messages, "}")));
    CHECK_MESSAGE(reply.status == 200, messages, ": ", reply.body);
  }
}

// -------------------------------------------------------------------------------------------------
// Stop strings

TEST_CASE(
    "serve: a stop string of 1 to 20 bytes ends the text before it, however it is tokenized") {
  // vllm#3574 (a part of it leaks), llama.cpp#10914 (text doubled), #13780 (in one endpoint only)
  RunningServer server(models().script);
  for (const char* name : {"merged", "bytes", "divided0", "divided1", "divided2"}) {
    for (const Way& way : kWays) {
      CAPTURE(name);
      CAPTURE(way_name(way));
      Rng rng{mix64(hash64(name), way.chat, way.stream)};
      for (size_t length = 1; length <= 20; length++) {
        // Whole characters: a stop string is JSON's text.
        size_t begin = rng.below(kSentence.size() - length);
        while ((kSentence[begin] & 0xC0) == 0x80) begin--;
        size_t end = begin + length;
        while (end < kSentence.size() && (kSentence[end] & 0xC0) == 0x80) end++;
        const std::string stop = kSentence.substr(begin, end - begin);
        CAPTURE(stop);
        OrderedJson body = scripted_request(way, name);
        body["stop"] =
            length % 2 ? OrderedJson(stop) : OrderedJson({"no such text", stop, "answers"});
        const SentAnswer answer = answer_to(server.port(), way, body);
        REQUIRE_MESSAGE(answer.status == 200, answer.body);
        CHECK(answer.choices.at(0).text == kSentence.substr(0, kSentence.find(stop)));
        CHECK(answer.choices.at(0).finish == "stop");
      }
    }
  }
}

TEST_CASE(
    "serve: text held back for a stop string comes out at the end of the turn and at the limit") {
  // llama.cpp#9867, #15007: it was lost
  RunningServer server(models().script);
  for (const Way& way : kWays) {
    CAPTURE(way_name(way));
    OrderedJson body = scripted_request(way, "held");  // "The answer is 4"
    body["stop"] = {"answer is 42", "4 is"};
    SentAnswer answer = answer_to(server.port(), way, body);
    REQUIRE_MESSAGE(answer.status == 200, answer.body);
    CHECK(answer.choices.at(0).text == "The answer is 4");
    CHECK(answer.choices.at(0).finish == "stop");
    for (int n = 1; n <= 15; n++) {
      body["max_tokens"] = n;
      answer = answer_to(server.port(), way, body);
      REQUIRE_MESSAGE(answer.status == 200, answer.body);
      CHECK(answer.choices.at(0).text == std::string("The answer is 4").substr(0, size_t(n)));
      CHECK(answer.choices.at(0).finish == "length");
      CHECK(answer.usage.at("completion_tokens") == n);
    }
  }
}

TEST_CASE(
    "serve: text that looks like a stop string's beginning again and again is neither lost nor "
    "doubled") {
  RunningServer server(models().endless);
  for (const Way& way : kWays) {
    CAPTURE(way_name(way));
    OrderedJson body = {{"temperature", 0}, {"max_tokens", 50}, {"stop", {"xxxxxxxy", "xxxxz"}}};
    if (way.chat) {
      body["messages"] = {{{"role", "user"}, {"content", "x"}}};
    } else {
      body["prompt"] = "x";
    }
    SentAnswer answer = answer_to(server.port(), way, body);
    REQUIRE_MESSAGE(answer.status == 200, answer.body);
    CHECK(answer.choices.at(0).text == std::string(50, 'x'));
    CHECK(answer.choices.at(0).finish == "length");
    body["stop"] = "xxx";
    answer = answer_to(server.port(), way, body);
    CHECK(answer.choices.at(0).text == "");
    CHECK(answer.choices.at(0).finish == "stop");
    CHECK(answer.usage.at("completion_tokens") == 3);
  }
}

// -------------------------------------------------------------------------------------------------
// The grammar of answers, and usage

TEST_CASE(
    "serve: for every pair of options the stream has the grammar of the API and the whole answer's "
    "content") {
  // ik_llama.cpp#467 (no [DONE]), litellm#10686 (no finish_reason beside logprobs)
  RunningServer server(models().random);
  const OrderedJson weather = OrderedJson::parse(
      R"([{"type":"function","function":{"name":"weather","parameters":{"type":"object"}}}])");
  const std::vector<OrderedJson> both = {{{"n", 3}},
                                         {{"stop", {"a", " is"}}},
                                         {{"max_tokens", 1}},
                                         {{"temperature", 0}},
                                         {{"top_k", 3}},
                                         {{"repetition_penalty", 1.5}},
                                         {{"presence_penalty", .5}},
                                         {{"seed", 99}},
                                         OrderedJson::object()};
  for (const bool chat : {true, false}) {
    std::vector<OrderedJson> options = both;
    if (chat) {
      options.push_back({{"logprobs", true}});
      options.push_back({{"logprobs", true}, {"top_logprobs", 2}});
      options.push_back({{"tools", weather}});
      options.push_back({{"logit_bias", models().without_markers()}});
    } else {
      options.push_back({{"logprobs", 0}});
      options.push_back({{"logprobs", 2}});
      options.push_back({{"echo", true}});
      options.push_back({{"prompt", {{5, 6, 7}, {8}}}});
      options.push_back({{"prompt", {"one", "two"}}});
    }
    Connection connection(server.port());
    for (size_t i = 0; i < options.size(); i++) {
      for (size_t j = 0; j <= i; j++) {
        OrderedJson body = {{"max_tokens", 12}, {"seed", 5}};
        if (chat) {
          body["messages"] = {{{"role", "user"}, {"content", "Say something."}}};
        } else {
          body["prompt"] = "Say something.";
        }
        body.update(options[i]), body.update(options[j]);
        CAPTURE(body.dump());
        SentAnswer answers[3];
        for (const int mode : {0, 1, 2}) {  // whole, streamed, streamed with usage
          body["stream"] = mode > 0;
          if (mode == 2) body["stream_options"] = {{"include_usage", true}};
          connection.write(http_post(chat ? "/v1/chat/completions" : "/v1/completions", body));
          answers[mode] = read_answer(connection, {chat, mode > 0}, body);
          REQUIRE_MESSAGE(answers[mode].status == 200, answers[mode].body);
        }
        CHECK(static_cast<const ApiAnswer&>(answers[0]) == answers[1]);
        CHECK(static_cast<const ApiAnswer&>(answers[0]) == answers[2]);
        for (const char* key : {"prompt_tokens", "completion_tokens", "total_tokens"}) {
          CHECK(answers[0].usage.at(key) == answers[2].usage.at(key));
        }
      }
    }
  }
}

TEST_CASE(
    "serve: usage is the same streamed and not, and counts every sampled token and the whole "
    "prompt") {
  // vllm-swift#19, llama-cpp-python#1640, sglang#954; ollama counted 0 for a cached prompt
  RunningServer server(models().script);
  for (int again = 0; again < 2; again++) {
    for (const Way& way : kWays) {
      CAPTURE(way_name(way));
      const SentAnswer answer = answer_to(server.port(), way, scripted_request(way, "bytes"));
      REQUIRE_MESSAGE(answer.status == 200, answer.body);
      REQUIRE(answer.usage.is_object());
      const int prompt = models().prompts.at("bytes"), sampled = int(kSentence.size()) + 1;
      CHECK(answer.usage.at("prompt_tokens") == prompt);
      CHECK(answer.usage.at("completion_tokens") == sampled);  // the end of turn too
      CHECK(answer.usage.at("total_tokens") == prompt + sampled);
    }
  }
}

TEST_CASE(
    "serve: choices are empty in one chunk with usage if that was asked for, and never otherwise") {
  // gradio#11729, logfire#64, shell_gpt#457: clients read choices[0]
  RunningServer server(models().script);
  for (const bool chat : {true, false}) {
    const Way way{chat, true};
    for (const OrderedJson& options : {OrderedJson(), OrderedJson{{"include_usage", false}},
                                       OrderedJson{{"include_usage", true}}}) {
      OrderedJson body = scripted_request(way, "merged");
      if (!options.is_null()) body["stream_options"] = options;
      const bool asked = !options.is_null() && options.at("include_usage") == true;
      CAPTURE(body.dump());
      const StreamedReply stream = server.stream(path_of(way), body);
      REQUIRE_MESSAGE(stream.reply.status == 200, stream.reply.body);
      REQUIRE(stream.done());
      const auto chunks = stream.chunks();
      for (size_t i = 0; i < chunks.size(); i++) {
        const bool last = i + 1 == chunks.size();
        CHECK(chunks[i].at("choices").empty() == (asked && last));
        CHECK(chunks[i].contains("usage") == asked);
        if (asked) CHECK(chunks[i].at("usage").is_null() != last);
      }
    }
  }
}

// -------------------------------------------------------------------------------------------------
// Log-probabilities: beside the engine's own logits

namespace {

// The model's distribution after each of the ids: log-softmax in double, (ids, V).
std::vector<std::vector<double>> distributions(const std::string& dir, std::span<const int> ids) {
  const Config c = load_config_with_head(dir, Head::lm);
  const auto gpt = make_gpt(c, {.device = Device::cpu,
                                .mode = Mode::inference,
                                .decode = {1, int(ids.size()), int64_t(ids.size()) + kPage}});
  load_weights(dir, *gpt);
  const auto cache = gpt->make_cache(int64_t(ids.size()) + kPage, CacheType::automatic);
  const int sequence = cache->create();
  std::vector<std::vector<double>> all;
  for (const int& id : ids) {
    DecodeRow row{.sequence = sequence, .tokens = {&id, 1}};
    row.sampling.temperature = 0;
    DecodeResult result;
    gpt->decode(*cache, {&row, 1}, result, true);
    std::vector<double> logits(result.logits.begin(), result.logits.begin() + c.V);
    const double highest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const double x : logits) sum += std::exp(x - highest);
    for (double& x : logits) x -= highest + std::log(sum);
    all.push_back(std::move(logits));
  }
  return all;
}

// The id of a token by its bytes.
std::map<std::string, int> ids_by_bytes(const Tokenizer& tokenizer) {
  std::map<std::string, int> ids;
  for (int id = 0; id < tokenizer.vocab_size(); id++) {
    ids.emplace(std::string(tokenizer.token_bytes(id)), id);
  }
  return ids;
}

std::string bytes_of_entry(const OrderedJson& entry) {
  std::string bytes;
  for (const OrderedJson& byte : entry.at("bytes")) bytes += char(byte.get<int>());
  return bytes;
}

std::vector<int> chat_ids(const OrderedJson& messages) {
  Conversation c;
  for (const OrderedJson& m : messages) {
    c.messages.push_back({.role = m.at("role"), .content = m.at("content")});
  }
  return chatml(models().tokenizer(), c, true).ids;
}

}  // namespace

TEST_CASE("serve: logprobs of a chat are the model's own, in order, and their bytes are the text") {
  // llama-cpp-python#349, llama.cpp#7125, #7197 (wrong numbers), #10783 (probabilities)
  RunningServer server(models().random);
  const OrderedJson messages = {{{"role", "user"}, {"content", "Say something."}}};
  const auto by_bytes = ids_by_bytes(models().tokenizer());
  for (const double temperature : {0., .7, 1.5}) {
    CAPTURE(temperature);
    const OrderedJson body = {
        {"messages", messages}, {"max_tokens", 40},   {"seed", 3},   {"temperature", temperature},
        {"logprobs", true},     {"top_logprobs", 20}, {"top_p", .9}, {"repetition_penalty", 1.3}};
    const SentAnswer whole = answer_to(server.port(), {true, false}, body);
    const SentAnswer streamed = answer_to(server.port(), {true, true}, body);
    REQUIRE_MESSAGE(whole.status == 200, whole.body);
    CHECK(whole.choices == streamed.choices);
    const ApiChoice& choice = whole.choices.at(0);
    REQUIRE(choice.entries.size() > 10);

    std::vector<int> ids = chat_ids(messages);
    const size_t n = ids.size();
    std::string bytes;
    for (const OrderedJson& entry : choice.entries) {
      const std::string token = bytes_of_entry(entry);
      bytes += token;
      REQUIRE(by_bytes.count(token));
      ids.push_back(by_bytes.at(token));
    }
    std::string text;
    Utf8Stream utf8;
    utf8.feed(bytes, text);
    utf8.finish(text);
    CHECK(text == choice.text);

    const auto expected = distributions(models().random, ids);
    for (size_t i = 0; i < choice.entries.size(); i++) {
      CAPTURE(i);
      const std::vector<double>& logp = expected[n + i - 1];
      double sum = 0;
      for (const double x : logp) sum += std::exp(x);
      CHECK(std::abs(sum - 1) < 1e-9);
      const OrderedJson& entry = choice.entries[i];
      CHECK(std::abs(entry.at("logprob").get<double>() - logp[size_t(ids[n + i])]) < 1e-5);
      const OrderedJson& top = entry.at("top_logprobs");
      REQUIRE(top.size() == 20);
      std::vector<double> sorted = logp;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      std::set<std::string> tokens;
      for (size_t k = 0; k < top.size(); k++) {
        const double found = top[k].at("logprob");
        CHECK(std::abs(found - sorted[k]) < 1e-5);
        const std::string token = bytes_of_entry(top[k]);
        tokens.insert(token);
        if (by_bytes.count(token)) CHECK(std::abs(found - logp[size_t(by_bytes.at(token))]) < 1e-5);
      }
      CHECK(tokens.size() == 20);
    }
  }
}

TEST_CASE("serve: logprobs of a completion have the same numbers as those of the chat it renders") {
  // llama.cpp#11346: null on /v1/completions; llama-cpp-python#197: not with stream
  RunningServer server(models().random);
  const OrderedJson messages = {{{"role", "user"}, {"content", "Say something."}}};
  OrderedJson body = {{"messages", messages},
                      {"max_tokens", 30},
                      {"seed", 5},
                      {"temperature", 1},
                      {"logprobs", true},
                      {"top_logprobs", 4},
                      {"logit_bias", models().without_markers()}};
  const SentAnswer chat = answer_to(server.port(), {true, false}, body);
  REQUIRE_MESSAGE(chat.status == 200, chat.body);
  body["stream"] = false;
  body.erase("messages"), body.erase("top_logprobs");
  body["prompt"] = chat_ids(messages);
  body["logprobs"] = 4;
  const Reply reply = server.post("/v1/completions", body);
  REQUIRE_MESSAGE(reply.status == 200, reply.body);
  const OrderedJson whole = reply.json().at("choices").at(0);
  CHECK(whole.at("text") == chat.choices.at(0).text);

  OrderedJson tokens = OrderedJson::array(), logps = tokens, tops = tokens, offsets = tokens;
  const StreamedReply stream = server.stream("/v1/completions", body);
  REQUIRE(stream.done());
  for (const OrderedJson& chunk : stream.chunks()) {
    const OrderedJson& l = chunk.at("choices").at(0).at("logprobs");
    if (l.is_null()) continue;
    for (const OrderedJson& x : l.at("tokens")) tokens.push_back(x);
    for (const OrderedJson& x : l.at("token_logprobs")) logps.push_back(x);
    for (const OrderedJson& x : l.at("top_logprobs")) tops.push_back(x);
    for (const OrderedJson& x : l.at("text_offset")) offsets.push_back(x);
  }
  const OrderedJson& l = whole.at("logprobs");
  CHECK(l.at("tokens") == tokens);
  CHECK(l.at("token_logprobs") == logps);
  CHECK(l.at("top_logprobs") == tops);
  CHECK(l.at("text_offset") == offsets);
  const OrderedJson& entries = chat.choices.at(0).entries;
  REQUIRE(entries.size() == tokens.size());
  for (size_t i = 0; i < entries.size(); i++) {
    CAPTURE(i);
    CHECK(entries[i].at("token") == tokens[i]);
    CHECK(entries[i].at("logprob") == logps[i]);
    for (const OrderedJson& top : entries[i].at("top_logprobs")) {
      const std::string token = top.at("token");
      REQUIRE(tops[i].contains(token));
      CHECK(tops[i].at(token) == top.at("logprob"));
    }
    CHECK(tops[i].contains(tokens[i].get<std::string>()));  // the sampled token is there
    CHECK(tops[i].size() <= 5);
  }
}

TEST_CASE("serve: a character of several tokens has keys that are distinct, and the right bytes") {
  // vllm#16540, #19177
  RunningServer server(models().script);
  const std::string expected =
      "a\xF0\x9F\x98\x80"
      "b";
  OrderedJson body = scripted_request({true, false}, "emoji");
  body["logprobs"] = true, body["top_logprobs"] = 20;
  const SentAnswer answer = answer_to(server.port(), {true, false}, body);
  REQUIRE_MESSAGE(answer.status == 200, answer.body);
  CHECK(answer.choices.at(0).text == expected);
  const OrderedJson& entries = answer.choices.at(0).entries;
  REQUIRE(entries.size() == expected.size());
  for (size_t i = 0; i < expected.size(); i++) {
    CHECK(bytes_of_entry(entries[i]) == expected.substr(i, 1));
    std::set<std::string> keys;
    for (const OrderedJson& top : entries[i].at("top_logprobs")) keys.insert(top.at("token"));
    CHECK(keys.size() == 20);
  }
  CHECK(entries[1].at("token") == "bytes:\\xf0");
  CHECK(entries[4].at("token") == "bytes:\\x80");

  body = scripted_request({false, false}, "emoji");
  body["logprobs"] = 20;
  const Reply reply = server.post("/v1/completions", body);
  REQUIRE_MESSAGE(reply.status == 200, reply.body);
  const OrderedJson l = reply.json().at("choices").at(0).at("logprobs");
  REQUIRE(l.at("tokens").size() == expected.size());
  CHECK(l.at("tokens")[1] == "bytes:\\xf0");
  for (const OrderedJson& top : l.at("top_logprobs")) CHECK(top.size() >= 20);
  // In characters, where the text of the token begins.
  CHECK(l.at("text_offset")[0] == 0);
  CHECK(l.at("text_offset")[1] == 1);
  CHECK(l.at("text_offset")[5] == 2);
}

TEST_CASE("serve: an echoed prompt has the log-probabilities that lm-eval reads") {
  // vllm#5334, #2703
  RunningServer server(models().random);
  const auto ids =
      models().tokenizer().encode("The answer is 17. user system assistant: the answer");
  const OrderedJson body = {{"prompt", ids}, {"temperature", 0}, {"max_tokens", 1},
                            {"logprobs", 1}, {"seed", 1234},     {"echo", true}};
  const auto expected = distributions(models().random, ids);
  for (int again = 0; again < 2; again++) {  // from the cache, too
    const Reply reply = server.post("/v1/completions", body);
    REQUIRE_MESSAGE(reply.status == 200, reply.body);
    const OrderedJson l = reply.json().at("choices").at(0).at("logprobs");
    const OrderedJson& logps = l.at("token_logprobs");
    REQUIRE(logps.size() == ids.size() + 1);
    REQUIRE(l.at("top_logprobs").size() == ids.size() + 1);
    REQUIRE(l.at("tokens").size() == ids.size() + 1);
    CHECK(logps[0].is_null());
    CHECK(l.at("top_logprobs")[0].is_null());
    double sum = 0, expected_sum = 0;
    for (size_t i = 1; i < ids.size(); i++) {
      CAPTURE(i);
      const double logp = logps[i], own = expected[i - 1][size_t(ids[i])];
      CHECK(std::abs(logp - own) < 1e-5);
      sum += logp, expected_sum += own;
      double highest = -1e9;
      for (const auto& top : l.at("top_logprobs")[i].items()) {
        highest = std::max(highest, top.value().get<double>());
      }
      const auto& row = expected[i - 1];
      const double likeliest = *std::max_element(row.begin(), row.end());
      CHECK(std::abs(highest - likeliest) < 1e-5);
      CHECK((highest == logp) == (likeliest == own));  // lm-eval compares for equality
    }
    CHECK(std::abs(sum - expected_sum) < 1e-4);
  }
}

TEST_CASE("serve: the scores of an echoed text add up to the loss that ./chat eval finds") {
  ServeOptions options = serve_options("test/golden/eval_model");
  options.chat_template.choice = "none";
  RunningServer server(options);
  std::istringstream lines(read_file("test/golden/eval_text.jsonl"));
  const TempDir dir;
  int documents = 0;
  for (std::string line; std::getline(lines, line);) {
    std::string text = Json::parse(line).at("text");
    if (text.size() > 150) text.resize(text.rfind(' ', 150));  // the context is 256 tokens
    const Reply reply = server.post("/v1/completions", {{"prompt", text},
                                                        {"echo", true},
                                                        {"max_tokens", 0},
                                                        {"logprobs", 1},
                                                        {"token_details", true}});
    REQUIRE_MESSAGE(reply.status == 200, reply.body);
    const OrderedJson choice = reply.json().at("choices")[0];
    CHECK(choice.at("text") == text);
    double nats = 0;
    int tokens = 0;
    for (const OrderedJson& entry : choice.at("logprobs").at("content")) {
      nats -= entry.at("logprob").get<double>();
      tokens++;
      const bool is_likeliest = entry.at("top_logprobs")[0].at("id") == entry.at("id");
      CHECK((entry.at("rank") == 1) == is_likeliest);
    }
    write_file(dir / "text.jsonl", Json{{"text", text}}.dump() + "\n");
    const std::string results = dir / "results.json";
    const Output out =
        shell(concat("./chat eval test/golden/eval_model --threads 1 --tasks ",
                     "bits_per_byte=", (dir / "text.jsonl").string(), " --json ", results));
    REQUIRE_MESSAGE(out.status == 0, out.text);
    const double bits = read_json(results)["bits_per_byte"]["value"].get<double>();
    const double loss = bits * std::log(2.) * double(text.size()) / tokens;
    CHECK(std::abs(nats / tokens - loss) < 1e-5 * loss);
    documents++;
  }
  CHECK(documents == 3);
}

// -------------------------------------------------------------------------------------------------
// The same seed gives the same text

namespace {

OrderedJson seeded(int seed, int max_tokens = 60) {
  return {{"messages", {{{"role", "user"}, {"content", "Say something."}}}},
          {"seed", seed},
          {"max_tokens", max_tokens},
          {"temperature", 1},
          {"logit_bias", models().without_markers()},
          {"logprobs", true},
          {"top_logprobs", 2}};
}

// The ids of a text as a prompt: documents begin with their separator.
std::vector<int> document_ids(const std::string& text) {
  std::vector<int> ids = {models().tokenizer().document_separator()};
  models().tokenizer().encode(text, ids);
  return ids;
}

// What the generator itself makes of a prompt, seed and number of a choice.
std::string generated(const std::string& dir, std::vector<int> prompt, uint64_t seed,
                      uint64_t choice, int max_new) {
  const Tokenizer& tokenizer = models().tokenizer();
  const Config c = load_config_with_head(dir, Head::lm);
  const GeneratorOptions options = options_for_one(c, int64_t(prompt.size()), max_new);
  const auto gpt =
      make_gpt(c, {.device = Device::cpu, .mode = Mode::inference, .decode = decode_plan(options)});
  load_weights(dir, *gpt);
  Generator generator(
      *gpt, [&](int id) { return tokenizer.token_bytes(id); }, options);
  Request request{.prompt = std::move(prompt), .max_new = max_new};
  request.sampling.seed = seed, request.sampling.stream = choice;
  request.sampling.vocab = tokenizer.vocab_size();
  const OrderedJson biases = models().without_markers();
  for (const auto& bias : biases.items()) {
    request.logit_bias.push_back({std::stoi(bias.key()), bias.value().get<float>()});
  }
  for (const char* name : {"<|im_end|>", "<|endoftext|>"}) {
    request.stop_ids.push_back(tokenizer.special(name));
  }
  const int number = generator.submit(std::move(request));
  generator.run();
  return generator.pop(number).text;
}

}  // namespace

TEST_CASE("serve: n = 4 gives four different texts, each of which its seed and number decide") {
  // llama-cpp-python#1906, lmdeploy#4419: n was ignored
  RunningServer server(models().random);
  OrderedJson body = seeded(11);
  const auto prompt = chat_ids(body.at("messages"));
  body["n"] = 4;
  for (const bool stream : {false, true}) {
    const SentAnswer answer = answer_to(server.port(), {true, stream}, body);
    REQUIRE_MESSAGE(answer.status == 200, answer.body);
    REQUIRE(answer.choices.size() == 4);
    std::set<std::string> texts;
    int sampled = 0;
    for (size_t i = 0; i < 4; i++) {
      CAPTURE(i);
      texts.insert(answer.choices[i].text);
      CHECK(answer.choices[i].text == generated(models().random, prompt, 11, i, 60));
      sampled += int(answer.choices[i].entries.size()) + (answer.choices[i].finish == "stop");
    }
    CHECK(texts.size() == 4);
    CHECK(answer.usage.at("prompt_tokens") == prompt.size());  // it is read once
    CHECK(answer.usage.at("completion_tokens") == sampled);
  }
  body["n"] = 1;
  CHECK(answer_to(server.port(), {true, false}, body).choices.at(0).text ==
        generated(models().random, prompt, 11, 0, 60));
}

TEST_CASE("serve: choices of several prompts come prompt by prompt, and n of each") {
  RunningServer server(models().random);
  const OrderedJson prompts = {"The answer", "user", "assistant is"};
  for (const bool stream : {false, true}) {
    const SentAnswer answer = answer_to(server.port(), {false, stream},
                                        {{"prompt", prompts},
                                         {"n", 2},
                                         {"seed", 2},
                                         {"max_tokens", 20},
                                         {"temperature", 1},
                                         {"logit_bias", models().without_markers()}});
    REQUIRE_MESSAGE(answer.status == 200, answer.body);
    REQUIRE(answer.choices.size() == 6);
    for (size_t i = 0; i < 6; i++) {
      CAPTURE(i);
      const auto ids = document_ids(prompts[i / 2]);
      CHECK(answer.choices[i].text == generated(models().random, ids, 2, i % 2, 20));
    }
  }
}

TEST_CASE(
    "serve: the same seed gives the same text beside 15 others, after a cache hit, streamed or "
    "not") {
  // llama.cpp#7381 (seed ignored), #7052, #6950 (by slot), #2838, #19981 (by cache)
  RunningServer server(models().random);
  const SentAnswer first = answer_to(server.port(), {true, false}, seeded(7));
  REQUIRE_MESSAGE(first.status == 200, first.body);
  REQUIRE(first.choices.at(0).text.size() > 20);
  const int64_t cached = server.metric("cake_reused_tokens_total");
  for (const bool stream : {false, true}) {
    CHECK(answer_to(server.port(), {true, stream}, seeded(7)).choices == first.choices);
  }
  CHECK(server.metric("cake_reused_tokens_total") > cached);

  std::vector<std::thread> threads;
  std::vector<SentAnswer> answers(16);
  for (size_t i = 0; i < 16; i++) {
    threads.emplace_back([&, i] {
      OrderedJson body = seeded(i % 4 == 0 ? 7 : int(100 + i));
      if (i % 4 == 1) body["messages"][0]["content"] = std::string(100, '?');
      try {
        Connection connection(server.port());
        const bool stream = i % 2 == 0;
        if (stream) body["stream"] = true;
        connection.write(http_post("/v1/chat/completions", body));
        answers[i] = read_answer(connection, {true, stream}, body);
      } catch (const std::exception& e) {
        answers[i].body = e.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::set<std::string> texts;
  for (size_t i = 0; i < 16; i++) {
    CAPTURE(i);
    REQUIRE_MESSAGE(answers[i].status == 200, answers[i].body);
    if (i % 4 == 0) CHECK(answers[i].choices == first.choices);
    texts.insert(answers[i].choices.at(0).text);
  }
  CHECK(texts.size() == 13);
}

TEST_CASE(
    "serve: the same seed gives the same text after its row gave up its cache and was read again") {
  ServeOptions options = serve_options(models().random);
  options.cache_mb = 1;
  RunningServer server(options);
  const OrderedJson body = {
      {"prompt", "The answer"}, {"n", 16},          {"seed", 1},
      {"max_tokens", 240},      {"temperature", 1}, {"logit_bias", models().without_markers()}};
  const SentAnswer answer = answer_to(server.port(), {false, false}, body);
  REQUIRE_MESSAGE(answer.status == 200, answer.body);
  REQUIRE(answer.choices.size() == 16);
  CHECK(server.metric("cake_preemptions_total") > 0);
  const auto ids = document_ids("The answer");
  for (size_t i = 0; i < 16; i++) {
    CAPTURE(i);
    CHECK(answer.choices[i].text == generated(models().random, ids, 1, i, 240));
  }
}

TEST_CASE("serve: without a seed two answers differ") {
  RunningServer server(models().random);
  OrderedJson body = seeded(0);
  body.erase("seed");
  const SentAnswer one = answer_to(server.port(), {true, false}, body);
  const SentAnswer two = answer_to(server.port(), {true, false}, body);
  REQUIRE_MESSAGE(one.status == 200, one.body);
  CHECK(one.choices.at(0).text != two.choices.at(0).text);
}

// -------------------------------------------------------------------------------------------------
// Lengths

TEST_CASE(
    "serve: a prompt of T - 1 tokens gives one token, and of T or T + 1 an error with both "
    "numbers") {
  // ollama#4967 (cut in silence), llama.cpp#19774 (500), lmstudio#2339 (an empty 200)
  RunningServer server(models().script);
  constexpr int T = 1024;
  for (const bool stream : {false, true}) {
    const Way way{false, stream};
    SentAnswer answer = answer_to(server.port(), way, completion(models().prompt(T - 1), 1));
    REQUIRE_MESSAGE(answer.status == 200, answer.body);
    CHECK(answer.choices.at(0).text == "x");
    CHECK(answer.choices.at(0).finish == "length");
    for (const auto& size : {std::pair(T - 1, 2), {T, 1}, {T + 1, 1}, {3 * T, 1}}) {
      const int n = size.first, max_tokens = size.second;
      CAPTURE(n);
      OrderedJson body = completion(models().prompt(n), max_tokens);
      body["stream"] = stream;
      const Reply reply = server.post("/v1/completions", body);
      check_error(reply, 400);
      const OrderedJson error = reply.json().at("error");
      CHECK(error.at("type") == "invalid_request_error");
      CHECK(error.at("code") == "context_length_exceeded");
      CHECK(error.at("n_prompt_tokens") == n);
      CHECK(error.at("n_ctx") == T);
      CHECK(contains(error.at("message"), std::to_string(n)));
      CHECK(contains(error.at("message"), std::to_string(T)));
    }
  }
  check_error(
      server.post("/v1/chat/completions",
                  {{"messages", {{{"role", "user"}, {"content", std::string(2000, '~')}}}}}),
      400);
}

TEST_CASE("serve: a model that never ends its turn is ended by the context, or by max_tokens") {
  // llama.cpp#6638, #3969, ollama#3918
  ServeOptions options = serve_options(models().endless);
  options.model.context = 300;
  RunningServer server(options);
  const OrderedJson chat = {{"messages", {{{"role", "user"}, {"content", "x"}}}}};
  for (const bool stream : {false, true}) {
    SentAnswer answer = answer_to(server.port(), {true, stream}, chat);
    REQUIRE_MESSAGE(answer.status == 200, answer.body);
    const int prompt = answer.usage.at("prompt_tokens");
    CHECK(answer.choices.at(0).text == std::string(size_t(300 - prompt), 'x'));
    CHECK(answer.choices.at(0).finish == "length");
    answer = answer_to(server.port(), {false, stream}, {{"prompt", "x"}, {"temperature", 0}});
    CHECK(answer.choices.at(0).text == std::string(16, 'x'));
    CHECK(answer.choices.at(0).finish == "length");
  }
}

TEST_CASE("serve: other streams go on while a prompt as long as the context is read") {
  // llama.cpp#29175: 8 to 31 s of silence; mlx-serve#205
  RunningServer server(models().endless);
  OrderedJson body = completion("Go on.", 4000);
  body["stream"] = true;
  Connection stream(server.port());
  stream.write(http_post("/v1/completions", body));
  REQUIRE(stream.read_head().status == 200);
  EventReader events(stream);
  REQUIRE(events.next());
  double sent = 0, answered = 0;
  std::thread other([&] {
    sent = now();
    const Reply reply = server.post("/v1/completions", completion(models().prompt(4000), 1));
    if (reply.status == 200) answered = now();
  });
  std::vector<std::pair<double, size_t>> arrivals;  // when, how many tokens
  while (const auto event = events.next()) {
    if (event->is_done()) break;
    const OrderedJson chunk = event->json();
    arrivals.emplace_back(event->time, chunk.at("choices")[0].at("text").get<std::string>().size());
  }
  other.join();
  REQUIRE(answered > 0);
  REQUIRE(arrivals.back().first > answered);  // it streamed all that time
  size_t meanwhile = 0;
  for (const auto& arrival : arrivals) {
    if (arrival.first > sent && arrival.first < answered) meanwhile += arrival.second;
  }
  CHECK(meanwhile >= 6);  // a token at least for each piece of the prompt
}

// -------------------------------------------------------------------------------------------------
// Many clients

TEST_CASE("serve: of 200 clients at once each gets its text or 503, and all is given back") {
  // mesh-llm#341: an unbounded queue; llama.cpp#5827: threads fewer than slots
  ServeOptions options = serve_options(models().script);
  options.engine.rows = 4, options.engine.queue = 40;
  RunningServer server(options);
  check_next_text(server);
  const size_t threads_before = threads_of_process(), descriptors_before = descriptors_of_process();
  std::atomic<int> good{0}, refused{0}, wrong{0};
  const auto count = [&](const Reply& reply, bool ends) {
    if (reply.status == 200 && reply.complete && ends) {
      good++;
    } else if (reply.status == 503 && reply.has("Retry-After") &&
               reply.json().at("error").at("code") == "queue_full") {
      refused++;
    } else {
      wrong++;
    }
  };
  std::vector<std::thread> clients;
  for (int i = 0; i < 200; i++) {
    clients.emplace_back([&, i] {
      const Way way = kWays[i % 4];
      try {
        OrderedJson body = scripted_request(way, "merged");
        body["stream"] = way.stream;
        Connection connection(server.port(), 60);
        connection.write(http_post(path_of(way), body));
        if (way.stream) {
          const StreamedReply stream = read_stream(connection);
          count(stream.reply, stream.done());
        } else {
          const Reply reply = connection.read_reply();
          count(reply, reply.body.ends_with("}"));
        }
      } catch (const std::exception& e) {
        wrong++;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  CHECK(wrong == 0);
  CHECK(good + refused == 200);
  CHECK(good >= 44);
  CHECK(wait_until([&] { return running(server) == 0 && queued(server) == 0; }));
  CHECK(wait_until([&] { return descriptors_of_process() <= descriptors_before + 1; }));
  CHECK(wait_until([&] { return threads_of_process() <= threads_before + 1; }));
  check_next_text(server);
}

TEST_CASE("serve: while every row streams all of them flow, and /health and /v1/models answer") {
  // cpp-httplib#2327, llama.cpp#5247
  RunningServer server(models().endless);
  std::vector<std::unique_ptr<Connection>> streams;
  std::vector<std::unique_ptr<EventReader>> readers;
  OrderedJson body = completion("Go on.", 4000);
  body["stream"] = true;
  for (int i = 0; i < 16; i++) {
    streams.push_back(std::make_unique<Connection>(server.port()));
    streams.back()->write(http_post("/v1/completions", body));
  }
  for (auto& stream : streams) REQUIRE(stream->read_head().status == 200);
  for (auto& stream : streams) readers.push_back(std::make_unique<EventReader>(*stream));
  for (int event = 0; event < 3; event++) {
    for (auto& reader : readers) REQUIRE(reader->next());
    CHECK(server.get("/health").status == 200);
    CHECK(server.get("/v1/models").status == 200);
    CHECK(server.post("/tokenize", {{"content", "The answer"}}).status == 200);
  }
  CHECK(running(server) == 16);
}

TEST_CASE(
    "serve: a client that reads nothing delays nobody, and costs a bounded amount of memory") {
  ServeOptions options = serve_options(models().endless);
  options.http.write_seconds = 1;
  RunningServer server(options);
  OrderedJson body = completion("Go on.", 4000);
  body["stream"] = true, body["logprobs"] = 20;  // some 2 KB a token
  std::vector<std::unique_ptr<Connection>> silent;
  for (int i = 0; i < 4; i++) {
    silent.push_back(std::make_unique<Connection>(server.port(), 30, 4096));
    silent.back()->write(http_post("/v1/completions", body));
  }
  REQUIRE(wait_until([&] { return running(server) == 4; }));
  const Reply reply = server.post("/v1/completions", completion("Go on.", 20));
  REQUIRE_MESSAGE(reply.status == 200, reply.body);
  CHECK(reply.json().at("choices")[0].at("text") == std::string(20, 'x'));
  CHECK(wait_until([&] { return running(server) == 0; }, 60));
}

TEST_CASE("serve: an answer may take longer than every limit of its connection") {
  // llama.cpp#18063, litellm#36024: long answers that are not streamed were cut
  ServeOptions options = serve_options(models().endless);
  options.http.request_seconds = .2, options.http.idle_seconds = .2,
  options.http.write_seconds = .2;
  RunningServer server(options);
  const double start = now();
  OrderedJson body = completion("Go on.", 3000);
  const Reply reply = server.post("/v1/completions", body);
  REQUIRE_MESSAGE(reply.status == 200, reply.body);
  CHECK(reply.json().at("choices")[0].at("text") == std::string(3000, 'x'));
  CHECK(now() - start > .2);  // otherwise nothing was tested
  Connection connection(server.port());
  body["stream"] = true;
  connection.write(http_post("/v1/completions", body));
  CHECK(read_answer(connection, {false, true}, body).choices.at(0).text == std::string(3000, 'x'));
}

// -------------------------------------------------------------------------------------------------
// HTTP as it should not be

TEST_CASE(
    "serve: nothing waits for seconds: bodies without a length, kept connections, 100-continue") {
  // cpp-httplib#2035, #523: 5 s for a POST without a length; #1422, #707, #1880
  RunningServer server(models().script);
  const std::string body = scripted_request({true, false}, "merged").dump();
  const auto quick = [&](const char* what, auto&& act) {
    CAPTURE(what);
    const double start = now();
    act();
    CHECK(now() - start < 4);
  };
  quick("no length", [&] {
    check_error(ask(server.port(), http_request("POST", "/v1/chat/completions")), 411);
  });
  quick("HTTP/1.0", [&] {
    Connection connection(server.port());
    connection.write("GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n");
    CHECK(connection.read_reply().status == 200);
    connection.read_all();  // it is closed
  });
  quick("HEAD", [&] {
    Connection connection(server.port());
    connection.write(http_request("HEAD", "/health"));
    const Reply reply = connection.read_reply(true);
    CHECK(reply.status == 200);
    connection.write(http_get("/health"));
    CHECK(connection.read_reply().status == 200);  // nothing stood between
  });
  quick("Expect", [&] {
    Connection connection(server.port());
    const std::string request =
        http_post("/v1/chat/completions", body, {{"Expect", "100-continue"}});
    const size_t head = request.find("\r\n\r\n") + 4;
    connection.write(std::string_view(request).substr(0, head));
    CHECK(wait_until(
        [&] {
          connection.receive(.1);
          return connection.held().starts_with("HTTP/1.1 100");
        },
        3));
    connection.write(std::string_view(request).substr(head));
    CHECK(connection.read_reply().json().at("choices")[0].at("message").at("content") == kSentence);
  });
  quick("100 requests on one connection", [&] {
    Connection connection(server.port());
    for (int i = 0; i < 100; i++) {
      REQUIRE(connection.write(http_get("/health")));
      REQUIRE(connection.read_reply().status == 200);
    }
  });
  quick("requests written at once", [&] {
    Connection connection(server.port());
    connection.write(http_get("/health") + http_post("/v1/chat/completions", body) +
                     http_get("/v1/models"));
    CHECK(connection.read_reply().json().at("status") == "ok");
    CHECK(connection.read_reply().json().at("choices")[0].at("message").at("content") == kSentence);
    CHECK(connection.read_reply().json().at("object") == "list");
  });
  quick("a half-closed client", [&] {
    Connection connection(server.port());
    connection.write(http_post("/tokenize", R"({"content":"x"})"));
    connection.half_close();
    CHECK(connection.read_reply().status == 200);
  });
  quick("connections closed without a word", [&] {
    for (int i = 0; i < 50; i++) Connection(server.port()).close();
    CHECK(server.get("/health").status == 200);
  });
}

TEST_CASE("serve: a request in pieces of any size is the same request") {
  RunningServer server(models().script);
  const std::string request =
      http_post("/v1/chat/completions", scripted_request({true, false}, "hello"));
  const auto check = [&](const std::function<void(Connection&)>& write) {
    Connection connection(server.port());
    write(connection);
    const Reply reply = connection.read_reply();
    REQUIRE_MESSAGE(reply.status == 200, reply.body);
    CHECK(reply.json().at("choices")[0].at("message").at("content") == "Hello.");
  };
  check([&](Connection& c) { c.write_slowly(request); });
  for (size_t cut = 1; cut < request.size(); cut += 7) {
    check([&](Connection& c) {
      c.write(std::string_view(request).substr(0, cut));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      c.write(std::string_view(request).substr(cut));
    });
  }
}

TEST_CASE("serve: heads and bodies beyond their limits are refused, and the server lives") {
  // CVE-2025-52887 (header lines), CVE-2025-53628, CVE-2026-45352 (negative chunk size)
  ServeOptions options = serve_options(models().script);
  options.http.request_seconds = 2;
  RunningServer server(options);
  const std::string host = "Host: localhost\r\n",
                    post = "POST /v1/chat/completions HTTP/1.1\r\n" + host;
  const auto refused = [&](const char* what, const std::string& bytes, std::vector<int> statuses) {
    CAPTURE(what);
    Connection connection(server.port());
    connection.write(bytes);
    const Reply reply = connection.read_head();
    CHECK_MESSAGE(std::find(statuses.begin(), statuses.end(), reply.status) != statuses.end(),
                  reply.head);
    CHECK(server.get("/health").status == 200);
    // What was not read is no second request.
    connection.half_close();
    const std::string rest = connection.read_all();
    CHECK(!contains(rest, "HTTP/1.1 200"));
  };
  std::string lines;
  for (int i = 0; i < 1000; i++) lines += concat("X-", i, ": y\r\n");
  // 0: closed without an answer, since the client still sends.
  refused("1,000 lines", "GET /health HTTP/1.1\r\n" + host + lines + lines + "\r\n", {431, 0});
  refused("a line of 8 MB", "GET /" + std::string(8 << 20, 'a') + " HTTP/1.1\r\n\r\n",
          {414, 431, 0});
  refused("a header of 1 MB",
          "GET /health HTTP/1.1\r\nX: " + std::string(1 << 20, 'a') + "\r\n\r\n", {431, 0});
  refused("a body of 2 MB", post + "Content-Length: 2000000\r\n\r\n" + std::string(2000000, ' '),
          {413, 0});
  refused("2 MB announced", post + "Content-Length: 2000000\r\n\r\n", {413});
  refused("a length of 2^64", post + "Content-Length: 18446744073709551616\r\n\r\n{}", {400, 413});
  refused("a negative length", post + "Content-Length: -1\r\n\r\n{}", {400, 411, 413});
  refused("no number", post + "Content-Length: 0x10\r\n\r\n{}", {400, 411});
  std::string chunks;
  for (int i = 0; i < 3000; i++) chunks += "400\r\n" + std::string(1024, ' ') + "\r\n";
  const std::string chunked = post + "Transfer-Encoding: chunked\r\n\r\n";
  refused("chunks without end", chunked + chunks, {400, 411, 413, 501, 0});
  refused("a negative chunk", chunked + "-2\r\nab\r\n0\r\n\r\n", {400, 411, 501});
  refused("a chunk of 2^64", chunked + "ffffffffffffffff\r\nab\r\n0\r\n\r\n", {400, 411, 413, 501});
  // Smuggling: what is the body and what the next request?
  const std::string inner = "GET /health HTTP/1.1\r\n" + host + "\r\n";
  refused("length and chunks",
          post + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner,
          {400, 411, 501});
  refused("two lengths",
          post + concat("Content-Length: 0\r\nContent-Length: ", inner.size(), "\r\n\r\n") + inner,
          {400});
  refused(
      "a body of a refused request",
      post + concat("Content-Encoding: gzip\r\nContent-Length: ", inner.size(), "\r\n\r\n") + inner,
      {415});
  // A zip bomb: a compressed body is not unpacked.
  const std::string bomb = deflated(std::string(50 << 20, ' '));
  refused(
      "a compressed body",
      post + concat("Content-Encoding: gzip\r\nContent-Length: ", bomb.size(), "\r\n\r\n") + bomb,
      {415});
  refused("half a request", "GET /health HT", {408, 400, 0});
  refused("a body that does not come", post + "Content-Length: 100\r\n\r\n{", {408, 400, 0});
  refused("no HTTP", "hello\r\n\r\n", {400});
  refused("TLS", std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 15), {400});
  check_next_text(server);
}

// -------------------------------------------------------------------------------------------------
// Web pages, names and keys

TEST_CASE("serve: a page of another origin is refused on every path, and gets no CORS header") {
  // llama.cpp#25606: any origin was allowed, with credentials
  RunningServer server(models().script);
  const std::string body = scripted_request({true, false}, "merged").dump();
  for (const char* origin : {"https://evil.example", "null", "http://localhost.evil.example",
                             "http://127.0.0.1.evil.example", "http://localhost:1", "file://"}) {
    for (const char* path : {"/v1/chat/completions", "/tokenize", "/health", "/nothing", "/"}) {
      CAPTURE(origin);
      CAPTURE(path);
      // A "simple" request, for which a browser asks nobody: text/plain.
      const Reply reply = ask(
          server.port(),
          http_request("POST", path, {{"Origin", origin}, {"Content-Type", "text/plain"}}, body));
      check_error(reply, 403);
      CHECK(!reply.has("Access-Control-Allow-Origin"));
      CHECK(contains(reply.json().at("error").at("message"), "--allow-origin"));
      const Reply preflight =
          ask(server.port(), http_request("OPTIONS", path,
                                          {{"Origin", origin},
                                           {"Access-Control-Request-Method", "POST"},
                                           {"Access-Control-Request-Headers", "content-type"}}));
      CHECK(!preflight.has("Access-Control-Allow-Origin"));
    }
  }
  const Reply site = server.post("/v1/chat/completions", OrderedJson::parse(body),
                                 {{"Sec-Fetch-Site", "cross-site"}});
  check_error(site, 403);
  const std::string own = concat("http://127.0.0.1:", server.port());
  CHECK(server
            .post("/v1/chat/completions", OrderedJson::parse(body),
                  {{"Origin", own}, {"Host", own.substr(7)}, {"Sec-Fetch-Site", "same-origin"}})
            .status == 200);
}

TEST_CASE("serve: a page of an allowed origin may send its key") {
  // ollama#4001: Authorization was missing in Access-Control-Allow-Headers
  ServeOptions options = serve_options(models().script);
  options.http.origins = {"https://chat.example"};
  RunningServer server(options);
  const Headers page = {{"Origin", "https://chat.example"}, {"Sec-Fetch-Site", "cross-site"}};
  Headers asking = page;
  asking.emplace_back("Access-Control-Request-Method", "POST");
  asking.emplace_back("Access-Control-Request-Headers", "authorization,content-type");
  const Reply preflight =
      ask(server.port(), http_request("OPTIONS", "/v1/chat/completions", asking));
  CHECK(preflight.status == 204);
  CHECK(preflight.header("Access-Control-Allow-Origin") == "https://chat.example");
  std::string allowed = preflight.header("Access-Control-Allow-Headers");
  std::transform(allowed.begin(), allowed.end(), allowed.begin(), ::tolower);
  CHECK(contains(allowed, "authorization"));
  CHECK(contains(allowed, "content-type"));
  CHECK(contains(preflight.header("Access-Control-Allow-Methods"), "POST"));
  CHECK(preflight.has("Access-Control-Max-Age"));
  CHECK(contains(preflight.header("Vary"), "Origin"));
  for (const bool stream : {false, true}) {
    OrderedJson body = scripted_request({true, false}, "hello");
    body["stream"] = stream;
    Connection connection(server.port());
    connection.write(http_post("/v1/chat/completions", body, page));
    const Reply reply = connection.read_head();
    CHECK(reply.status == 200);
    CHECK(reply.header("Access-Control-Allow-Origin") == "https://chat.example");
    CHECK(!reply.has("Access-Control-Allow-Credentials"));
  }
  // Errors too: otherwise the page cannot read them.
  const Reply bad = server.post("/v1/chat/completions", OrderedJson::object(), page);
  CHECK(bad.status == 400);
  CHECK(bad.header("Access-Control-Allow-Origin") == "https://chat.example");
  check_error(server.get("/health", {{"Origin", "https://evil.example"}}), 403);
  check_error(server.get("/health", {{"Origin", "http://chat.example"}}), 403);
}

TEST_CASE("serve: a name that was rebound to this computer is refused on every path") {
  // CVE-2024-28224
  RunningServer server(models().script);
  const std::string port = std::to_string(server.port());
  for (const char* path : {"/health", "/v1/models", "/nothing", "/", "/v1/chat/completions"}) {
    CAPTURE(path);
    for (const std::string& host :
         {std::string("evil.example"), "evil.example:" + port,
          std::string("localhost.evil.example"), std::string("localhost.evil"),
          std::string("127.0.0.1.nip.io"), std::string("127.0.0.1:1"), std::string("0.0.0.0"),
          "0.0.0.0:" + port, std::string("localhost@evil.example"),
          std::string("evil.example#localhost"), std::string("[::1].evil"), std::string("127.1"),
          std::string("localhost:"), std::string("localhost, evil")}) {
      CAPTURE(host);
      const Reply reply = server.get(path, {{"Host", host}});
      CHECK((reply.status == 403 || reply.status == 400));
      check_error(reply, reply.status);
      CHECK(server.post(path, OrderedJson::object(), {{"Host", host}}).status == reply.status);
    }
    const Reply none = ask(server.port(), std::string("GET ") + path + " HTTP/1.1\r\n\r\n");
    CHECK((none.status == 400 || none.status == 403));
    const Reply two = ask(server.port(), std::string("GET ") + path +
                                             " HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n");
    CHECK((two.status == 400 || two.status == 403));
    const Reply absolute = ask(server.port(), std::string("GET http://evil.example") + path +
                                                  " HTTP/1.1\r\nHost: localhost\r\n\r\n");
    CHECK(absolute.status >= 400);
  }
  for (const std::string& host : {std::string("localhost"), "LocalHost:" + port,
                                  "127.0.0.1:" + port, std::string("[::1]"), "[::1]:" + port}) {
    CAPTURE(host);
    CHECK(server.get("/health", {{"Host", host}}).status == 200);
  }
  ServeOptions options = serve_options(models().script);
  options.http.hosts = {"cake.example"};
  RunningServer other(options);
  CHECK(other.get("/health", {{"Host", "cake.example"}}).status == 200);
  CHECK(other.get("/health", {{"Host", "evil.example"}}).status == 403);
}

TEST_CASE("serve: nothing in a URL starts a generation") {
  // llama.cpp#25790: ?q= sent a prompt by itself
  RunningServer server(models().script);
  const double before = server.metric("cake_requests_total");
  for (const char* path :
       {"/?q=hello", "/?prompt=hello&send=1", "/v1/completions?prompt=hello&max_tokens=5",
        "/v1/chat/completions?messages=[]", "/completion?prompt=x"}) {
    CAPTURE(path);
    const Reply reply = server.get(path);
    CHECK((reply.status == 200 || reply.status == 404 || reply.status == 405));
    const Reply empty = ask(server.port(), http_request("POST", path, {}, ""));
    CHECK(empty.status >= 400);
    const Reply no_keys = server.post(path, OrderedJson::object());
    CHECK(no_keys.status >= 400);
  }
  CHECK(server.metric("cake_requests_total") == before);
}

TEST_CASE("serve: without its key no route but /health says anything") {
  // vllm#58144: other routes; LitServe#754: the key in the log
  ServeOptions options = serve_options(models().script);
  options.http.keys = {"sk-first-0123456789", "sk-second"};
  RunningServer server(options);
  const std::string body = scripted_request({true, false}, "hello").dump();
  const std::vector<Headers> bad = {{},
                                    {{"Authorization", "Bearer "}},
                                    {{"Authorization", "Bearer sk-first-012345678"}},
                                    {{"Authorization", "Bearer sk-first-0123456789x"}},
                                    {{"Authorization", "Bearer sk-first-0123456789, sk-second"}},
                                    {{"Authorization", "Basic sk-second"}},
                                    {{"Authorization", "sk-second"}},
                                    {{"Authorization", "Bearer SK-SECOND"}},
                                    {{"X-Api-Key", "sk-wrong"}},
                                    {{"Cookie", "key=sk-second"}}};
  for (const char* path : {"/v1/models",
                           "/v1/models/x",
                           "/v1/chat/completions",
                           "/v1/completions",
                           "/tokenize",
                           "/detokenize",
                           "/apply-template",
                           "/props",
                           "/metrics",
                           "/chat/completions",
                           "/completions",
                           "/models",
                           "/v1/chat/completions/",
                           "//v1/chat/completions",
                           "/V1/models",
                           "/v1/chat%2fcompletions",
                           "/health/../v1/models",
                           "/v1/health/../models",
                           "/nothing",
                           "/metrics?x",
                           "/health%2f..%2fmetrics"}) {
    CAPTURE(path);
    for (const Headers& headers : bad) {
      for (const char* method : {"GET", "POST", "HEAD", "PUT", "DELETE"}) {
        CAPTURE(method);
        const bool has_body = method[1] == 'O';
        Connection connection(server.port());
        connection.write(
            http_request(method, path, headers, has_body ? std::optional(body) : std::nullopt));
        const Reply reply = connection.read_reply(method == std::string("HEAD"));
        CHECK_MESSAGE(reply.status == 401, reply.head);
        CHECK(contains(reply.header("WWW-Authenticate"), "Bearer"));
        CHECK(!contains(reply.body, "sk-"));
      }
    }
  }
  check_error(server.get("/v1/models"), 401);
  CHECK(server.get("/health").status == 200);
  for (const char* key : {"Bearer sk-first-0123456789", "Bearer sk-second", "bearer sk-second"}) {
    const Headers headers = {{"Authorization", key}};
    CHECK(server.get("/v1/models", headers).status == 200);
    CHECK(server.post("/v1/chat/completions", OrderedJson::parse(body), headers).status == 200);
  }
  // Without keys, any key is accepted: some clients must send one (open-webui#3840).
  RunningServer open(models().script);
  CHECK(open.get("/v1/models", {{"Authorization", "Bearer anything"}}).status == 200);
}

TEST_CASE(
    "serve: to be reached from other computers it needs a key, or to be told that none is wanted") {
  ServeOptions options = serve_options(models().script);
  options.http.host = "0.0.0.0";
  const std::string error = error_of([&] { Server server(options); });
  CHECK_MESSAGE(contains(error, "--api-key-file"), error);
  options.http.no_key = true;
  CHECK(error_of([&] { RunningServer server(options); }) == "no error");
  options.http.no_key = false, options.http.keys = {"sk-x"};
  CHECK(error_of([&] { RunningServer server(options); }) == "no error");
}

TEST_CASE("serve: every error is an object with a string message, of the content type of JSON") {
  // vllm#12886, LightLLM#1259: a flat object
  ServeOptions options = serve_options(models().script);
  RunningServer server(options);
  check_error(server.get("/nothing"), 404);
  check_error(server.get("/v1/models/nothing"), 404);
  Reply reply = server.get("/v1/chat/completions");
  check_error(reply, 405);
  CHECK(contains(reply.header("Allow"), "POST"));
  reply = ask(server.port(), http_request("PUT", "/v1/models", {}, "{}"));
  check_error(reply, 405);
  CHECK(contains(reply.header("Allow"), "GET"));
  check_error(ask(server.port(), http_request("BREW", "/v1/models")), 405);
  check_error(ask(server.port(), http_post("/v1/chat/completions", "")), 400);
  check_error(ask(server.port(), http_post("/v1/chat/completions", "{")), 400);
  OrderedJson body = scripted_request({true, false}, "hello");
  body["model"] = "gpt-5";
  CHECK(server.post("/v1/chat/completions", body).status == 200);  // one model: any name is its own
  options.models = {"a=" + models().script, "b=" + models().random};
  RunningServer two(options);
  reply = two.post("/v1/chat/completions", body);
  check_error(reply, 404);
  CHECK(reply.json().at("error").at("code") == "model_not_found");
  for (const char* name : {"gpt-5", "a", "b"}) {
    CHECK(contains(reply.json().at("error").at("message"), name));
  }
  body["model"] = "a";
  reply = two.post("/v1/chat/completions", body);
  CHECK(reply.json().at("model") == "a");
  CHECK(reply.json().at("choices")[0].at("message").at("content") == "Hello.");
}

TEST_CASE("serve: while the models load it listens, and answers 503 with Retry-After") {
  RunningServer server(serve_options(models().endless), false);
  Reply reply;
  for (const double end = now() + 30; now() < end;) {
    reply = server.get("/health");
    if (reply.status == 200) break;
    REQUIRE_MESSAGE(reply.status == 503, reply.head);
    CHECK(reply.has("Retry-After"));
    check_error(reply, 503);
  }
  CHECK(reply.status == 200);
}

// -------------------------------------------------------------------------------------------------
// The binary and its signals

TEST_CASE("serve: either signal ends it with status 0, idle, streaming or reading a prompt") {
  // llama.cpp#18292 (hangs while streams are open), #6348 (SIGTERM)
  OrderedJson body = completion("Go on.", 4000);
  body["stream"] = true;
  for (const int signal : {SIGINT, SIGTERM}) {
    for (const std::string moment : {"idle", "kept connection", "streaming", "reading", "queued"}) {
      if (signal == SIGTERM && (moment == "kept connection" || moment == "queued")) continue;
      CAPTURE(signal);
      CAPTURE(moment);
      ServeBinary serve(models().endless, "--grace .2 --rows 1");
      Connection one(serve.port()), two(serve.port());
      bool streams = false;
      if (moment == "kept connection") {
        CHECK(one.ask(http_get("/health")).status == 200);
      } else if (moment == "streaming" || moment == "queued") {
        one.write(http_post("/v1/completions", body));
        REQUIRE(one.read_head().status == 200);
        streams = true;
        if (moment == "queued") two.write(http_post("/v1/completions", body));
      } else if (moment == "reading") {
        one.write(http_post("/v1/completions", completion(models().prompt(4000), 1)));
      }
      serve.signal(signal);
      CHECK(wait_until([&] { return serve.ended(); }, 20));
      CHECK(serve.status() == 0);
      if (streams) {  // it ends with an error in the stream, and without [DONE]; or it was complete
        const std::string rest = one.read_all();
        CHECK(contains(rest, "data: {\"error\":{") != contains(rest, "data: [DONE]"));
      }
    }
  }
}

TEST_CASE("serve: the first signal lets streams end in peace, the second ends at once") {
  OrderedJson body = completion("Go on.", 200);
  body["stream"] = true;
  {
    ServeBinary serve(models().endless, "--grace 30");
    Connection stream(serve.port());
    stream.write(http_post("/v1/completions", body));
    REQUIRE(stream.read_head().status == 200);
    serve.signal(SIGINT);
    const std::string rest = stream.read_all();
    CHECK(contains(rest, "data: [DONE]"));
    CHECK(wait_until([&] { return serve.ended(); }, 20));  // not the whole 30 s
    CHECK(serve.status() == 0);
  }
  {
    ServeBinary serve(models().endless, "--grace 60");
    Connection stream(serve.port());
    body["max_tokens"] = 4000;
    body["n"] = 16;
    stream.write(http_post("/v1/completions", body));
    REQUIRE(stream.read_head().status == 200);
    serve.signal(SIGTERM);
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    serve.signal(SIGTERM);
    CHECK(wait_until([&] { return serve.ended(); }, 20));
  }
}

TEST_CASE("serve: killed, it starts again on the same port at once") {
  int port = 0;
  {
    ServeBinary serve(models().script);
    port = serve.port();
    Connection stream(port);
    stream.ask(http_get("/health"));
    serve.signal(SIGKILL);
    CHECK(wait_until([&] { return serve.ended(); }));
  }
  ServeOptions options = serve_options(models().script);
  options.http.port = port;
  RunningServer server(options);
  CHECK(server.port() == port);
  check_next_text(server);
  // The port is busy: one line that says how to choose another one.
  const Output busy = shell(concat("./serve ", models().script, " --port ", port, " --device cpu"));
  CHECK(busy.status == 1);
  CHECK(busy.text.starts_with("error: "));
  CHECK(contains(busy.text, "--port"));
}
