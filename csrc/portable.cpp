// Kernels in plain C++, for any CPU: weights are decoded a block at a time and multiplied as floats.

#include <cmath>

#include "kernels.h"

namespace gemlax {

float encode_plainly(const float* x, int width, int64_t step, int16_t* codes, float* sums,
                     int32_t* const*) {
  float peak = 0;
  bool finite = true;
  for (int i = 0; i < width; ++i) {
    peak = std::fmax(peak, std::fabs(x[i]));
    finite &= std::isfinite(x[i]);
  }
  if (!finite) return std::nanf("");
  if (peak == 0) return 0;
  const double inverse = 32767.0 / double(peak);
  for (int g = 0; g < width / kGroup; ++g, codes += step) {
    int32_t sum = 0;
    for (int i = 0; i < kGroup; ++i) {
      const auto code = int32_t(std::lrintf(float(x[g * kGroup + i] * inverse)));
      codes[i / 2 + i % 2 * (kGroup / 2)] = int16_t(code);
      sum += code;
    }
    sums[g] = float(sum);
  }
  return peak / 32767.0f;
}

namespace {

template <class F, int R>
void dot(const Weights& weights, int64_t first, int64_t last, const Activations& x, float* out,
         int64_t stride) {
  constexpr int kStep = F::kBlock > kGroup ? F::kBlock : kGroup;  // whole blocks, whole groups
  for (int64_t f = first; f < last; ++f) {
    const uint8_t* row = weights.codes + f * weights.row_bytes;
    const uint16_t* scales = weights.scales ? weights.scales + f * weights.groups : nullptr;
    float sums[R] = {}, decoded[kStep];
    for (int start = 0; start < x.width; start += kStep) {
      const int count = x.width - start < kStep ? x.width - start : kStep;
      for (int i = 0; i < count; i += F::kBlock)
        F::decode(row + int64_t{start + i} / F::kBlock * F::kBytes,
                  scales ? scales + (start + i) / kGroup : nullptr, decoded + i);
      for (int i = 0; i < count; i += kGroup)
        for (int r = 0; r < R; ++r) {
          const float* floats = x.floats + (int64_t{start + i} / kGroup * R + r) * kGroup;
          const int width = count - i < kGroup ? count - i : kGroup;
          float sum = 0;
          for (int j = 0; j < width; ++j) sum += decoded[i + j] * floats[j];
          sums[r] += sum;
        }
    }
    for (int r = 0; r < R; ++r) out[r * stride + f] = sums[r];
  }
}

template <class T>
float dot_vectors(const float* a, const T* b, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += a[i] * to_float(b[i]);
  return sum;
}

template <class T>
void add_vector(float* out, const T* v, float weight, int n) {
  for (int i = 0; i < n; ++i) out[i] += weight * to_float(v[i]);
}

template <class T>
constexpr AttentionKernels<T> kAttention = {dot_vectors<T>, add_vector<T>, nullptr, nullptr};

}  // namespace

constinit const Kernels kPortable = {
    .name = "portable",
    .reads_codes = false,
    .reads_offsets = false,
    .encode = encode_plainly,
    .dot = {GEMLAX_FORMATS(GEMLAX_DOTS)},
    .batch_product = nullptr,
    .attention = {kAttention<float>, kAttention<uint16_t>},
};

}  // namespace gemlax
