"""What `lenet-ext bench` shows of its results: tables, notes, pictures and verdicts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_results import COMMIT, NET, raw

from lenet_ext.bench import plot_results, print_results, shown
from lenet_ext.bench.targets import print_targets


def content(**changes: Any) -> dict[str, Any]:
    """A file of the benchmark, with what only the tables on the terminal show."""
    found = raw(NET, **changes)
    for row in found["rows"]:
        row.update(
            us_per_image=row["median_us"] / row["batch"], images_per_second=1e6 * row["batch"] / row["median_us"]
        )
        row.update(precision="float32")
    return found


def printed(found: dict[str, Any], show: Any = print_results) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    show(found, console)
    return console.export_text()


def test_peers_have_a_table_of_their_own() -> None:
    text = printed(content())
    first, second = text.split("the others: microseconds per image")
    assert "stock eager" in first
    assert "ONNX Runtime" in second
    assert "*30.0" in second, "the fastest of all"
    assert "50%" in first, "the share of the peak"
    assert "the others" not in printed(content() | {"rows": [r for r in content()["rows"] if r["provider"] == "fused"]})


def test_peers_need_not_have_run_everything() -> None:
    found = content()
    found["rows"] = [r for r in found["rows"] if r["threads"] == 1 or r["provider"] != "onnxruntime"]
    first, second = printed(found).split("the others: microseconds per image")
    assert "18.0" in first
    assert "27.0" not in second


def test_shares_of_the_peak_only_where_it_is_known() -> None:
    found = content()
    for row in found["rows"]:
        row["peak_share"] = None
    assert "of peak" not in printed(found)
    found["rows"][0]["peak_share"] = 0.25
    assert "25%" in printed(found)


def test_a_workload_without_a_comparison_still_has_its_times() -> None:
    """Of a run with --providers, which may be without ours or without stock."""
    text = printed(content(comparisons=[]))
    assert "20.0" in text
    assert "speedup" in text


def test_memory_and_neighbour() -> None:
    memory = [
        {"provider": name, "batch": 4096, "threads": 2, "median_bytes": size * 2**20}
        for name, size in (("fused", 10), ("eager", 45))
    ]
    times = {f"{name}_us": [1.0, 640.0, 3.0] for name in ("one_alone", "all_alone", "all_disturbed")}
    neighbour = [{"provider": "fused", "mode": "forward", "batch": 64, "threads": 2, "speedup": 1.25, **times}]
    text = printed({**content(), "rows": [], "comparisons": [], "memory": memory, "neighbour": neighbour})
    assert "microseconds per image, median" not in text
    assert "peak memory of one training step, batch 4096, threads: 2" in " ".join(text.split())
    assert "4.5x" in text
    assert "2 threads, neighbour" in text
    assert "1.25" in text
    # Of ours nothing is known: there is nothing to compare with.
    assert "4.5x" not in printed({**content(), "memory": memory[1:]})


def test_notes_say_what_was_left_out_and_what_may_have_disturbed() -> None:
    run = {"date": "2026-11-24", "commit": COMMIT, "load_average_before": 1.7}
    skipped = {"onnxruntime": "not installed", "neighbour": "needs two cores", "something": "else"}
    text = printed(content(runs={"net": {**run, "skipped": skipped}}))
    assert "left out: ONNX Runtime: not installed" in text
    assert "needs two cores" in text
    assert "left out: something: else" in text
    assert "the load average was 1.7 on 2 processors" in text
    assert "load average" not in printed(content())


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="the results hold nothing to draw"):
        plot_results({**content(), "rows": []}, tmp_path / "times.png")


def test_a_picture_of_one_case_has_its_threads_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_results(content(), tmp_path / "times.svg")
    text = (tmp_path / "times.svg").read_text()
    assert text.count('id="axes_') == 2


def test_what_no_target_speaks_of_has_no_verdict() -> None:
    assert "targets" in printed(shown.of_run(content()), print_targets)
    few = content(rows=[], comparisons=[])
    assert printed(shown.of_run(few), print_targets) == ""


def test_what_has_nothing_to_be_compared_with_is_not_in_a_small_file() -> None:
    found = content()
    found["comparisons"] = found["comparisons"][:1]
    kept = shown.workloads(shown.of_run(found))
    assert set(kept) == {("net", "forward", 1, 1)}
    assert torch.tensor([row["median_us"] for row in kept["net", "forward", 1, 1].values()]).min() == 20
