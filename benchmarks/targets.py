"""What the package is meant to reach, and what was measured: ``python targets.py results/cpu-PROCESSOR-DATE.json``.

A target is a ratio and must hold in every cell it names, for every number of threads: the worst one counts.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import summary

from lenet_ext.bench.providers import EAGER_LAYOUTS as EAGER
from lenet_ext.bench.providers import FUSED_LAYOUTS as FUSED

TRAINERS = (*EAGER, "compile", "compile_cl")
SERVERS = ("onnxruntime", "openvino", "torchscript", "torchscript_cl")
ANYBODY = (*TRAINERS, *SERVERS, "compile_max")
LARGE = (256, 1024, 4096)


@dataclass(frozen=True)
class Target:
    """One demand.

    Args:
        what: for people.
        cases, mode, batches: the cells; no cases means all layers that no other target names, no batches means all.
        target, stretch: what to reach, and what would be better still.
        over: the providers whose fastest is the yardstick; none means the share of the processor's peak.
    """

    what: str
    cases: tuple[str, ...]
    mode: str
    batches: tuple[int, ...]
    target: float
    stretch: float
    over: tuple[str, ...] = EAGER


def _net(
    mode: str, batches: tuple[int, ...], target: float, stretch: float, over: tuple[str, ...], yard: str
) -> Target:
    sizes = f"{batches[0]} to {batches[-1]}" if len(batches) > 1 else str(batches[0])
    step = "inference" if mode == "forward" else "forward + backward"
    return Target(f"{step}, batch {sizes}: {yard}", ("net",), mode, batches, target, stretch, over)


def _layer(name: str, title: str, batches: tuple[int, ...], *pairs: tuple[float, float]) -> list[Target]:
    steps = (("forward", "forward"), ("training", "forward + backward"))
    return [
        Target(f"{title}: {step}", (name,), mode, batches, *pair)
        for (mode, step), pair in zip(steps, pairs, strict=True)
    ]


TARGETS = [
    _net("forward", LARGE, 0.88, 0.93, (), "share of peak"),
    _net("forward", LARGE, 7, 10, EAGER, "over stock eager"),
    _net("forward", LARGE, 2.2, 2.8, SERVERS, "over ONNX Runtime, OpenVINO, TorchScript"),
    *(
        target
        for batch, eager, stretch, peer in ((64, 6, 8, 1.8), (8, 5, 7, 1.7), (1, 12, 18, 2.0))
        for target in (
            _net("forward", (batch,), eager, stretch, EAGER, "over stock eager"),
            _net("forward", (batch,), peer, peer, ANYBODY, "over the best peer"),
        )
    ),
    _net("training", LARGE, 5.5, 7, TRAINERS, "over stock eager and torch.compile"),
    _net("training", LARGE, 0.50, 0.65, (), "share of peak, sparse"),
    *(
        _net("training", (batch,), target, stretch, TRAINERS, "over stock eager and torch.compile")
        for batch, target, stretch in ((64, 4, 6), (8, 5, 8), (1, 8, 20))
    ),
    *(
        Target(
            f"training step, batch {batch}: over stock eager and torch.compile",
            ("net",),
            "step",
            (batch,),
            *pair,
            TRAINERS,
        )
        for batch, pair in ((1, (12, 20)), (64, (6, 8)), (1024, (5.5, 7)))
    ),
    *_layer("conv1", "1->6 k5", (64, 1024), (5, 8), (6, 9)),
    *_layer("conv2", "6->16 k5", (64, 1024), (1.8, 2.2), (3.5, 5)),
    *_layer("conv3x32", "3->32 k3 p1 at 32x32", (64, 1024), (2, 3), (2, 3)),
    *_layer("stem224", "3->64 k7 s2 p3 at 224x224, pool 3 s2 p1", (8,), (1.2, 1.5), (1.2, 2)),
    *(
        Target(f"{what}: {step}", cases, mode, (), 0.97, 1.05)
        for what, cases in (
            ("64->64, 128->256, 256->256", ("conv64x64", "conv128x256", "conv256x256")),
            ("every other layer and size", ()),
        )
        for mode, step in (("forward", "forward"), ("training", "forward + backward"))
    ),
]
# Of the networks of small_networks.py, at the batch size and number of threads where it is least. Stock's peak memory
# over ours; one thread alone over all threads beside a neighbour.
MEMORY = ("peak memory of a training step at batch 4096: stock over fused", 3.0, 5.0)
NETWORKS = ("small networks: forward + backward, the median network, over stock eager", 1.6, 1.6)
NEIGHBOUR = ("a busy neighbour: 1 thread alone over all threads disturbed", 1.0, 1.0)


@dataclass(frozen=True)
class Outcome:
    """A target, the worst value found and where; None where it was not measured."""

    what: str
    target: float
    stretch: float
    measured: float | None
    where: str
    share: bool = False

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.measured >= self.stretch > self.target:
            return "met, stretch too"
        return "met" if self.measured >= self.target else "missed"

    def cells(self) -> list[str]:
        """As the columns of a table."""
        values = (self.target, self.stretch, self.measured)
        texts = ["-" if v is None else f"{v:.0%}" if self.share else f"{v:.2f}x" for v in values]
        return [self.what, *texts, self.where or "-", self.verdict]


HEADER = ("what", "target", "stretch", "measured", "worst at", "verdict")


def outcomes(content: dict[str, Any]) -> list[Outcome]:
    """Every target against a machine's results, as `summary.read` gives them."""
    cells = summary.workloads(content, "net", "layers", "general")
    named = {
        (case, target.mode, batch)
        for target in TARGETS
        for case in target.cases
        for batch in target.batches or {batch for _, _, batch, _ in cells}
    }
    found = []
    for target in TARGETS:
        values = list(_values(target, cells, named))
        measured, where = min(values) if values else (None, "")
        found.append(Outcome(target.what, target.target, target.stretch, measured, where, share=not target.over))
    networks: dict[tuple[int, int], list[float]] = defaultdict(list)
    for (_, mode, batch, threads), rows in summary.workloads(content, "networks").items():
        row = summary.fastest(rows, EAGER)
        if mode == "training" and row is not None:
            networks[batch, threads].append(row["over"])
    medians = [
        (statistics.median(values), f"batch {batch}, {threads} thread{'s' * (threads > 1)}")
        for (batch, threads), values in networks.items()
    ]
    found.append(Outcome(*NETWORKS, *min(medians, default=(None, ""))))
    bytes_ = {row["provider"]: row["median_bytes"] for row in content.get("memory", ())}
    # The more frugal layout of stock.
    memory = min((bytes_[name] / bytes_["fused"], name) for name in EAGER) if set(bytes_) >= {"fused", *EAGER} else None
    found.append(Outcome(*MEMORY, *(memory or (None, ""))))
    neighbour = [
        (row["speedup"], f"{row['mode']}, {row['threads']} threads")
        for row in content.get("neighbour", ())
        if row["provider"] == "fused"
    ]
    found.append(Outcome(*NEIGHBOUR, *min(neighbour, default=(None, ""))))
    return found


def _values(
    target: Target,
    cells: dict[tuple[str, str, int, int], dict[str, dict[str, Any]]],
    named: set[tuple[str, str, int]],
) -> Iterator[tuple[float, str]]:
    for (case, mode, batch, threads), rows in cells.items():
        if target.cases:
            wanted = case in target.cases and (not target.batches or batch in target.batches)
        else:
            wanted = case != "net" and (case, mode, batch) not in named
        if not wanted or mode != target.mode:
            continue
        where = f"{case}, batch {batch}, {threads} thread{'s' * (threads > 1)}"
        ours, other = summary.fastest(rows, FUSED), summary.fastest(rows, target.over)
        if not target.over and ours is not None and ours["peak_share"] is not None:
            yield ours["peak_share"], where
        elif other is not None:
            yield other["over"], f"{where}, against {other['provider']}"


def main() -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    table = Table(*HEADER)
    for outcome in outcomes(summary.read(parser.parse_args().file)):
        table.add_row(*outcome.cells())
    console = Console()
    Console(width=None if console.is_terminal else 180).print(table)


if __name__ == "__main__":
    main()
