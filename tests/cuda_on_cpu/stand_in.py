"""What the tests of the CUDA side without a GPU have in common: problems, schedules, the GPU that stands there."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cuda_on_cpu import build

TESTS = Path(__file__).resolve().parents[1]

NEEDS_COMPILER = pytest.mark.skipif(
    build.compiler() is None or not sys.platform.startswith("linux"), reason="needs a C++ compiler on Linux"
)

DIRECT, VENDOR = 0, 1


def extended(*values):
    return pytest.param(*values, marks=pytest.mark.extended)


SCHEDULES = [(0, 0), (1, 0), (2, 1)]  # forward, reverse, shuffled


PLAIN = {
    "stride": [1, 1],
    "padding": [0, 0, 0, 0],
    "dilation": [1, 1],
    "groups": 1,
    "pool_kernel_size": [2, 2],
    "pool_stride": [2, 2],
    "pool_padding": [0, 0],
    "pool_dilation": [1, 1],
}


ODD = {
    **PLAIN,
    "stride": [1, 2],
    "padding": [2, 1, 0, 3],
    "dilation": [2, 1],
    "groups": 2,
    "pool_kernel_size": [3, 2],
    "pool_stride": [2, 1],
    "pool_padding": [1, 0],
}


# Batch sizes around the images of a block (10) and of a pass (4).
SHAPES = {
    "conv1": ((11, 1, 32, 32), (6, 1, 5, 5), PLAIN),
    "conv2": ((13, 6, 14, 14), (16, 6, 5, 5), PLAIN),
    "plain": ((3, 3, 10, 11), (5, 3, 3, 3), PLAIN),
    "odd": ((2, 4, 11, 12), (6, 2, 3, 2), ODD),
}


def under_schedules(control, algorithm, call):
    """The result of `call`, which must be the same, bit by bit, under every schedule of the threads."""
    results = []
    for schedule, seed in SCHEDULES:
        control.cuda_on_cpu_configure(algorithm, schedule, seed)
        result = call()
        results.append(result if isinstance(result, tuple) else (result,))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second), "the result depends on the order of threads"
    return results[0]


def stock(x, w, b, o):
    top, bottom, left, right = o["padding"]
    conv = F.conv2d(F.pad(x, (left, right, top, bottom)), w, b, o["stride"], 0, o["dilation"], o["groups"])
    pool = [o[f"pool_{name}"] for name in ("kernel_size", "stride", "padding", "dilation")]
    return F.max_pool2d(F.relu(conv), *pool)


@contextlib.contextmanager
def tf32_allowed(convolutions, products):
    """Sets what torch.backends says of TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def capability(control, value):
    """Of the GPU that stands there, times 10."""
    control.cuda_on_cpu_set_capability(value)
    try:
        yield
    finally:
        control.cuda_on_cpu_set_capability(90)


def without_tensor_cores(control):
    return capability(control, 75)


@contextlib.contextmanager
def shared_memory(control, kilobytes):
    """What a block can have: on real GPUs 64 KB (7.5), 99 KB (8.6, 8.9, 12.0), 163 KB (8.0) or 227 KB (9.0, 10.0)."""
    control.cuda_on_cpu_set_shared_memory(kilobytes * 1024)
    try:
        yield
    finally:
        control.cuda_on_cpu_set_shared_memory(227 * 1024)


def moved(tensor):
    """The same values at an address that is a multiple of nothing but their size."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


def dtype_of(precision):
    return torch.float32 if precision == "tf32" else getattr(torch, precision)


ON_TENSOR_CORES = ["tf32", "float16", "bfloat16"]


def gradients(ops, g, x, parameters, activations, input_gradient=False):
    """What lenet_backward returns, in the order of the parameters, then the input."""
    grad_input, grads = ops.lenet_backward(g, x, parameters, *activations, input_gradient)
    return (*grads, grad_input)


def rerun(suites, selected, **variables):
    """Test files of the operators, with the CUDA side in the CPU's place."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HYPOTHESIS_PROFILE": "cuda_on_cpu",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "cuda_on_cpu.plugin", "-p", "no:cacheprovider"]
    command += ["-m", "not extended", "-k", selected, *(str(TESTS / name) for name in suites)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
