// The table of conv_relu_max_pool2d's kernels for one instruction set.
#include "conv_pool_kernels.h"

#include "conv_at_indices.h"
#include "conv_backward.h"
#include "conv_forward.h"
#include "relu_pool.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

template <typename T>
constexpr ConvPoolTable<T> kTable = {
    {forward_packed_bytes<T>, forward_scratch_bytes<T>, forward_units<T>, forward_prepare<T>, forward_run<T>},
    {backward_packed_bytes<T>, backward_scratch_bytes<T>, backward_units<T>, backward_partial_bytes<T>,
     backward_prepare<T>, backward_run<T>, backward_reduce<T>},
    {at_indices_packed_bytes<T>, at_indices_scratch_bytes<T>, at_indices_prepare<T>, at_indices_run<T>},
    {kLanes<Accumulator<T>>, relu_pool_scratch_bytes<T>, relu_pool_forward<T>, relu_pool_backward<T>, are_finite<T>},
};

}  // namespace

extern const ConvPoolKernels conv_pool_kernels;
const ConvPoolKernels conv_pool_kernels = {kTable<float>, kTable<double>, kTable<BFloat16>};

}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
