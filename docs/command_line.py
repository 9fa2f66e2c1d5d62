"""Writes the reference of the command line, reference/command-line.md, from the parsers: ``python command_line.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lenet_ext.cli import build_parser

PAGE = Path(__file__).parent / "reference" / "command-line.md"

_HEAD = """\
# Command line

<!-- Made of the parsers by docs/command_line.py. -->

`lenet-ext COMMAND`, or `python -m lenet_ext COMMAND`. The exit code is 0, or 2 for arguments that are wrong and 1 for a
failure, each with one line on the standard error. `LENET_EXT_TRACEBACK=1` shows where an error came from.
"""


def _argument(action: argparse.Action) -> str:
    """As it is typed: ``--top K``."""
    value = action.metavar or ("" if action.nargs == 0 or action.choices is None else action.dest.upper())
    if action.nargs == "+":
        value = f"{value} ..."
    return " ".join([", ".join(action.option_strings), str(value)]).strip()


def _meaning(action: argparse.Action) -> str:
    text = (action.help or "") % {"default": action.default}
    if action.choices:
        text = f"{', '.join(f'`{choice}`' for choice in action.choices)}{'; ' if text else ''}{text}"
    return text.replace("|", r"\|")


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    rows = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    lines = [f"## lenet-ext {name}", "", "```text", (parser.description or "").strip(), "```"]
    if rows:
        lines += ["", "| argument | meaning |", "| --- | --- |"]
        lines += [f"| `{_argument(row)}` | {_meaning(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page as the parsers would have it."""
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return "\n".join([_HEAD, *(_command(name, parser) for name, parser in commands.choices.items())])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
