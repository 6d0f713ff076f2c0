// Kernels for x86-64 with AVX-512 (F, BW, DQ, VL) and its VNNI. Compiled for any x86-64, run only
// where they exist.
//
// Each format gives the codes of 32 weights as two vectors of 16-bit integers, the even weights and
// the odd ones, which `vpdpwssd` multiplies with those of the activations and adds up in fours.
// Vectors have 256 bits: on Zen 4 shifts and conversions run beside products then.
#if defined(__x86_64__)

#include "avx512.h"

namespace gemlax {
namespace {

inline __m256i multiply(__m256i sum, const Codes& w, const int16_t* x) {
  return dot2(dot2(sum, w.even, load(x)), w.odd, load(x + 16));
}

// Blocks are short of a cache line, or end inside one: what comes next is asked for in time. Plain
// numbers do better without.
inline void fetch_ahead(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + 2048, _MM_HINT_T0);
}

inline float sum(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

// The sums of four vectors.
inline __m128 sum_each(const __m256* v) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
  const __m256d low = _mm256_castps_pd(ab), high = _mm256_castps_pd(cd);
  const __m256 all = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(low, high)),
                                   _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// What N rows of weights give with R rows of activations, before it is put together.
template <int N, int R>
struct Sums {
  __m256 of[N][R];
  Sums() {
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) of[n][r] = _mm256_setzero_ps();
  }
  void store(const Activations& x, float* out, int64_t stride) const {
    for (int n = 0; n < N; ++n) {
      int r = 0;
      for (; r + 4 <= R; r += 4) {
        alignas(16) float four[4];
        _mm_store_ps(four, _mm_mul_ps(_mm_loadu_ps(x.scales + r), sum_each(of[n] + r)));
        for (int i = 0; i < 4; ++i) out[(r + i) * stride + n] = four[i];
      }
      for (; r < R; ++r) out[r * stride + n] = x.scales[r] * sum(of[n][r]);
    }
  }
};

// What a sum of products begins with: with few rows of activations, what codes are too large by.
template <class F, int R>
inline __m256i beginning(const Activations& x, int64_t place) {
  if (R > kFewRows || F::kOffset == 0) return _mm256_setzero_si256();
  return load(x.offsets[F::kOffset == 16] + place * 8);
}

// Each format: a row of weights times R rows of activations, B groups at a time.
template <class F, int R, int B>
inline void add_groups(const uint8_t* row, const uint16_t* scales, int g, const Activations& x,
                       __m256 (&sums)[B][R]) {
  Codes codes[B];
  __m256 scale[B];
  __m256i products[B][R];
  const int16_t* own = x.codes + int64_t{g} * R * kGroup;
  for (int b = 0; b < B; ++b) {
    const uint8_t* block = row + (g + b) * F::kBytes;
    fetch_ahead(block);
    codes[b] = Groups<F>::codes(block);
    if (R > kFewRows && Groups<F>::kOffset) codes[b] = less(codes[b], Groups<F>::kOffset);
    scale[b] = Groups<F>::scale(block, scales + g + b);
  }
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r)
      products[b][r] =
          dot2(beginning<Groups<F>, R>(x, int64_t{g + b} * R + r), codes[b].even,
                              load(own + (b * R + r) * kGroup));
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r)
      products[b][r] =
          dot2(products[b][r], codes[b].odd, load(own + (b * R + r) * kGroup + 16));
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r)
      sums[b][r] = _mm256_fmadd_ps(scale[b], _mm256_cvtepi32_ps(products[b][r]), sums[b][r]);
}

// Several rows of weights with several rows of activations, which are loaded once for them.
template <class F, int R, int N>
inline void dot_groups_together(const Weights& w, int64_t first, const Activations& x, float* out,
                                int64_t stride) {
  Sums<N, R> sums;
  const int groups = x.width / kGroup;
  const int16_t* own = x.codes;
  for (int g = 0; g < groups; ++g, own += R * kGroup) {
    Codes codes[N];
    __m256 scale[N];
    for (int n = 0; n < N; ++n) {
      const uint8_t* block = w.codes + (first + n) * w.row_bytes + g * F::kBytes;
      fetch_ahead(block);
      codes[n] = less(Groups<F>::codes(block), Groups<F>::kOffset);
      scale[n] = Groups<F>::scale(block, F::kGroup ? w.scales + (first + n) * w.groups + g : nullptr);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __m256i even = load(own + r * kGroup), odd = load(own + r * kGroup + 16);
      asm("" : "+v"(even), "+v"(odd));
      for (int n = 0; n < N; ++n) {
        const __m256i products =
            dot2(dot2(_mm256_setzero_si256(), codes[n].even, even), codes[n].odd, odd);
        sums.of[n][r] = _mm256_fmadd_ps(scale[n], _mm256_cvtepi32_ps(products), sums.of[n][r]);
      }
    }
  }
  sums.store(x, out, stride);
}

template <class F, int R, int N>
inline void dot_groups(const Weights& w, int64_t first, const Activations& x, float* out,
                       int64_t stride) {
  if constexpr (N > 1) return dot_groups_together<F, R, N>(w, first, x, out, stride);
  constexpr int B = R == 1 ? 4 : R == 2 ? 2 : 1;
  __m256 sums[B][R], rest[1][R];
  for (int r = 0; r < R; ++r) {
    rest[0][r] = _mm256_setzero_ps();
    for (int b = 0; b < B; ++b) sums[b][r] = _mm256_setzero_ps();
  }
  const uint8_t* row = w.codes + first * w.row_bytes;
  const uint16_t* scales = F::kGroup ? w.scales + first * w.groups : nullptr;
  const int groups = x.width / kGroup;
  int g = 0;
  for (; g + B <= groups; g += B)
    add_groups<F, R, B>(row, scales, g, x, sums);
  for (; g < groups; ++g)
    add_groups<F, R, 1>(row, scales, g, x, rest);
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) rest[0][r] = _mm256_add_ps(rest[0][r], sums[b][r]);
    out[r * stride] = x.scales[r] * sum(rest[0][r]);
  }
}

// The scales of `some` of 8 groups of int4, and what their zero points are worth; the rest is zero.
struct Entries {
  __m256 scales, zeros;
};

inline Entries entries(const uint16_t* p, __mmask8 some) {
  const __m128i all = _mm_maskz_loadu_epi16(some, p);
  const __m128i halves =
      _mm_slli_epi16(_mm_and_si128(all, _mm_set1_epi16(Int4::kScaleMask)), Int4::kScaleShift);
  const __m256i eighths = _mm256_cvtepu16_epi32(_mm_srli_epi16(all, Int4::kScaleBits));
  const __m256 scales = _mm256_cvtph_ps(halves);
  const __m256 steps = _mm256_mul_ps(scales, _mm256_set1_ps(Int4::kZeroStep));
  return {scales, _mm256_mul_ps(steps, _mm256_cvtepi32_ps(eighths))};
}

// G groups of N rows of weights from `start` on, times R rows of activations, into S sums each.
template <int G, int R, int N, int S>
inline void add_int4(const Weights& w, int64_t first, int start, const Activations& x,
                     __m256 (&sums)[S][N][R]) {
  constexpr __mmask8 some = (1u << G) - 1;
  alignas(32) float scale[N][8];
  for (int n = 0; n < N; ++n) {
    const Entries held = entries(w.scales + (first + n) * w.groups + start, some);
    _mm256_store_ps(scale[n], held.scales);
    for (int r = 0; r < R; ++r)
      sums[0][n][r] = _mm256_fnmadd_ps(
          held.zeros, _mm256_maskz_loadu_ps(some, x.sums + r * x.groups() + start), sums[0][n][r]);
  }
  const uint8_t* blocks = w.codes + first * w.row_bytes + start * Int4::kBytes;
  const int16_t* own = x.codes + int64_t{start} * R * kGroup;
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g, blocks += Int4::kBytes, own += R * kGroup) {
    Codes codes[N];
    for (int n = 0; n < N; ++n) {
      fetch_ahead(blocks + n * w.row_bytes);
      codes[n] = nibbles(blocks + n * w.row_bytes);
    }
    for (int r = 0; r < R; ++r) {
      __m256i even = load(own + r * kGroup), odd = load(own + r * kGroup + 16);
      asm("" : "+v"(even), "+v"(odd));
      for (int n = 0; n < N; ++n) {
        const __m256i products =
            dot2(dot2(_mm256_setzero_si256(), codes[n].even, even), codes[n].odd, odd);
        __m256& sum = sums[g % S][n][r];
        sum = _mm256_fmadd_ps(_mm256_broadcast_ss(scale[n] + g), _mm256_cvtepi32_ps(products), sum);
      }
    }
  }
}

template <class F, int R, int N>
inline void dot_int4(const Weights& w, int64_t first, const Activations& x, float* out,
                     int64_t stride) {
  constexpr int S = R == 1 ? 4 : R == 2 ? 2 : 1;  // sums that do not wait for one another
  __m256 sums[S][N][R];
  for (int s = 0; s < S; ++s)
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) sums[s][n][r] = _mm256_setzero_ps();
  const int groups = x.width / kGroup;
  int start = 0;
  for (; start + 8 <= groups; start += 8) add_int4<8>(w, first, start, x, sums);
  for (; start + 4 <= groups; start += 4) add_int4<4>(w, first, start, x, sums);
  for (; start < groups; ++start) add_int4<1>(w, first, start, x, sums);
  Sums<N, R> total;
  for (int s = 0; s < S; ++s)
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) total.of[n][r] = _mm256_add_ps(total.of[n][r], sums[s][n][r]);
  total.store(x, out, stride);
}

// The 6-bit scales and minima of a Q4_K block: 8 bytes of each.
inline void unpack_scales(const uint8_t* packed, uint64_t* scales, uint64_t* minima) {
  uint32_t a, b, c;
  std::memcpy(&a, packed, 4);
  std::memcpy(&b, packed + 4, 4);
  std::memcpy(&c, packed + 8, 4);
  const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
  *scales = uint64_t((c & four) | (a >> 6 & two) << 4) << 32 | (a & six);
  *minima = uint64_t((c >> 4 & four) | (b >> 6 & two) << 4) << 32 | (b & six);
}

inline Codes times(const Codes& codes, __m256i scale) {
  return {_mm256_mullo_epi16(codes.even, scale), _mm256_mullo_epi16(codes.odd, scale)};
}

template <int N, int R>
inline void finish(const __m256i (&totals)[2][N][R], const uint8_t* d, int64_t row_bytes,
                   Sums<N, R>& sums) {
  for (int n = 0; n < N; ++n) {
    const __m256 scale = half(d + n * row_bytes);
    for (int r = 0; r < R; ++r) {
      const __m256i total =
          R == 1 ? _mm256_add_epi32(totals[0][n][r], totals[1][n][r]) : totals[0][n][r];
      sums.of[n][r] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(total), sums.of[n][r]);
    }
  }
}

// With few rows of activations, each group's products are scaled as floats.
template <class F, int R>
inline void dot_q4_k_few(const Weights& w, int64_t first, const Activations& x, float* out,
                         int64_t stride) {
  __m256 sums[R][4];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 4; ++i) sums[r][i] = _mm256_setzero_ps();
  const __m256i low = _mm256_set1_epi16(15);
  const int16_t* own = x.codes;
  for (int start = 0; start < x.width; start += 256, own += R * 256) {
    const uint8_t* block = w.codes + first * w.row_bytes + start / 256 * F::kBytes;
    uint64_t packed[2];
    unpack_scales(block + 4, packed, packed + 1);
    const __m128i bytes = _mm_set_epi64x(int64_t(packed[1]), int64_t(packed[0]));
    const __m256 minima = _mm256_mul_ps(half(block + 2), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(
                                                             _mm_unpackhi_epi64(bytes, bytes))));
    alignas(32) float scale[8];
    _mm256_store_ps(scale, _mm256_mul_ps(half(block), _mm256_cvtepi32_ps(
                                                          _mm256_cvtepu8_epi32(bytes))));
    for (int r = 0; r < R; ++r)
      sums[r][0] = _mm256_fnmadd_ps(
          minima, _mm256_loadu_ps(x.sums + r * x.groups() + start / kGroup), sums[r][0]);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      fetch_ahead(block + 36 * pair);
      const __m256i raw = load(block + 16 + 32 * pair);
      const __m256i odd = _mm256_srli_epi16(raw, 8);
      const Codes lower = {_mm256_and_si256(raw, low), _mm256_and_si256(odd, low)};
      const Codes upper = {_mm256_and_si256(_mm256_srli_epi16(raw, 4), low),
                           _mm256_srli_epi16(raw, 12)};
      for (int r = 0; r < R; ++r) {
        const int16_t* here = own + (2 * pair * R + r) * kGroup;
        const __m256i one = multiply(_mm256_setzero_si256(), lower, here);
        const __m256i two = multiply(_mm256_setzero_si256(), upper, here + R * kGroup);
        __m256 *to = &sums[r][pair % 2 * 2];
        to[0] = _mm256_fmadd_ps(_mm256_broadcast_ss(scale + 2 * pair), _mm256_cvtepi32_ps(one),
                                to[0]);
        to[1] = _mm256_fmadd_ps(_mm256_broadcast_ss(scale + 2 * pair + 1),
                                _mm256_cvtepi32_ps(two), to[1]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    out[r * stride] =
        x.scales[r] * sum(_mm256_add_ps(_mm256_add_ps(sums[r][0], sums[r][1]),
                                        _mm256_add_ps(sums[r][2], sums[r][3])));
}

// Codes times their 6-bit scales have 10 bits: a whole block adds up to less than 2^29.
template <class F, int R, int N>
inline void dot_q4_k(const Weights& w, int64_t first, const Activations& x, float* out,
                     int64_t stride) {
  if constexpr (R <= kFewRows) return dot_q4_k_few<F, R>(w, first, x, out, stride);
  Sums<N, R> sums;
  const __m256i low = _mm256_set1_epi16(15);
  const int16_t* own = x.codes;
  for (int start = 0; start < x.width; start += 256, own += R * 256) {
    const uint8_t* block = w.codes + first * w.row_bytes + start / 256 * F::kBytes;
    __m256i totals[2][N][R];
    alignas(16) int16_t scales[N][8];
    for (int n = 0; n < N; ++n) {
      const uint8_t* head = block + n * w.row_bytes;
      uint64_t packed_scales, packed_minima;
      unpack_scales(head + 4, &packed_scales, &packed_minima);
      _mm_store_si128(reinterpret_cast<__m128i*>(scales[n]),
                      _mm_cvtepu8_epi16(_mm_cvtsi64_si128(int64_t(packed_scales))));
      const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(packed_minima)));
      const __m256 minima = _mm256_mul_ps(half(head + 2), _mm256_cvtepi32_ps(wide));
      for (int r = 0; r < R; ++r) {
        const float* own_sums = x.sums + r * x.groups() + start / kGroup;
        sums.of[n][r] = _mm256_fnmadd_ps(minima, _mm256_loadu_ps(own_sums), sums.of[n][r]);
        totals[0][n][r] = totals[1][n][r] = _mm256_setzero_si256();
      }
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      Codes lower[N], upper[N];
      for (int n = 0; n < N; ++n) {
        const uint8_t* own_block = block + n * w.row_bytes;
        fetch_ahead(own_block + 36 * pair);
        const __m256i bytes = load(own_block + 16 + 32 * pair);
        const __m256i odd = _mm256_srli_epi16(bytes, 8);
        lower[n] = times({_mm256_and_si256(bytes, low), _mm256_and_si256(odd, low)},
                         _mm256_set1_epi16(scales[n][2 * pair]));
        upper[n] = times({_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low),
                          _mm256_srli_epi16(bytes, 12)},
                         _mm256_set1_epi16(scales[n][2 * pair + 1]));
      }
      const int16_t* here = own + 2 * pair * R * kGroup;
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
          totals[0][n][r] = multiply(totals[0][n][r], lower[n], here + r * kGroup);
          __m256i& second = totals[R == 1][n][r];
          second = multiply(second, upper[n], here + (R + r) * kGroup);
        }
    }
    finish(totals, block, w.row_bytes, sums);
  }
  sums.store(x, out, stride);
}

// Codes times their 8-bit scales are at most 32 * 128: a block adds up to 16 * 4096 * 32767 < 2^31.
template <class F, int R, int N>
inline void dot_q6_k(const Weights& w, int64_t first, const Activations& x, float* out,
                     int64_t stride) {
  Sums<N, R> sums;
  const int16_t* own = x.codes;
  for (int start = 0; start < x.width; start += 256, own += R * 256) {
    const uint8_t* block = w.codes + first * w.row_bytes + start / 256 * F::kBytes;
    __m256i totals[2][N][R], scales[N];
    for (int n = 0; n < N; ++n) {
      scales[n] = _mm256_cvtepi8_epi16(load128(block + n * w.row_bytes + 192));
      for (int r = 0; r < R; ++r) totals[0][n][r] = totals[1][n][r] = _mm256_setzero_si256();
    }
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      Codes codes[N];
      for (int n = 0; n < N; ++n) {
        const uint8_t* own_block = block + n * w.row_bytes;
        fetch_ahead(own_block + 26 * g);
        // The first 8 of the even weights, and of the odd ones, are the first 16 weights.
        const __m256i scale = _mm256_permutexvar_epi16(two(2 * g, 2 * g + 1), scales[n]);
        codes[n] = times(less(q6_k_codes(own_block, g), 32), scale);
      }
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
          __m256i& total = totals[R == 1 ? g % 2 : 0][n][r];
          total = multiply(total, codes[n], own + (g * R + r) * kGroup);
        }
    }
    finish(totals, block + 208, w.row_bytes, sums);
  }
  sums.store(x, out, stride);
}

inline __m512 sixteen(const float* p, __mmask16 some = 0xffff) {
  return _mm512_maskz_loadu_ps(some, p);
}
inline __m512 sixteen(const uint16_t* p, __mmask16 some = 0xffff) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __mmask16 first_lanes(int n) { return __mmask16((1u << (n < 16 ? n : 16)) - 1); }

template <class T, int R, int N>
inline void dot_plain(const Weights& w, int64_t first, const Activations& x, float* out,
                      int64_t stride) {
  constexpr int S = R == 1 ? 4 : R == 2 ? 2 : 1;  // sums that do not wait for one another
  __m512 sums[S][N][R];
  for (int s = 0; s < S; ++s)
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) sums[s][n][r] = _mm512_setzero_ps();
  const T* rows[N];
  for (int n = 0; n < N; ++n)
    rows[n] = reinterpret_cast<const T*>(w.codes + (first + n) * w.row_bytes);
  const float* own = x.floats;
  const auto add = [&](int i, int j, int s, __mmask16 some) {
    __m512 weights[N];
    for (int n = 0; n < N; ++n) weights[n] = sixteen(rows[n] + i + j, some);
    for (int r = 0; r < R; ++r) {
      const __m512 here = _mm512_loadu_ps(own + (j / kGroup * R + r) * kGroup + j % kGroup);
      for (int n = 0; n < N; ++n)
        sums[s][n][r] = _mm512_fmadd_ps(weights[n], here, sums[s][n][r]);
    }
  };
  int i = 0;
  for (; i + 2 * kGroup <= x.width; i += 2 * kGroup, own += 2 * R * kGroup) {
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
    const __m512 some = sixteen(x + i, first_lanes(width - i));
    peaks = _mm512_max_epu32(peaks, _mm512_and_si512(_mm512_castps_si512(some), magnitude));
  }
  // The bits of finite numbers without a sign are in order, those of others behind them.
  const uint32_t bits = _mm512_reduce_max_epu32(peaks);
  if (bits >= 0x7f800000) return std::nanf("");
  const float most = std::bit_cast<float>(bits);
  if (most == 0) return 0;
  // In steps, so that the inverse of the tiniest is no infinity.
  const bool tiny = most < 0x1p-100f;
  const float lift = tiny ? 0x1p60f : 1.0f;
  const __m512 up = _mm512_set1_ps(lift), inverse = _mm512_set1_ps(32767.0f / (most * lift));
  for (int g = 0; g < width / kGroup; ++g, x += kGroup, codes += step) {
    __m512i halves[2];
    for (int h = 0; h < 2; ++h) {
      const __m512 raised = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * h), up);
      halves[h] = _mm512_cvtps_epi32(_mm512_mul_ps(raised, inverse));
    }
    sums[g] = float(_mm512_reduce_add_epi32(_mm512_add_epi32(halves[0], halves[1])));
    // Two codes in 32 bits: all the low ones, then all the high ones.
    const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(halves[0])),
                                             _mm512_cvtepi32_epi16(halves[1]), 1);
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
  return most / 32767.0f;
}

// All rows, some at a time: `FEW` with one or two rows of activations, `MANY` with more.
#define OVER_ROWS(NAME, WHAT, FEW, MANY)                                                    \
  template <class F, int R>                                                                 \
  void NAME(const Weights& w, int64_t first, int64_t last, const Activations& x, float* out, \
            int64_t stride) {                                                               \
    constexpr int kRows = R <= 2 ? FEW : MANY;                                              \
    for (; first + kRows <= last; first += kRows)                                           \
      WHAT<F, R, kRows>(w, first, x, out + first, stride);                                  \
    for (; first < last; ++first) WHAT<F, R, 1>(w, first, x, out + first, stride);          \
  }
OVER_ROWS(groups, dot_groups, 1, 2)
OVER_ROWS(int4, dot_int4, 1, 2)
OVER_ROWS(q4_k, dot_q4_k, 1, 2)
OVER_ROWS(q6_k, dot_q6_k, 1, 2)
OVER_ROWS(plain, dot_plain, 1, 2)

template <class T>
float dot_vectors(const float* a, const T* b, int n) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int i = 0;
  for (; i + 32 <= n; i += 32) {
    sums[0] = _mm512_fmadd_ps(sixteen(a + i), sixteen(b + i), sums[0]);
    sums[1] = _mm512_fmadd_ps(sixteen(a + i + 16), sixteen(b + i + 16), sums[1]);
  }
  for (; i < n; i += 16) {
    const __mmask16 some = first_lanes(n - i);
    sums[0] = _mm512_fmadd_ps(sixteen(a + i, some), sixteen(b + i, some), sums[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

template <class T>
void add_vector(float* out, const T* v, float weight, int n) {
  const __m512 factor = _mm512_set1_ps(weight);
  for (int i = 0; i < n; i += 16) {
    const __mmask16 some = first_lanes(n - i);
    const __m512 sum = _mm512_fmadd_ps(factor, sixteen(v + i, some), sixteen(out + i, some));
    _mm512_mask_storeu_ps(out + i, some, sum);
  }
}

#define ROWS(NAME, F) {NAME<F, 1>, NAME<F, 2>, NAME<F, 4>, NAME<F, 8>}

}  // namespace

const Kernels kAvx512 = {
    "avx512",
    true,
    &kManyAvx512,
    &kAttendAvx512,
    encode,
    {ROWS(plain, float), ROWS(plain, uint16_t), ROWS(groups, Int8), ROWS(int4, Int4),
     ROWS(groups, Q8_0), ROWS(groups, Q4_0), ROWS(groups, Q5_0), ROWS(q4_k, Q4_K),
     ROWS(q6_k, Q6_K)},
    {false, false, true, true, true, true, true, true, true},
    dot_vectors<float>,
    dot_vectors<uint16_t>,
    add_vector<float>,
    add_vector<uint16_t>,
};

}  // namespace gemlax

#include "avx512_end.h"

#endif  // __x86_64__
