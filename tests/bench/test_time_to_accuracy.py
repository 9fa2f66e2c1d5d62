"""benchmarks/time_to_accuracy.py on a few pictures, and its table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import summary  # noqa: E402
import tables  # noqa: E402
import time_to_accuracy  # noqa: E402

from lenet_ext.bench import shown  # noqa: E402
from lenet_ext.bench.results import read_results, section_to_dict  # noqa: E402
from lenet_ext.training.images import LabelledImages, Normalization  # noqa: E402

ARGUMENTS = argparse.Namespace(threads=1, device="cpu", epochs=2, accuracy=0.99)


def some_pictures() -> tuple[LabelledImages, LabelledImages]:
    """A bright half for one of two digits: nothing to learn for long."""
    labels = torch.arange(128) % 2
    images = torch.zeros(128, 1, 32, 32, dtype=torch.uint8)
    images[labels == 1, :, :16] = 200
    return (LabelledImages(images, labels, Normalization(0.1, 0.3)),) * 2


def test_all_train_on_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    data = some_pictures()
    rows = [time_to_accuracy.measure(name, 3, ARGUMENTS, data) for name in time_to_accuracy.CONTENDERS]
    assert [row["model"] for row in rows] == ["fused", "reference", "reference channels_last"]
    for row in rows:
        assert 0 < row["training_seconds"] < row["total_seconds"]
        assert len(row["test_accuracy"]) == row["epochs"]
        assert row["reached"] == (row["test_accuracy"][-1] >= 0.99)
    assert capsys.readouterr().out.count("seed 3: epoch 1") == 3


def test_the_layout_is_that_of_the_parameters() -> None:
    data = some_pictures()
    for name, (_, layout) in time_to_accuracy.CONTENDERS.items():
        trainer = time_to_accuracy.build(name, 0, ARGUMENTS, data)
        trainer.step(*next(trainer.train_data.batches(8)))
        assert trainer.step.path.startswith("one operator" if name == "fused" else "plain loop")
        assert trainer.model.conv2.weight.is_contiguous(memory_format=layout)


def rows_of(model: str, seconds: list[float], reached: bool = True) -> list[dict[str, Any]]:
    return [
        {"model": model, "seed": seed, "target": 0.99, "threads": 2, "reached": reached, "epochs": 2}
        | {"training_seconds": value, "total_seconds": value + 1, "test_accuracy": [0.98, 0.991]}
        for seed, value in enumerate(seconds)
    ]


def test_the_table_has_a_line_for_each() -> None:
    rows = rows_of("fused", [1.0, 2.0, 3.0]) + rows_of("reference", [8.0, 9.0, 10.0])
    rows += rows_of("reference channels_last", [5.0, 6.0, 7.0], reached=False)
    lines = tables.accuracy_lines(rows).splitlines()
    assert lines[2] == "| fused | 3 of 3 | 2 | 2.00 (1.40 to 2.60) | 1.00x | 99.10% |"
    assert lines[3] == "| reference | 3 of 3 | 2 | 9.00 (8.40 to 9.60) | 4.50x | 99.10% |"
    assert lines[4] == "| reference channels_last | 0 of 3 | 2 | - | - | 99.10% |"


def test_it_is_written_into_raw_and_small_files(tmp_path: Path) -> None:
    rows = rows_of("fused", [1.0])
    time_to_accuracy.write(tmp_path / "raw.json", rows)
    raw = read_results(tmp_path / "raw.json")
    assert raw is not None
    assert raw["accuracy"] == rows
    path = summary.write(shown.of_run(raw), tmp_path)
    again = rows_of("fused", [0.5])
    time_to_accuracy.write(path, again)
    assert summary.read(path)["accuracy"] == again
    other = json.loads(path.read_text())
    other["machine"]["cpu"] = "another"
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="is of another machine"):
        summary.add_section(path, "accuracy", section_to_dict("accuracy", again))
