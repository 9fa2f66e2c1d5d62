"""torch.utils.flop_counter counts for the fused layers what it counts for the stock ones, in both directions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lenet_ext
import lenet_ext.functional as LF
from lenet_ext import Net, ReferenceNet, TrainingStep


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def counts(call: Callable[..., Tensor], *arguments: Tensor | None) -> tuple[int, int]:
    """Of the forward pass, and of the backward pass to the arguments that require a gradient."""
    output = torch.empty(())

    def forward() -> None:
        nonlocal output
        output = call(*arguments)

    first = counted(forward)
    return first, counted(lambda: output.sum().backward()) if output.requires_grad else 0


def arguments(*shapes: tuple[int, ...], wanted: str) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=want == "1") for shape, want in zip(shapes, wanted, strict=True)]


WANTED = ["000", "111", "100", "010", "001", "011"]  # gradients of input, weight, bias


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (0, 5)])
def test_linear(shape: tuple[int, ...], bias: bool, wanted: str) -> None:
    tensors = arguments(shape, (4, 5), (4,), wanted=wanted)
    if not bias:
        tensors.pop()
    assert counts(LF.linear, *tensors) == counts(F.linear, *tensors)
    expected = counts(lambda *given: F.relu(F.linear(*given)), *tensors)
    assert counts(LF.linear_relu, *tensors) == expected
    if shape[0] > 0:
        assert expected[0] > 0


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, (6, 4, 3, 3)),
        ({"padding": "same"}, (6, 4, 2, 4)),
        ({"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}, (6, 4, 3, 2)),
        ({"groups": 2}, (6, 2, 3, 3)),
    ],
)
def test_convolution(options: dict, weight: tuple[int, ...], wanted: str) -> None:
    def stock(*given: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.conv2d(*given, **options)), 3, 2)

    def fused(*given: Tensor) -> Tensor:
        return LF.conv_relu_max_pool2d(*given, **options, pool_kernel_size=3, pool_stride=2)

    tensors = arguments((2, 4, 13, 11), weight, (6,), wanted=wanted)
    expected = counts(stock, *tensors)
    assert counts(fused, *tensors) == expected
    assert expected[0] > 0


def test_the_tangent_of_the_convolution() -> None:
    tensors = arguments((2, 4, 13, 11), (6, 4, 3, 3), (6,), wanted="000")
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)

    def stock(*given: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.conv2d(*given)), 2)

    assert counted(lambda: torch.func.jvp(LF.conv_relu_max_pool2d, tuple(tensors), tangents)) == counted(
        lambda: torch.func.jvp(stock, tuple(tensors), tangents)
    )


@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize("net", [Net, ReferenceNet])
def test_net(net: type[nn.Module], input_gradient: bool) -> None:
    image = torch.randn(1, 1, 32, 32, requires_grad=input_gradient)
    forward, backward = counts(net(), image)
    assert forward == 833040
    assert backward == 2 * 833040 - (0 if input_gradient else 2 * 25 * 6 * 28 * 28)


@pytest.mark.parametrize("input_gradient", [False, True])
def test_the_whole_network_as_one_operator(input_gradient: bool) -> None:
    net = Net(in_channels=3)
    images = torch.randn(2, 3, 32, 32, requires_grad=input_gradient)
    parameters = list(net.parameters())
    assert counts(lambda images: torch.ops.lenet_ext.lenet(images, parameters), images) == counts(net, images)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_a_training_step(loss: str) -> None:
    images = torch.randn(2, 1, 32, 32)
    targets = torch.randint(10, (2,)) if loss == "cross_entropy" else torch.randn(2, 10)

    def step_of(net: nn.Module) -> TrainingStep:
        return TrainingStep(net, torch.optim.SGD(net.parameters(), lr=0.1), loss)

    expected = counted(lambda: step_of(ReferenceNet())(images, targets))
    assert counted(lambda: step_of(Net())(images, targets)) == expected

    # Under a dispatch mode, such as the counter, a step goes by the layers; whoever calls the operator sees it whole.
    net = Net()
    parameters = list(net.parameters())
    arguments = (images, targets, None, parameters, [], loss, 0.0, -100, "sgd", [0.1, 0, 0, 0, 0, 0, 1] * 10)
    with torch.no_grad():
        assert counted(lambda: torch.ops.lenet_ext.lenet_training_step(*arguments)) == expected


def test_a_model_by_modules() -> None:
    counter = FlopCounterMode(display=False)
    model = lenet_ext.fuse(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with counter:
        model(torch.ones(5, 3))
    by_module = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    assert by_module["Sequential.0"] == 2 * 5 * 3 * 4
    assert by_module["Sequential"] == 2 * 5 * (3 * 4 + 4 * 2)


def test_average_pooling_counts_nothing_as_in_stock() -> None:
    (input,) = arguments((2, 3, 8, 8), wanted="1")
    assert counts(lambda x: LF.relu_avg_pool2d(x, 2), input) == counts(lambda x: F.avg_pool2d(F.relu(x), 2), input)
