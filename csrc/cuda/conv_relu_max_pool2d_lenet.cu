// conv_relu_max_pool2d for LeNet's layers (1 -> 6 channels at 32 x 32, 6 -> 16 at 14 x 14, kernel 5, pool 2), in
// float32 arithmetic on the ordinary units; there is a second way, through the tensor cores: forward in
// conv_relu_max_pool2d_lenet_tensor_core.cu, backward in conv_relu_max_pool2d_lenet_gradients.cu. Sizes are
// compile-time constants, the convolution's output and its gradient stay in registers or shared memory. The header
// comment of each kernel says what a thread computes and what it costs; register counts are from ptxas 13.0,
// tests/build/test_cuda_build.py watches that nothing spills.
#include <algorithm>

#include "conv_relu_max_pool2d_lenet.cuh"
#include "lenet_grad_tiles.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = kGradThreads;

// ----------------------------------------------------------------------------------------------------------- forward

constexpr int kForwardImages = 10;

template <typename L>
int64_t forward_shared_bytes(int images) {
  return lx::taken<float>(images * L::kImage) + lx::taken<float>(L::kOut * L::kWeights) + lx::taken<float>(L::kOut);
}

// block -> `images` images; thread as convolve_images says. With 10 images: conv1 5 x 196 = 980 items for 256 threads,
// 42 KB; conv2 5 x 25 x 2 = 250 items, 57 KB. By registers two blocks fit a multiprocessor. Without kMayKeep `indices`
// is null.
template <typename T, typename L, ThreadTile kTile, bool kMayKeep>
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
    convolve_images<L, kTile, kMayKeep>(
        pixels, weights, biases, images, present, [&](int image, int channel, int window, const auto& winner) {
          const int64_t to = (first + image) * L::kPooled + channel * L::kWindows + window;
          output[to] = lx::narrow<T>(winner.pooled());
          if constexpr (kMayKeep) {
            if (indices != nullptr) indices[to] = winner.code();
          }
        });
  }
}

// ------------------------------------------------------------------------------------------ gradient of conv2's input

template <int kImages>
int64_t grad_input_shared_bytes() {
  return lx::taken<float>(GradInput<kImages>::kFloats) + lx::taken<float>(Conv2::kOut * Conv2::kWeights);
}

// block -> kImages images; thread as GradInput says. Shared memory: 74 KB with 8 images, 35 KB with one.
// `grad_input` is 16-byte aligned, as it was allocated.
template <typename T, int kImages>
__global__ void __launch_bounds__(kThreads, 2)
    lenet_grad_input_kernel(int64_t batch, const T* __restrict__ grad_output, const uint8_t* __restrict__ indices,
                            const T* __restrict__ weight, T* __restrict__ grad_input) {
  using L = Conv2;
  LX_SMEM(shared);
  float* region = lx::take<float>(shared, GradInput<kImages>::kFloats);
  float* weights = lx::take<float>(shared, L::kOut * L::kWeights);
  lx::copy_to_shared(weights, weight, L::kOut * L::kWeights);
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * kImages;
  const int present = static_cast<int>(batch - first < kImages ? batch - first : kImages);
  GradInput<kImages>::compute(
      region, grad_output + first * L::kPooled, indices + first * L::kPooled, present, weights,
      [&](int at, const float (&values)[4]) { lx::store_narrow(grad_input + first * L::kImage + at, values); });
}

// ------------------------------------------------------------------------------- gradients of the weights and biases

// ---- conv1

constexpr int kConv1Images = 4;  // in shared memory at once

int64_t conv1_grad_shared_bytes() {
  return std::max(lx::taken<float>(kConv1Images * Conv1::kImage), lx::taken<float>(Conv1GradWeight::kReducedFloats));
}

// block -> one slice; thread as Conv1GradWeight says. Shared memory: 17 KB.
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
  float* reduced = lx::take<float>(shared, Conv1GradWeight::kReducedFloats);

  const int64_t slice_begin = blockIdx.x * slice_images;
  const int64_t slice_end = slice_begin + slice_images < batch ? slice_begin + slice_images : batch;
  Conv1GradWeight gradient;
  for (int64_t first = slice_begin; first < slice_end; first += kConv1Images) {
    const int present = static_cast<int>(slice_end - first < kConv1Images ? slice_end - first : kConv1Images);
    __syncthreads();
    lx::copy_to_shared(pixels, input + first * L::kImage, present * L::kImage);
    __syncthreads();
    gradient.add(pixels, L::kImage, grad_output + first * L::kPooled, indices + first * L::kPooled, present);
  }
  float* partial = partials + int64_t{blockIdx.x} * L::kOut * (L::kWeights + 1);
  gradient.finish(reduced, [&](int at, float sum) { partial[at] = sum; });
}

// ---- conv2

constexpr int kConv2Images = 4;  // in shared memory at once
// From plane to plane, so that the lanes' pixels lie in different banks.
constexpr int kConv2Plane = Conv2::kSize * Conv2::kSize + 2;
using Conv2Gradient = Conv2GradWeight<kThreads, kConv2Plane>;

constexpr int64_t conv2_grad_shared_bytes() {
  return std::max(
      lx::taken<float>(kConv2Images * Conv2::kIn * kConv2Plane) + lx::taken<float>(kConv2Images * kRowPairs),
      lx::taken<float>(Conv2Gradient::kPartialFloats));
}

// The block copies `planes` of them to shared memory. Whether the values that this thread has copied are finite.
template <typename T>
LX_DEVICE bool copy_planes(float* to, const T* from, int planes) {
  constexpr int kMap = Conv2::kSize * Conv2::kSize;
  const bool packs = lx::aligned_for_packs(from);
  float zero = 0;
  for (int i = threadIdx.x * 4; i < planes * kMap; i += kThreads * 4) {
    const lx::Pack<T, 4> pack =
        packs ? lx::load_pack<4>(from + i) : lx::Pack<T, 4>{{from[i], from[i + 1], from[i + 2], from[i + 3]}};
    const float values[4] = {lx::widen(pack[0]), lx::widen(pack[1]), lx::widen(pack[2]), lx::widen(pack[3])};
    float* const place = to + i + lx::small_quotient<kMap>(i) * (kConv2Plane - kMap);
    *reinterpret_cast<lx::Pack<float, 2>*>(place) = {{values[0], values[1]}};
    *reinterpret_cast<lx::Pack<float, 2>*>(place + 2) = {{values[2], values[3]}};
#pragma unroll
    for (int k = 0; k < 4; ++k) zero += 0 * values[k];
  }
  return zero == 0;
}

// block -> one slice; four images and the gradients in their winners' rows are in shared memory, at the end the sums of
// all parts; thread as Conv2GradWeight says. Shared memory: 33 KB.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    lenet_conv2_grad_weight_kernel(int64_t batch, int64_t slice_images, const T* __restrict__ grad_output,
                                   const uint8_t* __restrict__ indices, const T* __restrict__ input,
                                   float* __restrict__ partials) {
  using L = Conv2;
  LX_SMEM(shared);
  unsigned char* const begin = shared;
  float* pixels = lx::take<float>(shared, kConv2Images * L::kIn * kConv2Plane);
  float* rows = lx::take<float>(shared, kConv2Images * kRowPairs);
  shared = begin;
  float* partial_sums = lx::take<float>(shared, Conv2Gradient::kPartialFloats);

  const int64_t slice_begin = blockIdx.x * slice_images;
  const int64_t slice_end = slice_begin + slice_images < batch ? slice_begin + slice_images : batch;
  Conv2Gradient gradient;
#pragma unroll 1
  for (int64_t first = slice_begin; first < slice_end; first += kConv2Images) {
    const int present = static_cast<int>(slice_end - first < kConv2Images ? slice_end - first : kConv2Images);
    __syncthreads();
    const bool finite = copy_planes(pixels, input + first * L::kImage, present * L::kIn);
    expand_rows_and_codes(rows, grad_output + first * L::kPooled, indices + first * L::kPooled, present);
    const bool zeros_count = __syncthreads_or(!finite) != 0;
    gradient.add(pixels, rows, present);
    if (zeros_count) gradient.add_zeros(pixels, rows, present);
  }
  __syncthreads();
  float* partial = partials + int64_t{blockIdx.x} * Conv2Gradient::kSums;
  gradient.finish(partial_sums, [&](int at, float sum) { partial[at] = sum; });
}

// --------------------------------------------------------------------------------------------------------- launchers

template <typename L, typename T>
LaunchResult forward_layer(const ConvPoolForward& c, cudaStream_t stream) {
  LaunchResult result;
  const int images = images_per_block(c.shape.batch, kForwardImages, forward_shared_bytes<L>);
  const ThreadTile tile = tile_for(images);
  lx::launch(result, "lenet_conv_forward_kernel",
             tile == ThreadTile::kSingle ? lenet_conv_forward_kernel<T, L, ThreadTile::kSingle, true>
             : tile == ThreadTile::kPair ? lenet_conv_forward_kernel<T, L, ThreadTile::kPair, true>
             : c.indices == nullptr      ? lenet_conv_forward_kernel<T, L, ThreadTile::kLarge, false>
                                         : lenet_conv_forward_kernel<T, L, ThreadTile::kLarge, true>,
             lx::grid_for(c.shape.batch, images), kThreads, forward_shared_bytes<L>(images), stream, c.shape.batch,
             images, static_cast<const T*>(c.input), static_cast<const T*>(c.weight), static_cast<const T*>(c.bias),
             static_cast<T*>(c.output), c.indices);
  return result;
}

template <typename T>
LaunchResult forward(const ConvPoolForward& c, cudaStream_t stream) {
  return is_layer<Conv1>(c.shape) ? forward_layer<Conv1, T>(c, stream) : forward_layer<Conv2, T>(c, stream);
}

template <typename T, int kImages>
void launch_grad_input(LaunchResult& result, const ConvPoolBackward& c, cudaStream_t stream) {
  lx::launch(result, "lenet_grad_input_kernel", lenet_grad_input_kernel<T, kImages>,
             lx::grid_for(c.shape.batch, kImages), kThreads, grad_input_shared_bytes<kImages>(), stream, c.shape.batch,
             static_cast<const T*>(c.grad_output), c.indices, static_cast<const T*>(c.weight),
             static_cast<T*>(c.grad_input));
}

template <typename T>
LaunchResult grad_input(const ConvPoolBackward& c, cudaStream_t stream) {
  LaunchResult result;
  const int images = images_per_block(c.shape.batch, 8, [](int n) {
    return n > 4 ? grad_input_shared_bytes<8>() : n > 2 ? grad_input_shared_bytes<4>() : grad_input_shared_bytes<2>();
  });
  if (images >= 8) {
    launch_grad_input<T, 8>(result, c, stream);
  } else if (images >= 4) {
    launch_grad_input<T, 4>(result, c, stream);
  } else if (images == 2) {
    launch_grad_input<T, 2>(result, c, stream);
  } else {
    launch_grad_input<T, 1>(result, c, stream);
  }
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
