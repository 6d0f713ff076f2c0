// Work shared between the thread that calls a kernel and the threads of XLA's own pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace gemlax {

// Calls of task(i) for every i in [0, count), which threads take one after another.
class Job {
 public:
  template <class Task>
  Job(int64_t count, const Task& task)
      : count_(count), task_(&task), call_([](const void* own, int64_t i) {
          (*static_cast<const Task*>(own))(i);
        }) {}

  // Take tasks until none is left. The task itself is gone when all are done: it is not touched then.
  void run() {
    int64_t finished = 0;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_; ++finished)
      call_(task_, i);
    if (finished) done_.fetch_add(finished, std::memory_order_release);
  }
  bool done() const { return done_.load(std::memory_order_acquire) == count_; }

 private:
  std::atomic<int64_t> next_{0}, done_{0};
  const int64_t count_;
  const void* task_;
  void (*call_)(const void*, int64_t);
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Threads of the pool that have helped, and look out for the next job for a while: to wake a thread
// takes as long as a small product. Between two kernels of a decode step pass 10 to 30 microseconds.
class Helpers {
 public:
  static constexpr auto kPatience = std::chrono::microseconds(50);

  static Helpers& all() {
    static Helpers helpers;
    return helpers;
  }

  // Show a job to those that look out; return how many do, and the job's number.
  std::pair<int64_t, uint64_t> show(std::shared_ptr<Job> job) {
    const std::lock_guard guard(mutex_);
    shown_ = std::move(job);
    return {idle_.load(), number_.fetch_add(1) + 1};
  }

  void help(std::shared_ptr<Job> job, uint64_t seen, bool stay) {
    job->run();
    job.reset();
    if (!stay) return;
    idle_.fetch_add(1);
    auto begin = std::chrono::steady_clock::now();
    for (int spins = 1;; ++spins) {
      if (number_.load(std::memory_order_acquire) != seen) {
        idle_.fetch_sub(1);
        {
          const std::lock_guard guard(mutex_);
          seen = number_.load();
          job = shown_;
        }
        if (job) job->run();
        job.reset();
        idle_.fetch_add(1);
        begin = std::chrono::steady_clock::now();
      }
      pause();
      if (spins % 64 == 0 && std::chrono::steady_clock::now() - begin > kPatience) break;
    }
    idle_.fetch_sub(1);
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Job> shown_;
  std::atomic<uint64_t> number_{0};
  std::atomic<int64_t> idle_{0};
};

// Run task(i) for every i in [0, count), in any order. `stay`: the next call is expected soon.
//
// The caller takes tasks too, so it ends even if the pool never runs anything: XLA may call a kernel
// on the pool's only thread.
template <class Task>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const Task& task, bool stay = false) {
  const int64_t wanted = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (wanted <= 0) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  // A helper may start when all is done and the caller gone: it shares the job's memory.
  const auto job = std::make_shared<Job>(count, task);
  const auto [idle, number] = Helpers::all().show(job);
  for (int64_t i = idle; i < wanted; ++i)
    pool.Schedule([job, number = number, stay] { Helpers::all().help(job, number, stay); });
  job->run();
  for (int spins = 0; !job->done(); ++spins)
    if (spins > 1000)
      std::this_thread::yield();
    else
      pause();
}

}  // namespace gemlax
