"""Reader of the IDX format, in which MNIST and its relatives are published."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["read_content", "read_idx"]

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8 = 0x08  # the element type of every file of MNIST


def read_content(path: str | Path) -> bytes:
    """The bytes of a file, uncompressed if it is gzipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: the gzip stream is damaged.
    """
    content = Path(path).read_bytes()
    if content[:2] != _GZIP_MAGIC:
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None


def read_idx(path: str | Path) -> Tensor:
    """Reads an IDX file of unsigned bytes, plain or gzipped (told by the content, not by the name).

    Args:
        path: the file.

    Returns:
        uint8 tensor of the shape that the file states, contiguous.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an IDX file of unsigned bytes, or its length is not what its header states.

    Source: "The IDX file format" in Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".

    Example:
        >>> import tempfile, os
        >>> name = os.path.join(tempfile.mkdtemp(), "example")
        >>> _ = Path(name).write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        >>> read_idx(name)
        tensor([7, 8, 9], dtype=torch.uint8)
    """
    content = read_content(path)
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path}: not an IDX file (it must begin with two zero bytes, found {content[:2]!r})")
    kind, dims = content[2], content[3]
    if kind != _UINT8:
        raise ValueError(f"{path}: element type 0x{kind:02x}, expected 0x{_UINT8:02x} (unsigned byte)")
    begin = 4 + 4 * dims
    if dims == 0 or len(content) < begin:
        raise ValueError(f"{path}: the header ends early ({dims} dimensions in {len(content)} bytes)")
    shape = struct.unpack(f">{dims}I", content[4:begin])
    expected, found = math.prod(shape), len(content) - begin
    if expected != found:
        raise ValueError(f"{path}: the header states {shape}, that is {expected} bytes of data, found {found}")
    if expected == 0:  # torch.frombuffer refuses an empty buffer
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content[begin:]), dtype=torch.uint8).view(shape)
