// The rate at which this machine's cores multiply and add in registers: the floor under every convolution.
//
// Independent chains acc = acc * factor + term, as many as the registers hold, so that neither latency nor memory can
// be what limits. One version per instruction set; the caller takes the fastest that the processor has. Compiled on
// demand by lenet_ext/bench/peak.py: -O3 -ffp-contract=fast -pthread.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

template <int kBytes>
struct Vector {
  typedef float type __attribute__((vector_size(kBytes)));
};

// A chain needs a register; two more hold factor and term. The loop over the chains disappears by unrolling.
#define DEFINE_CHAINS(NAME, TARGET, BYTES, CHAINS)                                               \
  TARGET float NAME(int64_t steps, float factor_value, float term_value) {                       \
    using V = Vector<BYTES>::type;                                                               \
    V factor, term, acc[CHAINS];                                                                 \
    for (unsigned lane = 0; lane < BYTES / sizeof(float); ++lane) {                              \
      factor[lane] = factor_value;                                                               \
      term[lane] = term_value;                                                                   \
    }                                                                                            \
    for (int i = 0; i < CHAINS; ++i) acc[i] = term * static_cast<float>(i);                      \
    for (int64_t step = 0; step < steps; ++step) {                                               \
      _Pragma("GCC unroll 32") for (int i = 0; i < CHAINS; ++i) acc[i] = acc[i] * factor + term; \
    }                                                                                            \
    float sum = 0;                                                                               \
    for (int i = 0; i < CHAINS; ++i)                                                             \
      for (unsigned lane = 0; lane < BYTES / sizeof(float); ++lane) sum += acc[i][lane];         \
    return sum;                                                                                  \
  }

struct Version {
  float (*run)(int64_t, float, float);
  int flops_per_step;
  bool supported;
};

#if defined(__x86_64__)
DEFINE_CHAINS(chains_sse, , 16, 12)
DEFINE_CHAINS(chains_avx2, __attribute__((target("avx2,fma"))), 32, 12)
DEFINE_CHAINS(chains_avx512, __attribute__((target("avx512f"))), 64, 24)

const std::vector<Version>& versions() {
  static const std::vector<Version> all = [] {
    __builtin_cpu_init();
    return std::vector<Version>{
        // in the order of lenet_ext.bench.instruction_sets.SETS
        {chains_sse, 2 * 4 * 12, true},
        {chains_avx2, 2 * 8 * 12, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
        {chains_avx512, 2 * 16 * 24, __builtin_cpu_supports("avx512f") != 0},
    };
  }();
  return all;
}
#else
DEFINE_CHAINS(chains_plain, , 16, 24)

const std::vector<Version>& versions() {
  static const std::vector<Version> all = {{chains_plain, 2 * 4 * 24, true}};
  return all;
}
#endif

volatile float sink;

}  // namespace

extern "C" int fma_peak_versions() { return static_cast<int>(versions().size()); }

// The time that a thread has had a processor. By the clock on the wall two threads would have half the peak while the
// system has both on one core, as it may for some milliseconds after they began.
double processor_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Seconds for a billion operations on all threads together, if each has a core, measured over about `seconds`; 0 where
// the processor lacks the version.
extern "C" double fma_peak_seconds(int index, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  const Version& version = versions()[index];
  if (!version.supported) return 0;
  // How long a step takes, and half a millisecond for wide registers to be powered up.
  const int64_t kTrial = 100000;
  double step_s = 1;
  for (int i = 0; i < 3; ++i) {
    const auto begin = Clock::now();
    sink = version.run(kTrial, 0.999f, 0.001f);
    step_s = std::min(step_s, std::chrono::duration<double>(Clock::now() - begin).count() / kTrial);
  }
  const int64_t steps = static_cast<int64_t>(seconds / step_s) + 1;
  std::atomic<int> ready{0};
  std::vector<double> used(threads);
  auto work = [&](int thread) {
    sink = version.run(kTrial, 0.999f, 0.001f);
    ready.fetch_add(1);
    while (ready.load() < threads) {
    }
    const double begin = processor_seconds();
    sink = version.run(steps, 0.999f, 0.001f);
    used[thread] = processor_seconds() - begin;
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (auto& other : others) other.join();
  const double flops = static_cast<double>(steps) * version.flops_per_step;
  double rate = 0;
  for (const double seconds_used : used) rate += flops / seconds_used;
  return 1e9 / rate;
}
