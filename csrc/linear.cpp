// The CPU side of linear and linear_relu: checks, allocation, choice of the algorithm.
#include "linear.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "algorithm.h"
#include "cpu/dispatch.h"
#include "cpu/gemm.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename A>
void forward_direct(const LinearShape& s, const A* input, const A* weight, const A* bias, bool relu, A* output) {
  const auto& kernels = cpu::gemm_table<A>();
  const cpu::GemmNT<A> gemm{s.rows, s.out_features, s.in_features, input, weight, output, bias, relu};
  const double flops = 2.0 * s.rows * s.out_features * s.in_features;
  if (s.rows <= kernels.most_nt_rows(s.in_features)) {
    cpu::parallel_units(kernels.nt_units(gemm), flops,
                        [&](int64_t begin, int64_t end) { kernels.nt_run(gemm, begin, end); });
  } else {
    const int64_t bytes = kernels.transposing_scratch(gemm) * sizeof(A);
    cpu::parallel_units(kernels.transposing_units(gemm), flops, [&](int64_t begin, int64_t end) {
      kernels.transposing_run(gemm, static_cast<A*>(cpu::unit_scratch(bytes)), begin, end);
    });
  }
}

}  // namespace

Tensor linear_cpu(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias, bool relu) {
  const LinearShape s = check_linear(op, input, weight, bias);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const bool direct =
      input.scalar_type() != at::kBFloat16 && linear_algorithm_cpu(s.in_features, s.out_features) == Algorithm::Direct;
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.back() = s.out_features;
  if (s.rows == 0 || s.out_features == 0) return at::empty(sizes, input.options());
  const Tensor rows = input.contiguous().view({s.rows, s.in_features});
  if (!direct) {
    const Tensor transposed = weight.t();
    Tensor output = bias.has_value() ? at::addmm(*bias, rows, transposed) : at::mm(rows, transposed);
    if (relu) output.relu_();
    return output.view(sizes);
  }
  const Tensor output = at::empty(sizes, input.options());
  const Tensor kernel = weight.contiguous(), offset = bias.has_value() ? bias->contiguous() : Tensor();
  cpu::dispatch(input, op, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, BFloat16>) {
      forward_direct<T>(s, cpu::data<T>(rows), cpu::data<T>(kernel), offset.defined() ? cpu::data<T>(offset) : nullptr,
                        relu, cpu::mutable_data<T>(output));
    }
  });
  return output;
}

namespace {

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return linear_cpu("linear", input, weight, bias, false);
}

Tensor linear_relu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return linear_cpu("linear_relu", input, weight, bias, true);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_backward_cpu(const char* op, const Tensor& grad_output, const Tensor& output,
                                                       const Tensor& input, const Tensor& weight,
                                                       std::array<bool, 3> output_mask) {
  const LinearShape s = check_linear_backward(op, grad_output, output, input, weight);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto none = [&input] { return at::empty({0}, input.options()); };  // a gradient that was not asked for
  if (s.rows == 0 || s.out_features == 0) {
    return {output_mask[0] ? at::zeros(input.sizes(), input.options()) : none(),
            output_mask[1] ? at::zeros(weight.sizes(), weight.options()) : none(),
            output_mask[2] ? at::zeros({s.out_features}, weight.options()) : none()};
  }
  Tensor grad = grad_output.contiguous().view({s.rows, s.out_features});
  const Tensor rows = input.contiguous().view({s.rows, s.in_features}), kernel = weight.contiguous();
  const bool direct =
      input.scalar_type() != at::kBFloat16 && linear_algorithm_cpu(s.in_features, s.out_features) == Algorithm::Direct;
  if (!direct) {
    if (output.defined()) grad = at::threshold_backward(grad, output.reshape({s.rows, s.out_features}), 0);
    return {output_mask[0] ? at::mm(grad, kernel).view(input.sizes()) : none(),
            output_mask[1] ? at::mm(grad.t(), rows) : none(), output_mask[2] ? at::sum(grad, 0) : none()};
  }
  const Tensor grad_input =
      output_mask[0] ? at::empty(input.sizes(), input.options(), at::MemoryFormat::Contiguous) : none();
  const Tensor grad_weight =
      output_mask[1] ? at::empty(weight.sizes(), weight.options(), at::MemoryFormat::Contiguous) : none();
  const Tensor grad_bias = output_mask[2] ? at::empty({s.out_features}, weight.options()) : none();
  const Tensor mask = output.defined() ? output.contiguous() : Tensor();
  cpu::dispatch(input, op, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, BFloat16>) {
      const auto& kernels = cpu::gemm_table<T>();
      const T* g = cpu::data<T>(grad);
      if (mask.defined()) {
        T* masked = static_cast<T*>(cpu::shared_scratch(grad.numel() * sizeof(T)));
        kernels.relu_backward(g, cpu::data<T>(mask), grad.numel(), masked);
        g = masked;
      }
      if (output_mask[0] && s.in_features > 0) {  // grad_input = grad * weight
        cpu::run_gemm(cpu::Gemm<T>{s.rows, s.in_features, s.out_features, g, s.out_features, 1, cpu::data<T>(kernel),
                                   s.in_features, cpu::mutable_data<T>(grad_input), s.in_features, nullptr, false,
                                   false});
      }
      if (output_mask[1] && s.in_features > 0) {  // grad_weight = grad^T * input
        cpu::run_gemm(cpu::Gemm<T>{s.out_features, s.in_features, s.rows, g, 1, s.out_features, cpu::data<T>(rows),
                                   s.in_features, cpu::mutable_data<T>(grad_weight), s.in_features, nullptr, false,
                                   false});
      }
      if (output_mask[2]) kernels.column_sums(g, s.rows, s.out_features, cpu::mutable_data<T>(grad_bias));
    }
  });
  return {grad_input, grad_weight, grad_bias};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                   std::array<bool, 3> output_mask) {
  return linear_backward_cpu("linear_backward", grad_output, Tensor(), input, weight, output_mask);
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(const Tensor& grad_output, const Tensor& output,
                                                        const Tensor& input, const Tensor& weight,
                                                        std::array<bool, 3> output_mask) {
  TORCH_CHECK(output.defined(), "linear_relu_backward: output is undefined");
  return linear_backward_cpu("linear_relu_backward", grad_output, output, input, weight, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_relu", &linear_relu);
  m.impl("linear_backward", &linear_backward);
  m.impl("linear_relu_backward", &linear_relu_backward);
}

}  // namespace lenet_ext
