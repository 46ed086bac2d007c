// Bytes of files: decompressed, in a window that moves over them, and as lines.
//
//     file or standard input --ByteSource--> bytes, decompressed --ByteWindow--> the next n bytes
//         --LineReader--> lines
//
// Everything is streamed: memory is bounded by what a reader asks for at once. The first bytes tell
// the compression: gzip (RFC 1952), Zstandard (RFC 8878) or none; a file named .gz or .zst must be
// compressed. "-" is standard input. Errors name the file.
//
// Places. An offset is that of a byte in the decompressed stream. A gzip file may hold several
// members one behind the other (WARC files have one for each record), a Zstandard file several
// frames; decompression can begin at each of them. ByteSource remembers where they begin, so that
// an Entry names a place from which a later reader goes on without the bytes before it.
//
// Text. Editors write it in several ways: with a byte order mark, in UTF-16, with carriage returns.
// ByteWindow::begin_text() and LineEnds make one of them: UTF-8 without a mark, and line feeds.
//
// Damage. By default damaged or truncated compression is an error. With SourceOptions::survive the
// bytes up to the damage are a segment of the stream: read() ends there, damage() says why, and
// resume() looks for the next member or frame, with which the next segment begins.
#pragma once

#include <simdjson.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cake/run.h"
#include "cake/unicode.h"

namespace cake {

struct Input {
  std::string path;  // to open; "-" is standard input
  std::string name;  // to show in errors
  Input(std::string path_and_name) : path(path_and_name), name(std::move(path_and_name)) {
    if (path == "-") name = "standard input";
  }
  Input(std::string path, std::string name) : path(std::move(path)), name(std::move(name)) {}
};

// The files of a folder and of those in it. Hidden ones are left out; links to folders are not
// followed.
inline std::vector<std::string> files_of_folder(const std::string& folder) {
  namespace fs = std::filesystem;
  std::vector<std::string> files;
  try {
    for (fs::recursive_directory_iterator it(folder), end; it != end; ++it) {
      if (it->path().filename().string().starts_with('.')) {
        it.disable_recursion_pending();
      } else if (it->is_regular_file()) {
        files.push_back(it->path().string());
      }
    }
  } catch (const fs::filesystem_error& e) {
    fail(folder, ": cannot read the folder: ", e.code().message());
  }
  std::sort(files.begin(), files.end());
  if (files.empty()) fail(folder, ": found no files in this folder");
  return files;
}

// Folders become their files, sorted by the bytes of their paths.
inline std::vector<Input> expand_folders(const std::vector<std::string>& arguments) {
  std::vector<Input> inputs;
  for (const std::string& argument : arguments) {
    std::error_code ec;
    if (argument != "-" && std::filesystem::is_directory(argument, ec)) {
      for (const std::string& file : files_of_folder(argument)) inputs.emplace_back(file);
    } else {
      inputs.emplace_back(argument);
    }
  }
  return inputs;
}

// The file's extension without that of its compression: ".jsonl" of "a.jsonl.gz".
inline std::string inner_extension(const std::string& name) {
  std::filesystem::path path = name;
  if (path.extension() == ".gz" || path.extension() == ".zst") path = path.stem();
  return path.extension().string();
}

// What a file is whose first bytes are these; nullptr: it may be text.
inline const char* binary_kind(std::string_view head) {
  const std::pair<std::string_view, const char*> kinds[] = {
      {"BZh", "bzip2 data"},        {"\xfd\x37zXZ", "xz data"}, {"PK\x03\x04", "a zip archive"},
      {"PAR1", "a Parquet file"},   {"%PDF-", "a PDF file"},    {"WARC/", "a WARC archive"},
      {"\x7f\x45LF", "a program"},  {"\x89PNG", "an image"},    {"GIF8", "an image"},
      {"\xff\xd8\xff", "an image"}, {"OggS", "a sound"},        {"wOF2", "a font"}};
  for (const auto& [magic, what] : kinds)
    if (head.starts_with(magic)) return what;
  return nullptr;
}

// Text has at most a stray NUL byte. Programs, images and UTF-16 have many: their number among the
// first bytes, else 0.
inline size_t binary_nuls(std::string_view head) {
  const std::string_view sample = head.substr(0, 1 << 16);
  const size_t nuls = size_t(std::count(sample.begin(), sample.end(), '\0'));
  return nuls * 1000 <= sample.size() ? 0 : nuls;
}

// UTF-16 by its mark, or by its NUL bytes beside ASCII; else nullptr.
inline const char* utf16_charset(std::string_view bytes) {
  if (bytes.starts_with("\xff\xfe")) return "UTF-16LE";
  if (bytes.starts_with("\xfe\xff")) return "UTF-16BE";
  size_t nuls[2] = {0, 0};
  const std::string_view sample = bytes.substr(0, 256);
  if (std::memchr(sample.data(), 0, sample.size()) == nullptr) return nullptr;
  for (size_t i = 0; i < sample.size(); i++) nuls[i & 1] += sample[i] == '\0';
  const size_t many = sample.size() / 4;
  if (nuls[1] > many && nuls[0] < nuls[1] / 4) return "UTF-16LE";
  if (nuls[0] > many && nuls[1] < nuls[0] / 4) return "UTF-16BE";
  return nullptr;
}

// UTF-16 that comes in pieces, as UTF-8. Halves of characters become U+FFFD.
class Utf16Decoder {
 public:
  explicit Utf16Decoder(bool is_big_endian) : is_big_endian_(is_big_endian) {}

  // Appends the text of the bytes to `out`. `is_last`: no bytes will follow.
  void decode(std::string_view bytes, bool is_last, std::string& out) {
    for (const char c : bytes) {
      if (std::exchange(has_odd_, !has_odd_)) {
        const unsigned a = odd_ & 0xff, b = c & 0xff;
        add_unit(is_big_endian_ ? a << 8 | b : b << 8 | a, out);
      } else {
        odd_ = c;
      }
    }
    if (is_last && (high_ || has_odd_)) append_utf8(out, kHalf), high_ = 0, has_odd_ = false;
  }

 private:
  static constexpr unsigned kHalf = 0xfffd;

  void add_unit(unsigned unit, std::string& out) {
    const bool is_low = unit >= 0xdc00 && unit <= 0xdfff;
    if (high_ && is_low) {
      append_utf8(out, 0x10000 + ((high_ - 0xd800) << 10) + (unit - 0xdc00));
      high_ = 0;
      return;
    }
    if (high_) append_utf8(out, kHalf);
    high_ = unit >= 0xd800 && unit <= 0xdbff ? unit : 0;
    if (!high_) append_utf8(out, is_low ? kHalf : unit);
  }

  bool is_big_endian_, has_odd_ = false;
  char odd_ = 0;       // the first byte of a unit
  unsigned high_ = 0;  // the first unit of a pair
};

// ---------------------------------------------------------------------------------------------
// Bytes

// From where a reader can go on: a gzip member or Zstandard frame that begins at `compressed` in
// the file and at `begin` in the decompressed stream, and the next record's offset there.
struct Entry {
  uint64_t compressed = 0, begin = 0, next = 0;
};

struct CloseFile {
  void operator()(std::FILE* f) const {
    if (f != stdin) std::fclose(f);
  }
};

struct SourceOptions {
  bool any_kind = false;  // archives and programs are read too: the caller tells kinds apart
  bool survive = false;   // damage ends a segment; it is no error
};

class ByteSource {
 public:
  explicit ByteSource(const Input& input, SourceOptions options = {})
      : name_(input.name), options_(options) {
    std::error_code ec;
    if (input.path != "-" && std::filesystem::is_directory(input.path, ec)) {
      fail(name_, ": found a directory, expected a file");
    }
    file_.reset(input.path == "-" ? stdin : std::fopen(input.path.c_str(), "rb"));
    if (!file_) fail(name_, ": cannot open: ", errno_text());
    struct stat status;
    if (fstat(fileno(file_.get()), &status) == 0 && S_ISREG(status.st_mode)) {
      file_size_ = uint64_t(status.st_size);
      seekable_ = input.path != "-";
    }
    refill();
    start(input.path);
  }

  // Up to `n` bytes; fewer only at the end of the segment.
  size_t read(char* out, size_t n) {
    const size_t done = utf16_ ? read_utf16(out, n) : read_bytes(out, n);
    if (cr_ends_lines_) std::replace(out, out + done, '\r', '\n');
    return done;
  }

  // The stream is UTF-16, and `head` has been read of it: read() then gives all of it as UTF-8.
  // Offsets are those in UTF-8, and entry() names the beginning.
  void decode_utf16(std::string_view head) {
    utf16_ = std::make_unique<Utf16Decoder>(utf16_charset(head) == std::string_view("UTF-16BE"));
    utf16_->decode(head, false, utf8_);
  }
  // From here on read() gives line feeds for carriage returns.
  void end_lines_at_cr() { cr_ends_lines_ = true; }

  // Why the segment ended: "truncated gzip data"; nullptr: at the end of the file, or not yet.
  const char* damage() const { return damage_; }

  // Goes on behind the damage, at the next member or frame whose bytes begin with `prefix`. Where
  // there is none, or the prefix is empty, the stream has ended.
  void resume(std::string_view prefix) {
    const uint64_t damaged_at = in_begin_ + offset_;
    damage_ = nullptr;
    in_frame_ = zstd_full_ = false;
    if (zstd_) ZSTD_DCtx_reset(zstd_.get(), ZSTD_reset_session_only);
    if (!prefix.empty()) {
      // The damage was noticed late perhaps, beyond the beginning of the next member.
      constexpr uint64_t kBack = 16 << 20;
      move_input(std::max(frame_begin_ + 1, damaged_at - std::min(damaged_at, kBack)));
      for (; find_magic(); offset_++)
        if (begins_with(prefix)) return;
    }
    finished_ = true;
  }

  // A place for a later ByteSource to seek(): the last one at or before the offset `next`. Without
  // one, it is the stream's beginning.
  Entry entry(uint64_t next) const {
    if (!seekable_ || utf16_) return {0, 0, next};
    if (!inflate_ && !zstd_) return {next, next, next};
    const auto behind = std::upper_bound(frames_.begin(), frames_.end(), next,
                                         [](uint64_t n, const Frame& f) { return n < f.begin; });
    if (behind == frames_.begin()) return {0, 0, next};
    return {std::prev(behind)->compressed, std::prev(behind)->begin, next};
  }
  // entry() will not be asked for offsets before this one.
  void forget_places(uint64_t offset) {
    while (frames_.size() > 1 && frames_[1].begin <= offset) frames_.pop_front();
  }

  // The next byte read is that at `entry.begin`.
  void seek(const Entry& entry) {
    if (fseeko(file_.get(), off_t(entry.compressed), SEEK_SET) != 0) {
      fail(name_, ": cannot seek: ", errno_text());
    }
    in_begin_ = entry.compressed;
    offset_ = size_ = 0;
    produced_ = entry.begin;
    in_frame_ = zstd_full_ = finished_ = false;
    damage_ = nullptr;
    frames_.clear();
    if (zstd_) ZSTD_DCtx_reset(zstd_.get(), ZSTD_reset_session_only);
  }

  const std::string& name() const { return name_; }
  uint64_t compressed_offset() const { return in_begin_ + offset_; }  // read so far
  uint64_t file_size() const { return file_size_; }                   // 0: unknown
  bool is_compressed() const { return inflate_ || zstd_; }

 private:
  struct EndInflate {
    void operator()(z_stream* z) const { inflateEnd(z), delete z; }
  };
  struct Frame {  // a gzip member or a Zstandard frame
    uint64_t compressed, begin;
  };

  size_t read_bytes(char* out, size_t n) {
    size_t done = 0;
    while (done < n && !damage_) {
      const size_t got = inflate_ ? read_gzip(out + done, n - done)
                         : zstd_  ? read_zstd(out + done, n - done)
                                  : read_plain(out + done, n - done);
      if (got == 0) break;
      done += got;
      produced_ += got;
    }
    return done;
  }

  size_t read_utf16(char* out, size_t n) {
    for (std::array<char, 1 << 14> block; utf8_.size() < n && !utf16_ended_;) {
      const size_t got = read_bytes(block.data(), block.size());
      utf16_ended_ = got < block.size();
      utf16_->decode({block.data(), got}, utf16_ended_, utf8_);
    }
    const size_t done = utf8_.copy(out, n);
    utf8_.erase(0, done);
    return done;
  }

  // Reads the next block; false at the end of the file.
  bool refill() {
    in_begin_ += size_;
    offset_ = 0;
    size_ = read_file(in_.data(), in_.size());
    return size_ > 0;
  }

  size_t read_file(char* out, size_t n) {
    const size_t got = std::fread(out, 1, n, file_.get());
    if (std::ferror(file_.get())) fail(name_, ": cannot read: ", errno_text());
    return got;
  }

  void start(const std::string& path) {
    const std::string_view head(in_.data(), size_);
    const std::string extension = std::filesystem::path(path).extension().string();
    if (head.starts_with("\x1f\x8b")) {
      inflate_.reset(new z_stream{});
      if (inflateInit2(inflate_.get(), 15 + 16) != Z_OK) fail(name_, ": cannot start gzip");
    } else if (is_zstd(head)) {
      zstd_.reset(ZSTD_createDStream());
      ZSTD_DCtx_setParameter(zstd_.get(), ZSTD_d_windowLogMax, 31);  // files of --long=31 too
    } else if (extension == ".gz" || extension == ".zst") {
      fail(name_, ": found ", head.empty() ? "an empty file" : "other bytes", ", expected ",
           extension == ".gz" ? "gzip" : "Zstandard", " data");
    }
    const char* kind = options_.any_kind ? nullptr : binary_kind(head);
    if (kind) fail(name_, ": found ", kind, ", expected text, JSON lines, .gz or .zst");
  }

  // A frame, or one to be skipped: parallel compressors begin a file with it.
  static bool is_zstd(std::string_view head) {
    return head.starts_with("\x28\xb5\x2f\xfd") ||
           (head.size() >= 4 && (head[0] & 0xf0) == 0x50 && head.substr(1, 3) == "\x2a\x4d\x18");
  }

  size_t read_plain(char* out, size_t n) {
    if (offset_ == size_ && n >= in_.size()) {  // without a copy
      in_begin_ += size_;
      offset_ = size_ = 0;
      const size_t got = read_file(out, n);
      in_begin_ += got;
      return got;
    }
    if (offset_ == size_ && !refill()) return 0;
    const size_t got = std::min(n, size_ - offset_);
    std::memcpy(out, in_.data() + offset_, got);
    offset_ += got;
    return got;
  }

  size_t read_gzip(char* out, size_t n) {
    n = std::min(n, size_t(1) << 30);
    inflate_->next_out = reinterpret_cast<Bytef*>(out);
    inflate_->avail_out = uInt(n);
    while (inflate_->avail_out == n && !finished_) {
      if (offset_ == size_ && !refill()) {
        if (in_frame_ && !options_.survive) {
          fail(name_, ": the gzip data ends too early: the file is truncated");
        }
        if (in_frame_) damage_ = "truncated gzip data";
        return 0;
      }
      if (!in_frame_) {
        inflateReset(inflate_.get());
        begin_frame();
      }
      inflate_->next_in = reinterpret_cast<Bytef*>(in_.data() + offset_);
      inflate_->avail_in = uInt(size_ - offset_);
      const int status = inflate(inflate_.get(), Z_NO_FLUSH);
      offset_ = size_ - inflate_->avail_in;
      if (status == Z_STREAM_END) {
        in_frame_ = false;
      } else if (status != Z_OK && status != Z_BUF_ERROR) {
        const char* reason = inflate_->msg ? inflate_->msg : "no reason given";
        if (!options_.survive) fail(name_, ": damaged gzip data: ", reason);
        damage_ = "damaged gzip data";
        break;
      }
    }
    return n - inflate_->avail_out;
  }

  size_t read_zstd(char* out, size_t n) {
    ZSTD_outBuffer target{out, n, 0};
    while (target.pos == 0 && !finished_) {
      // After a full output the decoder may still hold decompressed bytes: call it before reading
      // on.
      if (offset_ == size_ && !zstd_full_ && !refill()) {
        if (in_frame_ && !options_.survive) {
          fail(name_, ": the Zstandard data ends too early: the file is truncated");
        }
        if (in_frame_) damage_ = "truncated Zstandard data";
        return 0;
      }
      // A frame's first byte alone: the decoder then never takes its way for whole frames, which
      // gives no byte of a damaged one, and what is read does not depend on the place in in_.
      const bool first = !in_frame_ && !zstd_full_;
      if (first) begin_frame();
      ZSTD_inBuffer source{in_.data(), first ? offset_ + 1 : size_, offset_};
      const size_t left = ZSTD_decompressStream(zstd_.get(), &target, &source);
      offset_ = source.pos;
      if (ZSTD_isError(left)) {
        if (!options_.survive) fail(name_, ": damaged Zstandard data: ", ZSTD_getErrorName(left));
        damage_ = "damaged Zstandard data";
        break;
      }
      in_frame_ = left != 0;
      zstd_full_ = target.pos == n && in_frame_;
    }
    return target.pos;
  }

  void begin_frame() {
    in_frame_ = true;
    frame_begin_ = in_begin_ + offset_;
    if (!seekable_) return;
    if (!frames_.empty() && frames_.back().begin == produced_) frames_.pop_back();
    frames_.push_back({frame_begin_, produced_});
  }

  // in_ begins at this offset of the file, or at its present place where one cannot go back.
  void move_input(uint64_t compressed) {
    if (compressed >= in_begin_ && compressed <= in_begin_ + size_) {
      offset_ = size_t(compressed - in_begin_);
    } else if (seekable_ && fseeko(file_.get(), off_t(compressed), SEEK_SET) == 0) {
      in_begin_ = compressed;
      offset_ = size_ = 0;
    }
  }

  // Reads behind the bytes of in_ that are left; false at the end of the file.
  bool read_behind() {
    std::memmove(in_.data(), in_.data() + offset_, size_ - offset_);
    size_ -= offset_;
    in_begin_ += std::exchange(offset_, 0);
    const size_t got = read_file(in_.data() + size_, in_.size() - size_);
    size_ += got;
    return got > 0;
  }

  // Moves to the next place where a member or frame may begin.
  bool find_magic() {
    const std::string_view magic = inflate_ ? "\x1f\x8b\x08" : "\x28\xb5\x2f\xfd";
    for (;;) {
      const size_t found = std::string_view(in_.data() + offset_, size_ - offset_).find(magic);
      if (found != std::string_view::npos) return offset_ += found, true;
      offset_ = size_ - std::min(size_ - offset_, magic.size() - 1);
      if (!read_behind()) return false;
    }
  }

  // Whether the member or frame here holds bytes that begin so.
  bool begins_with(std::string_view prefix) {
    if (size_ - offset_ < in_.size() / 2) read_behind();
    std::array<char, 64> out;
    size_t got = 0;
    if (inflate_) {
      std::unique_ptr<z_stream, EndInflate> z(new z_stream{});
      if (inflateInit2(z.get(), 15 + 16) != Z_OK) return false;
      z->next_in = reinterpret_cast<Bytef*>(in_.data() + offset_);
      z->avail_in = uInt(size_ - offset_);
      z->next_out = reinterpret_cast<Bytef*>(out.data());
      z->avail_out = uInt(out.size());
      const int status = inflate(z.get(), Z_NO_FLUSH);
      if (status == Z_OK || status == Z_STREAM_END) got = out.size() - z->avail_out;
    } else {
      std::unique_ptr<ZSTD_DStream, decltype(&ZSTD_freeDStream)> z(ZSTD_createDStream(),
                                                                   ZSTD_freeDStream);
      ZSTD_inBuffer source{in_.data(), size_, offset_};
      ZSTD_outBuffer target{out.data(), out.size(), 0};
      if (!ZSTD_isError(ZSTD_decompressStream(z.get(), &target, &source))) got = target.pos;
    }
    return std::string_view(out.data(), got).starts_with(prefix);
  }

  std::string name_;
  SourceOptions options_;
  std::unique_ptr<std::FILE, CloseFile> file_;
  bool seekable_ = false;
  uint64_t file_size_ = 0;
  std::vector<char> in_ = std::vector<char>(1 << 16);
  uint64_t in_begin_ = 0;         // offset in the file of in_'s first byte
  size_t offset_ = 0, size_ = 0;  // in_ holds size_ bytes, read up to offset_
  uint64_t produced_ = 0;         // offset in the stream of the next byte
  std::unique_ptr<z_stream, EndInflate> inflate_;
  std::unique_ptr<ZSTD_DStream, decltype(&ZSTD_freeDStream)> zstd_{nullptr, ZSTD_freeDStream};
  bool in_frame_ = false, zstd_full_ = false, finished_ = false;
  uint64_t frame_begin_ = 0;  // of the last member or frame, in the file
  std::deque<Frame> frames_;  // those that entry() may name, in order
  const char* damage_ = nullptr;
  std::unique_ptr<Utf16Decoder> utf16_;
  std::string utf8_;  // decoded, not yet read
  bool utf16_ended_ = false, cr_ends_lines_ = false;
};

// Standard input copied to an unnamed temporary file, so that it can be read twice.
class SpooledInput {
 public:
  explicit SpooledInput(Input& input) {
    if (input.path != "-") return;
    file_.reset(std::tmpfile());
    if (!file_) fail("standard input: cannot create a temporary file: ", errno_text());
    std::vector<char> block(1 << 18);
    bool good = true;
    for (size_t n; good && (n = std::fread(block.data(), 1, block.size(), stdin)) > 0;) {
      good = std::fwrite(block.data(), 1, n, file_.get()) == n;
    }
    if (!good || std::fflush(file_.get()) != 0) {
      fail("standard input: cannot write a temporary file: ", errno_text());
    }
    input.path = concat("/proc/self/fd/", fileno(file_.get()));
    input.name = "standard input";
  }

 private:
  std::unique_ptr<std::FILE, CloseFile> file_;
};

// ---------------------------------------------------------------------------------------------
// A window on the stream: the bytes that were read and not yet consumed. SIMDJSON_PADDING bytes
// behind them are readable. It does not reach beyond damage until that is passed.

class ByteWindow {
 public:
  explicit ByteWindow(ByteSource source, std::string_view head = {})  // `head` was read from it
      : source_(std::move(source)), buffer_(head.size() + 2 * kBlock), end_(head.size()) {
    std::copy(head.begin(), head.end(), buffer_.begin());
  }

  // The window. Valid until the next need(): consume() does not move bytes.
  std::string_view bytes() const { return {buffer_.data() + begin_, end_ - begin_}; }

  // The window, of at least `n` bytes; it is shorter only where the segment ends.
  std::string_view need(size_t n) {
    while (end_ - begin_ < n && !ended_) fill(n);
    return bytes();
  }
  void consume(size_t n) { begin_ += n, offset_ += n; }
  void skip(uint64_t n) {  // n bytes, or up to the end of the segment
    while (n > 0 && !need(1).empty()) {
      const size_t now = size_t(std::min<uint64_t>(n, end_ - begin_));
      consume(now);
      n -= now;
    }
  }

  // At the beginning of the stream, before anything is consumed: makes UTF-8 of UTF-16, passes a
  // byte order mark, and looks at how lines end in the first 64 KiB. Where carriage returns alone
  // end them, they become line feeds. A file with several ways has them on purpose.
  void begin_text() {
    if (utf16_charset(need(kBlock))) {
      source_.decode_utf16(bytes());
      begin_ = end_ = 0;
      ended_ = false;
    }
    if (need(kBlock).starts_with("\xef\xbb\xbf")) consume(3);
    std::string_view head = bytes().substr(0, kBlock);
    if (head.ends_with('\r') && !(ended_ && head.size() == bytes().size())) head.remove_suffix(1);
    size_t pairs = 0;
    for (size_t i = 0; (i = head.find("\r\n", i)) != std::string_view::npos; i += 2) pairs++;
    const auto cr = size_t(std::count(head.begin(), head.end(), '\r'));
    const auto lf = size_t(std::count(head.begin(), head.end(), '\n'));
    has_crlf_ = pairs > 0 && pairs == cr && pairs == lf;
    if (cr == 0 || lf > 0) return;
    std::replace(buffer_.data() + begin_, buffer_.data() + end_, '\r', '\n');
    source_.end_lines_at_cr();
  }
  bool has_crlf() const { return has_crlf_; }  // begin_text() found all lines to end with \r\n

  uint64_t offset() const { return offset_; }  // in the stream, of the window's first byte
  bool ended() const { return ended_; }        // the window holds all of the segment that is left

  // Where the segment has ended and the window is empty: the damage at which it ended, beyond which
  // the next segment begins; nullptr: the stream has ended. See ByteSource::resume.
  const char* pass_damage(std::string_view prefix) {
    const char* damage = source_.damage();
    if (!damage) return nullptr;
    source_.resume(prefix);
    ended_ = false;
    return damage;
  }

  Entry entry() const { return source_.entry(offset_); }  // the next record begins the window
  void seek(const Entry& entry) {                         // the window then begins at entry.begin
    source_.seek(entry);
    begin_ = end_ = 0;
    offset_ = entry.begin;
    ended_ = false;
  }

  const ByteSource& source() const { return source_; }
  const std::string& name() const { return source_.name(); }

 private:
  // Moves the window to the front of the buffer, makes room for n bytes and reads.
  void fill(size_t n) {
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_, begin_ = 0;
    source_.forget_places(offset_);
    const size_t least = std::max(n, end_ + kBlock) + simdjson::SIMDJSON_PADDING;
    if (buffer_.size() < least) buffer_.resize(std::max(least, 2 * buffer_.size()));
    const size_t room = buffer_.size() - end_ - simdjson::SIMDJSON_PADDING;
    const size_t got = source_.read(buffer_.data() + end_, room);
    end_ += got;
    ended_ = got < room;
  }

  static constexpr size_t kBlock = 1 << 16;
  ByteSource source_;
  std::vector<char> buffer_;
  size_t begin_ = 0, end_ = 0;  // the window in buffer_
  uint64_t offset_ = 0;
  bool ended_ = false, has_crlf_ = false;
};

// ---------------------------------------------------------------------------------------------
// Lines

// Text that comes in pieces, with a line feed for each \r\n.
class LineEnds {
 public:
  // Appends the text to `out`; an empty one is the end.
  void append(std::string_view text, std::string& out) {
    if (std::exchange(has_cr_, false) && !text.starts_with('\n')) out += '\r';
    for (size_t cr; (cr = text.find('\r')) != std::string_view::npos;) {
      has_cr_ = cr + 1 == text.size();
      const bool ends_line = has_cr_ || text[cr + 1] == '\n';
      out.append(text.substr(0, cr + !ends_line));
      text.remove_prefix(cr + 1);
    }
    out.append(text);
  }

 private:
  bool has_cr_ = false;  // the text so far ends with \r, which is not yet written
};

// All of a text file, whatever editor wrote it: UTF-8 without a mark, whose lines a line feed ends.
inline std::string read_text_file(const Input& input) {
  ByteWindow window{ByteSource(input)};
  window.begin_text();
  LineEnds line_ends;
  std::string text;
  for (std::string_view bytes = " "; !bytes.empty(); window.consume(bytes.size())) {
    bytes = window.need(1);
    window.has_crlf() ? line_ends.append(bytes, text) : void(text.append(bytes));
  }
  return text;
}

enum class LineEnd {
  none,     // the segment has ended
  whole,    // with its line break, or at the end of the file
  cut,      // by damage
  too_long  // it was skipped
};

// The next line without its \n or \r\n, consumed. It is valid until the window's next need(), and
// SIMDJSON_PADDING bytes behind it are readable.
inline LineEnd read_line(ByteWindow& window, std::string_view& line, size_t max_bytes = SIZE_MAX) {
  line = {};
  bool too_long = false;
  for (size_t searched = 0;;) {
    const std::string_view bytes = window.bytes();
    const size_t newline = bytes.find('\n', searched);  // memchr
    if (newline != std::string_view::npos || window.ended()) {
      if (bytes.empty()) return too_long ? LineEnd::too_long : LineEnd::none;
      line = bytes.substr(0, newline);
      window.consume(std::min(bytes.size(), line.size() + 1));
      if (line.ends_with('\r')) line.remove_suffix(1);
      if (too_long || line.size() > max_bytes) return LineEnd::too_long;
      const bool cut = newline == std::string_view::npos && window.source().damage();
      return cut ? LineEnd::cut : LineEnd::whole;
    }
    searched = bytes.size();
    if (searched > max_bytes) {
      too_long = true;
      window.consume(std::exchange(searched, 0));
    }
    window.need(searched + 1);
  }
}

// Whole lines with their line breaks, together about `bytes` bytes or else one long line, consumed.
// They are valid until the window's next need(). `number` counts lines.
inline bool read_lines(ByteWindow& window, std::string_view& lines, size_t bytes, int64_t& number) {
  for (;; bytes *= 2) {
    const std::string_view all = window.need(bytes);
    const bool is_last = window.ended() && all.size() <= bytes;
    const size_t newline = all.substr(0, bytes).rfind('\n');
    if (newline == std::string_view::npos && !is_last) continue;
    lines = is_last ? all : all.substr(0, newline + 1);
    window.consume(lines.size());
    number += std::count(lines.begin(), lines.end(), '\n');
    if (is_last && !lines.empty() && !lines.ends_with('\n')) number++;
    return !lines.empty();
  }
}

class LineReader {
 public:
  explicit LineReader(const Input& input) : LineReader(ByteWindow(ByteSource(input))) {}
  explicit LineReader(ByteWindow window) : window_(std::move(window)) { window_.begin_text(); }

  // See read_line().
  bool next(std::string_view& line) {
    if (read_line(window_, line) == LineEnd::none) return false;
    number_++;
    return true;
  }
  int64_t number() const { return number_; }  // of the line returned last, from 1
  std::string where() const { return concat(window_.name(), ":", number_); }
  const std::string& name() const { return window_.name(); }

 private:
  ByteWindow window_;
  int64_t number_ = 0;
};

}  // namespace cake
