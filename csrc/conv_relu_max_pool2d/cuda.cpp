// conv_relu_max_pool2d on CUDA: which algorithm, and the launches. Compiled only where nvcc is found.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "common/algorithm.h"
#include "common/cuda_host.h"
#include "common/precision.h"
#include "conv_relu_max_pool2d/host.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The cost rule. Predictions from counting (multiply-adds, bytes, launches): nobody has measured the crossovers yet;
// `make gpu-check` sweeps them.
Algorithm conv_pool_algorithm_cuda(const ConvPoolShape& s, cuda::DType dtype, bool backward) {
  // LeNet's two layers have kernels of their own, which never store the convolution's output.
  if (cuda::has_lenet_kernels(dtype, s)) return choose_algorithm(Algorithm::Direct);
  // A problem that takes less time than a launch (2 to 3 us): one launch of ours against the vendor's two or more. Our
  // general kernels do perhaps 1e12 multiply-adds a second forward, fewer backward.
  const double multiply_adds = double(s.batch) * s.out_channels * std::max(s.conv_h * s.conv_w, s.out_h * s.out_w) *
                               (s.in_channels / s.groups) * s.kernel_h * s.kernel_w;
  return choose_algorithm(multiply_adds <= (backward ? 1e6 : 4e6) ? Algorithm::Direct : Algorithm::Vendor);
}

// Whether a layer of LeNet's takes less time in TF32 than in strict float32. Measured on an H100 at commit e811d08,
// microseconds of 64 and 4096 images: the first layer 5.1 and 28, strict 4.3 and 48, so that the lines cross at about
// 220 images; the second 6.9 and 31, strict 8.0 and 75. Forced to be direct, it is TF32, however slow.
bool tf32_is_faster(const ConvPoolShape& s) {
  constexpr int64_t kFewestImagesOfFirst = 256;
  const bool faster = s.in_channels != 1 || s.batch >= kFewestImagesOfFirst;
  return choose_algorithm(faster ? Algorithm::Direct : Algorithm::Vendor) == Algorithm::Direct;
}

// The same of the gradients, in 16 bits as well; predicted from counts, not measured (conv_relu_max_pool2d_lenet.cu,
// conv_relu_max_pool2d_lenet_gradients.cu, benchmarks/gpu/kernel_times.py). For 65536 images the second layer's take
// 270 us in 16 bits and 540 in TF32, strict 1,670; the first layer's 170 and 260, strict 520. From so many images on
// each block has two, and both of a multiprocessor's something to do: at most 12 and 17 us for the second layer, strict
// 25. What fewer would save is in doubt until somebody measures.
bool gradients_are_faster_on_tensor_cores(const ConvPoolShape& s) {
  constexpr int64_t kFewestImages = 512;
  return choose_algorithm(s.batch >= kFewestImages ? Algorithm::Direct : Algorithm::Vendor) == Algorithm::Direct;
}

struct ConvPoolCuda {
  // The kernels count positions inside a plane in 32 bits.
  static void check(const char* op, const ConvPoolShape& s) {
    constexpr int64_t limit = std::numeric_limits<int32_t>::max();
    const int64_t span_h = s.height + s.pad_top + s.pad_bottom + 2 * s.pool_pad_h + s.pool_kernel_h * s.pool_dilation_h;
    const int64_t span_w = s.width + s.pad_left + s.pad_right + 2 * s.pool_pad_w + s.pool_kernel_w * s.pool_dilation_w;
    TORCH_CHECK(span_h <= limit && span_w <= limit && span_h * span_w <= limit && s.in_channels <= limit &&
                    s.out_channels <= limit && s.kernel_h * s.kernel_w <= limit,
                op, ": input's padded planes must have fewer than 2^31 positions on CUDA, got ", s.height, " x ",
                s.width, " with padding");
    TORCH_CHECK(s.in_channels / s.groups * s.kernel_h * s.kernel_w < limit, op,
                ": weight must have fewer than 2^31 elements for each output channel on CUDA, got ",
                s.in_channels / s.groups, " x ", s.kernel_h, " x ", s.kernel_w);
  }

  static void forward(const char* op, const ConvPoolShape& s, const Tensor& input, const Tensor& weight,
                      const OptionalTensor& bias, const ConvPoolOptions& o, const Tensor& output,
                      const Tensor& indices) {
    const CudaScope scope(input);
    const cuda::DType dtype = cuda_dtype(op, input);
    const Tensor offset = bias.has_value() ? bias->contiguous() : Tensor();
    uint8_t* codes = indices.defined() ? indices.mutable_data_ptr<uint8_t>() : nullptr;
    if (conv_pool_algorithm_cuda(s, dtype, false) == Algorithm::Direct) {
      const Tensor kernel = weight.contiguous();
      const bool lenet = cuda::has_lenet_kernels(dtype, s) && output.is_contiguous();
      const Tensor images = lenet ? input.contiguous() : input;
      const cuda::ConvPoolForward call{s,
                                       images.const_data_ptr(),
                                       cuda_strides(images),
                                       kernel.const_data_ptr(),
                                       data_or_null(offset),
                                       output.mutable_data_ptr(),
                                       codes,
                                       cuda_strides(output)};
      // float32 is rounded to TF32 where stock's convolution may be, and where it is faster so.
      const bool tensor_cores = lenet &&
                                (dtype != cuda::DType::kFloat32 || (allows_tf32_convolutions() && tf32_is_faster(s))) &&
                                cuda::has_lenet_tensor_core_layer(dtype, s);
      check_launch(op,
                   tensor_cores ? cuda::launch_lenet_tensor_core_layer(dtype, call, scope.stream)
                                : cuda::launch_conv_pool_forward(dtype, call, scope.stream),
                   input);
    } else {
      const VendorConvolution v = vendor_convolution_input(input, o);
      const Tensor conv =
          at::convolution(v.input, weight, std::nullopt, o.stride, v.padding, o.dilation, false, {0, 0}, o.groups);
      const cuda::BiasReluPool call{
          s,     conv.const_data_ptr(), cuda_strides(conv), data_or_null(offset), output.mutable_data_ptr(),
          codes, cuda_strides(output)};
      check_launch(op, cuda::launch_bias_relu_pool(dtype, call, scope.stream), input);
    }
  }

  static LayerGradients backward(const char* op, const ConvPoolShape& s, const Tensor& grad_output,
                                 const Tensor& indices, const Tensor& input, const Tensor& weight,
                                 const ConvPoolOptions& o, GradientMask wanted) {
    const CudaScope scope(grad_output);
    const cuda::DType dtype = cuda_dtype(op, grad_output);
    const at::MemoryFormat format = output_memory_format(indices);
    const at::TensorOptions like = grad_output.options();
    const std::array<int64_t, 4> input_size = {s.batch, s.in_channels, s.height, s.width};
    const std::array<int64_t, 4> weight_size = {s.out_channels, s.in_channels / s.groups, s.kernel_h, s.kernel_w};
    LayerGradients gradients;
    if (wanted[2]) gradients.bias = at::empty({s.out_channels}, like);

    if (conv_pool_algorithm_cuda(s, dtype, true) == Algorithm::Direct) {
      if (wanted[0]) gradients.input = at::empty(input_size, like, format);
      if (wanted[1]) gradients.weight = at::empty(weight_size, like);
      const bool lenet = cuda::has_lenet_kernels(dtype, s) && format == at::MemoryFormat::Contiguous;
      // As in the forward pass.
      const bool tensor_cores = lenet && (dtype != cuda::DType::kFloat32 || allows_tf32_convolutions()) &&
                                gradients_are_faster_on_tensor_cores(s) &&
                                cuda::has_lenet_tensor_core_gradients(dtype, s);
      auto laid_out = [&](const Tensor& tensor) {
        return tensor_cores ? contiguous_and_aligned(tensor) : lenet ? tensor.contiguous() : tensor;
      };
      launch_backward(scope, s, op, laid_out(grad_output), laid_out(indices), wanted[1] ? laid_out(input) : Tensor(),
                      wanted[0] ? weight.contiguous() : Tensor(), gradients, tensor_cores);
      return gradients;
    }

    // The bias gradient needs the winners only, not the dense gradient that the vendor would read once more.
    if (wanted[2]) launch_backward(scope, s, op, grad_output, indices, Tensor(), Tensor(), {{}, {}, gradients.bias});
    if (wanted[0] || wanted[1]) {
      const Tensor grad_conv = at::empty({s.batch, s.out_channels, s.conv_h, s.conv_w}, like, format);
      const cuda::BiasReluPoolBackward call{s,
                                            grad_output.const_data_ptr(),
                                            cuda_strides(grad_output),
                                            indices.const_data_ptr<uint8_t>(),
                                            cuda_strides(indices),
                                            grad_conv.mutable_data_ptr(),
                                            cuda_strides(grad_conv)};
      check_launch(op, cuda::launch_bias_relu_pool_backward(dtype, call, scope.stream), grad_output);
      // The vendor wants both operands, although it does not read the values of one that is not needed.
      const VendorConvolution v = vendor_convolution_input(wanted[1] ? input : at::empty(input_size, like, format), o);
      const Tensor kernel = wanted[0] ? weight : at::empty(weight_size, like);
      auto [grad_input, grad_weight, unused] =
          at::convolution_backward(grad_conv, v.input, kernel, std::nullopt, o.stride, v.padding, o.dilation, false,
                                   {0, 0}, o.groups, {wanted[0], wanted[1], false});
      if (wanted[0]) gradients.input = crop_vendor_grad_input(grad_input, s, o).contiguous(format);
      if (wanted[1]) gradients.weight = grad_weight;
    }
    return gradients;
  }

  static void at_indices(const char* op, const ConvPoolShape& s, const Tensor& input, const Tensor& weight,
                         const OptionalTensor& bias, const Tensor& indices, const Tensor& output) {
    const CudaScope scope(input);
    const Tensor kernel = weight.contiguous(), offset = bias.has_value() ? bias->contiguous() : Tensor();
    const cuda::ConvAtIndices call{s,
                                   input.const_data_ptr(),
                                   cuda_strides(input),
                                   kernel.const_data_ptr(),
                                   data_or_null(offset),
                                   indices.const_data_ptr<uint8_t>(),
                                   output.mutable_data_ptr(),
                                   cuda_strides(output)};
    check_launch(op, cuda::launch_conv_at_indices(cuda_dtype(op, input), call, scope.stream), input);
  }

 private:
  // What `gradients` has not got is not wanted.
  static void launch_backward(const CudaScope& scope, const ConvPoolShape& s, const char* op, const Tensor& grad_output,
                              const Tensor& indices, const Tensor& input, const Tensor& weight,
                              const LayerGradients& gradients, bool tensor_cores = false) {
    const cuda::DType dtype = cuda_dtype(op, grad_output);
    Tensor workspace;
    if (gradients.weight.defined() || gradients.bias.defined()) {
      const int64_t bytes = cuda::conv_pool_backward_workspace(dtype, s, gradients.weight.defined());
      workspace = at::empty({bytes}, grad_output.options().dtype(at::kByte));
    }
    auto writable = [](const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; };
    const cuda::Strides4 contiguous{s.in_channels * s.height * s.width, s.height * s.width, s.width, 1};
    const cuda::ConvPoolBackward call{s,
                                      grad_output.const_data_ptr(),
                                      cuda_strides(grad_output),
                                      indices.const_data_ptr<uint8_t>(),
                                      cuda_strides(indices),
                                      data_or_null(input),
                                      input.defined() ? cuda_strides(input) : contiguous,
                                      data_or_null(weight),
                                      writable(gradients.input),
                                      gradients.input.defined() ? cuda_strides(gradients.input) : cuda::Strides4{},
                                      writable(gradients.weight),
                                      writable(gradients.bias),
                                      writable(workspace),
                                      tensor_cores ? cuda::lenet_tensor_core_backward_slice_images(s.batch) : 0};
    check_launch(op, cuda::launch_conv_pool_backward(dtype, call, scope.stream), grad_output);
  }
};

}  // namespace

Tensor conv_relu_max_pool2d_cuda(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                 const ConvPoolOptions& options, bool ceil_mode, Tensor* indices) {
  return ConvReluMaxPool2dHost<ConvPoolCuda>::forward(op, input, weight, bias, options, ceil_mode, indices);
}

LayerGradients conv_relu_max_pool2d_backward_cuda(const char* op, const Tensor& grad_output, const Tensor& indices,
                                                  const Tensor& input, const Tensor& weight, at::IntArrayRef input_size,
                                                  at::IntArrayRef weight_size, const ConvPoolOptions& options,
                                                  GradientMask wanted) {
  return ConvReluMaxPool2dHost<ConvPoolCuda>::backward(op, grad_output, indices, input, weight, input_size, weight_size,
                                                       options, wanted);
}

TORCH_LIBRARY_IMPL(lenet_ext, LENET_EXT_CUDA_KEY, m) { ConvReluMaxPool2dHost<ConvPoolCuda>::register_operators(m); }

}  // namespace lenet_ext
