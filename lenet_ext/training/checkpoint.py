"""Reading and writing checkpoints.

``model.safetensors`` has the weights, with what one must know to use them as metadata. ``checkpoint.pt`` has all that
an exact continuation needs, in types that ``torch.load(..., weights_only=True)`` accepts.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lenet_ext.environment.extras import require
from lenet_ext.environment.files import atomic_path

__all__ = ["Weights", "load_checkpoint", "load_weights", "save_checkpoint", "save_weights"]

CHECKPOINT_FORMAT = "lenet_ext checkpoint 1"
_METADATA_KEY = "lenet_ext"  # safetensors metadata maps strings to strings; ours is JSON under one key


@dataclass(frozen=True)
class Weights:
    """A state dict, and what is known about it: ``config``, ``epoch``, ``test_accuracy``... or nothing."""

    state: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> str | None:
        """Name of the data set that the weights were trained on, if it is known."""
        name = self.metadata.get("config", {}).get("data")
        return name if isinstance(name, str) else None


def save_weights(path: str | Path, model: nn.Module, metadata: dict[str, Any]) -> None:
    """Writes the weights of a network as safetensors.

    Args:
        path: the file.
        model: its state dict is written, from whatever device it is on.
        metadata: anything that JSON can hold.

    Raises:
        OSError: the file cannot be written.
        lenet_ext.environment.extras.MissingExtraError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch", "checkpoints")
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    content = safetensors.save(state, {"format": "pt", _METADATA_KEY: json.dumps(metadata)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)  # save_file would make it readable for its owner only


def load_weights(path: str | Path) -> Weights:
    """Reads weights from ``model.safetensors``, from ``checkpoint.pt``, or from a saved state dict of either kind.

    Args:
        path: the file; its kind is told by its content.

    Returns:
        Weights on the CPU, with metadata where the file has it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither kind of file.
        lenet_ext.environment.extras.MissingExtraError: it is a safetensors file and safetensors is not installed.
    """
    if not _is_zip(path):
        return _load_safetensors(path)
    content = _load_pickle(path)
    if content.get("format") == CHECKPOINT_FORMAT:
        return Weights(dict(content["model"]), {name: content[name] for name in ("config", "epoch") if name in content})
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return Weights(dict(content))
    raise ValueError(f"{path}: neither a checkpoint of lenet-ext nor a state dict")


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Writes the state of a run, as `load_checkpoint` reads it.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        torch.save({"format": CHECKPOINT_FORMAT, **content}, temporary)


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
    if not _is_zip(path):
        return None
    content = _load_pickle(path)
    if content.get("format") != CHECKPOINT_FORMAT:
        return None
    missing = {"model", "optimizer", "scheduler", "epoch", "rng", "config", "history"} - content.keys()
    if missing:
        raise ValueError(f"{path}: incomplete checkpoint, without {', '.join(sorted(missing))}")
    return content


def _is_zip(path: str | Path) -> bool:
    # torch.save writes a zip archive, safetensors begins with the length of its header.
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _load_pickle(path: str | Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint (it holds a {type(content).__name__})")
    return content


def _load_safetensors(path: str | Path) -> Weights:
    safetensors = require("safetensors", "checkpoints")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
            return Weights({name: file.get_tensor(name) for name in file.keys()}, metadata)  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a checkpoint (neither safetensors nor written by torch.save: {error})") from None
