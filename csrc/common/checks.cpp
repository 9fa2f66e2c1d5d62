#include "common/checks.h"

namespace lenet_ext {

void check_same_device_and_dtype(const char* op, c10::ArrayRef<NamedTensor> tensors) {
  const NamedTensor& first = tensors.front();
  for (const NamedTensor& each : tensors) {
    TORCH_CHECK(each.tensor.defined(), op, ": ", each.name, " is undefined");
    TORCH_CHECK(each.tensor.layout() == at::kStrided, op, ": ", each.name, " must be a dense tensor, got layout ",
                each.tensor.layout());
    TORCH_CHECK(each.tensor.device() == first.tensor.device(), op, ": all tensors must be on one device, but ",
                each.name, " is on ", each.tensor.device(), " and ", first.name, " is on ", first.tensor.device());
    TORCH_CHECK(each.tensor.scalar_type() == first.tensor.scalar_type(), op, ": all tensors must have one dtype, but ",
                each.name, " is ", each.tensor.scalar_type(), " and ", first.name, " is ", first.tensor.scalar_type());
  }
}

void check_bias(const char* op, const std::optional<at::Tensor>& bias, int64_t size) {
  if (!bias.has_value()) return;
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == size, op, ": bias must have shape [", size, "], got ",
              bias->sizes());
}

}  // namespace lenet_ext
