// relu_avg_pool2d on the CPU: how its kernels run on several threads.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "common/cpu_dispatch.h"
#include "common/parallel.h"
#include "relu_avg_pool2d/host.h"

namespace lenet_ext {
namespace {

using at::Tensor;

// Of both passes. Where vectors have no neighbours to work on, each position of a window is a step of its own.
double work(const AvgPoolShape& s, const Tensor& input) {
  return 10.0 * input.numel() + (s.channels_last ? 0.0 : 10.0 * s.batch * s.channels * s.out_h * s.out_w);
}

struct ReluAvgPoolCpu {
  struct Scope {
    explicit Scope(const Tensor&) {}
    at::AutoDispatchBelowADInplaceOrView below_autograd;
  };

  static void check(const char*, const AvgPoolShape&) {}

  static void forward(const Scope&, const char* op, const AvgPoolShape& s, const Tensor& input, const Tensor& output) {
    cpu::dispatch(input, op, [&](auto zero) {
      using T = decltype(zero);
      const cpu::ReluAvgPool<T> job{s, cpu::data<T>(input), cpu::mutable_data<T>(output)};
      const auto& kernels = cpu::relu_avg_pool_table<T>();
      const int64_t scratch = kernels.scratch_bytes(s);
      cpu::parallel_units(kernels.units(s), work(s, input), [&](int64_t begin, int64_t end) {
        kernels.run(job, cpu::unit_scratch(scratch), begin, end);
      });
    });
  }

  static void backward(const Scope&, const char* op, const AvgPoolShape& s, const Tensor& grad_output,
                       const Tensor& input, const Tensor& grad_input) {
    cpu::dispatch(input, op, [&](auto zero) {
      using T = decltype(zero);
      const cpu::ReluAvgPoolBackward<T> job{s, cpu::data<T>(grad_output), cpu::data<T>(input),
                                            cpu::mutable_data<T>(grad_input)};
      const auto& kernels = cpu::relu_avg_pool_table<T>();
      const int64_t scratch = kernels.backward_scratch_bytes(s);
      cpu::parallel_units(kernels.backward_units(s), work(s, input), [&](int64_t begin, int64_t end) {
        kernels.backward_run(job, cpu::unit_scratch(scratch), begin, end);
      });
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, CPU, m) { ReluAvgPool2dHost<ReluAvgPoolCpu>::register_operators(m); }

}  // namespace lenet_ext
