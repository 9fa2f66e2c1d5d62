"""Writing files so that a reader never sees half of one, and reading them so that errors name them."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["atomic_path", "naming", "write_json"]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Hands out a temporary path beside `path`, and renames it to `path` when the block ends without an error.

    What processes left there that were killed while they wrote `path` is removed first.

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
    _remove_abandoned(target)
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


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary files for `path` that no process writes any more.

    A number that no process has here could be another machine's or container's, with the folder in common: what was
    written within the last minute is left for a later call.
    """
    of_a_process = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})\.tmp")
    with suppress(OSError):  # a folder that may be written but not read; a file that another process removed
        for other in path.parent.iterdir():
            found = of_a_process.fullmatch(other.name)
            if found and not _is_running(int(found[1])) and other.stat().st_mtime < time.time() - 60:
                other.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


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
