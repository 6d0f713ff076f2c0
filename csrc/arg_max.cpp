// Where the largest number of each row lies, as jnp.argmax finds it: the first of equals, and a NaN
// before all else.

#include <limits>
#include <vector>

#include "meter.h"
#include "threads.h"

namespace ffi = xla::ffi;

namespace gemlax {
namespace {

constexpr int64_t kPiece = 16384;

// Integers in the order of floats; a loop over them needs no branch.
inline int32_t order(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x + 0.0f);  // -0 becomes 0
  const int32_t key = bits ^ (bits >> 31 & 0x7fffffff);
  return x != x ? std::numeric_limits<int32_t>::max() : key;
}

ffi::Error arg_max(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                   ffi::Result<ffi::Buffer<ffi::S32>> out) {
  const Meter meter(kArgMax);
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  if (width == 0 || int64_t(out->element_count()) != rows)
    return ffi::Error::InvalidArgument("arg_max needs rows of at least one number");
  const int64_t pieces = (width + kPiece - 1) / kPiece;
  std::vector<int32_t> most(rows * pieces);
  const float* data = x.typed_data();
  parallel_for(pool, rows * pieces, [&](int64_t i) {
    const float* piece = data + i / pieces * width + i % pieces * kPiece;
    const int64_t count = std::min(kPiece, width - i % pieces * kPiece);
    int32_t best = std::numeric_limits<int32_t>::min();
    for (int64_t j = 0; j < count; ++j) best = std::max(best, order(piece[j]));
    most[i] = best;
  }, true);
  for (int64_t r = 0; r < rows; ++r) {
    const auto first = most.begin() + r * pieces;
    const auto best = std::max_element(first, first + pieces);
    int64_t at = (best - first) * kPiece;
    while (order(data[r * width + at]) != *best) ++at;
    out->typed_data()[r] = int32_t(at);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemlax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemlax_arg_max, gemlax::arg_max,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
