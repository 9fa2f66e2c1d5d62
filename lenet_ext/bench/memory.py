"""Peak memory of one training step, each in a process of its own: ``python -m lenet_ext.bench.memory PROVIDER``.

What is counted: how much the largest resident set of the process grows during one forward and backward pass, that is
everything the step itself makes: activations, what backward keeps, workspaces, gradients. What is not: the parameters,
the input and the gradient of the output, which exist before, and whatever the libraries allocate once, for which a step
at batch 1 comes first.

A process of its own, because memory that earlier work has freed would be used again without the resident set growing.
On Linux the high-water mark is read from ``/proc/self/status`` and not from ``getrusage``: the latter starts with the
size of the process that this one was begun by.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["measure_memory"]

PROVIDERS = ("fused", "eager", "channels_last")
BATCH = 4096
_REPEATS = 3


def measure_memory(threads: int, batch: int = BATCH, repeats: int = _REPEATS) -> list[dict[str, Any]]:
    """One row per provider: median and each of `repeats` processes, in bytes.

    Raises:
        RuntimeError: a process failed.
    """
    taken: dict[str, list[int]] = {name: [] for name in PROVIDERS}
    for _ in range(repeats):
        for name in PROVIDERS:
            command = [sys.executable, "-m", "lenet_ext.bench.memory", name]
            command += ["--batch", str(batch), "--threads", str(threads)]
            # From a folder of its own: `-m` would otherwise find a source tree before the installed package.
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                raise RuntimeError(f"the process that measures the memory of {name} failed: {last}")
            taken[name].append(json.loads(done.stdout)["bytes"])
    return [
        {
            "case": "net",
            "mode": "training",
            "batch": batch,
            "threads": threads,
            "provider": name,
            "median_bytes": int(statistics.median(values)),
            "bytes": values,
        }
        for name, values in taken.items()
    ]


def _step_bytes(provider: str, batch: int, threads: int) -> int:
    import torch

    from lenet_ext.bench.cases import CASES, Workload
    from lenet_ext.bench.providers import PROVIDERS

    torch.set_num_threads(threads)
    device = torch.device("cpu")
    first, step = (
        PROVIDERS[provider].prepare(Workload.make(CASES["net"], "training", size, device)) for size in (1, batch)
    )
    first.run()
    _reset_high_water()
    before = _high_water_bytes()
    step.run()
    return _high_water_bytes() - before


def _reset_high_water() -> None:
    """Sets the mark to what is resident now. Where that cannot be, it stays at what start-up once needed."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _high_water_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    print(json.dumps({"bytes": _step_bytes(arguments.provider, arguments.batch, arguments.threads)}))


if __name__ == "__main__":
    _main()
