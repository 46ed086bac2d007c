// Any bytes as a parquet file: reading them ends in rows or in an Error, and a row that is sought
// is the row that is met on the way.
//
//     clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -I. test/fuzz/fuzz_parquet.cpp
//     \
//         -lsnappy -lz -lzstd -o build/fuzz_parquet
//     mkdir -p build/corpus_parquet
//     build/fuzz_parquet -max_len=16384 build/corpus_parquet test/golden/parquet
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

#include "cake/parquet.h"

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
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int fd = memfd_create("parquet", 0);
  static const std::string path = concat("/proc/self/fd/", fd);
  if (ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != ssize_t(size)) std::abort();
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
