"""What the package is meant to reach, and what was measured.

A target is a ratio and must hold in every cell it names, for every number of threads: the worst one counts. AVX-512 and
AVX2 have targets of their own, and a run's are those of the instruction set that it used. The baseline set has none: it
is there so that the package runs on any processor. AVX2's would not do: they are of twice its lanes, and of
multiply-adds that it lacks.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lenet_ext.bench.instruction_sets import instruction_set, processor_title
from lenet_ext.bench.providers import EAGER_LAYOUTS as EAGER
from lenet_ext.bench.providers import FUSED_LAYOUTS as FUSED
from lenet_ext.bench.shown import fastest, workloads

__all__ = ["HEADER", "TARGETS", "Outcome", "outcomes", "print_targets", "why_none"]

TRAINERS = (*EAGER, "compile", "compile_cl")
SERVERS = ("onnxruntime", "openvino", "torchscript", "torchscript_cl")
ANYBODY = (*TRAINERS, *SERVERS, "compile_max")
LARGE = (256, 1024, 4096)


@dataclass(frozen=True)
class Goal:
    """What to reach, and what would be better still, where anything would."""

    target: float
    stretch: float | None = None


Goals = dict[str, Goal]
"""By instruction set; one that is missing has no such target."""


def _goals(avx512: tuple[float, ...], avx2: tuple[float, ...] = ()) -> Goals:
    return {name: Goal(*numbers) for name, numbers in (("avx512", avx512), ("avx2", avx2)) if numbers}


@dataclass(frozen=True)
class Target:
    """One demand.

    Args:
        what: for people.
        cases, mode, batches: the cells; no cases means all layers that no other target names, no batches means all.
        goals: by instruction set.
        over: the providers whose fastest is the yardstick; none means the share of the processor's peak.
    """

    what: str
    cases: tuple[str, ...]
    mode: str
    batches: tuple[int, ...]
    goals: Goals
    over: tuple[str, ...] = EAGER


def _net(mode: str, batches: tuple[int, ...], goals: Goals, over: tuple[str, ...], yard: str) -> Target:
    sizes = f"{batches[0]} to {batches[-1]}" if len(batches) > 1 else str(batches[0])
    step = {"forward": "inference", "training": "forward + backward", "step": "training step"}[mode]
    return Target(f"{step}, batch {sizes}: {yard}", ("net",), mode, batches, goals, over)


def _layer(name: str, title: str, batches: tuple[int, ...], forward: Goals, training: Goals) -> list[Target]:
    return [
        Target(f"{title}: forward", (name,), "forward", batches, forward),
        Target(f"{title}: forward + backward", (name,), "training", batches, training),
    ]


_STOCK, _PEERS, _TRAINERS = "over stock eager", "over the best peer", "over stock eager and torch.compile"
TARGETS = [
    _net("forward", LARGE, _goals((0.88, 0.93), (0.85,)), (), "share of peak"),
    _net("forward", LARGE, _goals((7, 10)), EAGER, _STOCK),
    _net("forward", LARGE, _goals((2.2, 2.8)), SERVERS, "over ONNX Runtime, OpenVINO, TorchScript"),
    _net("forward", (64,), _goals((6, 8)), EAGER, _STOCK),
    _net("forward", (64,), _goals((1.8,)), ANYBODY, _PEERS),
    _net("forward", (8,), _goals((5, 7)), EAGER, _STOCK),
    _net("forward", (8,), _goals((1.7,)), ANYBODY, _PEERS),
    _net("forward", (1,), _goals((12, 18)), EAGER, _STOCK),
    _net("forward", (1,), _goals((1.8,), (1.8,)), ANYBODY, _PEERS),
    _net("training", LARGE, _goals((5.5, 7), (4, 5)), TRAINERS, _TRAINERS),
    _net("training", LARGE, _goals((0.50, 0.65)), (), "share of peak, sparse"),
    _net("training", (64,), _goals((5.5, 6), (4,)), TRAINERS, _TRAINERS),
    _net("training", (8,), _goals((5, 8), (3.5,)), TRAINERS, _TRAINERS),
    _net("training", (1,), _goals((8, 20)), TRAINERS, _TRAINERS),
    _net("step", (1,), _goals((12, 20)), TRAINERS, _TRAINERS),
    _net("step", (64,), _goals((6, 8)), TRAINERS, _TRAINERS),
    _net("step", (1024,), _goals((5.5, 7)), TRAINERS, _TRAINERS),
    *_layer("conv1", "1->6 k5", (64, 1024), _goals((5, 8)), _goals((6, 9), (6,))),
    *_layer("conv2", "6->16 k5", (64, 1024), _goals((1.8, 2.2)), _goals((3.5, 5), (3,))),
    *_layer("conv3x32", "3->32 k3 p1 at 32x32", (64, 1024), _goals((2, 3)), _goals((2, 3))),
    *_layer("stem224", "3->64 k7 s2 p3 at 224x224, pool 3 s2 p1", (8,), _goals((1.2, 1.5)), _goals((1.2, 2))),
    *(
        Target(f"{what}: {step}", cases, mode, (), _goals((0.97, 1.05), (0.97,)))
        for what, cases in (
            ("64->64, 128->256, 256->256", ("conv64x64", "conv128x256", "conv256x256")),
            ("every other layer and size", ()),
        )
        for mode, step in (("forward", "forward"), ("training", "forward + backward"))
    ),
]
# Of the networks of small_networks.py, at the batch size and number of threads where it is least. Stock's peak memory
# over ours, whatever the instructions. One thread alone over all threads beside a neighbour, of a pass in both
# directions or of inference.
NETWORKS = ("small networks: forward + backward, the median network, over stock eager", _goals((1.6,), (1.5,)))
MEMORY = ("peak memory of a training step at batch 4096: stock over fused", _goals((3, 5), (3, 5)))
NEIGHBOUR = ("a busy neighbour, batch {}: 1 thread alone over all threads disturbed", _goals((0.9,), (0.9,)))
NEIGHBOUR_BATCHES, NEIGHBOUR_MODES = (64, 256), ("forward", "training")


@dataclass(frozen=True)
class Outcome:
    """A target, the worst value found and where; None where it was not measured."""

    what: str
    goal: Goal
    measured: float | None
    where: str
    share: bool = False

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.goal.stretch is not None and self.measured >= self.goal.stretch:
            return "met, stretch too"
        return "met" if self.measured >= self.goal.target else "missed"

    def cells(self) -> list[str]:
        """As the columns of a table."""
        values = (self.goal.target, self.goal.stretch, self.measured)
        texts = ["-" if v is None else f"{v:.0%}" if self.share else f"{v:.2f}x" for v in values]
        return [self.what, *texts, self.where or "-", self.verdict]


HEADER = ("what", "target", "stretch", "measured", "worst at", "verdict")


def why_none(content: dict[str, Any]) -> str | None:
    """Why a machine's results are held against no targets, or None."""
    used = instruction_set(content)
    if used is None:
        return "No targets: ours and stock were held to different instruction sets."
    if used == "default":
        return "No targets: the baseline set is there so that the package runs on any processor."
    return None


def outcomes(content: dict[str, Any]) -> list[Outcome]:
    """Every target of its instruction set against a machine's results, as `lenet_ext.bench.shown.of_run` makes them."""
    used = instruction_set(content) or ""
    targets = [target for target in TARGETS if used in target.goals]
    cells = workloads(content, "net", "layers", "general")
    named = {
        (case, target.mode, batch)
        for target in targets
        for case in target.cases
        for batch in target.batches or {batch for _, _, batch, _ in cells}
    }
    found = []
    for target in targets:
        values = list(_values(target, cells, named))
        measured, where = min(values) if values else (None, "")
        found.append(Outcome(target.what, target.goals[used], measured, where, share=not target.over))
    others = [(*NETWORKS, _networks(content)), (*MEMORY, _memory(content))]
    others += [(NEIGHBOUR[0].format(batch), NEIGHBOUR[1], _neighbour(content, batch)) for batch in NEIGHBOUR_BATCHES]
    for what, goals, values in others:
        if used in goals:
            found.append(Outcome(what, goals[used], *min(values, default=(None, ""))))
    return found


def _networks(content: dict[str, Any]) -> list[tuple[float, str]]:
    """The median network at each batch size and number of threads."""
    ratios: dict[tuple[int, int], list[float]] = defaultdict(list)
    for (_, mode, batch, threads), rows in workloads(content, "networks").items():
        row = fastest(rows, EAGER)
        if mode == "training" and row is not None:
            ratios[batch, threads].append(row["over"])
    return [
        (statistics.median(values), f"batch {batch}, {threads} thread{'s' * (threads > 1)}")
        for (batch, threads), values in ratios.items()
    ]


def _memory(content: dict[str, Any]) -> list[tuple[float, str]]:
    """Each layout of stock: the more frugal one counts."""
    bytes_ = {row["provider"]: row["median_bytes"] for row in content.get("memory", ())}
    return [(bytes_[name] / bytes_["fused"], name) for name in EAGER] if set(bytes_) >= {"fused", *EAGER} else []


def _neighbour(content: dict[str, Any], batch: int) -> list[tuple[float, str]]:
    return [
        (row["speedup"], f"{row['mode']}, {row['threads']} threads")
        for row in content.get("neighbour", ())
        if row["provider"] == "fused" and row["batch"] == batch and row["mode"] in NEIGHBOUR_MODES
    ]


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
        ours, other = fastest(rows, FUSED), fastest(rows, target.over)
        if not target.over and ours is not None and ours["peak_share"] is not None:
            yield ours["peak_share"], where
        elif other is not None:
            yield other["over"], f"{where}, against {other['provider']}"


def print_targets(content: dict[str, Any], console: Console) -> None:
    """Prints the verdicts on what a run has measured, if there are any.

    Args:
        content: as `lenet_ext.bench.shown.of_run` makes it.
        console: to print on.
    """
    found = [outcome for outcome in outcomes(content) if outcome.measured is not None]
    if not found:
        return
    table = Table(*HEADER, title=f"targets, and the worst of what was measured; {processor_title(content)}")
    for outcome in found:
        table.add_row(*outcome.cells())
    console.print(table)
