// The derivatives of conv_relu_max_pool2d and of the operators that they consist of, of any order, in both modes. The
// formulas are in lenet_ext/autograd.py, whose Functions call the same operators.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "common/derivative.h"
#include "conv_relu_max_pool2d/calls.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using call::Ints;
using call::OptionalTensor;
using torch::autograd::set_history;

// --- what a node keeps besides tensors: the options, and the sizes of input and weight ---

template <typename Node>
void save_options(Node& node, const ConvPoolOptions& o) {
  for (const Ints values : {o.stride, o.padding, o.dilation}) node.save_options(values);
  node.save_option(o.groups);
  for (const Ints values : {o.pool_kernel_size, o.pool_stride, o.pool_padding, o.pool_dilation}) {
    node.save_options(values);
  }
}

ConvPoolOptions saved_options(const Saved& saved) {
  const Ints all = saved.options;
  return {all.slice(0, 2), all.slice(2, 4),  all.slice(6, 2),  all[8],
          all.slice(9, 2), all.slice(11, 2), all.slice(13, 2), all.slice(15, 2)};
}
constexpr size_t kOptions = 17;

c10::SymIntArrayRef input_size(const Saved& saved) { return c10::SymIntArrayRef(saved.sizes).slice(0, 4); }
c10::SymIntArrayRef weight_size(const Saved& saved) { return c10::SymIntArrayRef(saved.sizes).slice(4, 4); }

// --- the operators with these options ---

// Undefined where not wanted. `input` may be undefined where no gradient of weight is wanted, and the other way round.
variable_list gradients(const Tensor& grad_output, const Tensor& indices, const Tensor& input, const Tensor& weight,
                        c10::SymIntArrayRef input_size, c10::SymIntArrayRef weight_size, const ConvPoolOptions& o,
                        GradientMask wanted) {
  auto [of_input, of_weight, of_bias] = call::conv_relu_max_pool2d_backward().call(
      grad_output, indices, optional(input), optional(weight), input_size, weight_size, o.stride, o.padding, o.dilation,
      o.groups, o.pool_kernel_size, o.pool_stride, o.pool_padding, o.pool_dilation, wanted);
  return {wanted[0] ? of_input : Tensor(), wanted[1] ? of_weight : Tensor(), wanted[2] ? of_bias : Tensor()};
}

Tensor at_indices(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& indices,
                  const ConvPoolOptions& o) {
  return call::conv_at_indices().call(input, weight, optional(bias), indices, o.stride, o.padding, o.dilation, o.groups,
                                      o.pool_kernel_size, o.pool_stride, o.pool_padding, o.pool_dilation);
}

// The change of the output with its arguments, for these winners: C(x', W) + C(x, W') + b'. Undefined: no change.
Tensor change_at_indices(const Tensor& input_change, const Tensor& weight, const Tensor& input,
                         const Tensor& weight_change, Tensor bias_change, const Tensor& indices,
                         const ConvPoolOptions& o) {
  Tensor change;
  if (input_change.defined()) {
    change = at_indices(input_change, weight, std::exchange(bias_change, Tensor()), indices, o);
  }
  if (weight_change.defined()) {
    change = sum_of(change, at_indices(input, weight_change, std::exchange(bias_change, Tensor()), indices, o));
  }
  if (!bias_change.defined()) return change;
  const Tensor everywhere = bias_change.reshape({-1, 1, 1});
  return at::where(indices.eq(kDead), at::zeros_like(everywhere), everywhere);
}

// --- the forward operators ---

// saved: indices, input, weight; behind the options, whether weight is laid out as channels_last
struct ConvDerivative {
  static constexpr const char* kName = "ConvReLUMaxPool2DBackward";

  static variable_list backward(const variable_list& grads, const Saved& saved, const Wanted& wanted) {
    variable_list result = gradients(grads[0], saved.tensors[0], saved.tensors[1], saved.tensors[2], input_size(saved),
                                     weight_size(saved), saved_options(saved), {wanted[0], wanted[1], wanted[2]});
    // As stock does; an optimizer's step is faster on tensors that are laid out alike. Where the operator was given
    // weight, it has done so. Not by its name, channels_last, which torch.func.vmap refuses.
    if (result[1].defined() && saved.options[kOptions] != 0) {
      result[1] = result[1].permute({0, 2, 3, 1}).contiguous().permute({0, 3, 1, 2});
    }
    return result;
  }
};

template <typename Node>
void save_for_gradients(Node& node, const Tensor& indices, const Tensor& input, const Tensor& weight,
                        const ConvPoolOptions& o) {
  node.save(indices);
  node.save_if(node.should_compute_output(1), input);
  node.save_if(node.should_compute_output(0), weight);
  node.save_sizes(input.sym_sizes());
  node.save_sizes(weight.sym_sizes());
  save_options(node, o);
  node.save_option(output_memory_format(weight) == at::MemoryFormat::ChannelsLast);
}

std::tuple<Tensor, Tensor> conv_relu_max_pool2d_with_indices(c10::DispatchKeySet keys, const Tensor& input,
                                                             const Tensor& weight, const OptionalTensor& bias,
                                                             Ints stride, Ints padding, Ints dilation, int64_t groups,
                                                             Ints pool_kernel_size, Ints pool_stride, Ints pool_padding,
                                                             Ints pool_dilation, bool ceil_mode) {
  auto node = make_node<ConvDerivative>(input, weight, bias);
  auto [output, indices] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call::conv_relu_max_pool2d_with_indices().redispatch(keys & c10::after_autograd_keyset, input, weight, bias,
                                                                stride, padding, dilation, groups, pool_kernel_size,
                                                                pool_stride, pool_padding, pool_dilation, ceil_mode);
  }();
  const ConvPoolOptions o{stride,           padding,     dilation,     groups,
                          pool_kernel_size, pool_stride, pool_padding, pool_dilation};
  if (node) {
    save_for_gradients(*node, indices, input, weight, o);
    set_history(output, node);
  }
  if (has_tangent(input, weight, bias)) {
    set_tangent(output, change_at_indices(tangent(input), primal(weight), primal(input), tangent(weight), tangent(bias),
                                          indices, o));
  }
  return {output, indices};
}

// Where a derivative is wanted, the operator that finds the winners as well.
Tensor conv_relu_max_pool2d(c10::DispatchKeySet keys, const Tensor& input, const Tensor& weight,
                            const OptionalTensor& bias, Ints stride, Ints padding, Ints dilation, int64_t groups,
                            Ints pool_kernel_size, Ints pool_stride, Ints pool_padding, Ints pool_dilation,
                            bool ceil_mode) {
  if (torch::autograd::compute_requires_grad(input, weight, bias) || has_tangent(input, weight, bias)) {
    return std::get<0>(conv_relu_max_pool2d_with_indices(keys, input, weight, bias, stride, padding, dilation, groups,
                                                         pool_kernel_size, pool_stride, pool_padding, pool_dilation,
                                                         ceil_mode));
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call::conv_relu_max_pool2d().redispatch(keys & c10::after_autograd_keyset, input, weight, bias, stride,
                                                 padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding,
                                                 pool_dilation, ceil_mode);
}

// The convolution at given winners has the gradients of the operator that found them.
Tensor conv_at_indices(c10::DispatchKeySet keys, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       const Tensor& indices, Ints stride, Ints padding, Ints dilation, int64_t groups,
                       Ints pool_kernel_size, Ints pool_stride, Ints pool_padding, Ints pool_dilation) {
  const ConvPoolOptions o{stride,           padding,     dilation,     groups,
                          pool_kernel_size, pool_stride, pool_padding, pool_dilation};
  auto node = make_node<ConvDerivative>(input, weight, bias);
  if (node) save_for_gradients(*node, indices, input, weight, o);
  const Tensor output = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call::conv_at_indices().redispatch(keys & c10::after_autograd_keyset, input, weight, bias, indices, stride,
                                              padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding,
                                              pool_dilation);
  }();
  if (node) set_history(output, node);
  if (has_tangent(input, weight, bias)) {
    set_tangent(output, change_at_indices(tangent(input), primal(weight), primal(input), tangent(weight), tangent(bias),
                                          indices, o));
  }
  return output;
}

// --- the backward operator: linear in grad_output, input and weight each, for given winners ---

// saved: indices, input, weight, grad_output
struct ConvBackwardDerivative {
  static constexpr const char* kName = "ConvReLUMaxPool2DBackwardBackward";

  static variable_list backward(const variable_list& grads, const Saved& saved, const Wanted& wanted) {
    const Tensor &from_input = grads[0], &from_weight = grads[1], &from_bias = grads[2];
    const Tensor &indices = saved.tensors[0], &input = saved.tensors[1], &weight = saved.tensors[2],
                 &grad_output = saved.tensors[3];
    const ConvPoolOptions o = saved_options(saved);
    variable_list result(3);
    if (wanted[0]) result[0] = change_at_indices(from_input, weight, input, from_weight, from_bias, indices, o);
    // Where nothing came for the gradient that depends on it, the derivative is zero, and stock says so.
    if (wanted[1]) {
      result[1] = from_weight.defined() ? gradients(grad_output, indices, Tensor(), from_weight, input_size(saved),
                                                    weight_size(saved), o, {true, false, false})[0]
                                        : at::zeros_like(input);
    }
    if (wanted[2]) {
      result[2] = from_input.defined() ? gradients(grad_output, indices, from_input, Tensor(), input_size(saved),
                                                   weight_size(saved), o, {false, true, false})[1]
                                       : at::zeros_like(weight);
    }
    return result;
  }
};

call::ConvGradients conv_relu_max_pool2d_backward(c10::DispatchKeySet keys, const Tensor& grad_output,
                                                  const Tensor& indices, const OptionalTensor& input,
                                                  const OptionalTensor& weight, c10::SymIntArrayRef input_size,
                                                  c10::SymIntArrayRef weight_size, Ints stride, Ints padding,
                                                  Ints dilation, int64_t groups, Ints pool_kernel_size,
                                                  Ints pool_stride, Ints pool_padding, Ints pool_dilation,
                                                  GradientMask mask) {
  const ConvPoolOptions o{stride,           padding,     dilation,     groups,
                          pool_kernel_size, pool_stride, pool_padding, pool_dilation};
  auto node = make_node<ConvBackwardDerivative>(grad_output, input, weight);
  if (node) {
    const bool of_grad = node->should_compute_output(0), of_input = node->should_compute_output(1),
               of_weight = node->should_compute_output(2);
    node->save(indices);
    node->save_if(of_grad || of_input, input);  // of_input: for the shape of its zeros
    node->save_if(of_grad || of_weight, weight);
    node->save_if(of_input || of_weight, grad_output);
    node->save_sizes(input_size);
    node->save_sizes(weight_size);
    save_options(*node, o);
  }
  call::ConvGradients result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call::conv_relu_max_pool2d_backward().redispatch(
        keys & c10::after_autograd_keyset, grad_output, indices, input, weight, input_size, weight_size, stride,
        padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding, pool_dilation, mask);
  }();
  auto& [grad_input, grad_weight, grad_bias] = result;
  if (node) {
    set_history(mask[0] ? grad_input : Tensor(), node);
    set_history(mask[1] ? grad_weight : Tensor(), node);
    set_history(mask[2] ? grad_bias : Tensor(), node);
  }
  if (has_tangent(grad_output, input, weight)) {
    const Tensor grad_change = tangent(grad_output), input_change = tangent(input), weight_change = tangent(weight);
    variable_list changes(3);
    if (grad_change.defined()) {
      changes = gradients(grad_change, indices, primal(input), primal(weight), input_size, weight_size, o, mask);
    }
    const GradientMask others = {mask[0] && weight_change.defined(), mask[1] && input_change.defined(), false};
    if (others[0] || others[1]) {
      const variable_list more =
          gradients(primal(grad_output), indices, input_change, weight_change, input_size, weight_size, o, others);
      for (int i = 0; i < 3; ++i) changes[i] = sum_of(changes[i], more[i]);
    }
    set_tangent(grad_input, changes[0]), set_tangent(grad_weight, changes[1]), set_tangent(grad_bias, changes[2]);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, Autograd, m) {
  m.impl("conv_relu_max_pool2d", TORCH_FN(conv_relu_max_pool2d));
  m.impl("conv_relu_max_pool2d_with_indices", TORCH_FN(conv_relu_max_pool2d_with_indices));
  m.impl("conv_relu_max_pool2d_backward", TORCH_FN(conv_relu_max_pool2d_backward));
  m.impl("conv_at_indices", TORCH_FN(conv_at_indices));
}

}  // namespace lenet_ext
