"""What disagrees with stock is an error before it is a number."""

from __future__ import annotations

import torch
from torch import Tensor

from lenet_ext.bench.cases import Workload
from lenet_ext.bench.providers import PROVIDERS, surroundings

__all__ = ["compare", "stock_outputs"]

# Relative error in the Euclidean norm. A gradient gets more: two neighbors in a pool window can be equal to within
# rounding, and then either is a right winner and its gradient goes to another place; about one window in a million.
_OUTPUT_TOLERANCE = 1e-4
_GRADIENT_TOLERANCE = 1e-2


def stock_outputs(work: Workload) -> list[Tensor]:
    """What stock eager computes: the output, in training the gradients after it."""
    program = PROVIDERS["eager"].prepare(work)
    with surroundings(work.mode):
        program.run()
    return program.outputs()


def compare(provider: str, work: Workload, found: list[Tensor], expected: list[Tensor]) -> None:
    """Compares what a provider computes with stock.

    Raises:
        RuntimeError: number, shape or values differ.
    """
    where = f"{work.case.name}, {work.mode}, batch {work.batch}: {provider}"
    if len(found) != len(expected):
        raise RuntimeError(f"{where} gives {len(found)} results, stock eager {len(expected)}")
    for number, (ours, stock) in enumerate(zip(found, expected, strict=True)):
        what = f"gradient {number}" if number > 0 else "loss" if work.mode == "step" else "output"
        if ours.shape != stock.shape:
            raise RuntimeError(f"{where}: {what} has shape {tuple(ours.shape)}, stock eager {tuple(stock.shape)}")
        if work.case.rules.tolerance is not None:
            _compare_elements(f"{where}: {what}", ours, stock, work.case.rules.tolerance)
            continue
        scale = torch.linalg.vector_norm(stock.double()).item()
        error = torch.linalg.vector_norm(ours.double() - stock.double()).item()
        tolerance = _OUTPUT_TOLERANCE if number == 0 else _GRADIENT_TOLERANCE
        if not error <= tolerance * scale + 1e-6:  # so written, NaN fails
            raise RuntimeError(
                f"{where}: {what} differs from stock eager by {error:.2e} at a norm of {scale:.2e}, "
                f"tolerance {tolerance:.0e}: not timed"
            )


def _compare_elements(what: str, ours: Tensor, stock: Tensor, tolerance: float) -> None:
    if not torch.allclose(ours, stock, rtol=tolerance, atol=tolerance):
        error = (ours - stock).abs().max().item()
        raise RuntimeError(f"{what} differs from stock eager by {error:.2e}, tolerance {tolerance:.0e}: not timed")
