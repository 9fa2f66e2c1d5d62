// linear's and linear_relu's operators as C++ functions, for those that are made of several: a registered operator is
// never called from another one, which would pay for the dispatcher twice.
#pragma once

#include "common/gradients.h"
#include "linear/shape.h"

namespace lenet_ext {

// `op` names the caller in error messages.
using LinearOperator = at::Tensor(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias, bool relu);
LinearOperator linear_cpu, linear_cuda;

// `output`, which linear_relu needs and plain linear does not, may be undefined, and so may `input` where no gradient
// of weight is wanted and `weight` where none of input is.
using LinearBackwardOperator = LayerGradients(const char* op, const at::Tensor& grad_output, const at::Tensor& output,
                                              const at::Tensor& input, const at::Tensor& weight, GradientMask wanted);
LinearBackwardOperator linear_backward_cpu, linear_backward_cuda;

}  // namespace lenet_ext
