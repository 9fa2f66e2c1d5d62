"""The tables of the READMEs, made of machines' small files: each is a function of what `summary.read` gives.

Every table says above it what it shows and where that was measured. A machine that has not measured what a table shows
has no such table; the headline has a column for each processor instead.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from lenet_ext.bench import targets
from lenet_ext.bench.cases import CASES
from lenet_ext.bench.instruction_sets import processor_title
from lenet_ext.bench.providers import EAGER_LAYOUTS, FUSED_LAYOUTS, PROVIDERS
from lenet_ext.bench.report import figures, where
from lenet_ext.bench.shown import fastest, workloads
from lenet_ext.bench.timing import percentile

Content = dict[str, Any]
OTHERS = tuple(name for name, provider in PROVIDERS.items() if provider.kind != "fused")
STEPS = {"forward": "forward", "training": "forward + backward", "step": "training step"}

# The README's: case, mode and batch of each row.
HEADLINE = [("net", mode, batch) for mode in ("forward", "training", "step") for batch in (1, 64, 1024)]


def table(left: list[str], right: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the columns of `right` are numbers."""
    lines = [left + right, ["---"] * len(left) + ["---:"] * len(right), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine(content: Content) -> str:
    if content["source"] == "gpu_check":
        versions = content["versions"]
        return f"{content['machine']['gpu']}, CUDA {versions['cuda']}, torch {versions['torch']}"
    return f"{where(content)}, {content['machine']['processors']} processors"


def origin(content: Content, part: str) -> str:
    """What was measured where: the end of the line above a table."""
    run = content["runs"][part]
    commits = [commit.replace("+changes", " with changes") for commit in run["commits"]]
    short = [commit[:10] + commit[40:] for commit in commits]
    return f"{machine(content)}, commit {', '.join(short)}, {run['date'][:10]}."


def times(ratio: float) -> str:
    return f"{figures(ratio)}x"


def title_of(case: str) -> str:
    return CASES[case].title if case in CASES else case


def both(values: Iterable[str]) -> str:
    """For one thread and for all, in one cell."""
    return " / ".join(values)


# --- of lenet-ext bench -----------------------------------------------------------------------------------------------


def headline(contents: list[Content]) -> str:
    """Three columns for each processor: the time, over stock, over the fastest of all others."""
    measured = [content for content in contents if content["source"] == "bench" and "net" in content["runs"]]
    places, heads, columns = [], [], []
    for content in measured:
        cells = workloads(content)
        _, all_counts = _sizes(cells)
        counts = sorted({all_counts[0], all_counts[-1]})
        places.append(f"{origin(content, 'net')[:-1]}, {both(map(str, counts))} threads")
        heads += [f"{processor_title(content)}: us per image", "over stock", "over the best"]
        found = [[cells.get((*place, threads), {}) for threads in counts] for place in HEADLINE]
        columns += [[both(map(_ours_us, row)) for row in found]]
        columns += [[both(_over(rows, EAGER_LAYOUTS) for rows in row) for row in found]]
        columns += [[both(_over(rows, OTHERS) for rows in row) for row in found]]
    layers = {case: "" if case == "net" else f"{case} ({title_of(case)}), " for case, _, _ in HEADLINE}
    labels = [f"{layers[case]}{STEPS[mode]}, batch {batch}" for case, mode, batch in HEADLINE]
    rows = [list(cells) for cells in zip(labels, *columns, strict=True)]
    return f"{'; '.join(places)}.\n\n{table(['LeNet, and its layers'], heads, rows)}"


def _ours_us(rows: dict[str, dict[str, Any]]) -> str:
    row = fastest(rows, FUSED_LAYOUTS)
    return "-" if row is None else figures(row["median_us"] / row["batch"])


def _over(rows: dict[str, dict[str, Any]], others: Iterable[str]) -> str:
    row = fastest(rows, others)
    return "-" if row is None else times(row["over"])


def layers_table(content: Content, group: str) -> str:
    """A column per batch size; in a cell, below each other for the numbers of threads, the time and the ratios."""
    cells = workloads(content, group)
    batches, counts = _sizes(cells)
    lines = []
    for case, mode in dict.fromkeys(place[:2] for place in cells):
        found = [[_layer_cell(cells.get((case, mode, batch, threads), {})) for threads in counts] for batch in batches]
        lines.append([title_of(case), STEPS[mode], *("<br>".join(texts) if any(texts) else "-" for texts in found)])
    title = f"Microseconds per image with {both(map(str, counts))} threads below each other, medians (over stock eager "
    title += "in its faster layout; over the fastest of all others, where that is not stock; share of the peak). "
    head = [f"batch {batch}" for batch in batches]
    return f"{title}{origin(content, group)}\n\n{table(['layer', 'step'], head, lines)}"


def _sizes(cells: Iterable[tuple[str, str, int, int]]) -> tuple[list[int], list[int]]:
    """Batch sizes and numbers of threads."""
    places = list(cells)
    return sorted({batch for _, _, batch, _ in places}), sorted({threads for _, _, _, threads in places})


def _layer_cell(rows: dict[str, dict[str, Any]]) -> str:
    ours = fastest(rows, FUSED_LAYOUTS)
    if ours is None:
        return ""
    ratios = dict.fromkeys((_over(rows, EAGER_LAYOUTS), _over(rows, OTHERS)))  # one, where the fastest is stock
    share = [] if ours["peak_share"] is None else [f"{ours['peak_share']:.0%}"]
    return f"{_ours_us(rows)} ({', '.join([*ratios, *share])})"


def peers_table(content: Content) -> str:
    """Every provider on the whole nets, for all numbers of threads in one cell."""
    cells = workloads(content, "net")
    batches, counts = _sizes(cells)

    def us(case: str, mode: str, batch: int, threads: int, name: str) -> str:
        row = cells.get((case, mode, batch, threads), {}).get(name)
        return "-" if row is None else figures(row["median_us"] / batch)

    lines = []
    for case, mode in dict.fromkeys(place[:2] for place in cells):
        for name in PROVIDERS:
            if any(name in rows for place, rows in cells.items() if place[:2] == (case, mode)):
                found = [both(us(case, mode, batch, threads, name) for threads in counts) for batch in batches]
                lines.append([title_of(case), STEPS[mode], PROVIDERS[name].title, *found])
    title = f"Microseconds per image with {both(map(str, counts))} threads, medians. {origin(content, 'net')}"
    return f"{title}\n\n{table(['net', 'step', 'provider'], [f'batch {batch}' for batch in batches], lines)}"


def overhead_table(content: Content) -> str:
    """Microseconds of a call with next to nothing to compute."""
    cells = workloads(content, "overhead")
    _, counts = _sizes(cells)
    lines = []
    for case, mode, batch in dict.fromkeys(place[:3] for place in cells):
        found = [cells.get((case, mode, batch, threads), {}) for threads in counts]
        columns = [
            both(figures(rows[name]["median_us"]) if name in rows else "-" for rows in found)
            for name in ("fused", "eager")
        ]
        lines.append([title_of(case), STEPS[mode], *columns])
    title = f"Microseconds per call on a tiny problem with {both(map(str, counts))} threads, medians. "
    return f"{title}{origin(content, 'overhead')}\n\n{table(['call', 'step'], ['fused', 'stock'], lines)}"


def memory_table(content: Content) -> str:
    """Peak memory of a training step."""
    rows = content["memory"]
    ours = next(row["median_bytes"] for row in rows if row["provider"] == "fused")
    lines = [
        [PROVIDERS[row["provider"]].title, f"{row['median_bytes'] / 2**20:.0f}", f"{row['median_bytes'] / ours:.1f}x"]
        for row in rows
    ]
    title = f"Peak memory of one training step at batch {rows[0]['batch']}, {rows[0]['threads']} threads, beyond "
    title += f"parameters and input. {origin(content, 'memory')}"
    return f"{title}\n\n{table(['provider'], ['MiB', 'over fused'], lines)}"


def neighbour_table(content: Content) -> str:
    """All threads beside a busy process."""
    rows = content["neighbour"]
    conditions = ("one_alone", "all_alone", "all_disturbed")
    lines = [
        [STEPS[row["mode"]], PROVIDERS[row["provider"]].title, str(row["batch"])]
        + [figures(row[f"{name}_us"][1] / row["batch"]) for name in conditions]
        + [f"{row['speedup']:.2f}"]
        for row in rows
    ]
    count = rows[0]["threads"]
    right = ["1 thread alone", f"{count} threads alone", f"{count} threads, one core taken", "ratio of the outer two"]
    title = f"Microseconds per image. {origin(content, 'neighbour')}"
    return f"{title}\n\n{table(['step', 'provider'], ['batch', *right], lines)}"


def accuracy_table(content: Content) -> str:
    """Seconds of training until a test accuracy."""
    rows = content["accuracy"]
    title = f"Until {100 * rows[0]['target']:g}% test accuracy on MNIST, {rows[0]['threads']} threads. "
    return f"{title}{origin(content, 'accuracy')}\n\n{accuracy_lines(rows)}"


def accuracy_lines(rows: list[dict[str, Any]]) -> str:
    """A line for each contender: the median over the seeds, of which one that did not get there took for ever."""
    seconds: dict[str, list[float]] = {}
    for row in rows:
        seconds.setdefault(row["model"], []).append(row["training_seconds"] if row["reached"] else math.inf)
    first = statistics.median(seconds["fused"])
    lines = []
    for model, times_of_model in seconds.items():
        own = [row for row in rows if row["model"] == model]
        median = statistics.median(times_of_model)
        spread = [f"{percentile(times_of_model, share):.2f}" for share in (0.2, 0.8)]
        reached = f"{sum(row['reached'] for row in own)} of {len(own)}"
        epochs = statistics.median(row["epochs"] for row in own)
        accuracy = statistics.median(row["test_accuracy"][-1] for row in own)
        cells = [f"{median:.2f} ({' to '.join(spread)})", times(median / first)] if median < math.inf else ["-", "-"]
        lines.append([model, reached, f"{epochs:g}", *cells, f"{100 * accuracy:.2f}%"])
    right = ["seeds that reached it", "epochs", "seconds of training (20th to 80th percentile)", "over fused"]
    return table(["network"], [*right, "accuracy then"], lines)


def zoo_table(content: Content) -> str:
    """Well-known networks before and after `fuse`."""
    rows = content["zoo"]
    lines = [
        [row["network"], STEPS[row["mode"]], str(row["fused_layers"])]
        + [figures(row["us_per_image"][row[f"best_{kind}"]]) for kind in ("stock", "fused")]
        + [f"{row['speedup']:.2f}x"]
        for row in rows
    ]
    title = f"Microseconds per image at batch {rows[0]['batch']}, {rows[0]['threads']} threads, the faster layout of "
    title += f"each. {origin(content, 'zoo')}"
    return f"{title}\n\n{table(['network', 'step'], ['fused layers', 'stock', 'fused', 'speedup'], lines)}"


def relu_alone_table(content: Content) -> str:
    """Convolution and ReLU without pooling, by the fused kernel."""
    return _left_table(content, "relu_alone", "Convolution + ReLU: microseconds per image of the fused kernel")


def average_pooling_table(content: Content) -> str:
    """ReLU and average pooling in one pass, behind stock's convolution."""
    title = "Convolution + ReLU + average pooling: microseconds per image with one pass behind the convolution"
    return _left_table(content, "average_pooling", title)


def _left_table(content: Content, name: str, title: str) -> str:
    """A column for each batch size, the numbers of threads below each other."""
    found: dict[tuple[str, str], dict[int, list[str]]] = {}
    for row in sorted(content[name], key=lambda row: row["threads"]):
        line = found.setdefault((row["layer"], row["mode"]), {})
        text = f"{figures(row['fused_us'] / row['batch'])} ({times(row['speedup'][1])})"
        line.setdefault(row["batch"], []).append(text)
    batches = sorted({batch for line in found.values() for batch in line})
    lines = [
        [layer, STEPS[mode], *("<br>".join(line[batch]) if batch in line else "-" for batch in batches)]
        for (layer, mode), line in found.items()
    ]
    counts = both(map(str, sorted({row["threads"] for row in content[name]})))
    title += f" with {counts} threads below each other, medians (stock eager in its faster layout over it). "
    head = [f"batch {batch}" for batch in batches]
    return f"{title}{origin(content, name)}\n\n{table(['layer', 'step'], head, lines)}"


def floors_table(content: Content) -> str:
    """The floor under each kernel of LeNet, and how near to it the kernel is."""
    lines = []
    for row in content["floors"]:
        sizes = [figures(row[name] / row["batch"] / 1e3) for name in ("flops", "bytes")]
        us = [figures(row[f"{name}_us"] / row["batch"]) for name in ("peak", "copy", "measured")]
        lines.append([row["kernel"], str(row["batch"]), *sizes, *us, f"{row['share']:.0%}"])
    title = "Of an image: operations, bytes, and microseconds on one thread, medians: of its operations at the "
    title += "processor's peak, of a copy of as many bytes, and of the kernel; the greater floor's share of that. "
    right = ["batch", "kFLOP", "KB", "at peak", "copied", "measured", "share"]
    return f"{title}{origin(content, 'floors')}\n\n{table(['kernel'], right, lines)}"


def targets_table(content: Content) -> str:
    """What was to be reached, and what was."""
    reason = targets.why_none(content)
    if reason is not None:
        return f"{machine(content)}. {reason}"
    lines = [[cells[0], cells[4], cells[5], *cells[1:4]] for cells in (o.cells() for o in targets.outcomes(content))]
    head = targets.HEADER
    # Of several runs: each table of times has its own commits.
    return f"{machine(content)}.\n\n{table([head[0], head[4], head[5]], list(head[1:4]), lines)}"


# --- of gpu_check.py --------------------------------------------------------------------------------------------------

# Of ours; a graph is compared with the faster layout of stock as a graph.
GPU_PROVIDERS = {
    "ours graph": "",
    "ours layered graph": ", layer by layer",
    "ours fwd+bwd only graph": ", forward and backward alone",
    "ours eager": ", eager",
}
GPU_STOCK = ("stock graph", "channels_last graph")
PRECISIONS = {"float32": "float32", "tf32": "TF32", "bfloat16": "bfloat16"}


def gpu_table(content: Content, group: str) -> str:
    """A line per case, precision and way of ours, a column per batch size."""
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        if row["group"] == group:
            place = row["case"], row["mode"], row["precision"], row["batch"]
            cells.setdefault(place, {})[row["provider"]] = row
    batches = sorted({place[-1] for place in cells})

    def cell(place: tuple[Any, ...], batch: int, provider: str) -> str:
        rows = cells.get((*place, batch), {})
        if provider not in rows:
            return "-"
        us, stock = rows[provider]["median_us"], fastest(rows, GPU_STOCK)
        alike = provider in ("ours graph", "ours layered graph") and stock is not None
        return f"{figures(us)} ({times(stock['median_us'] / us)})" if alike and stock else figures(us)

    lines = []
    for place in dict.fromkeys(place[:-1] for place in cells):
        case, mode, precision = place
        for provider, suffix in GPU_PROVIDERS.items():
            found = [cell(place, batch, provider) for batch in batches]
            if set(found) != {"-"}:
                what = STEPS.get(mode, mode) + suffix
                lines.append([PRECISIONS[precision], *([] if case == "net" else [case]), what, *found])
    left = ["precision", *([] if group == "net" else ["layer"]), "what"]
    title = "Microseconds of a call as a CUDA graph, unless it says eager, medians (over stock's graph). "
    return f"{title}{origin(content, 'gpu')}\n\n{table(left, [f'batch {batch}' for batch in batches], lines)}"


def gpu_mnist_table(content: Content) -> str:
    """Training until 99%, the step as a graph."""
    lines = []
    for model in dict.fromkeys(run["model"] for run in content["mnist"]):
        runs = [run for run in content["mnist"] if run["model"] == model]
        epoch = statistics.median(1000 * run["seconds"] / run["epochs"] for run in runs)
        reached = [str(run["epochs"]) for run in sorted(runs, key=lambda run: run["epochs"]) if run["reached"]]
        lines.append([model, str(len(runs)), figures(epoch), ", ".join(reached)])
    title = f"MNIST to 99%, data on the GPU, the step as a CUDA graph. {origin(content, 'gpu')}"
    right = ["seeds", "ms per epoch, median", "epochs of the seeds that reached it"]
    return f"{title}\n\n{table(['model'], right, lines)}"


def gpu_ceilings_table(content: Content) -> str:
    """What this GPU can do."""
    titles = {
        "copy_tb_s": "copy, TB/s",
        "float32_tflop_s": "float32 product, TFLOP/s",
        "tf32_tflop_s": "TF32 product, TFLOP/s",
        "bfloat16_tflop_s": "bfloat16 product, TFLOP/s",
        "launch_us": "eager launch, us",
        "graph_node_us": "node of a graph, us",
    }
    (found,) = content["ceilings"]
    title = f"What stock torch reaches there. {origin(content, 'gpu')}"
    return f"{title}\n\n{table([], list(titles.values()), [[figures(found[name]) for name in titles]])}"


def gpu_checks_table(content: Content) -> str:
    """Is it right?"""
    lines = [[check["step"], check["status"], check["said"]] for check in content["checks"]]
    return f"{origin(content, 'gpu')}\n\n{table(['check', 'status', 'said'], [], lines)}"


# ----------------------------------------------------------------------------------------------------------------------

TABLES: dict[str, dict[str, Callable[[Content], str]]] = {
    "bench": {
        "net": lambda content: layers_table(content, "net"),
        "peers": peers_table,
        "layers": lambda content: layers_table(content, "layers"),
        "general": lambda content: layers_table(content, "general"),
        "networks": lambda content: layers_table(content, "networks"),
        "overhead": overhead_table,
        "memory": memory_table,
        "neighbour": neighbour_table,
        "accuracy": accuracy_table,
        "zoo": zoo_table,
        "relu_alone": relu_alone_table,
        "average_pooling": average_pooling_table,
        "floors": floors_table,
        "targets": targets_table,
    },
    "gpu_check": {
        "gpu_checks": gpu_checks_table,
        "gpu_net": lambda content: gpu_table(content, "net"),
        "gpu_layers": lambda content: gpu_table(content, "layers"),
        "gpu_mnist": gpu_mnist_table,
        "gpu_ceilings": gpu_ceilings_table,
    },
}
NAMES = ["headline", *(name for group in TABLES.values() for name in group)]


def has(content: Content, name: str) -> bool:
    """Whether a machine has measured what a table shows."""
    if name not in TABLES[content["source"]]:
        return False
    if name in ("targets", "peers"):
        name = "net"
    if content["source"] == "gpu_check":
        name = name.removeprefix("gpu_")
    return bool(content.get(name)) or any(row["group"] == name for row in content["rows"])


def render(name: str, contents: list[Content]) -> str | None:
    """A table of all machines that have it, one below the other; None where none has."""
    if name == "headline":
        found = [headline(contents)] if any(has(content, "net") for content in contents) else []
    else:
        found = [TABLES[content["source"]][name](content) for content in contents if has(content, name)]
    return "\n\n".join(found) or None
