// The kernels of single layers against plain loops in float64.
#pragma once

#include "driver_support.cuh"

namespace {

// --------------------------------------------------------------------------------------------------
// conv_relu_max_pool2d

Strides4 contiguous(int64_t c, int64_t h, int64_t w) { return {c * h * w, h * w, w, 1}; }

struct Conv {
  ConvPoolShape s;
  std::vector<double> input, weight, bias;

  int64_t in(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return ((n * s.in_channels + c) * s.height + h) * s.width + w;
  }
  int64_t out(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return ((n * s.out_channels + c) * s.out_h + h) * s.out_w + w;
  }
  int64_t map(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return ((n * s.out_channels + c) * s.conv_h + h) * s.conv_w + w;
  }
  int64_t inputs() const { return in(s.batch, 0, 0, 0); }
  int64_t outputs() const { return out(s.batch, 0, 0, 0); }
  int64_t maps() const { return map(s.batch, 0, 0, 0); }
  int64_t weights() const { return s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w; }

  // Calls visit(input offset, weight offset) for each product of the convolution at one position.
  template <typename Visit>
  void products(int64_t n, int64_t channel, int64_t ch, int64_t cw, Visit visit) const {
    const int64_t group_in = s.in_channels / s.groups, group = channel / (s.out_channels / s.groups);
    for (int64_t c = 0; c < group_in; ++c) {
      for (int64_t i = 0; i < s.kernel_h; ++i) {
        for (int64_t j = 0; j < s.kernel_w; ++j) {
          const int64_t h = ch * s.stride_h - s.pad_top + i * s.dilation_h;
          const int64_t w = cw * s.stride_w - s.pad_left + j * s.dilation_w;
          if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
          visit(in(n, group * group_in + c, h, w), ((channel * group_in + c) * s.kernel_h + i) * s.kernel_w + j);
        }
      }
    }
  }
  double convolution(int64_t n, int64_t channel, int64_t ch, int64_t cw) const {
    double sum = bias.empty() ? 0 : bias[channel];
    products(n, channel, ch, cw, [&](int64_t x, int64_t w) { sum += input[x] * weight[w]; });
    return sum;
  }
  std::vector<double> convolutions() const {
    std::vector<double> values(maps());
    for (int64_t i = 0; i < maps(); ++i) {
      const int64_t plane = i / (s.conv_h * s.conv_w);
      values[i] = convolution(plane / s.out_channels, plane % s.out_channels, i / s.conv_w % s.conv_h, i % s.conv_w);
    }
    return values;
  }
  // The winner's position in the convolution's output.
  void position(int64_t h, int64_t w, int code, int64_t* ch, int64_t* cw) const {
    *ch = h * s.pool_stride_h - s.pool_pad_h + code / s.pool_kernel_w * s.pool_dilation_h;
    *cw = w * s.pool_stride_w - s.pool_pad_w + code % s.pool_kernel_w * s.pool_dilation_w;
  }
  bool inside(int64_t ch, int64_t cw) const { return ch >= 0 && ch < s.conv_h && cw >= 0 && cw < s.conv_w; }
};

// Values against the reference; codes by what they say: that the value at the winner's position is the output.
void check_pooled(const std::string& what, DType dtype, const Conv& c, const std::vector<double>& values,
                  const std::vector<double>& output, const std::vector<uint8_t>& codes, double scale) {
  std::vector<double> expected(output.size());
  bool codes_right = true;
  for (int64_t n = 0; n < c.s.batch; ++n) {
    for (int64_t o = 0; o < c.s.out_channels; ++o) {
      for (int64_t h = 0; h < c.s.out_h; ++h) {
        for (int64_t w = 0; w < c.s.out_w; ++w) {
          double best = -INFINITY;
          int64_t ch, cw;
          for (int code = 0; code < c.s.pool_kernel_h * c.s.pool_kernel_w; ++code) {
            c.position(h, w, code, &ch, &cw);
            if (c.inside(ch, cw)) best = std::fmax(best, std::fmax(0.0, values[c.map(n, o, ch, cw)]));
          }
          const int64_t at = c.out(n, o, h, w);
          expected[at] = best;
          const double slack = 4 * tolerance(dtype) * (scale + best);
          if (codes[at] == kDead) {
            codes_right = codes_right && best <= slack;
          } else {
            c.position(h, w, codes[at], &ch, &cw);
            codes_right = codes_right && c.inside(ch, cw) && std::fabs(values[c.map(n, o, ch, cw)] - best) <= slack;
          }
        }
      }
    }
  }
  compare(what, dtype, output, expected, scale);
  expect(codes_right, what + ": winner codes");
}

// The gradients, from the winner codes and the gradient of the pooled output.
struct ConvGradients {
  std::vector<double> grad_input, grad_weight, grad_bias, grad_map;

  ConvGradients(const Conv& c, const std::vector<uint8_t>& codes, const std::vector<double>& gradient)
      : grad_input(c.inputs()), grad_weight(c.weights()), grad_bias(c.s.out_channels), grad_map(c.maps()) {
    const ConvPoolShape& s = c.s;
    for (int64_t i = 0; i < c.outputs(); ++i) {
      if (codes[i] == kDead) continue;
      const int64_t plane = i / (s.out_h * s.out_w), n = plane / s.out_channels, o = plane % s.out_channels;
      int64_t ch, cw;
      c.position(i / s.out_w % s.out_h, i % s.out_w, codes[i], &ch, &cw);
      grad_bias[o] += gradient[i];
      grad_map[c.map(n, o, ch, cw)] += gradient[i];
      c.products(n, o, ch, cw, [&](int64_t x, int64_t w) {
        grad_input[x] += gradient[i] * c.weight[w];
        grad_weight[w] += gradient[i] * c.input[x];
      });
    }
  }
};

void test_convolution(const std::string& name, DType dtype, const ConvPoolShape& s) {
  Conv c{s, {}, {}, {}};
  c.input = random_values(dtype, c.inputs());
  c.weight = random_values(dtype, c.weights(), 0.5);
  if (s.out_channels % 2 == 0) c.bias = random_values(dtype, s.out_channels, 0.5);
  const double scale = std::sqrt(static_cast<double>(c.weights() / s.out_channels));

  const std::vector<double> values = c.convolutions();
  Buffer input(dtype, c.inputs()), weight(dtype, c.weights()), bias(dtype, s.out_channels);
  input.set(c.input);
  weight.set(c.weight);
  if (!c.bias.empty()) bias.set(c.bias);
  const void* bias_data = c.bias.empty() ? nullptr : bias.data();
  const Strides4 in_strides = contiguous(s.in_channels, s.height, s.width);
  const Strides4 out_strides = contiguous(s.out_channels, s.out_h, s.out_w);
  const Strides4 map_strides = contiguous(s.out_channels, s.conv_h, s.conv_w);

  Buffer output(dtype, c.outputs());
  Bytes indices(c.outputs());
  run(
      name + " forward",
      [&] {
        output.reset();
        return launch_conv_pool_forward(
            dtype, {s, input.data(), in_strides, weight.data(), bias_data, output.data(), indices.data, out_strides},
            {});
      },
      [&] { check_pooled(name + " forward", dtype, c, values, output.get(), indices.get(), scale); });
  const std::vector<uint8_t> codes = indices.get();
  if (s.batch > 256) {  // where inference has a kernel of its own
    const std::vector<double> expected = output.get();
    run(
        name + " inference",
        [&] {
          output.reset();
          return launch_conv_pool_forward(
              dtype, {s, input.data(), in_strides, weight.data(), bias_data, output.data(), nullptr, out_strides}, {});
        },
        [&] { expect(output.get() == expected, name + " inference"); });
  }

  {  // the vendor's convolution followed by our pass
    Buffer map(dtype, c.maps()), pooled(dtype, c.outputs());
    Bytes pooled_indices(c.outputs());
    std::vector<double> without_bias = values;
    for (int64_t i = 0; i < c.maps(); ++i) {
      if (!c.bias.empty()) without_bias[i] -= c.bias[i / (s.conv_h * s.conv_w) % s.out_channels];
    }
    map.set(without_bias);
    run(
        name + " pool",
        [&] {
          pooled.reset();
          return launch_bias_relu_pool(
              dtype, {s, map.data(), map_strides, bias_data, pooled.data(), pooled_indices.data, out_strides}, {});
        },
        [&] { check_pooled(name + " pool", dtype, c, values, pooled.get(), pooled_indices.get(), 4 * scale); });
  }

  {
    Buffer at(dtype, c.outputs());
    std::vector<double> expected(c.outputs());
    for (int64_t i = 0; i < c.outputs(); ++i) {
      int64_t ch, cw;
      c.position(i / s.out_w % s.out_h, i % s.out_w, codes[i], &ch, &cw);
      if (codes[i] != kDead) {
        const int64_t plane = i / (s.out_h * s.out_w);
        expected[i] = values[c.map(plane / s.out_channels, plane % s.out_channels, ch, cw)];
      }
    }
    run(
        name + " at indices",
        [&] {
          at.reset();
          return launch_conv_at_indices(
              dtype, {s, input.data(), in_strides, weight.data(), bias_data, indices.data, at.data(), out_strides}, {});
        },
        [&] { compare(name + " at indices", dtype, at.get(), expected, scale); });
  }

  const std::vector<double> gradient = random_values(dtype, c.outputs());
  const ConvGradients expected(c, codes, gradient);
  Buffer grad_output(dtype, c.outputs()), got_input(dtype, c.inputs()), got_weight(dtype, c.weights());
  Buffer got_bias(dtype, s.out_channels), got_map(dtype, c.maps());
  grad_output.set(gradient);
  const double grad_scale = std::sqrt(static_cast<double>(s.batch * s.out_h * s.out_w)) + scale;
  for (const bool bias_only : {false, true}) {
    const int64_t bytes = conv_pool_backward_workspace(dtype, s, !bias_only);
    Buffer workspace(DType::kFloat32, bytes / 4);
    run(
        name + " backward",
        [&] {
          got_input.reset(), got_weight.reset(), got_bias.reset(), workspace.reset();
          ConvPoolBackward call{s,
                                grad_output.data(),
                                out_strides,
                                indices.data,
                                out_strides,
                                input.data(),
                                in_strides,
                                weight.data(),
                                got_input.data(),
                                in_strides,
                                got_weight.data(),
                                got_bias.data(),
                                workspace.data(),
                                0};
          if (bias_only) call.grad_input = call.grad_weight = nullptr;
          return launch_conv_pool_backward(dtype, call, {});
        },
        [&] {
          compare(name + " grad_bias", dtype, got_bias.get(), expected.grad_bias, grad_scale);
          if (bias_only) return;
          compare(name + " grad_input", dtype, got_input.get(), expected.grad_input, grad_scale);
          compare(name + " grad_weight", dtype, got_weight.get(), expected.grad_weight, grad_scale);
        });
  }
  run(
      name + " pool backward",
      [&] {
        got_map.reset();
        return launch_bias_relu_pool_backward(
            dtype, {s, grad_output.data(), out_strides, indices.data, out_strides, got_map.data(), map_strides}, {});
      },
      [&] { compare(name + " pool backward", dtype, got_map.get(), expected.grad_map, 1); });
}

ConvPoolShape plain(int64_t batch, int64_t in, int64_t size, int64_t out, int64_t kernel) {
  ConvPoolShape s{};
  s.batch = batch, s.in_channels = in, s.height = s.width = size;
  s.out_channels = out, s.kernel_h = s.kernel_w = kernel, s.groups = 1;
  s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
  s.pool_kernel_h = s.pool_kernel_w = s.pool_stride_h = s.pool_stride_w = 2;
  s.pool_dilation_h = s.pool_dilation_w = 1;
  s.conv_h = s.conv_w = size - kernel + 1;
  s.out_h = s.out_w = s.conv_h / 2;
  return s;
}

// Every option away from its default: groups, padding on one side, strides, dilations, an overlapping window.
ConvPoolShape odd(int64_t batch) {
  ConvPoolShape s = plain(batch, 4, 11, 6, 3);
  s.width = 9, s.kernel_w = 2, s.groups = 2;
  s.stride_w = 2, s.dilation_h = 2;
  s.pad_top = 2, s.pad_bottom = 1, s.pad_left = 1, s.pad_right = 0;
  s.conv_h = (11 + 3 - 2 * 2 - 1) / 1 + 1, s.conv_w = (9 + 1 - 1 - 1) / 2 + 1;  // 10 x 5
  s.pool_kernel_h = 3, s.pool_pad_h = 1, s.pool_stride_w = 1, s.pool_dilation_w = 2;
  s.out_h = (10 + 2 - 2 - 1) / 2 + 1, s.out_w = 5 - 2 - 1 + 1;
  return s;
}

// A map with room for one window, and the largest stride.
ConvPoolShape one_window() {
  ConvPoolShape s = plain(2, 1, 6, 2, 3);
  s.pool_stride_h = s.pool_stride_w = 0x7fffffff;
  s.out_h = s.out_w = 1;
  return s;
}

// ---------------------------------------------------------------------------------------------------- matrix product

void test_product(DType dtype, int64_t rows, int64_t columns, int64_t depth, bool transposed, bool extras) {
  const std::string name = "product " + std::to_string(rows) + " x " + std::to_string(columns) + " x " +
                           std::to_string(depth) + " dtype " + std::to_string(static_cast<int>(dtype));
  const std::vector<double> a_values = random_values(dtype, rows * depth),
                            b_values = random_values(dtype, columns * depth);
  const std::vector<double> bias_values = random_values(dtype, columns),
                            mask_values = random_values(dtype, rows * depth);
  Buffer a(dtype, rows * depth), b(dtype, columns * depth), bias(dtype, columns), mask(dtype, rows * depth);
  Buffer output(dtype, rows * columns), sums(dtype, rows);
  a.set(a_values), b.set(b_values), bias.set(bias_values), mask.set(mask_values);

  SmallMatrixProduct call{};
  call.rows = rows, call.columns = columns, call.depth = depth;
  call.a = a.data(), call.a_row_stride = transposed ? 1 : depth, call.a_depth_stride = transposed ? rows : 1;
  call.b = b.data(), call.b_row_stride = transposed ? 1 : depth, call.b_depth_stride = transposed ? columns : 1;
  call.output = output.data();
  if (extras) call.bias = bias.data(), call.relu = true, call.a_mask = mask.data(), call.a_row_sums = sums.data();

  std::vector<double> expected(rows * columns), expected_sums(rows);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t r = 0; r < depth; ++r) {
      const int64_t at = i * call.a_row_stride + r * call.a_depth_stride;
      const double value = extras && mask_values[at] <= 0 ? 0 : a_values[at];
      expected_sums[i] += value;
      for (int64_t j = 0; j < columns; ++j) {
        expected[i * columns + j] += value * b_values[j * call.b_row_stride + r * call.b_depth_stride];
      }
    }
    for (int64_t j = 0; extras && j < columns; ++j) {
      expected[i * columns + j] = std::fmax(0.0, expected[i * columns + j] + bias_values[j]);
    }
  }
  run(
      name,
      [&] {
        output.reset(), sums.reset();
        return launch_small_matrix_product(dtype, call, {});
      },
      [&] {
        compare(name, dtype, output.get(), expected, std::sqrt(static_cast<double>(depth)));
        if (extras)
          compare(name + " row sums", dtype, sums.get(), expected_sums, std::sqrt(static_cast<double>(depth)));
      });
}

// --------------------------------------------------------------------------------------- ReLU and average pooling

// Windows of 3x2 that overlap, overhang and lie partly in the padding.
AvgPoolShape average(bool channels_last, bool count_include_pad, int64_t divisor_override) {
  return {3, 5, 8, 7, 5, 7, 3, 2, 2, 1, 1, 1, count_include_pad, divisor_override, channels_last};
}

void test_average(DType dtype, const AvgPoolShape& s) {
  const std::string name =
      "average pooling dtype " + std::to_string(static_cast<int>(dtype)) + (s.channels_last ? " channels_last" : "");
  const auto at = [&s](int64_t plane, int64_t y, int64_t x, int64_t height, int64_t width) {
    return s.channels_last ? ((plane / s.channels * height + y) * width + x) * s.channels + plane % s.channels
                           : (plane * height + y) * width + x;
  };
  const int64_t planes = s.batch * s.channels, inputs = planes * s.height * s.width,
                outputs = planes * s.out_h * s.out_w;
  const std::vector<double> values = random_values(dtype, inputs), gradient = random_values(dtype, outputs);
  std::vector<double> expected(outputs), expected_grad(inputs);
  for (int64_t i = 0; i < outputs; ++i) {
    const int64_t plane = i / (s.out_h * s.out_w), y = i / s.out_w % s.out_h, x = i % s.out_w;
    const int64_t out = at(plane, y, x, s.out_h, s.out_w);
    int64_t inside = 0, padded = 0;
    for (const bool last : {false, true}) {  // the window's size first
      const double divisor = s.divisor_override != 0 ? s.divisor_override : s.count_include_pad ? padded : inside;
      for (int64_t j = 0; j < s.kernel_h * s.kernel_w; ++j) {
        const int64_t h = y * s.stride_h - s.pad_h + j / s.kernel_w, w = x * s.stride_w - s.pad_w + j % s.kernel_w;
        const bool is_inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
        inside += !last && is_inside;
        padded += !last && h < s.height + s.pad_h && w < s.width + s.pad_w;
        if (!last || !is_inside) continue;
        const int64_t in = at(plane, h, w, s.height, s.width);
        expected[out] += std::fmax(0.0, values[in]) / divisor;
        if (values[in] > 0) expected_grad[in] += gradient[out] / divisor;
      }
    }
  }
  Buffer input(dtype, inputs), grad_output(dtype, outputs), output(dtype, outputs), grad_input(dtype, inputs);
  input.set(values), grad_output.set(gradient);
  run(
      name,
      [&] {
        output.reset();
        return launch_relu_avg_pool(dtype, {s, input.data(), output.data()}, {});
      },
      [&] { compare(name, dtype, output.get(), expected, 1); });
  run(
      name + " backward",
      [&] {
        grad_input.reset();
        return launch_relu_avg_pool_backward(dtype, {s, grad_output.data(), input.data(), grad_input.data()}, {});
      },
      [&] { compare(name + " backward", dtype, grad_input.get(), expected_grad, 1); });
}

// ------------------------------------------------------------------------------------------------------ tensor cores

// One warp: d[16][8] += a[16][16 words] x b[8][16 words]^T, from shared memory. `matrices`: `a` by load_matrices.
template <typename T>
__global__ void small_product_kernel(const uint32_t* a, const uint32_t* b, float* d, bool matrices) {
  constexpr int kPitch = 20;
  LX_SMEM(shared);
  uint32_t* rows = lx::take<uint32_t>(shared, 16 * kPitch);
  for (int i = threadIdx.x; i < 16 * 16; i += 32) rows[i / 16 * kPitch + i % 16] = a[i];
  __syncthreads();
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  for (int step = 0; step < 2; ++step) {
    uint32_t words[4];
    if (matrices) {
      lx::load_matrices(words, rows + (lane % 8 + lane / 8 % 2 * 8) * kPitch + 8 * step + lane / 16 * 4);
    } else {
      for (int i = 0; i < 4; ++i) words[i] = rows[(g + i % 2 * 8) * kPitch + 8 * step + i / 2 * 4 + t];
    }
    const uint32_t* column = b + g * 16 + 8 * step + t;
    lx::multiply_accumulate<T>(sums, words, column[0], column[4]);
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

void test_small_product(DType dtype) {
  const std::string name = "small product dtype " + std::to_string(static_cast<int>(dtype));
  const int64_t depth = dtype == DType::kFloat32 ? 16 : 32;
  std::vector<double> a_values = random_values(dtype, 16 * depth), b_values = random_values(dtype, 8 * depth);
  if (dtype == DType::kFloat32) {
    for (double& value : a_values) value = lx::to_tf32(static_cast<float>(value));
    for (double& value : b_values) value = lx::to_tf32(static_cast<float>(value));
  }
  const std::vector<double> before = random_values(DType::kFloat32, 16 * 8);
  std::vector<double> expected = before;
  for (int64_t i = 0; i < 16 * 8; ++i) {
    for (int64_t k = 0; k < depth; ++k) expected[i] += a_values[i / 8 * depth + k] * b_values[i % 8 * depth + k];
  }
  Buffer a(dtype, 16 * depth), b(dtype, 8 * depth), d(DType::kFloat32, 16 * 8);
  a.set(a_values), b.set(b_values);
  for (const bool matrices : {false, true}) {
    run(
        name,
        [&] {
          d.set(before);
          LaunchResult result;
          const auto kernel = dtype == DType::kFloat32   ? small_product_kernel<float>
                              : dtype == DType::kFloat16 ? small_product_kernel<lx::f16>
                                                         : small_product_kernel<lx::bf16>;
          lx::launch(result, "small_product_kernel", kernel, 1, 32, lx::taken<uint32_t>(16 * 20), {},
                     static_cast<const uint32_t*>(a.data()), static_cast<const uint32_t*>(b.data()),
                     static_cast<float*>(d.data()), matrices);
          return result;
        },
        [&] { compare(name, DType::kFloat32, d.get(), expected, 4); });
  }
}

__global__ void round_kernel(const float* from, float* to) { to[threadIdx.x] = lx::to_tf32(from[threadIdx.x]); }

void test_rounding_to_tf32() {
  const double half = 0x1p-11, ulp = 0x1p-10;
  const std::vector<double> values = {0,
                                      1,
                                      1 + half,
                                      1 + half - 0x1p-23,
                                      1 + half + 0x1p-23,
                                      1 + ulp + half,
                                      -1 - half,
                                      0x1.ffcp0 + half,
                                      0x1.fffffep127,
                                      -INFINITY,
                                      NAN};
  const std::vector<double> expected = {0, 1, 1 + ulp, 1, 1 + ulp, 1 + 2 * ulp, -1 - ulp, 2, INFINITY, -INFINITY, NAN};
  const int64_t count = static_cast<int64_t>(values.size());
  Buffer from(DType::kFloat32, count), to(DType::kFloat32, count);
  from.set(values);
  run(
      "rounding to TF32",
      [&] {
        LaunchResult result;
        lx::launch(result, "round_kernel", round_kernel, 1, static_cast<unsigned>(count), 0, {},
                   static_cast<const float*>(from.data()), static_cast<float*>(to.data()));
        return result;
      },
      [&] {
        const std::vector<double> got = to.get();
        for (int64_t i = 0; i < count; ++i) {
          expect(got[i] == expected[i] || (std::isnan(got[i]) && std::isnan(expected[i])),
                 "rounding to TF32 of " + std::to_string(values[i]));
        }
      });
}

}  // namespace
