"""Carries out a plan: makes each workload ready for everybody, compares, times, and puts the times in relation."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lenet_ext.bench.agreement import compare, stock_outputs
from lenet_ext.bench.cases import CASES, Rules, Workload
from lenet_ext.bench.flops import flops_per_image
from lenet_ext.bench.peak import PeakUnavailableError, peak_meter
from lenet_ext.bench.plan import Plan
from lenet_ext.bench.providers import FUSED_LAYOUTS, PROVIDERS, Program, Provider, surroundings
from lenet_ext.bench.timing import Samples, cold_time_us, ratio, time_interleaved

__all__ = ["Comparison", "Report", "Row", "run_benchmarks"]

_PEAK = "peak"


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
    and why; `failed` are the providers that are not tried again for a case and mode; `slow_s` is what the slow ones
    have taken to get ready.
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
    plan.check()
    _keep_compiled_code_apart()
    report = Report(plan, device, load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None)
    elsewhere = {name: CASES[name].device_types for name in plan.cases if device.type not in CASES[name].device_types}
    report.skipped.update({name: f"measured on {' and '.join(types)} alone" for name, types in elsewhere.items()})
    providers = _available(report)
    before = torch.get_num_threads()
    try:
        for threads in plan.threads or (before,):
            torch.set_num_threads(threads)
            meters = _peak_meters(report, threads)
            for case, mode, batch in plan.workloads(threads):
                if case in elsewhere:
                    continue
                if on_workload is not None:
                    on_workload(f"{case} {mode} batch {batch}, threads: {threads}")
                # Everything is prepared anew for each number of threads: compiled code and the sessions of other
                # libraries have it built in.
                chosen = [p for p in providers if plan.includes(p, case, mode, batch, threads)]
                with _cudnn_settings(CASES[case].rules):
                    _measure(report, Workload.make(CASES[case], mode, batch, device), chosen, threads, meters)
                if on_measured is not None:
                    on_measured(report)
    finally:
        torch.set_num_threads(before)
    return report


def _keep_compiled_code_apart() -> None:
    """torch.compile keeps its code by what it computes, not by the instruction set that it was told to write for: code
    for another one writes past the end of its buffers. Before anything of torch.compile runs, which settles the place.
    """
    forced = os.environ.get("ATEN_CPU_CAPABILITY")
    if forced:
        cache = os.path.join(tempfile.gettempdir(), f"torchinductor-{forced}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)


def _available(report: Report) -> list[Provider]:
    providers = []
    for name in report.plan.providers:
        reason = PROVIDERS[name].unavailable(report.device)
        if reason is None:
            providers.append(PROVIDERS[name])
        else:
            report.skipped[name] = reason
    return providers


def _peak_meters(report: Report, threads: int) -> dict[str, Callable[[], float]]:
    if report.device.type != "cpu":
        return {}
    try:
        return {_PEAK: peak_meter(threads)}
    except PeakUnavailableError as error:
        report.skipped[_PEAK] = str(error)
        return {}


@contextlib.contextmanager
def _cudnn_settings(rules: Rules) -> Iterator[None]:
    """Stock at its best: cuDNN may try its algorithms, but rounds the inputs to TF32 only where the rules say so."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=rules.tf32_convolutions):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _measure(
    report: Report,
    work: Workload,
    providers: Sequence[Provider],
    threads: int,
    meters: dict[str, Callable[[], float]],
) -> None:
    """One workload: makes everybody ready, compares, lets them take turns, adds rows and a comparison."""
    if any(provider.slow_start for provider in providers):
        # Compiled code of earlier workloads counts against the limit of recompilations of the same forward().
        torch._dynamo.reset()
    expected = stock_outputs(work)
    programs: dict[str, Program] = {}
    for provider in providers:
        program = _prepare(report, work, provider)
        if program is not None:
            compare(provider.name, work, program.outputs(), expected)
            programs[provider.name] = program
    with surroundings(work.mode):
        samples = time_interleaved(
            {name: program.run for name, program in programs.items()},
            work.device,
            report.plan.effort,
            meters=meters,
            settle=work.device.type == "cpu" and threads > 1,
            single_us=cold_time_us if work.case.rules.cold else None,
        )
    _record(report, work, threads, samples, samples.pop(_PEAK, None))


def _prepare(report: Report, work: Workload, provider: Provider) -> Program | None:
    """A program that has run, or None with the reason in the report."""
    where = f"{work.case.name} {work.mode}"
    attempt = (provider.name, work.case.name, work.mode)
    if attempt in report.failed:
        return None
    if provider.slow_start and report.slow_s > report.plan.slow_budget_s:
        reason = f"{where} and what follows: compiling took {report.slow_s:.0f} s already"
        report.skipped.setdefault(provider.name, reason)
        return None
    started = time.perf_counter()
    try:
        with _quiet():
            program = provider.prepare(work)
            with surroundings(work.mode):
                program.run()  # compiles, allocates, fills caches
        if provider.slow_start:
            report.slow_s += time.perf_counter() - started
        with surroundings(work.mode):
            _warm_up(program)
    except Exception as error:
        if provider.name in ("fused", "eager"):
            raise
        report.failed.add(attempt)
        text = " ".join(str(error).split())
        report.skipped[f"{provider.name}, {where}"] = f"{type(error).__name__}: {text[:200]}"
        return None
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Compilers and exporters talk; what matters of it arrives as an exception."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


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
    for name, taken in samples.items():
        share = None
        if peak is not None and flops is not None:
            # The time that the peak would allow, over the time taken.
            at_peak = Samples(tuple(us * flops * work.batch / 1e9 for us in peak.times_us), 1)
            share = ratio(at_peak, taken)[0]
        speedup = ratio(taken, samples["fused"]) if "fused" in samples else None
        report.rows.append(Row(*key, name, taken, speedup, share))

    def fastest(names: Iterable[str]) -> str:
        return min(names, key=lambda name: samples[name].median_us)

    others = [name for name in samples if PROVIDERS[name].kind != "fused"]
    eager = [name for name in others if PROVIDERS[name].kind == "eager"]
    if "fused" in samples and eager:
        fused = fastest(name for name in FUSED_LAYOUTS if name in samples)
        best_eager, best_peer = fastest(eager), fastest(others)
        gflops = None if peak is None else 1e6 / peak.median_us
        over_eager, over_peer = (ratio(samples[name], samples[fused]) for name in (best_eager, best_peer))
        report.comparisons.append(Comparison(*key, fused, best_eager, *over_eager, best_peer, *over_peer, gflops))
