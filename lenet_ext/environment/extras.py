"""Optional dependencies: imported when first needed, and named together with the command that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["MissingExtraError", "require"]


class MissingExtraError(ImportError):
    """An optional dependency is not installed."""


def require(module: str, purpose: str, *, extra: str = "train", package: str | None = None) -> ModuleType:
    """Imports an optional module.

    Equivalent to ``importlib.import_module(module)`` with an error that says what to install.

    Args:
        module: name to import, such as ``"matplotlib"``.
        purpose: what it is needed for, as it reads after "is needed for".
        extra: the extra of this package that installs it.
        package: its name on the package index, where that differs from ``module``.

    Returns:
        The module.

    Raises:
        MissingExtraError: it is not installed.

    Example:
        >>> require("json", "the example").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is there and fails on an import of its own is a different fault: do not hide it.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        name = package or module.split(".")[0]
        raise MissingExtraError(f"{name} is needed for {purpose}: pip install 'lenet_ext[{extra}]'") from None
