"""The package's version and dependencies, and the command that compiles lenet_ext._C (build_backend/extension.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_backend"))
from requirements import TORCH, require_setuptools, stop  # noqa: E402

require_setuptools()

import setuptools  # noqa: E402

# `dist_info` is the metadata of a wheel to be built, which tools also read where there is no torch (yet). What is in
# neither set, `sdist` above all, never needs torch.
COMPILES = not {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}.isdisjoint(sys.argv)
HAS_TORCH = importlib.util.find_spec("torch") is not None


def version() -> str:
    return (ROOT / "lenet_ext" / "_version.py").read_text().split('"')[1]


def torch_requirement() -> str:
    """The minor version that the library is compiled against; torch's C++ interface changes from one to the next."""
    if not (HAS_TORCH and (COMPILES or "dist_info" in sys.argv)):
        return TORCH
    import torch

    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < (2, 11):
        stop(f"torch 2.11 or newer is needed, found {torch.__version__}", f"pip install '{TORCH}'")
    return f"torch=={major}.{minor}.*"


compiled = {}
if COMPILES:
    if not HAS_TORCH:
        stop("torch is not installed here", "pip install torch, and then: pip install .")
    from extension import extension_and_command

    compiled = extension_and_command(ROOT, version())

setuptools.setup(version=version(), install_requires=[torch_requirement(), "rich>=13"], **compiled)
