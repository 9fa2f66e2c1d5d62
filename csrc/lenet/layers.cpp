#include "lenet/layers.h"

namespace lenet_ext {

using at::Tensor;

LenetLayers lenet_by_layers(const LayerOperators& device, const char* op, const Tensor& input, at::TensorList p,
                            bool training) {
  LenetLayers a;
  const ConvPoolOptions o = lenet_convolution();
  a.pooled1 = device.conv(op, input, p[0], p[1], o, false, training ? &a.indices1 : nullptr);
  a.pooled2 = device.conv(op, a.pooled1, p[2], p[3], o, false, training ? &a.indices2 : nullptr);
  lenet_linear_by_layers(device, op, p, a);
  return a;
}

void lenet_linear_by_layers(const LayerOperators& device, const char* op, at::TensorList p, LenetLayers& a) {
  a.hidden1 = device.linear(op, a.pooled2.view({a.pooled2.size(0), kLenetFeatures}), p[4], p[5], true);
  a.hidden2 = device.linear(op, a.hidden1, p[6], p[7], true);
  a.output = device.linear(op, a.hidden2, p[8], p[9], false);
}

LinearGradients lenet_linear_backward_by_layers(const LayerOperators& device, const char* op, const Tensor& grad_output,
                                                at::TensorList p, const LenetLayers& a) {
  constexpr GradientMask all = {true, true, true};
  const Tensor features = a.pooled2.view({a.pooled2.size(0), kLenetFeatures});
  LinearGradients of;
  of.fc3 = device.linear_backward(op, grad_output, Tensor(), a.hidden2, p[8], all);
  of.fc2 = device.linear_backward(op, of.fc3.input, a.hidden2, a.hidden1, p[6], all);
  of.fc1 = device.linear_backward(op, of.fc2.input, a.hidden1, features, p[4], all);
  return of;
}

LenetGradients lenet_backward_by_layers(const LayerOperators& device, const char* op, const Tensor& grad_output,
                                        const Tensor& input, at::TensorList p, const LenetLayers& a,
                                        bool input_gradient) {
  const ConvPoolOptions o = lenet_convolution();
  const auto [fc1, fc2, fc3] = lenet_linear_backward_by_layers(device, op, grad_output, p, a);
  const LayerGradients conv2 = device.conv_backward(op, fc1.input.view(a.pooled2.sizes()), a.indices2, a.pooled1, p[2],
                                                    a.pooled1.sizes(), p[2].sizes(), o, {true, true, true});
  const LayerGradients conv1 = device.conv_backward(op, conv2.input, a.indices1, input, p[0], input.sizes(),
                                                    p[0].sizes(), o, {input_gradient, true, true});
  return {conv1.input,
          {conv1.weight.contiguous(), conv1.bias, conv2.weight.contiguous(), conv2.bias, fc1.weight, fc1.bias,
           fc2.weight, fc2.bias, fc3.weight, fc3.bias}};
}

}  // namespace lenet_ext
