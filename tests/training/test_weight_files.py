"""Files of weights as others write them, damaged ones, dangerous ones, and a disk that is full."""

from __future__ import annotations

import collections
import errno
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image
from safetensors.torch import save, save_file

import lenet_ext
from lenet_ext.cli import main
from lenet_ext.environment import files
from lenet_ext.pretrained.files import load_into, load_weights

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return dict(lenet_ext.ReferenceNet().state_dict())


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- as wrappers and other programs write them ------------------------------------------------------------------------

WRAPPERS: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "compiled layers": lambda name: name.replace(".", "._orig_mod."),
    "attribute": lambda name: f"model.{name}",
    "nested names": lambda name: f"state_dict.module.{name}",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_names_of_wrapped_networks(tmp_path: Path, state: State, wrapper: str, kind: str) -> None:
    wrapped = {WRAPPERS[wrapper](name): value for name, value in state.items()}
    path = tmp_path / f"w.{kind}"
    (torch.save if kind == "pt" else save_file)(wrapped, path)
    assert_same(load_weights(path).state, state)


def test_what_the_wrappers_really_write(tmp_path: Path) -> None:
    net = lenet_ext.Net()
    average = torch.optim.swa_utils.AveragedModel(net)
    compiled = torch.compile(lenet_ext.Net())
    compiled.load_state_dict({f"_orig_mod.{name}": value for name, value in net.state_dict().items()})
    for wrapped in (nn.DataParallel(net), compiled, average, nn.ModuleDict({"model": net})):
        torch.save(wrapped.state_dict(), tmp_path / "w.pt")
        assert_same(load_weights(tmp_path / "w.pt").state, dict(net.state_dict()))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_beside_other_things(tmp_path: Path, state: State, key: str, prefix: str) -> None:
    nested = collections.OrderedDict((prefix + name, value) for name, value in state.items())
    torch.save({"epoch": 3, key: nested, "optimizer": {"state": {}}}, tmp_path / "w.pt")
    weights = load_weights(tmp_path / "w.pt")
    assert_same(weights.state, state)
    assert weights.metadata == {}


def test_the_old_form_of_torch_save(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(load_weights(tmp_path / "old.pt").state, state)


def test_a_name_that_only_some_have_is_not_a_wrapper(tmp_path: Path) -> None:
    others = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    torch.save(others, tmp_path / "w.pt")
    assert load_weights(tmp_path / "w.pt").state.keys() == others.keys()


def test_weights_that_do_not_fit_are_one_short_line(state: State) -> None:
    net = lenet_ext.Net(num_classes=26)
    with pytest.raises(ValueError, match=r"^f: .*: fc3.weight has the shape \(10, 84\), expected \(26, 84\); fc3.bias"):
        load_into(net, state, "f")
    others = {f"layer{n}.weight": torch.ones(1) for n in range(300)}
    with pytest.raises(ValueError, match=r"no conv1.weight and 9 more; the network has no layer0.weight and 299 more$"):
        load_into(net, others, "f")


# --- damaged and dangerous --------------------------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.rstrip("\n").isprintable(), stderr
    return stderr


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = Image.new("L", (40, 40), 255)
    image.paste(0, (10, 10, 14, 30))
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


class Dangerous:
    """What would be called if the pickle were run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of the file was executed",))


# The name of what it asks for has an instruction to the terminal in it.
ESCAPES = b"\x80\x02cposix\x1b[31m\nsystem\nX\x02\x00\x00\x00ls\x85R."


@pytest.mark.parametrize("what", ["called", "a network", "torchscript", "escapes", "cut off", "old form"])
def test_a_pickle_that_is_not_safe_is_one_line_of_ours(
    tmp_path: Path, picture: Path, what: str, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "file.pt"
    if what == "torchscript":
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    elif what == "a network":
        torch.save(nn.Linear(2, 2), path)
    else:
        torch.save({"model": Dangerous()}, path, _use_new_zipfile_serialization=what != "old form")
    if what == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    if what == "escapes":
        path.write_bytes(replace_member(path, "data.pkl", ESCAPES))
    recwarn.clear()
    for command in (("predict", path, picture, "--data", "digits"), ("eval", path), ("train", "--resume", path)):
        stderr = one_line(capsys, *command)
        assert f"{path}: not a checkpoint" in stderr
        for advice in ("weights_only", "torch.load", "allow", "trust"):
            assert advice not in stderr
        if what in ("called", "old form"):
            assert "_pytest.outcomes." in stderr
    assert not recwarn.list


def replace_member(path: Path, name: str, content: bytes) -> bytes:
    """A zip archive with another content of one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.namelist():
            new.writestr(member, content if member.endswith(f"/{name}") else old.read(member))
    return buffer.getvalue()


@pytest.mark.parametrize("damage", ["header length", "header", "cut off", "empty", "metadata"])
def test_a_damaged_safetensors_file_is_named(
    tmp_path: Path, picture: Path, state: State, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = save(state, {"lenet_ext": "{" if damage == "metadata" else "{}"})
    content = {
        "header length": b"\xff" * 7 + b"\x7f" + content[8:],
        "header": content[:20] + b"????" + content[24:],
        "cut off": content[:-10],
        "empty": b"",
        "metadata": content,
    }[damage]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    for command in (("predict", path, picture), ("eval", path), ("train", "--resume", path)):
        assert f"{path}: not a checkpoint" in one_line(capsys, *command)


@pytest.fixture(scope="module")
def run_state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a checkpoint of a run of no epochs holds."""
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("run")
    assert main(["train", "--epochs", "0", "--threads", "1", "--out", str(out)]) == 0
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(
    "change",
    [
        *({name: "text"} for name in ("epoch", "config", "history", "optimizer", "model", "rng", "scheduler")),
        *({"rng": {}}, {"optimizer": {"state": {}}}, {"model": {"a": torch.ones(1)}}, {"rng": {"data": 1, "torch": 2}}),
        {"optimizer": {"state": {}, "param_groups": [1]}},
        {"config": {"data": "digits"}},
    ],
    ids=str,
)
def test_a_checkpoint_of_something_else_is_named(
    tmp_path: Path, run_state: dict[str, Any], change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({**run_state, **change}, path)
    stderr = one_line(capsys, "train", "--epochs", 1, "--resume", path)
    assert stderr.startswith(f"lenet-ext train: error: {path}: ")
    assert next(iter(change)) in stderr


@pytest.mark.parametrize("metadata", ["[1]", '{"config": 3}', '{"config": {"data": ["digits"]}}', "null"])
def test_metadata_of_others(tmp_path: Path, state: State, metadata: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(save(state, {"lenet_ext": metadata}))
    assert load_weights(tmp_path / "w.safetensors").data is None


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False, timeout=20)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("only root can mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=20)


def test_a_full_disk_while_training(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    stderr = one_line(capsys, "train", "--epochs", 1, "--threads", 1, "--batch-size", 500, "--out", small_disk / "run")
    assert stderr.endswith(f"error: {small_disk}/run/checkpoint.pt: No space left on device\n")
    assert list((small_disk / "run").iterdir()) == []


PICTURES = ("curves.png", "confusion.png", "misclassified.png", "filters.png")
WRITTEN = ("checkpoint.pt", "model.safetensors", "history.json", *PICTURES)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_file_names_itself_when_the_disk_is_full(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    write = os.fsync
    written: list[str] = []

    def full(descriptor: int) -> None:
        written.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if f"/.{name}." in written[-1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("there is no /proc here")
    monkeypatch.setattr(os, "fsync", full)
    stderr = one_line(capsys, "train", "--epochs", 0, "--threads", 1, "--out", tmp_path)
    assert stderr.endswith(f"error: {tmp_path}/{name}: No space left on device\n")
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_save_left_goes_with_a_later_one(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = [tmp_path / f".a[1].pt.{process}.tmp" for process in (ended.pid, os.getppid())]
    others = [tmp_path / f".{name}.{ended.pid}.tmp" for name in ("a1.pt", "b.a[1].pt", "a[1].pt.x")]
    others += [tmp_path / f".a[1].pt.{name}" for name in ("tmp", "x.tmp", "9999999999999999.tmp", f"{ended.pid}.tmp2")]

    def save() -> set[Path]:
        with files.atomic_path(tmp_path / "a[1].pt") as temporary:
            temporary.write_text("whole")
        return {*tmp_path.iterdir()}

    for path in (*left, *others):
        path.touch()
    whole = {tmp_path / "a[1].pt", *left, *others}
    assert save() == whole  # just written: perhaps by a machine whose processes have other numbers
    for path in (*left, *others):
        os.utime(path, (0, 0))
    assert save() == whole - {left[0]}


def test_what_another_user_writes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(process: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (left := tmp_path / ".file.1.tmp").touch()
    os.utime(left, (0, 0))
    monkeypatch.setattr("os.kill", kill)
    with files.atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert left.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "not a checkpoint (it holds a list)"),
        ({"epoch": 1}, "neither a checkpoint of lenet-ext nor a state dict"),
        ({"model": {}}, "neither a checkpoint of lenet-ext nor a state dict"),
    ],
    ids=str,
)
def test_a_file_of_torch_save_without_weights(
    tmp_path: Path, content: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, path := tmp_path / "other.pt")
    assert one_line(capsys, "eval", path, "--data", "digits") == f"lenet-ext eval: error: {path}: {reason}\n"


def test_a_disk_that_fails_meanwhile_is_not_a_damaged_file(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(state, path := tmp_path / "weights.pt")

    def load(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("torch.load", load)
    line = one_line(capsys, "eval", path, "--data", "digits")
    assert line == f"lenet-ext eval: error: {path}: Input/output error\n"


def test_an_error_without_a_name_gets_one(tmp_path: Path) -> None:
    with pytest.raises(PermissionError) as caught, files.atomic_path(tmp_path / "file") as temporary:
        raise PermissionError(errno.EACCES, "Permission denied", str(temporary))
    assert caught.value.filename == str(tmp_path / "file")
    # What is about another file says so.
    with pytest.raises(FileNotFoundError) as missing, files.atomic_path(tmp_path / "file"):
        (tmp_path / "other").read_bytes()
    assert missing.value.filename == str(tmp_path / "other")
