// The derivatives of linear, linear_relu and their backward operators, of any order, in both modes. The formulas are in
// lenet_ext/autograd.py, whose Functions call the same operators.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "common/derivative.h"
#include "linear/calls.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::set_history;

GradientMask mask_of(const Wanted& wanted) { return {wanted[0], wanted[1], wanted[2]}; }

variable_list wanted_of(call::ThreeTensors&& gradients, const GradientMask& mask) {
  auto& [input, weight, bias] = gradients;
  return {mask[0] ? input : Tensor(), mask[1] ? weight : Tensor(), mask[2] ? bias : Tensor()};
}

// The change of linear's output with its arguments: x' W^T + x W'^T + b'. Undefined: no change.
Tensor linear_change(const Tensor& input_change, const Tensor& weight, const Tensor& input, const Tensor& weight_change,
                     Tensor bias_change, c10::SymIntArrayRef output_sizes) {
  Tensor change;
  if (input_change.defined()) {
    change = call::linear().call(input_change, weight, optional(std::exchange(bias_change, Tensor())));
  }
  if (weight_change.defined()) {
    change = sum_of(change, call::linear().call(input, weight_change, optional(std::exchange(bias_change, Tensor()))));
  }
  return bias_change.defined() ? bias_change.expand_symint(output_sizes) : change;
}

std::vector<c10::SymInt> output_sizes(const Tensor& input, const Tensor& weight) {
  std::vector<c10::SymInt> sizes = input.sym_sizes().vec();
  sizes.back() = weight.sym_size(0);
  return sizes;
}

// --- linear and linear_relu ---

struct LinearDerivative {
  static constexpr const char* kName = "LinearBackward";

  static variable_list backward(const variable_list& grads, const Saved& saved, const Wanted& wanted) {
    const GradientMask mask = mask_of(wanted);
    return wanted_of(
        call::linear_backward().call(grads[0], optional(saved.tensors[0]), optional(saved.tensors[1]), mask), mask);
  }
};

// --8<-- [start:forward]
struct LinearReluDerivative {
  static constexpr const char* kName = "LinearReLUBackward";

  static variable_list backward(const variable_list& grads, const Saved& saved, const Wanted& wanted) {
    const GradientMask mask = mask_of(wanted);
    return wanted_of(call::linear_relu_backward().call(grads[0], saved.tensors[2], optional(saved.tensors[0]),
                                                       optional(saved.tensors[1]), mask),
                     mask);
  }
};

template <typename Derivative, bool relu>
Tensor forward(c10::DispatchKeySet keys, const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  auto node = make_node<Derivative>(input, weight, bias);
  if (node) {
    node->save_if(node->should_compute_output(1), input);
    node->save_if(node->should_compute_output(0), weight);
  }
  const auto& op = relu ? call::linear_relu() : call::linear();
  const Tensor output = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.redispatch(keys & c10::after_autograd_keyset, input, weight, bias);
  }();
  if (node) {
    set_history(output, node);
    if (relu) node->save(output, /*is_output=*/true);
  }
  if (has_tangent(input, weight, bias)) {
    Tensor change = linear_change(tangent(input), primal(weight), primal(input), tangent(weight), tangent(bias),
                                  output_sizes(input, weight));
    if (relu) change = at::threshold_backward(change, primal(output), 0);
    set_tangent(output, change);
  }
  return output;
}
// --8<-- [end:forward]

// --- their backward operators: linear in grad_output, input and weight each ---

// saved: grad_output, input, weight and, for linear_relu, output
template <bool relu>
struct LinearBackwardDerivative {
  static constexpr const char* kName = relu ? "LinearReLUBackwardBackward" : "LinearBackwardBackward";

  static call::ThreeTensors gradients(const Saved& saved, const Tensor& input, const Tensor& weight,
                                      GradientMask mask) {
    const Tensor& grad_output = saved.tensors[0];
    return relu ? call::linear_relu_backward().call(grad_output, saved.tensors[3], optional(input), optional(weight),
                                                    mask)
                : call::linear_backward().call(grad_output, optional(input), optional(weight), mask);
  }

  static variable_list backward(const variable_list& grads, const Saved& saved, const Wanted& wanted) {
    const Tensor &from_input = grads[0], &from_weight = grads[1], &from_bias = grads[2];
    variable_list result(wanted.size());
    if (wanted[0]) {
      result[0] = linear_change(from_input, saved.tensors[2], saved.tensors[1], from_weight, from_bias, saved.sizes);
      if (relu) result[0] = at::threshold_backward(result[0], saved.tensors[3], 0);
    }
    // Where nothing came for the gradient that depends on it, the derivative is zero, and stock says so.
    if (wanted[1]) {
      result[1] = from_weight.defined() ? std::get<0>(gradients(saved, Tensor(), from_weight, {true, false, false}))
                                        : at::zeros_like(saved.tensors[1]);
    }
    if (wanted[2]) {
      result[2] = from_input.defined() ? std::get<1>(gradients(saved, from_input, Tensor(), {false, true, false}))
                                       : at::zeros_like(saved.tensors[2]);
    }
    if (relu && wanted[3]) result[3] = at::zeros_like(saved.tensors[3]);
    return result;
  }
};

template <bool relu>
call::ThreeTensors call_backward(const Tensor& grad_output, const Tensor& output, const Tensor& input,
                                 const Tensor& weight, GradientMask mask) {
  return relu ? call::linear_relu_backward().call(grad_output, output, optional(input), optional(weight), mask)
              : call::linear_backward().call(grad_output, optional(input), optional(weight), mask);
}

// `output` is undefined for linear.
template <bool relu, typename Below>
call::ThreeTensors backward(const Below& below, const Tensor& grad_output, const Tensor& output,
                            const OptionalTensor& input, const OptionalTensor& weight, GradientMask mask) {
  auto node = make_node<LinearBackwardDerivative<relu>>(grad_output, input, weight, output);
  if (node) {
    const bool of_grad = node->should_compute_output(0), of_input = node->should_compute_output(1),
               of_weight = node->should_compute_output(2);
    node->save_if(of_input || of_weight, grad_output);
    node->save_if(of_grad || of_input, input);  // of_input: for the shape of its zeros
    node->save_if(of_grad || of_weight, weight);
    if (relu) node->save(output);
    node->save_sizes(grad_output.sym_sizes());
  }
  call::ThreeTensors gradients = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return below();
  }();
  auto& [grad_input, grad_weight, grad_bias] = gradients;
  if (node) {
    set_history(mask[0] ? grad_input : Tensor(), node);
    set_history(mask[1] ? grad_weight : Tensor(), node);
    set_history(mask[2] ? grad_bias : Tensor(), node);
  }
  if (has_tangent(grad_output, input, weight)) {
    const Tensor grad_change = tangent(grad_output), input_change = tangent(input), weight_change = tangent(weight);
    variable_list changes(3);
    if (grad_change.defined()) {
      changes = wanted_of(call_backward<relu>(grad_change, primal(output), primal(input), primal(weight), mask), mask);
    }
    const GradientMask others = {mask[0] && weight_change.defined(), mask[1] && input_change.defined(), false};
    if (others[0] || others[1]) {
      const variable_list more = wanted_of(
          call_backward<relu>(primal(grad_output), primal(output), input_change, weight_change, others), others);
      for (int i = 0; i < 3; ++i) changes[i] = sum_of(changes[i], more[i]);
    }
    set_tangent(grad_input, changes[0]), set_tangent(grad_weight, changes[1]), set_tangent(grad_bias, changes[2]);
  }
  return gradients;
}

call::ThreeTensors linear_backward(c10::DispatchKeySet keys, const Tensor& grad_output, const OptionalTensor& input,
                                   const OptionalTensor& weight, GradientMask mask) {
  return backward<false>(
      [&] {
        return call::linear_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, input, weight, mask);
      },
      grad_output, Tensor(), input, weight, mask);
}

call::ThreeTensors linear_relu_backward(c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& output,
                                        const OptionalTensor& input, const OptionalTensor& weight, GradientMask mask) {
  return backward<true>(
      [&] {
        return call::linear_relu_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, output, input,
                                                       weight, mask);
      },
      grad_output, output, input, weight, mask);
}

}  // namespace

// --8<-- [start:register]
TORCH_LIBRARY_IMPL(lenet_ext, Autograd, m) {
  m.impl("linear", TORCH_FN((forward<LinearDerivative, false>)));
  m.impl("linear_relu", TORCH_FN((forward<LinearReluDerivative, true>)));
  m.impl("linear_backward", TORCH_FN(linear_backward));
  m.impl("linear_relu_backward", TORCH_FN(linear_relu_backward));
}
// --8<-- [end:register]

}  // namespace lenet_ext
