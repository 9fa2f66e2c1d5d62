// The derivatives of relu_avg_pool2d and of its backward operator, of any order, in both modes. The formulas are in
// lenet_ext/autograd.py, whose Function calls the same operators.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "common/derivative.h"
#include "relu_avg_pool2d/calls.h"
#include "relu_avg_pool2d/shape.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using Ints = at::IntArrayRef;
using torch::autograd::set_history;

// --- what a node keeps besides the tensors ---

template <typename Node>
void save_options(Node& node, const AvgPoolOptions& o) {
  for (const Ints values : {o.kernel_size, o.stride, o.padding}) node.save_options(values);
  node.save_option(o.ceil_mode);
  node.save_option(o.count_include_pad);
  node.save_option(o.divisor_override.value_or(0));
}

AvgPoolOptions saved_options(const Saved& saved) {
  const Ints all = saved.options;
  const std::optional<int64_t> divisor = all[8] != 0 ? std::optional<int64_t>(all[8]) : std::nullopt;
  return {all.slice(0, 2), all.slice(2, 2), all.slice(4, 2), all[6] != 0, all[7] != 0, divisor};
}

// --- the operators with these options ---

Tensor gradient(const Tensor& grad_output, const Tensor& input, const AvgPoolOptions& o) {
  return call::relu_avg_pool2d_backward().call(grad_output, input, o.kernel_size, o.stride, o.padding, o.ceil_mode,
                                               o.count_include_pad, o.divisor_override);
}

// The change of the output with the input, which is also that of the gradient's own gradient: the average of what ReLU
// lets pass.
Tensor change_of_average(const Tensor& change, const Tensor& input, const AvgPoolOptions& o) {
  return at::avg_pool2d(at::threshold_backward(change, input, 0), o.kernel_size, o.stride, o.padding, o.ceil_mode,
                        o.count_include_pad, o.divisor_override);
}

// --- the operators' derivatives ---

struct ReluAvgPoolDerivative {
  static constexpr const char* kName = "ReLUAvgPool2DBackward";

  static variable_list backward(const variable_list& grads, const Saved& saved, const Wanted&) {
    return {gradient(grads[0], saved.tensors[0], saved_options(saved))};
  }
};

Tensor relu_avg_pool2d(c10::DispatchKeySet keys, const Tensor& input, Ints kernel_size, Ints stride, Ints padding,
                       bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
  const AvgPoolOptions o{kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override};
  auto node = make_node<ReluAvgPoolDerivative>(input);
  if (node) {
    node->save(input);
    save_options(*node, o);
  }
  const Tensor output = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call::relu_avg_pool2d().redispatch(keys & c10::after_autograd_keyset, input, kernel_size, stride, padding,
                                              ceil_mode, count_include_pad, divisor_override);
  }();
  if (node) set_history(output, node);
  if (has_tangent(input)) set_tangent(output, change_of_average(tangent(input), primal(input), o));
  return output;
}

// saved: input. Linear in grad_output, and constant in input.
struct ReluAvgPoolBackwardDerivative {
  static constexpr const char* kName = "ReLUAvgPool2DBackwardBackward";

  static variable_list backward(const variable_list& grads, const Saved& saved, const Wanted& wanted) {
    const Tensor& input = saved.tensors[0];
    return {wanted[0] ? change_of_average(grads[0], input, saved_options(saved)) : Tensor(),
            wanted[1] ? at::zeros_like(input) : Tensor()};
  }
};

Tensor relu_avg_pool2d_backward(c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& input,
                                Ints kernel_size, Ints stride, Ints padding, bool ceil_mode, bool count_include_pad,
                                std::optional<int64_t> divisor_override) {
  const AvgPoolOptions o{kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override};
  auto node = make_node<ReluAvgPoolBackwardDerivative>(grad_output, input);
  if (node) {
    node->save(input);
    save_options(*node, o);
  }
  const Tensor grad_input = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call::relu_avg_pool2d_backward().redispatch(keys & c10::after_autograd_keyset, grad_output, input,
                                                       kernel_size, stride, padding, ceil_mode, count_include_pad,
                                                       divisor_override);
  }();
  if (node) set_history(grad_input, node);
  if (has_tangent(grad_output)) set_tangent(grad_input, gradient(tangent(grad_output), primal(input), o));
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, Autograd, m) {
  m.impl("relu_avg_pool2d", TORCH_FN(relu_avg_pool2d));
  m.impl("relu_avg_pool2d_backward", TORCH_FN(relu_avg_pool2d_backward));
}

}  // namespace lenet_ext
