// Small JSON files, with errors that name the file and the key.
#pragma once

#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "cake/run.h"
#include "cake/utf8.h"

namespace cake {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;  // keeps the order in which keys were written

// The parser's complaint without its error code: "parse error at line 1, column 2: ...".
inline std::string json_complaint(const std::exception& e) {
  const std::string text = e.what();
  const size_t end = text.find("] ");
  return end == std::string::npos ? text : text.substr(end + 2);
}

// No file here has so many levels of brackets. The library copies and prints JSON with a nested
// call for each level: a hostile file with many more would overflow the stack.
inline constexpr int kMaxJsonDepth = 512;

// `where` names the file or the place in errors. `check(depth, event, value)`: the parser's
// callback.
template <class JsonType = Json, class Check>
JsonType parse_json(std::string_view text, const std::string& where, Check check) {
  try {
    return JsonType::parse(text, [&](int depth, auto event, JsonType& value) {
      if (depth <= kMaxJsonDepth) return check(depth, event, value);
      fail(where, ": found more than ", kMaxJsonDepth, " levels of brackets, expected fewer");
    });
  } catch (const Json::exception& e) {
    fail(where, ": not JSON: ", json_complaint(e));
  }
}

template <class JsonType = Json>
JsonType parse_json(std::string_view text, const std::string& where) {
  return parse_json<JsonType>(text, where, [](int, auto, auto&) { return true; });
}

inline Json read_json(const std::filesystem::path& path) {
  return parse_json(read_file(path), path.string());
}

inline void write_json(const std::filesystem::path& path, const OrderedJson& json) {
  write_file(path, json.dump(2) + "\n");
}

// A line of a JSON Lines file. Bytes that are not UTF-8 become U+FFFD.
template <class JsonType>
std::string json_line(const JsonType& json) {
  return json.dump(-1, ' ', false, JsonType::error_handler_t::replace) + "\n";
}

// Appends a string as JSON, in quotes. Bytes that are not UTF-8 become U+FFFD.
inline void append_json_string(std::string& out, std::string_view text) {
  out += '"';
  size_t copied = 0;
  for (size_t i = 0; i < text.size();) {
    const unsigned char c = static_cast<unsigned char>(text[i]);
    if (c >= 0x20 && c < 0x80 && c != '"' && c != '\\') {
      i++;
      continue;
    }
    size_t bad = 1;
    const size_t length = c < 0x80 ? 0 : utf8_length(text, i, bad);
    if (length > 0) {
      i += length;
      continue;
    }
    out += text.substr(copied, i - copied);
    if (c >= 0x80) {
      out += kReplacement;
    } else if (c == '"' || c == '\\') {
      (out += '\\') += char(c);
    } else if (c == '\n' || c == '\r' || c == '\t') {
      (out += '\\') += c == '\n' ? 'n' : c == '\r' ? 'r' : 't';
    } else {
      out += format("\\u%04x", c);
    }
    copied = i += bad;
  }
  out += text.substr(copied);
  out += '"';
}

// A value in a message: its JSON, shortened.
inline std::string json_text(const Json& value) {
  const std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

// The value as T (bool, an integer, a floating-point type, std::string, a vector of strings), of
// exactly that kind: no string is read as a number, no fraction as an integer. Json: any kind.
template <class T>
T json_as(const Json& value, const std::string& key, const std::string& where) {
  const auto need = [&](bool good, const char* expected) {
    if (!good) fail(where, ": ", key, ": found ", json_text(value), ", expected ", expected);
  };
  if constexpr (std::is_same_v<T, Json>) {
    return value;
  } else if constexpr (std::is_same_v<T, bool>) {
    need(value.is_boolean(), "true or false");
    return value.template get<bool>();
  } else if constexpr (std::is_integral_v<T>) {
    need(value.is_number_integer(), "an integer");
    if (value.is_number_unsigned()) {
      const uint64_t x = value.template get<uint64_t>();
      need(x <= uint64_t(std::numeric_limits<T>::max()), "a smaller integer");
      return T(x);
    }
    const int64_t x = value.template get<int64_t>();  // negative: the parser's choice of type
    need(x >= int64_t(std::numeric_limits<T>::min()), "a larger integer");
    need(x < 0 || uint64_t(x) <= uint64_t(std::numeric_limits<T>::max()), "a smaller integer");
    return T(x);
  } else if constexpr (std::is_floating_point_v<T>) {
    need(value.is_number() && std::isfinite(value.template get<T>()), "a number");
    return value.template get<T>();
  } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
    need(value.is_array(), "an array of strings");
    T list;
    for (const Json& item : value) list.push_back(json_as<std::string>(item, key, where));
    return list;
  } else {
    static_assert(std::is_same_v<T, std::string>);
    need(value.is_string(), "a string");
    return value.template get<std::string>();
  }
}

template <class T>
T json_get(const Json& object, const std::string& key, const std::string& where) {
  if (!object.is_object()) fail(where, ": found ", json_text(object), ", expected an object");
  const auto it = object.find(key);
  if (it == object.end()) fail(where, ": ", key, " is missing");
  return json_as<T>(*it, key, where);
}

// The same, where an absent key or null means `fallback`.
template <class T>
T json_get_or(const Json& object, const std::string& key, const T& fallback,
              const std::string& where) {
  const bool absent = object.is_object() && (!object.contains(key) || object.at(key).is_null());
  return absent ? fallback : json_get<T>(object, key, where);
}

}  // namespace cake
