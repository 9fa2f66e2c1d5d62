"""Strides, memory formats, offsets, aliasing: every operand in every layout, and the layout of what comes out."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
from reference import LAYOUTS, assert_equal, assert_exact, integers, run

from lenet_ext import functional, ops

pytestmark = pytest.mark.kernels

CONV = {
    "lenet 2": ((3, 6, 14, 14), (16, 6, 5, 5), {}),
    "padded": ((2, 4, 9, 8), (6, 2, 3, 3), {"padding": 1, "groups": 2}),
    "overlapping": ((2, 3, 13, 12), (5, 3, 3, 3), {"stride": (1, 2), "pool_kernel_size": 3, "pool_stride": 2}),
}


def _signs(*shape, dtype=torch.float32, device="cpu"):
    return integers(*shape, low=-1, high=1, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
@pytest.mark.parametrize("shape", CONV)
def test_conv_operands(device, shape, layouts, dtype):
    image, weight, options = CONV[shape]
    x = LAYOUTS[layouts[0]](_signs(*image, dtype=dtype, device=device))
    w = LAYOUTS[layouts[1]](_signs(*weight, dtype=dtype, device=device))
    b = LAYOUTS["every_other"](_signs(weight[0], dtype=dtype, device=device))
    output = reference.conv_relu_max_pool2d(*reference.to64([x, w, b]), **options)
    grad_output = _signs(*output.shape, dtype=dtype, device=device)
    assert_exact(functional.conv_relu_max_pool2d, reference.conv_relu_max_pool2d, [x, w, b], options, grad_output)


GRADIENTS = {
    **LAYOUTS,
    "all expanded": lambda t: t[:1, :1, :1, :1].expand(t.shape),
    "rows expanded": lambda t: t[:, :, :1].expand(t.shape),
    "batch expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", GRADIENTS)
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", CONV)
def test_conv_grad_output(device, shape, input_layout, layout):
    """`output.sum().backward()` sends a gradient with stride 0; a channels_last layer above sends its own format."""
    image, weight, options = CONV[shape]
    x = LAYOUTS[input_layout](_signs(*image, device=device))
    tensors = [x, _signs(*weight, device=device), _signs(weight[0], device=device)]
    output = functional.conv_relu_max_pool2d(*tensors, **options)
    grad_output = GRADIENTS[layout](_signs(*output.shape, device=device))
    assert_exact(functional.conv_relu_max_pool2d, reference.conv_relu_max_pool2d, tensors, options, grad_output)


@pytest.mark.parametrize("name", ["conv_relu_max_pool2d", "linear", "linear_relu"])
def test_sum_backward(device, name):
    """The shortest thing a user types, without any helper in between."""
    shapes = [(2, 3, 9, 9), (4, 3, 3, 3), (4,)] if name.startswith("conv") else [(5, 7), (3, 7), (3,)]
    tensors = [_signs(*s, device=device) for s in shapes]
    grads = []
    for module in (functional, reference):
        leaves = [t.clone().requires_grad_() for t in tensors]
        getattr(module, name)(*leaves).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, stock in zip(*grads, strict=True):
        assert_equal(ours, stock, "grad")
        assert ours.stride() == stock.stride()


def _overlapping(device):
    """Images that share memory: a window sliding over one strip."""
    strip = _signs(3, 9, 30, device=device)
    return strip.as_strided((4, 3, 9, 12), (5, 270, 30, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda device: _signs(1, 3, 9, 9, device=device).expand(5, 3, 9, 9),
        lambda device: _signs(2, 1, 9, 9, device=device).expand(2, 3, 9, 9),
        lambda device: _signs(1, 1, 1, 1, device=device).expand(2, 3, 9, 9),
        _overlapping,
        lambda device: _signs(9, 9, 3, 2, device=device).permute(3, 2, 1, 0),
        lambda device: _signs(2, 3, 9, 9, device=device).flip(-1),
        lambda device: torch.complex(_signs(2, 3, 9, 9), _signs(2, 3, 9, 9)).to(device).real,
        lambda device: torch.complex(_signs(2, 3, 9, 9), _signs(2, 3, 9, 9)).to(device).conj().imag,
    ],
    ids=[
        "batch expanded",
        "channels expanded",
        "one value",
        "overlapping",
        "permuted",
        "flipped",
        "real",
        "negative bit",
    ],
)
def test_views_of_every_kind(device, make):
    """An operand's pointer and strides are not all there is to it: `conj().imag` is negated when read."""
    x, w, b = make(device), _signs(4, 3, 3, 3, device=device), _signs(4, device=device)
    plain = x.clone(memory_format=torch.contiguous_format).resolve_neg()
    assert_equal(functional.conv_relu_max_pool2d(x, w, b), reference.conv_relu_max_pool2d(plain, w, b), "output")
    _, _, oh, ow = reference.conv_relu_max_pool2d(plain, w, b).shape
    grad = _signs(len(x), 4, oh, ow)
    assert_exact(functional.conv_relu_max_pool2d, reference.conv_relu_max_pool2d, [x, w, b], {}, grad)
    flat, v = x[:, 0], _signs(4, x.shape[-1], device=device)
    assert_exact(functional.linear_relu, reference.linear_relu, [flat, v, None], {}, _signs(*flat.shape[:-1], 4))


LINEAR_LAYOUTS = list(itertools.product(["contiguous", "sliced", "every_other", "batch_last"], repeat=3))


@pytest.mark.parametrize("name", ["linear", "linear_relu"])
@pytest.mark.parametrize("layouts", LINEAR_LAYOUTS, ids="-".join)
def test_linear_operands(device, name, layouts):
    x, w, g = (
        LAYOUTS[layout](_signs(*s, device=device))
        for layout, s in zip(layouts, [(9, 33), (17, 33), (9, 17)], strict=True)
    )
    b = LAYOUTS["every_other"](_signs(17, device=device))
    assert_exact(getattr(functional, name), getattr(reference, name), [x, w, b], {}, g)


@pytest.mark.parametrize("name", ["linear", "linear_relu"])
def test_linear_gradient_of_stride_0(device, name):
    for grad in (_signs(1, 1).expand(9, 17), _signs(1, 17).expand(9, 17), _signs(9, 1).expand(9, 17)):
        tensors = [_signs(*s, device=device) for s in [(9, 33), (17, 33), (17,)]]
        assert_exact(getattr(functional, name), getattr(reference, name), tensors, {}, grad)


@pytest.mark.parametrize("name", ["linear", "linear_relu"])
def test_linear_of_transposed_leading_dimensions(device, name):
    """(batch, sequence, features) with batch and sequence swapped, which no reshape turns into a matrix for free."""
    x = _signs(4, 3, 8, device=device).transpose(0, 1)
    tensors = [x, _signs(5, 8, device=device), _signs(5, device=device)]
    output = getattr(functional, name)(*tensors)
    assert output.is_contiguous()
    assert_exact(getattr(functional, name), getattr(reference, name), tensors, {}, _signs(3, 4, 5))


# --- the layout of results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "misaligned", "batch_last"])
def test_output_format_follows_the_input(device, layout, training):
    """Contiguous in, contiguous out; channels_last in, channels_last out, which is what the next layer wants."""
    x = LAYOUTS[layout](_signs(2, 3, 9, 9, device=device)).requires_grad_(training)
    w = _signs(4, 3, 3, 3, device=device).requires_grad_(training)
    output = functional.conv_relu_max_pool2d(x, w)
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert output.is_contiguous(memory_format=wanted)
    if layout in ("contiguous", "channels_last"):
        assert output.stride() == reference.conv_relu_max_pool2d(x, w).stride()
    if training:
        grad_x, grad_w = torch.autograd.grad(output.sum(), (x, w))
        assert grad_x.is_contiguous(memory_format=wanted)
        assert grad_w.is_contiguous()


def test_format_of_the_weight_does_not_matter(device):
    """net.to(memory_format=channels_last) with a contiguous batch: contiguous in, contiguous out."""
    x = _signs(2, 3, 9, 9, device=device)
    w = LAYOUTS["channels_last"](_signs(4, 3, 3, 3, device=device))
    assert functional.conv_relu_max_pool2d(x, w).is_contiguous()


@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (1, 3, 1, 1), (1, 1, 9, 9), (2, 3, 1, 9)], ids=str)
def test_formats_that_coincide_count_as_contiguous(device, shape):
    """With one channel, or one pixel, a tensor is contiguous in both formats."""
    x = _signs(*shape, device=device).contiguous(memory_format=torch.channels_last)
    if not x.is_contiguous():
        x = x.contiguous()
    weight = _signs(4, shape[1], 1, 1, device=device)
    output = functional.conv_relu_max_pool2d(x, weight, pool_kernel_size=1)
    assert output.is_contiguous()
    strides = functional.conv_relu_max_pool2d(x.clone(), weight, pool_kernel_size=1).stride()
    assert output.stride() == strides


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_unbatched_output(device, layout):
    x = LAYOUTS[layout](_signs(1, 3, 9, 9, device=device))[0]
    output = functional.conv_relu_max_pool2d(x, _signs(4, 3, 3, 3, device=device))
    assert output.shape == (4, 3, 3)
    if layout == "contiguous":
        assert output.is_contiguous()


# --- aliasing ----------------------------------------------------------------------------------------------------


def _storages(*tensors):
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None and t.numel()}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("name", "shapes", "options"),
    [
        ("conv_relu_max_pool2d", [(2, 1, 4, 4), (1, 1, 1, 1), (1,)], {"pool_kernel_size": 1}),
        ("conv_relu_max_pool2d", [(1, 4, 4), (1, 1, 1, 1), None], {"pool_kernel_size": 1}),
        ("conv_relu_max_pool2d", [(2, 3, 9, 9), (4, 3, 3, 3), (4,)], {}),
        ("linear", [(3, 3), (3, 3), (3,)], {}),
        ("linear", [(3,), (3, 3), (3,)], {}),
        ("linear", [(3, 1), (1, 1), None], {}),
        ("linear_relu", [(3, 3), (3, 3), (3,)], {}),
        ("linear_relu", [(1, 3), (3, 3), (3,)], {}),
    ],
    ids=str,
)
def test_outputs_never_alias_inputs(device, name, shapes, options, training):
    """Nor do gradients, not even where they are equal to an operand: the identity convolution, weight 1."""
    tensors = [None if s is None else torch.ones(s, device=device, requires_grad=training) for s in shapes]
    before = [None if t is None else t.detach().clone() for t in tensors]
    output = getattr(functional, name)(*tensors, **options)
    assert not _storages(output) & _storages(*tensors)
    if training:
        grad_output = torch.ones_like(output)
        wanted = [t for t in tensors if t is not None]
        grads = torch.autograd.grad(output, wanted, grad_output)
        assert not _storages(*grads) & _storages(*tensors, output, grad_output)
        assert len(_storages(*grads)) == len(grads), "two gradients share memory"
    for tensor, copy in zip(tensors, before, strict=True):
        assert_equal(tensor, copy, "operand")


@pytest.mark.parametrize(
    "layouts", [("sliced", "sliced"), ("every_other", "every_other"), ("misaligned", "misaligned")]
)
def test_nothing_is_written_outside_of_the_operands(device, layouts):
    """The NaN around a sliced operand is still there afterwards, and none of it got into a result."""
    x = LAYOUTS[layouts[0]](_signs(2, 3, 9, 9, device=device))
    w = LAYOUTS[layouts[1]](_signs(4, 3, 3, 3, device=device))
    bases = [torch.empty(0, device=device).set_(t.untyped_storage()) for t in (x, w)]
    before = [base.clone() for base in bases]
    assert all(bool(base.isnan().any()) for base in bases)
    result = run(functional.conv_relu_max_pool2d, [x, w, None], {}, torch.ones_like)
    for what, value in result.items():
        assert value is None or not bool(value.isnan().any()), what
    for base, copy in zip(bases, before, strict=True):
        assert_equal(base, copy, "buffer")


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [2, 32])
def test_gradients_are_laid_out_like_their_tensors(device, channels, input_layout, weight_layout):
    """So that optimizers work on tensors that are laid out alike; the same formats as stock's."""
    x = LAYOUTS[input_layout](integers(2, channels, 9, 9, device=device)).requires_grad_()
    w = LAYOUTS[weight_layout](integers(4, channels, 3, 3, device=device)).requires_grad_()
    functional.conv_relu_max_pool2d(x, w).sum().backward()
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    (weight_gradient,) = torch.autograd.grad(functional.conv_relu_max_pool2d(x, w).sum(), w)
    assert weight_gradient.is_contiguous(memory_format=formats.get(weight_layout, torch.contiguous_format))
    assert x.grad.is_contiguous(memory_format=formats[input_layout])


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [2, 32])
def test_the_operator_lays_the_weight_gradient_out_like_weight(device, channels, input_layout, weight_layout):
    """To lay it out again costs as much as pooling; without `weight`, which the gradient does not need, contiguous."""
    x = LAYOUTS[input_layout](integers(2, channels, 9, 9, device=device))
    w = LAYOUTS[weight_layout](integers(32, channels, 3, 3, device=device))
    options = ((1, 1), (0, 0, 0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1))
    output, indices = ops.conv_relu_max_pool2d_with_indices(x, w, None, *options, False)
    for weight, layout in ((w, weight_layout), (None, "contiguous")):
        mask = (weight is not None, True, True)
        arguments = (torch.ones_like(output), indices, x, weight, x.shape, w.shape, *options, mask)
        _, gradient, _ = ops.conv_relu_max_pool2d_backward(*arguments)
        assert gradient.stride() == LAYOUTS[layout](gradient).stride()


def test_the_operator_lays_a_one_channel_gradient_out_like_input(device):
    """The vendor's has other strides; it is used where values are not finite."""
    x, w = integers(2, 1, 9, 9, device=device), integers(32, 1, 3, 3, device=device)
    w[0, 0, 0, 0] = torch.nan
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(functional.conv_relu_max_pool2d(x, w).sum(), x)
    assert gradient.stride() == x.stride()
