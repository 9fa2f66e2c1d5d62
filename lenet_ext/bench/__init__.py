"""Benchmarks: providers x cases x modes x batch sizes.

- `cases`: what is computed (a layer, the whole net), as a stock module and as one of ours.
- `providers`: who computes it (fused, eager, channels_last, torch.compile, ...).
- `timing`: how time is taken: interleaved rounds in one process, medians and percentiles.
- `runner`: goes through the product, compares outputs before it times them.
- `report`: table on the terminal, JSON, picture.
"""

from __future__ import annotations

from lenet_ext.bench.cases import CASES, Case, Workload
from lenet_ext.bench.providers import PROVIDERS, Program, Provider
from lenet_ext.bench.report import plot_report, print_report, report_to_dict
from lenet_ext.bench.runner import Plan, Report, run_benchmarks

__all__ = [
    "CASES",
    "PROVIDERS",
    "Case",
    "Plan",
    "Program",
    "Provider",
    "Report",
    "Workload",
    "plot_report",
    "print_report",
    "report_to_dict",
    "run_benchmarks",
]
