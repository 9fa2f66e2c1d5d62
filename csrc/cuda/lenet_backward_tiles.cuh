// The first half of LeNet's backward pass, for a block of 256 threads, or 512 where it has one image: from the gradient
// of some images' logits through the linear layers to that of the features, then, with what lies between in shared
// memory alone, conv2's weight gradient, the gradient of its input, conv1's weight gradient.
#pragma once

#include "lenet_image_tiles.cuh"

namespace lenet_ext::cuda {

constexpr int kMostClasses = kMostOutputs;
template <typename First>
constexpr int kSums1 = First::kOut * (First::kWeights + 1);  // weight and bias gradients of conv1: 156, or 456
constexpr int kSums2 = Conv2::kOut * (Conv2::kWeights + 1);  // of conv2: 2416

// What this half leaves for the other.
struct BackwardWorkspace {
  float *grad_hidden1, *grad_hidden2;  // [batch, 120] and [batch, 84], of the values before ReLU
  float *partials1, *partials2;        // [slices, 156 or 456] and [slices, 2416]
  int64_t bytes;

  BackwardWorkspace(void* begin, int64_t batch, int64_t in_channels, int64_t slices) {
    const int64_t sums1 = in_channels == 1 ? kSums1<Conv1> : kSums1<ColourConv1>;
    const int64_t counts[] = {batch * kHidden1, batch * kHidden2, slices * sums1, slices * kSums2};
    float** const parts[] = {&grad_hidden1, &grad_hidden2, &partials1, &partials2};
    bytes = 0;
    for (int i = 0; i < 4; bytes += lx::taken<float>(counts[i]), ++i) {
      *parts[i] = reinterpret_cast<float*>(static_cast<unsigned char*>(begin) + (begin == nullptr ? 0 : bytes));
    }
  }
};

constexpr int largest(int a, int b, int c = 0) { return a > b ? (a > c ? a : c) : (b > c ? b : c); }

// The threads of a block whose passes are over `kImages` images.
template <int kImages>
constexpr unsigned kPassThreads = kImages == 1 ? kImageThreads : kGradThreads;

// The gradient of conv2's weights, from pooled1 as the forward pass writes it.
template <int kImages>
using WeightGradOfPass = Conv2GradWeight<kPassThreads<kImages>, Conv2::kSize * Conv2::kSize>;

// The gradient of conv2's input, and conv2's weights as it wants them in shared memory.
template <int kImages>
struct GradInputOfPass : GradInput<kImages, 12> {  // what else is in registers leaves none for all of a lane's weights
  static constexpr int kWeightFloats = Conv2::kOut * Conv2::kWeights;
};
template <>
struct GradInputOfPass<1> : GradInputOfImage {
  static constexpr int kWeightFloats = W::kFloats;
};

// Conv2's weights in shared memory.
template <int kImages>
struct Weights2 {
  float* values;
  bool finite = true;  // whether all are, known of one image alone

  // The block copies them, and for one image meets at a barrier.
  template <typename T>
  __device__ __forceinline__ Weights2(float* to, const T* weight) : values(to) {
    if constexpr (kImages == 1) {
      finite = __syncthreads_or(!SpreadWeights<Conv2>::copy(to, weight)) == 0;
    } else {
      lx::copy_to_shared(to, weight, GradInputOfPass<kImages>::kWeightFloats);
    }
  }
};

// The shared memory of a pass over `kImages` images.
template <typename First, int kImages>
struct Pass {
  // One region of shared memory holds, one after the other:
  // - the gradients of the linear layers' outputs, and partial sums [parts][images][inputs] of those of their inputs;
  static constexpr int kLinearGradients = kImages * (kMostClasses + kHidden2 + kHidden1);
  static constexpr int kLinearFloats = kLinearGradients + kImages * 4 * static_cast<int>(kPassThreads<kImages>);
  // - the gradients of conv2's outputs, and the sums of its weights' gradients;
  static constexpr int kWeightFloats = kImages * kRowPairs + WeightGradOfPass<kImages>::kPartialFloats;
  // - what the gradient of its input needs;
  // - the sums of conv1's weight gradient.
  static constexpr int kRegionFloats = largest(largest(kLinearFloats, kWeightFloats), GradInputOfPass<kImages>::kFloats,
                                               kImages == 1 ? 0 : Conv1GradWeight::kReducedFloats);
  static constexpr int64_t shared_bytes() {
    return lx::taken<float>(GradInputOfPass<kImages>::kWeightFloats) + lx::taken<float>(kImages * First::kImage) +
           lx::taken<float>(kImages * First::kPooled) + lx::taken<float>(kImages * kFeatures) +
           lx::taken<float>(kRegionFloats);
  }
};

// The block computes the gradient of a linear layer's inputs, [images][inputs] in `grad_input` (shared) and in `result`
// (global, may be null), from that of its outputs (shared); 0 where `mask` (may be null), the layer's input behind a
// ReLU, is not above 0.
//
// thread -> 4 inputs of all images and a part of the outputs. The weights come straight from L2, 16 bytes of a row at a
// time, neighbouring threads next to each other. The parts are added in order, through `partial` (shared).
template <int kImages, typename T, typename M>
__device__ __forceinline__ void linear_grad_images(const float* grad_output, int present, int outputs,
                                                   const T* __restrict__ weight, int inputs, const M* __restrict__ mask,
                                                   float* partial, float* grad_input, float* __restrict__ result) {
  const int packs = inputs / 4, parts = static_cast<int>(kGradThreads) / packs;
  const int thread = lx::thread_read_here(), pack = thread % packs, part = thread / packs;
  if (part < parts) {
    const int share = lx::divide_up(outputs, parts);
    const int end = (part + 1) * share < outputs ? (part + 1) * share : outputs;
    float sums[kImages][4] = {};
#pragma unroll 8
    for (int o = part * share; o < end; ++o) {
      const lx::Pack<T, 4> w = lx::load_pack<4>(weight + o * inputs + pack * 4);
#pragma unroll
      for (int image = 0; image < kImages; ++image) {
        const float gradient = grad_output[image * outputs + o];
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[image][k] += gradient * lx::widen(w[k]);
      }
    }
#pragma unroll
    for (int image = 0; image < kImages; ++image) {
      *reinterpret_cast<lx::Pack<float, 4>*>(partial + (part * kImages + image) * inputs + pack * 4) = {
          {sums[image][0], sums[image][1], sums[image][2], sums[image][3]}};
    }
  }
  __syncthreads();
  for (int i = thread; i < kImages * inputs; i += kGradThreads) {
    float value = 0;
    if (i < present * inputs) {
      for (int p = 0; p < parts; ++p) value += partial[p * kImages * inputs + i];
      if (mask != nullptr && lx::widen(mask[i]) <= 0) value = 0;
      if (result != nullptr) result[i] = value;
    }
    grad_input[i] = value;
  }
  __syncthreads();
}

// The linear layers. The gradients of the logits, [images][classes], are at the beginning of `region`; those of the
// hidden layers' outputs before ReLU go to `result1` and `result2` (global), those of the features to `grad_features`
// (shared). One copy of the code for the three layers, as in the forward pass.
template <int kImages, typename T, typename M>
__device__ __forceinline__ void linear_backward(float* region, int present, int classes,
                                                const T* const (&parameters)[10], const KeptRows<T>& kept,
                                                const M* hidden1, const M* hidden2, float* result1, float* result2,
                                                float* grad_features) {
  float* gradient = region;
  float* partial = region + Pass<Conv1, kImages>::kLinearGradients;
#pragma unroll 1
  for (int layer = 2; layer >= 0; --layer) {
    const int outputs = layer == 2 ? classes : layer == 1 ? kHidden2 : kHidden1;
    const int inputs = layer == 2 ? kHidden2 : layer == 1 ? kHidden1 : kFeatures;
    const T* weight = layer == 2 ? parameters[8] : layer == 1 ? parameters[6] : parameters[4];
    const M* mask = layer == 2 ? hidden2 : layer == 1 ? hidden1 : nullptr;
    float* result = layer == 2 ? result2 : layer == 1 ? result1 : nullptr;
    float* next = layer == 0 ? grad_features : gradient + kImages * (layer == 2 ? kMostClasses : kHidden2);
    if constexpr (kImages == 1) {
      linear_grad_image(gradient, outputs, weight, layer == 0 ? kept : KeptRows<T>{}, inputs, mask, partial, next,
                        result);
    } else {
      linear_grad_images<kImages>(gradient, present, outputs, weight, inputs, mask, partial, next, result);
    }
    gradient = next;
  }
  if constexpr (kImages == 1) __syncthreads();
}

// The convolutions. In shared memory: `region`, `pixels`, `pooled1`, which becomes its gradient, `grad_features`, and
// conv2's weights. The weight gradients are added to the block's partial sums in global memory, each by the
// thread that wrote it before: together they would not fit the registers. store_grad_pooled1(position, value): what
// else becomes of the gradient between the convolutions.
template <typename First, int kImages, typename StoreGradPooled1>
__device__ __forceinline__ void convolutions_backward(float* region, const float* pixels, float* pooled1,
                                                      const float* grad_features, const Weights2<kImages>& weights2,
                                                      const uint8_t* indices1, const uint8_t* indices2, int present,
                                                      bool first_pass, float* partials1, float* partials2,
                                                      StoreGradPooled1 store_grad_pooled1) {
  {  // conv2's weights
    float *rows = region, *partial = region + kImages * kRowPairs;
    expand_rows_and_codes(rows, grad_features, indices2, present);
    const bool finite = all_finite(pooled1, present * Conv2::kImage);
    const bool zeros_count = __syncthreads_or(!finite) != 0;
    WeightGradOfPass<kImages> gradient;
    gradient.add(pooled1, rows, present);
    if (zeros_count) gradient.add_zeros(pooled1, rows, present);
    gradient.finish(partial, [&](int at, float sum) { partials2[at] = first_pass ? sum : partials2[at] + sum; });
  }
  __syncthreads();

  auto store = [&](int at, const float (&values)[4]) {
    *reinterpret_cast<lx::Pack<float, 4>*>(pooled1 + at) = {{values[0], values[1], values[2], values[3]}};
    store_grad_pooled1(at, values);
  };
  if constexpr (kImages == 1) {
    GradInputOfImage::compute(region, grad_features, indices2, weights2.values, weights2.finite, store);
  } else {
    GradInputOfPass<kImages>::compute(region, grad_features, indices2, present, weights2.values, store);
  }
  __syncthreads();

  // conv1's weights, an input channel at a time
#pragma unroll 1
  for (int c = 0; c < First::kIn; ++c) {
    auto store = [&](int at, float sum) {
      if (First::kIn > 1) {
        const int channel = at / (kTaps + 1), tap = at % (kTaps + 1);
        if (tap == kTaps && c > 0) return;  // the bias, which is the same for all of them
        at = channel * (First::kWeights + 1) + (tap == kTaps ? First::kWeights : c * kTaps + tap);
      }
      partials1[at] = first_pass ? sum : partials1[at] + sum;
    };
    const float* const plane = pixels + c * First::kSize * First::kSize;
    if constexpr (kImages == 1) {
      Conv1GradWeightOfImage::compute(plane, pooled1, indices1, store);
    } else {
      Conv1GradWeight gradient;
      gradient.add(plane, First::kImage, pooled1, indices1, present);
      gradient.finish(region, store);
    }
  }
}

}  // namespace lenet_ext::cuda
