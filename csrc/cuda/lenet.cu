// LeNet from the image to the logits in one launch, in float32 arithmetic on the ordinary units.
#include "lenet_tiles.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kImages = 10;         // of a pass at most: 98% of the threads have work in conv1 and conv2
constexpr int kRows = kImages / 2;  // images of a thread in a linear layer
constexpr int kColumns = 4;         // outputs of a thread in a linear layer
constexpr int kParts = 4;           // into which the sum over a linear layer's inputs is cut
constexpr int kMostOutputs = kThreads / (2 * kParts) * kColumns;  // 128
constexpr int kFeatures = Conv2::kPooled, kHidden1 = 120, kHidden2 = 84;

static_assert(kFeatures + kHidden1 + kHidden2 <= Conv1::kImage, "they take the place of the pixels");
static_assert(kParts * kMostOutputs <= Conv1::kPooled, "the partial sums take the place of pooled1");

int64_t shared_bytes(int images) {
  return lx::taken<float>(images * Conv1::kImage) + lx::taken<float>(images * Conv1::kPooled) +
         lx::taken<float>(Conv1::kOut * Conv1::kWeights) + lx::taken<float>(Conv1::kOut) +
         lx::taken<float>(Conv2::kOut * Conv2::kWeights) + lx::taken<float>(Conv2::kOut);
}

// The block computes a linear layer for `images` rows of `in` (shared, [images][depth]) and writes the `present` first
// ones to `output` (global, may be null) and, as the next layer's input, to `hidden` (shared), if there is ReLU.
//
// thread -> up to 5 images x 4 outputs and a quarter of the depth: 9 loads of 16 bytes for 80 multiply-adds. The
// weights come straight from L2, 16 bytes of a row at a time; the rest of the sector is in L1 when the next step asks
// for it. The quarters are added in order, through `partial` (shared, [4][images][outputs]).
__device__ __forceinline__ void linear_images(const float* in, int images, int present, int depth,
                                              const float* __restrict__ weight, const float* __restrict__ bias,
                                              int outputs, bool relu, float* partial, float* hidden,
                                              float* __restrict__ output) {
  const int workers = lx::divide_up(outputs, kColumns), worker = static_cast<int>(threadIdx.x) % workers;
  const int first_image = static_cast<int>(threadIdx.x) / workers % 2;
  const int part = static_cast<int>(threadIdx.x) / workers / 2;
  if (part < kParts) {
    const int share = lx::divide_up(depth, 4 * kParts) * 4;
    const int end = (part + 1) * share < depth ? (part + 1) * share : depth;
    const float* rows[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = worker + j * workers;  // neighbouring threads have neighbouring rows of the weight
      rows[j] = weight + (column < outputs ? column : outputs - 1) * depth;
    }
    float sums[kRows][kColumns] = {};
    lx::Pack<float, 4> next[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) next[j] = lx::load_pack<4>(rows[j] + part * share);
#pragma unroll 1
    for (int k = part * share; k < end; k += 4) {
      lx::Pack<float, 4> w[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        w[j] = next[j];
        if (k + 4 < end) next[j] = lx::load_pack<4>(rows[j] + k + 4);  // on their way while these are multiplied
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int image = first_image + 2 * i;
        if (image >= images) break;
        const lx::Pack<float, 4> a = lx::load_pack<4>(in + image * depth + k);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
          for (int step = 0; step < 4; ++step) sums[i][j] += a[step] * w[j][step];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int image = first_image + 2 * i, column = worker + j * workers;
        if (image < images && column < outputs) partial[(part * images + image) * outputs + column] = sums[i][j];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < present * outputs; i += blockDim.x) {
    float value = bias[i % outputs];
    for (int p = 0; p < kParts; ++p) value += partial[p * images * outputs + i];
    if (relu && value <= 0) value = 0;  // NaN passes
    if (relu) hidden[i] = value;
    if (output != nullptr) output[i] = value;
  }
  __syncthreads();
}

// block -> `images` images at a time, until the batch is done; all activations of a pass stay in shared memory, each
// in the place of one that is no longer needed. Shared memory: 98 KB with 10 images, two blocks per multiprocessor.
// The convolutions' weights are in shared memory for the block's life; those of the linear layers are read from L2 in
// each pass, 24 KB an image.
template <ThreadTile kTile>
__global__ void __launch_bounds__(kThreads, 2) lenet_forward_kernel(LenetForward call, int images) {
  LX_SMEM(shared);
  float* pixels = lx::take<float>(shared, images * Conv1::kImage);
  float* pooled1 = lx::take<float>(shared, images * Conv1::kPooled);
  float* weights1 = lx::take<float>(shared, Conv1::kOut * Conv1::kWeights);
  float* biases1 = lx::take<float>(shared, Conv1::kOut);
  float* weights2 = lx::take<float>(shared, Conv2::kOut * Conv2::kWeights);
  float* biases2 = lx::take<float>(shared, Conv2::kOut);
  float *features = pixels, *partial = pooled1;

  transpose_weights<Conv1>(weights1, call.parameters[0]);
  transpose_weights<Conv2>(weights2, call.parameters[2]);
  if (threadIdx.x < Conv1::kOut) biases1[threadIdx.x] = call.parameters[1][threadIdx.x];
  if (threadIdx.x < Conv2::kOut) biases2[threadIdx.x] = call.parameters[3][threadIdx.x];

  const int64_t stride = int64_t{gridDim.x} * images;
  for (int64_t first = int64_t{blockIdx.x} * images; first < call.batch; first += stride) {
    const int present = static_cast<int>(call.batch - first < images ? call.batch - first : images);
    lx::copy_to_shared(pixels, call.input + first * Conv1::kImage, present * Conv1::kImage);
    lx::fill_shared(pixels + present * Conv1::kImage, (images - present) * Conv1::kImage, 0.0f);
    __syncthreads();
    convolve_images<Conv1, kTile>(pixels, weights1, biases1, images, present,
                                  [&](int image, int channel, int window, const Winner<float>& winner) {
                                    const int at = image * Conv1::kPooled + channel * Conv1::kWindows + window;
                                    pooled1[at] = winner.pooled();
                                    if (call.pooled1 == nullptr) return;
                                    call.pooled1[first * Conv1::kPooled + at] = winner.pooled();
                                    call.indices1[first * Conv1::kPooled + at] = winner.code();
                                  });
    __syncthreads();
    convolve_images<Conv2, kTile>(pooled1, weights2, biases2, images, present,
                                  [&](int image, int channel, int window, const Winner<float>& winner) {
                                    const int at = image * Conv2::kPooled + channel * Conv2::kWindows + window;
                                    features[at] = winner.pooled();
                                    if (call.pooled2 == nullptr) return;
                                    call.pooled2[first * Conv2::kPooled + at] = winner.pooled();
                                    call.indices2[first * Conv2::kPooled + at] = winner.code();
                                  });
    __syncthreads();
    // One copy of the code for the three layers: with three, what the compiler prepares for each outside of the loop
    // over the passes does not fit the registers.
    const float* in = features;
#pragma unroll 1
    for (int layer = 0; layer < 3; ++layer) {
      const int depth = layer == 0 ? kFeatures : layer == 1 ? kHidden1 : kHidden2;
      const int outputs = layer == 0 ? kHidden1 : layer == 1 ? kHidden2 : static_cast<int>(call.classes);
      const float* weight = layer == 0 ? call.parameters[4] : layer == 1 ? call.parameters[6] : call.parameters[8];
      const float* bias = layer == 0 ? call.parameters[5] : layer == 1 ? call.parameters[7] : call.parameters[9];
      float* result = layer == 0 ? call.hidden1 : layer == 1 ? call.hidden2 : call.output;
      float* hidden = features + images * (layer == 0 ? kFeatures : kFeatures + kHidden1);
      linear_images(in, images, present, depth, weight, bias, outputs, layer < 2, partial, hidden,
                    result == nullptr ? nullptr : result + first * outputs);
      in = hidden;
    }
  }
}

}  // namespace

bool has_lenet_forward(DType dtype, int64_t channels, int64_t classes) {
  return dtype == DType::kFloat32 && channels == Conv1::kIn && classes >= 1 && classes <= kMostOutputs;
}

LaunchResult launch_lenet_forward(const LenetForward& call, cudaStream_t stream) {
  LaunchResult result;
  if (call.batch == 0) return result;
  const int images = images_per_block(call.batch, kImages, shared_bytes);
  // Blocks that stay need the convolutions' weights once. How many there are does not change any result.
  int device = 0, multiprocessors = 0;
  result.error = cudaGetDevice(&device);
  if (result.error == cudaSuccess) {
    result.error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const unsigned grid = std::min(lx::grid_for(call.batch, images), static_cast<unsigned>(2 * multiprocessors));
  const ThreadTile tile = tile_for(images);
  lx::launch(result, "lenet_forward_kernel",
             tile == ThreadTile::kSingle ? lenet_forward_kernel<ThreadTile::kSingle>
             : tile == ThreadTile::kPair ? lenet_forward_kernel<ThreadTile::kPair>
                                         : lenet_forward_kernel<ThreadTile::kLarge>,
             grid, kThreads, shared_bytes(images), stream, call, images);
  return result;
}

}  // namespace lenet_ext::cuda
