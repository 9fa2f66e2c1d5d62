// The host side of the CUDA operators, and with it their kernels, for CPU tensors: built by tests/cuda_on_cpu/build.py
// against the stand-in for CUDA beside this file, and registered as torch.ops.lenet_ext_cuda_on_cpu.* (the build
// defines lenet_ext to be that name). One file, because torch's headers take most of the time.
#include "common/checks.cpp"
#include "conv_relu_max_pool2d/cuda.cpp"
#include "conv_relu_max_pool2d/shape.cpp"
#include "lenet/cuda.cpp"
#include "lenet/layers.cpp"
#include "lenet/loss.cpp"
#include "lenet/optimizer.cpp"
#include "lenet/shape.cpp"
#include "linear/cuda.cpp"
#include "linear/shape.cpp"
#include "relu_avg_pool2d/cuda.cpp"
#include "relu_avg_pool2d/shape.cpp"

namespace {
int forced_algorithm = -1;
}

namespace lenet_ext {
// In place of csrc/common/algorithm.cpp, which reads the environment once: here each test chooses.
Algorithm choose_algorithm(Algorithm preferred) {
  return forced_algorithm < 0 ? preferred : forced_algorithm == 0 ? Algorithm::Direct : Algorithm::Vendor;
}
}  // namespace lenet_ext

// For ctypes. algorithm: -1 by the cost rule, 0 direct, 1 vendor. schedule: 0 forward, 1 reverse, 2 shuffled.
extern "C" void cuda_on_cpu_configure(int algorithm, int schedule, unsigned seed) {
  forced_algorithm = algorithm;
  lx_shim::state().schedule = static_cast<lx_shim::Schedule>(schedule);
  lx_shim::state().seed = seed;
}
// Of the GPU that stands there: 90 at first.
extern "C" void cuda_on_cpu_set_capability(int capability) { lx_shim::state().compute_capability = capability; }
// That a block of its can have: 227 KB at first.
extern "C" void cuda_on_cpu_set_shared_memory(int64_t bytes) {
  lx_shim::state().most_shared_bytes = static_cast<size_t>(bytes);
  lx_shim::state().shared_limit.clear();
}
// What lenet/cuda.cpp chooses for the forward pass of one channel and ten classes: 0 layers, 1 clusters, 2 strict,
// 3 tensor cores, 4 lean, 5 lean convolutions.
extern "C" int cuda_on_cpu_lenet_forward_path(bool bfloat16, bool tf32_convolutions, bool tf32_products, bool training,
                                              int64_t batch) {
  using namespace lenet_ext;
  const auto dtype = bfloat16 ? cuda::DType::kBFloat16 : cuda::DType::kFloat32;
  return static_cast<int>(forward_path({dtype, batch, 1, 10, training, tf32_convolutions, tf32_products}));
}
// And for the backward pass: 0 layers, 1 two launches, 2 the convolutions on tensor cores.
extern "C" int cuda_on_cpu_lenet_backward_path(bool bfloat16, bool tf32_convolutions, bool tf32_products,
                                               bool input_gradient, int64_t batch) {
  using namespace lenet_ext;
  const auto dtype = bfloat16 ? cuda::DType::kBFloat16 : cuda::DType::kFloat32;
  return static_cast<int>(backward_path({dtype, batch, 1, 10, input_gradient, tf32_convolutions, tf32_products}));
}
// Both convolutions in TF32, which the cost rule has for more images than a test has time for. parameters: weight and
// bias of conv1 and conv2. pooled1 and indices may be null. The error.
extern "C" int cuda_on_cpu_lean_convolutions(int64_t batch, const float* input, const float* const* parameters,
                                             float* pooled1, uint8_t* indices1, float* pooled2, uint8_t* indices2) {
  using namespace lenet_ext;
  cuda::LenetForward call{};
  call.batch = batch, call.in_channels = 1, call.classes = 10, call.input = input;
  for (int i = 0; i < 4; ++i) call.parameters[i] = parameters[i];
  call.pooled1 = pooled1, call.indices1 = indices1, call.pooled2 = pooled2, call.indices2 = indices2;
  return static_cast<int>(cuda::launch_lenet_lean_convolutions(call, {}).error);
}
// The linear layers in TF32, likewise. parameters: of all layers; hidden1 and hidden2 may be null.
extern "C" int cuda_on_cpu_tf32_linears(int64_t batch, int64_t classes, float* pooled2, const float* const* parameters,
                                        float* hidden1, float* hidden2, float* output) {
  using namespace lenet_ext;
  cuda::LenetForward call{};
  call.batch = batch, call.in_channels = 1, call.classes = classes, call.pooled2 = pooled2;
  for (int i = 0; i < 10; ++i) call.parameters[i] = parameters[i];
  call.hidden1 = hidden1, call.hidden2 = hidden2, call.output = output;
  return static_cast<int>(cuda::launch_lenet_tf32_linears(call, {}).error);
}
// Whether the cost rule takes them, behind the convolutions.
extern "C" bool cuda_on_cpu_has_linears_in_one_launch(bool tf32_products, int64_t batch) {
  using namespace lenet_ext;
  return has_linears_in_one_launch({cuda::DType::kFloat32, batch, 1, 10, false, true, tf32_products});
}
extern "C" int64_t cuda_on_cpu_launches() { return lx_shim::state().launches; }
