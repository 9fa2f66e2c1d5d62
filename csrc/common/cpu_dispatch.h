// From a tensor's dtype to the kernels' element type, and the tables of the instruction set in use.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

#include "common/capability.h"
#include "cpu/conv_pool_kernels.h"
#include "cpu/gemm_kernels.h"
#include "cpu/lenet_kernels.h"
#include "cpu/optimizer_kernels.h"
#include "cpu/relu_avg_pool2d_kernels.h"

namespace lenet_ext::cpu {

LENET_EXT_CPU_DECLARE(ConvPoolKernels, conv_pool_kernels)
LENET_EXT_CPU_DECLARE(ConvPoolLenetKernels, conv_pool_lenet_kernels)
LENET_EXT_CPU_DECLARE(GemmKernels, gemm_kernels)
LENET_EXT_CPU_DECLARE(LenetKernels, lenet_kernels)
LENET_EXT_CPU_DECLARE(OptimizerKernels, optimizer_kernels)
LENET_EXT_CPU_DECLARE(ReluAvgPoolKernels, relu_avg_pool_kernels)

// The table of an element type, of kernels for all three.
template <typename T, typename Kernels>
const auto& table_of(const Kernels& kernels) {
  if constexpr (std::is_same_v<T, float>) {
    return kernels.float32;
  } else if constexpr (std::is_same_v<T, double>) {
    return kernels.float64;
  } else {
    return kernels.bfloat16;
  }
}

template <typename T>
const ConvPoolTable<T>& conv_pool_table() {
  return table_of<T>(LENET_EXT_CPU_DISPATCH(conv_pool_kernels));
}

template <typename T>
const ReluAvgPoolTable<T>& relu_avg_pool_table() {
  return table_of<T>(LENET_EXT_CPU_DISPATCH(relu_avg_pool_kernels));
}

template <typename A>
const GemmTable<A>& gemm_table() {
  const GemmKernels& kernels = LENET_EXT_CPU_DISPATCH(gemm_kernels);
  if constexpr (std::is_same_v<A, float>) {
    return kernels.float32;
  } else {
    return kernels.float64;
  }
}

// Calls f with a value of the element type, e.g. dispatch(tensor, op, [&](auto zero) { using T = decltype(zero); ...
// }).
template <typename F>
auto dispatch(const at::Tensor& tensor, const char* op, F&& f) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return f(float());
    case at::kDouble:
      return f(double());
    case at::kBFloat16:
      return f(BFloat16());
    default:
      TORCH_CHECK(false, op, ": on the CPU the dtype must be float32, float64 or bfloat16, got ", tensor.scalar_type());
  }
}

template <typename T>
const T* data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Strides4 strides4(const at::Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

}  // namespace lenet_ext::cpu
