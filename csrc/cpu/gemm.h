// Running a matrix product of cpu/kernels/gemm.h on several threads.
#pragma once

#include "dispatch.h"
#include "parallel.h"

namespace lenet_ext::cpu {

// With fewer rows, dot products along k beat transposing the weight first.
constexpr int64_t kDotRows = 6;

template <typename A>
void run_gemm(const Gemm<A>& gemm) {
  const auto& kernels = gemm_table<A>();
  parallel_units(kernels.units(gemm), 2.0 * gemm.m * gemm.n * gemm.k,
                 [&](int64_t begin, int64_t end) { kernels.run(gemm, begin, end); });
}

}  // namespace lenet_ext::cpu
