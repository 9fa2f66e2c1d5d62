"""Trained networks: those that travel with the package, and folders of the same form.

A folder holds ``model.safetensors`` and ``config.json``, which says what the weights alone do not: the sizes of the
network, the data set that it was trained on, what its classes are called, and how pictures are normalized. The same is
in the metadata of the file of weights, which is therefore enough by itself.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lenet_ext.environment.files import naming, write_json
from lenet_ext.pretrained.files import Weights, load_weights, save_weights

__all__ = ["built_in", "load_pretrained", "save_pretrained", "sizes"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_HERE = Path(__file__).parent


def built_in() -> list[str]:
    """Names of the networks in this package.

    Example:
        >>> built_in()
        ['mnist']
    """
    return sorted(path.stem for path in _HERE.glob("*.safetensors"))


def load_pretrained(name_or_path: str | os.PathLike[str]) -> Weights:
    """Reads weights and what is known of them.

    Args:
        name_or_path: one of `built_in` (as a string; a folder of that name is ``./mnist``), a file of weights that
            `lenet_ext.pretrained.files.load_weights` reads, or a folder with ``model.safetensors``.

    Returns:
        Weights on the CPU; the metadata is that of ``config.json`` where there is one, and of the file otherwise.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is damaged or something else.
        lenet_ext.environment.extras.MissingExtraError: safetensors is not installed.

    Example:
        >>> load_pretrained("mnist").metadata["normalization"]
        {'mean': 0.1, 'std': 0.2752}
    """
    path, config = _places(name_or_path)
    weights = load_weights(path)
    if config is not None and config.exists():
        weights = Weights(weights.state, _read_config(config))
    found = sizes(weights.state) or ()
    for name, size in zip(("in_channels", "num_classes"), found, strict=False):
        if weights.metadata.get(name, size) != size:
            stated = weights.metadata[name]
            raise ValueError(f"{config or path}: {name} is said to be {stated!r}, and is {size} in the weights")
    return weights


def _places(name_or_path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """File of weights, and of the configuration if there may be one."""
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and name_or_path in built_in():
        return _HERE / f"{name_or_path}.safetensors", _HERE / f"{name_or_path}.json"
    if path.is_dir():
        return path / WEIGHTS, path / CONFIG
    # A word is more likely a name than a file in the current directory; which names there are helps with both.
    if path.name == str(name_or_path) and not path.suffix and not path.exists():
        names = ", ".join(built_in())
        raise FileNotFoundError(f"{path}: neither a file nor a folder, nor a network of this package ({names})")
    return path, None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with naming(path):
            config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not a configuration (it is no JSON)") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a configuration (it holds a {type(config).__name__})")
    return config


def sizes(state: dict[str, Tensor]) -> tuple[int, int] | None:
    """Channels of the input and number of classes of LeNet with these weights; None if they are not LeNet's."""
    first, last = state.get("conv1.weight"), state.get("fc3.weight")
    if first is None or last is None or first.dim() != 4 or last.dim() != 2:
        return None
    return first.shape[1], last.shape[0]


def save_pretrained(folder: str | os.PathLike[str], model: nn.Module, config: dict[str, Any]) -> None:
    """Writes ``model.safetensors`` and ``config.json``.

    Args:
        folder: is created where it is missing.
        model: LeNet, fused or stock.
        config: anything that JSON can hold.

    Raises:
        OSError: a file cannot be written.
        TypeError, ValueError: JSON cannot hold the configuration.
        lenet_ext.environment.extras.MissingExtraError: safetensors is not installed.
    """
    save_weights(Path(folder) / WEIGHTS, model, config)
    write_json(Path(folder) / CONFIG, config)
