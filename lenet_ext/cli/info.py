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
    width = max(len(name) for name, _ in rows)
    # Printed by hand: a table in Markdown must not be wrapped, however narrow the terminal is. Its last column has no
    # padding, for a terminal would wrap every line of it, not the long ones alone.
    say(f"| {'lenet_ext':{width}} | |")
    say(f"| {'-' * width} | --- |")
    for name, value in rows:
        say(f"| {name:{width}} | {value} |")
    return 0
