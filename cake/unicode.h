// UTF-8, and what text processing asks of Unicode: properties of code points, lower case. All
// tables are of the one version that cake/unicode_tables.h names; they are unpacked at first use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "cake/unicode_tables.h"

namespace cake {

// -------------------------------------------------------------------------------------------------
// UTF-8

// A code point of UTF-8 and its length. A byte that no well-formed sequence holds stands for
// itself: kInvalid plus the byte, one byte long.
struct CodePoint {
  uint32_t code;
  int bytes;
};
inline constexpr uint32_t kInvalid = 0x110000;        // plus the byte
inline constexpr uint32_t kCodes = kInvalid + 0x100;  // what `code` is below

// The code point that text[0, left) begins with; left is at least 1.
inline CodePoint decode_utf8(const char* text, size_t left) {
  const auto* p = reinterpret_cast<const unsigned char*>(text);
  const auto tail = [&](size_t i) { return i < left && (p[i] & 0xC0) == 0x80; };
  const uint32_t a = p[0];
  if (a < 0x80) return {a, 1};
  if (a >= 0xC2 && a < 0xE0 && tail(1)) return {(a & 31) << 6 | (p[1] & 63u), 2};
  if (a >= 0xE0 && a < 0xF0 && tail(1) && tail(2)) {
    const uint32_t c = (a & 15) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u);
    if (c >= 0x800 && (c < 0xD800 || c > 0xDFFF)) return {c, 3};
  }
  if (a >= 0xF0 && a < 0xF5 && tail(1) && tail(2) && tail(3)) {
    const uint32_t c = (a & 7) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
    if (c >= 0x10000 && c <= 0x10FFFF) return {c, 4};
  }
  return {kInvalid + a, 1};
}

// The code point that text[0, end) ends with; end is at least 1.
inline CodePoint decode_utf8_before(std::string_view text, size_t end) {
  size_t begin = end - 1;
  while (begin > 0 && end - begin < 4 && (text[begin] & 0xC0) == 0x80) begin--;
  const CodePoint c = decode_utf8(text.data() + begin, end - begin);
  if (begin + size_t(c.bytes) == end) return c;
  return {kInvalid + static_cast<unsigned char>(text[end - 1]), 1};
}

// Writes a code point, or the byte of an invalid one, to out[0, 4). Returns its length.
inline int encode_utf8(uint32_t c, char* out) {
  if (c < 0x80) return out[0] = char(c), 1;
  if (c < 0x800) return out[0] = char(0xC0 | c >> 6), out[1] = char(0x80 | (c & 63)), 2;
  if (c >= kInvalid) return out[0] = char(c - kInvalid), 1;
  const bool four = c >= 0x10000;
  if (four) *out++ = char(0xF0 | c >> 18);
  out[0] = char(four ? 0x80 | (c >> 12 & 63) : 0xE0 | c >> 12);
  out[1] = char(0x80 | (c >> 6 & 63));
  out[2] = char(0x80 | (c & 63));
  return 3 + four;
}
inline void append_utf8(std::string& out, uint32_t c) {
  char bytes[4];
  out.append(bytes, size_t(encode_utf8(c, bytes)));
}

// -------------------------------------------------------------------------------------------------
// Properties. Functions of a code point take `code` of a CodePoint too: a byte that is not UTF-8 is
// unassigned (Cn) and has no other property.

// All that the hand-written split patterns tell apart. White space is the property White_Space,
// without the two newlines that patterns name.
enum CharClass : uint8_t {
  kOther,    // punctuation, symbols, controls, unassigned
  kSpace,    // White_Space without \r and \n
  kNewline,  // \r, \n
  kUpper,    // Lu, Lt
  kLower,    // Ll
  kLetter,   // Lm, Lo: letters without case
  kMark,     // Mn, Mc, Me
  kNumber,   // Nd, Nl, No
};

namespace unicode {

inline constexpr uint8_t kCategoryBits = 31, kWhiteSpaceBit = 32, kHanBit = 64;

struct Properties {
  std::vector<uint8_t> bits;     // of every code: its category, and the bits above
  std::vector<uint8_t> classes;  // of every code: its CharClass

  Properties() : bits(kCodes), classes(kCodes) {
    size_t c = 0;
    for (const int run : kCategoryRuns) {
      const int kind = run & 31;
      for (int i = 0; i < run >> 5; i++) {
        const bool odd = i % 2 == 1;
        bits[c++] = uint8_t(kind < 30             ? Category(kind)
                            : odd == (kind == 30) ? Category::Ll
                                                  : Category::Lu);
      }
    }
    const auto set_bit = [&](const int* begin, const int* end, uint8_t bit) {
      for (; begin != end; begin += 2)
        for (int i = begin[0]; i <= begin[1]; i++) bits[size_t(i)] |= bit;
    };
    set_bit(std::begin(kWhiteSpaceRanges), std::end(kWhiteSpaceRanges), kWhiteSpaceBit);
    set_bit(std::begin(kHanRanges), std::end(kHanRanges), kHanBit);
    for (c = 0; c < kCodes; c++) classes[c] = char_class(uint32_t(c));
  }

 private:
  CharClass char_class(uint32_t c) const {
    if (c == '\r' || c == '\n') return kNewline;
    if (bits[c] & kWhiteSpaceBit) return kSpace;
    switch (Category(bits[c] & kCategoryBits)) {
      case Category::Lu:
      case Category::Lt:
        return kUpper;
      case Category::Ll:
        return kLower;
      case Category::Lm:
      case Category::Lo:
        return kLetter;
      case Category::Mn:
      case Category::Mc:
      case Category::Me:
        return kMark;
      case Category::Nd:
      case Category::Nl:
      case Category::No:
        return kNumber;
      default:
        return kOther;
    }
  }
};
inline const Properties& properties() {
  static const Properties tables;
  return tables;
}

}  // namespace unicode

// The class of every code, kCodes bytes.
inline const uint8_t* char_classes() { return unicode::properties().classes.data(); }

inline Category general_category(uint32_t c) {
  return Category(unicode::properties().bits[c] & unicode::kCategoryBits);
}
inline bool is_white_space(uint32_t c) {
  return unicode::properties().bits[c] & unicode::kWhiteSpaceBit;
}
inline bool is_han(uint32_t c) { return unicode::properties().bits[c] & unicode::kHanBit; }

// Whether a category is one of those from `begin` to `end`: they stand together by first letter.
inline bool is_between(Category category, Category begin, Category end) {
  return category >= begin && category <= end;
}
inline bool is_letter(uint32_t c) {  // L
  return is_between(general_category(c), Category::Lu, Category::Lo);
}
inline bool is_mark(uint32_t c) {  // M
  return is_between(general_category(c), Category::Mn, Category::Me);
}
inline bool is_numeric(uint32_t c) {  // N
  return is_between(general_category(c), Category::Nd, Category::No);
}
inline bool is_punctuation(uint32_t c) {  // P
  return is_between(general_category(c), Category::Pc, Category::Po);
}
inline bool is_symbol(uint32_t c) {  // S
  return is_between(general_category(c), Category::Sm, Category::So);
}

// -------------------------------------------------------------------------------------------------
// Lower and title case

namespace unicode {

// Code points of one case to another, unpacked from runs of cake/unicode_tables.h.
struct CaseMap {
  std::vector<uint8_t> index;        // of a code point, into `distances`; behind its end: 0
  std::vector<int> distances = {0};  // to the other case

  CaseMap(const int* runs, const int* end) {
    int begin = 0;
    for (; runs != end; runs += 4) {
      const int count = runs[1], stride = runs[2], distance = runs[3];
      begin += runs[0];
      size_t k = 0;
      while (k < distances.size() && distances[k] != distance) k++;
      if (k == distances.size()) distances.push_back(distance);
      index.resize(size_t(begin + (count - 1) * stride) + 1);
      for (int n = 0; n < count; n++) index[size_t(begin + n * stride)] = uint8_t(k);
    }
  }
  uint32_t operator()(uint32_t c) const {
    return c < index.size() ? uint32_t(int(c) + distances[index[c]]) : c;
  }
};

}  // namespace unicode

// Simple_Lowercase_Mapping: one code point for one. Unicode has one other: U+0130 (I with a dot
// above) is i and U+0307 in full, and i here.
inline uint32_t lower_case(uint32_t c) {
  if (c < 0x80) return c - 'A' < 26u ? c + 32 : c;
  static const unicode::CaseMap table(std::begin(unicode::kLowerRuns),
                                      std::end(unicode::kLowerRuns));
  return table(c);
}

// Titlecase_Mapping: capital, and of letters that are two in one, the first capital alone.
inline void append_title_case(std::string& out, uint32_t c) {
  static const unicode::CaseMap table(std::begin(unicode::kTitleRuns),
                                      std::end(unicode::kTitleRuns));
  for (size_t i = 0; i < std::size(unicode::kLongTitles); i += 4) {
    const int* title = unicode::kLongTitles + i;
    if (uint32_t(title[0]) != c) continue;
    for (int part = 1; part < 4 && title[part] != 0; part++)
      append_utf8(out, uint32_t(title[part]));
    return;
  }
  append_utf8(out, table(c));
}

namespace unicode {

// Case_Ignorable: what stands in words without being a letter of them. The punctuation is that of
// Word_Break (MidLetter, MidNumLet, Single_Quote).
inline bool is_case_ignorable(uint32_t c) {
  for (const uint32_t mark : {0x27, 0x2E, 0x3A, 0xB7, 0x387, 0x55F, 0x5F4, 0x2018, 0x2019, 0x2024,
                              0x2027, 0xFE13, 0xFE52, 0xFE55, 0xFF07, 0xFF0E, 0xFF1A}) {
    if (c == mark) return true;
  }
  const Category k = general_category(c);
  return k == Category::Mn || k == Category::Me || k == Category::Cf || k == Category::Lm ||
         k == Category::Sk;
}

// Cased, of code points that are not case-ignorable. Beside letters: ordinals, Roman numbers and
// letters in circles and squares.
inline bool is_cased(uint32_t c) {
  static constexpr uint32_t kOthers[][2] = {
      {0xAA, 0xAA},       {0xBA, 0xBA},       {0x2160, 0x217F},  {0x24B6, 0x24E9},
      {0x1F130, 0x1F149}, {0x1F150, 0x1F169}, {0x1F170, 0x1F189}};
  for (const auto& range : kOthers)
    if (c >= range[0] && c <= range[1]) return true;
  return is_between(general_category(c), Category::Lu, Category::Ll);
}

// Whether the sigma at text[begin, end) is the last letter of a word of several letters
// (Final_Sigma).
inline bool is_final_sigma(std::string_view text, size_t begin, size_t end) {
  while (begin > 0) {
    const CodePoint before = decode_utf8_before(text, begin);
    begin -= size_t(before.bytes);
    if (is_case_ignorable(before.code)) continue;
    if (!is_cased(before.code)) return false;
    while (end < text.size()) {
      const CodePoint next = decode_utf8(text.data() + end, text.size() - end);
      end += size_t(next.bytes);
      if (!is_case_ignorable(next.code)) return !is_cased(next.code);
    }
    return true;
  }
  return false;
}

}  // namespace unicode

// The first character in title case, the others in lower case, as Python's str.capitalize() has it.
inline std::string capitalize(std::string_view text) {
  constexpr uint32_t kSigma = 0x3A3, kSmallSigma = 0x3C3, kFinalSigma = 0x3C2, kDottedI = 0x130;
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const CodePoint c = decode_utf8(text.data() + i, text.size() - i);
    const size_t end = i + size_t(c.bytes);
    if (i == 0) {
      append_title_case(out, c.code);
    } else if (c.code == kSigma) {
      append_utf8(out, unicode::is_final_sigma(text, i, end) ? kFinalSigma : kSmallSigma);
    } else {
      append_utf8(out, lower_case(c.code));
      if (c.code == kDottedI) append_utf8(out, 0x307);
    }
    i = end;
  }
  return out;
}

}  // namespace cake
