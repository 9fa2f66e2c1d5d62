// The table of the kernels for LeNet's two convolutions.
#if LENET_EXT_VECTOR_BYTES >= 32
#include "conv_pool_lenet_backward.h"
#include "conv_pool_lenet_forward.h"
#else
#include "conv_pool_kernels.h"
#endif

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {

#if LENET_EXT_VECTOR_BYTES >= 32

namespace {

template <int in_channels>
constexpr ConvPoolForwardKernels<float> kForward1 = {forward1_packed_bytes, no_scratch, unit_per_image,
                                                     forward1_prepare, forward1_run<in_channels>};
constexpr ConvPoolForwardKernels<float> kForward2 = {forward2_packed_bytes, no_scratch, unit_per_image,
                                                     forward2_prepare, forward2_run};
template <int in_channels>
constexpr ConvPoolBackwardKernels<float> kBackward1 = {backward1_packed_bytes,
                                                       backward1_scratch_bytes<in_channels>,
                                                       backward_slices,
                                                       backward1_partial_bytes<in_channels>,
                                                       backward1_prepare,
                                                       backward1_run<in_channels>,
                                                       backward1_reduce<in_channels>};
constexpr ConvPoolBackwardKernels<float> kBackward2 = {
    backward2_packed_bytes, backward2_scratch_bytes, backward_slices, backward2_partial_bytes,
    backward2_prepare,      backward2_run,           backward2_reduce};

template <int in_channels>
constexpr ConvPoolLenetKernels::First kFirst = {{&kForward1<in_channels>, &kBackward1<in_channels>},
                                                sizeof(BackwardBoth<in_channels>),
                                                backward_both_run<in_channels>};

}  // namespace

extern const ConvPoolLenetKernels conv_pool_lenet_kernels;
const ConvPoolLenetKernels conv_pool_lenet_kernels = {kFirst<1>, kFirst<3>, {&kForward2, &kBackward2}};

#else

extern const ConvPoolLenetKernels conv_pool_lenet_kernels;
const ConvPoolLenetKernels conv_pool_lenet_kernels = {};

#endif

}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
