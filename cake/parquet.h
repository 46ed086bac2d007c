// Parquet files, column by column: FineWeb and most data sets are published in this format.
//
//     footer (Thrift) -> schema, row groups -> select columns
//         -> for each column: page header (Thrift) -> page -> decompressed -> levels and values
//
// A file is a sequence of row groups. A row group holds one chunk for each column, a chunk is a
// sequence of pages, and a page holds entries: first their levels, then the values that are there.
// A flat column has one entry for each row, with a definition level (1: it has a value, 0: null;
// absent in columns without nulls). A column within lists has an entry for each element, and its
// levels say where the lists and rows begin (cake/parquet_rows.h). A chunk may begin with a
// dictionary page; its data pages then hold indices into the dictionary, and where the dictionary
// grew too large the writer goes on with plain values. The footer at the file's end says where
// each chunk is.
//
// Reader gives the values of flat columns of strings and integers, which is what corpora have;
// it refuses other columns by name when they are selected. cake/parquet_rows.h reads every column.
// Memory: one decompressed page and one dictionary of each selected column; the file itself is
// mapped, and what has been read of it is given back to the system.
//
// No number in a file is trusted: offsets, sizes and counts are compared with the bytes that are
// there before they are used. Whatever the bytes are, reading ends with rows or with an Error.
//
// The format: https://github.com/apache/parquet-format (README.md, Encodings.md, parquet.thrift)
// and Thrift's compact protocol, doc/specs/thrift-compact-protocol.md of Apache Thrift.
#pragma once

#include <snappy.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/json.h"
#include "cake/run.h"

namespace cake::parquet {

inline constexpr int64_t kMaxPageBytes = int64_t(1) << 30;  // of a decompressed page
inline constexpr int kMaxThriftDepth = 32;                  // the format itself needs 7

using ByteSpan = std::span<const unsigned char>;

// ---------------------------------------------------------------------------------------------
// Names of the format's numbers

enum PhysicalType {
  kBoolean = 0,
  kInt32 = 1,
  kInt64 = 2,
  kInt96 = 3,
  kFloat = 4,
  kDouble = 5,
  kByteArray = 6,
  kFixedBytes = 7
};
enum Logical {  // what the values mean
  kString = 1,
  kMap = 2,
  kList = 3,
  kEnum = 4,
  kDecimal = 5,
  kDate = 6,
  kTime = 7,
  kTimestamp = 8,
  kInterval = 9,
  kInteger = 10,
  kUnknown = 11,
  kJson = 12,
  kBson = 13,
  kUuid = 14,
  kFloat16 = 15,
  kVariant = 16
};
enum Repetition { kRequired = 0, kOptional = 1, kRepeated = 2 };
enum Codec { kUncompressed = 0, kSnappy = 1, kGzip = 2, kZstd = 6 };
enum PageType { kDataPage = 0, kIndexPage = 1, kDictionaryPage = 2, kDataPageV2 = 3 };
enum Encoding {
  kPlain = 0,
  kPlainDictionary = 2,
  kRle = 3,
  kBitPacked = 4,
  kDeltaBinaryPacked = 5,
  kDeltaLengthByteArray = 6,
  kDeltaByteArray = 7,
  kRleDictionary = 8,
  kByteStreamSplit = 9
};

template <size_t N>
std::string name_of(const std::array<const char*, N>& names, int64_t number) {
  const bool known = number >= 0 && number < int64_t(N) && names[size_t(number)];
  return known ? names[size_t(number)] : concat("number ", number);
}
inline std::string type_name(int64_t type) {
  return name_of(std::array{"BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY",
                            "FIXED_LEN_BYTE_ARRAY"},
                 type);
}
inline std::string codec_name(int64_t codec) {
  return name_of(
      std::array{"UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW"},
      codec);
}
inline std::string encoding_name(int64_t encoding) {
  return name_of(
      std::array<const char*, 10>{"PLAIN", nullptr, "PLAIN_DICTIONARY", "RLE", "BIT_PACKED",
                                  "DELTA_BINARY_PACKED", "DELTA_LENGTH_BYTE_ARRAY",
                                  "DELTA_BYTE_ARRAY", "RLE_DICTIONARY", "BYTE_STREAM_SPLIT"},
      encoding);
}
inline std::string converted_name(int64_t converted) {  // the older annotation of a type
  return name_of(std::array{"UTF8",
                            "MAP",
                            "MAP_KEY_VALUE",
                            "LIST",
                            "ENUM",
                            "DECIMAL",
                            "DATE",
                            "TIME_MILLIS",
                            "TIME_MICROS",
                            "TIMESTAMP_MILLIS",
                            "TIMESTAMP_MICROS",
                            "UINT_8",
                            "UINT_16",
                            "UINT_32",
                            "UINT_64",
                            "INT_8",
                            "INT_16",
                            "INT_32",
                            "INT_64",
                            "JSON",
                            "BSON",
                            "INTERVAL"},
                 converted);
}
inline std::string logical_name(int64_t logical) {  // the newer one
  return name_of(
      std::array<const char*, 19>{nullptr, "STRING", "MAP", "LIST", "ENUM", "DECIMAL", "DATE",
                                  "TIME", "TIMESTAMP", "INTERVAL", "INTEGER", "UNKNOWN", "JSON",
                                  "BSON", "UUID", "FLOAT16", "VARIANT", "GEOMETRY", "GEOGRAPHY"},
      logical);
}

// ---------------------------------------------------------------------------------------------
// Thrift's compact protocol: structs of numbered fields, each with its type

class ThriftReader {
 public:
  enum Type {
    kStop = 0,
    kTrue = 1,
    kFalse = 2,
    kByte = 3,
    kI16 = 4,
    kI32 = 5,
    kI64 = 6,
    kDouble = 7,
    kBinary = 8,
    kList = 9,
    kSet = 10,
    kMap = 11,
    kStruct = 12
  };

  // `where` names the place in errors and must outlive the reader.
  ThriftReader(ByteSpan bytes, const std::string& where) : bytes_(bytes), where_(where) {}

  size_t offset() const { return offset_; }

  // Calls visit(field's number, type) for each field of a struct; visit reads the field's value
  // and returns true, or returns false, and the value is skipped.
  template <class Visit>
  void read_struct(Visit visit) {
    enter();
    for (int64_t id = 0;;) {
      const int header = byte();
      const int type = header & 15;
      if (header == 0) break;
      id = header >> 4 ? id + (header >> 4) : zigzag();
      if (type == kStop || id < 0 || id > 32767) {
        fail(where_, ": found no Thrift field, expected one at byte ", offset_ - 1);
      }
      if (!visit(int(id), type)) skip(type);
    }
    depth_--;
  }

  // Calls visit() for each element of a list of structs or integers, which must read it.
  template <class Visit>
  void read_list(int type, Type expected, Visit visit) {
    expect(type, kList, "a list");
    const auto [n, element] = list_header();
    if (n > 0) expect(element, expected, expected == kStruct ? "structs" : "integers");
    for (uint64_t i = 0; i < n; i++) visit();
  }

  int64_t read_integer(int type) {
    if (type == kByte) return int8_t(byte());
    if (type != kI16 && type != kI64) expect(type, kI32, "an integer");
    return zigzag();
  }

  bool read_bool(int type) {  // the type of a field holds its value
    if (type != kTrue) expect(type, kFalse, "true or false");
    return type == kTrue;
  }

  std::string read_string(int type) {
    expect(type, kBinary, "a string");
    const ByteSpan bytes = binary();
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

 private:
  void expect(int type, int expected, const char* what) {
    if (type == expected) return;
    fail(where_, ": found Thrift type ", type, " before byte ", offset_, ", expected ", what);
  }

  void enter() {
    if (++depth_ > kMaxThriftDepth) {
      fail(where_, ": found more than ", kMaxThriftDepth, " levels of Thrift, expected fewer");
    }
  }

  [[noreturn]] void ended() {
    fail(where_, ": found the end of ", bytes_.size(), " bytes within Thrift data, expected more");
  }

  int byte() {
    if (offset_ == bytes_.size()) ended();
    return bytes_[offset_++];
  }

  uint64_t varint() {
    uint64_t x = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const uint64_t b = uint64_t(byte());
      x |= (b & 127) << shift;
      if (b < 128) return x;
    }
    fail(where_, ": found a Thrift number of more than 64 bits before byte ", offset_,
         ", expected fewer");
  }

  int64_t zigzag() {
    const uint64_t x = varint();
    return int64_t(x >> 1 ^ (0 - (x & 1)));
  }

  ByteSpan binary() {
    const uint64_t n = varint();
    if (n > bytes_.size() - offset_) ended();
    offset_ += size_t(n);
    return bytes_.subspan(offset_ - size_t(n), size_t(n));
  }

  std::pair<uint64_t, int> list_header() {
    const int header = byte();
    const uint64_t n = header >> 4 == 15 ? varint() : uint64_t(header >> 4);
    if (n > bytes_.size() - offset_) ended();  // an element has a byte at least
    return {n, header & 15};
  }

  void skip(int type) {
    if (type == kTrue || type == kFalse) return;
    skip_element(type);
  }

  void skip_element(int type) {  // in a list, true and false have a byte too
    switch (type) {
      case kTrue:
      case kFalse:
      case kByte:
        byte();
        return;
      case kI16:
      case kI32:
      case kI64:
        varint();
        return;
      case kDouble:
        for (int i = 0; i < 8; i++) byte();
        return;
      case kBinary:
        binary();
        return;
      case kList:
      case kSet: {
        enter();
        const auto [n, element] = list_header();
        for (uint64_t i = 0; i < n; i++) skip_element(element);
        depth_--;
        return;
      }
      case kMap: {
        enter();
        const uint64_t n = varint();
        const int types = n ? byte() : 0;
        for (uint64_t i = 0; i < n; i++) skip_element(types >> 4), skip_element(types & 15);
        depth_--;
        return;
      }
      case kStruct:
        read_struct([](int, int) { return false; });
        return;
      default:
        fail(where_, ": found Thrift type ", type, " before byte ", offset_, ", expected 1 to 12");
    }
  }

  ByteSpan bytes_;
  const std::string& where_;
  size_t offset_ = 0;
  int depth_ = 0;
};

// ---------------------------------------------------------------------------------------------
// The footer: schema and row groups

struct SchemaElement {
  std::string name;
  int64_t type = -1, type_length = 0, repetition = kRequired, children = 0;
  int64_t converted = -1, logical = -1;  // the older annotation, the newer one
  int64_t meaning = -1;                  // Logical: what either of them says; -1: neither
  int64_t scale = 0;                     // DECIMAL: digits behind the point
  int unit_digits = 0;                   // TIME, TIMESTAMP: 3, 6, 9: milli-, micro-, nanoseconds
  bool is_utc = false;                   // TIME, TIMESTAMP: adjusted to UTC
  bool is_signed = true;                 // INTEGER

  bool is_group() const { return type < 0 || children > 0; }
};

struct Leaf {           // a column of values
  int64_t number = -1;  // among the chunks of a row group
  int64_t type = -1;    // PhysicalType
  int64_t type_length = 0;
  // The levels of an entry that has a value: how many of its ancestors and itself are optional or
  // repeated; how many are repeated.
  int max_definition = 0, max_repetition = 0;
};

struct Column {  // at the schema's top
  enum Kind { text, integer, other };
  std::string name;
  Kind kind = other;
  std::string found;  // its type, for errors: "DOUBLE", "INT64 with TIMESTAMP", "a nested column"
  Leaf leaf;          // of a flat column
  bool is_unsigned = false;
};

struct Chunk {  // of one column in one row group
  int64_t type = -1, codec = -1, values = -1, bytes = -1;
  int64_t data_offset = -1, dictionary_offset = -1;  // in the file; -1 or 0: no dictionary
  uint32_t encodings = 0;                            // bit i: Encoding i occurs
  bool in_other_file = false;
};

struct RowGroup {
  int64_t first_row = 0, rows = -1;
  std::vector<Chunk> chunks;  // one for each leaf of the schema
};

struct Footer {
  int64_t rows = -1;
  std::vector<SchemaElement> schema;  // a tree, depth first
  std::vector<Column> columns;
  std::vector<RowGroup> groups;
};

// The annotation of time: whether it is in UTC, and its unit, a union.
inline void read_time(ThriftReader& in, SchemaElement& e) {
  in.read_struct([&](int field, int type) {
    if (field == 1) return e.is_utc = in.read_bool(type), true;
    if (field != 2 || type != ThriftReader::kStruct) return false;
    in.read_struct([&](int unit, int) {
      e.unit_digits = unit >= 1 && unit <= 3 ? 3 * unit : 0;
      return false;
    });
    return true;
  });
}

// The newer annotation, a union: one field.
inline void read_logical(ThriftReader& in, SchemaElement& e) {
  in.read_struct([&](int logical, int type) {
    e.logical = logical;
    if (type != ThriftReader::kStruct) return false;
    if (logical == kTime || logical == kTimestamp) return read_time(in, e), true;
    if (logical != kDecimal && logical != kInteger) return false;
    in.read_struct([&](int field, int field_type) {
      if (logical == kDecimal && field == 1) return e.scale = in.read_integer(field_type), true;
      if (logical == kInteger && field == 2) return e.is_signed = in.read_bool(field_type), true;
      return false;
    });
    return true;
  });
}

inline SchemaElement read_schema_element(ThriftReader& in) {
  SchemaElement e;
  in.read_struct([&](int id, int type) {
    if (id == 1) return e.type = in.read_integer(type), true;
    if (id == 2) return e.type_length = in.read_integer(type), true;
    if (id == 3) return e.repetition = in.read_integer(type), true;
    if (id == 4) return e.name = in.read_string(type), true;
    if (id == 5) return e.children = in.read_integer(type), true;
    if (id == 6) return e.converted = in.read_integer(type), true;
    if (id == 7) return e.scale = in.read_integer(type), true;
    if (id != 10 || type != ThriftReader::kStruct) return false;
    read_logical(in, e);
    return true;
  });
  e.meaning = e.logical;
  if (e.logical >= 0 || e.converted < 0 || e.converted > 21) return e;
  static constexpr int kMeanings[] = {
      kString,  kMap,       kMap,       kList,    kEnum,    kDecimal, kDate,    kTime,
      kTime,    kTimestamp, kTimestamp, kInteger, kInteger, kInteger, kInteger, kInteger,
      kInteger, kInteger,   kInteger,   kJson,    kBson,    kInterval};
  e.meaning = kMeanings[e.converted];
  e.is_signed = e.converted < 11 || e.converted > 14;            // UINT_8 to UINT_64
  e.unit_digits = e.converted == 7 || e.converted == 9 ? 3 : 6;  // _MILLIS, _MICROS
  return e;
}

// What a column at the schema's top can be read as. `number`: of the next leaf.
inline Column make_column(const SchemaElement& e, int64_t number) {
  Column c;
  c.name = e.name;
  if (e.is_group() || e.repetition == kRepeated) {
    c.found = "a nested column";
    return c;
  }
  c.leaf = {number, e.type, e.type_length, e.repetition == kOptional, 0};
  const bool annotated = e.logical >= 0 || e.converted >= 0;
  c.found = type_name(e.type);
  if (annotated) {
    c.found += " with " + (e.logical >= 0 ? logical_name(e.logical) : converted_name(e.converted));
  }
  if (e.type == kByteArray) {
    const bool text = e.meaning == kString || e.meaning == kEnum || e.meaning == kJson;
    if (text || !annotated) c.kind = Column::text;
  } else if (e.type == kInt32 || e.type == kInt64) {
    if (e.meaning == kInteger || !annotated) c.kind = Column::integer;
    c.is_unsigned = !e.is_signed;
  }
  return c;
}

// The schema is a tree, written depth first. Returns the number of its leaves.
inline int64_t make_columns(const std::vector<SchemaElement>& schema, std::vector<Column>& columns,
                            const std::string& where) {
  int64_t leaves = 0;
  size_t i = 1;
  const auto next = [&]() -> const SchemaElement& {
    if (i >= schema.size() || schema[i].children < 0 ||
        schema[i].children > int64_t(schema.size())) {
      fail(where, ": found a schema of ", schema.size(),
           " elements that is no tree, expected the children that it counts");
    }
    return schema[i++];
  };
  if (schema.empty()) fail(where, ": found no schema, expected one");
  for (int64_t n = 0; n < schema[0].children; n++) {
    const SchemaElement& top = next();
    columns.push_back(make_column(top, leaves));
    if (!top.is_group()) leaves++;
    for (int64_t below = top.children; below > 0; below--) {
      const SchemaElement& e = next();
      below += e.children;
      if (!e.is_group()) leaves++;
    }
  }
  require(i == schema.size(), where, ": found ", schema.size(),
          " elements of the schema, expected ", i);
  return leaves;
}

inline Chunk read_chunk(ThriftReader& in, const std::string& where) {
  Chunk c;
  in.read_struct([&](int id, int type) {
    if (id == 1) return c.in_other_file = true, false;
    if (id != 3 || type != ThriftReader::kStruct) return false;
    in.read_struct([&](int field, int field_type) {
      int64_t* number = field == 1    ? &c.type
                        : field == 4  ? &c.codec
                        : field == 5  ? &c.values
                        : field == 7  ? &c.bytes
                        : field == 9  ? &c.data_offset
                        : field == 11 ? &c.dictionary_offset
                                      : nullptr;
      if (number) return *number = in.read_integer(field_type), true;
      if (field != 2) return false;
      in.read_list(field_type, ThriftReader::kI32, [&] {
        const int64_t encoding = in.read_integer(ThriftReader::kI32);
        c.encodings |= uint32_t(1) << (encoding >= 0 && encoding < 31 ? encoding : 31);
      });
      return true;
    });
    return true;
  });
  if (c.type < 0 || c.codec < 0 || c.values < 0 || c.bytes < 0 || c.data_offset < 0) {
    fail(where, ": found a column chunk without its numbers, expected type, codec, ",
         "num_values, total_compressed_size and data_page_offset");
  }
  return c;
}

inline Footer read_footer(ByteSpan bytes, const std::string& where) {
  Footer footer;
  std::vector<SchemaElement>& schema = footer.schema;
  ThriftReader in(bytes, where);
  in.read_struct([&](int id, int type) {
    if (id == 3) return footer.rows = in.read_integer(type), true;
    if (id == 2) {
      in.read_list(type, ThriftReader::kStruct, [&] { schema.push_back(read_schema_element(in)); });
      return true;
    }
    if (id != 4) return false;
    in.read_list(type, ThriftReader::kStruct, [&] {
      RowGroup& group = footer.groups.emplace_back();
      in.read_struct([&](int field, int field_type) {
        if (field == 3) return group.rows = in.read_integer(field_type), true;
        if (field != 1) return false;
        in.read_list(field_type, ThriftReader::kStruct,
                     [&] { group.chunks.push_back(read_chunk(in, where)); });
        return true;
      });
    });
    return true;
  });

  const int64_t leaves = make_columns(schema, footer.columns, where);
  int64_t rows = 0;
  for (RowGroup& group : footer.groups) {
    group.first_row = rows;
    if (group.rows < 0 || group.rows > footer.rows - rows) {
      fail(where, ": found a row group of ", group.rows, " rows behind ", rows,
           " others, expected ", footer.rows, " rows in all");
    }
    rows += group.rows;
    if (int64_t(group.chunks.size()) != leaves) {
      fail(where, ": found a row group of ", group.chunks.size(), " columns, expected ", leaves);
    }
  }
  require(rows == footer.rows, where, ": found ", rows, " rows in the row groups, expected ",
          footer.rows);
  return footer;
}

// ---------------------------------------------------------------------------------------------
// Decompression

class PageBuffer {  // memory that is written before it is read
 public:
  unsigned char* resize(size_t bytes) {
    if (bytes > capacity_) {
      bytes_.reset();
      bytes_ = std::make_unique_for_overwrite<unsigned char[]>(bytes);
      capacity_ = bytes;
    }
    return bytes_.get();
  }

 private:
  std::unique_ptr<unsigned char[]> bytes_;
  size_t capacity_ = 0;
};

// Writes `out`, `size` bytes; false where the gzip members hold another number.
inline bool gunzip(ByteSpan packed, unsigned char* out, size_t size) {
  z_stream z = {};
  if (inflateInit2(&z, 15 + 32) != Z_OK) throw std::bad_alloc();  // + 32: gzip or zlib's format
  z.next_in = const_cast<unsigned char*>(packed.data());
  z.avail_in = uInt(packed.size());
  z.next_out = out;
  z.avail_out = uInt(size);
  int status = inflate(&z, Z_FINISH);
  while (status == Z_STREAM_END && z.avail_out > 0 && z.avail_in > 0) {
    inflateReset(&z);
    status = inflate(&z, Z_FINISH);
  }
  inflateEnd(&z);
  return status == Z_STREAM_END && z.avail_out == 0;
}

// The `size` bytes that `packed` holds: `packed` itself, or in `buffer`.
inline ByteSpan decompress(int64_t codec, ByteSpan packed, size_t size, PageBuffer& buffer,
                           const std::string& where) {
  if (codec == kUncompressed) {
    if (packed.size() != size) {
      fail(where, ": found an uncompressed page of ", packed.size(), " bytes, expected ", size);
    }
    return packed;
  }
  if (size == 0) return {};
  unsigned char* out = buffer.resize(size);
  const char* src = reinterpret_cast<const char*>(packed.data());
  bool good = false;
  if (codec == kSnappy) {
    size_t found = 0;
    good = snappy::GetUncompressedLength(src, packed.size(), &found) && found == size &&
           snappy::RawUncompress(src, packed.size(), reinterpret_cast<char*>(out));
  } else if (codec == kGzip) {
    good = gunzip(packed, out, size);
  } else if (codec == kZstd) {
    good = ZSTD_decompress(out, size, src, packed.size()) == size;
  }
  if (!good) {
    fail(where, ": found damaged ", codec_name(codec), " data in a page of ", packed.size(),
         " bytes, expected ", size, " bytes when decompressed");
  }
  return {out, size};
}

// ---------------------------------------------------------------------------------------------
// Values of a page. `where` names the column in errors and must outlive the readers.

template <class T>
T load_little_endian(const unsigned char* bytes) {
  T x;
  std::memcpy(&x, bytes, sizeof x);
  return x;
}

// `width` bits, 0 to 64, from the `bit`-th bit of `bytes` on, lowest first. They must be there.
inline uint64_t load_bits(ByteSpan bytes, uint64_t bit, int width) {
  const size_t begin = size_t(bit / 8), shift = size_t(bit % 8);
  const size_t n = (shift + size_t(width) + 7) / 8;  // bytes that are touched, 0 to 9
  unsigned char window[16] = {};
  std::memcpy(window, bytes.data() + begin, n);
  uint64_t x = load_little_endian<uint64_t>(window) >> shift;
  if (n > 8) x |= uint64_t(window[8]) << (64 - shift);  // then shift > 0
  return width == 64 ? x : x & ((uint64_t(1) << width) - 1);
}

inline uint64_t load_varint(ByteSpan bytes, size_t& offset, const std::string& where) {
  uint64_t x = 0;
  for (int shift = 0; shift < 64 && offset < bytes.size(); shift += 7) {
    const uint64_t b = bytes[offset++];
    x |= (b & 127) << shift;
    if (b < 128) return x;
  }
  fail(where, ": found a number that does not end in a page, expected it to");
}

// Encoding RLE: runs of one number, and groups of 8 numbers that are packed.
class RleReader {
 public:
  RleReader() = default;
  RleReader(ByteSpan bytes, int width) : bytes_(bytes), width_(width) {}

  // Encoding BIT_PACKED, which early writers used for levels: one group, highest bits first.
  static RleReader bit_packed(ByteSpan bytes, int width) {
    RleReader reader(bytes, width);
    reader.packed_ = reader.highest_first_ = true;
    reader.left_ = std::numeric_limits<int64_t>::max();
    return reader;
  }

  uint32_t next(const std::string& where) {
    while (left_ == 0) next_run(where);
    left_--;
    if (!packed_) return value_;
    const uint64_t bit = bit_;
    bit_ += uint64_t(width_);
    if (bit_ > bytes_.size() * 8) {
      fail(where, ": found a page that ends within packed numbers, expected more bytes");
    }
    offset_ = size_t((bit_ + 7) / 8);
    if (highest_first_) {
      uint32_t x = 0;
      for (uint64_t b = bit; b < bit_; b++) x = x << 1 | (bytes_[b / 8] >> (7 - b % 8) & 1u);
      return x;
    }
    return uint32_t(load_bits(bytes_, bit, width_));
  }

 private:
  void next_run(const std::string& where) {
    if (offset_ >= bytes_.size()) {
      fail(where, ": found a page with fewer levels or indices than it counts, expected all");
    }
    const uint64_t header = load_varint(bytes_, offset_, where);
    if (header >> 32) fail(where, ": found a run of ", header >> 1, " numbers, expected fewer");
    packed_ = header & 1;
    left_ = int64_t(header >> 1) * (packed_ ? 8 : 1);
    bit_ = uint64_t(offset_) * 8;
    if (packed_) return;
    const size_t n = size_t(width_ + 7) / 8;
    if (n > bytes_.size() - offset_) {
      fail(where, ": found a page that ends within a run, expected more bytes");
    }
    value_ = 0;
    std::memcpy(&value_, bytes_.data() + offset_, n);
    offset_ += n;
  }

  ByteSpan bytes_;
  int width_ = 0;  // bits of a number, 0 to 32
  size_t offset_ = 0;
  int64_t left_ = 0;  // of the run
  bool packed_ = false, highest_first_ = false;
  uint32_t value_ = 0;  // of the run
  uint64_t bit_ = 0;    // of the next packed number
};

// Encoding DELTA_BINARY_PACKED: the first number, then blocks of differences. A block has its
// least difference and some miniblocks, each with a width of its own.
class DeltaReader {
 public:
  DeltaReader() = default;
  DeltaReader(ByteSpan bytes, const std::string& where) : bytes_(bytes) {
    const uint64_t block = load_varint(bytes_, offset_, where);
    miniblocks_ = load_varint(bytes_, offset_, where);
    left_ = load_varint(bytes_, offset_, where);
    value_ = zigzag(where);
    if (block == 0 || block >> 31 || miniblocks_ == 0 || miniblocks_ > block ||
        block % miniblocks_ != 0 || block / miniblocks_ % 32 != 0) {
      fail(where, ": found delta blocks of ", block, " numbers in ", miniblocks_,
           " parts, expected parts of a multiple of 32");
    }
    numbers_ = block / miniblocks_;
    miniblock_ = miniblocks_;
    first_ = true;
  }

  uint64_t next(const std::string& where) {
    if (left_ == 0) {
      fail(where, ": found a page with fewer numbers than it counts, expected all");
    }
    left_--;
    if (std::exchange(first_, false)) return value_;
    if (left_in_miniblock_ == 0) next_miniblock(where);
    left_in_miniblock_--;
    value_ += least_ + load_bits(bytes_, bit_, width_);
    bit_ += uint64_t(width_);
    return value_;
  }

  // The offset behind all blocks.
  size_t end(const std::string& where) const {
    DeltaReader walk = *this;
    if (walk.left_ > 0 && std::exchange(walk.first_, false)) walk.left_--;
    while (walk.left_ > 0) {
      walk.next_miniblock(where);
      walk.left_ -= std::min(walk.left_, numbers_);
    }
    return walk.offset_;
  }

 private:
  uint64_t zigzag(const std::string& where) {
    const uint64_t x = load_varint(bytes_, offset_, where);
    return x >> 1 ^ (0 - (x & 1));
  }

  void next_miniblock(const std::string& where) {
    if (miniblock_ == miniblocks_) {
      least_ = zigzag(where);
      widths_ = offset_;
      if (miniblocks_ > bytes_.size() - offset_) {
        fail(where, ": found a page that ends within a delta block, expected more bytes");
      }
      offset_ += size_t(miniblocks_);
      miniblock_ = 0;
    }
    width_ = bytes_[widths_ + size_t(miniblock_++)];
    const uint64_t bytes = uint64_t(width_) * numbers_ / 8;
    if (width_ > 64 || bytes > bytes_.size() - offset_) {
      fail(where, ": found ", numbers_, " packed differences of ", width_,
           " bits that end outside of their page, expected them inside");
    }
    bit_ = uint64_t(offset_) * 8;
    offset_ += size_t(bytes);
    left_in_miniblock_ = numbers_;
  }

  ByteSpan bytes_;
  size_t offset_ = 0;                      // behind the last miniblock begun
  uint64_t miniblocks_ = 0, numbers_ = 0;  // of a block; of a miniblock
  uint64_t left_ = 0, value_ = 0, least_ = 0;
  bool first_ = false;
  size_t widths_ = 0;  // offset of the block's widths
  uint64_t miniblock_ = 0, left_in_miniblock_ = 0, bit_ = 0;
  int width_ = 0;
};

// ---------------------------------------------------------------------------------------------
// A column of one row group: its pages, one after another

struct PageHeader {
  int64_t type = -1, size = -1, compressed_size = -1;  // bytes
  std::optional<uint32_t> crc;                         // of the bytes behind the header
  int64_t values = -1, encoding = -1;
  int64_t definition_encoding = kRle, repetition_encoding = kRle;  // v1
  int64_t definition_bytes = 0, repetition_bytes = 0;              // v2
  bool is_compressed = true;                                       // v2
};

inline PageHeader read_page_header(ThriftReader& in) {
  PageHeader h;
  in.read_struct([&](int id, int type) {
    if (id == 1) return h.type = in.read_integer(type), true;
    if (id == 2) return h.size = in.read_integer(type), true;
    if (id == 3) return h.compressed_size = in.read_integer(type), true;
    if (id == 4) return h.crc = uint32_t(in.read_integer(type)), true;
    const bool v2 = id == 8;
    if ((id != 5 && id != 7 && !v2) || type != ThriftReader::kStruct) return false;
    in.read_struct([&](int field, int field_type) {
      if (field == 1) return h.values = in.read_integer(field_type), true;
      if (field == (v2 ? 4 : 2)) return h.encoding = in.read_integer(field_type), true;
      if (id == 5 && field == 3) return h.definition_encoding = in.read_integer(field_type), true;
      if (id == 5 && field == 4) return h.repetition_encoding = in.read_integer(field_type), true;
      if (v2 && field == 5) return h.definition_bytes = in.read_integer(field_type), true;
      if (v2 && field == 6) return h.repetition_bytes = in.read_integer(field_type), true;
      if (v2 && field == 7) return h.is_compressed = in.read_bool(field_type), true;
      return false;
    });
    return true;
  });
  return h;
}

class ColumnReader {
 public:
  // file: up to the footer. `where`: "file.parquet: column "text"".
  ColumnReader(ByteSpan file, const Leaf& leaf, std::string where, int64_t max_page_bytes)
      : file_(file),
        leaf_(leaf),
        is_bytes_(leaf.type == kByteArray || leaf.type == kFixedBytes || leaf.type == kInt96),
        width_(width_of(leaf)),
        where_(std::move(where)),
        max_page_bytes_(max_page_bytes) {}
  ColumnReader(const ColumnReader&) = delete;

  const std::string& where() const { return where_; }

  // Fails where this reader does not read what the footer names: a type, codec or encoding.
  void check_known(const Chunk& chunk) const {
    require(!chunk.in_other_file, where_, ": found values in another file, expected them in this");
    if (leaf_.type > kFixedBytes || (leaf_.type == kFixedBytes && width_ == 0)) {
      fail(where_, ": found ", type_name(leaf_.type), " of ", leaf_.type_length,
           " bytes, expected 1 or more of a known type");
    }
    if (chunk.codec != kUncompressed && chunk.codec != kSnappy && chunk.codec != kGzip &&
        chunk.codec != kZstd) {
      fail(where_, ": found codec ", codec_name(chunk.codec),
           ", expected UNCOMPRESSED, SNAPPY, GZIP or ZSTD");
    }
    const uint32_t of_levels = 1u << kRle | 1u << kBitPacked;
    for (int e = 0; e < 32; e++) {
      if ((chunk.encodings & ~of_levels) >> e & 1) check_encoding(e);
    }
  }

  // Fails where the chunk cannot be read in this row group, as far as the footer tells.
  void check(const Chunk& chunk, int64_t rows) const {
    check_known(chunk);
    if (chunk.type != leaf_.type) {
      fail(where_, ": found values of ", type_name(chunk.type), ", expected ",
           type_name(leaf_.type), " as the schema says");
    }
    if (leaf_.max_repetition > 0 ? chunk.values < rows : chunk.values != rows) {
      fail(where_, ": found ", chunk.values, " values in a row group, expected ", rows,
           leaf_.max_repetition > 0 ? " or more" : "");
    }
    if (rows == 0) return;  // where pages would be is not written
    const int64_t begin = first_offset(chunk), size = int64_t(file_.size());
    if (begin < 4 || begin > size || chunk.bytes > size - begin) {
      fail(where_, ": found ", chunk.bytes, " bytes of pages at offset ", begin,
           ", expected them between the offsets 4 and ", size);
    }
  }

  // Goes to the first row of a row group.
  void open(const Chunk& chunk, int64_t rows) {
    check(chunk, rows);
    release(page_begin_, offset_);
    codec_ = chunk.codec;
    offset_ = page_begin_ = size_t(first_offset(chunk));
    end_ = offset_ + size_t(chunk.bytes);
    entries_left_ = rows == 0 ? 0 : chunk.values;
    page_left_ = 0;
    has_dictionary_ = peeked_ = false;
  }

  // The next rows. No entry may be peeked at.
  void skip(int64_t rows) {
    for (; leaf_.max_repetition > 0 && rows > 0; rows--) {
      do {
        if (definition() == leaf_.max_definition) skip_value();
        pop();
      } while (repetition() > 0);
    }
    while (rows > 0) {
      while (page_left_ == 0) next_page();
      if (!page_is_loaded_ && rows >= page_left_) {  // whole, without decompressing it
        rows -= page_left_;
        page_left_ = 0;
        continue;
      }
      for (; rows > 0 && page_left_ > 0; rows--) {
        if (next_entry()) skip_value();
      }
    }
  }

  // Goes to the next entry, and says whether it has a value, which must be read before the next
  // entry: by next_text() where is_bytes(), otherwise by next_number().
  bool next_entry() {
    while (page_left_ == 0) next_page();
    if (!page_is_loaded_) load_page();
    page_left_--;
    if (leaf_.max_repetition > 0) {
      repetition_ = next_level(repetitions_, leaf_.max_repetition);
    }
    if (leaf_.max_definition > 0) {
      definition_ = next_level(definitions_, leaf_.max_definition);
    }
    return definition_ == leaf_.max_definition;
  }

  // The levels of the next entry, which stays the next until pop(). Its value must be read before.
  int definition() {
    if (!peeked_) next_entry();
    peeked_ = true;
    return definition_;
  }
  int repetition() {  // 0 behind the row group's last entry
    if (!peeked_ && page_left_ == 0 && entries_left_ == 0) return 0;
    definition();
    return repetition_;
  }
  void pop() { peeked_ = false; }
  bool begins_row() { return leaf_.max_repetition == 0 || repetition() == 0; }

  bool is_bytes() const { return is_bytes_; }

  // BYTE_ARRAY, FIXED_LEN_BYTE_ARRAY and INT96; valid until the next entry.
  std::string_view next_text() {
    if (!values_are_begun_) begin_values();
    switch (header_.encoding) {
      case kPlain:
        return plain_text(values_, value_offset_);
      case kDeltaLengthByteArray:
        return cut_text(values_, value_offset_, delta_.next(where_));
      case kDeltaByteArray:
        return next_with_prefix();
      case kByteStreamSplit:
        joined_.resize(width_);
        join_streams(joined_.data());
        return joined_;
      default:
        size_t offset = size_t(next_index());
        offset = width_ > 0 ? offset * width_ : dictionary_begins_[offset];
        return plain_text(dictionary_, offset);
    }
  }

  // The bits of BOOLEAN, INT32, INT64, FLOAT and DOUBLE. Of INT32 and FLOAT the low 32 count.
  uint64_t next_number() {
    if (!values_are_begun_) begin_values();
    switch (header_.encoding) {
      case kPlain:
        return leaf_.type == kBoolean ? plain_bit() : plain_number(values_, value_offset_);
      case kRle:
        return indices_.next(where_);
      case kDeltaBinaryPacked:
        return delta_.next(where_);
      case kByteStreamSplit: {
        unsigned char bytes[8] = {};
        join_streams(reinterpret_cast<char*>(bytes));
        return load_little_endian<uint64_t>(bytes);
      }
      default:
        size_t offset = size_t(next_index()) * width_;
        return plain_number(dictionary_, offset);
    }
  }

 private:
  // Bytes of a value; 0: BOOLEAN and BYTE_ARRAY, which have no such number.
  static size_t width_of(const Leaf& leaf) {
    switch (leaf.type) {
      case kInt32:
      case kFloat:
        return 4;
      case kInt64:
      case kDouble:
        return 8;
      case kInt96:
        return 12;
      case kFixedBytes:
        return size_t(std::clamp<int64_t>(leaf.type_length, 0, 1 << 30));
      default:
        return 0;
    }
  }

  static int64_t first_offset(const Chunk& chunk) {
    const bool dictionary =
        chunk.dictionary_offset > 0 && chunk.dictionary_offset < chunk.data_offset;
    return dictionary ? chunk.dictionary_offset : chunk.data_offset;
  }

  bool knows_encoding(int64_t encoding) const {
    const int64_t type = leaf_.type;
    const bool integer = type == kInt32 || type == kInt64;
    switch (encoding) {
      case kPlain:
        return true;
      case kPlainDictionary:
      case kRleDictionary:
        return type != kBoolean;
      case kRle:
        return type == kBoolean;
      case kDeltaBinaryPacked:
        return integer;
      case kDeltaLengthByteArray:
        return type == kByteArray;
      case kDeltaByteArray:
        return type == kByteArray || type == kFixedBytes;
      case kByteStreamSplit:
        return integer || type == kFloat || type == kDouble || type == kFixedBytes;
      default:
        return false;
    }
  }

  void check_encoding(int64_t encoding) const {
    if (knows_encoding(encoding)) return;
    std::string known;
    for (int e = 0; e < 32; e++) {
      if (knows_encoding(e)) known += (known.empty() ? "" : ", ") + encoding_name(e);
    }
    fail(where_, ": found encoding ", encoding_name(encoding), ", expected one of ", known);
  }

  uint32_t next_level(RleReader& levels, int max) {
    const uint32_t level = levels.next(where_);
    if (level > uint32_t(max)) fail(where_, ": found level ", level, ", expected 0 to ", max);
    return level;
  }

  void skip_value() {
    if (is_bytes_) {
      next_text();
    } else {
      next_number();
    }
  }

  // Reads the header of the next page; a dictionary is read at once, a data page by load_page().
  void next_page() {
    release(page_begin_, offset_);
    page_begin_ = offset_;
    if (offset_ >= end_) {
      fail(where_, ": found the end of a row group's pages with ", entries_left_,
           " rows to come, expected them");
    }
    ThriftReader in(file_.subspan(offset_, end_ - offset_), where_);
    const PageHeader h = header_ = read_page_header(in);
    offset_ += in.offset();
    const int64_t rest = int64_t(end_ - offset_);
    if (h.compressed_size < 0 || h.compressed_size > rest) {
      fail(where_, ": found a page of ", h.compressed_size, " bytes at offset ", offset_,
           ", expected 0 to ", rest);
    }
    if (h.size < 0 || h.size > max_page_bytes_) {
      fail(where_, ": found a page of ", h.size, " bytes when decompressed, expected 0 to ",
           max_page_bytes_);
    }
    page_ = file_.subspan(offset_, size_t(h.compressed_size));
    offset_ += page_.size();
    if (h.type == kIndexPage) return;
    if (h.type == kDictionaryPage) return load_dictionary();
    if (h.type != kDataPage && h.type != kDataPageV2) {
      fail(where_, ": found a page of type ", h.type, ", expected 0 to 3");
    }
    if (h.values < 0 || h.values > entries_left_) {
      fail(where_, ": found a page of ", h.values, " values, expected 0 to ", entries_left_,
           ", those that are left in the row group");
    }
    check_encoding(h.encoding);
    page_left_ = h.values;
    entries_left_ -= h.values;
    page_is_loaded_ = false;
  }

  void check_crc() const {
    if (!header_.crc) return;
    const uint32_t found = uint32_t(crc32(0, page_.data(), uInt(page_.size())));
    if (found != *header_.crc) {
      fail(where_, ": found a damaged page: its CRC-32 is ", found, ", expected ", *header_.crc);
    }
  }

  void load_dictionary() {
    check_crc();
    require(!has_dictionary_, where_, ": found a second dictionary, expected one in a row group");
    if (header_.encoding != kPlain && header_.encoding != kPlainDictionary) {
      fail(where_, ": found a dictionary of encoding ", encoding_name(header_.encoding),
           ", expected PLAIN or PLAIN_DICTIONARY");
    }
    dictionary_ = decompress(codec_, page_, size_t(header_.size), dictionary_buffer_, where_);
    const int64_t least = width_ > 0 ? int64_t(width_) : 4;  // bytes of a value
    if (header_.values < 0 || header_.values > int64_t(dictionary_.size()) / least) {
      fail(where_, ": found a dictionary of ", header_.values, " values in ", dictionary_.size(),
           " bytes, expected fewer");
    }
    has_dictionary_ = true;
    dictionary_size_ = uint64_t(header_.values);
    dictionary_begins_.clear();
    if (leaf_.type != kByteArray) return;
    size_t offset = 0;
    for (uint64_t i = 0; i < dictionary_size_; i++) {
      dictionary_begins_.push_back(uint32_t(offset));
      plain_text(dictionary_, offset);
    }
  }

  void load_page() {
    check_crc();
    page_is_loaded_ = true;
    values_are_begun_ = false;
    const size_t size = size_t(header_.size);
    const int r_width = width_of_level(leaf_.max_repetition);
    const int d_width = width_of_level(leaf_.max_definition);
    if (header_.type == kDataPageV2) {  // levels are not compressed
      const int64_t r = header_.repetition_bytes, d = header_.definition_bytes;
      const int64_t room = std::min(header_.size, header_.compressed_size);
      if (r < 0 || d < 0 || r > room || d > room - r) {
        fail(where_, ": found levels of ", r, " and ", d, " bytes in a page of ", room,
             ", expected fewer");
      }
      repetitions_ = RleReader(page_.subspan(0, size_t(r)), r_width);
      definitions_ = RleReader(page_.subspan(size_t(r), size_t(d)), d_width);
      values_ = decompress(header_.is_compressed ? codec_ : int64_t(kUncompressed),
                           page_.subspan(size_t(r + d)), size - size_t(r + d), buffer_, where_);
    } else {
      values_ = decompress(codec_, page_, size, buffer_, where_);
      if (r_width > 0) repetitions_ = cut_levels(header_.repetition_encoding, r_width);
      if (d_width > 0) definitions_ = cut_levels(header_.definition_encoding, d_width);
    }
  }

  static int width_of_level(int max) { return std::bit_width(unsigned(max)); }

  // The levels before the values of a page v1.
  RleReader cut_levels(int64_t encoding, int width) {
    size_t bytes = 0, begin = 0;
    if (encoding == kBitPacked) {
      bytes = (size_t(header_.values) * size_t(width) + 7) / 8;
    } else if (encoding != kRle) {
      fail(where_, ": found levels of encoding ", encoding_name(encoding),
           ", expected RLE or BIT_PACKED");
    } else if (values_.size() < 4) {
      bytes = values_.size() + 1;
    } else {
      bytes = load_little_endian<uint32_t>(values_.data());
      begin = 4;
    }
    if (bytes > values_.size() - begin) {
      fail(where_, ": found levels of ", bytes, " bytes in a page of ", values_.size(),
           ", expected fewer");
    }
    const ByteSpan levels = values_.subspan(begin, bytes);
    values_ = values_.subspan(begin + bytes);
    return encoding == kRle ? RleReader(levels, width) : RleReader::bit_packed(levels, width);
  }

  // A page of nulls alone may have no bytes for values.
  void begin_values() {
    values_are_begun_ = true;
    value_offset_ = 0;
    switch (header_.encoding) {
      case kPlain:
        return;
      case kRle:  // BOOLEAN
        indices_ = cut_levels(kRle, 1);
        return;
      case kDeltaBinaryPacked:
        delta_ = DeltaReader(values_, where_);
        return;
      case kDeltaLengthByteArray:
        delta_ = DeltaReader(values_, where_);
        value_offset_ = delta_.end(where_);
        return;
      case kDeltaByteArray:
        prefixes_ = DeltaReader(values_, where_);
        values_ = values_.subspan(prefixes_.end(where_));
        delta_ = DeltaReader(values_, where_);
        value_offset_ = delta_.end(where_);
        joined_.clear();
        return;
      case kByteStreamSplit:
        if (values_.size() % width_ != 0) {
          fail(where_, ": found streams of ", values_.size(), " bytes, expected a multiple of ",
               width_);
        }
        return;
      default:
        require(has_dictionary_, where_, ": found indices without a dictionary, expected one");
        if (values_.empty() || values_[0] > 32) {
          fail(where_, ": found indices of ", values_.empty() ? 0 : int(values_[0]), " bits in ",
               values_.size(), " bytes, expected 0 to 32 bits");
        }
        indices_ = RleReader(values_.subspan(1), values_[0]);
    }
  }

  uint64_t next_index() {
    const uint64_t i = indices_.next(where_);
    if (i >= dictionary_size_) {
      fail(where_, ": found index ", i, " into a dictionary of ", dictionary_size_,
           " values, expected a smaller one");
    }
    return i;
  }

  // DELTA_BYTE_ARRAY: how many bytes of the value before it begin this one, and the rest.
  std::string_view next_with_prefix() {
    const uint64_t prefix = prefixes_.next(where_);
    if (prefix > joined_.size()) {
      fail(where_, ": found a value that shares ", int64_t(prefix), " bytes with one of ",
           joined_.size(), ", expected no more");
    }
    joined_.resize(size_t(prefix));
    joined_ += cut_text(values_, value_offset_, delta_.next(where_));
    if (width_ > 0 && joined_.size() != width_) {
      fail(where_, ": found a value of ", joined_.size(), " bytes, expected ", width_);
    }
    return joined_;
  }

  // BYTE_STREAM_SPLIT: first the first bytes of all values, then their second bytes, ...
  void join_streams(char* value) {
    const size_t values = values_.size() / width_;
    if (value_offset_ == values) {
      fail(where_, ": found a page of ", values, " values, expected more");
    }
    for (size_t i = 0; i < width_; i++) value[i] = char(values_[i * values + value_offset_]);
    value_offset_++;
  }

  uint64_t plain_bit() {
    const size_t i = value_offset_++;
    if (i / 8 >= values_.size()) {
      fail(where_, ": found a page of ", values_.size(), " bytes of bits, expected more");
    }
    return values_[i / 8] >> i % 8 & 1;
  }

  uint64_t plain_number(ByteSpan bytes, size_t& offset) {
    if (width_ > bytes.size() - offset) {
      fail(where_, ": found a page that ends within a number, expected ", width_, " bytes");
    }
    offset += width_;
    const unsigned char* p = bytes.data() + offset - width_;
    return width_ == 4 ? load_little_endian<uint32_t>(p) : load_little_endian<uint64_t>(p);
  }

  // Of BYTE_ARRAY its length, then itself; of others themselves.
  std::string_view plain_text(ByteSpan bytes, size_t& offset) {
    if (width_ > 0) return cut_text(bytes, offset, width_);
    if (bytes.size() - offset < 4) {
      fail(where_, ": found a page that ends within a string's length, expected 4 bytes");
    }
    offset += 4;
    return cut_text(bytes, offset, load_little_endian<uint32_t>(bytes.data() + offset - 4));
  }

  std::string_view cut_text(ByteSpan bytes, size_t& offset, uint64_t length) {
    if (length > bytes.size() - offset) {
      fail(where_, ": found a string of ", int64_t(length), " bytes, expected 0 to ",
           bytes.size() - offset, ", the bytes that are left in its page");
    }
    offset += size_t(length);
    return {reinterpret_cast<const char*>(bytes.data()) + offset - size_t(length), size_t(length)};
  }

  // Gives the memory of a part of the mapped file that has been read back to the system. The bytes
  // stay readable: they are loaded again.
  void release(size_t begin, size_t end) const {
    static const uintptr_t system_page = uintptr_t(sysconf(_SC_PAGESIZE));
    const auto address = [&](size_t offset) {
      return reinterpret_cast<uintptr_t>(file_.data()) + offset;
    };
    const uintptr_t from = (address(begin) + system_page - 1) & ~(system_page - 1);
    const uintptr_t to = address(std::max(begin, end)) & ~(system_page - 1);
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
  }

  ByteSpan file_;
  const Leaf leaf_;
  const bool is_bytes_;
  const size_t width_;  // bytes of a value; 0: BOOLEAN, BYTE_ARRAY
  const std::string where_;
  const int64_t max_page_bytes_;

  int64_t codec_ = 0;
  size_t offset_ = 0, end_ = 0;  // in the file: of the next page; of the chunk's end
  size_t page_begin_ = 0;        // in the file: of the page that is read
  int64_t entries_left_ = 0;     // in the row group, behind the page that is read

  PageHeader header_;
  ByteSpan page_;  // behind its header, as it is in the file
  int64_t page_left_ = 0;
  bool page_is_loaded_ = false, values_are_begun_ = false;
  PageBuffer buffer_;
  ByteSpan values_;
  size_t value_offset_ = 0;  // into values_: of the next value (BYTE_STREAM_SPLIT, BOOLEAN: number)
  RleReader repetitions_, definitions_, indices_;
  int repetition_ = 0, definition_ = 0;  // of the entry
  bool peeked_ = false;                  // the entry is still the next one
  DeltaReader delta_, prefixes_;
  std::string joined_;  // a value that does not stand in the page as it is

  bool has_dictionary_ = false;
  PageBuffer dictionary_buffer_;
  ByteSpan dictionary_;
  uint64_t dictionary_size_ = 0;             // values
  std::vector<uint32_t> dictionary_begins_;  // of strings: offsets into dictionary_
};

// ---------------------------------------------------------------------------------------------
// The file

class File {
 public:
  // Reads the footer. Errors name the file.
  explicit File(std::string path) : path_(std::move(path)), file_(path_) {
    const int64_t size = file_.size();
    const auto begins = [&](int64_t offset, const char* magic) {
      return std::memcmp(file_.data() + offset, magic, 4) == 0;
    };
    require(size >= 12, path_, ": found ", size, " bytes, expected a parquet file of 12 or more");
    require(!begins(size - 4, "PARE"), path_,
            ": found an encrypted parquet file, expected a plain");
    require(begins(0, "PAR1"), path_, ": found no \"PAR1\" at its begin, expected a parquet file");
    require(begins(size - 4, "PAR1"), path_,
            ": found no \"PAR1\" at its end, expected a whole parquet file");
    const int64_t bytes = load_little_endian<uint32_t>(file_.data() + size - 8);
    if (bytes > size - 12) {
      fail(path_, ": found a footer of ", bytes, " bytes, expected 0 to ", size - 12);
    }
    data_bytes_ = size_t(size - 8 - bytes);
    footer_ = read_footer({file_.data() + data_bytes_, size_t(bytes)}, path_ + ": footer");
  }

  const std::string& path() const { return path_; }
  const Footer& footer() const { return footer_; }
  ByteSpan data() const { return {file_.data(), data_bytes_}; }  // before the footer

  // The row group that holds a row, which is less than the file's rows.
  const RowGroup& group_of(int64_t row) const {
    const auto behind =
        std::upper_bound(footer_.groups.begin(), footer_.groups.end(), row,
                         [](int64_t r, const RowGroup& group) { return r < group.first_row; });
    return *(behind - 1);
  }

 private:
  std::string path_;
  MappedFile file_;
  size_t data_bytes_ = 0;
  Footer footer_;
};

class Reader {
 public:
  // Reads the footer. Errors name the file, and the column where it is one's.
  explicit Reader(std::string path, int64_t max_page_bytes = kMaxPageBytes)
      : file_(std::move(path)), max_page_bytes_(max_page_bytes) {}

  int64_t rows() const { return file_.footer().rows; }

  std::vector<std::string> columns() const {  // at the schema's top, in the file's order
    std::vector<std::string> names;
    for (const Column& c : file_.footer().columns) names.push_back(c.name);
    return names;
  }
  bool has(const std::string& column) const { return find(column) != nullptr; }
  bool is_text(const std::string& column) const { return is(column, Column::text); }
  bool is_integer(const std::string& column) const { return is(column, Column::integer); }

  // The columns that next() returns, in this order; goes to the first row. Fails where a column
  // is not there, not of strings or integers, or of an unknown encoding in any row group.
  void select(const std::vector<std::string>& columns) {
    selected_.clear();
    const Footer& footer = file_.footer();
    for (const std::string& name : columns) {
      const std::string where = concat(file_.path(), ": column ", json_text(name));
      const Column* column = find(name);
      if (!column) fail(where, ": found no such column, expected one of ", list_of_columns());
      const auto same_name = [&](const Column& c) { return c.name == name; };
      require(std::count_if(footer.columns.begin(), footer.columns.end(), same_name) == 1, where,
              ": found several columns of this name, expected one");
      require(column->kind != Column::other, where, ": found ", column->found,
              ", expected strings or integers");
      selected_.push_back({*column, std::make_unique<ColumnReader>(file_.data(), column->leaf,
                                                                   where, max_page_bytes_)});
      for (const RowGroup& group : footer.groups) {
        selected_.back().reader->check(group.chunks[size_t(column->leaf.number)], group.rows);
      }
    }
    seek(0);
  }

  // The next row to be read, 0 to rows().
  void seek(int64_t row) {
    require(row >= 0 && row <= rows(), file_.path(), ": found row ", row,
            " to go to, expected 0 to ", rows());
    row_ = row;
    is_open_ = false;
  }

  // The next row's values, nullopt for null; integers as decimal text. False behind the last row.
  bool next(std::vector<std::optional<std::string>>& row) {
    if (row_ == rows()) return false;
    if (!is_open_ || row_ == group_end_) open_row_group();
    row.resize(selected_.size());
    is_open_ = false;  // where a column fails, the others are behind it: the row is sought again
    for (size_t i = 0; i < selected_.size(); i++) read(selected_[i], row[i]);
    is_open_ = true;
    row_++;
    return true;
  }

 private:
  struct Selected {
    Column column;
    std::unique_ptr<ColumnReader> reader;
  };

  static void read(Selected& selected, std::optional<std::string>& value) {
    if (!selected.reader->next_entry()) {
      value.reset();
      return;
    }
    if (!value) value.emplace();
    if (selected.column.kind == Column::text) {
      value->assign(selected.reader->next_text());
      return;
    }
    const uint64_t x = selected.reader->next_number();
    const bool narrow = selected.column.leaf.type == kInt32;
    *value = selected.column.is_unsigned
                 ? std::to_string(narrow ? uint32_t(x) : x)
                 : std::to_string(narrow ? int32_t(uint32_t(x)) : int64_t(x));
  }

  const Column* find(const std::string& name) const {
    for (const Column& c : file_.footer().columns)
      if (c.name == name) return &c;
    return nullptr;
  }
  bool is(const std::string& name, Column::Kind kind) const {
    const Column* column = find(name);
    return column && column->kind == kind;
  }

  std::string list_of_columns() const {
    std::string list;
    for (const Column& c : file_.footer().columns) {
      if (list.size() > 300) return list + ", ...";
      list += (list.empty() ? "" : ", ") + json_text(c.name);
    }
    return list.empty() ? "none" : list;
  }

  void open_row_group() {
    const RowGroup& group = file_.group_of(row_);
    for (const Selected& selected : selected_) {
      selected.reader->open(group.chunks[size_t(selected.column.leaf.number)], group.rows);
      selected.reader->skip(row_ - group.first_row);
    }
    group_end_ = group.first_row + group.rows;
    is_open_ = true;
  }

  File file_;
  int64_t max_page_bytes_;
  std::vector<Selected> selected_;
  int64_t row_ = 0, group_end_ = 0;
  bool is_open_ = false;  // the readers stand at row_
};

}  // namespace cake::parquet
