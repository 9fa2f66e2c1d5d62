// The updates of torch.optim's SGD, Adam and AdamW, as its documentation states them: one pass over what a parameter
// has. Loops that the compiler turns into vectors; what is the same for all elements is decided outside of them.
#include "optimizer_kernels.h"

#include "simd.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

template <bool with_momentum, bool with_decay>
void sgd_loop(const SgdUpdate& o, int64_t count, const float* __restrict__ gradient, float* __restrict__ parameter,
              float* __restrict__ momentum_buffer) {
  const float sign = o.maximize ? -1.0f : 1.0f, lr = o.lr, weight_decay = o.weight_decay;
  const float keep = o.momentum, add = o.one_minus_dampening, look_ahead = o.nesterov ? o.momentum : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    float step = sign * gradient[i];
    if (with_decay) step += weight_decay * parameter[i];
    if (with_momentum) {
      const float buffer = keep * momentum_buffer[i] + add * step;
      momentum_buffer[i] = buffer;
      step = look_ahead == 0 ? buffer : step + look_ahead * buffer;
    }
    parameter[i] -= lr * step;
  }
}

void sgd(const SgdUpdate& o, int64_t count, const float* gradient, float* parameter, float* momentum_buffer) {
  const bool decay = o.weight_decay != 0;
  if (momentum_buffer == nullptr) {
    return (decay ? sgd_loop<false, true> : sgd_loop<false, false>)(o, count, gradient, parameter, nullptr);
  }
  SgdUpdate update = o;
  if (o.first) {  // the buffer becomes the gradient
    for (int64_t i = 0; i < count; ++i) momentum_buffer[i] = 0;
    update.one_minus_dampening = 1;
  }
  (decay ? sgd_loop<true, true> : sgd_loop<true, false>)(update, count, gradient, parameter, momentum_buffer);
}

template <bool amsgrad, bool with_decay>
void adam_loop(const AdamUpdate& o, int64_t count, const float* __restrict__ gradient, float* __restrict__ parameter,
               float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq, float* __restrict__ max_exp_avg_sq) {
  const AdamUpdate u = o;  // a copy that no store can change
  const float sign = u.maximize ? -1.0f : 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    float g = sign * gradient[i];
    if (with_decay) g += u.weight_decay * parameter[i];
    const float first = u.beta1 * exp_avg[i] + u.one_minus_beta1 * g;
    float second = u.beta2 * exp_avg_sq[i] + u.one_minus_beta2 * g * g;
    exp_avg[i] = first;
    exp_avg_sq[i] = second;
    if (amsgrad) {
      second = second < max_exp_avg_sq[i] ? max_exp_avg_sq[i] : second;  // NaN passes
      max_exp_avg_sq[i] = second;
    }
    parameter[i] = u.shrink * parameter[i] - u.step_size * first / (__builtin_sqrtf(second) / u.correction + u.eps);
  }
}

void adam(const AdamUpdate& o, int64_t count, const float* gradient, float* parameter, float* exp_avg,
          float* exp_avg_sq, float* max_exp_avg_sq) {
  const bool decay = o.weight_decay != 0;
  const auto loop = max_exp_avg_sq != nullptr ? (decay ? adam_loop<true, true> : adam_loop<true, false>)
                                              : (decay ? adam_loop<false, true> : adam_loop<false, false>);
  loop(o, count, gradient, parameter, exp_avg, exp_avg_sq, max_exp_avg_sq);
}

}  // namespace

extern const OptimizerKernels optimizer_kernels;
const OptimizerKernels optimizer_kernels = {sgd, adam};

}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
