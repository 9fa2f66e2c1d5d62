#include "linear/shape.h"

#include "common/checks.h"

namespace lenet_ext {

// --8<-- [start:check]
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
// --8<-- [end:check]

LinearShape check_linear_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& output,
                                  const at::Tensor& input, const at::Tensor& weight, GradientMask wanted) {
  TORCH_CHECK(input.defined() || !wanted[1], op, ": input is needed for the gradient of weight, got None");
  TORCH_CHECK(weight.defined() || !wanted[0], op, ": weight is needed for the gradient of input, got None");
  TORCH_CHECK(grad_output.dim() >= 1, op, ": grad_output must have shape [..., out_features], got ",
              grad_output.sizes());
  std::vector<NamedTensor> tensors = {{"grad_output", grad_output}};
  if (output.defined()) tensors.push_back({"output", output});
  if (input.defined()) tensors.push_back({"input", input});
  if (weight.defined()) tensors.push_back({"weight", weight});
  check_same_device_and_dtype(op, tensors);

  LinearShape s{1, 0, grad_output.size(-1)};
  for (int64_t i = 0; i + 1 < grad_output.dim(); ++i) s.rows *= grad_output.size(i);
  if (weight.defined()) {
    TORCH_CHECK(weight.dim() == 2 && weight.size(0) == s.out_features, op, ": weight must have shape [", s.out_features,
                ", in_features] for grad_output of shape ", grad_output.sizes(), ", got ", weight.sizes());
    s.in_features = weight.size(1);
  }
  if (input.defined()) {
    if (!weight.defined() && input.dim() >= 1) s.in_features = input.size(-1);
    std::vector<int64_t> sizes = grad_output.sizes().vec();
    sizes.back() = s.in_features;
    TORCH_CHECK(input.sizes() == at::IntArrayRef(sizes), op, ": input must have shape ", at::IntArrayRef(sizes),
                ", got ", input.sizes());
  }
  TORCH_CHECK(!output.defined() || output.sizes() == grad_output.sizes(), op, ": output must have shape ",
              grad_output.sizes(), ", got ", output.sizes());
  return s;
}

}  // namespace lenet_ext
