// ReLU and average pooling in one pass over a layer's output, and back.
//
// Sums have stock's terms in stock's order, window by window and row by row, and are divided as stock divides them:
// in float32 and float64 the results are the same to the last bit.
#include "relu_avg_pool2d_kernels.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// --- windows ---

// What a window covers of one dimension: the positions [begin, end), and how many more of the padding.
struct Span {
  int64_t begin, end, with_padding;
};

LENET_EXT_INLINE Span span_of(int64_t out, int64_t size, int64_t kernel, int64_t stride, int64_t pad) {
  const int64_t start = out * stride - pad, end = min_of(start + kernel, size + pad);
  return {max_of<int64_t>(start, 0), min_of(end, size), end - start};
}
LENET_EXT_INLINE Span rows_of(const AvgPoolShape& s, int64_t y) {
  return span_of(y, s.height, s.kernel_h, s.stride_h, s.pad_h);
}
LENET_EXT_INLINE Span columns_of(const AvgPoolShape& s, int64_t x) {
  return span_of(x, s.width, s.kernel_w, s.stride_w, s.pad_w);
}

// The windows [begin, end) along one dimension that cover a position.
struct Covering {
  int64_t begin, end;
};

LENET_EXT_INLINE Covering covering(int64_t at, int64_t out, int64_t kernel, int64_t stride, int64_t pad) {
  const int64_t before = at + pad - kernel;  // the last position that the window before the first one may begin at
  return {before < 0 ? 0 : before / stride + 1, min_of(out, (at + pad) / stride + 1)};
}

// By what a window's sum is divided. Times the inverse of a power of two is the same, and quicker.
template <typename A>
struct Divisor {
  A value, inverse;
  bool has_inverse;

  explicit Divisor(int64_t count)
      : value(static_cast<A>(count)), inverse(1 / value), has_inverse(count > 0 && (count & (count - 1)) == 0) {}

  template <typename V>
  LENET_EXT_INLINE V divide(V sum) const {
    return has_inverse ? sum * inverse : sum / value;
  }
};

LENET_EXT_INLINE int64_t divisor_of(const AvgPoolShape& s, const Span& rows, const Span& columns) {
  if (s.divisor_override != 0) return s.divisor_override;
  return s.count_include_pad ? rows.with_padding * columns.with_padding
                             : (rows.end - rows.begin) * (columns.end - columns.begin);
}

// Whether all windows have the same divisor: none overhangs, and the padding, if there is any, counts.
bool has_one_divisor(const AvgPoolShape& s) {
  if (s.divisor_override != 0) return true;
  const bool whole =
      rows_of(s, s.out_h - 1).with_padding == s.kernel_h && columns_of(s, s.out_w - 1).with_padding == s.kernel_w;
  return whole && (s.count_include_pad || (s.pad_h == 0 && s.pad_w == 0));
}

// --- vectors ---

template <int N>
struct Lanes {
  static constexpr int count = N;
};

// The widest vectors that `count` elements fill: calls run(Lanes<N>). Below the narrowest, one by one.
template <typename A, int N, typename Run>
LENET_EXT_INLINE void with_lanes(int64_t count, const Run& run) {
  if constexpr (N == 1) {
    run(Lanes<1>());
  } else if (count >= N) {
    run(Lanes<N>());
  } else {
    with_lanes<A, (N * sizeof(A) > 16 ? N / 2 : 1)>(count, run);
  }
}

// Calls run(at) for blocks of N that cover [0, count). The last one begins earlier, and does some elements again, where
// the count is no multiple.
template <int N, typename Run>
LENET_EXT_INLINE void in_blocks(int64_t count, const Run& run) {
  for (int64_t at = 0; at < count; at += N) run(min_of(at, count - N));
}

// ReLU's gradient: NaN passes.
template <typename V>
LENET_EXT_INLINE V open(V input, V grad) {
  return input <= V{} ? V{} : grad;
}

// Windows of 2x2 side by side, for vectors of neighbours.
template <typename A>
bool is_two_by_two(const AvgPoolShape& s) {
  return s.kernel_h == 2 && s.kernel_w == 2 && s.stride_h == 2 && s.stride_w == 2 && s.pad_h == 0 && s.pad_w == 0 &&
         2 * s.out_h <= s.height && 2 * s.out_w <= s.width && s.out_w >= 16 / static_cast<int64_t>(sizeof(A));
}

// --- forward ---

int64_t units(const AvgPoolShape& s) { return s.batch * (s.channels_last ? s.out_h : s.channels); }

template <typename T, int N>
void run_channels_last(const ReluAvgPool<T>& job, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using V = Vec<A, N>;
  const AvgPoolShape& s = job.shape;
  for (int64_t unit = begin; unit < end; ++unit) {
    const T* image = job.input + unit / s.out_h * s.height * s.width * s.channels;
    const Span rows = rows_of(s, unit % s.out_h);
    for (int64_t x = 0; x < s.out_w; ++x) {
      const Span columns = columns_of(s, x);
      const Divisor<A> divisor(divisor_of(s, rows, columns));
      T* output = job.output + (unit * s.out_w + x) * s.channels;
      in_blocks<N>(s.channels, [&](int64_t c) {
        V sum{};
        for (int64_t h = rows.begin; h < rows.end; ++h) {
          const T* from = image + h * s.width * s.channels + c;
          for (int64_t w = columns.begin; w < columns.end; ++w) sum += relu(load_widened<N>(from + w * s.channels));
        }
        store_narrowed<N>(output + c, divisor.divide(sum));
      });
    }
  }
}

template <typename T, int N>
void run_two_by_two(const ReluAvgPool<T>& job, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using V = Vec<A, N>;
  const AvgPoolShape& s = job.shape;
  const Divisor<A> divisor(s.divisor_override != 0 ? s.divisor_override : 4);
  for (int64_t unit = begin; unit < end; ++unit) {
    for (int64_t y = 0; y < s.out_h; ++y) {
      const T* rows = job.input + (unit * s.height + 2 * y) * s.width;
      T* output = job.output + (unit * s.out_h + y) * s.out_w;
      in_blocks<N>(s.out_w, [&](int64_t x) {
        V sum{};
        LENET_EXT_UNROLL for (int row = 0; row < 2; ++row) {
          const T* from = rows + row * s.width + 2 * x;
          const V low = relu(load_widened<N>(from)), high = relu(load_widened<N>(from + N));
          sum += evens<N, A>(low, high);
          sum += odds<N, A>(low, high);
        }
        store_narrowed<N>(output + x, divisor.divide(sum));
      });
    }
  }
}

// The windows [begin, end) of a row of which the position `offset` is inside of the input.
LENET_EXT_INLINE Covering windows_with(const AvgPoolShape& s, int64_t offset) {
  const int64_t before = s.pad_w - offset;
  return {before > 0 ? divide_up(before, s.stride_w) : 0, min_of(s.out_w, (s.width - 1 + before) / s.stride_w + 1)};
}
// The positions [begin, end) of a window that are inside of the input for some of a row's windows.
LENET_EXT_INLINE Covering offsets_inside(const AvgPoolShape& s) {
  return {max_of<int64_t>(0, s.pad_w - (s.out_w - 1) * s.stride_w), min_of(s.kernel_w, s.width + s.pad_w)};
}

// A row of sums, position after position of the windows: as many additions at once as there are windows.
template <typename A, int stride>
void add_to_sums(const AvgPoolShape& s, const A* __restrict__ row, A* __restrict__ sums) {
  const Covering offsets = offsets_inside(s);
  for (int64_t j = offsets.begin; j < offsets.end; ++j) {
    const Covering xs = windows_with(s, j);
    const A* from = row + j - s.pad_w;
    for (int64_t x = xs.begin; x < xs.end; ++x) sums[x] += from[x * stride];
  }
}

template <typename A>
LENET_EXT_INLINE A sum_of_window(const AvgPoolShape& s, const A* plane, const Span& rows, const Span& columns) {
  A sum = 0;
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    for (int64_t w = columns.begin; w < columns.end; ++w) sum += plane[h * s.width + w];
  }
  return sum;
}

// `scratch`: for a plane behind ReLU, and a row of sums.
template <typename T>
void run_planes(const ReluAvgPool<T>& job, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const AvgPoolShape& s = job.shape;
  const auto add = s.stride_w == 1 ? add_to_sums<A, 1> : add_to_sums<A, 2>;
  const bool by_rows = s.stride_w <= 2 && s.out_w >= s.kernel_w;  // where compilers make vectors of it
  A* plane = static_cast<A*>(scratch);
  A* sums = plane + s.height * s.width;
  for (int64_t unit = begin; unit < end; ++unit) {
    const T* input = job.input + unit * s.height * s.width;
    with_lanes<A, kLanes<A>>(s.height * s.width, [&](auto lanes) {
      constexpr int N = decltype(lanes)::count;
      in_blocks<N>(s.height * s.width, [&](int64_t i) { store(plane + i, relu(load_widened<N>(input + i))); });
    });
    T* output = job.output + unit * s.out_h * s.out_w;
    for (int64_t y = 0; y < s.out_h; ++y) {
      const Span rows = rows_of(s, y);
      if (by_rows) {
        for (int64_t x = 0; x < s.out_w; ++x) sums[x] = 0;
        for (int64_t h = rows.begin; h < rows.end; ++h) add(s, plane + h * s.width, sums);
      }
      for (int64_t x = 0; x < s.out_w; ++x) {
        const Span columns = columns_of(s, x);
        const A sum = by_rows ? sums[x] : sum_of_window(s, plane, rows, columns);
        *output++ = narrow<T>(sum / static_cast<A>(divisor_of(s, rows, columns)));
      }
    }
  }
}

template <typename T>
int64_t scratch_bytes(const AvgPoolShape& s) {
  return s.channels_last || is_two_by_two<Accumulator<T>>(s)
             ? 0
             : (s.height * s.width + s.out_w) * static_cast<int64_t>(sizeof(Accumulator<T>));
}

template <typename T>
void run(const ReluAvgPool<T>& job, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const AvgPoolShape& s = job.shape;
  if (s.channels_last) {
    with_lanes<A, kLanes<A>>(s.channels,
                             [&](auto lanes) { run_channels_last<T, decltype(lanes)::count>(job, begin, end); });
  } else if (is_two_by_two<A>(s)) {
    with_lanes<A, kLanes<A>>(s.out_w, [&](auto lanes) {
      if constexpr (decltype(lanes)::count > 1) run_two_by_two<T, decltype(lanes)::count>(job, begin, end);
    });
  } else {
    run_planes(job, scratch, begin, end);
  }
}

// --- backward ---

int64_t backward_units(const AvgPoolShape& s) { return s.batch * (s.channels_last ? s.height : s.channels); }

// The shares of a plane's windows, and a row of the gradient.
template <typename T>
int64_t backward_scratch_bytes(const AvgPoolShape& s) {
  return s.channels_last || is_two_by_two<Accumulator<T>>(s)
             ? 0
             : (s.out_h * s.out_w + s.width) * static_cast<int64_t>(sizeof(Accumulator<T>));
}

template <typename T, int N>
void backward_channels_last(const ReluAvgPoolBackward<T>& job, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using V = Vec<A, N>;
  const AvgPoolShape& s = job.shape;
  const bool one = has_one_divisor(s);
  const Divisor<A> common(divisor_of(s, rows_of(s, 0), columns_of(s, 0)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const T* image = job.grad_output + unit / s.height * s.out_h * s.out_w * s.channels;
    const Covering ys = covering(unit % s.height, s.out_h, s.kernel_h, s.stride_h, s.pad_h);
    Covering xs{0, 0};
    for (int64_t w = 0; w < s.width; ++w) {
      while (xs.end < s.out_w && xs.end * s.stride_w - s.pad_w <= w) ++xs.end;
      while (xs.begin < xs.end && xs.begin * s.stride_w - s.pad_w + s.kernel_w <= w) ++xs.begin;
      const int64_t at = (unit * s.width + w) * s.channels;
      in_blocks<N>(s.channels, [&](int64_t c) {
        V sum{};
        for (int64_t y = ys.begin; y < ys.end; ++y) {
          for (int64_t x = xs.begin; x < xs.end; ++x) {
            const Divisor<A> divisor = one ? common : Divisor<A>(divisor_of(s, rows_of(s, y), columns_of(s, x)));
            sum += divisor.divide(load_widened<N>(image + (y * s.out_w + x) * s.channels + c));
          }
        }
        store_narrowed<N>(job.grad_input + at + c, open(load_widened<N>(job.input + at + c), sum));
      });
    }
  }
}

template <typename T, int N>
void backward_two_by_two(const ReluAvgPoolBackward<T>& job, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using V = Vec<A, N>;
  const AvgPoolShape& s = job.shape;
  const Divisor<A> divisor(s.divisor_override != 0 ? s.divisor_override : 4);
  for (int64_t unit = begin; unit < end; ++unit) {
    T* plane = job.grad_input + unit * s.height * s.width;
    for (int64_t y = 0; y < s.out_h; ++y) {
      const T* grad = job.grad_output + (unit * s.out_h + y) * s.out_w;
      const T* input = job.input + (unit * s.height + 2 * y) * s.width;
      T* to = plane + 2 * y * s.width;
      in_blocks<N>(s.out_w, [&](int64_t x) {
        const V share = V{} + divisor.divide(load_widened<N>(grad + x));  // a sum: of -0 it is 0
        const V low = interleave_low<N, A>(share, share), high = interleave_high<N, A>(share, share);
        LENET_EXT_UNROLL for (int row = 0; row < 2; ++row) {
          const int64_t at = row * s.width + 2 * x;
          store_narrowed<N>(to + at, open(load_widened<N>(input + at), low));
          store_narrowed<N>(to + at + N, open(load_widened<N>(input + at + N), high));
        }
      });
      for (int64_t w = 2 * s.out_w; w < s.width; ++w) to[w] = to[s.width + w] = narrow<T>(0);
    }
    for (int64_t i = 2 * s.out_h * s.width; i < s.height * s.width; ++i) plane[i] = narrow<T>(0);
  }
}

// The shares of a row of windows, position after position of the windows, the last one first: so the first window that
// covers an element comes first.
template <typename A>
void add_shares(const AvgPoolShape& s, const A* __restrict__ shares, A* __restrict__ row) {
  const Covering offsets = offsets_inside(s);
  for (int64_t j = offsets.end; j-- > offsets.begin;) {
    const Covering xs = windows_with(s, j);
    A* to = row + j - s.pad_w;
    for (int64_t x = xs.begin; x < xs.end; ++x) to[x * s.stride_w] += shares[x];
  }
}

template <typename T>
void backward_planes(const ReluAvgPoolBackward<T>& job, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const AvgPoolShape& s = job.shape;
  A* shares = static_cast<A*>(scratch);
  A* row = shares + s.out_h * s.out_w;
  for (int64_t unit = begin; unit < end; ++unit) {
    const T* grad = job.grad_output + unit * s.out_h * s.out_w;
    for (int64_t y = 0; y < s.out_h; ++y) {
      const Span rows = rows_of(s, y);
      for (int64_t x = 0; x < s.out_w; ++x) {
        const int64_t at = y * s.out_w + x;
        shares[at] = widen(grad[at]) / static_cast<A>(divisor_of(s, rows, columns_of(s, x)));
      }
    }
    Covering before{-1, -1};
    for (int64_t h = 0; h < s.height; ++h) {
      const Covering ys = covering(h, s.out_h, s.kernel_h, s.stride_h, s.pad_h);
      if (ys.begin != before.begin || ys.end != before.end) {  // otherwise the row is that of the one before
        before = ys;
        for (int64_t w = 0; w < s.width; ++w) row[w] = 0;
        for (int64_t y = ys.begin; y < ys.end; ++y) add_shares(s, shares + y * s.out_w, row);
      }
      const int64_t at = (unit * s.height + h) * s.width;
      with_lanes<A, kLanes<A>>(s.width, [&](auto lanes) {
        constexpr int N = decltype(lanes)::count;
        in_blocks<N>(s.width, [&](int64_t w) {
          store_narrowed<N>(job.grad_input + at + w,
                            open(load_widened<N>(job.input + at + w), load<Vec<A, N>>(row + w)));
        });
      });
    }
  }
}

template <typename T>
void backward_run(const ReluAvgPoolBackward<T>& job, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const AvgPoolShape& s = job.shape;
  if (s.channels_last) {
    with_lanes<A, kLanes<A>>(s.channels,
                             [&](auto lanes) { backward_channels_last<T, decltype(lanes)::count>(job, begin, end); });
  } else if (is_two_by_two<A>(s)) {
    with_lanes<A, kLanes<A>>(s.out_w, [&](auto lanes) {
      if constexpr (decltype(lanes)::count > 1) backward_two_by_two<T, decltype(lanes)::count>(job, begin, end);
    });
  } else {
    backward_planes(job, scratch, begin, end);
  }
}

template <typename T>
constexpr ReluAvgPoolTable<T> kTable = {units,          scratch_bytes<T>,          run<T>,
                                        backward_units, backward_scratch_bytes<T>, backward_run<T>};

}  // namespace

extern const ReluAvgPoolKernels relu_avg_pool_kernels;
const ReluAvgPoolKernels relu_avg_pool_kernels = {kTable<float>, kTable<double>, kTable<BFloat16>};

}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
