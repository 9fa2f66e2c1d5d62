// The tensor cores as one warp uses them: small matrix products in float16, bfloat16 and TF32, accumulated in float32.
//
// All formats look alike when operands are counted in words of 4 bytes, which hold two 16-bit values or one of TF32:
// one product takes 8 words of depth, d[16][8] += a[16][8 words] x b[8][8 words]^T. Lane 4 g + t of the warp holds
//   a[0..3]: words (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4) as (row, word);
//   b[0..1]: words (g, t), (g, t + 4) as (column, word);
//   d[0..3]: values (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1) as (row, column).
// The order of words does not matter as long as a and b agree on it.
//
// They need compute capability 8.0. Code for older GPUs traps; launchers ask has_tensor_cores() before they come here.
#pragma once

#include "device.cuh"

namespace lx {

// What a storage type is multiplied in: itself for the 16-bit types; for float TF32, a float whose mantissa has 10
// bits.
template <typename T>
struct Operand {
  static constexpr int kPerWord = 4 / sizeof(T);
};

// Rounds to nearest, ties away from zero: the tensor cores by themselves would cut off the lower bits.
LX_DEVICE float to_tf32(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return float_of(bits);
#else
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return is_nan(x) ? float_of(0x7fffe000u) : x;
  return float_of((bits + 0x1000u) & ~0x1fffu);
#endif
}

// A value as an operand of its type's products; results as operands of the next product.
LX_DEVICE float to_operand(float x) { return to_tf32(x); }
LX_DEVICE bf16 to_operand(bf16 x) { return x; }
LX_DEVICE f16 to_operand(f16 x) { return x; }

template <typename T>
__device__ __forceinline__ void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef LX_HOST_SHIM
  constexpr int kPerWord = Operand<T>::kPerWord;
  struct Fragment {
    uint32_t a[4], b[2];
  };
  const lx_shim::Lanes<Fragment> lanes =
      lx_shim::exchange_all(Fragment{{a[0], a[1], a[2], a[3]}, {b0, b1}}, __FILE__, __LINE__);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int word = 0; word < 8; ++word) {
      const uint32_t x = lanes[row % 8 * 4 + word % 4].a[row / 8 + word / 4 * 2];
      const uint32_t y = lanes[column * 4 + word % 4].b[word / 4];
      T xs[kPerWord], ys[kPerWord];
      memcpy(xs, &x, sizeof x);
      memcpy(ys, &y, sizeof y);
      for (int k = 0; k < kPerWord; ++k) d[i] += widen(xs[k]) * widen(ys[k]);
      // The hardware's result is undefined if a float was not rounded; here it is NaN.
      if (sizeof(T) == 4 && ((x | y) & 0x1fffu) != 0) d[i] = NAN;
    }
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define LX_MMA(shape_and_types)                                                                              \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, bf16>) {
    LX_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<T, f16>) {
    LX_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<T, float>);
    LX_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef LX_MMA
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

// d = c + a x b: sums that begin with what is kept, or loaded at once, take no moves.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             const float (&c)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define LX_MMA(shape_and_types)                                                                                  \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};" \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
  if constexpr (std::is_same_v<T, bf16>) {
    LX_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<T, f16>) {
    LX_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<T, float>);
    LX_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef LX_MMA
#else
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  multiply_accumulate<T>(d, a, b0, b1);
#endif
}

// d = a x b: a product that adds to a constant zero, where sums would be cleared by moves.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr float kZero[4] = {};
  multiply_add<T>(d, a, b0, b1, kZero);
}

// A word of an operand, of value(0) and, in the 16-bit types, value(1) in its upper half.
template <typename T, typename Value>
LX_DEVICE uint32_t operand_word(Value value) {
  if constexpr (Operand<T>::kPerWord == 1) {
    return bits_of(to_tf32(value(0)));
  } else {
    const T low = value(0), high = value(1);
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
  }
}

// The same of a word of stored values.
template <typename T>
LX_DEVICE uint32_t operand_word(uint32_t stored) {
  if constexpr (Operand<T>::kPerWord == 1) {
    return bits_of(to_tf32(float_of(stored)));
  } else {
    return stored;
  }
}

// N values that lie next to each other, as words of an operand.
template <typename T, int N>
using Operands = Pack<uint32_t, N / Operand<T>::kPerWord>;

// The same of two stored values.
template <typename T>
LX_DEVICE Operands<T, 2> operands(T first, T second) {
  if constexpr (Operand<T>::kPerWord == 1) {
    return {{bits_of(to_tf32(first)), bits_of(to_tf32(second))}};
  } else {
    return {{first.bits | static_cast<uint32_t>(second.bits) << 16}};
  }
}

// A word of two sums in a 16-bit type, rounded; with kRelu, ReLU, which lets NaN pass, is the same instruction.
template <typename T, bool kRelu>
LX_DEVICE uint32_t rounded_word(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
#define LX_CONVERT(to) asm("cvt.rn" to ".f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low))
  if constexpr (std::is_same_v<T, bf16> && kRelu) {
    LX_CONVERT(".relu.bf16x2");
  } else if constexpr (std::is_same_v<T, bf16>) {
    LX_CONVERT(".bf16x2");
  } else if constexpr (kRelu) {
    LX_CONVERT(".relu.f16x2");
  } else {
    LX_CONVERT(".f16x2");
  }
#undef LX_CONVERT
  return word;
#else
  return operand_word<T>([&](int k) {
    const float sum = k == 0 ? low : high;
    return narrow<T>(kRelu ? max_or_nan(sum, 0.0f) : sum);
  });
#endif
}

// N sums that lie next to each other as words of an operand, rounded; with kRelu, after ReLU.
template <typename T, bool kRelu = false, int N>
LX_DEVICE Operands<T, N> rounded(const float (&sums)[N]) {
  Operands<T, N> words;
#pragma unroll
  for (int i = 0; i < N / Operand<T>::kPerWord; ++i) {
    if constexpr (Operand<T>::kPerWord == 1) {
      words.values[i] = bits_of(to_tf32(kRelu ? max_or_nan(sums[i], 0.0f) : sums[i]));
    } else {
      words.values[i] = rounded_word<T, kRelu>(sums[2 * i], sums[2 * i + 1]);
    }
  }
  return words;
}

// Four matrices, or two, of 8 rows of 4 words from shared memory: lane l says where row l % 8 of matrix l / 8 begins, a
// multiple of 16 bytes, and gets word l % 4 of row l / 4 of each.
template <int kMatrices>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[kMatrices], const uint32_t* row) {
  static_assert(kMatrices == 4 || kMatrices == 2);
#ifdef LX_HOST_SHIM
  const lx_shim::Lanes<const uint32_t*> rows = lx_shim::exchange_all(row, __FILE__, __LINE__);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < kMatrices; ++i) {
    const uint32_t* from = rows[8 * i + lane / 4];
    lx_shim::require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "a matrix row in shared memory is misaligned");
    words[i] = from[lane % 4];
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(address)
                 : "memory");
  }
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

// Operands whose depth is rows of shared memory: four matrices of 8 columns, as many rows of them as half a product is
// deep, 8 in the 16-bit types and 4 in TF32. A lane says where kNamed rows begin: of the i-th, which matrix's it is,
// and which row of it. In 16 bits one load distributes them; in TF32 a lane names the rows that it reads itself, from
// its own column on, where columns 4 to 7 may lie in a vector of their own, `vectors_apart` bytes behind the others.
template <typename T>
struct Transposed {
  static constexpr bool kDistributed = sizeof(T) == 2;
  static constexpr int kRows = 4 * Operand<T>::kPerWord, kNamed = kDistributed ? 1 : 4;

  static LX_DEVICE int matrix(int i) { return kDistributed ? threadIdx.x % 32 / 8 : i; }
  static LX_DEVICE int row() { return threadIdx.x % kRows; }
  static LX_DEVICE int column(int vectors_apart) {
    return kDistributed ? 0 : threadIdx.x % 32 / 16 * vectors_apart + threadIdx.x / 4 % 4 * 4;
  }
};

// Loads them from `offset` bytes behind the rows, which begin at multiples of 16 bytes: lane l gets the values in
// column l / 4 of the rows 2 (l % 4) and 2 (l % 4) + 1 of each, in TF32 of row l % 4.
template <typename T>
__device__ __forceinline__ void load_transposed(uint32_t (&words)[4],
                                                const unsigned char* const (&rows)[Transposed<T>::kNamed], int offset) {
  if constexpr (!Transposed<T>::kDistributed) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = *reinterpret_cast<const uint32_t*>(rows[i] + offset);
  } else {
#ifdef LX_HOST_SHIM
    const lx_shim::Lanes<const unsigned char*> all = lx_shim::exchange_all(rows[0] + offset, __FILE__, __LINE__);
    const int column = threadIdx.x % 32 / 4, first = threadIdx.x % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      uint16_t halves[2];
      for (int k = 0; k < 2; ++k) {
        const unsigned char* from = all[8 * i + first + k];
        lx_shim::require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "a matrix row in shared memory is misaligned");
        memcpy(&halves[k], from + 2 * column, 2);
      }
      words[i] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
    }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(rows[0] + offset)))
                 : "memory");
#elif defined(__CUDA_ARCH__)
    __trap();
#endif
  }
}

// Whether the current device runs a version of this kernel that was compiled for compute capability 8.0 or above.
template <typename... Parameters>
bool has_tensor_cores(void (*kernel)(Parameters...)) {
  return compiled_capability(kernel) >= 80;
}

}  // namespace lx
