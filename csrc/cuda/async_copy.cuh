// Copies from global to shared memory that go on while the thread computes. They need compute capability 8.0; code for
// older GPUs traps.
#pragma once

#include "device.cuh"

namespace lx {

// Begins to copy 4, 8 or 16 bytes; both addresses are multiples of that.
template <int kBytes>
LX_DEVICE void copy_async(void* to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef LX_HOST_SHIM
  lx_shim::copy_later(to, from, kBytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  // 16 bytes go past the L1 cache, which has no use for what is read once.
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
  }
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

// The copies that this thread has begun since the last call are a group.
LX_DEVICE void end_copy_group() {
#ifdef LX_HOST_SHIM
  lx_shim::end_copy_group();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all of this thread's groups but the last kLeft are there. A barrier makes them visible to others.
template <int kLeft>
LX_DEVICE void wait_for_copies() {
#ifdef LX_HOST_SHIM
  lx_shim::finish_copies(kLeft);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// The block begins to copy `count` elements, kBytes at a time: a multiple of that many, as are both addresses.
template <int kBytes, typename T>
LX_DEVICE void copy_block_async(T* to, const T* from, int count) {
  constexpr int kEach = kBytes / sizeof(T);
  for (int i = threadIdx.x * kEach; i < count; i += blockDim.x * kEach) copy_async<kBytes>(to + i, from + i);
}

// The block begins to copy `count` floats, a multiple of 4, to a 16-byte aligned address.
LX_DEVICE void copy_floats_async(float* to, const float* from, int count) {
  if (aligned_for_packs(from)) {
    copy_block_async<16>(to, from, count);
  } else {
    copy_block_async<4>(to, from, count);
  }
}

// The block begins to copy `count` elements, a multiple of 16 bytes, to a 16-byte aligned address; from any other
// address it copies them at once. A thread's are the same 16 bytes either way.
template <typename T>
LX_DEVICE void copy_vectors_async(T* to, const T* from, int count) {
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    copy_block_async<16>(to, from, count);
  } else {
    constexpr int kEach = 16 / sizeof(T);
    for (int i = threadIdx.x * kEach; i < count; i += blockDim.x * kEach) {
      for (int k = 0; k < kEach; ++k) to[i + k] = from[i + k];
    }
  }
}

}  // namespace lx
