#include "relu_avg_pool2d/shape.h"

#include <limits>

#include "common/checks.h"
#include "common/pooled_size.h"

namespace lenet_ext {
namespace {

void check_options(const char* op, const AvgPoolOptions& o) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  struct Pair {
    const char* name;
    at::IntArrayRef values;
    int64_t least;
  };
  for (const Pair& pair :
       {Pair{"kernel_size", o.kernel_size, 1}, Pair{"stride", o.stride, 1}, Pair{"padding", o.padding, 0}}) {
    TORCH_CHECK(pair.values.size() == 2, op, ": ", pair.name, " must have 2 elements, got ", pair.values);
    for (int64_t value : pair.values) {
      TORCH_CHECK(value >= pair.least, op, ": ", pair.name, " should be ",
                  pair.least == 0 ? "at least zero" : "greater than zero", ", but got ", pair.values);
      TORCH_CHECK(value <= limit, op, ": ", pair.name, " must be at most ", limit, ", got ", pair.values);
    }
  }
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(o.padding[i] <= o.kernel_size[i] / 2, op,
                ": padding should be smaller than or equal to half of kernel_size=", o.kernel_size, ", but got ",
                o.padding);
  }
  TORCH_CHECK(o.divisor_override != 0, op, ": divisor_override must be not zero");
}

}  // namespace

AvgPoolShape check_relu_avg_pool2d(const char* op, const at::Tensor& input, const AvgPoolOptions& o) {
  check_same_device_and_dtype(op, {{"input", input}});
  check_options(op, o);
  TORCH_CHECK(input.dim() == 4, op, ": input must be 4-D (batch, channels, height, width), got shape ", input.sizes());
  AvgPoolShape s{};
  s.batch = input.size(0), s.channels = input.size(1), s.height = input.size(2), s.width = input.size(3);
  TORCH_CHECK(s.channels > 0 && s.height > 0 && s.width > 0, op,
              ": input may be empty in its batch dimension alone, got shape ", input.sizes());
  s.kernel_h = o.kernel_size[0], s.kernel_w = o.kernel_size[1];
  s.stride_h = o.stride[0], s.stride_w = o.stride[1];
  s.pad_h = o.padding[0], s.pad_w = o.padding[1];
  s.out_h = pooled_size(s.height, s.kernel_h, s.stride_h, s.pad_h, 1, o.ceil_mode);
  s.out_w = pooled_size(s.width, s.kernel_w, s.stride_w, s.pad_w, 1, o.ceil_mode);
  TORCH_CHECK(s.out_h > 0 && s.out_w > 0, op, ": kernel_size=", o.kernel_size, " with padding=", o.padding,
              " is too large for input of shape ", input.sizes(), ": output size is too small");
  s.count_include_pad = o.count_include_pad;
  s.divisor_override = o.divisor_override.value_or(0);
  s.channels_last = output_memory_format(input) == at::MemoryFormat::ChannelsLast;
  return s;
}

AvgPoolShape check_relu_avg_pool2d_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& input,
                                            const AvgPoolOptions& options) {
  check_same_device_and_dtype(op, {{"grad_output", grad_output}, {"input", input}});
  const AvgPoolShape s = check_relu_avg_pool2d(op, input, options);
  const int64_t expected[] = {s.batch, s.channels, s.out_h, s.out_w};
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(expected), op, ": grad_output must have shape ",
              at::IntArrayRef(expected), ", got ", grad_output.sizes());
  return s;
}

}  // namespace lenet_ext
