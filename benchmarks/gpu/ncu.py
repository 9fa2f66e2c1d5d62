"""What Nsight Compute (`ncu --csv --page raw`) says about each kernel that a program has it look at.

The program tells it when to look (cudaProfilerStart and Stop), and names the case by a range of NVTX. The names of the
metrics are those of its documentation, "Kernel Profiling Guide"; which of them exist depends on the GPU, so a missing
one is left out.
"""

from __future__ import annotations

import csv
import re
import statistics
from typing import Any

# What it is called here, and there.
METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "shared_load_bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "shared_store_bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "fma_pipe_percent": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
    "tensor_pipe_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
_SCALE = {"microseconds": 1e-3}  # base units are nanoseconds
_CASE = re.compile(r"\w[\w+ ]* batch \d+")  # e.g. float32 forward + backward batch 64


def command(program: list[str], most_launches: int) -> list[str]:
    """The command line that profiles what a program has it look at, up to so many launches."""
    what = ["--profile-from-start", "off", "--nvtx", "--launch-count", str(most_launches)]
    what += ["--metrics", ",".join(METRICS.values()), "--clock-control", "none"]
    return ["ncu", "--csv", "--page", "raw", "--print-units", "base", *what, *program]


def parse(text: str) -> list[dict[str, Any]]:
    """One row per case, kernel and grid: how often it was launched, and the median of each metric over the launches.

    Raises:
        ValueError: there is no table in the text.
    """
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise ValueError("ncu printed no table")
    launches: dict[tuple[str | None, str, str], list[dict[str, str]]] = {}
    for row in csv.DictReader(lines[begin:]):
        if (row.get("ID") or "").isdigit():  # the second line has the units, and ncu's messages may follow the table
            key = (_case(row), row["Kernel Name"], row.get("Grid Size") or "")
            launches.setdefault(key, []).append(row)
    return [
        {"case": case, "kernel": kernel, "grid": grid, "launches": len(rows), **_medians(rows)}
        for (case, kernel, grid), rows in launches.items()
    ]


def _case(row: dict[str, str]) -> str | None:
    # The column "Id:Domain:Start/Stop_Range:..." has "1:<default domain>:NAME:none:none:..." and so on.
    ranges = " ".join(value for column, value in row.items() if column and "Start/Stop_Range" in column and value)
    found = _CASE.search(ranges)
    return found[0] if found else None


def _medians(rows: list[dict[str, str]]) -> dict[str, float]:
    medians = {}
    for ours, theirs in METRICS.items():
        values = [value for row in rows if (value := _number(row.get(theirs))) is not None]
        if values:
            medians[ours] = statistics.median(values) * _SCALE.get(ours, 1)
    return medians


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None
