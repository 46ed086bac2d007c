// Reading records: the JSON objects of a file, whatever shape the file has.
//
//     bytes of a file (cake/bytes.h) --JsonValues--> JSON values --RecordReader--> records
//         --the parsers of the stages--> conversations, preferences, problems
//
// A file holds JSON lines, a JSON array, objects written over several lines, an object with one
// list of records, or parquet; each also in .gz and .zst and, but for parquet, on standard input.
// The content tells which, not the name. Everything is streamed: memory is bounded by the longest
// line or record, or by a row group. Errors name the file, and the line where the record begins.
//
// Documents (cake/documents.h) are read on top of this.
#pragma once

#include <simdjson.h>
#include <strings.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/bytes.h"
#include "cake/json.h"
#include "cake/json_text.h"
#include "cake/parquet_rows.h"
#include "cake/record_options.h"
#include "cake/run.h"

namespace cake {

// A record that cannot be read. The reader goes on with the one behind it.
struct RecordError : Error {
  using Error::Error;
};

// ---------------------------------------------------------------------------------------------
// JSON lines

struct LinePlace {
  const std::string& file;
  int64_t number;
  std::string where() const { return concat(file, ":", number); }
};

// Parses a line, behind which SIMDJSON_PADDING bytes are readable; false: it is blank. The element
// is valid until the parser's next line. Throws RecordError.
inline bool parse_json_value(std::string_view line, const LinePlace& place,
                             simdjson::dom::parser& parser, simdjson::dom::element& element) {
  if (line.find_first_not_of(" \t\r") == std::string_view::npos) return false;
  const auto error = parse_and_repair(line, parser, element);
  if (error) throw RecordError(concat(place.where(), ": ", json_problem(error)));
  return true;
}

inline bool parse_json_line(std::string_view line, const LinePlace& place,
                            simdjson::dom::parser& parser, simdjson::dom::object& object) {
  simdjson::dom::element element;
  if (!parse_json_value(line, place, parser, element)) return false;
  if (element.get(object) != simdjson::SUCCESS) {
    throw RecordError(
        concat(place.where(), ": found ", type_name(element), ", expected an object"));
  }
  return true;
}

// A member that must be there and a string.
inline std::string_view json_string(simdjson::dom::object object, std::string_view key,
                                    const LinePlace& place) {
  simdjson::dom::element value;
  if (object.at_key(key).get(value)) fail(place.where(), ": \"", key, "\" is missing");
  std::string_view text;
  if (value.get(text)) {
    fail(place.where(), ": \"", key, "\": found ", type_name(value), ", expected a string");
  }
  return text;
}

// The lines of a file that this program wrote. What users bring is read by RecordReader.
class JsonLines {
 public:
  explicit JsonLines(const Input& input) : lines_(input) {}

  // The next object, valid until the next call. Blank lines are skipped.
  bool next(simdjson::dom::object& object) {
    for (std::string_view line; lines_.next(line);) {
      if (parse_json_line(line, place(), parser_, object)) return true;
    }
    return false;
  }

  std::string_view get_string(simdjson::dom::object object, std::string_view key) const {
    return json_string(object, key, place());
  }

  LinePlace place() const { return {lines_.name(), lines_.number()}; }
  std::string where() const { return lines_.where(); }
  const std::string& name() const { return lines_.name(); }

 private:
  LineReader lines_;
  simdjson::dom::parser parser_;
};

// ---------------------------------------------------------------------------------------------
// How JSON is laid out in a file, told by its first bytes

enum class JsonLayout {
  none,    // no JSON
  lines,   // a value on each line
  values,  // values over several lines; those of an array at the top are its elements
  lists,   // the same, but an array is a value: a conversation without "messages" around it
  inside   // an object with one list of records: {"version": 1, "data": [...]}
};

// Keys under which programs put all records of a file.
inline constexpr std::string_view kListKeys[] = {"data",     "rows",      "records", "items",
                                                 "examples", "instances", "train"};

// The first bytes of a text as UTF-8, as far as they tell what it is.
inline std::string utf8_head(std::string_view head) {
  std::string text;
  if (const char* utf16 = utf16_charset(head)) {
    Utf16Decoder(utf16 == std::string_view("UTF-16BE")).decode(head, false, text);
  } else {
    text = head;
  }
  if (text.starts_with("\xef\xbb\xbf")) text.erase(0, 3);
  return text;
}

// What a value begins with behind white space; 0: nothing is there.
inline char first_byte(std::string_view json, size_t i = 0) {
  i = json.find_first_not_of(" \t\r\n", i);
  return i == std::string_view::npos ? 0 : json[i];
}

inline bool has_key(const std::vector<RawMember>& members, std::string_view key) {
  return std::any_of(members.begin(), members.end(), [&](const RawMember& m) {
    return m.key.size() == key.size() + 2 && m.key.substr(1, key.size()) == key;
  });
}

// The list of records in an object that holds all of a file; nullptr: there is none. `mapped`: keys
// that --map reads as fields hold no such list.
inline const RawMember* find_list(const std::vector<RawMember>& members,
                                  const std::vector<std::string>& mapped) {
  for (const RawMember& m : members) {
    const std::string_view key = m.key.size() < 2 ? m.key : m.key.substr(1, m.key.size() - 2);
    const bool is_list_key =
        std::find(std::begin(kListKeys), std::end(kListKeys), key) != std::end(kListKeys) &&
        std::find(mapped.begin(), mapped.end(), key) == mapped.end();
    if (is_list_key && m.value.starts_with('[') && first_byte(m.value, 1) == '{') return &m;
  }
  return nullptr;
}

// `head`: UTF-8 without a mark; `is_all`: it is the whole text. `list_begin`: for `inside`, the
// offset behind the list's bracket.
inline JsonLayout json_layout(std::string_view head, bool is_all,
                              const std::vector<std::string>& mapped = {},
                              size_t* list_begin = nullptr) {
  const size_t begin = head.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos) return JsonLayout::none;
  const std::string_view json = head.substr(begin);
  JsonScan scan;
  const bool is_complete = scan.scan(json, is_all) == JsonScan::Status::complete;
  const std::string_view value = json.substr(0, scan.offset());  // as far as it can be read
  const bool is_one_line = value.find('\n') == std::string_view::npos;
  const char next =
      first_byte(json.substr(value.size(), json.find('\n', value.size()) - value.size()));
  std::vector<RawMember> members;
  split_members(json, members);
  if (json[0] == '{') {
    if (members.empty() && first_byte(json, 1) != '}') return JsonLayout::none;
    const RawMember* list = find_list(members, mapped);
    const bool is_only_value = is_all && first_byte(json, value.size()) == 0;
    if (list && (!is_complete || is_only_value)) {
      if (list_begin) *list_begin = size_t(list->value.data() - head.data()) + 1;
      return JsonLayout::inside;
    }
    // A line that is broken is one of JSON lines.
    return is_one_line && !(is_complete && (next == '{' || next == ',')) ? JsonLayout::lines
                                                                         : JsonLayout::values;
  }
  const char second = json[0] == '[' ? first_byte(json, 1) : '\0';
  const char third = first_byte(json, json.find(second, 1) + 1);
  if (second == ']') return JsonLayout::values;
  if (second == '[') return third == '{' ? JsonLayout::values : JsonLayout::none;
  if (second != '{' || (members.empty() && third != '}')) return JsonLayout::none;
  const bool is_message = (has_key(members, "role") && has_key(members, "content")) ||
                          (has_key(members, "from") && has_key(members, "value"));
  if (!is_message) return JsonLayout::values;
  return is_one_line && next != '[' ? JsonLayout::lines : JsonLayout::lists;
}

// ---------------------------------------------------------------------------------------------
// Values of a file, whatever its layout

class JsonValues {
 public:
  // A window at the beginning of its stream. `mapped`: see find_list().
  explicit JsonValues(ByteWindow window, const std::vector<std::string>& mapped = {})
      : window_(std::move(window)) {
    window_.begin_text();
    const std::string_view head = window_.need(kHead);
    size_t list_begin = 0;
    layout_ = json_layout(head, window_.ended(), mapped, &list_begin);
    line_begin_ = window_.offset();
    if (layout_ == JsonLayout::none) layout_ = JsonLayout::lines;
    if (layout_ == JsonLayout::inside) consume(list_begin), in_list_ = true;
  }

  // The next value, valid until the next call; false at the end. Throws RecordError for one that
  // cannot be read, and Error where those behind it cannot be found.
  bool next(simdjson::dom::element& value) {
    return layout_ == JsonLayout::lines ? next_line(value) : next_value(value);
  }

  // Of JSON lines: about `bytes` bytes of whole lines, unparsed, valid until the next call.
  // `number`: of the first of them.
  bool next_lines(std::string_view& lines, size_t bytes, int64_t& number) {
    number = line_ + 1;
    return read_lines(window_, lines, bytes, line_);
  }
  bool has_lines() const { return layout_ == JsonLayout::lines; }

  const std::string& name() const { return window_.name(); }
  int64_t number() const { return number_; }  // of the line at which the last value begins
  std::string where() const { return concat(name(), ":", number_); }

 private:
  static constexpr size_t kHead = 1 << 16;
  static constexpr size_t kMaxBytes = size_t(1) << 30;

  [[noreturn]] void fail_record(std::string_view problem) const {
    throw RecordError(concat(where(), ": ", problem));
  }

  bool next_line(simdjson::dom::element& value) {
    for (std::string_view line; read_line(window_, line) != LineEnd::none;) {
      number_ = ++line_;
      if (parse_json_value(line, {name(), number_}, parser_, value)) return true;
    }
    return false;
  }

  // Passes bytes of the window and counts their lines.
  void consume(size_t bytes) {
    const std::string_view passed = window_.bytes().substr(0, bytes);
    const size_t newline = passed.rfind('\n');
    if (newline != std::string_view::npos) {
      line_ += std::count(passed.begin(), passed.end(), '\n');
      line_begin_ = window_.offset() + newline + 1;
    }
    window_.consume(bytes);
  }

  // Passes white space; the byte behind it, 0 at the end of the file.
  char pass_space() {
    while (!window_.need(1).empty()) {
      const size_t end = window_.bytes().find_first_not_of(" \t\r\n");
      if (end != std::string_view::npos) return consume(end), window_.bytes()[0];
      consume(window_.bytes().size());
    }
    return 0;
  }

  bool next_value(simdjson::dom::element& value) {
    for (char byte; (byte = pass_space()) != 0;) {
      number_ = line_ + 1;
      if (in_list_ && byte == ']') {
        consume(1);
        in_list_ = false;
        if (layout_ == JsonLayout::inside) pass_rest_of_object();
      } else if (!in_list_ && byte == '[' && layout_ == JsonLayout::values) {
        consume(1);
        in_list_ = true;
      } else if (byte == ',') {
        consume(1);
      } else {
        return parse_value(value), true;
      }
    }
    number_ = line_ + 1;
    if (std::exchange(in_list_, false)) {
      fail_record("found the end of the file, expected the end of the list: the file is truncated");
    }
    return false;
  }

  // The bytes of the value that begins the window.
  std::string_view find_value(JsonScan& scan) {
    for (size_t bytes = kHead;; bytes = 2 * window_.bytes().size()) {
      const std::string_view window = window_.need(bytes);
      const JsonScan::Status status = scan.scan(window, window_.ended());
      if (status == JsonScan::Status::complete) return window.substr(0, scan.offset());
      if (status == JsonScan::Status::broken) return {};
      if (window_.ended()) {
        consume(window.size());
        in_list_ = false;
        fail_record("found the end of the file inside a record: the file is truncated");
      }
      if (window.size() > kMaxBytes) fail(where(), ": found a record of more than 1 GiB");
    }
  }

  void parse_value(simdjson::dom::element& value) {
    JsonScan scan;
    const std::string_view json = find_value(scan);
    if (json.empty()) pass_broken_value(scan);
    consume(json.size());  // its bytes stay
    const auto error = parse_and_repair(json, parser_, value);
    if (error) fail_record(json_problem(error));
  }

  // Goes to the next line that is not indented deeper than the record and begins one.
  [[noreturn]] void pass_broken_value(const JsonScan& scan) {
    const std::string_view window = window_.bytes();
    const int64_t broken_line =
        number_ + std::count(window.begin(), window.begin() + long(scan.offset()), '\n');
    const std::string problem =
        concat("not JSON: found ", scan.problem(),
               broken_line > number_ ? concat(" in line ", broken_line) : std::string());
    const size_t column = size_t(window_.offset() - line_begin_);
    const std::string_view behind = window.substr(scan.offset());
    const bool holds_others =
        behind.substr(0, behind.find('\n')).find('{') != std::string_view::npos;
    do {
      std::string_view line;
      read_line(window_, line);
      line_++;
      line_begin_ = window_.offset();
      const std::string_view next = window_.need(column + 1);
      const size_t indent = next.find_first_not_of(" \t");
      if (indent <= column && (next[indent] == '{' || next[indent] == '[')) fail_record(problem);
    } while (!window_.bytes().empty());
    in_list_ = false;
    if (holds_others) fail(where(), ": ", problem, ", and no line behind it begins a record");
    fail_record(problem);
  }

  // Behind the list of an object that holds the file.
  void pass_rest_of_object() {
    bool is_key = true;
    for (char byte; (byte = pass_space()) != 0 && byte != '}';) {
      number_ = line_ + 1;
      if (byte == ',' || byte == ':') {
        consume(1);
        is_key = byte == ',';
        continue;
      }
      JsonScan scan;
      const std::string_view value = find_value(scan);
      if (value.empty()) fail(where(), ": not JSON: found ", scan.problem());
      if (is_key) key_ = value;
      if (!is_key && value[0] == '[' && first_byte(value, 1) == '{') {
        fail(where(), ": found a second list of objects, ", key_,
             ", expected one list of records in a file");
      }
      consume(value.size());
    }
    if (!window_.need(1).empty()) consume(1);
    if (pass_space() != 0) {
      number_ = line_ + 1;
      fail(where(), ": found more behind the object that holds the list of records, expected the ",
           "end of the file");
    }
  }

  ByteWindow window_;
  JsonLayout layout_;
  simdjson::dom::parser parser_;
  bool in_list_ = false;
  int64_t line_ = 0;  // line breaks passed
  int64_t number_ = 1;
  uint64_t line_begin_ = 0;  // offset in the stream of the present line
  std::string key_;
};

// ---------------------------------------------------------------------------------------------
// Kinds of files, told by the first bytes of their (decompressed) content

enum class FileKind { warc, parquet, html, json, text };

// Whether a text begins as a page does, behind comments and an XML declaration.
inline bool begins_html(std::string_view head) {
  for (;;) {
    head.remove_prefix(std::min(head.find_first_not_of(" \t\r\n\f"), head.size()));
    const std::string_view end = head.starts_with("<!--") ? "-->" : "?>";
    if (!head.starts_with("<!--") && !head.starts_with("<?xml")) break;
    const size_t found = head.find(end);
    if (found == std::string_view::npos) return false;
    head.remove_prefix(found + end.size());
  }
  for (const std::string_view tag : {"<!doctype html", "<html", "<head", "<body"}) {
    if (head.size() <= tag.size() || strncasecmp(head.data(), tag.data(), tag.size()) != 0)
      continue;
    if (std::strchr(" \t\r\n\f>/", head[tag.size()])) return true;
  }
  return false;
}

// Whether a text, UTF-8 without a mark, begins as a file of JSON does. An object over several lines
// may be a program's own file: it is a document only if it has one of the keys.
inline bool begins_json(std::string_view head, bool is_all, const std::vector<std::string>& keys) {
  const JsonLayout layout = json_layout(head, is_all);
  if (layout != JsonLayout::values || first_byte(head) != '{' || keys.empty()) {
    return layout != JsonLayout::none;
  }
  std::vector<RawMember> members;
  split_members(head, members);
  return std::any_of(keys.begin(), keys.end(),
                     [&](const std::string& key) { return has_key(members, key); });
}

// `head`: the first 64 KiB, or all that there is. `keys`: of the text of a document; none: any JSON
// is of the kind `json`.
inline FileKind file_kind(const Input& input, std::string_view head,
                          const std::vector<std::string>& keys = {"text", "html"}) {
  if (head.starts_with("WARC/")) return FileKind::warc;
  if (head.starts_with("PAR1")) return FileKind::parquet;
  const std::string text = utf8_head(head);
  if (begins_html(text)) return FileKind::html;
  if (begins_json(text, head.size() < (1 << 16), keys)) return FileKind::json;
  const std::string extension = inner_extension(input.name);
  for (const char* html : {".html", ".htm", ".xhtml"})
    if (extension == html) return FileKind::html;
  for (const char* json : {".jsonl", ".ndjson", ".json"}) {
    const bool is_lines = extension != ".json" || json_layout(text, false) == JsonLayout::none;
    if (extension == json && is_lines) return FileKind::json;
  }
  return FileKind::text;
}

// A parquet file is read from its end, so it must be a file, and not compressed as a whole.
inline void require_mapped_parquet(const Input& input, const ByteSource& source) {
  const char* found = source.is_compressed()    ? "inside gzip or Zstandard"
                      : source.file_size() == 0 ? "that cannot be read from its end"
                                                : nullptr;
  if (found) fail(input.name, ": found parquet ", found, ", expected a file");
}

// Fails where the first bytes of a file are no text.
inline void require_text(std::string_view head, const std::string& name) {
  if (const char* kind = binary_kind(head)) {
    fail(name, ": found ", kind, ", expected text, JSON lines, .gz or .zst");
  }
  const size_t nuls = utf16_charset(head) ? 0 : binary_nuls(head);
  require(nuls == 0, name, ": found ", nuls, " NUL bytes in the first ",
          std::min<size_t>(head.size(), 1 << 16), ": binary data, expected text");
}

// ---------------------------------------------------------------------------------------------
// Records

// The value at a path such as "reward_model.ground_truth" or "choices.0.text". A key that has the
// dots itself comes first. False: it is absent.
inline bool find_path(simdjson::dom::object object, std::string_view path,
                      simdjson::dom::element& value) {
  if (!object.at_key(path).get(value)) return true;
  for (size_t dot = path.find('.'); dot != std::string_view::npos; dot = path.find('.', dot + 1)) {
    simdjson::dom::element inner;
    if (object.at_key(path.substr(0, dot)).get(inner)) continue;
    std::string_view rest = path.substr(dot + 1);
    for (simdjson::dom::array list; !inner.get(list);) {
      size_t index = 0;
      const std::string_view number = rest.substr(0, rest.find('.'));
      const auto [end, error] =
          std::from_chars(number.data(), number.data() + number.size(), index);
      if (error != std::errc() || end != number.data() + number.size()) return false;
      if (list.at(index).get(inner)) return false;
      if (number.size() == rest.size()) return value = inner, true;
      rest.remove_prefix(number.size() + 1);
    }
    simdjson::dom::object next;
    if (!inner.get(next) && find_path(next, rest, value)) return true;
  }
  return false;
}

// The value of a field, where --map looks for it. False: it is absent or null.
inline bool find_field(simdjson::dom::object object, std::string_view field,
                       const FieldNames& names, simdjson::dom::element& value) {
  const auto mapped = names.find(field);
  const bool found = mapped == names.end() ? !object.at_key(field).get(value)
                                           : find_path(object, mapped->second, value);
  return found && !value.is_null();
}

// One record, valid until its reader's next one.
struct Record {
  simdjson::dom::object object;
  std::string where;                  // file:line, or "file: row 3", for messages
  const FieldNames* names = nullptr;  // of --map; nullptr: every field has its own name
  std::set<std::string, std::less<>>* fields = nullptr;  // notes which names of --map are used

  // The value of a field, where --map looks for it. False: it is absent or null.
  bool find(std::string_view field, simdjson::dom::element& value) const {
    static const FieldNames kNone;
    if (fields && names && names->count(field) > 0) fields->emplace(field);
    return find_field(object, field, names ? *names : kNone, value);
  }
  bool has(std::string_view field) const {
    simdjson::dom::element ignored;
    return find(field, ignored);
  }
  // A field that must be there and a string.
  std::string_view string(std::string_view field) const {
    std::string_view text;
    if (!this->text(field, text)) fail(problem(field));
    return text;
  }
  // The same, without an Error: false where it is no string.
  bool text(std::string_view field, std::string_view& text) const {
    simdjson::dom::element value;
    return find(field, value) && !value.get(text);
  }
  std::string problem(std::string_view field) const {  // why not, with its place
    simdjson::dom::element value;
    if (!find(field, value)) return concat(where, ": \"", field, "\" is missing");
    return concat(where, ": \"", field, "\": found ", type_name(value), ", expected a string");
  }
  // Its keys, for messages: "id", "text".
  std::string keys() const {
    std::string list;
    for (const auto& [key, value] : object)
      list += concat(list.empty() ? "" : ", ", json_text(std::string(key)));
    return list.empty() ? "none" : list;
  }
};

// What a record is by its keys, and which stage reads it: "a preference, which ./reward reads"; "":
// no stage does.
inline std::string stage_of(const Record& r) {
  const auto any = [&](std::initializer_list<const char*> fields) {
    return std::any_of(fields.begin(), fields.end(), [&](const char* f) { return r.has(f); });
  };
  if (any({"chosen", "rejected", "responses", "ranking"}) ||
      (any({"label"}) && any({"completion"}))) {
    return "a preference, which ./reward reads";
  }
  const bool asks = any({"question", "problem", "prompt", "messages", "query"});
  if (any({"reward_model"}) || (asks && any({"answer", "answers", "solution", "ground_truth",
                                             "choices", "target", "nums"}))) {
    return "a problem, which ./rlhf grpo and ./rlhf ppo read";
  }
  if (any({"messages", "conversations", "conversation", "instruction"}) ||
      (asks && any({"completion", "response", "output"}))) {
    return "a conversation, which ./sft reads";
  }
  if (any({"text"}) && any({"label"})) return "a labelled text, which ./reward reads";
  if (any({"html"})) return "a page, which ./corpus reads";
  if (any({"text"})) return "a document, which ./bpe train and ./bpe encode read";
  return asks ? "a prompt, which ./rlhf and ./chat generate --prompts read" : "";
}

// Fails because a record is of no shape that the reader knows: names the keys found and --map, and
// the stage that reads such records, if there is one. `expected`: the shapes, in words.
[[noreturn]] inline void fail_unknown_shape(const Record& record, std::string_view expected) {
  const std::string stage = stage_of(record);
  fail(record.where, ": found the keys ", record.keys(), stage.empty() ? "" : " (" + stage + ")",
       ", expected ", expected, " (--map FIELD=KEY reads the key KEY as FIELD)");
}

// What a reader left out and why: counted for the output and for metrics.jsonl.
class LeftOut {
 public:
  // `reason`: "equal answers", "empty answer", "too long", "bad line"; `example`: a place, or the
  // message of an error.
  void add(std::string_view reason, std::string_view example = {}) {
    Reason& r = reasons_[std::string(reason)];
    r.count++;
    if (!example.empty() && r.examples.size() < 3) r.examples.emplace_back(example);
  }
  void add(const LeftOut& other) {  // of another file
    for (const auto& [name, reason] : other.reasons_) {
      Reason& r = reasons_[name];
      r.count += reason.count;
      for (const std::string& example : reason.examples)
        if (r.examples.size() < 3) r.examples.push_back(example);
    }
  }
  int64_t count(std::string_view reason) const {
    const auto it = reasons_.find(std::string(reason));
    return it == reasons_.end() ? 0 : it->second.count;
  }
  int64_t total() const {
    int64_t n = 0;
    for (const auto& [name, reason] : reasons_) n += reason.count;
    return n;
  }
  // {"bad line": 2, "too long": 31}
  OrderedJson json() const {
    OrderedJson out = OrderedJson::object();
    for (const auto& [name, reason] : reasons_) out[name] = reason.count;
    return out;
  }
  // "left out 31 of 1,000 records: too long", a line for each reason, with up to three examples of
  // bad lines; empty: nothing was left out.
  std::string text(int64_t records) const {
    std::string out;
    for (const auto& [name, reason] : reasons_) {
      out += concat("left out ", reason.count, " of ", records, " records: ", name, "\n");
      for (const std::string& example : reason.examples) out += concat("  ", example, "\n");
    }
    return out;
  }
  // The same in one line: "2 bad line (a.jsonl:3: ...), 31 too long (a.jsonl:9)".
  std::string summary() const {
    std::string out;
    for (const auto& [name, reason] : reasons_) {
      out += concat(out.empty() ? "" : ", ", reason.count, " ", name);
      if (!reason.examples.empty()) out += concat(" (", reason.examples[0], ")");
    }
    return out;
  }

 private:
  struct Reason {
    int64_t count = 0;
    std::vector<std::string> examples;
  };
  std::map<std::string, Reason> reasons_;
};

// The records of one file.
class RecordReader {
 public:
  explicit RecordReader(const Input& input, const RecordOptions& options = {})
      : RecordReader(ByteWindow(ByteSource(input, {.any_kind = true})), input, options) {}
  RecordReader(ByteWindow window, const Input& input, const RecordOptions& options)
      : names_(options.names) {
    const std::string_view head = window.need(1 << 16);
    require(!head.empty(), input.name, ": found an empty file, expected ", kShapes);
    const FileKind kind = file_kind(input, head, {});
    if (kind == FileKind::parquet) {
      require_mapped_parquet(input, window.source());
      rows_ = std::make_unique<parquet::JsonRows>(input.path);
      name_ = input.name;
      for (const auto& column : rows_->left_out()) {
        std::fprintf(stderr, "note: %s: left out\n", column.why.c_str());
      }
      return;
    }
    const bool is_page = kind == FileKind::warc || kind == FileKind::html;
    require(!is_page, input.name, ": found ",
            kind == FileKind::warc ? "a WARC archive" : "a page of HTML", ", expected ", kShapes,
            ": ./corpus reads pages");
    require_text(head, input.name);
    const std::string text = utf8_head(head);
    const bool has_object =
        first_byte(text) == '{' || first_byte(text) == '[' || text.find("\n{") != std::string::npos;
    require(kind == FileKind::json || has_object, input.name, ": found text that begins with ",
            json_text(text.substr(0, std::min<size_t>(40, text.find_first_of("\r\n")))),
            ", expected ", kShapes);
    values_ = std::make_unique<JsonValues>(std::move(window), options.mapped_keys());
  }

  // False at the end. Throws RecordError for a record that cannot be read; next() then goes on with
  // the one behind it.
  bool next(Record& record) {
    simdjson::dom::element value;
    if (rows_ ? !next_row(value) : !values_->next(value)) return false;
    record.where = where(), record.names = &names_, record.fields = &fields_;
    if (is_messages(value)) value = with_messages(value);
    if (value.get(record.object) || !written_number(value).empty()) {
      throw RecordError(concat(where(), ": found ", type_name(value), ", expected an object"));
    }
    return true;
  }

  std::string where() const {  // of the last record
    return rows_ ? concat(name_, ": row ", rows_->row()) : values_->where();
  }
  // The fields of --map that some record was asked for.
  const std::set<std::string, std::less<>>& fields() const { return fields_; }

 private:
  static constexpr const char* kShapes = "JSON lines, a JSON array of objects or parquet";

  bool next_row(simdjson::dom::element& value) {
    try {
      if (!rows_->next(row_)) return false;
    } catch (const Error& e) {
      throw RecordError(e.what());  // the rest of a row group; those behind it can be read
    }
    const auto error = parse_and_repair(row_, parser_, value);
    if (error) throw RecordError(concat(where(), ": ", json_problem(error)));
    return true;
  }

  // A conversation may be written without an object around it: [{"role": ..., "content": ...}].
  static bool is_messages(simdjson::dom::element value) {
    simdjson::dom::array list;
    simdjson::dom::object message;
    if (value.get(list) || list.at(0).get(message)) return false;
    return !message.at_key("role").error() || !message.at_key("from").error();
  }
  simdjson::dom::element with_messages(simdjson::dom::element list) {
    return parser_.parse(concat("{\"messages\":", simdjson::minify(list), "}")).value();
  }

  std::unique_ptr<JsonValues> values_;
  std::unique_ptr<parquet::JsonRows> rows_;
  std::string name_, row_;
  simdjson::dom::parser parser_;
  FieldNames names_;
  std::set<std::string, std::less<>> fields_;
};

// Fails where --map names a field that no record was asked for: it would change nothing.
inline void require_fields_used(const FieldNames& names,
                                const std::set<std::string, std::less<>>& used) {
  for (const auto& [field, key] : names) {
    require(used.count(field) > 0, "--map ", field, "=", key, ": found no use of a field ",
            json_text(field), ", expected a field that these records are read by");
  }
}

// What visit returns to end the reading: it does not need this item, nor those behind it.
inline constexpr const char* kEnough = "enough";

// Calls visit(item) for what next(item) reads, until that is false. visit returns why it leaves the
// item out, or nullptr when it keeps it, or kEnough; it throws Error where the item is bad. Returns
// the number of items, those that were left out among them. `name` begins the error where none is
// left.
template <class Item, class Next, class Visit>
int64_t visit_each(const std::string& name, const RecordOptions& options, LeftOut& left_out,
                   Next&& next, Visit&& visit) {
  LeftOut here;
  int64_t count = 0;
  for (Item item;;) {
    stop_if_signalled();
    try {
      if (!next(item)) break;
    } catch (const RecordError& e) {
      if (!options.skip_bad_lines) throw;
      count++;
      here.add("bad line", e.what());
      continue;
    }
    count++;
    try {
      const char* reason = visit(std::as_const(item));
      if (reason == kEnough) {
        count--;
        break;
      }
      if (reason) here.add(reason, item.where);
    } catch (const Error& e) {
      if (!options.skip_bad_lines) throw;
      here.add("bad line", e.what());
    }
  }
  if (count == 0) fail(name, ": found no records, expected one or more");
  if (here.total() == count) fail(name, ": found no record to use: ", here.summary());
  left_out.add(here);
  return count;
}

// visit_each for the records of the files. A file of which no record is left is an error.
template <class Visit>
int64_t for_each_record(const std::vector<std::string>& paths, const RecordOptions& options,
                        LeftOut& left_out, Visit&& visit) {
  int64_t records = 0;
  std::set<std::string, std::less<>> used;
  for (const std::string& path : paths) {
    const Input input(path);
    RecordReader reader(input, options);
    records += visit_each<Record>(
        input.name, options, left_out, [&](Record& record) { return reader.next(record); }, visit);
    used.insert(reader.fields().begin(), reader.fields().end());
  }
  require_fields_used(options.names, used);
  return records;
}

// ---------------------------------------------------------------------------------------------
// Lines of text: prompts

struct TextLine {
  std::string where, text;  // where: file:line, or "file: row 3"
};

// The lines of a text file, or a field of records. The text may come from any editor: a mark,
// UTF-16, \r\n or \r change nothing, nor does a line break at the end or blank lines behind the
// last text. A blank line before it is an empty text. Records that cannot be read are left out with
// --bad-lines skip, and counted.
inline std::vector<TextLine> read_text_lines(const Input& input, std::string_view field,
                                             const RecordOptions& options = {},
                                             LeftOut* left_out = nullptr) {
  std::vector<TextLine> lines;
  ByteWindow window(ByteSource(input, {.any_kind = true}));
  const std::string_view head = window.need(1 << 16);
  require(!head.empty(), input.name, ": found an empty file, expected a text on each line");
  if (file_kind(input, head, {std::string(field)}) != FileKind::text) {
    RecordReader reader(std::move(window), input, options);
    LeftOut ignored;
    const auto read = [&](const Record& record) -> const char* {
      std::string_view text;
      if (!record.has(field)) fail_unknown_shape(record, json_text(std::string(field)));
      if (!record.text(field, text)) throw RecordError(record.problem(field));
      lines.push_back({record.where, std::string(text)});
      return nullptr;
    };
    visit_each<Record>(
        input.name, options, left_out ? *left_out : ignored,
        [&](Record& record) { return reader.next(record); }, read);
    require_fields_used(options.names, reader.fields());
    return lines;
  }
  require_text(head, input.name);
  LineReader reader(std::move(window));
  for (std::string_view line; reader.next(line);) {
    for (size_t begin = 0; begin <= line.size();) {
      const size_t end = std::min(line.size(), line.find('\r', begin));
      lines.push_back({concat(input.name, ":", lines.size() + 1),
                       std::string(line.substr(begin, end - begin))});
      begin = end + 1;
    }
  }
  while (!lines.empty() && strip_ascii(lines.back().text).empty()) lines.pop_back();
  require_fields_used(options.names, {});
  return lines;
}

}  // namespace cake
