// The matrix products of small linear layers: outputs in the lanes, sums in registers.
//
// A tile is `rows` x `vectors` vectors of the output; per step of k it loads `vectors` vectors of b and broadcasts
// `rows` values of a. Where a row is no multiple of the lanes its last vector overlaps the one before: those columns
// are computed twice, to the same value, and no masked loads are needed.
#pragma once

#include "gemm_kernels.h"
#include "simd.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// --8<-- [start:tile]
template <typename A, int lanes, int vectors, int rows>
void gemm_tile(const Gemm<A>& g, int64_t row, int64_t column) {
  using V = Vec<A, lanes>;
  const int64_t last = min_of<int64_t>((vectors - 1) * lanes, g.n - lanes - column);
  auto at = [last](int v) __attribute__((always_inline)) { return v < vectors - 1 ? v * lanes : last; };
  const A* a = g.a + row * g.a_row;
  const A* b = g.b + column;
  const int64_t length = at_once(g.k, kTermsAtOnce);
  for (int64_t begin = 0; begin == 0 || begin < g.k; begin += length) {
    V sum[rows][vectors] = {};
    const int64_t end = min_of(begin + length, g.k);
    for (int64_t k = begin; k < end; ++k, a += g.a_column, b += g.b_row) {
      V right[vectors];
      LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v)
        right[v] = load<V>(b + at(v));
      LENET_EXT_UNROLL for (int r = 0; r < rows; ++r) {
        const V left = broadcast<V>(a[r * g.a_row]);
        LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v)
          sum[r][v] += left * right[v];
      }
    }
    A* const to = g.output + row * g.output_row + column;
    if (g.accumulate || begin > 0) {  // all of it before anything is stored, because of the columns that come twice
      LENET_EXT_UNROLL for (int r = 0; r < rows; ++r) {
        LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v)
          sum[r][v] += load<V>(to + r * g.output_row + at(v));
      }
    }
    const bool last = end == g.k;
    LENET_EXT_UNROLL for (int v = 0; v < vectors; ++v) {
      const V bias = last && g.bias != nullptr ? load<V>(g.bias + column + at(v)) : V{};
      LENET_EXT_UNROLL for (int r = 0; r < rows; ++r) {
        V value = sum[r][v] + bias;
        if (last && g.relu) value = relu(value);
        store(to + r * g.output_row + at(v), value);
      }
    }
  }
}
// --8<-- [end:tile]

// Most vectors of a tile. Rows narrower than a full vector are cut into quarter vectors (or single values), of which
// they have at most three.
template <typename A, int lanes>
constexpr int kMaxGemmVectors = lanes < kLanes<A>  ? 3
                                : kRegisters == 32 ? 5
                                                   : 3;

// Most rows of a tile of so many vectors: rows * vectors sums, `vectors` operands and a broadcast stay in registers.
template <typename A, int lanes>
LENET_EXT_INLINE constexpr int gemm_rows(int vectors) {
  return lanes < kLanes<A> ? 4 : min_of((kRegisters - 1 - vectors) / vectors, 8);
}

template <typename A>
using GemmTile = void (*)(const Gemm<A>&, int64_t row, int64_t column);

template <typename A, int lanes, int vectors>
GemmTile<A> gemm_tile_of(int64_t rows) {
  constexpr int most = gemm_rows<A, lanes>(vectors);
  switch (rows) {
    case 1:
      return gemm_tile<A, lanes, vectors, 1>;
    case 2:
      return gemm_tile<A, lanes, vectors, min_of(2, most)>;
    case 3:
      return gemm_tile<A, lanes, vectors, min_of(3, most)>;
    case 4:
      return gemm_tile<A, lanes, vectors, min_of(4, most)>;
    case 5:
      return gemm_tile<A, lanes, vectors, min_of(5, most)>;
    case 6:
      return gemm_tile<A, lanes, vectors, min_of(6, most)>;
    case 7:
      return gemm_tile<A, lanes, vectors, min_of(7, most)>;
    case 8:
      return gemm_tile<A, lanes, vectors, min_of(8, most)>;
  }
  return nullptr;
}

template <typename A, int lanes>
GemmTile<A> gemm_tile_for(int64_t vectors, int64_t rows) {
  constexpr int most = kMaxGemmVectors<A, lanes>;
  switch (vectors) {
    case 1:
      return gemm_tile_of<A, lanes, 1>(rows);
    case 2:
      return gemm_tile_of<A, lanes, min_of(2, most)>(rows);
    case 3:
      return gemm_tile_of<A, lanes, min_of(3, most)>(rows);
    case 4:
      return gemm_tile_of<A, lanes, min_of(4, most)>(rows);
    case 5:
      return gemm_tile_of<A, lanes, min_of(5, most)>(rows);
  }
  return nullptr;
}

// How the columns are cut: tiles of nearly equal numbers of vectors.
struct GemmColumns {
  int lanes;
  int64_t vectors, tiles;
};

template <typename A>
GemmColumns gemm_columns(int64_t n) {
  constexpr int full = kLanes<A>, quarter = full > 4 ? 4 : 1;
  GemmColumns c;
  c.lanes = n >= full ? full : n >= quarter ? quarter : 1;
  c.vectors = divide_up(n, c.lanes);
  c.tiles = divide_up(c.vectors, c.lanes == full ? kMaxGemmVectors<A, full> : kMaxGemmVectors<A, 1>);
  return c;
}

constexpr int64_t kGemmUnitRows = 64;
// Steps of k after which the sums are put down: what one column tile reads of b stays near while the row tiles of a
// unit pass over it (with AVX2 in the L1 cache).
constexpr int64_t kGemmDepth = 256;

template <typename A>
int64_t gemm_units(const Gemm<A>& g) {
  return gemm_columns<A>(g.n).tiles * divide_up(g.m, kGemmUnitRows);
}

// The row tiles of one unit, of nearly equal height, over a part of k.
template <typename A>
void gemm_unit(const Gemm<A>& part, const GemmColumns& c, int64_t unit) {
  constexpr int full = kLanes<A>, quarter = full > 4 ? 4 : 1;
  const int64_t tile = unit % c.tiles, row_begin = unit / c.tiles * kGemmUnitRows;
  const int64_t row_end = min_of(row_begin + kGemmUnitRows, part.m);
  const int64_t first = tile * c.vectors / c.tiles, vectors = (tile + 1) * c.vectors / c.tiles - first;
  const int64_t tile_rows =
      c.lanes == full ? gemm_rows<A, full>(static_cast<int>(vectors)) : gemm_rows<A, 1>(static_cast<int>(vectors));
  const int64_t row_tiles = divide_up(row_end - row_begin, tile_rows);
  for (int64_t i = 0, row = row_begin; i < row_tiles; ++i) {
    const int64_t rows = divide_up(row_end - row, row_tiles - i);
    const GemmTile<A> run = c.lanes == full      ? gemm_tile_for<A, full>(vectors, rows)
                            : c.lanes == quarter ? gemm_tile_for<A, quarter>(vectors, rows)
                                                 : gemm_tile_for<A, 1>(vectors, rows);
    run(part, row, first * c.lanes);
    row += rows;
  }
}

// All units go over a part of k before the next one: what they share of a stays in the L2 cache, too.
template <typename A>
void gemm_run(const Gemm<A>& g, int64_t begin, int64_t end) {
  const GemmColumns c = gemm_columns<A>(g.n);
  for (int64_t k = 0; k < g.k; k += kGemmDepth) {
    Gemm<A> part = g;
    part.k = min_of(kGemmDepth, g.k - k);
    part.a += k * g.a_column;
    part.b += k * g.b_row;
    part.accumulate = k > 0;
    if (k + part.k < g.k) {
      part.bias = nullptr;
      part.relu = false;
    }
    for (int64_t unit = begin; unit < end; ++unit) gemm_unit(part, c, unit);
  }
}

// In blocks whose rows and columns both stay in the L1 cache, of float32 in registers.
template <typename A>
void transpose(const A* from, int64_t rows, int64_t columns, A* to) {
  constexpr int block = kLanes<A>;
  for (int64_t r = 0; r < rows; r += block) {
    for (int64_t c = 0; c < columns; c += block) {
      if constexpr (sizeof(A) == 4) {
        if (r + block <= rows && c + block <= columns) {
          Vec<A, block> tile[block];
          LENET_EXT_UNROLL for (int i = 0; i < block; ++i)
            tile[i] = load<Vec<A, block>>(from + (r + i) * columns + c);
          transpose_tile<block>(tile);
          LENET_EXT_UNROLL for (int i = 0; i < block; ++i)
            store(to + (c + i) * rows + r, tile[i]);
          continue;
        }
      }
      for (int64_t j = c; j < min_of(c + block, columns); ++j) {
        for (int64_t i = r; i < min_of(r + block, rows); ++i) to[j * rows + i] = from[i * columns + j];
      }
    }
  }
}

// The same of a GemmNT, tile by tile of the columns, each transposed by the thread that multiplies by it: a matrix that
// another core has just written is slow to read.
template <typename A>
int64_t gemm_transposing_units(const GemmNT<A>& g) {
  return gemm_columns<A>(g.n).tiles * divide_up(g.m, kGemmUnitRows);
}

template <typename A>
int64_t gemm_transposing_scratch(const GemmNT<A>& g) {
  const GemmColumns c = gemm_columns<A>(g.n);
  return divide_up(c.vectors, c.tiles) * c.lanes * g.k;
}

template <typename A>
void gemm_transposing_run(const GemmNT<A>& g, A* scratch, int64_t begin, int64_t end) {
  const GemmColumns c = gemm_columns<A>(g.n);
  const int64_t blocks = divide_up(g.m, kGemmUnitRows);
  for (int64_t unit = begin; unit < end;) {
    const int64_t tile = unit / blocks, tile_end = min_of((tile + 1) * blocks, end);
    const int64_t column = tile * c.vectors / c.tiles * c.lanes;
    const int64_t columns = min_of((tile + 1) * c.vectors / c.tiles * c.lanes, g.n) - column;
    transpose(g.b + column * g.k, columns, g.k, scratch);
    const int64_t row = unit % blocks * kGemmUnitRows, rows = min_of((tile_end - unit) * kGemmUnitRows, g.m - row);
    const Gemm<A> part{rows,
                       columns,
                       g.k,
                       g.a + row * g.k,
                       g.k,
                       1,
                       scratch,
                       columns,
                       g.output + row * g.n + column,
                       g.n,
                       g.bias != nullptr ? g.bias + column : nullptr,
                       g.relu,
                       false};
    gemm_run(part, 0, gemm_units(part));
    unit = tile_end;
  }
}

// Sums of a tile of dot products: as many as one call of sums_of_lanes() finishes, but enough multiply-adds in flight.
template <typename A>
constexpr int kNTSums = max_of(kLanes<A>, 8);

// Finishes the sums of a tile: totals[i] = the sum of the lanes of sums[i].
template <typename A, int count>
LENET_EXT_INLINE void finish_sums(const Vec<A, kLanes<A>> (&sums)[count], A* totals) {
  constexpr int lanes = kLanes<A>;
  if constexpr (sizeof(A) == 4) {
    LENET_EXT_UNROLL for (int first = 0; first < count; first += lanes) {
      Vec<A, lanes> group[lanes] = {};
      LENET_EXT_UNROLL for (int i = 0; i < lanes; ++i)
        if (first + i < count) group[i] = sums[first + i];
      store(totals + first, sums_of_lanes<lanes>(group));
    }
  } else {
    LENET_EXT_UNROLL for (int i = 0; i < count; ++i)
      totals[i] = sum_lanes<A, lanes>(sums[i]);
  }
}

// Dot products of `rows` rows of a with `columns` rows of b, the lanes along k: needs no transposed weight, and is
// the better choice for few rows. Of long rows kGemmDepth vectors at a time are added up by themselves, for the sake of
// accuracy. What is left of k is the upper lanes of the last vector, the lower ones cleared: its lower elements have
// been added before.
template <typename A, int rows, int columns>
void gemm_nt_tile(const GemmNT<A>& g, int64_t row, int64_t column) {
  constexpr int lanes = kLanes<A>, count = rows * columns;
  using V = Vec<A, lanes>;
  const A* a = g.a + row * g.k;
  const A* b = g.b + column * g.k;
  V sum[count] = {}, earlier[count];
  bool parts = false;  // whether there are earlier ones
  auto add = [&](int64_t k, auto part) __attribute__((always_inline)) {
    V left[rows];
    LENET_EXT_UNROLL for (int r = 0; r < rows; ++r)
      left[r] = part(load<V>(a + r * g.k + k));
    LENET_EXT_UNROLL for (int c = 0; c < columns; ++c) {
      const V right = part(load<V>(b + c * g.k + k));
      LENET_EXT_UNROLL for (int r = 0; r < rows; ++r)
        sum[r * columns + c] += left[r] * right;
    }
  };
  int64_t k = 0;
  for (;;) {
    const int64_t end = min_of(k + kGemmDepth * lanes, g.k);
    for (; k + lanes <= end; k += lanes) add(k, [](V v) __attribute__((always_inline)) { return v; });
    if (k + lanes > g.k) break;
    LENET_EXT_UNROLL for (int i = 0; i < count; ++i) {
      earlier[i] = parts ? earlier[i] + sum[i] : sum[i];
      sum[i] = V{};
    }
    parts = true;
  }
  const bool by_lanes = k > 0;
  if (by_lanes && k < g.k) {
    IntVec<A, lanes> lane;
    LENET_EXT_UNROLL for (int i = 0; i < lanes; ++i)
      lane[i] = i;
    const IntVec<A, lanes> wanted = lane >= static_cast<typename VecOf<A, lanes>::Integer>(lanes - (g.k - k));
    add(g.k - lanes, [&](V v) __attribute__((always_inline)) { return wanted ? v : V{}; });
    k = g.k;
  }

  if (parts) {
    LENET_EXT_UNROLL for (int i = 0; i < count; ++i)
      sum[i] += earlier[i];
  }

  alignas(64) A totals[divide_up(count, lanes) * lanes];
  finish_sums<A, count>(sum, totals);
  using Row = Vec<A, columns>;
  const Row bias = g.bias != nullptr ? load<Row>(g.bias + column) : Row{};
  LENET_EXT_UNROLL for (int r = 0; r < rows; ++r) {
    if (!by_lanes) {
      for (int64_t i = 0; i < g.k; ++i) {
        for (int c = 0; c < columns; ++c) totals[r * columns + c] += a[r * g.k + i] * b[c * g.k + i];
      }
    }
    Row value = load<Row>(totals + r * columns) + bias;
    if (g.relu) value = Row{} > value ? Row{} : value;  // NaN passes
    store(g.output + (row + r) * g.n + column, value);
  }
}

constexpr int64_t kNTUnitColumns = 16;

template <typename A>
int64_t gemm_nt_units(const GemmNT<A>& g) {
  return divide_up(g.n, kNTUnitColumns);
}

// Tiles of `columns` columns as long as there are so many, then half as many, and so on.
template <typename A, int rows, int columns = kNTSums<A> / rows>
void gemm_nt_rows(const GemmNT<A>& g, int64_t row, int64_t column, int64_t column_end) {
  for (; column + columns <= column_end; column += columns) gemm_nt_tile<A, rows, columns>(g, row, column);
  if constexpr (columns > 1) {
    if (column < column_end) gemm_nt_rows<A, rows, columns / 2>(g, row, column, column_end);
  }
}

template <typename A>
void gemm_nt_run(const GemmNT<A>& g, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t column = unit * kNTUnitColumns, column_end = min_of(column + kNTUnitColumns, g.n);
    int64_t row = 0;
    for (; row + 4 <= g.m; row += 4) gemm_nt_rows<A, 4>(g, row, column, column_end);
    if (row + 2 <= g.m) {
      gemm_nt_rows<A, 2>(g, row, column, column_end);
      row += 2;
    }
    if (row < g.m) gemm_nt_rows<A, 1>(g, row, column, column_end);
  }
}

// Transposing costs as much for one row as for many; dot products pay for adding up the lanes in each row, the less the
// longer the rows are, and in narrow registers for more loads. Measured on the linear layers of benchmarks/.
template <typename A>
int64_t most_nt_rows(int64_t k) {
  return max_of<int64_t>(5, sizeof(A) == 8 ? 0 : kLanes<A> == 16 ? k / 10 : k / 32);
}

template <typename A>
void relu_backward(const A* grad, const A* output, int64_t count, A* masked) {
  for (int64_t i = 0; i < count; ++i) masked[i] = output[i] <= 0 ? A(0) : grad[i];
}

// In about as many blocks of rows as a block has rows: of n rows added one by one the error grows with sqrt(n), so with
// the fourth root.
template <typename A>
void column_sums(const A* values, int64_t rows, int64_t columns, A* sums) {
  constexpr int64_t kColumns = 64;
  int64_t block = 8;
  while (block * block < rows) block *= 2;
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int64_t count = min_of(kColumns, columns - first);
    A total[kColumns] = {};
    for (int64_t begin = 0; begin < rows; begin += block) {
      A part[kColumns] = {};
      for (int64_t r = begin; r < min_of(begin + block, rows); ++r) {
        for (int64_t c = 0; c < count; ++c) part[c] += values[r * columns + first + c];
      }
      for (int64_t c = 0; c < count; ++c) total[c] += part[c];
    }
    for (int64_t c = 0; c < count; ++c) sums[first + c] = total[c];
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
