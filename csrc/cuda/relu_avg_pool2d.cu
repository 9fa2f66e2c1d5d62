// ReLU and average pooling in one pass, and back, for every argument and dtype.
//
// Both kernels: 256 threads, loops with the whole grid as stride (so any batch fits grid.x), no shared memory, no
// atomics. Each thread owns one element of the result, and sums in stock's order. Bytes: each tensor once, where stock
// writes and reads ReLU's output, and the gradient of it, in between.
#include "conv_pool_dims.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = 256;

// AvgPoolShape with 32-bit sizes: positions inside one padded plane fit 32 bits (the host file checks it).
struct AvgPoolDims {
  int64_t batch;
  int channels, height, width, out_h, out_w;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  bool count_include_pad, channels_last;
  int64_t divisor_override;

  explicit AvgPoolDims(const AvgPoolShape& s)
      : batch(s.batch),
        channels(static_cast<int>(s.channels)),
        height(static_cast<int>(s.height)),
        width(static_cast<int>(s.width)),
        out_h(static_cast<int>(s.out_h)),
        out_w(static_cast<int>(s.out_w)),
        kernel_h(static_cast<int>(s.kernel_h)),
        kernel_w(static_cast<int>(s.kernel_w)),
        stride_h(static_cast<int>(s.stride_h)),
        stride_w(static_cast<int>(s.stride_w)),
        pad_h(static_cast<int>(s.pad_h)),
        pad_w(static_cast<int>(s.pad_w)),
        count_include_pad(s.count_include_pad),
        channels_last(s.channels_last),
        divisor_override(s.divisor_override) {}
};

Strides4 strides_of(const AvgPoolDims& d, int64_t height, int64_t width) {
  const int64_t channels = d.channels, plane = height * width;
  if (d.channels_last) return {channels * plane, 1, channels * width, channels};
  return {channels * plane, plane, width, 1};
}

// What a window covers of one dimension: the positions [begin, end), and how many with the padding.
struct Span {
  int begin, end, with_padding;
};
LX_DEVICE Span span_of(int out, int size, int kernel, int stride, int pad) {
  const int start = out * stride - pad, end = start + kernel < size + pad ? start + kernel : size + pad;
  return {start > 0 ? start : 0, end < size ? end : size, end - start};
}
LX_DEVICE Span rows_of(const AvgPoolDims& d, int y) { return span_of(y, d.height, d.kernel_h, d.stride_h, d.pad_h); }
LX_DEVICE Span columns_of(const AvgPoolDims& d, int x) { return span_of(x, d.width, d.kernel_w, d.stride_w, d.pad_w); }

// The windows [begin, end) along one dimension that cover a position.
struct Covering {
  int begin, end;
};
LX_DEVICE Covering covering(int at, int out, int kernel, int stride, int pad) {
  const int before = at + pad - kernel, last = (at + pad) / stride + 1;
  return {before < 0 ? 0 : before / stride + 1, last < out ? last : out};
}

template <typename A>
LX_DEVICE A divisor_of(const AvgPoolDims& d, const Span& rows, const Span& columns) {
  if (d.divisor_override != 0) return static_cast<A>(d.divisor_override);
  return static_cast<A>(d.count_include_pad ? rows.with_padding * columns.with_padding
                                            : (rows.end - rows.begin) * (columns.end - columns.begin));
}

// thread -> one output.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    relu_avg_pool_kernel(AvgPoolDims d, const T* __restrict__ input, Strides4 strides, T* __restrict__ output) {
  using A = lx::Accumulator<T>;
  const int64_t total = d.batch * d.channels * d.out_h * d.out_w, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < total; item += step) {
    const Element e = element_at(item, d.channels, d.out_h, d.out_w, d.channels_last);
    const T* plane = input + offset_of(strides, e.n, e.c, 0, 0);
    const Span rows = rows_of(d, e.h), columns = columns_of(d, e.w);
    A sum = 0;
    for (int h = rows.begin; h < rows.end; ++h) {
      for (int w = columns.begin; w < columns.end; ++w) {
        const A value = lx::widen(plane[h * strides.h + w * strides.w]);
        sum += value < 0 ? A(0) : value;
      }
    }
    output[item] = lx::narrow<T>(sum / divisor_of<A>(d, rows, columns));
  }
}

// thread -> one element of grad_input: gathers the shares of the windows over it, unless ReLU was closed. Bound to 64
// registers; without a bound the compiler takes 40 and spills.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    relu_avg_pool_backward_kernel(AvgPoolDims d, const T* __restrict__ grad_output, Strides4 strides,
                                  const T* __restrict__ input, T* __restrict__ grad_input) {
  using A = lx::Accumulator<T>;
  const int64_t total = d.batch * d.channels * d.height * d.width, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < total; item += step) {
    A sum = 0;
    if (!(lx::widen(input[item]) <= 0)) {
      const Element e = element_at(item, d.channels, d.height, d.width, d.channels_last);
      const T* plane = grad_output + offset_of(strides, e.n, e.c, 0, 0);
      const Covering ys = covering(e.h, d.out_h, d.kernel_h, d.stride_h, d.pad_h);
      const Covering xs = covering(e.w, d.out_w, d.kernel_w, d.stride_w, d.pad_w);
      for (int y = ys.begin; y < ys.end; ++y) {
        const Span rows = rows_of(d, y);
        for (int x = xs.begin; x < xs.end; ++x) {
          sum += lx::widen(plane[y * strides.h + x * strides.w]) / divisor_of<A>(d, rows, columns_of(d, x));
        }
      }
    }
    grad_input[item] = lx::narrow<T>(sum);
  }
}

template <typename T>
LaunchResult forward(const ReluAvgPool& c, cudaStream_t stream) {
  const AvgPoolDims d(c.shape);
  LaunchResult result;
  lx::launch(result, "relu_avg_pool_kernel", relu_avg_pool_kernel<T>,
             lx::grid_for(d.batch * d.channels * d.out_h * d.out_w, kThreads), kThreads, 0, stream, d,
             static_cast<const T*>(c.input), strides_of(d, d.height, d.width), static_cast<T*>(c.output));
  return result;
}

template <typename T>
LaunchResult backward(const ReluAvgPoolBackward& c, cudaStream_t stream) {
  const AvgPoolDims d(c.shape);
  LaunchResult result;
  lx::launch(result, "relu_avg_pool_backward_kernel", relu_avg_pool_backward_kernel<T>,
             lx::grid_for(d.batch * d.channels * d.height * d.width, kThreads), kThreads, 0, stream, d,
             static_cast<const T*>(c.grad_output), strides_of(d, d.out_h, d.out_w), static_cast<const T*>(c.input),
             static_cast<T*>(c.grad_input));
  return result;
}

}  // namespace

LaunchResult launch_relu_avg_pool(DType dtype, const ReluAvgPool& call, cudaStream_t stream) {
  if (call.shape.batch == 0) return {};
  LX_DISPATCH(dtype, forward, call, stream)
}

LaunchResult launch_relu_avg_pool_backward(DType dtype, const ReluAvgPoolBackward& call, cudaStream_t stream) {
  if (call.shape.batch == 0) return {};
  LX_DISPATCH(dtype, backward, call, stream)
}

}  // namespace lenet_ext::cuda
