#include "conv_relu_max_pool2d/shape.h"

#include <ATen/ops/constant_pad_nd.h>

#include <limits>

#include "common/checks.h"
#include "common/pooled_size.h"

namespace lenet_ext {
namespace {

void check_positive(const char* op, const char* name, at::IntArrayRef values) {
  for (int64_t value : values) {
    TORCH_CHECK(value > 0, op, ": ", name, " must be positive, got ", values);
  }
}

void check_non_negative(const char* op, const char* name, at::IntArrayRef values) {
  for (int64_t value : values) {
    TORCH_CHECK(value >= 0, op, ": ", name, " must not be negative, got ", values);
  }
}

// PyTorch documentation of Conv2d, "Shape". Arguments are bounded first so that nothing overflows.
int64_t convolution_size(int64_t size, int64_t pad_before, int64_t pad_after, int64_t dilation, int64_t kernel,
                         int64_t stride) {
  return (size + pad_before + pad_after - dilation * (kernel - 1) - 1) / stride + 1;
}

constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();

void check_options(const char* op, const ConvPoolOptions& o) {
  struct Pair {
    const char* name;
    at::IntArrayRef values;
    size_t length;
  };
  const Pair all[] = {{"stride", o.stride, 2},
                      {"padding", o.padding, 4},
                      {"dilation", o.dilation, 2},
                      {"pool_kernel_size", o.pool_kernel_size, 2},
                      {"pool_stride", o.pool_stride, 2},
                      {"pool_padding", o.pool_padding, 2},
                      {"pool_dilation", o.pool_dilation, 2}};
  for (const Pair& pair : all) {
    TORCH_CHECK(pair.values.size() == pair.length, op, ": ", pair.name, " must have ", pair.length, " elements, got ",
                pair.values);
    for (int64_t value : pair.values) {
      TORCH_CHECK(value <= kLimit, op, ": ", pair.name, " must be at most ", kLimit, ", got ", pair.values);
    }
  }
  check_positive(op, "stride", o.stride);
  check_non_negative(op, "padding", o.padding);
  check_positive(op, "dilation", o.dilation);
  TORCH_CHECK(o.groups > 0, op, ": groups must be positive, got ", o.groups);
  check_positive(op, "pool_kernel_size", o.pool_kernel_size);
  check_positive(op, "pool_stride", o.pool_stride);
  check_non_negative(op, "pool_padding", o.pool_padding);
  check_positive(op, "pool_dilation", o.pool_dilation);
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(o.pool_padding[i] <= o.pool_kernel_size[i] / 2, op,
                ": pool_padding must be at most half of pool_kernel_size=", o.pool_kernel_size, ", got ",
                o.pool_padding);
  }
  TORCH_CHECK(o.pool_kernel_size[0] * o.pool_kernel_size[1] <= kMaxWindow, op, ": pool_kernel_size must cover at most ",
              kMaxWindow, " positions, got ", o.pool_kernel_size, " (lenet_ext.functional has no such limit)");
}

// Everything but the pooled size.
ConvPoolShape check_convolution(const char* op, at::IntArrayRef input, at::IntArrayRef weight,
                                const std::optional<at::Tensor>& bias, const ConvPoolOptions& o) {
  TORCH_CHECK(input.size() == 4, op, ": input must be 4-D (batch, channels, height, width), got shape ", input);
  TORCH_CHECK(weight.size() == 4, op,
              ": weight must be 4-D (out_channels, in_channels / groups, kernel_height, kernel_width), got shape ",
              weight);
  check_options(op, o);

  ConvPoolShape s{};
  s.batch = input[0], s.in_channels = input[1], s.height = input[2], s.width = input[3];
  s.out_channels = weight[0], s.kernel_h = weight[2], s.kernel_w = weight[3], s.groups = o.groups;
  s.stride_h = o.stride[0], s.stride_w = o.stride[1];
  s.pad_top = o.padding[0], s.pad_bottom = o.padding[1], s.pad_left = o.padding[2], s.pad_right = o.padding[3];
  s.dilation_h = o.dilation[0], s.dilation_w = o.dilation[1];
  s.pool_kernel_h = o.pool_kernel_size[0], s.pool_kernel_w = o.pool_kernel_size[1];
  s.pool_stride_h = o.pool_stride[0], s.pool_stride_w = o.pool_stride[1];
  s.pool_pad_h = o.pool_padding[0], s.pool_pad_w = o.pool_padding[1];
  s.pool_dilation_h = o.pool_dilation[0], s.pool_dilation_w = o.pool_dilation[1];

  TORCH_CHECK(s.in_channels > 0 && (s.batch == 0 || (s.height > 0 && s.width > 0)), op,
              ": input may be empty in its batch dimension alone, got shape ", input);
  TORCH_CHECK(s.out_channels > 0 && s.kernel_h > 0 && s.kernel_w > 0, op,
              ": weight must have at least one output channel and a kernel that is not empty, got shape ", weight);
  TORCH_CHECK(s.out_channels % s.groups == 0, op, ": weight's ", s.out_channels,
              " output channels must be divisible by groups=", s.groups);
  TORCH_CHECK(s.in_channels == weight[1] * s.groups, op, ": input must have ", weight[1] * s.groups,
              " channels for weight of shape ", weight, " and groups=", s.groups, ", got shape ", input);
  check_bias(op, bias, s.out_channels);

  const int64_t extent_h = s.dilation_h * (s.kernel_h - 1) + 1, extent_w = s.dilation_w * (s.kernel_w - 1) + 1;
  const int64_t padded_h = s.height + s.pad_top + s.pad_bottom, padded_w = s.width + s.pad_left + s.pad_right;
  TORCH_CHECK(padded_h >= extent_h && padded_w >= extent_w, op, ": input of padded size (", padded_h, ", ", padded_w,
              ") is smaller than the kernel of weight, which covers (", extent_h, ", ", extent_w, ")");
  s.conv_h = convolution_size(s.height, s.pad_top, s.pad_bottom, s.dilation_h, s.kernel_h, s.stride_h);
  s.conv_w = convolution_size(s.width, s.pad_left, s.pad_right, s.dilation_w, s.kernel_w, s.stride_w);
  return s;
}

// Takes the pooled size from `indices`, which belong to a tensor like `first`.
void set_pooled_size(const char* op, ConvPoolShape& s, const NamedTensor& first, const at::Tensor& indices) {
  TORCH_CHECK(indices.device() == first.tensor.device() && indices.scalar_type() == at::kByte &&
                  indices.layout() == at::kStrided,
              op, ": indices must be a dense uint8 tensor on ", first.tensor.device(), ", got ", indices.scalar_type(),
              " on ", indices.device());
  TORCH_CHECK(indices.dim() == 4 && indices.size(0) == s.batch && indices.size(1) == s.out_channels, op,
              ": indices must have shape [", s.batch, ", ", s.out_channels, ", *, *], got ", indices.sizes());
  s.out_h = indices.size(2), s.out_w = indices.size(3);
  auto fits = [](int64_t out, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    return out > 0 && (out == pooled_size(size, kernel, stride, pad, dilation, false) ||
                       out == pooled_size(size, kernel, stride, pad, dilation, true));
  };
  TORCH_CHECK(fits(s.out_h, s.conv_h, s.pool_kernel_h, s.pool_stride_h, s.pool_pad_h, s.pool_dilation_h) &&
                  fits(s.out_w, s.conv_w, s.pool_kernel_w, s.pool_stride_w, s.pool_pad_w, s.pool_dilation_w),
              op, ": indices of shape ", indices.sizes(), " do not belong to this input, weight and pooling");
}

}  // namespace

ConvPoolShape check_conv_relu_max_pool2d(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                         const std::optional<at::Tensor>& bias, const ConvPoolOptions& options,
                                         bool ceil_mode) {
  if (bias.has_value()) {
    check_same_device_and_dtype(op, {{"input", input}, {"weight", weight}, {"bias", *bias}});
  } else {
    check_same_device_and_dtype(op, {{"input", input}, {"weight", weight}});
  }
  ConvPoolShape s = check_convolution(op, input.sizes(), weight.sizes(), bias, options);
  s.out_h = pooled_size(s.conv_h, s.pool_kernel_h, s.pool_stride_h, s.pool_pad_h, s.pool_dilation_h, ceil_mode);
  s.out_w = pooled_size(s.conv_w, s.pool_kernel_w, s.pool_stride_w, s.pool_pad_w, s.pool_dilation_w, ceil_mode);
  TORCH_CHECK(s.out_h > 0 && s.out_w > 0, op, ": pool_kernel_size=", options.pool_kernel_size,
              " with pool_dilation=", options.pool_dilation, " and pool_padding=", options.pool_padding,
              " is too large for the convolution's output of size (", s.conv_h, ", ", s.conv_w, ")");
  return s;
}

ConvPoolShape check_conv_at_indices(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& indices,
                                    const ConvPoolOptions& options) {
  check_same_device_and_dtype(op, {{"input", input}, {"weight", weight}});
  if (bias.has_value()) check_same_device_and_dtype(op, {{"input", input}, {"bias", *bias}});
  ConvPoolShape s = check_convolution(op, input.sizes(), weight.sizes(), bias, options);
  set_pooled_size(op, s, {"input", input}, indices);
  return s;
}

ConvPoolShape check_conv_relu_max_pool2d_backward(const char* op, const at::Tensor& grad_output,
                                                  const at::Tensor& indices, const at::Tensor& input,
                                                  const at::Tensor& weight, at::IntArrayRef input_size,
                                                  at::IntArrayRef weight_size, const ConvPoolOptions& options,
                                                  GradientMask wanted) {
  TORCH_CHECK(input.defined() || !wanted[1], op, ": input is needed for the gradient of weight, got None");
  TORCH_CHECK(weight.defined() || !wanted[0], op, ": weight is needed for the gradient of input, got None");
  const NamedTensor first{"grad_output", grad_output};
  check_same_device_and_dtype(op, {first});
  if (input.defined()) {
    check_same_device_and_dtype(op, {first, {"input", input}});
    TORCH_CHECK(input.sizes() == input_size, op, ": input must have the shape input_size=", input_size, ", got ",
                input.sizes());
  }
  if (weight.defined()) {
    check_same_device_and_dtype(op, {first, {"weight", weight}});
    TORCH_CHECK(weight.sizes() == weight_size, op, ": weight must have the shape weight_size=", weight_size, ", got ",
                weight.sizes());
  }
  ConvPoolShape s = check_convolution(op, input_size, weight_size, std::nullopt, options);
  set_pooled_size(op, s, first, indices);
  TORCH_CHECK(grad_output.sizes() == indices.sizes(), op, ": grad_output must have the shape of indices ",
              indices.sizes(), ", got ", grad_output.sizes());
  return s;
}

VendorConvolution vendor_convolution_input(const at::Tensor& input, const ConvPoolOptions& options) {
  const auto& p = options.padding;
  if (p[0] == p[1] && p[2] == p[3]) return {input, {p[0], p[2]}};
  return {at::constant_pad_nd(input, {p[2], p[3], p[0], p[1]}, 0), {0, 0}};
}

at::Tensor crop_vendor_grad_input(const at::Tensor& grad_input, const ConvPoolShape& s,
                                  const ConvPoolOptions& options) {
  const auto& p = options.padding;
  if (p[0] == p[1] && p[2] == p[3]) return grad_input;
  return grad_input.slice(2, s.pad_top, s.pad_top + s.height).slice(3, s.pad_left, s.pad_left + s.width);
}

}  // namespace lenet_ext
