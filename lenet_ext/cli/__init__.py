"""The command ``lenet-ext``. Each subcommand is a module with ``add_parser`` and ``run``."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence

import lenet_ext
from lenet_ext.cli import bench, check, completion, demo, evaluate, export, info, predict, train
from lenet_ext.cli.common import Parser, UsageError, error_line
from lenet_ext.training.distributed import rank_of_environment

__all__ = ["main"]

_COMMANDS = (train, evaluate, predict, export, bench, check, demo, info, completion)


def build_parser() -> Parser:
    """The parser with all subcommands."""
    parser = Parser(prog="lenet-ext", description="Train, use, check and measure the fused LeNet of lenet_ext.")
    parser.add_argument("--version", action="version", version=f"lenet-ext {lenet_ext.build_info()['version']}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for module in _COMMANDS:
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: the arguments, without the name of the program; those of the process by default.

    Returns:
        Exit code: 0, or 1 for a failure and 2 for bad usage, each told in one line on the standard error.

    Raises:
        SystemExit: 0 after ``--help`` and ``--version``, 2 for arguments that cannot be parsed.

    Example:
        >>> main(["info"])  # doctest: +SKIP
        0
    """
    _open_closed_streams()
    prog = "lenet-ext"
    try:
        try:
            args = build_parser().parse_args(argv)
        except SystemExit:
            sys.stdout.flush()  # the help, unless it cannot be written
            raise
        prog = f"lenet-ext {args.command}"
        if isinstance(sys.stdout, io.TextIOWrapper):
            # As the standard error has it: a file's name need not be text that the terminal can show.
            sys.stdout.reconfigure(errors="backslashreplace")
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        # The processes of torchrun have one command line and find the same fault in it.
        if rank_of_environment() == 0:
            print(f"{prog}: error: {error} (see '{prog} --help')", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1  # the reader left (`lenet-ext info | head -1`), and wants to hear no more
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted{error_line(error, before='; ')}", file=sys.stderr)
        return 1
    except Exception as error:
        # A person at a terminal is helped by a sentence; who needs the rest asks for it.
        if os.environ.get("LENET_EXT_TRACEBACK") == "1":
            traceback.print_exc()
        # Of several processes each may have a reason of its own; the others often only miss the one that failed.
        rank = rank_of_environment()
        who = f"process {rank}: " if rank else ""
        print(f"{prog}: error: {who}{error_line(error)}", file=sys.stderr)
        return 1
    finally:
        _drop_what_cannot_be_written()


def _open_closed_streams() -> None:
    """Gives Python's standard streams a place where the caller has closed them (``>&-``), and they are None.

    What is printed goes nowhere then, as was asked for, and not to the other stream, nor into the file that is opened
    next and gets the free number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for as long as the process lives


def _drop_what_cannot_be_written() -> None:
    """Python writes what is left when it ends, and would complain in its own words, with an exit code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
