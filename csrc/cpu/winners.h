// From a winner code to the convolution position that it names.
#pragma once

#include "padded_image.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// Tables over all 256 codes, and over the pooled positions, for an image in the layout [row][column][channel].
struct WinnerTables {
  bool inside;         // every window lies inside the convolution's output, so a valid code needs no further check
  uint8_t valid[256];  // the code names a window position
  int32_t row[256];    // convolution rows below the window's start
  int32_t column[256];
  int32_t offset[256];  // elements between the window's start and the winner's first tap
};

LENET_EXT_INLINE void make_winner_tables(const ConvPoolShape& s, int64_t channels, WinnerTables& t) {
  const int64_t row_stride = padded_width(s) * channels;
  t.inside = s.pool_pad_h == 0 && s.pool_pad_w == 0 &&
             (s.out_h - 1) * s.pool_stride_h + (s.pool_kernel_h - 1) * s.pool_dilation_h < s.conv_h &&
             (s.out_w - 1) * s.pool_stride_w + (s.pool_kernel_w - 1) * s.pool_dilation_w < s.conv_w;
  for (int64_t code = 0; code < 256; ++code) {
    t.valid[code] = code < s.pool_kernel_h * s.pool_kernel_w;
    t.row[code] = static_cast<int32_t>(t.valid[code] ? code / s.pool_kernel_w * s.pool_dilation_h : 0);
    t.column[code] = static_cast<int32_t>(t.valid[code] ? code % s.pool_kernel_w * s.pool_dilation_w : 0);
    t.offset[code] =
        static_cast<int32_t>(t.row[code] * s.stride_h * row_stride + t.column[code] * s.stride_w * channels);
  }
}

// Does this code at pooled position (y, x) name a position of the convolution's output? Codes that the forward pass
// wrote do; any others must not make a kernel read outside its image.
LENET_EXT_INLINE bool names_winner(const ConvPoolShape& s, const WinnerTables& t, uint8_t code, int64_t y, int64_t x) {
  if (!t.valid[code]) return false;
  if (t.inside) return true;
  const int64_t row = y * s.pool_stride_h - s.pool_pad_h + t.row[code];
  const int64_t column = x * s.pool_stride_w - s.pool_pad_w + t.column[code];
  return row >= 0 && row < s.conv_h && column >= 0 && column < s.conv_w;
}

// Offset of the first tap of the window position 0 of pooled position (y, x); negative where padding comes first.
LENET_EXT_INLINE int64_t window_offset(const ConvPoolShape& s, int64_t channels, int64_t y, int64_t x) {
  return ((y * s.pool_stride_h - s.pool_pad_h) * s.stride_h * padded_width(s) +
          (x * s.pool_stride_w - s.pool_pad_w) * s.stride_w) *
         channels;
}

// The taps of a kernel as contiguous runs of the image: a whole kernel row where columns are not dilated, else a tap.
struct Runs {
  int64_t count, length, stride;  // stride: elements between the starts of consecutive runs (whole-row runs)
  int64_t per_row, row_stride, column_stride;
};

LENET_EXT_INLINE Runs kernel_runs(const ConvPoolShape& s, int64_t channels) {
  Runs r;
  const bool whole_rows = s.dilation_w == 1;
  r.row_stride = s.dilation_h * padded_width(s) * channels;
  r.column_stride = s.dilation_w * channels;
  r.per_row = whole_rows ? 1 : s.kernel_w;
  r.count = s.kernel_h * r.per_row;
  r.length = whole_rows ? s.kernel_w * channels : channels;
  r.stride = r.row_stride;
  return r;
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
