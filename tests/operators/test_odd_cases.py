"""NaN, infinities, ties, signed zeros, dead windows, empty batches, windows in the padding: by equality with stock."""

from __future__ import annotations

import math
import os

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_equal, assert_exact, integers, run

from lenet_ext.functional import conv_relu_max_pool2d, linear, linear_relu

pytestmark = pytest.mark.kernels

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def _pool(values, device="cpu", dtype=torch.float32, grad=None, **options):
    """conv_relu_max_pool2d with a 1x1 kernel of weight 1: what the pool does to these values, and their gradient."""
    x = torch.tensor(values, dtype=dtype, device=device)[None, None]
    w = torch.ones(1, 1, 1, 1, dtype=dtype, device=device)
    grad_output = torch.ones_like if grad is None else torch.tensor(grad, dtype=dtype, device=device)[None, None]
    result = run(conv_relu_max_pool2d, [x, w, None], options, grad_output)
    stock = run(reference.conv_relu_max_pool2d, [x, w, None], options, grad_output)
    assert_equal(result.output, stock.output, "output")
    assert_equal(result.grads[0], stock.grads[0], "grad of input")
    assert_equal(result.grads[1], stock.grads[1], "grad of weight")
    return result.output[0, 0], result.grads[0][0, 0]


def _close(actual: torch.Tensor, expected) -> None:
    assert_equal(actual, torch.tensor(expected, dtype=actual.dtype), "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestOneWindow:
    def test_first_of_equals_wins(self, device, dtype):
        output, grad = _pool([[3.0, 5.0], [5.0, 5.0]], device, dtype)
        _close(output, [[5.0]])
        _close(grad, [[0.0, 1.0], [0.0, 0.0]])

    def test_row_before_column(self, device, dtype):
        _, grad = _pool([[0.0, 0.0, 7.0], [7.0, 0.0, 0.0], [7.0, 7.0, 7.0]], device, dtype, pool_kernel_size=3)
        _close(grad, [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])

    def test_nan_wins_and_passes_relu(self, device, dtype):
        output, grad = _pool([[9.0, NAN], [1.0, INF]], device, dtype)
        _close(output, [[NAN]])
        _close(grad, [[0.0, 1.0], [0.0, 0.0]])

    def test_last_nan_gets_the_gradient(self, device, dtype):
        output, grad = _pool([[NAN, 2.0], [NAN, 8.0]], device, dtype)
        _close(output, [[NAN]])
        _close(grad, [[0.0, 0.0], [1.0, 0.0]])

    def test_all_nan(self, device, dtype):
        _, grad = _pool([[NAN, NAN], [NAN, NAN]], device, dtype)
        _close(grad, [[0.0, 0.0], [0.0, 1.0]])

    def test_nan_among_negatives(self, device, dtype):
        output, grad = _pool([[-1.0, NAN], [-INF, -2.0]], device, dtype)
        _close(output, [[NAN]])
        _close(grad, [[0.0, 1.0], [0.0, 0.0]])

    def test_infinity(self, device, dtype):
        output, grad = _pool([[1.0, INF], [INF, -INF]], device, dtype)
        _close(output, [[INF]])
        _close(grad, [[0.0, 1.0], [0.0, 0.0]])

    def test_dead(self, device, dtype):
        output, grad = _pool([[-1.0, -INF], [-3.0, -2.0]], device, dtype)
        _close(output, [[0.0]])
        _close(grad, [[0.0, 0.0], [0.0, 0.0]])

    def test_gradient_of_relu_at_zero_is_zero(self, device, dtype):
        output, grad = _pool([[-1.0, 0.0], [0.0, -0.0]], device, dtype)
        _close(output, [[0.0]])
        _close(grad, [[0.0, 0.0], [0.0, 0.0]])

    def test_minus_zero(self, device, dtype):
        output, grad = _pool([[-0.0, -0.0], [-0.0, -0.0]], device, dtype)
        assert output.item() == 0
        _close(grad, [[0.0, 0.0], [0.0, 0.0]])

    def test_smallest_number_is_alive(self, device, dtype):
        """A subnormal is greater than 0: not flushed, and it has a gradient."""
        if dtype == torch.bfloat16:
            pytest.skip("the processor's bfloat16 instructions flush subnormals, in stock as well")
        smallest = 2.0**-140 if dtype == torch.float32 else 2.0**-1070
        x = torch.tensor([[0.0, smallest], [0.0, 0.0]], dtype=dtype, device=device)[None, None]
        w = torch.ones(1, 1, 1, 1, dtype=dtype, device=device)
        result = run(conv_relu_max_pool2d, [x, w, None], {}, torch.ones_like)
        assert result.output.item() == smallest
        _close(result.grads[0][0, 0].cpu(), [[0.0, 1.0], [0.0, 0.0]])

    def test_overlapping_windows_add_up(self, device, dtype):
        values = [[0.0, 1.0, 0.0], [1.0, 9.0, 1.0], [0.0, 1.0, 0.0]]
        _, grad = _pool(values, device, dtype, grad=[[1.0, 2.0], [4.0, 8.0]], pool_stride=1)
        _close(grad, [[0.0, 0.0, 0.0], [0.0, 15.0, 0.0], [0.0, 0.0, 0.0]])

    def test_gradient_of_a_dead_window_does_not_count(self, device, dtype):
        """Not even when it is NaN: ReLU's backward selects, it does not multiply."""
        _, grad = _pool([[-1.0, -2.0, 3.0, 1.0], [-1.0, -2.0, 2.0, 1.0]], device, dtype, grad=[[NAN, 5.0]])
        _close(grad, [[0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]])

    def test_non_finite_gradient_of_a_living_window(self, device, dtype):
        _, grad = _pool([[1.0, 2.0, 3.0, 1.0], [0.0, 1.0, 2.0, 1.0]], device, dtype, grad=[[INF, NAN]])
        assert grad[0, 1] == INF
        assert math.isnan(grad[0, 2])


def _sprinkled(t: torch.Tensor, values, count: int) -> torch.Tensor:
    flat = t.flatten()
    for value in values:
        flat[torch.randperm(flat.numel())[:count]] = value
    return flat.view(t.shape)


SHAPES = {
    "lenet 1": ((3, 1, 32, 32), (6, 1, 5, 5), {}),
    "lenet 2": ((3, 6, 14, 14), (16, 6, 5, 5), {}),
    "lenet 2, many": ((18, 6, 14, 14), (16, 6, 5, 5), {}),
    "3x3": ((2, 3, 17, 19), (18, 3, 3, 3), {}),
    "1x1": ((2, 3, 8, 8), (5, 3, 1, 1), {}),
    "overlapping": ((2, 3, 19, 18), (5, 3, 3, 3), {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}),
    "ceil": ((2, 3, 10, 9), (5, 3, 2, 2), {"pool_kernel_size": 2, "ceil_mode": True}),
    "strided": ((2, 4, 20, 21), (6, 2, 3, 3), {"stride": 2, "groups": 2}),
    "gaps between windows": ((2, 2, 20, 21), (6, 2, 3, 3), {"pool_stride": 3}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["input", "weight", "bias", "grad_output"])
@pytest.mark.parametrize("values", [(NAN,), (NAN, INF, -INF)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_conv_with_non_finite_values_is_stock(device, shape, values, where, dtype):
    """Forward and backward: 0 * inf and 0 * NaN of the positions that did not win are NaN in stock's gradients.

    Stock in float64 is the yardstick for bfloat16 as well, whose vendor kernels spread NaN.
    No padding here: whether stock multiplies padding with an infinite weight depends on the algorithm it picks.
    """
    if torch.device(device).type != "cpu" and where != "grad_output":
        pytest.skip("cuDNN's backward does not promise 0 * inf")
    if dtype == torch.bfloat16 and os.environ.get("LENET_EXT_ALGORITHM") == "vendor":
        pytest.skip("the vendor's bfloat16 convolution spreads NaN to outputs that no NaN reaches")
    image, weight, options = SHAPES[shape]
    tensors = {
        "input": integers(*image, low=-1, high=1, dtype=dtype),
        "weight": integers(*weight, low=-1, high=1, dtype=dtype),
        "bias": integers(weight[0], low=-1, high=1, dtype=dtype),
    }
    output = reference.conv_relu_max_pool2d(*tensors.values(), **options)
    tensors["grad_output"] = integers(*output.shape, low=-1, high=1, dtype=dtype)
    tensors[where] = _sprinkled(tensors[where], values, 1 if where != "input" else 2)
    x, w, b, grad_output = (t.to(device) for t in tensors.values())
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, [x, w, b], options, grad_output)


def test_nan_everywhere(device):
    """Not one number in the input: every winner is the last of its window, every gradient NaN as in stock."""
    x = torch.full((2, 3, 12, 12), NAN, device=device)
    w, b = integers(4, 3, 3, 3, device=device), integers(4, device=device)
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, [x, w, b], {}, torch.ones(2, 4, 5, 5))


def test_overflow_is_infinity(device):
    x, w = torch.full((1, 1, 4, 4), 3e38, device=device), torch.full((2, 1, 2, 2), 2.0, device=device)
    w[1] = -2.0
    output = conv_relu_max_pool2d(x, w, pool_kernel_size=3)
    _close(output.flatten().cpu(), [INF, 0.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["linear", "linear_relu"])
@pytest.mark.parametrize("where", ["input", "weight", "bias", "grad_output"])
@pytest.mark.parametrize("sizes", [(3, 5, 4), (1, 400, 120), (33, 84, 10), (64, 120, 84)], ids=str)
def test_linear_with_non_finite_values_is_stock(device, sizes, where, name, dtype):
    m, k, n = sizes
    tensors = {
        "input": integers(m, k, low=-1, high=1, dtype=dtype),
        "weight": integers(n, k, low=-1, high=1, dtype=dtype),
        "bias": integers(n, low=-1, high=1, dtype=dtype),
        "grad_output": integers(m, n, low=-1, high=1, dtype=dtype),
    }
    tensors[where] = _sprinkled(tensors[where], (NAN, INF, -INF), 1)
    x, w, b, g = (t.to(device) for t in tensors.values())
    ours = {"linear": linear, "linear_relu": linear_relu}[name]
    assert_exact(ours, getattr(reference, name), [x, w, b], {}, g)


def test_linear_relu_at_zero_and_nan(device):
    """ReLU's gradient at 0 is 0, at NaN it is the incoming one; that of a dead unit does not count, even if NaN."""
    x = torch.tensor([[1.0], [0.0], [-1.0], [NAN]], device=device)
    g = torch.tensor([[2.0], [3.0], [NAN], [5.0]], device=device)
    result = run(linear_relu, [x, torch.ones(1, 1, device=device), None], {}, g)
    _close(result.output.cpu(), [[1.0], [0.0], [0.0], [NAN]])
    _close(result.grads[0].cpu(), [[2.0], [0.0], [0.0], [5.0]])


@pytest.mark.parametrize("sizes", [(1, 1), (7, 7), (16, 16), (31, 5), (64, 33)], ids=str)
def test_relu_of_minus_zero(device, sizes):
    """-0.0 or 0.0, stock itself does not say; but no gradient."""
    x, w = torch.full((sizes[0], 1), -0.0, device=device), torch.ones(sizes[1], 1, device=device)
    result = run(linear_relu, [x, w, None], {}, torch.ones_like)
    assert bool((result.output == 0).all())
    assert not result.grads[0].any()


@pytest.mark.parametrize("bias", [-100.0, 0.0])
def test_nothing_alive(device, bias):
    """All outputs 0, and a gradient of exactly 0 for every parameter."""
    x, w = -torch.rand(5, 6, 14, 14, device=device), torch.rand(16, 6, 5, 5, device=device)
    b = torch.full((16,), bias, device=device)
    result = run(conv_relu_max_pool2d, [x, w, b], {}, torch.ones_like)
    for what, value in result.items():
        assert not value.any(), what
    assert [g.shape for g in result.grads] == [x.shape, w.shape, b.shape]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty_batch(device, layout, dtype):
    x = reference.LAYOUTS[layout](torch.empty(0, 6, 14, 14, dtype=dtype, device=device))
    w, b = torch.ones(16, 6, 5, 5, dtype=dtype, device=device), torch.ones(16, dtype=dtype, device=device)
    result = run(conv_relu_max_pool2d, [x, w, b], {}, torch.ones_like)
    assert result.output.shape == (0, 16, 5, 5)
    assert result.grads[0].shape == x.shape
    _zeros(result.grads[1:], [w, b])


@pytest.mark.parametrize("function", [linear, linear_relu], ids=["linear", "linear_relu"])
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3, 4)], ids=str)
def test_empty_batch_of_linear(device, function, leading):
    x, w, b = (torch.ones(s, device=device) for s in [(*leading, 5), (3, 5), (3,)])
    result = run(function, [x, w, b], {}, torch.ones_like)
    assert result.output.shape == (*leading, 3)
    assert result.grads[0].shape == x.shape
    _zeros(result.grads[1:], [w, b])


def _zeros(grads, tensors):
    for grad, tensor in zip(grads, tensors, strict=True):
        assert grad.shape == tensor.shape
        assert grad.dtype == tensor.dtype
        assert not grad.any()


@pytest.mark.parametrize("function", [linear, linear_relu], ids=["linear", "linear_relu"])
def test_linear_without_features(device, function):
    """A sum of nothing is 0, so the output is the bias. No outputs at all is fine as well."""
    b = torch.tensor([1.0, -1.0], device=device)
    output = function(torch.empty(3, 0, device=device), torch.empty(2, 0, device=device), b)
    assert_equal(output, (b.relu() if function is linear_relu else b).expand(3, 2), "output")
    result = run(
        function, [torch.ones(3, 4, device=device), torch.empty(0, 4, device=device), None], {}, torch.ones_like
    )
    assert result.output.shape == (3, 0)
    assert result.grads[1].shape == (0, 4)
    _zeros(result.grads[:1], [torch.ones(3, 4)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_entirely_in_the_padding(device, dtype):
    """Stock accepts these and gives -inf (the pool comes after ReLU); there is no winner, hence no gradient.

    Stock's own backward writes its gradient outside of the window here, so it is no yardstick for that.
    """
    options = {"pool_kernel_size": 2, "pool_padding": 1, "pool_dilation": 4}
    x, w, b = integers(1, 3, 3, 3, dtype=dtype), integers(4, 3, 1, 1, dtype=dtype), integers(4, dtype=dtype)
    expected = reference.conv_relu_max_pool2d(x, w, b, **options)
    assert bool((expected == -INF).all())
    tensors = [t.to(device) for t in (x, w, b)]
    assert_equal(conv_relu_max_pool2d(*tensors, **options), expected, "output")
    result = run(conv_relu_max_pool2d, tensors, options, torch.ones_like)
    assert_equal(result.output, expected, "output")
    _zeros(result.grads, tensors)


@given(
    size=st.integers(3, 6),
    kernel=st.integers(2, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(2, 6),
    ceil_mode=st.booleans(),
)
def test_windows_partly_in_the_padding(device, size, kernel, stride, dilation, ceil_mode):
    options = {
        "pool_kernel_size": kernel,
        "pool_stride": stride,
        "pool_padding": kernel // 2,
        "pool_dilation": dilation,
        "ceil_mode": ceil_mode,
    }
    if reference.pooled_size(size, kernel, stride, kernel // 2, dilation, ceil_mode) < 1:
        size = dilation * (kernel - 1) + 1
    x, w = integers(2, 2, size, size, device=device), integers(3, 2, 1, 1, device=device)
    expected = reference.conv_relu_max_pool2d(x, w, **options)
    assert_equal(conv_relu_max_pool2d(x, w, **options), expected, "inference")
    result = run(conv_relu_max_pool2d, [x, w, None], options, torch.ones_like)
    assert_equal(result.output, expected, "training")
    # The gradient from the windows spelled out: -inf in the padding never wins, the first maximum does.
    conv = torch.nn.functional.conv2d(x.cpu().double(), w.cpu().double()).requires_grad_()
    values = reference.windows(conv, **options)
    best, _ = values.max(-1)
    winner = torch.nn.functional.one_hot((values == best[..., None]).int().argmax(-1), values.shape[-1])
    (values * winner).nan_to_num(0, 0, 0).sum(-1)[best > 0].sum().backward()
    grad_x = torch.nn.grad.conv2d_input(x.shape, w.cpu().double(), conv.grad)
    assert_equal(result.grads[0], grad_x.float(), "grad of input")


def test_one_pixel(device):
    tensors = [integers(1, 1, 1, 1, low=1, device=device), integers(1, 1, 1, 1, low=1, device=device), None]
    assert_exact(
        conv_relu_max_pool2d, reference.conv_relu_max_pool2d, tensors, {"pool_kernel_size": 1}, torch.ones(1, 1, 1, 1)
    )


def test_input_narrower_than_the_kernel(device):
    """Only the padding makes it fit."""
    tensors = [integers(2, 2, 1, 2, device=device), integers(3, 2, 5, 5, device=device), integers(3, device=device)]
    options = {"padding": 4}
    output = reference.conv_relu_max_pool2d(*tensors, **options)
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, tensors, options, integers(*output.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("where", ["columns", "rows"])
def test_parts_of_the_kernel_that_meet_nothing_but_padding(device, where, layout, dtype):
    """Their weights have the gradient 0, which has to be written; oneDNN's bfloat16 kernels do not."""
    sizes = {"input": (36, 1), "weight": (5, 3), "output": (8, 1)}
    options = {"padding": (0, 1), "stride": (2, 3), "pool_kernel_size": (2, 1)}
    if where == "rows":
        sizes, options = ({name: value[::-1] for name, value in of.items()} for of in (sizes, options))
    x, w = (
        reference.LAYOUTS[layout](integers(*shape, dtype=dtype, device=device))
        for shape in [(3, 2, *sizes["input"]), (34, 2, *sizes["weight"])]
    )
    grad_output = integers(3, 34, *sizes["output"], dtype=dtype)
    for _ in range(4):
        # Memory that was just given back is the next to be handed out.
        junk = [torch.full(w.shape, NAN, dtype=dtype, device=device) for _ in range(9)]
        del junk
        assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, [x, w, None], options, grad_output)


def test_padding_wider_than_the_image(device):
    tensors = [integers(2, 2, 3, 3, device=device), integers(3, 2, 2, 2, device=device), integers(3, device=device)]
    options = {"padding": (9, 17), "stride": (2, 3)}
    output = reference.conv_relu_max_pool2d(*tensors, **options)
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, tensors, options, integers(*output.shape))
