// A training step of LeNet in two launches, in float32 arithmetic on the ordinary units. First image by image: forward
// pass, loss, backward pass down to conv1, with all activations in shared memory. Then, for each parameter, the sum
// over the batch and the optimizer's update. Every sum is in the order of lenet.cu and lenet_backward.cu.
#include "lenet_loss.cuh"
#include "lenet_weight_sums.cuh"
#include "optimizer_update.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = kGradThreads;
static_assert(kThreads == kLinearThreads);

// What the first launch leaves for the second.
struct StepWorkspace {
  float *grad_logits, *features, *hidden1, *hidden2;  // [batch, ...]
  float* losses;                                      // [batch], each already divided; then the divisor
  float* right;                                       // [batch], 1 or 0
  BiasCorrection* corrections;                        // [10], of the parameters
  int64_t bytes;
  BackwardWorkspace backward;

  StepWorkspace(void* begin, int64_t batch, int64_t in_channels, int64_t classes, int64_t slices)
      : bytes(0), backward(nullptr, batch, in_channels, slices) {
    unsigned char* const memory = static_cast<unsigned char*>(begin);  // null where only the size is asked for
    auto take = [&](auto*& part, int64_t count) {
      using Part = std::remove_reference_t<decltype(*part)>;
      part = memory == nullptr ? nullptr : reinterpret_cast<Part*>(memory + bytes);
      bytes += lx::taken<Part>(count);
    };
    take(grad_logits, batch * classes), take(features, batch * kFeatures);
    take(hidden1, batch * kHidden1), take(hidden2, batch * kHidden2);
    take(losses, batch + 1), take(right, batch), take(corrections, 10);
    if (memory != nullptr) backward = BackwardWorkspace(memory + bytes, batch, in_channels, slices);
    bytes += backward.bytes;
  }
};

// The shared memory of a pass over `kImages` images.
template <typename First, int kImages>
struct StepPass {
  // The region of the backward pass begins with the gradients of the logits. Behind them are the logits and the forward
  // pass's partial sums.
  static constexpr int kLogits = kImages * kMostClasses, kPartial = 2 * kLogits;
  static_assert(kPartial + kLinearParts * kImages * kMostOutputs <= Pass<First, kImages>::kRegionFloats);

  // The convolutions' weights: for one image as SpreadWeights has them, which is as the backward pass asks for them;
  // for more as convolve_images wants them.
  static constexpr bool kSpread = kImages == 1;
  static constexpr int kWeights1 = kSpread ? SpreadWeights<First>::kFloats : First::kOut * First::kWeights;
  static constexpr int kTransposed2 = kSpread ? 0 : Conv2::kOut * Conv2::kWeights;
  static constexpr int kWeights2 = GradInputOfPass<kImages>::kWeightFloats;

  float *weights1, *biases1, *transposed_weights2, *biases2, *pixels, *pooled1, *features, *hidden1, *hidden2;
  float *weights2, *region, *kept;  // the last for KeptRows, as much as was launched
  uint8_t *indices1, *indices2;

  LX_DEVICE explicit StepPass(unsigned char* shared) {
    weights1 = lx::take<float>(shared, kWeights1);
    biases1 = lx::take<float>(shared, First::kOut);
    transposed_weights2 = lx::take<float>(shared, kTransposed2);
    biases2 = lx::take<float>(shared, Conv2::kOut);
    weights2 = lx::take<float>(shared, kWeights2);
    pixels = lx::take<float>(shared, kImages * First::kImage);
    pooled1 = lx::take<float>(shared, kImages * First::kPooled);  // later its gradient
    features = lx::take<float>(shared, kImages * kFeatures);      // later their gradient
    hidden1 = lx::take<float>(shared, kImages * kHidden1);
    hidden2 = lx::take<float>(shared, kImages * kHidden2);
    indices1 = lx::take<uint8_t>(shared, kImages * First::kPooled);
    indices2 = lx::take<uint8_t>(shared, kImages * Conv2::kPooled);
    region = lx::take<float>(shared, Pass<First, kImages>::kRegionFloats);
    kept = lx::take<float>(shared, 0);
  }
  static constexpr int64_t shared_bytes() {
    int64_t bytes = 0;
    for (const int64_t floats : {kWeights1, First::kOut, kTransposed2, Conv2::kOut, kWeights2, kImages * First::kImage,
                                 kImages * First::kPooled, kImages * kFeatures, kImages * kHidden1, kImages * kHidden2,
                                 Pass<First, kImages>::kRegionFloats}) {
      bytes += lx::taken<float>(floats);
    }
    return bytes + lx::taken<uint8_t>(kImages * First::kPooled) + lx::taken<uint8_t>(kImages * Conv2::kPooled);
  }
};

// block -> one slice of the batch, `kImages` images at a time. Shared memory: 110 KB with 4 images of one channel; with
// one 53 KB, and what else there is for rows of fc1's weight: 110 of 120 on an H100, 70 on an A100.
//
// With one image a block, 64 of them leave half of an H100 idle, and the time is that of the warp with most to do. Of
// sm_90 that is counted as 7,200 instructions, where 256 threads have 14,100: what comes before the convolutions 700
// (600), conv1 430 (950), conv2 880 (1,980), linear layers 940 (3,630), loss 400 (650); backward linear layers 1,370
// (1,600), conv2's weights 930 (1,520, dense), its input 850 (1,600), conv1's weights 680 (1,580). All warps together
// have 100,000, which take 15 us to begin where none waits, so that more threads would gain nothing. Predicted are 25
// us instead of 39 (kernel_times.py).
//
// A cluster of two such blocks an image is counted as 21 to 26 us, and not built. With half of the windows, channels or
// outputs each, a block has 56,000 instructions and the warp with most to do 5,450: it saves 650 in conv1 and conv2,
// 930 in the gradients of conv2's input and of the weights, 170 in the linear layers, whose forward sums have four
// parts however many threads there are. In exchange what both blocks need passes through distributed shared memory nine
// times, half a microsecond to one each, by the forward pass: an H100 took 10.5 us with eight blocks an image and 15.4
// with two, which is 13 us divided among the blocks and 8.9, with the launch and five exchanges, that do not divide.
template <typename First, int kImages>
__global__ void __launch_bounds__(kPassThreads<kImages>, 1)
    lenet_step_data_kernel(LenetStep call, StepWorkspace w, int kept_rows) {
  LX_SMEM(shared);
  const StepPass<First, kImages> s(shared);
  using S = StepPass<First, kImages>;
  const float* parameters[10];
#pragma unroll
  for (int i = 0; i < 10; ++i) parameters[i] = call.parameters[i];
  const int thread = static_cast<int>(threadIdx.x), classes = static_cast<int>(call.classes);
  if constexpr (S::kSpread) {
    SpreadWeights<First>::copy(s.weights1, parameters[0]);
  } else {
    transpose_weights<First>(s.weights1, parameters[0]);
    transpose_weights<Conv2>(s.transposed_weights2, parameters[2]);
  }
  const Weights2<kImages> weights2(s.weights2, parameters[2]);
  KeptRows<float> kept;
  if (thread < First::kOut) s.biases1[thread] = parameters[1][thread];
  if (thread < Conv2::kOut) s.biases2[thread] = parameters[3][thread];
  const float divisor = loss_divisor(call.loss, call.batch, classes, s.region);
  if (blockIdx.x == 0 && thread == 0) w.losses[call.batch] = divisor;
  if (blockIdx.x == 0 && thread < 10 && call.optimizer != Optimizer::kSgd) {
    const UpdateOf& update = call.updates[thread];
    w.corrections[thread] = bias_correction(update, update.step != nullptr ? (*update.step += 1) : update.steps);
  }

  const int64_t slice_begin = blockIdx.x * call.slice_images;
  const int64_t slice_end = slice_begin + call.slice_images < call.batch ? slice_begin + call.slice_images : call.batch;
#pragma unroll 1
  for (int64_t first = slice_begin; first < slice_end; first += kImages) {
    const int present = kImages > 1 && slice_end - first < kImages ? static_cast<int>(slice_end - first) : kImages;
    __syncthreads();  // the last pass is done with the shared memory
    lx::copy_to_shared(s.pixels, call.input + first * First::kImage, present * First::kImage);
    lx::fill_shared(s.pixels + present * First::kImage, (kImages - present) * First::kImage, 0.0f);
    __syncthreads();
    auto store1 = [&](int image, int channel, int window, const auto& winner) {
      const int at = image * First::kPooled + channel * First::kWindows + window;
      s.pooled1[at] = winner.pooled();
      s.indices1[at] = winner.code();
    };
    auto store2 = [&](int image, int channel, int window, const auto& winner) {
      const int at = image * Conv2::kPooled + channel * Conv2::kWindows + window;
      s.features[at] = winner.pooled();
      s.indices2[at] = winner.code();
      if (image < present) w.features[first * kFeatures + at] = winner.pooled();
    };
    if constexpr (kImages == 1) {
      // After the pixels, which would wait behind them.
      if (first == slice_begin) kept = KeptRows<float>::begin_to_copy(s.kept, parameters[4], kept_rows);
      convolve_image<First>(s.pixels, s.weights1, s.biases1,
                            [&](int channel, int window, const auto& winner) { store1(0, channel, window, winner); });
      __syncthreads();
      convolve_image<Conv2>(s.pooled1, s.weights2, s.biases2,
                            [&](int channel, int window, const auto& winner) { store2(0, channel, window, winner); });
      if (first == slice_begin && kept.count > 0) {
        lx::wait_for_copies<0>();
        __syncthreads();
      }
    } else {
      constexpr ThreadTile kTile = kImages == 2 ? ThreadTile::kPair : ThreadTile::kLarge;
      convolve_images<First, kTile>(s.pixels, s.weights1, s.biases1, kImages, kImages, store1);
      __syncthreads();
      convolve_images<Conv2, kTile>(s.pooled1, s.transposed_weights2, s.biases2, kImages, kImages, store2);
      __syncthreads();
    }
    float *logits = s.region + S::kLogits, *partial = s.region + S::kPartial;
    const float* in = s.features;
    // One copy of the code for the three layers, as in lenet.cu.
#pragma unroll 1
    for (int layer = 0; layer < 3; ++layer) {
      const int depth = layer == 0 ? kFeatures : layer == 1 ? kHidden1 : kHidden2;
      const int outputs = layer == 0 ? kHidden1 : layer == 1 ? kHidden2 : classes;
      const float* weight = layer == 0 ? parameters[4] : layer == 1 ? parameters[6] : parameters[8];
      const float* bias = layer == 0 ? parameters[5] : layer == 1 ? parameters[7] : parameters[9];
      float* result = layer == 0 ? w.hidden1 + first * kHidden1 : layer == 1 ? w.hidden2 + first * kHidden2 : logits;
      float* hidden = layer == 0 ? s.hidden1 : s.hidden2;
      if constexpr (kImages == 1) {
        linear_image(in, depth, weight, layer == 0 ? kept : KeptRows<float>{}, bias, outputs, layer < 2, partial,
                     hidden, result);
      } else {
        linear_images<kImages / 2>(in, kImages, present, depth, weight, bias, outputs, layer < 2, partial, hidden,
                                   result);
      }
      in = hidden;
    }
    if constexpr (kImages == 1) __syncthreads();
    // A warp for an image's loss and another for whether its answer is right; kImages is at most 4.
    const int lane = thread % 32, image = thread / 32 % kImages, of_image = thread / 32 / kImages;
    const float* const outputs = logits + image * classes;
    float* const gradient = s.region + image * classes;
    if (of_image == 0 && image < present) {
      const float loss = row_loss(call.loss, first + image, classes, divisor, outputs, gradient);
      if (lane == 0) w.losses[first + image] = loss;
      for (int c = lane; c < classes; c += 32) w.grad_logits[(first + image) * classes + c] = gradient[c];
    } else if (of_image == 0) {
      for (int c = lane; c < classes; c += 32) gradient[c] = 0;
    } else if (of_image == 1 && image < present) {
      const bool right = is_right(call.loss, first + image, classes, outputs);
      if (lane == 0) w.right[first + image] = right ? 1.0f : 0.0f;
    }
    if constexpr (kImages > 1) __syncthreads();
    linear_backward<kImages>(s.region, present, classes, parameters, kept, static_cast<const float*>(s.hidden1),
                             static_cast<const float*>(s.hidden2), w.backward.grad_hidden1 + first * kHidden1,
                             w.backward.grad_hidden2 + first * kHidden2, s.features);
    convolutions_backward<First, kImages>(
        s.region, s.pixels, s.pooled1, s.features, weights2, s.indices1, s.indices2, present, first == slice_begin,
        w.backward.partials1 + int64_t{blockIdx.x} * kSums1<First>, w.backward.partials2 + int64_t{blockIdx.x} * kSums2,
        [](int, const float (&)[4]) {});
  }
}

// The block adds up losses and right answers, always in the same order. `shared`: two values for each warp.
__device__ __forceinline__ void sum_rows(const LenetStep& call, const StepWorkspace& w, float* shared) {
  constexpr unsigned kWarps = kThreads / 32;
  float loss = 0, right = 0;
  for (int64_t row = threadIdx.x; row < call.batch; row += kThreads) loss += w.losses[row], right += w.right[row];
  loss = lx::warp_sum(loss), right = lx::warp_sum(right);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = loss, shared[kWarps + threadIdx.x / 32] = right;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned warp = 1; warp < kWarps; ++warp) loss += shared[warp], right += shared[kWarps + warp];
  *call.mean_loss = w.losses[call.batch] == 0 ? NAN : loss;  // PyTorch's 0 / 0, where every target is ignored
  *call.correct = static_cast<int64_t>(right);               // exact: far fewer rows than 2^24
}

// The last block adds up what the rows have, the others the gradients. Shared memory: 24 KB.
__global__ void __launch_bounds__(kThreads, 2)
    lenet_step_update_kernel(LenetStep call, WeightSums<float, float> sums, int64_t slices, StepWorkspace w) {
  LX_SMEM(shared);
  if (blockIdx.x + 1 == gridDim.x) {
    sum_rows(call, w, lx::take<float>(shared, 2 * kThreads / 32));
    return;
  }
  sums.compute(static_cast<int>(blockIdx.x), call.batch, slices, shared,
               [&](int parameter, int64_t at, float gradient) {
                 if (call.optimizer == Optimizer::kSgd) {
                   sgd(call.updates[parameter], call.parameters[parameter], at, gradient);
                 } else {
                   adam(call.updates[parameter], call.optimizer == Optimizer::kAdamW, w.corrections[parameter],
                        call.parameters[parameter], at, gradient);
                 }
               });
}

template <typename First>
LaunchResult step(const LenetStep& call, cudaStream_t stream) {
  LaunchResult result;
  if (call.batch == 0) return result;
  const int64_t slices = lx::divide_up(call.batch, call.slice_images);
  const StepWorkspace w(call.workspace, call.batch, First::kIn, call.classes, slices);
  // Of a pass: as many as the slice has and as fit.
  const int images = call.slice_images > 2 && lx::fits_shared_memory(StepPass<First, 4>::shared_bytes())   ? 4
                     : call.slice_images > 1 && lx::fits_shared_memory(StepPass<First, 2>::shared_bytes()) ? 2
                                                                                                           : 1;
  // Asynchronous copies need compute capability 8.0.
  const bool keeps = images == 1 && lx::compiled_capability(lenet_step_data_kernel<First, 1>) >= 80;
  const int64_t room = keeps ? lx::most_shared_bytes() - StepPass<First, 1>::shared_bytes() : 0;
  const int kept_rows = static_cast<int>(std::clamp<int64_t>(room / KeptRows<float>::bytes(1), 0, kHidden1));
  lx::launch(result, "lenet_step_data_kernel",
             images == 1   ? lenet_step_data_kernel<First, 1>
             : images == 2 ? lenet_step_data_kernel<First, 2>
                           : lenet_step_data_kernel<First, 4>,
             static_cast<unsigned>(slices), images == 1 ? kPassThreads<1> : kThreads,
             images == 1   ? StepPass<First, 1>::shared_bytes() + KeptRows<float>::bytes(kept_rows)
             : images == 2 ? StepPass<First, 2>::shared_bytes()
                           : StepPass<First, 4>::shared_bytes(),
             stream, call, w, kept_rows);
  const WeightSums<float, float> sums(w.backward, First::kIn, w.grad_logits, static_cast<int>(call.classes), w.features,
                                      w.hidden1, w.hidden2);
  lx::launch(result, "lenet_step_update_kernel", lenet_step_update_kernel, static_cast<unsigned>(sums.blocks() + 1),
             kThreads, weight_shared_bytes(), stream, call, sums, slices, w);
  return result;
}

}  // namespace

bool has_lenet_step(DType dtype, int64_t channels, int64_t classes) {
  return dtype == DType::kFloat32 && (channels == Conv1::kIn || channels == ColourConv1::kIn) && classes >= 1 &&
         classes <= kMostClasses;
}

int64_t lenet_step_workspace(int64_t batch, int64_t in_channels, int64_t classes, int64_t slice_images) {
  return StepWorkspace(nullptr, batch, in_channels, classes, lx::divide_up(batch, slice_images)).bytes;
}

LaunchResult launch_lenet_step(const LenetStep& call, cudaStream_t stream) {
  return call.in_channels == 1 ? step<Conv1>(call, stream) : step<ColourConv1>(call, stream);
}

}  // namespace lenet_ext::cuda
