"""Docstrings are written in the roles of Sphinx, as PyTorch's are; the site wants Markdown."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import griffe

# A directive with its formula behind it, or indented below it.
_DISPLAYED = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*| *(?=\n\1 +\S)))*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
_LINK = re.compile(r":(?:class|func|meth|mod|attr):`~?((?:\w+\.)*)(\w+)`")
_LITERAL = re.compile(r"::$", re.MULTILINE)
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)  # griffe knows the plural


def _displayed(found: re.Match[str]) -> str:
    first, _, rest = found[2].partition("\n")
    formula = f"{first.strip()}\n{dedent(rest)}".strip()
    if "&" in formula:
        formula = rf"\begin{{align*}}{formula}\end{{align*}}"
    return "\n".join(found[1] + line for line in ("", "$$", *formula.splitlines(), "$$", ""))


def _link(found: re.Match[str]) -> str:
    """Only full names have a place on the site that can be told from here."""
    path, name = found[1], found[2]
    return f"[`{name}`][{path}{name}]" if path.startswith("lenet_ext.") else f"`{name}`"


def to_markdown(text: str) -> str:
    """A docstring without roles and directives."""
    text = _DISPLAYED.sub(_displayed, text)
    text = _INLINE.sub(r"$\1$", text)
    text = _LINK.sub(_link, text)
    text = _LITERAL.sub(":", text)
    return _EXAMPLE.sub("Examples:", text)


class SphinxRoles(griffe.Extension):
    """Converts every docstring of a package when it has been loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        _convert(pkg)


def _convert(item: griffe.Object) -> None:
    if item.docstring:
        item.docstring.value = to_markdown(item.docstring.value)
    for member in item.members.values():
        if not member.is_alias:
            _convert(member)
