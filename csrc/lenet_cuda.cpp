// The whole network on CUDA. Compiled only where nvcc is found. For one channel and up to 128 classes the forward pass
// is one launch, in float32 and, where the GPU has tensor cores for them, in float16 and bfloat16; the backward pass of
// all but large batches is two in each of them. Otherwise the layers go one after the other, without the cost of five
// operators and five Functions.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "algorithm.h"
#include "cuda_host.h"
#include "cuda_ops.h"
#include "lenet.h"
#include "precision.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using at::TensorList;

struct Layers {
  Tensor output, pooled1, indices1, pooled2, indices2, hidden1, hidden2;
};

Layers run_layers(const char* op, const Tensor& input, TensorList p, bool training) {
  Layers a;
  const ConvPoolOptions o = lenet_convolution();
  a.pooled1 = conv_relu_max_pool2d_cuda(op, input, p[0], p[1], o, false, training ? &a.indices1 : nullptr);
  a.pooled2 = conv_relu_max_pool2d_cuda(op, a.pooled1, p[2], p[3], o, false, training ? &a.indices2 : nullptr);
  a.hidden1 = linear_cuda(op, a.pooled2.view({input.size(0), 400}), p[4], p[5], true);
  a.hidden2 = linear_cuda(op, a.hidden1, p[6], p[7], true);
  a.output = linear_cuda(op, a.hidden2, p[8], p[9], false);
  return a;
}

// The kernel reads the linear layers' weights 16 bytes at a time.
Tensor contiguous_and_aligned(const Tensor& tensor) {
  const Tensor contiguous = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0 ? contiguous : contiguous.clone();
}

// What `a` has not got is not wanted.
template <typename T>
cuda::LenetForwardOf<T> forward_of(const Tensor& images, const std::vector<Tensor>& p, const Layers& a) {
  auto to = [](const Tensor& tensor) {
    return tensor.defined() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
  };
  auto codes_to = [](const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr<uint8_t>() : nullptr; };
  cuda::LenetForwardOf<T> call{};
  call.batch = images.size(0), call.classes = p[8].size(0);
  call.input = static_cast<const T*>(images.const_data_ptr());
  for (size_t i = 0; i < 10; ++i) call.parameters[i] = static_cast<const T*>(p[i].const_data_ptr());
  call.output = to(a.output);
  call.pooled1 = to(a.pooled1), call.indices1 = codes_to(a.indices1);
  call.pooled2 = to(a.pooled2), call.indices2 = codes_to(a.indices2);
  call.hidden1 = to(a.hidden1), call.hidden2 = to(a.hidden2);
  return call;
}

Layers run(const char* op, const Tensor& input, TensorList parameters, bool training) {
  check_lenet(op, input, parameters);
  const CudaScope scope(input);
  const Tensor images = input.contiguous();
  const int64_t batch = input.size(0), classes = parameters[8].size(0);
  const cuda::DType dtype = cuda_dtype(op, input);
  const bool rounding_allowed =
      dtype != cuda::DType::kFloat32 || (allows_tf32_convolutions() && allows_tf32_products());
  const bool tensor_cores = rounding_allowed && cuda::has_lenet_tensor_core_forward(dtype, input.size(1), classes);
  if (!tensor_cores && !cuda::has_lenet_forward(dtype, input.size(1), classes)) {
    return run_layers(op, images, parameters, training);
  }
  std::vector<Tensor> p;
  for (const Tensor& parameter : parameters) p.push_back(contiguous_and_aligned(parameter));
  const auto options = input.options(), codes = options.dtype(at::kByte);
  Layers a;
  a.output = at::empty({batch, classes}, options);
  if (training) {
    a.pooled1 = at::empty({batch, 6, 14, 14}, options), a.indices1 = at::empty({batch, 6, 14, 14}, codes);
    a.pooled2 = at::empty({batch, 16, 5, 5}, options), a.indices2 = at::empty({batch, 16, 5, 5}, codes);
    a.hidden1 = at::empty({batch, 120}, options), a.hidden2 = at::empty({batch, 84}, options);
  }
  const int cluster = tensor_cores ? 0 : cuda::lenet_cluster_blocks(batch, classes);
  const cuda::LaunchResult result =
      tensor_cores   ? cuda::launch_lenet_tensor_core_forward(dtype, forward_of<void>(images, p, a), scope.stream)
      : cluster != 0 ? cuda::launch_lenet_cluster_forward(forward_of<float>(images, p, a), cluster, scope.stream)
                     : cuda::launch_lenet_forward(forward_of<float>(images, p, a), scope.stream);
  check_launch(op, result, input);
  return a;
}

Tensor lenet(const Tensor& input, TensorList parameters) { return run("lenet", input, parameters, false).output; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lenet_with_activations(const Tensor& input,
                                                                                          TensorList parameters) {
  const Layers a = run("lenet_with_activations", input, parameters, true);
  return {a.output, a.pooled1, a.indices1, a.pooled2, a.indices2, a.hidden1, a.hidden2};
}

using Gradients = std::tuple<Tensor, std::vector<Tensor>>;

Gradients layers_backward(const char* op, const Tensor& grad_output, const Tensor& input, TensorList p, const Layers& a,
                          bool input_gradient) {
  const ConvPoolOptions o = lenet_convolution();
  constexpr std::array<bool, 3> all = {true, true, true};
  auto [grad_hidden2, fc3_weight, fc3_bias] = linear_backward_cuda(op, grad_output, Tensor(), a.hidden2, p[8], all);
  auto [grad_hidden1, fc2_weight, fc2_bias] = linear_backward_cuda(op, grad_hidden2, a.hidden2, a.hidden1, p[6], all);
  const Tensor features = a.pooled2.view({a.pooled2.size(0), 400});
  auto [grad_features, fc1_weight, fc1_bias] = linear_backward_cuda(op, grad_hidden1, a.hidden1, features, p[4], all);
  auto [grad_pooled1, conv2_weight, conv2_bias] = conv_relu_max_pool2d_backward_cuda(
      op, grad_features.view(a.pooled2.sizes()), a.indices2, a.pooled1, p[2].contiguous(), o, all);
  auto [grad_input, conv1_weight, conv1_bias] = conv_relu_max_pool2d_backward_cuda(
      op, grad_pooled1, a.indices1, input, p[0].contiguous(), o, {input_gradient, true, true});
  return {grad_input,
          {conv1_weight, conv1_bias, conv2_weight, conv2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, fc3_weight,
           fc3_bias}};
}

// The cost rule, predicted and not yet measured. Two launches save some ten others and the traffic between them. But
// their linear layers read the weights from L2 for every four images, 60 KB an image, where the layers' GEMMs read them
// once: with some 10 ns an image lost and 20 us won, the layers are ahead from about 2,000 images on. In 16 bits the
// weights are half as large and the GEMMs faster; the bound is the same until somebody measures.
constexpr int64_t kMostImagesOfTwoLaunches = 2048;

bool takes_two_launches(const char* op, const Tensor& input, int64_t classes) {
  const int64_t batch = input.size(0);
  return batch > 0 && cuda::has_lenet_backward(cuda_dtype(op, input), input.size(1), classes) &&
         choose_algorithm(batch <= kMostImagesOfTwoLaunches ? Algorithm::Direct : Algorithm::Vendor) ==
             Algorithm::Direct;
}

Gradients lenet_backward(const Tensor& grad_output, const Tensor& input, TensorList parameters, const Tensor& pooled1,
                         const Tensor& indices1, const Tensor& pooled2, const Tensor& indices2, const Tensor& hidden1,
                         const Tensor& hidden2, bool input_gradient) {
  constexpr const char* op = "lenet_backward";
  check_lenet(op, input, parameters);
  const CudaScope scope(input);
  const auto [grad, activations] = check_lenet_backward(op, grad_output, input, parameters,
                                                        {pooled1, indices1, pooled2, indices2, hidden1, hidden2});
  const int64_t batch = input.size(0), classes = parameters[8].size(0);
  const Layers a{Tensor(),
                 activations[0],
                 activations[1],
                 contiguous_and_aligned(activations[2]),
                 activations[3],
                 contiguous_and_aligned(activations[4]),
                 contiguous_and_aligned(activations[5])};
  if (!takes_two_launches(op, input, classes)) return layers_backward(op, grad, input, parameters, a, input_gradient);

  const Tensor images = input.contiguous();
  std::vector<Tensor> p, gradients;
  cuda::LenetBackwardOf<void> call{};
  for (int i = 0; i < 10; ++i) {
    p.push_back(contiguous_and_aligned(parameters[i]));
    gradients.push_back(at::empty(p[i].sizes(), p[i].options()));
    call.parameters[i] = p[i].const_data_ptr(), call.gradients[i] = gradients[i].mutable_data_ptr();
  }
  call.batch = batch, call.classes = classes;
  call.slice_images = cuda::lenet_backward_slice_images(batch);
  call.grad_output = grad.const_data_ptr(), call.input = images.const_data_ptr();
  call.pooled1 = a.pooled1.const_data_ptr(), call.indices1 = a.indices1.const_data_ptr<uint8_t>();
  call.pooled2 = a.pooled2.const_data_ptr(), call.indices2 = a.indices2.const_data_ptr<uint8_t>();
  call.hidden1 = a.hidden1.const_data_ptr(), call.hidden2 = a.hidden2.const_data_ptr();
  const Tensor grad_pooled1 = input_gradient ? at::empty({batch, 6, 14, 14}, input.options()) : Tensor();
  if (input_gradient) call.grad_pooled1 = grad_pooled1.mutable_data_ptr();
  const int64_t bytes = cuda::lenet_backward_workspace(batch, call.slice_images);
  const Tensor workspace = at::empty({bytes}, input.options().dtype(at::kByte));
  call.workspace = workspace.mutable_data_ptr();
  check_launch(op, cuda::launch_lenet_backward(cuda_dtype(op, input), call, scope.stream), input);
  if (!input_gradient) return {at::empty({0}, input.options()), std::move(gradients)};
  // Training has no use for the gradient of the images; who wants it pays a third launch.
  Tensor grad_input = std::get<0>(conv_relu_max_pool2d_backward_cuda(op, grad_pooled1, a.indices1, input, p[0],
                                                                     lenet_convolution(), {true, false, false}));
  return {std::move(grad_input), std::move(gradients)};
}

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, LENET_EXT_CUDA_KEY, m) {
  m.impl("lenet", &lenet);
  m.impl("lenet_with_activations", &lenet_with_activations);
  m.impl("lenet_backward", &lenet_backward);
}

}  // namespace lenet_ext
