"""First and second derivatives against finite differences, in float64, away from every kink."""

from __future__ import annotations

import pytest
import reference
import torch
from reference import clear_winners, distinct
from torch.autograd import gradcheck, gradgradcheck

from lenet_ext import functional

CONV_CASES = {
    "plain": ((2, 2, 7, 6), (3, 2, 3, 3), {}),
    "unbatched": ((2, 7, 6), (3, 2, 3, 3), {}),
    "strided and padded": ((1, 2, 7, 8), (2, 2, 3, 2), {"stride": (2, 1), "padding": (1, 1)}),
    "same, dilated": ((1, 2, 6, 5), (2, 2, 2, 3), {"padding": "same", "dilation": (2, 1)}),
    "groups": ((2, 4, 5, 5), (6, 2, 2, 2), {"groups": 2}),
    "depthwise": ((1, 3, 6, 6), (6, 1, 3, 3), {"groups": 3, "padding": 1}),
    "overlapping pool": ((1, 2, 8, 7), (2, 2, 2, 2), {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}),
    "ceil, dilated pool": (
        (1, 1, 8, 9),
        (2, 1, 2, 2),
        {"pool_kernel_size": 2, "pool_stride": (1, 3), "pool_dilation": (2, 1), "ceil_mode": True},
    ),
    "pool of one": ((1, 2, 4, 4), (2, 2, 2, 2), {"pool_kernel_size": 1}),
    "window of 272": ((1, 1, 18, 17), (1, 1, 2, 1), {"pool_kernel_size": (17, 16), "pool_stride": 1}),
}


def _conv_operands(input, weight, device):
    """Distinct values, scaled so that the convolution's values lie far apart, with dead and living windows."""
    x = distinct(*input, device=device)
    w = distinct(*weight, device=device)
    b = distinct(weight[0], device=device) * 0.5
    return [t.requires_grad_() for t in (x, w, b)]


@pytest.mark.parametrize("name", CONV_CASES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_conv_relu_max_pool2d(device, name, bias):
    image, weight, options = CONV_CASES[name]
    tensors = _conv_operands(image, weight, device)[: 3 if bias else 2]
    operands = [*tensors, *([] if bias else [None])]
    # A perturbation of 1e-6 must not change a winner: the check would then compare two different functions.
    assert clear_winners(operands, options, gap=2e-5).all(), "the test's operands lie on a kink"
    output = functional.conv_relu_max_pool2d(*operands, **options)
    assert bool((output > 0).any()), "nothing alive, nothing checked"

    def function(*arguments):
        return functional.conv_relu_max_pool2d(*arguments, **options)

    assert gradcheck(function, tensors, fast_mode=False)
    assert gradgradcheck(function, tensors, fast_mode=True, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_conv_relu_max_pool2d_subsets(device, wanted):
    """The second derivative when only some arguments need one: each has its own path."""
    tensors = [t.detach() for t in _conv_operands((2, 2, 7, 6), (3, 2, 3, 3), device)]

    def function(*chosen):
        arguments = list(tensors)
        for i, tensor in zip(wanted, chosen, strict=True):
            arguments[i] = tensor
        return functional.conv_relu_max_pool2d(*arguments)

    chosen = [tensors[i].clone().requires_grad_() for i in wanted]
    assert gradcheck(function, chosen, fast_mode=True)
    assert gradgradcheck(function, chosen, fast_mode=True)


def test_conv_relu_max_pool2d_in_full():
    """gradgradcheck's slow mode: every element, not a random projection."""
    tensors = _conv_operands((1, 2, 5, 4), (2, 2, 2, 2), "cpu")
    assert gradgradcheck(lambda *a: functional.conv_relu_max_pool2d(*a, padding=1), tensors, fast_mode=False)


def test_third_derivative():
    """f(x w + b)**3 has one; it passes through the backward of the backward of the backward."""
    x, w, b = _conv_operands((1, 1, 4, 4), (1, 1, 2, 2), "cpu")

    def third(function):
        grad = torch.ones((), dtype=torch.float64)
        value = function(x, w, b).pow(3).sum()
        for _ in range(3):
            gx, gw, gb = torch.autograd.grad(value, (x, w, b), grad, create_graph=True)
            value = (gx.sin().sum() + gw.cos().sum() + gb.pow(2).sum()) * 0.1
        return value, gx, gw, gb

    for actual, expected in zip(
        third(functional.conv_relu_max_pool2d), third(reference.conv_relu_max_pool2d), strict=True
    ):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "linear_relu"])
@pytest.mark.parametrize("leading", [(3,), (), (2, 2), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear(device, name, leading, bias):
    tensors = [distinct(*s, device=device).requires_grad_() for s in [(*leading, 4), (5, 4), (5,)]]
    tensors = tensors[: 3 if bias else 2]
    before = torch.nn.functional.linear(*tensors)
    assert bool((before.abs() > 1e-4).all()), "the test's operands lie on a kink"
    function = getattr(functional, name)
    if name == "linear_relu":
        assert bool((before > 0).any())
        assert bool((before < 0).any())
    assert gradcheck(function, tensors, fast_mode=False)
    assert gradgradcheck(function, tensors, gen_non_contig_grad_outputs=True)


def test_gradcheck_would_notice():
    """The checks above are able to fail: a gradient off by half a percent is refused."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0] * 2.01

    with pytest.raises(RuntimeError):
        gradcheck(Wrong.apply, [distinct(4).requires_grad_()])
