// What the kernels for AVX2 and AVX-512 share: vectors of 256 bits.
//
// Each format gives the codes of 32 weights as two vectors of 16-bit integers, the even weights and
// the odd ones, which are multiplied with those of the activations.
// Included where the instructions are chosen already, behind kFetchDistance and kSumsInFours.
#pragma once

namespace gemlax {
namespace {

struct Codes {
  __m256i even, odd;
};

// What the file of each instruction set defines.
template <class F>
Codes signed_codes(const uint8_t* block);            // those of 32 weights
Codes nibbles(const uint8_t* p);                     // 16 bytes: low halves, then high ones
__m256i products(const Codes& w, const Codes& x);    // eight sums of four products
void load_once(Codes& x);                            // keep in registers
constexpr int rows_at_once(bool plain, int R);       // rows of weights that are taken together
template <class F, int R, int N>                     // N rows of weights times R of activations
void dot_rows(const Weights& w, const Activations& x, float* out, int64_t stride);

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Codes load_group(const int16_t* x) { return {load(x), load(x + 16)}; }

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
}

// Blocks are short of a cache line, or end inside one; the hardware's own look-ahead is too short for
// codes that are used as fast as they come (measured: a fifth to a third faster).
inline void fetch_ahead(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + kFetchDistance, _MM_HINT_T0);
}

inline float sum(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

// The sums of four vectors.
inline __m128 sums_of_four(const __m256* v) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
  const __m256d low = _mm256_castps_pd(ab), high = _mm256_castps_pd(cd);
  const __m256 all = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(low, high)),
                                   _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

inline __m256 float16_scale(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_set1_epi16(int16_t(load16(p))));
}

inline __m256 bfloat16_scale(const uint16_t* p) {
  const __m256i high = _mm256_set1_epi32(int(0xffff0000));
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi16(int16_t(*p)), high));
}

// Signed bytes to 16 bits.
inline Codes widen(__m256i bytes) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}

inline Codes widen_unsigned(__m256i bytes) {
  return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}

inline Codes subtract(const Codes& codes, int offset) {
  const __m256i offsets = _mm256_set1_epi16(int16_t(offset));
  return {_mm256_sub_epi16(codes.even, offsets), _mm256_sub_epi16(codes.odd, offsets)};
}

// The scale of a group of 32: of its own, or at the head of its block.
template <class F>
inline __m256 group_scale(const uint8_t* block, const uint16_t* scale) {
  return F::kGroup ? bfloat16_scale(scale) : float16_scale(block);
}

// What N rows of weights give with R rows of activations, before the lanes are added up.
template <int N, int R>
struct Sums {
  __m256 lanes[N][R];
  Sums() {
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) lanes[n][r] = _mm256_setzero_ps();
  }
  void store(const Activations& x, float* out, int64_t stride) const {
    for (int n = 0; n < N; ++n) {
      int r = 0;
      for (; kSumsInFours && r + 4 <= R; r += 4) {
        alignas(16) float four[4];
        _mm_store_ps(four, _mm_mul_ps(_mm_loadu_ps(x.scales + r), sums_of_four(lanes[n] + r)));
        for (int i = 0; i < 4; ++i) out[(r + i) * stride + n] = four[i];
      }
      for (; r < R; ++r) out[r * stride + n] = x.scales[r] * sum(lanes[n][r]);
    }
  }
};

// N rows of weights with several rows of activations, which are loaded once for them.
template <class F, int R, int N>
inline void dot_groups(const Weights& w, const Activations& x, float* out, int64_t stride) {
  Sums<N, R> sums;
  const int16_t* group = x.codes;
  for (int g = 0; g < x.width / kGroup; ++g, group += R * kGroup) {
    Codes codes[N];
    __m256 scale[N];
    for (int n = 0; n < N; ++n) {
      const uint8_t* block = w.codes + n * w.row_bytes + g * F::kBytes;
      fetch_ahead(block);
      codes[n] = signed_codes<F>(block);
      scale[n] = group_scale<F>(block, w.scales + n * w.groups + g);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Codes activations = load_group(group + r * kGroup);
      load_once(activations);
      for (int n = 0; n < N; ++n)
        sums.lanes[n][r] = _mm256_fmadd_ps(
            scale[n], _mm256_cvtepi32_ps(products(codes[n], activations)), sums.lanes[n][r]);
    }
  }
  sums.store(x, out, stride);
}

// The first G (8, 4 or 1) of numbers, and zeros.
template <int G>
inline __m128i first_entries(const uint16_t* p) {
  if constexpr (G == 8) return load128(p);
  if constexpr (G == 4) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_cvtsi32_si128(*p);
}
template <int G>
inline __m256 first_floats(const float* p) {
  if constexpr (G == 8) return _mm256_loadu_ps(p);
  return _mm256_zextps128_ps256(G == 4 ? _mm_loadu_ps(p) : _mm_load_ss(p));
}

// G groups of N rows of int4 from `start` on, times R rows of activations, into S sums each. A zero
// point takes its share of the sum of the activations away.
template <int G, int R, int N, int S>
inline void add_int4(const Weights& w, int start, const Activations& x, __m256 (&sums)[S][N][R]) {
  alignas(32) float scale[N][8];
  for (int n = 0; n < N; ++n) {
    const __m128i entries = first_entries<G>(w.scales + n * w.groups + start);
    const __m128i halves = _mm_slli_epi16(_mm_and_si128(entries, _mm_set1_epi16(Int4::kScaleMask)),
                                          Int4::kScaleShift);
    const __m256i eighths = _mm256_cvtepu16_epi32(_mm_srli_epi16(entries, Int4::kScaleBits));
    const __m256 scales = _mm256_cvtph_ps(halves);
    const __m256 steps = _mm256_mul_ps(scales, _mm256_set1_ps(Int4::kZeroStep));
    const __m256 zeros = _mm256_mul_ps(steps, _mm256_cvtepi32_ps(eighths));
    _mm256_store_ps(scale[n], scales);
    for (int r = 0; r < R; ++r)
      sums[0][n][r] = _mm256_fnmadd_ps(
          zeros, first_floats<G>(x.sums + r * x.groups() + start), sums[0][n][r]);
  }
  const uint8_t* blocks = w.codes + start * Int4::kBytes;
  const int16_t* group = x.codes + int64_t{start} * R * kGroup;
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g, blocks += Int4::kBytes, group += R * kGroup) {
    Codes codes[N];
    for (int n = 0; n < N; ++n) {
      fetch_ahead(blocks + n * w.row_bytes);
      codes[n] = nibbles(blocks + n * w.row_bytes);
    }
    for (int r = 0; r < R; ++r) {
      Codes activations = load_group(group + r * kGroup);
      load_once(activations);
      for (int n = 0; n < N; ++n)
        sums[g % S][n][r] = _mm256_fmadd_ps(
            _mm256_broadcast_ss(scale[n] + g),
            _mm256_cvtepi32_ps(products(codes[n], activations)), sums[g % S][n][r]);
    }
  }
}

template <int R, int N, int S>
inline void dot_int4(const Weights& w, const Activations& x, float* out, int64_t stride) {
  __m256 sums[S][N][R];
  for (int s = 0; s < S; ++s)
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r) sums[s][n][r] = _mm256_setzero_ps();
  const int groups = x.width / kGroup;
  int start = 0;
  for (; start + 8 <= groups; start += 8) add_int4<8>(w, start, x, sums);
  for (; start + 4 <= groups; start += 4) add_int4<4>(w, start, x, sums);
  for (; start < groups; ++start) add_int4<1>(w, start, x, sums);
  Sums<N, R> total;
  for (int s = 0; s < S; ++s)
    for (int n = 0; n < N; ++n)
      for (int r = 0; r < R; ++r)
        total.lanes[n][r] = _mm256_add_ps(total.lanes[n][r], sums[s][n][r]);
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

inline __m256 bytes_to_floats(uint64_t bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))));
}

// Two groups of a Q4_K block, of the lower and the upper halves of 32 bytes.
struct GroupPair {
  Codes lower, upper;
};

inline GroupPair load_pair(const uint8_t* p) {
  const __m256i bytes = load(p), low = _mm256_set1_epi16(15), odd = _mm256_srli_epi16(bytes, 8);
  return {{_mm256_and_si256(bytes, low), _mm256_and_si256(odd, low)},
          {_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), _mm256_srli_epi16(bytes, 12)}};
}

// A row of Q4_K, with S (1 or 4) sums that do not wait for one another: each group's products are
// scaled as floats.
template <int R, int S>
inline void dot_q4_k_row(const Weights& w, const Activations& x, float* out, int64_t stride) {
  __m256 sums[R][S];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < S; ++i) sums[r][i] = _mm256_setzero_ps();
  const int16_t* codes = x.codes;
  for (int start = 0; start < x.width; start += 256, codes += R * 256) {
    const uint8_t* block = w.codes + start / 256 * Q4_K::kBytes;
    uint64_t packed_scales, packed_minima;
    unpack_scales(block + 4, &packed_scales, &packed_minima);
    alignas(32) float scale[8];
    _mm256_store_ps(scale, _mm256_mul_ps(float16_scale(block), bytes_to_floats(packed_scales)));
    const __m256 minima =
        _mm256_mul_ps(float16_scale(block + 2), bytes_to_floats(packed_minima));
    for (int r = 0; r < R; ++r)
      sums[r][0] = _mm256_fnmadd_ps(
          minima, _mm256_loadu_ps(x.sums + r * x.groups() + start / kGroup), sums[r][0]);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      fetch_ahead(block + 36 * pair);
      const GroupPair groups = load_pair(block + 16 + 32 * pair);
      for (int r = 0; r < R; ++r) {
        const int16_t* group = codes + (2 * pair * R + r) * kGroup;
        const __m256i lower = products(groups.lower, load_group(group));
        const __m256i upper = products(groups.upper, load_group(group + R * kGroup));
        __m256 &first = sums[r][2 * pair % S], &second = sums[r][(2 * pair + 1) % S];
        first = _mm256_fmadd_ps(_mm256_broadcast_ss(scale + 2 * pair),
                                _mm256_cvtepi32_ps(lower), first);
        second = _mm256_fmadd_ps(_mm256_broadcast_ss(scale + 2 * pair + 1),
                                 _mm256_cvtepi32_ps(upper), second);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    __m256 total = sums[r][0];
    if constexpr (S == 4)
      total = _mm256_add_ps(_mm256_add_ps(total, sums[r][1]), _mm256_add_ps(sums[r][2], sums[r][3]));
    out[r * stride] = x.scales[r] * sum(total);
  }
}

// Group `g` of 8 of a Q6_K block: codes in [0, 63].
inline __m256i q6_k_bytes(const uint8_t* block, int g) {
  const int half = g / 4, quarter = g % 4;
  const __m256i four = _mm256_set1_epi8(15), pair = _mm256_set1_epi8(3 << 4);
  __m256i lower = load(block + 64 * half + 32 * (quarter % 2));
  if (quarter >= 2) lower = _mm256_srli_epi16(lower, 4);
  __m256i upper = load(block + 128 + 32 * half);  // bits 2 * quarter and up, to bits 4 and 5
  upper = quarter < 2 ? _mm256_slli_epi16(upper, 4 - 2 * quarter)
                      : _mm256_srli_epi16(upper, 2 * quarter - 4);
  return _mm256_or_si256(_mm256_and_si256(lower, four), _mm256_and_si256(upper, pair));
}

// All rows, some at a time: several streams of memory help the wide formats, and hurt the others.
template <class F, int R>
void dot(const Weights& w, int64_t first, int64_t last, const Activations& x, float* out,
         int64_t stride) {
  constexpr int kRows = rows_at_once(F::kBlock == 1, R);
  for (; first + kRows <= last; first += kRows)
    dot_rows<F, R, kRows>(w.from(first), x, out + first, stride);
  for (; first < last; ++first) dot_rows<F, R, 1>(w.from(first), x, out + first, stride);
}

template <class T>
float dot_vectors(const float* a, const T* b, int n) {
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    sums[0] = _mm256_fmadd_ps(load8(a + i), load8(b + i), sums[0]);
    sums[1] = _mm256_fmadd_ps(load8(a + i + 8), load8(b + i + 8), sums[1]);
  }
  float total = sum(_mm256_add_ps(sums[0], sums[1]));
  for (; i < n; ++i) total += a[i] * to_float(b[i]);
  return total;
}

template <class T>
void add_vector(float* out, const T* v, float weight, int n) {
  const __m256 factor = _mm256_set1_ps(weight);
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_fmadd_ps(factor, load8(v + i), load8(out + i)));
  for (; i < n; ++i) out[i] += weight * to_float(v[i]);
}

}  // namespace
}  // namespace gemlax
