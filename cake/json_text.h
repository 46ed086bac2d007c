// JSON as people's programs write it: where a value ends, what is repaired before it is parsed, and
// the members of an object as they are written.
//
// simdjson parses (RFC 8259). What other programs write and it refuses is repaired first, in a copy
// of the text, so that a value that nobody reads ends no run:
//
//     bytes that are not UTF-8, half a character of UTF-16 (\ud83d)   become U+FFFD
//     NaN, Infinity, integers beyond 64 bits                          become an object that keeps
//                                                                     them as they are written
#pragma once

#include <simdjson.h>

#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/charset.h"
#include "cake/json.h"
#include "cake/run.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// Numbers that simdjson does not have: {"number as written": "NaN"} stands for NaN

inline constexpr std::string_view kWrittenNumber = "number as written";

// "NaN", "-Infinity", "92233720368547758423"; "" where the element is no such number.
inline std::string_view written_number(simdjson::dom::element e) {
  simdjson::dom::object object;
  std::string_view text;
  const bool found =
      !e.get(object) && object.size() == 1 && !object.at_key(kWrittenNumber).get(text);
  return found ? text : std::string_view();
}

inline const char* type_name(simdjson::dom::element e) {
  const std::string_view number = e.is_object() ? written_number(e) : std::string_view();
  return number == "NaN"                                 ? "NaN"
         : number == "Infinity" || number == "-Infinity" ? "Infinity"
         : !number.empty()                               ? "a number beyond 64 bits"
         : e.is_array()                                  ? "an array"
         : e.is_object()                                 ? "an object"
         : e.is_string()                                 ? "a string"
         : e.is_bool()                                   ? "true or false"
         : e.is_null()                                   ? "null"
                                                         : "a number";
}

// Whether a token that begins as a number does is one that simdjson refuses and Python reads.
inline bool needs_words(std::string_view token) {
  if (token == "NaN" || token == "Infinity" || token == "-Infinity") return true;
  const std::string_view digits = token.substr(token.starts_with('-') ? 1 : 0);
  if (digits.size() > 1 && digits[0] == '0' && std::strchr(".eE", digits[1]) == nullptr)
    return false;
  const bool is_integer = digits.find_first_not_of("0123456789") == std::string_view::npos;
  if (digits.empty() || digits[0] < '0' || digits[0] > '9') return false;
  const char *begin = token.data(), *end = begin + token.size();
  if (is_integer) {
    uint64_t positive;
    int64_t negative;
    const bool is_negative = token[0] == '-';
    const auto error = is_negative ? std::from_chars(begin, end, negative).ec
                                   : std::from_chars(begin, end, positive).ec;
    return error == std::errc::result_out_of_range;
  }
  double value;
  const auto [stop, error] = std::from_chars(begin, end, value);
  return stop == end && error == std::errc::result_out_of_range;
}

// ---------------------------------------------------------------------------------------------
// Raw JSON

// Behind the string that begins at i; the text's end where it does not end.
inline size_t json_string_end(std::string_view json, size_t i) {
  for (;;) {
    i = json.find('"', i + 1);
    if (i == std::string_view::npos) return json.size();
    size_t backslashes = 0;
    while (json[i - 1 - backslashes] == '\\') backslashes++;
    if (backslashes % 2 == 0) return i + 1;
  }
}

// Finds where a value ends while its bytes come in.
class JsonScan {
 public:
  enum class Status { more, complete, broken };

  // `bytes`: the value from its first byte on, in later calls with more bytes behind. `is_all`:
  // none will follow.
  Status scan(std::string_view bytes, bool is_all) {
    if (bytes.empty()) return is_all ? stop("nothing") : Status::more;
    if (!has_begun_ && bytes[0] != '{' && bytes[0] != '[' && bytes[0] != '"') {
      return scan_word(bytes, is_all);
    }
    has_begun_ = true;
    while (offset_ < bytes.size()) {
      if (in_string_ && !pass_string(bytes)) break;
      if (status_ != Status::more) return status_;
      if (open_.empty() && last_ != 0) return status_ = Status::complete;
      if (offset_ < bytes.size()) take(bytes[offset_]);
      if (status_ != Status::more) return status_;
    }
    if (open_.empty() && last_ != 0 && !in_string_) return status_ = Status::complete;
    return Status::more;
  }

  size_t offset() const { return offset_; }  // behind the value; where it is broken
  // The next scan() is without the bytes before offset().
  void forget() { offset_ = 0; }
  const char* problem() const { return problem_; }

 private:
  static constexpr size_t kMaxDepth = 4096;

  Status stop(const char* problem) {
    problem_ = problem;
    return status_ = Status::broken;
  }

  // true, 12, NaN
  Status scan_word(std::string_view bytes, bool is_all) {
    const size_t end = bytes.find_first_of(" \t\r\n,:]}[{\"");
    if (end == std::string_view::npos && !is_all) return Status::more;
    offset_ = std::min(end, bytes.size());
    return offset_ == 0 ? stop("no value") : status_ = Status::complete;
  }

  // To the end of the string; false: it is not there yet.
  bool pass_string(std::string_view bytes) {
    for (; offset_ < bytes.size(); offset_++) {
      const char c = bytes[offset_];
      if (c == '"') return offset_++, in_string_ = false, last_ = 'v', true;
      if (c == '\\') {
        if (offset_ + 1 == bytes.size()) return false;  // with the character behind it
        offset_++;
      }
      if (bytes[offset_] == '\n') return stop("a line break in a string"), true;
    }
    return false;
  }

  // One character outside strings.
  void take(char c) {
    const bool in_object = !open_.empty() && open_.back() == '{';
    switch (c) {
      case ' ':
      case '\t':
      case '\r':
      case '\n':
        break;
      case '"':
        if (last_ == 'v') return void(stop("a string where a comma was expected"));
        in_string_ = true;
        break;
      case '{':
      case '[': {
        const bool fits = in_object ? last_ == ':' : last_ != 'v';
        if (!fits) return void(stop("a bracket where none was expected"));
        if (open_.size() == kMaxDepth) return void(stop("too many levels of brackets"));
        open_ += c;
        last_ = c;
        break;
      }
      case '}':
      case ']':
        if (in_object != (c == '}')) return void(stop("brackets that do not match"));
        open_.pop_back();
        last_ = 'v';
        break;
      case ',':
      case ':':
        last_ = c;
        break;
      default:
        last_ = 'v';
    }
    offset_++;
  }

  size_t offset_ = 0;
  std::string open_;  // brackets
  bool has_begun_ = false, in_string_ = false;
  char last_ = 0;  // outside strings: a bracket, a comma, a colon, or v for a value
  Status status_ = Status::more;
  const char* problem_ = "";
};

// Behind the value that begins at i, in valid JSON.
inline size_t json_value_end(std::string_view json, size_t i) {
  JsonScan scan;
  scan.scan(json.substr(i), true);
  return i + scan.offset();
}

struct RawMember {
  std::string_view key, value;  // as written, the key with its quotes
};

// Of a JSON object; of the beginning of one the members that can be seen, and of the last one the
// value's beginning. Nothing where it does not begin as an object does.
inline void split_members(std::string_view json, std::vector<RawMember>& members) {
  members.clear();
  size_t i = json.find('{');
  if (i++ == std::string_view::npos) return;
  for (;;) {
    i = json.find_first_not_of(" \t\r\n,", i);
    if (i == std::string_view::npos || json[i] != '"') return;
    const size_t key_end = json_string_end(json, i);
    const size_t colon = json.find_first_not_of(" \t\r\n", key_end);
    if (colon == std::string_view::npos || json[colon] != ':') return;
    const size_t value = json.find_first_not_of(" \t\r\n", colon + 1);
    if (value == std::string_view::npos) return;
    const size_t value_end = json_value_end(json, value);
    members.push_back({json.substr(i, key_end - i), json.substr(value, value_end - value)});
    i = value_end;
  }
}

// ---------------------------------------------------------------------------------------------
// Repair

// JSON has escapes for half a character of UTF-16, which is none: they become \ufffd. Returns
// whether there were any.
inline bool repair_surrogates(std::string& json) {
  const auto unit = [&](size_t i) {  // of the escape \uXXXX at i; 0: none is there
    unsigned value = 0;
    if (i + 6 > json.size() || json[i] != '\\' || json[i + 1] != 'u') return 0u;
    const auto [stop, error] = std::from_chars(json.data() + i + 2, json.data() + i + 6, value, 16);
    return error == std::errc() && stop == json.data() + i + 6 ? value : 0u;
  };
  bool found = false;
  for (size_t i = 0; (i = json.find('\\', i)) != std::string::npos;) {
    const unsigned first = unit(i);
    if (first < 0xd800 || first > 0xdfff) {
      i += 2;
    } else if (const unsigned second = unit(i + 6);
               first < 0xdc00 && second >= 0xdc00 && second <= 0xdfff) {
      i += 12;
    } else {
      json.replace(i, 6, "\\ufffd");
      found = true;
      i += 6;
    }
  }
  return found;
}

// Writes the JSON to `out` with its numbers that need words as objects, or, for readers of plain
// JSON, with null for NaN and Infinity. Returns whether there were any.
inline bool repair_numbers(std::string_view json, std::string& out, bool with_null = false) {
  out.clear();
  size_t copied = 0;
  for (size_t i = 0; (i = json.find_first_of("\"-0123456789NI", i)) != std::string_view::npos;) {
    if (json[i] == '"') {
      i = json_string_end(json, i);
      continue;
    }
    const size_t end = std::min(json.size(), json.find_first_of(" \t\r\n,:]}[{\"", i));
    const std::string_view token = json.substr(i, end - i);
    const bool is_digits = token.find_first_of("NI") == std::string_view::npos;
    if (needs_words(token) && !(with_null && is_digits)) {
      out.append(json.substr(copied, i - copied));
      if (with_null) {
        out.append("null");
      } else {
        out.append("{\"").append(kWrittenNumber).append("\":\"").append(token).append("\"}");
      }
      copied = end;
    }
    i = end;
  }
  out.append(json.substr(copied));
  return copied > 0;
}

struct JsonRepair {
  std::string text;          // the JSON that was parsed, before repair_numbers(); empty: as it came
  bool has_new = false;      // U+FFFD was written
  bool has_numbers = false;  // numbers became objects for the parser
};

// Parses JSON, behind which SIMDJSON_PADDING bytes are readable, and repairs it where that is
// needed. The element is valid until the parser's next text.
inline simdjson::error_code parse_and_repair(std::string_view json, simdjson::dom::parser& parser,
                                             simdjson::dom::element& element,
                                             JsonRepair* repair = nullptr) {
  if (repair) *repair = {};
  const auto error = parser.parse(json.data(), json.size(), false).get(element);
  if (!error || error == simdjson::EMPTY || error == simdjson::CAPACITY) return error;
  std::string text;
  bool has_new = repair_utf8(json, &text).invalid > 0;
  has_new |= repair_surrogates(text);
  std::string with_numbers;
  const bool has_numbers = repair_numbers(text, with_numbers);
  if (!has_new && !has_numbers) return error;
  if (repair) *repair = {std::move(text), has_new, has_numbers};
  // A string without room behind it is copied by the parser.
  return parser.parse(has_numbers ? with_numbers : repair ? repair->text : text).get(element);
}

// What is wrong with JSON, for messages.
inline std::string json_problem(simdjson::error_code error) {
  return concat("not JSON: ", simdjson::error_message(error));
}

// ---------------------------------------------------------------------------------------------
// JSON values

// The fewest digits that give the number back; whole numbers end in ".0".
inline void append_json_number(std::string& out, double x) {
  if (x == std::floor(x) && std::fabs(x) < 1e16) {
    out += format("%.1f", x);
    return;
  }
  std::array<char, 32> digits;
  const bool scientific = std::fabs(x) >= 1e16 || std::fabs(x) < 1e-4;
  const auto end =
      std::to_chars(digits.begin(), digits.end(), x,
                    scientific ? std::chars_format::scientific : std::chars_format::fixed);
  out.append(digits.data(), end.ptr);
}

// Appends a value as Python's json.dumps(value, ensure_ascii=False) writes it, as chat templates
// do: a space behind every colon and comma, keys in the order of the file.
inline void append_json(std::string& out, simdjson::dom::element e) {
  const char* comma = "";
  if (e.is_array()) {
    out += '[';
    for (const auto item : e.get_array()) {
      out += std::exchange(comma, ", ");
      append_json(out, item);
    }
    out += ']';
  } else if (e.is_object() && !written_number(e).empty()) {
    out += written_number(e);
  } else if (e.is_object()) {
    out += '{';
    for (const auto& [key, value] : e.get_object()) {
      out += std::exchange(comma, ", ") + Json(key).dump() + ": ";
      append_json(out, value);
    }
    out += '}';
  } else if (e.is_string()) {
    out += Json(e.get_string().value()).dump();
  } else if (e.type() == simdjson::dom::element_type::DOUBLE) {
    append_json_number(out, e.get_double());
  } else {
    out += simdjson::minify(e);
  }
}

inline std::string python_json(simdjson::dom::element e) {
  std::string out;
  append_json(out, e);
  return out;
}

template <class T>
T element_as(simdjson::dom::element e, const char* expected, const std::string& where) {
  T value;
  const bool is_object = std::is_same_v<T, simdjson::dom::object>;
  if (e.get(value) || (is_object && !written_number(e).empty())) {
    fail(where, ": found ", type_name(e), ", expected ", expected);
  }
  return value;
}
inline simdjson::dom::array as_array(simdjson::dom::element e, const std::string& where) {
  return element_as<simdjson::dom::array>(e, "an array", where);
}
inline simdjson::dom::object as_object(simdjson::dom::element e, const std::string& where) {
  return element_as<simdjson::dom::object>(e, "an object", where);
}

inline simdjson::dom::element member(simdjson::dom::object object, const char* key,
                                     const std::string& where) {
  simdjson::dom::element e;
  if (object.at_key(key).get(e)) fail(where, ": ", key, " is missing");
  return e;
}
inline std::string string_member(simdjson::dom::object object, const char* key,
                                 const std::string& where) {
  return std::string(element_as<std::string_view>(member(object, key, where), "a string",
                                                  concat(where, ": ", key)));
}

}  // namespace cake
