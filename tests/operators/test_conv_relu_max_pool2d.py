"""conv_relu_max_pool2d against the stock composition in float64: values and gradients, all arguments, any strides."""

from __future__ import annotations

import os

import pytest
import reference
import torch
from hypothesis import given
from reference import assert_accurate, assert_equal, assert_exact, integers, run, to64
from strategies import ConvCase, conv_cases

from lenet_ext.functional import conv_relu_max_pool2d

pytestmark = pytest.mark.kernels


def _uniform(*shape, dtype, device="cpu"):
    return (torch.rand(shape, dtype=torch.float64) * 2 - 1).to(device, dtype)


def _signs(*shape, dtype, device="cpu"):
    return integers(*shape, low=-1, high=1, dtype=dtype, device=device)


@given(case=conv_cases(dtypes=(torch.float32, torch.float64, torch.bfloat16)))
def test_small_integers_are_exact(device, case: ConvCase):
    """No rounding anywhere, ties everywhere: output and gradients equal, the winner of each tie included."""
    tensors = case.operands(_signs, device)
    output = conv_relu_max_pool2d(*tensors, **case.options)
    grad_output = case.grad_output(output, _signs).to(device)
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, tensors, case.options, grad_output)


@given(case=conv_cases(dtypes=(torch.float32, torch.float64)))
def test_random_values_are_as_accurate_as_stock(device, case: ConvCase):
    tensors = case.operands(_uniform, device)
    stock_output = reference.conv_relu_max_pool2d(*to64(tensors), **case.options)
    grad_output = case.grad_output(stock_output, _uniform)
    # 1e-4 is far above float32's rounding of these sums and far below the distance of most values.
    grad_output = grad_output * reference.clear_winners(tensors, case.options, gap=1e-4)
    # Equal terms ("expanded") all round the same way, and that adds up; test_small_integers_are_exact sends them.
    grad_output = grad_output * torch.rand(grad_output.shape, dtype=case.dtype)
    actual = run(conv_relu_max_pool2d, tensors, case.options, grad_output)
    stock = run(reference.conv_relu_max_pool2d, tensors, case.options, grad_output)
    expected = run(reference.conv_relu_max_pool2d, to64(tensors), case.options, grad_output)
    magnitude = reference.magnitudes(tensors, case.options, grad_output)
    for (what, a), (_, s), (_, e), (_, m) in zip(
        actual.items(), stock.items(), expected.items(), magnitude.items(), strict=True
    ):
        if e is None:
            assert a is None, what
        else:
            assert a.dtype == case.dtype
            assert_accurate(a, e, m, what, stock=s)


@given(case=conv_cases(dtypes=(torch.bfloat16,)))
def test_bfloat16_rounds_once(device, case: ConvCase):
    """Sums in float32, one rounding at the end, or whatever the vendor's library does where the work is its own."""
    tensors = case.operands(_uniform, device)
    options = case.options
    expected = run(reference.conv_relu_max_pool2d, to64(tensors), options, torch.zeros_like)
    # Algorithms that round the convolution to bfloat16 before the pool have ties where there were none: only winners
    # ahead by more than that rounding get a gradient. The largest sums here are below 64, bfloat16 has 8 bits.
    clear = reference.clear_winners(tensors, options, gap=0.5)
    grad_output = case.grad_output(expected.output, _uniform) * clear
    actual = run(conv_relu_max_pool2d, tensors, options, grad_output)
    stock = run(reference.conv_relu_max_pool2d, tensors, options, grad_output)
    expected = run(reference.conv_relu_max_pool2d, to64(tensors), options, grad_output)
    magnitude = reference.magnitudes(tensors, options, grad_output)
    ours_alone = os.environ.get("LENET_EXT_ALGORITHM") == "direct"
    for (what, a), (_, s), (_, e), (_, m) in zip(
        actual.items(), stock.items(), expected.items(), magnitude.items(), strict=True
    ):
        if e is not None:
            assert a.dtype == torch.bfloat16
            # oneDNN leaves gradients unwritten of weights that meet nothing but padding.
            useless = ours_alone or not bool(s.isfinite().all())
            assert_accurate(a, e, m, what, stock=None if useless else s)


LENET = [((1, 32, 32), (6, 1, 5, 5)), ((6, 14, 14), (16, 6, 5, 5))]
WIDER = [
    ((3, 32, 32), (32, 3, 3, 3), {"padding": 1}),
    ((64, 12, 12), (64, 64, 3, 3), {"padding": 1}),
    (
        (3, 64, 64),
        (24, 3, 7, 7),
        {"stride": 2, "padding": 3, "pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1},
    ),
    ((8, 17, 13), (8, 1, 3, 3), {"groups": 8}),
    ((8, 31, 29), (16, 8, 3, 5), {"dilation": (2, 1), "pool_kernel_size": (3, 1), "ceil_mode": True}),
]
SHAPES = [(batch, *layer, {}) for layer in LENET for batch in (1, 5, 16, 37)] + [(2, *layer) for layer in WIDER]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": (9, 1)},  # whole bands' windows begin in the padding
        {"stride": (1, 2), "pool_kernel_size": 3, "pool_stride": (2, 1), "pool_padding": 1},
        {"pool_kernel_size": 1, "pool_stride": (5, 1)},  # image rows between the bands that no window reaches
    ],
    ids=str,
)
def test_bands_of_an_image(device, options, layout, dtype):
    """Of few, large images the backward pass takes bands of rows, which add to each other's rows at their borders."""
    x = reference.LAYOUTS[layout](_signs(1, 4, 150, 40, dtype=dtype, device=device))
    w, b = _signs(32, 4, 3, 3, dtype=dtype, device=device), _signs(32, dtype=dtype, device=device)
    output = reference.conv_relu_max_pool2d(x.cpu(), w.cpu(), b.cpu(), **options)
    # Few and small gradients: bfloat16 has eight bits for the sum over all positions.
    grad_output = _signs(*output.shape, dtype=dtype) * (torch.rand(output.shape) < 0.02)
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, [x, w, b], options, grad_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("batch", "image", "weight", "options"), SHAPES, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else ""
)
def test_layers_of_real_nets_are_exact(device, batch, image, weight, options, layout, dtype):
    """The shapes the kernels are tuned for, at batch sizes around the blocks they cut batches into."""
    x = reference.LAYOUTS[layout](_signs(batch, *image, dtype=dtype, device=device))
    w, b = _signs(*weight, dtype=dtype, device=device), _signs(weight[0], dtype=dtype, device=device)
    if dtype == torch.bfloat16 and w[0].numel() >= 255:
        w = w * (torch.rand(w.shape, device=device) < 0.25)  # sums above 256 would round before the pool and so tie
    output = conv_relu_max_pool2d(x, w, b, **options)
    grad_output = _signs(*output.shape, dtype=dtype, device=device)
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, [x, w, b], options, grad_output)


@given(case=conv_cases(dtypes=(torch.float32, torch.bfloat16)))
def test_inference_and_training_agree(device, case: ConvCase):
    """Without a gradient another kernel may run (no indices); it gives the same numbers."""
    tensors = case.operands(_signs, device)
    with torch.inference_mode():
        inference = conv_relu_max_pool2d(*tensors, **case.options)
    training = conv_relu_max_pool2d(*[None if t is None else t.requires_grad_() for t in tensors], **case.options)
    assert training.requires_grad
    assert_equal(inference, training, "output")
    assert inference.stride() == training.stride()


def test_arguments_by_position(device):
    """The first seven as in F.conv2d; the pool's are by keyword only, so nobody mixes up two paddings."""
    x, w, b = _signs(2, 4, 9, 9, dtype=torch.float32), _signs(6, 2, 3, 3, dtype=torch.float32), None
    expected = reference.conv_relu_max_pool2d(x, w, b, (1, 2), (1, 0), (2, 1), 2)
    assert_equal(conv_relu_max_pool2d(x, w, b, (1, 2), (1, 0), (2, 1), 2), expected, "output")
    with pytest.raises(TypeError):
        conv_relu_max_pool2d(x, w, b, 1, 0, 1, 2, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": [1, 2]},
        {"stride": (2,)},
        {"stride": torch.Size([1, 2])},
        {"padding": [2, 1]},
        {"padding": (1,)},
        {"padding": "valid", "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": "same", "dilation": (3, 1)},
        {"dilation": [2, 1]},
        {"pool_kernel_size": [3, 2]},
        {"pool_kernel_size": (3,)},
        {"pool_stride": []},
        {"pool_stride": ()},
        {"pool_stride": (1, 2)},
        {"pool_kernel_size": 3, "pool_padding": [1, 0]},
        {"pool_dilation": (2, 1)},
        {"pool_kernel_size": (1, 1)},
        {"pool_kernel_size": (12, 1), "ceil_mode": True},
        {"pool_kernel_size": 17, "pool_padding": 8, "pool_stride": 1},
    ],
    ids=str,
)
def test_forms_of_an_argument(device, options):
    """Whatever stock takes for an int or a pair, and windows larger than an index of one byte can tell apart."""
    x, w = (
        _signs(2, 2, 14, 13, dtype=torch.float32, device=device),
        _signs(3, 2, 2, 3, dtype=torch.float32, device=device),
    )
    output = reference.conv_relu_max_pool2d(x, w, **options)
    grad_output = _signs(*output.shape, dtype=torch.float32, device=device)
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, [x, w, None], options, grad_output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.int64], ids=str)
def test_dtypes_without_a_kernel_go_through_stock(dtype):
    x, w, b = (integers(*s).to(dtype) for s in [(2, 3, 9, 9), (4, 3, 3, 3), (4,)])
    assert_equal(conv_relu_max_pool2d(x, w, b), reference.conv_relu_max_pool2d(x, w, b), "output")


def test_float16_has_gradients():
    tensors = [integers(*s, dtype=torch.float16) for s in [(2, 3, 9, 9), (4, 3, 3, 3), (4,)]]
    grad_output = integers(2, 4, 3, 3, dtype=torch.float16)
    assert_exact(conv_relu_max_pool2d, reference.conv_relu_max_pool2d, tensors, {}, grad_output)


def test_reference_windows_agree_with_stock():
    """The yardstick's yardstick: the windows spelled out in reference.py against stock's pooling."""
    conv = torch.randn(2, 3, 11, 10, dtype=torch.float64)
    for options in (
        {},
        {"pool_kernel_size": (3, 2), "pool_stride": (2, 3), "ceil_mode": True},
        {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1, "ceil_mode": True},
        {"pool_kernel_size": 2, "pool_stride": 1, "pool_padding": 1, "pool_dilation": 3},
    ):
        arguments = reference._pool_arguments(options)
        assert_equal(reference.windows(conv, **options).amax(-1), torch.nn.functional.max_pool2d(conv, *arguments), "")
