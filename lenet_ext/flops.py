"""What ``torch.utils.flop_counter`` counts for the operators: what it counts for the stock layers that they replace.

So a fused model and the stock one have the same number, in both directions: the whole convolution, forward and
backward, also where a kernel of ours needs only a part of it. (``lenet_ext.bench`` counts what is needed.)

Imported when ``torch.utils.flop_counter`` is, by :mod:`lenet_ext.on_import`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import conv_backward_flop, conv_flop_count, mm_flop, register_flop_formula

from lenet_ext import ops

__all__: list[str] = []

Shape = list[int]  # or a torch.Size, for which PyTorch's formulas say the same

_namespace = torch.ops.lenet_ext


def _convolved_shape(input: Shape, weight: Shape, stride: Shape, padding: Shape, dilation: Shape) -> list[int]:
    """Of the convolution's output, in front of the pooling."""
    sizes = [
        ops.convolution_size(input[2 + i], padding[2 * i], padding[2 * i + 1], dilation[i], weight[2 + i], stride[i])
        for i in range(2)
    ]
    return [input[0], weight[0], *sizes]


@register_flop_formula([_namespace.conv_relu_max_pool2d, _namespace.conv_relu_max_pool2d_with_indices])
def _conv(
    input: Shape, weight: Shape, bias: Shape | None, stride: Shape, padding: Shape, dilation: Shape, *_: Any, **__: Any
) -> int:
    return conv_flop_count(input, weight, _convolved_shape(input, weight, stride, padding, dilation))


@register_flop_formula(_namespace.conv_at_indices)
def _conv_at_indices(input: Shape, weight: Shape, bias: Shape | None, indices: Shape, *options: Any, **__: Any) -> int:
    return _conv(input, weight, bias, *options)


@register_flop_formula(_namespace.conv_relu_max_pool2d_backward)
def _conv_backward(
    grad_output: Shape,
    indices: Shape,
    input: Shape | None,
    weight: Shape | None,
    input_size: Shape,
    weight_size: Shape,
    *options: Any,
    **_: Any,
) -> int:
    stride, padding, dilation, groups, *_pool, output_mask = options
    convolved = _convolved_shape(input_size, weight_size, stride, padding, dilation)
    return conv_backward_flop(  # type: ignore[call-arg]  # its decorator turns out_shape into out_val
        convolved,
        input_size,
        weight_size,
        None,
        stride,
        padding[::2],  # the count does not depend on it
        dilation,
        False,
        [0, 0],
        groups,
        output_mask,
        out_val=(input_size, weight_size, None),
    )


def _product_flop(rows: Shape, features: int) -> int:
    *leading, length = rows
    return mm_flop([prod(leading), length], [length, features])


@register_flop_formula([_namespace.linear, _namespace.linear_relu])
def _linear(input: Shape, weight: Shape, bias: Shape | None, **_: Any) -> int:
    return _product_flop(input, weight[0])


@register_flop_formula(_namespace.linear_backward)
def _linear_backward(
    grad_output: Shape, input: Shape | None, weight: Shape | None, output_mask: Sequence[bool], **_: Any
) -> int:
    in_features = (input or weight or [0])[-1]
    return (output_mask[0] + output_mask[1]) * _product_flop(grad_output, in_features)


@register_flop_formula(_namespace.linear_relu_backward)
def _linear_relu_backward(grad_output: Shape, output: Shape, *rest: Any, **_: Any) -> int:
    return _linear_backward(grad_output, *rest)


# --- the whole network: the sum of its layers ---

_CONVOLUTION = ([1, 1], [0, 0, 0, 0], [1, 1])  # stride, padding, dilation


def _convolutions(input: Shape, parameters: Sequence[Shape]) -> list[tuple[Shape, Shape]]:
    """Input and weight of each."""
    return [(input, parameters[0]), ([input[0], *ops.LENET_ACTIVATIONS["pooled1"]], parameters[2])]


@register_flop_formula([_namespace.lenet, _namespace.lenet_with_activations])
def _lenet(input: Shape, parameters: Sequence[Shape], **_: Any) -> int:
    total = sum(_conv(features, weight, None, *_CONVOLUTION) for features, weight in _convolutions(input, parameters))
    return total + sum(_linear([input[0], weight[1]], weight, None) for weight in parameters[4::2])


@register_flop_formula(_namespace.lenet_backward)
def _lenet_backward(grad_output: Shape, input: Shape, parameters: Sequence[Shape], *rest: Any, **_: Any) -> int:
    total = 0
    for (features, weight), grad_input in zip(_convolutions(input, parameters), (rest[-1], True), strict=True):
        mask = (grad_input, True, True)
        total += _conv_backward([], [], features, weight, features, weight, *_CONVOLUTION, 1, mask)
    for weight in parameters[4::2]:
        total += _linear_backward([input[0], weight[0]], [input[0], weight[1]], weight, (True, True, True))
    return total


@register_flop_formula(_namespace.lenet_training_step)
def _lenet_training_step(
    input: Shape, targets: Shape, weight: Shape | None, parameters: Sequence[Shape], *_: Any, **__: Any
) -> int:
    """As in stock's loop, loss and optimizer count nothing."""
    output = [input[0], parameters[-1][0]]
    return _lenet(input, parameters) + _lenet_backward(output, input, parameters, False)
