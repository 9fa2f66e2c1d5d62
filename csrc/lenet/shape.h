// What the CPU and the CUDA side of the whole network share: the check of its arguments, the options of its layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <utility>

#include "conv_relu_max_pool2d/shape.h"

namespace lenet_ext {

// Sizes of an image's activations: pooled1 [6, 14, 14], pooled2 [16, 5, 5], hidden1, hidden2.
constexpr int64_t kLenetPooled1 = 6 * 14 * 14, kLenetFeatures = 16 * 5 * 5, kLenetHidden1 = 120, kLenetHidden2 = 84;

// `parameters`: weight and bias of conv1, conv2, fc1, fc2, fc3.
void check_lenet(const char* op, const at::Tensor& input, at::TensorList parameters);

// What the forward pass returned behind its output, in its order: pooled1, indices1, pooled2, indices2, hidden1,
// hidden2.
using LenetActivations = std::array<at::Tensor, 6>;

// Checks the other arguments of lenet_backward, whose input and parameters check_lenet has seen. Returns the gradient
// of the output and the activations, contiguous.
std::pair<at::Tensor, LenetActivations> check_lenet_backward(const char* op, const at::Tensor& grad_output,
                                                             const at::Tensor& input, at::TensorList parameters,
                                                             const LenetActivations& activations);

// Convolution 5 x 5, pooling 2 x 2.
ConvPoolOptions lenet_convolution();

}  // namespace lenet_ext
