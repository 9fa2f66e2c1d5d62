"""What to measure: the full run, group by group, and the quick one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from lenet_ext.bench.cases import CASES, MODES
from lenet_ext.bench.providers import DEFAULT_PROVIDERS, PROVIDERS, Provider
from lenet_ext.bench.timing import Effort

__all__ = ["Plan"]

_SERVING = ("torchscript", "torchscript_cl", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        cases, modes, batch_sizes, providers: by name.
        threads: of torch, one after the other; empty leaves its choice.
        effort: for one workload.
        slow_cases, slow_batch_sizes: the only ones for which providers that compile for seconds are measured.
        slow_threads: whether those are measured for every number of threads, or for the largest alone.
        slow_budget_s: no such provider is begun once they have taken that long to get ready.
        done: workloads (case, mode, batch, threads) to leave out.
    """

    cases: tuple[str, ...] = ("net",)
    modes: tuple[str, ...] = MODES
    batch_sizes: tuple[int, ...] = (1, 8, 64, 256, 1024, 4096)
    providers: tuple[str, ...] = DEFAULT_PROVIDERS
    threads: tuple[int, ...] = ()
    effort: Effort = field(default_factory=Effort)
    slow_cases: tuple[str, ...] | None = None
    slow_batch_sizes: tuple[int, ...] | None = None
    slow_threads: bool = True
    slow_budget_s: float = math.inf
    done: frozenset[tuple[str, str, int, int]] = frozenset()

    @classmethod
    def quick(cls) -> Plan:
        """Less than a minute on two cores."""
        return cls(
            cases=("net", "conv1", "conv2", "fc1"),
            batch_sizes=(1, 64, 1024),
            effort=Effort(sample_s=0.006, rounds=15, min_rounds=5, budget_s=0.4),
            slow_cases=("net",),
            slow_batch_sizes=(64,),
            slow_budget_s=10.0,
        )

    @classmethod
    def group(cls, name: str) -> Plan:
        """Everything about one of the groups of `CASES`, in about ten minutes on two cores.

        Raises:
            KeyError: there is no such group.
        """
        cases = tuple(case.name for case in CASES.values() if case.group == name)
        # Compiling takes longer than measuring: away from the whole net it is limited to where the answer matters.
        plans = {
            "net": cls(cases, providers=tuple(name for name in PROVIDERS if name != "fused_channels_last")),
            "layers": cls(
                cases,
                providers=(*DEFAULT_PROVIDERS[:3], "fused_channels_last", "compile_cl", *_SERVING),
                effort=Effort(rounds=21, budget_s=2.0),
                slow_cases=("conv1", "conv2"),
                slow_batch_sizes=(64, 1024),
                slow_threads=False,
            ),
            "general": cls(
                cases,
                providers=(*DEFAULT_PROVIDERS[:3], "fused_channels_last", "compile_cl", *_SERVING),
                effort=Effort(rounds=15, budget_s=2.0),
                slow_batch_sizes=(8, 64),
                slow_threads=False,
            ),
            "networks": cls(
                cases,
                providers=(*DEFAULT_PROVIDERS[:3], "fused_channels_last"),
                effort=Effort(rounds=15, budget_s=3.0),
            ),
            "overhead": cls(cases, providers=DEFAULT_PROVIDERS[:2]),
            "kernelbench": cls(cases, providers=(*DEFAULT_PROVIDERS, "compile_cl", "compile_max")),
        }
        return plans[name]

    def check(self) -> None:
        """Compares names with what there is.

        Raises:
            ValueError: something is unknown.
        """
        for kind, names, known in (
            ("cases", self.cases, CASES),
            ("modes", self.modes, MODES),
            ("providers", self.providers, PROVIDERS),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"{kind} must be among {', '.join(known)}, found {name!r}")

    def workloads(self, threads: int) -> Iterator[tuple[str, str, int]]:
        """Case, mode and batch size of all that is not done, in order."""
        for name in self.cases:
            sizes = CASES[name].batch_sizes
            for mode in self.modes:
                if mode not in CASES[name].modes or (mode == "step" and CASES[name].group != "net"):
                    continue
                for batch in self.batch_sizes if sizes is None else sizes:
                    if batch in self.batch_sizes and (name, mode, batch, threads) not in self.done:
                        yield name, mode, batch

    def includes(self, provider: Provider, case: str, mode: str, batch: int, threads: int) -> bool:
        """Whether a provider is measured for a workload."""
        if mode not in provider.modes:
            return False
        return not provider.slow_start or (
            (self.slow_cases is None or case in self.slow_cases)
            and (self.slow_batch_sizes is None or batch in self.slow_batch_sizes)
            and (self.slow_threads or threads == max(self.threads or (threads,)))
        )
