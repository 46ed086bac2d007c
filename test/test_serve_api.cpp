// Requests of ./serve's API: what clients send becomes ids and settings, or an error that names the
// key. The types and ranges are those of OpenAI's published API and of openai-python's types.
#include <doctest/doctest.h>

#include <functional>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cake/conversations.h"
#include "cake/serve.h"
#include "test/chatml.h"
#include "test/support.h"

using namespace cake;

namespace {

const ApiLimits kApiLimits;

// A tokenizer with the tokens of ChatML and of Llama 3.
const Tokenizer& api_tokenizer() {
  static const TempDir dir;
  static const Tokenizer tokenizer = [] {
    std::string text;
    for (int i = 0; i < 50; i++) {
      text += concat("User: what is ", i, "?\nAssistant: The answer is ", i, ".\n\n");
    }
    write_file(dir / "text.txt", text);
    train_tokenizer({.inputs = {dir / "text.txt"}}, 400, "qwen2").save(dir.path());
    const std::string path = dir / "tokenizer.json";
    std::string json = read_file(path);
    const char* names[] = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                           "<|eot_id|>"};
    for (size_t i = 0; i < std::size(names); i++) {
      const std::string spare = concat("<|spare_", i, "|>");
      for (size_t at; (at = json.find(spare)) != std::string::npos;) {
        json.replace(at, spare.size(), names[i]);
      }
    }
    write_file(path, json);
    return Tokenizer::load(dir.path());
  }();
  return tokenizer;
}

// A template in the shape of Llama 3's.
constexpr const char* kHeaders = R"({{- '<|begin_of_text|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
)";

enum class Style { chatml, headers, plain, none };

ServedModel api_model(Style style = Style::chatml, int context = 512) {
  const Tokenizer& tokenizer = api_tokenizer();
  ServedModel m{.id = "test-model", .text = {.dir = "test-model", .tokenizer = tokenizer}};
  m.text.config.V = tokenizer.vocab_size();
  m.text.config.T = context;
  m.text.document_start = tokenizer.document_separator();
  m.text.stop_ids = {m.text.document_start};
  if (style == Style::chatml) use_template(m.text, chatml_template(tokenizer));
  if (style == Style::headers) use_template(m.text, ChatTemplate(tokenizer, kHeaders, "headers"));
  if (style == Style::plain) use_template(m.text, open_chat_template(tokenizer, "", "plain"));
  m.context = context;
  m.sampling.temperature = .7f;
  return m;
}

// What a request becomes, or the error of it.
struct Outcome {
  ApiCall call;
  std::vector<Request> requests;
  int status = 200;
  std::string message, param, code, type;
  OrderedJson more;
};

Outcome outcome_of(bool chat, const std::string& body, const ServedModel& model,
                   const ApiLimits& limits = kApiLimits) {
  Outcome out;
  try {
    const OrderedJson json = read_body(body, limits);
    out.call = chat ? read_chat(json, model, limits) : read_completion(json, model, limits);
    out.requests = make_requests(out.call, model, limits);
  } catch (const ApiError& e) {
    out.status = e.status;
    out.message = e.what();
    out.param = e.param;
    out.code = e.code;
    out.type = e.type;
    out.more = e.more;
  }
  return out;
}

// `members` stand behind what every request must have.
std::string chat_body(const std::string& members = "") {
  return R"({"messages": [{"role": "user", "content": "what is 1?"}])" +
         (members.empty() ? "" : ", " + members) + "}";
}
std::string completion_body(const std::string& members = "") {
  return R"({"prompt": "The answer")" + (members.empty() ? "" : ", " + members) + "}";
}
Outcome ask_chat(const std::string& members, const ServedModel& model = api_model()) {
  return outcome_of(true, chat_body(members), model);
}
Outcome ask_completion(const std::string& members, const ServedModel& model = api_model()) {
  return outcome_of(false, completion_body(members), model);
}
Outcome ask_messages(const std::string& messages, const ServedModel& model = api_model()) {
  return outcome_of(true, R"({"messages": )" + messages + "}", model);
}
Outcome ask_prompt(const std::string& prompt, const ServedModel& model = api_model()) {
  return outcome_of(false, R"({"prompt": )" + prompt + "}", model);
}

std::string text_of(const std::vector<int>& ids) { return api_tokenizer().decode(ids); }

// ---------------------------------------------------------------------------------------------
// The body

TEST_CASE("a body that is no JSON object is refused in one line") {
  const auto error = [](const std::string& body) {
    const Outcome out = outcome_of(true, body, api_model());
    CHECK(out.status == 400);
    CHECK(out.type == "invalid_request_error");
    CHECK(out.param == "");
    CHECK_FALSE(contains(out.message, "\n"));
    CHECK(out.message.size() < 300);
    return out.message;
  };
  CHECK(error("") == "body: found nothing, expected a JSON object");
  CHECK(error("[]") == "body: found an array of 0, expected a JSON object");
  CHECK(error("\"text\"") == "body: found \"text\", expected a JSON object");
  CHECK(error("null") == "body: found null, expected a JSON object");
  CHECK(contains(error("{\"messages\": "), "body: not JSON: parse error at line 1, column 14"));
  CHECK(contains(error("{'messages': []}"), "body: not JSON"));
  CHECK(contains(error("{} {}"), "body: not JSON"));
  CHECK(contains(error("{\"a\": NaN}"), "body: not JSON"));
  CHECK(error("{\"a\": \"line\nbreak\"}") ==
        "body: not JSON: parse error at line 2, column 0: syntax error while parsing value - "
        "invalid string: control character U+000A (LF) must be escaped to \\u000A or \\n");
  CHECK(contains(error("{\"a\": 1" + std::string(100000, '0') + "}"), "body: not JSON: number"));
  CHECK(contains(error("{\"a\": \"\\ud800\"}"), "body: not JSON"));
  CHECK(contains(error("{\"temperature\": 1e999}"), "body: not JSON: number overflow"));
  CHECK(contains(error("{\"a\": " + std::string(100000, 'x')), "body: not JSON"));
  CHECK(contains(error(std::string("\0\0\0", 3)), "body: not JSON"));
}

TEST_CASE("a body in another encoding is refused, and the place is named") {
  const std::string gbk = "{\"prompt\": \"\xc4\xe3\xba\xc3\"}";
  const Outcome out = outcome_of(false, gbk, api_model());
  CHECK(out.status == 400);
  CHECK(out.message == "body: found bytes that are no UTF-8 at byte 12, expected JSON");
  CHECK(outcome_of(false, "\xff\xfe{\0}\0", api_model()).status == 400);
  CHECK(outcome_of(false, "{\"prompt\": \"\xed\xa0\x80\"}", api_model()).status == 400);
  CHECK(outcome_of(false, "{\"prompt\": \"\xf0\x9f\x99\x82\"}", api_model()).status == 200);
  CHECK(outcome_of(false, "\xef\xbb\xbf{\"prompt\": \"x\"}", api_model()).status == 200);
}

TEST_CASE("brackets and keys without end are refused before a tree is built") {
  for (const char* bracket : {"[", "{\"a\":", "[[{\"a\":"}) {
    std::string body = "{\"prompt\": ";
    while (body.size() < 300000) body += bracket;
    const Outcome out = outcome_of(false, body, api_model());
    CHECK(out.status == 400);
    CHECK(contains(out.message, "body: found more than 64 levels of brackets at byte"));
  }
  std::string keys = "{\"prompt\": \"x\"", objects = "{\"prompt\": [";
  for (int i = 0; i < 1023; i++) keys += concat(", \"k", i, "\": ", i);
  CHECK(outcome_of(false, keys + "}", api_model()).status == 200);
  CHECK(contains(outcome_of(false, keys + ", \"one more\": 0}", api_model()).message,
                 "body: found more than 1024 keys in an object"));
  for (int i = 0; i < 300000; i++) objects += "{},";
  CHECK(outcome_of(false, objects + "{}]}", api_model()).param == "prompt");
  const std::string quoted = "\"[{\\\"" + std::string(100, '[') + std::string(2000, ':') + "\\\\\"";
  CHECK(outcome_of(false, "{\"prompt\": \"x\", \"user\": " + quoted + "}", api_model()).status ==
        200);

  const auto nested = [](int depth) {
    return "{\"prompt\": \"x\", \"metadata\": " + std::string(size_t(depth), '[') +
           std::string(size_t(depth), ']') + "}";
  };
  CHECK(outcome_of(false, nested(63), api_model()).status == 200);
  CHECK(outcome_of(false, nested(64), api_model()).status == 400);
}

TEST_CASE("of two equal keys the last one holds") {
  CHECK(ask_chat(R"("n": 2, "n": 3)").requests.size() == 3);
}

// ---------------------------------------------------------------------------------------------
// Types and ranges

enum Kinds { kBool = 1, kInt = 2, kFraction = 4, kText = 8, kArray = 16, kObject = 32 };

struct KnownField {
  const char* name;
  bool chat, completions;
  int kinds;  // that the API takes, beside null
};

constexpr KnownField kKnownFields[] = {
    {"model", true, true, kText},
    {"messages", true, false, kArray},
    {"prompt", false, true, kText | kArray},
    {"stream", true, true, kBool},
    {"stream_options", true, true, kObject},
    {"n", true, true, kInt},
    {"best_of", false, true, kInt},
    {"max_tokens", true, true, kInt},
    {"max_completion_tokens", true, true, kInt},
    {"stop", true, true, kText | kArray},
    {"seed", true, true, kInt},
    {"temperature", true, true, kInt | kFraction},
    {"top_p", true, true, kInt | kFraction},
    {"top_k", true, true, kInt},
    {"min_p", true, true, kInt | kFraction},
    {"repetition_penalty", true, true, kInt | kFraction},
    {"repeat_penalty", true, true, kInt | kFraction},
    {"presence_penalty", true, true, kInt | kFraction},
    {"frequency_penalty", true, true, kInt | kFraction},
    {"logit_bias", true, true, kObject},
    {"logprobs", true, false, kBool},
    {"logprobs", false, true, kInt},
    {"top_logprobs", true, false, kInt},
    {"token_details", true, true, kBool},
    {"echo", false, true, kBool},
    {"suffix", false, true, kText},
    {"tools", true, false, kArray},
    {"tool_choice", true, false, kText | kObject},
    {"parallel_tool_calls", true, false, kBool},
    {"functions", true, false, kArray},
    {"response_format", true, true, kObject},
    {"modalities", true, false, kArray},
};

constexpr std::pair<Kinds, const char*> kValues[] = {
    {kBool, "true"},
    {kBool, "false"},
    {kInt, "1"},
    {kInt, "-7"},
    {kFraction, "0.5"},
    {kFraction, "-1e300"},
    {kText, "\"\""},
    {kText, "\"true\""},
    {kText, "\"1\""},
    {kArray, "[]"},
    {kArray, "[1]"},
    {kArray, "[null]"},
    {kArray, "[[]]"},
    {kArray, "[{}]"},
    {kArray, "[true]"},
    {kArray, "[\"\"]"},
    {kObject, "{}"},
    {kObject, "{\"a\": 1}"},
    {kObject, "{\"type\": 1}"},
    {kObject, "{\"include_usage\": \"true\"}"},
    {kObject, "{\"a\": {\"b\": [{\"c\": null}]}}"},
};

// The request with one member replaced or added.
std::string with_member(bool chat, const std::string& name, const std::string& value) {
  OrderedJson json = OrderedJson::parse(chat ? chat_body() : completion_body());
  json[name] = OrderedJson::parse(value);
  return json.dump();
}

TEST_CASE("every field with every wrong type is an error that names it") {
  const ServedModel model = api_model();
  int refused = 0;
  for (const KnownField& field : kKnownFields) {
    for (const bool chat : {true, false}) {
      if (!(chat ? field.chat : field.completions)) continue;
      for (const auto& value : kValues) {
        const std::string name = field.name;
        const Outcome out = outcome_of(chat, with_member(chat, name, value.second), model);
        CAPTURE(chat);
        CAPTURE(name);
        CAPTURE(value.second);
        CAPTURE(out.message);
        if (field.kinds & value.first) {  // the type is right: the value may be wrong
          const bool named = out.param == name || out.param.starts_with(name + "[") ||
                             out.param.starts_with(name + ".");
          CHECK((out.status == 200 || (out.status == 400 && named)));
        } else {
          CHECK(out.status == 400);
          CHECK(out.param == name);
          CHECK(out.type == "invalid_request_error");
          CHECK(out.message.starts_with(name + ": found "));
          CHECK(contains(out.message, ", expected "));
          refused++;
        }
      }
    }
  }
  CHECK(refused > 500);
}

TEST_CASE("null means that an optional field is absent") {
  const ServedModel model = api_model();
  for (const KnownField& field : kKnownFields) {
    const std::string name = field.name;
    const bool needed = name == "messages" || name == "prompt";
    for (const bool chat : {true, false}) {
      if (!(chat ? field.chat : field.completions)) continue;
      CAPTURE(name);
      const Outcome out = outcome_of(chat, with_member(chat, name, "null"), model);
      CHECK(out.status == (needed ? 400 : 200));
      if (needed) CHECK(out.message.starts_with(name + " is missing"));
    }
  }
}

TEST_CASE("numbers at the edges of their ranges") {
  struct Range {
    bool chat;
    const char* name;
    std::vector<const char*> good, bad;
  };
  const std::vector<Range> ranges = {
      {true, "temperature", {"0", "1e-300", "2", "2.0"}, {"-0.001", "2.001", "1e300"}},
      {true, "top_p", {"0", "1e-300", "1"}, {"-0.1", "1.0001"}},
      {true, "min_p", {"0", "1"}, {"-0.1", "1.1"}},
      {true, "top_k", {"-1", "0", "1", "9223372036854775807"}, {"-2", "9223372036854775808"}},
      {true, "repetition_penalty", {"0.1", "10"}, {"0", "-1", "10.1", "0.09"}},
      {true, "repeat_penalty", {"1"}, {"0"}},
      {true, "presence_penalty", {"-2", "2", "0"}, {"-2.1", "2.1"}},
      {true, "frequency_penalty", {"-2", "2", "0.0"}, {"-2.1", "2.1"}},
      {true, "n", {"1", "64", "2.0"}, {"0", "-1", "65", "9223372036854775807", "1.5"}},
      {true, "max_tokens", {"1", "-1", "400", "400.0"}, {"0", "-2", "512", "9223372036854775807"}},
      {true, "max_completion_tokens", {"1", "-1"}, {"0", "-2", "1e18"}},
      {true, "top_logprobs", {"0"}, {"-1", "21", "1"}},  // 1 without logprobs
      {false, "logprobs", {"0", "5", "20"}, {"-1", "21"}},
      {false, "best_of", {"1"}, {"0", "2"}},
      {false, "max_tokens", {"1", "-1"}, {"0", "-2", "100000"}},
      {true,
       "seed",
       {"0", "-1", "-9223372036854775808", "9223372036854775807"},
       {"9223372036854775808", "18446744073709551615", "-9223372036854775809", "0.5"}}};
  const ServedModel model = api_model();
  for (const Range& range : ranges) {
    const std::string name = range.name;
    for (const char* value : range.good) {
      CAPTURE(concat(name, " ", value));
      const Outcome out = outcome_of(range.chat, with_member(range.chat, name, value), model);
      CHECK(out.message == "");
      CHECK(out.status == 200);
    }
    for (const char* value : range.bad) {
      CAPTURE(concat(name, " ", value));
      const Outcome out = outcome_of(range.chat, with_member(range.chat, name, value), model);
      CHECK(out.status == 400);
      if (out.code != "context_length_exceeded") CHECK(out.param == name);
    }
  }
}

TEST_CASE("errors say what was found and what was expected") {
  CHECK(ask_chat(R"("stream": "true")").message ==
        R"(stream: found "true", expected true or false)");
  CHECK(ask_chat(R"("temperature": 3)").message ==
        "temperature: found 3, expected a number from 0 to 2");
  CHECK(ask_chat(R"("n": 0)").message == "n: found 0, expected an integer of at least 1");
  CHECK(ask_chat(R"("n": 65)").message ==
        "n: found 65 choices, expected at most 64, n times the number of prompts");
  CHECK(ask_chat(R"("max_tokens": 0)").message ==
        "max_tokens: found 0, expected an integer of at least 1, or -1 for as many as fit");
  CHECK(ask_chat(R"("stop": ["a", ""])").message == "stop[1]: found 0 bytes, expected 1 to 256");
  CHECK(ask_chat(R"("stop": ["a", null])").message == "stop[1]: found null, expected a string");
  CHECK(ask_chat(R"("stream_options": {"include_usage": 1})").param ==
        "stream_options.include_usage");
  CHECK(ask_chat(R"("seed": 9223372036854775808)").message ==
        "seed: found 9223372036854775808, expected an integer below 2^63");
  CHECK(ask_chat(R"("logit_bias": {"5": "x"})").param == "logit_bias.5");
  CHECK(ask_chat(R"("logit_bias": {"5": 101})").param == "logit_bias.5");
  for (const char* key : {"x", "-1", "05", "100000", "5 ", "99999999999999999999", ""}) {
    CHECK(ask_chat(concat(R"("logit_bias": {")", key, R"(": 1})")).param == "logit_bias");
  }
}

// ---------------------------------------------------------------------------------------------
// What fields do

TEST_CASE("what is not asked for is the model's default") {
  const ServedModel model = api_model();
  const Outcome out = ask_chat("", model);
  REQUIRE(out.requests.size() == 1);
  const Request& request = out.requests[0];
  CHECK(request.sampling.temperature == model.sampling.temperature);
  CHECK(request.sampling.vocab == model.text.tokenizer.vocab_size());
  CHECK(request.stop_ids == model.text.turn_stop_ids);
  CHECK(request.top_logprobs == -1);
  CHECK(request.max_new == model.context - int(request.prompt.size()));
  CHECK_FALSE(request.on_turn);
  CHECK(ask_completion("", model).requests[0].max_new == 16);
}

TEST_CASE("settings reach the request") {
  const Outcome out = ask_chat(
      R"("temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "repeat_penalty": 1.5,
         "presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"5": -100, "6": 2.5},
         "seed": -3, "stop": "END", "logprobs": true, "top_logprobs": 4, "stream": true,
         "stream_options": {"include_usage": true, "include_obfuscation": false},
         "max_tokens": 9, "max_completion_tokens": 5, "model": "some name")");
  REQUIRE(out.message == "");
  const Request& r = out.requests.at(0);
  CHECK(r.sampling.temperature == .25f);
  CHECK(r.sampling.top_p == .5f);
  CHECK(r.sampling.top_k == 7);
  CHECK(r.sampling.min_p == .125f);
  CHECK(r.sampling.repetition_penalty == 1.5f);
  CHECK(r.presence_penalty == .5f);
  CHECK(r.frequency_penalty == -1.f);
  REQUIRE(r.logit_bias.size() == 2);
  CHECK(r.logit_bias[0].id == 5);
  CHECK(r.logit_bias[0].bias == -100.f);
  CHECK(r.logit_bias[1].id == 6);
  CHECK(r.logit_bias[1].bias == 2.5f);
  CHECK(int64_t(r.sampling.seed) == -3);
  CHECK(r.stop_strings == std::vector<std::string>{"END"});
  CHECK(r.top_logprobs == 4);
  CHECK_FALSE(r.score_prompt);
  CHECK(r.max_new == 5);
  CHECK(out.call.stream);
  CHECK(out.call.include_usage);
  CHECK(out.call.has_seed);
  CHECK(out.call.model == "some name");
}

TEST_CASE("the newer name of max_tokens wins, and -1 means as many as fit") {
  CHECK(ask_chat(R"("max_completion_tokens": 5, "max_tokens": 9)").requests.at(0).max_new == 5);
  const Outcome open = ask_chat(R"("max_tokens": 9, "max_completion_tokens": -1)");
  CHECK(open.requests.at(0).max_new == 512 - int(open.requests[0].prompt.size()));
  const Outcome text = ask_completion(R"("max_tokens": -1)");
  CHECK(text.requests.at(0).max_new == 512 - int(text.requests[0].prompt.size()));
}

TEST_CASE("top_p 0 is the most likely token") {
  const Outcome out = ask_chat(R"("top_p": 0, "top_k": 5)");
  CHECK(out.requests.at(0).sampling.top_k == 1);
  CHECK(out.requests[0].sampling.top_p == 1.f);
  CHECK(ask_chat(R"("top_k": -1)").requests.at(0).sampling.top_k == 0);
}

TEST_CASE("without a seed every call has another one, which JSON's numbers hold") {
  std::set<uint64_t> seeds;
  for (int i = 0; i < 20; i++) {
    const Outcome out = ask_chat("");
    CHECK_FALSE(out.call.has_seed);
    CHECK(out.call.sampling.seed < uint64_t(1) << 53);
    CHECK(out.requests.at(0).sampling.seed == out.call.sampling.seed);
    seeds.insert(out.call.sampling.seed);
  }
  CHECK(seeds.size() == 20);
}

TEST_CASE("the choices of a prompt differ by their stream alone, prompt after prompt") {
  const Outcome out =
      outcome_of(false, R"({"prompt": ["The", "answer", "is"], "n": 2, "seed": 5, "best_of": 2})",
                 api_model());
  REQUIRE(out.requests.size() == 6);
  for (size_t i = 0; i < 6; i++) {
    CHECK(out.requests[i].sampling.stream == i % 2);
    CHECK(out.requests[i].sampling.seed == 5);
    CHECK(out.requests[i].prompt == out.requests[i / 2 * 2].prompt);
  }
  CHECK(out.requests[0].prompt != out.requests[2].prompt);
  const std::string many = R"({"prompt": ["a", "b", "c"], "n": 22})";
  CHECK(outcome_of(false, many, api_model()).param == "n");
  std::string prompts = R"({"prompt": ["a")";
  for (int i = 0; i < 63; i++) prompts += ", \"a\"";
  CHECK(outcome_of(false, prompts + "]}", api_model()).requests.size() == 64);
  CHECK(outcome_of(false, prompts + ", \"a\"]}", api_model()).param == "prompt");
}

TEST_CASE("log-probabilities are asked for in both endpoints' ways") {
  CHECK(ask_chat(R"("logprobs": true)").call.top_logprobs == 0);
  CHECK(ask_chat(R"("logprobs": true, "top_logprobs": 20)").call.top_logprobs == 20);
  CHECK(ask_chat(R"("logprobs": false, "top_logprobs": 0)").call.top_logprobs == -1);
  CHECK(ask_chat(R"("logprobs": false, "top_logprobs": 2)").param == "top_logprobs");
  CHECK(ask_completion(R"("logprobs": 0)").call.top_logprobs == 0);
  const Outcome echo = ask_completion(R"("logprobs": 1, "echo": true, "max_tokens": 0)");
  REQUIRE(echo.message == "");
  CHECK(echo.requests.at(0).score_prompt);
  CHECK(echo.requests[0].max_new == 1);
  CHECK(echo.call.max_tokens == 0);
  CHECK_FALSE(ask_completion(R"("echo": true)").requests.at(0).score_prompt);
}

TEST_CASE("token_details come with log-probabilities, in both endpoints") {
  CHECK(ask_chat(R"("logprobs": true, "token_details": true)").call.token_details);
  CHECK(ask_completion(R"("logprobs": 0, "token_details": true)").call.token_details);
  CHECK_FALSE(ask_completion(R"("logprobs": 0)").call.token_details);
  CHECK(ask_completion(R"("token_details": false)").status == 200);
  CHECK(ask_completion(R"("token_details": true)").param == "token_details");
  CHECK(ask_chat(R"("token_details": true, "logprobs": false)").param == "token_details");
}

TEST_CASE("the next token is asked for with a prompt or with messages, and settings of sampling") {
  const ServedModel model = api_model();
  const auto ask = [&](const std::string& body) {
    Outcome out;
    try {
      out.call = read_next_token(read_body(body, kApiLimits), model, kApiLimits);
      out.requests = make_requests(out.call, model, kApiLimits);
    } catch (const ApiError& e) {
      out.status = e.status, out.param = e.param, out.message = e.what();
    }
    return out;
  };
  for (const bool chat : {true, false}) {
    CAPTURE(chat);
    const auto body = [&](const std::string& members) {
      return chat ? chat_body(members) : completion_body(members);
    };
    const Outcome out = ask(body(R"("temperature": 0.5, "top_k": 3, "min_p": 0.25, "top": 7,
        "logit_bias": {"5": 1}, "max_tokens": 100, "stop": "x")"));
    REQUIRE(out.message == "");
    CHECK(out.call.next_tokens == 7);
    REQUIRE(out.requests.size() == 1);
    const Request& r = out.requests[0];
    CHECK(r.want_distribution);
    CHECK(r.max_new == 1);
    CHECK(r.top_logprobs == -1);
    CHECK(r.sampling.temperature == .5f);
    CHECK(r.sampling.top_k == 3);
    CHECK(r.sampling.min_p == .25f);
    CHECK(r.logit_bias.size() == 1);
    CHECK(r.prompt == outcome_of(chat, body(""), model).requests.at(0).prompt);
    CHECK_FALSE(outcome_of(chat, body(R"("top": 7)"), model).requests.at(0).want_distribution);
    CHECK(ask(body("")).call.next_tokens == 20);
    CHECK(ask(body(R"("top": 0)")).status == 200);
    CHECK(ask(body(R"("top": -1)")).param == "top");
    CHECK(ask(body(R"("top": 1001)")).param == "top");
    CHECK(ask(body(R"("top": "7")")).param == "top");
    CHECK(ask(body(R"("n": 2)")).param == "n");
    CHECK(ask(body(R"("stream": true)")).param == "stream");
    CHECK(ask(body(R"("temperature": 3)")).param == "temperature");
  }
  CHECK(ask(R"({"prompt": [65, 66]})").requests.at(0).prompt == std::vector<int>{65, 66});
  CHECK(ask(R"({"prompt": ["a", "b"]})").param == "prompt");
  CHECK(ask("{}").param == "prompt");
  CHECK(ask(R"({"prompt": "a", "messages": [{"role": "user", "content": "b"}]})").param ==
        "messages");
}

TEST_CASE("stop strings: one, several, none") {
  CHECK(ask_completion(R"("stop": "a")").requests.at(0).stop_strings.size() == 1);
  CHECK(ask_completion(R"("stop": [])").requests.at(0).stop_strings.empty());
  CHECK(ask_completion(R"("stop": null)").requests.at(0).stop_strings.empty());
  std::string list = "\"stop\": [\"0\"";
  for (int i = 1; i < 16; i++) list += concat(", \"", i, "\"");
  CHECK(ask_completion(list + "]").requests.at(0).stop_strings.size() == 16);
  CHECK(ask_completion(list + ", \"16\"]").param == "stop");
  CHECK(ask_completion("\"stop\": \"" + std::string(256, 'x') + "\"").status == 200);
  CHECK(ask_completion("\"stop\": \"" + std::string(257, 'x') + "\"").param == "stop");
}

TEST_CASE("a field without effect is refused, unless its value asks for nothing") {
  for (const char* members :
       {R"("response_format": {"type": "text"})", R"("modalities": ["text"])", R"("functions": [])",
        R"("tools": [], "tool_choice": "auto", "parallel_tool_calls": false)",
        R"("tool_choice": "none")", R"("function_call": "auto")", R"("grammar": "")"}) {
    CAPTURE(members);
    CHECK(ask_chat(members).message == "");
  }
  const std::pair<const char*, const char*> refused[] = {
      {R"("response_format": {"type": "json_object"})", "response_format.type"},
      {R"("response_format": {"type": "json_schema", "json_schema": {}})", "response_format.type"},
      {R"("response_format": {})", "response_format.type"},
      {R"("grammar": "root ::= x")", "grammar"},
      {R"("json_schema": {"type": "object"})", "json_schema"},
      {R"("structured_outputs": {"choice": ["a"]})", "structured_outputs"},
      {R"("modalities": ["text", "audio"])", "modalities[1]"},
      {R"("functions": [{"name": "f"}])", "functions"},
      {R"("function_call": {"name": "f"})", "function_call"},
      {R"("tool_choice": "required")", "tool_choice"},
      {R"("tool_choice": {"type": "function", "function": {"name": "f"}})", "tool_choice"}};
  for (const auto& r : refused) {
    CAPTURE(r.first);
    const Outcome out = ask_chat(r.first);
    CHECK(out.status == 400);
    CHECK(out.param == r.second);
  }
  CHECK(ask_completion(R"("suffix": "")").status == 200);
  CHECK(ask_completion(R"("suffix": " end")").param == "suffix");
  CHECK(ask_completion(R"("best_of": 3, "n": 3)").status == 200);
  CHECK(ask_completion(R"("best_of": 3)").param == "best_of");
  CHECK(ask_completion(R"("best_of": 1, "n": 3)").param == "best_of");
}

TEST_CASE("unknown fields are ignored, whatever they hold") {
  const Outcome out = ask_chat(
      R"("user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto",
         "chat_id": "x", "session_id": null, "features": {"web_search": false}, "cache_prompt": true,
         "prediction": 5, "": [[]], "n_keep": {})");
  CHECK(out.message == "");
}

// ---------------------------------------------------------------------------------------------
// Messages

TEST_CASE("messages as clients send them") {
  const Outcome out = ask_messages(
      R"([{"role": "developer", "content": [{"type": "text", "text": "Be "},
                                            {"type": "text", "text": "short.",
                                             "cache_control": {"type": "ephemeral"}}]},
          {"role": "user", "name": "ann", "content": "what is 1?"},
          {"role": "assistant", "content": null, "refusal": null, "annotations": [],
           "audio": null, "function_call": null, "tool_calls": null},
          {"role": "system", "content": ""},
          {"role": "user", "content": ""},
          {"role": "user", "content": "what is 2?"},
          {"role": "assistant", "reasoning_content": "two", "content": ""},
          {"role": "user", "content": []}])");
  REQUIRE(out.message == "");
  const std::vector<Message> expected = {
      {.role = "system", .content = "Be short."},
      {.role = "user", .content = "what is 1?"},
      {.role = "assistant"},
      {.role = "system"},
      {.role = "user"},
      {.role = "user", .content = "what is 2?"},
      {.role = "assistant", .reasoning = "two"},
      {.role = "user"},
  };
  CHECK(out.call.conversation.messages == expected);
  CHECK_FALSE(out.call.continues);
  CHECK(text_of(out.requests.at(0).prompt) ==
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nwhat is 1?<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>system\n<|im_end|>\n"
        "<|im_start|>user\n<|im_end|>\n<|im_start|>user\nwhat is 2?<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\n");
}

TEST_CASE("conversations that begin with the assistant or the system alone are answered") {
  CHECK(ask_messages(R"([{"role": "system", "content": "Be short."}])").status == 200);
  CHECK(ask_messages(R"([{"role": "assistant", "content": "Hello"},
                         {"role": "user", "content": "Hello"}])")
            .status == 200);
}

TEST_CASE("messages of any other shape are refused, with their path") {
  const std::string user = R"({"role": "user", "content": "x"})";
  const std::string calls =
      R"({"role": "assistant", "tool_calls": [{"id": "a", "type": "function",
          "function": {"name": "f", "arguments": "{}"}}]})";
  const std::string answer = R"({"role": "tool", "tool_call_id": "a", "content": "1"})";
  const std::pair<std::string, std::string> cases[] = {
      {"\"hi\"", "messages"},
      {"{}", "messages"},
      {"[]", "messages"},
      {"[1]", "messages[0]"},
      {"[null]", "messages[0]"},
      {"[[]]", "messages[0]"},
      {"[{}]", "messages[0].role"},
      {R"([{"role": 5, "content": "x"}])", "messages[0].role"},
      {R"([{"role": "", "content": "x"}])", "messages[0].role"},
      {R"([{"role": "User", "content": "x"}])", "messages[0].role"},
      {R"([{"role": "function", "name": "f", "content": "x"}])", "messages[0].role"},
      {R"([{"role": "user"}])", "messages[0].content"},
      {R"([{"role": "user", "content": null}])", "messages[0].content"},
      {R"([{"role": "tool", "content": null}])", "messages[0].content"},
      {R"([{"role": "user", "content": 5}])", "messages[0].content"},
      {R"([{"role": "user", "content": {"type": "text", "text": "x"}}])", "messages[0].content"},
      {R"([{"role": "user", "content": ["x"]}])", "messages[0].content[0]"},
      {R"([{"role": "user", "content": [{"text": "x"}]}])", "messages[0].content[0].type"},
      {R"([{"role": "user", "content": [{"type": "text"}]}])", "messages[0].content[0].text"},
      {R"([{"role": "user", "content": [{"type": "text", "text": 5}]}])",
       "messages[0].content[0].text"},
      {"[" + user + R"(, {"role": "assistant"}, {"role": "user", "content": [
          {"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}]}])",
       "messages[2].content[1].type"},
      {R"([{"role": "assistant", "content": 5}])", "messages[0].content"},
      {R"([{"role": "assistant", "reasoning_content": 5}])", "messages[0].reasoning_content"},
      {R"([{"role": "assistant", "reasoning": []}])", "messages[0].reasoning"},
      {R"([{"role": "assistant", "tool_calls": {}}])", "messages[0].tool_calls"},
      {R"([{"role": "assistant", "tool_calls": [5]}])", "messages[0].tool_calls[0]"},
      {R"([{"role": "assistant", "tool_calls": [{}]}])", "messages[0].tool_calls[0].function"},
      {R"([{"role": "assistant", "tool_calls": [{"type": "custom"}]}])",
       "messages[0].tool_calls[0].type"},
      {R"([{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}])",
       "messages[0].tool_calls[0].function.name"},
      {R"([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}])",
       "messages[0].tool_calls[0].function.arguments"},
      {R"([{"role": "assistant", "tool_calls": [{"id": 5, "function": {"name": "f"}}]}])",
       "messages[0].tool_calls[0].id"},
      {"[" + answer + "]", "messages[0].role"},
      {"[" + user + ", " + answer + "]", "messages[1].role"},
      {"[" + user + ", " + calls + "]", "messages[1].tool_calls[0]"},
      {"[" + user + ", " + calls + ", " + user + "]", "messages[1].tool_calls[0]"},
      {"[" + user + ", " + calls + ", " + answer + ", " + answer + "]", "messages[3].tool_call_id"},
      {"[" + user + ", " + calls + R"(, {"role": "tool", "tool_call_id": "b", "content": ""}])",
       "messages[2].tool_call_id"},
      {"[" + user + ", " + calls + R"(, {"role": "tool", "tool_call_id": 5, "content": ""}])",
       "messages[2].tool_call_id"},
      {R"([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}])",
       "messages[1].role"},
  };
  const ServedModel model = api_model();
  for (const auto& c : cases) {
    CAPTURE(c.first);
    const Outcome out = ask_messages(c.first, model);
    CHECK(out.status == 400);
    CHECK(out.param == c.second);
    CHECK(out.message.starts_with(c.second));
  }
  CHECK(outcome_of(true, "{}", model).message == "messages is missing, expected an array");
  CHECK(ask_messages(R"([{"role": "user", "content": [{"type": "image_url"}]}])").message ==
        "messages[0].content[0].type: found \"image_url\", expected \"text\": the models here "
        "read text alone");
}

TEST_CASE("a thousand messages are read, and no more") {
  std::string messages = "[";
  for (int i = 0; i < 1000; i++) messages += R"({"role": "user", "content": ""}, )";
  const ServedModel model = api_model(Style::chatml, 100000);
  const std::string last = R"({"role": "user", "content": ""}])";
  CHECK(ask_messages(messages.substr(0, messages.size() - 2) + "]", model).status == 200);
  CHECK(ask_messages(messages + last, model).message ==
        "messages: found 1001, expected at most 1000");
}

TEST_CASE("text that looks like a special token stays text") {
  const Outcome out = ask_messages(R"([{"role": "user", "content": "<|im_end|>\n<|endoftext|>"}])");
  const auto& ids = out.requests.at(0).prompt;
  CHECK(std::count(ids.begin(), ids.end(), api_tokenizer().special("<|im_end|>")) == 1);
  CHECK(std::count(ids.begin(), ids.end(), api_tokenizer().special("<|endoftext|>")) == 0);
  const Outcome text = ask_prompt(R"("<|endoftext|>")");
  CHECK(text.requests.at(0).prompt.size() > 2);
  CHECK(text_of(text.requests[0].prompt) == "<|endoftext|><|endoftext|>");
}

// ---------------------------------------------------------------------------------------------
// The last message is continued

TEST_CASE("an answer that has begun goes on behind the ids that the template gives it") {
  const std::string before = R"([{"role": "system", "content": "Be short."},
                                 {"role": "user", "content": "what is 1?"}, )";
  for (const Style style : {Style::chatml, Style::headers, Style::plain}) {
    const ServedModel model = api_model(style);
    for (const std::string text : {"The answer", "The answer is 1.", "x", "(a", "1", "\\nline"}) {
      CAPTURE(int(style));
      CAPTURE(text);
      const Outcome out = ask_messages(
          concat(before, R"({"role": "assistant", "content": ")", text, " \\n\"}]"), model);
      REQUIRE(out.message == "");
      CHECK(out.call.continues);
      const std::vector<int>& ids = out.requests.at(0).prompt;
      // The whole conversation by the template, whose last message then ends.
      Conversation whole = out.call.conversation;
      std::string& content = whole.messages.back().content;
      content = std::string(strip(content));
      const std::vector<int> finished = model.text.chat->render(whole).ids;
      CHECK(text_of(ids).ends_with(content));
      CHECK(text_of(finished).starts_with(text_of(ids)));
      // The plain template ends an answer with text, which joins a last full stop.
      const size_t same = ids.size() - (style == Style::plain && text.ends_with('.'));
      REQUIRE(finished.size() >= same);
      CHECK(std::equal(ids.begin(), ids.begin() + long(same), finished.begin()));
    }
    // Nothing so far: the header of an answer.
    const Outcome empty = ask_messages(before + R"({"role": "assistant", "content": ""}])", model);
    const Outcome none = ask_messages(before.substr(0, before.size() - 2) + "]", model);
    REQUIRE(empty.message == "");
    CHECK(empty.requests.at(0).prompt == none.requests.at(0).prompt);
  }
}

TEST_CASE("reasoning that has begun goes on too") {
  const Outcome open = ask_messages(
      R"([{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>\nFirst"}])");
  CHECK(text_of(open.requests.at(0).prompt).ends_with("<|im_start|>assistant\n<think>\nFirst"));
  CHECK(std::count(open.requests[0].prompt.begin(), open.requests[0].prompt.end(),
                   api_tokenizer().special("<think>")) == 1);
  const Outcome closed = ask_messages(
      R"([{"role": "user", "content": "x"},
          {"role": "assistant", "reasoning": "First", "content": "Then"}])");
  CHECK(text_of(closed.requests.at(0).prompt)
            .ends_with("<|im_start|>assistant\n<think>\nFirst\n</think>\n\nThen"));
}

TEST_CASE("the templates' texts") {
  const std::string messages = R"([{"role": "system", "content": "Be short."},
      {"role": "user", "content": "what is 1?"}, {"role": "assistant", "content": "1."},
      {"role": "user", "content": "what is 2?"}])";
  CHECK(text_of(ask_messages(messages, api_model(Style::headers)).requests.at(0).prompt) ==
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat is 1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n1.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat is 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n");
  const Outcome plain = ask_messages(messages, api_model(Style::plain));
  CHECK(text_of(plain.requests.at(0).prompt) ==
        "<|endoftext|>Be short.\n\nUser: what is 1?\nAssistant: 1.\n\nUser: what is 2?\n"
        "Assistant:");
  CHECK(plain.requests[0].stop_strings == std::vector<std::string>{"\nUser:"});
}

// A model with a template of this text.
ServedModel model_with(const std::string& text) {
  ServedModel m = api_model(Style::none);
  use_template(m.text, ChatTemplate(m.text.tokenizer, text, "the chat template of test-model"));
  return m;
}

// Thinks, unless enable_thinking is false; refuses system messages.
const char* const kThinking = R"({%- for message in messages %}
    {%- if message.role == 'system' %}{{- raise_exception('no system message') }}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '\n</think>\n\n' }}{% endif %}
{%- endif %}
)";

TEST_CASE("chat_template_kwargs are variables of the template, for one request") {
  const ServedModel model = model_with(kThinking);
  const auto prompt = [&](const std::string& members) {
    const Outcome out = ask_chat(members, model);
    CHECK(out.message == "");
    return out.requests.empty() ? "" : text_of(out.requests[0].prompt);
  };
  const std::string begin = "<|im_start|>user\nwhat is 1?<|im_end|>\n<|im_start|>assistant\n";
  CHECK(prompt("") == begin + "<think>\n");
  CHECK(prompt(R"("chat_template_kwargs": {"enable_thinking": false})") ==
        begin + "<think>\n\n</think>\n\n");
  CHECK(prompt(R"("chat_template_kwargs": {"enable_thinking": true})") == begin + "<think>\n");
  CHECK(prompt(R"("chat_template_kwargs": {})") == begin + "<think>\n");
  CHECK(prompt(R"("chat_template_kwargs": null)") == begin + "<think>\n");
  CHECK(ask_chat(R"("chat_template_kwargs": [])", model).message ==
        "chat_template_kwargs: found an array of 0, expected an object");
  const Outcome taken = ask_chat(R"("chat_template_kwargs": {"messages": []})", model);
  CHECK(taken.status == 400);
  CHECK(taken.param == "chat_template_kwargs");
  // Those that the server was started with stay, unless the request names them.
  ServedModel quiet = api_model(Style::none);
  const TemplateOptions options{.variables = {{"enable_thinking", false}}};
  use_template(quiet.text, ChatTemplate(model.text.tokenizer, kThinking, "quiet", options));
  CHECK(text_of(ask_chat(R"("chat_template_kwargs": {"x": 1})", quiet).requests.at(0).prompt) ==
        begin + "<think>\n\n</think>\n\n");
  CHECK(text_of(ask_chat(R"("chat_template_kwargs": {"enable_thinking": true})", quiet)
                    .requests.at(0)
                    .prompt) == begin + "<think>\n");
}

TEST_CASE("an answer begins in reasoning where the template ends the prompt with <think>") {
  const ServedModel model = model_with(kThinking);
  CHECK(ask_chat("", model).call.in_reasoning);
  CHECK_FALSE(
      ask_chat(R"("chat_template_kwargs": {"enable_thinking": false})", model).call.in_reasoning);
  CHECK_FALSE(ask_chat("", api_model()).call.in_reasoning);
  // What people write begins none.
  const std::string user = R"([{"role": "user", "content": "<think>"}])";
  CHECK_FALSE(ask_messages(user, api_model()).call.in_reasoning);
  CHECK_FALSE(ask_messages(user, api_model(Style::plain)).call.in_reasoning);
  // An answer that goes on is in the reasoning that it has begun itself.
  const auto goes_on = [&](const std::string& content) {
    return ask_messages(R"([{"role": "user", "content": "x"}, {"role": "assistant", "content": ")" +
                        content + "\"}]")
        .call.in_reasoning;
  };
  CHECK(goes_on("<think>\\nFirst"));
  CHECK_FALSE(goes_on("<think>\\nFirst\\n</think>\\n\\nThen"));
  CHECK_FALSE(goes_on("First"));
}

TEST_CASE("what a template refuses is refused with its line") {
  const Outcome out = ask_messages(R"([{"role": "system", "content": "Be short."},
                                       {"role": "user", "content": "what is 1?"}])",
                                   model_with(kThinking));
  CHECK(out.status == 400);
  CHECK(out.param == "messages");
  CHECK(out.message.starts_with("messages: the chat template of test-model:2: "));
  CHECK(contains(out.message, "no system message"));
}

TEST_CASE("every id of a prompt has its origin") {
  ServedModel model = api_model();
  model.tools = {kCalculatorTool};
  std::vector<int> turn = api_tokenizer().encode(
      "<tool_call>\n{\"name\": \"calculator\", \"arguments\": {\"expression\": \"6*7\"}}\n"
      "</tool_call><|im_end|>",
      true);
  const Outcome out = outcome_of(
      true,
      concat(R"({"messages": [{"role": "user", "content": "what is 1?"}, {"role": "assistant",
             "reasoning": "One.", "content": "It is 1."}, {"role": "user", "content": "and 2?"}],
             "answer_ids": )",
             Json(turn).dump(), "}"),
      model);
  REQUIRE(out.message == "");
  const std::vector<int> ids = prompt_of(out.call);
  const std::vector<PromptOrigin> origins = prompt_origins(out.call, model);
  REQUIRE(origins.size() == ids.size());
  const auto of = [&](const std::string& source, int message) {
    std::vector<int> found;
    for (size_t i = 0; i < ids.size(); i++) {
      if (origins[i].source == source && origins[i].message == message) found.push_back(ids[i]);
    }
    return text_of(found);
  };
  CHECK(of("content", 0) == "what is 1?");
  CHECK(of("content", 1) == "It is 1.");
  CHECK(of("reasoning", 1) == "");  // the template leaves it out of earlier turns
  CHECK(of("content", 2) == "and 2?");
  CHECK(contains(of("tools", -1), "calculator"));
  CHECK(of("answer", 3) == text_of(turn));
  CHECK(contains(of("result", 3), "42"));
  CHECK(contains(of("template", -1), "<|im_end|>\n<|im_start|>"));
}

TEST_CASE("a base model answers no messages, and says what to do") {
  const Outcome out = ask_chat("", api_model(Style::none));
  CHECK(out.status == 400);
  CHECK(contains(out.message, "/v1/completions"));
  CHECK(contains(out.message, "--template"));
  CHECK(ask_completion("", api_model(Style::none)).status == 200);
}

// ---------------------------------------------------------------------------------------------
// Tools

const char* const kTwoTools =
    R"("tools": [{"type": "function", "function": {"name": "weather", "description": "Of a city",
         "parameters": {"type": "object", "properties": {"city": {"type": "string"},
         "days": {"type": "number", "default": 1.0}}, "required": ["city"]}, "strict": true}},
       {"type": "function", "function": {"name": "time"}}])";

TEST_CASE("tools are declared as the files that models learn from declare them") {
  const std::string line =
      std::string(R"({"messages": [{"role": "user", "content": "Rain in Bern or Olm?"},
         {"role": "assistant", "content": null, "tool_calls": [
           {"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": "{\"city\": \"Bern\"}"}},
           {"id": "call_2", "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Olm", "days": 2}}}]},
         {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
         {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "sun"}]},
         {"role": "user", "content": "thanks"}], )") +
      kTwoTools + "}";
  const ServedModel model = api_model();
  const Outcome out = outcome_of(true, line, model);
  REQUIRE(out.message == "");
  CHECK(out.call.has_tools);
  TempDir dir;
  std::string one_line = line;
  std::replace(one_line.begin(), one_line.end(), '\n', ' ');
  write_file(dir / "line.jsonl", one_line + "\n");
  const Input input(dir / "line.jsonl");
  RecordReader reader(input);
  Record record;
  REQUIRE(reader.next(record));
  const Conversation trained = parse_conversation(record);
  CHECK(out.call.conversation.tools == trained.tools);
  CHECK(out.call.conversation.messages == trained.messages);
  CHECK(out.requests.at(0).prompt == chatml(model.text.tokenizer, trained, true).ids);
}

TEST_CASE("answers of tools stand in the order of their calls") {
  const auto results = [](const std::string& ids, const std::string& answers) {
    const Outcome out =
        ask_messages(R"([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [)" +
                     ids + R"(]}, )" + answers + "]");
    CHECK(out.message == "");
    std::string text;
    for (const Message& m : out.call.conversation.messages) {
      if (m.role == "tool") text += m.content;
    }
    return text;
  };
  const std::string calls = R"({"id": "a", "function": {"name": "f"}},
                               {"id": "b", "function": {"name": "f"}},
                               {"id": "c", "function": {"name": "f"}})";
  const auto answer = [](const std::string& id, const std::string& text) {
    return R"({"role": "tool", "content": ")" + text + "\"" +
           (id.empty() ? "" : R"(, "tool_call_id": ")" + id + "\"") + "}";
  };
  CHECK(results(calls, answer("c", "3") + "," + answer("a", "1") + "," + answer("b", "2")) ==
        "123");
  CHECK(results(calls, answer("", "1") + "," + answer("", "2") + "," + answer("", "3")) == "123");
  const std::string same = R"({"id": "a", "function": {"name": "f"}},
                              {"id": "a", "function": {"name": "f"}})";
  CHECK(results(same, answer("a", "1") + "," + answer("a", "2")) == "12");
  const std::string none = R"({"function": {"name": "f"}}, {"function": {"name": "f"}})";
  CHECK(results(none, answer("x", "1") + "," + answer("y", "2")) == "12");
}

TEST_CASE("what a model wrote in place of arguments is shown as it was") {
  const Outcome out = ask_messages(
      R"([{"role": "user", "content": "x"},
          {"role": "assistant", "tool_calls": [
            {"id": "a", "function": {"name": "f", "arguments": "{city: Bern"}},
            {"id": "b", "function": {"name": "f", "arguments": ""}},
            {"id": "c", "function": {"name": "f", "arguments": null}}]},
          {"role": "tool", "tool_call_id": "a", "content": ""},
          {"role": "tool", "tool_call_id": "b", "content": ""},
          {"role": "tool", "tool_call_id": "c", "content": ""}])");
  REQUIRE(out.message == "");
  const std::vector<ToolCall> expected = {{"f", "{city: Bern"}, {"f", "{}"}, {"f", "{}"}};
  CHECK(out.call.conversation.messages.at(1).tool_calls == expected);
}

TEST_CASE("a declaration of another shape is refused, with its path") {
  const std::pair<const char*, const char*> cases[] = {
      {"[5]", "tools[0]"},
      {"[{}]", "tools[0].type"},
      {R"([{"type": "web_search"}])", "tools[0].type"},
      {R"([{"type": "function"}])", "tools[0].function"},
      {R"([{"type": "function", "function": {}}])", "tools[0].function.name"},
      {R"([{"type": "function", "function": {"name": ""}}])", "tools[0].function.name"},
      {R"([{"type": "function", "function": {"name": "f", "description": 5}}])",
       "tools[0].function.description"},
      {R"([{"type": "function", "function": {"name": "f", "parameters": "{}"}}])",
       "tools[0].function.parameters"},
      {R"([{"type": "function", "function": {"name": "f"}}, null])", "tools[1]"}};
  for (const auto& c : cases) {
    CAPTURE(c.first);
    const Outcome out = ask_chat(concat("\"tools\": ", c.first));
    CHECK(out.status == 400);
    CHECK(out.param == c.second);
  }
}

TEST_CASE("a text ends a turn at its first call where the tokenizer has no token for it") {
  static const TempDir dir;
  api_tokenizer().save(dir.path());
  std::string json = read_file(dir / "tokenizer.json");
  for (const std::string name : {"<tool_call>", "</tool_call>"}) {
    for (size_t i; (i = json.find('"' + name + '"')) != std::string::npos;) {
      json.replace(i + 1, name.size(), "<|no_" + name.substr(1, name.size() - 2) + "|>");
    }
  }
  write_file(dir / "tokenizer.json", json);
  ServedModel model = api_model();
  model.text.tokenizer = Tokenizer::load(dir.path());
  use_template(model.text, chatml_template(model.text.tokenizer));
  const std::string one = R"(, "parallel_tool_calls": false)";
  const Request request = ask_chat(kTwoTools + one, model).requests.at(0);
  CHECK(request.stop_strings == std::vector<std::string>{"</tool_call>"});
  CHECK(request.stop_ids == model.text.turn_stop_ids);
  CHECK(ask_chat(kTwoTools, model).requests.at(0).stop_strings.empty());
  model.tools = {kCalculatorTool};
  CHECK(ask_chat(kTwoTools + one, model).param == "parallel_tool_calls");
  CHECK(ask_chat(kTwoTools, model).status == 200);
}

TEST_CASE("a template without calls refuses tools") {
  for (const Style style : {Style::headers, Style::plain}) {
    const ServedModel model = api_model(style);
    CHECK(ask_chat(kTwoTools, model).param == "tools");
    CHECK(ask_chat(concat(kTwoTools, R"(, "tool_choice": "none")"), model).status == 200);
    const std::string talk =
        R"([{"role": "user", "content": "x"}, {"role": "assistant",
             "tool_calls": [{"function": {"name": "f"}}]}, {"role": "tool", "content": "1"}])";
    CHECK(ask_messages(talk, model).param == "messages[1].tool_calls");
  }
}

TEST_CASE("the server's tools run behind a turn that calls nothing else") {
  ServedModel model = api_model();
  model.tools = {kCalculatorTool};
  const Tokenizer& tokenizer = model.text.tokenizer;
  const auto turn = [&](const std::string& name) {
    return tokenizer.encode("<tool_call>\n{\"name\": \"" + name +
                                "\", \"arguments\": {\"expression\": \"2+3\"}}\n"
                                "</tool_call><|im_end|>",
                            true);
  };
  const Outcome alone = ask_chat("", model);
  CHECK(contains(text_of(alone.requests.at(0).prompt), "{\"name\": \"calculator\""));
  CHECK(alone.requests[0].max_inserted > 0);
  REQUIRE(alone.requests[0].on_turn);
  CHECK(text_of(alone.requests[0].on_turn(0, turn("calculator"))) ==
        "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n");
  CHECK(contains(text_of(alone.requests[0].on_turn(0, turn("weather"))), "error: found a call"));
  CHECK(alone.requests[0].on_turn(0, tokenizer.encode("5.<|im_end|>", true)).empty());
  const std::vector<ToolResult> results =
      run_calls(model, read_turn(*model.text.chat, turn("calculator")));
  REQUIRE(results.size() == 1);
  CHECK(results[0].call.name == "calculator");
  CHECK(results[0].result == "5");

  const Outcome both = ask_chat(kTwoTools, model);
  CHECK(both.call.conversation.tools.size() == 3);
  REQUIRE(both.requests.at(0).on_turn);
  CHECK_FALSE(both.requests[0].on_turn(0, turn("calculator")).empty());
  CHECK(both.requests[0].on_turn(0, turn("weather")).empty());
  std::vector<int> two = turn("calculator");
  two.pop_back();
  for (const int id : turn("time")) two.push_back(id);
  CHECK(both.requests[0].on_turn(0, two).empty());

  const Outcome none = ask_chat(R"("tool_choice": "none")", model);
  CHECK(none.call.conversation.tools.empty());
  CHECK_FALSE(none.requests.at(0).on_turn);
  const Outcome taken =
      ask_chat(R"("tools": [{"type": "function", "function": {"name": "calculator"}}])", model);
  CHECK(taken.call.conversation.tools.size() == 1);
  CHECK_FALSE(taken.requests.at(0).on_turn);
  CHECK_FALSE(ask_completion("", model).requests.at(0).on_turn);
}

// ---------------------------------------------------------------------------------------------
// Prompts, and the context

TEST_CASE("a prompt is a text, ids, or a list of either") {
  const Tokenizer& tokenizer = api_tokenizer();
  const int start = tokenizer.document_separator();
  std::vector<int> text = {start};
  tokenizer.encode("The answer", text);
  CHECK(ask_prompt("\"The answer\"").requests.at(0).prompt == text);
  CHECK(ask_prompt("\"\"").requests.at(0).prompt == std::vector<int>{start});
  CHECK(ask_prompt("[65, 66]").requests.at(0).prompt == std::vector<int>{65, 66});
  const Outcome texts = ask_prompt("[\"The answer\", \"\", [65.0]]");
  REQUIRE(texts.requests.size() == 3);
  CHECK(texts.requests[0].prompt == text);
  CHECK(texts.requests[1].prompt == std::vector<int>{start});
  CHECK(texts.requests[2].prompt == std::vector<int>{65});
  const Outcome ids = ask_prompt("[[65], [66, 67]]");
  REQUIRE(ids.requests.size() == 2);
  CHECK(ids.requests[1].prompt == std::vector<int>{66, 67});
  const int last = tokenizer.vocab_size() - 1;
  CHECK(ask_prompt(concat("[0, ", last, "]")).status == 200);
  const std::pair<std::string, const char*> refused[] = {
      {concat("[0, ", last + 1, "]"), "prompt[1]"},
      {"[-1]", "prompt[0]"},
      {"[1, \"x\"]", "prompt[1]"},
      {"[1, true]", "prompt[1]"},
      {"[1, 0.5]", "prompt[1]"},
      {"[1, 18446744073709551616]", "prompt[1]"},
      {"[\"x\", 1]", "prompt[1]"},
      {"[\"x\", null]", "prompt[1]"},
      {"[[1], [2, -2]]", "prompt[1][1]"},
      {"[[[1]]]", "prompt[0][0]"},
      {"[]", "prompt"},
      {"[[]]", "prompt[0]"},
      {"{}", "prompt"}};
  for (const auto& r : refused) {
    CAPTURE(r.first);
    const Outcome out = ask_prompt(r.first);
    CHECK(out.status == 400);
    CHECK(out.param == r.second);
  }
  CHECK(outcome_of(false, "{}", api_model()).message == "prompt is missing, expected a value");
  ServedModel without = api_model();
  without.text.document_start = -1;
  CHECK(ask_prompt("\"\"", without).param == "prompt");
}

TEST_CASE("a prompt leaves room for one token at least, and the answer always has a bound") {
  const auto ask = [](int n, const std::string& members, const ApiLimits& limits = kApiLimits) {
    std::string body = "{\"prompt\": [65";
    for (int i = 1; i < n; i++) body += ",65";
    return outcome_of(false, body + "]" + members + "}", api_model(Style::chatml, 64), limits);
  };
  CHECK(ask(63, "").requests.at(0).max_new == 1);
  CHECK(ask(60, "").requests.at(0).max_new == 4);
  CHECK(ask(10, "").requests.at(0).max_new == 16);
  CHECK(ask(10, ", \"max_tokens\": 54").requests.at(0).max_new == 54);
  CHECK(ask(63, ", \"max_tokens\": 0, \"echo\": true").requests.at(0).max_new == 1);
  for (const int n : {64, 65, 10000}) {
    const Outcome out = ask(n, "");
    CHECK(out.status == 400);
    CHECK(out.code == "context_length_exceeded");
    CHECK(out.type == "invalid_request_error");
    CHECK(out.param == "prompt");
    CHECK(out.more.dump() == concat("{\"n_prompt_tokens\":", n, ",\"n_ctx\":64}"));
    CHECK(out.message == concat("found a prompt of ", n,
                                " tokens, expected fewer than 64, the context of test-model"));
  }
  CHECK(ask(10, ", \"max_tokens\": 55").message ==
        "found a prompt of 10 tokens and max_tokens of 55, expected a sum of at most 64, the "
        "context of test-model");
  ApiLimits limits;
  limits.max_tokens = 7;
  CHECK(ask(10, ", \"max_tokens\": 54", limits).requests.at(0).max_new == 7);
  CHECK(ask(10, ", \"max_tokens\": -1", limits).requests.at(0).max_new == 7);
  const Outcome chat = ask_chat("", api_model(Style::chatml, 10));
  CHECK(chat.code == "context_length_exceeded");
  CHECK(chat.param == "messages");
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Answers that begin with ids

TEST_CASE("answer_ids stand behind the template's prompt, and are ids") {
  const ServedModel model = api_model();
  const Outcome plain = ask_chat("", model), begun = ask_chat(R"("answer_ids": [65, 66])", model);
  REQUIRE(begun.requests.size() == 1);
  std::vector<int> expected = plain.requests.at(0).prompt;
  expected.insert(expected.end(), {65, 66});
  CHECK(begun.requests[0].prompt == expected);
  CHECK(ask_chat(R"("answer_ids": [])", model).param == "answer_ids");
  CHECK(ask_chat(R"("answer_ids": [65, -1])", model).param == "answer_ids[1]");
  CHECK(ask_chat(R"("answer_ids": "a")", model).param == "answer_ids");
  const Outcome twice =
      outcome_of(true, R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant",
      "content": "b"}], "answer_ids": [65]})",
                 model);
  CHECK(twice.message ==
        "answer_ids: found 1 ids, expected none behind a last message of the "
        "assistant");
}

TEST_CASE("answer_ids do not go on behind the end of the answer, but for a tool's result") {
  ServedModel model = api_model();
  const int end = model.text.chat->end_of_turn();
  CHECK(ask_chat(concat("\"answer_ids\": [65, ", end, ", 66]"), model).param == "answer_ids[1]");
  const Outcome whole = ask_chat(concat("\"answer_ids\": [65, ", end, "]"), model);
  CHECK(is_complete(whole.call, model));
  CHECK(prompt_of(whole.call).back() == end);
  CHECK_FALSE(is_complete(ask_chat("\"answer_ids\": [65]", model).call, model));
  CHECK_FALSE(is_complete(ask_chat("", model).call, model));
  model.tools = {kCalculatorTool};
  std::vector<int> ids = api_tokenizer().encode(
      "<tool_call>\n{\"name\": \"calculator\", \"arguments\": {\"expression\": \"6*7\"}}\n"
      "</tool_call><|im_end|>",
      true);
  const ApiCall call = ask_chat("", model).call;
  const std::vector<int> result = ids_behind_turn(call, model, ids);
  CHECK(contains(text_of(result), "42"));
  const std::vector<int> turn = ids;
  ids.insert(ids.end(), result.begin(), result.end());
  const auto list = [](const std::vector<int>& v) { return "\"answer_ids\": " + Json(v).dump(); };
  CHECK(ask_chat(list(ids), model).call.answer_ids == ids);
  CHECK(ask_chat(list(turn), model).call.answer_ids == ids);  // the result is added
  CHECK_FALSE(is_complete(ask_chat(list(turn), model).call, model));
  ids[ids.size() - 2]++;
  CHECK(ask_chat(list(ids), model).status == 400);
}

TEST_CASE("a character that answer_ids end in is completed by the answer") {
  const ServedModel model = api_model();
  std::vector<int> ids;
  for (const char c : std::string("a\xf0\x9f")) {
    for (int id = 0; id < 256; id++) {
      if (api_tokenizer().token_bytes(id) == std::string_view(&c, 1)) ids.push_back(id);
    }
  }
  const Outcome out = ask_chat("\"answer_ids\": " + Json(ids).dump(), model);
  CHECK(out.requests.at(0).held_bytes == "\xf0\x9f");
  CHECK(ask_chat("\"answer_ids\": [65]", model).requests.at(0).held_bytes == "");
}
