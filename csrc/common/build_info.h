#pragma once

#include <pybind11/pybind11.h>

namespace lenet_ext {

pybind11::dict build_info();

}  // namespace lenet_ext
