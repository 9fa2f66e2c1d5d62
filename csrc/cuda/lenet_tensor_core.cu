// LeNet from the image to the logits in one launch, on the tensor cores: float16, bfloat16, and float32 by way of TF32.
//
// Operands are counted in words of 4 bytes (tensor_core.cuh), so that one text serves all formats. Within a pass over
// some images, a block holds all activations in shared memory, rounded to the storage type (which is what the layers
// one by one do) or to TF32. Each sum begins with the bias and has a fixed order, whatever the batch.
#include "lenet_tiles.cuh"
#include "tensor_core.cuh"

namespace lenet_ext::cuda {
namespace {

using lx::Operand;

constexpr unsigned kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kFeatures = Conv2::kPooled, kHidden1 = 120, kHidden2 = 84;
constexpr int kTilesOfWarp = 2;  // of 8 outputs, in a linear layer
constexpr int kMostOutputs = kTilesOfWarp * kWarps * 8;

// conv1 as a banded matrix: a row of the product is a patch of 2 x 4 positions in the convolution's output, its depth
// the 6 x 8 pixels that they see, its 48 columns the 8 positions in 6 channels. Half of the weights' matrix is zero,
// but 5 x 5 kernels as they are would not fill the tensor cores' depth better, and would read each pixel 25 times.
//
// The 6 tiles of 8 columns: tile 3 dy + p has row dy of the patch in channels 2 p and 2 p + 1; column 4 c + 2 x + dx of
// it has channel 2 p + c and position 2 x + dx. So the columns 2 t and 2 t + 1 of tiles p and 3 + p are one pooling
// window, and one thread's.
constexpr int kPatches = Conv1::kPool * (Conv1::kConv / 4);  // of an image: 14 x 7
constexpr int kPatchRow = 8, kPatchDepth = 6 * kPatchRow, kPatchColumns = 48;

// conv2 as it is: a row of the product is a position, its depth 25 taps of 8 channels, of which the last two are zero.
constexpr int kChannels = 8;

template <typename T>
struct Layout {
  static constexpr int kPerWord = Operand<T>::kPerWord, kStep = 8 * kPerWord;  // elements of depth of one product
  static constexpr int kImages = kPerWord == 2 ? 16 : 8;  // of a pass: what lets two blocks share a multiprocessor
  static constexpr int kImageWords = Conv1::kImage / kPerWord;
  // A pixel of pooled1 is one vector of 16 bytes, or two (planes apart) in TF32.
  static constexpr int kVectors = kChannels / 4 / kPerWord;
  static constexpr int kSteps1 = kPatchDepth / kStep, kSteps2 = (kTaps * kChannels + kStep - 1) / kStep;
  // Row pitches in words. An odd multiple of 4 lets 8 rows of 4 words come from different banks; 8 or 24 modulo 32,
  // 4 rows of 8 words.
  static constexpr int kPitch1 = 8 * kSteps1 + 4, kPitch2 = 8 * kSteps2 + 4;
  static constexpr int kFeaturesPitch = kPerWord == 2 ? 200 : 408;
  static constexpr int kHidden1Pitch = kPerWord == 2 ? 72 : 120, kHidden2Pitch = kPerWord == 2 ? 56 : 88;

  static_assert(kPitch1 % 8 == 4 && kPitch2 % 8 == 4 && kFeaturesPitch % 16 == 8);
  static_assert(kHidden1Pitch % 16 == 8 && kHidden2Pitch % 16 == 8);
  static_assert(kFeaturesPitch + kHidden1Pitch + kHidden2Pitch <= kImageWords, "they take the place of the pixels");

  static LX_DEVICE constexpr int pooled1_words(int images) { return images * Conv1::kWindows * kVectors * 4; }
  static int64_t shared_bytes(int images) {
    return lx::taken<uint32_t>(images * kImageWords) + lx::taken<uint32_t>(pooled1_words(images)) +
           lx::taken<uint32_t>(kPatchColumns * kPitch1) + lx::taken<uint32_t>(Conv2::kOut * kPitch2) +
           lx::taken<float>(Conv1::kOut) + lx::taken<float>(Conv2::kOut) + lx::taken<int>(images);
  }

  // Steps of conv2 in the 16-bit types take two taps, in TF32 one. Two taps are a row apart, then the last row's two
  // columns apart: constant distances in shared memory.
  static LX_DEVICE constexpr int tap_row(int step) {
    return kPerWord == 1 ? step / kTap : step < 5 ? 0 : step < 10 ? 2 : 4;
  }
  static LX_DEVICE constexpr int tap_column(int step) {
    return kPerWord == 1 ? step % kTap : step < 10 ? step % kTap : step == 12 ? 4 : step - 10;
  }
  // The tap that element k of conv2's depth belongs to; -1 behind the last.
  static LX_DEVICE int tap_at(int k) {
    const int step = k / kStep, second = kPerWord == 2 ? k / kChannels % 2 : 0;
    const int row = tap_row(step) + (step < 10 ? second : 0), column = tap_column(step) + (step < 10 ? 0 : 2 * second);
    return row < kTap && column < kTap ? row * kTap + column : -1;
  }
};

// Where pooled1 keeps a column of an image's row: even columns first, so that the windows of conv2, two columns apart,
// are neighbours.
LX_DEVICE constexpr int split_column(int x) { return x % 2 * (Conv1::kPool / 2) + x / 2; }

template <typename T>
LX_DEVICE T* elements(uint32_t* words) {
  return reinterpret_cast<T*>(words);
}

// The block writes the weights of the convolutions as the matrices of the products, [column][depth].
template <typename T>
__device__ __forceinline__ void prepare_weights(uint32_t* matrix1, const T* weight1, uint32_t* matrix2,
                                                const T* weight2) {
  using L = Layout<T>;
  constexpr int kRow1 = L::kPitch1 * L::kPerWord, kRow2 = L::kPitch2 * L::kPerWord;
  const T zero = lx::narrow<T>(0.0f);
  for (int at = threadIdx.x; at < kPatchColumns * kRow1; at += blockDim.x) {
    const int column = at / kRow1, k = at % kRow1;
    const int channel = column / 8 % 3 * 2 + column / 4 % 2;
    const int i = k / kPatchRow - column / 24, j = k % kPatchRow - column % 4;
    const bool band = k < kPatchDepth && i >= 0 && i < kTap && j >= 0 && j < kTap;
    elements<T>(matrix1)[at] = band ? lx::to_operand(weight1[channel * kTaps + i * kTap + j]) : zero;
  }
  for (int at = threadIdx.x; at < Conv2::kOut * kRow2; at += blockDim.x) {
    const int out = at / kRow2, k = at % kRow2, in = k % kChannels, tap = L::tap_at(k);
    const bool weight = in < Conv2::kIn && tap >= 0 && k < L::kSteps2 * L::kStep;
    elements<T>(matrix2)[at] = weight ? lx::to_operand(weight2[(out * Conv2::kIn + in) * kTaps + tap]) : zero;
  }
}

// The block reads `images` images and notes in `irregular` which have pixels that are not finite: the zeros of the
// banded matrix would spread them.
template <typename T>
__device__ __forceinline__ void load_pixels(uint32_t* pixels, const T* from, int images, int* irregular) {
  T* to = elements<T>(pixels);
  if (lx::aligned_for_packs(from)) {
    for (int i = threadIdx.x * 4; i < images * Conv1::kImage; i += blockDim.x * 4) {
      lx::Pack<T, 4> pack = lx::load_pack<4>(from + i);
      bool finite = true;
#pragma unroll
      for (T& pixel : pack.values) {
        pixel = lx::to_operand(pixel);
        finite = finite && lx::is_finite(lx::widen(pixel));
      }
      *reinterpret_cast<lx::Pack<T, 4>*>(to + i) = pack;
      if (!finite) irregular[i / Conv1::kImage] = 1;
    }
  } else {
    for (int i = threadIdx.x; i < images * Conv1::kImage; i += blockDim.x) {
      to[i] = lx::to_operand(from[i]);
      if (!lx::is_finite(lx::widen(to[i]))) irregular[i / Conv1::kImage] = 1;
    }
  }
}

// conv1 of `images` images: store(image, channel, y, x, winner) for each pooled output.
//
// warp -> 16 patches at a time, all channels; the matrix stays in registers.
template <typename T, typename Store>
__device__ __forceinline__ void convolve1(const uint32_t* pixels, const uint32_t* matrix, const float* biases,
                                          int images, const int* irregular, Store store) {
  using L = Layout<T>;
  constexpr int kPairs = Conv1::kOut / 2, kTiles = 2 * kPairs, kRow = kPatchRow / L::kPerWord;  // words of a patch row
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint32_t b[L::kSteps1][kTiles][2];
#pragma unroll
  for (int step = 0; step < L::kSteps1; ++step) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t* from = matrix + (8 * tile + g) * L::kPitch1 + 8 * step + t;
      b[step][tile][0] = from[0];
      b[step][tile][1] = from[4];
    }
  }
  const int patches = images * kPatches;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * 16; first < patches; first += kWarps * 16) {
    __syncwarp();
    const uint32_t* corner[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int patch = first + g + 8 * half < patches ? first + g + 8 * half : patches - 1, rest = patch % kPatches;
      corner[half] =
          pixels + patch / kPatches * L::kImageWords + (rest / 7 * 2 * Conv1::kSize + rest % 7 * 4) / L::kPerWord;
    }
    float sums[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (float& sum : sums[tile]) sum = biases[tile % kPairs * 2 + t / 2];
    }
#pragma unroll
    for (int step = 0; step < L::kSteps1; ++step) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int word = 8 * step + i / 2 * 4;
        a[i] = corner[i % 2][word / kRow * (Conv1::kSize / L::kPerWord) + word % kRow + t];
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        lx::multiply_accumulate<T>(sums[tile], a, b[step][tile][0], b[step][tile][1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int patch = first + g + 8 * half, image = patch / kPatches, rest = patch % kPatches;
      if (patch >= patches || irregular[image]) continue;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        Winner<float> winner;
#pragma unroll
        for (int position = 0; position < 4; ++position) {
          winner.consider(sums[pair + position / 2 * kPairs][2 * half + position % 2], position);
        }
        store(image, 2 * pair + t / 2, rest / 7, rest % 7 * 2 + t % 2, winner);
      }
    }
  }
  // The images whose pixels are not all finite, without the zeros.
#pragma unroll 1
  for (int image = 0; image < images; ++image) {
    if (!irregular[image]) continue;
    const T* values = reinterpret_cast<const T*>(pixels) + image * Conv1::kImage;
#pragma unroll 1
    for (int item = threadIdx.x; item < Conv1::kPooled; item += kThreads) {
      const int channel = item / Conv1::kWindows, y = item % Conv1::kWindows / Conv1::kPool, x = item % Conv1::kPool;
      const int row = channel / 2 * 8 + channel % 2 * 4;  // of position 0
      const T* weights = reinterpret_cast<const T*>(matrix + row * L::kPitch1);
      Winner<float> winner;
#pragma unroll 1
      for (int position = 0; position < 4; ++position) {
        const T* at = values + (2 * y + position / 2) * Conv1::kSize + 2 * x + position % 2;
        float sum = biases[channel];
#pragma unroll 1
        for (int tap = 0; tap < kTaps; ++tap) {
          sum += lx::widen(at[tap / kTap * Conv1::kSize + tap % kTap]) *
                 lx::widen(weights[tap / kTap * kPatchRow + tap % kTap]);
        }
        winner.consider(sum, position);
      }
      store(image, channel, y, x, winner);
    }
  }
}

// conv2 of `images` images: store(image, channel, window, winner) for each pooled output.
//
// warp -> 8 windows at a time, all channels. Rows g and g + 8 of a product are window g at dy = 0 and 1; there is one
// product for dx = 0 and one for dx = 1, so that the four values of a window are one thread's.
template <typename T, typename Store>
__device__ __forceinline__ void convolve2(const uint32_t* pooled1, int planes, const uint32_t* matrix,
                                          const float* biases, int images, Store store) {
  using L = Layout<T>;
  constexpr int kRow = Conv2::kSize * 4;        // words of a row
  constexpr bool kResident = L::kPerWord == 2;  // the matrix fits the registers
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // As lanes load matrices: rows lane % 8 of the first or second half of a product's rows, and of its depth.
  const bool second_rows = lane / 8 % 2 == 1, second_words = lane / 16 == 1;
  const uint32_t* const matrix_row = matrix + (lane % 8 + lane / 16 * 8) * L::kPitch2 + lane / 8 % 2 * 4;
  uint32_t b[kResident ? L::kSteps2 : 1][4];  // of a step: two tiles of 8 channels
  if constexpr (kResident) {
#pragma unroll
    for (int step = 0; step < L::kSteps2; ++step) lx::load_matrices(b[step], matrix_row + 8 * step);
  }
  const int windows = images * Conv2::kWindows;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * 8; first < windows; first += kWarps * 8) {
    __syncwarp();
    const int mine = first + lane % 8 < windows ? first + lane % 8 : windows - 1, rest = mine % Conv2::kWindows;
    const int pixel = mine / Conv2::kWindows * Conv1::kWindows + rest / 5 * 2 * Conv2::kSize + rest % 5;
    const uint32_t* const corner = pooled1 + pixel * 4 + (second_rows ? kRow : 0);
    float sums[2][2][4];  // [dx][tile]
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i / 8][i / 4 % 2][i % 4] = biases[i / 4 % 2 * 8 + 2 * t + i % 2];
    auto add_step = [&](int step, const uint32_t (&weights)[4]) {
      const int between = L::kPerWord == 1 ? planes * 4 : step < 10 ? kRow : step == 12 ? 0 : 4;
#pragma unroll
      for (int dx = 0; dx < 2; ++dx) {
        uint32_t a[4];
        const int column = split_column(L::tap_column(step) + dx);
        lx::load_matrices(a, corner + L::tap_row(step) * kRow + column * 4 + (second_words ? between : 0));
        if (L::kPerWord == 2 && step == 12) a[2] = a[3] = 0;  // there is no 26th tap
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          lx::multiply_accumulate<T>(sums[dx][tile], a, weights[2 * tile], weights[2 * tile + 1]);
        }
      }
    };
    if constexpr (kResident) {
#pragma unroll
      for (int step = 0; step < L::kSteps2; ++step) add_step(step, b[step]);
    } else {
#pragma unroll 5
      for (int step = 0; step < L::kSteps2; ++step) {
        lx::load_matrices(b[0], matrix_row + 8 * step);
        add_step(step, b[0]);
      }
    }
    const int window = first + g;
    if (window >= windows) continue;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        Winner<float> winner;
#pragma unroll
        for (int position = 0; position < 4; ++position) {
          winner.consider(sums[position % 2][tile][position / 2 * 2 + c], position);
        }
        store(window / Conv2::kWindows, 8 * tile + 2 * t + c, window % Conv2::kWindows, winner);
      }
    }
  }
}

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
// needed. Shared memory: 96 KB with 16 images in the 16-bit types, 106 KB with 8 in TF32, two blocks per
// multiprocessor.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) lenet_tensor_core_kernel(LenetForwardOf<T> call, int images) {
  using L = Layout<T>;
  LX_SMEM(shared);
  uint32_t* pixels = lx::take<uint32_t>(shared, images * L::kImageWords);
  uint32_t* pooled1 = lx::take<uint32_t>(shared, L::pooled1_words(images));
  uint32_t* matrix1 = lx::take<uint32_t>(shared, kPatchColumns * L::kPitch1);
  uint32_t* matrix2 = lx::take<uint32_t>(shared, Conv2::kOut * L::kPitch2);
  float* biases1 = lx::take<float>(shared, Conv1::kOut);
  float* biases2 = lx::take<float>(shared, Conv2::kOut);
  int* irregular = lx::take<int>(shared, images);
  uint32_t* features = pixels;
  const int planes = images * Conv1::kWindows;

  prepare_weights(matrix1, call.parameters[0], matrix2, call.parameters[2]);
  if (threadIdx.x < Conv1::kOut) biases1[threadIdx.x] = lx::widen(call.parameters[1][threadIdx.x]);
  if (threadIdx.x < Conv2::kOut) biases2[threadIdx.x] = lx::widen(call.parameters[3][threadIdx.x]);
  lx::fill_shared(pooled1, L::pooled1_words(images), 0u);  // its channels 6 and 7 stay so
  lx::fill_shared(irregular, images, 0);
  __syncthreads();

  const int64_t stride = int64_t{gridDim.x} * images;
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * images; first < call.batch; first += stride) {
    const int present = static_cast<int>(call.batch - first < images ? call.batch - first : images);
    load_pixels(pixels, call.input + first * Conv1::kImage, present, irregular);
    __syncthreads();
    convolve1<T>(pixels, matrix1, biases1, present, irregular,
                 [&](int image, int channel, int y, int x, const Winner<float>& winner) {
                   constexpr int kInVector = 4 * L::kPerWord;
                   const T value = lx::narrow<T>(winner.pooled());
                   const int pixel = image * Conv1::kWindows + y * Conv1::kPool + split_column(x);
                   elements<T>(pooled1)[(channel / kInVector * planes + pixel) * kInVector + channel % kInVector] =
                       lx::to_operand(value);
                   if (call.pooled1 == nullptr) return;
                   const int at = image * Conv1::kPooled + channel * Conv1::kWindows + y * Conv1::kPool + x;
                   call.pooled1[first * Conv1::kPooled + at] = value;
                   call.indices1[first * Conv1::kPooled + at] = winner.code();
                 });
    __syncthreads();
    lx::fill_shared(irregular, images, 0);
    convolve2<T>(pooled1, planes, matrix2, biases2, present,
                 [&](int image, int channel, int window, const Winner<float>& winner) {
                   const T value = lx::narrow<T>(winner.pooled());
                   const int at = channel * Conv2::kWindows + window;
                   elements<T>(features)[image * L::kFeaturesPitch * L::kPerWord + at] = lx::to_operand(value);
                   if (call.pooled2 == nullptr) return;
                   call.pooled2[(first + image) * Conv2::kPooled + at] = value;
                   call.indices2[(first + image) * Conv2::kPooled + at] = winner.code();
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
  }
}

template <typename T>
LenetForwardOf<T> typed(const LenetForwardOf<void>& call) {
  LenetForwardOf<T> of{};
  of.batch = call.batch, of.classes = call.classes, of.input = static_cast<const T*>(call.input);
  for (int i = 0; i < 10; ++i) of.parameters[i] = static_cast<const T*>(call.parameters[i]);
  of.output = static_cast<T*>(call.output);
  of.pooled1 = static_cast<T*>(call.pooled1), of.indices1 = call.indices1;
  of.pooled2 = static_cast<T*>(call.pooled2), of.indices2 = call.indices2;
  of.hidden1 = static_cast<T*>(call.hidden1), of.hidden2 = static_cast<T*>(call.hidden2);
  return of;
}

template <typename T>
LaunchResult forward(const LenetForwardOf<void>& call, cudaStream_t stream) {
  LaunchResult result;
  if (call.batch == 0) return result;
  const int images = images_per_block(call.batch, Layout<T>::kImages);
  int device = 0, multiprocessors = 0;
  result.error = cudaGetDevice(&device);
  if (result.error == cudaSuccess) {
    result.error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const unsigned grid = std::min(lx::grid_for(call.batch, images), static_cast<unsigned>(2 * multiprocessors));
  lx::launch(result, "lenet_tensor_core_kernel", lenet_tensor_core_kernel<T>, grid, kThreads,
             Layout<T>::shared_bytes(images), stream, typed<T>(call), images);
  return result;
}

}  // namespace

bool has_lenet_tensor_core_forward(DType dtype, int64_t channels, int64_t classes) {
  if (channels != Conv1::kIn || classes < 1 || classes > kMostOutputs) return false;
  switch (dtype) {
    case DType::kFloat32:
      return lx::has_tensor_cores(lenet_tensor_core_kernel<float>);
    case DType::kFloat16:
      return lx::has_tensor_cores(lenet_tensor_core_kernel<lx::f16>);
    case DType::kBFloat16:
      return lx::has_tensor_cores(lenet_tensor_core_kernel<lx::bf16>);
    default:
      return false;
  }
}

LaunchResult launch_lenet_tensor_core_forward(DType dtype, const LenetForwardOf<void>& call, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat16:
      return forward<lx::f16>(call, stream);
    case DType::kBFloat16:
      return forward<lx::bf16>(call, stream);
    default:
      return forward<float>(call, stream);
  }
}

}  // namespace lenet_ext::cuda
