// What the CPU and the CUDA side of conv_relu_max_pool2d share: options, argument checks, output sizes.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "common/conv_pool_shape.h"
#include "common/gradients.h"
#include "common/memory_format.h"

namespace lenet_ext {

// The options of every operator of this family, in the order of the schema.
struct ConvPoolOptions {
  at::IntArrayRef stride, padding, dilation;  // padding: top, bottom, left, right
  int64_t groups;
  at::IntArrayRef pool_kernel_size, pool_stride, pool_padding, pool_dilation;
};

// Checks all arguments as stock conv2d and max_pool2d would, and computes every size.
ConvPoolShape check_conv_relu_max_pool2d(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                         const std::optional<at::Tensor>& bias, const ConvPoolOptions& options,
                                         bool ceil_mode);

// The same for the operators that get the pooled size from `indices` (ceil_mode is then known from it). conv_at_indices
// has input, weight and perhaps a bias:
ConvPoolShape check_conv_at_indices(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& indices,
                                    const ConvPoolOptions& options);

// The backward operator has their sizes. `input` may be undefined where no gradient of weight is wanted, and `weight`
// where none of input is.
ConvPoolShape check_conv_relu_max_pool2d_backward(const char* op, const at::Tensor& grad_output,
                                                  const at::Tensor& indices, const at::Tensor& input,
                                                  const at::Tensor& weight, at::IntArrayRef input_size,
                                                  at::IntArrayRef weight_size, const ConvPoolOptions& options,
                                                  GradientMask wanted);

// The arguments of the vendor's convolution (ATen), which takes symmetric padding only: `input` is padded
// explicitly where `options.padding` is not symmetric.
struct VendorConvolution {
  at::Tensor input;
  std::array<int64_t, 2> padding;
};
VendorConvolution vendor_convolution_input(const at::Tensor& input, const ConvPoolOptions& options);

// grad_input of the explicitly padded input, cut back to the input itself.
at::Tensor crop_vendor_grad_input(const at::Tensor& grad_input, const ConvPoolShape& shape,
                                  const ConvPoolOptions& options);

}  // namespace lenet_ext
