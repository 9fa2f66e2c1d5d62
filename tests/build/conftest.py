"""What nvcc makes of a kernel file, once for all tests and processes of a run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock  # torch needs it, too


@pytest.fixture(scope="session")
def cubin_of(tmp_path_factory) -> Callable[[str, Path, str], tuple[Path, str]]:
    """(nvcc, source, architecture) to the cubin and what ptxas says of it; a warning is an error."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes of this run

    def compile_once(nvcc: str, source: Path, architecture: str) -> tuple[Path, str]:
        cubin = folder / f"{source.stem}.{architecture}.cubin"
        said = cubin.with_suffix(".txt")
        with FileLock(f"{cubin}.lock"):  # of those that want it at the same time one compiles
            if not said.exists():
                command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v"]
                command += ["-Werror", "all-warnings", "-cubin", str(source), "-o", str(cubin)]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                said.write_text(done.stderr)
        return cubin, said.read_text()

    return compile_once
