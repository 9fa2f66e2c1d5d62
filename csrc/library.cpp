// Every operator's schema, in one place, and the Python module. The kernels register themselves for their
// device where they are defined (csrc/<op>/cpu.cpp for the CPU, csrc/<op>/cuda.cpp for CUDA), the fake
// implementations in lenet_ext/ops.py.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "common/build_info.h"
#include "common/call_path.h"

// `padding` is (top, bottom, left, right): padding="same" with an even kernel is not symmetric.
#define CONV_POOL_OPTIONS                                        \
  "int[2] stride, int[4] padding, int[2] dilation, int groups, " \
  "int[2] pool_kernel_size, int[2] pool_stride, int[2] pool_padding, int[2] pool_dilation"

#define AVG_POOL_OPTIONS                                                \
  "int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, " \
  "bool count_include_pad, int? divisor_override"

TORCH_LIBRARY(lenet_ext, m) {
  m.set_python_module("lenet_ext.ops");

  // A backward operator's output_mask says which gradients are wanted; the others come back empty. `input` is needed
  // for the gradient of weight alone, `weight` for that of input alone.
  m.def("conv_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, " CONV_POOL_OPTIONS
        ", bool ceil_mode) -> Tensor");
  m.def("conv_relu_max_pool2d_with_indices(Tensor input, Tensor weight, Tensor? bias, " CONV_POOL_OPTIONS
        ", bool ceil_mode) -> (Tensor output, Tensor indices)");
  m.def(
      "conv_relu_max_pool2d_backward(Tensor grad_output, Tensor indices, Tensor? input, Tensor? weight, "
      "SymInt[4] input_size, SymInt[4] weight_size, " CONV_POOL_OPTIONS
      ", bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def("conv_at_indices(Tensor input, Tensor weight, Tensor? bias, Tensor indices, " CONV_POOL_OPTIONS ") -> Tensor");

  // --8<-- [start:linear]
  m.def("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_relu(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool[3] output_mask)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "linear_relu_backward(Tensor grad_output, Tensor output, Tensor? input, Tensor? weight, bool[3] output_mask)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  // --8<-- [end:linear]

  // divisor_override=None: the size of the window.
  m.def("relu_avg_pool2d(Tensor input, " AVG_POOL_OPTIONS ") -> Tensor");
  m.def("relu_avg_pool2d_backward(Tensor grad_output, Tensor input, " AVG_POOL_OPTIONS ") -> Tensor");

  // The whole network. `parameters`: weight and bias of conv1, conv2, fc1, fc2, fc3.
  m.def("lenet(Tensor input, Tensor[] parameters) -> Tensor");
  m.def(
      "lenet_with_activations(Tensor input, Tensor[] parameters) -> (Tensor output, Tensor pooled1, Tensor indices1,"
      " Tensor pooled2, Tensor indices2, Tensor hidden1, Tensor hidden2)");
  m.def(
      "lenet_backward(Tensor grad_output, Tensor input, Tensor[] parameters, Tensor pooled1, Tensor indices1,"
      " Tensor pooled2, Tensor indices2, Tensor hidden1, Tensor hidden2, bool input_gradient)"
      " -> (Tensor grad_input, Tensor[] grad_parameters)");
  // Forward, loss, backward and update, in place. csrc/lenet/loss.h and optimizer.h say what `loss`, `optimizer`,
  // `state` and `options` are, and what `correct` counts.
  m.def(
      "lenet_training_step(Tensor input, Tensor targets, Tensor? weight, Tensor(a!)[] parameters, Tensor(b!)[] state,"
      " str loss, float label_smoothing, int ignore_index, str optimizer, float[] options)"
      " -> (Tensor loss, Tensor correct)");
}

// Nothing here needs Python's global lock; where there is none by default, it stays off.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Operators of lenet_ext; importing this module registers torch.ops.lenet_ext.*";
  m.def("build_info", &lenet_ext::build_info, "Facts about this build, as lenet_ext.build_info() reports them.");
  if (!lenet_ext::add_call_path(m.ptr())) throw pybind11::error_already_set();
}
