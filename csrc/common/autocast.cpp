// Autocast: the operators take their arguments in the lower precision, as stock's convolution and linear do. The
// network as a whole goes layer by layer, which is what stock's layers would do: each casts its own.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "conv_relu_max_pool2d/calls.h"
#include "linear/calls.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using call::Ints;
using call::OptionalTensor;

// Casts floating tensors of the device, but for float64; a parameter's copy is kept until the outermost autocast ends.
template <at::DeviceType device>
class Cast {
 public:
  Tensor operator()(const Tensor& tensor) const {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
  }
  OptionalTensor operator()(const OptionalTensor& tensor) const {
    return tensor.has_value() ? OptionalTensor((*this)(*tensor)) : std::nullopt;
  }

 private:
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{at::autocast::get_autocast_dispatch_key_from_device_type(device)};
};

template <at::DeviceType device>
Tensor conv_relu_max_pool2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Ints stride,
                            Ints padding, Ints dilation, int64_t groups, Ints pool_kernel_size, Ints pool_stride,
                            Ints pool_padding, Ints pool_dilation, bool ceil_mode) {
  const Cast<device> cast;
  return call::conv_relu_max_pool2d().call(cast(input), cast(weight), cast(bias), stride, padding, dilation, groups,
                                           pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode);
}

template <at::DeviceType device>
Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Cast<device> cast;
  return call::linear().call(cast(input), cast(weight), cast(bias));
}

template <at::DeviceType device>
Tensor linear_relu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Cast<device> cast;
  return call::linear_relu().call(cast(input), cast(weight), cast(bias));
}

template <at::DeviceType device>
void register_autocast(torch::Library& m) {
  m.impl("conv_relu_max_pool2d", TORCH_FN(conv_relu_max_pool2d<device>));
  m.impl("linear", TORCH_FN(linear<device>));
  m.impl("linear_relu", TORCH_FN(linear_relu<device>));
}

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, AutocastCPU, m) { register_autocast<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(lenet_ext, AutocastCUDA, m) { register_autocast<at::kCUDA>(m); }

}  // namespace lenet_ext
