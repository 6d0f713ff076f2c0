// Attention of a run of queries of one row and K/V head over one layer of a cache.
#pragma once

#include <cstdint>

namespace gemlax {

struct ManyQueries {
  const float* q;            // [count, heads, size]: `groups` heads from here on
  const int32_t* positions;  // [count] of the queries; a negative one sees nothing
  const int32_t* at;         // [slots]: the position that each slot holds, or -1
  int64_t count, heads, groups, size, slots;
  int64_t stride;  // from a slot to the next in `k` and `v`
  int32_t window;  // 0: none
  float scale;
};

// What a run of slots adds for every query: sum of exp(logit - peak) times 1, and times v.
struct Partial {
  float* peak;   // [queries]
  float* total;  // [queries]
  float* out;    // [queries, size]
};

// For caches of float32, and of the bits of bfloat16. `out` is as `q`; `k` and `v` begin at the head
// of slot 0.
struct AttendMany {
  void (*floats)(const ManyQueries& s, const float* k, const float* v, float* out);
  void (*bfloat16)(const ManyQueries& s, const uint16_t* k, const uint16_t* v, float* out);
  // A few queries over slots [first, last) alone; heads of a multiple of 16.
  void (*few_floats)(const ManyQueries& s, int64_t first, int64_t last, const float* k,
                     const float* v, Partial partial);
  void (*few_bfloat16)(const ManyQueries& s, int64_t first, int64_t last, const uint16_t* k,
                       const uint16_t* v, Partial partial);
};

#if defined(__x86_64__)
extern const AttendMany kAttendAvx512;
#endif

}  // namespace gemlax
