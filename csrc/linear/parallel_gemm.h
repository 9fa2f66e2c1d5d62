// Running a matrix product of cpu/gemm.h on several threads.
#pragma once

#include "common/cpu_dispatch.h"
#include "common/parallel.h"

namespace lenet_ext::cpu {

template <typename A>
void run_gemm(const Gemm<A>& gemm) {
  const auto& kernels = gemm_table<A>();
  parallel_units(kernels.units(gemm), 2.0 * gemm.m * gemm.n * gemm.k,
                 [&](int64_t begin, int64_t end) { kernels.run(gemm, begin, end); });
}

}  // namespace lenet_ext::cpu
