// Any bytes as a parquet file: reading them ends in values and rows or in an Error of one line. A
// row that is sought is the row that is met on the way, and each row is an object of JSON.
#include <simdjson.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

#include "cake/parquet.h"
#include "cake/parquet_rows.h"
#include "test/fuzz/expect.h"

namespace {
using namespace cake;
using Row = std::vector<std::optional<std::string>>;

constexpr int64_t kMaxPageBytes = 1 << 20;
constexpr int kMaxRows = 2000;

void read_columns(parquet::Reader& reader, const std::vector<std::string>& columns) {
  reader.select(columns);
  Row row, sought, middle;
  int64_t n = 0;
  const int64_t half = std::min<int64_t>(reader.rows(), kMaxRows) / 2;
  for (; n < kMaxRows && reader.next(row); n++) {
    if (n == half) middle = row;
  }
  if (n <= half) return;
  reader.seek(half);
  if (!reader.next(sought) || sought != middle) std::abort();
}

void read_rows(const std::string& path) {
  parquet::JsonRows rows(path, kMaxPageBytes);
  simdjson::dom::parser parser;
  std::string row, middle;
  const int64_t half = std::min<int64_t>(rows.rows(), kMaxRows) / 2;
  for (int tries = 0; tries < kMaxRows; tries++) {
    const int64_t before = rows.row();
    try {
      if (!rows.next(row)) break;
      fuzz::expect(rows.row() == before + 1, "a row is behind the one before it");
      fuzz::expect(row.capacity() >= row.size() + simdjson::SIMDJSON_PADDING, "there is padding");
      simdjson::dom::object object;
      const auto error = parser.parse(row.data(), row.size(), false).get(object);
      // Text of the type JSON may have integers that simdjson does not read.
      fuzz::expect(!error || error == simdjson::NUMBER_ERROR, "a row is a JSON object");
      fuzz::expect(row.find('\n') == std::string::npos, "a row has one line");
      if (before == half) middle = row;
    } catch (const Error& error) {
      fuzz::expect(std::string_view(error.what()).find('\n') == std::string_view::npos, "one line");
      fuzz::expect(rows.row() > before, "reading goes on behind damage");
    }
  }
  if (middle.empty()) return;
  rows.seek(half);
  fuzz::expect(rows.next(row) && row == middle, "a row that is sought is the same");
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int fd = memfd_create("parquet", 0);
  static const std::string path = concat("/proc/self/fd/", fd);
  if (ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != ssize_t(size)) std::abort();
  try {
    read_rows(path);
  } catch (const Error&) {
  }
  try {
    parquet::Reader reader(path, kMaxPageBytes);
    std::vector<std::string> readable;
    for (const std::string& column : reader.columns()) {
      if (!reader.is_text(column) && !reader.is_integer(column)) continue;
      if (readable.size() < 20) readable.push_back(column);
      try {
        read_columns(reader, {column});
      } catch (const Error&) {
      }
    }
    read_columns(reader, readable);
  } catch (const Error&) {
  }
  return 0;
}
