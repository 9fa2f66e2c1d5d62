"""Everything that needs a GPU, in one command of at most six minutes: `python benchmarks/gpu_check.py --out DIR`.

The package and the torch-free driver are built together. Then, side by side, what is right: the driver, alone and under
compute-sanitizer's four tools, the tests on cuda, 200 training steps beside stock. Then, one after the other and alone,
what is fast: ceilings of this GPU; this package against stock eager, channels_last, stock and ours under CUDA graphs,
in strict float32, TF32 and bfloat16, the whole net and each layer; the backward pass by the cost rule; the problem of
KernelBench that is this network; MNIST to 99%; a sweep of shapes; what is left of the time goes to the cost rules'
other sides, torch.compile(mode="max-autotune") and JAX. Nsight Compute comes last: it looks at the whole net forward,
backward and in a training step.

Each step is a process of its own with a time limit, so that one that hangs or crashes costs its own result only, and
DIR/gpu_check.json is rewritten after each. What no longer fits the time (--seconds) is skipped, as is what needs a tool
that is not there: another call goes on, with --stage and --only, for what was built stays in build/gpu-check and is
built again only from other sources or for another Python, torch or GPU. At the end DIR has the small file of the
results (summary.py) and the tables. Nothing is downloaded, and Python's environment stays as it is. The exit code is 1
if a step failed or ran out of its time, skipped ones do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import ncu
from gpu.targets import PREDICTED_US, rows_of, verdicts

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-check"
SITE, DRIVER = WORK / "site", WORK / "driver"
SECONDS = 350.0  # of a call
SECONDS_OF_NSIGHT = 25.0  # that the steps before it leave
SHORTEST = 5.0  # seconds that are worth starting a step for
PRECISIONS = ["float32", "tf32", "bfloat16"]
MOST_LAUNCHES = 120  # that ncu looks at; some ninety of the whole net's are to be expected

OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "timed out", "skipped"


@dataclass(frozen=True)
class Step:
    """`run` gets the seconds it may take and returns what :func:`run_command` does, possibly with a "result"."""

    name: str
    limit: float
    run: Callable[[float], dict[str, Any]]
    needs: tuple[str, ...] = ()  # steps that must have gone well
    tool: str | None = None  # a program that must be there


@dataclass(frozen=True)
class Group:
    """Steps that run one after the other, or side by side; none needs another one that runs beside it."""

    stage: str  # "build", "check" or "bench"
    steps: list[Step]
    side_by_side: bool = False
    leaves: float = 0.0  # seconds of the call, for the groups behind it


# ---------------------------------------------------------------------------------------------------------------------
# Running steps


def run_command(command: list[str], limit: float, cwd: Path | None = None, **environment: str) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit,
            cwd=cwd or ROOT,
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
    return None if left >= SHORTEST else "the time is over"


def run_groups(groups: Iterable[Group], report: dict[str, Any], save: Callable[[], None], seconds: float) -> None:
    """Runs the groups one after the other into ``report["steps"]``, each step within what is left of the time."""
    end = time.monotonic() + seconds
    done = report["steps"]
    one_at_a_time = threading.Lock()

    def run(step: Step, until: float) -> None:
        left = until - time.monotonic()
        with one_at_a_time:
            reason = _reason_to_skip(step, done, left)
        outcome = _skipped(reason) if reason is not None else step.run(min(step.limit, left))
        output = outcome.pop("output", "")
        with one_at_a_time:
            done[step.name] = {**outcome, "tail": output[-4000:]}
            save()
            print(f"{step.name:24} {outcome['status']:>10} {outcome['seconds']:6.1f} s", flush=True)
            if reason is not None:
                print(f"  {reason}")
            elif outcome["status"] != OK:
                print("  " + output[-1500:].strip().replace("\n", "\n  "))

    for group in groups:
        with ThreadPoolExecutor(max(1, len(group.steps)) if group.side_by_side else 1) as pool:
            list(pool.map(run, group.steps, [end - group.leaves] * len(group.steps)))


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


def build_hash() -> str:
    """Of the sources, and of what they are built for."""
    import torch

    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return f"{source_hash()} {platform.python_version()} {platform.machine()} {torch.__version__} {gpu}"


def built_once(name: str, build: Callable[[float], dict[str, Any]]) -> Callable[[float], dict[str, Any]]:
    """`build`, unless it went well before with the same sources, for the same Python, torch and GPU."""

    def run(limit: float) -> dict[str, Any]:
        mark, sources = WORK / f"{name}.sources", build_hash()
        if mark.exists() and mark.read_text() == sources:
            return {"status": OK, "code": 0, "seconds": 0.0, "output": "built before from the same sources"}
        mark.unlink(missing_ok=True)
        outcome = build(limit)
        if outcome["status"] == OK:
            mark.write_text(sources)
        return outcome

    return run


def build_package(limit: float) -> dict[str, Any]:
    import torch

    shutil.rmtree(SITE, ignore_errors=True)
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(SITE), "."]
    # For this GPU alone: a file's architectures are compiled one after the other.
    major, minor = torch.cuda.get_device_capability()
    return run_command(command, limit, LENET_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST=f"{major}.{minor}")


def build_driver(limit: float) -> dict[str, Any]:
    nvcc = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")
    command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-arch=native"]
    begin = time.perf_counter()

    def compile_one(source: Path) -> dict[str, Any]:
        return run_command([*command, "-c", str(source), "-o", str(WORK / f"{source.stem}.o")], limit)

    sources = [ROOT / "tests" / "cuda_on_cpu" / "driver.cu", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_one, sources))
    failed = [outcome for outcome in compiled if outcome["status"] != OK]
    if failed:
        return failed[0]
    objects = [str(WORK / f"{source.stem}.o") for source in sources]
    outcome = run_command([*command, *objects, "-o", str(DRIVER)], limit)
    return {**outcome, "seconds": round(time.perf_counter() - begin, 1)}


MEASUREMENTS = ROOT / "benchmarks" / "gpu" / "measurements.py"


def measurement(name: str, *arguments: str, **environment: str) -> Callable[[float], dict[str, Any]]:
    """Runs one of gpu/measurements.py; the file it writes is its result, also if it was cut short."""
    file = WORK / f"{'-'.join((name, *(a.replace('/', '_') for a in arguments), *environment.values()))}.json"

    def run(limit: float) -> dict[str, Any]:
        file.unlink(missing_ok=True)
        outcome = run_command([sys.executable, str(MEASUREMENTS), name, str(file), *arguments], limit, **environment)
        with contextlib.suppress(OSError, ValueError):
            outcome["result"] = json.loads(file.read_text())
        return outcome

    return run


def profile_net(limit: float) -> dict[str, Any]:
    program = [sys.executable, str(MEASUREMENTS), "profiled", str(WORK / "profiled.json")]
    outcome = run_command(ncu.command(program, MOST_LAUNCHES), limit)
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


def build_steps() -> list[Step]:
    return [
        Step("build", 240, built_once("package", build_package)),
        Step("driver build", 150, built_once("driver", build_driver)),
    ]


def check_steps() -> list[Step]:
    # From the tests' folder: elsewhere the source tree would be found before the installed package.
    selected = "cuda and not cuda_on_cpu and not cuda_build"
    tests = [sys.executable, "-m", "pytest", "-q", "-k", selected]
    if importlib.util.find_spec("xdist"):  # one process would not be done in time
        tests += ["-n", "auto", "--maxprocesses", "10", "--dist", "worksteal"]
    steps = [
        Step("driver", 60, lambda limit: run_command([str(DRIVER)], limit), ("driver build",)),
        Step("tests", 200, lambda limit: run_command(tests, limit, ROOT / "tests"), ("build",)),
        Step("parity", 45, measurement("parity"), ("build",)),
        Step("facts", 45, measurement("facts"), ("build",)),
    ]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", str(DRIVER)]
        run = lambda limit, command=command: run_command(command, limit)  # noqa: E731
        steps.append(Step(tool, 75, run, ("driver build",), "compute-sanitizer"))
    return steps


def bench_steps(mnist_root: str | None) -> list[Step]:
    """What matters most comes first."""
    needs = ("build",)
    steps = [Step("ceilings", 20, measurement("ceilings"), needs)]
    steps += [Step(f"net {precision}", 40, measurement("net", precision), needs) for precision in PRECISIONS]
    steps += [Step(f"layers {precision}", 30, measurement("layers", precision), needs) for precision in PRECISIONS]
    steps.append(Step("backward", 30, measurement("backward", "rule"), needs))
    steps.append(Step("mnist", 30, mnist(mnist_root), needs))
    steps.append(Step("kernelbench", 80, measurement("kernelbench"), needs))
    steps.append(Step("sweep", 30, measurement("sweep", "rule"), needs))
    for algorithm in ("direct", "vendor"):
        run = measurement("sweep", algorithm, LENET_EXT_ALGORITHM=algorithm)
        steps.append(Step(f"sweep {algorithm}", 30, run, needs))
        run = measurement("backward", algorithm, LENET_EXT_ALGORITHM=algorithm)
        steps.append(Step(f"backward {algorithm}", 30, run, needs))
    return [
        *steps,
        Step("jax", 45, measurement("jax"), needs),
        Step("compile", 150, measurement("compiled"), needs),
    ]


def groups(mnist_root: str | None) -> list[Group]:
    return [
        Group("build", build_steps(), side_by_side=True),
        Group("check", check_steps(), side_by_side=True),
        Group("bench", bench_steps(mnist_root), leaves=SECONDS_OF_NSIGHT),
        Group("bench", [Step("ncu", 60, profile_net, ("build",), "ncu")]),
    ]


def chosen(groups: Iterable[Group], stage: str, only: str | None) -> list[Group]:
    """The groups of a stage, or of "all", with the steps whose name contains `only`; the builds in any case."""
    return [
        group
        if group.stage == "build" or only is None
        else dataclasses.replace(group, steps=[step for step in group.steps if only in step.name])
        for group in groups
        if group.stage == "build" or stage in (group.stage, "all")
    ]


# ---------------------------------------------------------------------------------------------------------------------


def commit() -> str:
    """Of this copy, with ``+changes`` where its files differ; "unknown" where there is no repository of its own."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    said = run_command(describe, 20) if (ROOT / ".git").exists() else _skipped("no repository")
    return said["output"].strip() if said["status"] == OK else "unknown"


def environment() -> dict[str, Any]:
    import torch

    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    smi = run_command(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], 20)
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "nvidia_smi": smi["output"].strip(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def tables(report: dict[str, Any]) -> str:
    """Times in microseconds beside what was predicted, then the targets."""
    lines = []
    for name in report["steps"]:
        shown = ("net", "layers", "backward", "compile", "kernelbench", "jax")
        rows = rows_of(report, name) if name.split()[0] in shown else []
        if not rows:
            continue
        lines.append(f"\n{name}: median microseconds of a call")
        providers = sorted({provider for row in rows for provider in row["us"]})
        head = "".join(f"{provider:>18}" for provider in providers)
        lines.append(f"{'case':34}{head}{'ours, predicted':>18}")
        for row in rows:
            cells = [f"{row['us'][p]['median']:18.2f}" if p in row["us"] else f"{'-':>18}" for p in providers]
            predicted = None
            if name.split()[0] in ("net", "backward", "kernelbench"):
                predicted = PREDICTED_US.get((row.get("precision", ""), row["case"]))
            lines.append(f"{row['case']:34}{''.join(cells)}{predicted if predicted is not None else '-':>18}")
    lines.append(f"\n{'target':48}{'measured':>12}{'committed':>12}{'ambitious':>12}")
    for target, value, verdict in verdicts(report):
        measured = "-" if value is None else f"{value:.3g}"
        lines.append(f"{target.what:48}{measured:>12}{target.committed:>12g}{target.ambitious:>12g}  {verdict}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["check", "bench", "all"], default="all")
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), default=ROOT / "runs" / "gpu")
    parser.add_argument("--only", help="only the steps whose name contains this, and the builds")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that all of it may take (default: 350)")
    parser.add_argument("--mnist-root", default=os.environ.get("LENET_EXT_MNIST_ROOT"), help="the four files of MNIST")
    options = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU here", file=sys.stderr)
        return 1
    WORK.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"environment": environment(), "steps": {}}

    def save() -> None:
        (options.out / "gpu_check.json").write_text(json.dumps(report, indent=1))

    run_groups(chosen(groups(options.mnist_root), options.stage, options.only), report, save, options.seconds)
    report["environment_after"] = environment()
    save()
    text = tables(report)
    (options.out / "tables.txt").write_text(text + "\n")
    print(text)
    small = [sys.executable, "benchmarks/summary.py", str(options.out / "gpu_check.json"), "--into", str(options.out)]
    print(run_command(small, 60)["output"].strip())
    return int(any(step["status"] in (FAILED, TIMED_OUT) for step in report["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
