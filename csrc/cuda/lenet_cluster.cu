// LeNet from the image to the logits in one launch, for few images: a cluster of blocks computes each of them together,
// in float32 arithmetic on the ordinary units, whatever the storage type.
//
// With one block an image most of the GPU is idle, and all 240 KB of weights pass through one multiprocessor. Here each
// block takes some rows of conv1's output, some channels of conv2's and some outputs of each linear layer, with the
// weights of those alone, and writes what it has computed into the shared memory of all blocks, rounded to the storage
// type. Every sum has the order of lenet.cu, so that in float32 an image's logits are bit by bit the same in a batch of
// any size. In 16 bits this is about fetching weights as well: tensor cores would wait for them just the same.
#include "async_copy.cuh"
#include "cluster.cuh"
#include "lenet_tiles.cuh"

namespace lenet_ext::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kParts = 4;     // into which the sum over a linear layer's inputs is cut
constexpr int kColumns = 64;  // outputs of a linear layer that a block computes at most
static_assert(kParts * kColumns == static_cast<int>(kThreads), "a thread for each part of an output");
constexpr int kMostClasses = 2 * kColumns;  // in the smallest cluster

// From row to row of a linear layer's weights in shared memory: an odd number of 16-byte units, so that the eight rows
// which a quarter of a warp reads at once lie in different banks.
template <typename T>
constexpr int pitch_of(int depth) {
  constexpr int kUnit = 16 / sizeof(T);
  return (depth + kUnit - 1) / kUnit / 2 * 2 * kUnit + kUnit;
}

// Begins to copy one value to where it is needed as a float; 16 bits are converted at once.
template <typename T>
LX_DEVICE void copy_value(float* to, const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    lx::copy_async<4>(to, from);
  } else {
    *to = lx::widen(*from);
  }
}

// The part of `total` things that a block of the cluster has.
template <int kBlocks>
struct Share {
  int begin, count;
  LX_DEVICE Share(int total, int rank)
      : begin(total * rank / kBlocks), count(total * (rank + 1) / kBlocks - total * rank / kBlocks) {}
  static LX_DEVICE constexpr int most(int total) { return (total + kBlocks - 1) / kBlocks; }
};

// A block's part of a linear layer in shared memory.
template <typename T, int kBlocks, int kDepth>
struct LinearPart {
  static constexpr int kPitch = pitch_of<T>(kDepth), kRowBytes = kDepth * static_cast<int>(sizeof(T));
  static constexpr int kCopied = kRowBytes % 16 == 0 ? 16 : 8;  // bytes at once
  static_assert(kRowBytes % kCopied == 0);
  Share<kBlocks> outputs;
  T* weights;
  float* biases;

  static int64_t shared_bytes(int outputs) {
    const int most = Share<kBlocks>::most(outputs);
    return lx::taken<T>(most * kPitch) + lx::taken<float>(most);
  }

  LX_DEVICE LinearPart(int total, int rank, unsigned char*& shared)
      : outputs(total, rank),
        weights(lx::take<T>(shared, Share<kBlocks>::most(total) * kPitch)),
        biases(lx::take<float>(shared, Share<kBlocks>::most(total))) {}

  LX_DEVICE void load(const T* weight, const T* bias) {
    constexpr int kElements = kCopied / static_cast<int>(sizeof(T)), kCopies = kDepth / kElements;
    weight += outputs.begin * kDepth;
    for (int i = threadIdx.x; i < outputs.count * kCopies; i += kThreads) {
      lx::copy_async<kCopied>(weights + i / kCopies * kPitch + i % kCopies * kElements, weight + i * kElements);
    }
    for (int i = threadIdx.x; i < outputs.count; i += kThreads) copy_value(biases + i, bias + outputs.begin + i);
  }

  // Hands each of the block's outputs to store(output, value), in one thread. in: [kDepth]; partial: [kThreads]; both
  // shared. thread -> a quarter of the sum of one output.
  template <typename Store>
  __device__ __forceinline__ void compute(const float* in, float* partial, Store store) const {
    constexpr int kShare = (kDepth + 4 * kParts - 1) / (4 * kParts) * 4;
    const int column = static_cast<int>(threadIdx.x) % kColumns, part = static_cast<int>(threadIdx.x) / kColumns;
    if (column < outputs.count) {
      const T* row = weights + column * kPitch;
      const int end = (part + 1) * kShare < kDepth ? (part + 1) * kShare : kDepth;
      float sum = 0;
#pragma unroll 4
      for (int k = part * kShare; k < end; k += 4) {
        const lx::Pack<T, 4> w = lx::load_pack<4>(row + k);
        const lx::Pack<float, 4> a = lx::load_pack<4>(in + k);
#pragma unroll
        for (int step = 0; step < 4; ++step) sum += a[step] * lx::widen(w[step]);
      }
      partial[threadIdx.x] = sum;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < outputs.count) {
      float value = biases[column];
#pragma unroll
      for (int p = 0; p < kParts; ++p) value += partial[p * kColumns + column];
      store(outputs.begin + column, value);
    }
  }
};

template <typename T, int kBlocks>
struct ClusterShared {
  static constexpr int kRows = Share<kBlocks>::most(Conv1::kPool);       // of conv1's pooled output
  static constexpr int kPixels = (2 * kRows + kTap - 1) * Conv1::kSize;  // under them
  static constexpr int kChannels = Conv2::kOut / kBlocks;                // of conv2's output

  static int64_t bytes(int classes) {
    return lx::taken<float>(Conv1::kOut * Conv1::kWeights) + lx::taken<float>(Conv1::kOut) +
           lx::taken<float>(kChannels * Conv2::kWeights) + lx::taken<float>(kChannels) + lx::taken<float>(kPixels) +
           lx::taken<float>(Conv1::kPooled) + lx::taken<float>(kFeatures) + lx::taken<float>(kHidden1) +
           lx::taken<float>(kHidden2) + lx::taken<float>(kThreads) +
           LinearPart<T, kBlocks, kFeatures>::shared_bytes(kHidden1) +
           LinearPart<T, kBlocks, kHidden1>::shared_bytes(kHidden2) +
           LinearPart<T, kBlocks, kHidden2>::shared_bytes(classes);
  }
};

// cluster -> one image at a time, until the batch is done. What the threads do: conv1, a window and two channels;
// conv2, a window and a channel. All that is read from global memory is asked for at the beginning, the linear layers'
// weights last: they arrive while the convolutions compute. Shared memory: 41 KB with 8 blocks and 10 classes, 133 KB
// with 2, less in 16 bits. Bound to 64 registers; without a bound the compiler takes 48 in one case, and spills.
template <typename T, int kBlocks>
__global__ void __launch_bounds__(kThreads, 4) lenet_forward_cluster_kernel(LenetForwardOf<T> call) {
  using Shared = ClusterShared<T, kBlocks>;
  constexpr int kChannels = Shared::kChannels;
  const int rank = static_cast<int>(blockIdx.x % kBlocks), thread = static_cast<int>(threadIdx.x);
  const Share<kBlocks> rows(Conv1::kPool, rank);
  const int first_channel = rank * kChannels;

  LX_SMEM(shared);
  float* weights1 = lx::take<float>(shared, Conv1::kOut * Conv1::kWeights);  // [tap][out]
  float* biases1 = lx::take<float>(shared, Conv1::kOut);
  float* weights2 = lx::take<float>(shared, kChannels * Conv2::kWeights);  // [in][tap][out], the block's part
  float* biases2 = lx::take<float>(shared, kChannels);
  float* pixels = lx::take<float>(shared, Shared::kPixels);  // the rows under the block's part
  float* pooled1 = lx::take<float>(shared, Conv1::kPooled);  // from here to hidden2 the same in all blocks
  float* features = lx::take<float>(shared, kFeatures);
  float* hidden1 = lx::take<float>(shared, kHidden1);
  float* hidden2 = lx::take<float>(shared, kHidden2);
  float* partial = lx::take<float>(shared, kThreads);
  LinearPart<T, kBlocks, kFeatures> fc1(kHidden1, rank, shared);
  LinearPart<T, kBlocks, kHidden1> fc2(kHidden2, rank, shared);
  LinearPart<T, kBlocks, kHidden2> fc3(static_cast<int>(call.classes), rank, shared);

  auto load_pixels = [&](int64_t image) {
    const T* from = call.input + image * Conv1::kImage + 2 * rows.begin * Conv1::kSize;
    const int count = (2 * rows.count + kTap - 1) * Conv1::kSize;
    if constexpr (std::is_same_v<T, float>) {
      lx::copy_floats_async(pixels, from, count);
    } else {
      lx::copy_to_shared(pixels, from, count);
    }
  };
  auto store_everywhere = [](float* to, T value) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) lx::cluster_store(to, block, lx::widen(value));
  };

  const int64_t first = blockIdx.x / kBlocks, stride = gridDim.x / kBlocks;
  load_pixels(first);
  for (int i = thread; i < Conv1::kOut * Conv1::kWeights; i += kThreads) {
    copy_value(weights1 + i, call.parameters[0] + i % Conv1::kOut * Conv1::kWeights + i / Conv1::kOut);
  }
  for (int i = thread; i < kChannels * Conv2::kWeights; i += kThreads) {
    copy_value(weights2 + i, call.parameters[2] + (first_channel + i % kChannels) * Conv2::kWeights + i / kChannels);
  }
  if (thread < Conv1::kOut) copy_value(biases1 + thread, call.parameters[1] + thread);
  if (thread < kChannels) copy_value(biases2 + thread, call.parameters[3] + first_channel + thread);
  lx::end_copy_group();
  fc1.load(call.parameters[4], call.parameters[5]);
  fc2.load(call.parameters[6], call.parameters[7]);
  fc3.load(call.parameters[8], call.parameters[9]);
  lx::end_copy_group();
  lx::wait_for_copies<1>();
  lx::cluster_barrier();

#pragma unroll 1
  for (int64_t image = first; image < call.batch; image += stride) {
    constexpr int kPairs = Conv1::kOut / 2;
    const int windows = rows.count * Conv1::kPool;
    for (int item = thread; item < windows * kPairs; item += kThreads) {
      const int window = item % windows, channel = item / windows * 2;
      const float* const corner[1] = {pixels + window / Conv1::kPool * 2 * Conv1::kSize + window % Conv1::kPool * 2};
      float sums[1][4][2];
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[0][i / 2][i % 2] = biases1[channel + i % 2];
      add_plane<1, 2, Conv1::kOut>(sums, corner, Conv1::kSize, weights1 + channel);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const auto winner = pool_tile<true>(sums[0], c);
        const int at = (channel + c) * Conv1::kWindows + rows.begin * Conv1::kPool + window;
        const T value = lx::narrow<T>(winner.pooled());
        store_everywhere(pooled1 + at, value);
        if (call.pooled1 == nullptr) continue;
        call.pooled1[image * Conv1::kPooled + at] = value;
        call.indices1[image * Conv1::kPooled + at] = winner.code();
      }
    }
    lx::cluster_barrier();

    if (image + stride < call.batch) load_pixels(image + stride);
    lx::end_copy_group();
    if (thread < kChannels * Conv2::kWindows) {
      const int window = thread % Conv2::kWindows, channel = thread / Conv2::kWindows;
      const float* corner = pooled1 + window / Conv2::kPool * 2 * Conv2::kSize + window % Conv2::kPool * 2;
      float sums[1][4][1];
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][i][0] = biases2[channel];
#pragma unroll 1
      for (int c = 0; c < Conv2::kIn; ++c) {
        const float* const plane[1] = {corner + c * Conv2::kSize * Conv2::kSize};
        add_plane<1, 1, kChannels>(sums, plane, Conv2::kSize, weights2 + c * kTaps * kChannels + channel);
      }
      const auto winner = pool_tile<true>(sums[0], 0);
      const int at = (first_channel + channel) * Conv2::kWindows + window;
      const T value = lx::narrow<T>(winner.pooled());
      store_everywhere(features + at, value);
      if (call.pooled2 != nullptr) {
        call.pooled2[image * Conv2::kPooled + at] = value;
        call.indices2[image * Conv2::kPooled + at] = winner.code();
      }
    }
    lx::wait_for_copies<0>();
    lx::cluster_barrier();

    auto activated = [](float sum) { return lx::narrow<T>(sum <= 0 ? 0 : sum); };  // NaN passes
    fc1.compute(features, partial, [&](int output, float sum) {
      const T value = activated(sum);
      store_everywhere(hidden1 + output, value);
      if (call.hidden1 != nullptr) call.hidden1[image * kHidden1 + output] = value;
    });
    lx::cluster_barrier();
    fc2.compute(hidden1, partial, [&](int output, float sum) {
      const T value = activated(sum);
      store_everywhere(hidden2 + output, value);
      if (call.hidden2 != nullptr) call.hidden2[image * kHidden2 + output] = value;
    });
    lx::cluster_barrier();
    fc3.compute(hidden2, partial,
                [&](int output, float sum) { call.output[image * call.classes + output] = lx::narrow<T>(sum); });
  }
}

// As many clusters as find a place at once on the largest GPU, with a block for each multiprocessor.
constexpr int kMostBlocks = 128;

template <typename T, int kBlocks>
void launch_with(LaunchResult& result, const LenetForwardOf<T>& call, cudaStream_t stream) {
  const int64_t rounds = lx::divide_up<int64_t>(call.batch, kMostBlocks / kBlocks);
  const int64_t clusters = lx::divide_up(call.batch, rounds);
  lx::launch_clusters(result, "lenet_forward_cluster_kernel", lenet_forward_cluster_kernel<T, kBlocks>,
                      static_cast<unsigned>(clusters * kBlocks), kBlocks, kThreads,
                      ClusterShared<T, kBlocks>::bytes(static_cast<int>(call.classes)), stream, call);
}

template <typename T>
LaunchResult forward(const LenetForwardOf<void>& call, int blocks, cudaStream_t stream) {
  LaunchResult result;
  if (call.batch == 0) return result;
  const LenetForwardOf<T> of = typed<T>(call);
  if (blocks == 8) launch_with<T, 8>(result, of, stream);
  if (blocks == 4) launch_with<T, 4>(result, of, stream);
  if (blocks == 2) launch_with<T, 2>(result, of, stream);
  return result;
}

template <typename T>
int cluster_blocks(int64_t batch, int64_t classes) {
  if (!lx::has_clusters(lenet_forward_cluster_kernel<T, 2>)) return 0;
  if (batch <= kMostBlocks / 8) return 8;
  if (batch <= kMostBlocks / 4) return 4;
  return lx::fits_shared_memory(ClusterShared<T, 2>::bytes(static_cast<int>(classes))) ? 2 : 0;
}

}  // namespace

int lenet_cluster_blocks(DType dtype, int64_t batch, int64_t channels, int64_t classes) {
  // Measured in float32 on an H100 at commit e811d08: 10.5 us for an image by eight blocks, 15.4 for 64 by two each, 27
  // for 256 by lenet.cu. So what blocks divide among them is some 13 us of one, and a second round of clusters of two,
  // which finds its weights there, half of that. Predicted: 22 us for 128 images, which lenet.cu takes 25 for
  // (benchmarks/gpu/kernel_times.md); a third round would come to 29, for up to 192 images.
  constexpr int64_t kMostImages = 128;
  if (dtype == DType::kFloat64 || channels != Conv1::kIn || classes < 1 || classes > kMostClasses) return 0;
  if (batch > kMostImages) return 0;
  LENET_DISPATCH(dtype, cluster_blocks, batch, classes)
}

LaunchResult launch_lenet_cluster_forward(DType dtype, const LenetForwardOf<void>& call, int blocks,
                                          cudaStream_t stream) {
  LENET_DISPATCH(dtype, forward, call, blocks, stream)
}

}  // namespace lenet_ext::cuda
