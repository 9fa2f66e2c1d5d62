// Blocks that run at the same time and write into each other's shared memory. They need compute capability 9.0; code
// for older GPUs traps, and launchers ask has_clusters() before they come here.
#pragma once

#include "device.cuh"

namespace lx {

// All threads of the cluster wait for each other; what they have written is visible to all of them. One must stand
// before the first cluster_store, because the other blocks may not have begun, and behind the last, because they must
// not have ended.
__device__ __forceinline__ void cluster_barrier() {
#ifdef LX_HOST_SHIM
  lx_shim::wait(lx_shim::Thread::kAtClusterBarrier, __FILE__, __LINE__);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

// Stores to the place in block `rank` of the cluster that `mine`, in shared memory, is in this one.
LX_DEVICE void cluster_store(float* mine, int rank, float value) {
#ifdef LX_HOST_SHIM
  *static_cast<float*>(lx_shim::shared_memory_of(mine, static_cast<unsigned>(rank), sizeof value)) = value;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(mine))), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

// Whether the current device runs a version of this kernel that was compiled for compute capability 9.0 or above.
template <typename... Parameters>
bool has_clusters(void (*kernel)(Parameters...)) {
  return compiled_capability(kernel) >= 90;
}

}  // namespace lx
