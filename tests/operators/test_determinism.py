"""The same bits from run to run and for any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lenet_ext import Net, functional

SHAPES = {
    "lenet 1": ((65, 1, 32, 32), (6, 1, 5, 5), {}),
    "lenet 2": ((65, 6, 14, 14), (16, 6, 5, 5), {}),
    "one image": ((1, 6, 40, 40), (16, 6, 5, 5), {}),
    "wide": ((5, 16, 20, 20), (33, 16, 3, 3), {"padding": 1}),
    "overlapping, groups": ((9, 6, 21, 20), (8, 3, 3, 3), {"groups": 2, "pool_kernel_size": 3, "pool_stride": 2}),
}


def _conv(shape, dtype, device="cpu"):
    torch.manual_seed(0)
    image, weight, options = SHAPES[shape]
    tensors = [torch.randn(s).to(device, dtype).requires_grad_() for s in (image, weight, weight[:1])]
    output = functional.conv_relu_max_pool2d(*tensors, **options)
    torch.manual_seed(1)
    return [output.detach(), *torch.autograd.grad(output, tensors, torch.randn(output.shape).to(output))]


def _linear(name, m, k, n, dtype, device="cpu"):
    torch.manual_seed(0)
    tensors = [torch.randn(s).to(device, dtype).requires_grad_() for s in ((m, k), (n, k), (n,))]
    output = getattr(functional, name)(*tensors)
    return [output.detach(), *torch.autograd.grad(output, tensors, torch.randn(output.shape).to(output))]


def _net(batch, device="cpu"):
    torch.manual_seed(0)
    net = Net().to(device)
    x = torch.randn(batch, 1, 32, 32).to(device)
    with torch.no_grad():
        inference = net(x)
    output = net(x)
    output.pow(2).sum().backward()
    return [inference, output.detach(), *(p.grad for p in net.parameters())]


def _everything(device="cpu"):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in SHAPES:
            yield f"{shape} {dtype}", _conv(shape, dtype, device)
        for name in ("linear", "linear_relu"):
            for m, k, n in ((1, 400, 120), (67, 120, 84), (300, 84, 10), (300, 200, 250), (5, 1000, 300)):
                yield f"{name} {m} {k} {n} {dtype}", _linear(name, m, k, n, dtype, device)
    for batch in (1, 3, 37, 128):
        yield f"net {batch}", _net(batch, device)


def _assert_same_bits(a, b, what):
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
        assert torch.equal(x.contiguous().view(bits), y.contiguous().view(bits)), f"{what}: result {i} differs"


@pytest.mark.parametrize("shape", ["lenet 1", "lenet 2", "overlapping, groups"])
def test_twenty_runs(device, shape):
    first = _conv(shape, torch.float32, device)
    for _ in range(19):
        _assert_same_bits(first, _conv(shape, torch.float32, device), shape)


def test_twenty_runs_of_the_net(device):
    first = _net(64, device)
    for _ in range(19):
        _assert_same_bits(first, _net(64, device), "net")


def test_any_number_of_threads():
    """Our kernels, forced: the vendor's convolution and GEMM are as deterministic as the vendor makes them."""
    code = f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        import torch
        from test_determinism import _assert_same_bits, _everything
        torch.set_num_threads(1)
        expected = dict(_everything())
        for threads in (2, 3, 4, 7):
            torch.set_num_threads(threads)
            for what, results in _everything():
                _assert_same_bits(results, expected[what], f"{{what}}, {{threads}} threads")
        print(len(expected), "cases")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "LENET_EXT_ALGORITHM": "direct", "OMP_DYNAMIC": "FALSE"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 30


def test_deterministic_mode_is_satisfied(device):
    """torch.use_deterministic_algorithms(True) raises nowhere, and changes nothing."""
    before = _conv("lenet 2", torch.float32, device)
    torch.use_deterministic_algorithms(True)
    try:
        after = _conv("lenet 2", torch.float32, device)
    finally:
        torch.use_deterministic_algorithms(False)
    _assert_same_bits(before, after, "lenet 2")
