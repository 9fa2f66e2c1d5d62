"""Self-test of the installed package on this machine: every kernel against stock torch in float64.

Most comparisons are exact. Small whole numbers, and small multiples of 1/8, go through convolutions and matrix products
without any rounding, so that the result must be equal bit for bit whatever the order of the additions, and ties
between the values of a pooling window are frequent. Rounding is tested apart, with random numbers, against the error
that stock torch makes in the same dtype.

- `comparing`: the numbers, the stock composition, equality.
- `kernels`, `calls`: the groups of checks. A group is a function of the device that yields named checks.
- `variants`: the kernels that this process does not use, in processes of their own.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from lenet_ext.environment.system import cpu_count
from lenet_ext.selftest import calls, kernels, variants
from lenet_ext.selftest.comparing import Checks, MismatchError

__all__ = ["Result", "run_checks"]

_KERNELS: dict[str, Callable[[torch.device], Checks]] = {
    "conv_relu_max_pool2d, exact": kernels.conv_exact,
    "linear and linear_relu, exact": kernels.linear_exact,
    "relu_avg_pool2d, exact": kernels.average_exact,
    "memory formats and strides": kernels.layouts,
    "NaN, infinities, signed zeros": kernels.special_values,
    "rounding, against twice stock's error": kernels.rounding,
    "Net against ReferenceNet": kernels.net,
}
_OTHERS: dict[str, Callable[[torch.device], Checks]] = {
    "threads do not change results": kernels.threads,
    "derivatives: gradcheck, gradgradcheck": calls.derivatives,
    "operators: schema, fake implementation": calls.operators,
    "bad calls raise": calls.bad_calls,
}


@dataclass(frozen=True)
class Result:
    """Outcome of one group of checks. `failures` is empty where all is well."""

    name: str
    count: int
    failures: tuple[str, ...]
    seconds: float


def run_checks(
    device: torch.device, on_group: Callable[[str], None] | None = None, *, kernels_only: bool = False
) -> list[Result]:
    """Runs all groups of checks.

    Args:
        device: where the kernels run; the reference is always computed on the CPU.
        on_group: told the name of the group that comes next.
        kernels_only: only the comparisons of the kernels with stock, without derivatives and child processes.

    Returns:
        One result for each group. Exceptions of the code under test are failures.

    Example:
        >>> all(not result.failures for result in run_checks(torch.device("cpu")))  # doctest: +SKIP
        True
    """
    results = []
    with _reproducible():
        for name, group in (_KERNELS if kernels_only else {**_KERNELS, **_OTHERS}).items():
            if on_group is not None:
                on_group(name)
            results.append(_run_group(name, group(device)))
    if not kernels_only and device.type == "cpu":
        results += _other_variants(on_group)
    return results


def _run_group(name: str, checks: Checks) -> Result:
    failures, count = [], 0
    started = time.perf_counter()
    for what, check in checks:
        count += 1
        try:
            check()
        except Exception as error:
            kind = "" if isinstance(error, MismatchError) else f"{type(error).__name__}: "
            failures.append(f"{what}: {kind}{' '.join(str(error).split())[:300]}")
    return Result(name, count, tuple(failures), time.perf_counter() - started)


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """The same random numbers on every run; the caller's generator and settings are left as they were."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def _other_variants(on_group: Callable[[str], None] | None) -> list[Result]:
    settings = variants.settings()
    if on_group is not None and settings:
        on_group("other instruction sets and algorithms")
    with ThreadPoolExecutor(max_workers=min(4, cpu_count())) as pool:  # the threads wait for processes
        return list(pool.map(_variant, settings))


def _variant(setting: dict[str, str]) -> Result:
    started = time.perf_counter()
    count, failures = variants.run_setting(setting)
    name = "kernels with " + " ".join(f"{key}={value}" for key, value in setting.items())
    return Result(name, count, failures, time.perf_counter() - started)


def _child() -> int:
    """What a process of `variants` runs: prints the number of checks, or the failures."""
    torch.set_num_threads(1)
    results = run_checks(torch.device("cpu"), kernels_only=True)
    failures = [f"{result.name}: {failure}" for result in results for failure in result.failures]
    print("\n".join(failures) if failures else sum(result.count for result in results))
    return 1 if failures else 0
