// How many windows a pooling has along one dimension.
#pragma once

#include <cstdint>

namespace lenet_ext {

// PyTorch documentation of MaxPool2d and AvgPool2d, "Shape" and "ceil_mode": with ceil_mode a last window may overhang,
// but must start inside the input or its left padding. Arguments are bounded first so that nothing overflows.
inline int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                           bool ceil_mode) {
  const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (span < 0 && !(ceil_mode && span + stride - 1 >= 0)) return 0;
  int64_t out = (span + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (ceil_mode && (out - 1) * stride >= size + padding) --out;
  return out;
}

}  // namespace lenet_ext
