// Token shards: what `bpe encode` writes and `train_gpt` reads.
//
//     ids --ShardWriter--> PREFIX_train_000000.bin ... --TokenStream--> one sequence
//                          PREFIX_val_000000.bin, PREFIX.json             |
//                                            windows of T ids <--Loader---+
//
// A shard is llm.c's file: a header of 256 int32, then ids as uint16 (magic 20240520, version 1) or
// uint32 (magic 20240801, version 7) where the vocabulary needs it. Header: [0] magic, [1] version,
// [2] number of ids; here also [3] vocabulary size and [4], [5] the tokenizer's hash, low and high
// half, all zero in llm.c's own files. Little-endian. PREFIX.json names the tokenizer and counts
// each split. It is written last, and must agree with the shards.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cake/json.h"
#include "cake/run.h"

namespace cake {

inline constexpr int kShardHeader = 256;              // int32s
inline constexpr int64_t kShardTokens = 100'000'000;  // ids a file, at most
inline constexpr int kMagic16 = 20240520, kMagic32 = 20240801;
inline constexpr int kVersion16 = 1, kVersion32 = 7;

// ---------------------------------------------------------------------------------------------
// PREFIX.json

struct DataInfo {
  std::string tokenizer;  // path of its directory or file, relative to PREFIX.json's directory
  uint64_t hash = 0;      // Tokenizer::hash()
  int vocab_size = 0;
  struct Split {
    int64_t documents = 0, tokens = 0, bytes = 0;  // bytes of text, without <|endoftext|>
  };
  Split train, val;
};

inline std::filesystem::path data_info_path(const std::filesystem::path& prefix) {
  return prefix.string() + ".json";
}

inline void write_data_info(const std::filesystem::path& prefix, const DataInfo& info) {
  const auto split = [](const DataInfo::Split& s) {
    return OrderedJson{{"documents", s.documents}, {"tokens", s.tokens}, {"bytes", s.bytes}};
  };
  write_json(data_info_path(prefix), {{"tokenizer", info.tokenizer},
                                      {"tokenizer_hash", format("%016llx", (long long)info.hash)},
                                      {"vocab_size", info.vocab_size},
                                      {"train", split(info.train)},
                                      {"val", split(info.val)}});
}

inline DataInfo read_data_info(const std::filesystem::path& prefix) {
  const std::filesystem::path path = data_info_path(prefix);
  if (!std::filesystem::exists(path)) {
    fail(path.string(), ": not found: make token shards with `./bpe encode ... -o ",
         prefix.string(), "`");
  }
  const std::string where = path.string();
  const Json json = read_json(path);
  DataInfo info;
  info.tokenizer = json_get<std::string>(json, "tokenizer", where);
  const std::string hash = json_get<std::string>(json, "tokenizer_hash", where);
  if (hash.size() != 16 || hash.find_first_not_of("0123456789abcdef") != std::string::npos) {
    fail(where, ": tokenizer_hash: found ", hash, ", expected 16 hexadecimal digits");
  }
  info.hash = std::stoull(hash, nullptr, 16);
  info.vocab_size = json_get<int>(json, "vocab_size", where);
  if (info.vocab_size < 1) {
    fail(where, ": vocab_size: found ", info.vocab_size, ", expected at least 1");
  }
  const auto split = [&](const char* name) {
    const auto it = json.find(name);
    if (it == json.end()) fail(where, ": ", name, " is missing");
    const auto count = [&](const char* key) {
      const int64_t n = json_get<int64_t>(*it, key, where);
      if (n < 0) fail(where, ": ", name, ".", key, ": found ", n, ", expected at least 0");
      return n;
    };
    return DataInfo::Split{count("documents"), count("tokens"), count("bytes")};
  };
  info.train = split("train");
  info.val = split("val");
  return info;
}

// ---------------------------------------------------------------------------------------------
// Shards of one split: PREFIX_SPLIT_NNNNNN.bin

inline std::filesystem::path shard_path(const std::filesystem::path& prefix,
                                        const std::string& split, int number) {
  return prefix.string() + "_" + split + format("_%06d.bin", number);
}

// The numbers of the shards that exist, ascending.
inline std::vector<int> shard_numbers(const std::filesystem::path& prefix,
                                      const std::string& split) {
  const std::string stem = prefix.filename().string() + "_" + split + "_";
  const std::filesystem::path directory = prefix.has_parent_path() ? prefix.parent_path() : ".";
  std::vector<int> numbers;
  std::error_code missing;
  for (const auto& entry : std::filesystem::directory_iterator(directory, missing)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(stem)) continue;
    const int number = std::atoi(name.c_str() + stem.size());
    if (number >= 0 && name == shard_path(prefix, split, number).filename()) {
      numbers.push_back(number);
    }
  }
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

// The bytes of an id in the shards of a vocabulary.
inline size_t shard_id_bytes(int vocab_size) { return vocab_size > 1 << 16 ? 4 : 2; }

// Ids of 16 bits, as the shards of small vocabularies hold them.
template <class Id>
void narrow_ids(std::span<const Id> ids, std::vector<uint16_t>& narrow) {
  if (narrow.size() < ids.size()) narrow.resize(ids.size());  // it never shrinks
  uint16_t* const out = narrow.data();
  for (size_t i = 0; i < ids.size(); i++) out[i] = uint16_t(ids[i]);
}

// Writes one split. Nothing appears under a final name before finish().
class ShardWriter {
 public:
  ShardWriter(std::filesystem::path prefix, std::string split, int vocab_size,
              uint64_t tokenizer_hash, int64_t tokens_per_file = kShardTokens)
      : prefix_(std::move(prefix)),
        split_(std::move(split)),
        vocab_size_(vocab_size),
        hash_(tokenizer_hash),
        tokens_per_file_(tokens_per_file) {
    if (prefix_.has_parent_path()) std::filesystem::create_directories(prefix_.parent_path());
  }

  void append(std::span<const int> ids) {
    for (const int id : ids) {
      if (id < 0 || id >= vocab_size_) {
        fail(prefix_.string(), ": found token ", id, ", expected 0 to ", vocab_size_ - 1);
      }
    }
    if (shard_id_bytes(vocab_size_) == 4) return append_packed(ids.data(), ids.size());
    narrow_ids(ids, narrow_);
    append_packed(narrow_.data(), ids.size());
  }

  // Ids of shard_id_bytes() each that are known to be in the vocabulary, in large writes.
  void append_packed(const void* ids, size_t count) {
    const size_t id_bytes = shard_id_bytes(vocab_size_);
    for (size_t i = 0; i < count;) {
      if (files_.empty() || in_file_ == tokens_per_file_) open_next();
      const size_t n = std::min(count - i, size_t(tokens_per_file_ - in_file_));
      files_.back()->write(static_cast<const char*>(ids) + i * id_bytes, n * id_bytes);
      in_file_ += int64_t(n);
      total_ += int64_t(n);
      i += n;
      // The disk writes while the next ids are made, so that closing the file need not wait long.
      unsynced_bytes_ += n * id_bytes;
      if (unsynced_bytes_ < kWritebackBytes) continue;
      files_.back()->start_writeback();
      unsynced_bytes_ = 0;
    }
  }

  // Completes the files and renames them to their final names. Removes the further shards of an
  // older, longer encoding with the same prefix. Returns the number of ids.
  int64_t finish() {
    if (!files_.empty()) close_last();
    for (auto& file : files_) file->commit();
    for (const int number : shard_numbers(prefix_, split_)) {
      if (number >= int(files_.size())) {
        std::filesystem::remove(shard_path(prefix_, split_, number));
      }
    }
    return total_;
  }

 private:
  static constexpr size_t kWritebackBytes = 8 << 20;

  void open_next() {
    if (!files_.empty()) close_last();
    const auto path = shard_path(prefix_, split_, int(files_.size()));
    files_.push_back(std::make_unique<AtomicFile>(path));
    files_.back()->seek(kShardHeader * sizeof(int32_t));  // written when the file is complete
    in_file_ = 0;
  }

  void close_last() {  // the number of ids is known now: writes the header
    const bool wide = shard_id_bytes(vocab_size_) == 4;
    std::vector<int32_t> header(kShardHeader);
    header[0] = wide ? kMagic32 : kMagic16;
    header[1] = wide ? kVersion32 : kVersion16;
    header[2] = int32_t(in_file_);
    header[3] = vocab_size_;
    header[4] = int32_t(uint32_t(hash_));
    header[5] = int32_t(uint32_t(hash_ >> 32));
    files_.back()->seek(0);
    files_.back()->write(header.data(), header.size() * sizeof(int32_t));
    files_.back()->close();
  }

  std::filesystem::path prefix_;
  std::string split_;
  int vocab_size_;
  uint64_t hash_;
  int64_t tokens_per_file_, in_file_ = 0, total_ = 0;
  size_t unsynced_bytes_ = 0;
  std::vector<std::unique_ptr<AtomicFile>> files_;
  std::vector<uint16_t> narrow_;
};

// One shard, mapped into memory. Checks its header and its length.
class Shard {
 public:
  explicit Shard(const std::filesystem::path& path) : file_(path) {
    const std::string where = path.string();
    constexpr int64_t header_bytes = kShardHeader * sizeof(int32_t);
    if (file_.size() < header_bytes) {
      fail(where, ": found ", file_.size(), " bytes, expected a header of ", header_bytes);
    }
    const int magic = header(0), version = header(1), tokens = header(2);
    if (magic != kMagic16 && magic != kMagic32) {
      fail(where, ": found magic ", magic, ", expected ", kMagic16, " or ", kMagic32,
           ": not a token shard");
    }
    width_ = magic == kMagic16 ? 2 : 4;
    const int expected = width_ == 2 ? kVersion16 : kVersion32;
    if (version != expected) fail(where, ": found version ", version, ", expected ", expected);
    size_ = (file_.size() - header_bytes) / int64_t(width_);
    if (tokens < 0 || file_.size() != header_bytes + int64_t(tokens) * int64_t(width_)) {
      fail(where, ": found ", size_, " tokens, expected the ", tokens, " of its header");
    }
  }

  int64_t size() const { return size_; }      // number of ids
  size_t id_bytes() const { return width_; }  // 2 or 4
  const unsigned char* ids() const { return file_.data() + kShardHeader * sizeof(int32_t); }
  uint32_t id(int64_t position) const {
    uint32_t id = 0;
    std::memcpy(&id, ids() + size_t(position) * width_, width_);
    return id;
  }
  int32_t header(int index) const {
    int32_t value;
    std::memcpy(&value, file_.data() + size_t(index) * sizeof value, sizeof value);
    return value;
  }
  int vocab_size() const { return header(3); }  // 0 in llm.c's own files, as is the hash
  uint64_t hash() const { return uint32_t(header(4)) | uint64_t(uint32_t(header(5))) << 32; }
  std::string path() const { return file_.path().string(); }

 private:
  MappedFile file_;
  int64_t size_ = 0;
  size_t width_ = 0;  // bytes of an id
};

// All shards of one split as one sequence of ids, mapped into memory.
class TokenStream {
 public:
  // Checks the header and length of each shard, and that it agrees with PREFIX.json, if that
  // exists.
  TokenStream(const std::filesystem::path& prefix, const std::string& split) {
    std::optional<DataInfo> info;
    if (std::filesystem::exists(data_info_path(prefix))) {
      info = read_data_info(prefix);
      vocab_size_ = info->vocab_size, hash_ = info->hash;
    }
    const std::vector<int> numbers = shard_numbers(prefix, split);
    if (numbers.empty()) {
      fail(shard_path(prefix, split, 0).string(),
           ": not found: make token shards with `./bpe encode ... -o ", prefix.string(), "`");
    }
    for (size_t i = 0; i < numbers.size(); i++) {
      if (numbers[i] != numbers[0] + int(i)) {  // llm.c numbers some splits from 1
        fail(shard_path(prefix, split, numbers[0] + int(i)).string(),
             ": not found, although a later shard of its split exists");
      }
      add(Shard(shard_path(prefix, split, numbers[i])));
    }
    if (!info) return;
    const int64_t expected = split == "val" ? info->val.tokens : info->train.tokens;
    if (size_ != expected) {
      fail(data_info_path(prefix).string(), ": ", split, ".tokens: found ", expected,
           ", expected the ", size_, " of its shards: encode the data again");
    }
  }

  int64_t size() const { return size_; }
  int vocab_size() const { return vocab_size_; }  // 0: llm.c's shards without PREFIX.json

  // Ids [begin, begin + out.size()). Throws Error with shard and position if an id is not in the
  // vocabulary.
  void copy(int64_t begin, std::span<int> out) const {
    if (begin < 0 || begin + int64_t(out.size()) > size_) {
      fail("token stream: found positions ", begin, " to ", begin + int64_t(out.size()),
           ", expected 0 to ", size_);
    }
    auto part = std::upper_bound(
        parts_.begin(), parts_.end(), begin,
        [](int64_t offset, const Part& p) { return offset < p.begin + p.shard.size(); });
    while (!out.empty()) {
      const int64_t offset = begin - part->begin;
      const size_t n = size_t(std::min(int64_t(out.size()), part->shard.size() - offset));
      for (size_t i = 0; i < n; i++) {
        const uint32_t id = part->shard.id(offset + int64_t(i));
        if (id > largest_id()) {
          fail(part->shard.path(), ": position ", offset + int64_t(i), ": found token ", id,
               ", expected 0 to ", largest_id());
        }
        out[i] = int(id);
      }
      begin += int64_t(n);
      out = out.subspan(n);
      part++;
    }
  }

 private:
  struct Part {
    Shard shard;
    int64_t begin;  // position of its first id in the stream
  };

  uint32_t largest_id() const { return vocab_size_ > 0 ? uint32_t(vocab_size_ - 1) : INT32_MAX; }

  // The spare ints of the header against PREFIX.json, or without it against the first shard.
  void add(Shard shard) {
    const std::string where = shard.path();
    const int vocab_size = shard.vocab_size();
    if (vocab_size != 0 || shard.hash() != 0) {  // llm.c's own files have neither
      if (vocab_size < 1) {
        fail(where, ": found a vocabulary of ", vocab_size, ", expected at least 1");
      }
      if (vocab_size_ == 0) vocab_size_ = vocab_size, hash_ = shard.hash();
      if (vocab_size != vocab_size_) {
        fail(where, ": found a vocabulary of ", vocab_size, ", expected ", vocab_size_);
      }
      if (shard.hash() != hash_) {
        fail(where, ": found tokens of another tokenizer than the data's: encode the data again");
      }
    }
    const int64_t size = shard.size();
    parts_.push_back({std::move(shard), size_});
    size_ += size;
  }

  std::vector<Part> parts_;
  int64_t size_ = 0;
  int vocab_size_ = 0;
  uint64_t hash_ = 0;
};

// ---------------------------------------------------------------------------------------------
// Windows

// Appends the window [begin, begin + length) of the stream: its ids, the next id of each as its
// target, and a document start at the first position and at every separator, which begins a
// document.
inline void append_window(const TokenStream& stream, int64_t begin, int64_t length, int separator,
                          std::vector<int>& tokens, std::vector<int>& targets,
                          std::vector<int>& doc_starts) {
  const size_t n = size_t(length), offset = tokens.size();
  tokens.resize(offset + n + 1);
  stream.copy(begin, std::span(tokens).subspan(offset));
  targets.insert(targets.end(), tokens.begin() + int64_t(offset) + 1, tokens.end());
  tokens.pop_back();
  for (size_t i = offset; i < offset + n; i++) {
    if (i == offset || tokens[i] == separator) doc_starts.push_back(int(i));
  }
}

// Validation: windows of T that do not overlap, the last one shorter. Every id but the stream's
// first is a target exactly once.
inline int64_t validation_windows(const TokenStream& stream, int T) {
  return std::max<int64_t>(0, (stream.size() - 1 + T - 1) / T);
}

// A permutation of 0 .. n-1 that needs no memory: a Feistel network over the next even number of
// bits, walked along its cycle until it lands below n (Black and Rogaway 2002).
inline int64_t permuted(int64_t index, int64_t n, uint64_t seed) {
  int half = 1;
  while (half < 31 && (int64_t(1) << 2 * half) < n) half++;
  const uint64_t mask = (uint64_t(1) << half) - 1;
  uint64_t x = uint64_t(index);
  do {
    uint64_t left = x >> half, right = x & mask;
    for (uint64_t round = 0; round < 4; round++) {
      left = std::exchange(right, left ^ (mix64(seed, round, right) & mask));
    }
    x = left << half | right;
  } while (x >= uint64_t(n));
  return int64_t(x);
}

struct LoaderState {
  int64_t epoch = 0, window = 0;  // the next window, in the epoch's order
};

// Training: windows of T ids in a shuffled order. An epoch cuts the stream into windows that do not
// overlap, beginning at an offset of its own, and visits each once. The next windows depend on
// nothing but (stream, T, seed, state).
class Loader {
 public:
  Loader(const TokenStream& stream, int T, uint64_t seed, int separator)
      : stream_(stream), T_(T), seed_(seed), separator_(separator) {
    if (T < 1) fail("loader: found a context of ", T, ", expected at least 1");
    if (stream.size() < 2) {
      fail("training data: found ", stream.size(), " tokens, expected at least 2");
    }
  }

  // Packs the next `windows` windows end to end: tokens and targets (N), doc_starts (D+1).
  void next(int windows, std::vector<int>& tokens, std::vector<int>& targets,
            std::vector<int>& doc_starts) {
    tokens.clear(), targets.clear(), doc_starts.clear();
    for (int w = 0; w < windows; w++) {
      const int64_t n = windows_in(state_.epoch);
      const uint64_t order = mix64(seed_, hash64("order"), uint64_t(state_.epoch));
      const int64_t begin = offset(state_.epoch) + permuted(state_.window, n, order) * T_;
      append_window(stream_, begin, window_length(), separator_, tokens, targets, doc_starts);
      if (++state_.window == n) state_ = {state_.epoch + 1, 0};
    }
    doc_starts.push_back(int(tokens.size()));
  }

  LoaderState state() const { return state_; }
  void set_state(LoaderState state) {
    if (state.epoch < 0 || state.window < 0 || state.window >= windows_in(state.epoch)) {
      fail("loader: found window ", state.window, " of epoch ", state.epoch, ", expected one of ",
           windows_in(state.epoch), ": the data is not what the run began with");
    }
    state_ = state;
  }
  double epochs() const {  // of the data seen so far
    return double(state_.epoch) + double(state_.window) / double(windows_in(state_.epoch));
  }
  int64_t window_length() const { return std::min<int64_t>(T_, stream_.size() - 1); }
  int64_t windows_in(int64_t epoch) const {
    return (stream_.size() - 1 - offset(epoch)) / window_length();
  }
  int64_t offset(int64_t epoch) const {  // of the epoch's first window; leaves at least one
    const int64_t n = std::min<int64_t>(window_length(), stream_.size() - window_length());
    return int64_t(Rng{mix64(seed_, hash64("offset"), uint64_t(epoch))}.below(uint64_t(n)));
  }

 private:
  const TokenStream& stream_;
  int T_;
  uint64_t seed_;
  int separator_;
  LoaderState state_;
};

}  // namespace cake
