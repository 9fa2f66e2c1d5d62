"""``lenet-ext export``: what is in the files, and that none is left behind that is wrong."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")

import lenet_ext
from lenet_ext.cli import main
from lenet_ext.pretrained.files import load_weights
from lenet_ext.training import export as exporting
from lenet_ext.training.export import FORMATS, export

ONNX = ("onnx", "onnxscript", "onnxruntime")


def skip_without(format: str) -> None:
    if format == "onnx":
        for module in ONNX:
            pytest.importorskip(module)


def read_about(path: Path, format: str) -> dict[str, Any]:
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return json.loads(session.get_modelmeta().custom_metadata_map["lenet_ext"])
    if format == "safetensors":
        return load_weights(path).metadata
    files = {"lenet_ext.json": ""}
    if format == "torchscript":
        torch.jit.load(path, _extra_files=files)
    else:
        torch.export.load(io.BytesIO(path.read_bytes()), extra_files=files)
    return json.loads(files["lenet_ext.json"])


@pytest.mark.parametrize("format", FORMATS)
def test_the_network_of_the_package(format: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    skip_without(format)
    path = tmp_path / f"lenet.{format}"
    assert main(["export", "mnist", "--format", format, "--out", str(path)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "input   float32 (N, 1, 32, 32): (byte / 255 - 0.1) / 0.2752"
    assert lines[1] == "output  float32 (N, 10): scores of the classes"
    assert lines[2].startswith(f"wrote {path}, {path.stat().st_size} bytes; read again, its scores differ by at most ")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]  # one file, weights included
    about = read_about(path, format)
    assert about["normalization"] == {"mean": 0.1, "std": 0.2752}
    assert about["labels"] == list("0123456789")
    assert "config" not in about


@pytest.mark.parametrize("model", [lenet_ext.Net, lenet_ext.ReferenceNet])
@pytest.mark.parametrize("format", ["torchscript", "pt2", "safetensors"])
def test_other_sizes_fused_and_stock(format: str, model: Callable[..., Any], tmp_path: Path) -> None:
    net = model(3, 7)
    assert 0 <= export(net, tmp_path / "file", format) < 1e-5
    if format == "safetensors":
        again = lenet_ext.Net.from_pretrained(tmp_path / "file")
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("format", ["torchscript", "pt2"])
def test_stock_layers_need_no_lenet_ext(format: str, tmp_path: Path) -> None:
    path = tmp_path / "program"
    assert main(["export", "mnist", "--format", format, "--out", str(path)]) == 0
    load = "torch.jit.load(sys.argv[1])"
    if format == "pt2":
        load = "torch.export.load(io.BytesIO(open(sys.argv[1], 'rb').read())).module()"
    lines = (
        "import io, sys, torch",
        f"scores = {load}(torch.ones(3, 1, 32, 32))",
        "print(scores.shape, 'lenet_ext' in sys.modules)",
    )
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(lines), str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "torch.Size([3, 10]) False\n", done.stderr


@pytest.mark.parametrize("format", FORMATS)
def test_what_computes_otherwise_is_not_left_behind(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_without(format)
    path = tmp_path / "file"
    path.write_text("what was there before")
    write, read = FORMATS[format]

    def wrong(content: bytes, net: torch.nn.Module) -> Any:
        program = read(content, net)
        return lambda images: program(images) + 1e-3

    monkeypatch.setitem(exporting.FORMATS, format, (write, wrong))
    assert main(["export", "mnist", "--format", format, "--out", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"lenet-ext export: error: {path}: not written, for what was read again computes otherwise")
    assert len(error.splitlines()) == 1
    assert path.read_text() == "what was there before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("module", ONNX)
def test_onnx_without_its_packages(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for needed in ONNX[: ONNX.index(module)]:
        pytest.importorskip(needed)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["export", "mnist", "--format", "onnx", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == (
        f"lenet-ext export: error: {module} is needed for ONNX: pip install 'lenet_ext[onnx]'\n"
    )
    assert not list(tmp_path.iterdir())


def test_failures_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    for args, named in (
        (["absent", "--out", tmp_path / "x"], "absent: neither a file nor a folder"),
        (["mnist", "--out", tmp_path / "folder"], "folder: Is a directory"),
    ):
        assert main(["export", "--format", "torchscript", *map(str, args)]) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert named in error
    with pytest.raises(ValueError, match=r"^format must be one of onnx, .*, found 'tflite'$"):
        export(lenet_ext.Net(), tmp_path / "x", "tflite")
    with pytest.raises(ValueError, match="JSON"):
        export(lenet_ext.Net(), tmp_path / "x", "pt2", {"mean": float("nan")})


def test_logging_is_as_it_was(tmp_path: Path) -> None:
    before = logging.root.manager.disable
    export(lenet_ext.Net(), tmp_path / "x", "torchscript")
    assert logging.root.manager.disable == before
