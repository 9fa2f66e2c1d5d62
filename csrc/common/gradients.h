// The gradients of one layer, as its backward operator returns them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>
#include <tuple>

namespace lenet_ext {

using GradientMask = std::array<bool, 3>;  // which of the gradients of input, weight and bias are wanted

// Undefined: not wanted.
struct LayerGradients {
  at::Tensor input, weight, bias;
};

// An operator cannot return an undefined tensor: what is not wanted becomes an empty one. Each its own, since outputs
// of an operator may not alias each other.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> to_outputs(const LayerGradients& gradients,
                                                                 const at::TensorOptions& options) {
  const auto given = [&options](const at::Tensor& gradient) {
    return gradient.defined() ? gradient : at::empty({0}, options);
  };
  return {given(gradients.input), given(gradients.weight), given(gradients.bias)};
}

}  // namespace lenet_ext
