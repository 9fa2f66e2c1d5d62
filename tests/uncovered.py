"""What `make coverage` writes into coverage.md: how much of each file the tests run, and what they leave out, and why.

    python uncovered.py PYTHON.json CXX.json > coverage.md     # of `coverage json` and `gcovr --json`

The number of a line or branch that no test takes stands under the reason that `REASONS` has for it, or, if there is
none, first of all, with its source: it wants a test, or a reason.
"""

from __future__ import annotations

import ast
import datetime
import json
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# What is known of lines without a test: a reason; the files it holds for; and the lines, those of Python with their
# function in front ("Net.forward: return x"), as regular expressions. The first one that fits counts.
GPU, PROCESSOR = "Needs a GPU, or a build for one", "Needs another processor"
MEMORY, SIZE = "Needs a process that has run out of memory", "Needs more memory than a test may take"
COMPILED = "Python that torch.jit.script or torch.compile makes its own of: tested, but Python does not run it"
PROCESSES = "Needs several processes, which `make test-all` has"
PACKAGE = "Needs a package that the tests do not install; tested where it is there"
NEVER = "Cannot be: written for the compiler, the type checker or the reader"
REASONS: tuple[tuple[str, str, str], ...] = (
    (COMPILED, r"lenet_ext/(functional|net|nn)\.py", r"is_scripting\(\)|_scripted|^scripted_has_kernel: "),
    (COMPILED, r"lenet_ext/training_step\.py", r'reason = "torch\.compile"'),
    (GPU, r"lenet_ext/(bench/results|training/distributed|training/trainer)\.py", r"\btorch\.cuda\."),
    (GPU, r"lenet_ext/bench/timing\.py", r"^cold_time_us: "),
    (GPU, r"lenet_ext/bench/runner\.py", r"^_peak_meters: return \{\}"),
    (GPU, r"lenet_ext/environment/device\.py", r"^synchronize: "),
    (GPU, r"lenet_ext/(functional|_build)\.py", r"\brequire_cuda(\(\)|: if )"),
    (GPU, r"lenet_ext/selftest/calls\.py", r'device\.type == "cpu"'),
    (GPU, r"lenet_ext/training_step\.py", r"the dtype is"),  # of 16 bits, for which the CPU has no whole network
    (GPU, r"csrc/common/build_info\.cpp", r"separator|text\.|begin"),
    (GPU, r"csrc/lenet/optimizer\.cpp", r"is_cpu\(\)"),
    (PROCESSOR, r"csrc/common/capability\.cpp", r"compiled\(|supported\(|Capability::Default|kAll|switch"),
    (PROCESSOR, r"csrc/common/algorithm\.cpp", r"vendor_has_bfloat16"),
    (MEMORY, r"csrc/.*", r"bad_alloc|if \(!parameters\)|PyList_Append|PyModule_AddFunctions|add_call_path"),
    (SIZE, r"csrc/common/algorithm\.cpp", r"!offsets_fit"),
    (SIZE, r"csrc/cpu/conv_backward\.h", r"int64_t\{1\} << 30"),
    (PROCESSES, r"lenet_ext/training/distributed\.py", r"^Processes\.first_goes_ahead: "),
    (PROCESSES, r"lenet_ext/training/trainer\.py", r"^Trainer\.save: return$"),
    (PROCESSES, r"lenet_ext/cli/train\.py", r"processes\.is_first|^_finish: return$"),
    (PACKAGE, r"lenet_ext/bench/providers\.py", r"^OpenVinoProvider\.prepare"),
    (NEVER, r"csrc/cpu/.*", r"^return nullptr;$"),
    (NEVER, r"csrc/common/capability\.cpp", r"^return false;$"),
    (NEVER, r"csrc/cpu/conv_backward\.h", r"^if \(st\.w == 1\)"),  # nobody asks for other strides than these
    (NEVER, r"csrc/linear/autograd\.cpp", r"^if \(relu\) change = "),  # a branch of tensors' counts of references
    (NEVER, r"lenet_ext/__main__\.py", r'if __name__ == "__main__"'),  # nobody imports it
    (NEVER, r"lenet_ext/bench/providers\.py", r"raise NotImplementedError"),
    (NEVER, r"lenet_ext/fusion/chains\.py", r"for step in run\.following"),  # its end is an error, not the loop's
    (NEVER, r"lenet_ext/fusion/fuse\.py", r"elif step\.container is not None and step\.module is not None"),
)


# Where the source of C++ branches; the compiler does so in other places as well, mostly to clean up after exceptions.
BRANCHES = re.compile(r"\b(if|for|while|switch|TORCH_CHECK\w*)\b|\?|&&|\|\|")


@dataclass(frozen=True)
class Place:
    """A line that no test ran, or that no test left in a certain direction."""

    file: str
    line: int
    source: str
    missing: str  # "line", or which way on was not taken
    function: str = ""

    def reason(self) -> str | None:
        """Why there is no test."""
        text = f"{self.function}: {self.source}" if self.function else self.source
        for reason, files, lines in REASONS:
            if re.fullmatch(files, self.file) and re.search(lines, text):
                return reason
        return None


@dataclass(frozen=True)
class File:
    """The counts of one file."""

    name: str
    lines: tuple[int, int]  # run, of so many
    branches: tuple[int, int]
    places: list[Place]


def _sources(name: str) -> list[str]:
    return ["", *(ROOT / name).read_text(encoding="utf-8").splitlines()]


def _functions(name: str) -> dict[int, str]:
    """The function, with its class, that each line of a file of Python is in."""
    found: dict[int, str] = {}

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = outer
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = f"{outer}.{child.name}" if outer else child.name
                found.update(dict.fromkeys(range(child.lineno, (child.end_lineno or child.lineno) + 1), inner))
            visit(child, inner)

    visit(ast.parse((ROOT / name).read_text(encoding="utf-8")), "")
    return found


def of_python(report: dict[str, Any]) -> list[File]:
    files = []
    for path, found in report["files"].items():
        name = path[path.index("lenet_ext/") :]
        source, function, summary = _sources(name), _functions(name), found["summary"]
        places = [
            Place(name, line, source[line].strip(), "line", function.get(line, "")) for line in found["missing_lines"]
        ]
        gone = set(found["missing_lines"])
        places += [
            Place(
                *(name, begin, source[begin].strip(), f"to {end}" if end > 0 else "to the end"),
                function.get(begin, ""),
            )
            for begin, end in found["missing_branches"]
            if not gone & {begin, end}  # a line that is missing says it
        ]
        lines = summary["covered_lines"], summary["num_statements"]
        files.append(File(name, lines, (summary["covered_branches"], summary["num_branches"]), places))
    return files


def of_cxx(report: dict[str, Any]) -> list[File]:
    files = []
    for found in report["files"]:
        name = found["file"]
        source = _sources(name)
        counts: dict[int, int] = {}
        ways: dict[int, dict[bool, int]] = {}
        for line in found["lines"]:  # a template is there once for each of its types
            number = line["line_number"]
            counts[number] = counts.get(number, 0) + line["count"]
            for branch in line["branches"] if BRANCHES.search(source[number]) else ():
                way = ways.setdefault(number, {})
                way[branch["fallthrough"]] = way.get(branch["fallthrough"], 0) + branch["count"]
        # Where an exception leaves a function, and a declaration whose value is in the lines that follow: no statement.
        for line in [line for line in counts if source[line].strip() == "}" or source[line].endswith("=")]:
            del counts[line]
        places = [Place(name, line, source[line].strip(), "line") for line, count in counts.items() if count == 0]
        places += [
            Place(name, line, source[line].strip(), "one way")
            for line, way in ways.items()
            if counts.get(line) and 0 in way.values()
        ]
        every = [count for way in ways.values() for count in way.values()]
        lines = sum(count > 0 for count in counts.values()), len(counts)
        files.append(File(name, lines, (sum(count > 0 for count in every), len(every)), places))
    return files


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _percent(part: tuple[int, int]) -> str:
    return f"{100 * part[0] / part[1]:.1f}%" if part[1] else "-"


def _sum(parts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    counts = list(parts)
    return sum(done for done, _ in counts), sum(whole for _, whole in counts)


def _table(files: list[File]) -> list[str]:
    rows = ["| file | lines | run | branches | taken |", "| --- | ---: | ---: | ---: | ---: |"]
    for title, part in (("Python", of_kind(files, ".py")), ("C++", of_kind(files, ".h", ".cpp"))):
        lines, branches = _sum(file.lines for file in part), _sum(file.branches for file in part)
        rows.append(
            f"| **{title}** | **{lines[1]}** | **{_percent(lines)}** | **{branches[1]}** | **{_percent(branches)}** |"
        )
        rows += [
            f"| {f.name} | {f.lines[1]} | {_percent(f.lines)} | {f.branches[1]} | {_percent(f.branches)} |"
            for f in part
            if f.places
        ]
    return rows


def of_kind(files: list[File], *endings: str) -> list[File]:
    return sorted((file for file in files if file.name.endswith(endings)), key=lambda file: file.name)


def _ranges(places: list[Place]) -> list[tuple[Place, int]]:
    """In order, each with its last line: lines that follow one another are one place."""
    found: list[tuple[Place, int]] = []
    for place in sorted(places, key=lambda place: (place.file, place.line)):
        if found and place.missing == "line" == found[-1][0].missing:
            first, last = found[-1]
            if first.file == place.file and place.line - last <= 2:
                found[-1] = (first, place.line)
                continue
        found.append((place, place.line))
    return found


def _number(place: Place, last: int) -> str:
    if place.missing != "line":
        return f"{place.line} ({place.missing})"
    return f"{place.line}-{last}" if last > place.line else f"{place.line}"


def _with_source(places: list[Place]) -> list[str]:
    return [f"- `{place.file}` {_number(place, last)}: `{place.source[:100]}`" for place, last in _ranges(places)]


def _by_file(places: list[Place]) -> list[str]:
    numbers: dict[str, list[str]] = {}
    for place, last in _ranges(places):
        numbers.setdefault(place.file, []).append(_number(place, last))
    return [f"- `{file}`: {', '.join(found)}" for file, found in numbers.items()]


def report(files: list[File]) -> str:
    places = [place for file in files for place in file.places]
    by_reason: dict[str | None, list[Place]] = {}
    for place in places:
        by_reason.setdefault(place.reason(), []).append(place)
    text = [
        "# What the tests run",
        "",
        f"By `make coverage`, {datetime.date.today()}, on {_processor()},",
        f"with Python {platform.python_version()} and torch {metadata.version('torch')}: the unmarked tests, and those",
        "of the kernels under every instruction set and algorithm. A file that is not in the table is run whole.",
        "",
        "What no test runs is listed below the table by its reason: numbers of lines and, behind that of a line that",
        "is run, the way on that was never taken. A condition in C++ has two ways, also where it has several parts or",
        "is in a template of several types.",
        "",
        *_table(files),
    ]
    order = [None, *dict.fromkeys(reason for reason, _, _ in REASONS)]
    for reason in order:
        if reason in by_reason:
            listed = _with_source if reason is None else _by_file
            text += ["", f"## {reason or 'Without a reason'}", "", *listed(by_reason[reason])]
    return "\n".join(text) + "\n"


def main() -> int:
    of_each = [of_python, of_cxx]
    files = [
        file
        for read, path in zip(of_each, sys.argv[1:], strict=True)
        for file in read(json.loads(Path(path).read_text()))
    ]
    sys.stdout.write(report(files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
