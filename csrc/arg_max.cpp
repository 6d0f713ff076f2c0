// Where the largest number of each row lies, as jnp.argmax finds it: the first of equals, and a NaN
// before all else.

#include <limits>
#include <vector>

#include "kernels.h"
#include "meter.h"
#include "threads.h"

namespace ffi = xla::ffi;

namespace gemlax {
namespace {

constexpr int64_t kPiece = 16384;

// Integers in the order of floats. Compilers make vectors of integers alone, not with a comparison of
// floats between.
__attribute__((always_inline)) inline int32_t order(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  const int32_t key = bits ^ (bits >> 31 & 0x7fffffff);
  const int32_t nan = -((bits & 0x7fffffff) > 0x7f800000);  // all bits set, or none
  return ((key + (key == -1)) | nan) & ~(nan & std::numeric_limits<int32_t>::min());  // -0 as 0
}

__attribute__((always_inline)) inline int32_t largest(const float* x, int64_t count) {
  int32_t best = std::numeric_limits<int32_t>::min();
  for (int64_t j = 0; j < count; ++j) {
    const int32_t key = order(x[j]);
    best = key > best ? key : best;
  }
  return best;
}
int32_t largest_plainly(const float* x, int64_t count) { return largest(x, count); }
#if defined(__x86_64__)
__attribute__((target("avx2"))) int32_t largest_avx2(const float* x, int64_t count) {
  return largest(x, count);
}
#endif

// Plain x86-64 has no instruction for the larger of two integers.
auto chosen_largest() {
#if defined(__x86_64__)
  if (&kernels() != &kPortable) return largest_avx2;
#endif
  return largest_plainly;
}

ffi::Error arg_max(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                   ffi::Result<ffi::Buffer<ffi::S32>> out) {
  const Meter meter(kArgMax);
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  if (width == 0 || int64_t(out->element_count()) != rows)
    return ffi::Error::InvalidArgument("arg_max needs rows of at least one number");
  const int64_t pieces = (width + kPiece - 1) / kPiece;
  std::vector<int32_t> peaks(rows * pieces);
  const float* data = x.typed_data();
  const auto find = chosen_largest();
  parallel_for(pool, rows * pieces, [&](int64_t i) {
    const float* piece = data + i / pieces * width + i % pieces * kPiece;
    const int64_t count = std::min(kPiece, width - i % pieces * kPiece);
    peaks[i] = find(piece, count);
  }, true);
  for (int64_t r = 0; r < rows; ++r) {
    const auto first = peaks.begin() + r * pieces;
    const auto best = std::max_element(first, first + pieces);
    int64_t index = (best - first) * kPiece;
    while (order(data[r * width + index]) != *best) ++index;
    out->typed_data()[r] = int32_t(index);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemlax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemlax_arg_max, gemlax::arg_max,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::S32>>());
