// Small matrix products for the linear layers. Raw pointers and sizes, no torch.
#pragma once

#include <stdint.h>

namespace lenet_ext::cpu {

// output[m][n] = activation(sum over k of a[m][k] * b[k][n] + bias[n]); rows of b and of output are contiguous.
template <typename A>
struct Gemm {
  int64_t m, n, k;
  const A* a;
  int64_t a_row, a_column;  // element strides
  const A* b;
  int64_t b_row;
  A* output;
  int64_t output_row;
  const A* bias;  // null: none
  bool relu;
  bool accumulate;  // add to what output holds
};

// output[m][n] = activation(sum over k of a[m][k] * b[n][k] + bias[n]), everything contiguous.
template <typename A>
struct GemmNT {
  int64_t m, n, k;
  const A* a;
  const A* b;
  A* output;
  const A* bias;  // null: none
  bool relu;
};

// Each product is cut into `units` that depend on its sizes alone; any partition of them gives the same result.
template <typename A>
struct GemmTable {
  int64_t (*units)(const Gemm<A>&);
  void (*run)(const Gemm<A>&, int64_t begin, int64_t end);
  int64_t (*nt_units)(const GemmNT<A>&);
  void (*nt_run)(const GemmNT<A>&, int64_t begin, int64_t end);
  // A GemmNT as a Gemm, with `scratch` of so many elements for the thread that runs the units.
  int64_t (*transposing_units)(const GemmNT<A>&);
  int64_t (*transposing_scratch)(const GemmNT<A>&);
  void (*transposing_run)(const GemmNT<A>&, A* scratch, int64_t begin, int64_t end);
  // Most rows for which nt_run() beats transposing_run().
  int64_t (*most_nt_rows)(int64_t k);
  // to[c][r] = from[r][c]
  void (*transpose)(const A* from, int64_t rows, int64_t columns, A* to);
  // masked[i] = output[i] <= 0 ? 0 : grad[i] (ReLU's gradient; NaN passes)
  void (*relu_backward)(const A* grad, const A* output, int64_t count, A* masked);
  // sums[c] = sum over r of values[r][c]
  void (*column_sums)(const A* values, int64_t rows, int64_t columns, A* sums);
};

struct GemmKernels {
  GemmTable<float> float32;
  GemmTable<double> float64;
};

}  // namespace lenet_ext::cpu
