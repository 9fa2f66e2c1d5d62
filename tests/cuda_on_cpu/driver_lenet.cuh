// The kernels of the whole network, and of its layers on the tensor cores, against plain loops in float64.
#pragma once

#include "driver_layers.cuh"

namespace {

// ----------------------------------------------------------------------------------------------------- whole network

// relu(max_pool(conv)) of a LeNet layer in float64. The first of equals wins, and the last NaN.
std::vector<double> pooled(const ConvPoolShape& s, const std::vector<double>& input, const std::vector<double>& weight,
                           const std::vector<double>& bias, std::vector<uint8_t>* codes) {
  const Conv c{s, input, weight, bias};
  std::vector<double> output(c.outputs());
  codes->assign(c.outputs(), kDead);
  for (int64_t i = 0; i < c.outputs(); ++i) {
    const int64_t plane = i / (s.out_h * s.out_w);
    for (int code = 0; code < 4; ++code) {
      int64_t ch, cw;
      c.position(i / s.out_w % s.out_h, i % s.out_w, code, &ch, &cw);
      const double value = c.convolution(plane / s.out_channels, plane % s.out_channels, ch, cw);
      if (value > output[i] || std::isnan(value)) output[i] = value, (*codes)[i] = static_cast<uint8_t>(code);
    }
  }
  return output;
}

struct LenetCase {
  int64_t batch, classes;
  bool training;
  bool integers = false;   // small ones: sums are exact in every dtype, and full of ties
  bool irregular = false;  // the second image has a NaN pixel, the third an infinite one
  int cluster = 0;         // blocks that compute an image together, 0: see `tensor_cores`
  bool lean = false;       // in two launches, on the tensor cores; in TF32 the convolutions alone
};

// On the tensor cores where `tensor_cores`; float32 is then TF32.
void test_lenet(DType dtype, bool tensor_cores, const LenetCase& c) {
  const int64_t batch = c.batch, classes = c.classes;
  const std::string name = std::string(tensor_cores ? "tensor core" : "") + " lenet dtype " +
                           std::to_string(static_cast<int>(dtype)) + " batch " + std::to_string(batch) + " cluster " +
                           std::to_string(c.cluster) + (c.lean ? " lean" : "") + (c.training ? " training" : "") +
                           (c.integers ? " integers" : "") + (c.irregular ? " irregular" : "");
  const ConvPoolShape s1 = plain(batch, 1, 32, 6, 5), s2 = plain(batch, 6, 14, 16, 5);
  const int64_t sizes[] = {150, 6, 2400, 16, 48000, 120, 120 * 84, 84, 84 * classes, classes};
  const double scales[] = {0.2, 0.2, 0.08, 0.08, 0.05, 0.05, 0.09, 0.09, 0.1, 0.1};
  // Few weights but ones in the deeper layers, so that no value outgrows the 11 bits of a mantissa.
  const double densities[] = {1, 1, 0.02, 1, 0.02, 1, 0.05, 1, 0.05, 1};
  auto small_integers = [&](int64_t count, double density) {
    std::uniform_real_distribution<double> uniform;
    std::vector<double> values(count);
    for (double& value : values) value = uniform(generator) < density ? std::floor(uniform(generator) * 3) - 1 : 0;
    return values;
  };
  std::vector<std::vector<double>> values;
  std::vector<std::unique_ptr<Buffer>> parameters;
  LenetForwardOf<void> call{};
  for (int i = 0; i < 10; ++i) {
    values.push_back(c.integers ? small_integers(sizes[i], densities[i]) : random_values(dtype, sizes[i], scales[i]));
    parameters.push_back(std::make_unique<Buffer>(dtype, sizes[i]));
    parameters[i]->set(values[i]);
    call.parameters[i] = parameters[i]->data();
  }
  std::vector<double> images = c.integers ? small_integers(batch * 1024, 1) : random_values(dtype, batch * 1024);
  if (c.irregular) images[1024 + 15 * 32 + 17] = NAN, images[2048 + 3 * 32 + 30] = INFINITY;
  std::vector<uint8_t> codes1, codes2;
  std::vector<std::vector<double>> expected = {pooled(s1, images, values[0], values[1], &codes1)};
  expected.push_back(pooled(s2, expected[0], values[2], values[3], &codes2));
  const int64_t widths[] = {400, 120, 84, classes};
  for (int layer = 0; layer < 3; ++layer) {
    const int64_t depth = widths[layer], width = widths[layer + 1];
    std::vector<double> out(batch * width);
    for (int64_t i = 0; i < batch * width; ++i) {
      out[i] = values[5 + 2 * layer][i % width];
      for (int64_t k = 0; k < depth; ++k) {
        out[i] += expected.back()[i / width * depth + k] * values[4 + 2 * layer][i % width * depth + k];
      }
      if (layer < 2 && out[i] <= 0) out[i] = 0;
    }
    expected.push_back(out);
  }
  if (c.integers && dtype != DType::kFloat32) {
    double most = 0;
    for (const auto& each : expected) {
      for (const double value : each) most = std::fmax(most, value);
    }
    expect(most > 1 && most <= (dtype == DType::kBFloat16 ? 256 : 2048), name + ": values are exact");
  }

  Buffer input(dtype, batch * 1024);
  input.set(images);
  std::vector<std::unique_ptr<Buffer>> results;
  for (const auto& each : expected) results.push_back(std::make_unique<Buffer>(dtype, each.size()));
  Buffer features(dtype, batch * 400);
  Bytes indices1(batch * 1176), indices2(batch * 400);
  call.batch = batch, call.in_channels = 1, call.classes = classes;
  call.input = input.data(), call.output = results[4]->data();
  if (c.training) {
    call.pooled1 = results[0]->data(), call.pooled2 = results[1]->data();
    call.hidden1 = results[2]->data(), call.hidden2 = results[3]->data();
    call.indices1 = indices1.data, call.indices2 = indices2.data;
  }
  LenetForward strict{};
  static_assert(sizeof strict == sizeof call);
  memcpy(&strict, &call, sizeof call);
  const bool convolutions = c.lean && dtype == DType::kFloat32;
  strict.pooled2 = static_cast<float*>(convolutions ? results[1]->data() : call.pooled2);
  // TF32 rounds as float16 does, to 10 bits of mantissa.
  const DType rounding = tensor_cores && dtype == DType::kFloat32 ? DType::kFloat16 : dtype;
  auto in_tf32 = [&] {
    const LaunchResult result = launch_lenet_lean_convolutions(strict, {});
    return result.error == cudaSuccess ? launch_lenet_tf32_linears(strict, {}) : result;
  };
  run(
      name,
      [&] {
        for (auto& each : results) each->reset();
        features.reset();
        return convolutions     ? in_tf32()
               : c.lean         ? launch_lenet_lean_forward(dtype, call, c.training ? nullptr : features.data(), {})
               : tensor_cores   ? launch_lenet_tensor_core_forward(dtype, call, {})
               : c.cluster != 0 ? launch_lenet_cluster_forward(dtype, call, c.cluster, {})
                                : launch_lenet_forward(strict, {});
      },
      [&] {
        for (int i = c.training ? 0 : convolutions ? 1 : 4; i < 5; ++i) {
          if (!c.training && (i == 2 || i == 3)) continue;  // the hidden layers are not kept
          const std::vector<double> got = results[i]->get();
          compare(name + " result " + std::to_string(i), rounding, got, expected[i], c.integers ? 0 : 4);
          if (c.integers) expect(got == expected[i], name + " result " + std::to_string(i) + " is exact");
        }
        if (c.training && c.integers) {
          expect(indices1.get() == codes1, name + " indices1");
          expect(indices2.get() == codes2, name + " indices2");
        }
        if (!c.training || !c.irregular) return;
        const std::vector<uint8_t> got = indices1.get();
        for (size_t i = 0; i < got.size(); ++i) {  // the others may be near ties
          if (!std::isfinite(expected[0][i])) expect(got[i] == codes1[i], name + " indices1");
        }
      });
}

// A layer on its own; float32 is TF32, which rounds as float16 does.
void test_tensor_core_layer(DType dtype, const ConvPoolShape& s, bool with_bias) {
  const DType rounding = dtype == DType::kFloat32 ? DType::kFloat16 : dtype;
  const std::string name = "tensor core layer of " + std::to_string(s.in_channels) + " channels dtype " +
                           std::to_string(static_cast<int>(dtype)) + " batch " + std::to_string(s.batch);
  Conv c{s, {}, {}, {}};
  c.input = random_values(dtype, c.inputs());
  c.weight = random_values(dtype, c.weights(), 0.5);
  if (with_bias) c.bias = random_values(dtype, s.out_channels, 0.5);
  const std::vector<double> values = c.convolutions();
  Buffer input(dtype, c.inputs()), weight(dtype, c.weights()), bias(dtype, s.out_channels), output(dtype, c.outputs());
  input.set(c.input), weight.set(c.weight);
  if (with_bias) bias.set(c.bias);
  Bytes indices(c.outputs());
  const Strides4 in_strides = contiguous(s.in_channels, s.height, s.width);
  const Strides4 out_strides = contiguous(s.out_channels, s.out_h, s.out_w);
  for (const bool with_indices : {true, false}) {
    run(
        name,
        [&] {
          output.reset();
          return launch_lenet_tensor_core_layer(
              dtype,
              {s, input.data(), in_strides, weight.data(), with_bias ? bias.data() : nullptr, output.data(),
               with_indices ? indices.data : nullptr, out_strides},
              {});
        },
        [&] { check_pooled(name, rounding, c, values, output.get(), indices.get(), 4); });
  }
}

// The codes of a pooling, one in five of them dead.
std::vector<uint8_t> random_codes(int64_t count) {
  std::uniform_int_distribution<int> code(0, 4);
  std::vector<uint8_t> codes(count);
  for (uint8_t& each : codes) {
    const int drawn = code(generator);
    each = static_cast<uint8_t>(drawn == 4 ? kDead : drawn);
  }
  return codes;
}

// From activations drawn at random, which need not be those of any network. slice_images: as LenetBackward has it, 0
// for what the batch gives.
void test_lenet_backward(DType dtype, int64_t batch, int64_t classes, int64_t slice_images, bool input_gradient) {
  if (slice_images == 0) slice_images = lenet_backward_slice_images(batch);
  const std::string name = "lenet backward dtype " + std::to_string(static_cast<int>(dtype)) + " batch " +
                           std::to_string(batch) + " in slices of " + std::to_string(slice_images);
  const int64_t sizes[] = {150, 6, 2400, 16, 48000, 120, 120 * 84, 84, 84 * classes, classes};
  const double scales[] = {0.2, 0.2, 0.08, 0.08, 0.05, 0.05, 0.09, 0.09, 0.1, 0.1};
  std::vector<std::vector<double>> parameters, expected;
  std::vector<std::unique_ptr<Buffer>> buffers, gradients;
  auto buffer = [&](const std::vector<double>& values) {
    buffers.push_back(std::make_unique<Buffer>(dtype, values.size()));
    buffers.back()->set(values);
    return buffers.back()->data();
  };
  LenetBackwardOf<void> call{};
  for (int i = 0; i < 10; ++i) {
    parameters.push_back(random_values(dtype, sizes[i], scales[i]));
    expected.emplace_back(sizes[i]);
    call.parameters[i] = buffer(parameters[i]);
    gradients.push_back(std::make_unique<Buffer>(dtype, sizes[i]));
    call.gradients[i] = gradients[i]->data();
  }
  const std::vector<double> images = random_values(dtype, batch * 1024), pooled1 = random_values(dtype, batch * 1176);
  // The inputs of fc1, fc2 and fc3; where the last two are not above 0, ReLU lets no gradient pass.
  const int64_t widths[] = {400, 120, 84, classes};
  std::vector<std::vector<double>> inputs;
  for (int layer = 0; layer < 3; ++layer) inputs.push_back(random_values(dtype, batch * widths[layer]));
  const std::vector<uint8_t> codes1 = random_codes(batch * 1176), codes2 = random_codes(batch * 400);
  Bytes indices1(batch * 1176), indices2(batch * 400);
  indices1.set(codes1), indices2.set(codes2);

  std::vector<double> gradient = random_values(dtype, batch * classes);
  call.batch = batch, call.in_channels = 1, call.classes = classes, call.slice_images = slice_images;
  call.grad_output = buffer(gradient), call.input = buffer(images);
  call.pooled1 = buffer(pooled1), call.indices1 = indices1.data;
  call.pooled2 = buffer(inputs[0]), call.indices2 = indices2.data;
  call.hidden1 = buffer(inputs[1]), call.hidden2 = buffer(inputs[2]);
  for (int layer = 2; layer >= 0; --layer) {
    const int64_t depth = widths[layer], width = widths[layer + 1];
    std::vector<double> grad_input(batch * depth);
    for (int64_t i = 0; i < batch * width; ++i) {
      const int64_t n = i / width, j = i % width;
      expected[5 + 2 * layer][j] += gradient[i];
      for (int64_t k = 0; k < depth; ++k) {
        expected[4 + 2 * layer][j * depth + k] += gradient[i] * inputs[layer][n * depth + k];
        if (layer > 0 && inputs[layer][n * depth + k] <= 0) continue;
        grad_input[n * depth + k] += gradient[i] * parameters[4 + 2 * layer][j * depth + k];
      }
    }
    gradient = grad_input;
  }
  const ConvGradients second({plain(batch, 6, 14, 16, 5), pooled1, parameters[2], {}}, codes2, gradient);
  const ConvGradients first({plain(batch, 1, 32, 6, 5), images, parameters[0], {}}, codes1, second.grad_input);
  expected[0] = first.grad_weight, expected[1] = first.grad_bias;
  expected[2] = second.grad_weight, expected[3] = second.grad_bias;

  Buffer grad_pooled1(dtype, batch * 1176);
  Buffer workspace(DType::kFloat32, lenet_backward_workspace(batch, 1, slice_images) / 4);
  if (input_gradient) call.grad_pooled1 = grad_pooled1.data();
  call.workspace = workspace.data();
  run(
      name,
      [&] {
        workspace.reset(), grad_pooled1.reset();
        for (auto& each : gradients) each->reset();
        return launch_lenet_backward(dtype, call, {});
      },
      [&] {
        const double scale = 2 * std::sqrt(static_cast<double>(batch));
        for (int i = 0; i < 10; ++i) {
          compare(name + " gradient " + std::to_string(i), dtype, gradients[i]->get(), expected[i], scale);
        }
        if (input_gradient) compare(name + " pooled1", dtype, grad_pooled1.get(), second.grad_input, 1);
      });
}

// The same of the convolutions alone, on the tensor cores. The gradient between them is rounded; float32 is TF32, which
// all values of float16 are.
void test_lenet_tensor_core_backward(DType dtype, int64_t batch, int64_t slice_images) {
  const DType rounding = dtype == DType::kFloat32 ? DType::kFloat16 : dtype;
  const std::string name = "lenet tensor core backward dtype " + std::to_string(static_cast<int>(dtype)) + " batch " +
                           std::to_string(batch) + " in slices of " + std::to_string(slice_images);
  const std::vector<double> images = random_values(rounding, batch * 1024);
  const std::vector<double> pooled1 = random_values(rounding, batch * 1176);
  const std::vector<double> gradient = random_values(rounding, batch * 400),
                            weight2 = random_values(rounding, 2400, 0.1);
  const std::vector<uint8_t> codes1 = random_codes(batch * 1176), codes2 = random_codes(batch * 400);
  Buffer input(dtype, batch * 1024), kept(dtype, batch * 1176), weight(dtype, 2400), grad(dtype, batch * 400);
  input.set(images), kept.set(pooled1), weight.set(weight2), grad.set(gradient);
  Bytes indices1(batch * 1176), indices2(batch * 400);
  indices1.set(codes1), indices2.set(codes2);
  const ConvGradients second({plain(batch, 6, 14, 16, 5), pooled1, weight2, {}}, codes2, gradient);
  Buffer between(dtype, batch * 1176);
  between.set(second.grad_input);
  std::vector<double> rounded = between.get();
  if (dtype == DType::kFloat32) {
    for (double& value : rounded) value = lx::to_tf32(static_cast<float>(value));
  }
  const ConvGradients first({plain(batch, 1, 32, 6, 5), images, std::vector<double>(150), {}}, codes1, rounded);
  const std::vector<double> expected[] = {first.grad_weight, first.grad_bias, second.grad_weight, second.grad_bias};

  std::vector<std::unique_ptr<Buffer>> gradients;
  LenetConvolutionsBackwardOf<void> call{};
  for (int i = 0; i < 4; ++i) {
    gradients.push_back(std::make_unique<Buffer>(dtype, expected[i].size()));
    call.gradients[i] = gradients[i]->data();
  }
  call.batch = batch, call.slice_images = slice_images;
  call.input = input.data(), call.weight2 = weight.data();
  call.pooled1 = kept.data(), call.indices1 = indices1.data;
  call.grad_pooled2 = grad.data(), call.indices2 = indices2.data;
  Buffer workspace(DType::kFloat32, lenet_tensor_core_backward_workspace(batch, slice_images) / 4);
  call.workspace = workspace.data();
  run(
      name,
      [&] {
        workspace.reset();
        for (auto& each : gradients) each->reset();
        return launch_lenet_tensor_core_backward(dtype, call, {});
      },
      [&] {
        const double scale = 2 * std::sqrt(static_cast<double>(batch));
        for (int i = 0; i < 4; ++i) {
          compare(name + " gradient " + std::to_string(i), rounding, gradients[i]->get(), expected[i], scale);
        }
      });
}

// The gradients of a layer on its own, of its input, of its weight, and all. Those of the weight are sums of slices.
void test_tensor_core_gradients(DType dtype, const ConvPoolShape& s, int64_t slice_images) {
  const DType rounding = dtype == DType::kFloat32 ? DType::kFloat16 : dtype;
  const std::string name = "tensor core gradients of " + std::to_string(s.in_channels) + " channels dtype " +
                           std::to_string(static_cast<int>(dtype)) + " batch " + std::to_string(s.batch) +
                           " in slices of " + std::to_string(slice_images);
  Conv c{s, {}, {}, {}};
  c.input = random_values(rounding, c.inputs()), c.weight = random_values(rounding, c.weights(), 0.1);
  const std::vector<double> gradient = random_values(rounding, c.outputs());
  const std::vector<uint8_t> codes = random_codes(c.outputs());
  const ConvGradients expected(c, codes, gradient);
  Buffer input(dtype, c.inputs()), weight(dtype, c.weights()), grad_output(dtype, c.outputs());
  Bytes indices(c.outputs());
  input.set(c.input), weight.set(c.weight), grad_output.set(gradient), indices.set(codes);
  const Strides4 in_strides = contiguous(s.in_channels, s.height, s.width);
  const Strides4 out_strides = contiguous(s.out_channels, s.out_h, s.out_w);
  const double scale = 2 * std::sqrt(static_cast<double>(s.batch));
  for (const int mask : {1, 2, 7}) {
    const bool of_input = mask & 1, of_weight = mask & 2, of_bias = mask & 4;
    Buffer got_input(dtype, c.inputs()), got_weight(dtype, c.weights()), got_bias(dtype, s.out_channels);
    Buffer workspace(DType::kFloat32, conv_pool_backward_workspace(dtype, s, of_weight) / 4);
    run(
        name,
        [&] {
          got_input.reset(), got_weight.reset(), got_bias.reset(), workspace.reset();
          return launch_conv_pool_backward(
              dtype,
              {s, grad_output.data(), out_strides, indices.data, out_strides, of_weight ? input.data() : nullptr,
               in_strides, of_input ? weight.data() : nullptr, of_input ? got_input.data() : nullptr, in_strides,
               of_weight ? got_weight.data() : nullptr, of_bias ? got_bias.data() : nullptr, workspace.data(),
               slice_images},
              {});
        },
        [&] {
          if (of_input) compare(name + " grad_input", rounding, got_input.get(), expected.grad_input, 1);
          if (of_weight) compare(name + " grad_weight", rounding, got_weight.get(), expected.grad_weight, scale);
          if (of_bias) compare(name + " grad_bias", rounding, got_bias.get(), expected.grad_bias, scale);
        });
  }
}

// And of the linear layers. What goes from one to the next is rounded, as an operand and, in 16 bits, where it is
// stored.
void test_lenet_linear_gradients(DType dtype, int64_t batch, int64_t classes, int64_t slice_images) {
  const DType rounding = dtype == DType::kFloat32 ? DType::kFloat16 : dtype;
  const std::string name = "lenet linear gradients dtype " + std::to_string(static_cast<int>(dtype)) + " batch " +
                           std::to_string(batch) + " classes " + std::to_string(classes) + " in slices of " +
                           std::to_string(slice_images);
  std::vector<std::unique_ptr<Buffer>> buffers, gradients;
  auto buffer = [&](const std::vector<double>& values) {
    buffers.push_back(std::make_unique<Buffer>(dtype, values.size()));
    buffers.back()->set(values);
    return buffers.back()->data();
  };
  const int64_t widths[] = {400, 120, 84, classes};
  std::vector<std::vector<double>> inputs, weights, expected(6);
  LenetLinearGradientsOf<void> call{};
  for (int layer = 0; layer < 3; ++layer) {
    inputs.push_back(random_values(rounding, batch * widths[layer]));
    weights.push_back(random_values(rounding, widths[layer] * widths[layer + 1], 0.1));
    call.weights[layer] = buffer(weights[layer]);
    expected[2 * layer].resize(widths[layer] * widths[layer + 1]), expected[2 * layer + 1].resize(widths[layer + 1]);
  }
  for (int i = 0; i < 6; ++i) {
    gradients.push_back(std::make_unique<Buffer>(dtype, expected[i].size()));
    call.gradients[i] = gradients[i]->data();
  }
  std::vector<double> gradient = random_values(rounding, batch * classes);
  Buffer grad_features(dtype, batch * 400);
  call.batch = batch, call.classes = classes, call.slice_images = slice_images;
  call.grad_output = buffer(gradient), call.features = buffer(inputs[0]);
  call.hidden1 = buffer(inputs[1]), call.hidden2 = buffer(inputs[2]), call.grad_features = grad_features.data();
  for (int layer = 2; layer >= 0; --layer) {
    const int64_t depth = widths[layer], width = widths[layer + 1];
    std::vector<double> grad_input(batch * depth), operand = gradient;
    if (dtype == DType::kFloat32) {
      for (double& value : operand) value = lx::to_tf32(static_cast<float>(value));
    }
    for (int64_t i = 0; i < batch * width; ++i) {
      const int64_t n = i / width, j = i % width;
      expected[2 * layer + 1][j] += gradient[i];
      for (int64_t k = 0; k < depth; ++k) {
        expected[2 * layer][j * depth + k] += operand[i] * inputs[layer][n * depth + k];
        if (layer > 0 && inputs[layer][n * depth + k] <= 0) continue;
        grad_input[n * depth + k] += operand[i] * weights[layer][j * depth + k];
      }
    }
    Buffer between(dtype, batch * depth);
    between.set(grad_input);
    gradient = between.get();
  }

  Buffer workspace(DType::kFloat32, lenet_linear_gradients_workspace(dtype, batch, classes, slice_images) / 4);
  call.workspace = workspace.data();
  run(
      name,
      [&] {
        workspace.reset(), grad_features.reset();
        for (auto& each : gradients) each->reset();
        return launch_lenet_linear_gradients(dtype, call, {});
      },
      [&] {
        const double scale = 2 * std::sqrt(static_cast<double>(batch));
        for (int i = 0; i < 6; ++i) {
          compare(name + " gradient " + std::to_string(i), rounding, gradients[i]->get(), expected[i], scale);
        }
        compare(name + " of the features", rounding, grad_features.get(), gradient, 1);
      });
}

struct StepCase {
  int64_t batch, in_channels, classes, slice_images;
  Loss loss;
  Optimizer optimizer;
  bool options;  // class weights, label smoothing, ignored targets; weight decay, Nesterov, AMSGrad
};

// Against the forward and backward launches, which have tests of their own, with loss and update in float64 in between.
// Two steps, because the first one finds nothing in the buffers.
void test_lenet_step(const StepCase& c) {
  const int64_t batch = c.batch, pixels = 1024 * c.in_channels, classes = c.classes;
  const std::string name = "lenet step batch " + std::to_string(batch) + " channels " + std::to_string(c.in_channels) +
                           " classes " + std::to_string(classes) + " loss " + std::to_string(static_cast<int>(c.loss)) +
                           " optimizer " + std::to_string(static_cast<int>(c.optimizer)) +
                           (c.options ? " with options" : "");
  const DType dtype = DType::kFloat32;
  const int64_t sizes[] = {150 * c.in_channels, 6, 2400, 16, 48000, 120, 120 * 84, 84, 84 * classes, classes};
  const double scales[] = {0.2, 0.2, 0.08, 0.08, 0.05, 0.05, 0.09, 0.09, 0.1, 0.1};
  auto buffer = [&](int64_t count) { return std::make_unique<Buffer>(dtype, count); };
  auto floats = [](const std::unique_ptr<Buffer>& b) { return static_cast<float*>(b->data()); };

  std::vector<std::unique_ptr<Buffer>> parameters, gradients, buffers[3];
  std::vector<std::vector<double>> initial, first, second, largest;
  for (int i = 0; i < 10; ++i) {
    initial.push_back(random_values(dtype, sizes[i], scales[i]));
    first.emplace_back(sizes[i]), second.emplace_back(sizes[i]), largest.emplace_back(sizes[i]);
    parameters.push_back(buffer(sizes[i])), gradients.push_back(buffer(sizes[i]));
    for (auto& each : buffers) each.push_back(buffer(sizes[i]));
  }
  const auto images = buffer(batch * pixels), values = buffer(batch * classes), weight = buffer(classes),
             loss = buffer(1);
  images->set(random_values(dtype, batch * pixels));
  const std::vector<double> wanted = random_values(dtype, batch * classes);
  values->set(wanted);
  std::vector<double> class_weights(classes, 1.0);
  if (c.options) {
    for (int64_t i = 0; i < classes; ++i) class_weights[i] = 0.25 + static_cast<double>(i % 5);
  }
  weight->set(class_weights);
  std::vector<int64_t> targets(batch);
  for (int64_t n = 0; n < batch; ++n) targets[n] = c.options && n % 4 == 1 ? -100 : (n * 7) % classes;
  Bytes target_bytes(batch * 8);
  target_bytes.set(
      {reinterpret_cast<uint8_t*>(targets.data()), reinterpret_cast<uint8_t*>(targets.data()) + batch * 8});
  const double smoothing = c.options ? 0.125 : 0;

  LenetStep call{};
  call.batch = batch, call.in_channels = c.in_channels, call.classes = classes;
  call.slice_images = c.slice_images;
  call.input = floats(images), call.mean_loss = floats(loss);
  Bytes correct(8);
  call.correct = reinterpret_cast<int64_t*>(correct.data);
  call.loss = {c.loss,
               reinterpret_cast<const int64_t*>(target_bytes.data),
               floats(values),
               c.options ? floats(weight) : nullptr,
               static_cast<float>(smoothing),
               -100};
  call.optimizer = c.optimizer;
  const bool adam = c.optimizer != Optimizer::kSgd;
  const auto count = buffer(10);  // of Adam's steps; half of the parameters have theirs on the host
  for (int i = 0; i < 10; ++i) {
    call.parameters[i] = floats(parameters[i]);
    UpdateOf& u = call.updates[i];
    u.lr = 0.03125, u.momentum = 0.5, u.dampening = c.options ? 0 : 0.25, u.weight_decay = c.options ? 0.125 : 0;
    u.nesterov = c.options, u.maximize = c.options && i % 2 == 1;
    u.beta1 = 0.75, u.beta2 = 0.875, u.eps = 0.0625;
    u.momentum_buffer = adam ? nullptr : floats(buffers[0][i]);
    u.exp_avg = floats(buffers[0][i]), u.exp_avg_sq = floats(buffers[1][i]);
    u.max_exp_avg_sq = c.options ? floats(buffers[2][i]) : nullptr;
    u.step = i % 2 == 0 ? floats(count) + i : nullptr;
  }
  Buffer workspace(dtype, lenet_step_workspace(batch, c.in_channels, classes, c.slice_images) / 4);
  call.workspace = workspace.data();

  // One step of the same by way of the other launches, from `now`; returns the loss and the number of right answers.
  const auto kept1 = buffer(batch * 1176), kept2 = buffer(batch * 400), hidden1 = buffer(batch * 120),
             hidden2 = buffer(batch * 84), logits = buffer(batch * classes), grad_logits = buffer(batch * classes);
  Bytes codes1(batch * 1176), codes2(batch * 400);
  std::vector<std::vector<double>> now = initial;
  auto reference_step = [&](int step) {
    LenetForward forward{};
    LenetBackwardOf<void> backward{};
    forward.batch = backward.batch = batch, forward.in_channels = backward.in_channels = c.in_channels;
    forward.classes = backward.classes = classes;
    for (int i = 0; i < 10; ++i) {
      parameters[i]->set(now[i]);
      forward.parameters[i] = floats(parameters[i]), backward.parameters[i] = parameters[i]->data();
      backward.gradients[i] = gradients[i]->data();
    }
    forward.input = floats(images), forward.output = floats(logits);
    forward.pooled1 = floats(kept1), forward.pooled2 = floats(kept2);
    forward.hidden1 = floats(hidden1), forward.hidden2 = floats(hidden2);
    forward.indices1 = codes1.data, forward.indices2 = codes2.data;
    must(launch_lenet_forward(forward, {}).error, "forward");
    const std::vector<double> y = logits->get();
    std::vector<double> g(batch * classes);
    double divisor = 0, total = 0, right = 0;
    for (int64_t n = 0; n < batch; ++n) divisor += targets[n] < 0 ? 0 : class_weights[targets[n]];
    if (c.loss == Loss::kMeanSquaredError) divisor = static_cast<double>(batch * classes);
    for (int64_t n = 0; n < batch; ++n) {
      double sum = 0, shares = 0;
      const auto row = y.begin() + n * classes, wanted_row = wanted.begin() + n * classes;
      const int64_t found = std::max_element(row, row + classes) - row;
      const bool mse = c.loss == Loss::kMeanSquaredError;
      right += found == (mse ? std::max_element(wanted_row, wanted_row + classes) - wanted_row : targets[n]);
      for (int64_t k = 0; k < classes; ++k) sum += std::exp(y[n * classes + k]);
      for (int64_t k = 0; k < classes; ++k) {
        const double value = y[n * classes + k], difference = value - wanted[n * classes + k];
        const double share = (smoothing / static_cast<double>(classes) + (k == targets[n] ? 1 - smoothing : 0)) *
                             class_weights[k] / divisor;
        if (mse) {
          total += difference * difference / divisor;
          g[n * classes + k] = 2 * difference / divisor;
        } else if (targets[n] >= 0) {
          total += share * (std::log(sum) - value);
          shares += share;
          g[n * classes + k] = -share;
        }
      }
      for (int64_t k = 0; k < classes; ++k) g[n * classes + k] += shares * std::exp(y[n * classes + k]) / sum;
    }
    grad_logits->set(g);
    backward.slice_images = lenet_backward_slice_images(batch);
    backward.grad_output = grad_logits->data(), backward.input = images->data();
    backward.pooled1 = kept1->data(), backward.pooled2 = kept2->data();
    backward.hidden1 = hidden1->data(), backward.hidden2 = hidden2->data();
    backward.indices1 = codes1.data, backward.indices2 = codes2.data;
    Buffer room(dtype, lenet_backward_workspace(batch, c.in_channels, backward.slice_images) / 4);
    backward.workspace = room.data();
    must(launch_lenet_backward(dtype, backward, {}).error, "backward");
    for (int i = 0; i < 10; ++i) {
      const UpdateOf& u = call.updates[i];
      const std::vector<double> gradient = gradients[i]->get();
      for (int64_t k = 0; k < sizes[i]; ++k) {
        double d = u.maximize ? -gradient[k] : gradient[k];
        double& p = now[i][k];
        if (c.optimizer == Optimizer::kAdamW) p *= 1 - u.lr * u.weight_decay;
        if (c.optimizer != Optimizer::kAdamW) d += u.weight_decay * p;
        if (!adam) {
          first[i][k] = step == 1 ? d : u.momentum * first[i][k] + (1 - u.dampening) * d;
          p -= u.lr * (u.nesterov ? d + u.momentum * first[i][k] : first[i][k]);
          continue;
        }
        first[i][k] = u.beta1 * first[i][k] + (1 - u.beta1) * d;
        second[i][k] = u.beta2 * second[i][k] + (1 - u.beta2) * d * d;
        largest[i][k] = c.options ? std::fmax(largest[i][k], second[i][k]) : second[i][k];
        const double root = std::sqrt(largest[i][k] / (1 - std::pow(u.beta2, step)));
        p -= u.lr / (1 - std::pow(u.beta1, step)) * first[i][k] / (root + u.eps);
      }
    }
    return std::array{total, right};
  };
  const std::array<double, 2> expected[] = {reference_step(1), reference_step(2)};

  std::array<double, 2> got[2];
  run(
      name,
      [&] {
        LaunchResult result;
        count->set(std::vector<double>(10, 0.0));
        for (int i = 0; i < 10; ++i) {
          parameters[i]->set(initial[i]);
          for (auto& each : buffers) {
            each[i]->reset();
            if (adam) each[i]->set(std::vector<double>(sizes[i], 0.0));
          }
        }
        for (int step = 1; step <= 2 && result.error == cudaSuccess; ++step) {
          workspace.reset();
          for (UpdateOf& u : call.updates) u.first = step == 1, u.steps = static_cast<float>(step);
          result = launch_lenet_step(call, {});
          int64_t counted = 0;
          const std::vector<uint8_t> bytes = correct.get();
          std::memcpy(&counted, bytes.data(), 8);
          got[step - 1] = {loss->get()[0], static_cast<double>(counted)};
        }
        return result;
      },
      [&] {
        compare(name + " loss", dtype, {got[0][0], got[1][0]}, {expected[0][0], expected[1][0]}, 1);
        expect(got[0][1] == expected[0][1] && got[1][1] == expected[1][1], name + " counts right answers");
        for (int i = 0; i < 10; ++i) {
          compare(name + " parameter " + std::to_string(i), dtype, parameters[i]->get(), now[i], 1);
        }
        if (adam) expect(count->get()[4] == 2 && count->get()[5] == 0, name + " counts its steps");
      });
}

}  // namespace
