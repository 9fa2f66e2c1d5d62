// The CUDA side of linear and linear_relu: checks, allocation, choice of the algorithm. Compiled only where nvcc is
// found.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "algorithm.h"
#include "cuda_host.h"
#include "cuda_ops.h"
#include "linear.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The cost rule, predicted and not yet measured. With few rows a product is all latency: one launch of ours, which
// adds the bias and applies ReLU (or its mask) on the way, against the vendor's two or three. On the ordinary units in
// every dtype: fetching the weights takes longer than multiplying them, so tensor cores would wait just the same. With
// many rows, nothing beats the vendor's GEMM.
Algorithm linear_algorithm_cuda(const LinearShape& s) {
  const bool small = s.rows <= 64 && s.in_features * s.out_features <= 1 << 20;
  return choose_algorithm(small ? Algorithm::Direct : Algorithm::Vendor);
}

}  // namespace

Tensor linear_cuda(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias, bool relu) {
  const LinearShape s = check_linear(op, input, weight, bias);
  const CudaScope scope(input);
  const cuda::DType dtype = cuda_dtype(op, input);
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.back() = s.out_features;
  if (s.rows == 0 || s.out_features == 0) return at::empty(sizes, input.options());
  const Tensor rows = input.contiguous().view({s.rows, s.in_features});
  if (linear_algorithm_cuda(s) == Algorithm::Vendor) {
    // Not at::_addmm_activation, although its ReLU is free: whether it lets NaN pass is the GEMM library's secret.
    const Tensor output = bias.has_value() ? at::addmm(*bias, rows, weight.t()) : at::mm(rows, weight.t());
    if (relu) output.relu_();
    return output.view(sizes);
  }
  const Tensor output = at::empty(sizes, input.options());
  const Tensor kernel = weight.contiguous(), offset = bias.has_value() ? bias->contiguous() : Tensor();
  cuda::SmallMatrixProduct call{};
  call.rows = s.rows, call.columns = s.out_features, call.depth = s.in_features;
  call.a = rows.const_data_ptr(), call.a_row_stride = s.in_features, call.a_depth_stride = 1;
  call.b = kernel.const_data_ptr(), call.b_row_stride = s.in_features, call.b_depth_stride = 1;
  call.output = output.mutable_data_ptr();
  call.bias = data_or_null(offset);
  call.relu = relu;
  check_launch(op, cuda::launch_small_matrix_product(dtype, call, scope.stream), input);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_cuda(const char* op, const Tensor& grad_output, const Tensor& output,
                                                        const Tensor& input, const Tensor& weight,
                                                        std::array<bool, 3> output_mask) {
  const LinearShape s = check_linear_backward(op, grad_output, output, input, weight);
  const CudaScope scope(input);
  const cuda::DType dtype = cuda_dtype(op, input);
  const Tensor none = at::empty({0}, input.options());
  if (s.rows == 0 || s.out_features == 0) {
    return {output_mask[0] ? at::zeros(input.sizes(), input.options()) : none,
            output_mask[1] ? at::zeros(weight.sizes(), weight.options()) : none,
            output_mask[2] ? at::zeros({s.out_features}, weight.options()) : none};
  }
  Tensor grad = grad_output.contiguous().view({s.rows, s.out_features});
  const Tensor rows = input.contiguous().view({s.rows, s.in_features});
  const Tensor mask = output.defined() ? output.contiguous() : Tensor();
  if (linear_algorithm_cuda(s) == Algorithm::Vendor) {
    if (mask.defined()) grad = at::threshold_backward(grad, mask.view({s.rows, s.out_features}), 0);
    return {output_mask[0] ? at::mm(grad, weight).view(input.sizes()) : none,
            output_mask[1] ? at::mm(grad.t(), rows) : none, output_mask[2] ? at::sum(grad, 0) : none};
  }

  Tensor grad_input = none, grad_weight = none, grad_bias = none;
  if (output_mask[0]) {  // grad_input = grad * weight
    const Tensor kernel = weight.contiguous();
    grad_input = at::empty(input.sizes(), input.options(), at::MemoryFormat::Contiguous);
    cuda::SmallMatrixProduct call{};
    call.rows = s.rows, call.columns = s.in_features, call.depth = s.out_features;
    call.a = grad.const_data_ptr(), call.a_row_stride = s.out_features, call.a_depth_stride = 1;
    call.a_mask = data_or_null(mask);
    call.b = kernel.const_data_ptr(), call.b_row_stride = 1, call.b_depth_stride = s.in_features;
    call.output = grad_input.mutable_data_ptr();
    check_launch(op, cuda::launch_small_matrix_product(dtype, call, scope.stream), input);
  }
  if (output_mask[1] || output_mask[2]) {  // grad_weight = grad^T * input; grad_bias comes along
    cuda::SmallMatrixProduct call{};
    call.rows = s.out_features, call.depth = s.rows;
    // Where only the bias is wanted, a product of one column that nobody looks at.
    call.columns = output_mask[1] && s.in_features > 0 ? s.in_features : 1;
    call.a = grad.const_data_ptr(), call.a_row_stride = 1, call.a_depth_stride = s.out_features;
    call.a_mask = data_or_null(mask);
    const bool product = output_mask[1] && s.in_features > 0;
    call.b = product ? rows.const_data_ptr() : grad.const_data_ptr();
    call.b_row_stride = 1, call.b_depth_stride = product ? s.in_features : s.out_features;
    const Tensor out = at::empty({s.out_features, call.columns}, weight.options());
    if (output_mask[1]) grad_weight = product ? out : at::zeros(weight.sizes(), weight.options());
    call.output = out.mutable_data_ptr();
    if (output_mask[2]) {
      grad_bias = at::empty({s.out_features}, weight.options());
      call.a_row_sums = grad_bias.mutable_data_ptr();
    }
    check_launch(op, cuda::launch_small_matrix_product(dtype, call, scope.stream), input);
  }
  return {grad_input, grad_weight, grad_bias};
}

namespace {

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return linear_cuda("linear", input, weight, bias, false);
}

Tensor linear_relu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return linear_cuda("linear_relu", input, weight, bias, true);
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                   std::array<bool, 3> output_mask) {
  return linear_backward_cuda("linear_backward", grad_output, Tensor(), input, weight, output_mask);
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(const Tensor& grad_output, const Tensor& output,
                                                        const Tensor& input, const Tensor& weight,
                                                        std::array<bool, 3> output_mask) {
  TORCH_CHECK(output.defined(), "linear_relu_backward: output is undefined");
  return linear_backward_cuda("linear_relu_backward", grad_output, output, input, weight, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, LENET_EXT_CUDA_KEY, m) {
  m.impl("linear", &linear);
  m.impl("linear_relu", &linear_relu);
  m.impl("linear_backward", &linear_backward);
  m.impl("linear_relu_backward", &linear_relu_backward);
}

}  // namespace lenet_ext
