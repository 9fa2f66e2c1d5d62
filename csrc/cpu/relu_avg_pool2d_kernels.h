// What the host file of relu_avg_pool2d calls on the CPU. Raw pointers and sizes, no torch.
#pragma once

#include "../common/avg_pool_shape.h"
#include "simd.h"

namespace lenet_ext::cpu {

// output = avg_pool2d(relu(input))
template <typename T>
struct ReluAvgPool {
  AvgPoolShape shape;
  const T* input;
  T* output;
};

template <typename T>
struct ReluAvgPoolBackward {
  AvgPoolShape shape;
  const T* grad_output;
  const T* input;
  T* grad_input;
};

// Units are planes or, with channels_last, rows of the result; any partition of them gives the same values.
template <typename T>
struct ReluAvgPoolTable {
  int64_t (*units)(const AvgPoolShape&);
  int64_t (*scratch_bytes)(const AvgPoolShape&);
  void (*run)(const ReluAvgPool<T>&, void* scratch, int64_t begin, int64_t end);
  int64_t (*backward_units)(const AvgPoolShape&);
  int64_t (*backward_scratch_bytes)(const AvgPoolShape&);
  void (*backward_run)(const ReluAvgPoolBackward<T>&, void* scratch, int64_t begin, int64_t end);
};

struct ReluAvgPoolKernels {
  ReluAvgPoolTable<float> float32;
  ReluAvgPoolTable<double> float64;
  ReluAvgPoolTable<BFloat16> bfloat16;
};

}  // namespace lenet_ext::cpu
