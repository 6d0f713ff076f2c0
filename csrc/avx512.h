// What the kernels for AVX-512 share: how the codes of 32 weights become 16-bit integers.
//
// Included by a file of kernels before all else but its own guard; avx512_end.h ends what it begins:
// a file's functions are compiled for these instructions, and run only where they exist.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl," \
                                                   "avx512vnni,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c,prefer-vector-width=512")
#endif

#include <immintrin.h>

namespace gemlax {
namespace {

constexpr int kFewRows = 2;  // up to here the offsets of codes are taken from the sums

struct Codes {
  __m256i even, odd;
};

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline __m256 half(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_set1_epi16(int16_t(load16(p))));
}

inline __m256 scale_at(const uint16_t* p) {
  const __m256i high = _mm256_set1_epi32(int(0xffff0000));
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi16(int16_t(*p)), high));
}

inline Codes less(const Codes& codes, int offset) {
  const __m256i by = _mm256_set1_epi16(int16_t(offset));
  return {_mm256_sub_epi16(codes.even, by), _mm256_sub_epi16(codes.odd, by)};
}

// Signed bytes to 16 bits.
inline Codes widen(__m256i bytes) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}

inline Codes widen_unsigned(__m256i bytes) {
  return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}

// The numbers a and b, each in 8 of 16 words.
inline __m256i two(int a, int b) {
  return _mm256_set_m128i(_mm_set1_epi16(int16_t(b)), _mm_set1_epi16(int16_t(a)));
}

// 16 bytes of two halves: the low halves, then the high ones.
inline Codes nibbles(const uint8_t* p) {
  const __m256i both = _mm256_broadcastsi128_si256(load128(p)), low = _mm256_set1_epi16(15);
  return {_mm256_and_si256(_mm256_srlv_epi16(both, two(0, 4)), low),
          _mm256_and_si256(_mm256_srlv_epi16(both, two(8, 12)), low)};
}

// What a format of groups of 32 with one scale each needs. Codes are `kOffset` too large.
template <class F>
struct Groups;

template <>
struct Groups<Int8> {
  static constexpr int kOffset = 0;
  static Codes codes(const uint8_t* block) { return widen(load(block)); }
  static __m256 scale(const uint8_t*, const uint16_t* scales) { return scale_at(scales); }
};

template <>
struct Groups<Q8_0> {
  static constexpr int kOffset = 0;
  static Codes codes(const uint8_t* block) { return widen(load(block + 2)); }
  static __m256 scale(const uint8_t* block, const uint16_t*) { return half(block); }
};

template <>
struct Groups<Q4_0> {
  static constexpr int kOffset = 8;
  static Codes codes(const uint8_t* block) { return nibbles(block + 2); }
  static __m256 scale(const uint8_t* block, const uint16_t*) { return half(block); }
};

template <>
struct Groups<Q5_0> {
  static constexpr int kOffset = 16;
  static Codes codes(const uint8_t* block) {
    const __m256i both = _mm256_broadcastsi128_si256(load128(block + 6));
    const __m256i low =
        _mm256_and_si256(_mm256_srlv_epi16(both, two(0, 4)), _mm256_set1_epi8(15));
    uint32_t fifth;
    std::memcpy(&fifth, block + 2, 4);
    const __m256i all = _mm256_mask_add_epi8(low, fifth, low, _mm256_set1_epi8(16));
    return widen_unsigned(all);
  }
  static __m256 scale(const uint8_t* block, const uint16_t*) { return half(block); }
};

// A macro in some compilers, which commas of template arguments would confuse.
inline __m256i dot2(__m256i sum, __m256i a, __m256i b) { return _mm256_dpwssd_epi32(sum, a, b); }

// Group `g` of 8 of a Q6_K block: codes in [0, 63].
inline Codes q6_k_codes(const uint8_t* block, int g) {
  const int part = g / 4, quarter = g % 4;
  const __m256i four = _mm256_set1_epi8(15), pair = _mm256_set1_epi8(3 << 4);
  __m256i lower = load(block + 64 * part + 32 * (quarter % 2));
  if (quarter >= 2) lower = _mm256_srli_epi16(lower, 4);
  __m256i upper = load(block + 128 + 32 * part);  // bits 2 * quarter and up, to bits 4 and 5
  upper = quarter < 2 ? _mm256_slli_epi16(upper, 4 - 2 * quarter)
                      : _mm256_srli_epi16(upper, 2 * quarter - 4);
  return widen_unsigned(
      _mm256_or_si256(_mm256_and_si256(lower, four), _mm256_and_si256(upper, pair)));
}

}  // namespace
}  // namespace gemlax
