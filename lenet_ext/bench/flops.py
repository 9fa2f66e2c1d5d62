"""Floating-point operations of a workload, from its shapes.

A multiplication and an addition count two. ReLU, pooling and the bias are left out: less than one operation per
hundred.

The forward pass counts the whole convolution, since every position must be computed before its window has a winner. The
backward pass of the convolution counts the winners alone: all other positions have a gradient of zero, whether or not a
library multiplies with it. One winner per window is counted, also where overlapping windows share one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lenet_ext import nn as fused_nn
from lenet_ext.bench.cases import Case

__all__ = ["flops_per_image"]


def flops_per_image(case: Case, mode: str) -> int | None:
    """Operations of one image, or None for a case that is not about arithmetic, or has layers that are not ours.

    Args:
        case: made of the layers of `lenet_ext.nn`.
        mode: one of `MODES`; a step counts as training, the loss and the update being next to nothing.

    Example:
        >>> from lenet_ext.bench import CASES
        >>> flops_per_image(CASES["net"], "forward"), flops_per_image(CASES["net"], "training")
        (833040, 1367520)
    """
    if case.group in ("overhead", "networks"):
        return None
    module = case.fused().to("meta")  # shapes alone, without data
    layers: list[tuple[nn.Module, torch.Size, torch.Size]] = []

    def remember(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        layers.append((layer, inputs[0].shape, output.shape))

    hooks = [
        layer.register_forward_hook(remember) for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    module(torch.empty(1, *case.input_shape, device="meta"))
    for hook in hooks:
        hook.remove()
    total = 0
    for number, (layer, input_shape, output_shape) in enumerate(layers):
        forward, gradient = _layer_flops(layer, input_shape, output_shape)
        total += forward
        if mode != "forward":
            # The gradient of the weight, and that of the input unless nothing comes before.
            total += gradient * (2 if number > 0 or case.input_grad else 1)
    return total


def _layer_flops(layer: nn.Module, input_shape: torch.Size, output_shape: torch.Size) -> tuple[int, int]:
    """Of the forward pass, and of either of the two gradients."""
    if isinstance(layer, nn.Linear):
        product = 2 * layer.in_features * layer.out_features
        return product, product
    assert isinstance(layer, fused_nn.ConvReLUMaxPool2d)
    taps = 2 * layer.weight[0].numel()
    stock = nn.functional.conv2d(
        torch.empty(input_shape, device="meta"),
        layer.weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
    return taps * stock.numel(), taps * output_shape.numel()
