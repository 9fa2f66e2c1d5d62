// Runs the plain kernels, those that are compiled without an instruction set of x86, on whatever processor it was built
// for, on several threads. Problems come on the standard input and results go to the standard output, as raw arrays in
// the order in which test_other_processor.py writes and reads them.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "cpu/conv_pool_kernels.h"
#include "cpu/gemm_kernels.h"
#include "cpu/lenet_kernels.h"
#include "cpu/relu_avg_pool2d_kernels.h"

namespace lenet_ext::cpu::default_ {
extern const ConvPoolKernels conv_pool_kernels;
extern const GemmKernels gemm_kernels;
extern const LenetKernels lenet_kernels;
extern const ReluAvgPoolKernels relu_avg_pool_kernels;
}  // namespace lenet_ext::cpu::default_

namespace {

using namespace lenet_ext;
using namespace lenet_ext::cpu;

template <typename T>
std::vector<T> take(int64_t count) {
  std::vector<T> values(count);
  if (fread(values.data(), sizeof(T), count, stdin) != static_cast<size_t>(count)) abort();
  return values;
}

template <typename T>
void give(const std::vector<T>& values) {
  fwrite(values.data(), sizeof(T), values.size(), stdout);
}

struct Free {
  void operator()(void* memory) const { free(memory); }
};
std::unique_ptr<void, Free> aligned(int64_t bytes) {
  return std::unique_ptr<void, Free>(aligned_alloc(64, (bytes + 64) / 64 * 64));
}

// On threads, the units one by one and the last first: kernels must not care.
template <typename F>
void in_parallel(int64_t units, const F& run) {
  parallel_units(units, static_cast<double>(units), [&](int64_t begin, int64_t end) {
    for (int64_t i = units - end; i < units - begin; ++i) run(i, i + 1);
  });
}

Strides4 contiguous(int64_t c, int64_t h, int64_t w) { return {c * h * w, h * w, w, 1}; }
Strides4 channels_last(int64_t c, int64_t h, int64_t w) { return {c * h * w, 1, w * c, c}; }

// Our own algorithm: output, codes and gradients.
template <typename T>
void convolution(const ConvPoolTable<T>& kernels) {
  const ConvPoolShape s = take<ConvPoolShape>(1)[0];
  const int64_t outputs = s.batch * s.out_channels * s.out_h * s.out_w;
  const auto input = take<T>(s.batch * s.in_channels * s.height * s.width);
  const auto weight = take<T>(s.out_channels * s.in_channels / s.groups * s.kernel_h * s.kernel_w);
  const auto bias = take<T>(s.out_channels), grad_output = take<T>(outputs);
  const Strides4 image = contiguous(s.in_channels, s.height, s.width);
  const Strides4 pooled = contiguous(s.out_channels, s.out_h, s.out_w);
  std::vector<T> output(outputs), grad_input(input.size()), grad_weight(weight.size()), grad_bias(s.out_channels);
  std::vector<uint8_t> indices(outputs);
  {
    const auto& f = kernels.forward;
    const ConvPoolForward<T> job{s,           input.data(),  image,          weight.data(),
                                 bias.data(), output.data(), indices.data(), pooled};
    const auto packed = aligned(f.packed_bytes(s));
    f.prepare(job, packed.get());
    in_parallel(f.units(s), [&](int64_t begin, int64_t end) {
      f.run(job, packed.get(), aligned(f.scratch_bytes(s)).get(), begin, end);
    });
  }
  {
    const auto& b = kernels.backward;
    const ConvPoolBackward<T> job{s,
                                  grad_output.data(),
                                  pooled,
                                  indices.data(),
                                  pooled,
                                  input.data(),
                                  image,
                                  weight.data(),
                                  grad_input.data(),
                                  image,
                                  grad_weight.data(),
                                  grad_bias.data()};
    const int64_t units = b.units(s);
    const auto packed = aligned(b.packed_bytes(s, true)), partials = aligned(units * b.partial_bytes(s));
    if (!b.prepare(job, packed.get())) abort();
    in_parallel(units, [&](int64_t begin, int64_t end) {
      if (!b.run(job, packed.get(), partials.get(), aligned(b.scratch_bytes(s, true)).get(), begin, end)) abort();
    });
    in_parallel(s.out_channels, [&](int64_t begin, int64_t end) { b.reduce(job, partials.get(), begin, end); });
  }
  give(output), give(indices), give(grad_input), give(grad_weight), give(grad_bias);
}

// ReLU and pooling of a convolution's output that lies in channels_last, and its gradient.
template <typename T>
void relu_pool(const ConvPoolTable<T>& kernels) {
  const ConvPoolShape s = take<ConvPoolShape>(1)[0];
  const int64_t outputs = s.batch * s.out_channels * s.out_h * s.out_w;
  const auto conv = take<T>(s.batch * s.out_channels * s.conv_h * s.conv_w), grad_output = take<T>(outputs);
  const Strides4 rows = channels_last(s.out_channels, s.conv_h, s.conv_w);
  const Strides4 pooled = channels_last(s.out_channels, s.out_h, s.out_w);
  std::vector<T> output(outputs), grad_conv(conv.size());
  std::vector<uint8_t> indices(outputs);
  const auto& k = kernels.relu_pool;
  const ReluPool<T> forward{s, conv.data(), rows, output.data(), indices.data(), pooled};
  const ReluPoolBackward<T> backward{s, grad_output.data(), pooled, indices.data(), pooled, grad_conv.data(), rows};
  const int64_t units = s.batch * ((s.out_channels + k.channels - 1) / k.channels);
  in_parallel(units,
              [&](int64_t begin, int64_t end) { k.forward(forward, aligned(k.scratch_bytes(s)).get(), begin, end); });
  in_parallel(units,
              [&](int64_t begin, int64_t end) { k.backward(backward, aligned(k.scratch_bytes(s)).get(), begin, end); });
  give(output), give(indices), give(grad_conv);
}

template <typename T>
void relu_avg_pool(const ReluAvgPoolTable<T>& kernels) {
  const AvgPoolShape s = take<AvgPoolShape>(1)[0];
  const auto input = take<T>(s.batch * s.channels * s.height * s.width);
  const auto grad_output = take<T>(s.batch * s.channels * s.out_h * s.out_w);
  std::vector<T> output(grad_output.size()), grad_input(input.size());
  const ReluAvgPool<T> forward{s, input.data(), output.data()};
  const ReluAvgPoolBackward<T> backward{s, grad_output.data(), input.data(), grad_input.data()};
  in_parallel(kernels.units(s), [&](int64_t begin, int64_t end) {
    kernels.run(forward, aligned(kernels.scratch_bytes(s)).get(), begin, end);
  });
  in_parallel(kernels.backward_units(s), [&](int64_t begin, int64_t end) {
    kernels.backward_run(backward, aligned(kernels.backward_scratch_bytes(s)).get(), begin, end);
  });
  give(output), give(grad_input);
}

// a [m][k] times the transposed weight [n][k], by dot products and with the weight transposed first.
template <typename A>
void product(const GemmTable<A>& kernels) {
  const auto sizes = take<int64_t>(3);
  const int64_t m = sizes[0], n = sizes[1], k = sizes[2];
  const auto a = take<A>(m * k), weight = take<A>(n * k), bias = take<A>(n);
  std::vector<A> by_dots(m * n), by_tiles(m * n);
  GemmNT<A> product{m, n, k, a.data(), weight.data(), by_dots.data(), bias.data(), true};
  in_parallel(kernels.nt_units(product), [&](int64_t begin, int64_t end) { kernels.nt_run(product, begin, end); });
  product.output = by_tiles.data();
  in_parallel(kernels.transposing_units(product), [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(kernels.transposing_scratch(product));
    kernels.transposing_run(product, scratch.data(), begin, end);
  });
  give(by_dots), give(by_tiles);
}

void network() {
  const auto& kernels = default_::lenet_kernels;
  const auto sizes = take<int64_t>(3);
  const int64_t batch = sizes[0], channels = sizes[1], classes = sizes[2];
  const auto input = take<float>(batch * channels * 1024);
  std::vector<std::vector<float>> p;
  for (const int64_t count : {150 * channels, int64_t{6}, int64_t{2400}, int64_t{16}, int64_t{48000}, int64_t{120},
                              int64_t{10080}, int64_t{84}, 84 * classes, classes}) {
    p.push_back(take<float>(count));
  }
  std::vector<float> output(batch * classes);
  LenetForward job{};
  job.batch = batch, job.in_channels = channels, job.classes = classes;
  job.input = input.data(), job.image_stride = channels * 1024, job.output = output.data();
  const float** const parameters[] = {&job.conv1_weight, &job.conv1_bias, &job.conv2_weight, &job.conv2_bias,
                                      &job.fc1_weight,   &job.fc1_bias,   &job.fc2_weight,   &job.fc2_bias,
                                      &job.fc3_weight,   &job.fc3_bias};
  for (size_t i = 0; i < 10; ++i) *parameters[i] = p[i].data();
  const auto run = [&] {
    in_parallel((batch + kernels.lanes - 1) / kernels.lanes, [&](int64_t begin, int64_t end) {
      kernels.run(job, aligned(kernels.scratch_bytes(channels)).get(), begin, end);
    });
  };
  run();
  give(output);

  std::vector<float> pooled1(batch * 1176), pooled2(batch * 400), hidden1(batch * 120), hidden2(batch * 84);
  std::vector<uint8_t> indices1(batch * 1176), indices2(batch * 400);
  job.pooled1 = pooled1.data(), job.indices1 = indices1.data(), job.pooled2 = pooled2.data();
  job.indices2 = indices2.data(), job.hidden1 = hidden1.data(), job.hidden2 = hidden2.data();
  run();
  give(output), give(pooled1), give(indices1), give(pooled2), give(indices2), give(hidden1), give(hidden2);
}

// What ThreadSanitizer must notice: units that write to the same place.
void race() {
  std::vector<int64_t> sum(1);
  in_parallel(1000, [&](int64_t begin, int64_t) { sum[0] += begin; });
  give(sum);
}

}  // namespace

int main() {
  for (char kind; fread(&kind, 1, 1, stdin) == 1;) {
    const auto& conv = default_::conv_pool_kernels;
    switch (kind) {
      case 'f':
        convolution(conv.float32);
        break;
      case 'd':
        convolution(conv.float64);
        break;
      case 'b':
        convolution(conv.bfloat16);
        break;
      case 'F':
        relu_pool(conv.float32);
        break;
      case 'D':
        relu_pool(conv.float64);
        break;
      case 'B':
        relu_pool(conv.bfloat16);
        break;
      case 'p':
        product(default_::gemm_kernels.float32);
        break;
      case 'P':
        product(default_::gemm_kernels.float64);
        break;
      case 'a':
        relu_avg_pool(default_::relu_avg_pool_kernels.float32);
        break;
      case 'A':
        relu_avg_pool(default_::relu_avg_pool_kernels.float64);
        break;
      case 'h':
        relu_avg_pool(default_::relu_avg_pool_kernels.bfloat16);
        break;
      case 'n':
        network();
        break;
      case 'r':
        race();
        break;
      default:
        return 1;
    }
  }
  return fflush(stdout);
}
