"""What the readers of files must do with any bytes: read them, or raise an error of one line that names the file.

Each of `READERS` makes files to begin with, and reads others. `fuzz.files` makes those by coverage; test_readers.py has
what was found.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import archives
import torch
from PIL import Image
from safetensors.torch import save

import lenet_ext
from lenet_ext.cli.common import error_line
from lenet_ext.pretrained.files import load_into, load_weights
from lenet_ext.training import checkpoint, datasets, segment
from lenet_ext.training import predict as pictures
from lenet_ext.training.config import TrainConfig
from lenet_ext.training.idx import read_idx

__all__ = ["READERS", "Reader", "check"]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A kind of file."""

    read: Callable[[Path, bytes], None]  # a folder of its own to write into, and the content
    files: Callable[[], list[bytes]]  # good ones


def check(name: str, folder: Path, content: bytes) -> None:
    """Raises AssertionError, or whatever the reader raised, where that is no error of one line with the file's name, or
    where there is a warning, which on a terminal is further lines."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            READERS[name].read(folder, content)
        except (OSError, ValueError) as error:
            if str(folder) not in (line := error_line(error)):
                raise AssertionError(f"{type(error).__name__} without the file's name: {line}") from error
    assert not said, f"a warning beside: {said[0].message}"


def _written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


# --------------------------------------------------------------------------------------------------------------------
# Data sets


def _read_idx(folder: Path, content: bytes) -> None:
    read_idx(_written(folder, "idx", content))


def _idx_files() -> list[bytes]:
    shapes = ((3,), (2, 3), (2, 28, 28), (1, 2, 1, 2), (0,))
    plain = [archives.idx_bytes(torch.ones(shape, dtype=torch.uint8)) for shape in shapes]
    return [*plain, *(gzip.compress(content, mtime=0) for content in plain)]


def _read_emnist(folder: Path, content: bytes) -> None:
    _written(folder, "gzip.zip", content)
    datasets.load("emnist-letters", folder)


def _emnist_files() -> list[bytes]:
    contents = archives.emnist_content("letters", 1, 1)
    files = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, value in contents.items():
                archive.writestr(f"gzip/{name}", value)
        files.append(buffer.getvalue())
    return files


def _read_cifar10_tar(folder: Path, content: bytes) -> None:
    _written(folder, "cifar-10-binary.tar.gz", gzip.compress(content, 1))
    datasets.load("cifar10", folder)


def _cifar10_tars() -> list[bytes]:
    files = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for name, value in archives.cifar10_content("binary", 1).items():
                member = tarfile.TarInfo(name)
                member.size, member.pax_headers = len(value), {"comment": "a header of its own"}
                archive.addfile(member, io.BytesIO(value))
        files.append(buffer.getvalue())
    return files


_CIFAR10 = archives.cifar10_content("python", 1)


def _read_cifar10_pickle(folder: Path, content: bytes) -> None:
    for name, value in _CIFAR10.items():
        _written(folder, name, content if name.endswith("/data_batch_1") else value)
    datasets.load("cifar10", folder)


def _cifar10_pickles() -> list[bytes]:
    images, labels = archives.cifar10_batch(0, 1)
    batch = {b"labels": labels.tolist(), b"data": images.view(1, -1).numpy()}
    return [*(pickle.dumps(batch, protocol) for protocol in (2, 3, 4)), pickle.dumps({b"labels": [1, 2.0, None, "x"]})]


# --------------------------------------------------------------------------------------------------------------------
# Weights and configurations

_STATE = lenet_ext.ReferenceNet().half().state_dict()
_SMALL = {"weight": torch.zeros(2, 1), "bias": torch.ones(2, dtype=torch.float64)}
_CONFIG = {**TrainConfig.for_data("digits").to_dict(), "threads": 1, "root": "data"}
_DESCRIPTIONS: tuple[dict[str, Any], ...] = (
    {"data": "mnist", "in_channels": 1, "num_classes": 10, "config": _CONFIG},
    {"labels": [*"abcdefghij"], "normalization": {"mean": [0.5], "std": 0.25}, "test_accuracy": 0.5},
)


def _read_weights(folder: Path, content: bytes) -> None:
    path = _written(folder, "weights", content)
    checkpoint.load_checkpoint(path)
    weights = load_weights(path)
    _ = weights.data
    load_into(lenet_ext.ReferenceNet(), weights.state, path)


def _saved(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _weights_files() -> list[bytes]:
    run = {"format": "lenet_ext checkpoint 1", "epoch": 1, "config": _CONFIG, "history": [], "model": _SMALL}
    run |= {"optimizer": {"state": {}, "param_groups": []}, "scheduler": {"last_epoch": 1}, "rng": {}}
    contents = [_SMALL, {"state_dict": {f"module.{name}": value for name, value in _SMALL.items()}}, run]
    old = [_saved(content, _use_new_zipfile_serialization=False) for content in contents]
    descriptions = [{}, *({"lenet_ext": json.dumps(description)} for description in _DESCRIPTIONS)]
    return [*map(_saved, contents), *old, *(save(_SMALL, metadata) for metadata in descriptions)]


_ARCHIVE = _saved(_SMALL)


def _read_pickle(folder: Path, content: bytes) -> None:
    """What torch.save writes, but for its checksums, which no change of the file would get past."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_ARCHIVE)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.namelist():
            new.writestr(member, content if member.endswith("/data.pkl") else old.read(member))
    _read_weights(folder, buffer.getvalue())


def _pickles() -> list[bytes]:
    files = []
    for content in (_SMALL, {"model": _SMALL, "epoch": 1, "other": [1.5, None, True, ("x", b"y")]}):
        with zipfile.ZipFile(io.BytesIO(_saved(content))) as archive:
            files.append(archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl"))))
    return files


_WEIGHTS = save(_STATE, {})


def _read_folder(folder: Path, content: bytes) -> None:
    """The description of a network, whose weights are good."""
    _written(folder, "model.safetensors", _WEIGHTS)
    path = _written(folder, "config.json", content)
    net = lenet_ext.Net.from_pretrained(folder)
    try:
        datasets.DATA_SETS["mnist"].changed_by(net.config)
    except ValueError as error:  # who asks knows the file
        raise ValueError(f"{path}: {error}") from None


def _descriptions() -> list[bytes]:
    return [json.dumps(description).encode() for description in (*_DESCRIPTIONS, {}, [], None)]


def _read_configuration(folder: Path, content: bytes) -> None:
    """That of a run, which a checkpoint holds in types that JSON has, too."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return
    try:
        TrainConfig.from_dict(values)
    except ValueError as error:  # who asks knows the file
        raise ValueError(f"{folder}: {error}") from None


def _configurations() -> list[bytes]:
    changes: tuple[dict[str, Any], ...] = ({}, {"data": "cifar10", "threads": None}, {"lr": 1e9, "optimizer": "adam"})
    return [json.dumps(_CONFIG | change).encode() for change in changes]


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def _read_picture(folder: Path, content: bytes) -> None:
    path = _written(folder, "picture", content)
    ink = pictures.load_ink(path)
    for data in ("mnist", "digits", "kmnist"):
        pictures.frame_ink(ink, data)
    pictures.load_photo(path)
    page, _ = pictures.load_page(path)
    try:
        segment.find_digits(page)
    except ValueError as error:  # who asks knows the file
        raise ValueError(f"{path}: {error}") from None


def _picture_files() -> list[bytes]:
    formats = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "GIF": ("P",),
        "BMP": ("1", "L", "RGB"),
        "JPEG": ("L", "RGB", "CMYK"),
        "TIFF": ("1", "L", "RGBA", "F", "I"),
        "WEBP": ("RGBA",),
        "PPM": ("1", "L", "RGB"),
        "TGA": ("L", "RGBA"),
        "PCX": ("P",),
        "ICO": ("RGBA",),
        "SGI": ("L",),
        "DDS": ("RGB",),
    }
    stroke = torch.full((12, 9), 250, dtype=torch.uint8)
    stroke[2:10, 4:6] = 10
    image = Image.fromarray(stroke.numpy())
    files = []
    for name, modes in formats.items():
        for mode in modes:
            buffer = io.BytesIO()
            exif = Image.Exif()
            exif[0x0112] = 6  # lies on its side
            options = {"exif": exif} if name in ("JPEG", "PNG", "WEBP", "TIFF") else {}
            image.convert(mode).save(buffer, name, **options)
            files.append(buffer.getvalue())
    return files


READERS = {
    "idx": Reader(_read_idx, _idx_files),
    "emnist": Reader(_read_emnist, _emnist_files),
    "cifar10-tar": Reader(_read_cifar10_tar, _cifar10_tars),
    "cifar10-pickle": Reader(_read_cifar10_pickle, _cifar10_pickles),
    "weights": Reader(_read_weights, _weights_files),
    "pickle": Reader(_read_pickle, _pickles),
    "folder": Reader(_read_folder, _descriptions),
    "configuration": Reader(_read_configuration, _configurations),
    "picture": Reader(_read_picture, _picture_files),
}
