// A stand-in for CUDA's header, so that a host compiler builds the kernels of csrc/cuda and any machine runs them:
//
//   g++ -x c++ -std=c++17 -DLX_HOST_SHIM -I tests/cuda_on_cpu file.cu
//
// It is a test tool, made to find mistakes: clusters of blocks, most of them of one block, run one after another, in
// shuffled order; the threads of a cluster are fibers, run in an order that the test chooses
// (`lx_shim::state().schedule`). What it reports, by a launch that returns cudaErrorLaunchFailure and a sentence in
// lx_shim::state().failure:
//   - a barrier or shuffle that some threads of the cluster, block or warp do not reach, or that they reach at
//   different
//     lines;
//   - shared memory written outside of the launched size (AddressSanitizer also sees reads);
//   - sizes beyond the limits of a launch.
// Shared memory and cudaMalloc'ed memory start out as NaN, whatever the type, so an element that is read before it was
// written shows in the result; results that depend on the schedule show a missing barrier. Asynchronous copies are made
// when the thread waits for them, under the shuffled schedule at once: a GPU may do either, so that what is read too
// early shows under the others, and what is overwritten too early under this one.
// It cannot see bank conflicts, occupancy or the memory order of a real GPU; compute-sanitizer and Nsight can.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define LX_SHIM_ASAN 1
#else
#define LX_SHIM_ASAN 0
#endif

#define __host__
#define __device__
#define __global__ static
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
struct cudaFuncAttributes {
  int ptxVersion;  // compute capability that the kernel was compiled for, times 10
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
using cudaStream_t = struct CUstream_st*;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace lx_shim {

constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 64;
constexpr size_t kMaxSharedBytes = 227 * 1024, kDefaultSharedBytes = 48 * 1024;
constexpr unsigned kWarp = 32;
constexpr uint16_t kPoison = 0x7ff4;  // twice a float's NaN, four times a double's, as 16 bits a NaN of both kinds

constexpr unsigned kMaxCluster = 8;  // blocks

enum class Schedule { kForward, kReverse, kShuffled };  // of warps and their threads, or of all threads

// A stack with its machine state; it runs the code of one thread after another.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool begun = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// A block of the cluster that runs.
struct Block {
  uint3 index;
  unsigned first_thread;                                                  // in State::threads
  std::unique_ptr<unsigned char, void (*)(void*)> memory{nullptr, free};  // shared memory between guards
  unsigned char* shared = nullptr;
};

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes;
  unsigned group;
};

struct Thread {
  enum State { kReady, kAtClusterBarrier, kAtBlockBarrier, kAtWarpBarrier, kDone };
  uint3 index;
  unsigned linear;  // in its block
  Block* block = nullptr;
  State state = kReady;
  Fiber* fiber = nullptr;
  const char* file = "";  // of the barrier it waits at
  int line = 0;
  unsigned shuffles = 0;
  unsigned votes = 0;
  bool vote[2];  // what it offers to the threads of its block; two, for the same reason as below
  // What it offers to the lanes of its warp; two, so that one barrier a shuffle is enough.
  alignas(16) unsigned char deposit[2][32];
  std::vector<AsyncCopy> copies;  // that nobody has waited for
  unsigned copy_groups = 0;       // that are complete
};

struct State {
  Schedule schedule = Schedule::kForward;
  unsigned seed = 0;
  std::string failure;  // of the last launch that failed
  int64_t launches = 0;
  int compute_capability = 90;
  size_t most_shared_bytes = kMaxSharedBytes;

  // The cluster that runs.
  dim3 grid, block;
  size_t shared_bytes = 0;
  std::vector<Block> blocks;
  std::vector<Thread> threads;  // block by block
  Thread* current = nullptr;
  void (*run_thread)(void*) = nullptr;
  void* run_argument = nullptr;

  std::map<const void*, size_t> shared_limit;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  jmp_buf scheduler_place;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};
inline State& state() {
  static State only;
  return only;
}

inline unsigned char poison_byte(size_t i) { return static_cast<unsigned char>(i % 2 ? kPoison >> 8 : kPoison & 0xff); }

inline void poison(void* memory, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(memory)[i] = poison_byte(i);
}

inline unsigned char* shared_memory() { return state().current->block->shared; }

// What hardware takes for granted.
inline void require(bool ok, const char* what) {
  if (ok) return;
  fprintf(stderr, "%s\n", what);
  abort();
}

// The place in block `rank` of the cluster that `mine` is in the current thread's block.
inline void* shared_memory_of(const void* mine, unsigned rank, size_t bytes) {
  State& s = state();
  const size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(mine) - shared_memory());
  require(rank < s.blocks.size(), "no block of the cluster has this rank");
  require(offset + bytes <= s.shared_bytes, "an address in another block's shared memory is outside of it");
  return s.blocks[rank].shared + offset;
}

inline void copy_later(void* to, const void* from, size_t bytes) {
  require(reinterpret_cast<uintptr_t>(to) % bytes == 0 && reinterpret_cast<uintptr_t>(from) % bytes == 0,
          "an asynchronous copy is misaligned");
  if (state().schedule == Schedule::kShuffled) {
    memcpy(to, from, bytes);
    return;
  }
  Thread& thread = *state().current;
  thread.copies.push_back({to, from, bytes, thread.copy_groups});
}
inline void end_copy_group() { ++state().current->copy_groups; }
inline void finish_copies(unsigned groups_left) {
  Thread& thread = *state().current;
  auto copy = thread.copies.begin();
  for (; copy != thread.copies.end() && copy->group + groups_left < thread.copy_groups; ++copy) {
    memcpy(copy->to, copy->from, copy->bytes);
  }
  thread.copies.erase(thread.copies.begin(), copy);
}

// ------------------------------------------------------------------------------------------------------- fibers

// Not by swapcontext(), which asks the system for the mask of signals, twice a switch, and takes longer than what
// happens in between; under AddressSanitizer it wipes the whole stack's shadow, too.
inline void switch_to_scheduler(Fiber& from) {
  State& s = state();
#if LX_SHIM_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, s.scheduler_stack, s.scheduler_stack_bytes);
#endif
  if (_setjmp(from.place) == 0) _longjmp(s.scheduler_place, 1);
#if LX_SHIM_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

inline void switch_to(Fiber& fiber) {
  State& s = state();
#if LX_SHIM_ASAN
  __sanitizer_start_switch_fiber(&s.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
  if (_setjmp(s.scheduler_place) == 0) {
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
  }
#if LX_SHIM_ASAN
  __sanitizer_finish_switch_fiber(s.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#if LX_SHIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &state().scheduler_stack, &state().scheduler_stack_bytes);
#endif
  for (;;) {
    State& s = state();
    s.run_thread(s.run_argument);
    s.current->state = Thread::kDone;
    switch_to_scheduler(*s.current->fiber);
  }
}

inline void prepare(Fiber* fiber) {
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
}

inline void resume(Thread& thread) {
  State& s = state();
  if (thread.fiber == nullptr) {
    if (s.idle.empty()) {
      s.fibers.emplace_back(new Fiber);
      prepare(s.fibers.back().get());
      s.idle.push_back(s.fibers.back().get());
    }
    thread.fiber = s.idle.back();
    s.idle.pop_back();
  }
  s.current = &thread;
  switch_to(*thread.fiber);
  if (thread.state == Thread::kDone) s.idle.push_back(thread.fiber);
}

inline void run(Thread& thread) {
  if (thread.state == Thread::kReady) resume(thread);
}

inline void wait(Thread::State kind, const char* file, int line) {
  Thread& thread = *state().current;
  thread.state = kind;
  thread.file = file;
  thread.line = line;
  switch_to_scheduler(*thread.fiber);
}

// Lets the threads [begin, end) go on if all of them wait at one barrier of this kind.
inline bool release(unsigned begin, unsigned end, Thread::State kind) {
  std::vector<Thread>& all = state().threads;
  for (unsigned i = begin; i < end; ++i) {
    if (all[i].state != kind || all[i].line != all[begin].line || strcmp(all[i].file, all[begin].file) != 0)
      return false;
  }
  for (unsigned i = begin; i < end; ++i) all[i].state = Thread::kReady;
  return true;
}

inline std::string describe(const Thread& thread) {
  std::string text = "thread " + std::to_string(thread.linear);
  if (state().blocks.size() > 1) text += " of block " + std::to_string(thread.block - state().blocks.data());
  if (thread.state == Thread::kDone) return text + " has returned";
  const char* barrier = thread.state == Thread::kAtClusterBarrier ? "cluster"
                        : thread.state == Thread::kAtBlockBarrier ? "block"
                                                                  : "warp";
  return text + " waits at the " + barrier + " barrier " + thread.file + ":" + std::to_string(thread.line);
}

// Runs the cluster's threads; false: some of them wait for ever.
inline bool run_cluster(std::mt19937& random) {
  State& s = state();
  const unsigned count = static_cast<unsigned>(s.threads.size());
  const unsigned of_block = s.block.x * s.block.y * s.block.z;
  const unsigned blocks = count / of_block, warps = (of_block + kWarp - 1) / kWarp;
  const bool reverse = s.schedule == Schedule::kReverse;
  // The threads of a warp.
  auto begin_of = [&](unsigned block, unsigned warp) { return block * of_block + warp * kWarp; };
  auto end_of = [&](unsigned block, unsigned warp) {
    return std::min(begin_of(block, warp) + kWarp, (block + 1) * of_block);
  };
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  for (;;) {
    bool released = false;
    if (s.schedule == Schedule::kShuffled) {
      std::shuffle(order.begin(), order.end(), random);
      for (unsigned i : order) run(s.threads[i]);
    } else {
      // Each warp goes as far as it can, so that it is ahead of the others by whole shuffles, and so does each block.
      for (unsigned k = 0; k < blocks; ++k) {
        const unsigned block = reverse ? blocks - 1 - k : k;
        do {
          for (unsigned w = 0; w < warps; ++w) {
            const unsigned warp = reverse ? warps - 1 - w : w, begin = begin_of(block, warp), end = end_of(block, warp);
            do {
              for (unsigned i = begin; i < end; ++i) run(s.threads[reverse ? begin + end - 1 - i : i]);
            } while (release(begin, end, Thread::kAtWarpBarrier));
          }
        } while (release(begin_of(block, 0), end_of(block, warps - 1), Thread::kAtBlockBarrier));
      }
    }
    if (release(0, count, Thread::kAtClusterBarrier)) released = true;
    for (unsigned block = 0; block < blocks; ++block) {
      if (release(begin_of(block, 0), end_of(block, warps - 1), Thread::kAtBlockBarrier)) released = true;
      for (unsigned warp = 0; warp < warps; ++warp) {
        if (release(begin_of(block, warp), end_of(block, warp), Thread::kAtWarpBarrier)) released = true;
      }
    }
    bool done = true;
    for (const Thread& thread : s.threads) done = done && thread.state == Thread::kDone;
    if (done) return true;
    if (!released) break;
  }
  // Name a waiting thread and one that is elsewhere: of its warp for a warp barrier, of its block for a block barrier.
  for (const Thread& thread : s.threads) {
    if (thread.state == Thread::kDone) continue;
    for (const Thread& other : s.threads) {
      if (thread.state != Thread::kAtClusterBarrier && other.block != thread.block) continue;
      if (thread.state == Thread::kAtWarpBarrier && other.linear / kWarp != thread.linear / kWarp) continue;
      if (other.state == thread.state && other.line == thread.line) continue;
      s.failure = describe(thread) + ", but " + describe(other);
      break;
    }
    if (!s.failure.empty()) break;
  }
  // The stacks of the threads that wait are given up: nothing in a kernel has a destructor.
  s.fibers.clear();
  s.idle.clear();
  return false;
}

template <typename Kernel>
cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* function, Kernel& kernel) {
  State& s = state();
  s.failure.clear();
  ++s.launches;
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024) {
    s.failure = "the grid or block is outside of CUDA's limits";
    return cudaErrorInvalidConfiguration;
  }
  auto limit = s.shared_limit.find(function);
  if (config.dynamicSmemBytes > (limit == s.shared_limit.end() ? kDefaultSharedBytes : limit->second)) {
    s.failure = "more dynamic shared memory than cudaFuncSetAttribute allowed";
    return cudaErrorInvalidValue;
  }
  unsigned cluster = 1;  // along x; no kernel has other ones
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
  }
  if (cluster == 0 || cluster > kMaxCluster || grid.x % cluster != 0) {
    s.failure = "the cluster is outside of CUDA's limits, or does not divide the grid";
    return cudaErrorInvalidConfiguration;
  }

  s.grid = grid;
  s.block = block;
  s.shared_bytes = config.dynamicSmemBytes;
  s.run_thread = [](void* argument) { (*static_cast<Kernel*>(argument))(); };
  s.run_argument = &kernel;
  std::mt19937 random(s.seed);
  std::vector<uint64_t> clusters(uint64_t{grid.x} * grid.y * grid.z / cluster);
  for (uint64_t i = 0; i < clusters.size(); ++i) clusters[i] = i;
  std::shuffle(clusters.begin(), clusters.end(), random);

  // With AddressSanitizer the allocation has exactly the launched size, and its own guards.
  const size_t guard = LX_SHIM_ASAN ? 0 : kGuardBytes, bytes = s.shared_bytes + 2 * guard;
  s.blocks.clear();
  s.blocks.resize(cluster);
  for (Block& one : s.blocks) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, std::max<size_t>(bytes, 1)) != 0) return cudaErrorMemoryAllocation;
    one.memory.reset(static_cast<unsigned char*>(memory));
    one.shared = one.memory.get() + guard;
  }

  for (uint64_t c : clusters) {
    s.threads.assign(threads * cluster, Thread{});
    for (unsigned k = 0; k < cluster; ++k) {
      Block& one = s.blocks[k];
      const uint64_t b = c * cluster + k;
      one.index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / grid.x / grid.y)};
      one.first_thread = static_cast<unsigned>(k * threads);
      poison(one.memory.get(), bytes);
      for (unsigned i = 0; i < threads; ++i) {
        Thread& thread = s.threads[one.first_thread + i];
        thread.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        thread.linear = i;
        thread.block = &one;
      }
    }
    if (!run_cluster(random)) return cudaErrorLaunchFailure;
    for (const Block& one : s.blocks) {
      const unsigned char* memory = one.memory.get();
      for (size_t i = 0; i < guard; ++i) {
        const size_t behind = bytes - guard + i;
        if (memory[i] != poison_byte(i) || memory[behind] != poison_byte(behind)) {
          s.failure = "a thread wrote outside of the block's shared memory";
          return cudaErrorLaunchFailure;
        }
      }
    }
  }
  return cudaSuccess;
}

template <typename T>
T exchange(T value, unsigned from_lane, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(Thread::deposit[0]), "too large to shuffle");
  Thread& me = *state().current;
  const unsigned slot = me.shuffles++ % 2, begin = me.linear / kWarp * kWarp;
  memcpy(me.deposit[slot], &value, sizeof value);
  wait(Thread::kAtWarpBarrier, file, line);
  const dim3 block = state().block;
  if (begin + from_lane < block.x * block.y * block.z) {
    memcpy(&value, state().threads[me.block->first_thread + begin + from_lane].deposit[slot], sizeof value);
  }
  return value;
}

// The values that the 32 lanes of a warp have offered. They last until the second exchange from here.
template <typename T>
struct Lanes {
  const Thread* first;
  unsigned slot;
  T operator[](unsigned lane) const {
    T value;
    memcpy(&value, first[lane].deposit[slot], sizeof value);
    return value;
  }
};
template <typename T>
Lanes<T> exchange_all(T value, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(Thread::deposit[0]), "too large to exchange");
  Thread& me = *state().current;
  const unsigned begin = me.linear / kWarp * kWarp, slot = me.shuffles % 2;
  exchange(value, 0, file, line);
  return {&state().threads[me.block->first_thread + begin], slot};
}

// A bit for each lane; of a warp that is not full, for those that are there.
inline unsigned ballot(bool predicate, const char* file, int line) {
  const Lanes<unsigned char> lanes = exchange_all(static_cast<unsigned char>(predicate), file, line);
  const unsigned begin = state().current->linear / kWarp * kWarp;
  const dim3 block = state().block;
  unsigned bits = 0;
  for (unsigned lane = 0; lane < kWarp && begin + lane < block.x * block.y * block.z; ++lane) {
    bits |= static_cast<unsigned>(lanes[lane] != 0) << lane;
  }
  return bits;
}

// Whether any thread of the block says so, behind a barrier.
inline int any_of_block(bool predicate, const char* file, int line) {
  Thread& me = *state().current;
  const unsigned slot = me.votes++ % 2;
  me.vote[slot] = predicate;
  wait(Thread::kAtBlockBarrier, file, line);
  const dim3 block = state().block;
  const Thread* const first = &state().threads[me.block->first_thread];
  return std::any_of(first, first + block.x * block.y * block.z, [&](const Thread& t) { return t.vote[slot]; });
}

}  // namespace lx_shim

#define threadIdx (::lx_shim::state().current->index)
#define blockIdx (::lx_shim::state().current->block->index)
#define blockDim (::lx_shim::state().block)
#define gridDim (::lx_shim::state().grid)

#define __syncthreads() ::lx_shim::wait(::lx_shim::Thread::kAtBlockBarrier, __FILE__, __LINE__)
#define __syncthreads_or(predicate) ::lx_shim::any_of_block((predicate) != 0, __FILE__, __LINE__)
#define __syncwarp() ::lx_shim::wait(::lx_shim::Thread::kAtWarpBarrier, __FILE__, __LINE__)
// Full masks only.
#define __shfl_xor_sync(mask, value, lanes) \
  ::lx_shim::exchange(value, (threadIdx.x % 32) ^ static_cast<unsigned>(lanes), __FILE__, __LINE__)
#define __ballot_sync(mask, predicate) ::lx_shim::ballot(predicate, __FILE__, __LINE__)
#define __shfl_sync(mask, value, lane) ::lx_shim::exchange(value, static_cast<unsigned>(lane) % 32, __FILE__, __LINE__)

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  auto call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  return lx_shim::run_grid(*config, reinterpret_cast<const void*>(kernel), call);
}

inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > lx_shim::state().most_shared_bytes) return cudaErrorInvalidValue;
  lx_shim::state().shared_limit[function] = static_cast<size_t>(value);
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = lx_shim::state().compute_capability;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return lx_shim::state().failure.empty() ? "invalid argument" : lx_shim::state().failure.c_str();
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Few multiprocessors, so that blocks which stay until the batch is done make several rounds.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : static_cast<int>(lx_shim::state().most_shared_bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (posix_memalign(pointer, 256, std::max<size_t>(bytes, 1)) != 0) return cudaErrorMemoryAllocation;
  lx_shim::poison(*pointer, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) {
  free(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
