"""What lenet_ext._C is made of, and the `build_ext` command that makes it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from compile_objects import compile_objects
from compiler import compiler_version, find_compiler, user_flags
from cpu_kernels import FLAGS, STANDARD, cpu_objects, supported_capabilities
from cuda_toolkit import cuda_objects, find_cuda_toolkit
from cxx_runtime import has_private_runtime
from instrumentation import instrumentation_flags
from requirements import PYBIND11, stop
from setuptools.command.build import build
from torch.utils import cpp_extension

BYTES_PER_JOB = 1e9  # the largest takes 0.7e9; with torch's headers no file is small


def _pybind11() -> list[str]:
    """Where to look for pybind11 after torch's own headers.

    A library has one pybind11, and ours is the copy inside torch where there is one: torch's headers are written for
    it, and catch exceptions of it that torch's library throws. A torch that was built with the system's pybind11, as
    some distributions have it, comes without a copy: the declared requirement is for that.
    """
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return [pybind11.get_include()]
    if not any(Path(folder, "pybind11", "pybind11.h").is_file() for folder in cpp_extension.include_paths()):
        stop("pybind11 is not installed here, and this torch has no copy of it", f"pip install '{PYBIND11}'")
    return []


def _jobs() -> int:
    """One job a core, but no more than fit into the memory that is free."""
    if wanted := os.environ.get("MAX_JOBS"):
        if not wanted.isdecimal() or int(wanted) < 1:
            sys.exit(f"lenet_ext: MAX_JOBS must be a positive number, got {wanted!r}")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = Path("/proc/meminfo")
    available = re.search(r"MemAvailable: *(\d+) kB", memory.read_text()) if memory.is_file() else None
    return max(1, min(cores, int(int(available[1]) * 1024 // BYTES_PER_JOB))) if available else cores


def extension_and_command(root: Path, version: str) -> dict[str, Any]:
    """The arguments of `setup` that concern compiled code. Ends in one sentence where it cannot be compiled."""
    toolkit = find_cuda_toolkit()
    cuda_reason = toolkit if isinstance(toolkit, str) else None
    compiler = find_compiler()
    capabilities = supported_capabilities(compiler)
    jobs = _jobs()
    os.environ["MAX_JOBS"] = str(jobs)  # what torch's BuildExtension reads
    debug = ["-g", "-O0"] if os.environ.get("DEBUG", "0") not in ("", "0") else []
    instrumentation = instrumentation_flags()
    changed = [*instrumentation, *debug]  # in place of the release's optimization
    users = user_flags()

    kind = (", debug" if debug else "") + (", instrumented" if instrumentation else "")
    print(f"lenet_ext {version}, torch {torch.__version__}, jobs: {jobs}{kind}")
    print(f"  compiler: {shlex.join([*compiler, *users])} ({compiler_version(compiler).partition(chr(10))[0]})")
    print(f"  CPU instruction sets: {', '.join(capabilities)}")
    if cuda_reason is None:
        print(f"  CUDA {toolkit.version} ({toolkit.nvcc}) for {';'.join(toolkit.architectures)}", flush=True)
    else:
        print(f"  no CUDA: {cuda_reason}", flush=True)

    csrc = root / "csrc"
    # The host side: one folder for each operator, and what they share. The kernels are compiled apart, below.
    sources = sorted(path for path in csrc.rglob("*.cpp") if path.parent != csrc / "cpu")
    # -g0: Python's own flags, which come first, may ask for debug information.
    flags = [*users, *(changed or ["-O2", "-g0"]), "-fopenmp", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wextra", "-I", str(csrc)]
    flags += [f"-DLENET_EXT_HAVE_{name.upper()}" for name in capabilities if name != "default"]
    for path in [*cpp_extension.include_paths(), *_pybind11()]:
        flags += ["-isystem", path]  # as system headers torch's own do not warn
    link_flags = ["-fopenmp", *instrumentation]
    if cuda_reason is None:
        flags += ["-DLENET_EXT_WITH_CUDA", "-isystem", str(toolkit.include)]
        link_flags += [f"-L{toolkit.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    else:
        sources = [path for path in sources if path.name != "cuda.cpp"]

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Kept between builds, also of an editable installation, so that only what changed is compiled again. One
            # for each compiler, its flags and torch: ninja does not see it when a tool is replaced where it is, and
            # the usual library is not to be compiled again after an instrumented one. The kernels know of no torch or
            # Python.
            cuda = "" if cuda_reason else f"{toolkit.nvcc} {toolkit.version}"
            tools = "\n".join([compiler_version(compiler), cuda, *users, *instrumentation])
            digest = hashlib.sha256(tools.encode()).hexdigest()[:8]
            self.kernels = root / "build" / f"kernels-{digest}"
            name = f"{sys.implementation.cache_tag}-torch-{torch.__version__}-{digest}"
            self.build_temp = str(root / "build" / name)
            self.force = True  # ninja decides what is out of date; without it everything is compiled

        def run(self) -> None:
            super().run()
            # Into the package that was built: the source folder's own where the installation is editable.
            self._write_record(Path(self.get_ext_fullpath("lenet_ext._C")).parent)

        def build_extensions(self) -> None:
            folder = Path(self.build_temp).resolve() / "lenet_ext"
            self._write_config(folder)
            objects = cpu_objects([*compiler, STANDARD, *users], capabilities, csrc / "cpu", self.kernels, changed)
            if cuda_reason is None:
                objects += cuda_objects(toolkit, compiler, csrc / "cuda", self.kernels, debug)
            compile_objects(objects, self.kernels, jobs)
            extension = self.extensions[0]
            extension.extra_objects = [str(job.output) for job in objects]
            extension.extra_compile_args["cxx"] += ["-I", str(folder)]
            super().build_extensions()
            library = Path(self.get_ext_fullpath("lenet_ext._C"))
            if has_private_runtime(library):
                library.unlink()
                sys.exit(
                    f"lenet_ext: '{shlex.join(compiler)}' linked a C++ runtime of its own into the library, which "
                    "would crash beside torch's; unset CXX or set it to another compiler, or run: "
                    'LDFLAGS="-Wl,--no-as-needed -l:libstdc++.so.6 -Wl,--as-needed" pip install .'
                )

        def _write_config(self, folder: Path) -> None:
            """What csrc/common/build_info.cpp reports. Written only when it changes, or it would be compiled anew."""
            values = {
                "VERSION": version,
                "TORCH_VERSION": torch.__version__,
                "CXX_FLAGS": " ".join([STANDARD, *users, *FLAGS, *changed]),
            }
            if cuda_reason is None:
                values |= {"CUDA_VERSION": toolkit.version, "CUDA_ARCH_LIST": ";".join(toolkit.architectures)}
            else:
                values |= {"CUDA_REASON": cuda_reason}
            text = "".join(f"#define LENET_EXT_{name} {json.dumps(value)}\n" for name, value in values.items())
            folder.mkdir(parents=True, exist_ok=True)
            header = folder / "lenet_ext_build_config.h"
            if not header.is_file() or header.read_text() != text:
                header.write_text(text)

        def _write_record(self, folder: Path) -> None:
            """What `import lenet_ext` compares with the running torch before it loads the library."""
            record = {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cxx11_abi": torch.compiled_with_cxx11_abi(),
                "cuda": toolkit.version if cuda_reason is None else None,
                "cuda_reason": cuda_reason,
            }
            (folder / "_build_record.json").write_text(json.dumps(record, indent=1) + "\n")

    class Build(build):
        def run(self) -> None:
            # Modules that were removed from the source since the last build would be installed again.
            shutil.rmtree(self.build_lib, ignore_errors=True)
            super().run()

    extension = cpp_extension.CppExtension(
        "lenet_ext._C",
        [os.path.relpath(path, root) for path in sources],
        extra_compile_args={"cxx": flags},
        extra_link_args=link_flags,
    )
    return {"ext_modules": [extension], "cmdclass": {"build": Build, "build_ext": BuildExtension}}
