// The two convolutions of LeNet (5x5, 2x2 pooling, 1x32x32 or 3x32x32 -> 6 and 6x14x14 -> 16 channels) with every size
// a constant, for vectors of 16 floats. They serve whoever calls conv_relu_max_pool2d with these shapes: the layers
// alone as well as the whole network.
//
// Forward, an image at a time: in the first convolution the lanes are output columns (six channels would leave most
// lanes idle), in the second the 16 output channels. Two convolution rows stay in registers until they are pooled.
//
// Backward goes by lists of winners, as conv_backward.h explains. What is special here is that no load of the inner
// loops crosses a cache line, which would make it cost double: the image, or the kernels, are laid out several times,
// each time shifted, so that some copy is aligned for every place a winner can have.
#pragma once

#include "conv_pool_kernels.h"

#if LENET_EXT_VECTOR_BYTES == 64

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

constexpr int kTaps = 25;
constexpr int kRow1 = 32, kSize1 = kRow1 * kRow1;      // a channel of the first convolution's input
constexpr int kChannels1 = 6, kPooled1 = 14 * 14;      // its output, the second's input
constexpr int kChannels2 = 16, kPooled2 = 5 * 5;       // the second's output
constexpr int kDepth2 = kChannels1 * kTaps;            // taps of one output channel of the second
constexpr int kRow2 = 14, kPixels2 = 14 * kChannels1;  // a row of its input; with the channels together
constexpr int kSlices = 32;                            // pieces of the batch with sums of their own

// --- forward ---

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

inline int64_t forward1_packed_bytes(const ConvPoolShape&) { return 0; }
inline int64_t forward2_packed_bytes(const ConvPoolShape&) { return (kDepth2 + 1) * kChannels2 * sizeof(float); }
inline int64_t no_scratch(const ConvPoolShape&) { return 0; }
inline int64_t unit_per_image(const ConvPoolShape& s) { return s.batch; }
inline void forward1_prepare(const ConvPoolForward<float>&, void*) {}

inline void forward2_prepare(const ConvPoolForward<float>& job, void* packed) {
  float* to = static_cast<float*>(packed);
  _mm512_store_ps(to, job.bias != nullptr ? _mm512_loadu_ps(job.bias) : _mm512_setzero_ps());
  for (int first = 0; first < kDepth2; first += 16) {
    const int tap = min_of(first, kDepth2 - 16);  // the last tile overlaps the one before
    Vec<float, 16> tile[16];
    LENET_EXT_UNROLL for (int i = 0; i < 16; ++i)
      tile[i] = load<Vec<float, 16>>(job.weight + i * kDepth2 + tap);
    transpose_tile<16>(tile);
    LENET_EXT_UNROLL for (int i = 0; i < 16; ++i)
      store(to + (1 + tap + i) * kChannels2, tile[i]);
  }
}

template <int in_channels>
void forward1_run(const ConvPoolForward<float>& job, const void*, void*, int64_t begin, int64_t end) {
  const float none[kChannels1] = {};
  const float* bias = job.bias != nullptr ? job.bias : none;
  for (int64_t n = begin; n < end; ++n) {
    const float* image = job.input + n * job.input_strides.n;
    float* output = job.output + n * job.output_strides.n;
    if (job.indices != nullptr) {
      forward_image1<in_channels, true>(image, job.weight, bias, output, job.indices + n * job.output_strides.n);
    } else {
      forward_image1<in_channels, false>(image, job.weight, bias, output, nullptr);
    }
  }
}

inline void forward2_run(const ConvPoolForward<float>& job, const void* packed, void*, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const float* image = job.input + n * job.input_strides.n;
    float* output = job.output + n * job.output_strides.n;
    if (job.indices != nullptr) {
      forward_image2<true>(image, static_cast<const float*>(packed), output, job.indices + n * job.output_strides.n);
    } else {
      forward_image2<false>(image, static_cast<const float*>(packed), output, nullptr);
    }
  }
}

// --- backward ---

// A slice of several images makes better use of what it reads for all of them; several slices make use of threads.
inline int64_t backward_slices(const ConvPoolShape& s) {
  return max_of<int64_t>(min_of<int64_t>(divide_up(s.batch, s.batch < 32 ? 4 : 8), kSlices), 1);
}

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
constexpr int kSums1 = kChannels1 * in_channels * 5 * 8;
template <int in_channels>
constexpr int kPartial1 = kSums1<in_channels> + 16;  // and the sums of the gradients

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
constexpr int kSums2 = kChannels2 * 5 * 32;
constexpr int kPartial2 = kSums2 + kChannels2;
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

inline int64_t backward1_packed_bytes(const ConvPoolShape&, bool) { return 0; }
inline int64_t backward2_packed_bytes(const ConvPoolShape&, bool input_gradient) {
  return input_gradient ? 2 * kKernels2 * sizeof(float) : 0;
}
template <int in_channels>
int64_t backward1_scratch_bytes(const ConvPoolShape&, bool) {
  return sizeof(Backward1<in_channels>);
}
inline int64_t backward2_scratch_bytes(const ConvPoolShape&, bool) { return sizeof(Backward2); }
template <int in_channels>
int64_t backward1_partial_bytes(const ConvPoolShape&) {
  return kPartial1<in_channels> * sizeof(float);
}
inline int64_t backward2_partial_bytes(const ConvPoolShape&) { return kPartial2 * sizeof(float); }
inline bool backward1_prepare(const ConvPoolBackward<float>&, void*) { return true; }

inline bool backward2_prepare(const ConvPoolBackward<float>& job, void* packed) {
  if (job.grad_input == nullptr) return true;
  if (!all_finite(job.weight, kChannels2 * kDepth2)) return false;
  float* left = static_cast<float*>(packed);
  float* right = left + kKernels2;
  for (int o = 0; o < kChannels2; ++o) {
    for (int ky = 0; ky < 5; ++ky, left += kWindowRow, right += kWindowRow) {
      __m512 planes[6], pixels[2];
      load_planes(job.weight + o * kDepth2 + ky * 5, kTaps, 5, planes);
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
  return true;
}

// The images of a slice.
struct Slice {
  int64_t begin, end;
};
LENET_EXT_INLINE Slice slice_images(const ConvPoolShape& s, int64_t slice) {
  const int64_t slices = backward_slices(s);
  return {slice * s.batch / slices, (slice + 1) * s.batch / slices};
}

template <int in_channels>
bool backward1_run(const ConvPoolBackward<float>& job, const void*, void* partials, void* scratch, int64_t begin,
                   int64_t end) {
  constexpr int size = kPartial1<in_channels>;
  auto& b = *static_cast<Backward1<in_channels>*>(scratch);
  for (int64_t slice = begin; slice < end; ++slice) {
    float* sums = static_cast<float*>(partials) + slice * size;
    for (int i = 0; i < size; ++i) sums[i] = 0;
    const Slice images = slice_images(job.shape, slice);
    for (int64_t n = images.begin; n < images.end; ++n) {
      const float* image = job.input + n * job.input_strides.n;
      if (!all_finite(image, in_channels * kSize1)) return false;
      backward1_image<in_channels>(image, job.grad_output + n * job.grad_output_strides.n,
                                   job.indices + n * job.indices_strides.n, b, sums);
    }
    if (!all_finite(sums + kSums1<in_channels>, kChannels1)) return false;
  }
  return true;
}

inline bool backward2_run(const ConvPoolBackward<float>& job, const void* packed, void* partials, void* scratch,
                          int64_t begin, int64_t end) {
  Backward2& b = *static_cast<Backward2*>(scratch);
  const bool weight_gradient = job.grad_weight != nullptr;
  for (int64_t slice = begin; slice < end; ++slice) {
    float* sums = static_cast<float*>(partials) + slice * kPartial2;
    if (weight_gradient) {
      for (int i = 0; i < kPartial2; ++i) sums[i] = 0;
    }
    const Slice images = slice_images(job.shape, slice);
    for (int64_t n = images.begin; n < images.end; ++n) {
      const float* image = job.input + n * job.input_strides.n;
      const float* grad = job.grad_output + n * job.grad_output_strides.n;
      if (weight_gradient && !all_finite(image, kChannels1 * kPooled1)) return false;
      if (!all_finite(grad, kChannels2 * kPooled2)) return false;
      backward2_image(image, grad, job.indices + n * job.indices_strides.n, static_cast<const float*>(packed), b,
                      weight_gradient ? sums : nullptr,
                      job.grad_input != nullptr ? job.grad_input + n * job.grad_input_strides.n : nullptr);
    }
  }
  return true;
}

template <int in_channels>
struct BackwardBoth {
  Backward1<in_channels> first;
  Backward2 second;
  alignas(64) float grad[kChannels1 * kPooled1];
};

template <int in_channels>
bool backward_both_run(const ConvPoolBackward<float>& job1, const ConvPoolBackward<float>& job2, const void* packed,
                       void* partials1, void* partials2, void* scratch, int64_t begin, int64_t end) {
  constexpr int size1 = kPartial1<in_channels>;
  auto& b = *static_cast<BackwardBoth<in_channels>*>(scratch);
  for (int64_t slice = begin; slice < end; ++slice) {
    float* sums1 = static_cast<float*>(partials1) + slice * size1;
    float* sums2 = static_cast<float*>(partials2) + slice * kPartial2;
    for (int i = 0; i < size1; ++i) sums1[i] = 0;
    for (int i = 0; i < kPartial2; ++i) sums2[i] = 0;
    const Slice images = slice_images(job1.shape, slice);
    for (int64_t n = images.begin; n < images.end; ++n) {
      const float* image = job1.input + n * job1.input_strides.n;
      const float* between = job2.input + n * job2.input_strides.n;
      const float* grad = job2.grad_output + n * job2.grad_output_strides.n;
      if (!all_finite(image, in_channels * kSize1) || !all_finite(between, kChannels1 * kPooled1) ||
          !all_finite(grad, kChannels2 * kPooled2)) {
        return false;
      }
      backward2_image(between, grad, job2.indices + n * job2.indices_strides.n, static_cast<const float*>(packed),
                      b.second, sums2, b.grad);
      backward1_image<in_channels>(image, b.grad, job1.indices + n * job1.indices_strides.n, b.first, sums1);
    }
    if (!all_finite(sums1 + kSums1<in_channels>, kChannels1)) return false;
  }
  return true;
}

// Adds up the slices, in order, into the first.
inline void add_slices(const ConvPoolShape& s, float* sums, int size, int64_t begin, int64_t end) {
  for (int64_t slice = 1; slice < backward_slices(s); ++slice) {
    for (int64_t i = begin; i < end; ++i) sums[i] += sums[slice * size + i];
  }
}

template <int in_channels>
void backward1_reduce(const ConvPoolBackward<float>& job, void* partials, int64_t begin, int64_t end) {
  constexpr int depth = in_channels * kTaps, biases = kSums1<in_channels>, size = kPartial1<in_channels>;
  float* sums = static_cast<float*>(partials);
  add_slices(job.shape, sums, size, begin * depth / 5 * 8, end * depth / 5 * 8);
  add_slices(job.shape, sums, size, biases + begin, biases + end);
  for (int64_t o = begin; o < end; ++o) {
    for (int tap = 0; tap < depth; ++tap) {
      const int64_t row = (o * depth + tap) / 5;
      job.grad_weight[o * depth + tap] = sums[row * 8 + tap % 5];
    }
    job.grad_bias[o] = sums[biases + o];
  }
}

inline void backward2_reduce(const ConvPoolBackward<float>& job, void* partials, int64_t begin, int64_t end) {
  float* sums = static_cast<float*>(partials);
  add_slices(job.shape, sums, kPartial2, begin * 160, end * 160);
  add_slices(job.shape, sums, kPartial2, kSums2 + begin, kSums2 + end);
  for (int64_t o = begin; o < end; ++o) {
    for (int ky = 0; ky < 5; ++ky) {
      const float* row = sums + (o * 5 + ky) * 32;
      const __m512 pixels[6] = {_mm512_load_ps(row), _mm512_load_ps(row + 16)};
      store_planes(pixels, 5, job.grad_weight + o * kDepth2 + ky * 5, kTaps);
    }
    job.grad_bias[o] = sums[kSums2 + o];
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY

#endif
