// An image of the backward passes of LeNet's two convolutions, for 16 vectors of 8 floats: lists of winners, as
// conv_backward.h explains. The lists are made eight entries at a time, and sums are cut into pieces that fit the
// registers.
#pragma once

#include "conv_pool_lenet_shape.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// For each mask of eight lanes, those that are in it, in order, at the front.
struct Front {
  alignas(8) uint8_t lanes[256][8];
};
constexpr Front make_front() {
  Front front{};
  for (int mask = 0; mask < 256; ++mask) {
    for (int lane = 0, count = 0; lane < 8; ++lane) {
      if (mask >> lane & 1) front.lanes[mask][count++] = static_cast<uint8_t>(lane);
    }
  }
  return front;
}
constexpr Front kFront = make_front();

LENET_EXT_INLINE __m256i load_codes(const uint8_t* codes) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
}
// Where the winner of a 2x2 window is, in elements from the window's corner.
LENET_EXT_INLINE __m256i winner_offset(__m256i codes, int row, int column) {
  const __m256i down = _mm256_mullo_epi32(_mm256_srli_epi32(codes, 1), _mm256_set1_epi32(row));
  return _mm256_add_epi32(down,
                          _mm256_mullo_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(1)), _mm256_set1_epi32(column)));
}
LENET_EXT_INLINE __m256i load_ints(const int32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// Winners: where each is, in elements from some base, and its gradient.
template <int capacity>
struct WinnerList {
  int32_t offsets[capacity + 8];
  float scales[capacity + 8];
  int count;

  // Of eight entries those of `wanted` that have a winner. Codes of 2x2 windows are 0..3; 255, and whatever a caller
  // may have made up, is no winner.
  LENET_EXT_INLINE __m256 append(int wanted, __m256i codes, __m256i offset, __m256 scale) {
    // Signed: no code is above 255.
    const __m256i dead = _mm256_cmpgt_epi32(codes, _mm256_set1_epi32(3));
    const int alive = ~_mm256_movemask_ps(_mm256_castsi256_ps(dead)) & wanted;
    const __m256i front = load_codes(kFront.lanes[alive]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(offsets + count), _mm256_permutevar8x32_epi32(offset, front));
    _mm256_storeu_ps(scales + count, _mm256_permutevar8x32_ps(scale, front));
    count += __builtin_popcount(static_cast<unsigned>(alive));
    return _mm256_andnot_ps(_mm256_castsi256_ps(dead), scale);
  }
};

// Adds to `sums`, rows `sums_stride` apart, the `rows` x `vectors` elements at each winner of `base`, times its
// gradient. `sets` of sums, so that enough multiply-adds are in flight.
template <int rows, int vectors, int sets, int capacity>
LENET_EXT_INLINE void add_windows(const float* base, int stride, const WinnerList<capacity>& winners, float* sums,
                                  int sums_stride) {
  __m256 sum[sets][rows][vectors];
  LENET_EXT_UNROLL for (int i = 0; i < sets * rows * vectors; ++i)
    sum[i / (rows * vectors)][i / vectors % rows][i % vectors] = _mm256_setzero_ps();
  auto add = [&](int set, int entry) __attribute__((always_inline)) {
    const __m256 scale = _mm256_broadcast_ss(winners.scales + entry);
    const float* window = base + winners.offsets[entry];
    LENET_EXT_UNROLL for (int r = 0; r < rows; ++r) {
      LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v)
        sum[set][r][v] = _mm256_fmadd_ps(scale, _mm256_loadu_ps(window + r * stride + 8 * v), sum[set][r][v]);
    }
  };
  int entry = 0;
  for (; entry + sets <= winners.count; entry += sets) {
    LENET_EXT_UNROLL for (int set = 0; set < sets; ++set)
      add(set, entry + set);
  }
  for (; entry < winners.count; ++entry) add(0, entry);
  LENET_EXT_UNROLL for (int r = 0; r < rows; ++r) {
    LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v) {
      const __m256 all = sets == 2 ? _mm256_add_ps(sum[0][r][v], sum[sets - 1][r][v]) : sum[0][r][v];
      float* to = sums + r * sums_stride + 8 * v;
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), all));
    }
  }
}

// Corners of the pooling windows in a convolution's input.
template <int windows, int pooled, int row, int column>
struct Corners {
  int32_t at[windows];
};
template <int windows, int pooled, int row, int column>
constexpr Corners<windows, pooled, row, column> make_corners() {
  Corners<windows, pooled, row, column> corners{};
  for (int i = 0; i < windows; ++i) corners.at[i] = i / pooled * 2 * row + i % pooled * 2 * column;
  return corners;
}

LENET_EXT_INLINE float sum_of_lanes(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The winners of a channel, `windows` codes and gradients; returns the sum of their gradients. No load passes the end
// of them: the last eight overlap those before.
template <int windows, int pooled, int row, int column, int capacity>
LENET_EXT_INLINE float list_channel(const float* grad, const uint8_t* codes, WinnerList<capacity>& winners) {
  static constexpr auto corners = make_corners<windows, pooled, row, column>();
  winners.count = 0;
  __m256 sum = _mm256_setzero_ps();
  for (int first = 0; first < windows; first += 8) {
    const int at = min_of(first, windows - 8);
    const int wanted = 0xff << (first - at) & 0xff;
    const __m256i code = load_codes(codes + at);
    const __m256i offset = _mm256_add_epi32(load_ints(corners.at + at), winner_offset(code, row, column));
    const __m256 alive = winners.append(wanted, code, offset, _mm256_loadu_ps(grad + at));
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i counts = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first - at - 1));
    sum = _mm256_add_ps(sum, _mm256_and_ps(alive, _mm256_castsi256_ps(counts)));
  }
  return sum_of_lanes(sum);
}

// The first convolution. The copy of the image has room for what the last vectors read beyond it.
template <int in_channels>
struct Backward1 {
  float image[in_channels * kSize1 + 16];
  WinnerList<kPooled1> winners;
};

template <int in_channels>
void backward1_image(const float* image, const float* grad, const uint8_t* codes, Backward1<in_channels>& b,
                     float* sums) {
  for (int i = 0; i < in_channels * kSize1; i += 8) _mm256_storeu_ps(b.image + i, _mm256_loadu_ps(image + i));
  for (int o = 0; o < kChannels1; ++o) {
    sums[kSums1<in_channels> + o] +=
        list_channel<kPooled1, 14, kRow1, 1>(grad + o * kPooled1, codes + o * kPooled1, b.winners);
    for (int c = 0; c < in_channels; ++c) {
      add_windows<5, 1, 2>(b.image + c * kSize1, kRow1, b.winners, sums + (o * in_channels + c) * 40, 8);
    }
  }
}

// The second convolution, in pixels of six channels together. The input gradient around a pooled position is 6 rows of
// 36 elements, which all its winners reach: each kernel, with a frame of zeros, is read from one of four places.
constexpr int kFramedRow = 48, kFramed = 7 * kFramedRow;
constexpr int64_t kPackedKernels2 = kChannels2 * kFramed;
constexpr int kPixelsBeyond = 16;  // of what the last vectors read

struct Backward2 {
  float image[kChannels1 * kPooled1 + kPixelsBeyond];
  float grad_image[kChannels1 * kPooled1 + kPixelsBeyond];
  WinnerList<kPooled2> winners;
  WinnerList<kChannels2> of_position[kPooled2];
};

inline void pack_kernels2(const float* weight, float* packed) {
  for (int64_t i = 0; i < kPackedKernels2; ++i) packed[i] = 0;
  for (int o = 0; o < kChannels2; ++o) {
    for (int c = 0; c < kChannels1; ++c) {
      for (int tap = 0; tap < kTaps; ++tap) {
        packed[o * kFramed + (1 + tap / 5) * kFramedRow + (1 + tap % 5) * kChannels1 + c] =
            weight[(o * kChannels1 + c) * kTaps + tap];
      }
    }
  }
}

inline void to_pixels(const float* planes, float* pixels) {
  for (int i = 0; i < kPooled1; ++i) {
    for (int c = 0; c < kChannels1; ++c) pixels[i * kChannels1 + c] = planes[c * kPooled1 + i];
  }
}

// The winners of all channels at each pooled position, channels in the lanes.
inline void list_positions(const float* grad, const uint8_t* codes, Backward2& b) {
  for (int i = 0; i < kPooled2; ++i) b.of_position[i].count = 0;
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int o = 0; o < kChannels2; o += 8) {
    const __m256i kernel = _mm256_mullo_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(o)), _mm256_set1_epi32(kFramed));
    const __m256i inside = _mm256_add_epi32(kernel, _mm256_set1_epi32(kFramedRow + kChannels1));
    for (int first = 0; first < kPooled2; first += 8) {
      const int at = min_of(first, kPooled2 - 8);
      Vec<float, 8> g[8], c[8];
      LENET_EXT_UNROLL for (int i = 0; i < 8; ++i) {
        g[i] = load<Vec<float, 8>>(grad + (o + i) * kPooled2 + at);
        c[i] = (Vec<float, 8>)load_codes(codes + (o + i) * kPooled2 + at);
      }
      transpose_tile<8>(g);
      transpose_tile<8>(c);
      LENET_EXT_UNROLL for (int i = 0; i < 8; ++i) {
        if (i < first - at) continue;  // done before
        const __m256i code = (__m256i)c[i];
        b.of_position[at + i].append(0xff, code, _mm256_sub_epi32(inside, winner_offset(code, kFramedRow, kChannels1)),
                                     (__m256)g[i]);
      }
    }
  }
}

// `kernels` and `grad_input` are null where no input gradient is wanted, `sums` where no weight gradient is.
inline void backward2_image(const float* image, const float* grad, const uint8_t* codes, const float* kernels,
                            Backward2& b, float* sums, float* grad_input) {
  if (sums != nullptr) {
    to_pixels(image, b.image);
    for (int o = 0; o < kChannels2; ++o) {
      sums[kSums2 + o] +=
          list_channel<kPooled2, 5, kPixels2, kChannels1>(grad + o * kPooled2, codes + o * kPooled2, b.winners);
      float* to = sums + o * 160;
      add_windows<3, 4, 1>(b.image, kPixels2, b.winners, to, 32);
      add_windows<2, 4, 1>(b.image + 3 * kPixels2, kPixels2, b.winners, to + 96, 32);
    }
  }
  if (grad_input == nullptr) return;
  list_positions(grad, codes, b);
  for (int i = 0; i < kChannels1 * kPooled1; ++i) b.grad_image[i] = 0;
  for (int position = 0; position < kPooled2; ++position) {
    float* window = b.grad_image + position / 5 * 2 * kPixels2 + position % 5 * 2 * kChannels1;
    LENET_EXT_UNROLL for (int row = 0; row < 6; row += 2)
      add_windows<2, 5, 1>(kernels + row * kFramedRow, kFramedRow, b.of_position[position], window + row * kPixels2,
                           kPixels2);
  }
  for (int c = 0; c < kChannels1; ++c) {
    for (int i = 0; i < kPooled1; ++i) grad_input[c * kPooled1 + i] = b.grad_image[i * kChannels1 + c];
  }
}

// The sums of an output channel's weights, [5][32], into their gradient, [6][25].
inline void store_sums2(const float* sums, float* grad_weight) {
  for (int c = 0; c < kChannels1; ++c) {
    for (int tap = 0; tap < kTaps; ++tap) {
      grad_weight[c * kTaps + tap] = sums[tap / 5 * 32 + tap % 5 * kChannels1 + c];
    }
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
