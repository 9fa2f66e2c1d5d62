// The gradients of LeNet's convolutions, cut into what a block of 256 threads does with some images in shared memory.
// Pointers to gradients and codes point at the first of these images; gradients may lie in shared memory as well.
//
// They multiply at every position, three of four times by zero. To gather the operands of the winners instead would
// take a word of shared memory for each multiply-add, of which a multiprocessor loads 32 a clock and computes 128:
// counted for the gradients of conv2's input, of its weights and of conv1's, 2,700 + 1,880 + 920 clocks an image, where
// dense tiles in registers take 1,875 + 1,875 + 920.
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

// It is the correlation of the gradient of the convolution's output, with a border of zeros, with the kernels turned by
// 180 degrees: the same tiles as in the forward pass.
constexpr int kHalo = kTap - 1;
constexpr int kHaloed = Conv2::kConv + 2 * kHalo;  // 18
constexpr int kHaloedMap = kHaloed * kHaloed;      // of one channel
constexpr int kPixelTiles = Conv2::kSize / 2 * (Conv2::kSize / 2);

// The block copies weights [out][in][tap] to shared memory as [out][tap, turned][in].
template <typename T>
LX_DEVICE void turn_weights(float* to, const T* weight) {
  using L = Conv2;
  for (int i = threadIdx.x; i < L::kOut * L::kWeights; i += kGradThreads) {
    const int in = i % L::kIn, tap = i / L::kIn % kTaps, out = i / (L::kIn * kTaps);
    to[i] = lx::widen(weight[(out * L::kIn + in) * kTaps + kTaps - 1 - tap]);
  }
}

// The block writes the inner part of the maps [images][kChunk] of the output channels from `first_channel` on.
template <int kChunk, typename T>
LX_DEVICE void expand_haloed(float* maps, const T* grad_output, const uint8_t* indices, int images, int present,
                             int first_channel) {
  using L = Conv2;
  for (int i = threadIdx.x; i < images * kChunk * L::kWindows; i += kGradThreads) {
    const int window = i % L::kWindows, channel = i / L::kWindows % kChunk, image = i / (kChunk * L::kWindows);
    const int from = image * L::kPooled + (first_channel + channel) * L::kWindows + window;
    float gradient[4] = {};
    if (image < present) expand_window(gradient, lx::widen(grad_output[from]), indices[from]);
    float* to = maps + (image * kChunk + channel) * kHaloedMap + (kHalo + window / L::kPool * 2) * kHaloed + kHalo +
                window % L::kPool * 2;
    *reinterpret_cast<lx::Pack<float, 2>*>(to) = {{gradient[0], gradient[1]}};
    *reinterpret_cast<lx::Pack<float, 2>*>(to + kHaloed) = {{gradient[2], gradient[3]}};
  }
}

// Adds what kChannels output channels give to tile `tile` (2 x 2 pixels, all input channels) in kImages images. `maps`:
// the first channel's in the first image, the next image's `image_pitch` later; `weights`: the first channel's.
template <int kImages, int kChannels>
LX_DEVICE void add_haloed(float (&sums)[kImages][4][Conv2::kIn], const float* maps, int image_pitch, int tile,
                          const float* weights) {
  using L = Conv2;
  const float* corner = maps + tile / (L::kSize / 2) * 2 * kHaloed + tile % (L::kSize / 2) * 2;
#pragma unroll 1
  for (int c = 0; c < kChannels; ++c) {
    const float* planes[kImages];
#pragma unroll
    for (int image = 0; image < kImages; ++image) planes[image] = corner + image * image_pitch + c * kHaloedMap;
    add_plane<kImages, L::kIn, L::kIn>(sums, planes, kHaloed, weights + c * L::kWeights);
  }
}

// The tile's pixels of one image.
template <typename T>
LX_DEVICE void store_pixels(T* image, int tile, const float (&sums)[4][Conv2::kIn]) {
  using L = Conv2;
  T* to = image + tile / (L::kSize / 2) * 2 * L::kSize + tile % (L::kSize / 2) * 2;
#pragma unroll
  for (int c = 0; c < L::kIn; ++c) {
#pragma unroll
    for (int position = 0; position < 4; ++position) {
      to[c * L::kSize * L::kSize + position / 2 * L::kSize + position % 2] = lx::narrow<T>(sums[position][c]);
    }
  }
}

// The gradient of conv2's input in 1, 2 or 4 images by one block, cut into 196 shares in any case: 49 tiles in 1 or 2
// pairs of images (a single image is a tile of its own, with half as many sums), times 4 or 2 parts of the output
// channels, whose sums are added at the end, in order.
template <int kImages>
struct GradInput {
  using L = Conv2;
  static constexpr int kTileImages = kImages == 1 ? 1 : 2;
  static constexpr int kParts = kImages == 4 ? 2 : 4;
  static constexpr int kPartChannels = 4;  // output channels of a part that are in shared memory at once
  static constexpr int kChunk = kParts * kPartChannels;
  static constexpr int kPartThreads = kImages / kTileImages * kPixelTiles;
  static_assert(kParts * kPartThreads <= static_cast<int>(kGradThreads), "a thread for each share");
  // Gradients of conv2's outputs with borders, and after the last of them the parts' sums.
  static constexpr int kMapFloats = kImages * kChunk * kHaloedMap;
  static constexpr int kPartFloats = kParts * kImages * L::kImage;
  static constexpr int kFloats = kMapFloats > kPartFloats ? kMapFloats : kPartFloats;

  // Hands the gradient of each pixel of the `present` first images to store(position, value), in one thread. `region`:
  // shared, kFloats, free as soon as the whole block is here. `weights`: shared, turned; a barrier follows before they
  // are read.
  template <typename T, typename Store>
  static __device__ __forceinline__ void compute(float* region, const T* grad_output, const uint8_t* indices,
                                                 int present, const float* weights, Store store) {
    const int thread = static_cast<int>(threadIdx.x);
    const int part = thread / kPartThreads, tile = thread % kPixelTiles;
    const int image = thread % kPartThreads / kPixelTiles * kTileImages;
    float sums[kTileImages][4][L::kIn] = {};
    lx::fill_shared(region, kMapFloats, 0.0f);  // the borders stay so
#pragma unroll 1
    for (int chunk = 0; chunk < L::kOut; chunk += kChunk) {
      __syncthreads();
      expand_haloed<kChunk>(region, grad_output, indices, kImages, present, chunk);
      __syncthreads();
      if (part >= kParts) continue;
      const int channel = part * kPartChannels;
      add_haloed<kTileImages, kPartChannels>(sums, region + (image * kChunk + channel) * kHaloedMap,
                                             kChunk * kHaloedMap, tile, weights + (chunk + channel) * L::kWeights);
    }
    __syncthreads();
    if (part < kParts) {
#pragma unroll
      for (int i = 0; i < kTileImages; ++i) {
        store_pixels(region + (part * kImages + image + i) * L::kImage, tile, sums[i]);
      }
    }
    __syncthreads();
    // Not unrolled: with compute capability 7.5 the whole network's backward pass would spill.
#pragma unroll 1
    for (int i = thread; i < present * L::kImage; i += static_cast<int>(kGradThreads)) {
      float value = 0;
#pragma unroll
      for (int p = 0; p < kParts; ++p) value += region[p * kImages * L::kImage + i];
      store(i, value);
    }
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
