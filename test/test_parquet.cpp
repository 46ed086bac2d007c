// Parquet files written by pyarrow, polars and duckdb (dev/golden/parquet.py and parquet_rows.py),
// files made here byte by byte with one lie each, and damage.
#include "cake/parquet.h"

#include <doctest/doctest.h>

#include <functional>

#include "cake/parquet_rows.h"
#include "test/support.h"

namespace cake::parquet {
namespace {

using Value = std::optional<std::string>;
using Row = std::vector<Value>;

std::string golden(const std::string& name) { return "test/golden/parquet/" + name + ".parquet"; }

// The formulas of dev/golden/parquet.py.
Value value_of(const std::string& column, int64_t i) {
  if (column == "text") {
    if (i % 7 == 3) return std::nullopt;
    if (i % 50 == 0) return "";
    std::string text = concat("document ", i, ": naïve 日本");
    for (int64_t n = i * 37 % 11; n > 0; n--) text += " word";
    return text;
  }
  if (column == "colour") {
    if (i % 5 == 4) return std::nullopt;
    return std::vector<std::string>{"red", "green", "blue"}[size_t(i * i % 3)];
  }
  if (column == "count") {
    if (i % 11 == 6) return std::nullopt;
    return std::to_string(i * 2654435761 * 1000000 * (i % 2 ? 1 : -1));
  }
  if (column == "small") return std::to_string(i * 7919 % 1000 - 500);
  if (column == "unsigned") return std::to_string(~uint64_t(0) - uint64_t(i));
  REQUIRE(column == "unsigned32");
  return std::to_string(~uint32_t(0) - uint32_t(i));
}

const std::vector<std::string> kColumns = {"text",  "colour",   "count",
                                           "small", "unsigned", "unsigned32"};

Row row_of(int64_t i, const std::vector<std::string>& columns = kColumns) {
  Row row;
  for (const std::string& column : columns) row.push_back(value_of(column, i));
  return row;
}

std::vector<Row> read_all(Reader& reader) {
  std::vector<Row> rows;
  for (Row row; reader.next(row);) rows.push_back(row);
  return rows;
}

// Everything that can be read, by column, then by row: hostile bytes must end in rows or an Error.
void read_whatever(const std::string& path) {
  Reader reader(path, 1 << 22);
  std::vector<std::string> readable;
  Row row;
  for (const std::string& column : reader.columns()) {
    if (!reader.is_text(column) && !reader.is_integer(column)) continue;
    readable.push_back(column);
    try {
      reader.select({column});
      for (int i = 0; i < 3000 && reader.next(row); i++) {
      }
      reader.seek(reader.rows() / 2);
      reader.next(row);
    } catch (const Error&) {
    }
  }
  JsonRows rows(path, 1 << 22);
  std::string json;
  for (int i = 0; i < 3000; i++) {
    try {
      if (!rows.next(json)) break;
      parse_json(json, "row");
    } catch (const Error& error) {
      REQUIRE(contains(error.what(), "cannot be read"));
    }
  }
  reader.select(readable);
  for (int i = 0; i < 3000 && reader.next(row); i++) {
  }
}

// ---------------------------------------------------------------------------------------------
// A file made here: the column "x" of strings in one row group, with one data page.

struct ThriftWriter {
  std::string bytes;
  int last = 0;
  void varint(uint64_t x) {
    for (; x >= 128; x >>= 7) bytes += char(x | 128);
    bytes += char(x);
  }
  void zigzag(int64_t x) { varint(uint64_t(x) << 1 ^ uint64_t(x >> 63)); }
  ThriftWriter& field(int id, int type) {
    bytes += char((id - last) << 4 | type);
    last = id;
    return *this;
  }
  ThriftWriter& integer(int id, int64_t x) { return field(id, 6).zigzag(x), *this; }
  ThriftWriter& text(int id, const std::string& s) {
    field(id, 8).varint(s.size());
    bytes += s;
    return *this;
  }
  ThriftWriter& inner(int id, const ThriftWriter& s) {
    field(id, 12).bytes += s.end();
    return *this;
  }
  ThriftWriter& list(int id, const std::vector<ThriftWriter>& structs) {
    field(id, 9).bytes += char(structs.size() << 4 | 12);
    for (const ThriftWriter& s : structs) bytes += s.end();
    return *this;
  }
  std::string end() const { return bytes + '\0'; }
};

std::string little_endian(uint32_t x) { return {reinterpret_cast<const char*>(&x), 4}; }

struct MadeFile {
  // As the strings "ab" and "c" are written, PLAIN, the second row null. Two levels 1, 0, 1 are a
  // packed group of 8: header 3, bits 00000101.
  std::string levels = "\x03\x05", values = little_endian(2) + "ab" + little_endian(1) + "c";
  int64_t rows = 3, group_rows = 3, chunk_values = 3, page_values = 3;
  int64_t type = kByteArray, chunk_type = kByteArray, codec = 0, chunk_encoding = 0;
  int64_t page_type = kDataPage, encoding = kPlain, level_encoding = kRle, children = 1;
  std::optional<int64_t> size, compressed_size, level_bytes, chunk_bytes, data_offset, footer_bytes;
  std::optional<int64_t> definition_bytes, crc;
  std::string packed;  // what the page holds instead
  bool in_other_file = false;
  std::string before;  // pages before this one
  int depth = 0;       // levels of an unknown field in the footer
  std::string name = "x";

  std::string pages() const {
    const bool v2 = page_type == kDataPageV2;
    std::string page = v2 ? levels : little_endian(uint32_t(level_bytes.value_or(levels.size())));
    page += (v2 ? "" : levels) + values;
    const int64_t page_bytes = int64_t(page.size());
    if (!packed.empty()) page = packed;
    ThriftWriter header, h;
    header.integer(1, page_type);
    header.integer(2, size.value_or(page_bytes));
    header.integer(3, compressed_size.value_or(int64_t(page.size())));
    if (crc) header.integer(4, *crc);
    if (v2) {
      h.integer(1, page_values).integer(2, 1).integer(3, page_values).integer(4, encoding);
      h.integer(5, definition_bytes.value_or(int64_t(levels.size()))).integer(6, 0);
      header.inner(8, h);
    } else {
      h.integer(1, page_values).integer(2, encoding).integer(3, level_encoding).integer(4, kRle);
      header.inner(page_type == kDictionaryPage ? 7 : 5, h);
    }
    return before + header.end() + page;
  }

  std::string bytes() const {
    const std::string all_pages = pages();
    ThriftWriter root, leaf, meta, chunk, group, footer;
    root.text(4, "schema").integer(5, children);
    leaf.integer(1, type).integer(3, kOptional).text(4, name);
    meta.integer(1, chunk_type).field(2, 9).bytes += "\x15";  // a list of one i32
    meta.zigzag(chunk_encoding);
    meta.integer(4, codec).integer(5, chunk_values).integer(6, 100);
    meta.integer(7, chunk_bytes.value_or(int64_t(all_pages.size())));
    meta.integer(9, data_offset.value_or(4));
    if (in_other_file) chunk.text(1, "other");
    chunk.integer(2, 4).inner(3, meta);
    group.list(1, {chunk}).integer(2, 0).integer(3, group_rows);
    footer.integer(1, 1).list(2, {root, leaf}).integer(3, rows).list(4, {group});
    for (int i = 0; i < depth; i++) footer.field(i == 0 ? 12 : 1, 12).last = 0;
    footer.bytes += std::string(size_t(depth), '\0');
    const std::string end = footer.end();
    return "PAR1" + all_pages + end + little_endian(uint32_t(footer_bytes.value_or(end.size()))) +
           "PAR1";
  }
};

// The error of reading the file, without its path; "no error".
std::string error_of_bytes(const std::string& bytes) {
  TempDir dir;
  const std::string path = dir / "made.parquet";
  write_file(path, bytes);
  const std::string error = error_of([&] {
    Reader reader(path, 1000);
    reader.select({reader.columns().at(0)});
    read_all(reader);
  });
  return error.starts_with(path + ": ") ? error.substr(path.size() + 2) : error;
}
std::string error_of_made(const std::function<void(MadeFile&)>& change) {
  MadeFile made;
  change(made);
  return error_of_bytes(made.bytes());
}

}  // namespace

TEST_CASE("parquet: every value of pyarrow's and polars's files is read") {
  const std::vector<std::pair<std::string, int64_t>> files = {
      {"pyarrow_plain", 30},     {"pyarrow_none_v1", 50},    {"pyarrow_none_v2", 50},
      {"pyarrow_snappy_v1", 50}, {"pyarrow_snappy_v2", 50},  {"pyarrow_gzip_v1", 50},
      {"pyarrow_gzip_v2", 50},   {"pyarrow_zstd_v1", 50},    {"pyarrow_zstd_v2", 50},
      {"pyarrow_fallback", 100}, {"pyarrow_delta_v1", 150},  {"pyarrow_delta_v2", 150},
      {"polars_default", 50},    {"polars_snappy", 50},      {"polars_gzip", 50},
      {"polars_zstd", 50},       {"polars_uncompressed", 50}};
  for (const auto& file : files) {
    const std::string& name = file.first;
    const int64_t rows = file.second;
    CAPTURE(name);
    Reader reader(golden(name));
    CHECK(reader.rows() == rows);
    reader.select(kColumns);
    Row row;
    int64_t n = 0;
    for (; reader.next(row); n++) {
      CAPTURE(n);
      CHECK(row == row_of(n));
    }
    CHECK(n == rows);
    CHECK(!reader.next(row));
  }
}

TEST_CASE("parquet: columns are selected in any order, and others stand beside them") {
  for (const char* name : {"pyarrow_plain", "polars_default"}) {
    CAPTURE(name);
    Reader reader(golden(name));
    CHECK(reader.columns() == std::vector<std::string>{"text", "ratio", "colour", "count", "list",
                                                       "small", "pair", "unsigned", "unsigned32"});
    CHECK(reader.is_text("text"));
    CHECK(!reader.is_text("count"));
    CHECK(reader.is_integer("count"));
    CHECK(!reader.is_integer("text"));
    for (const char* other : {"ratio", "list", "pair", "absent"}) {
      CHECK(!reader.is_text(other));
      CHECK(!reader.is_integer(other));
    }
    CHECK(reader.has("pair"));
    CHECK(!reader.has("absent"));
    const std::vector<std::string> selected = {"small", "text", "small"};
    reader.select(selected);
    Row row;
    for (int64_t i = 0; reader.next(row); i++) CHECK(row == row_of(i, selected));
    reader.select({});
    CHECK(read_all(reader) == std::vector<Row>(size_t(reader.rows())));
  }
}

TEST_CASE("parquet: reading goes on at any row, in any order") {
  for (const char* name : {"pyarrow_zstd_v1", "pyarrow_gzip_v2", "pyarrow_delta_v2",
                           "pyarrow_fallback", "polars_snappy", "polars_default"}) {
    CAPTURE(name);
    Reader reader(golden(name));
    reader.select(kColumns);
    Row row;
    for (int64_t i = reader.rows() - 1; i >= 0; i--) {
      reader.seek(i);
      REQUIRE(reader.next(row));
      CHECK(row == row_of(i));
      const bool more = reader.next(row);
      CHECK(more == (i + 1 < reader.rows()));
      if (more) CHECK(row == row_of(i + 1));
    }
    reader.seek(reader.rows());
    CHECK(!reader.next(row));
    CHECK(contains(error_of([&] { reader.seek(reader.rows() + 1); }), "to go to, expected 0 to"));
    CHECK(contains(error_of([&] { reader.seek(-1); }), "found row -1"));
  }
}

TEST_CASE("parquet: files without rows, of nulls alone, and of large strings") {
  Reader empty(golden("pyarrow_empty"));
  CHECK(empty.rows() == 0);
  empty.select(kColumns);
  Row row;
  CHECK(!empty.next(row));

  Reader nulls(golden("pyarrow_nulls"));
  nulls.select({"text"});
  CHECK(read_all(nulls) == std::vector<Row>(1000, Row{std::nullopt}));

  Reader large(golden("pyarrow_large"));
  large.select({"text"});
  const std::vector<Row> rows = read_all(large);
  REQUIRE(rows.size() == 4);
  for (int i = 0; i < 4; i++) {
    std::string expected;
    for (int n = 0; n < 150000; n++) expected += concat(i, " ");
    CHECK((rows[size_t(i)][0] == expected));
  }
}

TEST_CASE("parquet: what is not read is refused by column and name") {
  const std::string path = golden("pyarrow_refused");
  Reader reader(path);
  const auto error = [&](const char* column) { return error_of([&] { reader.select({column}); }); };
  CHECK(error("front") == "no error");
  CHECK(error("time") ==
        path + ": column \"time\": found INT64 with TIMESTAMP, expected strings or integers");
  CHECK(contains(error("fixed"), "\"fixed\": found FIXED_LEN_BYTE_ARRAY, expected"));
  CHECK(contains(error("flag"), "\"flag\": found BOOLEAN, expected"));
  CHECK(contains(error("absent"),
                 "\"absent\": found no such column, expected one of \"front\", \"text\""));
  reader.select({"text", "bytes", "front"});  // what stands beside is read
  CHECK(read_all(reader) ==
        std::vector<Row>{{"x", std::string("\xff\0", 2), "aa"}, {"y", "", "ab"}});

  Reader brotli(golden("pyarrow_brotli"));
  CHECK(contains(error_of([&] { brotli.select({"text"}); }),
                 "column \"text\": found codec BROTLI, expected UNCOMPRESSED, SNAPPY, GZIP"));
  Reader plain(golden("pyarrow_plain"));
  CHECK(contains(error_of([&] { plain.select({"list"}); }), "\"list\": found a nested column"));
  CHECK(contains(error_of([&] { plain.select({"pair"}); }), "\"pair\": found a nested column"));
  CHECK(contains(error_of([&] { plain.select({"ratio"}); }), "\"ratio\": found DOUBLE"));
}

TEST_CASE("parquet: the file that is made here is read") {
  TempDir dir;
  for (const int64_t page_type : {kDataPage, kDataPageV2}) {
    MadeFile made;
    made.page_type = page_type;
    write_file(dir / "x", made.bytes());
    Reader reader(dir / "x");
    reader.select({"x"});
    CHECK(read_all(reader) == std::vector<Row>{{"ab"}, {std::nullopt}, {"c"}});
  }
}

TEST_CASE("parquet: each lie of a file is an error that says what was found") {
  const auto finds = [](const std::string& part, const std::function<void(MadeFile&)>& change) {
    CAPTURE(part);
    const std::string error = error_of_made(change);
    CHECK_MESSAGE(contains(error, part), error);
  };
  finds("no error", [](MadeFile&) {});
  // The footer
  finds("found a footer of 4294967295 bytes", [](MadeFile& f) { f.footer_bytes = -1; });
  finds("found a footer of 1000 bytes", [](MadeFile& f) { f.footer_bytes = 1000; });
  finds("footer: found", [](MadeFile& f) { f.footer_bytes = 20; });
  finds("expected -1 rows in all", [](MadeFile& f) { f.rows = -1; });
  finds("found 3 rows in the row groups, expected 9", [](MadeFile& f) { f.rows = 9; });
  finds("found a row group of -3 rows", [](MadeFile& f) { f.group_rows = -3; });
  finds("found a row group of 9223372036854775807 rows",
        [](MadeFile& f) { f.group_rows = std::numeric_limits<int64_t>::max(); });
  for (const int64_t children : {int64_t(-1), int64_t(2), std::numeric_limits<int64_t>::max()}) {
    finds("elements", [&](MadeFile& f) { f.children = children; });
  }
  finds("found 2 elements of the schema, expected 1", [](MadeFile& f) { f.children = 0; });
  finds("no error", [](MadeFile& f) { f.depth = 20; });
  finds("levels of Thrift", [](MadeFile& f) { f.depth = 100000; });
  finds("column \"\\u0000\\ufffd<\": found", [](MadeFile& f) {
    f.name = std::string("\0\xff<", 3);
    f.codec = 7;
  });
  // The column chunk
  finds("column \"x\": found codec LZ4_RAW, expected", [](MadeFile& f) { f.codec = 7; });
  finds("found codec number 99, expected", [](MadeFile& f) { f.codec = 99; });
  finds("found a column chunk without its numbers", [](MadeFile& f) { f.codec = -4; });
  finds("found values of INT64, expected BYTE_ARRAY", [](MadeFile& f) { f.chunk_type = kInt64; });
  finds("found INT96, expected strings or integers", [](MadeFile& f) { f.type = 3; });
  finds("found encoding BYTE_STREAM_SPLIT", [](MadeFile& f) { f.chunk_encoding = 9; });
  finds("found encoding DELTA_BINARY_PACKED, expected", [](MadeFile& f) { f.chunk_encoding = 5; });
  finds("found values in another file", [](MadeFile& f) { f.in_other_file = true; });
  finds("found 4 values in a row group, expected 3", [](MadeFile& f) { f.chunk_values = 4; });
  for (const int64_t offset : {int64_t(0), int64_t(5), int64_t(1000), int64_t(1) << 62}) {
    finds("bytes of pages at offset", [&](MadeFile& f) { f.data_offset = offset; });
  }
  finds("found 9223372036854775807 bytes of pages at offset 4",
        [](MadeFile& f) { f.chunk_bytes = std::numeric_limits<int64_t>::max(); });
  finds("Thrift data", [](MadeFile& f) { f.chunk_bytes = 5; });
  finds("found the end of a row group's pages with 3 rows", [](MadeFile& f) { f.chunk_bytes = 0; });
  // The page
  for (const int64_t size : {int64_t(-1), int64_t(1000), int64_t(1) << 31}) {
    finds("bytes at offset", [&](MadeFile& f) { f.compressed_size = size; });
  }
  for (const int64_t size : {int64_t(-1), int64_t(1001), int64_t(1) << 31}) {
    finds("bytes when decompressed, expected 0 to 1000", [&](MadeFile& f) { f.size = size; });
  }
  finds("found an uncompressed page of 17 bytes, expected 18", [](MadeFile& f) { f.size = 18; });
  for (const int64_t values : {int64_t(-1), int64_t(4), int64_t(1) << 40}) {
    finds("values, expected 0 to 3", [&](MadeFile& f) { f.page_values = values; });
  }
  finds("with 1 rows to come", [](MadeFile& f) { f.page_values = 2; });
  finds("found a page of type 4", [](MadeFile& f) { f.page_type = 4; });
  finds("row group's pages with 3 rows to come", [](MadeFile& f) { f.page_type = kIndexPage; });
  finds("found encoding BYTE_STREAM_SPLIT, expected", [](MadeFile& f) { f.encoding = 9; });
  finds("found levels of encoding DELTA_BYTE_ARRAY", [](MadeFile& f) { f.level_encoding = 7; });
  finds("its CRC-32 is", [](MadeFile& f) { f.crc = 5; });
  for (const int codec : {kSnappy, kGzip, kZstd}) {
    finds("found damaged " + codec_name(codec) + " data in a page of 7 bytes, expected 17 bytes",
          [&](MadeFile& f) { f.codec = codec, f.packed = "garbage"; });
  }
  finds("found a second dictionary", [](MadeFile& f) {
    f.page_type = kDictionaryPage;
    f.levels = "a", f.values = "", f.page_values = 1;  // a length and its string
    f.before = f.pages();
  });
  finds("found a dictionary of 2 values in 4 bytes", [](MadeFile& f) {
    f.page_type = kDictionaryPage;
    f.levels = "", f.level_bytes = 0, f.values = "", f.page_values = 2;
  });
  // Levels
  finds("found levels of 4000000000 bytes", [](MadeFile& f) { f.level_bytes = 4000000000; });
  finds("found levels of 14 bytes", [](MadeFile& f) { f.level_bytes = 14; });
  finds("found level 7, expected 0 to 1", [](MadeFile& f) { f.levels = "\x06\x07"; });
  finds("fewer levels or indices", [](MadeFile& f) { f.levels = "\x04\x01"; });
  finds("fewer levels or indices", [](MadeFile& f) { f.levels = ""; });
  finds("ends within packed numbers", [](MadeFile& f) { f.levels = "\x03"; });
  finds("ends within a run", [](MadeFile& f) { f.levels = "\x06"; });
  finds("found a number that does not end", [](MadeFile& f) { f.levels = "\xff"; });
  finds("found a run of 34359738367 numbers",
        [](MadeFile& f) { f.levels = "\xfe\xff\xff\xff\xff\x01\x01"; });
  for (const int64_t bytes : {int64_t(-1), int64_t(100), int64_t(1) << 62}) {
    finds("found levels of 0 and",
          [&](MadeFile& f) { f.page_type = kDataPageV2, f.definition_bytes = bytes; });
  }
  // Values
  finds("found a string of 4294967295 bytes, expected 0 to 8",
        [](MadeFile& f) { f.values = little_endian(~0u) + "abcdefgh"; });
  finds("within a string's length", [](MadeFile& f) { f.values = "\x01"; });
  finds("within a string's length", [](MadeFile& f) { f.values = little_endian(2) + "ab"; });
  finds("found indices without a dictionary", [](MadeFile& f) { f.encoding = kRleDictionary; });
  finds("within a number", [](MadeFile& f) {
    f.type = f.chunk_type = kInt64;
    f.values = "1234567";
  });
  const auto delta = [](const std::string& values) {
    return [values](MadeFile& f) { f.encoding = kDeltaLengthByteArray, f.values = values; };
  };
  // 128 numbers a block, 4 miniblocks, 2 numbers, the first 2; least difference -1, widths 0
  finds("no error", delta(std::string("\x80\x01\x04\x02\x04\x01\0\0\0\0abc", 13)));
  finds("found a string of 1 bytes, expected 0 to 0",
        delta(std::string("\x80\x01\x04\x02\x04\x01\0\0\0\0ab", 12)));
  finds("found a string of -1 bytes",
        delta(std::string("\x80\x01\x04\x02\x01\x01\0\0\0\0abc", 13)));
  finds("fewer numbers than it counts", delta(std::string("\x80\x01\x04\x01\x04", 5) + "abc"));
  finds("found delta blocks of 0 numbers", delta(std::string("\0\x04\x02\x04", 4)));
  finds("found delta blocks of 128 numbers in 0", delta(std::string("\x80\x01\0\x02\x04", 5)));
  finds("found delta blocks of 128 numbers in 8", delta("\x80\x01\x08\x02\x04"));
  finds("found delta blocks of 34359738240 numbers", delta("\x80\xff\xff\xff\x7f\x04\x02\x04"));
  finds("ends within a delta block", delta(std::string("\x80\x01\x04\x02\x04\x01\0\0", 8)));
  finds("packed differences of 255 bits",
        delta(std::string("\x80\x01\x04\x02\x04\x01\xff\0\0\0abc", 13)));
  finds("packed differences of 64 bits",
        delta(std::string("\x80\x01\x04\x02\x04\x01\x40\0\0\0abc", 13)));
}

TEST_CASE("parquet: what is no parquet file is refused") {
  CHECK(contains(error_of_bytes("PAR1 no parquet"), "found no \"PAR1\" at its end"));
  CHECK(contains(error_of_bytes("no parquet PAR1"), "found no \"PAR1\" at its begin"));
  CHECK(contains(error_of_bytes("PAR1"), "found 4 bytes"));
  CHECK(contains(error_of_bytes("PAR1    ....PARE"), "encrypted"));
  CHECK(contains(error_of_bytes(""), "found 0 bytes"));
}

TEST_CASE("parquet: an index beyond the dictionary is an error") {
  // Dictionary "a"; indices of 8 bits: a run of 3 times number 1.
  MadeFile dictionary, made;
  dictionary.page_type = kDictionaryPage;
  dictionary.levels = "a", dictionary.values = "", dictionary.page_values = 1;
  made.before = dictionary.pages();
  made.levels = "\x06\x01", made.encoding = kRleDictionary;
  TempDir dir;
  for (const char index : {'\0', '\1'}) {
    made.values = std::string("\x08\x06") + index;
    const std::string error = error_of_bytes(made.bytes());
    CHECK_MESSAGE(contains(error, index ? "found index 1 into a dictionary of 1" : "no error"),
                  error);
  }
  made.values = "\x21\x06\x01";
  CHECK(contains(error_of_bytes(made.bytes()), "found indices of 33 bits"));
}

TEST_CASE("parquet: a failed row fails again, and others are still read") {
  TempDir dir;
  std::string bytes = read_file(golden("pyarrow_zstd_v1"));
  // The pages have checksums. One byte is changed, somewhere behind the first row.
  const auto open = [&](const std::string& content) {
    write_file(dir / "x", content);
    Reader reader(dir / "x");
    reader.select({"small", "text"});
    return reader;
  };
  size_t damaged = 0;
  for (size_t offset = 4; offset < bytes.size() / 2 && damaged == 0; offset += 7) {
    std::string changed = bytes;
    changed[offset] = char(changed[offset] ^ 1);
    Reader reader = open(changed);
    Row row;
    int64_t i = 0;
    const std::string first = error_of([&] {
      for (; reader.next(row); i++) {
      }
    });
    if (first == "no error" || i == 0) continue;
    CHECK(error_of([&] { reader.next(row); }) == first);
    reader.seek(reader.rows() - 1);
    REQUIRE(reader.next(row));
    CHECK(row == row_of(reader.rows() - 1, {"small", "text"}));
    damaged = offset;
  }
  CHECK(damaged > 0);

  MadeFile made;  // the first string's length is too large; behind it stand two good strings
  made.levels = "\x03\x07";
  made.values = little_endian(~0u) + little_endian(1) + "b" + little_endian(1) + "c";
  write_file(dir / "x", made.bytes());
  Reader reader(dir / "x");
  reader.select({"x"});
  Row row;
  for (int i = 0; i < 3; i++) {
    CHECK(contains(error_of([&] { reader.next(row); }), "found a string of 4294967295 bytes"));
  }
}

TEST_CASE("parquet: truncated and changed files end in rows or an error") {
  TempDir dir;
  const std::string path = dir / "x";
  const auto write = [&](std::string_view bytes) {  // no sync: these are many
    std::ofstream(path, std::ios::binary) << bytes;
  };
  for (const char* name : {"pyarrow_delta_v2", "pyarrow_refused"}) {
    const std::string bytes = read_file(golden(name));
    for (size_t n = 0; n < bytes.size(); n += 3) {
      write(std::string_view(bytes).substr(0, n));
      CHECK(error_of([&] { read_whatever(path); }) != "no error");
    }
    for (size_t i = 0; i < bytes.size(); i++) {
      std::string changed = bytes;
      changed[i] = char(changed[i] ^ std::array{1, 0x80, 0xff}[i % 3]);
      write(changed);
      error_of([&] { read_whatever(path); });  // any Error, and nothing else
    }
  }
}

TEST_CASE("parquet: numbers of any width and place are unpacked as bit by bit") {
  std::vector<unsigned char> bytes(64);
  for (size_t i = 0; i < bytes.size(); i++) bytes[i] = (unsigned char)(i * 167 + 13);
  for (int width = 0; width <= 64; width++) {
    for (uint64_t bit = 0; bit + uint64_t(width) <= 8 * bytes.size(); bit++) {
      uint64_t expected = 0;
      for (int i = 0; i < width; i++) {
        const uint64_t b = bit + uint64_t(i);
        expected |= uint64_t(bytes[b / 8] >> b % 8 & 1) << i;
      }
      REQUIRE(load_bits(bytes, bit, width) == expected);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Rows as JSON

namespace {

std::string rows_golden(const std::string& name) { return "test/golden/parquet_rows/" + name; }

std::vector<std::string> all_rows(JsonRows& rows) {
  std::vector<std::string> all;
  for (std::string json; rows.next(json);) all.push_back(json);
  return all;
}

// A file of one row group made here: its schema, and for each leaf one page without a codec.
ThriftWriter group(const std::string& name, int64_t repetition, int64_t children,
                   int64_t converted = -1) {
  ThriftWriter e;
  e.integer(3, repetition).text(4, name).integer(5, children);
  if (converted >= 0) e.integer(6, converted);
  return e;
}
ThriftWriter field(const std::string& name, int64_t repetition, int64_t type = kInt32,
                   int64_t converted = -1) {
  ThriftWriter e;
  e.integer(1, type).integer(3, repetition).text(4, name);
  if (converted >= 0) e.integer(6, converted);
  return e;
}

struct MadeLeaf {
  std::vector<int> repetitions, definitions;  // of the entries; {}: the page has none
  std::string values;
  int64_t type = kInt32, encoding = kPlain;
  bool bit_packed = false;  // levels
};

std::string integers(const std::vector<int>& numbers) {
  std::string bytes;
  for (const int x : numbers) bytes += little_endian(uint32_t(x));
  return bytes;
}

// The levels of a page v1, each a run of its own; or packed, highest bits first.
std::string made_levels(const std::vector<int>& levels, bool bit_packed) {
  if (levels.empty()) return "";
  if (!bit_packed) {
    std::string runs;
    for (const int level : levels) (runs += '\x02') += char(level);
    return little_endian(uint32_t(runs.size())) + runs;
  }
  const int width = std::bit_width(unsigned(*std::max_element(levels.begin(), levels.end())));
  std::string bits;
  for (size_t i = 0; i < levels.size() * size_t(width); i++) {
    if (i % 8 == 0) bits += '\0';
    const int bit = levels[i / size_t(width)] >> (width - 1 - int(i) % width) & 1;
    bits.back() = char(bits.back() | bit << (7 - i % 8));
  }
  return bits;
}

std::string made_file(const std::vector<ThriftWriter>& schema, const std::vector<MadeLeaf>& leaves,
                      int64_t rows) {
  std::string bytes = "PAR1";
  std::vector<ThriftWriter> chunks;
  for (const MadeLeaf& leaf : leaves) {
    const int64_t entries =
        int64_t(std::max({leaf.repetitions.size(), leaf.definitions.size(), size_t(rows)}));
    const int64_t level_encoding = leaf.bit_packed ? kBitPacked : kRle;
    const std::string page = made_levels(leaf.repetitions, leaf.bit_packed) +
                             made_levels(leaf.definitions, leaf.bit_packed) + leaf.values;
    ThriftWriter header, h, meta, chunk;
    h.integer(1, entries).integer(2, leaf.encoding);
    h.integer(3, level_encoding).integer(4, level_encoding);
    header.integer(1, kDataPage).integer(2, int64_t(page.size()));
    header.integer(3, int64_t(page.size())).inner(5, h);
    meta.integer(1, leaf.type).integer(4, kUncompressed).integer(5, entries);
    meta.integer(7, int64_t(header.end().size() + page.size())).integer(9, int64_t(bytes.size()));
    chunks.push_back(chunk.inner(3, meta));
    bytes += header.end() + page;
  }
  ThriftWriter row_group, footer;
  row_group.list(1, chunks).integer(3, rows);
  footer.integer(1, 1).list(2, schema).integer(3, rows).list(4, {row_group});
  return bytes + footer.end() + little_endian(uint32_t(footer.end().size())) + "PAR1";
}

// The rows of such a file, a line each; or the error without the file's name.
std::string made_rows(const std::vector<ThriftWriter>& schema, const std::vector<MadeLeaf>& leaves,
                      int64_t rows) {
  TempDir dir;
  const std::string path = dir / "x";
  write_file(path, made_file(schema, leaves, rows));
  std::string text;
  const std::string error = error_of([&] {
    JsonRows reader(path, 10000);
    for (const std::string& row : all_rows(reader)) text += row + "\n";
  });
  return error == "no error" ? text : error.substr(error.find(": ") + 2);
}

template <class Append>
std::string appended(Append append) {
  std::string out;
  append(out);
  return out;
}

}  // namespace

TEST_CASE("parquet rows: every row is the JSON of what pyarrow reads") {
  const std::vector<std::pair<std::string, std::string>> files = {
      {"v1_dictionary", "conversations"},
      {"v2_plain", "conversations"},
      {"v1_delta", "conversations"},
      {"v2_delta", "conversations"},
      {"polars", "conversations"},
      {"duckdb_v1", "conversations"},
      {"duckdb_v2", "conversations"},
      {"nests", "nests"},
      {"types_v1", "types"},
      {"types_v2", "types"},
      {"int96", "int96"},
      {"duckdb_types", "duckdb_types"}};
  for (const auto& file : files) {
    const std::string& name = file.first;
    CAPTURE(name);
    std::istringstream lines(read_file(rows_golden(file.second + ".jsonl")));
    JsonRows reader(rows_golden(name + ".parquet"));
    CHECK(reader.left_out().empty());
    int64_t n = 0;
    std::string json;
    for (std::string expected; std::getline(lines, expected); n++) {
      CAPTURE(n);
      CHECK(reader.row() == n);
      REQUIRE(reader.next(json));
      CHECK(json.capacity() >= json.size() + 64);
      CHECK(parse_json<OrderedJson>(json, "row") == parse_json<OrderedJson>(expected, "golden"));
    }
    CHECK(n > 0);
    CHECK(n == reader.rows());
    CHECK(!reader.next(json));
  }
}

TEST_CASE("parquet rows: files without rows and of nulls alone") {
  JsonRows empty(rows_golden("no_rows.parquet"));
  std::string json;
  CHECK(empty.rows() == 0);
  CHECK(!empty.next(json));
  JsonRows nulls(rows_golden("all_null.parquet"));
  CHECK(all_rows(nulls) ==
        std::vector<std::string>(
            100, R"({"messages":null,"choices":null,"reward_model":null,"numbers":null,)"
                 R"("answer":null,"score":null,"flag":null,"created":null})"));
}

TEST_CASE("parquet rows: reading goes on at any row, of any columns") {
  for (const char* name : {"v1_dictionary", "v2_plain", "polars", "nests"}) {
    CAPTURE(name);
    JsonRows reader(rows_golden(concat(name, ".parquet")));
    const std::vector<std::string> rows = all_rows(reader);
    std::string json;
    for (int64_t i = reader.rows() - 1; i >= 0; i--) {
      reader.seek(i);
      REQUIRE(reader.next(json));
      CHECK(json == rows[size_t(i)]);
      if (reader.next(json)) CHECK(json == rows[size_t(i) + 1]);
    }
    CHECK(contains(error_of([&] { reader.seek(reader.rows() + 1); }), "to go to, expected 0 to"));
  }
  JsonRows reader(rows_golden("v2_plain.parquet"));
  reader.select({"flag", "numbers"});  // in the file's order
  const std::vector<std::string> rows = all_rows(reader);
  std::istringstream lines(read_file(rows_golden("conversations.jsonl")));
  for (const std::string& row : rows) {
    std::string line;
    std::getline(lines, line);
    const OrderedJson all = parse_json<OrderedJson>(line, "golden");
    OrderedJson expected;
    expected["numbers"] = all["numbers"], expected["flag"] = all["flag"];
    CHECK(parse_json<OrderedJson>(row, "row") == expected);
  }
  CHECK(error_of([&] { reader.select({"absent"}); }) ==
        rows_golden("v2_plain.parquet") + ": column \"absent\": found no such column");
}

TEST_CASE(
    "parquet rows: a column that is not read is left out by name, and refused when selected") {
  const auto check = [](const std::string& name, const std::string& column, const std::string& why,
                        const std::string& first_row) {
    CAPTURE(name);
    JsonRows reader(rows_golden(name));
    REQUIRE(reader.left_out().size() == 1);
    CHECK(reader.left_out()[0].column == column);
    CHECK_MESSAGE(contains(reader.left_out()[0].why, why), reader.left_out()[0].why);
    CHECK(reader.columns() == std::vector<std::string>{"text"});
    CHECK(all_rows(reader).at(0) == first_row);
    CHECK(error_of([&] { reader.select({"text", column}); }) == reader.left_out()[0].why);
  };
  check("brotli.parquet", "numbers",
        "column \"numbers.list.element\": found codec BROTLI, expected UNCOMPRESSED, SNAPPY",
        R"({"text":"x"})");
  check("interval.parquet", "spans", "column \"spans\": found INTERVAL, expected",
        R"({"text":"x"})");
  CHECK(contains(error_of([] { JsonRows reader(golden("pyarrow_brotli")); }),
                 "column \"text\": found codec BROTLI"));
}

TEST_CASE("parquet rows: lists in every form that writers gave them") {
  const ThriftWriter root = group("schema", kRequired, 1);
  // [1, 2], [], [3]
  const MadeLeaf of_optional_list{{0, 1, 0, 0}, {2, 2, 1, 2}, integers({1, 2, 3})};
  const std::string lists = "{\"x\":[1,2]}\n{\"x\":[]}\n{\"x\":[3]}\n";
  constexpr int kListName = 3, kMapName = 1;  // converted types
  // Three levels; the names do not matter.
  CHECK(made_rows({root, group("x", kOptional, 1, kListName), group("bag", kRepeated, 1),
                   field("item", kRequired)},
                  {of_optional_list}, 3) == lists);
  // Two levels: the repeated field is the element.
  CHECK(made_rows({root, group("x", kOptional, 1, kListName), field("element", kRepeated)},
                  {of_optional_list}, 3) == lists);
  // A repeated field alone, in pages of bit-packed levels.
  CHECK(made_rows({root, field("x", kRepeated)},
                  {{{0, 1, 0, 0}, {1, 1, 0, 1}, integers({1, 2, 3}), kInt32, kPlain, true}},
                  3) == lists);
  // Two levels with groups: of two fields; of one, when it is named "array" or after the list.
  CHECK(made_rows({root, group("x", kOptional, 1, kListName), group("pair", kRepeated, 2),
                   field("a", kRequired), field("b", kRequired)},
                  {of_optional_list, of_optional_list}, 3) ==
        "{\"x\":[{\"a\":1,\"b\":1},{\"a\":2,\"b\":2}]}\n{\"x\":[]}\n{\"x\":[{\"a\":3,\"b\":3}]}\n");
  for (const char* name : {"array", "x_tuple"}) {
    CHECK(made_rows({root, group("x", kOptional, 1, kListName), group(name, kRepeated, 1),
                     field("a", kRequired)},
                    {of_optional_list},
                    3) == "{\"x\":[{\"a\":1},{\"a\":2}]}\n{\"x\":[]}\n{\"x\":[{\"a\":3}]}\n");
  }
  // A repeated group without an annotation.
  CHECK(made_rows({root, group("x", kRepeated, 1), field("a", kOptional)},
                  {{{0, 1, 0, 0}, {2, 1, 0, 2}, integers({1, 3})}},
                  3) == "{\"x\":[{\"a\":1},{\"a\":null}]}\n{\"x\":[]}\n{\"x\":[{\"a\":3}]}\n");
  // Lists of lists: [[1, 2], []], null, [[3]]; levels of two bits, packed.
  const std::vector<int> r = {0, 2, 1, 0, 0}, d = {4, 4, 3, 0, 4};
  for (const bool bit_packed : {false, true}) {
    CHECK(made_rows({root, group("x", kOptional, 1, kListName), group("list", kRepeated, 1),
                     group("element", kOptional, 1, kListName), field("list", kRepeated)},
                    {{r, d, integers({1, 2, 3}), kInt32, kPlain, bit_packed}},
                    3) == "{\"x\":[[1,2],[]]}\n{\"x\":null}\n{\"x\":[[3]]}\n");
  }
  // A map; keys that are no text are written in quotes. Where keys are groups, pairs.
  CHECK(made_rows({root, group("x", kOptional, 1, kMapName), group("map", kRepeated, 2),
                   field("key", kRequired), field("value", kRequired)},
                  {of_optional_list, of_optional_list},
                  3) == "{\"x\":{\"1\":1,\"2\":2}}\n{\"x\":{}}\n{\"x\":{\"3\":3}}\n");
  CHECK(made_rows({root, group("x", kOptional, 1, kMapName), group("map", kRepeated, 2),
                   group("key", kRequired, 1), field("k", kRequired), field("value", kRequired)},
                  {of_optional_list, of_optional_list}, 3) ==
        "{\"x\":[{\"key\":{\"k\":1},\"value\":1},{\"key\":{\"k\":2},\"value\":2}]}\n{\"x\":[]}\n"
        "{\"x\":[{\"key\":{\"k\":3},\"value\":3}]}\n");
  // A key of type JSON is a text.
  constexpr int kJsonName = 19;
  CHECK(made_rows({root, group("x", kRequired, 1, kMapName), group("map", kRepeated, 2),
                   field("key", kRequired, kByteArray, kJsonName), field("value", kRequired)},
                  {{{0}, {1}, little_endian(3) + "[1]", kByteArray}, {{0}, {1}, integers({1})}},
                  1) == "{\"x\":{\"[1]\":1}}\n");
}

TEST_CASE("parquet rows: levels that contradict each other are errors") {
  const ThriftWriter root = group("schema", kRequired, 1);
  const std::vector<ThriftWriter> pairs = {root, group("x", kOptional, 1, 3),
                                           group("list", kRepeated, 2), field("a", kRequired),
                                           field("b", kRequired)};
  const auto error = [&](const MadeLeaf& a, const MadeLeaf& b, int64_t rows) {
    return made_rows(pairs, {a, b}, rows);
  };
  const MadeLeaf two{{0, 1}, {2, 2}, integers({1, 2})}, one{{0}, {2}, integers({1})};
  const std::string others =
      "column \"x.list.b\": found lists of other lengths than in the columns";
  CHECK(error(two, two, 1) == "{\"x\":[{\"a\":1,\"b\":1},{\"a\":2,\"b\":2}]}\n");
  CHECK(error(two, one, 1) ==
        others + " beside it, expected equal ones; rows 1 to 1 cannot be read");
  CHECK(contains(error(one, two, 1), others));
  CHECK(contains(error(one, {{0}, {1}, ""}, 1), "\"x.list.b\": found level 1, expected 2 as in"));
  CHECK(contains(error({{0}, {1}, ""}, one, 1), "\"x.list.b\": found level 2, expected 1 as in"));
  CHECK(contains(error({{0}, {0}, ""}, {{0}, {1}, ""}, 1), "found level 1, expected 0 as in"));
  CHECK(contains(error({{1}, {2}, integers({1})}, one, 1), "found an element behind its row"));
  CHECK(contains(error({{0}, {3}, ""}, one, 1), "found level 3, expected 0 to 2"));
  CHECK(contains(error({{2}, {2}, ""}, one, 1), "found level 2, expected 0 to 1"));
  // Two rows, of which the second has no entry.
  CHECK(contains(error({{0, 1}, {2, 2}, integers({1, 2})}, two, 2), "rows 2 to 2 cannot be read"));
  // A few bytes that stand for more text than a row may have: a list of 4000 nulls.
  MadeLeaf nulls{std::vector<int>(4000, 1), std::vector<int>(4000, 2), integers({1})};
  nulls.repetitions[0] = 0, nulls.definitions[0] = 3, nulls.bit_packed = true;
  CHECK(contains(made_rows({root, group("x", kOptional, 1, 3), group("list", kRepeated, 1),
                            field("element", kOptional)},
                           {nulls}, 1),
                 "found a row of more than 10000 bytes as JSON"));
}

TEST_CASE("parquet rows: a damaged row group is an error, and the next one is read") {
  TempDir dir;
  const std::string path = dir / "x", bytes = read_file(rows_golden("v1_dictionary.parquet"));
  JsonRows whole(rows_golden("v1_dictionary.parquet"));
  const std::vector<std::string> rows = all_rows(whole);
  int damaged = 0;
  for (size_t i = 4; i < bytes.size() / 3; i += 13) {
    std::string changed = bytes;
    changed[i] = char(changed[i] ^ 0xff);
    write_file(path, changed);
    std::vector<std::string> good;
    int errors = 0;
    JsonRows reader(path);
    for (std::string json;;) {
      try {
        if (!reader.next(json)) break;
        if (reader.row() > 11) good.push_back(json);
      } catch (const Error& error) {
        errors++;
        CHECK_MESSAGE(contains(error.what(), " to 11 cannot be read"), error.what());
        CHECK(reader.row() == 11);
      }
    }
    damaged += errors;
    CHECK(errors <= 1);
    CHECK(good == std::vector<std::string>(rows.begin() + 11, rows.end()));
  }
  CHECK(damaged > 20);
}

TEST_CASE("parquet rows: numbers are written so that JSON reads the same ones") {
  const auto number = [](auto x) { return appended([&](auto& out) { append_number(out, x); }); };
  CHECK(number(0.1f) == "0.1");
  CHECK(number(0.1) == "0.1");
  CHECK(number(1. / 3) == "0.3333333333333333");
  CHECK(number(18.) == "18");
  CHECK(number(-0.) == "-0.0");
  CHECK(number(9007199254740992.) == "9.007199254740992e+15");
  CHECK(number(18446744073709551616.) == "1.8446744073709552e+19");
  CHECK(number(1e300) == "1e+300");
  CHECK(number(std::numeric_limits<double>::quiet_NaN()) == "null");
  CHECK(number(-std::numeric_limits<float>::infinity()) == "null");
  CHECK(float_of_half(0x3c00) == 1);
  CHECK(float_of_half(0xc000) == -2);
  CHECK(float_of_half(0x7bff) == 65504);
  CHECK(float_of_half(0x0001) == std::ldexp(1.f, -24));
  CHECK(std::isinf(float_of_half(0x7c00)));
  CHECK(std::isnan(float_of_half(0x7e00)));

  const auto decimal = [](std::string_view bytes, int64_t scale) {
    return appended([&](auto& out) { append_decimal(out, bytes, scale); });
  };
  using namespace std::string_view_literals;
  CHECK(decimal("\x04\xe2"sv, 2) == "12.50");
  CHECK(decimal("\xff"sv, 2) == "-0.01");
  CHECK(decimal("\0"sv, 0) == "0");
  CHECK(decimal(""sv, 1) == "0.0");
  CHECK(decimal("\x80\0\0\0\0\0\0\0"sv, 0) == "-9223372036854775808.0");
  CHECK(decimal("\0\xff\xff\xff\xff\xff\xff\xff\xff"sv, 4) == "1844674407370955.1615");
  CHECK(decimal("\x0d\xe0\xb6\xb3\xa7\x63\xff\xff"sv, 0) == "999999999999999999");
  CHECK(appended([](auto& out) {
          append_uuid(out, "\x01\x23\x45\x67\x89\xab\xcd\xef\xfe\xdc\xba\x98\x76\x54\x32\x10"sv);
        }) == "\"01234567-89ab-cdef-fedc-ba9876543210\"");
}

TEST_CASE("parquet rows: dates and times are written by ISO 8601") {
  const auto date = [](int64_t days) {
    return appended([&](auto& out) { append_date(out, days); });
  };
  CHECK(date(0) == "1970-01-01");
  CHECK(date(-1) == "1969-12-31");
  CHECK(date(19782) == "2024-02-29");
  CHECK(date(11016) == "2000-02-29");
  CHECK(date(2932896) == "9999-12-31");
  CHECK(date(2932897) == "+10000-01-01");
  CHECK(date(-719528) == "0000-01-01");
  CHECK(date(-719529) == "-0001-12-31");
  // Every day of 800 years follows the one before it.
  std::tm time{};
  for (int64_t day = -146097; day < 146097; day++) {
    const time_t seconds = time_t(day) * 86400;
    gmtime_r(&seconds, &time);
    REQUIRE(date(day) ==
            format("%04d-%02d-%02d", time.tm_year + 1900, time.tm_mon + 1, time.tm_mday));
  }
  const auto stamp = [](int64_t time, int unit) {
    return appended([&](auto& out) { append_timestamp(out, 0, time, unit); });
  };
  CHECK(stamp(0, 3) == "1970-01-01T00:00:00");
  CHECK(stamp(-1, 3) == "1969-12-31T23:59:59.999");
  CHECK(stamp(1500, 3) == "1970-01-01T00:00:01.5");
  CHECK(stamp(1001, 6) == "1970-01-01T00:00:00.001001");
  CHECK(stamp(std::numeric_limits<int64_t>::max(), 9) == "2262-04-11T23:47:16.854775807");
  CHECK(stamp(std::numeric_limits<int64_t>::min(), 9) == "1677-09-21T00:12:43.145224192");
  CHECK(appended([](auto& out) { append_time(out, 86399999999, 6); }) == "23:59:59.999999");
}

TEST_CASE("parquet rows: text is JSON, and JSON in a column is part of the row") {
  const auto string = [](std::string_view text) {
    return appended([&](auto& out) { append_json_string(out, text); });
  };
  CHECK(string("a\"b\\c\n\x01 é") == "\"a\\\"b\\\\c\\n\\u0001 é\"");
  CHECK(string("a\xff\xe6\x97z") == "\"a\xef\xbf\xbd\xef\xbf\xbdz\"");
  const auto embedded = [](const std::string& text) {
    return appended([&](auto& out) { append_embedded(out, text); });
  };
  CHECK(embedded("{\"a\":\n[1]}") == "{\"a\": [1]}");
  CHECK(embedded("{\"a\":") == "\"{\\\"a\\\":\"");
  CHECK(embedded("") == "\"\"");
  CHECK(embedded("1 2") == "\"1 2\"");
  CHECK(embedded("\"\xff\"") == "\"\\\"\xef\xbf\xbd\\\"\"");
  const std::string deep = std::string(201, '[') + std::string(201, ']');
  CHECK(embedded(deep) == "\"" + deep + "\"");
  CHECK(embedded(deep.substr(1, 400)) == deep.substr(1, 400));
}

}  // namespace cake::parquet
