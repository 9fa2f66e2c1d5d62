// Where the output of LeNet's first convolution lies in shared memory, for the kernels that feed it to the tensor
// cores: a pixel's channels are together, in 16 bits in 16 bytes, in TF32 in 16 bytes in each of two planes.
//
// Pairs of rows are 5 modulo 8 apart, images 1 modulo 8, so that any 8 windows of conv2 in a row, which are two rows or
// columns apart, lie in different banks, even over the ends of rows and images.
//
// Where a lane of conv1 stores three channels at once, they are 0 1 2 - 3 4 5 -, and what a warp stores at once lies in
// different banks, too: in 16 bits, where it stores halves of pixels, because odd columns begin at 4 modulo 8; in TF32,
// because they begin at 6 and planes at 4 modulo 8. In 16 bits one pixel of each image belongs to none of its places,
// and none is behind the end of a row.
#pragma once

#include "lenet_tiles.cuh"

namespace lenet_ext::cuda {

// The next number that is 4 modulo 8: vectors of 16 bytes so far apart, and any four neighbours in each, come from
// different banks.
LX_DEVICE constexpr int vectors_apart(int vectors) { return (vectors + 3) / 8 * 8 + 4; }

constexpr int kVectorBytes = 16;

// kHasSpare: there is a pixel behind the end of each row, for what nobody wants.
template <bool kHasSpare>
struct PixelPlaces {
  static constexpr bool kSpare = kHasSpare;
  static constexpr int kRowPair = kSpare ? 37 : 29, kOddRow = kSpare ? 8 : 7, kOddColumn = kSpare ? 20 : 14;
  static constexpr int kImage = kSpare ? 265 : 209, kUnused = 16;  // in pixels; kUnused where there are spare ones

  static LX_DEVICE constexpr int at(int row, int column) {
    return row / 2 * kRowPair + row % 2 * kOddRow + column % 2 * kOddColumn + column / 2;
  }
};
template <typename T>
using PixelLayout = PixelPlaces<sizeof(T) == 2>;

template <typename L>
constexpr bool fits_its_banks() {
  return L::kRowPair % 8 == 5 && L::kImage % 8 == 1 && L::kOddColumn % 8 == (L::kSpare ? 4 : 6) &&
         L::at(Conv2::kSize - 1, Conv2::kSize - 1) + 1 < L::kImage;
}
static_assert(fits_its_banks<PixelPlaces<true>>() && fits_its_banks<PixelPlaces<false>>());

// The slot of an input channel of conv2.
LX_DEVICE constexpr int slot_of(int channel) { return channel / 3 * 4 + channel % 3; }

}  // namespace lenet_ext::cuda
