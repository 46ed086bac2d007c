// Reading documents: the texts that a tokenizer or a model is trained on.
//
//     files --DocumentReader--> documents, or parts of long ones
//
// A document is a record's "text" (cake/records.h: JSON lines, a JSON array, parquet), a page's
// text in a WET file, or a plain text. Lines that hold <|endoftext|> and nothing else divide a
// plain text into documents; elsewhere in a line it is text. Plain text may come from any editor:
// it is read as UTF-8 without a byte order mark, and where all its lines end with \r\n or all with
// \r, they end with a line feed (cake/bytes.h, begin_text). Pages themselves are for ./corpus.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/bytes.h"
#include "cake/parquet.h"
#include "cake/parquet_rows.h"
#include "cake/records.h"
#include "cake/run.h"
#include "cake/warc.h"

namespace cake {

inline constexpr std::string_view kDivider = "<|endoftext|>";

struct DocumentPart {
  std::string_view text;  // bytes, cut anywhere when a document has several parts
  bool begins = false, ends = false;
};

struct JsonBlock {  // lines of a file
  std::string_view lines;
  int64_t number = 0;  // of the first one
  std::string file;
};

// ---------------------------------------------------------------------------------------------
// Plain text

// The longest line that is a divider is shorter: 64 blanks may stand on each side.
inline constexpr size_t kMaxDividerLine = 256;

struct DividerLine {
  size_t begin, end;  // with its line break
  bool is_found;      // the line holds <|endoftext|> and blanks
  bool is_cut;        // that cannot be told yet
};

// The next <|endoftext|> from `begin` on; npos: there is none. memchr looks for the rare |.
inline size_t find_end_of_text(std::string_view text, size_t begin) {
  for (size_t i = begin + 1; (i = text.find('|', i)) != std::string_view::npos; i++) {
    if (text.substr(i - 1, kDivider.size()) == kDivider) return i - 1;
  }
  return std::string_view::npos;
}

// The line around the <|endoftext|> at `found`. `begins_line`: the text does; `is_all`: nothing
// follows it.
inline DividerLine divider_line(std::string_view text, size_t found, bool begins_line,
                                bool is_all) {
  constexpr size_t kMaxBlanks = 64;
  const auto is_blank = [](char c) { return c == ' ' || c == '\t' || c == '\r'; };
  const size_t behind = found + kDivider.size();
  size_t begin = found, end = behind;
  while (begin > 0 && found - begin <= kMaxBlanks && is_blank(text[begin - 1])) begin--;
  while (end < text.size() && end - behind <= kMaxBlanks && is_blank(text[end])) end++;
  const bool begins = (begin > 0 ? text[begin - 1] == '\n' : begins_line) &&
                      found - begin <= kMaxBlanks && end - behind <= kMaxBlanks;
  const bool ends = end < text.size() ? text[end] == '\n' : is_all;
  return {begin, std::min(text.size(), end + 1), begins && ends,
          begins && end == text.size() && !is_all};
}

// The documents of a text, in parts. A document's first part holds `part_bytes` of it, 1024 or
// more, or all.
class TextDocuments {
 public:
  TextDocuments(ByteWindow window, size_t part_bytes)
      : window_(std::move(window)), part_bytes_(part_bytes) {
    window_.begin_text();
  }

  // False at the end. Documents of white space are left out where the text has dividers. The line
  // break before a divider belongs to it, and so does the last one of a divided text.
  bool next(DocumentPart& part) {
    for (;;) {
      fill();
      const std::string_view text = std::string_view(text_).substr(offset_);
      if (text.empty() && !is_open_) return false;
      const Divider divider = find_divider(text);
      const bool is_last = divider.end == text.size() && is_all_;
      part = {text.substr(0, divider.begin), !is_open_, divider.is_found || is_last};
      has_dividers_ |= divider.is_found;
      if (is_last && !divider.is_found && has_dividers_ && part.text.ends_with('\n')) {
        part.text.remove_suffix(1);
      }
      offset_ += divider.end;
      begins_line_ = divider.is_found;  // otherwise a part ends inside a line, or before its end
      is_open_ = !part.ends;
      const bool is_blank = part.begins && part.ends && strip_ascii(part.text).empty();
      if (!is_blank || !has_dividers_) return true;
    }
  }

  // How often <|endoftext|> stood inside a line, where it is text.
  int64_t inside_lines() const { return inside_lines_; }
  const std::string& name() const { return window_.name(); }

 private:
  struct Divider {
    size_t begin, end;  // of its line, with the line breaks before and behind it
    bool is_found;      // false: the part that can be given out ends here
  };

  // So that text_ holds a part and a line behind offset_, or all that is left.
  void fill() {
    if (is_all_ || text_.size() - offset_ >= part_bytes_ + kMaxDividerLine) return;
    text_.erase(0, offset_);
    offset_ = 0;
    while (!is_all_ && text_.size() < 4 * part_bytes_) {
      const std::string_view bytes = window_.need(part_bytes_);
      is_all_ = bytes.empty();
      window_.has_crlf() ? line_ends_.append(bytes, text_) : void(text_.append(bytes));
      window_.consume(bytes.size());
    }
  }

  // The first divider, or where the text can be cut: not inside a line that may be one, and before
  // the line break that belongs to it.
  Divider find_divider(std::string_view text) {
    size_t limit = text.size();
    if (limit > part_bytes_) {
      const size_t newline = text.substr(0, part_bytes_).rfind('\n');
      const bool is_near =
          newline != std::string_view::npos && newline + kMaxDividerLine > part_bytes_;
      limit = is_near ? newline : part_bytes_;
    }
    int64_t inside = 0;
    for (size_t begin = 0; (begin = find_end_of_text(text, begin)) < limit;) {
      const DividerLine line = divider_line(text, begin, begins_line_, is_all_);
      if (line.is_found) {
        inside_lines_ += inside;
        return {line.begin - (line.begin > 0), line.end, true};
      }
      if (begin + kDivider.size() > limit) {
        limit = begin;
        break;
      }
      inside++;
      begin += kDivider.size();
    }
    inside_lines_ += inside;
    return {limit, limit, false};
  }

  ByteWindow window_;
  LineEnds line_ends_;
  const size_t part_bytes_;
  std::string text_;
  size_t offset_ = 0;        // text_ was given out to here
  bool is_all_ = false;      // text_ holds all that is left
  bool is_open_ = false;     // the last part did not end its document
  bool begins_line_ = true;  // the text at offset_ does
  bool has_dividers_ = false;
  int64_t inside_lines_ = 0;
};

// ---------------------------------------------------------------------------------------------
// Documents

// The text of a record; false: it has none.
inline bool document_text(simdjson::dom::element record, const FieldNames& names,
                          std::string_view& text) {
  simdjson::dom::object object;
  simdjson::dom::element value;
  return !record.get(object) && find_field(object, "text", names, value) && !value.get(text);
}

// Why it has none, with its place.
inline std::string document_problem(simdjson::dom::element record, const FieldNames& names,
                                    const std::string& where) {
  Record r{.where = where, .names = &names};
  if (record.get(r.object)) {
    return concat(where, ": found ", type_name(record), ", expected an object");
  }
  const auto mapped = names.find("text");
  const std::string key =
      mapped == names.end() ? "\"text\"" : concat("\"", mapped->second, "\" (--map text)");
  simdjson::dom::element value;
  if (r.find("text", value)) {
    return concat(where, ": ", key, ": found ", type_name(value), ", expected a string");
  }
  const std::string stage = stage_of(r);
  return concat(where, ": ", key, " is missing: found the keys ", r.keys(),
                stage.empty() ? "" : " (" + stage + ")", " (--map text=KEY reads the key KEY)");
}

class DocumentReader {
 public:
  explicit DocumentReader(std::vector<Input> inputs, RecordOptions options = {},
                          size_t part_bytes = 1 << 22)
      : inputs_(std::move(inputs)), options_(std::move(options)), part_bytes_(part_bytes) {
    const auto key = options_.names.find("text");
    text_key_ = key == options_.names.end() ? "text" : key->second;
    for (const auto& [field, mapped] : options_.names) {
      require(field == "text", "--map ", field, "=", mapped, ": found a field ", json_text(field),
              ", expected text: documents have no other");
    }
  }

  // The next part of a document; only a document of plain text has several. The part is valid until
  // the next call.
  bool next(DocumentPart& part) {
    while (open()) {
      const bool found = text_     ? text_->next(part)
                         : json_   ? next_json(part)
                         : warc_   ? next_warc(part)
                         : column_ ? next_of_column(part)
                                   : next_row(part);
      if (found) return documents_ += part.ends, true;
      close();
    }
    return false;
  }

  // If the next documents are JSON lines: about `bytes` bytes of whole lines, unparsed, so that
  // threads can parse them. They are valid until the next call. Otherwise false.
  bool next_json_lines(JsonBlock& block, size_t bytes) {
    while (open()) {
      if (!json_ || !json_->has_lines()) return false;
      if (json_->next_lines(block.lines, bytes, block.number)) {
        block.file = json_->name();
        documents_ += block.lines.find_first_not_of(" \t\r\n") != std::string_view::npos;
        return true;
      }
      close();
    }
    return false;
  }

  // Passes the rest of a plain text's document.
  void skip_document() {
    for (DocumentPart part; text_ && text_->next(part);)
      if (part.ends) break;
  }

  const RecordOptions& options() const { return options_; }
  const LeftOut& left_out() const { return left_out_; }  // with --bad-lines skip

  // A line for the output on <|endoftext|> inside lines of plain text; "": there was none, or the
  // names of special tokens are `specials` in a text.
  std::string divider_note(bool specials) const {
    if (dividers_inside_ == 0 || specials) return "";
    return concat("note: found ", kDivider, " inside lines, ", count_text(double(dividers_inside_)),
                  dividers_inside_ == 1 ? " time in " : " times, first in ", dividers_file_,
                  ": it is text there; on a line of its own it divides documents\n");
  }

 private:
  struct Warc {
    explicit Warc(ByteWindow w) : window(std::move(w)) {}
    ByteWindow window;
    ProblemCounts problems;
    WarcReader reader{window, size_t(1) << 30, problems};
  };

  // Opens the next file, unless one is open; false: there is none.
  bool open() {
    if (text_ || json_ || warc_ || column_ || rows_) return true;
    if (input_ == inputs_.size()) return false;
    const Input& input = inputs_[input_++];
    ByteWindow window(ByteSource(input, {.any_kind = true}));
    const std::string_view head = window.need(1 << 16);
    if (head.empty()) fail(input.name, ": found an empty file, expected text");
    documents_ = left_out_here_ = 0;
    switch (file_kind(input, head, {text_key_.substr(0, text_key_.find('.'))})) {
      case FileKind::warc:
        warc_ = std::make_unique<Warc>(std::move(window));
        break;
      case FileKind::parquet:
        open_parquet(input, window.source());
        break;
      case FileKind::html:
        fail(input.name, ": found a page of HTML, expected text: run ./corpus clean or ./corpus ",
             "extract first");
      case FileKind::json:
        json_ = std::make_unique<JsonValues>(std::move(window), options_.mapped_keys());
        break;
      case FileKind::text:
        require_text(head, input.name);
        text_ = std::make_unique<TextDocuments>(std::move(window), part_bytes_);
    }
    return true;
  }

  void close() {
    const std::string& name = inputs_[input_ - 1].name;
    if (documents_ == 0) fail_without_documents(name);
    if (text_ && text_->inside_lines() > 0) {
      if (dividers_inside_ == 0) dividers_file_ = name;
      dividers_inside_ += text_->inside_lines();
    }
    text_.reset(), json_.reset(), warc_.reset(), column_.reset(), rows_.reset();
  }

  void fail_without_documents(const std::string& name) const {
    if (warc_) {
      fail(name, ": found a WARC archive without text, expected conversion records, as WET files ",
           "have: run ./corpus clean or ./corpus extract on pages first");
    }
    if (left_out_here_ > 0) fail(name, ": found no document to use: ", left_out_.summary());
    fail(name, ": found no documents, expected ",
         json_   ? "JSON lines"
         : text_ ? "text"
                 : "rows with a text");
  }

  // Counts a record that cannot be read; rethrows where that is to end the run.
  void leave_out(const RecordError& error) {
    if (!options_.skip_bad_lines) throw error;
    left_out_.add("bad line", error.what());
    left_out_here_++;
  }

  bool next_json(DocumentPart& part) {
    for (simdjson::dom::element value;;) {
      try {
        if (!json_->next(value)) return false;
        part = {text_of_value(value, json_->where()), true, true};
        return true;
      } catch (const RecordError& e) {
        leave_out(e);
      }
    }
  }

  std::string_view text_of_value(simdjson::dom::element value, const std::string& where) const {
    std::string_view text;
    if (document_text(value, options_.names, text)) return text;
    throw RecordError(document_problem(value, options_.names, where));
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

  // A column of strings is read alone; a text inside other columns from the rows as JSON.
  void open_parquet(const Input& input, const ByteSource& source) {
    require_mapped_parquet(input, source);
    column_ = std::make_unique<parquet::Reader>(input.path);
    if (column_->has(text_key_) && column_->is_text(text_key_)) return column_->select({text_key_});
    const std::string top = text_key_.substr(0, text_key_.find('.'));
    require(column_->has(top) && top != text_key_, input.name, ": found no column ",
            json_text(text_key_),
            " of strings, expected one (--map text=KEY reads the column KEY)");
    column_.reset();
    rows_ = std::make_unique<parquet::JsonRows>(input.path);
    rows_->select({top});
  }

  bool next_of_column(DocumentPart& part) {
    while (column_->next(columns_)) {
      if (!columns_[0]) continue;  // null
      part = {*columns_[0], true, true};
      return true;
    }
    return false;
  }

  bool next_row(DocumentPart& part) {
    while (rows_->next(row_)) {
      const std::string where = concat(inputs_[input_ - 1].name, ": row ", rows_->row());
      simdjson::dom::element row;
      try {
        const auto error = parse_and_repair(row_, parser_, row);
        if (error) throw RecordError(concat(where, ": ", json_problem(error)));
        part = {text_of_value(row, where), true, true};
        return true;
      } catch (const RecordError& e) {
        leave_out(e);
      }
    }
    return false;
  }

  std::vector<Input> inputs_;
  RecordOptions options_;
  const size_t part_bytes_;
  std::string text_key_;
  size_t input_ = 0;
  std::unique_ptr<TextDocuments> text_;
  std::unique_ptr<JsonValues> json_;
  std::unique_ptr<Warc> warc_;
  std::unique_ptr<parquet::Reader> column_;
  std::vector<std::optional<std::string>> columns_;
  std::unique_ptr<parquet::JsonRows> rows_;
  std::string row_;
  simdjson::dom::parser parser_;
  int64_t documents_ = 0, left_out_here_ = 0;  // of this file
  LeftOut left_out_;
  int64_t dividers_inside_ = 0;
  std::string dividers_file_;  // the first one
};

}  // namespace cake
