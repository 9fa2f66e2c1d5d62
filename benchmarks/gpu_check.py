"""Everything that needs a GPU, in one command: `python benchmarks/gpu_check.py --stage check|bench|all --out DIR`.

Stage "check": ceilings of this GPU, build, the torch-free driver, compute-sanitizer's four tools on it, the tests on
cuda, 200 training steps beside stock. Stage "bench": this package against stock eager, channels_last, stock and ours
under CUDA graphs, torch.compile(mode="max-autotune") and JAX; forward and training step; strict float32, TF32 and
bfloat16; the whole net and each layer; our kernels against the vendor's over a sweep of shapes (for the cost rule);
ncu.

Each step is a process of its own with a time limit, so that one that hangs or crashes costs its own result only, and
DIR/gpu_check.json is rewritten after each. A stage takes less than 10 minutes on one H200. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(tempfile.gettempdir()) / "lenet_ext-gpu-check"
BATCHES = [1, 8, 64, 256, 1024, 8192, 65536]
PRECISIONS = ["float32", "tf32", "bfloat16"]
SLOW_BATCHES = [64, 4096]  # of providers that take long to get ready

# ---------------------------------------------------------------------------------------------------------------------
# The process that runs the steps


def run_command(command: list[str], limit: float, cwd: Path = ROOT, **environment: str) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit,
            cwd=cwd,
            env={**os.environ, **environment},
            errors="replace",
        )
        code: int | str = done.returncode
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, output = "time limit", "".join(_text(part) for part in (error.stdout, error.stderr))
    except OSError as error:
        code, output = "not run", str(error)
    return {
        "command": " ".join(command),
        "code": code,
        "seconds": round(time.perf_counter() - begin, 1),
        "tail": output[-4000:],
    }


def _text(part: bytes | str | None) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else part or ""


def result_file(*name: str) -> Path:
    return WORK / f"{'-'.join(name)}.json"


def measurement(name: str, limit: float, *arguments: str, **environment: str) -> dict[str, Any]:
    """Runs one of MEASUREMENTS in a process of its own; the file it writes is its result, also if it was cut short."""
    result_file(name, *arguments).unlink(missing_ok=True)
    done = run_command([sys.executable, __file__, "--measure", name, *arguments], limit, **environment)
    with contextlib.suppress(OSError, ValueError):
        done["result"] = json.loads(result_file(name, *arguments).read_text())
    return done


def sources() -> list[str]:
    return [str(path) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


def check_steps() -> dict[str, Callable[[], dict[str, Any]]]:
    driver = str(WORK / "driver")
    nvcc = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "."]
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "ceilings": lambda: measurement("ceilings", 60),
        "build": lambda: run_command(install, 240, LENET_EXT_CUDA="1"),
        "driver build": lambda: run_command(
            [
                nvcc,
                "-std=c++17",
                "-O3",
                "-lineinfo",
                "-arch=native",
                "tests/cuda_on_cpu/driver.cu",
                *sources(),
                "-o",
                driver,
            ],
            180,
        ),
        "driver": lambda: run_command([driver], 60),
    }
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", driver]
        steps[tool] = lambda command=command: run_command(command, 90)
    # From the tests' folder: elsewhere the source tree would be found before the installed package.
    selected = "cuda and not cuda_on_cpu and not cuda_build"
    steps["tests"] = lambda: run_command([sys.executable, "-m", "pytest", "-q", "-k", selected], 240, ROOT / "tests")
    steps["parity"] = lambda: measurement("parity", 60)
    steps["facts"] = lambda: measurement("facts", 60)
    return steps


def bench_steps() -> dict[str, Callable[[], dict[str, Any]]]:
    steps: dict[str, Callable[[], dict[str, Any]]] = {}
    for precision in PRECISIONS:
        steps[f"net {precision}"] = lambda p=precision: measurement("net", 60, p)
    for precision in PRECISIONS:
        steps[f"layers {precision}"] = lambda p=precision: measurement("layers", 40, p)
    for algorithm in ("direct", "vendor"):
        steps[f"sweep {algorithm}"] = lambda a=algorithm: measurement("sweep", 45, a, LENET_EXT_ALGORITHM=a)
    steps["compile"] = lambda: measurement("compiled", 150)
    steps["jax"] = lambda: measurement("jax", 60)
    ncu = ["ncu", "--clock-control", "none", "--set", "basic", "--launch-count", "12", str(WORK / "driver")]
    steps["ncu"] = lambda: run_command(ncu, 60)
    return steps


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
        "nvidia_smi": smi["tail"].strip(),
        "commit": commit["tail"].strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["check", "bench", "all"], default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", help="only the steps whose name contains this")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if arguments.measure:
        name, *rest = arguments.measure
        file = result_file(name, *rest)
        MEASUREMENTS[name](lambda result: file.write_text(json.dumps(result)), *rest)
        return 0

    import torch

    if not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU here", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "gpu_check.json"
    steps = check_steps() if arguments.stage in ("check", "all") else {}
    steps |= bench_steps() if arguments.stage in ("bench", "all") else {}
    report: dict[str, Any] = {"environment": environment(), "steps": {}}
    for name, step in steps.items():
        if arguments.only and arguments.only not in name:
            continue
        report["steps"][name] = done = step()
        file.write_text(json.dumps(report, indent=1))
        print(f"{name:20} {'ok' if done['code'] == 0 else done['code']!s:>10} {done['seconds']:6.1f} s", flush=True)
        if done["code"] != 0:
            print("  " + done["tail"][-1500:].replace("\n", "\n  "))
    report["environment_after"] = environment()
    file.write_text(json.dumps(report, indent=1))
    print_table(report)
    return 0 if all(done["code"] == 0 for done in report["steps"].values()) else 1


def print_table(report: dict[str, Any]) -> None:
    """Times in microseconds and the ratio to ours under the same launch mechanism."""
    for name, step in report["steps"].items():
        rows = step.get("result") if name.split()[0] in ("net", "layers", "compile", "jax") else None
        if not rows:
            continue
        print(f"\n{name}: median microseconds of a call")
        providers = sorted({provider for row in rows for provider in row["us"]})
        print(f"{'case':34}" + "".join(f"{provider:>18}" for provider in providers))
        for row in rows:
            cells = (f"{row['us'][p]['median']:18.2f}" if p in row["us"] else f"{'-':>18}" for p in providers)
            print(f"{row['case']:34}" + "".join(cells))


# ---------------------------------------------------------------------------------------------------------------------
# What is measured, each in a process of its own. Random data; results are saved as they come.


def timed(functions: dict[str, Callable[[], Any]], rounds: int = 30, limit: float = 2.0) -> dict[str, dict[str, float]]:
    """Median, 10th and 90th percentile of microseconds a call by CUDA events, the functions taking turns."""
    import torch

    def batch_of(function: Callable[[], Any], count: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000 / count

    counts = {}
    for name, function in functions.items():
        for _ in range(5):
            function()
        torch.cuda.synchronize()
        # At least a millisecond a batch, so that the events' resolution does not matter.
        counts[name] = max(1, int(1000 / max(batch_of(function, 5), 1e-3)))
        batch_of(function, counts[name])
    times: dict[str, list[float]] = {name: [] for name in functions}
    stop = time.perf_counter() + limit
    for done in range(rounds):
        if done >= 5 and time.perf_counter() > stop:
            break
        for name, function in functions.items():
            times[name].append(batch_of(function, counts[name]))
    result = {}
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10)
        result[name] = {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}
    return result


def graphed(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function as a replay of a CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def set_precision(precision: str) -> Any:
    """The dtype; float32 means float32 unless TF32 is what is measured."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def net_program(net: Any, x: Any, target: Any, training: bool) -> Callable[[], Any]:
    """A forward pass without gradients, or a whole training step with SGD."""
    import torch

    if not training:

        def forward() -> Any:
            with torch.no_grad():
                return net(x)

        return forward
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, foreach=True)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(net(x).float(), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


def measure_net(save: Callable[[Any], Any], precision: str) -> None:
    import torch

    import lenet_ext

    dtype = set_precision(precision)
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        x = torch.randn(batch, 1, 32, 32, device="cuda", dtype=dtype)
        target = torch.randint(10, (batch,), device="cuda")
        for training in (False, True):
            functions: dict[str, Callable[[], Any]] = {}
            for name, kind in (("ours", lenet_ext.Net), ("stock", lenet_ext.ReferenceNet)):
                functions[name] = net_program(kind(device="cuda", dtype=dtype), x, target, training)
                program = net_program(kind(device="cuda", dtype=dtype), x, target, training)
                functions[f"{name} graph"] = graphed(program)
            last = lenet_ext.ReferenceNet(device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
            program = net_program(last, x.to(memory_format=torch.channels_last), target, training)
            functions["channels_last graph"] = graphed(program)
            case = f"{'step' if training else 'forward'} batch {batch}"
            rows.append({"case": case, "precision": precision, "us": timed(functions)})
            save(rows)


LAYERS = {
    "conv1": ((1, 32, 32), (6, 1, 5, 5)),
    "conv2": ((6, 14, 14), (16, 6, 5, 5)),
    "fc1": ((400,), (120, 400)),
    "fc2": ((120,), (84, 120)),
}


def layer_functions(image: tuple[int, ...], weight: tuple[int, ...], batch: int, dtype: Any, training: bool) -> Any:
    import torch
    import torch.nn.functional as F

    from lenet_ext import functional

    def stock_conv(x: Any, w: Any, b: Any) -> Any:
        return F.max_pool2d(F.relu(F.conv2d(x, w, b)), 2)

    def cudnn_conv(x: Any, w: Any, b: Any) -> Any:  # the best that can be composed by hand: bias and ReLU in cuDNN
        return F.max_pool2d(torch.cudnn_convolution_relu(x, w, b, (1, 1), (0, 0), (1, 1), 1), 2)

    def stock_linear(x: Any, w: Any, b: Any) -> Any:
        return F.relu(F.linear(x, w, b))

    make = {"device": "cuda", "dtype": dtype}
    x = torch.randn(batch, *image, **make, requires_grad=training and image[0] != 1)
    w = torch.randn(weight, **make, requires_grad=training)
    b = torch.randn(weight[0], **make, requires_grad=training)
    convolution = len(weight) == 4
    candidates = {
        "ours": functional.conv_relu_max_pool2d if convolution else functional.linear_relu,
        "stock": stock_conv if convolution else stock_linear,
    }
    if convolution and not training:
        candidates["cudnn_convolution_relu"] = cudnn_conv
    wanted = [t for t in (x, w, b) if t.requires_grad]

    def program(function: Callable[..., Any]) -> Callable[[], Any]:
        if not training:
            return lambda: function(x, w, b)
        return lambda: torch.autograd.grad(function(x, w, b).sum(), wanted)

    return {f"{name} graph": graphed(program(function)) for name, function in candidates.items()}


def measure_layers(save: Callable[[Any], Any], precision: str) -> None:
    dtype = set_precision(precision)
    rows: list[dict[str, Any]] = []
    for name, (image, weight) in LAYERS.items():
        for batch in (64, 4096, 65536):
            for training in (False, True):
                functions = layer_functions(image, weight, batch, dtype, training)
                case = f"{name} {'forward + backward' if training else 'forward'} batch {batch}"
                rows.append({"case": case, "precision": precision, "us": timed(functions, limit=1.0)})
                save(rows)


def measure_sweep(save: Callable[[Any], Any], algorithm: str) -> None:
    """Our kernels or the vendor's (LENET_EXT_ALGORITHM), for the cost rules of csrc/*_cuda.cpp; a process for each."""
    dtype = set_precision("float32")
    rows: list[dict[str, Any]] = []
    for batch in (1, 64):
        for channels in (1, 3, 8, 32, 128):
            for size in (8, 16, 32, 64):
                for training in (False, True):
                    weight = (max(channels, 4), channels, 3, 3)
                    functions = layer_functions((channels, size, size), weight, batch, dtype, training)
                    functions = {name: f for name, f in functions.items() if not name.startswith("cudnn")}
                    case = f"{channels} channels at {size} batch {batch} {'backward' if training else 'forward'}"
                    rows.append({"case": case, "algorithm": algorithm, "us": timed(functions, rounds=9, limit=0.2)})
                    save(rows)


def measure_compiled(save: Callable[[Any], Any]) -> None:
    import torch

    import lenet_ext

    rows: list[dict[str, Any]] = []
    for precision in ("float32", "bfloat16"):
        dtype = set_precision(precision)
        for batch in SLOW_BATCHES:
            x = torch.randn(batch, 1, 32, 32, device="cuda", dtype=dtype)
            target = torch.randint(10, (batch,), device="cuda")
            for training in (False, True):
                ours = net_program(lenet_ext.Net(device="cuda", dtype=dtype), x, target, training)
                stock = torch.compile(
                    lenet_ext.ReferenceNet(device="cuda", dtype=dtype), mode="max-autotune-no-cudagraphs"
                )
                functions = {
                    "ours graph": graphed(ours),
                    "compiled graph": graphed(net_program(stock, x, target, training)),
                }
                case = f"{precision} {'step' if training else 'forward'} batch {batch}"
                rows.append({"case": case, "us": timed(functions)})
                save(rows)


def measure_jax(save: Callable[[Any], Any]) -> None:
    """The same net, jit-compiled by JAX; wall clock, because it has streams of its own."""
    import jax
    import jax.numpy as jnp

    def net(p: Any, x: Any) -> Any:
        for w, b in p[:2]:
            x = jax.lax.conv_general_dilated(x, w, (1, 1), "VALID") + b[:, None, None]
            x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x = x.reshape(x.shape[0], -1)
        for i, (w, b) in enumerate(p[2:]):
            x = x @ w + b
            x = jax.nn.relu(x) if i < 2 else x
        return x

    def loss(p: Any, x: Any, t: Any) -> Any:
        return -jnp.mean(jax.nn.log_softmax(net(p, x))[jnp.arange(x.shape[0]), t])

    def step(p: Any, x: Any, t: Any) -> Any:
        return jax.tree_util.tree_map(lambda a, g: a - 1e-3 * g, p, jax.grad(loss)(p, x, t))

    shapes = [(6, 1, 5, 5), (16, 6, 5, 5), (400, 120), (120, 84), (84, 10)]
    key = jax.random.PRNGKey(0)
    parameters = [(0.1 * jax.random.normal(key, s), jnp.zeros(s[0] if len(s) == 4 else s[1])) for s in shapes]
    rows: list[dict[str, Any]] = []
    for batch in SLOW_BATCHES:
        x, t = jax.random.normal(key, (batch, 1, 32, 32)), jnp.zeros(batch, int)
        for name, function in (("forward", jax.jit(net)), ("step", jax.jit(step))):
            given = (parameters, x) if name == "forward" else (parameters, x, t)
            jax.block_until_ready(function(*given))
            times = []
            for _ in range(30):
                begin = time.perf_counter()
                for _ in range(20):
                    result = function(*given)
                jax.block_until_ready(result)
                times.append((time.perf_counter() - begin) / 20 * 1e6)
            deciles = statistics.quantiles(times, n=10)
            row = {"median": statistics.median(times), "p10": deciles[0], "p90": deciles[-1]}
            rows.append({"case": f"{name} batch {batch}", "us": {"jax jit": row}})
            save(rows)


def measure_ceilings(save: Callable[[Any], Any]) -> None:
    import torch

    result: dict[str, float] = {}
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    result["copy_tb_s"] = 2 * a.numel() / timed({"copy": lambda: b.copy_(a)})["copy"]["median"] / 1e6
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        m = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        us = timed({"mm": lambda m=m: m @ m}, rounds=5)["mm"]["median"]
        result[f"{name}_tflop_s"] = 2 * 8192**3 / us / 1e6
        save(result)
    one = torch.zeros(1, device="cuda")

    def hundred() -> None:
        for _ in range(100):
            one.add_(1)

    times = timed({"eager": hundred, "graph": graphed(hundred)})
    result["launch_us"], result["graph_node_us"] = (times[k]["median"] / 100 for k in ("eager", "graph"))
    save(result)


def measure_parity(save: Callable[[Any], Any]) -> None:
    """200 steps of SGD on one set of random images: the two losses stay together."""
    import torch

    import lenet_ext

    set_precision("float32")
    torch.manual_seed(0)
    ours = lenet_ext.Net(device="cuda")
    stock = lenet_ext.ReferenceNet(device="cuda")
    stock.load_state_dict(ours.state_dict())
    x, target = torch.randn(2048, 1, 32, 32, device="cuda"), torch.randint(10, (2048,), device="cuda")
    losses: dict[str, list[float]] = {"ours": [], "stock": []}
    for name, net in (("ours", ours), ("stock", stock)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for i in range(200):
            part = slice(i % 16 * 128, i % 16 * 128 + 128)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x[part]), target[part])
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    save(losses)
    worst = max(abs(a - b) / b for a, b in zip(losses["ours"][:50], losses["stock"][:50], strict=True))
    assert worst < 1e-2, f"the losses of the first 50 steps differ by {worst:.2%}"


def measure_facts(save: Callable[[Any], Any]) -> None:
    """Questions about stock whose answers decide between two ways of writing a kernel."""
    import torch

    x, w = torch.full((256, 64), float("nan"), device="cuda"), torch.ones(64, 64, device="cuda")
    b = torch.zeros(64, device="cuda")
    fused = torch._addmm_activation(b, x, w, use_gelu=False)
    # True: csrc/linear_cuda.cpp may use it, and save one kernel.
    facts: dict[str, Any] = {"addmm_activation_lets_nan_pass": bool(fused.isnan().all())}
    from torch.profiler import ProfilerActivity, profile

    import lenet_ext

    images, labels = torch.randn(64, 1, 32, 32, device="cuda"), torch.zeros(64, dtype=torch.long, device="cuda")
    for name, kind in (("ours", lenet_ext.Net), ("stock", lenet_ext.ReferenceNet)):
        for training in (False, True):
            program = net_program(kind(device="cuda"), images, labels, training)
            program()
            with profile(activities=[ProfilerActivity.CUDA]) as recorded:
                program()
                torch.cuda.synchronize()
            kernels = [event.name for event in recorded.events() if event.device_type.name == "CUDA"]
            facts[f"kernels of {name} {'step' if training else 'forward'}"] = {"count": len(kernels), "names": kernels}
    save(facts)


MEASUREMENTS: dict[str, Callable[..., None]] = {
    "net": measure_net,
    "layers": measure_layers,
    "sweep": measure_sweep,
    "compiled": measure_compiled,
    "jax": measure_jax,
    "ceilings": measure_ceilings,
    "parity": measure_parity,
    "facts": measure_facts,
}

if __name__ == "__main__":
    sys.exit(main())
