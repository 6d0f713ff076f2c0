// Products of a few rows of activations with a stack of weight matrices, and rows of it decoded.

#include <new>
#include <string>
#include <vector>

#include "kernels.h"
#include "meter.h"
#include "threads.h"

namespace ffi = xla::ffi;

namespace gemlax {
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
  const FormatFacts& facts = kFormatFacts[formats[index]];
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

// Activations in the form that kernels read, padded with zeros to blocks of 1, 2, 4 or 8 rows.
class Prepared {
 public:
  Prepared(ffi::ThreadPool& pool, const float* x, int64_t rows, int64_t width, bool floats,
           bool codes)
      : width_(width), groups_((width + kGroup - 1) / kGroup) {
    block_rows_ = rows <= 2 ? rows : rows <= 4 ? 4 : kMaxRows;
    blocks_ = (rows + block_rows_ - 1) / block_rows_;
    const int64_t padded = blocks_ * block_rows_;
    if (codes) {
      codes_.assign(padded * groups_ * kGroup, 0);
      sums_.assign(padded * groups_, 0.0f);
      scales_.assign(padded, 0.0f);
      if (kernels().reads_offsets && rows <= 2)
        for (auto& offsets : offsets_) offsets.assign(rows * groups_ * 8, 0);
    }
    if (floats) floats_.assign(padded * groups_ * kGroup, 0.0f);
    const auto prepare = [&](int64_t r) {
      if (codes) {
        int32_t* const offsets[2] = {offsets_[0].data() + r * 8, offsets_[1].data() + r * 8};
        scales_[r] = kernels().encode(x + r * width, int(width), block_rows_ * kGroup,
                                      codes_.data() + row_offset(r), sums_.data() + r * groups_,
                                      offsets_[0].empty() ? nullptr : offsets);
      }
      if (floats)
        for (int64_t i = 0; i < width; i += kGroup)
          std::copy_n(x + r * width + i, std::min<int64_t>(kGroup, width - i),
                      floats_.data() + row_offset(r) + i * block_rows_);
    };
    if (rows > kMaxRows)
      parallel_for(pool, rows, prepare);
    else
      for (int64_t r = 0; r < rows; ++r) prepare(r);
  }

  int64_t blocks() const { return blocks_; }

  Activations block(int64_t index) const {
    const int64_t first = index * block_rows_, coded = codes_.empty() ? 0 : first;
    return {.rows = int(block_rows_),
            .width = int(width_),
            .floats = floats_.empty() ? nullptr : floats_.data() + row_offset(first),
            .codes = codes_.empty() ? nullptr : codes_.data() + row_offset(first),
            .sums = sums_.data() + coded * groups_,
            .scales = scales_.data() + coded,
            .offsets = {offsets_[0].data(), offsets_[1].data()}};
  }

 private:
  // Where row r begins.
  int64_t row_offset(int64_t r) const {
    return (r / block_rows_ * groups_ * block_rows_ + r % block_rows_) * kGroup;
  }

  int64_t width_, groups_, block_rows_, blocks_;
  std::vector<float, Aligned<float>> floats_;
  std::vector<float> sums_, scales_;
  std::vector<int16_t, Aligned<int16_t>> codes_;
  std::vector<int32_t, Aligned<int32_t>> offsets_[2];
};

// Some rows of one weight: what a thread takes at a time.
struct RowRange {
  const Part* part;
  int64_t first, last;  // rows of the weight
  int64_t column;       // where the weight's own results begin
};

// Enough rows for the start of a task to cost little, few enough to share evenly.
std::vector<RowRange> split(const std::vector<Part>& parts) {
  std::vector<RowRange> ranges;
  int64_t column = 0;
  for (const Part& part : parts) {
    const int64_t by_bytes = (32 << 10) / std::max<int64_t>(1, part.row_bytes);
    const int64_t step = std::max<int64_t>(1, std::min(by_bytes, (part.rows + 7) / 8));
    for (int64_t first = 0; first < part.rows; first += step)
      ranges.push_back({&part, first, std::min(part.rows, first + step), column});
    column += part.rows;
  }
  return ranges;
}

// Blocks of activations from which weights are better unpacked once.
constexpr int64_t kMinBatchBlocks = 4;

// Multiply with whole blocks of activations by unpacked weights; return how many blocks were done.
int64_t multiply_unpacked(const RowRange& range, const Weights& weights, const Prepared& x,
                          int64_t rows, float* out, int64_t columns) {
  const BatchProduct* batch = kernels().batch_product;
  const auto unpack = batch ? batch->unpack[range.part->format] : nullptr;
  if (!unpack || x.blocks() < kMinBatchBlocks) return 0;
  const int width = x.block(0).width;
  const int64_t row_scales =
      (x.block(0).groups() + batch->groups_per_scale - 1) / batch->groups_per_scale;
  constexpr int64_t kRows = 24;  // of weights at a time, which stay in the second cache
  thread_local std::vector<int16_t, Aligned<int16_t>> codes;
  thread_local std::vector<float> scales;
  codes.resize(std::max<size_t>(codes.size(), kRows * width));
  scales.resize(std::max<size_t>(scales.size(), kRows * row_scales));
  for (int64_t first = range.first; first < range.last; first += kRows) {
    const int64_t last = std::min(range.last, first + kRows);
    unpack(weights, first, last, width, codes.data(), scales.data());
    for (int64_t b = 0; b < rows / kMaxRows; ++b)
      batch->multiply(codes.data(), scales.data(), last - first, x.block(b),
                      out + b * kMaxRows * columns + range.column + first, columns);
  }
  return rows / kMaxRows;
}

void multiply_range(const RowRange& range, const Prepared& x, int64_t rows, float* out,
                    int64_t columns) {
  const Part& part = *range.part;
  const Weights weights = {part.codes, part.row_bytes, part.scales, part.groups};
  const int64_t width = range.last - range.first;
  for (int64_t b = multiply_unpacked(range, weights, x, rows, out, columns); b < x.blocks(); ++b) {
    const Activations block = x.block(b);
    const Dot dot = kernels().dot[part.format][std::countr_zero(unsigned(block.rows))];
    const int64_t begin = b * block.rows;
    if (begin + block.rows <= rows) {
      dot(weights, range.first, range.last, block, out + begin * columns + range.column, columns);
      continue;
    }
    std::vector<float> products(block.rows * width);  // some rows are padding
    dot(weights, range.first, range.last, block, products.data() - range.first, width);
    for (int64_t r = begin; r < rows; ++r)
      std::copy_n(products.data() + (r - begin) * width, width,
                  out + r * columns + range.column + range.first);
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
    (kernels().reads_codes && !kFormatFacts[parts[i].format].plain ? codes : floats) = true;
  }
  if (features != columns)
    return ffi::Error::InvalidArgument("out " + show(out->dimensions()) + " does not fit " +
                                       std::to_string(features) + " features");
  if (rows == 0 || features == 0) return ffi::Error::Success();
  meter.what = parts[0].format;
  const Prepared prepared(pool, x.typed_data(), rows, width, floats, codes);
  const std::vector<RowRange> ranges = split(parts);
  parallel_for(pool, int64_t(ranges.size()), [&](int64_t i) {
    multiply_range(ranges[i], prepared, rows, out->typed_data(), columns);
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
  const FormatFacts& facts = kFormatFacts[part.format];
  const std::vector<Part> parts = {part};
  const std::vector<RowRange> ranges = split(parts);
  parallel_for(pool, int64_t(ranges.size()), [&](int64_t range) {
    for (int64_t f = ranges[range].first; f < ranges[range].last; ++f)
      for (int64_t i = 0; i < width; i += facts.block) {
        const uint16_t* scales =
            part.scales ? part.scales + f * part.groups + i / facts.group : nullptr;
        facts.decode(part.codes + f * part.row_bytes + i / facts.block * facts.bytes, scales,
                     out->typed_data() + f * width + i);
      }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemlax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gemlax_multiply, gemlax::multiply,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::S32>>().RemainingArgs()
        .Ret<ffi::Buffer<ffi::F32>>()
        .Attr<ffi::Span<const int64_t>>("formats").Attr<ffi::Span<const int64_t>>("counts"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gemlax_decode, gemlax::decode,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S32>>().RemainingArgs()
        .Ret<ffi::Buffer<ffi::F32>>().Attr<ffi::Span<const int64_t>>("formats"));
