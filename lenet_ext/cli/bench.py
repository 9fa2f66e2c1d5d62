"""``lenet-ext bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lenet_ext.cli.common import UsageError, add_device, integer, list_of, make_console, say

_DESCRIPTION = """\
Time the fused layers and the fused net against stock torch (eager, channels_last, torch.compile, TorchScript), ONNX
Runtime and OpenVINO, forward and training step (forward and backward), over batch sizes and numbers of threads.
Outputs are compared before anything is timed. Providers take turns in one process; shown are medians, and ratios
within the same rounds, and, of a processor, which of our targets were met.

A full run has seven groups of up to ten minutes each: net, layers, general (large convolutions), networks (small ones
as people write them, before and after fuse), overhead (tiny problems), memory (peak of a training step), neighbour
(another process keeps one core busy); on a GPU also kernelbench (level 3, problem 4, by KernelBench's rules). --only
picks some, and --json puts the pieces together in one file. --quick takes less than a minute.
"""
_SECTIONS = ("memory", "neighbour")


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("bench", help="fused vs. stock, in a table", description=_DESCRIPTION)
    parser.add_argument(
        "--quick", action="store_true", help="few sizes, all threads, torch.compile only for the net at one size"
    )
    names = list_of(str)
    parser.add_argument(
        "--only",
        type=names,
        metavar="A,B",
        help="groups: net,layers,general,networks,overhead,kernelbench,memory,neighbour (default: all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="add all results to a file, after each workload")
    parser.add_argument("--resume", action="store_true", help="leave out what the file of --json has already")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the times, one line per provider and workload")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (PNG, SVG or PDF)")
    parser.add_argument(
        "--threads",
        type=list_of(integer(1, 4096)),
        action="extend",
        metavar="N,N",
        help="threads of torch (default: 1 and its own choice; with --quick the latter)",
    )
    add_device(parser)
    parser.add_argument("--cases", type=names, metavar="A,B", help="net,conv1,conv2,fc1,fc2,fc3, or a group, or all")
    parser.add_argument("--modes", type=names, metavar="A,B", help="forward,training,step")
    parser.add_argument("--batch-sizes", type=list_of(integer(1)), metavar="N,N", help="default: 1,8,64,256,1024,4096")
    parser.add_argument("--providers", type=names, metavar="A,B", help="or all (default: what suits each group)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    import torch

    from lenet_ext.bench import merge, plot_results, print_results, read_results, report_to_dict, run_benchmarks
    from lenet_ext.bench.results import facts, measured, write_csv
    from lenet_ext.bench.shown import of_run
    from lenet_ext.bench.targets import print_targets
    from lenet_ext.environment.device import resolve_device
    from lenet_ext.environment.extras import require
    from lenet_ext.environment.files import write_json
    from lenet_ext.training.plots import figure_format

    # Found out before the measurement, not after.
    if args.plot is not None:
        require("matplotlib", "--plot", extra="bench")
        try:
            figure_format(args.plot)
        except ValueError as error:
            raise UsageError(f"--plot {error}") from None
    for path in (args.json, args.csv, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"there is no directory {path.absolute().parent} to write {path.name} to")
        if path is not None and path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a regular file")
    if args.resume and args.json is None:
        raise UsageError("--resume needs --json: it continues the file")
    device = resolve_device(args.device or "auto")
    threads = _threads(args, device)
    plans, sections = _plans(args, threads, device.type)
    if not plans and not sections:
        raise UsageError("--only and --cases have nothing in common to measure")
    try:
        stored = None if args.json is None else read_results(args.json)
        merge(stored, {**facts(device), "runs": {}, "rows": [], "comparisons": []})  # do they fit together?
    except ValueError as error:
        raise UsageError(f"--json {args.json}: {error}; choose another file") from None
    found: dict[str, Any] | None = None

    def keep(piece: dict[str, Any]) -> None:
        nonlocal found
        found = merge(found, piece)
        if args.json is not None:
            # After each workload: a run that is interrupted has lost one of them.
            write_json(args.json, merge(stored, found))

    console = make_console()
    with console.status("") as status:
        tell = status.update if console.is_terminal else None
        for plan in plans:
            if args.resume:
                plan = replace(plan, done=measured(stored))
            report = run_benchmarks(plan, device, tell, lambda report: keep(report_to_dict(report)))
            keep(report_to_dict(report))
        for name in sections:
            if not (args.resume and stored is not None and stored.get(name)):
                keep(_section(name, max(threads, default=torch.get_num_threads()), tell))
    if found is not None:
        print_results(found, console)
    content = merge(stored, found) if found is not None else stored
    assert content is not None  # what was not measured is in the file
    if device.type == "cpu" and not args.quick:  # few samples are no ground for a verdict
        print_targets(of_run(content), console)
    if args.json is not None:
        say(f"wrote {args.json}")
    if args.csv is not None:
        write_csv(content, args.csv)
        say(f"wrote {args.csv}")
    if args.plot is not None:
        plot_results(content, args.plot)
        say(f"wrote {args.plot}")
    return 0


def _section(name: str, threads: int, tell: Callable[[str], None] | None) -> dict[str, Any]:
    from lenet_ext.bench.memory import measure_memory
    from lenet_ext.bench.neighbour import measure_neighbour, neighbour_unavailable
    from lenet_ext.bench.results import section_to_dict

    if tell is not None:
        tell(name)
    if name == "memory":
        return section_to_dict(name, measure_memory(threads))
    reason = neighbour_unavailable(threads)
    return section_to_dict(name, [] if reason else measure_neighbour(threads), reason)


def _threads(args: argparse.Namespace, device: Any) -> tuple[int, ...]:
    import torch

    if args.threads:
        return tuple(dict.fromkeys(args.threads))
    # On a GPU the threads of the host do not matter.
    most = torch.get_num_threads()
    return (most,) if args.quick or device.type != "cpu" else tuple(dict.fromkeys((1, most)))


def _plans(args: argparse.Namespace, threads: tuple[int, ...], device_type: str) -> tuple[list[Any], list[str]]:
    """What to time, one plan per group, and which of the other measurements to make."""
    from lenet_ext.bench import CASES, GROUPS, PROVIDERS, Plan
    from lenet_ext.bench.cases import MODES

    _known("--only", args.only, (*GROUPS, *_SECTIONS))
    changes: dict[str, Any] = {"threads": threads}
    if args.providers:
        _known("--providers", args.providers, (*PROVIDERS, "all"))
        changes["providers"] = tuple(PROVIDERS) if "all" in args.providers else tuple(args.providers)
    if args.modes:
        _known("--modes", args.modes, MODES)
        changes["modes"] = tuple(args.modes)
    if args.batch_sizes:
        changes["batch_sizes"] = tuple(args.batch_sizes)
    cases: list[str] | None = None
    if args.cases:
        _known("--cases", args.cases, (*CASES, *GROUPS, "all"))
        cases = [
            case.name for case in CASES.values() if "all" in args.cases or {case.name, case.group} & set(args.cases)
        ]
    if args.quick:
        quick = Plan.quick()
        if args.only:
            names = tuple(case.name for case in CASES.values() if case.group in args.only)
            quick = replace(quick, cases=names if cases is None else tuple(name for name in names if name in cases))
        elif cases is not None:
            quick = replace(quick, cases=tuple(cases))
        plans = [replace(quick, **changes)]
    else:
        here = {case.group for case in CASES.values() if device_type in case.device_types}
        asked = args.only or (GROUPS if args.cases else here)  # who asks for what is not measured here is told so
        groups = [group for group in GROUPS if group in asked]
        plans = [replace(Plan.group(group), **changes) for group in groups]
        if cases is not None:
            plans = [replace(plan, cases=tuple(name for name in plan.cases if name in cases)) for plan in plans]
    # The rest takes time that nobody asked for who names cases or wants to be quick.
    wanted = args.only or ([] if args.quick or args.cases else _SECTIONS)
    return [plan for plan in plans if plan.cases], [name for name in _SECTIONS if name in wanted]


def _known(option: str, given: list[str] | None, known: tuple[str, ...]) -> None:
    for name in given or ():
        if name not in known:
            raise UsageError(f"argument {option}: must be among {', '.join(known)}, found {name!r}")
