"""The build: what a source distribution holds, what a wheel asks for, and how a build that cannot work ends.

Everything happens in a copy of the source tree, and through the hooks that pip calls.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import setuptools
import torch

import lenet_ext

SOURCE_TREE = Path(__file__).resolve().parents[2]
MADE_BY_TOOLS = (
    "build",
    "dist",
    "runs",
    "site",
    "PKG-INFO",
    "setup.cfg",
    "__pycache__",
    "*.egg-info",
    "*.so",
    "_build_record.json",
)
MINOR = ".".join(torch.__version__.split(".")[:2])

WITHOUT_TORCH = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
"""
# As pip isolates a build: the interpreter of the target environment, whose packages have been taken off sys.path.
ISOLATED = """
import site, sys
sys.path[:] = [path for path in sys.path if path not in site.getsitepackages()]
"""

pytestmark = pytest.mark.skipif(not (SOURCE_TREE / "setup.py").is_file(), reason="needs the source tree")


def shipped_files() -> list[str]:
    """What git tracks; without git (a source distribution has none) what is there and was not made by a tool."""
    command = ["git", "ls-files", "-z"]
    try:
        done = subprocess.run(command, cwd=SOURCE_TREE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        tracked = []
    else:
        tracked = [name for name in done.stdout.split("\0") if (SOURCE_TREE / name).is_file()]
    if "setup.py" in tracked:
        return tracked
    names = []
    for path in SOURCE_TREE.rglob("*"):
        name = path.relative_to(SOURCE_TREE)
        made = any(
            Path(part).match(pattern)
            for part in name.parts
            for pattern in (*MADE_BY_TOOLS, ".venv", ".*_cache", ".git", ".hypothesis")
        )
        if path.is_file() and not made:
            names.append(str(name))
    return names


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree."""
    copy = tmp_path_factory.mktemp("packaging") / "lenet_ext_source"
    for name in shipped_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(SOURCE_TREE / name, copy / name)
    return copy


def environment(tree: Path, site: str = "", **variables: str) -> dict[str, str]:
    """This process's environment with a sitecustomize of its own, and without the switches of the build."""
    switches = ("LENET_EXT_", "CUDA_", "TORCH_CUDA_", "FORCE_CUDA", "MAX_JOBS", "CXX", "CC", "DEBUG", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(switches)}
    folder = tree.parent / f"site{abs(hash(site))}"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(site)
    if site == ISOLATED and not (folder / "setuptools").exists():
        for path in Path(setuptools.__file__).parents[1].glob("setuptools*"):  # the package and its version
            (folder / path.name).symlink_to(path)
    return inherited | {"PYTHONPATH": os.pathsep.join([str(tree / "build_backend"), str(folder)])} | variables


def hook(tree: Path, call: str, site: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Calls a hook of the build backend, in the source tree as PEP 517 has it; prints its value as the last line."""
    command = [sys.executable, "-c", f"import lenet_ext_backend as backend; print('\\n' + repr(backend.{call}))"]
    where = environment(tree, site, **variables)
    return subprocess.run(command, cwd=tree, env=where, capture_output=True, text=True, check=False)


def value(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1].strip("'")


def torch_requirements(metadata: Message) -> list[str]:
    return [line for line in metadata.get_all("Requires-Dist", []) if line.startswith("torch")]


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    """A source distribution, made where there is no torch."""
    folder = tree.parent / "sdist"
    folder.mkdir()
    return folder / value(hook(tree, f"build_sdist({str(folder)!r})", WITHOUT_TORCH))


def stays_behind(name: str) -> bool:
    """What the repository has and a source distribution does not."""
    folders = ("benchmarks/", "docs/", "tests/bench/", "tests/docs/")
    is_a_result = name.startswith("tools/") and name.endswith(".json")
    of_coverage = name in ("tests/coverage.md", "tests/uncovered.py")
    others = name in ("mkdocs.yml", "tests/build/test_machine_code.py")
    return name.startswith(folders) or is_a_result or of_coverage or others


def test_the_sdist_holds_what_it_takes_to_build_and_to_test(tree: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    generated = {name for name in members if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    tracked = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()} & set(shipped_files())
    shipped = {name for name in tracked if not stays_behind(name)}
    assert {"csrc/library.cpp", "csrc/cpu/simd.h", "build_backend/extension.py", "tests/conftest.py"} <= shipped
    assert {"lenet_ext/pretrained/mnist.safetensors", "lenet_ext/pretrained/mnist.json"} <= shipped
    assert members - generated == shipped


def test_the_sdist_is_small(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        largest = sorted(((member.size, member.name) for member in archive), reverse=True)[:5]
    assert sdist.stat().st_size < 1_000_000, f"the largest files are {largest}"


def test_the_metadata_of_the_sdist_can_be_read_without_torch(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        name = f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO"
        metadata = Parser().parsestr(archive.extractfile(name).read().decode())
    assert metadata["Name"] == "lenet_ext"
    assert metadata["License-Expression"] == "MIT"
    assert torch_requirements(metadata) == ["torch>=2.11"]


def test_torch_is_asked_for_only_where_there_is_none(tree: Path) -> None:
    both = "get_requires_for_build_wheel() + backend.get_requires_for_build_editable()"
    assert value(hook(tree, both)) == "[]"
    assert value(hook(tree, both, WITHOUT_TORCH)) == "['torch>=2.11', 'torch>=2.11']"


def test_an_isolated_build_sees_the_torch_of_the_environment(tree: Path) -> None:
    def python(code: str) -> subprocess.CompletedProcess[str]:
        command, where = [sys.executable, "-c", code], environment(tree, ISOLATED)
        return subprocess.run(command, cwd=tree, env=where, capture_output=True, text=True, check=False)

    if python("import torch").returncode == 0:
        pytest.skip("torch is not in the environment's own site-packages")
    done = python("import lenet_ext_backend, torch; print(torch.__file__)")
    assert done.stdout.strip() == torch.__file__, done.stderr
    assert value(hook(tree, "get_requires_for_build_wheel()", ISOLATED)) == "[]"


@pytest.mark.parametrize(("site", "requirement"), [("", f"torch=={MINOR}.*"), (WITHOUT_TORCH, "torch>=2.11")])
def test_prepared_metadata_names_the_torch_that_is_there(
    tree: Path, tmp_path: Path, site: str, requirement: str
) -> None:
    name = value(hook(tree, f"prepare_metadata_for_build_wheel({str(tmp_path)!r})", site))
    metadata = Parser().parsestr((tmp_path / name / "METADATA").read_text())
    assert torch_requirements(metadata) == [requirement]


NO_TORCH = "torch is not installed here; run: pip install torch, and then: pip install ."
CUDA_COMMAND = "run: CUDA_HOME=/path/to/cuda pip install . (for the CPU alone: LENET_EXT_CUDA=0 pip install .)"
NO_NVCC = f"LENET_EXT_CUDA=1 was set, but no nvcc was found, neither in CUDA_HOME nor on the PATH; {CUDA_COMMAND}"
NO_COMPILER = "the C++ compiler '/nonexistent' was not found; run: unset CXX"
NO_SANITIZER = "LENET_EXT_SANITIZE must be address or thread, got 'memory'"
OLD_SETUPTOOLS = "setuptools 77 or newer is needed, found 60.0.0; run: pip install --upgrade 'setuptools>=77'"
NO_SETUPTOOLS = "setuptools is not installed here; run: pip install 'setuptools>=77'"

# What an old setuptools, or none, looks like from within.
SETUPTOOLS_OF = """
import importlib.metadata
version = importlib.metadata.version
def answer(name):
    if name != "setuptools":
        return version(name)
    {}
importlib.metadata.version = answer
"""
WITH_OLD_SETUPTOOLS = SETUPTOOLS_OF.format("return '60.0.0'")
WITHOUT_SETUPTOOLS = SETUPTOOLS_OF.format("raise importlib.metadata.PackageNotFoundError(name)")


@pytest.mark.parametrize(
    ("site", "variables", "sentence"),
    [
        pytest.param(WITHOUT_TORCH, {}, NO_TORCH, id="no torch"),
        pytest.param("", {"LENET_EXT_CUDA": "1", "PATH": "/nonexistent"}, NO_NVCC, id="no nvcc"),
        pytest.param("", {"LENET_EXT_CUDA": "0", "CXX": "/nonexistent"}, NO_COMPILER, id="no compiler"),
        pytest.param("", {"LENET_EXT_CUDA": "0", "LENET_EXT_SANITIZE": "memory"}, NO_SANITIZER, id="no sanitizer"),
        pytest.param(WITH_OLD_SETUPTOOLS, {}, OLD_SETUPTOOLS, id="old setuptools"),
        pytest.param(WITHOUT_SETUPTOOLS, {}, NO_SETUPTOOLS, id="no setuptools"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_sentence_before_compiling(
    tree: Path, tmp_path: Path, site: str, variables: dict[str, str], sentence: str
) -> None:
    done = hook(tree, f"build_wheel({str(tmp_path)!r})", site, **variables)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == f"lenet_ext: {sentence}"
    assert "Traceback" not in done.stderr
    assert not (tree / "build").exists()


@pytest.mark.extended
def test_what_an_earlier_build_left_behind_is_not_used(tree: Path, tmp_path: Path) -> None:
    """Objects compiled against another torch, and modules that the source no longer has."""
    code = """
import sys
from pathlib import Path
import lenet_ext_backend, torch
torch.__version__ = sys.argv[2]
from extension import extension_and_command
from setuptools import Distribution
build = Distribution({"name": "lenet_ext", **extension_and_command(Path.cwd(), "0")}).get_command_obj("build")
build.build_base, build.sub_commands = sys.argv[1], []
build.ensure_finalized()
removed = Path(build.build_lib, "lenet_ext", "removed.py")
removed.parent.mkdir(parents=True, exist_ok=True)
removed.touch()
build.run()
build_ext = build.get_finalized_command("build_ext")
print(removed.exists(), build_ext.force, build_ext.build_temp, build_ext.kernels, sep="\t")
"""

    def answer(torch_version: str, **variables: str) -> list[str]:
        command = [sys.executable, "-c", code, str(tmp_path), torch_version]
        where = environment(tree, LENET_EXT_CUDA="0", **variables)
        done = subprocess.run(command, cwd=tree, env=where, capture_output=True, text=True, check=False)
        return value(done).split("\t")

    first, again, other = answer("2.12.0"), answer("2.12.0"), answer("2.13.0")
    assert first[:2] == ["False", "True"]
    assert first == again
    assert first[2] != other[2]
    assert first[3] == other[3], "kernels know of no torch"
    flags = answer("2.12.0", CXXFLAGS="-DX")
    assert not {first[2], first[3]} & {flags[2], flags[3]}


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`cuda_toolkit` of the build backend with a CUDA 13.0 toolkit that only answers questions."""
    monkeypatch.syspath_prepend(str(SOURCE_TREE / "build_backend"))
    for variable in ("LENET_EXT_CUDA", "FORCE_CUDA", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '  --version) echo "Cuda compilation tools, release 13.0, V13.0.48" ;;\n'
        '  --list-gpu-arch) printf "compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\ncompute_120\\n" ;;\n'
        f'  *) echo "#$ TOP={tmp_path}" >&2 ;;\nesac\n'
    )
    nvcc.chmod(0o755)
    for file in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    import cuda_toolkit

    return cuda_toolkit


def test_cuda_is_built_where_nvcc_is_found(toolkit, tmp_path: Path) -> None:
    found = toolkit.find_cuda_toolkit()
    assert (found.version, found.include, found.libraries) == ("13.0", tmp_path / "include", tmp_path / "lib64")
    assert found.architectures == ["8.0", "9.0", "10.0+PTX"]
    assert found.gencode()[-2:] == [
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_cuda_is_left_out_with_a_reason(toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENET_EXT_CUDA", "0")
    assert toolkit.find_cuda_toolkit() == "LENET_EXT_CUDA=0 was set"
    monkeypatch.delenv("LENET_EXT_CUDA")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PATH", "")
    elsewhere = f"no nvcc was found: CUDA_HOME={tmp_path}/elsewhere has no bin/nvcc, and the PATH has none"
    assert toolkit.find_cuda_toolkit() == elsewhere
    monkeypatch.delenv("CUDA_HOME")
    assert toolkit.find_cuda_toolkit() == "no nvcc was found, neither in CUDA_HOME nor on the PATH"


def test_cuda_that_is_insisted_on_is_not_left_out(toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("FORCE_CUDA", "1")  # what other packages call it
    with pytest.raises(
        SystemExit, match=re.escape("CUDA_HOME=/nonexistent has no bin/nvcc, and the PATH has none; run: ")
    ):
        toolkit.find_cuda_toolkit()
    monkeypatch.setenv("LENET_EXT_CUDA", "0")  # the name of our own goes first
    assert toolkit.find_cuda_toolkit() == "LENET_EXT_CUDA=0 was set"
    monkeypatch.setenv("LENET_EXT_CUDA", "yes")
    with pytest.raises(SystemExit, match="LENET_EXT_CUDA must be 0 or 1, got 'yes'"):
        toolkit.find_cuda_toolkit()


def test_architectures_are_those_asked_for(toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6; 9.0a 12.0+PTX;")
    assert toolkit.find_cuda_toolkit().architectures == ["8.6", "9.0a", "12.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "sm_90")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must look like '8\.0;9\.0\+PTX', got 'sm_90'"):
        toolkit.find_cuda_toolkit()


def test_architectures_are_those_of_the_visible_gpus(toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), (8, 6), (9, 0)][device])
    assert toolkit.find_cuda_toolkit().architectures == ["8.6", "9.0"]


def test_another_major_version_of_cuda_than_torchs_is_refused(toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert toolkit.find_cuda_toolkit().version == "13.0"
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    sentence = "nvcc is CUDA 13.0, but torch was built with CUDA 12.6; run: CUDA_HOME=/path/to/cuda-12 pip install ."
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        toolkit.find_cuda_toolkit()


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`compiler` of the build backend, and a folder in front of the PATH for compilers that cannot do everything."""
    monkeypatch.syspath_prepend(str(SOURCE_TREE / "build_backend"))
    for variable in ("CXX", "CXXFLAGS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    import compiler
    import requirements

    monkeypatch.setattr(requirements, "_MANAGERS", {"sh": ("sh install", {"compiler": "cxx", "openmp": "omp-dev"})})
    monkeypatch.setattr(requirements.os, "geteuid", lambda: 0)
    return compiler


def write_compiler(path: Path, refused: str, message: str, version: str = "") -> None:
    """One that knows everything but `refused`, and makes empty programs."""
    path.write_text(
        f'#!/bin/sh\ncase "$*" in\n  *{refused}*) echo "warning: w" >&2; echo "{message}" >&2; exit 1 ;;\n'
        f'  --version) echo "{version}" ;;\nesac\n'
    )
    path.chmod(0o755)


def test_a_compiler_without_openmp_is_named_with_the_package_that_has_it(compilers, tmp_path: Path) -> None:
    write_compiler(tmp_path / "c++", "-fopenmp", "fatal error: omp.h not found", "c++ (GCC) 12.2.0")
    with pytest.raises(SystemExit, match=re.escape("'c++' has no OpenMP; run: sh install cxx")):
        compilers.find_compiler()
    write_compiler(tmp_path / "c++", "-fopenmp", "fatal error: omp.h not found", "Debian clang version 14.0.6")
    with pytest.raises(SystemExit, match=re.escape("'c++' has no OpenMP; run: sh install omp-dev")):
        compilers.find_compiler()


def test_a_compiler_that_does_not_work_is_told_with_its_first_error(
    compilers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_compiler(tmp_path / "c++", "program.cpp", "ld: error: no crt1.o")
    sentence = "'c++' does not work (ld: error: no crt1.o); run: sh install cxx"
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        compilers.find_compiler()
    write_compiler(tmp_path / "c++", "-fnonsense", "error: unknown -fnonsense")
    assert compilers.find_compiler() == ["c++"]
    monkeypatch.setenv("CXXFLAGS", "-O1 -fnonsense")
    sentence = "'c++' does not take CXXFLAGS (error: unknown -fnonsense); run: unset CXXFLAGS"
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        compilers.find_compiler()


def test_a_missing_compiler_is_told_with_the_command_that_installs_one(
    compilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match=re.escape("the C++ compiler 'c++' was not found; run: sh install cxx")):
        compilers.find_compiler()


def test_missing_headers_of_python_are_told_before_compiling(
    compilers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_compiler(tmp_path / "c++", "-fnonsense", "")
    monkeypatch.setattr(compilers.sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(compilers, "install_command", "sh install {}".format)
    with pytest.raises(SystemExit, match=f"Python's headers are not in {tmp_path}/include; run: sh install python"):
        compilers.find_compiler()


@pytest.mark.parametrize(
    ("there", "root", "command"),
    [
        ("apt-get", True, "apt-get install libomp-14-dev"),
        ("apt-get", False, "sudo apt-get install libomp-14-dev"),
        ("dnf", False, "sudo dnf install libomp-devel"),
        (None, False, "conda install -c conda-forge llvm-openmp"),
    ],
)
def test_commands_are_those_of_the_package_manager_that_is_there(
    there: str | None, root: bool, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SOURCE_TREE / "build_backend"))
    import requirements

    monkeypatch.setattr(requirements.shutil, "which", lambda name, path: name if name == there else None)
    monkeypatch.setattr(requirements.os, "geteuid", lambda: 0 if root else 1000)
    assert requirements.install_command("openmp", "14") == command


def arguments(extension_module, name: str) -> list[str]:
    """What the compiler gets for the host side."""
    (extension,) = extension_module.extension_and_command(SOURCE_TREE, "0")["ext_modules"]
    return extension.extra_compile_args[name]


def test_cxxflags_reach_every_source_and_may_name_the_standard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SOURCE_TREE / "build_backend"))
    monkeypatch.setenv("LENET_EXT_CUDA", "0")
    monkeypatch.setenv("CXXFLAGS", "-std=c++20 -O1 '-DTWO WORDS'")
    import extension
    from cpu_kernels import STANDARD, cpu_objects

    users = ["-std=c++20", "-O1", "-DTWO WORDS"]
    host = arguments(extension, "cxx")
    assert host[:3] == users
    assert host.index("-O2") > 2, "the level of optimization is the build's own"
    given = []
    monkeypatch.setattr(extension, "cpu_objects", lambda compiler, *_: given.append(compiler) or [])
    monkeypatch.setattr(extension, "compile_objects", lambda *_: None)
    monkeypatch.setattr(extension, "has_private_runtime", lambda library: False)
    monkeypatch.setattr(extension.cpp_extension.BuildExtension, "build_extensions", lambda self: None)
    from setuptools import Distribution

    made = extension.extension_and_command(SOURCE_TREE, "0")
    command = Distribution({"name": "lenet_ext", **made}).get_command_obj("build_ext")
    command.ensure_finalized()
    command.build_temp = str(tmp_path)
    command.extensions = made["ext_modules"]
    command.build_extensions()
    assert given[0][-4:] == [STANDARD, *users]
    objects = cpu_objects(given[0], ["default"], SOURCE_TREE / "csrc" / "cpu", tmp_path, [])
    assert all(job.command.index("-std=c++20") > job.command.index(STANDARD) for job in objects)


def test_torchs_own_pybind11_goes_before_the_declared_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SOURCE_TREE / "build_backend"))
    monkeypatch.setenv("LENET_EXT_CUDA", "0")
    import extension

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pybind11.py").write_text(f"def get_include():\n    return {str(tmp_path)!r}\n")
    monkeypatch.delitem(sys.modules, "pybind11", raising=False)
    folders = [flag for flag in arguments(extension, "cxx") if flag.endswith(("include", str(tmp_path)))]
    assert folders[-1] == str(tmp_path)
    assert any(Path(folder, "torch", "library.h").is_file() for folder in folders[:-1])
    monkeypatch.delitem(sys.modules, "pybind11")

    # A torch without a copy, as distributions build it.
    monkeypatch.setattr(extension.cpp_extension, "include_paths", list)
    assert extension._pybind11() == [str(tmp_path)]
    monkeypatch.delitem(sys.modules, "pybind11")
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
    sentence = "pybind11 is not installed here, and this torch has no copy of it; run: pip install 'pybind11>=3'"
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        extension._pybind11()


def test_the_number_of_parallel_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SOURCE_TREE / "build_backend"))
    from extension import _jobs

    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= _jobs() <= (os.cpu_count() or 1)
    monkeypatch.setenv("MAX_JOBS", "3")
    assert _jobs() == 3
    for wanted in ("0", "-1", "many"):
        monkeypatch.setenv("MAX_JOBS", wanted)
        with pytest.raises(SystemExit, match=f"MAX_JOBS must be a positive number, got '{wanted}'"):
            _jobs()


def test_the_installed_package_is_whole() -> None:
    """The build that `make test` began with: every module and nothing else, for the torch that is there."""
    package = Path(lenet_ext.__file__).parent
    if package.parent == SOURCE_TREE:
        pytest.skip("the source tree itself is imported")
    installed = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    made = {name for name in installed if "__pycache__" in name or "/_C." in name}
    assert sum("/_C." in name for name in made) == 1
    assert installed - made == wheel_files()
    assert torch_requirements(importlib.metadata.metadata("lenet_ext")) == [f"torch=={MINOR}.*"]


def wheel_files() -> set[str]:
    """Beside the compiled library."""
    return {name for name in shipped_files() if name.startswith("lenet_ext/")} | {"lenet_ext/_build_record.json"}


@pytest.mark.extended
def test_the_sdist_builds_and_installs_elsewhere(sdist: Path, tmp_path: Path) -> None:
    """One whole build, from the archive alone, without CUDA: the README's promise to those who have only the sdist."""
    pip = [sys.executable, "-m", "pip"]
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("LENET_EXT_", "PYTHONPATH"))}

    def run(command: list[str], **variables: str) -> str:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=tmp_path, env=inherited | variables, check=False, **streams)
        assert done.returncode == 0, done.stdout
        return done.stdout

    # Without the cache, from which pip would take the wheel of another run with the same temporary folder.
    options = ["--verbose", "--no-cache-dir", "--no-deps", "--no-build-isolation"]
    log = run([*pip, "wheel", *options, "--wheel-dir", "wheels", str(sdist)], LENET_EXT_CUDA="0")
    assert "no CUDA: LENET_EXT_CUDA=0 was set" in log
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode())
        record = json.loads(archive.read("lenet_ext/_build_record.json"))
    assert torch_requirements(metadata) == [f"torch=={MINOR}.*"]
    assert record["torch"] == torch.__version__
    assert {name for name in names if name.startswith("lenet_ext/") and "/_C." not in name} == wheel_files()

    run([*pip, "install", "--no-deps", "--no-index", "--target", "installed", str(wheel)])
    code = """
import torch, lenet_ext
print(lenet_ext.__file__)
loss = lenet_ext.Net()(torch.randn(2, 1, 32, 32)).square().sum()
loss.backward()
print(lenet_ext.build_info()["cuda"], bool(loss > 0))
"""
    answer = run([sys.executable, "-c", code], PYTHONPATH=str(tmp_path / "installed"))
    assert answer.splitlines()[-2:] == [str(tmp_path / "installed" / "lenet_ext" / "__init__.py"), "None True"]
