// Parquet files written by pyarrow and by polars (dev/golden/parquet.py), files made here byte by
// byte with one lie each, and damage.
#include "cake/parquet.h"

#include <doctest/doctest.h>

#include <functional>

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
  CHECK(error("front") == path +
                              ": column \"front\": found encoding DELTA_BYTE_ARRAY, expected "
                              "PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY or DELTA_LENGTH_BYTE_ARRAY");
  CHECK(error("time") ==
        path + ": column \"time\": found INT64 with TIMESTAMP, expected strings or integers");
  CHECK(contains(error("fixed"), "\"fixed\": found FIXED_LEN_BYTE_ARRAY, expected"));
  CHECK(contains(error("flag"), "\"flag\": found BOOLEAN, expected"));
  CHECK(contains(error("absent"),
                 "\"absent\": found no such column, expected one of \"front\", \"text\""));
  reader.select({"text", "bytes"});  // what stands beside is read
  CHECK(read_all(reader) == std::vector<Row>{{"x", std::string("\xff\0", 2)}, {"y", ""}});

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
  finds("found encoding DELTA_BYTE_ARRAY, expected", [](MadeFile& f) { f.encoding = 7; });
  finds("found levels of encoding BIT_PACKED", [](MadeFile& f) { f.level_encoding = 4; });
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
  finds("found level 7, expected 0 or 1", [](MadeFile& f) { f.levels = "\x06\x07"; });
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
  finds("within an integer", [](MadeFile& f) {
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

}  // namespace cake::parquet
