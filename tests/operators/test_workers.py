"""Threads and fresh interpreters: no shared state that breaks. Other processes are those of tests/processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import torch
from reference import assert_equal

from lenet_ext import Net


def _python(code: str, timeout: float = 120, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout


def test_many_python_threads():
    """The GIL is no protection where a kernel releases it, nor for a cache in Python."""
    net = Net()
    batches = [torch.randn(n, 1, 32, 32) for n in (1, 3, 16, 33)]
    with torch.no_grad():
        expected = [net(x) for x in batches]
    expected_grads = [torch.autograd.grad(net(x).sum(), list(net.parameters())) for x in batches]
    errors: list[BaseException] = []

    def work(i: int):
        try:
            for k in range(12):
                j = (i + k) % len(batches)
                with torch.no_grad():
                    assert_equal(net(batches[j]), expected[j], "logits")
                grads = torch.autograd.grad(net(batches[j]).sum(), list(net.parameters()))
                for a, b in zip(grads, expected_grads[j], strict=True):
                    assert_equal(a, b, "grad")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not errors, errors[0]


def test_number_of_threads_is_left_alone():
    before = torch.get_num_threads()
    Net()(torch.randn(64, 1, 32, 32)).sum().backward()
    assert torch.get_num_threads() == before


def test_default_dtype_and_device_do_not_matter():
    """torch.set_default_dtype(float64) changes what Net() makes, not what a kernel does with float32."""
    out = _python(
        """
        import torch, lenet_ext
        x, w = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3)
        before = lenet_ext.functional.conv_relu_max_pool2d(x, w)
        torch.set_default_dtype(torch.float64)
        after = lenet_ext.functional.conv_relu_max_pool2d(x, w)
        assert after.dtype == torch.float32 and torch.equal(before, after)
        assert lenet_ext.Net().conv1.weight.dtype == torch.float64
        torch.set_default_device("meta")
        assert torch.equal(lenet_ext.functional.conv_relu_max_pool2d(x, w), before)
        assert lenet_ext.Net().conv1.weight.device.type == "meta"
        print("fine")
        """
    )
    assert out.split() == ["fine"]


def test_omp_num_threads():
    out = _python(
        """
        import torch, lenet_ext
        torch.manual_seed(0)
        net, x = lenet_ext.Net(), torch.randn(70, 1, 32, 32)
        net(x).sum().backward()
        print(net.conv1.weight.grad.isfinite().all().item())
        """,
        OMP_NUM_THREADS="5",
    )
    assert out.split() == ["True"]
