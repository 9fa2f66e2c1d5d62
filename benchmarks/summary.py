"""The small file of a machine's results: what a table or the picture shows, and nothing else.

    python summary.py ../runs/bench/last.json         # of 'lenet-ext bench' and the scripts that add to it
    python summary.py ../runs/gpu/gpu_check.json      # of gpu_check.py

It goes to ``results/``, named by processor and date, in place of what was there of the same processor; what this run
has not measured is kept from there. A processor that was held to a lesser instruction set counts as another one. Raw
runs are not kept in the repository. The file is JSON with a line for each cell:

- ``source``: ``"bench"`` or ``"gpu_check"``; ``machine``, ``versions``; ``runs``: date and commits of each part.
- ``columns``, ``rows``: the times. Of ``bench``, in microseconds a call: median and 20th and 80th percentile; ``over``
  is that time over the time of ours (of the faster layout, where there are two), the median within the same rounds; and
  the share of the processor's peak. Of ``gpu_check``: median, 10th and 90th percentile.
- the other parts as they were measured: ``memory``, ``neighbour``, ``zoo``, ``relu_alone``, ``average_pooling``,
  ``floors``, ``accuracy``; ``checks``, ``ceilings``, ``mnist``, ``backward``, ``kernelbench``, ``ncu``.

`read` is for the scripts that show it.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from lenet_ext.bench.cases import CASES, MODES
from lenet_ext.bench.instruction_sets import is_forced
from lenet_ext.bench.shown import SECTIONS, of_run, workload
from lenet_ext.environment.files import atomic_path

RESULTS = Path(__file__).resolve().parent / "results"
BENCH_COLUMNS = ["case", "mode", "threads", "batch", "provider"]
BENCH_COLUMNS += ["p20_us", "median_us", "p80_us", "over", "peak_share"]
GPU_COLUMNS = ["case", "mode", "batch", "precision", "provider", "p10_us", "median_us", "p90_us"]


def of_gpu_check(report: dict[str, Any]) -> dict[str, Any]:
    """The small content of the report of ``gpu_check.py``.

    Raises:
        ValueError: a row has a case of another form.
    """
    steps, environment = report["steps"], report["environment"]
    rows = []
    for name in steps:
        for row in (steps[name].get("result") or []) if name.split()[0] in ("net", "layers") else []:
            found = re.fullmatch(r"(?:(\w+) )?(forward|forward \+ backward|step) batch (\d+)", row["case"])
            if found is None:
                raise ValueError(f"step {name!r} has the case {row['case']!r}")
            place = {"case": found[1] or "net", "mode": found[2], "batch": int(found[3]), "precision": row["precision"]}
            for provider, us in row["us"].items():
                times = {"p10_us": us["p10"], "median_us": us["median"], "p90_us": us["p90"]}
                rows.append({**place, "provider": provider, **times})
    checks = [
        {"step": name, "status": steps[name]["status"], "said": _last_line(steps[name].get("tail", ""))}
        for name in ("driver", "memcheck", "racecheck", "synccheck", "initcheck", "tests", "parity")
        if name in steps
    ]
    name, driver = [part.strip() for part in environment["nvidia_smi"].splitlines()[-1].split(",")[:2]]
    return {
        "source": "gpu_check",
        "machine": {"gpu": name, "driver": driver},
        "versions": {key: environment[key] for key in ("torch", "cuda", "cudnn", "python")},
        "runs": {"gpu": {"date": environment["time"], "commits": [environment["commit"]]}},
        "rows": rows,
        "checks": checks,
        "ceilings": [steps["ceilings"]["result"]] if "result" in steps.get("ceilings", {}) else [],
        "mnist": steps.get("mnist", {}).get("result") or [],
        **{
            name: steps[name]["result"]
            for name in ("backward", "kernelbench", "ncu")
            if steps.get(name, {}).get("result")
        },
    }


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip("= ")


def file_name(content: dict[str, Any]) -> str:
    """By processor and date, e.g. ``cpu-amd-epyc-avx512-2026-11-24.json``."""
    date = max(run["date"] for run in content["runs"].values())[:10]
    return f"{processor(content)}-{date}.json"


def processor(content: dict[str, Any]) -> str:
    """As a part of a file's name, e.g. ``cpu-amd-epyc-avx512`` or ``cpu-amd-epyc-avx2-forced``."""
    if content["source"] == "bench":
        name = f"cpu {re.sub(r'[(](R|TM)[)]|CPU|Processor|@.*', '', content['machine']['cpu'])} "
        name += content["cpu_capability"] + " forced" * is_forced(content)
    else:
        name = "gpu " + re.sub(r"NVIDIA|\s\d+GB.*", "", content["machine"]["gpu"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def dump(content: dict[str, Any]) -> str:
    """As JSON: a line for each key, and for each cell."""
    columns = BENCH_COLUMNS if content["source"] == "bench" else GPU_COLUMNS
    rows = [[row.get(name) for name in columns] for row in content["rows"]]
    content = {**{key: value for key, value in content.items() if key != "rows"}, "columns": columns, "rows": rows}
    lines = []
    for key, value in content.items():
        if isinstance(value, list) and key != "columns":
            # Without spaces, for there are a thousand of them.
            cells = ",\n".join(json.dumps(_rounded(cell), allow_nan=False, separators=(",", ":")) for cell in value)
            lines.append(f'"{key}": [\n{cells}\n ]')
        elif key == "runs":
            runs = ",\n".join(f'  "{group}": {json.dumps(run)}' for group, run in value.items())
            lines.append(f'"{key}": {{\n{runs}\n }}')
        else:
            lines.append(f'"{key}": {json.dumps(value, allow_nan=False)}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _rounded(value: Any) -> Any:
    """Four digits, one more than a table shows."""
    if isinstance(value, float):
        short = float(f"{value:.4g}")
        return int(short) if short.is_integer() else short
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def read(path: str | Path) -> dict[str, Any]:
    """A small file; each row as a dict by the names of the columns, with the group of its case.

    Raises:
        ValueError: it is something else.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "columns" not in content:
        raise ValueError(f"{path} is no summary; summary.py makes one of a raw run")
    content["rows"] = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
    for row in content["rows"]:
        row["group"] = CASES[row["case"]].group
    return content


def write(content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes the file in place of the one of the same processor.

    Workloads and parts that this run has not measured are kept from that one, if it is of the same machine and torch; a
    group has the commits of all of its workloads, and the last date.
    """
    path = folder / file_name(content)
    others = list(folder.glob(f"{processor(content)}-????-??-??.json"))
    for other in others:
        content = _completed(content, read(other))
    with atomic_path(path) as temporary:
        temporary.write_text(dump(content), encoding="utf-8")
    for other in others:
        if other != path:
            other.unlink()
    return path


def _completed(content: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    if content["source"] != "bench" or any(content[key] != earlier[key] for key in ("machine", "cpu_capability")):
        return content
    if content["versions"]["torch"] != earlier["versions"]["torch"]:
        return content
    measured = {workload(row) for row in content["rows"]}
    kept = [row for row in earlier["rows"] if workload(row) not in measured]
    cases, modes = list(CASES), list(MODES)
    rows = sorted(
        [*kept, *content["rows"]],
        key=lambda row: (cases.index(row["case"]), modes.index(row["mode"]), row["threads"], row["batch"]),
    )
    runs = {**earlier["runs"], **content["runs"]}
    for group in {row["group"] for row in kept} & content["runs"].keys():
        commits = {*earlier["runs"][group]["commits"], *content["runs"][group]["commits"]}
        runs[group] = {**content["runs"][group], "commits": sorted(commits)}
    missing = {name: earlier[name] for name in SECTIONS if name in earlier and name not in content}
    return {**content, "runs": runs, "rows": rows, **missing}


def add_section(path: Path, name: str, raw: dict[str, Any]) -> None:
    """Puts a part that was measured by itself into a machine's small file, in place of the one that it has.

    Args:
        path: the small file.
        name: of the part, one of `SECTIONS`.
        raw: what `lenet_ext.bench.results.section_to_dict` made of it.

    Raises:
        ValueError: the file is of another machine, or of another version of torch.
    """
    content = read(path)
    for key in ("machine", "cpu_capability"):
        if content[key] != raw[key]:
            raise ValueError(f"{path} is of another machine: {key} {content[key]}, found {raw[key]}")
    if content["versions"]["torch"] != raw["versions"]["torch"]:
        raise ValueError(f"{path} is of torch {content['versions']['torch']}, found {raw['versions']['torch']}")
    run = raw["runs"][name]
    content["runs"][name] = {"date": run["date"], "commits": [run["commit"] or "unknown"]}
    content[name] = raw[name]
    with atomic_path(path) as temporary:
        temporary.write_text(dump(content), encoding="utf-8")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    raw = json.loads(arguments.raw.read_text())
    try:
        path = write(of_gpu_check(raw) if "steps" in raw else of_run(raw), arguments.into)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {path}, {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
