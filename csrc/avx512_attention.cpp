// Attention of many queries, for AVX-512: keys by blocks, products as in a blocked matrix product.
#if defined(__x86_64__)

#include <vector>

// The linker keeps one copy of these members for all files: it must be for any CPU, so they are made
// before these instructions are asked for. Without this a CPU that lacks them may get theirs.
template class std::vector<float>;

#include "avx512.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "attention.h"

namespace gemlax {
namespace {

constexpr int kKeys = 64;  // keys at a time: four vectors
constexpr int kRowsAtOnce = 6;

inline __m512 floats_at(const float* p) { return _mm512_loadu_ps(p); }

// c[m, 64] (+)= a[m, depth] b[depth, 64], for M values of m.
template <int M>
inline void tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc, bool add) {
  __m512 sums[M][4];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < 4; ++j)
      sums[m][j] = add ? floats_at(c + m * ldc + 16 * j) : _mm512_setzero_ps();
  for (int64_t i = 0; i < depth; ++i) {
    __m512 row[4];
    for (int j = 0; j < 4; ++j) row[j] = floats_at(b + i * ldb + 16 * j);
    for (int m = 0; m < M; ++m) {
      const __m512 own = _mm512_set1_ps(a[m * lda + i]);
      for (int j = 0; j < 4; ++j) sums[m][j] = _mm512_fmadd_ps(own, row[j], sums[m][j]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(c + m * ldc + 16 * j, sums[m][j]);
}

void product(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
             float* c, int64_t ldc, bool add) {
  int64_t m = 0;
  for (; m + kRowsAtOnce <= rows; m += kRowsAtOnce)
    tile<kRowsAtOnce>(depth, a + m * lda, lda, b, ldb, c + m * ldc, ldc, add);
  for (; m < rows; ++m) tile<1>(depth, a + m * lda, lda, b, ldb, c + m * ldc, ldc, add);
}

// exp(x) for x <= 0, to 2e-7 of its size; 0 below -87. A NaN stays one.
inline __m512 exp_below_zero(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  // Coefficients: Cephes, expf.c.
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  const __mmask16 lost = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), lost, _mm512_setzero_ps());
}

inline float one(float x) { return x; }
inline float one(uint16_t bits) { return from_bfloat16(bits); }

// Which of 64 slots a query at `here` attends to.
inline void see(const ManyQueries& s, const int32_t* positions, int32_t here,
                __mmask16 (&seen)[4]) {
  for (int j = 0; j < 4; ++j) {
    const __m512i at = _mm512_loadu_si512(positions + 16 * j);
    seen[j] = _mm512_cmpgt_epi32_mask(at, _mm512_set1_epi32(-1)) &
              _mm512_cmple_epi32_mask(at, _mm512_set1_epi32(here));
    if (s.window) seen[j] &= _mm512_cmpgt_epi32_mask(at, _mm512_set1_epi32(here - s.window));
  }
}

// Scratch of one thread.
struct Room {
  std::vector<float> queries, keys, values, weights, out, peaks, totals;
};

// Logits [64] of one query to weights, with what it has seen before shrunk to the new peak.
inline void weigh(float* logits, __mmask16 const (&seen)[4], float scale, float* peak, float* total,
                  float* out, int64_t size) {
  const __m512 low = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 scaled[4], most = low, nan = _mm512_setzero_ps();
  for (int j = 0; j < 4; ++j) {
    const __m512 all = _mm512_mul_ps(floats_at(logits + 16 * j), _mm512_set1_ps(scale));
    scaled[j] = _mm512_mask_mov_ps(low, seen[j], all);
    most = _mm512_max_ps(most, scaled[j]);
    nan = _mm512_mask_add_ps(nan, seen[j], nan, _mm512_sub_ps(all, all));
  }
  const float fresh = std::max(*peak, _mm512_reduce_max_ps(most));
  __m512 sum = nan;  // 0, or NaN where a logit is not finite
  for (int j = 0; j < 4; ++j) {
    const __m512 weight =
        _mm512_maskz_mov_ps(seen[j], exp_below_zero(_mm512_sub_ps(scaled[j], _mm512_set1_ps(fresh))));
    _mm512_storeu_ps(logits + 16 * j, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  const float shrink = *total == 0 ? 0.0f : std::exp(*peak - fresh);
  *total = *total * shrink + _mm512_reduce_add_ps(sum);
  *peak = fresh;
  if (shrink == 1.0f) return;
  const __m512 factor = _mm512_set1_ps(shrink);
  for (int64_t h = 0; h < size; h += 16)
    _mm512_storeu_ps(out + h, _mm512_mul_ps(floats_at(out + h), factor));
}

template <class T>
void attend(const ManyQueries& s, const T* k, const T* v, float* result) {
  thread_local Room room;
  const int64_t rows = s.count * s.groups, wide = (s.size + 63) / 64 * 64;
  room.queries.resize(rows * s.size);
  room.keys.resize(s.size * kKeys);
  room.values.assign(kKeys * wide, 0.0f);
  room.weights.resize(rows * kKeys);
  room.out.assign(rows * wide, 0.0f);
  room.peaks.assign(rows, -std::numeric_limits<float>::infinity());
  room.totals.assign(rows, 0.0f);
  const std::vector<T> empty(s.size, T{0});
  int32_t first = std::numeric_limits<int32_t>::max(), last = -1;
  for (int64_t t = 0; t < s.count; ++t) {
    if (s.positions[t] >= 0) first = std::min(first, s.positions[t]);
    last = std::max(last, s.positions[t]);
    for (int64_t g = 0; g < s.groups; ++g)
      std::copy_n(s.q + (t * s.heads + g) * s.size, s.size,
                  room.queries.data() + (t * s.groups + g) * s.size);
  }
  for (int64_t start = 0; start < s.slots; start += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, s.slots - start);
    int32_t at[kKeys];
    std::fill_n(at, kKeys, -1);
    std::copy_n(s.at + start, count, at);
    const bool any = std::any_of(at, at + kKeys, [&](int32_t p) {
      return p >= 0 && p <= last && (s.window == 0 || p > first - s.window);
    });
    if (!any) continue;
    const T* held[kKeys];  // an empty slot counts as zeros
    for (int64_t i = 0; i < kKeys; ++i)
      held[i] = at[i] >= 0 ? k + (start + i) * s.stride : empty.data();
    for (int64_t h = 0; h < s.size; ++h)
      for (int64_t i = 0; i < kKeys; ++i) room.keys[h * kKeys + i] = one(held[i][h]);
    for (int64_t i = 0; i < kKeys; ++i) {
      const T* value = at[i] >= 0 ? v + (start + i) * s.stride : empty.data();
      for (int64_t h = 0; h < s.size; ++h) room.values[i * wide + h] = one(value[h]);
    }
    product(rows, s.size, room.queries.data(), s.size, room.keys.data(), kKeys,
            room.weights.data(), kKeys, false);
    for (int64_t t = 0; t < s.count; ++t) {
      __mmask16 seen[4];
      see(s, at, s.positions[t], seen);
      for (int64_t row = t * s.groups; row < (t + 1) * s.groups; ++row)
        if (seen[0] | seen[1] | seen[2] | seen[3])
          weigh(room.weights.data() + row * kKeys, seen, s.scale, &room.peaks[row],
                &room.totals[row], room.out.data() + row * wide, wide);
        else
          std::fill_n(room.weights.data() + row * kKeys, kKeys, 0.0f);
    }
    for (int64_t h = 0; h < wide; h += 64)
      product(rows, kKeys, room.weights.data(), kKeys, room.values.data() + h, wide,
              room.out.data() + h, wide, true);
  }
  for (int64_t t = 0; t < s.count; ++t)
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t row = t * s.groups + g;
      const float total = room.totals[row], inverse = total == 0 ? 0.0f : 1.0f / total;
      for (int64_t h = 0; h < s.size; ++h)
        result[(t * s.heads + g) * s.size + h] = room.out[row * wide + h] * inverse;
    }
}

inline __m512 numbers(const float* p) { return floats_at(p); }
inline __m512 numbers(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// logits[m, at[n]] of M queries and N keys.
template <int M, int N, class T>
inline void few_logits(int64_t size, const float* q, const T* k, int64_t stride, const int32_t* at,
                       float* logits) {
  __m512 sums[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  for (int64_t h = 0; h < size; h += 16) {
    __m512 keys[N];
    for (int n = 0; n < N; ++n) keys[n] = numbers(k + at[n] * stride + h);
    for (int m = 0; m < M; ++m) {
      const __m512 own = floats_at(q + m * size + h);
      for (int n = 0; n < N; ++n) sums[m][n] = _mm512_fmadd_ps(own, keys[n], sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) logits[m * kKeys + at[n]] = _mm512_reduce_add_ps(sums[m][n]);
}

// out[m, 16 J] += sum of weights[m, at[i]] v[at[i]], for M queries.
template <int M, int J, class T>
inline void few_values(int64_t size, const float* weights, const T* v, int64_t stride,
                       const int32_t* at, int count, float* out) {
  __m512 sums[M][J];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < J; ++j) sums[m][j] = floats_at(out + m * size + 16 * j);
  for (int i = 0; i < count; ++i) {
    __m512 value[J];
    for (int j = 0; j < J; ++j) value[j] = numbers(v + at[i] * stride + 16 * j);
    for (int m = 0; m < M; ++m) {
      const __m512 own = _mm512_set1_ps(weights[m * kKeys + at[i]]);
      for (int j = 0; j < J; ++j) sums[m][j] = _mm512_fmadd_ps(own, value[j], sums[m][j]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < J; ++j) _mm512_storeu_ps(out + m * size + 16 * j, sums[m][j]);
}

// A row of numbers that is read soon: the hardware looks ahead to the end of a page only.
template <class T>
inline void fetch(const T* row, int64_t size) {
  const auto* bytes = reinterpret_cast<const char*>(row);
  for (size_t i = 0; i < size * sizeof(T); i += 64) _mm_prefetch(bytes + i, _MM_HINT_T0);
}

// A block of slots for M queries at one position, which see those `at`.
template <int M, class T>
inline void few(const ManyQueries& s, const float* q, const T* k, const T* v, const int32_t* at,
                int count, const __mmask16 (&seen)[4], float* peak, float* total, float* out) {
  alignas(64) float weights[M * kKeys] = {};
  int i = 0;
  for (; i + 2 <= count; i += 2) few_logits<M, 2>(s.size, q, k, s.stride, at + i, weights);
  if (i < count) few_logits<M, 1>(s.size, q, k, s.stride, at + i, weights);
  for (int m = 0; m < M; ++m)
    weigh(weights + m * kKeys, seen, s.scale, peak + m, total + m, out + m * s.size, s.size);
  int64_t h = 0;
  for (; h + 64 <= s.size; h += 64)
    few_values<M, 4>(s.size, weights, v + h, s.stride, at, count, out + h);
  for (; h < s.size; h += 16)
    few_values<M, 1>(s.size, weights, v + h, s.stride, at, count, out + h);
}

// Keys and values are read where they lie, once for up to four queries.
template <class T>
void attend_few(const ManyQueries& s, int64_t first, int64_t last, const T* k, const T* v,
                Partial partial) {
  const int64_t rows = s.count * s.groups;
  std::fill_n(partial.peak, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(partial.total, rows, 0.0f);
  std::fill_n(partial.out, rows * s.size, 0.0f);
  for (int64_t start = first; start < last; start += kKeys) {
    int32_t positions[kKeys], at[kKeys];
    std::fill_n(positions, kKeys, -1);
    std::copy_n(s.at + start, std::min<int64_t>(kKeys, last - start), positions);
    const T *keys = k + start * s.stride, *values = v + start * s.stride;
    for (int64_t t = 0; t < s.count; ++t) {
      __mmask16 seen[4];
      see(s, positions, s.positions[t], seen);
      int count = 0;
      for (int j = 0; j < 4; ++j)
        for (unsigned bits = seen[j]; bits; bits &= bits - 1)
          at[count++] = 16 * j + std::countr_zero(bits);
      if (count == 0) continue;
      const auto run = [&]<int M>(std::integral_constant<int, M>, int64_t g) {
        const int64_t row = t * s.groups + g;
        few<M>(s, s.q + (t * s.heads + g) * s.size, keys, values, at, count, seen,
               partial.peak + row, partial.total + row, partial.out + row * s.size);
      };
      int64_t g = 0;
      for (; g + 4 <= s.groups; g += 4) run(std::integral_constant<int, 4>(), g);
      for (; g + 2 <= s.groups; g += 2) run(std::integral_constant<int, 2>(), g);
      if (g < s.groups) run(std::integral_constant<int, 1>(), g);
    }
  }
}

}  // namespace

const AttendMany kAttendAvx512 = {attend<float>, attend<uint16_t>, attend_few<float>,
                                  attend_few<uint16_t>};

}  // namespace gemlax

#include "avx512_end.h"

#endif  // __x86_64__
