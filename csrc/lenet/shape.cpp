#include "lenet/shape.h"

#include "common/checks.h"

namespace lenet_ext {
namespace {

constexpr const char* kNames[] = {"parameters[0] (conv1.weight)", "parameters[1] (conv1.bias)",
                                  "parameters[2] (conv2.weight)", "parameters[3] (conv2.bias)",
                                  "parameters[4] (fc1.weight)",   "parameters[5] (fc1.bias)",
                                  "parameters[6] (fc2.weight)",   "parameters[7] (fc2.bias)",
                                  "parameters[8] (fc3.weight)",   "parameters[9] (fc3.bias)"};

// A tensor that the forward pass returned, or its gradient, contiguous.
at::Tensor activation(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef sizes,
                      const at::Tensor& input, bool codes) {
  const auto dtype = codes ? at::kByte : input.scalar_type();
  TORCH_CHECK(tensor.defined() && tensor.sizes() == sizes && tensor.scalar_type() == dtype &&
                  tensor.device() == input.device() && tensor.layout() == at::kStrided,
              op, ": ", name, " must be a ", dtype, " tensor of shape ", sizes, " on ", input.device(), ", got ",
              tensor.defined() ? tensor.toString() : "none", " of shape ", tensor.sizes(), " on ", tensor.device());
  return tensor.contiguous();
}

}  // namespace

ConvPoolOptions lenet_convolution() {
  static constexpr int64_t one[] = {1, 1}, two[] = {2, 2}, zero[] = {0, 0, 0, 0};
  return {one, zero, one, 1, two, two, at::IntArrayRef(zero, 2), one};
}

void check_lenet(const char* op, const at::Tensor& input, at::TensorList p) {
  TORCH_CHECK(p.size() == 10, op, ": parameters must hold 10 tensors, got ", p.size());
  check_same_device_and_dtype(op, {{"input", input},
                                   {kNames[0], p[0]},
                                   {kNames[1], p[1]},
                                   {kNames[2], p[2]},
                                   {kNames[3], p[3]},
                                   {kNames[4], p[4]},
                                   {kNames[5], p[5]},
                                   {kNames[6], p[6]},
                                   {kNames[7], p[7]},
                                   {kNames[8], p[8]},
                                   {kNames[9], p[9]}});
  TORCH_CHECK(p[8].dim() == 2, op, ": ", kNames[8], " must be 2-D, got shape ", p[8].sizes());
  const int64_t channels = p[0].dim() == 4 ? p[0].size(1) : 1, classes = p[8].size(0);
  TORCH_CHECK(input.dim() == 4 && input.size(1) == channels && input.size(2) == 32 && input.size(3) == 32, op,
              ": input must have shape [batch, ", channels, ", 32, 32], got ", input.sizes());
  const int64_t weights[][4] = {{6, channels, 5, 5}, {16, 6, 5, 5}, {120, 400}, {84, 120}, {classes, 84}};
  for (size_t i = 0; i < 10; ++i) {
    const auto& weight = weights[i / 2];
    const at::IntArrayRef expected(weight, i % 2 == 1 ? 1 : i < 4 ? 4 : 2);
    TORCH_CHECK(p[i].sizes() == expected, op, ": ", kNames[i], " must have shape ", expected, ", got ", p[i].sizes());
  }
}

std::pair<at::Tensor, LenetActivations> check_lenet_backward(const char* op, const at::Tensor& grad_output,
                                                             const at::Tensor& input, at::TensorList parameters,
                                                             const LenetActivations& activations) {
  static constexpr const char* names[] = {"pooled1", "indices1", "pooled2", "indices2", "hidden1", "hidden2"};
  const int64_t batch = input.size(0);
  const int64_t sizes[][4] = {{batch, 6, 14, 14}, {batch, 16, 5, 5}, {batch, 120}, {batch, 84}};
  static constexpr int shapes[] = {0, 0, 1, 1, 2, 3};
  LenetActivations checked;
  for (size_t i = 0; i < 6; ++i) {
    const at::IntArrayRef expected(sizes[shapes[i]], i < 4 ? 4 : 2);
    checked[i] = activation(op, names[i], activations[i], expected, input, i == 1 || i == 3);
  }
  return {activation(op, "grad_output", grad_output, {batch, parameters[8].size(0)}, input, false), checked};
}

}  // namespace lenet_ext
