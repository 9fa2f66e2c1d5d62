"""All threads while another process keeps one core busy, against one thread that is left alone.

A program that gives each of its threads a fixed share of the work waits for the thread whose core is taken, and can
then be slower than it would have been on one thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lenet_ext.bench.cases import CASES, MODES, Workload
from lenet_ext.bench.providers import PROVIDERS, Program, surroundings
from lenet_ext.bench.timing import Effort, percentile, ratio, time_interleaved
from lenet_ext.environment.system import cpu_count

__all__ = ["measure_neighbour", "neighbour_unavailable"]

_PROVIDERS = ("fused", "eager", "channels_last")
_BATCHES = (64, 256)
# Ends by itself when its parent has gone.
_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"
_SETTLE_S = 0.01
# Long enough for whoever finds out in its first tenths of a second that a core is taken. An epoch is longer.
_EFFORT = Effort(sample_s=0.5, rounds=7, min_rounds=5, budget_s=60.0)


def neighbour_unavailable(threads: int) -> str | None:
    """Why it cannot be measured here with that many threads, or None."""
    if not sys.platform.startswith("linux"):
        return "processes are pinned to cores on Linux only"
    if cpu_count() < 2 or threads < 2:
        return f"needs two cores and two threads, found {cpu_count()} and {threads}"
    return None


def measure_neighbour(threads: int, effort: Effort = _EFFORT) -> list[dict[str, Any]]:
    """One row per mode, batch size and provider: microseconds in three conditions, and the ratio that matters.

    ``speedup`` is the time of one thread undisturbed over that of `threads` threads beside the neighbour, within each
    round: below 1, one thread would have been the better choice.

    Raises:
        OSError: the neighbour cannot be started or pinned.
    """
    rows = []
    before = torch.get_num_threads()
    try:
        with _neighbour() as set_busy:
            for mode, batch in itertools.product(MODES, _BATCHES):
                work = Workload.make(CASES["net"], mode, batch, torch.device("cpu"))
                for provider in _PROVIDERS:
                    rows.append(_measure(provider, work, threads, set_busy, effort))
    finally:
        torch.set_num_threads(before)
    return rows


def _measure(
    provider: str, work: Workload, threads: int, set_busy: Callable[[bool], None], effort: Effort
) -> dict[str, Any]:
    program = PROVIDERS[provider].prepare(work)
    conditions = {"one_alone": (1, False), "all_alone": (threads, False), "all_disturbed": (threads, True)}
    meters = {
        name: _meter(program, count, busy, set_busy, effort.sample_s) for name, (count, busy) in conditions.items()
    }
    with surroundings(work.mode):
        samples = time_interleaved({}, work.device, effort, meters=meters)
    speedup = ratio(samples["one_alone"], samples["all_disturbed"])
    return {
        "case": work.case.name,
        "mode": work.mode,
        "batch": work.batch,
        "threads": threads,
        "provider": provider,
        **{
            f"{name}_us": [percentile(taken.times_us, 0.2), taken.median_us, percentile(taken.times_us, 0.8)]
            for name, taken in samples.items()
        },
        "speedup": speedup[0],
        "speedup_p20": speedup[1],
        "speedup_p80": speedup[2],
    }


def _meter(
    program: Program, threads: int, busy: bool, set_busy: Callable[[bool], None], sample_s: float
) -> Callable[[], float]:
    def measure() -> float:
        torch.set_num_threads(threads)
        set_busy(busy)
        time.sleep(_SETTLE_S)
        program.run()  # begins the threads
        times = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < sample_s:
            start = time.perf_counter_ns()
            program.run()
            times.append((time.perf_counter_ns() - start) / 1e3)
        # The mean: whoever waits for the scheduler's turn waits long, but not in every call.
        return statistics.fmean(times)

    return measure


@contextlib.contextmanager
def _neighbour() -> Iterator[Callable[[bool], None]]:
    """A process that spins on the last of our cores; given is a switch. It is off to begin with."""
    core = max(os.sched_getaffinity(0))
    process = subprocess.Popen([sys.executable, "-c", _SPIN])
    try:
        os.sched_setaffinity(process.pid, {core})
        process.send_signal(signal.SIGSTOP)
        yield lambda busy: process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)
    finally:
        process.kill()
        process.wait()
