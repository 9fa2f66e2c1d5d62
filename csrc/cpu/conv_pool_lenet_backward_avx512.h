// An image of the backward passes of LeNet's two convolutions, for vectors of 16 floats: lists of winners, as
// conv_backward.h explains. What is special here is that no load of the inner loops crosses a cache line, which would
// make it cost double: the image, or the kernels, are laid out several times, each time shifted, so that some copy is
// aligned for every place a winner can have.
#pragma once

#include "conv_pool_lenet_shape.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// Winners: where each is, in elements from some base, and its gradient.
template <int capacity>
struct WinnerList {
  int32_t offsets[capacity + 16];
  float scales[capacity + 16];
  int count;

  LENET_EXT_INLINE void append(__mmask16 alive, __m512i offset, __m512 scale) {
    _mm512_storeu_si512(offsets + count, _mm512_maskz_compress_epi32(alive, offset));
    _mm512_storeu_ps(scales + count, _mm512_maskz_compress_ps(alive, scale));
    count += __builtin_popcount(alive);
  }
};

LENET_EXT_INLINE __m512i load_codes(__mmask16 wanted, const uint8_t* codes) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(wanted, codes));
}
// Codes of 2x2 windows are 0..3; 255, and whatever a caller may have made up, is no winner.
LENET_EXT_INLINE __mmask16 is_winner(__mmask16 wanted, __m512i codes) {
  return _mm512_mask_cmplt_epu32_mask(wanted, codes, _mm512_set1_epi32(4));
}
LENET_EXT_INLINE __m512i code_column(__m512i codes) { return _mm512_and_si512(codes, _mm512_set1_epi32(1)); }
LENET_EXT_INLINE __m512i code_row(__m512i codes) {
  return _mm512_and_si512(_mm512_srli_epi32(codes, 1), _mm512_set1_epi32(1));
}
LENET_EXT_INLINE __m512i times(__m512i a, int b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }

// First convolution. Eight lanes of which five are taps of a kernel row. The image is there twice, the second time
// shifted by half a cache line, for the rows of taps that would otherwise lie across two lines.
constexpr int kCopy1 = kSize1 + 16;
constexpr int kCopies1 = 2 * kCopy1;  // of a channel
template <int in_channels>
struct Backward1 {
  alignas(64) float image[in_channels * kCopies1 + 16];
  WinnerList<kPooled1> winners;
};

template <int in_channels>
void backward1_image(const float* image, const float* grad, const uint8_t* codes, Backward1<in_channels>& b,
                     float* sums) {
  for (int c = 0; c < in_channels; ++c) {
    float* copies = b.image + c * kCopies1;
    for (int i = 0; i < kSize1; i += 16) {
      const __m512 pixels = _mm512_loadu_ps(image + c * kSize1 + i);
      _mm512_store_ps(copies + i, pixels);
      _mm256_store_ps(copies + kCopy1 + i + 8, _mm512_castps512_ps256(pixels));
      _mm256_store_ps(copies + kCopy1 + i + 16, _mm512_extractf32x8_ps(pixels, 1));
    }
  }
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  constexpr int out_row = 14;
  constexpr __mmask16 whole_row = (1 << out_row) - 1;
  for (int o = 0; o < kChannels1; ++o) {
    b.winners.count = 0;
    __m512 bias_sum = _mm512_setzero_ps();
    for (int y = 0; y < out_row; ++y) {
      const int at = o * kPooled1 + y * out_row;
      const __m512i code = load_codes(whole_row, codes + at);
      const __mmask16 alive = is_winner(whole_row, code);
      const __m512 g = _mm512_maskz_loadu_ps(alive, grad + at);
      bias_sum = _mm512_add_ps(bias_sum, g);
      const __m512i column = _mm512_add_epi32(_mm512_slli_epi32(lane, 1), code_column(code));
      const __mmask16 across =
          _mm512_cmpgt_epi32_mask(_mm512_and_si512(column, _mm512_set1_epi32(15)), _mm512_set1_epi32(8));
      __m512i offset = _mm512_add_epi32(column, times(code_row(code), kRow1));
      offset = _mm512_add_epi32(offset, _mm512_set1_epi32(2 * y * kRow1));
      offset = _mm512_mask_add_epi32(offset, across, offset, _mm512_set1_epi32(kCopy1 + 8));
      b.winners.append(alive, offset, g);
    }
    sums[kSums1<in_channels> + o] += _mm512_reduce_add_ps(bias_sum);

    constexpr int rows = in_channels * 5;           // of taps
    constexpr int sets = in_channels == 1 ? 2 : 1;  // so many that enough multiply-adds are in flight
    __m256 sum[sets][rows];
    LENET_EXT_UNROLL for (int i = 0; i < sets * rows; ++i)
      sum[i / rows][i % rows] = _mm256_setzero_ps();
    auto add = [&](int set, int entry) __attribute__((always_inline)) {
      const __m256 scale = _mm256_set1_ps(b.winners.scales[entry]);
      const float* taps = b.image + b.winners.offsets[entry];
      LENET_EXT_UNROLL for (int i = 0; i < rows; ++i) {
        const float* row = taps + i / 5 * kCopies1 + i % 5 * kRow1;
        sum[set][i] = _mm256_fmadd_ps(scale, _mm256_loadu_ps(row), sum[set][i]);
      }
    };
    int entry = 0;
    for (; entry + sets <= b.winners.count; entry += sets) {
      LENET_EXT_UNROLL for (int set = 0; set < sets; ++set)
        add(set, entry + set);
    }
    for (; entry < b.winners.count; ++entry) add(0, entry);
    LENET_EXT_UNROLL for (int i = 0; i < rows; ++i) {
      float* to = sums + (o * rows + i) * 8;
      const __m256 both = sets == 2 ? _mm256_add_ps(sum[0][i], sum[sets - 1][i]) : sum[0][i];
      _mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), both));
    }
  }
}

// Six planes' rows of up to 16 columns <-> their pixels, channels together, as up to 6 vectors. Lane i of vector v
// is channel (16 v + i) % 6 of column (16 v + i) / 6; the lanes of each pair of planes come by one permutation.
struct Interleaving {
  alignas(64) int32_t to_pixels[6][16], to_planes[6][16];
  uint16_t pixel_pairs[6][3], plane_pairs[6][3];  // lanes that come from the pair of planes, or of vectors
};
constexpr Interleaving make_interleaving() {
  Interleaving t{};
  for (int v = 0; v < 6; ++v) {
    for (int i = 0; i < 16; ++i) {
      const int channel = (16 * v + i) % 6, column = (16 * v + i) / 6;
      t.to_pixels[v][i] = column + channel % 2 * 16;
      t.pixel_pairs[v][channel / 2] |= static_cast<uint16_t>(1 << i);
      const int element = 6 * i + v;  // plane v, column i
      t.to_planes[v][i] = element % 32;
      t.plane_pairs[v][element / 32] |= static_cast<uint16_t>(1 << i);
    }
  }
  return t;
}
constexpr Interleaving kInterleaving = make_interleaving();

LENET_EXT_INLINE __m512 pick(const __m512* pairs, const int32_t* index, const uint16_t* lanes) {
  const __m512i from = _mm512_load_si512(index);
  __m512 v = _mm512_permutex2var_ps(pairs[0], from, pairs[1]);
  v = _mm512_mask_mov_ps(v, lanes[1], _mm512_permutex2var_ps(pairs[2], from, pairs[3]));
  return _mm512_mask_mov_ps(v, lanes[2], _mm512_permutex2var_ps(pairs[4], from, pairs[5]));
}
// `columns` of each plane, planes `stride` apart.
LENET_EXT_INLINE void load_planes(const float* from, int stride, int columns, __m512* planes) {
  const __mmask16 wanted = static_cast<__mmask16>((1 << columns) - 1);
  LENET_EXT_UNROLL for (int c = 0; c < 6; ++c)
    planes[c] = _mm512_maskz_loadu_ps(wanted, from + c * stride);
}
LENET_EXT_INLINE void store_planes(const __m512* pixels, int columns, float* to, int stride) {
  const __mmask16 wanted = static_cast<__mmask16>((1 << columns) - 1);
  LENET_EXT_UNROLL for (int c = 0; c < 6; ++c) {
    const __m512 row = pick(pixels, kInterleaving.to_planes[c], kInterleaving.plane_pairs[c]);
    _mm512_mask_storeu_ps(to + c * stride, wanted, row);
  }
}

// Second convolution. A winner's taps are 5 rows of 30 contiguous elements, in 4 vectors of 8. They start at a multiple
// of 6 elements, so that four copies of the image, shifted by 0, 2, 4, 6 elements, have all of them aligned.
constexpr int kPixelRow = 88;  // 84, rounded up to whole vectors
constexpr int kCopy2 = 14 * kPixelRow + 24;
// The input gradient around a pooled position: 6 rows of 36 elements, that all its winners reach. The kernels are there
// twice, for winners in the left and in the right column of their window, each row 40 long.
constexpr int kWindowRow = 40, kKernel2 = 5 * kWindowRow;
constexpr int kKernels2 = kChannels2 * kKernel2;

struct Backward2 {
  alignas(64) float image[4 * kCopy2];
  float grad_image[14 * kPixelRow];
  __m512 grads[kPooled2];  // channels in the lanes
  __m512i codes[kPooled2];
  WinnerList<kPooled2> winners;
  WinnerList<kChannels2> top, bottom;  // winners in the upper and the lower row of their window
};

inline void copies_of_image(const float* image, float* copies) {
  for (int y = 0; y < 14; ++y) {
    __m512 planes[6];
    load_planes(image + y * kRow2, kPooled1, kRow2, planes);
    LENET_EXT_UNROLL for (int v = 0; v < 6; ++v) {
      const __m512 pixels = pick(planes, kInterleaving.to_pixels[v], kInterleaving.pixel_pairs[v]);
      // Copy i serves places that are 2 i elements past a multiple of 8: it is shifted by the rest.
      LENET_EXT_UNROLL for (int i = 0; i < 4; ++i) {
        float* to = copies + i * kCopy2 + (8 - 2 * i) % 8 + y * kPixelRow + 16 * v;
        if (v < 5) {
          _mm512_storeu_ps(to, pixels);
        } else {
          _mm_storeu_ps(to, _mm512_castps512_ps128(pixels));  // the last 4 of 84
        }
      }
    }
  }
}

// grad_weight of one output channel.
inline void weight_gradient2(const WinnerList<kPooled2>& winners, const float* copies, float* sums) {
  __m256 sum[5][4];
  LENET_EXT_UNROLL for (int i = 0; i < 20; ++i)
    sum[i / 4][i % 4] = _mm256_load_ps(sums + i * 8);
  for (int entry = 0; entry < winners.count; ++entry) {
    const __m256 scale = _mm256_set1_ps(winners.scales[entry]);
    const float* taps = copies + winners.offsets[entry];
    LENET_EXT_UNROLL for (int i = 0; i < 20; ++i) {
      sum[i / 4][i % 4] =
          _mm256_fmadd_ps(scale, _mm256_load_ps(taps + i / 4 * kPixelRow + i % 4 * 8), sum[i / 4][i % 4]);
    }
  }
  LENET_EXT_UNROLL for (int i = 0; i < 20; ++i)
    _mm256_store_ps(sums + i * 8, sum[i / 4][i % 4]);
}

// Adds the winners of one pooled position to their window of the input gradient.
inline void input_gradient2(const Backward2& b, const float* kernels, float* window) {
  __m256 sum[6][5];
  LENET_EXT_UNROLL for (int i = 0; i < 30; ++i)
    sum[i / 5][i % 5] = _mm256_setzero_ps();
  for (int entry = 0; entry < b.top.count; ++entry) {
    const __m256 scale = _mm256_set1_ps(b.top.scales[entry]);
    const float* kernel = kernels + b.top.offsets[entry];
    LENET_EXT_UNROLL for (int i = 0; i < 25; ++i)
      sum[i / 5][i % 5] = _mm256_fmadd_ps(scale, _mm256_load_ps(kernel + i * 8), sum[i / 5][i % 5]);
  }
  for (int entry = 0; entry < b.bottom.count; ++entry) {
    const __m256 scale = _mm256_set1_ps(b.bottom.scales[entry]);
    const float* kernel = kernels + b.bottom.offsets[entry];
    LENET_EXT_UNROLL for (int i = 0; i < 25; ++i)
      sum[i / 5 + 1][i % 5] = _mm256_fmadd_ps(scale, _mm256_load_ps(kernel + i * 8), sum[i / 5 + 1][i % 5]);
  }
  LENET_EXT_UNROLL for (int i = 0; i < 30; ++i) {
    float* to = window + i / 5 * kPixelRow + i % 5 * 8;
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum[i / 5][i % 5]));
  }
}

// `kernels` and `grad_input` are null where no input gradient is wanted, `sums` where no weight gradient is.
inline void backward2_image(const float* image, const float* grad, const uint8_t* codes, const float* kernels,
                            Backward2& b, float* sums, float* grad_input) {
  if (sums != nullptr) {
    copies_of_image(image, b.image);
    for (int o = 0; o < kChannels2; ++o) {
      b.winners.count = 0;
      __m512 bias_sum = _mm512_setzero_ps();
      LENET_EXT_UNROLL for (int first = 0; first < kPooled2; first += 16) {
        // Columns and rows of these pooled positions, in elements.
        alignas(64) static constexpr int32_t columns[2][16] = {
            {0, 12, 24, 36, 48, 0, 12, 24, 36, 48, 0, 12, 24, 36, 48, 0}, {12, 24, 36, 48, 0, 12, 24, 36, 48}};
        alignas(64) static constexpr int32_t rows[2][16] = {{0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3},
                                                            {3, 3, 3, 3, 4, 4, 4, 4, 4}};
        const __mmask16 wanted = first == 0 ? 0xffff : (1 << (kPooled2 - 16)) - 1;
        const int at = o * kPooled2 + first;
        const __m512i code = load_codes(wanted, codes + at);
        const __mmask16 alive = is_winner(wanted, code);
        const __m512 g = _mm512_maskz_loadu_ps(alive, grad + at);
        bias_sum = _mm512_add_ps(bias_sum, g);
        const __m512i column =
            _mm512_add_epi32(_mm512_load_si512(columns[first / 16]), times(code_column(code), kChannels1));
        const __m512i row = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(rows[first / 16]), 1), code_row(code));
        const __m512i past = _mm512_and_si512(column, _mm512_set1_epi32(7));  // 0, 2, 4 or 6
        const __m512i shift = _mm512_and_si512(_mm512_sub_epi32(_mm512_setzero_si512(), past), _mm512_set1_epi32(7));
        __m512i offset = _mm512_add_epi32(times(_mm512_srli_epi32(past, 1), kCopy2), shift);
        offset = _mm512_add_epi32(offset, _mm512_add_epi32(column, times(row, kPixelRow)));
        b.winners.append(alive, offset, g);
      }
      sums[kSums2 + o] += _mm512_reduce_add_ps(bias_sum);
      weight_gradient2(b.winners, b.image, sums + o * 5 * 32);
    }
  }
  if (grad_input == nullptr) return;
  for (int half = 0; half < 2; ++half) {  // channels into the lanes, in two overlapping tiles
    const int first = half == 0 ? 0 : kPooled2 - 16;
    Vec<float, 16> tile[16], code_tile[16];
    LENET_EXT_UNROLL for (int o = 0; o < 16; ++o) {
      tile[o] = load<Vec<float, 16>>(grad + o * kPooled2 + first);
      code_tile[o] = (Vec<float, 16>)load_codes(0xffff, codes + o * kPooled2 + first);
    }
    transpose_tile<16>(tile);
    LENET_EXT_UNROLL for (int i = 0; i < 16; ++i)
      b.grads[first + i] = (__m512)tile[i];
    transpose_tile<16>(code_tile);
    LENET_EXT_UNROLL for (int i = 0; i < 16; ++i)
      b.codes[first + i] = (__m512i)code_tile[i];
  }
  for (int i = 0; i < 14 * kPixelRow; i += 16) _mm512_store_ps(b.grad_image + i, _mm512_setzero_ps());
  const __m512i kernel_of_lane =
      times(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), kKernel2);
  for (int position = 0; position < kPooled2; ++position) {
    const __m512i code = b.codes[position];
    const __mmask16 alive = is_winner(0xffff, code);
    const __mmask16 lower = _mm512_mask_test_epi32_mask(alive, code, _mm512_set1_epi32(2));
    const __m512i offset = _mm512_add_epi32(kernel_of_lane, times(code_column(code), kKernels2));
    b.top.count = b.bottom.count = 0;
    b.top.append(alive & ~lower, offset, b.grads[position]);
    b.bottom.append(lower, offset, b.grads[position]);
    input_gradient2(b, kernels, b.grad_image + position / 5 * 2 * kPixelRow + position % 5 * 2 * kChannels1);
  }
  for (int y = 0; y < 14; ++y) {
    __m512 pixels[6];
    LENET_EXT_UNROLL for (int v = 0; v < 5; ++v)
      pixels[v] = _mm512_loadu_ps(b.grad_image + y * kPixelRow + 16 * v);
    pixels[5] = _mm512_zextps128_ps512(_mm_loadu_ps(b.grad_image + y * kPixelRow + 80));
    store_planes(pixels, kRow2, grad_input + y * kRow2, kPooled1);
  }
}

// `weight` of the second convolution, as backward2_image reads it.
constexpr int64_t kPackedKernels2 = 2 * kKernels2;
inline void pack_kernels2(const float* weight, float* packed) {
  float* left = packed;
  float* right = left + kKernels2;
  for (int o = 0; o < kChannels2; ++o) {
    for (int ky = 0; ky < 5; ++ky, left += kWindowRow, right += kWindowRow) {
      __m512 planes[6], pixels[2];
      load_planes(weight + o * kDepth2 + ky * 5, kTaps, 5, planes);
      LENET_EXT_UNROLL for (int v = 0; v < 2; ++v)
        pixels[v] = pick(planes, kInterleaving.to_pixels[v], kInterleaving.pixel_pairs[v]);
      // 30 elements and two zeros, from the first or from the seventh place of 40.
      _mm512_storeu_ps(left, pixels[0]);
      _mm512_storeu_ps(left + 16, pixels[1]);
      _mm256_storeu_ps(left + 32, _mm256_setzero_ps());
      _mm256_storeu_ps(right, _mm256_setzero_ps());
      _mm256_storeu_ps(right + 32, _mm256_setzero_ps());
      _mm512_storeu_ps(right + 6, pixels[0]);
      _mm512_storeu_ps(right + 22, pixels[1]);
    }
  }
}

// The sums of an output channel's weights, [5][32], into their gradient, [6][25].
inline void store_sums2(const float* sums, float* grad_weight) {
  for (int ky = 0; ky < 5; ++ky) {
    const __m512 pixels[6] = {_mm512_load_ps(sums + ky * 32), _mm512_load_ps(sums + ky * 32 + 16)};
    store_planes(pixels, 5, grad_weight + ky * 5, kTaps);
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
