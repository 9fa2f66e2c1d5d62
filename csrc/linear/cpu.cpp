// linear and linear_relu on the CPU: which algorithm, and how its kernels run on several threads.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/algorithm.h"
#include "common/cpu_dispatch.h"
#include "common/parallel.h"
#include "linear/host.h"
#include "linear/parallel_gemm.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --8<-- [start:forward]
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
// --8<-- [end:forward]

// The product a * b, [m, k] * [k, n], into `output`; `a` with any strides, the other two contiguous.
template <typename T>
void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b,
             const Tensor& output) {
  if (n == 0) return;
  cpu::run_gemm(
      cpu::Gemm<T>{m, n, k, a, a_row, a_column, b, n, cpu::mutable_data<T>(output), n, nullptr, false, false});
}

struct LinearCpu {
  struct Scope {
    explicit Scope(const Tensor&) {}
    at::AutoDispatchBelowADInplaceOrView below_autograd;
  };

  static Algorithm algorithm(const LinearShape& s, at::ScalarType dtype) {
    return dtype == at::kBFloat16 ? Algorithm::Vendor : linear_algorithm_cpu(s.in_features, s.out_features);
  }

  // There are kernels for float32 and float64.
  template <typename F>
  static void dispatch(const Tensor& tensor, const char* op, F&& f) {
    cpu::dispatch(tensor, op, [&](auto zero) {
      if constexpr (!std::is_same_v<decltype(zero), BFloat16>) f(zero);
    });
  }

  static void forward(const Scope&, const char* op, const LinearShape& s, const Tensor& rows, const Tensor& weight,
                      const Tensor& bias, bool relu, const Tensor& output) {
    dispatch(rows, op, [&](auto zero) {
      using T = decltype(zero);
      forward_direct<T>(s, cpu::data<T>(rows), cpu::data<T>(weight), bias.defined() ? cpu::data<T>(bias) : nullptr,
                        relu, cpu::mutable_data<T>(output));
    });
  }

  static LayerGradients backward(const Scope&, const char* op, const LinearShape& s, const Tensor& grad,
                                 const Tensor& mask, const Tensor& rows, const Tensor& weight, GradientMask wanted) {
    LayerGradients gradients;
    if (wanted[0]) gradients.input = at::empty({s.rows, s.in_features}, grad.options());
    if (wanted[1]) gradients.weight = at::empty({s.out_features, s.in_features}, grad.options());
    if (wanted[2]) gradients.bias = at::empty({s.out_features}, grad.options());
    dispatch(grad, op, [&](auto zero) {
      using T = decltype(zero);
      const auto& kernels = cpu::gemm_table<T>();
      const T* g = cpu::data<T>(grad);
      if (mask.defined()) {
        T* masked = static_cast<T*>(cpu::shared_scratch(grad.numel() * sizeof(T)));
        kernels.relu_backward(g, cpu::data<T>(mask), grad.numel(), masked);
        g = masked;
      }
      const int64_t out = s.out_features, in = s.in_features;
      if (wanted[0]) product<T>(s.rows, in, out, g, out, 1, cpu::data<T>(weight), gradients.input);
      if (wanted[1]) product<T>(out, in, s.rows, g, 1, out, cpu::data<T>(rows), gradients.weight);
      if (wanted[2]) kernels.column_sums(g, s.rows, out, cpu::mutable_data<T>(gradients.bias));
    });
    return gradients;
  }
};

}  // namespace

Tensor linear_cpu(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias, bool relu) {
  return LinearHost<LinearCpu>::forward(op, input, weight, bias, relu);
}

LayerGradients linear_backward_cpu(const char* op, const Tensor& grad_output, const Tensor& output, const Tensor& input,
                                   const Tensor& weight, GradientMask wanted) {
  return LinearHost<LinearCpu>::backward(op, grad_output, output, input, weight, wanted);
}

TORCH_LIBRARY_IMPL(lenet_ext, CPU, m) { LinearHost<LinearCpu>::register_operators(m); }

}  // namespace lenet_ext
