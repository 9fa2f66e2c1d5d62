// Argument checks shared by the operators: exception classes are stock's, messages name the argument, what it
// was and what was expected.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace lenet_ext {

struct NamedTensor {
  const char* name;
  const at::Tensor& tensor;
};

// Every tensor dense, on the first one's device and of the first one's dtype.
void check_same_device_and_dtype(const char* op, c10::ArrayRef<NamedTensor> tensors);

// A bias, where there is one, is a vector of `size` elements.
void check_bias(const char* op, const std::optional<at::Tensor>& bias, int64_t size);

}  // namespace lenet_ext
