// How a tokenizer cuts text into pieces which tokens never cross: Hugging Face's pre-tokenizers.
// The interface; the algorithms are bpe_split.cpp.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace cake {

// The split patterns that have scanners written by hand.
enum class Pattern { gpt2, cl100k, qwen2, o200k };

const char* pattern_name(Pattern pattern);
const char* pattern_regex(Pattern pattern);      // as tokenizer.json spells it
Pattern parse_pattern(const std::string& name);  // throws Error for an unknown name

// The end of the piece of `text` that begins at byte `begin`, below text.size(), by the plain
// scanner.
size_t piece_end(Pattern pattern, std::string_view text, size_t begin);

// What becomes of the matches of a step and of the text between them; Hugging Face's names.
enum class SplitBehavior { isolated, removed, merged_with_previous, merged_with_next, contiguous };

struct SplitStep {
  enum class Kind { pattern, regex, literal, digits, punctuation };
  Kind kind = Kind::pattern;
  Pattern pattern = Pattern::gpt2;  // of kind pattern
  std::string text;                 // of kinds regex (as Oniguruma reads it) and literal
  SplitBehavior behavior = SplitBehavior::isolated;
  bool invert = false;            // matches and the text between them change places
  bool individual_digits = true;  // of kind digits: each digit is a piece of its own
  // Behind a ByteLevel step, as in Falcon: of each byte the step sees the character that ByteLevel
  // makes of it.
  bool of_bytes = false;
};

// A Split step with a regular expression of a tokenizer.json: of kind pattern where a scanner
// written by hand finds the same pieces, however the expression is spelled. Throws Error for one
// outside the subset that bpe_split_regex.cpp compiles.
SplitStep split_step(const std::string& regex);
// The same for one that tiktoken reads, which reads some spellings in another way.
SplitStep split_step_of_tiktoken(const std::string& regex);

// Steps, each of which cuts the pieces of the one before it. Copies share their data.
class PreTokenizer {
 public:
  explicit PreTokenizer(Pattern pattern = Pattern::gpt2);
  // Throws Error when a regular expression is outside the subset that bpe_split_regex.cpp compiles.
  explicit PreTokenizer(std::vector<SplitStep> steps);

  const std::vector<SplitStep>& steps() const;
  std::optional<Pattern> pattern() const;  // if one scanner written by hand does all of it

  // Appends the pieces of text[0, end), which must end where a piece ends. The text behind `end` is
  // looked at, because a piece of white space depends on what follows it.
  void split(std::string_view text, size_t end, std::vector<std::string_view>& pieces) const;

  // Whether the text in front of text[i] and the text from there on can be split apart from each
  // other, with the text behind the cut to look at: text[i] is enough. It depends on text[i-1] and
  // text[i] alone, which are ASCII; never at the last byte. Some pre-tokenizers have no such place.
  bool is_safe_cut(std::string_view text, size_t i) const;

  std::string description() const;  // all that decides what it does, for hashes

 private:
  struct Data;
  std::shared_ptr<const Data> data_;
};

}  // namespace cake
