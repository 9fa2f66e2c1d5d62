// What the host files of the CUDA operators share: device and stream, dtypes, the check behind each launch.
//
// Only headers of torch that a CPU-only torch also has, and nothing of torch_cuda or c10_cuda: one binary then imports
// under either, and is compiled and linked in full on machines without a GPU.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include "cuda/kernels.h"

// The tests without a GPU (tests/cuda_on_cpu) build these files too, and register them for CPU tensors under another
// name.
#ifdef LX_HOST_SHIM
#define LENET_EXT_CUDA_KEY CPU
#else
#define LENET_EXT_CUDA_KEY CUDA
#endif

namespace lenet_ext {

// Put first into every operator, before anything is allocated: makes the tensor's device current until the end of the
// scope, and holds the stream that the caller works on there (so that CUDA graphs capture us). What ATen is called for
// records no gradients; those are the Autograd key's (csrc/<op>/autograd.cpp).
class CudaScope {
 public:
  explicit CudaScope(const at::Tensor& tensor) : guard_(tensor.device()) {
#ifndef LX_HOST_SHIM
    stream = static_cast<cudaStream_t>(
        c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device()).native_handle());
#endif
  }
  cudaStream_t stream = nullptr;

 private:
  c10::DeviceGuard guard_;
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
};

inline cuda::DType cuda_dtype(const char* op, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return cuda::DType::kFloat32;
    case at::kDouble:
      return cuda::DType::kFloat64;
    case at::kHalf:
      return cuda::DType::kFloat16;
    case at::kBFloat16:
      return cuda::DType::kBFloat16;
    default:
      TORCH_CHECK(false, op, ": input must be float32, float64, float16 or bfloat16 on ", tensor.device(), ", got ",
                  tensor.scalar_type());
  }
}

inline cuda::Strides4 cuda_strides(const at::Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

inline const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

// The same tensor, contiguous, at an address of a multiple of 16 bytes, as kernels read it that many at a time.
inline at::Tensor contiguous_and_aligned(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0 ? contiguous : contiguous.clone();
}

// Behind every launcher. `input` is there for the message.
inline void check_launch(const char* op, const cuda::LaunchResult& result, const at::Tensor& input) {
  if (result.error == cudaSuccess) return;
#ifndef LX_HOST_SHIM
  // Which of the three it is depends on what the binary has instead.
  if (result.error == cudaErrorNoKernelImageForDevice || result.error == cudaErrorInvalidDeviceFunction ||
      result.error == cudaErrorUnsupportedPtxVersion) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    TORCH_CHECK(false, op, ": lenet_ext was built without code for the architecture ", major, ".", minor, " of ",
                input.device(), "; rebuild it with TORCH_CUDA_ARCH_LIST=", major, ".", minor,
                " pip install --force-reinstall --no-deps .");
  }
#endif
  TORCH_CHECK(false, op, ": launch of ", result.kernel, " on ", input.device(), " failed for input of shape ",
              input.sizes(), " and dtype ", input.scalar_type(), ": ", cudaGetErrorString(result.error));
}

}  // namespace lenet_ext
