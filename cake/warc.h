// WARC files (ISO 28500): records of a crawl, and the HTTP messages in them.
//
//     WARC/1.0 CRLF  name: value CRLF ...  CRLF  block of Content-Length bytes  CRLF CRLF
//
// A response's block is an HTTP message as the server sent it; a conversion's is text that somebody
// made of a page (WET files).
//
// Files of real crawls are broken in many ways. One rule finds the way through them: a record's
// Content-Length is believed if the block is followed by the end of the record; else the block ends
// where the next line begins with "WARC/" and a version. So lengths that are too short or too long
// cost no record, and a damaged header costs its own record alone. What was wrong is counted.
#pragma once

#include <strings.h>
#include <zlib.h>

#include <charconv>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "cake/bytes.h"

namespace cake {

using ProblemCounts = std::map<std::string, int64_t>;

inline bool equal_ignoring_case(std::string_view a, std::string_view b) {
  return a.size() == b.size() && strncasecmp(a.data(), b.data(), a.size()) == 0;
}

// "text/html" of "Text/HTML; charset=utf-8".
inline std::string media_type(std::string_view content_type) {
  return ascii_lower(strip_ascii(content_type.substr(0, content_type.find(';'))));
}
inline bool is_html_type(std::string_view media) {
  return media == "text/html" || media == "application/xhtml+xml";
}

// The header fields at the beginning of `text`, each given to field(name, value), up to and with
// the empty line, behind which the body begins; npos where there is none. A line that begins with
// white space continues the value before it; the continuation is left out.
template <class Field>
size_t read_header_fields(std::string_view text, Field&& field) {
  for (size_t begin = 0;;) {
    const size_t newline = text.find('\n', begin);
    if (newline == std::string_view::npos) return newline;
    std::string_view line = text.substr(begin, newline - begin);
    if (line.ends_with('\r')) line.remove_suffix(1);
    begin = newline + 1;
    if (line.empty()) return begin;
    const size_t colon = line.find(':');
    if (colon == std::string_view::npos || line[0] == ' ' || line[0] == '\t') continue;
    field(strip_ascii(line.substr(0, colon)), strip_ascii(line.substr(colon + 1)));
  }
}

// ---------------------------------------------------------------------------------------------
// Records

struct WarcRecord {
  uint64_t offset = 0;  // of its "WARC/" in the decompressed stream
  std::string type;     // "response", "conversion", ..; lower case
  std::string url, id, content_type;
  std::string payload_type;  // what the crawler found the payload to be; often absent
  std::string_view block;    // valid until the next record is read
};

class WarcReader {
 public:
  // Records longer than max_bytes are counted and skipped; they are not held in memory.
  WarcReader(ByteWindow& window, size_t max_bytes, ProblemCounts& problems)
      : window_(window), max_bytes_(max_bytes), problems_(problems) {}

  bool next(WarcRecord& record) {
    while (find_record()) {
      record.offset = window_.offset();
      if (read_header(record) && read_block(record)) return true;
    }
    return false;
  }

 private:
  static constexpr size_t kMaxHeader = 1 << 20;
  static constexpr size_t kVersion = 8;  // of "WARC/1.0"
  static constexpr size_t npos = std::string_view::npos;

  static bool begins_record(std::string_view bytes) {
    return bytes.size() >= 7 && bytes.starts_with("WARC/") && bytes[5] >= '0' && bytes[5] <= '9' &&
           bytes[6] == '.';
  }

  // Of the next line that begins a record, from `begin` on; npos: none in these bytes.
  static size_t find_version_line(std::string_view bytes, size_t begin) {
    static constexpr std::string_view kLine = "\nWARC/";
    while (begin < bytes.size()) {
      const void* found =
          memmem(bytes.data() + begin, bytes.size() - begin, kLine.data(), kLine.size());
      if (!found) break;
      begin = size_t(static_cast<const char*>(found) - bytes.data()) + 1;
      if (begins_record(bytes.substr(begin))) return begin;
    }
    return npos;
  }

  void consume_line_breaks() {
    const size_t breaks = window_.need(16).find_first_not_of("\r\n");
    window_.consume(std::min(breaks, window_.bytes().size()));
  }

  // The window then begins with a record. False at the end of the stream.
  bool find_record() {
    for (bool counted = std::exchange(gap_is_counted_, false);;) {
      consume_line_breaks();
      const std::string_view bytes = window_.need(kVersion);
      if (begins_record(bytes)) return true;
      if (bytes.empty()) {
        const char* damage = window_.pass_damage("WARC/");
        if (!damage) return false;
        problems_[damage]++;
        counted = false;
      } else if (bytes[0] != '\r' && bytes[0] != '\n') {
        if (!std::exchange(counted, true)) problems_["bytes that are no WARC record"]++;
        skip_to_version_line();
      }
    }
  }

  // Consumes bytes up to a line that begins a record, or to the end of the segment.
  void skip_to_version_line() {
    for (;;) {
      const std::string_view bytes = window_.bytes();
      const size_t found = find_version_line(bytes, 0);
      if (found != npos) return window_.consume(found);
      if (window_.ended()) return window_.consume(bytes.size());
      window_.consume(bytes.size() - std::min(bytes.size(), kVersion));
      window_.need(2 * kVersion);
    }
  }

  // Consumes the header; false: there is none.
  bool read_header(WarcRecord& record) {
    const size_t header = find_header_end();
    if (header == 0) return false;
    record.type.clear(), record.url.clear(), record.id.clear();
    record.content_type.clear(), record.payload_type.clear();
    length_ = UINT64_MAX;
    read_header_fields(window_.bytes().substr(0, header),
                       [&](std::string_view name, std::string_view value) {
                         if (equal_ignoring_case(name, "WARC-Type")) {
                           record.type = ascii_lower(value);
                         } else if (equal_ignoring_case(name, "WARC-Target-URI")) {
                           const bool brackets = value.starts_with('<') && value.ends_with('>');
                           record.url = brackets ? value.substr(1, value.size() - 2) : value;
                         } else if (equal_ignoring_case(name, "WARC-Record-ID")) {
                           record.id = value;
                         } else if (equal_ignoring_case(name, "WARC-Identified-Payload-Type")) {
                           record.payload_type = media_type(value);
                         } else if (equal_ignoring_case(name, "Content-Type")) {
                           record.content_type = value;
                         } else if (equal_ignoring_case(name, "Content-Length")) {
                           const char* end = value.data() + value.size();
                           uint64_t length = 0;
                           const auto [stop, error] = std::from_chars(value.data(), end, length);
                           if (error == std::errc() && stop == end) length_ = length;
                         }
                       });
    window_.consume(header);
    return true;
  }

  // The number of bytes of the header with its empty line. 0: none; then the header is counted and
  // consumed.
  size_t find_header_end() {
    for (size_t line = 0, searched = 0;;) {
      const std::string_view bytes = window_.bytes();
      const size_t newline = bytes.find('\n', searched);
      if (newline != npos) {
        const size_t length = newline - line;
        if (length == 0 || (length == 1 && bytes[line] == '\r')) return newline + 1;
        if (line > 0 && begins_record(bytes.substr(line))) {
          problems_["damaged WARC header"]++;
          return window_.consume(line), 0;
        }
        line = searched = newline + 1;
      } else if (window_.ended()) {
        if (!window_.source().damage()) problems_["truncated WARC record"]++;
        return window_.consume(bytes.size()), 0;
      } else {
        searched = bytes.size();
        window_.need(searched + 1);
      }
      if (line > kMaxHeader || searched > kMaxHeader) {
        problems_["damaged WARC header"]++;
        gap_is_counted_ = true;
        return window_.consume(1), 0;
      }
    }
  }

  // Consumes the block and the line breaks behind it; false: it is too long.
  bool read_block(WarcRecord& record) {
    if (length_ <= max_bytes_) {
      const std::string_view bytes = window_.need(size_t(length_) + 16);
      if (ends_record(bytes, size_t(length_))) {
        take(record, size_t(length_));
        return true;
      }
    }
    size_t end = 0;
    for (size_t searched = 0;;) {  // from the byte before the block on, which is a line break
      const std::string_view bytes = window_.bytes();
      end = begins_record(bytes) ? 0 : find_version_line(bytes, searched);
      if (end != npos || window_.ended()) break;
      if (bytes.size() > max_bytes_ + 64) {
        problems_["page too long"]++;
        gap_is_counted_ = true;
        skip_to_version_line();
        return false;
      }
      searched = bytes.size() - std::min(bytes.size(), kVersion);
      window_.need(bytes.size() + 1);
    }
    const bool truncated = end == npos && length_ > window_.bytes().size();
    if (!truncated || length_ == UINT64_MAX) {
      problems_["wrong WARC Content-Length"]++;
    } else if (!window_.source().damage()) {  // damage is counted where it is passed
      problems_["truncated WARC record"]++;
    }
    take(record, std::min(end, window_.bytes().size()));
    for (int i = 0; i < 2 && !truncated; i++) {  // the record's own line breaks
      if (record.block.ends_with('\n')) record.block.remove_suffix(1);
      if (record.block.ends_with('\r')) record.block.remove_suffix(1);
    }
    return true;
  }

  // Whether a block of this length is followed by the end of the record.
  bool ends_record(std::string_view bytes, size_t length) const {
    if (bytes.size() < length) return false;
    const std::string_view rest = bytes.substr(length);
    if (rest.starts_with("\r\n\r\n") || rest.starts_with("\n\n")) return true;
    const size_t next = rest.find_first_not_of("\r\n");
    return next == npos ? window_.ended() : begins_record(rest.substr(next));
  }

  void take(WarcRecord& record, size_t length) {
    record.block = window_.bytes().substr(0, length);
    window_.consume(length);
    // Not need(): the block stays where it is.
    const size_t breaks = window_.bytes().substr(0, 8).find_first_not_of("\r\n");
    window_.consume(std::min({breaks, window_.bytes().size(), size_t(8)}));
  }

  ByteWindow& window_;
  size_t max_bytes_;
  ProblemCounts& problems_;
  uint64_t length_ = 0;          // of the record, as its header says; UINT64_MAX: it does not say
  bool gap_is_counted_ = false;  // what is wrong with the bytes up to the next record
};

// ---------------------------------------------------------------------------------------------
// HTTP messages

// Inflates `bytes`: gzip (bits = 31), zlib (15) or raw deflate (-15). Of damaged or truncated data
// what comes before the damage. False: nothing came, or more than max_bytes.
inline bool inflate_bytes(std::string_view bytes, int bits, size_t max_bytes, std::string& out) {
  z_stream z{};
  if (inflateInit2(&z, bits) != Z_OK) return false;
  const std::unique_ptr<z_stream, decltype(&inflateEnd)> guard(&z, inflateEnd);
  z.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  z.avail_in = uInt(std::min<size_t>(bytes.size(), UINT32_MAX));
  out.resize(std::min(max_bytes, 4 * bytes.size() + 1024));
  size_t size = 0;
  for (int status = Z_OK; status == Z_OK;) {
    if (size == out.size()) {
      if (size >= max_bytes) return false;
      out.resize(std::min(max_bytes, 2 * size));
    }
    z.next_out = reinterpret_cast<Bytef*>(out.data() + size);
    z.avail_out = uInt(std::min<size_t>(out.size() - size, UINT32_MAX));
    status = inflate(&z, Z_NO_FLUSH);
    size = size_t(reinterpret_cast<char*>(z.next_out) - out.data());
  }
  out.resize(size);
  return size > 0;
}

// Whether only padding or an extension follows the size of a chunk in its line.
inline bool ends_chunk_size(std::string_view line, const char* stop) {
  const std::string_view rest = strip_ascii(line.substr(size_t(stop - line.data())));
  return rest.empty() || rest[0] == ';';
}

// A body of Transfer-Encoding: chunked. Many archives name the encoding and hold the body without
// it: what does not look like a chunk is taken as it is, with all that follows.
inline void join_chunks(std::string_view body, std::string& out) {
  out.clear();
  for (;;) {
    const size_t newline = body.substr(0, 1024).find('\n');
    uint64_t size = 0;
    const auto [stop, error] =
        std::from_chars(body.data(), body.data() + std::min(newline, body.size()), size, 16);
    const bool is_chunk = newline != std::string_view::npos && error == std::errc() &&
                          ends_chunk_size(body.substr(0, newline), stop);
    if (!is_chunk) {
      out += body;
      return;
    }
    body.remove_prefix(newline + 1);
    if (size == 0) return;
    out += body.substr(0, size);
    body.remove_prefix(size_t(std::min<uint64_t>(size, body.size())));
    if (body.starts_with("\r\n"))
      body.remove_prefix(2);
    else if (body.starts_with("\n"))
      body.remove_prefix(1);
    if (body.empty()) return;
  }
}

struct HttpMessage {
  std::string content_type;
  std::string_view body;  // into the message, or into storage
  std::string storage, scratch;
  const char* problem = nullptr;  // why the body cannot be read
};

// A message with its status line and header fields; without these all of it is the body.
inline void read_http(std::string_view message, size_t max_bytes, HttpMessage& http) {
  http.content_type.clear();
  http.body = message;
  http.problem = nullptr;
  if (!message.starts_with("HTTP/")) return;
  bool chunked = false;
  std::string encoding;
  const size_t header =
      read_header_fields(message, [&](std::string_view name, std::string_view value) {
        if (equal_ignoring_case(name, "Content-Type")) http.content_type = value;
        if (equal_ignoring_case(name, "Content-Encoding")) encoding = ascii_lower(value);
        if (equal_ignoring_case(name, "Transfer-Encoding")) {
          chunked = ascii_lower(value).find("chunked") != std::string::npos;
        }
      });
  http.body = message.substr(std::min(header, message.size()));
  if (chunked) {
    join_chunks(http.body, http.storage);
    http.body = http.storage;
  }
  // Encodings are named in the order in which they were applied. A body that is not encoded,
  // whatever the header says, is taken as it is.
  for (int i = 0; i < 4 && !encoding.empty() && !http.problem; i++) {
    const size_t comma = encoding.rfind(',');
    const std::string name(
        strip_ascii(encoding.substr(comma == std::string::npos ? 0 : comma + 1)));
    encoding.resize(comma == std::string::npos ? 0 : comma);
    bool good = true;
    if (name == "gzip" || name == "x-gzip") {
      if (!http.body.starts_with("\x1f\x8b")) continue;
      good = inflate_bytes(http.body, 15 + 16, max_bytes, http.scratch);
    } else if (name == "deflate") {  // of zlib, as the standard says, or raw, as some servers send
      const bool is_zlib = http.body.size() >= 2 && (http.body[0] & 0x0f) == 8 &&
                           ((http.body[0] & 0xff) * 256 + (http.body[1] & 0xff)) % 31 == 0;
      if (!is_zlib && !http.body.empty() &&
          strip_ascii(http.body.substr(0, 256)).starts_with('<')) {
        continue;
      }
      good = inflate_bytes(http.body, is_zlib ? 15 : -15, max_bytes, http.scratch);
    } else if (name == "br" || name == "zstd" || name == "compress") {
      if (strip_ascii(http.body.substr(0, 256)).starts_with('<')) continue;
      http.problem = "Content-Encoding of another kind";
      continue;
    } else {
      continue;  // identity, and names that mean nothing
    }
    if (!good) {
      http.problem = "damaged Content-Encoding";
      continue;
    }
    std::swap(http.storage, http.scratch);
    http.body = http.storage;
  }
}

}  // namespace cake
