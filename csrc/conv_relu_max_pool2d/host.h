// What the operators of conv_relu_max_pool2d do on every device: check, allocate, answer for an empty batch, and hand
// the rest to the device, which chooses an algorithm and runs kernels:
//
//   Device::check(op, shape)                                                 limits of the kernels beyond the shape's
//   own Device::forward(op, shape, input, weight, bias, options, output, indices)    `indices` may be undefined: not
//   wanted Device::backward(op, shape, grad_output, indices, input, weight, options, wanted) -> LayerGradients
//   Device::at_indices(op, shape, input, weight, bias, indices, output)          `indices` laid out as `output`
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "conv_relu_max_pool2d/operators.h"

namespace lenet_ext {

template <typename Device>
class ConvReluMaxPool2dHost {
  using Tensor = at::Tensor;
  using OptionalTensor = std::optional<Tensor>;
  using Ints = at::IntArrayRef;

 public:
  static Tensor forward(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const ConvPoolOptions& options, bool ceil_mode, Tensor* indices) {
    const ConvPoolShape s = check_conv_relu_max_pool2d(op, input, weight, bias, options, ceil_mode);
    Device::check(op, s);
    const Tensor output =
        at::empty({s.batch, s.out_channels, s.out_h, s.out_w}, input.options(), output_memory_format(input));
    if (indices != nullptr) *indices = at::empty_like(output, output.options().dtype(at::kByte));
    if (output.numel() != 0) {
      Device::forward(op, s, input, weight, bias, options, output, indices != nullptr ? *indices : Tensor());
    }
    return output;
  }

  static LayerGradients backward(const char* op, const Tensor& grad_output, const Tensor& indices, const Tensor& input,
                                 const Tensor& weight, Ints input_size, Ints weight_size,
                                 const ConvPoolOptions& options, GradientMask wanted) {
    const ConvPoolShape s = check_conv_relu_max_pool2d_backward(op, grad_output, indices, input, weight, input_size,
                                                                weight_size, options, wanted);
    Device::check(op, s);
    LayerGradients gradients;
    if (grad_output.numel() != 0) {
      gradients = Device::backward(op, s, grad_output, indices, input, weight, options, wanted);
    } else {
      if (wanted[0]) gradients.input = at::zeros(input_size, grad_output.options());
      if (wanted[1]) gradients.weight = at::zeros(weight_size, grad_output.options());
      if (wanted[2]) gradients.bias = at::zeros({s.out_channels}, grad_output.options());
    }
    // The vendor's has another stride at a channel that is alone, and is contiguous all the same.
    if (wanted[0] && gradients.input.is_contiguous() && s.in_channels == 1 &&
        output_memory_format(indices) == at::MemoryFormat::Contiguous) {
      gradients.input = gradients.input.view({-1}).view(input_size);
    }
    if (wanted[1]) {
      const at::MemoryFormat format = weight.defined() ? output_memory_format(weight) : at::MemoryFormat::Contiguous;
      gradients.weight = gradients.weight.contiguous(format);
    }
    return gradients;
  }

  static void register_operators(torch::Library& m) {
    m.impl("conv_relu_max_pool2d", &operator_forward);
    m.impl("conv_relu_max_pool2d_with_indices", &operator_with_indices);
    m.impl("conv_relu_max_pool2d_backward", &operator_backward);
    m.impl("conv_at_indices", &operator_at_indices);
  }

 private:
  static Tensor operator_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Ints stride,
                                 Ints padding, Ints dilation, int64_t groups, Ints pool_kernel_size, Ints pool_stride,
                                 Ints pool_padding, Ints pool_dilation, bool ceil_mode) {
    return forward("conv_relu_max_pool2d", input, weight, bias,
                   {stride, padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding, pool_dilation},
                   ceil_mode, nullptr);
  }

  static std::tuple<Tensor, Tensor> operator_with_indices(const Tensor& input, const Tensor& weight,
                                                          const OptionalTensor& bias, Ints stride, Ints padding,
                                                          Ints dilation, int64_t groups, Ints pool_kernel_size,
                                                          Ints pool_stride, Ints pool_padding, Ints pool_dilation,
                                                          bool ceil_mode) {
    Tensor indices;
    Tensor output =
        forward("conv_relu_max_pool2d_with_indices", input, weight, bias,
                {stride, padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding, pool_dilation},
                ceil_mode, &indices);
    return {std::move(output), std::move(indices)};
  }

  static std::tuple<Tensor, Tensor, Tensor> operator_backward(
      const Tensor& grad_output, const Tensor& indices, const OptionalTensor& input, const OptionalTensor& weight,
      Ints input_size, Ints weight_size, Ints stride, Ints padding, Ints dilation, int64_t groups,
      Ints pool_kernel_size, Ints pool_stride, Ints pool_padding, Ints pool_dilation, GradientMask output_mask) {
    const LayerGradients gradients = backward(
        "conv_relu_max_pool2d_backward", grad_output, indices, input.value_or(Tensor()), weight.value_or(Tensor()),
        input_size, weight_size,
        {stride, padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding, pool_dilation}, output_mask);
    return to_outputs(gradients, grad_output.options());
  }

  static Tensor operator_at_indices(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                    const Tensor& indices, Ints stride, Ints padding, Ints dilation, int64_t groups,
                                    Ints pool_kernel_size, Ints pool_stride, Ints pool_padding, Ints pool_dilation) {
    constexpr const char* op = "conv_at_indices";
    const ConvPoolShape s = check_conv_at_indices(
        op, input, weight, bias, indices,
        {stride, padding, dilation, groups, pool_kernel_size, pool_stride, pool_padding, pool_dilation});
    Device::check(op, s);
    const at::MemoryFormat format = output_memory_format(input);
    const Tensor output = at::empty(indices.sizes(), input.options(), format);
    if (output.numel() != 0) Device::at_indices(op, s, input, weight, bias, indices.contiguous(format), output);
    return output;
  }
};

}  // namespace lenet_ext
