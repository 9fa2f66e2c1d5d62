// relu_avg_pool2d on CUDA: the launches. Compiled only where nvcc is found.
#include <torch/library.h>

#include <limits>

#include "common/cuda_host.h"
#include "relu_avg_pool2d/host.h"

namespace lenet_ext {
namespace {

using at::Tensor;

struct ReluAvgPoolCuda {
  using Scope = CudaScope;

  // The kernels count positions inside a plane in 32 bits.
  static void check(const char* op, const AvgPoolShape& s) {
    constexpr int64_t limit = std::numeric_limits<int32_t>::max();
    const int64_t span_h = s.height + 2 * s.pad_h + s.kernel_h + s.stride_h;
    const int64_t span_w = s.width + 2 * s.pad_w + s.kernel_w + s.stride_w;
    TORCH_CHECK(span_h <= limit && span_w <= limit && span_h * span_w <= limit && s.channels <= limit, op,
                ": input's padded planes must have fewer than 2^31 positions on CUDA, got ", s.height, " x ", s.width,
                " with kernel_size=[", s.kernel_h, ", ", s.kernel_w, "]");
  }

  static void forward(const Scope& scope, const char* op, const AvgPoolShape& s, const Tensor& input,
                      const Tensor& output) {
    const cuda::ReluAvgPool call{s, input.const_data_ptr(), output.mutable_data_ptr()};
    check_launch(op, cuda::launch_relu_avg_pool(cuda_dtype(op, input), call, scope.stream), input);
  }

  static void backward(const Scope& scope, const char* op, const AvgPoolShape& s, const Tensor& grad_output,
                       const Tensor& input, const Tensor& grad_input) {
    const cuda::ReluAvgPoolBackward call{s, grad_output.const_data_ptr(), input.const_data_ptr(),
                                         grad_input.mutable_data_ptr()};
    check_launch(op, cuda::launch_relu_avg_pool_backward(cuda_dtype(op, input), call, scope.stream), input);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, LENET_EXT_CUDA_KEY, m) { ReluAvgPool2dHost<ReluAvgPoolCuda>::register_operators(m); }

}  // namespace lenet_ext
