// GGUF, the one-file format of llama.cpp (its docs: ggml/docs/gguf.md): metadata by key, then
// tensors, of which many types are blocks of quantized numbers. Here is the file; what a model's
// keys and tensors mean is in cake/gguf_model.h.
//
//     "GGUF"  u32 version 3  i64 tensors  i64 keys
//     keys      string name, i32 type, value
//     tensors   string name, u32 dimensions, i64 sizes (fastest first), i32 type, u64 offset
//     zeros up to a multiple of general.alignment (default 32)
//     the tensors' data, each padded to the alignment
//
// Everything is little-endian; a string is u64 length and bytes. Nothing in a file is trusted:
// every count and offset is checked against the size of the file before it is used.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "cake/number_formats.h"
#include "cake/run.h"

namespace cake {

static_assert(std::endian::native == std::endian::little, "values are copied as they lie in files");

enum class GgufType : uint32_t {  // of a tensor; the numbers are the file's
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q4_K = 12,
  q5_K = 13,
  q6_K = 14,
  bf16 = 30,
};
struct GgufBlocks {  // of one type; the name is null where the type is not supported
  const char* name;
  int values, bytes;  // of a block
};
GgufBlocks gguf_blocks(GgufType type);

struct GgufTensor {
  std::string name;
  GgufType type = GgufType::f32;
  std::vector<int64_t> shape;  // slowest first, as safetensors has it: the file's order reversed
  int64_t count = 0;           // values
  const unsigned char* data = nullptr;  // of any alignment
  std::string where;                    // "FILE: NAME", for errors

  int64_t bytes() const;
  // Values [begin, begin + out.size()), which are whole blocks, by all threads.
  void read(int64_t begin, std::span<float> out) const;
};

// The types of values; the numbers are the file's.
enum class GgufValueType : uint32_t {
  u8,
  i8,
  u16,
  i16,
  u32,
  i32,
  f32,
  boolean,
  text,
  list,
  u64,
  i64,
  f64
};
inline constexpr uint32_t kGgufValueTypes = 13;

// Integers without a sign are uint64_t, floats and doubles double, lists of bool integers.
using GgufValue = std::variant<uint64_t, int64_t, double, bool, std::string, std::vector<int64_t>,
                               std::vector<double>, std::vector<std::string>>;

class GgufFile {
 public:
  // A .gguf file; of a model split into NAME-00001-of-0000N.gguf and so on, the first file, which
  // finds the others beside it. Throws Error where anything but the tensors' values is wrong.
  explicit GgufFile(const std::filesystem::path& path);
  // A file that begins with "GGUF", or whose name ends with .gguf.
  static bool is_gguf(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  bool has(const std::string& key) const { return keys_.count(key) > 0; }
  // Throws Error naming file and key when it is absent, or of another type or range. A number is
  // finite.
  int64_t integer(const std::string& key) const;
  double number(const std::string& key) const;
  bool boolean(const std::string& key) const;
  const std::string& text(const std::string& key) const;
  const std::vector<std::string>& texts(const std::string& key) const;
  const std::vector<int64_t>& integers(const std::string& key) const;
  int64_t integer_or(const std::string& key, int64_t fallback) const;
  double number_or(const std::string& key, double fallback) const;
  bool boolean_or(const std::string& key, bool fallback) const;
  std::string text_or(const std::string& key, const std::string& fallback) const;

  const std::map<std::string, GgufValue>& keys() const { return keys_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }  // in the file's order
  const GgufTensor* find(const std::string& name) const;               // null when absent
  std::string hash() const { return hash_files(files_); }

 private:
  class Reader;
  std::map<std::string, GgufValue> add_file(const std::filesystem::path& path);
  void add_other_files();
  template <class T>
  const T& get(const std::string& key, const char* expected) const;

  std::filesystem::path path_;
  std::vector<MappedFile> files_;
  std::map<std::string, GgufValue> keys_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, size_t> index_;  // in tensors_, by name
};

// Writes a file: all keys, then all tensors' names, shapes and types, then their values in order.
// The same calls write the same bytes.
class GgufWriter {
 public:
  explicit GgufWriter(const std::filesystem::path& path);
  void set_u32(const std::string& key, uint32_t value);
  void set_f32(const std::string& key, float value);
  void set_bool(const std::string& key, bool value);
  void set_text(const std::string& key, const std::string& value);
  void set_texts(const std::string& key, std::span<const std::string> values);
  void set_i32s(const std::string& key, std::span<const int32_t> values);
  // `shape`: slowest first. f32, f16, bf16, or q8_0 and q4_0, whose rows are whole blocks of 32.
  void add_tensor(const std::string& name, std::vector<int64_t> shape, GgufType type);
  // The values that come next, in the order of add_tensor: a tensor, or whole blocks of one. F32
  // keeps every bit; the other types throw Error for NaN, for infinity and for a value beyond their
  // largest (65504 in f16).
  void write(std::span<const float> values);
  void commit();

 private:
  struct Entry {
    std::string name;
    std::vector<int64_t> shape;
    GgufType type;
    int64_t count;  // values
  };
  void begin_key(const std::string& key, GgufValueType type);
  template <class T>
  void append(const T& value);  // to header_
  void append(std::string_view text);
  void write_header();
  void encode(const Entry& tensor, int64_t begin, std::span<const float> values);
  void pad();

  AtomicFile file_;
  std::string where_;   // the file's name, for errors
  std::string header_;  // the keys as in the file
  std::set<std::string> key_names_, tensor_names_;
  std::vector<Entry> tensors_;
  bool header_written_ = false;
  int64_t position_ = 0;  // in the file
  size_t current_ = 0;    // the tensor that is being written, and how many values of it are
  int64_t values_written_ = 0;
  std::vector<unsigned char> encoded_;
};

// ---------------------------------------------------------------------------------------------
// Types

// The numbers of ggml's types without a meaning here: nullptr where there is none.
inline const char* gguf_other_type(uint32_t type) {
  static constexpr std::array<const char*, 42> kNames = {
      nullptr,   nullptr, nullptr,  nullptr, "Q4_2",  "Q4_3",   nullptr, nullptr,   nullptr,
      "Q8_1",    "Q2_K",  "Q3_K",   nullptr, nullptr, nullptr,  "Q8_K",  "IQ2_XXS", "IQ2_XS",
      "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8",    "I16",     "I32",
      "I64",     "F64",   "IQ1_M",  nullptr, nullptr, nullptr,  nullptr, "TQ1_0",   "TQ2_0",
      nullptr,   nullptr, nullptr,  "MXFP4", "NVFP4", "Q1_0"};
  return type < kNames.size() ? kNames[type] : nullptr;
}

inline GgufBlocks gguf_blocks(GgufType type) {
  switch (type) {
    case GgufType::f32:
      return {"F32", 1, 4};
    case GgufType::f16:
      return {"F16", 1, 2};
    case GgufType::bf16:
      return {"BF16", 1, 2};
    case GgufType::q8_0:
      return {"Q8_0", 32, 34};
    case GgufType::q4_0:
      return {"Q4_0", 32, 18};
    case GgufType::q4_1:
      return {"Q4_1", 32, 20};
    case GgufType::q5_0:
      return {"Q5_0", 32, 22};
    case GgufType::q5_1:
      return {"Q5_1", 32, 24};
    case GgufType::q4_K:
      return {"Q4_K", 256, 144};
    case GgufType::q5_K:
      return {"Q5_K", 256, 176};
    case GgufType::q6_K:
      return {"Q6_K", 256, 210};
  }
  return {nullptr, 0, 0};
}

// ---------------------------------------------------------------------------------------------
// Blocks into values, bit for bit as the package gguf (quants.py) and llama.cpp: the products are
// exact in float, so that it does not matter which of them are fused with a sum.

inline float gguf_f16(const unsigned char* bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, 2);
  return f16_to_float(bits);
}

// 32 values. f16 d; 16 bytes, of which byte j holds q[j] and q[j + 16]: x = d (q - 8).
inline void dequantize_q4_0(const unsigned char* block, float* x) {
  const float d = gguf_f16(block);
  const unsigned char* q = block + 2;
  for (int j = 0; j < 16; j++) {
    x[j] = d * float((q[j] & 15) - 8);
    x[j + 16] = d * float((q[j] >> 4) - 8);
  }
}
// f16 d, f16 m; 16 bytes as above: x = d q + m.
inline void dequantize_q4_1(const unsigned char* block, float* x) {
  const float d = gguf_f16(block), m = gguf_f16(block + 2);
  const unsigned char* q = block + 4;
  for (int j = 0; j < 16; j++) {
    x[j] = d * float(q[j] & 15) + m;
    x[j + 16] = d * float(q[j] >> 4) + m;
  }
}
// f16 d; u32, whose bit j is the fifth bit of q[j]; 16 bytes as above: x = d (q - 16).
inline void dequantize_q5_0(const unsigned char* block, float* x) {
  const float d = gguf_f16(block);
  uint32_t high;
  std::memcpy(&high, block + 2, 4);
  const unsigned char* q = block + 6;
  for (int j = 0; j < 16; j++) {
    x[j] = d * float(int((q[j] & 15) | (high >> j & 1) << 4) - 16);
    x[j + 16] = d * float(int(q[j] >> 4 | (high >> (j + 16) & 1) << 4) - 16);
  }
}
// f16 d, f16 m; u32 and 16 bytes as above: x = d q + m.
inline void dequantize_q5_1(const unsigned char* block, float* x) {
  const float d = gguf_f16(block), m = gguf_f16(block + 2);
  uint32_t high;
  std::memcpy(&high, block + 4, 4);
  const unsigned char* q = block + 8;
  for (int j = 0; j < 16; j++) {
    x[j] = d * float(int((q[j] & 15) | (high >> j & 1) << 4)) + m;
    x[j + 16] = d * float(int(q[j] >> 4 | (high >> (j + 16) & 1) << 4)) + m;
  }
}

// The 12 bytes of q4_K and q5_K: a scale and a minimum of 6 bits for each of the 8 groups of 32
// values. Groups 0 to 3 have them in the low 6 bits of bytes 0 to 3 and 4 to 7; groups 4 to 7 have
// 4 bits in bytes 8 to 11, and 2 above those of groups 0 to 3.
inline void gguf_k_scales(const unsigned char* s, float d, float dmin, float* scale, float* min) {
  for (int g = 0; g < 4; g++) {
    scale[g] = d * float(s[g] & 63);
    min[g] = dmin * float(s[g + 4] & 63);
    scale[g + 4] = d * float((s[g + 8] & 15) | (s[g] >> 6) << 4);
    min[g + 4] = dmin * float(s[g + 8] >> 4 | (s[g + 4] >> 6) << 4);
  }
}
// 256 values. f16 d, f16 dmin; 12 bytes of scales; 128 bytes, of which each 32 hold two groups of
// 32 values, in the low and in the high half: x = d scale q - dmin min.
inline void dequantize_q4_K(const unsigned char* block, float* x) {
  float scale[8], min[8];
  gguf_k_scales(block + 4, gguf_f16(block), gguf_f16(block + 2), scale, min);
  const unsigned char* q = block + 16;
  for (int g = 0; g < 8; g += 2, q += 32, x += 64) {
    for (int j = 0; j < 32; j++) {
      x[j] = scale[g] * float(q[j] & 15) - min[g];
      x[j + 32] = scale[g + 1] * float(q[j] >> 4) - min[g + 1];
    }
  }
}
// As q4_K, and before the 128 bytes 32, whose bit g of byte j is the fifth bit of q[j] of group g.
inline void dequantize_q5_K(const unsigned char* block, float* x) {
  float scale[8], min[8];
  gguf_k_scales(block + 4, gguf_f16(block), gguf_f16(block + 2), scale, min);
  const unsigned char *high = block + 16, *q = block + 48;
  for (int g = 0; g < 8; g += 2, q += 32, x += 64) {
    for (int j = 0; j < 32; j++) {
      x[j] = scale[g] * float((q[j] & 15) | (high[j] >> g & 1) << 4) - min[g];
      x[j + 32] = scale[g + 1] * float(q[j] >> 4 | (high[j] >> (g + 1) & 1) << 4) - min[g + 1];
    }
  }
}
// 256 values. 128 bytes of low halves; 64 bytes of high pairs of bits; 16 int8 scales, one for each
// 16 values; f16 d: x = d scale (q - 32). Of each 128 values, value 64 h + i has its low bits in
// half h of byte i, value 32 s + i its high ones in pair s of byte i.
inline void dequantize_q6_K(const unsigned char* block, float* x) {
  const unsigned char *low = block, *high = block + 128;
  const float d = gguf_f16(block + 208);
  float scale[16];
  for (int g = 0; g < 16; g++) scale[g] = d * float(int8_t(block[192 + g]));
  for (int half = 0; half < 2; half++, low += 64, high += 32, x += 128) {
    for (int s = 0; s < 4; s++) {
      for (int i = 0; i < 32; i++) {
        const int q = (low[32 * (s & 1) + i] >> 4 * (s >> 1) & 15) | (high[i] >> 2 * s & 3) << 4;
        x[32 * s + i] = scale[8 * half + 2 * s + i / 16] * float(q - 32);
      }
    }
  }
}

inline int64_t GgufTensor::bytes() const {
  const GgufBlocks blocks = gguf_blocks(type);
  return count / blocks.values * blocks.bytes;
}

inline void GgufTensor::read(int64_t begin, std::span<float> out) const {
  const GgufBlocks blocks = gguf_blocks(type);
  const auto n = int64_t(out.size());
  if (begin < 0 || begin > count || n > count - begin || begin % blocks.values != 0 ||
      n % blocks.values != 0) {
    fail(where, ": asked for values ", begin, " to ", begin + n, " of ", count,
         ", expected whole blocks of ", blocks.values);
  }
  constexpr int64_t kPiece = 1 << 14;  // values: whole blocks of every type
  const unsigned char* src = data + begin / blocks.values * blocks.bytes;
  const auto widen = [&](auto convert) {  // (bytes, values, how many of them)
#pragma omp parallel for schedule(static) if (n > kPiece)
    for (int64_t i = 0; i < n; i += kPiece) {
      convert(src + i / blocks.values * blocks.bytes, out.data() + i, std::min(kPiece, n - i));
    }
  };
  const auto widen_halves = [&](auto to_float) {
    widen([&](const unsigned char* halves, float* x, int64_t values) {
      for (int64_t i = 0; i < values; i++) {
        uint16_t half;
        std::memcpy(&half, halves + 2 * i, 2);
        x[i] = to_float(half);
      }
    });
  };
  const auto widen_blocks = [&](auto dequantize) {
    widen([&](const unsigned char* block, float* x, int64_t values) {
      for (int64_t i = 0; i < values; i += blocks.values, block += blocks.bytes) {
        dequantize(block, x + i);
      }
    });
  };
#define CAKE_BLOCKS(type) \
  case GgufType::type:    \
    return widen_blocks([](const unsigned char* block, float* x) { dequantize_##type(block, x); })
  switch (type) {
    case GgufType::f32:
      return widen([](const unsigned char* floats, float* x, int64_t values) {
        std::memcpy(x, floats, size_t(4 * values));
      });
    case GgufType::f16:
      return widen_halves([](uint16_t x) { return f16_to_float(x); });
    case GgufType::bf16:
      return widen_halves([](uint16_t x) { return bf16_to_float(x); });
    case GgufType::q8_0:
      return widen_blocks([](const unsigned char* block, float* x) {
        Q8Block q;
        std::memcpy(&q, block, sizeof q);
        dequantize_q8_0(q, x);
      });
      CAKE_BLOCKS(q4_0);
      CAKE_BLOCKS(q4_1);
      CAKE_BLOCKS(q5_0);
      CAKE_BLOCKS(q5_1);
      CAKE_BLOCKS(q4_K);
      CAKE_BLOCKS(q5_K);
      CAKE_BLOCKS(q6_K);
  }
#undef CAKE_BLOCKS
}

// ---------------------------------------------------------------------------------------------
// Reading

// A name in an error of one line, whatever its bytes: ASCII.
inline std::string gguf_printable(std::string_view name) {
  std::string text(name.substr(0, 80));
  for (char& c : text) {
    if (c < 0x20 || c > 0x7e) c = '?';  // whether char is signed or not
  }
  return name.size() > 80 ? text + "..." : text;
}

inline std::string gguf_kind(const GgufValue& value) {
  static constexpr const char* kKinds[] = {
      "an integer", "an integer",         "a number",          "true or false",
      "a string",   "a list of integers", "a list of numbers", "a list of strings"};
  return kKinds[value.index()];
}

// What stands before the tensors' data, from the first byte on. `what` names it in errors.
class GgufFile::Reader {
 public:
  explicit Reader(const MappedFile& file) : file_(file), where_(file.path().string()) {}

  std::string what;
  int64_t position() const { return position_; }
  int64_t left() const { return file_.size() - position_; }

  template <class T>
  T read() {
    need(sizeof(T));
    T value;
    std::memcpy(&value, file_.data() + position_, sizeof(T));
    position_ += int64_t(sizeof(T));
    return value;
  }
  bool read_bool() {
    const auto value = read<uint8_t>();
    if (value > 1) wrong(int(value), "true (1) or false (0)");
    return value == 1;
  }
  std::string_view read_text() {
    const auto length = read<uint64_t>();
    if (length > uint64_t(left())) {
      fail(where_, ": ", what, ": found a length of ", length, " bytes, of which the file has ",
           left(), " left: it is truncated or damaged");
    }
    position_ += int64_t(length);
    return {reinterpret_cast<const char*>(file_.data()) + position_ - length, size_t(length)};
  }
  std::string read_name(const char* kind, size_t max_length) {
    const std::string_view found = read_text();
    if (found.empty() || found.size() > max_length || found.find('\0') != std::string_view::npos) {
      fail(where_, ": ", what, ": found ", found.size(), " bytes (", gguf_printable(found),
           "), expected the name of a ", kind, " of 1 to ", max_length, " bytes other than 0");
    }
    return std::string(found);
  }
  // How many entries of at least `bytes` bytes follow.
  int64_t read_count(int64_t bytes) {
    const auto found = read<int64_t>();
    if (found < 0 || found > left() / bytes) {
      fail(where_, ": ", what, ": found ", found, ", for which the file's ", left(),
           " bytes left are too few: it is truncated or damaged");
    }
    return found;
  }
  GgufValue read_value() {
    using enum GgufValueType;
    const auto type = read<uint32_t>();
    switch (GgufValueType(type)) {
      case u8:
        return uint64_t(read<uint8_t>());
      case u16:
        return uint64_t(read<uint16_t>());
      case u32:
        return uint64_t(read<uint32_t>());
      case u64:
        return read<uint64_t>();
      case i8:
        return int64_t(read<int8_t>());
      case i16:
        return int64_t(read<int16_t>());
      case i32:
        return int64_t(read<int32_t>());
      case i64:
        return read<int64_t>();
      case f32:
        return double(read<float>());
      case f64:
        return read<double>();
      case boolean:
        return read_bool();
      case text:
        return std::string(read_text());
      case list:
        return read_list();
    }
    wrong(type, concat("the type of a value, 0 to ", kGgufValueTypes - 1));
  }
  template <class Found>
  [[noreturn]] void wrong(const Found& found, const std::string& expected) const {
    fail(where_, ": ", what, ": found ", found, ", expected ", expected);
  }

 private:
  void need(int64_t bytes) const {
    if (bytes > left()) {
      fail(where_, ": found the end of the file, of ", file_.size(), " bytes, within ", what,
           ": it is truncated or damaged");
    }
  }
  template <class T, class ReadOne>
  std::vector<T> list_of(int64_t bytes, ReadOne read_one) {
    std::vector<T> values(size_t(read_count(bytes)));
    for (T& value : values) value = read_one();
    return values;
  }
  template <class T>
  std::vector<int64_t> integers() {
    return list_of<int64_t>(sizeof(T), [&] {
      const T value = read<T>();
      if (!std::in_range<int64_t>(value)) wrong(value, "integers below 2^63");
      return int64_t(value);
    });
  }
  GgufValue read_list() {
    using enum GgufValueType;
    const auto type = read<uint32_t>();
    switch (GgufValueType(type)) {
      case u8:
        return integers<uint8_t>();
      case u16:
        return integers<uint16_t>();
      case u32:
        return integers<uint32_t>();
      case u64:
        return integers<uint64_t>();
      case i8:
        return integers<int8_t>();
      case i16:
        return integers<int16_t>();
      case i32:
        return integers<int32_t>();
      case i64:
        return integers<int64_t>();
      case f32:
        return list_of<double>(4, [&] { return double(read<float>()); });
      case f64:
        return list_of<double>(8, [&] { return read<double>(); });
      case boolean:
        return list_of<int64_t>(1, [&] { return int64_t(read_bool()); });
      case text:
        return list_of<std::string>(8, [&] { return std::string(read_text()); });
      case list:
        wrong("a list of lists", "a list of numbers or strings");
    }
    wrong(type, concat("the type of a list's values, 0 to ", kGgufValueTypes - 1));
  }

  const MappedFile& file_;
  std::string where_;
  int64_t position_ = 0;
};

inline bool GgufFile::is_gguf(const std::filesystem::path& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) return false;
  if (path.extension() == ".gguf") return true;
  char magic[4] = {};
  std::ifstream(path, std::ios::binary).read(magic, 4);
  return std::string_view(magic, 4) == "GGUF";
}

inline GgufFile::GgufFile(const std::filesystem::path& path) : path_(path) {
  keys_ = add_file(path);
  if (integer_or("split.count", 1) != 1) add_other_files();
}

// The parts of a split model hold its tensors in turn; the first has all keys too.
inline void GgufFile::add_other_files() {
  const auto name_end = [](int64_t no, int64_t count) {
    return format("-%05lld-of-%05lld.gguf", static_cast<long long>(no + 1),
                  static_cast<long long>(count));
  };
  const int64_t no = integer("split.no"), count = integer("split.count");
  if (count < 1 || count > 65535 || no < 0 || no >= count) {
    fail(path_.string(), ": split.no, split.count: found ", no, " and ", count,
         ", expected a part's number, from 0 on, and how many parts there are, at most 65535");
  }
  const std::string name = path_.filename().string(), end = name_end(no, count);
  if (!name.ends_with(end)) {
    fail(path_.string(), ": this is part ", no + 1, " of ", count,
         " of a model, expected a name that ends with ", end, ", as the other parts have");
  }
  const std::string stem = name.substr(0, name.size() - end.size());
  if (no > 0) {
    fail(path_.string(), ": this is part ", no + 1, " of ", count,
         " of a model, expected the first part: ",
         (path_.parent_path() / (stem + name_end(0, count))).string());
  }
  for (int64_t i = 1; i < count; i++) {
    const std::filesystem::path part = path_.parent_path() / (stem + name_end(i, count));
    if (!std::filesystem::exists(part)) {
      fail(part.string(), ": not found: it is part ", i + 1, " of ", count, " of ", path_.string());
    }
    const auto keys = add_file(part);
    for (const auto& [key, expected] : {std::pair{"split.no", i}, {"split.count", count}}) {
      const auto found = keys.find(key);
      if (found == keys.end() || found->second != GgufValue(uint64_t(expected))) {
        fail(part.string(), ": ", key, ": expected ", expected, ", as the file's name says");
      }
    }
  }
  const int64_t tensors = integer("split.tensors.count");
  if (tensors != int64_t(tensors_.size())) {
    fail(path_.string(), ": split.tensors.count: found ", tensors, ", expected ", tensors_.size(),
         ", the tensors of all ", count, " parts");
  }
}

// Appends the tensors of one file and returns its keys.
inline std::map<std::string, GgufValue> GgufFile::add_file(const std::filesystem::path& path) {
  constexpr int64_t kLeastKey = 14, kLeastTensor = 25;  // bytes in the file
  files_.emplace_back(path);
  const MappedFile& file = files_.back();
  const std::string where = path.string();
  refuse_git_lfs_pointer({reinterpret_cast<const char*>(file.data()), size_t(file.size())}, where);
  Reader in(file);

  in.what = "the header";
  const auto magic = in.read<std::array<char, 4>>();
  if (std::string_view(magic.data(), 4) != "GGUF") {
    fail(where, ": found a file that begins with \"", gguf_printable({magic.data(), 4}),
         "\", expected \"GGUF\"");
  }
  const auto version = in.read<uint32_t>();
  if (version != 0 && (version & 0xffff) == 0) {
    fail(where, ": found big-endian numbers, expected a little-endian GGUF file");
  }
  if (version != 2 && version != 3)
    fail(where, ": found GGUF version ", version, ", expected 3 or 2");
  in.what = "the number of tensors";
  const int64_t tensor_count = in.read_count(kLeastTensor);
  in.what = "the number of keys";
  const int64_t key_count = in.read_count(kLeastKey);

  std::map<std::string, GgufValue> keys;
  for (int64_t i = 0; i < key_count; i++) {
    in.what = concat("key ", i + 1, " of ", key_count);
    const std::string key = in.read_name("key", 65535);
    in.what = gguf_printable(key);
    if (keys.count(key)) fail(where, ": ", in.what, ": found the key twice");
    keys.emplace(key, in.read_value());
  }
  uint64_t alignment = 32;
  if (const auto found = keys.find("general.alignment"); found != keys.end()) {
    const uint64_t* value = std::get_if<uint64_t>(&found->second);
    if (!value || !std::has_single_bit(*value) || *value > uint64_t(1) << 31) {
      fail(where, ": general.alignment: found ", value ? concat(*value) : gguf_kind(found->second),
           ", expected a power of two, as u32");
    }
    alignment = *value;
  }
  const auto align = [&](uint64_t n) { return (n + alignment - 1) / alignment * alignment; };

  const size_t first = tensors_.size();
  std::vector<uint64_t> offsets;
  for (int64_t i = 0; i < tensor_count; i++) {
    in.what = concat("tensor ", i + 1, " of ", tensor_count);
    GgufTensor t;
    t.name = in.read_name("tensor", 63);
    t.where = in.what = gguf_printable(t.name);
    t.where = where + ": " + t.where;
    if (!index_.emplace(t.name, tensors_.size()).second) fail(t.where, ": found the tensor twice");
    const auto dimensions = in.read<uint32_t>();
    if (dimensions > 4) fail(t.where, ": found ", dimensions, " dimensions, expected at most 4");
    t.count = 1;
    for (uint32_t d = 0; d < dimensions; d++) {
      t.shape.insert(t.shape.begin(), in.read<int64_t>());
      if (t.shape[0] < 0 || __builtin_mul_overflow(t.count, t.shape[0], &t.count)) {
        fail(t.where, ": found a dimension of ", t.shape[0], ", expected a possible size");
      }
    }
    const auto type = in.read<uint32_t>();
    t.type = GgufType(type);
    const GgufBlocks blocks = gguf_blocks(t.type);
    if (!blocks.name) {
      const char* name = gguf_other_type(type);
      fail(t.where, ": found type ", name ? name : concat(type),
           ", expected F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K");
    }
    const int64_t row = t.shape.empty() ? 1 : t.shape.back();
    if (row % blocks.values != 0) {
      fail(t.where, ": found rows of ", row, " values, expected whole blocks of ", blocks.values,
           " of type ", blocks.name);
    }
    int64_t bytes;
    if (__builtin_mul_overflow(t.count / blocks.values, int64_t(blocks.bytes), &bytes)) {
      fail(t.where, ": found ", t.count, " values, expected a possible number");
    }
    offsets.push_back(in.read<uint64_t>());
    tensors_.push_back(std::move(t));
  }

  // The tensors lie end to end, each padded to the alignment.
  const uint64_t data_begin = align(uint64_t(in.position()));
  uint64_t end = 0;
  for (size_t i = 0; i < offsets.size(); i++) {
    GgufTensor& t = tensors_[first + i];
    if (offsets[i] != end) {
      fail(t.where, ": found the offset ", offsets[i], ", expected ", end,
           i == 0 ? ", as it is the first tensor" : ", where the tensor before it ends");
    }
    const uint64_t begin = data_begin + end, size = uint64_t(file.size());
    if (begin > size || uint64_t(t.bytes()) > size - begin) {
      fail(t.where, ": found the end of the file, of ", size, " bytes, expected ", t.bytes(),
           " bytes of values from byte ", begin, " on: it is truncated or damaged");
    }
    t.data = file.data() + begin;
    end = align(end + uint64_t(t.bytes()));
  }
  return keys;
}

template <class T>
const T& GgufFile::get(const std::string& key, const char* expected) const {
  const auto found = keys_.find(key);
  if (found == keys_.end()) fail(path_.string(), ": ", key, " is missing");
  if (const T* value = std::get_if<T>(&found->second)) return *value;
  fail(path_.string(), ": ", key, ": found ", gguf_kind(found->second), ", expected ", expected);
}
inline int64_t GgufFile::integer(const std::string& key) const {
  const auto found = keys_.find(key);
  if (found == keys_.end() || !std::holds_alternative<uint64_t>(found->second)) {
    return get<int64_t>(key, "an integer");
  }
  const auto value = std::get<uint64_t>(found->second);
  if (!std::in_range<int64_t>(value)) {
    fail(path_.string(), ": ", key, ": found ", value, ", expected an integer below 2^63");
  }
  return int64_t(value);
}
inline double GgufFile::number(const std::string& key) const {
  const double value = get<double>(key, "a number");
  if (!std::isfinite(value)) {
    fail(path_.string(), ": ", key, ": found ", value, ", expected a finite number");
  }
  return value;
}
inline bool GgufFile::boolean(const std::string& key) const {
  return get<bool>(key, "true or false");
}
inline const std::string& GgufFile::text(const std::string& key) const {
  return get<std::string>(key, "a string");
}
inline const std::vector<std::string>& GgufFile::texts(const std::string& key) const {
  return get<std::vector<std::string>>(key, "a list of strings");
}
inline const std::vector<int64_t>& GgufFile::integers(const std::string& key) const {
  return get<std::vector<int64_t>>(key, "a list of integers");
}
inline int64_t GgufFile::integer_or(const std::string& key, int64_t fallback) const {
  return has(key) ? integer(key) : fallback;
}
inline double GgufFile::number_or(const std::string& key, double fallback) const {
  return has(key) ? number(key) : fallback;
}
inline bool GgufFile::boolean_or(const std::string& key, bool fallback) const {
  return has(key) ? boolean(key) : fallback;
}
inline std::string GgufFile::text_or(const std::string& key, const std::string& fallback) const {
  return has(key) ? text(key) : fallback;
}
inline const GgufTensor* GgufFile::find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

// ---------------------------------------------------------------------------------------------
// Writing

// d is the value of the largest magnitude (the first of equal ones) divided by -8, and q is
// x / d + 8.5 without its fraction, at most 15. As in quantize_q8_0, 1/d is that of the d which is
// not yet rounded to f16. The bytes are those of quantize in the package gguf.
inline void quantize_q4_0(const float* x, unsigned char* block) {  // (32) -> (18)
  float extreme = x[0];
  for (int i = 1; i < 32; i++) {
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  }
  const float d = extreme / -8, inverse = d != 0 ? 1 / d : 0;
  const uint16_t half = float_to_f16(d);
  std::memcpy(block, &half, 2);
  if (std::isinf(inverse)) {  // d is far below f16's numbers
    std::memset(block + 2, 0, 16);
    return;
  }
  float quotient[32];
  for (int i = 0; i < 32; i++) quotient[i] = x[i] * inverse;
  asm("" : "+m"(quotient));  // rounded before 8.5 is added: no compiler fuses the two
  for (int i = 0; i < 16; i++) {
    const int low = std::min(15, int(quotient[i] + 8.5f));
    const int high = std::min(15, int(quotient[i + 16] + 8.5f));
    block[2 + i] = static_cast<unsigned char>(low | high << 4);
  }
}

inline GgufWriter::GgufWriter(const std::filesystem::path& path)
    : file_(path), where_(path.string()) {}

template <class T>
void GgufWriter::append(const T& value) {
  static_assert(std::is_arithmetic_v<T>);
  header_.append(reinterpret_cast<const char*>(&value), sizeof value);
}
inline void GgufWriter::append(std::string_view text) {
  append(uint64_t(text.size()));
  header_ += text;
}

inline void GgufWriter::begin_key(const std::string& key, GgufValueType type) {
  if (header_written_) fail(where_, ": ", key, ": a key behind the values of tensors");
  if (key.empty() || key.size() > 65535 || key.find('\0') != std::string::npos ||
      key == "general.alignment") {
    fail(where_, ": ", gguf_printable(key), ": cannot write a key of this name");
  }
  if (!key_names_.insert(key).second) fail(where_, ": ", key, ": the key is there already");
  append(std::string_view(key));
  append(uint32_t(type));
}
inline void GgufWriter::set_u32(const std::string& key, uint32_t value) {
  begin_key(key, GgufValueType::u32);
  append(value);
}
inline void GgufWriter::set_f32(const std::string& key, float value) {
  begin_key(key, GgufValueType::f32);
  append(value);
}
inline void GgufWriter::set_bool(const std::string& key, bool value) {
  begin_key(key, GgufValueType::boolean);
  append(uint8_t(value));
}
inline void GgufWriter::set_text(const std::string& key, const std::string& value) {
  begin_key(key, GgufValueType::text);
  append(std::string_view(value));
}
inline void GgufWriter::set_texts(const std::string& key, std::span<const std::string> values) {
  begin_key(key, GgufValueType::list);
  append(uint32_t(GgufValueType::text));
  append(uint64_t(values.size()));
  for (const std::string& value : values) append(std::string_view(value));
}
inline void GgufWriter::set_i32s(const std::string& key, std::span<const int32_t> values) {
  begin_key(key, GgufValueType::list);
  append(uint32_t(GgufValueType::i32));
  append(uint64_t(values.size()));
  for (const int32_t value : values) append(value);
}

inline void GgufWriter::add_tensor(const std::string& name, std::vector<int64_t> shape,
                                   GgufType type) {
  using enum GgufType;
  const std::string where = where_ + ": " + gguf_printable(name);
  if (header_written_) fail(where, ": a tensor behind the values of tensors");
  if (name.empty() || name.size() > 63 || name.find('\0') != std::string::npos) {
    fail(where, ": found a name of ", name.size(), " bytes, expected 1 to 63, without a 0");
  }
  if (!tensor_names_.insert(name).second) fail(where, ": the tensor is there already");
  const GgufBlocks blocks = gguf_blocks(type);
  if (type != f32 && type != f16 && type != bf16 && type != q8_0 && type != q4_0) {
    fail(where, ": cannot write type ", blocks.name ? blocks.name : concat(uint32_t(type)),
         ", expected F32, F16, BF16, Q8_0 or Q4_0");
  }
  int64_t count = 1, bytes;
  bool possible = !shape.empty() && shape.size() <= 4;
  for (const int64_t size : shape) {
    possible = possible && size > 0 && !__builtin_mul_overflow(count, size, &count);
  }
  if (!possible || __builtin_mul_overflow(count, int64_t(4), &bytes)) {
    fail(where, ": found ", shape.size(), " sizes, expected 1 to 4 that are possible");
  }
  if (shape.back() % blocks.values != 0) {
    fail(where, ": found rows of ", shape.back(), " values, expected whole blocks of ",
         blocks.values, " of type ", blocks.name);
  }
  tensors_.push_back({name, std::move(shape), type, count});
}

// Zeros up to the alignment.
inline void GgufWriter::pad() {
  constexpr int64_t kAlignment = 32;
  static constexpr char kZeros[kAlignment] = {};
  const int64_t zeros = (kAlignment - position_ % kAlignment) % kAlignment;
  file_.write(kZeros, size_t(zeros));
  position_ += zeros;
}

inline void GgufWriter::write_header() {
  header_written_ = true;
  const std::string keys = std::exchange(header_, "GGUF");
  append(uint32_t(3));
  append(uint64_t(tensors_.size()));
  append(uint64_t(key_names_.size()));
  header_ += keys;
  uint64_t offset = 0;
  for (const Entry& t : tensors_) {
    append(std::string_view(t.name));
    append(uint32_t(t.shape.size()));
    for (size_t d = t.shape.size(); d-- > 0;) append(t.shape[d]);
    append(uint32_t(t.type));
    append(offset);
    const GgufBlocks blocks = gguf_blocks(t.type);
    offset += uint64_t(t.count / blocks.values * blocks.bytes + 31) / 32 * 32;
  }
  file_.write(header_);
  position_ = int64_t(header_.size());
  header_ = {};
  pad();
}

// Fills encoded_ with values of a tensor in its type; `begin` is the index of the first.
inline void GgufWriter::encode(const Entry& t, int64_t begin, std::span<const float> values) {
  using enum GgufType;
  constexpr int64_t kPiece = 1 << 14;  // values: whole blocks of every type
  const GgufBlocks blocks = gguf_blocks(t.type);
  // q8_0 and q4_0 divide the largest value of a block by 127 and by 8, and store that in f16.
  const float highest = t.type == bf16   ? 0x1.fep127f
                        : t.type == q8_0 ? 127 * kHighestF16
                        : t.type == q4_0 ? 8 * kHighestF16
                                         : kHighestF16;
  const auto n = int64_t(values.size());
  encoded_.resize(size_t(n / blocks.values * blocks.bytes));
  int64_t bad = n;  // the first value that the type cannot hold
#pragma omp parallel for schedule(static) reduction(min : bad) if (n > kPiece)
  for (int64_t piece = 0; piece < n; piece += kPiece) {
    const int64_t end = std::min(n, piece + kPiece);
    const float* x = values.data();
    bool all_good = true;
    for (int64_t i = piece; i < end; i++) all_good &= std::fabs(x[i]) <= highest;  // NaN is not
    if (!all_good) {
      for (int64_t i = end; i-- > piece;) {
        if (!(std::fabs(x[i]) <= highest)) bad = std::min(bad, i);
      }
      continue;
    }
    unsigned char* out = encoded_.data() + piece / blocks.values * blocks.bytes;
    for (int64_t i = piece; i < end; i += blocks.values, out += blocks.bytes) {
      if (t.type == q4_0) {
        quantize_q4_0(x + i, out);
      } else if (t.type == q8_0) {
        const Q8Block block = quantize_q8_0(x + i);
        std::memcpy(out, &block, sizeof block);
      } else {
        const uint16_t half = t.type == bf16 ? float_to_bf16(x[i]) : float_to_f16(x[i]);
        std::memcpy(out, &half, 2);
      }
    }
  }
  if (bad == n) return;
  fail(where_, ": ", gguf_printable(t.name), ": found ", values[size_t(bad)], " as value ",
       begin + bad, ", expected at most ", highest, " in type ", blocks.name, "; F32 holds it");
}

inline void GgufWriter::write(std::span<const float> values) {
  constexpr int64_t kChunk = 1 << 20;  // values: whole blocks of every type
  if (!header_written_) write_header();
  if (current_ == tensors_.size()) fail(where_, ": values behind those of the last tensor");
  const Entry& t = tensors_[current_];
  const auto n = int64_t(values.size());
  if (n > t.count - values_written_ || n % gguf_blocks(t.type).values != 0) {
    fail(where_, ": ", gguf_printable(t.name), ": got ", n, " values, expected the ",
         t.count - values_written_, " left of the tensor, or whole blocks of them");
  }
  for (int64_t i = 0; i < n; i += kChunk) {
    const auto chunk = values.subspan(size_t(i), size_t(std::min(kChunk, n - i)));
    if (t.type == GgufType::f32) {
      file_.write(chunk.data(), chunk.size_bytes());
      position_ += int64_t(chunk.size_bytes());
    } else {
      encode(t, values_written_ + i, chunk);
      file_.write(encoded_.data(), encoded_.size());
      position_ += int64_t(encoded_.size());
    }
  }
  values_written_ += n;
  if (values_written_ < t.count) return;
  pad();
  current_++;
  values_written_ = 0;
}

inline void GgufWriter::commit() {
  if (!header_written_) write_header();
  if (current_ < tensors_.size()) {
    const Entry& t = tensors_[current_];
    fail(where_, ": ", gguf_printable(t.name), ": got ", values_written_, " values, expected ",
         t.count);
  }
  file_.commit();
}

}  // namespace cake
