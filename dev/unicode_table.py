#!/usr/bin/env python3
"""Writes cake/unicode_tables.h: what cake/unicode.h asks of the Unicode Character Database.

    pip install unicodedata2==16.0.0
    python dev/unicode_table.py > cake/unicode_tables.h

Needed again only when the tables move to a newer version of Unicode. General categories, names,
decompositions and combining classes are the Unicode Character Database's, as packaged by
unicodedata2. It has neither properties nor letter case. White_Space is copied from PropList.txt.
Script Han is found by name, and by the few code points whose names do not tell (Scripts.txt). Lower
and title case are Python's own, of whatever version of Unicode, for code points that are in this
version; the pairs that are newer than the oldest Python allowed here (3.11, Unicode 14) are written
out.
"""

import textwrap
import unicodedata2 as ucd

VERSION = "16.0.0"
assert ucd.unidata_version == VERSION, ucd.unidata_version
END = 0x110000

WHITE_SPACE = [(0x09, 0x0D), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680),
               (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F),
               (0x3000, 0x3000)]
HAN_NAMES = ("CJK UNIFIED IDEOGRAPH-", "CJK COMPATIBILITY IDEOGRAPH-", "CJK RADICAL ",
             "KANGXI RADICAL ", "HANGZHOU NUMERAL ", "VIETNAMESE ALTERNATE READING MARK ")
HAN_OTHERS = [0x3005, 0x3007, 0x303B, 0x16FE2, 0x16FE3]  # iteration marks, zero, hook mark
# Upper to lower case since Unicode 15.
NEW_PAIRS = {0x1C89: 0x1C8A, 0xA7CB: 0x264, 0xA7CC: 0xA7CD, 0xA7DA: 0xA7DB, 0xA7DC: 0x19B,
             **{c: c + 32 for c in range(0x10D50, 0x10D66)}}

# Cn is 0. Letters, numbers, punctuation and so on stand together: cake/unicode.h asks for ranges.
CATEGORIES = ("Cn Cc Cf Co Cs Lu Lt Ll Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So "
              "Zs Zl Zp").split()
UPPER_LOWER, LOWER_UPPER = 30, 31  # runs that alternate


def category_runs(categories):
    """(length, category). Single code points that alternate between Lu and Ll are one run."""
    runs = []  # [first, category]
    for c, k in enumerate(categories):
        if not runs or runs[-1][1] != k:
            runs.append([c, k])
    upper, lower = CATEGORIES.index("Lu"), CATEGORIES.index("Ll")
    lengths = [b[0] - a[0] for a, b in zip(runs, runs[1:] + [[END, 0]])]
    packed, i = [], 0
    while i < len(runs):
        j, k = i, runs[i][1]
        while j < len(runs) and lengths[j] == 1 and runs[j][1] in (upper, lower):
            j += 1
        if j - i >= 3:
            packed.append((j - i, UPPER_LOWER if k == upper else LOWER_UPPER))
            i = j
        else:
            packed.append((lengths[i], k))
            i += 1
    return packed


def is_han(c):
    return ucd.name(chr(c), "").startswith(HAN_NAMES) or c in HAN_OTHERS


def ranges(test):
    found = []
    for c in range(END):
        if test(c):
            if found and found[-1][1] == c - 1:
                found[-1][1] = c
            else:
                found.append([c, c])
    return found


def decompositions():
    """(code point, compatibility, parts), one step, without Hangul syllables."""
    for c in range(END):
        mapping = ucd.decomposition(chr(c)).split()
        if mapping:
            compatibility = mapping[0].startswith("<")
            yield c, compatibility, [int(p, 16) for p in mapping[compatibility:]]


def pack_decompositions(items):
    """Numbers: see the comment that main() writes above them."""
    records, last, parts_before = [], 0, []
    for c, compatibility, parts in items:
        before = (parts_before + [0] * len(parts))[:len(parts)]
        record = [c - last, 0, [len(parts) << 1 | compatibility] + [p - b for p, b in zip(parts, before)]]
        last, parts_before = c, parts
        if records and records[-1][0] == record[0] and records[-1][2] == record[2]:
            records[-1][1] += 1
        else:
            records.append(record)
    return [x for step, repeats, rest in records for x in [step, repeats << 6 | rest[0], *rest[1:]]]


def lower_case(c):
    if c in NEW_PAIRS:
        return NEW_PAIRS[c]
    lower = "i" if c == 0x130 else chr(c).lower()  # the one that has two code points
    assert len(lower) == 1, hex(c)
    return c if ucd.category(chr(c)) == "Cn" else ord(lower)


def title_case(c):
    """Code points: one, or up to three (ß is Ss)."""
    older = {lower: upper for upper, lower in NEW_PAIRS.items()}
    if c in older:
        return [older[c]]
    return [c] if ucd.category(chr(c)) == "Cn" else [ord(x) for x in chr(c).title()]


def case_runs(mapping):
    """[step from the first of the run before, count, stride, mapping - code point]"""
    runs = []  # [first, count, stride, difference]
    for c in range(END):
        difference = mapping(c) - c
        if difference == 0:
            continue
        if runs and runs[-1][3] == difference:
            first, count, stride, _ = runs[-1]
            step = c - (first + (count - 1) * stride)
            if step <= 2 and (count == 1 or step == stride):
                runs[-1][1:3] = count + 1, step
                continue
        runs.append([c, 1, 1, difference])
    return [[b[0] - a[0], *b[1:]] for a, b in zip([[0]] + runs, runs)]


def numbers(values, hexadecimal=False):
    text = ", ".join(f"0x{v:X}" if hexadecimal else str(v) for v in values)
    return textwrap.indent(textwrap.fill(text, 97, break_long_words=False), "    ")


def main():
    categories = [CATEGORIES.index(ucd.category(chr(c))) for c in range(END)]
    runs = category_runs(categories)
    flat = lambda items: [x for item in items for x in item]
    excluded = [c for c, compatibility, parts in decompositions()
                if not compatibility and len(parts) == 2 and ucd.normalize("NFC", chr(c)) != chr(c)]
    combining = []  # [first, last, class]
    for c in range(END):
        k = ucd.combining(chr(c))
        if k and combining and combining[-1][1] == c - 1 and combining[-1][2] == k:
            combining[-1][1] = c
        elif k:
            combining.append([c, c, k])

    print(f"""\
// Tables of the Unicode Character Database, packed; cake/unicode.h unpacks them. Written by
// dev/unicode_table.py.
#pragma once

#include <cstdint>

namespace cake {{

inline constexpr const char* kUnicodeVersion = "{VERSION}";

// General_Category. Unassigned code points and surrogates have one too.
enum class Category : uint8_t {{
{textwrap.indent(chr(10).join(c + "," for c in CATEGORIES), "  ")}
}};

namespace unicode {{

// clang-format off

// Runs of one category, from code point 0 on: the length times 32, plus the category. {UPPER_LOWER}: Lu and Ll
// alternate, beginning with Lu; {LOWER_UPPER}: beginning with Ll.
inline constexpr int kCategoryRuns[] = {{
{numbers(length << 5 | k for length, k in runs)}}};

// Property White_Space: the first and the last code point of each range.
inline constexpr int kWhiteSpaceRanges[] = {{
{numbers(flat(WHITE_SPACE), True)}}};

// Script Han, likewise.
inline constexpr int kHanRanges[] = {{
{numbers(flat(ranges(is_han)), True)}}};

// Decomposition_Mapping, one step, without Hangul syllables, which are arithmetic. A record: the
// distance from the code point before; 64 times the number of code points that follow it in the same
// way, plus 2 times the number of parts, plus 1 if it is a compatibility mapping; then the parts,
// each as the difference from that part of the code point before (from 0 where that had none).
inline constexpr int kDecompositions[] = {{
{numbers(pack_decompositions(decompositions()))}}};

// The canonical ones of two parts which are never composed again.
inline constexpr int kCompositionExclusions[] = {{
{numbers(excluded, True)}}};

// Canonical_Combining_Class above 0: the first and the last code point of a range, the class.
inline constexpr int kCombiningRuns[] = {{
{numbers(flat(combining))}}};

// Simple_Lowercase_Mapping: the distance from the first code point of the run before, the number of
// code points, the distance from one to the next, the distance to the lower case.
inline constexpr int kLowerRuns[] = {{
{numbers(flat(case_runs(lower_case)))}}};

// Simple_Titlecase_Mapping, in the same way, of those that have no longer one.
inline constexpr int kTitleRuns[] = {{
{numbers(flat(case_runs(lambda c: title_case(c)[0] if len(title_case(c)) == 1 else c)))}}};

// Titlecase_Mapping to several code points: the code point and three, of which the last may be 0.
inline constexpr int kLongTitles[] = {{
{numbers(flat((c, *title_case(c), 0)[:4] for c in range(END) if len(title_case(c)) > 1), True)}}};

// clang-format on

}}  // namespace unicode
}}  // namespace cake""")


if __name__ == "__main__":
    main()
