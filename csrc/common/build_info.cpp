#include "common/build_info.h"

#include <string>

#include "common/capability.h"
#include "lenet_ext_build_config.h"  // written by the build: versions, flags, CUDA or the reason why not

namespace lenet_ext {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::list split(const std::string& text, char separator) {
  pybind11::list parts;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = text.find(separator, begin);
    if (end == std::string::npos) end = text.size();
    if (end > begin) parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

std::string python_version() {
  const std::string version = std::to_string(PY_MAJOR_VERSION) + "." + std::to_string(PY_MINOR_VERSION);
#ifdef Py_GIL_DISABLED
  return version + "t";  // free-threaded, as Python calls its own program
#else
  return version;
#endif
}

}  // namespace

pybind11::dict build_info() {
  using namespace pybind11::literals;
  pybind11::list capabilities;
  for (const char* name : cpu::compiled_capabilities()) capabilities.append(name);
  pybind11::dict info("version"_a = LENET_EXT_VERSION, "torch"_a = LENET_EXT_TORCH_VERSION,
                      "python"_a = python_version(), "compiler"_a = compiler(), "cxx_flags"_a = LENET_EXT_CXX_FLAGS,
                      "cpu_capabilities"_a = capabilities, "cpu_capability"_a = cpu::name(cpu::capability()));
#ifdef LENET_EXT_WITH_CUDA
  info["cuda"] = LENET_EXT_CUDA_VERSION;
  info["cuda_arch_list"] = split(LENET_EXT_CUDA_ARCH_LIST, ';');
#else
  info["cuda"] = pybind11::none();
  info["cuda_arch_list"] = split("", ';');
  info["cuda_reason"] = LENET_EXT_CUDA_REASON;
#endif
  return info;
}

}  // namespace lenet_ext
