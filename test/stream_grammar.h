// What an answer of the API must look like, checked to the last key: server-sent chunks, or one
// JSON. Both become an ApiAnswer, so that a test can compare them.
//
//     read_stream(bytes, rules) == read_whole(json, rules)
//
// Any deviation is an Error that names the event or the key.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "cake/generate.h"
#include "cake/json.h"
#include "cake/run.h"

namespace cake {

struct AnswerRules {  // what the request asked for
  bool chat = true;
  int choices = 1;
  bool include_usage = false;
  int top_logprobs = -1;  // -1: no log-probabilities
  bool echo_ids = false;  // echo of a prompt that was given as ids: entry 0 is null
  bool token_details = false;
};

struct ApiChoice {
  std::string text, reasoning;     // content or text, and reasoning_content
  OrderedJson calls, results;      // arrays: tool_calls without their ids, cake_tools
  OrderedJson entries, reasoned;   // of logprobs: content and reasoning_content
  std::vector<std::string> names;  // of a completion's logprobs
  OrderedJson logprobs, tops, offsets;
  OrderedJson ids;  // an array where token_ids were asked for
  std::string finish;
  int chunks = 0;  // with text
  bool operator==(const ApiChoice& b) const {
    return text == b.text && reasoning == b.reasoning && calls == b.calls && results == b.results &&
           entries == b.entries && reasoned == b.reasoned && names == b.names &&
           logprobs == b.logprobs && tops == b.tops && offsets == b.offsets && ids == b.ids &&
           finish == b.finish;
  }
};

struct ApiAnswer {
  std::string id, model, fingerprint;
  int64_t created = 0, seed = 0;
  std::vector<ApiChoice> choices;
  OrderedJson usage;  // null where it was not asked for
  std::string error;  // of a stream that ended with an error
  int keep_alives = 0;
  bool operator==(const ApiAnswer& b) const {  // but for names and times
    return model == b.model && fingerprint == b.fingerprint && seed == b.seed &&
           choices == b.choices && error == b.error;
  }
};

namespace grammar {

using Keys = std::vector<std::string>;

inline std::string short_json(const OrderedJson& json) {
  const std::string text = json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
  return text.size() <= 200 ? text : text.substr(0, 200) + "...";
}

// An object with these keys, of which those that end in ? may be absent.
inline void expect_keys(const OrderedJson& json, const Keys& keys, const std::string& where) {
  if (!json.is_object()) fail(where, ": found ", short_json(json), ", expected an object");
  std::set<std::string> known;
  for (std::string key : keys) {
    const bool optional = key.ends_with('?');
    if (optional) key.pop_back();
    known.insert(key);
    if (!optional && !json.contains(key)) fail(where, ": found no ", key, " in ", short_json(json));
  }
  for (const auto& item : json.items()) {
    if (!known.count(item.key())) fail(where, ": found the key ", item.key());
  }
}

inline void expect(bool good, const std::string& where, const OrderedJson& found,
                   const char* expected) {
  if (!good) fail(where, ": found ", short_json(found), ", expected ", expected);
}

inline std::string string_at(const OrderedJson& json, const char* key, const std::string& where) {
  if (!json.contains(key) || !json.at(key).is_string())
    fail(where, ": ", key, ": expected a string in ", short_json(json));
  return json.at(key);
}

inline std::string decoded(const std::string& bytes) {
  std::string text;
  Utf8Stream stream;
  stream.feed(bytes, text);
  stream.finish(text);
  return text;
}

inline void check_logprob(const OrderedJson& json, const std::string& where) {
  expect(json.is_number_float(), where, json, "a number with a point");
  const double x = json.get<double>();
  expect(x >= -9999 && x <= 1e-3, where, json, "-9999 to 0");
}

inline std::string entry_bytes(const OrderedJson& entry, const std::string& where) {
  std::string bytes;
  expect(entry.at("bytes").is_array(), where, entry, "bytes as an array");
  for (const OrderedJson& b : entry["bytes"]) {
    expect(b.is_number_unsigned() && b.get<uint64_t>() < 256, where, b, "a byte");
    bytes += char(b.get<int>());
  }
  return bytes;
}

// An entry of a chat's logprobs, or one of its top_logprobs: then `top` is -1. Appends its bytes.
// `is_first`: of a prompt that was given as ids.
inline void check_entry(const OrderedJson& entry, int top, bool details, std::string& bytes,
                        const std::string& where, bool is_first = false) {
  Keys keys = {"token", "logprob", "bytes"};
  if (top >= 0) keys.push_back("top_logprobs");
  if (details) keys.insert(keys.end(), {"id", "special"});
  if (details && top >= 0) keys.push_back("rank");
  expect_keys(entry, keys, where);
  if (details) {
    expect(entry["id"].is_number_unsigned(), where, entry, "an id");
    expect(entry["special"].is_boolean(), where, entry, "whether it is special");
  }
  const std::string own = entry_bytes(entry, where);
  const std::string token = string_at(entry, "token", where);
  expect(decoded(own) == own ? token == own : token.starts_with("bytes:"), where, entry,
         "the bytes' text as the token");
  bytes += own;
  if (is_first) {
    expect(entry["logprob"].is_null() && entry["rank"].is_null() && entry["top_logprobs"].empty(),
           where, entry, "no score of a text's first token");
    return;
  }
  check_logprob(entry["logprob"], where + ": logprob");
  if (top < 0) return;
  if (details) {
    expect(entry["rank"].is_number_unsigned() && entry["rank"] > 0, where, entry, "a rank");
  }
  const OrderedJson& tops = entry["top_logprobs"];
  expect(tops.is_array() && int(tops.size()) == top, where, tops,
         concat(top, " top_logprobs").c_str());
  double last = 1;
  for (const OrderedJson& t : tops) {
    std::string others;
    check_entry(t, -1, details, others, where + ": top_logprobs");
    expect(t["logprob"].get<double>() <= last, where, tops, "the likeliest first");
    last = t["logprob"].get<double>();
  }
}

// The bytes of a token's name in a completion's logprobs.
inline std::string name_bytes(const std::string& name) {
  if (!name.starts_with("bytes:")) return name;
  std::string bytes;
  for (size_t i = 6; i < name.size();) {
    const bool escaped = name.compare(i, 2, "\\x") == 0 && i + 4 <= name.size();
    bytes += escaped ? char(std::stoi(name.substr(i + 2, 2), nullptr, 16)) : name[i];
    i += escaped ? 4 : 1;
  }
  return bytes;
}

inline void add_chat_logprobs(ApiChoice& choice, const OrderedJson& json,
                              const std::string& where) {
  expect_keys(json, {"content", "refusal", "reasoning_content?"}, where);
  expect(json["content"].is_array(), where, json, "an array as content");
  expect(json["refusal"].is_null(), where, json, "refusal null");
  for (const OrderedJson& entry : json["content"]) choice.entries.push_back(entry);
  if (!json.contains("reasoning_content")) return;
  expect(json["reasoning_content"].is_array() && !json["reasoning_content"].empty(), where, json,
         "some entries as reasoning_content");
  for (const OrderedJson& entry : json["reasoning_content"]) choice.reasoned.push_back(entry);
}

inline void add_completion_logprobs(ApiChoice& choice, const OrderedJson& json, bool details,
                                    const std::string& where) {
  Keys keys = {"tokens", "token_logprobs", "top_logprobs", "text_offset"};
  if (details) keys.push_back("content");  // one for each of the others
  expect_keys(json, keys, where);
  const size_t n = json["tokens"].size();
  for (const auto& item : json.items()) {
    expect(item.value().is_array() && item.value().size() == n, where, json, "arrays of one size");
  }
  for (size_t i = 0; i < n; i++) {
    expect(json["tokens"][i].is_string(), where, json["tokens"][i], "a string as token");
    choice.names.push_back(json["tokens"][i]);
    choice.logprobs.push_back(json["token_logprobs"][i]);
    choice.tops.push_back(json["top_logprobs"][i]);
    choice.offsets.push_back(json["text_offset"][i]);
    if (details) choice.entries.push_back(json["content"][i]);
  }
}

// What holds for all entries of a choice together.
inline void check_logprobs(const ApiChoice& choice, const AnswerRules& rules,
                           const std::string& where) {
  if (rules.top_logprobs < 0) return;
  std::string bytes, reasoned;
  const int top = rules.top_logprobs;
  const bool details = rules.token_details;
  for (size_t i = 0; i < choice.entries.size(); i++) {
    check_entry(choice.entries[i], top, details, bytes, where, rules.echo_ids && i == 0);
  }
  for (const OrderedJson& e : choice.reasoned) check_entry(e, top, details, reasoned, where);
  if (!rules.chat && details) {  // what the lists hold too
    expect(decoded(bytes) == choice.text, where + ": bytes of the entries", decoded(bytes),
           choice.text.c_str());
    for (size_t i = 0; i < choice.names.size(); i++) {
      const OrderedJson& e = choice.entries[i];
      expect(e["token"] == choice.names[i] && e["logprob"] == choice.logprobs[i], where, e,
             "the token and the number of the lists");
    }
    bytes.clear();
  }
  for (const std::string& name : choice.names) bytes += name_bytes(name);
  expect(decoded(bytes) == choice.text, where + ": bytes", decoded(bytes), choice.text.c_str());
  expect(decoded(reasoned) == choice.reasoning, where + ": bytes of the reasoning",
         decoded(reasoned), choice.reasoning.c_str());
  // text_offset: of the character in which the token begins
  std::vector<size_t> begins;  // bytes -> character, of the text
  int64_t last = 0;
  const int64_t characters = std::count_if(choice.text.begin(), choice.text.end(),
                                           [](char c) { return (c & 0xc0) != 0x80; });
  std::string before;
  for (size_t i = 0; i < choice.names.size(); i++) {
    const std::string place = concat(where, ": entry ", i);
    const OrderedJson& offset = choice.offsets[i];
    expect(offset.is_number_unsigned(), place, offset, "text_offset");
    const int64_t x = offset.get<int64_t>();
    expect(x >= last && x < std::max<int64_t>(1, characters), place, offset,
           "a larger text_offset");
    last = x;
    if (decoded(before) == before) {  // the token begins with a character
      const auto n =
          std::count_if(before.begin(), before.end(), [](char c) { return (c & 0xc0) != 0x80; });
      expect(x == n, place, offset, concat("text_offset ", n).c_str());
    }
    before += name_bytes(choice.names[i]);
    const OrderedJson &own = choice.logprobs[i], &top = choice.tops[i];
    if (rules.echo_ids && i == 0) {
      expect(own.is_null() && top.is_null(), place, top, "null");
      continue;
    }
    check_logprob(own, place);
    expect(top.is_object(), place, top, "an object as top_logprobs");
    expect(int(top.size()) >= std::max(1, rules.top_logprobs) &&
               int(top.size()) <= rules.top_logprobs + 1,
           place, top, "as many as asked for, and the sampled one");
    for (const auto& item : top.items()) check_logprob(item.value(), place);
    expect(top.contains(choice.names[i]) && top.at(choice.names[i]) == own, place, top,
           "the sampled token with its number");
  }
}

inline void check_usage(const OrderedJson& usage, const std::string& where) {
  expect_keys(usage,
              {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details",
               "completion_tokens_details?"},
              where);
  expect_keys(usage["prompt_tokens_details"], {"cached_tokens"}, where);
  for (const char* key : {"prompt_tokens", "completion_tokens", "total_tokens"}) {
    expect(usage[key].is_number_unsigned(), where, usage, "counts");
  }
  const int64_t prompt = usage["prompt_tokens"], sampled = usage["completion_tokens"];
  expect(usage["total_tokens"] == prompt + sampled, where, usage, "their sum");
  expect(usage["prompt_tokens_details"]["cached_tokens"].is_number_unsigned() &&
             usage["prompt_tokens_details"]["cached_tokens"] <= prompt,
         where, usage, "cached_tokens of prompt_tokens");
  if (!usage.contains("completion_tokens_details")) return;
  const OrderedJson& details = usage["completion_tokens_details"];
  expect_keys(details, {"reasoning_tokens"}, where);
  expect(details["reasoning_tokens"].is_number_unsigned() && details["reasoning_tokens"] > 0 &&
             details["reasoning_tokens"] <= sampled,
         where, usage, "reasoning_tokens of completion_tokens");
}

inline void read_head(ApiAnswer& answer, const OrderedJson& json, const AnswerRules& rules,
                      const std::string& object, const std::string& where) {
  expect(json["object"] == object, where, json["object"], object.c_str());
  const std::string id = string_at(json, "id", where);
  const std::string prefix = rules.chat ? "chatcmpl-" : "cmpl-";
  const auto letter = [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
  };
  expect(id.starts_with(prefix) && id.size() >= prefix.size() + 24 &&
             std::all_of(id.begin() + long(prefix.size()), id.end(), letter),
         where, id, "an id of 24 letters and digits at least");
  expect(json["created"].is_number_unsigned(), where, json["created"], "seconds");
  expect(json["seed"].is_number_integer(), where, json["seed"], "an integer");
  ApiAnswer head;
  head.id = id, head.model = string_at(json, "model", where);
  head.fingerprint = string_at(json, "system_fingerprint", where);
  head.created = json["created"], head.seed = json["seed"];
  const bool is_first = answer.id.empty();
  if (!is_first && (head.id != answer.id || head.model != answer.model ||
                    head.fingerprint != answer.fingerprint || head.created != answer.created ||
                    head.seed != answer.seed)) {
    fail(where, ": found another id, model, created, seed or system_fingerprint than before");
  }
  answer.id = head.id, answer.model = head.model, answer.fingerprint = head.fingerprint;
  answer.created = head.created, answer.seed = head.seed;
}

inline void add_call(ApiChoice& choice, OrderedJson call, std::set<std::string>& ids,
                     const std::string& where) {
  const std::string id = string_at(call, "id", where);
  expect(id.starts_with("call_") && id.size() >= 13 && ids.insert(id).second, where, id,
         "an id call_... of its own");
  expect(call["type"] == "function", where, call, "type function");
  expect_keys(call["function"], {"name", "arguments"}, where);
  expect(!string_at(call["function"], "name", where).empty(), where, call, "a name");
  const std::string arguments = string_at(call["function"], "arguments", where);
  expect(OrderedJson::parse(arguments, nullptr, false).is_object(), where, arguments,
         "a string that holds a JSON object");
  choice.calls.push_back(call["function"]);
}

inline void add_results(ApiChoice& choice, const OrderedJson& results, const std::string& where) {
  expect(results.is_array() && !results.empty(), where, results, "some results");
  for (const OrderedJson& r : results) {
    expect_keys(r, {"name", "arguments", "result", "turn"}, where);
    for (const char* key : {"name", "arguments", "result"}) string_at(r, key, where);
    expect(r["turn"].is_number_unsigned(), where, r["turn"], "the number of a turn");
    choice.results.push_back(r);
  }
}

inline void add_ids(ApiChoice& choice, const OrderedJson& ids, const std::string& where) {
  expect(ids.is_array(), where, ids, "an array of ids");
  if (choice.ids.is_null()) choice.ids = OrderedJson::array();
  for (const OrderedJson& id : ids) choice.ids.push_back(id);
}

inline void check_finish(ApiChoice& choice, const OrderedJson& finish, const std::string& where) {
  const bool known = finish == "stop" || finish == "length" || finish == "tool_calls";
  expect(known, where, finish, "stop, length or tool_calls");
  expect(choice.calls.empty() ? finish != "tool_calls" : finish != "stop", where, finish,
         "tool_calls with calls and no others");
  choice.finish = finish;
}

inline void read_delta(ApiChoice& choice, bool begun, const OrderedJson& delta, bool has_entries,
                       std::set<std::string>& ids, const std::string& where) {
  expect(delta.is_object(), where, delta, "an object");
  if (!begun) {
    const OrderedJson first{{"role", "assistant"}, {"content", ""}};
    return expect(delta == first, where, delta, "the role with empty content first");
  }
  if (delta.empty()) return;
  expect(delta.size() == 1, where, delta, "one key");
  const std::string key = delta.begin().key();
  const OrderedJson& value = delta.begin().value();
  if (key == "content" || key == "reasoning_content") {
    expect(value.is_string() && (value != "" || has_entries), where, delta, "some text");
    (key == "content" ? choice.text : choice.reasoning) += value.get<std::string>();
    choice.chunks++;
  } else if (key == "tool_calls") {
    expect(value.is_array() && value.size() == 1, where, delta, "a call");
    expect_keys(value[0], {"index", "id", "type", "function"}, where);
    expect(value[0]["index"] == choice.calls.size(), where, delta, "the calls' numbers in order");
    add_call(choice, value[0], ids, where);
  } else if (key == "cake_tools") {
    add_results(choice, value, where);
  } else {
    fail(where, ": found the key ", key, " in a delta");
  }
}

}  // namespace grammar

// The events of a stream, from its first byte to its last. Error for what is no whole answer.
inline ApiAnswer read_stream(std::string_view bytes, const AnswerRules& rules) {
  using namespace grammar;
  ApiAnswer answer;
  answer.choices.resize(size_t(rules.choices));
  std::vector<bool> begun(size_t(rules.choices), !rules.chat);
  std::set<std::string> ids;
  bool done = false, has_usage = false;
  for (int number = 0; !bytes.empty(); number++) {
    const std::string where = concat("event ", number);
    const size_t end = bytes.find("\n\n");
    if (!bytes.starts_with("data: ") || end == std::string_view::npos) {
      fail(where, ": found ", json_text(bytes), ", expected \"data: ...\\n\\n\"");
    }
    const std::string_view data = bytes.substr(6, end - 6);
    bytes.remove_prefix(end + 2);
    if (done || !answer.error.empty()) fail(where, ": found it behind the last one");
    if (data.find_first_of("\r\n") != data.npos) fail(where, ": found a line end in ", data);
    if (data == "[DONE]") {
      done = true;
      continue;
    }
    const OrderedJson json = parse_json<OrderedJson>(data, where);
    if (json.is_object() && json.contains("error")) {
      expect_keys(json, {"error"}, where);
      expect_keys(json["error"], {"message", "type", "param", "code"}, where);
      answer.error = string_at(json["error"], "message", where);
      expect(!answer.error.empty(), where, json, "a message");
      string_at(json["error"], "type", where);
      continue;
    }
    Keys keys = {"id", "object", "created", "model", "system_fingerprint", "seed", "choices"};
    if (rules.include_usage) keys.push_back("usage");
    expect_keys(json, keys, where);
    read_head(answer, json, rules, rules.chat ? "chat.completion.chunk" : "text_completion", where);
    expect(json["choices"].is_array() && json["choices"].size() <= 1, where, json, "one choice");
    if (has_usage) fail(where, ": found a chunk behind usage, expected [DONE]");
    if (json["choices"].empty()) {
      expect(rules.include_usage, where, json, "a choice: usage was not asked for");
      check_usage(json["usage"], where);
      answer.usage = json["usage"];
      has_usage = true;
      continue;
    }
    if (rules.include_usage) expect(json["usage"].is_null(), where, json["usage"], "usage null");
    const OrderedJson& item = json["choices"][0];
    expect_keys(item,
                {"index", rules.chat ? "delta" : "text", "logprobs", "finish_reason", "token_ids?"},
                where);
    expect(item["index"].is_number_unsigned() && item["index"] < rules.choices, where,
           item["index"], "the number of a choice");
    const size_t index = item["index"];
    ApiChoice& choice = answer.choices[index];
    const std::string place = concat(where, ": choice ", index);
    if (item.contains("token_ids")) add_ids(choice, item["token_ids"], place);
    if (!choice.finish.empty()) fail(place, ": found more behind its finish_reason");
    const OrderedJson& logprobs = item["logprobs"];
    if (rules.top_logprobs < 0) expect(logprobs.is_null(), place, logprobs, "logprobs null");
    const bool has_text = rules.chat ? begun[index] && (item["delta"].contains("content") ||
                                                        item["delta"].contains("reasoning_content"))
                                     : !item["text"].empty() && item["text"] != "";
    if (has_text) {
      expect(rules.top_logprobs < 0 || logprobs.is_object(), place, item, "logprobs");
      expect(item["finish_reason"].is_null(), place, item, "finish_reason null beside text");
    } else if (rules.chat) {
      expect(logprobs.is_null(), place, item, "logprobs beside text only");
    }
    if (!logprobs.is_null()) {
      rules.chat ? add_chat_logprobs(choice, logprobs, place)
                 : add_completion_logprobs(choice, logprobs, rules.token_details, place);
    }
    if (rules.chat) {
      const bool has_entries = logprobs.is_object() && (!logprobs["content"].empty() ||
                                                        logprobs.contains("reasoning_content"));
      read_delta(choice, begun[index], item["delta"], has_entries, ids, place);
    } else {
      choice.text += string_at(item, "text", place);
      choice.chunks += has_text;
    }
    if (!item["finish_reason"].is_null()) {
      expect(rules.chat ? begun[index] && item["delta"].empty() : item["text"] == "", place, item,
             "no text beside finish_reason");
      expect(logprobs.is_null(), place, item, "no logprobs beside finish_reason");
      check_finish(choice, item["finish_reason"], place);
    } else if (rules.chat ? begun[index] && item["delta"].empty()
                          : !has_text && logprobs.is_null()) {
      answer.keep_alives++;
    }
    begun[index] = true;
  }
  if (!answer.error.empty()) return answer;
  if (!done) fail("the stream: found its end, expected [DONE]");
  if (rules.include_usage != has_usage) fail("the stream: found no usage");
  for (size_t i = 0; i < answer.choices.size(); i++) {
    const std::string place = concat("choice ", i);
    if (answer.choices[i].finish.empty()) fail(place, ": found no finish_reason");
    check_logprobs(answer.choices[i], rules, place);
  }
  return answer;
}

// An answer that is not streamed.
inline ApiAnswer read_whole(const std::string& text, const AnswerRules& rules) {
  using namespace grammar;
  ApiAnswer answer;
  const OrderedJson json = parse_json<OrderedJson>(text, "the answer");
  if (text.find('\n') != std::string::npos && text.find('\n') + 1 != text.size())
    fail("the answer: found line ends");
  expect_keys(
      json, {"id", "object", "created", "model", "system_fingerprint", "seed", "choices", "usage"},
      "the answer");
  read_head(answer, json, rules, rules.chat ? "chat.completion" : "text_completion", "the answer");
  check_usage(json["usage"], "usage");
  answer.usage = json["usage"];
  expect(json["choices"].is_array() && int(json["choices"].size()) == rules.choices, "choices",
         json["choices"], concat(rules.choices).c_str());
  std::set<std::string> ids;
  for (size_t i = 0; i < json["choices"].size(); i++) {
    const std::string where = concat("choices[", i, "]");
    const OrderedJson& item = json["choices"][i];
    ApiChoice choice;
    expect_keys(
        item, {"index", rules.chat ? "message" : "text", "logprobs", "finish_reason", "token_ids?"},
        where);
    if (item.contains("token_ids")) add_ids(choice, item["token_ids"], where);
    expect(item["index"] == i, where, item["index"], "its place as index");
    if (rules.chat) {
      const OrderedJson& message = item["message"];
      expect_keys(
          message,
          {"role", "content", "refusal", "reasoning_content?", "tool_calls?", "cake_tools?"},
          where);
      expect(message["role"] == "assistant" && message["refusal"].is_null(), where, message,
             "the role assistant and refusal null");
      const OrderedJson& content = message["content"];
      if (content.is_null()) {
        expect(message.contains("tool_calls"), where, message, "content or calls");
      } else {
        choice.text = string_at(message, "content", where);
      }
      if (message.contains("reasoning_content")) {
        choice.reasoning = string_at(message, "reasoning_content", where);
        expect(!choice.reasoning.empty(), where, message, "some reasoning");
      }
      if (message.contains("tool_calls")) {
        expect(message["tool_calls"].is_array() && !message["tool_calls"].empty(), where, message,
               "some calls");
        for (const OrderedJson& call : message["tool_calls"]) {
          expect_keys(call, {"id", "type", "function"}, where);
          add_call(choice, call, ids, where);
        }
      }
      if (message.contains("cake_tools")) add_results(choice, message["cake_tools"], where);
    } else {
      choice.text = string_at(item, "text", where);
    }
    if (rules.top_logprobs < 0) {
      expect(item["logprobs"].is_null(), where, item["logprobs"], "logprobs null");
    } else if (rules.chat) {
      add_chat_logprobs(choice, item["logprobs"], where);
    } else {
      add_completion_logprobs(choice, item["logprobs"], rules.token_details, where);
    }
    check_finish(choice, item["finish_reason"], where);
    check_logprobs(choice, rules, where);
    answer.choices.push_back(std::move(choice));
  }
  return answer;
}

}  // namespace cake
