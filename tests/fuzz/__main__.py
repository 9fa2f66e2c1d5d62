"""Looks for calls that ours and the stock composition answer differently, or that crash or hang the process.

    python -m fuzz --seconds 60          # in the tests' folder, as everything here
    python -m fuzz --seed 4711           # one call again, and made small
    python -m fuzz --first 0 --calls 100000 --record FILE.json

A call is made of its seed alone. Each finding is printed with its seed and as the smallest call that still shows one,
which belongs into `test_fuzz.py` once it is mended.
"""

from __future__ import annotations

import argparse
import datetime
import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .calls import Call, draw, minimal
from .child import Child

SHOWN = 20  # the others are counted


def record(calls: Iterable[Call], seeds: tuple[int, int], seconds: float, findings: list[dict[str, Any]]) -> dict:
    """What was tried, on what, and what was found."""
    import torch

    import lenet_ext
    from lenet_ext.environment.system import cpu_model, git_commit

    info = lenet_ext.build_info()
    counts = {kind: Counter[str]() for kind in ("name", "way", "mode", "dtype", "values", "threads", "others")}
    for call in calls:
        for kind in counts:
            if kind != "others":
                counts[kind][str(getattr(call, kind))] += 1
        others = {"wrong argument": call.wrong, "torch.compile": call.compiled, "meta": call.device == "meta"}
        counts["others"].update(name for name, value in others.items() if value)
        counts["others"].update(name for name in {*call.layouts} - {"contiguous"})
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {"lenet_ext": info["version"], "commit": git_commit(), "torch": torch.__version__},
        "compiler": info["compiler"],
        "processor": cpu_model(),
        "cpu_capability": info["cpu_capability"],
        "seeds": seeds,
        "calls": seeds[1] - seeds[0] + 1,
        "seconds": round(seconds),
        "calls_by": {kind: dict(sorted(count.items())) for kind, count in counts.items()},
        "findings": findings,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="end after this time (default: 60, unless --calls is given)")
    parser.add_argument("--calls", type=int, help="end after so many calls")
    parser.add_argument("--first", type=int, help="the first seed; the others follow (default: a new one)")
    parser.add_argument("--seed", type=int, help="this call only")
    parser.add_argument("--timeout", type=float, default=60, help="seconds that a call may take (default: 60)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="what was tried and found, as JSON")
    arguments = parser.parse_args()
    first, calls = arguments.first, arguments.calls
    if arguments.seed is not None:
        first, calls = arguments.seed, 1
    elif first is None:
        first = secrets.randbelow(2**40)
    seconds = arguments.seconds if arguments.seconds is not None or calls is not None else 60.0
    begin = time.monotonic()
    count = 0
    findings: list[dict[str, Any]] = []
    with Child(arguments.timeout) as child:
        while (calls is None or count < calls) and (seconds is None or time.monotonic() - begin < seconds):
            call = draw(first + count)
            finding = child.check(call)
            if finding is not None:
                findings.append({"seed": first + count, "finding": finding})
                if len(findings) <= SHOWN:
                    print(f"seed {first + count}: {finding}", flush=True)
                    print(f"  {call}", flush=True)
                    smallest = minimal(call, lambda call: child.check(call) is not None)
                    print(f"  the smallest: {smallest}", flush=True)
                    findings[-1]["smallest"] = repr(smallest)
            elif arguments.seed is not None:
                print(f"seed {first}: as stock\n  {call}")
            count += 1
    took = time.monotonic() - begin
    print(f"{count} calls (seeds {first} to {first + count - 1}) in {took:.0f} s: {len(findings)} findings")
    if arguments.record is not None:
        tried = map(draw, range(first, first + count))
        content = record(tried, (first, first + count - 1), took, findings)
        arguments.record.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
