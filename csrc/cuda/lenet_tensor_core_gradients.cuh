// The gradients of LeNet's convolutions in float16 and bfloat16 on the tensor cores, cut into what a block of four
// warps does with two images in shared memory.
//
// Dense products, although three quarters of what they multiply by are zeros: for the gradient of conv2's input in
// 16384 images 7.9 GFLOP, 20 us at the rate of the product of large matrices on an H100, where the kernel on the
// ordinary units took 480. What makes them lean:
//   - The gradient of conv2's output is made dense once, for both of conv2's gradients, as four planes by the parities
//     of the position, so that a window is one place in each of them: its value in one, zeros in the others.
//   - The product for conv2's input has patches of 2 x 2 positions as rows. The tiles of their four positions share
//     every operand, and a tap's weights, which stay in registers, serve all four.
//   - A lane that has the gradient of a pooled value writes it at once, with three zeros, to where it is an operand of
//     conv1's gradient: nothing passes through global memory between the layers.
//   - A one in an empty slot beside conv1's output makes the bias's gradient a tap's column; a row of ones does for
//     conv1.
//   - What is stored with the channels together is loaded transposed where the depth of a product is positions.
//   - Winners are bits, of which a shift, an and, and a multiplication make the mask of two values.
#pragma once

#include "lenet_pixels.cuh"
#include "tensor_core.cuh"

namespace lenet_ext::cuda {

using lx::Pack;

constexpr int kGradientImages = 2;  // of a pass
constexpr int kGradientWarps = 4;
constexpr unsigned kGradientThreads = 32 * kGradientWarps;
constexpr int kPassWindows = kGradientImages * Conv2::kWindows;  // of conv2

// The images twice, the second time from their fifth column on, so that the patches of conv1, four columns apart, begin
// at multiples of 16 bytes. Behind the columns of a row there are zeros.
constexpr int kPixelRow = 96, kPixelCopy = Conv1::kSize * kPixelRow, kPixelImage = 2 * kPixelCopy;  // in bytes
constexpr int kZeroPixels = 64;                                                                     // where they begin

// The gradient of conv2's output: [plane, by the parities of row and column][half of the channels][window], 16 bytes a
// window; around the 5 x 5 windows of an image lie two of zeros. Rows are 7 and images 1 modulo 8 windows apart, so
// that 8 neighbouring patches come from different banks.
constexpr int kGridRow = 15, kGridImage = 137, kGridHalf = kGradientImages * kGridImage * 16;  // windows; bytes
constexpr int kGridPlane = 2 * kGridHalf, kGridBytes = 4 * kGridPlane;
constexpr int kGridRim = 2;
LX_DEVICE constexpr int grid_plane(int dy, int dx) { return (dy * 2 + dx) * kGridPlane; }

// The gradient of conv1's output: [patch of 2 x 4 positions][2 windows][4 positions][6 channels]; the last patch is
// none, and zero.
constexpr int kPatchesOfImage = Conv1::kPool * Conv1::kPool / 2, kPatchBytes = 112, kPatchWindowBytes = 48;
constexpr int kNoPatch = kGradientImages * kPatchesOfImage, kPatchRows = 6, kPatchPixels = 8, kPatchPlaces = 48;
static_assert(kPatchWindowBytes == 4 * Conv1::kOut * 2 && kPatchBytes >= 2 * kPatchWindowBytes);
// The depth of its product with the pixels: the patches in even places of their row (4 of them), then those in odd
// ones (3, which are in the second copy of the pixels), by 16.
constexpr int kEvenDepth = kGradientImages * Conv1::kPool * 4, kOddDepth = kGradientImages * Conv1::kPool * 3;
constexpr int kDepthSteps = kEvenDepth / 16 + (kOddDepth + 15) / 16;
static_assert(kEvenDepth % 16 == 0);

// The winners of conv1's windows, a bit for each position: [pair of channels][image][window][2].
constexpr int kWinnerPair = 800;  // bytes; 8 modulo 32 words, so that a warp's lanes read from different banks
static_assert(kWinnerPair >= kGradientImages * Conv1::kWindows * 2 && kWinnerPair / 4 % 32 == 8);

constexpr int kInputPatches = kGradientImages * Conv2::kSize * Conv2::kSize / 4;  // of 2 x 2 positions in conv2's input
constexpr int kInputTiles = (kInputPatches + 15) / 16;
constexpr int kTapsOfWarp = 7;  // of conv2's weight gradient: 7, 6, 6, 6
static_assert(kTapsOfWarp + (kGradientWarps - 1) * (kTapsOfWarp - 1) == kTaps);

// In place of pixels that a product of conv2's weight gradient has no window for.
constexpr int kNoPixels = pixel_at(kTap, kTap) + 1;

// What a pass has in shared memory, and tables of where things lie in it, in bytes.
struct GradientPass {
  unsigned char *pixels, *pooled, *grid, *patches, *winners;
  uint32_t* pooled_places;  // [image, window of conv1]: in `pooled`
  uint32_t* windows;        // [image, window of conv2][2]: in `pooled`, in `grid`; behind the last: zeros in both
  uint32_t* input_patches;  // [image, patch]: its first window of conv1; conv1's patch there in the upper half
  uint32_t* depths;         // [step][16]: in `patches`; in `pixels` in the upper half

  static constexpr int kWindowRows = (kPassWindows + 7) / 8 * 8;

  LX_DEVICE explicit GradientPass(unsigned char* shared) {
    pixels = lx::take<unsigned char>(shared, kGradientImages * kPixelImage);
    pooled = lx::take<unsigned char>(shared, (kGradientImages * kImagePixels + kNoPixels) * kPixelBytes);
    grid = lx::take<unsigned char>(shared, kGridBytes);
    patches = lx::take<unsigned char>(shared, (kNoPatch + 1) * kPatchBytes);
    winners = lx::take<unsigned char>(shared, Conv1::kOut / 2 * kWinnerPair);
    pooled_places = lx::take<uint32_t>(shared, kGradientImages * Conv1::kWindows);
    windows = lx::take<uint32_t>(shared, kWindowRows * 2);
    input_patches = lx::take<uint32_t>(shared, kInputTiles * 16);
    depths = lx::take<uint32_t>(shared, kDepthSteps * 16);
  }
  static constexpr int64_t shared_bytes() {
    return lx::taken<unsigned char>(kGradientImages * kPixelImage) +
           lx::taken<unsigned char>((kGradientImages * kImagePixels + kNoPixels) * kPixelBytes) +
           lx::taken<unsigned char>(kGridBytes) + lx::taken<unsigned char>((kNoPatch + 1) * kPatchBytes) +
           lx::taken<unsigned char>(Conv1::kOut / 2 * kWinnerPair) +
           lx::taken<uint32_t>(kGradientImages * Conv1::kWindows) + lx::taken<uint32_t>(kWindowRows * 2) +
           lx::taken<uint32_t>(kInputTiles * 16) + lx::taken<uint32_t>(kDepthSteps * 16);
  }

  // The block writes the tables, and zeros everywhere else.
  LX_DEVICE void prepare() const {
    const int bytes = static_cast<int>(winners + Conv1::kOut / 2 * kWinnerPair - pixels);
    for (int i = threadIdx.x; i < bytes / 4; i += kGradientThreads) reinterpret_cast<uint32_t*>(pixels)[i] = 0;
    for (int i = threadIdx.x; i < kGradientImages * Conv1::kWindows; i += kGradientThreads) {
      const int image = i / Conv1::kWindows, y = i % Conv1::kWindows / Conv1::kPool, x = i % Conv1::kPool;
      pooled_places[i] = (image * kImagePixels + pixel_at(y, x)) * kPixelBytes;
    }
    for (int i = threadIdx.x; i < kWindowRows; i += kGradientThreads) {
      const int image = i / Conv2::kWindows, y = i % Conv2::kWindows / Conv2::kPool, x = i % Conv2::kPool;
      const bool none = i >= kPassWindows;
      windows[2 * i] = (none ? kGradientImages * kImagePixels : image * kImagePixels + pixel_at(2 * y, 2 * x)) * 16;
      windows[2 * i + 1] = none ? 0 : (image * kGridImage + (y + kGridRim) * kGridRow + x + kGridRim) * 16;
    }
    for (int i = threadIdx.x; i < kInputTiles * 16; i += kGradientThreads) {
      constexpr int kRow = Conv2::kSize / 2, kOfImage = kRow * kRow;
      const int p = i < kInputPatches ? i : kInputPatches - 1, image = p / kOfImage, y = p % kOfImage / kRow,
                x = p % kRow;
      input_patches[i] = (image * Conv1::kWindows + y * 2 * Conv1::kPool + x * 2) |
                         static_cast<uint32_t>(image * kPatchesOfImage + y * 2 * kRow + x) << 16;
    }
    for (int i = threadIdx.x; i < kDepthSteps * 16; i += kGradientThreads) {
      const bool even = i < kEvenDepth;
      const int k = even ? i : i - kEvenDepth, in_row = even ? 4 : 3, of_image = Conv1::kPool * in_row;
      const int image = k / of_image, y = k % of_image / in_row, x = k % in_row;
      const bool none = image >= kGradientImages;
      const int patch = none ? kNoPatch : image * kPatchesOfImage + y * (Conv1::kPool / 2) + 2 * x + (even ? 0 : 1);
      const int from = none ? kZeroPixels : image * kPixelImage + (even ? 0 : kPixelCopy) + 2 * y * kPixelRow + x * 16;
      depths[i] = patch * kPatchBytes | static_cast<uint32_t>(from) << 16;
    }
  }
};

// Two winner bytes, the `which`-th of a word, as the lower bytes of two halves; and the mask of those that won
// `position`.
LX_DEVICE uint32_t spread(uint32_t bytes, int which) {
  return lx::permute_bytes(bytes, 0, which == 0 ? 0x4140u : 0x4342u);
}
LX_DEVICE uint32_t mask_of(uint32_t winners, int position) { return (winners >> position & 0x00010001u) * 0xffffu; }

// ----------------------------------------------------------------------------------------------------------- loading

// The pixels of the `present` first images; of the others zeros.
template <typename T>
__device__ __forceinline__ void load_pixels(const GradientPass& pass, const T* __restrict__ input, int present) {
  for (int i = threadIdx.x; i < kGradientImages * Conv1::kImage / 8; i += kGradientThreads) {
    const int image = i / (Conv1::kImage / 8), row = i % (Conv1::kImage / 8) / 4, column = i % 4;
    Pack<uint32_t, 4> v = {};
    if (image < present) v = lx::load_pack<4>(reinterpret_cast<const uint32_t*>(input) + i * 4);
    unsigned char* const to = pass.pixels + image * kPixelImage + row * kPixelRow + column * 16;
    *reinterpret_cast<Pack<uint32_t, 4>*>(to) = v;
    if (column > 0) *reinterpret_cast<Pack<uint32_t, 2>*>(to + kPixelCopy - 8) = {{v[0], v[1]}};
    *reinterpret_cast<Pack<uint32_t, 2>*>(to + kPixelCopy) = {{v[2], v[3]}};
  }
}

// Four codes, a byte each, as bytes with the bit of their position and 0 for kDead: a look-up by their three lower
// bits.
LX_DEVICE uint32_t winner_bits(uint32_t codes) {
  static_assert(kDead == 0xff);
  const uint32_t low = codes & 0x07070707u, digits = lx::permute_bytes(low | low >> 4, 0, 0x4420u);
  return lx::permute_bytes(0x08040201u, 0, digits);
}

// conv1's pooled output, with a one in slot 3, and its winners. thread -> 4 neighbouring pixels in all channels.
template <typename T>
__device__ __forceinline__ void load_pooled(const GradientPass& pass, const T* __restrict__ pooled1,
                                            const uint8_t* __restrict__ indices1, int present) {
  constexpr int kPacks = Conv1::kWindows / 4;
  const T one = lx::narrow<T>(1.0f);
  for (int i = threadIdx.x; i < kGradientImages * kPacks; i += kGradientThreads) {
    const int image = i / kPacks, first = i % kPacks * 4;
    Pack<T, 4> values[Conv1::kOut] = {};
    uint32_t winners[Conv1::kOut] = {};
    if (image < present) {
#pragma unroll
      for (int c = 0; c < Conv1::kOut; ++c) {
        const int from = image * Conv1::kPooled + c * Conv1::kWindows + first;
        values[c] = lx::load_pack<4>(pooled1 + from);
        winners[c] = winner_bits(*reinterpret_cast<const uint32_t*>(indices1 + from));
      }
    }
    const Pack<uint32_t, 4> places = lx::load_pack<4>(pass.pooled_places + i * 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      *reinterpret_cast<Pack<uint32_t, 4>*>(pass.pooled + places[k]) = {
          {lx::word_of(values[0][k], values[1][k]), lx::word_of(values[2][k], one),
           lx::word_of(values[3][k], values[4][k]), lx::word_of(values[5][k], T{0})}};
    }
#pragma unroll
    for (int pair = 0; pair < Conv1::kOut / 2; ++pair) {
      const uint32_t a = winners[2 * pair], b = winners[2 * pair + 1];
      *reinterpret_cast<Pack<uint32_t, 2>*>(pass.winners + pair * kWinnerPair + i * 8) = {
          {lx::permute_bytes(a, b, 0x5140u), lx::permute_bytes(a, b, 0x7362u)}};
    }
  }
}

// The gradient of conv2's output, from that of its pooled output. thread -> a window in 8 channels.
template <typename T>
__device__ __forceinline__ void load_gradients(const GradientPass& pass, const T* __restrict__ grad_pooled2,
                                               const uint8_t* __restrict__ indices2, int present) {
  for (int i = threadIdx.x; i < 2 * kPassWindows; i += kGradientThreads) {
    const int half = i / kPassWindows, window = i % kPassWindows;
    uint32_t values[4] = {}, winners[4] = {};
    if (window < present * Conv2::kWindows) {
      const int from =
          window / Conv2::kWindows * Conv2::kPooled + 8 * half * Conv2::kWindows + window % Conv2::kWindows;
      auto bit = [&](int at) {
        const uint32_t code = indices2[at];
        return code == kDead ? 0 : 1u << code;
      };
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int low = from + 2 * k * Conv2::kWindows, high = low + Conv2::kWindows;
        values[k] = lx::word_of(grad_pooled2[low], grad_pooled2[high]);
        winners[k] = bit(low) | bit(high) << 16;
      }
    }
    unsigned char* const to = pass.grid + half * kGridHalf + pass.windows[2 * window + 1];
#pragma unroll
    for (int position = 0; position < 4; ++position) {
      *reinterpret_cast<Pack<uint32_t, 4>*>(to + position * kGridPlane) = {
          {values[0] & mask_of(winners[0], position), values[1] & mask_of(winners[1], position),
           values[2] & mask_of(winners[2], position), values[3] & mask_of(winners[3], position)}};
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- products

// The sums of conv2's weights and biases over all images of a block: rows are the output channels, columns the slots of
// the input, one tap at a time, of which this warp has some; the depth is 8 windows at dy = 0, then at dy = 1.
struct Conv2WeightSums {
  float sums[kTapsOfWarp][4] = {};
  int first_tap, taps;
  int tap_places[kTapsOfWarp];  // from a window's pixel on, of the matrix that this lane names rows of

  LX_DEVICE Conv2WeightSums() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    first_tap = warp == 0 ? 0 : 1 + (kTapsOfWarp - 1) * warp;
    taps = warp == 0 ? kTapsOfWarp : kTapsOfWarp - 1;
#pragma unroll
    for (int k = 0; k < kTapsOfWarp; ++k) {
      const int tap = first_tap + (k < taps ? k : 0);
      tap_places[k] = pixel_at(tap / kTap + lane / 8 % 2, tap % kTap + lane / 16) * kPixelBytes;
    }
  }

  template <typename T>
  __device__ __forceinline__ void add(const GradientPass& pass) {
    const int lane = threadIdx.x % 32;
    // Of the gradient's matrices, too, half of a lane's number is dy; the other half is that of the channels.
    const unsigned char* const grid = pass.grid + lane / 16 * grid_plane(1, 0) + lane / 8 % 2 * kGridHalf;
#pragma unroll 1
    for (int first = 0; first < kPassWindows; first += 8) {
      const Pack<uint32_t, 2> window = lx::load_pack<2>(pass.windows + 2 * (first + lane % 8));
      uint32_t a[2][4];  // [dx]
#pragma unroll
      for (int dx = 0; dx < 2; ++dx) lx::load_transposed(a[dx], grid + grid_plane(0, dx) + window[1]);
#pragma unroll
      for (int k = 0; k < kTapsOfWarp; ++k) {
        if (k >= taps) break;  // of the whole warp
        uint32_t x[4];         // [dx][dy]
        lx::load_transposed(x, pass.pooled + window[0] + tap_places[k]);
        lx::multiply_accumulate<T>(sums[k], a[0], x[0], x[1]);
        lx::multiply_accumulate<T>(sums[k], a[1], x[2], x[3]);
      }
    }
  }

  // The block's sums, as partial sums have their place: [channel][taps of all input channels, bias].
  template <typename Store>
  __device__ __forceinline__ void finish(Store store) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < kTapsOfWarp; ++k) {
      if (k >= taps) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = (g + i / 2 * 8) * (Conv2::kWeights + 1), slot = 2 * t + i % 2, tap = first_tap + k;
        if (slot % 4 < 3) {
          store(row + (slot / 4 * 3 + slot % 4) * kTaps + tap, sums[k][i]);
        } else if (slot == 3 && tap == 0) {
          store(row + Conv2::kWeights, sums[k][i]);
        }
      }
    }
  }
};

// The gradient of conv2's input, rounded, and from there to the winners of conv1: a row of the product is a patch of 2
// x 2 positions, a column an input channel, one tile for each position; the depth is the 16 output channels, tap by
// tap.
template <typename T>
struct PooledGradient {
  uint32_t weights[kTaps][2];

  LX_DEVICE explicit PooledGradient(const T* __restrict__ weight2) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        auto value = [&](int out) { return g < Conv2::kIn ? weight2[(out * Conv2::kIn + g) * kTaps + tap] : T{0}; };
        weights[tap][word] = lx::word_of(value(8 * word + 2 * t), value(8 * word + 2 * t + 1));
      }
    }
  }

  __device__ __forceinline__ void compute(const GradientPass& pass) const {
    constexpr int kReach = kTap + 1;  // rows of positions that a patch's two are connected with
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int tile = warp; tile < kInputTiles; tile += kGradientWarps) {
      const int pixel = static_cast<int>(pass.input_patches[tile * 16 + lane % 16] & 0xffffu);
      const int image = pixel / Conv1::kWindows, y = pixel % Conv1::kWindows / (2 * Conv2::kSize),
                x = pixel % Conv2::kSize / 2;
      const unsigned char* const from =
          pass.grid + lane / 16 * kGridHalf + (image * kGridImage + y * kGridRow + x) * 16;
      float sums[2][2][4] = {};  // [dy][dx]
#pragma unroll
      for (int q = 0; q < kReach; ++q) {
#pragma unroll
        for (int r = 0; r < kReach; ++r) {
          uint32_t a[4];
          lx::load_matrices(
              a, reinterpret_cast<const uint32_t*>(from + grid_plane(q % 2, r % 2) + (q / 2 * kGridRow + r / 2) * 16));
#pragma unroll
          for (int dy = 0; dy < 2; ++dy) {
#pragma unroll
            for (int dx = 0; dx < 2; ++dx) {
              const int i = dy + kTap - 1 - q, j = dx + kTap - 1 - r;
              if (i < 0 || i >= kTap || j < 0 || j >= kTap) continue;
              lx::multiply_accumulate<T>(sums[dy][dx], a, weights[i * kTap + j][0], weights[i * kTap + j][1]);
            }
          }
        }
      }
      if (t >= Conv2::kIn / 2) continue;  // these lanes have the empty columns
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * 16 + half * 8 + g;
        if (row >= kInputPatches) break;
        const uint32_t places = pass.input_patches[row];
        const unsigned char* const winners = pass.winners + t * kWinnerPair + (places & 0xffffu) * 2;
        unsigned char* const to = pass.patches + (places >> 16) * kPatchBytes + t * 4;
#pragma unroll
        for (int dy = 0; dy < 2; ++dy) {
          const uint32_t bytes = *reinterpret_cast<const uint32_t*>(winners + dy * Conv1::kPool * 2);
#pragma unroll
          for (int dx = 0; dx < 2; ++dx) {
            const uint32_t value = lx::rounded_word<T>(sums[dy][dx][2 * half], sums[dy][dx][2 * half + 1]);
            const uint32_t won = spread(bytes, dx);
#pragma unroll
            for (int position = 0; position < 4; ++position) {
              *reinterpret_cast<uint32_t*>(to + dy * Conv1::kPool / 2 * kPatchBytes + dx * kPatchWindowBytes +
                                           position * Conv1::kOut * 2) = value & mask_of(won, position);
            }
          }
        }
      }
    }
  }
};

// The sums of conv1's weights and biases over all images of a block: rows are a patch's 48 gradients, columns its 6 x 8
// pixels, the depth the patches. What lies on the band of rows and columns that belong together is, added up, the
// gradient of the weights.
struct Conv1WeightSums {
  static constexpr int kTiles = kPatchPlaces / 16;
  static constexpr int kColumns = kPatchRows * kPatchPixels + 1;  // and ones, for the bias
  static constexpr int kBandFloats = kPatchPlaces * kColumns;

  float sums[kTiles][kPatchRows + 1][4] = {};

  template <typename T>
  __device__ __forceinline__ void add(const GradientPass& pass) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t ones = lx::word_of(lx::narrow<T>(1.0f), lx::narrow<T>(1.0f));
#pragma unroll 1
    for (int step = warp; step < kDepthSteps; step += kGradientWarps) {
      const uint32_t for_a = pass.depths[step * 16 + lane % 8 + lane / 16 * 8];
      const uint32_t for_x = pass.depths[step * 16 + lane % 16];
      const unsigned char* const gradients = pass.patches + (for_a & 0xffffu) + lane / 8 % 2 * 16;
      const unsigned char* const pixels = pass.pixels + (for_x >> 16) + lane / 16 * kPixelRow;
      uint32_t a[kTiles][4], x[kPatchRows / 2][4];  // of x, two rows each
#pragma unroll
      for (int i = 0; i < kTiles; ++i) lx::load_transposed(a[i], gradients + i * 32);
#pragma unroll
      for (int i = 0; i < kPatchRows / 2; ++i) lx::load_transposed(x[i], pixels + i * 2 * kPixelRow);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int row = 0; row < kPatchRows; ++row) {
          lx::multiply_accumulate<T>(sums[tile][row], a[tile], x[row / 2][row % 2 * 2], x[row / 2][row % 2 * 2 + 1]);
        }
        lx::multiply_accumulate<T>(sums[tile][kPatchRows], a[tile], ones, ones);
      }
    }
  }

  // Hands each sum over the block to store(position, sum), in the order of Conv1GradWeight, in one thread. `band`:
  // shared, kBandFloats, free as soon as the whole block is here.
  template <typename Store>
  __device__ __forceinline__ void finish(float* band, Store store) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // The warps add their sums one after the other.
    for (unsigned warp = 0; warp < kGradientWarps; ++warp) {
      __syncthreads();
      if (threadIdx.x / 32 != warp) continue;
      auto add = [&](float* to, float sum) { *to = warp == 0 ? sum : *to + sum; };
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float* const row = band + (tile * 16 + g + i / 2 * 8) * kColumns;
#pragma unroll
          for (int k = 0; k < kPatchRows; ++k) add(row + k * kPatchPixels + 2 * t + i % 2, sums[tile][k][i]);
          // All columns of the ones are the same.
          if (t == 0 && i % 2 == 0) add(row + kColumns - 1, sums[tile][kPatchRows][i]);
        }
      }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < Conv1::kOut * (kTaps + 1); at += kGradientThreads) {
      const int channel = at / (kTaps + 1), tap = at % (kTaps + 1);
      float sum = 0;
      for (int place = 0; place < kPatchPlaces / Conv1::kOut; ++place) {
        // Places are [window][position within it].
        const int y = place % 4 / 2, x = place / 4 * 2 + place % 2;
        const int column = tap == kTaps ? kColumns - 1 : (y + tap / kTap) * kPatchPixels + x + tap % kTap;
        sum += band[(place * Conv1::kOut + channel) * kColumns + column];
      }
      store(at, sum);
    }
  }
};

}  // namespace lenet_ext::cuda
