// Transposing between layouts with the channels together and layouts with the pixels together.
#pragma once

#include "simd.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// `count` columns of `lanes` or fewer to rows: to[lane * stride + x] = from[x * width + lane]. In registers where there
// are enough rows for a tile and all `lanes` values of a row may be read; the last tile overlaps the one before.
template <int lanes, typename From, typename To>
void transpose_row(const From* from, int64_t rows, int64_t width, int64_t count, To* to, int64_t stride) {
  if constexpr ((sizeof(From) == 4 && lanes >= 4) || (sizeof(From) == 1 && lanes == 16)) {
    using Tile = Vec<From, lanes>;
    typedef To Out __attribute__((vector_size(sizeof(To) * lanes)));
    if (rows >= lanes) {
      for (int64_t begin = 0; begin < rows; begin += lanes) {
        const int64_t x = min_of(begin, rows - lanes);
        Tile tile[lanes];
        LENET_EXT_UNROLL for (int i = 0; i < lanes; ++i)
          tile[i] = load<Tile>(from + (x + i) * width);
        transpose_tile<lanes, From>(tile);
        LENET_EXT_UNROLL for (int i = 0; i < lanes; ++i) {
          if (i >= count) continue;
          if constexpr (sizeof(To) == sizeof(From)) {
            store(to + i * stride + x, tile[i]);
          } else {
            store(to + i * stride + x, __builtin_convertvector(tile[i], Out));
          }
        }
      }
      return;
    }
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t x = 0; x < rows; ++x) to[lane * stride + x] = static_cast<To>(from[x * width + lane]);
  }
}

// A matrix of which nothing but the `columns` of each row may be read: to[column * stride + x] = from[x * width +
// column].
template <typename T>
void transpose_plane(const T* from, int64_t rows, int64_t width, int64_t columns, T* to, int64_t stride) {
  constexpr int kTile = kLanes<T>;
  if (columns >= kTile) {
    for (int64_t begin = 0; begin < columns; begin += kTile) {
      const int64_t column = min_of(begin, columns - kTile);  // the last tile overlaps the one before
      transpose_row<kTile>(from + column, rows, width, kTile, to + column * stride, stride);
    }
    return;
  }
  for (int64_t x = 0; x < rows; ++x) {
    for (int64_t column = 0; column < columns; ++column) to[column * stride + x] = from[x * width + column];
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
