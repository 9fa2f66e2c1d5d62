// The sizes as conv_relu_max_pool2d's kernels use them, and, for those of relu_avg_pool2d too, where elements lie.
#pragma once

#include "device.cuh"

namespace lenet_ext::cuda {

// ConvPoolShape with 32-bit sizes: positions inside one plane fit 32 bits (the host file checks it), offsets into
// tensors are 64-bit because strides are.
struct ConvPoolDims {
  int64_t batch;
  int in_channels, height, width;
  int out_channels, kernel_h, kernel_w, group_in, group_out;  // channels of one group
  int stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int conv_h, conv_w;
  int pool_kernel_h, pool_kernel_w, pool_stride_h, pool_stride_w, pool_pad_h, pool_pad_w;
  int pool_dilation_h, pool_dilation_w;
  int out_h, out_w;

  explicit ConvPoolDims(const ConvPoolShape& s)
      : batch(s.batch),
        in_channels(static_cast<int>(s.in_channels)),
        height(static_cast<int>(s.height)),
        width(static_cast<int>(s.width)),
        out_channels(static_cast<int>(s.out_channels)),
        kernel_h(static_cast<int>(s.kernel_h)),
        kernel_w(static_cast<int>(s.kernel_w)),
        group_in(static_cast<int>(s.in_channels / s.groups)),
        group_out(static_cast<int>(s.out_channels / s.groups)),
        stride_h(static_cast<int>(s.stride_h)),
        stride_w(static_cast<int>(s.stride_w)),
        pad_top(static_cast<int>(s.pad_top)),
        pad_left(static_cast<int>(s.pad_left)),
        dilation_h(static_cast<int>(s.dilation_h)),
        dilation_w(static_cast<int>(s.dilation_w)),
        conv_h(static_cast<int>(s.conv_h)),
        conv_w(static_cast<int>(s.conv_w)),
        pool_kernel_h(static_cast<int>(s.pool_kernel_h)),
        pool_kernel_w(static_cast<int>(s.pool_kernel_w)),
        // A window that is alone needs no stride, and a large one makes sums that 32 bits do not hold.
        pool_stride_h(static_cast<int>(s.out_h > 1 ? s.pool_stride_h : 1)),
        pool_stride_w(static_cast<int>(s.out_w > 1 ? s.pool_stride_w : 1)),
        pool_pad_h(static_cast<int>(s.pool_pad_h)),
        pool_pad_w(static_cast<int>(s.pool_pad_w)),
        pool_dilation_h(static_cast<int>(s.pool_dilation_h)),
        pool_dilation_w(static_cast<int>(s.pool_dilation_w)),
        out_h(static_cast<int>(s.out_h)),
        out_w(static_cast<int>(s.out_w)) {}
};

LX_DEVICE int64_t offset_of(const Strides4& strides, int64_t n, int c, int h, int w) {
  return n * strides.n + c * strides.c + h * strides.h + w * strides.w;
}

// One element of a tensor [batch, channels, h, w] from its position in the order of threads: the order of memory, so
// that neighbouring threads read neighbouring elements, which is w fastest or, with channels_last, c fastest.
struct Element {
  int64_t n;
  int c, h, w;
};
LX_DEVICE Element element_at(int64_t position, int channels, int height, int width, bool channels_last = false) {
  if (channels_last) {
    const Element e = element_at(position / channels, 1, height, width);
    return {e.n, static_cast<int>(position % channels), e.h, e.w};
  }
  const int64_t plane = static_cast<int64_t>(height) * width;
  const int64_t image_and_channel = position / plane;
  const int in_plane = static_cast<int>(position - image_and_channel * plane);
  const int64_t n = image_and_channel / channels;
  return {n, static_cast<int>(image_and_channel - n * channels), in_plane / width, in_plane % width};
}

// Stock's pooling rule over the values before ReLU, fed in row-major order: a value replaces the best if it is greater
// or NaN, so the first of equals wins, and the last NaN. ReLU afterwards gives what ReLU before would: it is
// monotone, and where the maximum is <= 0 no gradient flows, whichever of the zeros wins.
template <typename A>
struct Winner {
  A best = -INFINITY;
  int position = 0;
  bool any = false;

  LX_DEVICE void consider(A value, int at) {
    any = true;
    if (value > best || lx::is_nan(value)) {
      best = value;
      position = at;
    }
  }
  // A window that pool_dilation put outside of the map altogether keeps stock's initial value, -infinity.
  LX_DEVICE A pooled() const { return best > 0 || lx::is_nan(best) || !any ? best : A(0); }
  LX_DEVICE uint8_t code() const { return best > 0 || lx::is_nan(best) ? static_cast<uint8_t>(position) : kDead; }
};

// Where in the convolution's output the winner with this code lies.
struct ConvPosition {
  int h, w;
};
LX_DEVICE ConvPosition winner_position(const ConvPoolDims& d, int out_h, int out_w, int code) {
  const int i = code / d.pool_kernel_w, j = code - i * d.pool_kernel_w;
  return {out_h * d.pool_stride_h - d.pool_pad_h + i * d.pool_dilation_h,
          out_w * d.pool_stride_w - d.pool_pad_w + j * d.pool_dilation_w};
}

// The convolution at one position, without the bias. `input` is the first channel of the group in image n, `weight` the
// output channel's.
template <typename T>
LX_DEVICE lx::Accumulator<T> convolution_at(const ConvPoolDims& d, const T* input, const Strides4& strides,
                                            const T* weight, ConvPosition position) {
  const int h0 = position.h * d.stride_h - d.pad_top, w0 = position.w * d.stride_w - d.pad_left;
  lx::Accumulator<T> sum = 0;
  for (int c = 0; c < d.group_in; ++c) {
    for (int i = 0; i < d.kernel_h; ++i) {
      const int h = h0 + i * d.dilation_h;
      for (int j = 0; j < d.kernel_w; ++j) {
        const int w = w0 + j * d.dilation_w;
        const lx::Accumulator<T> weight_value = lx::widen(*weight++);
        if (h >= 0 && h < d.height && w >= 0 && w < d.width) {
          sum += lx::widen(input[c * strides.c + h * strides.h + w * strides.w]) * weight_value;
        }
      }
    }
  }
  return sum;
}

}  // namespace lenet_ext::cuda
