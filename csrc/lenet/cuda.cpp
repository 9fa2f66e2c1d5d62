// The whole network on CUDA. Compiled only where nvcc is found. For up to 128 classes there are kernels for the forward
// pass as a whole, in float32 for one channel and for three and, where the GPU has tensor cores for them, in float16
// and bfloat16 for one; the backward pass of all but large batches is two launches in each of them, for one channel and
// for three. Of large batches of one channel, both convolutions have a kernel, the linear layers another, and of the
// gradients those of the convolutions two launches and those of the linear layers three, in float16, bfloat16 and TF32.
// Otherwise the layers go one after the other, without the cost of five operators and five Functions.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "common/algorithm.h"
#include "common/cuda_host.h"
#include "common/precision.h"
#include "lenet/host.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using at::TensorList;

// Whether the kernels of the whole network are taken, where the cost rule says if they are cheaper than others.
bool takes_direct(bool cheaper) {
  return choose_algorithm(cheaper ? Algorithm::Direct : Algorithm::Vendor) == Algorithm::Direct;
}

constexpr LayerOperators kLayers{conv_relu_max_pool2d_cuda, conv_relu_max_pool2d_backward_cuda, linear_cuda,
                                 linear_backward_cuda};

// What `a` has not got is not wanted.
template <typename T>
cuda::LenetForwardOf<T> forward_of(const Tensor& images, const std::vector<Tensor>& p, const LenetLayers& a) {
  auto to = [](const Tensor& tensor) {
    return tensor.defined() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
  };
  auto codes_to = [](const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr<uint8_t>() : nullptr; };
  cuda::LenetForwardOf<T> call{};
  call.batch = images.size(0), call.in_channels = images.size(1), call.classes = p[8].size(0);
  call.input = static_cast<const T*>(images.const_data_ptr());
  for (size_t i = 0; i < 10; ++i) call.parameters[i] = static_cast<const T*>(p[i].const_data_ptr());
  call.output = to(a.output);
  call.pooled1 = to(a.pooled1), call.indices1 = codes_to(a.indices1);
  call.pooled2 = to(a.pooled2), call.indices2 = codes_to(a.indices2);
  call.hidden1 = to(a.hidden1), call.hidden2 = to(a.hidden2);
  return call;
}

// What computes the forward pass.
enum class ForwardPath {
  kLayers,            // one after the other
  kClusters,          // the whole network in one launch in float32 arithmetic, each image by several blocks
  kStrict,            // by one block
  kTensorCores,       // on the tensor cores
  kLean,              // on the tensor cores in two launches, for many images
  kLeanConvolutions,  // both convolutions so in TF32, in one launch; the linear layers in another, or one by one
};

struct ForwardProblem {
  cuda::DType dtype;
  int64_t batch, channels, classes;
  bool training;
  bool tf32_convolutions, tf32_products;  // float32 may be rounded to TF32 in them
};

// The cost rule of the forward pass. Forced to be direct, it is the kernels of the precision asked for, however slow.
//
// Measured on an H100 at commit e811d08, in microseconds of a graph's replay (benchmarks/results), without gradients:
//
//   images                                1      64     256    1024    8192   65536
//   float32, whole network               10      15      27      48     296    2086
//   float32, layers                      24      25      51      76     286    1825
//   TF32, whole network                  42      43      45      57     237    1766
//   TF32, layers                         24      24      31      42     154     952
//   bfloat16, whole network              25      26      27      35     101     765
//   bfloat16, layers                     26      28      25      33     102     643
//
// TF32 is both permissions together, for convolutions and for products; they are not used where strict float32 is
// faster. float16 is taken to be like bfloat16, and a forward pass with gradients like one without: neither was
// measured.
constexpr int64_t kFewestImagesOfLayers = 8192;
// By the same table the lines of strict float32 and of TF32's layers cross between 256 and 1024, at about 550 if they
// are straight.
constexpr int64_t kFewestImagesOfTf32Layers = 512;
constexpr int64_t kFewestImagesOf16BitLayers = 1024;
// By torch's own defaults convolutions alone may be rounded. Predicted, not measured: of TF32's layers the linear ones
// become as slow as in float32, by some 2 us at 1024 images and 16 at 8192, so that the lines cross at about 1024 and
// 4096 images take 100 us in place of 155. Twice that many, because nobody has looked.
constexpr int64_t kFewestImagesOfTf32Convolutions = 2048;
// Predicted, not measured: to prepare the weights twice takes these kernels some 10 us, an image 510 clocks of a
// multiprocessor, by the count of their products (lenet_lean_forward.cu): 20 to 25 us at 1024 images, 150 us at 65536.
// What a backward pass needs costs stores and as many instructions again, which may hide behind the products or not:
// 250 us at 65536 at the worst, and twice as many images to begin with.
constexpr int64_t kFewestImagesOfLean = 1024, kFewestImagesOfLeanTraining = 2048;
// In TF32 the same kernel computes the convolutions where else they would be layers, from kFewestImagesOfTf32Layers on
// with more classes, too. Predicted, not measured: 1,000 clocks of a multiprocessor an image, 1,300 if loads are waited
// for, which is 300 to 390 us for 65536 images, where the layers took 820. Where products may be rounded, too, the
// linear layers are a launch of their own, from where each multiprocessor has a warp's images: predicted 15 us for 4096
// of them and 46 for 65536, 64 with what is kept, where the library's took 21 and 132 (lenet_tf32_linears.cu).
constexpr int64_t kFewestImagesOfTf32Linears = 4096;

ForwardPath forward_path(const ForwardProblem& p) {
  const bool float32 = p.dtype == cuda::DType::kFloat32;
  const bool on_tensor_cores = cuda::has_lenet_tensor_core_forward(p.dtype, p.channels, p.classes);
  const bool tensor_cores = on_tensor_cores && (!float32 || (p.tf32_convolutions && p.tf32_products));
  // Measured in float32: the 10 and 15 us of the table. In 16 bits predicted to take the same.
  const bool clusters = cuda::lenet_cluster_blocks(p.dtype, p.batch, p.channels, p.classes) != 0;
  if (cuda::has_lenet_lean_forward(p.dtype, p.channels, p.classes)) {
    if (!p.training && takes_direct(p.batch >= kFewestImagesOfLean)) return ForwardPath::kLean;
    // Forced to be direct, what is kept is bit by bit that of the layers on the tensor cores, which these are not.
    const bool forced = takes_direct(false);
    if (p.training && !forced && takes_direct(p.batch >= kFewestImagesOfLeanTraining)) return ForwardPath::kLean;
  }
  // In TF32 there is always something faster.
  if (tensor_cores && takes_direct(!float32 && !clusters && p.batch < kFewestImagesOf16BitLayers)) {
    return ForwardPath::kTensorCores;
  }
  if (clusters && takes_direct(true)) return ForwardPath::kClusters;
  const int64_t fewest_images_of_layers = tensor_cores                             ? kFewestImagesOfTf32Layers
                                          : on_tensor_cores && p.tf32_convolutions ? kFewestImagesOfTf32Convolutions
                                                                                   : kFewestImagesOfLayers;
  if (cuda::has_lenet_forward(p.dtype, p.channels, p.classes) && takes_direct(p.batch < fewest_images_of_layers)) {
    return ForwardPath::kStrict;
  }
  if (p.tf32_convolutions && cuda::has_lenet_lean_convolutions(p.dtype, p.channels) &&
      takes_direct(p.batch >= kFewestImagesOfTf32Layers)) {
    return ForwardPath::kLeanConvolutions;
  }
  return ForwardPath::kLayers;
}

// Whether the linear layers behind the convolutions in TF32 are one launch.
bool has_linears_in_one_launch(const ForwardProblem& p) {
  return p.tf32_products && cuda::has_lenet_tf32_linears() && takes_direct(p.batch >= kFewestImagesOfTf32Linears);
}

cuda::LaunchResult launch_forward(ForwardPath path, cuda::DType dtype, const Tensor& images,
                                  const std::vector<Tensor>& p, const LenetLayers& a, cudaStream_t stream) {
  if (path == ForwardPath::kStrict) return cuda::launch_lenet_forward(forward_of<float>(images, p, a), stream);
  const auto call = forward_of<void>(images, p, a);
  if (path == ForwardPath::kLean) {
    Tensor features;
    if (!a.pooled2.defined()) features = at::empty({call.batch, kLenetFeatures}, images.options());
    void* const memory = features.defined() ? features.mutable_data_ptr() : nullptr;
    return cuda::launch_lenet_lean_forward(dtype, call, memory, stream);
  }
  if (path == ForwardPath::kTensorCores) return cuda::launch_lenet_tensor_core_forward(dtype, call, stream);
  const int blocks = cuda::lenet_cluster_blocks(dtype, call.batch, images.size(1), call.classes);
  return cuda::launch_lenet_cluster_forward(dtype, call, blocks, stream);
}

LenetLayers lenet_forward(const char* op, const Tensor& input, TensorList parameters, bool training) {
  const CudaScope scope(input);
  const int64_t batch = input.size(0), classes = parameters[8].size(0);
  const cuda::DType dtype = cuda_dtype(op, input);
  const ForwardProblem problem{
      dtype, batch, input.size(1), classes, training, allows_tf32_convolutions(), allows_tf32_products()};
  const ForwardPath path = forward_path(problem);
  if (path == ForwardPath::kLayers) return lenet_by_layers(kLayers, op, input.contiguous(), parameters, training);

  const bool convolutions = path == ForwardPath::kLeanConvolutions;
  const bool aligned = path == ForwardPath::kLean || convolutions;
  const Tensor images = aligned ? contiguous_and_aligned(input) : input.contiguous();
  std::vector<Tensor> p;
  for (const Tensor& parameter : parameters) p.push_back(contiguous_and_aligned(parameter));
  const auto options = input.options(), codes = options.dtype(at::kByte);
  LenetLayers a;
  if (training) {
    a.pooled1 = at::empty({batch, 6, 14, 14}, options), a.indices1 = at::empty({batch, 6, 14, 14}, codes);
    a.indices2 = at::empty({batch, 16, 5, 5}, codes);
  }
  if (training || convolutions) a.pooled2 = at::empty({batch, 16, 5, 5}, options);
  if (convolutions) {
    check_launch(op, cuda::launch_lenet_lean_convolutions(forward_of<float>(images, p, a), scope.stream), input);
    if (!has_linears_in_one_launch(problem)) {
      lenet_linear_by_layers(kLayers, op, p, a);
      return a;
    }
  }
  a.output = at::empty({batch, classes}, options);
  if (training) a.hidden1 = at::empty({batch, 120}, options), a.hidden2 = at::empty({batch, 84}, options);
  if (convolutions) {
    check_launch(op, cuda::launch_lenet_tf32_linears(forward_of<float>(images, p, a), scope.stream), input);
    return a;
  }
  check_launch(op, launch_forward(path, dtype, images, p, a, scope.stream), input);
  return a;
}

// The cost rule, predicted and not yet measured. Two launches save some ten others and the traffic between them. But
// their linear layers read the weights from L2 for every four images, 60 KB an image, where the layers' GEMMs read them
// once: with some 10 ns an image lost and 20 us won, the layers are ahead from about 2,000 images on. In 16 bits the
// weights are half as large and the GEMMs faster; the bound is the same until somebody measures.
constexpr int64_t kMostImagesOfTwoLaunches = 2048;

// What computes the backward pass.
enum class BackwardPath {
  kLayers,       // one after the other
  kTwoLaunches,  // the whole network, in float32 arithmetic
  kTensorCores,  // on the tensor cores, both convolutions in two launches and the linear layers in three
};

struct BackwardProblem {
  cuda::DType dtype;
  int64_t batch, channels, classes;
  bool input_gradient;
  bool tf32_convolutions, tf32_products;  // as in ForwardProblem
};

// The cost rule for large batches on the tensor cores, predicted and not yet measured: by their counts of accesses to
// shared memory the convolutions take some 1,170 clocks of a multiprocessor an image in 16 bits, 1,400 with a fifth of
// waiting, and in TF32, which is taken where both kinds of layers may be rounded to it, 2,170 and 2,600, where the
// layers' kernels took 12,600 on an H100. For 4096 images that is 26 us, or 48, in place of 230, for which no other
// bound is needed than that of the two launches: below it, what is saved is in doubt, and they stay until somebody
// measures. Training has no use for the gradient of the images; who wants it has the other ways.
BackwardPath backward_path(const BackwardProblem& p) {
  if (p.batch == 0) return BackwardPath::kLayers;
  const bool permitted = p.dtype != cuda::DType::kFloat32 || (p.tf32_convolutions && p.tf32_products);
  if (permitted && !p.input_gradient && cuda::has_lenet_tensor_core_backward(p.dtype, p.channels) &&
      takes_direct(p.batch > kMostImagesOfTwoLaunches)) {
    return BackwardPath::kTensorCores;
  }
  if (cuda::has_lenet_backward(p.dtype, p.channels, p.classes) && takes_direct(p.batch <= kMostImagesOfTwoLaunches)) {
    return BackwardPath::kTwoLaunches;
  }
  return BackwardPath::kLayers;
}

// The linear layers' gradients in three launches, where there are kernels for them. Their cost rule is that of the
// convolutions': predicted, not measured, are 27 us in 16 bits for 4096 images and 96 for 65536, where the vendor's
// products with what lies between took 103 and 350 on an H100, and in TF32 33 and 170 in place of 105 and 500
// (lenet_linear_gradients.cu). `a` is aligned as lenet_backward makes it.
LinearGradients linear_backward_on_tensor_cores(const CudaScope& scope, const char* op, const Tensor& grad_output,
                                                TensorList parameters, const LenetLayers& a) {
  const int64_t batch = grad_output.size(0), classes = grad_output.size(1);
  const cuda::DType dtype = cuda_dtype(op, grad_output);
  if (!cuda::has_lenet_linear_gradients(dtype, classes)) {
    return lenet_linear_backward_by_layers(kLayers, op, grad_output, parameters, a);
  }
  const Tensor grad = grad_output.contiguous();
  const auto options = grad.options();
  cuda::LenetLinearGradientsOf<void> call{};
  LinearGradients gradients;
  LayerGradients* const layers[] = {&gradients.fc1, &gradients.fc2, &gradients.fc3};
  std::vector<Tensor> weights;
  for (int i = 0; i < 3; ++i) {
    weights.push_back(contiguous_and_aligned(parameters[4 + 2 * i]));
    layers[i]->weight = at::empty(parameters[4 + 2 * i].sizes(), options);
    layers[i]->bias = at::empty(parameters[5 + 2 * i].sizes(), options);
    call.weights[i] = weights[i].const_data_ptr();
    call.gradients[2 * i] = layers[i]->weight.mutable_data_ptr();
    call.gradients[2 * i + 1] = layers[i]->bias.mutable_data_ptr();
  }
  gradients.fc1.input = at::empty({batch, kLenetFeatures}, options);
  call.batch = batch, call.classes = classes;
  call.slice_images = cuda::lenet_linear_gradients_slice_images(batch);
  call.grad_output = grad.const_data_ptr(), call.features = a.pooled2.const_data_ptr();
  call.hidden1 = a.hidden1.const_data_ptr(), call.hidden2 = a.hidden2.const_data_ptr();
  call.grad_features = gradients.fc1.input.mutable_data_ptr();
  const int64_t bytes = cuda::lenet_linear_gradients_workspace(dtype, batch, classes, call.slice_images);
  const Tensor workspace = at::empty({bytes}, options.dtype(at::kByte));
  call.workspace = workspace.mutable_data_ptr();
  check_launch(op, cuda::launch_lenet_linear_gradients(dtype, call, scope.stream), grad);
  return gradients;
}

LenetGradients backward_on_tensor_cores(const CudaScope& scope, const char* op, const Tensor& grad_output,
                                        const Tensor& input, TensorList parameters, const LenetLayers& a) {
  auto [fc1, fc2, fc3] = linear_backward_on_tensor_cores(scope, op, grad_output, parameters, a);
  const Tensor images = contiguous_and_aligned(input), weight2 = parameters[2].contiguous();
  const Tensor pooled1 = contiguous_and_aligned(a.pooled1), indices1 = contiguous_and_aligned(a.indices1);
  const Tensor grad_pooled2 = contiguous_and_aligned(fc1.input), indices2 = contiguous_and_aligned(a.indices2);
  LenetGradients gradients;
  cuda::LenetConvolutionsBackwardOf<void> call{};
  for (int i = 0; i < 4; ++i) {
    gradients.parameters.push_back(at::empty(parameters[i].sizes(), input.options()));
    call.gradients[i] = gradients.parameters[i].mutable_data_ptr();
  }
  call.batch = input.size(0), call.slice_images = cuda::lenet_tensor_core_backward_slice_images(call.batch);
  call.input = images.const_data_ptr(), call.weight2 = weight2.const_data_ptr();
  call.pooled1 = pooled1.const_data_ptr(), call.indices1 = indices1.const_data_ptr<uint8_t>();
  call.grad_pooled2 = grad_pooled2.const_data_ptr(), call.indices2 = indices2.const_data_ptr<uint8_t>();
  const int64_t bytes = cuda::lenet_tensor_core_backward_workspace(call.batch, call.slice_images);
  const Tensor workspace = at::empty({bytes}, input.options().dtype(at::kByte));
  call.workspace = workspace.mutable_data_ptr();
  check_launch(op, cuda::launch_lenet_tensor_core_backward(cuda_dtype(op, input), call, scope.stream), input);
  for (LayerGradients* layer : {&fc1, &fc2, &fc3}) {
    gradients.parameters.push_back(std::move(layer->weight)), gradients.parameters.push_back(std::move(layer->bias));
  }
  return gradients;
}

LenetGradients lenet_backward(const char* op, const Tensor& grad_output, const Tensor& input, TensorList parameters,
                              const LenetLayers& layers, bool input_gradient) {
  const CudaScope scope(input);
  const int64_t batch = input.size(0), classes = parameters[8].size(0);
  LenetLayers a = layers;
  a.pooled2 = contiguous_and_aligned(a.pooled2);
  a.hidden1 = contiguous_and_aligned(a.hidden1), a.hidden2 = contiguous_and_aligned(a.hidden2);
  const BackwardPath path = backward_path({cuda_dtype(op, input), batch, input.size(1), classes, input_gradient,
                                           allows_tf32_convolutions(), allows_tf32_products()});
  if (path == BackwardPath::kTensorCores) {
    return backward_on_tensor_cores(scope, op, grad_output, input, parameters, a);
  }
  if (path == BackwardPath::kLayers) {
    return lenet_backward_by_layers(kLayers, op, grad_output, input, parameters, a, input_gradient);
  }

  const Tensor images = input.contiguous();
  std::vector<Tensor> p;
  LenetGradients gradients;
  cuda::LenetBackwardOf<void> call{};
  for (int i = 0; i < 10; ++i) {
    p.push_back(contiguous_and_aligned(parameters[i]));
    gradients.parameters.push_back(at::empty(p[i].sizes(), p[i].options()));
    call.parameters[i] = p[i].const_data_ptr(), call.gradients[i] = gradients.parameters[i].mutable_data_ptr();
  }
  call.batch = batch, call.in_channels = input.size(1), call.classes = classes;
  call.slice_images = cuda::lenet_backward_slice_images(batch);
  call.grad_output = grad_output.const_data_ptr(), call.input = images.const_data_ptr();
  call.pooled1 = a.pooled1.const_data_ptr(), call.indices1 = a.indices1.const_data_ptr<uint8_t>();
  call.pooled2 = a.pooled2.const_data_ptr(), call.indices2 = a.indices2.const_data_ptr<uint8_t>();
  call.hidden1 = a.hidden1.const_data_ptr(), call.hidden2 = a.hidden2.const_data_ptr();
  const Tensor grad_pooled1 = input_gradient ? at::empty({batch, 6, 14, 14}, input.options()) : Tensor();
  if (input_gradient) call.grad_pooled1 = grad_pooled1.mutable_data_ptr();
  const int64_t bytes = cuda::lenet_backward_workspace(batch, input.size(1), call.slice_images);
  const Tensor workspace = at::empty({bytes}, input.options().dtype(at::kByte));
  call.workspace = workspace.mutable_data_ptr();
  check_launch(op, cuda::launch_lenet_backward(cuda_dtype(op, input), call, scope.stream), input);
  if (input_gradient) {
    // Training has no use for the gradient of the images; who wants it pays a third launch.
    gradients.input = conv_relu_max_pool2d_backward_cuda(op, grad_pooled1, a.indices1, Tensor(), p[0], input.sizes(),
                                                         p[0].sizes(), lenet_convolution(), {true, false, false})
                          .input;
  }
  return gradients;
}

// Whether a kernel can change this tensor in place. Weights are read 16 bytes at a time.
bool in_place(const Tensor& tensor) {
  return tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

cuda::UpdateOf update_of(const TrainingStepCall& step, size_t i, bool adam) {
  const int64_t width = adam ? kAdamOptions : kSgdOptions;
  const double* o = step.options.data() + (step.options.size() == static_cast<size_t>(width) ? 0 : i * width);
  const auto data = [](TensorList list, size_t at) {
    return list.empty() ? nullptr : list[at].mutable_data_ptr<float>();
  };
  cuda::UpdateOf u{};
  if (!adam) {
    u.lr = o[0], u.momentum = o[1], u.dampening = o[2], u.weight_decay = o[3];
    u.nesterov = o[4] != 0, u.maximize = o[5] != 0, u.first = o[6] != 0;
    u.momentum_buffer = u.momentum != 0 ? data(step.state.momentum_buffer, i) : nullptr;
    return u;
  }
  u.lr = o[0], u.beta1 = o[1], u.beta2 = o[2], u.eps = o[3], u.weight_decay = o[4], u.maximize = o[5] != 0;
  u.exp_avg = data(step.state.exp_avg, i), u.exp_avg_sq = data(step.state.exp_avg_sq, i);
  u.max_exp_avg_sq = data(step.state.max_exp_avg_sq, i);
  return u;
}

bool has_kernels_of_whole_step(const char* op, const TrainingStepCall& step) {
  bool possible = cuda::has_lenet_step(cuda_dtype(op, step.input), step.input.size(1), step.parameters[8].size(0)) &&
                  takes_direct(step.input.size(0) <= kMostImagesOfTwoLaunches);
  for (const TensorList list : {step.parameters, step.state.momentum_buffer, step.state.exp_avg, step.state.exp_avg_sq,
                                step.state.max_exp_avg_sq}) {
    for (const Tensor& tensor : list) possible = possible && in_place(tensor);
  }
  for (const Tensor& count : step.state.step) possible = possible && count.scalar_type() == at::kFloat;
  return possible;
}

// Two launches: forward pass, loss and gradients of the data; gradients of the weights and update.
std::optional<LossAndCorrect> training_step(const char* op, const TrainingStepCall& step) {
  if (!has_kernels_of_whole_step(op, step)) return std::nullopt;
  const CudaScope scope(step.input);
  const bool adam = step.optimizer != "sgd";
  const Tensor images = step.input.contiguous(), targets = step.targets.contiguous();
  const Tensor weight = step.loss.weight.has_value() ? step.loss.weight->contiguous() : Tensor();
  const LossAndCorrect result{at::empty({}, images.options()), at::empty({}, images.options().dtype(at::kLong))};
  cuda::LenetStep call{};
  call.batch = images.size(0), call.in_channels = images.size(1), call.classes = step.parameters[8].size(0);
  call.slice_images = cuda::lenet_backward_slice_images(call.batch);
  call.input = images.const_data_ptr<float>();
  const bool cross_entropy = step.loss.name == "cross_entropy";
  call.loss.kind = cross_entropy ? cuda::Loss::kCrossEntropy : cuda::Loss::kMeanSquaredError;
  if (cross_entropy) {
    call.loss.classes = targets.const_data_ptr<int64_t>();
  } else {
    call.loss.values = targets.const_data_ptr<float>();
  }
  call.loss.weight = weight.defined() ? weight.const_data_ptr<float>() : nullptr;
  call.loss.label_smoothing = static_cast<float>(step.loss.label_smoothing);
  call.loss.ignore_index = step.loss.ignore_index;
  call.optimizer = !adam                      ? cuda::Optimizer::kSgd
                   : step.optimizer == "adam" ? cuda::Optimizer::kAdam
                                              : cuda::Optimizer::kAdamW;
  for (size_t i = 0; i < 10; ++i) {
    call.parameters[i] = step.parameters[i].mutable_data_ptr<float>();
    call.updates[i] = update_of(step, i, adam);
    if (!adam) continue;
    // torch.optim keeps the number of steps on the CPU, unless its fused kernels are asked for.
    float* const count = step.state.step[i].mutable_data_ptr<float>();
    if (step.state.step[i].device() == images.device()) {
      call.updates[i].step = count;
    } else {
      call.updates[i].steps = *count += 1;
    }
  }
  call.mean_loss = result.loss.mutable_data_ptr<float>();
  call.correct = result.correct.mutable_data_ptr<int64_t>();
  const Tensor workspace =
      at::empty({cuda::lenet_step_workspace(call.batch, call.in_channels, call.classes, call.slice_images)},
                images.options().dtype(at::kByte));
  call.workspace = workspace.mutable_data_ptr();
  check_launch(op, cuda::launch_lenet_step(call, scope.stream), images);
  return result;
}

struct LenetCuda {
  static constexpr auto forward = lenet_forward;
  static constexpr auto backward = lenet_backward;
  static constexpr auto training_step = lenet_ext::training_step;
  static bool update(const TrainingStepCall&, TensorList) { return false; }
};

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, LENET_EXT_CUDA_KEY, m) { LenetHost<LenetCuda>::register_operators(m); }

}  // namespace lenet_ext
