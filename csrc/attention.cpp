// Decode attention over one layer of a stacked cache, read where it lies.

#include <cmath>
#include <limits>
#include <vector>

#include "meter.h"
#include "rows.h"
#include "threads.h"

namespace ffi = xla::ffi;

namespace gemlax {
namespace {

// Slots whose weights are made at a time, and the fewest that are worth a task of their own.
constexpr int64_t kSlots = 64, kPart = 128;
constexpr int32_t kEmpty = -1;
// Queries of a row from which keys are taken by blocks, and those of a task then.
constexpr int64_t kMany = 17, kQueries = 64;

struct Shapes {
  int64_t batch, length, heads, size, slots, kv_heads, groups;
  int64_t queries() const { return length * groups; }  // that share a K/V head
};

struct Task {
  const float* q;          // [length, heads, size] of the row
  const int32_t* queries;  // [length]: their positions
  const int32_t* at;       // [slots]: the position that each slot holds
  int64_t kv_head, first, last;
  float scale;
  int32_t window;  // 0: none
};

inline float dot(const Kernels& use, const float* a, const float* b, int n) {
  return use.dot_floats(a, b, n);
}
inline float dot(const Kernels& use, const float* a, const uint16_t* b, int n) {
  return use.dot_bfloat16(a, b, n);
}
inline void add(const Kernels& use, float* out, const float* v, float weight, int n) {
  use.add_floats(out, v, weight, n);
}
inline void add(const Kernels& use, float* out, const uint16_t* v, float weight, int n) {
  use.add_bfloat16(out, v, weight, n);
}

inline void call_few(const ManyQueries& s, const Task& task, const float* k, const float* v,
                     Partial partial) {
  kernels().attend_many->few_floats(s, task.first, task.last, k, v, partial);
}
inline void call_few(const ManyQueries& s, const Task& task, const uint16_t* k, const uint16_t* v,
                     Partial partial) {
  kernels().attend_many->few_bfloat16(s, task.first, task.last, k, v, partial);
}

template <class T>
void attend_few(const Shapes& s, const Task& task, const T* k, const T* v, Partial partial) {
  const ManyQueries own = {task.q + task.kv_head * s.groups * s.size,
                           task.queries,
                           task.at,
                           s.length,
                           s.heads,
                           s.groups,
                           s.size,
                           s.slots,
                           s.kv_heads * s.size,
                           task.window,
                           task.scale};
  call_few(own, task, k, v, partial);
}

// Online softmax over slots [first, last). Source: arXiv 1805.02867.
// A NaN may get lost in a peak, but not in the sums.
template <class T>
void attend(const Shapes& s, const Task& task, const T* k, const T* v, Partial partial) {
  const Kernels& use = kernels();
  if (use.attend_many && s.size % 16 == 0) return attend_few(s, task, k, v, partial);
  const int64_t stride = s.kv_heads * s.size;
  for (int64_t i = 0; i < s.queries(); ++i) {
    partial.peak[i] = -std::numeric_limits<float>::infinity();
    partial.total[i] = 0;
  }
  std::fill(partial.out, partial.out + s.queries() * s.size, 0.0f);
  float logits[kSlots];
  for (int64_t start = task.first; start < task.last; start += kSlots) {
    const int64_t count = std::min(kSlots, task.last - start);
    for (int64_t t = 0; t < s.length; ++t) {
      const int32_t here = task.queries[t];
      const auto seen = [&](int64_t i) {
        const int32_t position = task.at[start + i];
        return position != kEmpty && position <= here &&
               (task.window == 0 || position > here - task.window);
      };
      for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t query = t * s.groups + g;
        const float* q = task.q + (t * s.heads + task.kv_head * s.groups + g) * s.size;
        float peak = partial.peak[query];
        bool any = false;
        for (int64_t i = 0; i < count; ++i) {
          if (!seen(i)) continue;
          logits[i] = task.scale * dot(use, q, k + (start + i) * stride, int(s.size));
          peak = std::max(peak, logits[i]);
          any = true;
        }
        if (!any) continue;
        float* out = partial.out + query * s.size;
        const float shrink = partial.total[query] == 0 ? 0.0f : std::exp(partial.peak[query] - peak);
        if (shrink != 1.0f)
          for (int64_t h = 0; h < s.size; ++h) out[h] *= shrink;
        float total = partial.total[query] * shrink;
        for (int64_t i = 0; i < count; ++i) {
          if (!seen(i)) continue;
          const float weight = std::exp(logits[i] - peak);
          total += weight;
          add(use, out, v + (start + i) * stride, weight, int(s.size));
        }
        partial.peak[query] = peak;
        partial.total[query] = total;
      }
    }
  }
}

// Put the parts of one row and K/V head together.
void combine(const Shapes& s, const std::vector<Partial>& parts, int64_t kv_head, float* out) {
  for (int64_t query = 0; query < s.queries(); ++query) {
    const int64_t t = query / s.groups, head = kv_head * s.groups + query % s.groups;
    float* result = out + (t * s.heads + head) * s.size;
    std::fill(result, result + s.size, 0.0f);
    float peak = -std::numeric_limits<float>::infinity(), total = 0;
    for (const Partial& part : parts)
      if (part.total[query] != 0) peak = std::max(peak, part.peak[query]);
    for (const Partial& part : parts) {
      if (part.total[query] == 0) continue;
      const float weight = std::exp(part.peak[query] - peak);
      total += weight * part.total[query];
      for (int64_t h = 0; h < s.size; ++h) result[h] += weight * part.out[query * s.size + h];
    }
    if (total != 0)
      for (int64_t h = 0; h < s.size; ++h) result[h] /= total;
  }
}

inline void attend_many(const ManyQueries& s, const float* k, const float* v, float* out) {
  kernels().attend_many->floats(s, k, v, out);
}
inline void attend_many(const ManyQueries& s, const uint16_t* k, const uint16_t* v, float* out) {
  kernels().attend_many->bfloat16(s, k, v, out);
}

// Queries of a prompt: by pieces, each with all that it sees.
template <class T>
void run_many(ffi::ThreadPool& pool, const Shapes& s, const float* q, const T* k, const T* v,
              const int32_t* at, const int32_t* positions, const int32_t* rows, int32_t window,
              float scale, float* out) {
  const int64_t pieces = (s.length + kQueries - 1) / kQueries;
  parallel_for(pool, s.batch * s.kv_heads * pieces, [&](int64_t index) {
    // The last pieces see the most keys: they come first.
    const int64_t first = (pieces - 1 - index % pieces) * kQueries;
    const int64_t kv_head = index / pieces % s.kv_heads, row = index / pieces / s.kv_heads;
    const int64_t place = ((row * s.length + first) * s.heads + kv_head * s.groups) * s.size;
    const int64_t held = rows[row];
    const int64_t offset = (held * s.slots * s.kv_heads + kv_head) * s.size;
    const ManyQueries own = {q + place,
                             positions + row * s.length + first,
                             at + held * s.slots,
                             std::min(kQueries, s.length - first),
                             s.heads,
                             s.groups,
                             s.size,
                             s.slots,
                             s.kv_heads * s.size,
                             window,
                             scale};
    attend_many(own, k + offset, v + offset, out + place);
  });
}

template <class T>
void run(ffi::ThreadPool& pool, const Shapes& s, const float* q, const T* k, const T* v,
         const int32_t* at, const int32_t* positions, const int32_t* rows, bool ring,
         int32_t window, float scale, float* out) {
  if (s.length >= kMany && kernels().attend_many)
    return run_many(pool, s, q, k, v, at, positions, rows, window, scale, out);
  int32_t last = -1;
  for (int64_t i = 0; i < s.batch * s.length; ++i) last = std::max(last, positions[i]);
  // Where slot = position, nothing behind the last query is seen.
  const int64_t slots = ring ? s.slots : std::min<int64_t>(s.slots, int64_t{last} + 1);
  const int64_t owners = s.batch * s.kv_heads;
  const int64_t wanted = std::max<int64_t>(1, 4 * pool.num_threads() / owners);
  const int64_t most = std::max<int64_t>(1, (slots + kPart - 1) / kPart);
  const int64_t parts = std::min(wanted, most);
  const int64_t step = (slots + parts - 1) / parts, room = s.queries() * (s.size + 2);
  std::vector<float> memory(owners * parts * room);
  const auto partial = [&](int64_t task) {
    float* own = memory.data() + task * room;
    return Partial{own, own + s.queries(), own + 2 * s.queries()};
  };
  parallel_for(pool, owners * parts, [&](int64_t index) {
    const int64_t row = index / parts / s.kv_heads, kv_head = index / parts % s.kv_heads;
    const int64_t first = index % parts * step, held = rows[row];
    const Task task = {q + row * s.length * s.heads * s.size,
                       positions + row * s.length,
                       at + held * s.slots,
                       kv_head,
                       std::min(first, slots),
                       std::min(first + step, slots),
                       scale,
                       window};
    const int64_t offset = (held * s.slots * s.kv_heads + kv_head) * s.size;
    attend(s, task, k + offset, v + offset, partial(index));
  }, true);
  for (int64_t owner = 0; owner < owners; ++owner) {
    std::vector<Partial> own;
    for (int64_t part = 0; part < parts; ++part) own.push_back(partial(owner * parts + part));
    combine(s, own, owner % s.kv_heads, out + owner / s.kv_heads * s.length * s.heads * s.size);
  }
}

ffi::Error handle(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::S32> at, ffi::Buffer<ffi::S32> row,
                  ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> rows, ffi::Result<ffi::Buffer<ffi::F32>> out,
                  bool ring, int32_t window, float scale) {
  const Meter meter(kAttention);
  const auto asked = q.dimensions(), held = k.dimensions();
  if (asked.size() != 4 || held.size() != 5)
    return ffi::Error::InvalidArgument("attention needs q [B, T, N, H] and k [n, B, S, K, H]");
  Shapes s = {asked[0], asked[1], asked[2], asked[3], held[2], held[3], 0};
  const bool fits = int64_t(rows.element_count()) == s.batch && held[4] == s.size && s.kv_heads > 0 &&
                    s.heads % s.kv_heads == 0 && v.element_count() == k.element_count() &&
                    int64_t(at.element_count()) == held[1] * s.slots &&
                    int64_t(positions.element_count()) == s.batch * s.length &&
                    v.element_type() == k.element_type();
  const int32_t layer = *row.typed_data();
  if (!fits || layer < 0 || layer >= held[0])
    return ffi::Error::InvalidArgument("attention: shapes, or the layer, do not fit");
  for (int64_t i = 0; i < s.batch; ++i)
    if (rows.typed_data()[i] < 0 || rows.typed_data()[i] >= held[1])
      return ffi::Error::InvalidArgument("attention: a row that the cache does not have");
  if (s.batch == 0 || s.length == 0) return ffi::Error::Success();
  s.groups = s.heads / s.kv_heads;
  const int64_t offset = layer * held[1] * s.slots * s.kv_heads * s.size;
  const auto go = [&]<class T>(const T*) {
    run(pool, s, q.typed_data(), static_cast<const T*>(k.untyped_data()) + offset,
        static_cast<const T*>(v.untyped_data()) + offset, at.typed_data(), positions.typed_data(),
        rows.typed_data(), ring, window, scale, out->typed_data());
    return ffi::Error::Success();
  };
  if (k.element_type() == ffi::F32) return go(static_cast<const float*>(nullptr));
  if (k.element_type() == ffi::U16) return go(static_cast<const uint16_t*>(nullptr));
  return ffi::Error::InvalidArgument("attention reads float32, or the bits of bfloat16");
}

}  // namespace
}  // namespace gemlax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemlax_attention, gemlax::handle,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("ring")
                                  .Attr<int32_t>("window")
                                  .Attr<float>("scale"));
