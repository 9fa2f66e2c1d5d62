// An image of the forward passes of LeNet's two convolutions, for 16 vectors of 8 floats.
#pragma once

#include "conv_pool_lenet_shape.h"
#include "transpose.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

using Floats = Vec<float, 8>;
using Codes = IntVec<float, 8>;

// A pooling window, and where its winner is.
template <bool with_codes>
LENET_EXT_INLINE Floats relu_pool(Floats a, Floats b, Floats c, Floats d, Codes& code) {
  if (!with_codes) return relu(max_of_four(a, b, c, d));
  Floats best = a;
  code = Codes{};
  offer(best, code, b, 1);
  offer(best, code, c, 2);
  offer(best, code, d, 3);
  close_relu(best, code, kDead);
  return best;
}

// As bytes. What the compiler makes of a conversion of eight lanes takes longer.
LENET_EXT_INLINE void store_codes(uint8_t* to, Codes code) {
  const __m128i low = _mm256_castsi256_si128((__m256i)code), high = _mm256_extracti128_si256((__m256i)code, 1);
  const __m128i words = _mm_packus_epi32(low, high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}

// Half of a pair of convolution rows, of three channels: 12 sums, and as many registers as are left for three weights
// and an input. A row has 28 columns, of which the halves are 0..15 and 12..27: the four that both hold give the same
// pooled values twice.
template <int in_channels, bool with_codes>
LENET_EXT_INLINE void forward_tile1(const float* image, const float* weight, const float* bias, float* output,
                                    uint8_t* codes) {
  constexpr int channels = kChannels1 / 2;
  Floats sum[channels][4];
  LENET_EXT_UNROLL for (int i = 0; i < channels * 4; ++i)
    sum[i / 4][i % 4] = broadcast<Floats>(bias[i / 4]);
  for (int step = 0; step < in_channels * 5; ++step) {
    const int c = step / 5, ky = step % 5;
    const float* row = image + c * kSize1 + ky * kRow1;
    const float* taps = weight + c * kTaps + ky * 5;
    // Unrolled, what neighbouring taps have in common would be kept in registers that the sums need.
    _Pragma("GCC unroll 1") for (int kx = 0; kx < 5; ++kx, ++row, ++taps) {
      Floats w[channels];
      LENET_EXT_UNROLL for (int o = 0; o < channels; ++o)
        w[o] = broadcast<Floats>(taps[o * in_channels * kTaps]);
      LENET_EXT_UNROLL for (int i = 0; i < 4; ++i) {
        const Floats in = load<Floats>(row + i / 2 * kRow1 + i % 2 * 8);
        LENET_EXT_UNROLL for (int o = 0; o < channels; ++o)
          sum[o][i] += w[o] * in;
      }
    }
  }
  LENET_EXT_UNROLL for (int o = 0; o < channels; ++o) {
    Codes code;
    const Floats best =
        relu_pool<with_codes>(evens<8, float>(sum[o][0], sum[o][1]), odds<8, float>(sum[o][0], sum[o][1]),
                              evens<8, float>(sum[o][2], sum[o][3]), odds<8, float>(sum[o][2], sum[o][3]), code);
    store(output + o * kPooled1, best);
    if (with_codes) store_codes(codes + o * kPooled1, code);
  }
}

template <int in_channels, bool with_codes>
void forward_image1(const float* image, const float* weight, const float* bias, float* output, uint8_t* codes) {
  constexpr int second = 12;
  for (int y = 0; y < 14; ++y) {
    for (int channel = 0; channel < kChannels1; channel += kChannels1 / 2) {
      const float* from = weight + channel * in_channels * kTaps;
      for (int x = 0; x <= second; x += second) {
        const int at = channel * kPooled1 + y * 14 + x / 2;
        forward_tile1<in_channels, with_codes>(image + 2 * y * kRow1 + x, from, bias + channel, output + at,
                                               with_codes ? codes + at : nullptr);
      }
    }
  }
}

// Half of a convolution row, all channels: ten sums. `packed`: the bias, then the weights as [tap][16].
LENET_EXT_INLINE void forward_tile2(const float* image, const float* packed, float* row) {
  constexpr int columns = 5;
  Floats sum[columns][2];
  LENET_EXT_UNROLL for (int i = 0; i < columns * 2; ++i)
    sum[i / 2][i % 2] = load<Floats>(packed + i % 2 * 8);
  const float* weights = packed + kChannels2;
  for (int step = 0; step < kChannels1 * 5; ++step) {
    const float* in = image + step / 5 * kPooled1 + step % 5 * kRow2;
    LENET_EXT_UNROLL for (int kx = 0; kx < 5; ++kx, ++in, weights += kChannels2) {
      forget_origin(in);
      const Floats w[2] = {load<Floats>(weights), load<Floats>(weights + 8)};
      LENET_EXT_UNROLL for (int x = 0; x < columns; ++x) {
        const Floats value = broadcast<Floats>(in[x]);
        sum[x][0] += w[0] * value;
        sum[x][1] += w[1] * value;
      }
    }
  }
  LENET_EXT_UNROLL for (int i = 0; i < columns * 2; ++i)
    store(row + i * 8, sum[i / 2][i % 2]);
}

template <bool with_codes>
void forward_image2(const float* image, const float* packed, float* output, uint8_t* codes) {
  alignas(32) float rows[2][10 * kChannels2], pooled[kPooled2 * kChannels2];
  alignas(32) int32_t winners[kPooled2 * kChannels2];
  for (int y = 0; y < 5; ++y) {
    for (int part = 0; part < 4; ++part) {
      const int row = part / 2, x = part % 2 * 5;
      forward_tile2(image + (2 * y + row) * kRow2 + x, packed, rows[row] + x * kChannels2);
    }
    for (int i = 0; i < 10; ++i) {
      const int x = i / 2, lanes = i % 2 * 8, first = 2 * x * kChannels2 + lanes, second = first + kChannels2;
      Codes code;
      const Floats best = relu_pool<with_codes>(load<Floats>(rows[0] + first), load<Floats>(rows[0] + second),
                                                load<Floats>(rows[1] + first), load<Floats>(rows[1] + second), code);
      const int at = (y * 5 + x) * kChannels2 + lanes;
      store(pooled + at, best);
      if (with_codes) store(winners + at, code);
    }
  }
  for (int lanes = 0; lanes < kChannels2; lanes += 8) {
    transpose_row<8>(pooled + lanes, kPooled2, kChannels2, 8, output + lanes * kPooled2, kPooled2);
    if (with_codes) transpose_row<8>(winners + lanes, kPooled2, kChannels2, 8, codes + lanes * kPooled2, kPooled2);
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
