"""Fused layers on several processes (DTensors, tensor parallelism, FSDP, DDP) compute and train as in one process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

import lenet_ext.functional as LF

pytest.importorskip("torch.distributed.tensor")
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")


def run_together(code: str, folder: Path, processes: int) -> None:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, str(script)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all is well" in done.stdout


# --- the operators ----------------------------------------------------------------------------------------------------

# Every way to lay out the arguments, however unsuitable: values, gradients and sizes are those of whole tensors.
OPERATORS = """
    import itertools
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    import lenet_ext.functional as LF
    from lenet_ext.training.distributed import join_processes

    def placements(tensor):
        return [Replicate(), *(Shard(dim) for dim in range(tensor.dim()))]

    def check(name, function, tensors, mesh, layouts):
        def outputs_of(arguments):
            arguments = [argument.detach().requires_grad_() for argument in arguments]
            output = function(*arguments)
            output.sin().sum().backward()
            return [output.detach(), *(argument.grad for argument in arguments)]

        expected = outputs_of(tensors)
        for layout in layouts:
            found = outputs_of([distribute_tensor(t, mesh, where) for t, where in zip(tensors, layout)])
            for one, other in zip(found, expected, strict=True):
                assert one.shape == other.shape, (name, layout, one.shape, other.shape)
                torch.testing.assert_close(one.full_tensor(), other, rtol=1e-10, atol=1e-12, msg=f"{name} {layout}")

    torch.set_default_dtype(torch.float64)
    with join_processes("cpu") as processes:
        torch.manual_seed(0)
        x, w, b = torch.randn(6, 4, 9, 8), torch.randn(6, 4, 3, 2), torch.randn(6)
        rows, matrix, bias = torch.randn(3, 4, 5), torch.randn(7, 5), torch.randn(7)  # nothing here is even
        cases = {
            "conv": (LF.conv_relu_max_pool2d, [x, w, b]),
            "conv, stride 2": (lambda *given: LF.conv_relu_max_pool2d(*given, stride=2, padding=1), [x, w, b]),
            "conv, groups": (lambda *given: LF.conv_relu_max_pool2d(*given, groups=2), [x, w[:, :2].contiguous()]),
            "average pooling": (lambda x: LF.relu_avg_pool2d(x, 3, 2, 1), [x]),
            "linear": (LF.linear, [rows, matrix, bias]),
            "linear_relu": (LF.linear_relu, [rows, matrix, bias]),
            "linear, one row": (LF.linear, [rows[:1, 0], matrix]),
        }
        mesh = init_device_mesh("cpu", (2,) if processes.size == 2 else (2, processes.size // 2))
        for name, (function, tensors) in cases.items():
            if mesh.ndim == 1:
                layouts = [[(p,) for p in layout] for layout in itertools.product(*map(placements, tensors))]
                check(name, function, tensors, mesh, layouts)
                continue
            along = [Replicate(), Shard(0), Shard(1)]
            layouts = [[pair] * len(tensors) for pair in itertools.product(along[:2], repeat=2)]
            pairs = list(itertools.product(along, repeat=2))
            layouts += [[one, other, (Replicate(),) * 2][: len(tensors)] for one in pairs for other in pairs]
            check(name, function, tensors, mesh, layouts)
        if processes.is_first:
            print("all is well")
"""


@pytest.mark.extended
@pytest.mark.parametrize("processes", [2, 4])
def test_operators(tmp_path: Path, processes: int) -> None:
    run_together(OPERATORS, tmp_path, processes)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of two processes, of which this is one and the other does not exist: nothing is sent, and all is counted."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def placement_and_messages(
    function: Callable[..., Tensor], mesh: DeviceMesh, shapes: list[tuple[int, ...]], placements: list[Placement]
) -> tuple[Placement, int]:
    """Of the output of arguments that lie so, and how many collective calls it took."""
    tensors = [distribute_tensor(torch.ones(s), mesh, [p]) for s, p in zip(shapes, placements, strict=True)]
    with CommDebugMode() as communication:
        output = function(*tensors)
    assert isinstance(output, DTensor)
    return output.placements[0], communication.get_total_counts()


WHOLE = Replicate()
LINEAR = [(4, 6), (8, 6), (8,)]
CONVOLUTION = [(4, 2, 8, 8), (6, 2, 3, 3), (6,)]


def average_pooling(input: Tensor) -> Tensor:
    return LF.relu_avg_pool2d(input, 2)


def average_pooling_and_back(input: Tensor) -> Tensor:
    input.requires_grad_()
    return torch.autograd.grad(average_pooling(input).square().sum(), input)[0]


# DTensor could always collect everything, and be right.
@pytest.mark.parametrize(
    ("function", "shapes", "placements", "expected"),
    [
        (LF.linear, LINEAR, [WHOLE, WHOLE, WHOLE], (WHOLE, 0)),
        (LF.linear, LINEAR, [Shard(0), WHOLE, WHOLE], (Shard(0), 0)),
        (LF.linear, LINEAR, [WHOLE, Shard(0), Shard(0)], (Shard(1), 0)),
        (LF.linear, LINEAR, [Shard(1), Shard(1), WHOLE], (Partial(), 0)),
        (LF.linear_relu, LINEAR, [WHOLE, WHOLE, WHOLE], (WHOLE, 0)),
        (LF.linear_relu, LINEAR, [Shard(0), WHOLE, WHOLE], (Shard(0), 0)),
        (LF.linear_relu, LINEAR, [WHOLE, Shard(0), Shard(0)], (Shard(1), 0)),
        (LF.linear_relu, LINEAR, [Shard(1), Shard(1), WHOLE], (WHOLE, 1)),  # the sum, in front of ReLU
        (LF.conv_relu_max_pool2d, CONVOLUTION, [WHOLE, WHOLE, WHOLE], (WHOLE, 0)),
        (LF.conv_relu_max_pool2d, CONVOLUTION, [Shard(0), WHOLE, WHOLE], (Shard(0), 0)),
        (LF.conv_relu_max_pool2d, CONVOLUTION, [WHOLE, Shard(0), Shard(0)], (Shard(1), 0)),
        (average_pooling, CONVOLUTION[:1], [Shard(0)], (Shard(0), 0)),
        (average_pooling, CONVOLUTION[:1], [Shard(1)], (Shard(1), 0)),
        (average_pooling_and_back, CONVOLUTION[:1], [Shard(1)], (Shard(1), 0)),
    ],
)
def test_placements(
    mesh: DeviceMesh,
    function: Callable[..., Tensor],
    shapes: list[tuple[int, ...]],
    placements: list[Placement],
    expected: tuple[Placement, int],
) -> None:
    assert placement_and_messages(function, mesh, shapes, placements) == expected


def test_what_cannot_be_cut_is_collected(mesh: DeviceMesh) -> None:
    shapes = [(1, 6), (8, 6), (8,)]
    assert placement_and_messages(LF.linear_relu, mesh, shapes, [Shard(0), WHOLE, WHOLE]) == (WHOLE, 1)


def test_other_options_give_other_sizes(mesh: DeviceMesh) -> None:
    """DTensor keeps what it finds out about a call, and must not do so without regard to the options."""
    images = distribute_tensor(torch.ones(2, 1, 9, 9), mesh, [WHOLE])
    weight = distribute_tensor(torch.ones(1, 1, 2, 2), mesh, [WHOLE])
    for stride, size in ((1, 4), (2, 2)):
        assert LF.conv_relu_max_pool2d(images, weight, stride=stride).shape == (2, 1, size, size)
    rows, square = images[0, 0], images[1, 0]
    for mask in ([True, True, True], [False, True, False]):
        gradients = torch.ops.lenet_ext.linear_backward(rows, rows, square, mask)
        assert [gradient.numel() > 0 for gradient in gradients] == mask


def test_mixed_tensors_are_an_error(mesh: DeviceMesh) -> None:
    with pytest.raises(RuntimeError, match="got DTensors and other tensors mixed"):
        LF.linear(torch.ones(4, 6), distribute_tensor(torch.ones(8, 6), mesh, [WHOLE]))


def test_tensors_of_different_meshes_are_an_error(mesh: DeviceMesh) -> None:
    other = init_device_mesh("cpu", (1, 2))
    input = distribute_tensor(torch.ones(4, 6), mesh, [WHOLE])
    weight = distribute_tensor(torch.ones(8, 6), other, [WHOLE, WHOLE])
    with pytest.raises(RuntimeError, match="all tensors must be on one device mesh"):
        LF.linear(input, weight)


def test_a_sum_that_is_not_added_up_yet(mesh: DeviceMesh) -> None:
    """The cheapest way on: each process gets the sum of its part of the rows."""

    def twice(*tensors: Tensor) -> Tensor:
        input, weight, other = tensors
        return LF.linear_relu(LF.linear(input, weight), other)

    shapes = [(4, 6), (8, 6), (3, 8)]
    assert placement_and_messages(twice, mesh, shapes, [Shard(1), Shard(1), WHOLE]) == (Shard(0), 1)


def test_the_convolution_at_given_winners_keeps_its_part(mesh: DeviceMesh) -> None:
    """Which derivatives of derivatives call, and nobody else."""
    options = ([1, 1], [0] * 4, [1, 1], 1, [2, 2], [2, 2], [0, 0], [1, 1])

    def at_winners(*tensors: Tensor) -> Tensor:
        *others, indices = tensors
        return torch.ops.lenet_ext.conv_at_indices(*others, indices.to(torch.uint8), *options)

    shapes, parts = [*CONVOLUTION, (4, 6, 3, 3)], [Shard(0), WHOLE, WHOLE, Shard(0)]
    assert placement_and_messages(at_winners, mesh, shapes, parts) == (Shard(0), 0)


def test_errors_are_those_of_whole_tensors(mesh: DeviceMesh) -> None:
    with pytest.raises(RuntimeError, match=r"input must have shape \[..., 6\] for weight of shape \(8, 6\)"):
        placement_and_messages(LF.linear, mesh, [(4, 5), (8, 6), (8,)], [WHOLE, Shard(0), Shard(0)])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled(mesh: DeviceMesh) -> None:
    tensors = [distribute_tensor(torch.randn(s), mesh, [WHOLE]) for s in CONVOLUTION]
    compiled = torch.compile(LF.conv_relu_max_pool2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors).to_local(), LF.conv_relu_max_pool2d(*tensors).to_local())


# --- models -----------------------------------------------------------------------------------------------------------

MODELS = """
    import copy
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel
    import lenet_ext
    from lenet_ext.training.distributed import join_processes

    def perceptron():
        layers = nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4)
        return lenet_ext.fuse(nn.Sequential(*layers)), torch.randn(6, 12), torch.randint(4, (6,))

    def convolutional():
        layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 6), nn.ReLU()]
        return lenet_ext.fuse(nn.Sequential(*layers, nn.Linear(6, 4))), torch.randn(6, 1, 8, 8), torch.randint(4, (6,))

    def net():
        return lenet_ext.Net(), torch.randn(6, 1, 32, 32), torch.randint(10, (6,))

    def tensor_parallel(model):
        if isinstance(model, lenet_ext.Net):
            plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
        else:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()}
        return parallelize_module(model, mesh, plan)

    def columns_first(model):
        plan = {"0": RowwiseParallel(input_layouts=Replicate()), "2": ColwiseParallel(), "4": RowwiseParallel()}
        return parallelize_module(model, mesh, plan)

    def batch_parallel(model):  # everything a DTensor
        def to_shares(module, inputs, mesh):
            return DTensor.from_local(inputs[0].chunk(mesh.size())[mesh.get_local_rank()], mesh, [Shard(0)])
        def to_whole(module, output, mesh):
            return output.full_tensor()
        return distribute_module(model, mesh, input_fn=to_shares, output_fn=to_whole)

    def fsdp(model):
        for child in model.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def fsdp_as_one(model):
        return fully_shard(model, mesh=mesh)

    def two_steps(model, images, labels):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    def check(make, spread, shares):
        torch.manual_seed(0)
        alone, images, labels = make()
        together = spread(copy.deepcopy(alone))
        two_steps(alone, images, labels)
        share = slice(processes.rank, None, processes.size) if shares else slice(None)
        two_steps(together, images[share], labels[share])
        expected = alone.state_dict()
        for name, value in together.state_dict().items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            right, message = expected[name.removeprefix("module.")], f"{make.__name__} {spread.__name__} {name}"
            torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-12, msg=message)

    torch.set_default_dtype(torch.float64)
    with join_processes("cpu") as processes:
        mesh = init_device_mesh("cpu", (processes.size,))
        for make in perceptron, net:
            check(make, tensor_parallel, shares=False)
        check(perceptron, columns_first, shares=False)
        for make in perceptron, convolutional, net:
            check(make, batch_parallel, shares=False)
            for spread in fsdp, fsdp_as_one, DistributedDataParallel:
                check(make, spread, shares=True)
        if processes.is_first:
            print("all is well")
"""


@pytest.mark.extended
def test_models(tmp_path: Path) -> None:
    run_together(MODELS, tmp_path, processes=2)
