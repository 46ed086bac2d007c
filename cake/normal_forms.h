// Unicode's normalization forms: one spelling for texts that look the same (Unicode Standard Annex
// 15). NFD takes characters apart (e and an accent), NFC joins them again as far as Unicode has a
// code point for them; NFKD and NFKC also replace characters that are only a form of another one,
// such as the ligature fi or wide letters.
//
// Most text is in its form already. So a scan looks for the stretches which may change, and only
// those are decoded, decomposed, ordered and composed. A stretch begins and ends at boundaries:
// places across which nothing is reordered or joined. Bytes that are not UTF-8 stay as they are.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/unicode.h"

namespace cake {

enum class NormalForm { nfc, nfd, nfkc, nfkd };

// What one form does. A program has one of each, made at first use: normalization(form).
class Normalization {
 public:
  explicit Normalization(NormalForm form);

  // The stretch text[begin, end) at or behind `offset`, a boundary, that may change. Both are
  // text.size() where none is left.
  struct Stretch {
    size_t begin, end;
  };
  Stretch find_stretch(std::string_view text, size_t offset) const;

  // Appends the form of a stretch, or of a whole text. `codes` is memory to work in.
  void append(std::string_view stretch, std::string& out, std::vector<uint32_t>& codes) const;

  // Whether nothing joins or reorders the code point with what stands before it.
  bool is_boundary(uint32_t c) const { return info_[c] & kBoundary; }

 private:
  enum Info : uint8_t {
    kBoundary = 1,
    kMayChange = 2,  // Quick_Check is not Yes
  };
  size_t step_back(std::string_view text, size_t i, size_t offset) const;
  bool all_plain(const unsigned char* p) const;
  void fill_plain_bytes();

  bool composes_, compatibility_;
  std::vector<uint8_t> info_;  // of each code
  bool plain_[256] = {};       // bytes that only code points with Info kBoundary are made of
  unsigned char first_lead_;   // bytes below are plain
  unsigned char syllables_;    // 2: the lead bytes EB and EC are plain; 0: they are not
  unsigned char cyrillic_;     // likewise D0 and D1
};

const Normalization& normalization(NormalForm form);
std::string normalize(NormalForm form, std::string_view text);

// -------------------------------------------------------------------------------------------------
// Tables that the forms share

namespace unicode {

// Hangul syllables are arithmetic: a leading consonant L, a vowel V, and a trailing consonant T or
// none.
inline constexpr uint32_t kSBase = 0xAC00, kLBase = 0x1100, kVBase = 0x1161, kTBase = 0x11A7;
inline constexpr uint32_t kLCount = 19, kVCount = 21, kTCount = 28;
inline constexpr uint32_t kSCount = kLCount * kVCount * kTCount;
inline bool is_hangul_syllable(uint32_t c) { return c - kSBase < kSCount; }

class Decompositions {
 public:
  std::vector<uint8_t> combining;     // Canonical_Combining_Class of each code; 0: a starter
  std::vector<uint8_t> joins_before;  // of each code: it is the second one of a pair that composes

  Decompositions() : combining(kCodes), joins_before(kCodes), pairs_(kPairSlots) {
    for (size_t i = 0; i < std::size(kCombiningRuns); i += 3) {
      std::fill(combining.begin() + kCombiningRuns[i],
                combining.begin() + kCombiningRuns[i + 1] + 1, uint8_t(kCombiningRuns[i + 2]));
    }
    read_mappings();
    for (uint32_t i = 0; i < kVCount; i++) joins_before[kVBase + i] = true;
    for (uint32_t i = 1; i < kTCount; i++) joins_before[kTBase + i] = true;
  }

  // Appends the full decomposition of a code point: it itself if it has none.
  void append(uint32_t c, bool compatibility, std::vector<uint32_t>& out) const {
    if (is_hangul_syllable(c)) {
      const uint32_t s = c - kSBase, t = s % kTCount;
      out.push_back(kLBase + s / (kVCount * kTCount));
      out.push_back(kVBase + s % (kVCount * kTCount) / kTCount);
      if (t) out.push_back(kTBase + t);
      return;
    }
    const auto& index = full_[compatibility];
    if (c >= index.size() || index[c] == 0) return out.push_back(c);
    const uint32_t* parts = &parts_[index[c]];
    out.insert(out.end(), parts + 1, parts + 1 + parts[0]);
  }
  bool has(uint32_t c, bool compatibility) const {
    const auto& index = full_[compatibility];
    return is_hangul_syllable(c) || (c < index.size() && index[c] != 0);
  }

  // The code point that the two become, 0: they do not compose.
  uint32_t compose(uint32_t a, uint32_t b) const {
    if (a - kLBase < kLCount && b - kVBase < kVCount) {
      return kSBase + ((a - kLBase) * kVCount + (b - kVBase)) * kTCount;
    }
    if (is_hangul_syllable(a) && (a - kSBase) % kTCount == 0 && b - kTBase - 1 < kTCount - 1) {
      return a + (b - kTBase);
    }
    return slot(a, b).composed;
  }

 private:
  // Unpacks kDecompositions, then replaces the parts of each mapping by their own parts.
  void read_mappings() {
    const std::set<uint32_t> excluded(std::begin(kCompositionExclusions),
                                      std::end(kCompositionExclusions));
    std::vector<Mapping> steps;
    uint32_t c = 0;
    std::vector<uint32_t> parts;
    const int* const end = std::end(kDecompositions);
    for (const int* record = kDecompositions; record != end;) {
      const int distance = record[0], count = (record[1] >> 6) + 1;
      const size_t size = size_t(record[1] & 63) / 2;
      const bool compatibility = record[1] & 1;
      for (int n = 0; n < count; n++) {
        c += uint32_t(distance);
        parts.resize(size);
        for (size_t i = 0; i < size; i++) parts[i] += uint32_t(record[2 + i]);
        steps.push_back({c, compatibility, parts});
        if (!compatibility && size == 2 && !excluded.count(c)) {
          slot(parts[0], parts[1]) = {parts[0], parts[1], c};
          joins_before[parts[1]] = true;
        }
      }
      record += 2 + size;
    }
    for (const bool compatibility : {false, true}) {
      std::vector<uint16_t>& index = full_[compatibility];
      index.resize(c + 1);
      for (const Mapping& m : steps) {
        if (m.compatibility && !compatibility) continue;
        parts.clear();
        for (const uint32_t part : m.parts) expand(steps, part, compatibility, parts);
        index[m.code] = uint16_t(parts_.size());
        parts_.push_back(uint32_t(parts.size()));
        parts_.insert(parts_.end(), parts.begin(), parts.end());
      }
    }
  }
  struct Mapping {
    uint32_t code;
    bool compatibility;
    std::vector<uint32_t> parts;
  };
  static void expand(const std::vector<Mapping>& steps, uint32_t c, bool compatibility,
                     std::vector<uint32_t>& out) {
    const auto m = std::lower_bound(steps.begin(), steps.end(), c,
                                    [](const Mapping& x, uint32_t code) { return x.code < code; });
    if (m == steps.end() || m->code != c || (m->compatibility && !compatibility)) {
      return out.push_back(c);
    }
    for (const uint32_t part : m->parts) expand(steps, part, compatibility, out);
  }

  struct Pair {  // an open-addressing hash table, a quarter full
    uint32_t first = 0, second = 0, composed = 0;
  };
  static constexpr size_t kPairSlots = 4096;
  static size_t find_slot(const std::vector<Pair>& pairs, uint32_t a, uint32_t b) {
    size_t i = (a * 0x9E3779B1u ^ b * 0x85EBCA6Bu) >> 20;
    while (pairs[i].first && (pairs[i].first != a || pairs[i].second != b)) {
      i = (i + 1) % kPairSlots;
    }
    return i;
  }
  Pair& slot(uint32_t a, uint32_t b) { return pairs_[find_slot(pairs_, a, b)]; }
  const Pair& slot(uint32_t a, uint32_t b) const { return pairs_[find_slot(pairs_, a, b)]; }

  std::vector<uint16_t> full_[2];  // [compatibility][c]: where its parts begin in parts_, 0: none
  std::vector<uint32_t> parts_ = {0};  // the number of parts, then the parts
  std::vector<Pair> pairs_;
};
inline const Decompositions& decompositions() {
  static const Decompositions tables;
  return tables;
}

// Canonical order: each run of marks by class, marks of one class as they were.
inline void sort_marks(std::vector<uint32_t>& codes) {
  const std::vector<uint8_t>& combining = decompositions().combining;
  for (size_t i = 0; i < codes.size(); i++) {
    if (combining[codes[i]] == 0) continue;
    size_t end = i + 1;
    bool sorted = true;
    for (; end < codes.size() && combining[codes[end]] != 0; end++) {
      sorted &= combining[codes[end - 1]] <= combining[codes[end]];
    }
    if (!sorted) {
      std::stable_sort(codes.begin() + ptrdiff_t(i), codes.begin() + ptrdiff_t(end),
                       [&](uint32_t a, uint32_t b) { return combining[a] < combining[b]; });
    }
    i = end;
  }
}

// Joins each code point with the last starter, unless one between them has its class or a higher
// one.
inline void compose(std::vector<uint32_t>& codes) {
  const Decompositions& tables = decompositions();
  size_t size = 0, starter = SIZE_MAX;
  int last = 0;  // class of the last code point of the result
  for (const uint32_t c : codes) {
    const int combining = tables.combining[c];
    if (starter != SIZE_MAX && (starter + 1 == size || last < combining)) {
      if (const uint32_t joined = tables.compose(codes[starter], c)) {
        codes[starter] = joined;
        continue;
      }
    }
    if (combining == 0) starter = size;
    last = combining;
    codes[size++] = c;
  }
  codes.resize(size);
}

}  // namespace unicode

// -------------------------------------------------------------------------------------------------
// A form

inline Normalization::Normalization(NormalForm form)
    : composes_(form == NormalForm::nfc || form == NormalForm::nfkc),
      compatibility_(form == NormalForm::nfkc || form == NormalForm::nfkd),
      info_(kCodes, kBoundary) {
  const unicode::Decompositions& tables = unicode::decompositions();
  std::vector<uint32_t> parts, normal;
  for (uint32_t c = 0; c < kCodes; c++) {
    if (!tables.combining[c] && !tables.joins_before[c] && !tables.has(c, compatibility_)) continue;
    parts.clear();
    tables.append(c, compatibility_, parts);
    const bool joins = composes_ && tables.joins_before[parts[0]];
    bool changes = tables.has(c, compatibility_);
    if (composes_ && changes) {
      normal = parts;
      unicode::compose(normal);
      changes = normal.size() != 1 || normal[0] != c;
    }
    const bool boundary = tables.combining[parts[0]] == 0 && !joins;
    info_[c] = uint8_t((boundary ? kBoundary : 0) | (changes || joins ? kMayChange : 0));
  }
  fill_plain_bytes();
}

// A stretch, by the definition.
inline void Normalization::append(std::string_view stretch, std::string& out,
                                  std::vector<uint32_t>& codes) const {
  codes.clear();
  for (size_t i = 0; i < stretch.size();) {
    const CodePoint c = decode_utf8(stretch.data() + i, stretch.size() - i);
    unicode::decompositions().append(c.code, compatibility_, codes);
    i += size_t(c.bytes);
  }
  unicode::sort_marks(codes);
  if (composes_) unicode::compose(codes);
  for (const uint32_t c : codes) append_utf8(out, c);
}

// The scan for stretches. Plain bytes, among them all of ASCII and of most scripts, are passed over
// 32 at once or one by one; other code points are decoded and looked up.
inline Normalization::Stretch Normalization::find_stretch(std::string_view text,
                                                          size_t offset) const {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const size_t size = text.size();
  const std::vector<uint8_t>& combining = unicode::decompositions().combining;
  int last = 0;  // class of the code point before
  for (size_t i = offset; i < size;) {
    if (i + 32 <= size && all_plain(p + i)) {
      i += 32, last = 0;
      continue;
    }
    const size_t limit = std::min(size, i + 32);
    while (i < limit) {
      if (plain_[p[i]]) {
        i++, last = 0;
        continue;
      }
      const CodePoint c = decode_utf8(text.data() + i, size - i);
      if (info_[c.code] != kBoundary) {
        const int mark = combining[c.code];
        if (info_[c.code] & kMayChange || (mark != 0 && mark < last)) {
          const size_t begin = is_boundary(c.code) ? i : step_back(text, i, offset);
          for (i += size_t(c.bytes); i < size;) {
            const CodePoint next = decode_utf8(text.data() + i, size - i);
            if (is_boundary(next.code)) break;
            i += size_t(next.bytes);
          }
          return {begin, i};
        }
        last = mark;
      } else {
        last = 0;
      }
      i += size_t(c.bytes);
    }
  }
  return {size, size};
}

// The last boundary before i, at least `offset`.
inline size_t Normalization::step_back(std::string_view text, size_t i, size_t offset) const {
  while (i > offset) {
    const CodePoint c = decode_utf8_before(text.substr(offset), i - offset);
    i -= size_t(c.bytes);
    if (is_boundary(c.code)) break;
  }
  return i;
}

inline bool Normalization::all_plain(const unsigned char* p) const {
  unsigned char found = 0;
  for (int i = 0; i < 32; i++) {  // the compiler makes a few vector instructions of it
    const unsigned char b = p[i];
    const bool ideographs = static_cast<unsigned char>(b - 0xE4) < 6;  // U+4000 to U+9FFF
    const bool syllables = static_cast<unsigned char>(b - 0xEB) < syllables_;
    const bool cyrillic = static_cast<unsigned char>(b - 0xD0) < cyrillic_;
    found |= static_cast<unsigned char>((b >= first_lead_) & !ideographs & !syllables & !cyrillic);
  }
  return !found;
}

// A byte is plain if all code points that begin with it are. Bytes that begin none follow another
// byte, or stand for themselves.
inline void Normalization::fill_plain_bytes() {
  std::fill(std::begin(plain_), std::end(plain_), true);
  char bytes[4];
  for (uint32_t c = 0; c < kInvalid; c++) {
    if (info_[c] == kBoundary || (c >= 0xD800 && c < 0xE000)) continue;
    encode_utf8(c, bytes);
    plain_[static_cast<unsigned char>(bytes[0])] = false;
  }
  first_lead_ = static_cast<unsigned char>(std::find(plain_, plain_ + 256, false) - plain_);
  syllables_ = plain_[0xEB] && plain_[0xEC] ? 2 : 0;
  cyrillic_ = plain_[0xD0] && plain_[0xD1] ? 2 : 0;
}

template <NormalForm form>
const Normalization& normalization_once() {
  static const Normalization tables(form);
  return tables;
}
inline const Normalization& normalization(NormalForm form) {
  switch (form) {
    case NormalForm::nfc:
      return normalization_once<NormalForm::nfc>();
    case NormalForm::nfd:
      return normalization_once<NormalForm::nfd>();
    case NormalForm::nfkc:
      return normalization_once<NormalForm::nfkc>();
    default:
      return normalization_once<NormalForm::nfkd>();
  }
}

inline std::string normalize(NormalForm form, std::string_view text) {
  const Normalization& normal = normalization(form);
  std::string out;
  std::vector<uint32_t> codes;
  for (size_t offset = 0; offset < text.size();) {
    const Normalization::Stretch stretch = normal.find_stretch(text, offset);
    out += text.substr(offset, stretch.begin - offset);
    normal.append(text.substr(stretch.begin, stretch.end - stretch.begin), out, codes);
    offset = stretch.end;
  }
  return out;
}

}  // namespace cake
