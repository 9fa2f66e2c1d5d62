// ReLU and max pooling in one pass over the output of the vendor's convolution, and back.
//
// Units are blocks of channels of an image, as many as a vector has lanes. Where the convolution's output has its
// channels together (channels_last) they are handled as vectors. Elsewhere the forward pass first brings together those
// of the rows that it is about to read; the backward pass, which goes to few positions, takes them one by one.
#pragma once

#include "conv_forward.h"
#include "winners.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

template <typename T>
struct ReluPoolScratch {
  using A = Accumulator<T>;
  A* values;  // a pooled row, [out_w][lanes]
  typename IntegerOf<A>::type* codes;
  A* gathered;  // [pool_kernel_h][conv_w][lanes] of the convolution's output, where it is not read in place
  const A** rows;
  int64_t bytes;
};

template <typename T>
ReluPoolScratch<T> relu_pool_scratch(const ConvPoolShape& s, char* base) {
  using A = Accumulator<T>;
  const int64_t vector = kLanes<A> * sizeof(A), row = s.out_w * vector;
  const int64_t gathered = s.pool_kernel_h * s.conv_w * vector;
  return {reinterpret_cast<A*>(base), reinterpret_cast<typename IntegerOf<A>::type*>(base + row),
          reinterpret_cast<A*>(base + 2 * row), reinterpret_cast<const A**>(base + 2 * row + gathered),
          2 * row + gathered + static_cast<int64_t>(s.pool_kernel_h * sizeof(A*))};
}

template <typename T>
int64_t relu_pool_scratch_bytes(const ConvPoolShape& s) {
  return relu_pool_scratch<T>(s, nullptr).bytes;
}

// The channels of a unit.
struct ChannelBlock {
  int64_t n, first, count;
  bool in_vectors;  // a whole vector of neighbours
};

template <typename T>
LENET_EXT_INLINE ChannelBlock channel_block(const ConvPoolShape& s, int64_t unit, const Strides4& conv_strides) {
  constexpr int64_t lanes = kLanes<Accumulator<T>>;
  const int64_t blocks = divide_up(s.out_channels, lanes), first = unit % blocks * lanes;
  const int64_t count = min_of(lanes, s.out_channels - first);
  return {unit / blocks, first, count, conv_strides.c == 1 && count == lanes};
}

// A row of the convolution's output to [conv_w][lanes].
template <typename T>
void gather_channels(const T* row, const Strides4& strides, const ChannelBlock& block, int64_t conv_w,
                     Accumulator<T>* to) {
  constexpr int lanes = kLanes<Accumulator<T>>;
  if (block.in_vectors) {
    for (int64_t x = 0; x < conv_w; ++x) store(to + x * lanes, load_widened<lanes>(row + x * strides.w));
    return;
  }
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
    if (strides.w == 1) return transpose_plane(row, block.count, strides.c, conv_w, to, lanes);
  }
  for (int64_t lane = 0; lane < block.count; ++lane) {
    for (int64_t x = 0; x < conv_w; ++x) to[x * lanes + lane] = widen(row[lane * strides.c + x * strides.w]);
  }
}

template <typename T>
void relu_pool_forward(const ReluPool<T>& job, void* scratch_base, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const ConvPoolShape& s = job.shape;
  const Strides4& cs = job.conv_strides;
  const ReluPoolScratch<T> scratch = relu_pool_scratch<T>(s, static_cast<char*>(scratch_base));
  const PoolRow<A> pool = pool_row_for<A, kLanes<A>>(s, job.indices != nullptr);
  const PooledOutput<T> pooled{job.output, job.indices, job.output_strides, s.out_w};
  for (int64_t unit = begin; unit < end; ++unit) {
    const ChannelBlock block = channel_block<T>(s, unit, cs);
    const bool in_place = block.in_vectors && sizeof(T) == sizeof(A);
    const T* conv = job.conv + block.n * cs.n + block.first * cs.c;
    for (int64_t y = 0; y < s.out_h; ++y) {
      const WindowRange rows = window_rows(s, y);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const T* row = conv + (rows.start + i * s.pool_dilation_h) * cs.h;
        A* gathered = scratch.gathered + i * s.conv_w * kLanes<A>;
        if (!in_place) gather_channels(row, cs, block, s.conv_w, gathered);
        scratch.rows[i] = in_place ? reinterpret_cast<const A*>(row) : gathered;
      }
      pool(s, scratch.rows, rows, 1, in_place ? cs.w : kLanes<A>, scratch.values, scratch.codes);
      store_row<T, kLanes<A>>(pooled, block.n, block.first, block.count, y, kLanes<A>, scratch.values, scratch.codes);
    }
  }
}

template <typename T>
void relu_pool_backward_channel(const ReluPoolBackward<T>& job, const WinnerTables& tables, int64_t n, int64_t c) {
  const ConvPoolShape& s = job.shape;
  const Strides4 &gs = job.grad_output_strides, &is = job.indices_strides, &cs = job.grad_conv_strides;
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

// Whether the windows leave no position out, and whether none is in two of them.
LENET_EXT_INLINE bool windows_tile(const ConvPoolShape& s) {
  auto tile = [](int64_t conv, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    return dilation == 1 && kernel == stride && pad == 0 && out * stride >= conv;
  };
  return tile(s.conv_h, s.out_h, s.pool_kernel_h, s.pool_stride_h, s.pool_pad_h, s.pool_dilation_h) &&
         tile(s.conv_w, s.out_w, s.pool_kernel_w, s.pool_stride_w, s.pool_pad_w, s.pool_dilation_w);
}

// Every position of every window gets its winner's gradient or zero: more arithmetic than going to the winner, but
// without a branch and for all lanes at once. `tiles`: what windows_tile() says.
template <typename T, bool tiles>
void relu_pool_backward_block(const ReluPoolBackward<T>& job, const ReluPoolScratch<T>& scratch,
                              const ChannelBlock& block) {
  using A = Accumulator<T>;
  constexpr int lanes = kLanes<A>;
  using V = Vec<A, lanes>;
  using I = IntVec<A, lanes>;
  using Codes = Integers<uint8_t, lanes>;
  const ConvPoolShape& s = job.shape;
  const Strides4 &gs = job.grad_output_strides, &is = job.indices_strides, &cs = job.grad_conv_strides;
  T* conv = job.grad_conv + block.n * cs.n + block.first;
  if (!tiles) {
    for (int64_t y = 0; y < s.conv_h; ++y) {
      for (int64_t x = 0; x < s.conv_w; ++x) store_narrowed<lanes>(conv + y * cs.h + x * cs.w, V{});
    }
  }
  const bool together = gs.c == 1 && is.c == 1;
  for (int64_t y = 0; y < s.out_h; ++y) {
    const T* g = job.grad_output + block.n * gs.n + block.first * gs.c + y * gs.h;
    const uint8_t* codes = job.indices + block.n * is.n + block.first * is.c + y * is.h;
    for (int lane = 0; !together && lane < lanes; ++lane) {
      for (int64_t x = 0; x < s.out_w; ++x) {
        scratch.values[x * lanes + lane] = widen(g[lane * gs.c + x * gs.w]);
        scratch.codes[x * lanes + lane] = codes[lane * is.c + x * is.w];
      }
    }
    const WindowRange rows = window_rows(s, y);
    for (int64_t x = 0; x < s.out_w; ++x) {
      const WindowRange columns = window_columns(s, x);
      const V grad = together ? load_widened<lanes>(g + x * gs.w) : load<V>(scratch.values + x * lanes);
      const I code =
          together ? __builtin_convertvector(load<Codes>(codes + x * is.w), I) : load<I>(scratch.codes + x * lanes);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        T* row = conv + (rows.start + i * s.pool_dilation_h) * cs.h + columns.start * cs.w;
        for (int64_t j = columns.begin; j < columns.end; ++j) {
          T* to = row + j * s.pool_dilation_w * cs.w;
          const I place = I{} + static_cast<typename IntegerOf<A>::type>(i * s.pool_kernel_w + j);
          const V share = code == place ? grad : V{};
          store_narrowed<lanes>(to, tiles ? share : load_widened<lanes>(to) + share);
        }
      }
    }
  }
}

template <typename T>
void relu_pool_backward(const ReluPoolBackward<T>& job, void* scratch_base, int64_t begin, int64_t end) {
  const ConvPoolShape& s = job.shape;
  const ReluPoolScratch<T> scratch = relu_pool_scratch<T>(s, static_cast<char*>(scratch_base));
  WinnerTables tables;
  make_winner_tables(s, 1, tables);
  const auto run_block = windows_tile(s) ? relu_pool_backward_block<T, true> : relu_pool_backward_block<T, false>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const ChannelBlock block = channel_block<T>(s, unit, job.grad_conv_strides);
    if (block.in_vectors) {
      run_block(job, scratch, block);
      continue;
    }
    for (int64_t i = 0; i < block.count; ++i) {
      relu_pool_backward_channel(job, tables, block.n, block.first + i);
    }
  }
}

template <typename T>
bool are_finite(const T* values, int64_t count) {
  return all_finite(values, count);
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
