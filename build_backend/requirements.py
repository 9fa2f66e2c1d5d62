"""What a build needs beside this folder, told in one line with the command that mends it where it is not there.

Needs nothing itself, not even setuptools.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from typing import NoReturn

SETUPTOOLS = "setuptools>=77"  # the first that knows `license = "MIT"`
TORCH = "torch>=2.11"
PYBIND11 = "pybind11>=3"

# Each package manager's command, and its names for a compiler, Python's headers and Clang's OpenMP runtime.
_MANAGERS = {
    "apt-get": ("apt-get install", {"compiler": "g++", "python": "python3-dev", "openmp": "libomp-dev"}),
    "dnf": ("dnf install", {"compiler": "gcc-c++", "python": "python3-devel", "openmp": "libomp-devel"}),
    "zypper": ("zypper install", {"compiler": "gcc-c++", "python": "python3-devel", "openmp": "libomp-devel"}),
    "pacman": ("pacman -S", {"compiler": "gcc", "python": "python", "openmp": "openmp"}),
}
_CONDA = ("conda install -c conda-forge", {"compiler": "gxx", "python": "python", "openmp": "llvm-openmp"})


def stop(problem: str, command: str) -> NoReturn:
    sys.exit(f"lenet_ext: {problem}; run: {command}")


def install_command(what: str, llvm: str = "") -> str:
    """What installs "compiler", "python" (its headers) or "openmp" here.

    Args:
        what: one of the three.
        llvm: the version of Clang that OpenMP is for, by which Debian names its package.
    """
    # In the usual folder, too: a PATH that has no compiler may lack all of it.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/bin"])
    manager = next((name for name in _MANAGERS if shutil.which(name, path=path)), None)
    command, names = _CONDA if manager is None else _MANAGERS[manager]
    package = names[what]
    if manager == "apt-get" and llvm:
        package = package.replace("-dev", f"-{llvm}-dev")
    root = "" if manager is None or os.geteuid() == 0 else "sudo "
    return f"{root}{command} {package}"


def require_setuptools() -> None:
    """pip's isolated builds bring the one that pyproject.toml asks for; others have what the environment has."""
    try:
        found = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        stop("setuptools is not installed here", f"pip install '{SETUPTOOLS}'")
    if int(found.split(".")[0]) < int(SETUPTOOLS.partition(">=")[2]):
        stop(f"setuptools 77 or newer is needed, found {found}", f"pip install --upgrade '{SETUPTOOLS}'")
