// Requests of the API: JSON -> ApiCall -> Requests.
//
//     body --read_body--> JSON --read_chat, read_completion--> ApiCall
//          --make_requests--> one Request for each choice, with the ids of its prompt
//
// kFields is the list of all fields: name, endpoints, type, range, and what a field does. Unknown
// fields are ignored. A known field is checked for type and range, and null means that it is
// absent. A known field whose effect does not exist here is refused, unless its value asks for
// nothing (an empty suffix). Every error is an ApiError whose `param` is the field's path.
#include "cake/serve.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <utility>

#include "cake/json_text.h"

namespace cake {
namespace {

constexpr double kNoLimit = 0x1p63;  // of integers of 64 bits

// ---------------------------------------------------------------------------------------------
// Values: what is found in place of what is expected

// A value as an error shows it: short, one line, ASCII.
std::string found(const OrderedJson& value) {
  if (value.is_array()) return concat("an array of ", value.size());
  if (value.is_object()) return "an object";
  if (value.is_string()) return json_text(value.get_ref<const std::string&>().substr(0, 60));
  return json_text(Json(value));
}

[[noreturn]] void refuse(const std::string& path, const std::string& found,
                         const std::string& expected) {
  bad_request(path, concat(path, ": found ", found, ", expected ", expected));
}

// The member, or nullptr where it is absent or null.
const OrderedJson* find(const OrderedJson& object, const std::string& key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

std::string item_path(const std::string& list, size_t i) { return concat(list, "[", i, "]"); }

enum class Type { boolean, integer, number, text, list, object, any };

bool is_a(const OrderedJson& value, Type type) {
  switch (type) {
    case Type::boolean:
      return value.is_boolean();
    case Type::number:
      return value.is_number();
    case Type::text:
      return value.is_string();
    case Type::list:
      return value.is_array();
    case Type::object:
      return value.is_object();
    case Type::any:
      return true;
    case Type::integer:
      break;
  }
  if (value.is_number_integer()) return true;
  if (!value.is_number()) return false;
  const double x = value.get<double>();  // 5.0 is an integer in JSON Schema, and some write it so
  return x == std::floor(x) && std::fabs(x) <= 0x1p53;
}

const char* type_name(Type type) {
  constexpr const char* kNames[] = {"true or false", "an integer", "a number", "a string",
                                    "an array",      "an object",  "a value"};
  return kNames[int(type)];
}

const OrderedJson& check_type(const OrderedJson& value, Type type, const std::string& path) {
  if (!is_a(value, type)) refuse(path, found(value), type_name(type));
  return value;
}

void check_range(const OrderedJson& value, Type type, double min, double max,
                 const std::string& path) {
  const double x = value.get<double>();
  constexpr auto kLargest = uint64_t(std::numeric_limits<int64_t>::max());
  if (value.is_number_unsigned() && value.get<uint64_t>() > kLargest) {
    refuse(path, found(value), "an integer below 2^63");
  }
  if (x >= min && x <= max) return;
  const bool has_end = max < kNoLimit;
  refuse(path, found(value),
         concat(type_name(type),
                has_end ? concat(" from ", min, " to ", max) : concat(" of at least ", min)));
}

const OrderedJson& member(const OrderedJson& object, const std::string& key, Type type,
                          const std::string& path) {
  const OrderedJson* value = find(object, key);
  if (!value) bad_request(path + key, concat(path, key, " is missing, expected ", type_name(type)));
  return check_type(*value, type, path + key);
}

int64_t integer_of(const OrderedJson& value) {
  return value.is_number_float() ? int64_t(value.get<double>()) : value.get<int64_t>();
}

// As Python's json.dumps(value, ensure_ascii=False) writes it, which is how templates show tools.
std::string python_text(const OrderedJson& value) {
  simdjson::dom::parser parser;
  return python_json(parser.parse(simdjson::padded_string(value.dump())).value());
}

// ---------------------------------------------------------------------------------------------
// The body

// The whole body, so that no error can quote half a character.
void check_utf8(std::string_view body) {
  for (size_t i = 0, bad = 1; i < body.size();) {
    const size_t length = body[i] & 0x80 ? utf8_length(body, i, bad) : 1;
    if (length == 0) {
      bad_request("", concat("body: found bytes that are no UTF-8 at byte ", i, ", expected JSON"));
    }
    i += length;
  }
}

// Brackets and keys, before a tree is built of them: to add a key to an object, the tree compares
// it with all that are there, and to print a value, it calls itself for each level.
void check_shape(std::string_view body, const ApiLimits& limits) {
  std::vector<int> keys(size_t(limits.depth) + 1);  // of the open object of each level
  size_t depth = 0;
  for (size_t i = 0; i < body.size(); i++) {
    const char c = body[i];
    if (c == '"') {
      while (++i < body.size() && body[i] != '"') i += body[i] == '\\';
    } else if (c == '[' || c == '{') {
      if (++depth > size_t(limits.depth)) {
        bad_request("", concat("body: found more than ", limits.depth,
                               " levels of brackets at byte ", i, ", expected fewer"));
      }
      keys[depth] = 0;
    } else if (c == ']' || c == '}') {
      depth -= depth > 0;
    } else if (c == ':' && ++keys[depth] > limits.keys) {
      bad_request("", concat("body: found more than ", limits.keys, " keys in an object at byte ",
                             i, ", expected fewer"));
    }
  }
}

}  // namespace

OrderedJson read_body(const std::string& body, const ApiLimits& limits) {
  if (body.empty()) bad_request("", "body: found nothing, expected a JSON object");
  check_utf8(body);
  check_shape(body, limits);
  OrderedJson json;
  try {
    json = OrderedJson::parse(body);
  } catch (const OrderedJson::exception& e) {
    const std::string text = json_complaint(e);  // what it read last may be long
    bad_request("",
                "body: not JSON: " + text.substr(0, std::min(text.find("; last"), size_t(200))));
  }
  if (!json.is_object()) {
    bad_request("", concat("body: found ", found(json), ", expected a JSON object"));
  }
  return json;
}

std::string requested_model(const OrderedJson& body) {
  const OrderedJson* model = find(body, "model");
  return model ? check_type(*model, Type::text, "model").get<std::string>() : "";
}

namespace {

// ---------------------------------------------------------------------------------------------
// The fields

enum Endpoints { kChat = 1, kCompletions = 2, kBoth = 3, kNextToken = 4 };

struct Reading {
  ApiCall call;
  const ServedModel& model;
  const ApiLimits& limits;
  // What several fields decide together.
  bool logprobs = false;           // chat's
  int top_logprobs = -1;           // chat's; -1: not given
  int64_t best_of = -1;            // -1: not given
  bool wants_tools = true;         // by tool_choice
  std::string max_tokens_name;     // the field that set call.max_tokens
  std::vector<std::string> tools;  // of the request
};

struct Field {
  const char* name;
  Endpoints endpoints;
  Type type;
  void (*read)(Reading&, const OrderedJson& value, const std::string& path);
  double min = 0, max = 0;  // of a number
};

void read_n(Reading& r, const OrderedJson& value, const std::string&) {
  r.call.n = int(std::min<int64_t>(integer_of(value), std::numeric_limits<int>::max()));
}
void read_best_of(Reading& r, const OrderedJson& value, const std::string&) {
  r.best_of = integer_of(value);
}
void read_max_tokens(Reading& r, const OrderedJson& value, const std::string& path) {
  r.call.max_tokens = integer_of(value);
  r.call.default_tokens = 0;
  r.max_tokens_name = path;
}
void read_seed(Reading& r, const OrderedJson& value, const std::string&) {
  r.call.has_seed = true;
  r.call.sampling.seed = uint64_t(integer_of(value));
}
void read_top_k(Reading& r, const OrderedJson& value, const std::string&) {
  const int64_t all = r.model.text.tokenizer.vocab_size();
  r.call.sampling.top_k = int(std::clamp<int64_t>(integer_of(value), 0, all));
}
void read_repetition_penalty(Reading& r, const OrderedJson& value, const std::string&) {
  r.call.sampling.repetition_penalty = value.get<float>();
}
void read_stream_options(Reading& r, const OrderedJson& value, const std::string& path) {
  if (const OrderedJson* usage = find(value, "include_usage")) {
    r.call.include_usage = check_type(*usage, Type::boolean, path + ".include_usage").get<bool>();
  }
}
void read_stop(Reading& r, const OrderedJson& value, const std::string& path) {
  const auto add = [&](const OrderedJson& stop, const std::string& where) {
    const std::string text = check_type(stop, Type::text, where).get<std::string>();
    if (text.empty() || text.size() > r.limits.stop_bytes) {
      refuse(where, concat(text.size(), " bytes"), concat("1 to ", r.limits.stop_bytes));
    }
    r.call.stop.push_back(text);
  };
  if (value.is_string()) return add(value, path);
  if (!value.is_array()) refuse(path, found(value), "a string or an array of strings");
  if (value.size() > size_t(r.limits.stop_strings)) {
    refuse(path, concat(value.size(), " strings"), concat("at most ", r.limits.stop_strings));
  }
  for (size_t i = 0; i < value.size(); i++) add(value[i], item_path(path, i));
}
// {"token id": bias}
void read_logit_bias(Reading& r, const OrderedJson& value, const std::string& path) {
  const int vocab = r.model.text.tokenizer.vocab_size();
  for (const auto& [key, bias] : value.items()) {
    const int id = std::atoi(key.c_str());
    const bool is_id = id >= 0 && id < vocab && std::to_string(id) == key;  // each id once
    if (!is_id) refuse(path, found(key), concat("token ids from 0 to ", vocab - 1));
    const std::string where = concat(path, ".", key);
    check_range(check_type(bias, Type::number, where), Type::number, -100, 100, where);
    r.call.logit_bias.push_back({id, bias.get<float>()});
  }
}
void read_logprobs(Reading& r, const OrderedJson& value, const std::string&) {
  r.logprobs = value.get<bool>();
}
void read_top_logprobs(Reading& r, const OrderedJson& value, const std::string&) {
  r.top_logprobs = int(integer_of(value));
}
void read_top(Reading& r, const OrderedJson& value, const std::string&) {
  r.call.next_tokens = int(integer_of(value));
}
void read_logprobs_count(Reading& r, const OrderedJson& value, const std::string&) {
  r.call.top_logprobs = int(integer_of(value));
}

// Fields whose effect does not exist here: values that ask for nothing pass.
void read_suffix(Reading&, const OrderedJson& value, const std::string& path) {
  if (value != "") refuse(path, found(value), "none: the models here write behind a text alone");
}
void read_response_format(Reading&, const OrderedJson& value, const std::string& path) {
  const OrderedJson& type = member(value, "type", Type::text, path + ".");
  if (type != "text") {
    refuse(path + ".type", found(type), "\"text\": there is no constrained sampling here");
  }
}
void refuse_grammar(Reading&, const OrderedJson& value, const std::string& path) {
  if (value != "") refuse(path, found(value), "none: there is no constrained sampling here");
}
void read_modalities(Reading&, const OrderedJson& value, const std::string& path) {
  for (size_t i = 0; i < value.size(); i++) {
    if (value[i] != "text") refuse(item_path(path, i), found(value[i]), "\"text\"");
  }
}
void refuse_functions(Reading&, const OrderedJson& value, const std::string& path) {
  const bool is_neutral = value.empty() || value == "none" || value == "auto";
  if (!is_neutral) refuse(path, found(value), "none: `tools` and `tool_choice` replace it");
}

// Tools of the client. Each is kept as the JSON inside of "function".
void read_tools(Reading& r, const OrderedJson& value, const std::string& path) {
  for (size_t i = 0; i < value.size(); i++) {
    const std::string where = item_path(path, i);
    const OrderedJson& tool = check_type(value[i], Type::object, where);
    const OrderedJson& type = member(tool, "type", Type::text, where + ".");
    if (type != "function") refuse(where + ".type", found(type), "\"function\"");
    const OrderedJson& function = member(tool, "function", Type::object, where + ".");
    const std::string inner = where + ".function.";
    if (member(function, "name", Type::text, inner) == "") {
      refuse(inner + "name", "\"\"", "a name");
    }
    const std::pair<const char*, Type> optional[] = {
        {"description", Type::text}, {"parameters", Type::object}, {"strict", Type::boolean}};
    for (const auto& [key, optional_type] : optional) {
      if (const OrderedJson* found = find(function, key)) {
        check_type(*found, optional_type, inner + key);
      }
    }
    r.tools.push_back(python_text(function));
  }
}
void read_tool_choice(Reading& r, const OrderedJson& value, const std::string& path) {
  if (!value.is_string() && !value.is_object()) {
    refuse(path, found(value), "\"none\" or \"auto\"");
  }
  if (value != "none" && value != "auto") {
    refuse(path, found(value), "\"none\" or \"auto\": no model here can be made to call a tool");
  }
  r.wants_tools = value == "auto";
}

std::vector<int> read_ids(const OrderedJson& value, int vocab, const std::string& path) {
  if (value.empty()) refuse(path, "no tokens", "at least one");
  std::vector<int> ids;
  for (size_t i = 0; i < value.size(); i++) {
    const std::string where = item_path(path, i);
    check_type(value[i], Type::integer, where);
    check_range(value[i], Type::integer, 0, vocab - 1, where);
    ids.push_back(int(integer_of(value[i])));
  }
  return ids;
}

void read_answer_ids(Reading& r, const OrderedJson& value, const std::string& path) {
  r.call.answer_ids = read_ids(value, r.model.text.tokenizer.vocab_size(), path);
  if (r.call.continues) {
    refuse(path, concat(value.size(), " ids"), "none behind a last message of the assistant");
  }
}

// A text, ids, or a list of texts or of ids.
void read_prompt(Reading& r, const OrderedJson& value, const std::string& path) {
  const auto add = [&](const OrderedJson& prompt, const std::string& where) {
    if (prompt.is_array()) {
      r.call.prompts.emplace_back(read_ids(prompt, r.model.text.tokenizer.vocab_size(), where));
    } else if (prompt.is_string()) {
      const bool is_empty = prompt == "" && r.model.text.document_start < 0;
      if (is_empty) refuse(where, "\"\"", "text: the tokenizer has no token to begin a text with");
      r.call.prompts.emplace_back(prompt.get<std::string>());
    } else {
      refuse(where, found(prompt), "a string or an array of token ids");
    }
  };
  const bool is_list = value.is_array() && !value.empty() && !value[0].is_number();
  if (!is_list) return add(value, path);
  if (value.size() > size_t(r.limits.max_choices)) {
    refuse(path, concat(value.size(), " prompts"), concat("at most ", r.limits.max_choices));
  }
  for (size_t i = 0; i < value.size(); i++) add(value[i], item_path(path, i));
}

// A member of the call, or of its sampling, that is the value itself.
template <auto kMember>
void set(Reading& r, const OrderedJson& value, const std::string&) {
  value.get_to(r.call.*kMember);
}
template <auto kMember>
void set_sampling(Reading& r, const OrderedJson& value, const std::string&) {
  value.get_to(r.call.sampling.*kMember);
}
void no_effect(Reading&, const OrderedJson&, const std::string&) {}

// More variables for the chat template, as vLLM's field of this name: {"enable_thinking": false}.
void read_template_variables(Reading& r, const OrderedJson& value, const std::string& path) {
  if (!r.model.text.chat) return;  // check_template() refuses the call
  const ChatTemplate& chat = *r.model.text.chat;
  TemplateOptions options = chat.options();
  options.variables.update(value);
  try {
    r.call.chat_template =
        ChatTemplate(chat.tokenizer(), chat.text(), chat.name(), std::move(options));
  } catch (const Error& e) {
    bad_request(path, concat(path, ": ", e.what()));
  }
}

constexpr Field kFields[] = {
    {"model", kBoth, Type::text, no_effect},     // read before: requested_model()
    {"messages", kChat, Type::list, no_effect},  // read before: read_messages()
    {"answer_ids", kChat, Type::list, read_answer_ids},
    {"chat_template_kwargs", kChat, Type::object, read_template_variables},
    {"prompt", kCompletions, Type::any, read_prompt},
    {"stream", kBoth, Type::boolean, set<&ApiCall::stream>},
    {"stream_options", kBoth, Type::object, read_stream_options},
    {"n", kBoth, Type::integer, read_n, 1, kNoLimit},
    {"best_of", kCompletions, Type::integer, read_best_of, 1, kNoLimit},

    // Where an answer ends. -1: the default. The newer name wins.
    {"max_tokens", kBoth, Type::integer, read_max_tokens, -1, kNoLimit},
    {"max_completion_tokens", kBoth, Type::integer, read_max_tokens, -1, kNoLimit},
    {"stop", kBoth, Type::any, read_stop},

    // How tokens are drawn. The defaults are the model's.
    {"seed", kBoth, Type::integer, read_seed, -kNoLimit, kNoLimit},
    {"temperature", kBoth, Type::number, set_sampling<&Sampling::temperature>, 0, 2},
    {"top_p", kBoth, Type::number, set_sampling<&Sampling::top_p>, 0, 1},
    {"top_k", kBoth, Type::integer, read_top_k, -1, kNoLimit},  // -1: all, as 0
    {"min_p", kBoth, Type::number, set_sampling<&Sampling::min_p>, 0, 1},
    {"repetition_penalty", kBoth, Type::number, read_repetition_penalty, .1, 10},
    {"repeat_penalty", kBoth, Type::number, read_repetition_penalty, .1, 10},
    {"presence_penalty", kBoth, Type::number, set<&ApiCall::presence_penalty>, -2, 2},
    {"frequency_penalty", kBoth, Type::number, set<&ApiCall::frequency_penalty>, -2, 2},
    {"logit_bias", kBoth, Type::object, read_logit_bias},

    // What the answer says about its tokens.
    {"logprobs", kChat, Type::boolean, read_logprobs},
    {"top_logprobs", kChat, Type::integer, read_top_logprobs, 0, 20},
    {"logprobs", kCompletions, Type::integer, read_logprobs_count, 0, 20},
    // Of cake alone: entries in the form of a chat, with ids, ranks and kinds, in both endpoints.
    {"token_details", kBoth, Type::boolean, set<&ApiCall::token_details>},
    {"echo", kCompletions, Type::boolean, set<&ApiCall::echo>},
    {"return_token_ids", kBoth, Type::boolean, set<&ApiCall::return_ids>},
    {"top", kNextToken, Type::integer, read_top, 0, 1000},

    // Tools.
    {"tools", kChat, Type::list, read_tools},
    {"tool_choice", kChat, Type::any, read_tool_choice},
    {"parallel_tool_calls", kChat, Type::boolean, set<&ApiCall::parallel_calls>},
    {"functions", kChat, Type::list, refuse_functions},
    {"function_call", kChat, Type::any, refuse_functions},

    // The form of the answer.
    {"response_format", kBoth, Type::object, read_response_format},
    {"grammar", kBoth, Type::any, refuse_grammar},
    {"json_schema", kBoth, Type::any, refuse_grammar},
    {"structured_outputs", kBoth, Type::any, refuse_grammar},
    {"modalities", kChat, Type::list, read_modalities},
    {"suffix", kCompletions, Type::text, read_suffix},
};

void read_fields(const OrderedJson& body, int endpoint, Reading& r) {
  for (const Field& field : kFields) {
    const OrderedJson* value = field.endpoints & endpoint ? find(body, field.name) : nullptr;
    if (!value) continue;
    check_type(*value, field.type, field.name);
    if (field.type == Type::integer || field.type == Type::number) {
      check_range(*value, field.type, field.min, field.max, field.name);
    }
    field.read(r, *value, field.name);
  }
}

// What two fields or more decide together.
void check_fields(Reading& r) {
  ApiCall& call = r.call;
  const int64_t prompts = call.chat ? 1 : int64_t(call.prompts.size());
  if (prompts * call.n > r.limits.max_choices) {
    refuse(call.n > 1 ? "n" : "prompt", concat(prompts * call.n, " choices"),
           concat("at most ", r.limits.max_choices, ", n times the number of prompts"));
  }
  if (r.best_of >= 0 && r.best_of != call.n) {
    refuse("best_of", concat(r.best_of), concat("n, which is ", call.n, ": all are returned"));
  }
  if (call.max_tokens == 0 && !call.echo) {
    refuse(r.max_tokens_name, "0", "an integer of at least 1, or -1 for as many as fit");
  }
  if (call.chat) {
    if (r.top_logprobs > 0 && !r.logprobs) {
      bad_request("top_logprobs", "top_logprobs: logprobs is not true, expected both or none");
    }
    if (r.logprobs) call.top_logprobs = std::max(0, r.top_logprobs);
  }
  if (call.token_details && call.top_logprobs < 0) {
    bad_request("token_details", "token_details: logprobs is not given, expected both or none");
  }
  if (call.sampling.top_p == 0) call.sampling.top_p = 1, call.sampling.top_k = 1;
  if (!call.has_seed) {  // 53 bits, which every client reads back without a loss
    std::random_device random;
    call.sampling.seed = (uint64_t(random()) << 32 | random()) >> 11;
  }
}

// ---------------------------------------------------------------------------------------------
// Messages

// A string, or the texts of parts, joined.
std::string read_content(const OrderedJson& value, const std::string& path) {
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) refuse(path, found(value), "a string or an array of parts");
  std::string content;
  for (size_t i = 0; i < value.size(); i++) {
    const std::string where = item_path(path, i);
    const OrderedJson& part = check_type(value[i], Type::object, where);
    const OrderedJson& type = member(part, "type", Type::text, where + ".");
    if (type != "text") {
      refuse(where + ".type", found(type), "\"text\": the models here read text alone");
    }
    content += member(part, "text", Type::text, where + ".").get<std::string>();
  }
  return content;
}

struct ReadMessage {
  Message message;
  std::vector<std::string> call_ids;  // of an assistant's calls; "" where one has none
  std::string answered_id;            // a tool's: of the call that it answers
};

std::string read_id(const OrderedJson& object, const std::string& key, const std::string& path) {
  const OrderedJson* id = find(object, key);
  return id ? check_type(*id, Type::text, path + key).get<std::string>() : "";
}

// {"id", "type": "function", "function": {"name", "arguments"}}, where the arguments are JSON as a
// string, or an object. A model may have written a string that is no JSON: it is shown as it was.
ToolCall read_call(const OrderedJson& value, const std::string& path) {
  const OrderedJson& call = check_type(value, Type::object, path);
  if (const OrderedJson* type = find(call, "type"); type && *type != "function") {
    refuse(path + ".type", found(*type), "\"function\"");
  }
  const OrderedJson& function = member(call, "function", Type::object, path + ".");
  const std::string inner = path + ".function.";
  ToolCall result{member(function, "name", Type::text, inner).get<std::string>(), "{}"};
  const OrderedJson* arguments = find(function, "arguments");
  if (!arguments || *arguments == "") return result;
  if (!arguments->is_string() && !arguments->is_object()) {
    refuse(inner + "arguments", found(*arguments), "an object of JSON as a string");
  }
  result.arguments =
      arguments->is_string() ? arguments->get<std::string>() : python_text(*arguments);
  return result;
}

void read_assistant(const OrderedJson& value, const std::string& path, ReadMessage& out) {
  for (const char* key : {"reasoning", "reasoning_content"}) {  // both, of some servers: the same
    if (const OrderedJson* reasoning = find(value, key)) {
      out.message.reasoning =
          check_type(*reasoning, Type::text, concat(path, ".", key)).get<std::string>();
    }
  }
  const OrderedJson* calls = find(value, "tool_calls");
  if (!calls) return;
  const std::string where = path + ".tool_calls";
  check_type(*calls, Type::list, where);
  for (size_t i = 0; i < calls->size(); i++) {
    out.message.tool_calls.push_back(read_call((*calls)[i], item_path(where, i)));
    out.call_ids.push_back(read_id((*calls)[i], "id", item_path(where, i) + "."));
  }
}

ReadMessage read_message(const OrderedJson& value, const std::string& path) {
  check_type(value, Type::object, path);
  const std::string role = member(value, "role", Type::text, path + ".").get<std::string>();
  ReadMessage out{.message = {.role = role == "developer" ? "system" : role}};
  const std::string& known = out.message.role;
  if (known != "system" && known != "user" && known != "assistant" && known != "tool") {
    refuse(path + ".role", found(role), "system, developer, user, assistant or tool");
  }
  const OrderedJson* content = find(value, "content");
  if (content) out.message.content = read_content(*content, path + ".content");
  if (!content && known != "assistant") {
    bad_request(path + ".content", concat(path, ".content is missing, expected a string"));
  }
  if (known == "assistant") read_assistant(value, path, out);
  if (known == "tool") out.answered_id = read_id(value, "tool_call_id", path + ".");
  return out;
}

// The tool messages behind the calls of messages[called], in the order of the calls: the template
// does not say which answer belongs to which call. Returns how many they are.
size_t add_answers(const std::vector<ReadMessage>& messages, size_t called, Conversation& out) {
  const std::vector<std::string>& ids = messages[called].call_ids;
  std::vector<const Message*> answers(ids.size());
  size_t i = called + 1;
  for (; i < messages.size() && messages[i].message.role == "tool"; i++) {
    const std::string& id = messages[i].answered_id;
    size_t call = 0;
    const auto matches = [&] { return id.empty() || ids[call].empty() || ids[call] == id; };
    while (call < ids.size() && (answers[call] || !matches())) call++;
    if (call == ids.size()) {
      refuse(item_path("messages", i) + ".tool_call_id", found(id),
             "the id of one of the calls before it, each answered once");
    }
    answers[call] = &messages[i].message;
  }
  for (size_t call = 0; call < ids.size(); call++) {
    if (!answers[call]) {
      refuse(item_path(item_path("messages", called) + ".tool_calls", call),
             "a call without an answer", "a message of the role tool behind it");
    }
    out.messages.push_back(*answers[call]);
  }
  return ids.size();
}

// Users may speak twice in a row, and system messages stand anywhere but between calls and answers.
void add_messages(const std::vector<ReadMessage>& messages, Conversation& out) {
  for (size_t i = 0; i < messages.size(); i++) {
    const Message& message = messages[i].message;
    const std::string path = item_path("messages", i) + ".role";
    if (message.role == "tool") {
      refuse(path, "tool", "the answer to a call of the assistant's message before it");
    }
    if (message.role == "assistant" && i > 0 && messages[i - 1].message.role == "assistant") {
      refuse(path, "assistant behind assistant", "a message of the user between them");
    }
    out.messages.push_back(message);
    if (!message.tool_calls.empty()) i += add_answers(messages, i, out);
  }
}

// `continues`: the last message is the assistant's.
Conversation read_messages(const OrderedJson& body, bool& continues, const ApiLimits& limits) {
  const OrderedJson& list = member(body, "messages", Type::list, "");
  if (list.empty()) refuse("messages", "none", "at least one");
  if (list.size() > size_t(limits.messages)) {
    refuse("messages", concat(list.size()), concat("at most ", limits.messages));
  }
  std::vector<ReadMessage> messages;
  for (size_t i = 0; i < list.size(); i++) {
    messages.push_back(read_message(list[i], item_path("messages", i)));
  }
  Conversation conversation;
  add_messages(messages, conversation);
  continues = messages.back().message.role == "assistant";
  return conversation;
}

// ---------------------------------------------------------------------------------------------
// Calls

std::string name_of(const std::string& tool) { return Json::parse(tool).at("name"); }

// The request's tools, and the server's that have other names.
void add_tools(Reading& r) {
  if (!r.wants_tools) return;
  std::set<std::string> names;
  for (const std::string& tool : r.tools) names.insert(name_of(tool));
  r.call.has_tools = !r.tools.empty();
  r.call.conversation.tools = std::move(r.tools);
  if (r.model.tools.empty()) return;  // of a base model, too
  const ChatTemplate& chat = template_of(r.call, r.model);
  if (!chat.has_tools() || chat.find_end_of_turn() < 0) return;  // by chat_template_kwargs
  for (const std::string& tool : r.model.tools) {
    if (!names.insert(name_of(tool)).second) continue;
    r.call.conversation.tools.push_back(tool);
    r.call.server_tools.push_back(name_of(tool));
  }
}

void check_template(const Reading& r) {
  const Conversation& c = r.call.conversation;
  if (!r.model.text.chat) {
    bad_request("model", concat("model: ", r.model.id,
                                " is a base model, which answers no messages: /v1/completions "
                                "continues a text, and ./serve --template makes a chat of it"));
  }
  const ChatTemplate& chat = template_of(r.call, r.model);
  if (chat.has_tools()) {
    // A text would end such a turn, behind which no tools run.
    const bool ends_by_text = !r.call.server_tools.empty() && !r.call.parallel_calls &&
                              r.model.text.tokenizer.special("</tool_call>") < 0;
    if (!ends_by_text) return;
    refuse(
        "parallel_tool_calls", "false",
        "true: with tools of the server, a tokenizer without </tool_call> cannot end such turns");
  }
  const std::string without =
      concat("none: ", chat.name(), " has no calls between <tool_call> and </tool_call>");
  if (r.call.has_tools) refuse("tools", concat(c.tools.size(), " tools"), without);
  for (size_t i = 0; i < c.messages.size(); i++) {
    const std::string path = item_path("messages", i);
    if (c.messages[i].role == "tool") refuse(path + ".role", "tool", without);
    if (!c.messages[i].tool_calls.empty()) refuse(path + ".tool_calls", "a call", without);
  }
}

// Whether the prompt ends with reasoning that the template itself has begun: "<think>\n".
bool ends_in_reasoning(const Rendered& prompt, const Tokenizer& tokenizer) {
  size_t begin = prompt.ids.size();
  while (begin > 0 && prompt.origins[begin - 1] == jinja::Origin{}) begin--;
  const std::string text = tokenizer.decode(std::span(prompt.ids).subspan(begin));
  const size_t open = text.rfind("<think>");
  return open != std::string::npos && text.find("</think>", open) == std::string::npos;
}
// Whether the text of an answer that goes on is reasoning so far.
bool is_reasoning(const Message& message) {
  const std::string_view text = strip(message.content);
  return text.starts_with("<think>") && text.find("</think>") == std::string_view::npos;
}

// The conversation by the template, which may refuse it.
void render_conversation(ApiCall& call, const ServedModel& model) {
  const ChatTemplate& chat = template_of(call, model);
  Conversation c = call.conversation;
  if (call.continues) {  // white space would be a token of its own in front of the next word
    std::string& answer = c.messages.back().content;
    answer = std::string(strip(answer));
  }
  Rendered header;  // what ends with the header of a turn
  try {
    call.rendered = call.continues ? chat.render_open(c) : chat.render(c, true);
    if (!call.continues) header = call.rendered;
    if (call.continues && !call.server_tools.empty() && c.messages.size() > 1) {
      Conversation before = c;
      before.messages.pop_back();
      header = chat.render(before, true);
    }
  } catch (const Error& e) {
    bad_request("messages", concat("messages: ", e.what()));
  }
  call.turns_begin_in_reasoning = ends_in_reasoning(header, model.text.tokenizer);
  call.in_reasoning =
      call.continues ? is_reasoning(c.messages.back()) : call.turns_begin_in_reasoning;
}

// What the server's tools put behind the last turn of answer_ids is added, where it is missing.
void add_tool_ids(ApiCall& call, const ServedModel& model) {
  const std::vector<BegunTurn> turns = begun_turns(call, model);
  if (!is_complete(call, model)) return;
  const auto turn = std::span<const int>(call.answer_ids).subspan(turns.back().begin);
  const std::vector<int> more = ids_behind_turn(call, model, turn);
  call.answer_ids.insert(call.answer_ids.end(), more.begin(), more.end());
}

ApiCall read_api_call(const OrderedJson& body, Endpoints endpoint, bool next_token,
                      const ServedModel& model, const ApiLimits& limits) {
  const bool chat = endpoint == kChat;
  Reading r{.call = {.chat = chat,
                     .model = requested_model(body),
                     .default_tokens = chat ? 0 : 16,
                     .sampling = model.sampling,
                     .next_token = next_token},
            .model = model,
            .limits = limits};
  if (chat) r.call.conversation = read_messages(body, r.call.continues, limits);
  if (!chat) member(body, "prompt", Type::any, "");
  read_fields(body, next_token ? endpoint | kNextToken : endpoint, r);
  if (chat) add_tools(r);
  check_fields(r);
  if (!chat) return std::move(r.call);
  check_template(r);
  render_conversation(r.call, model);
  add_tool_ids(r.call, model);
  return std::move(r.call);
}

}  // namespace

ApiCall read_chat(const OrderedJson& body, const ServedModel& model, const ApiLimits& limits) {
  return read_api_call(body, kChat, false, model, limits);
}

ApiCall read_completion(const OrderedJson& body, const ServedModel& model,
                        const ApiLimits& limits) {
  return read_api_call(body, kCompletions, false, model, limits);
}

ApiCall read_next_token(const OrderedJson& body, const ServedModel& model,
                        const ApiLimits& limits) {
  const bool chat = find(body, "messages"), text = find(body, "prompt");
  if (chat == text) {
    bad_request(chat ? "messages" : "prompt", concat("found ", chat ? "both" : "neither",
                                                     " of prompt and messages, expected one"));
  }
  ApiCall call = read_api_call(body, chat ? kChat : kCompletions, true, model, limits);
  if (call.prompts.size() > 1) refuse("prompt", concat(call.prompts.size(), " prompts"), "one");
  if (call.n > 1) refuse("n", concat(call.n), "1: there is one next token");
  if (call.stream) refuse("stream", "true", "false: the answer is one object");
  call.max_tokens = 1;
  call.top_logprobs = -1;
  return call;
}

const ChatTemplate& template_of(const ApiCall& call, const ServedModel& model) {
  return call.chat_template ? *call.chat_template : model.text.chat.value();
}

std::vector<int> end_ids(const ApiCall& call, const ServedModel& model) {
  std::vector<int> ids = model.text.stop_ids;
  if (call.chat) add_stop_id(ids, template_of(call, model).find_end_of_turn());
  return ids;
}

namespace {

bool has_tools(const ApiCall& call) { return call.has_tools || !call.server_tools.empty(); }

// The ids that end a turn, or its first call.
std::vector<int> turn_ends(const ApiCall& call, const ServedModel& model) {
  std::vector<int> ids = end_ids(call, model);
  if (has_tools(call) && !call.parallel_calls) {
    add_stop_id(ids, model.text.tokenizer.special("</tool_call>"));
  }
  return ids;
}

// The strings that end an answer beside those of the request.
std::vector<std::string> turn_end_strings(const ApiCall& call, const ServedModel& model) {
  std::vector<std::string> strings;
  if (!call.chat) return strings;
  const ChatTemplate& chat = template_of(call, model);
  if (!chat.stop_string().empty()) strings.push_back(chat.stop_string());
  const bool has_token = model.text.tokenizer.special("</tool_call>") >= 0;
  if (has_tools(call) && !call.parallel_calls && !has_token) strings.push_back("</tool_call>");
  return strings;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Tools that run on the server

bool runs_on_server(const ApiCall& call, const Message& turn) {
  const std::vector<std::string>& names = call.server_tools;
  if (names.empty() || turn.tool_calls.empty()) return false;
  if (!call.has_tools) return true;  // a call of something else has an answer that says so
  return std::all_of(turn.tool_calls.begin(), turn.tool_calls.end(), [&](const ToolCall& c) {
    return std::find(names.begin(), names.end(), c.name) != names.end();
  });
}

std::vector<ToolResult> run_calls(const ServedModel& model, const Message& turn) {
  std::vector<ToolResult> results;
  for (const ToolCall& call : turn.tool_calls) {
    results.push_back({call, run_tool(call, model.search.get())});
  }
  return results;
}

std::vector<int> ids_behind_turn(const ApiCall& call, const ServedModel& model,
                                 std::span<const int> ids) {
  if (call.server_tools.empty()) return {};
  const ChatTemplate& chat = template_of(call, model);
  Message turn = read_turn(chat, ids);
  if (!runs_on_server(call, turn)) return {};
  Conversation c = call.conversation;
  if (call.continues) {
    turn.content = c.messages.back().content + turn.content;
    c.messages.pop_back();
  }
  const std::vector<ToolResult> results = run_calls(model, turn);
  // A template may refuse a call that is none. What it writes behind the turn is the same.
  for (ToolCall& written : turn.tool_calls) {
    if (!Json::parse(written.arguments, nullptr, false).is_object()) written.arguments = "{}";
  }
  c.messages.push_back(std::move(turn));
  for (const ToolResult& r : results) c.messages.push_back({.role = "tool", .content = r.result});
  std::vector<int> next = chat.ids_behind_turn(c);
  // A turn that was ended behind its first call lacks the id that ends turns.
  const int end = chat.end_of_turn();
  if (ids.back() != end) next.insert(next.begin(), end);
  return next;
}

std::vector<BegunTurn> begun_turns(const ApiCall& call, const ServedModel& model) {
  std::vector<BegunTurn> turns;
  const std::span<const int> ids = call.answer_ids;
  const std::vector<int> stops = turn_ends(call, model);
  for (size_t begin = 0, end = 0; end < ids.size(); end++) {
    const bool ended = std::find(stops.begin(), stops.end(), ids[end]) != stops.end();
    if (!ended && end + 1 < ids.size()) continue;
    turns.push_back({begin, end + 1, end + 1, ended});
    if (end + 1 == ids.size()) break;
    const std::vector<int> more = ids_behind_turn(call, model, ids.subspan(begin, end + 1 - begin));
    const std::span<const int> rest = ids.subspan(end + 1);
    if (more.empty() || rest.size() < more.size() ||
        !std::equal(more.begin(), more.end(), rest.begin())) {
      const std::string path = item_path("answer_ids", end);
      refuse(path, concat(ids[end], ", the end of a turn"),
             "no id behind it but those of the server's tools");
    }
    begin = end + 1 + more.size();
    turns.back().next = begin;
    end = begin - 1;
  }
  return turns;
}

bool is_complete(const ApiCall& call, const ServedModel& model) {
  if (call.answer_ids.empty()) return false;
  const BegunTurn turn = begun_turns(call, model).back();
  return turn.ended && turn.next == turn.end;
}

std::string held_bytes(const ApiCall& call, const ServedModel& model) {
  if (call.answer_ids.empty()) return "";
  Utf8Stream characters;
  std::string text;
  const BegunTurn turn = begun_turns(call, model).back();
  for (size_t i = turn.begin; i < turn.end && !turn.ended; i++) {
    characters.feed(model.text.tokenizer.token_bytes(call.answer_ids[i]), text);
  }
  return characters.held();
}

namespace {

OnTurn run_tools(const ApiCall& call, const ServedModel& model) {
  const ApiCall tools{.conversation = call.conversation,
                      .chat_template = call.chat_template,
                      .continues = call.continues,
                      .has_tools = call.has_tools,
                      .server_tools = call.server_tools};
  return [tools, &model](int, std::span<const int> ids) -> std::vector<int> {
    return ids_behind_turn(tools, model, ids);
  };
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Prompts and requests

std::vector<int> prompt_of(const ApiCall& call) {
  std::vector<int> ids = call.rendered.ids;
  ids.insert(ids.end(), call.answer_ids.begin(), call.answer_ids.end());
  return ids;
}

std::vector<PromptOrigin> prompt_origins(const ApiCall& call, const ServedModel& model) {
  constexpr const char* kSources[] = {"template",  "role",      "content",
                                      "reasoning", "tool_call", "tools"};
  std::vector<PromptOrigin> origins;
  for (const jinja::Origin& o : call.rendered.origins) {
    origins.push_back({kSources[int(o.source)], o.message});
  }
  const int message = int(call.conversation.messages.size());
  for (const BegunTurn& turn : begun_turns(call, model)) {
    origins.insert(origins.end(), turn.end - turn.begin, {"answer", message});
    origins.insert(origins.end(), turn.next - turn.end, {"result", message});
  }
  return origins;
}

namespace {

// How many tokens may follow a prompt of `n` tokens.
int answer_tokens(const ApiCall& call, const ServedModel& model, const ApiLimits& limits,
                  int64_t n) {
  const int64_t room = model.context - n, wanted = call.max_tokens;
  if (room < std::max<int64_t>(1, wanted)) {
    ApiError e(400, "invalid_request_error", "context_length_exceeded",
               call.chat ? "messages" : "prompt",
               concat("found a prompt of ", n, " tokens",
                      wanted > 0 ? concat(" and max_tokens of ", wanted) : "", ", expected ",
                      wanted > 0 ? "a sum of at most " : "fewer than ", model.context,
                      ", the context of ", model.id));
    e.more = {{"n_prompt_tokens", n}, {"n_ctx", model.context}};
    throw e;
  }
  int64_t most = wanted >= 0 ? wanted : room;
  if (wanted < 0 && call.default_tokens > 0) most = std::min(most, call.default_tokens);
  if (limits.max_tokens > 0) most = std::min(most, limits.max_tokens);
  return int(std::max<int64_t>(1, most));  // the engine samples one at least
}

Request request_for(const ApiCall& call, const ServedModel& model, const ApiLimits& limits,
                    std::vector<int> prompt) {
  Request request;
  request.max_new = answer_tokens(call, model, limits, int64_t(prompt.size()));
  request.max_inserted = call.server_tools.empty() ? 0 : model.context - int(prompt.size());
  request.prompt = std::move(prompt);
  request.held_bytes = held_bytes(call, model);
  request.sampling = call.sampling;
  request.sampling.vocab = model.text.tokenizer.vocab_size();
  request.presence_penalty = call.presence_penalty;
  request.frequency_penalty = call.frequency_penalty;
  request.logit_bias = call.logit_bias;
  request.top_logprobs = call.top_logprobs;
  request.score_prompt = call.echo && call.top_logprobs >= 0;
  request.want_distribution = call.next_token;
  request.stop_ids = turn_ends(call, model);
  request.stop_strings = turn_end_strings(call, model);
  request.stop_strings.insert(request.stop_strings.end(), call.stop.begin(), call.stop.end());
  return request;
}

}  // namespace

std::vector<Request> make_requests(const ApiCall& call, const ServedModel& model,
                                   const ApiLimits& limits) {
  std::vector<std::vector<int>> prompts;
  if (call.chat) prompts.push_back(prompt_of(call));
  for (const auto& prompt : call.prompts) {
    const std::string* text = std::get_if<std::string>(&prompt);
    prompts.push_back(text ? document_ids(model.text, *text) : std::get<std::vector<int>>(prompt));
  }
  std::vector<Request> requests;
  for (std::vector<int>& prompt : prompts) {
    Request request = request_for(call, model, limits, std::move(prompt));
    if (!call.server_tools.empty()) request.on_turn = run_tools(call, model);
    for (int choice = 0; choice < call.n; choice++) {
      request.sampling.stream = uint64_t(choice);
      requests.push_back(request);
    }
  }
  return requests;
}

}  // namespace cake
