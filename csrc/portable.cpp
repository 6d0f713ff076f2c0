// Kernels in plain C++, for any CPU: weights are decoded a block at a time and multiplied as floats.

#include <cmath>

#include "rows.h"

namespace gemlax {

float encode_plainly(const float* x, int width, int64_t step, int16_t* codes, float* sums,
                     int32_t* const*) {
  float most = 0;
  bool finite = true;
  for (int i = 0; i < width; ++i) {
    most = std::fmax(most, std::fabs(x[i]));
    finite &= std::isfinite(x[i]);
  }
  if (!finite) return std::nanf("");
  if (most == 0) return 0;
  const double inverse = 32767.0 / double(most);
  for (int g = 0; g < width / kGroup; ++g, codes += step) {
    int32_t sum = 0;
    for (int i = 0; i < kGroup; ++i) {
      const auto code = int32_t(std::lrintf(float(x[g * kGroup + i] * inverse)));
      codes[i / 2 + i % 2 * (kGroup / 2)] = int16_t(code);
      sum += code;
    }
    sums[g] = float(sum);
  }
  return most / 32767.0f;
}

namespace {

template <class F, int R>
void dot(const Weights& weights, int64_t first, int64_t last, const Activations& x, float* out,
         int64_t stride) {
  constexpr int kStep = F::kBlock > kGroup ? F::kBlock : kGroup;  // whole blocks, whole groups
  for (int64_t f = first; f < last; ++f) {
    const uint8_t* row = weights.codes + f * weights.row_bytes;
    const uint16_t* scales = weights.scales ? weights.scales + f * weights.groups : nullptr;
    float sums[R] = {}, held[kStep];
    for (int start = 0; start < x.width; start += kStep) {
      const int count = x.width - start < kStep ? x.width - start : kStep;
      for (int i = 0; i < count; i += F::kBlock)
        F::decode(row + int64_t{start + i} / F::kBlock * F::kBytes,
                  scales ? scales + (start + i) / kGroup : nullptr, held + i);
      for (int i = 0; i < count; i += kGroup)
        for (int r = 0; r < R; ++r) {
          const float* floats = x.floats + (int64_t{start + i} / kGroup * R + r) * kGroup;
          const int width = count - i < kGroup ? count - i : kGroup;
          float sum = 0;
          for (int j = 0; j < width; ++j) sum += held[i + j] * floats[j];
          sums[r] += sum;
        }
    }
    for (int r = 0; r < R; ++r) out[r * stride + f] = sums[r];
  }
}

float dot_floats(const float* a, const float* b, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

float dot_bfloat16(const float* a, const uint16_t* b, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += a[i] * from_bfloat16(b[i]);
  return sum;
}

void add_floats(float* out, const float* v, float weight, int n) {
  for (int i = 0; i < n; ++i) out[i] += weight * v[i];
}

void add_bfloat16(float* out, const uint16_t* v, float weight, int n) {
  for (int i = 0; i < n; ++i) out[i] += weight * from_bfloat16(v[i]);
}

#define ROWS(F) {dot<F, 1>, dot<F, 2>, dot<F, 4>, dot<F, 8>}

}  // namespace

const Kernels kPortable = {
    "portable",
    false,
    nullptr,
    nullptr,
    encode_plainly,
    {ROWS(Float32), ROWS(BFloat16), ROWS(Int8), ROWS(Int4), ROWS(Q8_0), ROWS(Q4_0), ROWS(Q5_0),
     ROWS(Q4_K), ROWS(Q6_K)},
    {},
    dot_floats,
    dot_bfloat16,
    add_floats,
    add_bfloat16,
};

}  // namespace gemlax
