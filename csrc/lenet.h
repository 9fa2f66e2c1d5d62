// What the CPU and the CUDA side of the whole network share: the check of its arguments, the options of its layers.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv_relu_max_pool2d.h"

namespace lenet_ext {

// `parameters`: weight and bias of conv1, conv2, fc1, fc2, fc3.
void check_lenet(const char* op, const at::Tensor& input, at::TensorList parameters);

// Convolution 5 x 5, pooling 2 x 2.
ConvPoolOptions lenet_convolution();

}  // namespace lenet_ext
