// conv_relu_max_pool2d's operators by way of the dispatcher.
#pragma once

#include <tuple>

#include "common/operator_handle.h"
#include "conv_relu_max_pool2d/shape.h"

namespace lenet_ext::call {

using Ints = at::IntArrayRef;
using OptionalTensor = std::optional<at::Tensor>;
using ConvGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline const auto& conv_relu_max_pool2d() {
  static const auto op =
      operator_handle<at::Tensor(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                 Ints stride, Ints padding, Ints dilation, int64_t groups, Ints pool_kernel_size,
                                 Ints pool_stride, Ints pool_padding, Ints pool_dilation, bool ceil_mode)>(
          "lenet_ext::conv_relu_max_pool2d");
  return op;
}

inline const auto& conv_relu_max_pool2d_with_indices() {
  static const auto op = operator_handle<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, Ints stride, Ints padding,
      Ints dilation, int64_t groups, Ints pool_kernel_size, Ints pool_stride, Ints pool_padding, Ints pool_dilation,
      bool ceil_mode)>("lenet_ext::conv_relu_max_pool2d_with_indices");
  return op;
}

inline const auto& conv_relu_max_pool2d_backward() {
  static const auto op = operator_handle<ConvGradients(
      const at::Tensor& grad_output, const at::Tensor& indices, const OptionalTensor& input,
      const OptionalTensor& weight, c10::SymIntArrayRef input_size, c10::SymIntArrayRef weight_size, Ints stride,
      Ints padding, Ints dilation, int64_t groups, Ints pool_kernel_size, Ints pool_stride, Ints pool_padding,
      Ints pool_dilation, GradientMask output_mask)>("lenet_ext::conv_relu_max_pool2d_backward");
  return op;
}

inline const auto& conv_at_indices() {
  static const auto op =
      operator_handle<at::Tensor(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                 const at::Tensor& indices, Ints stride, Ints padding, Ints dilation, int64_t groups,
                                 Ints pool_kernel_size, Ints pool_stride, Ints pool_padding, Ints pool_dilation)>(
          "lenet_ext::conv_at_indices");
  return op;
}

}  // namespace lenet_ext::call
