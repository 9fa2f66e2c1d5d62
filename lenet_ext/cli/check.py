"""``lenet-ext check``."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from lenet_ext.cli.common import add_device, add_threads, make_console, say

_DESCRIPTION = """\
Self-test of the installed package on this machine, in under half a minute: every kernel against stock torch in
float64, float32 and bfloat16, for each instruction set that this processor has, and gradcheck. The exit code is 0
if everything is right.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("check", help="self-test on this machine", description=_DESCRIPTION)
    add_device(parser)
    add_threads(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    import torch
    from rich.table import Table

    import lenet_ext
    from lenet_ext.environment.device import resolve_device
    from lenet_ext.selftest import run_checks

    device = resolve_device(args.device or "auto")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    info = lenet_ext.build_info()
    say(
        f"lenet_ext {info['version']}, torch {torch.__version__}, {device}, CPU capability {info['cpu_capability']}, "
        f"threads: {torch.get_num_threads()}"
    )
    console = make_console()
    started = time.perf_counter()
    if console.is_terminal:
        with console.status("") as status:
            results = run_checks(device, status.update)
    else:
        results = run_checks(device)
    seconds = time.perf_counter() - started
    table = Table()
    table.add_column("what")
    table.add_column("checks", justify="right")
    table.add_column("result")
    table.add_column("seconds", justify="right")
    for result in results:
        failed = len(result.failures)
        outcome = f"[bold red]{failed} FAILED[/]" if failed else "[green]passed[/]" if result.count else "-"
        table.add_row(result.name, str(result.count), outcome, f"{result.seconds:.1f}")
    console.print(table)
    failures = [f"{result.name}: {failure}" for result in results for failure in result.failures]
    for failure in failures:
        say(f"failed: {failure}")
    total = sum(result.count for result in results)
    if failures:
        print(f"lenet-ext check: error: {len(failures)} of {total} checks failed", file=sys.stderr)
        return 1
    say(f"all {total} checks passed in {seconds:.1f} s")
    return 0
