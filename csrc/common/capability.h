// Which instruction set the CPU kernels use. The kernels are compiled once per set from one source
// (csrc/cpu/) and chosen at run time, so that one binary runs, and runs well, on every machine.
#pragma once

#include <vector>

namespace lenet_ext::cpu {

enum class Capability { Default, AVX2, AVX512 };

// The best set that was compiled and that this processor has, or the one that LENET_EXT_CPU_CAPABILITY
// (default|avx2|avx512) forces; read once per process. Throws where the forced one cannot run here.
Capability capability();

const char* name(Capability capability);
std::vector<const char*> compiled_capabilities();

}  // namespace lenet_ext::cpu

// Picks `table` from the namespace of the capability in use, e.g. LENET_EXT_CPU_DISPATCH(gemm_kernels).
#if defined(LENET_EXT_HAVE_AVX512)
#define LENET_EXT_IF_AVX512(...) __VA_ARGS__
#else
#define LENET_EXT_IF_AVX512(...)
#endif
#if defined(LENET_EXT_HAVE_AVX2)
#define LENET_EXT_IF_AVX2(...) __VA_ARGS__
#else
#define LENET_EXT_IF_AVX2(...)
#endif

#define LENET_EXT_CPU_DECLARE(Type, table)                       \
  namespace default_ {                                           \
  extern const Type table;                                       \
  }                                                              \
  LENET_EXT_IF_AVX2(namespace avx2 { extern const Type table; }) \
  LENET_EXT_IF_AVX512(namespace avx512 { extern const Type table; })

#define LENET_EXT_CPU_DISPATCH(table)                                                                          \
  ([]() -> const auto& {                                                                                       \
    switch (::lenet_ext::cpu::capability()) {                                                                  \
      LENET_EXT_IF_AVX512(case ::lenet_ext::cpu::Capability::AVX512 : return ::lenet_ext::cpu::avx512::table;) \
      LENET_EXT_IF_AVX2(case ::lenet_ext::cpu::Capability::AVX2 : return ::lenet_ext::cpu::avx2::table;)       \
      default:                                                                                                 \
        return ::lenet_ext::cpu::default_::table;                                                              \
    }                                                                                                          \
  }())
