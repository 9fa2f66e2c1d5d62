// What a block of 512 threads does with one image of LeNet in shared memory. Few images leave each multiprocessor one
// block at most, which waits for latencies and barriers more than it computes, so that here the work of a layer is cut
// for twice the threads that the other tiles have (lenet_tiles.cuh, lenet_linear_tiles.cuh, lenet_grad_tiles.cuh).
// Sums of the forward pass have the same order as there.
#pragma once

#include "async_copy.cuh"
#include "lenet_grad_tiles.cuh"
#include "lenet_linear_tiles.cuh"

namespace lenet_ext::cuda {

constexpr int kImageThreads = 512;

// ------------------------------------------------------------------------------------------------------- convolutions

// A convolution's weights in shared memory: [out][in], and in each plane 5 rows of 5. Rows are 8 apart, so that a row
// is a load of 16 bytes and one of 4, planes 44, so that any 8 neighbours of [row][in], of conv2, lie in different
// banks.
template <typename L>
struct SpreadWeights {
  static constexpr int kRow = 8, kPlane = 44, kFloats = L::kOut * L::kIn * kPlane;
  static constexpr int kAll = L::kOut * L::kWeights;

  // All of a thread's loads are on their way at once. Whether what it has copied is finite.
  template <typename T>
  static LX_DEVICE bool copy(float* to, const T* __restrict__ weight) {
    constexpr int kEach = lx::divide_up(kAll, kImageThreads);
    float values[kEach], zero = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kImageThreads;
      values[k] = i < kAll ? lx::widen(weight[i]) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kImageThreads;
      const int plane = lx::small_quotient<kTaps>(i), tap = i - plane * kTaps, row = lx::small_quotient<kTap>(tap);
      if (i < kAll) to[plane * kPlane + row * kRow + tap - row * kTap] = values[k];
      zero += 0 * values[k];
    }
    return zero == 0;
  }

  static LX_DEVICE void load_row(float (&row)[kTap], const float* from) {
    const lx::Pack<float, 4> pack = lx::load_pack<4>(from);
#pragma unroll
    for (int j = 0; j < 4; ++j) row[j] = pack[j];
    row[4] = from[4];
  }
};

// The block computes a layer, and hands each pooled output to store(channel, window, winner), as pool_window makes it.
// thread -> a window and 3 channels of conv1 or one of conv2: 392 and 400 threads. `weights`: as SpreadWeights has
// them.
template <typename L, typename Store>
LX_DEVICE void convolve_image(const float* pixels, const float* weights, const float* biases, Store store) {
  using W = SpreadWeights<L>;
  constexpr int kChannels = L::kOut == Conv1::kOut ? 3 : 1;
  static_assert(L::kWindows * L::kOut / kChannels <= kImageThreads);
  const int item = lx::thread_read_here();
  const int first_channel = item / L::kWindows * kChannels, window = item % L::kWindows;
  if (first_channel >= L::kOut) return;
  const float* corner = pixels + window / L::kPool * 2 * L::kSize + window % L::kPool * 2;
  weights += first_channel * L::kIn * W::kPlane;
  float sums[4][kChannels];
#pragma unroll
  for (int i = 0; i < 4 * kChannels; ++i) sums[i / kChannels][i % kChannels] = biases[first_channel + i % kChannels];
#pragma unroll 1
  for (int in = 0; in < L::kIn; ++in, corner += L::kSize * L::kSize, weights += W::kPlane) {
    float rows[2][kTap + 1];
    load_row(rows[0], corner);
#pragma unroll
    for (int i = 0; i < kTap; ++i) {
      load_row(rows[(i + 1) % 2], corner + (i + 1) * L::kSize);
      const float (&top)[kTap + 1] = rows[i % 2], (&bottom)[kTap + 1] = rows[(i + 1) % 2];
      float row[kChannels][kTap];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) W::load_row(row[c], weights + c * L::kIn * W::kPlane + i * W::kRow);
#pragma unroll
      for (int j = 0; j < kTap; ++j) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          sums[0][c] += top[j] * row[c][j];
          sums[1][c] += top[j + 1] * row[c][j];
          sums[2][c] += bottom[j] * row[c][j];
          sums[3][c] += bottom[j + 1] * row[c][j];
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) store(first_channel + c, window, pool_tile<true>(sums, c));
}

// ------------------------------------------------------------------------------------------------------ linear layers

// The first `count` rows of fc1's weight in shared memory, as many as fit, where they arrive while the block computes
// the convolutions. From L2 a multiprocessor gets 64 bytes a clock at most, and less where many ask at once: 3,000
// clocks or more for the 192 KB, forward and backward. Shared memory gives twice that.
template <typename T>
struct KeptRows {
  static constexpr int kPitch = kFeatures + 4;  // neighbouring rows begin in different banks
  const T* values = nullptr;
  int count = 0;

  // Row `row` of a weight of so many columns.
  LX_DEVICE const T* of(const T* weight, int columns, int row) const {
    return row < count ? values + row * kPitch : weight + row * columns;
  }

  static constexpr int64_t bytes(int64_t count) { return lx::taken<T>(count * kPitch); }
  // The block begins to copy them. Before they are read, each thread waits for its copies, and the block for all.
  static LX_DEVICE KeptRows begin_to_copy(T* to, const T* weight, int count) {
    constexpr int kEach = 16 / sizeof(T), kVectors = kFeatures / kEach, kAtOnce = kImageThreads / kVectors;
    const int thread = static_cast<int>(threadIdx.x), first = thread / kVectors, column = thread % kVectors * kEach;
    if (first < kAtOnce) {
#pragma unroll 4
      for (int row = first; row < count; row += kAtOnce) {
        lx::copy_async<16>(to + row * kPitch + column, weight + row * kFeatures + column);
      }
    }
    lx::end_copy_group();
    return {to, count};
  }
};

// As linear_images. thread -> an output and a quarter of the depth. A row's part comes from L2 in up to 13 loads of 16
// bytes at once: two rounds for fc1, one for the others. The first is on its way when the block meets at the barrier
// behind which `in` is there; there is none behind the end.
__device__ __forceinline__ void linear_image(const float* in, int depth, const float* weight,
                                             const KeptRows<float>& kept, const float* __restrict__ bias, int outputs,
                                             bool relu, float* partial, float* hidden, float* __restrict__ output) {
  constexpr int kAhead = 13;
  static_assert(kLinearParts * kMostOutputs == kImageThreads);
  const int thread = lx::thread_read_here(), column = thread % kMostOutputs, part = thread / kMostOutputs;
  const int share = lx::divide_up(depth, 4 * kLinearParts) * 4;
  const int end = column >= outputs ? 0 : (part + 1) * share < depth ? (part + 1) * share : depth;
  const float* const row = kept.of(weight, depth, column);
  lx::Pack<float, 4> next[kAhead] = {};
  auto load = [&](int k) {
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (k + 4 * n < end) next[n] = lx::load_pack<4>(row + k + 4 * n);
    }
  };
  load(part * share);
  __syncthreads();
  float sum = 0;
#pragma unroll 1
  for (int k = part * share; k < end; k += 4 * kAhead) {
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (k + 4 * n < end) {
        const lx::Pack<float, 4> a = lx::load_pack<4>(in + k + 4 * n);
#pragma unroll
        for (int step = 0; step < 4; ++step) sum += a[step] * next[n][step];
      }
    }
    if (k + 4 * kAhead < end) load(k + 4 * kAhead);
  }
  if (column < outputs) partial[part * outputs + column] = sum;
  __syncthreads();
  if (thread < outputs) {
    float value = bias[thread];
#pragma unroll
    for (int p = 0; p < kLinearParts; ++p) value += partial[p * outputs + thread];
    if (relu && value <= 0) value = 0;  // NaN passes
    if (relu) hidden[thread] = value;
    output[thread] = value;
  }
}

// The gradient of a linear layer's inputs, in `grad_input` (shared) and in `result` (global, may be null), from that of
// its outputs (shared); 0 where `mask` (may be null), the layer's input behind a ReLU, is not above 0.
//
// thread -> 4 inputs and a part of the outputs, of at most eight, because more take longer to add up than they save. Up
// to 12 weights of 16 bytes come at once: two rounds for fc1, one for the others. Barriers as in linear_image. The
// parts are added in order, through `partial` (shared, 4 * kImageThreads).
template <typename T, typename M>
__device__ __forceinline__ void linear_grad_image(const float* grad_output, int outputs, const T* weight,
                                                  const KeptRows<T>& kept, int inputs, const M* __restrict__ mask,
                                                  float* partial, float* grad_input, float* __restrict__ result) {
  constexpr int kAhead = 12, kMostParts = 8;
  const int thread = lx::thread_read_here();
  constexpr int kPartsOfFc1 = kImageThreads / (kFeatures / 4);
  static_assert(kPartsOfFc1 <= kMostParts && kMostParts * kHidden1 / 4 <= kImageThreads);
  const bool fc1 = inputs == kFeatures;
  const int packs = inputs / 4, parts = fc1 ? kPartsOfFc1 : kMostParts;
  const int share = fc1 ? lx::divide_up(kHidden1, kPartsOfFc1) : lx::divide_up(outputs, kMostParts);
  const int part = fc1                  ? lx::small_quotient<kFeatures / 4>(thread)
                   : inputs == kHidden1 ? lx::small_quotient<kHidden1 / 4>(thread)
                                        : lx::small_quotient<kHidden2 / 4>(thread);
  const int pack = thread - part * packs;
  const int begin = part * share;
  const int end = part >= parts ? 0 : begin + share < outputs ? begin + share : outputs;
  const bool is_kept = end <= kept.count;
  const int pitch = is_kept ? kept.kPitch : inputs;
  const T* const rows = (is_kept ? kept.values : weight) + pack * 4;
  lx::Pack<T, 4> next[kAhead] = {};
  auto load = [&](int o) {
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (o + n < end) next[n] = lx::load_pack<4>(rows + (o + n) * pitch);
    }
  };
  load(begin);
  const bool open = mask == nullptr || thread >= inputs || !(lx::widen(mask[thread]) <= 0);
  __syncthreads();
  float sums[4] = {};
#pragma unroll 1
  for (int o = begin; o < end; o += kAhead) {
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (o + n < end) {
        const float gradient = grad_output[o + n];
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[k] += gradient * lx::widen(next[n][k]);
      }
    }
    if (o + kAhead < end) load(o + kAhead);
  }
  if (part < parts) {
    *reinterpret_cast<lx::Pack<float, 4>*>(partial + part * inputs + pack * 4) = {{sums[0], sums[1], sums[2], sums[3]}};
  }
  __syncthreads();
  if (thread < inputs) {
    float value = 0;
#pragma unroll
    for (int p = 0; p < kMostParts; ++p) {
      if (p < parts) value += partial[p * inputs + thread];
    }
    if (!open) value = 0;
    if (result != nullptr) result[thread] = value;
    grad_input[thread] = value;
  }
}

// --------------------------------------------------------------------------------------- gradient of conv2's input

// As GradInput, with other parts: warp -> two windows, neighbours in a row of five, or the last one: 15 of 16 warps.
// A lane's sums are two rows of 8 columns, in which the second window's lie two columns to the right, so that nothing
// is shifted between them, and a weight is loaded once for both instead of kept in a register.
struct GradInputOfImage {
  using L = Conv2;
  using W = SpreadWeights<L>;
  static constexpr int kPairs = (L::kPool + 1) / 2;     // of a row of windows
  static constexpr int kWarps = L::kPool * kPairs;      // that have something to do
  static constexpr int kRows = kTap + 1, kColumns = 8;  // of pixels that a pair of windows reaches
  static constexpr int kPlane = kRows * kColumns + 4, kPlanes = L::kIn * kPlane;
  static constexpr int kGradients = 4 * L::kOut;  // of a pair: [out][window][left, right]
  static constexpr int kFloats = kWarps * (kPlanes + kGradients);
  static_assert(kWarps <= kImageThreads / 32);

  // Hands the gradients of four pixels at a time to store(position, gradients). `region`: shared, kFloats, free.
  // `weights`: shared, as SpreadWeights has them; `finite`: whether they all are.
  template <typename T, typename Store>
  static __device__ __forceinline__ void compute(float* region, const T* grad_output, const uint8_t* indices,
                                                 const float* weights, bool finite, Store store) {
    const int warp = lx::thread_read_here() / 32;
    if (warp < kWarps) {
      add_pair(region + warp * kPlanes, region + kWarps * kPlanes + warp * kGradients, grad_output, indices, weights,
               finite);
    }
    __syncthreads();
    hand_over(region, store);
  }

  template <typename T>
  static __device__ __forceinline__ void add_pair(float* planes, float* gradients, const T* grad_output,
                                                  const uint8_t* indices, const float* weights, bool finite) {
    const int thread = lx::thread_read_here(), lane = thread % 32, warp = thread / 32;
    const LanePlace place(lane);
    // lane -> an output channel of the first or of the second window
    const int second = lane / L::kOut, column = warp % kPairs * 2 + second;
    int code = kDead;
    float value = 0;
    if (column < L::kPool) {
      const int from = lane % L::kOut * L::kWindows + warp / kPairs * L::kPool + column;
      code = indices[from], value = lx::widen(grad_output[from]);
    }
    *reinterpret_cast<lx::Pack<float, 2>*>(gradients + lane % L::kOut * 4 +
                                           second * 2) = {{code % 2 == 0 ? value : 0.0f, code % 2 != 0 ? value : 0.0f}};
    // A bit for each channel, of the second window in the upper half: whether the winner is in this row.
    const unsigned upper = __ballot_sync(0xffffffffu, code < 2);
    const unsigned lower = __ballot_sync(0xffffffffu, (code & ~1) == 2);
    __syncwarp();  // the gradients are there
    const float* from = weights + place.channel * W::kPlane + place.row * W::kRow;
    float sums[2][kColumns] = {};
#pragma unroll 4
    for (int o = 0; o < L::kOut; ++o) {
      float w[kTap];
      W::load_row(w, from + o * L::kIn * W::kPlane);
      const lx::Pack<float, 4> pairs = lx::load_pack<4>(gradients + o * 4);
      add_window<0>(sums, w, pairs, upper >> o & 1u, lower >> o & 1u);
      add_window<1>(sums, w, pairs, upper >> (o + L::kOut) & 1u, lower >> (o + L::kOut) & 1u);
    }
    if (!finite) {
      add_zeros(sums, from, indices + warp / kPairs * L::kPool + warp % kPairs * 2, warp % kPairs + 1 < kPairs);
    }
    put(planes, sums, place, lane);
  }

  template <int kWindow>
  static LX_DEVICE void add_window(float (&sums)[2][kColumns], const float (&w)[kTap], const lx::Pack<float, 4>& pairs,
                                   bool upper, bool lower) {
    if (upper) {
      add_row<kWindow>(sums[0], w, pairs);
    } else if (lower) {
      add_row<kWindow>(sums[1], w, pairs);
    }
  }
  // One of the two gradients is zero.
  template <int kWindow>
  static LX_DEVICE void add_row(float (&sums)[kColumns], const float (&w)[kTap], const lx::Pack<float, 4>& pairs) {
#pragma unroll
    for (int j = 0; j < kTap; ++j) sums[2 * kWindow + j] += pairs[2 * kWindow] * w[j];
#pragma unroll
    for (int j = 0; j < kTap; ++j) sums[2 * kWindow + j + 1] += pairs[2 * kWindow + 1] * w[j];
  }

  // Adds the products of the weights with the zeros of the windows, which are NaN where a weight is not finite.
  static LX_DEVICE void add_zeros(float (&sums)[2][kColumns], const float* weights, const uint8_t* indices,
                                  bool second) {
#pragma unroll 1
    for (int o = 0; o < L::kOut; ++o) {
      float w[kTap];
      W::load_row(w, weights + o * L::kIn * W::kPlane);
#pragma unroll
      for (int window = 0; window < 2; ++window) {
        if (window == 1 && !second) break;
        const int code = indices[o * L::kWindows + window];
#pragma unroll
        for (int position = 0; position < 4; ++position) {
#pragma unroll
          for (int j = 0; j < kTap; ++j) {
            if (code != position) sums[position / 2][2 * window + position % 2 + j] += 0 * w[j];
          }
        }
      }
    }
  }

  // The upper sums of all lanes, then the lower ones, which are the next lanes' upper ones.
  static __device__ __forceinline__ void put(float* planes, const float (&sums)[2][kColumns], const LanePlace& place,
                                             int lane) {
    using Pack = lx::Pack<float, 4>;
    float* const to = planes + place.channel * kPlane + place.row * kColumns;
    if (lane < 2 * L::kIn) *reinterpret_cast<Pack*>(planes + lane / 2 * kPlane + kTap * kColumns + lane % 2 * 4) = {};
    if (place.own) {
#pragma unroll
      for (int j = 0; j < kColumns; j += 4) {
        *reinterpret_cast<Pack*>(to + j) = {{sums[0][j], sums[0][j + 1], sums[0][j + 2], sums[0][j + 3]}};
      }
    }
    __syncwarp();
    if (place.own) {
#pragma unroll
      for (int j = 0; j < kColumns; j += 4) {
        const Pack old = lx::load_pack<4>(to + kColumns + j);
        *reinterpret_cast<Pack*>(to + kColumns + j) = {
            {old[0] + sums[1][j], old[1] + sums[1][j + 1], old[2] + sums[1][j + 2], old[3] + sums[1][j + 3]}};
      }
    }
  }

  // A pixel is in the planes of up to three rows of windows and two pairs, which are added in order.
  template <typename Store>
  static __device__ __forceinline__ void hand_over(const float* all_planes, Store store) {
    constexpr int kMap = L::kSize * L::kSize;
    const int i = lx::thread_read_here();
    if (i >= L::kImage / 4) return;
    const int channel = lx::small_quotient<kMap / 4>(i), first = 4 * i - channel * kMap;
    float sums[4] = {};
#pragma unroll
    for (int half = 0; half < 4; half += 2) {  // two neighbours in a row
      const int pixel = first + half, y = lx::small_quotient<L::kSize>(pixel), x = pixel - y * L::kSize;
#pragma unroll
      for (int row = 0; row < 3; ++row) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const int window_row = y / 2 - row, pair = x / 4 - column;
          if (window_row < 0 || window_row >= L::kPool || pair < 0 || pair >= kPairs) continue;
          const lx::Pack<float, 2> pack =
              lx::load_pack<2>(all_planes + (window_row * kPairs + pair) * kPlanes + channel * kPlane +
                               (y % 2 + 2 * row) * kColumns + x % 4 + 4 * column);
          sums[half] += pack[0], sums[half + 1] += pack[1];
        }
      }
    }
    store(4 * i, sums);
  }
};

// ------------------------------------------------------------------------------------- gradient of conv1's weights

// warp -> a row of the kernel and two channels, 15 of 16 warps; lane -> a window of two rows, 14 lanes of each half, in
// seven steps. Dense arithmetic as in Conv1GradWeight, but a lane has 12 sums instead of 78: they leave registers for
// what else a pass keeps, and shuffles add them up without a barrier.
struct Conv1GradWeightOfImage {
  using L = Conv1;
  static constexpr int kChannels = 2, kSums = kChannels * (kTap + 1);  // of a lane, the biases last
  static constexpr int kGroups = L::kOut / kChannels, kWarps = kTap * kGroups;
  static_assert(kWarps <= kImageThreads / 32 && L::kPool % 2 == 0 && L::kPool <= 16);

  // For the weights of one input channel. Hands each sum to store(position, sum), in one thread, in the order of
  // Conv1GradWeight.
  template <typename Store>
  static __device__ __forceinline__ void compute(const float* plane, const float* grad_output, const uint8_t* indices,
                                                 Store store) {
    const int thread = lx::thread_read_here(), lane = thread % 32, warp = thread / 32;
    const int tap_row = warp / kGroups, first_channel = warp % kGroups * kChannels;
    constexpr int kPadded = 16;
    float sums[kPadded] = {};  // [channel][tap], [channel]
    if (warp < kWarps && lane % 16 < L::kPool) {
      const float* from = plane + (lane / 16 * 2 + tap_row) * L::kSize + lane % 16 * 2;
      const int at = first_channel * L::kWindows + lane / 16 * L::kPool + lane % 16;
      grad_output += at, indices += at;
#pragma unroll 1
      for (int y = 0; y < L::kPool; y += 2) {
        float top[kTap + 1], bottom[kTap + 1];
        load_row(top, from), load_row(bottom, from + L::kSize);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          const int code = indices[c * L::kWindows];
          const float value = grad_output[c * L::kWindows];
          float gradient[4];
          expand_window(gradient, value, code);
          sums[kChannels * kTap + c] += code == kDead ? 0.0f : value;
#pragma unroll
          for (int j = 0; j < kTap; ++j) {
            float& sum = sums[c * kTap + j];
            sum += gradient[0] * top[j];
            sum += gradient[1] * top[j + 1];
            sum += gradient[2] * bottom[j];
            sum += gradient[3] * bottom[j + 1];
          }
        }
        from += 4 * L::kSize, grad_output += 2 * L::kPool, indices += 2 * L::kPool;
      }
    }
    const float sum = warp_sums(sums, lane);
    const int which = lane / 2;
    if (warp >= kWarps || lane % 2 != 0) return;
    if (which < kChannels * kTap) {
      store((first_channel + which / kTap) * (kTaps + 1) + tap_row * kTap + which % kTap, sum);
    } else if (which < kSums && tap_row == 0) {
      store((first_channel + which - kChannels * kTap) * (kTaps + 1) + kTaps, sum);
    }
  }

  // Each of 16 values summed over the warp, in two lanes: lane -> value lane / 2. Where all lanes have two values for
  // the same two lanes, each sends one of them and adds the other to what it gets.
  static __device__ __forceinline__ float warp_sums(float (&values)[16], int lane) {
    send_half<8>(values, lane), send_half<4>(values, lane), send_half<2>(values, lane), send_half<1>(values, lane);
    return values[0] + __shfl_xor_sync(0xffffffffu, values[0], 1);
  }
  template <int kHalf>
  static __device__ __forceinline__ void send_half(float (&values)[16], int lane) {
    const bool upper = (lane & 2 * kHalf) != 0;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const float sent = upper ? values[k] : values[k + kHalf], kept = upper ? values[k + kHalf] : values[k];
      values[k] = kept + __shfl_xor_sync(0xffffffffu, sent, 2 * kHalf);
    }
  }
};

}  // namespace lenet_ext::cuda
