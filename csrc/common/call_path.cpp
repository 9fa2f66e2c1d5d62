// The short way from Python to an operator: is this an ordinary call, whose arguments the operator takes as they are?
// If so, it is called from here, through the dispatcher. Asked in Python, attribute by attribute, the answer takes
// longer than a small layer, and as long again does torch.ops, which finds out anew what each argument is. Whatever is
// not ordinary takes the general way, in Python, which also says what is wrong. Nothing is computed here and nothing is
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
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pythoncapi_compat.h>

#include <array>
#include <optional>

#include "conv_relu_max_pool2d/calls.h"
#include "lenet/calls.h"
#include "linear/calls.h"
#include "relu_avg_pool2d/calls.h"

namespace py = pybind11;

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

std::optional<at::Tensor> bias_of(PyObject* object) {
  return Py_IsNone(object) ? std::nullopt : std::optional(THPVariable_Unpack(object));
}

// Ordinary are tensors and parameters, no subclasses, with a kernel for their device, layout and dtype; an image or
// more with a 4-D weight, any rows with a 2-D one; a bias for each output.
bool ordinary(PyObject* given_input, PyObject* given_weight, PyObject* given_bias) {
  if (!THPVariable_CheckExact(given_input) || !THPVariable_CheckExact(given_weight) ||
      !(Py_IsNone(given_bias) || THPVariable_CheckExact(given_bias))) {
    return false;
  }
  const at::Tensor &input = THPVariable_Unpack(given_input), &weight = THPVariable_Unpack(given_weight);
  if (!has_kernels(input) || !ordinary_context(input)) return false;
  if (weight.layout() != at::kStrided || !(weight.dim() == 2 || (weight.dim() == 4 && input.dim() == 4))) return false;
  const std::optional<at::Tensor> bias = bias_of(given_bias);
  return !bias || (bias->layout() == at::kStrided && bias->dim() == 1 && bias->size(0) == weight.size(0));
}

// What an operator returns, for Python; other Python threads go on while it works, and may change what a Python object
// holds: the arguments are references of our own.
template <typename Operator, typename... Arguments>
PyObject* called(const Operator& op, const Arguments&... arguments) {
  at::Tensor output;
  {
    const py::gil_scoped_release unlocked;
    output = op.call(arguments...);
  }
  return THPVariable_Wrap(output);
}

// A tracer records what torch.ops is told; what is called from here it would not see.
bool traced() { return torch::jit::tracer::isTracing(); }

// call_linear(input, weight, bias) -> Tensor, or None: not an ordinary call.
template <bool relu>
PyObject* call_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3 || traced() || !ordinary(arguments[0], arguments[1], arguments[2])) Py_RETURN_NONE;
  const at::Tensor input = THPVariable_Unpack(arguments[0]), weight = THPVariable_Unpack(arguments[1]);
  return called(relu ? call::linear_relu() : call::linear(), input, weight, bias_of(arguments[2]));
  END_HANDLE_TH_ERRORS
}

// The options of an operator as functional.py normalises them: a tuple of ints, bools, None and tuples of ints.
class Options {
 public:
  explicit Options(PyObject* tuple, Py_ssize_t count)
      : tuple_(tuple), fits_(PyTuple_CheckExact(tuple) && PyTuple_GET_SIZE(tuple) == count) {}

  // Whether all that was asked for was there.
  bool fit() const { return fits_; }

  int64_t integer(Py_ssize_t at) { return fits_ ? number(PyTuple_GET_ITEM(tuple_, at)) : 0; }
  bool boolean(Py_ssize_t at) {
    fits_ = fits_ && PyBool_Check(PyTuple_GET_ITEM(tuple_, at));
    return fits_ && PyTuple_GET_ITEM(tuple_, at) == Py_True;
  }
  std::optional<int64_t> optional(Py_ssize_t at) {
    return !fits_ || Py_IsNone(PyTuple_GET_ITEM(tuple_, at)) ? std::nullopt : std::optional(integer(at));
  }
  template <size_t size>
  std::array<int64_t, size> integers(Py_ssize_t at) {
    std::array<int64_t, size> values{};
    PyObject* given = fits_ ? PyTuple_GET_ITEM(tuple_, at) : nullptr;
    fits_ = fits_ && PyTuple_CheckExact(given) && PyTuple_GET_SIZE(given) == size;
    for (size_t i = 0; fits_ && i < size; ++i) values[i] = number(PyTuple_GET_ITEM(given, i));
    return values;
  }

 private:
  int64_t number(PyObject* object) {
    int overflow = 0;
    fits_ = fits_ && PyLong_CheckExact(object);
    const int64_t value = fits_ ? PyLong_AsLongLongAndOverflow(object, &overflow) : 0;
    fits_ = fits_ && overflow == 0;
    return value;
  }

  PyObject* tuple_;
  bool fits_;
};

// call_conv_relu_max_pool2d(input, weight, bias, options) -> Tensor, or None: not an ordinary call.
PyObject* call_conv_relu_max_pool2d(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4 || traced() || !ordinary(arguments[0], arguments[1], arguments[2])) Py_RETURN_NONE;
  Options options(arguments[3], 9);
  const auto stride = options.integers<2>(0), dilation = options.integers<2>(2);
  const auto padding = options.integers<4>(1);
  const int64_t groups = options.integer(3);
  const auto pool_kernel_size = options.integers<2>(4), pool_stride = options.integers<2>(5);
  const auto pool_padding = options.integers<2>(6), pool_dilation = options.integers<2>(7);
  const bool ceil_mode = options.boolean(8);
  if (!options.fit()) Py_RETURN_NONE;
  const at::Tensor input = THPVariable_Unpack(arguments[0]), weight = THPVariable_Unpack(arguments[1]);
  return called(call::conv_relu_max_pool2d(), input, weight, bias_of(arguments[2]), stride, padding, dilation, groups,
                pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode);
  END_HANDLE_TH_ERRORS
}

// call_relu_avg_pool2d(input, options) -> Tensor, or None: not an ordinary call.
PyObject* call_relu_avg_pool2d(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  // In place of a weight the input, which has as many dimensions.
  if (count != 2 || traced() || !ordinary(arguments[0], arguments[0], Py_None)) Py_RETURN_NONE;
  Options options(arguments[1], 6);
  const auto kernel_size = options.integers<2>(0), stride = options.integers<2>(1), padding = options.integers<2>(2);
  const bool ceil_mode = options.boolean(3), count_include_pad = options.boolean(4);
  const std::optional<int64_t> divisor_override = options.optional(5);
  const at::Tensor input = THPVariable_Unpack(arguments[0]);
  if (!options.fit() || input.dim() != 4) Py_RETURN_NONE;
  return called(call::relu_avg_pool2d(), input, kernel_size, stride, padding, ceil_mode, count_include_pad,
                divisor_override);
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
py::object item(PyObject* dictionary, PyObject* name) {
  PyObject* value = nullptr;
  PyDict_GetItemRef(dictionary, name, &value);
  return py::reinterpret_steal<py::object>(value);
}

// dictionary[name] is an empty dictionary or None.
bool is_empty(PyObject* dictionary, PyObject* name) {
  const py::object value = item(dictionary, name);
  return value && (Py_IsNone(value.ptr()) || (PyDict_Check(value.ptr()) && PyDict_Size(value.ptr()) == 0));
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
    const py::object value = item(state, PyTuple_GET_ITEM(pair, 0));
    if (!same(value.ptr(), PyTuple_GET_ITEM(pair, 1))) return false;
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
  const auto state = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(child, nullptr));
  if (!state || PyDict_Contains(state.ptr(), names.forward) != 0) return false;
  for (PyObject* hooks : names.hooks) {
    if (!is_empty(state.ptr(), hooks)) return false;
  }
  if (!has_attributes(state.ptr(), attributes)) return false;
  const py::object own = item(state.ptr(), names.parameters);
  if (!own || !PyDict_Check(own.ptr())) return false;
  for (PyObject* name : {names.weight, names.bias}) {
    const py::object parameter = item(own.ptr(), name);
    if (!is_parameter(parameter.ptr()) || PyList_Append(parameters, parameter.ptr()) != 0) return false;
  }
  return true;
}

// A new list of the weights and biases of a module's children, in their order; null if one of them is not as
// untouched_parameters() wants it.
py::object untouched(PyObject* modules, PyObject* children) {
  if (!PyDict_Check(modules) || !PyTuple_CheckExact(children) || PyDict_Size(modules) != PyTuple_GET_SIZE(children)) {
    return {};
  }
  auto parameters = py::reinterpret_steal<py::object>(PyList_New(0));
  if (!parameters) throw python_error();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(children); ++i) {
    PyObject* expected = PyTuple_GET_ITEM(children, i);
    const py::object child = item(modules, PyTuple_GET_ITEM(expected, 0));
    if (!child ||
        !add_parameters(child.ptr(), PyTuple_GET_ITEM(expected, 1), PyTuple_GET_ITEM(expected, 2), parameters.ptr())) {
      PyErr_Clear();  // an attribute that cannot be compared is not the one that was expected
      return {};
    }
  }
  return parameters;
}

// untouched_parameters(modules, children) -> list or None. `modules`: a module's dictionary of children; `children`:
// tuples (name, type, attributes) of all that it has to have, attributes being tuples (name, value). The list has their
// weights and biases, in this order.
PyObject* untouched_parameters(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  py::object parameters = count == 2 ? untouched(arguments[0], arguments[1]) : py::object();
  if (!parameters) Py_RETURN_NONE;
  return parameters.release().ptr();
  END_HANDLE_TH_ERRORS
}

using LenetParameters = std::array<at::Tensor, 10>;

// The tensors of an ordinary call of the whole network: a batch of float32 or float64 images (on CUDA of the 16-bit
// types, too) for ten parameters (weight and bias of conv1, conv2, fc1, fc2, fc3; of exactly that type) of LeNet's
// shapes, where no dispatch mode, no tracer and no transform of torch.func would miss the layers.
std::optional<LenetParameters> ordinary_lenet(PyObject* given_input, PyObject* list) {
  if (Py_TYPE(given_input) != reinterpret_cast<PyTypeObject*>(THPVariableClass) || !PyList_CheckExact(list)) return {};
  const at::Tensor& input = THPVariable_Unpack(given_input);
  if (!has_kernels(input) || !ordinary_context(input)) return {};
  const bool dtype = input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble || input.is_cuda();
  if (!dtype || input.dim() != 4) return {};
  LenetParameters parameters;
  {
    const py::scoped_critical_section locked(list);
    if (PyList_GET_SIZE(list) != 10) return {};
    for (Py_ssize_t i = 0; i < 10; ++i) {
      PyObject* object = PyList_GET_ITEM(list, i);
      if (!is_parameter(object)) return {};
      parameters[i] = THPVariable_Unpack(object);
    }
  }
  const auto has_shape = [&parameters](int i, c10::IntArrayRef shape) { return parameters[i].sizes() == shape; };
  // The last layer's and the biases' sizes, dtypes and devices are the operator's to check, as they are the layers'.
  if (input.size(2) != 32 || input.size(3) != 32 || !has_shape(0, {6, input.size(1), 5, 5}) ||
      !has_shape(2, {16, 6, 5, 5}) || !has_shape(4, {120, 400}) || !has_shape(6, {84, 120}) ||
      c10::impl::TorchDispatchModeTLS::stack_len() != 0 || traced()) {
    return {};
  }
  return parameters;
}

// is_ordinary_lenet(input, parameters) -> bool.
PyObject* is_ordinary_lenet(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return answer(count == 2 && ordinary_lenet(arguments[0], arguments[1]).has_value());
  END_HANDLE_TH_ERRORS
}

// call_lenet(modules, children, input) -> Tensor, or None: not an ordinary call, or not untouched_parameters().
PyObject* call_lenet(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const py::object list = count == 3 ? untouched(arguments[0], arguments[1]) : py::object();
  if (!list) Py_RETURN_NONE;
  const std::optional<LenetParameters> parameters = ordinary_lenet(arguments[2], list.ptr());
  if (!parameters) Py_RETURN_NONE;
  const at::Tensor input = THPVariable_Unpack(arguments[2]);
  return called(call::lenet(), input, at::TensorList(*parameters));
  END_HANDLE_TH_ERRORS
}

// are_plain_leaves(parameters) -> bool. All require a gradient, and no hook waits for it.
PyObject* are_plain_leaves(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 1 || !PyList_CheckExact(arguments[0])) return answer(false);
  const py::scoped_critical_section locked(arguments[0]);
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
    fast<are_plain_leaves>("are_plain_leaves", "are_plain_leaves(parameters): bool"),
    fast<untouched_parameters>("untouched_parameters", "untouched_parameters(modules, children): list or None"),
    fast<is_ordinary_lenet>("is_ordinary_lenet", "is_ordinary_lenet(input, parameters): bool"),
    fast<call_conv_relu_max_pool2d>("call_conv_relu_max_pool2d",
                                    "call_conv_relu_max_pool2d(input, weight, bias, options): Tensor or None"),
    fast<call_lenet>("call_lenet", "call_lenet(modules, children, input): Tensor or None"),
    fast<call_linear<false>>("call_linear", "call_linear(input, weight, bias): Tensor or None"),
    fast<call_linear<true>>("call_linear_relu", "call_linear_relu(input, weight, bias): Tensor or None"),
    fast<call_relu_avg_pool2d>("call_relu_avg_pool2d", "call_relu_avg_pool2d(input, options): Tensor or None"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_call_path(PyObject* module) { return make_names() && PyModule_AddFunctions(module, functions) == 0; }

}  // namespace lenet_ext
