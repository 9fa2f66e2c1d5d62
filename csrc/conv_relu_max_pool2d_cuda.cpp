// The CUDA side of conv_relu_max_pool2d: checks, allocation, choice of the algorithm. Compiled only where nvcc is
// found.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "algorithm.h"
#include "conv_relu_max_pool2d.h"
#include "cuda_host.h"
#include "cuda_ops.h"
#include "precision.h"

namespace lenet_ext {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The cost rule. Predictions from counting (multiply-adds, bytes, launches): nobody has measured the crossovers yet;
// `make gpu-check` sweeps them.
Algorithm conv_pool_algorithm_cuda(const ConvPoolShape& s, cuda::DType dtype, bool backward) {
  // LeNet's two layers have kernels of their own, which never store the convolution's output.
  if (cuda::has_lenet_kernels(dtype, s)) return choose_algorithm(Algorithm::Direct);
  // A problem that takes less time than a launch (2 to 3 us): one launch of ours against the vendor's two or more. Our
  // general kernels do perhaps 1e12 multiply-adds a second forward, fewer backward.
  const double multiply_adds = double(s.batch) * s.out_channels * std::max(s.conv_h * s.conv_w, s.out_h * s.out_w) *
                               (s.in_channels / s.groups) * s.kernel_h * s.kernel_w;
  return choose_algorithm(multiply_adds <= (backward ? 1e6 : 4e6) ? Algorithm::Direct : Algorithm::Vendor);
}

// The kernels count positions inside a plane in 32 bits.
void check_planes(const char* op, const ConvPoolShape& s) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  const int64_t span_h = s.height + s.pad_top + s.pad_bottom + 2 * s.pool_pad_h + s.pool_kernel_h * s.pool_dilation_h;
  const int64_t span_w = s.width + s.pad_left + s.pad_right + 2 * s.pool_pad_w + s.pool_kernel_w * s.pool_dilation_w;
  TORCH_CHECK(span_h <= limit && span_w <= limit && span_h * span_w <= limit && s.in_channels <= limit &&
                  s.out_channels <= limit && s.kernel_h * s.kernel_w <= limit,
              op, ": input's padded planes must have fewer than 2^31 positions on CUDA, got ", s.height, " x ", s.width,
              " with padding");
}

// `indices` stays undefined where they are not wanted.
void forward(const CudaScope& scope, const ConvPoolShape& s, const char* op, const Tensor& input, const Tensor& weight,
             const OptionalTensor& bias, const ConvPoolOptions& o, const Tensor& output, const Tensor& indices) {
  const cuda::DType dtype = cuda_dtype(op, input);
  if (output.numel() == 0) return;
  const Tensor offset = bias.has_value() ? bias->contiguous() : Tensor();
  uint8_t* codes = indices.defined() ? indices.mutable_data_ptr<uint8_t>() : nullptr;
  if (conv_pool_algorithm_cuda(s, dtype, false) == Algorithm::Direct) {
    const Tensor kernel = weight.contiguous();
    const bool lenet = cuda::has_lenet_kernels(dtype, s) && output.is_contiguous();
    const Tensor images = lenet ? input.contiguous() : input;
    const cuda::ConvPoolForward call{s,
                                     images.const_data_ptr(),
                                     cuda_strides(images),
                                     kernel.const_data_ptr(),
                                     data_or_null(offset),
                                     output.mutable_data_ptr(),
                                     codes,
                                     cuda_strides(output)};
    // float32 is rounded to TF32 where stock's convolution may be.
    const bool tensor_cores = lenet && (dtype != cuda::DType::kFloat32 || allows_tf32_convolutions()) &&
                              cuda::has_lenet_tensor_core_layer(dtype, s);
    check_launch(op,
                 tensor_cores ? cuda::launch_lenet_tensor_core_layer(dtype, call, scope.stream)
                              : cuda::launch_conv_pool_forward(dtype, call, scope.stream),
                 input);
  } else {
    const VendorConvolution v = vendor_convolution_input(input, o);
    const Tensor conv =
        at::convolution(v.input, weight, std::nullopt, o.stride, v.padding, o.dilation, false, {0, 0}, o.groups);
    const cuda::BiasReluPool call{
        s,     conv.const_data_ptr(), cuda_strides(conv), data_or_null(offset), output.mutable_data_ptr(),
        codes, cuda_strides(output)};
    check_launch(op, cuda::launch_bias_relu_pool(dtype, call, scope.stream), input);
  }
}

}  // namespace

Tensor conv_relu_max_pool2d_cuda(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                 const ConvPoolOptions& options, bool ceil_mode, Tensor* indices) {
  const ConvPoolShape s = check_conv_relu_max_pool2d(op, input, weight, bias, options, ceil_mode);
  check_planes(op, s);
  const CudaScope scope(input);
  const Tensor output =
      at::empty({s.batch, s.out_channels, s.out_h, s.out_w}, input.options(), output_memory_format(input));
  if (indices != nullptr) *indices = at::empty_like(output, output.options().dtype(at::kByte));
  forward(scope, s, op, input, weight, bias, options, output, indices == nullptr ? Tensor() : *indices);
  return output;
}

namespace {

// The kernels' backward. What is not wanted, and `input` or `weight` where not needed, may be undefined.
void launch_backward(const CudaScope& scope, const ConvPoolShape& s, const char* op, const Tensor& grad_output,
                     const Tensor& indices, const Tensor& input, const Tensor& weight, const Tensor& grad_input,
                     const Tensor& grad_weight, const Tensor& grad_bias) {
  const cuda::DType dtype = cuda_dtype(op, input);
  Tensor workspace;
  if (grad_weight.defined() || grad_bias.defined()) {
    const int64_t bytes = cuda::conv_pool_backward_workspace(dtype, s, grad_weight.defined());
    workspace = at::empty({bytes}, input.options().dtype(at::kByte));
  }
  auto writable = [](const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; };
  const cuda::ConvPoolBackward call{s,
                                    grad_output.const_data_ptr(),
                                    cuda_strides(grad_output),
                                    indices.const_data_ptr<uint8_t>(),
                                    cuda_strides(indices),
                                    input.const_data_ptr(),
                                    cuda_strides(input),
                                    weight.const_data_ptr(),
                                    writable(grad_input),
                                    grad_input.defined() ? cuda_strides(grad_input) : cuda::Strides4{},
                                    writable(grad_weight),
                                    writable(grad_bias),
                                    writable(workspace)};
  check_launch(op, cuda::launch_conv_pool_backward(dtype, call, scope.stream), input);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool2d_backward_cuda(const char* op, const Tensor& grad_output,
                                                                      const Tensor& indices, const Tensor& input,
                                                                      const Tensor& weight, const ConvPoolOptions& o,
                                                                      std::array<bool, 3> output_mask) {
  const ConvPoolShape s = check_conv_relu_max_pool2d_backward(op, grad_output, indices, input, weight, std::nullopt, o);
  check_planes(op, s);
  const CudaScope scope(input);
  const cuda::DType dtype = cuda_dtype(op, input);
  const at::MemoryFormat format = output_memory_format(input), weight_format = output_memory_format(weight);
  const Tensor none = at::empty({0}, input.options());
  if (grad_output.numel() == 0) {
    return {output_mask[0] ? at::zeros(input.sizes(), input.options()) : none,
            output_mask[1] ? at::zeros(weight.sizes(), weight.options()).contiguous(weight_format) : none,
            output_mask[2] ? at::zeros({s.out_channels}, weight.options()) : none};
  }
  const Tensor grad_bias = output_mask[2] ? at::empty({s.out_channels}, weight.options()) : Tensor();

  if (conv_pool_algorithm_cuda(s, dtype, true) == Algorithm::Direct) {
    const Tensor grad_input = output_mask[0] ? at::empty(input.sizes(), input.options(), format) : Tensor();
    const Tensor grad_weight =
        output_mask[1] ? at::empty(weight.sizes(), weight.options(), at::MemoryFormat::Contiguous) : Tensor();
    const bool lenet = cuda::has_lenet_kernels(dtype, s) && format == at::MemoryFormat::Contiguous;
    auto laid_out = [lenet](const Tensor& tensor) { return lenet ? tensor.contiguous() : tensor; };
    launch_backward(scope, s, op, laid_out(grad_output), laid_out(indices), laid_out(input), weight.contiguous(),
                    grad_input, grad_weight, grad_bias);
    return {output_mask[0] ? grad_input : none, output_mask[1] ? grad_weight.contiguous(weight_format) : none,
            output_mask[2] ? grad_bias : none};
  }

  // The bias gradient needs the winners only, not the dense gradient that the vendor would read once more.
  if (output_mask[2]) {
    launch_backward(scope, s, op, grad_output, indices, input, weight, Tensor(), Tensor(), grad_bias);
  }
  Tensor grad_input = none, grad_weight = none;
  if (output_mask[0] || output_mask[1]) {
    const Tensor grad_conv = at::empty({s.batch, s.out_channels, s.conv_h, s.conv_w}, input.options(), format);
    const cuda::BiasReluPoolBackward call{s,
                                          grad_output.const_data_ptr(),
                                          cuda_strides(grad_output),
                                          indices.const_data_ptr<uint8_t>(),
                                          cuda_strides(indices),
                                          grad_conv.mutable_data_ptr(),
                                          cuda_strides(grad_conv)};
    check_launch(op, cuda::launch_bias_relu_pool_backward(dtype, call, scope.stream), input);
    const VendorConvolution v = vendor_convolution_input(input, o);
    auto [vendor_grad_input, vendor_grad_weight, unused] =
        at::convolution_backward(grad_conv, v.input, weight, std::nullopt, o.stride, v.padding, o.dilation, false,
                                 {0, 0}, o.groups, {output_mask[0], output_mask[1], false});
    if (output_mask[0]) grad_input = crop_vendor_grad_input(vendor_grad_input, s, o).contiguous(format);
    if (output_mask[1]) grad_weight = vendor_grad_weight.contiguous(weight_format);
  }
  return {grad_input, grad_weight, output_mask[2] ? grad_bias : none};
}

namespace {

Tensor conv_relu_max_pool2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                            IntArrayRef padding, IntArrayRef dilation, int64_t groups, IntArrayRef pool_kernel_size,
                            IntArrayRef pool_stride, IntArrayRef pool_padding, IntArrayRef pool_dilation,
                            bool ceil_mode) {
  const ConvPoolOptions options{stride,           padding,     dilation,     groups,
                                pool_kernel_size, pool_stride, pool_padding, pool_dilation};
  return conv_relu_max_pool2d_cuda("conv_relu_max_pool2d", input, weight, bias, options, ceil_mode, nullptr);
}

std::tuple<Tensor, Tensor> conv_relu_max_pool2d_with_indices(const Tensor& input, const Tensor& weight,
                                                             const OptionalTensor& bias, IntArrayRef stride,
                                                             IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                                             IntArrayRef pool_kernel_size, IntArrayRef pool_stride,
                                                             IntArrayRef pool_padding, IntArrayRef pool_dilation,
                                                             bool ceil_mode) {
  const ConvPoolOptions options{stride,           padding,     dilation,     groups,
                                pool_kernel_size, pool_stride, pool_padding, pool_dilation};
  Tensor indices;
  const Tensor output =
      conv_relu_max_pool2d_cuda("conv_relu_max_pool2d_with_indices", input, weight, bias, options, ceil_mode, &indices);
  return {output, indices};
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool2d_backward(
    const Tensor& grad_output, const Tensor& indices, const Tensor& input, const Tensor& weight, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, int64_t groups, IntArrayRef pool_kernel_size, IntArrayRef pool_stride,
    IntArrayRef pool_padding, IntArrayRef pool_dilation, std::array<bool, 3> output_mask) {
  const ConvPoolOptions options{stride,           padding,     dilation,     groups,
                                pool_kernel_size, pool_stride, pool_padding, pool_dilation};
  return conv_relu_max_pool2d_backward_cuda("conv_relu_max_pool2d_backward", grad_output, indices, input, weight,
                                            options, output_mask);
}

Tensor conv_at_indices(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& indices,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                       IntArrayRef pool_kernel_size, IntArrayRef pool_stride, IntArrayRef pool_padding,
                       IntArrayRef pool_dilation) {
  constexpr const char* op = "conv_at_indices";
  const ConvPoolOptions o{stride,           padding,     dilation,     groups,
                          pool_kernel_size, pool_stride, pool_padding, pool_dilation};
  const ConvPoolShape s = check_conv_relu_max_pool2d_backward(op, Tensor(), indices, input, weight, bias, o);
  check_planes(op, s);
  const CudaScope scope(input);
  const cuda::DType dtype = cuda_dtype(op, input);
  const at::MemoryFormat format = output_memory_format(input);
  const Tensor output = at::empty(indices.sizes(), input.options(), format);
  if (output.numel() == 0) return output;
  const Tensor codes = indices.contiguous(format), kernel = weight.contiguous();
  const Tensor offset = bias.has_value() ? bias->contiguous() : Tensor();
  const cuda::ConvAtIndices call{s,
                                 input.const_data_ptr(),
                                 cuda_strides(input),
                                 kernel.const_data_ptr(),
                                 data_or_null(offset),
                                 codes.const_data_ptr<uint8_t>(),
                                 output.mutable_data_ptr(),
                                 cuda_strides(output)};
  check_launch(op, cuda::launch_conv_at_indices(dtype, call, scope.stream), input);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, LENET_EXT_CUDA_KEY, m) {
  m.impl("conv_relu_max_pool2d", &conv_relu_max_pool2d);
  m.impl("conv_relu_max_pool2d_with_indices", &conv_relu_max_pool2d_with_indices);
  m.impl("conv_relu_max_pool2d_backward", &conv_relu_max_pool2d_backward);
  m.impl("conv_at_indices", &conv_at_indices);
}

}  // namespace lenet_ext
