// Pieces as the tables of the tokenizer look them up: the encoder's cache from pieces to ids, and
// the table that counts them for training. Most pieces have at most 15 bytes: they are their own
// key, so that a look-up touches one place in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "cake/bpe.h"
#include "cake/bpe_simd.h"

namespace cake {

inline constexpr size_t kLongestShortPiece = 15;  // bytes

// The key of a short piece: its bytes, zeros, and the number of its bytes in the last byte. A
// longer one has the key {hash, kLongKey + what a table keeps of it}.
inline constexpr uint64_t kLongKey = uint64_t(255) << 56;
inline bool is_long(const Key& key) { return key[1] >= kLongKey; }

// Row n keeps n bytes, and puts n into the last one.
struct KeyMasks {
  uint8_t kept[16][16], length[16][16];
  constexpr KeyMasks() : kept(), length() {
    for (int n = 0; n < 16; n++) {
      for (int i = 0; i < n; i++) kept[n][i] = 255;
      length[n][15] = uint8_t(n);
    }
  }
};
alignas(64) inline constexpr KeyMasks kKeyMasks;

// 16 bytes from `text` on are readable; n is at most 15.
inline Key make_short_key(const char* text, size_t n) {
  Key key, kept, length;
  std::memcpy(&key, text, 16);
  std::memcpy(&kept, kKeyMasks.kept[n], 16), std::memcpy(&length, kKeyMasks.length[n], 16);
  return (key & kept) | length;
}
inline Key make_long_key(std::string_view piece, uint64_t more) {
  return Key{piece_hash(piece), kLongKey | more};
}

// Pieces that stand one behind the other, as the scanner finds them: piece i is
// text[starts[i], starts[i + 1]), and 16 bytes behind the last one are readable.
struct AdjacentPieces {
  const char* text;
  const uint32_t* starts;
  size_t size(size_t i) const { return starts[i + 1] - starts[i]; }
  std::string_view operator[](size_t i) const { return {text + starts[i], size(i)}; }
  // Means nothing for a longer piece, but then it is made without a branch.
  Key short_key(size_t i) const { return make_short_key(text + starts[i], size(i) & 15); }
  AdjacentPieces suffix(size_t i) const { return {text, starts + i}; }
};

// Pieces anywhere in a text.
struct ListedPieces {
  const std::string_view* pieces;
  size_t size(size_t i) const { return pieces[i].size(); }
  std::string_view operator[](size_t i) const { return pieces[i]; }
  Key short_key(size_t i) const {
    char text[16] = {};
    std::memcpy(text, pieces[i].data(), std::min(pieces[i].size(), kLongestShortPiece));
    return make_short_key(text, pieces[i].size() & 15);
  }
};

}  // namespace cake
