"""What comes in between while an operator computes: other threads, a signal, the end of the interpreter."""

from __future__ import annotations

import collections
import itertools
import os
import threading
import time
from collections.abc import Callable

import pytest
import torch
from programs import lines_of, run

import lenet_ext
from lenet_ext import functional


def convolution() -> Callable[[], object]:
    maps, weight = torch.ones(16, 64, 112, 112), torch.ones(64, 64, 3, 3)
    return lambda: functional.conv_relu_max_pool2d(maps, weight)


def linear() -> Callable[[], object]:
    rows, weight = torch.ones(1 << 16, 256), torch.ones(256, 256)
    return lambda: functional.linear(rows, weight)


def network() -> Callable[[], object]:
    net, images = lenet_ext.Net().requires_grad_(False), torch.ones(1 << 14, 1, 32, 32)
    return lambda: net(images)


def gradients() -> Callable[[], object]:
    net = lenet_ext.Net()
    loss = net(torch.ones(1 << 13, 1, 32, 32)).sum()
    return lambda: torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)


def training_step() -> Callable[[], object]:
    net = lenet_ext.Net()
    step = lenet_ext.TrainingStep(net, torch.optim.SGD(net.parameters(), lr=0.1))
    images, targets = torch.ones(1 << 13, 1, 32, 32), torch.zeros(1 << 13, dtype=torch.long)
    return lambda: step(images, targets)


@pytest.mark.parametrize("make", [convolution, linear, network, gradients, training_step])
def test_other_threads_of_python_go_on(make: Callable[[], Callable[[], object]]) -> None:
    """Under a lock that the call keeps, nobody could count while it computes, a tenth of a second or more."""
    torch.set_num_threads(1)
    call = make()
    number, stop = 0, False  # of the call that goes on, 0 between calls

    def work() -> None:
        nonlocal number
        for next_number in itertools.count(1):
            if stop:
                break
            number = next_number
            call()
            number = 0

    thread = threading.Thread(target=work)
    thread.start()
    counted: collections.Counter[int] = collections.Counter()
    deadline = time.monotonic() + 120
    while max(counted.values(), default=0) < 20 and time.monotonic() < deadline:
        time.sleep(0.001)
        if number:
            counted[number] += 1
    stop = True
    thread.join()
    assert max(counted.values()) >= 20


SIGNALLED = """
import os, signal, sys, threading
import torch
import lenet_ext
from lenet_ext import functional

# A shell starts what it runs in the background with the signal ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(2)
torch.manual_seed(0)
images, targets = torch.randn(1024, 1, 32, 32), torch.arange(1024) % 10

def interrupted(call):
    # How often the call was completed before the signal, or once more: it comes after a call and before the count.
    completed = 0
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        while True:
            call()
            completed += 1
    except KeyboardInterrupt:
        return completed
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_waits_for_the_operator_and_leaves_nothing_half_done() -> None:
    lines = lines_of(
        SIGNALLED
        + """
weight = torch.randn(64, 64, 3, 3)
maps = torch.randn(4, 64, 112, 112)
before = functional.conv_relu_max_pool2d(maps, weight)
interrupted(lambda: functional.conv_relu_max_pool2d(maps, weight))
print(torch.equal(functional.conv_relu_max_pool2d(maps, weight), before))

def trained(steps):
    torch.manual_seed(1)
    net = lenet_ext.Net()
    step = lenet_ext.TrainingStep(net, torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9))
    for _ in range(steps):
        step(images, targets)
    return step

def state(step):
    buffers = [kept["momentum_buffer"] for kept in step.optimizer.state.values()]
    return [tensor.detach().clone() for tensor in [*step.net.parameters(), *buffers]]

def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

step = trained(0)
steps = interrupted(lambda: step(images, targets))
expected = {number: state(trained(number)) for number in (steps, steps + 1)}
reached = [number for number in expected if same(state(step), expected[number])]
print(len(reached))
step(images, targets)
print(same(state(step), state(trained(reached[0] + 1))))
"""
    )
    assert lines == ["True", "1", "True"]


# Ten seconds of work, or more.
ENDLESS = """
import atexit, threading, time
import torch
import lenet_ext
from lenet_ext import functional

torch.set_num_threads({threads})
maps, weight = torch.ones(16, 64, 112, 112), torch.ones(1024, 64, 5, 5)
begun = threading.Event()

def work():
    begun.set()
    functional.conv_relu_max_pool2d(maps, weight, pool_kernel_size=8)

threading.Thread(target=work, daemon=True).start()
begun.wait()
time.sleep(0.3)
"""


@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=pytest.mark.extended)])
def test_the_interpreter_ends_during_a_call(threads: int) -> None:
    """In a daemon thread, for which nobody waits. Where the call returns while the interpreter is being taken down, and
    before Python 3.14, the process ends in C++'s terminate, for stock's calls as for ours."""
    done = run(ENDLESS.format(threads=threads))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.extended
def test_the_interpreter_waits_for_other_threads() -> None:
    done = run(ENDLESS.format(threads=1).replace("daemon=True", "daemon=False").replace("1024, 64", "32, 64"))
    assert (done.returncode, done.stderr) == (0, "")


def test_calls_at_exit() -> None:
    lines = lines_of(
        """
        import atexit, weakref
        import torch
        import lenet_ext
        from lenet_ext import functional

        torch.set_num_threads(3)
        net, images = lenet_ext.Net(), torch.randn(256, 1, 32, 32)
        expected = net(images).detach()

        def call(when):
            net.zero_grad()
            output = net(images)
            output.sum().backward()
            print(when, torch.equal(output.detach(), expected))

        class Last:
            pass

        last = Last()
        weakref.finalize(last, call, "finalized")
        atexit.register(call, "at exit")
        """
    )
    assert sorted(lines) == ["at exit True", "finalized True"]
