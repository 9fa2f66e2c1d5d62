"""torch.jit.trace and what is built on it: traces compute, train, and can be saved, frozen and drawn."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lenet_ext
from lenet_ext.nn import ConvReLUMaxPool2d, Linear, LinearReLU

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

MODELS = {
    "Net": (lenet_ext.Net, (2, 1, 32, 32)),
    "Linear": (lambda: Linear(5, 3), (2, 4, 5)),
    "LinearReLU": (lambda: LinearReLU(5, 3, bias=False), (2, 5)),
    "convolution": (lambda: ConvReLUMaxPool2d(2, 3, (2, 3), padding="same", ceil_mode=True), (2, 2, 8, 9)),
    "fused": (lambda: lenet_ext.fuse(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))), (2, 5)),
}
models = pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)


def trained(model: nn.Module, input: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    model.zero_grad()
    output = model(input)
    output.sin().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


@models
def test_a_saved_trace_computes_and_trains(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    model, input = make(), torch.randn(shape)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (input,)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for _ in range(3):  # TorchScript optimizes from the second run on
        for one, other in zip(trained(loaded, input), trained(model, input), strict=True):
            torch.testing.assert_close(one, other)


@models
def test_a_frozen_trace(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    model, input = make().eval(), torch.randn(shape)
    frozen = torch.jit.freeze(torch.jit.trace(model, (input,)))
    assert not list(frozen.parameters())
    for _ in range(3):
        torch.testing.assert_close(frozen(input), model(input).detach())


@models
def test_a_trace_optimized_for_inference(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    model, input = make().eval(), torch.randn(shape)
    optimized = torch.jit.optimize_for_inference(torch.jit.trace(model, (input,)))
    torch.testing.assert_close(optimized(input), model(input).detach())


def test_tensorboard_draws_the_graph(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard._pytorch_graph import graph

    image = torch.randn(1, 1, 32, 32)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(lenet_ext.Net(), image)
    drawn, _ = graph(lenet_ext.Net(), image)
    operators = [node.op for node in drawn.node if node.op.startswith("lenet_ext::")]
    assert (
        sorted(operators)
        == ["lenet_ext::conv_relu_max_pool2d"] * 2 + ["lenet_ext::linear"] + ["lenet_ext::linear_relu"] * 2
    )
