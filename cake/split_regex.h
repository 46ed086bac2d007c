// Regular expressions that cut text into pieces, compiled to deterministic automata.
// The interface; the subset of the language and the algorithms are bpe_split_regex.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

namespace cake {

// What a regular expression finds where several matches begin at one place is the first in the
// order of its alternatives and quantifiers (leftmost-first), as in Perl, Oniguruma, fancy-regex.
class SplitRegex {
 public:
  // Throws Error for what is outside the subset, with the byte of `regex` that it begins with.
  explicit SplitRegex(const std::string& regex);

  // The expression with every character of special meaning escaped.
  static std::string escape(std::string_view literal);
  // A regular expression as tiktoken reads it, spelled so that Oniguruma reads it in the same way:
  // for tiktoken x{1,3}+ is possessive and $ is the end of the text, for Oniguruma they are
  // (?:x{1,3})+ and the end of a line.
  static std::string spelled_for_oniguruma(const std::string& regex);

  // Whether both find the same matches in every text.
  bool finds_the_same(const SplitRegex& other) const;
  bool matches_empty() const { return matches_empty_; }  // somewhere

  // Of two neighbouring ASCII characters: whether a match can hold both.
  bool can_cross(char a, char b) const { return pair(crossing_, a, b); }
  // Whether the matches in front of the border depend on whether b or the end of the text is there.
  bool depends_on_next(char a, char b) const { return pair(dependent_, a, b); }
  // Whether a match begins in front of an ASCII character whatever follows it.
  bool always_begins(char b) const { return begins_[ascii_class(b)]; }
  // Whether a match ends between the two whatever surrounds them.
  bool always_ends(char a, char b) const { return always_begins(a) && pair(ending_, a, b); }

 private:
  friend class RegexScanner;
  friend class RegexCompiler;

  size_t ascii_class(char c) const { return ascii_[static_cast<unsigned char>(c) & 127]; }
  bool pair(const std::vector<bool>& table, char a, char b) const {
    return table[ascii_class(a) * width_ + ascii_class(b)];
  }
  uint32_t next(uint32_t row, size_t char_class) const { return next_[row + char_class]; }
  bool can_begin(size_t char_class) const { return next(start_, char_class) >> 1; }
  size_t end_class() const { return width_ - 1; }  // of the place behind the last character
  void find_pairs();
  void join_matches();

  // Code points that no set of the expression tells apart are one class. A code point: its page of
  // 256 in pages_, then its class in classes_.
  struct ClassRun {
    uint32_t begin;
    uint16_t char_class;
  };
  std::vector<ClassRun> runs_;  // by code point, the last one for bytes that are not UTF-8
  std::vector<uint16_t> pages_, classes_;
  uint16_t ascii_[128];
  uint16_t invalid_class_ = 0;

  // The automaton: a row of `width_` entries for each state, one entry for each class and one for
  // the end of the text. An entry is twice the index at which the row of the next state begins,
  // plus 1 if a match ends in front of the character. Row 0: no match goes on.
  std::vector<uint32_t> next_;
  // The same for texts in which matches follow one another: where a match ends, the next one begins
  // with the same character. An entry is four times the index of the row, plus 1 if a match may end
  // in front of the character, plus 2 if it does and the next begins.
  std::vector<uint32_t> joined_;
  size_t width_ = 0;
  uint32_t start_ = 0;
  bool matches_empty_ = false;
  std::vector<bool> crossing_, dependent_;  // (class, class)
  std::vector<bool> ending_;                // (class, class): each match that holds a ends before b
  std::vector<bool> begins_;                // (class)
};

// Finds the matches in one text. It takes time in proportion to the text: of a scan that looked far
// beyond its match it remembers from where no further match comes.
class RegexScanner {
 public:
  RegexScanner(const SplitRegex& regex, std::string_view text) : regex_(regex), text_(text) {}

  static constexpr size_t kNoMatch = size_t(-1);
  // The end of the match that begins at byte i, or kNoMatch.
  size_t match_end(size_t i);

  // Appends the matches and the text between them, of text[0, end), at which a piece must end. For
  // an expression that cannot match nothing. Finds what match_end finds, several times as fast.
  void split(size_t end, std::vector<std::string_view>& pieces);

 private:
  static constexpr size_t kFar = 32;  // bytes
  struct Character {
    size_t char_class, bytes;
  };
  Character character(size_t i) const;  // i is in the text
  bool fails_from(uint32_t row, size_t offset);

  const SplitRegex& regex_;
  std::string_view text_;
  std::vector<std::pair<uint32_t, size_t>> passed_;  // of this scan: (row, offset)
  std::unordered_set<uint64_t> failed_;              // of all scans
};

}  // namespace cake
