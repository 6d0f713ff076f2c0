// Kernels for x86-64 with AVX2, FMA and F16C. Compiled for any x86-64, run only where they exist.
#if defined(__x86_64__)

#include <type_traits>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include <immintrin.h>

namespace gemlax {
namespace {
constexpr int kFetchDistance = 1024;
constexpr bool kSumsInFours = false;
constexpr int rows_at_once(bool plain, int R) { return plain && R <= 2 ? 2 : 1; }
}  // namespace
}  // namespace gemlax

#include "simd_common.h"

namespace gemlax {
namespace {

inline void load_once(Codes&) {}

inline __m256i products(const Codes& w, const Codes& x) {
  return _mm256_add_epi32(_mm256_madd_epi16(w.even, x.even), _mm256_madd_epi16(w.odd, x.odd));
}

inline __m256i nibble_bytes(const uint8_t* p) {
  const __m128i both = load128(p);
  const __m256i apart = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);
  return _mm256_and_si256(apart, _mm256_set1_epi8(15));
}

inline Codes nibbles(const uint8_t* p) { return widen_unsigned(nibble_bytes(p)); }

// 32 bits to 32 bytes, each 255 or 0.
inline __m256i spread_bits(uint32_t bits) {
  const __m256i places = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101,
                                            0x0202020202020202, 0x0303030303030303);
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), places);
  const __m256i mask = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), mask);
}

template <class F>
inline Codes signed_codes(const uint8_t* block) {
  if constexpr (std::is_same_v<F, Q4_0>) return subtract(nibbles(block + 2), 8);
  if constexpr (!std::is_same_v<F, Q5_0>) return widen(load(block + F::kBytes - 32));
  uint32_t high;
  std::memcpy(&high, block + 2, 4);
  // Without its fifth bit a code is 16 less: as a signed byte, 0xF0 is -16.
  const __m256i less = _mm256_andnot_si256(spread_bits(high), _mm256_set1_epi8(char(0xF0)));
  return widen(_mm256_or_si256(nibble_bytes(block + 6), less));
}

template <int R>
inline void dot_q6_k_row(const Weights& w, const Activations& x, float* out, int64_t stride) {
  Sums<1, R> sums;
  const int16_t* group = x.codes;
  for (int start = 0; start < x.width; start += 256) {
    const uint8_t* block = w.codes + start / 256 * Q6_K::kBytes;
    const __m128 d = _mm256_castps256_ps128(float16_scale(block + 208));
    for (int g = 0; g < 8; ++g, group += R * kGroup) {
      fetch_ahead(block + 26 * g);
      const Codes codes = widen(_mm256_sub_epi8(q6_k_bytes(block, g), _mm256_set1_epi8(32)));
      // The first 8 of the even weights, and of the odd ones, are the first 16 weights.
      const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192 + 2 * g);
      const __m256 scale = _mm256_set_m128(_mm_mul_ps(d, _mm_set1_ps(float(scales[1]))),
                                           _mm_mul_ps(d, _mm_set1_ps(float(scales[0]))));
      for (int r = 0; r < R; ++r) {
        const __m256i product = products(codes, load_group(group + r * kGroup));
        sums.lanes[0][r] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(product), sums.lanes[0][r]);
      }
    }
  }
  sums.store(x, out, stride);
}

template <class T, int R, int N>
inline void dot_plain(const Weights& w, const Activations& x, float* out, int64_t stride) {
  Sums<N, R> sums;
  const float* group = x.floats;
  const int whole = x.width / kGroup * kGroup;
  for (int i = 0; i < whole; i += kGroup, group += R * kGroup)
    for (int n = 0; n < N; ++n) {
      const T* row = reinterpret_cast<const T*>(w.codes + n * w.row_bytes) + i;
      for (int j = 0; j < kGroup; j += 8) {
        const __m256 weights = load8(row + j);
        for (int r = 0; r < R; ++r)
          sums.lanes[n][r] =
              _mm256_fmadd_ps(weights, load8(group + r * kGroup + j), sums.lanes[n][r]);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      const T* row = reinterpret_cast<const T*>(w.codes + n * w.row_bytes);
      float total = sum(sums.lanes[n][r]);
      for (int i = whole; i < x.width; ++i)
        total += to_float(row[i]) * group[r * kGroup + i - whole];
      out[r * stride + n] = total;
    }
}

template <class F, int R, int N>
inline void dot_rows(const Weights& w, const Activations& x, float* out, int64_t stride) {
  if constexpr (F::kBlock == 1) dot_plain<typename F::Number, R, N>(w, x, out, stride);
  else if constexpr (std::is_same_v<F, Int4>) dot_int4<R, N, 1>(w, x, out, stride);
  else if constexpr (std::is_same_v<F, Q4_K>) dot_q4_k_row<R, 1>(w, x, out, stride);
  else if constexpr (std::is_same_v<F, Q6_K>) dot_q6_k_row<R>(w, x, out, stride);
  else dot_groups<F, R, N>(w, x, out, stride);
}

template <class T>
constexpr AttentionKernels<T> kAttention = {dot_vectors<T>, add_vector<T>, nullptr, nullptr};

}  // namespace

constinit const Kernels kAvx2 = {
    .name = "avx2",
    .reads_codes = true,
    .reads_offsets = false,
    .encode = encode_plainly,
    .dot = {GEMLAX_FORMATS(GEMLAX_DOTS)},
    .batch_product = nullptr,
    .attention = {kAttention<float>, kAttention<uint16_t>},
};

}  // namespace gemlax

#include "target_end.h"

#endif  // __x86_64__
