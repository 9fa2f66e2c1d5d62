// The whole network in one call on the CPU.
//
// The forward pass takes as many images as a vector has lanes through all layers, then the next
// (cpu/lenet_kernels.cpp). Small batches, what is left of a large one, and with AVX2 all that are trained on go block
// by block: the convolutions an image at a time, the linear layers for the images of the block together. A pass over
// the batch is one parallel region; its blocks depend on the size of the batch alone, so the number of threads does not
// change a result. dtypes other than float32 go layer by layer.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <vector>

#include "common/algorithm.h"
#include "common/cpu_dispatch.h"
#include "common/parallel.h"
#include "lenet/host.h"
#include "lenet/optimizer_cpu.h"
#include "linear/parallel_gemm.h"

namespace lenet_ext {
namespace {

using at::Tensor;
using at::TensorList;

// Of an image; backward of the winners alone.
double forward_flops(int64_t in_channels) { return 598e3 + 235e3 * in_channels; }
double backward_flops(int64_t in_channels) { return 476e3 + 59e3 * in_channels; }

constexpr int64_t kPooled1 = kLenetPooled1, kFeatures = kLenetFeatures, kHidden1 = kLenetHidden1,
                  kHidden2 = kLenetHidden2;

constexpr LayerOperators kLayers{conv_relu_max_pool2d_cpu, conv_relu_max_pool2d_backward_cpu, linear_cpu,
                                 linear_backward_cpu};

// Rounded up to whole cache lines, in floats.
constexpr int64_t lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// A contiguous [channels, size, size] image with these extents, as the kernels of a convolution see it.
cpu::Strides4 image_strides(int64_t channels, int64_t size, int64_t image) {
  return {image, channels == 1 ? image : size * size, size, 1};
}

ConvPoolShape conv_shape(int64_t batch, int64_t in_channels, int64_t size, int64_t out_channels) {
  ConvPoolShape s{};
  s.batch = batch, s.in_channels = in_channels, s.height = s.width = size, s.out_channels = out_channels;
  s.kernel_h = s.kernel_w = 5, s.stride_h = s.stride_w = 1, s.dilation_h = s.dilation_w = 1, s.groups = 1;
  s.conv_h = s.conv_w = size - 4;
  s.pool_kernel_h = s.pool_kernel_w = 2, s.pool_stride_h = s.pool_stride_w = 2;
  s.pool_dilation_h = s.pool_dilation_w = 1;
  s.out_h = s.out_w = s.conv_h / 2;
  return s;
}

bool has_contiguous_images(const Tensor& input) {
  return input.stride(3) == 1 && input.stride(2) == 32 && (input.size(1) == 1 || input.stride(1) == 32 * 32);
}

// What the kernels need of the arguments of a call: contiguous parameters and images, and their addresses.
struct Arguments {
  int64_t batch, in_channels, classes, image_stride;
  Tensor images;
  std::array<c10::MaybeOwned<Tensor>, 10> kept;
  std::array<const float*, 10> p;
  const float* input;

  Arguments(const Tensor& given, TensorList parameters)
      : batch(given.size(0)),
        in_channels(given.size(1)),
        classes(parameters[8].size(0)),
        images(has_contiguous_images(given) ? given : given.contiguous()) {
    for (size_t i = 0; i < 10; ++i) {
      kept[i] = parameters[i].expect_contiguous();
      p[i] = cpu::data<float>(*kept[i]);
    }
    input = cpu::data<float>(images);
    image_stride = images.stride(0);
  }
};

bool has_kernels(const Tensor& input) {
  return input.scalar_type() == at::kFloat && (input.size(1) == 1 || input.size(1) == 3) &&
         choose_algorithm(Algorithm::Direct) == Algorithm::Direct;
}

// Where a block of images leaves its activations.
struct Activations {
  float* pooled1;
  uint8_t* indices1;  // null: not wanted
  float* pooled2;
  uint8_t* indices2;
  float *hidden1, *hidden2, *output;

  // Those of the images from `first` on, but for the output.
  Activations from(int64_t first) const {
    return {pooled1 + first * kPooled1,
            indices1 + first * kPooled1,
            pooled2 + first * kFeatures,
            indices2 + first * kFeatures,
            hidden1 + first * kHidden1,
            hidden2 + first * kHidden2,
            nullptr};
  }
};

// The forward pass of blocks of images.
class Blocks {
 public:
  // Few images make no use of transposed weights.
  Blocks(const Arguments& call, int64_t images)
      : call_(call), by_dot_products_(images <= cpu::gemm_table<float>().most_nt_rows(kFeatures)) {
    const auto& fixed = LENET_EXT_CPU_DISPATCH(conv_pool_lenet_kernels);
    const auto& general = cpu::conv_pool_table<float>().forward;
    const auto* fixed1 = fixed.first(call.in_channels).conv1.forward;
    conv_[0] = fixed1 != nullptr ? fixed1 : &general;
    conv_[1] = fixed.conv2.forward != nullptr ? fixed.conv2.forward : &general;
    const ConvPoolShape shapes[] = {conv_shape(1, call.in_channels, 32, 6), conv_shape(1, 6, 14, 16)};
    std::array<int64_t, 5> sizes{};  // in floats
    for (int i = 0; i < 2; ++i) sizes[i] = lines(conv_[i]->packed_bytes(shapes[i]) / 4 + 1);
    if (!by_dot_products_)
      sizes[2] = kHidden1 * kFeatures, sizes[3] = kHidden2 * kHidden1, sizes[4] = call.classes * kHidden2;
    int64_t total = 0;
    for (const int64_t size : sizes) total += lines(size);
    float* at = static_cast<float*>(cpu::shared_scratch(total * sizeof(float)));
    for (size_t i = 0; i < 5; ++i, at += lines(sizes[i - 1])) packed_[i] = at;
    for (int i = 0; i < 2; ++i) {
      cpu::ConvPoolForward<float> job{};
      job.shape = shapes[i], job.weight = call.p[2 * i], job.bias = call.p[2 * i + 1];
      conv_[i]->prepare(job, packed_[i]);
      conv_scratch_ = std::max(conv_scratch_, conv_[i]->scratch_bytes(shapes[i]));
    }
    if (by_dot_products_) return;
    const auto& gemm = cpu::gemm_table<float>();
    gemm.transpose(call.p[4], kHidden1, kFeatures, packed_[2]);
    gemm.transpose(call.p[6], kHidden2, kHidden1, packed_[3]);
    gemm.transpose(call.p[8], call.classes, kHidden2, packed_[4]);
  }

  int64_t conv_scratch() const { return conv_scratch_; }

  // The images from `first` on; `a` points to where the activations of the first of them go.
  void run(int64_t first, int64_t count, const Activations& a, void* scratch) const {
    const float* input = call_.input + first * call_.image_stride;
    convolution(0, conv_shape(count, call_.in_channels, 32, 6), input,
                image_strides(call_.in_channels, 32, call_.image_stride), a.pooled1, a.indices1,
                image_strides(6, 14, kPooled1), scratch);
    convolution(1, conv_shape(count, 6, 14, 16), a.pooled1, image_strides(6, 14, kPooled1), a.pooled2, a.indices2,
                image_strides(16, 5, kFeatures), scratch);
    linear(2, count, kFeatures, kHidden1, a.pooled2, true, a.hidden1);
    linear(3, count, kHidden1, kHidden2, a.hidden1, true, a.hidden2);
    linear(4, count, kHidden2, call_.classes, a.hidden2, false, a.output);
  }

 private:
  void convolution(int layer, const ConvPoolShape& s, const float* input, const cpu::Strides4& input_strides,
                   float* output, uint8_t* indices, const cpu::Strides4& output_strides, void* scratch) const {
    const cpu::ConvPoolForward<float> job{s,      input,   input_strides, call_.p[2 * layer], call_.p[2 * layer + 1],
                                          output, indices, output_strides};
    conv_[layer]->run(job, packed_[layer], scratch, 0, conv_[layer]->units(s));
  }

  void linear(int layer, int64_t rows, int64_t in, int64_t out, const float* input, bool relu, float* output) const {
    const auto& kernels = cpu::gemm_table<float>();
    const float *weight = call_.p[2 * layer], *bias = call_.p[2 * layer + 1];
    if (by_dot_products_) {
      const cpu::GemmNT<float> gemm{rows, out, in, input, weight, output, bias, relu};
      kernels.nt_run(gemm, 0, kernels.nt_units(gemm));
    } else {
      const cpu::Gemm<float> gemm{rows, out, in, input, in, 1, packed_[layer], out, output, out, bias, relu, false};
      kernels.run(gemm, 0, kernels.units(gemm));
    }
  }

  const Arguments& call_;
  bool by_dot_products_;
  std::array<const cpu::ConvPoolForwardKernels<float>*, 2> conv_;
  std::array<float*, 5> packed_;
  int64_t conv_scratch_ = 0;
};

constexpr int64_t kBlock = 4;       // images of a block: a row each of the dot products' tiles
constexpr int64_t kFewImages = 32;  // fewer are a small batch

// `all`: the activations of the whole batch; in inference the output alone, the others null.
void forward_pass(const Arguments& call, const Activations& all) {
  const bool training = all.pooled1 != nullptr;
  const auto& kernels = LENET_EXT_CPU_DISPATCH(lenet_kernels);
  // Whole vectors of images first, then what is left. In training a small batch has more units of work without them.
  const bool by_vectors = !training || (kernels.keeps_winners && call.batch >= kFewImages);
  const int64_t vectors = by_vectors ? call.batch / kernels.lanes : 0;
  const int64_t single_begin = vectors * kernels.lanes, single = call.batch - single_begin;
  const int64_t blocks = (single + kBlock - 1) / kBlock;
  const cpu::LenetForward job{call.batch,  call.in_channels, call.classes, call.input, call.image_stride, call.p[0],
                              call.p[1],   call.p[2],        call.p[3],    call.p[4],  call.p[5],         call.p[6],
                              call.p[7],   call.p[8],        call.p[9],    all.output, all.pooled1,       all.indices1,
                              all.pooled2, all.indices2,     all.hidden1,  all.hidden2};
  const int64_t scratch_bytes = kernels.scratch_bytes(call.in_channels);
  std::optional<Blocks> by_block;
  if (blocks > 0) by_block.emplace(call, single);
  const int64_t own = training ? 0 : lines(kBlock * (kPooled1 + kFeatures + kHidden1 + kHidden2));  // in floats
  cpu::parallel_units(vectors + blocks, forward_flops(call.in_channels) * call.batch, [&](int64_t begin, int64_t end) {
    if (begin < vectors) kernels.run(job, cpu::unit_scratch(scratch_bytes), begin, std::min(end, vectors));
    if (end <= vectors) return;
    float* scratch = static_cast<float*>(cpu::unit_scratch(own * sizeof(float) + by_block->conv_scratch()));
    for (int64_t unit = std::max(begin, vectors); unit < end; ++unit) {
      const int64_t first = single_begin + (unit - vectors) * kBlock;
      Activations a{};
      if (training) {
        a = all.from(first);
      } else {
        a.pooled1 = scratch, a.pooled2 = a.pooled1 + kBlock * kPooled1;
        a.hidden1 = a.pooled2 + kBlock * kFeatures, a.hidden2 = a.hidden1 + kBlock * kHidden1;
      }
      a.output = all.output + first * call.classes;
      by_block->run(first, std::min(kBlock, call.batch - first), a, scratch + own);
    }
  });
}

Tensor inference(const Tensor& input, TensorList parameters) {
  const Arguments call(input, parameters);
  const Tensor output = at::empty({call.batch, call.classes}, input.options());
  Activations all{};
  all.output = cpu::mutable_data<float>(output);
  forward_pass(call, all);
  return output;
}

LenetLayers training_forward(const Tensor& input, TensorList parameters) {
  const Arguments call(input, parameters);
  const int64_t batch = call.batch;
  const auto options = input.options(), codes = options.dtype(at::kByte);
  const LenetLayers l{at::empty({batch, call.classes}, options), at::empty({batch, 6, 14, 14}, options),
                      at::empty({batch, 6, 14, 14}, codes),      at::empty({batch, 16, 5, 5}, options),
                      at::empty({batch, 16, 5, 5}, codes),       at::empty({batch, kHidden1}, options),
                      at::empty({batch, kHidden2}, options)};
  forward_pass(call, {cpu::mutable_data<float>(l.pooled1), cpu::mutable_data<uint8_t>(l.indices1),
                      cpu::mutable_data<float>(l.pooled2), cpu::mutable_data<uint8_t>(l.indices2),
                      cpu::mutable_data<float>(l.hidden1), cpu::mutable_data<float>(l.hidden2),
                      cpu::mutable_data<float>(l.output)});
  return l;
}

// The gradients of the parameters in two passes: from the output down to the first convolution, slice by slice of the
// batch; then the weight gradients of the linear layers, which are sums over the whole batch. Returns false where an
// operand of a convolution is not finite (cpu/conv_pool_kernels.h says why).
bool blocks_backward(const Arguments& call, const float* grad_output, const LenetLayers& a,
                     const std::vector<Tensor>& gradients) {
  const auto& convolutions = LENET_EXT_CPU_DISPATCH(conv_pool_lenet_kernels);
  const auto& kernels = convolutions.first(call.in_channels);
  const auto& gemm = cpu::gemm_table<float>();
  const auto &first = *kernels.conv1.backward, &second = *convolutions.conv2.backward;
  const int64_t batch = call.batch, classes = call.classes;
  auto grad = [&](int i) { return cpu::mutable_data<float>(gradients[i]); };

  cpu::ConvPoolBackward<float> job1{}, job2{};
  job1.shape = conv_shape(batch, call.in_channels, 32, 6), job2.shape = conv_shape(batch, 6, 14, 16);
  const int64_t slices = first.units(job1.shape);
  const int64_t packed_size = lines(second.packed_bytes(job2.shape, true) / 4);
  const int64_t partial_size1 = lines(first.partial_bytes(job1.shape) / 4);
  const int64_t partial_size2 = lines(second.partial_bytes(job2.shape) / 4);
  const int64_t sizes[] = {packed_size,      slices * partial_size1, slices * partial_size2,
                           batch * kHidden2, batch * kHidden1,       batch * kFeatures};
  int64_t total = 0;
  for (const int64_t size : sizes) total += lines(size);
  const Tensor buffer = at::empty({total + 16}, call.images.options());
  std::array<float*, 6> part;
  float* at = cpu::mutable_data<float>(buffer);
  at += (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64 / sizeof(float);
  for (size_t i = 0; i < 6; at += lines(sizes[i]), ++i) part[i] = at;
  // Not a structured binding: those cannot be captured by the lambdas below before C++20, nor by OpenMP of Clang at
  // all.
  float *const packed = part[0], *const partials1 = part[1], *const partials2 = part[2];
  float *const grad_hidden2 = part[3], *const grad_hidden1 = part[4], *const grad_features = part[5];

  job1.input = call.input, job1.input_strides = image_strides(call.in_channels, 32, call.image_stride);
  job1.indices = cpu::data<uint8_t>(a.indices1), job1.indices_strides = image_strides(6, 14, kPooled1);
  job1.grad_weight = grad(0), job1.grad_bias = grad(1);
  job2.grad_output = grad_features, job2.grad_output_strides = image_strides(16, 5, kFeatures);
  job2.indices = cpu::data<uint8_t>(a.indices2), job2.indices_strides = job2.grad_output_strides;
  job2.input = cpu::data<float>(a.pooled1), job2.input_strides = job1.indices_strides;
  job2.weight = call.p[2], job2.grad_input = grad_features;
  job2.grad_weight = grad(2), job2.grad_bias = grad(3);
  if (!second.prepare(job2, packed)) return false;

  const float *hidden1 = cpu::data<float>(a.hidden1), *hidden2 = cpu::data<float>(a.hidden2);
  auto back = [&](int64_t rows, int64_t out, int64_t in, const float* from, const float* weight, float* to) {
    const cpu::Gemm<float> product{rows, in, out, from, out, 1, weight, in, to, in, nullptr, false, false};
    gemm.run(product, 0, gemm.units(product));
  };
  std::atomic<bool> finite{true};
  cpu::parallel_units(slices, backward_flops(call.in_channels) * batch, [&](int64_t begin, int64_t end) {
    void* scratch = cpu::unit_scratch(kernels.scratch_bytes);
    for (int64_t slice = begin; slice < end; ++slice) {
      const int64_t i = slice * batch / slices, rows = (slice + 1) * batch / slices - i;
      float *to2 = grad_hidden2 + i * kHidden2, *to1 = grad_hidden1 + i * kHidden1;
      back(rows, classes, kHidden2, grad_output + i * classes, call.p[8], to2);
      gemm.relu_backward(to2, hidden2 + i * kHidden2, rows * kHidden2, to2);
      back(rows, kHidden2, kHidden1, to2, call.p[6], to1);
      gemm.relu_backward(to1, hidden1 + i * kHidden1, rows * kHidden1, to1);
      back(rows, kHidden1, kFeatures, to1, call.p[4], grad_features + i * kFeatures);
      if (!kernels.run_both(job1, job2, packed, partials1, partials2, scratch, slice, slice + 1)) finite = false;
    }
  });
  if (!finite) return false;
  first.reduce(job1, partials1, 0, 6);
  second.reduce(job2, partials2, 0, 16);

  auto weight_gradient = [&](int64_t out, int64_t in, const float* from, const float* input, float* weight,
                             float* bias) {
    cpu::run_gemm(cpu::Gemm<float>{out, in, batch, from, 1, out, input, in, weight, in, nullptr, false, false});
    gemm.column_sums(from, batch, out, bias);
  };
  weight_gradient(kHidden1, kFeatures, grad_hidden1, cpu::data<float>(a.pooled2), grad(4), grad(5));
  weight_gradient(kHidden2, kHidden1, grad_hidden2, hidden1, grad(6), grad(7));
  weight_gradient(classes, kHidden2, grad_output, hidden2, grad(8), grad(9));
  return true;
}

struct LenetCpu {
  static LenetLayers forward(const char* op, const Tensor& input, TensorList parameters, bool training) {
    if (!has_kernels(input)) return lenet_by_layers(kLayers, op, input.contiguous(), parameters, training);
    if (training) return training_forward(input, parameters);
    LenetLayers a;
    a.output = inference(input, parameters);
    return a;
  }

  static LenetGradients backward(const char* op, const Tensor& grad_output, const Tensor& input, TensorList parameters,
                                 const LenetLayers& layers, bool input_gradient) {
    const bool fixed = LENET_EXT_CPU_DISPATCH(conv_pool_lenet_kernels).one_channel.run_both != nullptr;
    if (fixed && has_kernels(input) && !input_gradient && input.size(0) > 0) {
      const Arguments call(input, parameters);
      LenetGradients gradients;
      gradients.parameters.reserve(10);
      for (const auto& p : call.kept) gradients.parameters.push_back(at::empty_like(*p));
      if (blocks_backward(call, cpu::data<float>(grad_output), layers, gradients.parameters)) return gradients;
    }
    return lenet_backward_by_layers(kLayers, op, grad_output, input, parameters, layers, input_gradient);
  }

  static std::optional<LossAndCorrect> training_step(const char*, const TrainingStepCall&) { return std::nullopt; }
  static constexpr auto update = update_on_cpu;
};

}  // namespace

TORCH_LIBRARY_IMPL(lenet_ext, CPU, m) { LenetHost<LenetCpu>::register_operators(m); }

}  // namespace lenet_ext
