// What the driver program is made of: buffers, comparison, schedules. One translation unit, driver.cu, includes all.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

}  // namespace
