"""What `gpu_check.py` measures on a GPU, each in a process of its own: `python measurements.py NAME FILE ARGUMENTS...`.

Random data, except for MNIST; FILE is rewritten as results come, so that what was measured before a time limit counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import lenet_ext
from lenet_ext import TrainingStep, functional
from lenet_ext.bench import CASES, Plan, run_benchmarks
from lenet_ext.bench.timing import percentile
from lenet_ext.training import datasets

# The tests run everything here on the CPU, where there are neither events nor graphs, at sizes of their own.
DEVICE = "cuda"
BATCHES = [1, 8, 64, 256, 1024, 8192, 65536]
CELL_SECONDS = 0.35  # of a cell's turns, of which there are some hundred
LAYER_BATCHES = [64, 4096, 65536]
BACKWARD_BATCHES = [64, 1024, 2048, 2050, 4096, 65536]
SLOW_BATCHES = [64, 4096]  # of providers that take long to get ready
SWEEP_BATCHES, SWEEP_CHANNELS, SWEEP_SIZES = [1, 64], [1, 3, 8, 32, 128], [8, 16, 32, 64]
COPY_BYTES, MATRIX_SIZE = 2**30, 8192
PROFILED_BATCHES = [64, 16384]
KERNELBENCH = Plan.group("kernelbench")
PARITY_IMAGES, PARITY_STEPS = 2048, 200
MNIST_SEEDS, MNIST_BATCH, MNIST_EPOCHS, MNIST_RATE, MNIST_TARGET = 20, 64, 2, 0.05, 0.99


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(functions: dict[str, Callable[[], Any]], rounds: int = 30, limit: float = 2.0) -> dict[str, dict[str, float]]:
    """Median, 10th and 90th percentile of microseconds a call by CUDA events, the functions taking turns."""

    def batch_of(function: Callable[[], Any], count: int) -> float:
        if DEVICE != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                function()
            return (time.perf_counter() - start) * 1e6 / count
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
        synchronize()
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
    if DEVICE != "cuda":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(kept: Callable[[], Any] = function) -> None:
        # A graph does not keep the network and the optimizer alive whose memory it reads and writes.
        graph.replay()

    return replay


def add_graph(functions: dict[str, Callable[[], Any]], name: str, program: Callable[[], Any]) -> None:
    """Unless it cannot be captured, which costs this time alone."""
    try:
        functions[name] = graphed(program)
    except RuntimeError as error:
        print(f"{name}: {error}", file=sys.stderr)


def set_precision(precision: str) -> Any:
    """The dtype; float32 means float32 unless TF32 is what is measured."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


NET_MODES = ["forward", "forward + backward", "step"]


def net_program(net: Any, x: Any, target: Any, mode: str) -> Callable[[], Any]:
    """A forward pass without gradients, one with those of the parameters, or a whole training step with SGD."""
    parameters = list(net.parameters())
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return net(x)

        return forward
    if mode == "forward + backward":
        g = torch.randn(len(x), 10, device=x.device, dtype=x.dtype)
        return lambda: torch.autograd.grad(net(x), parameters, g)
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, foreach=True)
    if isinstance(net, lenet_ext.Net) and x.dtype == torch.float32:
        whole = TrainingStep(net, optimizer)
        return lambda: whole(x, target)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(net(x).float(), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


def measure_net(save: Callable[[Any], Any], precision: str) -> None:
    dtype = set_precision(precision)
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        x = torch.randn(batch, 1, 32, 32, device=DEVICE, dtype=dtype)
        target = torch.randint(10, (batch,), device=DEVICE)
        for mode in NET_MODES:
            functions: dict[str, Callable[[], Any]] = {}
            for name, kind in (("ours", lenet_ext.Net), ("stock", lenet_ext.ReferenceNet)):
                functions[name] = net_program(kind(device=DEVICE, dtype=dtype), x, target, mode)
                add_graph(functions, f"{name} graph", net_program(kind(device=DEVICE, dtype=dtype), x, target, mode))
            last = lenet_ext.ReferenceNet(device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
            program = net_program(last, x.to(memory_format=torch.channels_last), target, mode)
            add_graph(functions, "channels_last graph", program)
            us = timed(functions, limit=CELL_SECONDS)
            rows.append({"case": f"{mode} batch {batch}", "precision": precision, "us": us})
            save(rows)


LAYERS = {
    "conv1": ((1, 32, 32), (6, 1, 5, 5)),
    "conv2": ((6, 14, 14), (16, 6, 5, 5)),
    "fc1": ((400,), (120, 400)),
    "fc2": ((120,), (84, 120)),
}


def layer_functions(image: tuple[int, ...], weight: tuple[int, ...], batch: int, dtype: Any, training: bool) -> Any:
    def stock_conv(x: Any, w: Any, b: Any) -> Any:
        return F.max_pool2d(F.relu(F.conv2d(x, w, b)), 2)

    def cudnn_conv(x: Any, w: Any, b: Any) -> Any:  # the best that can be composed by hand: bias and ReLU in cuDNN
        return F.max_pool2d(torch.cudnn_convolution_relu(x, w, b, (1, 1), (0, 0), (1, 1), 1), 2)

    def stock_linear(x: Any, w: Any, b: Any) -> Any:
        return F.relu(F.linear(x, w, b))

    make = {"device": DEVICE, "dtype": dtype}
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
        for batch in LAYER_BATCHES:
            for training in (False, True):
                functions = layer_functions(image, weight, batch, dtype, training)
                case = f"{name} {'forward + backward' if training else 'forward'} batch {batch}"
                rows.append({"case": case, "precision": precision, "us": timed(functions, limit=CELL_SECONDS)})
                save(rows)


def measure_sweep(save: Callable[[Any], Any], algorithm: str) -> None:
    """Our kernels or the vendor's (LENET_EXT_ALGORITHM), for the cost rules of each cuda.cpp; a process for each."""
    dtype = set_precision("float32")
    rows: list[dict[str, Any]] = []
    for batch in SWEEP_BATCHES:
        for channels in SWEEP_CHANNELS:
            for size in SWEEP_SIZES:
                for training in (False, True):
                    weight = (max(channels, 4), channels, 3, 3)
                    functions = layer_functions((channels, size, size), weight, batch, dtype, training)
                    functions = {name: f for name, f in functions.items() if not name.startswith("cudnn")}
                    case = f"{channels} channels at {size} batch {batch} {'backward' if training else 'forward'}"
                    rows.append({"case": case, "algorithm": algorithm, "us": timed(functions, rounds=9, limit=0.2)})
                    save(rows)


def measure_backward(save: Callable[[Any], Any], algorithm: str) -> None:
    """The whole network's backward pass on tensor cores, for its cost rule (csrc/lenet/cuda.cpp), a process for each
    algorithm (LENET_EXT_ALGORITHM). By the rule, 2048 and 2050 images go two ways. Forced to be the vendor's they go
    layer by layer, and forced to be direct all of them go to the tensor cores.
    """
    rows: list[dict[str, Any]] = []
    for precision, batch in itertools.product(("bfloat16", "tf32"), BACKWARD_BATCHES):
        dtype = set_precision(precision)
        parameters = [parameter.detach() for parameter in lenet_ext.Net(device=DEVICE, dtype=dtype).parameters()]
        x = torch.randn(batch, 1, 32, 32, device=DEVICE, dtype=dtype)
        g = torch.randn(batch, 10, device=DEVICE, dtype=dtype)
        kept = torch.ops.lenet_ext.lenet_with_activations(x, parameters)[1:]

        def backward(g: Any = g, x: Any = x, parameters: Any = parameters, kept: Any = kept) -> Any:
            return torch.ops.lenet_ext.lenet_backward(g, x, parameters, *kept, False)

        us = timed({"ours graph": graphed(backward)}, limit=CELL_SECONDS)
        rows.append({"case": f"backward batch {batch}", "precision": precision, "algorithm": algorithm, "us": us})
        save(rows)


def measure_compiled(save: Callable[[Any], Any]) -> None:
    rows: list[dict[str, Any]] = []
    for precision in ("float32", "bfloat16"):
        dtype = set_precision(precision)
        for batch in SLOW_BATCHES:
            x = torch.randn(batch, 1, 32, 32, device=DEVICE, dtype=dtype)
            target = torch.randint(10, (batch,), device=DEVICE)
            for mode in ("forward", "step"):
                ours = net_program(lenet_ext.Net(device=DEVICE, dtype=dtype), x, target, mode)
                stock = torch.compile(
                    lenet_ext.ReferenceNet(device=DEVICE, dtype=dtype), mode="max-autotune-no-cudagraphs"
                )
                functions = {
                    "ours graph": graphed(ours),
                    "compiled graph": graphed(net_program(stock, x, target, mode)),
                }
                rows.append({"case": f"{precision} {mode} batch {batch}", "us": timed(functions)})
                save(rows)


def measure_kernelbench(save: Callable[[Any], Any]) -> None:
    """By the rules of KernelBench, with `lenet-ext bench`."""
    rows: list[dict[str, Any]] = []
    for case in KERNELBENCH.cases:
        us = {}
        for row in run_benchmarks(dataclasses.replace(KERNELBENCH, cases=(case,)), torch.device(DEVICE)).rows:
            times = row.samples.times_us
            deciles = {"p10": percentile(times, 0.1), "p90": percentile(times, 0.9)}
            us[row.provider] = {"median": row.samples.median_us, **deciles}
        rows.append({"case": case, "precision": CASES[case].rules.precision, "us": us})
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
    result: dict[str, float] = {}
    a = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    result["copy_tb_s"] = 2 * a.numel() / timed({"copy": lambda: b.copy_(a)})["copy"]["median"] / 1e6
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        m = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=DEVICE, dtype=dtype)
        us = timed({"mm": lambda m=m: m @ m}, rounds=5)["mm"]["median"]
        result[f"{name}_tflop_s"] = 2 * MATRIX_SIZE**3 / us / 1e6
        save(result)
    one = torch.zeros(1, device=DEVICE)

    def hundred() -> None:
        for _ in range(100):
            one.add_(1)

    times = timed({"eager": hundred, "graph": graphed(hundred)})
    result["launch_us"], result["graph_node_us"] = (times[k]["median"] / 100 for k in ("eager", "graph"))
    save(result)


def measure_parity(save: Callable[[Any], Any]) -> None:
    """200 steps of SGD on one set of random images: the two losses stay together."""
    set_precision("float32")
    torch.manual_seed(0)
    ours = lenet_ext.Net(device=DEVICE)
    stock = lenet_ext.ReferenceNet(device=DEVICE)
    stock.load_state_dict(ours.state_dict())
    count, size = PARITY_IMAGES, PARITY_IMAGES // 16
    x, target = torch.randn(count, 1, 32, 32, device=DEVICE), torch.randint(10, (count,), device=DEVICE)
    losses: dict[str, list[float]] = {"ours": [], "stock": []}
    for name, net in (("ours", ours), ("stock", stock)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for i in range(PARITY_STEPS):
            part = slice(i % 16 * size, i % 16 * size + size)
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
    x, w = torch.full((256, 64), float("nan"), device=DEVICE), torch.ones(64, 64, device=DEVICE)
    b = torch.zeros(64, device=DEVICE)
    fused = torch._addmm_activation(b, x, w, use_gelu=False)
    # True: csrc/linear/cuda.cpp may use it, and save one kernel.
    facts: dict[str, Any] = {"addmm_activation_lets_nan_pass": bool(fused.isnan().all())}
    images, labels = torch.randn(64, 1, 32, 32, device=DEVICE), torch.zeros(64, dtype=torch.long, device=DEVICE)
    for name, kind in (("ours", lenet_ext.Net), ("stock", lenet_ext.ReferenceNet)):
        for mode in NET_MODES:
            program = net_program(kind(device=DEVICE), images, labels, mode)
            program()
            with profile(activities=[ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU]) as recorded:
                program()
                synchronize()
            kernels = [event.name for event in recorded.events() if event.device_type.name == "CUDA"]
            facts[f"kernels of {name} {mode}"] = {"count": len(kernels), "names": kernels}
    save(facts)


@contextlib.contextmanager
def looked_at(case: str) -> Iterator[None]:
    """What Nsight Compute looks at where it waits to be told, under the name of the case."""
    if DEVICE != "cuda":
        yield
        return
    with torch.cuda.profiler.profile():
        begun = torch.cuda.nvtx.range_start(case)  # of all threads: backward passes have one of their own
        yield
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_end(begun)


def measure_profiled(save: Callable[[Any], Any]) -> None:
    """The network's kernels, each case once, for `ncu`; which they were."""
    cases: list[str] = []
    for precision in ("float32", "tf32", "bfloat16"):
        dtype = set_precision(precision)
        for batch in PROFILED_BATCHES:
            x = torch.randn(batch, 1, 32, 32, device=DEVICE, dtype=dtype)
            target = torch.randint(10, (batch,), device=DEVICE)
            for mode in NET_MODES if batch == PROFILED_BATCHES[0] else NET_MODES[:2]:
                program = net_program(lenet_ext.Net(device=DEVICE, dtype=dtype), x, target, mode)
                program()  # what is launched once only
                synchronize()
                cases.append(f"{precision} {mode} batch {batch}")
                with looked_at(cases[-1]):
                    program()
                save(cases)


def one_cycle(steps: int) -> list[float]:
    """The learning rate of each step, as `lenet-ext train` has it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=MNIST_RATE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, MNIST_RATE, steps, pct_start=0.2, div_factor=5, final_div_factor=20, cycle_momentum=False
    )
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        if len(rates) < steps:
            scheduler.step()
    return rates


Trained = Callable[[Any, Any, float], Any]  # on images and labels, at a learning rate


def no_images() -> tuple[Any, Any]:
    return (
        torch.zeros(MNIST_BATCH, 1, 32, 32, device=DEVICE),
        torch.zeros(MNIST_BATCH, dtype=torch.long, device=DEVICE),
    )


def whole_steps(net: Any) -> tuple[Any, Trained]:
    """Ours: the operator of a whole step. And the optimizer."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    whole = TrainingStep(net, optimizer)

    def step(images: Any, labels: Any, rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        whole(images, labels)

    step(*no_images(), 0)
    return optimizer, step


def replayed_steps(net: Any) -> tuple[Any, Trained]:
    """Stock's loop as a graph, which reads images, labels and learning rate from memory."""
    x, target = no_images()
    lr = torch.zeros((), device=DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, fused=True)

    def program() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), target).backward()
        optimizer.step()

    replay = graphed(program)

    def step(images: Any, labels: Any, rate: float) -> None:
        x.copy_(images)
        target.copy_(labels)
        lr.fill_(rate)
        replay()

    step(x, target, 0)
    return optimizer, step


def measure_mnist(save: Callable[[Any], Any], root: str) -> None:
    """Seconds of training with a one-cycle schedule, and whether 99% of the test pictures are right then. The data are
    on the GPU.
    """
    train, test = (part.to(DEVICE) for part in datasets.load("mnist", root))
    pictures = test.normalization(test.images)
    rates = one_cycle(MNIST_EPOCHS * (len(train.labels) // MNIST_BATCH))
    runs: list[dict[str, Any]] = []
    for seed in range(MNIST_SEEDS):
        for name, kind, steps_of in (
            ("ours", lenet_ext.Net, whole_steps),
            ("stock", lenet_ext.ReferenceNet, replayed_steps),
        ):
            torch.manual_seed(seed)
            net = kind().to(DEVICE)
            start = {key: value.clone() for key, value in net.state_dict().items()}
            optimizer, step = steps_of(net)
            # Getting ready may have moved the weights, and has filled the momentum.
            net.load_state_dict(start)
            for state in optimizer.state.values():
                state["momentum_buffer"].zero_()
            generator = torch.Generator().manual_seed(seed)
            rest = iter(rates)
            synchronize()
            begin = time.perf_counter()
            for _ in range(MNIST_EPOCHS):
                for images, labels in train.batches(MNIST_BATCH, generator=generator):
                    if len(labels) == MNIST_BATCH:
                        step(images, labels, next(rest))
            synchronize()
            seconds = time.perf_counter() - begin
            with torch.no_grad():
                accuracy = float((net(pictures).argmax(1) == test.labels).float().mean())
            run = {"model": name, "seed": seed, "epochs": MNIST_EPOCHS, "seconds": seconds, "accuracy": accuracy}
            runs.append({**run, "reached": accuracy >= MNIST_TARGET})
            save(runs)


MEASUREMENTS: dict[str, Callable[..., None]] = {
    "net": measure_net,
    "layers": measure_layers,
    "sweep": measure_sweep,
    "backward": measure_backward,
    "compiled": measure_compiled,
    "kernelbench": measure_kernelbench,
    "jax": measure_jax,
    "ceilings": measure_ceilings,
    "parity": measure_parity,
    "facts": measure_facts,
    "mnist": measure_mnist,
    "profiled": measure_profiled,
}


if __name__ == "__main__":
    name, file, *rest = sys.argv[1:]
    MEASUREMENTS[name](lambda result: Path(file).write_text(json.dumps(result)), *rest)
