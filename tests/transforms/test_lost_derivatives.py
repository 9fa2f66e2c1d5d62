"""The smallest inputs that once lost their derivative, often without a word, with values that one can check by hand."""

from __future__ import annotations

import io

import pytest
import torch
from reference import assert_equal
from torch import nn, ones, tensor
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import lenet_ext
from lenet_ext import functional as LF
from lenet_ext import nn as LN

INPUT, WEIGHT = tensor([[1.0, 2.0]]), tensor([[1.0, 1.0], [1.0, 0.0]])  # their product: [[3, 1]]
OF_WEIGHT, OF_INPUT = tensor([[1.0, 2.0], [1.0, 2.0]]), tensor([[2.0, 1.0]])
IMAGE, KERNEL = ones(1, 1, 3, 3), ones(1, 1, 2, 2)  # their convolution is 4 everywhere, and the first 4 wins


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, backend=backend, fullgraph=True)


# --- torch.compile over torch.func: zeros ---------------------------------------------------------------------------

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.extended)]
LINEAR = {"linear": LF.linear, "linear_relu": LF.linear_relu}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LINEAR)
def test_compiled_gradient_of_weight_and_input(name, backend):
    function = compiled(grad(lambda x, w: LINEAR[name](x, w).sum(), argnums=(0, 1)), backend)
    of_input, of_weight = function(INPUT, WEIGHT)
    assert_equal(of_weight, OF_WEIGHT, "gradient of weight")
    assert_equal(of_input, OF_INPUT, "gradient of input")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gradient_of_a_convolution(backend):
    function = compiled(grad(lambda x, w: LF.conv_relu_max_pool2d(x, w).sum(), argnums=(0, 1)), backend)
    of_image, of_kernel = function(IMAGE, KERNEL)
    assert_equal(of_kernel, ones(1, 1, 2, 2), "gradient of weight")
    assert_equal(of_image, tensor([[[[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]]]), "gradient of input")


@pytest.mark.parametrize("name", LINEAR)
def test_compiled_vjp_jacrev_hvp_and_vmap_of_grad(name):
    function = LINEAR[name]

    def squares(w):
        return function(INPUT, w).pow(2).sum()

    def pulled_back(w):
        return vjp(lambda w: function(INPUT, w), w)[1](ones(1, 2))[0]

    assert_equal(compiled(pulled_back)(WEIGHT), OF_WEIGHT, "vjp")
    jacobian = compiled(jacrev(lambda w: function(INPUT, w).flatten()))(WEIGHT)
    assert_equal(jacobian, tensor([[[1.0, 2], [0, 0]], [[0, 0], [1, 2]]]), "jacrev")
    # The squares' Hessian: 2 x x^T for each row of the weight.
    hvp = compiled(lambda w, v: jvp(grad(squares), (w,), (v,))[1])(WEIGHT, ones(2, 2))
    assert_equal(hvp, tensor([[6.0, 12], [6, 12]]), "hvp, forward over reverse")
    hvp = compiled(lambda w, v: grad(lambda w: (grad(squares)(w) * v).sum())(w))(WEIGHT, ones(2, 2))
    assert_equal(hvp, tensor([[6.0, 12], [6, 12]]), "hvp, reverse over reverse")
    per_sample = compiled(vmap(grad(lambda w, x: function(x, w).sum()), in_dims=(None, 0)))
    assert_equal(per_sample(WEIGHT, torch.stack([INPUT, 2 * INPUT])), torch.stack([OF_WEIGHT, 2 * OF_WEIGHT]), "vmap")


def test_compiled_vmap_of_a_convolution():
    output = compiled(vmap(LF.conv_relu_max_pool2d, in_dims=(0, None)))(torch.stack([IMAGE, -IMAGE]), KERNEL)
    assert_equal(output, tensor([4.0, 0.0]).view(2, 1, 1, 1, 1), "output")


@pytest.mark.parametrize("name", LINEAR)
def test_backward_through_a_compiled_vmap(name):
    weight = WEIGHT.clone().requires_grad_()
    compiled(vmap(LINEAR[name], in_dims=(0, None)))(torch.stack([INPUT, INPUT]), weight).sum().backward()
    assert_equal(weight.grad, 2 * OF_WEIGHT, "gradient of weight")


# --- graphs that did not train: None --------------------------------------------------------------------------------


def small_models():
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        stock[0].weight.copy_(WEIGHT), stock[0].bias.zero_(), stock[2].weight.copy_(tensor([[1.0, -1.0]]))
    return lenet_ext.fuse(stock), stock


GRAPHS = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "run_decompositions": lambda model, x: torch.export.export(model, (x,)).run_decompositions().module(),
    "jit.trace": lambda model, x: saved_and_loaded(torch.jit.trace(model, x)),
}


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize("how", GRAPHS)
def test_a_graph_of_a_fused_model_trains(how):
    for model in small_models():
        graph = GRAPHS[how](model, INPUT)
        graph(INPUT).sum().backward()
        grads = [parameter.grad for parameter in graph.parameters()]
        expected = [tensor([[1.0, 2], [-1, -2]]), tensor([1.0, -1]), tensor([[3.0, 1]]), ones(1)]
        for actual, value in zip(grads, expected, strict=True):
            assert_equal(actual, value, "gradient")


def test_a_graph_of_make_fx_trains():
    weight = WEIGHT.clone().requires_grad_()
    make_fx(lambda x, w: LF.linear_relu(x, w))(INPUT, WEIGHT)(INPUT, weight).sum().backward()
    assert_equal(weight.grad, OF_WEIGHT, "gradient of weight")
    kernel = KERNEL.clone().requires_grad_()
    make_fx(lambda x, w: LF.conv_relu_max_pool2d(x, w))(IMAGE, KERNEL)(IMAGE, kernel).sum().backward()
    assert_equal(kernel.grad, ones(1, 1, 2, 2), "gradient of weight")


LAYERS = {
    "Linear": (lambda: LN.Linear(2, 2), ones(1, 2)),
    "LinearReLU": (lambda: LN.LinearReLU(2, 2), ones(1, 2)),
    "ConvReLUMaxPool2d": (lambda: LN.ConvReLUMaxPool2d(1, 2, 3, padding="same"), ones(1, 1, 4, 4)),
    "Net": (lenet_ext.Net, ones(1, 1, 32, 32)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_layer_is_saved_and_trains(name):
    """With trainable parameters: the trace was refused as not repeatable, and could not be saved."""
    make, input = LAYERS[name]
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.abs_()  # so that nothing is dead
    loaded = saved_and_loaded(torch.jit.trace(layer, input))
    loaded(input).sum().backward()
    layer(input).sum().backward()
    for (key, parameter), other in zip(layer.named_parameters(), loaded.parameters(), strict=True):
        assert parameter.grad.any()
        torch.testing.assert_close(other.grad, parameter.grad, msg=key)
