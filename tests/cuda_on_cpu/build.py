"""Builds the CUDA side for the CPU, against the stand-in for CUDA's runtime in this directory.

The products, cached in the system's temporary directory under a hash of everything they are made from: the operators
as a torch library (`operators()`), and two programs without torch: the driver, under the sanitizers (`driver()`), and
the wrong kernels that the stand-in must find (`broken()`).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
NAMESPACE = "lenet_ext_cuda_on_cpu"
SHIM_FLAGS = [
    "-std=c++20",
    "-DLX_HOST_SHIM",
    f"-I{HERE}",
    f"-I{CSRC}",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",  # some compilers define it, and longjmp() then refuses to change stacks
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _build(name: str, sources: list[Path], flags: list[str], link: list[str]) -> Path:
    """Compiles and links `sources`, unless the cache has the result."""
    cxx = compiler()
    assert cxx is not None
    digest = hashlib.sha256(repr((cxx, flags, link)).encode())
    for file in sorted(path for folder in (CSRC, HERE) for path in folder.rglob("*")):
        if file.suffix in {".h", ".cuh", ".cu", ".cpp"} and "/cpu/" not in file.relative_to(CSRC.parent).as_posix():
            digest.update(file.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"lenet_ext-cuda-on-cpu-{os.getuid()}"
    product = cache / f"{name}-{digest.hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{product.name}.lock").open("w") as lock, tempfile.TemporaryDirectory() as temporary:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes that want it at the same time one compiles
        if product.exists():
            return product

        def compile_one(source: Path) -> str:
            target = f"{temporary}/{source.name}.o"
            _run([cxx, "-x", "c++", "-c", str(source), "-o", target, *flags])
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        made = f"{temporary}/{name}"
        _run([cxx, *objects, "-o", made, *link])
        partial = cache / f"{product.name}.partial"
        shutil.copy2(made, partial)  # then renamed, so that what has the name is whole
        partial.replace(product)
    return product


def kernels() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def _schemas() -> dict[str, str]:
    import torch

    import lenet_ext  # noqa: F401  registers them

    every = [str(schema) for schema in torch._C._jit_get_all_schemas()]
    ours = [schema.removeprefix("lenet_ext::") for schema in every if schema.startswith("lenet_ext::")]
    return {schema.split("(")[0]: schema for schema in ours}


def operator_names() -> list[str]:
    return list(_schemas())


def operators() -> ctypes.CDLL:
    """Builds and loads torch.ops.lenet_ext_cuda_on_cpu.*; returns the library for its control functions."""
    import torch
    from torch.utils import cpp_extension

    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = [*SHIM_FLAGS, "-O1", "-fPIC", f"-Dlenet_ext={NAMESPACE}", abi, *includes]
    torch_lib = Path(torch.__file__).parent / "lib"
    product = _build(
        f"operators-torch{torch.__version__}.so",
        [HERE / "library.cpp", *kernels()],
        flags,
        ["-shared", f"-L{torch_lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_lib}"],
    )
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in _schemas().values():
        library.define(schema)
    torch.ops.load_library(product)
    loaded = ctypes.CDLL(str(product))
    loaded.cuda_on_cpu_launches.restype = ctypes.c_int64
    loaded.cuda_on_cpu_lenet_forward_path.argtypes = [ctypes.c_bool] * 4 + [ctypes.c_int64]
    loaded.cuda_on_cpu_lenet_backward_path.argtypes = [ctypes.c_bool] * 4 + [ctypes.c_int64]
    pointer = ctypes.c_void_p
    loaded.cuda_on_cpu_lean_convolutions.argtypes = [ctypes.c_int64, pointer, ctypes.POINTER(pointer), *[pointer] * 4]
    loaded.cuda_on_cpu_tf32_linears.argtypes = [ctypes.c_int64] * 2 + [pointer, ctypes.POINTER(pointer), *[pointer] * 3]
    loaded.cuda_on_cpu_has_linears_in_one_launch.argtypes = [ctypes.c_bool, ctypes.c_int64]
    loaded.cuda_on_cpu_has_linears_in_one_launch.restype = ctypes.c_bool
    loaded.cuda_on_cpu_set_shared_memory.argtypes = [ctypes.c_int64]
    loaded.schemas = library  # keeps the definitions alive
    return loaded


def driver() -> Path:
    """Builds the driver program under AddressSanitizer and UndefinedBehaviorSanitizer."""
    flags = [*SHIM_FLAGS, "-O0", "-g1", *SANITIZERS]  # at -O1 the sanitizers take the compiler a minute more
    return _build("driver", [HERE / "driver.cu", *kernels()], flags, SANITIZERS)


def broken() -> Path:
    """Builds the program of wrong kernels."""
    return _build("broken", [HERE / "broken.cu"], [*SHIM_FLAGS, "-O1"], [])


def has_sanitizers(flags: Sequence[str] = SANITIZERS) -> bool:
    """Whether the compiler can build and run a program under sanitizers."""
    cxx = compiler()
    if cxx is None:
        return False
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "probe.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [cxx, str(source), *flags, "-o", f"{temporary}/probe"]
        return (
            subprocess.run(command, capture_output=True).returncode == 0
            and subprocess.run([f"{temporary}/probe"], capture_output=True).returncode == 0
        )
