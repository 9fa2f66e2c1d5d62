// What the CPU and the CUDA side of relu_avg_pool2d share: options, argument checks, output sizes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/avg_pool_shape.h"
#include "common/memory_format.h"

namespace lenet_ext {

// In the order of the schema.
struct AvgPoolOptions {
  at::IntArrayRef kernel_size, stride, padding;
  bool ceil_mode, count_include_pad;
  std::optional<int64_t> divisor_override;
};

// Checks all arguments as stock's avg_pool2d would, and computes every size.
AvgPoolShape check_relu_avg_pool2d(const char* op, const at::Tensor& input, const AvgPoolOptions& options);
AvgPoolShape check_relu_avg_pool2d_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& input,
                                            const AvgPoolOptions& options);

}  // namespace lenet_ext
