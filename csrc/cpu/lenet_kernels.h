// What the host file of the whole-network operators calls on the CPU. Raw pointers and sizes, no torch.
#pragma once

#include <stdint.h>

namespace lenet_ext::cpu {

// The forward pass of LeNet (float32, images of one channel or of three); parameters contiguous, as the layers hold
// them.
struct LenetForward {
  int64_t batch, in_channels, classes;
  const float* input;  // images contiguous, `image_stride` apart
  int64_t image_stride;
  const float *conv1_weight, *conv1_bias, *conv2_weight, *conv2_bias;
  const float *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias, *fc3_weight, *fc3_bias;
  float* output;  // [batch][classes]
  // What a backward pass will read, [batch][...]; all null in inference.
  float* pooled1;
  uint8_t* indices1;
  float* pooled2;
  uint8_t* indices2;
  float *hidden1, *hidden2;
};

struct LenetKernels {
  int64_t lanes;                                                                // images of a unit of work
  bool keeps_winners;                                                           // also what a backward pass will read
  int64_t (*scratch_bytes)(int64_t in_channels);                                // of one run call
  void (*run)(const LenetForward&, void* scratch, int64_t begin, int64_t end);  // units: ceil(batch / lanes)
};

}  // namespace lenet_ext::cpu
