// conv_relu_max_pool2d for LeNet's layers (1 -> 6 channels at 32 x 32, 6 -> 16 at 14 x 14, kernel 5, pool 2), in
// float32 arithmetic on the ordinary units. Sizes are compile-time constants, the convolution's output and its gradient
// stay in registers or shared memory. The header comment of each kernel says what a thread computes and what it costs;
// register counts are from ptxas 13.0, tests/test_cuda_build.py watches that nothing spills.
#include <algorithm>

#include "conv_relu_max_pool2d_lenet.cuh"
#include "lenet_tiles.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = 256;

// ----------------------------------------------------------------------------------------------------------- forward

constexpr int kForwardImages = 10;

template <typename L>
int64_t forward_shared_bytes(int images) {
  return lx::taken<float>(images * L::kImage) + lx::taken<float>(L::kOut * L::kWeights) + lx::taken<float>(L::kOut);
}

// block -> `images` images; thread as convolve_images says. With 10 images: conv1 5 x 196 = 980 items for 256 threads,
// 42 KB; conv2 5 x 25 x 2 = 250 items, 57 KB. By registers two blocks fit a multiprocessor.
template <typename T, typename L>
__global__ void __launch_bounds__(kThreads, 2)
    lenet_conv_forward_kernel(int64_t batch, int images, const T* __restrict__ input, const T* __restrict__ weight,
                              const T* __restrict__ bias, T* __restrict__ output, uint8_t* __restrict__ indices) {
  LX_SMEM(shared);
  float* pixels = lx::take<float>(shared, images * L::kImage);
  float* weights = lx::take<float>(shared, L::kOut * L::kWeights);
  float* biases = lx::take<float>(shared, L::kOut);
  transpose_weights<L>(weights, weight);
  if (threadIdx.x < L::kOut) biases[threadIdx.x] = bias == nullptr ? 0.0f : lx::widen(bias[threadIdx.x]);

  for (int64_t first = int64_t{blockIdx.x} * images; first < batch; first += int64_t{gridDim.x} * images) {
    const int present = static_cast<int>(batch - first < images ? batch - first : images);
    __syncthreads();
    lx::copy_to_shared(pixels, input + first * L::kImage, present * L::kImage);
    lx::fill_shared(pixels + present * L::kImage, (images - present) * L::kImage, 0.0f);
    __syncthreads();
    convolve_images<L>(pixels, weights, biases, images, present,
                       [&](int image, int channel, int window, const Winner<float>& winner) {
                         const int64_t to = (first + image) * L::kPooled + channel * L::kWindows + window;
                         output[to] = lx::narrow<T>(winner.pooled());
                         if (indices != nullptr) indices[to] = winner.code();
                       });
  }
}

// ------------------------------------------------------------------------------------------ gradient of conv2's input

constexpr int kGradInputImages = 10;  // 5 pairs x 49 tiles = 245 of the 256 threads
constexpr int kHalo = kTap - 1;
constexpr int kHaloed = Conv2::kConv + 2 * kHalo;  // 18
constexpr int kChunk = 4;                          // output channels whose gradients are in shared memory at once

int64_t grad_input_shared_bytes(int images) {
  return lx::taken<float>(images * kChunk * kHaloed * kHaloed) + lx::taken<float>(Conv2::kOut * Conv2::kWeights);
}

// block -> `images` images. The gradient of the convolution's output, with a border of zeros, passes through shared
// memory by 4 channels at a time; thread -> 2 x 2 pixels of all 6 channels in two images, 48 sums, by the same tile as
// the forward pass: grad_input is the correlation of that map with the kernels turned by 180 degrees.
// With 10 images: 61 KB, 2 blocks per multiprocessor by registers.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    lenet_grad_input_kernel(int64_t batch, int images, const T* __restrict__ grad_output,
                            const uint8_t* __restrict__ indices, const T* __restrict__ weight,
                            T* __restrict__ grad_input) {
  using L = Conv2;
  constexpr int kMap = kChunk * kHaloed * kHaloed, kTiles = L::kSize / 2 * (L::kSize / 2);
  LX_SMEM(shared);
  float* maps = lx::take<float>(shared, images * kMap);
  float* weights = lx::take<float>(shared, L::kOut * L::kWeights);  // [out][tap, turned][in]
  for (int i = threadIdx.x; i < L::kOut * L::kWeights; i += kThreads) {
    const int in = i % L::kIn, tap = i / L::kIn % kTaps, out = i / (L::kIn * kTaps);
    weights[i] = lx::widen(weight[(out * L::kIn + in) * kTaps + kTaps - 1 - tap]);
  }
  lx::fill_shared(maps, images * kMap, 0.0f);  // the borders stay so

  const int thread = static_cast<int>(threadIdx.x);
  const bool computes = thread < images / 2 * kTiles;
  const int image = thread / kTiles * 2, tile = thread % kTiles;
  const int tile_h = tile / (L::kSize / 2) * 2, tile_w = tile % (L::kSize / 2) * 2;
  for (int64_t first = int64_t{blockIdx.x} * images; first < batch; first += int64_t{gridDim.x} * images) {
    float sums[2][4][L::kIn] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < L::kOut; chunk += kChunk) {
      __syncthreads();
      for (int i = threadIdx.x; i < images * kChunk * L::kWindows; i += kThreads) {
        const int window = i % L::kWindows, channel = i / L::kWindows % kChunk, n = i / (kChunk * L::kWindows);
        const int64_t from = (first + n) * L::kPooled + (chunk + channel) * L::kWindows + window;
        float gradient[4] = {};
        if (first + n < batch) expand_window(gradient, lx::widen(grad_output[from]), indices[from]);
        float* to = maps + (n * kChunk + channel) * kHaloed * kHaloed + (kHalo + window / L::kPool * 2) * kHaloed +
                    kHalo + window % L::kPool * 2;
        *reinterpret_cast<lx::Pack<float, 2>*>(to) = {{gradient[0], gradient[1]}};
        *reinterpret_cast<lx::Pack<float, 2>*>(to + kHaloed) = {{gradient[2], gradient[3]}};
      }
      __syncthreads();
      if (!computes) continue;
#pragma unroll 1
      for (int c = 0; c < kChunk; ++c) {
        const float* corner = maps + (image * kChunk + c) * kHaloed * kHaloed + tile_h * kHaloed + tile_w;
        const float* const planes[2] = {corner, corner + kMap};
        add_plane<2, L::kIn, L::kIn>(sums, planes, kHaloed, weights + (chunk + c) * L::kWeights);
      }
    }
    if (!computes) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first + image + i >= batch) break;
      T* to = grad_input + (first + image + i) * L::kImage + tile_h * L::kSize + tile_w;
#pragma unroll
      for (int c = 0; c < L::kIn; ++c) {
#pragma unroll
        for (int position = 0; position < 4; ++position) {
          to[c * L::kSize * L::kSize + position / 2 * L::kSize + position % 2] = lx::narrow<T>(sums[i][position][c]);
        }
      }
    }
  }
}

// -------------------------------------------------------------------------------------- gradients of weight and bias

// A block sums one contiguous slice of the batch; how many there are depends on the batch alone, so the result does not
// depend on the GPU. 256 is two for each multiprocessor of the largest.
constexpr int64_t kMostSlices = 256;

struct Slices {
  int64_t count, images;
  explicit Slices(int64_t batch) {
    images = lx::divide_up(batch, kMostSlices);
    count = lx::divide_up(batch, images);
  }
};

// ---- conv1

constexpr int kGroups = 2;  // the channels are cut in two groups of three
constexpr int kGroupChannels = Conv1::kOut / kGroups;
constexpr int kGroupSums = kGroupChannels * (kTaps + 1);  // 78 sums of a thread
constexpr int kGroupThreads = kThreads / kGroups;
constexpr int kConv1Images = 4;             // in shared memory at once
constexpr int kReduced = 16;                // of the 78 sums, reduced over the block at once
constexpr int kReducePitch = kThreads + 8;  // four rows that a warp reads lie in different banks

int64_t conv1_grad_shared_bytes() {
  return std::max(lx::taken<float>(kConv1Images * Conv1::kImage), lx::taken<float>(kReduced * kReducePitch));
}

// block -> one slice. thread -> three channels and every 128th window of the slice: 25 weights and a bias each, 78
// sums. It holds two rows of the 6 x 6 patch under the window, and the window's gradient with zeros where no winner
// is: dense arithmetic, because a gather from the winner would take a load from shared memory for each multiply-add,
// at a quarter of their rate. At the end each sum is added over the group's 128 threads, 16 sums at a time, 8 threads
// to one result. Shared memory: 17 KB.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    lenet_conv1_grad_weight_kernel(int64_t batch, int64_t slice_images, const T* __restrict__ grad_output,
                                   const uint8_t* __restrict__ indices, const T* __restrict__ input,
                                   float* __restrict__ partials) {
  using L = Conv1;
  LX_SMEM(shared);
  unsigned char* const begin = shared;
  float* pixels = lx::take<float>(shared, kConv1Images * L::kImage);
  shared = begin;
  float* reduced = lx::take<float>(shared, kReduced * kReducePitch);

  const int group = threadIdx.x / kGroupThreads, member = threadIdx.x % kGroupThreads;
  const int64_t slice_begin = blockIdx.x * slice_images;
  const int64_t slice_end = slice_begin + slice_images < batch ? slice_begin + slice_images : batch;
  float sums[kGroupSums] = {};  // [channel][tap, bias]
  for (int64_t first = slice_begin; first < slice_end; first += kConv1Images) {
    const int present = static_cast<int>(slice_end - first < kConv1Images ? slice_end - first : kConv1Images);
    __syncthreads();
    lx::copy_to_shared(pixels, input + first * L::kImage, present * L::kImage);
    __syncthreads();
#pragma unroll 1
    for (int item = member; item < present * L::kWindows; item += kGroupThreads) {
      const int image = item / L::kWindows, window = item % L::kWindows;
      float gradient[kGroupChannels][4];
#pragma unroll
      for (int c = 0; c < kGroupChannels; ++c) {
        const int64_t from = (first + image) * L::kPooled + (group * kGroupChannels + c) * L::kWindows + window;
        const int code = indices[from];
        const float value = lx::widen(grad_output[from]);
        expand_window(gradient[c], value, code);
        sums[c * (kTaps + 1) + kTaps] += code == kDead ? 0.0f : value;
      }
      const float* corner = pixels + image * L::kImage + window / L::kPool * 2 * L::kSize + window % L::kPool * 2;
      float rows[2][kTap + 1];
      load_row(rows[0], corner);
#pragma unroll
      for (int i = 0; i < kTap; ++i) {
        load_row(rows[(i + 1) % 2], corner + (i + 1) * L::kSize);
        const float (&top)[kTap + 1] = rows[i % 2], (&bottom)[kTap + 1] = rows[(i + 1) % 2];
#pragma unroll
        for (int c = 0; c < kGroupChannels; ++c) {
#pragma unroll
          for (int j = 0; j < kTap; ++j) {
            float& sum = sums[c * (kTaps + 1) + i * kTap + j];
            sum += gradient[c][0] * top[j];
            sum += gradient[c][1] * top[j + 1];
            sum += gradient[c][2] * bottom[j];
            sum += gradient[c][3] * bottom[j + 1];
          }
        }
      }
    }
  }

  constexpr int kHelpers = kThreads / (kReduced * kGroups);  // 8 threads add up one result
  const int result = threadIdx.x / kHelpers, helper = threadIdx.x % kHelpers;
  const int result_group = result / kReduced, result_sum = result % kReduced;
#pragma unroll
  for (int base = 0; base < kGroupSums; base += kReduced) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kReduced; ++i) {
      if (base + i < kGroupSums) reduced[i * kReducePitch + threadIdx.x] = sums[base + i];
    }
    __syncthreads();
    float sum = 0;
    if (base + result_sum < kGroupSums) {
      for (int i = helper; i < kGroupThreads; i += kHelpers) {
        sum += reduced[result_sum * kReducePitch + result_group * kGroupThreads + i];
      }
    }
#pragma unroll
    for (int distance = kHelpers / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (helper == 0 && base + result_sum < kGroupSums) {
      partials[(int64_t{blockIdx.x} * kGroups + result_group) * kGroupSums + base + result_sum] = sum;
    }
  }
}

// ---- conv2

constexpr int kConv2Images = 4;                                           // in shared memory at once, of which
constexpr int kConv2Lanes = 2;                                            // are worked on at the same time
constexpr int kConv2Channels = 4;                                         // output channels of a thread
constexpr int kConv2Rows = Conv2::kIn * kTap;                             // (input channel, kernel row)
constexpr int kConv2Workers = Conv2::kOut / kConv2Channels * kConv2Rows;  // 120 of one image lane
constexpr int kConv2BiasThreads = kConv2Lanes * kConv2Workers;            // the first of 16

constexpr int64_t conv2_grad_shared_bytes() {
  return lx::taken<float>(kConv2Images * Conv2::kImage) + lx::taken<float>(kConv2Images * Conv2::kMap) +
         lx::taken<float>(kConv2Workers * kConv2Channels * kTap);
}

// block -> one slice. Four images and the gradients of their convolution outputs are in shared memory; thread -> four
// output channels and one kernel row of one input channel, in every second image: 20 sums, over rows of 14 pixels and
// 10 gradients held in registers (27 loads of 8 bytes for 200 multiply-adds). The threads 240 to 255 add up the
// biases. The two images' sums are added at the end. Shared memory: 53 KB.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    lenet_conv2_grad_weight_kernel(int64_t batch, int64_t slice_images, const T* __restrict__ grad_output,
                                   const uint8_t* __restrict__ indices, const T* __restrict__ input,
                                   float* __restrict__ partials) {
  using L = Conv2;
  static_assert(kConv2BiasThreads + L::kOut <= static_cast<int>(kThreads), "a thread for each bias");
  LX_SMEM(shared);
  float* pixels = lx::take<float>(shared, kConv2Images * L::kImage);
  float* maps = lx::take<float>(shared, kConv2Images * L::kMap);
  float* other_lane = lx::take<float>(shared, kConv2Workers * kConv2Channels * kTap);

  const int lane = threadIdx.x / kConv2Workers, worker = threadIdx.x % kConv2Workers;
  const int first_channel = worker / kConv2Rows * kConv2Channels;
  const int in_channel = worker % kConv2Rows / kTap, tap_row = worker % kTap;
  const int bias_channel = threadIdx.x - kConv2BiasThreads;
  const int64_t slice_begin = blockIdx.x * slice_images;
  const int64_t slice_end = slice_begin + slice_images < batch ? slice_begin + slice_images : batch;
  float sums[kConv2Channels][kTap] = {}, bias_sum = 0;
  for (int64_t first = slice_begin; first < slice_end; first += kConv2Images) {
    const int present = static_cast<int>(slice_end - first < kConv2Images ? slice_end - first : kConv2Images);
    __syncthreads();
    lx::copy_to_shared(pixels, input + first * L::kImage, present * L::kImage);
    for (int i = threadIdx.x; i < present * L::kPooled; i += kThreads) {
      float gradient[4];
      expand_window(gradient, lx::widen(grad_output[first * L::kPooled + i]), indices[first * L::kPooled + i]);
      const int window = i % L::kWindows, plane = i / L::kWindows;  // of image and channel
      float* to = maps + plane * L::kConv * L::kConv + window / L::kPool * 2 * L::kConv + window % L::kPool * 2;
      *reinterpret_cast<lx::Pack<float, 2>*>(to) = {{gradient[0], gradient[1]}};
      *reinterpret_cast<lx::Pack<float, 2>*>(to + L::kConv) = {{gradient[2], gradient[3]}};
    }
    __syncthreads();
    if (bias_channel >= 0) {
      for (int image = 0; image < present; ++image) {
        const float* map = maps + image * L::kMap + bias_channel * L::kConv * L::kConv;
        for (int i = 0; i < L::kConv * L::kConv; ++i) bias_sum += map[i];
      }
      continue;
    }
    for (int image = lane; image < present; image += kConv2Lanes) {
#pragma unroll 1
      for (int y = 0; y < L::kConv; ++y) {
        float row[L::kSize];
#pragma unroll
        for (int x = 0; x < L::kSize; x += 2) {
          const lx::Pack<float, 2> pair =
              lx::load_pack<2>(pixels + image * L::kImage + (in_channel * L::kSize + y + tap_row) * L::kSize + x);
          row[x] = pair[0];
          row[x + 1] = pair[1];
        }
#pragma unroll
        for (int c = 0; c < kConv2Channels; ++c) {
          const float* map = maps + image * L::kMap + ((first_channel + c) * L::kConv + y) * L::kConv;
#pragma unroll
          for (int x = 0; x < L::kConv; x += 2) {
            const lx::Pack<float, 2> gradient = lx::load_pack<2>(map + x);
#pragma unroll
            for (int j = 0; j < kTap; ++j) {
              sums[c][j] += gradient[0] * row[x + j];
              sums[c][j] += gradient[1] * row[x + 1 + j];
            }
          }
        }
      }
    }
  }

  if (lane == 1) {
#pragma unroll
    for (int i = 0; i < kConv2Channels * kTap; ++i) other_lane[i * kConv2Workers + worker] = sums[i / kTap][i % kTap];
  }
  __syncthreads();
  float* partial = partials + int64_t{blockIdx.x} * L::kOut * (L::kWeights + 1);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kConv2Channels * kTap; ++i) {
      partial[(first_channel + i / kTap) * (L::kWeights + 1) + in_channel * kTaps + tap_row * kTap + i % kTap] =
          sums[i / kTap][i % kTap] + other_lane[i * kConv2Workers + worker];
    }
  }
  if (bias_channel >= 0) partial[bias_channel * (L::kWeights + 1) + L::kWeights] = bias_sum;
}

// --------------------------------------------------------------------------------------------------------- launchers

template <typename L, typename T>
LaunchResult forward_layer(const ConvPoolForward& c, cudaStream_t stream) {
  LaunchResult result;
  const int images = images_per_block(c.shape.batch, kForwardImages);
  lx::launch(result, "lenet_conv_forward_kernel", lenet_conv_forward_kernel<T, L>, lx::grid_for(c.shape.batch, images),
             kThreads, forward_shared_bytes<L>(images), stream, c.shape.batch, images, static_cast<const T*>(c.input),
             static_cast<const T*>(c.weight), static_cast<const T*>(c.bias), static_cast<T*>(c.output), c.indices);
  return result;
}

template <typename T>
LaunchResult forward(const ConvPoolForward& c, cudaStream_t stream) {
  return is_layer<Conv1>(c.shape) ? forward_layer<Conv1, T>(c, stream) : forward_layer<Conv2, T>(c, stream);
}

template <typename T>
LaunchResult grad_input(const ConvPoolBackward& c, cudaStream_t stream) {
  LaunchResult result;
  const int images = images_per_block(c.shape.batch, kGradInputImages);
  lx::launch(result, "lenet_grad_input_kernel", lenet_grad_input_kernel<T>, lx::grid_for(c.shape.batch, images),
             kThreads, grad_input_shared_bytes(images), stream, c.shape.batch, images,
             static_cast<const T*>(c.grad_output), c.indices, static_cast<const T*>(c.weight),
             static_cast<T*>(c.grad_input));
  return result;
}

template <typename T>
LaunchResult grad_weight_partials(const ConvPoolBackward& c, cudaStream_t stream) {
  LaunchResult result;
  const Slices slices(c.shape.batch);
  const bool first = is_layer<Conv1>(c.shape);
  lx::launch(result, first ? "lenet_conv1_grad_weight_kernel" : "lenet_conv2_grad_weight_kernel",
             first ? lenet_conv1_grad_weight_kernel<T> : lenet_conv2_grad_weight_kernel<T>,
             static_cast<unsigned>(slices.count), kThreads,
             first ? conv1_grad_shared_bytes() : conv2_grad_shared_bytes(), stream, c.shape.batch, slices.images,
             static_cast<const T*>(c.grad_output), c.indices, static_cast<const T*>(c.input),
             static_cast<float*>(c.workspace));
  return result;
}

// As LX_DISPATCH, without float64, which has_lenet_kernels excludes.
#define LENET_DISPATCH(dtype, function, ...)  \
  switch (dtype) {                            \
    case DType::kFloat32:                     \
      return function<float>(__VA_ARGS__);    \
    case DType::kFloat16:                     \
      return function<lx::f16>(__VA_ARGS__);  \
    default:                                  \
      return function<lx::bf16>(__VA_ARGS__); \
  }

}  // namespace

bool has_lenet_kernels(DType dtype, const ConvPoolShape& shape) {
  return dtype != DType::kFloat64 && (is_layer<Conv1>(shape) || is_layer<Conv2>(shape));
}

bool has_lenet_grad_input(const ConvPoolShape& shape) { return is_layer<Conv2>(shape); }

int64_t lenet_grad_weight_slices(const ConvPoolShape& shape) { return Slices(shape.batch).count; }

LaunchResult launch_lenet_conv_forward(DType dtype, const ConvPoolForward& call,
                                       cudaStream_t stream){LENET_DISPATCH(dtype, forward, call, stream)}

LaunchResult launch_lenet_grad_input(DType dtype, const ConvPoolBackward& call,
                                     cudaStream_t stream){LENET_DISPATCH(dtype, grad_input, call, stream)}

LaunchResult launch_lenet_grad_weight_partials(DType dtype, const ConvPoolBackward& call, cudaStream_t stream) {
  LENET_DISPATCH(dtype, grad_weight_partials, call, stream)
}

}  // namespace lenet_ext::cuda
