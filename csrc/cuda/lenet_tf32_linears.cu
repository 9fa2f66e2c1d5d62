// LeNet's three linear layers for large batches in TF32, on the tensor cores in one launch, behind the convolutions of
// lenet_lean_forward.cu.
//
// As matrix products of a library each layer's outputs are written, read and written again for ReLU, and read by the
// next: 132 us for 65536 images on an H100. Here an image's 400 features are read and its logits written, and nothing
// between them leaves the registers, but to be kept: 35 us at the rate of the memory. The products are 59 an image, 28
// us if a multiprocessor begins 0.62 of them a clock; their weights, loaded for 32 images at once, are 60 accesses of
// 128 bytes to shared memory, 18 us.
//
// The weights are 236 KB, and a block has 227. So the first layer's and most of the second's are in shared memory for
// the block's life, already rounded; the second's last outputs and the third layer, 5 KB that remain in the L1 cache,
// are rounded as they are loaded. No GPU has run this kernel yet.
#include "lenet_tiles.cuh"
#include "tensor_core.cuh"

namespace lenet_ext::cuda {
namespace {

using lx::Pack;

constexpr int kWarps = 8;
constexpr unsigned kThreads = kWarps * 32;
constexpr int kHalves = 2, kRows = 16 * kHalves;  // images of a warp: rows of two products
constexpr int kColumns = 8;                       // of a tile

// A lane has as a tile's result the columns 2 t and 2 t + 1, which a step of the next layer calls its words t and t +
// 4: its operand then is the result. So a step of the layers 2 and 3 is a tile of the layer before. A step of the first
// layer is one of two that share 16 features, of which a lane loads four at once.
constexpr int kPairs1 = kFeatures / 16, kTiles1 = kHidden1 / kColumns;
constexpr int kSteps2 = kTiles1, kTiles2 = (kHidden2 + kColumns - 1) / kColumns, kSteps3 = kTiles2;
constexpr int kResident2 = kHidden2 / kColumns;  // tiles of the second layer in shared memory
static_assert(kFeatures % 16 == 0 && kHidden1 % kColumns == 0 && kResident2 + 1 == kTiles2);
constexpr int kVectors1 = kTiles1 * kPairs1 * 32, kVectors2 = kResident2 * kSteps2 * 32;

constexpr int64_t shared_bytes() { return lx::taken<uint32_t>(kVectors1 * 4) + lx::taken<uint32_t>(kVectors2 * 2); }

template <int N>
LX_DEVICE Pack<uint32_t, N> rounded_pack(const float* from) {
  const Pack<float, N> values = lx::load_pack<N>(from);
  Pack<uint32_t, N> words;
#pragma unroll
  for (int i = 0; i < N; ++i) words.values[i] = lx::bits_of(lx::to_tf32(values[i]));
  return words;
}

// A lane's operand of a step, of a weight [outputs][depth] in global memory: zeros behind its end.
LX_DEVICE Pack<uint32_t, 2> weight_operand(const float* weight, int outputs, int depth, int tile, int step) {
  const int out = tile * kColumns + static_cast<int>(threadIdx.x) % 32 / 4;
  const int k = step * kColumns + 2 * (static_cast<int>(threadIdx.x) % 4);
  return out < outputs && k < depth ? rounded_pack<2>(weight + out * depth + k) : Pack<uint32_t, 2>{};
}

// sums = a tile's product over all of a layer's depth. operand(step): of the weights.
template <int kSteps, typename Operand>
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const uint32_t (&in)[kSteps][4], Operand operand) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const Pack<uint32_t, 2> b = operand(step);
    if (step == 0) {
      lx::multiply<float>(sums, in[step], b[0], b[1]);
    } else {
      lx::multiply_accumulate<float>(sums, in[step], b[0], b[1]);
    }
  }
}

// A tile's results with bias and ReLU, as the operand of a step, and where the backward pass finds them: rows g and
// g + 8 of `kept`, if it is wanted.
template <bool kKeep>
__device__ __forceinline__ void activate(uint32_t (&to)[4], const float (&sums)[4], const float* bias, int width,
                                         int tile, int64_t first, int64_t batch, float* kept) {
  const int lane = threadIdx.x % 32, g = lane / 4, column = tile * kColumns + 2 * (lane % 4);
  const bool present = column < width;  // there are no weights behind the last output, but infinity times zero is NaN
  const Pack<float, 2> offset = present ? lx::load_pack<2>(bias + column) : Pack<float, 2>{};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Pack<float, 2> values;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      values.values[i] = present ? lx::max_or_nan(sums[2 * half + i] + offset[i], 0.0f) : 0.0f;
      to[half + 2 * i] = lx::bits_of(lx::to_tf32(values[i]));
    }
    if constexpr (kKeep) {
      const int64_t image = first + g + 8 * half;
      if (present && image < batch) *reinterpret_cast<Pack<float, 2>*>(kept + image * width + column) = values;
    }
  }
}

// warp -> 32 images at a time. Shared memory: 225 KB, one block a multiprocessor.
template <bool kKeep>
__global__ void __launch_bounds__(kThreads, 1)
    lenet_tf32_linears_kernel(LenetForward call, const float* __restrict__ features) {
  LX_SMEM(shared);
  uint32_t* const fc1 = lx::take<uint32_t>(shared, kVectors1 * 4);  // [tile][pair of steps][lane][4]
  uint32_t* const fc2 = lx::take<uint32_t>(shared, kVectors2 * 2);  // [tile][step][lane][2]
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int classes = static_cast<int>(call.classes);

#pragma unroll 4
  for (int i = threadIdx.x; i < kVectors1; i += kThreads) {
    const int out = i / 32 / kPairs1 * kColumns + i % 32 / 4, first = i / 32 % kPairs1 * 16 + i % 4 * 4;
    *reinterpret_cast<Pack<uint32_t, 4>*>(fc1 + i * 4) = rounded_pack<4>(call.parameters[4] + out * kFeatures + first);
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < kVectors2; i += kThreads) {
    const int out = i / 32 / kSteps2 * kColumns + i % 32 / 4, first = i / 32 % kSteps2 * kColumns + i % 4 * 2;
    *reinterpret_cast<Pack<uint32_t, 2>*>(fc2 + i * 2) = rounded_pack<2>(call.parameters[6] + out * kHidden1 + first);
  }
  __syncthreads();

  // Neighbouring warps of a small batch are in different blocks, so that all multiprocessors have work.
  const int64_t stride = int64_t{gridDim.x} * kWarps * kRows;
#pragma unroll 1
  for (int64_t first = (int64_t{threadIdx.x / 32} * gridDim.x + blockIdx.x) * kRows; first < call.batch;
       first += stride) {
    const float* rows[2 * kHalves];  // g, g + 8, g + 16, g + 24
#pragma unroll
    for (int i = 0; i < 2 * kHalves; ++i) {
      const int64_t image = first + g + 8 * i < call.batch ? first + g + 8 * i : call.batch - 1;
      rows[i] = features + image * kFeatures + 4 * t;
    }
    Pack<float, 4> next[2 * kHalves];
#pragma unroll
    for (int i = 0; i < 2 * kHalves; ++i) next[i] = lx::load_pack<4>(rows[i]);
    float sums[kHalves][kTiles1][4] = {};
#pragma unroll 1
    for (int pair = 0; pair < kPairs1; ++pair) {
      uint32_t a[kHalves][2][4];  // [half][step]
#pragma unroll
      for (int i = 0; i < 2 * kHalves * 4; ++i) {
        const int row = i / 4, k = i % 4;
        a[row / 2][k / 2][row % 2 + k % 2 * 2] = lx::bits_of(lx::to_tf32(next[row][k]));
      }
      // On their way while these are multiplied.
      const int ahead = pair + 1 < kPairs1 ? 16 * (pair + 1) : 0;
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) next[i] = lx::load_pack<4>(rows[i] + ahead);
#pragma unroll
      for (int tile = 0; tile < kTiles1; ++tile) {
        const Pack<uint32_t, 4> b = lx::load_pack<4>(fc1 + ((tile * kPairs1 + pair) * 32 + lane) * 4);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            lx::multiply_accumulate<float>(sums[half][tile], a[half][step], b[2 * step], b[2 * step + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int64_t begin = first + 16 * half;
      uint32_t hidden1[kSteps2][4], hidden2[kSteps3][4];
#pragma unroll
      for (int tile = 0; tile < kTiles1; ++tile) {
        activate<kKeep>(hidden1[tile], sums[half][tile], call.parameters[5], kHidden1, tile, begin, call.batch,
                        call.hidden1);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles2; ++tile) {
        __syncwarp();  // or the compiler loads all tiles' weights at once, for which there are no registers
        float results[4];
        multiply_tile(results, hidden1, [&](int step) {
          return tile < kResident2 ? lx::load_pack<2>(fc2 + ((tile * kSteps2 + step) * 32 + lane) * 2)
                                   : weight_operand(call.parameters[6], kHidden2, kHidden1, tile, step);
        });
        activate<kKeep>(hidden2[tile], results, call.parameters[7], kHidden2, tile, begin, call.batch, call.hidden2);
      }
#pragma unroll 1
      for (int tile = 0; tile * kColumns < classes; ++tile) {
        float results[4];
        multiply_tile(results, hidden2,
                      [&](int step) { return weight_operand(call.parameters[8], classes, kHidden2, tile, step); });
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t image = begin + g + i / 2 * 8;
          const int column = tile * kColumns + 2 * t + i % 2;
          if (image >= call.batch || column >= classes) continue;
          call.output[image * classes + column] = results[i] + call.parameters[9][column];
        }
      }
    }
  }
}

}  // namespace

bool has_lenet_tf32_linears() {
  return lx::has_tensor_cores(lenet_tf32_linears_kernel<false>) && lx::fits_shared_memory(shared_bytes());
}

LaunchResult launch_lenet_tf32_linears(const LenetForward& call, cudaStream_t stream) {
  LaunchResult result;
  if (call.batch == 0) return result;
  int device = 0, multiprocessors = 0;
  result.error = cudaGetDevice(&device);
  if (result.error == cudaSuccess) {
    result.error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const unsigned blocks = std::min(lx::grid_for(call.batch, kRows), static_cast<unsigned>(multiprocessors));
  lx::launch(result, "lenet_tf32_linears_kernel",
             call.hidden1 == nullptr ? lenet_tf32_linears_kernel<false> : lenet_tf32_linears_kernel<true>, blocks,
             kThreads, shared_bytes(), stream, call, static_cast<const float*>(call.pooled2));
  return result;
}

}  // namespace lenet_ext::cuda
