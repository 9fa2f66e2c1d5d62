// What the host file of the optimizers calls on the CPU. Raw pointers and numbers, no torch.
#pragma once

#include <stdint.h>

namespace lenet_ext::cpu {

// The names are torch.optim's; `first`: the momentum buffer holds nothing yet.
struct SgdUpdate {
  float lr, momentum, one_minus_dampening, weight_decay;
  bool nesterov, maximize, first;
};

struct AdamUpdate {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float weight_decay;           // Adam: added to the gradient, times the parameter
  float shrink;                 // AdamW: the parameter is multiplied by it, 1 - lr * weight_decay
  float step_size, correction;  // lr / (1 - beta1^step); sqrt(1 - beta2^step)
  bool maximize;
};

// Of `count` elements. momentum_buffer and max_exp_avg_sq are null where there are none.
struct OptimizerKernels {
  void (*sgd)(const SgdUpdate&, int64_t count, const float* gradient, float* parameter, float* momentum_buffer);
  void (*adam)(const AdamUpdate&, int64_t count, const float* gradient, float* parameter, float* exp_avg,
               float* exp_avg_sq, float* max_exp_avg_sq);
};

}  // namespace lenet_ext::cpu
