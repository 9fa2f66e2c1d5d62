// The update at the end of a training step: torch.optim's SGD, Adam and AdamW, by PyTorch's own fused kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <vector>

namespace lenet_ext {

// What the optimizer keeps, each list as long as the parameters (or empty), as it stands in its state_dict.
struct OptimizerState {
  at::TensorList momentum_buffer;                            // SGD
  at::TensorList exp_avg, exp_avg_sq, max_exp_avg_sq, step;  // Adam, AdamW
};

constexpr int64_t kSgdOptions = 7;   // lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step
constexpr int64_t kAdamOptions = 6;  // lr, beta1, beta2, eps, weight_decay, maximize

// Checks the lists; `optimizer` is "sgd", "adam" or "adamw", `options` those of each parameter in turn,
// or once where they are the same for all.
OptimizerState check_optimizer(const char* op, std::string_view optimizer, at::TensorList parameters,
                               at::TensorList state, at::ArrayRef<double> options);

void update(std::string_view optimizer, at::TensorList parameters, at::TensorList gradients,
            const OptimizerState& state, at::ArrayRef<double> options);

}  // namespace lenet_ext
