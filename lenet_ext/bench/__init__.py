"""Benchmarks: providers x cases x modes x batch sizes x threads.

- `cases`: what is computed (a layer, the whole net), as a stock module and as one of ours.
- `providers`: who computes it (fused, eager, channels_last, torch.compile, ...).
- `timing`: how time is taken: interleaved rounds in one process, medians and percentiles.
- `instruction_sets`: the one that a run is of, which the environment may have forced.
- `flops`, `peak`: how many operations a workload has, and how many the processor can do.
- `plan`: which of all that; `runner`: carries it out; `agreement`: outputs are compared before they are timed.
- `memory`, `neighbour`: peak memory of a training step; all threads beside a busy process.
- `results`: plain values for JSON and CSV; `report`: tables on the terminal, picture.
- `shown`: what of a run goes into tables; `targets`: what was to be reached, and what was.
"""

from __future__ import annotations

from lenet_ext.bench.cases import CASES, GROUPS, Case, Workload
from lenet_ext.bench.flops import flops_per_image
from lenet_ext.bench.plan import Plan
from lenet_ext.bench.providers import PROVIDERS, Program, Provider
from lenet_ext.bench.report import plot_results, print_results
from lenet_ext.bench.results import merge, read_results, report_to_dict, write_csv
from lenet_ext.bench.runner import Report, run_benchmarks

__all__ = [
    "CASES",
    "GROUPS",
    "PROVIDERS",
    "Case",
    "Plan",
    "Program",
    "Provider",
    "Report",
    "Workload",
    "flops_per_image",
    "merge",
    "plot_results",
    "print_results",
    "read_results",
    "report_to_dict",
    "run_benchmarks",
    "write_csv",
]
