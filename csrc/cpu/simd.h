// Vectors for kernels that are compiled once per instruction set from one source.
//
// A Vec<T, N> is a GCC / Clang vector: +, *, comparisons and ?: work lane by lane and become the instructions of
// whatever set the file is compiled for. `a * b + c` becomes a fused multiply-add where the set has one
// (-ffp-contract=fast).
//
// Kernel files include nothing of the standard library but the C headers here: an inline function that two
// objects share would be merged by the linker into one copy, perhaps the one with AVX-512 instructions, and
// crash older processors. Everything below therefore has internal linkage or lives in a namespace that carries
// the name of the instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds fault with its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__AVX2__)
#include <immintrin.h>  // its functions are always inlined, so they never become shared copies
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross an object's border, so their ABI does not matter

#define LENET_EXT_INLINE inline __attribute__((always_inline))
#define LENET_EXT_UNROLL _Pragma("GCC unroll 32")

// The build compiles each kernel file with one of (default_, 16), (avx2, 32), (avx512, 64).
#ifndef LENET_EXT_CPU_CAPABILITY
#define LENET_EXT_CPU_CAPABILITY default_
#define LENET_EXT_VECTOR_BYTES 16
#endif

namespace lenet_ext {

// Storage of a bfloat16, the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

namespace cpu::LENET_EXT_CPU_CAPABILITY {

// Accumulators that fit into the registers next to the operands: AVX-512 has 32 registers, the others 16.
constexpr int kRegisters = LENET_EXT_VECTOR_BYTES == 64 ? 32 : 16;

// Arithmetic type of a storage type: bfloat16 accumulates in float32.
template <typename T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<BFloat16> {
  using type = float;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

// `inline`: a full specialization has external linkage otherwise, and several objects include this.
template <typename T>
inline constexpr bool kIsFloat = false;
template <>
inline constexpr bool kIsFloat<float> = true;

template <typename T>
constexpr int kLanes = LENET_EXT_VECTOR_BYTES / sizeof(T);

template <typename T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <>
struct IntegerOf<int32_t> {
  using type = int32_t;
};
template <>
struct IntegerOf<uint8_t> {
  using type = uint8_t;
};

template <typename T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
  typedef typename IntegerOf<T>::type Integer;
  typedef Integer integers __attribute__((vector_size(sizeof(T) * N)));
};
template <typename T, int N>
using Vec = typename VecOf<T, N>::type;
template <typename T, int N>
using IntVec = typename VecOf<T, N>::integers;

// Any integers. (GCC ignores the attribute of a typedef in a function template.)
template <typename I, int N>
struct IntegersOf {
  typedef I type __attribute__((vector_size(sizeof(I) * N)));
};
template <typename I, int N>
using Integers = typename IntegersOf<I, N>::type;

template <typename V, typename T>
LENET_EXT_INLINE V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V, typename T>
LENET_EXT_INLINE void store(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

template <typename V, typename T>
LENET_EXT_INLINE V broadcast(T x) {
  return x - V{};  // the compiler turns it into one broadcast
}

template <typename T>
LENET_EXT_INLINE bool is_nan(T x) {
  return x != x;
}

template <typename T>
LENET_EXT_INLINE constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
LENET_EXT_INLINE constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
LENET_EXT_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
LENET_EXT_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

LENET_EXT_INLINE float widen(float x) { return x; }
LENET_EXT_INLINE double widen(double x) { return x; }
LENET_EXT_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

template <typename T>
LENET_EXT_INLINE T narrow(Accumulator<T> x) {
  return x;
}
// Round to nearest, ties to even; NaN stays a NaN.
template <>
LENET_EXT_INLINE BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16{static_cast<uint16_t>(is_nan(x) ? 0x7fc0u : rounded)};
}

// A vector's worth of a storage type, as the arithmetic type.
template <int N, typename T>
LENET_EXT_INLINE Vec<Accumulator<T>, N> load_widened(const T* from) {
  using V = Vec<Accumulator<T>, N>;
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
    return load<V>(from);
  } else {
    using Bits = Integers<uint16_t, N>;
    using Wide = Integers<uint32_t, N>;
    return (V)(__builtin_convertvector(load<Bits>(from), Wide) << 16);
  }
}
// narrow(), for a vector.
template <int N, typename T>
LENET_EXT_INLINE void store_narrowed(T* to, Vec<Accumulator<T>, N> v) {
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
    store(to, v);
  } else {
    using Bits = Integers<uint16_t, N>;
    using Wide = Integers<uint32_t, N>;
    const Wide bits = (Wide)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    store(to, __builtin_convertvector(v != v ? (Wide{} + 0x7fc0u) : rounded, Bits));
  }
}

// An infinity or NaN has all exponent bits set. Integer arithmetic, so that the compiler may vectorise the loop.
LENET_EXT_INLINE bool all_finite(const float* values, int64_t count) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, values + i, sizeof bits);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return bad == 0;
}
LENET_EXT_INLINE bool all_finite(const double* values, int64_t count) {
  uint64_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t bits;
    __builtin_memcpy(&bits, values + i, sizeof bits);
    bad |= (bits & 0x7ff0000000000000u) == 0x7ff0000000000000u;
  }
  return bad == 0;
}

LENET_EXT_INLINE bool all_finite(const BFloat16* values, int64_t count) {
  uint16_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= (values[i].bits & 0x7f80u) == 0x7f80u;
  return bad == 0;
}

// What is read by way of this pointer is read anew, although the compiler has seen it by way of another: it would keep
// values for later in registers that sums need, and the sums in memory.
template <typename T>
LENET_EXT_INLINE void forget_origin(const T*& pointer) {
  asm("" : "+r"(pointer));
}

// How many terms of a long sum are added up by themselves, in registers, before they go to the others: the error of a
// sum grows with the number of terms behind one another.
constexpr int64_t kTermsAtOnce = 64;

// `count` in equal parts of at most `most`.
LENET_EXT_INLINE int64_t at_once(int64_t count, int64_t most) {
  return max_of<int64_t>(divide_up(count, max_of<int64_t>(divide_up(count, most), 1)), 1);
}

// max(0, x) that passes NaN. In this operand order it is one max instruction.
template <typename V>
LENET_EXT_INLINE V relu(V x) {
  return V{} > x ? V{} : x;
}

// The greatest of four, NaN if one of them is. Max instructions return their second operand where one is NaN, so the
// NaNs are looked for apart.
template <typename V>
LENET_EXT_INLINE V max_of_four(V a, V b, V c, V d) {
  V best = a > b ? a : b;
  const V other = c > d ? c : d;
  best = best > other ? best : other;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 4) {
    const __mmask16 nan =
        _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) | _mm512_cmp_ps_mask((__m512)c, (__m512)d, _CMP_UNORD_Q);
    return (V)_mm512_mask_mov_ps((__m512)best, nan, _mm512_set1_ps(__builtin_nanf("")));
  }
#endif
  const auto nan = (a != a) | (b != b) | (c != c) | (d != d);
  return nan ? broadcast<V>(static_cast<decltype(+a[0])>(__builtin_nanf(""))) : best;
}

// --8<-- [start:window-rule]
// One step of a pooling window's scan: a candidate that is greater, or NaN, becomes the best; `code` is its place.
template <typename V, typename I>
LENET_EXT_INLINE void offer(V& best, I& code, V candidate, int place) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(best[0]) == 4) {  // compilers move such masks through vector registers
    const __mmask16 wins = _mm512_cmp_ps_mask((__m512)candidate, (__m512)best, _CMP_GT_OQ) |
                           _mm512_cmp_ps_mask((__m512)candidate, (__m512)candidate, _CMP_UNORD_Q);
    best = (V)_mm512_mask_mov_ps((__m512)best, wins, (__m512)candidate);
    code = (I)_mm512_mask_mov_epi32((__m512i)code, wins, _mm512_set1_epi32(place));
    return;
  }
#endif
  const I wins = (candidate > best) | (candidate != candidate);
  best = wins ? candidate : best;
  code = wins ? (I{} + place) : code;
}

// ReLU of a window's best, and the code `closed` where it passes no gradient: NaN passes, nothing else that is not
// positive.
template <typename V, typename I>
LENET_EXT_INLINE void close_relu(V& best, I& code, int closed_code) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(best[0]) == 4) {
    const __mmask16 closed = _mm512_cmp_ps_mask((__m512)best, _mm512_setzero_ps(), _CMP_LE_OQ);
    best = (V)_mm512_maskz_mov_ps(_knot_mask16(closed), (__m512)best);
    code = (I)_mm512_mask_mov_epi32((__m512i)code, closed, _mm512_set1_epi32(closed_code));
    return;
  }
#endif
  const I closed = best <= V{};
  code = closed ? (I{} + closed_code) : code;
  best = closed ? V{} : best;
}
// --8<-- [end:window-rule]

#if defined(__clang__)
#define LENET_EXT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LENET_EXT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec<T, N>{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... of the lower (upper) halves.
template <int N, typename T = float>
LENET_EXT_INLINE Vec<T, N> interleave_low(Vec<T, N> a, Vec<T, N> b) {
  if constexpr (N == 2) {
    return LENET_EXT_SHUFFLE(a, b, 0, 2);
  } else if constexpr (N == 4) {
    return LENET_EXT_SHUFFLE(a, b, 0, 4, 1, 5);
  } else if constexpr (N == 8) {
    return LENET_EXT_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else {
    return LENET_EXT_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
}
template <int N, typename T = float>
LENET_EXT_INLINE Vec<T, N> interleave_high(Vec<T, N> a, Vec<T, N> b) {
  if constexpr (N == 2) {
    return LENET_EXT_SHUFFLE(a, b, 1, 3);
  } else if constexpr (N == 4) {
    return LENET_EXT_SHUFFLE(a, b, 2, 6, 3, 7);
  } else if constexpr (N == 8) {
    return LENET_EXT_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    return LENET_EXT_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// Of a and b behind one another, every second element from the first (the second) on.
template <int N, typename T>
LENET_EXT_INLINE Vec<T, N> evens(Vec<T, N> a, Vec<T, N> b) {
  if constexpr (N == 2) {
    return LENET_EXT_SHUFFLE(a, b, 0, 2);
  } else if constexpr (N == 4) {
    return LENET_EXT_SHUFFLE(a, b, 0, 2, 4, 6);
  } else if constexpr (N == 8) {
    return LENET_EXT_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  } else {
    return LENET_EXT_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  }
}
template <int N, typename T>
LENET_EXT_INLINE Vec<T, N> odds(Vec<T, N> a, Vec<T, N> b) {
  if constexpr (N == 2) {
    return LENET_EXT_SHUFFLE(a, b, 1, 3);
  } else if constexpr (N == 4) {
    return LENET_EXT_SHUFFLE(a, b, 1, 3, 5, 7);
  } else if constexpr (N == 8) {
    return LENET_EXT_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    return LENET_EXT_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
}
#undef LENET_EXT_SHUFFLE

// Transposes an N x N tile in registers: interleaving rows i and i + N/2 log2(N) times.
template <int N, typename T = float>
LENET_EXT_INLINE void transpose_tile(Vec<T, N> (&rows)[N]) {
  using V = Vec<T, N>;
  LENET_EXT_UNROLL for (int stage = 1; stage < N; stage *= 2) {
    V next[N];
    LENET_EXT_UNROLL for (int i = 0; i < N / 2; ++i) {
      next[2 * i] = interleave_low<N, T>(rows[i], rows[i + N / 2]);
      next[2 * i + 1] = interleave_high<N, T>(rows[i], rows[i + N / 2]);
    }
    LENET_EXT_UNROLL for (int i = 0; i < N; ++i)
      rows[i] = next[i];
  }
}

// Lane i: the sum of the lanes of vectors[i]. Interleaving i and i + count/2 and adding the halves, log2(N) times,
// costs a third of N sums one by one.
template <int N>
LENET_EXT_INLINE Vec<float, N> sums_of_lanes(Vec<float, N> (&vectors)[N]) {
  LENET_EXT_UNROLL for (int count = N; count > 1; count /= 2) {
    LENET_EXT_UNROLL for (int i = 0; i < N / 2; ++i) {
      if (i >= count / 2) continue;
      const Vec<float, N> a = vectors[i], b = vectors[i + count / 2];
      vectors[i] = interleave_low<N>(a, b) + interleave_high<N>(a, b);
    }
  }
  return vectors[0];
}

// Sum of the lanes, pairwise, in a fixed order.
template <typename T, int N>
LENET_EXT_INLINE T sum_lanes(Vec<T, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vec<T, N / 2> low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum_lanes<T, N / 2>(low + high);
  }
}

// Sum of an array in a fixed order.
template <typename A>
LENET_EXT_INLINE A sum_of(const A* values, int64_t count) {
  constexpr int lanes = kLanes<A>;
  using V = Vec<A, lanes>;
  V sum{};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sum += load<V>(values + i);
  A total = sum_lanes<A, lanes>(sum);
  for (; i < count; ++i) total += values[i];
  return total;
}

template <typename A>
LENET_EXT_INLINE A dot(const A* a, const A* b, int64_t count) {
  constexpr int lanes = kLanes<A>;
  using V = Vec<A, lanes>;
  V sum{};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sum += load<V>(a + i) * load<V>(b + i);
  A total = sum_lanes<A, lanes>(sum);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

}  // namespace cpu::LENET_EXT_CPU_CAPABILITY
}  // namespace lenet_ext
