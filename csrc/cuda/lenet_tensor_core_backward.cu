// The gradients of both convolutions of LeNet for large batches on the tensor cores, in float16, bfloat16 and float32
// by way of TF32, in two launches, from the gradient of the second one's pooled output: first slice by slice of the
// batch, then the sums over the slices. Sums are accumulated in float32, and their order depends on the batch alone.
// The gradient between the convolutions is rounded as operands are; to the storage type it is where the layers pass it
// through memory, too.
//
// Counted: in 16 bits an image is 600 products, 970 clocks of a multiprocessor if it begins 0.62 of them a clock, as
// others have measured on an H100, and 1,170 accesses of 128 bytes to shared memory, one a clock, by the addresses of a
// warp's lanes: four for each load of four matrices, more where rows come from the same banks. The strict kernels of
// the layers took 12,600 clocks (measured, in float32 as well). In TF32 it is 1,200 products of half the depth, 1,930
// clocks so, and 2,170 accesses, of which 620 are for conv2's weights, 510 for its input, 360 for conv1's weights, and
// the others make operands. No GPU has run these kernels yet.
#include "lenet_tensor_core_gradients.cuh"
#include "lenet_weight_sums.cuh"

namespace lenet_ext::cuda {
namespace {

// block -> one slice of the batch, two images at a time, in TF32 one, while what the next ones need arrives. Shared
// memory: 82 KB, in TF32 80 KB, two blocks a multiprocessor.
template <typename T>
__global__ void __launch_bounds__(kGradientThreads, 2)
    lenet_tensor_core_backward_kernel(LenetConvolutionsBackwardOf<T> call, float* __restrict__ partials1,
                                      float* __restrict__ partials2) {
  using Pass = GradientPass<T, GradientsOf::kBoth>;
  LX_SMEM(shared);
  const Pass pass(shared);
  pass.prepare();
  const PooledGradient<Pass> pooled_gradient(call.weight2);
  Conv2WeightSums<Pass> sums2;
  Conv1WeightSums<Pass> sums1;
  each_pass<Pass>(
      call.batch, call.slice_images,
      [&](int64_t first, int present) {
        const GradientImages<const T, const uint8_t> images{call.input + first * Conv1::kImage,
                                                            call.pooled1 + first * Conv1::kPooled,
                                                            nullptr,
                                                            call.grad_pooled2 + first * Conv2::kPooled,
                                                            call.indices1 + first * Conv1::kPooled,
                                                            call.indices2 + first * Conv2::kPooled};
        pass.fetch(images, present);
      },
      [&](int present) {
        load_pixels(pass, present);
        load_pooled(pass, present);
        load_gradients(pass, present);
      },
      [&](int64_t, int) {
        sums2.add(pass);
        pooled_gradient.compute(pass, ToWinners<Pass>{pass});
        __syncthreads();
        sums1.add(pass);
      });
  static_assert(Conv1WeightSums<Pass>::kBandFloats * 4 <= Pass::kGridBytes);
  float* const partial1 = partials1 + int64_t{blockIdx.x} * kSums1<Conv1>;
  float* const partial2 = partials2 + int64_t{blockIdx.x} * kSums2;
  sums2.finish([&](int at, float sum) { partial2[at] = sum; });
  sums1.finish(reinterpret_cast<float*>(pass.grid), [&](int at, float sum) { partial1[at] = sum; });
}

// The gradients of the convolutions' four parameters, where they belong.
template <typename T>
struct ConvolutionGradients {
  T* of[4];
  LX_DEVICE void operator()(int parameter, int64_t at, float value) const { of[parameter][at] = lx::narrow<T>(value); }
};

// block -> 32 sums of one of the convolutions. Shared memory: a sum for each thread. What a block's number chooses from
// is read where the launch has put it.
template <typename T>
__global__ void __launch_bounds__(kGradThreads)
    lenet_convolution_sums_kernel(const __grid_constant__ ConvolutionSums conv2,
                                  const __grid_constant__ ConvolutionSums conv1, int64_t slices,
                                  const __grid_constant__ ConvolutionGradients<T> gradients) {
  LX_SMEM(shared);
  const int block = static_cast<int>(blockIdx.x), of_conv2 = conv2.blocks();
  const bool second = block < of_conv2;
  convolution_sums(second ? conv2 : conv1, slices, second ? block : block - of_conv2, shared, gradients);
}

struct PartialSums {
  float *conv1, *conv2;  // [slices, 156] and [slices, 2416]
  int64_t bytes;

  PartialSums(void* begin, int64_t slices) {
    bytes = lx::taken<float>(slices * kSums1<Conv1>);
    conv1 = static_cast<float*>(begin);
    conv2 = begin == nullptr ? nullptr : reinterpret_cast<float*>(static_cast<unsigned char*>(begin) + bytes);
    bytes += lx::taken<float>(slices * kSums2);
  }
};

template <typename T>
LaunchResult backward(const LenetConvolutionsBackwardOf<void>& call, cudaStream_t stream) {
  LaunchResult result;
  if (call.batch == 0) return result;
  const int64_t slices = lx::divide_up(call.batch, call.slice_images);
  const PartialSums partials(call.workspace, slices);
  LenetConvolutionsBackwardOf<T> of{};
  of.batch = call.batch, of.slice_images = call.slice_images;
  of.input = static_cast<const T*>(call.input), of.weight2 = static_cast<const T*>(call.weight2);
  of.pooled1 = static_cast<const T*>(call.pooled1), of.indices1 = call.indices1;
  of.grad_pooled2 = static_cast<const T*>(call.grad_pooled2), of.indices2 = call.indices2;
  ConvolutionGradients<T> gradients;
  for (int i = 0; i < 4; ++i) gradients.of[i] = static_cast<T*>(call.gradients[i]);
  lx::launch(result, "lenet_tensor_core_backward_kernel", lenet_tensor_core_backward_kernel<T>,
             static_cast<unsigned>(slices), kGradientThreads, GradientPass<T, GradientsOf::kBoth>::shared_bytes(),
             stream, of, partials.conv1, partials.conv2);
  const ConvolutionSums conv2{partials.conv2, kSums2, Conv2::kWeights, 2};
  const ConvolutionSums conv1{partials.conv1, kSums1<Conv1>, Conv1::kWeights, 0};
  lx::launch(result, "lenet_convolution_sums_kernel", lenet_convolution_sums_kernel<T>,
             static_cast<unsigned>(conv2.blocks() + conv1.blocks()), kGradThreads, lx::taken<float>(kGradThreads),
             stream, conv2, conv1, slices, gradients);
  return result;
}

template <typename T>
bool supported() {
  return lx::has_tensor_cores(lenet_tensor_core_backward_kernel<T>) &&
         lx::fits_shared_memory(GradientPass<T, GradientsOf::kBoth>::shared_bytes());
}

}  // namespace

bool has_lenet_tensor_core_backward(DType dtype, int64_t channels) {
  if (dtype == DType::kFloat64 || channels != Conv1::kIn) return false;
  LENET_DISPATCH(dtype, supported)
}

int64_t lenet_tensor_core_backward_slice_images(int64_t batch) { return lx::divide_up(batch, 2 * kMostSlices) * 2; }

int64_t lenet_tensor_core_backward_workspace(int64_t batch, int64_t slice_images) {
  return PartialSums(nullptr, batch == 0 ? 0 : lx::divide_up(batch, slice_images)).bytes;
}

LaunchResult launch_lenet_tensor_core_backward(DType dtype, const LenetConvolutionsBackwardOf<void>& call,
                                               cudaStream_t stream) {
  LENET_DISPATCH(dtype, backward, call, stream)
}

}  // namespace lenet_ext::cuda
