// The sizes of one fused conv2d + ReLU + max_pool2d, as every kernel (CPU and CUDA) receives them. No torch in here.
#pragma once

#include <cstdint>

namespace lenet_ext {

// Winner code of a pooled output through which no gradient flows: its maximum was <= 0, so ReLU closed it.
// Any other code is the winner's row-major position inside its pooling window, hence at most 255 positions a window.
constexpr uint8_t kDead = 255;
constexpr int64_t kMaxWindow = 255;

struct ConvPoolShape {
  int64_t batch, in_channels, height, width;         // input   [batch, in_channels, height, width]
  int64_t out_channels, kernel_h, kernel_w, groups;  // weight  [out_channels, in_channels / groups, kernel_h, kernel_w]
  int64_t stride_h, stride_w;                        // of the convolution
  int64_t pad_top, pad_bottom, pad_left, pad_right;  // of the convolution ("same" may be asymmetric)
  int64_t dilation_h, dilation_w;                    // of the convolution
  int64_t conv_h, conv_w;                            // size of the convolution's output, which is never stored
  int64_t pool_kernel_h, pool_kernel_w;
  int64_t pool_stride_h, pool_stride_w;
  int64_t pool_pad_h, pool_pad_w;
  int64_t pool_dilation_h, pool_dilation_w;
  int64_t out_h, out_w;  // output, indices [batch, out_channels, out_h, out_w]
};

}  // namespace lenet_ext
