// Kernels for x86-64 with AVX-512 (F, BW, DQ, VL) and its VNNI. Compiled for any x86-64, run only
// where they exist.
//
// `vpdpwssd` multiplies the codes of 32 weights with those of the activations and adds up in fours.
// Vectors have 256 bits: on Zen 4 shifts and conversions run beside products then.
#if defined(__x86_64__)

#include "avx512.h"

namespace gemlax {
namespace {

// Sums that do not wait for one another.
template <int R>
constexpr int kChains = R == 1 ? 4 : R == 2 ? 2 : 1;

// What a sum of products begins with: with few rows of activations, what codes are too large by.
template <class F, int R>
inline __m256i first_sum(const Activations& x, int64_t index) {
  if (R > kFewRows || kOffset<F> == 0) return _mm256_setzero_si256();
  return load(x.offsets[kOffset<F> == 16] + index * 8);
}

// B groups of a row of weights from `g` on, times R rows of activations.
template <class F, int R, int B>
inline void add_groups(const Weights& w, int g, const Activations& x, __m256 (&sums)[B][R]) {
  Codes codes[B];
  __m256 scale[B];
  __m256i sums_of_products[B][R];
  const int16_t* group = x.codes + int64_t{g} * R * kGroup;
  for (int b = 0; b < B; ++b) {
    const uint8_t* block = w.codes + (g + b) * F::kBytes;
    fetch_ahead(block);
    codes[b] = R > kFewRows ? signed_codes<F>(block) : raw_codes<F>(block);
    scale[b] = group_scale<F>(block, w.scales + g + b);
  }
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r)
      sums_of_products[b][r] = dot2(first_sum<F, R>(x, int64_t{g + b} * R + r), codes[b].even,
                                    load(group + (b * R + r) * kGroup));
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r)
      sums_of_products[b][r] =
          dot2(sums_of_products[b][r], codes[b].odd, load(group + (b * R + r) * kGroup + 16));
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r)
      sums[b][r] = _mm256_fmadd_ps(scale[b], _mm256_cvtepi32_ps(sums_of_products[b][r]), sums[b][r]);
}

// A row of weights, several groups at a time.
template <class F, int R>
inline void dot_groups_row(const Weights& w, const Activations& x, float* out, int64_t stride) {
  constexpr int B = kChains<R>;
  __m256 sums[B][R], total[1][R];
  for (int r = 0; r < R; ++r) {
    total[0][r] = _mm256_setzero_ps();
    for (int b = 0; b < B; ++b) sums[b][r] = _mm256_setzero_ps();
  }
  const int groups = x.width / kGroup;
  int g = 0;
  for (; g + B <= groups; g += B) add_groups<F, R, B>(w, g, x, sums);
  for (; g < groups; ++g) add_groups<F, R, 1>(w, g, x, total);
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) total[0][r] = _mm256_add_ps(total[0][r], sums[b][r]);
    out[r * stride] = x.scales[r] * sum(total[0][r]);
  }
}

inline Codes times(const Codes& codes, __m256i scale) {
  return {_mm256_mullo_epi16(codes.even, scale), _mm256_mullo_epi16(codes.odd, scale)};
}

// Integer sums of the products of a block: with one row of activations two that take turns.
template <int N, int R>
struct BlockSums {
  __m256i lanes[2][N][R];
  BlockSums() {
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) lanes[0][n][r] = lanes[1][n][r] = _mm256_setzero_si256();
  }
  __m256i& at(int turn, int n, int r) { return lanes[R == 1 ? turn % 2 : 0][n][r]; }
  // Scale them by the float16 at `d` of each row.
  void add_to(Sums<N, R>& sums, const uint8_t* d, int64_t row_bytes) const {
    for (int n = 0; n < N; ++n) {
      const __m256 scale = float16_scale(d + n * row_bytes);
      for (int r = 0; r < R; ++r) {
        const __m256i total =
            R == 1 ? _mm256_add_epi32(lanes[0][n][r], lanes[1][n][r]) : lanes[0][n][r];
        sums.lanes[n][r] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(total), sums.lanes[n][r]);
      }
    }
  }
};

// Codes times their 6-bit scales have 10 bits: a whole block adds up to less than 2^29.
template <int R, int N>
inline void dot_q4_k(const Weights& w, const Activations& x, float* out, int64_t stride) {
  Sums<N, R> sums;
  const int16_t* codes = x.codes;
  for (int start = 0; start < x.width; start += 256, codes += R * 256) {
    const uint8_t* block = w.codes + start / 256 * Q4_K::kBytes;
    BlockSums<N, R> totals;
    alignas(16) int16_t scales[N][8];
    for (int n = 0; n < N; ++n) {
      const uint8_t* head = block + n * w.row_bytes;
      uint64_t packed_scales, packed_minima;
      unpack_scales(head + 4, &packed_scales, &packed_minima);
      _mm_store_si128(reinterpret_cast<__m128i*>(scales[n]),
                      _mm_cvtepu8_epi16(_mm_cvtsi64_si128(int64_t(packed_scales))));
      const __m256 minima =
          _mm256_mul_ps(float16_scale(head + 2), bytes_to_floats(packed_minima));
      for (int r = 0; r < R; ++r) {
        const float* group_sums = x.sums + r * x.groups() + start / kGroup;
        sums.lanes[n][r] = _mm256_fnmadd_ps(minima, _mm256_loadu_ps(group_sums), sums.lanes[n][r]);
      }
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      GroupPair groups[N];
      for (int n = 0; n < N; ++n) {
        fetch_ahead(block + n * w.row_bytes + 36 * pair);
        groups[n] = load_pair(block + n * w.row_bytes + 16 + 32 * pair);
        groups[n].lower = times(groups[n].lower, _mm256_set1_epi16(scales[n][2 * pair]));
        groups[n].upper = times(groups[n].upper, _mm256_set1_epi16(scales[n][2 * pair + 1]));
      }
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
          const int16_t* group = codes + (2 * pair * R + r) * kGroup;
          __m256i &first = totals.at(0, n, r), &second = totals.at(1, n, r);
          first = add_products(first, groups[n].lower, load_group(group));
          second = add_products(second, groups[n].upper, load_group(group + R * kGroup));
        }
    }
    totals.add_to(sums, block, w.row_bytes);
  }
  sums.store(x, out, stride);
}

// Codes times their 8-bit scales are at most 32 * 128: a block adds up to 16 * 4096 * 32767 < 2^31.
template <int R, int N>
inline void dot_q6_k(const Weights& w, const Activations& x, float* out, int64_t stride) {
  Sums<N, R> sums;
  const int16_t* group = x.codes;
  for (int start = 0; start < x.width; start += 256) {
    const uint8_t* block = w.codes + start / 256 * Q6_K::kBytes;
    BlockSums<N, R> totals;
    __m256i scales[N];
    for (int n = 0; n < N; ++n)
      scales[n] = _mm256_cvtepi8_epi16(load128(block + n * w.row_bytes + 192));
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g, group += R * kGroup) {
      Codes codes[N];
      for (int n = 0; n < N; ++n) {
        fetch_ahead(block + n * w.row_bytes + 26 * g);
        // The first 8 of the even weights, and of the odd ones, are the first 16 weights.
        const __m256i scale = _mm256_permutexvar_epi16(words_of(2 * g, 2 * g + 1), scales[n]);
        codes[n] = times(q6_k_codes(block + n * w.row_bytes, g), scale);
      }
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
          __m256i& total = totals.at(g, n, r);
          total = add_products(total, codes[n], load_group(group + r * kGroup));
        }
    }
    totals.add_to(sums, block + 208, w.row_bytes);
  }
  sums.store(x, out, stride);
}

inline __mmask16 first_lanes(int n) { return __mmask16((1u << (n < 16 ? n : 16)) - 1); }

template <class T, int R, int N>
inline void dot_plain(const Weights& w, const Activations& x, float* out, int64_t stride) {
  constexpr int S = kChains<R>;
  __m512 sums[S][N][R];
  for (int s = 0; s < S; ++s)
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) sums[s][n][r] = _mm512_setzero_ps();
  const T* rows[N];
  for (int n = 0; n < N; ++n)
    rows[n] = reinterpret_cast<const T*>(w.codes + n * w.row_bytes);
  const float* group = x.floats;
  const auto add = [&](int i, int j, int s, __mmask16 mask) {
    __m512 weights[N];
    for (int n = 0; n < N; ++n) weights[n] = load_floats(rows[n] + i + j, mask);
    for (int r = 0; r < R; ++r) {
      const __m512 floats = _mm512_loadu_ps(group + (j / kGroup * R + r) * kGroup + j % kGroup);
      for (int n = 0; n < N; ++n)
        sums[s][n][r] = _mm512_fmadd_ps(weights[n], floats, sums[s][n][r]);
    }
  };
  int i = 0;
  for (; i + 2 * kGroup <= x.width; i += 2 * kGroup, group += 2 * R * kGroup) {
#pragma GCC unroll 4
    for (int j = 0; j < 2 * kGroup; j += 16) add(i, j, j / 16 % S, 0xffff);
  }
  for (int j = 0; i + j < x.width; j += 16) add(i, j, 0, first_lanes(x.width - i - j));
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      __m512 total = sums[0][n][r];
      for (int s = 1; s < S; ++s) total = _mm512_add_ps(total, sums[s][n][r]);
      out[r * stride + n] = _mm512_reduce_add_ps(total);
    }
}

float encode(const float* x, int width, int64_t step, int16_t* codes, float* sums,
             int32_t* const* offsets) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i peaks = _mm512_setzero_si512();
  for (int i = 0; i < width; i += 16) {
    const __m512i bits = _mm512_castps_si512(load_floats(x + i, first_lanes(width - i)));
    peaks = _mm512_max_epu32(peaks, _mm512_and_si512(bits, magnitude));
  }
  // The bits of finite numbers without a sign are in order, those of others behind them.
  const uint32_t bits = _mm512_reduce_max_epu32(peaks);
  if (bits >= 0x7f800000) return std::nanf("");
  const float peak = std::bit_cast<float>(bits);
  if (peak == 0) return 0;
  // In steps, so that the inverse of the tiniest is no infinity.
  const bool tiny = peak < 0x1p-100f;
  const float lift = tiny ? 0x1p60f : 1.0f;
  const __m512 up = _mm512_set1_ps(lift), inverse = _mm512_set1_ps(32767.0f / (peak * lift));
  for (int g = 0; g < width / kGroup; ++g, x += kGroup, codes += step) {
    __m512i rounded[2];
    for (int h = 0; h < 2; ++h) {
      const __m512 raised = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * h), up);
      rounded[h] = _mm512_cvtps_epi32(_mm512_mul_ps(raised, inverse));
    }
    sums[g] = float(_mm512_reduce_add_epi32(_mm512_add_epi32(rounded[0], rounded[1])));
    // Two codes in 32 bits: all the low ones, then all the high ones.
    const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(rounded[0])),
                                             _mm512_cvtepi32_epi16(rounded[1]), 1);
    const __m256i evens = _mm512_cvtepi32_epi16(words);
    const __m256i odds = _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), evens);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 16), odds);
    if (!offsets) continue;
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i lanes = dot2(_mm256_madd_epi16(evens, ones), odds, ones);
    for (int k = 0; k < 2; ++k)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(offsets[k] + g * (step / kGroup) * 8),
                          _mm256_mullo_epi32(lanes, _mm256_set1_epi32(-8 << k)));
  }
  return peak / 32767.0f;
}

template <class F, int R, int N>
inline void dot_rows(const Weights& w, const Activations& x, float* out, int64_t stride) {
  if constexpr (F::kBlock == 1) dot_plain<typename F::Number, R, N>(w, x, out, stride);
  else if constexpr (std::is_same_v<F, Int4>) dot_int4<R, N, kChains<R>>(w, x, out, stride);
  else if constexpr (std::is_same_v<F, Q4_K> && R <= kFewRows) dot_q4_k_row<R, 4>(w, x, out, stride);
  else if constexpr (std::is_same_v<F, Q4_K>) dot_q4_k<R, N>(w, x, out, stride);
  else if constexpr (std::is_same_v<F, Q6_K>) dot_q6_k<R, N>(w, x, out, stride);
  else if constexpr (N == 1) dot_groups_row<F, R>(w, x, out, stride);
  else dot_groups<F, R, N>(w, x, out, stride);
}

template <class T>
constexpr AttentionKernels<T> kAttention = {dot_vectors<T>, add_vector<T>, few_queries_avx512<T>,
                                            many_queries_avx512<T>};

}  // namespace

constinit const Kernels kAvx512 = {
    .name = "avx512",
    .reads_codes = true,
    .reads_offsets = true,
    .encode = encode,
    .dot = {GEMLAX_FORMATS(GEMLAX_DOTS)},
    .batch_product = &kBatchProductAvx512,
    .attention = {kAttention<float>, kAttention<uint16_t>},
};

}  // namespace gemlax

#include "target_end.h"

#endif  // __x86_64__
