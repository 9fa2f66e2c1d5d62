#include "common/capability.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

namespace lenet_ext::cpu {
namespace {

bool compiled(Capability capability) {
  switch (capability) {
    case Capability::Default:
      return true;
    case Capability::AVX2:
      return false LENET_EXT_IF_AVX2(|| true);
    case Capability::AVX512:
      return false LENET_EXT_IF_AVX512(|| true);
  }
  return false;
}

bool supported(Capability capability) {
  if (!compiled(capability)) return false;
#if defined(__x86_64__)
  switch (capability) {
    case Capability::Default:
      return true;
    case Capability::AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Capability::AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return capability == Capability::Default;
}

constexpr Capability kAll[] = {Capability::AVX512, Capability::AVX2, Capability::Default};

Capability choose() {
  const char* forced = std::getenv("LENET_EXT_CPU_CAPABILITY");
  if (forced != nullptr && *forced != '\0') {
    for (Capability candidate : kAll) {
      if (std::string(forced) != name(candidate)) continue;
      TORCH_CHECK(supported(candidate), "lenet_ext: LENET_EXT_CPU_CAPABILITY=", forced,
                  compiled(candidate) ? " is not supported by this processor" : " was not compiled into this build");
      return candidate;
    }
    TORCH_CHECK(false, "lenet_ext: LENET_EXT_CPU_CAPABILITY must be default, avx2 or avx512, got '", forced, "'");
  }
  for (Capability candidate : kAll) {
    if (supported(candidate)) return candidate;
  }
  return Capability::Default;
}

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

const char* name(Capability capability) {
  switch (capability) {
    case Capability::AVX512:
      return "avx512";
    case Capability::AVX2:
      return "avx2";
    default:
      return "default";
  }
}

std::vector<const char*> compiled_capabilities() {
  std::vector<const char*> names;
  for (Capability candidate : kAll) {
    if (compiled(candidate)) names.insert(names.begin(), name(candidate));
  }
  return names;
}

}  // namespace lenet_ext::cpu
