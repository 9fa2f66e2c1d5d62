"""The operators in ONNX's, for ``torch.onnx.export(..., dynamo=False)``, which exports a TorchScript trace.

With ``dynamo=True`` (the default) the exporter decomposes them by itself, see :mod:`lenet_ext.decompositions`. Imported
when ``torch.onnx`` is, by :mod:`lenet_ext.on_import`.

Source of the operators' attributes: ONNX operator schemas, "Conv", "MaxPool", "MatMul", "AveragePool".
"""

from __future__ import annotations

from typing import Any

from torch.onnx import register_custom_op_symbolic
from torch.onnx.symbolic_helper import parse_args

__all__: list[str] = []

_FIRST_OPSET = 10  # of MaxPool with dilations and ceil_mode


def _given(*values: Any) -> list[Any]:
    """The values that are not None in the traced program."""
    return [value for value in values if not value.node().mustBeNone()]


@parse_args("v", "v", "v", "is", "is", "is", "i", "is", "is", "is", "is", "i")
def _conv_relu_max_pool2d(
    g: Any,
    input: Any,
    weight: Any,
    bias: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool_kernel_size: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
    pool_dilation: list[int],
    ceil_mode: int,
) -> Any:
    top, bottom, left, right = padding
    convolved = g.op(
        "Conv",
        *_given(input, weight, bias),
        kernel_shape_i=weight.type().sizes()[2:],
        strides_i=stride,
        pads_i=[top, left, bottom, right],
        dilations_i=dilation,
        group_i=groups,
    )
    return g.op(
        "MaxPool",
        g.op("Relu", convolved),
        kernel_shape_i=pool_kernel_size,
        strides_i=pool_stride,
        pads_i=pool_padding * 2,
        dilations_i=pool_dilation,
        ceil_mode_i=ceil_mode,
    )


def _linear(g: Any, input: Any, weight: Any, bias: Any) -> Any:
    output = g.op("MatMul", input, g.op("Transpose", weight, perm_i=[1, 0]))
    for term in _given(bias):
        output = g.op("Add", output, term)
    return output


def _linear_relu(g: Any, input: Any, weight: Any, bias: Any) -> Any:
    return g.op("Relu", _linear(g, input, weight, bias))


@parse_args("v", "is", "is", "is", "i", "i", "none")
def _relu_avg_pool2d(
    g: Any,
    input: Any,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: int,
    count_include_pad: int,
    divisor_override: None,
) -> Any:
    return g.op(
        "AveragePool",
        g.op("Relu", input),
        kernel_shape_i=kernel_size,
        strides_i=stride,
        pads_i=padding * 2,
        ceil_mode_i=ceil_mode,
        count_include_pad_i=count_include_pad,
    )


for name, symbolic in (
    ("conv_relu_max_pool2d", _conv_relu_max_pool2d),
    ("linear", _linear),
    ("linear_relu", _linear_relu),
    ("relu_avg_pool2d", _relu_avg_pool2d),
):
    register_custom_op_symbolic(f"lenet_ext::{name}", symbolic, _FIRST_OPSET)
