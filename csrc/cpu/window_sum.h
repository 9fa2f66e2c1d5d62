// The inner loop of both convolution gradients: a weighted sum of small windows out of one array,
//
//   sum[r][i] += scale[e] * base[offset[e] + r * stride + i]      over the entries e of a list.
//
// For the weight gradient of one output channel the list holds its winning positions, the scales are their
// gradients and the windows are the input patches under them. For the input gradient around one pooled position
// the list holds the output channels, and the windows are their kernels, shifted to where each one won.
#pragma once

#include "simd.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

template <typename A>
struct WindowList {
  const A* base;
  int64_t stride;          // between rows of a window
  const int32_t* offsets;  // of each entry
  const A* scales;
  int64_t count;
};

// --8<-- [start:window-sum]
// Adds a tile of `rows` rows of `vectors` vectors. Small tiles keep two sets of sums, so that enough
// multiply-adds are in flight to hide their latency.
template <typename A, int lanes, int rows, int vectors>
void window_sum_tile(const WindowList<A>& list, int64_t base_offset, A* sums, int64_t sums_stride) {
  using V = Vec<A, lanes>;
  constexpr int sets = 2 * rows * vectors <= (kRegisters == 32 ? 20 : 10) ? 2 : 1;
  const A* base = list.base + base_offset;
  V sum[sets][rows][vectors];
  auto add = [&](int set, int64_t entry) __attribute__((always_inline)) {
    const V scale = broadcast<V>(list.scales[entry]);
    const A* window = base + list.offsets[entry];
    LENET_EXT_UNROLL for (int r = 0; r < rows; ++r, window += list.stride) {
      LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v)
        sum[set][r][v] += scale * load<V>(window + v * lanes);
    }
  };
  const int64_t length = at_once(list.count, kTermsAtOnce);
  for (int64_t entry = 0; entry < list.count;) {
    LENET_EXT_UNROLL for (int i = 0; i < sets * rows * vectors; ++i)
      sum[i / (rows * vectors)][i / vectors % rows][i % vectors] = V{};
    const int64_t end = min_of(entry + length, list.count);
    if (sets == 2) {
      for (; entry + 2 <= end; entry += 2) {
        add(0, entry);
        add(sets - 1, entry + 1);
      }
    }
    for (; entry < end; ++entry) add(0, entry);
    LENET_EXT_UNROLL for (int r = 0; r < rows; ++r) {
      LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v) {
        A* to = sums + r * sums_stride + v * lanes;
        V total = sum[0][r][v];
        if (sets == 2) total += sum[sets - 1][r][v];
        store(to, load<V>(to) + total);
      }
    }
  }
}
// --8<-- [end:window-sum]

template <typename A>
using WindowSumTile = void (*)(const WindowList<A>&, int64_t base_offset, A* sums, int64_t sums_stride);

constexpr int kMaxTileVectors = 5;
constexpr int kMaxTileRows = 7;
constexpr int kMaxTile = kRegisters == 32 ? 30 : 14;

LENET_EXT_INLINE constexpr int rows_that_fit(int vectors) {
  return kMaxTile / vectors < kMaxTileRows ? kMaxTile / vectors : kMaxTileRows;
}

template <typename A, int lanes, int vectors>
WindowSumTile<A> window_sum_tile_of(int64_t rows) {
  constexpr int most = rows_that_fit(vectors);
  switch (rows) {
    case 1:
      return window_sum_tile<A, lanes, 1, vectors>;
    case 2:
      return window_sum_tile<A, lanes, min_of(2, most), vectors>;
    case 3:
      return window_sum_tile<A, lanes, min_of(3, most), vectors>;
    case 4:
      return window_sum_tile<A, lanes, min_of(4, most), vectors>;
    case 5:
      return window_sum_tile<A, lanes, min_of(5, most), vectors>;
    case 6:
      return window_sum_tile<A, lanes, min_of(6, most), vectors>;
    case 7:
      return window_sum_tile<A, lanes, min_of(7, most), vectors>;
  }
  return nullptr;
}

// Cuts windows of any size into tiles of nearly equal size.
template <typename A>
struct WindowSum {
  int lanes;
  int64_t row_tiles, tall, tile_rows;        // the first `tall` row tiles have one row more
  int64_t column_tiles, wide, tile_vectors;  // the first `wide` column tiles have one vector more
  WindowSumTile<A> tile[2][2];               // [one row more][one vector more]

  void add(const WindowList<A>& list, A* sums, int64_t sums_stride) const {
    int64_t row = 0;
    for (int64_t i = 0; i < row_tiles; ++i) {
      const bool more_rows = i < tall;
      int64_t column = 0;
      for (int64_t j = 0; j < column_tiles; ++j) {
        const bool more_vectors = j < wide;
        tile[more_rows][more_vectors](list, row * list.stride + column, sums + row * sums_stride + column, sums_stride);
        column += (tile_vectors + more_vectors) * lanes;
      }
      row += tile_rows + more_rows;
    }
  }
};

template <typename A, int lanes>
WindowSum<A> window_sum_as(int64_t rows, int64_t vectors) {
  WindowSum<A> w;
  w.lanes = lanes;
  w.column_tiles = divide_up(vectors, kMaxTileVectors);
  w.tile_vectors = vectors / w.column_tiles;
  w.wide = vectors % w.column_tiles;
  const int64_t widest = w.tile_vectors + (w.wide > 0);
  w.row_tiles = divide_up(rows, rows_that_fit(static_cast<int>(widest)));
  w.tile_rows = rows / w.row_tiles;
  w.tall = rows % w.row_tiles;
  for (int more_rows = 0; more_rows < 2; ++more_rows) {
    for (int more_vectors = 0; more_vectors < 2; ++more_vectors) {
      const int64_t tall_rows = w.tile_rows + more_rows;
      WindowSumTile<A>& tile = w.tile[more_rows][more_vectors];
      switch (w.tile_vectors + more_vectors) {
        case 1:
          tile = window_sum_tile_of<A, lanes, 1>(tall_rows);
          break;
        case 2:
          tile = window_sum_tile_of<A, lanes, 2>(tall_rows);
          break;
        case 3:
          tile = window_sum_tile_of<A, lanes, 3>(tall_rows);
          break;
        case 4:
          tile = window_sum_tile_of<A, lanes, 4>(tall_rows);
          break;
        case 5:
          tile = window_sum_tile_of<A, lanes, 5>(tall_rows);
          break;
        default:
          tile = nullptr;
      }
    }
  }
  return w;
}

// Half vectors where they waste fewer lanes on a row of `length` elements.
template <typename A>
LENET_EXT_INLINE int window_lanes(int64_t length) {
  constexpr int full = kLanes<A>;
  return full >= 8 && round_up(length, full / 2) < round_up(length, full) ? full / 2 : full;
}

template <typename A>
WindowSum<A> window_sum(int64_t rows, int64_t length) {
  constexpr int full = kLanes<A>, half = full >= 8 ? full / 2 : full;
  const int lanes = window_lanes<A>(length);
  return lanes == full ? window_sum_as<A, full>(rows, divide_up(length, full))
                       : window_sum_as<A, half>(rows, divide_up(length, half));
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
