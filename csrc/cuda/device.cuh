// What every kernel file starts from: storage types, shared memory, packed loads, the launch.
//
// The same files are compiled by nvcc for the GPU and, with LX_HOST_SHIM, by a host compiler against
// tests/cuda_on_cpu/cuda_runtime.h, so that every kernel runs under the sanitizers on any machine. That is why there
// is no launch with triple chevrons, no static shared memory and no header of CUDA's but cuda_runtime.h: what the
// language of kernels needs beyond C++ is in this file or in the shim.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

// The block's dynamic shared memory, as launched. Kernels carve it up with lx::take.
#ifdef LX_HOST_SHIM
#define LX_SMEM(name) unsigned char* name = lx_shim::shared_memory()
#else
#define LX_SMEM(name)                                           \
  extern __shared__ __align__(16) unsigned char name##_block[]; \
  unsigned char* name = name##_block
#endif

#define LX_DEVICE __host__ __device__ __forceinline__

namespace lx {

// ---------------------------------------------------------------------------------------------- storage types

struct bf16 {  // the upper half of a float
  uint16_t bits;
};
struct f16 {  // IEEE 754 binary16
  uint16_t bits;
};

// What a storage type is computed in.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

LX_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
LX_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename A>
LX_DEVICE bool is_nan(A x) {
  return x != x;
}

// The larger one; NaN if one is.
LX_DEVICE float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || is_nan(a) ? a : b;
#endif
}

LX_DEVICE float widen(float x) { return x; }
LX_DEVICE double widen(double x) { return x; }
LX_DEVICE float widen(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
LX_DEVICE float widen(f16 x) {
#ifdef __CUDA_ARCH__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  // Put the bits where a float has them, then correct the exponent's bias by a multiplication, which also
  // normalises subnormals: 2^112 = 2^(127 - 15).
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
template <typename T>
LX_DEVICE T narrow(Accumulator<T> x) {
  return x;
}
template <>
LX_DEVICE bf16 narrow<bf16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bf16 b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(x));
  return b;
#else
  const uint32_t bits = bits_of(x);
  return bf16{static_cast<uint16_t>(is_nan(x) ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}
template <>
LX_DEVICE f16 narrow<f16>(float x) {
#ifdef __CUDA_ARCH__
  f16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
  return h;
#else
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return f16{static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000u))};
  }
  return f16{static_cast<uint16_t>(sign | (((rest + 0xfffu + (rest >> 13 & 1u)) >> 13) - 0x1c000u))};
#endif
}

// The bytes of `low` (0 to 3) and of `high` (4 to 7) that the four lower hexadecimal digits of `selector` name, the
// lowest digit first.
LX_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, selector);
#else
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
  }
  return result;
#endif
}

// -------------------------------------------------------------------------------------- shared memory, packs

template <typename T>
LX_DEVICE constexpr int64_t taken(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
}
// The next `count` elements of a buffer, 16-byte aligned. The launcher adds up the same taken<T>(count).
template <typename T>
LX_DEVICE T* take(unsigned char*& buffer, int64_t count) {
  T* begin = reinterpret_cast<T*>(buffer);
  buffer += taken<T>(count);
  return begin;
}

// N elements that are loaded and stored at once; the address must be a multiple of their size, or of 16.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T values[N];
  LX_DEVICE T operator[](int i) const { return values[i]; }
};
template <int N, typename T>
LX_DEVICE Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
// Whether packs of 4 may be used on this address. Slices of a larger storage begin anywhere.
template <typename T>
LX_DEVICE bool aligned_for_packs(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(Pack<T, 4>) == 0;
}

// The whole block copies `count` elements, a multiple of 4, into shared memory and widens them. The caller puts a
// barrier behind it.
template <typename T>
LX_DEVICE void copy_to_shared(Accumulator<T>* to, const T* from, int count) {
  if (aligned_for_packs(from)) {
    for (int i = threadIdx.x * 4; i < count; i += blockDim.x * 4) {
      const Pack<T, 4> pack = load_pack<4>(from + i);
      *reinterpret_cast<Pack<Accumulator<T>, 4>*>(to + i) = {
          {widen(pack[0]), widen(pack[1]), widen(pack[2]), widen(pack[3])}};
    }
  } else {
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = widen(from[i]);
  }
}

// Rounds four values and stores them at once.
template <typename T>
LX_DEVICE void store_narrow(T* to, const float (&values)[4]) {
  *reinterpret_cast<Pack<T, 4>*>(to) = {
      {narrow<T>(values[0]), narrow<T>(values[1]), narrow<T>(values[2]), narrow<T>(values[3])}};
}

template <typename A>
LX_DEVICE void fill_shared(A* to, int count, A value) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = value;
}

// Sum over the 32 lanes of a warp, in every lane, always in the same order.
template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// -------------------------------------------------------------------------------------------------- launching

template <typename I>
LX_DEVICE constexpr I divide_up(I a, I b) {
  return (a + b - 1) / b;
}

// The same number, computed here: the compiler does not add its parts one by one to each of several addresses.
LX_DEVICE int computed_here(int x) {
#ifdef __CUDA_ARCH__
  asm("" : "+r"(x));
#endif
  return x;
}

// The thread's number, read here: what is computed from it is not kept in registers from before a loop around this.
LX_DEVICE int thread_read_here() {
  int x = static_cast<int>(threadIdx.x);
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// x, which the compiler then does not compute anew in each of the branches that use it.
LX_DEVICE float computed_here(float x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(x));
#endif
  return x;
}

// x / kDivisor, for 0 <= x < 2^16: one instruction, where any number takes three or four.
template <unsigned kDivisor>
LX_DEVICE int small_quotient(int x) {
  static_assert(kDivisor > 1 && kDivisor < 1u << 16);  // the reciprocal's error, times x, is less than 2^32
  constexpr uint64_t kReciprocal = 0xffffffffu / kDivisor + 1;
  return static_cast<int>(static_cast<uint32_t>(x) * kReciprocal >> 32);
}

// Blocks of a kernel whose threads or blocks loop over `total` items with the whole grid as their stride.
inline unsigned grid_for(int64_t total, int64_t per_block) {
  const int64_t blocks = divide_up(total, per_block), limit = 0x7fffffff;
  return static_cast<unsigned>(blocks < limit ? blocks : limit);
}

constexpr int64_t kDefaultSharedBytes = 48 * 1024;

// The most shared memory that a block can have on the current device: 64 KB (7.5), 99 KB (8.6, 8.9, 12.0), 163 KB
// (8.0), 227 KB (9.0, 10.0).
inline int64_t most_shared_bytes() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess) {
    return bytes;
  }
  cudaGetLastError();  // the launch will report it
  return kDefaultSharedBytes;
}

inline bool fits_shared_memory(int64_t bytes) { return bytes <= kDefaultSharedBytes || bytes <= most_shared_bytes(); }

// The compute capability, times 10, that the version of this kernel was compiled for which the current device runs; 0
// if there is none, which the launch of an ordinary kernel will report.
template <typename... Parameters>
int compiled_capability(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess) {
    return attributes.ptxVersion;
  }
  cudaGetLastError();
  return 0;
}

// Launches clusters of `cluster` blocks (cluster.cuh), unless an earlier launch of the chain failed, and says which
// kernel it was.
template <typename... Parameters, typename... Arguments>
void launch_clusters(lenet_ext::cuda::LaunchResult& result, const char* name, void (*kernel)(Parameters...),
                     unsigned grid, unsigned cluster, unsigned block, int64_t shared_bytes, cudaStream_t stream,
                     const Arguments&... arguments) {
  if (result.error != cudaSuccess) return;
  result.kernel = name;
  if (shared_bytes > kDefaultSharedBytes) {
    result.error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (result.error != cudaSuccess) return;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  const unsigned attributes = cluster > 1 ? 1 : 0;  // GPUs without clusters know no such attribute
  const cudaLaunchConfig_t config = {dim3(grid), dim3(block), static_cast<size_t>(shared_bytes),
                                     stream,     &attribute,  attributes};
  result.error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Launches single blocks.
template <typename... Parameters, typename... Arguments>
void launch(lenet_ext::cuda::LaunchResult& result, const char* name, void (*kernel)(Parameters...), unsigned grid,
            unsigned block, int64_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  launch_clusters(result, name, kernel, grid, 1, block, shared_bytes, stream, arguments...);
}

}  // namespace lx

// Calls `function<T>(...)` for the storage type that a DType names.
#define LX_DISPATCH(dtype, function, ...)       \
  switch (dtype) {                              \
    case ::lenet_ext::cuda::DType::kFloat32:    \
      return function<float>(__VA_ARGS__);      \
    case ::lenet_ext::cuda::DType::kFloat64:    \
      return function<double>(__VA_ARGS__);     \
    case ::lenet_ext::cuda::DType::kFloat16:    \
      return function<::lx::f16>(__VA_ARGS__);  \
    default:                                    \
      return function<::lx::bf16>(__VA_ARGS__); \
  }
