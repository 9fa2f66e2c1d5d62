// Where the output of LeNet's first convolution lies in shared memory, for the kernels that feed it to the tensor cores
// in 16 bits: a pixel's 16 bytes hold the channels 0 1 2 - 3 4 5 -.
//
// Pairs of rows are 5 modulo 8 apart, images 1 modulo 8, so that any 8 windows of conv2 in a row, which are two rows or
// columns apart, lie in different banks, even over the ends of rows and images; odd columns begin at 4 modulo 8, so
// that what a warp of conv1 stores at once does, too. One pixel of each image belongs to none of its places.
#pragma once

#include "lenet_tiles.cuh"

namespace lenet_ext::cuda {

constexpr int kPixelBytes = 16;
constexpr int kRowPair = 37, kOddRow = 8, kOddColumn = 20, kImagePixels = 265, kUnusedPixel = 16;  // in pixels
static_assert(kRowPair % 8 == 5 && kImagePixels % 8 == 1 && kOddColumn % 8 == 4);

LX_DEVICE constexpr int pixel_at(int row, int column) {
  return row / 2 * kRowPair + row % 2 * kOddRow + column % 2 * kOddColumn + column / 2;
}
static_assert(pixel_at(Conv2::kSize - 1, Conv2::kSize - 1) + 1 < kImagePixels);

// The slot of an input channel of conv2.
LX_DEVICE constexpr int slot_of(int channel) { return channel / 3 * 4 + channel % 3; }

}  // namespace lenet_ext::cuda
