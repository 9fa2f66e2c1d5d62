// The convolution at the winning positions only: the adjoint of the backward pass, from which its own derivative is
// made.
#pragma once

#include "winners.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

template <typename T>
int64_t at_indices_packed_bytes(const ConvPoolShape& s) {
  return s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w * sizeof(Accumulator<T>);
}

template <typename T>
int64_t at_indices_scratch_bytes(const ConvPoolShape& s) {
  return padded_height(s) * padded_width(s) * (s.in_channels / s.groups) * sizeof(Accumulator<T>);
}

// Weights as [out_channel][tap][channel], the order of the taps in the image.
template <typename T>
void at_indices_prepare(const ConvAtIndices<T>& job, void* packed) {
  const ConvPoolShape& s = job.shape;
  const int64_t channels = s.in_channels / s.groups, taps = s.kernel_h * s.kernel_w;
  auto* to = static_cast<Accumulator<T>*>(packed);
  for (int64_t o = 0; o < s.out_channels; ++o) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = 0; c < channels; ++c) *to++ = widen(job.weight[(o * channels + c) * taps + tap]);
    }
  }
}

template <typename T>
void at_indices_run(const ConvAtIndices<T>& job, const void* packed, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const ConvPoolShape& s = job.shape;
  const int64_t channels = s.in_channels / s.groups, out_channels = s.out_channels / s.groups;
  const Runs runs = kernel_runs(s, channels);
  const Strides4& st = job.output_strides;
  WinnerTables tables;
  make_winner_tables(s, channels, tables);
  A* image = static_cast<A*>(scratch);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t group = 0; group < s.groups; ++group) {
      gather_pixels(s, job.input + n * job.input_strides.n, job.input_strides, group * channels, channels, 0,
                    padded_height(s), image);
      for (int64_t o = group * out_channels; o < (group + 1) * out_channels; ++o) {
        const A* kernel = static_cast<const A*>(packed) + o * runs.count * runs.length;
        for (int64_t y = 0; y < s.out_h; ++y) {
          for (int64_t x = 0; x < s.out_w; ++x) {
            const int64_t at = n * st.n + o * st.c + y * st.h + x * st.w;
            const uint8_t code = job.indices[at];
            A sum = 0;
            if (names_winner(s, tables, code, y, x)) {
              const A* patch = image + window_offset(s, channels, y, x) + tables.offset[code];
              for (int64_t run = 0; run < runs.count; ++run) {
                sum += dot(kernel + run * runs.length,
                           patch + run / runs.per_row * runs.row_stride + run % runs.per_row * runs.column_stride,
                           runs.length);
              }
              if (job.bias != nullptr) sum += widen(job.bias[o]);
            }
            job.output[at] = narrow<T>(sum);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
