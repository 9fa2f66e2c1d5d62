"""benchmarks/gpu_check.py, as far as it can be tested without a GPU: the order of steps, what is read from other tools,
the verdicts, and that every measurement runs (on the CPU, in small)."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lenet_ext.bench import Plan
from lenet_ext.bench.timing import Effort
from lenet_ext.training import datasets

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_check  # noqa: E402
from gpu import measurements, ncu, targets  # noqa: E402
from gpu_check import FAILED, OK, SKIPPED, TIMED_OUT, Group, Step, run_command, run_groups  # noqa: E402


def outcome(status: str) -> dict[str, Any]:
    return {"status": status, "code": 0, "seconds": 0.1, "output": "what it said"}


def run(*groups: list[Step], seconds: float = 60.0, **options: Any) -> tuple[dict[str, Any], list[str]]:
    report: dict[str, Any] = {"steps": {}}
    saved: list[str] = []
    made = [Group("check", steps, **options) for steps in groups]
    run_groups(made, report, lambda: saved.append(json.dumps(report)), seconds)
    return report["steps"], saved


def test_steps_depend_on_each_other():
    ran = []

    def step(name: str, status: str, **rest: Any) -> Step:
        return Step(name, 10, lambda limit: ran.append(name) or outcome(status), **rest)

    done, saved = run(
        [
            step("build", OK),
            step("driver", FAILED),
            step("tests", OK, needs=("build",)),
            step("memcheck", OK, needs=("build", "driver")),
            step("absent", OK, needs=("nothing of the kind",)),
            step("tool", OK, tool="a-program-that-is-not-there"),
            step("python", TIMED_OUT, tool=Path(sys.executable).name),
        ]
    )
    assert ran == ["build", "driver", "tests", "python"]
    assert [step["status"] for step in done.values()] == [OK, FAILED, OK, SKIPPED, SKIPPED, SKIPPED, TIMED_OUT]
    assert done["memcheck"]["reason"] == 'needs the step "driver": failed'
    assert "not part of this run" in done["absent"]["reason"]
    assert "a-program-that-is-not-there" in done["tool"]["reason"]
    assert done["driver"]["tail"] == "what it said"
    # After each step the file has everything so far.
    assert [len(json.loads(text)["steps"]) for text in saved] == list(range(1, 8))


def test_steps_of_a_group_run_side_by_side():
    """Each waits for the other; the next group begins when both are done."""
    both, ran = threading.Barrier(2), []

    def met(limit: float) -> dict[str, Any]:
        both.wait(timeout=30)
        return outcome(OK)

    last = Step("last", 10, lambda limit: ran.append(both.n_waiting) or outcome(OK), needs=("a", "b"))
    done, saved = run([Step(name, 10, met) for name in "ab"], [last], side_by_side=True)
    assert {step["status"] for step in done.values()} == {OK}
    assert ran == [0]
    assert len(saved) == 3


def test_a_group_leaves_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])

    def slow(limit: float) -> dict[str, Any]:
        now[0] += limit
        return outcome(OK)

    done, _ = run([Step(name, 60, slow) for name in "abc"], [Step("last", 60, slow)], seconds=100, leaves=25)
    # The second group's steps have to leave as much.
    assert [step["status"] for step in done.values()] == [OK, OK, SKIPPED, SKIPPED]
    report: dict[str, Any] = {"steps": {}}
    now[0] = 0.0
    groups = [Group("bench", [Step(n, 60, slow) for n in "abc"], leaves=25), Group("bench", [Step("last", 60, slow)])]
    run_groups(groups, report, lambda: None, 100)
    assert [step["status"] for step in report["steps"].values()] == [OK, OK, SKIPPED, OK]
    assert now[0] == 100


def test_a_call_ends_in_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    limits = []

    def slow(limit: float) -> dict[str, Any]:
        limits.append(limit)
        now[0] += min(limit, 40)
        return outcome(OK)

    done, _ = run([Step(name, 60, slow) for name in "abcd"], seconds=83)
    assert limits == [60, 43]  # the second may take what is left
    assert [done[name]["status"] for name in "abcd"] == [OK, OK, SKIPPED, SKIPPED]
    assert done["c"]["reason"] == "the time is over"


def test_commands():
    python = sys.executable
    done = run_command([python, "-c", "import os; print('out', os.environ['VARIABLE'])"], 60, VARIABLE="set")
    assert (done["status"], done["code"], done["output"].strip()) == (OK, 0, "out set")
    done = run_command([python, "-c", "import sys; sys.exit('reason')"], 60)
    assert (done["status"], done["code"], done["output"].strip()) == (FAILED, 1, "reason")
    done = run_command([python, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2)
    assert (done["status"], done["output"].strip()) == (TIMED_OUT, "begun")
    assert run_command(["a-program-that-is-not-there"], 60)["status"] == FAILED


def test_built_once(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    sources, builds, status = ["first"], [], [FAILED]
    monkeypatch.setattr(gpu_check, "source_hash", lambda: sources[0])
    for_python = [gpu_check.platform.python_version()]
    monkeypatch.setattr(gpu_check.platform, "python_version", lambda: for_python[0])
    build = gpu_check.built_once("package", lambda limit: builds.append(limit) or outcome(status[0]))
    assert build(1)["status"] == FAILED
    status[0] = OK
    assert [build(2)["status"], build(3)["status"]] == [OK, OK]
    assert builds == [1, 2]  # not again after it went well
    sources[0] = "second"
    build(4)
    assert builds == [1, 2, 4]
    for_python[0] = "another"
    build(5)
    assert builds == [1, 2, 4, 5]


def test_the_driver_is_compiled_file_by_file(tmp_path, monkeypatch):
    calls, kernels = tmp_path / "calls", sorted((BENCHMARKS.parent / "csrc" / "cuda").glob("*.cu"))
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n[ ! -e {tmp_path}/broken ] || ! echo "$@" | grep -q lenet_step\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    monkeypatch.setattr(gpu_check, "DRIVER", tmp_path / "driver")
    assert gpu_check.build_driver(60)["status"] == OK
    *compiled, linked = calls.read_text().splitlines()
    assert len(compiled) == len(kernels) + 1
    assert all(f"{tmp_path}/{kernel.stem}.o" in linked for kernel in kernels)
    assert linked.endswith(f"-o {tmp_path}/driver")
    (tmp_path / "broken").touch()
    assert gpu_check.build_driver(60)["status"] == FAILED
    assert len(calls.read_text().splitlines()) == 2 * len(compiled) + 1  # nothing was linked


def test_the_hash_sees_every_source(tmp_path, monkeypatch):
    for name in (
        "setup.py",
        "pyproject.toml",
        "csrc/cuda/kernel.cu",
        "lenet_ext/net.py",
        "tests/cuda_on_cpu/driver.cu",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    hashes = {gpu_check.source_hash()}
    for name in ("csrc/cuda/kernel.cu", "lenet_ext/net.py", "tests/cuda_on_cpu/driver.cu", "pyproject.toml"):
        (tmp_path / name).write_text("changed")
        hashes.add(gpu_check.source_hash())
    assert len(hashes) == 5


@pytest.mark.parametrize("stage", ["check", "bench", "all"])
def test_stages_are_whole(stage):
    """Every step that is needed is part of the same stage and of an earlier group; names are unique."""
    groups = gpu_check.chosen(gpu_check.groups("somewhere"), stage, None)
    names: list[str] = []
    for group in groups:
        for step in group.steps:
            assert set(step.needs) <= set(names), step.name
            assert step.limit < gpu_check.SECONDS
            names += [] if group.side_by_side else [step.name]
        names += [step.name for step in group.steps] if group.side_by_side else []
    assert len(set(names)) == len(names)
    assert ("tests" in names, "net float32" in names) == (stage != "bench", stage != "check")
    assert names[-1] == ("ncu" if stage != "check" else "initcheck")


def test_a_part_of_the_steps():
    groups = gpu_check.chosen(gpu_check.groups("somewhere"), "bench", "layers")
    names = [step.name for group in groups for step in group.steps]
    assert names == ["build", "driver build", "layers float32", "layers tf32", "layers bfloat16"]


def test_mnist_without_files(tmp_path):
    for root in (None, str(tmp_path / "absent")):
        step = next(s for s in gpu_check.bench_steps(root) if s.name == "mnist")
        done = step.run(10)
        assert done["status"] == SKIPPED
        assert "--mnist-root" in done["reason"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_this_copy(tmp_path, monkeypatch):
    """What git says of an error is no commit, and that of a folder around the copy is another project's."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=somebody", "-c", "user.email=somebody@example.com", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    copy = tmp_path / "copy"
    copy.mkdir()
    for root in (tmp_path, copy):
        monkeypatch.setattr(gpu_check, "ROOT", root)
        assert gpu_check.commit() == "unknown"
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    git("init", "--quiet")
    (tmp_path / "file").write_text("before")
    git("add", "file")
    assert gpu_check.commit() == "unknown"  # there is none yet
    git("commit", "--quiet", "--message", "First")
    git("tag", "a-name")
    assert gpu_check.commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("after")
    assert gpu_check.commit() == git("rev-parse", "HEAD") + "+changes"
    monkeypatch.setattr(gpu_check, "ROOT", copy)
    assert gpu_check.commit() == "unknown"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "gpu_check: torch sees no GPU here"
    assert not (tmp_path / "out").exists()


# What the tool prints: its own messages, the names of the columns, their units, a line for each launch.
NCU = """==PROF== Connected to process 17 (python)
==PROF== Profiling "lenet_forward_kernel" - 0: 0%....50%....100% - 3 passes
==PROF== Disconnected from process 17
"ID","Process ID","Kernel Name","Grid Size","Id:Domain:Start/Stop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg","dram__bytes_read.sum","gpu__time_duration.sum","launch__registers_per_thread","sm__warps_active.avg.pct_of_peak_sustained_active"
"","","","","","byte","ns","register/thread","%"
"0","17","lenet_forward_kernel(LenetForward, int)","(2, 1, 1)","1:<default domain>:float32 forward batch 64:none:none:none:none:none:none","1,024","4,000","128","24.5"
"1","17","small_matrix_product_kernel(SmallMatrixProduct)","(1, 1, 1)","","2048","3000","96","n/a"
"2","17","lenet_forward_kernel(LenetForward, int)","(2, 1, 1)","1:<default domain>:float32 forward batch 64:none:none:none:none:none:none","3,072","6,000","128","25.5"
"3","17","lenet_forward_kernel(LenetForward, int)","(2, 1, 1)","1:<default domain>:tf32 forward + backward batch 64:none:none:none:none:none:none","8","7,000","128","25.5"
"4","17","lenet_forward_kernel(LenetForward, int)","(99, 1, 1)","1:<default domain>:tf32 forward + backward batch 64:none:none:none:none:none:none","9","8,000","128","25.5"
==WARNING== something that does not matter
"""  # noqa: E501


def test_ncu_is_read():
    forward, product = "lenet_forward_kernel(LenetForward, int)", "small_matrix_product_kernel(SmallMatrixProduct)"
    first, unnamed, *others = ncu.parse(NCU)
    assert first == {
        "case": "float32 forward batch 64",
        "kernel": forward,
        "grid": "(2, 1, 1)",
        "launches": 2,
        "microseconds": 5.0,
        "dram_read_bytes": 2048.0,
        "occupancy_percent": 25.0,
        "registers": 128.0,
    }
    assert (unnamed["case"], unnamed["kernel"], unnamed["grid"]) == (None, product, "(1, 1, 1)")
    assert "occupancy_percent" not in unnamed
    assert [(row["case"], row["grid"], row["microseconds"]) for row in others] == [
        ("tf32 forward + backward batch 64", "(2, 1, 1)", 7.0),
        ("tf32 forward + backward batch 64", "(99, 1, 1)", 8.0),
    ]
    with pytest.raises(ValueError, match="no table"):
        ncu.parse("==ERROR== The user does not have permission to access NVIDIA GPU Performance Counters")


def test_ncu_looks_at_the_net(tmp_path, monkeypatch):
    """A program in its place, which notes how it was called and prints a table."""
    tool = tmp_path / "ncu"
    (tmp_path / "table").write_text(NCU)
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\ncat {tmp_path}/table\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    done = gpu_check.profile_net(60)
    assert (done["status"], len(done["result"])) == (OK, 4)
    called = (tmp_path / "called").read_text()
    assert "--profile-from-start off" in called
    assert "--nvtx" in called
    assert called.endswith(f"{gpu_check.MEASUREMENTS} profiled {tmp_path}/profiled.json\n")
    (tmp_path / "table").write_text("==ERROR== no permission")
    done = gpu_check.profile_net(60)
    assert (done["status"], "no table" in done["output"]) == (FAILED, True)


def test_ncu_is_told_when_to_look(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(measurements, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: said.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: said.append("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", lambda case: said.append(case) or 17)
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", lambda begun: said.append(f"end {begun}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("synchronize"))
    with measurements.looked_at("a case"):
        said.append("launches")
    assert said == ["start", "a case", "launches", "synchronize", "end 17", "stop"]


def times(ours: float, stock: float) -> dict[str, Any]:
    return {"ours graph": {"median": ours}, "stock graph": {"median": stock}}


def test_targets():
    report: dict[str, Any] = {
        "steps": {
            "net float32": {
                "result": [
                    {"case": "forward batch 1", "us": times(7.0, 35.0)},
                    {"case": "step batch 64", "us": times(30.0, 90.0)},
                    {"case": "forward batch 65536", "us": times(1000.0, 4000.0)},
                ]
            },
            "layers float32": {"result": [{"case": "conv1 forward batch 65536", "us": times(1.0, 12.5)}]},
            "sweep": {"result": [{"case": "a", "us": times(1, 2)}, {"case": "b", "us": times(1, 0.97)}]},
            "net tf32": {"status": "skipped"},
            "kernelbench": {
                "result": [
                    {
                        "case": "kernelbench",
                        "precision": "convolutions in TF32, products in float32",
                        "us": {name: {"median": us} for name, us in [("fused", 100.0), ("compile", 700.0)]},
                    },
                    {"case": "kernelbench_float32", "precision": "float32", "us": {"fused": {"median": 155.0}}},
                ]
            },
            "mnist": {
                "result": [
                    {"model": "ours", "seconds": 0.1, "reached": True},
                    {"model": "ours", "seconds": 0.19, "reached": True},
                    {"model": "ours", "seconds": 9.0, "reached": False},
                    {"model": "stock", "seconds": 9.0, "reached": True},
                ]
            },
        }
    }
    found = {target.what: (value, verdict) for target, value, verdict in targets.verdicts(report)}
    assert found["batch 1 inference, float32: microseconds"] == (7.0, "met")
    assert found["batch 1 inference: over stock"] == (5.0, "met")
    assert found["batch 64 training step: microseconds"] == (30.0, "missed")
    assert found["batch 64 training step: over stock"] == (3.0, "missed")
    assert found["batch 65536, float32: million images/s"] == (pytest.approx(65.536), "met, ambitious too")
    assert found["batch 65536, TF32: million images/s"] == (None, "not measured")
    assert found["conv1 forward: over stock"] == (12.5, "met, ambitious too")
    assert found["MNIST to 99%: milliseconds, median"] == (pytest.approx(145.0), "met")
    assert found["any shape of the sweep: over stock"] == (0.97, "missed")
    assert found["any layer, any batch: over stock"] == (12.5, "met, ambitious too")
    assert found["KernelBench 3/4, TF32: over torch.compile"] == (7.0, "missed")
    assert found["KernelBench 3/4, float32: over torch.compile"] == (None, "not measured")
    text = gpu_check.tables(report)
    assert "batch 64 training step: over stock" in text
    assert "kernelbench_float32" in text


def test_a_graph_keeps_what_it_computes_with(monkeypatch):
    """Replays write into memory of the network; freed, it would be somebody else's."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(measurements, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda other: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    net = torch.nn.Linear(1, 1)
    alive = weakref.ref(net)
    replay = measurements.graphed(lambda net=net: net(torch.ones(1)))
    del net
    gc.collect()
    assert alive() is not None
    replay()


def test_what_cannot_be_captured_is_left_out(monkeypatch, capsys):
    def broken(program):
        raise RuntimeError("operation not permitted when stream is capturing")

    functions = {"ours": lambda: None}
    monkeypatch.setattr(measurements, "graphed", broken)
    measurements.add_graph(functions, "ours graph", lambda: None)
    assert [*functions] == ["ours"]
    assert "ours graph: operation not permitted" in capsys.readouterr().err


@pytest.fixture
def small(monkeypatch):
    """Every measurement on the CPU, at sizes that take no time."""
    sizes: dict[str, Any] = {
        "DEVICE": "cpu",
        "BATCHES": [2],
        "LAYER_BATCHES": [2],
        "BACKWARD_BATCHES": [2],
        "PROFILED_BATCHES": [2, 3],
        "SLOW_BATCHES": [2],
        "SWEEP_BATCHES": [1],
        "SWEEP_CHANNELS": [1, 3],
        "SWEEP_SIZES": [8],
        "COPY_BYTES": 2**12,
        "MATRIX_SIZE": 32,
        "KERNELBENCH": Plan(
            ("net", "conv1"), ("forward",), (2,), ("fused", "eager"), effort=Effort(rounds=2, min_rounds=2)
        ),
        "PARITY_IMAGES": 64,
        "PARITY_STEPS": 20,
        "MNIST_SEEDS": 2,
        "MNIST_BATCH": 32,
        "MNIST_EPOCHS": 30,
        "MNIST_RATE": 0.05,
        "MNIST_TARGET": 0.5,
    }
    for name, value in sizes.items():
        assert hasattr(measurements, name)
        monkeypatch.setattr(measurements, name, value)
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    timed = measurements.timed
    monkeypatch.setattr(measurements, "timed", lambda functions, **_: timed(functions, rounds=5, limit=0.01))
    # What exists for GPUs only, or takes a minute.
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda x, w, b, *options: F.relu(F.conv2d(x, w, b)))
    train, test = datasets.load_digits()
    few = datasets.LabelledImages(train.images[:320], train.labels[:320], train.normalization)
    monkeypatch.setattr(datasets, "load", lambda name, root: (few, test))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = flags


ARGUMENTS = {"net": "tf32", "layers": "bfloat16", "sweep": "rule", "backward": "rule", "mnist": "somewhere"}


@pytest.mark.parametrize("name", measurements.MEASUREMENTS)
def test_measurements_run(small, name):
    if name == "jax":
        pytest.importorskip("jax")
    saved: list[str] = []
    measure = measurements.MEASUREMENTS[name]
    measure(lambda result: saved.append(json.dumps(result)), *([ARGUMENTS[name]] if name in ARGUMENTS else []))
    result = json.loads(saved[-1])
    assert result
    if name == "kernelbench":
        assert [(row["case"], sorted(row["us"])) for row in result] == [
            ("net", ["eager", "fused"]),
            ("conv1", ["eager", "fused"]),
        ]
    if name in ("net", "layers", "sweep", "backward", "compiled"):
        assert all(row["us"]["ours graph"]["median"] > 0 for row in result)
    if name == "profiled":
        assert len(result) == 3 * 5
        assert {"float32 step batch 2", "bfloat16 forward + backward batch 3"} <= set(result)
    if name == "mnist":
        assert [(run["model"], run["seed"]) for run in result] == [("ours", 0), ("stock", 0), ("ours", 1), ("stock", 1)]
        assert all(run["reached"] for run in result), result
