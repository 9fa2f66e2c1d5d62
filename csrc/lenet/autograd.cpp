// The derivative of the whole network: one operator forward and one backward where every parameter is trained, and that
// of its layers for all else: part of the parameters, forward-mode AD, derivatives of the derivative.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "common/derivative.h"
#include "conv_relu_max_pool2d/calls.h"
#include "lenet/calls.h"
#include "lenet/shape.h"
#include "linear/calls.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::set_history;

std::tuple<Tensor, Tensor> convolution(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  const ConvPoolOptions o = lenet_convolution();
  return call::conv_relu_max_pool2d_with_indices().call(input, weight, bias, o.stride, o.padding, o.dilation, o.groups,
                                                        o.pool_kernel_size, o.pool_stride, o.pool_padding,
                                                        o.pool_dilation, false);
}

call::ConvGradients convolution_backward(const Tensor& grad, const Tensor& indices, const Tensor& input,
                                         const Tensor& weight, GradientMask mask) {
  const ConvPoolOptions o = lenet_convolution();
  return call::conv_relu_max_pool2d_backward().call(grad, indices, input, weight, input.sym_sizes(), weight.sym_sizes(),
                                                    o.stride, o.padding, o.dilation, o.groups, o.pool_kernel_size,
                                                    o.pool_stride, o.pool_padding, o.pool_dilation, mask);
}

// The layers, each with its own derivative.
Tensor by_layers(const Tensor& input, TensorList p) {
  const ConvPoolOptions o = lenet_convolution();
  const auto conv = [&o](const Tensor& from, const Tensor& weight, const Tensor& bias) {
    return call::conv_relu_max_pool2d().call(from, weight, bias, o.stride, o.padding, o.dilation, o.groups,
                                             o.pool_kernel_size, o.pool_stride, o.pool_padding, o.pool_dilation, false);
  };
  const Tensor features = conv(conv(input, p[0], p[1]), p[2], p[3]).flatten(1);
  const Tensor hidden = call::linear_relu().call(call::linear_relu().call(features, p[4], p[5]), p[6], p[7]);
  return call::linear().call(hidden, p[8], p[9]);
}

// What the layers leave, each with its own derivative; in the order in which lenet_with_activations returns it.
LenetActivations activations(const Tensor& input, TensorList p) {
  const auto [pooled1, indices1] = convolution(input, p[0], p[1]);
  const auto [pooled2, indices2] = convolution(pooled1, p[2], p[3]);
  const Tensor hidden1 = call::linear_relu().call(pooled2.flatten(1), p[4], p[5]);
  return {pooled1, indices1, pooled2, indices2, hidden1, call::linear_relu().call(hidden1, p[6], p[7])};
}

// The gradients layer by layer, in operators that can be differentiated again and have rules for vmap.
variable_list backward_by_layers(const Tensor& grad_output, const Tensor& input, TensorList p,
                                 const LenetActivations& kept, bool input_gradient) {
  constexpr GradientMask all = {true, true, true};
  const auto& [pooled1, indices1, pooled2, indices2, hidden1, hidden2] = kept;
  const Tensor features = pooled2.flatten(1);
  const auto [grad_hidden2, fc3_weight, fc3_bias] = call::linear_backward().call(grad_output, hidden2, p[8], all);
  const auto [grad_hidden1, fc2_weight, fc2_bias] =
      call::linear_relu_backward().call(grad_hidden2, hidden2, hidden1, p[6], all);
  const auto [grad_features, fc1_weight, fc1_bias] =
      call::linear_relu_backward().call(grad_hidden1, hidden1, features, p[4], all);
  const auto [grad_pooled1, conv2_weight, conv2_bias] =
      convolution_backward(grad_features.view_as(pooled2), indices2, pooled1, p[2], all);
  const auto [grad_input, conv1_weight, conv1_bias] =
      convolution_backward(grad_pooled1, indices1, input, p[0], {input_gradient, true, true});
  return {conv1_weight,
          conv1_bias,
          conv2_weight,
          conv2_bias,
          fc1_weight,
          fc1_bias,
          fc2_weight,
          fc2_bias,
          fc3_weight,
          fc3_bias,
          input_gradient ? grad_input : Tensor()};
}

// Several gradients at once, of torch.func.vmap or of torch.autograd.grad(is_grads_batched=True).
bool is_mapped(const Tensor& grad) {
  const c10::DispatchKeySet keys = grad.key_set();
  return keys.has(c10::DispatchKey::Batched) || keys.has(c10::DispatchKey::FuncTorchBatched);
}

// saved: the ten parameters, the input, then what lenet_with_activations returned behind its output
struct LenetDerivative {
  static constexpr const char* kName = "LeNetBackward";

  static variable_list backward(const variable_list& grads, const Saved& saved, const Wanted& wanted) {
    const TensorList parameters = TensorList(saved.tensors).slice(0, 10);
    const Tensor& input = saved.tensors[10];
    LenetActivations kept;
    std::copy_n(saved.tensors.begin() + 11, kept.size(), kept.begin());
    const bool is_differentiated = at::GradMode::is_enabled();
    if (is_differentiated || is_mapped(grads[0])) {
      return backward_by_layers(grads[0], input, parameters, is_differentiated ? activations(input, parameters) : kept,
                                wanted[10]);
    }
    auto [grad_input, gradients] = call::lenet_backward().call(grads[0], input, parameters, kept[0], kept[1], kept[2],
                                                               kept[3], kept[4], kept[5], wanted[10]);
    gradients.push_back(wanted[10] ? grad_input : Tensor());
    return std::move(gradients);
  }
};

bool all_require_grad(TensorList tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) { return tensor.requires_grad(); });
}

Tensor lenet(c10::DispatchKeySet keys, const Tensor& input, TensorList parameters) {
  check_lenet("lenet", input, parameters);
  const c10::DispatchKeySet below = keys & c10::after_autograd_keyset;
  const bool tangents = has_tangent(input) || torch::autograd::isFwGradDefinedTensorList(parameters);
  if (!tangents && !torch::autograd::compute_requires_grad(input, parameters)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call::lenet().redispatch(below, input, parameters);
  }
  if (tangents || !all_require_grad(parameters)) return by_layers(input, parameters);
  auto node = make_node<LenetDerivative>(parameters, input);
  for (size_t i = 0; i < 10; i += 2) {
    node->save(parameters[i]);
    node->save_for_second(parameters[i + 1]);  // no gradient needs the value of a bias
  }
  node->save(input);
  auto [output, pooled1, indices1, pooled2, indices2, hidden1, hidden2] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call::lenet_with_activations().redispatch(below, input, parameters);
  }();
  for (const Tensor& kept : {pooled1, indices1, pooled2, indices2, hidden1, hidden2}) node->save(kept);
  set_history(output, node);
  return output;
}

// What is inside the derivative has none of its own: whoever calls it himself with tensors that require a gradient is
// told so, instead of getting none.
template <typename... Tensors>
void refuse_gradients(const char* op, const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::compute_requires_grad(tensors...) && !has_tangent(tensors...), op,
                              ": this operator has no derivative; call torch.ops.lenet_ext.lenet, or the layers");
}

call::LenetOutputs lenet_with_activations(c10::DispatchKeySet keys, const Tensor& input, TensorList parameters) {
  refuse_gradients("lenet_with_activations", input);
  for (const Tensor& parameter : parameters) refuse_gradients("lenet_with_activations", parameter);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call::lenet_with_activations().redispatch(keys & c10::after_autograd_keyset, input, parameters);
}

std::tuple<Tensor, std::vector<Tensor>> lenet_backward(c10::DispatchKeySet keys, const Tensor& grad_output,
                                                       const Tensor& input, TensorList parameters,
                                                       const Tensor& pooled1, const Tensor& indices1,
                                                       const Tensor& pooled2, const Tensor& indices2,
                                                       const Tensor& hidden1, const Tensor& hidden2,
                                                       bool input_gradient) {
  refuse_gradients("lenet_backward", grad_output, input, pooled1, pooled2, hidden1, hidden2);
  for (const Tensor& parameter : parameters) refuse_gradients("lenet_backward", parameter);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call::lenet_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, input, parameters, pooled1,
                                           indices1, pooled2, indices2, hidden1, hidden2, input_gradient);
}

// A training step is an update, not a function: nothing can be differentiated through it, and what it changes has a new
// version, so that a graph that still needs the old values says so.
std::tuple<Tensor, Tensor> lenet_training_step(c10::DispatchKeySet keys, const Tensor& input, const Tensor& targets,
                                               const std::optional<Tensor>& weight, TensorList parameters,
                                               TensorList state, c10::string_view loss, double label_smoothing,
                                               int64_t ignore_index, c10::string_view optimizer,
                                               at::ArrayRef<double> options) {
  std::tuple<Tensor, Tensor> result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call::lenet_training_step().redispatch(keys & c10::after_autograd_keyset, input, targets, weight, parameters,
                                                  state, loss, label_smoothing, ignore_index, optimizer, options);
  }();
  for (const TensorList list : {parameters, state}) {
    for (const Tensor& tensor : list) torch::autograd::impl::bump_version(tensor);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, Autograd, m) {
  m.impl("lenet_training_step", TORCH_FN(lenet_training_step));
  m.impl("lenet", TORCH_FN(lenet));
  m.impl("lenet_with_activations", TORCH_FN(lenet_with_activations));
  m.impl("lenet_backward", TORCH_FN(lenet_backward));
}

// Under autocast each layer casts its own arguments, as stock's do.
TORCH_LIBRARY_IMPL(lenet_ext, AutocastCPU, m) { m.impl("lenet", TORCH_FN(by_layers)); }
TORCH_LIBRARY_IMPL(lenet_ext, AutocastCUDA, m) { m.impl("lenet", TORCH_FN(by_layers)); }

}  // namespace lenet_ext
