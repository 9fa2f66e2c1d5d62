// LeNet's two convolutions with ReLU and pooling on the tensor cores, as a block of 256 threads computes them for some
// images in shared memory: in float16, bfloat16, and in float32 by way of TF32.
//
// Operands are counted in words of 4 bytes (tensor_core.cuh), so that one text serves all formats. Each sum begins with
// the bias and has a fixed order, whatever the batch: the same for a layer on its own as within the whole network.
#pragma once

#include "lenet_tiles.cuh"
#include "tensor_core.cuh"

namespace lenet_ext::cuda {

using lx::Operand;

constexpr unsigned kTensorCoreThreads = 256;
constexpr int kTensorCoreWarps = kTensorCoreThreads / 32;

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
struct ConvolutionLayout {
  static constexpr int kPerWord = Operand<T>::kPerWord, kStep = 8 * kPerWord;  // elements of depth of one product
  static constexpr int kImages = kPerWord == 2 ? 16 : 8;  // of a pass: what lets two blocks share a multiprocessor
  static constexpr int kImageWords = Conv1::kImage / kPerWord;
  // A pixel of conv2's input is one vector of 16 bytes, or two (planes apart) in TF32.
  static constexpr int kVectors = kChannels / 4 / kPerWord;
  static constexpr int kSteps1 = kPatchDepth / kStep, kSteps2 = (kTaps * kChannels + kStep - 1) / kStep;
  // Row pitches in words. An odd multiple of 4 lets 8 rows of 4 words come from different banks.
  static constexpr int kPitch1 = 8 * kSteps1 + 4, kPitch2 = 8 * kSteps2 + 4;
  static constexpr int kMatrix1Words = kPatchColumns * kPitch1, kMatrix2Words = Conv2::kOut * kPitch2;
  static_assert(kPitch1 % 8 == 4 && kPitch2 % 8 == 4);

  // conv2's input: [vector][image][row][split_column(column)], a pixel's channels together.
  static LX_DEVICE constexpr int maps_words(int images) { return images * Conv1::kWindows * kVectors * 4; }

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

// Where conv2's input keeps a column of an image's row: even columns first, so that the windows, two columns apart, are
// neighbours.
LX_DEVICE constexpr int split_column(int x) { return x % 2 * (Conv1::kPool / 2) + x / 2; }

template <typename T>
LX_DEVICE T* elements(uint32_t* words) {
  return reinterpret_cast<T*>(words);
}

// `bias` may be null.
template <typename L, typename T>
LX_DEVICE void copy_biases(float* to, const T* bias) {
  if (threadIdx.x < L::kOut) to[threadIdx.x] = bias == nullptr ? 0.0f : lx::widen(bias[threadIdx.x]);
}

// The block writes the weights of a convolution as the matrix of its products, [column][depth], and its biases.
template <typename T>
__device__ __forceinline__ void prepare_conv1(uint32_t* matrix, float* biases, const T* weight, const T* bias) {
  using L = ConvolutionLayout<T>;
  constexpr int kRow = L::kPitch1 * L::kPerWord;
  for (int at = threadIdx.x; at < kPatchColumns * kRow; at += blockDim.x) {
    const int column = at / kRow, k = at % kRow;
    const int channel = column / 8 % 3 * 2 + column / 4 % 2;
    const int i = k / kPatchRow - column / 24, j = k % kPatchRow - column % 4;
    const bool band = k < kPatchDepth && i >= 0 && i < kTap && j >= 0 && j < kTap;
    elements<T>(matrix)[at] = band ? lx::to_operand(weight[channel * kTaps + i * kTap + j]) : lx::narrow<T>(0.0f);
  }
  copy_biases<Conv1>(biases, bias);
}
template <typename T>
__device__ __forceinline__ void prepare_conv2(uint32_t* matrix, float* biases, const T* weight, const T* bias) {
  using L = ConvolutionLayout<T>;
  constexpr int kRow = L::kPitch2 * L::kPerWord;
  for (int at = threadIdx.x; at < Conv2::kOut * kRow; at += blockDim.x) {
    const int out = at / kRow, k = at % kRow, in = k % kChannels, tap = L::tap_at(k);
    const bool inside = in < Conv2::kIn && tap >= 0 && k < L::kSteps2 * L::kStep;
    elements<T>(matrix)[at] =
        inside ? lx::to_operand(weight[(out * Conv2::kIn + in) * kTaps + tap]) : lx::narrow<T>(0.0f);
  }
  copy_biases<Conv2>(biases, bias);
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

// The block reads `images` images of conv2's input, as maps_words says; channels 6 and 7 are zero.
//
// thread -> 4 neighbouring pixels in all channels.
template <typename T>
__device__ __forceinline__ void load_maps(uint32_t* maps, int planes, const T* from, int images) {
  using L = ConvolutionLayout<T>;
  constexpr int kMap = Conv2::kSize * Conv2::kSize, kInVector = 4 * L::kPerWord;
  static_assert(kMap % 4 == 0);
  const bool aligned = lx::aligned_for_packs(from);
  for (int item = threadIdx.x; item < images * (kMap / 4); item += blockDim.x) {
    const int image = item / (kMap / 4), first = item % (kMap / 4) * 4;
    lx::Pack<T, 4> pixels[Conv2::kIn];
#pragma unroll
    for (int c = 0; c < Conv2::kIn; ++c) {
      const T* at = from + image * Conv2::kImage + c * kMap + first;
      pixels[c] = aligned ? lx::load_pack<4>(at) : lx::Pack<T, 4>{{at[0], at[1], at[2], at[3]}};
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int y = (first + k) / Conv2::kSize, x = (first + k) % Conv2::kSize;
      const int pixel = image * kMap + y * Conv2::kSize + split_column(x);
#pragma unroll
      for (int vector = 0; vector < L::kVectors; ++vector) {
        lx::Pack<T, kInVector> values;
#pragma unroll
        for (int c = 0; c < kInVector; ++c) {
          const int channel = vector * kInVector + c;
          values.values[c] = channel < Conv2::kIn ? lx::to_operand(pixels[channel][k]) : lx::narrow<T>(0.0f);
        }
        *reinterpret_cast<lx::Pack<T, kInVector>*>(maps + (vector * planes + pixel) * 4) = values;
      }
    }
  }
}

// conv1 of `images` images: store(image, channel, y, x, winner) for each pooled output, a winner as pool_window makes
// it, without a code if none is wanted.
//
// warp -> 16 patches at a time, all channels; the matrix stays in registers.
template <typename T, bool kCodes, typename Store>
__device__ __forceinline__ void convolve1(const uint32_t* pixels, const uint32_t* matrix, const float* biases,
                                          int images, const int* irregular, Store store) {
  using L = ConvolutionLayout<T>;
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
  for (int first = threadIdx.x / 32 * 16; first < patches; first += kTensorCoreWarps * 16) {
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
        const float (&above)[4] = sums[pair], (&below)[4] = sums[pair + kPairs];
        store(image, 2 * pair + t / 2, rest / 7, rest % 7 * 2 + t % 2,
              pool_window<kCodes>(above[2 * half], above[2 * half + 1], below[2 * half], below[2 * half + 1]));
      }
    }
  }
  // The images whose pixels are not all finite, without the zeros.
#pragma unroll 1
  for (int image = 0; image < images; ++image) {
    if (!irregular[image]) continue;
    const T* values = reinterpret_cast<const T*>(pixels) + image * Conv1::kImage;
#pragma unroll 1
    for (int item = threadIdx.x; item < Conv1::kPooled; item += kTensorCoreThreads) {
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

// conv2 of `images` images in `maps`, whose vectors are `planes` pixels apart: store(image, channel, window, winner)
// for each pooled output, as conv1 has it.
//
// warp -> 8 windows at a time, all channels. Rows g and g + 8 of a product are window g at dy = 0 and 1; there is one
// product for dx = 0 and one for dx = 1, so that the four values of a window are one thread's.
template <typename T, bool kCodes, typename Store>
__device__ __forceinline__ void convolve2(const uint32_t* maps, int planes, const uint32_t* matrix, const float* biases,
                                          int images, Store store) {
  using L = ConvolutionLayout<T>;
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
  for (int first = threadIdx.x / 32 * 8; first < windows; first += kTensorCoreWarps * 8) {
    __syncwarp();
    const int mine = first + lane % 8 < windows ? first + lane % 8 : windows - 1, rest = mine % Conv2::kWindows;
    const int pixel = mine / Conv2::kWindows * Conv1::kWindows + rest / 5 * 2 * Conv2::kSize + rest % 5;
    const uint32_t* const corner = maps + pixel * 4 + (second_rows ? kRow : 0);
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
        store(window / Conv2::kWindows, 8 * tile + 2 * t + c, window % Conv2::kWindows,
              pool_window<kCodes>(sums[0][tile][c], sums[1][tile][c], sums[0][tile][2 + c], sums[1][tile][2 + c]));
      }
    }
  }
}

// Blocks for `images` images each: no more than fit the GPU at once, two to a multiprocessor, so that each prepares the
// weights once. Results do not depend on it.
inline unsigned blocks_at_once(LaunchResult& result, int64_t batch, int images) {
  int device = 0, multiprocessors = 0;
  result.error = cudaGetDevice(&device);
  if (result.error == cudaSuccess) {
    result.error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  return std::min(lx::grid_for(batch, images), static_cast<unsigned>(2 * multiprocessors));
}

}  // namespace lenet_ext::cuda
