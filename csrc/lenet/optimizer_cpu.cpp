#include "lenet/optimizer_cpu.h"

#include <algorithm>
#include <cmath>

#include "common/cpu_dispatch.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using at::TensorList;

bool can_be_updated(const TrainingStepCall& step, TensorList gradients) {
  const OptimizerState& s = step.state;
  for (const TensorList list :
       {step.parameters, gradients, s.momentum_buffer, s.exp_avg, s.exp_avg_sq, s.max_exp_avg_sq}) {
    for (const Tensor& tensor : list) {
      if (tensor.scalar_type() != at::kFloat || !tensor.is_contiguous()) return false;
    }
  }
  return std::all_of(s.step.begin(), s.step.end(), [](const Tensor& step) { return step.scalar_type() == at::kFloat; });
}

float* data_at(TensorList list, size_t i) { return list.empty() ? nullptr : cpu::mutable_data<float>(list[i]); }

void sgd(const TrainingStepCall& step, size_t i, const double* o, const Tensor& gradient) {
  const bool has_momentum = o[1] != 0;
  const cpu::SgdUpdate update{static_cast<float>(o[0]),
                              static_cast<float>(o[1]),
                              static_cast<float>(1 - o[2]),
                              static_cast<float>(o[3]),
                              o[4] != 0,
                              o[5] != 0,
                              o[6] != 0};
  LENET_EXT_CPU_DISPATCH(optimizer_kernels)
      .sgd(update, gradient.numel(), cpu::data<float>(gradient), cpu::mutable_data<float>(step.parameters[i]),
           has_momentum ? data_at(step.state.momentum_buffer, i) : nullptr);
}

void adam(const TrainingStepCall& step, size_t i, const double* o, const Tensor& gradient) {
  const double lr = o[0], beta1 = o[1], beta2 = o[2], weight_decay = o[4];
  const bool decoupled = step.optimizer == "adamw";
  const double count = *cpu::mutable_data<float>(step.state.step[i]) += 1;
  cpu::AdamUpdate update{};
  update.beta1 = static_cast<float>(beta1), update.one_minus_beta1 = static_cast<float>(1 - beta1);
  update.beta2 = static_cast<float>(beta2), update.one_minus_beta2 = static_cast<float>(1 - beta2);
  update.eps = static_cast<float>(o[3]);
  update.weight_decay = decoupled ? 0.0f : static_cast<float>(weight_decay);
  update.shrink = decoupled ? static_cast<float>(1 - lr * weight_decay) : 1.0f;
  update.step_size = static_cast<float>(lr / (1 - std::pow(beta1, count)));
  update.correction = static_cast<float>(std::sqrt(1 - std::pow(beta2, count)));
  update.maximize = o[5] != 0;
  LENET_EXT_CPU_DISPATCH(optimizer_kernels)
      .adam(update, gradient.numel(), cpu::data<float>(gradient), cpu::mutable_data<float>(step.parameters[i]),
            data_at(step.state.exp_avg, i), data_at(step.state.exp_avg_sq, i), data_at(step.state.max_exp_avg_sq, i));
}

}  // namespace

bool update_on_cpu(const TrainingStepCall& step, TensorList gradients) {
  if (!can_be_updated(step, gradients)) return false;
  const bool is_sgd = step.optimizer == "sgd";
  const size_t width = is_sgd ? kSgdOptions : kAdamOptions;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const double* options = step.options.data() + (step.options.size() == width ? 0 : i * width);
    (is_sgd ? sgd : adam)(step, i, options, gradients[i]);
  }
  return true;
}

}  // namespace lenet_ext
