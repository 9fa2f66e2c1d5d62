// The gradients of LeNet's convolutions, cut into what a block of 256 threads does with some images in shared memory.
// Pointers to gradients and codes point at the first of these images; gradients may lie in shared memory as well.
//
// Three of four products of a dense gradient are with zeros, and to skip them a thread needs an operand that depends on
// the winner. Loaded from shared memory, a word for each multiply-add, of which a multiprocessor loads 32 a clock and
// computes 128, that gains nothing for the gradients of the weights: counted 2,000 clocks an image for conv2's and 928
// for conv1's, where dense tiles in registers take 2,420 and 1,150, of which 1,880 and 920 are multiply-adds. Both
// gradients of conv2 have another way: the operands of all four winners that are possible lie in registers, and a warp,
// which goes through one image, branches to those that it needs. conv1's are dense: with one input channel a winner has
// 25 products, less than one for each lane, and the branches would take longer than what they save.
#pragma once

#include "lenet_tiles.cuh"

namespace lenet_ext::cuda {

constexpr unsigned kGradThreads = 256;

// A block sums one contiguous slice of the batch; how many there are depends on the batch alone, so the result does not
// depend on the GPU. 256 is two for each multiprocessor of the largest.
constexpr int64_t kMostSlices = 256;

struct Slices {
  int64_t count, images;
  explicit Slices(int64_t batch) {
    images = lx::divide_up(batch, kMostSlices);
    count = images == 0 ? 0 : lx::divide_up(batch, images);
  }
};

// ------------------------------------------------------------------------------------------ gradient of conv2's input

// A warp goes from window to window, each with its winner in 16 channels. Weights and sums stay in registers: lane ->
// an input channel and a row of the kernel, 30 of 32. For each output channel the whole warp branches on the row of the
// winner, of which there is none where ReLU is closed. In that row it multiplies both columns, one of them by zero: to
// branch once more takes as many instructions as the five products that it would save.
//
// Counted for an image, and clocks of a multiprocessor, with every ReLU open: the winners have 60,000 multiply-adds, in
// 30 lanes and with the other column 4,000 instructions, 1,000 clocks. A window takes 287 instructions of sm_90, 160 of
// them multiply-adds, the whole 7,900, which is 1,980 clocks; shared memory 1,600 at most, if to broadcast 16 bytes
// takes it 4. A channel without a winner takes 4 to 5 instructions instead of 13 to 15.
// Others: tiles of the dense gradient with a border of zeros took 4,480, of whose 470,400 products 51% touch a window;
// without the border its 240,000 would take 1,875, were there nothing else to do. A word from shared memory for each
// product takes 1,875, or 2,700 where a pixel asks all windows of 6 x 6 that reach it. Four branches for the four
// positions: 12 to 13 instructions a channel for 13 to 15, and the compiler makes predicates of them, 17.

// What a lane has: the place of one input channel and one kernel row. The last two lanes do as the 30th does.
struct LanePlace {
  static constexpr int kPlaces = Conv2::kIn * kTap;
  int channel, row;
  bool own;

  LX_DEVICE explicit LanePlace(int lane) {
    const int place = lane < kPlaces ? lane : kPlaces - 1;
    channel = place % Conv2::kIn, row = place / Conv2::kIn, own = lane < kPlaces;
  }
  // `weights`: [out][in][tap]; those of the first output channel.
  LX_DEVICE const float* of(const float* weights) const { return weights + channel * kTaps + row * kTap; }
};

// Of a window whose winner is in this row, on the left or on the right: one of the gradients is zero.
LX_DEVICE void add_row(float (&sums)[kTap + 1], const float (&weights)[kTap], float left, float right) {
#pragma unroll
  for (int j = 0; j < kTap; ++j) sums[j] += left * weights[j];
#pragma unroll
  for (int j = 0; j < kTap; ++j) sums[j + 1] += right * weights[j];
}

// The gradients in the winners' rows, in shared memory: [window][out][left, right], and room for a byte for each
// channel.
constexpr int kWindowPitch = 2 * Conv2::kOut + Conv2::kOut / 4, kRowPairs = Conv2::kWindows * kWindowPitch;

// In 1, 2, 4 or 8 images by one block; of kKept output channels a lane keeps the weights in registers.
template <int kImages, int kKept = Conv2::kOut>
struct GradInput {
  using L = Conv2;
  using Sums = float[2][kTap + 1];  // of a lane, for the winners of the upper and of the lower row of a window
  static constexpr int kWarps = kGradThreads / 32;
  static constexpr int kParts = kWarps / kImages;  // an image's windows are cut into so many runs, a warp for each
  static LX_DEVICE constexpr int first_window(int part) { return part * L::kWindows / kParts; }
  static LX_DEVICE constexpr int first_row(int part) { return first_window(part) / L::kPool * 2; }

  // A warp's sums: of each channel the rows that its windows reach, 14, 10 or 8.
  static constexpr int kRows = kParts == 1 ? L::kSize : kParts == 2 ? 10 : 8;
  static constexpr int kPlane = kParts <= 2 ? kRows * L::kSize : kRows * L::kSize + 4;  // lanes in different banks
  static constexpr int kPlanes = L::kIn * kPlane;
  static constexpr bool rows_suffice() {
    for (int part = 0; part < kParts; ++part) {
      const int last_row = (first_window(part + 1) - 1) / L::kPool * 2 + kTap;
      if (last_row >= first_row(part) + kRows) return false;
    }
    return true;
  }
  static_assert(rows_suffice());
  static constexpr int kFloats = kImages * kRowPairs + kWarps * kPlanes;

  // Hands the gradients of four pixels at a time, of the `present` first images, to store(position, gradients).
  // `region`: shared, kFloats, free. `weights`: shared, [out][in][tap].
  template <typename T, typename Store>
  static __device__ __forceinline__ void compute(float* region, const T* grad_output, const uint8_t* indices,
                                                 int present, const float* weights, Store store) {
    const int thread = lx::thread_read_here(), lane = thread % 32, warp = thread / 32;
    const int image = warp / kParts, part = warp % kParts;
    float* const rows = region + image * kRowPairs;
    float* const all_planes = region + kImages * kRowPairs;
    if (image < present) {
      const int from = image * L::kPooled;
      if (lane < L::kWindows) expand_rows(rows, grad_output + from, indices + from, lane, part);
      float* const planes = all_planes + warp * kPlanes;
      for (int i = lane; i < kPlanes / 4; i += 32) reinterpret_cast<lx::Pack<float, 4>*>(planes)[i] = {};
    }
    sync_image();
    if (image < present) {
      const bool finite = add_windows(all_planes, rows, indices + image * L::kPooled, weights);
      if (!finite) add_zeros(all_planes, indices, weights);
    }
    sync_image();
    if (lx::thread_read_here() / (32 * kParts) < present) hand_over(all_planes, store);
  }

  // Adds the planes of an image's parts, in order.
  template <typename Store>
  static __device__ __forceinline__ void hand_over(const float* all_planes, Store store) {
    const int thread = lx::thread_read_here(), image = thread / (32 * kParts);
#pragma unroll 1
    for (int i = thread % (32 * kParts); i < L::kImage / 4; i += kParts * 32) {
      constexpr int kMap = L::kSize * L::kSize;
      const int channel = lx::small_quotient<kMap / 4>(i), pixel = 4 * i - channel * kMap;
      const float* from = all_planes + image * kParts * kPlanes + channel * kPlane + pixel;
      float sums[4] = {};
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const int at = pixel - first_row(p) * L::kSize;  // a multiple of 4, as the ends are
        if (kParts > 1 && (at < 0 || at >= kRows * L::kSize)) continue;
        const lx::Pack<float, 4> pack = lx::load_pack<4>(from + p * kPlanes - first_row(p) * L::kSize);
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[k] += pack[k];
      }
      store(image * L::kImage + 4 * i, sums);
    }
  }

  // The warps of an image wait for each other.
  static __device__ __forceinline__ void sync_image() {
    if constexpr (kParts == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // lane -> a window. The warp writes the gradients of its part of the output channels, of all windows.
  template <typename T>
  static __device__ __forceinline__ void expand_rows(float* rows, const T* grad_output, const uint8_t* indices,
                                                     int lane, int part) {
    constexpr int kChannels = L::kOut / kParts;
    const int from = part * kChannels * L::kWindows + lane;
    float* to = rows + lane * kWindowPitch + part * kChannels * 2;
#pragma unroll
    for (int o = 0; o < kChannels; o += 2) {
      float pairs[4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int code = indices[from + (o + k) * L::kWindows];
        const float value = lx::widen(grad_output[from + (o + k) * L::kWindows]);
        pairs[2 * k] = code % 2 == 0 ? value : 0.0f;
        pairs[2 * k + 1] = code % 2 != 0 ? value : 0.0f;
      }
      *reinterpret_cast<lx::Pack<float, 4>*>(to + 2 * o) = {{pairs[0], pairs[1], pairs[2], pairs[3]}};
    }
  }

  // The warp adds what the windows of its part give to its planes. Whether all weights are finite.
  static __device__ __forceinline__ bool add_windows(float* all_planes, const float* rows, const uint8_t* indices,
                                                     const float* weights) {
    const int thread = lx::thread_read_here(), lane = thread % 32, part = thread / 32 % kParts;
    const LanePlace place(lane);
    float kept[kKept][kTap], zero = 0;
#pragma unroll
    for (int o = 0; o < L::kOut; ++o) {
#pragma unroll
      for (int j = 0; j < kTap; ++j) {
        const float weight = place.of(weights)[o * L::kWeights + j];
        if (o < kKept) kept[o][j] = weight;
        zero += 0 * weight;
      }
    }
    const bool finite = __ballot_sync(0xffffffffu, zero == 0) == 0xffffffffu;

    int window = first_window(part), column = window % L::kPool;
    const int end = first_window(part + 1);
    float* to = place_of(all_planes + thread / 32 * kPlanes, place, part, window);
    const uint8_t* codes = indices + lane % L::kOut * L::kWindows;
    int code = codes[window];
    rows += window * kWindowPitch;
    Sums sums = {};
#pragma unroll 1
    for (; window < end; ++window) {
      // A bit for each output channel: whether the winner is in this row.
      const unsigned upper = __ballot_sync(0xffffffffu, code < 2);
      const unsigned lower = __ballot_sync(0xffffffffu, (code & ~1) == 2);
      if (window + 1 < end) code = codes[window + 1];
#pragma unroll
      for (int o = 0; o < L::kOut; o += 2) {
        const lx::Pack<float, 4> pairs = lx::load_pack<4>(rows + 2 * o);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float w[kTap];
#pragma unroll
          for (int j = 0; j < kTap; ++j) {
            w[j] = o + k < kKept ? kept[o + k < kKept ? o + k : 0][j] : place.of(weights)[(o + k) * L::kWeights + j];
          }
          if (upper >> (o + k) & 1u) {
            add_row(sums[0], w, pairs[2 * k], pairs[2 * k + 1]);
          } else if (lower >> (o + k) & 1u) {
            add_row(sums[1], w, pairs[2 * k], pairs[2 * k + 1]);
          }
        }
      }
      put_columns<0>(to, sums, place.own);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int j = 0; j <= kTap; ++j) sums[row][j] = j + 2 <= kTap ? sums[row][j + 2] : 0.0f;
      }
      to += 2, rows += kWindowPitch, ++column;
      if (column == L::kPool || window + 1 == end) {
        put_columns<0>(to, sums, place.own);
        put_columns<2>(to + 2, sums, place.own);
        for (int j = 0; j <= kTap; ++j) sums[0][j] = sums[1][j] = 0;
        to += 2 * L::kSize - 2 * L::kPool, column = 0;
      }
    }
    return finite;
  }

  // Adds two columns of the sums to the planes: the upper rows of all lanes, then the lower ones, which are the next
  // lanes' upper ones.
  template <int kFirst>
  static __device__ __forceinline__ void put_columns(float* to, const Sums& sums, bool own) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (own) {
        const lx::Pack<float, 2> old = lx::load_pack<2>(to + row * L::kSize);
        *reinterpret_cast<lx::Pack<float, 2>*>(to + row * L::kSize) = {
            {old[0] + sums[row][kFirst], old[1] + sums[row][kFirst + 1]}};
      }
      __syncwarp();
    }
  }

  // Adds the products of all weights with the zeros of the windows, which are NaN where a weight is not finite: PyTorch
  // has them.
  static __device__ __forceinline__ void add_zeros(float* all_planes, const uint8_t* indices, const float* weights) {
    const int thread = lx::thread_read_here(), warp = thread / 32, part = warp % kParts;
    const LanePlace place(thread % 32);
    indices += warp / kParts * L::kPooled;
#pragma unroll 1
    for (int window = first_window(part); window < first_window(part + 1); ++window) {
      Sums sums = {};
#pragma unroll 1
      for (int o = 0; o < L::kOut; ++o) {
        const int code = indices[o * L::kWindows + window];
#pragma unroll
        for (int j = 0; j < kTap; ++j) {
          const float product = 0 * place.of(weights)[o * L::kWeights + j];
#pragma unroll
          for (int position = 0; position < 4; ++position) {
            if (code != position) sums[position / 2][position % 2 + j] += product;
          }
        }
      }
      float* to = place_of(all_planes + warp * kPlanes, place, part, window);
      put_columns<0>(to, sums, place.own);
      put_columns<2>(to + 2, sums, place.own);
      put_columns<4>(to + 4, sums, place.own);
    }
  }

  // Where the sums of a window's upper row belong.
  static LX_DEVICE float* place_of(float* planes, const LanePlace& place, int part, int window) {
    const int row = window / L::kPool * 2 - first_row(part) + place.row;
    return planes + place.channel * kPlane + row * L::kSize + window % L::kPool * 2;
  }
};

// ------------------------------------------------------------------------------- gradients of the weights and biases

// Sums over images, in the order [out channel][taps of all input channels, bias].

// conv1. thread -> three channels and every 128th window: 25 weights and a bias each, 78 sums. It holds two rows of the
// 6 x 6 patch under the window, and the window's gradient with zeros where no winner is: dense arithmetic, because a
// gather from the winner would take a load from shared memory for each multiply-add, at a quarter of their rate. At the
// end each sum is added over the group's 128 threads, 16 sums at a time, 8 threads to one result.
struct Conv1GradWeight {
  using L = Conv1;
  static constexpr int kGroups = 2;  // the channels are cut in two groups of three
  static constexpr int kChannels = L::kOut / kGroups;
  static constexpr int kSums = kChannels * (kTaps + 1);  // 78 sums of a thread
  static constexpr int kGroupThreads = kGradThreads / kGroups;
  static constexpr int kReduced = 16;                    // of them, reduced over the block at once
  static constexpr int kReducePitch = kGradThreads + 8;  // four rows that a warp reads lie in different banks
  static constexpr int kReducedFloats = kReduced * kReducePitch;

  float sums[kSums] = {};  // [channel][tap, bias]

  // For the weights of one input channel: `plane` is its first image's, the next image's is `pitch` later.
  template <typename T>
  LX_DEVICE void add(const float* plane, int pitch, const T* grad_output, const uint8_t* indices, int present) {
    const int group = threadIdx.x / kGroupThreads, member = threadIdx.x % kGroupThreads;
#pragma unroll 1
    for (int item = member; item < present * L::kWindows; item += kGroupThreads) {
      const int image = item / L::kWindows, window = item % L::kWindows;
      float gradient[kChannels][4];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const int from = image * L::kPooled + (group * kChannels + c) * L::kWindows + window;
        const int code = indices[from];
        const float value = lx::widen(grad_output[from]);
        expand_window(gradient[c], value, code);
        sums[c * (kTaps + 1) + kTaps] += code == kDead ? 0.0f : value;
      }
      const float* corner = plane + image * pitch + window / L::kPool * 2 * L::kSize + window % L::kPool * 2;
      float rows[2][kTap + 1];
      load_row(rows[0], corner);
#pragma unroll
      for (int i = 0; i < kTap; ++i) {
        load_row(rows[(i + 1) % 2], corner + (i + 1) * L::kSize);
        const float (&top)[kTap + 1] = rows[i % 2], (&bottom)[kTap + 1] = rows[(i + 1) % 2];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
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

  // Hands each sum over the block to store(position, sum), in one thread. `reduced`: shared, kReducedFloats, free as
  // soon as the whole block is here.
  template <typename Store>
  __device__ __forceinline__ void finish(float* reduced, Store store) {
    constexpr int kHelpers = kGradThreads / (kReduced * kGroups);  // 8 threads add up one result
    const int result = threadIdx.x / kHelpers, helper = threadIdx.x % kHelpers;
    const int result_group = result / kReduced, result_sum = result % kReduced;
#pragma unroll
    for (int base = 0; base < kSums; base += kReduced) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kReduced; ++i) {
        if (base + i < kSums) reduced[i * kReducePitch + threadIdx.x] = sums[base + i];
      }
      __syncthreads();
      float sum = 0;
      if (base + result_sum < kSums) {
        for (int i = helper; i < kGroupThreads; i += kHelpers) {
          sum += reduced[result_sum * kReducePitch + result_group * kGroupThreads + i];
        }
      }
#pragma unroll
      for (int distance = kHelpers / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      if (helper == 0 && base + result_sum < kSums) store(result_group * kSums + base + result_sum, sum);
    }
  }
};

// conv2. As for the gradient of the input, a warp goes from window to window and branches on the row of the winner,
// here in some of the output channels; the pixels under the window and the sums stay in registers. lane -> an input
// channel and a row of the kernel, as there; the 31st sees nothing but ones, and so adds up the biases.
//
// Counted for an image with every ReLU open: a window takes a warp 144 instructions, 80 of them multiply-adds, the
// whole 7,200, which is 1,800 clocks; shared memory 1,450 at most. Without a winner a channel takes 4 instructions
// instead of 13 or 14: with half of them closed it is 1,350 clocks. With 16 channels a warp there are 11% fewer, but
// only 16 warps by registers, where here are 24, and the sums of eight parts to be added.

// The block writes the gradients in the winners' rows, kRowPairs an image, and behind those of a window its codes, a
// byte for each channel.
LX_DEVICE uint8_t* codes_of(float* window) { return reinterpret_cast<uint8_t*>(window + 2 * Conv2::kOut); }
LX_DEVICE const uint8_t* codes_of(const float* window) {
  return reinterpret_cast<const uint8_t*>(window + 2 * Conv2::kOut);
}
template <typename T>
LX_DEVICE void expand_rows_and_codes(float* rows, const T* grad_output, const uint8_t* indices, int present) {
  using L = Conv2;
  for (int i = threadIdx.x; i < present * L::kPooled; i += blockDim.x) {
    const int code = indices[i];
    const float value = lx::widen(grad_output[i]);
    const int plane = lx::small_quotient<L::kWindows>(i), window = i - plane * L::kWindows;  // of image and channel
    float* const of_window = rows + (plane / L::kOut * L::kWindows + window) * kWindowPitch;
    const int channel = plane % L::kOut;
    *reinterpret_cast<lx::Pack<float, 2>*>(of_window + 2 * channel) = {
        {code % 2 == 0 ? value : 0.0f, code % 2 != 0 ? value : 0.0f}};
    codes_of(of_window)[channel] = static_cast<uint8_t>(code);
  }
}

// Whether those of `count` values, a multiple of 4 in shared memory, are finite that this thread looks at; each of them
// is some thread's.
LX_DEVICE bool all_finite(const float* values, int count) {
  float zero = 0;
  for (int i = threadIdx.x * 4; i < count; i += blockDim.x * 4) {
    const lx::Pack<float, 4> pack = lx::load_pack<4>(values + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) zero += 0 * pack[k];
  }
  return zero == 0;
}

// In a block of kThreads, whose images have planes of pixels kPlane apart.
template <unsigned kThreads, int kPlane>
struct Conv2GradWeight {
  using L = Conv2;
  static constexpr int kParts = 4;                             // into which the windows of all images are cut
  static constexpr int kWarpsOfPart = kThreads / 32 / kParts;  // which share the output channels
  static constexpr int kChannels = L::kOut / kWarpsOfPart;     // of a warp
  static constexpr int kSums = L::kOut * (L::kWeights + 1);
  static constexpr int kPartialFloats = kParts / 2 * kSums;

  float sums[kChannels][kTap] = {};

  // What a thread has.
  struct Share {
    static constexpr int kPlaces = L::kIn * kTap;
    int part, first_channel, in_channel, tap_row, first_pixel;
    bool bias, own;

    LX_DEVICE Share() {
      const int thread = lx::thread_read_here(), lane = thread % 32, warp = thread / 32;
      part = warp % kParts, first_channel = warp / kParts * kChannels;
      const int place = lane < kPlaces ? lane : kPlaces - 1;
      // In this order fewest lanes read from the same bank: none with padded planes, otherwise two.
      constexpr bool kPadded = kPlane > L::kSize * L::kSize;
      in_channel = kPadded ? place / kTap : place % L::kIn, tap_row = kPadded ? place % kTap : place / L::kIn;
      first_pixel = in_channel * kPlane + tap_row * L::kSize;
      bias = lane == kPlaces, own = lane < kPlaces;
    }
    LX_DEVICE int begin(int present) const { return present * L::kWindows * part / kParts; }
    LX_DEVICE int end(int present) const { return present * L::kWindows * (part + 1) / kParts; }
  };

  // From the pixels of the first window to those of window `item`, of all images.
  static LX_DEVICE int pixels_before(int item) {
    return item * 2 + lx::small_quotient<L::kPool>(item) * 2 * (L::kSize - L::kPool) +
           lx::small_quotient<L::kWindows>(item) * (L::kIn * kPlane - L::kPool * 2 * L::kSize);
  }

  // The pixels that a thread sees of a window, the first of which is `corner`.
  static LX_DEVICE void load(float (&rows)[2][kTap + 1], const float* corner, bool bias) {
    load_row(rows[0], corner);
    load_row(rows[1], corner + L::kSize);
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = lx::computed_here(bias ? 1.0f : rows[i / 2][i % 2]);
  }

  // `pixels` and `rows`, as expand_rows_and_codes writes them, are in shared memory. All pixels are finite, or
  // add_zeros() is called as well.
  __device__ __forceinline__ void add(const float* pixels, const float* rows, int present) {
    const Share share;
    const int begin = share.begin(present), end = share.end(present);
    pixels += share.first_pixel;
    rows += begin * kWindowPitch;
    const int lanes_code = share.first_channel + lx::thread_read_here() % kChannels;
#pragma unroll 1
    for (int item = begin; item < end; ++item) {
      // A bit for each channel: whether the winner is in this row.
      const int code = codes_of(rows)[lanes_code];
      const unsigned upper = __ballot_sync(0xffffffffu, code < 2);
      const unsigned lower = __ballot_sync(0xffffffffu, (code & ~1) == 2);
      float seen[2][kTap + 1];
      load(seen, pixels + pixels_before(item), share.bias);
#pragma unroll
      for (int c = 0; c < kChannels; c += 2) {
        const lx::Pack<float, 4> pairs = lx::load_pack<4>(rows + 2 * (share.first_channel + c));
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (upper >> (c + k) & 1u) {
            add_row(sums[c + k], seen[0], pairs[2 * k], pairs[2 * k + 1]);
          } else if (lower >> (c + k) & 1u) {
            add_row(sums[c + k], seen[1], pairs[2 * k], pairs[2 * k + 1]);
          }
        }
      }
      rows += kWindowPitch;
    }
  }

  static LX_DEVICE void add_row(float (&sums)[kTap], const float (&pixels)[kTap + 1], float left, float right) {
#pragma unroll
    for (int j = 0; j < kTap; ++j) sums[j] += left * pixels[j];
#pragma unroll
    for (int j = 0; j < kTap; ++j) sums[j] += right * pixels[j + 1];
  }

  // Adds the products of all pixels with the zeros of the windows, which are NaN where a pixel is not finite: PyTorch
  // has them.
  __device__ __forceinline__ void add_zeros(const float* pixels, const float* rows, int present) {
    const Share share;
    const int end = share.end(present);
    unsigned reached[kTap] = {};  // by a NaN, a bit for each channel
#pragma unroll 1
    for (int item = share.begin(present); item < end; ++item) {
      float seen[2][kTap + 1];
      load(seen, pixels + share.first_pixel + pixels_before(item), share.bias);
      unsigned nan = 0;  // a bit for each tap at each of the four positions
#pragma unroll
      for (int i = 0; i < 4 * kTap; ++i) {
        const int position = i / kTap, j = i % kTap;
        if (lx::is_nan(0 * seen[position / 2][position % 2 + j])) nan |= 1u << i;
      }
      const uint8_t* codes = codes_of(rows + item * kWindowPitch) + share.first_channel;
#pragma unroll 1
      for (int c = 0; c < kChannels; ++c) {
        unsigned of_zeros = codes[c] == kDead ? nan : nan & ~(31u << codes[c] * kTap);
        of_zeros |= of_zeros >> 2 * kTap;
        of_zeros |= of_zeros >> kTap;
#pragma unroll
        for (int j = 0; j < kTap; ++j) reached[j] |= (of_zeros >> j & 1u) << c;
      }
    }
#pragma unroll
    for (int i = 0; i < kChannels * kTap; ++i) {
      if (reached[i % kTap] >> i / kTap & 1u) sums[i / kTap][i % kTap] = NAN;
    }
  }

  // Hands each sum over the block to store(position, sum), in one thread. `partial`: shared, kPartialFloats, free.
  template <typename Store>
  __device__ __forceinline__ void finish(float* partial, Store store) const {
    const Share share;
    float* const to = partial + share.part % (kParts / 2) * kSums + share.first_channel * (L::kWeights + 1) +
                      (share.bias ? L::kWeights : share.in_channel * kTaps + share.tap_row * kTap);
    // The second half of the parts, then the first one in the same place, which is half of the shared memory.
#pragma unroll
    for (int half = 1; half >= 0; --half) {
      if (share.part / (kParts / 2) == half) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
#pragma unroll
          for (int j = 0; j < kTap; ++j) {
            float* const sum = to + c * (L::kWeights + 1) + j;
            if (share.own || (share.bias && j == 0)) *sum = half == 1 ? sums[c][j] : *sum + sums[c][j];
          }
        }
      }
      __syncthreads();
    }
    for (int i = threadIdx.x; i < kSums; i += kThreads) {
      float sum = partial[i];
#pragma unroll
      for (int p = 1; p < kParts / 2; ++p) sum += partial[p * kSums + i];
      store(i, sum);
    }
  }
};

}  // namespace lenet_ext::cuda
