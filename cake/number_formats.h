// Numbers in two bytes or in one: bf16, f16, and q8_0, blocks of 32 bytes with one scale.
// Checkpoints store them, and an inference engine keeps its matrices in them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>

namespace cake {

enum class FloatType { f32, f16, bf16 };  // of tensors in a file of a model directory
inline constexpr const char* kFloatTypeNames[] = {"f32", "f16", "bf16"};
inline constexpr int float_bytes(FloatType type) { return type == FloatType::f32 ? 4 : 2; }

inline float bf16_to_float(uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); }
inline uint16_t float_to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float f16_to_float(uint16_t x) {
  // The same bits read as float lack 112 in the exponent: exact for subnormal numbers too.
  const float y = 0x1p112f * std::bit_cast<float>(uint32_t(x & 0x7fff) << 13);
  uint32_t bits = std::bit_cast<uint32_t>(y) | uint32_t(x & 0x8000) << 16;
  if ((x & 0x7c00) == 0x7c00) bits |= 0x7f800000;  // infinity, NaN
  return std::bit_cast<float>(bits);
}
inline constexpr float kHighestF16 = 65504;
// To nearest, ties to even, as the instruction vcvtps2ph: NaN stays NaN and is quiet; from 65520 on
// the result is infinite.
inline uint16_t float_to_f16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const auto sign = uint16_t(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return uint16_t(sign | 0x7e00 | (bits >> 13 & 0x1ff));
  if (magnitude >= 65520.f) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x1p-14f) {  // subnormal: a multiple of 2^-24, rounded by the addition
    return uint16_t(sign | (std::bit_cast<uint32_t>(magnitude + .5f) & 0x7ff));
  }
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return uint16_t(sign | (rounded - (112u << 23)) >> 13);
}

struct Bf16 {  // an element of an array in bf16
  uint16_t bits;
};

// GGUF's q8_0: 32 neighbours x of a row share d; x[i] is about d q[i].
inline constexpr int kQ8Block = 32;
struct Q8Block {
  uint16_t d;  // f16
  int8_t q[kQ8Block];
};
static_assert(sizeof(Q8Block) == 34);

// std::round of a number below 2^31 in magnitude, in a form that compilers vectorize.
inline int round_half_away(float x) {
  const int whole = int(x);
  const float rest = x - float(whole);  // exact
  return whole + (rest >= .5f) - (rest <= -.5f);
}

// 1/d, and 0 where that is infinite: d is 0, or at most 2^-128.
inline float q8_0_inverse(float d) { return d > 0x1p-128f ? 1 / d : 0; }

// d = max |x| / 127, and q = round(x / d), halves away from zero. The quotient is x times 1/d with
// the d that is not yet rounded to f16: the rule of llama.cpp and of the package gguf. With a NaN
// or an infinite x, d is NaN; q is 0 where 1/d is infinite, and where every x is 0.
inline Q8Block quantize_q8_0(const float* x) {  // (32)
  uint32_t highest = 0;  // the bits of |x| are ordered as |x| is, and NaN's are the highest
  for (int i = 0; i < kQ8Block; i++) {
    highest = std::max(highest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffff);
  }
  if (highest >= 0x7f800000) return {.d = 0x7e00, .q = {}};
  const float d = std::bit_cast<float>(highest) / 127, inverse = q8_0_inverse(d);
  Q8Block block{.d = float_to_f16(d), .q = {}};
  for (int i = 0; i < kQ8Block; i++) block.q[i] = int8_t(round_half_away(x[i] * inverse));
  return block;
}
inline void dequantize_q8_0(const Q8Block& block, float* x) {  // (32)
  const float d = f16_to_float(block.d);
  for (int i = 0; i < kQ8Block; i++) x[i] = d * float(block.q[i]);
}

}  // namespace cake
