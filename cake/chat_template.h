// Chat templates: a conversation to token ids, and which of them the assistant is trained on.
//
//     Conversation --jinja--> text, every piece with its origin --tokenizer--> ids, mask, origins
//
// The template of a model is a program in Jinja, which may write anything. cake/jinja.h says of
// every piece of its output whether the template wrote it or which part of which message it is.
// Three things follow, for any template:
//
// - Safety: a special token is recognised only in what the template wrote. What a user or a tool
//   says never becomes one, so that it cannot end its turn and begin another.
// - The training mask. What a template writes before an assistant's message is compared with what
//   it writes as a generation prompt at that place. Where both are equal the model is given it and
//   need not write it: a header, or an empty <think> block. Training begins behind that, and ends
//   with the end of turn, the first special token behind the message.
// - A message that does not come whole through a template is found, and not trained on.
#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cake/chatml.h"
#include "cake/jinja.h"
#include "cake/json.h"
#include "cake/messages.h"
#include "cake/tokenizer.h"

namespace cake {

struct Rendered {
  std::vector<int> ids;
  // Of each id: a trained message of the assistant has it (its content, calls, end of turn). Of
  // render_for_training alone, otherwise empty.
  std::vector<bool> trained;
  std::vector<jinja::Origin> origins;  // of each id: of its first byte
};

struct TemplateOptions {
  std::string date;  // YYYY-MM-DD, that strftime_now formats; empty: the day of each rendering
  OrderedJson variables = OrderedJson::object();  // more of them: {"enable_thinking": false}
};

// The date of today, YYYY-MM-DD.
std::string today();

// Whether the text is a date, YYYY-MM-DD.
bool is_date(std::string_view text);

// A chat template with the tokenizer that its texts become ids with. Copies share their data; all
// member functions may be called by many threads at once.
class ChatTemplate {
 public:
  // `text`: Jinja. `name`: what errors call it, a model's directory or a file. Throws Error where
  // the text is no template, where the tokenizer lacks the token that ends its turns, or where
  // options.variables has a name that every template is given.
  ChatTemplate(const Tokenizer& tokenizer, std::string text, std::string name,
               TemplateOptions options = {});

  // What the template makes of a conversation and, for a `generation_prompt`, of the header of the
  // assistant's next turn: text, before it becomes ids. Throws Error with the template's line where
  // it refuses the conversation.
  jinja::Output output(const Conversation&, bool generation_prompt = false) const;
  // Its ids. Special tokens are recognised only in what the template itself wrote. But <think>,
  // </think>, <tool_call> and </tool_call> are recognised in what the assistant says, too.
  Rendered render(const Conversation&, bool generation_prompt = false) const;
  // The same with the mask. Throws Error where the template drops or changes what the assistant
  // says in its last trained message, declares no tools, or writes no end of turn behind it.
  Rendered render_for_training(const Conversation&) const;
  // A prompt that ends behind the content of the last message, the assistant's, which goes on.
  Rendered render_open(const Conversation&) const;
  // The ids that follow the end of the assistant's last turn: what came behind it in the
  // conversation (answers of tools), and the header of its next turn.
  std::vector<int> ids_behind_turn(const Conversation&) const;

  // The token that ends a turn of the assistant; -1: the template has none, and stop_string() ends
  // its turns (what the template writes between an answer and the next user's message).
  int find_end_of_turn() const;
  int end_of_turn() const;  // the same; throws Error where there is none
  const std::string& stop_string() const;
  // Whether tools are declared, and calls written as JSON between <tool_call> and </tool_call>.
  bool has_tools() const;

  const std::string& text() const;
  const std::string& name() const;
  const Tokenizer& tokenizer() const;
  const TemplateOptions& options() const;

 private:
  struct Data;
  std::shared_ptr<const Data> data_;
};

// What --template names: "auto": the model's own; "chatml"; "plain", User: ...\nAssistant: ...; or
// the path of a file with a template. Throws Error where there is none.
ChatTemplate open_chat_template(const Tokenizer& tokenizer, const std::filesystem::path& model,
                                const std::string& choice = "auto", TemplateOptions options = {});

// A JSON value as Python's json.dumps writes it.
std::string python_text(const OrderedJson& json);

// The ids to feed for `rendered`: those of `seen` as far as both have the same text up to a special
// token, since the engine's cache has them, and the rest of `rendered`. A text that a model sampled
// may have other ids than the same text that is encoded.
std::vector<int> keep_seen_ids(const Tokenizer& tokenizer, std::span<const int> seen,
                               std::vector<int> rendered);

}  // namespace cake
