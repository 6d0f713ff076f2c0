// Attention over one layer of a stacked cache, read where it lies.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "meter.h"
#include "threads.h"

namespace ffi = xla::ffi;

namespace gemlax {
namespace {

// Slots whose weights are made at a time, and the fewest that are worth a task of their own.
constexpr int64_t kSlots = 64, kMinSlots = 128;
// Queries of a row from which keys are taken by blocks, and those of a task then.
constexpr int64_t kMinPrompt = 17, kPromptQueries = 64;

// Queries [batch, length, heads, size] and a layer of a cache [rows, slots, kv_heads, size].
struct Problem {
  const float* q;
  const int32_t *positions, *slot_positions;  // [batch, length], [rows, slots]
  const int32_t* cache_rows;                  // [batch]
  int64_t batch, length, heads, size, slots, kv_heads;
  bool ring;
  int32_t window;
  float scale;

  int64_t groups() const { return heads / kv_heads; }
  int64_t queries() const { return length * groups(); }  // that share a K/V head
  int64_t query_offset(int64_t row, int64_t kv_head, int64_t first) const {
    return ((row * length + first) * heads + kv_head * groups()) * size;
  }
  int64_t cache_offset(int64_t row, int64_t kv_head) const {
    return (cache_rows[row] * slots * kv_heads + kv_head) * size;
  }
  // Queries `first` and up to `count` - 1 more of a row.
  QueryBlock block(int64_t row, int64_t kv_head, int64_t first, int64_t count) const {
    return {.q = q + query_offset(row, kv_head, first),
            .positions = positions + row * length + first,
            .slot_positions = slot_positions + cache_rows[row] * slots,
            .count = std::min(count, length - first),
            .heads = heads,
            .groups = groups(),
            .size = size,
            .slots = slots,
            .stride = kv_heads * size,
            .window = window,
            .scale = scale};
  }
};

// A query and slots [start, start + count), key by key. Online softmax: arXiv 1805.02867.
// A NaN may get lost in a peak, but not in the sums.
template <class T>
void attend_query(const QueryBlock& block, int64_t query, int64_t start, int64_t count, const T* k,
                  const T* v, const Partial& partial) {
  const auto& use = std::get<AttentionKernels<T>>(kernels().attention);
  const int64_t t = query / block.groups;
  const int32_t position = block.positions[t];
  const auto visible = [&](int64_t i) {
    const int32_t slot = block.slot_positions[start + i];
    return slot != kEmpty && slot <= position &&
           (block.window == 0 || slot > position - block.window);
  };
  const float* q = block.q + (t * block.heads + query % block.groups) * block.size;
  float logits[kSlots], peak = partial.peak[query];
  bool any = false;
  for (int64_t i = 0; i < count; ++i) {
    if (!visible(i)) continue;
    logits[i] = block.scale * use.dot(q, k + (start + i) * block.stride, int(block.size));
    peak = std::max(peak, logits[i]);
    any = true;
  }
  if (!any) return;
  float* out = partial.out + query * block.size;
  const float shrink = partial.total[query] == 0 ? 0.0f : std::exp(partial.peak[query] - peak);
  if (shrink != 1.0f)
    for (int64_t h = 0; h < block.size; ++h) out[h] *= shrink;
  float total = partial.total[query] * shrink;
  for (int64_t i = 0; i < count; ++i) {
    if (!visible(i)) continue;
    const float weight = std::exp(logits[i] - peak);
    total += weight;
    use.add(out, v + (start + i) * block.stride, weight, int(block.size));
  }
  partial.peak[query] = peak;
  partial.total[query] = total;
}

// For any CPU and any size of heads: `AttentionKernels::few_queries`.
template <class T>
void few_queries_by_key(const QueryBlock& block, int64_t first, int64_t last, const T* k, const T* v,
                        Partial partial) {
  std::fill_n(partial.peak, block.queries(), -std::numeric_limits<float>::infinity());
  std::fill_n(partial.total, block.queries(), 0.0f);
  std::fill_n(partial.out, block.queries() * block.size, 0.0f);
  for (int64_t start = first; start < last; start += kSlots)
    for (int64_t query = 0; query < block.queries(); ++query)
      attend_query(block, query, start, std::min(kSlots, last - start), k, v, partial);
}

// Put the parts of one row and K/V head together.
void combine(const QueryBlock& block, const std::vector<Partial>& parts, float* out) {
  for (int64_t query = 0; query < block.queries(); ++query) {
    float* result = out + (query / block.groups * block.heads + query % block.groups) * block.size;
    std::fill_n(result, block.size, 0.0f);
    float peak = -std::numeric_limits<float>::infinity(), total = 0;
    for (const Partial& part : parts)
      if (part.total[query] != 0) peak = std::max(peak, part.peak[query]);
    for (const Partial& part : parts) {
      if (part.total[query] == 0) continue;
      const float weight = std::exp(part.peak[query] - peak);
      total += weight * part.total[query];
      for (int64_t h = 0; h < block.size; ++h)
        result[h] += weight * part.out[query * block.size + h];
    }
    if (total != 0)
      for (int64_t h = 0; h < block.size; ++h) result[h] /= total;
  }
}

// Queries of a prompt: by pieces, each with all that it sees.
template <class T>
void attend_prompt(ffi::ThreadPool& pool, const Problem& p, const T* k, const T* v, float* out) {
  const int64_t pieces = (p.length + kPromptQueries - 1) / kPromptQueries;
  parallel_for(pool, p.batch * p.kv_heads * pieces, [&](int64_t index) {
    // The last pieces see the most keys: they come first.
    const int64_t first = (pieces - 1 - index % pieces) * kPromptQueries;
    const int64_t kv_head = index / pieces % p.kv_heads, row = index / pieces / p.kv_heads;
    const int64_t offset = p.cache_offset(row, kv_head);
    std::get<AttentionKernels<T>>(kernels().attention)
        .many_queries(p.block(row, kv_head, first, kPromptQueries), k + offset, v + offset,
                      out + p.query_offset(row, kv_head, first));
  });
}

template <class T>
void attend(ffi::ThreadPool& pool, const Problem& p, const T* k, const T* v, float* out) {
  const auto& use = std::get<AttentionKernels<T>>(kernels().attention);
  if (p.length >= kMinPrompt && use.many_queries) return attend_prompt(pool, p, k, v, out);
  const auto few_queries =
      use.few_queries && p.size % 16 == 0 ? use.few_queries : few_queries_by_key<T>;
  const int32_t last = *std::max_element(p.positions, p.positions + p.batch * p.length);
  // Where slot = position, nothing behind the last query is seen.
  const int64_t slots = p.ring ? p.slots : std::min<int64_t>(p.slots, int64_t{last} + 1);
  const int64_t owners = p.batch * p.kv_heads;
  const int64_t tasks = std::max<int64_t>(1, 4 * pool.num_threads() / owners);
  const int64_t parts =
      std::min(tasks, std::max<int64_t>(1, (slots + kMinSlots - 1) / kMinSlots));
  const int64_t step = (slots + parts - 1) / parts, queries = p.queries();
  std::vector<float> memory(owners * parts * queries * (p.size + 2));
  const auto partial = [&](int64_t task) {
    float* start = memory.data() + task * queries * (p.size + 2);
    return Partial{start, start + queries, start + 2 * queries};
  };
  parallel_for(pool, owners * parts, [&](int64_t index) {
    const int64_t row = index / parts / p.kv_heads, kv_head = index / parts % p.kv_heads;
    const int64_t first = index % parts * step, offset = p.cache_offset(row, kv_head);
    few_queries(p.block(row, kv_head, 0, p.length), std::min(first, slots),
                std::min(first + step, slots), k + offset, v + offset, partial(index));
  }, true);
  for (int64_t owner = 0; owner < owners; ++owner) {
    const int64_t row = owner / p.kv_heads, kv_head = owner % p.kv_heads;
    std::vector<Partial> own_parts;
    for (int64_t part = 0; part < parts; ++part) own_parts.push_back(partial(owner * parts + part));
    combine(p.block(row, kv_head, 0, p.length), own_parts, out + p.query_offset(row, kv_head, 0));
  }
}

using Integers = ffi::Buffer<ffi::S32>;

ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k,
                     ffi::AnyBuffer v, Integers slot_positions, Integers layers, Integers positions,
                     Integers rows, ffi::Result<ffi::Buffer<ffi::F32>> out, bool ring,
                     int32_t window, float scale) {
  const Meter meter(kAttention);
  const auto shape = q.dimensions(), cache = k.dimensions();
  if (shape.size() != 4 || cache.size() != 5)
    return ffi::Error::InvalidArgument("attention needs q [B, T, N, H] and k [n, B, S, K, H]");
  const Problem p = {.q = q.typed_data(), .positions = positions.typed_data(),
                     .slot_positions = slot_positions.typed_data(), .cache_rows = rows.typed_data(),
                     .batch = shape[0], .length = shape[1], .heads = shape[2], .size = shape[3],
                     .slots = cache[2], .kv_heads = cache[3], .ring = ring, .window = window,
                     .scale = scale};
  const int32_t layer = *layers.typed_data();
  if (int64_t(rows.element_count()) != p.batch || cache[4] != p.size || p.kv_heads <= 0 ||
      p.heads % p.kv_heads != 0 || v.element_count() != k.element_count() ||
      int64_t(slot_positions.element_count()) != cache[1] * p.slots ||
      int64_t(positions.element_count()) != p.batch * p.length ||
      v.element_type() != k.element_type() || layer < 0 || layer >= cache[0])
    return ffi::Error::InvalidArgument("attention: shapes, or the layer, do not fit");
  for (int64_t i = 0; i < p.batch; ++i)
    if (p.cache_rows[i] < 0 || p.cache_rows[i] >= cache[1])
      return ffi::Error::InvalidArgument("attention: a row that the cache does not have");
  if (p.batch == 0 || p.length == 0) return ffi::Error::Success();
  const int64_t offset = layer * cache[1] * p.slots * p.kv_heads * p.size;
  const auto run = [&]<class T>(const T*) {
    attend(pool, p, static_cast<const T*>(k.untyped_data()) + offset,
           static_cast<const T*>(v.untyped_data()) + offset, out->typed_data());
    return ffi::Error::Success();
  };
  if (k.element_type() == ffi::F32) return run(static_cast<const float*>(nullptr));
  if (k.element_type() == ffi::U16) return run(static_cast<const uint16_t*>(nullptr));
  return ffi::Error::InvalidArgument("attention reads float32, or the bits of bfloat16");
}

}  // namespace
}  // namespace gemlax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gemlax_attention, gemlax::attention,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<gemlax::Integers>().Arg<gemlax::Integers>().Arg<gemlax::Integers>()
        .Arg<gemlax::Integers>().Ret<ffi::Buffer<ffi::F32>>()
        .Attr<bool>("ring").Attr<int32_t>("window").Attr<float>("scale"));
