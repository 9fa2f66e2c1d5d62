"""Tables and picture of the results of one or more machines.

    python to_markdown.py results/*.json                                  # print all tables
    python to_markdown.py results/*.json --table net
    python to_markdown.py results/*.json --update ../README.md            # rewrite the tables that the file has marked
    python to_markdown.py results/*.json --check ../README.md             # exit code 1 where they are out of date
    python to_markdown.py results/*.json --plot results/net.png           # the whole net, of the newest processor's run

In a Markdown file a table stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``; it is repeated for each
machine that has it.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import summary
import tables
from PIL import Image

from lenet_ext.bench.instruction_sets import is_forced
from lenet_ext.bench.report import plot_results

_MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(\n?<!-- /bench -->)", re.DOTALL)


def updated(text: str, contents: list[dict[str, Any]]) -> str:
    """`text` with every marked table made anew.

    Raises:
        ValueError: a name is unknown, or no machine has it.
    """

    def replace(found: re.Match[str]) -> str:
        made = tables.render(found[2], contents) if found[2] in tables.NAMES else None
        if made is None:
            have = ", ".join(name for name in tables.NAMES if tables.render(name, contents))
            raise ValueError(f"no results for the table {found[2]!r}, found {have}")
        return f"{found[1]}{made}\n<!-- /bench -->"

    return _MARKED.sub(replace, text)


def plot_newest(contents: list[dict[str, Any]], path: Path) -> None:
    """The whole net of the processor that was measured last; one as it is goes before one that was held to something.

    Raises:
        ValueError: there is none.
    """
    measured = [content for content in contents if tables.has(content, "peers")]
    if not measured:
        raise ValueError("no processor has results of the whole net")
    newest = max(measured, key=lambda content: (not is_forced(content), content["runs"]["net"]["date"]))
    plot_results(newest, path, ["net"])
    shrink(path)


def shrink(path: Path) -> None:
    """A picture of few colors in a fifth of the bytes, for the repository."""
    with Image.open(path) as image:
        image.quantize(64).save(path, optimize=True)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="as summary.py writes them")
    parser.add_argument("--table", choices=tables.NAMES)
    parser.add_argument("--update", type=Path, nargs="+", default=[], metavar="MARKDOWN")
    parser.add_argument("--check", type=Path, nargs="+", default=[], metavar="MARKDOWN")
    parser.add_argument("--plot", type=Path, metavar="PICTURE")
    arguments = parser.parse_args()
    try:
        contents = [summary.read(path) for path in arguments.files]
        stale = []
        for path in (*arguments.update, *arguments.check):
            before = path.read_text()
            after = updated(before, contents)
            if path in arguments.update:
                path.write_text(after)
            elif after != before:
                stale.append(path)
        if arguments.plot is not None:
            plot_newest(contents, arguments.plot)
    except ValueError as error:
        parser.error(str(error))
    for path in stale:
        print(f"{path.name} is out of date: run with --update", file=sys.stderr)
    if not (arguments.update or arguments.check or arguments.plot):
        for name in [arguments.table] if arguments.table else tables.NAMES:
            made = tables.render(name, contents)
            if made is not None:
                print(f"### {name}\n\n{made}\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
