// Kernels with the mistakes that the stand-in for CUDA exists to find. `broken NAME` runs one and prints what the
// launch says, then the results under the three schedules; test_cuda_on_cpu.py knows what to expect.
#include <cstdio>
#include <string>

#include "../../csrc/cuda/async_copy.cuh"
#include "../../csrc/cuda/cluster.cuh"

namespace {

constexpr unsigned kThreads = 64;

__global__ void correct_kernel(float* out) {
  LX_SMEM(shared);
  float* values = lx::take<float>(shared, kThreads);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x] + lx::warp_sum(1.0f);
}

__global__ void missing_barrier_kernel(float* out) {
  LX_SMEM(shared);
  float* values = lx::take<float>(shared, kThreads);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x] + 32.0f;
}

__global__ void early_return_kernel(float* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void partial_shuffle_kernel(float* out) {
  float x = 1;
  if (threadIdx.x % 32 < 16) x = lx::warp_sum(x);
  out[threadIdx.x] = x;
}

__global__ void overrun_kernel(float* out) {
  LX_SMEM(shared);
  float* values = lx::take<float>(shared, kThreads);
  values[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 0;
}

__global__ void unwritten_kernel(float* out) {
  LX_SMEM(shared);
  out[threadIdx.x] = lx::take<float>(shared, kThreads)[threadIdx.x];
}

// Every block of a cluster of two passes its values on to the other.
__global__ void cluster_kernel(float* out) {
  LX_SMEM(shared);
  float* values = lx::take<float>(shared, kThreads);
  const int rank = static_cast<int>(blockIdx.x % 2);
  lx::cluster_barrier();
  lx::cluster_store(values + threadIdx.x, 1 - rank, static_cast<float>(rank + 1));
  lx::cluster_barrier();
  if (rank == 0) out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void missing_cluster_barrier_kernel(float* out) {
  LX_SMEM(shared);
  float* values = lx::take<float>(shared, kThreads);
  const int rank = static_cast<int>(blockIdx.x % 2);
  lx::cluster_store(values + threadIdx.x, 1 - rank, static_cast<float>(rank + 1));
  __syncthreads();
  if (rank == 0) out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void early_block_kernel(float* out) {
  if (blockIdx.x % 2 == 1) return;
  lx::cluster_barrier();
  out[threadIdx.x] = 0;
}

// Two groups of copies, of which the last kLeft are not waited for.
template <int kLeft>
__global__ void copies_kernel(float* out) {
  LX_SMEM(shared);
  float* values = lx::take<float>(shared, kThreads);
  out[threadIdx.x] = 1;
  if (threadIdx.x % 2 == 0) lx::copy_async<4>(values + threadIdx.x, out + threadIdx.x);
  lx::end_copy_group();
  if (threadIdx.x % 2 == 1) lx::copy_async<4>(values + threadIdx.x, out + threadIdx.x);
  lx::end_copy_group();
  lx::wait_for_copies<kLeft>();
  out[threadIdx.x] = values[threadIdx.x];
}

// Copies to where other threads may not have read yet.
__global__ void hasty_copies_kernel(float* out) {
  LX_SMEM(shared);
  float* values = lx::take<float>(shared, kThreads);
  values[threadIdx.x] = 2, out[threadIdx.x] = 1;
  __syncthreads();
  const unsigned other = kThreads - 1 - threadIdx.x;
  lx::copy_async<4>(values + other, out + other);
  lx::end_copy_group();
  const float seen = values[threadIdx.x];
  __syncthreads();
  lx::wait_for_copies<0>();
  out[threadIdx.x] = seen;
}

}  // namespace

int main(int, char** argv) {
  const std::string name = argv[1];
  void (*kernel)(float*) = name == "correct"                   ? correct_kernel
                           : name == "missing_barrier"         ? missing_barrier_kernel
                           : name == "early_return"            ? early_return_kernel
                           : name == "divergent_barrier"       ? divergent_barrier_kernel
                           : name == "partial_shuffle"         ? partial_shuffle_kernel
                           : name == "overrun"                 ? overrun_kernel
                           : name == "cluster"                 ? cluster_kernel
                           : name == "missing_cluster_barrier" ? missing_cluster_barrier_kernel
                           : name == "early_block"             ? early_block_kernel
                           : name == "copies"                  ? copies_kernel<0>
                           : name == "unfinished_copies"       ? copies_kernel<1>
                           : name == "hasty_copies"            ? hasty_copies_kernel
                                                               : unwritten_kernel;
  const bool cluster = name.find("cluster") != std::string::npos || name == "early_block";
  const int64_t bytes = name == "too_much_shared" ? lx_shim::kMaxSharedBytes + 16 : kThreads * sizeof(float);
  for (int schedule = 0; schedule < 3; ++schedule) {
    lx_shim::state().schedule = static_cast<lx_shim::Schedule>(schedule);
    float out[kThreads] = {};
    lenet_ext::cuda::LaunchResult result;
    const unsigned blocks = cluster ? 2 : 1;
    lx::launch_clusters(result, name.c_str(), kernel, name == "odd_cluster" ? 3 : blocks, blocks,
                        name == "no_threads" ? 0 : kThreads, bytes, {}, static_cast<float*>(out));
    if (result.error != cudaSuccess) {
      printf("%s: %s\n", result.kernel, cudaGetErrorString(result.error));
      return 0;
    }
    for (float value : out) printf("%g ", value);
    printf("\n");
  }
}
