// SHA-256 (FIPS 180-4): what a run names a model by that it depends on and does not copy.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "cake/run.h"

namespace cake {

class Sha256 {
 public:
  void add(const unsigned char* data, int64_t bytes) {
    length_ += uint64_t(bytes);
    while (bytes > 0) {
      const int64_t n = std::min<int64_t>(bytes, 64 - filled_);
      std::memcpy(block_.data() + filled_, data, size_t(n));
      filled_ += int(n), data += n, bytes -= n;
      if (filled_ == 64) mix();
    }
  }
  void add(std::string_view text) {
    add(reinterpret_cast<const unsigned char*>(text.data()), int64_t(text.size()));
  }
  std::string hex() {  // 64 digits; ends the sum
    const uint64_t bits = 8 * length_;
    const unsigned char one = 0x80, zero = 0;
    add(&one, 1);
    while (filled_ != 56) add(&zero, 1);
    for (int i = 7; i >= 0; i--) {
      const auto byte = static_cast<unsigned char>(bits >> (8 * i));
      add(&byte, 1);
    }
    std::string text;
    for (const uint32_t word : state_) text += format("%08x", word);
    return text;
  }

 private:
  static constexpr std::array<int, 64> kPrimes = {
      2,   3,   5,   7,   11,  13,  17,  19,  23,  29,  31,  37,  41,  43,  47,  53,
      59,  61,  67,  71,  73,  79,  83,  89,  97,  101, 103, 107, 109, 113, 127, 131,
      137, 139, 149, 151, 157, 163, 167, 173, 179, 181, 191, 193, 197, 199, 211, 223,
      227, 229, 233, 239, 241, 251, 257, 263, 269, 271, 277, 281, 283, 293, 307, 311};
  // The first 32 bits behind the point: of the primes' square roots, or cube roots.
  static uint32_t fraction(double x) {
    return uint32_t(uint64_t(std::ldexp(x - std::floor(x), 32)));
  }
  static const std::array<uint32_t, 64>& constants() {
    static const std::array<uint32_t, 64> k = [] {
      std::array<uint32_t, 64> cubes{};
      for (size_t i = 0; i < 64; i++) cubes[i] = fraction(std::cbrt(double(kPrimes[i])));
      return cubes;
    }();
    return k;
  }
  static std::array<uint32_t, 8> beginning() {
    std::array<uint32_t, 8> squares{};
    for (size_t i = 0; i < 8; i++) squares[i] = fraction(std::sqrt(double(kPrimes[i])));
    return squares;
  }

  void mix() {
    const auto turn = [](uint32_t x, int n) { return std::rotr(x, n); };
    std::array<uint32_t, 64> w;
    for (size_t t = 0; t < 16; t++) {
      w[t] = uint32_t(block_[4 * t]) << 24 | uint32_t(block_[4 * t + 1]) << 16 |
             uint32_t(block_[4 * t + 2]) << 8 | uint32_t(block_[4 * t + 3]);
    }
    for (size_t t = 16; t < 64; t++) {
      const uint32_t s0 = turn(w[t - 15], 7) ^ turn(w[t - 15], 18) ^ (w[t - 15] >> 3);
      const uint32_t s1 = turn(w[t - 2], 17) ^ turn(w[t - 2], 19) ^ (w[t - 2] >> 10);
      w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    const std::array<uint32_t, 64>& k = constants();
    for (size_t t = 0; t < 64; t++) {
      const uint32_t s1 = turn(e, 6) ^ turn(e, 11) ^ turn(e, 25);
      const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + k[t] + w[t];
      const uint32_t s0 = turn(a, 2) ^ turn(a, 13) ^ turn(a, 22);
      const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const std::array<uint32_t, 8> added = {a, b, c, d, e, f, g, h};
    for (size_t i = 0; i < 8; i++) state_[i] += added[i];
    filled_ = 0;
  }

  std::array<uint32_t, 8> state_ = beginning();
  std::array<unsigned char, 64> block_{};
  int filled_ = 0;
  uint64_t length_ = 0;  // bytes
};

inline std::string sha256(std::string_view text) {
  Sha256 sum;
  sum.add(text);
  return sum.hex();
}

// As sha256sum has it.
inline std::string sha256_of_file(const std::filesystem::path& path) {
  const MappedFile file(path);
  Sha256 sum;
  sum.add(file.data(), file.size());
  return sum.hex();
}

// Of a model directory's weights: those of its one file, or the sum of its files' sums.
inline std::string sha256_of_weights(const std::filesystem::path& dir) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    const std::filesystem::path& file = entry.path();
    if (file.extension() == ".safetensors" && file.filename() != "optimizer.safetensors") {
      files.push_back(file);
    }
  }
  if (files.empty()) fail(dir.string(), ": found no weights (.safetensors)");
  std::sort(files.begin(), files.end());
  std::string sums;
  for (const auto& file : files) sums += sha256_of_file(file);
  return files.size() == 1 ? sums : sha256(sums);
}

}  // namespace cake
