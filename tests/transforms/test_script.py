"""torch.jit.script: the layers can be scripted where stock's can, with the same values and gradients."""

from __future__ import annotations

import io

import pytest
import torch
from reference import assert_equal, integers
from torch import nn

import lenet_ext
from lenet_ext import functional
from lenet_ext import nn as layers

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")

LAYERS = {
    "Linear": (lambda: layers.Linear(5, 3), (2, 4, 5)),
    "LinearReLU": (lambda: layers.LinearReLU(5, 3, bias=False), (5,)),
    "convolution": (lambda: layers.ConvReLUMaxPool2d(2, 3, 3), (2, 2, 8, 9)),
    "unbatched": (lambda: layers.ConvReLUMaxPool2d(2, 3, 3, padding=1), (2, 8, 9)),
    "same": (lambda: layers.ConvReLUMaxPool2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (2, 2, 8, 9)),
    "padded": (lambda: layers.ConvReLUMaxPool2d(2, 4, 3, (2, 1), (2, 1), groups=2, bias=False), (2, 2, 8, 9)),
    "pool": (
        lambda: layers.ConvReLUMaxPool2d(
            2, 3, 3, pool_kernel_size=(3, 2), pool_stride=1, pool_padding=[1, 0], pool_dilation=(1, 2), ceil_mode=True
        ),
        (2, 2, 8, 9),
    ),
    "window of 272": (lambda: layers.ConvReLUMaxPool2d(1, 1, 1, pool_kernel_size=(16, 17)), (1, 1, 18, 18)),
    "average pooling": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), layers.ReLUAvgPool2d(2, (2, 1), ceil_mode=True)),
        (2, 2, 8, 9),
    ),
    "Net": (lenet_ext.Net, (2, 1, 32, 32)),
    "fused": (
        lambda: lenet_ext.fuse(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())),
        (2, 2, 8, 9),
    ),
}


def exact(make, dtype):
    module = make()
    for parameter in module.parameters():
        parameter.data.copy_(integers(*parameter.shape, low=-1, high=1))
    return module.to(dtype)


def results(module, input):
    module.zero_grad()
    leaf = input.clone().requires_grad_()
    output = module(leaf)
    output.sum().backward()
    return [output, leaf.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_scripted_layer_is_saved_and_trains(name, dtype):
    make, shape = LAYERS[name]
    if name == "Net" and dtype == torch.bfloat16:
        pytest.skip("its sums are no integers that bfloat16 has")
    layer, input = exact(make, dtype), integers(*shape, dtype=dtype)
    expected = results(layer, input)  # also: a layer that was called before can be scripted
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for _ in range(3):  # TorchScript optimizes from the second run on
        for actual, value in zip(results(loaded, input), expected, strict=True):
            assert value.any()
            assert_equal(actual, value, "output or gradient")


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("window of 272", "unbatched")])
def test_the_scripted_layer_calls_the_operators(name):
    make, _ = LAYERS[name]
    graph = str(torch.jit.script(make()).inlined_graph)
    assert "lenet_ext::" in graph


@pytest.mark.parametrize("make", [lambda: layers.LinearReLU(5, 3), lambda: layers.Linear(5, 3)], ids=["relu", "linear"])
def test_dtypes_without_a_kernel_go_through_stock(make):
    layer, input = exact(make, torch.float16), integers(2, 5, dtype=torch.float16)
    assert_equal(torch.jit.script(layer)(input), layer(input), "output")
    image, convolution = integers(1, 2, 8, 9, dtype=torch.float16), exact(LAYERS["pool"][0], torch.float16)
    assert_equal(torch.jit.script(convolution)(image), convolution(image), "output")


def test_functions_that_call_ours():
    def function(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear_relu(input, weight), weight, torch.ones(3))

    input, weight = integers(2, 3), integers(3, 3)
    assert_equal(torch.jit.script(function)(input, weight), function(input, weight), "output")


def test_an_option_changed_before_scripting_counts():
    layer, input = exact(LAYERS["convolution"][0], torch.float32), integers(2, 2, 8, 9)
    layer.padding, layer.pool_kernel_size = (1, 2), 3
    assert_equal(torch.jit.script(layer)(input), layer(input), "output")
