"""The CUDA kernels of single layers, on the CPU, against stock torch: every dtype, schedule and way to launch them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from cuda_on_cpu.stand_in import (
    DIRECT,
    NEEDS_COMPILER,
    ON_TENSOR_CORES,
    PLAIN,
    SCHEDULES,
    SHAPES,
    VENDOR,
    dtype_of,
    extended,
    gradients,
    moved,
    stock,
    tf32_allowed,
    under_schedules,
    without_tensor_cores,
)

pytestmark = NEEDS_COMPILER

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def integers(*shape, dtype):
    """Sums of products of these are exact in every dtype, and full of ties."""
    return torch.randint(-1, 2, shape).to(dtype)


def layer_operands(name, dtype, batch):
    (_, *image), weight, o = SHAPES[name]
    shapes = [(batch, *image), weight, weight[:1]]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes], list(o.values())


# What rounding the operands does to a sum, in parts of the sum of its terms' magnitudes, and what rounding it does.
OPERANDS = {"tf32": 2**-10, "float16": 1e-6, "bfloat16": 1e-6}


RESULT = {"tf32": 0, "float16": 2**-11, "bfloat16": 2**-8}


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


def dense_maps(g, codes):
    """The gradients of conv2's outputs, [batch, 16, 10, 10], zero but for the winners'."""
    windows = torch.stack([g.where(codes == position, 0) for position in range(4)], -1).double()
    return windows.unflatten(-1, (2, 2)).transpose(3, 4).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [2, 129, 257, extended(897)], ids=str)
def test_the_gradient_of_conv2s_input_is_exact(ops, batch, dtype):
    """Small integers, any winners, and what is not finite; 1, 2, 4 and 8 images in a block, the last not full."""
    g, w = integers(batch, 16, 5, 5, dtype=dtype), integers(16, 6, 5, 5, dtype=dtype)
    codes = torch.tensor([0, 1, 2, 3, 255])[torch.randint(5, g.shape)].byte()
    g[1, 7, 2, 3], codes[1, 7, 2, 3] = float("inf"), 2
    x = torch.zeros(batch, 6, 14, 14, dtype=dtype)

    def gradient(weight):
        rest = [x.shape, w.shape, *PLAIN.values(), [True, False, False]]
        return ops.conv_relu_max_pool2d_backward(g, codes, x, weight, *rest)[0]

    def dense(weight):
        return F.fold(weight.double().flatten(1).T @ dense_maps(g, codes).flatten(2), 14, 5).to(dtype)

    torch.testing.assert_close(gradient(w), dense(w), rtol=0, atol=0, equal_nan=True)
    w[3, 2, 4, 0], w[15, 5, 0, 4], w[0, 0, 2, 2] = float("nan"), float("inf"), float("-inf")
    torch.testing.assert_close(gradient(w), dense(w), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [2, 257, extended(769), extended(1025)], ids=str)
def test_the_gradient_of_conv2s_weights_is_exact(ops, batch, dtype):
    """Small integers, any winners, and what is not finite; 1, 2, 4 and 5 images in a slice, in passes of 4."""
    g, x = integers(batch, 16, 5, 5, dtype=dtype), integers(batch, 6, 14, 14, dtype=dtype)
    codes = torch.tensor([0, 1, 2, 3, 255])[torch.randint(5, g.shape)].byte()
    w = torch.zeros(16, 6, 5, 5, dtype=dtype)

    def check(g, x):
        rest = [x.shape, w.shape, *PLAIN.values(), [False, True, True]]
        _, weight, bias = ops.conv_relu_max_pool2d_backward(g, codes, x, w, *rest)
        maps, seen = dense_maps(g, codes).flatten(2), F.unfold(x.double(), 5)
        dense = torch.einsum("nop, nkp -> ok", maps, seen).view_as(w).to(dtype)
        torch.testing.assert_close(weight, dense, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(bias, maps.sum((0, 2)).to(dtype), rtol=0, atol=0, equal_nan=True)

    check(g, x)
    # At the edges a pixel has taps that no other place shares. Of the last image, that of a slice that is not full.
    for pixel in [(0, 0, 0), (5, 13, 13), (3, 0, 13), (2, 9, 6)]:
        for value in (float("nan"), float("inf"), float("-inf")):
            pixels = x.clone()
            pixels[-1][pixel] = value
            check(g, pixels)
            if batch > 2:
                break
    of_output = g.clone()
    of_output[0, 3, 2, 1], codes[0, 3, 2, 1] = float("inf"), 2
    check(of_output, x)


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
            control, DIRECT, lambda: ops.conv_relu_max_pool2d_with_indices(*operands, *options, False)
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
def test_a_layer_on_the_tensor_cores_does_not_see_the_batch(ops, control, precision, name):
    """Bit by bit: results depend on how many images a block has as little as on an image's place, or on addresses."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    (x, w, b), options = layer_operands(name, dtype_of(precision), 131)  # two images in a block; the last has one
    odd = moved(x)
    with tf32_allowed(precision == "tf32", False):
        whole = ops.conv_relu_max_pool2d_with_indices(x, w, b, *options, False)
        for begin, end in [(0, 131), (0, 1), (117, 131)]:
            part = ops.conv_relu_max_pool2d_with_indices(odd[begin:end], w, b, *options, False)
            for one, other in zip(part, whole, strict=True):
                assert torch.equal(one, other[begin:end])


@pytest.mark.parametrize("name", ["conv1", "conv2"])
@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_a_layer_on_the_tensor_cores_is_exact_where_sums_are(ops, control, precision, name):
    """Small integers, full of ties: the first of equals wins."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
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


@pytest.mark.parametrize(("convolutions", "products"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_a_layer_is_tf32_only_where_convolutions_may_be(ops, control, name, convolutions, products):
    """As stock's convolution; otherwise, and without tensor cores, bit by bit what it always was."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)  # by the rule few images of the first layer are strict
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


@pytest.mark.parametrize(("name", "batch", "faster"), [("conv1", 255, False), ("conv1", 256, True), ("conv2", 1, True)])
def test_a_layer_is_strict_where_that_is_faster(ops, control, name, batch, faster):
    operands, options = layer_operands(name, torch.float32, batch)

    def layer():
        return ops.conv_relu_max_pool2d(*operands, *options, False)

    with tf32_allowed(False, False):
        strict = layer()
    with tf32_allowed(True, False):
        assert torch.equal(layer(), strict) == (not faster)


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
def test_a_layer_on_the_tensor_cores_with_non_finite_operands(ops, control, precision, name, operand, value):
    """They reach the outputs that they reach in stock, and no others."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    operands, options = layer_operands(name, dtype_of(precision), 3)
    operands[["input", "weight", "bias"].index(operand)].view(-1)[-7:-6] = value
    if operand == "input":
        operands[0][1, 0, 9, 10] = value
    with tf32_allowed(precision == "tf32", False):
        output = ops.conv_relu_max_pool2d(*operands, *options, False).double()
    expected = stock(*[t.double() for t in operands], PLAIN)
    scale = 1 + float(expected[expected.isfinite()].abs().max())
    torch.testing.assert_close(output, expected, rtol=0, atol=2**-8 * scale, equal_nan=True)


MASKS = [mask for mask in itertools.product([False, True], repeat=3) if any(mask)]


def gradient_operands(name, dtype, batch):
    """Gradient of the output, winners (one in five of them none), input and weight; and what the operator takes too."""
    (x, w, _), options = layer_operands(name, dtype, batch)
    size = (x.size(-1) - 4) // 2
    g = torch.randn(batch, w.size(0), size, size).to(dtype)
    codes = torch.tensor([0, 1, 2, 3, 255])[torch.randint(5, g.shape)].byte()
    return [g, codes, x, w], [x.shape, w.shape, *options]


def dense_gradients(g, codes, x, w):
    """As stock computes them, in float64: from the gradient of the convolution's output, zeros and all."""
    windows = torch.stack([g.double().where(codes == position, 0) for position in range(4)], -1)
    maps = windows.unflatten(-1, (2, 2)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    of_input = torch.nn.grad.conv2d_input(x.shape, w.double(), maps)
    return of_input, torch.nn.grad.conv2d_weight(x.double(), w.shape, maps), maps.sum((0, 2, 3))


def off(got, expected):
    return float((got.double() - expected).norm()) / float(expected.norm())


# What a sum of products may be away from, relative to all of them together: operands and, in 16 bits, results rounded.
OF_GRADIENTS = {"tf32": 2e-3, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.parametrize("batch", [1, extended(2), 3, extended(9), extended(17)])
@pytest.mark.parametrize("name", ["conv1", "conv2"])
@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_a_layers_gradients_on_the_tensor_cores(ops, control, precision, name, batch):
    """One launch for both gradients of the second layer, then that of the sums; operands may lie at any address."""
    (g, codes, x, w), rest = gradient_operands(name, dtype_of(precision), batch)

    def backward(mask, of=lambda tensor: tensor):
        return ops.conv_relu_max_pool2d_backward(of(g), of(codes), of(x), of(w), *rest, list(mask))

    expected = dense_gradients(g, codes, x, w)
    with tf32_allowed(precision == "tf32", False):
        before = control.cuda_on_cpu_launches()
        every = under_schedules(control, DIRECT, lambda: backward([True] * 3))
        assert control.cuda_on_cpu_launches() - before == len(SCHEDULES) * (3 if name == "conv1" else 2)
        for one, other in zip(backward([True] * 3, moved), every, strict=True):
            assert torch.equal(one, other)
        for mask in MASKS:
            some = backward(mask)
            for i in range(3):
                if not mask[i]:
                    assert some[i].shape == (0,)
                elif i < 2 or mask[1]:
                    assert torch.equal(some[i], every[i])
                else:  # a strict kernel's
                    assert off(some[i], expected[i]) <= OF_GRADIENTS[precision]
    assert max(off(*pair) for pair in zip(every, expected, strict=True)) <= OF_GRADIENTS[precision]


@pytest.mark.parametrize("name", ["conv1", "conv2"])
@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_a_layers_gradients_on_the_tensor_cores_are_exact_where_sums_are(ops, control, precision, name):
    """Small integers; and what is not finite reaches what it reaches in stock."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    operands, rest = gradient_operands(name, dtype_of(precision), 5)

    def check(g, codes, x, w):
        with tf32_allowed(precision == "tf32", False):
            got = ops.conv_relu_max_pool2d_backward(g, codes, x, w, *rest, [True] * 3)
        for one, other in zip(got, dense_gradients(g, codes, x, w), strict=True):
            torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=0, equal_nan=True)

    g, codes, x, w = (t if t.dtype == torch.uint8 else integers(*t.shape, dtype=t.dtype) for t in operands)
    check(g, codes, x, w)
    # The corners have taps that no other position shares. In the second image of a pass, and in one that is alone.
    size, pooled = x.size(-1) - 1, g.size(-1) - 1
    for value in (float("nan"), float("inf"), float("-inf")):
        for image in (1, 4):
            for channel, y, xx in [(0, 0, 0), (-1, size, size), (-1, 0, size), (0, 9, 6)]:
                pixels = x.clone()
                pixels[image, channel, y, xx] = value
                check(g, codes, pixels, w)
            for channel, y, xx in [(0, 0, 0), (-1, pooled, pooled), (3, 2, 1)]:
                of_output, winners = g.clone(), codes.clone()
                of_output[image, channel, y, xx], winners[image, channel, y, xx] = value, 3
                check(of_output, winners, x, w)
        for place in [(0, 0, 0, 0), (-1, -1, 4, 4), (3, 0, 2, 1)]:
            weight = w.clone()
            weight[place] = value
            check(g, codes, x, weight)


@pytest.mark.parametrize("batch", [3, extended(17)])
@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_the_layers_gradients_are_those_of_the_whole_network(ops, control, precision, batch):
    """Bit by bit, on the tensor cores: what lies between the layers is rounded to what it is multiplied as. With more
    than 128 classes the linear layers are one operator after the other in both.
    """
    dtype = dtype_of(precision)
    shapes = [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (129, 84), (129,)]
    parameters = [(torch.randn(s) * (0.1 if len(s) > 1 else 1)).to(dtype) for s in shapes]
    x, g = torch.randn(batch, 1, 32, 32, dtype=dtype), torch.randn(batch, 129, dtype=dtype)
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    with tf32_allowed(precision == "tf32", precision == "tf32"):
        activations = ops.lenet_with_activations(x, parameters)[1:]
        expected = gradients(ops, g, x, parameters, activations)[:4]
        pooled1, indices1, pooled2, indices2, hidden1, hidden2 = activations
        grad = ops.linear_backward(g, hidden2, parameters[8], [True] * 3)[0]
        grad = ops.linear_relu_backward(grad, hidden2, hidden1, parameters[6], [True] * 3)[0]
        grad = ops.linear_relu_backward(grad, hidden1, pooled2.flatten(1), parameters[4], [True] * 3)[0]
        got = []
        for of, winners, weight in [(pooled1, indices2, parameters[2]), (x, indices1, parameters[0])]:
            rest = [of.shape, weight.shape, *PLAIN.values(), [of is pooled1, True, True]]
            grad, *both = ops.conv_relu_max_pool2d_backward(grad.view(winners.shape), winners, of, weight, *rest)
            got = [*both, *got]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_a_layers_gradients_are_tf32_only_where_convolutions_may_be(ops, control, name):
    """Otherwise, and without tensor cores, bit by bit what they always were."""
    (g, codes, x, w), rest = gradient_operands(name, torch.float32, 3)

    def rounds():
        results = []
        for algorithm in (-1, DIRECT):  # by the rule few images are strict
            control.cuda_on_cpu_configure(algorithm, 0, 0)
            results.append(ops.conv_relu_max_pool2d_backward(g, codes, x, w, *rest, [False, True, True])[1])
        return not torch.equal(*results)

    with tf32_allowed(False, True):
        assert not rounds()
    with tf32_allowed(True, False):
        assert rounds()
        with without_tensor_cores(control):
            assert not rounds()


@pytest.mark.parametrize(
    ("name", "batch", "faster"), [("conv1", 511, False), ("conv1", 512, True), extended("conv2", 512, True)]
)
def test_a_layers_gradients_are_strict_where_that_is_faster(ops, name, batch, faster):
    (g, codes, x, w), rest = gradient_operands(name, torch.float32, batch)

    def backward():
        return ops.conv_relu_max_pool2d_backward(g, codes, x, w, *rest, [False, True, False])[1]

    with tf32_allowed(False, False):
        strict = backward()
    with tf32_allowed(True, False):
        assert torch.equal(backward(), strict) == (not faster)


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


AVERAGES = {
    "plain": ([2, 2], [2, 2], [0, 0], False, True, None),
    "overlapping": ([3, 2], [2, 1], [1, 1], True, False, None),
    "gaps, divisor": ([2, 2], [3, 3], [1, 0], True, True, 8),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AVERAGES)
def test_average_pooling_is_stocks_and_independent_of_the_schedule(ops, control, name, dtype, channels_last):
    """To the last bit, in every dtype: in 16 bits a result is rounded once."""
    kernel, *options = AVERAGES[name]
    x = torch.randn(3, 5, 9, 8).to(dtype)
    x[0, 0, 0, :4] = torch.tensor([0.0, -0.0, float("-inf"), float("inf")])
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    leaf = x.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    expected = F.avg_pool2d(F.relu(leaf), kernel, *options)
    g = torch.randn(expected.shape).to(dtype)
    (expected_grad,) = torch.autograd.grad(expected, leaf, g.to(leaf.dtype))
    output = under_schedules(control, -1, lambda: ops.relu_avg_pool2d(x, kernel, *options))[0]
    grad = under_schedules(control, -1, lambda: ops.relu_avg_pool2d_backward(g, x, kernel, *options))[0]
    for actual, want in ((output, expected.detach()), (grad, expected_grad)):
        torch.testing.assert_close(actual, want.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert actual.is_contiguous(memory_format=torch.channels_last) == channels_last
    before = control.cuda_on_cpu_launches()
    assert ops.relu_avg_pool2d(x[:0], kernel, *options).shape[0] == 0
    assert control.cuda_on_cpu_launches() == before


def test_nan_passes_average_pooling_and_its_gradient(ops):
    x = torch.tensor([[float("nan"), -1.0, 2.0, -2.0]]).repeat(2, 1)[None, None]
    output = ops.relu_avg_pool2d(x, [2, 2], [2, 2], [0, 0], False, True, None)
    torch.testing.assert_close(output, torch.tensor([[[[float("nan"), 1.0]]]]), equal_nan=True)
    grad = ops.relu_avg_pool2d_backward(torch.ones_like(output), x, [2, 2], [2, 2], [0, 0], False, True, None)
    assert torch.equal(grad, torch.tensor([[0.25, 0.0, 0.25, 0.0]]).repeat(2, 1)[None, None])


def test_average_pooling_of_planes_that_are_too_large(ops):
    x = torch.empty(1, 1, 1, 1).expand(1, 1, 2**16, 2**16)
    with pytest.raises(RuntimeError, match=r"relu_avg_pool2d: input's padded planes .* 65536 x 65536"):
        ops.relu_avg_pool2d(x, [2**15, 2**15], [2**15, 2**15], [0, 0], False, True, None)
