// The update of a training step by kernels of our own.
#pragma once

#include "lenet/training_step.h"

namespace lenet_ext {

// Of contiguous float32 tensors. False, and nothing is changed, for all others. In one thread: a network of this size
// is updated before a second one wakes up.
bool update_on_cpu(const TrainingStepCall& step, at::TensorList gradients);

}  // namespace lenet_ext
