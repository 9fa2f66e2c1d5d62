// LeNet from the image to the logits in one launch, on the tensor cores: float16, bfloat16, and float32 by way of TF32.
//
// Within a pass over some images, a block holds all activations in shared memory, rounded to the storage type (which is
// what the layers one by one do) or to TF32.
#include "lenet_tensor_core_tiles.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = kTensorCoreThreads;
constexpr int kWarps = kTensorCoreWarps;
constexpr int kTilesOfWarp = 2;  // of 8 outputs, in a linear layer
constexpr int kMostOutputs = kTilesOfWarp * kWarps * 8;

template <typename T>
struct Layout : ConvolutionLayout<T> {
  using C = ConvolutionLayout<T>;
  // Row pitches in words: 8 or 24 modulo 32 lets 4 rows of 8 words come from different banks.
  static constexpr int kFeaturesPitch = C::kPerWord == 2 ? 200 : 408;
  static constexpr int kHidden1Pitch = C::kPerWord == 2 ? 72 : 120, kHidden2Pitch = C::kPerWord == 2 ? 56 : 88;
  static_assert(kFeaturesPitch % 16 == 8 && kHidden1Pitch % 16 == 8 && kHidden2Pitch % 16 == 8);
  static_assert(kFeaturesPitch + kHidden1Pitch + kHidden2Pitch <= C::kImageWords, "they take the place of the pixels");

  static int64_t shared_bytes(int images) {
    return lx::taken<uint32_t>(images * C::kImageWords) + lx::taken<uint32_t>(C::maps_words(images)) +
           lx::taken<uint32_t>(C::kMatrix1Words) + lx::taken<uint32_t>(C::kMatrix2Words) + lx::taken<float>(kBiases1) +
           lx::taken<float>(kBiases2) + lx::taken<int>(images);
  }
};

// Two words of a weight's row, as operands.
template <typename T>
__device__ __forceinline__ lx::Pack<uint32_t, 2> load_operands(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    const lx::Pack<float, 2> pair = lx::load_pack<2>(from);
    return {{lx::bits_of(lx::to_tf32(pair[0])), lx::bits_of(lx::to_tf32(pair[1]))}};
  } else {
    return lx::load_pack<2>(reinterpret_cast<const uint32_t*>(from));
  }
}

// A linear layer of up to 16 images, one product's rows: from `in` (shared, rows of `pitch` words, zeros behind
// `depth`) to `output` (global, may be null) and, for the next layer, to `hidden` (shared, zeros behind `outputs`; null
// in the last layer, the one without ReLU).
//
// warp -> 2 tiles of 8 outputs. The weights come straight from L2, 32 bytes of 8 rows at a time: word 2 t of a row is
// what a product calls word t, word 2 t + 1 its word t + 4.
template <typename T>
__device__ __forceinline__ void linear_images(const uint32_t* in, int pitch, int images, int depth,
                                              const T* __restrict__ weight, const T* __restrict__ bias, int outputs,
                                              uint32_t* hidden, int hidden_pitch, T* __restrict__ output) {
  using L = Layout<T>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int words = depth / L::kPerWord, steps = lx::divide_up(words, 8);
  const int columns = hidden == nullptr ? outputs : lx::divide_up(outputs, L::kStep) * L::kStep;
  const uint32_t* rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) rows[i] = in + (g + 8 * i < images ? g + 8 * i : images - 1) * pitch + 2 * t;
  float sums[kTilesOfWarp][4];
  const T* weights[kTilesOfWarp];
  int tile[kTilesOfWarp];
#pragma unroll
  for (int n = 0; n < kTilesOfWarp; ++n) {
    tile[n] = (static_cast<int>(threadIdx.x) / 32 + n * kWarps) * 8;
    weights[n] = weight + (tile[n] + g < outputs ? tile[n] + g : outputs - 1) * depth + 2 * t * L::kPerWord;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = tile[n] + 2 * t + i % 2;
      sums[n][i] = lx::widen(bias[column < outputs ? column : outputs - 1]);
    }
  }
#pragma unroll 4
  for (int step = 0; step < steps; ++step) {
    const lx::Pack<uint32_t, 2> low = lx::load_pack<2>(rows[0] + 8 * step), high = lx::load_pack<2>(rows[1] + 8 * step);
    const uint32_t a[4] = {low[0], high[0], low[1], high[1]};
#pragma unroll
    for (int n = 0; n < kTilesOfWarp; ++n) {
      if (tile[n] >= outputs) continue;  // of the whole warp
      lx::Pack<uint32_t, 2> b{};
      if (8 * step + 2 * t < words) b = load_operands(weights[n] + step * L::kStep);
      lx::multiply_accumulate<T>(sums[n], a, b[0], b[1]);
    }
  }
#pragma unroll
  for (int n = 0; n < kTilesOfWarp; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int image = g + i / 2 * 8, column = tile[n] + 2 * t + i % 2;
      if (image >= images || column >= columns) continue;
      float value = sums[n][i];
      if (column >= outputs || (hidden != nullptr && value <= 0)) value = 0;  // NaN passes
      const T rounded = lx::narrow<T>(value);
      if (hidden != nullptr) elements<T>(hidden)[image * hidden_pitch * L::kPerWord + column] = lx::to_operand(rounded);
      if (output != nullptr && column < outputs) output[image * outputs + column] = rounded;
    }
  }
  __syncthreads();
}

// block -> `images` images at a time, until the batch is done; activations in the place of those that are no longer
// needed. Shared memory: 99 KB with 16 images in the 16-bit types, 110 KB with 8 in TF32, two blocks per
// multiprocessor. With kKeep what a backward pass needs goes to global memory.
template <typename T, bool kKeep>
__global__ void __launch_bounds__(kThreads, 2) lenet_tensor_core_kernel(LenetForwardOf<T> call, int images) {
  using L = Layout<T>;
  LX_SMEM(shared);
  uint32_t* pixels = lx::take<uint32_t>(shared, images * L::kImageWords);
  uint32_t* pooled1 = lx::take<uint32_t>(shared, L::maps_words(images));
  uint32_t* matrix1 = lx::take<uint32_t>(shared, L::kMatrix1Words);
  uint32_t* matrix2 = lx::take<uint32_t>(shared, L::kMatrix2Words);
  float* biases1 = lx::take<float>(shared, kBiases1);
  float* biases2 = lx::take<float>(shared, kBiases2);
  int* irregular = lx::take<int>(shared, images);
  uint32_t* features = pixels;
  const int planes = images * MapPixels::kImage;

  const int64_t stride = int64_t{gridDim.x} * images;
  int64_t first = int64_t{blockIdx.x} * images;
  auto present_at = [&](int64_t image) {
    return static_cast<int>(call.batch - image < images ? call.batch - image : images);
  };
  auto fetch = [&](int64_t image) {
    lx::copy_vectors_async(elements<T>(pixels), call.input + image * Conv1::kImage, present_at(image) * Conv1::kImage);
    lx::end_copy_group();
  };
  fetch(first);
  prepare_conv1(matrix1, biases1, call.parameters[0], call.parameters[1]);
  prepare_conv2(matrix2, biases2, call.parameters[2], call.parameters[3]);
  lx::fill_shared(pooled1, L::maps_words(images), 0u);  // its channels 6 and 7 stay so
  lx::fill_shared(irregular, images, 0);
  __syncthreads();

#pragma unroll 1
  for (; first < call.batch; first += stride) {
    const int present = present_at(first);
    lx::wait_for_copies<0>();
    round_pixels<T>(pixels, present);
    __syncthreads();
    convolve1<T, kKeep>(pixels, Conv1Weights<T>(matrix1, biases1), matrix1, biases1, present, irregular,
                        [&](const Patch& patch, int channel, int right, const auto& winner) {
                          constexpr int kInVector = 4 * L::kPerWord;
                          const T value = lx::narrow<T>(winner.pooled());
                          const int pixel = channel / kInVector * planes + pair_of_pixels(patch.number, patch.image) +
                                            right * MapPixels::kOddColumn;
                          elements<T>(pooled1)[pixel * kInVector + channel % kInVector] = lx::to_operand(value);
                          if constexpr (kKeep) {
                            const int64_t at = first * Conv1::kPooled + patch.pooled(channel, right);
                            call.pooled1[at] = value;
                            call.indices1[at] = winner.code();
                          }
                        });
    __syncthreads();
    lx::fill_shared(irregular, images, 0);
    convolve2<T, kKeep>(pooled1, planes, Conv2Weights<T>(matrix2, biases2), present,
                        [&](const Window& window, int channel, const auto& winner) {
                          const T value = lx::narrow<T>(winner.pooled());
                          constexpr int kPitch = L::kFeaturesPitch * L::kPerWord;
                          elements<T>(features)[window.pooled(channel, kPitch)] = lx::to_operand(value);
                          if constexpr (kKeep) {
                            const int64_t at = first * Conv2::kPooled + window.pooled(channel);
                            call.pooled2[at] = value;
                            call.indices2[at] = winner.code();
                          }
                        });
    __syncthreads();
    // One copy of the code for the three layers, which all have to fit the registers.
    uint32_t* const hidden1 = features + images * L::kFeaturesPitch;
    uint32_t* const hidden2 = hidden1 + images * L::kHidden1Pitch;
#pragma unroll 1
    for (int layer = 0; layer < 3; ++layer) {
      const uint32_t* in = layer == 0 ? features : layer == 1 ? hidden1 : hidden2;
      uint32_t* hidden = layer == 0 ? hidden1 : layer == 1 ? hidden2 : nullptr;
      const int pitch = layer == 0 ? L::kFeaturesPitch : layer == 1 ? L::kHidden1Pitch : L::kHidden2Pitch;
      const int depth = layer == 0 ? kFeatures : layer == 1 ? kHidden1 : kHidden2;
      const int outputs = layer == 0 ? kHidden1 : layer == 1 ? kHidden2 : static_cast<int>(call.classes);
      const T* weight = layer == 0 ? call.parameters[4] : layer == 1 ? call.parameters[6] : call.parameters[8];
      const T* bias = layer == 0 ? call.parameters[5] : layer == 1 ? call.parameters[7] : call.parameters[9];
      T* result = layer == 0 ? call.hidden1 : layer == 1 ? call.hidden2 : call.output;
      linear_images(in, pitch, present, depth, weight, bias, outputs, hidden,
                    layer == 0 ? L::kHidden1Pitch : L::kHidden2Pitch,
                    result == nullptr ? nullptr : result + first * outputs);
    }
    if (first + stride < call.batch) fetch(first + stride);
  }
}

template <typename T>
LaunchResult forward(const LenetForwardOf<void>& call, cudaStream_t stream) {
  LaunchResult result;
  if (call.batch == 0) return result;
  const int images = images_per_block(call.batch, Layout<T>::kImages, Layout<T>::shared_bytes);
  const unsigned grid = blocks_at_once(result, call.batch, images);
  lx::launch(result, "lenet_tensor_core_kernel",
             call.pooled1 == nullptr ? lenet_tensor_core_kernel<T, false> : lenet_tensor_core_kernel<T, true>, grid,
             kThreads, Layout<T>::shared_bytes(images), stream, typed<T>(call), images);
  return result;
}

template <typename T>
bool supported() {
  return lx::has_tensor_cores(lenet_tensor_core_kernel<T, true>);
}

}  // namespace

bool has_lenet_tensor_core_forward(DType dtype, int64_t channels, int64_t classes) {
  if (dtype == DType::kFloat64 || channels != Conv1::kIn || classes < 1 || classes > kMostOutputs) return false;
  LENET_DISPATCH(dtype, supported)
}

LaunchResult launch_lenet_tensor_core_forward(DType dtype, const LenetForwardOf<void>& call, cudaStream_t stream) {
  LENET_DISPATCH(dtype, forward, call, stream)
}

}  // namespace lenet_ext::cuda
