// The whole network's operators by way of the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/operator_handle.h"

namespace lenet_ext::call {

using LenetOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline const auto& lenet() {
  static const auto op =
      operator_handle<at::Tensor(const at::Tensor& input, at::TensorList parameters)>("lenet_ext::lenet");
  return op;
}

inline const auto& lenet_with_activations() {
  static const auto op = operator_handle<LenetOutputs(const at::Tensor& input, at::TensorList parameters)>(
      "lenet_ext::lenet_with_activations");
  return op;
}

inline const auto& lenet_backward() {
  static const auto op = operator_handle<std::tuple<at::Tensor, std::vector<at::Tensor>>(
      const at::Tensor& grad_output, const at::Tensor& input, at::TensorList parameters, const at::Tensor& pooled1,
      const at::Tensor& indices1, const at::Tensor& pooled2, const at::Tensor& indices2, const at::Tensor& hidden1,
      const at::Tensor& hidden2, bool input_gradient)>("lenet_ext::lenet_backward");
  return op;
}

inline const auto& lenet_training_step() {
  static const auto op = operator_handle<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor& input, const at::Tensor& targets, const std::optional<at::Tensor>& weight,
      at::TensorList parameters, at::TensorList state, c10::string_view loss, double label_smoothing,
      int64_t ignore_index, c10::string_view optimizer, at::ArrayRef<double> options)>(
      "lenet_ext::lenet_training_step");
  return op;
}

}  // namespace lenet_ext::call
