// The layout of outputs.
#pragma once

#include <ATen/core/Tensor.h>

namespace lenet_ext {

// channels_last input gives channels_last output, everything else contiguous.
inline at::MemoryFormat output_memory_format(const at::Tensor& input) {
  return !input.is_contiguous() && input.suggest_memory_format() == at::MemoryFormat::ChannelsLast
             ? at::MemoryFormat::ChannelsLast
             : at::MemoryFormat::Contiguous;
}

}  // namespace lenet_ext
