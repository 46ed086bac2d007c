// Is this answer right? For the rewards of `./rlhf` and for `./chat eval`.
//
//     (problem, text of the answer) -> verifier -> 1 right, 0 wrong, or another reward
//
// A verifier sees the problem and the text. It does not know rollouts, tokens or models. Each has a
// name, as in `./rlhf grpo --reward number`; `answer`, `numbers`, `target` and `rubric` are keys of
// the problem's JSON line:
//
//     number          the final number of the text is that of `answer`
//     exact           the text equals `answer`; white space around both is ignored
//     choice          the letter that the text chooses is the letter of `answer`
//     countdown       the last sum of the text that uses `numbers` alone makes `target`
//     countdown:all   the same, and it uses all of them
//     check:CMD       the user's program CMD says 1 (right) or 0 (wrong)
//     command:CMD     the user's program CMD gives any number
//     rubric          the mean mark from 0 to 1 by the criteria of `rubric` (cake/rubric.h)
//     format:PATTERN  the text has this form, where * is any text
//
// Before a run, `check_problem` finds the problems that a verifier could not judge, and `try_out`
// starts the user's program.
//
// An item of `./chat eval` says by itself what is right, in its "check":
//
//     {"type": "number", "value": "42"}  the last number of the answer is 42
//     {"type": "contains", "any": ["baker"], "none": ["sailor"]}  whole words, case ignored
//     {"type": "exact", "text": "..."}  the answer is this text, white space around it ignored
//     {"type": "refuses"}  the answer says that it does not know or cannot help
//     {"type": "answers"}  it does not say so
//     {"type": "tool", "name": "search", "then": {...}}  the tool was called, and the answer passes
//                                                        the check `then`
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/json.h"
#include "cake/rubric.h"
#include "cake/run.h"
#include "cake/tools.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Verifiers by name

struct Problem {  // one line of a problems file
  std::string question;
  std::string answer;  // as in the file, often with the steps that lead to it; empty: none
  Json line;           // the whole line: a countdown's numbers and target, an id
  Rubric rubric;       // empty: none
  std::string where;   // file:line, for messages
};

struct Attempt {  // at a problem
  const Problem* problem;
  std::string_view text;
  bool ended = true;  // the model ended its turn; false: a length limit cut the text off
};

struct Verifier {
  bool is_pass_fail;  // true: a score is 1 (right) or 0 (wrong); false: a score is any reward
  // The score of each attempt; NaN where the verifier itself failed.
  std::function<std::vector<float>(std::span<const Attempt>)> score;
  // Both may be empty. Fails where a problem lacks what the verifier needs:
  std::function<void(const Problem&)> check_problem;
  // Fails unless the verifier judges an attempt at this problem:
  std::function<void(const Problem&)> try_out;
};

struct CommandLimits {                // on the user's program
  double seconds = 10;                // for each answer
  double start_seconds = 60;          // more for the first one
  int64_t memory = int64_t(4) << 30;  // bytes of address space; 0: any
  int processes = 64;                 // that the user may have beside those at the start
  int verifiers = 1;                  // processes of it at once
};

inline bool right_number(const Problem&, std::string_view text);
inline bool right_exact(const Problem&, std::string_view text);
inline bool right_choice(const Problem&, std::string_view text);
inline bool right_countdown(const Problem&, std::string_view text, bool all = false);
inline std::string expected_number(const Problem&);  // these fail where there is none
inline std::string_view expected_text(const Problem&);
inline char expected_choice(const Problem&);
struct Countdown {
  std::multiset<std::string> numbers;  // in canonical form, like the target
  std::string target;
};
inline Countdown countdown_of(const Problem&);
inline bool matches_pattern(std::string_view pattern, std::string_view text);
inline std::string form_text(const std::string& form);
inline Verifier command_verifier(const std::string& command, const CommandLimits& limits,
                                 bool is_pass_fail, const std::string& where);

// The verifier of this name, or none. `where` begins error messages: it is the flag that the user
// gave.
inline std::optional<Verifier> make_verifier(const std::string& name, const std::string& argument,
                                             const CommandLimits& limits,
                                             const std::string& where = "--reward") {
  const auto each = [](bool is_pass_fail, auto score, auto check_problem) {
    return Verifier{is_pass_fail,
                    [score](std::span<const Attempt> attempts) {
                      std::vector<float> scores;
                      for (const Attempt& a : attempts) scores.push_back(float(score(a)));
                      return scores;
                    },
                    check_problem,
                    {}};
  };
  const auto pass_fail = [&](auto is_right, auto expected) {
    return each(
        true, [is_right](const Attempt& a) { return is_right(*a.problem, a.text); },
        [expected](const Problem& p) { expected(p); });
  };
  const auto need_argument = [&](const char* what) {
    if (argument.empty()) fail(where, " ", name, ": expected ", name, ":", what);
  };
  if (name == "number") return pass_fail(right_number, expected_number);
  if (name == "exact") return pass_fail(right_exact, expected_text);
  if (name == "choice") return pass_fail(right_choice, expected_choice);
  if (name == "countdown") {
    if (!argument.empty() && argument != "all") {
      fail(where, " countdown: found ", argument, ", expected countdown or countdown:all");
    }
    const bool all = !argument.empty();
    return pass_fail(
        [all](const Problem& p, std::string_view text) { return right_countdown(p, text, all); },
        countdown_of);
  }
  if (name == "command" || name == "check") {
    need_argument("a shell command");
    return command_verifier(argument, limits, name == "check", where + " " + name);
  }
  if (name == "rubric") {
    const auto check_problem = [](const Problem& p) {
      if (p.rubric.empty()) fail(p.where, ": rubric is missing");
    };
    return each(
        false, [](const Attempt& a) { return true_reward(a.problem->rubric, a.text, a.ended); },
        check_problem);
  }
  if (name == "format") {
    need_argument("PATTERN, where * is any text");
    return each(
        true,
        [pattern = form_text(argument)](const Attempt& a) {
          return matches_pattern(pattern, a.text);
        },
        [](const Problem&) {});
  }
  return std::nullopt;
}

// ---------------------------------------------------------------------------------------------
// Checks: what an item of `./chat eval` says is right

using Check = OrderedJson;  // {"type", ...}, as above

inline std::string canonical_number(std::string_view written);
inline std::string final_number(std::string_view answer);
inline bool refuses(std::string_view answer);

// `tools`: the names of the tools that the model called before it answered.
inline bool passes(const Check& check, std::string_view answer,
                   const std::set<std::string>& tools = {}) {
  const std::string type = check.at("type");
  const auto text = [&](const char* key) { return check.at(key).get<std::string>(); };
  if (type == "number") return final_number(answer) == canonical_number(text("value"));
  if (type == "exact") return strip_ascii(answer) == strip_ascii(text("text"));
  if (type == "refuses") return refuses(answer);
  if (type == "answers") return !refuses(answer);
  if (type == "tool") return tools.count(text("name")) && passes(check.at("then"), answer, tools);
  const std::vector<std::string> none, any_of = check.value("any", none);
  const std::vector<std::string> none_of = check.value("none", none);
  const auto has = [&](const std::string& words) { return contains_words(answer, words); };
  return (any_of.empty() || std::any_of(any_of.begin(), any_of.end(), has)) &&
         std::none_of(none_of.begin(), none_of.end(), has);
}

// Fails unless `json` is a check.
inline Check parse_check(const Json& json, const std::string& where) {
  const auto type = json_get<std::string>(json, "type", where);
  if (type == "contains") {
    using Words = std::vector<std::string>;
    const bool any = !json_get_or<Words>(json, "any", {}, where).empty();
    const bool none = !json_get_or<Words>(json, "none", {}, where).empty();
    if (!any && !none) fail(where, ": any: found no words, expected some");
  } else if (type == "number") {
    const auto value = json_get<std::string>(json, "value", where);
    require(!canonical_number(value).empty(), where, ": value: found ", json_text(value),
            ", expected a number");
  } else if (type == "exact") {
    json_get<std::string>(json, "text", where);
  } else if (type == "tool") {
    json_get<std::string>(json, "name", where);
    parse_check(json_get<Json>(json, "then", where), where + ": then");
  } else if (type != "refuses" && type != "answers") {
    fail(where, ": type: found ", json_text(type),
         ", expected contains, number, refuses, answers, exact or tool");
  }
  return json;
}

// ---------------------------------------------------------------------------------------------
// Numbers

// The text with one spelling of what has several: a minus is -, an apostrophe ', LaTeX's 9{,}500 is
// 9,500 and \frac{3}{4} is 3/4.
inline std::string plain_spelling(std::string_view text) {
  static constexpr std::pair<std::string_view, std::string_view> kSpellings[] = {
      {"\u2212", "-"},        {"\u2013", "-"},  {"\u2019", "'"}, {"\u00d7", "*"},
      {"\u00f7", "/"},        {"\\times", "*"}, {"\\div", "/"},  {"\\cdot", "*"},
      {"{,}", ","},           {"\\,", ","},     {"\\!", ""},     {"\\dfrac{", "\\frac{"},
      {"\\tfrac{", "\\frac{"}};
  std::string out(text);
  for (const auto& [spelled, plain] : kSpellings) {
    for (size_t i = 0; (i = out.find(spelled, i)) != out.npos; i += plain.size()) {
      out.replace(i, spelled.size(), plain);
    }
  }
  const auto digits_end = [&](size_t i) {
    return std::min(out.find_first_not_of("0123456789", i), out.size());
  };
  for (size_t i = 0; (i = out.find("\\frac{", i)) != out.npos; i++) {
    const size_t above = i + 6, middle = digits_end(above);
    if (out.compare(middle, 2, "}{") != 0) continue;
    const size_t below = middle + 2, end = digits_end(below);
    if (middle == above || end == below || out.compare(end, 1, "}") != 0) continue;
    const bool is_mixed = i > 0 && std::isdigit(static_cast<unsigned char>(out[i - 1]));
    out.replace(i, end + 1 - i,
                concat(is_mixed ? " " : "", out.substr(above, middle - above), "/",
                       out.substr(below, end - below)));
  }
  return out;
}

// Digits with at most one point, times 10 to the power of `exponent`, in canonical form: no sign
// but -, no leading zeros, no trailing zeros of a fraction, no point at the end.
inline std::string canonical_digits(bool negative, std::string_view written, int exponent) {
  const size_t point = std::min(written.find('.'), written.size());
  std::string digits(written);
  digits.erase(point, 1);
  int whole = int(point) + exponent;  // digits before the point
  if (whole < 0) digits.insert(0, size_t(-std::exchange(whole, 0)), '0');
  digits.resize(std::max(digits.size(), size_t(whole)), '0');
  const size_t first = std::min(digits.find_first_not_of('0'), size_t(whole));
  const size_t last = digits.find_last_not_of('0');
  if (last == digits.npos) return "0";
  const std::string above = digits.substr(first, size_t(whole) - first);
  return (negative ? "-" : "") + (above.empty() ? "0" : above) +
         (int(last) < whole ? "" : "." + digits.substr(size_t(whole), last + 1 - size_t(whole)));
}

// True where the number that begins at s[i] is negative. A minus belongs to the number unless a
// digit, a letter or a bracket stands before the minus; with blanks between them, only after one of
// = ( [ { and :
inline bool is_negative(std::string_view s, size_t i) {
  const auto before = [&](size_t k) { return k > 0 ? s[k - 1] : ' '; };
  const auto is_in = [](char c, std::string_view set) { return set.find(c) != set.npos; };
  while (before(i) == '$') i--;
  size_t sign = i;
  while (sign > 0 && before(sign) == ' ') sign--;
  if (sign == 0 || s[--sign] != '-') return false;
  if (sign + 1 == i) {
    return !std::isalnum(static_cast<unsigned char>(before(sign))) && !is_in(before(sign), ")]}-");
  }
  while (sign > 0 && before(sign) == ' ') sign--;
  return is_in(before(sign), "=([{:");
}

// The numbers of a text in canonical form, in order. A comma is part of a number when exactly three
// digits follow. 3/4 is 0.75, 1e5 is 100000. What touches a letter on its left, as in m2, or is a
// power, as in 10^6, is no number.
inline std::vector<std::string> numbers_in(std::string_view text) {
  const std::string plain = plain_spelling(text), s = plain + "    ";
  const auto digit = [&](size_t i) { return std::isdigit(static_cast<unsigned char>(s[i])) != 0; };
  const auto letter = [&](size_t i) { return std::isalpha(static_cast<unsigned char>(s[i])) != 0; };
  const auto digits_end = [&](size_t i) { return s.find_first_not_of("0123456789", i); };
  std::vector<std::string> numbers;
  for (size_t i = 0, end; i < plain.size(); i = end) {
    end = i + 1;
    const bool begins = digit(i) || (s[i] == '.' && digit(i + 1) && (i == 0 || !digit(i - 1)));
    if (!begins) continue;
    end = digits_end(i);
    std::string written = s.substr(i, end - i);
    while (s[end] == ',' && digits_end(end + 1) == end + 4) {
      written += s.substr(end + 1, 3), end += 4;
    }
    if (s[end] == '.' && digit(end + 1)) {
      const size_t point = std::exchange(end, digits_end(end + 1));
      written += s.substr(point, end - point);
    }
    int exponent = 0;
    if (s[end] == 'e' || s[end] == 'E') {
      const size_t sign = end + 1, power = sign + (s[sign] == '-' || s[sign] == '+');
      const size_t last = digits_end(power);
      if (last > power && last <= power + 2 && !letter(last)) {
        exponent = std::stoi(s.substr(sign, last - sign)), end = last;
      }
    }
    std::string number = canonical_digits(is_negative(s, i), written, exponent);
    const bool follows_slash = i > 0 && s[i - 1] == '/' && i > 1 && digit(i - 2);
    if (s[end] == '/' && digit(end + 1) && !follows_slash) {
      const size_t last = digits_end(end + 1);
      const bool is_date = (s[last] == '/' || s[last] == '.') && digit(last + 1);  // 1/2/2020
      try {
        if (!is_date) number = calculate(number + s.substr(end, last - end)), end = last;
      } catch (const Error&) {  // divided by zero, or too many digits: two numbers
      }
    }
    const char before = i > 0 ? s[i - 1] : ' ';
    const bool is_word = std::isalpha(static_cast<unsigned char>(before)) || before == '_';
    const bool is_power =
        s[end] == '^' || before == '^' || (i > 1 && s.compare(i - 2, 2, "^{") == 0);
    if (!is_word && !is_power) numbers.push_back(number);
  }
  return numbers;
}

// The canonical form of the one number that `written` holds; empty when it holds none or several.
inline std::string canonical_number(std::string_view written) {
  const std::vector<std::string> numbers = numbers_in(written);
  return numbers.size() == 1 ? numbers[0] : "";
}

// The text without GSM8K's calculator annotations such as <<48/2=24>>.
inline std::string without_annotations(std::string_view text) {
  std::string out;
  for (;;) {
    const size_t begin = text.find("<<"), end = text.find(">>", begin);
    out += text.substr(0, end == std::string_view::npos ? end : begin);
    if (end == std::string_view::npos) return out;
    text.remove_prefix(end + 2);
  }
}

// The number that a text marks as its answer: the first one that follows "####" (as in GSM8K's
// solutions; "#### Step 1" and "#### 1. Add" are headings), or the last one in the last \boxed{};
// empty: none. `plain`: of plain_spelling().
inline std::string marked_number(std::string_view plain) {
  constexpr std::string_view kMark = "####", kBox = "\\boxed{", kDigits = "0123456789";
  for (size_t i = 0; (i = plain.find(kMark, i)) != plain.npos; i += kMark.size()) {
    std::string_view line = plain.substr(i + kMark.size());
    line = line.substr(0, line.find('\n'));
    const size_t begin = line.find_first_not_of(" \t*$\\+-");
    if (begin == line.npos || kDigits.find(line[begin]) == kDigits.npos) continue;
    const size_t end = std::min(line.find_first_not_of(kDigits, begin), line.size());
    const bool is_heading = end + 2 < line.size() && (line[end] == '.' || line[end] == ')') &&
                            line[end + 1] == ' ' && std::isalpha(uint8_t(line[end + 2]));
    const std::vector<std::string> numbers = numbers_in(line);
    if (!is_heading && !numbers.empty()) return numbers[0];
  }
  if (const size_t box = plain.rfind(kBox); box != plain.npos) {
    const std::vector<std::string> numbers =
        numbers_in(plain.substr(box, plain.find('}', box) - box));
    if (!numbers.empty()) return numbers.back();
  }
  return "";
}

// The number that an answer ends with, in canonical form: the marked one, or the last one of the
// text. Empty when there is no number.
inline std::string final_number(std::string_view answer) {
  const std::string plain = plain_spelling(without_annotations(answer));
  const std::string marked = marked_number(plain);
  if (!marked.empty()) return marked;
  const std::vector<std::string> all = numbers_in(plain);
  return all.empty() ? "" : all.back();
}

// What is right: the marked number of `answer`, or its only one.
inline std::string expected_number(const Problem& p) {
  const std::string plain = plain_spelling(without_annotations(p.answer));
  std::string expected = marked_number(plain);
  if (expected.empty()) expected = canonical_number(plain);
  if (expected.empty()) {
    fail(p.where, ": answer: found ", json_text(p.answer),
         ", expected one number, or one behind #### or in \\boxed{}");
  }
  return expected;
}

// "18.", "$18" and "18.00" are all 18. Of several numbers the last one counts.
inline bool right_number(const Problem& p, std::string_view text) {
  return final_number(text) == expected_number(p);
}

// ---------------------------------------------------------------------------------------------
// Texts and their form

inline std::string_view expected_text(const Problem& p) {
  if (p.answer.empty()) fail(p.where, ": answer is missing");
  return strip_ascii(p.answer);
}
inline bool right_exact(const Problem& p, std::string_view text) {
  return strip_ascii(text) == expected_text(p);
}

inline bool refuses(std::string_view answer) {
  for (const char* words : {"don't know", "do not know", "can't help", "cannot help"}) {
    if (contains_words(answer, words)) return true;
  }
  return false;
}

// The text of a flag, in which \n stands for a line break.
inline std::string with_line_breaks(std::string text) {
  for (size_t i; (i = text.find("\\n")) != std::string::npos;) text.replace(i, 2, "\n");
  return text;
}

// The text of a flag, or, where it names a file, the text of that file; with_line_breaks.
inline std::string form_text(const std::string& form) {
  std::error_code ignored;
  const bool is_file = std::filesystem::is_regular_file(form, ignored);
  return with_line_breaks(is_file ? read_file(form) : form);
}

// In a pattern, * is any text and ? is any byte. Every other byte is itself. After a mismatch, the
// last * takes one more byte of the text.
inline bool matches_pattern(std::string_view pattern, std::string_view text) {
  size_t p = 0, t = 0, star = pattern.npos, star_end = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++, star_end = t;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == text[t])) {
      p++, t++;
    } else if (star != pattern.npos) {
      p = star + 1, t = ++star_end;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == pattern.npos;
}

// ---------------------------------------------------------------------------------------------
// Choices

// How many choices a problem offers: those of its "choices" (a list, or ARC's {"text", "label"}),
// or the letters that its question lists, "A) .. B) ..", "A. ..", "(A) .."; otherwise 26.
inline int offered_choices(const Problem& p) {
  const auto it = p.line.is_object() ? p.line.find("choices") : p.line.end();
  if (p.line.is_object() && it != p.line.end()) {
    const Json& list = it->is_object() && it->contains("text") ? it->at("text") : *it;
    if (list.is_array() && list.size() >= 2) return int(std::min<size_t>(26, list.size()));
  }
  int n = 0;
  for (size_t i = 0; n < 26 && i + 1 < p.question.size(); i++) {
    const bool stands_alone = i == 0 || !is_alphanumeric(p.question[i - 1]);
    const char next = p.question[i + 1];
    if (stands_alone && p.question[i] == 'A' + n) n += next == ')' || next == '.' || next == ':';
  }
  return n >= 2 ? n : 26;
}

// The letters, of the first `offered` ones, that a text names as choices: (offset, letter). They
// stand alone, and are no words: not the "I" of "I think", the "A" of "A man", the B of "not B".
inline std::vector<std::pair<size_t, char>> letters_named(const std::string& plain, int offered) {
  const auto at = [&](size_t i) { return i < plain.size() ? plain[i] : ' '; };
  const auto lower = [&](size_t i) { return at(i) >= 'a' && at(i) <= 'z'; };
  // A letter or digit at i, or an apostrophe with one at `beyond`; not the bytes of a dash.
  const auto in_word = [&](size_t i, size_t beyond) {
    const auto alnum = [&](size_t k) { return std::isalnum(static_cast<unsigned char>(at(k))); };
    return alnum(i) || (at(i) == '\'' && alnum(beyond));
  };
  std::vector<std::pair<size_t, char>> found;
  for (size_t i = 0; i < plain.size(); i++) {
    const char c = plain[i];
    if (c < 'A' || c >= 'A' + offered || in_word(i + 1, i + 2) || (i > 0 && in_word(i - 1, i - 2)))
      continue;
    const std::string_view behind = std::string_view(plain).substr(i + 1, 9);
    const bool is_named = behind.starts_with(" is ") || behind.starts_with(" because");
    const bool is_word = (c == 'A' || c == 'I') && at(i + 1) == ' ' && lower(i + 2) && !is_named;
    const bool is_denied = i >= 4 && lower_ascii(plain.substr(i - 4, 4)) == "not ";
    if (!is_word && !is_denied) found.emplace_back(i, c);
  }
  return found;
}

// The letter that a text chooses, of the first `offered` ones: in the sentence of the last
// "answer", the first letter behind it, or the last one before it; otherwise the first one behind
// that sentence, or the last one before it. Without "answer", the only letter that the text names.
// 0: none.
inline char chosen_letter(std::string_view text, int offered = 26) {
  std::string plain = plain_spelling(text);
  const std::string lower = lower_ascii(plain);  // of the same length
  const size_t said = lower.rfind("answer");
  const auto skip = [&](size_t i) {
    return std::min(plain.find_first_not_of(" :(*_\"'[`\n", i), plain.size());
  };
  size_t i = skip(said == lower.npos ? 0 : said + 6);
  if (lower.compare(i, 3, "is ") == 0) i = skip(i + 3);
  // "The answer is d." and "d)": a small letter with no word behind it.
  const size_t word =
      std::min(lower.find_first_of("abcdefghijklmnopqrstuvwxyz0123456789", i + 1), lower.size());
  const bool is_alone = word == lower.size() || (said != lower.npos && word > i + 2);
  if (i < plain.size() && plain[i] >= 'a' && plain[i] <= 'z' && is_alone) plain[i] -= 'a' - 'A';

  const std::vector<std::pair<size_t, char>> letters = letters_named(plain, offered);
  if (said == lower.npos) {
    const bool one =
        std::ranges::all_of(letters, [&](auto& l) { return l.second == letters[0].second; });
    return letters.empty() || !one ? 0 : letters[0].second;
  }
  const size_t begin = plain.find_last_of(".!?\n", said), end = plain.find_first_of(".!?\n", said);
  const auto first = [&](size_t from, size_t to) {
    const auto it =
        std::ranges::find_if(letters, [&](auto& l) { return l.first >= from && l.first < to; });
    return it == letters.end() ? char(0) : it->second;
  };
  const auto last = [&](size_t from, size_t to) {
    char letter = 0;
    for (const auto& l : letters) letter = l.first >= from && l.first < to ? l.second : letter;
    return letter;
  };
  const size_t sentence = begin == plain.npos ? 0 : begin;
  for (const char letter :
       {first(said, end), last(sentence, said), first(end, plain.npos), last(0, said)}) {
    if (letter) return letter;
  }
  return 0;
}

inline char expected_choice(const Problem& p) {
  const int offered = offered_choices(p);
  const char expected = chosen_letter(p.answer, offered);
  if (!expected) {
    fail(p.where, ": answer: found ", json_text(p.answer), ", expected a letter from A to ",
         char('A' + offered - 1));
  }
  return expected;
}
inline bool right_choice(const Problem& p, std::string_view text) {
  return chosen_letter(text, offered_choices(p)) == expected_choice(p);
}

// ---------------------------------------------------------------------------------------------
// Countdowns

inline Countdown countdown_of(const Problem& p) {
  try {
    Countdown c{{}, canonical_number(p.line.at("target").dump())};
    for (const Json& n : p.line.at("numbers")) c.numbers.insert(canonical_number(n.dump()));
    if (!c.target.empty() && c.numbers.size() >= 2 && !c.numbers.count("")) return c;
  } catch (const Json::exception&) {
  }
  fail(p.where, ": found no countdown, expected {\"numbers\": [3, 5], \"target\": 8}");
}

// The operands of an expression, without the operators: no minus becomes part of a number.
inline std::multiset<std::string> operands_of(std::string expression) {
  for (char& c : expression) {
    if (std::string_view("+-*/()").find(c) != std::string_view::npos) c = ' ';
  }
  const std::vector<std::string> numbers = numbers_in(expression);
  return {numbers.begin(), numbers.end()};
}

// The last arithmetic of a text whose operands are all among `numbers`, at least two, each used
// once at most: (3*7)+5 in "- (3*7)+5 = 26 in 1-2 steps". Empty when there is none.
inline std::string last_arithmetic(std::string_view text,
                                   const std::multiset<std::string>& numbers) {
  const std::string plain = plain_spelling(text);
  std::string found;
  for (size_t i = 0, end; i < plain.size(); i = end + 1) {
    end = std::min(plain.find_first_not_of("0123456789+-*/(). ", i), plain.size());
    std::string_view run = strip_ascii(std::string_view(plain).substr(i, end - i));
    // A list's mark at the beginning of a line: "- ", "* ", "1. ", "2) "
    const bool begins_line = i == 0 || plain[i - 1] == '\n';
    const size_t mark = run.find(' ');
    if (begins_line && mark != run.npos &&
        (mark == 1 ? run.find_first_of("-*") == 0 : run.find_first_of(".)") == mark - 1)) {
      run = strip_ascii(run.substr(mark));
    }
    // The longest beginning of it that can be calculated: "3*7+5 (5-" is cut before " (5-".
    for (; run.find_first_of("+-*/", 1) != run.npos;
         run = strip_ascii(run.substr(0, run.find_last_of(" .")))) {
      try {
        calculate(run);
        const auto operands = operands_of(std::string(run));
        if (operands.size() >= 2 && std::ranges::includes(numbers, operands)) found = run;
        break;
      } catch (const Error&) {
        if (run.find_last_of(" .") == run.npos) break;
      }
    }
  }
  return found;
}

// {"numbers": [3, 5, 7], "target": 26}: the last arithmetic of the text with these numbers gives
// the target. `all`: it uses all of them.
inline bool right_countdown(const Problem& p, std::string_view text, bool all) {
  const Countdown c = countdown_of(p);
  const std::string sum = last_arithmetic(text, c.numbers);
  if (sum.empty() || (all && operands_of(sum) != c.numbers)) return false;
  try {
    return canonical_number(calculate(sum)) == c.target;
  } catch (const Error&) {
    return false;
  }
}

// ---------------------------------------------------------------------------------------------
// Shares

struct Interval {
  double low, high;
};

// The 95 % interval of a share measured on n items (Wilson 1927).
inline Interval wilson(double share, int64_t n) {
  const double z = 1.959963984540054, m = double(n), p = share;
  const double middle = p + z * z / (2 * m);
  const double half = z * std::sqrt(p * (1 - p) / m + z * z / (4 * m * m));
  return {std::max(0., (middle - half) / (1 + z * z / m)),
          std::min(1., (middle + half) / (1 + z * z / m))};
}

// ---------------------------------------------------------------------------------------------
// What is only there to run a user's program

// One process of the user's program, asked one line at a time.
class CommandProcess {
 public:
  CommandProcess(std::string command, const CommandLimits& limits)
      : command_(std::move(command)), limits_(limits) {}
  CommandProcess(const CommandProcess&) = delete;
  CommandProcess& operator=(const CommandProcess&) = delete;
  ~CommandProcess() { stop(); }

  bool is_busy() const { return attempt_ >= 0; }
  int64_t attempt() const { return attempt_; }  // number of the line it was asked; -1: none
  double seconds_left() const { return deadline_ - now(); }
  const std::string& reply() const { return reply_; }      // the line that it wrote,
  const std::string& failure() const { return failure_; }  // or what went wrong

  // Starts the process where there is none. Its first line may take longer: programs load
  // libraries.
  void ask(int64_t attempt, std::string line) {
    const bool is_first = process_ < 0;
    if (is_first) start();
    const double start_seconds = first_reply_ < 0 ? limits_.start_seconds : 2 * first_reply_;
    asked_ = now(), seconds_ = limits_.seconds + (is_first ? start_seconds : 0);
    deadline_ = asked_ + seconds_;
    attempt_ = attempt, unsent_ = std::move(line), is_first_ = is_first;
  }
  std::array<pollfd, 2> polled() const {
    const bool writes = is_busy() && !unsent_.empty();
    return {pollfd{is_busy() ? stdout_ : -1, POLLIN, 0}, pollfd{writes ? stdin_ : -1, POLLOUT, 0}};
  }
  // Writes and reads what it can. True when there is a reply or a failure; a failure ends it.
  bool advance(std::span<const pollfd> polled) {  // (2)
    reply_.clear(), failure_.clear();
    if (polled[1].revents) {
      const ssize_t n = write(stdin_, unsent_.data(), unsent_.size());
      if (n < 0 && errno != EAGAIN && errno != EINTR) failure_ = "ended";
      unsent_.erase(0, size_t(std::max<ssize_t>(0, n)));
    }
    if (polled[0].revents) {
      char piece[4096];
      const ssize_t n = read(stdout_, piece, sizeof piece);
      if (n == 0) failure_ = "ended";
      unread_.append(piece, size_t(std::max<ssize_t>(0, n)));
    }
    if (const size_t end = unread_.find('\n'); end != std::string::npos) {
      reply_ = unread_.substr(0, end);
      unread_.erase(0, end + 1);
      failure_ = unread_.empty() ? "" : "wrote more than one line";
      if (is_first_ && first_reply_ < 0) first_reply_ = now() - asked_;
      attempt_ = -1;
    } else if (unread_.size() > (1 << 20)) {
      failure_ = "wrote more than a megabyte without a line's end";
    } else if (failure_.empty() && seconds_left() <= 0) {
      failure_ = format("wrote no line within %g s", seconds_);
    }
    if (!failure_.empty()) stop();
    return !is_busy();
  }
  void stop() {  // kills the process and every process that it started
    attempt_ = -1;
    if (process_ < 0) return;
    kill(-process_, SIGKILL);
    waitpid(process_, nullptr, 0);
    close(stdin_), close(stdout_);
    process_ = -1;
    unread_.clear();
  }

 private:
  // How many threads this process's user has. RLIMIT_NPROC counts them, and does not bind root.
  static int64_t threads_of_user() {
    namespace fs = std::filesystem;
    int64_t n = 0;
    std::error_code gone;
    for (const auto& entry : fs::directory_iterator("/proc", gone)) {
      struct stat status;
      if (::stat((entry.path() / "task").c_str(), &status) != 0 || status.st_uid != getuid())
        continue;
      for (auto it = fs::directory_iterator(entry.path() / "task", gone);
           !gone && it != fs::directory_iterator(); it.increment(gone)) {
        n++;
      }
    }
    return n;
  }

  void start() {
    int in[2], out[2];  // its standard input and output
    if (pipe2(in, O_CLOEXEC) != 0) fail("command: cannot make a pipe: ", errno_text());
    if (pipe2(out, O_CLOEXEC) != 0) fail("command: cannot make a pipe: ", errno_text());
    const rlimit memory{rlim_t(limits_.memory), rlim_t(limits_.memory)};
    const auto process_limit = rlim_t(threads_of_user() + limits_.processes);
    const rlimit processes{process_limit, process_limit}, no_core{0, 0};
    const pid_t parent = getpid();
    process_ = fork();
    if (process_ < 0) fail("command: cannot start a process: ", errno_text());
    if (process_ == 0) {  // until exec, only calls that are safe after fork
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(127);
      setpgid(0, 0);
      if (limits_.memory > 0) setrlimit(RLIMIT_AS, &memory);
      setrlimit(RLIMIT_NPROC, &processes), setrlimit(RLIMIT_CORE, &no_core);
      dup2(in[0], STDIN_FILENO), dup2(out[1], STDOUT_FILENO);
      std::signal(SIGPIPE, SIG_DFL);
      execl("/bin/sh", "sh", "-c", command_.c_str(), nullptr);
      _exit(127);
    }
    setpgid(process_, process_);
    close(in[0]), close(out[1]);
    stdin_ = in[1], stdout_ = out[0];
    fcntl(stdin_, F_SETFL, O_NONBLOCK);
  }

  std::string command_;
  CommandLimits limits_;
  pid_t process_ = -1;
  int stdin_ = -1, stdout_ = -1;  // our ends of the process's pipes
  int64_t attempt_ = -1;
  bool is_first_ = false;  // the line is the process's first
  double asked_ = 0, deadline_ = 0, seconds_ = 0;
  double first_reply_ = -1;  // seconds that a first line took; -1: not known
  std::string unsent_, unread_, reply_, failure_;
};

// The user's program, in limits.verifiers processes that last for the whole run. For each answer
// one of them reads a line of JSON {"id", "prompt", "completion", "answer", "record": the problem's
// whole line} and writes a line {"id", "reward"}. Rewards are joined in the order of the answers.
//
// The limits are no sandbox: the program has all the rights of the user who started the training.
// When it is too slow, ends, or writes anything else, the process is killed, that answer gets no
// reward, and the next answer starts a new process.
class CommandVerifier {
 public:
  CommandVerifier(const std::string& command, const CommandLimits& limits, bool is_pass_fail)
      : is_pass_fail_(is_pass_fail) {
    std::signal(SIGPIPE, SIG_IGN);  // writing to a program that ended is an error of write()
    for (int i = 0; i < limits.verifiers; i++) {
      processes_.push_back(std::make_unique<CommandProcess>(command, limits));
    }
  }

  // NaN where the program failed; last_failure() says why. Ends after more than `most_failures`,
  // with NaN for all answers that are left.
  std::vector<float> score(std::span<const Attempt> attempts, size_t most_failures) {
    std::vector<float> rewards(attempts.size(), std::numeric_limits<float>::quiet_NaN());
    for (const auto& p : processes_) {
      if (p->is_busy()) p->stop();  // an earlier call was interrupted
    }
    size_t asked = 0, done = 0;
    for (failures_ = 0; done < attempts.size() && failures_ <= most_failures;) {
      stop_if_signalled();
      std::vector<pollfd> polled;
      double seconds = 1;
      for (const auto& p : processes_) {
        if (!p->is_busy() && asked < attempts.size()) {
          p->ask(int64_t(asked), line_of(asked, attempts[asked]));
          asked++;
        }
        for (const pollfd& fd : p->polled()) polled.push_back(fd);
        if (p->is_busy()) seconds = std::clamp(p->seconds_left(), 0., seconds);
      }
      if (poll(polled.data(), polled.size(), int(std::ceil(seconds * 1000))) < 0) {
        if (errno == EINTR) continue;
        fail("command: poll: ", errno_text());
      }
      for (size_t i = 0; i < processes_.size(); i++) {
        CommandProcess& p = *processes_[i];
        const int64_t attempt = p.attempt();
        if (attempt < 0 || !p.advance(std::span(polled).subspan(2 * i, 2))) continue;
        rewards[size_t(attempt)] = reward_of(p, attempt);
        done++;
      }
    }
    return rewards;
  }
  size_t failures() const { return failures_; }  // of the last call
  const std::string& last_failure() const { return last_failure_; }
  size_t processes() const { return processes_.size(); }

 private:
  static std::string line_of(size_t id, const Attempt& a) {
    return json_line(Json{{"id", id},
                          {"prompt", a.problem->question},
                          {"completion", std::string(a.text)},
                          {"answer", a.problem->answer},
                          {"record", a.problem->line}});
  }
  float reward_of(CommandProcess& p, int64_t id) {
    std::string why = p.failure();
    if (why.empty()) {
      const Json json = Json::parse(p.reply(), nullptr, false);
      const bool is_reply = json.is_object() && json.contains("reward") &&
                            json["reward"].is_number() && json.contains("id") && json["id"] == id;
      const float reward = is_reply ? json["reward"].get<float>() : NAN;
      if (is_pass_fail_ ? reward == 0 || reward == 1 : std::isfinite(reward)) return reward;
      why = concat("wrote ", json_text(p.reply()), ", expected {\"id\": ", id,
                   ", \"reward\": ", is_pass_fail_ ? "0 or 1}" : "a number}");
      p.stop();
    }
    failures_++, last_failure_ = why;
    return std::numeric_limits<float>::quiet_NaN();
  }

  bool is_pass_fail_;
  std::vector<std::unique_ptr<CommandProcess>> processes_;
  size_t failures_ = 0;
  std::string last_failure_;
};

inline Verifier command_verifier(const std::string& command, const CommandLimits& limits,
                                 bool is_pass_fail, const std::string& where) {
  const auto program = std::make_shared<CommandVerifier>(command, limits, is_pass_fail);
  const auto score = [program, where](std::span<const Attempt> attempts) {
    std::vector<float> out = program->score(attempts, attempts.size() / 5);
    if (program->failures() * 5 > attempts.size()) {
      fail(where, ": found ", program->failures(), " failures in ", attempts.size(),
           " rollouts, expected a fifth at most; the last: it ", program->last_failure());
    }
    return out;
  };
  const auto try_out = [program, where](const Problem& p) {
    const std::vector<Attempt> attempts(program->processes(), {&p, ""});
    program->score(attempts, 0);
    if (program->failures() == 0) return;
    const std::string& why = program->last_failure();
    fail(where, ": tried before the run with an empty completion, it ", why,
         why == "ended" ? "; --command-memory counts addresses, of which some programs (node, java,"
                          " go, CUDA) reserve more than they use: 0 sets no limit"
                        : "");
  };
  return {is_pass_fail, score, {}, try_out};
}

}  // namespace cake
