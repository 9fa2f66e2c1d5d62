#include "checks.h"
#include "lenet.h"

namespace lenet_ext {
namespace {

constexpr const char* kNames[] = {"parameters[0] (conv1.weight)", "parameters[1] (conv1.bias)",
                                  "parameters[2] (conv2.weight)", "parameters[3] (conv2.bias)",
                                  "parameters[4] (fc1.weight)",   "parameters[5] (fc1.bias)",
                                  "parameters[6] (fc2.weight)",   "parameters[7] (fc2.bias)",
                                  "parameters[8] (fc3.weight)",   "parameters[9] (fc3.bias)"};

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

}  // namespace lenet_ext
