"""Goes through cases, modes and batch sizes; what disagrees with stock is an error before it is a number."""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lenet_ext.bench.cases import CASES, Workload
from lenet_ext.bench.providers import DEFAULT_PROVIDERS, PROVIDERS, Program, Provider
from lenet_ext.bench.timing import Effort, Samples, ratio, time_interleaved

__all__ = ["Comparison", "Plan", "Report", "Row", "run_benchmarks"]

# Relative error in the Euclidean norm. A gradient gets more: two neighbors in a pool window can be equal to within
# rounding, and then either is a right winner and its gradient goes to another place; about one window in a million.
_OUTPUT_TOLERANCE = 1e-4
_GRADIENT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        cases, modes, batch_sizes, providers: by name.
        effort: for one workload.
        slow_cases, slow_batch_sizes: the only ones for which providers that compile for seconds are measured.
        slow_budget_s: no such provider is begun once they have taken that long to get ready.
    """

    cases: tuple[str, ...] = ("conv1", "conv2", "fc1", "fc2", "fc3", "net")
    modes: tuple[str, ...] = ("forward", "training")
    batch_sizes: tuple[int, ...] = (1, 8, 64, 256, 1024, 4096)
    providers: tuple[str, ...] = DEFAULT_PROVIDERS
    effort: Effort = field(default_factory=Effort)
    slow_cases: tuple[str, ...] | None = None
    slow_batch_sizes: tuple[int, ...] | None = None
    slow_budget_s: float = math.inf

    @classmethod
    def quick(cls) -> Plan:
        """Less than a minute on two cores."""
        return cls(
            cases=("conv1", "conv2", "fc1", "net"),
            batch_sizes=(1, 64, 1024),
            effort=Effort(sample_s=0.006, rounds=15, min_rounds=5, budget_s=0.4),
            slow_cases=("net",),
            slow_batch_sizes=(64,),
            slow_budget_s=10.0,
        )


@dataclass(frozen=True)
class Row:
    """One provider at one workload."""

    case: str
    mode: str
    batch: int
    provider: str
    samples: Samples


@dataclass(frozen=True)
class Comparison:
    """Ours against the fastest of stock, in ratios within the same rounds (above 1: ours is faster)."""

    case: str
    mode: str
    batch: int
    best_stock: str
    speedup: float
    speedup_p20: float
    speedup_p80: float


@dataclass
class Report:
    """Everything that was found. `load` is the load average before the first measurement, where the system tells it."""

    plan: Plan
    device: torch.device
    rows: list[Row] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    slow_s: float = 0.0
    load: float | None = None


def run_benchmarks(plan: Plan, device: torch.device, on_workload: Callable[[str], None] | None = None) -> Report:
    """Measures a plan.

    Args:
        plan: what.
        device: where.
        on_workload: told what comes next.

    Returns:
        Rows, comparisons, and which provider was left out and why.

    Raises:
        ValueError: the plan names something unknown.
        RuntimeError: a provider computes something else than stock eager does, or stock or ours cannot run at all.

    Example:
        >>> plan = Plan(cases=("fc3",), modes=("forward",), batch_sizes=(1,), providers=("fused", "eager"))
        >>> [row.provider for row in run_benchmarks(plan, torch.device("cpu")).rows]  # doctest: +SKIP
        ['fused', 'eager']
    """
    for kind, names, known in (
        ("cases", plan.cases, CASES),
        ("modes", plan.modes, ("forward", "training")),
        ("providers", plan.providers, PROVIDERS),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"{kind} must be among {', '.join(known)}, found {name!r}")
    report = Report(plan, device, load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None)
    providers = []
    for name in plan.providers:
        reason = PROVIDERS[name].unavailable(device)
        if reason is None:
            providers.append(PROVIDERS[name])
        else:
            report.skipped[name] = reason
    with _cudnn_settings():
        _measure_all(report, providers, on_workload)
    return report


def _measure_all(report: Report, providers: Sequence[Provider], on_workload: Callable[[str], None] | None) -> None:
    plan, device = report.plan, report.device
    for name in plan.cases:
        case = CASES[name]
        for mode in plan.modes:
            for batch in case.batch_sizes or plan.batch_sizes:
                if on_workload is not None:
                    on_workload(f"{name} {mode} batch {batch}")
                chosen = [p for p in providers if mode in p.modes and _affordable(p, plan, name, batch)]
                work = Workload.make(case, mode, batch, device)
                _measure(report, work, [p for p in chosen if p.name not in report.skipped])


@contextlib.contextmanager
def _cudnn_settings() -> Iterator[None]:
    """Stock at its best in float32: cuDNN may try its algorithms, but must not round the inputs to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _affordable(provider: Provider, plan: Plan, case: str, batch: int) -> bool:
    if not provider.slow_start:
        return True
    return (plan.slow_cases is None or case in plan.slow_cases) and (
        plan.slow_batch_sizes is None or batch in plan.slow_batch_sizes
    )


def _measure(report: Report, work: Workload, providers: Sequence[Provider]) -> None:
    if any(provider.slow_start for provider in providers):
        # Compiled code of earlier workloads counts against the limit of recompilations of the same forward().
        torch._dynamo.reset()
    expected = _expected(work)
    programs: dict[str, Program] = {}
    for provider in providers:
        started = time.perf_counter()
        if provider.slow_start and report.slow_s > report.plan.slow_budget_s:
            report.skipped[provider.name] = (
                f"{work.case.name} {work.mode} and what follows: compiling took {report.slow_s:.0f} s already"
            )
            continue
        try:
            with _quiet():
                program = provider.prepare(work)
                for _ in range(3):  # compiles, allocates, fills caches
                    program.run()
        except Exception as error:
            if provider.name in ("fused", "eager"):
                raise
            text = " ".join(str(error).split())
            report.skipped[provider.name] = f"{type(error).__name__}: {text[:200]}"
            continue
        if provider.slow_start:
            report.slow_s += time.perf_counter() - started
        _compare(provider, work, program.outputs(), expected)
        programs[provider.name] = program
    samples = time_interleaved({name: p.run for name, p in programs.items()}, work.device, report.plan.effort)
    for name, taken in samples.items():
        report.rows.append(Row(work.case.name, work.mode, work.batch, name, taken))
    stock = [name for name in samples if PROVIDERS[name].stock]
    if "fused" in samples and stock:
        best = min(stock, key=lambda name: samples[name].median_us)
        report.comparisons.append(
            Comparison(work.case.name, work.mode, work.batch, best, *ratio(samples[best], samples["fused"]))
        )


def _expected(work: Workload) -> list[Tensor]:
    program = PROVIDERS["eager"].prepare(work)
    program.run()
    return program.outputs()


def _compare(provider: Provider, work: Workload, found: list[Tensor], expected: list[Tensor]) -> None:
    where = f"{work.case.name}, {work.mode}, batch {work.batch}: {provider.name}"
    if len(found) != len(expected):
        raise RuntimeError(f"{where} gives {len(found)} results, stock eager {len(expected)}")
    for number, (ours, stock) in enumerate(zip(found, expected, strict=True)):
        what = "output" if number == 0 else f"gradient {number}"
        if ours.shape != stock.shape:
            raise RuntimeError(f"{where}: {what} has shape {tuple(ours.shape)}, stock eager {tuple(stock.shape)}")
        scale = torch.linalg.vector_norm(stock.double()).item()
        error = torch.linalg.vector_norm(ours.double() - stock.double()).item()
        tolerance = _OUTPUT_TOLERANCE if number == 0 else _GRADIENT_TOLERANCE
        if not error <= tolerance * scale + 1e-6:  # so written, NaN fails
            raise RuntimeError(
                f"{where}: {what} differs from stock eager by {error:.2e} at a norm of {scale:.2e}, "
                f"tolerance {tolerance:.0e}: not timed"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Compilers and exporters talk; what matters of it arrives as an exception."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
