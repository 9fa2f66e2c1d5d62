// relu_avg_pool2d's operators by way of the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/operator_handle.h"

namespace lenet_ext::call {

inline const auto& relu_avg_pool2d() {
  static const auto op = operator_handle<at::Tensor(
      const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
      bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override)>("lenet_ext::relu_avg_pool2d");
  return op;
}

inline const auto& relu_avg_pool2d_backward() {
  static const auto op = operator_handle<at::Tensor(
      const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
      at::IntArrayRef padding, bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override)>(
      "lenet_ext::relu_avg_pool2d_backward");
  return op;
}

}  // namespace lenet_ext::call
