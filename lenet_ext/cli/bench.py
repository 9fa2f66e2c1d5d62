"""``lenet-ext bench``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from lenet_ext.cli.common import UsageError, add_device, add_threads, integer, list_of, make_console, say

_DESCRIPTION = """\
Time the fused layers and the fused net against stock torch (eager, channels_last, torch.compile), forward and
training step (forward and backward), over batch sizes. Outputs are compared before anything is timed. Providers
take turns in one process; shown are medians, and the ratio to the fastest stock variant within the same rounds.

The full run takes about a quarter of an hour, most of it in torch.compile; --quick takes less than a minute.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("bench", help="fused vs. stock, in a table", description=_DESCRIPTION)
    parser.add_argument("--quick", action="store_true", help="few sizes, torch.compile only for the net at one size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (PNG, SVG or PDF)")
    add_threads(parser)
    add_device(parser)
    names = list_of(str)
    parser.add_argument(
        "--cases", type=names, metavar="A,B", help="conv1,conv2,fc1,fc2,fc3,net, or: general, overhead, all"
    )
    parser.add_argument("--modes", type=names, metavar="A,B", help="forward,training")
    parser.add_argument("--batch-sizes", type=list_of(integer(1)), metavar="N,N", help="default: 1,8,64,256,1024,4096")
    parser.add_argument("--providers", type=names, metavar="A,B", help="default: fused,eager,channels_last,compile")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    import torch

    from lenet_ext.bench import plot_report, print_report, report_to_dict, run_benchmarks
    from lenet_ext.device import resolve_device
    from lenet_ext.extras import require
    from lenet_ext.files import write_json

    if args.plot is not None:
        require("matplotlib", "--plot", extra="bench")
    for path in (args.json, args.plot):
        # Found out before the measurement, not after.
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"there is no directory {path.absolute().parent} to write {path.name} to")
    plan = _plan(args)
    device = resolve_device(args.device or "auto")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = make_console()
    if console.is_terminal:
        with console.status("") as status:
            report = run_benchmarks(plan, device, status.update)
    else:
        report = run_benchmarks(plan, device)
    print_report(report, console)
    if args.json is not None:
        write_json(args.json, report_to_dict(report))
        say(f"wrote {args.json}")
    if args.plot is not None:
        plot_report(report, args.plot)
        say(f"wrote {args.plot}")
    return 0


def _plan(args: argparse.Namespace) -> Any:
    from lenet_ext.bench import CASES, PROVIDERS, Plan

    plan = Plan.quick() if args.quick else Plan()
    changes: dict[str, Any] = {}
    if args.cases:
        groups: dict[str, list[str]] = {"all": list(CASES)}
        for case in CASES.values():
            groups.setdefault(case.group, []).append(case.name)
        # A group and a case may share a name: "overhead" is both.
        changes["cases"] = tuple(dict.fromkeys(name for word in args.cases for name in groups.get(word, [word])))
    if args.providers:
        changes["providers"] = tuple(PROVIDERS) if args.providers == ["all"] else tuple(args.providers)
    if args.modes:
        changes["modes"] = tuple(args.modes)
    if args.batch_sizes:
        changes["batch_sizes"] = tuple(args.batch_sizes)
    known = {"cases": tuple(CASES), "providers": tuple(PROVIDERS), "modes": ("forward", "training")}
    for kind, names in known.items():
        for name in changes.get(kind, ()):
            if name not in names:
                raise UsageError(f"argument --{kind}: must be among {', '.join(names)}, found {name!r}")
    return replace(plan, **changes)
