// LeNet's two convolutions with ReLU and pooling on the tensor cores, as a block of 256 threads computes them for some
// images in shared memory: in float16, bfloat16, and in float32 by way of TF32.
//
// Operands are counted in words of 4 bytes (tensor_core.cuh), so that one text serves all formats. Each sum begins with
// the bias and has a fixed order, whatever the batch: the same for a layer on its own as within the whole network.
#pragma once

#include "async_copy.cuh"
#include "lenet_pixels.cuh"
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
constexpr int kPatchesOfRow = Conv1::kConv / 4, kPatches = Conv1::kPool * kPatchesOfRow;  // of an image: 14 x 7
constexpr int kPatchRow = 8, kPatchDepth = 6 * kPatchRow, kPatchColumns = 48;

// conv2 as it is: a row of the product is a position, its depth 25 taps of 8 channels, of which the last two are zero.
// A pixel of its input is a vector, in TF32 two; windows are no patches, so that rows need no pixel behind their end.
constexpr int kChannels = 8;
using MapPixels = PixelPlaces<false>;

// Where a pair of neighbouring columns begins in conv2's input, in pixels, by its number among the pairs of all images;
// the right column is one of the odd columns.
LX_DEVICE int pair_of_pixels(int number, int image) {
  constexpr int kPairs = Conv2::kSize / 2;
  static_assert(MapPixels::kOddRow == kPairs);  // the pairs of two rows follow one another
  const int rows = lx::small_quotient<2 * kPairs>(number);
  return number + rows * (MapPixels::kRowPair - 2 * kPairs) +
         image * (MapPixels::kImage - Conv2::kSize / 2 * MapPixels::kRowPair);
}

// What the sums of both begin with, in shared memory as a lane loads it at once: its four values of a tile are one
// channel of conv1, [channel][4 times its bias], and two of conv2, [pair of channels][2 times their biases].
constexpr int kBiases1 = 4 * Conv1::kOut, kBiases2 = 2 * Conv2::kOut;

// Where a patch or a window of conv2 finds its input and puts its output. They are counted row by row through all
// images of a pass. All places are linear in this number and in those of its row and image, which are a multiplication
// each: no trip of a loop computes remainders, and to carry places from trip to trip would take as many instructions.
struct Patch {
  int number, image;

  explicit LX_DEVICE Patch(int number) : number(number), image(lx::small_quotient<kPatches>(number)) {}

  // Its corner, in bytes behind the first image's, where a pixel has so many; patches are 4 columns and 2 rows apart.
  LX_DEVICE int corner(int pixel) const {
    constexpr int kRow = 2 * Conv1::kSize - 4 * kPatchesOfRow;
    constexpr int kImage = Conv1::kImage - Conv1::kPool * 2 * Conv1::kSize;
    return number * (4 * pixel) + lx::small_quotient<kPatchesOfRow>(number) * (kRow * pixel) + image * (kImage * pixel);
  }
  // Of its left (0) or right (1) window in the pooled output, [image][channel][window].
  LX_DEVICE int pooled(int channel, int right) const {
    return 2 * number + image * (Conv1::kPooled - Conv1::kWindows) + channel * Conv1::kWindows + right;
  }
};
struct Window {
  int number, image;

  explicit LX_DEVICE Window(int number) : number(number), image(lx::small_quotient<Conv2::kWindows>(number)) {}

  // Its corner in conv2's input, in bytes behind the first image's; windows are a pixel and 2 rows apart.
  LX_DEVICE int corner() const {
    constexpr int kRow = MapPixels::kRowPair - Conv2::kPool;
    constexpr int kImage = MapPixels::kImage - Conv2::kPool * MapPixels::kRowPair;
    const int row = lx::small_quotient<Conv2::kPool>(number);
    return number * kVectorBytes + row * (kRow * kVectorBytes) + image * (kImage * kVectorBytes);
  }
  // Of an output channel in the pooled output, [image][channel][window], with images `pitch` apart.
  LX_DEVICE int pooled(int channel, int pitch = Conv2::kPooled) const {
    return number + image * (pitch - Conv2::kWindows) + channel * Conv2::kWindows;
  }
};

template <typename T>
struct ConvolutionLayout {
  static constexpr int kPerWord = Operand<T>::kPerWord, kStep = 8 * kPerWord;  // elements of depth of one product
  static constexpr int kImages = kPerWord == 2 ? 16 : 8;  // through the network at once; two blocks a multiprocessor
  static constexpr int kImageWords = Conv1::kImage / kPerWord;
  // A pixel of conv2's input is one vector of 16 bytes, or two (planes apart) in TF32.
  static constexpr int kVectors = kChannels / 4 / kPerWord;
  static constexpr int kSteps1 = kPatchDepth / kStep, kSteps2 = (kTaps * kChannels + kStep - 1) / kStep;
  // Row pitches in words. An odd multiple of 4 lets 8 rows of 4 words come from different banks.
  static constexpr int kPitch1 = 8 * kSteps1 + 4, kPitch2 = 8 * kSteps2 + 4;
  static constexpr int kMatrix1Words = kPatchColumns * kPitch1, kMatrix2Words = Conv2::kOut * kPitch2;
  static_assert(kPitch1 % 8 == 4 && kPitch2 % 8 == 4);

  // Which of the different matrices of weights a product of conv1 takes; -1: they are all zeros. In TF32, where a step
  // is one row of pixels, it meets row `step` of the taps for the positions at dy = 0, the row above for dy = 1.
  static constexpr int kTiles1 = kPatchColumns / 8;
  static constexpr int kMatrices1 = kPerWord == 2 ? kSteps1 * kTiles1 : kTap * kTiles1 / 2;
  static LX_DEVICE constexpr int matrix1(int step, int tile) {
    if (kPerWord == 2) return step * kTiles1 + tile;
    const int row = step - tile / (kTiles1 / 2);
    return row < 0 || row >= kTap ? -1 : row * (kTiles1 / 2) + tile % (kTiles1 / 2);
  }
  static_assert(kImages * kPatches < 1 << 16);  // for small_quotient

  // conv2's input: [vector][image, pixel as MapPixels says].
  static LX_DEVICE constexpr int maps_words(int images) { return images * MapPixels::kImage * kVectors * 4; }

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

template <typename T>
LX_DEVICE T* elements(uint32_t* words) {
  return reinterpret_cast<T*>(words);
}

// In rows of 4, each of which has so many channels. `bias` may be null.
template <int kBiases, int kChannelsOfRow, typename T>
LX_DEVICE void copy_biases(float* to, const T* bias) {
  if (threadIdx.x < kBiases) {
    const int channel = threadIdx.x / 4 * kChannelsOfRow + threadIdx.x % kChannelsOfRow;
    to[threadIdx.x] = bias == nullptr ? 0.0f : lx::widen(bias[channel]);
  }
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
  copy_biases<kBiases1, 1>(biases, bias);
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
  copy_biases<kBiases2, 2>(biases, bias);
}

// Makes operands of the pixels of `images` images that copy_vectors_async has brought this thread.
template <typename T>
__device__ __forceinline__ void round_pixels(uint32_t* pixels, int images) {
  if constexpr (std::is_same_v<T, float>) {
    for (int at = threadIdx.x * 4; at < images * Conv1::kImage; at += kTensorCoreThreads * 4) {
      lx::Pack<uint32_t, 4>* const vector = reinterpret_cast<lx::Pack<uint32_t, 4>*>(pixels + at);
      lx::Pack<uint32_t, 4> words = *vector;
#pragma unroll
      for (uint32_t& word : words.values) word = lx::operand_word<T>(word);
      *vector = words;
    }
  }
}

// The block writes what has arrived of `images` images of conv2's input, [image][channel][row][column], as maps_words
// says; channels 6 and 7 are zero.
//
// thread -> 2 neighbouring pixels in all channels. Neighbouring threads read neighbouring words, and store neighbouring
// pixels but where a pair of rows ends.
template <typename T>
__device__ __forceinline__ void spread_maps(uint32_t* maps, int planes, const T* arrived, int images) {
  using L = ConvolutionLayout<T>;
  constexpr int kMap = Conv2::kSize * Conv2::kSize, kPairs = kMap / 2, kInVector = 4 * L::kPerWord;
  for (int item = threadIdx.x; item < images * kPairs; item += blockDim.x) {
    const int image = lx::small_quotient<kPairs>(item);
    const T* const first = arrived + item * 2 + image * (Conv2::kImage - kMap);
    uint32_t* const to = maps + pair_of_pixels(item, image) * 4;
    lx::Pack<T, 2> pairs[Conv2::kIn];
#pragma unroll
    for (int c = 0; c < Conv2::kIn; ++c) pairs[c] = lx::load_pack<2>(first + c * kMap);
#pragma unroll
    for (int right = 0; right < 2; ++right) {
#pragma unroll
      for (int vector = 0; vector < L::kVectors; ++vector) {
        lx::Pack<T, kInVector> values;
#pragma unroll
        for (int c = 0; c < kInVector; ++c) {
          const int channel = vector * kInVector + c;
          values.values[c] = channel < Conv2::kIn ? lx::to_operand(pairs[channel][right]) : lx::narrow<T>(0.0f);
        }
        *reinterpret_cast<lx::Pack<T, kInVector>*>(to + (vector * planes + right * MapPixels::kOddColumn) * 4) = values;
      }
    }
  }
}

// What a lane of conv1 keeps for all patches: the matrices of weights and its biases.
template <typename T>
struct Conv1Weights {
  using L = ConvolutionLayout<T>;
  static constexpr int kPairs = Conv1::kOut / 2;

  uint32_t matrices[L::kMatrices1][2];
  lx::Pack<float, 4> biases[kPairs];  // of a tile: what its sums begin with

  LX_DEVICE Conv1Weights(const uint32_t* matrix, const float* all_biases) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    constexpr int kOfStep = L::kMatrices1 / (L::kPerWord == 2 ? L::kSteps1 : kTap);
#pragma unroll
    for (int i = 0; i < L::kMatrices1; ++i) {
      const uint32_t* from = matrix + (8 * (i % kOfStep) + g) * L::kPitch1 + 8 * (i / kOfStep) + t;
      matrices[i][0] = from[0];
      matrices[i][1] = from[4];
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) biases[pair] = lx::load_pack<4>(all_biases + 4 * (2 * pair + t / 2));
  }
};

// conv1 of `images` images: store(patch, channel, right, winner) for each pooled output, the left or right window of a
// patch; a winner as pool_window makes it, without a code if none is wanted. matrix, biases: what `weights` are made
// of. irregular: a flag for each image, zero at first.
//
// The band's zeros make NaN of values that do not see an infinite or NaN pixel of their patch: an image with NaN among
// its largest values is computed anew, without the zeros, and stored twice. No sum of finite values is NaN, unless
// infinities meet in it, so that an image without NaN is right.
//
// warp -> 16 patches at a time, all channels.
template <typename T, bool kCodes, typename Store>
__device__ __forceinline__ void convolve1(const uint32_t* pixels, const Conv1Weights<T>& weights,
                                          const uint32_t* matrix, const float* biases, int images, int* irregular,
                                          Store store) {
  using L = ConvolutionLayout<T>;
  constexpr int kPairs = Conv1::kOut / 2, kRow = kPatchRow / L::kPerWord;  // words of a patch row
  // Patches are four columns apart. In TF32 these are 16 bytes, a row of a matrix: a lane names the row of one patch,
  // and needs no other corner. In 16 bits they are 8, and every other patch would have its rows where none may begin.
  constexpr bool kNamed = L::kPerWord == 1;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // What a lane loads first of a patch at the first corner.
  const unsigned char* const lane_pixels =
      reinterpret_cast<const unsigned char*>(pixels + (kNamed ? lane / 16 * 4 : t));
  const int patches = images * kPatches;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * 16; first < patches; first += kTensorCoreWarps * 16) {
    __syncwarp();
    // Rows behind the last patch repeat it and store the same values: to leave them out takes more instructions.
    auto patch_of = [&](int row) { return Patch(first + row < patches - 1 ? first + row : patches - 1); };
    const Patch rows[2] = {patch_of(g), patch_of(g + 8)};
    const uint32_t* corners[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Patch patch = kNamed ? patch_of(lane % 16) : rows[half];
      corners[half] = reinterpret_cast<const uint32_t*>(lane_pixels + patch.corner(sizeof(T)));
    }
    float sums[L::kTiles1][4];
#pragma unroll
    for (int step = 0; step < L::kSteps1; ++step) {
      uint32_t a[4];
      if constexpr (kNamed) {
        lx::load_matrices(a, corners[0] + step * Conv1::kSize);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int word = 8 * step + i / 2 * 4;
          a[i] = corners[i % 2][word / kRow * (Conv1::kSize / L::kPerWord) + word % kRow];
        }
      }
#pragma unroll
      for (int tile = 0; tile < L::kTiles1; ++tile) {
        const int at = L::matrix1(step, tile);
        if (at < 0) continue;
        const uint32_t (&b)[2] = weights.matrices[at];
        if (step == 0 || L::matrix1(step - 1, tile) < 0) {
          lx::multiply_add<T>(sums[tile], a, b[0], b[1], weights.biases[tile % kPairs].values);
        } else {
          lx::multiply_accumulate<T>(sums[tile], a, b[0], b[1]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0;  // NaN if one of them is, or if infinities meet
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const float (&above)[4] = sums[pair], (&below)[4] = sums[pair + kPairs];
        const auto winner =
            pool_window<kCodes, false>(above[2 * half], above[2 * half + 1], below[2 * half], below[2 * half + 1]);
        sum += winner.best;
        store(rows[half], 2 * pair + t / 2, t % 2, winner);
      }
      if (lx::is_nan(sum)) irregular[rows[half].image] = 1;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int image = 0; image < images; ++image) {
    if (!irregular[image]) continue;
    const T* values = reinterpret_cast<const T*>(pixels) + image * Conv1::kImage;
#pragma unroll 1
    for (int item = threadIdx.x; item < Conv1::kPooled; item += kTensorCoreThreads) {
      const int channel = item / Conv1::kWindows, y = item % Conv1::kWindows / Conv1::kPool, x = item % Conv1::kPool;
      const int row = channel / 2 * 8 + channel % 2 * 4;  // of position 0
      const T* taps = reinterpret_cast<const T*>(matrix + row * L::kPitch1);
      Winner<float> winner;
#pragma unroll 1
      for (int position = 0; position < 4; ++position) {
        const T* at = values + (2 * y + position / 2) * Conv1::kSize + 2 * x + position % 2;
        float sum = biases[4 * channel];
#pragma unroll 1
        for (int tap = 0; tap < kTaps; ++tap) {
          sum += lx::widen(at[tap / kTap * Conv1::kSize + tap % kTap]) *
                 lx::widen(taps[tap / kTap * kPatchRow + tap % kTap]);
        }
        winner.consider(sum, position);
      }
      store(Patch(image * kPatches + y * kPatchesOfRow + x / 2), channel, x % 2, winner);
    }
  }
}

// Where a lane of conv2 finds its weights, as it loads matrices, and its biases.
template <typename T>
struct Conv2Matrix {
  const uint32_t* row;
  const float* biases;

  LX_DEVICE Conv2Matrix(const uint32_t* matrix, const float* all_biases) {
    const int lane = threadIdx.x % 32;
    row = matrix + (lane % 8 + lane / 16 * 8) * ConvolutionLayout<T>::kPitch2 + lane / 8 % 2 * 4;
    biases = all_biases + 4 * (lane % 4);
  }
  // Of a step: two tiles of 8 channels.
  __device__ __forceinline__ void load(uint32_t (&words)[4], int step) const {
    lx::load_matrices(words, row + 8 * step);
  }
  // Of a tile: what its sums begin with.
  LX_DEVICE lx::Pack<float, 4> load_biases(int tile) const { return lx::load_pack<4>(biases + 16 * tile); }
};

// What it keeps of them for all windows: the biases and, as far as there are registers for them, the weights. In 16
// bits these are all; in TF32 they would take 100 registers, and those of the other steps are loaded for each trip.
template <typename T>
struct Conv2Weights {
  using L = ConvolutionLayout<T>;
  static constexpr int kResident = L::kPerWord == 2 ? L::kSteps2 : 8;

  Conv2Matrix<T> matrix;
  uint32_t steps[kResident][4];
  lx::Pack<float, 4> biases[2];

  __device__ __forceinline__ Conv2Weights(const uint32_t* all_words, const float* all_biases)
      : matrix(all_words, all_biases) {
#pragma unroll
    for (int step = 0; step < kResident; ++step) matrix.load(steps[step], step);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) biases[tile] = matrix.load_biases(tile);
  }
  __device__ __forceinline__ void get(uint32_t (&words)[4], int step) const {
    if (step >= kResident) {
      matrix.load(words, step);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) words[k] = steps[step][k];
    }
  }
};

// conv2 of `images` images in `maps`, whose vectors are `planes` pixels apart: store(window, channel, winner) for each
// pooled output, as conv1 has it.
//
// warp -> 8 windows at a time, all channels. Rows g and g + 8 of a product are window g at dy = 0 and 1; there is one
// product for dx = 0 and one for dx = 1, so that the four values of a window are one thread's. What the products of a
// column take for dx = 1 is what the next column's take for dx = 0, and loaded once.
template <typename T, bool kCodes, typename Store>
__device__ __forceinline__ void convolve2(const uint32_t* maps, int planes, const Conv2Weights<T>& weights, int images,
                                          Store store) {
  using L = ConvolutionLayout<T>;
  constexpr bool k16Bits = L::kPerWord == 2;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // A lane names a row of one of the operand's four matrices: dy = 0 and 1 of a step's first half, then of the second
  // one. In 16 bits this is the tap a row below, in the last row the one two columns further; in TF32 the same pixel's
  // other channels, where an odd row of taps is not as far from the next one as an even row is.
  const int dy = lane / 8 % 2, second = lane / 16;
  const unsigned char* const pixel = reinterpret_cast<const unsigned char*>(maps);
  const unsigned char* const lane_pixels[2] = {
      pixel + (k16Bits ? MapPixels::at(dy + second, 0) : MapPixels::at(dy, 0) + second * planes) * kVectorBytes,
      pixel +
          (k16Bits ? MapPixels::at(dy, 2 * second) : MapPixels::at(1 + dy, 0) - MapPixels::kOddRow + second * planes) *
              kVectorBytes};
  const int windows = images * Conv2::kWindows;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * 8; first < windows; first += kTensorCoreWarps * 8) {
    __syncwarp();
    // Rows behind the last window as in conv1.
    auto window_of = [&](int row) { return Window(first + row < windows - 1 ? first + row : windows - 1); };
    const int corner = lx::computed_here(window_of(lane % 8).corner());
    float sums[2][2][4];  // [dx][tile]
#pragma unroll
    for (int step = 0; step < L::kSteps2; ++step) {
      uint32_t b[4];
      weights.get(b, step);
      const bool other = k16Bits ? step >= 10 : L::tap_row(step) % 2 == 1;
#pragma unroll
      for (int dx = 0; dx < 2; ++dx) {
        const int tap = MapPixels::at(L::tap_row(step), L::tap_column(step) + dx) * kVectorBytes;
        const uint32_t* const from = reinterpret_cast<const uint32_t*>(lane_pixels[other ? 1 : 0] + corner + tap);
        uint32_t a[4] = {};
        if (k16Bits && step == 12) {  // there is no 26th tap
          uint32_t half[2];
          lx::load_matrices(half, from);
          a[0] = half[0], a[1] = half[1];
        } else {
          lx::load_matrices(a, from);
        }
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          if (step == 0) {
            lx::multiply_add<T>(sums[dx][tile], a, b[2 * tile], b[2 * tile + 1], weights.biases[tile].values);
          } else {
            lx::multiply_accumulate<T>(sums[dx][tile], a, b[2 * tile], b[2 * tile + 1]);
          }
        }
      }
    }
    const Window window = window_of(g);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        store(window, 8 * tile + 2 * t + c,
              pool_window<kCodes>(sums[0][tile][c], sums[1][tile][c], sums[0][tile][2 + c], sums[1][tile][2 + c]));
      }
    }
  }
}

// The same in TF32, in a block with several images: warp -> 16 windows at a time. Rows g and g + 8 of a product are two
// windows; each of their 6 x 6 pixels is loaded once, for all four positions that see it, and so are a tap's weights,
// of which a row stays for dy = 1. The sums are the same. With one image, only two warps would have windows.
template <typename T, bool kCodes, typename Store>
__device__ __forceinline__ void convolve2(const uint32_t* maps, int planes, const Conv2Matrix<T>& matrix, int images,
                                          Store store) {
  static_assert(ConvolutionLayout<T>::kPerWord == 1);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // A lane names a row of the first or second 8 windows, and of a pixel's first or last channels.
  const unsigned char* const pixel = reinterpret_cast<const unsigned char*>(maps + lane / 16 * planes * 4);
  const int windows = images * Conv2::kWindows;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * 16; first < windows; first += kTensorCoreWarps * 16) {
    __syncwarp();
    auto window_of = [&](int row) { return Window(first + row < windows - 1 ? first + row : windows - 1); };
    const unsigned char* const corner = pixel + lx::computed_here(window_of(lane % 16).corner());
    lx::Pack<float, 4> begin[2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) begin[tile] = matrix.load_biases(tile);
    float sums[2][2][2][4];  // [dy][dx][tile]
    uint32_t b[2][kTap][4];  // of an even row of taps, of an odd one
#pragma unroll
    for (int place = 0; place < (kTap + 1) * (kTap + 1); ++place) {
      const int row = place / (kTap + 1), column = place % (kTap + 1);
      if (row < kTap && column < kTap) matrix.load(b[row % 2][column], row * kTap + column);
      uint32_t a[4];
      lx::load_matrices(a, reinterpret_cast<const uint32_t*>(corner + MapPixels::at(row, column) * kVectorBytes));
#pragma unroll
      for (int position = 0; position < 4; ++position) {
        const int dy = position / 2, dx = position % 2, tap_row = row - dy, tap_column = column - dx;
        if (tap_row < 0 || tap_row >= kTap || tap_column < 0 || tap_column >= kTap) continue;
        const uint32_t (&weights)[4] = b[tap_row % 2][tap_column];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          float (&sum)[4] = sums[dy][dx][tile];
          if (tap_row == 0 && tap_column == 0) {
            lx::multiply_add<T>(sum, a, weights[2 * tile], weights[2 * tile + 1], begin[tile].values);
          } else {
            lx::multiply_accumulate<T>(sum, a, weights[2 * tile], weights[2 * tile + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Window window = window_of(g + 8 * half);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int k = 2 * half + c;
          store(
              window, 8 * tile + 2 * t + c,
              pool_window<kCodes>(sums[0][0][tile][k], sums[0][1][tile][k], sums[1][0][tile][k], sums[1][1][tile][k]));
        }
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
