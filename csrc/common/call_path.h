#pragma once

#include <Python.h>

namespace lenet_ext {

// Functions of the Python module, with the signature that CPython calls without building a tuple of arguments.
extern PyMethodDef call_path_functions[];

}  // namespace lenet_ext
