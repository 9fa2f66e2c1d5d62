// ReLU and max pooling in one pass over the output of the vendor's convolution, and back.
#pragma once

#include "conv_forward.h"
#include "winners.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// Units: the channels of all images.
template <typename T>
void relu_pool_forward(const ReluPool<T>& job, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const ConvPoolShape& s = job.shape;
  const Strides4 &cs = job.conv_strides, &os = job.output_strides;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / s.out_channels, c = unit % s.out_channels;
    const T* conv = job.conv + n * cs.n + c * cs.c;
    const int64_t out = n * os.n + c * os.c;
    for (int64_t y = 0; y < s.out_h; ++y) {
      const WindowRange rows = window_rows(s, y);
      for (int64_t x = 0; x < s.out_w; ++x) {
        const WindowRange columns = window_columns(s, x);
        const int64_t at = out + y * os.h + x * os.w;
        A best = static_cast<A>(-__builtin_inf());
        uint8_t code = kDead;
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          const T* row = conv + (rows.start + i * s.pool_dilation_h) * cs.h + columns.start * cs.w;
          for (int64_t j = columns.begin; j < columns.end; ++j) {
            const A candidate = widen(row[j * s.pool_dilation_w * cs.w]);
            if (candidate > best || is_nan(candidate)) {
              best = candidate;
              code = static_cast<uint8_t>(i * s.pool_kernel_w + j);
            }
          }
        }
        const bool empty = rows.begin == rows.end || columns.begin == columns.end;
        const bool closed = best <= 0;
        job.output[at] = narrow<T>(closed && !empty ? A(0) : best);
        if (job.indices != nullptr) job.indices[at] = closed ? kDead : code;
      }
    }
  }
}

template <typename T>
void relu_pool_backward(const ReluPoolBackward<T>& job, int64_t begin, int64_t end) {
  const ConvPoolShape& s = job.shape;
  const Strides4 &gs = job.grad_output_strides, &is = job.indices_strides, &cs = job.grad_conv_strides;
  WinnerTables tables;
  make_winner_tables(s, 1, tables);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / s.out_channels, c = unit % s.out_channels;
    const T* g = job.grad_output + n * gs.n + c * gs.c;
    const uint8_t* codes = job.indices + n * is.n + c * is.c;
    T* grad = job.grad_conv + n * cs.n + c * cs.c;
    for (int64_t y = 0; y < s.conv_h; ++y) {
      for (int64_t x = 0; x < s.conv_w; ++x) grad[y * cs.h + x * cs.w] = narrow<T>(0);
    }
    for (int64_t y = 0; y < s.out_h; ++y) {
      for (int64_t x = 0; x < s.out_w; ++x) {
        const uint8_t code = codes[y * is.h + x * is.w];
        if (!names_winner(s, tables, code, y, x)) continue;
        T& at = grad[(y * s.pool_stride_h - s.pool_pad_h + tables.row[code]) * cs.h +
                     (x * s.pool_stride_w - s.pool_pad_w + tables.column[code]) * cs.w];
        at = narrow<T>(widen(at) + widen(g[y * gs.h + x * gs.w]));
      }
    }
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
