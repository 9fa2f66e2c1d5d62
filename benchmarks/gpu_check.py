"""Everything that needs a GPU, in one command: `python benchmarks/gpu_check.py --stage check|bench|all --out DIR`.

Stage "check": build, ceilings of this GPU, the torch-free driver, compute-sanitizer's four tools on it, the tests on
cuda, 200 training steps beside stock. Stage "bench": this package against stock eager, channels_last, stock and ours
under CUDA graphs, torch.compile(mode="max-autotune") and JAX; forward and training step; strict float32, TF32 and
bfloat16; the whole net and each layer; a sweep of shapes, by the cost rule and with each algorithm forced; the problem
of KernelBench that is this network; MNIST to 99%; ncu. It builds what an earlier stage has not built from the same
sources.

Each step is a process of its own with a time limit, so that one that hangs or crashes costs its own result only, and
DIR/gpu_check.json is rewritten after each. A stage ends within 9.5 minutes: what no longer fits is skipped, as is what
needs a tool that is not there. The package is installed into a folder of its own; nothing is downloaded. The exit code
is 1 if a step failed or ran out of its time, skipped ones do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import ncu
from gpu.targets import PREDICTED_US, rows_of, verdicts

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(tempfile.gettempdir()) / "lenet_ext-gpu-check"
SITE, DRIVER = WORK / "site", WORK / "driver"
STAGE_SECONDS = 570.0
SHORTEST = 5.0  # seconds that are worth starting a step for
PRECISIONS = ["float32", "tf32", "bfloat16"]
DRIVER_LAUNCHES = 60  # that ncu looks at

OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "timed out", "skipped"


@dataclass(frozen=True)
class Step:
    """`run` gets the seconds it may take and returns what :func:`run_command` does, possibly with a "result"."""

    name: str
    limit: float
    run: Callable[[float], dict[str, Any]]
    needs: tuple[str, ...] = ()  # steps that must have gone well
    tool: str | None = None  # a program that must be there


# ---------------------------------------------------------------------------------------------------------------------
# Running steps


def run_command(command: list[str], limit: float, cwd: Path = ROOT, **environment: str) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": _python_path(), **environment},
            errors="replace",
        )
        status, code = (OK if done.returncode == 0 else FAILED), done.returncode
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status, code, output = TIMED_OUT, -1, "".join(_text(part) for part in (error.stdout, error.stderr))
    except OSError as error:
        status, code, output = FAILED, -1, str(error)
    seconds = round(time.perf_counter() - begin, 1)
    return {"status": status, "code": code, "seconds": seconds, "command": " ".join(command), "output": output}


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH"))))


def _text(part: bytes | str | None) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else part or ""


def _skipped(reason: str) -> dict[str, Any]:
    return {"status": SKIPPED, "reason": reason, "seconds": 0.0}


def _reason_to_skip(step: Step, done: dict[str, Any], left: float) -> str | None:
    if step.tool is not None and shutil.which(step.tool) is None:
        return f"{step.tool} is not there"
    for name in step.needs:
        status = done.get(name, {}).get("status", "not part of this run")
        if status != OK:
            return f'needs the step "{name}": {status}'
    return None if left >= SHORTEST else "the stage's time is over"


def run_stage(steps: Iterable[Step], report: dict[str, Any], save: Callable[[], None], seconds: float) -> None:
    """Runs the steps one after the other into ``report["steps"]``, each within what is left of the stage's time."""
    end = time.monotonic() + seconds
    done = report["steps"]
    for step in steps:
        left = end - time.monotonic()
        reason = _reason_to_skip(step, done, left)
        outcome = _skipped(reason) if reason is not None else step.run(min(step.limit, left))
        output = outcome.pop("output", "")
        done[step.name] = {**outcome, "tail": output[-4000:]}
        save()
        print(f"{step.name:24} {outcome['status']:>10} {outcome['seconds']:6.1f} s", flush=True)
        if reason is not None:
            print(f"  {reason}")
        elif outcome["status"] != OK:
            print("  " + output[-1500:].strip().replace("\n", "\n  "))


# ---------------------------------------------------------------------------------------------------------------------
# The steps


def source_hash() -> str:
    """Of everything that the package and the driver are built from."""
    digest = hashlib.sha256()
    folders = ("csrc", "lenet_ext", "build_backend", "tests/cuda_on_cpu")
    suffixes = {".cpp", ".h", ".cu", ".cuh", ".py"}
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", *files]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def built_once(name: str, build: Callable[[float], dict[str, Any]]) -> Callable[[float], dict[str, Any]]:
    """`build`, unless it went well before with the same sources."""

    def run(limit: float) -> dict[str, Any]:
        mark, sources = WORK / f"{name}.sources", source_hash()
        if mark.exists() and mark.read_text() == sources:
            return {"status": OK, "code": 0, "seconds": 0.0, "output": "built before from the same sources"}
        mark.unlink(missing_ok=True)
        outcome = build(limit)
        if outcome["status"] == OK:
            mark.write_text(sources)
        return outcome

    return run


def build_package(limit: float) -> dict[str, Any]:
    shutil.rmtree(SITE, ignore_errors=True)
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    return run_command(
        [sys.executable, "-m", "pip", "install", *flags, "--target", str(SITE), "."], limit, LENET_EXT_CUDA="1"
    )


def build_driver(limit: float) -> dict[str, Any]:
    nvcc = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")
    sources = ["tests/cuda_on_cpu/driver.cu", *map(str, sorted((ROOT / "csrc" / "cuda").glob("*.cu")))]
    return run_command([nvcc, "-std=c++17", "-O3", "-lineinfo", "-arch=native", *sources, "-o", str(DRIVER)], limit)


def measurement(name: str, *arguments: str, **environment: str) -> Callable[[float], dict[str, Any]]:
    """Runs one of gpu/measurements.py; the file it writes is its result, also if it was cut short."""
    file = WORK / f"{'-'.join((name, *(a.replace('/', '_') for a in arguments), *environment.values()))}.json"
    script = ROOT / "benchmarks" / "gpu" / "measurements.py"

    def run(limit: float) -> dict[str, Any]:
        file.unlink(missing_ok=True)
        outcome = run_command([sys.executable, str(script), name, str(file), *arguments], limit, **environment)
        with contextlib.suppress(OSError, ValueError):
            outcome["result"] = json.loads(file.read_text())
        return outcome

    return run


def profile_driver(limit: float) -> dict[str, Any]:
    outcome = run_command(ncu.command(str(DRIVER), DRIVER_LAUNCHES), limit)
    try:
        outcome["result"] = ncu.parse(outcome["output"])
    except ValueError as error:
        outcome.update(status=FAILED if outcome["status"] == OK else outcome["status"])
        outcome["output"] += f"\n{error}"
    return outcome


def mnist(root: str | None) -> Callable[[float], dict[str, Any]]:
    if root is None or not Path(root).is_dir():
        return lambda limit: _skipped(f"no directory with the files of MNIST (--mnist-root): {root}")
    return measurement("mnist", str(Path(root).resolve()))


def check_steps() -> list[Step]:
    # From the tests' folder: elsewhere the source tree would be found before the installed package.
    selected = "cuda and not cuda_on_cpu and not cuda_build"
    tests = [sys.executable, "-m", "pytest", "-q", "-k", selected]
    if importlib.util.find_spec("xdist"):  # one process would not be done in time
        tests += ["-n", "auto", "--maxprocesses", "10", "--dist", "worksteal"]
    steps = [
        Step("build", 240, built_once("package", build_package)),
        Step("driver build", 150, built_once("driver", build_driver)),
        Step("driver", 60, lambda limit: run_command([str(DRIVER)], limit), ("driver build",)),
        Step("tests", 200, lambda limit: run_command(tests, limit, ROOT / "tests"), ("build",)),
        Step("parity", 45, measurement("parity"), ("build",)),
    ]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", str(DRIVER)]
        run = lambda limit, command=command: run_command(command, limit)  # noqa: E731
        steps.append(Step(tool, 75, run, ("driver build",), "compute-sanitizer"))
    return [
        *steps,
        Step("ceilings", 45, measurement("ceilings"), ("build",)),
        Step("facts", 45, measurement("facts"), ("build",)),
    ]


def bench_steps(mnist_root: str | None) -> list[Step]:
    needs = ("build",)
    steps = [Step("build", 240, built_once("package", build_package))]
    steps += [Step(f"net {precision}", 60, measurement("net", precision), needs) for precision in PRECISIONS]
    steps += [Step(f"layers {precision}", 40, measurement("layers", precision), needs) for precision in PRECISIONS]
    steps.append(Step("sweep", 45, measurement("sweep", "rule"), needs))
    steps.append(Step("backward", 45, measurement("backward", "rule"), needs))
    steps.append(Step("mnist", 45, mnist(mnist_root), needs))
    for algorithm in ("direct", "vendor"):
        run = measurement("sweep", algorithm, LENET_EXT_ALGORITHM=algorithm)
        steps.append(Step(f"sweep {algorithm}", 45, run, needs))
        run = measurement("backward", algorithm, LENET_EXT_ALGORITHM=algorithm)
        steps.append(Step(f"backward {algorithm}", 45, run, needs))
    return [
        *steps,
        Step("driver build", 150, built_once("driver", build_driver)),
        Step("ncu", 60, profile_driver, ("driver build",), "ncu"),
        Step("kernelbench", 60, measurement("kernelbench"), needs),
        Step("jax", 45, measurement("jax"), needs),
        Step("compile", 150, measurement("compiled"), needs),
    ]


# ---------------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    import torch

    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    smi = run_command(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], 20)
    commit = run_command(["git", "rev-parse", "HEAD"], 20)
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "nvidia_smi": smi["output"].strip(),
        "commit": commit["output"].strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def print_tables(report: dict[str, Any]) -> None:
    """Times in microseconds beside what was predicted, then the targets."""
    for name in report["steps"]:
        shown = ("net", "layers", "backward", "compile", "kernelbench", "jax")
        rows = rows_of(report, name) if name.split()[0] in shown else []
        if not rows:
            continue
        print(f"\n{name}: median microseconds of a call")
        providers = sorted({provider for row in rows for provider in row["us"]})
        print(f"{'case':34}" + "".join(f"{provider:>18}" for provider in providers) + f"{'ours, predicted':>18}")
        for row in rows:
            cells = [f"{row['us'][p]['median']:18.2f}" if p in row["us"] else f"{'-':>18}" for p in providers]
            predicted = None
            if name.split()[0] in ("net", "backward", "kernelbench"):
                predicted = PREDICTED_US.get((row.get("precision", ""), row["case"]))
            print(f"{row['case']:34}" + "".join(cells) + f"{predicted if predicted is not None else '-':>18}")
    print(f"\n{'target':44}{'measured':>12}{'committed':>12}{'ambitious':>12}")
    for target, value, verdict in verdicts(report):
        measured = "-" if value is None else f"{value:.3g}"
        print(f"{target.what:44}{measured:>12}{target.committed:>12g}{target.ambitious:>12g}  {verdict}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["check", "bench", "all"], default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--only", help="only the steps whose name contains this, and the builds")
    parser.add_argument("--mnist-root", default=os.environ.get("LENET_EXT_MNIST_ROOT"), help="the four files of MNIST")
    options = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU here", file=sys.stderr)
        return 1
    WORK.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    stages = {"check": check_steps(), "bench": bench_steps(options.mnist_root)}
    report: dict[str, Any] = {"environment": environment(), "steps": {}}

    def save() -> None:
        (options.out / "gpu_check.json").write_text(json.dumps(report, indent=1))

    for stage, steps in stages.items():
        if options.stage not in (stage, "all"):
            continue
        chosen = [s for s in steps if options.only is None or options.only in s.name or "build" in s.name]
        run_stage(chosen, report, save, STAGE_SECONDS)
    report["environment_after"] = environment()
    save()
    print_tables(report)
    return int(any(step["status"] in (FAILED, TIMED_OUT) for step in report["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
