"""Goes through cases, modes and batch sizes; what disagrees with stock is an error before it is a number."""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lenet_ext.bench.cases import CASES, MODES, Case, Workload
from lenet_ext.bench.flops import flops_per_image
from lenet_ext.bench.peak import PeakUnavailableError, peak_meter
from lenet_ext.bench.providers import DEFAULT_PROVIDERS, PROVIDERS, Program, Provider
from lenet_ext.bench.timing import Effort, Samples, ratio, time_interleaved

__all__ = ["Comparison", "Plan", "Report", "Row", "run_benchmarks"]

# Relative error in the Euclidean norm. A gradient gets more: two neighbors in a pool window can be equal to within
# rounding, and then either is a right winner and its gradient goes to another place; about one window in a million.
_OUTPUT_TOLERANCE = 1e-4
_GRADIENT_TOLERANCE = 1e-2
# GNU OpenMP's threads spin for some milliseconds after a parallel region before they sleep.
_PAUSE_S = 0.005
_PEAK = "peak"
_SERVING = ("torchscript", "torchscript_cl", "onnxruntime", "openvino")
FUSED_LAYOUTS = {"fused", "fused_channels_last"}
"""Of which the faster one is compared with others, where a group has both."""


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
            "overhead": cls(cases, providers=DEFAULT_PROVIDERS[:2]),
        }
        return plans[name]


@dataclass(frozen=True)
class Row:
    """One provider at one workload.

    Attributes:
        samples: microseconds per call.
        fused_speedup: median and 20th and 80th percentile of its time over that of ``fused``, within each round.
        peak_share: median share of the processor's peak, within each round; None where either is unknown.
    """

    case: str
    mode: str
    batch: int
    threads: int
    provider: str
    samples: Samples
    fused_speedup: tuple[float, float, float] | None = None
    peak_share: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Ours against the fastest others, in ratios within the same rounds (above 1: ours is faster).

    Attributes:
        best_fused: the layout of ours that is compared, the faster one where both were measured.
        best_eager, speedup: the faster layout of stock eager.
        best_peer, peer_speedup: the fastest of all, stock eager included.
        peak_gflops: what the processor can do, in the same rounds.
    """

    case: str
    mode: str
    batch: int
    threads: int
    best_fused: str
    best_eager: str
    speedup: float
    speedup_p20: float
    speedup_p80: float
    best_peer: str
    peer_speedup: float
    peer_speedup_p20: float
    peer_speedup_p80: float
    peak_gflops: float | None = None


@dataclass
class Report:
    """Everything that was found.

    `load` is the load average before the first measurement, where the system tells it. `skipped` says what was left out
    and why; `failed` are the providers that are not tried again for a case and mode.
    """

    plan: Plan
    device: torch.device
    rows: list[Row] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: set[tuple[str, str, str]] = field(default_factory=set)
    slow_s: float = 0.0
    load: float | None = None


def run_benchmarks(
    plan: Plan,
    device: torch.device,
    on_workload: Callable[[str], None] | None = None,
    on_measured: Callable[[Report], None] | None = None,
) -> Report:
    """Measures a plan.

    Args:
        plan: what.
        device: where.
        on_workload: told what comes next.
        on_measured: given the report after each workload.

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
        ("modes", plan.modes, MODES),
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
    before = torch.get_num_threads()
    try:
        with _cudnn_settings():
            for threads in plan.threads or (before,):
                torch.set_num_threads(threads)
                _measure_all(report, providers, threads, on_workload, on_measured)
    finally:
        torch.set_num_threads(before)
    return report


def _measure_all(
    report: Report,
    providers: Sequence[Provider],
    threads: int,
    on_workload: Callable[[str], None] | None,
    on_measured: Callable[[Report], None] | None,
) -> None:
    plan, device = report.plan, report.device
    meters = _peak_meters(report, threads)
    slow_threads = plan.slow_threads or threads == max(plan.threads or (threads,))
    for name in plan.cases:
        case = CASES[name]
        for mode in plan.modes:
            for batch in _batch_sizes(plan, case):
                if (name, mode, batch, threads) in plan.done:
                    continue
                if on_workload is not None:
                    on_workload(f"{name} {mode} batch {batch}, threads: {threads}")
                chosen = [
                    p
                    for p in providers
                    if mode in p.modes
                    and (p.name, name, mode) not in report.failed
                    and (not p.slow_start or (slow_threads and _affordable(plan, name, batch)))
                ]
                # Everything is prepared anew for each number of threads: compiled code and the sessions of other
                # libraries have it built in.
                _measure(report, Workload.make(case, mode, batch, device), chosen, threads, meters)
                if on_measured is not None:
                    on_measured(report)


def _batch_sizes(plan: Plan, case: Case) -> tuple[int, ...]:
    if case.batch_sizes is None:
        return plan.batch_sizes
    return tuple(batch for batch in case.batch_sizes if batch in plan.batch_sizes)


def _peak_meters(report: Report, threads: int) -> dict[str, Callable[[], float]]:
    if report.device.type != "cpu":
        return {}
    try:
        return {_PEAK: peak_meter(threads)}
    except PeakUnavailableError as error:
        report.skipped[_PEAK] = str(error)
        return {}


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


def _affordable(plan: Plan, case: str, batch: int) -> bool:
    return (plan.slow_cases is None or case in plan.slow_cases) and (
        plan.slow_batch_sizes is None or batch in plan.slow_batch_sizes
    )


def _measure(
    report: Report,
    work: Workload,
    providers: Sequence[Provider],
    threads: int,
    meters: dict[str, Callable[[], float]],
) -> None:
    if any(provider.slow_start for provider in providers):
        # Compiled code of earlier workloads counts against the limit of recompilations of the same forward().
        torch._dynamo.reset()
    expected = _expected(work)
    programs: dict[str, Program] = {}
    for provider in providers:
        started = time.perf_counter()
        where = f"{work.case.name} {work.mode}"
        if provider.slow_start and report.slow_s > report.plan.slow_budget_s:
            report.skipped.setdefault(
                provider.name, f"{where} and what follows: compiling took {report.slow_s:.0f} s already"
            )
            continue
        try:
            with _quiet():
                program = provider.prepare(work)
                program.run()  # compiles, allocates, fills caches
            if provider.slow_start:
                report.slow_s += time.perf_counter() - started
            _warm_up(program)
        except Exception as error:
            if provider.name in ("fused", "eager"):
                raise
            report.failed.add((provider.name, work.case.name, work.mode))
            text = " ".join(str(error).split())
            report.skipped[f"{provider.name}, {where}"] = f"{type(error).__name__}: {text[:200]}"
            continue
        _compare(provider, work, program.outputs(), expected)
        programs[provider.name] = program
    samples = time_interleaved(
        {name: program.run for name, program in programs.items()},
        work.device,
        report.plan.effort,
        meters=meters,
        pause_s=_PAUSE_S if work.device.type == "cpu" and threads > 1 else 0.0,
    )
    _record(report, work, threads, samples, samples.pop(_PEAK, None))


def _warm_up(program: Program) -> None:
    # Compiled code and TorchScript specialize on the second call. For what takes long fewer are enough.
    started = time.perf_counter()
    for _ in range(3):
        program.run()
        if time.perf_counter() - started > 0.3:
            break


def _record(report: Report, work: Workload, threads: int, samples: dict[str, Samples], peak: Samples | None) -> None:
    key = (work.case.name, work.mode, work.batch, threads)
    flops = flops_per_image(work.case, work.mode)
    speedups: dict[str, tuple[float, float, float]] = {}
    for name, taken in samples.items():
        share = None
        if peak is not None and flops is not None:
            # The time that the peak would allow, over the time taken.
            at_peak = Samples(tuple(us * flops * work.batch / 1e9 for us in peak.times_us), 1)
            share = ratio(at_peak, taken)[0]
        if "fused" in samples:
            speedups[name] = ratio(taken, samples["fused"])
        report.rows.append(Row(*key, name, taken, speedups.get(name), share))
    others = [name for name in samples if PROVIDERS[name].kind != "fused"]
    eager = [name for name in others if PROVIDERS[name].kind == "eager"]
    if speedups and eager:

        def fastest(names: Iterable[str]) -> str:
            return min(names, key=lambda name: samples[name].median_us)

        fused, best_eager, best_peer = fastest(FUSED_LAYOUTS & samples.keys()), fastest(eager), fastest(others)
        gflops = None if peak is None else 1e6 / peak.median_us
        over_eager, over_peer = (ratio(samples[name], samples[fused]) for name in (best_eager, best_peer))
        report.comparisons.append(Comparison(*key, fused, best_eager, *over_eager, best_peer, *over_peer, gflops))


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
