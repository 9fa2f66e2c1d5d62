"""What the subcommands share: argument types, the console, how an error reads."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

from rich.console import Console

from lenet_ext.training.datasets import DATA_SETS

__all__ = [
    "Parser",
    "UsageError",
    "add_data",
    "add_device",
    "add_threads",
    "error_line",
    "integer",
    "learning_rate",
    "list_of",
    "make_console",
    "percent",
    "printable",
    "say",
]

# A table in a file or a pipe has no terminal to fit into; wide enough for all of ours.
_WIDTH_WITHOUT_TERMINAL = 132


class UsageError(Exception):
    """The arguments parse but contradict each other."""


class _Help(argparse.HelpFormatter):
    """Wraps the paragraphs of a description for the terminal, and leaves its lists, which are indented, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = []
        for is_paragraph, lines in itertools.groupby(text.splitlines(), key=lambda line: line[:1].strip() != ""):
            block = "\n".join(lines)
            if is_paragraph:
                block = textwrap.fill(block, width, break_on_hyphens=False, break_long_words=False)
            blocks.append(block)
        return "\n".join(blocks)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and that takes no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(**kwargs)

    _intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Takes options anywhere among file names; argparse by itself ends a list of them at the first option."""
        if self._subparsers is not None or self._intermixing or "--" in (args or ()):
            return super().parse_known_args(args, namespace)
        self._intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:
            print(message, end="")  # argparse hides that it cannot be written
        else:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see '{self.prog} --help')\n")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Argument type: an integer from `low` to `high`."""
    expected = f"an integer, {low} or more" if high is None else f"an integer from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {expected}, found {text!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {expected}, found {value}")
        return value

    return parse


def learning_rate(text: str) -> float:
    """Argument type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, found {text!r}")
    return value


def percent(text: str) -> float:
    """Argument type: a number above 0 and at most 100."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 100, found {text!r}")
    return value


def list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Argument type: one value or more, with commas between them."""

    def parse_all(text: str) -> list[Any]:
        values = [parse(part.strip()) for part in text.split(",") if part.strip()]
        if not values:
            raise argparse.ArgumentTypeError(f"must be values with commas between them, found {text!r}")
        return values

    return parse_all


def add_data(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds ``--data``."""
    parser.add_argument("--data", choices=tuple(DATA_SETS), help=f"default: {default}")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Adds ``--threads``."""
    parser.add_argument(
        "--threads", type=integer(1, 4096), metavar="N", help="threads of torch (default: its own choice)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default=None, help="auto (default) is cuda where it can be used"
    )


def make_console() -> Console:
    """A console on the standard output. Neither colors numbers in plain text nor wraps tables that go to a file."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
    return console


def say(line: str) -> None:
    """Prints a line as it is, now: never wrapped, so that paths can be copied and lines can be searched."""
    print(line, flush=True)


def printable(text: str) -> str:
    """The text without what is no character to see: what a file's name or content does to a terminal, or to the lines
    of a list, is not the file's to say."""
    return "".join(char if char.isprintable() else "?" for char in text)


def error_line(error: BaseException, *, before: str = "") -> str:
    """The message of an error as one line; `before` is put in front unless it is empty."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    else:
        text = " ".join(str(error).split())
    text = printable(text)
    # A bare KeyError('x') or AssertionError says nothing without its name.
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError, ArithmeticError, KeyboardInterrupt)):
        text = f"{type(error).__name__}: {text} (LENET_EXT_TRACEBACK=1 shows where)"
    return f"{before}{text}" if text else ""
