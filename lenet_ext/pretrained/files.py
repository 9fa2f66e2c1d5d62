"""Files of weights: safetensors, and what torch.save wrote."""

from __future__ import annotations

import errno
import json
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from lenet_ext.environment.extras import require
from lenet_ext.environment.files import atomic_path, naming

__all__ = [
    "CHECKPOINT_FORMAT",
    "METADATA_KEY",
    "Weights",
    "is_pickled",
    "is_weights",
    "load_into",
    "load_pickle",
    "load_weights",
    "save_weights",
    "weights_as_bytes",
]

CHECKPOINT_FORMAT = "lenet_ext checkpoint 1"
METADATA_KEY = "lenet_ext"  # safetensors metadata maps strings to strings; ours is JSON under one key


@dataclass(frozen=True)
class Weights:
    """A state dict, and what is known about it: ``data``, ``normalization``, ``test_accuracy``... or nothing."""

    state: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> str | None:
        """Name of the data set that the weights were trained on, if it is known."""
        config = self.metadata.get("config")  # of the run; all that there was in files of version 0.1
        name = self.metadata.get("data") or (config.get("data") if isinstance(config, dict) else None)
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
    content = weights_as_bytes(model, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)  # save_file would make it readable for its owner only


def weights_as_bytes(model: nn.Module, metadata: dict[str, Any]) -> bytes:
    """The content of the file that `save_weights` writes."""
    safetensors = require("safetensors.torch", "files of weights")
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    content: bytes = safetensors.save(state, {"format": "pt", METADATA_KEY: json.dumps(metadata, allow_nan=False)})
    return content


def load_weights(path: str | Path) -> Weights:
    """Reads weights from ``model.safetensors``, from ``checkpoint.pt``, or from a saved state dict of either kind.

    A state dict may lie within what was saved, as ``state_dict``, ``model_state_dict`` or ``model``, and may be that of
    a wrapped network: names are returned without ``module.``, ``_orig_mod.`` and the like.

    Args:
        path: the file; its kind is told by its content.

    Returns:
        Weights on the CPU, with metadata where the file has it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither kind of file.
        lenet_ext.environment.extras.MissingExtraError: it is a safetensors file and safetensors is not installed.
    """
    if not is_pickled(path):
        return _load_safetensors(path)
    content = load_pickle(path)
    for candidate in (content, *(content.get(key) for key in _KEYS)):
        if isinstance(candidate, dict) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            metadata: dict[str, Any] = {}
            if content.get("format") == CHECKPOINT_FORMAT:
                metadata = {name: content[name] for name in ("config", "epoch") if name in content}
            return Weights(_without_wrappers(candidate), metadata)
    raise ValueError(f"{path}: neither a checkpoint of lenet-ext nor a state dict")


def load_into(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """``model.load_state_dict(state)`` with an error of one line.

    Args:
        model: gets the weights.
        state: as `load_weights` returns it.
        path: the file that it is from.

    Raises:
        ValueError: the names or shapes are not those of the network.
    """
    expected = model.state_dict()
    reasons = [f"it has no {_and_more(names)}"] if (names := [name for name in expected if name not in state]) else []
    if names := [name for name in state if name not in expected]:
        reasons.append(f"the network has no {_and_more(names)}")
    reasons += [
        f"{name} has the shape {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if reasons:
        raise ValueError(f"{path}: not the weights of this network: {'; '.join(reasons[:3])}")
    model.load_state_dict(state)


def _and_more(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


# Where others keep a state dict within what they save, and what wrappers put before each name: DataParallel and
# DistributedDataParallel, torch.compile, and modules that hold the network as an attribute.
_KEYS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "state_dict.", "model.", "net.")


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict by the names that the network had before it was wrapped."""
    # A compiled layer has the prefix within its names; an average of weights counts its terms.
    plain = {name.replace("._orig_mod.", "."): value for name, value in state.items() if name != "n_averaged"}
    while prefix := next((p for p in _PREFIXES if plain and all(name.startswith(p) for name in plain)), None):
        plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain


def is_pickled(path: str | Path) -> bool:
    # torch.save writes a zip archive, and in its old form pickles that begin with a number of torch's; safetensors
    # begins with the length of its header.
    with naming(path), open(path, "rb") as file:
        magic = file.read(5)
    return magic[:4] == b"PK\x03\x04" or (magic[:1] == b"\x80" and magic[2:5] == b"\x8a\x0al")


def is_weights(path: str | Path) -> bool:
    """Whether a file begins as one of weights, of either kind.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        begin = file.read(9)
    # The length of a header in JSON, and the header; safetensors itself takes none longer than 100 MB.
    return is_pickled(path) or (begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= 100_000_000)


def load_pickle(path: str | Path) -> dict[str, Any]:
    content = None
    with naming(path), open(path, "rb") as file:
        try:
            reason = _refused(file)
            if reason is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what is unusual in a file: it can be read, or it cannot
                    content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's own words tell how to load it all the same, which would run the code of whoever wrote it.
            reason = f"not a checkpoint that can be read safely ({_asked_for(error)})"
        except Exception as error:  # a pickle is a program: anything may go wrong in a damaged one
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a place which is not in the file
                raise
            reason = "not a checkpoint that can be read safely (the file is damaged)"
    if reason is None and not isinstance(content, dict):
        reason = f"not a checkpoint (it holds a {type(content).__name__})"
    if reason is not None:
        raise ValueError(f"{path}: {reason}")
    return cast("dict[str, Any]", content)


def _refused(file: BinaryIO) -> str | None:
    """Why an archive is not read, if it is one; a reason that its table of contents gives."""
    if zipfile.is_zipfile(file):
        members = zipfile.ZipFile(file).infolist()
        if any(member.filename.endswith("/constants.pkl") for member in members):
            return "not a checkpoint but a TorchScript program; save its state_dict"
        # torch.save does not compress, but torch.load uncompresses whatever it is given, to any size.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            return "not a checkpoint (it is compressed)"
    file.seek(0)
    return None


def _asked_for(error: pickle.UnpicklingError) -> str:
    found = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
    # Whoever wrote the file chose the name: it goes to a terminal only if it is one.
    if found and all(part.isidentifier() for part in found[1].split(".")):
        return f"it holds {found[1]}; only tensors and plain values are read, such as a state_dict"
    return "it holds something else than tensors and plain values, or is damaged"


def _load_safetensors(path: str | Path) -> Weights:
    safetensors = require("safetensors.torch", "files of weights")
    if not is_weights(path):
        raise ValueError(f"{path}: not a checkpoint (neither safetensors nor written by torch.save)")
    # Not by its name, by which it would be mapped into memory: a mapped file that shrinks ends the process.
    with naming(path):
        content = Path(path).read_bytes()
    try:
        state = safetensors.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
    except Exception as error:  # what safetensors raises differs by its version
        raise ValueError(f"{path}: not a checkpoint (damaged safetensors: {error})") from None
    return Weights(_without_wrappers(state), metadata if isinstance(metadata, dict) else {})
