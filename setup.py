"""Builds lenet_ext._C. Metadata is in pyproject.toml; the steps are in build_backend/."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_backend"))

# What a wheel or an installation is asked for; a source distribution is made without torch.
BUILDS = {"build_ext", "bdist_wheel", "editable_wheel", "install", "develop", "build", "dist_info"} & set(sys.argv)
HAS_TORCH = importlib.util.find_spec("torch") is not None
if BUILDS and not HAS_TORCH and BUILDS != {"dist_info"}:
    sys.exit("lenet_ext: torch is not installed here; install it first: pip install torch, then: pip install .")


def version() -> str:
    return (ROOT / "lenet_ext" / "_version.py").read_text().split('"')[1]


def torch_requirement() -> str:
    """The minor version that the library is compiled against; its C++ interface is not stable across them."""
    if not (BUILDS and HAS_TORCH):
        return "torch>=2.11"
    import torch

    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < (2, 11):
        sys.exit(f"lenet_ext: torch 2.11 or newer is needed, found {torch.__version__}; run: pip install 'torch>=2.11'")
    return f"torch=={major}.{minor}.*"


def max_jobs() -> int:
    """One job a core, but no more than fit into memory: a job takes up to 1.5 GB."""
    if jobs := os.environ.get("MAX_JOBS"):
        return max(int(jobs), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int((free - 1e9) // 1.5e9)))


def extension_and_command():
    import torch
    from compile_objects import compile_objects
    from cpu_kernels import FLAGS, cpu_objects, supported_capabilities
    from cuda_toolkit import cuda_objects, find_cuda_toolkit
    from torch.utils import cpp_extension

    toolkit = find_cuda_toolkit()
    has_cuda = not isinstance(toolkit, str)
    compiler = shlex.split(os.environ.get("CXX") or cpp_extension.get_cxx_compiler())
    if shutil.which(compiler[0]) is None:
        sys.exit(f"lenet_ext: the C++ compiler '{compiler[0]}' was not found; install g++ or clang++, or set CXX")
    capabilities = supported_capabilities(compiler)
    debug = os.environ.get("DEBUG", "0") not in ("", "0")
    jobs = max_jobs()
    os.environ["MAX_JOBS"] = str(jobs)  # what torch's BuildExtension reads

    csrc = ROOT / "csrc"
    sources = sorted(path for path in (*csrc.glob("*.cpp"), *(csrc / "cpu").glob("*.cpp")))
    sources = [path for path in sources if has_cuda or not path.stem.endswith("_cuda")]
    definitions = [f"-DLENET_EXT_HAVE_{name.upper()}" for name in capabilities if name != "default"]
    flags = ["-g", "-O0"] if debug else ["-O2"]
    flags += ["-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", *definitions]
    # As system headers torch's own do not warn.
    for path in cpp_extension.include_paths():
        flags += ["-isystem", path]
    link_flags, libraries = ["-fopenmp"], []
    if has_cuda:
        flags += ["-DLENET_EXT_WITH_CUDA", "-isystem", str(toolkit.include)]
        link_flags += [f"-L{toolkit.libraries}"]
        libraries += ["cudart_static", "dl", "rt", "pthread"]

    print(f"lenet_ext {version()}: compiler {shutil.which(compiler[0])}, torch {torch.__version__}, {jobs} jobs")
    print(f"  CPU instruction sets: {', '.join(capabilities)}")
    if has_cuda:
        print(f"  CUDA {toolkit.version} ({toolkit.nvcc}) for {';'.join(toolkit.architectures)}", flush=True)
    else:
        print(f"  no CUDA: {toolkit}", flush=True)

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            build_directory = Path(self.build_temp).resolve() / "lenet_ext"
            self._write_config(build_directory)
            kernel_flags = ["-g", "-O0"] if debug else []
            objects = cpu_objects(
                compiler, capabilities, sorted((csrc / "cpu" / "kernels").glob("*.cpp")), build_directory, kernel_flags
            )
            if has_cuda:
                objects += cuda_objects(toolkit, compiler, sorted((csrc / "cuda").glob("*.cu")), build_directory, debug)
            compile_objects(objects, build_directory, jobs)
            extension = self.extensions[0]
            extension.extra_objects = [str(job.output) for job in objects]
            extension.depends = [str(job.output) for job in objects]
            extension.extra_compile_args["cxx"] += ["-I", str(build_directory)]
            super().build_extensions()
            self._write_record(Path(self.get_ext_fullpath(extension.name)).parent)

        def _write_config(self, build_directory: Path) -> None:
            """What csrc/build_info.cpp reports, as a header (rewritten only when it changed, for the incremental build)."""
            values = {
                "LENET_EXT_VERSION": version(),
                "LENET_EXT_TORCH_VERSION": torch.__version__,
                "LENET_EXT_CXX_FLAGS": " ".join(FLAGS + kernel_debug_flags(debug)),
            }
            if has_cuda:
                values["LENET_EXT_CUDA_VERSION"] = toolkit.version
                values["LENET_EXT_CUDA_ARCH_LIST"] = ";".join(toolkit.architectures)
            else:
                values["LENET_EXT_CUDA_REASON"] = toolkit
            text = "".join(f"#define {name} {json.dumps(value)}\n" for name, value in values.items())
            build_directory.mkdir(parents=True, exist_ok=True)
            header = build_directory / "lenet_ext_build_config.h"
            if not header.is_file() or header.read_text() != text:
                header.write_text(text)

        def _write_record(self, folder: Path) -> None:
            """What `import lenet_ext` compares with the running interpreter before it loads the library."""
            record = {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cxx11_abi": torch.compiled_with_cxx11_abi(),
                "cuda": toolkit.version if has_cuda else None,
                "cuda_reason": None if has_cuda else toolkit,
            }
            (folder / "_build_record.json").write_text(json.dumps(record, indent=1) + "\n")

    extension = cpp_extension.CppExtension(
        "lenet_ext._C",
        [os.path.relpath(path, ROOT) for path in sources],
        extra_compile_args={"cxx": flags},
        extra_link_args=link_flags,
        libraries=libraries,
    )
    return [extension], {"build_ext": BuildExtension}


def kernel_debug_flags(debug: bool) -> list[str]:
    return ["-g", "-O0"] if debug else []


compiled = ([], {})
if BUILDS - {"dist_info"}:
    compiled = extension_and_command()
setup(
    version=version(),
    install_requires=[torch_requirement(), "rich>=13"],
    ext_modules=compiled[0],
    cmdclass=compiled[1],
)
