"""Processes begun by one that has used the operators: forked, spawned, workers of a DataLoader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from programs import lines_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

# Calls that are worth several threads: our kernels for layers and for LeNet as a whole, what goes to the vendor's
# library, and stock's own layers. What is computed is the same in every process and for any number of threads; the
# vendor's results are compared within rounding, for no one promises their bits. Compared by numpy, which has no part in
# what is tested.
CALLS = """
import os, signal, threading, traceback
import numpy
import torch
import lenet_ext
from lenet_ext import functional

THREADS = 3
torch.set_num_threads(THREADS)
torch.manual_seed(0)
net, stock = lenet_ext.Net(), lenet_ext.ReferenceNet()
images, targets = torch.randn(256, 1, 32, 32), torch.arange(256) % 10
maps, weight = torch.randn(8, 16, 64, 64), torch.randn(32, 16, 3, 3)
rows, matrix, large = torch.randn(4000, 200), torch.randn(100, 200), torch.randn(600, 600)

def step():
    torch.manual_seed(1)
    trained = lenet_ext.Net()
    one = lenet_ext.TrainingStep(trained, torch.optim.AdamW(trained.parameters(), fused=True))
    return [one(images, targets), *(parameter.detach() for parameter in trained.parameters())]

CALLS = {
    "convolution": lambda: [functional.conv_relu_max_pool2d(maps, weight)],
    "linear": lambda: [functional.linear_relu(rows, matrix)],
    "network": lambda: [net(images).detach()],
    "gradients": lambda: torch.autograd.grad(net(images).sum(), list(net.parameters())),
    "training step": step,
}
ROUNDED = {
    "vendor's product": lambda: [functional.linear(large, large)],
    "stock": lambda: [stock(images).detach(), large.exp()],
}
# Clang brings a runtime of its own for our kernels, and torch's is left as it is.
if "clang" not in lenet_ext.build_info()["compiler"].lower():
    CALLS.update(ROUNDED)

def result_is_right(name, expected):
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if name in ROUNDED else {"rtol": 0, "atol": 0}
    for found, right in zip(CALLS[name](), expected, strict=True):
        numpy.testing.assert_allclose(found.numpy(), right.numpy(), **tolerance)
    return torch.get_num_threads() == THREADS

def exit_code(body):
    # A child that hangs is ended by the alarm, and its exit code says so.
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        try:
            os._exit(0 if body() else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def test_a_forked_child_computes_what_its_parent_does() -> None:
    """With GNU's OpenMP runtime it would wait for threads that only the parent has."""
    lines = lines_of(
        CALLS
        + """
for name, call in CALLS.items():
    expected = call()
    print(name, exit_code(lambda: result_is_right(name, expected)), result_is_right(name, expected), sep=": ")
"""
    )
    assert len(lines) >= 5
    assert all(line.endswith(": 0: True") for line in lines), lines


@pytest.mark.extended
def test_children_of_children_and_of_threads() -> None:
    lines = lines_of(
        CALLS
        + """
expected = CALLS["network"]()

def generations(left):
    return result_is_right("network", expected) and (left == 0 or exit_code(lambda: generations(left - 1)) == 0)

def of_a_thread():
    print("thread:", result_is_right("network", expected), exit_code(lambda: result_is_right("network", expected)))

def of_a_new_thread():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(result_is_right("network", expected)))
    thread.start()
    thread.join()
    return codes == [True] and result_is_right("network", expected)

print("generations:", generations(2))
thread = threading.Thread(target=of_a_thread)
thread.start()
thread.join()
print("thread in the child:", exit_code(of_a_new_thread))
"""
    )
    assert lines == ["generations: True", "thread: True 0", "thread in the child: 0"]


STARTED = """
import multiprocessing
import torch
import lenet_ext

def seeded():
    torch.manual_seed(0)
    return lenet_ext.Net(), torch.randn(256, 1, 32, 32)

def compute(threads):
    torch.set_num_threads(threads)
    net, images = seeded()
    output = net(images)
    output.sum().backward()
    return [output.detach().numpy(), net.conv1.weight.grad.numpy()]

if __name__ == "__main__":
    expected = compute(3)
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        for found in pool.map_async(compute, [1, 2, 3, 3]).get(timeout=500):
            assert all((one == other).all() for one, other in zip(found, expected, strict=True))
    print("computed")
"""


@pytest.mark.extended
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    assert lines_of(STARTED.format(method=method), tmp_path) == ["computed"]


LOADED = """
import torch
import lenet_ext
from lenet_ext import functional

class Features(torch.utils.data.Dataset):
    def __init__(self):
        torch.manual_seed(0)
        self.net = lenet_ext.Net().eval()
        self.images = torch.randn(12, 1, 32, 32)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        with torch.no_grad():
            return image, self.net(image[None])[0]

WEIGHT = torch.arange(54.0).view(6, 1, 3, 3)

def collate(items):
    images, scores = map(torch.stack, zip(*items, strict=True))
    return functional.conv_relu_max_pool2d(images, WEIGHT), functional.linear_relu(scores, torch.ones(3, 10))

if __name__ == "__main__":
    torch.set_num_threads(3)
    data = Features()
    data.net(torch.randn(256, 1, 32, 32))
    expected = [collate([data[index] for index in range(first, first + 4)]) for first in (0, 4, 8)]
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, num_workers=2, collate_fn=collate, multiprocessing_context={method!r}, timeout=500
    )
    for _ in range(2):
        for found, right in zip(loader, expected, strict=True):
            assert all(map(torch.equal, found, right))
    print("loaded")
"""


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.extended)])
def test_workers_of_a_data_loader(method: str, tmp_path: Path) -> None:
    """The operators in what makes an example and in what makes a batch."""
    assert lines_of(LOADED.format(method=method), tmp_path) == ["loaded"]
