// Conversations as people's files have them, and how they become messages.
//
//     Record (cake/records.h) --parse_conversation--> Conversation (cake/chat_template.h)
//                             --parse_training_text--> the same with an answer, or prompt and
//                                                      completion as plain text
//
// A list of messages stands under "messages", "conversation" or "conversations". A message is
//
//     {"role", "content"}                 OpenAI's, with "tool_calls" or the older "function_call"
//     {"from", "value"}                   ShareGPT's, with the roles human, gpt, function_call, ...
//     {"human", "assistant"}              a turn of both: ms-swift's
//     {"input", "output"}                 the same: XTuner's
//
// and beside the list stand "tools" (or "functions") and "system". What is read:
// - Roles. developer is system; human is user; gpt, model and bot are assistant; function,
//   observation, tool_response and ipython are tool; a message by function_call or tool_call is a
//   call of the assistant, as JSON.
// - Messages of one role in a row become one message, with an empty line between them, since the
//   templates of many models refuse them otherwise. Calls in a row become one message's calls.
// - What the assistant says before the user's first message is a greeting: it stays as context and
//   is not trained.
// - Contents are strings, null, or lists of parts of type text. Other parts are refused by name.
// - Reasoning is "reasoning_content", "reasoning" or "thinking", a part of type thinking, or the
//   content before </think>.
// - "weight" (OpenAI, Mistral, Together), "train", "training", "trainable" (axolotl), "loss"
//   (ms-swift) of an assistant's message: 0 or false leave it out of the loss. "masked": true does
//   too.
// --map renames the keys of a record and those of its messages.
#pragma once

#include <algorithm>
#include <cctype>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/messages.h"
#include "cake/records.h"

namespace cake {

// Calls visit(element) with the JSON value that a string holds: parquet's and LLaMA-Factory's files
// keep tools and messages so. `expected`: what it is to be, for the message.
template <class Visit>
void visit_json(std::string_view text, const char* expected, const std::string& where,
                Visit&& visit) {
  simdjson::dom::parser parser;
  simdjson::dom::element e;
  const bool is_json = parser.parse(simdjson::padded_string(text)).get(e) == simdjson::SUCCESS;
  require(is_json, where, ": found ", json_text(std::string(text)), ", expected ", expected);
  visit(e);
}

// The first of the fields that the record has; nullptr: it has none.
inline const char* first_field(const Record& record, std::initializer_list<const char*> fields,
                               simdjson::dom::element& value) {
  for (const char* field : fields)
    if (record.find(field, value)) return field;
  return nullptr;
}
inline bool find_any(const Record& record, std::initializer_list<const char*> fields,
                     simdjson::dom::element& value, std::string* found = nullptr) {
  const char* field = first_field(record, fields, value);
  if (field && found) *found = field;
  return field != nullptr;
}

// ---------------------------------------------------------------------------------------------
// Tools and calls

// The object inside OpenAI's {"type": "function", "function": {...}}, or the object itself.
inline simdjson::dom::element unwrap_function(simdjson::dom::element e, const std::string& where) {
  simdjson::dom::element inner;
  if (as_object(e, where).at_key("function").get(inner)) return e;
  as_object(inner, where + ": function");
  return inner;
}

// {"name", "arguments"}; the arguments are an object or its JSON as a string, and {} where they are
// absent, null or an empty string. Others call them "parameters" or, Anthropic, "input".
inline ToolCall parse_call(simdjson::dom::element e, const std::string& where) {
  const Record call{as_object(unwrap_function(e, where), where), where};
  ToolCall result{std::string(call.string("name")), "{}"};
  simdjson::dom::element arguments;
  if (!find_any(call, {"arguments", "parameters", "input"}, arguments)) return result;
  std::string_view text;
  if (arguments.get(text)) {
    result.arguments = python_json(arguments);
  } else if (!strip_ascii(text).empty()) {
    result.arguments = text;
  }
  return result;
}

// One call, a list of calls, or either as a string.
inline void add_calls(simdjson::dom::element e, std::vector<ToolCall>& calls,
                      const std::string& where) {
  std::string_view text;
  simdjson::dom::array list;
  if (!e.get(text)) {
    visit_json(text, "a call as JSON: {\"name\", \"arguments\"}", where,
               [&](simdjson::dom::element inner) {
                 require(!inner.is_string(), where, ": found a string in a string");
                 add_calls(inner, calls, where);
               });
  } else if (!e.get(list)) {
    size_t i = 0;
    for (const simdjson::dom::element call : list) {
      calls.push_back(parse_call(call, concat(where, "[", i++, "]")));
    }
  } else {
    calls.push_back(parse_call(e, where));
  }
}

// One tool, a list of tools, or either as a string.
inline void add_tools(simdjson::dom::element e, std::vector<std::string>& tools,
                      const std::string& where) {
  std::string_view text;
  simdjson::dom::array list;
  if (!e.get(text)) {
    if (strip_ascii(text).empty()) return;
    visit_json(text, "tools as JSON", where, [&](simdjson::dom::element inner) {
      require(!inner.is_string(), where, ": found a string in a string");
      if (!inner.is_null()) add_tools(inner, tools, where);
    });
  } else if (!e.get(list)) {
    size_t i = 0;
    for (const simdjson::dom::element tool : list) {
      add_tools(tool, tools, concat(where, "[", i++, "]"));
    }
  } else {
    tools.push_back(python_json(unwrap_function(e, where)));
  }
}

// A conversation's "tools", or the older "functions", if it has any.
inline std::vector<std::string> parse_tools(const Record& record) {
  std::vector<std::string> tools;
  simdjson::dom::element e;
  std::string key;
  if (find_any(record, {"tools", "functions"}, e, &key)) {
    add_tools(e, tools, concat(record.where, ": ", key));
  }
  return tools;
}

// ---------------------------------------------------------------------------------------------
// Messages

// The name of a role here, "call" for a message that is a call, or "" for a name that nobody uses.
inline std::string_view known_role(std::string_view name) {
  std::string lower(name);
  for (char& c : lower) c = char(std::tolower(static_cast<unsigned char>(c)));
  constexpr std::pair<std::string_view, std::string_view> kRoles[] = {{"system", "system"},
                                                                      {"developer", "system"},
                                                                      {"user", "user"},
                                                                      {"human", "user"},
                                                                      {"prompter", "user"},
                                                                      {"assistant", "assistant"},
                                                                      {"gpt", "assistant"},
                                                                      {"chatgpt", "assistant"},
                                                                      {"bing", "assistant"},
                                                                      {"bard", "assistant"},
                                                                      {"model", "assistant"},
                                                                      {"bot", "assistant"},
                                                                      {"chatbot", "assistant"},
                                                                      {"ai", "assistant"},
                                                                      {"tool", "tool"},
                                                                      {"function", "tool"},
                                                                      {"observation", "tool"},
                                                                      {"tool_response", "tool"},
                                                                      {"function_response", "tool"},
                                                                      {"tool_result", "tool"},
                                                                      {"ipython", "tool"},
                                                                      {"function_call", "call"},
                                                                      {"tool_call", "call"},
                                                                      {"tool_calls", "call"}};
  for (const auto& [other, role] : kRoles)
    if (lower == other) return role;
  return "";
}

// Adds a content to the message: a string, or a list of parts of text, reasoning and calls.
inline void add_content(simdjson::dom::element e, Message& message, const std::string& where) {
  std::string_view text;
  simdjson::dom::array parts;
  if (!e.get(text)) {
    message.content += text;
    return;
  }
  if (e.get(parts)) {
    // What a tool returned may be any JSON.
    require(message.role == "tool", where, ": found ", type_name(e), ", expected a string");
    message.content += python_json(e);
    return;
  }
  size_t i = 0;
  for (const simdjson::dom::element part : parts) {
    const std::string place = concat(where, "[", i++, "]");
    if (!part.get(text)) {
      message.content += text;
      continue;
    }
    const Record object{as_object(part, place), place};
    const std::string_view type = object.has("type") ? object.string("type") : "text";
    if (type == "text" || type == "input_text" || type == "output_text") {
      message.content += object.string("text");
    } else if (type == "thinking" || type == "reasoning") {
      message.reasoning += object.string(object.has("thinking") ? "thinking" : "text");
    } else if (type == "tool_use") {
      message.tool_calls.push_back(parse_call(part, place));
    } else {
      fail(place, ": found a part of type ", type, ", expected text: models read text alone here");
    }
  }
}

// Whether a message is trained, by whatever key says so; nothing where none does.
inline std::optional<bool> parse_trained(const Record& message) {
  std::optional<bool> trained;
  for (const char* key : {"weight", "train", "training", "trainable", "loss", "masked"}) {
    simdjson::dom::element e;
    if (!message.find(key, e)) continue;
    bool value = false;
    double number = 0;
    if (e.get(value)) {
      const bool is_mark = e.is_number() && !e.get(number) && (number == 0 || number == 1);
      require(is_mark, message.where, ": ", key, ": found ", std::string(simdjson::minify(e)),
              ", expected 0 or 1: a message is trained or it is not");
      value = number == 1;
    }
    value = value != (std::string_view(key) == "masked");
    require(!trained || *trained == value, message.where, ": ", key,
            ": found a message that is to be trained and not to be trained");
    trained = value;
  }
  for (const char* key : {"train_detail", "training_detail"}) {
    require(!message.has(key), message.where, ": ", key,
            ": found spans of a message, expected messages that are trained as a whole");
  }
  return trained;
}

// The text between the tags that a tool's message may bring with it, or the content itself.
inline std::string without_tags(const std::string& content) {
  std::string_view text = strip_ascii(content);
  constexpr std::string_view kBegin = "<tool_response>", kEnd = "</tool_response>";
  const bool has_tags = text.starts_with(kBegin) && text.ends_with(kEnd) &&
                        text.find(kBegin, 1) == std::string_view::npos;
  if (!has_tags) return content;
  text.remove_prefix(kBegin.size()), text.remove_suffix(kEnd.size());
  return std::string(strip_ascii(text));
}

// DeepSeek-R1's answers begin behind <think>, which its template writes: then the content before
// </think> is reasoning.
inline void split_open_reasoning(Message& message) {
  constexpr std::string_view kEnd = "</think>";
  const size_t end = message.content.find(kEnd);
  if (end == std::string::npos || !message.reasoning.empty()) return;
  if (message.content.find("<think>") < end) return;
  const std::string rest = message.content.substr(end + kEnd.size());
  if (!rest.empty() && rest[0] != '\n') return;
  message.reasoning = message.content.substr(0, end);
  message.content = rest;
}

// An object inside of a record, whose keys --map renames as the record's.
inline Record inner_record(simdjson::dom::element e, const std::string& where,
                           const Record* record) {
  return {as_object(e, where), where, record ? record->names : nullptr,
          record ? record->fields : nullptr};
}

// {"role", "content"} or {"from", "value"}.
inline Message parse_message(const Record& object) {
  const std::string& where = object.where;
  simdjson::dom::element e;
  std::string key;
  require(find_any(object, {"role", "from"}, e, &key), where, ": role is missing");
  const std::string_view name = element_as<std::string_view>(e, "a string", where + ": " + key);
  const std::string_view role = known_role(name);
  require(!role.empty(), where, ": ", key, ": found \"", name,
          "\", expected system, user, assistant or tool");
  Message message{.role = std::string(role == "call" ? "assistant" : role)};
  const bool has_content = find_any(object, {"content", "value", "text"}, e, &key);
  if (has_content && role == "call") {
    add_calls(e, message.tool_calls, concat(where, ": ", key));
  } else if (has_content) {
    add_content(e, message, concat(where, ": ", key));
  }
  for (const char* calls : {"tool_calls", "function_call"}) {
    if (object.find(calls, e)) add_calls(e, message.tool_calls, concat(where, ": ", calls));
  }
  if (message.role == "assistant") {
    if (find_any(object, {"reasoning_content", "reasoning", "thinking"}, e, &key)) {
      message.reasoning = element_as<std::string_view>(e, "a string", concat(where, ": ", key));
    }
    split_open_reasoning(message);
  }
  if (message.role == "tool") message.content = without_tags(message.content);
  // The assistant's may be null: beside calls, or as an empty answer.
  require(has_content || message.role == "assistant", where, ": content is missing");
  const std::optional<bool> trained = parse_trained(object);
  require(message.role == "assistant" || !trained.value_or(false), where,
          ": found a message by the ", message.role,
          " that is to be trained, expected the assistant's alone");
  message.trained = trained.value_or(true);
  if (message.role != "assistant")
    message.trained = true;  // of no meaning: equal messages are equal
  return message;
}

// Appends a message, to the one before it if both have one role. An empty system message is none.
inline void add_message(std::vector<Message>& messages, Message message, const std::string& where) {
  if (message.role == "system" && message.content.empty()) return;
  const bool joins =
      !messages.empty() && messages.back().role == message.role && message.role != "tool";
  if (!joins) {
    messages.push_back(std::move(message));
    return;
  }
  Message& last = messages.back();
  require(last.trained == message.trained, where,
          ": found two messages of the assistant in a row, one to be trained and one not");
  require(last.tool_calls.empty() || message.content.empty(), where,
          ": role: found assistant after assistant, expected tool, the answer to a call");
  const auto join = [](std::string& text, const std::string& more) {
    text += (text.empty() || more.empty() ? "" : "\n\n") + more;
  };
  join(last.content, message.content), join(last.reasoning, message.reasoning);
  last.tool_calls.insert(last.tool_calls.end(), message.tool_calls.begin(),
                         message.tool_calls.end());
}

// A list of messages, or its JSON as a string. The order of roles is check_conversation's, in
// cake/chat_template.h. `record`: whose --map renames keys of messages too; nullptr: there is none.
inline std::vector<Message> parse_messages(simdjson::dom::element list, const std::string& where,
                                           const Record* record = nullptr) {
  std::vector<Message> messages;
  std::string_view text;
  if (!list.get(text)) {
    visit_json(text, "a list of messages as JSON", where, [&](simdjson::dom::element inner) {
      as_array(inner, where);
      messages = parse_messages(inner, where, record);
    });
    return messages;
  }
  size_t i = 0;
  for (const simdjson::dom::element item : as_array(list, where)) {
    const std::string place = concat(where, "[", i++, "]");
    const Record object = inner_record(item, place, record);
    simdjson::dom::element e;
    if (find_any(object, {"role", "from"}, e)) {
      add_message(messages, parse_message(object), place);
      continue;
    }
    bool found = false;  // a turn of both: {"human", "assistant"}
    const auto add_side = [&](const char* role, std::initializer_list<const char*> keys) {
      std::string key;
      if (!find_any(object, keys, e, &key)) return;
      Message message{.role = role};
      add_content(e, message, concat(place, ": ", key));
      add_message(messages, std::move(message), place);
      found = true;
    };
    add_side("system", {"system"});
    add_side("user", {"human", "user", "input"});
    add_side("assistant", {"assistant", "gpt", "bot", "output"});
    require(found, place, ": found the keys ", object.keys(), ", expected role and content");
  }
  return messages;
}

// ---------------------------------------------------------------------------------------------
// Conversations

// The record's list of messages.
inline bool find_messages(const Record& record, simdjson::dom::element& list,
                          std::string* key = nullptr) {
  return find_any(record, {"messages", "conversation", "conversations"}, list, key);
}

// Whether the record has the shape of a conversation (and no problem's or preference's).
inline bool is_conversation(const Record& record) {
  simdjson::dom::element list;
  return find_messages(record, list);
}

// Puts the record's "system" in front of messages that have no system message of their own.
inline void add_system(const Record& record, std::vector<Message>& messages) {
  simdjson::dom::element e;
  std::string key;
  if (!find_any(record, {"system", "system_prompt"}, e, &key)) return;
  const std::string where = concat(record.where, ": ", key);
  const std::string system(element_as<std::string_view>(e, "a string", where));
  if (system.empty()) return;
  if (messages.empty() || messages[0].role != "system") {
    messages.insert(messages.begin(), {.role = "system", .content = system});
    return;
  }
  require(messages[0].content == system, where,
          ": found a system message beside that of the messages, expected one of them");
}

// Names of lists that hold what no model here reads.
inline void refuse_media(const Record& record) {
  for (const char* key : {"images", "image", "videos", "video", "audios", "audio"}) {
    simdjson::dom::element e;
    if (!record.find(key, e)) continue;
    simdjson::dom::array list;
    std::string_view path;
    const bool is_empty = (!e.get(list) && list.size() == 0) || (!e.get(path) && path.empty());
    require(is_empty, record.where, ": ", key, ": found ", type_name(e),
            ", expected text alone: no model here reads it");
  }
}

// A record's messages, system message and tools. Their order is not checked: check_conversation.
inline Conversation parse_conversation(const Record& record) {
  simdjson::dom::element list;
  std::string key;
  require(find_messages(record, list, &key), record.where, ": \"messages\" is missing");
  refuse_media(record);
  Conversation conversation{parse_messages(list, concat(record.where, ": ", key), &record),
                            parse_tools(record)};
  add_system(record, conversation.messages);
  for (Message& message : conversation.messages) {  // a greeting
    if (message.role == "user") break;
    if (message.role == "assistant") message.trained = false;
  }
  return conversation;
}

// ---------------------------------------------------------------------------------------------
// What ./sft trains on: a conversation with an answer, or a text with its continuation

struct TrainingText {
  std::optional<Conversation> conversation;
  std::string prompt, completion;  // otherwise
};

// In words, for messages.
inline constexpr const char* kTrainingShapes =
    "a conversation (messages or conversations), prompt and completion, instruction and output, or "
    "question and answer";

// Records that another stage reads are refused by that stage's name. `is_whole`: the record has a
// conversation that ends with an answer, as UltraFeedback's have beside the preference; elsewhere
// the messages are the prompt of one.
inline void refuse_other_stages(const Record& record, bool is_whole) {
  const auto has = [&](std::initializer_list<const char*> keys) {
    return std::all_of(keys.begin(), keys.end(), [&](const char* key) { return record.has(key); });
  };
  const char* found = nullptr;
  simdjson::dom::element e;
  bool flag = false;
  if (record.find("label", e) && !e.get(flag)) {
    found = "an answer and whether it is good (label): ./reward reads those";
  } else if (is_whole) {
    return;
  } else if (has({"chosen", "rejected"}) || has({"responses", "ranking"}) ||
             has({"preferred_output", "non_preferred_output"})) {
    found = "a preference: ./reward reads those";
  } else if (has({"question", "choices"}) || has({"question", "options"})) {
    found = "a question with choices: ./rlhf and ./chat eval read those";
  } else if (has({"message_id", "text"}) || has({"message_tree_id"})) {
    found =
        "a message of a tree (OpenAssistant), whose parent is another record: join each path from "
        "the root to a leaf into one record with \"messages\"";
  }
  if (found) fail(record.where, ": found ", found, "; expected ", kTrainingShapes);
}

// What an answer's field holds: a string, or a number as it is written.
inline std::string answer_text(simdjson::dom::element e, const std::string& where) {
  std::string_view text;
  if (!e.get(text)) return std::string(text);
  if (const auto number = written_number(e); !number.empty()) return std::string(number);
  require(e.is_number(), where, ": found ", type_name(e), ", expected a string to train on");
  return simdjson::minify(e);
}

// A prompt or completion: a list of messages, one message, or a string, which is one of `role`.
inline std::vector<Message> messages_or_text(simdjson::dom::element e, const char* role,
                                             const std::string& where, const Record& record) {
  std::string_view text;
  if (!e.get(text)) return {{.role = role, .content = std::string(text)}};
  if (e.is_object()) return {parse_message(inner_record(e, where, &record))};
  return parse_messages(e, where, &record);
}

// "prompt" and "completion" (TRL). Only the completion is trained. Two strings are plain text.
inline TrainingText parse_completion(const Record& record, simdjson::dom::element prompt,
                                     simdjson::dom::element completion) {
  TrainingText result;
  if (prompt.is_string() && !completion.is_array() && !completion.is_object()) {
    result.prompt = std::string(prompt.get_string().value());
    result.completion = answer_text(completion, record.where + ": completion");
    return result;
  }
  Conversation c{messages_or_text(prompt, "user", record.where + ": prompt", record),
                 parse_tools(record)};
  for (Message& message : c.messages) message.trained = message.role != "assistant";
  for (Message& message :
       messages_or_text(completion, "assistant", record.where + ": completion", record)) {
    c.messages.push_back(std::move(message));  // no message is half trained: none is joined
  }
  add_system(record, c.messages);
  result.conversation = std::move(c);
  return result;
}

// Alpaca's "history": [["question", "answer"], ...], turns before the instruction, trained as well.
inline void add_history(const Record& record, std::vector<Message>& messages) {
  simdjson::dom::element history;
  if (!record.find("history", history)) return;
  size_t i = 0;
  for (const simdjson::dom::element turn : as_array(history, record.where + ": history")) {
    const std::string where = concat(record.where, ": history[", i++, "]");
    const simdjson::dom::array pair = as_array(turn, where);
    require(pair.size() == 2, where, ": found ", pair.size(),
            " strings, expected a question and its answer");
    for (size_t side = 0; side < 2; side++) {
      const auto text = element_as<std::string_view>(pair.at(side), "a string", where);
      messages.push_back({side == 0 ? "user" : "assistant", std::string(text)});
    }
  }
}

// A question and its answer under the names that data sets have for them: Alpaca's instruction,
// input and output, Dolly's instruction, context and response, gsm8k's question and answer, MATH's
// problem and solution, ...
inline bool parse_question(const Record& record, TrainingText& result) {
  simdjson::dom::element asked, more, answer;
  std::string ask_key, key;
  const bool has_question =
      find_any(record, {"instruction", "question", "query", "problem", "prompt", "input", "inputs"},
               asked, &ask_key);
  const bool has_answer = find_any(
      record,
      {"completion", "output", "response", "solution", "generated_solution", "answer", "targets"},
      answer, &key);
  if (!has_question || !has_answer) return false;
  Conversation c{{}, parse_tools(record)};
  add_history(record, c.messages);
  for (Message& m : messages_or_text(asked, "user", concat(record.where, ": ", ask_key), record)) {
    if (m.role == "assistant") m.trained = false;
    c.messages.push_back(std::move(m));
  }
  if (ask_key == "instruction" && find_any(record, {"input", "context"}, more, &ask_key)) {
    const std::string where = concat(record.where, ": ", ask_key);
    const auto text = element_as<std::string_view>(more, "a string", where);
    // LLaMA-Factory joins them so.
    if (!text.empty()) c.messages.back().content += "\n" + std::string(text);
  }
  if (answer.is_array() || (answer.is_object() && written_number(answer).empty())) {
    fail(record.where, ": ", key, ": found ", type_name(answer),
         ", expected a string to train on: ./rlhf reads problems with several answers");
  }
  Message reply{"assistant", answer_text(answer, concat(record.where, ": ", key))};
  if (find_any(record, {"reasoning_content", "reasoning", "thinking"}, more, &key)) {
    const auto text =
        element_as<std::string_view>(more, "a string", concat(record.where, ": ", key));
    const bool is_switch = text == "on" || text == "off";  // Nemotron's: how the answer was made
    if (!is_switch) reply.reasoning = text;
  }
  split_open_reasoning(reply);
  c.messages.push_back(std::move(reply));
  add_system(record, c.messages);
  result.conversation = std::move(c);
  return true;
}

// xLAM's {"query", "tools", "answers"}, whose answers are calls.
inline bool parse_called(const Record& record, TrainingText& result) {
  simdjson::dom::element query, answers;
  if (!record.has("tools") || !record.find("query", query) || !record.find("answers", answers)) {
    return false;
  }
  Conversation c{messages_or_text(query, "user", record.where + ": query", record),
                 parse_tools(record)};
  c.messages.push_back({.role = "assistant"});
  add_calls(answers, c.messages.back().tool_calls, record.where + ": answers");
  add_system(record, c.messages);
  result.conversation = std::move(c);
  return true;
}

// UltraChat's "data": ["question", "answer", "question", ...].
inline bool parse_alternating(const Record& record, TrainingText& result) {
  simdjson::dom::element e;
  simdjson::dom::array list;
  if (!record.find("data", e) || e.get(list) || list.size() == 0 || !list.at(0).is_string()) {
    return false;
  }
  Conversation c;
  for (const simdjson::dom::element item : list) {
    const std::string where = concat(record.where, ": data[", c.messages.size(), "]");
    const auto text = element_as<std::string_view>(item, "a string", where);
    c.messages.push_back({c.messages.size() % 2 == 0 ? "user" : "assistant", std::string(text)});
  }
  result.conversation = std::move(c);
  return true;
}

// A record of any of these shapes. A conversation's order is not checked: check_conversation.
inline TrainingText parse_training_text(const Record& record) {
  TrainingText result;
  simdjson::dom::element e, completion;
  if (is_conversation(record)) {
    result.conversation = parse_conversation(record);
    const std::vector<Message>& messages = result.conversation->messages;
    refuse_other_stages(record, !messages.empty() && messages.back().role == "assistant");
    return result;
  }
  refuse_other_stages(record, false);
  refuse_media(record);
  if (record.find("prompt", e) && record.find("completion", completion)) {
    return parse_completion(record, e, completion);
  }
  if (parse_question(record, result) || parse_called(record, result) ||
      parse_alternating(record, result)) {
    return result;
  }
  if (record.has("prompt") || record.has("question") || record.has("problem")) {
    fail(record.where,
         ": found a prompt without an answer to train on: ./rlhf and ./chat generate ",
         "read those; expected ", kTrainingShapes);
  }
  if (record.has("text")) {
    fail(record.where, ": found a text without a prompt: ./bpe encode and ./train_gpt train on ",
         "those; expected ", kTrainingShapes);
  }
  fail_unknown_shape(record, kTrainingShapes);
}

// Why there is nothing to train on in it, or nullptr.
inline const char* nothing_to_learn(const TrainingText& text) {
  if (!text.conversation) return text.completion.empty() ? "empty answer" : nullptr;
  bool is_trained = false;
  for (const Message& m : text.conversation->messages) {
    if (m.role == "user" && m.content.empty()) return "empty message of the user";
    if (m.role != "assistant") continue;
    if (strip(m.content).empty() && m.tool_calls.empty() && strip(m.reasoning).empty()) {
      return "empty answer";
    }
    is_trained |= m.trained;
  }
  return is_trained ? nullptr : "no trained message";
}

// The examples of a conversation, of which each has an answer that is trained. An answer can
// be trained inside of the whole only where it and all before it stand there as they do when it is
// the last one: many templates leave out the reasoning of earlier answers, some also what else an
// answer had around it. Such an answer is the end of an example of its own. There, earlier answers
// are context, as they will be when the model answers.
//
// `render(conversation)`: its ids and mask, as ChatTemplate::render_for_training gives them.
template <class Render>
std::vector<Conversation> examples_of(const Conversation& whole, Render&& render) {
  struct Turn {  // a message of the user and what follows it: messages [begin, end)
    size_t begin, end;
  };
  const auto is_trained = [](const Message& m) { return m.role == "assistant" && m.trained; };
  const auto& messages = whole.messages;
  std::vector<Turn> turns;  // with an answer that is trained
  for (size_t begin = 0, end = 0; begin < messages.size(); begin = end) {
    for (end = begin + 1; end < messages.size() && messages[end].role != "user";) end++;
    if (std::any_of(messages.begin() + long(begin), messages.begin() + long(end), is_trained)) {
      turns.push_back({begin, end});
    }
  }
  const auto before = [&](size_t end) {
    return Conversation{{messages.begin(), messages.begin() + long(end)}, whole.tools};
  };
  std::vector<Conversation> examples;
  if (turns.empty()) return examples;
  const Turn last = turns.back();
  turns.pop_back();
  // Whether `ids` begin with an example, up to its last trained id.
  const auto is_begun_by = [](auto own, const std::vector<int>& ids) {
    while (!own.trained.empty() && !own.trained.back()) own.trained.pop_back();
    const size_t n = own.trained.size();
    return n <= ids.size() && std::equal(own.ids.begin(), own.ids.begin() + long(n), ids.begin());
  };
  // What follows teaches nothing. It stays unless it changes the last answer.
  Conversation rest = before(last.end);
  if (last.end < messages.size()) {
    try {
      if (is_begun_by(render(rest), render(whole).ids)) rest = whole;
    } catch (const Error&) {  // the template leaves out some of the answer
    }
  }
  if (!turns.empty()) {
    const auto whole_ids = render(rest).ids;
    for (const Turn& turn : turns) {
      Conversation example = before(turn.end);
      if (is_begun_by(render(example), whole_ids)) continue;
      for (size_t i = 0; i < turn.begin; i++) example.messages[i].trained = false;
      for (size_t i = turn.begin; i < turn.end; i++) rest.messages[i].trained = false;
      examples.push_back(std::move(example));
    }
  }
  examples.push_back(std::move(rest));
  return examples;
}

}  // namespace cake
