"""The documentation: its examples run, its command lines parse, and the files that it names are there.

Links and excerpts are checked where the site is built (``make docs``).
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from lenet_ext.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(ROOT)) for path in [*DOCS.rglob("*.md"), ROOT / "README.md"])

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the source tree")


class SessionParser(PythonCodeBlockParser):
    """Sessions at the prompt, whose output is compared."""

    def __init__(self) -> None:
        super().__init__(doctest_optionflags=doctest.ELLIPSIS)
        self.codeblock_parser = CodeBlockParser("pycon")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page: str, *languages: str) -> list[str]:
    """The blocks of code of these languages."""
    found = re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [code for _, language, code in found if language in languages]


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python", "pycon")])
def test_examples(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn) -> None:
    """From the first to the last of a page, which share their names."""
    monkeypatch.chdir(tmp_path)
    examples = list(Document.parse(str(ROOT / page), PythonCodeBlockParser(), SessionParser()).examples())
    assert examples
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("name", ["functional", "fusion.fuse", "fusion.unfuse", "net", "nn", "training_step"])
def test_examples_of_the_reference(name: str) -> None:
    """Those of the docstrings."""
    result = doctest.testmod(importlib.import_module(f"lenet_ext.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def commands(page: str) -> list[list[str]]:
    """The words of each command line of lenet-ext."""
    lines = (line for code in fences(page, "", "sh") for line in code.splitlines())
    words = (shlex.split(line, comments=True) for line in lines if "lenet-ext " in line or "-m lenet_ext " in line)
    starts = ("lenet-ext", "lenet_ext")
    return [line[1 + next(i for i, word in enumerate(line) if word in starts) :] for line in words if line]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_command_lines_parse(page: str) -> None:
    for words in commands(page):
        build_parser().parse_args(words)


def test_there_are_command_lines_to_parse() -> None:
    assert ["predict", "photo.png"] in commands("docs/start.md")
    assert sum(map(len, map(commands, PAGES))) > 10


@pytest.mark.parametrize("page", PAGES)
def test_named_files_are_there(page: str) -> None:
    """What looks like a path of the repository, and what is said to be a target of make."""
    text = text_of(page)
    rooms = "benchmarks|build_backend|csrc|docs|examples|lenet_ext|tests"
    paths = re.findall(rf"(?:`|python )((?:{rooms})/[\w./*-]+)", text)
    missing = [path for path in paths if not list(ROOT.glob(path))]
    targets = re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)
    makefile = ROOT / "Makefile"
    missing += [f"make {name}" for name in targets if not re.search(rf"^{name}:", makefile.read_text(), re.MULTILINE)]
    assert not missing


SOURCES = (
    "build_backend/*.py",
    "lenet_ext/**/*.py",
    "csrc/*/*.h",
    "csrc/*/*.cpp",
    "csrc/*/*.cu",
    "csrc/*/*.cuh",
    "tests/*/*.cpp",
    "tests/*/*.cu",
)


@pytest.mark.parametrize("kind", SOURCES)
def test_files_that_comments_name_are_there(kind: str) -> None:
    rooms = "benchmarks|build_backend|csrc|docs|examples|lenet_ext|tests|tools"
    sources = list(ROOT.glob(kind))
    assert sources
    for source in sources:
        named = re.findall(rf"(?<![\w/.-])((?:{rooms})/[\w./-]+\.\w+)", source.read_text(encoding="utf-8"))
        missing = [path for path in named if not (ROOT / path).exists()]
        assert not missing, source


def test_the_reference_of_the_command_line_is_that_of_the_parsers() -> None:
    spec = importlib.util.spec_from_file_location("command_line", DOCS / "command_line.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python docs/command_line.py"


@pytest.mark.parametrize("page", PAGES)
def test_excerpts_are_read_from_the_source(page: str) -> None:
    """C++ and what is marked as `py` is shown and not run, so it must not be a copy."""
    for code in fences(page, "cpp", "py"):
        assert all(line.strip().startswith('--8<-- "') for line in code.splitlines()), code
