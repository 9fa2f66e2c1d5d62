// LeNet's forward pass with images in the lanes: as many images as a vector has lanes pass through all layers before
// the next ones start, so that every lane is full in every layer, all loads are aligned, and activations stay in the L2
// cache. Weights are broadcast straight from where the layers hold them: each is used once per `lanes` images.
//
// An accumulator tile is `channels` output channels x the 4 positions of one pooling window (convolutions), or
// `outputs` outputs (linear layers): 24 or 12 registers. The window is reduced in registers; only pooled values are
// stored, and for training the codes of the winners. What training keeps is transposed to an image after the other.
#include "lenet_kernels.h"

#include "../common/conv_pool_shape.h"
#include "transpose.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

constexpr int kImages = kLanes<float>;
using V = Vec<float, kImages>;
using Codes = IntVec<float, kImages>;
// With AVX2 the kernels of the single convolutions are faster where winners are kept.
constexpr bool kKeepsWinners = kImages != 8;
// A winner's code until it is transposed: a byte with AVX-512, which has an instruction for that.
template <int images>
struct StoredCode {
  using type = int32_t;
};
template <>
struct StoredCode<16> {
  using type = uint8_t;
};
using Code = StoredCode<kImages>::type;

constexpr int kKernel = 5, kImageSize = 32, kPooled1 = 14, kPooled2 = 5;
constexpr int kChannels1 = 6, kChannels2 = 16, kHidden1 = 120, kHidden2 = 84;
constexpr int kOutputs1 = kChannels1 * kPooled1 * kPooled1, kFeatures = kChannels2 * kPooled2 * kPooled2;

// With AVX2 sums, window and weight of a tap fill the 16 registers, and a value that the next tap needs again is
// cheaper loaded again than kept. Without fused multiply-adds the arithmetic is all that counts.
constexpr bool kLoadsAgain = kImages == 8;
constexpr int kChannelTile = kRegisters == 32 ? 6 : kLoadsAgain ? 2 : 3;
constexpr int kOutputTile = kRegisters == 32 ? 24 : 12;

// in [in_channels][size][size][lanes] -> out, codes [channels][size'][size'][lanes], `channels` of the layer's output
// channels.
template <int channels, int in_channels, int size, bool training>
void conv_tile(const float* in, const float* weight, const float* bias, float* out, Code* codes) {
  constexpr int pooled = (size - kKernel + 1) / 2, depth = in_channels * kKernel * kKernel;
  for (int y = 0; y < pooled; ++y) {
    for (int x = 0; x < pooled; ++x) {
      V sum[channels][4] = {};
      // The winner is that of the sums with the bias, which may be equal where those without are not.
      if constexpr (training) {
        LENET_EXT_UNROLL for (int o = 0; o < channels; ++o) {
          LENET_EXT_UNROLL for (int i = 0; i < 4; ++i)
            sum[o][i] = broadcast<V>(bias[o]);
        }
      }
      for (int c = 0; c < in_channels; ++c) {
        const float* row = in + ((c * size + 2 * y) * size + 2 * x) * kImages;
        const float* taps = weight + c * kKernel * kKernel;
        for (int ky = 0; ky < kKernel; ++ky, row += size * kImages, taps += kKernel) {
          LENET_EXT_UNROLL for (int kx = 0; kx < kKernel; ++kx) {
            const float* values = row + kx * kImages;
            if constexpr (kLoadsAgain) forget_origin(values);
            const V window[4] = {load<V>(values), load<V>(values + kImages), load<V>(values + size * kImages),
                                 load<V>(values + (size + 1) * kImages)};
            LENET_EXT_UNROLL for (int o = 0; o < channels; ++o) {
              const V w = broadcast<V>(taps[o * depth + kx]);
              LENET_EXT_UNROLL for (int i = 0; i < 4; ++i)
                sum[o][i] += w * window[i];
            }
          }
        }
      }
      LENET_EXT_UNROLL for (int o = 0; o < channels; ++o) {
        const int at = ((o * pooled + y) * pooled + x) * kImages;
        if constexpr (training) {
          V best = sum[o][0];
          Codes code{};
          LENET_EXT_UNROLL for (int i = 1; i < 4; ++i)
            offer(best, code, sum[o][i], i);
          close_relu(best, code, kDead);
          store(out + at, best);
          store(codes + at, __builtin_convertvector(code, Integers<Code, kImages>));
        } else {
          // Adding the bias after the maximum is the same: rounding is monotone.
          const V best = max_of_four(sum[o][0], sum[o][1], sum[o][2], sum[o][3]) + broadcast<V>(bias[o]);
          store(out + at, relu(best));
        }
      }
    }
  }
}

template <int first, int out_channels, int in_channels, int size, bool training>
LENET_EXT_INLINE void conv_layer(const float* in, const float* weight, const float* bias, float* out, Code* codes) {
  constexpr int pooled = (size - kKernel + 1) / 2, depth = in_channels * kKernel * kKernel;
  if constexpr (first < out_channels) {
    // Tiles of nearly equal size.
    constexpr int left = out_channels - first, tiles = (left + kChannelTile - 1) / kChannelTile;
    constexpr int channels = (left + tiles - 1) / tiles;
    constexpr int at = first * pooled * pooled * kImages;
    conv_tile<channels, in_channels, size, training>(in, weight + first * depth, bias + first, out + at, codes + at);
    conv_layer<first + channels, out_channels, in_channels, size, training>(in, weight, bias, out, codes);
  }
}

// in [depth][lanes] -> out [outputs][lanes].
template <int outputs, int depth, bool with_relu>
void linear_tile(const float* in, const float* weight, const float* bias, float* out) {
  V sum[outputs];
  LENET_EXT_UNROLL for (int o = 0; o < outputs; ++o)
    sum[o] = broadcast<V>(bias[o]);
  for (int k = 0; k < depth; ++k) {
    const V value = load<V>(in + k * kImages);
    LENET_EXT_UNROLL for (int o = 0; o < outputs; ++o)
      sum[o] += broadcast<V>(weight[o * depth + k]) * value;
  }
  LENET_EXT_UNROLL for (int o = 0; o < outputs; ++o)
    store(out + o * kImages, with_relu ? relu(sum[o]) : sum[o]);
}

template <int first, int outputs, int depth>
LENET_EXT_INLINE void hidden_layer(const float* in, const float* weight, const float* bias, float* out) {
  if constexpr (first < outputs) {
    constexpr int left = outputs - first, tiles = (left + kOutputTile - 1) / kOutputTile;
    constexpr int tile = (left + tiles - 1) / tiles;
    linear_tile<tile, depth, true>(in, weight + first * depth, bias + first, out + first * kImages);
    hidden_layer<first + tile, outputs, depth>(in, weight, bias, out);
  }
}

template <int in_channels>
struct Activations {
  alignas(64) float images[in_channels * kImageSize * kImageSize * kImages];
  float pooled1[kOutputs1 * kImages];
  Code codes[kOutputs1 * kImages];  // of one layer after the other
  float pooled2[kFeatures * kImages];
  float hidden1[kHidden1 * kImages];
  float hidden2[kHidden2 * kImages];
  float classes[10 * kImages];
};

template <int in_channels, bool training>
void run_unit(const LenetForward& job, int64_t first, Activations<in_channels>& a) {
  const int64_t count = min_of<int64_t>(kImages, job.batch - first);
  auto keep = [&](const auto* from, int64_t values, auto* to) {
    if constexpr (training) transpose_row<kImages>(from, values, kImages, count, to + first * values, values);
  };
  for (int pixel = 0; pixel < in_channels * kImageSize * kImageSize; pixel += kImages) {
    V rows[kImages];
    // The lanes of a last, incomplete unit repeat its last image.
    LENET_EXT_UNROLL for (int i = 0; i < kImages; ++i) {
      rows[i] = load<V>(job.input + (first + min_of<int64_t>(i, count - 1)) * job.image_stride + pixel);
    }
    transpose_tile<kImages>(rows);
    LENET_EXT_UNROLL for (int i = 0; i < kImages; ++i)
      store(a.images + (pixel + i) * kImages, rows[i]);
  }
  conv_layer<0, kChannels1, in_channels, kImageSize, training>(a.images, job.conv1_weight, job.conv1_bias, a.pooled1,
                                                               a.codes);
  keep(a.pooled1, kOutputs1, job.pooled1), keep(a.codes, kOutputs1, job.indices1);
  conv_layer<0, kChannels2, kChannels1, kPooled1, training>(a.pooled1, job.conv2_weight, job.conv2_bias, a.pooled2,
                                                            a.codes);
  keep(a.pooled2, kFeatures, job.pooled2), keep(a.codes, kFeatures, job.indices2);
  hidden_layer<0, kHidden1, kFeatures>(a.pooled2, job.fc1_weight, job.fc1_bias, a.hidden1);
  keep(a.hidden1, kHidden1, job.hidden1);
  hidden_layer<0, kHidden2, kHidden1>(a.hidden1, job.fc2_weight, job.fc2_bias, a.hidden2);
  keep(a.hidden2, kHidden2, job.hidden2);
  for (int64_t o = 0; o < job.classes;) {
    const float *weight = job.fc3_weight + o * kHidden2, *bias = job.fc3_bias + o;
    const int64_t tile = job.classes - o >= 10 ? 10 : 1;
    (tile == 10 ? linear_tile<10, kHidden2, false> : linear_tile<1, kHidden2, false>)(a.hidden2, weight, bias,
                                                                                      a.classes);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < tile; ++j) job.output[(first + i) * job.classes + o + j] = a.classes[j * kImages + i];
    }
    o += tile;
  }
}

template <int in_channels>
void run_units(const LenetForward& job, void* scratch, int64_t begin, int64_t end) {
  auto& activations = *static_cast<Activations<in_channels>*>(scratch);
  auto run = run_unit<in_channels, false>;
  if constexpr (kKeepsWinners) {
    if (job.pooled1 != nullptr) run = run_unit<in_channels, true>;
  }
  for (int64_t unit = begin; unit < end; ++unit) run(job, unit * kImages, activations);
}

void run(const LenetForward& job, void* scratch, int64_t begin, int64_t end) {
  (job.in_channels == 1 ? run_units<1> : run_units<3>)(job, scratch, begin, end);
}

int64_t scratch_bytes(int64_t in_channels) {
  return in_channels == 1 ? sizeof(Activations<1>) : sizeof(Activations<3>);
}

}  // namespace

extern const LenetKernels lenet_kernels;
const LenetKernels lenet_kernels = {kImages, kKeepsWinners, scratch_bytes, run};

}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
