// The CUDA side of the operators as C++ functions, for those that are made of several (as cpu/ops.h on the CPU).
#pragma once

#include <array>
#include <tuple>

#include "conv_relu_max_pool2d.h"

namespace lenet_ext {

// `op` names the caller in error messages. `indices` is set where it is not null.
at::Tensor conv_relu_max_pool2d_cuda(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, const ConvPoolOptions& options,
                                     bool ceil_mode, at::Tensor* indices);

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_relu_max_pool2d_backward_cuda(
    const char* op, const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& input,
    const at::Tensor& weight, const ConvPoolOptions& options, std::array<bool, 3> output_mask);

at::Tensor linear_cuda(const char* op, const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, bool relu);

// `output`, which linear_relu needs and plain linear does not, may be undefined.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward_cuda(const char* op, const at::Tensor& grad_output,
                                                                    const at::Tensor& output, const at::Tensor& input,
                                                                    const at::Tensor& weight,
                                                                    std::array<bool, 3> output_mask);

}  // namespace lenet_ext
