// Chat templates: a conversation to token ids, and which of them the assistant is trained on.
//
//     {"messages": [user, assistant, ...]} --render_chat--> ids, and a mask over them
//
// The format is ChatML, `<|im_start|>{role}\n{content}<|im_end|>\n`, with tools as in Qwen3. It is
// written here twice: as C++ for this project, and as Jinja for other programs, which read it in
// tokenizer_config.json. Both give the same ids, except for a content with text that looks like a
// special token: the C++ code encodes it as text, but for the markers <think>, </think>,
// <tool_call> and </tool_call> in the assistant's contents, which are its own.
//
// Reasoning is written as Qwen3 does: <think>\n...\n</think>\n\n before the answer, and only in
// what follows the last message of the user. The reasoning of earlier answers is left out: a model
// that answers again does not see it. It is the message's own field, or the beginning of its
// content between <think> and </think>.
//
// The text between two special tokens is encoded as a whole. If the assistant's content began with
// white space, a split pattern could join it to the line end of "assistant\n", and one token would
// belong to both. So the assistant's contents are stripped: generation and training begin at the
// first token of the content. Qwen3's declaration of tools is a paragraph long; this one is short,
// because a small model has a short context.
#pragma once

#include <algorithm>
#include <iterator>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/json.h"
#include "cake/run.h"
#include "cake/tokenizer.h"

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

struct Rendered {
  std::vector<int> ids;
  std::vector<bool> trained;  // of each id: the assistant writes it (its content, end of turn)
};

// The ids of whole turns and, for a `generation_prompt`, the header of the assistant's next turn.
// Renders any part of a conversation, with roles in any order. Throws Error when the tokenizer has
// no chat tokens.
inline Rendered render_chat(const Tokenizer&, const Conversation&, bool generation_prompt = false);
inline int end_of_turn(const Tokenizer&);  // <|im_end|>; throws Error when absent

// The id that ends what is trained on and scored: <|im_end|> of a chat, the tokenizer's document
// separator of a raw text. Throws Error when the tokenizer lacks it.
inline int end_token(const Tokenizer&, bool is_chat);

// Throws Error with `where` (file:line) and the message's number unless
// - the roles are known; user and assistant alternate, and either begins; a tool's messages follow
//   an assistant's calls, and calls are answered before anyone else speaks;
// - no content is empty, but a tool's, and that of an assistant who calls tools or reasons;
// - the arguments of every call are a JSON object, and it calls a declared tool if any is declared;
// - the assistant has a message; in a `prompt`, the last message is a user's or a tool's instead.
inline void check_conversation(const Conversation&, const std::string& where, bool prompt = false);

// ---------------------------------------------------------------------------------------------
// The template

inline constexpr const char* kChatTemplate = R"({%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n<tools>\n' }}
    {%- for tool in tools %}
        {{- (tool.function if tool.function is defined else tool) | tojson }}{{- '\n' }}
    {%- endfor %}
    {{- '</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set query = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set query.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = (message.content or '') | trim %}
        {%- set reasoning = (message.reasoning_content or '') | trim or none %}
        {%- if reasoning is none and content.startswith('<think>') and '</think>' in content %}
            {%- set parts = content.split('</think>') %}
            {%- set reasoning = parts[0][7:] | trim %}
            {%- set content = parts[1:] | join('</think>') | trim %}
        {%- endif %}
        {%- if loop.index0 < query.last %}{%- set reasoning = none %}{%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {%- if reasoning is not none %}
                {{- '<think>\n' + reasoning + '\n</think>\n\n' }}
            {%- endif %}
            {{- content }}
            {%- for call in message.tool_calls or [] %}
                {%- if content or not loop.first %}{{- '\n' }}{%- endif %}
                {%- set function = call.function if call.function is defined else call %}
                {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' }}
                {%- set arguments = function.arguments or {} %}
                {{- arguments if arguments is string else arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif message.role != 'system' %}
        {{- raise_exception('found role ' + message.role + ', expected user, assistant or tool') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
)";

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

// Text and special tokens to ids. Gathers text, and encodes it at the next special token and where
// training begins or ends.
class TurnWriter {
 public:
  explicit TurnWriter(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  TurnWriter& text(std::string_view more) { return text_ += more, *this; }
  TurnWriter& special(const char* name) {
    const int id = tokenizer_.special(name);
    if (id < 0) return text(name);  // as Hugging Face does
    encode_text();
    out_.ids.push_back(id);
    return *this;
  }
  TurnWriter& begin(std::string_view role) { return special("<|im_start|>").text(role).text("\n"); }
  TurnWriter& end() { return special("<|im_end|>"); }
  void train(bool on) {  // the ids that follow
    encode_text();
    out_.trained.resize(out_.ids.size(), trained_);
    trained_ = on;
  }
  Rendered finish() {
    train(false);
    return std::move(out_);
  }

 private:
  void encode_text() {
    tokenizer_.encode(text_, out_.ids);
    text_.clear();
  }

  const Tokenizer& tokenizer_;
  Rendered out_;
  std::string text_;
  bool trained_ = false;
};

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

// Reasoning is written behind this message alone: the last one of the user. -1: there is none.
inline int last_query(const std::vector<Message>& messages) {
  int last = int(messages.size()) - 1;
  while (last >= 0 && messages[size_t(last)].role != "user") last--;
  return last;
}

// The assistant's text, whose markers are tokens where the tokenizer has them.
inline void write_content(TurnWriter& out, std::string_view content) {
  constexpr const char* kMarkers[] = {"<think>", "</think>", "<tool_call>", "</tool_call>"};
  for (size_t i = 0, begin = 0; i <= content.size(); i++) {
    if (i == content.size()) out.text(content.substr(begin));
    if (i == content.size() || content[i] != '<') continue;
    for (const char* marker : kMarkers) {
      if (!content.substr(i).starts_with(marker)) continue;
      out.text(content.substr(begin, i - begin)).special(marker);
      begin = i + std::string_view(marker).size();
    }
  }
}

inline void write_answer(TurnWriter& out, const Message& message, bool with_reasoning) {
  const auto [reasoning, content] = split_answer(message);
  out.begin("assistant").train(message.trained);
  if (reasoning && with_reasoning) {
    out.special("<think>").text("\n").text(*reasoning).text("\n").special("</think>").text("\n\n");
  }
  write_content(out, content);
  for (size_t i = 0; i < message.tool_calls.size(); i++) {
    const ToolCall& call = message.tool_calls[i];
    if (i > 0 || !content.empty()) out.text("\n");
    out.special("<tool_call>").text("\n{\"name\": \"").text(call.name);
    out.text("\", \"arguments\": ").text(call.arguments).text("}\n").special("</tool_call>");
  }
  out.end().train(false);
  out.text("\n");
}

inline Rendered render_chat(const Tokenizer& tokenizer, const Conversation& conversation,
                            bool generation_prompt) {
  end_of_turn(tokenizer);
  const std::vector<Message>& messages = conversation.messages;
  const bool has_system = !messages.empty() && messages[0].role == "system";
  const int query = last_query(messages);
  TurnWriter out(tokenizer);
  if (has_system || !conversation.tools.empty()) {
    out.begin("system");
    if (has_system) out.text(messages[0].content);
    if (!conversation.tools.empty()) {
      out.text(has_system ? "\n\n" : "").text("# Tools\n<tools>\n");
      for (const std::string& tool : conversation.tools) out.text(tool).text("\n");
      out.text("</tools>");
    }
    out.end().text("\n");
  }
  for (size_t i = has_system; i < messages.size(); i++) {
    const Message& message = messages[i];
    if (message.role == "assistant") {
      write_answer(out, message, int(i) > query);
    } else if (message.role == "tool") {  // the answers to the calls of one turn share a turn
      if (i == 0 || messages[i - 1].role != "tool") out.special("<|im_start|>").text("user");
      out.text("\n").special("<tool_response>").text("\n").text(message.content).text("\n");
      out.special("</tool_response>");
      if (i + 1 == messages.size() || messages[i + 1].role != "tool") out.end().text("\n");
    } else {
      out.begin(message.role).text(message.content).end().text("\n");
    }
  }
  if (generation_prompt) out.begin("assistant");
  return out.finish();
}

inline int end_of_turn(const Tokenizer& tokenizer) {
  const int id = tokenizer.special("<|im_end|>");
  require(
      id >= 0 && tokenizer.special("<|im_start|>") >= 0,
      "tokenizer: found no <|im_start|> and <|im_end|>, expected a tokenizer with chat tokens: ",
      "./sft --add-chat-tokens adds them to a base model");
  return id;
}

inline int end_token(const Tokenizer& tokenizer, bool is_chat) {
  return is_chat ? end_of_turn(tokenizer) : tokenizer.document_separator();
}

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

// The ids of an answered turn as later turns see them: without reasoning. `turn`: what the model
// wrote behind the header, and whatever its tools answered.
inline std::vector<int> without_reasoning(const Tokenizer& tokenizer, std::span<const int> turn) {
  const int think = tokenizer.special("<think>"), end = tokenizer.special("</think>");
  std::set<int> markers;  // no text, whether the tokenizer's file calls them special or not
  for (const char* name : kSpecialTokens) markers.insert(tokenizer.special(name));
  std::vector<int> ids;
  for (size_t i = 0; i < turn.size(); i++) {
    const auto closed = std::find(turn.begin() + long(i), turn.end(), end);
    if (think < 0 || turn[i] != think || closed == turn.end()) {
      ids.push_back(turn[i]);
      continue;
    }
    // The text behind it begins without the line ends, in tokens of its own.
    i = size_t(closed - turn.begin()) + 1;
    size_t last = i;
    while (last < turn.size() && !markers.count(turn[last])) last++;
    const std::string text = tokenizer.decode(turn.subspan(i, last - i));
    tokenizer.encode(text.substr(std::min(text.find_first_not_of(" \t\r\n"), text.size())), ids);
    i = last - 1;
  }
  return ids;
}

// A prompt as ids: a chat up to the header of the assistant's turn, or the document separator and a
// text.
inline std::vector<int> prompt_ids(const Tokenizer& tokenizer, const Conversation& prompt) {
  return render_chat(tokenizer, prompt, true).ids;
}
inline std::vector<int> prompt_ids(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<int> ids = {tokenizer.document_separator()};
  tokenizer.encode(text, ids);
  return ids;
}

}  // namespace cake
