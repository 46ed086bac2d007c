// UTF-8 that may be damaged: where its characters end, and what U+FFFD stands for.
#pragma once

#include <cstddef>
#include <string_view>

namespace cake {

inline constexpr std::string_view kReplacement = "\xef\xbf\xbd";  // U+FFFD

// The length of the character at text[i], which is beyond ASCII; 0 where there is none, and then
// `bad`: the bytes that one U+FFFD stands for, as the Unicode standard says (section 3.9).
inline size_t utf8_length(std::string_view text, size_t i, size_t& bad) {
  const auto byte = [&](size_t k) { return k < text.size() ? text[k] & 0xff : 0; };
  const int first = byte(i), second = byte(i + 1);
  const size_t length = first < 0xc2   ? 0
                        : first < 0xe0 ? 2
                        : first < 0xf0 ? 3
                        : first < 0xf5 ? 4
                                       : 0;
  const int low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  const int high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  bad = 1;
  if (length == 0 || second < low || second > high) return 0;
  for (bad = 2; bad < length; bad++)
    if ((byte(i + bad) & 0xc0) != 0x80) return 0;
  return length;
}

}  // namespace cake
