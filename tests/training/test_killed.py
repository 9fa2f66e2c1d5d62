"""Runs that are killed: the last good checkpoint stays, and what goes on from it ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")

from lenet_ext.cli import main
from lenet_ext.pretrained.files import load_weights
from lenet_ext.training.checkpoint import load_checkpoint, save_checkpoint
from lenet_ext.training.config import TrainConfig
from lenet_ext.training.images import LabelledImages, Normalization
from lenet_ext.training.trainer import Trainer

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


# How long it took, and what a file says of itself.
NO_STATE = ("seconds", "images_per_second", "format")


def bits(state: Any) -> Any:
    """Nested states as plain values that are equal where the states are bitwise the same."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), tuple(state.shape), hashlib.sha256(state.numpy().tobytes()).hexdigest()
    if isinstance(state, dict):
        return {name: bits(value) for name, value in state.items() if name not in NO_STATE}
    return [bits(value) for value in state] if isinstance(state, (list, tuple)) else state


def start(body: Callable[[], object]) -> int:
    """Forks; the child does something and exits, with 1 if it raised."""
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(200)  # should whoever waits for it be gone
        body()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def exit_code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def new_trainer() -> Trainer:
    """Training that takes a few milliseconds an epoch, with all that a checkpoint can hold."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 1, 32, 32), dtype=torch.uint8, generator=generator)
    data = LabelledImages(images, torch.arange(24) % 10, Normalization(0.1, 0.3))
    return Trainer(TrainConfig.for_data("digits", device="cpu", threads=1, batch_size=8), data, data)


def killed_at(instant: int, body: Callable[[], object]) -> None:
    """Kills this process at the begin or the end of one of the calls by which `body` touches files."""
    left = instant

    def count(frame: object, event: str, called: Any) -> None:
        nonlocal left
        file = isinstance(getattr(called, "__self__", None), (io.FileIO, io.BufferedWriter, io.BufferedReader))
        if event not in ("c_call", "c_return") or not (file or called.__module__ in ("posix", "_io", "io")):
            return
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.setprofile(count)
    body()
    sys.setprofile(None)


def test_a_save_that_is_killed_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    trainer, path = new_trainer(), tmp_path / "checkpoint.pt"
    save_checkpoint(path, trainer.state_dict())
    before = path.read_bytes()
    old = bits(load_checkpoint(path))
    trainer.run_epoch()
    state = trainer.state_dict()
    new = bits(state)
    assert old["epoch"] == 0
    assert new["epoch"] == 1
    found: list[bool] = []
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        path.write_bytes(before)
        code = exit_code_of(start(lambda: killed_at(len(found), lambda: save_checkpoint(path, state))))
        left = bits(load_checkpoint(path))
        assert left in (old, new)
        found.append(left == new)
        for temporary in tmp_path.glob(".*.tmp"):  # the next one would look at them: more calls in each round
            temporary.unlink()
    assert code == 0
    # A file is opened, written, synchronized, closed and renamed: the old one up to there, the new one from there on.
    assert found == sorted(found)
    assert found.count(False) >= 8
    assert found.count(True) >= 2


class Uninterrupted:
    """The run that nobody kills: its state after each epoch."""

    def __init__(self) -> None:
        self.trainer = new_trainer()
        self.states = [bits(self.trainer.state_dict())]

    def after(self, epoch: int) -> Any:
        while len(self.states) <= epoch:
            self.trainer.run_epoch()
            self.states.append(bits(self.trainer.state_dict()))
        return self.states[epoch]


def resume_and_train(folder: Path, tell: int) -> None:
    """Goes on for ever, and says when a save begins."""
    trainer = new_trainer()
    state = load_checkpoint(folder / "checkpoint.pt")
    assert state is not None
    trainer.load_state_dict(state)
    while True:
        trainer.run_epoch()
        os.write(tell, b"s")
        trainer.save(folder)


@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.extended)])
def test_a_run_that_is_killed_again_and_again_passes_through_the_states_of_one_that_is_not(
    tmp_path: Path, times: int
) -> None:
    expected, chance = Uninterrupted(), random.Random(0)
    trainer = new_trainer()
    started = time.perf_counter()
    for _ in range(3):
        trainer.save(tmp_path)
    duration = (time.perf_counter() - started) / 3
    epochs = [0]
    for _ in range(times):
        read, write = os.pipe()
        child = start(lambda write=write: resume_and_train(tmp_path, write))
        os.close(write)
        assert os.read(read, 1) == b"s", exit_code_of(child)
        time.sleep(chance.uniform(0, 1.5 * duration))
        os.kill(child, signal.SIGKILL)
        assert exit_code_of(child) == -signal.SIGKILL
        os.close(read)
        state = load_checkpoint(tmp_path / "checkpoint.pt")
        assert state is not None
        epochs.append(state["epoch"])
        assert bits(state) == expected.after(state["epoch"])
        # What a save leaves that was killed is hidden, and in nobody's way until a later one removes it.
        for left in tmp_path.glob(".*.tmp"):
            left.unlink()
    assert epochs == sorted(epochs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "history.json", "model.safetensors"]


@pytest.mark.extended
def test_the_command_resumes_what_was_killed_to_the_same_files(tmp_path: Path) -> None:
    """Also by SIGTERM, as those send it who are about to kill: it ends the process where it is."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    arguments = ["train", "--epochs", "8", "--threads", "1", "--batch-size", "100", "--device", "cpu", "--out"]
    started = time.perf_counter()
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    epoch = (time.perf_counter() - started) / 8
    folder, saved = tmp_path / "killed", tmp_path / "killed" / "checkpoint.pt"
    chance, signals = random.Random(0), [signal.SIGKILL, signal.SIGTERM] * 4
    codes = []
    while 0 not in codes:
        resume = ["--resume", str(saved)] if saved.exists() else []
        before = saved.stat().st_mtime_ns if resume else None
        child = start(lambda resume=resume: os._exit(main([*arguments, str(folder), *resume])))
        deadline = time.monotonic() + 60
        while (saved.stat().st_mtime_ns if saved.exists() else None) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, epoch))
        if len(codes) < len(signals):
            os.kill(child, signals[len(codes)])
        codes.append(exit_code_of(child))
    assert len(codes) > 1
    assert codes[:-1] == [-number for number in signals[: len(codes) - 1]]
    weights = [vars(load_weights(of / "model.safetensors")) for of in (tmp_path / "whole", folder)]
    assert bits(weights[0]) == bits(weights[1])
    states = [load_checkpoint(of / "checkpoint.pt") for of in (tmp_path / "whole", folder)]
    assert bits(states[0]) == bits(states[1])
    histories = [json.loads((of / "history.json").read_text()) for of in (tmp_path / "whole", folder)]
    assert bits(histories[0]["epochs"]) == bits(histories[1]["epochs"])
