"""Showing results: tables on the terminal, a picture. Both are made of the plain values of `results`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lenet_ext.bench.cases import CASES
from lenet_ext.bench.instruction_sets import processor_title
from lenet_ext.bench.providers import PROVIDERS
from lenet_ext.training.plots import COLORS, in_default_style, new_figure, save_figure, tidy

__all__ = ["plot_results", "print_results"]

# Beside these and the fastest peer, a provider gets a place in the second table.
_FIRST_TABLE = ("fused", "eager", "channels_last", "compile")


def print_results(content: dict[str, Any], console: Console) -> None:
    """A line per workload, times per image and ratios; then memory, neighbour and what was left out."""
    if content["rows"]:
        console.print(_main_table(content))
        if {row["provider"] for row in content["rows"]} - set(_FIRST_TABLE):
            console.print(_peer_table(content))
    if content.get("memory"):
        console.print(_memory_table(content["memory"]))
    if content.get("neighbour"):
        console.print(_neighbour_table(content["neighbour"]))
    notes = []
    processors = content["machine"]["processors"]
    loads = [run["load_average_before"] for run in content["runs"].values() if run.get("load_average_before")]
    if max(loads, default=0) > 0.5:
        notes.append(
            f"note: the load average was {max(loads):.1f} on {processors} processors before the first measurement; "
            "other processes may have taken part of the time, above all where several threads wait for each other"
        )
    precisions = {row["case"]: row["precision"] for row in content["rows"] if row["group"] == "kernelbench"}
    notes += [f"{case}: in and out float32; arithmetic: {precision}" for case, precision in precisions.items()]
    skipped = {name: reason for run in content["runs"].values() for name, reason in run["skipped"].items()}
    for name, reason in skipped.items():
        title = PROVIDERS[name].title if name in PROVIDERS else _SKIPPED_TITLES.get(name, name)
        notes.append(f"left out: {title}: {reason}")
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


_SKIPPED_TITLES = {"peak": "share of the processor's peak", "neighbour": "busy neighbour"}


def _new_table(title: str, caption: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _main_table(content: dict[str, Any]) -> Table:
    used = {row["provider"] for row in content["rows"]}
    names = [name for name in _FIRST_TABLE if name in used]
    shares = any(row["peak_share"] is not None for row in content["rows"])
    caption = "speedup: faster layout of stock eager (*) over fused, median of the rounds [20th - 80th percentile]"
    caption += "; vs. best: fastest of all others over fused"
    caption += "; of peak: share of the processor's measured multiply-add rate" if shares else ""
    table = _new_table(
        f"microseconds per image, median; {where(content)}",
        caption,
        ("case", "step"),
        ("batch", "thr.", *(PROVIDERS[name].title for name in names), "images/s"),
    )
    table.add_column("speedup", justify="right", no_wrap=True)
    table.add_column("vs. best", justify="right")
    if shares:
        table.add_column("of peak", justify="right")
    rows = {(*_key(row), row["provider"]): row for row in content["rows"]}
    compared = {_key(line): line for line in content["comparisons"]}
    for key, last in _workloads(content["rows"]):
        line = compared.get(key)
        cells = []
        for name in names:
            row = rows.get((*key, name))
            mark = "*" if line is not None and name == line["best_eager"] else ""
            cells.append("-" if row is None else mark + figures(row["us_per_image"]))
        fused = rows.get((*key, "fused"))
        cells.append("-" if fused is None else f"{fused['images_per_second']:,.0f}")
        if line is None:
            cells += ["-", "-"]
        else:
            low, high = figures(line["speedup_p20"]), figures(line["speedup_p80"])
            cells += [f"{figures(line['speedup'])}x \\[{low} - {high}]", f"{figures(line['peer_speedup'])}x"]
        if shares:
            known = fused is not None and fused["peak_share"] is not None
            cells.append(f"{fused['peak_share']:.0%}" if fused is not None and known else "-")
        case, mode, batch, threads = key
        table.add_row(case, mode, str(batch), str(threads), *cells, end_section=last)
    return table


def _peer_table(content: dict[str, Any]) -> Table:
    used = {row["provider"] for row in content["rows"]}
    names = [name for name in PROVIDERS if name in used and name not in _FIRST_TABLE]
    table = _new_table(
        "the others: microseconds per image, median",
        "*: the fastest of all but fused; where none has the mark, it is one of the table above",
        ("case", "step"),
        ("batch", "thr.", *(PROVIDERS[name].title for name in names)),
    )
    times = {(*_key(row), row["provider"]): row["us_per_image"] for row in content["rows"]}
    best = {_key(line): line["best_peer"] for line in content["comparisons"]}
    for key, last in _workloads(content["rows"]):
        cells = []
        for name in names:
            time_us = times.get((*key, name))
            mark = "*" if name == best.get(key) else ""
            cells.append("-" if time_us is None else mark + figures(time_us))
        if set(cells) != {"-"}:
            case, mode, batch, threads = key
            table.add_row(case, mode, str(batch), str(threads), *cells, end_section=last)
    return table


def _memory_table(rows: list[dict[str, Any]]) -> Table:
    batch, threads = rows[0]["batch"], rows[0]["threads"]
    table = _new_table(
        f"peak memory of one training step, batch {batch}, threads: {threads}",
        "beyond parameters and input; each in a process of its own",
        ("provider",),
        ("MiB", "over fused"),
    )
    fused = next((row["median_bytes"] for row in rows if row["provider"] == "fused"), None)
    for row in rows:
        share = "-" if not fused else f"{row['median_bytes'] / fused:.1f}x"
        table.add_row(PROVIDERS[row["provider"]].title, f"{row['median_bytes'] / 2**20:.0f}", share)
    return table


def _neighbour_table(rows: list[dict[str, Any]]) -> Table:
    threads = rows[0]["threads"]
    table = _new_table(
        "a busy neighbour: the net, microseconds per image",
        f"ratio: 1 thread alone over {threads} threads while another process spins on one core",
        ("step", "provider"),
        ("batch", "1 thread alone", f"{threads} threads alone", f"{threads} threads, neighbour", "ratio"),
    )
    for row in rows:
        times = [row[f"{name}_us"][1] / row["batch"] for name in ("one_alone", "all_alone", "all_disturbed")]
        cells = (row["mode"], PROVIDERS[row["provider"]].title, str(row["batch"]), *map(figures, times))
        table.add_row(*cells, f"{row['speedup']:.2f}")
    return table


def _key(row: dict[str, Any]) -> tuple[str, str, int, int]:
    return row["case"], row["mode"], row["batch"], row["threads"]


def _workloads(rows: list[dict[str, Any]]) -> list[tuple[tuple[str, str, int, int], bool]]:
    """Each workload, and whether it is the last of its case."""
    keys = list(dict.fromkeys(_key(row) for row in rows))
    following = [*keys[1:], None]
    return [(k, n is None or n[0] != k[0]) for k, n in zip(keys, following, strict=True)]


def figures(value: float) -> str:
    """Three figures, and never an exponent.

    Example:
        >>> figures(12345.6), figures(12.345), figures(0.1234)
        ('12346', '12.3', '0.12')
    """
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def where(content: dict[str, Any]) -> str:
    """Processor or GPU, instruction set and torch, in a line."""
    gpu = content["machine"].get("gpu")
    machine = processor_title(content) if gpu is None else f"{gpu}, {content['cpu_capability']}"
    return f"{machine}, torch {content['versions']['torch']}"


@in_default_style
def plot_results(content: dict[str, Any], path: str | Path, cases: Sequence[str] | None = None) -> None:
    """Draws time per image over the batch size, a line per provider.

    Of one case there is a row of panels per mode and a column per number of threads, of several a column per case.

    Args:
        content: as in the JSON file.
        path: the picture.
        cases: which; by default all that were measured but the tiny problems, whose times mean nothing to the eye.

    Raises:
        lenet_ext.environment.extras.MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
        ValueError: there is nothing to draw.
    """
    rows = [
        row
        for row in content["rows"]
        if (row["case"] in cases if cases is not None else row["group"] != "overhead" or len(content["runs"]) == 1)
    ]
    if not rows:
        raise ValueError("the results hold nothing to draw")
    drawn = list(dict.fromkeys(row["case"] for row in rows))
    modes, threads = (sorted({row[key] for row in rows}) for key in ("mode", "threads"))
    if len(drawn) == 1:
        panels = [[(drawn[0], mode, count) for count in threads] for mode in modes]
    else:
        panels = [[(case, mode, count) for case in drawn] for mode in modes for count in threads]
    figure = new_figure(max(7.5, 3.2 * len(panels[0])), 2.7 * len(panels) + 1.0)
    grid = figure.subplots(
        len(panels), len(panels[0]), squeeze=False, sharex="col", sharey="row" if len(drawn) == 1 else False
    )
    handles: dict[str, Any] = {}
    for axes_line, line in zip(grid, panels, strict=True):
        for axes, (case, mode, count) in zip(axes_line, line, strict=True):
            there = [row for row in rows if (row["case"], row["mode"], row["threads"]) == (case, mode, count)]
            handles.update(_draw_panel(axes, there))
            batches = sorted({row["batch"] for row in rows if row["case"] == case})
            axes.set_xticks(batches, [str(batch) for batch in batches])
            what = CASES[case].title if case in CASES else case
            axes.set_title(f"{what}\n{mode}, {count} thread{'s' * (count > 1)}", fontsize=9)
        axes_line[0].set_ylabel("us per image")
    for axes in grid[-1]:
        axes.set_xlabel("batch size")
    figure.suptitle(where(content), fontsize=10)
    names = [name for name in PROVIDERS if name in handles]
    figure.legend(
        [handles[name] for name in names],
        [PROVIDERS[name].title for name in names],
        loc="outside lower center",
        ncols=min(4, len(names)),
        frameon=False,
        fontsize=9,
    )
    save_figure(figure, path)


def _draw_panel(axes: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A line per provider, which it returns, and for ours a band from the 20th to the 80th percentile."""
    from lenet_ext.environment.extras import require

    ticker = require("matplotlib.ticker", "pictures", extra="bench")
    handles = {}
    dashes = ("-", "--", ":")  # more providers than colors: the second turn is dashed
    for number, name in enumerate(PROVIDERS):
        points = [row for row in rows if row["provider"] == name]
        if not points:
            continue
        color = COLORS[number % len(COLORS)]
        batches = [row["batch"] for row in points]
        low, middle, high = ([row[key] / row["batch"] for row in points] for key in ("p20_us", "median_us", "p80_us"))
        (handles[name],) = axes.plot(
            batches,
            middle,
            color=color,
            linestyle=dashes[number // len(COLORS) % 3],
            linewidth=2.2 if name == "fused" else 1.2,
            marker="o",
            markersize=3.5 if name == "fused" else 2.5,
        )
        if name == "fused":
            axes.fill_between(batches, low, high, color=color, alpha=0.2, linewidth=0)
    tidy(axes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    return handles
