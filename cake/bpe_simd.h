// The few operations of the tokenizer's encoder that vector instructions make fast. Each exists for
// AVX-512, for AVX2 and in plain C++; Simd is the best one that the compiler may use here.
// Everything else in the scanner and the encoder is arithmetic on 64-bit words, the same on every
// machine.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// GCC 12 says of its own AVX-512 intrinsics that a variable is not initialised (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ == 12
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ == 12
#pragma GCC diagnostic pop
#endif
#endif

namespace cake {

// What 64 bytes of text are: bit i speaks of byte i.
struct AsciiBits {
  uint64_t letter, number, space, white, newline, apostrophe;
  uint64_t high;  // beyond ASCII
};
struct CaseBits {
  uint64_t upper, lower, slash;  // in ASCII
};
// Of UTF-8: continuation bytes, and what it takes to see the ideographs U+4E00 to U+9FFF, which are
// E4 B8 80 to E9 BF BF.
struct HighBits {
  uint64_t continuation, lead_e4, lead_e5_to_e9, from_b8;  // from_b8: B8 and above
};

// Up to 15 bytes of text, zeros, and the number of bytes in the last byte.
using Key = uint64_t __attribute__((vector_size(16)));

// ---------------------------------------------------------------------------------------------
// Plain C++, and what it means

// Classes of bytes as bits, for PlainSimd: eight such bytes are turned into eight bits of each
// class by a multiplication.
struct ByteTables {
  enum : uint8_t { kLetter = 1, kNumber = 2, kSpace = 4, kWhite = 8, kNewline = 16, kQuote = 32 };
  enum : uint8_t { kUpper = 1, kLower = 2, kSlash = 4, kTail = 8, kE4 = 16, kE5 = 32, kB8 = 64 };
  uint8_t ascii[256], other[256];
  constexpr ByteTables() : ascii(), other() {
    for (int c = 0; c < 256; c++) {
      const bool upper = c >= 'A' && c <= 'Z', lower = c >= 'a' && c <= 'z';
      const bool newline = c == '\n' || c == '\r';
      ascii[c] = uint8_t((upper || lower ? kLetter : 0) | (c >= '0' && c <= '9' ? kNumber : 0) |
                         (c == ' ' ? kSpace : 0) | (newline ? kNewline : 0) |
                         (c == ' ' || (c >= 9 && c <= 13) ? kWhite : 0) | (c == '\'' ? kQuote : 0) |
                         (c >= 0x80 ? 0x80 : 0));
      other[c] = uint8_t((upper ? kUpper : 0) | (lower ? kLower : 0) | (c == '/' ? kSlash : 0) |
                         (c >= 0x80 && c < 0xC0 ? kTail : 0) | (c == 0xE4 ? kE4 : 0) |
                         (c >= 0xE5 && c <= 0xE9 ? kE5 : 0) | (c >= 0xB8 ? kB8 : 0));
    }
  }
};
inline constexpr ByteTables kByteTables;

struct PlainSimd {
  // Calls put(k, bits) for eight bytes at a time, `bits` being those of class bit k.
  template <int kClasses, class Put>
  static void transpose(const char* text, const uint8_t* table, const Put& put) {
    for (int i = 0; i < 64; i += 8) {
      uint64_t classes = 0;
      for (int j = 0; j < 8; j++) {
        classes |= uint64_t(table[static_cast<unsigned char>(text[i + j])]) << (8 * j);
      }
      for (int k = 0; k < kClasses; k++) {
        const uint64_t ones = classes >> k & 0x0101010101010101;
        put(k, (ones * 0x0102040810204080 >> 56) << i);
      }
    }
  }
  static AsciiBits ascii_bits(const char* text) {
    uint64_t b[8] = {};
    transpose<8>(text, kByteTables.ascii, [&](int k, uint64_t bits) { b[k] |= bits; });
    return {b[0], b[1], b[2], b[3], b[4], b[5], b[7]};
  }
  static CaseBits case_bits(const char* text) {
    uint64_t b[3] = {};
    transpose<3>(text, kByteTables.other, [&](int k, uint64_t bits) { b[k] |= bits; });
    return {b[0], b[1], b[2]};
  }
  static HighBits high_bits(const char* text) {
    uint64_t b[7] = {};
    transpose<7>(text, kByteTables.other, [&](int k, uint64_t bits) { b[k] |= bits; });
    return {b[3], b[4], b[5], b[6]};
  }

  // Writes offset + i for every set bit i, in order, and returns the end of what was written. May
  // write anything into the 64 places from `out` on.
  static uint32_t* write_positions(uint64_t bits, uint32_t offset, uint32_t* out) {
    const int count = std::popcount(bits);
    // Eight at a time: the processor guesses the end of such a loop more often.
    for (int k = 0; k < count; k += 8) {
      for (int j = 0; j < 8; j++) {
        out[k + j] = offset + uint32_t(std::countr_zero(bits | uint64_t(1) << 63));
        bits &= bits - 1;
      }
    }
    return out + count;
  }

  // Bit i: whether line[i] >> shift equals `key`.
  template <int shift>
  static uint32_t matches(const uint64_t* line, uint64_t key) {
    uint32_t found = 0;
    for (uint32_t i = 0; i < 8; i++) found |= uint32_t(line[i] >> shift == key) << i;
    return found;
  }

  static bool equal(const Key& a, const Key& b) { return ((a[0] ^ b[0]) | (a[1] ^ b[1])) == 0; }

  // N numbers that are set one by one, and the least of which is asked for. N: 16, 32 or 64.
  template <int N>
  struct LeastOf {
    uint32_t value[N];
    void load(const uint32_t* values) { std::memcpy(value, values, sizeof value); }
    void set(uint32_t i, uint32_t x) { value[i] = x; }
    uint32_t least() const {
      uint32_t a = value[0], b = value[1], c = value[2], d = value[3];
      for (int i = 4; i < N; i += 4) {
        a = std::min(a, value[i]), b = std::min(b, value[i + 1]);
        c = std::min(c, value[i + 2]), d = std::min(d, value[i + 3]);
      }
      return std::min(std::min(a, b), std::min(c, d));
    }
  };
};

// ---------------------------------------------------------------------------------------------
// AVX2: 32 bytes at a time

#if defined(__AVX2__)
struct Avx2Simd : PlainSimd {
  // Both halves of 64 bytes, and their comparisons as bits.
  struct Halves {
    __m256i v[2];
    explicit Halves(const char* text) {
      for (int h = 0; h < 2; h++) {
        v[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text + 32 * h));
      }
    }
    template <class Test>
    static uint64_t bits(const Test& test) {
      return uint64_t(uint32_t(_mm256_movemask_epi8(test(0)))) |
             uint64_t(uint32_t(_mm256_movemask_epi8(test(1)))) << 32;
    }
    uint64_t equal(int c) const {
      return bits([&](int h) { return _mm256_cmpeq_epi8(v[h], _mm256_set1_epi8(char(c))); });
    }
    // c | mask in [begin, begin + count): c - begin is the smaller of itself and count - 1.
    uint64_t in(int begin, int count, int mask = 0) const {
      return bits([&](int h) {
        const __m256i x = _mm256_sub_epi8(_mm256_or_si256(v[h], _mm256_set1_epi8(char(mask))),
                                          _mm256_set1_epi8(char(begin)));
        return _mm256_cmpeq_epi8(_mm256_min_epu8(x, _mm256_set1_epi8(char(count - 1))), x);
      });
    }
    uint64_t high() const {
      return bits([&](int h) { return v[h]; });
    }
  };
  static AsciiBits ascii_bits(const char* text) {
    const Halves x(text);
    const uint64_t space = x.equal(' ');
    return {x.in('a', 26, 0x20),           x.in('0', 10), space,   x.in(9, 5) | space,
            x.equal('\n') | x.equal('\r'), x.equal('\''), x.high()};
  }
  static CaseBits case_bits(const char* text) {
    const Halves x(text);
    return {x.in('A', 26), x.in('a', 26), x.equal('/')};
  }
  static HighBits high_bits(const char* text) {
    const Halves x(text);
    return {x.in(0x80, 64), x.equal(0xE4), x.in(0xE5, 5), x.in(0xB8, 256 - 0xB8)};
  }
  static bool equal(const Key& a, const Key& b) {
    const auto x = reinterpret_cast<__m128i>(a ^ b);
    return _mm_testz_si128(x, x);
  }
  template <int shift>
  static uint32_t matches(const uint64_t* line, uint64_t key) {
    const __m256i wanted = _mm256_set1_epi64x(int64_t(key));
    uint32_t found = 0;
    for (int h = 0; h < 2; h++) {
      const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(line + 4 * h));
      const __m256i same = _mm256_cmpeq_epi64(_mm256_srli_epi64(x, shift), wanted);
      found |= uint32_t(_mm256_movemask_pd(_mm256_castsi256_pd(same))) << (4 * h);
    }
    return found;
  }
};
#endif

// ---------------------------------------------------------------------------------------------
// AVX-512: 64 bytes at a time

#if defined(__AVX512BW__) && defined(__AVX512VL__)
struct Avx512Simd : Avx2Simd {
  struct Block {
    __m512i v;
    explicit Block(const char* text) : v(_mm512_loadu_si512(text)) {}
    uint64_t equal(int c) const { return _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(char(c))); }
    uint64_t in(int begin, int count, int mask = 0) const {
      const __m512i x = _mm512_sub_epi8(_mm512_or_si512(v, _mm512_set1_epi8(char(mask))),
                                        _mm512_set1_epi8(char(begin)));
      return _mm512_cmple_epu8_mask(x, _mm512_set1_epi8(char(count - 1)));
    }
  };
  static AsciiBits ascii_bits(const char* text) {
    const Block x(text);
    const uint64_t space = x.equal(' ');
    return {x.in('a', 26, 0x20),
            x.in('0', 10),
            space,
            x.in(9, 5) | space,
            x.equal('\n') | x.equal('\r'),
            x.equal('\''),
            _mm512_movepi8_mask(x.v)};
  }
  static CaseBits case_bits(const char* text) {
    const Block x(text);
    return {x.in('A', 26), x.in('a', 26), x.equal('/')};
  }
  static HighBits high_bits(const char* text) {
    const Block x(text);
    return {x.in(0x80, 64), x.equal(0xE4), x.in(0xE5, 5), x.in(0xB8, 256 - 0xB8)};
  }
  template <int shift>
  static uint32_t matches(const uint64_t* line, uint64_t key) {
    const __m512i x = _mm512_srli_epi64(_mm512_load_si512(line), shift);
    return _mm512_cmpeq_epi64_mask(x, _mm512_set1_epi64(int64_t(key)));
  }
#if defined(__AVX512VBMI2__)
  static uint32_t* write_positions(uint64_t bits, uint32_t offset, uint32_t* out) {
    alignas(64) static constexpr uint8_t kBytes[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    const __m512i c = _mm512_maskz_compress_epi8(bits, _mm512_load_si512(kBytes));
    const __m512i base = _mm512_set1_epi32(int(offset));
    const auto store = [&](int k, __m128i bytes) {
      _mm512_storeu_si512(out + k, _mm512_add_epi32(base, _mm512_cvtepu8_epi32(bytes)));
    };
    const int count = std::popcount(bits);
    store(0, _mm512_castsi512_si128(c));
    store(16, _mm512_extracti32x4_epi32(c, 1));
    if (__builtin_expect(count > 32, 0)) {
      store(32, _mm512_extracti32x4_epi32(c, 2));
      store(48, _mm512_extracti32x4_epi32(c, 3));
    }
    return out + count;
  }
#endif

  // In registers: a vector load behind scalar stores into the same bytes would wait for them.
  template <int N>
  struct LeastOf {
    __m512i v[N / 16];
    void load(const uint32_t* values) {
      for (int i = 0; i < N / 16; i++) v[i] = _mm512_loadu_si512(values + 16 * i);
    }
    void set(uint32_t i, uint32_t x) {
      const uint64_t bit = uint64_t(1) << i;
      for (int k = 0; k < N / 16; k++) {
        v[k] = _mm512_mask_mov_epi32(v[k], __mmask16(bit >> (16 * k)), _mm512_set1_epi32(int(x)));
      }
    }
    uint32_t least() const {
      __m512i m = v[0];
      for (int k = 1; k < N / 16; k++) m = _mm512_min_epu32(m, v[k]);
      const __m256i y =
          _mm256_min_epu32(_mm512_castsi512_si256(m), _mm512_extracti64x4_epi64(m, 1));
      __m128i x = _mm_min_epu32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
      x = _mm_min_epu32(x, _mm_shuffle_epi32(x, 0x4e));
      x = _mm_min_epu32(x, _mm_shuffle_epi32(x, 0xb1));
      return uint32_t(_mm_cvtsi128_si32(x));
    }
  };
};
#endif

#if defined(__AVX512BW__) && defined(__AVX512VL__)
using Simd = Avx512Simd;
#elif defined(__AVX2__)
using Simd = Avx2Simd;
#else
using Simd = PlainSimd;
#endif

// The bits of `flags` at the places that `ends` sets, moved in order to the places that `begins`
// sets, of which there are as many.
inline uint64_t move_flags(uint64_t flags, uint64_t ends, uint64_t begins) {
#if defined(__BMI2__)
  return _pdep_u64(_pext_u64(flags, ends), begins);
#else
  uint64_t moved = 0;
  for (; begins; begins &= begins - 1, ends &= ends - 1) {
    if (flags & ends & -ends) moved |= begins & -begins;
  }
  return moved;
#endif
}

}  // namespace cake
