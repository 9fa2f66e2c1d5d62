"""Writing files so that a reader never sees half of one, and reading them so that errors name them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["atomic_path", "naming", "write_json"]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Hands out a temporary path beside `path`, and renames it to `path` when the block ends without an error.

    Args:
        path: the file to write; its directory is created. A link stays one, and what it leads to is written.

    Yields:
        Path to write to.

    Raises:
        OSError: `path` is a directory, a device or a pipe, its directory cannot be created, or the file cannot be
            written or renamed. It bears the name of `path`.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with atomic_path(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    if path.is_dir():  # told before the work, and of "." too, beside which there is no name for a temporary file
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # who may do so would have a file where /dev/null was
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # Without this a crash of the machine could leave the new name with the old length.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        # A full disk is told without a name, other errors with the temporary one.
        if error.errno is None or error.filename not in (None, str(temporary), temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):  # nothing is left to remove; or the disk is read-only, and refuses whatever is there
            temporary.unlink()


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Names a file in the system's errors while it is read: of a disk that fails they say no name.

    Args:
        path: the file.

    Raises:
        OSError: what was raised in the block, with the name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: str | Path, content: Any) -> None:
    """Writes strict JSON (NaN is refused), indented, atomically."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
