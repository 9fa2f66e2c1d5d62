"""The processor's peak: multiplications and additions a second in registers, measured in the rounds of the programs."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from lenet_ext.bench.instruction_sets import SETS

__all__ = ["PeakUnavailableError", "cxx_compiler", "peak_meter"]

_SOURCE = Path(__file__).with_name("fma_peak.cpp")
# Contraction into one instruction is what is measured; compilers other than GCC do not do it unasked.
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
_SAMPLE_S = 0.004


class PeakUnavailableError(RuntimeError):
    """The peak cannot be measured here; the message says why."""


def cxx_compiler() -> str | None:
    """The C++ compiler that ``CXX`` names, or the first that is found."""
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def peak_meter(threads: int) -> Callable[[], float]:
    """A function that measures for a few milliseconds and returns microseconds per 10^9 operations.

    Args:
        threads: that work at the same time.

    Raises:
        PeakUnavailableError: there is no compiler, or the microbenchmark does not compile.

    Example:
        >>> microseconds = peak_meter(1)()
        >>> gflops_per_second = 1e6 / microseconds
    """
    library = _library()
    # Not always the widest registers: some processors slow down for them.
    times = {i: library.fma_peak_seconds(i, 1, _SAMPLE_S) for i in range(_versions(library))}
    fastest = min((i for i, seconds in times.items() if seconds > 0), key=times.__getitem__)
    return lambda: library.fma_peak_seconds(fastest, threads, _SAMPLE_S) * 1e6


def _versions(library: ctypes.CDLL) -> int:
    """How many there are to choose from: a processor that is held to an instruction set has the peak of that set."""
    forced = os.environ.get("LENET_EXT_CPU_CAPABILITY")
    count = library.fma_peak_versions()
    return min(count, SETS.index(forced) + 1) if forced else count


@cache
def _library() -> ctypes.CDLL:
    compiler = cxx_compiler()
    if compiler is None:
        raise PeakUnavailableError("no C++ compiler was found (CXX, g++, clang++)")
    # Compiled anew in each process: it takes a second, and nothing can be out of date.
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "fma_peak.so")
        done = subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", path], capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
            raise PeakUnavailableError(f"the microbenchmark does not compile: {lines[0]}")
        library = ctypes.CDLL(path)
    library.fma_peak_seconds.restype = ctypes.c_double
    library.fma_peak_seconds.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    return library
