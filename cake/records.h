// Reading records: documents, conversations, preferences.
//
//     file or standard input --ByteSource--> bytes, decompressed --LineReader--> lines
//         --JsonLines--> JSON objects, or plain text in parts      --DocumentReader--> documents
//
// Everything is streamed: memory is bounded by one part of a plain text, or by the longest line.
// The name tells the kind of a file: .jsonl and .ndjson hold JSON lines, any other file is plain
// text and one document. The first bytes tell the compression: gzip (RFC 1952), Zstandard (RFC
// 8878) or none; a file named .gz or .zst must be compressed. "-" is standard input; it holds JSON
// lines if its first byte is '{'. Errors name the file, and the line in JSON lines.
#pragma once

#include <simdjson.h>
#include <zlib.h>
#include <zstd.h>

#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/chat_template.h"
#include "cake/run.h"

namespace cake {

struct Input {
  std::string path;  // to open; "-" is standard input
  std::string name;  // to show in errors
  Input(std::string path_and_name) : path(path_and_name), name(std::move(path_and_name)) {
    if (path == "-") name = "standard input";
  }
  Input(std::string path, std::string name) : path(std::move(path)), name(std::move(name)) {}
};

// ---------------------------------------------------------------------------------------------
// Bytes

struct CloseFile {
  void operator()(std::FILE* f) const {
    if (f != stdin) std::fclose(f);
  }
};

class ByteSource {
 public:
  explicit ByteSource(const Input& input) : name_(input.name) {
    std::error_code ec;
    if (input.path != "-" && std::filesystem::is_directory(input.path, ec)) {
      fail(name_, ": found a directory, expected a file");
    }
    file_.reset(input.path == "-" ? stdin : std::fopen(input.path.c_str(), "rb"));
    if (!file_) fail(name_, ": cannot open: ", errno_text());
    refill();
    start(input.path);
  }

  // Up to `n` bytes; fewer only at the end.
  size_t read(char* out, size_t n) {
    size_t done = 0;
    while (done < n) {
      const size_t got = inflate_ ? read_gzip(out + done, n - done)
                         : zstd_  ? read_zstd(out + done, n - done)
                                  : read_plain(out + done, n - done);
      if (got == 0) break;
      done += got;
    }
    return done;
  }

  const std::string& name() const { return name_; }

 private:
  struct EndInflate {
    void operator()(z_stream* z) const { inflateEnd(z), delete z; }
  };

  // Reads the next block; false at the end of the file.
  bool refill() {
    offset_ = 0;
    size_ = std::fread(in_.data(), 1, in_.size(), file_.get());
    if (std::ferror(file_.get())) fail(name_, ": cannot read: ", errno_text());
    return size_ > 0;
  }

  void start(const std::string& path) {
    const std::string_view head(in_.data(), size_);
    const std::string extension = std::filesystem::path(path).extension().string();
    if (head.starts_with("\x1f\x8b")) {
      inflate_.reset(new z_stream{});
      if (inflateInit2(inflate_.get(), 15 + 16) != Z_OK) fail(name_, ": cannot start gzip");
    } else if (head.starts_with("\x28\xb5\x2f\xfd")) {
      zstd_.reset(ZSTD_createDStream());
      ZSTD_DCtx_setParameter(zstd_.get(), ZSTD_d_windowLogMax, 31);  // files of --long=31 too
    } else if (extension == ".gz" || extension == ".zst") {
      fail(name_, ": found ", head.empty() ? "an empty file" : "other bytes", ", expected ",
           extension == ".gz" ? "gzip" : "Zstandard", " data");
    }
    const std::pair<std::string_view, const char*> others[] = {
        {"BZh", "bzip2 data"},      {"\xfd\x37zXZ", "xz data"}, {"PK\x03\x04", "a zip archive"},
        {"PAR1", "a Parquet file"}, {"%PDF-", "a PDF file"},    {"WARC/", "a WARC archive"},
        {"\x7f\x45LF", "a program"}};
    for (const auto& [magic, what] : others) {
      require(!head.starts_with(magic), name_, ": found ", what,
              ", expected text, JSON lines, .gz or .zst");
    }
  }

  size_t read_plain(char* out, size_t n) {
    if (offset_ == size_ && !refill()) return 0;
    const size_t got = std::min(n, size_ - offset_);
    std::memcpy(out, in_.data() + offset_, got);
    offset_ += got;
    return got;
  }

  size_t read_gzip(char* out, size_t n) {  // a file may hold several gzip members
    n = std::min(n, size_t(1) << 30);
    inflate_->next_out = reinterpret_cast<Bytef*>(out);
    inflate_->avail_out = uInt(n);
    while (inflate_->avail_out == n) {
      if (offset_ == size_ && !refill()) {
        if (in_frame_) fail(name_, ": the gzip data ends too early: the file is truncated");
        return 0;
      }
      if (!in_frame_) inflateReset(inflate_.get());
      in_frame_ = true;
      inflate_->next_in = reinterpret_cast<Bytef*>(in_.data() + offset_);
      inflate_->avail_in = uInt(size_ - offset_);
      const int status = inflate(inflate_.get(), Z_NO_FLUSH);
      offset_ = size_ - inflate_->avail_in;
      if (status == Z_STREAM_END) {
        in_frame_ = false;
      } else if (status != Z_OK && status != Z_BUF_ERROR) {
        fail(name_, ": damaged gzip data: ", inflate_->msg ? inflate_->msg : "no reason given");
      }
    }
    return n - inflate_->avail_out;
  }

  size_t read_zstd(char* out, size_t n) {
    ZSTD_outBuffer target{out, n, 0};
    while (target.pos == 0) {
      // After a full output the decoder may still hold decompressed bytes: call it before reading
      // on.
      if (offset_ == size_ && !zstd_full_ && !refill()) {
        if (in_frame_) fail(name_, ": the Zstandard data ends too early: the file is truncated");
        return 0;
      }
      ZSTD_inBuffer source{in_.data(), size_, offset_};
      const size_t left = ZSTD_decompressStream(zstd_.get(), &target, &source);
      offset_ = source.pos;
      if (ZSTD_isError(left)) fail(name_, ": damaged Zstandard data: ", ZSTD_getErrorName(left));
      in_frame_ = left != 0;
      zstd_full_ = target.pos == n && in_frame_;
    }
    return target.pos;
  }

  std::string name_;
  std::unique_ptr<std::FILE, CloseFile> file_;
  std::vector<char> in_ = std::vector<char>(1 << 18);
  size_t offset_ = 0, size_ = 0;  // in_ holds size_ bytes, read up to offset_
  std::unique_ptr<z_stream, EndInflate> inflate_;
  std::unique_ptr<ZSTD_DStream, decltype(&ZSTD_freeDStream)> zstd_{nullptr, ZSTD_freeDStream};
  bool in_frame_ = false, zstd_full_ = false;
};

// Standard input copied to an unnamed temporary file, so that it can be read twice.
class SpooledInput {
 public:
  explicit SpooledInput(Input& input) {
    if (input.path != "-") return;
    file_.reset(std::tmpfile());
    if (!file_) fail("standard input: cannot create a temporary file: ", errno_text());
    std::vector<char> block(1 << 18);
    bool good = true;
    for (size_t n; good && (n = std::fread(block.data(), 1, block.size(), stdin)) > 0;) {
      good = std::fwrite(block.data(), 1, n, file_.get()) == n;
    }
    if (!good || std::fflush(file_.get()) != 0) {
      fail("standard input: cannot write a temporary file: ", errno_text());
    }
    input.path = concat("/proc/self/fd/", fileno(file_.get()));
    input.name = "standard input";
  }

 private:
  std::unique_ptr<std::FILE, CloseFile> file_;
};

// ---------------------------------------------------------------------------------------------
// Lines and JSON lines

class LineReader {
 public:
  explicit LineReader(const Input& input) : source_(input) {}
  LineReader(ByteSource source, std::string_view head)  // `head` has been read from it
      : source_(std::move(source)), buffer_(head.size() + 2 * kBlock), end_(head.size()) {
    std::copy(head.begin(), head.end(), buffer_.begin());
  }

  // The next line, without its \n or \r\n. It is valid until the next call, and SIMDJSON_PADDING
  // bytes behind it are readable.
  bool next(std::string_view& line) {
    for (size_t searched = begin_;;) {
      const char* newline =
          static_cast<const char*>(std::memchr(buffer_.data() + searched, '\n', end_ - searched));
      if (newline || (ended_ && begin_ < end_)) {
        const size_t stop = newline ? size_t(newline - buffer_.data()) : end_;
        line = std::string_view(buffer_.data() + begin_, stop - begin_);
        if (line.ends_with('\r')) line.remove_suffix(1);
        begin_ = newline ? stop + 1 : stop;
        number_++;
        return true;
      }
      if (ended_) return false;
      searched = end_ - begin_;
      fill();
    }
  }
  int64_t number() const { return number_; }  // of the line returned last, from 1
  std::string where() const { return concat(source_.name(), ":", number_); }
  const std::string& name() const { return source_.name(); }

 private:
  void fill() {  // moves the unfinished line to the front and reads behind it
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_, begin_ = 0;
    if (buffer_.size() - end_ < kBlock + simdjson::SIMDJSON_PADDING) {
      buffer_.resize(2 * buffer_.size());
    }
    const size_t room = buffer_.size() - end_ - simdjson::SIMDJSON_PADDING;
    const size_t got = source_.read(buffer_.data() + end_, room);
    end_ += got;
    ended_ = got < room;
  }

  static constexpr size_t kBlock = 1 << 20;
  ByteSource source_;
  std::vector<char> buffer_ = std::vector<char>(2 * kBlock);
  size_t begin_ = 0, end_ = 0;  // unread bytes of buffer_
  bool ended_ = false;
  int64_t number_ = 0;
};

inline const char* type_name(simdjson::dom::element e) {
  return e.is_array()    ? "an array"
         : e.is_object() ? "an object"
         : e.is_string() ? "a string"
         : e.is_bool()   ? "true or false"
         : e.is_null()   ? "null"
                         : "a number";
}

class JsonLines {
 public:
  explicit JsonLines(const Input& input) : lines_(input) {}
  explicit JsonLines(LineReader lines) : lines_(std::move(lines)) {}

  // The next object, valid until the next call. Blank lines are skipped.
  bool next(simdjson::dom::object& object) {
    for (std::string_view line; lines_.next(line);) {
      if (lines_.number() == 1 && line.substr(0, 3) == "\xef\xbb\xbf") line.remove_prefix(3);
      if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
      simdjson::dom::element element;
      auto error = parser_.parse(line.data(), line.size(), false).get(element);
      if (error) fail(where(), ": not JSON: ", simdjson::error_message(error));
      if (element.get(object) != simdjson::SUCCESS) {
        fail(where(), ": found ", type_name(element), ", expected an object");
      }
      return true;
    }
    return false;
  }

  // A member that must be there and a string.
  std::string_view get_string(simdjson::dom::object object, std::string_view key) const {
    simdjson::dom::element value;
    if (object.at_key(key).get(value)) fail(where(), ": \"", key, "\" is missing");
    std::string_view text;
    if (value.get(text)) {
      fail(where(), ": \"", key, "\": found ", type_name(value), ", expected a string");
    }
    return text;
  }

  std::string where() const { return lines_.where(); }
  const std::string& name() const { return lines_.name(); }

 private:
  LineReader lines_;
  simdjson::dom::parser parser_;
};

// ---------------------------------------------------------------------------------------------
// Documents

struct DocumentPart {
  std::string_view text;  // bytes, cut anywhere when a document has several parts
  bool begins = false, ends = false;
};

class DocumentReader {
 public:
  explicit DocumentReader(std::vector<Input> inputs, size_t part_bytes = 1 << 22)
      : inputs_(std::move(inputs)), buffer_(part_bytes) {}

  // The next part of a document; a document from a JSON line has only one part. The part is valid
  // until the next call.
  bool next(DocumentPart& part) {
    for (;;) {
      if (!text_ && !json_) {
        if (input_ == inputs_.size()) return false;
        open(inputs_[input_++]);
      }
      if (text_) return next_text(part), true;
      if (next_json(part)) return true;
    }
  }

  // Skips the rest of a plain text's document.
  void skip_document() { text_.reset(); }

  static bool is_jsonl(const Input& input, std::string_view head) {
    if (input.name == "standard input") {
      const size_t begin = head.find_first_not_of(" \t\r\n\xef\xbb\xbf");
      return begin != std::string_view::npos && head[begin] == '{';
    }
    std::filesystem::path path = input.path;
    if (path.extension() == ".gz" || path.extension() == ".zst") path = path.stem();
    return path.extension() == ".jsonl" || path.extension() == ".ndjson";
  }

 private:
  void open(const Input& input) {
    ByteSource source(input);
    head_ = source.read(buffer_.data(), buffer_.size());
    const std::string_view head(buffer_.data(), head_);
    if (head.empty()) fail(input.name, ": found an empty file, expected text");
    if (is_jsonl(input, head)) {
      json_ = std::make_unique<JsonLines>(LineReader(std::move(source), head));
      records_ = 0;
    } else {
      check_text(head, input.name);
      text_ = std::make_unique<ByteSource>(std::move(source));
      at_start_ = true;
    }
  }

  static void check_text(std::string_view head, const std::string& name) {
    // Text has at most a stray NUL byte. Programs, images and UTF-16 have many.
    const std::string_view sample = head.substr(0, 1 << 16);
    const size_t nuls = size_t(std::count(sample.begin(), sample.end(), '\0'));
    require(nuls * 1000 <= sample.size(), name, ": found ", nuls, " NUL bytes in the first ",
            sample.size(), ": binary data, expected text in UTF-8");
  }

  void next_text(DocumentPart& part) {
    const size_t got = at_start_ ? head_ : text_->read(buffer_.data(), buffer_.size());
    part = {{buffer_.data(), got}, std::exchange(at_start_, false), got < buffer_.size()};
    if (part.ends) text_.reset();
  }

  bool next_json(DocumentPart& part) {
    simdjson::dom::object object;
    if (json_->next(object)) {
      part = {json_->get_string(object, "text"), true, true};
      records_++;
      return true;
    }
    if (records_ == 0) fail(json_->name(), ": found no documents, expected JSON lines");
    json_.reset();
    return false;
  }

  std::vector<Input> inputs_;
  size_t input_ = 0;
  std::vector<char> buffer_;
  std::unique_ptr<ByteSource> text_;
  std::unique_ptr<JsonLines> json_;
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
