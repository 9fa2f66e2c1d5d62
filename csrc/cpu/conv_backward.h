// Gradients of the fused operator, from the winning positions alone.
//
// With g = grad_output and w(o, p) the convolution position that won pooled output p of channel o (nothing where ReLU
// closed it):
//
//   grad_bias[o]         = sum over p of g[o, p]
//   grad_weight[o, taps] = sum over p of g[o, p] * input[patch under w(o, p)]
//   grad_input[patch under w(o, p)] += g[o, p] * weight[o, taps]
//
// which is a 1 / (pool_stride_h * pool_stride_w) part of the dense arithmetic. The image is laid out with its channels
// together, so that a kernel row's taps are one contiguous run. The weight gradient walks, for each output channel, the
// list of its winners; the input gradient gathers, for each pooled position, over the output channels into the small
// window of the image that they can reach, kept in registers (window_sum.h), instead of scattering one kernel after
// the other.
//
// Large images are cut into bands of pooled rows where the batch alone would not keep the threads busy. The weight
// gradient of a band is that of its own winners; its part of the input gradient also needs the winners of the few rows
// above whose windows reach into it, which it visits again. The bands of all images are cut into slices, each with sums
// of its own, which are added up in order. All that depends on the shape alone, so the result does not depend on the
// number of threads.
#pragma once

#include "window_sum.h"
#include "winner_lists.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

constexpr int64_t kMaxSlices = 32, kMinSlices = 8, kEnoughBands = 8;
constexpr int64_t kMaxPartials = int64_t{1} << 25;  // bytes of all slices' sums, unless that means few slices
constexpr double kMinBandFlops = 2e6;               // a band of less is not worth the rows it visits again
constexpr int64_t kListSlack = 16;                  // entries that may be written past a list's end

template <typename A>
struct BackwardPlan {
  int64_t channels, out_channels;  // of a group
  Runs runs;
  int64_t bands, band_rows;  // of an image, and pooled rows of a band
  int64_t halo;              // pooled rows above a band whose windows reach into it
  int64_t slices, slice_bands;
  int64_t positions;   // pooled positions of a channel in a band and its halo
  int64_t list_size;   // entries of a position's list: the channels of a group, and slack
  int64_t slack;       // elements that may be read past the end of an image
  int64_t image_size;  // elements of a band's padded image of a group, and slack

  // Weight gradient: per output channel `runs.count` rows of `row_length` sums.
  int64_t row_length, partial_size;

  // Input gradient by windows: what all winners of a pooled position can reach, and kernels framed with zeros so
  // that shifting the kernel is moving the pointer. Not for dilated kernels, whose frames would be mostly zeros.
  bool windowed;
  int64_t window_rows, window_length;  // of the image, in rows and elements
  int64_t frame_rows, frame_length;    // zeros around a kernel, in rows and elements
  int64_t framed_stride, framed_size;  // of one framed kernel
};

// The padded image row where the windows of a pooled row start; negative where the pool's padding comes first.
LENET_EXT_INLINE int64_t window_top(const ConvPoolShape& s, int64_t pooled_row) {
  return (pooled_row * s.pool_stride_h - s.pool_pad_h) * s.stride_h;
}
// Padded image rows under one window.
LENET_EXT_INLINE int64_t window_reach(const ConvPoolShape& s) {
  return (s.pool_kernel_h - 1) * s.pool_dilation_h * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
}

struct Band {
  int64_t begin, end;          // pooled rows
  int64_t first;               // of the pooled rows whose windows reach into it
  int64_t row_begin, row_end;  // padded image rows under all of those
  int64_t own_begin, own_end;  // image rows, without padding, of which the band stores the gradient
};

template <typename A>
Band band_of(const ConvPoolShape& s, const BackwardPlan<A>& p, int64_t index) {
  Band b;
  b.begin = index * p.band_rows;
  b.end = min_of(s.out_h, b.begin + p.band_rows);
  b.first = max_of<int64_t>(b.begin - p.halo, 0);
  // The first and the last band have the rows that no window reaches.
  const bool last = b.end == s.out_h;
  const int64_t height = padded_height(s);
  b.row_begin = index == 0 ? 0 : max_of<int64_t>(window_top(s, b.first), 0);
  b.row_end = last ? height : max_of(b.row_begin, min_of(height, window_top(s, b.end - 1) + window_reach(s)));
  b.own_begin = index == 0 ? 0 : max_of<int64_t>(window_top(s, b.begin) - s.pad_top, 0);
  b.own_end = last ? s.height : max_of<int64_t>(window_top(s, b.end) - s.pad_top, 0);
  return b;
}

template <typename A>
BackwardPlan<A> backward_plan(const ConvPoolShape& s) {
  BackwardPlan<A> p;
  p.channels = s.in_channels / s.groups;
  p.out_channels = s.out_channels / s.groups;
  p.runs = kernel_runs(s, p.channels);
  const double flops =
      4.0 * s.out_h * s.out_w * s.out_channels * p.channels * static_cast<double>(s.kernel_h * s.kernel_w);
  p.halo = (window_reach(s) - 1) / (s.pool_stride_h * s.stride_h);
  p.bands = divide_up(kEnoughBands, max_of<int64_t>(s.batch, 1));
  p.bands = min_of(p.bands, min_of(static_cast<int64_t>(flops / kMinBandFlops), s.out_h / (4 * p.halo + 1)));
  p.band_rows = max_of<int64_t>(divide_up(s.out_h, max_of<int64_t>(p.bands, 1)), 1);
  p.bands = max_of<int64_t>(divide_up(s.out_h, p.band_rows), 1);
  p.positions = min_of(s.out_h, p.band_rows + p.halo) * s.out_w;
  p.list_size = p.out_channels + kListSlack;
  p.row_length = round_up(p.runs.length, window_lanes<A>(p.runs.length));
  p.partial_size = round_up(s.out_channels * (p.runs.count * p.row_length + 1), 64 / sizeof(A));
  const int64_t affordable = max_of(kMaxPartials / (p.partial_size * int64_t{sizeof(A)}), kMinSlices);
  p.slices = max_of<int64_t>(min_of(s.batch * p.bands, min_of(kMaxSlices, affordable)), 1);
  p.slice_bands = max_of<int64_t>(divide_up(s.batch * p.bands, p.slices), 1);
  p.slices = max_of<int64_t>(divide_up(s.batch * p.bands, p.slice_bands), 1);

  p.windowed = s.dilation_h == 1 && s.dilation_w == 1;
  p.frame_rows = (s.pool_kernel_h - 1) * s.pool_dilation_h * s.stride_h;
  p.frame_length = (s.pool_kernel_w - 1) * s.pool_dilation_w * s.stride_w * p.channels;
  p.window_rows = s.kernel_h + p.frame_rows;
  p.window_length = s.kernel_w * p.channels + p.frame_length;
  const int64_t vector_length = round_up(p.window_length, window_lanes<A>(p.window_length));
  p.framed_stride = vector_length + p.frame_length;
  p.framed_size = (p.window_rows + p.frame_rows) * p.framed_stride;
  // Small kernels under large windows: adding to memory costs less than all those zeros.
  if (p.window_rows * p.window_length > 3 * p.runs.count * p.runs.length) p.windowed = false;
  if (s.out_channels * p.framed_size > int64_t{1} << 30) p.windowed = false;

  p.slack = max_of(p.row_length, vector_length) + p.frame_length + kLanes<A>;
  int64_t rows = 0;
  for (int64_t i = 0; i < p.bands; ++i) {
    const Band band = band_of(s, p, i);
    rows = max_of(rows, band.row_end - band.row_begin);
  }
  p.image_size = round_up(rows * padded_width(s) * p.channels + p.slack, 64 / sizeof(A));
  return p;
}

// One buffer carved up for a run of units.
template <typename A>
struct BackwardScratch {
  A* image;
  A* grad_image;  // null where no input gradient is wanted
  A* grad_window;
  WinnerTables* tables;
  int32_t* framed_offset;   // [256]: of a code in a framed kernel
  int32_t* window_offsets;  // [positions]
  int32_t* list_offsets;    // [positions]: the winners of one channel
  A* list_scales;
  int32_t* window_counts;   // [positions]: how many channels have a winner there
  int32_t* kernel_offsets;  // [positions][list_size]
  A* kernel_scales;
  int64_t bytes;
};

template <typename A>
BackwardScratch<A> backward_scratch(const BackwardPlan<A>& p, bool input_gradient, char* base) {
  BackwardScratch<A> b{};
  char* at = base;
  auto take = [&at](int64_t bytes) {
    char* from = at;
    at += round_up(bytes, 64);
    return from;
  };
  b.image = reinterpret_cast<A*>(take(p.image_size * sizeof(A)));
  b.tables = reinterpret_cast<WinnerTables*>(take(sizeof(WinnerTables)));
  b.framed_offset = reinterpret_cast<int32_t*>(take(256 * sizeof(int32_t)));
  b.window_offsets = reinterpret_cast<int32_t*>(take(p.positions * sizeof(int32_t)));
  b.list_offsets = reinterpret_cast<int32_t*>(take((p.positions + kListSlack) * sizeof(int32_t)));
  b.list_scales = reinterpret_cast<A*>(take((p.positions + kListSlack) * sizeof(A)));
  if (input_gradient) {
    b.grad_image = reinterpret_cast<A*>(take(p.image_size * sizeof(A)));
    b.window_counts = reinterpret_cast<int32_t*>(take(p.positions * sizeof(int32_t)));
    b.kernel_offsets = reinterpret_cast<int32_t*>(take((p.positions * p.list_size + kListSlack) * sizeof(int32_t)));
    b.kernel_scales = reinterpret_cast<A*>(take((p.positions * p.list_size + kListSlack) * sizeof(A)));
    b.grad_window = reinterpret_cast<A*>(take(p.window_rows * p.framed_stride * sizeof(A)));
  }
  b.bytes = at - base;
  return b;
}

template <typename T>
int64_t backward_packed_bytes(const ConvPoolShape& s, bool input_gradient) {
  using A = Accumulator<T>;
  if (!input_gradient) return 0;
  const BackwardPlan<A> p = backward_plan<A>(s);
  return s.out_channels * (p.windowed ? p.framed_size : p.runs.count * p.runs.length) * sizeof(A);
}

template <typename T>
int64_t backward_scratch_bytes(const ConvPoolShape& s, bool input_gradient) {
  using A = Accumulator<T>;
  return backward_scratch<A>(backward_plan<A>(s), input_gradient, nullptr).bytes;
}

template <typename T>
int64_t backward_units(const ConvPoolShape& s) {
  return backward_plan<Accumulator<T>>(s).slices;
}

template <typename T>
int64_t backward_partial_bytes(const ConvPoolShape& s) {
  return backward_plan<Accumulator<T>>(s).partial_size * sizeof(Accumulator<T>);
}

// Kernels in the image's layout: framed with zeros, or as plain runs.
template <typename T>
bool backward_prepare(const ConvPoolBackward<T>& job, void* packed) {
  using A = Accumulator<T>;
  const ConvPoolShape& s = job.shape;
  if (job.grad_input == nullptr) return true;
  const BackwardPlan<A> p = backward_plan<A>(s);
  const int64_t size = p.windowed ? p.framed_size : p.runs.count * p.runs.length;
  A* to = static_cast<A*>(packed);
  if (p.windowed) {
    for (int64_t i = 0; i < s.out_channels * size; ++i) to[i] = 0;
  }
  const int64_t taps = s.kernel_h * s.kernel_w;
  for (int64_t o = 0; o < s.out_channels; ++o, to += size) {
    const T* from = job.weight + o * p.channels * taps;
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
      A* row =
          p.windowed ? to + (p.frame_rows + ky) * p.framed_stride + p.frame_length : to + ky * s.kernel_w * p.channels;
      for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
        for (int64_t c = 0; c < p.channels; ++c) {
          row[kx * p.channels + c] = widen(from[c * taps + ky * s.kernel_w + kx]);
        }
      }
    }
  }
  return all_finite(static_cast<const A*>(packed), s.out_channels * size);
}

// grad[run][i] += scale * kernel[run][i] at one winner: for the kernels that have no framed window.
template <typename A>
void scatter_kernel(const Runs& runs, const A* kernel, A scale, A* grad) {
  for (int64_t run = 0; run < runs.count; ++run, kernel += runs.length) {
    A* to = grad + run / runs.per_row * runs.row_stride + run % runs.per_row * runs.column_stride;
    for (int64_t i = 0; i < runs.length; ++i) to[i] += scale * kernel[i];
  }
}

// From a band in the padded pixel layout to its rows of grad_input, zero where no window reached.
template <typename T>
void store_grad_input(const ConvPoolBackward<T>& job, int64_t n, int64_t group, int64_t channels, const Band& band,
                      const Accumulator<T>* grad_image) {
  const ConvPoolShape& s = job.shape;
  const int64_t width = padded_width(s);
  const Strides4& st = job.grad_input_strides;
  // Pixels of a row that a window may reach; the others are zero.
  const int64_t reached = max_of<int64_t>(min_of(s.width, width - s.pad_left), 0);
  T* image = job.grad_input + n * st.n + group * channels * st.c;
  for (int64_t y = band.own_begin; y < min_of(band.own_end, s.height); ++y) {
    T* out = image + y * st.h;
    const int64_t row = y + s.pad_top, x_end = row < band.row_end ? reached : 0;
    const Accumulator<T>* in = grad_image + ((row - band.row_begin) * width + s.pad_left) * channels;
    if (st.c == 1) {
      for (int64_t x = 0; x < s.width; ++x) {
        for (int64_t c = 0; c < channels; ++c) out[x * st.w + c] = x < x_end ? narrow<T>(in[x * channels + c]) : T{};
      }
      continue;
    }
    int64_t first = 0;
    if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
      if (st.w == 1) {
        transpose_plane(in, x_end, channels, channels, out, st.c);
        first = x_end;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t x = first; x < s.width; ++x) {
        out[c * st.c + x * st.w] = x < x_end ? narrow<T>(in[x * channels + c]) : T{};
      }
    }
  }
}

template <typename T>
bool backward_run(const ConvPoolBackward<T>& job, const void* packed, void* partials, void* scratch_base, int64_t begin,
                  int64_t end) {
  using A = Accumulator<T>;
  const ConvPoolShape& s = job.shape;
  const BackwardPlan<A> p = backward_plan<A>(s);
  const bool input_gradient = job.grad_input != nullptr, weight_gradient = job.grad_weight != nullptr;
  const BackwardScratch<A> b = backward_scratch<A>(p, input_gradient, static_cast<char*>(scratch_base));
  const int64_t row_stride = padded_width(s) * p.channels;

  WinnerTables& tables = *b.tables;
  make_winner_tables(s, p.channels, tables);
  for (int64_t code = 0; code < 256; ++code) {
    // The further into the window the winner is, the more of the zero frame precedes its kernel.
    b.framed_offset[code] = static_cast<int32_t>((p.frame_rows - tables.row[code] * s.stride_h) * p.framed_stride +
                                                 p.frame_length - tables.column[code] * s.stride_w * p.channels);
  }
  const bool whole_row_runs = p.runs.per_row == 1;
  const WindowSum<A> weight_sum = window_sum<A>(whole_row_runs ? p.runs.count : 1, p.runs.length);
  const WindowSum<A> input_sum = window_sum<A>(p.window_rows, p.window_length);
  const int64_t kernel_size = p.windowed ? p.framed_size : p.runs.count * p.runs.length;
  const Strides4 &gs = job.grad_output_strides, &is = job.indices_strides;

  int64_t current = -1;  // the band that window_offsets belong to
  for (int64_t slice = begin; slice < end; ++slice) {
    A* partial = static_cast<A*>(partials) + slice * p.partial_size;
    A* bias_partial = partial + s.out_channels * p.runs.count * p.row_length;
    if (weight_gradient) {
      for (int64_t i = 0; i < p.partial_size; ++i) partial[i] = 0;
    }
    const int64_t pieces_end = min_of(s.batch * p.bands, (slice + 1) * p.slice_bands);
    for (int64_t piece = slice * p.slice_bands; piece < pieces_end; ++piece) {
      const int64_t n = piece / p.bands, index = piece % p.bands;
      const Band band = band_of(s, p, index);
      const int64_t image_size = (band.row_end - band.row_begin) * row_stride;
      if (index != current) {
        current = index;
        for (int64_t y = band.first, position = 0; y < band.end; ++y) {
          for (int64_t x = 0; x < s.out_w; ++x, ++position) {
            b.window_offsets[position] =
                static_cast<int32_t>(window_offset(s, p.channels, y, x) - band.row_begin * row_stride);
          }
        }
        for (int64_t i = image_size; i < image_size + p.slack; ++i) b.image[i] = 0;
      }
      const int32_t* own_windows = b.window_offsets + (band.begin - band.first) * s.out_w;
      for (int64_t group = 0; group < s.groups; ++group) {
        if (weight_gradient && !gather_pixels(s, job.input + n * job.input_strides.n, job.input_strides,
                                              group * p.channels, p.channels, band.row_begin, band.row_end, b.image)) {
          return false;
        }
        if (input_gradient) {
          for (int64_t i = 0; i < p.positions; ++i) b.window_counts[i] = 0;
          for (int64_t i = 0; i < image_size + p.slack; ++i) b.grad_image[i] = 0;
        }
        const int64_t first = group * p.out_channels;
        PooledGroup<T> own{job.grad_output + n * gs.n + first * gs.c,
                           job.indices + n * is.n + first * is.c,
                           gs,
                           is,
                           p.out_channels,
                           band.begin,
                           band.end};
        PooledGroup<T> reaching = own, above = own;
        reaching.row_begin = above.row_begin = band.first;
        above.row_end = band.begin;
        for (int64_t o = 0; o < p.out_channels; ++o) {
          const int64_t channel = first + o;
          const int64_t count = channel_winners(s, tables, own, o, own_windows, b.list_offsets, b.list_scales);
          const A bias_sum = sum_of(b.list_scales, count);
          if (!all_finite(&bias_sum, 1)) return false;
          if (weight_gradient) {
            bias_partial[channel] += bias_sum;
            A* sums = partial + channel * p.runs.count * p.row_length;
            if (whole_row_runs) {
              weight_sum.add({b.image, p.runs.stride, b.list_offsets, b.list_scales, count}, sums, p.row_length);
            } else {
              for (int64_t run = 0; run < p.runs.count; ++run) {
                const int64_t at =
                    run / p.runs.per_row * p.runs.row_stride + run % p.runs.per_row * p.runs.column_stride;
                weight_sum.add({b.image + at, 0, b.list_offsets, b.list_scales, count}, sums + run * p.row_length, 0);
              }
            }
          }
          if (input_gradient && !p.windowed) {
            const A* kernel = static_cast<const A*>(packed) + channel * kernel_size;
            auto scatter = [&](int64_t winners) {
              for (int64_t e = 0; e < winners; ++e) {
                scatter_kernel(p.runs, kernel, b.list_scales[e], b.grad_image + b.list_offsets[e]);
              }
            };
            scatter(count);
            scatter(channel_winners(s, tables, above, o, b.window_offsets, b.list_offsets, b.list_scales));
          }
        }
        if (!input_gradient) continue;
        if (p.windowed) {
          position_winners(s, tables, reaching, b.framed_offset, kernel_size, p.list_size, b.kernel_offsets,
                           b.kernel_scales, b.window_counts);
          const A* kernels = static_cast<const A*>(packed) + first * kernel_size;
          for (int64_t y = band.first, position = 0; y < band.end; ++y) {
            for (int64_t x = 0; x < s.out_w; ++x, ++position) {
              const WindowList<A> list{kernels, p.framed_stride, b.kernel_offsets + position * p.list_size,
                                       b.kernel_scales + position * p.list_size, b.window_counts[position]};
              const int64_t offset = b.window_offsets[position];
              if (tables.inside) {
                input_sum.add(list, b.grad_image + offset, row_stride);
                continue;
              }
              // A window that hangs over the border is summed apart; what lies outside is zero.
              for (int64_t i = 0; i < p.window_rows * p.framed_stride; ++i) b.grad_window[i] = 0;
              input_sum.add(list, b.grad_window, p.framed_stride);
              const int64_t top = window_top(s, y) - band.row_begin;
              const int64_t left = (x * s.pool_stride_w - s.pool_pad_w) * s.stride_w * p.channels;
              for (int64_t r = max_of<int64_t>(-top, 0); r < min_of(p.window_rows, band.row_end - band.row_begin - top);
                   ++r) {
                for (int64_t i = max_of<int64_t>(-left, 0); i < min_of(p.window_length, row_stride - left); ++i) {
                  b.grad_image[(top + r) * row_stride + left + i] += b.grad_window[r * p.framed_stride + i];
                }
              }
            }
          }
        }
        store_grad_input(job, n, group, p.channels, band, b.grad_image);
      }
    }
  }
  return true;
}

// The gradients of the output channels [begin, end).
template <typename T>
void backward_reduce(const ConvPoolBackward<T>& job, void* partials, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const ConvPoolShape& s = job.shape;
  const BackwardPlan<A> p = backward_plan<A>(s);
  const int64_t kernel_size = p.runs.count * p.row_length, taps = s.kernel_h * s.kernel_w;
  const int64_t run_taps = taps / p.runs.count;
  A* first = static_cast<A*>(partials);
  for (int64_t o = begin; o < end; ++o) {
    A* sums = first + o * kernel_size;
    A* bias_sum = first + s.out_channels * kernel_size + o;
    for (int64_t slice = 1; slice < p.slices; ++slice) {
      const A* more = sums + slice * p.partial_size;
      for (int64_t i = 0; i < kernel_size; ++i) sums[i] += more[i];
      *bias_sum += bias_sum[slice * p.partial_size];
    }
    T* kernel = job.grad_weight + o * p.channels * taps;
    for (int64_t run = 0; run < p.runs.count; ++run) {
      for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t tap = 0; tap < run_taps; ++tap) {
          kernel[c * taps + run * run_taps + tap] = narrow<T>(sums[run * p.row_length + tap * p.channels + c]);
        }
      }
    }
    job.grad_bias[o] = narrow<T>(*bias_sum);
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
