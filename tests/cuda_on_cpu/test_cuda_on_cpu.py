"""The CUDA side without a GPU: host code and kernels built for the CPU (tests/cuda_on_cpu) against stock torch.

Three ways in: the operators' own test files, rerun with the CUDA side in the CPU's place; direct calls here for what
those do not reach (float16, schedules of the threads, conversions); and the driver program under the sanitizers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
from cuda_on_cpu import build  # noqa: E402

pytestmark = pytest.mark.skipif(
    build.compiler() is None or not sys.platform.startswith("linux"), reason="needs a C++ compiler on Linux"
)

DIRECT, VENDOR = 0, 1


def extended(*values):
    return pytest.param(*values, marks=pytest.mark.extended)


SCHEDULES = [(0, 0), (1, 0), (2, 1)]  # forward, reverse, shuffled
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

PLAIN = {
    "stride": [1, 1],
    "padding": [0, 0, 0, 0],
    "dilation": [1, 1],
    "groups": 1,
    "pool_kernel_size": [2, 2],
    "pool_stride": [2, 2],
    "pool_padding": [0, 0],
    "pool_dilation": [1, 1],
}
ODD = {
    **PLAIN,
    "stride": [1, 2],
    "padding": [2, 1, 0, 3],
    "dilation": [2, 1],
    "groups": 2,
    "pool_kernel_size": [3, 2],
    "pool_stride": [2, 1],
    "pool_padding": [1, 0],
}
# Batch sizes around the images of a block (10) and of a pass (4).
SHAPES = {
    "conv1": ((11, 1, 32, 32), (6, 1, 5, 5), PLAIN),
    "conv2": ((13, 6, 14, 14), (16, 6, 5, 5), PLAIN),
    "plain": ((3, 3, 10, 11), (5, 3, 3, 3), PLAIN),
    "odd": ((2, 4, 11, 12), (6, 2, 3, 2), ODD),
}


@pytest.fixture(scope="module")
def control():
    """The library's control functions; deterministic mode fills what is allocated with NaN."""
    library = build.operators()
    torch.use_deterministic_algorithms(True)
    yield library
    library.cuda_on_cpu_configure(-1, 0, 0)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def ops(control):
    control.cuda_on_cpu_configure(-1, 0, 0)
    return torch.ops.lenet_ext_cuda_on_cpu


def under_schedules(control, algorithm, call):
    """The result of `call`, which must be the same, bit by bit, under every schedule of the threads."""
    results = []
    for schedule, seed in SCHEDULES:
        control.cuda_on_cpu_configure(algorithm, schedule, seed)
        result = call()
        results.append(result if isinstance(result, tuple) else (result,))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second), "the result depends on the order of threads"
    return results[0]


def integers(*shape, dtype):
    """Sums of products of these are exact in every dtype, and full of ties."""
    return torch.randint(-1, 2, shape).to(dtype)


def stock(x, w, b, o):
    top, bottom, left, right = o["padding"]
    conv = F.conv2d(F.pad(x, (left, right, top, bottom)), w, b, o["stride"], 0, o["dilation"], o["groups"])
    pool = [o[f"pool_{name}"] for name in ("kernel_size", "stride", "padding", "dilation")]
    return F.max_pool2d(F.relu(conv), *pool)


@pytest.mark.parametrize("algorithm", [DIRECT, VENDOR], ids=["direct", "vendor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_convolution_is_exact_and_independent_of_the_schedule(ops, control, name, dtype, algorithm):
    shape, weight_shape, o = SHAPES[name]
    x, w, b = (
        integers(*shape, dtype=dtype),
        integers(*weight_shape, dtype=dtype),
        integers(weight_shape[0], dtype=dtype),
    )
    options = list(o.values())
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    expected = stock(*leaves, o)
    g = integers(*expected.shape, dtype=dtype)

    def forward():
        return ops.conv_relu_max_pool2d_with_indices(x, w, b, *options, False)

    output, indices = under_schedules(control, algorithm, forward)
    assert torch.equal(output.double(), expected)
    assert torch.equal(ops.conv_relu_max_pool2d(x, w, b, *options, False), output)
    at_indices = under_schedules(control, algorithm, lambda: ops.conv_at_indices(x, w, b, indices, *options))[0]
    assert torch.equal(at_indices, output)
    assert torch.equal(indices == 255, output == 0)

    def backward():
        return ops.conv_relu_max_pool2d_backward(g, indices, x, w, x.shape, w.shape, *options, [True, True, True])

    for got, want in zip(
        under_schedules(control, algorithm, backward), torch.autograd.grad(expected, leaves, g.double()), strict=True
    ):
        assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("algorithm", [DIRECT, VENDOR], ids=["direct", "vendor"])
def test_only_the_gradients_that_are_wanted(ops, control, algorithm, mask):
    control.cuda_on_cpu_configure(algorithm, 0, 0)
    x, w = torch.randn(3, 6, 14, 14), torch.randn(16, 6, 5, 5)
    options = list(PLAIN.values())
    output, indices = ops.conv_relu_max_pool2d_with_indices(x, w, None, *options, False)
    g = torch.randn_like(output)
    every = ops.conv_relu_max_pool2d_backward(g, indices, x, w, x.shape, w.shape, *options, [True] * 3)
    some = ops.conv_relu_max_pool2d_backward(g, indices, x, w, x.shape, w.shape, *options, list(mask))
    x2, w2, g2 = torch.randn(5, 7), torch.randn(3, 7), torch.randn(5, 3)
    every += ops.linear_relu_backward(g2, g2, x2, w2, [True] * 3)
    some += ops.linear_relu_backward(g2, g2, x2, w2, list(mask))
    for wanted, one, all_of_them in zip(mask * 2, some, every, strict=True):
        if wanted:
            torch.testing.assert_close(one, all_of_them)
        else:
            assert one.shape == (0,)


@pytest.mark.parametrize("layout", ["channels_last", "misaligned", "sliced"])
@pytest.mark.parametrize("algorithm", [DIRECT, VENDOR], ids=["direct", "vendor"])
def test_layouts_of_convolution(ops, control, algorithm, layout):
    """The layout changes which kernels and which loads are used, never a value; output follows input."""
    control.cuda_on_cpu_configure(algorithm, 0, 0)
    options = list(PLAIN.values())
    x, w, b = (integers(*s, dtype=torch.float32) for s in [(3, 6, 14, 14), (16, 6, 5, 5), (16,)])
    if layout == "channels_last":
        y = x.contiguous(memory_format=torch.channels_last)
    elif layout == "misaligned":
        y = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    else:
        y = torch.full((5, 8, 16, 17), float("nan"))[1:4, 1:7, 1:15, 2:16].copy_(x)
    output, indices = ops.conv_relu_max_pool2d_with_indices(x, w, b, *options, False)
    got, got_indices = ops.conv_relu_max_pool2d_with_indices(y, w, b, *options, False)
    assert torch.equal(got, output)
    assert torch.equal(got_indices, indices)
    assert got.stride() == got_indices.stride()
    channels_last = layout == "channels_last"
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    g = integers(3, 16, 1, 1, dtype=torch.float32).expand(3, 16, 5, 5)
    expected = ops.conv_relu_max_pool2d_backward(g.contiguous(), indices, x, w, x.shape, w.shape, *options, [True] * 3)
    gradients = ops.conv_relu_max_pool2d_backward(g, got_indices, y, w, y.shape, w.shape, *options, [True] * 3)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_an_image_does_not_depend_on_its_batch(ops):
    """Bit by bit: not on the batch's size, nor on its place in it."""
    options = list(PLAIN.values())
    for shape, weight in [((33, 1, 32, 32), (6, 1, 5, 5)), ((33, 6, 14, 14), (16, 6, 5, 5))]:
        x, w = torch.randn(shape), torch.randn(weight)
        whole = ops.conv_relu_max_pool2d(x, w, None, *options, False)
        for begin, end in [(0, 1), (5, 8), (32, 33)]:
            part = ops.conv_relu_max_pool2d(x[begin:end], w, None, *options, False)
            assert torch.equal(part, whole[begin:end])


@pytest.mark.parametrize("algorithm", [DIRECT, VENDOR], ids=["direct", "vendor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 400, 120), (33, 120, 84), (17, 84, 10), (5, 0, 3), (0, 5, 3)], ids=str)
def test_linear_is_exact_and_independent_of_the_schedule(ops, control, sizes, dtype, algorithm):
    m, k, n = sizes
    x, w, b, g = (integers(*s, dtype=dtype) for s in [(m, k), (n, k), (n,), (m, n)])
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    for relu in (False, True):
        expected = leaves[0] @ leaves[1].t() + leaves[2]
        expected = expected.relu() if relu else expected
        forward = ops.linear_relu if relu else ops.linear
        output = under_schedules(control, algorithm, lambda forward=forward: forward(x, w, b))[0]
        assert torch.equal(output.double(), expected)

        def backward(relu=relu, output=output):
            if relu:
                return ops.linear_relu_backward(g, output, x, w, [True] * 3)
            return ops.linear_backward(g, x, w, [True] * 3)

        for got, want in zip(
            under_schedules(control, algorithm, backward),
            torch.autograd.grad(expected, leaves, g.double()),
            strict=True,
        ):
            assert torch.equal(got, want.to(dtype))


def reference_net(channels, classes, dtype):
    from lenet_ext import ReferenceNet

    net = ReferenceNet(channels, classes, dtype=dtype)
    return net, [parameter.detach() for parameter in net.parameters()]


@contextlib.contextmanager
def tf32_allowed(convolutions, products):
    """Sets what torch.backends says of TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def capability(control, value):
    """Of the GPU that stands there, times 10."""
    control.cuda_on_cpu_set_capability(value)
    try:
        yield
    finally:
        control.cuda_on_cpu_set_capability(90)


def without_tensor_cores(control):
    return capability(control, 75)


def dtype_of(precision):
    return torch.float32 if precision == "tf32" else getattr(torch, precision)


ON_TENSOR_CORES = ["tf32", "float16", "bfloat16"]

# Of values and of gradients, each to the largest of its tensor, against float64. TF32 and float16 have 11 bits of
# mantissa, bfloat16 has 8, and both the layers' inputs and their outputs are rounded.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1.5e-2}


# One channel and at most 128 classes are one launch but in float64; the others run layer by layer.
@pytest.mark.parametrize(
    ("batch", "channels", "classes", "precision"),
    [
        (0, 1, 10, "float32"),
        (1, 1, 10, "float32"),
        extended(33, 1, 10, "float32"),
        (4, 1, 128, "float32"),
        (4, 1, 1, "float32"),
        (3, 3, 10, "float32"),
        (3, 1, 130, "float32"),
        (3, 1, 10, "float64"),
        (0, 1, 10, "bfloat16"),
        *[(batch, 1, 10, precision) for batch in (1, 3) for precision in ("tf32", "float16", "bfloat16")],
        *[extended(batch, 1, 10, precision) for batch in (17, 33) for precision in ("tf32", "float16", "bfloat16")],
        (3, 1, 128, "tf32"),
        (3, 1, 128, "bfloat16"),
        (3, 3, 10, "bfloat16"),
    ],
    ids=str,
)
def test_the_whole_network(ops, control, batch, channels, classes, precision):
    dtype = dtype_of(precision)
    net, parameters = reference_net(channels, classes, dtype)
    x = torch.randn(batch, channels, 32, 32, dtype=dtype)
    expected = net.double()(leaf := x.double().requires_grad_())
    with tf32_allowed(precision == "tf32", precision == "tf32"):
        before = control.cuda_on_cpu_launches()
        output = under_schedules(control, -1, lambda: ops.lenet(x, parameters))[0]
        if dtype != torch.float64 and channels == 1 and classes <= 128:
            assert control.cuda_on_cpu_launches() - before == len(SCHEDULES) * (batch > 0)
        activations = under_schedules(control, -1, lambda: ops.lenet_with_activations(x, parameters))
    tolerance = TOLERANCES[precision]

    def close(got, want):
        scale = float(want.detach().abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale)

    close(output, expected.detach())
    assert output.dtype == dtype
    assert torch.equal(activations[0], output)
    assert [tuple(a.shape) for a in activations[1:]] == [
        *[(batch, 6, 14, 14)] * 2,
        *[(batch, 16, 5, 5)] * 2,
        (batch, 120),
        (batch, 84),
    ]
    assert [a.dtype for a in activations[1:]] == [dtype, torch.uint8, dtype, torch.uint8, dtype, dtype]
    # What won each window, by its value.
    pooled1, indices1, pooled2, indices2 = activations[1:5]
    for i, images, pooled, indices in ((0, x, pooled1, indices1), (2, pooled1, pooled2, indices2)):
        operands = [t.double() for t in (images, parameters[i], parameters[i + 1])]
        close(pooled, ops.conv_at_indices(*operands, indices, *PLAIN.values()))

    g = torch.randn(batch, classes, dtype=dtype)
    grad_input, gradients = ops.lenet_backward(g, x, parameters, *activations[1:], True)
    if tolerance < 1e-4:
        wanted = torch.autograd.grad(expected, [*net.parameters(), leaf], g.double())
        for got, want in zip([*gradients, grad_input], wanted, strict=True):
            close(got, want)
        return
    # Where two positions of a window are nearly the same, another may win than in float64, and each takes a whole
    # gradient along: so the winners are given, and the arithmetic is compared, with that of the CPU in float64.
    exact = [a if a.dtype == torch.uint8 else a.double() for a in activations[1:]]
    wanted_input, wanted = torch.ops.lenet_ext.lenet_backward(
        g.double(), x.double(), [p.double() for p in parameters], *exact, True
    )
    bound = 1e-5 if dtype == torch.float32 else 2 * tolerance
    for got, want in zip([*gradients, grad_input], [*wanted, wanted_input], strict=True):
        assert float((got.double() - want).norm()) <= bound * float(want.norm())


@pytest.mark.parametrize(("convolutions", "products"), list(itertools.product([False, True], repeat=2)))
def test_tf32_only_where_both_flags_allow_it(ops, convolutions, products):
    """Otherwise the result is bit by bit that of the strict kernel."""
    _, parameters = reference_net(1, 10, torch.float32)
    x = torch.randn(5, 1, 32, 32)
    with tf32_allowed(False, False):
        strict = ops.lenet(x, parameters), *ops.lenet_with_activations(x, parameters)
    with tf32_allowed(convolutions, products):
        got = ops.lenet(x, parameters), *ops.lenet_with_activations(x, parameters)
    same = [torch.equal(one, other) for one, other in zip(got, strict, strict=True)]
    if convolutions and products:
        assert not same[0]
        assert not same[1]
        torch.testing.assert_close(got[0], strict[0], rtol=0, atol=2e-3)
    else:
        assert all(same)


def test_tf32_by_the_newer_flags(ops):
    """torch.backends.*.fp32_precision; convolutions and RNNs may be set apart."""
    _, parameters = reference_net(1, 10, torch.float32)
    x = torch.randn(2, 1, 32, 32)
    strict = ops.lenet(x, parameters)

    def layer():
        return ops.conv_relu_max_pool2d(x, *parameters[:2], *PLAIN.values(), False)

    strict_layer = layer()
    flags = [torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
    before = [flag.fp32_precision for flag in flags]
    try:
        for conv, rnn, matmul in itertools.product(["ieee", "tf32"], repeat=3):
            for flag, precision in zip(flags, (conv, rnn, matmul), strict=True):
                flag.fp32_precision = precision
            assert torch.equal(ops.lenet(x, parameters), strict) == (conv == "ieee" or matmul == "ieee")
            assert torch.equal(layer(), strict_layer) == (conv == "ieee")
    finally:
        for flag, precision in zip(flags, before, strict=True):
            flag.fp32_precision = precision
    assert torch.equal(ops.lenet(x, parameters), strict)


@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_a_gpu_without_tensor_cores_for_it(ops, control, precision):
    """float32 stays strict, the 16-bit types go layer by layer; both paths agree within the rounding."""
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    x = torch.randn(3, 1, 32, 32, dtype=dtype)
    with tf32_allowed(True, False):
        strict = ops.lenet(x, parameters)
    with tf32_allowed(True, precision == "tf32"):
        on_tensor_cores = ops.lenet(x, parameters)
        with without_tensor_cores(control):
            before = control.cuda_on_cpu_launches()
            got = ops.lenet(x, parameters)
            launches = control.cuda_on_cpu_launches() - before
    assert launches == (1 if precision == "tf32" else 5)
    if precision == "tf32":
        assert torch.equal(got, strict)
        assert not torch.equal(got, on_tensor_cores)
    torch.testing.assert_close(got, on_tensor_cores, rtol=0, atol=TOLERANCES[precision])


@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_the_tensor_cores_do_not_see_the_batch(ops, precision):
    """Bit by bit: an image's results do not depend on the batch's size, nor on its place in it, nor on addresses."""
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    moved = [torch.empty(p.numel() + 1, dtype=dtype)[1:].view(p.shape).copy_(p) for p in parameters]
    x = torch.randn(33, 1, 32, 32, dtype=dtype)
    odd = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)
    with tf32_allowed(True, precision == "tf32"):
        whole = ops.lenet_with_activations(x, parameters)
        for begin, end in [(0, 1), (5, 8), (16, 33)]:
            part = ops.lenet_with_activations(odd[begin:end], moved)
            for one, other in zip(part, whole, strict=True):
                assert torch.equal(one, other[begin:end])


@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_tensor_cores_keep_non_finite_pixels_where_they_belong(ops, value, precision):
    """The outputs that see such a pixel are those of stock, and no other changes."""
    dtype = dtype_of(precision)
    net, parameters = reference_net(1, 10, dtype)
    x = torch.randn(4, 1, 32, 32, dtype=dtype)
    x[2, 0, 9, 14] = value
    with tf32_allowed(True, precision == "tf32"):
        output, pooled1, indices1, pooled2 = ops.lenet_with_activations(x, parameters)[:4]
        clean = ops.lenet_with_activations(x.where(x.isfinite(), 0), parameters)
    net = net.double()
    expected1 = F.max_pool2d(net.conv1(x.double()).relu(), 2)
    expected2 = F.max_pool2d(net.conv2(expected1).relu(), 2)
    tolerance = TOLERANCES[precision]
    for got, want in ((pooled1, expected1), (pooled2, expected2)):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * 4, equal_nan=True)
    assert torch.equal(indices1 == 255, pooled1 <= 0)
    keep = torch.arange(4) != 2
    for one, other in zip((output, pooled1, indices1, pooled2), clean[:4], strict=True):
        assert torch.equal(one[keep], other[keep])
    assert bool(output[2].isfinite().all()) == bool(net(x.double())[2].isfinite().all())


def layer_operands(name, dtype, batch):
    (_, *image), weight, o = SHAPES[name]
    shapes = [(batch, *image), weight, weight[:1]]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes], list(o.values())


# What rounding the operands does to a sum, in parts of the sum of its terms' magnitudes, and what rounding it does.
OPERANDS = {"tf32": 2**-10, "float16": 1e-6, "bfloat16": 1e-6}
RESULT = {"tf32": 0, "float16": 2**-11, "bfloat16": 2**-8}


@pytest.mark.parametrize("batch", [1, extended(3), 17, extended(33)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["conv1", "conv2"])
@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_a_layer_on_the_tensor_cores(ops, control, precision, name, bias, batch):
    """Values within the rounding, codes wherever two positions of a window are further apart; one launch."""
    operands, options = layer_operands(name, dtype_of(precision), batch)
    operands[2] = operands[2] if bias else None
    with tf32_allowed(precision == "tf32", False):
        before = control.cuda_on_cpu_launches()
        output, indices = under_schedules(
            control, -1, lambda: ops.conv_relu_max_pool2d_with_indices(*operands, *options, False)
        )
        assert control.cuda_on_cpu_launches() == before + len(SCHEDULES)
        assert torch.equal(ops.conv_relu_max_pool2d(*operands, *options, False), output)
    exact = [None if t is None else t.double() for t in operands]
    windows, magnitudes = (
        F.conv2d(*values).unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
        for values in (exact, [None if t is None else t.abs() for t in exact])
    )
    best, second = windows.topk(2).values.unbind(-1)
    error = OPERANDS[precision] * magnitudes.amax(-1)
    assert bool(((output.double() - best.relu()).abs() <= error + RESULT[precision] * best.abs()).all())
    decided = (best - second > 2 * error) & (best.abs() > error)
    assert float(decided.double().mean()) > 0.9
    codes = windows.argmax(-1).where(best > 0, 255)
    assert torch.equal(indices[decided], codes[decided].byte())


@pytest.mark.parametrize("name", ["conv1", "conv2"])
@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_a_layer_on_the_tensor_cores_is_exact_where_sums_are(ops, precision, name):
    """Small integers, full of ties: the first of equals wins."""
    shape, weight_shape, o = SHAPES[name]
    dtype = dtype_of(precision)
    x, w, b = (integers(*s, dtype=dtype) for s in (shape, weight_shape, weight_shape[:1]))
    with tf32_allowed(precision == "tf32", False):
        output, indices = ops.conv_relu_max_pool2d_with_indices(x, w, b, *o.values(), False)
    conv = F.conv2d(x.double(), w.double(), b.double()).relu()
    expected, at = F.max_pool2d(conv, 2, return_indices=True)
    assert torch.equal(output.double(), expected)
    size = conv.size(-1)
    assert torch.equal(indices, (at // size % 2 * 2 + at % size % 2).where(expected > 0, 255).byte())


@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_a_layer_is_as_in_the_whole_network(ops, precision):
    """Bit by bit, non-finite pixels included, wherever in a batch or in memory an image lies."""
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    x = torch.randn(33, 1, 32, 32, dtype=dtype)
    x[6, 0, 9, 14], x[20, 0, 31, 0] = float("nan"), float("inf")
    moved = [torch.empty(p.numel() + 1, dtype=dtype)[1:].view(p.shape).copy_(p) for p in parameters[:4]]
    with tf32_allowed(True, precision == "tf32"):
        pooled1, indices1, pooled2, indices2 = ops.lenet_with_activations(x, parameters)[1:5]
        for images, (w, b), expected in (
            (x, moved[:2], (pooled1, indices1)),
            (pooled1, moved[2:], (pooled2, indices2)),
        ):
            odd = torch.empty(images.numel() + 1, dtype=dtype)[1:].view(images.shape).copy_(images)
            for begin, end in [(0, 33), (6, 7), (5, 8), (16, 33)]:
                part = odd[begin:end] if begin else images
                got = ops.conv_relu_max_pool2d_with_indices(part, w, b, *PLAIN.values(), False)
                for one, other in zip(got, expected, strict=True):
                    torch.testing.assert_close(one, other[begin:end], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("convolutions", "products"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_a_layer_is_tf32_only_where_convolutions_may_be(ops, control, name, convolutions, products):
    """As stock's convolution; otherwise, and without tensor cores, bit by bit what it always was."""
    operands, options = layer_operands(name, torch.float32, 3)
    expected = stock(*[t.double() for t in operands], PLAIN)

    def layer():
        return ops.conv_relu_max_pool2d(*operands, *options, False)

    strict = layer()
    torch.testing.assert_close(strict.double(), expected, rtol=1e-5, atol=1e-5)
    with tf32_allowed(convolutions, products):
        assert torch.equal(layer(), strict) == (not convolutions)
        with without_tensor_cores(control):
            assert torch.equal(layer(), strict)


@pytest.mark.parametrize("name", ["conv1", "conv2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_in_16_bits_without_tensor_cores(ops, control, dtype, name):
    operands, options = layer_operands(name, dtype, 11)
    with without_tensor_cores(control):
        output, indices = under_schedules(
            control, -1, lambda: ops.conv_relu_max_pool2d_with_indices(*operands, *options, False)
        )
    expected = stock(*[t.double() for t in operands], PLAIN)
    assert torch.equal(indices == 255, output == 0)
    torch.testing.assert_close(output.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("operand", ["input", "weight", "bias"])
@pytest.mark.parametrize("name", ["conv1", "conv2"])
@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_a_layer_on_the_tensor_cores_with_non_finite_operands(ops, precision, name, operand, value):
    """They reach the outputs that they reach in stock, and no others."""
    operands, options = layer_operands(name, dtype_of(precision), 3)
    operands[["input", "weight", "bias"].index(operand)].view(-1)[-7:-6] = value
    if operand == "input":
        operands[0][1, 0, 9, 10] = value
    with tf32_allowed(precision == "tf32", False):
        output = ops.conv_relu_max_pool2d(*operands, *options, False).double()
    expected = stock(*[t.double() for t in operands], PLAIN)
    scale = 1 + float(expected[expected.isfinite()].abs().max())
    torch.testing.assert_close(output, expected, rtol=0, atol=2**-8 * scale, equal_nan=True)


@pytest.mark.parametrize("training", [False, True])
def test_the_whole_network_with_nan_and_views(ops, training):
    """A NaN in one image reaches that image's outputs alone; parameters may be slices at any address."""
    _, parameters = reference_net(1, 10, torch.float32)
    moved = [torch.empty(p.numel() + 1)[1:].view(p.shape).copy_(p) for p in parameters]
    x = torch.randn(13, 1, 34, 33)[:, :, 1:33, :32]
    forward = ops.lenet_with_activations if training else ops.lenet
    output = forward(x, parameters)
    assert torch.equal(forward(x, moved)[0] if training else forward(x, moved), output[0] if training else output)
    x[6, 0, 15, 15] = float("nan")
    broken = forward(x, parameters)[0] if training else forward(x, parameters)
    output = output[0] if training else output
    assert bool(broken[6].isnan().all())
    keep = torch.arange(13) != 6
    assert torch.equal(broken[keep], output[keep])


@pytest.mark.parametrize("classes", [10, extended(1), extended(128)])
def test_an_image_is_the_same_in_a_batch_of_any_size(ops, control, classes):
    """Whether eight blocks, four or two compute it together or one block computes many, with or without gradients."""
    _, parameters = reference_net(1, classes, torch.float32)
    x = torch.randn(131, 1, 32, 32)
    x[3, 0, 9, 14], x[50, 0, 31, 0] = float("nan"), float("inf")
    odd = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    with capability(control, 80):  # no clusters
        expected = ops.lenet_with_activations(x, parameters)
    for begin, end in [(0, 1), (2, 18), (40, 72), (0, 64), (66, 131), (3, 131), (0, 131)]:
        for images in (x, odd):
            got = ops.lenet_with_activations(images[begin:end], parameters)
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other[begin:end], rtol=0, atol=0, equal_nan=True)
            output = ops.lenet(images[begin:end], parameters)
            torch.testing.assert_close(output, got[0], rtol=0, atol=0, equal_nan=True)


def gradients(ops, g, x, parameters, activations, input_gradient=False):
    """What lenet_backward returns, in the order of the parameters, then the input."""
    grad_input, grads = ops.lenet_backward(g, x, parameters, *activations, input_gradient)
    return (*grads, grad_input)


def assert_gradients_close(got, want):
    """`got` was rounded once, from sums in float32."""
    for one, other in zip(got, want, strict=True):
        info = torch.finfo(one.dtype)
        scale = float(other.abs().max()) if other.numel() else 0.0
        atol = 1e-5 * scale + info.smallest_normal * info.eps  # float16 has few exponents
        torch.testing.assert_close(one.double(), other.double(), rtol=max(1e-5, info.eps / 2), atol=atol)


def exact_gradients(g, x, parameters, activations):
    """In float64, for these activations and winners."""
    exact = [a if a.dtype == torch.uint8 else a.double() for a in activations]
    return torch.ops.lenet_ext.lenet_backward(g.double(), x.double(), [p.double() for p in parameters], *exact, False)[
        1
    ]


# From 257 images on, blocks take two each, from 513 on three: the launch is another one.
@pytest.mark.parametrize(
    ("batch", "classes", "schedules"),
    [(1, 10, 3), (2, 128, 3), (3, 1, 3), (17, 7, 3), (33, 10, 3), extended(257, 10, 1), extended(513, 10, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_whole_networks_backward_is_two_launches(ops, control, dtype, batch, classes, schedules):
    net, parameters = reference_net(1, classes, dtype)
    x, g = torch.randn(batch, 1, 32, 32, dtype=dtype), torch.randn(batch, classes, dtype=dtype)
    activations = ops.lenet_with_activations(x, parameters)[1:]
    control.cuda_on_cpu_configure(-1, 2, 0)
    before = control.cuda_on_cpu_launches()
    got = gradients(ops, g, x, parameters, activations)
    assert control.cuda_on_cpu_launches() == before + 2
    assert got[-1].shape == (0,)
    for schedule, seed in SCHEDULES[: schedules - 1]:
        control.cuda_on_cpu_configure(-1, schedule, seed)
        for one, other in zip(gradients(ops, g, x, parameters, activations), got, strict=True):
            assert torch.equal(one, other), "the result depends on the order of threads"

    assert_gradients_close(got[:-1], exact_gradients(g, x, parameters, activations))
    if dtype != torch.float32:  # whose winners are stock's, and whose layers' gradients are not rounded on the way
        return
    stock = torch.autograd.grad(net.double()(x.double()), list(net.parameters()), g.double())
    assert_gradients_close(got[:-1], stock)
    control.cuda_on_cpu_configure(VENDOR, 0, 0)
    assert_gradients_close(got[:-1], gradients(ops, g, x, parameters, activations)[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_whole_networks_backward_with_views_and_the_inputs_gradient(ops, control, dtype):
    """Operands may be slices at any address, or have any strides; the input's gradient is a third launch."""
    _, parameters = reference_net(1, 10, dtype)
    x, g = torch.randn(5, 1, 32, 32, dtype=dtype), torch.randn(5, 10, dtype=dtype)
    activations = ops.lenet_with_activations(x, parameters)[1:]
    before = control.cuda_on_cpu_launches()
    expected = gradients(ops, g, x, parameters, activations, True)
    assert control.cuda_on_cpu_launches() == before + 3
    without = gradients(ops, g, x, parameters, activations)
    for one, other in zip(without[:-1], expected[:-1], strict=True):
        assert torch.equal(one, other)

    def moved(tensor):
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)

    def strided(tensor):
        return torch.zeros(*tensor.shape, 2, dtype=tensor.dtype).select(-1, 1).copy_(tensor)

    for view in (moved, strided):
        operands = [view(t) for t in (g, x)], [view(p) for p in parameters], [view(a) for a in activations]
        got = gradients(ops, *operands[0], *operands[1:], True)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
        assert all(gradient.is_contiguous() for gradient in got)


@contextlib.contextmanager
def shared_memory(control, kilobytes):
    """What a block can have: on real GPUs 64 KB (7.5), 99 KB (8.6, 8.9, 12.0), 163 KB (8.0) or 227 KB (9.0, 10.0)."""
    control.cuda_on_cpu_set_shared_memory(kilobytes * 1024)
    try:
        yield
    finally:
        control.cuda_on_cpu_set_shared_memory(227 * 1024)


# 100 images: clusters of two blocks. 520, 900, 1,290: blocks of 6, 8 and 10 images, which do not fit but for the last
# in 99 KB: they take all of it.
@pytest.mark.parametrize(
    ("precision", "batch", "kilobytes"),
    [
        ("float32", 100, 99),
        extended("float32", 1290, 64),
        extended("float32", 1290, 99),
        extended("tf32", 520, 64),
        extended("float16", 900, 50),
    ],
)
def test_the_whole_network_with_less_shared_memory(ops, control, precision, batch, kilobytes):
    """Fewer images pass through a block at once, with the same result."""
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    x = torch.randn(batch, 1, 32, 32, dtype=dtype)
    with tf32_allowed(precision == "tf32", precision == "tf32"):
        expected = ops.lenet(x, parameters)
        with shared_memory(control, kilobytes):
            assert torch.equal(ops.lenet(x, parameters), expected)


@pytest.mark.parametrize("kilobytes", [64, extended(80)])
def test_the_whole_networks_backward_with_less_shared_memory(ops, control, kilobytes):
    """Slices of three images pass one by one or by twos instead of together."""
    _, parameters = reference_net(1, 10, torch.float32)
    x, g = torch.randn(513, 1, 32, 32), torch.randn(513, 10)
    activations = ops.lenet_with_activations(x, parameters)[1:]
    expected = gradients(ops, g, x, parameters, activations)
    with shared_memory(control, kilobytes):
        got = gradients(ops, g, x, parameters, activations)
    assert_gradients_close(got, [gradient.double() for gradient in expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_whole_networks_backward_passes_nan_on(ops, control, dtype):
    """NaN in one image, or in the gradient of its output, reaches what it reaches layer by layer."""
    _, parameters = reference_net(1, 10, dtype)
    for where in ("input", "grad_output"):
        x, g = torch.randn(9, 1, 32, 32, dtype=dtype), torch.randn(9, 10, dtype=dtype)
        (x[6, 0, 15] if where == "input" else g[6, 3:4]).fill_(float("nan"))
        activations = ops.lenet_with_activations(x, parameters)[1:]
        control.cuda_on_cpu_configure(-1, 0, 0)
        got = gradients(ops, g, x, parameters, activations)
        control.cuda_on_cpu_configure(VENDOR, 0, 0)
        for one, other in zip(got, gradients(ops, g, x, parameters, activations), strict=True):
            assert torch.equal(one.isnan(), other.isnan())
        assert bool(got[0].isnan().any())


def test_the_whole_networks_backward_checks_its_activations(ops):
    """The kernels take addresses: what does not fit must not reach them."""
    _, parameters = reference_net(1, 10, torch.float32)
    x, g = torch.randn(3, 1, 32, 32), torch.randn(3, 10)
    names = ["pooled1", "indices1", "pooled2", "indices2", "hidden1", "hidden2"]
    good = dict(zip(names, ops.lenet_with_activations(x, parameters)[1:], strict=True))
    for name, tensor in good.items():
        for bad in (tensor[:2], tensor.double()):
            with pytest.raises(RuntimeError, match=f"lenet_backward: {name} must be"):
                gradients(ops, g, x, parameters, {**good, name: bad}.values())
    with pytest.raises(RuntimeError, match="lenet_backward: grad_output must be"):
        gradients(ops, g[:, :9], x, parameters, good.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_of_the_16_bit_types(ops, dtype):
    """Every value there is, and sums that have to be rounded; on the GPU the hardware converts."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    pairs = torch.stack([every, every[torch.randperm(2**16)]]).view(1, 2, 256, 256)
    options = list({**PLAIN, "pool_kernel_size": [1, 1], "pool_stride": [1, 1]}.values())
    alive = torch.zeros(1, 1, 256, 256, dtype=torch.uint8)
    for images in (pairs[:, :1], pairs):
        got = ops.conv_at_indices(images, torch.ones(1, images.size(1), 1, 1, dtype=dtype), None, alive, *options)
        expected = images.float().sum(1, keepdim=True).to(dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_the_cost_rule_takes_the_kernels_made_for_lenet(ops, control):
    """One launch for an inference, whatever the batch; the vendor's convolution for a layer of VGG, and one launch."""
    options = list(PLAIN.values())
    for batch, x, w in [
        (1, (1, 32, 32), (6, 1, 5, 5)),
        (40, (6, 14, 14), (16, 6, 5, 5)),
        (2, (64, 16, 16), (64, 64, 3, 3)),
    ]:
        before = control.cuda_on_cpu_launches()
        ops.conv_relu_max_pool2d(torch.randn(batch, *x), torch.randn(w), None, *options, False)
        assert control.cuda_on_cpu_launches() == before + 1


def test_a_failed_launch_names_operator_kernel_and_shape(ops):
    """More than 64-bit arithmetic can break: here a convolution whose planes are too large for the kernels."""
    x = torch.empty(1, 1, 1, 1).expand(1, 1, 2**16, 2**16)
    with pytest.raises(RuntimeError, match=r"conv_relu_max_pool2d: input's padded planes .* 65536 x 65536"):
        ops.conv_relu_max_pool2d(x, torch.ones(1, 1, 1, 1), None, *PLAIN.values(), False)


# The suites of the operators, rerun in float32. What is left out: layers of other nets, which take fibers minutes; and
# NaN in conv2's weight, whose products with the border of zeros around the gradient map reach more pixels than in
# stock.
SUITES = ["operators/test_conv_relu_max_pool2d.py", "operators/test_linear.py", "operators/test_odd_cases.py"]
GRADCHECK = ["autograd/test_gradcheck.py"]
LEFT_OUT = "layers_of_real_nets or long_sums or many or (non_finite and (bfloat16 or float64 or lenet and weight))"


def rerun(suites, selected, **variables):
    """Test files of the operators, with the CUDA side in the CPU's place."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HYPOTHESIS_PROFILE": "cuda_on_cpu",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "cuda_on_cpu.plugin", "-p", "no:cacheprovider"]
    command += ["-k", selected, *(str(TESTS / name) for name in suites)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("algorithm", "suites"),
    [("direct", SUITES), extended("direct", GRADCHECK), extended("vendor", SUITES + GRADCHECK)],
    ids=["direct", "gradcheck", "vendor"],
)
def test_the_operators_own_tests(control, algorithm, suites):
    rerun(suites, f"not ({LEFT_OUT})", LENET_EXT_ALGORITHM=algorithm)


def test_the_operators_schemas(control):
    """What an operator returns shares no memory with its arguments, and none of its results with another."""
    rerun(["operators/test_opcheck.py"], "test_backward or TestLeNet")


@pytest.mark.extended
def test_driver_under_the_sanitizers():
    """Every kernel against plain loops, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if not build.has_sanitizers():
        pytest.skip("the compiler has no AddressSanitizer or UndefinedBehaviorSanitizer")
    done = subprocess.run([build.driver(), "1"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert done.stdout.rstrip().endswith(", 0 failed")


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("early_return", "thread 0 waits at the block barrier .*, but thread 3 has returned"),
        ("divergent_barrier", "thread 0 waits at the block barrier .*, but thread 32 waits at the block barrier"),
        ("partial_shuffle", "thread 0 waits at the warp barrier .*, but thread 16 has returned"),
        ("overrun", "outside of the block's shared memory"),
        ("too_much_shared", "invalid argument"),
        ("no_threads", "limits"),
        ("odd_cluster", "the cluster .*, or does not divide the grid"),
        (
            "early_block",
            "thread 0 of block 0 waits at the cluster barrier .*, but thread 0 of block 1 has returned",
        ),
    ],
)
def test_the_stand_in_finds_mistakes(kernel, says):
    done = subprocess.run([build.broken(), kernel], capture_output=True, text=True, check=True)

    assert re.match(f"{kernel}: .*{says}", done.stdout), done.stdout


def test_the_stand_in_shows_races_and_unwritten_memory():
    def rows(kernel):
        done = subprocess.run([build.broken(), kernel], capture_output=True, text=True, check=True)
        return [line.split() for line in done.stdout.splitlines()]

    expected = [f"{95 - i}" for i in range(64)]
    assert rows("correct") == [expected] * 3
    assert all("nan" in row for row in rows("missing_barrier"))
    assert len({*map(tuple, rows("missing_barrier"))}) == 3
    assert rows("unwritten") == [["nan"] * 64] * 3
    assert rows("cluster") == [["2"] * 64] * 3
    assert len({*map(tuple, rows("missing_cluster_barrier"))}) > 1
    assert rows("copies") == [["1"] * 64] * 3
    assert rows("unfinished_copies") == [["1", "nan"] * 32] * 3
