// What the tests of the tokenizer share: texts that visit its corners, and small vocabularies.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "cake/tokenizer.h"
#include "test/support.h"

namespace cake {

using Ids = std::vector<int>;
inline constexpr const char* kAllPatterns[] = {"gpt2", "cl100k", "qwen2", "o200k"};

// Text that visits every class and every corner of the patterns.
inline std::string random_text(uint64_t seed, int characters) {
  static const std::vector<std::string> alphabet = {
      "a",      "b",      "c",      "e",      "A",      "B", "Z", "s",  "S",
      "t",      "ll",     "'",      "'",      " ",      " ", " ", "  ", "\n",
      "\n",     "\r\n",   "\t",     "/",      "!",      ".", "0", "1",  "23",
      "the ",   "ing ",   "\u0301", "日",     "本",     "ſ", "ß", "ǅ",  "ʰ",
      "\u00a0", "\u3000", "\u0085", "\u001c", "\u200b", "½", "é", "É",  "😀"};
  Rng rng{seed};
  std::string text;
  for (int i = 0; i < characters; i++) text += alphabet[rng.below(alphabet.size())];
  return text;
}

// Long words of two letters: almost every border is contested, most tokens have several splits.
inline std::string two_letters(uint64_t seed, int n) {
  Rng rng{seed};
  std::string text;
  for (int i = 0; i < n; i++) text += rng.below(3) ? (rng.below(200) ? "a" : " ") : "b";
  return text;
}

inline std::string random_bytes(uint64_t seed, size_t n) {
  Rng rng{seed};
  std::string bytes;
  while (bytes.size() < n) bytes += char(rng.next());
  return bytes;
}

inline std::string path_of(const TempDir& dir, const std::string& name,
                           const std::string& content) {
  write_file(dir / name, content);
  return (dir / name).string();
}

inline Tokenizer train_on(const std::string& text, int vocab_size, const std::string& pattern,
                          int threads = 1) {
  TempDir dir;
  Corpus corpus{.inputs = {path_of(dir, "text.txt", text)}, .threads = threads};
  return train_tokenizer(corpus, vocab_size, pattern);
}

// The merges of a tokenizer that was trained here: its ids are ranks, so that the merges before a
// token leave its two parts of its bytes.
inline const std::vector<plain::Merge>& merges_of(const Tokenizer& tokenizer) {
  static std::map<uint64_t, std::vector<plain::Merge>> known;
  std::vector<plain::Merge>& merges = known[tokenizer.hash()];
  for (int id = 256 + int(merges.size()); !tokenizer.is_special(id); id++) {
    const Ids parts = plain::encode(tokenizer.token_bytes(id), merges);
    REQUIRE(parts.size() == 2);
    merges.push_back({parts[0], parts[1]});
  }
  return merges;
}

}  // namespace cake
