// The gradients of LeNet's convolutions on the tensor cores, in float16, bfloat16 and TF32, cut into what a block of
// four warps does with two images in shared memory, or one in TF32: of both layers, or of one on its own.
//
// Dense products, although three quarters of what they multiply by are zeros: for the gradient of conv2's input in
// 16384 images 7.9 GFLOP, 20 us at the rate of the product of large matrices on an H100 in 16 bits, where the kernel on
// the ordinary units took 480. What makes them lean:
//   - The gradient of conv2's output is made dense once, for both of conv2's gradients, as four planes by the parities
//     of the position, so that a window is one place in each of them: its value in one, zeros in the others.
//   - The product for conv2's input has patches of 2 x 2 positions as rows. The tiles of their four positions share
//     every operand, and neighbouring tiles most. All taps' weights stay in registers: in 16 bits a warp has those of
//     all channels, in TF32 of half of them.
//   - Taps of conv2's weights that lie next to each other share operands, too: a warp has six in a rectangle.
//   - A lane that has the gradient of a pooled value writes it at once, with three zeros, to where it is an operand of
//     conv1's gradient: between both layers nothing passes through global memory.
//   - A one in an empty slot beside conv1's output makes the bias's gradient a tap's column; a row of ones does for
//     conv1.
//   - What is stored with the channels together is loaded transposed where the depth of a product is positions.
//   - Winners are bits, of which in 16 bits a shift, an and, and a multiplication make the mask of two values.
//   - What the next images need is copied as it is, asynchronously, while these are computed.
// What is stored in shared memory is an operand: in TF32 it has been rounded, biases' gradients included.
#pragma once

#include "async_copy.cuh"
#include "lenet_pixels.cuh"
#include "tensor_core.cuh"

namespace lenet_ext::cuda {

using lx::Pack;

constexpr int kGradientWarps = 4;
constexpr unsigned kGradientThreads = 32 * kGradientWarps;

constexpr int kPatchesInRow = Conv1::kPool / 2;  // of 2 x 4 positions in conv1's output, or 2 x 2 in conv2's input
constexpr int kPatchesOfImage = Conv1::kPool * kPatchesInRow;  // of conv1's output
constexpr int kPatchRows = 6, kPatchPixels = 8, kPatchPlaces = 8 * Conv1::kOut;

// What a block computes gradients of: of both layers' weights and biases, by way of that of conv2's input; of conv1's
// weights and biases; of conv2's input and of its weights and biases, or of one of these.
enum class GradientsOf { kBoth, kConv1, kConv2, kConv2Input, kConv2Weights };

// What the gradients of some images need, as it is in global memory; or where in shared memory it arrives.
template <typename T, typename Code>
struct GradientImages {
  T *input, *pooled1, *grad_pooled1, *grad_pooled2;
  Code *indices1, *indices2;
};

// What a pass has in shared memory, and tables of where things lie in it, in bytes. What its gradients do not need
// takes no memory.
template <typename T, GradientsOf kOf>
struct GradientPass {
  using Stored = T;
  using Pixels = PixelLayout<T>;
  static constexpr bool kBoth = kOf == GradientsOf::kBoth;
  static constexpr bool kOfConv1 = kBoth || kOf == GradientsOf::kConv1, kOfConv2 = kOf != GradientsOf::kConv1;
  static constexpr bool kOfInput = kOfConv2 && kOf != GradientsOf::kConv2Weights;  // of conv2
  static constexpr bool kOfWeights = kOfConv2 && kOf != GradientsOf::kConv2Input;
  static constexpr int kPerWord = lx::Operand<T>::kPerWord, kInVector = 4 * kPerWord, kStep = 8 * kPerWord;
  static constexpr int kImages = kPerWord;  // two blocks share a multiprocessor
  static constexpr int kWindows = kImages * Conv2::kWindows;

  // The images. In 16 bits twice, the second time from their fifth column on, so that the patches of conv1, four
  // columns apart, begin at multiples of 16 bytes. Behind the columns of a row there are zeros.
  static constexpr int kCopies = kPerWord, kRowPixels = 48;
  static constexpr int kPixelRow = kRowPixels * sizeof(T), kPixelCopy = Conv1::kSize * kPixelRow;
  static constexpr int kPixelImage = kCopies * kPixelCopy;
  static constexpr int kZeroPixels = Conv1::kSize * sizeof(T);                  // where they begin
  static constexpr int kNextPatch = kCopies == 2 ? kPixelCopy : 4 * sizeof(T);  // behind one in an even place

  // conv1's output: [vector of channels][image, pixel as PixelLayout says]; behind the images, zeros in place of pixels
  // that a product of conv2's weight gradient has no window for.
  static constexpr int kNoPixels = Pixels::at(kTap, kTap) + 1;
  static constexpr int kPooledVector = vectors_apart(kImages * Pixels::kImage + kNoPixels) * kVectorBytes;
  static constexpr int kPooledBytes = 2 / kPerWord * kPooledVector;

  // The gradient of conv2's output: [plane, by the parities of row and column][vector of channels][window], 16 bytes a
  // window; beside the 5 windows of a row lie two of zeros and more, and behind the 5 rows of an image one. Rows are 5
  // and images 1 modulo 8 windows apart, so that 8 windows come from different banks, in a row or as they are counted.
  static constexpr int kGridRow = 13, kGridImage = 81, kGridRim = 2;  // windows
  static_assert(kGridImage > Conv2::kPool * kGridRow + kPatchesInRow + kGridRim);
  static constexpr int kGridVectors = Conv2::kOut / kInVector;
  static constexpr int kGridVector = vectors_apart(kImages * kGridImage) * kVectorBytes;
  static constexpr int kGridPlane = kGridVectors * kGridVector, kGridBytes = 4 * kGridPlane;
  static LX_DEVICE constexpr int grid_plane(int dy, int dx) { return (dy * 2 + dx) * kGridPlane; }

  // The gradient of conv1's output: [patch][2 x 4 positions][6 channels]; the last patch is none, and zero.
  static constexpr int kPatchBytes = 56 * sizeof(T);
  static constexpr int kNoPatch = kImages * kPatchesOfImage;
  static_assert(kPatchBytes >= kPatchPlaces * static_cast<int>(sizeof(T)));
  // Where the gradients begin of a window's position, 0 to 3.
  static LX_DEVICE constexpr int patch_position(int window, int position) {
    return (position / 2 * 4 + window * 2 + position % 2) * Conv1::kOut * static_cast<int>(sizeof(T));
  }
  // The depth of its product with the pixels: the patches, step by step. In 16 bits those in even places of their row
  // (4 of them), then those in odd ones (3): so more of a step's come from different banks. In TF32 all do as they are.
  static constexpr int kDepthSteps = (kNoPatch + kStep - 1) / kStep;
  static constexpr int kEvenDepth = kCopies == 2 ? kImages * Conv1::kPool * 4 : 0;
  static_assert(kEvenDepth % kStep == 0);

  // The winners of conv1's windows, a bit for each position: [pair of channels][image][window][2]. Pairs are 8 modulo
  // 32 words apart, so that a warp's lanes read from different banks.
  static constexpr int kWinnerPair = (kImages * Conv1::kWindows * 2 + 95) / 128 * 128 + 32;  // bytes
  static_assert(kWinnerPair >= kImages * Conv1::kWindows * 2 && kWinnerPair / 4 % 32 == 8);

  static constexpr int kStepWindows = kStep / 2;  // of conv2's weight gradient, at one position, then at another
  static constexpr int kWindowRows = (kWindows + kStepWindows - 1) / kStepWindows * kStepWindows;

  // Of the gradient of conv2's input: warps that share a sum, a half of the channels each, and what they hand over.
  static constexpr int kSharers = 2 / kPerWord;
  static constexpr int kSharedSums = kSharers == 2 ? kGradientThreads * 16 : 0;

  static constexpr int needed(bool by_these, int count) { return by_these ? count : 0; }
  static constexpr int kPixelsTaken = needed(kOfConv1, kImages* kPixelImage),
                       kPooledTaken = needed(kOfWeights, kPooledBytes), kGridTaken = needed(kOfConv2, kGridBytes),
                       kPatchesTaken = needed(kOfConv1, (kNoPatch + 1) * kPatchBytes),
                       kWinnersTaken = needed(kBoth, Conv1::kOut / 2 * kWinnerPair);
  static constexpr int kPooledPlaces = needed(kOfWeights, kImages* Conv1::kWindows),
                       kWindowWords = needed(kOfConv2, kWindowRows * 2), kDepths = needed(kOfConv1, kDepthSteps* kStep),
                       kSharedSumsTaken = needed(kOfInput, kSharedSums),
                       kFlags = needed(kOfInput && !kBoth, kGradientWarps);
  // Of the next images.
  static constexpr int kNextInput = needed(kOfConv1, kImages* Conv1::kImage),
                       kNextPooled1 = needed(kOfWeights, kImages* Conv1::kPooled),
                       kNextGrad1 = needed(kOfConv1 && !kBoth, kImages* Conv1::kPooled),
                       kNextGrad2 = needed(kOfConv2, kImages* Conv2::kPooled),
                       kNextIndices1 = needed(kOfConv1, kImages* Conv1::kPooled),
                       kNextIndices2 = needed(kOfConv2, kImages* Conv2::kPooled);

  unsigned char *pixels, *pooled, *grid, *patches, *winners;
  uint32_t* pooled_places;  // [image, window of conv1]: in `pooled`
  uint32_t* windows;        // [image, window of conv2][2]: in `pooled`, in `grid`; behind the last: zeros in both
  uint32_t* depths;         // [step][kStep]: in `patches`; in `pixels` in the upper half
  float* shared_sums;       // [warp][4][lane][4]
  uint32_t* finite;         // [warp]: whether those of conv2's weights are that this warp has looked at
  GradientImages<T, uint8_t> next;

  LX_DEVICE explicit GradientPass(unsigned char* shared) {
    pixels = lx::take<unsigned char>(shared, kPixelsTaken);
    pooled = lx::take<unsigned char>(shared, kPooledTaken);
    grid = lx::take<unsigned char>(shared, kGridTaken);
    patches = lx::take<unsigned char>(shared, kPatchesTaken);
    winners = lx::take<unsigned char>(shared, kWinnersTaken);
    pooled_places = lx::take<uint32_t>(shared, kPooledPlaces);
    windows = lx::take<uint32_t>(shared, kWindowWords);
    depths = lx::take<uint32_t>(shared, kDepths);
    shared_sums = lx::take<float>(shared, kSharedSumsTaken);
    finite = lx::take<uint32_t>(shared, kFlags);
    next.input = lx::take<T>(shared, kNextInput);
    next.pooled1 = lx::take<T>(shared, kNextPooled1);
    next.grad_pooled1 = lx::take<T>(shared, kNextGrad1);
    next.grad_pooled2 = lx::take<T>(shared, kNextGrad2);
    next.indices1 = lx::take<uint8_t>(shared, kNextIndices1);
    next.indices2 = lx::take<uint8_t>(shared, kNextIndices2);
  }
  static constexpr int64_t shared_bytes() {
    return lx::taken<unsigned char>(kPixelsTaken) + lx::taken<unsigned char>(kPooledTaken) +
           lx::taken<unsigned char>(kGridTaken) + lx::taken<unsigned char>(kPatchesTaken) +
           lx::taken<unsigned char>(kWinnersTaken) + lx::taken<uint32_t>(kPooledPlaces) +
           lx::taken<uint32_t>(kWindowWords) + lx::taken<uint32_t>(kDepths) + lx::taken<float>(kSharedSumsTaken) +
           lx::taken<uint32_t>(kFlags) + lx::taken<T>(kNextInput) + lx::taken<T>(kNextPooled1) +
           lx::taken<T>(kNextGrad1) + lx::taken<T>(kNextGrad2) + lx::taken<uint8_t>(kNextIndices1) +
           lx::taken<uint8_t>(kNextIndices2);
  }

  // The block begins to copy what `present` images need. conv1's images of indices begin at multiples of 8 bytes, all
  // others at multiples of 16. What is not needed may be null.
  LX_DEVICE void fetch(const GradientImages<const T, const uint8_t>& from, int present) const {
    if constexpr (kNextInput > 0) lx::copy_block_async<16>(next.input, from.input, present * Conv1::kImage);
    if constexpr (kNextPooled1 > 0) lx::copy_block_async<16>(next.pooled1, from.pooled1, present * Conv1::kPooled);
    if constexpr (kNextGrad1 > 0) {
      lx::copy_block_async<16>(next.grad_pooled1, from.grad_pooled1, present * Conv1::kPooled);
    }
    if constexpr (kNextGrad2 > 0) {
      lx::copy_block_async<16>(next.grad_pooled2, from.grad_pooled2, present * Conv2::kPooled);
    }
    if constexpr (kNextIndices1 > 0) lx::copy_block_async<8>(next.indices1, from.indices1, present * Conv1::kPooled);
    if constexpr (kNextIndices2 > 0) lx::copy_block_async<16>(next.indices2, from.indices2, present * Conv2::kPooled);
    lx::end_copy_group();
  }

  // The block writes the tables, and zeros everywhere else.
  LX_DEVICE void prepare() const {
    const int bytes = static_cast<int>(winners + kWinnersTaken - pixels);
    for (int i = threadIdx.x; i < bytes / 4; i += kGradientThreads) reinterpret_cast<uint32_t*>(pixels)[i] = 0;
    for (int i = threadIdx.x; i < kPooledPlaces; i += kGradientThreads) {
      const int image = i / Conv1::kWindows, y = i % Conv1::kWindows / Conv1::kPool, x = i % Conv1::kPool;
      pooled_places[i] = (image * Pixels::kImage + Pixels::at(y, x)) * kVectorBytes;
    }
    for (int i = threadIdx.x; i < kWindowWords / 2; i += kGradientThreads) {
      const int image = i / Conv2::kWindows, y = i % Conv2::kWindows / Conv2::kPool, x = i % Conv2::kPool;
      const bool none = i >= kWindows;
      const int pixel = none ? kImages * Pixels::kImage : image * Pixels::kImage + Pixels::at(2 * y, 2 * x);
      windows[2 * i] = pixel * kVectorBytes;
      windows[2 * i + 1] = none ? 0 : (image * kGridImage + y * kGridRow + x + kGridRim) * kVectorBytes;
    }
    for (int i = threadIdx.x; i < kDepths; i += kGradientThreads) {
      const bool even = i < kEvenDepth;
      const int in_row = kCopies == 1 ? kPatchesInRow : even ? 4 : 3, of_image = Conv1::kPool * in_row;
      const int k = even ? i : i - kEvenDepth, image = k / of_image, y = k % of_image / in_row;
      const int x = kCopies == 1 ? k % in_row : 2 * (k % in_row) + (even ? 0 : 1);
      const bool none = image >= kImages;
      const int patch = none ? kNoPatch : image * kPatchesOfImage + y * kPatchesInRow + x;
      const int from =
          none ? kZeroPixels
               : image * kPixelImage + 2 * y * kPixelRow + x % 2 * kNextPatch + x / 2 * static_cast<int>(8 * sizeof(T));
      depths[i] = patch * kPatchBytes | static_cast<uint32_t>(from) << 16;
    }
  }
};

// The block's slice of the batch, pass by pass: fetch(first image, how many are present) begins to copy what a pass
// needs, load(present) makes operands of it, compute(first, present) multiplies them, while what the next pass needs
// arrives.
template <typename Pass, typename Fetch, typename Load, typename Compute>
__device__ __forceinline__ void each_pass(int64_t batch, int64_t slice_images, const Fetch& fetch, const Load& load,
                                          const Compute& compute) {
  const int64_t slice_begin = blockIdx.x * slice_images;
  const int64_t slice_end = slice_begin + slice_images < batch ? slice_begin + slice_images : batch;
  auto present_at = [slice_end](int64_t first) { return slice_end - first < Pass::kImages ? 1 : Pass::kImages; };
  fetch(slice_begin, present_at(slice_begin));
#pragma unroll 1
  for (int64_t first = slice_begin; first < slice_end; first += Pass::kImages) {
    const int present = present_at(first);
    lx::wait_for_copies<0>();
    __syncthreads();  // all copies are there, and the last pass is done with the shared memory
    load(present);
    __syncthreads();
    if (first + Pass::kImages < slice_end) fetch(first + Pass::kImages, present_at(first + Pass::kImages));
    compute(first, present);
  }
}

// Of two neighbouring values those that won `position`, the others zero. winners: the `which`-th two bytes of a word.
template <typename T>
LX_DEVICE lx::Operands<T, 2> won(const lx::Operands<T, 2>& values, uint32_t winners, int which, int position) {
  if constexpr (lx::Operand<T>::kPerWord == 2) {
    const uint32_t halves = lx::permute_bytes(winners, 0, which == 0 ? 0x4140u : 0x4342u);
    return {{values[0] & (halves >> position & 0x00010001u) * 0xffffu}};
  } else {
    auto one = [&](int k) { return (winners >> (16 * which + 8 * k + position) & 1u) != 0 ? values[k] : 0u; };
    return {{one(0), one(1)}};
  }
}

// ----------------------------------------------------------------------------------------------------------- loading

// From where the copies arrived to where operands are: the pixels of the `present` first images; of the others zeros.
template <typename Pass>
__device__ __forceinline__ void load_pixels(const Pass& pass, int present) {
  using T = typename Pass::Stored;
  constexpr int kVectors = Conv1::kImage / Pass::kInVector, kOfRow = Conv1::kSize / Pass::kInVector;
  for (int i = threadIdx.x; i < Pass::kImages * kVectors; i += kGradientThreads) {
    const int image = i / kVectors, row = i % kVectors / kOfRow, column = i % kOfRow;
    Pack<uint32_t, 4> v = {};
    if (image < present) v = lx::load_pack<4>(reinterpret_cast<const uint32_t*>(pass.next.input) + i * 4);
    for (uint32_t& word : v.values) word = lx::operand_word<T>(word);
    unsigned char* const to = pass.pixels + image * Pass::kPixelImage + row * Pass::kPixelRow + column * kVectorBytes;
    *reinterpret_cast<Pack<uint32_t, 4>*>(to) = v;
    if constexpr (Pass::kCopies == 2) {
      if (column > 0) *reinterpret_cast<Pack<uint32_t, 2>*>(to + Pass::kPixelCopy - 8) = {{v[0], v[1]}};
      *reinterpret_cast<Pack<uint32_t, 2>*>(to + Pass::kPixelCopy) = {{v[2], v[3]}};
    }
  }
}

// Four codes, a byte each, as bytes with the bit of their position and 0 for kDead: a look-up by their three lower
// bits.
LX_DEVICE uint32_t winner_bits(uint32_t codes) {
  static_assert(kDead == 0xff);
  const uint32_t low = codes & 0x07070707u, digits = lx::permute_bytes(low | low >> 4, 0, 0x4420u);
  return lx::permute_bytes(0x08040201u, 0, digits);
}

// conv1's pooled output, with a one in slot 3, and its winners where they are needed. thread -> 4 neighbouring pixels
// in all channels.
template <typename Pass>
__device__ __forceinline__ void load_pooled(const Pass& pass, int present) {
  using T = typename Pass::Stored;
  constexpr int kPacks = Conv1::kWindows / 4;
  const T one = lx::narrow<T>(1.0f);
  for (int i = threadIdx.x; i < Pass::kImages * kPacks; i += kGradientThreads) {
    const int image = i / kPacks, first = i % kPacks * 4;
    Pack<T, 4> values[Conv1::kOut] = {};
    [[maybe_unused]] uint32_t winners[Conv1::kOut] = {};
    if (image < present) {
#pragma unroll
      for (int c = 0; c < Conv1::kOut; ++c) {
        const int from = image * Conv1::kPooled + c * Conv1::kWindows + first;
        values[c] = lx::load_pack<4>(pass.next.pooled1 + from);
        if constexpr (Pass::kBoth) {
          winners[c] = winner_bits(*reinterpret_cast<const uint32_t*>(pass.next.indices1 + from));
        }
      }
    }
    const Pack<uint32_t, 4> places = lx::load_pack<4>(pass.pooled_places + i * 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const T slots[] = {values[0][k], values[1][k], values[2][k], one, values[3][k], values[4][k], values[5][k], T{0}};
      uint32_t words[8 / Pass::kPerWord];
#pragma unroll
      for (int w = 0; w < 8 / Pass::kPerWord; ++w) {
        words[w] = lx::operand_word<T>([&](int i) { return slots[Pass::kPerWord * w + i]; });
      }
#pragma unroll
      for (int v = 0; v < 2 / Pass::kPerWord; ++v) {
        *reinterpret_cast<Pack<uint32_t, 4>*>(pass.pooled + v * Pass::kPooledVector + places[k]) = {
            {words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3]}};
      }
    }
    if constexpr (Pass::kBoth) {
#pragma unroll
      for (int pair = 0; pair < Conv1::kOut / 2; ++pair) {
        const uint32_t a = winners[2 * pair], b = winners[2 * pair + 1];
        *reinterpret_cast<Pack<uint32_t, 2>*>(pass.winners + pair * Pass::kWinnerPair + i * 8) = {
            {lx::permute_bytes(a, b, 0x5140u), lx::permute_bytes(a, b, 0x7362u)}};
      }
    }
  }
}

// The gradient of conv1's output, from that of its pooled output, where that is not computed here. thread -> a patch,
// all channels: 16 bytes at a time, which 8 neighbouring patches have in different banks. In TF32 every two would have
// them in the same, if half of the threads did not begin with the second of each two.
template <typename Pass>
__device__ __forceinline__ void load_patches(const Pass& pass, int present) {
  using T = typename Pass::Stored;
  constexpr int kPairs = Conv1::kOut / 2, kWords = kPatchPlaces / Pass::kPerWord, kOfPair = 2 / Pass::kPerWord;
  static_assert(Conv1::kPool % 2 == 0);  // a patch is two windows in a row
  for (int i = threadIdx.x; i < Pass::kImages * kPatchesOfImage; i += kGradientThreads) {
    const int image = i / kPatchesOfImage;
    lx::Operands<T, 2> values[2][kPairs] = {};
    uint32_t winners[kPairs] = {};
    if (image < present) {
      const int from = image * Conv1::kPooled + i % kPatchesOfImage * 2;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int low = from + 2 * pair * Conv1::kWindows, high = low + Conv1::kWindows;
        const Pack<T, 2> a = lx::load_pack<2>(pass.next.grad_pooled1 + low),
                         b = lx::load_pack<2>(pass.next.grad_pooled1 + high);
        auto codes = [&](int at) {
          return uint32_t{*reinterpret_cast<const uint16_t*>(pass.next.indices1 + at)};  // of both windows
        };
        winners[pair] = lx::permute_bytes(winner_bits(codes(low) | codes(high) << 16), 0, 0x3120u);
#pragma unroll
        for (int window = 0; window < 2; ++window) values[window][pair] = lx::operands<T>(a[window], b[window]);
      }
    }
    uint32_t words[kWords];  // [position][channel]
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int pair = w / kOfPair % kPairs, at = w / (kOfPair * kPairs), y = at / 4, window = at % 4 / 2, x = at % 2;
      words[w] = won<T>(values[window][pair], winners[pair], window, y * 2 + x)[w % kOfPair];
    }
    const int turned = Pass::kPerWord == 1 ? i / 4 % 2 : 0;
#pragma unroll
    for (int w = 0; w < kWords; w += 8) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        Pack<uint32_t, 4> vector;
#pragma unroll
        for (int k = 0; k < 4; ++k) vector.values[k] = turned == 0 ? words[w + 4 * v + k] : words[w + 4 - 4 * v + k];
        *reinterpret_cast<Pack<uint32_t, 4>*>(pass.patches + i * Pass::kPatchBytes + w * 4 +
                                              (v ^ turned) * kVectorBytes) = vector;
      }
    }
  }
}

// The gradient of conv2's output, from that of its pooled output. thread -> a window in the channels of a vector.
template <typename Pass>
__device__ __forceinline__ void load_gradients(const Pass& pass, int present) {
  using T = typename Pass::Stored;
  constexpr int kPairs = Pass::kInVector / 2;
  for (int i = threadIdx.x; i < Pass::kGridVectors * Pass::kWindows; i += kGradientThreads) {
    const int vector = i / Pass::kWindows, window = i % Pass::kWindows;
    lx::Operands<T, 2> values[kPairs] = {};
    uint32_t winners[kPairs] = {};
    if (window < present * Conv2::kWindows) {
      const int from = window / Conv2::kWindows * Conv2::kPooled + Pass::kInVector * vector * Conv2::kWindows +
                       window % Conv2::kWindows;
      auto bit = [&](int at) {
        const uint32_t code = pass.next.indices2[at];
        return code == kDead ? 0 : 1u << code;
      };
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        const int low = from + 2 * k * Conv2::kWindows, high = low + Conv2::kWindows;
        values[k] = lx::operands<T>(pass.next.grad_pooled2[low], pass.next.grad_pooled2[high]);
        winners[k] = bit(low) | bit(high) << 8;
      }
    }
    unsigned char* const to = pass.grid + vector * Pass::kGridVector + pass.windows[2 * window + 1];
#pragma unroll
    for (int position = 0; position < 4; ++position) {
      Pack<uint32_t, 4> words;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        constexpr int kWords = 4 / kPairs;  // of a pair
        words.values[w] = won<T>(values[w / kWords], winners[w / kWords], 0, position)[w % kWords];
      }
      *reinterpret_cast<Pack<uint32_t, 4>*>(to + position * Pass::kGridPlane) = words;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- products

// The sums of conv2's weights and biases over all images of a block: rows are the output channels, columns the slots of
// the input, one tap at a time; the depth is some windows at one of their four positions, then at the one across.
//
// A warp has a rectangle of 2 x 3 taps, which share 3 x 4 operands: of all windows the pixels that lie `u` across and
// `v` along it. Four rectangles, each a quarter turn from the last, leave the tap in the middle:
//   0 0 0 1 1
//   0 0 0 1 1
//   3 3 m 1 1
//   3 3 2 2 2
//   3 3 2 2 2
// Those of odd warps lie on their side: there `across` is along a row.
template <typename Pass>
struct Conv2WeightSums {
  using T = typename Pass::Stored;
  using Rows = lx::Transposed<T>;
  static constexpr int kAcross = 2, kAlong = 3, kRectangle = kAcross * kAlong;
  static constexpr int kOperands = (kAcross + 1) * (kAlong + 1), kMiddle = kTaps / 2;
  static_assert(kGradientWarps * kRectangle + 1 == kTaps && kOperands % 4 == 0);

  float sums[kRectangle + 1][4] = {};
  int places[kOperands / 4][Rows::kNamed];  // from a window's pixel on, of the matrices that this lane names rows of

  static LX_DEVICE int warp() { return threadIdx.x / 32; }
  static LX_DEVICE bool on_side() { return warp() % 2 == 1; }
  // An odd warp: these have less to do for the gradient of conv2's input.
  static LX_DEVICE bool has_middle() { return warp() == 1; }
  static LX_DEVICE int first_tap() { return warp() == 0 ? 0 : warp() == 1 ? 3 : warp() == 2 ? 3 * kTap + 2 : 2 * kTap; }
  static LX_DEVICE int tap(int k) {
    const int u = k / kAlong, v = k % kAlong;
    return k == kRectangle ? kMiddle : first_tap() + (on_side() ? v * kTap + u : u * kTap + v);
  }

  LX_DEVICE Conv2WeightSums() {
#pragma unroll
    for (int four = 0; four < kOperands / 4; ++four) {
#pragma unroll
      for (int i = 0; i < Rows::kNamed; ++i) {
        const int at = four * 4 + Rows::matrix(i), u = at % (kAcross + 1), v = at / (kAcross + 1);
        const int row = first_tap() / kTap + (on_side() ? v : u), column = first_tap() % kTap + (on_side() ? u : v);
        places[four][i] = Pass::Pixels::at(row, column) * kVectorBytes;
      }
    }
  }

  __device__ __forceinline__ void add(const Pass& pass) {
    const unsigned char* const pooled = pass.pooled + Rows::column(Pass::kPooledVector);
    const unsigned char* const grid = pass.grid + Rows::column(Pass::kGridVector);
    const int plane_across = on_side() ? Pass::grid_plane(0, 1) : Pass::grid_plane(1, 0);
    const int plane_along = on_side() ? Pass::grid_plane(1, 0) : Pass::grid_plane(0, 1);
#pragma unroll 1
    for (int first = 0; first < Pass::kWindows; first += Pass::kStepWindows) {
      const Pack<uint32_t, 2> window = lx::load_pack<2>(pass.windows + 2 * (first + Rows::row()));
      const unsigned char* rows[Rows::kNamed];
      uint32_t a[2][4];  // [along]
#pragma unroll
      for (int v = 0; v < 2; ++v) {
#pragma unroll
        for (int i = 0; i < Rows::kNamed; ++i) {
          const int half = Rows::matrix(i) % 2, u = Rows::matrix(i) / 2;  // half of the channels
          rows[i] = grid + window[1] + u * plane_across + v * plane_along +
                    half * (Pass::kGridVectors / 2 * Pass::kGridVector);
        }
        lx::load_transposed<T>(a[v], rows, 0);
      }
      auto load = [&](uint32_t (&x)[4], auto place) {
#pragma unroll
        for (int i = 0; i < Rows::kNamed; ++i) rows[i] = pooled + window[0] + place(i);
        lx::load_transposed<T>(x, rows, 0);
      };
      uint32_t x[kOperands / 4][4];
#pragma unroll
      for (int four = 0; four < kOperands / 4; ++four) load(x[four], [&](int i) { return places[four][i]; });
#pragma unroll
      for (int k = 0; k < kRectangle; ++k) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const int at = (k % kAlong + v) * (kAcross + 1) + k / kAlong;
          lx::multiply_accumulate<T>(sums[k], a[v], x[at / 4][at % 4], x[(at + 1) / 4][(at + 1) % 4]);
        }
      }
      if (has_middle()) {
        load(x[0], [](int i) {  // on its side
          const int u = Rows::matrix(i) % 2, v = Rows::matrix(i) / 2;
          return Pass::Pixels::at(kTap / 2 + v, kTap / 2 + u) * kVectorBytes;
        });
        lx::multiply_accumulate<T>(sums[kRectangle], a[0], x[0][0], x[0][1]);
        lx::multiply_accumulate<T>(sums[kRectangle], a[1], x[0][2], x[0][3]);
      }
    }
  }

  // The block's sums, as partial sums have their place: [channel][taps of all input channels, bias].
  template <typename Store>
  __device__ __forceinline__ void finish(Store store) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k <= kRectangle; ++k) {
      if (k == kRectangle && !has_middle()) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = (g + i / 2 * 8) * (Conv2::kWeights + 1), slot = 2 * t + i % 2;
        if (slot % 4 < 3) {
          store(row + (slot / 4 * 3 + slot % 4) * kTaps + tap(k), sums[k][i]);
        } else if (slot == 3 && tap(k) == 0) {
          store(row + Conv2::kWeights, sums[k][i]);
        }
      }
    }
  }
};

// The gradient of conv2's input: a row of the product is a patch of 2 x 2 positions, a column an input channel, one
// tile for each position; the depth is output channels, tap by tap. A tile's 16 rows are two rows of the image's
// patches, 7 and an empty one: then a row of windows is an operand of all tiles near it, is loaded once for those of a
// warp, and where it would be above or below the image, the product is left out. Beside the windows weights are
// multiplied by zeros, which makes no difference as long as they are finite.
//
// A warp has two tiles: the rows 0 to 3 of an image's patches, or 4 to 6. In 16 bits two warps have an image; in TF32,
// where weights would take twice as many registers, four: two share each half, with 8 of the 16 output channels for
// each, and hand each other the sums of a tile.
template <typename Pass>
struct PooledGradient {
  using T = typename Pass::Stored;
  using Sums = float[2][2][4];  // [dy][dx] of a tile

  uint32_t weights[kTaps][2];

  static LX_DEVICE int warp() { return threadIdx.x / 32; }
  static LX_DEVICE int half() { return warp() % 2; }
  static LX_DEVICE int image() { return Pass::kSharers == 1 ? warp() / 2 : 0; }
  static LX_DEVICE int channels() { return Pass::kSharers == 1 ? 0 : warp() / 2; }  // which half of them

  LX_DEVICE explicit PooledGradient(const T* __restrict__ weight2) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weights[tap][i] = lx::operand_word<T>([&](int k) {
          const int out = (4 * (2 * channels() + i) + t) * Pass::kPerWord + k;
          return g < Conv2::kIn ? weight2[(out * Conv2::kIn + g) * kTaps + tap] : T{0};
        });
      }
    }
  }

  // The block looks whether all weights are finite, as operands; behind a barrier all_finite() says it.
  static __device__ __forceinline__ void look_at(const Pass& pass, const T* __restrict__ weight2) {
    bool finite = true;
    for (int i = threadIdx.x; i < Conv2::kOut * Conv2::kWeights; i += kGradientThreads) {
      finite = finite && 0 * lx::widen(lx::to_operand(weight2[i])) == 0;
    }
    pass.finite[threadIdx.x / 32] = __ballot_sync(0xffffffffu, finite) == 0xffffffffu;
  }
  static LX_DEVICE bool all_finite(const Pass& pass) {
    const Pack<uint32_t, kGradientWarps> finite = lx::load_pack<kGradientWarps>(pass.finite);
    return (finite[0] & finite[1] & finite[2] & finite[3]) != 0;
  }

  // Hands the gradients of a patch's positions in channels 2 t and 2 t + 1, t < 3, to
  // store(image, row, column, t, sums of the position at (dy, dx)). The whole block is here.
  template <typename Store>
  __device__ __forceinline__ void compute(const Pass& pass, const Store& store) const {
    Sums inner = {}, outer = {};  // of the rows 2 and 3, and 0 and 1; or 4 and 5, and 6
    if (half() == 0) {
      multiply<0>(pass, inner, outer);
    } else {
      multiply<1>(pass, inner, outer);
    }
    if constexpr (Pass::kSharers == 1) {
      hand_out(inner, 2 + 2 * half(), store);
      hand_out(outer, 6 * half(), store);
    } else {
      const bool second = channels() == 1;
      auto at = [&](int warp, int i) { return pass.shared_sums + ((warp * 4 + i) * 32 + threadIdx.x % 32) * 4; };
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Pack<float, 4> sent;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float in = inner[i / 2][i % 2][k], out = outer[i / 2][i % 2][k];
          sent.values[k] = second ? in : out;
          inner[i / 2][i % 2][k] = second ? out : in;
        }
        *reinterpret_cast<Pack<float, 4>*>(at(warp(), i)) = sent;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Pack<float, 4> others = lx::load_pack<4>(at(warp() ^ 2, i));
#pragma unroll
        for (int k = 0; k < 4; ++k) inner[i / 2][i % 2][k] += others[k];
      }
      hand_out(inner, second ? 6 * half() : 2 + 2 * half(), store);
    }
  }

 private:
  template <int kHalf>
  __device__ __forceinline__ void multiply(const Pass& pass, Sums& inner, Sums& outer) const {
    const int lane = threadIdx.x % 32;
    const unsigned char* const from =
        pass.grid + (2 * channels() + lane / 16) * Pass::kGridVector +
        (image() * Pass::kGridImage + (2 * kHalf + lane / 8 % 2) * Pass::kGridRow + lane % 8) * kVectorBytes;
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
#pragma unroll
      for (int r = 0; r <= kTap; ++r) {
        // Two rows of windows each, from the inner tile's first on; behind the image's last there are zeros.
        uint32_t first[4], last[4];
        const unsigned char* const rows = from + Pass::grid_plane(plane, r % 2) + r / 2 * kVectorBytes;
        lx::load_matrices(first, reinterpret_cast<const uint32_t*>(rows));
        lx::load_matrices(last, reinterpret_cast<const uint32_t*>(rows + 2 * Pass::kGridRow * kVectorBytes));
        const uint32_t between[4] = {first[1], last[0], first[3], last[2]}, above[4] = {0, first[0], 0, first[2]};
        // Of the products with windows `down` rows below those of the tile's first tap.
        auto add = [&](Sums& sums, const uint32_t (&windows)[4], int down) {
#pragma unroll
          for (int dy = 0; dy < 2; ++dy) {
#pragma unroll
            for (int dx = 0; dx < 2; ++dx) {
              const int i = dy + kTap - 1 - (2 * down + plane), j = dx + kTap - 1 - r;
              if (i < 0 || i >= kTap || j < 0 || j >= kTap) continue;
              const uint32_t (&weight)[2] = weights[i * kTap + j];
              lx::multiply_accumulate<T>(sums[dy][dx], windows, weight[0], weight[1]);
            }
          }
        };
        add(inner, first, 0);
        add(inner, between, 1);
        add(inner, last, 2);
        if constexpr (kHalf == 0) {
          add(outer, above, 1);
          add(outer, first, 2);
        } else {
          add(outer, last, 0);
        }
      }
    }
  }

  template <typename Store>
  static __device__ __forceinline__ void hand_out(const Sums& sums, int first_row, const Store& store) {
    const int x = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (x >= kPatchesInRow || t >= Conv2::kIn / 2) return;  // these lanes have the empty rows and columns
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (first_row + row < kPatchesInRow) {
        store(image(), first_row + row, x, t,
              [&](int dy, int dx) { return Pack<float, 2>{{sums[dy][dx][2 * row], sums[dy][dx][2 * row + 1]}}; });
      }
    }
  }
};

// The same where a weight is not finite: of a position those products alone that it has, zeros of windows included, as
// PyTorch has them. Slow. thread -> a position in a channel, to store(position in its images, sum).
template <typename Pass, typename Store>
__device__ __forceinline__ void compute_without_rim(const Pass& pass, const typename Pass::Stored* __restrict__ weight2,
                                                    int present, const Store& store) {
  using T = typename Pass::Stored;
  constexpr int kMap = Conv2::kSize * Conv2::kSize;
#pragma unroll 1
  for (int at = threadIdx.x; at < present * Conv2::kImage; at += kGradientThreads) {
    const int image = at / Conv2::kImage, channel = at % Conv2::kImage / kMap, y = at % kMap / Conv2::kSize,
              x = at % Conv2::kSize;
    float sum = 0;
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap) {
      const int row = y - tap / kTap, column = x - tap % kTap;
      if (row < 0 || row >= Conv2::kConv || column < 0 || column >= Conv2::kConv) continue;
      const int window = image * Pass::kGridImage + row / 2 * Pass::kGridRow + column / 2 + Pass::kGridRim;
      const unsigned char* const from = pass.grid + Pass::grid_plane(row % 2, column % 2) + window * kVectorBytes;
#pragma unroll 1
      for (int out = 0; out < Conv2::kOut; ++out) {
        const T gradient =
            reinterpret_cast<const T*>(from + out / Pass::kInVector * Pass::kGridVector)[out % Pass::kInVector];
        const T weight = weight2[(out * Conv2::kIn + channel) * kTaps + tap];
        sum += lx::widen(gradient) * lx::widen(lx::to_operand(weight));
      }
    }
    store(at, sum);
  }
}

// Rounded, and to the winners of conv1.
template <typename Pass>
struct ToWinners {
  const Pass& pass;

  template <typename Sums>
  __device__ __forceinline__ void operator()(int image, int y, int x, int t, const Sums& sums) const {
    using T = typename Pass::Stored;
    const int patch = image * kPatchesOfImage + 2 * y * kPatchesInRow + x;  // of two windows
    const unsigned char* const winners =
        pass.winners + t * Pass::kWinnerPair + (image * Conv1::kWindows + (2 * y * kPatchesInRow + x) * 2) * 2;
    unsigned char* const to = pass.patches + patch * Pass::kPatchBytes + t * 2 * sizeof(T);
#pragma unroll
    for (int dy = 0; dy < 2; ++dy) {
      const uint32_t bytes = *reinterpret_cast<const uint32_t*>(winners + dy * Conv1::kPool * 2);
#pragma unroll
      for (int dx = 0; dx < 2; ++dx) {
        const Pack<float, 2> both = sums(dy, dx);
        const lx::Operands<T, 2> values = lx::rounded<T>(both.values);
#pragma unroll
        for (int position = 0; position < 4; ++position) {
          *reinterpret_cast<lx::Operands<T, 2>*>(to + dy * kPatchesInRow * Pass::kPatchBytes +
                                                 Pass::patch_position(dx, position)) =
              won<T>(values, bytes, dx, position);
        }
      }
    }
  }
};

// The sums of conv1's weights and biases over all images of a block: rows are a patch's 48 gradients, columns its 6 x 8
// pixels and ones, the depth the patches. What lies on the band of rows and columns that belong together is, added up,
// the gradient of the weights.
template <typename Pass>
struct Conv1WeightSums {
  using T = typename Pass::Stored;
  using Rows = lx::Transposed<T>;
  static constexpr int kTiles = kPatchPlaces / 16;
  static constexpr int kColumns = kPatchRows * kPatchPixels + 1;  // and ones, for the bias
  static constexpr int kBandFloats = kPatchPlaces * kColumns;

  float sums[kTiles][kPatchRows + 1][4] = {};

  // Whether some of a tile's positions, which are in the upper row, or the lower one, or both, meet some of these
  // pixels: the last are the ones.
  static LX_DEVICE constexpr bool meet(int tile, int row) {
    constexpr int kOfRow = kPatchPlaces / 2;
    return row == kPatchRows || (row >= tile * 16 / kOfRow && row < (tile * 16 + 15) / kOfRow + kTap);
  }

  __device__ __forceinline__ void add(const Pass& pass) {
    constexpr int kHalf = 8 * sizeof(T);  // of the rows of a tile, in bytes
    const int warp = threadIdx.x / 32;
    const uint32_t ones = lx::operand_word<T>([](int) { return lx::narrow<T>(1.0f); });
    const unsigned char* const patches = pass.patches + Rows::column(kVectorBytes);
    const unsigned char* const pixels = pass.pixels + Rows::column(kVectorBytes);
#pragma unroll 1
    for (int step = warp; step < Pass::kDepthSteps; step += kGradientWarps) {
      const uint32_t* const depths = pass.depths + step * Pass::kStep + Rows::row();
      const unsigned char *of_a[Rows::kNamed], *of_x[Rows::kNamed];
#pragma unroll
      for (int i = 0; i < Rows::kNamed; ++i) {
        const int matrix = Rows::matrix(i);
        of_a[i] = patches + (depths[matrix / 2 * Rows::kRows] & 0xffffu) + matrix % 2 * kHalf;
        of_x[i] = pixels + (depths[matrix % 2 * Rows::kRows] >> 16) + matrix / 2 * Pass::kPixelRow;
      }
      uint32_t a[kTiles][4], x[kPatchRows / 2][4];  // of x, two rows each
#pragma unroll
      for (int i = 0; i < kTiles; ++i) lx::load_transposed<T>(a[i], of_a, i * 2 * kHalf);
#pragma unroll
      for (int i = 0; i < kPatchRows / 2; ++i) lx::load_transposed<T>(x[i], of_x, i * 2 * Pass::kPixelRow);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int row = 0; row < kPatchRows; ++row) {
          if (!meet(tile, row)) continue;
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
          for (int k = 0; k < kPatchRows; ++k) {
            if (meet(tile, k)) add(row + k * kPatchPixels + 2 * t + i % 2, sums[tile][k][i]);
          }
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
        const int y = place / 4, x = place % 4;
        const int column = tap == kTaps ? kColumns - 1 : (y + tap / kTap) * kPatchPixels + x + tap % kTap;
        sum += band[(place * Conv1::kOut + channel) * kColumns + column];
      }
      store(at, sum);
    }
  }
};

}  // namespace lenet_ext::cuda
