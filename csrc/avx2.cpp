// Kernels for x86-64 with AVX2, FMA and F16C. Compiled for any x86-64, run only where they exist.
//
// Each format gives the codes of 32 weights as two vectors of 16-bit integers, the even weights and
// the odd ones, which `vpmaddwd` multiplies with those of the activations.
#if defined(__x86_64__)

#include <cstring>

#include "rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include <immintrin.h>

namespace gemlax {
namespace {

struct Codes {
  __m256i even, odd;
};

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline float sum(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

inline float half(const uint8_t* p) { return _cvtsh_ss(load16(p)); }

// Signed bytes to 16 bits.
inline Codes widen(__m256i bytes) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}

// Bytes in [0, 255], minus `offset`.
inline Codes widen_unsigned(__m256i bytes, int offset) {
  const __m256i less = _mm256_set1_epi16(short(offset));
  const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
  return {_mm256_sub_epi16(low, less), _mm256_sub_epi16(_mm256_srli_epi16(bytes, 8), less)};
}

// 16 bytes of two halves: the low halves, then the high ones.
inline __m256i halves(const uint8_t* p) {
  const __m128i both = load128(p);
  const __m256i apart = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);
  return _mm256_and_si256(apart, _mm256_set1_epi8(15));
}

// 32 bits to 32 bytes, each 255 or 0.
inline __m256i spread_bits(uint32_t bits) {
  const __m256i places = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101,
                                            0x0202020202020202, 0x0303030303030303);
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), places);
  const __m256i mask = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), mask);
}

// What a format of groups of 32 with one scale each needs.
template <class F>
struct Groups;

template <>
struct Groups<Int8> {
  static Codes codes(const uint8_t* block) { return widen(load(block)); }
  static float scale(const uint8_t*, const uint16_t* scales) { return from_bfloat16(*scales); }
};

template <>
struct Groups<Q8_0> {
  static Codes codes(const uint8_t* block) { return widen(load(block + 2)); }
  static float scale(const uint8_t* block, const uint16_t*) { return half(block); }
};

template <>
struct Groups<Q4_0> {
  static Codes codes(const uint8_t* block) { return widen_unsigned(halves(block + 2), 8); }
  static float scale(const uint8_t* block, const uint16_t*) { return half(block); }
};

template <>
struct Groups<Q5_0> {
  static Codes codes(const uint8_t* block) {
    uint32_t high;
    std::memcpy(&high, block + 2, 4);
    // Without its fifth bit a code is 16 less: as a signed byte, 0xF0 is -16.
    const __m256i less = _mm256_andnot_si256(spread_bits(high), _mm256_set1_epi8(char(0xF0)));
    return widen(_mm256_or_si256(halves(block + 6), less));
  }
  static float scale(const uint8_t* block, const uint16_t*) { return half(block); }
};

inline __m256i multiply(const Codes& w, const int16_t* x) {
  return _mm256_add_epi32(_mm256_madd_epi16(w.even, load(x)),
                          _mm256_madd_epi16(w.odd, load(x + 16)));
}

// Blocks are short of a cache line, or end inside one; the hardware's own look-ahead is too short for
// codes that are used as fast as they come (measured: a fifth to a third faster).
inline void fetch_ahead(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + 1024, _MM_HINT_T0);
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
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) out[r * stride + n] = x.scales[r] * sum(of[n][r]);
  }
};

// Each format: N rows of weights from `first` on, times R rows of activations.
template <class F, int R, int N>
inline void dot_groups(const Weights& w, int64_t first, const Activations& x, float* out,
                       int64_t stride) {
  Sums<N, R> sums;
  const uint8_t* rows = w.codes + first * w.row_bytes;
  const uint16_t* scales = F::kGroup ? w.scales + first * w.groups : nullptr;
  const int16_t* own = x.codes;
  for (int64_t g = 0; g < x.width / kGroup; ++g, own += R * kGroup)
    for (int n = 0; n < N; ++n) {
      const uint8_t* block = rows + n * w.row_bytes + g * F::kBytes;
      fetch_ahead(block);
      const Codes codes = Groups<F>::codes(block);
      const __m256 scale = _mm256_set1_ps(Groups<F>::scale(block, scales + n * w.groups + g));
      for (int r = 0; r < R; ++r)
        sums.of[n][r] = _mm256_fmadd_ps(
            scale, _mm256_cvtepi32_ps(multiply(codes, own + r * kGroup)), sums.of[n][r]);
    }
  sums.store(x, out, stride);
}

// A group of int4 with R rows of activations.
template <int R>
inline void add_group(const uint8_t* block, __m256 scale, const int16_t* x, __m256 (&sums)[R]) {
  fetch_ahead(block);
  const Codes codes = widen_unsigned(halves(block), 0);
  for (int r = 0; r < R; ++r)
    sums[r] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(multiply(codes, x + r * kGroup)), sums[r]);
}

// 8 or 4 groups: a zero point takes its share of the sum of the activations away. `totals` has
// `step` sums of each row.
template <int R, int G>
inline void add_groups(const uint8_t* block, const uint16_t* entries, const int16_t* x,
                      const float* totals, int64_t step, __m256 (&sums)[R]) {
  const __m128i all = G == 8 ? load128(entries)
                             : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(entries));
  const __m128i halves =
      _mm_slli_epi16(_mm_and_si128(all, _mm_set1_epi16(Int4::kScaleMask)), Int4::kScaleShift);
  const __m256i eighths = _mm256_cvtepu16_epi32(_mm_srli_epi16(all, Int4::kScaleBits));
  const __m256 scales = _mm256_cvtph_ps(halves);
  const __m256 zeros = _mm256_mul_ps(_mm256_cvtepi32_ps(eighths), _mm256_set1_ps(Int4::kZeroStep));
  const __m256 worth = _mm256_mul_ps(scales, zeros);
  alignas(32) float scale[8];
  _mm256_store_ps(scale, scales);
  for (int r = 0; r < R; ++r) {
    const float* own = totals + r * step;
    const __m256 held = G == 8 ? _mm256_loadu_ps(own) : _mm256_zextps128_ps256(_mm_loadu_ps(own));
    sums[r] = _mm256_fnmadd_ps(worth, held, sums[r]);
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g)
    add_group<R>(block + g * Int4::kBytes, _mm256_broadcast_ss(scale + g), x + g * R * kGroup, sums);
}

inline __m256 first_lane(float value) { return _mm256_zextps128_ps256(_mm_set_ss(value)); }

template <class F, int R, int N>
inline void dot_int4(const Weights& w, int64_t first, const Activations& x, float* out,
                     int64_t stride) {
  static_assert(N == 1);
  Sums<1, R> sums;
  const int groups = x.width / kGroup;
  const uint8_t* blocks = w.codes + first * w.row_bytes;
  const uint16_t* entries = w.scales + first * w.groups;
  int g = 0;
  for (; g + 8 <= groups; g += 8)
    add_groups<R, 8>(blocks + g * F::kBytes, entries + g, x.codes + g * R * kGroup, x.sums + g,
                     x.groups(), sums.of[0]);
  if (g + 4 <= groups) {
    add_groups<R, 4>(blocks + g * F::kBytes, entries + g, x.codes + g * R * kGroup, x.sums + g,
                     x.groups(), sums.of[0]);
    g += 4;
  }
  for (; g < groups; ++g) {
    const float scale =
        _cvtsh_ss(uint16_t((entries[g] & Int4::kScaleMask) << Int4::kScaleShift));
    const __m256 worth = first_lane(scale * Int4::zero(entries[g]));
    for (int r = 0; r < R; ++r)
      sums.of[0][r] = _mm256_fnmadd_ps(worth, first_lane(x.sums[r * x.groups() + g]), sums.of[0][r]);
    add_group<R>(blocks + g * F::kBytes, _mm256_set1_ps(scale), x.codes + g * R * kGroup,
                 sums.of[0]);
  }
  sums.store(x, out, stride);
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

inline __m256 bytes_to_floats(uint64_t bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))));
}

template <class F, int R, int N>
inline void dot_q4_k(const Weights& w, int64_t first, const Activations& x, float* out,
                     int64_t stride) {
  Sums<N, R> sums;
  const __m256i low = _mm256_set1_epi16(15);
  const int16_t* own = x.codes;
  for (int start = 0; start < x.width; start += 256, own += R * 256)
    for (int n = 0; n < N; ++n) {
      const uint8_t* block = w.codes + (first + n) * w.row_bytes + start / 256 * F::kBytes;
      uint64_t packed_scales, packed_minima;
      unpack_scales(block + 4, &packed_scales, &packed_minima);
      alignas(32) float scale[8];
      _mm256_store_ps(scale,
                      _mm256_mul_ps(_mm256_set1_ps(half(block)), bytes_to_floats(packed_scales)));
      const __m256 minima =
          _mm256_mul_ps(_mm256_set1_ps(half(block + 2)), bytes_to_floats(packed_minima));
      for (int r = 0; r < R; ++r) {
        const float* totals = x.sums + r * x.groups() + start / kGroup;
        sums.of[n][r] = _mm256_fnmadd_ps(minima, _mm256_loadu_ps(totals), sums.of[n][r]);
      }
      for (int pair = 0; pair < 4; ++pair) {
        fetch_ahead(block + 32 * pair);
        const __m256i bytes = load(block + 16 + 32 * pair);
        const __m256i odd = _mm256_srli_epi16(bytes, 8);
        const Codes lower = {_mm256_and_si256(bytes, low), _mm256_and_si256(odd, low)};
        const Codes upper = {_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low),
                             _mm256_srli_epi16(bytes, 12)};
        const __m256 scale1 = _mm256_broadcast_ss(scale + 2 * pair);
        const __m256 scale2 = _mm256_broadcast_ss(scale + 2 * pair + 1);
        for (int r = 0; r < R; ++r) {
          const int16_t* codes = own + (2 * pair * R + r) * kGroup;
          const __m256 one = _mm256_cvtepi32_ps(multiply(lower, codes));
          const __m256 two = _mm256_cvtepi32_ps(multiply(upper, codes + R * kGroup));
          sums.of[n][r] = _mm256_fmadd_ps(scale1, one, sums.of[n][r]);
          sums.of[n][r] = _mm256_fmadd_ps(scale2, two, sums.of[n][r]);
        }
      }
    }
  sums.store(x, out, stride);
}

template <class F, int R, int N>
inline void dot_q6_k(const Weights& w, int64_t first, const Activations& x, float* out,
                     int64_t stride) {
  Sums<N, R> sums;
  const __m256i low = _mm256_set1_epi8(15), pair = _mm256_set1_epi8(3 << 4);
  const int16_t* own = x.codes;
  for (int start = 0; start < x.width; start += 256, own += R * 256)
    for (int n = 0; n < N; ++n) {
      const uint8_t* block = w.codes + (first + n) * w.row_bytes + start / 256 * F::kBytes;
      const __m128 d = _mm_set1_ps(half(block + 208));
      for (int g = 0; g < 8; ++g) {
        const int part = g / 4, quarter = g % 4;
        fetch_ahead(block + 26 * g);
        __m256i codes = load(block + 64 * part + 32 * (quarter % 2));
        codes = _mm256_and_si256(quarter < 2 ? codes : _mm256_srli_epi16(codes, 4), low);
        __m256i high = load(block + 128 + 32 * part);  // bits 2 * quarter and up, to bits 4 and 5
        high = quarter < 2 ? _mm256_slli_epi16(high, 4 - 2 * quarter)
                           : _mm256_srli_epi16(high, 2 * quarter - 4);
        codes = _mm256_or_si256(codes, _mm256_and_si256(high, pair));
        const Codes both = widen(_mm256_sub_epi8(codes, _mm256_set1_epi8(32)));
        // The first 8 of the even weights, and of the odd ones, are the first 16 weights.
        const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192 + 2 * g);
        const __m256 scale = _mm256_set_m128(_mm_mul_ps(d, _mm_set1_ps(float(scales[1]))),
                                             _mm_mul_ps(d, _mm_set1_ps(float(scales[0]))));
        for (int r = 0; r < R; ++r) {
          const __m256i product = multiply(both, own + (g * R + r) * kGroup);
          sums.of[n][r] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(product), sums.of[n][r]);
        }
      }
    }
  sums.store(x, out, stride);
}

inline __m256 eight(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 eight(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
}
inline float one(const float* p) { return *p; }
inline float one(const uint16_t* p) { return from_bfloat16(*p); }

template <class T, int R, int N>
inline void dot_plain(const Weights& w, int64_t first, const Activations& x, float* out,
                      int64_t stride) {
  Sums<N, R> sums;
  const uint8_t* rows = w.codes + first * w.row_bytes;
  const float* own = x.floats;
  for (int i = 0; i + kGroup <= x.width; i += kGroup, own += R * kGroup)
    for (int n = 0; n < N; ++n) {
      const T* row = reinterpret_cast<const T*>(rows + n * w.row_bytes) + i;
      for (int j = 0; j < kGroup; j += 8) {
        const __m256 weights = eight(row + j);
        for (int r = 0; r < R; ++r)
          sums.of[n][r] =
              _mm256_fmadd_ps(weights, _mm256_loadu_ps(own + r * kGroup + j), sums.of[n][r]);
      }
    }
  const int whole = x.width / kGroup * kGroup;
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      const T* row = reinterpret_cast<const T*>(rows + n * w.row_bytes);
      float total = sum(sums.of[n][r]);
      for (int i = whole; i < x.width; ++i) total += one(row + i) * own[r * kGroup + i - whole];
      out[r * stride + n] = total;
    }
}

// All rows, some at a time: several streams of memory help the wide formats, and hurt the others.
#define OVER_ROWS(NAME, WHAT, MOST)                                                         \
  template <class F, int R>                                                                 \
  void NAME(const Weights& w, int64_t first, int64_t last, const Activations& x, float* out, \
            int64_t stride) {                                                               \
    constexpr int kRows = R <= 2 ? MOST : 1;                                                \
    for (; first + kRows <= last; first += kRows)                                           \
      WHAT<F, R, kRows>(w, first, x, out + first, stride);                                  \
    for (; first < last; ++first) WHAT<F, R, 1>(w, first, x, out + first, stride);          \
  }
OVER_ROWS(groups, dot_groups, 1)
OVER_ROWS(int4, dot_int4, 1)
OVER_ROWS(q4_k, dot_q4_k, 1)
OVER_ROWS(q6_k, dot_q6_k, 1)
OVER_ROWS(plain, dot_plain, 2)

template <class T>
float dot_vectors(const float* a, const T* b, int n) {
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    sums[0] = _mm256_fmadd_ps(eight(a + i), eight(b + i), sums[0]);
    sums[1] = _mm256_fmadd_ps(eight(a + i + 8), eight(b + i + 8), sums[1]);
  }
  float total = sum(_mm256_add_ps(sums[0], sums[1]));
  for (; i < n; ++i) total += a[i] * one(b + i);
  return total;
}

template <class T>
void add_vector(float* out, const T* v, float weight, int n) {
  const __m256 factor = _mm256_set1_ps(weight);
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_fmadd_ps(factor, eight(v + i), eight(out + i)));
  for (; i < n; ++i) out[i] += weight * one(v + i);
}

#define ROWS(NAME, F) {NAME<F, 1>, NAME<F, 2>, NAME<F, 4>, NAME<F, 8>}

}  // namespace

const Kernels kAvx2 = {
    "avx2",
    false,
    nullptr,
    nullptr,
    encode_plainly,
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

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
