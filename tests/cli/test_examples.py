"""The examples run, and what the notebook shows is what its code does."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from archives import write_cifar10
from torch import distributed as dist

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
NEEDS = {
    "export_onnx.py": ("onnxruntime", "onnxscript"),
    "plain_loop.py": ("sklearn",),
    "ddp.py": ("sklearn",),
    "tutorial.ipynb": ("sklearn",),
    "cifar10.ipynb": ("matplotlib",),
}
ARGUMENTS = {"plain_loop.py": ("--epochs", "1")}
SAYS = {
    "compile_and_export.py": "lenet_ext.conv_relu_max_pool2d",
    "ddp.py": "epoch 2: training loss",
    "export_onnx.py": "batch 100",
    "fuse_your_model.py": "fused 4 of 6 layers",
    "per_sample_gradients.py": "norms of the gradients of 16 images",
    "plain_loop.py": "epoch 1: loss",
}


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def skip_without(name: str) -> None:
    absent = [module for module in NEEDS.get(name, ()) if importlib.util.find_spec(module) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")
    if name == "compile_and_export.py" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    if name == "ddp.py" and not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")


@pytest.mark.extended
@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, tmp_path: Path) -> None:
    skip_without(name)
    done = run(EXAMPLES / name, *ARGUMENTS.get(name, ()), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert SAYS[name] in done.stdout


@pytest.mark.extended
def test_two_processes(tmp_path: Path) -> None:
    skip_without("ddp.py")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    done = run(*launcher, EXAMPLES / "ddp.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert len(lines) == 2, lines
    assert all(line.endswith("processes: 2") for line in lines)


def test_notebook() -> None:
    """Its code runs from top to bottom, and it was committed as executed so, without an error."""
    skip_without("tutorial.ipynb")
    cells = json.loads((EXAMPLES / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])
    scope: dict = {}
    for cell in code:
        exec("".join(cell["source"]), scope)
    assert scope["accuracy"] > 0.9


def test_cifar10_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs from top to bottom on made-up pictures, and it shows no outputs, as it says."""
    skip_without("cifar10.ipynb")
    cells = json.loads((EXAMPLES / "cifar10.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "outputs are left empty" in "".join(cells[0]["source"])
    assert all(cell["execution_count"] is None and cell["outputs"] == [] for cell in code)
    write_cifar10(tmp_path / "data", "python")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for cell in code:
        exec("".join(cell["source"]), scope)
    assert scope["step"].path == "one operator"
    assert 0 <= scope["accuracy"] <= 1
    assert scope["number"] == 5


def test_the_index_names_every_example() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in (*SCRIPTS, *(path.name for path in EXAMPLES.glob("*.ipynb"))):
        assert f"[{name}]({name})" in index
