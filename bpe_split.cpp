// Part of ./bpe: how text is cut into pieces that tokens never cross. The interface is
// cake/split.h.
//
//     text -> step 1 -> pieces -> step 2, on each of them -> ... -> pieces
//
// A step finds matches; what becomes of them and of the text between them is its behaviour. Most
// steps are regular expressions. bpe_split_regex.cpp compiles any of its subset. Those of the most
// used vocabularies have scanners written by hand here, a few lines over one class per code point:
// they define what the faster scanner of bpe_encode.cpp must find.
#include "cake/split.h"

#include <algorithm>
#include <bitset>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "cake/run.h"
#include "cake/split_regex.h"
#include "cake/unicode.h"

namespace cake {
namespace {

// ---------------------------------------------------------------------------------------------
// Split patterns

struct PatternInfo {
  Pattern pattern;
  const char* name;
  const char* regex;  // as tokenizer.json spells it
};

constexpr PatternInfo kPatterns[] = {
    {Pattern::gpt2, "gpt2",
     R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)"},
    {Pattern::cl100k, "cl100k",
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
     R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"},
    {Pattern::qwen2, "qwen2",
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})"
     R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"},
    {Pattern::o200k, "o200k",
     R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
     R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
     R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}};

const PatternInfo& pattern_info(Pattern pattern) { return kPatterns[size_t(pattern)]; }

constexpr unsigned bit(int kind) { return 1u << kind; }

// Finds where pieces end. Each pattern is a member function, which tests the alternatives of the
// regular expression in their order.
class Scanner {
 public:
  Scanner(std::string_view text, Pattern pattern)
      : text_(text), end_(text.size()), pattern_(pattern) {}

  // The end of the piece that begins at byte `i` of the text. Each call continues where the last
  // one ended.
  size_t piece_end(size_t i) const {
    if (pattern_ == Pattern::gpt2) return gpt2(i);
    if (pattern_ == Pattern::o200k) return o200k(i);
    return cl100k(i, pattern_ == Pattern::qwen2 ? 1 : 3);
  }

 private:
  static constexpr int kEnd = 8;  // the class of the position behind the last character
  static constexpr unsigned kLetters = bit(kUpper) | bit(kLower) | bit(kLetter);
  static constexpr unsigned kSpaces = bit(kSpace) | bit(kNewline);
  static constexpr unsigned kSigns = bit(kOther) | bit(kMark);  // [^\s\p{L}\p{N}]
  // The one character that may stand in front of a word: [^\r\n\p{L}\p{N}]
  static constexpr unsigned kPrefixes = kSigns | bit(kSpace);
  // o200k's words: upper-case characters, then lower-case ones. Marks and letters without case
  // count as both.
  static constexpr unsigned kUncased = bit(kLetter) | bit(kMark);
  static constexpr unsigned kUppers = bit(kUpper) | kUncased, kLowers = bit(kLower) | kUncased;

  struct Char {
    int kind, bytes;
    bool in(unsigned mask) const { return mask >> kind & 1; }
  };

  Char char_at(size_t i) const {
    if (i >= end_) return {kEnd, 0};
    const auto byte = static_cast<unsigned char>(text_[i]);
    if (byte < 0x80) return {classes_[byte], 1};
    const CodePoint c = decode_utf8(text_.data() + i, end_ - i);
    return {c.code < kInvalid ? classes_[c.code] : int(kOther), c.bytes};
  }
  bool has(size_t i, char c) const { return i < end_ && text_[i] == c; }

  // The end of the run of characters in `mask` that begins at `i`.
  size_t skip(size_t i, unsigned mask) const {
    for (Char c; (c = char_at(i)).in(mask);) i += size_t(c.bytes);
    return i;
  }

  // '(?:[sdmt]|ll|ve|re): its end, or i. In any case (?i:), U+017F counts as an s.
  size_t contraction(size_t i, bool any_case) const {
    if (!has(i, '\'')) return i;
    const auto lower = [&](size_t j) {
      const char c = j < end_ ? text_[j] : '\0';
      return any_case && c >= 'A' && c <= 'Z' ? char(c + 32) : c;
    };
    const char a = lower(i + 1), b = lower(i + 2);
    if (a == 's' || a == 'd' || a == 'm' || a == 't') return i + 2;
    if ((a == 'l' && b == 'l') || ((a == 'v' || a == 'r') && b == 'e')) return i + 3;
    if (any_case && a == '\xC5' && b == '\xBF') return i + 3;
    return i;
  }

  // \s+(?!\S)|\s+, and before them \s*[\r\n]+ where newlines come head.
  size_t white_space(size_t i, bool newlines_first) const {
    size_t e = i, last = i, after_newline = i;  // last: where the run's last character begins
    for (Char c; (c = char_at(e)).in(kSpaces); e += size_t(c.bytes)) {
      last = e;
      if (c.kind == kNewline) after_newline = e + 1;
    }
    if (newlines_first && after_newline > i) return after_newline;
    return e == end_ || last == i ? e : last;
  }

  size_t gpt2(size_t i) const {
    const size_t end = contraction(i, false);
    if (end > i) return end;
    const size_t start = i + has(i, ' ');
    const Char head = char_at(start);
    if (head.in(kLetters)) return skip(start, kLetters);
    if (head.in(bit(kNumber))) return skip(start, bit(kNumber));
    if (head.in(kSigns)) return skip(start, kSigns);
    return white_space(i, false);
  }

  size_t cl100k(size_t i, int digits) const {
    const size_t end = contraction(i, true);
    if (end > i) return end;
    const Char head = char_at(i);
    const size_t next = i + size_t(head.bytes);
    if (head.in(kLetters)) return skip(i, kLetters);
    if (head.in(kPrefixes) && char_at(next).in(kLetters)) return skip(next, kLetters);
    if (head.kind == kNumber) return number(i, digits);
    const size_t start = i + has(i, ' ');
    if (char_at(start).in(kSigns)) return skip(skip(start, kSigns), bit(kNewline));
    return white_space(i, true);
  }

  size_t o200k(size_t i) const {
    const Char head = char_at(i);
    const size_t next = i + size_t(head.bytes);
    size_t e = i;
    // The two kinds of words, each tried with the prefix and then without.
    if (head.in(kPrefixes)) e = cased_word(next, i);
    if (e == i) e = cased_word(i, i);
    if (e == i && head.in(kPrefixes)) e = upper_word(next, i);
    if (e == i) e = upper_word(i, i);
    if (e > i) return contraction(e, true);
    if (head.kind == kNumber) return number(i, 3);
    const size_t start = i + has(i, ' ');
    if (!char_at(start).in(kSigns)) return white_space(i, true);
    for (e = skip(start, kSigns); has(e, '\r') || has(e, '\n') || has(e, '/');) e++;
    return e;
  }

  // The end of [uppers]*[lowers]+ from i, or `none`. Where no lower follows the uppers, the regular
  // expression backtracks to the last of them that is a lower too: one without case.
  size_t cased_word(size_t i, size_t none) const {
    size_t e = i, after_uncased = none;
    for (Char c; (c = char_at(e)).in(kUppers);) {
      e += size_t(c.bytes);
      if (c.in(kUncased)) after_uncased = e;
    }
    return char_at(e).in(kLowers) ? skip(e, kLowers) : after_uncased;
  }
  // The end of [uppers]+[lowers]* from i, or `none`.
  size_t upper_word(size_t i, size_t none) const {
    const size_t e = skip(i, kUppers);
    return e > i ? skip(e, kLowers) : none;
  }

  size_t number(size_t i, int digits) const {
    for (Char c; digits-- > 0 && (c = char_at(i)).kind == kNumber;) i += size_t(c.bytes);
    return i;
  }

  std::string_view text_;
  size_t end_;  // of the text that the pattern sees
  Pattern pattern_;
  const uint8_t* classes_ = char_classes();
};

// ---------------------------------------------------------------------------------------------
// One step

const SplitRegex& compiled(Pattern pattern) {
  static const SplitRegex gpt2(pattern_regex(Pattern::gpt2)),
      cl100k(pattern_regex(Pattern::cl100k)), qwen2(pattern_regex(Pattern::qwen2)),
      o200k(pattern_regex(Pattern::o200k));
  const SplitRegex* const all[] = {&gpt2, &cl100k, &qwen2, &o200k};
  return *all[size_t(pattern)];
}

struct CompiledStep {
  SplitStep step;                           // of every kind but pattern: `text` is set
  std::shared_ptr<const SplitRegex> regex;  // of every kind but pattern

  explicit CompiledStep(const SplitStep& s) : step(s) {
    if (step.kind == SplitStep::Kind::digits) {
      step.text = step.individual_digits ? R"(\p{N})" : R"(\p{N}+)";
      step.behavior = SplitBehavior::isolated, step.invert = false;
    } else if (step.kind == SplitStep::Kind::punctuation) {
      step.text = R"([\p{P}!-/:-@\[-`{-~])";  // Hugging Face adds the symbols of ASCII
    }
    if (step.kind == SplitStep::Kind::pattern) return;
    const bool literal = step.kind == SplitStep::Kind::literal;
    regex = std::make_shared<SplitRegex>(literal ? SplitRegex::escape(step.text) : step.text);
  }

  const SplitRegex& automaton() const { return regex ? *regex : compiled(step.pattern); }

  // Whether every match is a piece, and so is the text between two. A known pattern matches all of
  // the text, so that there is nothing between.
  bool isolates() const {
    if (step.behavior == SplitBehavior::isolated) return true;
    return step.kind == SplitStep::Kind::pattern && step.behavior == SplitBehavior::removed &&
           step.invert;
  }
};

// Calls found(begin, end) for the matches that begin in text[0, end), and for an empty one at the
// end of the text. The text behind `end` is looked at.
template <class Found>
void each_match(const CompiledStep& step, std::string_view text, size_t end, Found&& found) {
  if (step.step.kind == SplitStep::Kind::pattern) {
    const Scanner scanner(text, step.step.pattern);
    for (size_t i = 0; i < end;) {
      const size_t next = scanner.piece_end(i);
      found(i, next);
      i = next;
    }
    return;
  }
  RegexScanner scanner(*step.regex, text);
  size_t last_end = RegexScanner::kNoMatch;
  const bool empty_at_end = step.regex->matches_empty() && end == text.size();
  for (size_t i = 0; i < end + empty_at_end;) {
    const size_t match_end = scanner.match_end(i);
    // Hugging Face passes over an empty match right behind another match.
    if (match_end != RegexScanner::kNoMatch && (match_end > i || match_end != last_end)) {
      found(i, match_end);
      last_end = match_end;
    }
    if (match_end != RegexScanner::kNoMatch && match_end > i) {
      i = match_end;
    } else {
      i += i < text.size() ? size_t(decode_utf8(text.data() + i, text.size() - i).bytes) : 1;
    }
  }
}

// The other behaviours, as Hugging Face has them. Matches and the text between them alternate, or
// matches follow one another.
void split_by_behavior(const CompiledStep& step, std::string_view text, size_t end,
                       std::vector<std::string_view>& pieces) {
  struct Part {
    size_t begin, end;
    bool match;
  };
  std::vector<Part> parts;
  size_t begin = 0;
  each_match(step, text, end, [&](size_t match_begin, size_t match_end) {
    if (match_begin > begin) parts.push_back({begin, match_begin, step.step.invert});
    parts.push_back({match_begin, match_end, !step.step.invert});
    begin = match_end;
  });
  if (end > begin) parts.push_back({begin, end, step.step.invert});

  const SplitBehavior behavior = step.step.behavior;
  std::vector<Part> out;
  if (behavior == SplitBehavior::merged_with_next) std::reverse(parts.begin(), parts.end());
  bool previous = false;  // whether the last part was a match
  for (const Part& part : parts) {
    bool merge = part.match && !previous;
    if (behavior == SplitBehavior::contiguous) merge = part.match == previous;
    if (behavior == SplitBehavior::removed) merge = false;
    previous = part.match;
    if (behavior == SplitBehavior::removed && part.match) continue;
    if (!merge || out.empty()) {
      out.push_back(part);
    } else if (behavior == SplitBehavior::merged_with_next) {
      out.back().begin = part.begin;
    } else {
      out.back().end = part.end;
    }
  }
  if (behavior == SplitBehavior::merged_with_next) std::reverse(out.begin(), out.end());
  for (const Part& part : out) {
    if (part.end > part.begin) pieces.push_back(text.substr(part.begin, part.end - part.begin));
  }
}

// Cuts one piece by one step.
void split_by(const CompiledStep& step, std::string_view text, size_t end,
              std::vector<std::string_view>& pieces) {
  if (end == 0) return;
  if (!step.isolates()) return split_by_behavior(step, text, end, pieces);
  if (step.regex && !step.regex->matches_empty()) {
    return RegexScanner(*step.regex, text).split(end, pieces);
  }
  size_t begin = 0;
  each_match(step, text, end, [&](size_t match_begin, size_t match_end) {
    if (match_begin > begin) pieces.push_back(text.substr(begin, match_begin - begin));
    if (match_end > match_begin) {
      pieces.push_back(text.substr(match_begin, match_end - match_begin));
    }
    begin = match_end;
  });
  if (end > begin) pieces.push_back(text.substr(begin, end - begin));
}

// The same for a step that sees bytes as ByteLevel's characters: printable bytes of Latin-1 stand
// for themselves, the others, in their order, are U+0100 and what follows it.
void split_bytes_by(const CompiledStep& step, std::string_view text,
                    std::vector<std::string_view>& pieces) {
  static const std::vector<std::string> characters = [] {
    std::vector<std::string> out(256);
    uint32_t other = 0x100;
    for (uint32_t b = 0; b < 256; b++) {
      const bool printable = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
      append_utf8(out[b], printable ? b : other++);
    }
    return out;
  }();
  std::string mapped;
  for (const char byte : text) mapped += characters[static_cast<unsigned char>(byte)];
  std::vector<std::string_view> mapped_pieces;
  split_by(step, mapped, mapped.size(), mapped_pieces);
  size_t begin = 0;
  const char* behind = mapped.data();
  const auto skip_to = [&](const char* place) {  // the byte whose character begins there
    size_t bytes = 0;
    for (; behind < place; behind++) bytes += (*behind & 0xC0) != 0x80;
    begin += bytes;
  };
  for (const std::string_view piece : mapped_pieces) {
    skip_to(piece.data());
    const size_t piece_begin = begin;
    skip_to(piece.data() + piece.size());
    pieces.push_back(text.substr(piece_begin, begin - piece_begin));
  }
}

}  // namespace

const char* pattern_name(Pattern pattern) { return pattern_info(pattern).name; }
const char* pattern_regex(Pattern pattern) { return pattern_info(pattern).regex; }

Pattern parse_pattern(const std::string& name) {
  for (const PatternInfo& p : kPatterns) {
    if (name == p.name) return p.pattern;
  }
  fail("--pattern: found ", name, ", expected gpt2, cl100k, qwen2 or o200k");
}

size_t piece_end(Pattern pattern, std::string_view text, size_t begin) {
  return Scanner(text, pattern).piece_end(begin);
}

SplitStep split_step(const std::string& regex) {
  for (const PatternInfo& known : kPatterns) {
    if (regex == known.regex) return {.pattern = known.pattern};
  }
  const SplitRegex automaton(regex);
  for (const PatternInfo& known : kPatterns) {
    if (automaton.finds_the_same(compiled(known.pattern))) return {.pattern = known.pattern};
  }
  return {.kind = SplitStep::Kind::regex, .text = regex};
}

SplitStep split_step_of_tiktoken(const std::string& regex) {
  return split_step(SplitRegex::spelled_for_oniguruma(regex));
}

// ---------------------------------------------------------------------------------------------
// The steps in turn

struct PreTokenizer::Data {
  std::vector<SplitStep> steps;
  std::vector<CompiledStep> compiled;

  // Of two neighbouring ASCII characters: whether text can be cut between them. Made when it is
  // first asked for.
  mutable std::once_flag safe_once;
  mutable std::bitset<128 * 128> safe;
  void find_safe_pairs() const;
};

PreTokenizer::PreTokenizer(Pattern pattern)
    : PreTokenizer(std::vector<SplitStep>{{.pattern = pattern}}) {}

PreTokenizer::PreTokenizer(std::vector<SplitStep> steps) {
  auto data = std::make_shared<Data>();
  for (const SplitStep& step : steps) data->compiled.emplace_back(step);
  data->steps = std::move(steps);
  data_ = data;
}

const std::vector<SplitStep>& PreTokenizer::steps() const { return data_->steps; }

std::optional<Pattern> PreTokenizer::pattern() const {
  if (data_->compiled.size() != 1) return std::nullopt;
  const CompiledStep& step = data_->compiled[0];
  const bool known = step.step.kind == SplitStep::Kind::pattern && !step.step.of_bytes;
  if (!known || !step.isolates()) return std::nullopt;
  return step.step.pattern;
}

void PreTokenizer::split(std::string_view text, size_t end,
                         std::vector<std::string_view>& pieces) const {
  const std::vector<CompiledStep>& steps = data_->compiled;
  if (steps.empty()) {
    if (end > 0) pieces.push_back(text.substr(0, end));
    return;
  }
  const auto split_one = [&](size_t s, std::string_view piece, size_t piece_end,
                             std::vector<std::string_view>& out) {
    if (steps[s].step.of_bytes) return split_bytes_by(steps[s], piece.substr(0, piece_end), out);
    split_by(steps[s], piece, piece_end, out);
  };
  if (steps.size() == 1) return split_one(0, text, end, pieces);
  std::vector<std::string_view> now, next;
  split_one(0, text, end, now);
  for (size_t s = 1; s < steps.size(); s++) {
    std::vector<std::string_view>& out = s + 1 < steps.size() ? next : pieces;
    for (const std::string_view piece : now) split_one(s, piece, piece.size(), out);
    now.swap(next);
    next.clear();
  }
}

// A cut is safe if some step ends a piece there whatever surrounds the two characters, and no match
// of the steps before it depends on the cut: none holds both characters, and none that ends there
// looks behind the end of its piece. The first step is shown the text behind the cut.
void PreTokenizer::Data::find_safe_pairs() const {
  const auto is_safe = [&](char a, char b) {
    for (size_t s = 0; s < compiled.size(); s++) {
      const CompiledStep& now = compiled[s];
      const SplitBehavior behavior = now.step.behavior;
      if (now.step.of_bytes || behavior == SplitBehavior::merged_with_previous ||
          behavior == SplitBehavior::merged_with_next) {
        return false;
      }
      const SplitRegex& regex = now.automaton();
      if (regex.can_cross(a, b) || (s > 0 && regex.depends_on_next(a, b))) return false;
      const bool ends = regex.always_begins(b) || regex.always_ends(a, b);
      if (ends && behavior != SplitBehavior::contiguous) return true;
    }
    return false;
  };
  for (int a = 0; a < 128; a++) {
    for (int b = 0; b < 128; b++) safe[size_t(a * 128 + b)] = is_safe(char(a), char(b));
  }
}

bool PreTokenizer::is_safe_cut(std::string_view text, size_t i) const {
  if (i == 0 || i + 1 >= text.size()) return false;
  const auto a = static_cast<unsigned char>(text[i - 1]), b = static_cast<unsigned char>(text[i]);
  if (a == '\n' && b >= 0x80 && pattern()) {  // as before a letter of ASCII
    const CodePoint c = decode_utf8(text.data() + i, text.size() - i);
    return c.code < kInvalid && !is_white_space(c.code);
  }
  if (a >= 0x80 || b >= 0x80) return false;
  std::call_once(data_->safe_once, [&] { data_->find_safe_pairs(); });
  return data_->safe[a * 128u + b];
}

std::string PreTokenizer::description() const {
  if (const std::optional<Pattern> known = pattern()) return pattern_name(*known);
  const std::vector<CompiledStep>& all = data_->compiled;
  const auto is_gpt2 = [](const CompiledStep& now) {
    return now.isolates() && now.step.kind == SplitStep::Kind::pattern && !now.step.of_bytes &&
           now.step.pattern == Pattern::gpt2;
  };
  if (all.size() == 2 && all[0].step.kind == SplitStep::Kind::digits &&
      all[0].step.individual_digits && !all[0].step.of_bytes && is_gpt2(all[1])) {
    return "gpt2_digits";
  }
  std::string out;
  for (const CompiledStep& now : all) {
    const SplitStep& step = now.step;
    const std::string text =
        step.kind == SplitStep::Kind::pattern ? pattern_name(step.pattern) : step.text;
    const int behavior = now.isolates() ? 0 : 1 + int(step.behavior) * 2 + step.invert;
    out += concat(step.of_bytes ? "bytes " : "step ", int(step.kind), " ", behavior, " ",
                  text.size(), " ", text, "\n");
  }
  return out;
}

}  // namespace cake
