// Rows of a parquet file as JSON objects, with every column: nested ones too.
//
//     schema -> a tree of nodes -> for each row: down the tree, values of the columns -> JSON
//
// A parquet file stores a nested value as the columns of its leaves. Each entry of such a column
// has two levels (Melnik et al. 2010, "Dremel: Interactive Analysis of Web-Scale Datasets"):
//
//   definition level  how many of the optional and repeated nodes on the way from the root to the
//                     leaf are there. Less than the most: the value is null, or a node above it is,
//                     or a list above it is empty.
//   repetition level  at which of the repeated nodes on that way this entry begins another element.
//                     0: it begins a row.
//
// So a row is read by walking down the tree. At an optional node the definition level of the first
// leaf below says whether the node is null; at a list it says whether the list is empty, and the
// repetition level behind each element says whether another one follows. What is null or empty has
// one entry in each leaf below it.
//
// What becomes what:
//
//   group                         an object; null where it is absent
//   LIST, repeated field          an array, whatever form the writer chose (see make_list)
//   MAP                           an object; where the keys are groups, an array of objects
//   BOOLEAN, integers             true, false; digits, of unsigned types too
//   FLOAT, DOUBLE, FLOAT16        the shortest digits that read as the same number of that type;
//                                 null for NaN and infinities, which JSON does not have
//   DECIMAL                       its digits, all of them
//   DATE, TIME, TIMESTAMP, INT96  ISO 8601 text: "2026-01-31", "23:59:59.5", with "Z" where the
//   file
//                                 says that the time is in UTC
//   strings, ENUM, BSON, bytes    text; bytes that are not UTF-8 become U+FFFD
//   JSON                          the value that the text stands for; a string where it is no JSON
//   UUID                          text: "00112233-4455-6677-8899-aabbccddeeff"
//
// A column with anything else in it (INTERVAL, VARIANT, a codec or an encoding that is not read) is
// left out of the rows; JsonRows::left_out() names it and says why.
//
// The levels of a file are not trusted: the leaves of a node must agree on them.
#pragma once

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/json.h"
#include "cake/parquet.h"
#include "cake/run.h"

namespace cake::parquet {

inline constexpr int kMaxSchemaDepth = 100;
inline constexpr int kMaxEmbeddedDepth = 200;  // brackets in a value of type JSON
inline constexpr int64_t kMaxDecimalScale = 100;
inline constexpr int64_t kMaxDecimalBytes = 64;

// ---------------------------------------------------------------------------------------------
// Values as JSON

inline void append_padded(std::string& out, int64_t number, int digits) {
  const std::string text = std::to_string(number);
  if (int(text.size()) < digits) out.append(size_t(digits) - text.size(), '0');
  out += text;
}

// The date of a day since 1970-01-01 in the Gregorian calendar: "2026-01-31". Years outside of 0
// to 9999 have a sign, as ISO 8601 says.
// The algorithm: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
inline void append_date(std::string& out, int64_t days) {
  const int64_t z = days + 719468;  // since 0000-03-01
  const int64_t era = (z >= 0 ? z : z - 146096) / 146097;
  const int64_t day_of_era = z - era * 146097;
  const int64_t year_of_era =
      (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
  const int64_t day_of_year =
      day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
  const int64_t m = (5 * day_of_year + 2) / 153;  // from March
  const int64_t month = m < 10 ? m + 3 : m - 9;
  const int64_t year = year_of_era + era * 400 + (month <= 2);
  if (year < 0 || year > 9999) out += year < 0 ? '-' : '+';
  append_padded(out, year < 0 ? -year : year, 4);
  out += '-';
  append_padded(out, month, 2);
  out += '-';
  append_padded(out, day_of_year - (153 * m + 2) / 5 + 1, 2);
}

// A time of 10^-unit_digits seconds, 0 or more: "23:59:59.5". Zeros at the end are not written.
inline void append_time(std::string& out, uint64_t time, int unit_digits) {
  uint64_t second = 1;
  for (int i = 0; i < unit_digits; i++) second *= 10;
  const int64_t seconds = int64_t(time / second);
  append_padded(out, seconds / 3600, 2);
  out += ':';
  append_padded(out, seconds / 60 % 60, 2);
  out += ':';
  append_padded(out, seconds % 60, 2);
  if (time % second == 0) return;
  out += '.';
  append_padded(out, int64_t(time % second), unit_digits);
  while (out.back() == '0') out.pop_back();
}

// A time of 10^-unit_digits seconds since the begin of a day since 1970-01-01.
inline void append_timestamp(std::string& out, int64_t day, int64_t time, int unit_digits) {
  int64_t units_of_day = 86400;
  for (int i = 0; i < unit_digits; i++) units_of_day *= 10;
  day += time / units_of_day;
  time %= units_of_day;
  if (time < 0) day--, time += units_of_day;
  append_date(out, day);
  out += 'T';
  append_time(out, uint64_t(time), unit_digits);
}

// An integer of two's complement, highest byte first, with a decimal point before its last `scale`
// digits. Without a point, an integer beyond 18 digits ends in ".0": JSON readers refuse it
// otherwise.
inline void append_decimal(std::string& out, std::string_view bytes, int64_t scale) {
  // The magnitude in parts of 32 bits, highest first; divided by 10^9 until nothing is left of it.
  const bool negative = !bytes.empty() && (bytes[0] & 0x80);
  std::vector<uint32_t> parts((bytes.size() + 3) / 4);
  for (size_t i = 0; i < bytes.size(); i++) {
    const uint32_t byte = uint8_t(negative ? ~bytes[i] : bytes[i]);
    const size_t from_end = bytes.size() - 1 - i;
    parts[parts.size() - 1 - from_end / 4] |= byte << 8 * (from_end % 4);
  }
  for (size_t i = parts.size(); negative && i-- > 0;)
    if (++parts[i] != 0) break;
  std::string digits;  // lowest first
  for (size_t begin = 0; begin < parts.size();) {
    uint64_t rest = 0;
    for (size_t i = begin; i < parts.size(); i++) {
      rest = rest << 32 | parts[i];
      parts[i] = uint32_t(rest / 1000000000);
      rest %= 1000000000;
    }
    for (int i = 0; i < 9; i++, rest /= 10) digits += char('0' + rest % 10);
    while (begin < parts.size() && parts[begin] == 0) begin++;
  }
  while (!digits.empty() && digits.back() == '0') digits.pop_back();
  const bool zero = digits.empty();
  while (int64_t(digits.size()) <= scale) digits += '0';
  if (negative && !zero) out += '-';
  out.append(digits.rbegin(), digits.rend() - scale);
  if (scale > 0) (out += '.').append(digits.rend() - scale, digits.rend());
  if (scale == 0 && digits.size() > 18) out += ".0";
}

// The shortest digits that read as the same number; null for NaN and infinities.
template <class T>
void append_number(std::string& out, T x) {
  if (!std::isfinite(x)) {
    out += "null";
    return;
  }
  char digits[64];
  // A whole number beyond 2^53 is written with an exponent: JSON readers take it for an integer
  // otherwise, which may have more than 64 bits.
  const bool large = std::fabs(x) >= T(9007199254740992);
  const auto end = large ? std::to_chars(digits, digits + 64, x, std::chars_format::scientific)
                         : std::to_chars(digits, digits + 64, x);
  out.append(digits, end.ptr);
  if (x == 0 && std::signbit(x)) out += ".0";
}

inline float float_of_half(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                          : std::ldexp(float(mantissa + 1024), exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

inline void append_uuid(std::string& out, std::string_view bytes) {
  out += '"';
  for (size_t i = 0; i < bytes.size(); i++) {
    if (i == 4 || i == 6 || i == 8 || i == 10) out += '-';
    for (const int shift : {4, 0}) out += "0123456789abcdef"[uint8_t(bytes[i]) >> shift & 15];
  }
  out += '"';
}

// A text of type JSON: as it is, on one line; as a string where it is no JSON or too deep.
inline void append_embedded(std::string& out, std::string_view text) {
  int depth = 0, deepest = 0;
  for (const char c : text) {  // brackets in strings count too: that errs on the safe side
    if (c == '[' || c == '{') deepest = std::max(deepest, ++depth);
    if (c == ']' || c == '}') depth--;
  }
  if (deepest > kMaxEmbeddedDepth || !Json::accept(text)) return append_json_string(out, text);
  const size_t begin = out.size();
  out += text;
  for (size_t i = begin; i < out.size(); i++)  // in strings a line's end must be escaped
    if (out[i] == '\n' || out[i] == '\r') out[i] = ' ';
}

// ---------------------------------------------------------------------------------------------
// The schema as a tree

struct Node {
  enum Kind { leaf, object, list, map };
  Kind kind = leaf;
  std::string name;
  std::string key;             // the name as JSON, and ':'
  bool optional = false;       // null where an entry's level is less than `definition`
  int definition = 0;          // the level of what is there
  int item_definition = 0;     // of a list: the level of what has an element
  int item_repetition = 0;     // of a list: the level of another element
  size_t first_leaf = 0;       // among the selected leaves
  size_t leaves = 0;           // how many are below, or are this node
  std::vector<Node> children;  // of a list: its element; of a map: key and value
  SchemaElement element;       // of a leaf
  std::string refused;         // why nothing of this column can be read; "": it can
};

// Builds the tree of the columns, and the list of their leaves, each with its levels.
class TreeBuilder {
 public:
  explicit TreeBuilder(const Footer& footer) : schema_(footer.schema) {}

  struct NamedLeaf {
    std::string path;  // "messages.list.element.role"
    Leaf leaf;
  };

  // The columns; leaves() of each begin at its first_leaf.
  std::vector<Node> columns() {
    std::vector<Node> columns;
    next_ = 1;
    for (int64_t i = 0; i < schema_[0].children; i++) {
      refused_.clear();
      columns.push_back(make_field({}));
      columns.back().refused = refused_;
    }
    return columns;
  }
  const std::vector<NamedLeaf>& leaves() const { return leaves_; }

 private:
  struct Place {  // in the schema
    std::string path;
    int definition = 0, repetition = 0, depth = 0;
  };

  void refuse(const std::string& why) {
    if (refused_.empty()) refused_ = why;
  }

  // The next element of the schema with all that is below it, as a field of a group.
  Node make_field(const Place& parent) {
    const SchemaElement& e = schema_[next_];
    Place place{parent.path.empty() ? e.name : parent.path + "." + e.name, parent.definition,
                parent.repetition, parent.depth + 1};
    if (e.repetition == kRepeated) {  // a list without an annotation
      Node list = begin_list(place, false);
      list.name = e.name;
      list.children.push_back(make_content(e, place));
      return finish(std::move(list));
    }
    const bool optional = e.repetition == kOptional;
    place.definition += optional;
    Node node = make_content(e, place);
    node.optional = optional;
    return node;
  }

  // The node of an element that is there, whose own level `place` counts already.
  Node make_content(const SchemaElement& e, const Place& place) {
    next_++;
    Node node;
    node.name = e.name;
    node.definition = place.definition;
    node.first_leaf = leaves_.size();
    if (place.depth > kMaxSchemaDepth) {
      refuse(concat("found more than ", kMaxSchemaDepth, " levels of columns, expected fewer"));
      skip_below(e);
      return finish(std::move(node));
    }
    if (!e.is_group()) {
      make_leaf(e, place, node);
    } else if (e.meaning == kVariant) {
      refuse("found VARIANT, expected other types");
      skip_below(e);
    } else if (is_list_like(e, kList)) {
      make_list(e, place, node);
    } else if (is_list_like(e, kMap)) {
      make_map(e, place, node);
    } else {
      node.kind = Node::object;
      if (e.children == 0) refuse("found a group without fields, expected one or more");
      for (int64_t i = 0; i < e.children; i++) node.children.push_back(make_field(place));
    }
    return finish(std::move(node));
  }

  // A group that is annotated as a list or map, with one repeated child.
  bool is_list_like(const SchemaElement& e, int64_t meaning) const {
    return e.meaning == meaning && e.children == 1 && schema_[next_].repetition == kRepeated;
  }

  // The list's levels; `place` becomes that of an element.
  Node begin_list(Place& place, bool is_map) {
    Node list;
    list.kind = is_map ? Node::map : Node::list;
    list.definition = place.definition;
    list.first_leaf = leaves_.size();
    list.item_definition = ++place.definition;
    list.item_repetition = ++place.repetition;
    return list;
  }

  // Of today's three levels (the list, a repeated group, its one field) that field is the element;
  // of the older two levels the repeated field itself is. They are told apart as the format's
  // LogicalTypes.md says, section "Backward-compatibility rules".
  void make_list(const SchemaElement& e, Place place, Node& node) {
    const SchemaElement& repeated = schema_[next_];
    const bool two_levels = !repeated.is_group() || repeated.children != 1 ||
                            repeated.name == "array" || repeated.name == e.name + "_tuple" ||
                            schema_[next_ + 1].repetition == kRepeated ||
                            repeated.meaning == kList || repeated.meaning == kMap;
    node = begin_list(place, false);
    node.name = e.name;
    place.path += "." + repeated.name;
    place.depth++;
    if (two_levels) {
      node.children.push_back(make_content(repeated, place));
    } else {
      next_++;
      node.children.push_back(make_field(place));
    }
  }

  // A repeated group of a key and a value. Keys of other types than text are written in quotes.
  void make_map(const SchemaElement& e, Place place, Node& node) {
    const SchemaElement& repeated = schema_[next_];
    const bool is_map = repeated.is_group() && repeated.children == 2 &&
                        !schema_[next_ + 1].is_group() &&
                        schema_[next_ + 1].repetition != kRepeated;
    node = begin_list(place, is_map);
    node.name = e.name;
    place.path += "." + repeated.name;
    place.depth++;
    if (is_map) {
      next_++;
      node.children.push_back(make_field(place));
      node.children.push_back(make_field(place));
      Node& key = node.children[0];
      if (key.element.meaning == kJson) key.element.meaning = kString;
    } else {
      node.children.push_back(make_content(repeated, place));
    }
  }

  void make_leaf(const SchemaElement& e, const Place& place, Node& node) {
    node.element = e;
    const Leaf leaf{int64_t(leaves_.size()), e.type, e.type_length, place.definition,
                    place.repetition};
    leaves_.push_back({place.path, leaf});
    const bool fixed = e.type == kFixedBytes;
    const auto need_bytes = [&](int64_t bytes) {
      if (!fixed || e.type_length == bytes) return;
      refuse(concat("found ", logical_name(e.meaning), " of ", e.type_length, " bytes, expected ",
                    bytes));
    };
    if (fixed && e.meaning == kInterval) refuse("found INTERVAL, expected other types");
    if ((e.meaning == kTime || e.meaning == kTimestamp) && e.unit_digits == 0) {
      refuse("found a time of an unknown unit, expected milli-, micro- or nanoseconds");
    }
    if (e.meaning == kUuid) need_bytes(16);
    if (e.meaning == kFloat16) need_bytes(2);
    if (e.meaning == kDecimal && (e.scale < 0 || e.scale > kMaxDecimalScale)) {
      refuse(concat("found DECIMAL of scale ", e.scale, ", expected 0 to ", kMaxDecimalScale));
    }
    if (e.meaning == kDecimal && fixed && e.type_length > kMaxDecimalBytes) {
      refuse(
          concat("found DECIMAL of ", e.type_length, " bytes, expected 1 to ", kMaxDecimalBytes));
    }
  }

  void skip_below(const SchemaElement& e) {
    for (int64_t below = e.children; below > 0; below--) {
      const SchemaElement& child = schema_[next_++];
      below += child.children;
      if (!child.is_group()) leaves_.push_back({});
    }
    if (!e.is_group()) leaves_.push_back({});
  }

  Node finish(Node node) {
    node.leaves = leaves_.size() - node.first_leaf;
    append_json_string(node.key, node.name);
    node.key += ':';
    return node;
  }

  const std::vector<SchemaElement>& schema_;
  size_t next_ = 0;
  std::vector<NamedLeaf> leaves_;
  std::string refused_;
};

// ---------------------------------------------------------------------------------------------
// The rows

class JsonRows {
 public:
  // Reads the footer, and selects all columns that can be read. Errors name the file, and the
  // column where it is one's. max_page_bytes: of a decompressed page, and of a row's JSON.
  explicit JsonRows(std::string path, int64_t max_page_bytes = kMaxPageBytes)
      : file_(std::move(path)), max_page_bytes_(max_page_bytes) {
    TreeBuilder builder(file_.footer());
    columns_ = builder.columns();
    for (const TreeBuilder::NamedLeaf& leaf : builder.leaves()) {
      const std::string where = concat(file_.path(), ": column ", json_text(leaf.path));
      readers_.push_back(
          std::make_unique<ColumnReader>(file_.data(), leaf.leaf, where, max_page_bytes));
    }
    std::vector<std::string> readable;
    for (Node& column : columns_) {
      if (!column.refused.empty()) {
        column.refused =
            concat(file_.path(), ": column ", json_text(column.name), ": ", column.refused);
      } else {
        check_known(column);
      }
      if (column.refused.empty()) {
        selected_.push_back(&column);
      } else {
        left_out_.push_back({column.name, column.refused});
      }
    }
    if (selected_.empty() && !left_out_.empty()) fail(left_out_[0].why);
    check_selected();
  }
  JsonRows(const JsonRows&) = delete;

  int64_t rows() const { return file_.footer().rows; }

  // That the rows can have, in the file's order.
  std::vector<std::string> columns() const {
    std::vector<std::string> names;
    for (const Node& column : columns_)
      if (column.refused.empty()) names.push_back(column.name);
    return names;
  }

  struct LeftOut {
    std::string column, why;  // why: "file.parquet: column "x": found ..., expected ..."
  };
  // The columns that cannot be read: they are not in the rows.
  const std::vector<LeftOut>& left_out() const { return left_out_; }

  // Only these columns from now on, in the file's order; goes to the first row. Fails where a
  // column is not there or cannot be read.
  void select(const std::vector<std::string>& names) {
    for (const std::string& name : names) {
      const auto column = std::find_if(columns_.begin(), columns_.end(),
                                       [&](const Node& c) { return c.name == name; });
      if (column == columns_.end()) {
        fail(file_.path(), ": column ", json_text(name), ": found no such column");
      }
      if (!column->refused.empty()) fail(column->refused);
    }
    selected_.clear();
    for (const Node& column : columns_) {
      const bool named = std::find(names.begin(), names.end(), column.name) != names.end();
      if (named && column.refused.empty()) selected_.push_back(&column);
    }
    check_selected();
    seek(0);
  }

  // The next row to be read, 0 to rows().
  void seek(int64_t row) {
    require(row >= 0 && row <= rows(), file_.path(), ": found row ", row,
            " to go to, expected 0 to ", rows());
    row_ = row;
    is_open_ = false;
  }
  int64_t row() const { return row_; }  // the number of the next row, from 0 on

  // Writes the next row's object to `json`: UTF-8 in one line, with room for 64 more bytes behind
  // it, simdjson's padding. The members stand in the schema's order, and null is written. False
  // behind the last row. Throws Error where the bytes are damaged, and says which rows cannot be
  // read for that reason: the rest of the row group. The next call goes on behind them.
  bool next(std::string& json) {
    if (row_ == rows()) return false;
    try {
      if (!is_open_ || row_ == group_end_) open_row_group();
      json.clear();
      write_row(json);
    } catch (const Error& error) {
      const int64_t first = std::exchange(row_, group_end_) + 1;
      is_open_ = false;
      fail(error.what(), "; rows ", first, " to ", row_, " cannot be read");
    }
    row_++;
    json.reserve(json.size() + 64);
    return true;
  }

 private:
  // Whether a codec or an encoding in any row group is not read: then the column is left out.
  void check_known(Node& column) const {
    try {
      for (const RowGroup& group : file_.footer().groups) {
        for (size_t i = column.first_leaf; i < column.first_leaf + column.leaves; i++) {
          readers_[i]->check_known(group.chunks[i]);
        }
      }
    } catch (const Error& error) {
      column.refused = error.what();
    }
  }

  // Fails where the footer lies about a selected column.
  void check_selected() const {
    for (const RowGroup& group : file_.footer().groups) {
      for (const Node* column : selected_) {
        for (size_t i = column->first_leaf; i < column->first_leaf + column->leaves; i++) {
          readers_[i]->check(group.chunks[i], group.rows);
        }
      }
    }
  }

  void open_row_group() {
    const RowGroup& group = file_.group_of(row_);
    group_end_ = group.first_row + group.rows;
    for (const Node* column : selected_) {
      for (size_t i = column->first_leaf; i < column->first_leaf + column->leaves; i++) {
        readers_[i]->open(group.chunks[i], group.rows);
        readers_[i]->skip(row_ - group.first_row);
      }
    }
    is_open_ = true;
  }

  void write_row(std::string& out) {
    out += '{';
    for (const Node* column : selected_) {
      if (out.size() > 1) out += ',';
      out += column->key;
      for (size_t i = column->first_leaf; i < column->first_leaf + column->leaves; i++) {
        if (readers_[i]->begins_row()) continue;
        fail(readers_[i]->where(), ": found an element behind its row, expected another row");
      }
      write(*column, out);
    }
    out += '}';
  }

  void write(const Node& node, std::string& out) {
    ColumnReader& first = *readers_[node.first_leaf];
    if (node.optional && first.definition() < node.definition) {
      pop_missing(node);
      out += "null";
    } else if (node.kind == Node::leaf) {
      if (first.definition() != node.definition) {
        fail(first.where(), ": found level ", first.definition(), ", expected ", node.definition,
             " as in the columns beside it");
      }
      write_value(node.element, first, out);
      first.pop();
    } else if (node.kind == Node::object) {
      out += '{';
      for (const Node& child : node.children) {
        if (&child != node.children.data()) out += ',';
        out += child.key;
        write(child, out);
      }
      out += '}';
    } else {
      const bool map = node.kind == Node::map;
      out += map ? '{' : '[';
      if (first.definition() < node.item_definition) {
        pop_missing(node);
      } else {
        for (bool more = true; more;) {
          if (map) write_map_key(node.children[0], out);
          write(node.children[map], out);
          more = has_another(node);
          if (more) out += ',';
        }
      }
      out += map ? '}' : ']';
    }
    if (int64_t(out.size()) > max_page_bytes_) {
      fail(first.where(), ": found a row of more than ", max_page_bytes_,
           " bytes as JSON, expected fewer");
    }
  }

  void write_map_key(const Node& key, std::string& out) {
    const size_t begin = out.size();
    write(key, out);
    if (out[begin] != '"') (out.insert(begin, 1, '"')) += '"';
    out += ':';
  }

  // Of a node that is null or empty: each leaf below has one entry, of the same level.
  void pop_missing(const Node& node) {
    const int level = readers_[node.first_leaf]->definition();
    for (size_t i = node.first_leaf; i < node.first_leaf + node.leaves; i++) {
      if (readers_[i]->definition() != level) {
        fail(readers_[i]->where(), ": found level ", readers_[i]->definition(), ", expected ",
             level, " as in the columns beside it");
      }
      readers_[i]->pop();
    }
  }

  // Whether the list has an element behind the one that was read.
  bool has_another(const Node& list) {
    const bool another = readers_[list.first_leaf]->repetition() == list.item_repetition;
    for (size_t i = list.first_leaf; i < list.first_leaf + list.leaves; i++) {
      const int level = readers_[i]->repetition();
      if (level <= list.item_repetition && (level == list.item_repetition) == another) continue;
      fail(readers_[i]->where(), ": found lists of other lengths than in the columns beside it, ",
           "expected equal ones");
    }
    return another;
  }

  static void write_value(const SchemaElement& e, ColumnReader& reader, std::string& out) {
    if (reader.is_bytes()) {
      write_text(e, reader.next_text(), reader.where(), out);
    } else {
      write_number(e, reader.next_number(), out);
    }
  }

  static void write_text(const SchemaElement& e, std::string_view text, const std::string& where,
                         std::string& out) {
    const bool fixed = e.type == kFixedBytes;
    if (e.type == kInt96) {  // nanoseconds of a day, and the Julian day
      const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
      const int64_t day = int64_t(load_little_endian<uint32_t>(bytes + 8)) - 2440588;
      out += '"';
      append_timestamp(out, day, load_little_endian<int64_t>(bytes), 9);
      out += '"';
    } else if (e.meaning == kDecimal) {
      if (int64_t(text.size()) > kMaxDecimalBytes) {
        fail(where, ": found DECIMAL of ", text.size(), " bytes, expected ", kMaxDecimalBytes,
             " or fewer");
      }
      append_decimal(out, text, e.scale);
    } else if (e.meaning == kUuid && fixed) {
      append_uuid(out, text);
    } else if (e.meaning == kFloat16 && fixed) {
      append_number(out, float_of_half(load_little_endian<uint16_t>(
                             reinterpret_cast<const unsigned char*>(text.data()))));
    } else if (e.meaning == kJson) {
      append_embedded(out, text);
    } else {
      append_json_string(out, text);
    }
  }

  static void write_number(const SchemaElement& e, uint64_t bits, std::string& out) {
    if (e.type == kBoolean) {
      out += bits ? "true" : "false";
      return;
    }
    if (e.type == kDouble) return append_number(out, std::bit_cast<double>(bits));
    if (e.type == kFloat) return append_number(out, std::bit_cast<float>(uint32_t(bits)));
    const int64_t x = e.type == kInt32 ? int32_t(uint32_t(bits)) : int64_t(bits);
    char digits[32];
    switch (e.meaning) {
      case kDate:
        if (e.type != kInt32) break;
        out += '"';
        append_date(out, x);
        out += '"';
        return;
      case kTime:
        out += x < 0 ? "\"-" : "\"";
        append_time(out, x < 0 ? 0 - uint64_t(x) : uint64_t(x), e.unit_digits);
        out += e.is_utc ? "Z\"" : "\"";
        return;
      case kTimestamp:
        out += '"';
        append_timestamp(out, 0, x, e.unit_digits);
        out += e.is_utc ? "Z\"" : "\"";
        return;
      case kDecimal: {
        char bytes[8];
        for (int i = 0; i < 8; i++) bytes[i] = char(x >> (56 - 8 * i));
        append_decimal(out, {bytes, 8}, e.scale);
        return;
      }
      default:
        break;
    }
    const uint64_t without_sign = e.type == kInt32 ? uint32_t(bits) : bits;
    const auto end = e.is_signed ? std::to_chars(digits, digits + 32, x)
                                 : std::to_chars(digits, digits + 32, without_sign);
    out.append(digits, end.ptr);
  }

  File file_;
  int64_t max_page_bytes_;
  std::vector<Node> columns_;
  std::vector<LeftOut> left_out_;
  std::vector<const Node*> selected_;
  std::vector<std::unique_ptr<ColumnReader>> readers_;  // of all leaves
  int64_t row_ = 0, group_end_ = 0;
  bool is_open_ = false;  // the readers stand at row_
};

}  // namespace cake::parquet
