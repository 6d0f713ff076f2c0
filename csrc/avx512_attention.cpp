// Attention to a cache for AVX-512: of a prompt, keys by blocks and products as in a blocked matrix
// product; of a few queries, keys and values read where they lie.
#if defined(__x86_64__)

#include <vector>

// The linker keeps one copy of these members for all files: it must be for any CPU, so they are made
// before these instructions are asked for. Without this a CPU that lacks them may get theirs.
template class std::vector<float>;

#include "avx512.h"

#include <algorithm>
#include <limits>

namespace gemlax {
namespace {

constexpr int kKeys = 64;  // keys at a time: four vectors
constexpr int kRowsAtOnce = 6;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// c[m, 64] (+)= a[m, depth] b[depth, 64], for M values of m.
template <int M>
inline void multiply_tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc, bool add) {
  __m512 sums[M][4];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < 4; ++j)
      sums[m][j] = add ? load_floats(c + m * ldc + 16 * j) : _mm512_setzero_ps();
  for (int64_t i = 0; i < depth; ++i) {
    __m512 row[4];
    for (int j = 0; j < 4; ++j) row[j] = load_floats(b + i * ldb + 16 * j);
    for (int m = 0; m < M; ++m) {
      const __m512 factor = _mm512_set1_ps(a[m * lda + i]);
      for (int j = 0; j < 4; ++j) sums[m][j] = _mm512_fmadd_ps(factor, row[j], sums[m][j]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(c + m * ldc + 16 * j, sums[m][j]);
}

void multiply(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
              float* c, int64_t ldc, bool add) {
  int64_t m = 0;
  for (; m + kRowsAtOnce <= rows; m += kRowsAtOnce)
    multiply_tile<kRowsAtOnce>(depth, a + m * lda, lda, b, ldb, c + m * ldc, ldc, add);
  for (; m < rows; ++m) multiply_tile<1>(depth, a + m * lda, lda, b, ldb, c + m * ldc, ldc, add);
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

// Which of 64 slots a query attends to.
struct Visible {
  __mmask16 slots[4];
  Visible(const QueryBlock& block, const int32_t* slot_positions, int32_t query) {
    for (int j = 0; j < 4; ++j) {
      const __m512i held = _mm512_loadu_si512(slot_positions + 16 * j);
      slots[j] = _mm512_cmpgt_epi32_mask(held, _mm512_set1_epi32(kEmpty)) &
                 _mm512_cmple_epi32_mask(held, _mm512_set1_epi32(query));
      if (block.window)
        slots[j] &= _mm512_cmpgt_epi32_mask(held, _mm512_set1_epi32(query - block.window));
    }
  }
  bool any() const { return slots[0] | slots[1] | slots[2] | slots[3]; }
};

// Logits [64] of one query to weights, with what it has seen before shrunk to the new peak.
inline void add_softmax(float* logits, const Visible& visible, float scale, float* peak,
                        float* total, float* out, int64_t size) {
  const __m512 lowest = _mm512_set1_ps(kLowest);
  __m512 scaled[4], peaks = lowest, nan = _mm512_setzero_ps();
  for (int j = 0; j < 4; ++j) {
    const __m512 all = _mm512_mul_ps(load_floats(logits + 16 * j), _mm512_set1_ps(scale));
    scaled[j] = _mm512_mask_mov_ps(lowest, visible.slots[j], all);
    peaks = _mm512_max_ps(peaks, scaled[j]);
    nan = _mm512_mask_add_ps(nan, visible.slots[j], nan, _mm512_sub_ps(all, all));
  }
  const float new_peak = std::max(*peak, _mm512_reduce_max_ps(peaks));
  __m512 sum = nan;  // 0, or NaN where a logit is not finite
  for (int j = 0; j < 4; ++j) {
    const __m512 below = _mm512_sub_ps(scaled[j], _mm512_set1_ps(new_peak));
    const __m512 weight = _mm512_maskz_mov_ps(visible.slots[j], exp_below_zero(below));
    _mm512_storeu_ps(logits + 16 * j, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  const float shrink = *total == 0 ? 0.0f : std::exp(*peak - new_peak);
  *total = *total * shrink + _mm512_reduce_add_ps(sum);
  *peak = new_peak;
  if (shrink == 1.0f) return;
  const __m512 factor = _mm512_set1_ps(shrink);
  for (int64_t h = 0; h < size; h += 16)
    _mm512_storeu_ps(out + h, _mm512_mul_ps(load_floats(out + h), factor));
}

// Scratch of one thread for the queries of a prompt, whose values are padded to `width` numbers.
struct Scratch {
  int64_t width;
  std::vector<float> queries, keys, values, weights, out, peaks, totals;

  void begin(const QueryBlock& block) {
    const int64_t rows = block.queries();
    width = (block.size + 63) / 64 * 64;
    queries.resize(rows * block.size);
    keys.resize(block.size * kKeys);
    values.assign(kKeys * width, 0.0f);
    weights.resize(rows * kKeys);
    out.assign(rows * width, 0.0f);
    peaks.assign(rows, kLowest);
    totals.assign(rows, 0.0f);
    for (int64_t t = 0; t < block.count; ++t)
      std::copy_n(block.q + t * block.heads * block.size, block.groups * block.size,
                  queries.data() + t * block.groups * block.size);
  }

  // Take keys [size, 64] and values [64, width] from a cache; an empty slot counts as zeros.
  template <class T>
  void load_slots(const QueryBlock& block, const int32_t* positions, const T* k, const T* v) {
    const std::vector<T> empty(block.size, T{0});
    const T *slot_keys[kKeys], *slot_values[kKeys];
    for (int64_t i = 0; i < kKeys; ++i) {
      slot_keys[i] = positions[i] >= 0 ? k + i * block.stride : empty.data();
      slot_values[i] = positions[i] >= 0 ? v + i * block.stride : empty.data();
    }
    for (int64_t h = 0; h < block.size; ++h)
      for (int64_t i = 0; i < kKeys; ++i) keys[h * kKeys + i] = to_float(slot_keys[i][h]);
    for (int64_t i = 0; i < kKeys; ++i)
      for (int64_t h = 0; h < block.size; ++h) values[i * width + h] = to_float(slot_values[i][h]);
  }

  void attend(const QueryBlock& block, const int32_t* positions) {
    const int64_t rows = block.queries();
    multiply(rows, block.size, queries.data(), block.size, keys.data(), kKeys, weights.data(), kKeys,
             false);
    for (int64_t t = 0; t < block.count; ++t) {
      const Visible visible(block, positions, block.positions[t]);
      for (int64_t row = t * block.groups; row < (t + 1) * block.groups; ++row)
        if (visible.any())
          add_softmax(weights.data() + row * kKeys, visible, block.scale, &peaks[row], &totals[row],
                      out.data() + row * width, width);
        else
          std::fill_n(weights.data() + row * kKeys, kKeys, 0.0f);
    }
    for (int64_t h = 0; h < width; h += 64)
      multiply(rows, kKeys, weights.data(), kKeys, values.data() + h, width, out.data() + h, width,
               true);
  }
};

// The positions of 64 slots from `start` on, of those before `end`.
struct SlotPositions {
  int32_t of[kKeys];
  SlotPositions(const QueryBlock& block, int64_t start, int64_t end) {
    std::fill_n(of, kKeys, kEmpty);
    std::copy_n(block.slot_positions + start, std::min<int64_t>(kKeys, end - start), of);
  }
};

// logits[m, visible[n]] of M queries and N keys.
template <int M, int N, class T>
inline void visible_logits(int64_t size, const float* q, const T* k, int64_t stride, const int32_t* visible,
                       float* logits) {
  __m512 sums[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  for (int64_t h = 0; h < size; h += 16) {
    __m512 keys[N];
    for (int n = 0; n < N; ++n) keys[n] = load_floats(k + visible[n] * stride + h);
    for (int m = 0; m < M; ++m) {
      const __m512 query = load_floats(q + m * size + h);
      for (int n = 0; n < N; ++n) sums[m][n] = _mm512_fmadd_ps(query, keys[n], sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) logits[m * kKeys + visible[n]] = _mm512_reduce_add_ps(sums[m][n]);
}

// out[m, 16 J] += sum of weights[m, visible[i]] v[visible[i]], for M queries.
template <int M, int J, class T>
inline void visible_values(int64_t size, const float* weights, const T* v, int64_t stride,
                       const int32_t* visible, int count, float* out) {
  __m512 sums[M][J];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < J; ++j) sums[m][j] = load_floats(out + m * size + 16 * j);
  for (int i = 0; i < count; ++i) {
    __m512 value[J];
    for (int j = 0; j < J; ++j) value[j] = load_floats(v + visible[i] * stride + 16 * j);
    for (int m = 0; m < M; ++m) {
      const __m512 weight = _mm512_set1_ps(weights[m * kKeys + visible[i]]);
      for (int j = 0; j < J; ++j) sums[m][j] = _mm512_fmadd_ps(weight, value[j], sums[m][j]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < J; ++j) _mm512_storeu_ps(out + m * size + 16 * j, sums[m][j]);
}

// A block of slots for M queries at one position, which see `count` of them.
template <int M, class T>
inline void attend_visible(const QueryBlock& block, const float* q, const T* k, const T* v,
                           const int32_t* slots, int count, const Visible& visible, float* peak,
                           float* total, float* out) {
  alignas(64) float weights[M * kKeys] = {};
  int i = 0;
  for (; i + 2 <= count; i += 2)
    visible_logits<M, 2>(block.size, q, k, block.stride, slots + i, weights);
  if (i < count) visible_logits<M, 1>(block.size, q, k, block.stride, slots + i, weights);
  for (int m = 0; m < M; ++m)
    add_softmax(weights + m * kKeys, visible, block.scale, peak + m, total + m, out + m * block.size,
                block.size);
  int64_t h = 0;
  for (; h + 64 <= block.size; h += 64)
    visible_values<M, 4>(block.size, weights, v + h, block.stride, slots, count, out + h);
  for (; h < block.size; h += 16)
    visible_values<M, 1>(block.size, weights, v + h, block.stride, slots, count, out + h);
}

}  // namespace

template <class T>
void many_queries_avx512(const QueryBlock& block, const T* k, const T* v, float* result) {
  thread_local Scratch scratch;
  scratch.begin(block);
  int32_t first = std::numeric_limits<int32_t>::max(), last = -1;
  for (int64_t t = 0; t < block.count; ++t) {
    if (block.positions[t] >= 0) first = std::min(first, block.positions[t]);
    last = std::max(last, block.positions[t]);
  }
  for (int64_t start = 0; start < block.slots; start += kKeys) {
    const SlotPositions positions(block, start, block.slots);
    const bool any = std::any_of(positions.of, positions.of + kKeys, [&](int32_t p) {
      return p >= 0 && p <= last && (block.window == 0 || p > first - block.window);
    });
    if (!any) continue;
    scratch.load_slots(block, positions.of, k + start * block.stride, v + start * block.stride);
    scratch.attend(block, positions.of);
  }
  for (int64_t row = 0; row < block.queries(); ++row) {
    const int64_t t = row / block.groups, g = row % block.groups;
    const float total = scratch.totals[row], inverse = total == 0 ? 0.0f : 1.0f / total;
    for (int64_t h = 0; h < block.size; ++h)
      result[(t * block.heads + g) * block.size + h] = scratch.out[row * scratch.width + h] * inverse;
  }
}

template <class T>
void few_queries_avx512(const QueryBlock& block, int64_t first, int64_t last, const T* k, const T* v,
                        Partial partial) {
  std::fill_n(partial.peak, block.queries(), kLowest);
  std::fill_n(partial.total, block.queries(), 0.0f);
  std::fill_n(partial.out, block.queries() * block.size, 0.0f);
  for (int64_t start = first; start < last; start += kKeys) {
    const SlotPositions positions(block, start, last);
    const T *keys = k + start * block.stride, *values = v + start * block.stride;
    for (int64_t t = 0; t < block.count; ++t) {
      const Visible visible(block, positions.of, block.positions[t]);
      int32_t slots[kKeys];
      int count = 0;
      for (int j = 0; j < 4; ++j)
        for (unsigned bits = visible.slots[j]; bits; bits &= bits - 1)
          slots[count++] = 16 * j + std::countr_zero(bits);
      if (count == 0) continue;
      const auto attend = [&]<int M>(std::integral_constant<int, M>, int64_t g) {
        const int64_t row = t * block.groups + g;
        attend_visible<M>(block, block.q + (t * block.heads + g) * block.size, keys, values, slots,
                          count, visible, partial.peak + row, partial.total + row,
                          partial.out + row * block.size);
      };
      int64_t g = 0;  // keys and values are read once for up to four queries
      for (; g + 4 <= block.groups; g += 4) attend(std::integral_constant<int, 4>(), g);
      for (; g + 2 <= block.groups; g += 2) attend(std::integral_constant<int, 2>(), g);
      if (g < block.groups) attend(std::integral_constant<int, 1>(), g);
    }
  }
}

#define GEMLAX_CACHE_OF(T)                                                                  \
  template void few_queries_avx512(const QueryBlock&, int64_t, int64_t, const T*, const T*, \
                                   Partial);                                                \
  template void many_queries_avx512(const QueryBlock&, const T*, const T*, float*);
GEMLAX_CACHE_OF(float)
GEMLAX_CACHE_OF(uint16_t)

}  // namespace gemlax

#include "target_end.h"

#endif  // __x86_64__
