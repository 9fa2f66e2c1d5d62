"""The C++ compiler, and whether it can do what is asked of it: tried before the first file, which takes its time."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from requirements import install_command, stop
from torch.utils import cpp_extension

_EMPTY = "int main() { return 0; }\n"
_OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n"


def attempt(compiler: list[str], flags: list[str], program: str = _EMPTY) -> str | None:
    """None where the compiler makes a program of it, else its first error."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "program.cpp")
        source.write_text(program)
        command = [*compiler, *flags, str(source), "-o", str(source.with_suffix(""))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return next((line for line in lines if "error:" in line), lines[0])


def compiler_version(compiler: list[str]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout


def user_flags() -> list[str]:
    """CXXFLAGS: ahead of the build's own, so that an -O2 that an environment sets for everything slows no kernel."""
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def find_compiler() -> list[str]:
    """CXX, else c++. Ends in one sentence where it is missing, or cannot make a library of this kind."""
    command = shlex.split(cpp_extension.get_cxx_compiler())
    if not command or shutil.which(command[0]) is None:
        name = command[0] if command else ""
        remedy = "unset CXX" if os.environ.get("CXX") and shutil.which("c++") else install_command("compiler")
        stop(f"the C++ compiler '{name}' was not found", remedy)
    name = shlex.join(command)
    if error := attempt(command, []):
        stop(f"the C++ compiler '{name}' does not work ({error})", install_command("compiler"))
    if error := attempt(command, user_flags()):
        stop(f"the C++ compiler '{name}' does not take CXXFLAGS ({error})", "unset CXXFLAGS")
    if attempt(command, ["-fopenmp"], _OPENMP):
        # GCC brings its runtime, Clang takes LLVM's where that is installed.
        clang = re.search(r"clang version (\d+)", compiler_version(command))
        remedy = install_command("openmp", clang[1]) if clang else install_command("compiler")
        stop(f"the C++ compiler '{name}' has no OpenMP", remedy)
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        stop(f"Python's headers are not in {headers}", install_command("python"))
    return command
