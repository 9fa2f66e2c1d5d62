"""The package's version and dependencies, and the command that compiles lenet_ext._C (build_backend/extension.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_backend"))

# `dist_info` is the metadata of a wheel to be built, which tools also read where there is no torch (yet). What is in
# neither set, `sdist` above all, never needs torch.
COMPILES = not {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}.isdisjoint(sys.argv)
HAS_TORCH = importlib.util.find_spec("torch") is not None

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"lenet_ext: setuptools 77 or newer is needed, found {setuptools.__version__}; "
        "build in isolation, or run: pip install --upgrade setuptools"
    )


def version() -> str:
    return (ROOT / "lenet_ext" / "_version.py").read_text().split('"')[1]


def torch_requirement() -> str:
    """The minor version that the library is compiled against; torch's C++ interface changes from one to the next."""
    if not (HAS_TORCH and (COMPILES or "dist_info" in sys.argv)):
        return "torch>=2.11"
    import torch

    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < (2, 11):
        sys.exit(f"lenet_ext: torch 2.11 or newer is needed, found {torch.__version__}; run: pip install 'torch>=2.11'")
    return f"torch=={major}.{minor}.*"


compiled = {}
if COMPILES:
    if not HAS_TORCH:
        sys.exit("lenet_ext: torch is not installed here; run: pip install torch, and then: pip install .")
    from extension import extension_and_command

    compiled = extension_and_command(ROOT, version())

setuptools.setup(version=version(), install_requires=[torch_requirement(), "rich>=13"], **compiled)
