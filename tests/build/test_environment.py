"""What the package finds out about the machine it runs on, also on machines other than this one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import lenet_ext
from lenet_ext.environment import system
from lenet_ext.environment.device import resolve_device


def build(**changes: Any) -> dict[str, Any]:
    return {**lenet_ext.build_info(), **changes}


@pytest.mark.parametrize(
    ("toolkit", "devices", "info", "reason"),
    [
        (None, 1, {}, "is built without CUDA"),
        ("12.8", 0, {}, "torch finds no CUDA device"),
        ("12.8", 1, {"cuda": None, "cuda_reason": "no nvcc"}, r"lenet_ext was built without CUDA \(no nvcc\)"),
        ("12.8", 1, {"cuda": None, "cuda_reason": ""}, r"lenet_ext was built without CUDA \(no reason recorded\)"),
    ],
)
def test_a_gpu_that_cannot_be_used(
    toolkit: str | None, devices: int, info: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.cuda", toolkit)
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices > 0)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    found = build(**info)
    monkeypatch.setattr(lenet_ext, "build_info", lambda: found)
    with pytest.raises(RuntimeError, match=f"device cuda cannot be used: .*{reason}"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")
    if info:
        assert resolve_device("cuda", fused=False) == torch.device("cuda", 0), "stock's kernels are there"


@pytest.mark.parametrize("fused", [True, False])
def test_a_gpu_that_can_be_used(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    found = build(cuda="12.8")
    monkeypatch.setattr(lenet_ext, "build_info", lambda: found)
    assert resolve_device("auto", fused=fused) == torch.device("cuda", 1)


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory, multi_processor_count = "H200", 9, 0, 150 * 2**30, 132

    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
    rows = dict(system.describe())
    assert rows["device cuda:0"] == rows["device cuda:1"]
    assert rows["device cuda:1"].startswith("H200, compute capability 9.0")


def test_a_system_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Path, **_: Any) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert system.cpu_model() == "aarch64"
    assert system.cpu_flags() == []
    assert system.cpu_governor() is None


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory is a repository like this one, and the package is installed elsewhere."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setattr(lenet_ext, "__file__", str(tmp_path / "site-packages" / "lenet_ext" / "__init__.py"))
    folder = tmp_path / "clone"
    (folder / "csrc").mkdir(parents=True)
    (folder / "csrc" / "library.cpp").write_text("// the operators\n")
    monkeypatch.chdir(folder)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "someone@example.org")
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "first"]):
        subprocess.run(["git", *arguments], check=True, capture_output=True)
    return folder


def test_the_commit_of_a_clone(clone: Path) -> None:
    commit = system.git_commit()
    assert commit is not None
    assert len(commit) == 40
    (clone / "results.json").write_text("{}")
    assert system.git_commit() == commit, "what is not of the package changes no number"
    (clone / "csrc" / "library.cpp").write_text("// others\n")
    assert system.git_commit() == f"{commit}+changes"


def test_a_clone_without_git_has_no_commit(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(clone))
    assert system.git_commit() is None


def test_another_repository_is_not_ours(clone: Path) -> None:
    (clone / "csrc" / "library.cpp").unlink()
    assert system.git_commit() is None
