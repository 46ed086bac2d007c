// Conversations in our own template, ChatML, for tests: what they compare with.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>

#include "cake/chat_template.h"

namespace cake {

// One for each tokenizer: a template is read once. Any thread may call it.
inline const ChatTemplate& chatml_template(const Tokenizer& tokenizer) {
  static std::mutex mutex;
  static std::map<const TokenizerData*, ChatTemplate> templates;  // which keep the data alive
  const std::lock_guard lock(mutex);
  const auto it = templates.find(&tokenizer.data());
  if (it != templates.end()) return it->second;
  return templates
      .emplace(&tokenizer.data(), ChatTemplate(tokenizer, kChatTemplate, "chat template"))
      .first->second;
}

// With a mask where the assistant says something and no generation prompt follows.
inline Rendered chatml(const Tokenizer& tokenizer, const Conversation& conversation,
                       bool generation_prompt = false) {
  const ChatTemplate& chat_template = chatml_template(tokenizer);
  const bool is_answered = std::any_of(conversation.messages.begin(), conversation.messages.end(),
                                       [](const Message& m) { return m.role == "assistant"; });
  return is_answered && !generation_prompt ? chat_template.render_for_training(conversation)
                                           : chat_template.render(conversation, generation_prompt);
}

}  // namespace cake
