"""What this installation was built with, and whether it fits the torch that is running."""

from __future__ import annotations

import importlib.machinery
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lenet_ext._version import __version__

REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir ."
"""The command that builds the package again, from its source folder, against the torch that is installed."""

_FOLDER = Path(__file__).parent


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def _torch(version: str, cxx11_abi: bool) -> str:
    return f"torch {version}" if cxx11_abi else f"torch {version} (without the C++11 ABI)"


def check_build(folder: Path = _FOLDER, torch_version: str = torch.__version__) -> None:
    """Raises ImportError, in one sentence with the remedy, where the compiled library is missing or belongs to
    another torch. Called before the library is loaded, which would end in undefined symbols.

    Args:
        folder: the package's directory.
        torch_version: the running torch's version.
    """
    libraries = [folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    if not any(library.is_file() for library in libraries):
        if (folder.parent / "csrc").is_dir() and (folder.parent / "setup.py").is_file():
            raise ImportError(
                f"lenet_ext: {folder} is the source tree, which holds no compiled library for this Python; run "
                "`pip install .` there and start Python in another folder, or run `pip install -e .`"
            )
        raise ImportError(
            f"lenet_ext: the compiled library is missing in {folder} for this Python; "
            f"in the source folder run: {REBUILD}"
        )
    record_file = folder / "_build_record.json"
    if not record_file.is_file():
        raise ImportError(f"lenet_ext: {record_file} is missing; in the source folder run: {REBUILD}")
    record = json.loads(record_file.read_text())
    cxx11_abi = torch.compiled_with_cxx11_abi()
    if (_minor(record["torch"]), record["cxx11_abi"]) != (_minor(torch_version), cxx11_abi):
        raise ImportError(
            f"lenet_ext was built for {_torch(record['torch'], record['cxx11_abi'])}, "
            f"but {_torch(torch_version, cxx11_abi)} is running; in the source folder run: {REBUILD}"
        )


def build_info() -> dict[str, Any]:
    """Facts about this build, for bug reports.

    Returns:
        ``version``, ``torch`` (version compiled against), ``python``, ``compiler``, ``cxx_flags`` (of the CPU
        kernels), ``cpu_capabilities`` (instruction sets compiled), ``cpu_capability`` (the one in use), ``cuda``
        (toolkit version or ``None``), ``cuda_arch_list``, and ``cuda_reason`` (why there is no CUDA, or ``None``).
    """
    from lenet_ext import _C  # here, because check_build comes before it is loaded

    return {"cuda_reason": None, **_C.build_info(), "version": __version__}


@lru_cache(maxsize=1)
def require_cuda() -> None:
    """Raises RuntimeError, with the reason and the remedy, where the package was built without CUDA."""
    info = build_info()
    if info["cuda"] is None:
        raise RuntimeError(
            f"lenet_ext was built without CUDA ({info['cuda_reason']}); with nvcc on the PATH or in CUDA_HOME, "
            f"in the source folder run: LENET_EXT_CUDA=1 {REBUILD}"
        )
