#pragma once

#include <Python.h>

namespace lenet_ext {

// Adds functions with the signature that CPython calls without building a tuple of arguments. False: Python has an
// error.
bool add_call_path(PyObject* module);

}  // namespace lenet_ext
