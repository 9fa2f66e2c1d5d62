// LeNet's forward pass for large batches, on the tensor cores: both convolutions with ReLU and pooling in one launch,
// in float16, bfloat16 and float32 by way of TF32, and in the 16-bit types the three linear layers in another; with
// kKeep, what a backward pass needs goes to global memory on the way. In TF32 the linear layers' weights, 236 KB, are
// more than a block can hold: they have a kernel of another kind (lenet_tf32_linears.cu).
//
// lenet_tensor_core.cu stores values one by one, and computes an address for each patch and window. Here
//   - the largest of a window's values is found by max.NaN and gets its bias once; in 16 bits one instruction is ReLU
//     and rounding of two values; the winner, where it is wanted, is the first value that equals the largest;
//   - the columns of each product are in such an order that what a lane has as a result is, two values a word, what one
//     lane of the next product wants as its operand. So conv1 stores three channels of a pixel at once, conv2 four
//     channels, and the linear layers store nothing but the logits;
//   - patches and windows are walked so that their addresses differ by constants.
// Counted in the machine code for sm_90 (benchmarks/gpu/machine_code_sm_90.json): 73 instructions for 16 patches of
// conv1 where the other kernel has 103, 117 for 8 windows of conv2 in place of 120; 156 and 217 with what is kept,
// there 186 and 224. The products are what then limits: 318 an image, 510 clocks of a multiprocessor if it begins 0.62
// of them a clock, as others have measured on an H100. In TF32, 107 and 211 (188 and 297), and an image's convolutions
// are 523 products of half the depth, 840 clocks so, and 1,010 loads and stores of 128 bytes of shared memory. No GPU
// has run these kernels yet.
//
// In both loops an operand's four words are loaded for each product, even those that an earlier one had: a product
// takes them from four registers in a row, and to compose them of words that another operand has as well takes four
// moves.
#include "async_copy.cuh"
#include "lenet_pixels.cuh"
#include "lenet_tensor_core_tiles.cuh"

namespace lenet_ext::cuda {
namespace {

using lx::Pack;

// -------------------------------------------------------------------------------------------------- the convolutions

constexpr unsigned kThreads = kTensorCoreThreads;
constexpr int kWarps = kTensorCoreWarps;

// conv1 as a banded matrix, as convolve1 has it (lenet_tensor_core_tiles.cuh), with the columns in another order:
// column n of tile 3 dy + c has channel 3 (n / 4) + c at the position (dy, n % 4) of the patch. The columns 2 t and 2 t
// + 1 of tiles c and 3 + c are one pooling window, and a lane has three channels of it. A step is one row of the
// patch's pixels in TF32, two rows in 16 bits.
//
// conv2 in 16 bits in 13 products of two taps: of rows 0 and 1, of rows 2 and 3, and in row 4 of columns 0 and 2, of 1
// and 3, and column 4 alone; in TF32 in 25 of one tap. What a product wants for the positions at dx = 1 is then what
// the next column's wants at dx = 0.
template <typename T>
struct Lean {
  static constexpr int kPerWord = lx::Operand<T>::kPerWord;
  static constexpr int kImages = 8 * kPerWord;  // of a pass: two for each warp of conv1, or one
  static constexpr int kImagesOfWarp = kImages / kWarps;
  static constexpr int kRowBytes = Conv1::kSize * sizeof(T), kImageBytes = Conv1::kImage * sizeof(T);

  // conv1's output is in shared memory as PixelLayout says, with zeros in its empty slots; the pixel that belongs to no
  // place stays zero.
  using Pixels = PixelLayout<T>;
  static constexpr int kPlane = vectors_apart(kImages * Pixels::kImage) * kVectorBytes;
  static constexpr int kPooledBytes = kPerWord == 2 ? kImages * Pixels::kImage * kVectorBytes : 2 * kPlane;

  // The matrices are as many as in the other kernel, and met in the same products.
  using Products = ConvolutionLayout<T>;
  static constexpr int kSteps1 = Products::kSteps1, kTiles1 = Products::kTiles1, kMatrices1 = Products::kMatrices1;
  static LX_DEVICE constexpr int matrix1(int step, int tile) { return Products::matrix1(step, tile); }
  static constexpr int kMatrix1Words = (kMatrices1 + 1) / 2 * 128;

  static constexpr int kSteps2 = kPerWord == 2 ? 13 : kTaps, kMatrix2Words = kSteps2 * 128;
  static constexpr bool kResident = kPerWord == 2;            // conv2's weights stay in registers
  static constexpr int kRowSteps = kPerWord == 2 ? 2 : kTap;  // of steps that take one column after the other
  // The tap that word t (second: word t + 4) of a step belongs to; kTaps: none.
  static LX_DEVICE constexpr int tap_of(int step, bool second) {
    if (kPerWord == 1) return step;
    if (second) return step < 5 ? step + 5 : step < 10 ? step + 10 : step < 12 ? step + 12 : kTaps;
    return step < 5 ? step : step < 10 ? step + 5 : step < 12 ? step + 10 : 24;
  }

  static constexpr int64_t shared_bytes() {
    return lx::taken<unsigned char>(kImages * kImageBytes + kVectorBytes) + lx::taken<unsigned char>(kPooledBytes) +
           lx::taken<uint32_t>(kMatrix1Words) + lx::taken<uint32_t>(kMatrix2Words) +
           lx::taken<uint32_t>(kImages * Conv2::kWindows);
  }
};

// The matrices in the order in which lanes load them: conv1's [pair of matrices][lane][matrix of the pair][word],
// conv2's [step][lane][tile][word].
template <typename T>
__device__ __forceinline__ void prepare_lean_conv1(uint32_t* words, const T* weight) {
  using L = Lean<T>;
  for (int at = threadIdx.x; at < L::kMatrix1Words; at += kThreads) {
    const int second = at % 2, matrix = at / 128 * 2 + at / 2 % 2, t = at / 4 % 4, column = at / 16 % 8;
    const int channel = 3 * (column / 4) + matrix % 3;
    // Of a patch's 6 x 8 pixels, in 16 bits word t of a step is 4 (t % 2) and the next in row 2 step + t / 2, word t +
    // 4 the two behind them; in TF32 word t of a row is pixel t.
    const int i = L::kPerWord == 2 ? matrix / 6 * 2 + t / 2 - matrix / 3 % 2 : matrix / 3;
    const int j = (L::kPerWord == 2 ? t % 2 * 4 + second * 2 : t + second * 4) - column % 4;
    words[at] = lx::operand_word<T>([&](int k) {
      const bool band = i >= 0 && i < kTap && j + k >= 0 && j + k < kTap;
      return band ? weight[channel * kTaps + i * kTap + j + k] : T{0};
    });
  }
}
template <typename T>
__device__ __forceinline__ void prepare_lean_conv2(uint32_t* words, const T* weight) {
  using L = Lean<T>;
  for (int at = threadIdx.x; at < L::kMatrix2Words; at += kThreads) {
    const int second = at % 2, tile = at / 2 % 2, lane = at / 4 % 32, step = at / 128;
    const int tap = L::tap_of(step, second == 1), out = 8 * tile + lane / 4;
    const int first_slot = L::kPerWord == 2 ? lane % 4 * 2 : lane % 4 + second * 4;
    words[at] = lx::operand_word<T>([&](int k) {
      const int slot = first_slot + k;
      const bool channel = slot % 4 < 3 && tap < kTaps;
      return channel ? weight[(out * Conv2::kIn + slot / 4 * 3 + slot % 4) * kTaps + tap] : T{0};
    });
  }
}

// Where in what is kept something lies, if it is kept.
template <bool kKeep, typename T>
LX_DEVICE T* kept_at(T* begin, int64_t offset) {
  return kKeep ? begin + offset : nullptr;
}

// The i-th of some pooled values as it is kept, `words` of which are the operands: in TF32 it has not been rounded.
template <typename T, int N>
LX_DEVICE T kept_value(const Pack<uint32_t, N>& words, const float* values, int i) {
  if constexpr (lx::Operand<T>::kPerWord == 1) {
    return lx::max_or_nan(values[i], 0.0f);
  } else {
    return {static_cast<uint16_t>(i % 2 == 0 ? words[i / 2] : words[i / 2] >> 16)};
  }
}

// A load that the compiler neither merges with its neighbour nor takes from an earlier one.
LX_DEVICE uint32_t load_word(const unsigned char* from) { return *reinterpret_cast<const volatile uint32_t*>(from); }

// A pooling window's largest value, with its bias, and its winner.
LX_DEVICE float pooled_value(float v0, float v1, float v2, float v3, float bias) {
  return largest_of(v0, v1, v2, v3) + bias;
}
template <bool kNan>
LX_DEVICE uint8_t winner_code(float v0, float v1, float v2, float v3, float pooled) {
  const int position = position_of<kNan>(largest_of(v0, v1, v2, v3), v0, v1, v2, v3);
  return pooled <= 0 ? kDead : static_cast<uint8_t>(position);
}

// A warp computes conv1 of one image value by value. pooled: of this image; kept, codes: too, in global memory, with
// kKeep.
template <bool kKeep, typename T>
__device__ __forceinline__ void convolve1_without_zeros(const T* pixels, const T* weight, const T* bias,
                                                        unsigned char* pooled, T* kept, uint8_t* codes) {
  using L = Lean<T>;
  constexpr int kInVector = 4 * L::kPerWord;
#pragma unroll 1
  for (int item = threadIdx.x % 32; item < Conv1::kPooled; item += 32) {
    const int channel = item / Conv1::kWindows, y = item % Conv1::kWindows / Conv1::kPool, x = item % Conv1::kPool;
    Winner<float> winner;
#pragma unroll 1
    for (int position = 0; position < 4; ++position) {
      float sum = 0;
#pragma unroll 1
      for (int tap = 0; tap < kTaps; ++tap) {
        const int row = 2 * y + position / 2 + tap / kTap, column = 2 * x + position % 2 + tap % kTap;
        sum +=
            lx::widen(pixels[row * Conv1::kSize + column]) * lx::widen(lx::to_operand(weight[channel * kTaps + tap]));
      }
      winner.consider(sum, position);
    }
    winner.best += lx::widen(bias[channel]);
    const T value = lx::narrow<T>(winner.pooled());
    const int slot = slot_of(channel);
    unsigned char* const to = pooled + slot / kInVector * L::kPlane + L::Pixels::at(y, x) * kVectorBytes;
    reinterpret_cast<T*>(to)[slot % kInVector] = lx::to_operand(value);
    if constexpr (kKeep) kept[item] = value, codes[item] = winner.code();
  }
}

// conv1 of some images of the pass, those of this warp. Rows of the product are the 8 patches of two rows of windows,
// of which the 8th is behind the end of the row: its values go to pixels that nobody reads, where there are such. kept,
// codes: of the pass, in global memory.
template <bool kKeep, typename T>
__device__ __forceinline__ void lean_conv1(const unsigned char* pixels, const uint32_t* matrices, int present,
                                           const T* weight, const T* bias, unsigned char* pooled, T* kept,
                                           uint8_t* codes) {
  using L = Lean<T>;
  using Pixels = typename L::Pixels;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  // Where a lane's words of a step begin. Patches are 4 columns apart, in TF32 a row of an operand's matrix, of which a
  // lane names one: rows 0 and 1 of windows, of the step's first four pixels, then of the others.
  const int corner = L::kPerWord == 2
                         ? g * 8 + t / 2 * L::kRowBytes + t % 2 * 8
                         : lane % 8 * kVectorBytes + lane / 8 % 2 * 2 * L::kRowBytes + lane / 16 * kVectorBytes;
  auto load = [](uint32_t (&a)[4], const unsigned char* at) {
    if constexpr (L::kPerWord == 1) {
      lx::load_matrices(a, reinterpret_cast<const uint32_t*>(at));
    } else {
      a[0] = load_word(at), a[1] = load_word(at + 2 * L::kRowBytes);
      a[2] = load_word(at + 4), a[3] = load_word(at + 2 * L::kRowBytes + 4);
    }
  };
  uint32_t b[(L::kMatrices1 + 1) / 2 * 2][2];
#pragma unroll
  for (int i = 0; i < (L::kMatrices1 + 1) / 2; ++i) {
    const Pack<uint32_t, 4> pair = lx::load_pack<4>(matrices + (i * 32 + lane) * 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) b[2 * i + k / 2][k % 2] = pair[k];
  }
  float biases[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) biases[c] = lx::widen(bias[3 * (t / 2) + c]);
#pragma unroll 1
  for (int image = L::kImagesOfWarp * warp; image < L::kImagesOfWarp * (warp + 1); ++image) {
    if (image >= present) break;  // of the whole warp
    const unsigned char* const in = pixels + image * L::kImageBytes + corner;
    unsigned char* const out = pooled + (image * Pixels::kImage + t % 2 * Pixels::kOddColumn + g) * kVectorBytes +
                               t / 2 * (L::kPerWord == 2 ? kVectorBytes / 2 : L::kPlane);
    float largest = 0;
#pragma unroll 1
    for (int rows = 0; rows < Conv1::kPool / 2; ++rows) {
      float sums[L::kTiles1][4];
#pragma unroll
      for (int step = 0; step < L::kSteps1; ++step) {
        uint32_t a[4];
        load(a, in + (rows * 4 + step * L::kPerWord) * L::kRowBytes);
#pragma unroll
        for (int tile = 0; tile < L::kTiles1; ++tile) {
          const int matrix = L::matrix1(step, tile);
          if (matrix < 0) continue;
          if (step == 0 || L::matrix1(step - 1, tile) < 0) {
            lx::multiply<T>(sums[tile], a, b[matrix][0], b[matrix][1]);
          } else {
            lx::multiply_accumulate<T>(sums[tile], a, b[matrix][0], b[matrix][1]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[4] = {};
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          v[c] = pooled_value(sums[c][2 * half], sums[c][2 * half + 1], sums[3 + c][2 * half],
                              sums[3 + c][2 * half + 1], biases[c]);
        }
        largest = lx::max_or_nan(lx::max_or_nan(largest, v[0]), lx::max_or_nan(v[1], v[2]));
        const auto words = lx::rounded<T, true>(v);
        if (Pixels::kSpare || g < Conv1::kPool / 2) {
          *reinterpret_cast<lx::Operands<T, 4>*>(out + (rows * Pixels::kRowPair + half * Pixels::kOddRow) *
                                                           kVectorBytes) = words;
        }
        if constexpr (kKeep) {
          if (g == Conv1::kPool / 2) continue;
#pragma unroll
          for (int c = 0; c < 3; ++c) {
            const int at = image * Conv1::kPooled + (3 * (t / 2) + c) * Conv1::kWindows +
                           (2 * rows + half) * Conv1::kPool + 2 * g + t % 2;
            kept[at] = kept_value<T>(words, v, c);
            // With NaN the whole image is computed anew.
            codes[at] = winner_code<false>(sums[c][2 * half], sums[c][2 * half + 1], sums[3 + c][2 * half],
                                           sums[3 + c][2 * half + 1], v[c]);
          }
        }
      }
    }
    // The band's zeros make NaN of values that do not see an infinite or NaN pixel of their patch. No sum of finite
    // values is NaN, unless infinities meet in it, so that an image without NaN is right.
    const float sum = lx::warp_sum(g < 7 ? largest : 0.0f);
    if (lx::is_nan(sum)) {
      __syncwarp();
      convolve1_without_zeros<kKeep>(reinterpret_cast<const T*>(pixels + image * L::kImageBytes), weight, bias,
                                     pooled + image * Pixels::kImage * kVectorBytes,
                                     kept_at<kKeep>(kept, image * Conv1::kPooled),
                                     kept_at<kKeep>(codes, image * Conv1::kPooled));
    }
  }
}

// conv2 of all images of the pass, whose channels go to `features`: in the layout of pooled2 with kKeep, then with
// their codes, and in TF32.
//
// warp -> 8 windows at a time. Rows g and g + 8 of a product are window g at dy = 0 and 1.
template <bool kKeep, typename T>
__device__ __forceinline__ void lean_conv2(const unsigned char* pooled, const uint32_t* matrix, const uint32_t* corners,
                                           int present, const T* bias, T* features, uint8_t* codes) {
  using L = Lean<T>;
  using Pixels = typename L::Pixels;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  uint32_t b[L::kSteps2][4];
  auto load_weights = [&](int step) {
    const Pack<uint32_t, 4> words = lx::load_pack<4>(matrix + (step * 32 + lane) * 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) b[step][k] = words[k];
  };
  if constexpr (L::kResident) {
#pragma unroll
    for (int step = 0; step < L::kSteps2; ++step) load_weights(step);
  }
  float biases[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) biases[c] = lx::widen(bias[c / 2 * 8 + 2 * t + c % 2]);
  // A lane names a row of one of the operand's four matrices: dy = 0 and 1 of the first tap, then of the second one, or
  // in TF32 of the first channels, then of the others.
  const int dy = lane / 8 % 2, second = lane / 16;
  int rows_apart[2];  // of an even row of taps, of an odd one
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    rows_apart[odd] = L::kPerWord == 2 ? Pixels::at(dy + second, 0) * kVectorBytes
                                       : Pixels::at(dy + odd, 0) * kVectorBytes + second * L::kPlane;
  }
  T* const to = features + g * 16 + 4 * t;
#pragma unroll 1
  for (int trip = warp; trip < L::kImages * Conv2::kWindows / 8; trip += kWarps) {
    const unsigned char* const corner = pooled + corners[trip * 8 + lane % 8];
    float sums[2][2][4];  // [dx][tile]
    auto load = [](uint32_t (&a)[4], const unsigned char* row) {
      lx::load_matrices(a, reinterpret_cast<const uint32_t*>(row));
    };
    auto add = [&](int step, int dx, const uint32_t (&a)[4]) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        if (step == 0) {
          lx::multiply<T>(sums[dx][tile], a, b[step][2 * tile], b[step][2 * tile + 1]);
        } else {
          lx::multiply_accumulate<T>(sums[dx][tile], a, b[step][2 * tile], b[step][2 * tile + 1]);
        }
      }
    };
#pragma unroll
    for (int row = 0; row < L::kRowSteps; ++row) {
      const int pair = L::kPerWord == 2 ? row : row / 2, odd = L::kPerWord == 2 ? 0 : row % 2;
#pragma unroll
      for (int column = 0; column <= kTap; ++column) {
        if (!L::kResident && column < kTap) load_weights(row * kTap + column);
        uint32_t a[4];
        load(a, corner + rows_apart[odd] + (pair * Pixels::kRowPair + Pixels::at(0, column)) * kVectorBytes);
        if (column < kTap) add(row * kTap + column, 0, a);
        if (column > 0) add(row * kTap + column - 1, 1, a);
      }
    }
    if constexpr (L::kPerWord == 2) {
      const int columns_apart = (2 * Pixels::kRowPair + dy * Pixels::kOddRow + second) * kVectorBytes;
      const int alone = (2 * Pixels::kRowPair + dy * Pixels::kOddRow) * kVectorBytes;
#pragma unroll
      for (int column = 0; column < 3; ++column) {
        uint32_t a[4];
        load(a, corner + columns_apart + Pixels::at(0, column) * kVectorBytes);
        if (column < 2) add(10 + column, 0, a);
        if (column > 0) add(9 + column, 1, a);
      }
#pragma unroll
      for (int dx = 0; dx < 2; ++dx) {
        uint32_t a[4];
        load(a, second == 0 ? corner + alone + Pixels::at(0, 4 + dx) * kVectorBytes
                            : pooled + Pixels::kUnused * kVectorBytes);
        add(12, dx, a);
      }
    }
    float v[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int tile = c / 2, k = c % 2;
      v[c] = pooled_value(sums[0][tile][k], sums[1][tile][k], sums[0][tile][2 + k], sums[1][tile][2 + k], biases[c]);
    }
    if (trip * 8 + g >= present * Conv2::kWindows) continue;
    const auto words = lx::rounded<T, true>(v);
    if constexpr (kKeep || L::kPerWord == 1) {
      const int window = trip * 8 + g;
      const int first = window / Conv2::kWindows * Conv2::kPooled + 2 * t * Conv2::kWindows + window % Conv2::kWindows;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int tile = c / 2, k = c % 2, at = first + (8 * tile + k) * Conv2::kWindows;
        features[at] = kept_value<T>(words, v, c);
        if constexpr (kKeep) {
          codes[at] =
              winner_code<true>(sums[0][tile][k], sums[1][tile][k], sums[0][tile][2 + k], sums[1][tile][2 + k], v[c]);
        }
      }
    } else {
      *reinterpret_cast<lx::Operands<T, 4>*>(to + trip * 128) = words;
    }
  }
}

// block -> 16 images at a time, in TF32 8, until the batch is done; while conv2 computes, the next ones' pixels arrive.
// Shared memory: 111 KB, in TF32 102 KB, two blocks a multiprocessor.
//
// features: [image][window][16], of which thread t of a window has the channels 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t, at 4
// t; with kKeep and in TF32 it is pooled2.
template <typename T, bool kKeep>
__global__ void __launch_bounds__(kThreads, 2) lenet_lean_convolutions_kernel(LenetForwardOf<T> call, T* features) {
  using L = Lean<T>;
  LX_SMEM(shared);
  unsigned char* const pixels = lx::take<unsigned char>(shared, L::kImages * L::kImageBytes + kVectorBytes);
  unsigned char* const pooled = lx::take<unsigned char>(shared, L::kPooledBytes);
  uint32_t* const matrix1 = lx::take<uint32_t>(shared, L::kMatrix1Words);
  uint32_t* const matrix2 = lx::take<uint32_t>(shared, L::kMatrix2Words);
  uint32_t* const corners = lx::take<uint32_t>(shared, L::kImages * Conv2::kWindows);  // in bytes
  const int batch = static_cast<int>(call.batch);                                      // 2^31 images would be 4 TB

  // What this thread copies: touch(place) for each 16 bytes of the images from `first` on.
  auto for_each_vector = [&](int first, auto touch) {
    const int bytes = (batch - first < L::kImages ? batch - first : L::kImages) * L::kImageBytes;
#pragma unroll
    for (int k = 0; k < L::kImages * L::kImageBytes / kVectorBytes / static_cast<int>(kThreads); ++k) {
      const int at = (threadIdx.x + k * kThreads) * kVectorBytes;
      if (at < bytes) touch(at);
    }
  };
  auto fetch = [&](int first) {
    const unsigned char* from = reinterpret_cast<const unsigned char*>(call.input + int64_t{first} * Conv1::kImage);
    for_each_vector(first, [&](int at) { lx::copy_async<kVectorBytes>(pixels + at, from + at); });
    lx::end_copy_group();
  };
  const int stride = gridDim.x * L::kImages;
  int first = blockIdx.x * L::kImages;
  fetch(first);
  prepare_lean_conv1(matrix1, call.parameters[0]);
  prepare_lean_conv2(matrix2, call.parameters[2]);
  for (int w = threadIdx.x; w < L::kImages * Conv2::kWindows; w += kThreads) {
    const int image = w / Conv2::kWindows, y = w % Conv2::kWindows / Conv2::kPool, x = w % Conv2::kPool;
    corners[w] = (image * L::Pixels::kImage + L::Pixels::at(2 * y, 2 * x)) * kVectorBytes;
  }
  lx::fill_shared(reinterpret_cast<uint32_t*>(pooled), L::kPooledBytes / 4, 0u);
  // The last patch of the last image sees what is behind it.
  if (threadIdx.x < kVectorBytes / 4) {
    reinterpret_cast<uint32_t*>(pixels + L::kImages * L::kImageBytes)[threadIdx.x] = 0;
  }
#pragma unroll 1
  for (; first < batch; first += stride) {
    const int present = batch - first < L::kImages ? batch - first : L::kImages;
    lx::wait_for_copies<0>();
    if constexpr (L::kPerWord == 1) {
      for_each_vector(first, [&](int at) {
        Pack<uint32_t, 4>* const vector = reinterpret_cast<Pack<uint32_t, 4>*>(pixels + at);
        Pack<uint32_t, 4> words = *vector;
        for (uint32_t& word : words.values) word = lx::operand_word<T>(word);
        *vector = words;
      });
    }
    __syncthreads();
    lean_conv1<kKeep>(pixels, matrix1, present, call.parameters[0], call.parameters[1], pooled,
                      kept_at<kKeep>(call.pooled1, int64_t{first} * Conv1::kPooled),
                      kept_at<kKeep>(call.indices1, int64_t{first} * Conv1::kPooled));
    __syncthreads();
    if (first + stride < batch) fetch(first + stride);
    lean_conv2<kKeep>(pooled, matrix2, corners, present, call.parameters[3], features + int64_t{first} * kFeatures,
                      kept_at<kKeep>(call.indices2, int64_t{first} * kFeatures));
  }
}

// ------------------------------------------------------------------------------------------------- the linear layers

constexpr int kLinearWarps = 16;
constexpr unsigned kLinearThreads = kLinearWarps * 32;
constexpr int kRows = 16;    // images of a warp
constexpr int kAhead = 5;    // steps of fc1 whose operands are loaded at once
constexpr int kColumns = 8;  // of a tile

constexpr int steps_of(int depth) { return (depth + 15) / 16; }
constexpr int tiles_of(int outputs) { return (outputs + kColumns - 1) / kColumns; }
constexpr int kFc1Steps = Conv2::kWindows, kFc2Steps = steps_of(kHidden1), kFc3Steps = steps_of(kHidden2);
constexpr int kFc1Tiles = tiles_of(kHidden1), kFc2Tiles = tiles_of(kHidden2);
static_assert(kFc1Steps * 16 == kFeatures && kFc1Steps % kAhead == 0 && kHidden1 % kColumns == 0);
constexpr int kMostClasses = 128;

LX_DEVICE constexpr int matrix_words(int steps, int tiles) { return steps * tiles * 64; }
constexpr int kFc1Words = matrix_words(kFc1Steps, kFc1Tiles), kFc2Words = matrix_words(kFc2Steps, kFc2Tiles);
constexpr int kFc3Bias = (kFc1Tiles + kFc2Tiles) * kColumns;  // where it begins among the biases

int64_t linears_shared(int64_t classes) {
  const int tiles = tiles_of(static_cast<int>(classes));
  return lx::taken<uint32_t>(kFc1Words) + lx::taken<uint32_t>(kFc2Words) +
         lx::taken<uint32_t>(matrix_words(kFc3Steps, tiles)) + lx::taken<float>(kFc3Bias + tiles * kColumns);
}

// The block writes a layer's weights as [tile][step][lane][2], with zeros where there are none. in_order(k): which
// input element k of the depth is.
template <typename T, typename Order>
__device__ __forceinline__ void prepare_linear(uint32_t* to, const T* weight, int outputs, int depth, int steps,
                                               Order in_order) {
  const int words = matrix_words(steps, (outputs + kColumns - 1) / kColumns);
  for (int at = threadIdx.x; at < words; at += kLinearThreads) {
    const int lane = at / 2 % 32, out = at / 64 / steps * kColumns + lane / 4;
    const int first = at / 64 % steps * 16 + at % 2 * 8 + lane % 4 * 2;
    to[at] = lx::operand_word<T>([&](int i) {
      const int k = first + i;
      return out < outputs && k < depth ? weight[out * depth + in_order(k)] : T{0};
    });
  }
}
template <typename T>
__device__ __forceinline__ void prepare_biases(float* to, const T* bias, int outputs) {
  const int columns = (outputs + kColumns - 1) / kColumns * kColumns;
  for (int i = threadIdx.x; i < columns; i += kLinearThreads) to[i] = i < outputs ? lx::widen(bias[i]) : 0.0f;
}

// sums = a tile's product over all of a layer's depth. matrix: of the tile.
template <typename T, int kSteps>
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const uint32_t (&in)[kSteps][4],
                                              const uint32_t* matrix) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const Pack<uint32_t, 2> b = lx::load_pack<2>(matrix + (step * 32 + threadIdx.x % 32) * 2);
    if (step == 0) {
      lx::multiply<T>(sums, in[step], b[0], b[1]);
    } else {
      lx::multiply_accumulate<T>(sums, in[step], b[0], b[1]);
    }
  }
}

// Where among the features, as lean_conv2 leaves them, element k of fc1's depth is: a lane's operand in a step of 16 is
// two words that lie next to each other.
template <bool kKeep>
LX_DEVICE int feature_at(int k) {
  if (!kKeep) return k % 16 * Conv2::kWindows + k / 16;  // a step is a window, its depth the 16 channels
  const int word = k % 16 / 2;
  return k / 16 * 16 + (word % 4 * 2 + word / 4) * 2 + k % 2;
}

// warp -> 16 images at a time, whose hidden layers never leave its registers, but to be kept. Shared memory: 120 KB
// with 10 classes, 142 KB with 128, one block a multiprocessor.
template <typename T, bool kKeep>
__global__ void __launch_bounds__(kLinearThreads, 1)
    lenet_lean_linears_kernel(LenetForwardOf<T> call, const T* features) {
  const int classes = static_cast<int>(call.classes), fc3_tiles = (classes + kColumns - 1) / kColumns;
  LX_SMEM(shared);
  uint32_t* const fc1 = lx::take<uint32_t>(shared, kFc1Words);
  uint32_t* const fc2 = lx::take<uint32_t>(shared, kFc2Words);
  uint32_t* const fc3 = lx::take<uint32_t>(shared, matrix_words(kFc3Steps, fc3_tiles));
  float* const biases = lx::take<float>(shared, kFc3Bias + fc3_tiles * kColumns);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int batch = static_cast<int>(call.batch);

  prepare_linear(fc1, call.parameters[4], kHidden1, kFeatures, kFc1Steps, feature_at<kKeep>);
  prepare_linear(fc2, call.parameters[6], kHidden2, kHidden1, kFc2Steps, [](int k) { return k; });
  prepare_linear(fc3, call.parameters[8], classes, kHidden2, kFc3Steps, [](int k) { return k; });
  prepare_biases(biases, call.parameters[5], kHidden1);
  prepare_biases(biases + kFc1Tiles * kColumns, call.parameters[7], kHidden2);
  prepare_biases(biases + kFc3Bias, call.parameters[9], classes);
  __syncthreads();

  // Neighbouring warps of a small batch are in different blocks, so that all multiprocessors have work.
  const int stride = gridDim.x * kLinearWarps * kRows;
#pragma unroll 1
  for (int first = (threadIdx.x / 32 * gridDim.x + blockIdx.x) * kRows; first < batch; first += stride) {
    const uint32_t* rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int image = first + 8 * half + g < batch ? first + 8 * half + g : batch - 1;
      rows[half] = reinterpret_cast<const uint32_t*>(features + int64_t{image} * kFeatures) + 2 * t;
    }
    const uint32_t* weights = fc1 + lane * 2;
    float sums1[kFc1Tiles][4] = {};
#pragma unroll 1
    for (int step = 0; step < kFc1Steps; step += kAhead) {
      uint32_t a[kAhead][4];
#pragma unroll
      for (int i = 0; i < kAhead * 4; ++i) a[i / 4][i % 4] = rows[i % 2][i / 4 * 8 + i / 2 % 2];
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
#pragma unroll
        for (int tile = 0; tile < kFc1Tiles; ++tile) {
          const Pack<uint32_t, 2> b = lx::load_pack<2>(weights + (tile * kFc1Steps + s) * 64);
          lx::multiply_accumulate<T>(sums1[tile], a[s], b[0], b[1]);
        }
      }
      weights += kAhead * 64;
      rows[0] += kAhead * 8, rows[1] += kAhead * 8;
    }
    // A tile of results is half of a step's operand in the next layer.
    auto activate = [&](uint32_t (&to)[4], int tile, const float (&sums)[4], const float* bias) {
      const Pack<float, 2> offset = lx::load_pack<2>(bias + tile * kColumns + 2 * t);
      to[tile % 2 * 2] = lx::rounded_word<T, true>(sums[0] + offset[0], sums[1] + offset[1]);
      to[tile % 2 * 2 + 1] = lx::rounded_word<T, true>(sums[2] + offset[0], sums[3] + offset[1]);
    };
    // The tile's values of layer `width` wide, where the backward pass finds them.
    auto keep = [&](T* kept, int width, int tile, const uint32_t (&words)[4]) {
      if constexpr (kKeep) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int image = first + 8 * half + g, column = tile * kColumns + 2 * t;
          if (image >= batch || column >= width) continue;
          *reinterpret_cast<uint32_t*>(kept + int64_t{image} * width + column) = words[tile % 2 * 2 + half];
        }
      }
    };
    uint32_t hidden1[kFc2Steps][4], hidden2[kFc3Steps][4];
    hidden1[kFc2Steps - 1][2] = hidden1[kFc2Steps - 1][3] = 0;
    hidden2[kFc3Steps - 1][2] = hidden2[kFc3Steps - 1][3] = 0;
#pragma unroll
    for (int tile = 0; tile < kFc1Tiles; ++tile) {
      activate(hidden1[tile / 2], tile, sums1[tile], biases);
      keep(call.hidden1, kHidden1, tile, hidden1[tile / 2]);
    }
#pragma unroll
    for (int tile = 0; tile < kFc2Tiles; ++tile) {
      float sums[4];
      multiply_tile<T>(sums, hidden1, fc2 + matrix_words(kFc2Steps, tile));
      activate(hidden2[tile / 2], tile, sums, biases + kFc1Tiles * kColumns);
      keep(call.hidden2, kHidden2, tile, hidden2[tile / 2]);
    }
    // There are no weights behind the last output, but infinity times zero is NaN.
    static_assert(kHidden2 % kColumns == 4 && kFc2Tiles % 2 == 1);
    if (t >= 2) hidden2[kFc3Steps - 1][0] = hidden2[kFc3Steps - 1][1] = 0;
#pragma unroll 1
    for (int tile = 0; tile < fc3_tiles; ++tile) {
      float sums[4];
      multiply_tile<T>(sums, hidden2, fc3 + matrix_words(kFc3Steps, tile));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int image = first + i / 2 * 8 + g, column = tile * kColumns + 2 * t + i % 2;
        if (image >= batch || column >= classes) continue;
        call.output[int64_t{image} * classes + column] = lx::narrow<T>(sums[i] + biases[kFc3Bias + column]);
      }
    }
  }
}

template <typename T, bool kKeep>
void convolutions(LaunchResult& result, const LenetForwardOf<T>& call, void* features, unsigned most_blocks,
                  cudaStream_t stream) {
  lx::launch(result, "lenet_lean_convolutions_kernel", lenet_lean_convolutions_kernel<T, kKeep>,
             std::min(most_blocks, lx::grid_for(call.batch, Lean<T>::kImages)), kThreads, Lean<T>::shared_bytes(),
             stream, call, static_cast<T*>(features));
}

template <typename T, bool kKeep>
LaunchResult forward(const LenetForwardOf<void>& call, void* features, cudaStream_t stream) {
  LaunchResult result;
  if (call.batch == 0) return result;
  const LenetForwardOf<T> of = typed<T>(call);
  const unsigned most_blocks = blocks_at_once(result, call.batch, 1);  // two for each multiprocessor
  convolutions<T, kKeep>(result, of, features, most_blocks, stream);
  lx::launch(result, "lenet_lean_linears_kernel", lenet_lean_linears_kernel<T, kKeep>,
             std::min((most_blocks + 1) / 2, lx::grid_for(call.batch, kRows)), kLinearThreads,
             linears_shared(call.classes), stream, of, static_cast<const T*>(features));
  return result;
}

template <typename T>
LaunchResult forward(const LenetForwardOf<void>& call, void* features, cudaStream_t stream) {
  return call.pooled1 == nullptr ? forward<T, false>(call, features, stream)
                                 : forward<T, true>(call, call.pooled2, stream);
}

}  // namespace

bool has_lenet_lean_forward(DType dtype, int64_t channels, int64_t classes) {
  if (dtype != DType::kFloat16 && dtype != DType::kBFloat16) return false;
  if (channels != Conv1::kIn || classes < 1 || classes > kMostClasses) return false;
  return lx::has_tensor_cores(lenet_lean_linears_kernel<lx::bf16, false>) &&
         lx::fits_shared_memory(linears_shared(classes)) && lx::fits_shared_memory(Lean<lx::bf16>::shared_bytes());
}

LaunchResult launch_lenet_lean_forward(DType dtype, const LenetForwardOf<void>& call, void* features,
                                       cudaStream_t stream) {
  return dtype == DType::kFloat16 ? forward<lx::f16>(call, features, stream)
                                  : forward<lx::bf16>(call, features, stream);
}

bool has_lenet_lean_convolutions(DType dtype, int64_t channels) {
  return dtype == DType::kFloat32 && channels == Conv1::kIn &&
         lx::has_tensor_cores(lenet_lean_convolutions_kernel<float, false>) &&
         lx::fits_shared_memory(Lean<float>::shared_bytes());
}

LaunchResult launch_lenet_lean_convolutions(const LenetForward& call, cudaStream_t stream) {
  LaunchResult result;
  if (call.batch == 0) return result;
  const unsigned most_blocks = blocks_at_once(result, call.batch, 1);
  if (call.pooled1 == nullptr) {
    convolutions<float, false>(result, call, call.pooled2, most_blocks, stream);
  } else {
    convolutions<float, true>(result, call, call.pooled2, most_blocks, stream);
  }
  return result;
}

}  // namespace lenet_ext::cuda
