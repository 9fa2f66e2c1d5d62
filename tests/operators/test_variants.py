"""The numerical tests again for each algorithm and each instruction set, which a process chooses once, at its start."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lenet_ext

TESTS = Path(__file__).resolve().parents[1]
FILES = ["operators", "network/test_net.py"]
# Besides what this machine chooses by itself, which the other files test.
VARIANTS = [
    ("direct", "default"),
    ("direct", "avx2"),
    ("direct", "avx512"),
    ("vendor", None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "capability"), VARIANTS, ids=lambda v: v or "as chosen")
def test_kernels(algorithm, capability):
    if os.environ.get("LENET_EXT_ALGORITHM"):
        pytest.skip("this is a variant already")
    if capability is not None and capability not in _usable():
        pytest.skip(f"{capability} is not compiled, or not in this processor")
    # One thread: the number of threads is the matter of test_determinism.py, and several processes may share the cores.
    env = {**os.environ, "LENET_EXT_ALGORITHM": algorithm, "HYPOTHESIS_PROFILE": "variant", "OMP_NUM_THREADS": "1"}
    if capability is not None:
        env["LENET_EXT_CPU_CAPABILITY"] = capability
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "kernels", "-p", "no:cacheprovider", *FILES]
    done = subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "error" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_the_switch_works(capability):
    """The forced instruction set is the one in use; without this the test above could compare a thing with itself."""
    if capability not in _usable():
        pytest.skip(f"{capability} is not compiled, or not in this processor")
    done = _info({"LENET_EXT_CPU_CAPABILITY": capability})
    assert done.stdout.strip() == capability, done.stderr


@pytest.mark.parametrize("variable", ["LENET_EXT_CPU_CAPABILITY", "LENET_EXT_ALGORITHM"])
def test_a_misspelt_switch_is_not_ignored(variable):
    code = (
        "import torch, lenet_ext;"
        "lenet_ext.functional.conv_relu_max_pool2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3));"
        "lenet_ext.build_info()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, variable: "fastest"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert variable in done.stderr
    assert "fastest" in done.stderr


def _info(env):
    code = "import lenet_ext; print(lenet_ext.build_info()['cpu_capability'])"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@functools.cache
def _usable() -> list[str]:
    """What is compiled, up to what this processor runs."""
    order = ["default", "avx2", "avx512"]
    info = lenet_ext.build_info()
    clean = {k: v for k, v in os.environ.items() if k != "LENET_EXT_CPU_CAPABILITY"}
    code = "import lenet_ext; print(lenet_ext.build_info()['cpu_capability'])"
    best = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=120, check=True
    )
    return [name for name in order[: order.index(best.stdout.strip()) + 1] if name in info["cpu_capabilities"]]
