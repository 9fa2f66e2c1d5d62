// The sizes of one ReLU + avg_pool2d, as every kernel (CPU and CUDA) receives them. No torch in here.
#pragma once

#include <cstdint>

namespace lenet_ext {

struct AvgPoolShape {
  int64_t batch, channels, height, width;  // input   [batch, channels, height, width]
  int64_t out_h, out_w;                    // output  [batch, channels, out_h, out_w]
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  bool count_include_pad;
  int64_t divisor_override;  // 0: none
  bool channels_last;        // how all tensors are laid out; otherwise they are contiguous
};

}  // namespace lenet_ext
