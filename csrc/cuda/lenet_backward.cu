// The gradients of LeNet's parameters in two launches, in float32 arithmetic on the ordinary units: first image by
// image down to conv1, with the convolutions' weight gradients on the way, then the linear layers' weight gradients,
// which are sums over the whole batch. No sum depends on the order of blocks, nor on the GPU, if it has the shared
// memory for four images. What passes from layer to layer and from launch to launch is float32 whatever the storage
// type.
#include "lenet_weight_sums.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = kGradThreads;

// block -> one slice of the batch, `kImages` images at a time; a pass of 2 or 4 costs some 23,000 cycles. Shared
// memory: 90 KB with 4 images, 49 KB with one; two blocks per multiprocessor, or one of an image and 512 threads, whose
// longest warp has 4,100 instructions of sm_90 instead of 6,600 (lenet_step.cu).
template <typename First, typename T, int kImages>
__global__ void __launch_bounds__(kPassThreads<kImages>, First::kIn == 1 && kImages > 1 ? 2 : 1)
    lenet_backward_data_kernel(LenetBackwardOf<T> call, BackwardWorkspace workspace) {
  using P = Pass<First, kImages>;
  LX_SMEM(shared);
  float* const weights2_begin = lx::take<float>(shared, GradInputOfPass<kImages>::kWeightFloats);
  float* pixels = lx::take<float>(shared, kImages * First::kImage);
  float* pooled1 = lx::take<float>(shared, kImages * First::kPooled);  // later its gradient
  float* grad_features = lx::take<float>(shared, kImages * kFeatures);
  float* region = lx::take<float>(shared, P::kRegionFloats);
  const Weights2<kImages> weights2(weights2_begin, call.parameters[2]);

  const int thread = static_cast<int>(threadIdx.x);
  const int classes = static_cast<int>(call.classes);
  const int64_t slice_begin = blockIdx.x * call.slice_images;
  const int64_t slice_end = slice_begin + call.slice_images < call.batch ? slice_begin + call.slice_images : call.batch;
#pragma unroll 1
  for (int64_t first = slice_begin; first < slice_end; first += kImages) {
    const int present = kImages > 1 && slice_end - first < kImages ? static_cast<int>(slice_end - first) : kImages;
    __syncthreads();  // the last pass is done with the shared memory
    for (int i = thread; i < kImages * classes; i += static_cast<int>(kPassThreads<kImages>)) {
      region[i] = i < present * classes ? lx::widen(call.grad_output[first * classes + i]) : 0.0f;
    }
    lx::copy_to_shared(pixels, call.input + first * First::kImage, present * First::kImage);
    lx::copy_to_shared(pooled1, call.pooled1 + first * First::kPooled, present * First::kPooled);
    if constexpr (kImages > 1) __syncthreads();
    linear_backward<kImages>(region, present, classes, call.parameters, KeptRows<T>{}, call.hidden1 + first * kHidden1,
                             call.hidden2 + first * kHidden2, workspace.grad_hidden1 + first * kHidden1,
                             workspace.grad_hidden2 + first * kHidden2, grad_features);
    convolutions_backward<First, kImages>(
        region, pixels, pooled1, grad_features, weights2, call.indices1 + first * First::kPooled,
        call.indices2 + first * Conv2::kPooled, present, first == slice_begin,
        workspace.partials1 + int64_t{blockIdx.x} * kSums1<First>, workspace.partials2 + int64_t{blockIdx.x} * kSums2,
        [&](int at, const float (&values)[4]) {
          if (call.grad_pooled1 == nullptr) return;
          lx::store_narrow(call.grad_pooled1 + first * First::kPooled + at, values);
        });
  }
}

// The gradients of the ten parameters, where they belong.
template <typename T>
struct Gradients {
  T* of[10];
  LX_DEVICE void operator()(int parameter, int64_t at, float value) const { of[parameter][at] = lx::narrow<T>(value); }
};

// Shared memory: 24 KB. The pointers, of which a block's number chooses one, are read where the launch has put them;
// otherwise each thread would have a copy on its stack.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    lenet_backward_weight_kernel(int64_t batch, int64_t slices, WeightSums<T, T> sums,
                                 const __grid_constant__ Gradients<T> gradients) {
  LX_SMEM(shared);
  sums.compute(static_cast<int>(blockIdx.x), batch, slices, shared, gradients);
}

// ---------------------------------------------------------------------------------------------------------- launchers

template <typename T>
LenetBackwardOf<T> typed(const LenetBackwardOf<void>& call) {
  LenetBackwardOf<T> of{};
  of.batch = call.batch, of.in_channels = call.in_channels, of.classes = call.classes;
  of.slice_images = call.slice_images;
  of.grad_output = static_cast<const T*>(call.grad_output), of.input = static_cast<const T*>(call.input);
  of.pooled1 = static_cast<const T*>(call.pooled1), of.indices1 = call.indices1;
  of.pooled2 = static_cast<const T*>(call.pooled2), of.indices2 = call.indices2;
  of.hidden1 = static_cast<const T*>(call.hidden1), of.hidden2 = static_cast<const T*>(call.hidden2);
  for (int i = 0; i < 10; ++i) {
    of.parameters[i] = static_cast<const T*>(call.parameters[i]), of.gradients[i] = static_cast<T*>(call.gradients[i]);
  }
  of.grad_pooled1 = static_cast<T*>(call.grad_pooled1), of.workspace = call.workspace;
  return of;
}

template <typename First, typename T>
LaunchResult backward_of(const LenetBackwardOf<void>& untyped, cudaStream_t stream) {
  LaunchResult result;
  if (untyped.batch == 0) return result;
  const LenetBackwardOf<T> call = typed<T>(untyped);
  const int64_t slices = lx::divide_up(call.batch, call.slice_images);
  const BackwardWorkspace w(call.workspace, call.batch, First::kIn, slices);
  // Of a pass: as many as the slice has and as fit.
  const int images = call.slice_images > 2 && lx::fits_shared_memory(Pass<First, 4>::shared_bytes())   ? 4
                     : call.slice_images > 1 && lx::fits_shared_memory(Pass<First, 2>::shared_bytes()) ? 2
                                                                                                       : 1;
  lx::launch(result, "lenet_backward_data_kernel",
             images == 1   ? lenet_backward_data_kernel<First, T, 1>
             : images == 2 ? lenet_backward_data_kernel<First, T, 2>
                           : lenet_backward_data_kernel<First, T, 4>,
             static_cast<unsigned>(slices), images == 1 ? kPassThreads<1> : kThreads,
             images == 1   ? Pass<First, 1>::shared_bytes()
             : images == 2 ? Pass<First, 2>::shared_bytes()
                           : Pass<First, 4>::shared_bytes(),
             stream, call, w);

  const WeightSums<T, T> sums(w, First::kIn, call.grad_output, static_cast<int>(call.classes), call.pooled2,
                              call.hidden1, call.hidden2);
  Gradients<T> gradients;
  for (int i = 0; i < 10; ++i) gradients.of[i] = call.gradients[i];
  lx::launch(result, "lenet_backward_weight_kernel", lenet_backward_weight_kernel<T>,
             static_cast<unsigned>(sums.blocks()), kThreads, weight_shared_bytes(), stream, call.batch, slices, sums,
             gradients);
  return result;
}

template <typename T>
LaunchResult backward(const LenetBackwardOf<void>& call, cudaStream_t stream) {
  return call.in_channels == 1 ? backward_of<Conv1, T>(call, stream) : backward_of<ColourConv1, T>(call, stream);
}

}  // namespace

bool has_lenet_backward(DType dtype, int64_t channels, int64_t classes) {
  return dtype != DType::kFloat64 && (channels == Conv1::kIn || channels == ColourConv1::kIn) && classes >= 1 &&
         classes <= kMostClasses;
}

int64_t lenet_backward_slice_images(int64_t batch) { return Slices(batch).images; }

int64_t lenet_backward_workspace(int64_t batch, int64_t in_channels, int64_t slice_images) {
  return BackwardWorkspace(nullptr, batch, in_channels, batch == 0 ? 0 : lx::divide_up(batch, slice_images)).bytes;
}

LaunchResult launch_lenet_backward(DType dtype, const LenetBackwardOf<void>& call, cudaStream_t stream) {
  LENET_DISPATCH(dtype, backward, call, stream)
}

}  // namespace lenet_ext::cuda
