// What the text of an answer says: its final number, the choice that it makes, the expression that
// it ends with. Pure functions on text, in linear time; cake/verify.h compares with what is right.
//
//     text -> answer_part -> plain_spelling -> numbers -> the one that counts
//                                           -> letters of choices -> the one that is chosen
//                                           -> arithmetic -> the expression that is claimed
//
// answer_part leaves out a model's reasoning (up to </think>), what follows the end of its turn,
// and a new question of its own, where there is an answer before it. <answer>..</answer> holds the
// answer, if it is there.
//
// plain_spelling gives one spelling to what has several: every dash that serves as a minus is -,
// \dfrac12 and one half of Unicode are 1/2, \times is *, \text{dogs} is dogs, full-width digits are
// digits.
//
// Numbers. 1,000  1 000  1'000  1_000  1,00,000  1{,}000  1.000.000 and 1.000,00 have thousands;
// 1.000 is 1. 1.5e6, 1.5 x 10^6, 1.5 million, 70k, 3/4, 1 1/2, -5 and "minus 5" are numbers. (5) is
// 5: accountants' brackets are no sign. Decimals and fractions are exact, of any length. A
// time (2:30), a date (1/2/2020), a version (3.5.2), a power of anything but 10, what stands at a
// variable, a root or a constant (5x, \sqrt{5}, 5\pi), and digits in a word (m2, H2O) are none.
//
// The number that counts (final_number) is the first behind ####, else that of the first \boxed{},
// else that of the first "the answer is", else the last one that is no operand, else the last one.
// Where such a mark has no number directly behind it, it is none ("#### Step 1"); where it has
// several, as in "12 and 15", "5-7" or "5 + 3", nothing counts. Of "5 + 3 = 8" 8 counts.
//
// A number behind which % stands is written 50% in canonical form. See is_same_number.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/calculator.h"
#include "cake/rubric.h"
#include "cake/run.h"
#include "cake/unicode.h"

namespace cake {

// The number that counts, in canonical form: "-0.75", "1/3", "50%". Empty: none.
inline std::string final_number(std::string_view text);

// The number that `written` is, in canonical form; a unit may follow. Empty: it is not one number.
inline std::string canonical_number(std::string_view written);

// What a reference answer gives: the number behind its ####, or in its \boxed{}, or that it is.
inline std::string reference_number(std::string_view answer);

// A % behind `found` is ignored, unless `expected` has one: then 50% is both 50 and 0.5.
inline bool is_same_number(const std::string& expected, const std::string& found);

struct OfferedChoices {
  int offered = 26;                // A, B, ...
  bool are_numbered = false;       // 1 is A, 2 is B, ...
  std::vector<std::string> texts;  // of A, B, ...; may be empty
};

// The letter that a text chooses; 0: none, or several.
inline char chosen_letter(std::string_view text, const OfferedChoices& choices = {});

// The arithmetic of a text that counts: its operands are at least two of `numbers`, each used once
// at most. Numbers and target are in canonical form. The last one that is said to be the target,
// as in "3*7+5 = 26" and "26 = 3*7+5"; if there is none, the last one. Empty: none.
inline std::string final_arithmetic(std::string_view text,
                                    const std::multiset<std::string>& numbers,
                                    const std::string& target);

// ---------------------------------------------------------------------------------------------
// The part of a text that holds the answer

namespace answers {

constexpr std::string_view kDigits = "0123456789";

inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
inline bool is_letter(char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0; }
inline bool is_one_of(char c, std::string_view set) { return set.find(c) != set.npos; }

inline std::string_view final_turn(std::string_view text) {
  constexpr std::string_view kThink = "<think>", kThought = "</think>";
  const size_t thought = text.rfind(kThought);
  if (thought != text.npos) {
    text.remove_prefix(thought + kThought.size());
  } else if (strip_ascii(text).starts_with(kThink)) {
    return {};  // cut off before it had an answer
  }
  for (const std::string_view end :
       {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "</s>",
        "<|im_start|>", "<|start_header_id|>", "<|user|>", "[INST]"}) {
    const size_t i = text.find(end);
    if (i != text.npos && !strip_ascii(text.substr(0, i)).empty()) text = text.substr(0, i);
  }
  return text;
}

// True where a line asks a question anew: "Question: ..", "**Problem 2:** ..", "Q: ..", "Human:".
inline bool begins_question(std::string_view line) {
  line.remove_prefix(std::min(line.find_first_not_of(" \t#*_>-"), line.size()));
  for (const std::string_view word : {"Question", "QUESTION", "Problem", "Exercise", "Q", "Human",
                                      "User", "Instruction", "Input"}) {
    if (!line.starts_with(word)) continue;
    std::string_view rest = line.substr(word.size());
    const size_t space = std::min(rest.find_first_not_of(" *#"), rest.size());
    const size_t number = std::min(rest.find_first_not_of(kDigits, space), rest.size());
    if (number > space && number <= space + 4) rest.remove_prefix(number);
    rest.remove_prefix(std::min(rest.find_first_not_of("*_ \t\r"), rest.size()));
    if (rest.starts_with(':')) return true;
    if (number > space && (rest.empty() || rest[0] == '.')) return true;
  }
  return false;
}

// What stands before the text begins a new question; the whole text, if there is none.
inline std::string_view before_next_question(std::string_view text) {
  for (size_t i = 0; (i = text.find('\n', i)) != text.npos;) {
    i++;
    const std::string_view line = text.substr(i, std::min<size_t>(80, text.find('\n', i) - i));
    if (begins_question(line) && !strip_ascii(text.substr(0, i)).empty()) return text.substr(0, i);
  }
  return text;
}

// Inside the last <answer>..</answer>, if there is one; the end may be missing.
inline std::string_view inside_answer_tags(std::string_view text) {
  constexpr std::string_view kBegin = "<answer>", kEnd = "</answer>";
  const size_t end = std::min(text.rfind(kEnd), text.size());
  const size_t begin = text.substr(0, end).rfind(kBegin);
  if (begin == text.npos) return text;
  return text.substr(begin + kBegin.size(), end - begin - kBegin.size());
}

inline std::string_view answer_part(std::string_view text) {
  return inside_answer_tags(before_next_question(final_turn(text)));
}

// The text without GSM8K's calculator annotations such as <<48/2=24>>.
inline std::string without_annotations(std::string_view text) {
  constexpr size_t kLongest = 200;
  std::string out;
  for (;;) {
    const size_t begin = std::min(text.find("<<"), text.size());
    out += text.substr(0, begin);
    if (begin == text.size()) return out;
    text.remove_prefix(begin);
    const size_t end = text.substr(0, kLongest).find_first_of(">\n", 2);
    const bool is_annotation = end != text.npos && text.substr(end, 2) == ">>";
    if (!is_annotation) out += "<<";
    text.remove_prefix(is_annotation ? end + 2 : 2);
  }
}

// ---------------------------------------------------------------------------------------------
// One spelling

// In plain text these stand for what ASCII lacks:
constexpr char kLongDash = '\x01';     // an em dash, which is a minus more seldom than others
constexpr char kNarrowSpace = '\x02';  // a space that does not end a word: thousands

struct Spelling {
  std::string_view spelled, plain;
};

inline constexpr Spelling kCharacters[] = {
    {"\u2212", "-"},     {"\u2013", "-"},      {"\u2010", "-"},    {"\u2011", "-"},
    {"\u2012", "-"},     {"\ufe63", "-"},      {"\uff0d", "-"},    {"\u207b", "-"},
    {"\u2796", "-"},     {"\u2014", "\x01"},   {"\u2015", "\x01"}, {"\u00d7", "*"},
    {"\u2217", "*"},     {"\u22c5", "*"},      {"\u00b7", "*"},    {"\u2715", "*"},
    {"\u2716", "*"},     {"\u00f7", "/"},      {"\u2215", "/"},    {"\u2044", "/"},
    {"\u2797", "/"},     {"\u2795", "+"},      {"\u00a0", "\x02"}, {"\u2009", "\x02"},
    {"\u202f", "\x02"},  {"\u2007", "\x02"},   {"\u2008", "\x02"}, {"\u200a", "\x02"},
    {"\u2006", "\x02"},  {"\u2005", "\x02"},   {"\u2002", " "},    {"\u2003", " "},
    {"\u3000", " "},     {"\u200b", ""},       {"\u2060", ""},     {"\ufeff", ""},
    {"\u2018", "'"},     {"\u2019", "'"},      {"\u02bc", "'"},    {"\u2032", "'"},
    {"\u201c", "\""},    {"\u201d", "\""},     {"\u066b", "."},    {"\u066c", ","},
    {"\u2248", "~"},     {"\u2260", "!="},     {"\u2264", "<="},   {"\u2265", ">="},
    {"\u00b1", "\\pm "}, {"\u221a", "\\sqrt"}, {"\u03c0", "\\pi"}, {"\u00bd", "1/2"},
    {"\u2153", "1/3"},   {"\u2154", "2/3"},    {"\u00bc", "1/4"},  {"\u00be", "3/4"},
    {"\u2155", "1/5"},   {"\u2156", "2/5"},    {"\u2157", "3/5"},  {"\u2158", "4/5"},
    {"\u2159", "1/6"},   {"\u215a", "5/6"},    {"\u2150", "1/7"},  {"\u215b", "1/8"},
    {"\u215c", "3/8"},   {"\u215d", "5/8"},    {"\u215e", "7/8"},  {"\u2151", "1/9"},
    {"\u2152", "1/10"}};

// LaTeX. Other commands stay as they are.
inline constexpr Spelling kCommands[] = {
    {"times", "*"},       {"cdot", "*"},       {"ast", "*"},
    {"div", "/"},         {"approx", "~"},     {"sim", "~"},
    {"leq", "<="},        {"le", "<="},        {"geq", ">="},
    {"ge", ">="},         {"neq", "!="},       {"ne", "!="},
    {"to", "->"},         {"implies", "=>"},   {"Rightarrow", "=>"},
    {"rightarrow", "->"}, {"pm", "\\pm "},     {"degree", " degrees "},
    {"percent", "%"},     {"left", ""},        {"right", ""},
    {"big", ""},          {"bigl", ""},        {"bigr", ""},
    {"Big", ""},          {"Bigl", ""},        {"Bigr", ""},
    {"displaystyle", ""}, {"quad", " "},       {"qquad", " "},
    {"therefore", " "},   {"because", " "},    {"ldots", "..."},
    {"dots", "..."},      {"cdots", "..."},    {"lbrack", "["},
    {"rbrack", "]"},      {"fbox", "\\boxed"}, {"boxed", "\\boxed"},
    {"frac", "\\frac"},   {"dfrac", "\\frac"}, {"tfrac", "\\frac"},
    {"cfrac", "\\frac"}};

// Their braces hold text.
inline constexpr std::string_view kTextCommands[] = {
    "text",   "textbf", "textit", "textrm", "textsf", "texttt",       "mathrm", "mathbf",
    "mathit", "mathsf", "mbox",   "hbox",   "emph",   "operatorname", "bf",     "rm"};

// Digits of other scripts, as ASCII; 0: none. Their zeros: Arabic, Persian, Devanagari, Bengali.
inline char digit_of(uint32_t code) {
  for (const uint32_t zero : {0x660u, 0x6F0u, 0x966u, 0x9E6u}) {
    if (code >= zero && code < zero + 10) return char('0' + (code - zero));
  }
  if (code >= 0x1D7CE && code <= 0x1D7FF) return char('0' + (code - 0x1D7CE) % 10);  // bold, ...
  return 0;
}

// A digit written high, as in m\u00b2; -1: none.
inline int superscript_of(uint32_t code) {
  if (code == 0xB9) return 1;
  if (code == 0xB2 || code == 0xB3) return int(code - 0xB0);
  return code == 0x2070 || (code >= 0x2074 && code <= 0x2079) ? int(code - 0x2070) : -1;
}

class PlainWriter {
 public:
  explicit PlainWriter(std::string_view text) : text_(text) {}

  std::string write() {
    while (i_ < text_.size()) {
      const char c = text_[i_];
      if (c == '\\') {
        command();
      } else if (c & 0x80) {
        character();
      } else if (c == '{') {
        open();
      } else if (c == '}') {
        const bool is_kept = braces_.empty() || braces_.back();
        if (!braces_.empty()) braces_.pop_back();
        out_ += is_kept ? '}' : ' ', i_++;
      } else {
        out_ += static_cast<unsigned char>(c) < 9 ? ' ' : c, i_++;
      }
    }
    return std::move(out_);
  }

 private:
  void open() {
    if (text_.compare(i_, 3, "{,}") == 0 || text_.compare(i_, 4, "{, }") == 0) {
      while (!out_.empty() && out_.back() == ' ') out_.pop_back();
      out_ += ',', i_ += text_[i_ + 2] == '}' ? 3 : 4;
    } else {
      braces_.push_back(true);
      out_ += '{', i_++;
    }
  }
  void character() {
    const CodePoint c = decode_utf8(text_.data() + i_, text_.size() - i_);
    const std::string_view bytes = text_.substr(i_, size_t(c.bytes));
    i_ += size_t(c.bytes);
    if (const char digit = digit_of(c.code)) {
      out_ += digit;
    } else if (const int high = superscript_of(c.code); high >= 0) {
      if (i_ - size_t(c.bytes) != superscript_end_) out_ += '^';
      out_ += char('0' + high), superscript_end_ = i_;
    } else if (c.code >= 0xFF01 && c.code <= 0xFF5E && c.code != 0xFF0D) {
      out_ += char(c.code - 0xFEE0);  // full width
    } else {
      const auto known = std::ranges::find(kCharacters, bytes, &Spelling::spelled);
      const bool is_known = known != std::end(kCharacters);
      const bool is_mixed = is_known && known->plain.size() >= 3 && is_digit(known->plain[0]) &&
                            !out_.empty() && is_digit(out_.back());
      if (is_mixed) out_ += ' ';
      out_ += is_known ? known->plain : bytes;
    }
  }
  void command() {
    const auto at = [&](size_t k) { return i_ + k < text_.size() ? text_[i_ + k] : ' '; };
    if (at(1) == '\\' && is_letter(at(2))) i_++;  // \\boxed, as in the source of a program
    const size_t begin = i_ + 1;
    size_t end = begin;
    while (end < text_.size() && is_letter(text_[end])) end++;
    if (end == begin) return mark();
    const std::string_view name = text_.substr(begin, end - begin);
    i_ = end;
    if (name == "begin" || name == "end") {
      const size_t close = text_.substr(i_, 40).find('}');
      i_ += close == text_.npos ? 0 : close + 1, out_ += ' ';
    } else if (std::ranges::find(kTextCommands, name) != std::end(kTextCommands)) {
      if (!out_.empty() && is_letter(out_.back())) out_ += ' ';
      if (text_.substr(i_, 1) == "{") braces_.push_back(false), i_++, out_ += ' ';
    } else if (name == "circ") {  // 90^\circ and 90^{\circ}
      if (out_.ends_with("^{") && !braces_.empty()) out_.pop_back(), braces_.back() = false;
      if (out_.ends_with('^')) out_.pop_back();
      out_ += " degrees ";
    } else {
      const auto known = std::ranges::find(kCommands, name, &Spelling::spelled);
      if (known == std::end(kCommands))
        (out_ += '\\') += name;
      else
        out_ += known->plain;
      const bool opens = out_.ends_with("\\boxed") || out_.ends_with("\\frac");
      while (opens && i_ < text_.size() && text_[i_] == ' ') i_++;
    }
  }
  void mark() {  // a backslash with a sign
    const char c = i_ + 1 < text_.size() ? text_[i_ + 1] : ' ';
    i_ += 2;
    if (is_one_of(c, ",;: "))
      out_ += kNarrowSpace;
    else if (c == '\\')
      out_ += '\n';
    else if (is_one_of(c, "()[]"))
      out_ += ' ';
    else if (c == '{')
      out_ += '(';
    else if (c == '}')
      out_ += ')';
    else if (c & 0x80)
      i_--;
    else if (c != '!')
      out_ += c;
  }

  std::string_view text_;
  size_t i_ = 0, superscript_end_ = size_t(-1);
  std::vector<bool> braces_;  // of the open ones: whether they are written
  std::string out_;
};

// The end of {..} or of one digit at s[i], whose content may stand in a fraction; 0: there is none.
inline size_t fraction_part(const std::string& s, size_t i, std::string& content) {
  constexpr size_t kLongest = 64;
  while (i < s.size() && s[i] == ' ') i++;
  if (i < s.size() && is_digit(s[i])) return content = s[i], i + 1;
  if (i >= s.size() || s[i] != '{') return 0;
  const size_t end = s.find_first_not_of("0123456789.,+-*/() \x02", i + 1);
  if (end == s.npos || s[end] != '}' || end - i > kLongest) return 0;
  content = strip_ascii(std::string_view(s).substr(i + 1, end - i - 1));
  return content.find_first_of(kDigits) == content.npos ? 0 : end + 1;
}

// \frac{3}{4} is 3/4, -\frac{1}{2} is -1/2, \frac{3+1}{2} is ((3+1)/(2)).
inline std::string with_fractions(const std::string& s) {
  constexpr std::string_view kFrac = "\\frac";
  std::string out, above, below;
  for (size_t i = 0;;) {
    const size_t begin = std::min(s.find(kFrac, i), s.size());
    out.append(s, i, begin - i);
    if (begin == s.size()) return out;
    const size_t middle = fraction_part(s, begin + kFrac.size(), above);
    const size_t end = middle ? fraction_part(s, middle, below) : 0;
    i = begin + kFrac.size();
    if (!end) {
      out += kFrac;
      continue;
    }
    i = end;
    const bool is_mixed = !out.empty() && is_digit(out.back());
    const bool is_negative = above[0] == '-';
    if (is_negative) above = strip_ascii(above.substr(1));
    constexpr std::string_view kPlain = "0123456789.,\x02";
    const bool is_number = above.find_first_not_of(kPlain) == above.npos &&
                           below.find_first_not_of(kPlain) == below.npos;
    if (is_mixed) out += ' ';
    if (is_number) {
      out += concat(is_negative ? "-" : "", above, "/", below, " ");
    } else {
      out += concat("((", is_negative ? "-" : "", above, ")/(", below, "))");
    }
  }
}

inline std::string plain_spelling(std::string_view text) {
  return with_fractions(PlainWriter(text).write());
}

// ---------------------------------------------------------------------------------------------
// Numbers in plain text

struct Number {
  size_t begin = 0, end = 0;  // of the text, without its sign; a multiplier and % belong to it
  bool is_number = true;      // false: a time, a date, a power, ...
  bool is_negative = false, is_percent = false;
  bool is_operand = false;   // of + - * /
  std::string digits;        // 0 to 9, at most one point
  int exponent = 0;          // of 10
  std::string above, below;  // digits + above / below; both empty: no fraction
};

// Digits with at most one point, times 10 to the power of `exponent`, in canonical form: no sign
// but -, no leading zeros, no trailing zeros of a fraction, no point at the end.
inline std::string canonical_digits(bool negative, std::string_view written, int exponent) {
  const size_t point = std::min(written.find('.'), written.size());
  std::string digits(written);
  digits.erase(point, 1);
  int64_t whole = int64_t(point) + exponent;  // digits before the point
  if (whole < 0) digits.insert(0, size_t(-std::exchange(whole, 0)), '0');
  digits.resize(std::max(digits.size(), size_t(whole)), '0');
  const size_t first = std::min(digits.find_first_not_of('0'), size_t(whole));
  const size_t last = digits.find_last_not_of('0');
  if (last == digits.npos) return "0";
  const std::string above = digits.substr(first, size_t(whole) - first);
  return (negative ? "-" : "") + (above.empty() ? "0" : above) +
         (int64_t(last) < whole ? ""
                                : "." + digits.substr(size_t(whole), last + 1 - size_t(whole)));
}

// In canonical form; empty: none, as 1/0.
inline std::string value_of(const Number& n) {
  if (!n.is_number) return "";
  const std::string percent = n.is_percent ? "%" : "";
  if (n.below.empty()) return canonical_digits(n.is_negative, n.digits, n.exponent) + percent;
  try {
    const std::string digits = canonical_digits(false, n.digits, n.exponent);
    return exact_value(concat(n.is_negative ? "-" : "", "(", digits, n.above.empty() ? "" : "+",
                              n.above, "/", n.below, ")")) +
           percent;
  } catch (const Error&) {  // divided by zero, or more digits than the calculator has
    return "";
  }
}

class NumberReader {
 public:
  explicit NumberReader(const std::string& plain) : s_(plain) {}

  std::vector<Number> read() {
    std::vector<Number> numbers;
    for (size_t i = 0; i < s_.size();) {
      const bool begins = is_digit(at(i)) || (at(i) == '.' && is_digit(at(i + 1)));
      if (!begins) {
        i++;
        continue;
      }
      Number n = read_one(i);
      const bool is_part = is_inside_word(i);
      i = n.end;
      if (is_part) continue;
      n.is_operand = false;
      if (!numbers.empty()) mark_operands(numbers.back(), n);
      numbers.push_back(std::move(n));
    }
    return numbers;
  }

  // What joins two numbers: one of + - * /, '=' where the second is the first's value, ',' where
  // they are a list ("and", "or", "to"); 0: none of them.
  char joint(const Number& a, const Number& b) const {
    constexpr size_t kLongest = 32;
    if (b.begin < a.end || b.begin - a.end > kLongest) return 0;
    std::string_view between = std::string_view(s_).substr(a.end, b.begin - a.end);
    std::string sign;
    for (size_t i = 0; i < between.size(); i++) {
      if (between.substr(i, 2) == "**")
        i++;
      else if (!is_one_of(between[i], " $(){}\x02"))
        sign += between[i];
    }
    if (sign.size() > 1 && sign.back() == '-') sign.pop_back();  // the second one's own
    if (sign == "=" || sign == "~") return '=';
    for (const std::string_view equal :
         {"is", "equals", "isequalto", "whichis", "whichequals", "whichisequalto", ",whichis",
          ",whichequals", ",whichisequalto"}) {
      if (sign == equal) return '=';
    }
    if (sign == "x" || sign == "X") return '*';
    if (sign == std::string(1, kLongDash)) return '-';
    if (sign.size() == 1 && is_one_of(sign[0], "+-*/")) return sign[0];
    for (const std::string_view list : {",", ";", "and", "or", "to", ",and", ",or", "&"}) {
      if (sign == list) return ',';
    }
    return 0;
  }

 private:
  char at(size_t i) const { return i < s_.size() ? s_[i] : ' '; }
  size_t digits_end(size_t i) const {
    while (i < s_.size() && is_digit(s_[i])) i++;
    return i;
  }
  size_t blanks_end(size_t i) const {
    while (i < s_.size() && (s_[i] == ' ' || s_[i] == kNarrowSpace)) i++;
    return i;
  }
  bool has(size_t i, std::string_view word) const { return s_.compare(i, word.size(), word) == 0; }

  // Groups of three digits behind `separator`, which begin at i; the end of the last one. i, if
  // they are no thousands. Indian ones are of two digits but for the last.
  size_t thousands_end(size_t begin, size_t i, char separator) const {
    constexpr size_t kMostGroups = 64;
    const size_t first = i - begin;
    if (first > 3 || at(begin) == '0') return i;
    const auto separates = [&](char c) {
      return c == separator || (separator == ' ' && c == kNarrowSpace);
    };
    size_t end = i, groups = 0;
    bool western = true, indian = separator == ',' && first <= 2, last_is_three = false;
    while ((western || indian) && groups <= kMostGroups && separates(at(end)) &&
           is_digit(at(end + 1))) {
      const size_t next = digits_end(end + 1), length = next - end - 1;
      indian = indian && !last_is_three && (length == 2 || length == 3);
      western = western && length == 3;
      last_is_three = length == 3;
      end = next, groups++;
    }
    const bool is_number = last_is_three && (western || indian) && groups <= kMostGroups;
    if (!is_number) return i;
    return separator == '.' && groups == 1 ? i : end;
  }

  // Digits with thousands and decimals. `ends_group`: 1 000 has a space.
  size_t read_decimal(size_t i, std::string& digits, bool with_spaces = true) const {
    const size_t begin = i;
    i = digits_end(i);
    char separator = 0;
    for (const char c : {',', '.', '\'', '_', with_spaces ? ' ' : kNarrowSpace}) {
      if (separator) continue;
      const size_t end = thousands_end(begin, i, c);
      if (end != i) separator = c, i = end;
    }
    // European: 1.000,00
    const size_t group = i + 4;
    const bool is_one_group = !separator && i > begin && i - begin <= 3 && at(begin) != '0' &&
                              at(i) == '.' && digits_end(i + 1) == group && at(group) == ',';
    const auto decimals = [&](size_t k) { return digits_end(k + 1) - (k + 1); };
    if (is_one_group && decimals(group) > 0 && decimals(group) != 3) separator = '.', i = group;
    for (size_t k = begin; k < i; k++) {
      if (is_digit(s_[k])) digits += s_[k];
    }
    const bool comma = separator && separator != ',' && separator != '\'' && separator != '_';
    const bool has_point =
        (at(i) == '.' && separator != '.') || (at(i) == ',' && comma && decimals(i) != 3);
    if (has_point && decimals(i) > 0) {
      const size_t end = digits_end(i + 1);
      digits += "." + s_.substr(i + 1, end - i - 1);
      i = end;
    }
    return i;
  }

  // 10^6, 10^{-3}, 10**6 at i: its end, or 0.
  size_t read_power_of_ten(size_t i, int& exponent) const {
    if (!has(i, "10")) return 0;
    i = blanks_end(i + 2);
    if (at(i) == '^')
      i++;
    else if (has(i, "**") && is_one_of(at(i + 2), "-0123456789"))
      i += 2;
    else
      return 0;
    const char open = at(i = blanks_end(i));
    const bool in_brackets = open == '{' || open == '(';
    i = blanks_end(i + in_brackets);
    const bool negative = at(i) == '-';
    i += negative || at(i) == '+';
    size_t end = digits_end(i);
    if (end == i || end > i + 3) return 0;
    exponent = std::stoi(s_.substr(i, end - i)) * (negative ? -1 : 1);
    if (in_brackets && at(end = blanks_end(end)) != (open == '{' ? '}' : ')')) return 0;
    return end + in_brackets;
  }

  Number read_one(size_t begin) const {
    Number n;
    n.begin = begin, n.is_negative = has_minus(begin);
    size_t i = n.end = read_decimal(begin, n.digits);
    const auto invalid = [&](size_t end) { return n.is_number = false, n.end = end, n; };
    // 3.5.2 and 2:30
    if (is_one_of(at(i), ".:") && is_digit(at(i + 1)) && i > begin) {
      while (is_one_of(at(i), ".:") && is_digit(at(i + 1))) i = digits_end(i + 1);
      return invalid(i);
    }
    read_exponent(n);
    i = n.end;
    if (!n.is_number) return n;
    const size_t next = blanks_end(i);
    if (at(next) == '^' || (has(i, "**") && is_digit(at(i + 2)))) return invalid(next + 1);
    if (at(next) == '/' && is_digit(at(blanks_end(next + 1)))) {
      i = read_decimal(blanks_end(next + 1), n.below, false);
      // A date or several divisions, and 3/2^5
      const size_t behind = blanks_end(i);
      if (at(behind) == '^' ||
          (is_one_of(at(behind), "/") && is_digit(at(blanks_end(behind + 1))))) {
        while (is_one_of(at(i), "/.") && is_digit(at(i + 1))) i = digits_end(i + 1);
        return invalid(std::max(i, behind));
      }
      if (n.below.find_first_not_of("0.") == std::string::npos) return invalid(i);
      n.end = i;
    } else {
      read_mixed(n);
      if (n.below.empty()) read_multiplier(n);
    }
    // 5x, 5\pi, 5\sqrt{2}
    const char behind = at(n.end);
    const bool is_factor = is_one_of(behind, "abeijnqruvxyzXYZ") &&
                           !std::isalnum(static_cast<unsigned char>(at(n.end + 1)));
    const size_t command = blanks_end(n.end);
    const bool at_command = at(command) == '\\' && is_letter(at(command + 1));
    if ((is_factor && !is_multiplication(n.end)) || (at_command && !has(command, "\\boxed"))) {
      return invalid(n.end);
    }
    const bool is_root = begin > 0 && at(begin - 1) == '{' && is_argument(begin - 1);
    if (is_root) return invalid(n.end);
    read_percent(n);
    return n;
  }
  // "3x 60": a letter x between two numbers.
  bool is_multiplication(size_t i) const {
    return (at(i) == 'x' || at(i) == 'X') && is_digit(at(blanks_end(i + 1)));
  }
  // { of \sqrt{, \frac{ or the second of \frac{}{
  bool is_argument(size_t brace) const {
    if (brace == 0) return false;
    if (at(brace - 1) == '}') return true;
    size_t name = brace;
    while (name > 0 && brace - name < 12 && is_letter(at(name - 1))) name--;
    return name < brace && name > 0 && at(name - 1) == '\\' && !has(name, "boxed");
  }

  // 1e6, 1.5 x 10^6 and 10^6
  void read_exponent(Number& n) const {
    size_t i = n.end;
    if (at(i) == 'e' || at(i) == 'E') {
      const size_t sign = i + 1, power = sign + (at(sign) == '-' || at(sign) == '+');
      const size_t last = digits_end(power);
      if (last > power && last <= power + 3 && !is_letter(at(last))) {
        n.exponent = std::stoi(s_.substr(power, last - power)) * (at(sign) == '-' ? -1 : 1);
        n.end = last;
      } else if (last > power) {
        n.is_number = false, n.end = last;
      }
      return;
    }
    if (const size_t end = read_power_of_ten(n.begin, n.exponent); end && n.digits == "10") {
      n.digits = "1", n.end = end;
      return;
    }
    i = blanks_end(i);
    if (has(i, "times "))
      i += 5;
    else if (is_one_of(at(i), "*xX") && !has(i, "**"))
      i++;
    else
      return;
    if (const size_t end = read_power_of_ten(blanks_end(i), n.exponent))
      n.end = end;
    else
      n.exponent = 0;
  }

  // The 1/2 of "1 1/2" and "1 and 1/2".
  void read_mixed(Number& n) const {
    if (n.exponent != 0 || n.digits.find('.') != std::string::npos || n.digits.size() > 9) return;
    size_t i = blanks_end(n.end);
    if (i == n.end) return;
    if (has(i, "and ")) i = blanks_end(i + 4);
    const size_t middle = digits_end(i), end = digits_end(middle + 1);
    if (middle == i || middle > i + 4 || at(middle) != '/' || end == middle + 1 || end > middle + 5)
      return;
    const std::string above = s_.substr(i, middle - i),
                      below = s_.substr(middle + 1, end - middle - 1);
    const bool ends = !is_one_of(at(end), "/^") && !(at(end) == '.' && is_digit(at(end + 1)));
    if (ends && std::stoi(above) < std::stoi(below)) n.above = above, n.below = below, n.end = end;
  }

  // 5 million, 70k, $5M
  void read_multiplier(Number& n) const {
    static constexpr std::pair<std::string_view, int> kWords[] = {
        {"hundred", 2}, {"thousand", 3}, {"million", 6}, {"billion", 9}, {"trillion", 12}};
    const size_t i = blanks_end(n.end);
    for (const auto& [word, exponent] : kWords) {
      if (!has(i, word) || is_letter(at(i + word.size()))) continue;
      n.exponent += exponent, n.end = i + word.size();
      return;
    }
    if (std::isalnum(static_cast<unsigned char>(at(n.end + 1)))) return;
    const bool is_money = n.begin > 0 && at(n.begin - 1) == '$';
    const char c = at(n.end);
    const int exponent = c == 'k' || (c == 'K' && is_money) ? 3
                         : c == 'M' && is_money             ? 6
                         : c == 'B' && is_money             ? 9
                                                            : 0;
    if (exponent) n.exponent += exponent, n.end++;
  }

  void read_percent(Number& n) const {
    size_t i = n.end;
    while (i < s_.size() && is_one_of(s_[i], " $)\x02")) i++;
    for (const std::string_view word : {"%", "percent", "per cent", "pct"}) {
      if (!has(i, word)) continue;
      n.is_percent = true, n.end = i + word.size();
      return;
    }
  }

  // A minus belongs to the number unless a digit, a letter or a bracket stands before the minus;
  // with blanks between them, only after one of = ( [ { : and #. So does the word "minus".
  bool has_minus(size_t i) const {
    const auto before = [&](size_t k) { return k > 0 ? s_[k - 1] : ' '; };
    while (before(i) == '$' || (is_one_of(before(i), "({") && i > 1 && before(i - 1) == '-')) i--;
    size_t sign = i;
    while (sign > 0 && is_one_of(before(sign), " \x02")) sign--;
    const size_t word = std::min<size_t>(sign, 8);
    if (sign < i && word >= 5) {
      const std::string said = ascii_lower(std::string_view(s_).substr(sign - word, word));
      const bool minus = said.ends_with("minus"), negative = said.ends_with("negative");
      if (negative && !is_letter(before(sign - 8))) return true;
      if (minus && !is_letter(before(sign - 5))) {
        size_t k = sign - 5;
        while (k > 0 && is_one_of(before(k), " $)\x02")) k--;
        return !is_digit(before(k)) && !is_one_of(before(k), "%");
      }
    }
    if (sign == 0 || (s_[sign - 1] != '-' && s_[sign - 1] != kLongDash)) return false;
    const bool touches = sign == i && s_[sign - 1] == '-';
    sign--;
    if (touches) {
      return !std::isalnum(static_cast<unsigned char>(before(sign))) &&
             !is_one_of(before(sign), ")]}-%\x01");
    }
    while (sign > 0 && is_one_of(before(sign), " $\x02")) sign--;
    return sign > 0 && is_one_of(before(sign), "=([{:#~");
  }

  // Digits of m2, x_1, x^{2}
  bool is_inside_word(size_t i) const {
    const auto before = [&](size_t k) { return k > 0 ? s_[k - 1] : ' '; };
    if (before(i) == 'x' || before(i) == 'X') {  // 3 x5
      size_t k = i - 1;
      while (k > 0 && before(k) == ' ') k--;
      if (is_digit(before(k))) return false;
    }
    if (is_letter(before(i))) return true;
    if (is_one_of(before(i), "-+")) i--;
    if (is_one_of(before(i), "{(") && is_one_of(before(i - 1), "^_")) i--;
    if (before(i) == '^') return true;
    return before(i) == '_' && i > 1 &&
           (std::isalnum(static_cast<unsigned char>(before(i - 1))) ||
            is_one_of(before(i - 1), ")}"));
  }

  void mark_operands(Number& a, Number& b) const {
    const char sign = joint(a, b);
    if (sign != 0 && is_one_of(sign, "+-*/")) a.is_operand = b.is_operand = true;
  }

  const std::string& s_;
};

// ---------------------------------------------------------------------------------------------
// The number that counts

// Plain text with its numbers.
class NumberText {
 public:
  explicit NumberText(std::string_view text)
      : plain_(plain_spelling(without_annotations(text))),
        reader_(plain_),
        numbers_(reader_.read()) {}
  NumberText(const NumberText&) = delete;
  NumberText& operator=(const NumberText&) = delete;

  // Each of these: no value where there is no such mark; an empty one where it has no number.
  using Marked = std::optional<std::string>;

  Marked behind_hashes() const {
    int headings = 0;
    for (size_t i = 0; (i = plain_.find("####", i)) != plain_.npos;) {
      i = std::min(plain_.find_first_not_of('#', i), plain_.size());
      const std::optional<size_t> k = number_behind(i, false);
      if (!k) continue;
      if (is_heading(numbers_[*k], headings + 1))
        headings++;
      else
        return chain_value(*k, plain_.size());
    }
    return {};
  }

  Marked in_box() const {
    Marked unreadable;
    for (const auto& [begin, end] : boxes()) {
      const std::string value = only_number(begin, end);
      if (!value.empty()) return value;
      if (first_number(begin) < first_number(end)) unreadable = "";
    }
    return unreadable;
  }

  Marked behind_answer() const {
    const std::string text = ascii_lower(plain_);
    constexpr std::string_view kAnswer = "answer";
    for (size_t i = 0; (i = text.find(kAnswer, i)) != text.npos;) {
      const bool is_word = i == 0 || !is_letter(text[i - 1]);
      i += kAnswer.size();
      const size_t verb = is_word ? verb_end(text, i) : 0;
      if (!verb) continue;
      const std::optional<size_t> k = number_behind(verb, true);
      if (k) return chain_value(*k, plain_.size());
    }
    return {};
  }

  std::string last() const {
    for (const bool with_operands : {false, true}) {
      for (size_t k = numbers_.size(); k-- > 0;) {
        if (!numbers_[k].is_number || (numbers_[k].is_operand && !with_operands)) continue;
        const std::string value = value_of(numbers_[k]);
        if (!value.empty()) return value;
      }
    }
    return "";
  }

  // The number that plain[begin, end) is, with a unit, a currency or "x =".
  std::string only_number(size_t begin, size_t end) const {
    constexpr size_t kLongest = 300;
    const size_t k = first_number(begin), last = first_number(end);
    if (end - begin > kLongest || k == last) return "";
    const std::string_view text = std::string_view(plain_).substr(0, end);
    std::string_view before = strip_ascii(text.substr(begin, numbers_[k].begin - begin));
    const size_t behind = std::min(numbers_[last - 1].end, end);
    bool flip = false;
    if (!before.empty() && is_one_of(before.back(), "+-")) {  // the sign, or "- 5"
      flip = before.back() == '-' && !numbers_[k].is_negative;
      before = strip_ascii(before.substr(0, before.size() - 1));
      if (!before.empty() && !is_one_of(before.back(), "=(:$#") && !numbers_[k].is_negative)
        return "";
    }
    if (!may_stand_before(before) || !may_stand_behind(text.substr(behind))) return "";
    if (last - k > 1) return chain_value(k, end, true);
    Number n = numbers_[k];
    n.is_negative ^= flip;
    return value_of(n);
  }
  std::string only_number() const { return only_number(0, plain_.size()); }

 private:
  size_t first_number(size_t offset) const {  // that begins at or behind the offset
    return size_t(std::ranges::lower_bound(numbers_, offset, {}, &Number::begin) -
                  numbers_.begin());
  }

  // [begin, end) of what is inside of each \boxed{}, in order. One that does not end is as long as
  // its line.
  std::vector<std::pair<size_t, size_t>> boxes() const {
    constexpr std::string_view kBox = "\\boxed{";
    std::vector<std::pair<size_t, size_t>> found;
    std::vector<size_t> open;  // index in found of each brace; size_t(-1): of another command
    for (size_t i = 0; i < plain_.size(); i++) {
      if (plain_[i] == '{') {
        const bool is_box =
            i + 1 >= kBox.size() && plain_.compare(i + 1 - kBox.size(), kBox.size(), kBox) == 0;
        open.push_back(is_box ? found.size() : size_t(-1));
        if (is_box) found.emplace_back(i + 1, 0);
      } else if (plain_[i] == '}' && !open.empty()) {
        if (open.back() != size_t(-1)) found[open.back()].second = i;
        open.pop_back();
      }
    }
    size_t line_end = 0;
    for (auto& [begin, end] : found) {
      if (end) continue;
      if (line_end < begin) line_end = std::min(plain_.find('\n', begin), plain_.size());
      end = line_end;
    }
    return found;
  }

  // The number directly behind plain[i]: white space, markup, currency and "x =" may stand between,
  // and, if `words`, a few words such as "about". Without `words` it is on the same line.
  std::optional<size_t> number_behind(size_t i, bool words) const {
    constexpr size_t kLongest = 80;
    const size_t k = first_number(i);
    if (k == numbers_.size() || numbers_[k].begin - i > kLongest) return {};
    const std::string between =
        ascii_lower(std::string_view(plain_).substr(i, numbers_[k].begin - i));
    for (size_t j = 0; j < between.size();) {
      const char c = between[j];
      if (is_letter(c)) {
        size_t end = j;
        while (end < between.size() && is_letter(between[end])) end++;
        const std::string_view word = std::string_view(between).substr(j, end - j);
        const size_t sign = std::min(between.find_first_not_of(' ', end), between.size());
        const bool is_variable = word.size() == 1 && between.compare(sign, 1, "=") == 0;
        const bool is_sign = word == "minus" || word == "negative";
        if (!is_variable && !is_sign && !(words && is_filler(word))) return {};
        j = end;
      } else if (c == '\n' ? words : (c & 0x80) || is_one_of(c, " \t\r*_`\"'$(:~=-+[{>\x01\x02")) {
        j++;
      } else {
        return {};
      }
    }
    return k;
  }
  static bool is_filler(std::string_view word) {
    for (const std::string_view filler :
         {"is",        "are",    "about", "approximately", "roughly", "around", "exactly",
          "therefore", "thus",   "hence", "then",          "simply",  "just",   "only",
          "equal",     "equals", "to",    "now",           "indeed",  "a",      "the",
          "total",     "of",     "be",    "usd",           "rs",      "also"}) {
      if (word == filler) return true;
    }
    return false;
  }

  // Behind "answer", where the sentence says what it is: "answer:", "answer to the question is",
  // "answer is". 0: it does not.
  static size_t verb_end(const std::string& text, size_t i) {
    constexpr size_t kWindow = 80;
    const size_t window = std::min(text.size(), i + kWindow);
    for (size_t begin = i; i < window;) {
      const char c = text[i];
      if (c == ':' || c == '=') return i + 1;
      if (c == '\n') {  // a heading
        const std::string_view before = std::string_view(text).substr(begin, i - begin);
        return before.find_first_not_of(" *_#`\r)") == before.npos ? i + 1 : 0;
      }
      if (is_digit(c) || is_one_of(c, ".!?;")) return 0;
      if (!is_letter(c)) {
        i++;
        continue;
      }
      size_t end = i;
      while (end < text.size() && is_letter(text[end])) end++;
      const std::string_view word = std::string_view(text).substr(i, end - i);
      if (word == "is" || word == "was" || word == "be" || word == "equals" || word == "becomes") {
        return end;
      }
      // "answers", and "the answer to what she is"
      if (i == begin || word == "that" || word == "what" || word == "who" || word == "how")
        return 0;
      i = end;
    }
    return 0;
  }

  // "#### 1. Add" is the first heading; "#### 18. Done" is none.
  bool is_heading(const Number& n, int number) const {
    if (n.digits != std::to_string(number)) return false;
    std::string_view behind = std::string_view(plain_).substr(n.end, 40);
    if (behind.empty() || !is_one_of(behind[0], ".):")) return false;
    behind.remove_prefix(std::min(behind.find_first_not_of("*_ ", 1), behind.size()));
    return !behind.empty() && is_letter(behind[0]);
  }

  // Of "5", "5 + 3 = 8" and "48/2 = 24", beginning with number k: what it comes to. Empty: several
  // numbers, or a sum without its value. `is_all`: no other number may follow before the end.
  std::string chain_value(size_t k, size_t end, bool is_all = false) const {
    bool is_sum = false;
    for (; k + 1 < numbers_.size() && numbers_[k + 1].begin < end; k++) {
      const Number& next = numbers_[k + 1];
      const char joint = reader_.joint(numbers_[k], next);
      const char behind = next.end < plain_.size() ? plain_[next.end] : ' ';
      const bool has_words =
          behind == ' ' && is_letter(next.end + 1 < plain_.size() ? plain_[next.end + 1] : ' ');
      if (joint == 0 && !is_all) break;
      if (joint == 0) return "";
      if (joint == ',') {
        const char sign = plain_[numbers_[k].end];
        if (sign == ',' && has_words) break;  // "18, 2 more than yesterday"
        return "";
      }
      is_sum = joint != '=';
    }
    return is_sum ? "" : value_of(numbers_[k]);
  }

  static bool may_stand_before(std::string_view text) {
    for (size_t i = 0; i < text.size(); i++) {
      const char last = i > 0 ? text[i - 1] : ' ';
      if (is_one_of(text[i], "<>+/^\\|;&-\x01")) return false;
      if (text[i] == '*' && (is_alphanumeric(last) || last == ')')) return false;
    }
    return true;
  }
  static bool may_stand_behind(std::string_view text) {
    if (text.starts_with('!')) return false;
    for (size_t i = 0; i < text.size(); i++) {
      const char last = i > 0 ? text[i - 1] : ' ', next = i + 1 < text.size() ? text[i + 1] : ' ';
      const char second = i + 2 < text.size() ? text[i + 2] : ' ';
      if (is_one_of(text[i], "=<>+\\|&")) return false;
      if (text[i] == '*' && is_letter(next)) return false;
      if (text[i] == '^' && !is_letter(last)) return false;
      // km/h and 18-year-old, not 5/x and 5 - x
      if (text[i] == '/' && !is_letter(last) && !(is_letter(next) && is_letter(second)))
        return false;
      if (text[i] == '-' && !(is_letter(next) && is_letter(second))) return false;
    }
    return true;
  }

  std::string plain_;
  NumberReader reader_;
  std::vector<Number> numbers_;
};

inline std::string number_that_counts(std::string_view part) {
  const NumberText text(part);
  if (const auto marked = text.behind_hashes()) return *marked;
  if (const auto marked = text.in_box()) return *marked;
  if (const auto marked = text.behind_answer()) return *marked;
  return text.last();
}

}  // namespace answers

inline std::string final_number(std::string_view text) {
  const std::string_view turn = answers::final_turn(text);
  const std::string_view part = answers::before_next_question(turn);
  const std::string number = answers::number_that_counts(answers::inside_answer_tags(part));
  if (!number.empty() || part.size() == turn.size()) return number;
  return answers::number_that_counts(answers::inside_answer_tags(turn));
}

inline std::string canonical_number(std::string_view written) {
  return answers::NumberText(written).only_number();
}

inline std::string reference_number(std::string_view answer) {
  const answers::NumberText text(answer);
  if (const auto marked = text.behind_hashes()) return *marked;
  if (const auto marked = text.in_box()) return *marked;
  return text.only_number();
}

inline bool is_same_number(const std::string& expected, const std::string& found) {
  const auto without_percent = [](const std::string& number) {
    return number.ends_with('%') ? number.substr(0, number.size() - 1) : number;
  };
  const std::string value = without_percent(expected);
  if (found.empty() || expected.empty()) return false;
  if (without_percent(found) == value) return true;
  if (!expected.ends_with('%') || found.ends_with('%')) return false;
  try {
    return exact_value("(" + value + ")/100") == found;
  } catch (const Error&) {  // more digits than the calculator has
    return false;
  }
}

// ---------------------------------------------------------------------------------------------
// Choices

namespace answers {

// A letter of plain text that may name a choice.
struct Mention {
  size_t begin, end;
  char letter;
  bool is_small;           // written b
  bool is_denied = false;  // "not B", "B is wrong", "rules out B"
};

// The letters A, B, ... that a text names. What is no choice: the article A, the pronoun I, a unit
// (100 C), an abbreviation (A.M.), a variable (A = 5), "vitamin C". Small letters count where they
// end a statement or stand in brackets; they are for callers that know what stands before them.
class ChoiceText {
 public:
  ChoiceText(std::string_view text, const OfferedChoices& choices)
      : choices_(choices), plain_(plain_spelling(text)) {
    for (char& c : plain_) {
      if (is_one_of(c, "*`")) c = ' ';
    }
    lower_ = ascii_lower(plain_);
    for (const std::string& text : choices.texts) {
      texts_.emplace_back(strip_ascii(plain_spelling(text)));
    }
    for (size_t i = 0; i < plain_.size(); i++) add_mention(i);
    // "A, B and D" are listed: what is denied of one is denied of all.
    listed_.resize(mentions_.size() + 1);
    for (size_t k = 0; k < mentions_.size(); k++) {
      Mention& m = mentions_[k];
      listed_[k] = k > 0 && is_list(mentions_[k - 1], m);
      m.is_denied = is_denied_before(m) || (listed_[k] && mentions_[k - 1].is_denied);
    }
    for (size_t k = mentions_.size(); k-- > 0;) {
      Mention& m = mentions_[k];
      m.is_denied |= listed_[k + 1] ? mentions_[k + 1].is_denied : is_denied_behind(m);
    }
  }

  char chosen() const {
    char letter = 0;
    if (in_box(letter) || stated(letter) || concluded(letter) || heads_text(letter) ||
        only_one(letter)) {
      return letter;
    }
    return by_text(statement());
  }

 private:
  char at(size_t i) const { return i < plain_.size() ? plain_[i] : ' '; }
  static bool is_alnum(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0; }

  void add_mention(size_t i) {
    const char c = at(i), before = i > 0 ? at(i - 1) : ' ', next = at(i + 1);
    const int upper = std::toupper(static_cast<unsigned char>(c));
    int index = upper - 'A';
    if (choices_.are_numbered && is_digit(c)) index = c - '1';
    if (index < 0 || index >= choices_.offered || is_alnum(before) || is_alnum(next)) return;
    if (!is_digit(c) && index == -1) return;
    if (choices_.are_numbered != is_digit(c)) return;
    const bool is_small = c >= 'a' && c <= 'z';
    const auto is_apostrophe = [&](size_t k, size_t beyond) {
      return at(k) == '\'' && is_alnum(at(beyond));
    };
    if (is_apostrophe(i + 1, i + 2) || (i > 1 && is_apostrophe(i - 1, i - 2))) return;
    if (is_one_of(next, "+#\\^_%") || is_one_of(before, "\\^_$#@") || before == '/' || next == '/')
      return;
    if (next == '-' && is_letter(at(i + 2))) return;  // B-cell
    if (before == '-' && i > 1 && is_alnum(at(i - 2))) return;
    if (next == '.' && is_letter(at(i + 2)) && is_one_of(at(i + 3), ".)")) return;  // A.M.
    if (before == '.' && i > 1 && is_letter(at(i - 2))) return;
    if (is_digit(c)) {
      if (is_one_of(next, ".,:") && is_digit(at(i + 2))) return;
      if (is_one_of(before, ".,:-") && i > 1 && is_digit(at(i - 2))) return;
    }
    size_t k = i;
    while (k > 0 && at(k - 1) == ' ') k--;
    const bool follows_number =
        k > 0 && k < i && is_digit(at(k - 1)) && is_one_of(char(upper), "CFKVAWJNLMGB");
    const bool follows_degree = k > 1 && plain_.compare(k - 2, 2, "\u00b0") == 0;
    if (!is_digit(c) && (follows_number || follows_degree || word_before(i) == "degrees" ||
                         word_before(i) == "vitamin" || word_before(i) == "hepatitis")) {
      return;
    }
    const size_t behind = std::min(plain_.find_first_not_of(' ', i + 1), plain_.size());
    if (behind > i + 1 && is_one_of(at(behind), "=+<>^")) return;
    const bool has_word = next == ' ' && behind == i + 2 && at(behind) >= 'a' && at(behind) <= 'z';
    if (is_small) {
      if (next == ' ' && behind < plain_.size() && is_letter(at(behind)) && at(behind) != c) return;
    } else if ((c == 'A' || c == 'I') && has_word && !is_named(i)) {
      return;
    }
    mentions_.push_back({i, i + 1, char('A' + index), is_small});
  }
  // "A is right", "option A would": the letter stands where an article cannot.
  bool is_named(size_t i) const {
    const std::string word = word_at(i + 2), before = word_before(i);
    for (const std::string_view verb :
         {"is", "was", "because", "since", "and", "or", "would", "seems", "must", "isn", "cannot",
          "are", "as", "can", "should", "looks", "makes", "fits"}) {
      if (word == verb && plain_[i] == 'A') return true;
    }
    return before == "option" || before == "choice" || before == "letter";
  }
  std::string word_at(size_t i) const {
    size_t end = i;
    while (end < plain_.size() && end < i + 20 && is_letter(plain_[end])) end++;
    return lower_.substr(std::min(i, lower_.size()), end - i);
  }
  // The word before plain_[i], with n't; brackets, quotes and colons between are skipped.
  std::string word_before(size_t i) const {
    while (i > 0 && is_one_of(plain_[i - 1], " (\"'[:")) i--;
    size_t begin = i;
    while (begin > 0 && i - begin < 20 &&
           (is_letter(plain_[begin - 1]) || plain_[begin - 1] == '\''))
      begin--;
    return lower_.substr(begin, i - begin);
  }
  size_t offset_of_word_before(size_t i) const {
    while (i > 0 && is_one_of(plain_[i - 1], " (\"'[:")) i--;
    const size_t end = i;
    while (i > 0 && end - i < 20 && (is_letter(plain_[i - 1]) || plain_[i - 1] == '\'')) i--;
    return i;
  }

  // "A, B", "B or C", "(A) and (B)"
  bool is_list(const Mention& a, const Mention& b) const {
    if (b.begin - a.end > 24) return false;
    std::string between;
    for (const char c : lower_.substr(a.end, b.begin - a.end)) {
      if (!is_one_of(c, " ()\"'[]")) between += c;
    }
    for (const std::string_view list : {",", "and", "or", ",and", ",or", "nor", "/", "&",
                                        "oroption", "andoption", ",option", "orchoice"}) {
      if (between == list) return true;
    }
    return false;
  }

  bool is_denied_before(const Mention& m) const {
    size_t i = m.begin;
    std::string word = word_before(i);
    for (int skipped = 0; skipped < 3; skipped++) {
      const bool is_filler = word == "option" || word == "choice" || word == "answer" ||
                             word == "the" || word == "options" || word == "choices" ||
                             word == "be";
      if (!is_filler) break;
      i = offset_of_word_before(i), word = word_before(i);
    }
    for (const std::string_view denial :
         {"not",      "eliminate", "eliminates", "eliminated", "eliminating", "exclude",
          "excludes", "excluding", "excluded",   "except",     "unlike",      "reject",
          "rejects",  "neither",   "nor",        "than",       "discard",     "isn't",
          "wasn't",   "cannot",    "can't"}) {
      if (word == denial) return true;
    }
    const std::string earlier = word_before(offset_of_word_before(i));
    return word == "out" &&
           (earlier == "rule" || earlier == "rules" || earlier == "ruled" || earlier == "ruling");
  }

  // What stands behind a mention in its sentence, without the choice's own text: " is wrong".
  std::string_view behind(const Mention& m) const {
    size_t i = m.end;
    while (i < lower_.size() && is_one_of(lower_[i], " )\"']")) i++;
    return std::string_view(lower_).substr(i, 60);
  }
  bool is_denied_behind(const Mention& m) const {
    std::string_view text = behind(m);
    text = text.substr(0, text.find_first_of("\n;!?"));
    if (text.starts_with("answer ")) text.remove_prefix(7);
    for (const std::string_view verb :
         {"is ", "are ", "was ", "were ", "would be ", "seems ", ", which is "}) {
      if (!text.starts_with(verb)) continue;
      text.remove_prefix(verb.size());
      for (const std::string_view word :
           {"also ", "clearly ", "simply ", "obviously ", "all ", "both "}) {
        if (text.starts_with(word)) text.remove_prefix(word.size());
      }
      for (const std::string_view denial :
           {"not", "incorrect", "wrong", "false", "invalid", "ruled out", "eliminated", "out",
            "a distractor", "no ", "untrue", "impossible", "irrelevant"}) {
        if (text.starts_with(denial)) return true;
      }
      return false;
    }
    for (const std::string_view denial :
         {"isn't", "aren't", "cannot be", "can't be", "can be ruled out", "can be eliminated",
          "doesn't", "does not", "do not", "wrong", "incorrect", "wasn't", "won't"}) {
      if (text.starts_with(denial)) return true;
    }
    return false;
  }

  // Sets `letter` to that of mention k, or to 0 where others are listed behind it. Returns the last
  // mention of the list.
  size_t choose(size_t k, char& letter) const {
    letter = mentions_[k].letter;
    for (; listed_[k + 1]; k++) {
      if (mentions_[k + 1].letter != letter) letter = 0;
    }
    return k;
  }

  // The last \boxed{} that holds a letter, or the text of a choice.
  bool in_box(char& letter) const {
    constexpr std::string_view kBox = "\\boxed{";
    bool found = false;
    for (size_t i = 0; (i = plain_.find(kBox, i)) != plain_.npos;) {
      i += kBox.size();
      const size_t begin = std::min(plain_.find_first_not_of(" (", i), plain_.size());
      const auto m = std::ranges::lower_bound(mentions_, begin, {}, &Mention::begin);
      const size_t behind = std::min(plain_.find_first_not_of(" )", begin + 1), plain_.size());
      if (m != mentions_.end() && m->begin == begin && is_one_of(at(behind), "}.:,-)\n")) {
        choose(size_t(m - mentions_.begin()), letter), found = true;
      } else if (const char named = by_text(
                     plain_.substr(i, std::min<size_t>(200, plain_.substr(i, 200).find('}'))))) {
        letter = named, found = true;
      }
    }
    return found;
  }

  // "The answer is B", "Answer: (b)", "B is the correct answer", "correct option: B": the last one.
  bool stated(char& letter) const {
    bool found = false;
    for (size_t k = 0; k < mentions_.size(); k++) {
      if (mentions_[k].is_denied) continue;
      if (!follows_statement(mentions_[k]) && !is_affirmed(mentions_[k])) continue;
      k = choose(k, letter), found = true;
    }
    return found;
  }
  // Whether the words before a mention, back to "answer", "choice", "option" or "correct", say it.
  bool follows_statement(const Mention& m) const {
    constexpr size_t kWords = 10;
    size_t i = m.begin;
    bool has_verb = false;
    for (size_t n = 0; n < kWords; n++) {
      size_t k = i;
      while (k > 0 &&
             (is_one_of(plain_[k - 1], " ([\"'{$_\n:=>#,-\x01\x02") || (plain_[k - 1] & 0x80))) {
        k--;
        has_verb = has_verb || is_one_of(plain_[k], ":=\n>-\x01");
      }
      size_t begin = k;
      while (begin > 0 && k - begin < 20 &&
             (is_letter(plain_[begin - 1]) || plain_[begin - 1] == '\''))
        begin--;
      const std::string word = lower_.substr(begin, k - begin);
      if (word == "answer" || word == "choice" || word == "option" || word == "solution" ||
          word == "conclusion") {
        return has_verb || !m.is_small || m.end >= plain_.size() || is_one_of(at(m.end), ").:\n");
      }
      if (word == "correct" && has_verb) return true;
      static constexpr std::string_view kVerbs[] = {"is", "was", "be", "as"};
      static constexpr std::string_view kFillers[] = {
          "the",    "therefore", "thus",      "clearly", "definitely", "probably", "most",
          "likely", "should",    "would",     "must",    "seems",      "to",       "appears",
          "i",      "believe",   "think",     "it",      "it's",       "that",     "letter",
          "indeed", "then",      "hence",     "so",      "either",     "number",   "simply",
          "one",    "will",      "statement", "here",    "question",   "this",     "for",
          "final",  "my",        "best",      "correct"};
      if (std::ranges::find(kVerbs, word) != std::end(kVerbs))
        has_verb = true;
      else if (word.empty() || std::ranges::find(kFillers, word) == std::end(kFillers))
        return false;
      i = begin;
    }
    return false;
  }
  // "B is the correct answer", "B is right", "C, my final answer"
  bool is_affirmed(const Mention& m) const {
    std::string_view text = behind(m);
    if (text.starts_with(", ")) text.remove_prefix(2);
    if (text.starts_with("answer ")) text.remove_prefix(7);
    const bool mine = text.starts_with("my ") || text.starts_with("the correct answer");
    bool has_verb = false;
    for (const std::string_view verb : {"is ", "would be ", "must be ", "should be ", "seems "}) {
      if (!has_verb && text.starts_with(verb)) text.remove_prefix(verb.size()), has_verb = true;
    }
    if (!has_verb && !mine) return false;
    for (const std::string_view word :
         {"clearly ", "therefore ", "indeed ", "the ", "my ", "a ", "most ", "only ", "final "}) {
      if (text.starts_with(word)) text.remove_prefix(word.size());
    }
    for (const std::string_view word :
         {"correct", "right", "best", "true", "answer", "accurate", "appropriate", "likely"}) {
      if (text.starts_with(word)) return true;
    }
    return false;
  }

  // "I choose C", "so C", "leaving D", "it must be A": the last one.
  bool concluded(char& letter) const {
    bool found = false;
    for (size_t k = 0; k < mentions_.size(); k++) {
      const Mention& m = mentions_[k];
      if (m.is_denied) continue;
      size_t i = m.begin;
      std::string word = word_before(i);
      for (int n = 0; n < 3 && (word == "option" || word == "choice" || word == "answer" ||
                                word == "letter" || word == "the");
           n++) {
        i = offset_of_word_before(i), word = word_before(i);
      }
      const std::string earlier = word_before(offset_of_word_before(i));
      const bool is_verb =
          word == "choose" || word == "chose" || word == "pick" || word == "picked" ||
          word == "select" || word == "selected" || word == "leaving" || word == "leaves" ||
          word == "so" || word == "therefore" || word == "thus" || word == "hence" ||
          word == "guess" || word == "think" || word == "believe" || word == "mark" ||
          word == "it's" || (word == "with" && (earlier == "go" || earlier == "going")) ||
          ((word == "is" || word == "be") &&
           (earlier == "it" || earlier == "must" || earlier == "should" || earlier == "that")) ||
          (word == "for" && (earlier == "opt" || earlier == "go"));
      if (!is_verb || (m.is_small && word == "so")) continue;
      k = choose(k, letter), found = true;
    }
    return found;
  }

  // "B", "(B)", "b) red" and "B. red" at the beginning, where no other line begins so.
  bool heads_text(char& letter) const {
    char head = 0;
    for (const Mention& m : mentions_) {
      size_t k = m.begin;
      while (k > 0 && is_one_of(plain_[k - 1], " (\"'[#_-")) k--;
      if (k > 0 && plain_[k - 1] != '\n') continue;
      const bool is_marked = is_one_of(at(m.end), ").:\n,\x01]-\"'") || m.end == plain_.size();
      if (!is_marked || m.is_denied) continue;
      if (head && head != m.letter) return false;
      if (!head && !strip_ascii(std::string_view(plain_).substr(0, k)).empty()) return false;
      head = m.letter;
    }
    if (!head) return false;
    // "B or C"
    const auto first = std::ranges::find(mentions_, head, &Mention::letter);
    choose(size_t(first - mentions_.begin()), letter);
    return true;
  }

  // The only letter that the text names, small ones left aside.
  bool only_one(char& letter) const {
    char only = 0;
    for (const Mention& m : mentions_) {
      if (m.is_small || m.is_denied) continue;
      if (only && only != m.letter) return letter = 0, true;
      only = m.letter;
    }
    return letter = only, only != 0;
  }

  // The sentence behind the last "answer", or else the whole text.
  std::string statement() const {
    const size_t said = lower_.rfind("answer");
    if (said == lower_.npos) return plain_;
    const size_t begin = std::min(plain_.find_first_not_of(" :_\n", said + 6), plain_.size());
    return plain_.substr(begin, plain_.find('\n', begin) - begin);
  }

  // The choice whose text stands in `text`, if it is one.
  char by_text(const std::string& text) const {
    std::vector<size_t> found;
    for (size_t i = 0; i < texts_.size(); i++) {
      if (contains_words(text, texts_[i]) && !contains_words(text, "not " + texts_[i])) {
        found.push_back(i);
      }
    }
    // Of "carbon" and "carbon dioxide" the longer one.
    const std::vector<size_t> all = found;
    std::erase_if(found, [&](size_t i) {
      return std::ranges::any_of(all, [&](size_t j) {
        return texts_[j].size() > texts_[i].size() && contains_words(texts_[j], texts_[i]);
      });
    });
    return found.size() == 1 ? char('A' + found[0]) : 0;
  }

  const OfferedChoices& choices_;
  std::string plain_, lower_;
  std::vector<std::string> texts_;  // of the choices, in plain spelling
  std::vector<Mention> mentions_;
  std::vector<bool> listed_;  // of each mention: whether it continues a list; false behind the last
};

}  // namespace answers

inline char chosen_letter(std::string_view text, const OfferedChoices& choices) {
  return answers::ChoiceText(answers::answer_part(text), choices).chosen();
}

// ---------------------------------------------------------------------------------------------
// Arithmetic

namespace answers {

// Arithmetic of plain text and what stands at its side: "3*7+5", "21+5" and "26" of
// "3*7+5 = 21+5 = 26".
struct Expression {
  std::string text;
  size_t chain;  // sides of one equation have the same
};

// The text as the calculator reads it: brackets are round, an x between operands is *, and ** at a
// space is no operator.
inline std::string calculator_spelling(std::string_view text) {
  std::string s = plain_spelling(text), out;
  const auto at = [&](size_t i) { return i < s.size() ? s[i] : ' '; };
  const auto is_operand_begin = [&](size_t i) {
    while (at(i) == ' ' && i < s.size()) i++;
    return is_digit(at(i)) || is_one_of(at(i), "([");
  };
  char last = ' ';  // that is no space
  for (size_t i = 0; i < s.size(); i++) {
    const char c = s[i];
    const bool behind_operand = is_digit(last) || is_one_of(last, ")]");
    if (c == '*' && at(i + 1) == '*') {
      const bool is_power =
          behind_operand && i > 0 && s[i - 1] != ' ' && is_operand_begin(i + 2) && at(i + 2) != ' ';
      out += is_power ? "^" : "  ", i++;
      continue;
    }
    if (is_one_of(c, "xX") && behind_operand && is_operand_begin(i + 1))
      out += '*';
    else if (is_one_of(c, "[{"))
      out += '(';
    else if (is_one_of(c, "]}"))
      out += ')';
    else if (c == kNarrowSpace || c == '$' || c == '\t' || c == '`')
      out += ' ';
    else
      out += c;
    if (c != ' ') last = c;
  }
  return out;
}

// Where a line begins with a list's mark ("- ", "* ", "1. ", "2) "), its length.
inline size_t list_mark(std::string_view line) {
  const size_t begin = std::min(line.find_first_not_of(' '), line.size());
  size_t end = begin;
  if (end < line.size() && is_one_of(line[end], "-*+")) {
    end++;
  } else {
    while (end < line.size() && end < begin + 3 && is_digit(line[end])) end++;
    if (end == begin || end >= line.size() || !is_one_of(line[end], ".):")) return 0;
    end++;
  }
  return end < line.size() && line[end] == ' ' ? end + 1 : 0;
}

// The longest expressions of a line, in order, in one pass.
inline void read_expressions(std::string_view line, size_t& chain, std::vector<Expression>& out) {
  size_t i = list_mark(line);
  std::string text;      // of the expression so far
  size_t complete = 0;   // so much of it is complete
  int depth = 0;         // of brackets
  bool operand = false;  // the last part is an operand
  const auto finish = [&](bool is_equation) {
    // The bracket of "(3*7+5 = 26)" is the sentence's.
    if (is_equation && complete == 0 && depth > 0 && operand &&
        text.find_first_not_of("( ") >= size_t(depth)) {
      text.erase(0, size_t(depth)), complete = text.size();
    }
    const std::string_view whole = strip_ascii(std::string_view(text).substr(0, complete));
    if (!whole.empty()) out.push_back({std::string(whole), chain});
    text.clear(), complete = 0, depth = 0, operand = false;
  };
  for (; i < line.size(); i++) {
    const char c = line[i];
    const bool touches = i > 0 && line[i - 1] != ' ';
    if (is_digit(c) || (c == '.' && i + 1 < line.size() && is_digit(line[i + 1]) && !operand)) {
      const bool in_word =
          i > 0 && (is_letter(line[i - 1]) || line[i - 1] == '^' || line[i - 1] == '_');
      size_t end = std::min(line.find_first_not_of(kDigits, i), line.size());
      while (end + 3 < line.size() && line[end] == ',' && is_digit(line[end + 1]) &&
             std::min(line.find_first_not_of(kDigits, end + 1), line.size()) == end + 4) {
        end += 4;
      }
      if (end + 1 < line.size() && line[end] == '.' && is_digit(line[end + 1])) {
        end = std::min(line.find_first_not_of(kDigits, end + 1), line.size());
      }
      if (c == '.') end = std::min(line.find_first_not_of(kDigits, i + 1), line.size());
      if (operand && touches && line[i - 1] == ')') text += '*', operand = false;  // (2)3
      if (operand || in_word) finish(false), chain++;
      if (!in_word) {
        for (const char digit : line.substr(i, end - i)) {
          if (digit != ',') text += digit;
        }
        operand = true;
        if (depth == 0) complete = text.size();
      }
      i = end - 1;
    } else if (c == '(') {
      if (operand && touches) text += '*', operand = false;  // 3(7)
      if (operand) finish(false), chain++;
      text += c, depth++;
    } else if (c == ')') {
      if (!operand || depth == 0) {
        finish(true);
        continue;
      }
      text += c, depth--;
      if (depth == 0) complete = text.size();
    } else if (is_one_of(c, "+-*/")) {
      const bool is_sign = !operand && is_one_of(c, "+-");
      if (!operand && !is_sign)
        finish(false), chain++;
      else
        text += c, operand = false;
    } else if (c == ' ') {
      text += c;
    } else if (c == '=') {
      finish(true);
    } else {
      finish(false), chain++;
    }
  }
  finish(false), chain++;
}

// The operands of an expression in canonical form, without operators: no minus belongs to a number.
inline std::multiset<std::string> operands_of(std::string_view expression) {
  std::multiset<std::string> operands;
  for (size_t i = 0, end; i < expression.size(); i = end) {
    end = std::min(expression.find_first_not_of("0123456789.", i), expression.size());
    if (end > i) operands.insert(canonical_digits(false, expression.substr(i, end - i), 0));
    end = std::min(expression.find_first_of("0123456789.", end), expression.size());
  }
  return operands;
}

inline std::vector<Expression> expressions_of(std::string_view text) {
  const std::string s = calculator_spelling(text);
  std::vector<Expression> found;
  size_t chain = 0;
  for (size_t i = 0; i < s.size();) {
    const size_t end = std::min(s.find('\n', i), s.size());
    read_expressions(std::string_view(s).substr(i, end - i), chain, found);
    i = end + 1;
  }
  return found;
}

// The inside of the last \boxed{} of plain text; empty: there is none.
inline std::string inside_last_box(const std::string& plain) {
  constexpr std::string_view kBox = "\\boxed{";
  const size_t box = plain.rfind(kBox);
  if (box == plain.npos) return "";
  const size_t begin = box + kBox.size();
  size_t end = begin;
  for (int depth = 1; end < plain.size(); end++) {
    depth += plain[end] == '{' ? 1 : plain[end] == '}' ? -1 : 0;
    if (depth == 0) break;
  }
  return plain.substr(begin, end - begin);
}

// The arithmetic that counts, of the sides of equations; empty: none.
inline std::string counting_arithmetic(std::string_view text,
                                       const std::multiset<std::string>& numbers,
                                       const std::string& target) {
  constexpr size_t kLongest = 64;  // of an operand and what stands around it
  const std::vector<Expression> found = expressions_of(text);
  std::vector<bool> is_claimed(found.empty() ? 0 : found.back().chain + 1);
  for (const Expression& e : found) {
    const bool negative = e.text[0] == '-';
    const std::string_view digits = std::string_view(e.text).substr(negative);
    if (digits.find_first_not_of("0123456789.") != digits.npos) continue;
    if (canonical_digits(negative, digits, 0) == target) is_claimed[e.chain] = true;
  }
  std::string last, claimed;
  for (const Expression& e : found) {
    if (e.text.find_first_of("+-*/", 1) == e.text.npos) continue;
    if (e.text.size() > kLongest * numbers.size()) continue;
    const std::multiset<std::string> operands = operands_of(e.text);
    if (operands.size() < 2 || !std::ranges::includes(numbers, operands)) continue;
    (is_claimed[e.chain] ? claimed : last) = e.text;
  }
  return claimed.empty() ? last : claimed;
}

}  // namespace answers

inline std::string final_arithmetic(std::string_view text,
                                    const std::multiset<std::string>& numbers,
                                    const std::string& target) {
  const std::string_view part = answers::answer_part(text);
  const std::string boxed = answers::inside_last_box(answers::plain_spelling(part));
  const std::string in_box = answers::counting_arithmetic(boxed, numbers, target);
  return in_box.empty() ? answers::counting_arithmetic(part, numbers, target) : in_box;
}

}  // namespace cake
