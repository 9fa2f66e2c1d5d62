// linear's operators by way of the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "common/gradients.h"
#include "common/operator_handle.h"

namespace lenet_ext::call {

using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline const auto& linear() {
  static const auto op = operator_handle<at::Tensor(const at::Tensor& input, const at::Tensor& weight,
                                                    const std::optional<at::Tensor>& bias)>("lenet_ext::linear");
  return op;
}

inline const auto& linear_relu() {
  static const auto op = operator_handle<at::Tensor(const at::Tensor& input, const at::Tensor& weight,
                                                    const std::optional<at::Tensor>& bias)>("lenet_ext::linear_relu");
  return op;
}

inline const auto& linear_backward() {
  static const auto op =
      operator_handle<ThreeTensors(const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
                                   const std::optional<at::Tensor>& weight, GradientMask output_mask)>(
          "lenet_ext::linear_backward");
  return op;
}

inline const auto& linear_relu_backward() {
  static const auto op = operator_handle<ThreeTensors(
      const at::Tensor& grad_output, const at::Tensor& output, const std::optional<at::Tensor>& input,
      const std::optional<at::Tensor>& weight, GradientMask output_mask)>("lenet_ext::linear_relu_backward");
  return op;
}

}  // namespace lenet_ext::call
