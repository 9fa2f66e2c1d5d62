// linear and linear_relu on CUDA: which algorithm, and the launches. Compiled only where nvcc is found.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/algorithm.h"
#include "common/cuda_host.h"
#include "linear/host.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct LinearCuda {
  using Scope = CudaScope;

  // The cost rule. With few rows a product is all latency: one launch of ours, which adds the bias and applies ReLU (or
  // its mask) on the way, against the vendor's two or three. On the ordinary units in every dtype. With many rows,
  // nothing beats the vendor's GEMM. Measured on an H100 at commit e811d08, microseconds of 64 rows, ours and stock's:
  // 400 -> 120 in float32 7.7 and 11.9, in TF32 7.3 and 8.9, in bfloat16 10.4 and 5.6; 120 -> 84 in float32 4.2 and
  // 17.5, in TF32 4.2 and 6.7, in bfloat16 5.0 and 5.8. So in 16 bits ours is for short sums alone; where between them
  // the bound lies, and what fewer rows take, nobody has measured.
  static Algorithm algorithm(const LinearShape& s, at::ScalarType dtype) {
    const bool sixteen_bits = dtype == at::kHalf || dtype == at::kBFloat16;
    const bool small = s.rows <= 64 && s.in_features * s.out_features <= 1 << 20;
    const bool cheaper = small && (!sixteen_bits || s.in_features <= 128);
    return choose_algorithm(cheaper ? Algorithm::Direct : Algorithm::Vendor);
  }

  // --8<-- [start:forward]
  static void forward(const Scope& scope, const char* op, const LinearShape& s, const Tensor& rows,
                      const Tensor& weight, const Tensor& bias, bool relu, const Tensor& output) {
    cuda::SmallMatrixProduct call{};
    call.rows = s.rows, call.columns = s.out_features, call.depth = s.in_features;
    call.a = rows.const_data_ptr(), call.a_row_stride = s.in_features, call.a_depth_stride = 1;
    call.b = weight.const_data_ptr(), call.b_row_stride = s.in_features, call.b_depth_stride = 1;
    call.output = output.mutable_data_ptr();
    call.bias = data_or_null(bias);
    call.relu = relu;
    launch(scope, op, call, rows);
  }
  // --8<-- [end:forward]

  static LayerGradients backward(const Scope& scope, const char* op, const LinearShape& s, const Tensor& grad,
                                 const Tensor& mask, const Tensor& rows, const Tensor& weight, GradientMask wanted) {
    LayerGradients gradients;
    if (wanted[0]) {  // grad * weight
      gradients.input = at::empty({s.rows, s.in_features}, grad.options());
      cuda::SmallMatrixProduct call{};
      call.rows = s.rows, call.columns = s.in_features, call.depth = s.out_features;
      call.a = grad.const_data_ptr(), call.a_row_stride = s.out_features, call.a_depth_stride = 1;
      call.a_mask = data_or_null(mask);
      call.b = weight.const_data_ptr(), call.b_row_stride = 1, call.b_depth_stride = s.in_features;
      call.output = gradients.input.mutable_data_ptr();
      launch(scope, op, call, grad);
    }
    if (wanted[1] || wanted[2]) {  // grad^T * rows; the bias gradient comes along
      cuda::SmallMatrixProduct call{};
      call.rows = s.out_features, call.depth = s.rows;
      // Where only the bias is wanted, a product of one column that nobody looks at.
      const bool product = wanted[1] && s.in_features > 0;
      call.columns = product ? s.in_features : 1;
      call.a = grad.const_data_ptr(), call.a_row_stride = 1, call.a_depth_stride = s.out_features;
      call.a_mask = data_or_null(mask);
      call.b = product ? rows.const_data_ptr() : grad.const_data_ptr();
      call.b_row_stride = 1, call.b_depth_stride = product ? s.in_features : s.out_features;
      const Tensor out = at::empty({s.out_features, call.columns}, grad.options());
      if (wanted[1]) gradients.weight = product ? out : at::zeros({s.out_features, s.in_features}, grad.options());
      call.output = out.mutable_data_ptr();
      if (wanted[2]) {
        gradients.bias = at::empty({s.out_features}, grad.options());
        call.a_row_sums = gradients.bias.mutable_data_ptr();
      }
      launch(scope, op, call, grad);
    }
    return gradients;
  }

 private:
  static void launch(const Scope& scope, const char* op, const cuda::SmallMatrixProduct& call, const Tensor& tensor) {
    check_launch(op, cuda::launch_small_matrix_product(cuda_dtype(op, tensor), call, scope.stream), tensor);
  }
};

}  // namespace

Tensor linear_cuda(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias, bool relu) {
  return LinearHost<LinearCuda>::forward(op, input, weight, bias, relu);
}

LayerGradients linear_backward_cuda(const char* op, const Tensor& grad_output, const Tensor& output,
                                    const Tensor& input, const Tensor& weight, GradientMask wanted) {
  return LinearHost<LinearCuda>::backward(op, grad_output, output, input, weight, wanted);
}

TORCH_LIBRARY_IMPL(lenet_ext, LENET_EXT_CUDA_KEY, m) { LinearHost<LinearCuda>::register_operators(m); }

}  // namespace lenet_ext
