// Raw pages: records of WARC and WET files, HTML files, parquet, JSON lines and plain text, as
// UTF-8.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cake/records.h"

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

// From where a reader can go on: a gzip member or zstd frame that begins at `compressed` in the
// file and at `begin` in the decompressed stream, and the next record's offset there.
struct Entry {
  uint64_t compressed = 0, begin = 0, next = 0;
};

struct PageOptions {
  std::string text_key = "text";  // of JSON lines and parquet; "html" is taken where it is absent
  bool drop_invalid = false;      // pages of invalid UTF-8 are dropped (else repaired)
  size_t max_page_bytes = size_t(64) << 20;  // longer ones are counted and skipped
};

// The files that the arguments name: folders become their files, sorted by path.
std::vector<Input> expand_inputs(const std::vector<std::string>& arguments);

class PageReader {
 public:
  PageReader(Input input, uint32_t number, PageOptions options = {}, Entry begin = {});
  ~PageReader();
  bool next(Page& page);    // false at the end. Damage is counted and skipped where one can go on
  Entry entry() const;      // for a later reader, which then begins with the next page
  double progress() const;  // share of the file's bytes that have been read
  const std::map<std::string, int64_t>& problems() const;  // "truncated gzip data": 1, ...

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace cake
