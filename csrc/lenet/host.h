// What the whole network's operators do on every device: check, and hand the rest to the device:
//
//   Device::forward(op, input, parameters, training) -> LenetLayers
//   Device::backward(op, grad_output, input, parameters, layers, input_gradient) -> LenetGradients
//     all tensors contiguous, but for `input` and `parameters`
//   Device::training_step(op, call) -> LossAndCorrect, if the device has kernels for a step as a whole
//   Device::update(call, gradients) -> whether the device has kernels of its own for it, and has done it
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "lenet/layers.h"
#include "lenet/training_step.h"

namespace lenet_ext {

template <typename Device>
class LenetHost {
  using Tensor = at::Tensor;

 public:
  static void register_operators(torch::Library& m) {
    m.impl("lenet", &operator_forward);
    m.impl("lenet_with_activations", &operator_with_activations);
    m.impl("lenet_backward", &operator_backward);
    m.impl("lenet_training_step", &operator_training_step);
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

  // Everything is checked before anything is changed.
  static std::tuple<Tensor, Tensor> operator_training_step(const Tensor& input, const Tensor& targets,
                                                           const std::optional<Tensor>& weight,
                                                           at::TensorList parameters, at::TensorList state,
                                                           c10::string_view loss, double label_smoothing,
                                                           int64_t ignore_index, c10::string_view optimizer,
                                                           at::ArrayRef<double> options) {
    constexpr const char* op = "lenet_training_step";
    check_lenet(op, input, parameters);
    TORCH_CHECK(input.size(0) > 0, op, ": input must have at least one image, got shape ", input.sizes());
    const OptimizerState optimizer_state = check_optimizer(op, optimizer, parameters, state, options);
    const LossOptions loss_options{loss, weight, label_smoothing, ignore_index};
    check_loss(op, input, {input.size(0), parameters[8].size(0)}, targets, loss_options);
    const at::AutoDispatchBelowADInplaceOrView guard;
    const TrainingStepCall call{input, targets, parameters, loss_options, optimizer, optimizer_state, options};
    if (const std::optional<LossAndCorrect> done = Device::training_step(op, call)) return {done->loss, done->correct};
    const LenetLayers layers = Device::forward(op, input, parameters, true);
    const LossAndGradient result = loss_and_gradient(layers.output, targets, loss_options);
    const LenetGradients gradients = Device::backward(op, result.gradient, input, parameters, layers, false);
    if (!Device::update(call, gradients.parameters)) {
      update(optimizer, parameters, gradients.parameters, optimizer_state, options);
    }
    return {result.of_batch.loss, result.of_batch.correct};
  }
};

}  // namespace lenet_ext
