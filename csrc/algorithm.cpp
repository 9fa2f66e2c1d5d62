#include "algorithm.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <limits>
#include <optional>
#include <string>

namespace lenet_ext {
namespace {

std::optional<Algorithm> forced() {
  const char* value = std::getenv("LENET_EXT_ALGORITHM");
  if (value == nullptr || *value == '\0') return std::nullopt;
  if (std::string(value) == "direct") return Algorithm::Direct;
  if (std::string(value) == "vendor") return Algorithm::Vendor;
  TORCH_CHECK(false, "lenet_ext: LENET_EXT_ALGORITHM must be direct or vendor, got '", value, "'");
}

}  // namespace

Algorithm choose_algorithm(Algorithm preferred) {
  static const std::optional<Algorithm> choice = forced();
  return choice.value_or(preferred);
}

Algorithm conv_pool_algorithm_cpu(const ConvPoolShape& s) {
  // Offsets inside an image, and of a kernel in the packed weights, are 32-bit.
  const double image =
      double(s.in_channels) * (s.height + s.pad_top + s.pad_bottom) * (s.width + s.pad_left + s.pad_right + s.stride_w);
  const double kernels = double(s.out_channels) * (s.in_channels / s.groups) *
                         (s.kernel_h + 2.0 * s.pool_kernel_h * s.pool_dilation_h * s.stride_h) *
                         (s.kernel_w + 2.0 * s.pool_kernel_w * s.pool_dilation_w * s.stride_w + 64);
  if (image > std::numeric_limits<int32_t>::max() / 2 || kernels > std::numeric_limits<int32_t>::max() / 2) {
    return Algorithm::Vendor;
  }
  // The lanes are output channels of one group: with few of them most of each vector is idle.
  const int64_t group_channels = s.out_channels / s.groups;
  if (s.groups > 1 && group_channels < 4) return choose_algorithm(Algorithm::Vendor);
  // Many channels: the vendor's blocking for the caches is at its best, and pooling is a small part of the work.
  const int64_t depth = s.in_channels / s.groups * s.kernel_h * s.kernel_w;
  return choose_algorithm(depth > 1200 ? Algorithm::Vendor : Algorithm::Direct);
}

Algorithm linear_algorithm_cpu(int64_t in_features, int64_t out_features) {
  // A weight that fits into the L2 cache needs no blocking over it, which is what the vendor's GEMM is better at.
  return choose_algorithm(in_features * out_features <= (int64_t{1} << 17) ? Algorithm::Direct : Algorithm::Vendor);
}

}  // namespace lenet_ext
