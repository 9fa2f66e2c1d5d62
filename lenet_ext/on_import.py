"""Registrations with parts of PyTorch that ``import torch`` leaves out: made when that part is imported, not before.

Importing these parts only to register with them would cost every process up to a second, and most never use them.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_on_import"]

# PyTorch's module, and ours that registers the operators there when it is imported itself.
_REGISTRATIONS = {
    "torch.distributed.tensor": "lenet_ext.sharding",
    "torch.onnx": "lenet_ext.onnx_symbolics",
    "torch.onnx._internal.exporter._decomp": "lenet_ext.onnx_decompositions",
    "torch.utils.flop_counter": "lenet_ext.flops",
}


def _register(name: str) -> None:
    try:
        importlib.import_module(_REGISTRATIONS[name])
    except Exception as error:
        warnings.warn(
            f"lenet_ext: its operators could not be registered with {name}, which may not know them: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


class _Finder(MetaPathFinder):
    """Finds what the other finders find, and has the module followed by its registration once it has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _REGISTRATIONS:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(name)

        # On this one loader: the module keeps a loader of the usual kind, of which its source and resources are asked.
        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_on_import() -> None:
    """Makes the registrations for what is imported already, and has the others follow their module's import."""
    for name in _REGISTRATIONS:
        if name in sys.modules:
            _register(name)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
