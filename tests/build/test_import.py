"""What `import lenet_ext` does, checks and says, each time in a fresh interpreter and outside of the source tree."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch

import lenet_ext
from lenet_ext import on_import
from lenet_ext._build import REBUILD, check_build, require_cuda

PACKAGE = Path(lenet_ext.__file__).resolve().parent


def run_python(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs code with `folder` in front of everything that this process has, and in `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LENET_EXT_")}
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def import_error(folder: Path) -> str:
    """The one line with which `import lenet_ext` fails when it is found in `folder`."""
    code = "try:\n    import lenet_ext\nexcept ImportError as error:\n    print(error)\nelse:\n    print('imported')"
    done = run_python(code, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    return done.stdout.strip()


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    copy = tmp_path / "lenet_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def remove_library(package: Path) -> None:
    for library in package.glob("_C*"):
        library.unlink()


def test_a_fresh_interpreter_imports_it_first_and_lightly(tmp_path: Path) -> None:
    code = """
import json, sys
import lenet_ext, torch
facts = {"modules": sorted(sys.modules), "cuda": torch.cuda.is_initialized()}
facts["schema"] = str(torch.ops.lenet_ext.linear_relu.default._schema)
print(json.dumps(facts))
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert "lenet_ext::linear_relu(Tensor input, Tensor weight" in found["schema"]
    assert not found["cuda"], "importing initialises CUDA, after which a process cannot fork"
    # numpy is not in the list: torch imports it where it is installed.
    extras = {"matplotlib", "PIL", "pooch", "safetensors", "sklearn", "scipy", "onnx", "onnxruntime", "openvino"}
    ours = {
        "lenet_ext.cli",
        "lenet_ext.training.datasets",
        "lenet_ext.training.trainer",
        "lenet_ext.bench",
        "lenet_ext.training.plots",
    }
    assert not (extras | ours) & set(found["modules"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_second_openmp_runtime_is_loaded(tmp_path: Path) -> None:
    """Two in one process know nothing of each other's threads."""
    if lenet_ext.build_info()["compiler"].startswith("clang"):
        pytest.skip("Clang's code needs LLVM's runtime, which torch has not")
    code = """
import re, torch
def runtimes():
    torch.ones(1 << 20).sum()
    return set(re.findall(r"/\\S*lib(?:gomp|omp|iomp)\\S*", open("/proc/self/maps").read()))
before = runtimes()
import lenet_ext
lenet_ext.Net()(torch.ones(64, 1, 32, 32))
print(len(before) > 0, runtimes() - before)
"""
    assert run_python(code, tmp_path).stdout == "True set()\n"


def test_exported_names() -> None:
    names = {"Net", "ReferenceNet", "__version__", "autograd", "build_info", "functional", "fuse", "nn", "unfuse"}
    assert names <= set(lenet_ext.__all__)
    assert all(hasattr(lenet_ext, name) for name in lenet_ext.__all__)
    assert (PACKAGE / "py.typed").is_file()


def test_build_info() -> None:
    info = lenet_ext.build_info()
    assert info["version"] == lenet_ext.__version__
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    free_threaded = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    assert info["python"] == ".".join(platform.python_version_tuple()[:2]) + free_threaded
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["cpu_capabilities"][0] == "default"
    assert set(info["cpu_capabilities"]) <= {"default", "avx2", "avx512"}
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert "-march" not in info["cxx_flags"], "the library must run on machines other than the one that built it"
    assert "fast-math" not in info["cxx_flags"]
    assert isinstance(info["cuda_arch_list"], list)
    if info["cuda"] is None:
        assert info["cuda_arch_list"] == []
        assert info["cuda_reason"]
    else:
        assert info["cuda_arch_list"]
        assert info["cuda_reason"] is None
        assert float(info["cuda"]) >= 11
    info["cpu_capabilities"].append("changed by the caller")
    info["version"] = "changed by the caller"
    assert lenet_ext.build_info()["version"] == lenet_ext.__version__
    assert "changed by the caller" not in lenet_ext.build_info()["cpu_capabilities"]


def test_an_unknown_instruction_set_is_refused(tmp_path: Path) -> None:
    code = """
import lenet_ext, torch
one = torch.ones(1, 1)
for use in lenet_ext.build_info, lambda: lenet_ext.functional.linear(one, one):
    try:
        use()
    except RuntimeError as error:
        print(str(error).partition("\\n")[0])
"""
    done = run_python(code, tmp_path, LENET_EXT_CPU_CAPABILITY="sse9")
    sentence = "lenet_ext: LENET_EXT_CPU_CAPABILITY must be default, avx2 or avx512, got 'sse9'"
    assert done.stdout.splitlines() == [sentence, sentence], done.stderr


def test_another_torch_is_refused_before_the_library_is_loaded(copied_package: Path) -> None:
    record = copied_package / "_build_record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"torch": "2.4.1+cu121"}))
    # What cannot even be loaded shows that nobody tries to.
    library = next(copied_package.glob("_C*"))
    library.write_bytes(b"not a library")
    assert import_error(copied_package.parent) == (
        f"lenet_ext was built for torch 2.4.1+cu121, but torch {torch.__version__} is running; "
        f"in the source folder run: {REBUILD}"
    )
    assert REBUILD == "pip install --force-reinstall --no-deps --no-cache-dir ."


@pytest.mark.parametrize(
    ("running", "accepted"),
    [
        ("2.11.0", True),
        ("2.11.1+cu130", True),
        ("2.11.0a0+git1234", True),
        ("2.1.1", False),
        ("2.12.0", False),
        ("3.11.0", False),
    ],
)
def test_only_the_minor_version_of_torch_counts(tmp_path: Path, running: str, accepted: bool) -> None:
    (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    record = {"torch": "2.11.0+cpu", "cxx11_abi": torch.compiled_with_cxx11_abi()}
    (tmp_path / "_build_record.json").write_text(json.dumps(record))
    if accepted:
        check_build(tmp_path, running)
    else:
        with pytest.raises(ImportError, match=rf"built for torch 2\.11\.0\+cpu, but torch {running} is running"):
            check_build(tmp_path, running)


def test_another_cxx_abi_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    record = {"torch": torch.__version__, "cxx11_abi": not torch.compiled_with_cxx11_abi()}
    (tmp_path / "_build_record.json").write_text(json.dumps(record))
    with pytest.raises(ImportError, match=r"\(without the C\+\+11 ABI\).*pip install --force-reinstall"):
        check_build(tmp_path)


def test_a_missing_library_is_an_import_error_with_the_remedy(copied_package: Path) -> None:
    remove_library(copied_package)
    message = import_error(copied_package.parent)
    assert message.startswith(f"lenet_ext: the compiled library is missing in {copied_package}")
    assert message.endswith(REBUILD)


def test_a_missing_record_is_an_import_error_with_the_remedy(copied_package: Path) -> None:
    (copied_package / "_build_record.json").unlink()
    with pytest.raises(ImportError, match=r"_build_record\.json is missing") as error:
        check_build(copied_package)
    assert str(error.value).endswith(REBUILD)


def test_the_source_tree_in_the_way_of_the_installed_package_is_named(copied_package: Path) -> None:
    remove_library(copied_package)
    folder = copied_package.parent
    (folder / "csrc").mkdir()
    (folder / "setup.py").touch()
    message = import_error(folder)
    assert message.startswith(f"lenet_ext: {copied_package} is the source tree")
    assert "pip install ." in message
    assert "another folder" in message


def test_cuda_is_missed_with_the_reason() -> None:
    info = lenet_ext.build_info()
    if info["cuda"] is not None:
        require_cuda()
        return
    with pytest.raises(RuntimeError) as error:
        require_cuda()
    assert info["cuda_reason"] in str(error.value)
    assert f"LENET_EXT_CUDA=1 {REBUILD}" in str(error.value)


# --- registrations with parts of torch that `import torch` leaves out ---

# As expressions: what each part knows about the operators.
REGISTRATIONS = {
    "torch.utils.flop_counter": "torch.ops.lenet_ext.linear in torch.utils.flop_counter.flop_registry",
    "torch.onnx": "'lenet_ext.onnx_symbolics' in sys.modules",
    "torch.distributed.tensor": "'lenet_ext.sharding' in sys.modules",
}


def test_parts_of_torch_are_not_imported_but_followed(tmp_path: Path) -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import lenet_ext
for part, known in {REGISTRATIONS!r}.items():
    assert (part in sys.modules) == (part in before), part
    __import__(part)
    assert eval(known), part
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_parts_of_torch_that_were_imported_before(tmp_path: Path) -> None:
    code = f"""
import sys, torch
for part in {REGISTRATIONS!r}:
    __import__(part)
import lenet_ext
for part, known in {REGISTRATIONS!r}.items():
    assert eval(known), part
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.fixture
def follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that is followed by another, which does not exist."""
    (tmp_path / "some_part.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(on_import._REGISTRATIONS, "some_part", "lenet_ext.absent")
    yield "some_part"
    sys.modules.pop("some_part", None)


def test_a_registration_that_fails_is_a_warning(follower: str) -> None:
    with pytest.warns(RuntimeWarning, match=r"could not be registered with some_part.*lenet_ext\.absent"):
        module = importlib.import_module(follower)
    assert module.value == 3
    assert isinstance(module.__spec__.loader, SourceFileLoader)
    assert inspect.getsource(module) == "value = 3\n"


def test_a_part_that_is_not_there_is_missed_as_ever(follower: str, tmp_path: Path) -> None:
    (tmp_path / "some_part.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match=follower):
        importlib.import_module(follower)
    (tmp_path / "some_part").mkdir()  # a package without code of its own: there is nothing to follow
    importlib.invalidate_caches()
    assert importlib.import_module(follower).__spec__.origin is None


def test_there_is_one_finder() -> None:
    before = list(sys.meta_path)
    on_import.register_on_import()
    assert sys.meta_path == before


def test_looking_for_a_part_does_not_use_up_its_registration(follower: str) -> None:
    assert importlib.util.find_spec(follower) is not None
    assert importlib.util.find_spec("no_such_module") is None
    with pytest.warns(RuntimeWarning, match="could not be registered"):
        importlib.import_module(follower)
