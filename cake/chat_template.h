// Chat templates: a conversation to token ids, and which of them the assistant is trained on.
//
//     {"messages": [user, assistant, ...]} --render_chat--> ids, and a mask over them
//
// The format is ChatML, `<|im_start|>{role}\n{content}<|im_end|>\n`, with tools as in Qwen3. It is
// written here twice: as C++ for this project, and as Jinja for other programs, which read it in
// tokenizer_config.json. Both give the same ids, except for a content with text that looks like a
// special token: the C++ code encodes it as text.
//
// The text between two special tokens is encoded as a whole. If the assistant's content began with
// white space, a split pattern could join it to the line end of "assistant\n", and one token would
// belong to both. So the assistant's contents are stripped: generation and training begin at the
// first token of the content. Qwen3's declaration of tools is a paragraph long; this one is short,
// because a small model has a short context.
#pragma once

#include <set>
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
// - the roles are known; only the first message may be the system's; then user and assistant
//   alternate, and the user begins; a tool's messages follow an assistant's calls, and the
//   assistant's next message follows them;
// - no content is empty, but a tool's, and that of an assistant who calls tools;
// - every call is of a declared tool, and its arguments are a JSON object;
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
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {%- set content = (message.content or '') | trim %}
            {{- content }}
            {%- for call in message.tool_calls or [] %}
                {%- if content or not loop.first %}{{- '\n' }}{%- endif %}
                {%- set function = call.function if call.function is defined else call %}
                {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' }}
                {%- if function.arguments is string %}
                    {{- function.arguments }}
                {%- else %}
                    {{- function.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif message.role != 'system' or not loop.first %}
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

inline void write_answer(TurnWriter& out, const Message& message) {
  const std::string_view content = strip(message.content);
  out.begin("assistant").train(true);
  out.text(content);
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
      write_answer(out, message);
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

// Whether the message may follow the one before it (nullptr: it is the first one).
inline void check_role(const Message& message, const Message* before, const std::string& where) {
  const std::string& role = message.role;
  require(role == "system" || role == "user" || role == "assistant" || role == "tool", where,
          ": role: found \"", role, "\", expected system, user, assistant or tool");
  const bool called = before && !before->tool_calls.empty();
  const std::string expected = !before                  ? "system or user"
                               : called                 ? "tool, the answer to a call"
                               : before->role == "tool" ? "assistant or tool"
                               : before->role == "user" ? "assistant"
                                                        : "user";
  const bool may_follow = called ? role == "tool" : expected.find(role) != std::string::npos;
  if (may_follow) return;
  fail(where, ": role: found ", role, before ? " after " + before->role : " first", ", expected ",
       expected);
}

inline void check_content(const Message& message, const std::set<std::string>& tools,
                          const std::string& where) {
  require(message.tool_calls.empty() || message.role == "assistant", where,
          ": tool_calls: found calls by the ", message.role,
          ", expected calls by the assistant only");
  const bool is_blank =
      message.role == "assistant" ? strip(message.content).empty() : message.content.empty();
  if (is_blank && message.tool_calls.empty() &&
      message.role != "tool") {  // a tool may find nothing
    fail(where, ": content: found nothing, expected text");
  }
  for (const ToolCall& call : message.tool_calls) {
    require(Json::parse(call.arguments, nullptr, false).is_object(), where,
            ": tool_calls: ", call.name, ": arguments: found ", call.arguments.substr(0, 60),
            ", expected a JSON object");
    require(tools.count(call.name), where, ": tool_calls: found a call of \"", call.name,
            "\", expected one of the ", tools.size(), " declared tools");
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
    require(i == 0 || messages[i].role != "system" || messages[0].role != "system", place,
            ": role: found a second system message, expected at most one");
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
