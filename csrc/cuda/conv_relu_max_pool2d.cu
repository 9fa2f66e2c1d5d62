// conv_relu_max_pool2d for every argument and dtype: the kernels that are right everywhere, and the two that turn the
// vendor's convolution into the fused operator. LeNet's own sizes have faster ones in conv_relu_max_pool2d_lenet.cu.
//
// All kernels: 256 threads, loops with the whole grid as stride (so any batch fits grid.x), no atomics. Each thread
// owns its outputs, and sums in an order that only the sizes decide, so results are the same in every run and on
// every GPU.
#include <algorithm>
#include <cmath>

#include "conv_pool_dims.cuh"
#include "conv_relu_max_pool2d_lenet.cuh"
#include "slice_sums.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = 256;

LX_DEVICE int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
LX_DEVICE int64_t item_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// ----------------------------------------------------------------------------------------------------- forward

// thread -> one pooled output: evaluates its window's convolutions one after another. Shared memory: none. Bound to 80
// registers; without a bound the compiler takes 48 for compute capability 8.0 and spills, with 64 for 10.0.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    conv_pool_forward_kernel(ConvPoolDims d, const T* __restrict__ input, Strides4 input_strides,
                             const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ output,
                             uint8_t* __restrict__ indices, Strides4 output_strides) {
  using A = lx::Accumulator<T>;
  const int64_t total = d.batch * d.out_channels * d.out_h * d.out_w;
  const int64_t weights_per_channel = static_cast<int64_t>(d.group_in) * d.kernel_h * d.kernel_w;
  for (int64_t item = first_item(); item < total; item += item_stride()) {
    const Element e = element_at(item, d.out_channels, d.out_h, d.out_w);
    const T* image = input + offset_of(input_strides, e.n, e.c / d.group_out * d.group_in, 0, 0);
    const A bias_value = bias == nullptr ? A(0) : lx::widen(bias[e.c]);
    Winner<A> winner;
    const int codes = d.pool_kernel_h * d.pool_kernel_w;
    for (int code = 0; code < codes; ++code) {
      const ConvPosition at = winner_position(d, e.h, e.w, code);
      if (at.h < 0 || at.h >= d.conv_h || at.w < 0 || at.w >= d.conv_w) continue;
      winner.consider(convolution_at(d, image, input_strides, weight + e.c * weights_per_channel, at) + bias_value,
                      code);
    }
    const int64_t to = offset_of(output_strides, e.n, e.c, e.h, e.w);
    output[to] = lx::narrow<T>(winner.pooled());
    if (indices != nullptr) indices[to] = winner.code();
  }
}

// thread -> one element of `indices`. Shared memory: none. Bound to 64 registers; without a bound the compiler takes 40
// and spills.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    conv_at_indices_kernel(ConvPoolDims d, const T* __restrict__ input, Strides4 input_strides,
                           const T* __restrict__ weight, const T* __restrict__ bias,
                           const uint8_t* __restrict__ indices, T* __restrict__ output, Strides4 output_strides) {
  using A = lx::Accumulator<T>;
  const int64_t total = d.batch * d.out_channels * d.out_h * d.out_w;
  const int64_t weights_per_channel = static_cast<int64_t>(d.group_in) * d.kernel_h * d.kernel_w;
  for (int64_t item = first_item(); item < total; item += item_stride()) {
    const Element e = element_at(item, d.out_channels, d.out_h, d.out_w);
    const int64_t to = offset_of(output_strides, e.n, e.c, e.h, e.w);
    const int code = indices[to];
    A value = 0;
    if (code != kDead) {
      const T* image = input + offset_of(input_strides, e.n, e.c / d.group_out * d.group_in, 0, 0);
      value = convolution_at(d, image, input_strides, weight + e.c * weights_per_channel,
                             winner_position(d, e.h, e.w, code));
      if (bias != nullptr) value += lx::widen(bias[e.c]);
    }
    output[to] = lx::narrow<T>(value);
  }
}

// ------------------------------------------------------------------------- gradient of the convolution's output

// The pooling windows along one axis that may hold position `at` of the convolution's output.
struct Windows {
  int start;        // the position, counted from the first window's first element
  int first, last;  // empty where first > last
};
LX_DEVICE Windows windows_over(int at, int pool_kernel, int pool_stride, int pool_pad, int pool_dilation, int windows) {
  const int start = at + pool_pad, reach = (pool_kernel - 1) * pool_dilation;
  const int last = start / pool_stride;
  return {start, start > reach ? (start - reach + pool_stride - 1) / pool_stride : 0,
          last < windows ? last : windows - 1};
}
LX_DEVICE Windows windows_over_row(const ConvPoolDims& d, int h) {
  return windows_over(h, d.pool_kernel_h, d.pool_stride_h, d.pool_pad_h, d.pool_dilation_h, d.out_h);
}
LX_DEVICE Windows windows_over_column(const ConvPoolDims& d, int w) {
  return windows_over(w, d.pool_kernel_w, d.pool_stride_w, d.pool_pad_w, d.pool_dilation_w, d.out_w);
}

// The gradient of the convolution's output at one position: the sum over the windows that this position won. Both
// pointers are at the plane of image and channel.
template <typename T>
LX_DEVICE lx::Accumulator<T> conv_gradient(const ConvPoolDims& d, const Windows& rows, const Windows& columns,
                                           const T* gradient, const Strides4& grad_strides, const uint8_t* codes,
                                           const Strides4& index_strides) {
  lx::Accumulator<T> sum = 0;
  for (int h = rows.first; h <= rows.last; ++h) {
    const int from_h = rows.start - h * d.pool_stride_h;
    if (from_h % d.pool_dilation_h != 0) continue;
    for (int w = columns.first; w <= columns.last; ++w) {
      const int from_w = columns.start - w * d.pool_stride_w;
      if (from_w % d.pool_dilation_w != 0) continue;
      const int code = from_h / d.pool_dilation_h * d.pool_kernel_w + from_w / d.pool_dilation_w;
      if (codes[h * index_strides.h + w * index_strides.w] == code) {
        sum += lx::widen(gradient[h * grad_strides.h + w * grad_strides.w]);
      }
    }
  }
  return sum;
}

// The two kernels below multiply at every position of the convolution, most of which have gradient 0, and not at the
// winners alone: 0 * infinity is NaN, as in stock. Problems large enough to notice go to the vendor.

// thread -> one element of grad_input: gathers from every convolution position that reads the element, which needs no
// atomics, where scattering from the winners would. Shared memory: none.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    grad_input_kernel(ConvPoolDims d, const T* __restrict__ grad_output, Strides4 grad_strides,
                      const uint8_t* __restrict__ indices, Strides4 index_strides, const T* __restrict__ weight,
                      T* __restrict__ grad_input, Strides4 grad_input_strides) {
  const int64_t total = d.batch * d.in_channels * d.height * d.width;
  const int taps = d.kernel_h * d.kernel_w;
  for (int64_t item = first_item(); item < total; item += item_stride()) {
    const Element e = element_at(item, d.in_channels, d.height, d.width);
    const int first_out = e.c / d.group_in * d.group_out;
    const T* weight_of_channel = weight + (static_cast<int64_t>(first_out) * d.group_in + e.c % d.group_in) * taps;
    const T* gradient = grad_output + offset_of(grad_strides, e.n, first_out, 0, 0);
    const uint8_t* codes = indices + offset_of(index_strides, e.n, first_out, 0, 0);
    lx::Accumulator<T> sum = 0;
    for (int tap = 0; tap < taps; ++tap) {
      const int h = e.h + d.pad_top - tap / d.kernel_w * d.dilation_h;
      const int w = e.w + d.pad_left - tap % d.kernel_w * d.dilation_w;
      if (h < 0 || h % d.stride_h != 0 || h / d.stride_h >= d.conv_h) continue;
      if (w < 0 || w % d.stride_w != 0 || w / d.stride_w >= d.conv_w) continue;
      const Windows rows = windows_over_row(d, h / d.stride_h), columns = windows_over_column(d, w / d.stride_w);
      for (int c = 0; c < d.group_out; ++c) {
        sum += conv_gradient(d, rows, columns, gradient + c * grad_strides.c, grad_strides, codes + c * index_strides.c,
                             index_strides) *
               lx::widen(weight_of_channel[static_cast<int64_t>(c) * d.group_in * taps + tap]);
      }
    }
    grad_input[offset_of(grad_input_strides, e.n, e.c, e.h, e.w)] = lx::narrow<T>(sum);
  }
}

// How the sum over all positions of the convolution is cut. A function of the sizes alone, so that the result is too.
struct WeightGradientPlan {
  int64_t taps;       // weights of one output channel (0: only the bias is wanted); column `taps` is the bias
  int64_t slices;     // partial sums of each weight
  int64_t per_slice;  // positions of one channel in one slice
  int columns;        // taps and bias that a block handles at once; the block's other threads share the positions
  int64_t column_blocks;

  WeightGradientPlan(const ConvPoolShape& s, bool grad_weight) {
    taps = grad_weight ? s.in_channels / s.groups * s.kernel_h * s.kernel_w : 0;
    const int64_t positions = s.batch * s.conv_h * s.conv_w, sums = s.out_channels * (taps + 1);
    // At most 128 slices, none too short to be worth a block, and a workspace of a few megabytes; but a block counts
    // the positions of a slice in 32 bits.
    const int64_t worthwhile = lx::divide_up<int64_t>(positions, 1024), fitting = (int64_t{1} << 22) / sums;
    const int64_t fewest = std::max<int64_t>(1, lx::divide_up<int64_t>(positions, 1 << 30));
    slices = std::max(fewest, std::min({int64_t{128}, worthwhile, fitting}));
    per_slice = lx::divide_up(positions, slices);
    columns = 32;
    while (columns < taps + 1 && columns < static_cast<int>(kThreads)) columns *= 2;
    column_blocks = lx::divide_up<int64_t>(taps + 1, columns);
  }
};

// One position of the convolution, as the block shares it.
template <typename A>
struct Item {
  A gradient;
  int h0, w0;     // where in the input the kernel's first tap lies
  int64_t image;  // offset of the group's first channel in that image
};

// block -> one output channel, one slice of the batch's positions, `columns` of the channel's weights. It lists 256
// positions in shared memory; then thread -> (column, share of the list): sums gradient * input over its share. At the
// end the shares are added in order. partials: [slices][out_channels][taps + 1].
// Shared memory: 256 Items, 256 sums (8 KB at most).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    grad_weight_partial_kernel(ConvPoolDims d, WeightGradientPlan plan, const T* __restrict__ grad_output,
                               Strides4 grad_strides, const uint8_t* __restrict__ indices, Strides4 index_strides,
                               const T* __restrict__ input, Strides4 input_strides,
                               lx::Accumulator<T>* __restrict__ partials) {
  using A = lx::Accumulator<T>;
  LX_SMEM(shared);
  Item<A>* list = lx::take<Item<A>>(shared, kThreads);
  A* sums = lx::take<A>(shared, kThreads);

  const int64_t positions = d.batch * d.conv_h * d.conv_w, work = plan.slices * d.out_channels * plan.column_blocks;
  const int share = threadIdx.x / plan.columns, shares = kThreads / plan.columns;
  for (int64_t block = blockIdx.x; block < work; block += gridDim.x) {
    const int slice = static_cast<int>(block / (d.out_channels * plan.column_blocks));
    const int channel = static_cast<int>(block / plan.column_blocks % d.out_channels);
    const int column = static_cast<int>(block % plan.column_blocks) * plan.columns + threadIdx.x % plan.columns;
    const int64_t begin = slice * plan.per_slice;
    const int in_slice = static_cast<int>(begin + plan.per_slice < positions ? plan.per_slice : positions - begin);

    const int tap_w = column % d.kernel_w, tap_h = column / d.kernel_w % d.kernel_h;
    const int tap_channel = column / (d.kernel_w * d.kernel_h);
    A sum = 0;
    for (int chunk = 0; chunk < in_slice; chunk += kThreads) {
      __syncthreads();  // the list's last readers are done
      if (chunk + static_cast<int>(threadIdx.x) < in_slice) {
        const Element e = element_at(begin + chunk + threadIdx.x, 1, d.conv_h, d.conv_w);
        list[threadIdx.x] = {conv_gradient(d, windows_over_row(d, e.h), windows_over_column(d, e.w),
                                           grad_output + offset_of(grad_strides, e.n, channel, 0, 0), grad_strides,
                                           indices + offset_of(index_strides, e.n, channel, 0, 0), index_strides),
                             e.h * d.stride_h - d.pad_top, e.w * d.stride_w - d.pad_left,
                             offset_of(input_strides, e.n, channel / d.group_out * d.group_in, 0, 0)};
      }
      __syncthreads();
      const int count = in_slice - chunk < static_cast<int>(kThreads) ? in_slice - chunk : static_cast<int>(kThreads);
      for (int i = share; i < count; i += shares) {
        const Item<A> item = list[i];
        if (column == plan.taps) {
          sum += item.gradient;
        } else if (column < plan.taps) {
          const int h = item.h0 + tap_h * d.dilation_h, w = item.w0 + tap_w * d.dilation_w;
          if (h >= 0 && h < d.height && w >= 0 && w < d.width) {
            sum += item.gradient *
                   lx::widen(
                       input[item.image + tap_channel * input_strides.c + h * input_strides.h + w * input_strides.w]);
          }
        }
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (share == 0 && column <= plan.taps) {
      for (int s = 1; s < shares; ++s) sum += sums[s * plan.columns + threadIdx.x];
      partials[(int64_t{slice} * d.out_channels + channel) * (plan.taps + 1) + column] = sum;
    }
    __syncthreads();
  }
}

// The bias alone, where the vendor computes the rest. block -> one output channel, one slice of its pooled outputs:
// sums the gradients of the living. partials: [slices][out_channels]. Shared memory: 8 sums. Registers: as above.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    grad_bias_partial_kernel(ConvPoolDims d, int64_t slices, const T* __restrict__ grad_output, Strides4 grad_strides,
                             const uint8_t* __restrict__ indices, Strides4 index_strides,
                             lx::Accumulator<T>* __restrict__ partials) {
  using A = lx::Accumulator<T>;
  LX_SMEM(shared);
  A* sums = lx::take<A>(shared, kThreads / 32);
  const int64_t outputs = d.batch * d.out_h * d.out_w, per_slice = lx::divide_up(outputs, slices);
  for (int64_t block = blockIdx.x; block < slices * d.out_channels; block += gridDim.x) {
    const int64_t slice = block / d.out_channels;
    const int channel = static_cast<int>(block % d.out_channels);
    const int64_t begin = slice * per_slice, end = begin + per_slice < outputs ? begin + per_slice : outputs;
    A sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const Element e = element_at(i, 1, d.out_h, d.out_w);
      if (indices[offset_of(index_strides, e.n, channel, e.h, e.w)] != kDead) {
        sum += lx::widen(grad_output[offset_of(grad_strides, e.n, channel, e.h, e.w)]);
      }
    }
    sum = lx::warp_sum(sum);
    __syncthreads();  // the sums of the last round are read
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (unsigned w = 1; w < kThreads / 32; ++w) sum += sums[w];
      partials[block] = sum;
    }
  }
}

// block -> 32 weights or biases at a time. Shared memory: a sum for each thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    grad_weight_sum_kernel(const lx::Accumulator<T>* __restrict__ partials, int64_t slices, int64_t channels,
                           int64_t taps, T* __restrict__ grad_weight, T* __restrict__ grad_bias) {
  using A = lx::Accumulator<T>;
  LX_SMEM(shared);
  A* values = lx::take<A>(shared, kThreads);
  const int64_t sums = channels * (taps + 1), stride = int64_t{gridDim.x} * kSumsOfBlock;
  for (int64_t first = int64_t{blockIdx.x} * kSumsOfBlock; first < sums; first += stride) {
    __syncthreads();  // the sums of the last round are read
    sum_slices(partials, slices, sums, first, values, [&](int64_t at, A sum) {
      const int64_t channel = at / (taps + 1), column = at % (taps + 1);
      if (column < taps) {
        if (grad_weight != nullptr) grad_weight[channel * taps + column] = lx::narrow<T>(sum);
      } else if (grad_bias != nullptr) {
        grad_bias[channel] = lx::narrow<T>(sum);
      }
    });
  }
}

// ------------------------------------------------------------------------------------- around the vendor's convolution

// thread -> one pooled output: bias, ReLU, maximum and code in one pass. Shared memory: none. Bytes: the convolution's
// output read once (stock: written and read three times, and eight bytes of index against our one).
// value + bias is rounded to T before values are compared, because stock stores it: the result is stock's bit for bit.
// Bound to 64 registers; without a bound the compiler takes 48 for compute capability 10.0 and spills.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    bias_relu_pool_kernel(ConvPoolDims d, const T* __restrict__ conv, Strides4 conv_strides, const T* __restrict__ bias,
                          T* __restrict__ output, uint8_t* __restrict__ indices, Strides4 output_strides) {
  using A = lx::Accumulator<T>;
  const int64_t total = d.batch * d.out_channels * d.out_h * d.out_w;
  for (int64_t item = first_item(); item < total; item += item_stride()) {
    const Element e = element_at(item, d.out_channels, d.out_h, d.out_w, conv_strides.c == 1);
    const T* plane = conv + offset_of(conv_strides, e.n, e.c, 0, 0);
    const A bias_value = bias == nullptr ? A(0) : lx::widen(bias[e.c]);
    Winner<A> winner;
    for (int i = 0, code = 0; i < d.pool_kernel_h; ++i) {
      const int h = e.h * d.pool_stride_h - d.pool_pad_h + i * d.pool_dilation_h;
      for (int j = 0; j < d.pool_kernel_w; ++j, ++code) {
        const int w = e.w * d.pool_stride_w - d.pool_pad_w + j * d.pool_dilation_w;
        if (h < 0 || h >= d.conv_h || w < 0 || w >= d.conv_w) continue;
        const A value = lx::widen(plane[h * conv_strides.h + w * conv_strides.w]);
        winner.consider(bias == nullptr ? value : A(lx::widen(lx::narrow<T>(value + bias_value))), code);
      }
    }
    const int64_t to = offset_of(output_strides, e.n, e.c, e.h, e.w);
    output[to] = lx::narrow<T>(winner.pooled());
    if (indices != nullptr) indices[to] = winner.code();
  }
}

// thread -> one element of the gradient of the convolution's output, which is written once. Shared memory: none.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    bias_relu_pool_backward_kernel(ConvPoolDims d, const T* __restrict__ grad_output, Strides4 grad_strides,
                                   const uint8_t* __restrict__ indices, Strides4 index_strides,
                                   T* __restrict__ grad_conv, Strides4 grad_conv_strides) {
  const int64_t total = d.batch * d.out_channels * d.conv_h * d.conv_w;
  for (int64_t item = first_item(); item < total; item += item_stride()) {
    const Element e = element_at(item, d.out_channels, d.conv_h, d.conv_w, grad_conv_strides.c == 1);
    const lx::Accumulator<T> sum = conv_gradient(d, windows_over_row(d, e.h), windows_over_column(d, e.w),
                                                 grad_output + offset_of(grad_strides, e.n, e.c, 0, 0), grad_strides,
                                                 indices + offset_of(index_strides, e.n, e.c, 0, 0), index_strides);
    grad_conv[offset_of(grad_conv_strides, e.n, e.c, e.h, e.w)] = lx::narrow<T>(sum);
  }
}

// --------------------------------------------------------------------------------------------------------- launchers

int64_t outputs(const ConvPoolShape& s) { return s.batch * s.out_channels * s.out_h * s.out_w; }

template <typename T>
LaunchResult forward(const ConvPoolForward& c, cudaStream_t stream) {
  LaunchResult result;
  lx::launch(result, "conv_pool_forward_kernel", conv_pool_forward_kernel<T>, lx::grid_for(outputs(c.shape), kThreads),
             kThreads, 0, stream, ConvPoolDims(c.shape), static_cast<const T*>(c.input), c.input_strides,
             static_cast<const T*>(c.weight), static_cast<const T*>(c.bias), static_cast<T*>(c.output), c.indices,
             c.output_strides);
  return result;
}

template <typename T>
LaunchResult at_indices(const ConvAtIndices& c, cudaStream_t stream) {
  LaunchResult result;
  lx::launch(result, "conv_at_indices_kernel", conv_at_indices_kernel<T>, lx::grid_for(outputs(c.shape), kThreads),
             kThreads, 0, stream, ConvPoolDims(c.shape), static_cast<const T*>(c.input), c.input_strides,
             static_cast<const T*>(c.weight), static_cast<const T*>(c.bias), c.indices, static_cast<T*>(c.output),
             c.output_strides);
  return result;
}

bool is_contiguous(const Strides4& strides, int64_t channels, int64_t height, int64_t width) {
  return strides.w == 1 && strides.h == width && strides.c == height * width && strides.n == channels * height * width;
}

// Whether LeNet's own kernels take this call. They want everything contiguous.
template <typename Call>
bool for_lenet(DType dtype, const Call& c, const Strides4& pooled_strides) {
  const ConvPoolShape& s = c.shape;
  return has_lenet_kernels(dtype, s) && is_contiguous(c.input_strides, s.in_channels, s.height, s.width) &&
         is_contiguous(pooled_strides, s.out_channels, s.out_h, s.out_w);
}
bool for_lenet(DType dtype, const ConvPoolBackward& c) {
  return for_lenet(dtype, c, c.grad_output_strides) &&
         is_contiguous(c.indices_strides, c.shape.out_channels, c.shape.out_h, c.shape.out_w);
}

template <typename T>
LaunchResult backward(DType dtype, const ConvPoolBackward& c, cudaStream_t stream) {
  using A = lx::Accumulator<T>;
  const ConvPoolShape& s = c.shape;
  LaunchResult result;
  const ConvPoolDims dims(s);
  const T* grad_output = static_cast<const T*>(c.grad_output);
  const int64_t pixels = s.batch * s.in_channels * s.height * s.width;
  // Of what is wanted.
  const bool input_on_tensor_cores = c.slice_images != 0 && c.grad_input != nullptr && has_lenet_grad_input(s);
  const bool weight_on_tensor_cores = c.slice_images != 0 && c.grad_weight != nullptr;
  if (input_on_tensor_cores || weight_on_tensor_cores) result = launch_lenet_tensor_core_gradients(dtype, c, stream);
  if (result.error == cudaSuccess && c.grad_input != nullptr && pixels > 0 && !input_on_tensor_cores) {
    if (for_lenet(dtype, c) && has_lenet_grad_input(s) &&
        is_contiguous(c.grad_input_strides, s.in_channels, s.height, s.width)) {
      result = launch_lenet_grad_input(dtype, c, stream);
    } else {
      lx::launch(result, "grad_input_kernel", grad_input_kernel<T>, lx::grid_for(pixels, kThreads), kThreads, 0, stream,
                 dims, grad_output, c.grad_output_strides, c.indices, c.indices_strides,
                 static_cast<const T*>(c.weight), static_cast<T*>(c.grad_input), c.grad_input_strides);
    }
  }
  if (result.error != cudaSuccess || (c.grad_weight == nullptr && c.grad_bias == nullptr)) return result;

  const WeightGradientPlan plan(s, c.grad_weight != nullptr);
  A* partials = static_cast<A*>(c.workspace);
  int64_t slices = plan.slices;
  if (weight_on_tensor_cores) {
    slices = lx::divide_up(s.batch, c.slice_images);
  } else if (c.grad_weight != nullptr && for_lenet(dtype, c)) {
    slices = lenet_grad_weight_slices(s);
    result = launch_lenet_grad_weight_partials(dtype, c, stream);
  } else if (c.grad_weight == nullptr) {
    lx::launch(result, "grad_bias_partial_kernel", grad_bias_partial_kernel<T>,
               lx::grid_for(slices * s.out_channels, 1), kThreads, lx::taken<A>(kThreads / 32), stream, dims, slices,
               grad_output, c.grad_output_strides, c.indices, c.indices_strides, partials);
  } else {
    lx::launch(result, "grad_weight_partial_kernel", grad_weight_partial_kernel<T>,
               lx::grid_for(plan.slices * s.out_channels * plan.column_blocks, 1), kThreads,
               lx::taken<Item<A>>(kThreads) + lx::taken<A>(kThreads), stream, dims, plan, grad_output,
               c.grad_output_strides, c.indices, c.indices_strides, static_cast<const T*>(c.input), c.input_strides,
               partials);
  }
  lx::launch(result, "grad_weight_sum_kernel", grad_weight_sum_kernel<T>,
             lx::grid_for(s.out_channels * (plan.taps + 1), kSumsOfBlock), kThreads, lx::taken<A>(kThreads), stream,
             partials, slices, s.out_channels, plan.taps, static_cast<T*>(c.grad_weight), static_cast<T*>(c.grad_bias));
  return result;
}

template <typename T>
LaunchResult pool(const BiasReluPool& c, cudaStream_t stream) {
  LaunchResult result;
  lx::launch(result, "bias_relu_pool_kernel", bias_relu_pool_kernel<T>, lx::grid_for(outputs(c.shape), kThreads),
             kThreads, 0, stream, ConvPoolDims(c.shape), static_cast<const T*>(c.conv), c.conv_strides,
             static_cast<const T*>(c.bias), static_cast<T*>(c.output), c.indices, c.output_strides);
  return result;
}

template <typename T>
LaunchResult pool_backward(const BiasReluPoolBackward& c, cudaStream_t stream) {
  LaunchResult result;
  const int64_t positions = c.shape.batch * c.shape.out_channels * c.shape.conv_h * c.shape.conv_w;
  lx::launch(result, "bias_relu_pool_backward_kernel", bias_relu_pool_backward_kernel<T>,
             lx::grid_for(positions, kThreads), kThreads, 0, stream, ConvPoolDims(c.shape),
             static_cast<const T*>(c.grad_output), c.grad_output_strides, c.indices, c.indices_strides,
             static_cast<T*>(c.grad_conv), c.grad_conv_strides);
  return result;
}

}  // namespace

LaunchResult launch_conv_pool_forward(DType dtype, const ConvPoolForward& call, cudaStream_t stream) {
  if (call.shape.batch == 0) return {};
  if (for_lenet(dtype, call, call.output_strides)) return launch_lenet_conv_forward(dtype, call, stream);
  LX_DISPATCH(dtype, forward, call, stream)
}

LaunchResult launch_conv_at_indices(DType dtype, const ConvAtIndices& call, cudaStream_t stream) {
  if (call.shape.batch == 0) return {};
  LX_DISPATCH(dtype, at_indices, call, stream)
}

int64_t conv_pool_backward_workspace(DType dtype, const ConvPoolShape& shape, bool grad_weight) {
  const WeightGradientPlan plan(shape, grad_weight);
  // Which kernels run also depends on strides, which this function does not see.
  const int64_t lenet = grad_weight && has_lenet_kernels(dtype, shape) ? lenet_grad_weight_slices(shape) : 0;
  return std::max(plan.slices, lenet) * shape.out_channels * (plan.taps + 1) * accumulator_bytes(dtype);
}

LaunchResult launch_conv_pool_backward(DType dtype, const ConvPoolBackward& call,
                                       cudaStream_t stream){LX_DISPATCH(dtype, backward, dtype, call, stream)}

LaunchResult launch_bias_relu_pool(DType dtype, const BiasReluPool& call, cudaStream_t stream) {
  if (call.shape.batch == 0) return {};
  LX_DISPATCH(dtype, pool, call, stream)
}

LaunchResult launch_bias_relu_pool_backward(DType dtype, const BiasReluPoolBackward& call, cudaStream_t stream) {
  if (call.shape.batch == 0) return {};
  LX_DISPATCH(dtype, pool_backward, call, stream)
}

}  // namespace lenet_ext::cuda
