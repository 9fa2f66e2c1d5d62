// The last step of a weight gradient: partial sums of the batch's slices, added in an order that only their number
// decides.
#pragma once

#include "device.cuh"

namespace lenet_ext::cuda {

constexpr int kSumsOfBlock = 32;

// The block adds 32 columns of partials [slices][sums], from `first` on, and hands each result to store(column, sum),
// in one thread. Warp w takes slices w, w + warps, ..., each lane a column; the warps are then added in order.
// `shared`: a value for each thread.
template <typename A, typename Store>
__device__ __forceinline__ void sum_slices(const A* __restrict__ partials, int64_t slices, int64_t sums, int64_t first,
                                           A* shared, Store store) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t column = first + lane;
  A sum = 0;
  if (column < sums) {
#pragma unroll 8
    for (int64_t slice = warp; slice < slices; slice += warps) sum += partials[slice * sums + column];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0 && column < sums) {
    for (int w = 1; w < warps; ++w) sum += shared[w * 32 + lane];
    store(column, sum);
  }
}

}  // namespace lenet_ext::cuda
