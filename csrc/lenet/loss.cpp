// Cross entropy with class weights w, label smoothing s and ignored targets, over C classes. With p = softmax(y) of a
// row and its target t, not ignored, the row contributes
//
//   -(1 - s) w[t] log p[t] - s / C * sum over c of w[c] log p[c],
//
// divided by W, the sum of w[t] over the rows that count. So with a[c] = ((1 - s) w[t] [c = t] + s / C w[c]) / W the
// gradient is p * sum(a) - a. Source: PyTorch documentation of torch.nn.CrossEntropyLoss.
#include "lenet/loss.h"

#include <ATen/Parallel.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/nll_loss_backward.h>
#include <ATen/ops/nll_loss_forward.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/checks.h"

namespace lenet_ext {
namespace {

using at::Tensor;

// --- on the CPU: one pass over the rows ---

template <typename T>
int64_t argmax_row(const T* values, int64_t classes) {
  int64_t best = 0;
  for (int64_t c = 1; c < classes && !std::isnan(values[best]); ++c) {
    if (values[c] > values[best] || std::isnan(values[c])) best = c;
  }
  return best;
}

struct Row {
  double loss = 0;
  bool right = false;
};

template <typename T>
Row cross_entropy_row(const T* output, const T* weight, int64_t target, const LossOptions& o, double divisor,
                      int64_t classes, T* gradient) {
  const int64_t found = argmax_row(output, classes);
  const T largest = output[found];  // or NaN, which everything becomes then
  T sum = 0;
  for (int64_t c = 0; c < classes; ++c) {
    gradient[c] = std::exp(output[c] - largest);
    sum += gradient[c];
  }
  const T log_sum = largest + std::log(sum);
  const double even = o.label_smoothing / static_cast<double>(classes) / divisor;
  const double own = (1 - o.label_smoothing) * (weight != nullptr ? weight[target] : T(1)) / divisor;
  double loss = own * (log_sum - output[target]), total = own;
  if (even != 0) {
    for (int64_t c = 0; c < classes; ++c) {
      const double share = even * (weight != nullptr ? weight[c] : T(1));
      loss += share * (log_sum - output[c]);
      total += share;
    }
  }
  const T scale = static_cast<T>(total) / sum;
  for (int64_t c = 0; c < classes; ++c) {
    gradient[c] = gradient[c] * scale - static_cast<T>(even * (weight != nullptr ? weight[c] : T(1)));
  }
  gradient[target] -= static_cast<T>(own);
  return {loss, found == target};
}

template <typename T>
LossAndGradient cross_entropy_cpu(const Tensor& output, const Tensor& targets, const LossOptions& o) {
  const int64_t rows = output.size(0), classes = output.size(1);
  const Tensor classes_of_rows = targets.contiguous();
  const int64_t* target = classes_of_rows.const_data_ptr<int64_t>();
  const Tensor kept_weight = o.weight.has_value() ? o.weight->contiguous() : Tensor();
  const T* weight = kept_weight.defined() ? kept_weight.const_data_ptr<T>() : nullptr;
  double divisor = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (target[row] == o.ignore_index) continue;
    TORCH_CHECK_INDEX(target[row] >= 0 && target[row] < classes, "Target ", target[row], " is out of bounds.");
    divisor += weight != nullptr ? weight[target[row]] : T(1);
  }
  const Tensor logits = output.contiguous(), gradient = at::empty(output.sizes(), output.options());
  const T* from = logits.const_data_ptr<T>();
  T* to = gradient.mutable_data_ptr<T>();
  std::vector<Row> of_rows(rows);
  at::parallel_for(0, rows, 512, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (target[row] == o.ignore_index) {
        std::fill_n(to + row * classes, classes, T(0));
      } else {
        of_rows[row] =
            cross_entropy_row(from + row * classes, weight, target[row], o, divisor, classes, to + row * classes);
      }
    }
  });
  double loss = divisor == 0 ? std::nan("") : 0;  // stock's 0 / 0 where every target is ignored
  int64_t right = 0;
  for (const Row& row : of_rows) loss += row.loss, right += row.right;
  const LossAndCorrect of_batch{at::empty({}, output.options()), at::empty({}, targets.options())};
  *of_batch.loss.mutable_data_ptr<T>() = static_cast<T>(loss);
  *of_batch.correct.mutable_data_ptr<int64_t>() = right;
  return {of_batch, gradient};
}

// --- elsewhere: PyTorch's own kernels ---

LossAndGradient cross_entropy(const Tensor& output, const Tensor& targets, const LossOptions& o) {
  constexpr int64_t mean = at::Reduction::Mean;
  const Tensor log_probabilities = at::_log_softmax(output, 1, false);
  const auto [loss, divisor] = at::nll_loss_forward(log_probabilities, targets, o.weight, mean, o.ignore_index);
  Tensor gradient = at::nll_loss_backward(at::ones_like(loss).mul_(1 - o.label_smoothing), log_probabilities, targets,
                                          o.weight, mean, o.ignore_index, divisor);
  Tensor total = loss;
  if (o.label_smoothing != 0) {
    const Tensor counts = targets.ne(o.ignore_index).unsqueeze(1).to(output.scalar_type());
    Tensor share = counts.mul(-o.label_smoothing / static_cast<double>(output.size(1))).div(divisor);
    share = o.weight.has_value() ? share.mul(*o.weight) : share.expand(output.sizes());
    total = loss.mul(1 - o.label_smoothing).add_(at::sum(share.mul(log_probabilities)));
    gradient = gradient.add(share);
  }
  const Tensor correct = at::sum(at::argmax(output, 1).eq(targets).logical_and_(targets.ne(o.ignore_index)));
  return {{total, correct}, at::_log_softmax_backward_data(gradient, log_probabilities, 1, output.scalar_type())};
}

LossAndGradient mean_squared_error(const Tensor& output, const Tensor& targets) {
  const Tensor difference = output.sub(targets);
  const Tensor correct = at::sum(at::argmax(output, 1).eq(at::argmax(targets, 1)));
  return {{difference.square().mean(), correct}, difference.mul(2.0 / static_cast<double>(output.numel()))};
}

}  // namespace

void check_loss(const char* op, const Tensor& like, at::IntArrayRef sizes, const Tensor& targets,
                const LossOptions& options) {
  const int64_t rows = sizes[0], classes = sizes[1];
  TORCH_CHECK(targets.device() == like.device(), op, ": targets must be on ", like.device(), ", got ",
              targets.device());
  if (options.name == "mse") {
    TORCH_CHECK(targets.sizes() == sizes && targets.scalar_type() == like.scalar_type(), op,
                ": targets must have the output's shape ", sizes, " and dtype ", like.scalar_type(), ", got ",
                targets.scalar_type(), " of shape ", targets.sizes());
    return;
  }
  TORCH_CHECK(options.name == "cross_entropy", op, ": loss must be 'cross_entropy' or 'mse', got '", options.name, "'");
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.dim() == 1 && targets.size(0) == rows, op,
              ": targets must be int64 of shape [", rows, "], got ", targets.scalar_type(), " of shape ",
              targets.sizes());
  TORCH_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1, op,
              ": label_smoothing must be between 0 and 1, got ", options.label_smoothing);
  if (options.weight.has_value()) {
    check_same_device_and_dtype(op, {{"output", like}, {"weight", *options.weight}});
    TORCH_CHECK(options.weight->dim() == 1 && options.weight->size(0) == classes, op, ": weight must have shape [",
                classes, "], got ", options.weight->sizes());
  }
}

LossAndGradient loss_and_gradient(const Tensor& output, const Tensor& targets, const LossOptions& options) {
  if (options.name == "mse") return mean_squared_error(output, targets);
  if (output.is_cpu() && output.scalar_type() == at::kFloat) return cross_entropy_cpu<float>(output, targets, options);
  if (output.is_cpu() && output.scalar_type() == at::kDouble) {
    return cross_entropy_cpu<double>(output, targets, options);
  }
  return cross_entropy(output, targets, options);
}

}  // namespace lenet_ext
