// Part of ./bpe: regular expressions that cut text into pieces. The interface is
// cake/split_regex.h.
//
//     regex -> tree (RegexParser) -> instructions -> automaton (RegexCompiler)
//     text -> pieces (RegexScanner)
//
// What an expression means is what Hugging Face's tokenizers make of it with Oniguruma:
//
//     characters   x  .  \n \r \t \f \v \a \e  \xHH \x{H...} \uHHHH  \ before a punctuation mark
//     classes      [a-z]  [^...]  nested [a[bc]]  intersections [\p{L}&&[^\p{Han}]]
//                  \s \S (White_Space)  \d \D (Nd)  \w \W
//                  \p{X} \P{X} \p{^X}: the general categories, and Han
//     repetition   * + ? {n} {n,} {n,m} {,m}, lazy *? +? ?? {n,m}?, possessive *+ ++ ?+
//     groups       (...)  (?:...)  (?i:...) and (?i) at the begin of a group, over ASCII letters
//                  (?>...) and possessive repetition: of one class, or at the end of the expression
//     look-ahead   (?=...) (?!...) at one character; $ (end of a line), \z (end of the text)
//
// Everything else is refused: back-references, look-behind, word borders, further look-ahead, other
// properties, repetition of what can match nothing, other flags. So are expressions whose automaton
// has more than 10,000 states.
//
// Instructions are Thompson's (1968), with threads in order of priority as in Pike's machine. The
// state of the automaton is that ordered list, cut off behind a match: so the first match in the
// order of the alternatives wins, not the longest. Look-ahead costs nothing: instructions that ask
// for the next character wait until the automaton steps over it.
//
// Two things need care. A scan must run on behind its match until no thread is alive, so that
// successive matches can take quadratic time (a|a*b in a text of a's); RegexScanner bounds it after
// Reps, "Maximal munch" tokenization in linear time (1998). And possessive repetition is no regular
// operation, but over one class it is a look-ahead: C++ is C+(?!C).
#include "cake/split_regex.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cake/run.h"
#include "cake/unicode.h"

namespace cake {
namespace {

// ---------------------------------------------------------------------------------------------
// Sets of code points. kInvalid stands for all bytes that are not UTF-8.

class CodeSet {
 public:
  struct Range {
    uint32_t begin, last;
    auto operator<=>(const Range&) const = default;
  };
  CodeSet() = default;
  CodeSet(std::initializer_list<Range> ranges) {
    for (const Range& r : ranges) add(r.begin, r.last);
  }
  auto operator<=>(const CodeSet&) const = default;

  const std::vector<Range>& ranges() const { return ranges_; }  // sorted, not adjacent
  bool empty() const { return ranges_.empty(); }
  bool has(uint32_t c) const {
    const auto it = std::partition_point(ranges_.begin(), ranges_.end(),
                                         [&](const Range& r) { return r.last < c; });
    return it != ranges_.end() && it->begin <= c;
  }

  void add(uint32_t begin, uint32_t last) {
    const auto overlapping =  // or adjacent
        std::partition_point(ranges_.begin(), ranges_.end(),
                             [&](const Range& r) { return r.last + 1 < begin; });
    auto behind = overlapping;
    for (; behind != ranges_.end() && behind->begin <= last + 1; behind++) {
      begin = std::min(begin, behind->begin), last = std::max(last, behind->last);
    }
    ranges_.insert(ranges_.erase(overlapping, behind), {begin, last});
  }
  void add(const CodeSet& other) {
    for (const Range& r : other.ranges_) add(r.begin, r.last);
  }
  CodeSet complement() const {
    CodeSet out;
    uint32_t begin = 0;
    for (const Range& r : ranges_) {
      if (r.begin > begin) out.ranges_.push_back({begin, r.begin - 1});
      begin = r.last + 1;
    }
    if (begin <= kInvalid) out.ranges_.push_back({begin, kInvalid});
    return out;
  }
  CodeSet intersection(const CodeSet& other) const {
    CodeSet either = complement();
    either.add(other.complement());
    return either.complement();
  }

 private:
  std::vector<Range> ranges_;
};

// ---------------------------------------------------------------------------------------------
// Classes by name

constexpr CodeSet::Range kEverything = {0, kInvalid};

template <class Has>
CodeSet set_of(Has&& has) {
  CodeSet out;
  for (uint32_t begin = 0; begin < kInvalid; begin++) {
    if (!has(begin)) continue;
    uint32_t last = begin;
    while (last + 1 < kInvalid && has(last + 1)) last++;
    out.add(begin, last);
    begin = last;
  }
  return out;
}

// By name: Lu, Ll, ..., and L, M, ...: their unions.
const std::map<std::string, CodeSet>& categories() {
  static const std::map<std::string, CodeSet> sets = [] {
    static constexpr const char* kNames[] = {
        // in the order of Category
        "Cn", "Cc", "Cf", "Co", "Cs", "Lu", "Lt", "Ll", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl",
        "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp"};
    static_assert(std::size(kNames) == size_t(Category::Zp) + 1);
    std::map<std::string, CodeSet> out;
    uint32_t begin = 0;
    for (uint32_t c = 1; c <= kInvalid; c++) {
      if (c < kInvalid && general_category(c) == general_category(begin)) continue;
      const std::string name = kNames[size_t(general_category(begin))];
      for (const std::string& set : {name, name.substr(0, 1)}) out[set].add(begin, c - 1);
      begin = c;
    }
    return out;
  }();
  return sets;
}
const CodeSet& category(const std::string& name) { return categories().at(name); }

const CodeSet& white_space() {
  static const CodeSet set = set_of(is_white_space);
  return set;
}
const CodeSet& han() {
  static const CodeSet set = set_of(is_han);
  return set;
}

// \w of Oniguruma: letters, marks, Nd, Nl, Pc and letters in circles; outside of [...] also the
// other numbers that Latin-1 has.
const CodeSet& word_characters(bool in_brackets) {
  static const CodeSet inside = [] {
    CodeSet out = {{0x24B6, 0x24E9}, {0x1F130, 0x1F149}, {0x1F150, 0x1F169}, {0x1F170, 0x1F189}};
    for (const char* name : {"L", "M", "Nd", "Nl", "Pc"}) out.add(category(name));
    return out;
  }();
  static const CodeSet outside = [] {
    CodeSet out = {{0xB2, 0xB3}, {0xB9, 0xB9}, {0xBC, 0xBE}};
    out.add(inside);
    return out;
  }();
  return in_brackets ? inside : outside;
}

// The characters beyond ASCII that differ in case from another, and some more.
const std::vector<CodeSet>& cased_beyond_ascii() {
  static const std::vector<CodeSet> sets = [] {
    CodeSet letters = category("L");
    letters.add(category("M"));
    CodeSet plain = {{0, 0x7F}, {0x17F, 0x17F}, {0x212A, 0x212A}};  // what (?i) knows
    return std::vector<CodeSet>{letters.intersection(plain.complement()),
                                {{0x2160, 0x2188}},  // Roman numerals
                                {{0x24B6, 0x24E9}}};
  }();
  return sets;
}

// The set that (?i) makes of it, or nothing where that takes more than ASCII.
std::optional<CodeSet> in_any_case(CodeSet set) {
  for (uint32_t lower = 'a'; lower <= 'z'; lower++) {
    const uint32_t upper = lower - 32;
    const uint32_t third = lower == 's' ? 0x17F : lower == 'k' ? 0x212A : lower;
    if (!set.has(lower) && !set.has(upper) && !set.has(third)) continue;
    for (const uint32_t c : {lower, upper, third}) set.add(c, c);
  }
  for (const CodeSet& cased : cased_beyond_ascii()) {
    const CodeSet common = set.intersection(cased);
    if (!common.empty() && common != cased) return std::nullopt;
  }
  return set;
}

// ---------------------------------------------------------------------------------------------
// The tree of an expression

struct Node {
  enum class Kind { empty, set, look, sequence, choice, repeat, atomic };
  Kind kind = Kind::empty;
  CodeSet set;       // of kind set; of kind look: what the next character must be in
  bool end = false;  // of kind look: or the text ends
  std::vector<Node> parts;
  int min = 0, max = 0;  // of kind repeat; max -1: without bound
  bool greedy = true;
  size_t offset = 0;  // in the expression
  bool matches_empty = true;
};

// For errors: one line, not too long.
std::string printable(std::string_view regex) {
  constexpr size_t kMaxShown = 200;
  std::string out;
  for (const char c : regex.substr(0, kMaxShown)) {
    static constexpr char kDigits[] = "0123456789ABCDEF";
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte != 0x7F) {
      out += c;
    } else {
      out += std::string("\\x") + kDigits[byte >> 4] + kDigits[byte & 15];
    }
  }
  return regex.size() > kMaxShown ? out + "..." : out;
}

constexpr int kMaxDepth = 100, kMaxRepeat = 1000;
constexpr size_t kMaxBytes = 10'000;

class RegexParser {
 public:
  explicit RegexParser(const std::string& regex, bool possessive_counts = false)
      : regex_(regex), possessive_counts_(possessive_counts) {}

  Node parse() {
    if (regex_.size() > kMaxBytes) {
      fail("pre_tokenizer: found a regular expression of ", regex_.size(), " bytes, expected ",
           kMaxBytes, " at most");
    }
    Node node = choice(false, 0);
    if (!done()) refuse(offset_, ")", "( before it");
    return node;
  }

  // What tiktoken reads in another way than Oniguruma.
  struct Count {
    size_t begin, plus;  // of a possessive {n,m}+: where what it repeats begins, and its plus
  };
  const std::vector<Count>& possessive_counts() const { return counts_; }
  const std::vector<size_t>& dollars() const { return dollars_; }

 private:
  [[noreturn]] void refuse(size_t offset, const std::string& found, const char* expected) const {
    fail("pre_tokenizer: regular expression ", printable(regex_), ": byte ", offset, ": found ",
         printable(found), ", expected ", expected);
  }

  bool done() const { return offset_ >= regex_.size(); }
  char peek(size_t ahead = 0) const {
    return offset_ + ahead < regex_.size() ? regex_[offset_ + ahead] : '\0';
  }
  bool starts_with(std::string_view text) const {
    return std::string_view(regex_).substr(offset_).starts_with(text);
  }
  bool skip(std::string_view text) {
    if (!starts_with(text)) return false;
    offset_ += text.size();
    return true;
  }
  uint32_t character() {
    if (done()) refuse(offset_, "the end", "a character");
    const CodePoint c = decode_utf8(regex_.data() + offset_, regex_.size() - offset_);
    if (c.code >= kInvalid) refuse(offset_, "a byte that is not UTF-8", "UTF-8");
    offset_ += size_t(c.bytes);
    return c.code;
  }
  std::string rest(size_t offset, size_t bytes = 12) const {  // for errors, whole characters
    size_t end = std::min(regex_.size(), offset + bytes);
    while (end < regex_.size() && (regex_[end] & 0xC0) == 0x80) end++;
    return regex_.substr(offset, end - offset);
  }

  Node choice(bool any_case, int depth) {
    if (depth > kMaxDepth) refuse(offset_, rest(offset_), "groups at most 100 deep");
    if (skip("(?i)")) any_case = true;
    Node out{.kind = Node::Kind::choice, .offset = offset_, .matches_empty = false};
    do {
      out.parts.push_back(sequence(any_case, depth));
      out.matches_empty |= out.parts.back().matches_empty;
    } while (skip("|"));
    return out.parts.size() == 1 ? std::move(out.parts[0]) : out;
  }

  Node sequence(bool any_case, int depth) {
    Node out{.kind = Node::Kind::sequence, .offset = offset_};
    char letter = '\0';  // the last part, if it is an ASCII letter that (?i) holds for
    while (!done() && peek() != '|' && peek() != ')') {
      const size_t begin = offset_;
      Node part = atom(any_case, depth);
      const bool plain = any_case && offset_ == begin + 1;  // one ASCII character
      const char next = plain ? char(regex_[begin] | 32) : '\0';
      refuse_folded(letter, next, begin);
      letter = next;
      for (int n = 0; repetition(part, begin); n++) {
        if (n == kMaxDepth) refuse(offset_, rest(offset_), "at most 100 quantifiers in a row");
        letter = '\0';
      }
      out.matches_empty &= part.matches_empty;
      out.parts.push_back(std::move(part));
    }
    return out.parts.size() == 1 ? std::move(out.parts[0]) : out;
  }

  // Oniguruma also matches one character with several letters, such as a sharp s with (?i:ss).
  void refuse_folded(char a, char b, size_t begin) const {
    for (const char* pair : {"ss", "ff", "fi", "fl", "st"}) {
      if (a == pair[0] && b == pair[1]) {
        refuse(begin - 1, concat(pair, " under (?i)"), "letters that no single character equals");
      }
    }
  }

  // Wraps `part` in the quantifier that follows. False: none follows.
  bool repetition(Node& part, size_t begin) {
    const size_t offset = offset_;
    int min = 0, max = -1;
    const bool counted = peek() == '{';
    if (counted) {
      if (!count(min, max)) return false;
    } else if (skip("?")) {
      max = 1;
    } else if (skip("+")) {
      min = 1;
    } else if (!skip("*")) {
      return false;
    }
    if (part.kind == Node::Kind::look) {
      refuse(offset, rest(offset), "no repetition of look-ahead");
    }
    if (part.matches_empty && max != 0 && max != 1) {
      refuse(begin, rest(begin), "no repetition of what can match nothing");
    }
    const bool lazy = peek() == '?', possessive = peek() == '+' && (!counted || possessive_counts_);
    if (counted && lazy && min == max) refuse(offset, rest(offset), "no lazy {n}");
    if (counted && possessive) counts_.push_back({begin, offset_});
    offset_ += lazy || possessive;
    Node node{.kind = Node::Kind::repeat, .min = min, .max = max, .greedy = !lazy, .offset = begin};
    node.matches_empty = min == 0 || part.matches_empty;
    node.parts.push_back(std::move(part));
    part = possessive ? atomic(std::move(node), begin) : std::move(node);
    return true;
  }

  // {n}, {n,}, {n,m} or {,m}; everything else is the character {.
  bool count(int& min, int& max) {
    const size_t begin = offset_;
    const auto number = [&](int& n) {
      const size_t digits = offset_;
      int64_t value = 0;
      for (; peek() >= '0' && peek() <= '9'; offset_++) {
        value = std::min<int64_t>(value * 10 + (peek() - '0'), 1 << 20);
      }
      if (offset_ > digits) n = int(value);
      return offset_ > digits;
    };
    offset_++;
    const bool low = number(min);
    bool high = false;
    if (skip(",")) {
      high = number(max);
    } else {
      max = min;
    }
    if ((!low && !high) || !skip("}")) return offset_ = begin, false;
    if (min > kMaxRepeat || max > kMaxRepeat) {
      refuse(begin, rest(begin), "at most 1000 repetitions");
    }
    if (max >= 0 && max < min) refuse(begin, rest(begin), "{n,m} with n at most m");
    return true;
  }

  static Node atomic(Node part, size_t begin) {
    Node out{.kind = Node::Kind::atomic, .offset = begin};
    out.matches_empty = part.matches_empty;
    out.parts.push_back(std::move(part));
    return out;
  }
  static Node set_node(CodeSet set, size_t offset) {
    Node out{.kind = Node::Kind::set, .set = std::move(set), .offset = offset};
    out.matches_empty = false;
    return out;
  }
  static Node look(CodeSet set, bool end, size_t offset) {
    return {.kind = Node::Kind::look, .set = std::move(set), .end = end, .offset = offset};
  }

  Node atom(bool any_case, int depth) {
    const size_t begin = offset_;
    if (peek() == '(') return group(any_case, depth);
    if (peek() == '[') return set_node(bracket(any_case, depth), begin);
    if (peek() == '$') dollars_.push_back(begin);
    if (skip("$")) return look({{'\n', '\n'}}, true, begin);
    if (skip("\\z")) return look({}, true, begin);
    if (skip(".")) return set_node(CodeSet{{'\n', '\n'}}.complement(), begin);
    if (std::string_view("*+?^").find(peek()) != std::string_view::npos && !done()) {
      refuse(begin, rest(begin, 1), "a character, a class or a group");
    }
    if (peek() == '\\') return set_node(escape(any_case, false), begin);
    const uint32_t c = character();
    return set_node(cased({{c, c}}, any_case, begin), begin);
  }

  CodeSet cased(CodeSet set, bool any_case, size_t begin) const {
    if (!any_case) return set;
    std::optional<CodeSet> out = in_any_case(std::move(set));
    if (!out) refuse(begin, rest(begin), "no letters beyond ASCII under (?i)");
    return *out;
  }

  Node group(bool any_case, int depth) {
    const size_t begin = offset_++;
    enum { plain, atomic_group, ahead, not_ahead } kind = plain;
    if (skip("?:")) {
    } else if (skip("?i:")) {
      any_case = true;
    } else if (skip("?-i:")) {
      any_case = false;
    } else if (skip("?>")) {
      kind = atomic_group;
    } else if (skip("?=")) {
      kind = ahead;
    } else if (skip("?!")) {
      kind = not_ahead;
    } else if (peek() == '?' || peek() == '*') {
      refuse(begin, rest(begin, 4), "(...), (?:...), (?i:...), (?>...), (?=...) or (?!...)");
    }
    Node inner = choice(any_case, depth + 1);
    if (!skip(")")) refuse(offset_, "the end", ")");
    if (kind == atomic_group) return atomic(std::move(inner), begin);
    if (kind == plain) return inner;
    CodeSet set;
    bool end = false;
    if (!add_one_character(inner, set, end)) {
      refuse(begin, rest(begin), "look-ahead at one character");
    }
    if (kind == not_ahead) set = set.complement(), end = !end;
    return look(std::move(set), end, begin);
  }

  // Adds what the next character may be. False: the tree looks at more than one, or at none.
  static bool add_one_character(const Node& node, CodeSet& set, bool& end) {
    if (node.kind == Node::Kind::choice) {
      return std::all_of(node.parts.begin(), node.parts.end(),
                         [&](const Node& part) { return add_one_character(part, set, end); });
    }
    if (node.kind != Node::Kind::set && node.kind != Node::Kind::look) return false;
    set.add(node.set), end |= node.end;
    return true;
  }

  // ---- classes

  static bool names_class(char c) {  // behind a backslash
    return c != '\0' && std::string_view("dDsSwWpP").find(c) != std::string_view::npos;
  }

  // What a backslash begins.
  CodeSet escape(bool any_case, bool in_brackets) {
    const size_t begin = offset_++;
    const char c = peek();
    if (names_class(c)) {
      offset_++;
      const char kind = char(c | 32);
      CodeSet set = kind == 'd'   ? category("Nd")
                    : kind == 's' ? white_space()
                    : kind == 'w' ? word_characters(in_brackets)
                                  : property(begin);
      if (c != kind) set = set.complement();
      return cased(std::move(set), any_case, begin);
    }
    const uint32_t code = escaped_character(begin);
    return cased({{code, code}}, any_case, begin);
  }

  // The character that a backslash, already read, and what follows it stand for.
  uint32_t escaped_character(size_t begin) {
    static constexpr std::string_view kNames = "ntrfvae", kCodes = "\n\t\r\f\v\a\x1B";
    const char c = peek();
    if (!done()) {
      const size_t name = kNames.find(c);
      if (name != kNames.npos) return offset_++, uint32_t(kCodes[name]);
    }
    if (skip("x{")) {
      const uint32_t code = hex(begin, 1, 8);
      if (!skip("}")) refuse(begin, rest(begin), "\\x{H...}");
      return code;
    }
    if (skip("x")) return hex(begin, 2, 2);
    if (skip("u")) return hex(begin, 4, 4);
    const bool name = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    if (name || done()) refuse(begin, rest(begin, 2), "an escape that the subset has");
    return character();
  }

  uint32_t hex(size_t begin, int min, int max) {
    uint32_t code = 0;
    int digits = 0;
    for (; digits < max && std::isxdigit(static_cast<unsigned char>(peek())); digits++, offset_++) {
      const char c = char(peek() | 32);
      code = code << 4 | uint32_t(c >= 'a' ? c - 'a' + 10 : c - '0');
    }
    if (digits < min) refuse(begin, rest(begin), "hexadecimal digits");
    if (code >= 0x110000 || (code >= 0xD800 && code < 0xE000) || (min == 2 && code >= 0x80)) {
      refuse(begin, rest(begin), "a code point (\\xHH: of ASCII)");
    }
    return code;
  }

  // {X} or {^X} behind \p.
  CodeSet property(size_t begin) {
    const size_t close = regex_.find('}', offset_);
    if (!skip("{") || close == std::string::npos) refuse(begin, rest(begin), "\\p{X}");
    const bool negated = skip("^");
    std::string name;
    for (; offset_ < close; offset_++) {
      const char c = peek();
      if (c != ' ' && c != '_' && c != '-') name += c >= 'A' && c <= 'Z' ? char(c | 32) : c;
    }
    offset_++;
    static const std::map<std::string, std::string> kLong = {
        {"letter", "l"}, {"mark", "m"},  {"number", "n"},   {"punctuation", "p"},
        {"symbol", "s"}, {"other", "c"}, {"separator", "z"}};
    if (kLong.count(name)) name = kLong.at(name);
    const CodeSet* set = nullptr;
    if (name == "han" || name == "script=han" || name == "sc=han") set = &han();
    if (name.size() == 1 || name.size() == 2) {
      name[0] = char(name[0] & ~32);
      const auto found = categories().find(name);
      if (found != categories().end()) set = &found->second;
    }
    if (!set) {
      refuse(begin, regex_.substr(begin, close + 1 - begin), "a general category or \\p{Han}");
    }
    return negated ? set->complement() : *set;
  }

  // [...]: unions of its items, cut with one another at &&.
  CodeSet bracket(bool any_case, int depth) {
    const size_t begin = offset_++;
    if (depth > kMaxDepth) refuse(begin, rest(begin), "classes at most 100 deep");
    const bool negated = skip("^");
    CodeSet all = {kEverything}, items;
    bool empty = true;
    for (;;) {
      if (done()) refuse(begin, "[", "] behind it");
      if (peek() == ']' || starts_with("&&")) {
        if (empty) refuse(offset_, rest(offset_, 2), "a class that is not empty");
        all = all.intersection(items);
        if (skip("]")) break;
        offset_ += 2, items = {}, empty = true;
        continue;
      }
      empty = false;
      add_item(items, any_case, depth);
    }
    // (?i) holds for the items; what it adds to a part of && must be added before they are cut.
    return negated ? all.complement() : all;
  }

  void add_item(CodeSet& items, bool any_case, int depth) {
    const size_t begin = offset_;
    if (starts_with("[:")) refuse(begin, rest(begin), "\\p{X} in place of [:x:]");
    if (peek() == '[') return items.add(bracket(any_case, depth + 1));
    if (peek() == '\\') {
      if (names_class(peek(1))) {
        items.add(escape(any_case, true));
        if (peek() == '-' && peek(1) != ']') refuse(begin, rest(begin), "no range from a class");
        return;
      }
      if (peek(1) == 'b') refuse(begin, "\\b", "an escape that the subset has");
      offset_++;
    }
    const uint32_t low = offset_ > begin ? escaped_character(begin) : character();
    uint32_t high = low;
    if (peek() == '-' && peek(1) != ']' && peek(1) != '\0') {
      offset_++;
      const size_t bound = offset_;
      if (peek() == '[' || (peek() == '\\' &&
                            std::string_view("dDsSwWpP").find(peek(1)) != std::string_view::npos)) {
        refuse(begin, rest(begin), "a range between two characters");
      }
      high = skip("\\") ? escaped_character(bound) : character();
      if (high < low) refuse(begin, rest(begin), "a range that goes up");
    }
    items.add(cased({{low, high}}, any_case, begin));
  }

  const std::string& regex_;
  const bool possessive_counts_;
  size_t offset_ = 0;
  std::vector<Count> counts_;
  std::vector<size_t> dollars_;
};

}  // namespace

// ---------------------------------------------------------------------------------------------
// From the tree to instructions to the automaton

class RegexCompiler {
 public:
  RegexCompiler(const std::string& regex, SplitRegex& out) : regex_(regex), out_(out) {}

  void compile() {
    const Node tree = RegexParser(regex_).parse();
    instructions_.push_back({.kind = Instruction::Kind::match});
    const int begin = emit(tree, 0, true);
    find_classes();
    build_automaton(begin);
    out_.matches_empty_ = tree.matches_empty;
  }

 private:
  static constexpr size_t kMaxInstructions = 20'000, kMaxStates = 10'000, kMaxEntries = 4 << 20;
  static constexpr int64_t kMaxWork = 50'000'000;  // instructions visited while it is built

  // A thread runs to `next`; `fork` first to next, then to other. `set` takes a character in its
  // set, `look` asks whether the next one is in it.
  struct Instruction {
    enum class Kind { match, set, look, fork };
    Kind kind = Kind::match;
    int set = -1;
    bool end = false;  // of look: the end of the text will do
    int next = -1, other = -1;
  };

  int add(Instruction instruction) {
    if (instructions_.size() >= kMaxInstructions) {
      fail("pre_tokenizer: regular expression ", printable(regex_), ": found more than ",
           kMaxInstructions, " instructions, expected fewer repetitions");
    }
    instructions_.push_back(instruction);
    return int(instructions_.size()) - 1;
  }
  int add_set(const CodeSet& set, int next) {
    return add({.kind = Instruction::Kind::set, .set = number_of(set), .next = next});
  }
  int add_look(const CodeSet& set, bool end, int next) {
    return add({.kind = Instruction::Kind::look, .set = number_of(set), .end = end, .next = next});
  }
  int add_fork(int preferred, int other) {
    return add({.kind = Instruction::Kind::fork, .next = preferred, .other = other});
  }
  int number_of(const CodeSet& set) {
    const auto [it, is_new] = set_numbers_.insert({set, int(sets_.size())});
    if (is_new) sets_.push_back(set);
    return it->second;
  }

  // Emits `node`, behind which threads go on at `next`. Returns where they begin. `last`: nothing
  // but a match can follow, so that it makes no difference whether a group is atomic.
  int emit(const Node& node, int next, bool last) {
    switch (node.kind) {
      case Node::Kind::empty:
        return next;
      case Node::Kind::set:
        return add_set(node.set, next);
      case Node::Kind::look:
        return add_look(node.set, node.end, next);
      case Node::Kind::sequence:
        for (size_t i = node.parts.size(); i-- > 0;) {
          next = emit(node.parts[i], next, last && i + 1 == node.parts.size());
        }
        return next;
      case Node::Kind::choice: {
        int begin = emit(node.parts.back(), next, last);
        for (size_t i = node.parts.size() - 1; i-- > 0;) {
          begin = add_fork(emit(node.parts[i], next, last), begin);
        }
        return begin;
      }
      case Node::Kind::repeat:
        return emit_repeat(node, next, last);
      case Node::Kind::atomic:
        return emit_atomic(node, next, last);
    }
    return next;
  }

  int emit_repeat(const Node& node, int next, bool last) {
    const Node& part = node.parts[0];
    const auto fork = [&](int again, int out) {
      return node.greedy ? add_fork(again, out) : add_fork(out, again);
    };
    int begin = next, required = node.min;
    if (node.max < 0) {
      const int loop = fork(-1, next);
      const int body = emit(part, loop, false);
      (node.greedy ? instructions_[size_t(loop)].next : instructions_[size_t(loop)].other) = body;
      begin = required > 0 ? body : loop;
      required -= required > 0;
    } else {
      for (int i = node.min; i < node.max; i++) {
        begin = fork(emit(part, begin, last && node.max == 1), next);
      }
    }
    for (; required > 0; required--) begin = emit(part, begin, last && node.max == 1);
    return begin;
  }

  // What is atomic takes all it can: over one class that means that none of it follows.
  int emit_atomic(const Node& node, int next, bool last) {
    const Node& part = node.parts[0];
    if (last || part.kind == Node::Kind::set || part.kind == Node::Kind::look ||
        part.kind == Node::Kind::atomic) {
      return emit(part, next, last);
    }
    CodeSet set;
    if (part.kind != Node::Kind::repeat || !part.greedy || !one_of(part.parts[0], set)) {
      fail("pre_tokenizer: regular expression ", printable(regex_), ": byte ", node.offset,
           ": found ", printable(std::string_view(regex_).substr(node.offset, 12)),
           ", expected atomic groups and possessive repetition over one class only");
    }
    int begin;
    if (part.max < 0) {
      const int loop = add_fork(-1, add_look(set.complement(), true, next));
      begin = instructions_[size_t(loop)].next = add_set(set, loop);
      begin = part.min == 0 ? loop : begin;
    } else {
      begin = next;
      for (int i = part.min; i < part.max; i++) {
        const int out = add_look(set.complement(), true, next);
        begin = add_fork(add_set(set, begin), out);
      }
    }
    for (int i = part.max < 0 ? 1 : 0; i < part.min; i++) begin = add_set(set, begin);
    return begin;
  }

  // Whether the tree is one character of a set, which it adds to.
  static bool one_of(const Node& node, CodeSet& set) {
    if (node.kind == Node::Kind::choice) {
      return std::all_of(node.parts.begin(), node.parts.end(),
                         [&](const Node& part) { return one_of(part, set); });
    }
    if (node.kind != Node::Kind::set) return false;
    set.add(node.set);
    return true;
  }

  // Code points that are in the same sets become one class.
  void find_classes() {
    std::vector<uint32_t> borders = {0, kInvalid};
    for (const CodeSet& set : sets_) {
      for (const auto& range : set.ranges()) {
        borders.push_back(range.begin);
        if (range.last < kInvalid) borders.push_back(range.last + 1);
      }
    }
    std::sort(borders.begin(), borders.end());
    borders.erase(std::unique(borders.begin(), borders.end()), borders.end());
    std::map<std::vector<bool>, uint16_t> known;
    std::vector<size_t> ranges(sets_.size(), 0);  // of each set: the first that ends behind c
    std::vector<bool> in(sets_.size());
    for (const uint32_t c : borders) {
      for (size_t s = 0; s < sets_.size(); s++) {
        const auto& all = sets_[s].ranges();
        while (ranges[s] < all.size() && all[ranges[s]].last < c) ranges[s]++;
        in[s] = ranges[s] < all.size() && all[ranges[s]].begin <= c;
      }
      const auto [it, is_new] = known.insert({in, uint16_t(known.size())});
      if (is_new) members_.push_back(in);
      out_.runs_.push_back({c, it->second});
    }
    out_.width_ = members_.size() + 1;
    out_.invalid_class_ = out_.runs_.back().char_class;
    fill_pages();
  }

  void fill_pages() {
    std::map<std::vector<uint16_t>, uint16_t> known;
    std::vector<int> uniform(members_.size(), -1);  // of each class: its page of nothing else
    const auto add_page = [&](const std::vector<uint16_t>& page) {
      const auto [it, is_new] = known.insert({page, uint16_t(known.size())});
      if (is_new) out_.classes_.insert(out_.classes_.end(), page.begin(), page.end());
      return it->second;
    };
    size_t run = 0;
    const auto run_end = [&] {  // the last run is of the bytes that are not UTF-8
      return run + 1 < out_.runs_.size() ? out_.runs_[run + 1].begin : kInvalid + 1;
    };
    for (uint32_t begin = 0; begin < kInvalid; begin += 256) {
      while (run_end() <= begin) run++;
      const uint16_t first_class = out_.runs_[run].char_class;
      if (run_end() >= begin + 256) {
        int& page = uniform[first_class];
        if (page < 0) page = add_page(std::vector<uint16_t>(256, first_class));
        out_.pages_.push_back(uint16_t(page));
        continue;
      }
      std::vector<uint16_t> page;
      for (uint32_t c = begin; c < begin + 256; c++) {
        while (run_end() <= c) run++;
        page.push_back(out_.runs_[run].char_class);
      }
      out_.pages_.push_back(add_page(page));
    }
    std::copy_n(out_.classes_.begin() + out_.pages_[0] * 256, 128, out_.ascii_);
  }

  // ---- the automaton. A state is the list of `set`, `look` and `match` instructions at which its
  // threads wait, in the order of their priority.

  using Threads = std::vector<int>;

  void build_automaton(int begin) {
    seen_.assign(instructions_.size(), 0), passed_.assign(instructions_.size(), 0);
    std::map<Threads, uint32_t> numbers = {{{}, 0}};
    std::vector<const Threads*> states = {&numbers.begin()->first};  // a map's keys stay in place
    const auto number = [&](Threads threads) {
      const auto [it, is_new] = numbers.insert({std::move(threads), uint32_t(states.size())});
      if (is_new) states.push_back(&it->first);
      return it->second;
    };
    Threads threads;
    mark_++;
    wait(begin, threads);
    out_.start_ = number(threads) * uint32_t(out_.width_);
    for (size_t state = 0; state < states.size(); state++) {
      if (states.size() > kMaxStates || states.size() * out_.width_ > kMaxEntries ||
          work_ > kMaxWork) {
        fail("pre_tokenizer: regular expression ", printable(regex_),
             ": found an automaton of more than ", std::min(kMaxStates, states.size() - 1),
             " states, expected a simpler expression");
      }
      for (size_t c = 0; c < out_.width_; c++) {
        threads.clear();
        const bool match = step(*states[state], c, threads);
        out_.next_.push_back(number(threads) * uint32_t(out_.width_) * 2 + match);
      }
    }
  }

  // The threads that are left behind a character of the class, or nothing behind the end of the
  // text. Returns whether a thread matches in front of it: those of lower priority end there.
  bool step(const Threads& threads, size_t char_class, Threads& out) {
    const bool at_end = char_class == out_.end_class();
    mark_++;
    for (const int thread : threads) {
      stack_ = {thread};
      while (!stack_.empty()) {
        const int i = stack_.back();
        stack_.pop_back();
        if (passed_[size_t(i)] == mark_) continue;
        passed_[size_t(i)] = mark_, work_++;
        const Instruction& now = instructions_[size_t(i)];
        const auto fits = [&] { return bool(members_[char_class][size_t(now.set)]); };
        switch (now.kind) {
          case Instruction::Kind::match:
            return true;
          case Instruction::Kind::set:
            // A thread that is sure to match behind the character outdoes all of lower priority.
            if (!at_end && fits() && wait(now.next, out)) return false;
            break;
          case Instruction::Kind::look:
            if (at_end ? now.end : fits()) stack_.push_back(now.next);
            break;
          case Instruction::Kind::fork:
            stack_.push_back(now.other);
            stack_.push_back(now.next);
            break;
        }
      }
    }
    return false;
  }

  // Appends the instructions at which a thread waits that begins at `begin`. True: the thread
  // matches whatever comes, so that nothing of lower priority counts.
  bool wait(int begin, Threads& out) {
    waiting_ = {begin};
    while (!waiting_.empty()) {
      const int i = waiting_.back();
      waiting_.pop_back();
      if (seen_[size_t(i)] == mark_) continue;
      seen_[size_t(i)] = mark_, work_++;
      const Instruction& now = instructions_[size_t(i)];
      if (now.kind == Instruction::Kind::fork) {
        waiting_.push_back(now.other);
        waiting_.push_back(now.next);
        continue;
      }
      out.push_back(i);
      if (now.kind == Instruction::Kind::match) return true;
    }
    return false;
  }

  const std::string& regex_;
  SplitRegex& out_;
  std::vector<Instruction> instructions_;
  std::vector<CodeSet> sets_;
  std::map<CodeSet, int> set_numbers_;
  std::vector<std::vector<bool>> members_;  // (class, set)
  std::vector<int> stack_, waiting_;
  std::vector<int64_t> passed_, seen_;  // of each instruction: the last step that met it
  int64_t mark_ = 0, work_ = 0;
};

SplitRegex::SplitRegex(const std::string& regex) {
  RegexCompiler(regex, *this).compile();
  find_pairs();
  join_matches();
}

std::string SplitRegex::escape(std::string_view literal) {
  std::string out;
  for (const char c : literal) {
    if (std::string_view("\\.*+?^$|()[]{}").find(c) != std::string_view::npos) out += '\\';
    out += c;
  }
  return out;
}

std::string SplitRegex::spelled_for_oniguruma(const std::string& regex) {
  RegexParser parser(regex, true);
  parser.parse();
  std::map<size_t, std::string> inserted, replaced;  // by offset
  for (const size_t dollar : parser.dollars()) replaced[dollar] = "\\z";
  for (const auto& count : parser.possessive_counts()) {
    inserted[count.begin] += "(?>", replaced[count.plus] = ")";
  }
  std::string out;
  for (size_t i = 0; i < regex.size(); i++) {
    if (inserted.count(i)) out += inserted[i];
    out += replaced.count(i) ? replaced[i] : std::string(1, regex[i]);
  }
  return out;
}

// Reads every row once for each pair of ASCII classes.
void SplitRegex::find_pairs() {
  const size_t states = next_.size() / width_;
  crossing_.assign(width_ * width_, true), dependent_ = crossing_;
  ending_.assign(width_ * width_, false), begins_.assign(width_, false);
  if (matches_empty_) return;  // nothing is sure

  // From which states a text may go on so that nothing matches: from those that do not match at the
  // end of the text, and from all that lead there without a match.
  std::vector<bool> may_fail(states, false);
  std::vector<std::vector<uint32_t>> before(states);
  std::vector<uint32_t> queue;
  const auto fails = [&](uint32_t state) {
    if (!may_fail[state]) may_fail[state] = true, queue.push_back(state);
  };
  for (uint32_t state = 0; state < states; state++) {
    const uint32_t row = uint32_t(state * width_);
    if (!(next(row, end_class()) & 1)) fails(state);
    for (size_t c = 0; c < end_class(); c++) {
      if (!(next(row, c) & 1)) before[(next(row, c) >> 1) / width_].push_back(state);
    }
  }
  while (!queue.empty()) {
    const uint32_t state = queue.back();
    queue.pop_back();
    for (const uint32_t previous : before[state]) fails(previous);
  }

  std::vector<size_t> ascii(ascii_, ascii_ + 128);
  std::sort(ascii.begin(), ascii.end());
  ascii.erase(std::unique(ascii.begin(), ascii.end()), ascii.end());
  std::vector<size_t> last_class(states, width_);  // that led to the state
  for (const size_t a : ascii) {
    begins_[a] = !may_fail[(next(start_, a) >> 1) / width_];
    for (const size_t b : ascii) {
      crossing_[a * width_ + b] = dependent_[a * width_ + b] = false;
      ending_[a * width_ + b] = true;
    }
    for (size_t state = 1; state < states; state++) {
      const uint32_t row = next(uint32_t(state * width_), a) >> 1;
      if (std::exchange(last_class[row / width_], a) == a) continue;
      for (const size_t b : ascii) {
        const uint32_t entry = next(row, b);
        if (entry >> 1) crossing_[a * width_ + b] = true;
        if (row && entry != 1) ending_[a * width_ + b] = false;
        if ((entry ^ next(row, end_class())) & 1) dependent_[a * width_ + b] = true;
      }
    }
  }
}

// Runs both automata at once through all pairs of states that a text can reach, and whether their
// last matches so far are the same: they must be where both have ended.
bool SplitRegex::finds_the_same(const SplitRegex& other) const {
  std::set<std::pair<size_t, size_t>> classes = {{end_class(), other.end_class()}};
  for (size_t i = 0, j = 0; i < runs_.size() && j < other.runs_.size();) {
    classes.insert({runs_[i].char_class, other.runs_[j].char_class});
    const uint32_t a = i + 1 < runs_.size() ? runs_[i + 1].begin : kInvalid + 1;
    const uint32_t b = j + 1 < other.runs_.size() ? other.runs_[j + 1].begin : kInvalid + 1;
    i += a <= b, j += b <= a;
  }
  using State = std::array<uint32_t, 3>;
  std::set<State> known = {{start_, other.start_, 1}};
  std::vector<State> queue(known.begin(), known.end());
  while (!queue.empty()) {
    const State state = queue.back();
    queue.pop_back();
    for (const auto& [a, b] : classes) {
      const uint32_t x = next(state[0], a), y = other.next(state[1], b);
      const bool same = (x & 1) == (y & 1) ? (x & 1) || state[2] : false;
      const State now = {x >> 1, y >> 1, same};
      if (!now[0] && !now[1]) {
        if (!same) return false;
      } else if (known.insert(now).second) {
        queue.push_back(now);
      }
    }
    if (known.size() > 100'000) return false;  // it cannot be said: they count as different
  }
  return true;
}

// ---------------------------------------------------------------------------------------------
// Scanning

inline RegexScanner::Character RegexScanner::character(size_t i) const {
  const auto byte = static_cast<unsigned char>(text_[i]);
  if (byte < 0x80) return {regex_.ascii_[byte], 1};
  const CodePoint c = decode_utf8(text_.data() + i, text_.size() - i);
  if (c.code >= kInvalid) return {regex_.invalid_class_, 1};
  return {regex_.classes_[regex_.pages_[c.code >> 8] * 256u + (c.code & 255)], size_t(c.bytes)};
}

size_t RegexScanner::match_end(size_t i) {
  const size_t end = text_.size(), begin = i;
  size_t match = kNoMatch, check = begin / kFar * kFar + 2 * kFar;
  uint32_t row = regex_.start_;
  passed_.clear();
  for (;;) {
    if (i >= check) {
      check = i / kFar * kFar + kFar;
      if (i - (match == kNoMatch ? begin : match) >= kFar && fails_from(row, i)) break;
    }
    const Character c = i < end ? character(i) : Character{regex_.end_class(), 1};
    const uint32_t next = regex_.next(row, c.char_class);
    if (next & 1) match = i;
    row = next >> 1;
    if (!row) break;
    i += c.bytes;
  }
  for (const auto& [state, offset] : passed_) {
    if (match == kNoMatch || offset > match) failed_.insert(offset / kFar << 32 | state);
  }
  return match;
}

// Whether a scan that was in the same state there found no further match. All scans ask at the
// first character behind each multiple of kFar that is far from their match, so that in a text of n
// bytes each adds at most 3 kFar steps, and all of them together kFar more for every state and
// multiple: at most (3 kFar + states) n steps.
bool RegexScanner::fails_from(uint32_t row, size_t offset) {
  if (failed_.count(offset / kFar << 32 | row)) return true;
  passed_.push_back({row, offset});
  return false;
}

// ---------------------------------------------------------------------------------------------
// Only to be fast: in most texts a match ends where its scan does, and the next begins there. One
// loop runs through all of them without a branch that depends on where they end.

void SplitRegex::join_matches() {
  if (matches_empty_) return;
  for (size_t row = 0; row < next_.size(); row += width_) {
    for (size_t c = 0; c < width_; c++) {
      const uint32_t entry = next_[row + c];
      const bool joins = entry == 1 && c != end_class() && can_begin(c);
      joined_.push_back(joins ? (next(start_, c) >> 1) * 4 + 3 : (entry >> 1) * 4 + (entry & 1));
    }
  }
}

void RegexScanner::split(size_t end, std::vector<std::string_view>& pieces) {
  constexpr size_t kBlock = 128;  // bytes
  size_t ends[kBlock];
  const uint32_t* const joined = regex_.joined_.data();
  const size_t limit = std::min(text_.size(), end + 1);
  for (size_t begin = 0; begin < end;) {
    size_t i = begin, match = begin;  // match == begin: none yet
    uint32_t row = regex_.start_;
    bool running = true;
    while (running && i < limit && i - match < 2 * kFar) {
      size_t n = 0, piece = begin;
      for (const size_t block_end = std::min(limit, i + kBlock); i < block_end;) {
        const Character c = character(i);
        const uint32_t entry = joined[row + c.char_class];
        ends[n] = i;
        n += entry >> 1 & 1;
        begin = entry & 2 ? i : begin;
        match = entry & 1 ? i : match;
        row = entry >> 2;
        if (!row) {
          running = false;
          break;
        }
        i += c.bytes;
      }
      for (size_t k = 0; k < n; piece = ends[k++]) {
        pieces.push_back({text_.data() + piece, ends[k] - piece});
      }
    }
    if (begin >= end) break;
    if (running && i >= text_.size() && (regex_.next(row, regex_.end_class()) & 1)) match = i;
    const bool ended = !running || i >= text_.size();
    if (ended && match > begin) {
      pieces.push_back(text_.substr(begin, match - begin));
      begin = match;
      continue;
    }
    // The scan looks far beyond its match, or none begins here: one match in the plain way.
    const size_t gap = begin;
    size_t match_behind = kNoMatch;
    while (begin < end && (match_behind = match_end(begin)) == kNoMatch) {
      Character c = character(begin);
      do {
        begin += c.bytes;
        if (begin < end) c = character(begin);
      } while (begin < end && !regex_.can_begin(c.char_class));
    }
    if (begin > gap) pieces.push_back(text_.substr(gap, begin - gap));
    if (match_behind != kNoMatch) {
      pieces.push_back(text_.substr(begin, match_behind - begin));
      begin = match_behind;
    }
  }
}

}  // namespace cake
