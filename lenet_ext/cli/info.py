"""``lenet-ext info``."""

from __future__ import annotations

import argparse
from typing import Any

from lenet_ext.cli.common import say

_DESCRIPTION = "Print what is installed and what it runs on, as a Markdown table that can be pasted into a bug report."


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("info", help="build and machine, for a bug report", description=_DESCRIPTION)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from lenet_ext.environment.system import describe

    rows = describe()
    left, right = max(len(name) for name, _ in rows), max(len(value) for _, value in rows)
    # Printed by hand: a table in Markdown must not be wrapped, however narrow the terminal is.
    say(f"| {'lenet_ext':{left}} | {'':{right}} |")
    say(f"| {'-' * left} | {'-' * right} |")
    for name, value in rows:
        say(f"| {name:{left}} | {value:{right}} |")
    return 0
