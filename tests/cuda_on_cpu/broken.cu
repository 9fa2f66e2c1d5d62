// Kernels with the mistakes that the stand-in for CUDA exists to find. `broken NAME` runs one and prints what the
// launch says, then the results under the three schedules; tests/test_cuda_on_cpu.py knows what to expect.
#include <cstdio>
#include <string>

#include "../../csrc/cuda/device.cuh"

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

}  // namespace

int main(int, char** argv) {
  const std::string name = argv[1];
  void (*kernel)(float*) = name == "correct"             ? correct_kernel
                           : name == "missing_barrier"   ? missing_barrier_kernel
                           : name == "early_return"      ? early_return_kernel
                           : name == "divergent_barrier" ? divergent_barrier_kernel
                           : name == "partial_shuffle"   ? partial_shuffle_kernel
                           : name == "overrun"           ? overrun_kernel
                                                         : unwritten_kernel;
  const int64_t bytes = name == "too_much_shared" ? lx_shim::kMaxSharedBytes + 16 : kThreads * sizeof(float);
  for (int schedule = 0; schedule < 3; ++schedule) {
    lx_shim::state().schedule = static_cast<lx_shim::Schedule>(schedule);
    float out[kThreads] = {};
    lenet_ext::cuda::LaunchResult result;
    lx::launch(result, name.c_str(), kernel, 1, name == "no_threads" ? 0 : kThreads, bytes, {},
               static_cast<float*>(out));
    if (result.error != cudaSuccess) {
      printf("%s: %s\n", result.kernel, cudaGetErrorString(result.error));
      return 0;
    }
    for (float value : out) printf("%g ", value);
    printf("\n");
  }
}
