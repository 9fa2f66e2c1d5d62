"""What of a run is shown: a cell for each workload, by whoever was measured there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["SECTIONS", "fastest", "of_run", "workload", "workloads"]

SECTIONS = ["memory", "neighbour", "zoo", "relu_alone", "average_pooling", "floors", "accuracy"]
"""The parts of a run that are not rows."""


def of_run(raw: dict[str, Any]) -> dict[str, Any]:
    """The small content of a file of ``lenet-ext bench --json``.

    Everybody is kept for the whole net, which has a picture; elsewhere the compared layout of ours, the faster layout
    of stock, and the fastest of all others.

    Raises:
        ValueError: it is of a GPU.
    """
    if "gpu" in raw["machine"]:
        raise ValueError("the run is of a GPU: gpu_check.py measures those")
    compared = {workload(line): line for line in raw["comparisons"]}
    rows = []
    for row in raw["rows"]:
        line = compared.get(workload(row))
        if line is None:
            continue
        over = _over(row, line)
        if over is not None:
            rows.append({**row, "over": over})
    runs = {}
    for group, run in raw["runs"].items():
        # A group may have been measured in pieces.
        commits = {row["commit"] for row in raw["rows"] if row["group"] == group} or {run["commit"]}
        runs[group] = {"date": run["date"], "commits": sorted(commit or "unknown" for commit in commits)}
    return {
        "source": "bench",
        **{name: raw[name] for name in ("machine", "cpu_capability", "versions")},
        "runs": runs,
        "rows": rows,
        **{name: raw[name] for name in SECTIONS if raw.get(name)},
    }


def workload(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row or a comparison is of: case, mode, threads, batch size."""
    return row["case"], row["mode"], row["threads"], row["batch"]


def _over(row: dict[str, Any], line: dict[str, Any]) -> float | None:
    """The row's time over that of the layout of ours that is compared; None for a row that is not shown."""
    if row["provider"] == line["best_fused"]:
        return 1.0
    if row["provider"] == line["best_eager"]:
        return line["speedup"]
    if row["provider"] == line["best_peer"]:
        return line["peer_speedup"]
    if row["group"] == "net" and line["best_fused"] == "fused":
        return row["fused_speedup"]
    return None


def workloads(content: dict[str, Any], *groups: str) -> dict[tuple[str, str, int, int], dict[str, dict[str, Any]]]:
    """Case, mode, batch and threads of each workload (of some groups), with the rows by provider."""
    found: dict[tuple[str, str, int, int], dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        if not groups or row["group"] in groups:
            place = row["case"], row["mode"], row["batch"], row["threads"]
            found.setdefault(place, {})[row["provider"]] = row
    return found


def fastest(rows: dict[str, dict[str, Any]], providers: Iterable[str]) -> dict[str, Any] | None:
    """The row of the one with the smallest median among those that were measured."""
    present = [rows[name] for name in providers if name in rows]
    return min(present, key=lambda row: row["median_us"], default=None)
