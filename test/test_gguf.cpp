// Numbers of 16 bits and of blocks, GGUF files written by the package gguf (dev/golden/gguf.py),
// files made here byte by byte with one lie each, damage, and files that cake writes.
#include "cake/gguf.h"

#include <doctest/doctest.h>
#include <sys/mman.h>

#include <functional>

#include "test/support.h"

namespace cake {
namespace {

std::string golden(const std::string& name) { return "test/golden/gguf/" + name + ".gguf"; }

std::vector<float> values_of(const GgufTensor& t) {
  std::vector<float> values(size_t(t.count));
  t.read(0, values);
  return values;
}
std::vector<float> values_of(const GgufFile& file, const std::string& name) {
  const GgufTensor* t = file.find(name);
  REQUIRE(t);
  return values_of(*t);
}
std::string_view data_of(const GgufFile& file, const std::string& name) {
  const GgufTensor* t = file.find(name);
  REQUIRE(t);
  return {reinterpret_cast<const char*>(t->data), size_t(t->bytes())};
}

// Floats are compared by their bits, so that -0 is not 0.
std::vector<uint32_t> bits_of(std::span<const float> values) {
  std::vector<uint32_t> bits(values.size());
  std::memcpy(bits.data(), values.data(), values.size_bytes());
  return bits;
}
template <class T>
std::string bytes_of(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

// ---------------------------------------------------------------------------------------------
// Numbers

// For every finite number h >= 0 of a 16-bit format: h itself, the numbers around the middle
// between h and the next, and that middle, in both signs. All of these are exact in float.
void check_every_half(uint16_t infinity, uint16_t (*narrow)(float), float (*widen)(uint16_t),
                      double (*value)(int)) {
  int64_t wrong = 0;
  for (int h = 0; h < infinity; h++) {
    const auto x = float(value(h));
    const auto middle = float((value(h) + value(h + 1)) / 2);
    const float below = std::nextafter(middle, 0.f);
    const float above = std::nextafter(middle, std::numeric_limits<float>::infinity());
    for (const int sign : {0, 0x8000}) {
      const float s = sign ? -1 : 1;
      wrong += bits_of({{widen(uint16_t(h | sign))}}) != bits_of({{s * x}});
      wrong += narrow(s * x) != (h | sign);
      wrong += narrow(s * below) != (h | sign);
      wrong += narrow(s * middle) != ((h + h % 2) | sign);
      wrong += narrow(s * above) != ((h + 1) | sign);
    }
  }
  CHECK(wrong == 0);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  CHECK(narrow(kInfinity) == infinity);
  CHECK(narrow(-kInfinity) == (infinity | 0x8000));
  CHECK(widen(infinity) == kInfinity);
  CHECK(widen(uint16_t(infinity | 0x8000)) == -kInfinity);
  for (int payload = 1; payload < 0x8000 - infinity; payload++) {
    const auto nan = uint16_t(infinity | payload);
    wrong += !std::isnan(widen(nan)) || !std::isnan(widen(uint16_t(nan | 0x8000)));
    wrong += narrow(widen(nan)) <= infinity || narrow(widen(nan)) >= 0x8000;
  }
  CHECK(wrong == 0);
}

TEST_CASE("f16: every number keeps its value, and every middle between two rounds to even") {
  check_every_half(0x7c00, float_to_f16, f16_to_float, [](int h) {  // 5 bits of exponent, 10 more
    const int exponent = h >> 10, mantissa = h & 0x3ff;
    return exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  });
}

TEST_CASE("bf16: every number keeps its value, and every middle between two rounds to even") {
  check_every_half(0x7f80, float_to_bf16, bf16_to_float, [](int h) {  // 8 bits of exponent, 7 more
    const int exponent = h >> 7, mantissa = h & 0x7f;
    return exponent ? std::ldexp(128 + mantissa, exponent - 134) : std::ldexp(mantissa, -133);
  });
}

TEST_CASE("f16: a NaN without bits in the upper half of its payload stays NaN") {
  CHECK(float_to_f16(std::bit_cast<float>(0x7f800001u)) == 0x7e00);
  CHECK(float_to_f16(std::bit_cast<float>(0xff800001u)) == 0xfe00);
  CHECK(float_to_bf16(std::bit_cast<float>(0x7f800001u)) == 0x7fc0);
}

TEST_CASE("a block of q8_0 rounds halves away from zero") {
  float x[32] = {127, .5f, -.5f, 1.5f, -1.5f, 2.5f, -2.5f, std::nextafter(.5f, 0.f), 126.5f};
  const Q8Block block = quantize_q8_0(x);
  CHECK(block.d == float_to_f16(1));
  const int expected[9] = {127, 1, -1, 2, -2, 3, -3, 0, 127};
  for (int i = 0; i < 32; i++) CHECK(block.q[i] == (i < 9 ? expected[i] : 0));
}

TEST_CASE("the values of a block of q8_0 give the block again") {
  Rng rng{.seed = 3};
  for (int n = 0; n < 1000; n++) {
    float x[32], y[32];
    const double scale = std::exp(rng.normal() * 5);
    for (float& v : x) v = float(rng.normal() * scale);
    const Q8Block block = quantize_q8_0(x);
    if (block.d == 0 || std::isinf(f16_to_float(block.d))) continue;
    dequantize_q8_0(block, y);
    CHECK(bytes_of(quantize_q8_0(y)) == bytes_of(block));
  }
}

TEST_CASE("a block of q8_0 with NaN or infinity has values that are NaN, wherever it stands") {
  for (const float bad : {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    for (int i = 0; i < 32; i++) {
      float x[32], y[32];
      for (int j = 0; j < 32; j++) x[j] = j == i ? bad : float(j);
      const Q8Block block = quantize_q8_0(x);
      CHECK(block.d == 0x7e00);
      for (const int8_t q : block.q) CHECK(q == 0);
      dequantize_q8_0(block, y);
      for (const float v : y) CHECK(std::isnan(v));
    }
  }
}

TEST_CASE("values that are hard to round become the package's q8_0, q4_0, f16 and bf16") {
  const GgufFile file(golden("rounding"));
  const std::vector<float> x = values_of(file, "x");
  REQUIRE(x.size() > 1500);
  std::string q8_0, q4_0, f16, bf16;
  for (size_t i = 0; i < x.size(); i += 32) {
    q8_0 += bytes_of(quantize_q8_0(&x[i]));
    std::array<unsigned char, 18> block;
    quantize_q4_0(&x[i], block.data());
    q4_0 += bytes_of(block);
  }
  for (const float v : x) f16 += bytes_of(float_to_f16(v)), bf16 += bytes_of(float_to_bf16(v));
  const auto first_wrong_row = [&](const std::string& found, const char* name) -> int64_t {
    const std::string_view expected = data_of(file, name);
    REQUIRE(found.size() == expected.size());
    const size_t row = found.size() * 32 / x.size();
    for (size_t i = 0; i < found.size(); i++) {
      if (found[i] != expected[i]) return int64_t(i / row);
    }
    return -1;
  };
  CHECK(first_wrong_row(q8_0, "q8_0") == -1);
  CHECK(first_wrong_row(q4_0, "q4_0") == -1);
  CHECK(first_wrong_row(f16, "f16") == -1);
  CHECK(first_wrong_row(bf16, "bf16") == -1);
}

TEST_CASE("blocks of every type have the package's values, bit for bit") {
  const GgufFile file(golden("types"));
  int types = 0;
  for (const GgufTensor& t : file.tensors()) {
    const GgufTensor* expected = file.find(t.name + ".values");
    if (!expected) continue;
    CAPTURE(t.name);
    types++;
    CHECK(expected->count == t.count);
    CHECK(bits_of(values_of(t)) == bits_of(values_of(*expected)));
  }
  CHECK(types == 10);
}

// ---------------------------------------------------------------------------------------------
// Reading

TEST_CASE("keys of every type have the values that the package gguf wrote") {
  const GgufFile file(golden("types"));
  CHECK(file.text("general.architecture") == "test");
  CHECK(file.integer("second.uint8") == 255);
  CHECK(file.integer("second.int8") == 127);
  CHECK(file.integer("second.uint16") == 65535);
  CHECK(file.integer("second.int16") == 32767);
  CHECK(file.integer("second.uint32") == 4294967295);
  CHECK(file.integer("second.int32") == 2147483647);
  CHECK(file.integer("second.uint64") == INT64_MAX);
  CHECK(file.integer("second.int64") == INT64_MAX);
  CHECK(file.number("second.float32") == double(1e-5f));
  CHECK(file.number("second.float64") == -1e300);
  CHECK(file.boolean("second.bool") == false);
  CHECK(file.text("second.string") == "naïve 日本");
  CHECK(file.integer("first.uint8") == 0);
  CHECK(file.integer("first.int8") == -128);
  CHECK(file.integer("first.uint16") == 1);
  CHECK(file.integer("first.int16") == -32768);
  CHECK(file.integer("first.uint32") == 2);
  CHECK(file.integer("first.int32") == -2147483648);
  CHECK(file.integer("first.uint64") == 3);
  CHECK(file.integer("first.int64") == INT64_MIN);
  CHECK(file.number("first.float32") == -.5);
  CHECK(file.number("first.float64") == .1);
  CHECK(file.boolean("first.bool") == true);
  CHECK(file.text("first.string") == "");
  CHECK(std::get<uint64_t>(file.keys().at("largest")) == UINT64_MAX);
  using Integers = std::vector<int64_t>;
  CHECK(file.integers("list.uint8") == Integers{0, 255});
  CHECK(file.integers("list.int8") == Integers{-128, 127});
  CHECK(file.integers("list.uint16") == Integers{1, 65535});
  CHECK(file.integers("list.int16") == Integers{-32768, 32767});
  CHECK(file.integers("list.uint32") == Integers{2, 4294967295});
  CHECK(file.integers("list.int32") == Integers{-2147483648, 2147483647});
  CHECK(file.integers("list.uint64") == Integers{3, INT64_MAX});
  CHECK(file.integers("list.int64") == Integers{INT64_MIN, INT64_MAX});
  CHECK(file.integers("list.bool") == Integers{1, 0});
  CHECK(file.texts("list.string") == std::vector<std::string>{"", "naïve 日本"});
  using Numbers = std::vector<double>;
  CHECK(std::get<Numbers>(file.keys().at("list.float32")) == Numbers{-.5, double(1e-5f)});
  CHECK(std::get<Numbers>(file.keys().at("list.float64")) == Numbers{.1, -1e300});
  CHECK(file.integer("general.alignment") == 64);
  CHECK(file.keys().size() == 39);
}

TEST_CASE("a key that is absent, or of another type or range, is named") {
  const GgufFile file(golden("types"));
  const std::string where = golden("types") + ": ";
  CHECK(error_of([&] { file.integer("x.y"); }) == where + "x.y is missing");
  CHECK(error_of([&] { file.integer("second.string"); }) ==
        where + "second.string: found a string, expected an integer");
  CHECK(error_of([&] { file.integer("largest"); }) ==
        where + "largest: found 18446744073709551615, expected an integer below 2^63");
  CHECK(error_of([&] { file.number("second.bool"); }) ==
        where + "second.bool: found true or false, expected a number");
  CHECK(error_of([&] { file.boolean("second.uint8"); }) ==
        where + "second.uint8: found an integer, expected true or false");
  CHECK(error_of([&] { file.text("list.string"); }) ==
        where + "list.string: found a list of strings, expected a string");
  CHECK(error_of([&] { file.texts("list.int8"); }) ==
        where + "list.int8: found a list of integers, expected a list of strings");
  CHECK(error_of([&] { file.integers("list.float32"); }) ==
        where + "list.float32: found a list of numbers, expected a list of integers");
  CHECK(file.integer_or("x", 7) == 7);
  CHECK(file.number_or("x", .5) == .5);
  CHECK(file.boolean_or("x", true) == true);
  CHECK(file.text_or("x", "y") == "y");
  CHECK(file.integer_or("second.int8", 7) == 127);
  CHECK(contains(error_of([&] { file.integer_or("second.bool", 7); }), "expected an integer"));
  CHECK(contains(error_of([&] { file.text_or("second.bool", ""); }), "expected a string"));
}

TEST_CASE("tensors have the shapes and values that the package gguf wrote") {
  const GgufFile file(golden("types"));
  REQUIRE(file.tensors().size() == 21);
  const GgufTensor& t = file.tensors()[0];
  CHECK(t.name == "f32");
  CHECK(t.where == golden("types") + ": f32");
  CHECK(t.shape == std::vector<int64_t>{2, 3});
  const std::vector<float> expected = {1, -2, 3.5, 0, -0.f, 1e-40f};
  CHECK(bits_of(values_of(t)) == bits_of(expected));
  CHECK(file.find("f16")->shape == std::vector<int64_t>{2, 16});
  CHECK(file.find("q6_k")->shape == std::vector<int64_t>{1, 512});
  CHECK(file.find("q6_k")->bytes() == 420);
  CHECK(file.find("q6_K") == nullptr);
}

TEST_CASE("a part of a tensor is read, in whole blocks") {
  const GgufFile file(golden("types"));
  for (const GgufTensor& t : file.tensors()) {
    CAPTURE(t.name);
    const std::vector<float> all = values_of(t);
    const int block = gguf_blocks(t.type).values;
    std::vector<float> part(size_t(t.count - block));
    t.read(block, part);
    CHECK(bits_of(part) == bits_of(std::span(all).subspan(size_t(block))));
    t.read(t.count, std::span<float>());
    const auto read = [&](int64_t begin, size_t n) {
      std::vector<float> out(n);
      return error_of([&] { t.read(begin, out); });
    };
    CHECK(contains(read(0, size_t(t.count + block)), "expected whole blocks"));
    CHECK(contains(read(-block, size_t(block)), "expected whole blocks"));
    CHECK(contains(read(t.count + block, 0), "expected whole blocks"));
    if (block == 1) continue;
    CHECK(contains(read(1, size_t(block)), "expected whole blocks"));
    CHECK(contains(read(0, size_t(block) + 1), "expected whole blocks"));
  }
}

TEST_CASE("the three files of a split model are one model") {
  const GgufFile file(golden("split-00001-of-00003"));
  CHECK(file.integer("answer") == 42);
  REQUIRE(file.tensors().size() == 3);
  for (const char* name : {"a", "b", "c"}) {
    CHECK(values_of(file, name) == std::vector<float>{float(name[0]), 1});
  }
  CHECK(contains(file.find("b")->where, "split-00002-of-00003.gguf: b"));
}

// A file that is made here, part by part; a test changes one of them.
struct Bytes {
  std::string text;
  template <class T>
  requires std::is_arithmetic_v<T> Bytes& add(T value) {
    text += bytes_of(value);
    return *this;
  }
  Bytes& add(std::string_view string) {
    add(uint64_t(string.size()));
    text += string;
    return *this;
  }
  Bytes& key(std::string_view name, GgufValueType type) { return add(name).add(uint32_t(type)); }
  Bytes& tensor(std::string_view name, const std::vector<int64_t>& dimensions, uint32_t type,
                uint64_t offset) {
    add(name).add(uint32_t(dimensions.size()));
    for (const int64_t d : dimensions) add(d);
    return add(type).add(offset);
  }
};
struct Parts {
  std::string magic = "GGUF";
  uint32_t version = 3;
  int64_t tensors = 2, keys = 3;
  Bytes key_bytes = Bytes()
                        .key("answer", GgufValueType::u32)
                        .add(uint32_t(42))
                        .key("names", GgufValueType::list)
                        .add(uint32_t(GgufValueType::text))
                        .add(uint64_t(2))
                        .add("one")
                        .add("two")
                        .key("yes", GgufValueType::boolean)
                        .add(uint8_t(1));
  Bytes tensor_bytes = Bytes().tensor("a", {3, 2}, 0, 0).tensor("b", {32, 1}, 8, 32);
  size_t alignment = 32;
  std::string data = std::string(32, '\0') + std::string(34, '\x11') + std::string(30, '\0');

  std::string head() const {
    Bytes all{magic};
    all.add(version).add(tensors).add(keys);
    all.text += key_bytes.text + tensor_bytes.text;
    return all.text;
  }
  std::string file() const {
    std::string text = head();
    text.resize((text.size() + alignment - 1) / alignment * alignment);
    return text + data;
  }
};
// A file in memory: thousands of them take no time.
class MemoryFile {
 public:
  explicit MemoryFile(const std::string& bytes) : fd_(memfd_create("test", 0)) {
    REQUIRE(pwrite(fd_, bytes.data(), bytes.size(), 0) == ssize_t(bytes.size()));
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { close(fd_); }
  std::string path() const { return concat("/proc/self/fd/", fd_); }

 private:
  int fd_;
};
// The Error of a file of these bytes, without the name of the file.
std::string error_of_file(const std::string& bytes) {
  const MemoryFile file(bytes);
  const std::string path = file.path(), error = error_of([&] { GgufFile{path}; });
  if (error == "no error") return error;
  CHECK(error.starts_with(path + ": "));
  CHECK(error.find('\n') == std::string::npos);
  return error.substr(std::min(error.size(), path.size() + 2));
}

TEST_CASE("a file that was made here byte by byte is read") {
  const TempDir dir;
  for (const uint32_t version : {2, 3}) {
    write_file(dir / "x", Parts{.version = version}.file());
    const GgufFile file(dir / "x");
    CHECK(file.integer("answer") == 42);
    CHECK(file.texts("names") == std::vector<std::string>{"one", "two"});
    CHECK(file.boolean("yes"));
    CHECK(values_of(file, "a") == std::vector<float>(6));
    CHECK(values_of(file, "b") == std::vector<float>(32, 17 * f16_to_float(0x1111)));
  }
  // the zeros behind the last tensor may be missing, and bytes may follow
  std::string bytes = Parts().file();
  CHECK(error_of_file(bytes.substr(0, bytes.size() - 30)) == "no error");
  CHECK(error_of_file(bytes.substr(0, bytes.size() - 31)) != "no error");
  CHECK(error_of_file(bytes + "more") == "no error");
  // a file of keys alone, as llama.cpp's vocabularies are
  CHECK(error_of_file(Parts{.tensors = 0, .tensor_bytes = {}, .data = ""}.head()) == "no error");
}

TEST_CASE("a file with one lie is refused, and the lie is named") {
  const auto change = [](const std::function<void(Parts&)>& lie) {
    Parts parts;
    lie(parts);
    return error_of_file(parts.file());
  };
  const auto with_key = [&](const Bytes& key) {
    return change([&](Parts& p) { p.keys++, p.key_bytes.text += key.text; });
  };
  const auto with_tensors = [&](int64_t n, const Bytes& tensors) {
    return change([&](Parts& p) { p.tensors = n, p.tensor_bytes = tensors; });
  };
  using enum GgufValueType;

  SUBCASE("header") {
    CHECK(change([](Parts& p) { p.magic = "GG\n!"; }) ==
          "found a file that begins with \"GG?!\", expected \"GGUF\"");
    CHECK(change([](Parts& p) { p.version = 1; }) == "found GGUF version 1, expected 3 or 2");
    CHECK(change([](Parts& p) { p.version = 0; }) == "found GGUF version 0, expected 3 or 2");
    CHECK(change([](Parts& p) { p.version = 4; }) == "found GGUF version 4, expected 3 or 2");
    CHECK(change([](Parts& p) { p.version = 3 << 24; }) ==
          "found big-endian numbers, expected a little-endian GGUF file");
    for (const int64_t n : {INT64_MIN, int64_t(-1), int64_t(1) << 62, INT64_MAX}) {
      CHECK(contains(change([n](Parts& p) { p.tensors = n; }),
                     concat("the number of tensors: found ", n, ", for which the file's ")));
      CHECK(contains(change([n](Parts& p) { p.keys = n; }),
                     concat("the number of keys: found ", n, ", for which the file's ")));
    }
    CHECK(error_of_file("") ==
          "found the end of the file, of 0 bytes, within the header: it is "
          "truncated or damaged");
  }
  SUBCASE("keys") {
    CHECK(with_key(Bytes().key("answer", u32).add(uint32_t(1))) == "answer: found the key twice");
    CHECK(contains(with_key(Bytes().key("", u32).add(uint32_t(1))),
                   "key 4 of 4: found 0 bytes (), expected the name of a key"));
    CHECK(contains(with_key(Bytes().key(std::string_view("a\0b", 3), u32).add(uint32_t(1))),
                   "key 4 of 4: found 3 bytes (a?b), expected the name of a key"));
    CHECK(contains(with_key(Bytes().key(std::string(65536, 'x'), u32).add(uint32_t(1))),
                   "key 4 of 4: found 65536 bytes (xxx"));
    CHECK(with_key(Bytes().key("k", GgufValueType(13)).add(uint64_t(1))) ==
          "k: found 13, expected the type of a value, 0 to 12");
    CHECK(with_key(Bytes().key("k", GgufValueType(0xffffffff)).add(uint64_t(1))) ==
          "k: found 4294967295, expected the type of a value, 0 to 12");
    CHECK(with_key(Bytes().key("k", boolean).add(uint8_t(2))) ==
          "k: found 2, expected true (1) or false (0)");
    CHECK(with_key(Bytes().key("k", list).add(uint32_t(boolean)).add(uint64_t(1)).add('\xff')) ==
          "k: found 255, expected true (1) or false (0)");
    CHECK(with_key(Bytes().key("k", list).add(uint32_t(list)).add(uint64_t(0))) ==
          "k: found a list of lists, expected a list of numbers or strings");
    CHECK(with_key(Bytes().key("k", list).add(uint32_t(99)).add(uint64_t(0))) ==
          "k: found 99, expected the type of a list's values, 0 to 12");
    CHECK(with_key(Bytes().key("k", list).add(uint32_t(u64)).add(uint64_t(1)).add(~uint64_t(0))) ==
          "k: found 18446744073709551615, expected integers below 2^63");
    for (const uint64_t n : {uint64_t(1) << 63, ~uint64_t(0), uint64_t(1) << 40}) {
      CHECK(contains(with_key(Bytes().key("k", text).add(n)),
                     concat("k: found a length of ", n, " bytes, of which the file has ")));
      CHECK(contains(with_key(Bytes().add(n)),
                     concat("key 4 of 4: found a length of ", n, " bytes")));
      for (const GgufValueType type : {u8, text, f64, boolean}) {
        CHECK(contains(with_key(Bytes().key("k", list).add(uint32_t(type)).add(n)),
                       concat("k: found ", int64_t(n), ", for which the file's ")));
      }
    }
  }
  SUBCASE("alignment") {
    for (const uint32_t n : {0, 3, 33}) {
      CHECK(with_key(Bytes().key("general.alignment", u32).add(n)) ==
            concat("general.alignment: found ", n, ", expected a power of two, as u32"));
    }
    CHECK(with_key(Bytes().key("general.alignment", u64).add(uint64_t(1) << 32)) ==
          "general.alignment: found 4294967296, expected a power of two, as u32");
    CHECK(with_key(Bytes().key("general.alignment", text).add("32")) ==
          "general.alignment: found a string, expected a power of two, as u32");
    CHECK(contains(with_key(Bytes().key("general.alignment", u32).add(uint32_t(1) << 31)),
                   "a: found the end of the file"));
    CHECK(with_key(Bytes().key("general.alignment", u32).add(uint32_t(8))) ==
          "b: found the offset 32, expected 24, where the tensor before it ends");
  }
  SUBCASE("tensors") {
    const auto one = [&](const std::vector<int64_t>& dimensions, uint32_t type) {
      return with_tensors(1, Bytes().tensor("t", dimensions, type, 0));
    };
    CHECK(with_tensors(2, Bytes().tensor("t", {2}, 0, 0).tensor("t", {2}, 0, 32)) ==
          "t: found the tensor twice");
    CHECK(contains(with_tensors(1, Bytes().tensor("", {2}, 0, 0)),
                   "tensor 1 of 1: found 0 bytes (), expected the name of a tensor"));
    CHECK(contains(with_tensors(1, Bytes().tensor(std::string(64, 'x'), {2}, 0, 0)),
                   "tensor 1 of 1: found 64 bytes (xxx"));
    CHECK(with_tensors(1, Bytes().tensor(std::string(63, 'x'), {2}, 0, 0)) == "no error");
    CHECK(contains(with_tensors(1, Bytes().tensor(std::string_view("t\0", 2), {2}, 0, 0)),
                   "tensor 1 of 1: found 2 bytes (t?), expected"));
    CHECK(one({1, 1, 1, 1, 1}, 0) == "t: found 5 dimensions, expected at most 4");
    CHECK(one({-1}, 0) == "t: found a dimension of -1, expected a possible size");
    CHECK(contains(one({INT64_MAX, 3}, 0), "t: found a dimension of 3, expected a possible size"));
    CHECK(contains(one({INT64_MAX}, 0), "values, expected a possible number"));
    CHECK(contains(one({int64_t(1) << 60}, 0), "t: found the end of the file"));
    CHECK(one({33}, 8) == "t: found rows of 33 values, expected whole blocks of 32 of type Q8_0");
    CHECK(one({128, 2}, 12) ==
          "t: found rows of 128 values, expected whole blocks of 256 of type Q4_K");
    CHECK(one({}, 8) == "t: found rows of 1 values, expected whole blocks of 32 of type Q8_0");
    const std::string supported =
        ", expected F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K";
    CHECK(one({256}, 10) == "t: found type Q2_K" + supported);
    CHECK(one({256}, 11) == "t: found type Q3_K" + supported);
    CHECK(one({256}, 23) == "t: found type IQ4_XS" + supported);
    CHECK(one({256}, 26) == "t: found type I32" + supported);
    CHECK(one({256}, 39) == "t: found type MXFP4" + supported);
    CHECK(one({256}, 4) == "t: found type Q4_2" + supported);
    CHECK(one({256}, 41) == "t: found type Q1_0" + supported);
    CHECK(one({256}, 42) == "t: found type 42" + supported);
    CHECK(one({256}, 0xffffffff) == "t: found type 4294967295" + supported);
    CHECK(one({}, 0) == "no error");
    CHECK(one({0, 5}, 0) == "no error");
  }
  SUBCASE("offsets") {
    const auto second = [&](uint64_t offset) {
      return with_tensors(2, Bytes().tensor("a", {3, 2}, 0, 0).tensor("b", {32, 1}, 8, offset));
    };
    CHECK(second(32) == "no error");
    for (const uint64_t offset : {uint64_t(0), uint64_t(24), uint64_t(64), ~uint64_t(0)}) {
      CHECK(second(offset) == concat("b: found the offset ", offset,
                                     ", expected 32, where the tensor before it ends"));
    }
    CHECK(with_tensors(1, Bytes().tensor("a", {2}, 0, 32)) ==
          "a: found the offset 32, expected 0, as it is the first tensor");
    CHECK(with_tensors(1, Bytes().tensor("a", {25}, 0, 0)) ==
          "a: found the end of the file, of 256 bytes, expected 100 bytes of values from byte 160 "
          "on: it is truncated or damaged");
    CHECK(with_tensors(1, Bytes().tensor("a", {24}, 0, 0)) == "no error");
  }
}

TEST_CASE("a number that is not finite is refused where it is used") {
  for (const float x : {HUGE_VALF, -HUGE_VALF, std::nanf("")}) {
    Parts parts;
    parts.keys++;
    parts.key_bytes.key("x", GgufValueType::f32).add(x);
    const MemoryFile bytes(parts.file());
    const GgufFile file(bytes.path());
    CHECK(error_of([&] { file.number("x"); }) ==
          concat(bytes.path(), ": x: found ", x, ", expected a finite number"));
  }
}

TEST_CASE("a file cut at any byte is refused, in one line") {
  const std::string bytes = Parts().file();
  const size_t end = bytes.size() - 30;  // of the last tensor; zeros follow
  for (size_t n = 0; n < end; n++) {
    CAPTURE(n);
    CHECK(error_of_file(bytes.substr(0, n)) != "no error");
  }
}

TEST_CASE("a file with any byte of the head changed is read or refused, in one line") {
  const std::string bytes = Parts().file();
  const size_t head = Parts().head().size();
  int refused = 0;
  for (size_t i = 0; i < head; i++) {
    for (int flip = 1; flip < 256; flip++) {
      if (flip & (flip - 1) && flip != 0xff) continue;
      std::string changed = bytes;
      changed[i] = char(changed[i] ^ flip);
      const MemoryFile memory(changed);
      const std::string error = error_of([&] {
        const GgufFile file(memory.path());
        for (const GgufTensor& t : file.tensors()) values_of(t);
      });
      REQUIRE(error.find('\n') == std::string::npos);
      refused += error != "no error";
    }
  }
  CHECK(refused > int(head));
}

TEST_CASE("a split model with a part that is missing or not its own is refused") {
  const TempDir dir;
  const auto name = [](int i) { return format("split-%05d-of-00003.gguf", i); };
  const auto copy = [&](int i, int as) {
    write_file(dir / name(as), read_file("test/golden/gguf/" + name(i)));
  };
  const auto error = [&](const std::string& file) {
    return error_of([&] { GgufFile{dir / file}; });
  };
  const auto set = [&](int i, const std::string& key, const std::string& type_and_value) {
    std::string bytes = read_file("test/golden/gguf/" + name(i));
    const size_t found = bytes.find(key);
    REQUIRE(found != std::string::npos);
    bytes.replace(found + key.size(), type_and_value.size(), type_and_value);
    write_file(dir / name(i), bytes);
  };
  const std::string where = (dir / "split-0000").string();
  copy(1, 1);
  CHECK(error(name(1)) ==
        where + "2-of-00003.gguf: not found: it is part 2 of 3 of " + where + "1-of-00003.gguf");
  copy(2, 2), copy(3, 3);
  CHECK(error(name(1)) == "no error");
  CHECK(error(name(2)) == where +
                              "2-of-00003.gguf: this is part 2 of 3 of a model, expected the "
                              "first part: " +
                              where + "1-of-00003.gguf");
  copy(2, 3);
  CHECK(error(name(1)) == where + "3-of-00003.gguf: b: found the tensor twice");
  copy(3, 3);
  std::filesystem::rename(dir / name(1), dir / "model.gguf");
  CHECK(contains(error("model.gguf"),
                 "this is part 1 of 3 of a model, expected a name that ends "
                 "with -00001-of-00003.gguf"));
  const auto u16 = [](int n) { return bytes_of(uint32_t(2)) + bytes_of(uint16_t(n)); };
  set(1, "split.no", u16(7));
  CHECK(contains(error(name(1)), "split.no, split.count: found 7 and 3, expected"));
  set(1, "split.count", u16(0));
  CHECK(contains(error(name(1)), "split.no, split.count: found 0 and 0, expected"));
  copy(1, 1);
  set(3, "split.count", u16(4));
  CHECK(error(name(1)) ==
        where + "3-of-00003.gguf: split.count: expected 3, as the file's name says");
  copy(3, 3);
  set(3, "split.no", u16(1));
  CHECK(error(name(1)) == where + "3-of-00003.gguf: split.no: expected 2, as the file's name says");
  copy(3, 3);
  set(1, "split.tensors.count", bytes_of(uint32_t(5)) + bytes_of(int32_t(4)));
  CHECK(error(name(1)) == where +
                              "1-of-00003.gguf: split.tensors.count: found 4, expected 3, the "
                              "tensors of all 3 parts");
}

TEST_CASE("a file is GGUF by its first bytes or by its name") {
  const TempDir dir;
  write_file(dir / "a", "GGUF and more");
  write_file(dir / "b.gguf", "");
  write_file(dir / "c", "GGU");
  std::filesystem::create_directory(dir / "d.gguf");
  CHECK(GgufFile::is_gguf(dir / "a"));
  CHECK(GgufFile::is_gguf(dir / "b.gguf"));
  CHECK(!GgufFile::is_gguf(dir / "c"));
  CHECK(!GgufFile::is_gguf(dir / "d.gguf"));
  CHECK(!GgufFile::is_gguf(dir / "e.gguf"));
}

TEST_CASE("the hash of a GGUF file is of every byte") {
  const TempDir dir;
  std::string bytes = Parts().file();
  write_file(dir / "a", bytes);
  write_file(dir / "b", bytes);
  bytes[bytes.size() - 40] ^= 1;
  write_file(dir / "c", bytes);
  CHECK(GgufFile(dir / "a").hash() == GgufFile(dir / "b").hash());
  CHECK(GgufFile(dir / "a").hash() != GgufFile(dir / "c").hash());
}

// ---------------------------------------------------------------------------------------------
// Writing

TEST_CASE("a file is written byte for byte as the format says") {
  const TempDir dir;
  GgufWriter writer(dir / "x");
  writer.set_u32("answer", 42);
  writer.set_f32("half", .5f);
  writer.set_bool("yes", true);
  writer.set_text("name", "naïve");
  writer.set_texts("names", std::vector<std::string>{"one", ""});
  writer.set_texts("none", {});
  writer.set_i32s("types", std::vector<int32_t>{1, -5});
  writer.add_tensor("a", {2, 3}, GgufType::f32);
  writer.add_tensor("b", {1, 2, 32}, GgufType::q8_0);
  writer.add_tensor("c", {3}, GgufType::bf16);
  const std::vector<float> a = {1, 2, 3, 4, 5, 6}, c = {1, -2, .5};
  std::vector<float> b(64);
  for (size_t i = 0; i < b.size(); i++) b[i] = i < 32 ? 127 : float(i);
  writer.write(a);
  writer.write(b);
  writer.write(c);
  CHECK(!std::filesystem::exists(dir / "x"));
  writer.commit();

  using enum GgufValueType;
  Bytes expected{"GGUF"};
  expected.add(uint32_t(3)).add(int64_t(3)).add(int64_t(7));
  expected.key("answer", u32).add(uint32_t(42)).key("half", f32).add(.5f);
  expected.key("yes", boolean).add(uint8_t(1)).key("name", text).add("naïve");
  expected.key("names", list).add(uint32_t(text)).add(uint64_t(2)).add("one").add("");
  expected.key("none", list).add(uint32_t(text)).add(uint64_t(0));
  expected.key("types", list).add(uint32_t(i32)).add(uint64_t(2)).add(1).add(-5);
  expected.tensor("a", {3, 2}, 0, 0).tensor("b", {32, 2, 1}, 8, 32).tensor("c", {3}, 30, 128);
  std::string& bytes = expected.text;
  const auto pad = [&] { bytes.resize((bytes.size() + 31) / 32 * 32); };
  pad();
  for (const float x : a) bytes += bytes_of(x);
  pad();
  bytes += bytes_of(float_to_f16(1)) + std::string(32, 127);
  bytes += bytes_of(quantize_q8_0(&b[32]));
  pad();
  for (const uint16_t x : {0x3f80, 0xc000, 0x3f00}) bytes += bytes_of(x);
  pad();
  CHECK(read_file(dir / "x") == bytes);
}

TEST_CASE("what is written is read again, and the same calls write the same bytes") {
  const TempDir dir;
  constexpr GgufType kTypes[] = {GgufType::f32, GgufType::f16, GgufType::bf16, GgufType::q8_0,
                                 GgufType::q4_0};
  // more than is encoded at once, so that pieces meet
  const std::vector<int64_t> shape = {1100, 1024};
  std::vector<float> x(1100 * 1024);
  Rng rng{.seed = 1};
  for (float& v : x) v = float(2 * rng.uniform() - 1);
  const auto write = [&](const std::string& name, size_t rows) {  // at once
    GgufWriter writer(dir / name);
    writer.set_u32("answer", 42);
    for (const GgufType type : kTypes) {
      writer.add_tensor(gguf_blocks(type).name, shape, type);
    }
    for (size_t i = 0; i < std::size(kTypes); i++) {
      for (size_t j = 0; j < x.size(); j += rows * 1024) {
        writer.write(std::span(x).subspan(j, std::min(x.size() - j, rows * 1024)));
      }
    }
    writer.commit();
  };
  write("a", 1100), write("b", 1100), write("c", 37);
  CHECK(read_file(dir / "a") == read_file(dir / "b"));
  CHECK(read_file(dir / "a") == read_file(dir / "c"));

  const GgufFile file(dir / "a");
  CHECK(file.integer("answer") == 42);
  CHECK(bits_of(values_of(file, "F32")) == bits_of(x));
  std::vector<float> f16, bf16, q8_0(x.size()), q4_0(x.size());
  for (const float v : x) {
    f16.push_back(f16_to_float(float_to_f16(v)));
    bf16.push_back(bf16_to_float(float_to_bf16(v)));
  }
  for (size_t i = 0; i < x.size(); i += 32) {
    dequantize_q8_0(quantize_q8_0(&x[i]), &q8_0[i]);
    unsigned char block[18];
    quantize_q4_0(&x[i], block);
    dequantize_q4_0(block, &q4_0[i]);
  }
  CHECK(values_of(file, "F16") == f16);
  CHECK(values_of(file, "BF16") == bf16);
  CHECK(values_of(file, "Q8_0") == q8_0);
  CHECK(values_of(file, "Q4_0") == q4_0);
  // Rounding moves a value by half a step of the block's scale, or in q4_0 by a whole one, as there
  // is none for the largest value with the other sign; the scale itself is rounded by 2^-11.
  double most_q8_0 = 0, most_q4_0 = 0;
  for (size_t i = 0; i < x.size(); i++) {
    most_q8_0 = std::max(most_q8_0, double(std::fabs(q8_0[i] - x[i])));
    most_q4_0 = std::max(most_q4_0, double(std::fabs(q4_0[i] - x[i])));
  }
  CHECK(most_q8_0 < .5 / 127 + 0x1p-11);
  CHECK(most_q4_0 < 1. / 8 + 0x1p-11);
}

TEST_CASE("a value that the type cannot hold is refused by the tensor's name") {
  const TempDir dir;
  const auto error = [&](GgufType type, float value) {
    std::vector<float> x(1 << 17, 1);  // several pieces
    x[99999] = value;
    return error_of([&] {
      GgufWriter writer(dir / "x");
      writer.add_tensor("blk.0.w", {1 << 12, 32}, type);
      writer.write(x);
      writer.commit();
    });
  };
  constexpr float kLargest = std::numeric_limits<float>::max();
  const float nan = std::nanf("");
  CHECK(error(GgufType::f16, 65504) == "no error");
  CHECK(error(GgufType::f16, -65504) == "no error");
  CHECK(error(GgufType::f16, -65505) ==
        (dir / "x").string() +
            ": blk.0.w: found -65505 as value 99999, expected at most 65504 in "
            "type F16; F32 holds it");
  CHECK(contains(error(GgufType::f16, nan), "found nan as value 99999"));
  CHECK(error(GgufType::bf16, 0x1.fep127f) == "no error");
  CHECK(contains(error(GgufType::bf16, kLargest), "found 3.40282e+38 as value 99999"));
  CHECK(contains(error(GgufType::bf16, HUGE_VALF), "found inf as value 99999"));
  CHECK(error(GgufType::q8_0, 65504 * 127.f) == "no error");
  CHECK(contains(error(GgufType::q8_0, 65504 * 127.f + 1), "in type Q8_0"));
  CHECK(contains(error(GgufType::q8_0, nan), "found nan"));
  CHECK(error(GgufType::q4_0, -65504 * 8.f) == "no error");
  CHECK(contains(error(GgufType::q4_0, -65505 * 8.f), "in type Q4_0"));
  CHECK(error(GgufType::f32, kLargest) == "no error");
  CHECK(error(GgufType::f32, nan) == "no error");  // every bit is kept
  CHECK(contains(error_of([&] {
                   GgufWriter writer(dir / "x");
                   writer.add_tensor("t", {4}, GgufType::f16);
                   writer.write(std::vector<float>{1, 2});
                   writer.write(std::vector<float>{3, 1e6});
                 }),
                 ": t: found 1e+06 as value 3,"));
}

TEST_CASE("a file that cannot be written right leaves nothing") {
  const TempDir dir;
  const auto error = [&](const std::function<void(GgufWriter&)>& body) {
    const std::string text = error_of([&] {
      GgufWriter writer(dir / "x");
      body(writer);
      writer.commit();
    });
    if (text != "no error") CHECK(std::filesystem::is_empty(dir.path()));
    std::filesystem::remove(dir / "x");
    return text;
  };
  using W = GgufWriter;
  const std::vector<float> x(64, 1);
  const auto add = [](const std::string& name, std::vector<int64_t> shape, GgufType type) {
    return [=](W& w) { w.add_tensor(name, shape, type); };
  };
  CHECK(error([](W&) {}) == "no error");
  CHECK(contains(error([](W& w) { w.set_u32("k", 1), w.set_bool("k", true); }),
                 ": k: the key is there already"));
  CHECK(contains(error([](W& w) { w.set_u32("", 1); }), "cannot write a key of this name"));
  CHECK(contains(error([](W& w) { w.set_u32("general.alignment", 1); }),
                 "general.alignment: cannot write a key of this name"));
  CHECK(contains(error(add("", {2}, GgufType::f32)), "found a name of 0 bytes"));
  CHECK(contains(error(add(std::string(64, 'x'), {2}, GgufType::f32)), "found a name of 64 bytes"));
  CHECK(contains(error(add("t", {4, 33}, GgufType::q8_0)),
                 ": t: found rows of 33 values, expected whole blocks of 32 of type Q8_0"));
  CHECK(contains(error(add("t", {4, 16}, GgufType::q4_0)), "whole blocks of 32 of type Q4_0"));
  CHECK(contains(error(add("t", {4, 256}, GgufType::q4_K)), "cannot write type Q4_K"));
  CHECK(contains(error(add("t", {4, 256}, GgufType(10))), "cannot write type 10"));
  CHECK(contains(error(add("t", {}, GgufType::f32)), "found 0 sizes"));
  CHECK(contains(error(add("t", {0}, GgufType::f32)), "found 1 sizes"));
  CHECK(contains(error(add("t", {INT64_MAX, 2}, GgufType::f32)), "found 2 sizes"));
  CHECK(contains(error([](W& w) {
                   w.add_tensor("t", {2}, GgufType::f32), w.add_tensor("t", {2}, GgufType::f32);
                 }),
                 ": t: the tensor is there already"));
  CHECK(contains(error(add("t", {2, 2}, GgufType::f32)), ": t: got 0 values, expected 4"));
  CHECK(contains(error([&](W& w) { w.add_tensor("t", {65}, GgufType::f32), w.write(x); }),
                 ": t: got 64 values, expected 65"));
  CHECK(contains(error([&](W& w) { w.add_tensor("t", {63}, GgufType::f32), w.write(x); }),
                 ": t: got 64 values, expected the 63 left"));
  CHECK(contains(error([&](W& w) {
                   w.add_tensor("t", {64}, GgufType::q8_0), w.write(std::span(x).first(16));
                 }),
                 ": t: got 16 values, expected the 64 left of the tensor, or whole blocks"));
  CHECK(contains(error([&](W& w) { w.write(x); }), "values behind those of the last tensor"));
  CHECK(contains(
      error([&](W& w) { w.add_tensor("t", {64}, GgufType::f32), w.write(x), w.set_u32("k", 1); }),
      ": k: a key behind the values of tensors"));
  CHECK(contains(error([&](W& w) {
                   w.add_tensor("t", {64}, GgufType::f32), w.write(x);
                   w.add_tensor("u", {64}, GgufType::f32);
                 }),
                 ": u: a tensor behind the values of tensors"));
}

}  // namespace
}  // namespace cake
