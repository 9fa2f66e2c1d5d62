// The loss of a training step and its gradient, without autograd.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace lenet_ext {

struct LossOptions {
  std::string_view name;  // "cross_entropy" or "mse", both averaged
  std::optional<at::Tensor> weight;
  double label_smoothing;
  int64_t ignore_index;
};

// A scalar, and an int64 scalar: of how many rows the largest output is that of the target, or where the target, of the
// output's shape, is largest too. As at::argmax has it: the first of equals, and NaN is the largest. Ignored rows do
// not count.
struct LossAndCorrect {
  at::Tensor loss, correct;
};

struct LossAndGradient {
  LossAndCorrect of_batch;
  at::Tensor gradient;  // of the shape of `output`
};

// Throws if targets or options do not fit an output of `sizes`, on the device and of the dtype of `like`.
void check_loss(const char* op, const at::Tensor& like, at::IntArrayRef sizes, const at::Tensor& targets,
                const LossOptions& options);

// For checked arguments. Throws where stock does: std::out_of_range's torch counterpart, IndexError in Python, for a
// target outside [0, classes).
LossAndGradient loss_and_gradient(const at::Tensor& output, const at::Tensor& targets, const LossOptions& options);

}  // namespace lenet_ext
