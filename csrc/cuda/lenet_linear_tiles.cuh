// LeNet's linear layers for some images in shared memory, by a block of 256 threads.
#pragma once

#include "lenet_tiles.cuh"

namespace lenet_ext::cuda {

constexpr unsigned kLinearThreads = 256;
constexpr int kLinearColumns = 4;  // outputs of a thread
constexpr int kLinearParts = 4;    // into which the sum over the inputs is cut
constexpr int kMostOutputs = kLinearThreads / (2 * kLinearParts) * kLinearColumns;  // 128

// The block computes a linear layer for `images` rows of `in` (shared, [images][depth]) and writes the `present` first
// ones to `output` (global, may be null) and, as the next layer's input, to `hidden` (shared), if there is ReLU.
//
// thread -> up to kRows images (5) x 4 outputs and a quarter of the depth: 9 loads of 16 bytes for 80 multiply-adds.
// The weights come straight from L2, 16 bytes of a row at a time; the rest of the sector is in L1 when the next step
// asks for it. The quarters are added in order, through `partial` (shared, [4][images][outputs]).
template <int kRows>
__device__ __forceinline__ void linear_images(const float* in, int images, int present, int depth,
                                              const float* __restrict__ weight, const float* __restrict__ bias,
                                              int outputs, bool relu, float* partial, float* hidden,
                                              float* __restrict__ output) {
  const int workers = lx::divide_up(outputs, kLinearColumns), worker = static_cast<int>(threadIdx.x) % workers;
  const int first_image = static_cast<int>(threadIdx.x) / workers % 2;
  const int part = static_cast<int>(threadIdx.x) / workers / 2;
  if (part < kLinearParts) {
    const int share = lx::divide_up(depth, 4 * kLinearParts) * 4;
    const int end = (part + 1) * share < depth ? (part + 1) * share : depth;
    const float* rows[kLinearColumns];
#pragma unroll
    for (int j = 0; j < kLinearColumns; ++j) {
      const int column = worker + j * workers;  // neighbouring threads have neighbouring rows of the weight
      rows[j] = weight + (column < outputs ? column : outputs - 1) * depth;
    }
    float sums[kRows][kLinearColumns] = {};
    lx::Pack<float, 4> next[kLinearColumns];
#pragma unroll
    for (int j = 0; j < kLinearColumns; ++j) next[j] = lx::load_pack<4>(rows[j] + part * share);
#pragma unroll 1
    for (int k = part * share; k < end; k += 4) {
      lx::Pack<float, 4> w[kLinearColumns];
#pragma unroll
      for (int j = 0; j < kLinearColumns; ++j) {
        w[j] = next[j];
        if (k + 4 < end) next[j] = lx::load_pack<4>(rows[j] + k + 4);  // on their way while these are multiplied
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int image = first_image + 2 * i;
        if (image >= images) break;
        const lx::Pack<float, 4> a = lx::load_pack<4>(in + image * depth + k);
#pragma unroll
        for (int j = 0; j < kLinearColumns; ++j) {
#pragma unroll
          for (int step = 0; step < 4; ++step) sums[i][j] += a[step] * w[j][step];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kLinearColumns; ++j) {
        const int image = first_image + 2 * i, column = worker + j * workers;
        if (image < images && column < outputs) partial[(part * images + image) * outputs + column] = sums[i][j];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < present * outputs; i += blockDim.x) {
    float value = bias[i % outputs];
    for (int p = 0; p < kLinearParts; ++p) value += partial[p * images * outputs + i];
    if (relu && value <= 0) value = 0;  // NaN passes
    if (relu) hidden[i] = value;
    if (output != nullptr) output[i] = value;
  }
  __syncthreads();
}

}  // namespace lenet_ext::cuda
