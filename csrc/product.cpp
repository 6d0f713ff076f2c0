// Products of a few rows of activations with a stack of weight matrices, and rows of it decoded.

#include <atomic>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "meter.h"
#include "rows.h"
#include "threads.h"

namespace ffi = xla::ffi;

namespace gemlax {

namespace {

// Those of this name, if the CPU runs them.
const Kernels* find(const std::string& name) {
  if (name == kPortable.name) return &kPortable;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && name == kAvx2.name) return &kAvx2;
  if (avx2 && avx512 && name == kAvx512.name) return &kAvx512;
#endif
  return nullptr;
}

// What the environment asks for, or the fastest.
const Kernels* first_choice() {
  const char* asked = std::getenv("GEMLAX_KERNELS");
  if (asked && find(asked)) return find(asked);
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* found = find(name)) return found;
  return &kPortable;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{first_choice()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

namespace {

// One part of a stack: [layers, out, bytes of a row], and its scales [layers, out, groups].
struct Part {
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;
  int64_t layers = 0, rows = 0, row_bytes = 0, groups = 0;
  Format format = kFloat32;
};

std::string show(ffi::AnyBuffer::Dimensions shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Take part `index` of the arguments apart, and check that it holds rows of `width` weights.
ffi::Error read_part(ffi::RemainingArgs args, size_t index, ffi::Span<const int64_t> formats,
                     int64_t width, Part* part) {
  auto codes = args.get<ffi::AnyBuffer>(2 * index), scales = args.get<ffi::AnyBuffer>(2 * index + 1);
  if (codes.has_error()) return codes.error();
  if (scales.has_error()) return scales.error();
  if (formats[index] < 0 || formats[index] >= kFormats)
    return ffi::Error::InvalidArgument("unknown format " + std::to_string(formats[index]));
  const FormatFacts& facts = kFacts[formats[index]];
  const auto shape = codes->dimensions(), scale_shape = scales->dimensions();
  if (shape.size() != 3 || scale_shape.size() != 3)
    return ffi::Error::InvalidArgument("codes and scales must have three axes");
  part->format = Format(formats[index]);
  part->codes = static_cast<const uint8_t*>(codes->untyped_data());
  part->layers = shape[0];
  part->rows = shape[1];
  part->row_bytes = shape[2] * int64_t(ffi::ByteWidth(codes->element_type()));
  if (width % facts.block || part->row_bytes != width / facts.block * facts.bytes)
    return ffi::Error::InvalidArgument("codes " + show(shape) + " do not hold rows of " +
                                       std::to_string(width) + " weights");
  if (facts.group == 0) return ffi::Error::Success();
  part->scales = static_cast<const uint16_t*>(scales->untyped_data());
  part->groups = width / facts.group;
  if (scale_shape[0] != shape[0] || scale_shape[1] != shape[1] || scale_shape[2] != part->groups ||
      ffi::ByteWidth(scales->element_type()) != 2)
    return ffi::Error::InvalidArgument("scales " + show(scale_shape) + " do not fit codes " +
                                       show(shape));
  return ffi::Error::Success();
}

// Where one weight lies: `where` says its part, of `count` from `first` on, and its layer there.
ffi::Error find_layer(const int32_t* where, ffi::RemainingArgs args, int64_t first, int64_t count,
                      ffi::Span<const int64_t> formats, int64_t width, Part* part) {
  const int32_t index = where[0], layer = where[1];
  if (index < 0 || index >= count || first + index >= int64_t(formats.size()) ||
      args.size() != 2 * formats.size())
    return ffi::Error::InvalidArgument("no part " + std::to_string(index));
  ffi::Error error = read_part(args, first + index, formats, width, part);
  if (error.failure()) return error;
  if (layer < 0 || layer >= part->layers)
    return ffi::Error::InvalidArgument("layer " + std::to_string(layer) + " of a stack of " +
                                       std::to_string(part->layers));
  part->codes += layer * part->rows * part->row_bytes;
  if (part->scales) part->scales += layer * part->rows * part->groups;
  return ffi::Error::Success();
}

// Memory that begins at a cache line: a vector that crosses one takes half as long again to load.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const Aligned&) const { return true; }
};

// Activations in the form that kernels read, padded with zeros to 1, 2, 4 or a multiple of 8 rows.
class Prepared {
 public:
  Prepared(ffi::ThreadPool& pool, const float* x, int64_t rows, int64_t width, bool floats,
           bool codes)
      : width_(width), groups_((width + kGroup - 1) / kGroup) {
    const int64_t padded = rows <= 2 ? rows : rows <= 4 ? 4 : (rows + 7) / 8 * 8;
    each_ = std::min<int64_t>(padded, kMaxRows);
    passes_ = padded / each_;
    if (codes) {
      codes_.assign(padded * groups_ * kGroup, 0);
      sums_.assign(padded * groups_, 0.0f);
      scales_.assign(padded, 0.0f);
      if (kernels().offsets && rows <= 2)
        for (auto& offsets : offsets_) offsets.assign(rows * groups_ * 8, 0);
    }
    if (floats) floats_.assign(padded * groups_ * kGroup, 0.0f);
    const auto prepare = [&](int64_t r) {
      if (codes) {
        int32_t* const offsets[2] = {offsets_[0].data() + r * 8, offsets_[1].data() + r * 8};
        scales_[r] = kernels().encode(x + r * width, int(width), each_ * kGroup,
                                      codes_.data() + place(r), sums_.data() + r * groups_,
                                      offsets_[0].empty() ? nullptr : offsets);
      }
      if (floats)
        for (int64_t i = 0; i < width; i += kGroup)
          std::copy_n(x + r * width + i, std::min<int64_t>(kGroup, width - i),
                      floats_.data() + place(r) + i * each_);
    };
    if (rows > kMaxRows)
      parallel_for(pool, rows, prepare);
    else
      for (int64_t r = 0; r < rows; ++r) prepare(r);
  }

  int64_t passes() const { return passes_; }

  Activations pass(int64_t index) const {
    const int64_t first = index * each_;
    Activations x = {int(each_), int(width_), {}, {}, {}, {}, {}};
    if (!floats_.empty()) x.floats = floats_.data() + place(first);
    if (!codes_.empty()) {
      x.codes = codes_.data() + place(first);
      x.sums = sums_.data() + first * groups_;
      x.scales = scales_.data() + first;
      for (int k = 0; k < 2; ++k) x.offsets[k] = offsets_[k].data();
    }
    return x;
  }

 private:
  // Where row r begins.
  int64_t place(int64_t r) const {
    return (r / each_ * groups_ * each_ + r % each_) * kGroup;
  }

  int64_t width_, groups_, each_, passes_;
  std::vector<float, Aligned<float>> floats_;
  std::vector<float> sums_, scales_;
  std::vector<int16_t, Aligned<int16_t>> codes_;
  std::vector<int32_t, Aligned<int32_t>> offsets_[2];
};

int log2_rows(int rows) { return rows == 1 ? 0 : rows == 2 ? 1 : rows == 4 ? 2 : 3; }

// Rows of weights of one task: enough for its start to cost little, few enough to share evenly.
int64_t rows_per_task(int64_t rows, int64_t row_bytes) {
  const int64_t by_bytes = std::max<int64_t>(1, (32 << 10) / std::max<int64_t>(1, row_bytes));
  return std::max<int64_t>(1, std::min(by_bytes, (rows + 7) / 8));
}

// Some rows of one weight: what a thread takes at a time.
struct Piece {
  const Part* part;
  int64_t first, last;  // rows of the weight
  int64_t column;       // where the weight's own results begin
};

std::vector<Piece> cut(const std::vector<Part>& parts) {
  std::vector<Piece> pieces;
  int64_t column = 0;
  for (const Part& part : parts) {
    const int64_t step = rows_per_task(part.rows, part.row_bytes);
    for (int64_t first = 0; first < part.rows; first += step)
      pieces.push_back({&part, first, std::min(part.rows, first + step), column});
    column += part.rows;
  }
  return pieces;
}

// Passes over activations from which weights are better unpacked once.
constexpr int64_t kManyPasses = 4;

// All but the last rows of activations, if they do not fill a pass: those are left.
int64_t multiply_many(const Piece& piece, const Weights& weights, const Prepared& x, int64_t rows,
                      float* out, int64_t columns) {
  const Many* many = kernels().many;
  const auto unpack = many ? many->unpack[piece.part->format] : nullptr;
  if (!unpack || x.passes() < kManyPasses) return 0;
  const int width = x.pass(0).width;
  const int64_t spans = (x.pass(0).groups() + many->span - 1) / many->span;
  constexpr int64_t kRows = 24;  // of weights at a time, which stay in the second cache
  thread_local std::vector<int16_t, Aligned<int16_t>> codes;
  thread_local std::vector<float> scales;
  codes.resize(std::max<size_t>(codes.size(), kRows * width));
  scales.resize(std::max<size_t>(scales.size(), kRows * spans));
  for (int64_t first = piece.first; first < piece.last; first += kRows) {
    const int64_t last = std::min(piece.last, first + kRows);
    unpack(weights, first, last, width, codes.data(), scales.data());
    for (int64_t p = 0; p < rows / kMaxRows; ++p)
      many->dot(codes.data(), scales.data(), last - first, x.pass(p),
                out + p * kMaxRows * columns + piece.column + first, columns);
  }
  return rows / kMaxRows;
}

void multiply_piece(const Piece& piece, const Prepared& x, int64_t rows, float* out,
                    int64_t columns) {
  const Part& part = *piece.part;
  const Weights weights = {part.codes, part.row_bytes, part.scales, part.groups};
  const int64_t width = piece.last - piece.first;
  for (int64_t p = multiply_many(piece, weights, x, rows, out, columns); p < x.passes(); ++p) {
    const Activations own = x.pass(p);
    const Dot dot = kernels().dot[part.format][log2_rows(own.rows)];
    const int64_t begin = p * kMaxRows;
    if (begin + own.rows <= rows) {
      dot(weights, piece.first, piece.last, own, out + begin * columns + piece.column, columns);
      continue;
    }
    std::vector<float> products(own.rows * width);  // some rows are padding
    dot(weights, piece.first, piece.last, own, products.data() - piece.first, width);
    for (int64_t r = begin; r < rows; ++r)
      std::copy_n(products.data() + (r - begin) * width, width,
                  out + r * columns + piece.column + piece.first);
  }
}

// out = x times each of some weights, side by side. `counts` says how many parts each weight has.
ffi::Error multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> where,
                    ffi::RemainingArgs args, ffi::Result<ffi::Buffer<ffi::F32>> out,
                    ffi::Span<const int64_t> formats, ffi::Span<const int64_t> counts) {
  Meter meter(kFloat32);
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t columns = out->dimensions()[1];
  if (where.element_count() != 2 * counts.size() || out->dimensions()[0] != rows)
    return ffi::Error::InvalidArgument("out " + show(out->dimensions()) + " does not fit");
  std::vector<Part> parts(counts.size());
  int64_t first = 0, features = 0;
  bool floats = false, codes = false;
  for (size_t i = 0; i < parts.size(); ++i) {
    ffi::Error error =
        find_layer(where.typed_data() + 2 * i, args, first, counts[i], formats, width, &parts[i]);
    if (error.failure()) return error;
    first += counts[i];
    features += parts[i].rows;
    (kernels().codes[parts[i].format] ? codes : floats) = true;
  }
  if (features != columns)
    return ffi::Error::InvalidArgument("out " + show(out->dimensions()) + " does not fit " +
                                       std::to_string(features) + " features");
  if (rows == 0 || features == 0) return ffi::Error::Success();
  meter.what = parts[0].format;
  const Prepared prepared(pool, x.typed_data(), rows, width, floats, codes);
  const std::vector<Piece> pieces = cut(parts);
  float* result = out->typed_data();
  parallel_for(pool, int64_t(pieces.size()), [&](int64_t i) {
    multiply_piece(pieces[i], prepared, rows, result, columns);
  }, rows <= kMaxRows);
  return ffi::Error::Success();
}

ffi::Error decode(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> where, ffi::RemainingArgs args,
                  ffi::Result<ffi::Buffer<ffi::F32>> out, ffi::Span<const int64_t> formats) {
  const Meter meter(kDecoding);
  const int64_t features = out->dimensions()[0], width = out->dimensions()[1];
  if (where.element_count() != 2)
    return ffi::Error::InvalidArgument("decode takes one weight");
  Part part;
  ffi::Error error = find_layer(where.typed_data(), args, 0, int64_t(formats.size()), formats,
                                width, &part);
  if (error.failure()) return error;
  if (features != part.rows)
    return ffi::Error::InvalidArgument("out " + show(out->dimensions()) + " does not fit");
  const FormatFacts& facts = kFacts[part.format];
  float* result = out->typed_data();
  const std::vector<Part> one = {part};
  const std::vector<Piece> pieces = cut(one);
  parallel_for(pool, int64_t(pieces.size()), [&](int64_t piece) {
    for (int64_t f = pieces[piece].first; f < pieces[piece].last; ++f)
      for (int64_t i = 0; i < width; i += facts.block) {
        const uint16_t* scales =
            part.scales ? part.scales + f * part.groups + i / facts.group : nullptr;
        facts.decode(part.codes + f * part.row_bytes + i / facts.block * facts.bytes, scales,
                     result + f * width + i);
      }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemlax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemlax_multiply, gemlax::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<ffi::Span<const int64_t>>("counts"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemlax_decode, gemlax::decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("formats"));

extern "C" const char* gemlax_kernels() { return gemlax::kernels().name; }

// Choose kernels by name, or the first choice with an empty one; return whether this CPU runs them.
extern "C" bool gemlax_use(const char* name) {
  const gemlax::Kernels* found = *name ? gemlax::find(name) : gemlax::first_choice();
  if (found) gemlax::chosen().store(found);
  return found != nullptr;
}

// Calls and nanoseconds of each kind of `Metered`: 2 * kMetered numbers.
extern "C" void gemlax_totals(int64_t* out) {
  for (const gemlax::Total& total : gemlax::totals) {
    *out++ = total.calls.load();
    *out++ = total.nanoseconds.load();
  }
}
