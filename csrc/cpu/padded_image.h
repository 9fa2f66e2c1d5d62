// One image, zero-padded and widened to the arithmetic type, laid out for the kernel that reads it.
#pragma once

#include "conv_pool_kernels.h"
#include "transpose.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// The extents of the padded image that the convolution touches.
LENET_EXT_INLINE int64_t padded_height(const ConvPoolShape& s) {
  return (s.conv_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
}
LENET_EXT_INLINE int64_t padded_width(const ConvPoolShape& s) {
  return (s.conv_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
}

// Channel planes in which convolution columns are neighbours: the columns of a row are split by their phase
// modulo the stride, [channel][row][phase][column / stride]. With stride 1 that is the plain row.
struct PlanarLayout {
  int64_t phase_length, row_stride, plane_stride;
};

LENET_EXT_INLINE PlanarLayout planar_layout(const ConvPoolShape& s, int64_t rows) {
  PlanarLayout layout;
  layout.phase_length = divide_up(padded_width(s), s.stride_w);
  layout.row_stride = layout.phase_length * s.stride_w;
  layout.plane_stride = layout.row_stride * rows;
  return layout;
}

// Padded rows [row_begin, row_end) of all channels.
template <typename T>
void gather_planar(const ConvPoolShape& s, const T* image, const Strides4& strides, int64_t row_begin, int64_t row_end,
                   const PlanarLayout& layout, Accumulator<T>* to) {
  const int64_t width = padded_width(s);
  for (int64_t c = 0; c < s.in_channels; ++c) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      Accumulator<T>* out = to + c * layout.plane_stride + (row - row_begin) * layout.row_stride;
      const int64_t y = row - s.pad_top;
      if (y < 0 || y >= s.height) {
        for (int64_t i = 0; i < layout.row_stride; ++i) out[i] = 0;
        continue;
      }
      const T* in = image + c * strides.c + y * strides.h;
      for (int64_t phase = 0; phase < s.stride_w; ++phase, out += layout.phase_length) {
        // Columns `phase + i * stride_w - pad_left` of the image, zero where it has none.
        const int64_t first = phase - s.pad_left;
        const int64_t end = max_of<int64_t>(min_of(layout.phase_length, divide_up(width - phase, s.stride_w)), 0);
        const int64_t inside_begin = min_of(end, first < 0 ? divide_up(-first, s.stride_w) : 0);
        const int64_t inside_end =
            max_of(inside_begin, min_of(end, s.width > first ? divide_up(s.width - first, s.stride_w) : 0));
        int64_t i = 0;
        for (; i < inside_begin; ++i) out[i] = 0;
        if (s.stride_w == 1 && strides.w == 1) {
          for (; i < inside_end; ++i) out[i] = widen(in[first + i]);
        } else {
          for (; i < inside_end; ++i) out[i] = widen(in[(first + i * s.stride_w) * strides.w]);
        }
        for (; i < layout.phase_length; ++i) out[i] = 0;
      }
    }
  }
}

// One row of pixels with their channels together.
template <typename T>
void pixel_row(const T* in, const Strides4& strides, int64_t channels, int64_t width, Accumulator<T>* out) {
  if (strides.c == 1) {
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t c = 0; c < channels; ++c) out[x * channels + c] = widen(in[x * strides.w + c]);
    }
    return;
  }
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
    if (strides.w == 1) return transpose_plane(in, channels, strides.c, width, out, channels);
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t x = 0; x < width; ++x) out[x * channels + c] = widen(in[c * strides.c + x * strides.w]);
  }
}

// Padded rows [row_begin, row_end) of pixels with their channels together, [row][column][channel]: the taps of one
// kernel row are contiguous. Returns whether all values are finite.
template <typename T>
bool gather_pixels(const ConvPoolShape& s, const T* image, const Strides4& strides, int64_t channel_begin,
                   int64_t channels, int64_t row_begin, int64_t row_end, Accumulator<T>* to) {
  const int64_t width = padded_width(s), row_stride = width * channels;
  bool finite = true;
  for (int64_t row = row_begin; row < row_end; ++row) {
    Accumulator<T>* out = to + (row - row_begin) * row_stride;
    const int64_t y = row - s.pad_top;
    const int64_t begin = y < 0 || y >= s.height ? width : min_of(width, s.pad_left);
    const int64_t end = max_of(begin, min_of(width, s.pad_left + s.width));
    for (int64_t i = 0; i < begin * channels; ++i) out[i] = 0;
    if (begin < end) {
      const T* in = image + channel_begin * strides.c + y * strides.h + (begin - s.pad_left) * strides.w;
      pixel_row(in, strides, channels, end - begin, out + begin * channels);
    }
    finite &= all_finite(out + begin * channels, (end - begin) * channels);
    for (int64_t i = end * channels; i < row_stride; ++i) out[i] = 0;
  }
  return finite;
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
