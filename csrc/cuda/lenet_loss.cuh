// The loss of a training step and its gradient, for some images in shared memory. The formula is that of
// lenet/loss.cpp.
#pragma once

#include <cassert>

#include "device.cuh"

namespace lenet_ext::cuda {

template <typename A>
__device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, x, distance);
    if (other > x || lx::is_nan(other)) x = other;
  }
  return x;
}

// Every thread of the block gets what the mean is divided by: for cross entropy the sum of the weights of the targets
// that count, always in the same order. `shared`: a value for each warp; a barrier follows before it is used again.
__device__ __forceinline__ float loss_divisor(const LossOf& loss, int64_t batch, int classes, float* shared) {
  if (loss.kind == Loss::kMeanSquaredError) return static_cast<float>(batch * classes);
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  float sum = 0;
  for (int64_t row = threadIdx.x; row < batch; row += blockDim.x) {
    const int64_t target = loss.classes[row];
    if (target == loss.ignore_index) continue;
    assert(target >= 0 && target < classes);  // as in PyTorch's own kernels
    sum += loss.weight == nullptr ? 1.0f : loss.weight[target];
  }
  sum = lx::warp_sum(sum);
  if (threadIdx.x % 32 == 0) shared[warp] = sum;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < warps; ++w) total += shared[w];
  __syncthreads();
  return total;
}

// The first largest of values(0 .. classes - 1), NaN the largest of all, in every lane of the warp that calls it.
template <typename Values>
__device__ __forceinline__ int warp_argmax(int classes, const Values& values) {
  float best = -INFINITY;
  int at = 0;
  for (int c = static_cast<int>(threadIdx.x) % 32; c < classes; c += 32) {
    if (values(c) > best || (lx::is_nan(values(c)) && !lx::is_nan(best))) best = values(c), at = c;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, best, distance);
    const int other_at = __shfl_xor_sync(0xffffffffu, at, distance);
    const bool equal = other == best || (lx::is_nan(other) && lx::is_nan(best));
    if (equal ? other_at < at : other > best || lx::is_nan(other)) best = other, at = other_at;
  }
  return at;
}

// Whether row `row` counts as right, given its outputs (shared, [classes]); in every lane of the warp that calls it.
__device__ __forceinline__ bool is_right(const LossOf& loss, int64_t row, int classes, const float* outputs) {
  const int found = warp_argmax(classes, [&](int c) { return outputs[c]; });
  if (loss.kind == Loss::kMeanSquaredError) {
    return found == warp_argmax(classes, [&](int c) { return loss.values[row * classes + c]; });
  }
  return found == loss.classes[row] && loss.classes[row] != loss.ignore_index;
}

// The loss of row `row`, given its outputs (shared, [classes]), in every lane of the warp that calls it, and their
// gradient (shared).
__device__ __forceinline__ float row_loss(const LossOf& loss, int64_t row, int classes, float divisor,
                                          const float* outputs, float* gradient) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float result = 0;
  if (loss.kind == Loss::kMeanSquaredError) {
    for (int c = lane; c < classes; c += 32) {
      const float difference = outputs[c] - loss.values[row * classes + c];
      result += difference * difference;
      gradient[c] = 2 * difference / divisor;
    }
    return lx::warp_sum(result) / divisor;
  }
  const int64_t target = loss.classes[row];
  if (target == loss.ignore_index) {
    for (int c = lane; c < classes; c += 32) gradient[c] = 0;
    return 0;
  }
  const float even = loss.label_smoothing / static_cast<float>(classes) / divisor;
  const float own = (1 - loss.label_smoothing) * (loss.weight == nullptr ? 1.0f : loss.weight[target]) / divisor;
  float largest = -INFINITY, sum = 0, shares = 0;
  for (int c = lane; c < classes; c += 32) {
    if (outputs[c] > largest || lx::is_nan(outputs[c])) largest = outputs[c];
  }
  largest = warp_max(largest);
  for (int c = lane; c < classes; c += 32) sum += expf(outputs[c] - largest);
  sum = lx::warp_sum(sum);
  const float log_sum = largest + logf(sum);
  for (int c = lane; c < classes; c += 32) {
    const float share = even * (loss.weight == nullptr ? 1.0f : loss.weight[c]) + (c == target ? own : 0.0f);
    shares += share;
    if (share != 0) result += share * (log_sum - outputs[c]);
  }
  result = lx::warp_sum(result);
  const float scale = lx::warp_sum(shares) / sum;
  for (int c = lane; c < classes; c += 32) {
    const float share = even * (loss.weight == nullptr ? 1.0f : loss.weight[c]) + (c == target ? own : 0.0f);
    gradient[c] = expf(outputs[c] - largest) * scale - share;
  }
  return result;
}

}  // namespace lenet_ext::cuda
