// conv_relu_max_pool2d on the CPU: which algorithm, and how its kernels run on several threads.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "common/algorithm.h"
#include "common/cpu_dispatch.h"
#include "common/parallel.h"
#include "conv_relu_max_pool2d/host.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

double dense_flops(const ConvPoolShape& s) {
  return 2.0 * s.batch * s.out_channels * s.conv_h * s.conv_w * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w;
}

double winner_flops(const ConvPoolShape& s) {
  return 4.0 * s.batch * s.out_channels * s.out_h * s.out_w * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w;
}

// LeNet's own kernels, where this is one of its convolutions.
cpu::ConvPoolFixedShape lenet_kernels(const ConvPoolShape& s) {
  const bool options = s.kernel_h == 5 && s.kernel_w == 5 && s.stride_h == 1 && s.stride_w == 1 && s.pad_top == 0 &&
                       s.pad_bottom == 0 && s.pad_left == 0 && s.pad_right == 0 && s.dilation_h == 1 &&
                       s.dilation_w == 1 && s.groups == 1 && s.pool_kernel_h == 2 && s.pool_kernel_w == 2 &&
                       s.pool_stride_h == 2 && s.pool_stride_w == 2 && s.pool_pad_h == 0 && s.pool_pad_w == 0 &&
                       s.pool_dilation_h == 1 && s.pool_dilation_w == 1;
  const auto& kernels = LENET_EXT_CPU_DISPATCH(conv_pool_lenet_kernels);
  auto is = [&](int64_t in_channels, int64_t size, int64_t out_channels) {
    return s.in_channels == in_channels && s.height == size && s.width == size && s.out_channels == out_channels;
  };
  if (options && (is(1, 32, 6) || is(3, 32, 6))) return kernels.first(s.in_channels).conv1;
  if (options && is(6, 14, 16)) return kernels.conv2;
  return {};
}

// Is each image of the batch one contiguous piece?
bool contiguous_images(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return strides[3] == 1 && strides[2] == sizes[3] && (sizes[1] == 1 || strides[1] == sizes[2] * sizes[3]);
}

// The kernels for these tensors: those of the fixed shape where it has any and the tensors fit.
template <typename T>
const cpu::ConvPoolForwardKernels<T>& forward_kernels(const ConvPoolShape& s, const Tensor& input,
                                                      const Tensor& output) {
  if constexpr (std::is_same_v<T, float>) {
    const auto* fixed = lenet_kernels(s).forward;
    if (fixed != nullptr && contiguous_images(input) && contiguous_images(output)) return *fixed;
  }
  return cpu::conv_pool_table<T>().forward;
}

template <typename T>
const cpu::ConvPoolBackwardKernels<T>& backward_kernels(const ConvPoolShape& s, const Tensor& grad_output,
                                                        const Tensor& indices, const Tensor& input,
                                                        const Tensor& grad_input) {
  if constexpr (std::is_same_v<T, float>) {
    const auto* fixed = lenet_kernels(s).backward;
    const bool input_gradient = grad_input.defined();
    if (fixed != nullptr && contiguous_images(grad_output) && contiguous_images(indices) &&
        (!input.defined() || contiguous_images(input)) &&
        (!input_gradient || (s.in_channels == 6 && contiguous_images(grad_input)))) {
      return *fixed;
    }
  }
  return cpu::conv_pool_table<T>().backward;
}

// The vendor's convolutions are fastest on channels_last, by more than converting the activations costs, but
// not by what converting large weights costs. 1.02 times as large as the activations (384->256 at 13x13, eight images)
// they still pay: 13% to 19% gained forward, 1% lost to 8% gained with backward. 1.65 times as large (64->192 at 27x27,
// one image) they do not: the vendor is as fast in NCHW forward, and backward alone lost 10% to 20%.
at::MemoryFormat vendor_memory_format(const ConvPoolShape& s, at::ScalarType dtype, at::MemoryFormat given) {
  const int64_t activations = s.batch * (s.in_channels * s.height * s.width + s.out_channels * s.conv_h * s.conv_w);
  const int64_t weights = s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w;
  const bool wants_channels_last = dtype == at::kFloat || (dtype == at::kBFloat16 && vendor_has_bfloat16());
  return wants_channels_last && 4 * weights < 5 * activations ? at::MemoryFormat::ChannelsLast : given;
}

at::Tensor vendor_convolution(const ConvPoolShape& s, const Tensor& input, const Tensor& weight,
                              const OptionalTensor& bias, const ConvPoolOptions& o) {
  // Gradients are the Autograd key's (autograd.cpp); what is called from here must not record any.
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::MemoryFormat format = vendor_memory_format(s, input.scalar_type(), output_memory_format(input));
  const VendorConvolution v = vendor_convolution_input(input.contiguous(format), o);
  return at::convolution(v.input, weight, bias, o.stride, v.padding, o.dilation, false, {0, 0}, o.groups);
}

template <typename T>
void forward_direct(const ConvPoolShape& s, const Tensor& input, const Tensor& weight, const Tensor& bias,
                    const Tensor& output, const Tensor& indices) {
  const auto& kernels = forward_kernels<T>(s, input, output);
  const cpu::ConvPoolForward<T> job{s,
                                    cpu::data<T>(input),
                                    cpu::strides4(input),
                                    cpu::data<T>(weight),
                                    bias.defined() ? cpu::data<T>(bias) : nullptr,
                                    cpu::mutable_data<T>(output),
                                    indices.defined() ? indices.mutable_data_ptr<uint8_t>() : nullptr,
                                    cpu::strides4(output)};
  void* packed = cpu::shared_scratch(kernels.packed_bytes(s));
  kernels.prepare(job, packed);
  const int64_t scratch = kernels.scratch_bytes(s);
  cpu::parallel_units(kernels.units(s), dense_flops(s), [&](int64_t begin, int64_t end) {
    kernels.run(job, packed, cpu::unit_scratch(scratch), begin, end);
  });
}

template <typename T>
void relu_pool_forward(const ConvPoolShape& s, const Tensor& conv, const Tensor& output, const Tensor& indices) {
  const cpu::ReluPool<T> job{s,
                             cpu::data<T>(conv),
                             cpu::strides4(conv),
                             cpu::mutable_data<T>(output),
                             indices.defined() ? indices.mutable_data_ptr<uint8_t>() : nullptr,
                             cpu::strides4(output)};
  const auto& kernels = cpu::conv_pool_table<T>().relu_pool;
  const double flops = 10.0 * s.batch * s.out_channels * s.conv_h * s.conv_w;
  const int64_t units = s.batch * ((s.out_channels + kernels.channels - 1) / kernels.channels);
  cpu::parallel_units(units, flops, [&](int64_t begin, int64_t end) {
    kernels.forward(job, cpu::unit_scratch(kernels.scratch_bytes(s)), begin, end);
  });
}

template <typename T>
bool backward_direct(const ConvPoolShape& s, const Tensor& grad_output, const Tensor& indices, const Tensor& input,
                     const Tensor& weight, const Tensor& grad_input, const Tensor& grad_weight,
                     const Tensor& grad_bias) {
  const auto& kernels = backward_kernels<T>(s, grad_output, indices, input, grad_input);
  const bool input_gradient = grad_input.defined();
  const cpu::ConvPoolBackward<T> job{s,
                                     cpu::data<T>(grad_output),
                                     cpu::strides4(grad_output),
                                     indices.const_data_ptr<uint8_t>(),
                                     cpu::strides4(indices),
                                     input.defined() ? cpu::data<T>(input) : nullptr,
                                     input.defined() ? cpu::strides4(input) : cpu::Strides4{},
                                     weight.defined() ? cpu::data<T>(weight) : nullptr,
                                     input_gradient ? cpu::mutable_data<T>(grad_input) : nullptr,
                                     input_gradient ? cpu::strides4(grad_input) : cpu::Strides4{},
                                     grad_weight.defined() ? cpu::mutable_data<T>(grad_weight) : nullptr,
                                     grad_weight.defined() ? cpu::mutable_data<T>(grad_bias) : nullptr};
  const int64_t units = kernels.units(s);
  const int64_t packed_bytes = (kernels.packed_bytes(s, input_gradient) + 63) / 64 * 64;
  const int64_t partial_bytes = grad_weight.defined() ? units * kernels.partial_bytes(s) : 0;
  char* packed = static_cast<char*>(cpu::shared_scratch(packed_bytes + partial_bytes));
  void* partials = packed + packed_bytes;
  if (!kernels.prepare(job, packed)) return false;
  const int64_t scratch = kernels.scratch_bytes(s, input_gradient);
  std::atomic<bool> finite{true};
  cpu::parallel_units(units, winner_flops(s), [&](int64_t begin, int64_t end) {
    if (!kernels.run(job, packed, partials, cpu::unit_scratch(scratch), begin, end)) finite = false;
  });
  if (!finite) return false;
  if (!grad_weight.defined()) return true;
  cpu::parallel_units(s.out_channels, 0.25 * partial_bytes,
                      [&](int64_t begin, int64_t end) { kernels.reduce(job, partials, begin, end); });
  return true;
}

template <typename T>
Tensor relu_pool_backward(const ConvPoolShape& s, const Tensor& grad_output, const Tensor& indices,
                          at::MemoryFormat format) {
  const Tensor grad_conv = at::empty({s.batch, s.out_channels, s.conv_h, s.conv_w}, grad_output.options(), format);
  const cpu::ReluPoolBackward<T> job{s,
                                     cpu::data<T>(grad_output),
                                     cpu::strides4(grad_output),
                                     indices.const_data_ptr<uint8_t>(),
                                     cpu::strides4(indices),
                                     cpu::mutable_data<T>(grad_conv),
                                     cpu::strides4(grad_conv)};
  const auto& kernels = cpu::conv_pool_table<T>().relu_pool;
  const int64_t units = s.batch * ((s.out_channels + kernels.channels - 1) / kernels.channels);
  cpu::parallel_units(units, 10.0 * grad_conv.numel(), [&](int64_t begin, int64_t end) {
    kernels.backward(job, cpu::unit_scratch(kernels.scratch_bytes(s)), begin, end);
  });
  return grad_conv;
}

bool is_finite(const Tensor& tensor) {
  const Tensor dense = tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
  const BFloat16* values = cpu::data<BFloat16>(dense);
  const auto& kernels = cpu::conv_pool_table<BFloat16>().relu_pool;
  std::atomic<bool> finite{true};
  cpu::parallel_units(dense.numel(), dense.numel(), [&](int64_t begin, int64_t end) {
    if (!kernels.are_finite(values + begin, end - begin)) finite = false;
  });
  return finite;
}

// Whether each of the kernel's rows (or columns) lies on the image for some output, and not always in the padding.
bool all_meet_the_image(int64_t kernel, int64_t dilation, int64_t pad, int64_t stride, int64_t size, int64_t outputs) {
  for (int64_t i = 0; i < kernel; ++i) {
    const int64_t before = std::max<int64_t>(pad - i * dilation, 0);
    const int64_t first = (before + stride - 1) / stride;  // output whose row i does not lie in front of the image
    if (first >= outputs || first * stride - pad + i * dilation >= size) return false;
  }
  return true;
}

// The vendor's bfloat16 kernels are wrong for grouped (and dilated) channels_last convolutions, spread NaN to places
// that none reaches, and leave the gradient of weights that meet nothing but padding unwritten; without instructions
// for it they are also slow.
bool vendor_bfloat16_is_right(const ConvPoolShape& s, const Tensor& grad_conv, const Tensor& input,
                              const Tensor& weight) {
  return vendor_has_bfloat16() && s.groups == 1 &&
         all_meet_the_image(s.kernel_h, s.dilation_h, s.pad_top, s.stride_h, s.height, s.conv_h) &&
         all_meet_the_image(s.kernel_w, s.dilation_w, s.pad_left, s.stride_w, s.width, s.conv_w) &&
         is_finite(grad_conv) && is_finite(input) && is_finite(weight);
}

// By way of the dense gradient of the convolution's output, and the vendor's backward pass.
template <typename T>
LayerGradients backward_dense(const ConvPoolShape& s, const Tensor& grad_output, const Tensor& indices,
                              const Tensor& input, const Tensor& weight, const ConvPoolOptions& o,
                              GradientMask wanted) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto dtype = grad_output.scalar_type();
  const at::MemoryFormat given = output_memory_format(indices), format = vendor_memory_format(s, dtype, given);
  Tensor grad_conv = relu_pool_backward<T>(s, grad_output, indices, format);
  // The vendor wants both operands, although it does not read the values of one that is not needed.
  const auto unread = [&grad_output](at::IntArrayRef size, at::MemoryFormat laid_out) {
    return at::empty(size, grad_output.options(), laid_out);
  };
  const Tensor images =
      wanted[1] ? input.contiguous(format) : unread({s.batch, s.in_channels, s.height, s.width}, format);
  Tensor kernel = wanted[0] ? weight
                            : unread({s.out_channels, s.in_channels / s.groups, s.kernel_h, s.kernel_w},
                                     at::MemoryFormat::Contiguous);
  auto [source, padding] = vendor_convolution_input(images, o);
  if (std::is_same_v<T, BFloat16> &&
      !vendor_bfloat16_is_right(s, grad_conv, wanted[1] ? source : grad_conv, wanted[0] ? kernel : grad_conv)) {
    grad_conv = grad_conv.to(at::kFloat);
    source = source.to(at::kFloat);
    kernel = kernel.to(at::kFloat);
  }
  auto [grad_input, grad_weight, grad_bias] =
      at::convolution_backward(grad_conv, source, kernel, at::IntArrayRef{s.out_channels}, o.stride, padding,
                               o.dilation, false, {0, 0}, o.groups, wanted);
  LayerGradients gradients;
  if (wanted[0]) gradients.input = crop_vendor_grad_input(grad_input, s, o).to(dtype).contiguous(given);
  if (wanted[1]) gradients.weight = grad_weight.to(dtype);
  if (wanted[2]) gradients.bias = grad_bias.to(dtype);
  return gradients;
}

struct ConvPoolCpu {
  static void check(const char*, const ConvPoolShape&) {}

  static void forward(const char* op, const ConvPoolShape& s, const Tensor& input, const Tensor& weight,
                      const OptionalTensor& bias, const ConvPoolOptions& options, const Tensor& output,
                      const Tensor& indices) {
    cpu::dispatch(input, op, [&](auto zero) {
      using T = decltype(zero);
      const bool channels_last = output_memory_format(input) == at::MemoryFormat::ChannelsLast;
      if (conv_pool_forward_algorithm_cpu(s, input.scalar_type(), channels_last) == Algorithm::Direct) {
        const Tensor contiguous_bias = bias.has_value() ? bias->contiguous() : Tensor();
        forward_direct<T>(s, input, weight.contiguous(), contiguous_bias, output, indices);
      } else {
        relu_pool_forward<T>(s, vendor_convolution(s, input, weight, bias, options), output, indices);
      }
    });
  }

  static LayerGradients backward(const char* op, const ConvPoolShape& s, const Tensor& grad_output,
                                 const Tensor& indices, const Tensor& input, const Tensor& weight,
                                 const ConvPoolOptions& options, GradientMask wanted) {
    if (wanted[2] && !wanted[1]) {  // the kernels sum it beside the gradient of weight, for which there may be no input
      LayerGradients gradients;
      if (wanted[0]) {
        gradients = backward(op, s, grad_output, indices, input, weight, options, {true, false, false});
      }
      const at::AutoDispatchBelowADInplaceOrView guard;
      gradients.bias = grad_output.masked_fill(indices.eq(kDead), 0).sum({0, 2, 3});
      return gradients;
    }
    return cpu::dispatch(grad_output, op, [&](auto zero) {
      using T = decltype(zero);
      if (conv_pool_backward_algorithm_cpu(s, grad_output.scalar_type()) == Algorithm::Direct) {
        LayerGradients gradients;
        if (wanted[0]) {
          gradients.input = at::empty({s.batch, s.in_channels, s.height, s.width}, grad_output.options(),
                                      output_memory_format(indices));
        }
        if (wanted[1]) {
          gradients.weight =
              at::empty({s.out_channels, s.in_channels / s.groups, s.kernel_h, s.kernel_w}, grad_output.options());
          gradients.bias = at::empty({s.out_channels}, grad_output.options());
        }
        // The winners of a channel are read one after the other: those of a large image should be neighbours.
        const bool rearrange = grad_output.stride(1) == 1 && s.out_channels * s.out_h * s.out_w > int64_t{1} << 16;
        if (backward_direct<T>(s, rearrange ? grad_output.contiguous() : grad_output,
                               rearrange ? indices.contiguous() : indices, wanted[1] ? input : Tensor(),
                               wanted[0] ? weight.contiguous() : Tensor(), gradients.input, gradients.weight,
                               gradients.bias)) {
          if (!wanted[2]) gradients.bias = Tensor();
          return gradients;
        }
      }
      return backward_dense<T>(s, grad_output, indices, input, weight, options, wanted);
    });
  }

  static void at_indices(const char* op, const ConvPoolShape& s, const Tensor& input, const Tensor& weight,
                         const OptionalTensor& bias, const Tensor& indices, const Tensor& output) {
    const Tensor kernel = weight.contiguous(), offset = bias.has_value() ? bias->contiguous() : Tensor();
    cpu::dispatch(input, op, [&](auto zero) {
      using T = decltype(zero);
      const cpu::ConvAtIndices<T> job{s,
                                      cpu::data<T>(input),
                                      cpu::strides4(input),
                                      cpu::data<T>(kernel),
                                      offset.defined() ? cpu::data<T>(offset) : nullptr,
                                      indices.const_data_ptr<uint8_t>(),
                                      cpu::mutable_data<T>(output),
                                      cpu::strides4(output)};
      const auto& kernels = cpu::conv_pool_table<T>().at_indices;
      void* packed = cpu::shared_scratch(kernels.packed_bytes(s));
      kernels.prepare(job, packed);
      const int64_t scratch = kernels.scratch_bytes(s);
      cpu::parallel_units(s.batch, winner_flops(s), [&](int64_t begin, int64_t end) {
        kernels.run(job, packed, cpu::unit_scratch(scratch), begin, end);
      });
    });
  }
};

}  // namespace

Tensor conv_relu_max_pool2d_cpu(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                const ConvPoolOptions& options, bool ceil_mode, Tensor* indices) {
  return ConvReluMaxPool2dHost<ConvPoolCpu>::forward(op, input, weight, bias, options, ceil_mode, indices);
}

LayerGradients conv_relu_max_pool2d_backward_cpu(const char* op, const Tensor& grad_output, const Tensor& indices,
                                                 const Tensor& input, const Tensor& weight, at::IntArrayRef input_size,
                                                 at::IntArrayRef weight_size, const ConvPoolOptions& options,
                                                 GradientMask wanted) {
  return ConvReluMaxPool2dHost<ConvPoolCpu>::backward(op, grad_output, indices, input, weight, input_size, weight_size,
                                                      options, wanted);
}

TORCH_LIBRARY_IMPL(lenet_ext, CPU, m) { ConvReluMaxPool2dHost<ConvPoolCpu>::register_operators(m); }

}  // namespace lenet_ext
