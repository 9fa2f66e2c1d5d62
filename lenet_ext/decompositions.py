"""The operators in PyTorch's own, for whatever knows no others.

``torch.onnx.export`` finds them by itself (``onnx_decompositions``). In a program of ``torch.export``::

    table = torch.export.default_decompositions()
    table.update(lenet_ext.decompositions.TABLE)
    program = torch.export.export(model, arguments).run_decompositions(table)

Nothing decomposes them unasked: ``torch.compile``, ``torch.export`` and ``run_decompositions()`` keep the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch._ops import OperatorBase

from lenet_ext import ops
from lenet_ext.functional import stock_composition, stock_relu_avg_pool2d

__all__ = ["TABLE"]


def _linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


def _lenet(input: Tensor, parameters: list[Tensor]) -> Tensor:
    features = input
    for weight, bias in zip(parameters[0:4:2], parameters[1:4:2], strict=True):
        features = F.max_pool2d(F.relu(F.conv2d(features, weight, bias)), 2)
    hidden = features.flatten(1)
    for weight, bias in zip(parameters[4:8:2], parameters[5:8:2], strict=True):
        hidden = _linear_relu(hidden, weight, bias)
    return F.linear(hidden, parameters[8], parameters[9])


TABLE: dict[OperatorBase, Callable[..., Any]] = {
    ops.conv_relu_max_pool2d: stock_composition,
    ops.linear: F.linear,
    ops.linear_relu: _linear_relu,
    ops.relu_avg_pool2d: stock_relu_avg_pool2d,
    ops.lenet: _lenet,
}
"""For ``run_decompositions``. The decomposed program computes the same and has the same derivatives."""
