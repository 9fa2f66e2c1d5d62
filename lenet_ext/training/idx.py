"""Reader of the IDX format, in which MNIST and its relatives are published."""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from lenet_ext.environment.files import naming

__all__ = ["open_content", "read_idx", "read_idx_from"]

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8 = 0x08  # the element type of every file of MNIST and its relatives
_MOST_DIMENSIONS = 4
# Twice what the largest of them has, all of EMNIST. A header can state anything.
_LARGEST = 1 << 30
_PIECE = 1 << 20


@contextlib.contextmanager
def open_content(path: str | Path, file: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """Opens a file for reading, uncompressed on the way if it is gzipped; nothing is read ahead of need.

    Args:
        path: the file, or the name that errors bear if it is open already.
        file: where to read, if it is open already.

    Raises:
        OSError: the file cannot be read.
        ValueError: the gzip stream is damaged, which shows while it is read.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(naming(path))
        if file is None:
            file = stack.enter_context(open(path, "rb"))
        # What was peeked at is put before the rest, for a member of an archive cannot always go back.
        compressed = cast("BinaryIO", _Prefixed(file.read(2), file))
        is_gzip = compressed.peeked == _GZIP_MAGIC  # type: ignore[attr-defined]
        try:
            yield cast("BinaryIO", gzip.GzipFile(fileobj=compressed, mode="rb")) if is_gzip else compressed
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged gzip file ({error})") from None


class _Prefixed:
    """A file for reading of which the first bytes have been read already."""

    def __init__(self, peeked: bytes, file: BinaryIO) -> None:
        self.peeked = peeked
        self._left = peeked
        self._file = file

    def read(self, size: int) -> bytes:
        if not self._left:
            return self._file.read(size)
        piece, self._left = self._left[:size], self._left[size:]
        return piece + self._file.read(size - len(piece))


def read_idx(path: str | Path) -> Tensor:
    """Reads an IDX file of unsigned bytes, plain or gzipped (told by the content, not by the name).

    Not more is read, or uncompressed, than the header states and one byte.

    Args:
        path: the file.

    Returns:
        uint8 tensor of the shape that the file states, contiguous.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an IDX file of unsigned bytes, it is larger than any that is known, or its length is not
            what its header states.

    Source: "The IDX file format" in Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".

    Example:
        >>> import tempfile, os
        >>> name = os.path.join(tempfile.mkdtemp(), "example")
        >>> _ = Path(name).write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        >>> read_idx(name)
        tensor([7, 8, 9], dtype=torch.uint8)
    """
    with open_content(path) as content:
        return _read(path, content)


def read_idx_from(file: BinaryIO, name: str) -> Tensor:
    """As `read_idx`, from a file that is open; errors call it by a name."""
    with open_content(name, file) as content:
        return _read(name, content)


def _read(path: str | Path, content: BinaryIO) -> Tensor:
    magic = _read_at_most(content, 4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise ValueError(f"{path}: not an IDX file (it must begin with two zero bytes, found {bytes(magic[:2])!r})")
    kind, dims = magic[2], magic[3]
    if kind != _UINT8:
        raise ValueError(f"{path}: element type 0x{kind:02x}, expected 0x{_UINT8:02x} (unsigned byte)")
    if dims > _MOST_DIMENSIONS:
        raise ValueError(f"{path}: the header states {dims} dimensions, expected {_MOST_DIMENSIONS} or fewer")
    sizes = _read_at_most(content, 4 * dims)
    if dims == 0 or len(sizes) < 4 * dims:
        raise ValueError(f"{path}: the header ends early ({dims} dimensions in {4 + len(sizes)} bytes)")
    shape = struct.unpack(f">{dims}I", sizes)
    expected = math.prod(shape)
    if expected > _LARGEST:
        raise ValueError(f"{path}: the header states {shape}, that is {expected} bytes of data, more than {_LARGEST}")
    data = _read_at_most(content, expected + 1)
    if len(data) != expected:
        found = f"{len(data)}" if len(data) < expected else f"{len(data)} or more"
        raise ValueError(f"{path}: the header states {shape}, that is {expected} bytes of data, found {found}")
    if expected == 0:  # torch.frombuffer refuses an empty buffer
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)


def _read_at_most(content: BinaryIO, size: int) -> bytearray:
    """Up to that many bytes, in pieces: memory grows with what is there, not with what a header states."""
    data = bytearray()
    while len(data) < size:
        piece = content.read(min(_PIECE, size - len(data)))
        if not piece:
            break
        data += piece
    return data
