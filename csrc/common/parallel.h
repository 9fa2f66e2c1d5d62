// Running a kernel's units of work over at::parallel_for, each thread with a scratch buffer of its own.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <new>

#include "common/neighbour.h"

#ifndef _OPENMP
#error "compile with -fopenmp: without it at::parallel_for silently runs on one thread"
#endif

namespace lenet_ext::cpu {

// Uninitialised memory aligned to a cache line, kept per thread between calls: a malloc of this size would hand fresh
// pages back and forth with the system, and touching those costs more than the arithmetic of a small network.
class ThreadScratch {
 public:
  static void* get(size_t bytes, int slot) {
    static thread_local ThreadScratch scratch[2];
    return scratch[slot].at_least(bytes);
  }

  ~ThreadScratch() { std::free(data_); }

 private:
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return data_;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

// Memory that all units read, prepared by the calling thread.
inline void* shared_scratch(size_t bytes) { return ThreadScratch::get(bytes, 0); }
// Memory of the thread that runs a unit.
inline void* unit_scratch(size_t bytes) { return ThreadScratch::get(bytes, 1); }

// For ThreadSanitizer: threads for the least work, and an equal share for each, whatever else the machine does.
#ifdef LENET_EXT_ALWAYS_PARALLEL
constexpr bool kMayBeAlone = false;
constexpr double kFlopsPerThread = 1, kFlopsPerChunk = 1;
#else
constexpr bool kMayBeAlone = true;
// A thread is worth waking for about 20 microseconds of work. Chunks may be shorter: the counter costs next to nothing.
constexpr double kFlopsPerThread = 2e6, kFlopsPerChunk = 2e5;
#endif
constexpr int64_t kChunksPerThread = 8;

// Calls run(begin, end) over [0, units); `flops` is the work of all of them.
//
// Threads take chunks from a common counter instead of equal shares: where another process has taken a core, the thread
// that lost it does not keep the others waiting with half of the work.
template <typename F>
void parallel_units(int64_t units, double flops, const F& run) {
  if (units <= 0) return;
  const double per_unit = flops / static_cast<double>(units);
  const auto units_for = [per_unit](double share) {
    return per_unit >= share ? 1 : static_cast<int64_t>(share / (per_unit + 1)) + 1;
  };
  const int64_t grain = units_for(kFlopsPerThread);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (units + grain - 1) / grain);
  if (threads <= 1 || at::in_parallel_region() || (kMayBeAlone && is_held_up(Clock::now()))) {
    run(0, units);
    return;
  }
  const int64_t chunk = std::max(units_for(kFlopsPerChunk), units / (threads * kChunksPerThread));
  const int64_t chunks = (units + chunk - 1) / chunk;
  const int64_t most = kMayBeAlone ? chunks : (chunks + threads - 1) / threads;  // that a thread takes
  std::atomic<int64_t> next{0};
  const Clock::time_point start = Clock::now();
  // Whoever is done first waits for the last chunk of another. Much longer, and that one has lost its core, be it the
  // caller.
  std::atomic<Clock::rep> first_done{std::numeric_limits<Clock::rep>::max()};
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    int64_t left = (last - first) * most;
    for (int64_t begin; left > 0 && (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < units; --left) {
      run(begin, std::min(units, begin + chunk));
    }
    const Clock::rep done = Clock::now().time_since_epoch().count();
    for (Clock::rep seen = first_done.load(std::memory_order_relaxed);
         done < seen && !first_done.compare_exchange_weak(seen, done, std::memory_order_relaxed);) {
    }
  });
  const Clock::time_point end = Clock::now(), done{Clock::duration(first_done.load(std::memory_order_relaxed))};
  note_region(end - done, std::max((done - start) / 2, 2 * threads * (done - start) / chunks), end);
}

}  // namespace lenet_ext::cpu
