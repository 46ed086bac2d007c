#!/usr/bin/env python3
"""Writes cake/unicode.h: the classes of code points that split patterns tell apart, and the tables
of Normalization Form C.

    pip install unicodedata2==16.0.0
    python dev/unicode_table.py > cake/unicode.h

Needed again only when the tables move to a newer version of Unicode. The general categories and
decompositions are the Unicode Character Database's, as packaged by unicodedata2; White_Space is the
25 code points of PropList.txt.
"""

import textwrap
import unicodedata2 as ucd

VERSION = "16.0.0"
assert ucd.unidata_version == VERSION, ucd.unidata_version

WHITE_SPACE = set(
    [*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F]
    + [0x205F, 0x3000]
)
CLASSES = ["other", "space", "newline", "upper", "lower", "letter", "mark", "number"]
BY_CATEGORY = {"Lu": "upper", "Lt": "upper", "Ll": "lower", "Lm": "letter", "Lo": "letter"}


def char_class(c):
    if c in (0x0A, 0x0D):
        return "newline"
    if c in WHITE_SPACE:
        return "space"
    category = ucd.category(chr(c))
    by_first = {"M": "mark", "N": "number"}
    return BY_CATEGORY.get(category) or by_first.get(category[0], "other")


def class_runs():
    """(first code point, class), where a stretch of single code points that alternate between
    upper and lower case is one run of class 8 (upper first) or 9 (lower first)."""
    runs = []
    for c in range(0x110000):
        k = CLASSES.index(char_class(c))
        if not runs or runs[-1][1] != k:
            runs.append((c, k))
    lengths = [b[0] - a[0] for a, b in zip(runs, runs[1:])] + [1 << 30]
    packed, i = [], 0
    while i < len(runs):
        j = i
        while j < len(runs) and lengths[j] == 1 and runs[j][1] == (runs[i][1] ^ 7 if (j - i) % 2
                                                                   else runs[i][1]):
            j += 1
        if runs[i][1] in (3, 4) and j - i >= 3:
            packed.append((runs[i][0], 8 if runs[i][1] == 3 else 9))
            i = j
        else:
            packed.append(runs[i])
            i += 1
    return packed


def expand(packed):
    for (first, k), (end, _) in zip(packed, packed[1:] + [(0x110000, 0)]):
        for c in range(first, end):
            yield (3 + (c - first) % 2 if k == 8 else 4 - (c - first) % 2 if k == 9 else k)


def numbers(values, width=97):
    text = ", ".join(f"0x{v:X}" for v in values)
    return textwrap.indent(textwrap.fill(text, width, break_long_words=False), "    ")


def main():
    runs = class_runs()
    assert [CLASSES[k] for k in expand(runs)] == [char_class(c) for c in range(0x110000)]

    decompositions, excluded = [], []
    for c in range(0x110000):
        mapping = ucd.decomposition(chr(c))
        if not mapping or mapping.startswith("<"):
            continue
        parts = [int(p, 16) for p in mapping.split()]
        decompositions.append((c, parts[0], parts[1] if len(parts) == 2 else 0))
        if len(parts) == 2 and ucd.normalize("NFC", chr(c)) != chr(c):
            excluded.append(c)
    combining = []  # (first, last, class)
    for c in range(0x110000):
        k = ucd.combining(chr(c))
        if not k:
            continue
        if combining and combining[-1][1] == c - 1 and combining[-1][2] == k:
            combining[-1][1] = c
        else:
            combining.append([c, c, k])

    print(f"""\
// What a tokenizer asks of Unicode {VERSION}: the class of a code point, and the tables of
// Normalization Form C. Written by dev/unicode_table.py from the Unicode Character Database.
#pragma once

#include <cstdint>
#include <vector>

namespace cake {{

inline constexpr const char* kUnicodeVersion = "{VERSION}";

// All that the split patterns tell apart. White space is the property White_Space, without the two
// newlines that patterns name.
enum CharClass : uint8_t {{
  kOther,    // punctuation, symbols, controls, unassigned
  kSpace,    // White_Space without \\r and \\n
  kNewline,  // \\r, \\n
  kUpper,    // Lu, Lt
  kLower,    // Ll
  kLetter,   // Lm, Lo: letters without case
  kMark,     // Mn, Mc, Me
  kNumber,   // Nd, Nl, No
}};

// clang-format off

// Runs of one class: the first code point times 16, plus the class; 8 is a run that alternates
// upper, lower, upper ..., 9 one that begins with lower.
inline constexpr uint32_t kClassRuns[] = {{
{numbers(first << 4 | k for first, k in runs)}}};

// Canonical decompositions: code point, first, second part (0: none), three numbers each. Hangul
// syllables are left out: they are arithmetic.
inline constexpr uint32_t kDecompositions[] = {{
{numbers(x for d in decompositions for x in d)}}};

// Of those, the pairs that are never composed again.
inline constexpr uint32_t kCompositionExclusions[] = {{
{numbers(excluded)}}};

// Canonical combining classes above 0: first and last code point, class.
inline constexpr uint32_t kCombiningRuns[] = {{
{numbers(x for r in combining for x in r)}}};

// clang-format on

// The class of every code point, 0x110000 bytes, expanded once.
inline const uint8_t* char_classes() {{
  static const std::vector<uint8_t> table = [] {{
    std::vector<uint8_t> classes(0x110000);
    const uint32_t* const end = kClassRuns + sizeof kClassRuns / sizeof *kClassRuns;
    for (const uint32_t* run = kClassRuns; run != end; run++) {{
      const uint32_t first = *run >> 4, last = run + 1 == end ? 0x110000 : run[1] >> 4;
      const uint32_t kind = *run & 15;
      for (uint32_t c = first; c < last; c++) {{
        const bool odd = (c - first) % 2;
        classes[c] = uint8_t(kind < 8 ? kind : uint32_t(odd == (kind == 8) ? kLower : kUpper));
      }}
    }}
    return classes;
  }}();
  return table.data();
}}

}}  // namespace cake""")


if __name__ == "__main__":
    main()
