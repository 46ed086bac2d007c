// The chat template of a training stage: ./sft, ./reward and ./rlhf train a model on conversations
// in the template that it came with, and save it with that template.
//
//     --template, --date -> StageTemplate -> ChatTemplate, for conversations
//                                         -> text, for the tokenizer that is saved
//
// A model without a template gets ChatML, if its tokenizer has the tokens. Raw texts need none.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "cake/chat_template.h"
#include "cake/checkpoint.h"
#include "cake/gguf_export.h"
#include "cake/json.h"
#include "cake/run.h"
#include "cake/tokenizer.h"

namespace cake {

// Two settings of a run, which stay as they were when it is resumed.
struct StageTemplateFlags {
  std::string name = "auto";  // see open_chat_template
  std::string date;           // YYYY-MM-DD; empty: today, when the run begins
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(StageTemplateFlags, name, date)

// `app`: a program, a subcommand or an option group. `flags` must live as long as it.
inline void add_stage_template_flags(CLI::App& app, StageTemplateFlags& flags) {
  app.add_option("--template", flags.name,
                 "of conversations: auto (the model's own, or ChatML where it has none), chatml or "
                 "a file with a template in Jinja; it is saved with the model");
  app.add_option("--date", flags.date,
                 "YYYY-MM-DD, for templates that write the date; empty: today, the same on resume");
}

// Fills in the date of today, if there is none. Throws Error where it is no date.
inline void fix_date(StageTemplateFlags& flags) {
  if (flags.date.empty()) flags.date = today();
  require(is_date(flags.date), "--date: found ", flags.date, ", expected YYYY-MM-DD");
}

inline bool has_chatml_tokens(const Tokenizer& tokenizer) {
  return tokenizer.special("<|im_start|>") >= 0 && tokenizer.special("<|im_end|>") >= 0;
}

// A stage's template, if its model has one that can be used. Copies share it.
class StageTemplate {
 public:
  StageTemplate() = default;
  explicit StageTemplate(ChatTemplate chat)
      : tokenizer_(chat.tokenizer()), chat_(std::move(chat)) {}
  // `model`: a directory or a .gguf file; a run that is resumed has its template there. A template
  // that the user named must be good, or this throws Error; a model's own may be bad as long as
  // there are no conversations.
  StageTemplate(const Tokenizer& tokenizer, const std::filesystem::path& model,
                const StageTemplateFlags& flags)
      : tokenizer_(tokenizer) {
    const bool is_own = flags.name == "auto" && !chat_template(model).empty();
    const bool is_chatml = flags.name == "chatml" || (flags.name == "auto" && !is_own);
    try {
      require(!is_chatml || has_chatml_tokens(tokenizer), model.string(),
              ": found no <|im_start|> and <|im_end|> in the tokenizer, expected chat tokens: ",
              "./sft --add-chat-tokens adds them to a base model");
      chat_ = open_chat_template(tokenizer, model, is_chatml ? "chatml" : flags.name,
                                 {.date = flags.date});
      chat_->end_of_turn();  // throws where it has none: no stage could train it
    } catch (const Error& e) {
      if (flags.name != "auto") throw;
      chat_.reset();
      why_not_ = e.what();
    }
  }

  bool has() const { return chat_.has_value(); }
  const ChatTemplate& get() const {  // throws Error where there is none
    require(has(), why_not_);
    return *chat_;
  }
  const Tokenizer& tokenizer() const { return *tokenizer_; }

  // A raw text's beginning as ids: the document separator and the text.
  std::vector<int> text_ids(std::string_view text) const {
    std::vector<int> ids = {tokenizer_->document_separator()};
    tokenizer_->encode(text, ids);
    return ids;
  }
  // The id that ends what is trained on and scored: the end of turn of a chat, the tokenizer's
  // document separator of a raw text. Throws Error where there is none.
  int end_token(bool is_chat) const {
    return is_chat ? get().end_of_turn() : tokenizer_->document_separator();
  }
  // Whether the files of `model` lack this template, so that they have to be written anew.
  bool is_new(const std::filesystem::path& model) const {
    return has() && chat_->text() != chat_template(model);
  }

 private:
  std::optional<Tokenizer> tokenizer_;
  std::optional<ChatTemplate> chat_;
  std::string why_not_ = "no chat template was opened";
};

// Has a checkpoint hold the tokenizer of `model`: its files as they are, or with the stage's
// template where they lack it.
inline void save_tokenizer(SaveOptions& options, const StageTemplate& chat,
                           const std::filesystem::path& model) {
  if (!chat.is_new(model)) {
    options.tokenizer_from = model;
    return;
  }
  options.also = [tokenizer = with_chat_tokens(chat.tokenizer(), chat.get().text(), false),
                  also = std::move(options.also)](const std::filesystem::path& dir) {
    tokenizer.save(dir);
    if (also) also(dir);
  };
}

// Fails where the model in `dir`, which scores what another model wrote, was trained in another
// template than `chat`: it would read its conversations in a form that it has never seen.
inline void expect_same_template(const std::filesystem::path& dir, const ChatTemplate& chat) {
  const std::string found = chat_template(dir);
  if (found.empty()) return;  // of an older version
  if (without_generation_tags(found) == without_generation_tags(chat.text())) return;
  fail(dir.string(), ": found another chat template than that of ", chat.name(),
       ", expected the same: a model that scores conversations has to be trained in the template ",
       "that they are written in (--template names one)");
}

}  // namespace cake
