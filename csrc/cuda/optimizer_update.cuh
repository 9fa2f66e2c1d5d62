// The update of one element of a parameter, as torch.optim documents SGD, Adam and AdamW. What is the same for all
// elements of a parameter, BiasCorrection, is computed once.
#pragma once

#include "device.cuh"

namespace lenet_ext::cuda {

// Of Adam's moments, which start at zero.
struct BiasCorrection {
  float step_size, root;  // lr / (1 - beta1 ^ steps), sqrt(1 - beta2 ^ steps)
};

__device__ __forceinline__ BiasCorrection bias_correction(const UpdateOf& o, double steps) {
  return {static_cast<float>(o.lr / (1 - pow(o.beta1, steps))), static_cast<float>(sqrt(1 - pow(o.beta2, steps)))};
}

__device__ __forceinline__ void sgd(const UpdateOf& o, float* parameter, int64_t at, float gradient) {
  const float value = parameter[at];
  if (o.maximize) gradient = -gradient;
  if (o.weight_decay != 0) gradient += static_cast<float>(o.weight_decay) * value;
  if (o.momentum_buffer != nullptr) {
    const float momentum = static_cast<float>(o.momentum);
    const float buffer =
        o.first ? gradient : momentum * o.momentum_buffer[at] + static_cast<float>(1 - o.dampening) * gradient;
    o.momentum_buffer[at] = buffer;
    gradient = o.nesterov ? gradient + momentum * buffer : buffer;
  }
  parameter[at] = value - static_cast<float>(o.lr) * gradient;
}

// `decoupled`: AdamW's weight decay, which does not pass through the moments.
__device__ __forceinline__ void adam(const UpdateOf& o, bool decoupled, const BiasCorrection& correction,
                                     float* parameter, int64_t at, float gradient) {
  float value = parameter[at];
  if (o.maximize) gradient = -gradient;
  if (decoupled) {
    value -= static_cast<float>(o.lr * o.weight_decay) * value;
  } else if (o.weight_decay != 0) {
    gradient += static_cast<float>(o.weight_decay) * value;
  }
  const float beta1 = static_cast<float>(o.beta1), beta2 = static_cast<float>(o.beta2);
  const float first = beta1 * o.exp_avg[at] + static_cast<float>(1 - o.beta1) * gradient;
  float second = beta2 * o.exp_avg_sq[at] + static_cast<float>(1 - o.beta2) * gradient * gradient;
  o.exp_avg[at] = first;
  o.exp_avg_sq[at] = second;
  if (o.max_exp_avg_sq != nullptr) {
    const float largest = o.max_exp_avg_sq[at];
    second = second > largest || lx::is_nan(second) ? second : largest;
    o.max_exp_avg_sq[at] = second;
  }
  parameter[at] = value - correction.step_size * first / (sqrtf(second) / correction.root + static_cast<float>(o.eps));
}

}  // namespace lenet_ext::cuda
