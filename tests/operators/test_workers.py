"""Threads and fresh interpreters: no shared state that breaks. Other processes are those of tests/processes."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
import threading

import pytest
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


# Everything at once in threads that are the first to do it, so that whatever is made at the first call is made in
# several threads; then in one thread, which has to give the same bits.
_ALL_AT_ONCE = """
    import threading
    import torch, torch.nn.functional as F
    import lenet_ext
    from lenet_ext import functional

    start = lenet_ext.Net().state_dict()
    shared, stock = lenet_ext.Net(), lenet_ext.ReferenceNet()
    stock.load_state_dict(start)

    def operators(numbers):
        x, w = numbers(3, 4, 13, 11).requires_grad_(), numbers(6, 2, 3, 3).requires_grad_()
        pooled = functional.conv_relu_max_pool2d(x, w, None, (1, 2), "valid", 1, 2, pool_kernel_size=3, pool_stride=2)
        rows, weight = numbers(7, 9).requires_grad_(), numbers(4, 9).requires_grad_()
        hidden = functional.linear_relu(rows, weight) + functional.linear(rows, weight)
        return pooled, hidden, *torch.autograd.grad(pooled.sum() + hidden.square().sum(), [x, w, rows, weight])

    def shared_network(numbers):
        logits = shared(numbers(9, 1, 32, 32))
        return logits, *torch.autograd.grad(logits.square().sum(), list(shared.parameters()))

    def training(numbers, optimizer, **options):
        net = lenet_ext.Net()
        net.load_state_dict(start)
        step = lenet_ext.TrainingStep(net, optimizer(net.parameters(), lr=0.01, **options))
        losses = [step(numbers(20, 1, 32, 32), torch.arange(20) % 10) for _ in range(4)]
        assert step.path == "one operator", step.path
        return *losses, *net.state_dict().values()

    def fusing(numbers):
        fused = lenet_ext.fuse(stock)
        kinds.add(type(fused))
        logits = fused(numbers(3, 1, 32, 32))
        return logits, *torch.autograd.grad(logits.sum(), list(fused.parameters()))

    def everything(seed):
        generator = torch.Generator().manual_seed(seed)
        numbers = lambda *shape: torch.randn(shape, generator=generator)
        parts = [
            lambda: operators(numbers),
            lambda: shared_network(numbers),
            lambda: training(numbers, torch.optim.SGD, momentum=0.9),
            lambda: training(numbers, torch.optim.AdamW),
            lambda: fusing(numbers),
        ]
        parts = parts[seed % len(parts) :] + parts[: seed % len(parts)]  # each thread begins with another
        return [tensor.detach() for part in parts for tensor in part()]

    count, kinds, results = 6, set(), {}
    barrier = threading.Barrier(count)

    def work(seed):
        barrier.wait()
        results[seed] = everything(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(count)), "a thread raised"
    assert len(kinds) == 1, kinds
    for seed, found in results.items():
        expected = everything(seed)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected)), seed
    print("fine")
    """


def test_first_calls_in_many_threads():
    assert _python(_ALL_AT_ONCE, timeout=600).split() == ["fine"]


def test_a_network_whose_attributes_are_replaced_meanwhile():
    """By equal ones: what a call has found must not vanish while it looks at it."""
    net, x = Net(), torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = net(x)
    done, errors = threading.Event(), []

    def replace():
        weights = {name: parameter.detach() for name, parameter in net.fc3._parameters.items()}
        while not done.is_set():
            net.fc3._parameters = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
            net.fc3._forward_hooks = {}
            net.conv1.stride = tuple([1, 1])  # noqa: C409  a new object, where (1, 1) is one and the same

    def call():
        try:
            with torch.no_grad():
                for i in range(100_000):
                    parameters = net._parameters_of_whole_network(x)
                    assert parameters is not None
                    if i % 5_000 == 0:
                        assert_equal(net(x), expected, "logits")
        except BaseException as error:
            errors.append(error)

    replacing = threading.Thread(target=replace)
    calling = [threading.Thread(target=call) for _ in range(4)]
    replacing.start()
    for thread in calling:
        thread.start()
    for thread in calling:
        thread.join(120)
    done.set()
    replacing.join(120)
    assert not any(thread.is_alive() for thread in [replacing, *calling]), "a thread hangs"
    assert not errors, errors[0]


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python always has its global lock")
def test_importing_leaves_the_global_lock_off():
    """An extension that does not say that it needs none has Python switch it on, with a warning."""
    code = """
        import sys
        import torch
        before = sys._is_gil_enabled()
        import lenet_ext
        lenet_ext.Net()(torch.ones(1, 1, 32, 32))
        print(before, sys._is_gil_enabled())
        """
    assert _python(code, PYTHON_GIL="").split() == ["False", "False"]


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
