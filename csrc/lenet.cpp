// The whole network in one call on the CPU: for inference all layers on one block of images after the other, for
// training the layers' own kernels without the cost of five operators and five Functions.
#include "lenet.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using at::TensorList;

// 833 kFLOP an image.
constexpr double kImageFlops = 833e3;

struct Layers {
  Tensor output, pooled1, indices1, pooled2, indices2, hidden1, hidden2;
};

Layers run_layers(const char* op, const Tensor& input, TensorList p, bool training) {
  Layers a;
  a.pooled1 =
      conv_relu_max_pool2d_cpu(op, input, p[0], p[1], lenet_convolution(), false, training ? &a.indices1 : nullptr);
  a.pooled2 =
      conv_relu_max_pool2d_cpu(op, a.pooled1, p[2], p[3], lenet_convolution(), false, training ? &a.indices2 : nullptr);
  a.hidden1 = linear_cpu(op, a.pooled2.view({input.size(0), 400}), p[4], p[5], true);
  a.hidden2 = linear_cpu(op, a.hidden1, p[6], p[7], true);
  a.output = linear_cpu(op, a.hidden2, p[8], p[9], false);
  return a;
}

Tensor lenet(const Tensor& input, TensorList parameters) {
  constexpr const char* op = "lenet";
  check_lenet(op, input, parameters);
  const auto& kernels = LENET_EXT_CPU_DISPATCH(lenet_kernels);
  const int64_t batch = input.size(0);
  // Below some 5 of 8 full lanes, one image at a time is quicker.
  if (input.scalar_type() != at::kFloat || input.size(1) != 1 || 8 * batch < 5 * kernels.lanes) {
    return run_layers(op, input.contiguous(), parameters, false).output;
  }
  const Tensor images = input.stride(3) == 1 && input.stride(2) == 32 ? input : input.contiguous();
  std::vector<Tensor> p;
  for (const Tensor& parameter : parameters) p.push_back(parameter.contiguous());
  const Tensor output = at::empty({batch, p[8].size(0)}, input.options());
  auto at = [&](int i) { return cpu::data<float>(p[i]); };
  const cpu::LenetInference job{batch,
                                output.size(1),
                                cpu::data<float>(images),
                                images.stride(0),
                                at(0),
                                at(1),
                                at(2),
                                at(3),
                                at(4),
                                at(5),
                                at(6),
                                at(7),
                                at(8),
                                at(9),
                                cpu::mutable_data<float>(output)};
  cpu::parallel_units(
      (batch + kernels.lanes - 1) / kernels.lanes, kImageFlops * batch,
      [&](int64_t begin, int64_t end) { kernels.run(job, cpu::unit_scratch(kernels.scratch_bytes), begin, end); });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lenet_with_activations(const Tensor& input,
                                                                                          TensorList parameters) {
  constexpr const char* op = "lenet_with_activations";
  check_lenet(op, input, parameters);
  const Layers a = run_layers(op, input.contiguous(), parameters, true);
  return {a.output, a.pooled1, a.indices1, a.pooled2, a.indices2, a.hidden1, a.hidden2};
}

std::tuple<Tensor, std::vector<Tensor>> lenet_backward(const Tensor& grad_output, const Tensor& input,
                                                       TensorList parameters, const Tensor& pooled1,
                                                       const Tensor& indices1, const Tensor& pooled2,
                                                       const Tensor& indices2, const Tensor& hidden1,
                                                       const Tensor& hidden2, bool input_gradient) {
  constexpr const char* op = "lenet_backward";
  check_lenet(op, input, parameters);
  const TensorList p = parameters;
  constexpr std::array<bool, 3> all = {true, true, true};
  auto [grad_hidden2, fc3_weight, fc3_bias] = linear_backward_cpu(op, grad_output, Tensor(), hidden2, p[8], all);
  auto [grad_hidden1, fc2_weight, fc2_bias] = linear_backward_cpu(op, grad_hidden2, hidden2, hidden1, p[6], all);
  const Tensor features = pooled2.view({pooled2.size(0), 400});
  auto [grad_features, fc1_weight, fc1_bias] = linear_backward_cpu(op, grad_hidden1, hidden1, features, p[4], all);
  auto [grad_pooled1, conv2_weight, conv2_bias] = conv_relu_max_pool2d_backward_cpu(
      op, grad_features.view(pooled2.sizes()), indices2, pooled1, p[2], lenet_convolution(), all);
  auto [grad_input, conv1_weight, conv1_bias] = conv_relu_max_pool2d_backward_cpu(
      op, grad_pooled1, indices1, input, p[0], lenet_convolution(), {input_gradient, true, true});
  return {grad_input,
          {conv1_weight, conv1_bias, conv2_weight, conv2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, fc3_weight,
           fc3_bias}};
}

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, CPU, m) {
  m.impl("lenet", &lenet);
  m.impl("lenet_with_activations", &lenet_with_activations);
  m.impl("lenet_backward", &lenet_backward);
}

}  // namespace lenet_ext
