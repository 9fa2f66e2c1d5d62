"""Peak memory and the busy neighbour: what `lenet-ext bench` measures besides times."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pytest
import torch

from lenet_ext.bench import memory, neighbour
from lenet_ext.bench.timing import Effort


def python_that(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of this Python, for the processes that are begun."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(path))


def test_memory_of_each_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python_that(f'echo "$@" >> {tmp_path}/calls; echo \'{{"bytes": 12}}\'', tmp_path, monkeypatch)
    rows = memory.measure_memory(threads=3, batch=7, repeats=2)
    assert [(row["provider"], row["batch"], row["threads"]) for row in rows] == [
        (name, 7, 3) for name in ("fused", "eager", "channels_last")
    ]
    assert all(row["bytes"] == [12, 12] and row["median_bytes"] == 12 for row in rows)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 6
    assert calls[1] == "-m lenet_ext.bench.memory eager --batch 7 --threads 3"


@pytest.mark.parametrize(
    ("script", "reason"), [("echo first >&2; echo no memory >&2; exit 1", "no memory"), ("exit 9", "exit code 9")]
)
def test_a_measurement_that_fails_says_why(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_that(script, tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match=f"the process that measures the memory of fused failed: {reason}"):
        memory.measure_memory(threads=1)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_process_prints_what_its_step_has_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["memory", "eager", "--batch", "64", "--threads", "1"])
    runpy.run_module("lenet_ext.bench.memory", run_name="__main__")
    taken = json.loads(capsys.readouterr().out)["bytes"]
    assert 0 <= taken < 2**30


def test_without_proc_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Path, *_: object) -> str:
        raise FileNotFoundError(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", absent)
        patch.setattr(Path, "write_text", absent)
        memory._reset_high_water()
        found = memory._high_water_bytes()
    assert 2**20 < found < 2**40


@pytest.mark.parametrize(
    ("platform", "cores", "threads", "reason"),
    [
        ("darwin", 8, 8, "on Linux only"),
        ("linux", 1, 2, "found 1 and 2"),
        ("linux", 2, 1, "found 2 and 1"),
        ("linux", 2, 2, None),
    ],
)
def test_where_a_neighbour_can_be_measured(
    platform: str, cores: int, threads: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(neighbour, "cpu_count", lambda: cores)
    found = neighbour.neighbour_unavailable(threads)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are pinned to cores on Linux only")
def test_beside_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbour, "_BATCHES", (2,))
    monkeypatch.setattr(neighbour, "MODES", ("step",))
    before = torch.get_num_threads()
    rows = neighbour.measure_neighbour(2, Effort(sample_s=0.001, rounds=1, min_rounds=1))
    assert torch.get_num_threads() == before
    assert [row["provider"] for row in rows] == ["fused", "eager", "channels_last"]
    for row in rows:
        assert 0 < row["speedup_p20"] <= row["speedup"] <= row["speedup_p80"]
        for name in ("one_alone", "all_alone", "all_disturbed"):
            low, median, high = row[f"{name}_us"]
            assert 0 < low <= median <= high
