"""Files of data sets: found in a directory, or downloaded and compared with a checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lenet_ext.environment.extras import require
from lenet_ext.training.idx import open_content

__all__ = ["Log", "Remote", "checksum_of", "directory_of", "download", "find_file"]

Log = Callable[[str], None] | None
_PIECE = 1 << 20
_CALLED = {"sha256": "SHA-256", "md5": "MD5"}


@dataclass(frozen=True)
class Remote:
    """A file to download.

    Args:
        name: of the file, behind the address of a mirror and on this machine.
        checksum: ``"sha256:..."`` or ``"md5:..."``.
        of_content: the checksum is of what the gzip file holds: mirrors may compress differently.
    """

    name: str
    checksum: str
    of_content: bool = False


def directory_of(root: str | Path) -> Path:
    """The directory that a user named; it need not be there.

    Raises:
        NotADirectoryError: it is a file.
    """
    directory = Path(root)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"root must be a directory, found a file: {directory}")
    return directory


def find_file(folders: Iterable[Path], names: Sequence[str]) -> Path | None:
    """The first file that is there, by any of its names."""
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None


def checksum_of(path: Path, like: Remote) -> str | None:
    """The checksum of a file in the form of a known one; None where its content cannot be read."""
    kind = like.checksum.partition(":")[0]
    digest = hashlib.new(kind)
    try:
        if like.of_content:
            with open_content(path) as content:
                while piece := content.read(_PIECE):
                    digest.update(piece)
        else:
            with open(path, "rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
    except ValueError:
        return None
    return f"{kind}:{digest.hexdigest()}"


def download(data: str, remote: Remote, mirrors: Sequence[str], root: str | Path | None, log: Log, hint: str) -> Path:
    """Downloads a file, unless it is there already, and compares its checksum.

    Args:
        data: name of the data set. The environment variable ``LENET_EXT_<NAME>_URL`` names another mirror to use
            instead, and the files lie in a directory of that name in the user's cache.
        remote: what to download.
        mirrors: addresses of directories, in the order in which they are tried.
        root: directory to put it into, in place of the cache.
        log: told in one line what is being downloaded.
        hint: what the user can do instead, for errors.

    Returns:
        The file, whose checksum is right.

    Raises:
        OSError: it could not be had from any mirror.
        lenet_ext.environment.extras.MissingExtraError: pooch is not installed.
    """
    pooch = require("pooch", f"the download of {data} (or {hint})")
    directory = Path(pooch.os_cache("lenet_ext")) / data if root is None else Path(root)
    target = directory / remote.name
    if target.is_file() and checksum_of(target, remote) == remote.checksum:
        return target
    override = os.environ.get(f"LENET_EXT_{data.replace('-', '_').upper()}_URL")
    reasons = []
    pooch.get_logger().setLevel("ERROR")
    for mirror in (override.rstrip("/") + "/",) if override else mirrors:
        # Downloaded under another name: what bears the final name has been verified.
        partial = directory / f"{remote.name}.{os.getpid()}.part"
        try:
            if log:
                log(f"downloading {mirror}{remote.name}")
            pooch.retrieve(f"{mirror}{remote.name}", known_hash=None, fname=partial.name, path=directory)
            found = checksum_of(partial, remote)
            if found == remote.checksum:
                os.replace(partial, target)
                return target
            kind, _, expected = remote.checksum.partition(":")
            what = f"{_CALLED[kind]} of the {'content' if remote.of_content else 'file'}"
            reasons.append(f"{mirror}: {what} is {found and found.partition(':')[2]}, expected {expected}")
        except OSError as error:
            # A full disk says so; most errors of the network are OSErrors too, with pages of text.
            reasons.append(f"{mirror}: {error.strerror if error.errno and error.strerror else type(error).__name__}")
        except Exception as error:  # requests, urllib3, ssl: any of them may fail here
            reasons.append(f"{mirror}: {type(error).__name__}")
        finally:
            partial.unlink(missing_ok=True)
    where = "" if root is None else f" and is not in {directory}"
    raise OSError(f"{remote.name} could not be downloaded{where} ({'; '.join(reasons)}); {hint}")
