// ./serve over real sockets: every route with the exact answers of a scripted model, several models
// by name, keys, the time before the models are there, the end; and the command line.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <sstream>
#include <string>
#include <thread>

#include "cake/serve.h"
#include "test/chatml.h"
#include "test/http_client.h"
#include "test/scripted_model.h"
#include "test/serve_support.h"
#include "test/support.h"

using namespace cake;

namespace {

using Texts = std::vector<std::string>;

// Says "The answer is 7." to "hi", and goes on with " is 7." after "The answer".
struct Answering {
  ScriptedModel m;
  std::string dir;
  int prompt_tokens, answer_tokens;  // of the chat; with the end of turn

  explicit Answering(const std::string& text = "The answer is 7.", int T = 512) : m(T) {
    const Conversation hi{{{.role = "user", .content = "hi"}}, {}};
    prompt_tokens = int(chatml(m.tokenizer(), hi, true).ids.size());
    answer_tokens = m.write(prompt_tokens, text + "<|im_end|>") - prompt_tokens;
    const int words = 1 + int(m.tokenizer().encode("The answer").size());
    REQUIRE(words + 10 < prompt_tokens);
    m.write(words, " is 7.<|endoftext|>");
    dir = m.save();
  }
};

const OrderedJson kHi{{"messages", {{{"role", "user"}, {"content", "hi"}}}}, {"temperature", 0}};
const OrderedJson kWords{{"prompt", "The answer"}, {"temperature", 0}, {"max_tokens", 20}};

std::string error_code(const Reply& reply) {
  const OrderedJson error = reply.json().at("error");
  CHECK(error.at("message").is_string());
  return error.at("code").is_string() ? error.at("code").get<std::string>() : "";
}

// The texts of a stream's chunks, joined; `key`: "content" of the delta, or "text".
std::string streamed_text(const StreamedReply& stream) {
  std::string text;
  for (const OrderedJson& chunk : stream.chunks()) {
    for (const OrderedJson& choice : chunk.at("choices")) {
      if (choice.contains("text")) text += choice["text"].get<std::string>();
      if (choice.contains("delta")) text += choice["delta"].value("content", "");
    }
  }
  return text;
}

}  // namespace

TEST_CASE("serve: a chat and a completion are the model's text, whole and streamed") {
  const Answering a;
  RunningServer server(a.dir);
  for (const std::string prefix : {"", "/v1"}) {
    CAPTURE(prefix);
    const Reply chat = server.post(prefix + "/chat/completions", kHi);
    REQUIRE_MESSAGE(chat.status == 200, chat.body);
    CHECK(chat.header("Content-Type") == "application/json");
    CHECK(chat.header("Cache-Control") == "no-store");
    const OrderedJson json = chat.json();
    CHECK(json.at("model") == a.dir);
    CHECK(json.at("choices").size() == 1);
    CHECK(json["choices"][0].at("message").at("content") == "The answer is 7.");
    CHECK(json["choices"][0].at("finish_reason") == "stop");
    CHECK(json.at("usage").at("prompt_tokens") == a.prompt_tokens);
    CHECK(json["usage"].at("completion_tokens") == a.answer_tokens);

    const StreamedReply stream = server.stream(prefix + "/chat/completions", kHi);
    REQUIRE_MESSAGE(stream.reply.status == 200, stream.reply.body);
    CHECK(stream.reply.header("Content-Type") == "text/event-stream");
    CHECK(stream.reply.header("Cache-Control") == "no-cache");
    CHECK(stream.reply.header("X-Accel-Buffering") == "no");
    CHECK(stream.reply.complete);
    CHECK(stream.done());
    CHECK(streamed_text(stream) == "The answer is 7.");

    const Reply words = server.post(prefix + "/completions", kWords);
    REQUIRE_MESSAGE(words.status == 200, words.body);
    CHECK(words.json().at("choices")[0].at("text") == " is 7.");
    const StreamedReply streamed = server.stream(prefix + "/completions", kWords);
    CHECK(streamed_text(streamed) == " is 7.");
    CHECK(streamed.done());
  }
}

TEST_CASE("serve: a client of HTTP/1.0 gets a stream without chunks") {
  const Answering a;
  RunningServer server(a.dir);
  OrderedJson body = kHi;
  body["stream"] = true;
  std::string request = http_post("/v1/chat/completions", body);
  request.replace(request.find("HTTP/1.1"), 8, "HTTP/1.0");
  Connection connection(server.port());
  connection.write(request);
  const Reply head = connection.read_head();
  CHECK(head.status == 200);
  CHECK(!head.has("Transfer-Encoding"));
  const std::string text = connection.read_all();
  CHECK(text.starts_with("data: {"));
  CHECK(text.ends_with("\n\ndata: [DONE]\n\n"));
}

TEST_CASE("serve: a stream that is silent for long sends empty deltas") {
  // A call that never ends: thousands of tokens, of which none can be sent before the last one.
  ScriptedModel m(4096);
  const Conversation hi{{{.role = "user", .content = "hi"}}, {kCalculatorTool}};
  m.write(int(chatml(m.tokenizer(), hi, true).ids.size()), "<tool_call>");
  ServeOptions options = serve_options(m.save());
  options.cache_mb = 256;
  options.calculator = true;
  for (const double seconds : {0., 600.}) {
    CAPTURE(seconds);
    options.keep_alive_seconds = seconds;
    RunningServer server(options);
    OrderedJson body = kHi;
    const size_t tokens = seconds == 0 ? 3000 : 100;
    body["max_tokens"] = tokens;
    const StreamedReply stream = server.stream("/v1/chat/completions", body);
    CHECK(stream.done());
    CHECK(contains(streamed_text(stream), std::string(tokens - 1, 'x')));
    int empty = 0;
    for (const OrderedJson& chunk : stream.chunks()) {
      const OrderedJson& choice = chunk.at("choices").at(0);
      empty += choice.at("delta").empty() && choice.at("finish_reason").is_null();
    }
    CHECK((seconds == 0 ? empty > 0 : empty == 0));
  }
}

TEST_CASE("serve: without parallel calls a turn ends behind its first call") {
  const std::string first =
      "<tool_call>\n{\"name\": \"calculator\", \"arguments\": "
      "{\"expression\": \"6*7\"}}\n</tool_call>";
  const std::string second = "\n" + first + "<|im_end|>";
  ScriptedModel m;
  const Conversation hi{{{.role = "user", .content = "hi"}}, {kCalculatorTool}};
  const int start = int(chatml(m.tokenizer(), hi, true).ids.size());
  m.write(start, first + second);
  OrderedJson body = kHi;
  body["temperature"] = 0;
  // The client's tool: one call or both come back.
  body["tools"] = {{{"type", "function"}, {"function", OrderedJson::parse(kCalculatorTool)}}};
  {
    RunningServer server(m.save("client"));
    for (const bool parallel : {true, false}) {
      CAPTURE(parallel);
      body["parallel_tool_calls"] = parallel;
      const OrderedJson choice =
          server.post("/v1/chat/completions", body).json().at("choices").at(0);
      CHECK(choice.at("finish_reason") == "tool_calls");
      CHECK(choice.at("message").at("tool_calls").size() == (parallel ? 2u : 1u));
      CHECK(choice.at("message").at("content").is_null());
    }
  }
  // The server's tool: it runs, and the model goes on behind a turn that is whole.
  const std::vector<int> call = m.tokenizer().encode(first, true);
  std::vector<int> behind = call;
  behind.push_back(m.tokenizer().special("<|im_end|>"));
  const ChatTemplate& chat = chatml_template(m.tokenizer());
  Conversation asked{.messages = {{"user", "x", {}}, read_turn(chat, behind)}};
  const std::vector<int> answers = answer_calls(chat, asked, nullptr);
  m.write(start + int(call.size() + 1 + answers.size()), "42.<|im_end|>");
  ServeOptions options = serve_options(m.save("server"));
  options.calculator = true;
  RunningServer server(options);
  body.erase("tools");
  const OrderedJson choice = server.post("/v1/chat/completions", body).json().at("choices").at(0);
  CHECK(choice.at("finish_reason") == "stop");
  CHECK(choice.at("message").at("content") == "42.");
  CHECK(choice.at("message").at("cake_tools").at(0).at("result") == "42");
}

TEST_CASE("serve: models, health, props and metrics, with and without /v1") {
  const Answering a;
  ServeOptions options = serve_options("chat/seven=" + a.dir);
  options.http.keys = {"the-key"};
  RunningServer server(options);
  CHECK(server.get("/models").status == 401);
  CHECK(server.get("/").header("Content-Type").starts_with("text/html"));  // the page
  const Headers key = {{"Authorization", "Bearer the-key"}};
  for (const std::string prefix : {"", "/v1"}) {
    CAPTURE(prefix);
    CHECK(server.get(prefix + "/health").json() == OrderedJson{{"status", "ok"}});
    const OrderedJson list = server.get(prefix + "/models", key).json();
    CHECK(list.at("object") == "list");
    REQUIRE(list.at("data").size() == 1);
    const OrderedJson model = list["data"][0];
    CHECK(model.at("id") == "chat/seven");
    CHECK(model.at("object") == "model");
    CHECK(model.at("owned_by") == "cake");
    CHECK(model.at("created").is_number_integer());
    CHECK(model.at("created") > 1'600'000'000);
    CHECK(model.at("meta").at("n_vocab") == a.m.tokenizer().vocab_size());
    CHECK(model["meta"].at("n_ctx_train") == a.m.T());
    // Its id has a slash: as it is, and percent-encoded.
    CHECK(server.get(prefix + "/models/chat/seven", key).json() == model);
    CHECK(server.get(prefix + "/models/chat%2Fseven", key).json() == model);
    const Reply unknown = server.get(prefix + "/models/chat/eight", key);
    CHECK(unknown.status == 404);
    CHECK(error_code(unknown) == "model_not_found");
    CHECK(contains(unknown.body, "chat/seven"));

    const OrderedJson props = server.get(prefix + "/props", key).json();
    CHECK(props.at("model") == "chat/seven");
    CHECK(props.at("is_chat") == true);
    CHECK(props.at("chat_template") == kChatTemplate);
    CHECK_FALSE(props.contains("template"));
    CHECK(props.at("default_generation_settings").at("n_ctx") == a.m.T());
    CHECK(props["default_generation_settings"].at("params").at("temperature") == 1);
    CHECK(props.at("total_slots") == 16);
    CHECK(props.at("deterministic") == true);
    CHECK(props.at("models").size() == 1);
    CHECK_MESSAGE(!contains(props.dump(), a.dir), "a path of the file system");

    const Reply metrics = server.get(prefix + "/metrics", key);
    CHECK(metrics.header("Content-Type") == "text/plain; version=0.0.4; charset=utf-8");
  }
  CHECK(server.get("/nothing", key).status == 404);
  const Reply method = server.get("/v1/chat/completions", key);
  CHECK(method.status == 405);
  CHECK(contains(method.header("Allow"), "POST"));
}

TEST_CASE("serve: a model without a chat template completes texts and refuses conversations") {
  const Answering a;
  ServeOptions options = serve_options(a.dir);
  options.chat_template.choice = "none";
  RunningServer server(options);
  const OrderedJson props = server.get("/props").json();
  CHECK(props.at("is_chat") == false);
  CHECK(props.at("chat_template") == "");
  CHECK(server.post("/v1/completions", kWords).json().at("choices")[0].at("text") == " is 7.");
  for (const std::string path : {"/v1/chat/completions", "/apply-template", "/tokenize"}) {
    CAPTURE(path);
    const Reply reply = server.post(path, {{"messages", kHi["messages"]}});
    CHECK(reply.status == 400);
    CHECK(reply.json().at("error").at("param") == "model");
  }
}

TEST_CASE("serve: /metrics is Prometheus's text and counts what was asked and answered") {
  const Answering a;
  RunningServer server(a.dir);
  CHECK(server.metric("cake_requests_total") == 0);
  server.post("/v1/chat/completions", kHi);
  server.stream("/v1/completions", kWords);
  CHECK(server.metric("cake_requests_total") == 2);
  CHECK(wait_until([&] { return server.metric("cake_requests_finished_total") == 2; }));
  CHECK(server.metric("cake_requests_running") == 0);
  CHECK(server.metric("cake_requests_queued") == 0);
  CHECK(server.metric("cake_prompt_tokens_total") > 0);
  CHECK(server.metric("cake_generated_tokens_total") >= a.answer_tokens);
  CHECK(server.metric("cake_first_token_seconds_count") == 2);
  CHECK(server.metric("cake_first_token_seconds_bucket{le=\"+Inf\"}") == 2);
  CHECK(server.metric("cake_first_token_seconds_sum") > 0);
  CHECK(server.metric("cake_connections_total") > 0);
  // Each name has its help and type, buckets never fall, and every line is one of the format's.
  const std::string text = server.get("/metrics").body;
  REQUIRE(text.ends_with("\n"));
  std::istringstream lines(text);
  std::set<std::string> helped, typed;
  double below = 0;
  for (std::string line; std::getline(lines, line);) {
    CAPTURE(line);
    std::istringstream words(line);
    std::string first, second, name;
    words >> first >> second >> name;
    if (first == "#") {
      CHECK((second == "HELP" || second == "TYPE"));
      CHECK((second == "HELP" ? helped : typed).insert(name).second);
      continue;
    }
    char* end = nullptr;
    const double value = std::strtod(second.c_str(), &end);
    CHECK((end && *end == '\0' && name.empty() && value >= 0));
    std::string family = first.substr(0, first.find('{'));
    const bool bucket = family.ends_with("_bucket");
    for (const std::string suffix : {"_bucket", "_sum", "_count"}) {
      if (family.ends_with(suffix)) family.resize(family.size() - suffix.size());
    }
    CHECK(helped.count(family) == 1);
    CHECK(typed.count(family) == 1);
    if (bucket) CHECK(value >= (contains(first, "le=\"0.001\"") ? 0 : below));
    below = bucket && !contains(first, "+Inf") ? value : 0;
  }
}

TEST_CASE("serve: tokenize, detokenize and apply-template") {
  const Answering a;
  RunningServer server(a.dir);
  const Tokenizer& t = a.m.tokenizer();
  const std::string text = "The answer \u00e9<|im_end|>";
  for (const std::string prefix : {"", "/v1"}) {
    CAPTURE(prefix);
    // llama.cpp's form
    const auto tokens = [&](OrderedJson body) {
      return server.post(prefix + "/tokenize", body).json();
    };
    CHECK(tokens({{"content", text}}).dump() ==
          OrderedJson{{"tokens", t.encode(text, true)}}.dump());
    CHECK(tokens({{"content", text}, {"parse_special", false}}).at("tokens") ==
          OrderedJson(t.encode(text)));
    std::vector<int> with_start = t.encode(text, true);
    with_start.insert(with_start.begin(), t.document_separator());
    CHECK(tokens({{"content", text}, {"add_special", true}}).at("tokens") ==
          OrderedJson(with_start));
    const OrderedJson pieces = tokens({{"content", text}, {"with_pieces", true}}).at("tokens");
    std::string joined;
    bool bytes = false;
    for (const OrderedJson& token : pieces) {
      CHECK(token.at("special") == (token.at("piece") == "<|im_end|>"));
      if (token.at("piece").is_string()) joined += token["piece"].get<std::string>();
      for (const OrderedJson& byte :
           token["piece"].is_array() ? token["piece"] : OrderedJson::array()) {
        joined += char(byte.get<int>());
        bytes = true;
      }
    }
    CHECK(joined == text);
    size_t end = 0;
    const OrderedJson places = tokens({{"content", text}, {"with_places", true}}).at("tokens");
    for (const OrderedJson& token : places) {
      CHECK(token.size() == 4);  // without the piece
      CHECK(token.at("begin") == end);
      end = token.at("end");
      const std::string_view own = t.token_bytes(token.at("id"));
      CHECK(text.substr(token["begin"], end - size_t(token["begin"])) == own);
      CHECK(token.at("special") == (own == "<|im_end|>"));
    }
    CHECK(end == text.size());
    CHECK(bytes);  // of the character that no token has whole
    // vLLM's form
    const OrderedJson counted = tokens({{"prompt", "The answer"}});
    const size_t words = t.encode("The answer").size();
    CHECK(counted.at("count") == words + 1);
    CHECK(counted.at("tokens").size() == words + 1);
    CHECK(counted.at("max_model_len") == a.m.T());
    CHECK(tokens({{"prompt", "The answer"}, {"add_special_tokens", false}}).at("count") == words);
    CHECK(tokens({{"messages", kHi["messages"]}}).at("count") == a.prompt_tokens);

    const Reply back = server.post(prefix + "/detokenize", {{"tokens", t.encode(text, true)}});
    CHECK(back.json() == OrderedJson{{"content", text}, {"prompt", text}});
    const Reply half =
        server.post(prefix + "/detokenize", {{"tokens", {t.encode("\u00e9").front()}}});
    CHECK(half.json().at("content") == "\ufffd");
    const Reply rendered = server.post(prefix + "/apply-template", {{"messages", kHi["messages"]}});
    CHECK(rendered.json() ==
          OrderedJson{{"prompt", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}});
    OrderedJson body{{"messages", kHi["messages"]}, {"origins", true}};
    const OrderedJson with_origins = server.post(prefix + "/apply-template", body).json();
    CHECK(with_origins.at("prompt") == rendered.json().at("prompt"));
    std::string parts;
    for (const OrderedJson& stretch : with_origins.at("stretches")) {
      parts += stretch.at("text").get<std::string>() + "|";
      const std::string source = stretch.at("source");
      CHECK(stretch.at("message") == (source == "template" ? OrderedJson() : OrderedJson(0)));
      CHECK(stretch.at("special") == contains(stretch["text"].get<std::string>(), "<|"));
      parts += (source == "template" ? "" : source + "|");
    }
    CHECK(parts == "<|im_start|>|user|role|\n|hi|content|<|im_end|>|\n|<|im_start|>|assistant\n|");
    body["with_pieces"] = true;
    std::string content;
    const OrderedJson reply = tokens(body);
    for (const OrderedJson& token : reply.at("tokens")) {
      if (token.at("source") == "content") content += token.at("piece").get<std::string>();
    }
    CHECK(content == "hi");
  }
  const OrderedJson info = server.get("/tokenizer_info").json();
  CHECK(info.at("eos_token") == "<|endoftext|>");
  CHECK(info.at("bos_token").is_null());
  CHECK(info.at("chat_template") == kChatTemplate);
  // What is wrong is named.
  const auto param = [&](const std::string& path, const OrderedJson& body) {
    const Reply reply = server.post(path, body);
    CHECK_MESSAGE(reply.status == 400, reply.body);
    return reply.json().at("error").at("param");
  };
  CHECK(param("/tokenize", OrderedJson::object()) == "content");
  CHECK(param("/tokenize", {{"content", 1}}) == "content");
  CHECK(param("/tokenize", {{"content", "a"}, {"with_pieces", "yes"}}) == "with_pieces");
  CHECK(param("/tokenize", {{"content", "a"}, {"model", 1}}) == "model");
  CHECK(param("/detokenize", OrderedJson::object()) == "tokens");
  CHECK(param("/detokenize", {{"tokens", {0, -1}}}) == "tokens[1]");
  CHECK(param("/detokenize", {{"tokens", {t.vocab_size()}}}) == "tokens[0]");
  CHECK(param("/detokenize", {{"tokens", {1.5}}}) == "tokens[0]");
  CHECK(param("/detokenize", {{"tokens", {uint64_t(1) << 63}}}) == "tokens[0]");
  CHECK(param("/apply-template", OrderedJson::object()) == "messages");
}

TEST_CASE("serve: /next_token is what the model samples its next token from") {
  const Answering a;
  const std::string random = save_random_model(a.m, "random");
  RunningServer server(random);
  const auto ids = a.m.tokenizer().encode("The answer is");
  for (const std::string prefix : {"", "/v1"}) {
    // The model's own numbers are those of its log-probabilities.
    const OrderedJson next =
        server.post(prefix + "/next_token", {{"prompt", ids}, {"top", 5}}).json();
    const OrderedJson scored =
        server
            .post("/v1/completions",
                  {{"prompt", ids}, {"max_tokens", 1}, {"logprobs", 5}, {"token_details", true}})
            .json()
            .at("choices")[0]
            .at("logprobs")
            .at("content")[0];
    REQUIRE(next.at("tokens").size() == 5);
    CHECK(next.at("model") == random);
    for (size_t k = 0; k < 5; k++) {
      const OrderedJson &token = next["tokens"][k], &top = scored.at("top_logprobs")[k];
      for (const char* key : {"id", "token", "bytes", "special"}) {
        CHECK(token.at(key) == top.at(key));
      }
      CHECK(token.at("logprob").get<float>() == top.at("logprob").get<float>());
      // Nothing is changed at temperature 1.
      CHECK(token["probability"].get<double>() ==
            doctest::Approx(std::exp(token["logprob"].get<double>())).epsilon(1e-4));
    }
    CHECK(next.at("kept") == a.m.tokenizer().vocab_size());
    CHECK(next.at("entropy_after").get<double>() ==
          doctest::Approx(next.at("entropy").get<double>()).epsilon(1e-3));
  }
  const OrderedJson two =
      server.post("/next_token", {{"prompt", ids}, {"top_k", 2}, {"temperature", .5}}).json();
  CHECK(two.at("kept") == 2);
  CHECK(two.at("tokens").size() == 20);
  const double p = std::exp(two["tokens"][0]["logprob"].get<double>() * 2);
  const double q = std::exp(two["tokens"][1]["logprob"].get<double>() * 2);
  CHECK(two["tokens"][0]["probability"].get<double>() == doctest::Approx(p / (p + q)));
  CHECK(two["tokens"][2]["probability"] == 0);
  CHECK(two.at("rest").get<double>() < 1e-6);
  const OrderedJson chat = server.post("/next_token", kHi).json();
  CHECK(chat.at("kept") == 1);
  CHECK(chat["tokens"][0]["probability"] == 1);
  CHECK(chat.at("entropy_after") == 0);
  const Reply bad = server.post("/next_token", {{"prompt", ids}, {"n", 2}});
  CHECK(bad.status == 400);
  CHECK(bad.json().at("error").at("param") == "n");
  CHECK(wait_until([&] { return server.metric("cake_requests_running") == 0; }));
}

TEST_CASE("serve: of several models the request's name decides, and unknown names are refused") {
  const Answering seven, eight("The answer is 8.");
  ServeOptions options = serve_options("seven=" + seven.dir);
  options.models.push_back("eight=" + eight.dir);
  const auto ask = [](RunningServer& server, const OrderedJson& name) {
    OrderedJson body = kHi;
    if (!name.is_null()) body["model"] = name;
    return server.post("/v1/chat/completions", body);
  };
  const auto text = [](const Reply& reply) {
    REQUIRE_MESSAGE(reply.status == 200, reply.body);
    const OrderedJson json = reply.json();
    return json.at("model").get<std::string>() + ": " +
           json.at("choices")[0].at("message").at("content").get<std::string>();
  };
  {
    RunningServer server(options);
    CHECK(text(ask(server, "seven")) == "seven: The answer is 7.");
    CHECK(text(ask(server, "eight")) == "eight: The answer is 8.");
    CHECK(text(ask(server, nullptr)) == "seven: The answer is 7.");
    for (const std::string path : {"/v1/chat/completions", "/v1/completions", "/tokenize"}) {
      CAPTURE(path);
      OrderedJson body = path == "/tokenize"         ? OrderedJson{{"content", "a"}}
                         : path == "/v1/completions" ? kWords
                                                     : kHi;
      body["model"] = "gpt-4o";
      const Reply unknown = server.post(path, body);
      CHECK(unknown.status == 404);
      CHECK(error_code(unknown) == "model_not_found");
      CHECK(unknown.json()["error"].at("param") == "model");
      CHECK(contains(unknown.body, "seven, eight"));
      CHECK(server.post(path, body).json()["error"].at("message").is_string());
    }
    CHECK(ask(server, 3).status == 400);
    CHECK(server.get("/v1/models").json().at("data").size() == 2);
    CHECK(server.get("/props").json().at("models")[1].at("model") == "eight");
  }
  options.any_model = true;
  RunningServer server(options);
  CHECK(text(ask(server, "eight")) == "eight: The answer is 8.");
  CHECK(text(ask(server, "gpt-4o")) == "seven: The answer is 7.");
}

TEST_CASE("serve: while models load, every route answers 503, and a stop ends it") {
  const Answering a;
  ServeOptions options = serve_options(a.dir);
  const std::string fifo = a.m.dir() / "documents";  // loading waits until somebody writes to it
  REQUIRE(mkfifo(fifo.c_str(), 0600) == 0);
  options.documents = fifo;
  RunningServer server(options, false);
  FifoWriter documents(fifo);
  for (const std::string path : {"/health", "/v1/health", "/v1/models", "/props", "/metrics"}) {
    CAPTURE(path);
    const Reply reply = server.get(path);
    CHECK(reply.status == 503);
    CHECK(reply.json().at("error").at("message") == "Loading model");
    CHECK(reply.json()["error"].at("type") == "unavailable_error");
    CHECK(reply.has("Retry-After"));
  }
  CHECK(server.post("/v1/chat/completions", kHi).status == 503);
  CHECK(server.get("/").status == 200);
  REQUIRE(documents.write());
  CHECK(wait_until([&] { return server.get("/health").status == 200; }));
  CHECK(server.post("/v1/chat/completions", kHi).status == 200);
  CHECK(server.stop() == 0);
}

TEST_CASE("serve: a stop lets streams end within the grace, and ends the others with an error") {
  // An answer without an end: as long as the context is.
  ScriptedModel m(8192);
  const std::string dir = m.save();
  for (const double grace : {60., 0.}) {
    CAPTURE(grace);
    ServeOptions options = serve_options(dir);
    options.grace_seconds = grace;
    options.cache_mb = 256;
    RunningServer server(options);
    OrderedJson body = kHi;
    body["stream"] = true;
    // A stream that ends soon enough, and an idle connection, which delays nothing.
    body["max_tokens"] = grace > 0 ? 200 : 8000;
    Connection idle(server.port());
    REQUIRE(idle.ask(http_get("/health")).status == 200);
    Connection connection(server.port());
    connection.write(http_post("/v1/chat/completions", body));
    REQUIRE(connection.read_head().status == 200);
    EventReader events(connection);
    REQUIRE(events.next());
    std::thread stopping([&] { server.stop(); });
    std::vector<ServerEvent> rest;
    while (auto event = events.next()) rest.push_back(std::move(*event));
    stopping.join();
    CHECK(server.stop() == 0);
    CHECK(server.error() == "");
    CHECK(events.complete());  // the last chunk came: no client waits for more
    REQUIRE(!rest.empty());
    if (grace > 0) {
      CHECK(rest.back().is_done());
    } else {
      CHECK(!rest.back().is_done());
      CHECK(rest.back().json().at("error").at("message").is_string());
    }
    CHECK_THROWS_AS(Connection(server.port()), Error);  // nobody listens any more
  }
}

// ---------------------------------------------------------------------------------------------
// The command line

namespace {

// ./serve as a process of its own, with its standard error in a file.
class ServeProcess {
 public:
  ServeProcess(const std::string& arguments, const std::filesystem::path& log) : log_(log) {
    child_ = fork();
    if (child_ == 0) {
      execl("/bin/sh", "sh", "-c",
            concat("exec ./serve ", arguments, " >", log.string(), " 2>&1").c_str(), nullptr);
      _exit(127);
    }
  }
  ~ServeProcess() {
    if (child_ > 0) kill(child_, SIGKILL), waitpid(child_, nullptr, 0);
  }
  std::string text() const { return std::filesystem::exists(log_) ? read_file(log_) : ""; }
  bool says(const std::string& part) const {
    return wait_until([&] { return contains(text(), part); }, 60);
  }
  void signal(int number) { kill(child_, number); }
  int status() {  // waits for its end: exit status, 128 + n after signal n
    int status = 0;
    waitpid(std::exchange(child_, -1), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  int port() const {  // as it says it
    const std::string line = "listening on port ", all = text();
    return std::atoi(all.c_str() + all.find(line) + line.size());
  }

 private:
  std::filesystem::path log_;
  pid_t child_ = -1;
};

}  // namespace

TEST_CASE("serve: its command line says what is wrong, in one line") {
  const Answering a;
  const std::string keys = a.m.dir() / "keys", none = a.m.dir() / "none";
  write_file(keys, "good\nbad key\n");
  write_file(none, "\n \n");
  const std::pair<std::string, std::string> cases[] = {
      {"", "model is required"},
      {a.dir + " --port 70000", "--port: found 70000, expected 0 to 65535"},
      {a.dir + " --rows 0", "--rows: found 0, expected 1 to 4096"},
      {a.dir + " --queue-seconds nan", "--queue-seconds: found nan"},
      {a.dir + " --grace -1", "--grace: found -1"},
      {a.dir + " --no-such-flag", "--no-such-flag"},
      {a.dir + " --port 0 --host 0.0.0.0", "--api-key-file"},
      {a.dir + " --api-key-file " + keys, keys + ":2: found a key with a space"},
      {a.dir + " --api-key-file " + none, none + ": found no key"},
      {a.dir + " --port 0 --template other", "--template: found other"},
      {a.dir + " --prompts some.jsonl", "--votes is missing: the file for the votes of the arena"},
      {a.dir + " --arena collect", "to which --arena belongs"},
      {a.dir + " --arena some --votes v.db", "--arena: found some, expected compare, collect"},
      {a.dir + " export v.db", "export: found model " + a.dir},
      {a.dir + " --port 0 --context 100000", "--context: found 100000"},
      {a.dir + " --port 0 --memory-mb 1", "--memory-mb"},
      {"x=/no/such/model --port 0", "/no/such/model: not found"},
      {"x=" + a.dir + " x=" + a.dir + " --port 0", "x"},
  };
  for (const auto& c : cases) {
    CAPTURE(c.first);
    const Output out = shell("timeout 60 ./serve " + c.first);
    CHECK_MESSAGE(out.status == 1, out.text);
    CHECK_MESSAGE(contains(out.text, "error: "), out.text);
    const std::string error = out.text.substr(out.text.find("error: "));
    CHECK_MESSAGE(contains(error, c.second), out.text);
    CHECK_MESSAGE(std::count(error.begin(), error.end(), '\n') == 1, out.text);
  }
}

TEST_CASE("serve: it says how to call it, and a signal ends it with status 0") {
  const Answering a;
  const std::filesystem::path log = a.m.dir() / "log", keys = a.m.dir() / "keys";
  write_file(keys, "the-key\n");
  ServeProcess server(
      concat("answers=", a.dir, " --port 0 --threads 1 --verbose --api-key-file ", keys.string()),
      log);
  REQUIRE_MESSAGE(server.says("ready: http://127.0.0.1:"), server.text());
  const int port = server.port();
  CHECK(contains(server.text(), concat("http://127.0.0.1:", port, " in a browser, ")));
  // The line that it prints works in a shell.
  std::string curl = server.text();
  curl = curl.substr(curl.find("  curl "));
  curl = curl.substr(0, curl.find('\n'));
  const Output out = shell("KEY=the-key; " + curl + " -s --max-time 60");
  CHECK(out.status == 0);
  CHECK_MESSAGE(contains(out.text, "\"model\":\"answers\""), out.text);
  // A port that is taken.
  const Output busy = shell(concat("./serve ", a.dir, " --port ", port));
  CHECK(busy.status == 1);
  CHECK_MESSAGE(contains(busy.text, "--port"), busy.text);
  CHECK_MESSAGE(contains(busy.text, std::to_string(port)), busy.text);
  CHECK(server.says("POST /v1/chat/completions 200"));
  CHECK(!contains(server.text(), "the-key"));
  server.signal(SIGTERM);
  CHECK(server.status() == 0);
  CHECK_MESSAGE(server.text().ends_with("stopped\n"), server.text());
}
