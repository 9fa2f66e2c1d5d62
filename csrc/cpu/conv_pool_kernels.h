// What the host file of conv_relu_max_pool2d calls on the CPU. Raw pointers and sizes, no torch.
#pragma once

#include "../common/conv_pool_shape.h"
#include "simd.h"

namespace lenet_ext::cpu {

struct Strides4 {
  int64_t n, c, h, w;  // in elements
};

// output = max_pool2d(relu(conv2d(input, weight, bias))), and the winner codes where `indices` is not null.
template <typename T>
struct ConvPoolForward {
  ConvPoolShape shape;
  const T* input;
  Strides4 input_strides;
  const T* weight;  // contiguous
  const T* bias;    // contiguous, or null
  T* output;
  uint8_t* indices;         // null: not wanted
  Strides4 output_strides;  // of output and of indices
};

// The gradients, from the winning positions alone.
template <typename T>
struct ConvPoolBackward {
  ConvPoolShape shape;
  const T* grad_output;
  Strides4 grad_output_strides;
  const uint8_t* indices;
  Strides4 indices_strides;
  const T* input;
  Strides4 input_strides;
  const T* weight;  // contiguous
  T* grad_input;    // null: not wanted
  Strides4 grad_input_strides;
  T* grad_weight;  // contiguous; null: neither it nor grad_bias is wanted
  T* grad_bias;
};

// The convolution at the winning positions, 0 where there is none.
template <typename T>
struct ConvAtIndices {
  ConvPoolShape shape;
  const T* input;
  Strides4 input_strides;
  const T* weight;  // contiguous
  const T* bias;    // contiguous, or null
  const uint8_t* indices;
  T* output;
  Strides4 output_strides;  // of output and of indices
};

// One pass over the output of the vendor's convolution: ReLU, pooling and winner codes.
template <typename T>
struct ReluPool {
  ConvPoolShape shape;
  const T* conv;  // [batch, out_channels, conv_h, conv_w]
  Strides4 conv_strides;
  T* output;
  uint8_t* indices;  // null: not wanted
  Strides4 output_strides;
};

// Its backward: the dense gradient of the convolution's output.
template <typename T>
struct ReluPoolBackward {
  ConvPoolShape shape;
  const T* grad_output;
  Strides4 grad_output_strides;
  const uint8_t* indices;
  Strides4 indices_strides;
  T* grad_conv;
  Strides4 grad_conv_strides;
};

// Each job: `prepare` once into `packed` (of `packed_bytes`), then `run` over [0, units) in any partition; the result
// does not depend on the partition. `scratch` of `scratch_bytes` belongs to one run call. Buffers are aligned to 64
// bytes.
template <typename T>
struct ConvPoolForwardKernels {
  int64_t (*packed_bytes)(const ConvPoolShape&);
  int64_t (*scratch_bytes)(const ConvPoolShape&);
  int64_t (*units)(const ConvPoolShape&);
  void (*prepare)(const ConvPoolForward<T>&, void* packed);
  void (*run)(const ConvPoolForward<T>&, const void* packed, void* scratch, int64_t begin, int64_t end);
};

template <typename T>
struct ConvPoolBackwardKernels {
  int64_t (*packed_bytes)(const ConvPoolShape&, bool input_gradient);
  int64_t (*scratch_bytes)(const ConvPoolShape&, bool input_gradient);
  int64_t (*units)(const ConvPoolShape&);
  int64_t (*partial_bytes)(const ConvPoolShape&);  // of each unit, for the weight and bias gradients
  // prepare and run return false where an operand is not finite: the caller then takes the dense path, in which a
  // position that did not win contributes 0 * infinity = NaN, as in stock.
  bool (*prepare)(const ConvPoolBackward<T>&, void* packed);
  bool (*run)(const ConvPoolBackward<T>&, const void* packed, void* partials, void* scratch, int64_t begin,
              int64_t end);
  // Adds up the units, for the output channels [begin, end).
  void (*reduce)(const ConvPoolBackward<T>&, void* partials, int64_t begin, int64_t end);
};

template <typename T>
struct ConvPoolTable {
  ConvPoolForwardKernels<T> forward;
  ConvPoolBackwardKernels<T> backward;
  struct {
    int64_t (*packed_bytes)(const ConvPoolShape&);
    int64_t (*scratch_bytes)(const ConvPoolShape&);
    void (*prepare)(const ConvAtIndices<T>&, void* packed);
    void (*run)(const ConvAtIndices<T>&, const void* packed, void* scratch, int64_t begin,
                int64_t end);  // units: batch
  } at_indices;
  struct {
    int64_t channels;  // of a unit; units: batch * ceil(out_channels / channels)
    int64_t (*scratch_bytes)(const ConvPoolShape&);
    void (*forward)(const ReluPool<T>&, void* scratch, int64_t begin, int64_t end);
    void (*backward)(const ReluPoolBackward<T>&, void* scratch, int64_t begin, int64_t end);
    bool (*are_finite)(const T* values, int64_t count);
  } relu_pool;
};

struct ConvPoolKernels {
  ConvPoolTable<float> float32;
  ConvPoolTable<double> float64;
  ConvPoolTable<BFloat16> bfloat16;
};

// Kernels for one shape only: they take contiguous images. Null where an instruction set has none.
struct ConvPoolFixedShape {
  const ConvPoolForwardKernels<float>* forward;
  const ConvPoolBackwardKernels<float>* backward;
};

// The two convolutions of LeNet, for images of one channel and of three; the first convolution has no input gradient.
struct ConvPoolLenetKernels {
  struct First {
    ConvPoolFixedShape conv1;
    // The weight gradients of both, one image after the other: the gradient between the two layers never leaves the
    // cache. Prepared and reduced as each layer's own; `packed` is that of conv2 with an input gradient, and the
    // units are those of each. Job 1 needs no grad_output, job 2 no grad_input (any that is not null will do).
    int64_t scratch_bytes;
    bool (*run_both)(const ConvPoolBackward<float>& job1, const ConvPoolBackward<float>& job2, const void* packed,
                     void* partials1, void* partials2, void* scratch, int64_t begin, int64_t end);
  };
  First one_channel, three_channels;
  ConvPoolFixedShape conv2;

  const First& first(int64_t in_channels) const { return in_channels == 1 ? one_channel : three_channels; }
};

}  // namespace lenet_ext::cpu
