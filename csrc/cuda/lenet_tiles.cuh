// LeNet's two convolutions, cut into what one thread holds in registers.
#pragma once

#include <algorithm>

#include "conv_pool_dims.cuh"

namespace lenet_ext::cuda {

constexpr int kTap = 5, kTaps = kTap * kTap;  // both kernels are 5 x 5, both pools 2 x 2

template <int kInChannels, int kOutChannels, int kInputSize>
struct LeNetLayer {
  static constexpr int kIn = kInChannels, kOut = kOutChannels, kSize = kInputSize;
  static constexpr int kConv = kSize - kTap + 1, kPool = kConv / 2, kWindows = kPool * kPool;
  static constexpr int kImage = kIn * kSize * kSize;  // elements of an input image
  static constexpr int kMap = kOut * kConv * kConv;   // of a convolution output
  static constexpr int kPooled = kOut * kWindows;     // of an output image
  static constexpr int kWeights = kIn * kTaps;        // of one output channel
};
using Conv1 = LeNetLayer<1, 6, 32>;
using ColourConv1 = LeNetLayer<3, 6, 32>;  // of images of three channels
using Conv2 = LeNetLayer<6, 16, 14>;

// What the linear layers behind them take and give.
constexpr int kFeatures = Conv2::kPooled, kHidden1 = 120, kHidden2 = 84;

template <typename L>
bool is_layer(const ConvPoolShape& s) {
  return s.in_channels == L::kIn && s.height == L::kSize && s.width == L::kSize && s.out_channels == L::kOut &&
         s.kernel_h == kTap && s.kernel_w == kTap && s.groups == 1 && s.stride_h == 1 && s.stride_w == 1 &&
         s.pad_top == 0 && s.pad_bottom == 0 && s.pad_left == 0 && s.pad_right == 0 && s.dilation_h == 1 &&
         s.dilation_w == 1 && s.pool_kernel_h == 2 && s.pool_kernel_w == 2 && s.pool_stride_h == 2 &&
         s.pool_stride_w == 2 && s.pool_pad_h == 0 && s.pool_pad_w == 0 && s.pool_dilation_h == 1 &&
         s.pool_dilation_w == 1;
}

// The six values of a row that a 2-wide tile sees. `row` is at an even offset of a 16-byte aligned buffer.
LX_DEVICE void load_row(float (&values)[kTap + 1], const float* row) {
#pragma unroll
  for (int j = 0; j <= kTap; j += 2) {
    const lx::Pack<float, 2> pair = lx::load_pack<2>(row + j);
    values[j] = pair[0];
    values[j + 1] = pair[1];
  }
}

// The multiply-adds of one input plane with a 5 x 5 kernel: sums[image][position][channel] for 2 x 2 neighbouring
// positions (row-major) in kImages images and kChannels output channels.
//
// planes[i]: the tile's top left input value in image i, rows `pitch` apart. weights: [tap][kPitch] in shared memory,
// the same for (nearly) all lanes of a warp. The weights are why one thread takes 4 positions in 2 images: a broadcast
// load of 16 bytes occupies the shared memory for 4 cycles, and with only 4 multiply-adds for each weight the kernel
// would wait for it.
// The loop over the rows is not unrolled, or the compiler keeps all the weights in registers and spills the sums.
template <int kImages, int kChannels, int kPitch>
LX_DEVICE void add_plane(float (&sums)[kImages][4][kChannels], const float* const (&planes)[kImages], int pitch,
                         const float* weights) {
  float top[kImages][kTap + 1], bottom[kImages][kTap + 1];
#pragma unroll
  for (int image = 0; image < kImages; ++image) load_row(top[image], planes[image]);
#pragma unroll 1
  for (int i = 0; i < kTap; ++i) {
#pragma unroll
    for (int image = 0; image < kImages; ++image) load_row(bottom[image], planes[image] + (i + 1) * pitch);
#pragma unroll
    for (int j = 0; j < kTap; ++j) {
      constexpr int kWide = kChannels % 4 == 0 && kPitch % 4 == 0 ? 4 : kChannels % 2 == 0 && kPitch % 2 == 0 ? 2 : 1;
      float weight[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; c += kWide) {
        const lx::Pack<float, kWide> pack = lx::load_pack<kWide>(weights + (i * kTap + j) * kPitch + c);
#pragma unroll
        for (int k = 0; k < kWide; ++k) weight[c + k] = pack[k];
      }
#pragma unroll
      for (int image = 0; image < kImages; ++image) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          sums[image][0][c] += top[image][j] * weight[c];
          sums[image][1][c] += top[image][j + 1] * weight[c];
          sums[image][2][c] += bottom[image][j] * weight[c];
          sums[image][3][c] += bottom[image][j + 1] * weight[c];
        }
      }
    }
#pragma unroll
    for (int image = 0; image < kImages; ++image) {
#pragma unroll
      for (int j = 0; j <= kTap; ++j) top[image][j] = bottom[image][j];
    }
  }
}

// A pooling window's largest value, NaN if there is one.
LX_DEVICE float largest_of(float v0, float v1, float v2, float v3) {
  return lx::max_or_nan(lx::max_or_nan(v0, v1), lx::max_or_nan(v2, v3));
}

// Where it is, by the rule of Winner: the first of equals, the last NaN, for which to look may be left out where none
// can be. To find the value first takes fewer instructions than Winner's comparison of one after the other.
template <bool kNan>
LX_DEVICE int position_of(float largest, float v0, float v1, float v2, float v3) {
  int position = v0 == largest ? 0 : v1 == largest ? 1 : v2 == largest ? 2 : 3;
  if (kNan && lx::is_nan(largest)) position = lx::is_nan(v3) ? 3 : lx::is_nan(v2) ? 2 : lx::is_nan(v1) ? 1 : 0;
  return position;
}

// The pooled value of a window and, as a Winner, its code; or the value alone, which is all that inference asks for.
// kNan: as position_of has it.
struct Largest {
  float best;
  LX_DEVICE float pooled() const { return lx::max_or_nan(best, 0.0f); }
};
struct LargestAt : Largest {
  int position;
  LX_DEVICE uint8_t code() const { return best <= 0 ? kDead : static_cast<uint8_t>(position); }
};
template <bool kCode, bool kNan = true>
LX_DEVICE auto pool_window(float v0, float v1, float v2, float v3) {
  const float best = largest_of(v0, v1, v2, v3);
  if constexpr (kCode) {
    return LargestAt{{best}, position_of<kNan>(best, v0, v1, v2, v3)};
  } else {
    return Largest{best};
  }
}

// Of one channel of a tile.
template <bool kCode, int kChannels>
LX_DEVICE auto pool_tile(const float (&sums)[4][kChannels], int channel) {
  return pool_window<kCode>(sums[0][channel], sums[1][channel], sums[2][channel], sums[3][channel]);
}

// The block copies weights [out][in][tap] to shared memory as [in][tap][out].
template <typename L, typename T>
LX_DEVICE void transpose_weights(float* to, const T* weight) {
  for (int i = threadIdx.x; i < L::kOut * L::kWeights; i += blockDim.x) {
    to[i] = lx::widen(weight[i % L::kOut * L::kWeights + i / L::kOut]);
  }
}

// What a thread computes at once: one pooling window in one image or two, and some output channels. Two images rather
// than two windows, because the second layer has an odd number of windows. In a block with two images or one, tiles are
// small, or most of the 256 threads would have none.
enum class ThreadTile { kSingle, kPair, kLarge };
LX_DEVICE constexpr int images_of(ThreadTile tile) { return tile == ThreadTile::kSingle ? 1 : 2; }
template <typename L>
LX_DEVICE constexpr int channels_of(ThreadTile tile) {
  return L::kOut == Conv1::kOut ? 6 : tile == ThreadTile::kLarge ? 8 : 2;
}
inline ThreadTile tile_for(int images_of_block) {
  return images_of_block == 1 ? ThreadTile::kSingle : images_of_block == 2 ? ThreadTile::kPair : ThreadTile::kLarge;
}

// The block computes a layer of `images` images in shared memory, one or an even number, of which the last may be
// missing, and hands each pooled output to store(image, channel, window, winner), as pool_window makes it. thread -> a
// tile: images x 4 x channels sums, each of them in the same order whatever the tile.
//
// The division of an item by `per_group`, which is no constant, is 27 instructions: of a large tile's 1.7% in conv1 (of
// 1,570) and 0.2% in conv2 (of 11,000), of a single window's 3% and 1%. To carry the quotient to the next item would
// take registers that large tiles have not.
template <typename L, ThreadTile kTile, bool kCodes = true, typename Store>
LX_DEVICE void convolve_images(const float* pixels, const float* weights, const float* biases, int images, int present,
                               Store store) {
  constexpr int kImages = images_of(kTile), kChannels = channels_of<L>(kTile);
  const int per_group = images / kImages * L::kWindows;
  for (int item = threadIdx.x; item < per_group * (L::kOut / kChannels); item += blockDim.x) {
    const int first_channel = item / per_group * kChannels, rest = item % per_group;
    const int image = rest / L::kWindows * kImages, window = rest % L::kWindows;
    const float* corner = pixels + image * L::kImage + window / L::kPool * 2 * L::kSize + window % L::kPool * 2;
    float sums[kImages][4][kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int i = 0; i < 4 * kImages; ++i) sums[i / 4][i % 4][c] = biases[first_channel + c];
    }
#pragma unroll 1
    for (int c = 0; c < L::kIn; ++c) {
      const float* planes[kImages];
#pragma unroll
      for (int i = 0; i < kImages; ++i) planes[i] = corner + c * L::kSize * L::kSize + i * L::kImage;
      add_plane<kImages, kChannels, L::kOut>(sums, planes, L::kSize, weights + c * kTaps * L::kOut + first_channel);
    }
#pragma unroll
    for (int i = 0; i < kImages; ++i) {
      if (image + i >= present) break;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) store(image + i, first_channel + c, window, pool_tile<kCodes>(sums[i], c));
    }
  }
}

// Images of a block: one, an even number below `most`, or `most`, but no more than leave work for every multiprocessor
// of a large GPU, and no more than fit the shared memory, of which they take shared_bytes(images). Results of a forward
// pass do not depend on it.
template <typename SharedBytes>
int images_per_block(int64_t batch, int most, SharedBytes shared_bytes) {
  const int64_t share = lx::divide_up<int64_t>(batch, 128);
  int images = static_cast<int>(std::clamp<int64_t>(share == 1 ? 1 : (share + 1) / 2 * 2, 1, most));
  while (images > 2 && !lx::fits_shared_memory(shared_bytes(images))) images -= 2;
  return images;
}

template <typename T>
LenetForwardOf<T> typed(const LenetForwardOf<void>& call) {
  LenetForwardOf<T> of{};
  of.batch = call.batch, of.in_channels = call.in_channels, of.classes = call.classes;
  of.input = static_cast<const T*>(call.input);
  for (int i = 0; i < 10; ++i) of.parameters[i] = static_cast<const T*>(call.parameters[i]);
  of.output = static_cast<T*>(call.output);
  of.pooled1 = static_cast<T*>(call.pooled1), of.indices1 = call.indices1;
  of.pooled2 = static_cast<T*>(call.pooled2), of.indices2 = call.indices2;
  of.hidden1 = static_cast<T*>(call.hidden1), of.hidden2 = static_cast<T*>(call.hidden2);
  return of;
}

// Four gradients, row-major, of a window's positions in the convolution's output: zero but for the winner's.
LX_DEVICE void expand_window(float (&gradient)[4], float value, int code) {
#pragma unroll
  for (int position = 0; position < 4; ++position) gradient[position] = code == position ? value : 0.0f;
}

}  // namespace lenet_ext::cuda

// As LX_DISPATCH, without float64, which these kernels do not have.
#define LENET_DISPATCH(dtype, function, ...)    \
  switch (dtype) {                              \
    case ::lenet_ext::cuda::DType::kFloat32:    \
      return function<float>(__VA_ARGS__);      \
    case ::lenet_ext::cuda::DType::kFloat16:    \
      return function<::lx::f16>(__VA_ARGS__);  \
    default:                                    \
      return function<::lx::bf16>(__VA_ARGS__); \
  }
