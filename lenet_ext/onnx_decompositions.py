"""Lets ``torch.onnx.export(dynamo=True)`` decompose the operators, for which ONNX has no names.

Not by PyTorch's table of all decompositions, from which the exporter takes its own: what is in there is taken for what
``torch.compile`` and fake tensors should use instead of the kernels, too.

Imported when the exporter is, by :mod:`lenet_ext.on_import`.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.onnx._internal.exporter import _decomp

from lenet_ext.decompositions import TABLE

__all__: list[str] = []

_create_table = _decomp.create_onnx_friendly_decomposition_table


@functools.wraps(_create_table)
def _create_table_with_ours(*args: Any, **kwargs: Any) -> dict:
    return {**_create_table(*args, **kwargs), **TABLE}


_decomp.create_onnx_friendly_decomposition_table = _create_table_with_ours
