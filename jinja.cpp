// Jinja, as published chat templates use it, where every text knows where its parts are from.
//
//     template text --Lexer--> tokens --Parser--> tree --Renderer + variables--> text and origins
//
// The language is that of Jinja2 (https://jinja.palletsprojects.com/en/stable/templates) with the
// settings of Hugging Face's transformers: trim_blocks and lstrip_blocks are on, a sandbox in which
// lists and dictionaries never change, {% break %}, {% continue %}, {% generation %}, tojson as
// json.dumps(ensure_ascii=False) writes it, raise_exception and strftime_now. What no published
// template was found to use is refused with its line: {% include %}, {% call %}, recursive loops.
//
// A text is its bytes and a list of runs, each of which has an origin: the template, or a part of
// message i. All that takes texts apart and puts them together (slices, strip, replace, join, ~)
// keeps the origins. What is printed of another value, as JSON too, has the value's origin, and
// every text in it keeps its own. cake/chat_template.h tells from origins which text may hold
// special tokens, and which text the assistant says.
#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cake/jinja.h"
#include "cake/json.h"
#include "cake/run.h"

namespace cake::jinja {

// ---------------------------------------------------------------------------------------------
// Characters: Python counts and cuts texts by characters, not bytes. Invalid bytes count as one.

size_t char_end(std::string_view text, size_t i) {
  size_t end = i + 1;
  while (end < text.size() && (text[end] & 0xc0) == 0x80) end++;
  return end;
}

size_t count_chars(std::string_view text) {
  return size_t(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

size_t char_begin(std::string_view text, size_t i) {  // of the character that has byte i
  while (i > 0 && (text[i] & 0xc0) == 0x80) i--;
  return i;
}

// The code point of the character at i.
uint32_t code_point(std::string_view text, size_t i) {
  const unsigned char first = static_cast<unsigned char>(text[i]);
  uint32_t code = first < 0x80   ? first
                  : first < 0xe0 ? first & 31u
                                 : first & (first < 0xf0 ? 15u : 7u);
  const size_t end = char_end(text, i);
  for (size_t k = i + 1; k < end; k++) code = code << 6 | (text[k] & 63u);
  return code;
}

void append_code_point(std::string& out, uint32_t code) {
  if (code < 0x80) return void(out += char(code));
  const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // bytes behind the first one
  constexpr int kFirst[] = {0, 0xc0, 0xe0, 0xf0};
  out += char(kFirst[more] | int(code >> (6 * more)));
  for (int i = more - 1; i >= 0; i--) out += char(0x80 | (code >> (6 * i) & 63));
}

bool is_space(uint32_t c) {  // as Python's str.isspace
  return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

// Upper or lower case of Latin, Greek and Cyrillic letters that have one of the same alphabet.
uint32_t change_case(uint32_t c, bool upper) {
  const auto shift = [&](uint32_t first, uint32_t last, uint32_t distance) {  // of upper case
    if (!upper && c >= first && c <= last)
      c += distance;
    else if (upper && c >= first + distance && c <= last + distance)
      c -= distance;
  };
  if (c < 0x80) return shift('A', 'Z', 32), c;
  if (c == 0xd7 || c == 0xf7 || c == 0x131 || c == 0x138 || c == 0x149)
    return c;  // no letters' pairs
  if (c < 0x100) return c == 0xff ? (upper ? 0x178 : c) : (shift(0xc0, 0xde, 32), c);
  const bool odd_is_upper = (c >= 0x139 && c <= 0x148) || (c >= 0x179 && c <= 0x17e);
  if ((c >= 0x100 && c <= 0x137 && c != 0x130) || odd_is_upper || (c >= 0x14a && c <= 0x177)) {
    const bool is_upper = (c & 1) == uint32_t(odd_is_upper);
    return is_upper == upper ? c : is_upper ? c + 1 : c - 1;
  }
  if (c == 0x3c2) return upper ? 0x3a3 : c;
  if (c >= 0x391 && c <= 0x3c9 && c != 0x3a2) return shift(0x391, 0x3a9, 32), c;
  if (c >= 0x400 && c <= 0x45f)
    return c >= 0x410 && c <= 0x44f ? (shift(0x410, 0x42f, 32), c) : (shift(0x400, 0x40f, 80), c);
  return c;
}

// ---------------------------------------------------------------------------------------------
// Texts with origins

struct Run {  // of a text: from the end of the run before it
  size_t end;
  Origin origin;
  bool generated = false;  // written in a {% generation %} block
};

struct Text {
  std::string bytes;
  std::vector<Run> runs;  // none empty

  Text() = default;
  Text(std::string_view text, Origin origin) { append(text, origin); }

  void append(std::string_view more, Origin origin, bool generated = false) {
    if (more.empty()) return;
    bytes += more;
    const bool same =
        !runs.empty() && runs.back().origin == origin && runs.back().generated == generated;
    if (!same) runs.push_back({0, origin, generated});
    runs.back().end = bytes.size();
  }
  void append(const Text& from, size_t begin, size_t end) {
    size_t i = begin == 0 ? 0 : from.run_at(begin);
    for (; begin < end; begin = from.runs[i++].end) {
      const size_t stop = std::min(end, from.runs[i].end);
      append(std::string_view(from.bytes).substr(begin, stop - begin), from.runs[i].origin,
             from.runs[i].generated);
    }
  }
  Origin first_foreign() const {  // the first one that is not the template's
    for (const Run& run : runs)
      if (run.origin.source != Source::from_template) return run.origin;
    return {};
  }
  // All from `begin` on was written in a {% generation %} block.
  void mark_generated(size_t begin) {
    size_t i = run_at(begin);
    if (i < runs.size() && begin > (i > 0 ? runs[i - 1].end : 0)) {
      Run before = runs[i];
      before.end = begin;
      runs.insert(runs.begin() + long(i++), before);
    }
    for (; i < runs.size(); i++) runs[i].generated = true;
  }
  Text part(size_t begin, size_t end) const {
    Text text;
    text.append(*this, begin, end);
    return text;
  }
  size_t run_at(size_t offset) const {  // the run of a byte
    return size_t(std::upper_bound(runs.begin(), runs.end(), offset,
                                   [](size_t o, const Run& run) { return o < run.end; }) -
                  runs.begin());
  }
  // Of the byte there; of the text's end, that of its last byte.
  Origin origin_at(size_t offset) const {
    return runs.empty() ? Origin{} : runs[std::min(run_at(offset), runs.size() - 1)].origin;
  }
};

// ---------------------------------------------------------------------------------------------
// Values

// What a value may share with its copies. One type for all keeps the code small.
struct Object {
  Text text;
  std::vector<Value> items;  // of a list or tuple; those that a loop goes through
  std::vector<std::pair<Value, Value>> entries;  // of a dictionary or namespace
  size_t index = 0;  // of a loop; of a generator, its first item that was not taken yet
  int depth = 0;     // of the lists, dictionaries and loops in each other
};

// Lists and dictionaries in each other: functions that go through them call themselves.
constexpr int kMaxValueDepth = kMaxJsonDepth + 100;

Value::Value(Text text) : kind(Kind::text), object(std::make_shared<Object>()) {
  object->text = std::move(text);
}
const Text& Value::text() const { return object->text; }
const std::vector<Value>& Value::items() const { return object->items; }
std::vector<std::pair<Value, Value>>& Value::entries() const { return object->entries; }
const Value* Value::find(std::string_view key) const {
  for (const auto& [k, value] : entries())
    if (k.is(Kind::text) && k.text().bytes == key) return &value;
  return nullptr;
}

void grow_depth(Object& outer, const Value& inner) {
  const bool is_nested = inner.is_list() || inner.is(Kind::dict) || inner.is(Kind::loop);
  if (is_nested) outer.depth = std::max(outer.depth, inner.object->depth + 1);
  if (outer.depth > kMaxValueDepth)
    fail("found more than ", kMaxValueDepth, " lists in each other");
}

Value make_text(std::string_view text, Origin origin) { return Value(Text(text, origin)); }
Value list_of(Kind kind, std::vector<Value> items, Origin origin = {}) {
  Value list(kind, std::make_shared<Object>());
  for (const Value& item : items) grow_depth(*list.object, item);
  list.object->items = std::move(items), list.origin = origin;
  return list;
}
Value make_list(std::vector<Value> items) { return list_of(Kind::list, std::move(items)); }
Value dict_of(std::vector<std::pair<Value, Value>> entries, Origin origin = {}) {
  Value dict(Kind::dict, std::make_shared<Object>());
  for (const auto& entry : entries) grow_depth(*dict.object, entry.second);
  dict.object->entries = std::move(entries), dict.origin = origin;
  return dict;
}
Value make_dict(Variables variables) {
  std::vector<std::pair<Value, Value>> entries;
  for (auto& [key, value] : variables) entries.emplace_back(make_text(key), std::move(value));
  return dict_of(std::move(entries));
}

Value from_json(const OrderedJson& json, Origin origin) {
  Value value(Kind::none);
  if (json.is_string()) {
    value = make_text(json.get_ref<const std::string&>(), origin);
  } else if (json.is_boolean()) {
    value = Value(json.get<bool>());
  } else if (json.is_number_integer()) {
    value = json.is_number_unsigned() && json.get<uint64_t>() > uint64_t(INT64_MAX)
                ? Value(json.get<double>())
                : Value(json.get<int64_t>());
  } else if (json.is_number()) {
    value = Value(json.get<double>());
  } else if (json.is_array()) {
    std::vector<Value> items;
    for (const OrderedJson& item : json) items.push_back(from_json(item, origin));
    return list_of(Kind::list, std::move(items), origin);
  } else if (json.is_object()) {
    std::vector<std::pair<Value, Value>> entries;
    for (const auto& item : json.items()) {
      entries.emplace_back(make_text(item.key(), origin), from_json(item.value(), origin));
    }
    return dict_of(std::move(entries), origin);
  }
  value.origin = origin;
  return value;
}

bool is_true(const Value& v) {
  switch (v.kind) {
    case Kind::undefined:
    case Kind::none:
      return false;
    case Kind::real:
      return v.real != 0;
    case Kind::text:
      return !v.text().bytes.empty();
    case Kind::list:
    case Kind::tuple:
      return v.lazy == Lazy::generator || !v.items().empty();
    case Kind::dict:
      return !v.entries().empty();
    case Kind::boolean:
    case Kind::integer:
      return v.integer != 0;
    default:
      return true;
  }
}

const char* kind_name(const Value& v) {
  constexpr const char* kNames[] = {"something undefined",
                                    "none",
                                    "a boolean",
                                    "an integer",
                                    "a float",
                                    "a string",
                                    "a list",
                                    "a tuple",
                                    "a dictionary",
                                    "a namespace",
                                    "a loop",
                                    "a macro",
                                    "a function",
                                    "a method"};
  return kNames[size_t(v.kind)];
}

// ---------------------------------------------------------------------------------------------
// Work on values, with limits

// What a rendering has used of its limits. Work whose size comes from data counts as steps too: a
// template of a few words could keep a machine busy for hours otherwise.
class Budget {
 public:
  explicit Budget(const Limits& limits) : limits_(limits) {}
  void count(size_t n = 1) {
    if (n > size_t(limits_.steps - steps_))
      fail("found more than ", limits_.steps, " steps, expected a template that ends");
    steps_ += int64_t(n);
  }
  void count_bytes(size_t n) { count(n / 256); }  // that are copied, compared or searched
  void count_text(const Text& text) {
    count_bytes(text.bytes.size());
    count(text.runs.size() / 4);
  }
  void check_size(size_t bytes) const {
    if (bytes > limits_.output) fail("found a text of more than ", limits_.output, " bytes");
  }

 private:
  const Limits& limits_;
  int64_t steps_ = 0;
};

// Where a part begins; npos: nowhere. memmem needs time for the sum of both sizes only, where
// std::string::find may need it for their product.
size_t find_part(std::string_view text, std::string_view part, size_t from = 0) {
  if (from > text.size()) return text.npos;
  const void* at = memmem(text.data() + from, text.size() - from, part.data(), part.size());
  return at ? size_t(static_cast<const char*>(at) - text.data()) : text.npos;
}

bool are_equal(const Value& a, const Value& b, Budget& budget);

// The entry of a dictionary or namespace with this key, or null.
const Value* find_entry(const Value& dict, const Value& key, Budget& budget) {
  budget.count(dict.entries().size() / 16);
  for (const auto& [k, value] : dict.entries())
    if (are_equal(k, key, budget)) return &value;
  return nullptr;
}

bool are_equal(const Value& a, const Value& b, Budget& budget) {
  if (a.is_number() && b.is_number()) {
    return a.is_integer() && b.is_integer() ? a.integer == b.integer : a.number() == b.number();
  }
  if (a.kind != b.kind || a.lazy != b.lazy) return false;
  if (a.object && a.object == b.object) return true;
  switch (a.kind) {
    case Kind::undefined:
    case Kind::none:
      return true;
    case Kind::text:
      if (a.text().bytes.size() != b.text().bytes.size()) return false;
      budget.count_bytes(a.text().bytes.size());
      return a.text().bytes == b.text().bytes;
    case Kind::list:
    case Kind::tuple: {
      const auto equal = [&](const Value& x, const Value& y) {
        budget.count();
        return are_equal(x, y, budget);
      };
      return a.lazy != Lazy::generator && a.items().size() == b.items().size() &&
             std::equal(a.items().begin(), a.items().end(), b.items().begin(), equal);
    }
    case Kind::dict: {
      const auto has = [&](const std::pair<Value, Value>& entry) {
        budget.count();
        const Value* other = find_entry(b, entry.first, budget);
        return other && are_equal(entry.second, *other, budget);
      };
      return a.entries().size() == b.entries().size() &&
             std::all_of(a.entries().begin(), a.entries().end(), has);
    }
    default:
      return !a.object && !b.object && a.integer == b.integer;
  }
}

// Throws Error where Python has no order for the two.
bool is_less(const Value& a, const Value& b, Budget& budget) {
  if (a.is_number() && b.is_number()) {
    return a.is_integer() && b.is_integer() ? a.integer < b.integer : a.number() < b.number();
  }
  if (a.is(Kind::text) && b.is(Kind::text)) {
    if (a.object == b.object) return false;
    budget.count_bytes(std::min(a.text().bytes.size(), b.text().bytes.size()));
    return a.text().bytes < b.text().bytes;
  }
  if (a.is_list() && b.kind == a.kind && !a.is_lazy() && !b.is_lazy()) {
    const size_t n = std::min(a.items().size(), b.items().size());
    for (size_t i = 0; i < n && a.object != b.object; i++) {  // the first that differs decides
      budget.count();
      if (!are_equal(a.items()[i], b.items()[i], budget))
        return is_less(a.items()[i], b.items()[i], budget);
    }
    return a.items().size() < b.items().size();
  }
  fail("found ", kind_name(a), " and ", kind_name(b),
       ", expected two numbers or strings to compare");
}

// ---------------------------------------------------------------------------------------------
// Values as text: str(), repr() and json.dumps() of Python

std::string real_text(double d, bool as_json) {
  if (std::isnan(d)) return as_json ? "NaN" : "nan";
  if (std::isinf(d)) return std::string(d < 0 ? "-" : "") + (as_json ? "Infinity" : "inf");
  char buffer[40];
  // The fewest digits that give the same number again; Python writes an exponent from 16 digits on.
  const bool exponent = d != 0 && (std::fabs(d) >= 1e16 || std::fabs(d) < 1e-4);
  const auto form = exponent ? std::chars_format::scientific : std::chars_format::fixed;
  std::string text(buffer, std::to_chars(buffer, buffer + sizeof buffer, d, form).ptr);
  return exponent || text.find('.') != text.npos ? text : text + ".0";
}

// As Python's str.isprintable, but for code points that Unicode has not assigned.
bool is_printable(uint32_t c) {
  constexpr std::pair<uint32_t, uint32_t> kNot[] = {
      {0, 0x1f},          {0x7f, 0xa0},         {0xad, 0xad},       {0x600, 0x605},
      {0x61c, 0x61c},     {0x6dd, 0x6dd},       {0x70f, 0x70f},     {0x890, 0x891},
      {0x8e2, 0x8e2},     {0x1680, 0x1680},     {0x180e, 0x180e},   {0x2000, 0x200f},
      {0x2028, 0x202f},   {0x205f, 0x206f},     {0x3000, 0x3000},   {0xd800, 0xf8ff},
      {0xfeff, 0xfeff},   {0xfff0, 0xfffb},     {0xfffe, 0xffff},   {0x110bd, 0x110bd},
      {0x110cd, 0x110cd}, {0x13430, 0x1343f},   {0x1bca0, 0x1bca3}, {0x1d173, 0x1d17a},
      {0xe0000, 0xe00ff}, {0xe01f0, 0xffffffff}};
  return std::none_of(std::begin(kNot), std::end(kNot),
                      [&](const auto& range) { return c >= range.first && c <= range.second; });
}

struct JsonStyle {
  int indent = -1;  // columns; -1: all in one line
  bool ascii = false, sort_keys = false;
  Text between{", ", {}}, colon{": ", {}};
};

// Every text in a value keeps its own origins: a printed message has a role and a content.
class Printer {
 public:
  explicit Printer(Budget& budget) : budget_(budget) {}
  Text out;

  void add_plain(const Value& v, bool repr = false) {
    budget_.count();
    origin_ = v.origin;
    if (v.is_lazy())
      fail("found what Python makes when it is asked for, expected | list behind it");
    switch (v.kind) {
      case Kind::undefined:
        return add(repr ? "Undefined" : "");
      case Kind::none:
        return add("None");
      case Kind::boolean:
        return add(v.integer ? "True" : "False");
      case Kind::integer:
        return add(std::to_string(v.integer));
      case Kind::real:
        return add(real_text(v.real, false));
      case Kind::text:
        return repr ? add_repr(v.text()) : add_text(v.text());
      case Kind::list:
      case Kind::tuple: {
        add(v.is(Kind::list) ? "[" : "(");
        for (size_t i = 0; i < v.items().size(); i++) {
          if (i > 0) add(", ");
          add_plain(v.items()[i], true);
          origin_ = v.origin;
        }
        return add(v.is(Kind::list) ? "]" : v.items().size() == 1 ? ",)" : ")");
      }
      case Kind::dict: {
        const char* between = "{";
        for (const auto& [key, value] : v.entries()) {
          add(between), add_plain(key, true);
          origin_ = v.origin;
          add(": "), add_plain(value, true);
          origin_ = v.origin;
          between = ", ";
        }
        return add(v.entries().empty() ? "{}" : "}");
      }
      default:
        fail("found ", kind_name(v), ", expected a value that can be printed");
    }
  }

  void add_json(const Value& v, const JsonStyle& style, int level = 0) {
    budget_.count();
    origin_ = v.origin;
    if (v.is_lazy())
      fail("tojson: found what Python makes when it is asked for, expected | list before it");
    switch (v.kind) {
      case Kind::none:
        return add("null");
      case Kind::boolean:
        return add(v.integer ? "true" : "false");
      case Kind::integer:
        return add(std::to_string(v.integer));
      case Kind::real:
        return add(real_text(v.real, true));
      case Kind::text:
        return add_json_text(v.text(), style);
      case Kind::list:
      case Kind::tuple:
        add("[");
        for (size_t i = 0; i < v.items().size(); i++) {
          add_json_between(i, style, level);
          add_json(v.items()[i], style, level + 1);
          origin_ = v.origin;
        }
        if (!v.items().empty()) add_json_line(style, level);
        return add("]");
      case Kind::dict:
        return add_json_dict(v, style, level);
      default:
        fail("tojson: found ", kind_name(v), ", expected a value that JSON has");
    }
  }

 private:
  void add(std::string_view text) {
    budget_.check_size(out.bytes.size() + text.size());
    out.append(text, origin_);
  }
  void add_text(const Text& text) {
    budget_.check_size(out.bytes.size() + text.bytes.size());
    out.append(text, 0, text.bytes.size());
  }
  // One of the template's own counts as a part of the value; another one keeps its origins.
  void add_separator(const Text& text) {
    text.first_foreign() == Origin{} ? add(text.bytes) : add_text(text);
  }
  void add_repr(const Text& whole) {
    const std::string_view text = whole.bytes;
    budget_.count(text.size() / 64);
    origin_ = whole.origin_at(0);
    const bool has_single = text.find('\'') != text.npos, has_double = text.find('"') != text.npos;
    const char quote = has_single && !has_double ? '"' : '\'';
    add(std::string_view(&quote, 1));
    for (size_t i = 0; i < text.size(); i = char_end(text, i)) {
      const uint32_t c = code_point(text, i);
      const size_t escape = c < 0x80 ? std::string_view("\n\r\t").find(char(c)) : text.npos;
      origin_ = whole.origin_at(i);
      if (c == uint32_t(quote) || c == '\\')
        add(std::string{'\\', char(c)});
      else if (escape != text.npos)
        add(std::string{'\\', "nrt"[escape]});
      else if (is_printable(c))
        add(text.substr(i, char_end(text, i) - i));
      else
        add(format(c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x", c));
    }
    add(std::string_view(&quote, 1));
  }
  void add_json_text(const Text& whole, const JsonStyle& style) {
    const std::string_view text = whole.bytes;
    budget_.count(text.size() / 64);
    origin_ = whole.origin_at(0);
    add("\"");
    for (size_t i = 0; i < text.size(); i = char_end(text, i)) {
      const uint32_t c = code_point(text, i);
      const size_t escape = c < 0x80 ? std::string_view("\n\r\t\b\f").find(char(c)) : text.npos;
      origin_ = whole.origin_at(i);
      if (c == '"' || c == '\\')
        add(std::string{'\\', char(c)});
      else if (escape != text.npos)
        add(std::string{'\\', "nrtbf"[escape]});
      else if (c >= 0x20 && (c < 0x7f || !style.ascii))
        add(text.substr(i, char_end(text, i) - i));
      else if (c < 0x10000)
        add(format("\\u%04x", c));
      else
        add(format("\\u%04x\\u%04x", 0xd7c0 + (c >> 10), 0xdc00 + (c & 0x3ff)));
    }
    add("\"");
  }
  void add_json_line(const JsonStyle& style, int level) {
    if (style.indent >= 0) add('\n' + std::string(size_t(style.indent) * size_t(level), ' '));
  }
  void add_json_between(size_t i, const JsonStyle& style, int level) {
    if (i > 0) add_separator(style.between);
    add_json_line(style, level + 1);
  }
  void add_json_dict(const Value& v, const JsonStyle& style, int level) {
    std::vector<const std::pair<Value, Value>*> entries;
    for (const auto& entry : v.entries()) entries.push_back(&entry);
    if (style.sort_keys) {
      budget_.count(entries.size());
      std::stable_sort(entries.begin(), entries.end(),
                       [&](auto* a, auto* b) { return is_less(a->first, b->first, budget_); });
    }
    add("{");
    for (size_t i = 0; i < entries.size(); i++) {
      const Value& key = entries[i]->first;
      add_json_between(i, style, level);
      if (key.is(Kind::text)) {
        add_json_text(key.text(), style);
      } else {
        if (!key.is_number() && !key.is(Kind::none))
          fail("tojson: found ", kind_name(key), " as a key, expected a string");
        add("\""), add_json(key, style), add("\"");
      }
      origin_ = v.origin;
      add_separator(style.colon);
      add_json(entries[i]->second, style, level + 1);
      origin_ = v.origin;
    }
    if (!entries.empty()) add_json_line(style, level);
    add("}");
  }

  Origin origin_;
  Budget& budget_;
};

// ---------------------------------------------------------------------------------------------
// Tokens

struct Token {
  enum Type {
    text,
    begin_block,
    end_block,
    begin_print,
    end_print,
    name,
    string,
    integer,
    real,
    sign,
    end
  };
  Type type;
  std::string value;
  int line;
  bool is(Type t, std::string_view v) const { return type == t && value == v; }
};

class Lexer {
 public:
  Lexer(std::string_view source, const std::string& name) : name_(name) {
    for (size_t i = 0; i < source.size(); i++) {  // line ends are \n, and none ends the template
      if (source[i] != '\r')
        source_ += source[i];
      else if (i + 1 == source.size() || source[i + 1] != '\n')
        source_ += '\n';
    }
    if (source_.ends_with('\n')) source_.pop_back();
  }

  std::vector<Token> run() {
    for (;;) {
      const size_t tag = next_tag();
      const bool more = tag < source_.size();
      const char kind = more ? source_[tag + 1] : ' ',
                 control = more && tag + 2 < source_.size() ? source_[tag + 2] : ' ';
      add_text(std::string_view(source_).substr(at_, tag - at_), kind, control);
      if (!more) break;
      move_to(tag + 2);
      if (control == '-' || control == '+') at_++;
      if (kind == '#')
        skip_comment();
      else
        lex_tag(kind);
    }
    add(Token::end, "the end of the template");
    return std::move(tokens_);
  }

 private:
  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    fail(name_, ":", line_, ": ", parts...);
  }
  void add(Token::Type type, std::string value) {
    tokens_.push_back({type, std::move(value), line_});
  }
  bool sees(std::string_view text) const {
    return std::string_view(source_).substr(at_).starts_with(text);
  }
  void move_to(size_t end) {
    line_ += int(std::count(source_.begin() + long(at_), source_.begin() + long(end), '\n'));
    at_ = end;
  }
  size_t space_end(size_t i) const {  // the first character from here on that is no white space
    while (i < source_.size() && is_space(code_point(source_, i))) i = char_end(source_, i);
    return i;
  }
  size_t next_tag() const {
    for (size_t i = source_.find('{', at_); i != std::string::npos; i = source_.find('{', i + 1))
      if (i + 1 < source_.size() &&
          std::string_view("{%#").find(source_[i + 1]) != std::string_view::npos)
        return i;
    return source_.size();
  }

  // lstrip_blocks: white space between the beginning of a line and a block or comment is dropped.
  void add_text(std::string_view text, char kind, char control) {
    size_t end = text.size();
    for (size_t i = end; i > 0 && is_space(code_point(text, i = char_begin(text, i - 1)));) end = i;
    const bool begins_line = at_ == 0 || source_[at_ - 1] == '\n';
    if (control != '-') {
      const size_t line = text.rfind('\n') == text.npos ? 0 : text.rfind('\n') + 1;
      const bool drop = (kind == '%' || kind == '#') && control != '+' &&
                        (line > 0 || begins_line) && end <= line;
      end = drop ? line : text.size();
    }
    if (end > 0) add(Token::text, std::string(text.substr(0, end)));
  }
  // Behind a tag. trim_blocks: the end of the line behind a block or comment is dropped.
  void end_tag(char kind, bool strip, bool keep) {
    size_t end = at_;
    if (strip) {
      end = space_end(end);
    } else if (kind != '{' && !keep && end < source_.size() && source_[end] == '\n') {
      end++;
    }
    move_to(end);
  }
  void skip_comment() {
    const size_t end = source_.find("#}", at_);
    if (end == std::string::npos) refuse("found a comment without its end, expected #}");
    const char last = end > at_ ? source_[end - 1] : ' ';
    move_to(end + 2);
    end_tag('#', last == '-', last == '+');
  }

  void lex_tag(char kind) {
    const std::string close = kind == '{' ? "}}" : "%}";
    add(kind == '{' ? Token::begin_print : Token::begin_block, std::string("{") + kind);
    int brackets = 0;
    for (;;) {
      move_to(space_end(at_));
      if (at_ == source_.size()) refuse("found the end of the template, expected ", close);
      const bool strip = sees("-" + close), keep = kind == '%' && sees("+" + close);
      if (brackets == 0 && (strip || keep || sees(close))) {
        add(kind == '{' ? Token::end_print : Token::end_block, close);
        move_to(at_ + (strip || keep ? 3 : 2));
        return end_tag(kind, strip, keep);
      }
      lex_token(brackets);
    }
  }
  void lex_token(int& brackets) {
    const std::string_view rest = std::string_view(source_).substr(at_);
    const unsigned char c = static_cast<unsigned char>(rest[0]);
    if (std::isalpha(c) || c == '_') {
      size_t n = 1;
      while (n < rest.size() &&
             (std::isalnum(static_cast<unsigned char>(rest[n])) || rest[n] == '_'))
        n++;
      add(Token::name, std::string(rest.substr(0, n)));
      return move_to(at_ + n);
    }
    if (std::isdigit(c)) return lex_number(rest);
    if (c == '"' || c == '\'') return lex_string(rest);
    size_t n = 1;
    for (const std::string_view two : {"==", "!=", "<=", ">=", "//"})
      if (rest.starts_with(two)) n = 2;
    if (n == 1 && std::string_view("+-*/%~<>=()[]{}.,:|").find(char(c)) == std::string_view::npos) {
      refuse("found ", json_text(std::string(rest.substr(0, char_end(rest, 0)))),
             ", expected an expression");
    }
    if (c == '(' || c == '[' || c == '{') brackets++;
    if ((c == ')' || c == ']' || c == '}') && --brackets < 0)
      refuse("found ", std::string(1, rest[0]), ", expected the bracket that it closes before it");
    add(Token::sign, std::string(rest.substr(0, n)));
    move_to(at_ + n);
  }
  void lex_number(std::string_view rest) {
    const auto digits = [&](size_t i) {
      while (i < rest.size() && (std::isdigit(static_cast<unsigned char>(rest[i])) ||
                                 (rest[i] == '_' && i + 1 < rest.size() &&
                                  std::isdigit(static_cast<unsigned char>(rest[i + 1])))))
        i++;
      return i;
    };
    const auto digit_at = [&](size_t i) {
      return i < rest.size() && std::isdigit(static_cast<unsigned char>(rest[i]));
    };
    size_t n = digits(0);
    const size_t whole = n;
    if (n < rest.size() && rest[n] == '.' && digit_at(n + 1)) n = digits(n + 1);
    if (n < rest.size() && (rest[n] == 'e' || rest[n] == 'E')) {
      const size_t sign = n + 1 < rest.size() && (rest[n + 1] == '+' || rest[n + 1] == '-');
      if (digit_at(n + 1 + sign)) n = digits(n + 1 + sign);
    }
    std::string number(rest.substr(0, n));
    std::erase(number, '_');
    add(n > whole ? Token::real : Token::integer, number);
    move_to(at_ + n);
  }
  void lex_string(std::string_view rest) {
    std::string out;
    size_t i = 1;
    for (; i < rest.size() && rest[i] != rest[0]; i++) {
      if (rest[i] != '\\' || i + 1 == rest.size()) {
        out += rest[i];
        continue;
      }
      const char c = rest[++i];
      const size_t known = std::string_view("ntrbfva\\'\"\n").find(c);
      const int digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
      if (known != std::string_view::npos) {
        out += std::string_view("\n\t\r\b\f\v\a\\'\"").substr(known, 1);
      } else if (digits > 0) {
        uint32_t code = 0;
        const char* begin = rest.data() + i + 1;
        const bool fits = rest.size() - i > size_t(digits);
        if (!fits || std::from_chars(begin, begin + digits, code, 16).ptr != begin + digits ||
            code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) {
          refuse("found \\", std::string(1, c), ", expected ", digits,
                 " hexadecimal digits of a character behind it");
        }
        append_code_point(out, code);
        i += size_t(digits);
      } else if (c >= '0' && c <= '7') {
        refuse("found \\", std::string(1, c), ", expected \\x and two hexadecimal digits");
      } else {
        (out += '\\') += c;
      }
    }
    if (i >= rest.size())
      refuse("found a string without its end, expected ", std::string(1, rest[0]));
    add(Token::string, std::move(out));
    move_to(at_ + i + 1);
  }

  std::string source_;
  const std::string& name_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  int line_ = 1;
};

// ---------------------------------------------------------------------------------------------
// The tree

enum class Op : uint8_t {
  // expressions: what their kids are
  constant,
  variable,
  list,
  tuple,
  dict,  // the items; keys and values in turns
  negate,
  plus,
  not_,
  and_,
  or_,
  math,         // left, right; `name` is the sign
  concatenate,  // all parts
  compare,      // the first; then `name` has a letter for each further one: = ! < > [ ] i n
  conditional,  // value, condition, and otherwise
  attribute,    // of this; `name`
  subscript,
  slice,   // of this; the index; or begin, end and step, null where absent
  call,    // what is called, then the arguments
  unpack,  // *list among the arguments: its items
  filter,
  test,  // `name` of this, with arguments
  // statements
  text,
  print,
  block,         // a block is any number of statements
  if_,           // conditions and blocks in turns, then perhaps a last block
  for_,          // target, items, condition (or null), block, otherwise (or null)
  set,           // target, value
  set_block,     // target, block, filters (or null)
  filter_block,  // block, filters
  macro,         // `kids`: defaults (or null) of `names`, and the block
  generation,    // a block
  break_,
  continue_
};

struct Node {
  Op op;
  int line = 0;
  std::string name = {};
  std::vector<std::unique_ptr<Node>> kids = {};
  std::vector<std::string> names = {};  // of arguments by name: of the last kids; of parameters
  Value constant = {};
  int variable = -1;                 // its number, of macros too
  std::vector<int> parameters = {};  // variables
  int height = 1;                    // of the tree below
};
using NodePtr = std::unique_ptr<Node>;

// A tree's height, and how many calls of eval and exec may be in each other: both walk the tree by
// calling themselves, and the stack is 8 MB.
constexpr int kMaxHeight = 1000, kMaxNested = 1500;
constexpr int kMaxLevels = 100;  // brackets and blocks in each other in a template's text
constexpr int kLoopVariable = 0;

struct Code {
  std::string name;  // of the template
  NodePtr body;
  std::unordered_map<std::string, int> variables;  // numbers
};

class Parser {
 public:
  Parser(std::vector<Token> tokens, Code& code) : tokens_(std::move(tokens)), code_(code) {}

  NodePtr run() {
    NodePtr body = block({});
    if (!sees(Token::end)) unexpected("a statement");
    return body;
  }

 private:
  struct Level {  // of brackets and blocks in each other
    Level(Parser& p) : parser(p) {
      if (++parser.depth_ > kMaxLevels)
        parser.refuse("found more than ", kMaxLevels, " brackets and blocks in each other");
    }
    ~Level() { parser.depth_--; }
    Parser& parser;
  };

  const Token& token(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  bool sees(Token::Type type) const { return token().type == type; }
  bool sees(std::string_view sign) const { return token().is(Token::sign, sign); }
  bool sees_name(std::string_view name) const { return token().is(Token::name, name); }
  bool skip(std::string_view sign) { return sees(sign) && ++at_; }
  bool skip_name(std::string_view name) { return sees_name(name) && ++at_; }
  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    fail(code_.name, ":", token().line, ": ", parts...);
  }
  [[noreturn]] void unexpected(const std::string& expected) const {
    refuse("found ", json_text(token().value), ", expected ", expected);
  }
  void expect(std::string_view sign) {
    if (!skip(sign)) unexpected(std::string(sign));
  }
  void expect(Token::Type type, const char* what) {
    if (!sees(type)) unexpected(what);
    at_++;
  }
  std::string name() {
    if (!sees(Token::name)) unexpected("a name");
    return tokens_[at_++].value;
  }
  int variable(const std::string& name) {
    return code_.variables.emplace(name, int(code_.variables.size())).first->second;
  }
  NodePtr node(Op op, std::string name = "") const {
    return NodePtr(new Node{.op = op, .line = token().line, .name = std::move(name)});
  }
  void add(Node& n, NodePtr kid) {
    if (kid) n.height = std::max(n.height, kid->height + 1);
    if (n.height > kMaxHeight)
      refuse("found more than ", kMaxHeight, " operators, filters or brackets in a row");
    n.kids.push_back(std::move(kid));
  }
  void add(Node& n, NodePtr a, NodePtr b) { add(n, std::move(a)), add(n, std::move(b)); }
  // A node that has this as its first part.
  NodePtr over(NodePtr kid, Op op, std::string name = "") {
    NodePtr n = node(op, std::move(name));
    add(*n, std::move(kid));
    return n;
  }

  // ---- statements

  // Up to a block tag with one of these names, whose name has been read; or the template's end.
  NodePtr block(std::initializer_list<std::string_view> ends, std::string* end = nullptr) {
    const Level level(*this);
    NodePtr body = node(Op::block);
    for (;;) {
      if (sees(Token::text)) {
        add(*body, node(Op::text, token().value));
        body->kids.back()->constant = make_text(token().value);
        at_++;
      } else if (sees(Token::begin_print)) {
        at_++;
        NodePtr print = node(Op::print);
        add(*print, tuple_or_expression());
        add(*body, std::move(print));
        expect(Token::end_print, "}}");
      } else if (sees(Token::begin_block)) {
        const std::string& tag = token(1).value;
        if (std::find(ends.begin(), ends.end(), tag) != ends.end()) {
          *end = tag;
          return at_ += 2, std::move(body);
        }
        at_++;
        add(*body, statement());
      } else {
        if (ends.size() > 0)
          refuse("found the end of the template, expected {% ", *(ends.end() - 1), " %}");
        return body;
      }
    }
  }
  void end_tag() { expect(Token::end_block, "%}"); }

  NodePtr statement() {
    const std::string tag = sees(Token::name) ? token().value : "";
    if (tag == "if") return if_statement();
    if (tag == "for") return for_statement();
    if (tag == "set") return set_statement();
    if (tag == "macro") return macro_statement();
    if (tag == "filter") return filter_statement();
    if (tag == "generation") return generation_statement();
    if (tag == "break" || tag == "continue") {
      if (loops_ == 0) unexpected("no " + tag + " outside of a loop");
      NodePtr n = node(tag == "break" ? Op::break_ : Op::continue_);
      at_++, end_tag();
      return n;
    }
    unexpected("if, for, set, macro, filter, generation, break or continue");
  }
  NodePtr if_statement() {
    NodePtr n = node(Op::if_);
    for (std::string end = "elif"; end != "endif";) {
      at_ += sees_name("if");
      if (end == "elif") add(*n, expression());
      end_tag();
      const bool last = end == "else";
      add(*n, last ? block({"endif"}, &end) : block({"elif", "else", "endif"}, &end));
    }
    end_tag();
    return n;
  }
  NodePtr for_statement() {
    NodePtr n = node(Op::for_);
    at_++;
    add(*n, target());
    if (!skip_name("in")) unexpected("in");
    add(*n, tuple_or_expression(false));
    add(*n, skip_name("if") ? expression() : nullptr);
    if (sees_name("recursive")) unexpected("no recursive loop");
    end_tag();
    std::string end;
    loops_++;
    add(*n, block({"else", "endfor"}, &end));
    loops_--;
    if (end == "else") end_tag();
    add(*n, end == "else" ? block({"endfor"}, &end) : nullptr);
    end_tag();
    return n;
  }
  // A variable, a namespace's attribute, or several of them.
  NodePtr target() {
    NodePtr first = one_target();
    if (!sees(",")) return first;
    NodePtr all = over(std::move(first), Op::tuple);
    while (skip(",")) add(*all, one_target());
    return all;
  }
  NodePtr one_target() {
    if (skip("(")) {
      const Level level(*this);
      NodePtr n = target();
      expect(")");
      return n;
    }
    NodePtr n = node(Op::variable, name());
    for (const char* fixed : {"true", "false", "none", "True", "False", "None"})
      if (n->name == fixed) refuse("found ", fixed, ", expected a name that can be set");
    n->variable = variable(n->name);
    return skip(".") ? over(std::move(n), Op::attribute, name()) : std::move(n);
  }
  NodePtr set_statement() {
    NodePtr n = node(Op::set);
    at_++;
    add(*n, target());
    if (skip("=")) {
      add(*n, tuple_or_expression());
      end_tag();
      return n;
    }
    n->op = Op::set_block;
    NodePtr filters = sees("|") ? filter_chain(nullptr) : nullptr;
    end_tag();
    std::string end;
    const int loops = std::exchange(loops_, 0);  // its text would be lost with a break
    add(*n, block({"endset"}, &end), std::move(filters));
    loops_ = loops;
    end_tag();
    return n;
  }
  NodePtr macro_statement() {
    if (macros_++ > 0 || loops_ > 0) unexpected("no macro inside of a loop or macro");
    NodePtr n = node(Op::macro);
    at_++;
    n->name = name(), n->variable = variable(n->name);
    expect("(");
    while (!skip(")")) {
      n->names.push_back(name()), n->parameters.push_back(variable(n->names.back()));
      add(*n, skip("=") ? expression() : nullptr);
      if (!sees(")")) expect(",");
    }
    end_tag();
    std::string end;
    add(*n, block({"endmacro"}, &end));
    end_tag();
    macros_--;
    return n;
  }
  NodePtr filter_statement() {
    NodePtr n = node(Op::filter_block);
    at_++;
    NodePtr filters = filter_chain(nullptr, true);
    end_tag();
    std::string end;
    const int loops = std::exchange(loops_, 0);
    add(*n, block({"endfilter"}, &end), std::move(filters));
    loops_ = loops;
    end_tag();
    return n;
  }
  NodePtr generation_statement() {
    NodePtr n = node(Op::generation);
    at_++, end_tag();
    std::string end;
    add(*n, block({"endgeneration"}, &end));
    end_tag();
    return n;
  }

  // ---- expressions, from the loosest to the closest binding

  NodePtr tuple_or_expression(bool conditional = true) {
    const auto one = [&] { return conditional ? expression() : or_expression(); };
    NodePtr first = one();
    if (!sees(",")) return first;
    NodePtr all = over(std::move(first), Op::tuple);
    while (skip(",") && !sees(Token::end_print) && !sees(Token::end_block)) add(*all, one());
    return all;
  }
  NodePtr expression() {
    const Level level(*this);
    NodePtr value = or_expression();
    while (sees_name("if")) {
      NodePtr n = over(std::move(value), Op::conditional);
      at_++;
      add(*n, or_expression());
      add(*n, skip_name("else") ? expression() : nullptr);
      value = std::move(n);
    }
    return value;
  }
  NodePtr or_expression() { return either(Op::or_, "or", &Parser::and_expression); }
  NodePtr and_expression() { return either(Op::and_, "and", &Parser::not_expression); }
  template <class Next>
  NodePtr either(Op op, std::string_view word, Next next) {
    NodePtr first = (this->*next)();
    if (!sees_name(word)) return first;
    NodePtr n = over(std::move(first), op);
    while (skip_name(word)) add(*n, (this->*next)());
    return n;
  }
  NodePtr not_expression() {
    if (!sees_name("not")) return comparison();
    const Level level(*this);
    at_++;
    return over(not_expression(), Op::not_);
  }
  NodePtr comparison() {
    NodePtr first = sum();
    NodePtr n = node(Op::compare);
    for (;;) {
      char letter = 0;
      for (const auto& [sign, is] :
           {std::pair("==", '='), {"!=", '!'}, {"<=", '['}, {">=", ']'}, {"<", '<'}, {">", '>'}})
        if (letter == 0 && skip(sign)) letter = is;
      if (letter == 0 && skip_name("in")) letter = 'i';
      if (letter == 0 && sees_name("not") && token(1).is(Token::name, "in")) at_ += 2, letter = 'n';
      if (letter == 0) break;
      if (n->kids.empty()) add(*n, std::move(first));
      n->name += letter;
      add(*n, sum());
    }
    return n->kids.empty() ? std::move(first) : std::move(n);
  }
  // Operators that are read from left to right.
  template <class Next>
  NodePtr chain(std::initializer_list<std::string_view> signs, Next next) {
    NodePtr left = (this->*next)();
    for (;;) {
      const auto found =
          std::find_if(signs.begin(), signs.end(), [&](std::string_view s) { return sees(s); });
      if (found == signs.end()) return left;
      left = over(std::move(left), Op::math, std::string(*found));
      at_++;
      add(*left, (this->*next)());
    }
  }
  NodePtr sum() { return chain({"+", "-"}, &Parser::concatenation); }
  NodePtr concatenation() {
    NodePtr first = product();
    if (!sees("~")) return first;
    NodePtr n = over(std::move(first), Op::concatenate);
    while (skip("~")) add(*n, product());
    return n;
  }
  NodePtr product() { return chain({"*", "/", "//", "%"}, &Parser::filtered); }
  NodePtr filtered() { return filter_chain(unary()); }
  NodePtr unary() {
    if (!sees("-") && !sees("+")) return postfix(primary());
    const Level level(*this);
    const Op op = sees("-") ? Op::negate : Op::plus;
    at_++;
    return over(unary(), op);
  }

  // Filters and tests behind a value. `value` is null where a block's text is filtered; `is_name`:
  // the first filter has no | before it.
  NodePtr filter_chain(NodePtr value, bool is_name = false) {
    for (int links = 0;; links++) {
      if (skip("|") || (links == 0 && is_name)) {
        NodePtr n = over(std::move(value), Op::filter, name());
        if (skip("(")) arguments(*n);
        value = std::move(n);
      } else if (value && skip_name("is")) {
        value = test(std::move(value));
      } else if (value && value->op == Op::filter && sees("(")) {
        value = over(std::move(value), Op::call);
        at_++, arguments(*value);
      } else {
        return value;
      }
    }
  }
  NodePtr test(NodePtr value) {
    const bool negated = skip_name("not");
    NodePtr n = over(std::move(value), Op::test, name());
    const bool is_argument = sees(Token::name) || sees(Token::string) || sees(Token::integer) ||
                             sees(Token::real) || sees("[") || sees("{");
    const auto ends = {"else", "or", "and"};  // Jinja2 takes any other name as an argument
    if (skip("(")) {
      arguments(*n);
    } else if (is_argument && !std::any_of(ends.begin(), ends.end(),
                                           [&](const char* e) { return sees_name(e); })) {
      add(*n, postfix(primary()));
    }
    return negated ? over(std::move(n), Op::not_) : std::move(n);
  }
  // Behind a bracket: those by name come last.
  void arguments(Node& n) {
    while (!skip(")")) {
      const bool by_name = sees(Token::name) && token(1).is(Token::sign, "=");
      if (by_name) n.names.push_back(name()), at_++;
      if (!by_name && !n.names.empty()) unexpected("an argument by name behind arguments by name");
      // A filter behind {% set x | or {% filter has no value yet.
      const Node* last = n.kids.empty() ? nullptr : n.kids.back().get();
      const bool unpacked = last && last->op == Op::unpack;
      if (unpacked && !by_name) unexpected("no argument behind the one with *");
      const bool unpacks = !by_name && skip("*");
      NodePtr value = expression();
      add(n, unpacks ? over(std::move(value), Op::unpack) : std::move(value));
      if (!sees(")")) expect(",");
    }
  }
  NodePtr postfix(NodePtr value) {
    for (;;) {
      if (skip(".")) {
        if (sees(Token::integer)) {
          value = over(std::move(value), Op::subscript);
          add(*value, primary());
        } else {
          value = over(std::move(value), Op::attribute, name());
        }
      } else if (skip("[")) {
        value = subscript(std::move(value));
      } else if (sees("(")) {
        value = over(std::move(value), Op::call);
        at_++, arguments(*value);
      } else {
        return value;
      }
    }
  }
  NodePtr subscript(NodePtr value) {
    NodePtr n = over(std::move(value), Op::subscript);
    if (!sees(":")) add(*n, expression());
    if (sees(":")) {
      if (n->kids.size() == 1) add(*n, nullptr);
      n->op = Op::slice;
      while (n->kids.size() < 4) {
        const bool more = skip(":") && !sees(":") && !sees("]");
        add(*n, more ? expression() : nullptr);
      }
    }
    expect("]");
    return n;
  }
  NodePtr primary() {
    const Level level(*this);
    const Token& t = token();
    NodePtr n = node(Op::constant);
    if (sees(Token::name)) {
      at_++;
      const bool is_true = t.value == "true" || t.value == "True";
      if (is_true || t.value == "false" || t.value == "False") {
        n->constant = Value(is_true);
      } else if (t.value == "none" || t.value == "None") {
        n->constant = Value(Kind::none);
      } else {
        n->op = Op::variable, n->name = t.value, n->variable = variable(t.value);
      }
      return n;
    }
    if (sees(Token::string)) {
      std::string text;
      while (sees(Token::string)) text += tokens_[at_++].value;
      n->constant = make_text(text);
      return n;
    }
    if (sees(Token::integer)) {
      int64_t i = 0;
      const auto end = std::from_chars(t.value.data(), t.value.data() + t.value.size(), i);
      if (end.ec != std::errc()) unexpected("an integer below 2^63");
      n->constant = Value(i);
      return at_++, std::move(n);
    }
    if (sees(Token::real)) {
      n->constant = Value(std::strtod(t.value.c_str(), nullptr));
      return at_++, std::move(n);
    }
    if (skip("(")) return parenthesis();
    if (skip("[")) return items(std::move(n), Op::list, "]");
    if (skip("{")) return items(std::move(n), Op::dict, "}");
    unexpected("an expression");
  }
  NodePtr parenthesis() {
    NodePtr n = node(Op::tuple);
    if (skip(")")) return n;
    NodePtr first = expression();
    if (skip(")")) return first;
    add(*n, std::move(first));
    expect(",");
    return items(std::move(n), Op::tuple, ")");
  }
  NodePtr items(NodePtr n, Op op, std::string_view close) {
    n->op = op;
    while (!skip(close)) {
      add(*n, expression());
      if (op == Op::dict) expect(":"), add(*n, expression());
      if (!sees(close)) expect(",");
    }
    return n;
  }

  std::vector<Token> tokens_;
  Code& code_;
  size_t at_ = 0;
  int depth_ = 0, loops_ = 0, macros_ = 0;
};

// ---------------------------------------------------------------------------------------------
// Arguments

struct Arguments {
  std::vector<Value> values;  // by place
  std::vector<std::pair<std::string, Value>> named;

  // The argument at a place or with a name; nullptr: it was not given.
  const Value* find(size_t place, std::string_view name) const {
    if (place < values.size()) return &values[place];
    for (const auto& [n, value] : named)
      if (n == name) return &value;
    return nullptr;
  }
  const Value& need(size_t place, const char* name) const {
    const Value* value = find(place, name);
    if (!value) fail("found no argument ", name, ", expected one");
    return *value;
  }
  int64_t integer(size_t place, const char* name, int64_t otherwise) const {
    const Value* value = find(place, name);
    if (!value || value->is(Kind::none)) return otherwise;
    if (!value->is_integer()) fail(name, ": found ", kind_name(*value), ", expected an integer");
    return value->integer;
  }
  bool flag(size_t place, const char* name, bool otherwise) const {
    const Value* value = find(place, name);
    return value ? is_true(*value) : otherwise;
  }
  Arguments without_first(size_t n) const {
    return {{values.begin() + long(std::min(n, values.size())), values.end()}, named};
  }
};

const Text& need_text(const Value& v) {
  if (!v.is(Kind::text)) fail("found ", kind_name(v), ", expected a string");
  return v.text();
}

bool has_word(std::string_view words, std::string_view word) {
  for (size_t i = 0; (i = words.find(word, i)) != words.npos; i++) {
    const size_t end = i + word.size();
    if ((i == 0 || words[i - 1] == ' ') && (end == words.size() || words[end] == ' ')) return true;
  }
  return false;
}

class Renderer;

// A filter, method, test or function.
struct Routine {
  std::string_view name;
  size_t most;             // arguments by place
  std::string_view names;  // of arguments that may be given by name; *: any
  Value (*run)(Renderer&, const Value& self, const Arguments&);

  void check(const Arguments& a) const {
    if (a.values.size() > most)
      fail(name, ": found ", a.values.size(), " arguments by place, expected at most ", most);
    for (const auto& [given, value] : a.named) {
      if (names != "*" && !has_word(names, given))
        fail(name, ": found an argument ", given, ", expected none of this name");
    }
  }
};
constexpr size_t kAnyNumber = SIZE_MAX;

// ---------------------------------------------------------------------------------------------
// Rendering

// A walk over the tree. Errors of the functions above get the template's name and line here.
class Renderer {
 public:
  Renderer(const Code& code, const Variables& variables, const std::string& date,
           const Limits& limits)
      : code_(code), date_(date), limits_(limits), budget_(limits) {
    for (const auto& [name, value] : variables) {
      const auto known = code.variables.find(name);
      if (known != code.variables.end()) set_variable(root_, known->second, value);
    }
  }
  // Namespaces may hold each other.
  ~Renderer() {
    for (const auto& space : spaces_) space->entries.clear();
  }

  Output run() {
    try {
      exec(*code_.body);
    } catch (const Error& e) {
      std::string text = e.what();  // may quote a message: one line, and not all of it
      std::replace_if(
          text.begin(), text.end(), [](unsigned char c) { return c < 0x20; }, ' ');
      if (text.size() > 1000) text.resize(char_begin(text, 1000));
      fail(code_.name, ":", line_, ": ", text);
    }
    Output output;
    size_t begin = 0;
    for (const Run& run : output_.runs) {
      const bool joins = !output.pieces.empty() && output.pieces.back().origin == run.origin;
      if (joins)
        output.pieces.back().end = run.end;
      else
        output.pieces.push_back({begin, run.end, run.origin});
      if (run.generated) {
        const bool goes_on = !output.generated.empty() && output.generated.back().second == begin;
        if (goes_on)
          output.generated.back().second = run.end;
        else
          output.generated.emplace_back(begin, run.end);
      }
      begin = run.end;
    }
    output.text = std::move(output_.bytes);
    return output;
  }

 private:
  enum class Flow { next, break_loop, continue_loop };

  // Variables that are set in a loop's round, a macro or a block are gone behind it.
  struct Scope {
    Scope* outer = nullptr;
    std::vector<std::pair<int, Value>> variables;
  };
  struct InScope {
    InScope(Renderer& r, Scope* outer) : renderer(r), before(r.scope_) {
      inner.outer = outer, r.scope_ = &inner;
    }
    ~InScope() { renderer.scope_ = before; }
    Renderer& renderer;
    Scope *before, inner;
  };
  struct Nested {
    explicit Nested(Renderer& r) : renderer(r) {
      if (++r.nested_ > kMaxNested)
        fail("found more than ", kMaxNested, " macros, blocks and operators in each other");
    }
    ~Nested() { renderer.nested_--; }
    Renderer& renderer;
  };

  void set_variable(Scope& scope, int variable, Value value) {
    budget_.count(scope.variables.size() / 16);
    for (auto& [v, old] : scope.variables)
      if (v == variable) return void(old = std::move(value));
    scope.variables.emplace_back(variable, std::move(value));
  }

  // ---- texts: all that grow do so here, so that sizes are checked before memory is used

  void add(Text& out, const Text& from, size_t begin, size_t end) {
    if (begin >= end) return;
    budget_.check_size(out.bytes.size() + end - begin);
    budget_.count_bytes(end - begin);
    if (from.runs.size() > 4) budget_.count((from.run_at(end - 1) - from.run_at(begin)) / 4);
    out.append(from, begin, end);
  }
  void add(Text& out, const Text& more) { add(out, more, 0, more.bytes.size()); }
  Text part_of(const Text& text, size_t begin, size_t end) {
    Text part;
    add(part, text, begin, end);
    return part;
  }
  Text text_of(const Value& v) {
    if (v.is(Kind::text)) return budget_.count_text(v.text()), v.text();
    Printer printer(budget_);
    printer.add_plain(v);
    budget_.count_text(printer.out);
    return std::move(printer.out);
  }
  std::string plain_text(const Value& v, bool repr = false) {
    Printer printer(budget_);
    printer.add_plain(v, repr);
    return std::move(printer.out.bytes);
  }

  // ---- statements

  Flow exec(const Node& n) {
    const Nested nested(*this);
    budget_.count();
    line_ = n.line;
    switch (n.op) {
      case Op::block:
        for (const NodePtr& statement : n.kids)
          if (const Flow flow = exec(*statement); flow != Flow::next) return flow;
        return Flow::next;
      case Op::text:
        add(*out_, n.constant.text());
        return Flow::next;
      case Op::print:
        return exec_print(n);
      case Op::if_:
        for (size_t i = 0; i < n.kids.size(); i += 2) {
          if (i + 1 == n.kids.size()) return exec(*n.kids[i]);
          if (is_true(eval(*n.kids[i]))) return exec(*n.kids[i + 1]);
        }
        return Flow::next;
      case Op::for_:
        return exec_for(n);
      case Op::set:
        assign(*n.kids[0], eval(*n.kids[1]));
        return Flow::next;
      case Op::set_block:
      case Op::filter_block:
        return exec_captured(n);
      case Op::macro: {
        Value macro(Kind::macro);
        macro.node = &n;
        set_variable(*scope_, n.variable, std::move(macro));
        return Flow::next;
      }
      case Op::generation: {
        const size_t begin = out_->bytes.size();
        const InScope scope(*this, scope_);
        const Flow flow = exec(*n.kids[0]);
        out_->mark_generated(begin);
        return flow;
      }
      case Op::break_:
        return Flow::break_loop;
      default:
        return Flow::continue_loop;
    }
  }
  Flow exec_print(const Node& n) {
    const Value v = eval(*n.kids[0]);
    v.is(Kind::text) ? add(*out_, v.text()) : add(*out_, text_of(v));
    return Flow::next;
  }
  Flow exec_captured(const Node& n) {
    Value text = capture(*n.kids[n.op == Op::set_block ? 1 : 0], scope_);
    if (n.kids.back()) text = apply_filters(*n.kids.back(), text);
    n.op == Op::filter_block ? add(*out_, text_of(text)) : assign(*n.kids[0], std::move(text));
    return Flow::next;
  }
  Flow exec_for(const Node& n) {
    std::vector<Value> items = items_of(eval(*n.kids[1]));
    if (n.kids[2]) {
      std::vector<Value> kept;
      for (Value& item : items) {
        const InScope scope(*this, scope_);
        assign(*n.kids[0], item);
        if (is_true(eval(*n.kids[2]))) kept.push_back(std::move(item));
      }
      items = std::move(kept);
    }
    const Value loop = list_of(Kind::loop, std::move(items));
    bool completed = false;  // a round: one that ends with continue or break does not count
    for (size_t i = 0; i < loop.items().size(); i++) {
      const InScope scope(*this, scope_);
      loop.object->index = i;
      set_variable(*scope_, kLoopVariable, loop);
      assign(*n.kids[0], loop.items()[i]);
      const Flow flow = exec(*n.kids[3]);
      if (flow == Flow::break_loop) break;
      if (flow == Flow::next) completed = true;
    }
    if (completed || !n.kids[4]) return Flow::next;
    const InScope scope(*this, scope_);
    return exec(*n.kids[4]);  // a break there is the outer loop's
  }
  Value capture(const Node& body, Scope* outer) {
    Text text;
    Text* const before = std::exchange(out_, &text);
    const InScope scope(*this, outer);
    exec(body);  // nobody uses out_ after an error
    out_ = before;
    return Value(std::move(text));
  }
  void assign(const Node& target, Value value) {
    if (target.op == Op::variable) return set_variable(*scope_, target.variable, std::move(value));
    if (target.op == Op::attribute) {
      const Value space = eval(*target.kids[0]);
      if (!space.is(Kind::space))
        fail("found ", kind_name(space), ", expected a namespace to set ", target.name, " of");
      return set_entry(space.entries(), make_text(target.name), std::move(value));
    }
    const std::vector<Value> items = items_of(value);
    if (items.size() != target.kids.size())
      fail("found ", items.size(), " values, expected ", target.kids.size());
    for (size_t i = 0; i < items.size(); i++) assign(*target.kids[i], items[i]);
  }

  // ---- expressions. eval calls itself for each part: what needs room on the stack is not in it.

  Value eval(const Node& n) {
    const Nested nested(*this);
    budget_.count();
    switch (n.op) {
      case Op::constant:
        return n.constant;
      case Op::variable:
        return lookup(n);
      case Op::list:
      case Op::tuple:
        return list_of(n.op == Op::list ? Kind::list : Kind::tuple, eval_all(n));
      case Op::dict:
        return eval_dict(n);
      case Op::negate:
      case Op::plus:
        return eval_sign(n);
      case Op::not_:
        return Value(!is_true(eval(*n.kids[0])));
      case Op::and_:
      case Op::or_:
        return eval_either(n);
      case Op::math:
        return eval_math(n);
      case Op::concatenate:
        return concatenate(n);
      case Op::compare:
        return compare(n);
      case Op::conditional:
        if (is_true(eval(*n.kids[1]))) return eval(*n.kids[0]);
        return n.kids[2] ? eval(*n.kids[2]) : Value();
      case Op::attribute:
        return eval_attribute(n);
      case Op::subscript:
        return eval_subscript(n);
      case Op::slice:
        return slice(n);
      case Op::call:
        return call(n);
      case Op::filter:
        return eval_filter(n);
      default:
        return eval_test(n);
    }
  }
  std::vector<Value> eval_all(const Node& n) {
    std::vector<Value> items;
    for (const NodePtr& kid : n.kids) items.push_back(eval(*kid));
    return items;
  }
  Value eval_dict(const Node& n) {
    std::vector<std::pair<Value, Value>> entries;
    for (size_t i = 0; i < n.kids.size(); i += 2) {
      Value key = eval(*n.kids[i]);
      set_entry(entries, std::move(key), eval(*n.kids[i + 1]));
    }
    return dict_of(std::move(entries));
  }
  Value eval_sign(const Node& n) {
    const Value v = eval(*n.kids[0]);
    line_ = n.line;
    if (!v.is_number()) fail("found ", kind_name(v), ", expected a number");
    if (v.is(Kind::real)) return n.op == Op::plus ? v : Value(-v.real);
    return integer_math(n.op == Op::plus ? "+" : "-", 0, v.integer);
  }
  Value eval_either(const Node& n) {
    Value v = eval(*n.kids[0]);
    for (size_t i = 1; i < n.kids.size() && is_true(v) == (n.op == Op::and_); i++)
      v = eval(*n.kids[i]);
    return v;
  }
  Value eval_math(const Node& n) {
    const Value left = eval(*n.kids[0]), right = eval(*n.kids[1]);
    line_ = n.line;
    return math(n.name, left, right);
  }
  Value concatenate(const Node& n) {
    Text text;
    for (const NodePtr& kid : n.kids) add(text, text_of(eval(*kid)));
    return Value(std::move(text));
  }
  Value compare(const Node& n) {
    Value left = eval(*n.kids[0]);
    for (size_t i = 0; i < n.name.size(); i++) {
      Value right = eval(*n.kids[i + 1]);
      line_ = n.line;
      if (!holds(n.name[i], left, right)) return Value(false);
      left = std::move(right);
    }
    return Value(true);
  }
  Value eval_attribute(const Node& n) {
    const Value base = eval(*n.kids[0]);
    line_ = n.line;
    return attribute(base, n.name, &n);
  }
  Value eval_subscript(const Node& n) {
    const Value base = eval(*n.kids[0]), index = eval(*n.kids[1]);
    line_ = n.line;
    return subscript(base, index, &n);
  }
  Value eval_filter(const Node& n) {
    const Value v = eval(*n.kids[0]);
    return filter(n, v);
  }
  Value eval_test(const Node& n) {
    const Value v = eval(*n.kids[0]);
    const Arguments arguments = evaluate_arguments(n, 1);
    line_ = n.line;
    return Value(test(n.name, v, arguments));
  }

  Value lookup(const Node& n) {
    for (const Scope* scope = scope_; scope; scope = scope->outer) {
      budget_.count(scope->variables.size() / 16);
      for (const auto& [variable, value] : scope->variables) {
        if (variable != n.variable) continue;
        return value.is(Kind::undefined) && !value.node ? undefined(&n) : value;
      }
    }
    for (size_t i = 0; i < std::size(kFunctions); i++) {
      if (n.name != kFunctions[i].name) continue;
      Value function(Kind::function);
      function.integer = int64_t(i);
      return function;
    }
    if (has_word("cycler joiner lipsum self", n.name))
      fail("found ", n.name, ", a function of Jinja2 that no chat template was found to use");
    return undefined(&n);
  }
  static Value undefined(const Node* n) {
    Value v;
    v.node = n;
    return v;
  }
  [[noreturn]] void refuse_undefined(const Value& v) {
    fail("found ", v.node ? path_of(*v.node) : "something",
         ", which is undefined, expected a value");
  }
  std::string path_of(const Node& n) {  // for errors: "message.tool_calls"
    if (n.op == Op::variable) return n.name;
    if (n.op == Op::attribute) return path_of(*n.kids[0]) + "." + n.name;
    if (n.op == Op::subscript && n.kids[1]->op == Op::constant)
      return path_of(*n.kids[0]) + "[" + plain_text(n.kids[1]->constant, true) + "]";
    if (n.op == Op::subscript) return path_of(*n.kids[0]) + "[...]";
    return "a value";
  }
  void set_entry(std::vector<std::pair<Value, Value>>& entries, Value key, Value value) {
    if (key.is_list() && !key.is(Kind::tuple)) fail("found a list as a key, expected a string");
    budget_.count(entries.size() / 16);
    for (auto& [k, old] : entries)
      if (are_equal(k, key, budget_)) return void(old = std::move(value));
    entries.emplace_back(std::move(key), std::move(value));
  }
  // What a loop, a filter or `list` goes through. A generator is empty then.
  std::vector<Value> items_of(const Value& v) {
    std::vector<Value> items;
    if (v.is_list()) {
      const size_t begin = v.lazy == Lazy::generator ? v.object->index : 0;
      budget_.count(v.items().size() - begin);
      items.assign(v.items().begin() + long(begin), v.items().end());
      if (v.lazy == Lazy::generator) v.object->index = v.items().size();
    } else if (v.is(Kind::dict)) {
      budget_.count(v.entries().size());
      for (const auto& entry : v.entries()) items.push_back(entry.first);
    } else if (v.is(Kind::text)) {
      const std::string_view bytes = v.text().bytes;
      budget_.count(bytes.size());
      for (size_t i = 0; i < bytes.size(); i = char_end(bytes, i))
        items.emplace_back(v.text().part(i, char_end(bytes, i)));
    } else if (!v.is(Kind::undefined)) {
      fail("found ", kind_name(v), ", expected a list");
    }
    return items;
  }

  // ---- operators

  // `sign`: = ! < > [ (less or equal) ] (greater or equal) i (in) n (not in).
  bool holds(char sign, const Value& left, const Value& right) {
    switch (sign) {
      case '=':
        return are_equal(left, right, budget_);
      case '!':
        return !are_equal(left, right, budget_);
      case '<':
        return is_less(left, right, budget_);
      case '>':
        return is_less(right, left, budget_);
      case '[':
        return !is_less(right, left, budget_) &&
               (is_less(left, right, budget_) || are_equal(left, right, budget_));
      case ']':
        return holds('[', right, left);
      default:
        return contains(right, left) == (sign == 'i');
    }
  }
  bool contains(const Value& container, const Value& item) {
    if (container.is(Kind::text)) {
      budget_.count_bytes(container.text().bytes.size());
      return find_part(container.text().bytes, need_text(item).bytes) != std::string::npos;
    }
    if (container.is(Kind::dict)) return find_entry(container, item, budget_) != nullptr;
    if (!container.is_list() || container.lazy == Lazy::generator) {
      const std::vector<Value> items = items_of(container);
      return std::any_of(items.begin(), items.end(),
                         [&](const Value& v) { return are_equal(v, item, budget_); });
    }
    budget_.count(container.items().size());
    return std::any_of(container.items().begin(), container.items().end(),
                       [&](const Value& v) { return are_equal(v, item, budget_); });
  }
  static Value integer_math(std::string_view sign, int64_t a, int64_t b) {
    int64_t result = 0;
    bool too_large = false;
    if (sign == "+")
      too_large = __builtin_add_overflow(a, b, &result);
    else if (sign == "-")
      too_large = __builtin_sub_overflow(a, b, &result);
    else if (sign == "*")
      too_large = __builtin_mul_overflow(a, b, &result);
    else {
      if (b == 0) fail("found a division by 0");
      if (sign == "/") return Value(double(a) / double(b));
      if (b == -1) return integer_math("-", 0, sign == "%" ? 0 : a);
      const bool round_down = a % b != 0 && (a < 0) != (b < 0);
      result = sign == "%" ? a % b + (round_down ? b : 0) : a / b - round_down;
    }
    if (too_large) fail("found an integer beyond 64 bits");
    return Value(result);
  }
  Value repeat(const Value& v, int64_t n) {
    const size_t size = v.is(Kind::text) ? v.text().bytes.size() : v.items().size();
    const size_t times = n < 0 || size == 0 ? 0 : size_t(n);
    if (times > 0 && times > limits_.output / size)
      fail("found a value ", times, " times, expected fewer");
    if (v.is(Kind::text)) {
      budget_.count_bytes(times * size);
      budget_.count(times / 16 + (v.text().runs.size() > 1 ? times * v.text().runs.size() / 4 : 0));
      Text text;
      for (size_t i = 0; i < times; i++) text.append(v.text(), 0, size);
      return Value(std::move(text));
    }
    budget_.count(times * size);
    std::vector<Value> items;
    for (size_t i = 0; i < times; i++)
      items.insert(items.end(), v.items().begin(), v.items().end());
    return list_of(v.kind, std::move(items));
  }
  // What Jinja2 makes of a text that is added to one behind the filter `safe`.
  Text html_escaped(const Text& text) {
    static constexpr std::string_view kSigns = "&<>'\"";
    static constexpr std::string_view kNames[] = {"&amp;", "&lt;", "&gt;", "&#39;", "&#34;"};
    Text out;
    size_t begin = 0;
    for (size_t i = 0; (i = text.bytes.find_first_of(kSigns, begin)) != std::string::npos;) {
      add(out, text, begin, i);
      const Run& run = text.runs[text.run_at(i)];
      budget_.count();
      out.append(kNames[kSigns.find(text.bytes[i])], run.origin, run.generated);
      begin = i + 1;
    }
    add(out, text, begin, text.bytes.size());
    return out;
  }
  Value math(const std::string& sign, const Value& a, const Value& b) {
    for (const Value* v : {&a, &b})
      if (v->is(Kind::undefined)) refuse_undefined(*v);
    if (sign == "+" && a.is(Kind::text) && b.is(Kind::text)) return add_texts(a, b);
    if (sign == "+" && a.is_list() && b.kind == a.kind && !a.is_lazy() && !b.is_lazy()) {
      budget_.count(a.items().size() + b.items().size());
      std::vector<Value> items = a.items();
      items.insert(items.end(), b.items().begin(), b.items().end());
      return list_of(a.kind, std::move(items));
    }
    for (const auto& [x, y] : {std::pair(&a, &b), std::pair(&b, &a)}) {
      if (!x->is_safe || !y->is(Kind::text) || y->is_safe) continue;
      budget_.count_bytes(y->text().bytes.size());
      if (y->text().bytes.find_first_of("&<>\"'") != std::string::npos)
        fail("found a safe string ", sign, " another one, which Jinja2 would escape, expected ~");
    }
    if (sign == "%" && a.is(Kind::text)) {
      budget_.count(b.is(Kind::tuple) ? b.items().size() : 1);
      return percent_format(a.text(), b.is(Kind::tuple) ? b.items() : std::vector<Value>{b});
    }
    const auto repeats = [](const Value& v, const Value& n) {
      return (v.is(Kind::text) || (v.is_list() && !v.is_lazy())) && n.is_integer();
    };
    if (sign == "*" && repeats(a, b)) return repeat(a, b.integer);
    if (sign == "*" && repeats(b, a)) return repeat(b, a.integer);
    if (!a.is_number() || !b.is_number())
      fail("found ", kind_name(a), " ", sign, " ", kind_name(b),
           ", expected two numbers or strings");
    if (a.is_integer() && b.is_integer()) return integer_math(sign, a.integer, b.integer);
    const double x = a.number(), y = b.number();
    if (sign == "+") return Value(x + y);
    if (sign == "-") return Value(x - y);
    if (sign == "*") return Value(x * y);
    if (y == 0) fail("found a division by 0");
    if (sign == "/") return Value(x / y);
    const double floor = std::floor(x / y);
    return Value(sign == "//" ? floor : x - floor * y);
  }
  Value add_texts(const Value& a, const Value& b) {
    Text text;
    add(text, b.is_safe && !a.is_safe ? html_escaped(a.text()) : a.text());
    add(text, a.is_safe && !b.is_safe ? html_escaped(b.text()) : b.text());
    Value sum(std::move(text));
    sum.is_safe = a.is_safe || b.is_safe;
    return sum;
  }
  // printf's form, of which templates use %s and %d.
  Value percent_format(const Text& form, const std::vector<Value>& values) {
    Text out;
    size_t next = 0, begin = 0;
    for (size_t i; (i = form.bytes.find('%', begin)) != std::string::npos; begin = i + 2) {
      add(out, form, begin, i);
      const char kind = i + 1 < form.bytes.size() ? form.bytes[i + 1] : ' ';
      budget_.count();
      if (kind == '%') {
        add(out, form, i, i + 1);
        continue;
      }
      if (kind != 's' && kind != 'd')
        fail("found %", std::string(1, kind), ", expected %s, %d or %%");
      if (next == values.size())
        fail("found ", next, " values, expected one for each %", std::string(1, kind));
      if (kind == 'd' && !values[next].is_integer())
        fail("%d: found ", kind_name(values[next]), ", expected an integer");
      add(out, text_of(kind == 'd' ? Value(values[next].integer) : values[next]));
      next++;
    }
    add(out, form, begin, form.bytes.size());
    if (next != values.size()) fail("found ", values.size(), " values, expected ", next);
    return Value(std::move(out));
  }

  // ---- parts of values

  // base.name: a method before an entry, as Jinja2 has it.
  Value attribute(const Value& base, const std::string& name, const Node* n) {
    if (base.is(Kind::undefined)) refuse_undefined(base);
    if (base.is(Kind::loop)) return loop_attribute(base, name, n);
    if (has_method(base, name)) return Value(Kind::method);
    if (base.is(Kind::dict) || base.is(Kind::space)) {
      budget_.count(base.entries().size() / 16);
      if (const Value* v = base.find(name)) return *v;
    }
    return undefined(n);
  }
  Value loop_attribute(const Value& loop, const std::string& name, const Node* node) {
    const std::vector<Value>& items = loop.items();
    const int64_t i = int64_t(loop.object->index), n = int64_t(items.size());
    if (name == "index") return Value(i + 1);
    if (name == "index0") return Value(i);
    if (name == "revindex") return Value(n - i);
    if (name == "revindex0") return Value(n - i - 1);
    if (name == "first") return Value(i == 0);
    if (name == "last") return Value(i == n - 1);
    if (name == "length") return Value(n);
    if (name == "previtem") return i > 0 ? items[size_t(i - 1)] : undefined(node);
    if (name == "nextitem") return i + 1 < n ? items[size_t(i + 1)] : undefined(node);
    if (name == "cycle") return Value(Kind::method);
    fail("found loop.", name,
         ", expected one of index, index0, revindex, revindex0, first, last, length, previtem, "
         "nextitem, cycle");
  }
  Value subscript(const Value& base, const Value& index, const Node* n) {
    if (base.is(Kind::undefined)) refuse_undefined(base);
    if (base.is(Kind::dict) || base.is(Kind::space))
      if (const Value* v = find_entry(base, index, budget_)) return *v;
    if (index.is(Kind::text)) return attribute(base, index.text().bytes, n);
    const bool is_text = base.is(Kind::text);
    const bool has_places = is_text || (base.is_list() && base.lazy <= Lazy::range);
    if (!index.is_integer() || !has_places) return undefined(n);
    if (is_text) budget_.count_bytes(base.text().bytes.size());
    const int64_t size = int64_t(is_text ? count_chars(base.text().bytes) : base.items().size());
    const int64_t i = index.integer < 0 ? index.integer + size : index.integer;
    if (i < 0 || i >= size) return undefined(n);
    if (!is_text) return base.items()[size_t(i)];
    const std::string_view bytes = base.text().bytes;
    const size_t begin = char_offset(bytes, i);
    return Value(part_of(base.text(), begin, char_end(bytes, begin)));
  }
  static size_t char_offset(std::string_view text, int64_t chars) {
    size_t i = 0;
    while (chars-- > 0 && i < text.size()) i = char_end(text, i);
    return i;
  }
  Value slice(const Node& n) {
    const Value base = eval(*n.kids[0]);
    Value bounds[3];
    for (size_t i = 0; i < 3; i++)
      bounds[i] = n.kids[i + 1] ? eval(*n.kids[i + 1]) : Value(Kind::none);
    line_ = n.line;
    if (base.is(Kind::undefined)) refuse_undefined(base);
    if (!base.is(Kind::text) && (!base.is_list() || base.lazy > Lazy::range))
      fail("found ", kind_name(base), "[...:...], expected a string or a list");
    for (const Value& v : bounds)
      if (!v.is(Kind::none) && !v.is_integer())
        fail("found ", kind_name(v), " in [...:...], expected integers");
    return slice(base, bounds);
  }
  Value slice(const Value& base, const Value (&bounds)[3]) {
    const bool is_text = base.is(Kind::text);
    if (is_text) budget_.count_bytes(base.text().bytes.size());
    const int64_t size = int64_t(is_text ? count_chars(base.text().bytes) : base.items().size());
    const int64_t step = bounds[2].is(Kind::none) ? 1 : bounds[2].integer;
    if (step == 0) fail("found a step of 0 in [...:...:0]");
    const auto bound = [&](const Value& v, int64_t otherwise) {  // Python's
      if (v.is(Kind::none)) return otherwise;
      const int64_t i = v.integer < 0 ? v.integer + size : v.integer;
      return step > 0 ? std::clamp<int64_t>(i, 0, size) : std::clamp<int64_t>(i, -1, size - 1);
    };
    const int64_t begin = bound(bounds[0], step > 0 ? 0 : size - 1),
                  end = bound(bounds[1], step > 0 ? size : -1);
    if (is_text && step == 1) {
      const std::string_view bytes = base.text().bytes;
      const size_t from = char_offset(bytes, begin),
                   to = begin < end ? from + char_offset(bytes.substr(from), end - begin) : from;
      return Value(part_of(base.text(), from, to));
    }
    const std::vector<Value> all = items_of(base);
    std::vector<Value> items;
    for (int64_t i = begin; step > 0 ? i < end : i > end;) {
      items.push_back(all[size_t(i)]);
      if (__builtin_add_overflow(i, step, &i)) break;
    }
    if (is_text) return join(items, Text());
    Value list = list_of(base.kind, std::move(items));
    list.lazy = base.lazy;
    return list;
  }

  // ---- calls

  Arguments evaluate_arguments(const Node& n, size_t first) {
    Arguments arguments;
    const size_t by_place = n.kids.size() - n.names.size();
    for (size_t i = first; i < by_place; i++) {
      const Node& kid = *n.kids[i];
      if (kid.op != Op::unpack) {
        arguments.values.push_back(eval(kid));
        continue;
      }
      for (Value& item : items_of(eval(*kid.kids[0]))) arguments.values.push_back(std::move(item));
    }
    for (size_t i = 0; i < n.names.size(); i++)
      arguments.named.emplace_back(n.names[i], eval(*n.kids[by_place + i]));
    return arguments;
  }
  Value call(const Node& n) {
    const Node& callee = *n.kids[0];
    if (callee.op == Op::attribute) {
      const Value self = eval(*callee.kids[0]);
      const Arguments arguments = evaluate_arguments(n, 1);
      line_ = n.line;
      if (has_method(self, callee.name)) return call_method(self, callee.name, arguments);
      return call_value(attribute(self, callee.name, &callee), arguments);
    }
    const Value function = eval(callee);
    const Arguments arguments = evaluate_arguments(n, 1);
    line_ = n.line;
    return call_value(function, arguments);
  }
  Value call_value(const Value& function, const Arguments& arguments) {
    if (function.is(Kind::macro)) return call_macro(*function.node, arguments);
    if (function.is(Kind::undefined)) refuse_undefined(function);
    if (!function.is(Kind::function))
      fail("found ", kind_name(function), ", expected a function or a macro to call");
    const Routine& routine = kFunctions[function.integer];
    routine.check(arguments);
    return routine.run(*this, function, arguments);
  }
  Value call_macro(const Node& macro, const Arguments& arguments) {
    const size_t n = macro.names.size();
    if (arguments.values.size() > n)
      fail(macro.name, ": found ", arguments.values.size(), " arguments, expected at most ", n);
    for (const auto& [name, value] : arguments.named) {
      if (std::find(macro.names.begin(), macro.names.end(), name) == macro.names.end())
        fail(macro.name, ": found an argument ", name, ", expected none of this name");
    }
    if (++depth_ > limits_.depth)
      fail(macro.name, ": found more than ", limits_.depth, " macros that call each other");
    const int line = line_;
    Value result;
    {
      const InScope scope(*this, &root_);
      for (size_t i = 0; i < n; i++) {
        const Value* value = arguments.find(i, macro.names[i]);
        set_variable(*scope_, macro.parameters[i],
                     value           ? *value
                     : macro.kids[i] ? eval(*macro.kids[i])
                                     : Value());
      }
      result = capture(*macro.kids[n], scope_);
    }
    line_ = line;
    depth_--;
    return result;
  }
  Value range(const Arguments& a) {
    const bool one = a.values.size() < 2;
    for (const Value& v : a.values)
      if (!v.is_integer()) fail("range: found ", kind_name(v), ", expected an integer");
    if (a.values.empty()) fail("range: found no number, expected some");
    const int64_t begin = one ? 0 : a.values[0].integer, end = a.values[one ? 0 : 1].integer,
                  step = a.integer(2, "step", 1);
    if (step == 0) fail("range: found a step of 0");
    std::vector<Value> items;
    for (int64_t i = begin; step > 0 ? i < end : i > end;) {
      if (items.size() == 100'000)
        fail("range: found more than 100000 numbers");  // Jinja2's sandbox
      items.emplace_back(i);
      if (__builtin_add_overflow(i, step, &i)) break;
    }
    budget_.count(items.size());
    Value list = make_list(std::move(items));
    list.lazy = Lazy::range;
    return list;
  }
  Value space_of(const Arguments& a, bool is_dict) {
    std::vector<std::pair<Value, Value>> entries;
    if (!a.values.empty()) {
      if (!a.values[0].is(Kind::dict))
        fail("found ", kind_name(a.values[0]), ", expected a dictionary");
      budget_.count(a.values[0].entries().size());
      entries = a.values[0].entries();
    }
    for (const auto& [key, value] : a.named) set_entry(entries, make_text(key), value);
    Value dict = dict_of(std::move(entries));
    if (is_dict) return dict;
    dict.kind = Kind::space;
    spaces_.push_back(dict.object);
    return dict;
  }
  Value strftime_now(const Value& format) {
    const std::string& form = need_text(format).bytes;
    if (form.size() > 1000) fail("strftime_now: found a form of more than 1000 bytes");
    for (size_t i = 0; (i = form.find('%', i)) != std::string::npos; i += 2) {
      if (i + 1 < form.size() && (form[i + 1] == '-' || form[i + 1] == '_'))
        i++;  // of the C library
      const std::string letter = form.substr(i + 1, 1);
      if (letter.empty() ||
          std::string_view("aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyY%").find(letter) ==
              std::string_view::npos)
        fail("strftime_now: found %", letter, ", expected one of the letters for dates and times");
    }
    std::tm day{};
    if (std::sscanf(date_.c_str(), "%d-%d-%d", &day.tm_year, &day.tm_mon, &day.tm_mday) != 3)
      fail("strftime_now: found the date ", date_, ", expected YYYY-MM-DD");
    day.tm_year -= 1900, day.tm_mon--, day.tm_hour = 12, day.tm_isdst = -1;
    std::mktime(&day);  // the days of the week and the year
    day.tm_hour = 0;    // a date has no time
    std::string out(form.size() * 32 + 64, '\0');
    out.resize(std::strftime(out.data(), out.size(), form.c_str(), &day));
    return Value(Text(out, format.text().first_foreign()));
  }
  // What the functions of the tables below take.
  using R = Renderer&;
  using V = const Value&;
  using A = const Arguments&;
  static const Routine kFunctions[5];

  // ---- methods

  static const Routine kTextMethods[16], kDictMethods[5], kListMethods[3];
  // Those that change a value: the sandbox has them and refuses to call them.
  static constexpr std::string_view kDictChanges = "pop update clear setdefault popitem",
                                    kListChanges =
                                        "append pop insert extend remove sort reverse clear";

  template <size_t n>
  static const Routine* find_routine(const Routine (&all)[n], std::string_view name) {
    for (const Routine& routine : all)
      if (routine.name == name) return &routine;
    return nullptr;
  }
  static const Routine* find_method(const Value& v, std::string_view name) {
    return v.is(Kind::text)              ? find_routine(kTextMethods, name)
           : v.is(Kind::dict)            ? find_routine(kDictMethods, name)
           : v.is_list() && !v.is_lazy() ? find_routine(kListMethods, name)
                                         : nullptr;
  }
  static bool has_method(const Value& v, std::string_view name) {
    return find_method(v, name) || (v.is(Kind::loop) && name == "cycle") ||
           (v.is(Kind::dict) && has_word(kDictChanges, name)) ||
           (v.is(Kind::list) && !v.is_lazy() && has_word(kListChanges, name));
  }
  Value call_method(const Value& self, const std::string& name, const Arguments& a) {
    if (self.is(Kind::loop)) {
      if (a.values.empty()) fail("loop.cycle: found no value, expected some");
      return a.values[self.object->index % a.values.size()];
    }
    const Routine* method = find_method(self, name);
    if (!method)
      fail("found .", name, "(), which changes ", kind_name(self),
           ", expected a template that changes nothing");
    method->check(a);
    if (self.is(Kind::text)) budget_.count_text(self.text());
    return method->run(*this, self, a);
  }
  Value entries_of(const Value& dict, char what) {  // k: its keys, v: its values, i: both
    std::vector<Value> list;
    budget_.count(dict.entries().size());
    for (const auto& [key, value] : dict.entries())
      list.push_back(what == 'k' ? key : what == 'v' ? value : list_of(Kind::tuple, {key, value}));
    return lazy_list(std::move(list), Lazy::view);
  }
  Value list_index(const Value& list, const Value& value, bool counts) {
    const std::vector<Value>& items = list.items();
    const auto is_it = [&](const Value& v) { return are_equal(v, value, budget_); };
    budget_.count(items.size());
    if (counts) return Value(int64_t(std::count_if(items.begin(), items.end(), is_it)));
    const auto found = std::find_if(items.begin(), items.end(), is_it);
    if (found == items.end()) fail("index: found no such item in the list");
    return Value(int64_t(found - items.begin()));
  }
  // Whether one of the texts of a tuple, or the only one, begins or ends a text.
  bool touches(const std::string& text, const Value& v, bool at_end) {
    const auto touch = [&](const Value& part) {
      const std::string& bytes = need_text(part).bytes;
      budget_.count_bytes(std::min(bytes.size(), text.size()));
      return at_end ? text.ends_with(bytes) : text.starts_with(bytes);
    };
    if (!v.is(Kind::tuple)) return touch(v);
    budget_.count(v.items().size());
    return std::any_of(v.items().begin(), v.items().end(), touch);
  }
  // Without these characters at its ends; without `chars`, without white space.
  Value strip(const Text& text, const Value* chars, bool left, bool right) {
    const std::string_view bytes = text.bytes;
    const bool white = !chars || chars->is(Kind::none);
    const std::string_view set = white ? std::string_view() : need_text(*chars).bytes;
    const auto is_dropped = [&](size_t i) {
      if (white) return is_space(code_point(bytes, i));
      const std::string_view c = bytes.substr(i, char_end(bytes, i) - i);
      budget_.count(set.size() / 16);
      for (size_t k = 0; k < set.size(); k = char_end(set, k))
        if (set.substr(k, char_end(set, k) - k) == c) return true;
      return false;
    };
    size_t begin = 0, end = bytes.size();
    while (left && begin < end && is_dropped(begin)) begin = char_end(bytes, begin);
    while (right && end > begin) {
      const size_t last = std::max(begin, char_begin(bytes, end - 1));
      if (!is_dropped(last)) break;
      end = last;
    }
    budget_.count((bytes.size() - (end - begin)) / 32);
    return Value(part_of(text, begin, end));
  }
  Value split(const Text& text, const Value* separator, int64_t most) {
    const std::string_view bytes = text.bytes;
    std::vector<Value> parts;
    const auto add_part = [&](size_t begin, size_t end) {
      budget_.count();
      parts.emplace_back(part_of(text, begin, end));
    };
    size_t begin = 0;
    if (!separator || separator->is(Kind::none)) {  // at any white space
      if (most >= 0) fail("split: found a limit without a separator, expected a separator");
      budget_.count(bytes.size() / 32);
      const auto skip = [&](size_t i, bool space) {
        while (i < bytes.size() && is_space(code_point(bytes, i)) == space) i = char_end(bytes, i);
        return i;
      };
      while ((begin = skip(begin, true)) < bytes.size()) {
        const size_t end = skip(begin, false);
        add_part(begin, end);
        begin = end;
      }
      return make_list(std::move(parts));
    }
    const std::string& by = need_text(*separator).bytes;
    if (by.empty()) fail("split: found an empty separator");
    for (size_t end; most < 0 || int64_t(parts.size()) < most; begin = end + by.size()) {
      if ((end = find_part(bytes, by, begin)) == bytes.npos) break;
      add_part(begin, end);
    }
    add_part(begin, bytes.size());
    return make_list(std::move(parts));
  }
  Value split_lines(const Text& text) {
    std::vector<Value> lines;
    for (size_t i = 0; i < text.bytes.size();) {
      const size_t end = std::min(text.bytes.find_first_of("\n\r", i), text.bytes.size());
      budget_.count();
      lines.emplace_back(part_of(text, i, end));
      i = end + 1 + (text.bytes.compare(end, 2, "\r\n") == 0);
    }
    return make_list(std::move(lines));
  }
  Value replace(const Text& text, const Text& old, const Text& fresh, int64_t most) {
    Text out;
    const std::string_view bytes = text.bytes;
    size_t begin = 0;
    for (int64_t n = 0; most < 0 || n < most; n++) {
      const size_t at = !old.bytes.empty()     ? find_part(bytes, old.bytes, begin)
                        : n == 0               ? 0
                        : begin < bytes.size() ? char_end(bytes, begin)
                                               : bytes.npos;
      if (at == bytes.npos) break;
      budget_.count();
      add(out, text, begin, at);
      add(out, fresh);
      begin = at + old.bytes.size();
    }
    add(out, text, begin, bytes.size());
    return Value(std::move(out));
  }
  enum class Case { upper, lower, capitalize, title, words };  // words: the filter's title
  Value with_case(const Text& text, Case how) {
    Text out;
    const std::string_view bytes = text.bytes;
    budget_.count(bytes.size() / 16);
    bool begins = true;
    for (size_t i = 0; i < bytes.size(); i = char_end(bytes, i)) {
      const uint32_t c = code_point(bytes, i);
      const bool upper = how == Case::upper || (how != Case::lower && begins);
      std::string changed;
      const uint32_t other = change_case(c, upper);
      if (other != c) append_code_point(changed, other);
      const std::string_view same = bytes.substr(i, char_end(bytes, i) - i);
      out.append(other == c ? same : changed, text.origin_at(i));
      if (how == Case::title)
        begins = change_case(c, true) == c && change_case(c, false) == c;
      else if (how == Case::words)
        begins = is_space(c) ||
                 (c < 0x80 && std::string_view("-({[<").find(char(c)) != std::string_view::npos);
      else
        begins = false;
    }
    budget_.check_size(out.bytes.size());
    return Value(std::move(out));
  }
  Value join(const std::vector<Value>& items, const Text& between) {
    Text out;
    budget_.count(items.size());
    for (size_t i = 0; i < items.size(); i++) {
      if (i > 0) add(out, between);
      items[i].is(Kind::text) ? add(out, items[i].text()) : add(out, text_of(items[i]));
    }
    return Value(std::move(out));
  }
  Value join_texts(const Text& between, const Value& list) {
    const std::vector<Value> items = items_of(list);
    for (const Value& item : items) need_text(item);
    return join(items, between);
  }
  // str.format with {}, {0} and {name}.
  Value brace_format(const Text& form, const Arguments& a) {
    Text out;
    size_t next = 0, begin = 0;
    for (size_t i; (i = form.bytes.find_first_of("{}", begin)) != std::string::npos;) {
      budget_.count();
      const char c = form.bytes[i];
      const bool twice = i + 1 < form.bytes.size() && form.bytes[i + 1] == c;
      add(out, form, begin, i + twice);
      begin = i + 2;
      if (twice) continue;
      const size_t end = form.bytes.find('}', i);
      if (c == '}' || end == std::string::npos) fail("format: found a single ", std::string(1, c));
      const std::string field = form.bytes.substr(i + 1, end - i - 1);
      const bool number = !field.empty() && field.size() < 6 &&
                          field.find_first_not_of("0123456789") == std::string::npos;
      const size_t place = field.empty() ? next++
                           : number      ? size_t(std::atoi(field.c_str()))
                                         : a.values.size();
      const Value* value = a.find(place, field);
      if (!value) fail("format: found {", field, "}, expected one of the arguments");
      add(out, text_of(*value));
      begin = end + 1;
    }
    add(out, form, begin, form.bytes.size());
    return Value(std::move(out));
  }
  Value find_text(const std::string& text, const std::string& part) {
    const size_t at = find_part(text, part);
    return Value(at == text.npos ? int64_t(-1)
                                 : int64_t(count_chars(std::string_view(text).substr(0, at))));
  }
  Value count_texts(const std::string& text, const std::string& part) {
    if (part.empty()) return Value(int64_t(count_chars(text)) + 1);
    int64_t n = 0;
    for (size_t at = 0; (at = find_part(text, part, at)) != text.npos; at += part.size()) {
      budget_.count();
      n++;
    }
    return Value(n);
  }

  // ---- filters

  static const Routine kFilters[34];

  Value apply_filters(const Node& n, const Value& text) {  // of a block: the innermost takes `text`
    const Nested nested(*this);
    const Value input = n.op == Op::filter && n.kids[0] ? apply_filters(*n.kids[0], text) : text;
    if (n.op != Op::filter) fail("found something else than filters behind a block's name");
    return filter(n, input);
  }
  Value filter(const Node& n, const Value& v) {
    const Arguments arguments = evaluate_arguments(n, 1);
    line_ = n.line;
    return filter(n.name, v, arguments);
  }
  Value filter(const std::string& name, const Value& v, const Arguments& a) {
    const Nested nested(*this);  // `map` may name itself
    budget_.count(1 + a.values.size() / 4);
    const Routine* routine = find_routine(kFilters, name);
    if (!routine) fail("found the filter ", name, ", expected one that chat templates use");
    routine->check(a);
    if (v.is(Kind::text)) budget_.count_text(v.text());
    return routine->run(*this, v, a);
  }
  // Of a path such as "function.name", for filters that take an attribute.
  Value item_at(const Value& v, const Value& path) {
    if (!path.is(Kind::text)) return subscript(v, path, nullptr);
    Value item = v;
    std::string_view rest = path.text().bytes;
    budget_.count_bytes(rest.size());
    while (true) {
      const size_t dot = std::min(rest.find('.'), rest.size());
      const std::string name(rest.substr(0, dot));
      const bool number = !name.empty() && name.size() < 10 &&
                          name.find_first_not_of("0123456789") == std::string::npos;
      budget_.count();
      item = subscript(item, number ? Value(int64_t(std::atoi(name.c_str()))) : make_text(name),
                       nullptr);
      if (dot == rest.size()) return item;
      rest.remove_prefix(dot + 1);
    }
  }
  static Value lazy_list(std::vector<Value> items, Lazy lazy = Lazy::generator) {
    Value list = make_list(std::move(items));
    list.lazy = lazy;
    return list;
  }
  Value select(const Value& v, const Arguments& a, bool by_attribute, bool wanted) {
    std::vector<Value> kept;
    const size_t name = by_attribute;  // the place of the test
    const Arguments more = a.without_first(name + 1);
    for (const Value& item : is_true(v) ? items_of(v) : std::vector<Value>()) {
      const Value tested = by_attribute ? item_at(item, a.need(0, "attribute")) : item;
      const bool is_kept = a.values.size() > name
                               ? test(need_text(a.values[name]).bytes, tested, more)
                               : is_true(tested);
      if (is_kept == wanted) kept.push_back(item);
    }
    return lazy_list(std::move(kept));
  }
  Value map(const Value& v, const Arguments& a) {
    std::vector<Value> results;
    const Value* path = a.values.empty() ? a.find(0, "attribute") : nullptr;
    if (path) Routine{"map", 0, "attribute default", nullptr}.check(a);
    const Value* otherwise = a.find(1, "default");
    const Arguments more = a.without_first(1);
    for (const Value& item : is_true(v) ? items_of(v) : std::vector<Value>()) {
      if (path) {
        Value result = item_at(item, *path);
        results.push_back(result.is(Kind::undefined) && otherwise ? *otherwise : std::move(result));
      } else {
        results.push_back(filter(need_text(a.need(0, "filter")).bytes, item, more));
      }
    }
    return lazy_list(std::move(results));
  }
  // Texts are compared without their case unless that counts.
  Value sort_key(const Value& v, const Value* path, bool case_counts) {
    Value key = path && !path->is(Kind::none) ? item_at(v, *path) : v;
    return key.is(Kind::text) && !case_counts ? with_case(key.text(), Case::lower) : key;
  }
  std::vector<Value> sorted(const Value& v, bool reverse, bool case_counts, const Value* path) {
    std::vector<std::pair<Value, Value>> keyed;
    for (Value& item : items_of(v)) {
      Value key = sort_key(item, path, case_counts);
      keyed.emplace_back(std::move(key), std::move(item));
    }
    budget_.count(keyed.size());
    std::stable_sort(keyed.begin(), keyed.end(), [&](const auto& a, const auto& b) {
      return reverse ? is_less(b.first, a.first, budget_) : is_less(a.first, b.first, budget_);
    });
    std::vector<Value> items;
    for (auto& [key, item] : keyed) items.push_back(std::move(item));
    return items;
  }
  Value dict_sort(const Value& v, const Arguments& a) {
    if (!v.is(Kind::dict)) fail("dictsort: found ", kind_name(v), ", expected a dictionary");
    const Value* by = a.find(1, "by");
    const Value place(int64_t(by && need_text(*by).bytes == "value"));
    return make_list(sorted(entries_of(v, 'i'), a.flag(2, "reverse", false),
                            a.flag(0, "case_sensitive", false), &place));
  }
  Value smallest(const Value& v, const Arguments& a, bool largest) {
    const std::vector<Value> items =
        sorted(v, largest, a.flag(0, "case_sensitive", false), a.find(1, "attribute"));
    return items.empty() ? Value() : items.front();
  }
  Value unique(const Value& v, const Arguments& a) {
    std::vector<Value> kept, keys;
    for (const Value& item : items_of(v)) {
      Value key = sort_key(item, a.find(1, "attribute"), a.flag(0, "case_sensitive", false));
      budget_.count(keys.size() / 4);
      if (std::any_of(keys.begin(), keys.end(),
                      [&](const Value& k) { return are_equal(k, key, budget_); }))
        continue;
      keys.push_back(std::move(key)), kept.push_back(item);
    }
    return lazy_list(std::move(kept));
  }
  Value reversed(const Value& v) {
    if (v.lazy == Lazy::generator || !(v.is_list() || v.is(Kind::text) || v.is(Kind::dict)))
      fail("reverse: found ", kind_name(v), ", expected a string or a list");
    std::vector<Value> items = items_of(v);
    std::reverse(items.begin(), items.end());
    return v.is(Kind::text) ? join(items, Text()) : lazy_list(std::move(items));
  }
  Value join_filter(const Value& v, const Arguments& a) {
    const Value* between = a.find(0, "d");
    std::vector<Value> items = items_of(v);
    if (const Value* path = a.find(1, "attribute"))
      for (Value& item : items) item = item_at(item, *path);
    return join(items, between ? text_of(*between) : Text());
  }
  // The next item of a generator, or the first or last of another value.
  Value end_item(const Value& v, bool last) {
    if (v.lazy == Lazy::generator && !last) {
      size_t& next = v.object->index;
      return next < v.items().size() ? v.items()[next++] : Value();
    }
    if (v.lazy == Lazy::generator && last)
      fail("last: found what a filter selected, expected a list");
    const std::vector<Value> items = items_of(v);
    return items.empty() ? Value() : last ? items.back() : items.front();
  }
  Value to_json(const Value& v, const Arguments& a) {
    JsonStyle style{.indent = int(std::clamp<int64_t>(a.integer(1, "indent", -1), -1, 64)),
                    .ascii = a.flag(0, "ensure_ascii", false),
                    .sort_keys = a.flag(3, "sort_keys", false)};
    if (style.indent >= 0) style.between = Text(",", {});
    if (const Value* s = a.find(2, "separators"); s && !s->is(Kind::none)) {
      const std::vector<Value> both = items_of(*s);
      if (both.size() != 2) fail("separators: found ", both.size(), ", expected 2");
      style.between = need_text(both[0]), style.colon = need_text(both[1]);
    }
    if (v.is(Kind::undefined)) refuse_undefined(v);
    Printer printer(budget_);
    printer.add_json(v, style);
    budget_.count_text(printer.out);
    return Value(std::move(printer.out));
  }
  // A number in a text, with white space around it; NAN where there is none.
  double read_real(const Text& text) {
    const std::string bytes = strip(text, nullptr, true, true).text().bytes;
    char* rest = nullptr;
    const double d = std::strtod(bytes.c_str(), &rest);
    const bool whole = !bytes.empty() && rest == bytes.c_str() + bytes.size();
    return whole && bytes.find_first_of("xX(") == std::string::npos ? d : NAN;
  }
  Value to_integer(const Value& v, const Arguments& a) {
    if (v.is_integer()) return Value(v.integer);
    double d = v.is(Kind::real) ? v.real : NAN;
    if (v.is(Kind::text)) {
      const std::string text = strip(v.text(), nullptr, true, true).text().bytes;
      int64_t i = 0;
      const char* const last = text.data() + text.size();
      const char* begin = text.data() + (text.starts_with('+') && !text.starts_with("+-") ? 1 : 0);
      const auto [end, error] = std::from_chars(begin, last, i);
      if (error == std::errc() && end == last) return Value(i);
      d = read_real(v.text());
    }
    if (std::fabs(d) < 9e18) return Value(int64_t(d));
    const Value* otherwise = a.find(0, "default");
    return otherwise ? *otherwise : Value(int64_t(0));
  }
  Value to_real(const Value& v, const Arguments& a) {
    if (v.is_number()) return Value(v.number());
    if (v.is(Kind::text)) {
      const double d = read_real(v.text());
      if (!std::isnan(d)) return Value(d);
    }
    const Value* otherwise = a.find(0, "default");
    return otherwise ? *otherwise : Value(0.0);
  }
  Value absolute(const Value& v) {
    if (!v.is_number()) fail("abs: found ", kind_name(v), ", expected a number");
    if (v.is(Kind::real)) return Value(std::fabs(v.real));
    return v.integer < 0 ? integer_math("-", 0, v.integer) : Value(v.integer);
  }
  Value indent(const Text& text, const Arguments& a) {
    const Value* width = a.find(0, "width");
    const bool is_text = width && width->is(Kind::text);
    const int64_t columns = is_text ? 0 : std::clamp<int64_t>(a.integer(0, "width", 4), 0, 1000);
    const Text space = is_text ? width->text() : Text(std::string(size_t(columns), ' '), {});
    const bool first = a.flag(1, "first", false), blank = a.flag(2, "blank", false);
    Text out;
    for (size_t i = 0, line = 0; i <= text.bytes.size(); line++) {
      const size_t end = std::min(text.bytes.find('\n', i), text.bytes.size());
      budget_.count();
      if (line == 0 ? first : blank || end > i) add(out, space);
      add(out, text, i, std::min(end + 1, text.bytes.size()));
      i = end + 1;
    }
    return Value(std::move(out));
  }
  Value length(const Value& v) {
    if (v.is(Kind::undefined)) return Value(int64_t(0));
    if (v.is(Kind::text)) return Value(int64_t(count_chars(v.text().bytes)));
    if (v.is(Kind::dict)) return Value(int64_t(v.entries().size()));
    if (v.lazy == Lazy::generator)
      fail("length: found what a filter selected, expected | list before it");
    if (!v.is_list())
      fail("length: found ", kind_name(v), ", expected a string, a list or a dictionary");
    return Value(int64_t(v.items().size()));
  }
  Value default_value(const Value& v, const Arguments& a) {
    const bool keeps = !v.is(Kind::undefined) && (!a.flag(1, "boolean", false) || is_true(v));
    const Value* otherwise = a.find(0, "default_value");
    return keeps ? v : otherwise ? *otherwise : make_text("");
  }
  Value as_text(const Value& v, bool is_safe) {
    Value text = v.is(Kind::text) ? v : Value(text_of(v));
    text.is_safe = is_safe;
    return text;
  }

  // ---- tests

  static const Routine kTests[34];

  bool test(const std::string& name, const Value& v, const Arguments& a) {
    budget_.count(1 + a.values.size() / 4);
    const Routine* routine = find_routine(kTests, name);
    if (!routine) fail("found the test ", name, ", expected one that chat templates use");
    routine->check(a);
    return is_true(routine->run(*this, v, a));
  }
  static bool is_iterable(const Value& v) {
    return v.is(Kind::text) || v.is_list() || v.is(Kind::dict) || v.is(Kind::undefined);
  }
  static bool is_divisible(const Value& v, int64_t by) {
    if (!v.is_integer()) fail("found ", kind_name(v), ", expected an integer");
    return integer_math("%", v.integer, by).integer == 0;
  }

  const Code& code_;
  const std::string& date_;
  const Limits& limits_;
  Budget budget_;
  Text output_;
  Text* out_ = &output_;
  Scope root_;
  Scope* scope_ = &root_;
  std::vector<std::shared_ptr<Object>> spaces_;
  int depth_ = 0, nested_ = 0, line_ = 1;
};

// ---------------------------------------------------------------------------------------------
// Tables: name, most arguments by place, names of arguments, what is done

const Routine Renderer::kFunctions[5] = {
    {"range", 3, "", [](R r, V, A a) { return r.range(a); }},
    {"namespace", 1, "*", [](R r, V, A a) { return r.space_of(a, false); }},
    {"dict", 1, "*", [](R r, V, A a) { return r.space_of(a, true); }},
    {"strftime_now", 1, "format", [](R r, V, A a) { return r.strftime_now(a.need(0, "format")); }},
    {"raise_exception", 1, "message",
     [](R r, V, A a) -> Value {
       fail("the template refuses the conversation: ", r.plain_text(a.need(0, "message")));
     }},
};

const Routine Renderer::kTextMethods[16] = {
    {"strip", 1, "",
     [](R r, V v, A a) { return r.strip(v.text(), a.find(0, "chars"), true, true); }},
    {"lstrip", 1, "",
     [](R r, V v, A a) { return r.strip(v.text(), a.find(0, "chars"), true, false); }},
    {"rstrip", 1, "",
     [](R r, V v, A a) { return r.strip(v.text(), a.find(0, "chars"), false, true); }},
    {"split", 2, "sep maxsplit",
     [](R r, V v, A a) {
       return r.split(v.text(), a.find(0, "sep"), a.integer(1, "maxsplit", -1));
     }},
    {"splitlines", 0, "", [](R r, V v, A) { return r.split_lines(v.text()); }},
    {"startswith", 1, "",
     [](R r, V v, A a) { return Value(r.touches(v.text().bytes, a.need(0, "prefix"), false)); }},
    {"endswith", 1, "",
     [](R r, V v, A a) { return Value(r.touches(v.text().bytes, a.need(0, "suffix"), true)); }},
    {"replace", 3, "count",
     [](R r, V v, A a) {
       return r.replace(v.text(), need_text(a.need(0, "old")), need_text(a.need(1, "new")),
                        a.integer(2, "count", -1));
     }},
    {"upper", 0, "", [](R r, V v, A) { return r.with_case(v.text(), Case::upper); }},
    {"lower", 0, "", [](R r, V v, A) { return r.with_case(v.text(), Case::lower); }},
    {"title", 0, "", [](R r, V v, A) { return r.with_case(v.text(), Case::title); }},
    {"capitalize", 0, "", [](R r, V v, A) { return r.with_case(v.text(), Case::capitalize); }},
    {"find", 1, "",
     [](R r, V v, A a) { return r.find_text(v.text().bytes, need_text(a.need(0, "sub")).bytes); }},
    {"count", 1, "",
     [](R r, V v, A a) {
       return r.count_texts(v.text().bytes, need_text(a.need(0, "sub")).bytes);
     }},
    {"join", 1, "", [](R r, V v, A a) { return r.join_texts(v.text(), a.need(0, "iterable")); }},
    {"format", kAnyNumber, "*", [](R r, V v, A a) { return r.brace_format(v.text(), a); }},
};

const Routine Renderer::kDictMethods[5] = {
    {"get", 2, "",
     [](R r, V v, A a) {
       const Value* found = find_entry(v, a.need(0, "key"), r.budget_);
       const Value* otherwise = a.find(1, "default");
       return found ? *found : otherwise ? *otherwise : Value(Kind::none);
     }},
    {"items", 0, "", [](R r, V v, A) { return r.entries_of(v, 'i'); }},
    {"keys", 0, "", [](R r, V v, A) { return r.entries_of(v, 'k'); }},
    {"values", 0, "", [](R r, V v, A) { return r.entries_of(v, 'v'); }},
    {"copy", 0, "", [](R, V v, A) { return v; }},
};

const Routine Renderer::kListMethods[3] = {
    {"index", 1, "", [](R r, V v, A a) { return r.list_index(v, a.need(0, "value"), false); }},
    {"count", 1, "", [](R r, V v, A a) { return r.list_index(v, a.need(0, "value"), true); }},
    {"copy", 0, "", [](R, V v, A) { return v; }},
};

const Routine Renderer::kFilters[34] = {
    {"tojson", 4, "ensure_ascii indent separators sort_keys", [](R r, V v, A a) { return r.to_json(v, a); }},
    {"trim", 1, "chars", [](R r, V v, A a) { return r.strip(r.text_of(v), a.find(0, "chars"), true, true); }},
    {"length", 0, "", [](R r, V v, A) { return r.length(v); }},
    {"count", 0, "", [](R r, V v, A) { return r.length(v); }},
    {"default", 2, "default_value boolean", [](R r, V v, A a) { return r.default_value(v, a); }},
    {"d", 2, "default_value boolean", [](R r, V v, A a) { return r.default_value(v, a); }},
    {"string", 0, "", [](R r, V v, A) { return r.as_text(v, v.is_safe); }},
    {"safe", 0, "", [](R r, V v, A) { return r.as_text(v, true); }},
    {"upper", 0, "", [](R r, V v, A) { return r.with_case(r.text_of(v), Case::upper); }},
    {"lower", 0, "", [](R r, V v, A) { return r.with_case(r.text_of(v), Case::lower); }},
    {"capitalize", 0, "", [](R r, V v, A) { return r.with_case(r.text_of(v), Case::capitalize); }},
    {"title", 0, "", [](R r, V v, A) { return r.with_case(r.text_of(v), Case::words); }},
    {"replace", 3, "old new count", [](R r, V v, A a) {
       return r.replace(r.text_of(v), r.text_of(a.need(0, "old")), r.text_of(a.need(1, "new")),
                        a.integer(2, "count", -1));
     }},
    {"indent", 3, "width first blank", [](R r, V v, A a) { return r.indent(need_text(v), a); }},
    {"format", kAnyNumber, "", [](R r, V v, A a) { return r.percent_format(need_text(v), a.values); }},
    {"join", 2, "d attribute", [](R r, V v, A a) { return r.join_filter(v, a); }},
    {"list", 0, "", [](R r, V v, A) { return make_list(r.items_of(v)); }},
    {"first", 0, "", [](R r, V v, A) { return r.end_item(v, false); }},
    {"last", 0, "", [](R r, V v, A) { return r.end_item(v, true); }},
    {"items", 0, "", [](R r, V v, A) {
       if (v.is(Kind::undefined)) return lazy_list({});
       if (!v.is(Kind::dict)) fail("items: found ", kind_name(v), ", expected a dictionary");
       return lazy_list(r.entries_of(v, 'i').items());
     }},
    {"dictsort", 3, "case_sensitive by reverse", [](R r, V v, A a) { return r.dict_sort(v, a); }},
    {"select", kAnyNumber, "*", [](R r, V v, A a) { return r.select(v, a, false, true); }},
    {"reject", kAnyNumber, "*", [](R r, V v, A a) { return r.select(v, a, false, false); }},
    {"selectattr", kAnyNumber, "*", [](R r, V v, A a) { return r.select(v, a, true, true); }},
    {"rejectattr", kAnyNumber, "*", [](R r, V v, A a) { return r.select(v, a, true, false); }},
    {"map", kAnyNumber, "*", [](R r, V v, A a) { return r.map(v, a); }},
    {"sort", 3, "reverse case_sensitive attribute", [](R r, V v, A a) {
       return make_list(r.sorted(v, a.flag(0, "reverse", false), a.flag(1, "case_sensitive", false),
                                 a.find(2, "attribute")));
     }},
    {"unique", 2, "case_sensitive attribute", [](R r, V v, A a) { return r.unique(v, a); }},
    {"min", 2, "case_sensitive attribute", [](R r, V v, A a) { return r.smallest(v, a, false); }},
    {"max", 2, "case_sensitive attribute", [](R r, V v, A a) { return r.smallest(v, a, true); }},
    {"reverse", 0, "", [](R r, V v, A) { return r.reversed(v); }},
    {"int", 1, "default", [](R r, V v, A a) { return r.to_integer(v, a); }},
    {"float", 1, "default", [](R r, V v, A a) { return r.to_real(v, a); }},
    {"abs", 0, "", [](R r, V v, A) { return r.absolute(v); }},
};

const Routine Renderer::kTests[34] = {
    {"defined", 0, "", [](R, V v, A) { return Value(!v.is(Kind::undefined)); }},
    {"undefined", 0, "", [](R, V v, A) { return Value(v.is(Kind::undefined)); }},
    {"none", 0, "", [](R, V v, A) { return Value(v.is(Kind::none)); }},
    {"string", 0, "", [](R, V v, A) { return Value(v.is(Kind::text)); }},
    {"mapping", 0, "", [](R, V v, A) { return Value(v.is(Kind::dict)); }},
    {"boolean", 0, "", [](R, V v, A) { return Value(v.is(Kind::boolean)); }},
    {"true", 0, "", [](R, V v, A) { return Value(v.is(Kind::boolean) && v.integer != 0); }},
    {"false", 0, "", [](R, V v, A) { return Value(v.is(Kind::boolean) && v.integer == 0); }},
    {"integer", 0, "", [](R, V v, A) { return Value(v.is(Kind::integer)); }},
    {"float", 0, "", [](R, V v, A) { return Value(v.is(Kind::real)); }},
    {"number", 0, "", [](R, V v, A) { return Value(v.is_number()); }},
    {"sequence", 0, "", [](R, V v, A) { return Value(is_iterable(v) && v.lazy <= Lazy::range); }},
    {"iterable", 0, "", [](R, V v, A) { return Value(is_iterable(v)); }},
    {"callable", 0, "",
     [](R, V v, A) {
       return Value(v.is(Kind::macro) || v.is(Kind::function) || v.is(Kind::method));
     }},
    {"sameas", 1, "",
     [](R r, V v, A a) {
       return Value(v.kind == a.need(0, "other").kind && r.holds('=', v, a.need(0, "other")));
     }},
    {"in", 1, "", [](R r, V v, A a) { return Value(r.holds('i', v, a.need(0, "seq"))); }},
    {"eq", 1, "", [](R r, V v, A a) { return Value(r.holds('=', v, a.need(0, "other"))); }},
    {"equalto", 1, "", [](R r, V v, A a) { return Value(r.holds('=', v, a.need(0, "other"))); }},
    {"==", 1, "", [](R r, V v, A a) { return Value(r.holds('=', v, a.need(0, "other"))); }},
    {"ne", 1, "", [](R r, V v, A a) { return Value(r.holds('!', v, a.need(0, "other"))); }},
    {"!=", 1, "", [](R r, V v, A a) { return Value(r.holds('!', v, a.need(0, "other"))); }},
    {"lt", 1, "", [](R r, V v, A a) { return Value(r.holds('<', v, a.need(0, "other"))); }},
    {"lessthan", 1, "", [](R r, V v, A a) { return Value(r.holds('<', v, a.need(0, "other"))); }},
    {"<", 1, "", [](R r, V v, A a) { return Value(r.holds('<', v, a.need(0, "other"))); }},
    {"gt", 1, "", [](R r, V v, A a) { return Value(r.holds('>', v, a.need(0, "other"))); }},
    {"greaterthan", 1, "",
     [](R r, V v, A a) { return Value(r.holds('>', v, a.need(0, "other"))); }},
    {">", 1, "", [](R r, V v, A a) { return Value(r.holds('>', v, a.need(0, "other"))); }},
    {"le", 1, "", [](R r, V v, A a) { return Value(r.holds('[', v, a.need(0, "other"))); }},
    {"<=", 1, "", [](R r, V v, A a) { return Value(r.holds('[', v, a.need(0, "other"))); }},
    {"ge", 1, "", [](R r, V v, A a) { return Value(r.holds(']', v, a.need(0, "other"))); }},
    {">=", 1, "", [](R r, V v, A a) { return Value(r.holds(']', v, a.need(0, "other"))); }},
    {"even", 0, "", [](R, V v, A) { return Value(is_divisible(v, 2)); }},
    {"odd", 0, "", [](R, V v, A) { return Value(!is_divisible(v, 2)); }},
    {"divisibleby", 1, "num",
     [](R, V v, A a) { return Value(is_divisible(v, a.integer(0, "num", 0))); }},
};

Template::Template(std::string_view text, std::string name) {
  auto code = std::make_shared<Code>();
  code->name = std::move(name);
  code->variables.emplace("loop", kLoopVariable);
  code->body = Parser(Lexer(text, code->name).run(), *code).run();
  code_ = std::move(code);
}

Output Template::render(const Variables& variables, const std::string& date,
                        const Limits& limits) const {
  return Renderer(*code_, variables, date, limits).run();
}

}  // namespace cake::jinja
