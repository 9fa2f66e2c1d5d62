// What the Python side asks before it calls an operator: is this an ordinary call, whose arguments the operator takes
// as they are? Asked in Python, attribute by attribute, the answer takes longer than a small layer. Whatever is not
// ordinary takes the general way, in Python, which also says what is wrong. Nothing is computed here and nothing is
// decided that Python does not decide as well; derivatives are the operators' own.
//
// Where Python has no global lock, another thread may change a dictionary or a list at any time: what is read out of
// one is held by a reference of our own, or read while the object is locked.
#include "common/call_path.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/critical_section.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pythoncapi_compat.h>

#include <array>

namespace lenet_ext {
namespace {

PyObject* answer(bool ordinary) { return PyBool_FromLong(ordinary); }

// Inside a transform of torch.func.
bool transformed() {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// No mode that sees Python's calls, no autocast, whose dtype may be one without kernels, and no transform: a size of a
// tensor that it has wrapped would be asked of whoever traces it.
bool ordinary_context(const at::Tensor& input) {
  return at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
         !at::autocast::is_autocast_enabled(input.device().type()) && !transformed();
}

bool has_kernels(const at::Tensor& input) {
  if (input.layout() != at::kStrided || input.is_nested()) return false;
  const at::ScalarType dtype = input.scalar_type();
  const bool on_cpu_too = dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16;
#ifdef LENET_EXT_WITH_CUDA
  if (input.is_cuda()) return on_cpu_too || dtype == at::kHalf;
#endif
  return input.is_cpu() && on_cpu_too;
}

// is_ordinary(input, weight, bias) -> bool. Ordinary are tensors and parameters, no subclasses, with a kernel for their
// device, layout and dtype; an image or more with a 4-D weight, any rows with a 2-D one; a bias for each output.
PyObject* is_ordinary(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3 || !THPVariable_CheckExact(arguments[0]) || !THPVariable_CheckExact(arguments[1]) ||
      !(Py_IsNone(arguments[2]) || THPVariable_CheckExact(arguments[2]))) {
    return answer(false);
  }
  const at::Tensor &input = THPVariable_Unpack(arguments[0]), &weight = THPVariable_Unpack(arguments[1]);
  if (!has_kernels(input) || !ordinary_context(input)) return answer(false);
  if (weight.layout() != at::kStrided || !(weight.dim() == 2 || (weight.dim() == 4 && input.dim() == 4))) {
    return answer(false);
  }
  if (!Py_IsNone(arguments[2])) {
    const at::Tensor& bias = THPVariable_Unpack(arguments[2]);
    if (bias.layout() != at::kStrided || bias.dim() != 1 || bias.size(0) != weight.size(0)) return answer(false);
  }
  return answer(true);
  END_HANDLE_TH_ERRORS
}

// Strings that are looked up in every call: made with the module, before there can be a second thread here.
struct {
  PyObject *forward, *parameters, *weight, *bias;
  std::array<PyObject*, 4> hooks;
} names;

bool make_names() {
  bool made = true;
  const auto make = [&made](PyObject*& name, const char* text) {
    name = PyUnicode_InternFromString(text);
    made = made && name != nullptr;
  };
  make(names.forward, "forward");
  make(names.parameters, "_parameters");
  make(names.weight, "weight");
  make(names.bias, "bias");
  make(names.hooks[0], "_forward_hooks");
  make(names.hooks[1], "_forward_pre_hooks");
  make(names.hooks[2], "_backward_hooks");
  make(names.hooks[3], "_backward_pre_hooks");
  return made;
}

// dictionary[name], or null, with or without an error.
THPObjectPtr item(PyObject* dictionary, PyObject* name) {
  PyObject* value = nullptr;
  PyDict_GetItemRef(dictionary, name, &value);
  return THPObjectPtr(value);
}

// dictionary[name] is an empty dictionary or None.
bool is_empty(PyObject* dictionary, PyObject* name) {
  THPObjectPtr value = item(dictionary, name);
  return value && (Py_IsNone(value.get()) || (PyDict_Check(value.get()) && PyDict_Size(value.get()) == 0));
}

// Equal and of the very same type, elements of tuples too: True is no 1.
bool same(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (a == nullptr || Py_TYPE(a) != Py_TYPE(b)) return false;
  if (!PyTuple_CheckExact(a)) return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
  if (PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a); ++i) {
    if (!same(PyTuple_GET_ITEM(a, i), PyTuple_GET_ITEM(b, i))) return false;
  }
  return true;
}

bool has_attributes(PyObject* state, PyObject* expected) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(expected); ++i) {
    PyObject* pair = PyTuple_GET_ITEM(expected, i);
    THPObjectPtr value = item(state, PyTuple_GET_ITEM(pair, 0));
    if (!same(value.get(), PyTuple_GET_ITEM(pair, 1))) return false;
  }
  return true;
}

bool is_parameter(PyObject* object) {
  return object != nullptr && Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(ParameterClass);
}

// Adds weight and bias of a child to `parameters` if nothing could look at or change what it does: it is of exactly
// this type, has no hooks, no forward of its own, and these attributes.
bool add_parameters(PyObject* child, PyObject* type, PyObject* attributes, PyObject* parameters) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(child)) != type) return false;
  THPObjectPtr state(PyObject_GenericGetDict(child, nullptr));
  if (!state || PyDict_Contains(state.get(), names.forward) != 0) return false;
  for (PyObject* hooks : names.hooks) {
    if (!is_empty(state.get(), hooks)) return false;
  }
  if (!has_attributes(state.get(), attributes)) return false;
  THPObjectPtr own = item(state.get(), names.parameters);
  if (!own || !PyDict_Check(own.get())) return false;
  for (PyObject* name : {names.weight, names.bias}) {
    THPObjectPtr parameter = item(own.get(), name);
    if (!is_parameter(parameter.get()) || PyList_Append(parameters, parameter.get()) != 0) return false;
  }
  return true;
}

// untouched_parameters(modules, children) -> list or None. `modules`: a module's dictionary of children; `children`:
// tuples (name, type, attributes) of all that it has to have, attributes being tuples (name, value). The list has their
// weights and biases, in this order.
PyObject* untouched_parameters(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2 || !PyDict_Check(arguments[0]) || !PyTuple_CheckExact(arguments[1])) Py_RETURN_NONE;
  PyObject *modules = arguments[0], *children = arguments[1];
  if (PyDict_Size(modules) != PyTuple_GET_SIZE(children)) Py_RETURN_NONE;
  THPObjectPtr parameters(PyList_New(0));
  if (!parameters) return nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(children); ++i) {
    PyObject* expected = PyTuple_GET_ITEM(children, i);
    THPObjectPtr child = item(modules, PyTuple_GET_ITEM(expected, 0));
    if (!child ||
        !add_parameters(child.get(), PyTuple_GET_ITEM(expected, 1), PyTuple_GET_ITEM(expected, 2), parameters.get())) {
      PyErr_Clear();  // an attribute that cannot be compared is not the one that was expected
      Py_RETURN_NONE;
    }
  }
  return parameters.release();
  END_HANDLE_TH_ERRORS
}

// is_ordinary_lenet(input, parameters) -> bool. Ordinary is a batch of float32 or float64 images (on CUDA of the 16-bit
// types, too) for ten parameters (weight and bias of conv1, conv2, fc1, fc2, fc3; of exactly that type) of LeNet's
// shapes, where no dispatch mode, no tracer and no transform of torch.func would miss the layers.
PyObject* is_ordinary_lenet(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2 || Py_TYPE(arguments[0]) != reinterpret_cast<PyTypeObject*>(THPVariableClass) ||
      !PyList_CheckExact(arguments[1])) {
    return answer(false);
  }
  const pybind11::scoped_critical_section locked(arguments[1]);
  if (PyList_GET_SIZE(arguments[1]) != 10) return answer(false);
  const at::Tensor& input = THPVariable_Unpack(arguments[0]);
  if (!has_kernels(input) || !ordinary_context(input)) return answer(false);
  const bool dtype = input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble || input.is_cuda();
  if (!dtype || input.dim() != 4) return answer(false);
  std::array<c10::IntArrayRef, 10> shapes;
  for (Py_ssize_t i = 0; i < 10; ++i) {
    PyObject* object = PyList_GET_ITEM(arguments[1], i);
    if (!is_parameter(object)) return answer(false);
    const at::Tensor& parameter = THPVariable_Unpack(object);
    shapes[i] = parameter.sizes();
  }
  const int64_t channels = input.size(1);
  // The last layer's and the biases' sizes, dtypes and devices are the operator's to check, as they are the layers'.
  if (input.size(2) != 32 || input.size(3) != 32 || shapes[0] != c10::IntArrayRef({6, channels, 5, 5}) ||
      shapes[2] != c10::IntArrayRef({16, 6, 5, 5}) || shapes[4] != c10::IntArrayRef({120, 400}) ||
      shapes[6] != c10::IntArrayRef({84, 120}) || c10::impl::TorchDispatchModeTLS::stack_len() != 0 ||
      torch::jit::tracer::isTracing()) {
    return answer(false);
  }
  return answer(true);
  END_HANDLE_TH_ERRORS
}

// are_plain_leaves(parameters) -> bool. All require a gradient, and no hook waits for it.
PyObject* are_plain_leaves(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 1 || !PyList_CheckExact(arguments[0])) return answer(false);
  const pybind11::scoped_critical_section locked(arguments[0]);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(arguments[0]); ++i) {
    PyObject* object = PyList_GET_ITEM(arguments[0], i);
    if (!is_parameter(object)) return answer(false);
    const auto* variable = reinterpret_cast<THPVariable*>(object);
    const at::Tensor& parameter = THPVariable_Unpack(object);
    if (!parameter.requires_grad() || variable->backward_hooks != nullptr ||
        variable->post_accumulate_grad_hooks != nullptr || !torch::autograd::impl::hooks(parameter).empty()) {
      return answer(false);
    }
  }
  return answer(true);
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef fast(const char* name, const char* doc) {
  // Python's own way to store a function of this signature.
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

PyMethodDef functions[] = {
    fast<is_ordinary>("is_ordinary", "is_ordinary(input, weight, bias): bool"),
    fast<are_plain_leaves>("are_plain_leaves", "are_plain_leaves(parameters): bool"),
    fast<untouched_parameters>("untouched_parameters", "untouched_parameters(modules, children): list or None"),
    fast<is_ordinary_lenet>("is_ordinary_lenet", "is_ordinary_lenet(input, parameters): bool"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_call_path(PyObject* module) { return make_names() && PyModule_AddFunctions(module, functions) == 0; }

}  // namespace lenet_ext
