#include "common/algorithm.h"

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

bool vendor_has_bfloat16() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16") != 0;
  return has;
#else
  return false;
#endif
}

Algorithm choose_algorithm(Algorithm preferred) {
  static const std::optional<Algorithm> choice = forced();
  return choice.value_or(preferred);
}

namespace {

// Offsets inside an image, and of a kernel in the packed weights, are 32-bit in our kernels.
bool offsets_fit(const ConvPoolShape& s) {
  const double image =
      double(s.in_channels) * (s.height + s.pad_top + s.pad_bottom) * (s.width + s.pad_left + s.pad_right + s.stride_w);
  const double kernels = double(s.out_channels) * (s.in_channels / s.groups) *
                         (s.kernel_h + 2.0 * s.pool_kernel_h * s.pool_dilation_h * s.stride_h) *
                         (s.kernel_w + 2.0 * s.pool_kernel_w * s.pool_dilation_w * s.stride_w + 64);
  constexpr double limit = std::numeric_limits<int32_t>::max() / 2;
  return image <= limit && kernels <= limit;
}

// The lanes are output channels of one group: with few of them most of each vector is idle.
bool lanes_idle(const ConvPoolShape& s) { return s.groups > 1 && s.out_channels / s.groups < 4; }

}  // namespace

// The numbers below are where the times of both algorithms crossed on the general shapes of benchmarks/.

Algorithm conv_pool_forward_algorithm_cpu(const ConvPoolShape& s, at::ScalarType dtype, bool channels_last) {
  if (!offsets_fit(s)) return Algorithm::Vendor;
  const int64_t channels = s.in_channels / s.groups, depth = channels * s.kernel_h * s.kernel_w;
  // The vendor's float32 kernels want channels_last, and are at their best where the channels fill vectors: what
  // pooling in registers saves is less than they gain by blocking for the caches, unless the input is laid out
  // otherwise and has to be converted.
  // The same holds for few channels and a large kernel, as long as the convolution's output stays in the cache.
  const double output = double(s.batch) * s.out_channels * s.conv_h * s.conv_w;
  const bool few_channels_cached = depth >= 256 && output <= 5e5;
  const bool nothing_to_convert = dtype == at::kFloat && channels_last && (channels >= 16 || few_channels_cached);
  const bool twice_as_fast = dtype == at::kBFloat16 && vendor_has_bfloat16() && channels >= 16;
  // So deep that blocking for the caches pays even in NCHW: at 1600 the vendor takes three quarters of our time.
  const int64_t deep = dtype == at::kFloat ? 1400 : 1700;
  const bool vendor = lanes_idle(s) || nothing_to_convert || twice_as_fast || depth > deep;
  return choose_algorithm(vendor ? Algorithm::Vendor : Algorithm::Direct);
}

Algorithm conv_pool_backward_algorithm_cpu(const ConvPoolShape& s, at::ScalarType dtype) {
  if (!offsets_fit(s)) return Algorithm::Vendor;
  const int64_t channels = s.in_channels / s.groups, depth = channels * s.kernel_h * s.kernel_w;
  const double positions = double(s.conv_h) * s.conv_w, winners = double(s.out_h) * s.out_w;
  // Visiting the winners one by one does about a third of the arithmetic per second that a dense product does, except
  // with few input channels, where neither is any good.
  const bool dense = channels >= 16 && 3 * winners > positions;
  // Each winner's kernel and its gradient are visited at random: they have to be in the cache.
  const bool out_of_cache = s.out_channels / s.groups * depth > int64_t{1} << 19;
  // Threads share images, or bands of them that are long in comparison with a window's reach: of large layers there
  // must be a few.
  const int64_t reach = (s.pool_kernel_h - 1) * s.pool_dilation_h * s.stride_h + (s.kernel_h - 1) * s.dilation_h;
  const double bands = s.out_h / (4.0 * reach / (s.pool_stride_h * s.stride_h) + 1);
  const bool indivisible = s.batch * bands < 2.5 && 4 * winners * s.out_channels * depth > 50e6;
  const bool twice_as_fast = dtype == at::kBFloat16 && vendor_has_bfloat16() && channels >= 16;
  const bool vendor = lanes_idle(s) || dense || out_of_cache || indivisible || twice_as_fast;
  return choose_algorithm(vendor ? Algorithm::Vendor : Algorithm::Direct);
}

Algorithm linear_algorithm_cpu(int64_t in_features, int64_t out_features) {
  // A weight that fits into the L2 cache needs no blocking over it, which is what the vendor's GEMM is better at.
  return choose_algorithm(in_features * out_features <= (int64_t{1} << 17) ? Algorithm::Direct : Algorithm::Vendor);
}

}  // namespace lenet_ext
