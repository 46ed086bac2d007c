// Whether an answer is right: for evaluation, and wherever answers earn something.
//
//     {"type": "number", "value": "42"}  the answer's last number is 42
//     {"type": "contains", "any": ["baker"], "none": ["sailor"]}  whole words, case ignored
//     {"type": "exact", "text": "..."}  the answer, but for white space around it
//     {"type": "refuses"}, {"type": "answers"}  says that it does not know or cannot help, or not
//     {"type": "tool", "name": "search", "then": {...}}  called that tool, and `then` of the answer
#pragma once

#include <algorithm>
#include <cctype>
#include <cmath>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/json.h"
#include "cake/run.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Numbers in text

// A number as written ("$1,000.50", "+18.", "007") in one form: no sign but -, no commas, no zeros
// that mean nothing, no point at the end. Empty when there is no digit.
inline std::string canonical_number(std::string_view written) {
  std::string whole, part;
  bool negative = false, point = false;
  for (const char c : written) {
    if (c == '-') negative = true;
    if (c == '.') point = true;
    if (std::isdigit(static_cast<unsigned char>(c))) (point ? part : whole) += c;
  }
  if (whole.empty() && part.empty()) return "";
  whole.erase(0, std::min(whole.find_first_not_of('0'), whole.size()));
  while (!part.empty() && part.back() == '0') part.pop_back();
  if (whole.empty()) whole = "0";
  if (whole == "0" && part.empty()) negative = false;
  return (negative ? "-" : "") + whole + (part.empty() ? "" : "." + part);
}

// The numbers of a text in their canonical form, in order. Commas divide digits in threes; a sign
// belongs to a number where no digit, letter or ")" stands before it ("5-3" is 5 and 3).
inline std::vector<std::string> numbers_in(std::string_view s) {
  const auto digit = [&](size_t i) {
    return i < s.size() && std::isdigit(static_cast<unsigned char>(s[i]));
  };
  std::vector<std::string> numbers;
  for (size_t i = 0; i < s.size();) {
    const bool fraction = s[i] == '.' && digit(i + 1) && (i == 0 || !digit(i - 1));
    if (!digit(i) && !fraction) {
      i++;
      continue;
    }
    size_t begin = i;
    while (begin > 0 && s[begin - 1] == '$') begin--;
    bool negative = false;
    if (begin > 0 && s[begin - 1] == '-') {
      const char before = begin > 1 ? s[begin - 2] : ' ';
      negative = !std::isalnum(static_cast<unsigned char>(before)) && before != ')';
    }
    std::string written = negative ? "-" : "";
    while (digit(i)) written += s[i++];
    const auto three = [&](size_t at) {
      return digit(at) && digit(at + 1) && digit(at + 2) && !digit(at + 3);
    };
    while (i < s.size() && s[i] == ',' && three(i + 1)) written += s.substr(i + 1, 3), i += 4;
    if (i < s.size() && s[i] == '.' && digit(i + 1)) {
      written += s[i++];
      while (digit(i)) written += s[i++];
    }
    numbers.push_back(canonical_number(written));
  }
  return numbers;
}

// GSM8K's calculator annotations, <<48/2=24>>, stand beside the text that people read.
inline std::string without_annotations(std::string_view text) {
  std::string out;
  for (;;) {
    const size_t begin = text.find("<<"), end = text.find(">>", begin);
    out += text.substr(0, end == std::string_view::npos ? end : begin);
    if (end == std::string_view::npos) return out;
    text.remove_prefix(end + 2);
  }
}

// The number that a worked answer ends with: the first behind the last "####" where there is one
// (GSM8K), otherwise the last of the text. Empty when there is none.
inline std::string final_number(std::string_view answer) {
  const std::string text = without_annotations(answer);
  const size_t mark = text.rfind("####");
  if (mark != std::string::npos) {
    const std::vector<std::string> after = numbers_in(std::string_view(text).substr(mark + 4));
    if (!after.empty()) return after.front();
  }
  const std::vector<std::string> all = numbers_in(std::string_view(text).substr(0, mark));
  return all.empty() ? "" : all.back();
}

// ---------------------------------------------------------------------------------------------
// Words in text

inline std::string lower_ascii(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = c >= 'A' && c <= 'Z' ? char(c + ('a' - 'A')) : c;
  for (size_t i; (i = out.find("\xe2\x80\x99")) != std::string::npos;) out.replace(i, 3, "'");
  return out;
}

// As whole words, case ignored: no letter or digit on either side.
inline bool contains_words(std::string_view text, std::string_view words) {
  const std::string t = lower_ascii(text), w = lower_ascii(words);
  const auto letter = [&](size_t i) {
    return i < t.size() && (std::isalnum(static_cast<unsigned char>(t[i])) || (t[i] & 0x80));
  };
  if (w.empty()) return false;
  for (size_t at = t.find(w); at != std::string::npos; at = t.find(w, at + 1)) {
    const bool begins = at == 0 || !letter(at - 1) || !letter(at);
    const bool ends = !letter(at + w.size()) || !letter(at + w.size() - 1);
    if (begins && ends) return true;
  }
  return false;
}

inline bool refuses(std::string_view answer) {
  for (const char* words : {"don't know", "do not know", "can't help", "cannot help"}) {
    if (contains_words(answer, words)) return true;
  }
  return false;
}

// ---------------------------------------------------------------------------------------------
// Checks

struct Check {
  enum class Type { contains, number, refuses, answers, exact, tool } type = Type::answers;
  std::vector<std::string> any, none;  // contains
  std::string text;                    // exact: the text; number: canonical; tool: its name
  std::shared_ptr<const Check> then;   // tool
};

inline Check parse_check(const Json& json, const std::string& where) {
  const auto words = [&](const char* key) {
    std::vector<std::string> list;
    const auto it = json.find(key);
    if (it == json.end()) return list;
    if (!it->is_array()) fail(where, ": ", key, ": found ", json_text(*it), ", expected an array");
    for (const Json& w : *it) list.push_back(json_as<std::string>(w, key, where));
    return list;
  };
  const auto type = json_get<std::string>(json, "type", where);
  if (type == "refuses") return {.type = Check::Type::refuses};
  if (type == "answers") return {.type = Check::Type::answers};
  if (type == "contains") {
    Check c{.type = Check::Type::contains, .any = words("any"), .none = words("none")};
    if (c.any.empty() && c.none.empty()) fail(where, ": any: found no words, expected some");
    return c;
  }
  if (type == "number") {
    const auto value = json_get<std::string>(json, "value", where);
    const std::string number = canonical_number(value);
    if (number.empty()) fail(where, ": value: found ", json_text(value), ", expected a number");
    return {.type = Check::Type::number, .text = number};
  }
  if (type == "exact") {
    return {.type = Check::Type::exact, .text = json_get<std::string>(json, "text", where)};
  }
  if (type == "tool") {
    const auto then = json.find("then");
    if (then == json.end()) fail(where, ": then is missing");
    return {.type = Check::Type::tool,
            .text = json_get<std::string>(json, "name", where),
            .then = std::make_shared<Check>(parse_check(*then, where + ": then"))};
  }
  fail(where, ": type: found ", json_text(type),
       ", expected contains, number, refuses, answers, exact or tool");
}

// `tools` are the names of those that were called on the way.
inline bool passes(const Check& check, std::string_view answer,
                   const std::set<std::string>& tools = {}) {
  const auto has = [&](const std::string& words) { return contains_words(answer, words); };
  const auto strip = [](std::string_view s) {
    const size_t begin = s.find_first_not_of(" \t\r\n");
    if (begin == std::string_view::npos) return std::string_view{};
    return s.substr(begin, s.find_last_not_of(" \t\r\n") + 1 - begin);
  };
  switch (check.type) {
    case Check::Type::contains:
      return (check.any.empty() || std::any_of(check.any.begin(), check.any.end(), has)) &&
             std::none_of(check.none.begin(), check.none.end(), has);
    case Check::Type::number:
      return final_number(answer) == check.text;
    case Check::Type::refuses:
      return refuses(answer);
    case Check::Type::answers:
      return !refuses(answer);
    case Check::Type::exact:
      return strip(answer) == strip(check.text);
    default:
      return tools.count(check.text) && passes(*check.then, answer, tools);
  }
}

// ---------------------------------------------------------------------------------------------
// Shares

struct Interval {
  double low, high;
};

// Wilson's 95 % interval of a share of n (Wilson 1927).
inline Interval wilson(double share, int64_t n) {
  const double z = 1.959963984540054, m = double(n), p = share;
  const double middle = p + z * z / (2 * m);
  const double half = z * std::sqrt(p * (1 - p) / m + z * z / (4 * m * m));
  return {std::max(0., (middle - half) / (1 + z * z / m)),
          std::min(1., (middle + half) / (1 + z * z / m))};
}

}  // namespace cake
