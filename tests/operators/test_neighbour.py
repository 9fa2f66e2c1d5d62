"""Threads beside other processes: when the caller works alone (csrc/common/neighbour.h)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu.build import has_sanitizers

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.parametrize("flags", [[], ["-fsanitize=thread", "-g1"]], ids=["as it is", "thread sanitizer"])
def test_a_region_that_was_held_up_is_followed_by_a_time_alone(tmp_path: Path, flags: list[str]) -> None:
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if compiler is None or not CSRC.is_dir():
        pytest.skip("needs a compiler and the sources")
    if flags and not has_sanitizers(flags):
        pytest.skip("the compiler has no thread sanitizer")
    program = tmp_path / "check"
    sources = [Path(__file__).with_name("neighbour_check.cpp"), CSRC / "common/neighbour.cpp"]
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-pthread", *flags, f"-I{CSRC}"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
