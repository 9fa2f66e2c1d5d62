// The second half of LeNet's backward pass: the linear layers' weight gradients, which are sums over the whole batch,
// and the sums over the blocks' shares of the convolutions'.
#pragma once

#include "lenet_backward_tiles.cuh"
#include "slice_sums.cuh"

namespace lenet_ext::cuda {

constexpr int kSumWarps = kGradThreads / 32;
constexpr int kSumRows = 16, kSumColumns = 32;  // of the tile of a weight gradient that a block computes
constexpr int kSumDepth = 128;                  // images that are in shared memory at once
constexpr int kRowPacks = kSumDepth * kSumRows / 4 / kGradThreads,
              kColumnPacks = kSumDepth * kSumColumns / 4 / kGradThreads;  // of a thread

// A linear layer: weight gradient[i][j] = sum over n of grad[n][i] * input[n][j], bias gradient[i] = sum over n of
// grad[n][i]. Its parameters are `weight` and `weight + 1`.
template <typename G, typename T>
struct LinearSums {
  const G* grad;   // [batch, rows]
  const T* input;  // [batch, columns]
  int rows, columns, weight;

  LX_DEVICE int column_tiles() const { return lx::divide_up(columns, kSumColumns); }
  LX_DEVICE int tiles() const { return lx::divide_up(rows, kSumRows) * column_tiles(); }
};

// The sums over the slices of a convolution, [channel][taps, bias]. Its parameters are `weight` and `weight + 1`.
struct ConvolutionSums {
  const float* partials;
  int sums, taps, weight;

  LX_DEVICE int blocks() const { return lx::divide_up(sums, kSumsOfBlock); }
};

// The block adds 32 of them up, and hands each to store(parameter, position, sum), in one thread. `shared`: a sum for
// each thread.
template <typename Store>
__device__ __forceinline__ void convolution_sums(const ConvolutionSums& job, int64_t slices, int block,
                                                 unsigned char* shared, const Store& store) {
  float* const values = lx::take<float>(shared, kGradThreads);
  sum_slices(job.partials, slices, job.sums, block * kSumsOfBlock, values, [&](int64_t at, float sum) {
    const int channel = static_cast<int>(at) / (job.taps + 1), tap = static_cast<int>(at) % (job.taps + 1);
    const bool bias = tap == job.taps;
    store(job.weight + bias, bias ? channel : channel * job.taps + tap, sum);
  });
}

constexpr int64_t weight_shared_bytes() {
  const int64_t tiles = lx::taken<float>(kSumDepth * kSumRows) + lx::taken<float>(kSumDepth * kSumColumns);
  const int64_t sums = lx::taken<float>(kSumWarps * kSumRows * kSumColumns) + lx::taken<float>(kSumWarps * kSumRows);
  return tiles > sums ? tiles : sums;
}

// A thread's share of rows [first, first + kSumDepth) and columns [column, column + kWidth) of a matrix: kPacks packs
// of four, 0 outside of the matrix. Between fetch and put lies the product of the rows before.
template <typename T, int kWidth, int kPacks>
struct Tile {
  lx::Pack<T, 4> packs[kPacks];

  LX_DEVICE void fetch(const T* __restrict__ matrix, int64_t first, int64_t rows, int column, int columns) {
    const bool whole = columns % 4 == 0 && lx::aligned_for_packs(matrix);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int pack = static_cast<int>(threadIdx.x + i * kGradThreads);
      const int64_t row = first + pack / (kWidth / 4);
      const int from = column + pack % (kWidth / 4) * 4;
      packs[i] = {};
      if (row >= rows || from >= columns) continue;
      if (whole) {
        packs[i] = lx::load_pack<4>(matrix + row * columns + from);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) packs[i].values[k] = from + k < columns ? matrix[row * columns + from + k] : T{};
      }
    }
  }
  LX_DEVICE void put(float* tile) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      *reinterpret_cast<lx::Pack<float, 4>*>(tile + (threadIdx.x + i * kGradThreads) * 4) = {
          {lx::widen(packs[i][0]), lx::widen(packs[i][1]), lx::widen(packs[i][2]), lx::widen(packs[i][3])}};
    }
  }
};

// The block computes tile `tile` of a linear layer's weight gradient. Warp w takes every eighth image; the warps' sums
// are added in order. lane -> 4 x 4 outputs, 2 loads of 16 bytes for 16 multiply-adds. The next 128 images are on
// their way from L2 while these are multiplied.
template <typename G, typename T, typename Store>
__device__ __forceinline__ void linear_sums(const LinearSums<G, T>& job, int64_t batch, int block,
                                            unsigned char* shared, const Store& store) {
  unsigned char* const begin = shared;
  float* row_tile = lx::take<float>(shared, kSumDepth * kSumRows);  // [image][row]
  float* column_tile = lx::take<float>(shared, kSumDepth * kSumColumns);
  shared = begin;
  float* partial = lx::take<float>(shared, kSumWarps * kSumRows * kSumColumns);
  float* partial_bias = lx::take<float>(shared, kSumWarps * kSumRows);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = block / job.column_tiles() * kSumRows, column = block % job.column_tiles() * kSumColumns;
  const bool bias = column == 0;
  float sums[4][4] = {}, bias_sum = 0;
  Tile<G, kSumRows, kRowPacks> rows;
  Tile<T, kSumColumns, kColumnPacks> columns;
  rows.fetch(job.grad, 0, batch, row, job.rows);
  columns.fetch(job.input, 0, batch, column, job.columns);
#pragma unroll 1
  for (int64_t first = 0; first < batch; first += kSumDepth) {
    __syncthreads();  // the last readers of the shared memory are done
    rows.put(row_tile);
    columns.put(column_tile);
    __syncthreads();
    rows.fetch(job.grad, first + kSumDepth, batch, row, job.rows);
    columns.fetch(job.input, first + kSumDepth, batch, column, job.columns);
    const int present = static_cast<int>(batch - first < kSumDepth ? batch - first : kSumDepth);
#pragma unroll 4
    for (int n = warp; n < present; n += kSumWarps) {
      const lx::Pack<float, 4> a = lx::load_pack<4>(row_tile + n * kSumRows + lane / 8 * 4);
      const lx::Pack<float, 4> b = lx::load_pack<4>(column_tile + n * kSumColumns + lane % 8 * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
      }
    }
    if (bias && lane < kSumRows) {
      for (int n = warp; n < present; n += kSumWarps) bias_sum += row_tile[n * kSumRows + lane];
    }
  }

  __syncthreads();  // the tiles become the partial sums
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<lx::Pack<float, 4>*>(partial + (warp * kSumRows + lane / 8 * 4 + i) * kSumColumns +
                                           lane % 8 * 4) = {{sums[i][0], sums[i][1], sums[i][2], sums[i][3]}};
  }
  if (lane < kSumRows) partial_bias[warp * kSumRows + lane] = bias_sum;
  __syncthreads();
  for (int i = threadIdx.x; i < kSumRows * kSumColumns; i += kGradThreads) {
    const int r = row + i / kSumColumns, c = column + i % kSumColumns;
    if (r >= job.rows || c >= job.columns) continue;
    float value = 0;
    for (int w = 0; w < kSumWarps; ++w) value += partial[w * kSumRows * kSumColumns + i];
    store(job.weight, r * job.columns + c, value);
  }
  const int bias_row = row + static_cast<int>(threadIdx.x);
  if (bias && threadIdx.x < kSumRows && bias_row < job.rows) {
    float value = 0;
    for (int w = 0; w < kSumWarps; ++w) value += partial_bias[w * kSumRows + threadIdx.x];
    store(job.weight + 1, bias_row, value);
  }
}

// G: the type of the last layer's `grad`. Those of the hidden layers are what the first half left.
template <typename G, typename T>
struct WeightSums {
  LinearSums<float, T> hidden[2];
  LinearSums<G, T> last;
  ConvolutionSums convolution[2];

  // grad_logits [batch, classes]; features, hidden1 and hidden2: the inputs of the linear layers.
  WeightSums(const BackwardWorkspace& w, int in_channels, const G* grad_logits, int classes, const T* features,
             const T* hidden1, const T* hidden2)
      : hidden{{w.grad_hidden1, features, kHidden1, kFeatures, 4}, {w.grad_hidden2, hidden1, kHidden2, kHidden1, 6}},
        last{grad_logits, hidden2, classes, kHidden2, 8},
        convolution{{w.partials2, kSums2, Conv2::kWeights, 2},
                    {w.partials1, in_channels == 1 ? kSums1<Conv1> : kSums1<ColourConv1>, in_channels * kTaps, 0}} {}

  LX_DEVICE int blocks() const {
    return hidden[0].tiles() + hidden[1].tiles() + last.tiles() + convolution[0].blocks() + convolution[1].blocks();
  }

  // block -> a tile of a linear layer's weight gradient, or 32 sums of a convolution's; each gradient goes to
  // store(parameter, position, value), in one thread.
  template <typename Store>
  __device__ __forceinline__ void compute(int block, int64_t batch, int64_t slices, unsigned char* shared,
                                          const Store& store) const {
    const int end0 = hidden[0].tiles(), end1 = end0 + hidden[1].tiles(), end2 = end1 + last.tiles();
    const int end3 = end2 + convolution[0].blocks();
    if (block < end1) {
      const bool first = block < end0;
      linear_sums(first ? hidden[0] : hidden[1], batch, block - (first ? 0 : end0), shared, store);
    } else if (block < end2) {
      linear_sums(last, batch, block - end1, shared, store);
    } else {
      const bool second = block < end3;
      convolution_sums(second ? convolution[0] : convolution[1], slices, block - (second ? end2 : end3), shared, store);
    }
  }
};

}  // namespace lenet_ext::cuda
