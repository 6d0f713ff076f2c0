// What the kernels for AVX-512 share: how the codes of 32 weights become 16-bit integers.
//
// Included by a file of kernels before all else but its own guard; target_end.h ends what it begins:
// a file's functions are compiled for these instructions, and run only where they exist.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

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
constexpr int kFetchDistance = 2048;
constexpr bool kSumsInFours = true;
constexpr int kFewRows = 2;  // up to here the offsets of codes are taken from the sums
constexpr int rows_at_once(bool, int R) { return R <= kFewRows ? 1 : 2; }
}  // namespace
}  // namespace gemlax

#include "simd_common.h"

namespace gemlax {
namespace {

inline __m512 load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load_floats(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load_floats(const uint16_t* p, __mmask16 mask = 0xffff) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// One load for several products, which the compiler would repeat.
inline void load_once(__m512i& x) { asm("" : "+v"(x)); }
inline void load_once(Codes& x) { asm("" : "+v"(x.even), "+v"(x.odd)); }

// The numbers `low` and `high`, each in 8 of 16 words.
inline __m256i words_of(int low, int high) {
  return _mm256_set_m128i(_mm_set1_epi16(int16_t(high)), _mm_set1_epi16(int16_t(low)));
}

inline Codes nibbles(const uint8_t* p) {
  const __m256i both = _mm256_broadcastsi128_si256(load128(p)), low = _mm256_set1_epi16(15);
  return {_mm256_and_si256(_mm256_srlv_epi16(both, words_of(0, 4)), low),
          _mm256_and_si256(_mm256_srlv_epi16(both, words_of(8, 12)), low)};
}

// What the codes of a group of 32 are too large by.
template <class F>
constexpr int kOffset = std::is_same_v<F, Q4_0> ? 8 : std::is_same_v<F, Q5_0> ? 16 : 0;

template <class F>
inline Codes raw_codes(const uint8_t* block) {
  if constexpr (std::is_same_v<F, Q4_0>) return nibbles(block + 2);
  if constexpr (!std::is_same_v<F, Q5_0>) return widen(load(block + F::kBytes - 32));
  const __m256i both = _mm256_broadcastsi128_si256(load128(block + 6));
  const __m256i low =
      _mm256_and_si256(_mm256_srlv_epi16(both, words_of(0, 4)), _mm256_set1_epi8(15));
  uint32_t fifth;
  std::memcpy(&fifth, block + 2, 4);
  return widen_unsigned(_mm256_mask_add_epi8(low, fifth, low, _mm256_set1_epi8(16)));
}

template <class F>
inline Codes signed_codes(const uint8_t* block) {
  return subtract(raw_codes<F>(block), kOffset<F>);
}

inline Codes q6_k_codes(const uint8_t* block, int g) {
  return subtract(widen_unsigned(q6_k_bytes(block, g)), 32);
}

// A macro in some compilers, which commas of template arguments would confuse.
inline __m256i dot2(__m256i sum, __m256i a, __m256i b) { return _mm256_dpwssd_epi32(sum, a, b); }
inline __m256i add_products(__m256i sum, const Codes& w, const Codes& x) {
  return dot2(dot2(sum, w.even, x.even), w.odd, x.odd);
}
inline __m256i products(const Codes& w, const Codes& x) {
  return add_products(_mm256_setzero_si256(), w, x);
}

}  // namespace
}  // namespace gemlax
