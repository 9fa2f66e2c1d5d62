// Every kernel of csrc/cuda against plain loops in float64, without torch, so that a sanitizer sees nothing but our
// code:
//   - on the CPU, against the stand-in for CUDA in this directory, under AddressSanitizer and UBSan (build.py), with
//     each case run under several schedules of its threads;
//   - on a GPU, built by nvcc, under compute-sanitizer (benchmarks/gpu_check.py).
// Usage: driver [most schedules]. Prints one line for each failure, and the plain closing line "N passed, N failed".
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/tensor_core.cuh"

namespace {

using namespace lenet_ext;
using namespace lenet_ext::cuda;

int passed = 0, failed = 0;
int schedules = 3;
std::mt19937 generator(1);

void expect(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok) printf("FAILED %s\n", what.c_str());
}

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(error));
  exit(2);
}

size_t element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
// Largest relative error of a result that was rounded once.
double tolerance(DType dtype) {
  return dtype == DType::kFloat64 ? 1e-12 : dtype == DType::kFloat32 ? 2e-5 : dtype == DType::kFloat16 ? 2e-3 : 1e-2;
}

double read(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(data)[i];
    case DType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DType::kFloat16:
      return lx::widen(static_cast<const lx::f16*>(data)[i]);
    default:
      return lx::widen(static_cast<const lx::bf16*>(data)[i]);
  }
}
void write(DType dtype, void* data, int64_t i, double value) {
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(data)[i] = value;
      break;
    case DType::kFloat32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case DType::kFloat16:
      static_cast<lx::f16*>(data)[i] = lx::narrow<lx::f16>(static_cast<float>(value));
      break;
    default:
      static_cast<lx::bf16*>(data)[i] = lx::narrow<lx::bf16>(static_cast<float>(value));
  }
}

// Device memory that starts out as NaN, placed so that its last byte is the allocation's last.
class Buffer {
 public:
  Buffer(DType dtype, int64_t count) : dtype_(dtype), count_(count), bytes_(count * element_bytes(dtype)) { reset(); }
  ~Buffer() { cudaFree(memory_); }
  Buffer(const Buffer&) = delete;

  void reset() {
    if (memory_ == nullptr) must(cudaMalloc(&memory_, bytes_), "cudaMalloc");
    std::vector<uint16_t> poison(bytes_ / 2 + 1, 0x7ff4);
    must(cudaMemcpy(memory_, poison.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void set(const std::vector<double>& values) {
    std::vector<unsigned char> host(bytes_ + 1);
    for (int64_t i = 0; i < count_; ++i) write(dtype_, host.data(), i, values[i]);
    must(cudaMemcpy(memory_, host.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<double> get() const {
    std::vector<unsigned char> host(bytes_ + 1);
    must(cudaMemcpy(host.data(), memory_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    std::vector<double> values(count_);
    for (int64_t i = 0; i < count_; ++i) values[i] = read(dtype_, host.data(), i);
    return values;
  }
  void* data() const { return memory_; }

 private:
  DType dtype_;
  int64_t count_;
  size_t bytes_;
  void* memory_ = nullptr;
};

struct Bytes {
  explicit Bytes(int64_t count) : count(count) {
    must(cudaMalloc(reinterpret_cast<void**>(&data), count), "cudaMalloc");
  }
  ~Bytes() { cudaFree(data); }
  Bytes(const Bytes&) = delete;
  void set(const std::vector<uint8_t>& values) {
    must(cudaMemcpy(data, values.data(), count, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<uint8_t> get() const {
    std::vector<uint8_t> values(count);
    must(cudaMemcpy(values.data(), data, count, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }
  int64_t count;
  uint8_t* data = nullptr;
};

std::vector<double> random_values(DType dtype, int64_t count, double scale = 1.0) {
  std::normal_distribution<double> normal;
  std::vector<double> values(count);
  alignas(8) unsigned char rounded[8];
  for (double& value : values) {
    write(dtype, rounded, 0, normal(generator) * scale);
    value = read(dtype, rounded, 0);
  }
  return values;
}

void compare(const std::string& what, DType dtype, const std::vector<double>& got, const std::vector<double>& expected,
             double scale) {
  for (size_t i = 0; i < got.size(); ++i) {
    const bool same = got[i] == expected[i] || (std::isnan(got[i]) && std::isnan(expected[i])) ||
                      std::fabs(got[i] - expected[i]) <= tolerance(dtype) * (scale + std::fabs(expected[i]));
    if (same) continue;
    expect(false, what + " at " + std::to_string(i) + ": " + std::to_string(got[i]) + ", expected " +
                      std::to_string(expected[i]));
    return;
  }
  expect(true, what);
}

// Runs a launcher under each schedule; on a GPU there is one. `prepare` makes outputs NaN again.
template <typename Launch, typename Check>
void run(const std::string& what, Launch launch, Check check) {
#ifdef LX_HOST_SHIM
  for (int i = 0; i < schedules; ++i) {
    lx_shim::state().schedule = static_cast<lx_shim::Schedule>((i + 2) % 3);  // shuffled first
    lx_shim::state().seed = static_cast<unsigned>(i);
#else
  {
#endif
    const LaunchResult result = launch();
    if (result.error == cudaSuccess) must(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    if (result.error != cudaSuccess) {
      expect(false, what + ": " + result.kernel + ": " + cudaGetErrorString(result.error));
      return;
    }
    check();
  }
}

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
                                workspace.data()};
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
};

// On the tensor cores where `tensor_cores`; float32 is then TF32.
void test_lenet(DType dtype, bool tensor_cores, const LenetCase& c) {
  const int64_t batch = c.batch, classes = c.classes;
  const std::string name = std::string(tensor_cores ? "tensor core" : "") + " lenet dtype " +
                           std::to_string(static_cast<int>(dtype)) + " batch " + std::to_string(batch) + " cluster " +
                           std::to_string(c.cluster) + (c.integers ? " integers" : "") +
                           (c.irregular ? " irregular" : "");
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
  if (c.integers && tensor_cores) {
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
  Bytes indices1(batch * 1176), indices2(batch * 400);
  call.batch = batch, call.classes = classes;
  call.input = input.data(), call.output = results[4]->data();
  if (c.training) {
    call.pooled1 = results[0]->data(), call.pooled2 = results[1]->data();
    call.hidden1 = results[2]->data(), call.hidden2 = results[3]->data();
    call.indices1 = indices1.data, call.indices2 = indices2.data;
  }
  LenetForward strict{};
  static_assert(sizeof strict == sizeof call);
  memcpy(&strict, &call, sizeof call);
  // TF32 rounds as float16 does, to 10 bits of mantissa.
  const DType rounding = tensor_cores && dtype == DType::kFloat32 ? DType::kFloat16 : dtype;
  run(
      name,
      [&] {
        for (auto& each : results) each->reset();
        return tensor_cores     ? launch_lenet_tensor_core_forward(dtype, call, {})
               : c.cluster != 0 ? launch_lenet_cluster_forward(strict, c.cluster, {})
                                : launch_lenet_forward(strict, {});
      },
      [&] {
        for (int i = c.training ? 0 : 4; i < 5; ++i) {
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
  call.batch = batch, call.classes = classes, call.slice_images = slice_images;
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
  Buffer workspace(DType::kFloat32, lenet_backward_workspace(batch, slice_images) / 4);
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

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) schedules = atoi(argv[1]);
  const DType all[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  for (const DType dtype : all) {
    const std::string suffix = " dtype " + std::to_string(static_cast<int>(dtype));
    test_convolution("odd" + suffix, dtype, odd(2));
    test_convolution("plain" + suffix, dtype, plain(3, 3, 9, 5, 3));
    test_product(dtype, 5, 37, 70, false, true);
    test_product(dtype, 37, 33, 3, true, true);
    test_product(dtype, 16, 32, 130, true, false);
  }
  for (const int64_t batch : {1, 3, 13}) {
    const std::string suffix = " batch " + std::to_string(batch);
    test_convolution("conv1" + suffix, DType::kFloat32, plain(batch, 1, 32, 6, 5));
    test_convolution("conv2" + suffix, DType::kFloat32, plain(batch, 6, 14, 16, 5));
  }
  test_lenet(DType::kFloat32, false, {1, 10, false});
  test_lenet(DType::kFloat32, false, {5, 128, true});
  // Blocks of two images and of four; the last block is not full.
  for (const int64_t batch : {129, 257}) {
    const std::string suffix = " batch " + std::to_string(batch);
    test_convolution("conv1" + suffix, DType::kFloat32, plain(batch, 1, 32, 6, 5));
    test_convolution("conv2" + suffix, DType::kFloat32, plain(batch, 6, 14, 16, 5));
    test_lenet(DType::kFloat32, false, {batch, 10, true});
  }
  const LenetForward none{};
  const bool clusters = lenet_cluster_blocks(1, 1) != 0;  // of this GPU
  for (const int cluster : {2, 4, 8}) {
    if (!clusters) break;
    expect(launch_lenet_cluster_forward(none, cluster, {}).error == cudaSuccess, "no image");
    test_lenet(DType::kFloat32, false, {1, 10, false, false, false, cluster});
    test_lenet(DType::kFloat32, false, {3, 128, true, true, false, cluster});
    test_lenet(DType::kFloat32, false, {3, 1, true, false, true, cluster});
  }
  if (clusters) test_lenet(DType::kFloat32, false, {17, 7, false, false, false, 8});  // clusters with two images
  test_rounding_to_tf32();
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    test_small_product(dtype);
    for (const int64_t batch : {1, 3, 17}) {
      test_tensor_core_layer(dtype, plain(batch, 1, 32, 6, 5), batch != 3);
      test_tensor_core_layer(dtype, plain(batch, 6, 14, 16, 5), batch != 3);
    }
    test_lenet(dtype, true, {1, 10, false});
    test_lenet(dtype, true, {3, 128, true, true, false});
    test_lenet(dtype, true, {3, 10, true, false, true});
    test_lenet(dtype, true, {17, 1, true});
    test_lenet(dtype, true, {33, 10, false, true});
  }
  for (const int64_t batch : {1, 2, 3, 17, 33}) test_lenet_backward(DType::kFloat32, batch, 10, 0, batch % 2 == 0);
  test_convolution("conv1 float16", DType::kFloat16, plain(2, 1, 32, 6, 5));
  test_convolution("conv2 bfloat16", DType::kBFloat16, plain(2, 6, 14, 16, 5));
  schedules = 3;  // the tests of the operator, which run every case under each, do not come to slices of several images
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    test_lenet_backward(dtype, 5, 1, 2, false);    // pairs of images, the last alone
    test_lenet_backward(dtype, 17, 128, 9, true);  // passes of 4, 4 and 1 images
    test_lenet_backward(dtype, 3, 127, 3, true);   // a pass that is not full
  }
  printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
