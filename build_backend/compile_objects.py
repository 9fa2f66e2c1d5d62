"""Compiles sources that need flags of their own, which setuptools has no notion of: with ninja, which recompiles only
what changed (headers included), or one after the other without it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ObjectFile:
    source: Path
    output: Path
    command: list[str]  # compiler and flags, without -c, -o and the dependency file


def _arguments(job: ObjectFile) -> list[str]:
    dependencies = f"{job.output}.d"
    return [*job.command, "-MD", "-MF", dependencies, "-c", str(job.source), "-o", str(job.output)]


def _escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _shell(arguments: list[str]) -> str:
    return " ".join("'" + a.replace("'", "'\\''") + "'" for a in arguments).replace("$", "$$")


def compile_objects(jobs: list[ObjectFile], build_directory: Path, max_jobs: int) -> None:
    """Raises SystemExit with one sentence where a compiler fails; its own messages have been printed by then."""
    build_directory.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja")
    if ninja is None:
        for job in jobs:
            print(" ".join(_arguments(job)), flush=True)
            if subprocess.call(_arguments(job)) != 0:
                sys.exit(f"lenet_ext: compiling {job.source.name} failed, see the compiler's message above")
        return
    lines = ["ninja_required_version = 1.5"]
    for number, job in enumerate(jobs):
        lines += [
            f"rule compile{number}",
            f"  command = {_shell(_arguments(job))}",
            "  depfile = $out.d",
            "  deps = gcc",
            f"build {_escape(str(job.output))}: compile{number} {_escape(str(job.source))}",
        ]
    (build_directory / "build.ninja").write_text("\n".join(lines) + "\n")
    if subprocess.call([ninja, "-C", str(build_directory), "-j", str(max_jobs)]) != 0:
        sys.exit("lenet_ext: compiling the kernels failed, see the compiler's message above")
