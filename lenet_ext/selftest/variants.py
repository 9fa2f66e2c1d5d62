"""The kernels once more with each lower instruction set and each forced algorithm.

These are chosen once per process, from the environment: each setting gets a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import lenet_ext

__all__ = ["run_setting", "settings"]

_LIMIT_S = 120


def settings() -> list[dict[str, str]]:
    """Environment variables that lead to kernels which this process does not use; what is forced stays as it is."""
    info = lenet_ext.build_info()
    in_use, compiled = info["cpu_capability"], list(info["cpu_capabilities"])
    lower = []
    if not os.environ.get("LENET_EXT_CPU_CAPABILITY") and in_use in compiled:
        # The list is in ascending order; what lies above the one in use, this processor does not have.
        lower = [{"LENET_EXT_CPU_CAPABILITY": name} for name in compiled[: compiled.index(in_use)]]
    if os.environ.get("LENET_EXT_ALGORITHM"):
        return lower
    direct = {"LENET_EXT_ALGORITHM": "direct"}
    return [{**setting, **direct} for setting in lower or [{}]] + [{"LENET_EXT_ALGORITHM": "vendor"}]


def run_setting(setting: dict[str, str]) -> tuple[int, tuple[str, ...]]:
    """Runs the checks of the kernels in a process with these variables: how many there are, and what failed."""
    # The parent's sys.path, so that a source tree in the current directory is not imported by mistake.
    code = (
        f"import sys; sys.path[:] = {json.dumps(sys.path)}; from lenet_ext import selftest; sys.exit(selftest._child())"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **setting, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        if done.returncode == 0:
            return int(done.stdout.split()[-1]), ()
        # What went to the other stream may be anybody's warnings, unless there is nothing else.
        lines = [line for line in (done.stdout.strip() or done.stderr).splitlines() if line.strip()]
        failures = tuple(lines[-5:]) or (f"exit code {done.returncode}",)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        failures = (str(error),)
    return len(failures), failures
