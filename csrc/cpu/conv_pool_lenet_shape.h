// LeNet's two convolutions (5x5, 2x2 pooling, 1x32x32 or 3x32x32 -> 6 and 6x14x14 -> 16 channels): the sizes, which are
// constants, and how the weight gradients' sums lie. Kernels for them serve whoever calls conv_relu_max_pool2d with
// these shapes: the layers alone as well as the whole network.
#pragma once

#include "conv_pool_kernels.h"
#include "simd.h"

namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY {
namespace {

constexpr int kTaps = 25;
constexpr int kRow1 = 32, kSize1 = kRow1 * kRow1;      // a channel of the first convolution's input
constexpr int kChannels1 = 6, kPooled1 = 14 * 14;      // its output, the second's input
constexpr int kChannels2 = 16, kPooled2 = 5 * 5;       // the second's output
constexpr int kDepth2 = kChannels1 * kTaps;            // taps of one output channel of the second
constexpr int kRow2 = 14, kPixels2 = 14 * kChannels1;  // a row of its input; with the channels together
constexpr int kSlices = 32;                            // pieces of the batch with sums of their own

// The first convolution's sums: eight lanes for the five taps of each kernel row, then those of the gradients.
template <int in_channels>
constexpr int kSums1 = kChannels1 * in_channels * 5 * 8;
template <int in_channels>
constexpr int kPartial1 = kSums1<in_channels> + 16;
// The second's: 32 lanes for the 30 taps, channels together, of each kernel row; then those of the gradients.
constexpr int kSums2 = kChannels2 * 5 * 32;
constexpr int kPartial2 = kSums2 + kChannels2;

}  // namespace
}  // namespace lenet_ext::cpu::LENET_EXT_CPU_CAPABILITY
