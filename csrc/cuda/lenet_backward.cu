// The gradients of LeNet's parameters in two launches, in float32 arithmetic on the ordinary units: first image by
// image down to conv1, with the convolutions' weight gradients on the way, then the linear layers' weight gradients,
// which are sums over the whole batch. No sum depends on the GPU or on the order of blocks. What passes from layer to
// layer and from launch to launch is float32 whatever the storage type.
#include "lenet_grad_tiles.cuh"
#include "slice_sums.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = kGradThreads;
constexpr int kFeatures = Conv2::kPooled, kHidden1 = 120, kHidden2 = 84, kMostClasses = 128;
constexpr int kSums1 = Conv1::kOut * (Conv1::kWeights + 1);  // weight and bias gradients of conv1: 156
constexpr int kSums2 = Conv2::kOut * (Conv2::kWeights + 1);  // of conv2: 2416

// What the first launch leaves for the second.
struct Workspace {
  float *grad_hidden1, *grad_hidden2;  // [batch, 120] and [batch, 84], of the values before ReLU
  float *partials1, *partials2;        // [slices, 156] and [slices, 2416]
  int64_t bytes;

  Workspace(void* begin, int64_t batch, int64_t slices) {
    const int64_t counts[] = {batch * kHidden1, batch * kHidden2, slices * kSums1, slices * kSums2};
    float** const parts[] = {&grad_hidden1, &grad_hidden2, &partials1, &partials2};
    bytes = 0;
    for (int i = 0; i < 4; bytes += lx::taken<float>(counts[i]), ++i) {
      *parts[i] = reinterpret_cast<float*>(static_cast<unsigned char*>(begin) + (begin == nullptr ? 0 : bytes));
    }
  }
};

// ---------------------------------------------------------------------------------------------------- first launch

constexpr int largest(int a, int b, int c = 0) { return a > b ? (a > c ? a : c) : (b > c ? b : c); }

// The shared memory of a pass over `kImages` images.
template <int kImages>
struct Pass {
  // One region of shared memory holds, one after the other:
  // - the gradients of the linear layers' outputs, and partial sums [parts][images][inputs] of those of their inputs;
  static constexpr int kLinearGradients = kImages * (kMostClasses + kHidden2 + kHidden1);
  static constexpr int kLinearFloats = kLinearGradients + kImages * 4 * static_cast<int>(kThreads);
  // - the gradients of conv2's outputs for its weights;
  static constexpr int kWeightFloats = kImages * Conv2::kMap + Conv2GradWeight::kOtherFloats;
  // - what the gradient of its input needs;
  // - the sums of conv1's weight gradient.
  static constexpr int kRegionFloats =
      largest(largest(kLinearFloats, kWeightFloats), GradInput<kImages>::kFloats, Conv1GradWeight::kReducedFloats);
  static constexpr int64_t shared_bytes() {
    return lx::taken<float>(Conv2::kOut * Conv2::kWeights) + lx::taken<float>(kImages * Conv1::kImage) +
           lx::taken<float>(kImages * Conv1::kPooled) + lx::taken<float>(kImages * kFeatures) +
           lx::taken<float>(kRegionFloats);
  }
};

// The block computes the gradient of a linear layer's inputs, [images][inputs] in `grad_input` (shared) and in `result`
// (global, may be null), from that of its outputs (shared); 0 where `mask` (global, may be null), the layer's input
// behind a ReLU, is not above 0.
//
// thread -> 4 inputs of all images and a part of the outputs. The weights come straight from L2, 16 bytes of a row at a
// time, neighbouring threads next to each other. The parts are added in order, through `partial` (shared).
template <int kImages, typename T>
__device__ __forceinline__ void linear_grad_images(const float* grad_output, int present, int outputs,
                                                   const T* __restrict__ weight, int inputs, const T* __restrict__ mask,
                                                   float* partial, float* grad_input, float* __restrict__ result) {
  const int packs = inputs / 4, parts = static_cast<int>(kThreads) / packs;
  const int pack = static_cast<int>(threadIdx.x) % packs, part = static_cast<int>(threadIdx.x) / packs;
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
  for (int i = threadIdx.x; i < kImages * inputs; i += kThreads) {
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

// block -> one slice of the batch, `kImages` images at a time. From the logits' gradient through the linear layers to
// that of the features, then, with what lies between in shared memory alone, conv2's weight gradient, the gradient of
// its input, conv1's weight gradient. After each pass the weight gradients are added to the slice's partial sums in
// global memory, each by the thread that wrote it before: together they would not fit the registers, and a pass costs
// some 30,000 cycles. Shared memory: 93 KB with 4 images, 40 KB with one; two blocks per multiprocessor.
template <typename T, int kImages>
__global__ void __launch_bounds__(kThreads, 2)
    lenet_backward_data_kernel(LenetBackwardOf<T> call, Workspace workspace) {
  using P = Pass<kImages>;
  LX_SMEM(shared);
  float* weights2 = lx::take<float>(shared, Conv2::kOut * Conv2::kWeights);  // turned
  float* pixels = lx::take<float>(shared, kImages * Conv1::kImage);
  float* pooled1 = lx::take<float>(shared, kImages * Conv1::kPooled);  // later its gradient
  float* grad_features = lx::take<float>(shared, kImages * kFeatures);
  float* region = lx::take<float>(shared, P::kRegionFloats);
  turn_weights(weights2, call.parameters[2]);

  const int thread = static_cast<int>(threadIdx.x);
  const int classes = static_cast<int>(call.classes);
  const int64_t slice_begin = blockIdx.x * call.slice_images;
  const int64_t slice_end = slice_begin + call.slice_images < call.batch ? slice_begin + call.slice_images : call.batch;
#pragma unroll 1
  for (int64_t first = slice_begin; first < slice_end; first += kImages) {
    const int present = static_cast<int>(slice_end - first < kImages ? slice_end - first : kImages);
    const bool first_pass = first == slice_begin;
    __syncthreads();  // the last pass is done with the shared memory
    {
      // The linear layers. One copy of the code for the three, as in the forward pass.
      float* gradient = region;
      float* partial = region + P::kLinearGradients;
      for (int i = thread; i < kImages * classes; i += kThreads) {
        gradient[i] = i < present * classes ? lx::widen(call.grad_output[first * classes + i]) : 0.0f;
      }
      lx::copy_to_shared(pixels, call.input + first * Conv1::kImage, present * Conv1::kImage);
      lx::copy_to_shared(pooled1, call.pooled1 + first * Conv1::kPooled, present * Conv1::kPooled);
      __syncthreads();
#pragma unroll 1
      for (int layer = 2; layer >= 0; --layer) {
        const int outputs = layer == 2 ? classes : layer == 1 ? kHidden2 : kHidden1;
        const int inputs = layer == 2 ? kHidden2 : layer == 1 ? kHidden1 : kFeatures;
        const T* weight = layer == 2 ? call.parameters[8] : layer == 1 ? call.parameters[6] : call.parameters[4];
        const T* mask = layer == 2 ? call.hidden2 : layer == 1 ? call.hidden1 : nullptr;
        float* result = layer == 2 ? workspace.grad_hidden2 : layer == 1 ? workspace.grad_hidden1 : nullptr;
        float* next = layer == 0 ? grad_features : gradient + kImages * (layer == 2 ? kMostClasses : kHidden2);
        linear_grad_images<kImages>(gradient, present, outputs, weight, inputs,
                                    mask == nullptr ? nullptr : mask + first * inputs, partial, next,
                                    result == nullptr ? nullptr : result + first * inputs);
        gradient = next;
      }
    }

    const uint8_t* indices2 = call.indices2 + first * Conv2::kPooled;
    {  // conv2's weights
      float *maps = region, *other_lane = region + kImages * Conv2::kMap;
      expand_maps(maps, grad_features, indices2, present);
      __syncthreads();
      Conv2GradWeight gradient;
      gradient.add(pooled1, maps, present);
      float* partial = workspace.partials2 + int64_t{blockIdx.x} * kSums2;
      gradient.finish(other_lane, [&](int at, float sum) { partial[at] = first_pass ? sum : partial[at] + sum; });
    }
    __syncthreads();

    GradInput<kImages>::compute(region, grad_features, indices2, present, weights2, [&](int at, float value) {
      pooled1[at] = value;
      if (call.grad_pooled1 != nullptr) call.grad_pooled1[first * Conv1::kPooled + at] = lx::narrow<T>(value);
    });
    __syncthreads();

    {  // conv1's weights
      Conv1GradWeight gradient;
      gradient.add(pixels, pooled1, call.indices1 + first * Conv1::kPooled, present);
      float* partial = workspace.partials1 + int64_t{blockIdx.x} * kSums1;
      gradient.finish(region, [&](int at, float sum) { partial[at] = first_pass ? sum : partial[at] + sum; });
    }
  }
}

// --------------------------------------------------------------------------------------------------- second launch

constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16, kColumns = 32;  // of the tile of a weight gradient that a block computes
constexpr int kDepth = 128;               // images that are in shared memory at once
constexpr int kRowPacks = kDepth * kRows / 4 / kThreads,
              kColumnPacks = kDepth * kColumns / 4 / kThreads;  // of a thread

// A linear layer: grad_weight[i][j] = sum over n of grad[n][i] * input[n][j], grad_bias[i] = sum over n of grad[n][i].
// The last layer's `grad` comes from outside, as T; the others' from the first launch.
template <typename G, typename T>
struct LinearSums {
  const G* grad;   // [batch, rows]
  const T* input;  // [batch, columns]
  int rows, columns;
  T *grad_weight, *grad_bias;

  LX_DEVICE int column_tiles() const { return lx::divide_up(columns, kColumns); }
  LX_DEVICE int tiles() const { return lx::divide_up(rows, kRows) * column_tiles(); }
};

// The sums over the slices of a convolution, [channel][taps, bias].
template <typename T>
struct ConvolutionSums {
  const float* partials;
  int sums, taps;
  T *grad_weight, *grad_bias;

  LX_DEVICE int blocks() const { return lx::divide_up(sums, kSumsOfBlock); }
};

constexpr int64_t weight_shared_bytes() {
  const int64_t tiles = lx::taken<float>(kDepth * kRows) + lx::taken<float>(kDepth * kColumns);
  const int64_t sums = lx::taken<float>(kWarps * kRows * kColumns) + lx::taken<float>(kWarps * kRows);
  return tiles > sums ? tiles : sums;
}

// A thread's share of rows [first, first + kDepth) and columns [column, column + kWidth) of a matrix: kPacks packs of
// four, 0 outside of the matrix. Between fetch and put lies the product of the rows before.
template <typename T, int kWidth, int kPacks>
struct Tile {
  lx::Pack<T, 4> packs[kPacks];

  LX_DEVICE void fetch(const T* __restrict__ matrix, int64_t first, int64_t rows, int column, int columns) {
    const bool whole = columns % 4 == 0 && lx::aligned_for_packs(matrix);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int pack = static_cast<int>(threadIdx.x + i * kThreads);
      const int64_t row = first + pack / (kWidth / 4);
      const int from = column + pack % (kWidth / 4) * 4;
      packs[i] = {};
      if (row >= rows || from >= columns) continue;
      if (whole) {
        packs[i] = lx::load_pack<4>(matrix + row * columns + from);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) packs[i].values[k] = from + k < columns ? matrix[row * columns + from + k] : T{};
      }
    }
  }
  LX_DEVICE void put(float* tile) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      *reinterpret_cast<lx::Pack<float, 4>*>(tile + (threadIdx.x + i * kThreads) * 4) = {
          {lx::widen(packs[i][0]), lx::widen(packs[i][1]), lx::widen(packs[i][2]), lx::widen(packs[i][3])}};
    }
  }
};

// The block computes tile `tile` of a linear layer's weight gradient. Warp w takes every eighth image; the warps' sums
// are added in order. lane -> 4 x 4 outputs, 2 loads of 16 bytes for 16 multiply-adds. The next 128 images are on
// their way from L2 while these are multiplied.
template <typename G, typename T>
__device__ __forceinline__ void linear_sums(const LinearSums<G, T>& job, int64_t batch, int block,
                                            unsigned char* shared) {
  unsigned char* const begin = shared;
  float* row_tile = lx::take<float>(shared, kDepth * kRows);  // [image][row]
  float* column_tile = lx::take<float>(shared, kDepth * kColumns);
  shared = begin;
  float* partial = lx::take<float>(shared, kWarps * kRows * kColumns);
  float* partial_bias = lx::take<float>(shared, kWarps * kRows);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = block / job.column_tiles() * kRows, column = block % job.column_tiles() * kColumns;
  const bool bias = column == 0;
  float sums[4][4] = {}, bias_sum = 0;
  Tile<G, kRows, kRowPacks> rows;
  Tile<T, kColumns, kColumnPacks> columns;
  rows.fetch(job.grad, 0, batch, row, job.rows);
  columns.fetch(job.input, 0, batch, column, job.columns);
#pragma unroll 1
  for (int64_t first = 0; first < batch; first += kDepth) {
    __syncthreads();  // the last readers of the shared memory are done
    rows.put(row_tile);
    columns.put(column_tile);
    __syncthreads();
    rows.fetch(job.grad, first + kDepth, batch, row, job.rows);
    columns.fetch(job.input, first + kDepth, batch, column, job.columns);
    const int present = static_cast<int>(batch - first < kDepth ? batch - first : kDepth);
#pragma unroll 4
    for (int n = warp; n < present; n += kWarps) {
      const lx::Pack<float, 4> a = lx::load_pack<4>(row_tile + n * kRows + lane / 8 * 4);
      const lx::Pack<float, 4> b = lx::load_pack<4>(column_tile + n * kColumns + lane % 8 * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
      }
    }
    if (bias && lane < kRows) {
      for (int n = warp; n < present; n += kWarps) bias_sum += row_tile[n * kRows + lane];
    }
  }

  __syncthreads();  // the tiles become the partial sums
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<lx::Pack<float, 4>*>(partial + (warp * kRows + lane / 8 * 4 + i) * kColumns +
                                           lane % 8 * 4) = {{sums[i][0], sums[i][1], sums[i][2], sums[i][3]}};
  }
  if (lane < kRows) partial_bias[warp * kRows + lane] = bias_sum;
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
    const int r = row + i / kColumns, c = column + i % kColumns;
    if (r >= job.rows || c >= job.columns) continue;
    float value = 0;
    for (int w = 0; w < kWarps; ++w) value += partial[w * kRows * kColumns + i];
    job.grad_weight[r * job.columns + c] = lx::narrow<T>(value);
  }
  const int bias_row = row + static_cast<int>(threadIdx.x);
  if (bias && threadIdx.x < kRows && bias_row < job.rows) {
    float value = 0;
    for (int w = 0; w < kWarps; ++w) value += partial_bias[w * kRows + threadIdx.x];
    job.grad_bias[bias_row] = lx::narrow<T>(value);
  }
}

template <typename T>
struct Jobs {
  LinearSums<float, T> hidden[2];
  LinearSums<T, T> last;
  ConvolutionSums<T> convolution[2];
};

// block -> a tile of a linear layer's weight gradient, or 32 sums of a convolution's. Shared memory: 24 KB.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    lenet_backward_weight_kernel(int64_t batch, int64_t slices, Jobs<T> jobs) {
  LX_SMEM(shared);
  const int block = static_cast<int>(blockIdx.x);
  const int end0 = jobs.hidden[0].tiles(), end1 = end0 + jobs.hidden[1].tiles(), end2 = end1 + jobs.last.tiles();
  const int end3 = end2 + jobs.convolution[0].blocks();
  if (block < end1) {
    const bool first = block < end0;
    linear_sums(first ? jobs.hidden[0] : jobs.hidden[1], batch, block - (first ? 0 : end0), shared);
  } else if (block < end2) {
    linear_sums(jobs.last, batch, block - end1, shared);
  } else {
    const ConvolutionSums<T>& job = block < end3 ? jobs.convolution[0] : jobs.convolution[1];
    const int first = (block - (block < end3 ? end2 : end3)) * kSumsOfBlock;
    sum_slices(job.partials, slices, job.sums, first, lx::take<float>(shared, kThreads), [&](int64_t at, float sum) {
      const int channel = static_cast<int>(at) / (job.taps + 1), tap = static_cast<int>(at) % (job.taps + 1);
      *(tap < job.taps ? job.grad_weight + channel * job.taps + tap : job.grad_bias + channel) = lx::narrow<T>(sum);
    });
  }
}

// ---------------------------------------------------------------------------------------------------------- launchers

template <typename T>
LenetBackwardOf<T> typed(const LenetBackwardOf<void>& call) {
  LenetBackwardOf<T> of{};
  of.batch = call.batch, of.classes = call.classes, of.slice_images = call.slice_images;
  of.grad_output = static_cast<const T*>(call.grad_output), of.input = static_cast<const T*>(call.input);
  of.pooled1 = static_cast<const T*>(call.pooled1), of.indices1 = call.indices1;
  of.pooled2 = static_cast<const T*>(call.pooled2), of.indices2 = call.indices2;
  of.hidden1 = static_cast<const T*>(call.hidden1), of.hidden2 = static_cast<const T*>(call.hidden2);
  for (int i = 0; i < 10; ++i) {
    of.parameters[i] = static_cast<const T*>(call.parameters[i]), of.gradients[i] = static_cast<T*>(call.gradients[i]);
  }
  of.grad_pooled1 = static_cast<T*>(call.grad_pooled1), of.workspace = call.workspace;
  return of;
}

template <typename T>
LaunchResult backward(const LenetBackwardOf<void>& untyped, cudaStream_t stream) {
  LaunchResult result;
  if (untyped.batch == 0) return result;
  const LenetBackwardOf<T> call = typed<T>(untyped);
  const int64_t slices = lx::divide_up(call.batch, call.slice_images);
  const Workspace w(call.workspace, call.batch, slices);
  // Of a pass: as many as the slice has and as fit.
  const int images = call.slice_images > 2 && lx::fits_shared_memory(Pass<4>::shared_bytes())   ? 4
                     : call.slice_images > 1 && lx::fits_shared_memory(Pass<2>::shared_bytes()) ? 2
                                                                                                : 1;
  lx::launch(result, "lenet_backward_data_kernel",
             images == 1   ? lenet_backward_data_kernel<T, 1>
             : images == 2 ? lenet_backward_data_kernel<T, 2>
                           : lenet_backward_data_kernel<T, 4>,
             static_cast<unsigned>(slices), kThreads,
             images == 1   ? Pass<1>::shared_bytes()
             : images == 2 ? Pass<2>::shared_bytes()
                           : Pass<4>::shared_bytes(),
             stream, call, w);

  const int classes = static_cast<int>(call.classes);
  T* const* g = call.gradients;
  const Jobs<T> jobs = {
      {{w.grad_hidden1, call.pooled2, kHidden1, kFeatures, g[4], g[5]},
       {w.grad_hidden2, call.hidden1, kHidden2, kHidden1, g[6], g[7]}},
      {call.grad_output, call.hidden2, classes, kHidden2, g[8], g[9]},
      {{w.partials2, kSums2, Conv2::kWeights, g[2], g[3]}, {w.partials1, kSums1, Conv1::kWeights, g[0], g[1]}}};
  const int blocks = jobs.hidden[0].tiles() + jobs.hidden[1].tiles() + jobs.last.tiles() +
                     jobs.convolution[0].blocks() + jobs.convolution[1].blocks();
  lx::launch(result, "lenet_backward_weight_kernel", lenet_backward_weight_kernel<T>, static_cast<unsigned>(blocks),
             kThreads, weight_shared_bytes(), stream, call.batch, slices, jobs);
  return result;
}

}  // namespace

bool has_lenet_backward(DType dtype, int64_t channels, int64_t classes) {
  return dtype != DType::kFloat64 && channels == Conv1::kIn && classes >= 1 && classes <= kMostClasses;
}

int64_t lenet_backward_slice_images(int64_t batch) { return Slices(batch).images; }

int64_t lenet_backward_workspace(int64_t batch, int64_t slice_images) {
  return Workspace(nullptr, batch, batch == 0 ? 0 : lx::divide_up(batch, slice_images)).bytes;
}

LaunchResult launch_lenet_backward(DType dtype, const LenetBackwardOf<void>& call, cudaStream_t stream) {
  LENET_DISPATCH(dtype, backward, call, stream)
}

}  // namespace lenet_ext::cuda
