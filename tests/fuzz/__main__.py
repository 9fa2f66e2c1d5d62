"""Looks for calls that ours and the stock composition answer differently, or that crash or hang the process.

    python -m fuzz --seconds 60          # in the tests' folder, as everything here
    python -m fuzz --seed 4711           # one call again, and made small
    python -m fuzz --first 0 --calls 100000

A call is made of its seed alone. Each finding is printed with its seed and as the smallest call that still shows one,
which belongs into `test_fuzz.py` once it is mended.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time

from .calls import draw, minimal
from .child import Child

SHOWN = 20  # the others are counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="end after this time (default: 60, unless --calls is given)")
    parser.add_argument("--calls", type=int, help="end after so many calls")
    parser.add_argument("--first", type=int, help="the first seed; the others follow (default: a new one)")
    parser.add_argument("--seed", type=int, help="this call only")
    parser.add_argument("--timeout", type=float, default=60, help="seconds that a call may take (default: 60)")
    arguments = parser.parse_args()
    first, calls = arguments.first, arguments.calls
    if arguments.seed is not None:
        first, calls = arguments.seed, 1
    elif first is None:
        first = secrets.randbelow(2**40)
    seconds = arguments.seconds if arguments.seconds is not None or calls is not None else 60.0
    begin = time.monotonic()
    count = findings = 0
    with Child(arguments.timeout) as child:
        while (calls is None or count < calls) and (seconds is None or time.monotonic() - begin < seconds):
            call = draw(first + count)
            finding = child.check(call)
            if finding is not None:
                findings += 1
                if findings <= SHOWN:
                    print(f"seed {first + count}: {finding}", flush=True)
                    print(f"  {call}", flush=True)
                    print(f"  the smallest: {minimal(call, lambda call: child.check(call) is not None)}", flush=True)
            elif arguments.seed is not None:
                print(f"seed {first}: as stock\n  {call}")
            count += 1
    took = time.monotonic() - begin
    print(f"{count} calls (seeds {first} to {first + count - 1}) in {took:.0f} s: {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
