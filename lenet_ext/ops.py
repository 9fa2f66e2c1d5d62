"""Handles of the registered operators, and what each of them does to shapes.

The kernels are C++ and CUDA (``csrc/``); the fake implementations here compute the shape, dtype and memory format of
their outputs without data, which is what ``torch.compile``, ``torch.export`` and the meta device need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

import lenet_ext._C  # noqa: F401  registers torch.ops.lenet_ext.*

if TYPE_CHECKING:
    from collections.abc import Sequence

    Pair = Sequence[int]

# Bound once: looking an operator up by attribute costs more than a microsecond of every call.
conv_relu_max_pool2d = torch.ops.lenet_ext.conv_relu_max_pool2d.default
conv_relu_max_pool2d_with_indices = torch.ops.lenet_ext.conv_relu_max_pool2d_with_indices.default
conv_relu_max_pool2d_backward = torch.ops.lenet_ext.conv_relu_max_pool2d_backward.default
conv_at_indices = torch.ops.lenet_ext.conv_at_indices.default
linear = torch.ops.lenet_ext.linear.default
linear_relu = torch.ops.lenet_ext.linear_relu.default
linear_backward = torch.ops.lenet_ext.linear_backward.default
linear_relu_backward = torch.ops.lenet_ext.linear_relu_backward.default
relu_avg_pool2d = torch.ops.lenet_ext.relu_avg_pool2d.default
relu_avg_pool2d_backward = torch.ops.lenet_ext.relu_avg_pool2d_backward.default
lenet = torch.ops.lenet_ext.lenet.default
lenet_with_activations = torch.ops.lenet_ext.lenet_with_activations.default
lenet_backward = torch.ops.lenet_ext.lenet_backward.default
lenet_training_step = torch.ops.lenet_ext.lenet_training_step.default

MAX_WINDOW = 255
"""Most positions of a pooling window whose winner fits into one byte (``csrc/common/conv_pool_shape.h``)."""


def _check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: message)


def _check_devices(op: str, **tensors: Tensor | None) -> None:
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(present.items()))
    for name, tensor in present.items():
        _check(
            tensor.device == first.device,
            (
                f"{op}: all tensors must be on one device, but {name} is on {tensor.device} "
                f"and {first_name} is on {first.device}"
            ),
        )


def _check_together(op: str, **tensors: Tensor | None) -> None:
    """All tensors on one device and of one dtype, as the kernels demand."""
    _check_devices(op, **tensors)
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(present.items()))
    for name, tensor in present.items():
        _check(
            tensor.dtype == first.dtype,
            (f"{op}: all tensors must have one dtype, but {name} is {tensor.dtype} and {first_name} is {first.dtype}"),
        )


def _memory_format(input: Tensor) -> torch.memory_format:
    """channels_last for an input that is laid out so and not contiguous at the same time, else contiguous."""
    if not input.is_contiguous() and torch._prims_common.suggest_memory_format(input) == torch.channels_last:
        return torch.channels_last
    return torch.contiguous_format


def convolution_size(size: int, pad_before: int, pad_after: int, dilation: int, kernel: int, stride: int) -> int:
    """Source: PyTorch documentation of ``torch.nn.Conv2d``, "Shape"."""
    return (size + pad_before + pad_after - dilation * (kernel - 1) - 1) // stride + 1


def _pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Source: PyTorch documentation of ``torch.nn.MaxPool2d`` and ``AvgPool2d``, "Shape" and ``ceil_mode``."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1
    return out


def pooled_shape(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Sequence[int],
    dilation: Pair,
    groups: int,
    pool_kernel_size: Pair,
    pool_stride: Pair,
    pool_padding: Pair,
    pool_dilation: Pair,
    ceil_mode: bool,
    *,
    dtypes: bool = True,
) -> tuple[int, int, int, int]:
    """The shape of the output. Raises RuntimeError where the arguments do not fit together; where autocast will cast
    them, `dtypes` leaves theirs out."""
    check = _check_together if dtypes else _check_devices
    check(op, input=input, weight=weight, bias=bias)
    _check(input.dim() == 4, f"{op}: input must be 4-D, got shape {tuple(input.shape)}")
    _check(weight.dim() == 4, f"{op}: weight must be 4-D, got shape {tuple(weight.shape)}")
    _check(groups > 0, f"{op}: groups must be positive, got {groups}")
    for name, values, lowest in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
        ("pool_kernel_size", pool_kernel_size, 1),
        ("pool_stride", pool_stride, 1),
        ("pool_padding", pool_padding, 0),
        ("pool_dilation", pool_dilation, 1),
    ):
        _check(
            all(lowest <= value < 2**31 for value in values),
            (f"{op}: {name} must be between {lowest} and 2**31 - 1, got {list(values)}"),
        )
    _check(
        all(pad <= kernel // 2 for pad, kernel in zip(pool_padding, pool_kernel_size, strict=True)),
        (
            f"{op}: pool_padding must be at most half of pool_kernel_size={list(pool_kernel_size)}, "
            f"got {list(pool_padding)}"
        ),
    )
    batch, channels, *size = input.shape
    _check(
        channels > 0 and ((size[0] > 0 and size[1] > 0) or batch == 0),  # last, for a dynamic batch has to stay one
        f"{op}: input may be empty in its batch dimension alone, got shape {tuple(input.shape)}",
    )
    out_channels, group_channels, *kernel = weight.shape
    _check(
        out_channels > 0 and kernel[0] > 0 and kernel[1] > 0,
        f"{op}: weight must have output channels and a kernel that is not empty, got shape {tuple(weight.shape)}",
    )
    _check(
        channels == group_channels * groups,
        (
            f"{op}: input must have {group_channels * groups} channels for weight of shape {tuple(weight.shape)} and "
            f"groups={groups}, got shape {tuple(input.shape)}"
        ),
    )
    _check(
        out_channels % groups == 0,
        f"{op}: weight's {out_channels} output channels must be divisible by groups={groups}",
    )
    if bias is not None:
        _check(
            bias.dim() == 1 and bias.shape[0] == out_channels,
            f"{op}: bias must have shape [{out_channels}], got {tuple(bias.shape)}",
        )
    shape = [batch, out_channels]
    for i in range(2):
        convolved = convolution_size(size[i], padding[2 * i], padding[2 * i + 1], dilation[i], kernel[i], stride[i])
        _check(
            convolved > 0,
            f"{op}: input of shape {tuple(input.shape)} is smaller than the kernel of weight",
        )
        pooled = _pooled_size(
            convolved, pool_kernel_size[i], pool_stride[i], pool_padding[i], pool_dilation[i], ceil_mode
        )
        _check(
            pooled > 0,
            f"{op}: pool_kernel_size={list(pool_kernel_size)} is too large for the convolution's output",
        )
        shape.append(pooled)
    return cast("tuple[int, int, int, int]", tuple(shape))


@torch.library.register_fake("lenet_ext::conv_relu_max_pool2d")
def _(input, weight, bias, *options):
    shape = pooled_shape("conv_relu_max_pool2d", input, weight, bias, *options)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))


@torch.library.register_fake("lenet_ext::conv_relu_max_pool2d_with_indices")
def _(input, weight, bias, *options):
    shape = pooled_shape("conv_relu_max_pool2d_with_indices", input, weight, bias, *options)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))
    return output, torch.empty_like(output, dtype=torch.uint8)


def _check_indices(op: str, indices: Tensor, input: Tensor) -> None:
    _check(
        indices.device == input.device and indices.dtype == torch.uint8,
        f"{op}: indices must be a uint8 tensor on {input.device}, got {indices.dtype} on {indices.device}",
    )


def _empty_or_none(
    wanted: bool, shape: Sequence[int], like: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    if not wanted:
        return like.new_empty(0)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _check_operands(op: str, input: Tensor | None, weight: Tensor | None, output_mask: Sequence[bool]) -> None:
    _check(input is not None or not output_mask[1], f"{op}: input is needed for the gradient of weight, got None")
    _check(weight is not None or not output_mask[0], f"{op}: weight is needed for the gradient of input, got None")


@torch.library.register_fake("lenet_ext::conv_relu_max_pool2d_backward")
def _(grad_output, indices, input, weight, input_size, weight_size, *options):
    op = "conv_relu_max_pool2d_backward"
    output_mask = options[-1]
    _check_operands(op, input, weight, output_mask)
    _check_together(op, grad_output=grad_output, input=input, weight=weight)
    _check_indices(op, indices, grad_output)
    _check(
        grad_output.shape == indices.shape,
        (f"{op}: grad_output must have the shape of indices {tuple(indices.shape)}, got {tuple(grad_output.shape)}"),
    )
    weight_format = torch.contiguous_format if weight is None else _memory_format(weight)
    return (
        _empty_or_none(output_mask[0], input_size, grad_output, _memory_format(indices)),
        _empty_or_none(output_mask[1], weight_size, grad_output, weight_format),
        _empty_or_none(output_mask[2], weight_size[:1], grad_output),
    )


@torch.library.register_fake("lenet_ext::conv_at_indices")
def _(input, weight, bias, indices, *options):
    _check_together("conv_at_indices", input=input, weight=weight, bias=bias)
    _check_indices("conv_at_indices", indices, input)
    return torch.empty(indices.shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))


def _linear_shape(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> list[int]:
    _check_together(op, input=input, weight=weight, bias=bias)
    _check(weight.dim() == 2, f"{op}: weight must be 2-D, got shape {tuple(weight.shape)}")
    _check(
        input.dim() >= 1 and input.shape[-1] == weight.shape[1],
        (
            f"{op}: input must have shape [..., {weight.shape[1]}] for weight of shape {tuple(weight.shape)}, "
            f"got shape {tuple(input.shape)}"
        ),
    )
    if bias is not None:
        _check(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            f"{op}: bias must have shape [{weight.shape[0]}], got {tuple(bias.shape)}",
        )
    return [*input.shape[:-1], weight.shape[0]]


@torch.library.register_fake("lenet_ext::linear")
def _(input, weight, bias):
    return input.new_empty(_linear_shape("linear", input, weight, bias))


# --8<-- [start:linear-relu]
@torch.library.register_fake("lenet_ext::linear_relu")
def _(input, weight, bias):
    return input.new_empty(_linear_shape("linear_relu", input, weight, bias))


# --8<-- [end:linear-relu]


def _linear_gradients(op, grad_output, input, weight, output_mask):
    _check_operands(op, input, weight, output_mask)
    _check_together(op, grad_output=grad_output, input=input, weight=weight)
    *leading, out_features = grad_output.shape
    in_features = weight.shape[1] if weight is not None else input.shape[-1] if input is not None else 0
    return (
        _empty_or_none(output_mask[0], (*leading, in_features), grad_output),
        _empty_or_none(output_mask[1], (out_features, in_features), grad_output),
        _empty_or_none(output_mask[2], (out_features,), grad_output),
    )


@torch.library.register_fake("lenet_ext::linear_backward")
def _(grad_output, input, weight, output_mask):
    return _linear_gradients("linear_backward", grad_output, input, weight, output_mask)


@torch.library.register_fake("lenet_ext::linear_relu_backward")
def _(grad_output, output, input, weight, output_mask):
    return _linear_gradients("linear_relu_backward", grad_output, input, weight, output_mask)


def average_pooled_shape(
    op: str,
    input: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> list[int]:
    """The shape of relu_avg_pool2d's output. Raises RuntimeError where the arguments do not fit together."""
    _check(input.dim() == 4, f"{op}: input must be 4-D, got shape {tuple(input.shape)}")
    for name, values, lowest in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0)):
        _check(
            all(lowest <= value < 2**31 for value in values),
            f"{op}: {name} should be at least {lowest} and less than 2**31, but got {list(values)}",
        )
    _check(
        all(pad <= kernel // 2 for pad, kernel in zip(padding, kernel_size, strict=True)),
        f"{op}: padding should be smaller than or equal to half of kernel_size={list(kernel_size)}, "
        f"but got {list(padding)}",
    )
    _check(divisor_override != 0, f"{op}: divisor_override must be not zero")
    batch, channels, *size = input.shape
    _check(
        channels > 0 and size[0] > 0 and size[1] > 0,
        f"{op}: input may be empty in its batch dimension alone, got shape {tuple(input.shape)}",
    )
    pooled = [_pooled_size(size[i], kernel_size[i], stride[i], padding[i], 1, ceil_mode) for i in range(2)]
    _check(
        pooled[0] > 0 and pooled[1] > 0,
        f"{op}: kernel_size={list(kernel_size)} is too large for input of shape {tuple(input.shape)}: "
        "output size is too small",
    )
    return [batch, channels, *pooled]


@torch.library.register_fake("lenet_ext::relu_avg_pool2d")
def _(input, *options):
    shape = average_pooled_shape("relu_avg_pool2d", input, *options)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))


@torch.library.register_fake("lenet_ext::relu_avg_pool2d_backward")
def _(grad_output, input, *options):
    op = "relu_avg_pool2d_backward"
    _check_together(op, grad_output=grad_output, input=input)
    shape = average_pooled_shape(op, input, *options)
    _check(
        list(grad_output.shape) == shape,
        f"{op}: grad_output must have shape {shape}, got {tuple(grad_output.shape)}",
    )
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))


_LENET_PARAMETERS = [
    f"parameters[{2 * i + j}] ({layer}.{parameter})"
    for i, layer in enumerate(("conv1", "conv2", "fc1", "fc2", "fc3"))
    for j, parameter in enumerate(("weight", "bias"))
]


def _check_lenet(op: str, input: Tensor, parameters: list[Tensor]) -> None:
    _check(len(parameters) == 10, f"{op}: parameters must hold 10 tensors, got {len(parameters)}")
    _check_together(op, input=input, **dict(zip(_LENET_PARAMETERS, parameters, strict=True)))
    channels, classes = parameters[0].shape[1], parameters[8].shape[0]
    _check(
        input.dim() == 4 and tuple(input.shape[1:]) == (channels, 32, 32),
        f"{op}: input must have shape [batch, {channels}, 32, 32], got {tuple(input.shape)}",
    )
    shapes = [(6, channels, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (classes, 84)]
    for name, parameter, shape in zip(_LENET_PARAMETERS, parameters, [*shapes, (classes,)], strict=True):
        _check(
            tuple(parameter.shape) == shape,
            f"{op}: {name} must have shape {list(shape)}, got {tuple(parameter.shape)}",
        )


@torch.library.register_fake("lenet_ext::lenet")
def _(input, parameters):
    _check_lenet("lenet", input, parameters)
    return input.new_empty(input.shape[0], parameters[8].shape[0])


# What the forward pass keeps for the backward pass: shapes of one image.
LENET_ACTIVATIONS = {
    "pooled1": (6, 14, 14),
    "indices1": (6, 14, 14),
    "pooled2": (16, 5, 5),
    "indices2": (16, 5, 5),
    "hidden1": (120,),
    "hidden2": (84,),
}


def _activation_dtype(name: str, input: Tensor) -> torch.dtype:
    return torch.uint8 if name.startswith("indices") else input.dtype


@torch.library.register_fake("lenet_ext::lenet_with_activations")
def _(input, parameters):
    _check_lenet("lenet_with_activations", input, parameters)
    batch = input.shape[0]
    return (
        input.new_empty(batch, parameters[8].shape[0]),
        *(
            input.new_empty(batch, *shape, dtype=_activation_dtype(name, input))
            for name, shape in LENET_ACTIVATIONS.items()
        ),
    )


@torch.library.register_fake("lenet_ext::lenet_backward")
def _(grad_output, input, parameters, *rest):
    op = "lenet_backward"
    _check_lenet(op, input, parameters)
    *activations, input_gradient = rest
    shapes = {"grad_output": (parameters[8].shape[0],), **LENET_ACTIVATIONS}
    for (name, image), tensor in zip(shapes.items(), (grad_output, *activations), strict=True):
        shape, dtype = (input.shape[0], *image), _activation_dtype(name, input)
        _check(
            tensor.shape == shape and tensor.dtype == dtype and tensor.device == input.device,
            (
                f"{op}: {name} must be a {dtype} tensor of shape {list(shape)} on {input.device}, "
                f"got {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
            ),
        )
    return (
        _empty_or_none(input_gradient, input.shape, input, _memory_format(input)),
        [_empty_or_none(True, parameter.shape, parameter) for parameter in parameters],
    )


@torch.library.register_fake("lenet_ext::lenet_training_step")
def _(input, targets, weight, parameters, state, loss, *options):
    _check_lenet("lenet_training_step", input, parameters)
    return input.new_empty(()), input.new_empty((), dtype=torch.int64)
