"""What a GPU would trace, without one: tensors that say they are on `cuda` and have no data.

No tensor here requires a gradient: without a CUDA build of PyTorch, its autograd engine refuses the device (stock's
operations, too). Whether the operators' nodes are right does not depend on the device; which way a call takes does.
"""

from __future__ import annotations

import pytest
import torch
from subjects import SUBJECTS, subject
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lenet_ext import functional


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def on_cuda(name, mode):
    ours, _, input = subject(name)
    with mode:
        for module in ours.modules():
            for key, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, device="cuda")
                setattr(module, key, nn.Parameter(fake, requires_grad=False))
        return ours, torch.empty(input.shape, device="cuda")


def assert_like(output, name):
    ours, _, input = subject(name)
    expected = ours(input)
    assert output.device.type == "cuda"
    assert (output.shape, output.stride(), output.dtype) == (expected.shape, expected.stride(), expected.dtype)


def targets(graph):
    return [str(node.target) for node in graph.nodes if str(node.target).startswith("lenet_ext.")]


@pytest.mark.parametrize("name", SUBJECTS)
def test_call(name):
    mode = FakeTensorMode()
    module, input = on_cuda(name, mode)
    with mode:
        output = module(input)
    assert_like(output, name)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SUBJECTS)
def test_compile(name, dynamic):
    """fullgraph: what asks whether the package was built with CUDA has to be outside of what is traced."""
    mode = FakeTensorMode()
    module, input = on_cuda(name, mode)
    with mode:
        output = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")(input)
    assert_like(output, name)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.extended)])
@pytest.mark.parametrize("name", SUBJECTS)
def test_export(name, strict):
    module, input = on_cuda(name, FakeTensorMode())
    program = torch.export.export(module, (input,), strict=strict)
    assert targets(program.graph)
    assert targets(program.run_decompositions().graph) == targets(program.graph)


@pytest.mark.parametrize("name", SUBJECTS)
def test_make_fx(name):
    mode = FakeTensorMode()
    module, input = on_cuda(name, mode)
    with mode:
        assert targets(make_fx(module)(input).graph)


def test_the_function_of_the_report():
    """torch.compile(fullgraph=True) of every function failed on CUDA, and no machine without a GPU could show it."""
    with FakeTensorMode():
        input, weight = torch.empty(2, 3, device="cuda"), torch.empty(4, 3, device="cuda")
        image, kernel = torch.empty(2, 1, 8, 8, device="cuda"), torch.empty(4, 1, 3, 3, device="cuda")
        for function in (functional.linear, functional.linear_relu):
            assert torch.compile(function, fullgraph=True, backend="eager")(input, weight).shape == (2, 4)
        function = torch.compile(functional.conv_relu_max_pool2d, fullgraph=True, backend="eager")
        assert function(image, kernel).shape == (2, 4, 3, 3)
