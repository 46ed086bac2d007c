// Raw pages: records of WARC and WET files, HTML files, parquet, JSON lines and plain text, as
// UTF-8.
//
//     arguments --expand_inputs--> files --PageReader--> pages
//
// PageReader tells the kind of a file by the first bytes of its decompressed content and, where
// they do not tell, by its name (cake/records.h, file_kind). Each kind has one function that reads
// the next record from the window on the stream (cake/bytes.h) or from a parquet file's rows.
// Nothing a file may hold is an error, but for a kind that cannot be read at all: what is damaged,
// too long or of no use is counted under a name in problems() and skipped. What was skipped because
// it is no page has a name that begins with "skipped: ".
//
// Resume. The place behind a record decides everything that follows, so a reader that begins at
// entry() gives the same pages and counts as one that reads on.
#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/bytes.h"
#include "cake/charset.h"
#include "cake/documents.h"
#include "cake/json.h"
#include "cake/records.h"
#include "cake/warc.h"

namespace cake {

// Where a document is: its input's number on the command line (folders expanded), and the offset
// of its record: of its first byte in the decompressed stream; in parquet the row's number.
struct Place {
  uint32_t input = 0;
  uint64_t offset = 0;
  auto operator<=>(const Place&) const = default;
};

struct Page {
  Place place;
  bool html = false;          // `text` is a page of HTML, to be extracted
  std::string text, url, id;  // UTF-8
  std::string rest;       // the other members of a JSON line, as written: "key":value,"key":value
  bool repaired = false;  // `text` had invalid UTF-8, now U+FFFD
};

struct PageOptions {
  std::string text_key = "text";  // of JSON lines and parquet; "html" is taken where it is absent
  bool drop_invalid = false;      // pages of invalid UTF-8 are dropped (else repaired)
  size_t max_page_bytes = size_t(64) << 20;  // longer ones are counted and skipped
};

// ---------------------------------------------------------------------------------------------
// Inputs

// The files that the arguments name: folders become their files, sorted by path. Each file is one
// input: documents are told apart by its number.
inline std::vector<Input> expand_inputs(const std::vector<std::string>& arguments) {
  namespace fs = std::filesystem;
  std::error_code ec;
  for (const std::string& argument : arguments) {
    const bool found = argument == "-" || fs::exists(argument, ec);
    if (!found) fail(argument.empty() ? "\"\"" : argument, ": not found");
  }
  std::vector<Input> inputs = expand_folders(arguments);
  std::map<std::string, std::string> names;  // by the path without links
  for (const Input& input : inputs) {
    const std::string real = input.path == "-" ? "-" : fs::canonical(input.path, ec).string();
    const auto [it, is_new] = names.insert({ec ? input.path : real, input.path});
    if (is_new) continue;
    fail(input.name, ": found the same input twice",
         it->second == input.path ? "" : concat(", first as ", it->second), ", expected each once");
  }
  return inputs;
}

// ---------------------------------------------------------------------------------------------
// The address a page of HTML gives for itself

// The value of an attribute in a tag; "" where it is absent.
inline std::string_view attribute_value(std::string_view tag, std::string_view name) {
  for (size_t i = 0; (i = tag.find(name, i)) != std::string_view::npos; i += name.size()) {
    const bool begins = i > 0 && std::strchr(" \t\r\n\"'/", tag[i - 1]);
    const size_t equals = tag.find_first_not_of(" \t\r\n", i + name.size());
    if (!begins || equals == std::string_view::npos || tag[equals] != '=') continue;
    const size_t begin = tag.find_first_not_of(" \t\r\n", equals + 1);
    if (begin == std::string_view::npos) return {};
    const bool quoted = tag[begin] == '"' || tag[begin] == '\'';
    const std::string_view rest = tag.substr(begin + quoted);
    return rest.substr(0, quoted ? rest.find(tag[begin]) : rest.find_first_of(" \t\r\n>"));
  }
  return {};
}

// Of <link rel="canonical">, else of og:url, in the first 256 KB; only whole addresses.
inline std::string page_address(std::string_view html) {
  html = html.substr(0, 1 << 18);
  const std::pair<std::string_view, std::string_view> places[] = {{"canonical", "href"},
                                                                  {"og:url", "content"}};
  for (const auto& [word, attribute] : places) {
    for (size_t i = 0; (i = html.find(word, i)) != std::string_view::npos; i += word.size()) {
      const size_t open = html.rfind('<', i), close = html.find('>', i);
      if (open == std::string_view::npos || close == std::string_view::npos) continue;
      const std::string_view tag = html.substr(open, close - open);
      const std::string_view holder = word == "canonical" ? attribute_value(tag, "rel")
                                      : !attribute_value(tag, "property").empty()
                                          ? attribute_value(tag, "property")
                                          : attribute_value(tag, "name");
      const std::string_view url = attribute_value(tag, attribute);
      if (!equal_ignoring_case(holder, word)) continue;
      if (url.starts_with("http://") || url.starts_with("https://")) {
        std::string address(url);
        for (size_t a = 0; (a = address.find("&amp;", a)) != std::string::npos;) {
          address.erase(++a, 4);
        }
        return address;
      }
    }
  }
  return "";
}

// ---------------------------------------------------------------------------------------------
// Pages

class PageReader {
 public:
  PageReader(Input input, uint32_t number, PageOptions options = {}, Entry begin = {})
      : input_(std::move(input)),
        number_(number),
        options_(std::move(options)),
        window_(ByteSource(input_, {.any_kind = true, .survive = true})) {
    open(begin);
  }
  PageReader(const PageReader&) = delete;  // its parts refer to each other
  PageReader& operator=(const PageReader&) = delete;

  // False at the end. Damage is counted and skipped where one can go on.
  bool next(Page& page) {
    for (;;) {
      page.place = {number_, window_.offset()};
      page.html = page.repaired = false;
      page.text.clear(), page.url.clear(), page.id.clear(), page.rest.clear();
      const Found found = find(page);
      if (found == Found::end) return false;
      if (found == Found::nothing) continue;
      if (page.repaired && options_.drop_invalid) {
        problems_["invalid UTF-8, dropped"]++;
        continue;
      }
      return true;
    }
  }

  // For a later reader, which then begins with the next page.
  Entry entry() const { return rows_ ? Entry{row_, row_, row_} : window_.entry(); }

  // Share of the file's bytes that have been read.
  double progress() const {
    if (rows_) return rows_->rows() > 0 ? double(row_) / double(rows_->rows()) : 1;
    const ByteSource& source = window_.source();
    if (source.file_size() == 0) return 0;
    return std::min(1., double(source.compressed_offset()) / double(source.file_size()));
  }

  const ProblemCounts& problems() const { return problems_; }  // "truncated gzip data": 1, ...

 private:
  enum class Found { page, nothing, end };  // nothing: a record that is no page, or was counted

  void open(const Entry& begin) {
    const std::string_view head = window_.need(kHead);
    kind_ = file_kind(input_, head, {options_.text_key, "text", "html"});
    if (kind_ == FileKind::parquet) return open_parquet(begin);
    if (kind_ == FileKind::warc) resume_prefix_ = "WARC/";
    if (kind_ == FileKind::json) open_json(begin);
    if (kind_ == FileKind::text) {
      whole_file_ = utf16_charset(head) != nullptr;
      const char* binary = binary_kind(head);
      is_binary_ = binary || (!whole_file_ && binary_nuls(head) > 0);
      if (begin.next == 0 && is_binary_) {
        problems_[concat("skipped: ", binary ? binary : "binary data")]++;
      }
    }
    const bool is_empty = window_.bytes().empty() && window_.offset() == 0;
    if (begin.next == 0 && is_empty && !window_.source().damage()) problems_["empty file"]++;
    if (begin.compressed > 0) window_.seek(begin);
    while (window_.offset() < begin.next) {  // what was counted before is not counted again
      window_.skip(begin.next - window_.offset());
      if (window_.offset() == begin.next || !window_.pass_damage(resume_prefix_)) break;
    }
  }

  Found find(Page& page) {
    if (rows_) return find_row(page);
    if (is_binary_) return Found::end;
    switch (kind_) {
      case FileKind::warc:
        return find_warc(page);
      case FileKind::json:
        return layout_ == JsonLayout::lines ? find_json_line(page) : find_json_value(page);
      case FileKind::html:
        return find_html(page);
      default:
        return whole_file_ ? find_whole_text(page) : find_text(page);
    }
  }

  // At the end of a segment: `nothing` where another one follows.
  Found end_segment() {
    const char* damage = window_.pass_damage(resume_prefix_);
    if (!damage) return Found::end;
    problems_[damage]++;
    return Found::nothing;
  }

  Found count(const char* problem) {
    problems_[problem]++;
    return Found::nothing;
  }

  // Text of bytes in any charset.
  Found take_text(Page& page, std::string_view bytes, std::string_view charset) {
    page.repaired = decode_text(bytes, charset, page.html, page.text);
    if (page.text.size() > options_.max_page_bytes) return count(kTooLong);
    return Found::page;
  }

  // ------------------------------------------------------------------------------ WARC and WET

  Found find_warc(Page& page) {
    if (!warc_) warc_.emplace(window_, options_.max_page_bytes, problems_);
    if (!warc_->next(record_)) return Found::end;
    page.place.offset = record_.offset;
    const std::string& type = record_.type;
    std::string_view content = record_.block;
    std::string content_type = record_.content_type;
    if (type == "response") {
      read_http(record_.block, options_.max_page_bytes, http_);
      if (http_.problem) return count(http_.problem);
      content = http_.body;
      content_type = http_.content_type;
    } else if (type != "conversion" && type != "resource") {
      for (const char* known : {"warcinfo", "request", "metadata", "revisit", "continuation"}) {
        if (type == known) return count(concat("skipped: WARC record of type ", known).c_str());
      }
      return count("skipped: WARC record of another type");
    }
    // What the crawler found in the payload is worth more than what the server said.
    std::string media =
        record_.payload_type.empty() ? media_type(content_type) : record_.payload_type;
    if (media.empty() && begins_html(content.substr(0, kHead))) media = "text/html";
    page.html = is_html_type(media);
    if (!page.html && (type == "response" || media != "text/plain")) {
      return count("skipped: neither HTML nor text");
    }
    if (strip_ascii(content.substr(0, 4096)).empty() && strip_ascii(content).empty()) {
      return count("skipped: empty page");
    }
    page.url = record_.url;
    page.id = record_.id;
    make_utf8(page.url), make_utf8(page.id);
    return take_text(page, content, charset_parameter(content_type));
  }

  static void make_utf8(std::string& text) {
    if (is_utf8(text)) return;
    std::string repaired;
    repair_utf8(text, &repaired);
    text = std::move(repaired);
  }

  // ------------------------------------------------------------------------------ HTML and text

  // What is left of the file; false: it is too long, and skipped.
  bool take_rest(std::string_view& bytes) {
    bytes = window_.need(options_.max_page_bytes + 1);
    const bool good = bytes.size() <= options_.max_page_bytes;
    window_.consume(bytes.size());
    if (!good) window_.skip(UINT64_MAX);
    return good;
  }

  Found find_html(Page& page) {
    if (window_.need(1).empty()) return end_segment();
    if (window_.offset() > 0) return window_.skip(UINT64_MAX), Found::nothing;
    std::string_view bytes;
    if (!take_rest(bytes)) return count(kTooLong);
    page.html = true;
    const Found found = take_text(page, bytes, {});
    if (found == Found::page) page.url = page_address(page.text);
    return found;
  }

  Found find_whole_text(Page& page) {
    if (window_.need(1).empty()) return end_segment();
    std::string_view bytes;
    if (!take_rest(bytes)) return count(kTooLong);
    return take_text(page, bytes, {});
  }

  // A text's documents are divided by lines that hold <|endoftext|> and nothing else.
  Found find_text(Page& page) {
    bool too_long = false;  // then the document's beginning was consumed
    Divider divider;
    for (size_t searched = 0;;) {
      const std::string_view bytes = window_.bytes();
      divider = find_divider(bytes, searched, !too_long);
      if (divider.bytes > 0 || window_.ended()) break;
      if (divider.begin > options_.max_page_bytes + kMaxDividerLine) {
        too_long = true;  // the line's beginning stays: it tells whether it is a divider
        window_.consume(divider.begin - kMaxDividerLine);
        divider.begin = kMaxDividerLine;
      }
      searched = divider.begin;
      window_.need(window_.bytes().size() + 1);
    }
    std::string_view text = window_.bytes().substr(0, divider.begin);
    window_.consume(divider.begin + divider.bytes);
    if (divider.begin + divider.bytes == 0) return end_segment();
    if (too_long || text.size() > options_.max_page_bytes + 1) return count(kTooLong);
    if (text.ends_with('\n')) text.remove_suffix(1);
    if (text.ends_with('\r')) text.remove_suffix(1);
    if (strip_ascii(text).empty()) return Found::nothing;
    return take_text(page, text, {});
  }

  struct Divider {
    size_t begin = 0;
    size_t bytes = 0;  // with its line break. 0: there is none; one that is cut begins at `begin`
  };

  // The first divider in the window from `searched` on. `is_start`: the window begins a line.
  Divider find_divider(std::string_view bytes, size_t searched, bool is_start) const {
    while (searched + kDivider.size() <= bytes.size()) {
      const size_t begin = find_end_of_text(bytes, searched);
      if (begin == std::string_view::npos) break;
      const DividerLine line = divider_line(bytes, begin, is_start, window_.ended());
      if (line.is_cut) return {begin, 0};
      if (line.is_found) return {line.begin, line.end - line.begin};
      searched = begin + 1;
    }
    if (window_.ended()) return {bytes.size(), 0};
    return {std::max(searched, bytes.size() - std::min(bytes.size(), kDivider.size() - 1)), 0};
  }

  // ------------------------------------------------------------------------------ JSON

  void open_json(const Entry& begin) {
    resume_prefix_ = "{";
    window_.begin_text();
    size_t list_begin = 0;
    layout_ = json_layout(window_.need(kHead), window_.ended(), {}, &list_begin);
    if (layout_ == JsonLayout::none) layout_ = JsonLayout::lines;
    if (layout_ == JsonLayout::inside && begin.next == 0) window_.consume(list_begin);
  }

  Found find_json_line(Page& page) {
    std::string_view line;
    switch (read_line(window_, line, options_.max_page_bytes)) {
      case LineEnd::none:
        return end_segment();
      case LineEnd::cut:
        return Found::nothing;  // the damage is counted next
      case LineEnd::too_long:
        return count(kTooLong);
      case LineEnd::whole:
        break;
    }
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) return Found::nothing;
    return parse_page(page, line);
  }

  // An element of an array, or an object over several lines.
  Found find_json_value(Page& page) {
    const std::string_view between = layout_ == JsonLayout::values ? " \t\r\n,[]" : " \t\r\n,";
    for (;;) {
      const std::string_view bytes = window_.need(1);
      if (bytes.empty()) return end_segment();
      const size_t passed = std::min(bytes.find_first_not_of(between), bytes.size());
      window_.consume(passed);
      if (passed < bytes.size()) break;
    }
    page.place.offset = window_.offset();
    if (layout_ == JsonLayout::inside && window_.bytes()[0] == ']') {
      window_.skip(UINT64_MAX);
      return Found::nothing;
    }
    bool too_long = false;
    JsonScan scan;
    for (size_t bytes = 1;
         scan.scan(window_.need(bytes), window_.ended()) == JsonScan::Status::more;) {
      if (window_.ended()) {
        window_.consume(window_.bytes().size());
        return window_.source().damage() ? Found::nothing : count("not JSON");
      }
      if (window_.bytes().size() > options_.max_page_bytes) {
        too_long = true;
        window_.consume(scan.offset());
        scan.forget();
      }
      bytes = window_.bytes().size() + 1;
    }
    if (*scan.problem()) return pass_broken_value();
    const std::string_view json = window_.bytes().substr(0, scan.offset());
    window_.consume(json.size());
    if (too_long || json.size() > options_.max_page_bytes) return count(kTooLong);
    return parse_page(page, json);
  }

  // Goes to the next line that may begin an element of an array.
  Found pass_broken_value() {
    for (std::string_view line;;) {
      const LineEnd end = read_line(window_, line, options_.max_page_bytes);
      const std::string_view next = window_.need(kMaxIndent + 1);
      const size_t indent = next.find_first_not_of(" \t");
      if (end == LineEnd::none || (indent <= kMaxIndent && next[indent] == '{')) break;
    }
    return count("not JSON");
  }

  Found parse_page(Page& page, std::string_view json) {
    simdjson::dom::element element;
    const auto error = parse_and_repair(json, parser_, element, &repair_);
    page.repaired = repair_.has_new;
    simdjson::dom::object object;
    if (error == simdjson::DEPTH_ERROR) return count("JSON nested too deeply");
    if (error == simdjson::NUMBER_ERROR) return count("JSON number that cannot be read");
    if (error || element.get(object)) return count("not JSON");
    return take_members(page, repair_.text.empty() ? json : repair_.text, object);
  }

  // The text, url and id, which may be an integer; all else is kept as it is written.
  Found take_members(Page& page, std::string_view line, simdjson::dom::object object) {
    std::string_view text;
    page.html = object.at_key(options_.text_key).get(text) != simdjson::SUCCESS;
    if (page.html && object.at_key("html").get(text)) return count("no text");
    size_t others = 0;
    keys_.clear();
    for (const auto& [key, value] : object) {
      const bool is_text = key == options_.text_key || key == "text";
      keys_.push_back(is_text                      ? Key::text
                      : key == "html" && page.html ? Key::text
                      : key == "url"               ? Key::url
                      : key == "id"                ? Key::id
                                                   : Key::other);
      if (keys_.back() == Key::other || keys_.back() == Key::id) others++;
      std::string_view string;
      if (keys_.back() == Key::url && page.url.empty() && !value.get(string)) page.url = string;
      if (keys_.back() == Key::id && page.id.empty() && !value.get(string)) {
        page.id = string;
        others--;
      }
    }
    if (others > 0) split_members(line, members_);
    for (size_t i = 0; others > 0 && i < members_.size(); i++) {
      const RawMember& member = members_[i];
      if (keys_[i] == Key::id && page.id.empty() && member.value != "null") {
        page.id = member.value;
      }
      if (keys_[i] != Key::other) continue;
      if (!page.rest.empty()) page.rest += ',';
      page.rest.append(member.key).append(":");
      if (repair_.has_numbers) {
        repair_numbers(member.value, value_, true);
        page.rest += value_;
      } else {
        page.rest += member.value;
      }
    }
    if (text.size() > options_.max_page_bytes) return count(kTooLong);
    page.text.assign(text);
    return Found::page;
  }

  // ------------------------------------------------------------------------------ parquet
  // The columns of text, url and id, then those that go into `rest`.
  void open_parquet(const Entry& begin) {
    require_mapped_parquet(input_, window_.source());
    rows_ = std::make_unique<parquet::Reader>(input_.path);
    const auto is_text = [&](const std::string& name) {
      return rows_->has(name) && rows_->is_text(name);
    };
    for (const std::string& name : {options_.text_key, std::string("html")})
      if (is_text(name)) columns_.push_back(name);
    text_columns_ = columns_.size();
    require(text_columns_ > 0, input_.name, ": found no column \"", options_.text_key,
            "\" or \"html\" of strings");
    for (const std::string& name : rows_->columns()) {
      const bool is_new = std::find(columns_.begin(), columns_.end(), name) == columns_.end();
      if (is_new && (rows_->is_text(name) || rows_->is_integer(name))) columns_.push_back(name);
    }
    rows_->select(columns_);
    row_ = begin.next;
    if (row_ > 0) rows_->seek(int64_t(row_));
  }

  Found find_row(Page& page) {
    page.place.offset = row_;
    if (int64_t(row_) >= rows_->rows() || !rows_->next(values_)) return Found::end;
    row_++;
    size_t text = 0;
    while (text < text_columns_ && !values_[text]) text++;
    if (text == text_columns_) return count("null text");
    page.html = columns_[text] == "html" && options_.text_key != "html";
    for (size_t c = text_columns_; c < columns_.size(); c++) {
      const std::string& name = columns_[c];
      if (name == "url" || name == "id") {
        std::string& target = name == "url" ? page.url : page.id;
        if (values_[c]) target = *values_[c];
        make_utf8(target);
      } else if (name != "text") {
        append_member(page.rest, c);
      }
    }
    const std::string& bytes = *values_[text];
    if (bytes.size() > options_.max_page_bytes) return count(kTooLong);
    return take_text(page, bytes, {});
  }

  void append_member(std::string& rest, size_t column) {
    if (!rest.empty()) rest += ',';
    rest += Json(columns_[column]).dump(-1, ' ', false, Json::error_handler_t::replace) + ":";
    if (!values_[column]) {
      rest += "null";
    } else if (rows_->is_text(columns_[column])) {
      rest += Json(*values_[column]).dump(-1, ' ', false, Json::error_handler_t::replace);
    } else {
      rest += *values_[column];
    }
  }

  static constexpr size_t kHead = 1 << 16;
  static constexpr size_t kMaxIndent = 4;  // of an element of an array
  static constexpr const char* kTooLong = "page too long";
  enum class Key { text, url, id, other };

  Input input_;
  uint32_t number_;
  PageOptions options_;
  ByteWindow window_;
  FileKind kind_ = FileKind::text;
  bool is_binary_ = false, whole_file_ = false;
  std::string resume_prefix_;  // of the bytes with which reading goes on behind damage
  ProblemCounts problems_;

  std::optional<WarcReader> warc_;
  WarcRecord record_;
  HttpMessage http_;

  simdjson::dom::parser parser_;
  JsonLayout layout_ = JsonLayout::lines;
  JsonRepair repair_;
  std::string value_;
  std::vector<Key> keys_;
  std::vector<RawMember> members_;

  std::unique_ptr<parquet::Reader> rows_;
  uint64_t row_ = 0;
  std::vector<std::string> columns_;
  size_t text_columns_ = 0;  // of columns_, those that may hold the text
  std::vector<std::optional<std::string>> values_;
};

}  // namespace cake
