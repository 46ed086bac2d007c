// Models whose answers are known, and the four ways to ask ./serve for them.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "test/chatml.h"
#include "test/serve_support.h"
#include "test/stream_grammar.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// The models: made once for a test binary, removed at its end.
//
// - script: what follows a prompt of n tokens is written down below; all else is "x".
// - endless: "x" and never the end of a turn, for 4,096 tokens.
// - random: random weights; its texts differ with the seed.

inline const std::string kSentence =
    "The answer is 42. The answer is 43, user: na\xC3\xAFve \xF0\x9F\x98\x80!";

struct ServeModels {
  ScriptedModel scripted{1024}, long_one{4096};
  std::string script, endless, random;
  std::map<std::string, int> prompts;  // tokens of the prompt that a text follows, by its name

  const Tokenizer& tokenizer() const { return scripted.tokenizer(); }
  std::vector<int> bytes_of(const std::string& text) const {  // one id for each byte
    std::vector<int> ids;
    for (const char byte : text) ids.push_back(tokenizer().encode(std::string(1, byte)).at(0));
    return ids;
  }
  // The same text as tokens of other lengths: some of the tokenizer's own, some cut into bytes.
  std::vector<int> divided(const std::string& text, uint64_t seed) const {
    Rng rng{seed};
    std::vector<int> ids;
    for (size_t i = 0; i < text.size();) {
      const size_t n = std::min<size_t>(1 + rng.below(7), text.size() - i);
      for (const int id : tokenizer().encode(text.substr(i, n))) ids.push_back(id);
      i += n;
    }
    return ids;
  }
  ServeModels() {
    int n = 64;
    const int end = tokenizer().special("<|im_end|>");
    const auto add = [&](const std::string& name, std::vector<int> ids) {
      prompts[name] = n;
      ids.push_back(end);
      n = scripted.write(n, ids) + 1;
    };
    add("merged", tokenizer().encode(kSentence));
    add("bytes", bytes_of(kSentence));
    for (int i = 0; i < 3; i++) add(concat("divided", i), divided(kSentence, uint64_t(i)));
    add("emoji", bytes_of("a\xF0\x9F\x98\x80"
                          "b"));
    add("broken", bytes_of("a\x80\xF0\x9F"
                           "b\xE2\x82"));
    add("held", bytes_of("The answer is 4"));
    add("hello", tokenizer().encode("Hello."));
    REQUIRE(n < 1000);
    script = scripted.save("script");
    endless = long_one.save("endless");
    random = save_random_model(scripted, "random");
    for (const std::string& model : {script, random}) {  // as chat models say it
      Json config = read_json(model + "/config.json");
      config["eos_token_id"] = end;
      write_json(model + "/config.json", OrderedJson(config));
    }
  }
  // A bias that keeps markers, such as <think>, out of sampled texts: their text is all content.
  OrderedJson without_markers() const {
    OrderedJson bias = OrderedJson::object();
    for (int id = 0; id < tokenizer().vocab_size(); id++) {
      const std::string_view text = tokenizer().token_bytes(id);
      if (text.starts_with("<") && text.ends_with(">") && text != "<|im_end|>") {
        bias[std::to_string(id)] = -100;
      }
    }
    return bias;
  }
  // Ids of a prompt that the named text follows.
  std::vector<int> prompt(const std::string& name) const { return prompt(prompts.at(name)); }
  std::vector<int> prompt(int n) const {
    return std::vector<int>(size_t(n), tokenizer().encode("~").at(0));
  }
  // The same for a chat: one message of the user.
  OrderedJson messages(const std::string& name) const {
    const auto size = [&](int n) {
      const Conversation c{.messages = {{.role = "user", .content = std::string(size_t(n), '~')}}};
      return int(chatml(tokenizer(), c, true).ids.size());
    };
    const int n = prompts.at(name) - size(1) + 1;
    REQUIRE(size(n) == prompts.at(name));
    return {{{"role", "user"}, {"content", std::string(size_t(n), '~')}}};
  }
};

inline const ServeModels& models() {
  static const ServeModels m;
  return m;
}

// ---------------------------------------------------------------------------------------------
// The four ways to ask: chat or completion, whole or streamed

struct Way {
  bool chat, stream;
};
inline constexpr Way kWays[] = {{true, false}, {true, true}, {false, false}, {false, true}};

inline std::string way_name(const Way& way) {
  return concat(way.chat ? "chat" : "completion", way.stream ? ", streamed" : ", whole");
}
inline const char* path_of(const Way& way) {
  return way.chat ? "/v1/chat/completions" : "/v1/completions";
}

// An answer whose every key was checked (test/stream_grammar.h), with its status. For another
// status than 200, `body` alone.
struct SentAnswer : ApiAnswer {
  int status = 0;
  std::string body;
};

// What a request asks for.
inline AnswerRules answer_rules(const Way& way, const OrderedJson& body) {
  AnswerRules rules{.chat = way.chat, .choices = body.value("n", 1)};
  if (!way.chat && body.at("prompt").is_array() && !body.at("prompt").at(0).is_number()) {
    rules.choices *= int(body.at("prompt").size());
  }
  rules.include_usage = way.stream && body.contains("stream_options") &&
                        body.at("stream_options").value("include_usage", false);
  if (way.chat && body.value("logprobs", false)) rules.top_logprobs = body.value("top_logprobs", 0);
  if (!way.chat) rules.top_logprobs = body.value("logprobs", -1);
  rules.echo_ids = !way.chat && body.value("echo", false) && body.at("prompt").is_array();
  return rules;
}

// The answer to a request that was written. Error for what is no whole answer to it.
inline SentAnswer read_answer(Connection& connection, const Way& way, const OrderedJson& body) {
  SentAnswer answer;
  const Reply reply = connection.read_reply();
  answer.status = reply.status, answer.body = reply.body;
  if (reply.status != 200) return answer;
  require(reply.complete, "an answer: found it cut");
  const AnswerRules rules = answer_rules(way, body);
  static_cast<ApiAnswer&>(answer) =
      way.stream ? read_stream(reply.body, rules) : read_whole(reply.body, rules);
  return answer;
}

inline SentAnswer answer_to(int port, const Way& way, OrderedJson body) {
  if (way.stream) {
    body["stream"] = true;
    body["stream_options"] = {{"include_usage", true}};
  }
  Connection connection(port);
  connection.write(http_post(path_of(way), body));
  return read_answer(connection, way, body);
}

// A request whose answer is the named text of the script.
inline OrderedJson scripted_request(const Way& way, const std::string& name) {
  OrderedJson body = {{"temperature", 0}, {"max_tokens", 200}};
  if (way.chat) {
    body["messages"] = models().messages(name);
  } else {
    body["prompt"] = models().prompt(name);
  }
  return body;
}

// The named text still comes: the server is alive and right.
inline void check_next_text(RunningServer& server) {
  for (const Way& way : kWays) {
    CAPTURE(way_name(way));
    const SentAnswer answer = answer_to(server.port(), way, scripted_request(way, "merged"));
    REQUIRE_MESSAGE(answer.status == 200, answer.body);
    CHECK(answer.choices.at(0).text == kSentence);
    CHECK(answer.choices.at(0).finish == "stop");
  }
}

}  // namespace cake
