// LeNet's two convolutions forward, an image at a time: in the first one the lanes are output columns (six channels
// would leave lanes idle), in the second the 16 output channels. What is done with an image depends on the vectors.
#pragma once

#if LENET_EXT_VECTOR_BYTES == 64
#include "conv_pool_lenet_forward_avx512.h"
#else
#include "conv_pool_lenet_forward_avx2.h"
#endif
#include "transpose.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

inline int64_t forward1_packed_bytes(const ConvPoolShape&) { return 0; }
inline int64_t forward2_packed_bytes(const ConvPoolShape&) { return (kDepth2 + 1) * kChannels2 * sizeof(float); }
inline int64_t no_scratch(const ConvPoolShape&) { return 0; }
inline int64_t unit_per_image(const ConvPoolShape& s) { return s.batch; }
inline void forward1_prepare(const ConvPoolForward<float>&, void*) {}

inline void forward2_prepare(const ConvPoolForward<float>& job, void* packed) {
  float* to = static_cast<float*>(packed);
  for (int channel = 0; channel < kChannels2; ++channel) to[channel] = job.bias != nullptr ? job.bias[channel] : 0;
  transpose_plane(job.weight, kChannels2, kDepth2, kDepth2, to + kChannels2, kChannels2);
}

template <int in_channels>
void forward1_run(const ConvPoolForward<float>& job, const void*, void*, int64_t begin, int64_t end) {
  const float none[kChannels1] = {};
  const float* bias = job.bias != nullptr ? job.bias : none;
  for (int64_t n = begin; n < end; ++n) {
    const float* image = job.input + n * job.input_strides.n;
    float* output = job.output + n * job.output_strides.n;
    if (job.indices != nullptr) {
      forward_image1<in_channels, true>(image, job.weight, bias, output, job.indices + n * job.output_strides.n);
    } else {
      forward_image1<in_channels, false>(image, job.weight, bias, output, nullptr);
    }
  }
}

inline void forward2_run(const ConvPoolForward<float>& job, const void* packed, void*, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const float* image = job.input + n * job.input_strides.n;
    float* output = job.output + n * job.output_strides.n;
    if (job.indices != nullptr) {
      forward_image2<true>(image, static_cast<const float*>(packed), output, job.indices + n * job.output_strides.n);
    } else {
      forward_image2<false>(image, static_cast<const float*>(packed), output, nullptr);
    }
  }
}
}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
