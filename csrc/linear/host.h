// What linear and linear_relu do on every device: check, answer for an empty batch, call the vendor's matrix product,
// or hand contiguous rows to the device's kernels:
//
//   Device::Scope(tensor)                                     holds while the operator runs (device, no autograd)
//   Device::algorithm(shape, dtype)
//   Device::forward(scope, op, shape, rows, weight, bias, relu, output)      `bias` may be undefined
//   Device::backward(scope, op, shape, grad, mask, rows, weight, wanted)     so may `mask`, linear_relu's output, and
//                                                                            `rows` and `weight` where not needed
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "common/algorithm.h"
#include "linear/operators.h"

namespace lenet_ext {

template <typename Device>
class LinearHost {
  using Tensor = at::Tensor;
  using OptionalTensor = std::optional<Tensor>;

 public:
  // --8<-- [start:forward]
  static Tensor forward(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        bool relu) {
    const LinearShape s = check_linear(op, input, weight, bias);
    const typename Device::Scope scope(input);
    std::vector<int64_t> sizes = input.sizes().vec();
    sizes.back() = s.out_features;
    if (s.rows == 0 || s.out_features == 0) return at::empty(sizes, input.options());
    const Tensor rows = input.contiguous().view({s.rows, s.in_features});
    // An empty sum is the vendor's, too: kernels that walk along in_features would write nothing.
    if (s.in_features == 0 || Device::algorithm(s, input.scalar_type()) == Algorithm::Vendor) {
      // Not at::_addmm_activation, although its ReLU is free: whether it lets NaN pass is the GEMM library's secret.
      const Tensor output = bias.has_value() ? at::addmm(*bias, rows, weight.t()) : at::mm(rows, weight.t());
      if (relu) output.relu_();
      return output.view(sizes);
    }
    const Tensor output = at::empty(sizes, input.options());
    Device::forward(scope, op, s, rows, weight.contiguous(), bias.has_value() ? bias->contiguous() : Tensor(), relu,
                    output);
    return output;
  }
  // --8<-- [end:forward]

  static LayerGradients backward(const char* op, const Tensor& grad_output, const Tensor& output, const Tensor& input,
                                 const Tensor& weight, GradientMask wanted) {
    const LinearShape s = check_linear_backward(op, grad_output, output, input, weight, wanted);
    const typename Device::Scope scope(grad_output);
    std::vector<int64_t> input_sizes = grad_output.sizes().vec();
    input_sizes.back() = s.in_features;
    LayerGradients gradients;
    if (s.rows == 0 || s.out_features == 0) {
      if (wanted[0]) gradients.input = at::zeros(input_sizes, grad_output.options());
      if (wanted[1]) gradients.weight = at::zeros({s.out_features, s.in_features}, grad_output.options());
      if (wanted[2]) gradients.bias = at::zeros({s.out_features}, grad_output.options());
      return gradients;
    }
    Tensor grad = grad_output.reshape({s.rows, s.out_features});
    const Tensor rows = wanted[1] ? input.contiguous().view({s.rows, s.in_features}) : Tensor();
    const Tensor mask = output.defined() ? output.contiguous().view({s.rows, s.out_features}) : Tensor();
    if (Device::algorithm(s, grad.scalar_type()) == Algorithm::Direct) {
      gradients = Device::backward(scope, op, s, grad.contiguous(), mask, rows,
                                   wanted[0] ? weight.contiguous() : Tensor(), wanted);
    } else {
      // What is masked is a tensor of its own already, also where the gradient of a sum is one number everywhere.
      grad = mask.defined() ? at::threshold_backward(grad, mask, 0) : grad.contiguous();
      if (wanted[0]) gradients.input = at::mm(grad, weight);
      if (wanted[1]) gradients.weight = at::mm(grad.t(), rows);
      if (wanted[2]) gradients.bias = at::sum(grad, 0);
    }
    if (wanted[0]) gradients.input = gradients.input.view(input_sizes);
    return gradients;
  }

  static void register_operators(torch::Library& m) {
    m.impl("linear", &operator_linear);
    m.impl("linear_relu", &operator_linear_relu);
    m.impl("linear_backward", &operator_linear_backward);
    m.impl("linear_relu_backward", &operator_linear_relu_backward);
  }

 private:
  static Tensor operator_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
    return forward("linear", input, weight, bias, false);
  }

  static Tensor operator_linear_relu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
    return forward("linear_relu", input, weight, bias, true);
  }

  static std::tuple<Tensor, Tensor, Tensor> operator_linear_backward(const Tensor& grad_output,
                                                                     const OptionalTensor& input,
                                                                     const OptionalTensor& weight,
                                                                     GradientMask output_mask) {
    return to_outputs(backward("linear_backward", grad_output, Tensor(), input.value_or(Tensor()),
                               weight.value_or(Tensor()), output_mask),
                      grad_output.options());
  }

  static std::tuple<Tensor, Tensor, Tensor> operator_linear_relu_backward(const Tensor& grad_output,
                                                                          const Tensor& output,
                                                                          const OptionalTensor& input,
                                                                          const OptionalTensor& weight,
                                                                          GradientMask output_mask) {
    TORCH_CHECK(output.defined(), "linear_relu_backward: output is undefined");
    return to_outputs(backward("linear_relu_backward", grad_output, output, input.value_or(Tensor()),
                               weight.value_or(Tensor()), output_mask),
                      grad_output.options());
  }
};

}  // namespace lenet_ext
