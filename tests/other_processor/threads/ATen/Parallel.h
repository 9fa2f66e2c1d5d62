// at::parallel_for for programs without torch: csrc/common/parallel.h finds this one. Three plain threads, whose
// beginning and end ThreadSanitizer sees, which it does not of an OpenMP runtime's.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int get_num_threads() { return 3; }
inline bool in_parallel_region() { return false; }

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& run) {
  std::vector<std::thread> others;
  for (int64_t i = begin + 1; i < end; ++i) others.emplace_back([&run, i] { run(i, i + 1); });
  run(begin, begin + 1);
  for (std::thread& thread : others) thread.join();
}

}  // namespace at
