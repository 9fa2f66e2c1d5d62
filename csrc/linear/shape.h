// What the CPU and the CUDA side of linear and linear_relu share: argument checks.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/gradients.h"

namespace lenet_ext {

struct LinearShape {
  int64_t rows, in_features, out_features;  // rows: the product of input's leading dimensions
};

LinearShape check_linear(const char* op, const at::Tensor& input, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias);

// `output`, of linear_relu, may be undefined, and so may `input` where no gradient of weight is wanted and `weight`
// where none of input is. in_features is 0 where both are.
LinearShape check_linear_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& output,
                                  const at::Tensor& input, const at::Tensor& weight, GradientMask wanted);

}  // namespace lenet_ext
