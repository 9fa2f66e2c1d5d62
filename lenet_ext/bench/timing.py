"""Taking time.

The programs that are compared take turns, round by round, in one process: a clock that changes its frequency or a
neighbor that takes a core hits all of them alike. A round times each program over as many calls as take a few
milliseconds. Reported are the median and the 20th and 80th percentile over the rounds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lenet_ext.environment.device import synchronize

__all__ = ["Effort", "Samples", "cold_time_us", "percentile", "ratio", "time_interleaved"]

_COLD_BYTES = 2**28  # more than the last cache of any GPU holds
_LOOK_S, _PATIENCE_S = 0.005, 0.5  # how long it is looked whether any thread works, and how long that is waited for


@dataclass(frozen=True)
class Effort:
    """How long to measure one workload.

    Args:
        sample_s: what one program gets in a round, at least one call.
        rounds: the most rounds.
        min_rounds: the least, whatever they take.
        budget_s: no new round is begun after that.
    """

    sample_s: float = 0.02
    rounds: int = 31
    min_rounds: int = 7
    budget_s: float = 4.0


@dataclass(frozen=True)
class Samples:
    """Microseconds per call, one value per round, and how many calls each of them averages."""

    times_us: tuple[float, ...]
    calls: int

    @property
    def median_us(self) -> float:
        return statistics.median(self.times_us)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks.

    Example:
        >>> percentile([1.0, 2.0, 3.0], 0.5), percentile([1.0, 2.0], 0.2)
        (2.0, 1.2)
    """
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio(slower: Samples, faster: Samples) -> tuple[float, float, float]:
    """How many times faster: median, 20th and 80th percentile of the ratios within each round.

    Example:
        >>> ratio(Samples((4.0, 6.0), 1), Samples((2.0, 2.0), 1))[0]
        2.5
    """
    ratios = [slow / fast for slow, fast in zip(slower.times_us, faster.times_us, strict=True)]
    return statistics.median(ratios), percentile(ratios, 0.2), percentile(ratios, 0.8)


def time_interleaved(
    programs: dict[str, Callable[[], object]],
    device: torch.device,
    effort: Effort,
    *,
    meters: dict[str, Callable[[], float]] | None = None,
    settle: bool = False,
    single_us: Callable[[Callable[[], object], torch.device], float] | None = None,
) -> dict[str, Samples]:
    """Times programs against each other.

    Args:
        programs: each computes its workload once per call; warmed up by the caller.
        device: waited for before the clock is read.
        effort: how long.
        meters: take their turn in each round as well, but tell microseconds by a clock of their own.
        settle: wait before each turn, not counted, until no thread of this process works. Several of the libraries have
            thread pools whose threads keep spinning after the work is done, GNU OpenMP's for milliseconds and ONNX
            Runtime's for some fifty, on the cores of whoever comes next.
        single_us: takes the time of one call at a turn, in place of several by the clock of this module.

    Returns:
        For each program and meter its samples, all with the same number of rounds.

    Example:
        >>> effort = Effort(sample_s=0.001, rounds=3, min_rounds=3)
        >>> len(time_interleaved({"nothing": lambda: None}, torch.device("cpu"), effort)["nothing"].times_us)
        3
    """
    meters = meters or {}
    calls = dict.fromkeys(programs, 1)
    if single_us is None:
        calls = {name: _calls_for(run, device, effort.sample_s) for name, run in programs.items()}
    calls.update(dict.fromkeys(meters, 1))
    names = [*programs, *meters]
    times: dict[str, list[float]] = {name: [] for name in names}
    started, waited = time.perf_counter(), 0.0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in one program's turn would be counted as its time
    try:
        for number in range(effort.rounds):
            if number >= effort.min_rounds and time.perf_counter() - started - waited > effort.budget_s:
                break
            # Each round begins with another program, so that none always runs in the wake of the same one.
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if settle:
                    waited += _wait_for_idle_threads()
                if name in meters:
                    times[name].append(meters[name]())
                    continue
                if single_us is not None:
                    times[name].append(single_us(programs[name], device))
                    continue
                if calls[name] > 1:
                    # Its threads are asleep and its data is out of the caches, which is nobody's everyday. With one
                    # call to a turn the call is so long that this does not show.
                    programs[name]()
                times[name].append(_time_us(programs[name], calls[name], device))
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(tuple(times[name]), calls[name]) for name in names}


def _wait_for_idle_threads() -> float:
    """The seconds it took. Whoever keeps working for longer than `_PATIENCE_S` does so on purpose."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < _PATIENCE_S:
        worked = time.process_time()
        time.sleep(_LOOK_S)
        if time.process_time() - worked < _LOOK_S / 10:
            break
    return time.perf_counter() - begin


def _calls_for(run: Callable[[], object], device: torch.device, sample_s: float) -> int:
    # The lesser of two: the first call after the other programs' turns finds cold caches.
    once_s = min(_time_us(run, 1, device) for _ in range(2)) / 1e6
    return max(1, min(100_000, round(sample_s / max(once_s, 1e-7))))


def _time_us(run: Callable[[], object], calls: int, device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter_ns()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter_ns() - begin) / 1e3 / calls


def cold_time_us(run: Callable[[], object], device: torch.device) -> float:
    """Microseconds of one call on a GPU that has just overwritten its caches, by the GPU's own clock.

    Args:
        run: what to time.
        device: the GPU; for another device there is no such clock.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    synchronize(device)
    # While these are written, the host is at the launches already: as little as can be of its time is counted.
    torch.empty(_COLD_BYTES, dtype=torch.uint8, device=device).fill_(1)
    begin.record()
    run()
    end.record()
    synchronize(device)
    return begin.elapsed_time(end) * 1e3
