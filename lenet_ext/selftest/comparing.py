"""What every group of checks compares with, and how: whole numbers, the stock composition, equality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DTYPES", "Checks", "MismatchError", "eighths", "expect_equal", "short", "stock_conv", "whole"]
__all__ += ["with_gradients"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
Checks = Iterator[tuple[str, Callable[[], None]]]
"""Name of a check and the check, which raises if something is wrong."""


class MismatchError(Exception):
    """Two results differ."""


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def whole(shape: Sequence[int], bound: int = 1) -> Tensor:
    """Whole numbers from -bound to bound, in float64."""
    return torch.randint(-bound, bound + 1, tuple(shape)).double()


def eighths(shape: Sequence[int]) -> Tensor:
    """Multiples of 1/8 from -1 to 1, in float64."""
    return whole(shape, 8) / 8


def stock_conv(**options: Any) -> Callable[..., Tensor]:
    """The stock composition with the options of ``conv_relu_max_pool2d``."""
    pool = {name: value for name, value in options.items() if name.startswith("pool_") or name == "ceil_mode"}
    conv = {name: value for name, value in options.items() if name not in pool}

    def compute(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        unbatched = input.dim() == 3
        hidden = F.relu(F.conv2d(input.unsqueeze(0) if unbatched else input, weight, bias, **conv))
        output = F.max_pool2d(
            hidden,
            pool.get("pool_kernel_size", 2),
            pool.get("pool_stride"),
            pool.get("pool_padding", 0),
            pool.get("pool_dilation", 1),
            pool.get("ceil_mode", False),
        )
        return output.squeeze(0) if unbatched else output

    return compute


def with_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], grad_output: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Output of a function and the gradients of all tensors; `grad_output` is given the output."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    present = [leaf for leaf in leaves if leaf is not None]
    return [output.detach(), *torch.autograd.grad(output, present, grad_output(output))]


def expect_equal(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Equality; a gradient in bfloat16 may be a long sum, which is then rounded: by half a unit in the last place.

    Args:
        found: output, then gradients, of `dtype`, on any device.
        expected: the same in float64, on the CPU.

    Raises:
        MismatchError: shape, dtype or a value differs.
    """
    for number, (ours, stock) in enumerate(zip(found, expected, strict=True)):
        what = "output" if number == 0 else f"gradient {number}"
        if ours.shape != stock.shape:
            raise MismatchError(f"{what} has shape {tuple(ours.shape)}, expected {tuple(stock.shape)}")
        if ours.dtype != dtype:
            raise MismatchError(f"{what} is {ours.dtype}, expected {dtype}")
        ours, stock = ours.double().cpu(), stock.double()
        tolerance = 2.0**-7 * stock.abs().max() if dtype == torch.bfloat16 and number and stock.numel() else 0.0
        good = (ours == stock) | (ours.isnan() & stock.isnan()) | ((ours - stock).abs() <= tolerance)
        if not good.all():
            worst = (ours - stock).abs().max()
            raise MismatchError(f"{what}: {int((~good).sum())} of {good.numel()} values differ, by up to {worst:.3g}")
