"""Results of ``lenet-ext bench --json`` as Markdown tables and as a picture.

    python to_markdown.py results/cpu.json                            # print all tables
    python to_markdown.py results/cpu.json --table net
    python to_markdown.py results/cpu.json --update ../README.md      # rewrite the tables that the file has marked
    python to_markdown.py results/cpu.json --check ../README.md       # exit code 1 where they are out of date
    python to_markdown.py results/cpu.json --plot results/net.png --cases net

In a Markdown file a table stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import targets

from lenet_ext.bench.cases import CASES
from lenet_ext.bench.providers import PROVIDERS
from lenet_ext.bench.report import figures, plot_results, where

_MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(\n?<!-- /bench -->)", re.DOTALL)


def table(left: list[str], right: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the columns of `right` are numbers."""
    lines = [left + right, ["---"] * len(left) + ["---:"] * len(right), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def origin(content: dict[str, Any], group: str) -> str:
    """The line above a table: what was measured where."""
    run = content["runs"][group]
    # A group may have been measured in pieces.
    commits = {row["commit"] for row in content["rows"] if row["group"] == group} or {run["commit"]}
    short = sorted((c or "unknown")[:10] + (" with changes" if (c or "").endswith("+changes") else "") for c in commits)
    processors = content["machine"]["processors"]
    return f"{where(content)}, {processors} processors, commit {', '.join(short)}, {run['date'][:10]}."


def key(row: dict[str, Any]) -> tuple[str, str, int, int]:
    """What tells workloads apart."""
    return row["case"], row["mode"], row["batch"], row["threads"]


def timing_table(content: dict[str, Any], group: str) -> str:
    """One line per workload: microseconds per image, and ours against the others."""
    rows: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        if row["group"] == group:
            rows.setdefault(key(row), {})[row["provider"]] = row
    compared = {key(line): line for line in content["comparisons"]}
    one_case = len({workload[0] for workload in rows}) == 1
    ours = [name for name in targets.FUSED if any(name in found for found in rows.values())]
    lines = []
    for (case, mode, batch, threads), found in rows.items():
        line = compared.get((case, mode, batch, threads))
        if line is None:
            continue
        fused, best = found[line["best_fused"]], found[line["best_peer"]]
        share = fused["peak_share"]
        lines.append(
            ([] if one_case else [CASES[case].title if case in CASES else case])
            + [mode, str(threads), str(batch)]
            + [figures(found[name]["us_per_image"]) if name in found else "-" for name in ours]
            + [figures(found[name]["us_per_image"]) if name in found else "-" for name in targets.EAGER]
            + [f"{figures(best['us_per_image'])} ({PROVIDERS[line['best_peer']].title})"]
            + [f"{fused['images_per_second']:,.0f}"]
            + [f"{figures(line['speedup'])}x", f"{figures(line['peer_speedup'])}x"]
            + ["-" if share is None else f"{share:.0%}"]
        )
    eager = [PROVIDERS[name].title for name in targets.EAGER]
    right = [
        "threads",
        "batch",
        *(PROVIDERS[name].title for name in ours),
        *eager,
        "best of all others",
        "images/s",
        "over eager",
        "over best",
        "of peak",
    ]
    title = f"Microseconds per image, medians. {origin(content, group)}"
    return f"{title}\n\n{table([*([] if one_case else ['layer']), 'step'], right, lines)}"


def overhead_table(content: dict[str, Any]) -> str:
    """Microseconds of a call with next to nothing to compute."""
    times = {(*key(row), row["provider"]): row["median_us"] for row in content["rows"] if row["group"] == "overhead"}
    lines = []
    for place in dict.fromkeys(place[:4] for place in times):
        fused, stock = times[(*place, "fused")], times[(*place, "eager")]
        case, mode, _, threads = place
        title = CASES[case].title if case in CASES else case
        lines.append([title, mode, str(threads), figures(fused), figures(stock), f"{fused - stock:+.1f}"])
    title = f"Microseconds per call on a tiny problem, medians. {origin(content, 'overhead')}"
    return f"{title}\n\n{table(['call', 'step'], ['threads', 'fused', 'stock', 'difference'], lines)}"


def peers_table(content: dict[str, Any]) -> str:
    """Every provider on the whole net, microseconds per image."""
    rows: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        if row["case"] == "net":
            rows.setdefault(key(row)[1:], {})[row["provider"]] = row
    names = [name for name in PROVIDERS if any(name in found for found in rows.values())]
    lines = [
        [PROVIDERS[name].title]
        + [figures(found[name]["us_per_image"]) if name in found else "-" for found in rows.values()]
        for name in names
    ]
    heads = [f"{mode}, {threads} thr., B={batch}" for mode, batch, threads in rows]
    return f"Microseconds per image, medians. {origin(content, 'net')}\n\n{table(['provider'], heads, lines)}"


def memory_table(content: dict[str, Any]) -> str:
    """Peak memory of a training step."""
    rows = content["memory"]
    fused = next(row["median_bytes"] for row in rows if row["provider"] == "fused")
    lines = [
        [
            PROVIDERS[row["provider"]].title,
            f"{row['median_bytes'] / 2**20:.0f}",
            f"{row['median_bytes'] / fused:.1f}x",
        ]
        for row in rows
    ]
    title = f"Peak memory of one training step at batch {rows[0]['batch']}, {rows[0]['threads']} threads, beyond "
    title += f"parameters and input. {origin(content, 'memory')}"
    return f"{title}\n\n{table(['provider'], ['MiB', 'over fused'], lines)}"


def neighbour_table(content: dict[str, Any]) -> str:
    """All threads beside a busy process."""
    rows = content["neighbour"]
    conditions = ("one_alone", "all_alone", "all_disturbed")
    lines = [
        [row["mode"], PROVIDERS[row["provider"]].title]
        + [figures(row[f"{name}_us"][1] / row["batch"]) for name in conditions]
        + [f"{row['speedup']:.2f}"]
        for row in rows
    ]
    threads = rows[0]["threads"]
    right = [
        "1 thread alone",
        f"{threads} threads alone",
        f"{threads} threads, one core taken",
        "ratio of the outer two",
    ]
    title = f"Microseconds per image at batch {rows[0]['batch']}. {origin(content, 'neighbour')}"
    return f"{title}\n\n{table(['step', 'provider'], right, lines)}"


def targets_table(content: dict[str, Any]) -> str:
    """What was to be reached, and what was."""
    lines = [[cells[0], cells[4], cells[5], *cells[1:4]] for cells in (o.cells() for o in targets.outcomes(content))]
    head = targets.HEADER
    return table([head[0], head[4], head[5]], list(head[1:4]), lines)


def accuracy_table(content: dict[str, Any]) -> str:
    """Seconds until a test accuracy."""
    rows = content["accuracy"]
    lines = [
        [row["model"], str(row["seed"]), str(row["epochs"]) + ("" if row["reached"] else " (not reached)")]
        + [f"{row[key]:.1f}" for key in ("training_seconds", "total_seconds")]
        for row in rows
    ]
    title = f"Until {100 * rows[0]['target']:g}% test accuracy on MNIST, {rows[0]['threads']} threads. "
    title += origin(content, "accuracy")
    right = ["seed", "epochs", "seconds of training", "seconds with evaluation"]
    return f"{title}\n\n{table(['model'], right, lines)}"


def zoo_table(content: dict[str, Any]) -> str:
    """Well-known networks before and after `fuse`."""
    rows = content["zoo"]
    lines = [
        [row["network"], row["mode"], str(row["fused_layers"])]
        + [figures(row["us_per_image"][row[f"best_{kind}"]]) for kind in ("stock", "fused")]
        + [f"{row['speedup']:.2f}x"]
        for row in rows
    ]
    title = f"Microseconds per image at batch {rows[0]['batch']}, {rows[0]['threads']} threads, the faster layout of "
    title += f"each. {origin(content, 'zoo')}"
    return f"{title}\n\n{table(['network', 'step'], ['fused layers', 'stock', 'fused', 'speedup'], lines)}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "net": lambda content: timing_table(content, "net"),
    "peers": peers_table,
    "layers": lambda content: timing_table(content, "layers"),
    "general": lambda content: timing_table(content, "general"),
    "overhead": overhead_table,
    "memory": memory_table,
    "neighbour": neighbour_table,
    "accuracy": accuracy_table,
    "zoo": zoo_table,
    "targets": targets_table,
}


def present(content: dict[str, Any]) -> list[str]:
    """The tables that the results have numbers for."""
    have = {"targets", *content["runs"], *(["peers"] if "net" in content["runs"] else [])}
    return [name for name in TABLES if name in have and (content.get(name) or name not in ("memory", "neighbour"))]


def updated(text: str, content: dict[str, Any]) -> str:
    """`text` with every marked table made anew.

    Raises:
        ValueError: a name is unknown, or the results do not have it.
    """

    def replace(found: re.Match[str]) -> str:
        name = found[2]
        if name not in present(content):
            raise ValueError(f"no results for the table {name!r}, found {', '.join(present(content))}")
        return f"{found[1]}{TABLES[name](content)}\n<!-- /bench -->"

    return _MARKED.sub(replace, text)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--table", choices=list(TABLES))
    parser.add_argument("--update", type=Path, metavar="MARKDOWN")
    parser.add_argument("--check", type=Path, metavar="MARKDOWN")
    parser.add_argument("--plot", type=Path, metavar="PICTURE")
    parser.add_argument("--cases", nargs="+", help="of the picture (default: all)")
    arguments = parser.parse_args()
    content = json.loads(arguments.file.read_text())
    if arguments.plot is not None:
        plot_results(content, arguments.plot, arguments.cases)
    target = arguments.update or arguments.check
    if target is not None:
        before = target.read_text()
        try:
            after = updated(before, content)
        except ValueError as error:
            parser.error(f"{target.name}: {error}")
        if arguments.update is not None:
            target.write_text(after)
        elif after != before:
            print(f"{target.name} is out of date: run with --update", file=sys.stderr)
            return 1
    elif arguments.plot is None:
        names = [arguments.table] if arguments.table else present(content)
        print("\n\n".join(f"### {name}\n\n{TABLES[name](content)}" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
