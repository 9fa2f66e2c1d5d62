"""The two convolutions of LeNet, which have kernels of their own: what general shapes are tested for elsewhere."""

from __future__ import annotations

import pytest
import reference
import torch
from reference import assert_accurate, assert_equal, assert_exact, integers, run, to64

from lenet_ext.functional import conv_relu_max_pool2d

pytestmark = pytest.mark.kernels

LAYERS = {
    "conv1": ((1, 32, 32), (6, 1, 5, 5)),
    "conv1 of colours": ((3, 32, 32), (6, 3, 5, 5)),
    "conv2": ((6, 14, 14), (16, 6, 5, 5)),
}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch", [1, 4, 33, 130])
@pytest.mark.parametrize("layer", LAYERS)
def test_random_values_are_as_accurate_as_stock(layer, batch, has_bias):
    image, shape = LAYERS[layer]
    tensors = [torch.randn(batch, *image), torch.randn(shape), torch.randn(shape[0]) if has_bias else None]
    output = reference.conv_relu_max_pool2d(*to64(tensors))
    grad_output = torch.randn(output.shape) * reference.clear_winners(tensors, {}, gap=1e-4)
    results = [
        run(conv_relu_max_pool2d, tensors, {}, grad_output),
        run(reference.conv_relu_max_pool2d, tensors, {}, grad_output),
        run(reference.conv_relu_max_pool2d, to64(tensors), {}, grad_output),
        reference.magnitudes(tensors, {}, grad_output),
    ]
    for (what, a), (_, s), (_, e), (_, m) in zip(*(r.items() for r in results), strict=True):
        if e is not None:
            assert_accurate(a, e, m, what, stock=s)


@pytest.mark.parametrize("batch", [1, 35])
@pytest.mark.parametrize("where", ["input", "weight", "bias", "grad_output"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("layer", LAYERS)
def test_non_finite_values(layer, value, where, batch):
    image, shape = LAYERS[layer]
    operands = {"input": integers(batch, *image), "weight": integers(*shape), "bias": integers(shape[0])}
    size = (image[1] - 4) // 2
    operands["grad_output"] = integers(batch, shape[0], size, size)
    # One at the border of the first image, one further on.
    target = operands[where]
    target.view(-1)[1] = value
    target.view(-1)[target.numel() * 2 // 3] = value
    *tensors, grad_output = operands.values()
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, tensors, {}, grad_output)


@pytest.mark.parametrize("layer", LAYERS)
def test_dead_windows(layer):
    """Whole images and single channels below zero: the sparse backward pass has no winner to go to."""
    image, shape = LAYERS[layer]
    x, w, b = integers(9, *image), integers(*shape), integers(shape[0])
    b[::2] = -1000
    x[3] = 0
    w[1] = 0
    output = reference.conv_relu_max_pool2d(x, w, b)
    assert (output == 0).float().mean() > 0.4
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, [x, w, b], {}, integers(*output.shape))


@pytest.mark.parametrize("layout", reference.LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layouts(layer, layout):
    image, shape = LAYERS[layer]
    size = (image[1] - 4) // 2
    shapes = [(18, *image), shape, (18, shape[0], size, size)]
    x, w, grad_output = (reference.LAYOUTS[layout](integers(*s)) for s in shapes)
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, [x, w, integers(shape[0])], {}, grad_output)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1), (2,)], ids=str)
@pytest.mark.parametrize("batch", [1, 18])
@pytest.mark.parametrize("layer", LAYERS)
def test_some_gradients_only(layer, batch, wanted):
    image, shape = LAYERS[layer]
    tensors = [integers(batch, *image), integers(*shape), integers(shape[0])]
    found = []
    for function in (conv_relu_max_pool2d, reference.conv_relu_max_pool2d):
        leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(tensors)]
        output = function(*leaves)
        torch.manual_seed(0)
        found.append(torch.autograd.grad(output, [leaves[i] for i in wanted], integers(*output.shape)))
    for number, ours, expected in zip(wanted, *found, strict=True):
        assert_equal(ours, expected, f"gradient {number}")


@pytest.mark.parametrize(
    "options",
    [
        *({name: value} for name in ("stride", "dilation", "pool_dilation") for value in [(1, 2), (2, 1)]),
        *({name: value} for name in ("padding", "pool_padding") for value in [(0, 1), (1, 0)]),
        *({name: value} for name in ("pool_kernel_size", "pool_stride") for value in [(2, 3), (3, 2)]),
        {"groups": 2},
        {"padding": "same"},
    ],
    ids=str,
)
def test_nearly_a_layer_of_lenet(options):
    """An option that differs, and these kernels would be wrong."""
    options = {"pool_kernel_size": 2, "pool_stride": 2, **options}
    x, w, b = integers(5, 6, 14, 14), integers(16, 6 // options.get("groups", 1), 5, 5), integers(16)
    output = reference.conv_relu_max_pool2d(x, w, b, **options)
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, [x, w, b], options, integers(*output.shape))


@pytest.mark.parametrize("codes", ["valid", "any"])
@pytest.mark.parametrize("layer", LAYERS)
def test_backward_of_made_up_codes(layer, codes):
    """The backward operator believes any codes it is given, as its float64 kernel does."""
    image, shape = LAYERS[layer]
    size = (image[1] - 4) // 2
    options = ([1, 1], [0] * 4, [1, 1], 1, [2, 2], [2, 2], [0, 0], [1, 1])
    indices = torch.randint(4 if codes == "valid" else 256, (21, shape[0], size, size)).byte()
    x, w, grad = integers(21, *image), integers(*shape), integers(21, shape[0], size, size)
    backward = torch.ops.lenet_ext.conv_relu_max_pool2d_backward
    ours = backward(grad, indices, x, w, x.shape, w.shape, *options, [True] * 3)
    expected = backward(grad.double(), indices, x.double(), w.double(), x.shape, w.shape, *options, [True] * 3)
    for what, a, e in zip(("input", "weight", "bias"), ours, expected, strict=True):
        assert_equal(a, e.float(), f"grad of {what}")
