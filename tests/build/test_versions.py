"""The table of versions that `make versions` keeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="needs the source tree")
sys.path.insert(0, str(ROOT / "tools"))
import versions  # noqa: E402


def row(torch: str, python: str = "3.11.7", **changes: Any) -> dict[str, Any]:
    of = {"torch": torch, "python": python, "compiler": "GCC 12.2.0", "standard": "c++20", "date": "2026-11-28"}
    return {**of, "tests": "quick", "build": "ok", "check": "ok", "passed": 7, "failed": 0, "skipped": 1, **changes}


def test_a_line_takes_the_place_of_the_line_of_the_same_versions() -> None:
    rows: list[dict[str, Any]] = []
    for new in (row("2.13.0"), row("2.9.1"), row("2.13.0", "3.9.1"), row("2.13.0", passed=8), row("2.13.0+cpu")):
        rows = versions.merged(rows, new)
    for python in ("3.11.7t", "3.12.0"):
        rows = versions.merged(rows, row("2.13.0", python))
    assert [(line["torch"], line["python"], line["passed"]) for line in rows] == [
        ("2.9.1", "3.11.7", 7),
        ("2.13.0", "3.9.1", 7),
        ("2.13.0", "3.11.7", 8),
        ("2.13.0", "3.11.7t", 7),
        ("2.13.0", "3.12.0", 7),
        ("2.13.0+cpu", "3.11.7", 7),
    ]


def test_the_table_says_what_was_built_and_which_tests_ran() -> None:
    not_built, not_tested = row("2.14.1", build="a.cpp:1: error: a | b"), row("2.15.0", error="died")
    for name in ("passed", "failed", "skipped"):
        del not_built[name], not_tested[name]
    del not_built["check"]
    rows = [row("2.13.0", failed=2), not_built, not_tested]
    lines = versions.table(rows).splitlines()
    assert lines[2:] == [
        "| 2.13.0 | 3.11.7 | GCC 12.2.0 | c++20 | ok | ok | quick: 7 passed, 2 failed, 1 skipped | 2026-11-28 |",
        "| 2.14.1 | 3.11.7 | GCC 12.2.0 | c++20 | a.cpp:1: error: a \\| b |  | none | 2026-11-28 |",
        "| 2.15.0 | 3.11.7 | GCC 12.2.0 | c++20 | ok | ok | died | 2026-11-28 |",
    ]
    assert all(line.replace("\\|", "").count("|") == lines[0].count("|") for line in lines)


def test_only_what_was_built_and_passed_is_good() -> None:
    assert versions.is_good(row("2.13.0"))
    assert versions.is_good(row("2.13.0", tests="none", passed=0))
    for bad in ({"build": "error"}, {"check": "error"}, {"passed": 0}, {"error": "2 failed"}):
        assert not versions.is_good(row("2.13.0", **bad))


def test_a_documents_table_is_replaced_between_its_marks() -> None:
    text = "before\n<!-- versions -->\nold\n<!-- /versions -->\nafter\n"
    once = versions.updated(text, [row("2.13.0")])
    assert once.startswith("before\n<!-- versions -->\n| torch |")
    assert once.endswith("|\n<!-- /versions -->\nafter\n")
    assert versions.updated(once, [row("2.13.0")]) == once
    with pytest.raises(ValueError, match="no place for the table"):
        versions.updated("no marks", [])


def test_a_failing_command_is_one_line_and_leaves_its_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import sys; print('compiling'); print('error: failed'); print('  a.cpp:3: error: no'); sys.exit(1)"
    with pytest.raises(versions.CommandError, match=r"^a\.cpp:3: error: no$"):
        versions.run([sys.executable, "-c", code], log, tmp_path)
    with pytest.raises(versions.CommandError, match=r"^exit code 3$"):
        versions.run([sys.executable, "-c", "import sys; sys.exit(3)"], log, tmp_path)
    assert "compiling\n" in log.read_text()


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("error: pip's\na.cpp:3:1: fatal error: x.h\nlenet_ext: compiling failed\n", "a.cpp:3:1: fatal error: x.h"),
        ("error: pip's\n  lenet_ext: no torch; run: it\nnote\n", "lenet_ext: no torch; run: it"),
        ("note\nan error of something\nnote\n", "an error of something"),
        ("one\ntwo\n\n", "two"),
        ("", ""),
    ],
)
def test_the_line_that_says_most(output: str, line: str) -> None:
    assert versions.first_error(output) == line


def test_counts_of_a_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    suite = '<testsuite tests="9" failures="1" errors="1" skipped="3"/>'
    report.write_text(f"<testsuites>{suite}</testsuites>")
    assert versions.counts(report) == {"passed": 4, "failed": 2, "skipped": 3}


def test_the_names_of_compilers(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    for answer, name in (
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0", "GCC 12.2.0"),
        ("g++-16 (Debian 16.0.1-5) 16.0.1 20260401 (prerelease)", "GCC 16.0.1"),
        ("Debian clang version 14.0.6\nTarget: x86_64-pc-linux-gnu", "Clang 14.0.6"),
    ):
        compiler.write_text(f"#!/bin/sh\necho '{answer}'\n")
        compiler.chmod(0o755)
        assert versions.compiler_name(str(compiler)) == name


@pytest.mark.parametrize("name", versions.QUICK)
def test_the_quick_tests_are_there(name: str) -> None:
    assert (ROOT / "tests" / name).is_file()


@pytest.mark.skipif(not versions.KNOWN.is_file(), reason="a source distribution comes without results")
def test_the_repositorys_table_is_of_its_file() -> None:
    text = versions.DOCUMENT.read_text()
    rows = json.loads(versions.KNOWN.read_text())
    assert versions.updated(text, rows) == text, "python tools/versions.py --table brings it up to date"
