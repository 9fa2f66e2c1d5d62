"""First and second derivatives, in both modes, against finite differences, in float64, away from every kink.

Of the operators, and of the Functions that spell their derivatives out (these have no forward mode).
"""

from __future__ import annotations

import pytest
import reference
import torch
from reference import clear_winners, distinct
from torch.autograd import gradcheck, gradgradcheck

from lenet_ext import Net, autograd, functional

FUNCTIONS = {"linear": autograd.LinearFunction.apply, "linear_relu": autograd.LinearReLUFunction.apply}
FORWARD_TOO = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}


def check(function, tensors, **options):
    """An operator's derivatives: reverse, forward, forward over reverse, and each of them under vmap."""
    assert gradcheck(function, tensors, **{**FORWARD_TOO, **options})
    assert gradgradcheck(
        function,
        tensors,
        fast_mode=options.get("fast_mode", False),
        gen_non_contig_grad_outputs=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


def convolution(input, weight, bias=None, **options):
    """The Function with the arguments of the functional call."""
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "pool_kernel_size": 2, "pool_stride": None}
    defaults |= {"pool_padding": 0, "pool_dilation": 1, "ceil_mode": False}
    normal = functional.normalize_options(*{**defaults, **options}.values(), tuple(weight.shape[2:]))
    output, _ = autograd.ConvReLUMaxPool2dFunction.apply(batched, weight, bias, *normal)
    return output if input.dim() == 4 else output.squeeze(0)


CONV_CASES = {
    "plain": ((2, 2, 7, 6), (3, 2, 3, 3), {}),
    "unbatched": ((2, 7, 6), (3, 2, 3, 3), {}),
    "strided and padded": ((1, 2, 7, 8), (2, 2, 3, 2), {"stride": (2, 1), "padding": (1, 1)}),
    "asymmetric": ((1, 2, 5, 6), (2, 2, 4, 2), {"padding": "same"}),
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

    # A window of more than 255 goes through stock, whose pooling has no batching rule for this last check.
    check(function, tensors, fast_mode=True, check_batched_forward_grad=name != "window of 272")
    assert gradcheck(function, tensors, fast_mode=False)


@pytest.mark.parametrize("name", [name for name in CONV_CASES if name != "window of 272"])
def test_the_function_of_conv_relu_max_pool2d(device, name):
    image, weight, options = CONV_CASES[name]
    tensors = _conv_operands(image, weight, device)

    def function(*arguments):
        return convolution(*arguments, **options)

    assert gradcheck(function, tensors, fast_mode=True, check_batched_grad=True)
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

    check(function, [tensors[i].clone().requires_grad_() for i in wanted], fast_mode=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("name", ["linear", "linear_relu"])
def test_linear_subsets(device, name, wanted):
    tensors = [distinct(*s, device=device) for s in [(3, 4), (5, 4), (5,)]]

    def function(*chosen):
        arguments = list(tensors)
        for i, tensor in zip(wanted, chosen, strict=True):
            arguments[i] = tensor
        return getattr(functional, name)(*arguments)

    check(function, [tensors[i].clone().requires_grad_() for i in wanted])


def test_conv_relu_max_pool2d_in_full():
    """The slow modes: every element, not a random projection."""
    tensors = _conv_operands((1, 2, 5, 4), (2, 2, 2, 2), "cpu")
    check(lambda *a: functional.conv_relu_max_pool2d(*a, padding=1), tensors)


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
    check(function, tensors)

    def spelled_out(*chosen):
        return FUNCTIONS[name](*chosen, *([] if bias else [None]))

    assert gradcheck(spelled_out, tensors, check_batched_grad=True)
    assert gradgradcheck(spelled_out, tensors, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize(
    "wanted", [tuple(range(10)), tuple(range(11)), (0,), (2, 5), (4, 9), (10,), (0, 1, 10)], ids=str
)
def test_the_network(wanted):
    """All parameters: one operator each way. Some of them, the second derivative, forward mode: the layers'. (10: the
    image.)
    """
    torch.manual_seed(1)
    net = Net(dtype=torch.float64)
    tensors = [*(p.detach() for p in net.parameters()), distinct(1, 1, 32, 32)]

    def function(*chosen):
        arguments = list(tensors)
        for i, tensor in zip(wanted, chosen, strict=True):
            arguments[i] = tensor
        return torch.ops.lenet_ext.lenet(arguments[10], arguments[:10])

    chosen = [tensors[i].clone().requires_grad_() for i in wanted]
    assert gradcheck(function, chosen, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, chosen, fast_mode=True, check_fwd_over_rev=True)


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


AVERAGE_CASES = {
    "plain": ((2, 2, 4, 6), {"kernel_size": 2}),
    "unbatched": ((2, 5, 4), {"kernel_size": 2}),
    "overlapping": ((1, 2, 5, 6), {"kernel_size": 3, "stride": (1, 2), "padding": 1, "count_include_pad": False}),
    "ceil, divisor": ((1, 2, 6, 5), {"kernel_size": (2, 3), "stride": 3, "ceil_mode": True, "divisor_override": 5}),
}


@pytest.mark.parametrize("name", AVERAGE_CASES)
def test_relu_avg_pool2d(device, name):
    shape, options = AVERAGE_CASES[name]
    check(lambda x: functional.relu_avg_pool2d(x, **options), [distinct(*shape, device=device).requires_grad_()])


def test_the_function_of_relu_avg_pool2d(device):
    x = distinct(1, 2, 5, 6, device=device).requires_grad_()

    def function(x):
        return autograd.ReLUAvgPool2dFunction.apply(x, (3, 2), (2, 1), (1, 1), False, True, None)

    assert gradcheck(function, x, check_batched_grad=True)
    assert gradgradcheck(function, x, gen_non_contig_grad_outputs=True)
