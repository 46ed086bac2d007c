// Measures, rules and signatures: what decides whether a document is kept.
//
// A document meets the rules of FineWeb in FineWeb's order (Penedo et al. 2024, arXiv 2406.17557,
// as datatrove 0.10 implements them): lists of URLs, language, repetition and quality after Gopher
// (Rae et al. 2021, arXiv 2112.11446, table A1), the lines and sentences of C4 (Raffel et al. 2020,
// arXiv 1910.10683), FineWeb's own three, and then what cake adds. Each rule compares one number, a
// measure, with a threshold. All measures of all documents are taken, whatever fails first, so that
// other thresholds can be applied later without the text.
//
//   url  ---> UrlLists -----------------> blocked domain, host, URL, words
//   text ---> language_shares (CLD2) ---> language
//     |
//     +-----> lines, words (interned) --> Gopher's measures: counts, lengths, repeated n-grams
//     |
//     +-----> the lines C4 keeps -------> C4's measures
//               |
//               +--> FineWeb's measures, contamination, quality score
//               +--> XXH3 hash, MinHash bands (signature)
//               +--> private data replaced ---> the text that is kept
//
// Lengths are in characters, that is code points, and ratios are doubles, as in datatrove. Its
// words are spaCy's tokens. Ours come from a small splitter over classes of characters that was
// made to agree with it (dev/bench/datatrove_rules.py compares the verdicts).
#include <arpa/inet.h>
#include <libpsl.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <unordered_set>

// CLD2's header needs <cstdio> before it.
#include <cld2/public/compact_lang_det.h>
#include <cld2/public/encodings.h>
#include <simdjson.h>
#define XXH_INLINE_ALL
#if defined(__AVX2__) && !defined(XXH_VECTOR)
#define XXH_VECTOR XXH_AVX2  // g++ 12 warns about its own header of AVX-512
#endif
#include <xxhash.h>

#include "cake/corpus.h"
#include "cake/normal_forms.h"
#include "cake/unicode.h"

namespace cake::corpus {
namespace {

// ---------------------------------------------------------------------------------------------
// The measures and the rules

struct MeasureOf {
  enum Index {
    blocked_domain,
    blocked_host,
    blocked_url,
    banned_words,
    soft_banned_words,
    banned_substrings,
    language_share,
    characters,
    duplicate_paragraphs,
    duplicate_paragraph_characters,
    duplicate_lines,
    duplicate_line_characters,
    top_2gram,
    top_3gram,
    top_4gram,
    duplicate_5gram,
    duplicate_6gram,
    duplicate_7gram,
    duplicate_8gram,
    duplicate_9gram,
    duplicate_10gram,
    words,
    mean_word_length,
    hashes,
    ellipses,
    bullet_lines,
    ellipsis_lines,
    alphabetic_words,
    stop_words,
    long_word_lines,
    few_word_lines,
    javascript_lines,
    policy_lines,
    lorem_ipsum_lines,
    curly_bracket_lines,
    sentences,
    stop_character_lines,
    short_lines,
    duplicate_characters,
    newlines,
    contamination,
    quality,
    count
  };
};

constexpr Measure kMeasures[] = {
    {"blocked_domain", "1 where the registered domain is in a block list, else 0"},
    {"blocked_host", "1 where the whole host name is in a block list, else 0"},
    {"blocked_url", "1 where the URL is in a block list, else 0"},
    {"banned_words", "banned words that are words of the URL, number"},
    {"soft_banned_words", "softly banned words that are words of the URL, number"},
    {"banned_substrings", "banned strings that the URL's letters and digits hold, number"},
    {"language_share", "share of the text's bytes in a wanted language, 0 to 1 (CLD2)"},
    {"characters", "length of the text, characters"},
    {"duplicate_paragraphs", "paragraphs that occurred before, share of paragraphs"},
    {"duplicate_paragraph_characters",
     "characters of paragraphs that occurred before, share of all"},
    {"duplicate_lines", "lines that occurred before, share of lines"},
    {"duplicate_line_characters", "characters of lines that occurred before, share of all"},
    {"top_2gram", "all copies of the most frequent 2 words in a row, share of characters"},
    {"top_3gram", "all copies of the most frequent 3 words in a row, share of characters"},
    {"top_4gram", "all copies of the most frequent 4 words in a row, share of characters"},
    {"duplicate_5gram", "5 words in a row that occurred before, share of characters"},
    {"duplicate_6gram", "6 words in a row that occurred before, share of characters"},
    {"duplicate_7gram", "7 words in a row that occurred before, share of characters"},
    {"duplicate_8gram", "8 words in a row that occurred before, share of characters"},
    {"duplicate_9gram", "9 words in a row that occurred before, share of characters"},
    {"duplicate_10gram", "10 words in a row that occurred before, share of characters"},
    {"words", "words that are not only punctuation, number"},
    {"mean_word_length", "mean length of these words, characters"},
    {"hashes", "number signs (#), number for each word"},
    {"ellipses", "ellipses, number for each word"},
    {"bullet_lines", "lines that begin with a bullet, share of lines"},
    {"ellipsis_lines", "lines that end in an ellipsis, share of lines"},
    {"alphabetic_words", "words that have a letter, share of words"},
    {"stop_words", "different words of: the be to of and that have with, number"},
    {"long_word_lines", "lines that C4 drops for a word that is too long, share of lines"},
    {"few_word_lines", "lines that C4 drops for too few words, share of lines"},
    {"javascript_lines", "lines that C4 drops for the word javascript, share of lines"},
    {"policy_lines", "lines that C4 drops for a notice on cookies or terms, share of lines"},
    {"lorem_ipsum_lines", "lines with the words lorem ipsum, number"},
    {"curly_bracket_lines", "lines with a {, number"},
    {"sentences", "sentences of the lines that C4 keeps, number"},
    {"stop_character_lines", "lines that end a sentence, share of the lines that C4 keeps"},
    {"short_lines", "lines of at most 30 characters, share of the lines that C4 keeps"},
    {"duplicate_characters", "kept lines that occurred before, share of characters"},
    {"newlines", "newlines of the kept lines, number for each word"},
    {"contamination", "13 words in a row that an evaluation set holds too, number"},
    {"quality", "probability of the good kind, of the quality model, 0 to 1"},
};
static_assert(std::size(kMeasures) == MeasureOf::count);

constexpr double kNoFineweb = kOff;  // FineWeb has no such rule
constexpr Rule kRules[] = {
    {"max-blocked-domains", "url", MeasureOf::blocked_domain, Rule::max, 0},
    {"max-blocked-hosts", "url", MeasureOf::blocked_host, Rule::max, 0},
    {"max-blocked-urls", "url", MeasureOf::blocked_url, Rule::max, 0},
    {"max-banned-words", "url", MeasureOf::banned_words, Rule::max, 0},
    {"max-soft-banned-words", "url", MeasureOf::soft_banned_words, Rule::max, 1},
    {"max-banned-substrings", "url", MeasureOf::banned_substrings, Rule::max, 0},
    {"language-share", "language", MeasureOf::language_share, Rule::min, .65},
    {"min-characters", "gopher_repetition", MeasureOf::characters, Rule::min, 1},
    {"max-duplicate-paragraphs", "gopher_repetition", MeasureOf::duplicate_paragraphs, Rule::max,
     .30},
    {"max-duplicate-paragraph-characters", "gopher_repetition",
     MeasureOf::duplicate_paragraph_characters, Rule::max, .20},
    {"max-duplicate-lines", "gopher_repetition", MeasureOf::duplicate_lines, Rule::max, .30},
    {"max-duplicate-line-characters", "gopher_repetition", MeasureOf::duplicate_line_characters,
     Rule::max, .20},
    {"max-top-2gram", "gopher_repetition", MeasureOf::top_2gram, Rule::max, .20},
    {"max-top-3gram", "gopher_repetition", MeasureOf::top_3gram, Rule::max, .18},
    {"max-top-4gram", "gopher_repetition", MeasureOf::top_4gram, Rule::max, .16},
    {"max-duplicate-5gram", "gopher_repetition", MeasureOf::duplicate_5gram, Rule::max, .15},
    {"max-duplicate-6gram", "gopher_repetition", MeasureOf::duplicate_6gram, Rule::max, .14},
    {"max-duplicate-7gram", "gopher_repetition", MeasureOf::duplicate_7gram, Rule::max, .13},
    {"max-duplicate-8gram", "gopher_repetition", MeasureOf::duplicate_8gram, Rule::max, .12},
    {"max-duplicate-9gram", "gopher_repetition", MeasureOf::duplicate_9gram, Rule::max, .11},
    {"max-duplicate-10gram", "gopher_repetition", MeasureOf::duplicate_10gram, Rule::max, .10},
    {"min-words", "gopher_quality", MeasureOf::words, Rule::min, 50},
    {"max-words", "gopher_quality", MeasureOf::words, Rule::max, 100000},
    {"min-mean-word-length", "gopher_quality", MeasureOf::mean_word_length, Rule::min, 3},
    {"max-mean-word-length", "gopher_quality", MeasureOf::mean_word_length, Rule::max, 10},
    {"max-hashes", "gopher_quality", MeasureOf::hashes, Rule::max, .1},
    {"max-ellipses", "gopher_quality", MeasureOf::ellipses, Rule::max, .1},
    {"max-bullet-lines", "gopher_quality", MeasureOf::bullet_lines, Rule::max, .9},
    {"max-ellipsis-lines", "gopher_quality", MeasureOf::ellipsis_lines, Rule::max, .3},
    {"min-alphabetic-words", "gopher_quality", MeasureOf::alphabetic_words, Rule::min, .8},
    {"min-stop-words", "gopher_quality", MeasureOf::stop_words, Rule::min, 2},
    {"max-long-word-lines", "c4", MeasureOf::long_word_lines, Rule::max, kNoFineweb},
    {"max-few-word-lines", "c4", MeasureOf::few_word_lines, Rule::max, kNoFineweb},
    {"max-javascript-lines", "c4", MeasureOf::javascript_lines, Rule::max, kNoFineweb},
    {"max-policy-lines", "c4", MeasureOf::policy_lines, Rule::max, kNoFineweb},
    {"max-lorem-ipsum-lines", "c4", MeasureOf::lorem_ipsum_lines, Rule::max, 0},
    {"max-curly-bracket-lines", "c4", MeasureOf::curly_bracket_lines, Rule::max, 0},
    {"min-sentences", "c4", MeasureOf::sentences, Rule::min, 5},
    {"min-stop-character-lines", "fineweb_quality", MeasureOf::stop_character_lines, Rule::min,
     .12},
    {"max-short-lines", "fineweb_quality", MeasureOf::short_lines, Rule::max, .67},
    {"max-duplicate-characters", "fineweb_quality", MeasureOf::duplicate_characters, Rule::max,
     .01},
    {"max-newlines", "fineweb_quality", MeasureOf::newlines, Rule::max, .3},
    {"max-contamination", "contamination", MeasureOf::contamination, Rule::max, 0},
    {"min-quality", "quality", MeasureOf::quality, Rule::min, kNoFineweb},
};

}  // namespace

std::span<const Measure> measures() { return kMeasures; }
std::span<const Rule> rules() { return kRules; }

Thresholds fineweb_thresholds() {
  Thresholds thresholds;
  for (const Rule& rule : kRules) thresholds.push_back(rule.fineweb);
  return thresholds;
}

// NaN, of a value or of a threshold, is neither less nor greater: the rule passes.
int first_failed(std::span<const double> values, std::span<const double> thresholds) {
  if (values.size() != std::size(kMeasures) || thresholds.size() != std::size(kRules)) {
    fail("rules: found ", values.size(), " values and ", thresholds.size(),
         " thresholds, expected ", std::size(kMeasures), " and ", std::size(kRules));
  }
  for (size_t i = 0; i < std::size(kRules); i++) {
    const double value = values[size_t(kRules[i].measure)];
    const bool failed =
        kRules[i].direction == Rule::min ? value < thresholds[i] : value > thresholds[i];
    if (failed) return int(i);
  }
  return -1;
}

namespace {

// ---------------------------------------------------------------------------------------------
// Characters: what the rules ask of a code point. Texts are valid UTF-8 here: Measurer repairs.

enum CharacterFlag : uint16_t {
  kWhite = 1,            // Python's str.isspace
  kLineBreak = 2,        // Python's str.splitlines
  kAlphabetic = 4,       // a letter: category L
  kUpperCase = 8,        // Lu, Lt
  kDecimal = 16,         // Nd
  kPunctuation = 32,     // category P
  kNoWord = 64,          // a word of these alone is punctuation to Gopher's rules (datatrove's set)
  kStopCharacter = 128,  // ends a line well: Unicode's Sentence_Terminal
  kSentenceEnd = 256,    // ends a sentence, if it is a word of its own
  kPrefix = 512,         // split off from the beginning of a word
  kSuffix = 1024,        // split off from the end of a word
  kSymbolWord = 2048,    // a word of its own wherever it stands: dingbats, the ellipsis
  kSeparator = 4096,     // becomes a space in the normal form of MinHash
};

struct CodePointRange {
  uint32_t begin, end;  // both are in it
};

// clang-format off

// Sentence_Terminal; the second list: those that spaCy's sentence splitter does not know.
constexpr CodePointRange kStopRanges[] = {
    {0x21, 0x21}, {0x2E, 0x2E}, {0x3F, 0x3F}, {0x589, 0x589}, {0x61D, 0x61F}, {0x6D4, 0x6D4},
    {0x700, 0x702}, {0x7F9, 0x7F9}, {0x837, 0x837}, {0x839, 0x839}, {0x83D, 0x83E}, {0x964, 0x965},
    {0x104A, 0x104B}, {0x1362, 0x1362}, {0x1367, 0x1368}, {0x166E, 0x166E}, {0x1735, 0x1736},
    {0x17D4, 0x17D6}, {0x17D9, 0x17DA}, {0x1803, 0x1803}, {0x1809, 0x1809}, {0x1944, 0x1945},
    {0x1AA8, 0x1AAB}, {0x1B5A, 0x1B5B}, {0x1B5E, 0x1B5F}, {0x1B7D, 0x1B7E}, {0x1C3B, 0x1C3C},
    {0x1C7E, 0x1C7F}, {0x203C, 0x203D}, {0x2047, 0x2049}, {0x2E2E, 0x2E2E}, {0x2E3C, 0x2E3C},
    {0x2E53, 0x2E54}, {0x3002, 0x3002}, {0xA4FF, 0xA4FF}, {0xA60E, 0xA60F}, {0xA6F3, 0xA6F3},
    {0xA6F7, 0xA6F7}, {0xA876, 0xA877}, {0xA8CE, 0xA8CF}, {0xA92F, 0xA92F}, {0xA9C8, 0xA9C9},
    {0xAA5D, 0xAA5F}, {0xAAF0, 0xAAF1}, {0xABEB, 0xABEB}, {0xFE52, 0xFE52}, {0xFE56, 0xFE57},
    {0xFF01, 0xFF01}, {0xFF0E, 0xFF0E}, {0xFF1F, 0xFF1F}, {0xFF61, 0xFF61}, {0x10A56, 0x10A57},
    {0x10F55, 0x10F59}, {0x10F86, 0x10F89}, {0x11047, 0x11048}, {0x110BE, 0x110C1},
    {0x11141, 0x11143}, {0x111C5, 0x111C6}, {0x111CD, 0x111CD}, {0x111DE, 0x111DF},
    {0x11238, 0x11239}, {0x1123B, 0x1123C}, {0x112A9, 0x112A9}, {0x1144B, 0x1144C},
    {0x115C2, 0x115C3}, {0x115C9, 0x115D7}, {0x11641, 0x11642}, {0x1173C, 0x1173E},
    {0x11944, 0x11944}, {0x11946, 0x11946}, {0x11A42, 0x11A43}, {0x11A9B, 0x11A9C},
    {0x11C41, 0x11C42}, {0x11EF7, 0x11EF8}, {0x11F43, 0x11F44}, {0x16A6E, 0x16A6F},
    {0x16AF5, 0x16AF5}, {0x16B37, 0x16B38}, {0x16B44, 0x16B44}, {0x16E98, 0x16E98},
    {0x1BC9F, 0x1BC9F}, {0x1DA88, 0x1DA88},
};
constexpr CodePointRange kNoSentenceEnd[] = {
    {0x61D, 0x61E}, {0x837, 0x837}, {0x839, 0x839}, {0x83D, 0x83E}, {0x17D4, 0x17D6},
    {0x17D9, 0x17DA}, {0x1B7D, 0x1B7E}, {0x2E53, 0x2E54}, {0x10F55, 0x10F59}, {0x10F86, 0x10F89},
    {0x11944, 0x11944}, {0x11946, 0x11946}, {0x11EF7, 0x11EF8}, {0x11F43, 0x11F44},
    {0x16E98, 0x16E98},
};
// datatrove's punctuation: all of ASCII, the controls, and these.
constexpr CodePointRange kSeparatorRanges[] = {
    {0x0, 0x8}, {0xB, 0x1F}, {0x21, 0x2F}, {0x3A, 0x40}, {0x5B, 0x60}, {0x7B, 0x9F}, {0xAB, 0xAB},
    {0xB4, 0xB4}, {0xBB, 0xBB}, {0x2013, 0x2014}, {0x2019, 0x2019}, {0x201C, 0x201E},
    {0x2026, 0x2026}, {0x2236, 0x2236}, {0x2501, 0x2501}, {0x25BA, 0x25BA}, {0x3001, 0x3002},
    {0x3008, 0x300D}, {0x3010, 0x3011}, {0xFF01, 0xFF01}, {0xFF05, 0xFF05}, {0xFF08, 0xFF09},
    {0xFF0C, 0xFF0C}, {0xFF0E, 0xFF0E}, {0xFF11, 0xFF11}, {0xFF1A, 0xFF1B}, {0xFF1F, 0xFF1F},
    {0xFF5E, 0xFF5E},
};

// clang-format on

uint16_t flags_of_category(uint32_t c) {
  switch (general_category(c)) {
    case Category::Lu:
    case Category::Lt:
      return kAlphabetic | kUpperCase;
    case Category::Ll:
    case Category::Lm:
    case Category::Lo:
      return kAlphabetic;
    case Category::Nd:
      return kDecimal;
    case Category::Pc:
    case Category::Pd:
    case Category::Ps:
    case Category::Pe:
    case Category::Pi:
    case Category::Pf:
    case Category::Po:
      return kPunctuation | kPrefix | kSuffix;
    case Category::Sc:
      return kPrefix | kSuffix;
    case Category::So:
      return kPrefix | kSuffix | kSymbolWord;
    case Category::Zs:
      return kWhite;
    default:
      return 0;
  }
}

// Flags of all code points: pages of 256, equal pages are stored once.
class CharacterTable {
 public:
  CharacterTable() {
    std::vector<uint16_t> all(0x110000);
    for (uint32_t c = 0; c < all.size(); c++) all[c] = flags_of_category(c);
    const auto set = [&](auto& ranges, int flags) {
      for (const CodePointRange& r : ranges)
        for (uint32_t c = r.begin; c <= r.end; c++) all[c] = uint16_t(all[c] | flags);
    };
    set(kStopRanges, kStopCharacter | kSentenceEnd | kNoWord);
    for (const CodePointRange& r : kNoSentenceEnd)
      for (uint32_t c = r.begin; c <= r.end; c++) all[c] = uint16_t(all[c] & ~kSentenceEnd);
    set(kSeparatorRanges, kSeparator | kNoWord);
    for (uint32_t c : {0x9, 0xA, 0xB, 0xC, 0xD, 0x1C, 0x1D, 0x1E, 0x1F, 0x85, 0x2028, 0x2029})
      all[c] |= kWhite;
    for (uint32_t c : {0xA, 0xB, 0xC, 0xD, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029})
      all[c] |= kLineBreak;
    for (uint32_t c = '!'; c <= '~'; c++) {
      if (all[c] & (kAlphabetic | kDecimal)) continue;
      all[c] = uint16_t(all[c] & ~(kPrefix | kSuffix));
      if (std::strchr("%=,:;!?()[]{}<>_#*&'\"`$", int(c))) all[c] |= kPrefix;
      if (std::strchr(",:;!?()[]{}<>_#*&'\"`$", int(c))) all[c] |= kSuffix;
    }
    all[0xB4] |= kPrefix | kSuffix;  // the acute accent, as an apostrophe
    all[0x2026] |= kSymbolWord;      // the ellipsis

    std::map<std::vector<uint16_t>, uint16_t> known;
    for (uint32_t page = 0; page < kPages; page++) {
      const std::vector<uint16_t> flags(all.begin() + page * 256, all.begin() + page * 256 + 256);
      const auto [it, added] = known.try_emplace(flags, uint16_t(known.size()));
      if (added) flags_.insert(flags_.end(), flags.begin(), flags.end());
      pages_[page] = it->second;
    }
  }
  uint16_t operator[](uint32_t c) const { return flags_[size_t(pages_[c >> 8]) * 256 + (c & 255)]; }

 private:
  static constexpr uint32_t kPages = 0x1100;
  uint16_t pages_[kPages];
  std::vector<uint16_t> flags_;
};

const CharacterTable& character_table() {
  static const CharacterTable table;
  return table;
}

// The code point at p, which moves behind it. Valid UTF-8 only.
inline uint32_t next_character(const char*& p) {
  const auto byte = [&] { return uint32_t(uint8_t(*p++)); };
  const uint32_t a = byte();
  if (a < 0x80) return a;
  const uint32_t b = byte() & 63;
  if (a < 0xE0) return (a & 31) << 6 | b;
  const uint32_t c = byte() & 63;
  if (a < 0xF0) return (a & 15) << 12 | b << 6 | c;
  return (a & 7) << 18 | b << 12 | c << 6 | (byte() & 63);
}
// The code point before p, which moves to its begin.
inline uint32_t previous_character(const char*& p) {
  do p--;
  while ((uint8_t(*p) & 0xC0) == 0x80);
  const char* copy = p;
  return next_character(copy);
}

inline size_t count_characters(std::string_view text) {
  size_t n = 0;
  for (char c : text) n += (uint8_t(c) & 0xC0) != 0x80;
  return n;
}

std::string_view strip_white(std::string_view text, const CharacterTable& table) {
  const char *begin = text.data(), *end = begin + text.size();
  for (const char* p = begin; begin < end; begin = p) {
    if (!(table[next_character(p)] & kWhite)) break;
  }
  for (const char* p = end; begin < end; end = p) {
    if (!(table[previous_character(p)] & kWhite)) break;
  }
  return {begin, size_t(end - begin)};
}

// ---------------------------------------------------------------------------------------------
// Words. Text is cut at white space, then punctuation is taken off both ends one character at a
// time, then the rest is cut inside at hyphens, slashes and the like. These are the rules of
// spaCy's English tokenizer, without its longer lists of exceptions.

// Words that end in a period which belongs to them. Sorted.
// clang-format off
constexpr std::string_view kAbbreviations[] = {
    "Adm", "Ak", "Ala", "Apr", "Ariz", "Ark", "Aug", "Bros", "Calif", "Co", "Colo", "Conn", "Corp",
    "Dec", "Del", "Dr", "Feb", "Fla", "Ga", "Gen", "Gov", "Ia", "Id", "Ill", "Inc", "Ind", "Jan",
    "Jr", "Jul", "Jun", "Kan", "Kans", "Ky", "La", "Ltd", "Mar", "Mass", "Md", "Messrs", "Mich",
    "Minn", "Miss", "Mo", "Mont", "Mr", "Mrs", "Ms", "Mt", "Neb", "Nebr", "Nev", "Nov", "Oct",
    "Okla", "Ore", "Pa", "Prof", "Rep", "Rev", "Sen", "Sep", "Sept", "St", "Tenn", "Va", "Wash",
    "Wis", "co", "vs",
};
// clang-format on
// Endings after an apostrophe that are words of their own, after "n't" and "'s".
constexpr std::string_view kContractions[] = {"ll", "ve", "re", "d", "m"};
// Units that are split off from a number.
// clang-format off
constexpr std::string_view kUnits[] = {
    "%", "km", "m", "cm", "mm", "ha", "nm", "yd", "in", "ft", "kg", "g", "mg", "t", "lb", "oz",
    "mph", "mb", "MB", "kb", "KB", "gb", "GB", "tb", "TB", "T", "G", "M", "K", "am", "pm",
};
// clang-format on

inline bool is_ascii_letter(char c) { return uint8_t((c | 32) - 'a') < 26; }
inline bool is_ascii_digit(char c) { return uint8_t(c - '0') < 10; }
inline bool is_ascii_upper(char c) { return uint8_t(c - 'A') < 26; }

struct AsciiKinds {  // what the fast path asks of a byte
  enum : uint8_t { other, letter, space };
  uint8_t of[256] = {};
  constexpr AsciiKinds() {
    for (int c = 0; c < 128; c++) {
      if ((c | 32) >= 'a' && (c | 32) <= 'z') of[c] = letter;
      if (c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x1F)) of[c] = space;
    }
  }
};
constexpr AsciiKinds kAsciiKinds;

class WordSplitter {
 public:
  WordSplitter() : table_(character_table()) {}

  struct Chunks {
    size_t number = 0;   // of pieces between white space
    size_t longest = 0;  // bytes of the longest
  };

  // Calls word(begin, end) for each word of a line, in order.
  template <class Word>
  Chunks split(std::string_view line, Word&& word) {
    Chunks chunks;
    const char *p = line.data(), *end = p + line.size();
    const auto kind = [](const char* q) { return kAsciiKinds.of[uint8_t(*q)]; };
    while (true) {
      while (p < end && kind(p) == AsciiKinds::space) p++;
      if (p == end) return chunks;
      const char* begin = p;
      while (p < end && kind(p) == AsciiKinds::letter) p++;
      const char* letters_end = p;
      while (p < end && kind(p) != AsciiKinds::space) {
        if (uint8_t(*p) < 0x80) {
          p++;
          continue;
        }
        const char* next = p;
        if (table_[next_character(next)] & kWhite) break;
        p = next;
      }
      if (p == begin) {  // white space beyond ASCII
        next_character(p);
        continue;
      }
      chunks.number++;
      chunks.longest = std::max(chunks.longest, size_t(p - begin));
      if (letters_end == p) {
        word(begin, p);
      } else {
        split_chunk(begin, p, word);
      }
    }
  }

 private:
  template <class Word>
  void split_chunk(const char* begin, const char* end, Word&& word) {
    suffixes_.clear();
    while (begin < end) {
      if (*begin == '\'' && is_contraction({begin + 1, size_t(end - begin - 1)})) break;
      const size_t prefix = prefix_bytes(begin, end);
      if (prefix > 0) {
        word(begin, begin + prefix);
        begin += prefix;
        continue;
      }
      const size_t suffix = suffix_bytes(begin, end);
      if (suffix == 0) break;
      suffixes_.push_back(end);
      end -= suffix;
    }
    while (const char* cut = contraction(begin, end)) {  // don't, couldn't've
      suffixes_.push_back(end);
      end = cut;
    }
    if (begin < end) split_core(begin, end, word);
    for (size_t i = suffixes_.size(); i-- > 0;) {
      word(end, suffixes_[i]);
      end = suffixes_[i];
    }
  }

  // Bytes that are split off at the begin, 0: none.
  size_t prefix_bytes(const char* begin, const char* end) const {
    const char* p = begin;
    const uint32_t c = next_character(p);
    if (c == '.') {  // two or more
      while (p < end && *p == '.') p++;
      return p - begin >= 2 ? size_t(p - begin) : 0;
    }
    if (c == '+') return p < end && is_ascii_digit(*p) ? 0 : 1;
    return table_[c] & kPrefix ? size_t(p - begin) : 0;
  }

  size_t suffix_bytes(const char* begin, const char* end) const {
    const char* p = end;
    const uint32_t c = previous_character(p);
    if (c == '.') {
      while (p > begin && p[-1] == '.') p--;
      if (end - p >= 2) return size_t(end - p);
      return period_is_suffix(begin, end - 1) ? 1 : 0;
    }
    if ((c == 's' || c == 'S') && p > begin) {  // 's
      const char* q = p;
      const uint32_t apostrophe = previous_character(q);
      if (apostrophe == '\'' || apostrophe == 0x2019) return size_t(end - q);
    }
    if (table_[c] & kSuffix) return size_t(end - p);
    if (c == '+' && p > begin && is_ascii_digit(p[-1])) return 1;
    return unit_bytes(begin, end);
  }

  static size_t unit_bytes(const char* begin, const char* end) {
    const char* p = end;
    while (p > begin && end - p < 4 && (is_ascii_letter(p[-1]) || p[-1] == '%')) p--;
    if (p == begin || p == end || !is_ascii_digit(p[-1])) return 0;
    const std::string_view ending(p, size_t(end - p));
    for (std::string_view unit : kUnits)
      if (unit == ending) return unit.size();
    return 0;
  }

  static bool is_contraction(std::string_view word) {
    return word == "s" || std::find(std::begin(kContractions), std::end(kContractions), word) !=
                              std::end(kContractions);
  }

  // Whether the period at `period` is a word of its own: not in "J.", "U.S.", "e.g.", "Dr.".
  bool period_is_suffix(const char* begin, const char* period) const {
    if (period == begin) return false;
    const char* p = period;
    const uint32_t c = previous_character(p);
    const uint16_t flags = table_[c];
    if (flags & kUpperCase) return p > begin && (table_[previous_character(p)] & kUpperCase);
    if (!(flags & kAlphabetic)) {
      return (flags & (kDecimal | kSuffix)) || c == '%' || c == '-' || c == '+' || c == 0xB2;
    }
    if (p == begin) return c >= 0x80;  // "a."
    if (is_initials(begin, period)) return false;
    const std::string_view word(begin, size_t(period - begin));
    return !std::binary_search(std::begin(kAbbreviations), std::end(kAbbreviations), word);
  }

  static bool is_initials(const char* begin, const char* period) {  // "e.g", "a.m"
    if ((period - begin) % 2 == 0) return false;
    for (const char* p = begin; p < period; p++) {
      if ((p - begin) % 2 ? *p != '.' : !is_ascii_letter(*p)) return false;
    }
    return true;
  }

  static bool is_url(std::string_view word) {
    if (word.starts_with("www.") || word.starts_with("http:") || word.starts_with("https:"))
      return true;
    const size_t dot = word.find('.');
    if (dot == word.npos || dot == 0 || word.find("..") != word.npos) return false;
    const size_t slash = word.find('/');
    const std::string_view host = word.substr(0, slash);
    const size_t last = host.rfind('.');
    if (last == host.npos || last + 2 >= host.size()) return false;
    for (char c : host.substr(last + 1))
      if (uint8_t(c - 'a') >= 26) return false;
    return true;
  }

  // What is left when both ends are done.
  template <class Word>
  void split_core(const char* begin, const char* end, Word&& word) {
    if (end - begin < 2) return word(begin, end);
    if (is_url({begin, size_t(end - begin)})) return word(begin, end);
    const char* piece = begin;
    for (const char* p = begin; p < end;) {
      const size_t infix = infix_bytes(begin, p, end);
      if (infix == 0) {
        next_character(p);
        continue;
      }
      if (piece < p) word(piece, p);
      word(p, p + infix);
      piece = p += infix;
    }
    if (piece < end) word(piece, end);
  }

  // Where "n't", "'ll" and their like begin, null: not here.
  static const char* contraction(const char* begin, const char* end) {
    if (end - begin < 3) return nullptr;
    for (std::string_view ending : kContractions) {
      if (!std::string_view(begin, size_t(end - begin)).ends_with(ending)) continue;
      const char* cut = before_apostrophe(begin, end - ending.size());
      return cut && cut > begin ? cut : nullptr;
    }
    if (end[-1] != 't') return nullptr;
    const char* cut = before_apostrophe(begin, end - 1);
    return cut && cut > begin + 1 && cut[-1] == 'n' ? cut - 1 : nullptr;
  }
  static const char* before_apostrophe(const char* begin, const char* p) {
    if (p > begin && p[-1] == '\'') return p - 1;
    if (p - begin >= 3 && std::memcmp(p - 3, "\xE2\x80\x99", 3) == 0) return p - 3;
    return nullptr;
  }

  // Bytes of the word that stands inside a word at p, 0: none.
  size_t infix_bytes(const char* begin, const char* p, const char* end) const {
    if (is_ascii_letter(*p) || is_ascii_digit(*p)) return 0;
    const char* next = p;
    const uint32_t c = next_character(next);
    const uint16_t flags = table_[c];
    if (flags & kAlphabetic) return 0;
    if (flags & kSymbolWord) return size_t(next - p);
    if (c == '.' && next < end && *next == '.') {
      while (next < end && *next == '.') next++;
      return size_t(next - p);
    }
    if (p == begin || next == end) return 0;
    const char* before = p;
    const uint32_t left = previous_character(before);
    const uint16_t left_flags = table_[left];
    const bool left_letter = left_flags & kAlphabetic,
               left_digit = left < 0x80 && left_flags & kDecimal;
    const char* after = next;
    const uint32_t right = next_character(after);
    const uint16_t right_flags = table_[right];
    const bool right_letter = right_flags & kAlphabetic;
    switch (c) {
      case '.':
        return ((left_letter && !(left_flags & kUpperCase)) || is_quote(left)) &&
               (right_flags & kUpperCase || is_quote(right));
      case ',':
        return left_letter && right_letter;
      case '+':
      case '*':
      case '^':
        return left_digit && (right == '-' || is_ascii_digit(*next));
      case ':':
      case '<':
      case '>':
      case '=':
      case '/':
        return (left_letter || left_digit) && right_letter;
      case '-':
        if (left_digit && (right == '-' || is_ascii_digit(*next))) return 1;
        [[fallthrough]];
      case '~':
      case 0x2013:
      case 0x2014: {
        if (!left_letter && !left_digit) return 0;
        while (c == '-' && next < end && *next == '-' && next - p < 3) next++;
        if (next == end) return 0;
        const char* behind = next;
        return table_[next_character(behind)] & kAlphabetic ? size_t(next - p) : 0;
      }
      default:
        return 0;
    }
  }
  static bool is_quote(uint32_t c) {
    return c == '\'' || c == '"' || c == '`' || c == 0xB4 || c == 0xAB || c == 0xBB ||
           (c >= 0x2018 && c <= 0x201E);
  }

  const CharacterTable& table_;
  std::vector<const char*> suffixes_;  // their ends, from the outermost
};

// ---------------------------------------------------------------------------------------------
// Tables of one document: words are numbered by their first occurrence; a hash table of slots
// holds numbers, and is as large as the document needs.

class SlotTable {  // open addressing; a slot holds an index + 1, 0: empty
 public:
  void reset(size_t elements) {
    bits_ = std::max(4, int(std::bit_width(elements * 2)));
    const size_t size = size_t(1) << bits_;
    if (slots_.size() < size) slots_.resize(size);
    std::fill_n(slots_.begin(), size, 0);
  }
  size_t capacity() const { return size_t(1) << (bits_ - 1); }  // elements
  // The index that `same(index)` finds, or `added`, which is put there.
  template <class Same>
  uint32_t find_or_add(uint64_t hash, uint32_t added, Same&& same) {
    const size_t mask = (size_t(1) << bits_) - 1;
    for (size_t i = hash >> (64 - bits_);; i = (i + 1) & mask) {
      if (slots_[i] == 0) {
        slots_[i] = added + 1;
        return added;
      }
      if (same(slots_[i] - 1)) return slots_[i] - 1;
    }
  }
  template <class Same>
  bool find(uint64_t hash, Same&& same) const {
    const size_t mask = (size_t(1) << bits_) - 1;
    for (size_t i = hash >> (64 - bits_); slots_[i] != 0; i = (i + 1) & mask)
      if (same(slots_[i] - 1)) return true;
    return false;
  }

 private:
  int bits_ = 4;
  std::vector<uint32_t> slots_;
};

inline uint64_t load_bytes(const char* p, size_t n) {  // n <= 8
  uint64_t x = 0;
  if (n >= 4) {
    uint32_t a, b;
    std::memcpy(&a, p, 4);
    std::memcpy(&b, p + n - 4, 4);
    return uint64_t(b) << 32 | a;
  }
  if (n >= 2) {
    uint16_t a, b;
    std::memcpy(&a, p, 2);
    std::memcpy(&b, p + n - 2, 2);
    return uint64_t(b) << 16 | a;
  }
  if (n == 1) x = uint8_t(*p);
  return x;
}

inline uint64_t fold_multiply(uint64_t a, uint64_t b) {
  const __uint128_t product = __uint128_t(a) * b;
  return uint64_t(product) ^ uint64_t(product >> 64);
}

// The first and the last 8 bytes of a string: all of it, if it has 16 bytes at most.
struct StringKey {
  uint64_t head, tail;
  StringKey(const char* p, size_t n)
      : head(load_bytes(p, std::min<size_t>(n, 8))), tail(n > 8 ? load_bytes(p + n - 8, 8) : 0) {}
  bool operator==(const StringKey& k) const { return ((head ^ k.head) | (tail ^ k.tail)) == 0; }
  uint64_t hash(size_t n) const {
    constexpr uint64_t k1 = 0x9e3779b97f4a7c15, k2 = 0xbf58476d1ce4e5b9;
    return fold_multiply(head ^ k1 ^ (uint64_t(n) << 56), tail ^ k2);
  }
};

inline uint64_t hash_bytes(const char* p, size_t n) {
  return n <= 16 ? StringKey(p, n).hash(n) : XXH3_64bits(p, n);
}

struct TableWord {
  const char* begin;
  uint32_t bytes, characters;
  uint32_t number;  // of its occurrences
  uint16_t any;     // flags that one of its characters has
  uint16_t all;     // flags that all of them have
  StringKey key;
};

class WordTable {
 public:
  // For a text of so many bytes.
  void reset(size_t text_bytes) {
    words_.clear();
    slots_.reset(std::min<size_t>(text_bytes / 8 + 16, 1 << 12));
  }
  uint32_t intern(const char* begin, const char* end) {
    const size_t bytes = size_t(end - begin);
    const StringKey key(begin, bytes);
    const uint64_t hash = bytes <= 16 ? key.hash(bytes) : XXH3_64bits(begin, bytes);
    if (words_.size() == slots_.capacity()) grow();
    const uint32_t id = slots_.find_or_add(hash, uint32_t(words_.size()), [&](uint32_t i) {
      return words_[i].bytes == bytes && words_[i].key == key &&
             (bytes <= 16 || std::memcmp(words_[i].begin, begin, bytes) == 0);
    });
    if (id == words_.size()) add(begin, end, key);
    words_[id].number++;
    return id;
  }
  bool contains(std::string_view word) const {  // of 16 bytes at most
    const StringKey key(word.data(), word.size());
    return slots_.find(key.hash(word.size()), [&](uint32_t i) {
      return words_[i].bytes == word.size() && words_[i].key == key;
    });
  }
  const std::vector<TableWord>& words() const { return words_; }

 private:
  void add(const char* begin, const char* end, const StringKey& key) {
    uint16_t any = 0, all = 0xFFFF;
    uint32_t characters = 0;
    for (const char* p = begin; p < end; characters++) {
      const uint16_t flags = table_[next_character(p)];
      any |= flags, all &= flags;
    }
    if (characters > 1) all = uint16_t(all & ~kSentenceEnd);  // it must stand alone
    words_.push_back({begin, uint32_t(end - begin), characters, 0, any, all, key});
  }
  void grow() {
    slots_.reset(words_.size() * 2);
    for (uint32_t i = 0; i < words_.size(); i++) {
      slots_.find_or_add(hash_bytes(words_[i].begin, words_[i].bytes), i,
                         [](uint32_t) { return false; });
    }
  }

  const CharacterTable& table_ = character_table();
  std::vector<TableWord> words_;
  SlotTable slots_;
};

// Strings that occurred before: their number, and their characters.
struct DuplicateStrings {
  size_t number = 0, characters = 0;
};
class DuplicateFinder {
 public:
  void add(std::string_view s) { strings_.push_back(s); }
  size_t size() const { return strings_.size(); }
  DuplicateStrings find() {  // and forgets them
    DuplicateStrings found;
    slots_.reset(strings_.size());
    for (size_t i = 0; i < strings_.size(); i++) {
      const std::string_view s = strings_[i];
      const uint64_t hash = hash_bytes(s.data(), s.size());
      const uint32_t earliest =
          slots_.find_or_add(hash, uint32_t(i), [&](uint32_t k) { return strings_[k] == s; });
      if (earliest == i) continue;
      found.number++;
      found.characters += count_characters(s);
    }
    strings_.clear();
    return found;
  }

 private:
  std::vector<std::string_view> strings_;
  SlotTable slots_;
};

// ---------------------------------------------------------------------------------------------
// Repeated n-grams, n = 2 to 10. Two neighbours of length n that both occur more than once are the
// only ones that can make a repeated n-gram of length n + 1. So each length looks only at what is
// left of the one before, and gives equal pairs of numbers one number: exact, without text.

class RepeatedNgrams {
 public:
  // top[n], n = 2..4: characters of the most frequent n-gram with its spaces, times its number.
  // repeated[n], n = 5..10: characters of n-grams that occurred before, found by a scan which jumps
  // over what it found.
  size_t top[5], repeated[11];

  void find(const std::vector<uint32_t>& ids, const std::vector<TableWord>& words) {
    std::fill(std::begin(top), std::end(top), 0);
    std::fill(std::begin(repeated), std::end(repeated), 0);
    left_.resize(ids.size());
    size_t left = 0;  // here and below: no branch that the processor would guess wrong
    for (uint32_t i = 0; i < ids.size(); i++) {
      left_[left] = {i, ids[i]};
      left += words[ids[i]].number > 1;
    }
    left_.resize(left);
    const auto characters = [&](size_t begin, int n) {
      size_t sum = 0;
      for (size_t i = begin; i < begin + size_t(n); i++) sum += words[ids[i]].characters;
      return sum;
    };
    for (int n = 2; n <= 10 && ids.size() >= size_t(n); n++) {
      extend();
      if (n <= 4) {
        const auto [begin, number] = most_frequent_;
        top[n] = (characters(begin, n) + size_t(n) - 1) * number;
        continue;
      }
      seen_.assign(candidates_, 0);
      size_t next = 0;
      for (const Gram& gram : left_) {
        if (gram.position < next) continue;
        if (seen_[gram.id]) {
          repeated[n] += characters(gram.position, n);
          next = gram.position + size_t(n);
        } else {
          seen_[gram.id] = 1;
        }
      }
    }
  }

 private:
  struct Gram {
    uint32_t position, id;  // place of its first word; equal n-grams have equal ids
  };
  // From the repeated n-grams to those of length n + 1.
  void extend() {
    pairs_.resize(left_.size());
    candidates_ = 0;
    for (size_t i = 0; i + 1 < left_.size(); i++) {
      pairs_[candidates_] = uint32_t(i);
      candidates_ += left_[i + 1].position == left_[i].position + 1;
    }
    ids_.resize(candidates_);
    number_.assign(candidates_, 0);
    slots_.reset(candidates_);
    for (uint32_t k = 0; k < candidates_; k++) {
      const Gram *a = &left_[pairs_[k]], *b = a + 1;
      const uint64_t key = uint64_t(a->id) << 32 | b->id;
      ids_[k] = slots_.find_or_add(fold_multiply(key ^ 0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9), k,
                                   [&](uint32_t j) {
                                     const Gram* other = &left_[pairs_[j]];
                                     return other[0].id == a->id && other[1].id == b->id;
                                   });
      number_[ids_[k]]++;
    }
    most_frequent_ = {0, 1};  // of n-grams that occur once: the first
    next_.resize(candidates_);
    size_t left = 0;
    for (uint32_t k = 0; k < candidates_; k++) {
      const uint32_t number = number_[ids_[k]], position = left_[pairs_[k]].position;
      if (number > most_frequent_.number) most_frequent_ = {position, number};
      next_[left] = {position, ids_[k]};
      left += number > 1;
    }
    next_.resize(left);
    left_.swap(next_);
  }

  struct Frequent {
    size_t position, number;
  } most_frequent_{};
  size_t candidates_ = 0;
  std::vector<Gram> left_, next_;  // repeated n-grams, in order
  std::vector<uint32_t> pairs_, ids_, number_;
  std::vector<uint8_t> seen_;
  SlotTable slots_;
};

// ---------------------------------------------------------------------------------------------
// URLs. Lists are files of one entry a line; empty lines and lines that begin with # are left out.

std::string lower_ascii(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) c = char(is_ascii_upper(c) ? c | 32 : c);
  return lower;
}
std::string lower_alphanumeric(std::string_view text) {  // without all other characters
  std::string kept;
  for (char c : text)
    if (is_ascii_letter(c) || is_ascii_digit(c)) kept += char(is_ascii_upper(c) ? c | 32 : c);
  return kept;
}

// The host of scheme://user@host:port/path, in lower case; also of host/path and //host/path.
std::string url_host(std::string_view url) {
  const size_t scheme = url.find("//");
  if (scheme != url.npos && (scheme == 0 || url[scheme - 1] == ':')) url.remove_prefix(scheme + 2);
  url = url.substr(0, url.find_first_of("/?#\\"));
  const size_t user = url.rfind('@');
  if (user != url.npos) url.remove_prefix(user + 1);
  if (!url.starts_with('[')) url = url.substr(0, url.find(':'));
  while (url.ends_with('.')) url.remove_suffix(1);
  return lower_ascii(url);
}

// The public suffix of the host and one label more, by the ICANN part of the public suffix list;
// empty where there is none. "a.b.example.co.uk": "example.co.uk".
std::string registered_domain(const std::string& host) {
  const psl_ctx_t* list = psl_builtin();
  if (!list) fail("libpsl: it was built without a public suffix list");
  in_addr address;
  if (inet_pton(AF_INET, host.c_str(), &address) == 1 || host.starts_with('[')) return {};
  for (size_t label = 0; label != host.npos;) {
    const size_t dot = host.find('.', label);
    if (dot == host.npos) return {};
    if (psl_is_public_suffix2(list, host.c_str() + dot + 1, PSL_TYPE_ICANN)) {
      const bool whole = psl_is_public_suffix2(list, host.c_str() + label, PSL_TYPE_ICANN);
      return whole ? std::string() : host.substr(label);
    }
    label = dot + 1;
  }
  return {};
}

class UrlLists {
 public:
  explicit UrlLists(const MeasureOptions& o) {
    const auto domain = [](std::string_view s) { return lower_ascii(s); };
    read(o.blocked_domains, domain, domains_);
    read(o.blocked_domains, domain, hosts_);  // a host may be in either
    read(o.blocked_hosts, domain, hosts_);
    read(
        o.blocked_urls, [](std::string_view s) { return std::string(s); }, urls_);
    read(o.banned_words, lower_alphanumeric, words_);
    read(o.soft_banned_words, lower_alphanumeric, soft_words_);
    Set substrings;
    read(o.banned_substrings, lower_alphanumeric, substrings);
    substrings_.assign(substrings.begin(), substrings.end());
    std::sort(substrings_.begin(), substrings_.end());
    given_[MeasureOf::blocked_domain] = !o.blocked_domains.empty();
    given_[MeasureOf::blocked_host] = !o.blocked_domains.empty() || !o.blocked_hosts.empty();
    given_[MeasureOf::blocked_url] = !o.blocked_urls.empty();
    given_[MeasureOf::banned_words] = !o.banned_words.empty();
    given_[MeasureOf::soft_banned_words] = !o.soft_banned_words.empty();
    given_[MeasureOf::banned_substrings] = !o.banned_substrings.empty();
  }

  // match: what was found first, in the order of the rules.
  void measure(std::string_view url, double* values, std::string& match) const {
    for (int i = 0; i <= MeasureOf::banned_substrings; i++) values[i] = given_[i] ? 0 : kOff;
    if (url.empty()) return;
    const auto found = [&](int measure, std::string_view what) {
      values[measure]++;
      if (match.empty()) match = concat(kMeasures[measure].name, ": ", what);
    };
    if (given_[MeasureOf::blocked_host]) {
      const std::string host = url_host(url);
      const std::string domain = registered_domain(host);
      if (!domain.empty() && domains_.count(domain)) found(MeasureOf::blocked_domain, domain);
      if (hosts_.count(host)) found(MeasureOf::blocked_host, host);
    }
    if (urls_.count(std::string(url))) found(MeasureOf::blocked_url, url);
    if (!words_.empty() || !soft_words_.empty()) {
      std::set<std::string> pieces;  // as they are written, upper case too
      std::string piece;
      for (size_t i = 0; i <= url.size(); i++) {
        if (i < url.size() && (is_ascii_letter(url[i]) || is_ascii_digit(url[i]))) {
          piece += url[i];
        } else if (!piece.empty()) {
          pieces.insert(std::exchange(piece, {}));
        }
      }
      for (const std::string& p : pieces)
        if (words_.count(p)) found(MeasureOf::banned_words, p);
      for (const std::string& p : pieces)
        if (soft_words_.count(p)) found(MeasureOf::soft_banned_words, p);
    }
    if (!substrings_.empty()) {
      const std::string plain = lower_alphanumeric(url);
      for (const std::string& s : substrings_)
        if (plain.find(s) != plain.npos) found(MeasureOf::banned_substrings, s);
    }
  }

 private:
  using Set = std::unordered_set<std::string>;
  template <class Normal>
  static void read(const std::vector<std::string>& paths, Normal&& normal, Set& set) {
    for (const std::string& path : paths) {
      LineReader lines{Input(path)};
      for (std::string_view line; lines.next(line);) {
        line = strip_ascii(line);
        if (line.empty() || line[0] == '#') continue;
        std::string entry = normal(line);
        if (!entry.empty()) set.insert(std::move(entry));
      }
    }
  }

  bool given_[MeasureOf::banned_substrings + 1] = {};
  Set domains_, hosts_, urls_, words_, soft_words_;
  std::vector<std::string> substrings_;
};

// ---------------------------------------------------------------------------------------------
// Language, by CLD2 (Sites 2013). It is given at most 8 KB of a document: a third from its begin,
// its middle and its end, cut where characters begin.

constexpr size_t kLanguageBytes = 8192;

std::string_view language_sample(std::string_view text, std::string& buffer) {
  if (text.size() <= kLanguageBytes) return text;
  const auto piece = [&](size_t begin, size_t bytes) {
    const auto inside = [&](size_t i) {  // of a character
      return i < text.size() && (uint8_t(text[i]) & 0xC0) == 0x80;
    };
    size_t end = begin + bytes;
    while (inside(begin)) begin++;
    while (inside(end)) end--;
    return text.substr(begin, end - begin);
  };
  const size_t third = (kLanguageBytes - 2) / 3;
  buffer.clear();
  buffer.append(piece(0, third)).append("\n");
  buffer.append(piece((text.size() - third) / 2, third)).append("\n");
  buffer.append(piece(text.size() - third, third));
  return buffer;
}

// A code as ISO 639-1 has it today, where it has one. CLD2 knows some by their old names, and does
// not tell the two kinds of Norwegian apart well, nor those of Serbian.
std::string_view current_code(std::string_view code) {
  constexpr std::pair<std::string_view, std::string_view> kRenamed[] = {
      {"iw", "he"},  {"in", "id"}, {"jw", "jv"}, {"ji", "yi"},    {"mo", "ro"},
      {"fil", "tl"}, {"nb", "no"}, {"nn", "no"}, {"sr-ME", "sr"}, {"zh-Hant", "zh"},
  };
  for (const auto& [old, now] : kRenamed)
    if (code == old) return now;
  return code;
}

// Languages that CLD2 takes for each other in short texts, with frequent words that only one of the
// two has. Where the other language's words are more, the text is of the other language.
struct ConfusedLanguages {
  std::string_view codes[2];
  std::string_view words[2];  // each between two spaces
};
constexpr ConfusedLanguages kConfusedLanguages[] = {
    {{"id", "ms"},
     {" bahwa karena bisa uang kantor resmi agar maupun apapun harus pria perusahaan ",
      " bahawa kerana ialah wang pejabat rasmi sahaja mahu daripada sebarang hendaklah awak "}},
    {{"es", "gl"},
     {" el los las y una fue muy donde es su sus lo al ",
      " os as unha do dos das ao aos foi moi onde polo pola cos "}},
    {{"da", "no"},
     {" af blev mig dig sig nogen noget hvad efter meget kun ud op uden mod ",
      " av ble meg deg seg noen noe hva etter mye ut opp uten mot "}},
    {{"nl", "af"},
     {" een zijn niet ik wij zij deze naar heeft worden wordt voor bij door zich ",
      " nie ek hy hulle hierdie vir deur by sy "}},
};

// Words of the text that are in the lists.
std::array<int, 2> count_listed_words(std::string_view text, const ConfusedLanguages& languages) {
  std::array<int, 2> counts{};
  std::string word = " ";
  for (size_t i = 0; i <= text.size(); i++) {
    const char c = i < text.size() ? text[i] : ' ';
    if (is_ascii_letter(c) || uint8_t(c) >= 0x80) {
      word += is_ascii_upper(c) ? char(c | 32) : c;
      continue;
    }
    if (word.size() > 1 && word.size() < 16) {
      word += ' ';
      for (size_t k = 0; k < 2; k++)
        counts[k] += languages.words[k].find(word) != std::string_view::npos;
    }
    word = " ";
  }
  return counts;
}

std::string_view tell_apart(std::string_view code, std::string_view text) {
  for (const ConfusedLanguages& languages : kConfusedLanguages) {
    for (size_t k = 0; k < 2; k++) {
      if (languages.codes[k] != code) continue;
      const std::array<int, 2> counts = count_listed_words(text, languages);
      return counts[1 - k] > counts[k] ? languages.codes[1 - k] : code;
    }
  }
  return code;
}

struct LanguageShares {
  std::string_view code[3];
  double share[3];  // of the letters' bytes; equal codes are not joined
};

LanguageShares language_shares(std::string_view text) {
  CLD2::Language languages[3];
  int percent[3], text_bytes = 0, valid_bytes = 0;
  double scores[3];
  bool reliable = false;
  const CLD2::CLDHints hints = {nullptr, nullptr, CLD2::UNKNOWN_ENCODING, CLD2::UNKNOWN_LANGUAGE};
  std::fill_n(languages, 3, CLD2::UNKNOWN_LANGUAGE), std::fill_n(percent, 3, 0);
  CLD2::ExtDetectLanguageSummaryCheckUTF8(text.data(), int(text.size()), true, &hints, 0, languages,
                                          percent, scores, nullptr, &text_bytes, &reliable,
                                          &valid_bytes);
  LanguageShares shares;
  for (int i = 0; i < 3; i++) {
    // On invalid UTF-8 it stops at once, and what it says is left over from its last call.
    const bool known = size_t(valid_bytes) == text.size() &&
                       languages[i] != CLD2::UNKNOWN_LANGUAGE && percent[i] > 0;
    shares.code[i] = known ? current_code(CLD2::LanguageCode(languages[i])) : "un";
    if (known && percent[i] > 50) shares.code[i] = tell_apart(shares.code[i], text);
    shares.share[i] = known ? percent[i] / 100. : 0;
  }
  return shares;
}

// ---------------------------------------------------------------------------------------------
// Lines of C4

// "[12]", "[edit]", "[citation needed]" removed.
void append_without_citations(std::string_view line, std::string& out) {
  while (true) {
    const size_t open = line.find('[');
    out.append(line.substr(0, open));
    if (open == line.npos) return;
    line.remove_prefix(open);
    size_t digits = 1;
    while (digits < line.size() && is_ascii_digit(line[digits])) digits++;
    if (digits < line.size() && line[digits] == ']') {
      line.remove_prefix(digits + 1);
    } else if (line.starts_with("[edit]")) {
      line.remove_prefix(6);
    } else if (line.starts_with("[citation needed]")) {
      line.remove_prefix(17);
    } else {
      out += '[';
      line.remove_prefix(1);
    }
  }
}

constexpr std::string_view kPolicyPhrases[] = {
    "terms of use", "privacy policy", "cookie policy",
    "uses cookies", "use of cookies", "use cookies",
};

constexpr std::string_view kGopherStopWords[] = {"the", "be",   "to",   "of",
                                                 "and", "that", "have", "with"};

// Sentences of words one after another: a new one begins at the first word after a mark that ends
// one, and which is no punctuation.
class SentenceCounter {
 public:
  void add(uint16_t all_flags) {
    if (all_flags & kSentenceEnd) {
      ended_ = true;
      any_ = true;
    } else if (!any_ || (ended_ && !(all_flags & kPunctuation))) {
      sentences_ += any_;
      any_ = true;
      ended_ = false;
    }
  }
  size_t sentences() const { return sentences_ + any_; }

 private:
  size_t sentences_ = 0;
  bool any_ = false, ended_ = false;
};

// ---------------------------------------------------------------------------------------------
// Signatures: MinHash (Broder 1997) over 5-grams of words of the normal form. 14 bands of 8 hashes:
// two texts whose sets of 5-grams have the Jaccard similarity s agree on a band with the
// probability 1 - (1 - s^8)^14.

constexpr int kShingleWords = 5;

class NormalForm {
 public:
  NormalForm() {
    for (int c = 0; c < 128; c++) {
      const char letter = char(is_ascii_upper(char(c)) ? c | 32 : c);
      const uint16_t flags = table_[uint32_t(c)];
      ascii_[c] = flags & (kSeparator | kWhite) ? ' ' : flags & kDecimal ? 0 : letter;
    }
  }
  // `out`: lower case, numbers as 0, words apart by one space, no marks.
  void write(std::string_view text, std::string& out) const {
    out.resize(text.size() + 1);
    size_t n = 0;
    char last = ' ';
    std::vector<uint32_t> parts;  // of a letter
    const char *p = text.data(), *end = p + text.size();
    const auto put = [&](char c) {
      out[n] = c;
      n += !(c == ' ' && last == ' ');
      last = c;
    };
    while (p < end) {
      const char c = uint8_t(*p) < 0x80 ? ascii_[uint8_t(*p)] : 0;
      if (c) {
        put(c);
        p++;
        continue;
      }
      const uint32_t character = next_character(p);
      const uint16_t flags = table_[character];
      if (flags & (kSeparator | kWhite)) {
        put(' ');
      } else if (flags & kDecimal) {
        p = number_end(p, end);
        put('0');
      } else {
        n = write_letter(character, parts, out, n, size_t(end - p));
        last = n > 0 ? out[n - 1] : ' ';
      }
    }
    if (n > 0 && out[n - 1] == ' ') n--;
    out.resize(n);
  }

 private:
  // Behind the digits at p, and behind one decimal separator with digits after it.
  const char* number_end(const char* p, const char* end) const {
    const auto skip_digits = [&](const char* q) {
      for (const char* next = q; q < end; q = next) {
        if (!(table_[next_character(next)] & kDecimal)) break;
      }
      return q;
    };
    p = skip_digits(p);
    if (p == end) return p;
    const char* next = p;
    const uint32_t c = next_character(next);
    if (c != '.' && c != ',' && c != 0x60C && c != 0x66B && (c < 0x2396 || c > 0x2398)) return p;
    const char* digits_end = skip_digits(next);
    return digits_end > next ? digits_end : p;
  }
  // Its lower case, decomposed, without marks (Mn), at out[n]; `rest`: bytes of text still to come.
  static size_t write_letter(uint32_t character, std::vector<uint32_t>& parts, std::string& out,
                             size_t n, size_t rest) {
    parts.clear();
    unicode::decompositions().append(lower_case(character), false, parts);
    const size_t needed = n + parts.size() * 4 + rest + 1;
    if (out.size() < needed) out.resize(needed);
    for (const uint32_t part : parts) {
      if (general_category(part) == Category::Mn) continue;
      n += size_t(encode_utf8(part, &out[n]));
    }
    return n;
  }

  const CharacterTable& table_ = character_table();
  char ascii_[128];
};

// One number for each 5 words in a row: a polynomial of the words' hashes, mixed.
void append_shingles(std::string_view normal, std::vector<uint64_t>& words,
                     std::vector<uint64_t>& shingles) {
  words.clear(), shingles.clear();
  for (const char *p = normal.data(), *end = p + normal.size(); p < end; p++) {
    const char* begin = p;
    while (p < end && *p != ' ') p++;
    words.push_back(hash_bytes(begin, size_t(p - begin)));
  }
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15;
  uint64_t power = 1;  // kFactor^5
  for (int i = 0; i < kShingleWords; i++) power *= kFactor;
  uint64_t sum = 0;
  for (size_t i = 0; i < words.size(); i++) {
    sum = sum * kFactor + words[i];
    if (i >= kShingleWords) sum -= words[i - kShingleWords] * power;
    if (i + 1 >= kShingleWords) shingles.push_back(mix64(sum));
  }
}

// Hash k of a shingle x is a[k] x + b[k] modulo 2^64, read as a signed number; a[k] is odd.
struct MinHashFactors {
  alignas(64) uint64_t a[kBands][kHashesPerBand], b[kBands][kHashesPerBand];
  MinHashFactors() {
    for (uint64_t band = 0; band < kBands; band++) {
      for (uint64_t k = 0; k < kHashesPerBand; k++) {
        a[band][k] = mix64(1, band, k) | 1;
        b[band][k] = mix64(2, band, k);
      }
    }
  }
};
const MinHashFactors& min_hash_factors() {
  static const MinHashFactors factors;
  return factors;
}

}  // namespace

std::string normal_form(std::string_view text) {
  static const NormalForm form;
  std::string out;
  form.write(text, out);
  return out;
}

std::vector<uint64_t> shingles(std::string_view text) {
  std::vector<uint64_t> words, found;
  append_shingles(normal_form(text), words, found);
  return found;
}

MinHashes min_hashes_plain(std::span<const uint64_t> shingles) {
  const MinHashFactors& factors = min_hash_factors();
  MinHashes minima;
  for (int band = 0; band < kBands; band++) {
    for (int k = 0; k < kHashesPerBand; k++) {
      int64_t minimum = std::numeric_limits<int64_t>::max();
      for (uint64_t x : shingles) {
        minimum = std::min(minimum, int64_t(factors.a[band][k] * x + factors.b[band][k]));
      }
      minima[size_t(band)][size_t(k)] = uint64_t(minimum);
    }
  }
  return minima;
}

// A band is one vector of 8 lanes: one register of AVX-512, two of AVX2. Two bands at a time keep
// their minima and factors in registers while the shingles pass.
MinHashes min_hashes(std::span<const uint64_t> shingles) {
  static_assert(kHashesPerBand == 8 && kBands % 2 == 0);
  typedef uint64_t Lanes __attribute__((vector_size(64)));
  typedef int64_t SignedLanes __attribute__((vector_size(64)));
  const MinHashFactors& factors = min_hash_factors();
  MinHashes minima;
  for (size_t band = 0; band < kBands; band += 2) {
    Lanes a[2], b[2], least[2];
    for (size_t i = 0; i < 2; i++) {
      std::memcpy(&a[i], factors.a[band + i], sizeof a[i]);
      std::memcpy(&b[i], factors.b[band + i], sizeof b[i]);
      least[i] = Lanes{} + uint64_t(std::numeric_limits<int64_t>::max());
    }
    for (uint64_t x : shingles) {
      for (size_t i = 0; i < 2; i++) {
        const Lanes h = a[i] * x + b[i];
        const SignedLanes less = SignedLanes(h) < SignedLanes(least[i]);
        least[i] = (h & Lanes(less)) | (least[i] & ~Lanes(less));
      }
    }
    for (size_t i = 0; i < 2; i++) std::memcpy(minima[band + i].data(), &least[i], sizeof least[i]);
  }
  return minima;
}

namespace {

// ---------------------------------------------------------------------------------------------
// Private data: e-mail addresses and public IP addresses become fixed ones, as in FineWeb. What
// looks like one and is none stays: version numbers, times, 999.1.1.1, private networks.

constexpr std::string_view kEmailPlaceholder = "email@example.com";
constexpr std::string_view kIpv4Placeholder = "22.214.171.124";
constexpr std::string_view kIpv6Placeholder = "2001:db8::1";  // of the range for documentation

bool is_public_ipv4(uint32_t address) {
  constexpr struct {
    uint32_t network;
    int bits;
  } kReserved[] = {
      {0x00000000, 8},  {0x0A000000, 8},  {0x64400000, 10}, {0x7F000000, 8},  {0xA9FE0000, 16},
      {0xAC100000, 12}, {0xC0000000, 24}, {0xC0000200, 24}, {0xC0A80000, 16}, {0xC6120000, 15},
      {0xC6336400, 24}, {0xCB007100, 24}, {0xE0000000, 4},  {0xF0000000, 4},
  };
  for (const auto& r : kReserved)
    if ((address ^ r.network) >> (32 - r.bits) == 0) return false;
  return true;
}

bool is_public_ipv6(const uint8_t* a) {                                            // 16 bytes
  if ((a[0] & 0xE0) != 0x20) return false;                                         // 2000::/3
  if (a[0] == 0x20 && a[1] == 0x01 && a[2] == 0x0D && a[3] == 0xB8) return false;  // documentation
  return !(a[0] == 0x20 && a[1] == 0x01 && a[2] < 2) &&                            // protocols
         !(a[0] == 0x3F && a[1] == 0xFF && a[2] < 0x10);                           // documentation
}

class PrivateData {
 public:
  PrivateData() {
    for (char c : std::string_view("!#$%&'*+/=?^_`{|}~-")) local_[uint8_t(c)] = true;
    for (int c = 0; c < 128; c++) {
      const bool alphanumeric = is_ascii_letter(char(c)) || is_ascii_digit(char(c));
      local_[c] = local_[c] || alphanumeric;
      word_[c] = alphanumeric || c == '_';
      hex_[c] =
          is_ascii_digit(char(c)) || ((c | 32) >= 'a' && (c | 32) <= 'f') || c == ':' || c == '.';
    }
    trigger_[uint8_t('@')] = trigger_[uint8_t('.')] = trigger_[uint8_t(':')] = true;
  }

  // The text with all replaced, appended to `out`; returns their number.
  int64_t replace(std::string_view text, std::string& out) const {
    int64_t replaced = 0;
    size_t copied = 0, ipv6_end = 0;
    for (size_t i = 0; i < text.size();) {
      const size_t block_end = std::min(i + kBlock, text.size());
      if (block_end < text.size() && !may_hold_address(text.data() + i)) {
        i = block_end;
        continue;
      }
      for (; i < block_end; i++) {
        if (!trigger_[uint8_t(text[i])]) continue;
        std::string_view found, placeholder;
        if (text[i] == '@') {
          found = email(text, i, copied), placeholder = kEmailPlaceholder;
        } else if (text[i] == '.') {
          found = ipv4(text, i, copied), placeholder = kIpv4Placeholder;
        } else if (i >= ipv6_end) {
          found = ipv6(text, i, copied, ipv6_end), placeholder = kIpv6Placeholder;
        }
        if (found.empty()) continue;
        const size_t begin = size_t(found.data() - text.data());
        out.append(text.substr(copied, begin - copied)).append(placeholder);
        copied = begin + found.size();
        i = std::max(i, copied - 1);
        replaced++;
      }
    }
    out.append(text.substr(copied));
    return replaced;
  }

 private:
  static constexpr size_t kBlock = 64;
  static bool may_hold_address(const char* block) {  // looks at one byte more than the block
    uint8_t found = 0;
    for (size_t k = 0; k < kBlock; k++) {
      const uint8_t c = uint8_t(block[k]), next = uint8_t(block[k + 1]);
      found |= (c == '@') | (c == ':') | ((c == '.') & (uint8_t(next - '0') < 10));
    }
    return found;
  }
  bool word(char c) const { return uint8_t(c) >= 0x80 || word_[uint8_t(c)]; }
  static bool alphanumeric(char c) { return is_ascii_letter(c) || is_ascii_digit(c); }

  // Around the @ at `i`, not before `least`.
  std::string_view email(std::string_view text, size_t i, size_t least) const {
    size_t begin = i;
    while (begin > least) {
      const char c = text[begin - 1];
      if (c == '.' ? begin == i || text[begin] == '.' : !local_[uint8_t(c)]) break;
      begin--;
    }
    while (begin < i && !alphanumeric(text[begin])) begin++;
    if (begin == i) return {};
    size_t end = i + 1, label = end, labels = 0;
    size_t good_end = 0;  // behind the last whole label
    bool letter = false;  // in the last whole label
    while (true) {
      bool has_letter = false;
      size_t last = end;  // behind the last letter or digit
      for (; end < text.size() && (alphanumeric(text[end]) || text[end] == '-'); end++) {
        has_letter |= is_ascii_letter(text[end]);
        if (text[end] != '-') last = end + 1;
      }
      if (last == label || text[label] == '-') break;
      labels++, good_end = last, letter = has_letter && last - label >= 2;
      if (last != end || end == text.size() || text[end] != '.') break;
      label = ++end;
    }
    return labels >= 2 && letter ? text.substr(begin, good_end - begin) : std::string_view();
  }

  // Whose first period is at `i`.
  std::string_view ipv4(std::string_view text, size_t i, size_t least) const {
    size_t begin = i;
    while (begin > least && is_ascii_digit(text[begin - 1]) && i - begin < 4) begin--;
    if (begin == i || i - begin > 3) return {};
    if (begin > 0) {
      const char c = text[begin - 1];
      if (word(c) || c == '.') return {};
      if (c == '-' && begin > 1 && word(text[begin - 2])) return {};
      if (follows_version(text.substr(0, begin))) return {};
    }
    uint32_t address = 0;
    size_t p = begin;
    for (int part = 0; part < 4; part++) {
      if (part > 0 && (p == text.size() || text[p++] != '.')) return {};
      const size_t first = p;
      uint32_t n = 0;
      while (p < text.size() && is_ascii_digit(text[p]) && p - first < 4) {
        n = n * 10 + uint32_t(text[p++] - '0');
      }
      const size_t digits = p - first;
      if (digits == 0 || digits > 3 || n > 255 || (digits > 1 && text[first] == '0')) return {};
      address = address << 8 | n;
    }
    if (p < text.size() && word(text[p])) return {};
    if (p + 1 < text.size() && text[p] == '.' && word(text[p + 1])) return {};
    return is_public_ipv4(address) ? text.substr(begin, p - begin) : std::string_view();
  }
  // "version 1.2.3.4", "Release: 1.2.3.4"
  static bool follows_version(std::string_view before) {
    size_t end = before.size();
    while (end > 0 && (before[end - 1] == ' ' || before[end - 1] == ':' || before[end - 1] == '.' ||
                       before[end - 1] == '='))
      end--;
    size_t begin = end;
    while (begin > 0 && is_ascii_letter(before[begin - 1]) && end - begin < 10) begin--;
    const std::string lower = lower_ascii(before.substr(begin, end - begin));
    for (std::string_view name : {"v", "ver", "version", "versions", "release", "build", "firmware",
                                  "section", "chapter", "figure", "table"})
      if (lower == name) return true;
    return false;
  }

  // Around the : at `i`. `looked_until`: the end of the digits, letters, colons and periods there.
  std::string_view ipv6(std::string_view text, size_t i, size_t least, size_t& looked_until) const {
    size_t begin = i, end = i;
    const auto hex = [&](size_t k) { return uint8_t(text[k]) < 128 && hex_[uint8_t(text[k])]; };
    while (begin > least && hex(begin - 1)) begin--;
    while (end < text.size() && hex(end)) end++;
    looked_until = end;
    if (begin > 0 && word(text[begin - 1])) return {};
    if (end < text.size() && word(text[end])) return {};
    const auto stray = [&] {  // of the sentence: a period, or one colon
      return text[end - 1] == '.' || (text[end - 1] == ':' && text[end - 2] != ':');
    };
    while (end - begin >= 2 && stray()) end--;
    if (end - begin < 4 || end - begin > 45) return {};
    uint8_t address[16];
    const std::string copy(text.substr(begin, end - begin));
    if (inet_pton(AF_INET6, copy.c_str(), address) != 1 || !is_public_ipv6(address)) return {};
    return text.substr(begin, end - begin);
  }

  bool local_[256] = {}, word_[256] = {}, hex_[256] = {}, trigger_[256] = {};
};

}  // namespace

int64_t replace_private_data(std::string_view text, std::string& out) {
  static const PrivateData replacer;
  return replacer.replace(text, out);
}

std::vector<std::string_view> split_words(std::string_view text) {
  WordSplitter splitter;
  std::vector<std::string_view> words;
  splitter.split(text, [&](const char* begin, const char* end) {
    words.push_back({begin, size_t(end - begin)});
  });
  return words;
}

// ---------------------------------------------------------------------------------------------
// Measurer

namespace {

// What a first look over the bytes says: what is not there need not be looked for again.
struct TextFeatures {
  bool ascii = true;            // no byte of 0x80 or more
  bool unusual_breaks = false;  // line breaks that are not \n
  bool dots = false;            // two periods in a row, or a byte of the ellipsis
  bool phrases = false;         // three letters in a row that begin or end one of C4's phrases
  size_t hashes = 0, brackets = 0, braces = 0;  // # [ {
};

TextFeatures text_features(std::string_view text) {
  TextFeatures f;
  constexpr size_t kBlock = 128;
  uint8_t block[kBlock + 2], lower[kBlock + 2];
  for (size_t i = 0; i < text.size(); i += kBlock) {
    const size_t n = std::min(text.size() - i, kBlock + 2);
    std::memcpy(block, text.data() + i, n);
    if (n < kBlock + 2) std::memset(block + n, ' ', kBlock + 2 - n);
    for (size_t k = 0; k < kBlock + 2; k++) lower[k] = block[k] | 32;
    uint8_t bits = 0, breaks = 0, dots = 0, phrases = 0, hashes = 0, brackets = 0, braces = 0;
    for (size_t k = 0; k < kBlock; k++) {
      const uint8_t c = block[k], l = lower[k], m = lower[k + 1], n3 = lower[k + 2];
      bits |= c;
      breaks |= (uint8_t(c - 11) < 3) | (uint8_t(c - 0x1C) < 3) | (c == 0xC2) | (c == 0xE2);
      dots |= ((c == '.') & (block[k + 1] == '.')) | (c == 0xE2);
      phrases |= ((l == 'j') & (m == 'a') & (n3 == 'v')) | ((l == 'i') & (m == 'p') & (n3 == 's')) |
                 ((l == 'v') & (m == 'a') & (n3 == 'c')) | ((l == 'k') & (m == 'i') & (n3 == 'e')) |
                 ((l == 'f') & (m == ' ') & (n3 == 'u'));
      hashes += c == '#', brackets += c == '[', braces += c == '{';
    }
    f.ascii &= bits < 0x80;
    f.unusual_breaks |= breaks != 0, f.dots |= dots != 0, f.phrases |= phrases != 0;
    f.hashes += hashes, f.brackets += brackets, f.braces += braces;
  }
  return f;
}

struct TextLine {
  std::string_view text;  // without its break and without white space at its ends
  size_t words_begin, words_end;
  WordSplitter::Chunks chunks;
};

struct MeasurerLists {  // read once, shared by all threads
  explicit MeasurerLists(const MeasureOptions& o) : options(o), urls(o) {
    for (const std::string& code : o.languages) {
      if (code.empty()) fail("languages: found an empty code, expected one such as \"en\"");
    }
    if (!o.decontaminate.empty()) contamination.emplace(o.decontaminate);
    if (!o.quality_model.empty()) quality = QualityModel::load(o.quality_model);
  }
  bool wants(std::string_view code) const {
    for (const std::string& wanted : options.languages)
      if (current_code(wanted) == code) return true;
    return false;
  }
  MeasureOptions options;
  UrlLists urls;
  std::optional<Contamination> contamination;
  std::optional<QualityModel> quality;
};

// 0 of nothing.
double share_of(double part, double whole) { return whole > 0 ? part / whole : 0; }

size_t count_of(std::string_view text, std::string_view part) {  // that do not overlap
  size_t n = 0;
  for (size_t i = text.find(part); i != text.npos; i = text.find(part, i + part.size())) n++;
  return n;
}

}  // namespace

struct Measurer::State {
  explicit State(std::shared_ptr<const MeasurerLists> lists_) : lists(std::move(lists_)) {}

  std::shared_ptr<const MeasurerLists> lists;
  const CharacterTable& table = character_table();

  // Of the document that is measured, kept to be used again.
  std::string repaired, sample, kept, lower, line_without_citations;
  TextFeatures features;
  WordSplitter splitter;
  WordTable words;
  std::vector<uint32_t> ids;  // of all words in order
  std::vector<TextLine> lines;
  DuplicateFinder duplicates;
  RepeatedNgrams ngrams;
  NormalForm form;
  std::string normal;
  std::vector<uint64_t> word_hashes, shingle_hashes;

  void measure(std::string_view text, std::string_view url, Measured& out) {
    if (text.size() >= std::numeric_limits<uint32_t>::max()) {
      fail("rules: found a text of ", bytes_text(double(text.size())), ", expected less than 4 GB");
    }
    if (!simdjson::validate_utf8(text.data(), text.size())) {
      repaired.clear();
      repair_utf8(text, &repaired);
      text = repaired;
    }
    out.values.assign(MeasureOf::count, kOff);
    out.match.clear();
    double* values = out.values.data();
    lists->urls.measure(url, values, out.match);
    measure_language(text, values, out.language);
    scan(text);
    const size_t characters = features.ascii ? text.size() : count_characters(text);
    values[MeasureOf::characters] = double(characters);
    measure_repetition(text, characters, values);
    measure_gopher_quality(text, values);
    const size_t kept_words = measure_c4(values);
    const std::string_view kept_text = lists->options.c4_lines ? strip_white(kept, table) : text;
    measure_fineweb(kept_text, lists->options.c4_lines ? kept_words : ids.size(), values);
    if (lists->contamination) {
      const Contamination::Match match = lists->contamination->find(kept_text);
      values[MeasureOf::contamination] = double(match.ngrams);
      if (out.match.empty()) out.match = match.example;
    }
    if (lists->quality) values[MeasureOf::quality] = lists->quality->score(kept_text);
    out.signature = {};
    if (lists->options.signatures) sign(kept_text, out.signature);
    out.text.clear();
    out.private_data = 0;
    if (lists->options.private_data) {
      out.private_data = replace_private_data(kept_text, out.text);
    } else {
      out.text = kept_text;
    }
  }

  void measure_language(std::string_view text, double* values, std::string& language) {
    language = "un";
    if (!lists->options.detect_language) return;
    const LanguageShares shares = language_shares(language_sample(text, sample));
    language = shares.code[0];
    if (lists->options.languages.empty()) {  // any: the largest share
      values[MeasureOf::language_share] = shares.share[0];
      return;
    }
    double wanted = 0;
    for (int i = 0; i < 3; i++)
      if (lists->wants(shares.code[i])) wanted += shares.share[i];
    values[MeasureOf::language_share] = std::min(wanted, 1.);
  }

  // The lines and the words of the text.
  void scan(std::string_view text) {
    features = text_features(text);
    words.reset(text.size());
    ids.clear(), lines.clear();
    for (const char *p = text.data(), *end = p + text.size(); p < end;) {
      const char *line_end = p, *next = end;
      find_break(p, end, line_end, next);
      const size_t begin = ids.size();
      const std::string_view line(p, size_t(line_end - p));
      const auto chunks = splitter.split(line, [&](const char* word, const char* word_end) {
        ids.push_back(words.intern(word, word_end));
      });
      lines.push_back({strip_white(line, table), begin, ids.size(), chunks});
      p = next;
    }
  }

  // The first line break, from where it begins to where the next line begins.
  void find_break(const char* p, const char* end, const char*& begin, const char*& next) const {
    if (!features.unusual_breaks) {
      const void* newline = std::memchr(p, '\n', size_t(end - p));
      begin = newline ? static_cast<const char*>(newline) : end;
      next = newline ? begin + 1 : end;
      return;
    }
    for (next = p; next < end;) {
      begin = next;
      const uint32_t c = next_character(next);
      if (!(table[c] & kLineBreak)) continue;
      if (c == '\r' && next < end && *next == '\n') next++;
      return;
    }
    begin = end;
  }

  void measure_repetition(std::string_view text, size_t characters, double* values) {
    // Lines and paragraphs as they are between newlines, with their white space.
    const auto pieces = [&](std::string_view all, int newlines) {
      for (size_t begin = 0;;) {
        size_t end = all.find('\n', begin), next = end;
        while (end != all.npos) {
          for (next = end; next < all.size() && all[next] == '\n';) next++;
          if (next - end >= size_t(newlines)) break;
          end = all.find('\n', next);
        }
        duplicates.add(all.substr(begin, end - begin));
        if (end == all.npos) break;
        begin = next;
      }
      const size_t number = duplicates.size();
      return std::pair(number, duplicates.find());
    };
    const auto [paragraphs, duplicate_paragraphs] = pieces(strip_white(text, table), 2);
    values[MeasureOf::duplicate_paragraphs] =
        share_of(double(duplicate_paragraphs.number), double(paragraphs));
    values[MeasureOf::duplicate_paragraph_characters] =
        share_of(double(duplicate_paragraphs.characters), double(characters));
    const auto [lines_number, duplicate_lines] = pieces(text, 1);
    values[MeasureOf::duplicate_lines] =
        share_of(double(duplicate_lines.number), double(lines_number));
    values[MeasureOf::duplicate_line_characters] =
        share_of(double(duplicate_lines.characters), double(characters));

    ngrams.find(ids, words.words());
    for (int n = 2; n <= 4; n++) {
      values[MeasureOf::top_2gram + n - 2] = share_of(double(ngrams.top[n]), double(characters));
    }
    for (int n = 5; n <= 10; n++) {
      values[MeasureOf::duplicate_5gram + n - 5] =
          share_of(double(ngrams.repeated[n]), double(characters));
    }
  }

  void measure_gopher_quality(std::string_view text, double* values) {
    size_t proper_words = 0, proper_characters = 0, alphabetic = 0;
    for (const TableWord& word : words.words()) {
      if (!(word.all & kNoWord)) {
        proper_words += word.number;
        proper_characters += size_t(word.number) * word.characters;
      }
      if (word.any & kAlphabetic) alphabetic += word.number;
    }
    const double all_words = double(ids.size());
    values[MeasureOf::words] = double(proper_words);
    values[MeasureOf::mean_word_length] = share_of(double(proper_characters), double(proper_words));
    values[MeasureOf::hashes] = share_of(double(features.hashes), all_words);
    const size_t ellipses =
        features.dots ? count_of(text, "...") + count_of(text, "\xE2\x80\xA6") : 0;
    values[MeasureOf::ellipses] = share_of(double(ellipses), all_words);
    size_t bullets = 0, ellipsis_ends = 0;
    for (const TextLine& line : lines) {
      bullets += line.text.starts_with("-") || line.text.starts_with("\xE2\x80\xA2");
      ellipsis_ends += line.text.ends_with("...") || line.text.ends_with("\xE2\x80\xA6");
    }
    values[MeasureOf::bullet_lines] = share_of(double(bullets), double(lines.size()));
    values[MeasureOf::ellipsis_lines] = share_of(double(ellipsis_ends), double(lines.size()));
    values[MeasureOf::alphabetic_words] = share_of(double(alphabetic), all_words);
    values[MeasureOf::stop_words] = 0;
    for (std::string_view word : kGopherStopWords)
      values[MeasureOf::stop_words] += words.contains(word);
  }

  // Writes `kept`; returns the number of its words.
  size_t measure_c4(double* values) {
    const MeasureOptions& o = lists->options;
    size_t long_words = 0, few_words = 0, javascript = 0, policy = 0, lorem = 0, braces = 0;
    size_t sentences = 0, kept_words = 0;
    kept.clear();
    for (const TextLine& line : lines) {
      if (has_long_word(line)) {
        long_words++;
        continue;
      }
      std::string_view text = line.text;
      if (features.brackets > 0 && text.find('[') != text.npos) {
        line_without_citations.clear();
        append_without_citations(text, line_without_citations);
        text = line_without_citations;
      }
      if (line.chunks.number < size_t(std::max(o.min_line_words, 0))) {
        few_words++;
        continue;
      }
      if (features.phrases) {
        lower.assign(text);
        for (char& c : lower) c = char(is_ascii_upper(c) ? c | 32 : c);
        lorem += lower.find("lorem ipsum") != lower.npos;
        if (lower.find("javascript") != lower.npos) {
          javascript++;
          continue;
        }
      }
      braces += features.braces > 0 && text.find('{') != text.npos;
      if (features.phrases && has_policy_phrase(lower)) {
        policy++;
        continue;
      }
      SentenceCounter counter;
      if (text.size() == line.text.size()) {
        kept_words += line.words_end - line.words_begin;
        for (size_t i = line.words_begin; i < line.words_end; i++)
          counter.add(words.words()[ids[i]].all);
      } else {
        splitter.split(text, [&](const char* begin, const char* end) {
          kept_words++;
          counter.add(word_flags(begin, end));
        });
      }
      sentences += counter.sentences();
      if (!kept.empty()) kept += '\n';
      kept += text;
    }
    const double number = double(lines.size());
    values[MeasureOf::long_word_lines] = share_of(double(long_words), number);
    values[MeasureOf::few_word_lines] = share_of(double(few_words), number);
    values[MeasureOf::javascript_lines] = share_of(double(javascript), number);
    values[MeasureOf::policy_lines] = share_of(double(policy), number);
    values[MeasureOf::lorem_ipsum_lines] = double(lorem);
    values[MeasureOf::curly_bracket_lines] = double(braces);
    values[MeasureOf::sentences] = double(sentences);
    return kept_words;
  }
  uint16_t word_flags(const char* begin, const char* end) const {
    uint16_t all = 0xFFFF;
    size_t characters = 0;
    for (const char* p = begin; p < end; characters++) all &= table[next_character(p)];
    return characters > 1 ? uint16_t(all & ~kSentenceEnd) : all;
  }
  static bool has_policy_phrase(std::string_view lower_line) {
    for (std::string_view phrase : kPolicyPhrases)
      if (lower_line.find(phrase) != lower_line.npos) return true;
    return false;
  }
  bool has_long_word(const TextLine& line) const {
    const int most = lists->options.max_word_characters;
    if (most < 0 || line.chunks.longest <= size_t(most)) return false;
    size_t characters = 0;
    const char *p = line.text.data(), *end = p + line.text.size();
    while (p < end) {
      characters = table[next_character(p)] & kWhite ? 0 : characters + 1;
      if (characters > size_t(most)) return true;
    }
    return false;
  }

  void measure_fineweb(std::string_view text, size_t all_words, double* values) {
    constexpr size_t kShortLine = 30;  // characters
    size_t number = 0, stops = 0, short_lines = 0, newlines = 0;
    for (size_t begin = 0; begin <= text.size();) {
      const size_t end = std::min(text.find('\n', begin), text.size());
      const std::string_view line = text.substr(begin, end - begin);
      newlines += end < text.size();
      begin = end + 1;
      if (strip_white(line, table).empty()) continue;
      number++;
      const char* p = line.data() + line.size();
      stops += (table[previous_character(p)] & kStopCharacter) != 0;
      short_lines += line.size() <= kShortLine ||
                     (line.size() <= kShortLine * 4 && count_characters(line) <= kShortLine);
      duplicates.add(line);
    }
    const size_t characters = features.ascii ? text.size() : count_characters(text);
    values[MeasureOf::stop_character_lines] = share_of(double(stops), double(number));
    values[MeasureOf::short_lines] = share_of(double(short_lines), double(number));
    values[MeasureOf::duplicate_characters] =
        share_of(double(duplicates.find().characters), double(characters - newlines));
    values[MeasureOf::newlines] = share_of(double(newlines), double(all_words));
  }

  void sign(std::string_view text, Signature& signature) {
    const XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
    signature.text_hash = {hash.low64, hash.high64};
    form.write(text, normal);
    append_shingles(normal, word_hashes, shingle_hashes);
    signature.has_bands = !shingle_hashes.empty();
    if (!signature.has_bands) return;
    const MinHashes minima = min_hashes(shingle_hashes);
    for (size_t band = 0; band < kBands; band++) {
      signature.band_hashes[band] = XXH3_64bits(minima[band].data(), sizeof minima[band]);
    }
  }
};

Measurer::Measurer(const MeasureOptions& options)
    : state_(std::make_unique<State>(std::make_shared<const MeasurerLists>(options))) {}
Measurer::Measurer(const Measurer& other) : state_(std::make_unique<State>(other.state_->lists)) {}
Measurer::Measurer(Measurer&&) noexcept = default;
Measurer::~Measurer() = default;
void Measurer::measure(std::string_view text, std::string_view url, Measured& out) {
  state_->measure(text, url, out);
}

}  // namespace cake::corpus
