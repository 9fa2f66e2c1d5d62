// What relu_avg_pool2d and its backward operator do on every device: check, allocate, answer for an empty batch, and
// hand tensors of one layout (contiguous, or channels_last where the input is) to the device's kernels:
//
//   Device::Scope(tensor)                                     holds while the operator runs (device, no autograd)
//   Device::check(op, shape)                                  limits of the kernels beyond the shape's own
//   Device::forward(scope, op, shape, input, output)
//   Device::backward(scope, op, shape, grad_output, input, grad_input)
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "relu_avg_pool2d/shape.h"

namespace lenet_ext {

template <typename Device>
class ReluAvgPool2dHost {
  using Tensor = at::Tensor;
  using Ints = at::IntArrayRef;

 public:
  static void register_operators(torch::Library& m) {
    m.impl("relu_avg_pool2d", &forward);
    m.impl("relu_avg_pool2d_backward", &backward);
  }

 private:
  static Tensor forward(const Tensor& input, Ints kernel_size, Ints stride, Ints padding, bool ceil_mode,
                        bool count_include_pad, std::optional<int64_t> divisor_override) {
    constexpr const char* op = "relu_avg_pool2d";
    const AvgPoolShape s = check_relu_avg_pool2d(
        op, input, {kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override});
    Device::check(op, s);
    const typename Device::Scope scope(input);
    const at::MemoryFormat format = output_memory_format(input);
    const Tensor output = at::empty({s.batch, s.channels, s.out_h, s.out_w}, input.options(), format);
    if (s.batch != 0) Device::forward(scope, op, s, input.contiguous(format), output);
    return output;
  }

  static Tensor backward(const Tensor& grad_output, const Tensor& input, Ints kernel_size, Ints stride, Ints padding,
                         bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
    constexpr const char* op = "relu_avg_pool2d_backward";
    const AvgPoolShape s = check_relu_avg_pool2d_backward(
        op, grad_output, input, {kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override});
    Device::check(op, s);
    const typename Device::Scope scope(input);
    const at::MemoryFormat format = output_memory_format(input);
    const Tensor grad_input = at::empty(input.sizes(), input.options(), format);
    if (s.batch != 0) {
      Device::backward(scope, op, s, grad_output.contiguous(format), input.contiguous(format), grad_input);
    }
    return grad_input;
  }
};

}  // namespace lenet_ext
