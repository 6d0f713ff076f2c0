// How often the kernels were called and for how long, of the whole process: what benchmarks read.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "formats.h"

namespace gemlax {

// Products by the format of their first weight, then the other kernels.
enum Metered : int64_t { kDecoding = kFormats, kAttention, kArgMax, kMetered };

struct Total {
  std::atomic<int64_t> calls{0}, nanoseconds{0};
};
inline Total totals[kMetered];

// Adds the time from its making to its end to what was named last.
class Meter {
 public:
  explicit Meter(int64_t what) : what(what) {}
  ~Meter() {
    const auto taken = Clock::now() - begin_;
    totals[what].calls.fetch_add(1, std::memory_order_relaxed);
    totals[what].nanoseconds.fetch_add(
        std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count(),
        std::memory_order_relaxed);
  }
  int64_t what;

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin_ = Clock::now();
};

}  // namespace gemlax
