"""The build refuses a library that brought a C++ runtime of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lenet_ext

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "build_backend"))
from cxx_runtime import has_private_runtime

COMPILER = os.environ.get("CXX") or shutil.which("g++")


@pytest.mark.skipif(
    COMPILER is None or shutil.which("readelf") is None or not sys.platform.startswith("linux"),
    reason="needs a C++ compiler and readelf on Linux",
)
@pytest.mark.parametrize(("flags", "private"), [([], False), (["-static-libstdc++"], True)], ids=["shared", "private"])
def test_private_runtime(tmp_path, flags, private):
    source, library = tmp_path / "raise.cpp", tmp_path / "raise.so"
    source.write_text('#include <stdexcept>\nvoid f() { throw std::runtime_error("error"); }\n')
    command = [str(COMPILER), "-shared", "-fPIC", *flags, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the compiler cannot do this: {done.stderr[-200:]}")
    assert has_private_runtime(library) == private


def test_what_is_no_library_is_let_pass(tmp_path):
    (tmp_path / "text.so").write_text("no ELF file")
    assert not has_private_runtime(tmp_path / "text.so")


@pytest.mark.skipif(
    shutil.which("readelf") is None or not sys.platform.startswith("linux"), reason="needs readelf on Linux"
)
def test_the_library_needs_torch_and_the_system_and_nothing_else():
    """What a wheel may take for granted: auditwheel has nothing to copy into it."""
    (library,) = Path(lenet_ext.__file__).parent.glob("_C*.so")
    done = subprocess.run(["readelf", "--dynamic", str(library)], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", done.stdout))
    torchs = {"libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libgomp.so.1"}
    systems = r"lib(stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so\.\d+|ld-linux.*"
    others = {name for name in needed - torchs if not re.fullmatch(systems, name)}
    assert {"libc10.so", "libtorch_cpu.so"} <= needed
    assert others <= ({"libomp.so.5"} if lenet_ext.build_info()["compiler"].startswith("clang") else set())
