// The backward passes of LeNet's two convolutions: over the images of a slice of the batch, one by one, and the sums of
// the slices. What is done with an image depends on the vectors.
//
// One list for the winners of several images would load and store each channel's sums once for all of them. But the
// images laid out for it leave the first-level cache: with AVX-512 the weight gradient of conv2 is as fast with lists
// of two images and slower with lists of four, and with AVX2 what it gains with two or four is less than what its time
// varies.
#pragma once

#if LENET_EXT_VECTOR_BYTES == 64
#include "conv_pool_lenet_backward_avx512.h"
#else
#include "conv_pool_lenet_backward_avx2.h"
#endif

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

// A slice of several images makes better use of what it reads for all of them; several slices make use of threads.
inline int64_t backward_slices(const ConvPoolShape& s) {
  return max_of<int64_t>(min_of<int64_t>(divide_up(s.batch, s.batch < 32 ? 4 : 8), kSlices), 1);
}

inline int64_t backward1_packed_bytes(const ConvPoolShape&, bool) { return 0; }
inline int64_t backward2_packed_bytes(const ConvPoolShape&, bool input_gradient) {
  return input_gradient ? kPackedKernels2 * sizeof(float) : 0;
}
template <int in_channels>
int64_t backward1_scratch_bytes(const ConvPoolShape&, bool) {
  return sizeof(Backward1<in_channels>);
}
inline int64_t backward2_scratch_bytes(const ConvPoolShape&, bool) { return sizeof(Backward2); }
template <int in_channels>
int64_t backward1_partial_bytes(const ConvPoolShape&) {
  return kPartial1<in_channels> * sizeof(float);
}
inline int64_t backward2_partial_bytes(const ConvPoolShape&) { return kPartial2 * sizeof(float); }
inline bool backward1_prepare(const ConvPoolBackward<float>&, void*) { return true; }

inline bool backward2_prepare(const ConvPoolBackward<float>& job, void* packed) {
  if (job.grad_input == nullptr) return true;
  if (!all_finite(job.weight, kChannels2 * kDepth2)) return false;
  pack_kernels2(job.weight, static_cast<float*>(packed));
  return true;
}

// The images of a slice.
struct Slice {
  int64_t begin, end;
};
LENET_EXT_INLINE Slice slice_images(const ConvPoolShape& s, int64_t slice) {
  const int64_t slices = backward_slices(s);
  return {slice * s.batch / slices, (slice + 1) * s.batch / slices};
}

template <int in_channels>
bool backward1_run(const ConvPoolBackward<float>& job, const void*, void* partials, void* scratch, int64_t begin,
                   int64_t end) {
  constexpr int size = kPartial1<in_channels>;
  auto& b = *static_cast<Backward1<in_channels>*>(scratch);
  for (int64_t slice = begin; slice < end; ++slice) {
    float* sums = static_cast<float*>(partials) + slice * size;
    for (int i = 0; i < size; ++i) sums[i] = 0;
    const Slice images = slice_images(job.shape, slice);
    for (int64_t n = images.begin; n < images.end; ++n) {
      const float* image = job.input + n * job.input_strides.n;
      if (!all_finite(image, in_channels * kSize1)) return false;
      backward1_image<in_channels>(image, job.grad_output + n * job.grad_output_strides.n,
                                   job.indices + n * job.indices_strides.n, b, sums);
    }
    if (!all_finite(sums + kSums1<in_channels>, kChannels1)) return false;
  }
  return true;
}

inline bool backward2_run(const ConvPoolBackward<float>& job, const void* packed, void* partials, void* scratch,
                          int64_t begin, int64_t end) {
  Backward2& b = *static_cast<Backward2*>(scratch);
  const bool weight_gradient = job.grad_weight != nullptr;
  for (int64_t slice = begin; slice < end; ++slice) {
    float* sums = static_cast<float*>(partials) + slice * kPartial2;
    if (weight_gradient) {
      for (int i = 0; i < kPartial2; ++i) sums[i] = 0;
    }
    const Slice images = slice_images(job.shape, slice);
    for (int64_t n = images.begin; n < images.end; ++n) {
      const float* image = job.input + n * job.input_strides.n;
      const float* grad = job.grad_output + n * job.grad_output_strides.n;
      if (weight_gradient && !all_finite(image, kChannels1 * kPooled1)) return false;
      if (!all_finite(grad, kChannels2 * kPooled2)) return false;
      backward2_image(image, grad, job.indices + n * job.indices_strides.n, static_cast<const float*>(packed), b,
                      weight_gradient ? sums : nullptr,
                      job.grad_input != nullptr ? job.grad_input + n * job.grad_input_strides.n : nullptr);
    }
  }
  return true;
}

template <int in_channels>
struct BackwardBoth {
  Backward1<in_channels> first;
  Backward2 second;
  alignas(64) float grad[kChannels1 * kPooled1];
};

template <int in_channels>
bool backward_both_run(const ConvPoolBackward<float>& job1, const ConvPoolBackward<float>& job2, const void* packed,
                       void* partials1, void* partials2, void* scratch, int64_t begin, int64_t end) {
  constexpr int size1 = kPartial1<in_channels>;
  auto& b = *static_cast<BackwardBoth<in_channels>*>(scratch);
  for (int64_t slice = begin; slice < end; ++slice) {
    float* sums1 = static_cast<float*>(partials1) + slice * size1;
    float* sums2 = static_cast<float*>(partials2) + slice * kPartial2;
    for (int i = 0; i < size1; ++i) sums1[i] = 0;
    for (int i = 0; i < kPartial2; ++i) sums2[i] = 0;
    const Slice images = slice_images(job1.shape, slice);
    for (int64_t n = images.begin; n < images.end; ++n) {
      const float* image = job1.input + n * job1.input_strides.n;
      const float* between = job2.input + n * job2.input_strides.n;
      const float* grad = job2.grad_output + n * job2.grad_output_strides.n;
      if (!all_finite(image, in_channels * kSize1) || !all_finite(between, kChannels1 * kPooled1) ||
          !all_finite(grad, kChannels2 * kPooled2)) {
        return false;
      }
      backward2_image(between, grad, job2.indices + n * job2.indices_strides.n, static_cast<const float*>(packed),
                      b.second, sums2, b.grad);
      backward1_image<in_channels>(image, b.grad, job1.indices + n * job1.indices_strides.n, b.first, sums1);
    }
    if (!all_finite(sums1 + kSums1<in_channels>, kChannels1)) return false;
  }
  return true;
}

// Adds up the slices, in order, into the first.
inline void add_slices(const ConvPoolShape& s, float* sums, int size, int64_t begin, int64_t end) {
  for (int64_t slice = 1; slice < backward_slices(s); ++slice) {
    for (int64_t i = begin; i < end; ++i) sums[i] += sums[slice * size + i];
  }
}

template <int in_channels>
void backward1_reduce(const ConvPoolBackward<float>& job, void* partials, int64_t begin, int64_t end) {
  constexpr int depth = in_channels * kTaps, biases = kSums1<in_channels>, size = kPartial1<in_channels>;
  float* sums = static_cast<float*>(partials);
  add_slices(job.shape, sums, size, begin * depth / 5 * 8, end * depth / 5 * 8);
  add_slices(job.shape, sums, size, biases + begin, biases + end);
  for (int64_t o = begin; o < end; ++o) {
    for (int tap = 0; tap < depth; ++tap) {
      const int64_t row = (o * depth + tap) / 5;
      job.grad_weight[o * depth + tap] = sums[row * 8 + tap % 5];
    }
    job.grad_bias[o] = sums[biases + o];
  }
}

inline void backward2_reduce(const ConvPoolBackward<float>& job, void* partials, int64_t begin, int64_t end) {
  float* sums = static_cast<float*>(partials);
  add_slices(job.shape, sums, kPartial2, begin * 160, end * 160);
  add_slices(job.shape, sums, kPartial2, kSums2 + begin, kSums2 + end);
  for (int64_t o = begin; o < end; ++o) {
    store_sums2(sums + o * 160, job.grad_weight + o * kDepth2);
    job.grad_bias[o] = sums[kSums2 + o];
  }
}

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
