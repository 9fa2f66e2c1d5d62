"""Finds nvcc and decides for which architectures the CUDA kernels are compiled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from compile_objects import ObjectFile
from requirements import stop

DEFAULT_ARCHITECTURES = ["8.0", "9.0", "10.0+PTX"]
_HOMES = ("CUDA_HOME", "CUDA_PATH")


@dataclass(frozen=True)
class CudaToolkit:
    nvcc: str
    version: str  # e.g. 13.0
    include: Path
    libraries: Path
    architectures: list[str]  # e.g. ["8.0", "9.0+PTX"]

    def gencode(self) -> list[str]:
        flags = []
        for architecture in self.architectures:
            number = architecture.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def _wanted() -> bool | None:
    """LENET_EXT_CUDA, or FORCE_CUDA as other packages call it: True, False, or None for "if nvcc is there"."""
    value = os.environ.get("LENET_EXT_CUDA") or ("1" if os.environ.get("FORCE_CUDA") == "1" else "")
    if value not in ("", "0", "1"):
        sys.exit(f"lenet_ext: LENET_EXT_CUDA must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def _find_nvcc() -> str | None:
    for variable in _HOMES:
        if home := os.environ.get(variable):
            nvcc = Path(home, "bin", "nvcc")
            if nvcc.is_file():
                return str(nvcc)
    return shutil.which("nvcc")


def _stop(problem: str, toolkit: str = "cuda") -> NoReturn:
    stop(problem, f"CUDA_HOME=/path/to/{toolkit} pip install . (for the CPU alone: LENET_EXT_CUDA=0 pip install .)")


def _no_nvcc() -> str:
    for variable in _HOMES:
        if home := os.environ.get(variable):
            return f"no nvcc was found: {variable}={home} has no bin/nvcc, and the PATH has none"
    return "no nvcc was found, neither in CUDA_HOME nor on the PATH"


def _toolkit_root(nvcc: str) -> Path:
    # nvcc on the PATH may be a wrapper script; nvcc itself knows where its toolkit is.
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def _first_with(root: Path, folders: list[str], pattern: str) -> Path:
    for folder in folders:
        if any((root / folder).glob(pattern)):
            return root / folder
    _stop(f"nvcc was found, but its toolkit in {root} has no {pattern}")


def _architectures(nvcc: str) -> list[str]:
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if architectures := re.findall(r"[^;,\s]+", listed):
        for architecture in architectures:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture):
                sys.exit(f"lenet_ext: TORCH_CUDA_ARCH_LIST must look like '8.0;9.0+PTX', got {listed!r}")
        return architectures
    import torch

    if torch.cuda.is_available():
        devices = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return [f"{major}.{minor}" for major, minor in sorted(devices)]
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    numbers = {name.removeprefix("compute_") for name in known}
    usable = [a for a in DEFAULT_ARCHITECTURES if a.removesuffix("+PTX").replace(".", "") in numbers]
    if usable and not usable[-1].endswith("+PTX"):
        usable[-1] += "+PTX"
    return usable or DEFAULT_ARCHITECTURES


def find_cuda_toolkit() -> CudaToolkit | str:
    """The toolkit, or the reason why CUDA is not built."""
    import torch

    wanted = _wanted()
    if wanted is False:
        return "LENET_EXT_CUDA=0 was set"
    nvcc = _find_nvcc()
    if nvcc is None:
        if wanted:
            _stop(f"LENET_EXT_CUDA=1 was set, but {_no_nvcc()}")
        return _no_nvcc()
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", answer)
    if release is None:
        _stop(f"{nvcc} --version does not name a release")
    version = release[1]
    # torch's own rule: another major version is an error, another minor one works.
    if torch.version.cuda is not None and (major := torch.version.cuda.split(".")[0]) != version.split(".")[0]:
        _stop(f"{nvcc} is CUDA {version}, but torch was built with CUDA {torch.version.cuda}", f"cuda-{major}")
    root = _toolkit_root(nvcc)
    targets = ["targets/x86_64-linux", "targets/sbsa-linux"]
    include = _first_with(root, ["include", *(f"{name}/include" for name in targets)], "cuda_runtime.h")
    libraries = _first_with(root, ["lib64", "lib", *(f"{name}/lib" for name in targets)], "libcudart_static.a")
    return CudaToolkit(nvcc, version, include, libraries, _architectures(nvcc))


def cuda_objects(
    toolkit: CudaToolkit, compiler: list[str], folder: Path, build_directory: Path, debug: list[str]
) -> list[ObjectFile]:
    # nvcc takes the compiler alone, without a launcher in front of it or flags behind it.
    host = next((word for word in compiler if Path(word).name not in ("ccache", "sccache", "distcc")), compiler[0])
    command = [
        *(toolkit.nvcc, "-std=c++17", *(debug or ["-O3"]), *toolkit.gencode()),
        *("-ccbin", host, "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas"),
    ]
    return [
        ObjectFile(source, build_directory / f"{source.stem}.cu.o", command) for source in sorted(folder.glob("*.cu"))
    ]
