// The CUDA side as its host files (csrc/<op>/cuda.cpp) and the tests without a GPU see it: raw pointers, sizes, a
// stream. No torch in here. Launchers allocate nothing and synchronise nothing, so they may be captured in a CUDA
// graph; the caller has made the pointers' device current. Nothing is launched for an empty batch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/avg_pool_shape.h"
#include "../common/conv_pool_shape.h"

namespace lenet_ext::cuda {

// Storage of all floating-point operands of a call. Arithmetic is float32, and float64 for float64.
enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

inline int64_t accumulator_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// Of a launcher, which may launch several kernels: the first error and the kernel that caused it.
struct LaunchResult {
  cudaError_t error = cudaSuccess;
  const char* kernel = "none";
};

struct Strides4 {
  int64_t n, c, h, w;  // in elements
};

// Weights, biases and their gradients are contiguous, everything else has strides.

// output = max_pool2d(relu(conv2d(input, weight, bias))); winner codes too where `indices` is not null.
struct ConvPoolForward {
  ConvPoolShape shape;
  const void* input;
  Strides4 input_strides;
  const void* weight;
  const void* bias;  // null: none
  void* output;
  uint8_t* indices;         // null: not wanted
  Strides4 output_strides;  // of output and of indices
};
LaunchResult launch_conv_pool_forward(DType dtype, const ConvPoolForward& call, cudaStream_t stream);

// The gradients, from the winning positions.
struct ConvPoolBackward {
  ConvPoolShape shape;
  const void* grad_output;
  Strides4 grad_output_strides;
  const uint8_t* indices;
  Strides4 indices_strides;
  const void* input;  // may be null where grad_weight is
  Strides4 input_strides;
  const void* weight;  // may be null where grad_input is
  void* grad_input;    // null: not wanted
  Strides4 grad_input_strides;
  void* grad_weight;  // null: not wanted
  void* grad_bias;    // null: not wanted
  void* workspace;    // of conv_pool_backward_workspace() bytes; its contents are overwritten
  // Not 0: where has_lenet_tensor_core_gradients(), on the tensor cores, so many images to a block, an even number
  // (lenet_tensor_core_backward_slice_images(batch), the tests use others). All tensors of images are contiguous and
  // 16-byte aligned then. What there is no kernel for is computed as without: the gradient of the bias alone, and that
  // of the first layer's input.
  int64_t slice_images;
};
int64_t conv_pool_backward_workspace(DType dtype, const ConvPoolShape& shape, bool grad_weight);
LaunchResult launch_conv_pool_backward(DType dtype, const ConvPoolBackward& call, cudaStream_t stream);

// The convolution at the winning positions, 0 where there is none.
struct ConvAtIndices {
  ConvPoolShape shape;
  const void* input;
  Strides4 input_strides;
  const void* weight;
  const void* bias;  // null: none
  const uint8_t* indices;
  void* output;
  Strides4 output_strides;  // of output and of indices
};
LaunchResult launch_conv_at_indices(DType dtype, const ConvAtIndices& call, cudaStream_t stream);

// One pass over the output of the vendor's convolution: bias, ReLU, pooling, winner codes.
struct BiasReluPool {
  ConvPoolShape shape;
  const void* conv;  // [batch, out_channels, conv_h, conv_w], without the bias
  Strides4 conv_strides;
  const void* bias;  // null: none
  void* output;
  uint8_t* indices;         // null: not wanted
  Strides4 output_strides;  // of output and of indices
};
LaunchResult launch_bias_relu_pool(DType dtype, const BiasReluPool& call, cudaStream_t stream);

// Its backward: the dense gradient of the convolution's output, which the vendor's convolution backward takes.
struct BiasReluPoolBackward {
  ConvPoolShape shape;
  const void* grad_output;
  Strides4 grad_output_strides;
  const uint8_t* indices;
  Strides4 indices_strides;
  void* grad_conv;
  Strides4 grad_conv_strides;
};
LaunchResult launch_bias_relu_pool_backward(DType dtype, const BiasReluPoolBackward& call, cudaStream_t stream);

// Whether this problem has kernels of its own, made for its sizes (LeNet's two layers, contiguous tensors).
bool has_lenet_kernels(DType dtype, const ConvPoolShape& shape);

// --8<-- [start:product]
// output[i, j] = sum over r of a[i, r] * b[j, r], which is every product of a linear layer and its backward.
struct SmallMatrixProduct {
  int64_t rows, columns, depth;
  const void* a;
  int64_t a_row_stride, a_depth_stride;
  const void* b;
  int64_t b_row_stride, b_depth_stride;
  void* output;        // [rows, columns], contiguous
  const void* bias;    // [columns], or null
  bool relu;           // output = relu(output)
  const void* a_mask;  // null, or as `a`: a counts as 0 where a_mask <= 0 (the backward of ReLU)
  void* a_row_sums;    // null, or [rows]: the sum of each (masked) row of a
};
LaunchResult launch_small_matrix_product(DType dtype, const SmallMatrixProduct& call, cudaStream_t stream);
// --8<-- [end:product]

// output = avg_pool2d(relu(input)); all tensors are contiguous or channels_last, as the shape says.
struct ReluAvgPool {
  AvgPoolShape shape;
  const void* input;
  void* output;
};
LaunchResult launch_relu_avg_pool(DType dtype, const ReluAvgPool& call, cudaStream_t stream);

struct ReluAvgPoolBackward {
  AvgPoolShape shape;
  const void* grad_output;
  const void* input;
  void* grad_input;
};
LaunchResult launch_relu_avg_pool_backward(DType dtype, const ReluAvgPoolBackward& call, cudaStream_t stream);

// The whole network in one launch. All tensors are contiguous, weights are 16-byte aligned.
template <typename T>
struct LenetForwardOf {
  int64_t batch, in_channels, classes;
  const T* input;           // [batch, in_channels, 32, 32]
  const T* parameters[10];  // weight and bias of conv1, conv2, fc1, fc2, fc3
  T* output;                // [batch, classes]
  // What the backward pass needs; null where there will be none.
  T* pooled1;         // [batch, 6, 14, 14]
  uint8_t* indices1;  // of its shape
  T* pooled2;         // [batch, 16, 5, 5]
  uint8_t* indices2;
  T* hidden1;  // [batch, 120]
  T* hidden2;  // [batch, 84]
};

// In float32 arithmetic on the ordinary units.
using LenetForward = LenetForwardOf<float>;
bool has_lenet_forward(DType dtype, int64_t channels, int64_t classes);
LaunchResult launch_lenet_forward(const LenetForward& call, cudaStream_t stream);

// The same for few images, each of which a cluster of blocks computes together, in 16 bits too; in float32 bit by bit
// the same values. How many blocks: 2, 4 or 8; 0 for a larger batch, or where the current device cannot.
int lenet_cluster_blocks(DType dtype, int64_t batch, int64_t channels, int64_t classes);
LaunchResult launch_lenet_cluster_forward(DType dtype, const LenetForwardOf<void>& call, int blocks,
                                          cudaStream_t stream);

// Its backward in two launches, from what the forward pass kept, in float32 arithmetic: results are rounded once. All
// tensors are contiguous, weights, pooled2 and the hidden layers 16-byte aligned.
template <typename T>
struct LenetBackwardOf {
  int64_t batch, in_channels, classes;
  int64_t slice_images;  // of a block: lenet_backward_slice_images(batch), the tests use others
  const T* grad_output;  // [batch, classes]
  const T* input;
  const T* parameters[10];
  const T* pooled1;
  const uint8_t* indices1;
  const T* pooled2;
  const uint8_t* indices2;
  const T* hidden1;
  const T* hidden2;
  T* gradients[10];  // of the parameters
  T* grad_pooled1;   // [batch, 6, 14, 14], null: not wanted; the gradient of the input follows from it
  void* workspace;   // of lenet_backward_workspace() bytes, 16-byte aligned; its contents are overwritten
};
bool has_lenet_backward(DType dtype, int64_t channels, int64_t classes);
int64_t lenet_backward_slice_images(int64_t batch);
int64_t lenet_backward_workspace(int64_t batch, int64_t in_channels, int64_t slice_images);
LaunchResult launch_lenet_backward(DType dtype, const LenetBackwardOf<void>& call, cudaStream_t stream);

// The gradients of both convolutions on the tensor cores in float16, bfloat16 and, for float32, TF32, for large batches
// of one channel, in two launches. All tensors are contiguous, those of images 16-byte aligned.
template <typename T>
struct LenetConvolutionsBackwardOf {
  int64_t batch;
  int64_t slice_images;     // of a block, even: as the function below says, the tests use others
  const T* input;           // [batch, 1, 32, 32]
  const T* weight2;         // [16, 6, 5, 5]
  const T* pooled1;         // [batch, 6, 14, 14]
  const uint8_t* indices1;  // of its shape
  const T* grad_pooled2;    // [batch, 16, 5, 5]
  const uint8_t* indices2;
  T* gradients[4];  // of weight and bias of conv1 and conv2
  void* workspace;  // of lenet_tensor_core_backward_workspace() bytes, 16-byte aligned; its contents are overwritten
};
bool has_lenet_tensor_core_backward(DType dtype, int64_t channels);
int64_t lenet_tensor_core_backward_slice_images(int64_t batch);
int64_t lenet_tensor_core_backward_workspace(int64_t batch, int64_t slice_images);
LaunchResult launch_lenet_tensor_core_backward(DType dtype, const LenetConvolutionsBackwardOf<void>& call,
                                               cudaStream_t stream);

// And those of the three linear layers, likewise in three launches. All tensors are contiguous, the weights, what the
// forward pass kept and grad_features 16-byte aligned.
template <typename T>
struct LenetLinearGradientsOf {
  int64_t batch, classes;
  int64_t slice_images;  // of a block: as the function below says, the tests use others
  const T* grad_output;  // [batch, classes]
  const T* weights[3];   // of fc1, fc2, fc3
  const T* features;     // [batch, 400]
  const T* hidden1;      // [batch, 120]
  const T* hidden2;      // [batch, 84]
  T* grad_features;      // [batch, 400]
  T* gradients[6];       // of weight and bias of fc1, fc2, fc3
  void* workspace;       // of lenet_linear_gradients_workspace() bytes, 16-byte aligned; its contents are overwritten
};
bool has_lenet_linear_gradients(DType dtype, int64_t classes);
int64_t lenet_linear_gradients_slice_images(int64_t batch);
int64_t lenet_linear_gradients_workspace(DType dtype, int64_t batch, int64_t classes, int64_t slice_images);
LaunchResult launch_lenet_linear_gradients(DType dtype, const LenetLinearGradientsOf<void>& call, cudaStream_t stream);

// A training step in two launches, in float32: forward pass, loss and what of the backward pass goes image by image;
// then the sums over the batch and the optimizer's update.
enum class Loss { kCrossEntropy, kMeanSquaredError };
struct LossOf {
  Loss kind;
  const int64_t* classes;  // [batch], for cross entropy
  const float* values;     // [batch, classes], for the mean squared error
  const float* weight;     // [classes], or null
  float label_smoothing;
  int64_t ignore_index;
};

enum class Optimizer { kSgd, kAdam, kAdamW };
// Of one parameter. Buffers as PyTorch names them; `step` counts the steps before this one.
struct UpdateOf {
  float* momentum_buffer;                        // SGD; null without momentum
  float *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // Adam, AdamW; the last one null without AMSGrad
  float* step;                                   // on the device, and increased there; null where `steps` has it
  float steps;                                   // with this one
  double lr, momentum, dampening, weight_decay;  // SGD; lr and weight_decay in all
  double beta1, beta2, eps;                      // Adam, AdamW
  bool nesterov, maximize, first;                // first: the momentum buffer holds nothing yet
};

struct LenetStep {
  int64_t batch, in_channels, classes;
  int64_t slice_images;   // as in LenetBackwardOf
  const float* input;     // [batch, in_channels, 32, 32]
  float* parameters[10];  // read by the first launch, changed by the second
  LossOf loss;
  Optimizer optimizer;
  UpdateOf updates[10];
  float* mean_loss;  // [1]
  int64_t* correct;  // [1], as in lenet/loss.h
  void* workspace;   // of lenet_step_workspace() bytes, 16-byte aligned; its contents are overwritten
};
bool has_lenet_step(DType dtype, int64_t channels, int64_t classes);
int64_t lenet_step_workspace(int64_t batch, int64_t in_channels, int64_t classes, int64_t slice_images);
LaunchResult launch_lenet_step(const LenetStep& call, cudaStream_t stream);

// On the tensor cores, which round what they multiply to the storage type, or to TF32 for float32, and accumulate in
// float32. The current device must have them. The whole network, and its two convolutions one by one, contiguous
// tensors all: their values are bit by bit the same.
bool has_lenet_tensor_core_forward(DType dtype, int64_t channels, int64_t classes);
LaunchResult launch_lenet_tensor_core_forward(DType dtype, const LenetForwardOf<void>& call, cudaStream_t stream);
bool has_lenet_tensor_core_layer(DType dtype, const ConvPoolShape& shape);
LaunchResult launch_lenet_tensor_core_layer(DType dtype, const ConvPoolForward& call, cudaStream_t stream);
bool has_lenet_tensor_core_gradients(DType dtype, const ConvPoolShape& shape);  // by launch_conv_pool_backward

// The whole network in float16 and bfloat16 for large batches, in two launches. The images are 16-byte aligned;
// `features`, [batch, 400] of the storage type and 16-byte aligned too, is overwritten, unless what a backward pass
// needs is kept: then pooled2 is in its place.
bool has_lenet_lean_forward(DType dtype, int64_t channels, int64_t classes);
LaunchResult launch_lenet_lean_forward(DType dtype, const LenetForwardOf<void>& call, void* features,
                                       cudaStream_t stream);

// Its convolutions alone for float32, in TF32, in one launch: pooled2 of the call is wanted, pooled1 and both indices
// together or not at all.
bool has_lenet_lean_convolutions(DType dtype, int64_t channels);
LaunchResult launch_lenet_lean_convolutions(const LenetForward& call, cudaStream_t stream);

// And its linear layers, from pooled2, in one launch; pooled2 and parameters are 16-byte aligned, hidden1 and hidden2
// wanted together or not at all.
bool has_lenet_tf32_linears();
LaunchResult launch_lenet_tf32_linears(const LenetForward& call, cudaStream_t stream);

}  // namespace lenet_ext::cuda
