"""The operators in PyTorch's own: where somebody asks for it, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import lenet_ext
from lenet_ext.decompositions import TABLE
from lenet_ext.nn import ConvReLUMaxPool2d, Linear, LinearReLU, ReLUAvgPool2d


class WholeNetwork(lenet_ext.Net):
    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.lenet_ext.lenet(input, list(self.parameters()))


MODELS = {
    "Net": (lenet_ext.Net, (2, 1, 32, 32)),
    "the whole network": (WholeNetwork, (2, 1, 32, 32)),
    "Linear": (lambda: Linear(5, 3), (2, 4, 5)),
    "LinearReLU": (lambda: LinearReLU(5, 3, bias=False), (5,)),
    "convolution": (
        lambda: ConvReLUMaxPool2d(2, 3, (2, 3), padding="same", pool_kernel_size=3, pool_stride=2, ceil_mode=True),
        (2, 2, 8, 9),
    ),
    "average pooling": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), ReLUAvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=5)),
        (2, 2, 8, 9),
    ),
}


def operators(program: ExportedProgram) -> set[str]:
    return {node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


def trained(model: nn.Module, input: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    output = model(input)
    output.sin().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [output.detach(), *gradients]


@pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)
def test_a_decomposed_program_computes_and_trains(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    model, input = make().double(), torch.randn(shape, dtype=torch.float64)
    program = torch.export.export(model, (input,))
    assert "lenet_ext" in operators(program)
    assert "lenet_ext" in operators(program.run_decompositions())
    table = torch.export.default_decompositions()
    table.update(TABLE)
    decomposed = program.run_decompositions(table)
    assert "lenet_ext" not in operators(decomposed)
    expected = trained(model, input)
    model.zero_grad()
    for one, other in zip(trained(decomposed.module(), input), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
def test_shapes_with_symbols_come_from_the_operators(
    input_format: torch.memory_format, weight_format: torch.memory_format
) -> None:
    """Stock's convolution is laid out as its weight, ours as its input: the decomposition has other strides."""
    input = torch.randn(2, 3, 12, 12).to(memory_format=input_format)
    weight = torch.randn(8, 3, 3, 3).to(memory_format=weight_format)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        arguments = [mode.from_tensor(tensor, static_shapes=False) for tensor in (input, weight)]
        output = lenet_ext.functional.conv_relu_max_pool2d(*arguments)
        channels_last = input_format == torch.channels_last
        assert bool(output.stride(1) == 1) is channels_last
        assert bool(output.stride(3) == 1) is not channels_last


@pytest.mark.parametrize("padding", [1, "same"])
def test_a_kernel_whose_size_is_a_symbol(padding: int | str) -> None:
    def call(input: Tensor, weight: Tensor) -> Tensor:
        return lenet_ext.functional.conv_relu_max_pool2d(input, weight, padding=padding)

    input, weight = torch.randn(2, 3, 12, 12), torch.randn(8, 3, 3, 3)
    traced = make_fx(call, tracing_mode="symbolic")(input, weight)
    torch.testing.assert_close(traced(input, weight), call(input, weight))
