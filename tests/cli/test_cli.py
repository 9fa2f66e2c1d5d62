"""The command line, as users run it: mostly as a process of its own, in a directory that is not the repository."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import lenet_ext
from lenet_ext.cli import main, train
from lenet_ext.selftest import variants
from lenet_ext.training import datasets
from lenet_ext.training.metrics_log import MetricsLog

COMMANDS = ("train", "eval", "predict", "export", "bench", "check", "demo", "info", "completion")
SHARED_MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
PICTURES = ("curves.png", "confusion.png", "misclassified.png", "filters.png")
WRITTEN = ("model.safetensors", "checkpoint.pt", "history.json", *PICTURES)

# One thread: these networks are small, and the machine may be busy.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def lenet(*args: Any, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m lenet_ext`` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "lenet_ext", *map(str, args)],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_one_line_error(code: int, stderr: str, expected_code: int) -> None:
    assert code == expected_code, stderr
    assert "Traceback" not in stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert ": error: " in stderr


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Directory of a run of two epochs on digits, and what it printed."""
    directory = tmp_path_factory.mktemp("trained")
    done = lenet("train", "--epochs", 2, "--device", "cpu", "--threads", 1, "--out", "run", cwd=directory)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return directory / "run", done.stdout


# --- help and usage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: lenet-ext {command}" in out
    assert all(len(line) < 80 or line[0] == " " for line in out.splitlines())  # but for the lines of a list


def test_console_script(tmp_path: Path) -> None:
    script = shutil.which("lenet-ext", path=sysconfig.get_path("scripts"))
    if script is None:
        pytest.skip("the console script is not installed in this environment")
    done = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    done = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == f"lenet-ext {lenet_ext.build_info()['version']}"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "COMMAND"),
        (["fly"], "'fly'"),
        (["train", "--epochs", "-1"], "--epochs"),
        (["train", "--epochs", "two"], "--epochs"),
        (["train", "--batch-size", "0"], "--batch-size"),
        (["train", "--threads", "0"], "--threads"),
        (["train", "--lr", "nan"], "--lr"),
        (["train", "--lr", "fast"], "--lr"),
        (["train", "--lr", "-1"], "--lr"),
        (["train", "--lr", "inf"], "--lr"),
        (["train", "--seed", "-5"], "--seed"),
        (["train", "--target", "0"], "--target"),
        (["train", "--target", "101"], "--target"),
        (["train", "--target", "nan"], "--target"),
        (["train", "--target", "all"], "--target"),
        (["train", "--data", "cifar"], "--data"),
        (["train", "--optimizer", "lbfgs"], "--optimizer"),
        (["train", "--schedule", "cosine"], "--schedule"),
        (["train", "--device", "tpu"], "--device"),
        (["train", "--epoch", "1"], "--epoch"),  # no abbreviations: they break when an option is added
        (["eval"], "CHECKPOINT"),
        (["predict", "checkpoint.pt"], "IMAGE"),
        (["export", "mnist", "--format", "onnx"], "--out"),
        (["export", "mnist", "--format", "tflite", "--out", "x"], "--format"),
        (["bench", "--batch-sizes", "1,0"], "--batch-sizes"),
        (["bench", "--cases", "conv1,conv9"], "conv9"),
        (["bench", "--json", "no/such/directory/file.json"], "directory"),
        (["bench", "--csv", "."], "not a regular file"),
        (["bench", "--csv", os.devnull], "not a regular file"),
        (["bench", "--plot", "times.txt"], "--plot times.txt: the name must end as one of a picture"),
        (["bench", "--only", ","], "--only"),
        (["bench", "--only", "net", "--cases", "fc3"], "nothing in common"),
        (["bench", "--quick", "--only", "layers", "--cases", "net"], "nothing in common"),
        (["bench", "--resume"], "--resume needs --json"),
        (["bench", "--threads", ""], "--threads"),
        (["check", "--threads", "many"], "--threads"),
        (["info", "extra"], "extra"),
        (["completion"], "shell"),
        (["completion", "ksh"], "'ksh'"),
    ],
)
def test_bad_usage(args: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(args)
    except SystemExit as stop:
        code = int(stop.code or 0)
    stderr = capsys.readouterr().err
    assert_one_line_error(code, stderr, 2)
    assert named in stderr
    assert "--help" in stderr


def test_without_a_command_the_module_does_as_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    done = lenet(cwd=tmp_path)
    assert done.returncode == stopped.value.code == 2
    assert done.stderr == capsys.readouterr().err
    assert done.stdout == ""


def test_bad_usage_as_a_process(tmp_path: Path) -> None:
    done = lenet("train", "--lr", "nan", cwd=tmp_path)
    assert_one_line_error(done.returncode, done.stderr, 2)
    assert "must be a finite number above 0, found 'nan'" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- failures ---------------------------------------------------------------------------------------------------------


def failure(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    code = main([str(arg) for arg in args])
    stderr = capsys.readouterr().err
    assert_one_line_error(code, stderr, 1)
    return stderr


def test_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (("eval", tmp_path / "absent.pt"), ("train", "--resume", tmp_path / "absent.pt")):
        assert "absent.pt: No such file or directory" in failure(capsys, *args)


def test_something_else_than_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("this is not a checkpoint at all")
    assert "text: not a checkpoint" in failure(capsys, "eval", tmp_path / "text")


def test_weights_of_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    message = failure(capsys, "eval", tmp_path / "other.pt", "--data", "digits")
    assert "other.pt: not the weights of this network" in message
    assert len(message) < 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["train", "bench", "check"])
def test_cuda_without_cuda(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [command, "--device", "cuda", *(["--out", tmp_path / "out"] if command == "train" else [])]
    assert "device cuda cannot be used" in failure(capsys, *args)


def test_out_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "file: File exists" in failure(capsys, "train", "--epochs", 1, "--out", tmp_path / "file")


@pytest.mark.parametrize("out", ["folder", ".", "folder/.."])
def test_a_file_to_write_is_a_folder(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    message = failure(capsys, "export", "mnist", "--format", "safetensors", "--out", out)
    assert f"error: {out}: Is a directory" in message


def test_an_error_that_nobody_expected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It has its name, and the rest for who asks."""

    def describe() -> Any:
        raise KeyError("no such thing")

    monkeypatch.setattr("lenet_ext.environment.system.describe", describe)
    monkeypatch.delenv("LENET_EXT_TRACEBACK", raising=False)
    message = failure(capsys, "info")
    assert message == "lenet-ext info: error: KeyError: 'no such thing' (LENET_EXT_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("LENET_EXT_TRACEBACK", "1")
    assert main(["info"]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("Traceback (most recent call last):")
    assert stderr.endswith(message)


def test_an_output_that_is_no_stream_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, which has its own."""
    monkeypatch.setattr("sys.stdout", output := io.StringIO())
    assert main(["info"]) == 0
    assert lenet_ext.build_info()["version"] in output.getvalue()


def test_nothing_runs_where_the_module_is_imported() -> None:
    """A process that multiprocessing begins imports the main module of its parent, under another name."""
    runpy.run_module("lenet_ext.__main__", run_name="__mp_main__")


@pytest.mark.parametrize(
    ("net", "config", "message"),
    [
        (lambda: lenet_ext.Net(), {"data": "runes"}, "trained on 'runes', a data set that is not known here"),
        (
            lambda: lenet_ext.Net(num_classes=12),
            {"data": "digits", "labels": [*"0123456789AB"]},
            "its pictures or classes are not those of digits",
        ),
        (lambda: lenet_ext.Net(3), {"data": "cifar10"}, "not the weights of this network"),
    ],
    ids=["unknown", "classes", "pictures"],
)
def test_a_checkpoint_of_other_data(
    net: Any, config: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = net()
    network.config.update(config)
    network.save_pretrained(tmp_path / "other")
    data = ["--data", "digits"] if config["data"] == "cifar10" else []
    assert f"other: {message}" in failure(capsys, "eval", tmp_path / "other", *data)


def test_damaged_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"damaged")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"damaged")
    message = failure(capsys, "train", "--data", "mnist", "--root", tmp_path, "--out", tmp_path / "out")
    assert "train-images-idx3-ubyte: not an IDX file" in message


def test_unknown_data_set_of_bare_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(lenet_ext.Net().state_dict(), tmp_path / "bare.pt")
    code = main(["eval", str(tmp_path / "bare.pt")])
    assert_one_line_error(code, stderr := capsys.readouterr().err, 2)
    assert "give --data" in stderr


def test_missing_extra(tmp_path: Path) -> None:
    """As on an installation without extras: the import fails, the message says what to install."""
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    for name in ("safetensors", "matplotlib", "sklearn", "PIL"):
        (blocker / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n")
    path = os.pathsep.join([str(blocker), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = lenet("train", "--epochs", 1, cwd=tmp_path, PYTHONPATH=path)
    assert_one_line_error(done.returncode, done.stderr, 1)
    assert "pip install 'lenet_ext[train]'" in done.stderr


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_prints_a_table_of_epochs(trained: tuple[Path, str]) -> None:
    _, stdout = trained
    lines = stdout.splitlines()
    assert "1442 pictures to train, 355 to test" in lines[0]
    columns = ["epoch", "train loss", "test loss", "test accuracy", "seconds", "images/s", "rate"]
    assert re.split(r" {2,}", lines[1].strip()) == columns
    assert re.fullmatch(r" +1/2 +\d\.\d{4} +\d\.\d{4} +\d\d\.\d\d% +\d+\.\d\d +\d+ +0\.0018", lines[2])
    assert lines[3].split()[0] == "2/2"
    assert [cell.end() for cell in re.finditer(r"\S+(?: \S+)?", lines[1])] == [
        cell.end() for cell in re.finditer(r"\S+", lines[2])
    ]
    assert max(map(len, lines[1:4])) <= 80
    assert re.match(r"test accuracy \d\d\.\d\d% \(\d+ of 355\)", lines[4])
    assert len(lines) == 6
    assert "\x1b" not in stdout


def test_the_progress_bar_of_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    terminal = Console(file=drawn, force_terminal=True, width=80, highlight=False, color_system=None)
    monkeypatch.setattr(train, "make_console", lambda: terminal)
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=itertools.count(1).__next__))  # every step
    args = ["--epochs", "2", "--threads", "1", "--batch-size", "100", "--out", str(tmp_path)]
    assert main(["train", *args]) == 0
    bars = [line for line in re.split(r"[\r\n]", drawn.getvalue()) if "left" in line]
    assert len(bars) >= 2 * 15
    assert all(len(re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", bar)) <= 80 for bar in bars)
    accuracy = json.loads((tmp_path / "history.json").read_text())["epochs"][0]["test_accuracy"]
    best = f"best {100 * accuracy:.2f}%"
    assert not any("best" in bar for bar in bars if "epoch 1/2" in bar)
    # The learning rate, the best accuracy so far, images in a second and the time left.
    whole = rf"epoch 2/2, rate 0\.00\d+, {re.escape(best)} ━.* \d+ images/s, left \d:\d\d:\d\d"
    assert any(re.search(whole, bar) for bar in bars), bars[-1]


def test_train_writes_its_files(trained: tuple[Path, str]) -> None:
    out, _ = trained
    assert sorted(path.name for path in out.iterdir()) == sorted(WRITTEN)  # and no temporary ones
    for name in PICTURES:
        with Image.open(out / name) as image:
            image.load()
            assert image.format == "PNG"


def test_history(trained: tuple[Path, str]) -> None:
    history = json.loads((trained[0] / "history.json").read_text())
    assert history["config"]["data"] == "digits"
    assert history["config"]["model"] == "fused"
    assert history["config"]["seed"] == 0
    assert [line["epoch"] for line in history["epochs"]] == [1, 2]
    for line in history["epochs"]:
        assert {"train_loss", "test_loss", "test_accuracy", "seconds", "images_per_second", "lr"} <= line.keys()
        assert all(isinstance(value, (int, float)) for value in line.values())
        assert line["images_per_second"] == pytest.approx(1442 / line["seconds"])
    assert history["epochs"][1]["train_loss"] < history["epochs"][0]["train_loss"]


def test_weights_load_into_both_nets(trained: tuple[Path, str]) -> None:
    state = load_file(trained[0] / "model.safetensors")
    assert len(state) == 10
    pictures = torch.randn(3, 1, 32, 32)
    outputs = []
    for model in (lenet_ext.Net(), lenet_ext.ReferenceNet()):
        model.load_state_dict(state, strict=True)
        outputs.append(model(pictures))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_checkpoint_is_safe_and_complete(trained: tuple[Path, str]) -> None:
    content = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    assert {"model", "optimizer", "scheduler", "epoch", "rng", "config"} <= content.keys()
    assert content["epoch"] == 2


@pytest.mark.extended
def test_resume_is_exact(trained: tuple[Path, str], tmp_path: Path) -> None:
    common = ("--device", "cpu", "--threads", 1)
    # One half in this process, the other half in another one.
    assert main(["train", "--epochs", "1", *map(str, common), "--out", str(tmp_path / "half")]) == 0
    second = lenet("train", "--epochs", 2, *common, "--resume", tmp_path / "half" / "checkpoint.pt", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "resumed" in second.stdout
    assert " 1/2 " not in second.stdout
    assert " 2/2 " in second.stdout
    whole, resumed = load_file(trained[0] / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = [json.loads((d / "history.json").read_text())["epochs"] for d in (trained[0], tmp_path / "half")]
    for one, other in zip(*lines, strict=True):
        assert one["train_loss"] == other["train_loss"]
        assert one["test_loss"] == other["test_loss"]


def test_resume_and_its_contradictions(
    trained: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "run"
    shutil.copytree(trained[0], source)
    saved = str(source / "checkpoint.pt")
    for args, named in (
        (["--lr", "0.5"], "--lr 0.5 contradicts the checkpoint"),
        (["--model", "reference"], "--model reference contradicts"),
        (["--seed", "1"], "--seed 1 contradicts"),
        (["--augment"], "--augment contradicts the checkpoint, which was trained without it"),
        (["--epochs", "1"], "is at epoch 2 already"),
    ):
        assert_one_line_error(main(["train", "--resume", saved, *args]), stderr := capsys.readouterr().err, 2)
        assert named in stderr
    before = load_file(source / "model.safetensors")
    # The same values, and nothing left to do: evaluates, and leaves the weights as they are.
    for args in (["--seed", "0", "--data", "digits"], ["--epochs", "0"]):
        assert main(["train", "--resume", saved, *args]) == 0
        assert "after 2 epochs" in capsys.readouterr().out
    after = load_file(source / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.load(saved, weights_only=True)["config"]["epochs"] == 2


def test_augmentation_is_part_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--threads", "1", "--batch-size", "400", "--epochs", "1", "--out", str(tmp_path)]
    assert main(["train", *args, "--augment"]) == 0
    assert ", augmented\n" in capsys.readouterr().out
    # Resumed, it need not be said again.
    saved = str(tmp_path / "checkpoint.pt")
    for option in ([], ["--augment"]):
        assert main(["train", "--resume", saved, "--epochs", "2", *option]) == 0
        assert ", augmented\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "history.json").read_text())["config"]["augment"] is True
    assert torch.load(saved, weights_only=True)["config"]["augment"] is True


def test_one_cycle_is_as_long_as_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "--threads", "1", "--batch-size", "400", "--out", str(tmp_path)]
    assert main([*args, "--schedule", "one-cycle", "--optimizer", "sgd", "--lr", "0.1", "--epochs", "2"]) == 0
    assert "  0.001\n" in capsys.readouterr().out
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["epochs"][0]["lr"] > history["epochs"][1]["lr"] == pytest.approx(0.1 / 100)
    saved = str(tmp_path / "checkpoint.pt")
    for option, value in (("--epochs", "3"), ("--schedule", "exponential")):
        code = main(["train", "--resume", saved, option, value])
        assert_one_line_error(code, stderr := capsys.readouterr().err, 2)
        assert f"{option} {value} contradicts the checkpoint" in stderr
    assert main(["train", "--resume", saved, "--epochs", "0"]) == 0


def test_resume_from_weights_says_so(
    trained: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(trained[0] / "model.safetensors")
    assert main(["train", "--resume", weights, "--model", "reference", "--epochs", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "weights only" in out
    history = json.loads((tmp_path / "history.json").read_text())
    assert len(history["epochs"]) == 1
    trained_history = json.loads((trained[0] / "history.json").read_text())
    assert history["epochs"][0]["train_loss"] < trained_history["epochs"][0]["train_loss"]


def test_no_epoch_only_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--epochs", "0", "--out", str(tmp_path)]) == 0
    assert re.search(r"test accuracy \d+\.\d\d%", capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(WRITTEN)
    assert json.loads((tmp_path / "history.json").read_text())["epochs"] == []
    torch.manual_seed(0)
    initial = lenet_ext.ReferenceNet().state_dict()
    assert all(torch.equal(value, initial[name]) for name, value in load_file(tmp_path / "model.safetensors").items())


def test_without_out_a_run_is_named_by_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--epochs", "0", "--model", "reference", "--device", "cpu", "--threads", "1"]) == 0
    assert str(Path("runs/digits-reference")) in capsys.readouterr().out
    assert (tmp_path / "runs" / "digits-reference" / "model.safetensors").is_file()


def test_a_network_without_mistakes_says_so() -> None:
    assert train._which([], 0, 360).startswith("none of 360 misclassified")


def test_weights_that_do_not_say_how_they_were_normalized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(lenet_ext.Net().state_dict(), tmp_path / "bare.pt")
    args = ["export", tmp_path / "bare.pt", "--format", "safetensors", "--out", tmp_path / "out.safetensors"]
    assert main([*map(str, args)]) == 0
    assert "normalized as in training" in capsys.readouterr().out


def test_target_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "--epochs", "3", "--threads", "1", "--batch-size", "200", "--out", str(tmp_path / "run")]
    assert main([*args, "--target", "5"]) == 0  # guessing has ten
    out = capsys.readouterr().out
    assert "the target of 5% was reached in epoch 1\n" in out
    assert "after 1 epoch and" in out
    # Resumed, it has nothing to do.
    saved = str(tmp_path / "run" / "checkpoint.pt")
    assert main(["train", "--resume", saved, "--target", "5"]) == 0
    assert " 2/3 " not in capsys.readouterr().out
    assert main(["train", "--resume", saved, "--target", "100"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^the target of 100% was not reached; the best was \d+\.\d\d%, in epoch [123]$", out, re.MULTILINE
    )
    assert "after 3 epochs" in out


class RecordedEvents:
    """In the place of tensorboard's writer."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.begin, self.scalars, self.closed = (folder, purge_step), [], False
        everything.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


everything: list[RecordedEvents] = []


@pytest.mark.parametrize("tensorboard", [True, False])
def test_log(
    tensorboard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.SimpleNamespace(SummaryWriter=RecordedEvents) if tensorboard else None
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    everything.clear()
    args = ["train", "--threads", "1", "--batch-size", "400", "--out", str(tmp_path / "run")]
    assert main([*args, "--epochs", "1", "--log", str(tmp_path / "first")]) == 0
    saved = str(tmp_path / "run" / "checkpoint.pt")
    assert main(["train", "--resume", saved, "--epochs", "2", "--log", str(tmp_path / "log")]) == 0
    events = " and events for TensorBoard" if tensorboard else ""
    assert capsys.readouterr().out.endswith(f"wrote metrics.csv{events} to {tmp_path / 'log'}\n")
    # The whole history, the epoch before the resumption included.
    history = json.loads((tmp_path / "run" / "history.json").read_text())["epochs"]
    with open(tmp_path / "log" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == history
    if tensorboard:
        log = everything[-1]
        assert log.closed
        assert log.begin == (str(tmp_path / "log"), 1)
        assert [value for tag, value, step in log.scalars if tag == "loss/test"] == [e["test_loss"] for e in history]
        assert [step for tag, value, step in log.scalars if tag == "rate"] == [1, 2]


def test_a_log_tells_each_epoch_once_and_what_is_known_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(SummaryWriter=RecordedEvents)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = MetricsLog(tmp_path)
    history = [{"epoch": 1, "test_loss": 0.5}]  # of a version that knew no more
    log.write(history)
    log.write([*history, {"epoch": 2, "test_loss": 0.25, "lr": 0.1}])
    assert everything[-1].scalars == [("loss/test", 0.5, 1), ("loss/test", 0.25, 2), ("rate", 0.1, 2)]


def test_log_as_tensorboard_reads_it(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = ["train", "--threads", "1", "--batch-size", "400", "--out", str(tmp_path / "run")]
    log = str(tmp_path / "log")
    assert main([*args, "--epochs", "2", "--log", log]) == 0
    saved = str(tmp_path / "run" / "checkpoint.pt")
    assert main(["train", "--resume", saved, "--epochs", "3", "--log", log]) == 0
    events = reading.EventAccumulator(log)
    events.Reload()
    history = json.loads((tmp_path / "run" / "history.json").read_text())["epochs"]
    found = events.Scalars("accuracy/test")
    assert [event.step for event in found] == [1, 2, 3]
    assert [event.value for event in found] == pytest.approx([line["test_accuracy"] for line in history])


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupt_leaves_a_checkpoint_and_one_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lenet_ext", "train", "--epochs", "100000", "--threads", "1", "--out", "run"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "1/100000 " in line:
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stderr.strip() == "lenet-ext train: interrupted; continue with --resume run/checkpoint.pt"
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] >= 1


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m lenet_ext info | head -1"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("| lenet_ext")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def broken_output(kind: str) -> io.TextIOWrapper:
    """A standard output that nobody reads any more, or one on a full device."""
    if kind == "full":
        return open("/dev/full", "w")
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


needs_full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


@pytest.mark.parametrize("kind", ["no reader", pytest.param("full", marks=needs_full_device)])
@pytest.mark.parametrize("args", [["info"], ["--help"], ["train", "--help"], ["--version"]], ids=" ".join)
def test_output_that_cannot_be_written(
    args: list[str], kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = broken_output(kind)
    monkeypatch.setattr(sys, "stdout", output)
    assert main(args) == 1
    stderr = capsys.readouterr().err
    if kind == "full":
        assert_one_line_error(1, stderr, 1)
        assert "No space left on device" in stderr
    else:
        assert stderr == ""
    output.close()  # as when Python ends: nothing is left that could not be written


@needs_full_device
def test_output_that_cannot_be_written_by_a_process(tmp_path: Path) -> None:
    """Python flushes at its end, and complains once more with an exit code of its own."""
    command = f"'{sys.executable}' -m lenet_ext --help >/dev/full"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, check=False
    )
    assert_one_line_error(done.returncode, done.stderr, 1)


def test_streams_that_are_closed(tmp_path: Path) -> None:
    """`>&-` and `2>&-`: what would be printed there goes nowhere, and not to the other stream."""
    start = f"'{sys.executable}' -m lenet_ext"
    command = f"{start} info >&- <&-; echo $?; {start} eval absent 2>&-; echo $?"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("0\n1\n", "")


@pytest.mark.extended
@pytest.mark.skipif(not SHARED_MNIST.is_dir(), reason=f"no MNIST in {SHARED_MNIST}")
def test_mnist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--data", "mnist", "--root", str(SHARED_MNIST), "--threads", "1"]
    assert main(["train", *args, "--out", str(tmp_path)]) == 0
    assert "60000 pictures to train, 10000 to test" in capsys.readouterr().out
    history = json.loads((tmp_path / "history.json").read_text())
    assert [line["epoch"] for line in history["epochs"]] == [1, 2]
    # 99.06 to 99.33% for seeds 0 to 9.
    assert history["epochs"][1]["test_accuracy"] > 0.988


# --- eval -------------------------------------------------------------------------------------------------------------


def test_eval_agrees_with_the_history(trained: tuple[Path, str], tmp_path: Path) -> None:
    last = json.loads((trained[0] / "history.json").read_text())["epochs"][-1]
    done = lenet("eval", trained[0] / "model.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"accuracy  {100 * last['test_accuracy']:.2f}%" in done.stdout
    assert f"loss      {last['test_loss']:.4f}" in done.stdout
    assert all(re.search(rf"^\W*{digit} \W* 3\d ", done.stdout, re.MULTILINE) for digit in range(10)), done.stdout


def test_eval_reads_both_kinds_with_both_models(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for name in ("model.safetensors", "checkpoint.pt"):
        for model in ("fused", "reference"):
            assert main(["eval", str(trained[0] / name), "--model", model]) == 0
            outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1


# --- predict ----------------------------------------------------------------------------------------------------------


def test_predict(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path_factory.mktemp("predict")
    assert main(["train", "--epochs", "8", "--threads", "1", "--out", str(out)]) == 0
    _, test = datasets.load("digits")
    expected: dict[str, int] = {}
    for index in range(30):
        digit = Image.fromarray(test.images[index, 0].numpy(), "L")
        large = digit.resize((180, 180), Image.Resampling.BICUBIC)
        inverted = large.point([255 - level for level in range(256)])
        name = f"{index} picture"
        match index % 6:
            case 0:
                digit.save(tmp_path / (name := f"{name}.png"))
            case 1:
                inverted.convert("RGB").save(tmp_path / (name := f"{name}.jpg"), quality=90)
            case 2:
                inverted.convert("RGBA").save(tmp_path / (name := f"{name}.png"))
            case 3:
                ink = Image.new("RGBA", large.size, (10, 20, 80, 0))
                ink.putalpha(large)
                ink.save(tmp_path / (name := f"{name}.png"))
            case 4:
                large.convert("P").save(tmp_path / (name := f"{name}.png"))
            case 5:
                digit.convert("LA").save(tmp_path / (name := f"{name}.png"))
        expected[name] = int(test.labels[index])
    (tmp_path / "bad.png").write_text("no picture")
    names = list(expected)
    capsys.readouterr()
    done = lenet("predict", out / "model.safetensors", *names[:3], "bad.png", "absent.png", *names[3:], cwd=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if ": unsure: " not in line]
    assert len(errors) == 2
    assert "bad.png: not a picture" in errors[0]
    assert "absent.png: No such file" in errors[1]
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [path for path, _, _ in lines] == names
    right = sum(int(digit) == expected[path] for path, digit, _ in lines)
    assert right >= 27, done.stdout
    assert all(0.1 < float(probability) <= 1 for _, _, probability in lines)
    assert main(["predict", str(out / "checkpoint.pt"), str(tmp_path / names[0])]) == 0
    path, digit, probability = lines[0]
    assert capsys.readouterr().out == f"{tmp_path / path}\t{digit}\t{probability}\n"


# --- info, check, bench -----------------------------------------------------------------------------------------------


def test_info_is_a_markdown_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = lenet_ext.build_info()
    assert main(["info"]) == 0
    done = lenet("info", cwd=tmp_path, COLUMNS="40")
    assert done.returncode == 0, done.stderr
    for output in (done.stdout, capsys.readouterr().out):
        lines = output.splitlines()
        assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
        assert len({line.count("|") for line in lines}) == 1
        for value in (info["version"], info["torch"], info["compiler"], info["cpu_capability"], torch.__version__):
            assert f" {value} " in output


def test_check_passes(tmp_path: Path) -> None:
    # Both forced, so that it does not begin processes for the others: the operators' tests force each of them.
    capability = lenet_ext.build_info()["cpu_capability"]
    done = lenet("check", cwd=tmp_path, LENET_EXT_CPU_CAPABILITY=capability, LENET_EXT_ALGORITHM="direct")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"all \d{3} checks passed", done.stdout)
    assert "FAILED" not in done.stdout


def test_check_finds_wrong_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = lenet_ext.functional.linear_relu
    monkeypatch.setattr(lenet_ext.functional, "linear_relu", lambda *tensors: right(*tensors) + 1)
    monkeypatch.setattr("lenet_ext.selftest._other_variants", lambda on_group: [])
    assert main(["check", "--threads", "1"]) == 1
    captured = capsys.readouterr()
    assert "failed: linear and linear_relu, exact: linear_relu LeNet fc1, float64: output" in captured.out
    assert_one_line_error(1, captured.err, 1)


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 12; echo a warning of torch >&2", (12, ())),
        ("echo linear: differs; echo a warning of torch >&2; exit 1", (1, ("linear: differs",))),
        ("echo Segmentation fault >&2; exit 139", (1, ("Segmentation fault",))),
        ("exit 3", (1, ("exit code 3",))),
    ],
)
def test_check_reads_its_processes_answers_and_not_their_warnings(
    script: str, found: tuple[int, tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no NumPy torch warns of it."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    assert variants.run_setting({}) == found


def test_bench(tmp_path: Path) -> None:
    providers = ("fused", "eager", "channels_last")
    args = ["--quick", "--cases", "fc3,net", "--batch-sizes", "1", "--providers", ",".join(providers)]
    done = lenet("bench", *args, "--threads", 1, "--json", "b.json", "--plot", "b.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "speedup" in done.stdout
    assert "net" in done.stdout
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["threads"] == 1
    assert content["torch"] == torch.__version__
    assert content["cpu_capability"] == lenet_ext.build_info()["cpu_capability"]
    assert content["machine"]["cpu"]
    workloads = 2 * 2 + 1 + 3  # a whole step is measured of networks alone; "net" also begins "net3"
    assert len(content["rows"]) == workloads * 3
    assert {row["provider"] for row in content["rows"]} == set(providers)
    for row in content["rows"]:
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["median_us"] * 1e6)
    assert len(content["comparisons"]) == workloads
    with Image.open(tmp_path / "b.png") as image:
        assert image.format == "PNG"
