// Chat templates: a conversation to token ids, and which of them the assistant is trained on.
//
//     {"messages": [user, assistant, ...]} --render_chat--> ids, and a mask over them
//
// The format is ChatML, `<|im_start|>{role}\n{content}<|im_end|>\n`, with tools as in Qwen3. It
// stands here twice, once as Jinja for other programs (tokenizer_config.json) and once as C++ for
// this one: reading one, check the other. Both give the same ids but where a content's text looks
// like a special token: here it stays text.
//
// Between two special tokens text is split and encoded as a whole, so "assistant\n" and the content
// after it would share a token if the content began with white space that a pattern joins to a line
// end. The assistant's contents are stripped for that reason: what generation begins with, and what
// is trained, is a token of its own. Qwen3's declaration of tools is a paragraph long; ours is
// short, since a small model's context is.
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
};

struct Message {
  std::string role;  // system, user, assistant or tool
  std::string content;
  std::vector<ToolCall> tool_calls;  // an assistant's
};

struct Conversation {
  std::vector<Message> messages;
  std::vector<std::string> tools;  // each a JSON object as text: name, description, parameters
};

struct Rendered {
  std::vector<int> ids;
  std::vector<bool> trained;  // of each id: the assistant is to write it (content, end of turn)
};

// The ids of whole turns; then, for `generation_prompt`, the header of the assistant's next turn.
// Any part of a conversation can be rendered: no order of roles is asked for. An assistant's
// content is stripped of white space at both ends, so that generation begins on a token. Throws
// Error when the tokenizer has no chat tokens.
inline Rendered render_chat(const Tokenizer&, const Conversation&, bool generation_prompt = false);
inline int end_of_turn(const Tokenizer&);  // <|im_end|>; throws Error when absent

// Throws Error naming `where` (file:line) and the message, unless: the roles are known; a system
// message is the first or there is none; then user and assistant alternate, from user on; tool
// messages follow an assistant's calls, and an assistant's message follows them; contents are not
// empty, but for a tool's and an assistant's that has calls; calls are of declared tools, and their
// arguments JSON objects; an assistant has a message, or, for a `prompt`, a user or a tool has the
// last one.
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

// Text and special tokens to ids: text is gathered until a special token, or the border between
// what is trained and what is not.
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
  void train(bool on) {  // from here on
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
    } else if (message.role == "tool") {  // the answers to several calls share a turn
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
  if (id < 0 || tokenizer.special("<|im_start|>") < 0) {
    fail("tokenizer: found no <|im_start|> and <|im_end|>, expected a tokenizer with chat tokens: ",
         "./sft --add-chat-tokens adds them to a base model");
  }
  return id;
}

inline void check_conversation(const Conversation& conversation, const std::string& where,
                               bool prompt) {
  const std::vector<Message>& messages = conversation.messages;
  if (messages.empty()) fail(where, ": messages: found none, expected a user's and an answer");
  std::set<std::string> declared;
  for (size_t i = 0; i < conversation.tools.size(); i++) {
    const Json tool = Json::parse(conversation.tools[i], nullptr, false);
    const std::string at = concat(where, ": tools[", i, "]");
    if (tool.is_discarded()) fail(at, ": not JSON");
    declared.insert(json_get<std::string>(tool, "name", at));
  }
  bool answered = false;
  for (size_t i = 0; i < messages.size(); i++) {
    const Message& m = messages[i];
    const std::string at = concat(where, ": messages[", i, "]");
    const std::string before = i > 0 ? messages[i - 1].role : "";
    const bool called = i > 0 && !messages[i - 1].tool_calls.empty();
    const bool may = m.role == "system" ? i == 0
                     : m.role == "user"
                         ? i == 0 || before == "system" || (before == "assistant" && !called)
                     : m.role == "assistant" ? before == "user" || before == "tool"
                                             : before == "tool" || called;
    if (m.role != "system" && m.role != "user" && m.role != "assistant" && m.role != "tool") {
      fail(at, ": role: found \"", m.role, "\", expected system, user, assistant or tool");
    }
    if (m.role == "system" && i > 0 && messages[0].role == "system") {
      fail(at, ": role: found a second system message, expected one at most");
    }
    if (!may) {
      const char* expected = i == 0             ? "system or user"
                             : called           ? "tool, the answer to a call"
                             : before == "tool" ? "assistant or tool"
                             : before == "user" ? "assistant"
                                                : "user";
      fail(at, ": role: found ", m.role, i > 0 ? " after " + before : " first", ", expected ",
           expected);
    }
    answered |= m.role == "assistant";
    if (!m.tool_calls.empty() && m.role != "assistant") {
      fail(at, ": tool_calls: found ", m.role, "'s, expected calls by an assistant alone");
    }
    // A tool may find nothing: its answer is the one that may be empty.
    const bool blank = m.role == "assistant" ? strip(m.content).empty() : m.content.empty();
    if (blank && m.tool_calls.empty() && m.role != "tool") {
      fail(at, ": content: found nothing, expected text");
    }
    for (const ToolCall& call : m.tool_calls) {
      const Json arguments = Json::parse(call.arguments, nullptr, false);
      if (!arguments.is_object()) {
        fail(at, ": tool_calls: ", call.name, ": arguments: found ", call.arguments,
             ", expected a JSON object");
      }
      if (!declared.count(call.name)) {
        fail(at, ": tool_calls: found a call of \"", call.name, "\", expected one of the ",
             declared.size(), " declared tools");
      }
    }
  }
  const std::string& last = messages.back().role;
  if (!answered && !prompt) fail(where, ": messages: found no assistant's, expected one to learn");
  if (prompt && last != "user" && last != "tool") {
    fail(where, ": messages: found ", last, " last, expected user or tool");
  }
}

}  // namespace cake
