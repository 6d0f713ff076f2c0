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

inline __m512 to_floats(__m256i words) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(words));
}

inline __m512 both(__m256 v) { return _mm512_insertf32x8(_mm512_castps256_ps512(v), v, 1); }

inline Floats scaled(const Codes& codes, __m512 scale) {
  return {_mm512_mul_ps(to_floats(codes.even), scale), _mm512_mul_ps(to_floats(codes.odd), scale)};
}

// The weights of group `g` of a row.
template <class F>
inline Floats group_of(const uint8_t* row, const uint16_t* scales, int g) {
  const uint8_t* block = row + int64_t{g} * F::kBytes;
  const Codes codes = less(Groups<F>::codes(block), Groups<F>::kOffset);
  return scaled(codes, both(Groups<F>::scale(block, scales + g)));
}

template <>
inline Floats group_of<Int4>(const uint8_t* row, const uint16_t* entries, int g) {
  const Codes codes = nibbles(row + int64_t{g} * Int4::kBytes);
  const __m512 zero = _mm512_set1_ps(Int4::zero(entries[g]));
  const __m512 scale = _mm512_set1_ps(Int4::scale(entries[g]));
  return {_mm512_mul_ps(_mm512_sub_ps(to_floats(codes.even), zero), scale),
          _mm512_mul_ps(_mm512_sub_ps(to_floats(codes.odd), zero), scale)};
}

template <>
inline Floats group_of<Q4_K>(const uint8_t* row, const uint16_t*, int g) {
  const uint8_t* block = row + int64_t{g / 8} * Q4_K::kBytes;
  int scale, minimum;
  Q4_K::scale_and_minimum(block + 4, g % 8, &scale, &minimum);
  __m256i bytes = load(block + 16 + 32 * (g % 8 / 2));
  if (g % 2) bytes = _mm256_srli_epi16(bytes, 4);
  const Codes codes = widen_unsigned(_mm256_and_si256(bytes, _mm256_set1_epi8(15)));
  const float d = half_at(block) * float(scale), least = half_at(block + 2) * float(minimum);
  const Floats all = scaled(codes, _mm512_set1_ps(d));
  return {_mm512_sub_ps(all.even, _mm512_set1_ps(least)),
          _mm512_sub_ps(all.odd, _mm512_set1_ps(least))};
}

template <>
inline Floats group_of<Q6_K>(const uint8_t* row, const uint16_t*, int g) {
  const uint8_t* block = row + int64_t{g / 8} * Q6_K::kBytes;
  const auto* scales = reinterpret_cast<const int8_t*>(block + 192 + g % 8 * 2);
  const float d = half_at(block + 208);
  const __m256 first = _mm256_set1_ps(d * float(scales[0]));
  const __m256 second = _mm256_set1_ps(d * float(scales[1]));
  const __m512 scale = _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
  return scaled(less(q6_k_codes(block, g % 8), 32), scale);
}

// Weights that share a scale here. Eight products of a lane add up to 8 * 8191 * 32767 < 2^31.
constexpr int kSpan = 4;  // groups
constexpr float kMost = 8191;

template <class F>
void unpack(const Weights& w, int64_t first, int64_t last, int width, int16_t* codes,
            float* spans) {
  const int groups = width / kGroup;
  for (int64_t f = first; f < last; ++f) {
    const uint8_t* row = w.codes + f * w.row_bytes;
    const uint16_t* scales = F::kGroup ? w.scales + f * w.groups : nullptr;
    for (int start = 0; start < groups; start += kSpan) {
      const int count = groups - start < kSpan ? groups - start : kSpan;
      Floats held[kSpan];
      __m512 peaks = _mm512_setzero_ps();
      for (int i = 0; i < count; ++i) {
        held[i] = group_of<F>(row, scales, start + i);
        peaks = _mm512_max_ps(peaks, _mm512_abs_ps(held[i].even));
        peaks = _mm512_max_ps(peaks, _mm512_abs_ps(held[i].odd));
      }
      const float most = _mm512_reduce_max_ps(peaks);
      const __m512 inverse = _mm512_set1_ps(most < 1e-30f ? 0.0f : kMost / most);
      *spans++ = most / kMost;
      for (int i = 0; i < count; ++i, codes += kGroup) {
        const auto words = [&](__m512 v) {
          return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)));
        };
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), words(held[i].even));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 16), words(held[i].odd));
      }
    }
  }
}

// The sums of four vectors.
inline __m128 sum_each(const __m512 (&v)[4]) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d low = _mm512_castps_pd(ab), high = _mm512_castps_pd(cd);
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// N rows of weights times 4 of the kMaxRows rows of activations.
template <int N>
inline void tile(const int16_t* codes, const float* spans, int groups, const int16_t* x,
                 const float* scales, float* out, int64_t stride) {
  constexpr int R = 4;
  const int row_spans = (groups + kSpan - 1) / kSpan;
  __m512 sums[N][R];
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) sums[n][r] = _mm512_setzero_ps();
  const auto add = [&](int start, int count, int span) {
    __m512i totals[N][R];
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) totals[n][r] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      __m512i weights[N];
      for (int n = 0; n < N; ++n) {
        weights[n] = _mm512_loadu_si512(codes + (int64_t{n} * groups + start + i) * kGroup);
        asm("" : "+v"(weights[n]));
      }
      for (int r = 0; r < R; ++r) {
        __m512i own = _mm512_loadu_si512(x + ((start + i) * kMaxRows + r) * kGroup);
        asm("" : "+v"(own));  // one load for N products, which the compiler would repeat
        for (int n = 0; n < N; ++n)
          totals[n][r] = _mm512_dpwssd_epi32(totals[n][r], weights[n], own);
      }
    }
    for (int n = 0; n < N; ++n) {
      const __m512 scale = _mm512_set1_ps(spans[n * row_spans + span]);
      for (int r = 0; r < R; ++r)
        sums[n][r] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(totals[n][r]), sums[n][r]);
    }
  };
  int start = 0, span = 0;
  for (; start + kSpan <= groups; start += kSpan, ++span) add(start, kSpan, span);
  if (start < groups) add(start, groups - start, span);
  for (int n = 0; n < N; ++n) {
    alignas(16) float four[4];
    _mm_store_ps(four, _mm_mul_ps(sum_each(sums[n]), _mm_loadu_ps(scales)));
    for (int r = 0; r < 4; ++r) out[r * stride + n] = four[r];
  }
}

// The activations of half the rows stay in the first cache while weights pass by.
void dot(const int16_t* codes, const float* spans, int64_t rows, const Activations& x, float* out,
         int64_t stride) {
  const int groups = int(x.groups()), row_spans = (groups + kSpan - 1) / kSpan;
  for (int first = 0; first < kMaxRows; first += 4) {
    const int16_t* here = x.codes + first * kGroup;
    float* to = out + first * stride;
    int64_t f = 0;
    for (; f + 3 <= rows; f += 3)
      tile<3>(codes + f * groups * kGroup, spans + f * row_spans, groups, here, x.scales + first,
              to + f, stride);
    for (; f < rows; ++f)
      tile<1>(codes + f * groups * kGroup, spans + f * row_spans, groups, here, x.scales + first,
              to + f, stride);
  }
}

}  // namespace

const Many kManyAvx512 = {
    {nullptr, nullptr, unpack<Int8>, unpack<Int4>, unpack<Q8_0>, unpack<Q4_0>, unpack<Q5_0>,
     unpack<Q4_K>, unpack<Q6_K>},
    kSpan,
    dot,
};

}  // namespace gemlax

#include "avx512_end.h"

#endif  // __x86_64__
