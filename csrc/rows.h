// Inner products of rows of weights with a few rows of activations: what differs between CPUs.
#pragma once

#include <cstdint>

#include "attention.h"
#include "formats.h"

namespace gemlax {

// Rows of activations that one pass over a row of weights serves.
inline constexpr int kMaxRows = 8;
// Weights that share a place in `sums`.
inline constexpr int kGroup = 32;

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
};

// out[r * stride + f] = <weights[f], activations[r]> for f in [first, last) and all r.
using Dot = void (*)(const Weights& weights, int64_t first, int64_t last, const Activations& x,
                     float* out, int64_t stride);

// The way to take many rows: weights as 16-bit integers, `span` groups of a row with one scale.
struct Many {
  // Rows [first, last) to codes [row, width], groups in the order of `Activations`, and scales
  // [row, spans]. The rounding adds 1e-4 of a result's size.
  void (*unpack[kFormats])(const Weights& weights, int64_t first, int64_t last, int width,
                           int16_t* codes, float* scales);
  int span;
  // As `Dot`, for kMaxRows rows of activations and all of `rows` unpacked rows.
  void (*dot)(const int16_t* codes, const float* scales, int64_t rows, const Activations& x,
              float* out, int64_t stride);
};

// Turn a row into codes, group g at `codes + g * step`, with the sums of its groups and, if wanted,
// `offsets` 8 * step / 32 apart; return the scale.
// What is not finite makes the scale NaN: each product would be infinite or NaN. Nothing is written
// for such a row, and for one of zeros.
using Encode = float (*)(const float* x, int width, int64_t step, int16_t* codes, float* sums,
                         int32_t* const* offsets);

// One way to compute: `dot[format][log2(rows)]`, and whether it reads codes or floats.
struct Kernels {
  const char* name;
  bool offsets;      // whether `Activations::offsets` is read
  const Many* many;  // or none
  const AttendMany* attend_many;  // or none
  Encode encode;
  Dot dot[kFormats][4];
  bool codes[kFormats];
  // Parts of attention: the dot product of two vectors, and out += weight * v.
  float (*dot_floats)(const float* a, const float* b, int n);
  float (*dot_bfloat16)(const float* a, const uint16_t* b, int n);
  void (*add_floats)(float* out, const float* v, float weight, int n);
  void (*add_bfloat16)(float* out, const uint16_t* v, float weight, int n);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
extern const Many kManyAvx512;
#endif

// `Encode` in plain C++; it makes no offsets.
float encode_plainly(const float* x, int width, int64_t step, int16_t* codes, float* sums,
                     int32_t* const* offsets);

// The fastest that this CPU runs; GEMLAX_KERNELS=avx2 or portable in the environment asks for less.
const Kernels& kernels();

}  // namespace gemlax
