// The table of the linear layers' kernels for one instruction set.
#include "gemm_kernels.h"

#include "gemm.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

template <typename A>
constexpr GemmTable<A> kTable = {gemm_units<A>,
                                 gemm_run<A>,
                                 gemm_nt_units<A>,
                                 gemm_nt_run<A>,
                                 gemm_transposing_units<A>,
                                 gemm_transposing_scratch<A>,
                                 gemm_transposing_run<A>,
                                 most_nt_rows<A>,
                                 transpose<A>,
                                 relu_backward<A>,
                                 column_sums<A>};

}  // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels = {kTable<float>, kTable<double>};

}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
