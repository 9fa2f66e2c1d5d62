#include "linear/shape.h"

#include "common/checks.h"

namespace lenet_ext {

LinearShape check_linear(const char* op, const at::Tensor& input, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  if (bias.has_value()) {
    check_same_device_and_dtype(op, {{"input", input}, {"weight", weight}, {"bias", *bias}});
  } else {
    check_same_device_and_dtype(op, {{"input", input}, {"weight", weight}});
  }
  TORCH_CHECK(weight.dim() == 2, op, ": weight must be 2-D (out_features, in_features), got shape ", weight.sizes());
  TORCH_CHECK(input.dim() >= 1 && input.size(-1) == weight.size(1), op, ": input must have shape [..., ",
              weight.size(1), "] for weight of shape ", weight.sizes(), ", got shape ", input.sizes());
  check_bias(op, bias, weight.size(0));
  LinearShape s{1, weight.size(1), weight.size(0)};
  for (int64_t i = 0; i + 1 < input.dim(); ++i) s.rows *= input.size(i);
  return s;
}

LinearShape check_linear_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& output,
                                  const at::Tensor& input, const at::Tensor& weight) {
  const LinearShape s = check_linear(op, input, weight, std::nullopt);
  check_same_device_and_dtype(op, {{"input", input}, {"grad_output", grad_output}});
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.back() = s.out_features;
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(sizes), op, ": grad_output must have shape ",
              at::IntArrayRef(sizes), ", got ", grad_output.sizes());
  if (output.defined()) {
    check_same_device_and_dtype(op, {{"input", input}, {"output", output}});
    TORCH_CHECK(output.sizes() == at::IntArrayRef(sizes), op, ": output must have shape ", at::IntArrayRef(sizes),
                ", got ", output.sizes());
  }
  return s;
}

}  // namespace lenet_ext
