// Which algorithm runs a given shape: our own ("direct") kernel, or the vendor's library (ATen) with one pass of ours.
#pragma once

#include <c10/core/ScalarType.h>

#include "common/conv_pool_shape.h"

namespace lenet_ext {

enum class Algorithm { Direct, Vendor };

// LENET_EXT_ALGORITHM=direct|vendor forces one for everything (read once per process); used by the tests.
// `preferred` is what the cost rule says.
Algorithm choose_algorithm(Algorithm preferred);

// Does the vendor multiply bfloat16 by instructions made for it, at twice the rate of float32?
bool vendor_has_bfloat16();

// The cost rules, each with its reason beside it. `channels_last` is the layout of the input.
Algorithm conv_pool_forward_algorithm_cpu(const ConvPoolShape& shape, at::ScalarType dtype, bool channels_last);
Algorithm conv_pool_backward_algorithm_cpu(const ConvPoolShape& shape, at::ScalarType dtype);
Algorithm linear_algorithm_cpu(int64_t in_features, int64_t out_features);

}  // namespace lenet_ext
