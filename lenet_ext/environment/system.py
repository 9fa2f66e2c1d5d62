"""Facts about the build and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import lenet_ext

__all__ = ["cpu_count", "cpu_flags", "cpu_governor", "cpu_model", "describe", "git_commit"]

_FLAGS = {"sse2", "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "asimd", "sve"}


def cpu_model() -> str:
    """Name of the processor as the operating system gives it.

    Example:
        >>> bool(cpu_model())
        True
    """
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def cpu_count() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_commit() -> str | None:
    """Commit of this package's repository, with ``+changes`` where the package differs from it; None outside of it.

    Looked for around the package and in the current directory: an installed package is often run from a clone.
    """
    for start in (Path(lenet_ext.__file__).resolve().parent.parent, Path.cwd()):
        # Another project's repository that happens to hold the environment is not ours.
        if not (start / "csrc" / "library.cpp").is_file():
            continue
        try:
            commit = _git(start, "rev-parse", "HEAD")
            # What the package is made of: other files, the results of a benchmark among them, change no number.
            changes = _git(
                start, "status", "--porcelain", "--untracked-files=no", "--", "csrc", "lenet_ext", "setup.py"
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return commit + ("+changes" if changes else "")
    return None


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def cpu_flags() -> list[str]:
    """Those of the processor's instruction sets that matter to float32 arithmetic; empty where the system does not say.

    Example:
        >>> isinstance(cpu_flags(), list)
        True
    """
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return [flag for flag in line.split(":", 1)[1].split() if flag in _FLAGS]
    return []


def cpu_governor() -> str | None:
    """How the first processor's clock is chosen, where the system tells it."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip() or None
    except OSError:
        return None


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def describe() -> list[tuple[str, str]]:
    """Name and value of everything a bug report should say.

    Example:
        >>> dict(describe())["torch in use"] == torch.__version__
        True
    """
    info = lenet_ext.build_info()
    rows = [
        ("version", str(info["version"])),
        ("built against torch", str(info["torch"])),
        ("torch in use", torch.__version__),
        ("Python", f"{sys.version.split()[0]} ({platform.python_implementation()})"),
        ("operating system", platform.platform()),
        ("compiler", str(info["compiler"])),
        ("C++ flags", str(info["cxx_flags"])),
        ("CPU", f"{cpu_model()}, {cpu_count()} processors usable"),
        ("CPU capability in use", str(info["cpu_capability"])),
        ("CPU capabilities compiled", ", ".join(info["cpu_capabilities"])),
        ("CPU capability of torch", torch.backends.cpu.get_cpu_capability()),
        ("threads", str(torch.get_num_threads())),
        (
            "CUDA of lenet_ext",
            str(info["cuda"]) if info["cuda"] else f"none ({info.get('cuda_reason') or 'not built'})",
        ),
        ("CUDA architectures", ", ".join(info["cuda_arch_list"]) or "-"),
        ("CUDA of torch", torch.version.cuda or "none"),
    ]
    if torch.version.cuda is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            rows.append(
                (
                    f"device cuda:{index}",
                    f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                    f"{properties.total_memory / 2**30:.1f} GiB",
                )
            )
    else:
        rows.append(("device", "cpu"))
    # Shown because each of them changes what runs.
    for name in ("LENET_EXT_CPU_CAPABILITY", "LENET_EXT_ALGORITHM", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if name in os.environ:
            rows.append((name, os.environ[name]))
    return rows
