"""What the graph keeps alive for the backward pass: only what a wanted gradient needs, and never more than stock."""

from __future__ import annotations

import itertools
import weakref

import pytest
import reference
import torch
from reference import assert_equal
from torch import ones

from lenet_ext import Net, ReferenceNet, autograd, functional

NAMES = ["conv_relu_max_pool2d", "linear", "linear_relu"]
SHAPES = {
    "conv_relu_max_pool2d": [(2, 3, 9, 9), (4, 3, 3, 3), (4,)],
    "linear": [(5, 7), (3, 7), (3,)],
    "linear_relu": [(5, 7), (3, 7), (3,)],
}
FUNCTIONS = {
    "conv_relu_max_pool2d": lambda *t: autograd.ConvReLUMaxPool2dFunction.apply(
        *t, [1, 1], [0, 0, 0, 0], [1, 1], 1, [2, 2], [2, 2], [0, 0], [1, 1], False
    ),
    "linear": autograd.LinearFunction.apply,
    "linear_relu": autograd.LinearReLUFunction.apply,
}
MASKS = [mask for mask in itertools.product((False, True), repeat=3) if any(mask)]


def kept(call) -> list[torch.Tensor]:
    """The tensors that a call saves."""
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        tensors.append(call())  # the output, whose storage may be a saved one, must live as long as they do
    return tensors[:-1]


def size(tensors) -> int:
    """In bytes, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def operands(name, mask):
    shapes = SHAPES[name]
    tensors = [torch.randn(shape) for shape in shapes]
    return [t.requires_grad_(wanted) for t, wanted in zip(tensors, mask, strict=True)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_never_more_than_stock(name, mask):
    tensors = operands(name, mask)
    ours = kept(lambda: getattr(functional, name)(*tensors))
    assert size(ours) <= size(kept(lambda: getattr(reference, name)(*tensors)))
    assert size(kept(lambda: FUNCTIONS[name](*tensors))) == size(ours), "the Function keeps what the node keeps"


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_needed(name, mask):
    """Input for the gradient of weight, weight for that of input, one byte an output or the output for what is dead."""
    tensors = operands(name, mask)
    output = getattr(functional, name)(*tensors)
    needed = tensors[0].nbytes * mask[1] + tensors[1].nbytes * mask[0]
    needed += {"conv_relu_max_pool2d": output.numel(), "linear": 0, "linear_relu": output.nbytes}[name]
    assert size(kept(lambda: getattr(functional, name)(*tensors))) == needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_network(dtype):
    """Part of the parameters, and the image, with and without a gradient."""
    torch.manual_seed(0)
    ours, stock = Net(dtype=dtype), ReferenceNet(dtype=dtype)
    names = [name for name, _ in ours.named_parameters()]
    choices = [set(names), set(names[-2:]), set(names[:2]), {"fc1.bias"}, {"conv2.weight"}, set(names[::2]), set()]
    choices += [set(names) - {name} for name in names]
    for wanted, image_wanted in itertools.product(choices, (False, True)):
        image = torch.randn(3, 1, 32, 32, dtype=dtype).requires_grad_(image_wanted)
        sizes = []
        for net in (ours, stock):
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(name in wanted)
            sizes.append(size(kept(lambda net=net, image=image: net(image))))
        assert sizes[0] <= sizes[1], (wanted, image_wanted)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_without_a_gradient(name):
    tensors = operands(name, (True, True, True))
    with torch.no_grad():
        assert kept(lambda: getattr(functional, name)(*tensors)) == []
    assert kept(lambda: getattr(functional, name)(*operands(name, (False, False, False)))) == []


def test_a_graph_that_is_gone_keeps_nothing():
    """After backward without retain_graph, the tensors saved are let go, though the output lives on."""
    for name in NAMES:
        input, weight, _ = operands(name, (False, True, False))
        output = getattr(functional, name)(input, weight)
        kept_input = weakref.ref(input)
        del input
        assert kept_input() is not None
        output.sum().backward()
        assert kept_input() is None, name


# --- saved for nothing: what stock allows raised an error ------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "linear_relu"])
def test_a_step_between_two_backward_passes(name):
    """The weight may change: only the gradient of input, which nobody wants, needs it."""
    weight = ones(3, 4, requires_grad=True)
    output = getattr(functional, name)(ones(2, 4), weight)
    output[:, 0].sum().backward(retain_graph=True)
    with torch.no_grad():
        weight -= 0.1 * weight.grad
    output[:, 1].sum().backward()
    assert weight.grad.sum() == 16


def test_a_step_between_two_backward_passes_of_a_convolution():
    weight = ones(2, 1, 2, 2, requires_grad=True)
    output = functional.conv_relu_max_pool2d(ones(1, 1, 3, 3), weight)
    output[:, 0].sum().backward(retain_graph=True)
    with torch.no_grad():
        weight -= 0.1 * weight.grad
    output[:, 1].sum().backward()
    assert_equal(weight.grad, ones(2, 1, 2, 2), "gradient of weight")


@pytest.mark.parametrize("name", NAMES)
def test_an_input_changed_behind_a_frozen_weight(name):
    shapes = SHAPES[name]
    hidden, weight, bias = ones(shapes[0]), ones(shapes[1]), ones(shapes[2], requires_grad=True)
    scale = ones((), requires_grad=True)
    hidden = hidden * scale
    output = getattr(functional, name)(hidden, weight, bias)
    hidden += 1
    output.sum().backward()
    assert scale.grad > 0
    assert bias.grad.all()


def test_an_input_of_inference_mode():
    with torch.inference_mode():
        input = ones(2, 4)
    for function in (functional.linear, functional.linear_relu):
        bias = torch.zeros(3, requires_grad=True)
        function(input, ones(3, 4), bias).sum().backward()
        assert_equal(bias.grad, torch.full((3,), 2.0), "gradient of bias")
    with torch.inference_mode():
        image = ones(1, 1, 3, 3)
    bias = torch.zeros(1, requires_grad=True)
    functional.conv_relu_max_pool2d(image, ones(1, 1, 2, 2), bias).sum().backward()
    assert_equal(bias.grad, ones(1), "gradient of bias")


@pytest.mark.parametrize("name", NAMES)
def test_an_input_of_inference_mode_that_is_needed_is_refused(name):
    """As in stock: it cannot be saved."""
    with torch.inference_mode():
        input = ones(SHAPES[name][0])
    for module in (functional, reference):
        with pytest.raises(RuntimeError, match=r"[Ii]nference tensors cannot be saved"):
            getattr(module, name)(input, ones(SHAPES[name][1], requires_grad=True))
