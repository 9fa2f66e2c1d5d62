"""Reading and writing the state of a run.

``checkpoint.pt`` has all that an exact continuation needs, in types that ``torch.load(..., weights_only=True)``
accepts. Weights alone are the matter of `lenet_ext.pretrained`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from lenet_ext.environment.files import atomic_path
from lenet_ext.pretrained.files import CHECKPOINT_FORMAT, is_pickled, load_pickle

__all__ = ["load_checkpoint", "save_checkpoint"]

_PARTS = {
    **dict.fromkeys(("model", "optimizer", "scheduler", "rng", "config"), dict),
    "epoch": int,
    "history": list,
}


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Writes the state of a run, as `load_checkpoint` reads it.

    Raises:
        OSError: the file cannot be written.
    """
    # In memory first: what torch's own writer says of a full disk does not mention it.
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **content}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict[str, Any] | None:
    """Reads the state of a run.

    Args:
        path: the file.

    Returns:
        What `save_checkpoint` was given, on the CPU; None where the file holds weights only.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a checkpoint.
    """
    if not is_pickled(path):
        return None
    content = load_pickle(path)
    if content.get("format") != CHECKPOINT_FORMAT:
        return None
    missing = _PARTS.keys() - content.keys()
    if missing:
        raise ValueError(f"{path}: incomplete checkpoint, without {', '.join(sorted(missing))}")
    for name, kind in _PARTS.items():
        if not isinstance(content[name], kind):
            found = type(content[name]).__name__
            raise ValueError(f"{path}: damaged checkpoint ({name} must be of type {kind.__name__}, found {found})")
    return content
