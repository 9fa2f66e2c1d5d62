"""relu_avg_pool2d against stock's composition: values and gradients to the last bit, every option, any strides."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import reference
import torch
from failures import failure, kind
from hypothesis import given
from hypothesis import strategies as st
from reference import LAYOUTS, assert_accurate, assert_equal, assert_exact, integers, run, to64

from lenet_ext import functional, nn, ops

pytestmark = pytest.mark.kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@dataclasses.dataclass(frozen=True)
class Case:
    input: tuple[int, ...]
    options: dict[str, Any]
    layouts: tuple[str, str]  # of input and grad_output
    seed: int


@st.composite
def cases(draw) -> Case:
    """Every case is one that stock accepts. Sizes and channels around the vector widths."""
    common = draw(st.booleans())  # 2x2, side by side, has kernels of its own
    kernel = (2, 2) if common else (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    stride = None if common else draw(st.one_of(st.none(), st.integers(1, 4), st.tuples(st.integers(1, 3), st.just(2))))
    padding = (0, 0) if common else tuple(draw(st.integers(0, k // 2)) for k in kernel)
    margin = st.one_of(st.integers(0, 9), st.sampled_from([14, 15, 30, 31, 32, 33, 66]))
    size = [max(1, k - 2 * p) + draw(margin) for k, p in zip(kernel, padding, strict=True)]
    channels = draw(st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33])))
    names = list(LAYOUTS)
    return Case(
        input=(*draw(st.sampled_from([(), (0,), (1,), (2,), (5,)])), channels, *size),
        options={
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "ceil_mode": draw(st.booleans()),
            "count_include_pad": draw(st.booleans()),
            "divisor_override": draw(st.one_of(st.none(), st.integers(1, 7))),
        },
        layouts=(draw(st.sampled_from(names)), draw(st.sampled_from([*names, "expanded"]))),
        seed=draw(st.integers(0, 2**16)),
    )


def _grad(case: Case, output: torch.Tensor) -> torch.Tensor:
    if case.layouts[1] == "expanded":  # what `output.sum().backward()` sends
        return torch.randn(*output.shape[:1], *[1] * (output.dim() - 1), dtype=output.dtype).expand(output.shape)
    return LAYOUTS[case.layouts[1]](torch.randn(output.shape, dtype=output.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(case=cases())
def test_equal_to_the_last_bit(device, dtype, case):
    torch.manual_seed(case.seed)
    input = LAYOUTS[case.layouts[0]](torch.randn(case.input, dtype=dtype).to(device))
    stock = reference.relu_avg_pool2d(input, **case.options)
    grad = _grad(case, stock.cpu())
    expected = run(reference.relu_avg_pool2d, [input], case.options, grad)
    actual = run(functional.relu_avg_pool2d, [input], case.options, grad)
    for (what, a), (_, e) in zip(actual.items(), expected.items(), strict=True):
        if device == "cpu":
            assert_equal(a, e, what)
        else:
            torch.testing.assert_close(a, e)
    with torch.no_grad():
        assert_equal(functional.relu_avg_pool2d(input, **case.options), actual.output, "output without gradients")


@given(case=cases())
def test_bfloat16_is_rounded_once(device, case):
    torch.manual_seed(case.seed)
    input = LAYOUTS[case.layouts[0]](torch.randn(case.input).to(device, torch.bfloat16))
    with torch.no_grad():
        grad = _grad(case, functional.relu_avg_pool2d(input, **case.options).cpu())
    actual = run(functional.relu_avg_pool2d, [input], case.options, grad)
    expected = run(reference.relu_avg_pool2d, to64([input]), case.options, grad.double())
    magnitude = run(reference.relu_avg_pool2d, to64([input]), case.options, grad.double().abs())
    for (what, a), (_, e), (_, m) in zip(actual.items(), expected.items(), magnitude.items(), strict=True):
        assert_accurate(a, e, m.abs(), what)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 28, 28), (2, 16, 10, 10), (1, 3, 7, 9), (3, 33, 5, 66)], ids=str)
def test_layers_of_real_nets_are_exact(device, shape, dtype, layout):
    """Quarters of small integers are exact in every dtype."""
    input = LAYOUTS[layout](integers(*shape, dtype=dtype, device=device))
    grad = integers(*shape[:2], shape[2] // 2, shape[3] // 2, dtype=dtype)
    assert_exact(functional.relu_avg_pool2d, reference.relu_avg_pool2d, [input], {"kernel_size": 2}, grad)


@pytest.mark.parametrize("options", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_infinities_and_signed_zeros(device, dtype, layout, options):
    """They reach the outputs and gradients that they reach in stock; so do the signs of zero."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1.0, -1.0], dtype=dtype)
    input = LAYOUTS[layout](values[torch.randint(0, 7, (3, 17, 12, 34))].to(device))
    stock = reference.relu_avg_pool2d(input, **options)
    grad = values[torch.randint(0, 7, stock.shape)]
    expected = run(reference.relu_avg_pool2d, [input], options, grad)
    actual = run(functional.relu_avg_pool2d, [input], options, grad)
    for (what, a), (_, e) in zip(actual.items(), expected.items(), strict=True):
        assert_equal(a, e, what)
        number = ~a.isnan()
        assert torch.equal(a.signbit() & number, e.signbit() & number), f"{what}: another sign of zero"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_is_laid_out_as_in_stock(device, layout):
    input = LAYOUTS[layout](torch.randn(2, 5, 8, 9, device=device)).requires_grad_()
    for options in ({"kernel_size": 2}, {"kernel_size": 3, "padding": 1}):
        ours = functional.relu_avg_pool2d(input, **options)
        assert ours.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
        assert ours.is_contiguous() == (layout != "channels_last")
        (grad,) = torch.autograd.grad(ours.sum(), input)
        assert grad.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_threads_do_not_change_results(device):
    input = torch.randn(9, 17, 32, 33, device=device)
    for make, options in itertools.product(
        (torch.Tensor.contiguous, LAYOUTS["channels_last"]), ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2})
    ):
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(functional.relu_avg_pool2d, [make(input)], options, torch.cos))
        for (what, one), (_, three) in zip(results[0].items(), results[1].items(), strict=True):
            assert_equal(one, three, what)


# No kernel for these on the CPU.
@pytest.mark.parametrize("dtype", [torch.float16, torch.int64], ids=str)
def test_dtypes_without_a_kernel_go_through_stock(dtype):
    input = integers(2, 3, 6, 7).to(dtype)
    options = {"kernel_size": 2, "stride": (2, 1), "padding": 1}
    expected = reference.relu_avg_pool2d(input, **options)
    assert_equal(functional.relu_avg_pool2d(input, **options), expected, "output")


# --- the ways to call it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((2,), {}),
        (((2, 3), None, (1, 1)), {}),
        (([3], [], [1]), {"ceil_mode": True}),
        ((3, (2, 1), 1, True, False, 5), {}),
        ((), {"kernel_size": 2, "stride": 1, "divisor_override": -3}),
    ],
    ids=str,
)
def test_arguments_in_all_their_forms(device, arguments, options):
    input = torch.randn(2, 3, 9, 8, device=device)
    expected = reference.relu_avg_pool2d(input, *arguments, **options)
    assert_equal(functional.relu_avg_pool2d(input, *arguments, **options), expected, "output")
    assert_equal(nn.ReLUAvgPool2d(*arguments, **options)(input), expected, "output of the layer")


def t(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


BAD = {  # a change to a good call, and what the message names
    "input 5-D": ({"input": t(1, 1, 1, 8, 8)}, "input"),
    "input without channels": ({"input": t(2, 0, 8, 8)}, "input"),
    "input empty in space": ({"input": t(2, 3, 0, 8)}, "input"),
    "input a list": ({"input": [1.0]}, "input"),
    "input complex": ({"input": t(2, 3, 8, 8, dtype=torch.complex64)}, None),
    "kernel_size 0": ({"kernel_size": 0}, "kernel_size"),
    "kernel_size negative": ({"kernel_size": (2, -1)}, "kernel_size"),
    "kernel_size too large": ({"kernel_size": 9}, "kernel_size"),
    "kernel_size of three": ({"kernel_size": (2, 2, 2)}, "kernel_size"),
    "kernel_size a float": ({"kernel_size": 2.0}, "kernel_size"),
    "kernel_size None": ({"kernel_size": None}, "kernel_size"),
    "stride 0": ({"stride": 0}, "stride"),
    "stride a string": ({"stride": "2"}, "stride"),
    "padding negative": ({"padding": -1}, "padding"),
    "padding too large": ({"padding": (0, 2)}, "padding"),
    "divisor_override 0": ({"divisor_override": 0}, "divisor_override"),
    "divisor_override a float": ({"divisor_override": 2.0}, "divisor_override"),
    "ceil_mode a number": ({"ceil_mode": 1}, "ceil_mode"),
    "count_include_pad None": ({"count_include_pad": None}, "count_include_pad"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_raise_what_stock_raises(name):
    change, named = BAD[name]
    call = {"input": t(2, 3, 8, 8), "kernel_size": 2, **change}
    ours, stock = failure(functional.relu_avg_pool2d, **call), failure(reference.relu_avg_pool2d, **call)
    assert stock is not None
    assert kind(ours) is kind(stock), f"{ours!r} where stock raises {stock!r}"
    assert named is None or named in str(ours)


@pytest.mark.parametrize("shape", [(), (8,), (8, 8)], ids=str)
def test_too_few_dimensions(shape):
    """Stock has an IndexError for these."""
    with pytest.raises(RuntimeError, match="relu_avg_pool2d: input must be"):
        functional.relu_avg_pool2d(t(*shape), 2)


def test_the_gradient_is_constant_in_the_input():
    input, grad = t(1, 3, 8, 8).requires_grad_(), t(1, 3, 4, 4)
    found = ops.relu_avg_pool2d_backward(grad, input, [2, 2], [2, 2], [0, 0], False, True, None)
    (second,) = torch.autograd.grad(found.sum(), input)
    assert torch.equal(second, torch.zeros_like(input))


def test_the_operator_rejects_what_the_function_does_not_let_through():
    options = ([2, 2], [2, 2], [0, 0], False, True, None)
    for arguments, named in [
        ((t(3, 8, 8), *options), "input must be 4-D"),
        ((t(1, 3, 8, 8), [2, 2], [2, 2], [2, 0], False, True, None), "padding"),
        ((t(1, 3, 8, 8), [2, 2], [2], [0, 0], False, True, None), "stride must have 2 elements"),
        ((t(1, 3, 8, 8), [2**31, 2], [2, 2], [0, 0], False, True, None), "kernel_size"),
    ]:
        with pytest.raises(RuntimeError, match=f"relu_avg_pool2d: {named}"):
            ops.relu_avg_pool2d(*arguments)
    for grad in (t(1, 3, 4, 5), t(1, 3, 4, 4, dtype=torch.float64), t(1, 3, 4, 4).to("meta")):
        with pytest.raises(RuntimeError, match="relu_avg_pool2d_backward"):
            ops.relu_avg_pool2d_backward(grad, t(1, 3, 8, 8), *options)
