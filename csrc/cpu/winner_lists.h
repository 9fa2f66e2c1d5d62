// Lists of winners, as the sparse gradients walk them: by output channel for the weight gradient, by pooled position
// for the input gradient. Entries are always written and kept only if there is a winner: a branch would be
// mispredicted half the time. Where the instruction set can compress vectors, 16 entries are made at once.
#pragma once

#include "winners.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// Gradient and codes of one group of channels of one image, and the pooled rows that are wanted of it. What is indexed
// by position starts at the first of those rows.
template <typename T>
struct PooledGroup {
  const T* grad;
  const uint8_t* codes;
  Strides4 grad_strides, code_strides;
  int64_t channels;
  int64_t row_begin, row_end;
};

#if LENET_EXT_VECTOR_BYTES == 64

// Vectors need codes that one register can look up, and rows of neighbours.
template <typename T>
LENET_EXT_INLINE bool in_vectors(const ConvPoolShape& s, const PooledGroup<T>& p) {
  return sizeof(T) == 4 && s.pool_kernel_h * s.pool_kernel_w <= 16 && p.grad_strides.w == 1 && p.code_strides.w == 1;
}

LENET_EXT_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1 << count) - 1);
}

// Appends 16 entries, of which those of `alive` stay. The arrays have room for 16 more than they will hold.
LENET_EXT_INLINE void append(__mmask16 alive, __m512i offset, __m512 scale, int32_t* offsets, float* scales,
                             int64_t& count) {
  _mm512_storeu_si512(offsets + count, _mm512_maskz_compress_epi32(alive, offset));
  _mm512_storeu_ps(scales + count, _mm512_maskz_compress_ps(alive, scale));
  count += __builtin_popcount(alive);
}

// names_winner() of 16 codes. `row` and `column`: the convolution position of each window's start.
LENET_EXT_INLINE __mmask16 alive_lanes(const ConvPoolShape& s, const WinnerTables& t, __mmask16 wanted, __m512i codes,
                                       __m512i row, __m512i column) {
  const __mmask16 valid = _mm512_mask_cmplt_epu32_mask(
      wanted, codes, _mm512_set1_epi32(static_cast<int>(s.pool_kernel_h * s.pool_kernel_w)));
  if (t.inside) return valid;
  row = _mm512_add_epi32(row, _mm512_permutexvar_epi32(codes, _mm512_loadu_si512(t.row)));
  column = _mm512_add_epi32(column, _mm512_permutexvar_epi32(codes, _mm512_loadu_si512(t.column)));
  const __mmask16 in_rows = _mm512_mask_cmplt_epu32_mask(valid, row, _mm512_set1_epi32(static_cast<int>(s.conv_h)));
  return _mm512_mask_cmplt_epu32_mask(in_rows, column, _mm512_set1_epi32(static_cast<int>(s.conv_w)));
}
LENET_EXT_INLINE __m512i all_lanes(int64_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }

inline int64_t channel_winners_in_vectors(const ConvPoolShape& s, const WinnerTables& t, const PooledGroup<float>& p,
                                          int64_t channel, const int32_t* window_offsets, int32_t* offsets,
                                          float* scales) {
  const __m512i table = _mm512_loadu_si512(t.offset);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0;
  for (int64_t y = p.row_begin; y < p.row_end; ++y) {
    const float* g = p.grad + channel * p.grad_strides.c + y * p.grad_strides.h;
    const uint8_t* codes = p.codes + channel * p.code_strides.c + y * p.code_strides.h;
    for (int64_t x = 0; x < s.out_w; x += 16) {
      const __mmask16 wanted = first_lanes(s.out_w - x);
      const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(wanted, codes + x));
      const __m512i row = all_lanes(y * s.pool_stride_h - s.pool_pad_h);
      const __m512i column = _mm512_add_epi32(_mm512_mullo_epi32(lane, all_lanes(s.pool_stride_w)),
                                              all_lanes(x * s.pool_stride_w - s.pool_pad_w));
      const __m512i start = _mm512_maskz_loadu_epi32(wanted, window_offsets + (y - p.row_begin) * s.out_w + x);
      append(alive_lanes(s, t, wanted, code, row, column),
             _mm512_add_epi32(start, _mm512_permutexvar_epi32(code, table)), _mm512_maskz_loadu_ps(wanted, g + x),
             offsets, scales, count);
    }
  }
  return count;
}

// Tiles of 16 channels x 16 positions of a row are transposed, so that a position's channels are in the lanes.
inline void position_winners_in_vectors(const ConvPoolShape& s, const WinnerTables& t, const PooledGroup<float>& p,
                                        const int32_t* framed_offset, int64_t kernel_size, int64_t list_size,
                                        int32_t* offsets, float* scales, int32_t* counts) {
  const __m512i table = _mm512_loadu_si512(framed_offset);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t channel = 0; channel < p.channels; channel += 16) {
    const __mmask16 channels = first_lanes(p.channels - channel);
    const __m512i kernel = _mm512_mullo_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(channel))),
                                              _mm512_set1_epi32(static_cast<int>(kernel_size)));
    for (int64_t y = p.row_begin; y < p.row_end; ++y) {
      for (int64_t x = 0; x < s.out_w; x += 16) {
        const __mmask16 wanted = first_lanes(s.out_w - x);
        Vec<float, 16> grads[16], codes[16];
        LENET_EXT_UNROLL for (int i = 0; i < 16; ++i) {
          const int64_t c = min_of(channel + i, p.channels - 1);
          grads[i] =
              (Vec<float, 16>)_mm512_maskz_loadu_ps(wanted, p.grad + c * p.grad_strides.c + y * p.grad_strides.h + x);
          codes[i] = (Vec<float, 16>)_mm512_cvtepu8_epi32(
              _mm_maskz_loadu_epi8(wanted, p.codes + c * p.code_strides.c + y * p.code_strides.h + x));
        }
        transpose_tile<16>(grads);
        transpose_tile<16>(codes);
        for (int64_t i = 0; i < min_of<int64_t>(16, s.out_w - x); ++i) {
          const __m512i code = (__m512i)codes[i];
          const int64_t position = (y - p.row_begin) * s.out_w + x + i;
          int64_t count = counts[position];
          const __mmask16 alive = alive_lanes(s, t, channels, code, all_lanes(y * s.pool_stride_h - s.pool_pad_h),
                                              all_lanes((x + i) * s.pool_stride_w - s.pool_pad_w));
          append(alive, _mm512_add_epi32(kernel, _mm512_permutexvar_epi32(code, table)), (__m512)grads[i],
                 offsets + position * list_size, scales + position * list_size, count);
          counts[position] = static_cast<int32_t>(count);
        }
      }
    }
  }
}

#endif

// The winners of one channel: the offsets of their patches in the image, and their gradients. Returns their number.
template <typename T>
int64_t channel_winners(const ConvPoolShape& s, const WinnerTables& t, const PooledGroup<T>& p, int64_t channel,
                        const int32_t* window_offsets, int32_t* offsets, Accumulator<T>* scales) {
#if LENET_EXT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    if (in_vectors(s, p)) return channel_winners_in_vectors(s, t, p, channel, window_offsets, offsets, scales);
  }
#endif
  int64_t count = 0;
  const T* g = p.grad + channel * p.grad_strides.c;
  const uint8_t* codes = p.codes + channel * p.code_strides.c;
  for (int64_t y = p.row_begin, position = 0; y < p.row_end; ++y) {
    for (int64_t x = 0; x < s.out_w; ++x, ++position) {
      const uint8_t code = codes[y * p.code_strides.h + x * p.code_strides.w];
      offsets[count] = window_offsets[position] + t.offset[code];
      scales[count] = widen(g[y * p.grad_strides.h + x * p.grad_strides.w]);
      count += names_winner(s, t, code, y, x);
    }
  }
  return count;
}

// For each pooled position the channels with a winner there: the offsets of their framed kernels, and their gradients,
// in lists of `list_size`. `counts` must be zero on entry.
template <typename T>
void position_winners(const ConvPoolShape& s, const WinnerTables& t, const PooledGroup<T>& p,
                      const int32_t* framed_offset, int64_t kernel_size, int64_t list_size, int32_t* offsets,
                      Accumulator<T>* scales, int32_t* counts) {
#if LENET_EXT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    if (in_vectors(s, p)) {
      return position_winners_in_vectors(s, t, p, framed_offset, kernel_size, list_size, offsets, scales, counts);
    }
  }
#endif
  for (int64_t channel = 0; channel < p.channels; ++channel) {
    const T* g = p.grad + channel * p.grad_strides.c;
    const uint8_t* codes = p.codes + channel * p.code_strides.c;
    for (int64_t y = p.row_begin, position = 0; y < p.row_end; ++y) {
      for (int64_t x = 0; x < s.out_w; ++x, ++position) {
        const uint8_t code = codes[y * p.code_strides.h + x * p.code_strides.w];
        const int64_t entry = position * list_size + counts[position];
        offsets[entry] = static_cast<int32_t>(channel * kernel_size) + framed_offset[code];
        scales[entry] = widen(g[y * p.grad_strides.h + x * p.grad_strides.w]);
        counts[position] += names_winner(s, t, code, y, x);
      }
    }
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
