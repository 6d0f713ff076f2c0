// The table of kernels, one for each instruction set: products of weights with activations, and
// attention over a layer of a cache.
#pragma once

#include <cstdint>
#include <tuple>

#include "formats.h"

namespace gemlax {

// Rows of activations that one pass over a row of weights serves.
inline constexpr int kMaxRows = 8;
// Weights that share an entry of `Activations::sums`.
inline constexpr int kGroup = 32;
// The position of a slot of a cache that holds nothing.
inline constexpr int32_t kEmpty = -1;

// `rows` rows (1, 2, 4 or 8) of `width` activations, as floats or as 16-bit codes.
//
// value = scale * code, with |code| <= 32767: the error of a product is about 1e-4 of its size, far
// below that of any 8-bit format, and AVX2 multiplies 16-bit codes as fast as 8-bit ones.
// A group of 32 of all rows lies together. In a group of codes the 16 even elements come first, so
// that no format shuffles its weights. What is missing in the last group is zero.
struct Activations {
  int rows, width;
  const float* floats;   // [groups, rows, 32]
  const int16_t* codes;  // [groups, rows, 32]
  const float* sums;     // [rows, groups]: the sum of a group's codes
  const float* scales;   // [rows]
  // With one or two rows: minus 8, and minus 16, times the sum of the codes that an eighth of a group
  // multiplies (those at 4i to 4i + 3), [groups, rows, 8].
  const int32_t* offsets[2];
  int64_t groups() const { return (int64_t{width} + kGroup - 1) / kGroup; }
};

// A matrix of weights, row by row.
struct Weights {
  const uint8_t* codes;
  int64_t row_bytes;
  const uint16_t* scales;  // [rows, groups], where the format has them
  int64_t groups;
  Weights from(int64_t row) const {
    return {codes + row * row_bytes, row_bytes, scales + row * groups, groups};
  }
};

// out[r * stride + f] = <weights[f], activations[r]> for f in [first, last) and all r.
using Dot = void (*)(const Weights& weights, int64_t first, int64_t last, const Activations& x,
                     float* out, int64_t stride);

// Products with many rows: weights become 16-bit integers first, once for all rows.
struct BatchProduct {
  int groups_per_scale;
  // Rows [first, last) to codes [row, width], groups in the order of `Activations`, and scales
  // [row, ceil(groups / groups_per_scale)]. The rounding adds 1e-4 of a result's size. Null for
  // floats.
  void (*unpack[kFormats])(const Weights& weights, int64_t first, int64_t last, int width,
                           int16_t* codes, float* scales);
  // As `Dot`, for kMaxRows rows of activations and all of `rows` unpacked rows.
  void (*multiply)(const int16_t* codes, const float* scales, int64_t rows, const Activations& x,
                   float* out, int64_t stride);
};

// Turn a row into codes, group g at `codes + g * step`, with the sums of its groups and, if wanted,
// `offsets` 8 * step / 32 apart; return the scale.
// What is not finite makes the scale NaN: each product would be infinite or NaN. Nothing is written
// for such a row, and for one of zeros.
using Encode = float (*)(const float* x, int width, int64_t step, int16_t* codes, float* sums,
                         int32_t* const* offsets);

// Successive queries of one row, with the heads that share a K/V head of a cache.
struct QueryBlock {
  const float* q;                 // [count, heads, size], of which the first `groups` heads count
  const int32_t* positions;       // [count]; a negative one sees nothing
  const int32_t* slot_positions;  // [slots], kEmpty where a slot holds nothing
  int64_t count, heads, groups, size, slots;
  int64_t stride;  // from a slot to the next in `k` and `v`
  int32_t window;  // 0: none
  float scale;
  int64_t queries() const { return count * groups; }
};

// What a run of slots adds for every query: sum of exp(logit - peak) times 1, and times v.
struct Partial {
  float* peak;   // [queries]
  float* total;  // [queries]
  float* out;    // [queries, size]
};

// Attention over a cache of T: float, or the bits of bfloat16. `k` and `v` begin at the head of slot 0.
template <class T>
struct AttentionKernels {
  float (*dot)(const float* a, const T* b, int n);
  void (*add)(float* out, const T* v, float weight, int n);  // out += weight * v
  // A few queries over slots [first, last), for heads of a multiple of 16, or null.
  void (*few_queries)(const QueryBlock& block, int64_t first, int64_t last, const T* k, const T* v,
                      Partial partial);
  // Queries of a prompt over all slots, or null; `out` is laid out as `q`.
  void (*many_queries)(const QueryBlock& block, const T* k, const T* v, float* out);
};

// What one instruction set offers.
struct Kernels {
  const char* name;
  bool reads_codes;  // whether formats of codes meet activations as codes, not as floats
  bool reads_offsets;
  Encode encode;
  Dot dot[kFormats][4];  // by format, and by the logarithm of the rows
  const BatchProduct* batch_product;  // or null
  std::tuple<AttentionKernels<float>, AttentionKernels<uint16_t>> attention;
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
extern const BatchProduct kBatchProductAvx512;
template <class T>
void few_queries_avx512(const QueryBlock& block, int64_t first, int64_t last, const T* k, const T* v,
                        Partial partial);
template <class T>
void many_queries_avx512(const QueryBlock& block, const T* k, const T* v, float* out);
#endif

// `Encode` in plain C++; it makes no offsets.
float encode_plainly(const float* x, int width, int64_t step, int16_t* codes, float* sums,
                     int32_t* const* offsets);

// An entry of `Kernels::dot`: the products of one format.
#define GEMLAX_DOTS(name, F) {dot<F, 1>, dot<F, 2>, dot<F, 4>, dot<F, 8>},

// The kernels in use: the fastest that this CPU runs, unless the environment's GEMLAX_KERNELS names
// others.
const Kernels& kernels();

}  // namespace gemlax
