// An image of the forward passes of LeNet's two convolutions, for 32 vectors of 16 floats. Two convolution rows stay in
// registers until they are pooled.
#pragma once

#include "conv_pool_lenet_shape.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// What a pooling window comes to.
struct Winner {
  Vec<float, 16> value;
  IntVec<float, 16> code;
};

template <bool with_codes>
LENET_EXT_INLINE Winner relu_pool(__m512 a, __m512 b, __m512 c, __m512 d) {
  using V = Vec<float, 16>;
  if (!with_codes) return {relu(max_of_four<V>((V)a, (V)b, (V)c, (V)d)), IntVec<float, 16>{}};
  Winner best{(V)a, IntVec<float, 16>{}};
  offer(best.value, best.code, (V)b, 1);
  offer(best.value, best.code, (V)c, 2);
  offer(best.value, best.code, (V)d, 3);
  close_relu(best.value, best.code, kDead);
  return best;
}

LENET_EXT_INLINE __m512 even_columns(__m512 a, __m512 b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(a, even, b);
}
LENET_EXT_INLINE __m512 odd_columns(__m512 a, __m512 b) {
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_permutex2var_ps(a, odd, b);
}

// A convolution row has 28 columns: two vectors, of columns 0..15 and 12..27. The four columns that both hold give the
// same pooled values twice.
template <int in_channels, bool with_codes>
void forward_image1(const float* image, const float* weight, const float* bias, float* output, uint8_t* codes) {
  constexpr int second = 12, out_row = 14;
  for (int y = 0; y < out_row; ++y) {
    __m512 sum[kChannels1][2][2];
    LENET_EXT_UNROLL for (int o = 0; o < kChannels1; ++o) {
      const __m512 b = _mm512_set1_ps(bias[o]);
      sum[o][0][0] = sum[o][0][1] = sum[o][1][0] = sum[o][1][1] = b;
    }
    for (int step = 0; step < in_channels * 5; ++step) {
      const int c = step / 5, ky = step % 5;
      const float* row = image + c * kSize1 + (2 * y + ky) * kRow1;
      LENET_EXT_UNROLL for (int kx = 0; kx < 5; ++kx) {
        const __m512 in[2][2] = {{_mm512_loadu_ps(row + kx), _mm512_loadu_ps(row + kx + second)},
                                 {_mm512_loadu_ps(row + kRow1 + kx), _mm512_loadu_ps(row + kRow1 + kx + second)}};
        LENET_EXT_UNROLL for (int o = 0; o < kChannels1; ++o) {
          const __m512 w = _mm512_set1_ps(weight[(o * in_channels + c) * kTaps + ky * 5 + kx]);
          LENET_EXT_UNROLL for (int i = 0; i < 4; ++i)
            sum[o][i / 2][i % 2] = _mm512_fmadd_ps(w, in[i / 2][i % 2], sum[o][i / 2][i % 2]);
        }
      }
    }
    LENET_EXT_UNROLL for (int o = 0; o < kChannels1; ++o) {
      const Winner best =
          relu_pool<with_codes>(even_columns(sum[o][0][0], sum[o][0][1]), odd_columns(sum[o][0][0], sum[o][0][1]),
                                even_columns(sum[o][1][0], sum[o][1][1]), odd_columns(sum[o][1][0], sum[o][1][1]));
      const int at = o * kPooled1 + y * out_row;
      _mm256_storeu_ps(output + at, _mm512_castps512_ps256((__m512)best.value));
      _mm256_storeu_ps(output + at + second / 2, _mm512_extractf32x8_ps((__m512)best.value, 1));
      if (with_codes) {
        const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)best.code);
        _mm_storeu_si64(codes + at, bytes);
        _mm_storeu_si64(codes + at + second / 2, _mm_unpackhi_epi64(bytes, bytes));
      }
    }
  }
}

// [25][16] -> [16][25], in two overlapping tiles of 16 rows; each row of 16 goes to `write(row, column, vector)`.
template <typename Write>
LENET_EXT_INLINE void transpose_pooled2(const __m512* rows, const Write& write) {
  LENET_EXT_UNROLL for (int half = 0; half < 2; ++half) {
    const int first = half == 0 ? 0 : kPooled2 - 16;
    Vec<float, 16> tile[16];
    LENET_EXT_UNROLL for (int i = 0; i < 16; ++i)
      tile[i] = (Vec<float, 16>)rows[first + i];
    transpose_tile<16>(tile);
    LENET_EXT_UNROLL for (int i = 0; i < 16; ++i)
      write(i, first, (__m512)tile[i]);
  }
}

// `packed`: the bias, then the weights as [tap][16].
template <bool with_codes>
void forward_image2(const float* image, const float* packed, float* output, uint8_t* codes) {
  const __m512 bias = _mm512_load_ps(packed);
  const float* weights = packed + kChannels2;
  __m512 pooled[kPooled2], winners[kPooled2];
  for (int y = 0; y < 5; ++y) {
    __m512 sum[2][10];
    LENET_EXT_UNROLL for (int i = 0; i < 20; ++i)
      sum[i / 10][i % 10] = bias;
    for (int c = 0; c < kChannels1; ++c) {
      for (int ky = 0; ky < 5; ++ky) {
        __m512 w[5];
        LENET_EXT_UNROLL for (int kx = 0; kx < 5; ++kx)
          w[kx] = _mm512_load_ps(weights + ((c * 5 + ky) * 5 + kx) * kChannels2);
        const float* in = image + c * kPooled1 + (2 * y + ky) * kRow2;
        LENET_EXT_UNROLL for (int row = 0; row < 2; ++row) {
          LENET_EXT_UNROLL for (int x = 0; x < kRow2; ++x) {
            const __m512 value = _mm512_set1_ps(in[row * kRow2 + x]);
            LENET_EXT_UNROLL for (int kx = 0; kx < 5; ++kx) {
              if (x - kx >= 0 && x - kx < 10) sum[row][x - kx] = _mm512_fmadd_ps(w[kx], value, sum[row][x - kx]);
            }
          }
        }
      }
    }
    LENET_EXT_UNROLL for (int x = 0; x < 5; ++x) {
      const Winner best = relu_pool<with_codes>(sum[0][2 * x], sum[0][2 * x + 1], sum[1][2 * x], sum[1][2 * x + 1]);
      pooled[y * 5 + x] = (__m512)best.value;
      if (with_codes) winners[y * 5 + x] = (__m512)best.code;
    }
  }
  transpose_pooled2(pooled, [&](int channel, int column, __m512 v) __attribute__((always_inline)) {
    _mm512_storeu_ps(output + channel * kPooled2 + column, v);
  });
  if (!with_codes) return;
  transpose_pooled2(winners, [&](int channel, int column, __m512 v) __attribute__((always_inline)) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + channel * kPooled2 + column),
                     _mm512_cvtepi32_epi8(_mm512_castps_si512(v)));
  });
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
