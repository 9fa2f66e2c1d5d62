#include "lenet/optimizer.h"

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>

#include <algorithm>

#include "common/checks.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using at::TensorList;

int64_t options_of(std::string_view optimizer) { return optimizer == "sgd" ? kSgdOptions : kAdamOptions; }

TensorList part(TensorList list, size_t begin, size_t end) {
  return list.empty() ? list : list.slice(begin, end - begin);
}

void update_sgd(TensorList parameters, TensorList gradients, TensorList momentum_buffers, const double* o) {
  const bool nesterov = o[4] != 0, maximize = o[5] != 0, first = o[6] != 0;
  at::_fused_sgd_(parameters, gradients, o[1] != 0 ? momentum_buffers : TensorList(), o[3], o[1], o[0], o[2], nesterov,
                  maximize, first);
}

void update_adam(std::string_view optimizer, TensorList parameters, TensorList gradients, const OptimizerState& s,
                 const double* o) {
  const bool amsgrad = !s.max_exp_avg_sq.empty(), maximize = o[5] != 0;
  at::_foreach_add_(s.step, 1);
  // torch.optim keeps the number of steps on the CPU, unless its fused kernels are asked for.
  std::vector<Tensor> steps;
  for (const Tensor& step : s.step) {
    steps.push_back(parameters[0].is_cpu() ? step : step.to(parameters[0].device(), at::kFloat, true));
  }
  if (optimizer == "adam") {
    at::_fused_adam_(parameters, gradients, s.exp_avg, s.exp_avg_sq, s.max_exp_avg_sq, steps, o[0], o[1], o[2], o[4],
                     o[3], amsgrad, maximize);
  } else {
    at::_fused_adamw_(parameters, gradients, s.exp_avg, s.exp_avg_sq, s.max_exp_avg_sq, steps, o[0], o[1], o[2], o[4],
                      o[3], amsgrad, maximize);
  }
}

}  // namespace

OptimizerState check_optimizer(const char* op, std::string_view optimizer, TensorList parameters, TensorList state,
                               at::ArrayRef<double> options) {
  const size_t count = parameters.size();
  TORCH_CHECK(optimizer == "sgd" || optimizer == "adam" || optimizer == "adamw", op,
              ": optimizer must be 'sgd', 'adam' or 'adamw', got '", optimizer, "'");
  const size_t width = options_of(optimizer);
  TORCH_CHECK(options.size() == width || options.size() == count * width, op, ": options must hold ", width,
              " numbers for all or for each of ", count, " parameters, got ", options.size());
  const size_t lists = state.size() / count;
  const bool fits = optimizer == "sgd" ? lists <= 1 : lists == 3 || lists == 4;
  TORCH_CHECK(state.size() % count == 0 && fits, op, ": state must hold ",
              optimizer == "sgd" ? "no tensor or one" : "3 or 4 tensors", " for each of ", count, " parameters, got ",
              state.size(), " in all");
  for (size_t i = 0; i < state.size(); ++i) {
    const bool is_step = optimizer != "sgd" && i / count == lists - 1;
    const Tensor &tensor = state[i], &parameter = parameters[i % count];
    TORCH_CHECK(tensor.defined() && (is_step ? tensor.dim() == 0 : tensor.sizes() == parameter.sizes()), op, ": state[",
                i, "] must have shape ", is_step ? at::IntArrayRef() : parameter.sizes(), ", got ", tensor.sizes());
    if (!is_step) check_same_device_and_dtype(op, {{"parameter", parameter}, {"state", tensor}});
  }
  const auto list = [&](size_t index) { return state.slice(index * count, count); };
  if (optimizer == "sgd") return {lists == 1 ? list(0) : TensorList(), {}, {}, {}, {}};
  return {{}, list(0), list(1), lists == 4 ? list(2) : TensorList(), list(lists - 1)};
}

void update(std::string_view optimizer, TensorList parameters, TensorList gradients, const OptimizerState& s,
            at::ArrayRef<double> options) {
  // Neighbours with the same options, which all parameters of a group are, are updated together.
  const int64_t width = options_of(optimizer);
  const bool same = options.size() == static_cast<size_t>(width);
  const auto of = [&](size_t i) { return options.slice(same ? 0 : i * width, width); };
  for (size_t begin = 0, end; begin < parameters.size(); begin = end) {
    for (end = begin + 1; end < parameters.size() && of(end) == of(begin); ++end) {
    }
    const TensorList p = part(parameters, begin, end), g = part(gradients, begin, end);
    if (optimizer == "sgd") {
      update_sgd(p, g, part(s.momentum_buffer, begin, end), of(begin).data());
    } else {
      const OptimizerState some{{},
                                part(s.exp_avg, begin, end),
                                part(s.exp_avg_sq, begin, end),
                                part(s.max_exp_avg_sq, begin, end),
                                part(s.step, begin, end)};
      update_adam(optimizer, p, g, some, of(begin).data());
    }
  }
}

}  // namespace lenet_ext
