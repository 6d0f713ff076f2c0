// Products with many rows of activations, for AVX-512 with VNNI: weights are turned into 16-bit
// integers once, and multiplied as integers with all rows.
#if defined(__x86_64__)

#include "avx512.h"

namespace gemlax {
namespace {

// A group of 32 weights as floats, the even ones first.
struct Floats {
  __m512 even, odd;
};

inline Floats to_floats(const Codes& codes) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(codes.even)),
          _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(codes.odd))};
}
inline Floats scaled(const Floats& x, __m512 scale) {
  return {_mm512_mul_ps(x.even, scale), _mm512_mul_ps(x.odd, scale)};
}
inline Floats subtract(const Floats& x, float value) {
  return {_mm512_sub_ps(x.even, _mm512_set1_ps(value)), _mm512_sub_ps(x.odd, _mm512_set1_ps(value))};
}
inline __m512 join(__m256 low, __m256 high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

// The weights of group `g` of a row.
template <class F>
inline Floats decode_group(const uint8_t* row, const uint16_t* scales, int g) {
  constexpr int kGroups = F::kBlock / kGroup;
  const uint8_t* block = row + int64_t{g / kGroups} * F::kBytes;
  if constexpr (std::is_same_v<F, Int4>) {
    const Floats codes = subtract(to_floats(nibbles(block)), Int4::zero(scales[g]));
    return scaled(codes, _mm512_set1_ps(Int4::scale(scales[g])));
  } else if constexpr (std::is_same_v<F, Q4_K>) {
    int scale, minimum;
    Q4_K::scale_and_minimum(block + 4, g % 8, &scale, &minimum);
    const GroupPair pair = load_pair(block + 16 + 32 * (g % 8 / 2));
    const float d = load_float16(block) * float(scale);
    return subtract(scaled(to_floats(g % 2 ? pair.upper : pair.lower), _mm512_set1_ps(d)),
                    load_float16(block + 2) * float(minimum));
  } else if constexpr (std::is_same_v<F, Q6_K>) {
    const auto* factors = reinterpret_cast<const int8_t*>(block + 192 + g % 8 * 2);
    const float d = load_float16(block + 208);
    return scaled(to_floats(q6_k_codes(block, g % 8)), join(_mm256_set1_ps(d * float(factors[0])),
                                                            _mm256_set1_ps(d * float(factors[1]))));
  } else {
    const __m256 scale = group_scale<F>(block, scales + g);
    return scaled(to_floats(signed_codes<F>(block)), join(scale, scale));
  }
}

// Groups that share a scale here. Eight products of a lane add up to 8 * 8191 * 32767 < 2^31.
constexpr int kGroupsPerScale = 4;
constexpr float kMaxCode = 8191;

template <class F>
void unpack(const Weights& w, int64_t first, int64_t last, int width, int16_t* codes,
            float* scales) {
  const int groups = width / kGroup;
  for (int64_t f = first; f < last; ++f) {
    const Weights row = w.from(f);
    for (int start = 0; start < groups; start += kGroupsPerScale) {
      const int count = groups - start < kGroupsPerScale ? groups - start : kGroupsPerScale;
      Floats weights[kGroupsPerScale];
      __m512 peaks = _mm512_setzero_ps();
      for (int i = 0; i < count; ++i) {
        weights[i] = decode_group<F>(row.codes, row.scales, start + i);
        peaks = _mm512_max_ps(peaks, _mm512_abs_ps(weights[i].even));
        peaks = _mm512_max_ps(peaks, _mm512_abs_ps(weights[i].odd));
      }
      const float peak = _mm512_reduce_max_ps(peaks);
      const __m512 inverse = _mm512_set1_ps(peak < 1e-30f ? 0.0f : kMaxCode / peak);
      *scales++ = peak / kMaxCode;
      for (int i = 0; i < count; ++i, codes += kGroup) {
        const auto words = [&](__m512 v) {
          return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)));
        };
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), words(weights[i].even));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 16), words(weights[i].odd));
      }
    }
  }
}

template <class F>
constexpr decltype(&unpack<Int8>) unpack_of() {
  if constexpr (F::kBlock == 1) return nullptr;
  else return unpack<F>;
}

inline int scales_of(int groups) { return (groups + kGroupsPerScale - 1) / kGroupsPerScale; }

// N rows of weights times 4 of the kMaxRows rows of activations.
template <int N>
inline void multiply_tile(const int16_t* codes, const float* scales, int groups, const int16_t* x,
                          const float* x_scales, float* out, int64_t stride) {
  constexpr int R = 4;
  __m512 sums[N][R];
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) sums[n][r] = _mm512_setzero_ps();
  const auto add = [&](int start, int count) {
    __m512i totals[N][R];
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) totals[n][r] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      __m512i weights[N];
      for (int n = 0; n < N; ++n) {
        weights[n] = _mm512_loadu_si512(codes + (int64_t{n} * groups + start + i) * kGroup);
        load_once(weights[n]);
      }
      for (int r = 0; r < R; ++r) {
        __m512i activations = _mm512_loadu_si512(x + ((start + i) * kMaxRows + r) * kGroup);
        load_once(activations);
        for (int n = 0; n < N; ++n)
          totals[n][r] = _mm512_dpwssd_epi32(totals[n][r], weights[n], activations);
      }
    }
    for (int n = 0; n < N; ++n) {
      const __m512 scale = _mm512_set1_ps(scales[n * scales_of(groups) + start / kGroupsPerScale]);
      for (int r = 0; r < R; ++r)
        sums[n][r] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(totals[n][r]), sums[n][r]);
    }
  };
  int start = 0;
  for (; start + kGroupsPerScale <= groups; start += kGroupsPerScale) add(start, kGroupsPerScale);
  if (start < groups) add(start, groups - start);
  for (int n = 0; n < N; ++n) {
    __m256 halves[R];
    for (int r = 0; r < R; ++r)
      halves[r] = _mm256_add_ps(_mm512_castps512_ps256(sums[n][r]),
                                _mm512_extractf32x8_ps(sums[n][r], 1));
    alignas(16) float four[R];
    _mm_store_ps(four, _mm_mul_ps(sums_of_four(halves), _mm_loadu_ps(x_scales)));
    for (int r = 0; r < R; ++r) out[r * stride + n] = four[r];
  }
}

// The activations of half the rows stay in the first cache while weights pass by.
void multiply(const int16_t* codes, const float* scales, int64_t rows, const Activations& x,
              float* out, int64_t stride) {
  const int groups = int(x.groups());
  for (int r = 0; r < kMaxRows; r += 4) {
    const auto tile = [&]<int N>(std::integral_constant<int, N>, int64_t f) {
      multiply_tile<N>(codes + f * groups * kGroup, scales + f * scales_of(groups), groups,
                       x.codes + r * kGroup, x.scales + r, out + r * stride + f, stride);
    };
    int64_t f = 0;
    for (; f + 3 <= rows; f += 3) tile(std::integral_constant<int, 3>(), f);
    for (; f < rows; ++f) tile(std::integral_constant<int, 1>(), f);
  }
}

}  // namespace

#define GEMLAX_UNPACK(name, F) unpack_of<F>(),
constinit const BatchProduct kBatchProductAvx512 = {
    .groups_per_scale = kGroupsPerScale,
    .unpack = {GEMLAX_FORMATS(GEMLAX_UNPACK)},
    .multiply = multiply,
};

}  // namespace gemlax

#include "target_end.h"

#endif  // __x86_64__
