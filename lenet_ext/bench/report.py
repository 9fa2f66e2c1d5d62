"""Showing what was measured: a table, JSON, a picture."""

from __future__ import annotations

import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lenet_ext
from lenet_ext.bench.cases import CASES
from lenet_ext.bench.providers import PROVIDERS
from lenet_ext.bench.runner import Report
from lenet_ext.bench.timing import percentile
from lenet_ext.system import cpu_count, cpu_model, git_commit

__all__ = ["plot_report", "print_report", "report_to_dict"]


def report_to_dict(report: Report) -> dict[str, Any]:
    """Everything as plain values: machine, versions, settings, one row per provider and workload, the comparisons."""
    info = lenet_ext.build_info()
    machine: dict[str, Any] = {"cpu": cpu_model(), "processors": cpu_count(), "system": platform.platform()}
    if report.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(report.device)
    threads = torch.get_num_threads()
    rows = []
    for row in report.rows:
        times = row.samples.times_us
        rows.append(
            {
                "case": row.case,
                "mode": row.mode,
                "batch": row.batch,
                "provider": row.provider,
                "device": report.device.type,
                "dtype": "float32",
                "threads": threads,
                "p20_us": percentile(times, 0.2),
                "median_us": row.samples.median_us,
                "p80_us": percentile(times, 0.8),
                "images_per_second": row.batch / row.samples.median_us * 1e6,
                "rounds": len(times),
                "calls_per_round": row.samples.calls,
            }
        )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "cpu_capability": info["cpu_capability"],
        "torch": torch.__version__,
        "threads": threads,
        "load_average_before": report.load,
        "versions": {
            "lenet_ext": info["version"],
            "torch": torch.__version__,
            "torch_built_against": info["torch"],
            "python": sys.version.split()[0],
            "compiler": info["compiler"],
            "cxx_flags": info["cxx_flags"],
            "cuda": info["cuda"],
        },
        "commit": git_commit(),
        "effort": vars(report.plan.effort),
        "skipped": report.skipped,
        "rows": rows,
        "comparisons": [vars(comparison) for comparison in report.comparisons],
    }


def print_report(report: Report, console: Console) -> None:
    """One table: a line per workload, times per image, and ours against the best of stock."""
    used = {row.provider for row in report.rows}
    names = [name for name in report.plan.providers if name in used]
    table = Table(
        title=f"microseconds per image, median; {_where(report)}",
        caption="speedup: fastest stock variant (marked *) over fused, median of the rounds [20th - 80th percentile]",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("case")
    table.add_column("step")
    table.add_column("batch", justify="right")
    for name in names:
        table.add_column(PROVIDERS[name].title, justify="right")
    table.add_column("speedup", justify="right", no_wrap=True)
    times = {(row.case, row.mode, row.batch, row.provider): row.samples.median_us for row in report.rows}
    comparisons = {(c.case, c.mode, c.batch): c for c in report.comparisons}
    workloads = list(dict.fromkeys((row.case, row.mode, row.batch) for row in report.rows))
    for number, (case, mode, batch) in enumerate(workloads):
        compared = comparisons.get((case, mode, batch))
        cells = []
        for name in names:
            time_us = times.get((case, mode, batch, name))
            mark = "*" if compared is not None and name == compared.best_stock else ""
            cells.append("-" if time_us is None else f"{mark}{_figures(time_us / batch)}")
        speedup = "-"
        if compared is not None:
            speedup = f"{compared.speedup:.2f}x [{compared.speedup_p20:.2f} - {compared.speedup_p80:.2f}]"
        last = number + 1 == len(workloads) or workloads[number + 1][:2] != (case, mode)
        table.add_row(case, mode, str(batch), *cells, speedup.replace("[", "\\["), end_section=last)
    console.print(table)
    if report.load is not None and report.load > 0.5:
        console.print(
            f"note: the load average was {report.load:.1f} on {cpu_count()} processors before the first measurement; "
            "other processes may have taken part of the time, above all where several threads wait for each other",
            markup=False,
            soft_wrap=True,
        )
    for name, reason in report.skipped.items():
        console.print(f"left out: {PROVIDERS[name].title}: {reason}", markup=False, soft_wrap=True)


def _figures(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1 else f"{value:.2f}"


def _where(report: Report) -> str:
    machine = cpu_model() if report.device.type == "cpu" else torch.cuda.get_device_name(report.device)
    info = lenet_ext.build_info()
    return f"{machine}, {info['cpu_capability']}, threads: {torch.get_num_threads()}, torch {torch.__version__}"


def plot_report(report: Report, path: str | Path) -> None:
    """Draws time per image over the batch size, one panel per case and mode.

    Raises:
        lenet_ext.extras.MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from lenet_ext.extras import require
    from lenet_ext.plots import COLORS, new_figure, save_figure, tidy

    ticker = require("matplotlib.ticker", "pictures", extra="bench")

    panels = list(dict.fromkeys((row.case, row.mode) for row in report.rows))
    cases = list(dict.fromkeys(case for case, _ in panels))
    modes = list(dict.fromkeys(mode for _, mode in panels))
    figure = new_figure(max(5.0, 3.2 * len(cases)), 3.0 * len(modes) + 0.9)
    grid = figure.subplots(len(modes), len(cases), squeeze=False, sharex=True)
    names = [name for name in report.plan.providers if any(row.provider == name for row in report.rows)]
    handles: dict[str, Any] = {}
    for (case, mode), axes in (((c, m), grid[i][j]) for i, m in enumerate(modes) for j, c in enumerate(cases)):
        for name in names:
            rows = [row for row in report.rows if (row.case, row.mode, row.provider) == (case, mode, name)]
            if not rows:
                continue
            color = COLORS[list(PROVIDERS).index(name) % len(COLORS)]
            batches = [row.batch for row in rows]
            (handles[name],) = axes.plot(
                batches,
                [row.samples.median_us / row.batch for row in rows],
                color=color,
                linewidth=2.2 if not PROVIDERS[name].stock else 1.4,
                marker="o",
                markersize=3.5,
            )
            axes.fill_between(
                batches,
                [percentile(row.samples.times_us, 0.2) / row.batch for row in rows],
                [percentile(row.samples.times_us, 0.8) / row.batch for row in rows],
                color=color,
                alpha=0.15,
                linewidth=0,
            )
        tidy(axes)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_title(f"{case} ({CASES[case].title}), {mode}" if case != "net" else f"whole net, {mode}", fontsize=9)
    ticks = sorted({row.batch for row in report.rows})
    for axes in grid[-1]:
        axes.set(xlabel="batch size", xticks=ticks, xticklabels=[str(tick) for tick in ticks])
    for line in grid:
        line[0].set_ylabel("us per image")
    figure.suptitle(_where(report), fontsize=10)
    figure.legend(
        list(handles.values()),
        [PROVIDERS[name].title for name in handles],
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
    )
    save_figure(figure, path)
