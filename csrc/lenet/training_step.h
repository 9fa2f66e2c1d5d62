// What a training step consists of.
#pragma once

#include "lenet/loss.h"
#include "lenet/optimizer.h"

namespace lenet_ext {

// The arguments of a training step, checked.
struct TrainingStepCall {
  const at::Tensor &input, &targets;
  at::TensorList parameters;
  const LossOptions& loss;
  std::string_view optimizer;
  const OptimizerState& state;
  at::ArrayRef<double> options;  // as check_optimizer describes them
};

}  // namespace lenet_ext
