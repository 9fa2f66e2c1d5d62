"""CIFAR-10 from either of its archives, or from what was extracted of one.

An archive may come from anywhere, and the one for Python holds pickles. Nothing of it is executed, and no header in it
decides how much memory or time is spent.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, cast

import torch
from torch import Tensor

from lenet_ext.environment.files import naming
from lenet_ext.training.download import Log, Remote, checksum_of, directory_of, download, find_file
from lenet_ext.training.images import IMAGE_SIZE

__all__ = ["ARCHIVES", "read_cifar10"]

# The published checksums, as Keras and TensorFlow Datasets have them; no download has verified them here.
ARCHIVES = {
    "cifar-10-binary.tar.gz": "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-python.tar.gz": "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}
MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)
_CHANNELS = 3
_PIXELS = _CHANNELS * IMAGE_SIZE * IMAGE_SIZE
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = "test_batch"
# A batch has 31 MB, and an archive 190.
_LARGEST_BATCH = 64 << 20
_LARGEST_ARCHIVE = 1 << 30
_PIECE = 1 << 20

Batch = tuple[Tensor, Tensor]


def read_cifar10(root: str | Path | None, log: Log) -> tuple[Batch, Batch]:
    """Reads the archive for C or the one for Python (or the folder that was extracted of one).

    Args:
        root: directory of the archive or of the folder. Where it has neither, the archive for C is downloaded into it;
            without a root, into the user's cache.
        log: told in one line what is being downloaded, and that an archive is not the published one. Such an archive
            is read all the same: other data in the same form can be used as well.

    Returns:
        Training set and test set: uint8 (N, 3, 32, 32) and int64 (N,), 0 to 9.

    Raises:
        OSError: a file cannot be read, or cannot be had.
        ValueError: a file is damaged, larger than CIFAR-10 is, or holds something else than pictures and labels.
        lenet_ext.environment.extras.MissingExtraError: a download is needed and pooch is not installed.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, and the description of the
    files beside them.
    """
    folders = [] if root is None else [directory_of(root), directory_of(root) / "cifar10"]
    archive = find_file(folders, tuple(ARCHIVES))
    extracted = [folder / name for folder in folders for name in _FOLDERS if (folder / name).is_dir()]
    if archive is None and extracted:
        return _complete(extracted[0], _of_folder(extracted[0]))
    if archive is None:
        name = next(iter(ARCHIVES))
        hint = f"pass the directory that has {' or '.join(ARCHIVES)} as root"
        archive = download("cifar10", Remote(name, ARCHIVES[name]), MIRRORS, root, log, hint)
    elif log and checksum_of(archive, Remote(archive.name, ARCHIVES[archive.name])) != ARCHIVES[archive.name]:
        log(f"{archive} is not the published archive (its SHA-256 is another); reading it as it is")
    return _complete(archive, _of_archive(archive))


def _complete(path: Path, found: Iterator[tuple[str, Batch]]) -> tuple[Batch, Batch]:
    batches: dict[str, Batch] = {}
    for name, batch in found:
        if name in batches:
            raise ValueError(f"{path}: {name} is there twice")
        batches[name] = batch
    missing = [name for name in (*_TRAIN, _TEST) if name not in batches]
    if missing:
        raise ValueError(f"{path}: there is no {', '.join(missing)} in it")
    train = [batches[name] for name in _TRAIN]
    return (torch.cat([images for images, _ in train]), torch.cat([labels for _, labels in train])), batches[_TEST]


def _of_folder(folder: Path) -> Iterator[tuple[str, Batch]]:
    decode, ending = _FOLDERS[folder.name]
    for name in (*_TRAIN, _TEST):
        path = folder / f"{name}{ending}"
        if path.is_file():
            with naming(path), open(path, "rb") as file:
                content = file.read(min(path.stat().st_size, _LARGEST_BATCH + 1))
            yield name, _decoded(path, decode, content)


def _of_archive(path: Path) -> Iterator[tuple[str, Batch]]:
    try:
        with naming(path), gzip.open(path, "rb") as compressed:
            bounded = _Bounded(compressed)
            with tarfile.open(fileobj=cast("IO[bytes]", bounded), mode="r:") as archive:
                for member in archive:
                    place = PurePosixPath(member.name)
                    decode, ending = _FOLDERS.get(place.parent.name, (None, ""))
                    name = place.name.removesuffix(ending)
                    if decode is None or name not in (*_TRAIN, _TEST) or not member.isreg() or member.issparse():
                        continue
                    file = archive.extractfile(member)
                    assert file is not None  # it is a regular file
                    yield (
                        name,
                        _decoded(f"{path}: {member.name}", decode, file.read(min(member.size, _LARGEST_BATCH + 1))),
                    )
            # The checksum of the gzip file stands at its end.
            while bounded.read(_PIECE):
                pass
    except _TooLargeError:
        raise ValueError(f"{path}: larger than CIFAR-10 is") from None
    except Exception as error:  # tarfile turns most of what a header may hold into an error of its own, and not all
        if str(path) in str(error):  # said already
            raise
        raise ValueError(f"{path}: damaged archive ({error})") from None


class _TooLargeError(Exception):
    pass


class _Bounded:
    """A file of which neither a piece nor the whole may be larger than CIFAR-10 needs, whatever its headers state."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_BATCH or self._file.tell() > _LARGEST_ARCHIVE:
            raise _TooLargeError
        return self._file.read(size)

    def seek(self, position: int) -> int:
        if position > _LARGEST_ARCHIVE:
            raise _TooLargeError
        return self._file.seek(position)


def _decoded(where: object, decode: Callable[[bytes], Batch], content: bytes) -> Batch:
    if len(content) > _LARGEST_BATCH:
        raise ValueError(f"{where}: larger than a batch of CIFAR-10 is")
    try:
        images, labels = decode(content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if int(labels.min()) < 0 or int(labels.max()) > 9:
        raise ValueError(f"{where}: labels must be 0 to 9, found {int(labels.min())} to {int(labels.max())}")
    return images.view(-1, _CHANNELS, IMAGE_SIZE, IMAGE_SIZE), labels


def _decode_binary(content: bytes) -> Batch:
    """A byte for the label and 3072 for the picture, as often as there are pictures."""
    if not content or len(content) % (1 + _PIXELS):
        raise ValueError(f"expected a multiple of {1 + _PIXELS} bytes, found {len(content)}")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1 + _PIXELS)
    return rows[:, 1:].contiguous(), rows[:, 0].long()


def _decode_pickle(content: bytes) -> Batch:
    """A dict with an array of bytes and a list of labels."""
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a pickle is a program: anything may go wrong in it
        reason = str(error) if isinstance(error, _ForbiddenError) else type(error).__name__
        raise ValueError(f"not a batch of CIFAR-10 that can be read safely ({reason})") from None
    if not isinstance(batch, dict):
        raise ValueError(f"expected a dict, found {type(batch).__name__}")
    # Of Python 2, which wrote the published files, and of Python 3.
    data, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise ValueError("expected an array 'data' and a list 'labels'")
    count = len(labels)
    if data.shape != (count, _PIXELS) or data.kind not in ("u1", b"u1") or count == 0:
        raise ValueError(f"expected bytes of shape ({count}, {_PIXELS}), found {data.kind!r} of shape {data.shape}")
    if not isinstance(data.content, bytes) or len(data.content) != count * _PIXELS or data.by_columns:
        raise ValueError(f"expected {count * _PIXELS} bytes of pictures, row by row")
    if any(type(label) is not int or not 0 <= label <= 9 for label in labels):
        raise ValueError("labels must be 0 to 9")
    return torch.frombuffer(bytearray(data.content), dtype=torch.uint8).view(count, _PIXELS), torch.tensor(labels)


# Of each kind of archive its folder: how a batch in it is read, and how its name ends.
_FOLDERS: dict[str, tuple[Callable[[bytes], Batch], str]] = {
    "cifar-10-batches-bin": (_decode_binary, ".bin"),
    "cifar-10-batches-py": (_decode_pickle, ""),
}


class _ForbiddenError(pickle.UnpicklingError):
    pass


class _Kind:
    """Stands in for ``numpy.dtype``: keeps the name."""

    def __init__(self, name: object = None, *rest: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, of which a byte has none."""


class _Array:
    """Stands in for ``numpy.ndarray``: keeps what the pickle says of it and makes nothing of it."""

    shape: object = None
    kind: object = None
    by_columns: object = None
    content: object = None

    @classmethod
    def of(cls, *arguments: object) -> _Array:
        """In place of ``numpy.core.multiarray._reconstruct``, which would allocate what it is told to."""
        return cls()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, kind, self.by_columns, self.content = state
        self.kind = kind.name if isinstance(kind, _Kind) else None


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Knows three names, and all of them are ours.

    In Python, not in C: there a single instruction can ask for a memo of any length. In both one can ask for a
    bytearray of any length, of which there is none in a batch.
    """

    def load_bytearray8(self) -> None:
        raise _ForbiddenError("it asks for a bytearray")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }

    def find_class(self, module: str, name: str) -> object:
        match module, name:
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return _Array.of
            case "numpy", "ndarray":
                return _Array
            case "numpy", "dtype":
                return _Kind
        # Whoever wrote the file chose the name: it goes to a terminal only if it is one.
        called = f"{module}.{name}"
        raise _ForbiddenError(f"it asks for {called if called.replace('.', '').isidentifier() else 'an object'}")
