// Work shared between the thread that calls a kernel and the threads of XLA's own pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace gemlax {

// Run task(i) for every i in [0, count), in any order.
//
// The caller takes tasks too, so it ends even if the pool never runs anything: XLA may call a kernel
// on the pool's only thread.
template <class Task>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const Task& task) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  // A helper may start when all is done and the caller gone: it touches `shared` alone then.
  auto shared = std::make_shared<Shared>();
  const Task* work = &task;
  auto run = [shared, work, count] {
    int64_t finished = 0;
    for (int64_t i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < count; ++finished)
      (*work)(i);
    if (finished) shared->done.fetch_add(finished, std::memory_order_release);
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(run)(run));
  run();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

}  // namespace gemlax
