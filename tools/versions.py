"""Builds and tests with other versions of torch, Python and the compiler, and keeps a table of it in CONTRIBUTING.md.

    python tools/versions.py                                      # the torch and the compiler that are there
    python tools/versions.py --pythons a/bin/python b/bin/python  # environments with a torch and what the tests need
    python tools/versions.py --torches 2.13.0 2.14.1              # in new environments under build/versions
    python tools/versions.py --compilers g++ clang++ --standards c++20 --tests all
    python tools/versions.py --table                              # the table again, of what is known

Each build is a whole one with -Wall -Wextra -Werror, into a folder of its own, without CUDA. What it found is a line of
tools/versions.json, in place of the line of the same versions: single ones can be run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "versions"
KNOWN = Path(__file__).with_name("versions.json")
DOCUMENT = ROOT / "CONTRIBUTING.md"
# Where versions differ: the compiler's arithmetic, torch's dispatcher, autograd, transforms and checks of arguments,
# Python's syntax trees (fuse) and its threads. The rest says the same with every version that these pass with.
QUICK = [
    "autograd/test_autograd_function.py",
    "autograd/test_saved.py",
    "fusion/test_fuse.py",
    "network/test_nn.py",
    "operators/test_call_path.py",
    "operators/test_errors.py",
    "operators/test_lenet_convolutions.py",
    "operators/test_linear.py",
    "operators/test_odd_cases.py",
    "operators/test_workers.py",
    "transforms/test_autocast.py",
    "transforms/test_func.py",
]
COLUMNS = ("torch", "python", "compiler", "standard")
_MARKED = re.compile(r"(<!-- versions -->\n).*?(<!-- /versions -->)", re.DOTALL)
_FACTS = """
import json, platform, sysconfig, torch
free_threaded = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
print(json.dumps({"torch": torch.__version__, "python": platform.python_version() + free_threaded}))
"""


class CommandError(Exception):
    """A command's failure, in one line."""


def run(command: list[str], log: Path, cwd: Path = WORK, **variables: str) -> str:
    """Its output, which goes to `log` as well.

    Raises:
        CommandError: with the first line of the output that speaks of an error.
    """
    inherited = {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", "CXXFLAGS")}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    done = subprocess.run(command, cwd=cwd, env=inherited | variables, check=False, **streams)
    with log.open("a") as file:
        file.write(f"+ {' '.join(command)}\n{done.stdout}\n")
    if done.returncode != 0:
        raise CommandError(first_error(done.stdout) or f"exit code {done.returncode}")
    return done.stdout


def first_error(output: str) -> str:
    """What says most: the compiler's first error, else what the build says itself, else any error, else the end."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (r": (fatal )?error: ", r"^lenet_ext: ", r"\berror\b", ""):
        found = [line for line in lines if re.search(pattern, line)]
        if found:
            return found[-1] if not pattern else found[0]
    return ""


def compiler_name(compiler: str) -> str:
    """GCC 12.2.0, Clang 14.0.6."""
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(?:clang version|\)) (\d+\.\d+\.\d+)", answer)
    kind = "Clang" if "clang version" in answer else "GCC"
    return f"{kind} {found[1]}" if found else answer.partition("\n")[0]


def counts(report: Path) -> dict[str, int]:
    """Passed, failed and skipped tests of pytest's JUnit file."""
    found = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        number = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
        found["failed"] += number["failures"] + number["errors"]
        found["skipped"] += number["skipped"]
        found["passed"] += number["tests"] - number["failures"] - number["errors"] - number["skipped"]
    return found


def new_environment(torch: str, python: str) -> str:
    """The Python of an environment with this torch and what the tests need, made once."""
    folder = WORK / f"torch-{torch}"
    made = str(folder / "bin" / "python")
    ready = folder / "ready"
    if not ready.is_file():
        log = WORK / f"torch-{torch}.log"
        run([python, "-m", "venv", "--clear", str(folder)], log)
        run([made, "-m", "pip", "install", f"torch=={torch}"], log)
        run([made, "-m", "pip", "install", f"{ROOT}[test]"], log, LENET_EXT_CUDA="0")
        ready.touch()
    return made


def examine(python: str, compiler: str, standard: str, tests: str) -> dict[str, Any]:
    """A line of the table: what this Python has, the build, the package's own check, the tests."""
    facts = json.loads(subprocess.run([python, "-c", _FACTS], capture_output=True, text=True, check=True).stdout)
    row = {**facts, "compiler": compiler_name(compiler), "standard": standard}
    row |= {"date": datetime.date.today().isoformat(), "tests": tests}
    name = re.sub(r"[^\w.+]+", "-", "-".join(row[column] for column in COLUMNS))
    print(f"{name}: building", flush=True)
    site, log, report = WORK / name, WORK / f"{name}.log", WORK / f"{name}.xml"
    for path in (log, report):
        path.unlink(missing_ok=True)
    shutil.rmtree(site, ignore_errors=True)
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-cache-dir", "--target", str(site)]
    switches = {"CXX": compiler, "CC": compiler, "CXXFLAGS": f"-Werror -std={standard}", "LENET_EXT_CUDA": "0"}
    try:
        run([python, *install, "--verbose", str(ROOT)], log, **switches)
        row["build"] = "ok"
    except CommandError as error:
        row["build"] = str(error)
        return row
    try:
        run([python, "-m", "lenet_ext", "check"], log, PYTHONPATH=str(site))
        row["check"] = "ok"
    except CommandError as error:
        row["check"] = str(error)
    if tests == "none":
        return row
    print(f"{name}: testing", flush=True)
    chosen = QUICK if tests == "quick" else []
    options = ["-m", "not extended", "-p", "no:cacheprovider", f"--junitxml={report}"]
    if tests == "all":
        options += ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    try:
        run([python, "-m", "pytest", "-q", *options, *chosen], log, ROOT / "tests", PYTHONPATH=str(site))
    except CommandError as error:
        row["error"] = str(error)
    if report.is_file():
        row |= counts(report)
    return row


def is_good(row: dict[str, Any]) -> bool:
    tested = row["tests"] == "none" or row.get("passed", 0) > 0
    return row["build"] == "ok" and row["check"] == "ok" and tested and "error" not in row


def key(row: dict[str, Any]) -> list[Any]:
    """By number: 2.9 comes before 2.11. Python 3.13.5t, which is free-threaded, comes after 3.13.5."""
    return [[(part.isdecimal(), part.zfill(6)) for part in re.findall(r"\d+|[a-zA-Z]+", row[name])] for name in COLUMNS]


def merged(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """`new` in place of the line of the same versions."""
    kept = [row for row in rows if any(row[name] != new[name] for name in COLUMNS)]
    return sorted([*kept, new], key=key)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| torch | Python | compiler | standard | `-Werror` build | `lenet-ext check` | tests | date |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        found = ", ".join(f"{row[kind]} {kind}" for kind in ("passed", "failed", "skipped") if row.get(kind))
        tests = f"{row['tests']}: {found}" if found else row.get("error", "none")
        cells = [*(row[name] for name in COLUMNS), row["build"], row.get("check", ""), tests]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in [*cells, row["date"]]) + " |")
    return "\n".join(lines) + "\n"


def updated(text: str, rows: list[dict[str, Any]]) -> str:
    """`text` with the table between its marks.

    Raises:
        ValueError: it has none.
    """
    if not _MARKED.search(text):
        raise ValueError("no place for the table: <!-- versions --> and <!-- /versions --> mark it")
    return _MARKED.sub(lambda found: f"{found[1]}{table(rows)}{found[2]}", text)


def read() -> list[dict[str, Any]]:
    return json.loads(KNOWN.read_text()) if KNOWN.is_file() else []


def write(rows: list[dict[str, Any]]) -> None:
    KNOWN.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")
    DOCUMENT.write_text(updated(DOCUMENT.read_text(), rows))


def main() -> int:
    """Reads the command line; 1 where something was not built, or not passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="*", default=[], metavar="PYTHON")
    parser.add_argument("--torches", nargs="*", default=[], metavar="VERSION")
    parser.add_argument("--compilers", nargs="*", default=["g++"], metavar="CXX")
    parser.add_argument("--standards", nargs="*", default=["c++20"])
    parser.add_argument("--tests", choices=("none", "quick", "all"), default="quick", help="all: what `make test` runs")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    arguments = parser.parse_args()
    if arguments.table:
        write(read())
        return 0
    for compiler in arguments.compilers:
        if shutil.which(compiler) is None:
            parser.error(f"there is no {compiler} on the PATH")
    WORK.mkdir(parents=True, exist_ok=True)
    good = True
    try:
        pythons = [*arguments.pythons, *(new_environment(torch, sys.executable) for torch in arguments.torches)]
    except CommandError as error:
        parser.error(str(error))
    for python in pythons or [sys.executable]:
        for compiler in arguments.compilers:
            for standard in arguments.standards:
                row = examine(python, compiler, standard, arguments.tests)
                write(merged(read(), row))
                good = good and is_good(row)
                print(table([row]).splitlines()[-1], flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
