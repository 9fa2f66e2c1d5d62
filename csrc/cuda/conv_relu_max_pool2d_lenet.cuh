// The kernels made for LeNet's two layers, as the general launchers of conv_relu_max_pool2d.cu use them. Contiguous
// tensors of float32, float16 or bfloat16.
#pragma once

#include "device.cuh"

namespace lenet_ext::cuda {

LaunchResult launch_lenet_conv_forward(DType dtype, const ConvPoolForward& call, cudaStream_t stream);

// The gradient of the second layer's input.
bool has_lenet_grad_input(const ConvPoolShape& shape);
LaunchResult launch_lenet_grad_input(DType dtype, const ConvPoolBackward& call, cudaStream_t stream);

// Partial sums [slices][out_channels][taps + 1] of the weight and (last column) bias gradients.
int64_t lenet_grad_weight_slices(const ConvPoolShape& shape);
LaunchResult launch_lenet_grad_weight_partials(DType dtype, const ConvPoolBackward& call, cudaStream_t stream);

// Both on the tensor cores, where a call has slice_images: of the second layer what is wanted of the gradients of input
// and weight, of the first that of weight, which must be wanted. A slice is so many images.
LaunchResult launch_lenet_tensor_core_gradients(DType dtype, const ConvPoolBackward& call, cudaStream_t stream);

}  // namespace lenet_ext::cuda
