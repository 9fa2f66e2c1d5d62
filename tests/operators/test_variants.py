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
FILES = ["operators", "network/test_net.py", "network/test_training_step.py"]
# Besides what this machine chooses by itself, which the other files test on one thread.
VARIANTS = [
    ("direct", "default", 1),
    ("direct", "avx2", 1),
    ("direct", "avx512", 1),
    ("vendor", None, 1),
    (None, None, 3),
]


@pytest.mark.extended
@pytest.mark.parametrize(("algorithm", "capability", "threads"), VARIANTS, ids=lambda v: str(v or "as chosen"))
def test_kernels(algorithm, capability, threads):
    if os.environ.get("LENET_EXT_ALGORITHM"):
        pytest.skip("this is a variant already")
    if capability is not None and capability not in _usable():
        pytest.skip(f"{capability} is not compiled, or not in this processor")
    env = {**os.environ, "HYPOTHESIS_PROFILE": "repeatable", "OMP_NUM_THREADS": str(threads)}
    env["OMP_WAIT_POLICY"] = "passive"  # there may be fewer cores than threads
    if algorithm is not None:
        env["LENET_EXT_ALGORITHM"] = algorithm
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
    assert _capability_in_use(LENET_EXT_CPU_CAPABILITY=capability) == capability


def test_a_misspelt_algorithm_is_not_ignored():
    code = "import torch, lenet_ext; lenet_ext.nn.Linear(1, 1)(torch.ones(1, 1))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LENET_EXT_ALGORITHM": "fastest"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "LENET_EXT_ALGORITHM must be direct or vendor, got 'fastest'" in done.stderr


def _capability_in_use(**variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LENET_EXT_CPU_CAPABILITY"}
    code = "import lenet_ext; print(lenet_ext.build_info()['cpu_capability'])"
    command = [sys.executable, "-c", code]
    environment |= variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


@functools.cache
def _usable() -> list[str]:
    """What is compiled, up to what this processor runs."""
    info = lenet_ext.build_info()
    best = _capability_in_use() if "LENET_EXT_CPU_CAPABILITY" in os.environ else info["cpu_capability"]
    order = ["default", "avx2", "avx512"]
    return [name for name in order[: order.index(best) + 1] if name in info["cpu_capabilities"]]
