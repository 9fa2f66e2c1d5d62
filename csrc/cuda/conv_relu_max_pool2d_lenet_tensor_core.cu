// conv_relu_max_pool2d for LeNet's two layers on the tensor cores: float16, bfloat16, and float32 by way of TF32. As in
// the whole network, bit by bit. What the next images need is copied asynchronously while these are computed.
//
// Clocks of a multiprocessor for an image, counted in the machine code for sm_90 and by the addresses (one access of
// 128 bytes to shared memory a clock, 0.62 products, four instructions, 2.99 TB/s as an H100 copies), with codes in
// brackets:
//
//                    products   shared memory   instructions   global memory
//   conv1, 16 bits        180             163      156 (258)       330 (418)
//   conv1, TF32           300             391      196 (287)       660 (749)
//   conv2, 16 bits        268             282      117 (182)       237 (267)
//   conv2, TF32           516             552      178 (244)       473 (503)
//
// conv1 waits for global memory: to part the banks of the rows of patches, 73 accesses an image in 16 bits, would gain
// nothing. In conv2 the operands are 200 and 400 of the accesses to shared memory; the others are what arrives and is
// spread. No GPU has run these kernels yet; with windows in the same banks, and without asynchronous copies, an H100
// took 730 clocks for conv2 in bfloat16 (at commit e811d08).
#include "lenet_tensor_core_tiles.cuh"

namespace lenet_ext::cuda {
namespace {

// What is left of a call, from pass to pass: a pass's beginning as a sum of its own, the compiler would add to each
// address.
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

  // Goes on behind so many images.
  template <typename L, bool kCodes>
  LX_DEVICE void skip(int64_t images) {
    batch -= images, input += images * L::kImage, output += images * L::kPooled;
    if constexpr (kCodes) indices += images * L::kPooled;
  }
  // How many of `most` images there are, so many behind.
  LX_DEVICE int present(int most, int64_t behind = 0) const {
    return static_cast<int>(batch - behind < most ? batch - behind : most);
  }
  // The block begins to copy those that there are.
  template <typename L>
  LX_DEVICE void fetch(T* to, int most, int64_t behind) const {
    if (batch > behind) lx::copy_vectors_async(to, input + behind * L::kImage, present(most, behind) * L::kImage);
    lx::end_copy_group();
  }
  template <bool kCodes, typename Pooled>
  LX_DEVICE void store(int at, const Pooled& winner) const {
    output[at] = lx::narrow<T>(winner.pooled());
    if constexpr (kCodes) indices[at] = winner.code();
  }
};

// Images of a pass: so many that 8 warps have full rounds, of 16 patches or 8 windows each, in TF32 16. Two blocks
// share a multiprocessor that has 164 KB.
template <typename T>
constexpr int kConv1Images = Operand<T>::kPerWord == 2 ? 13 : 5;
template <typename T>
constexpr int kConv2Images = 5 * Operand<T>::kPerWord;

template <typename T>
int64_t conv1_shared_bytes(int images) {
  using L = ConvolutionLayout<T>;
  return lx::taken<uint32_t>(2 * images * L::kImageWords) + lx::taken<uint32_t>(L::kMatrix1Words) +
         lx::taken<float>(kBiases1) + lx::taken<int>(2 * images);
}

// block -> `images` images at a time, until the batch is done, while the next ones arrive. Lanes of a warp store 16
// neighbouring values of a channel. Shared memory: 59 KB with 13 images in the 16-bit types, 51 KB with 5 in TF32.
template <typename T, bool kCodes>
__global__ void __launch_bounds__(kTensorCoreThreads, 2) lenet_tensor_core_conv1_kernel(Layer<T> layer, int images) {
  using L = ConvolutionLayout<T>;
  LX_SMEM(shared);
  uint32_t* pixels = lx::take<uint32_t>(shared, 2 * images * L::kImageWords);
  uint32_t* matrix = lx::take<uint32_t>(shared, L::kMatrix1Words);
  float* biases = lx::take<float>(shared, kBiases1);
  int* irregular = lx::take<int>(shared, 2 * images);

  const int64_t stride = int64_t{gridDim.x} * images;
  layer.template skip<Conv1, kCodes>(int64_t{blockIdx.x} * images);
  layer.template fetch<Conv1>(elements<T>(pixels), images, 0);
  prepare_conv1(matrix, biases, layer.weight, layer.bias);
  lx::fill_shared(irregular, images, 0);
  __syncthreads();
  const Conv1Weights<T> weights(matrix, biases);
  int now = 0, other = images;  // where the images of this pass begin, and those of the next
#pragma unroll 1
  for (; layer.batch > 0; layer.template skip<Conv1, kCodes>(stride)) {
    const int present = layer.present(images);
    uint32_t* const in = pixels + now * L::kImageWords;
    lx::wait_for_copies<0>();
    round_pixels<T>(in, present);
    __syncthreads();  // all pixels are there, and the last pass is done with its own
    layer.template fetch<Conv1>(elements<T>(pixels + other * L::kImageWords), images, stride);
    lx::fill_shared(irregular + other, images, 0);
    convolve1<T, kCodes>(in, weights, matrix, biases, present, irregular + now,
                         [&](const Patch& patch, int channel, int right, const auto& winner) {
                           layer.template store<kCodes>(patch.pooled(channel, right), winner);
                         });
    now = other, other = images - other;
  }
}

template <typename T>
int64_t conv2_shared_bytes(int images) {
  using L = ConvolutionLayout<T>;
  return lx::taken<uint32_t>(L::maps_words(images)) + lx::taken<T>(images * Conv2::kImage) +
         lx::taken<uint32_t>(L::kMatrix2Words) + lx::taken<float>(kBiases2);
}

// block -> as in conv1. Shared memory: 64 KB with 10 images in the 16-bit types, 70 KB with 5 in TF32.
template <typename T, bool kCodes, bool kByPixels>
__global__ void __launch_bounds__(kTensorCoreThreads, 2) lenet_tensor_core_conv2_kernel(Layer<T> layer, int images) {
  using L = ConvolutionLayout<T>;
  LX_SMEM(shared);
  uint32_t* maps = lx::take<uint32_t>(shared, L::maps_words(images));
  T* arriving = lx::take<T>(shared, images * Conv2::kImage);
  uint32_t* matrix = lx::take<uint32_t>(shared, L::kMatrix2Words);
  float* biases = lx::take<float>(shared, kBiases2);
  const int planes = images * MapPixels::kImage;

  const int64_t stride = int64_t{gridDim.x} * images;
  layer.template skip<Conv2, kCodes>(int64_t{blockIdx.x} * images);
  layer.template fetch<Conv2>(arriving, images, 0);
  prepare_conv2(matrix, biases, layer.weight, layer.bias);
  __syncthreads();
  const std::conditional_t<kByPixels, Conv2Matrix<T>, Conv2Weights<T>> weights(matrix, biases);
#pragma unroll 1
  for (; layer.batch > 0; layer.template skip<Conv2, kCodes>(stride)) {
    lx::wait_for_copies<0>();
    __syncthreads();  // all copies are there, and the last pass is done with the maps
    const int present = layer.present(images);
    spread_maps(maps, planes, arriving, present);
    __syncthreads();
    layer.template fetch<Conv2>(arriving, images, stride);
    convolve2<T, kCodes>(maps, planes, weights, present, [&](const Window& window, int channel, const auto& winner) {
      layer.template store<kCodes>(window.pooled(channel), winner);
    });
  }
}

template <typename T>
using Kernel = void (*)(Layer<T>, int);

template <typename T, bool kCodes>
Kernel<T> conv2_kernel(int images) {
  if constexpr (Operand<T>::kPerWord == 1) {
    if (images > 1) return lenet_tensor_core_conv2_kernel<T, kCodes, true>;
  }
  return lenet_tensor_core_conv2_kernel<T, kCodes, false>;
}

template <typename T>
LaunchResult forward(const ConvPoolForward& call, cudaStream_t stream) {
  LaunchResult result;
  if (call.shape.batch == 0) return result;
  const bool first = is_layer<Conv1>(call.shape);
  const auto shared_bytes = first ? conv1_shared_bytes<T> : conv2_shared_bytes<T>;
  const int images = images_per_block(call.shape.batch, first ? kConv1Images<T> : kConv2Images<T>, shared_bytes);
  const unsigned grid = blocks_at_once(result, call.shape.batch, images);
  const Kernel<T> with_codes = first ? lenet_tensor_core_conv1_kernel<T, true> : conv2_kernel<T, true>(images);
  const Kernel<T> without = first ? lenet_tensor_core_conv1_kernel<T, false> : conv2_kernel<T, false>(images);
  lx::launch(result, first ? "lenet_tensor_core_conv1_kernel" : "lenet_tensor_core_conv2_kernel",
             call.indices == nullptr ? without : with_codes, grid, kTensorCoreThreads, shared_bytes(images), stream,
             Layer<T>(call), images);
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
