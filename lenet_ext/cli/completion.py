"""``lenet-ext completion``."""

from __future__ import annotations

import argparse
from typing import Any

from lenet_ext.cli.common import say

_DESCRIPTION = """\
Print what makes a shell complete commands, options, their values and file names at the Tab key. It goes into a file
where the shell looks for it, in a folder that may have to be created:

  bash  lenet-ext completion bash > ~/.local/share/bash-completion/completions/lenet-ext
  zsh   lenet-ext completion zsh > ~/.zsh/_lenet-ext          with fpath+=~/.zsh before compinit in ~/.zshrc
  fish  lenet-ext completion fish > ~/.config/fish/completions/lenet-ext.fish

and serves shells that are opened from then on. It starts no Python, and knows the options of this version: to be
printed again after an upgrade. Printing needs the extra: pip install 'lenet_ext[completion]'
"""
_SHELLS = ("bash", "zsh", "fish")
# What the word that stands for a value in the help says of it.
_KINDS = {"CHECKPOINT": "file", "FILE": "file", "IMAGE": "file", "DIR": "directory"}


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "completion", help="completion by Tab, for bash, zsh and fish", description=_DESCRIPTION
    )
    parser.add_argument("shell", choices=_SHELLS, help="of which shell")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from lenet_ext.cli import build_parser
    from lenet_ext.environment.extras import require

    shtab = require("shtab", "completion", extra="completion")
    parser = build_parser()
    _prepare(parser)
    say(shtab.complete(parser, args.shell))
    return 0


def _prepare(parser: argparse.ArgumentParser) -> None:
    """Says where a value is the name of a file, and leaves one line of help for each command."""
    parser.description = None
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _prepare(command)
        elif action.metavar in _KINDS:
            action.complete = _KINDS[action.metavar]  # type: ignore[attr-defined]
