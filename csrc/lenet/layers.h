// The whole network layer by layer, in the operators of a device: for what its own kernels do not take.
#pragma once

#include <vector>

#include "conv_relu_max_pool2d/operators.h"
#include "lenet/shape.h"
#include "linear/operators.h"

namespace lenet_ext {

// One device's operators.
struct LayerOperators {
  ConvReluMaxPool2d* conv;
  ConvReluMaxPool2dBackward* conv_backward;
  LinearOperator* linear;
  LinearBackwardOperator* linear_backward;
};

// Indices, and what is kept for a backward pass, are undefined where they are not wanted.
struct LenetLayers {
  at::Tensor output, pooled1, indices1, pooled2, indices2, hidden1, hidden2;
};

LenetLayers lenet_by_layers(const LayerOperators& device, const char* op, const at::Tensor& input,
                            at::TensorList parameters, bool training);

// The three linear layers alone, from `pooled2`.
void lenet_linear_by_layers(const LayerOperators& device, const char* op, at::TensorList parameters,
                            LenetLayers& layers);

// What lenet_backward returns. `input` is undefined where it is not wanted.
struct LenetGradients {
  at::Tensor input;
  std::vector<at::Tensor> parameters;
};

// The gradients of the three linear layers, of which fc1's input are the features.
struct LinearGradients {
  LayerGradients fc1, fc2, fc3;
};
LinearGradients lenet_linear_backward_by_layers(const LayerOperators& device, const char* op,
                                                const at::Tensor& grad_output, at::TensorList parameters,
                                                const LenetLayers& layers);

LenetGradients lenet_backward_by_layers(const LayerOperators& device, const char* op, const at::Tensor& grad_output,
                                        const at::Tensor& input, at::TensorList parameters, const LenetLayers& layers,
                                        bool input_gradient);

}  // namespace lenet_ext
