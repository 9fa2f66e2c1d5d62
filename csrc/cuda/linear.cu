// Matrix products with few rows: the linear layers of a small batch, where a vendor GEMM is all latency, and their
// gradients. Large products go to the vendor (csrc/linear/cuda.cpp).
#include "device.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16, kColumns = 32;  // outputs of a block

// Depth that is in shared memory at once, and the pitch that keeps the 16-byte loads of eight lanes in different banks.
template <typename A>
constexpr int kDepth = 512 / sizeof(A);
template <typename A>
constexpr int kPitch = kDepth<A> + 16 / static_cast<int>(sizeof(A));

// [a tile | b tile], and after the last product [partial sums of each warp | row sums of each warp].
template <typename A>
constexpr int64_t shared_bytes() {
  const int64_t tiles = lx::taken<A>((kRows + kColumns) * kPitch<A>);
  const int64_t sums = lx::taken<A>(kWarps * kRows * kColumns) + lx::taken<A>(kWarps * kRows);
  return tiles > sums ? tiles : sums;
}

// A thread's share of rows [row, row + kTile) at depth [depth, depth + kDepth) of a matrix, 0 outside of it.
// Consecutive threads follow the direction in which the matrix is contiguous. All loads are on their way before the
// first value is needed.
template <typename T, int kTile>
struct TileShare {
  using A = lx::Accumulator<T>;
  static constexpr int kBlock = static_cast<int>(kThreads), kCount = kTile * kDepth<A> / kBlock;
  static_assert(kBlock % kDepth<A> == 0 && kBlock % kTile == 0, "from value to value only one coordinate changes");
  A values[kCount];

  // Where in the tile a thread's first value lies, and how far the next one is.
  struct Place {
    int row, depth, next_row, next_depth;
    explicit LX_DEVICE Place(bool along_depth) {
      const int thread = static_cast<int>(threadIdx.x);
      row = along_depth ? thread / kDepth<A> : thread % kTile;
      depth = along_depth ? thread % kDepth<A> : thread / kTile;
      next_row = along_depth ? kBlock / kDepth<A> : 0;
      next_depth = along_depth ? 0 : kBlock / kTile;
    }
  };

  // `mask`: null, or as `matrix`, which counts as 0 where the mask is not above 0.
  LX_DEVICE void fetch(const T* __restrict__ matrix, const T* __restrict__ mask, int64_t row, int64_t rows,
                       int64_t row_stride, int64_t depth, int64_t depths, int64_t depth_stride) {
    const Place place(depth_stride == 1);
    const int64_t step = place.next_row * row_stride + place.next_depth * depth_stride;
    int64_t at = (row + place.row) * row_stride + (depth + place.depth) * depth_stride;
    // What is left of the matrix from the tile's corner on; more than a tile is as good as a tile.
    const int rows_left = static_cast<int>(rows - row < kTile ? rows - row : kTile);
    const int depths_left = static_cast<int>(depths - depth < kDepth<A> ? depths - depth : kDepth<A>);
#pragma unroll
    for (int n = 0; n < kCount; ++n, at += step) {
      values[n] = 0;
      if (place.row + n * place.next_row >= rows_left || place.depth + n * place.next_depth >= depths_left) continue;
      values[n] = lx::widen(matrix[at]);
      if (mask != nullptr && lx::widen(mask[at]) <= 0) values[n] = 0;
    }
  }
  LX_DEVICE void put(A* tile, bool along_depth) const {
    const Place place(along_depth);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      tile[(place.row + n * place.next_row) * kPitch<A> + place.depth + n * place.next_depth] = values[n];
    }
  }
};

// block -> 16 x 32 outputs. The depth is cut among the 8 warps, because with few outputs there is not enough to do
// otherwise; the warps' sums are then added in order. lane -> 4 x 4 outputs: rows 4 (l / 8) + i, columns l % 8 + 8 j,
// so that a step of 4 in depth costs 8 loads of 16 bytes for 64 multiply-adds. Shared memory: 25 KB (float), 34 KB
// (double). Any size: blocks loop over the tiles.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) small_matrix_product_kernel(SmallMatrixProduct p) {
  using A = lx::Accumulator<T>;
  LX_SMEM(shared);
  unsigned char* const begin = shared;
  A* a_tile = lx::take<A>(shared, kRows * kPitch<A>);
  A* b_tile = lx::take<A>(shared, kColumns * kPitch<A>);
  shared = begin;
  A* partial = lx::take<A>(shared, kWarps * kRows * kColumns);
  A* partial_row_sums = lx::take<A>(shared, kWarps * kRows);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = lane / 8 * 4, first_column = lane % 8;
  const int64_t column_tiles = lx::divide_up<int64_t>(p.columns, kColumns);
  const int64_t tiles = lx::divide_up<int64_t>(p.rows, kRows) * column_tiles;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile / column_tiles * kRows, column = tile % column_tiles * kColumns;
    const bool sums_rows = p.a_row_sums != nullptr && column == 0;
    A sum[4][4] = {}, row_sum = 0;
    for (int64_t depth = 0; depth < p.depth; depth += kDepth<A>) {
      TileShare<T, kRows> a_share;
      TileShare<T, kColumns> b_share;
      a_share.fetch(static_cast<const T*>(p.a), static_cast<const T*>(p.a_mask), row, p.rows, p.a_row_stride, depth,
                    p.depth, p.a_depth_stride);
      b_share.fetch(static_cast<const T*>(p.b), nullptr, column, p.columns, p.b_row_stride, depth, p.depth,
                    p.b_depth_stride);
      __syncthreads();  // the last readers of the shared memory are done
      a_share.put(a_tile, p.a_depth_stride == 1);
      b_share.put(b_tile, p.b_depth_stride == 1);
      __syncthreads();
      constexpr int kShare = kDepth<A> / kWarps;
#pragma unroll
      for (int k = 0; k < kShare; k += 4) {
        const int at = warp * kShare + k;
        lx::Pack<A, 4> a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[i] = lx::load_pack<4>(a_tile + (first_row + i) * kPitch<A> + at);
          b[i] = lx::load_pack<4>(b_tile + (first_column + 8 * i) * kPitch<A> + at);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int step = 0; step < 4; ++step) sum[i][j] += a[i][step] * b[j][step];
          }
        }
      }
      if (sums_rows && lane < kRows) {
        for (int k = 0; k < kShare; ++k) row_sum += a_tile[lane * kPitch<A> + warp * kShare + k];
      }
    }

    __syncthreads();  // the tiles become the partial sums
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        partial[(warp * kRows + first_row + i) * kColumns + first_column + 8 * j] = sum[i][j];
      }
    }
    if (lane < kRows) partial_row_sums[warp * kRows + lane] = row_sum;
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
      const int64_t r = row + i / kColumns, c = column + i % kColumns;
      if (r >= p.rows || c >= p.columns) continue;
      A value = 0;
      for (int w = 0; w < kWarps; ++w) value += partial[w * kRows * kColumns + i];
      if (p.bias != nullptr) value += lx::widen(static_cast<const T*>(p.bias)[c]);
      if (p.relu && value <= 0) value = 0;  // NaN passes
      static_cast<T*>(p.output)[r * p.columns + c] = lx::narrow<T>(value);
    }
    if (sums_rows && threadIdx.x < kRows && row + threadIdx.x < p.rows) {
      A value = 0;
      for (int w = 0; w < kWarps; ++w) value += partial_row_sums[w * kRows + threadIdx.x];
      static_cast<T*>(p.a_row_sums)[row + threadIdx.x] = lx::narrow<T>(value);
    }
  }
}

template <typename T>
LaunchResult product(const SmallMatrixProduct& call, cudaStream_t stream) {
  LaunchResult result;
  const int64_t tiles = lx::divide_up<int64_t>(call.rows, kRows) * lx::divide_up<int64_t>(call.columns, kColumns);
  lx::launch(result, "small_matrix_product_kernel", small_matrix_product_kernel<T>, lx::grid_for(tiles, 1), kThreads,
             shared_bytes<lx::Accumulator<T>>(), stream, call);
  return result;
}

}  // namespace

LaunchResult launch_small_matrix_product(DType dtype, const SmallMatrixProduct& call, cudaStream_t stream) {
  if (call.rows == 0 || call.columns == 0) return {};
  LX_DISPATCH(dtype, product, call, stream)
}

}  // namespace lenet_ext::cuda
