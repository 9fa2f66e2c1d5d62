// The gradients of LeNet's convolutions, cut into what a block of 256 threads does with some images in shared memory.
// Pointers to gradients and codes point at the first of these images; gradients may lie in shared memory as well.
//
// Three of four products of a dense gradient are with zeros, and to skip them a thread needs an operand that depends on
// the winner. Loaded from shared memory, a word for each multiply-add, of which a multiprocessor loads 32 a clock and
// computes 128, that gains nothing for the gradients of the weights: counted 2,000 clocks an image for conv2's and 928
// for conv1's, where dense tiles in registers take 1,880 and 920. The gradient of conv2's input has another way.
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
  // The gradients in the winners' rows: [window][out][left, right].
  static constexpr int kWindowPitch = 2 * L::kOut + 4;
  static constexpr int kRowPairs = L::kWindows * kWindowPitch;
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

// The block writes the gradients of conv2's outputs [images][out][10][10].
template <typename T>
LX_DEVICE void expand_maps(float* maps, const T* grad_output, const uint8_t* indices, int present) {
  using L = Conv2;
  for (int i = threadIdx.x; i < present * L::kPooled; i += kGradThreads) {
    float gradient[4];
    expand_window(gradient, lx::widen(grad_output[i]), indices[i]);
    const int window = i % L::kWindows, plane = i / L::kWindows;  // of image and channel
    float* to = maps + plane * L::kConv * L::kConv + window / L::kPool * 2 * L::kConv + window % L::kPool * 2;
    *reinterpret_cast<lx::Pack<float, 2>*>(to) = {{gradient[0], gradient[1]}};
    *reinterpret_cast<lx::Pack<float, 2>*>(to + L::kConv) = {{gradient[2], gradient[3]}};
  }
}

// conv2. thread -> four output channels and one kernel row of one input channel, in every second row of the maps: 20
// sums, over rows of 14 pixels and 10 gradients held in registers (27 loads of 8 bytes for 200 multiply-adds). The
// threads 240 to 255 add up the biases. The sums of even and odd rows are added at the end.
struct Conv2GradWeight {
  using L = Conv2;
  static constexpr int kLanes = 2;                              // even and odd rows
  static constexpr int kChannels = 4;                           // output channels of a thread
  static constexpr int kRows = L::kIn * kTap;                   // (input channel, kernel row)
  static constexpr int kWorkers = L::kOut / kChannels * kRows;  // 120 of one lane
  static constexpr int kBiasThreads = kLanes * kWorkers;        // the first of 16
  static constexpr int kOtherFloats = kWorkers * kChannels * kTap;
  static_assert(kBiasThreads + L::kOut <= static_cast<int>(kGradThreads), "a thread for each bias");

  float sums[kChannels][kTap] = {}, bias_sum = 0;

  LX_DEVICE void add(const float* pixels, const float* maps, int present) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread / kWorkers, worker = thread % kWorkers;
    if (lane >= kLanes) {
      for (int image = 0; image < present; ++image) {
        const float* map = maps + image * L::kMap + (thread - kBiasThreads) * L::kConv * L::kConv;
        for (int i = 0; i < L::kConv * L::kConv; ++i) bias_sum += map[i];
      }
      return;
    }
    const int first_channel = worker / kRows * kChannels, in_channel = worker % kRows / kTap, tap_row = worker % kTap;
#pragma unroll 1
    for (int line = lane; line < present * L::kConv; line += kLanes) {
      const int image = line / L::kConv, y = line % L::kConv;
      float row[L::kSize];
#pragma unroll
      for (int x = 0; x < L::kSize; x += 2) {
        const lx::Pack<float, 2> pair =
            lx::load_pack<2>(pixels + image * L::kImage + (in_channel * L::kSize + y + tap_row) * L::kSize + x);
        row[x] = pair[0];
        row[x + 1] = pair[1];
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float* map = maps + image * L::kMap + ((first_channel + c) * L::kConv + y) * L::kConv;
#pragma unroll
        for (int x = 0; x < L::kConv; x += 2) {
          const lx::Pack<float, 2> gradient = lx::load_pack<2>(map + x);
#pragma unroll
          for (int j = 0; j < kTap; ++j) {
            sums[c][j] += gradient[0] * row[x + j];
            sums[c][j] += gradient[1] * row[x + 1 + j];
          }
        }
      }
    }
  }

  // Hands each sum over the block to store(position, sum), in one thread. `other_lane`: shared, kOtherFloats, not in
  // the place of what add() reads.
  template <typename Store>
  __device__ __forceinline__ void finish(float* other_lane, Store store) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread / kWorkers, worker = thread % kWorkers;
    const int first_channel = worker / kRows * kChannels, in_channel = worker % kRows / kTap, tap_row = worker % kTap;
    if (lane == 1) {
#pragma unroll
      for (int i = 0; i < kChannels * kTap; ++i) other_lane[i * kWorkers + worker] = sums[i / kTap][i % kTap];
    }
    __syncthreads();
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kChannels * kTap; ++i) {
        store((first_channel + i / kTap) * (L::kWeights + 1) + in_channel * kTaps + tap_row * kTap + i % kTap,
              sums[i / kTap][i % kTap] + other_lane[i * kWorkers + worker]);
      }
    }
    if (lane >= kLanes) store((thread - kBiasThreads) * (L::kWeights + 1) + L::kWeights, bias_sum);
  }
};

}  // namespace lenet_ext::cuda
