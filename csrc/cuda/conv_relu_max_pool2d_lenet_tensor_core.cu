// conv_relu_max_pool2d for LeNet's two layers on the tensor cores: float16, bfloat16, and float32 by way of TF32. As in
// the whole network, bit by bit.
#include "lenet_tensor_core_tiles.cuh"

namespace lenet_ext::cuda {
namespace {

template <typename T>
struct Layer {
  int64_t batch;
  const T *input, *weight, *bias;  // bias may be null
  T* output;
  uint8_t* indices;

  explicit Layer(const ConvPoolForward& c)
      : batch(c.shape.batch),
        input(static_cast<const T*>(c.input)),
        weight(static_cast<const T*>(c.weight)),
        bias(static_cast<const T*>(c.bias)),
        output(static_cast<T*>(c.output)),
        indices(c.indices) {}

  template <bool kCodes, typename Pooled>
  LX_DEVICE void store(int64_t at, const Pooled& winner) const {
    output[at] = lx::narrow<T>(winner.pooled());
    if constexpr (kCodes) indices[at] = winner.code();
  }
};

template <typename T>
int64_t conv1_shared_bytes(int images) {
  using L = ConvolutionLayout<T>;
  return lx::taken<uint32_t>(images * L::kImageWords) + lx::taken<uint32_t>(L::kMatrix1Words) +
         lx::taken<float>(Conv1::kOut) + lx::taken<int>(images);
}

// block -> `images` images at a time, until the batch is done; passes are counted in 32 bits, for want of registers.
// Lanes of a warp store 16 neighbouring values of a channel. Shared memory: 38 KB with 16 images in the 16-bit types,
// 43 KB with 8 in TF32.
template <typename T, bool kCodes>
__global__ void __launch_bounds__(kTensorCoreThreads, 2) lenet_tensor_core_conv1_kernel(Layer<T> layer, int images) {
  using L = ConvolutionLayout<T>;
  LX_SMEM(shared);
  uint32_t* pixels = lx::take<uint32_t>(shared, images * L::kImageWords);
  uint32_t* matrix = lx::take<uint32_t>(shared, L::kMatrix1Words);
  float* biases = lx::take<float>(shared, Conv1::kOut);
  int* irregular = lx::take<int>(shared, images);
  prepare_conv1(matrix, biases, layer.weight, layer.bias);

#pragma unroll 1
  for (unsigned pass = blockIdx.x; int64_t{pass} * images < layer.batch; pass += gridDim.x) {
    const int64_t first = int64_t{pass} * images;
    const int present = static_cast<int>(layer.batch - first < images ? layer.batch - first : images);
    __syncthreads();  // the last pass is done with the shared memory
    lx::fill_shared(irregular, images, 0);
    __syncthreads();
    load_pixels(pixels, layer.input + first * Conv1::kImage, present, irregular);
    __syncthreads();
    convolve1<T, kCodes>(pixels, matrix, biases, present, irregular,
                         [&](int image, int channel, int y, int x, const auto& winner) {
                           const int at = image * Conv1::kPooled + channel * Conv1::kWindows + y * Conv1::kPool + x;
                           layer.template store<kCodes>(first * Conv1::kPooled + at, winner);
                         });
  }
}

template <typename T>
int64_t conv2_shared_bytes(int images) {
  using L = ConvolutionLayout<T>;
  return lx::taken<uint32_t>(L::maps_words(images)) + lx::taken<uint32_t>(L::kMatrix2Words) +
         lx::taken<float>(Conv2::kOut);
}

// block -> as in conv1. Shared memory: 57 KB with 16 images in the 16-bit types, 63 KB with 8 in TF32.
template <typename T, bool kCodes>
__global__ void __launch_bounds__(kTensorCoreThreads, 2) lenet_tensor_core_conv2_kernel(Layer<T> layer, int images) {
  using L = ConvolutionLayout<T>;
  LX_SMEM(shared);
  uint32_t* maps = lx::take<uint32_t>(shared, L::maps_words(images));
  uint32_t* matrix = lx::take<uint32_t>(shared, L::kMatrix2Words);
  float* biases = lx::take<float>(shared, Conv2::kOut);
  const int planes = images * Conv1::kWindows;
  prepare_conv2(matrix, biases, layer.weight, layer.bias);

#pragma unroll 1
  for (unsigned pass = blockIdx.x; int64_t{pass} * images < layer.batch; pass += gridDim.x) {
    const int64_t first = int64_t{pass} * images;
    const int present = static_cast<int>(layer.batch - first < images ? layer.batch - first : images);
    __syncthreads();  // the last pass is done with the shared memory
    load_maps(maps, planes, layer.input + first * Conv2::kImage, present);
    __syncthreads();
    convolve2<T, kCodes>(maps, planes, matrix, biases, present,
                         [&](int image, int channel, int window, const auto& winner) {
                           const int at = image * Conv2::kPooled + channel * Conv2::kWindows + window;
                           layer.template store<kCodes>(first * Conv2::kPooled + at, winner);
                         });
  }
}

template <typename T>
LaunchResult forward(const ConvPoolForward& call, cudaStream_t stream) {
  LaunchResult result;
  if (call.shape.batch == 0) return result;
  const bool first = is_layer<Conv1>(call.shape);
  const auto shared_bytes = first ? conv1_shared_bytes<T> : conv2_shared_bytes<T>;
  const int images = images_per_block(call.shape.batch, ConvolutionLayout<T>::kImages, shared_bytes);
  const unsigned grid = blocks_at_once(result, call.shape.batch, images);
  lx::launch(result, first ? "lenet_tensor_core_conv1_kernel" : "lenet_tensor_core_conv2_kernel",
             call.indices == nullptr
                 ? first ? lenet_tensor_core_conv1_kernel<T, false> : lenet_tensor_core_conv2_kernel<T, false>
             : first ? lenet_tensor_core_conv1_kernel<T, true>
                     : lenet_tensor_core_conv2_kernel<T, true>,
             grid, kTensorCoreThreads, shared_bytes(images), stream, Layer<T>(call), images);
  return result;
}

template <typename T>
bool supported() {
  return lx::has_tensor_cores(lenet_tensor_core_conv1_kernel<T, true>);
}

}  // namespace

bool has_lenet_tensor_core_layer(DType dtype, const ConvPoolShape& shape) {
  if (!has_lenet_kernels(dtype, shape)) return false;
  LENET_DISPATCH(dtype, supported)
}

LaunchResult launch_lenet_tensor_core_layer(DType dtype, const ConvPoolForward& call, cudaStream_t stream) {
  LENET_DISPATCH(dtype, forward, call, stream)
}

}  // namespace lenet_ext::cuda
