// conv_relu_max_pool2d's operators as C++ functions, for those that are made of several: a registered operator is never
// called from another one, which would pay for the dispatcher twice.
#pragma once

#include "common/gradients.h"
#include "conv_relu_max_pool2d/shape.h"

namespace lenet_ext {

// `op` names the caller in error messages. `indices` is set where it is not null.
using ConvReluMaxPool2d = at::Tensor(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, const ConvPoolOptions& options,
                                     bool ceil_mode, at::Tensor* indices);
ConvReluMaxPool2d conv_relu_max_pool2d_cpu, conv_relu_max_pool2d_cuda;

// `input` may be undefined where no gradient of weight is wanted, and `weight` where none of input is. The gradient of
// input is laid out as `indices`, that of weight contiguous.
using ConvReluMaxPool2dBackward = LayerGradients(const char* op, const at::Tensor& grad_output,
                                                 const at::Tensor& indices, const at::Tensor& input,
                                                 const at::Tensor& weight, at::IntArrayRef input_size,
                                                 at::IntArrayRef weight_size, const ConvPoolOptions& options,
                                                 GradientMask wanted);
ConvReluMaxPool2dBackward conv_relu_max_pool2d_backward_cpu, conv_relu_max_pool2d_backward_cuda;

}  // namespace lenet_ext
