// The split patterns at the speed of vector instructions: where pieces of text start, 64 bytes at a
// time. bpe_split.cpp has the same patterns in their plain form; the tests compare the two.
//
//   text --> bitmaps of each class: letters, numbers, ... --> a bitmap of starts --> positions
//
// One bit of a bitmap stands for one byte. A code point beyond ASCII is decoded and sets the bit of
// its class for each of its bytes. Whether a piece starts at a byte nearly always depends on the
// classes of its two or three neighbours, which is a shift and an AND for 64 bytes at once. What
// depends on a whole run of characters is carried through the run by an addition: x + y, where y is
// the lowest bit of a run of ones in x, has the bit behind the run set. What is rare (contractions,
// long numbers) is corrected afterwards, one by one.
//
// A chunk of text begins where a piece does, so that nothing is carried from one chunk to the next.
// It ends at the last start that no later text can change. A chunk without one is
// tried again eight times as long.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "cake/bpe.h"
#include "cake/bpe_simd.h"
#include "cake/split.h"
#include "cake/unicode.h"

namespace cake {

// Borders between two characters of three bytes (Chinese, Japanese, Korean, the scripts of India)
// that no token of a vocabulary crosses. Merges never join anything there, so that both sides can
// be encoded apart from each other. A Chinese sentence is one piece, and most sentences are new.
// Its parts between such borders are words, which the cache knows.
class TokenBorders {
 public:
  TokenBorders() : pairs_(1 << 10), contexts_(1 << (kBits - 6)) {}
  void add(std::string_view token) {
    for (size_t i = 1; i < token.size(); i++) {
      if (!is_border(token[i - 1], token[i])) continue;
      const int left = int(std::min<size_t>(i, 3));
      const int right = int(std::min<size_t>(token.size() - i, 3));
      set(contexts_, hash(token.data() + i, left, right));
      if (left + right < 6) set(pairs_, pair(token.data() + i));
    }
  }
  // False when a token may cross the border before `text`, between two characters of three bytes.
  // It looks at both characters. It may say false where no token crosses.
  bool can_cut(const char* text) const {
    if (has(contexts_, hash(text, 3, 3))) return false;
    if (!has(pairs_, pair(text))) return true;
    // Tokens that hold only a part of one of the characters. They are few.
    for (int left = 1; left <= 3; left++) {
      for (int right = 1; right <= 3; right++) {
        if (has(contexts_, hash(text, left, right))) return false;
      }
    }
    return true;
  }

 private:
  static constexpr int kBits = 20;
  using Bits = std::vector<uint64_t>;
  static uint8_t byte(char c) { return static_cast<unsigned char>(c); }
  static bool is_border(char before, char after) {
    return byte(before) >= 0x80 && byte(before) < 0xC0 && (byte(after) & 0xF0) == 0xE0;
  }
  static size_t pair(const char* text) { return size_t(byte(text[-1])) << 8 | byte(text[0]); }
  static size_t hash(const char* text, int left, int right) {
    uint64_t x = uint64_t(4 * left + right);
    for (int i = -left; i < right; i++) x = x << 8 | byte(text[i]);
    return size_t(x * 0x9e3779b97f4a7c15 >> (64 - kBits));
  }
  static bool has(const Bits& bits, size_t i) { return bits[i / 64] >> (i % 64) & 1; }
  static void set(Bits& bits, size_t i) { bits[i / 64] |= uint64_t(1) << (i % 64); }

  Bits pairs_;     // of the bytes beside a border, where a token holds a part of a character
  Bits contexts_;  // hashes of up to three bytes on each side of a border inside a token
};

template <class Isa>
class PieceScanner {
 public:
  explicit PieceScanner(Pattern pattern)
      : pattern_(pattern), separates_case_(pattern == Pattern::o200k), classes_(char_classes()) {
    for (int c = 0; c < 256; c++) {
      class_bits_[c] = c == kSpace || c == kNewline    ? kWhiteBit
                       : c == kUpper                   ? kLetterBit | kUpperBit
                       : c == kLower                   ? kLetterBit | kLowerBit
                       : c == kLetter                  ? kLetterBit
                       : c == kMark && separates_case_ ? kLetterBit | kMarkBit
                       : c == kNumber                  ? kNumberBit
                                                       : 0;
    }
  }

  // Finds pieces in text[begin, end): as many as a chunk holds, at least one. A piece starts at
  // `begin`, one ends at `end`, and the text behind `end` is looked at, but never memory behind it.
  // With `merges`, pieces are cut too where none of its tokens crosses a border. Returns the number
  // n of pieces: piece i is chunk()[starts()[i], starts()[i + 1]), and 16 bytes behind the last
  // piece are readable.
  size_t scan(std::string_view text, size_t begin, size_t end, const Merges* merges) {
    for (size_t words = kChunkWords;; words *= 8) {
      const size_t n = scan_chunk(text.substr(begin), end - begin, words, merges);
      if (n) return n;
    }
  }
  const char* chunk() const { return chunk_; }
  const uint32_t* starts() const { return positions_.data(); }

 private:
  static constexpr size_t kChunkWords = 256;
  enum : uint8_t {
    kLetterBit = 1,
    kNumberBit = 2,
    kWhiteBit = 4,
    kUpperBit = 8,
    kLowerBit = 16,
    kMarkBit = 32
  };
  // The bitmaps of 64 bytes. In o200k marks are letters; elsewhere they are signs.
  struct Word {
    uint64_t letter, number, white, newline, space, apostrophe;
    uint64_t sign;                       // none of letter, number, white
    uint64_t inner;                      // continuation bytes of well-formed code points
    uint64_t wide;                       // first bytes of letters of three bytes
    uint64_t upper, lower, slash, mark;  // for o200k alone. mark: first bytes
    uint64_t hard;                       // where find_starts() may be wrong
  };
  struct Place {
    uint32_t word;
    uint64_t bits;
  };

  size_t scan_chunk(std::string_view text, size_t left, size_t words, const Merges* merges);
  void set_chunk(std::string_view text, size_t words);
  void classify(size_t seen, size_t words);
  struct Spill;
  void add_high_bytes(Word& w, size_t offset, size_t seen, uint64_t high, Spill& spill);
  template <Pattern P>
  void find_starts(size_t words);
  template <Pattern P>
  uint64_t attached_newlines(const Word& w, uint64_t sign_before, uint64_t attached_before) const;
  uint64_t ends_without_newline(size_t i, size_t words, uint64_t begins, uint64_t white) const;
  void correct_wide_spaces();
  void correct_long_numbers(size_t seen);
  void correct_contractions(size_t seen);
  void correct_upper_tails(size_t seen, bool is_end_of_text);
  void rescan_hard_places(std::string_view text, size_t words);
  void cut_at_borders(size_t words, const TokenBorders& borders);
  size_t last_certain_start(size_t words) const;

  bool is_start(size_t i) const { return starts_[i / 64] >> (i % 64) & 1; }
  void set_start(size_t i) { starts_[i / 64] |= uint64_t(1) << (i % 64); }
  void clear_start(size_t i) { starts_[i / 64] &= ~(uint64_t(1) << (i % 64)); }
  static bool has(uint64_t bits, size_t i) { return bits >> (i % 64) & 1; }

  const Pattern pattern_;
  const bool separates_case_;
  const uint8_t* const classes_;
  uint8_t class_bits_[256];
  const char* chunk_ = nullptr;
  std::vector<char> tail_;  // a copy of the end of a text, with zeros behind it
  std::vector<Word> words_;
  std::vector<uint64_t> starts_;
  std::vector<uint32_t> positions_;
  bool has_wide_ = false;  // any of `wide` in the chunk
  size_t certain_ = 0;     // starts behind this byte of the chunk may be wrong
  std::vector<Place> wide_spaces_, long_numbers_, apostrophes_, upper_tails_;
};

// ---------------------------------------------------------------------------------------------
// A chunk

template <class Isa>
size_t PieceScanner<Isa>::scan_chunk(std::string_view text, size_t left, size_t words,
                                     const Merges* merges) {
  words = std::min(words, (left + 63) / 64);
  const size_t seen = std::min(text.size(), 64 * (words + 1));
  set_chunk(text, words);
  classify(seen, words);
  wide_spaces_.clear(), long_numbers_.clear(), apostrophes_.clear(), upper_tails_.clear();
  certain_ = seen;
  switch (pattern_) {
    case Pattern::gpt2:
      find_starts<Pattern::gpt2>(words);
      break;
    case Pattern::cl100k:
      find_starts<Pattern::cl100k>(words);
      break;
    case Pattern::qwen2:
      find_starts<Pattern::qwen2>(words);
      break;
    case Pattern::o200k:
      find_starts<Pattern::o200k>(words);
      break;
  }
  correct_wide_spaces();
  correct_long_numbers(seen);
  correct_contractions(seen);
  if (separates_case_) {
    correct_upper_tails(seen, seen == text.size());
    rescan_hard_places(text, words);
  }
  starts_[0] |= 1;
  const size_t chunk_end = left <= 64 * words ? left : last_certain_start(words);
  if (chunk_end == 0) return 0;
  const size_t used = (chunk_end + 63) / 64;
  if (merges && has_wide_) cut_at_borders(used, merges->borders());
  if (chunk_end % 64) starts_[used - 1] &= (uint64_t(1) << (chunk_end % 64)) - 1;
  uint32_t* out = positions_.data();
  for (size_t i = 0; i < used; i++) {
    out = Isa::write_positions(starts_[i], uint32_t(64 * i), out);
  }
  *out = uint32_t(chunk_end);
  return size_t(out - positions_.data());
}

// Whole blocks of 64 bytes are read. Where the last one would reach behind the text, the end of the
// text is copied.
template <class Isa>
void PieceScanner<Isa>::set_chunk(std::string_view text, size_t words) {
  if (words_.size() < words + 2) {
    words_.resize(words + 2), starts_.resize(words + 2);
    positions_.resize(64 * words + 80);
  }
  chunk_ = text.data();
  if (text.size() >= 64 * (words + 1)) return;
  tail_.resize(64 * (words + 2));
  std::memcpy(tail_.data(), text.data(), text.size());
  std::memset(tail_.data() + text.size(), 0, tail_.size() - text.size());
  chunk_ = tail_.data();
}

// The last start behind 0 that is certain: at a visible character, or at white space before one.
template <class Isa>
size_t PieceScanner<Isa>::last_certain_start(size_t words) const {
  for (size_t i = words; i-- > 0;) {
    if (64 * i > certain_) continue;
    const uint64_t visible = ~words_[i].white, next = ~words_[i + 1].white;
    uint64_t bits = starts_[i] & (visible | visible >> 1 | next << 63);
    if (certain_ < 64 * i + 63) bits &= (uint64_t(2) << (certain_ - 64 * i)) - 1;
    if (i == 0) bits &= ~uint64_t(1);
    if (bits) return 64 * i + 63 - size_t(std::countl_zero(bits));
  }
  return 0;
}

// ---------------------------------------------------------------------------------------------
// Classes

// What a code point that begins in one word sets in the next one.
template <class Isa>
struct PieceScanner<Isa>::Spill {
  uint64_t letter = 0, number = 0, white = 0, upper = 0, lower = 0, inner = 0;
};

// Fills words [0, words], of which the last one is only looked at; the text ends at `seen`.
template <class Isa>
void PieceScanner<Isa>::classify(size_t seen, size_t words) {
  Spill spill;
  has_wide_ = false;
  for (size_t i = 0; i <= words; i++) {
    Word& w = words_[i];
    if (64 * i >= seen) {
      w = Word{};
      continue;
    }
    const AsciiBits a = Isa::ascii_bits(chunk_ + 64 * i);
    w = {.letter = a.letter,
         .number = a.number,
         .white = a.white,
         .newline = a.newline,
         .space = a.space,
         .apostrophe = a.apostrophe};
    if (separates_case_) {
      const CaseBits c = Isa::case_bits(chunk_ + 64 * i);
      w.upper = c.upper, w.lower = c.lower, w.slash = c.slash;
    }
    const size_t left = seen - 64 * i;
    const uint64_t valid = left >= 64 ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
    const uint64_t high = a.high & valid;
    if (__builtin_expect((high | spill.inner) != 0, 0)) {
      add_high_bytes(w, 64 * i, seen, high, spill);
    }
    if (__builtin_expect(left < 64, 0)) {
      w.letter &= valid, w.number &= valid, w.white &= valid, w.newline &= valid;
      w.space &= valid, w.apostrophe &= valid, w.upper &= valid, w.lower &= valid;
      w.slash &= valid;
    }
    w.sign = ~(w.letter | w.number | w.white) & valid;
  }
}

// Sets the bits of bytes beyond ASCII. Ideographs by arithmetic; others are decoded one by one. A
// byte that belongs to no well-formed code point has no class, and counts as a sign.
template <class Isa>
__attribute__((noinline)) void PieceScanner<Isa>::add_high_bytes(Word& w, size_t offset,
                                                                 size_t seen, uint64_t high,
                                                                 Spill& spill) {
  w.letter |= spill.letter, w.number |= spill.number, w.white |= spill.white;
  w.upper |= spill.upper, w.lower |= spill.lower, w.inner |= spill.inner;
  high &= ~spill.inner;
  spill = Spill{};
  const HighBits h = Isa::high_bits(chunk_ + offset);
  const uint64_t ideographs = (h.lead_e5_to_e9 | (h.lead_e4 & h.from_b8 >> 1)) &
                              h.continuation >> 1 & h.continuation >> 2 & high & high >> 1 &
                              high >> 2;
  const uint64_t tails = ideographs << 1 | ideographs << 2;
  w.letter |= ideographs | tails, w.inner |= tails, w.wide |= ideographs;
  high &= ~(ideographs | tails);
  while (high) {
    const size_t i = size_t(std::countr_zero(high));
    const CodePoint c = decode_utf8(chunk_ + offset + i, seen - offset - i);
    const uint8_t k = c.code < kInvalid ? class_bits_[classes_[c.code]] : 0;
    const uint64_t first = uint64_t(1) << i;
    const uint64_t all = (uint64_t(1) << c.bytes) - 1, here = all << i;
    const uint64_t beyond = i + size_t(c.bytes) > 64 ? all >> (64 - i) : 0;
    const auto mask = [k](uint8_t bit) { return k & bit ? ~uint64_t(0) : 0; };
    w.letter |= here & mask(kLetterBit), spill.letter |= beyond & mask(kLetterBit);
    w.number |= here & mask(kNumberBit), spill.number |= beyond & mask(kNumberBit);
    w.white |= here & mask(kWhiteBit), spill.white |= beyond & mask(kWhiteBit);
    w.upper |= here & mask(kUpperBit), spill.upper |= beyond & mask(kUpperBit);
    w.lower |= here & mask(kLowerBit), spill.lower |= beyond & mask(kLowerBit);
    w.inner |= here & ~first, spill.inner |= beyond;
    w.mark |= first & mask(kMarkBit);
    if (c.bytes == 3) w.wide |= first & mask(kLetterBit);
    high &= ~here;
  }
  has_wide_ |= w.wide != 0;
}

// ---------------------------------------------------------------------------------------------
// Starts of pieces. x << 1 | before.x: bytes that follow a byte in x.

// Newlines that follow a sign belong to its piece; in o200k, so do slashes behind the newlines.
template <class Isa>
template <Pattern P>
uint64_t PieceScanner<Isa>::attached_newlines(const Word& w, uint64_t sign_before,
                                              uint64_t attached_before) const {
  if constexpr (P == Pattern::o200k) {
    const uint64_t joined = w.newline | w.slash;
    const uint64_t head = attached_before ? joined : sign_before ? w.newline : 0;
    const uint64_t begins = (w.sign << 1 & w.newline) | (head & 1);
    return (joined & ~(joined + begins)) | begins;
  } else {
    const uint64_t begins = (w.sign << 1 | sign_before | attached_before) & w.newline;
    return w.newline & ~(w.newline + begins);
  }
}

// In a run of white space with newlines a piece ends behind the last newline. `begins`: white space
// behind a newline. Returns those after which no newline follows in their run. `white`: white space
// that is no newline.
template <class Isa>
uint64_t PieceScanner<Isa>::ends_without_newline(size_t i, size_t words, uint64_t begins,
                                                 uint64_t white) const {
  if (!begins) return 0;
  const uint64_t sum = white + begins, ends = sum & ~white;
  if (__builtin_expect(sum >= white, 1)) return move_flags(~words_[i].newline, ends, begins);
  // The last run reaches the end of the word, and goes on in the next ones.
  const uint64_t last = uint64_t(1) << (63 - std::countl_zero(begins));
  uint64_t result = move_flags(~words_[i].newline, ends, begins ^ last);
  for (size_t j = i + 1; j <= words; j++) {
    const uint64_t other = ~(words_[j].white & ~words_[j].newline);
    if (!other) continue;
    if (!(words_[j].newline & other & -other)) result |= last;
    break;
  }
  return result;
}

template <class Isa>
template <Pattern P>
void PieceScanner<Isa>::find_starts(size_t words) {
  constexpr bool o200k = P == Pattern::o200k;
  struct {
    uint64_t letter, number, numbers, sign, space, white, plain_white, newline, attached;
    uint64_t joining;         // this byte follows a sign that starts a piece
    uint64_t lower, uncased;  // of o200k
  } before{};
  for (size_t i = 0; i < words; i++) {
    Word& w = words_[i];
    const Word& next = words_[i + 1];
    const uint64_t visible = w.letter | w.number | w.sign;
    const uint64_t next_visible = next.letter | next.number | next.sign;
    const uint64_t before_visible = visible >> 1 | next_visible << 63;
    const uint64_t before_letter = w.letter >> 1 | next.letter << 63;
    const uint64_t after_letter = w.letter << 1 | before.letter;
    const uint64_t after_number = w.number << 1 | before.number;
    const uint64_t after_space = w.space << 1 | before.space;
    uint64_t sign_starts = w.sign & ~(w.sign << 1 | before.sign) & ~after_space;
    uint64_t starts, last_white;  // last_white: white space before something visible

    if constexpr (P == Pattern::gpt2) {
      last_white = w.white & before_visible;
      starts = (w.letter & ~after_letter & ~after_space) |
               (w.number & ~after_number & ~after_space) | sign_starts |
               (w.white & ~(w.white << 1 | before.white)) | last_white;
      before.white = w.white >> 63;
    } else {
      const uint64_t attached = attached_newlines<P>(w, before.sign, before.attached);
      if constexpr (o200k) {
        const uint64_t signs = w.sign & ~attached;
        sign_starts = signs & ~(signs << 1 | (before.sign & ~before.attached)) & ~after_space;
      }
      const uint64_t white = w.white & ~attached, newline = w.newline & ~attached;
      const uint64_t plain_white = w.white & ~w.newline;
      last_white = plain_white & before_visible;
      const uint64_t after_newline = (newline << 1 | before.newline) & plain_white;

      // A letter behind a sign that starts a piece joins the sign. The sign may be several bytes.
      const uint64_t joining = sign_starts << 1 | before.joining;
      uint64_t sum;
      const bool carry = __builtin_add_overflow(w.inner, joining & w.inner, &sum);
      const uint64_t joined = (sum | joining) & ~w.inner;
      uint64_t letter_starts =
          w.letter & ~after_letter & ~(plain_white << 1 | before.plain_white) & ~joined;
      if constexpr (o200k) {
        // An upper-case letter behind lower-case ones, and behind letters without case that follow
        // lower-case ones.
        const uint64_t uncased = w.letter & ~(w.upper | w.lower);
        const uint64_t after_lower = w.lower << 1 | before.lower;
        uint64_t run;
        const bool runs_on = __builtin_add_overflow(uncased, after_lower & uncased, &run);
        letter_starts |= w.upper & (after_lower | (run & ~uncased));
        before.lower = w.lower >> 63 | uint64_t(runs_on);
        // Upper-case letters behind a letter without case: it depends on what follows them.
        const uint64_t tails = w.upper & (uncased << 1 | before.uncased);
        if (tails) upper_tails_.push_back({uint32_t(i), tails});
        before.uncased = uncased >> 63;
        // A mark that follows no letter may belong to signs.
        w.hard = w.mark & ~after_letter;
      }
      uint64_t number_starts;
      if constexpr (P == Pattern::qwen2) {
        number_starts = w.number & ~w.inner;
      } else {
        number_starts = w.number & ~after_number;
        const uint64_t longer = w.number & after_number & (w.number << 2 | before.numbers >> 62) &
                                (w.number << 3 | before.numbers >> 61);
        if (__builtin_expect(longer != 0, 0)) long_numbers_.push_back({uint32_t(i), longer});
      }
      starts = letter_starts | number_starts | sign_starts |
               (white & ~(white << 1 | before.white)) | last_white |
               ends_without_newline(i, words, after_newline, plain_white);
      before.white = white >> 63, before.plain_white = plain_white >> 63;
      before.newline = newline >> 63, before.attached = attached >> 63;
      before.numbers = w.number;
      before.joining = sign_starts >> 63 | uint64_t(carry);
    }
    if (__builtin_expect((last_white & w.inner) != 0, 0)) {  // the last byte of a wide space
      wide_spaces_.push_back({uint32_t(i), last_white & w.inner});
      starts &= ~(last_white & w.inner);
    }
    const uint64_t apostrophes =
        (o200k ? after_letter : sign_starts) & w.apostrophe & before_letter;
    if (apostrophes) apostrophes_.push_back({uint32_t(i), apostrophes});
    starts_[i] = starts;
    before.letter = w.letter >> 63, before.number = w.number >> 63;
    before.sign = w.sign >> 63, before.space = w.space >> 63;
  }
  starts_[words] = 0;
}

// ---------------------------------------------------------------------------------------------
// Corrections

// The last of several white spaces starts a piece: at its first byte.
template <class Isa>
void PieceScanner<Isa>::correct_wide_spaces() {
  for (const Place& place : wide_spaces_) {
    for (uint64_t bits = place.bits; bits; bits &= bits - 1) {
      size_t i = 64 * place.word + size_t(std::countr_zero(bits));
      while (has(words_[i / 64].inner, i)) i--;
      set_start(i);
    }
  }
}

// Every third character of a number starts a piece.
template <class Isa>
void PieceScanner<Isa>::correct_long_numbers(size_t seen) {
  size_t done = 0;
  for (const Place& place : long_numbers_) {
    for (uint64_t bits = place.bits; bits; bits &= bits - 1) {
      size_t i = 64 * place.word + size_t(std::countr_zero(bits));
      if (i < done) continue;
      int characters = 0;
      for (i -= 3; i < seen && has(words_[i / 64].number, i); i++) {
        if (has(words_[i / 64].inner, i)) continue;
        if (characters == 3) set_start(i), characters = 0;
        characters++;
      }
      done = i;
    }
  }
}

// 's, 't, 're, ... are pieces; in o200k they belong to the word before them, one for each word.
template <class Isa>
void PieceScanner<Isa>::correct_contractions(size_t seen) {
  size_t last_end = 0;
  for (const Place& place : apostrophes_) {
    for (uint64_t bits = place.bits; bits; bits &= bits - 1) {
      const size_t i = 64 * place.word + size_t(std::countr_zero(bits));
      const char fold = pattern_ == Pattern::gpt2 ? 0 : 0x20;
      const char raw = chunk_[i + 1], a = char(raw | fold);
      const char b = i + 2 < seen ? char(chunk_[i + 2] | fold) : '\0';
      size_t n = 0;
      if (a == 's' || a == 'd' || a == 'm' || a == 't') n = 2;
      if ((a == 'l' && b == 'l') || ((a == 'v' || a == 'r') && b == 'e')) n = 3;
      if (fold && raw == '\xC5' && i + 2 < seen && chunk_[i + 2] == '\xBF')
        n = 3;  // U+017F is an s
      if (!n || (separates_case_ && i == last_end)) continue;
      const size_t end = i + n;
      if (separates_case_) {
        last_end = end;
        for (size_t k = i; k < end; k++) clear_start(k);
        if (end < seen) {  // a letter without case would look at the case of the contraction
          Word& w = words_[end / 64];
          w.hard |= w.letter & ~(w.upper | w.lower) & uint64_t(1) << (end % 64);
        }
      }
      if (pattern_ == Pattern::gpt2) clear_start(i + 1);
      if (end < seen) set_start(end);
    }
  }
}

// Upper-case letters behind a letter without case, with no other letter behind them, are a word of
// their own: [lowers]+ has to match something.
template <class Isa>
void PieceScanner<Isa>::correct_upper_tails(size_t seen, bool is_end_of_text) {
  for (const Place& place : upper_tails_) {
    for (uint64_t bits = place.bits; bits; bits &= bits - 1) {
      const size_t begin = 64 * place.word + size_t(std::countr_zero(bits));
      size_t i = begin;
      while (i < seen) {
        const int run = std::countr_one(words_[i / 64].upper >> (i % 64));
        i += size_t(run);
        if (i % 64 != 0 || run == 0) break;
      }
      if (i >= seen && !is_end_of_text) {
        certain_ = std::min(certain_, begin - 1);
      } else if (i >= seen || !has(words_[i / 64].letter, i)) {
        set_start(begin);
      }
    }
  }
}

// Scans again in the plain way: from the last start before a hard place to a space behind a visible
// character, from where on the bitmaps are right.
template <class Isa>
void PieceScanner<Isa>::rescan_hard_places(std::string_view text, size_t words) {
  size_t done = 0;
  for (size_t i = 0; i < words;) {
    uint64_t bits = words_[i].hard;
    if (64 * i < done) bits &= ~uint64_t(0) << (done - 64 * i);
    if (!bits) {
      i++;
      continue;
    }
    const size_t hard = 64 * i + size_t(std::countr_zero(bits));
    size_t begin = hard;
    while (begin > done && !(begin < hard && is_start(begin))) begin--;
    const size_t limit = 64 * (words + 1);
    for (;;) {
      const size_t end = piece_end(pattern_, text, begin);
      for (size_t k = begin + 1; k < std::min(end, limit);) {
        const size_t until = std::min(std::min(end, limit), (k / 64 + 1) * 64);
        const uint64_t low = until % 64 ? (uint64_t(1) << (until % 64)) - 1 : ~uint64_t(0);
        starts_[k / 64] &= ~(low & ~uint64_t(0) << (k % 64));
        k = until;
      }
      begin = end;
      if (begin >= std::min(text.size(), 64 * words)) return;
      set_start(begin);
      if (begin > hard && chunk_[begin] == ' ' && !has(words_[(begin - 1) / 64].white, begin - 1)) {
        break;
      }
    }
    done = begin;
    i = done / 64;
  }
}

template <class Isa>
void PieceScanner<Isa>::cut_at_borders(size_t words, const TokenBorders& borders) {
  uint64_t before = 0;
  for (size_t i = 0; i < words; i++) {
    const uint64_t wide = words_[i].wide;
    uint64_t bits = wide & (wide << 3 | before >> 61) & ~starts_[i];
    before = wide;
    for (; bits; bits &= bits - 1) {
      const size_t offset = 64 * i + size_t(std::countr_zero(bits));
      if (borders.can_cut(chunk_ + offset)) set_start(offset);
    }
  }
}

}  // namespace cake
