// What the whole network's operators do on every device: check, and hand the rest to the device:
//
//   Device::forward(op, input, parameters, training) -> LenetLayers
//   Device::backward(op, grad_output, input, parameters, layers, input_gradient) -> LenetGradients    contiguous, but
//   for
//                                                                                      `input` and `parameters`
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "lenet/layers.h"

namespace lenet_ext {

template <typename Device>
class LenetHost {
  using Tensor = at::Tensor;

 public:
  static void register_operators(torch::Library& m) {
    m.impl("lenet", &operator_forward);
    m.impl("lenet_with_activations", &operator_with_activations);
    m.impl("lenet_backward", &operator_backward);
  }

 private:
  static Tensor operator_forward(const Tensor& input, at::TensorList parameters) {
    check_lenet("lenet", input, parameters);
    return Device::forward("lenet", input, parameters, false).output;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> operator_with_activations(
      const Tensor& input, at::TensorList parameters) {
    constexpr const char* op = "lenet_with_activations";
    check_lenet(op, input, parameters);
    const LenetLayers a = Device::forward(op, input, parameters, true);
    return {a.output, a.pooled1, a.indices1, a.pooled2, a.indices2, a.hidden1, a.hidden2};
  }

  static std::tuple<Tensor, std::vector<Tensor>> operator_backward(const Tensor& grad_output, const Tensor& input,
                                                                   at::TensorList parameters, const Tensor& pooled1,
                                                                   const Tensor& indices1, const Tensor& pooled2,
                                                                   const Tensor& indices2, const Tensor& hidden1,
                                                                   const Tensor& hidden2, bool input_gradient) {
    constexpr const char* op = "lenet_backward";
    check_lenet(op, input, parameters);
    const auto [grad, kept] = check_lenet_backward(op, grad_output, input, parameters,
                                                   {pooled1, indices1, pooled2, indices2, hidden1, hidden2});
    const LenetLayers layers{Tensor(), kept[0], kept[1], kept[2], kept[3], kept[4], kept[5]};
    LenetGradients gradients = Device::backward(op, grad, input, parameters, layers, input_gradient);
    if (!gradients.input.defined()) gradients.input = at::empty({0}, input.options());
    return {std::move(gradients.input), std::move(gradients.parameters)};
  }
};

}  // namespace lenet_ext
