#include "checks.h"
#include "lenet.h"

namespace lenet_ext {

ConvPoolOptions lenet_convolution() {
  static constexpr int64_t one[] = {1, 1}, two[] = {2, 2}, zero[] = {0, 0, 0, 0};
  return {one, zero, one, 1, two, two, at::IntArrayRef(zero, 2), one};
}

void check_lenet(const char* op, const at::Tensor& input, at::TensorList p) {
  TORCH_CHECK(p.size() == 10, op, ": parameters must hold 10 tensors, got ", p.size());
  check_same_device_and_dtype(op, {{"input", input},
                                   {"parameters[0]", p[0]},
                                   {"parameters[1]", p[1]},
                                   {"parameters[2]", p[2]},
                                   {"parameters[3]", p[3]},
                                   {"parameters[4]", p[4]},
                                   {"parameters[5]", p[5]},
                                   {"parameters[6]", p[6]},
                                   {"parameters[7]", p[7]},
                                   {"parameters[8]", p[8]},
                                   {"parameters[9]", p[9]}});
  TORCH_CHECK(p[8].dim() == 2, op, ": parameters[8] must be 2-D, got shape ", p[8].sizes());
  const int64_t channels = p[0].dim() == 4 ? p[0].size(1) : 1, classes = p[8].size(0);
  TORCH_CHECK(input.dim() == 4 && input.size(1) == channels && input.size(2) == 32 && input.size(3) == 32, op,
              ": input must have shape [batch, ", channels, ", 32, 32], got ", input.sizes());
  const std::vector<int64_t> sizes[] = {{6, channels, 5, 5}, {6},  {16, 6, 5, 5}, {16},     {120, 400}, {120},
                                        {84, 120},           {84}, {classes, 84}, {classes}};
  for (size_t i = 0; i < 10; ++i) {
    TORCH_CHECK(p[i].sizes() == at::IntArrayRef(sizes[i]), op, ": parameters[", i, "] must have shape ",
                at::IntArrayRef(sizes[i]), ", got ", p[i].sizes());
  }
}

}  // namespace lenet_ext
