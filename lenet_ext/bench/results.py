"""Results as plain values: what ``--json`` writes, pieces of a run put together, and the same as CSV.

The table on the terminal and the picture are made of these values, and so is the small file of a machine in
``benchmarks/results``, so that a number exists once. Keys of the content:

- ``machine``, ``versions``, ``cpu_capability``: of all results in the file; results of different ones do not mix.
  ``machine["forced"]``: what held it to an instruction set (`instruction_sets`), where anything did.
- ``runs``: per group the date, commit, effort, load and what was left out.
- ``rows``: one per provider and workload; ``comparisons``: one per workload.
- ``memory``, ``neighbour``: see the modules of these names.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import lenet_ext
from lenet_ext.bench.cases import CASES
from lenet_ext.bench.instruction_sets import forced_by_environment
from lenet_ext.bench.runner import Report
from lenet_ext.bench.timing import percentile
from lenet_ext.environment.files import atomic_path
from lenet_ext.environment.system import cpu_count, cpu_flags, cpu_governor, cpu_model, git_commit

__all__ = ["facts", "measured", "merge", "read_results", "report_to_dict", "section_to_dict", "write_csv"]

_PACKAGES = ("numpy", "onnx", "onnxruntime", "openvino")
_SAME = ("machine", "cpu_capability", "versions")


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """Machine and versions: what a number needs to mean something to others. No names of hosts, no paths."""
    info = lenet_ext.build_info()
    machine: dict[str, Any] = {
        "cpu": cpu_model(),
        "processors": cpu_count(),
        "instruction_sets": cpu_flags(),
        "governor": cpu_governor(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    forced = forced_by_environment()
    if forced:
        machine["forced"] = forced
    if device is not None and device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    versions = {
        "lenet_ext": info["version"],
        "torch": torch.__version__,
        "torch_built_against": info["torch"],
        "python": sys.version.split()[0],
        "compiler": info["compiler"],
        "cuda": info["cuda"],
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": _now(),
        "commit": git_commit(),
        "machine": machine,
        "cpu_capability": info["cpu_capability"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def report_to_dict(report: Report) -> dict[str, Any]:
    """Everything as plain values: machine, versions, settings, one row per provider and workload, the comparisons."""
    content = facts(report.device)
    content["threads"] = max(report.plan.threads, default=content["threads"])
    rows = []
    for row in report.rows:
        times = row.samples.times_us
        speedup = row.fused_speedup
        rows.append(
            {
                "group": CASES[row.case].group,
                "case": row.case,
                "mode": row.mode,
                "batch": row.batch,
                "threads": row.threads,
                "provider": row.provider,
                "device": report.device.type,
                "dtype": "float32",
                "precision": CASES[row.case].rules.precision,
                "p20_us": percentile(times, 0.2),
                "median_us": row.samples.median_us,
                "p80_us": percentile(times, 0.8),
                "us_per_image": row.samples.median_us / row.batch,
                "images_per_second": row.batch / row.samples.median_us * 1e6,
                "fused_speedup": None if speedup is None else speedup[0],
                "fused_speedup_p20": None if speedup is None else speedup[1],
                "fused_speedup_p80": None if speedup is None else speedup[2],
                "peak_share": row.peak_share,
                "rounds": len(times),
                "calls_per_round": row.samples.calls,
                "commit": content["commit"],
            }
        )
    run = {
        "date": content["date"],
        "commit": content["commit"],
        "load_average_before": report.load,
        "effort": vars(report.plan.effort),
        "skipped": report.skipped,
    }
    groups = dict.fromkeys(CASES[name].group for name in report.plan.cases)
    return {
        **content,
        "runs": dict.fromkeys(groups, run),
        "rows": rows,
        "comparisons": [vars(comparison) for comparison in report.comparisons],
    }


def section_to_dict(name: str, rows: list[dict[str, Any]], skipped: str | None = None) -> dict[str, Any]:
    """The same for one of the measurements that are not times of workloads: ``"memory"``, ``"neighbour"``."""
    content = facts()
    run = {
        "date": content["date"],
        "commit": content["commit"],
        "skipped": {} if skipped is None else {name: skipped},
    }
    return {**content, "runs": {name: run}, "rows": [], "comparisons": [], name: rows}


def _workload(row: dict[str, Any]) -> tuple[str, str, int, int]:
    return row["case"], row["mode"], row["batch"], row["threads"]


def measured(content: dict[str, Any] | None) -> frozenset[tuple[str, str, int, int]]:
    """The workloads that the results hold."""
    return frozenset() if content is None else frozenset(_workload(row) for row in content["rows"])


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Both together; what was measured again replaces what was there.

    Raises:
        ValueError: they come from different machines or versions.
    """
    if old is None:
        return new
    for name in _SAME:
        if old.get(name) != new[name]:
            raise ValueError(
                f"the results that are there are of another {name.replace('_', ' ')}: {_difference(old, new, name)}"
            )
    again = measured(new)
    runs = dict(old["runs"])
    for name, run in new["runs"].items():
        skipped = {**runs.get(name, {}).get("skipped", {}), **run["skipped"]}
        runs[name] = {**run, "skipped": skipped}
    content = {**old, **new, "runs": runs}
    content["threads"] = max(old["threads"], new["threads"])
    for name in ("rows", "comparisons"):
        kept = [row for row in old[name] if _workload(row) not in again]
        content[name] = sorted([*kept, *new[name]], key=_order)
    return content


def _difference(old: dict[str, Any], new: dict[str, Any], name: str) -> str:
    before, after = old.get(name), new[name]
    if isinstance(before, dict) and isinstance(after, dict):
        key = next(key for key in {**before, **after} if before.get(key) != after.get(key))
        return f"{key} {before.get(key)}, now {after.get(key)}"
    return f"{before}, now {after}"


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    cases = list(CASES)
    place = cases.index(row["case"]) if row["case"] in cases else len(cases)
    return place, row["mode"], row["threads"], row["batch"]


def read_results(path: str | Path) -> dict[str, Any] | None:
    """The content of a file, or None where there is none.

    Raises:
        ValueError: it holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None
    if not isinstance(content, dict) or not {"runs", "rows", "comparisons", "versions"} <= set(content):
        raise ValueError(f"{path} holds no results of 'lenet-ext bench'")
    return content


def write_csv(content: dict[str, Any], path: str | Path) -> None:
    """The rows, one line each, with the machine in every line.

    Raises:
        OSError: the file cannot be written.
    """
    common = {
        "cpu": content["machine"]["cpu"],
        "processors": content["machine"]["processors"],
        "cpu_capability": content["cpu_capability"],
        "forced": " ".join(f"{name}={value}" for name, value in content["machine"].get("forced", {}).items()),
        "torch": content["torch"],
        "date": content["date"],
    }
    lines = [{**row, **common} for row in content["rows"]]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else list(common))
        writer.writeheader()
        writer.writerows(lines)
