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
constexpr int kPatchesOfRow = Conv1::kConv / 4, kPatches = Conv1::kPool * kPatchesOfRow;  // of an image: 14 x 7
constexpr int kPatchRow = 8, kPatchDepth = 6 * kPatchRow, kPatchColumns = 48;

// conv2 as it is: a row of the product is a position, its depth 25 taps of 8 channels, of which the last two are zero.
constexpr int kChannels = 8, kPixelBytes = 16;  // in TF32, of each of two vectors

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
    constexpr int kRow = 2 * Conv2::kSize - Conv2::kPool;
    constexpr int kImage = Conv1::kWindows - Conv2::kPool * 2 * Conv2::kSize;
    const int row = lx::small_quotient<Conv2::kPool>(number);
    return number * kPixelBytes + row * (kRow * kPixelBytes) + image * (kImage * kPixelBytes);
  }
  // Of an output channel in the pooled output, [image][channel][window], with images `pitch` apart.
  LX_DEVICE int pooled(int channel, int pitch = Conv2::kPooled) const {
    return number + image * (pitch - Conv2::kWindows) + channel * Conv2::kWindows;
  }
};

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
  static_assert(kImages * kPatches < 1 << 16);  // for small_quotient

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

// The pixel of the left (0) or right (1) of two columns by the number of their pair, 7 of which are a row.
LX_DEVICE int split_pixel(int pair, int right) {
  constexpr int kPairs = Conv1::kPool / 2;
  return pair + lx::small_quotient<kPairs>(pair) * kPairs + right * kPairs;
}

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

// The block reads `images` images and notes in `irregular` which have pixels that are not finite: the zeros of the
// banded matrix would spread them.
//
// thread -> the same 4 pixels of each image, which is as many as there are threads for.
template <typename T>
__device__ __forceinline__ void load_pixels(uint32_t* pixels, const T* from, int images, int* irregular) {
  static_assert(Conv1::kImage == 4 * kTensorCoreThreads);
  auto load = [&](auto aligned) {
    constexpr bool kPacks = decltype(aligned)::value;
    const T* at = from + threadIdx.x * 4;
    T* to = elements<T>(pixels) + threadIdx.x * 4;
    for (int image = 0; image < images; ++image, at += Conv1::kImage, to += Conv1::kImage) {
      lx::Pack<T, 4> pack = kPacks ? lx::load_pack<4>(at) : lx::Pack<T, 4>{{at[0], at[1], at[2], at[3]}};
      bool finite = true;
#pragma unroll
      for (T& pixel : pack.values) {
        pixel = lx::to_operand(pixel);
        finite = finite && lx::is_finite(pixel);
      }
      *reinterpret_cast<lx::Pack<T, 4>*>(to) = pack;
      if (!finite) irregular[image] = 1;
    }
  };
  if (lx::aligned_for_packs(from)) {
    load(std::true_type());
  } else {
    load(std::false_type());
  }
}

// The block reads `images` images of conv2's input, as maps_words says; channels 6 and 7 are zero.
//
// thread -> 4 neighbouring pixels in all channels. Neighbouring threads store two pixels apart, which is two accesses
// to the same banks: 49 clocks an image where 25 would do, in TF32 98. And the block waits for what it loads.
template <typename T>
__device__ __forceinline__ void load_maps(uint32_t* maps, int planes, const T* from, int images) {
  using L = ConvolutionLayout<T>;
  constexpr int kMap = Conv2::kSize * Conv2::kSize, kInVector = 4 * L::kPerWord;
  static_assert(kMap % 4 == 0 && Conv2::kSize % 2 == 0);
  const bool aligned = lx::aligned_for_packs(from);
  for (int item = threadIdx.x; item < images * (kMap / 4); item += blockDim.x) {
    const int image = lx::small_quotient<kMap / 4>(item);
    const T* const first = from + item * 4 + image * (Conv2::kImage - kMap);
    lx::Pack<T, 4> pixels[Conv2::kIn];
#pragma unroll
    for (int c = 0; c < Conv2::kIn; ++c) {
      const T* at = first + c * kMap;
      pixels[c] = aligned ? lx::load_pack<4>(at) : lx::Pack<T, 4>{{at[0], at[1], at[2], at[3]}};
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int pixel = split_pixel(2 * item + k / 2, k % 2);
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

// conv1 of `images` images: store(patch, channel, right, winner) for each pooled output, the left or right window of a
// patch; a winner as pool_window makes it, without a code if none is wanted. Outputs of irregular images are stored
// twice: to look for such images in each trip of the loop takes more instructions.
//
// warp -> 16 patches at a time, all channels; the matrix stays in registers.
template <typename T, bool kCodes, typename Store>
__device__ __forceinline__ void convolve1(const uint32_t* pixels, const uint32_t* matrix, const float* biases,
                                          int images, const int* irregular, Store store) {
  using L = ConvolutionLayout<T>;
  constexpr int kPairs = Conv1::kOut / 2, kTiles = 2 * kPairs, kRow = kPatchRow / L::kPerWord;  // words of a patch row
  // Patches are four columns apart. In TF32 these are 16 bytes, a row of a matrix: a lane names the row of one patch,
  // and needs no other corner. In 16 bits they are 8, and every other patch would have its rows where none may begin.
  constexpr bool kNamed = L::kPerWord == 1;
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
    lx::Pack<float, 4> begin[kPairs];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) begin[pair] = lx::load_pack<4>(biases + 4 * (2 * pair + t / 2));
    float sums[kTiles][4];
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
      for (int tile = 0; tile < kTiles; ++tile) {
        if (step == 0) {
          lx::multiply_add<T>(sums[tile], a, b[step][tile][0], b[step][tile][1], begin[tile % kPairs].values);
        } else {
          lx::multiply_accumulate<T>(sums[tile], a, b[step][tile][0], b[step][tile][1]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const float (&above)[4] = sums[pair], (&below)[4] = sums[pair + kPairs];
        store(rows[half], 2 * pair + t / 2, t % 2,
              pool_window<kCodes>(above[2 * half], above[2 * half + 1], below[2 * half], below[2 * half + 1]));
      }
    }
  }
  __syncthreads();
  // The images whose pixels are not all finite anew, without the zeros.
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
        float sum = biases[4 * channel];
#pragma unroll 1
        for (int tap = 0; tap < kTaps; ++tap) {
          sum += lx::widen(at[tap / kTap * Conv1::kSize + tap % kTap]) *
                 lx::widen(weights[tap / kTap * kPatchRow + tap % kTap]);
        }
        winner.consider(sum, position);
      }
      store(Patch(image * kPatches + y * kPatchesOfRow + x / 2), channel, x % 2, winner);
    }
  }
}

// conv2 of `images` images in `maps`, whose vectors are `planes` pixels apart: store(window, channel, winner) for each
// pooled output, as conv1 has it.
//
// warp -> 8 windows at a time, all channels. Rows g and g + 8 of a product are window g at dy = 0 and 1; there is one
// product for dx = 0 and one for dx = 1, so that the four values of a window are one thread's.
//
// Of 8 windows some are in the next row of windows, 28 pixels on, where one has the banks of another: the maps are
// loaded in twice the clocks, 650 an image, in TF32 1,250, beside 262 and 504 of products. An H100 took 730 in bfloat16
// (214 us for 65,536 images, at commit e811d08). Large batches of the network have the layout of lenet_pixels.cuh and
// asynchronous copies (lenet_lean_forward.cu); here small ones wait for other things, and the layer alone pays.
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
  // What a lane loads first of a window at the first corner: a tap's second half are the pixels a row below, those two
  // columns further, or, in the last step, any; in TF32 they are the same pixel's in another plane.
  const unsigned char* const pixel = reinterpret_cast<const unsigned char*>(maps + (second_rows ? kRow : 0));
  const unsigned char* const lane_pixels[3] = {pixel + (second_words ? (kResident ? kRow : planes * 4) * 4 : 0),
                                               pixel + (second_words ? kPixelBytes : 0), pixel};
  uint32_t b[kResident ? L::kSteps2 : 1][4];  // of a step: two tiles of 8 channels
  if constexpr (kResident) {
#pragma unroll
    for (int step = 0; step < L::kSteps2; ++step) lx::load_matrices(b[step], matrix_row + 8 * step);
  }
  const int windows = images * Conv2::kWindows;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * 8; first < windows; first += kTensorCoreWarps * 8) {
    __syncwarp();
    // Rows behind the last window as in conv1.
    auto window_of = [&](int row) { return Window(first + row < windows - 1 ? first + row : windows - 1); };
    const int corner = lx::computed_here(window_of(lane % 8).corner());
    lx::Pack<float, 4> begin[2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) begin[tile] = lx::load_pack<4>(biases + 4 * (4 * tile + t));
    float sums[2][2][4];  // [dx][tile]
#pragma unroll
    for (int step = 0; step < L::kSteps2; ++step) {
      if constexpr (!kResident) lx::load_matrices(b[0], matrix_row + 8 * step);
      const uint32_t (&weights)[4] = b[kResident ? step : 0];
      const unsigned char* const from = lane_pixels[!kResident || step < 10 ? 0 : step < 12 ? 1 : 2] + corner;
#pragma unroll
      for (int dx = 0; dx < 2; ++dx) {
        uint32_t a[4];
        const int tap = L::tap_row(step) * kRow + split_column(L::tap_column(step) + dx) * 4;
        lx::load_matrices(a, reinterpret_cast<const uint32_t*>(from) + tap);
        if (L::kPerWord == 2 && step == 12) a[2] = a[3] = 0;  // there is no 26th tap
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          if (step == 0) {
            lx::multiply_add<T>(sums[dx][tile], a, weights[2 * tile], weights[2 * tile + 1], begin[tile].values);
          } else {
            lx::multiply_accumulate<T>(sums[dx][tile], a, weights[2 * tile], weights[2 * tile + 1]);
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
