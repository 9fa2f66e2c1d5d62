"""What ``torch.vmap`` does to the operators: one rule each, which ``torch.func``, per-sample gradients and the graphs
that ``torch.compile`` makes of them have in common.

The mapped axis joins the batch where the parameters are shared. Where each sample has parameters (or parameter
gradients) of its own, it joins the channels of a convolution, whose groups are then as many times more, and becomes the
batch of a batched matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lenet_ext import ops

__all__: list[str] = []

Dim = int | None  # of an argument: where its mapped axis is, None where it has none

# The place of `groups` among the options of every operator of the convolution.
_GROUPS = 3


def _more_groups(options: Sequence[Any], size: int) -> tuple:
    return (*options[:_GROUPS], options[_GROUPS] * size, *options[_GROUPS + 1 :])


def _mapped_first(tensor: Tensor, dim: Dim, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _to_batch(tensor: Tensor, dim: Dim, size: int) -> Tensor:
    return _mapped_first(tensor, dim, size).flatten(0, 1)


def _from_batch(tensor: Tensor, size: int) -> Tensor:
    return tensor.unflatten(0, (size, -1))


def _to_channels(tensor: Tensor | None, dim: Dim, size: int, channel_dim: int) -> Tensor | None:
    """Moves the mapped axis (or a new, expanded one) in front of the channels and merges the two."""
    if tensor is None:
        return None
    return _mapped_first(tensor, dim, size).movedim(0, channel_dim).flatten(channel_dim, channel_dim + 1)


def _from_channels(tensor: Tensor, size: int, channel_dim: int) -> Tensor:
    return tensor.unflatten(channel_dim, (size, -1))


def _conv(operator: Callable[..., Any], info: Any, in_dims: tuple, *arguments: Any) -> tuple:
    input, weight, bias, *options = arguments
    size = info.batch_size
    if in_dims[1] is None and in_dims[2] is None:
        outputs = operator(_to_batch(input, in_dims[0], size), weight, bias, *options)
        dim, back = 0, _from_batch
    else:
        outputs = operator(
            _to_channels(input, in_dims[0], size, 1),
            _to_channels(weight, in_dims[1], size, 0),
            _to_channels(bias, in_dims[2], size, 0),
            *_more_groups(options, size),
        )
        dim, back = 1, lambda tensor, size: _from_channels(tensor, size, 1)
    if isinstance(outputs, Tensor):
        return back(outputs, size), dim
    return tuple(back(output, size) for output in outputs), (dim,) * len(outputs)


@torch.library.register_vmap("lenet_ext::conv_relu_max_pool2d")
def _(info, in_dims, *arguments):
    return _conv(ops.conv_relu_max_pool2d, info, in_dims, *arguments)


@torch.library.register_vmap("lenet_ext::conv_relu_max_pool2d_with_indices")
def _(info, in_dims, *arguments):
    return _conv(ops.conv_relu_max_pool2d_with_indices, info, in_dims, *arguments)


@torch.library.register_vmap("lenet_ext::conv_at_indices")
def _(info, in_dims, input, weight, bias, indices, *options):
    size = info.batch_size
    if in_dims[1] is None and in_dims[2] is None:
        output = ops.conv_at_indices(
            _to_batch(input, in_dims[0], size), weight, bias, _to_batch(indices, in_dims[3], size), *options
        )
        return _from_batch(output, size), 0
    output = ops.conv_at_indices(
        _to_channels(input, in_dims[0], size, 1),
        _to_channels(weight, in_dims[1], size, 0),
        _to_channels(bias, in_dims[2], size, 0),
        _to_channels(indices, in_dims[3], size, 1),
        *_more_groups(options, size),
    )
    return _from_channels(output, size, 1), 1


def _unmapped_where_not_wanted(gradients: Sequence[Tensor], dims: Sequence[int], mask: Sequence[bool]) -> tuple:
    return tuple(gradients), tuple(dim if wanted else None for dim, wanted in zip(dims, mask, strict=True))


@torch.library.register_vmap("lenet_ext::conv_relu_max_pool2d_backward")
def _(info, in_dims, grad_output, indices, input, weight, input_size, weight_size, *rest):
    size, (*options, mask) = info.batch_size, rest
    batch, channels, *image = input_size
    if in_dims[3] is None and not mask[1] and not mask[2]:
        grad_input, *others = ops.conv_relu_max_pool2d_backward(
            _to_batch(grad_output, in_dims[0], size),
            _to_batch(indices, in_dims[1], size),
            None,
            weight,
            (size * batch, channels, *image),
            weight_size,
            *options,
            mask,
        )
        gradients = (_from_batch(grad_input, size), *others)
        return _unmapped_where_not_wanted(gradients, (0, 0, 0), mask)
    # Each sample's parameter gradients are those of a group of its own.
    gradients = ops.conv_relu_max_pool2d_backward(
        _to_channels(grad_output, in_dims[0], size, 1),
        _to_channels(indices, in_dims[1], size, 1),
        _to_channels(input, in_dims[2], size, 1),
        _to_channels(weight, in_dims[3], size, 0),
        (batch, size * channels, *image),
        (size * weight_size[0], *weight_size[1:]),
        *_more_groups(options, size),
        mask,
    )
    dims = (1, 0, 0)
    apart = [
        _from_channels(gradient, size, dim) if wanted else gradient
        for gradient, dim, wanted in zip(gradients, dims, mask, strict=True)
    ]
    return _unmapped_where_not_wanted(apart, dims, mask)


@torch.library.register_vmap("lenet_ext::relu_avg_pool2d")
def _(info, in_dims, input, *options):
    size = info.batch_size
    return _from_batch(ops.relu_avg_pool2d(_to_batch(input, in_dims[0], size), *options), size), 0


@torch.library.register_vmap("lenet_ext::relu_avg_pool2d_backward")
def _(info, in_dims, grad_output, input, *options):
    size = info.batch_size
    tensors = _to_batch(grad_output, in_dims[0], size), _to_batch(input, in_dims[1], size)
    return _from_batch(ops.relu_avg_pool2d_backward(*tensors, *options), size), 0


def _rows(tensor: Tensor) -> Tensor:
    """(size, ..., features) as (size, rows, features). Without features nothing would determine a -1."""
    return tensor.reshape(tensor.shape[0], prod(tensor.shape[1:-1]), tensor.shape[-1])


# --8<-- [start:linear-relu]
def _linear(operator: Callable[..., Tensor], info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
    input, weight, bias = arguments
    if in_dims[1] is None and in_dims[2] is None:
        return operator(input.movedim(in_dims[0], 0), weight, bias), 0
    size = info.batch_size
    samples = _mapped_first(input, in_dims[0], size)
    factors = _rows(samples), _mapped_first(weight, in_dims[1], size).transpose(1, 2)
    # Not a sum behind the product: autocast would cast the one and not the other.
    output = (
        torch.bmm(*factors)
        if bias is None
        else torch.baddbmm(_mapped_first(bias, in_dims[2], size).unsqueeze(1), *factors)
    )
    return output.reshape(*samples.shape[:-1], output.shape[-1]), 0


@torch.library.register_vmap("lenet_ext::linear")
def _(info, in_dims, *arguments):
    return _linear(ops.linear, info, in_dims, *arguments)


@torch.library.register_vmap("lenet_ext::linear_relu")
def _(info, in_dims, *arguments):
    if in_dims[1] is None and in_dims[2] is None:
        return _linear(ops.linear_relu, info, in_dims, *arguments)
    output, dim = _linear(ops.linear, info, in_dims, *arguments)
    return output.relu(), dim


# --8<-- [end:linear-relu]


def _linear_backward(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
    grad_output, input, weight, mask = arguments
    size = info.batch_size
    if in_dims[2] is None and not mask[1] and not mask[2]:
        gradients = ops.linear_backward(_mapped_first(grad_output, in_dims[0], size), None, weight, mask)
        return _unmapped_where_not_wanted(gradients, (0, 0, 0), mask)
    grads = _mapped_first(grad_output, in_dims[0], size)
    rows = _rows(grads)
    none = grads.new_empty(0)
    grad_input = grad_weight = none
    if mask[0]:
        grad_input = rows.bmm(_mapped_first(weight, in_dims[2], size))
        grad_input = grad_input.reshape(*grads.shape[:-1], grad_input.shape[-1])
    if mask[1]:
        samples = _mapped_first(input, in_dims[1], size)
        grad_weight = rows.transpose(1, 2).bmm(_rows(samples))
    grad_bias = rows.sum(1) if mask[2] else none
    return _unmapped_where_not_wanted((grad_input, grad_weight, grad_bias), (0, 0, 0), mask)


@torch.library.register_vmap("lenet_ext::linear_backward")
def _(info, in_dims, *arguments):
    return _linear_backward(info, in_dims, *arguments)


@torch.library.register_vmap("lenet_ext::linear_relu_backward")
def _(info, in_dims, grad_output, output, input, weight, mask):
    size = info.batch_size
    masked = torch.ops.aten.threshold_backward(
        _mapped_first(grad_output, in_dims[0], size), _mapped_first(output, in_dims[1], size), 0
    )
    return _linear_backward(info, (0, in_dims[2], in_dims[3], None), masked, input, weight, mask)
