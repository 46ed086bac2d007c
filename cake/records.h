// Reading records: documents, conversations, preferences.
//
//     bytes of a file (cake/bytes.h) --LineReader--> lines --JsonLines--> JSON objects
//         --DocumentReader--> documents, also of plain text, WET files and parquet
//
// Everything is streamed: memory is bounded by one part of a plain text, by the longest line or
// record, or by a row group. Errors name the file, and the line in JSON lines.
#pragma once

#include <simdjson.h>
#include <strings.h>

#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/bytes.h"
#include "cake/chat_template.h"
#include "cake/parquet.h"
#include "cake/run.h"
#include "cake/warc.h"

namespace cake {

// ---------------------------------------------------------------------------------------------
// JSON lines

inline const char* type_name(simdjson::dom::element e) {
  return e.is_array()    ? "an array"
         : e.is_object() ? "an object"
         : e.is_string() ? "a string"
         : e.is_bool()   ? "true or false"
         : e.is_null()   ? "null"
                         : "a number";
}

struct LinePlace {
  const std::string& file;
  int64_t number;
  std::string where() const { return concat(file, ":", number); }
};

// Parses a line, behind which SIMDJSON_PADDING bytes are readable; false: it is blank. The object
// is valid until the parser's next line.
inline bool parse_json_line(std::string_view line, const LinePlace& place,
                            simdjson::dom::parser& parser, simdjson::dom::object& object) {
  if (place.number == 1 && line.starts_with("\xef\xbb\xbf")) line.remove_prefix(3);
  if (line.find_first_not_of(" \t\r") == std::string_view::npos) return false;
  simdjson::dom::element element;
  auto error = parser.parse(line.data(), line.size(), false).get(element);
  if (error) fail(place.where(), ": not JSON: ", simdjson::error_message(error));
  if (element.get(object) != simdjson::SUCCESS) {
    fail(place.where(), ": found ", type_name(element), ", expected an object");
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

class JsonLines {
 public:
  explicit JsonLines(const Input& input) : lines_(input) {}
  explicit JsonLines(LineReader lines) : lines_(std::move(lines)) {}

  // The next object, valid until the next call. Blank lines are skipped.
  bool next(simdjson::dom::object& object) {
    for (std::string_view line; lines_.next(line);) {
      if (parse_json_line(line, place(), parser_, object)) return true;
    }
    return false;
  }
  // The next lines, unparsed: see LineReader. `number`: of the first of them.
  bool next_lines(std::string_view& lines, size_t bytes, int64_t& number) {
    number = lines_.number() + 1;
    return lines_.next_lines(lines, bytes);
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
// Kinds of files, told by the first bytes of their (decompressed) content

enum class FileKind { warc, parquet, html, json_lines, text };

inline constexpr std::string_view kUtf8Mark = "\xef\xbb\xbf";

// Whether the first line that is not blank is a JSON object, as far as the bytes go.
inline bool begins_json_lines(std::string_view head) {
  if (head.starts_with(kUtf8Mark)) head.remove_prefix(kUtf8Mark.size());
  const size_t begin = head.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos || head[begin] != '{') return false;
  head.remove_prefix(begin);
  const size_t newline = head.find('\n');
  if (newline == std::string_view::npos && head.size() >= (1 << 16)) {
    const size_t key = head.find_first_not_of(" \t\r\n", 1);
    return key != std::string_view::npos && head[key] == '"';
  }
  simdjson::dom::parser parser;
  simdjson::dom::object object;
  const auto error = parser.parse(std::string(head.substr(0, newline))).get(object);
  // Bytes that are not UTF-8 are for the reader to repair.
  return !error || error == simdjson::UTF8_ERROR || error == simdjson::DEPTH_ERROR;
}

// Whether the bytes begin as a page does, behind comments and an XML declaration.
inline bool begins_html(std::string_view head) {
  std::string narrow;  // of UTF-16
  if (head.starts_with("\xff\xfe") || head.starts_with("\xfe\xff")) {
    for (const char c : head.substr(2, 4096))
      if (c) narrow += c;
    head = narrow;
  }
  if (head.starts_with(kUtf8Mark)) head.remove_prefix(kUtf8Mark.size());
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

inline FileKind file_kind(const Input& input, std::string_view head) {
  if (head.starts_with("WARC/")) return FileKind::warc;
  if (head.starts_with("PAR1")) return FileKind::parquet;
  if (begins_html(head)) return FileKind::html;
  if (begins_json_lines(head)) return FileKind::json_lines;
  const std::string extension = inner_extension(input.name);
  for (const char* html : {".html", ".htm", ".xhtml"})
    if (extension == html) return FileKind::html;
  for (const char* json : {".jsonl", ".ndjson", ".json"})
    if (extension == json) return FileKind::json_lines;
  return FileKind::text;
}

// ---------------------------------------------------------------------------------------------
// Documents

struct DocumentPart {
  std::string_view text;  // bytes, cut anywhere when a document has several parts
  bool begins = false, ends = false;
};

struct JsonBlock {  // lines of a file
  std::string_view lines;
  int64_t number = 0;  // of the first one
  std::string file;
};

// The documents of plain text (a file is one), JSON lines ("text"), WET files (text that was made
// of pages) and parquet (the column "text"). Pages themselves are for ./corpus.
class DocumentReader {
 public:
  explicit DocumentReader(std::vector<Input> inputs, size_t part_bytes = 1 << 22)
      : inputs_(std::move(inputs)), buffer_(part_bytes) {}

  // The next part of a document; only a document of plain text has several. The part is valid until
  // the next call.
  bool next(DocumentPart& part) {
    for (;;) {
      if (!text_ && !json_ && !warc_ && !parquet_) {
        if (input_ == inputs_.size()) return false;
        open(inputs_[input_++]);
      }
      if (text_) return next_text(part), true;
      if (json_ ? next_json(part) : warc_ ? next_warc(part) : next_row(part)) {
        records_++;
        return true;
      }
      if (records_ == 0) fail_without_documents(inputs_[input_ - 1].name);
      json_.reset(), warc_.reset(), parquet_.reset();
    }
  }

  // If the next documents are JSON lines: about `bytes` bytes of whole lines, unparsed, so that
  // threads can parse them. They are valid until the next call. Otherwise false.
  bool next_json_lines(JsonBlock& block, size_t bytes) {
    for (;;) {
      if (!text_ && !json_ && !warc_ && !parquet_) {
        if (input_ == inputs_.size()) return false;
        open(inputs_[input_++]);
      }
      if (!json_) return false;
      if (json_->next_lines(block.lines, bytes, block.number)) {
        block.file = json_->name();
        records_ += block.lines.find_first_not_of(" \t\r\n") != std::string_view::npos;
        return true;
      }
      if (records_ == 0) fail_without_documents(inputs_[input_ - 1].name);
      json_.reset();
    }
  }

  // Skips the rest of a plain text's document.
  void skip_document() { text_.reset(); }

  // Standard input holds JSON lines if its first byte is '{'. Of files the name tells, and where it
  // does not, the first line.
  static bool is_jsonl(const Input& input, std::string_view head) {
    if (input.name == "standard input") {
      const size_t begin = head.find_first_not_of(" \t\r\n\xef\xbb\xbf");
      return begin != std::string_view::npos && head[begin] == '{';
    }
    const std::string extension = inner_extension(input.path);
    if (extension == ".jsonl" || extension == ".ndjson") return true;
    return extension != ".txt" && begins_json_lines(head);
  }

 private:
  struct Warc {
    Warc(ByteSource source, std::string_view head) : window(std::move(source), head) {}
    ByteWindow window;
    ProblemCounts problems;
    WarcReader reader{window, size_t(1) << 30, problems};
  };

  void open(const Input& input) {
    ByteSource source(input, {.any_kind = true});
    head_ = source.read(buffer_.data(), buffer_.size());
    const std::string_view head(buffer_.data(), head_);
    if (head.empty()) fail(input.name, ": found an empty file, expected text");
    const FileKind kind = file_kind(input, head);
    records_ = 0;
    if (kind == FileKind::warc) {
      warc_ = std::make_unique<Warc>(std::move(source), head);
    } else if (kind == FileKind::parquet) {
      parquet_ = open_parquet(input, source);
    } else if (kind == FileKind::html) {
      fail(input.name, ": found a page of HTML, expected text: run ./corpus clean or ./corpus ",
           "extract first");
    } else if (is_jsonl(input, head)) {
      json_ = std::make_unique<JsonLines>(LineReader(std::move(source), head));
    } else {
      check_text(head, input.name);
      text_ = std::make_unique<ByteSource>(std::move(source));
      at_start_ = true;
    }
  }

  static void check_text(std::string_view head, const std::string& name) {
    if (const char* kind = binary_kind(head)) {
      fail(name, ": found ", kind, ", expected text, JSON lines, .gz or .zst");
    }
    const size_t nuls = binary_nuls(head);
    require(nuls == 0, name, ": found ", nuls, " NUL bytes in the first ",
            std::min<size_t>(head.size(), 1 << 16), ": binary data, expected text in UTF-8");
  }

  void fail_without_documents(const std::string& name) const {
    if (warc_) {
      fail(name, ": found a WARC archive without text, expected conversion records, as WET files ",
           "have: run ./corpus clean or ./corpus extract on pages first");
    }
    fail(name, ": found no documents, expected ", json_ ? "JSON lines" : "rows with a text");
  }

  void next_text(DocumentPart& part) {
    const size_t got = at_start_ ? head_ : text_->read(buffer_.data(), buffer_.size());
    part = {{buffer_.data(), got}, std::exchange(at_start_, false), got < buffer_.size()};
    if (part.ends) text_.reset();
  }

  bool next_json(DocumentPart& part) {
    simdjson::dom::object object;
    if (!json_->next(object)) return false;
    part = {json_->get_string(object, "text"), true, true};
    return true;
  }

  bool next_warc(DocumentPart& part) {
    const std::string& name = warc_->window.name();
    for (WarcRecord record; warc_->reader.next(record);) {
      check_problems(name);
      const std::string media = media_type(record.content_type);
      if (record.type == "response" || (record.type == "resource" && is_html_type(media))) {
        fail(name, ": found a WARC archive of pages, expected text: run ./corpus clean or ",
             "./corpus extract first");
      }
      if (record.type != "conversion" || media != "text/plain") continue;
      part = {record.block, true, true};
      return true;
    }
    check_problems(name);
    return false;
  }

  void check_problems(const std::string& name) const {
    for (const auto& [problem, count] : warc_->problems) {
      fail(name, ": found a WARC archive with ", problem,
           ", expected a whole one: ./corpus clean survives damage");
    }
  }

  static std::unique_ptr<parquet::Reader> open_parquet(const Input& input,
                                                       const ByteSource& source) {
    require_mapped_parquet(input, source);
    auto reader = std::make_unique<parquet::Reader>(input.path);
    require(reader->has("text") && reader->is_text("text"), input.name,
            ": found no column \"text\" of strings");
    reader->select({"text"});
    return reader;
  }

  bool next_row(DocumentPart& part) {
    while (parquet_->next(row_)) {
      if (!row_[0]) continue;  // null
      part = {*row_[0], true, true};
      return true;
    }
    return false;
  }

 public:
  // A parquet file is read from its end, so it must be a file, and not compressed as a whole.
  static void require_mapped_parquet(const Input& input, const ByteSource& source) {
    const char* found = source.is_compressed()    ? "inside gzip or Zstandard"
                        : source.file_size() == 0 ? "that cannot be read from its end"
                                                  : nullptr;
    if (found) fail(input.name, ": found parquet ", found, ", expected a file");
  }

 private:
  std::vector<Input> inputs_;
  size_t input_ = 0;
  std::vector<char> buffer_;
  std::unique_ptr<ByteSource> text_;
  std::unique_ptr<JsonLines> json_;
  std::unique_ptr<Warc> warc_;
  std::unique_ptr<parquet::Reader> parquet_;
  std::vector<std::optional<std::string>> row_;
  size_t head_ = 0;  // bytes of buffer_ that open() has read
  bool at_start_ = false;
  int64_t records_ = 0;
};

// ---------------------------------------------------------------------------------------------
// Conversations: {"messages": [{"role", "content", "tool_calls"}, ...], "tools": [...]}. Calls and
// tools may be inside OpenAI's {"type": "function", "function": {...}}.

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
  if (e.get(value)) fail(where, ": found ", type_name(e), ", expected ", expected);
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

// The object inside OpenAI's {"type": "function", "function": {...}}, or the object itself.
inline simdjson::dom::element unwrap_function(simdjson::dom::element e, const std::string& where) {
  simdjson::dom::element inner;
  if (as_object(e, where).at_key("function").get(inner)) return e;
  as_object(inner, where + ": function");
  return inner;
}

inline ToolCall parse_call(simdjson::dom::element e, const std::string& where) {
  const simdjson::dom::object call = as_object(unwrap_function(e, where), where);
  const simdjson::dom::element arguments = member(call, "arguments", where);
  return {string_member(call, "name", where),
          arguments.is_string() ? string_member(call, "arguments", where) : python_json(arguments)};
}

// A list of messages. The order of roles is check_conversation's, in cake/chat_template.h.
inline std::vector<Message> parse_messages(simdjson::dom::element list, const std::string& where) {
  std::vector<Message> messages;
  for (const simdjson::dom::element item : as_array(list, where)) {
    const std::string place = concat(where, "[", messages.size(), "]");
    const simdjson::dom::object object = as_object(item, place);
    Message message{.role = string_member(object, "role", place)};
    simdjson::dom::element e;
    if (!object.at_key("tool_calls").get(e) && !e.is_null()) {
      for (const simdjson::dom::element call : as_array(e, place + ": tool_calls")) {
        message.tool_calls.push_back(
            parse_call(call, concat(place, ": tool_calls[", message.tool_calls.size(), "]")));
      }
    }
    const bool no_content = object.at_key("content").get(e) || e.is_null();
    if (!no_content || message.tool_calls.empty()) {
      message.content = string_member(object, "content", place);
    }
    messages.push_back(std::move(message));
  }
  return messages;
}

// A conversation's "tools", if it has any.
inline std::vector<std::string> parse_tools(simdjson::dom::object object,
                                            const std::string& where) {
  std::vector<std::string> tools;
  simdjson::dom::element list;
  if (object.at_key("tools").get(list) || list.is_null()) return tools;
  for (const simdjson::dom::element e : as_array(list, where + ": tools")) {
    tools.push_back(python_json(unwrap_function(e, concat(where, ": tools[", tools.size(), "]"))));
  }
  return tools;
}

// `where` is the file and line, for errors.
inline Conversation parse_conversation(simdjson::dom::object object, const std::string& where) {
  return {parse_messages(member(object, "messages", where), where + ": messages"),
          parse_tools(object, where)};
}

// ---------------------------------------------------------------------------------------------
// Preferences: several answers to one prompt and which is better, or one text and whether it is
// good.
//
//     {"prompt", "chosen", "rejected"}        two answers
//     {"prompt", "responses", "ranking"}      K answers, the rank of each: 1 best, equal is a tie
//     {"chosen", "rejected"}                  whole conversations, whose common beginning is the
//                                             prompt
//     {"text", "label"}                       label: true, 1, "pos", "good"; false, 0, "neg", "bad"
//
// Prompts and answers are strings or lists of messages. A string that answers messages is the
// assistant's message. If prompt and answers are strings, the prompt is a text and the answers
// continue it.

struct Preference {
  bool is_chat = false;
  std::string text;                           // the prompt, or the labelled text
  Conversation prompt;                        // of a chat
  std::vector<std::string> continuations;     // of a text
  std::vector<std::vector<Message>> answers;  // of a chat
  std::vector<int> ranking;                   // of each answer; 1 is the best
  std::optional<bool> label;                  // of the text
  double chance = 0;  // that labellers choose the first answer, if known (synthetic data); else 0
};

namespace preferences {
using simdjson::dom::element;
using simdjson::dom::object;

// A prompt or an answer as messages.
inline std::vector<Message> messages_of(element list, const std::string& where) {
  if (!list.is_array()) fail(where, ": found ", type_name(list), ", expected messages");
  std::vector<Message> messages = parse_messages(list, where + ": messages");
  if (messages.empty()) fail(where, ": found an empty list, expected messages");
  return messages;
}

// The answer to a chat is one or more messages, or a string; to a text it is a string.
inline void add_answer(Preference& p, element e, const std::string& where) {
  std::string_view text;
  if (!e.get(text)) {
    require(!strip_ascii(text).empty(), where, ": found nothing, expected an answer");
    if (p.is_chat) {
      p.answers.push_back({{"assistant", std::string(text), {}}});
    } else {
      p.continuations.emplace_back(text);
    }
    return;
  }
  if (!p.is_chat) {
    fail(where, ": found ", type_name(e), ", expected a string, as the prompt is");
  }
  p.answers.push_back(messages_of(e, where));
}

inline std::vector<int> parse_ranking(element e, size_t answers, const std::string& where) {
  std::vector<int> ranking;
  for (const element rank :
       element_as<simdjson::dom::array>(e, "a rank for each response", where)) {
    int64_t r = 0;
    if (rank.get(r) || r < 1 || r > 1 << 20) {
      fail(where, ": found ", std::string(simdjson::minify(rank)), ", expected ranks from 1 on");
    }
    ranking.push_back(int(r));
  }
  require(ranking.size() == answers, where, ": found ", ranking.size(), " ranks, expected ",
          answers, ", one for each response");
  return ranking;
}

inline bool parse_label(element e, const std::string& where) {
  const std::string json = simdjson::minify(e);
  for (const char* good : {"true", "1", R"("pos")", R"("positive")", R"("good")", R"("1")"})
    if (json == good) return true;
  for (const char* bad : {"false", "0", R"("neg")", R"("negative")", R"("bad")", R"("0")"})
    if (json == bad) return false;
  fail(where, ": found ", json, ", expected true or false");
}

// Splits two whole conversations: the messages that both begin with become the prompt.
inline void split_common_prompt(Preference& p, const std::string& where) {
  std::vector<Message>&a = p.answers[0], &b = p.answers[1];
  auto n = size_t(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
  if (n == a.size() && n == b.size()) return;  // equal answers: check_preference refuses them
  while (n > 0 && (n == a.size() || n == b.size() || a[n - 1].role == "assistant")) n--;
  if (n == 0) fail(where, ": found no message that both sides begin with, expected a prompt");
  p.prompt.messages.assign(a.begin(), a.begin() + long(n));
  a.erase(a.begin(), a.begin() + long(n));
  b.erase(b.begin(), b.begin() + long(n));
}

// Every answer must make a conversation with its prompt (check_conversation). Equal answers must
// have equal ranks.
inline void check_preference(const Preference& p, const std::string& where) {
  const size_t answers = p.ranking.size();
  if (answers < 2) fail(where, ": found ", answers, " answers, expected at least 2");
  for (size_t i = 0; i < answers; i++) {
    for (size_t j = 0; j < i; j++) {
      const bool equal =
          p.is_chat ? p.answers[i] == p.answers[j] : p.continuations[i] == p.continuations[j];
      require(!equal || p.ranking[i] == p.ranking[j], where,
              ": found the same answer twice, as number ", j + 1, " and ", i + 1,
              " with different ranks, expected different answers");
    }
    if (!p.is_chat) continue;
    Conversation whole = p.prompt;
    whole.messages.insert(whole.messages.end(), p.answers[i].begin(), p.answers[i].end());
    check_conversation(whole, concat(where, ": answer ", i + 1));
  }
}

// "prompt": a text, or a chat as a string or as messages.
inline void read_prompt(Preference& p, object from, bool pair, const std::string& where) {
  const element prompt = member(from, "prompt", where);
  std::string_view text;
  if (prompt.get(text)) {
    p.is_chat = true;
    p.prompt.messages = messages_of(prompt, where + ": prompt");
    return;
  }
  p.is_chat = pair && member(from, "chosen", where).is_array();
  if (p.is_chat) {  // a string that is answered by messages is the user's message
    p.prompt.messages = {{"user", std::string(text), {}}};
  } else {
    p.text = text;
  }
}

// "responses" and "ranking".
inline void read_responses(Preference& p, object from, const std::string& where) {
  size_t n = 0;
  for (const element e : as_array(member(from, "responses", where), where + ": responses")) {
    add_answer(p, e, concat(where, ": responses[", n++, "]"));
  }
  p.ranking = parse_ranking(member(from, "ranking", where), n, where + ": ranking");
}
}  // namespace preferences

// `where` is the file and line, for errors.
inline Preference parse_preference(simdjson::dom::object object, const std::string& where) {
  using namespace preferences;
  element e;
  const auto has = [&](const char* key) { return !object.at_key(key).get(e); };
  Preference p;
  if (has("text") && has("label")) {
    p.text = string_member(object, "text", where);
    if (p.text.empty()) fail(where, ": text: found nothing, expected text");
    p.label = parse_label(member(object, "label", where), where + ": label");
    return p;
  }
  const bool pair = has("chosen") && has("rejected");
  require(pair || (has("prompt") && has("responses") && has("ranking")), where,
          ": found neither \"chosen\" and \"rejected\", nor \"prompt\", \"responses\" and "
          "\"ranking\", nor \"text\" and \"label\"");
  const bool whole = pair && !has("prompt");
  p.is_chat = whole;
  if (!whole) read_prompt(p, object, pair, where);
  if (pair) {
    add_answer(p, member(object, "chosen", where), where + ": chosen");
    add_answer(p, member(object, "rejected", where), where + ": rejected");
    p.ranking = {1, 2};
    if (has("chance") && (e.get(p.chance) || !(p.chance >= 0 && p.chance <= 1))) {
      fail(where, ": chance: expected a number from 0 to 1");
    }
  } else {
    read_responses(p, object, where);
  }
  if (whole) split_common_prompt(p, where);
  if (p.is_chat) p.prompt.tools = parse_tools(object, where);
  check_preference(p, where);
  return p;
}

}  // namespace cake
