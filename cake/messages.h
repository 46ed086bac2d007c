// Conversations: messages, tools and calls, and what makes a conversation whole.
//
//     {"messages": [user, assistant, ...], "tools": [...]}
//
// cake/conversations.h reads them from people's files, cake/chat_template.h makes ids of them.
// Reasoning is a message's own field, or the beginning of its content between <think> and </think>.
#pragma once

#include <algorithm>
#include <iterator>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/json.h"
#include "cake/run.h"

namespace cake {

struct ToolCall {
  std::string name;
  std::string arguments;  // a JSON object as text
  bool operator==(const ToolCall&) const = default;
};

struct Message {
  std::string role;  // system, user, assistant or tool
  std::string content;
  std::vector<ToolCall> tool_calls;  // an assistant's
  std::string reasoning;             // an assistant's, before its content
  bool trained = true;               // an assistant's: false leaves it out of the loss
  bool operator==(const Message&) const = default;
};

struct Conversation {
  std::vector<Message> messages;
  std::vector<std::string> tools;  // each a JSON object as text: name, description, parameters
};

// Throws Error with `where` (file:line) and the message's number unless
// - the roles are known; user and assistant alternate, and either begins; a tool's messages follow
//   an assistant's calls, and calls are answered before anyone else speaks;
// - no content is empty, but a tool's, and that of an assistant who calls tools or reasons;
// - the arguments of every call are a JSON object, and it calls a declared tool if any is declared;
// - the assistant has a message; in a `prompt`, the last message is a user's or a tool's instead.
inline void check_conversation(const Conversation&, const std::string& where, bool prompt = false);

// ---------------------------------------------------------------------------------------------
// Parts of messages

// The text without white space at both ends, by Unicode, as Python's str.strip() and Jinja's trim
// have it.
inline std::string_view strip(std::string_view text) {
  static constexpr std::string_view kSpaces[] = {
      "\t",           "\n",           "\v",           "\f",           "\r",
      "\x1c",         "\x1d",         "\x1e",         "\x1f",         " ",
      "\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\x80", "\xe2\x80\x81",
      "\xe2\x80\x82", "\xe2\x80\x83", "\xe2\x80\x84", "\xe2\x80\x85", "\xe2\x80\x86",
      "\xe2\x80\x87", "\xe2\x80\x88", "\xe2\x80\x89", "\xe2\x80\x8a", "\xe2\x80\xa8",
      "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80"};
  const auto remove = [&text](std::string_view space) {
    if (text.starts_with(space)) return text.remove_prefix(space.size()), true;
    if (text.ends_with(space)) return text.remove_suffix(space.size()), true;
    return false;
  };
  while (std::any_of(std::begin(kSpaces), std::end(kSpaces), remove)) {
  }
  return text;
}

// What an assistant's message says, both without white space at their ends.
struct Answer {
  std::optional<std::string_view> reasoning;  // "": the model was to reason and did not
  std::string_view content;
};

inline Answer split_answer(const Message& message) {
  constexpr std::string_view kBegin = "<think>", kEnd = "</think>";
  Answer answer{{}, strip(message.content)};
  if (const auto reasoning = strip(message.reasoning); !reasoning.empty()) {
    answer.reasoning = reasoning;
  } else if (answer.content.starts_with(kBegin)) {
    if (const size_t end = answer.content.find(kEnd); end != std::string_view::npos) {
      answer.reasoning = strip(answer.content.substr(kBegin.size(), end - kBegin.size()));
      answer.content = strip(answer.content.substr(end + kEnd.size()));
    }
  }
  return answer;
}

// ---------------------------------------------------------------------------------------------
// Checks

// The names of the tools that are declared.
inline std::set<std::string> tool_names(const std::vector<std::string>& tools,
                                        const std::string& where) {
  std::set<std::string> names;
  for (size_t i = 0; i < tools.size(); i++) {
    const std::string place = concat(where, ": tools[", i, "]");
    names.insert(json_get<std::string>(parse_json(tools[i], place), "name", place));
  }
  return names;
}

// Whether the message may follow the one before it (nullptr: it is the first one). A system message
// may stand anywhere, as Qwen3's template has it, but between calls and their answers.
inline void check_role(const Message& message, const Message* before, const std::string& where) {
  const std::string& role = message.role;
  require(role == "system" || role == "user" || role == "assistant" || role == "tool", where,
          ": role: found \"", role, "\", expected system, user, assistant or tool");
  const std::string previous = before ? before->role : "";
  const bool called = before && !before->tool_calls.empty();
  // Calls that the content spells out have names and arguments of any form.
  const bool wrote_calls =
      previous == "assistant" && before->content.find("<tool_call>") != std::string::npos;
  std::string expected = !before                   ? "system, user or assistant"
                         : called                  ? "tool, the answer to a call"
                         : previous == "tool"      ? "assistant, tool, user or system"
                         : previous == "user"      ? "assistant or system"
                         : previous == "assistant" ? "user or system"
                                                   : "user or assistant";
  if (wrote_calls && !called) expected += ", or tool";
  const bool may_follow = called ? role == "tool" : expected.find(role) != std::string::npos;
  if (may_follow) return;
  fail(where, ": role: found ", role, before ? " after " + previous : " first", ", expected ",
       expected);
}

inline void check_content(const Message& message, const std::set<std::string>& tools,
                          const std::string& where) {
  require(message.tool_calls.empty() || message.role == "assistant", where,
          ": tool_calls: found calls by the ", message.role,
          ", expected calls by the assistant only");
  const bool is_blank = message.role == "assistant"
                            ? strip(message.content).empty() && strip(message.reasoning).empty()
                            : message.content.empty();
  if (is_blank && message.tool_calls.empty() &&
      message.role != "tool") {  // a tool may find nothing
    fail(where, ": content: found nothing, expected text");
  }
  for (const ToolCall& call : message.tool_calls) {
    require(Json::parse(call.arguments, nullptr, false).is_object(), where,
            ": tool_calls: ", call.name, ": arguments: found ", call.arguments.substr(0, 60),
            ", expected a JSON object");
    require(tools.empty() || tools.count(call.name), where, ": tool_calls: found a call of \"",
            call.name, "\", expected one of the ", tools.size(), " declared tools");
  }
}

inline void check_conversation(const Conversation& conversation, const std::string& where,
                               bool prompt) {
  const std::vector<Message>& messages = conversation.messages;
  require(!messages.empty(), where,
          ": messages: found none, expected a user's message and an assistant's");
  const std::set<std::string> tools = tool_names(conversation.tools, where);
  bool answered = false;
  for (size_t i = 0; i < messages.size(); i++) {
    const std::string place = concat(where, ": messages[", i, "]");
    check_role(messages[i], i > 0 ? &messages[i - 1] : nullptr, place);
    check_content(messages[i], tools, place);
    answered |= messages[i].role == "assistant";
  }
  require(answered || prompt, where,
          ": messages: found none by the assistant, expected at least one to train on");
  const std::string& last = messages.back().role;
  require(!prompt || last == "user" || last == "tool", where, ": messages: found ", last,
          " last, expected user or tool");
}

}  // namespace cake
