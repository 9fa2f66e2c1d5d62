// LeNet from the image to the logits in one launch, in float32 arithmetic on the ordinary units.
#include "lenet_linear_tiles.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = kLinearThreads;
constexpr int kImages = 10;  // of a pass at most: 98% of the threads have work in conv1 and conv2

static_assert(kFeatures + kHidden1 + kHidden2 <= Conv1::kImage, "they take the place of the pixels");
static_assert(kLinearParts * kMostOutputs <= Conv1::kPooled, "the partial sums take the place of pooled1");

template <typename First>
int64_t shared_bytes(int images) {
  return lx::taken<float>(images * First::kImage) + lx::taken<float>(images * First::kPooled) +
         lx::taken<float>(First::kOut * First::kWeights) + lx::taken<float>(First::kOut) +
         lx::taken<float>(Conv2::kOut * Conv2::kWeights) + lx::taken<float>(Conv2::kOut);
}

// block -> `images` images at a time, until the batch is done; all activations of a pass stay in shared memory, each
// in the place of one that is no longer needed. Shared memory: 98 KB with 10 images of one channel, two blocks per
// multiprocessor. The convolutions' weights are in shared memory for the block's life; those of the linear layers are
// read from L2 in each pass, 24 KB an image. Without kMayKeep nothing is kept for a backward pass.
template <typename First, ThreadTile kTile, bool kMayKeep>
__global__ void __launch_bounds__(kThreads, 2) lenet_forward_kernel(LenetForward call, int images) {
  LX_SMEM(shared);
  float* pixels = lx::take<float>(shared, images * First::kImage);
  float* pooled1 = lx::take<float>(shared, images * First::kPooled);
  float* weights1 = lx::take<float>(shared, First::kOut * First::kWeights);
  float* biases1 = lx::take<float>(shared, First::kOut);
  float* weights2 = lx::take<float>(shared, Conv2::kOut * Conv2::kWeights);
  float* biases2 = lx::take<float>(shared, Conv2::kOut);
  float *features = pixels, *partial = pooled1;

  transpose_weights<First>(weights1, call.parameters[0]);
  transpose_weights<Conv2>(weights2, call.parameters[2]);
  if (threadIdx.x < First::kOut) biases1[threadIdx.x] = call.parameters[1][threadIdx.x];
  if (threadIdx.x < Conv2::kOut) biases2[threadIdx.x] = call.parameters[3][threadIdx.x];

  const int64_t stride = int64_t{gridDim.x} * images;
  for (int64_t first = int64_t{blockIdx.x} * images; first < call.batch; first += stride) {
    const int present = static_cast<int>(call.batch - first < images ? call.batch - first : images);
    lx::copy_to_shared(pixels, call.input + first * First::kImage, present * First::kImage);
    lx::fill_shared(pixels + present * First::kImage, (images - present) * First::kImage, 0.0f);
    __syncthreads();
    // A layer's outputs are stored for the next one, and kept.
    auto stores = [&](auto layer, float* to, float* kept, uint8_t* indices) {
      using L = decltype(layer);
      return [=](int image, int channel, int window, const auto& winner) {
        const int at = image * L::kPooled + channel * L::kWindows + window;
        to[at] = winner.pooled();
        if constexpr (kMayKeep) {
          if (kept == nullptr) return;
          kept[first * L::kPooled + at] = winner.pooled();
          indices[first * L::kPooled + at] = winner.code();
        }
      };
    };
    convolve_images<First, kTile, kMayKeep>(pixels, weights1, biases1, images, present,
                                            stores(First{}, pooled1, call.pooled1, call.indices1));
    __syncthreads();
    convolve_images<Conv2, kTile, kMayKeep>(pooled1, weights2, biases2, images, present,
                                            stores(Conv2{}, features, call.pooled2, call.indices2));
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
      linear_images<kImages / 2>(in, images, present, depth, weight, bias, outputs, layer < 2, partial, hidden,
                                 result == nullptr ? nullptr : result + first * outputs);
      in = hidden;
    }
  }
}

template <typename First>
LaunchResult forward(const LenetForward& call, cudaStream_t stream) {
  LaunchResult result;
  if (call.batch == 0) return result;
  const int images = images_per_block(call.batch, kImages, shared_bytes<First>);
  // Blocks that stay need the convolutions' weights once. How many there are does not change any result.
  int device = 0, multiprocessors = 0;
  result.error = cudaGetDevice(&device);
  if (result.error == cudaSuccess) {
    result.error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const unsigned grid = std::min(lx::grid_for(call.batch, images), static_cast<unsigned>(2 * multiprocessors));
  const ThreadTile tile = tile_for(images);
  lx::launch(result, "lenet_forward_kernel",
             tile == ThreadTile::kSingle ? lenet_forward_kernel<First, ThreadTile::kSingle, true>
             : tile == ThreadTile::kPair ? lenet_forward_kernel<First, ThreadTile::kPair, true>
             : call.pooled1 == nullptr   ? lenet_forward_kernel<First, ThreadTile::kLarge, false>
                                         : lenet_forward_kernel<First, ThreadTile::kLarge, true>,
             grid, kThreads, shared_bytes<First>(images), stream, call, images);
  return result;
}

}  // namespace

bool has_lenet_forward(DType dtype, int64_t channels, int64_t classes) {
  return dtype == DType::kFloat32 && (channels == Conv1::kIn || channels == ColourConv1::kIn) && classes >= 1 &&
         classes <= kMostOutputs;
}

LaunchResult launch_lenet_forward(const LenetForward& call, cudaStream_t stream) {
  return call.in_channels == 1 ? forward<Conv1>(call, stream) : forward<ColourConv1>(call, stream);
}

}  // namespace lenet_ext::cuda
