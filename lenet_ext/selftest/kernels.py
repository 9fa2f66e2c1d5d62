"""The kernels' values against stock torch in float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lenet_ext import functional
from lenet_ext.net import Net, ReferenceNet
from lenet_ext.selftest.comparing import (
    DTYPES,
    Checks,
    MismatchError,
    eighths,
    expect_equal,
    short,
    stock_conv,
    whole,
    with_gradients,
)

__all__ = ["average_exact", "conv_exact", "layouts", "linear_exact", "net", "rounding", "special_values", "threads"]


@dataclass(frozen=True)
class ConvCase:
    """Arguments of one call of ``conv_relu_max_pool2d``."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, int, int, int]
    options: dict[str, Any]
    bias: bool = True


def _conv(name: str, input: tuple[int, ...], weight: tuple[int, int, int, int], **options: Any) -> ConvCase:
    bias = options.pop("bias", True)
    return ConvCase(name, input, weight, options, bias)


_CONV_CASES = (
    _conv("LeNet conv1", (17, 1, 32, 32), (6, 1, 5, 5)),
    _conv("LeNet conv2", (17, 6, 14, 14), (16, 6, 5, 5)),
    _conv("one picture", (1, 1, 32, 32), (6, 1, 5, 5)),
    _conv("unbatched", (3, 11, 13), (5, 3, 3, 3)),
    _conv("empty batch", (0, 3, 8, 8), (4, 3, 3, 3)),
    _conv("no bias", (2, 3, 9, 9), (7, 3, 3, 3), bias=False),
    _conv("1x1 convolution", (2, 5, 6, 7), (3, 5, 1, 1)),
    _conv("pool of one", (2, 3, 6, 7), (4, 3, 3, 3), pool_kernel_size=1),
    _conv("stride and padding", (2, 3, 15, 14), (5, 3, 3, 4), stride=(2, 1), padding=(1, 2)),
    _conv("padding same, even kernel", (2, 2, 9, 8), (3, 2, 4, 2), padding="same"),
    _conv("dilation", (2, 3, 16, 15), (4, 3, 3, 2), dilation=(2, 3), padding=2),
    _conv("groups", (2, 6, 10, 10), (9, 2, 3, 3), groups=3, padding=1),
    _conv("depthwise", (2, 8, 10, 11), (8, 1, 3, 3), groups=8),
    _conv("overlapping pool", (2, 3, 17, 18), (6, 3, 3, 3), pool_kernel_size=3, pool_stride=2, pool_padding=1),
    _conv("pool with gaps", (2, 3, 17, 18), (6, 3, 3, 3), pool_kernel_size=2, pool_stride=3),
    _conv("pool dilation", (2, 3, 17, 18), (6, 3, 3, 3), pool_kernel_size=(2, 3), pool_dilation=(3, 2)),
    _conv("ceil mode", (2, 3, 14, 13), (5, 3, 2, 3), pool_kernel_size=3, pool_stride=2, ceil_mode=True),
    _conv("windows do not divide the size", (2, 1, 31, 29), (6, 1, 5, 5)),
    _conv("odd channel counts", (3, 19, 9, 9), (33, 19, 3, 3), padding=1),
    _conv("kernel as large as the picture", (2, 3, 5, 4), (4, 3, 5, 3), pool_kernel_size=(1, 2)),
    _conv("many channels", (2, 64, 10, 10), (48, 64, 3, 3), padding=1),
)


def conv_exact(device: torch.device) -> Checks:
    """``conv_relu_max_pool2d`` and its gradients, with every option."""
    for case, draw, dtype in product(_CONV_CASES, (whole, eighths), DTYPES):
        # Sums of products of eighths have more bits than a bfloat16.
        if draw is whole or dtype != torch.bfloat16:
            yield f"{case.name}, {short(dtype)}", partial(_conv_exact, device, case, draw, dtype)


def _conv_exact(device: torch.device, case: ConvCase, draw: Callable[..., Tensor], dtype: torch.dtype) -> None:
    stock = stock_conv(**case.options)
    tensors = [draw(case.input), draw(case.weight), draw(case.weight[:1]) if case.bias else None]
    with torch.no_grad():
        grad = whole(stock(*tensors).shape, 2)
    expected = with_gradients(stock, tensors, lambda output: grad)
    moved = [None if tensor is None else tensor.to(device, dtype) for tensor in tensors]
    ours: Callable[..., Tensor] = partial(functional.conv_relu_max_pool2d, **case.options)
    expect_equal(with_gradients(ours, moved, grad.to), expected, dtype)
    with torch.no_grad():  # another operator: the one without winners
        expect_equal([ours(*moved)], expected[:1], dtype)


_LINEAR_CASES: tuple[tuple[str, tuple[int, ...], int, bool], ...] = (  # name, input, features of the output, bias
    ("LeNet fc1", (17, 400), 120, True),
    ("LeNet fc2", (1, 120), 84, True),
    ("LeNet fc3", (64, 84), 10, True),
    ("no bias", (5, 7), 3, False),
    ("vector", (13,), 5, True),
    ("leading dimensions", (2, 3, 4, 9), 6, True),
    ("empty batch", (0, 8), 4, True),
    ("one by one", (3, 1), 1, True),
    ("many rows", (700, 33), 65, True),
)


def linear_exact(device: torch.device) -> Checks:
    """``linear``, ``linear_relu`` and their gradients."""
    for (name, shape, features, bias), relu, dtype in product(_LINEAR_CASES, (False, True), DTYPES):
        what = "linear_relu" if relu else "linear"
        yield f"{what} {name}, {short(dtype)}", partial(_linear_exact, device, shape, features, bias, relu, dtype)


def _linear_exact(
    device: torch.device, shape: tuple[int, ...], features: int, bias: bool, relu: bool, dtype: torch.dtype
) -> None:
    tensors = [whole(shape), whole((features, shape[-1])), whole((features,)) if bias else None]
    grad = whole((*shape[:-1], features), 2)

    def stock(*t: Tensor) -> Tensor:
        return F.relu(F.linear(*t)) if relu else F.linear(*t)

    # Looked up here, so that the check is of what a user calls.
    ours = functional.linear_relu if relu else functional.linear
    expected = with_gradients(stock, tensors, lambda output: grad)
    moved = [None if tensor is None else tensor.to(device, dtype) for tensor in tensors]
    expect_equal(with_gradients(ours, moved, grad.to), expected, dtype)


_AVERAGE_CASES: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (  # name, input, options
    ("LeNet", (9, 6, 28, 28), {"kernel_size": 2}),
    ("odd sizes", (2, 17, 9, 37), {"kernel_size": 2}),
    ("unbatched", (3, 8, 8), {"kernel_size": 2}),
    ("empty batch", (0, 3, 8, 8), {"kernel_size": 2}),
    ("overlapping", (2, 5, 12, 11), {"kernel_size": 4, "stride": (1, 2), "padding": 2}),
    ("gaps, divisor", (2, 5, 12, 11), {"kernel_size": (2, 3), "stride": 4, "ceil_mode": True, "divisor_override": 8}),
)


def average_exact(device: torch.device) -> Checks:
    """``relu_avg_pool2d`` and its gradient. All divisors are powers of two."""
    for (name, shape, options), channels_last, dtype in product(_AVERAGE_CASES, (False, True), DTYPES):
        if not channels_last or len(shape) == 4:
            what = f"{name}, {'channels_last' if channels_last else 'contiguous'}, {short(dtype)}"
            yield what, partial(_average_exact, device, shape, options, channels_last, dtype)


def _average_exact(
    device: torch.device, shape: tuple[int, ...], options: dict[str, Any], channels_last: bool, dtype: torch.dtype
) -> None:
    images = whole(shape)
    stock = F.avg_pool2d(F.relu(images), **options)
    grad = whole(stock.shape, 2)
    expected = with_gradients(lambda x: F.avg_pool2d(F.relu(x), **options), [images], lambda output: grad)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    moved = images.to(device, dtype).contiguous(memory_format=memory_format)
    ours: Callable[..., Tensor] = partial(functional.relu_avg_pool2d, **options)
    expect_equal(with_gradients(ours, [moved], grad.to), expected, dtype)


def layouts(device: torch.device) -> Checks:
    """Strides of every kind, in inputs, weights and gradients."""
    memory: dict[str, Callable[[Tensor], Tensor]] = {
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "sliced": _sliced,
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, dtype in product(memory, DTYPES):
        check = partial(_layout, device, memory[name], name == "channels_last", dtype)
        yield f"{name}, {short(dtype)}", check
    yield "linear, transposed", partial(_transposed_linear, device)


def _sliced(tensor: Tensor) -> Tensor:
    """Every second value of every dimension of a larger tensor, which is NaN elsewhere."""
    large = torch.full([2 * size for size in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
    return large[tuple(slice(0, None, 2) for _ in tensor.shape)].copy_(tensor)


def _layout(device: torch.device, layout: Callable[[Tensor], Tensor], channels_last: bool, dtype: torch.dtype) -> None:
    tensors = [whole((3, 4, 12, 14)), whole((8, 4, 3, 3)), whole((8,))]
    expected = with_gradients(stock_conv(), tensors, torch.ones_like)
    found = with_gradients(
        lambda images, weight, bias: functional.conv_relu_max_pool2d(layout(images), layout(weight), bias),
        [tensor.to(device, dtype) for tensor in tensors],
        # Stride 0 in all dimensions, as the gradient that sum() sends back.
        lambda output: output.new_ones(()).expand(output.shape),
    )
    expect_equal(found, expected, dtype)
    if found[0].is_contiguous(memory_format=torch.channels_last) != channels_last:
        raise MismatchError(f"output has strides {found[0].stride()}")


def _transposed_linear(device: torch.device) -> None:
    rows, matrix = whole((9, 7)), whole((9, 5))
    moved = [tensor.to(device, torch.float32) for tensor in (rows, matrix)]
    found = functional.linear(moved[0].t(), moved[1].t())
    expect_equal([found], [F.linear(rows.t(), matrix.t())], torch.float32)


def special_values(device: torch.device) -> Checks:
    """What is no ordinary number goes through as in stock."""
    for value, dtype in product((torch.nan, torch.inf, -torch.inf, -0.0), DTYPES):
        yield f"{value}, {short(dtype)}", partial(_special_value, device, value, dtype)


def _special_value(device: torch.device, value: float, dtype: torch.dtype) -> None:
    images, weight, bias = whole((2, 2, 12, 12)), whole((6, 2, 3, 3)), whole((6,))
    matrix = weight[0, 0].repeat(1, 4)
    images[torch.rand(images.shape) < 0.02] = value
    expected = [stock_conv()(images, weight, bias), F.relu(F.linear(images, matrix))]
    images, weight, bias, matrix = (tensor.to(device, dtype) for tensor in (images, weight, bias, matrix))
    found = [functional.conv_relu_max_pool2d(images, weight, bias), functional.linear_relu(images, matrix)]
    for ours, stock in zip(found, expected, strict=True):
        expect_equal([ours], [stock], dtype)


def rounding(device: torch.device) -> Checks:
    """Random numbers: at most twice the error that stock makes in the same dtype."""
    for dtype in DTYPES:
        yield short(dtype), partial(_rounding, device, dtype)


def _rounding(device: torch.device, dtype: torch.dtype) -> None:
    images = torch.randn(9, 6, 14, 14, dtype=torch.float64).to(dtype)
    weight = torch.randn(16, 6, 5, 5, dtype=torch.float64).div(12).to(dtype)
    rows, matrix = torch.randn(33, 400).to(dtype), torch.randn(120, 400).div(20).to(dtype)
    for ours, stock, tensors in (
        (functional.conv_relu_max_pool2d, stock_conv(), (images, weight)),
        (functional.linear, F.linear, (rows, matrix)),
    ):
        exact = stock(*(tensor.double() for tensor in tensors))
        theirs = (stock(*tensors).double() - exact).abs().max()
        found = ours(*(tensor.to(device) for tensor in tensors)).double().cpu()
        error = (found - exact).abs().max()
        # A few units in the last place, where stock happens to be exact; more in float64, where it is the yardstick.
        few = 32 if dtype == torch.float64 else 4
        if not error <= 2 * theirs + few * torch.finfo(dtype).eps * exact.abs().max():
            raise MismatchError(f"error {error:.2e}, stock {theirs:.2e}")


def net(device: torch.device) -> Checks:
    """The whole network, logits and gradients of a loss."""
    for dtype, batch in product((torch.float64, torch.float32), (1, 7, 33, 64)):
        yield f"batch {batch}, {short(dtype)}", partial(_net, device, dtype, batch)


def _net(device: torch.device, dtype: torch.dtype, batch: int) -> None:
    reference = ReferenceNet(dtype=torch.float64)
    fused = Net(dtype=dtype, device=device)
    fused.load_state_dict(reference.state_dict())
    candidates = torch.randn(2 * batch + 8, 1, 32, 32, dtype=dtype)
    images, labels = candidates[has_clear_winners(reference, candidates)][:batch], torch.randint(10, (batch,))
    found, expected = fused(images.to(device)), reference(images.double())
    F.cross_entropy(found, labels.to(device)).backward()
    F.cross_entropy(expected, labels).backward()
    with torch.no_grad():
        pairs = [("logits", found, expected), ("logits without gradient", fused(images.to(device)), expected)]
    parameters = zip(fused.named_parameters(), reference.parameters(), strict=True)
    pairs += [(name, ours.grad, stock.grad) for (name, ours), stock in parameters]  # type: ignore[misc]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for name, ours, stock in pairs:
        error = torch.linalg.vector_norm(ours.detach().double().cpu() - stock.detach())
        if not error <= tolerance * torch.linalg.vector_norm(stock.detach()):
            raise MismatchError(f"{name} differs by {error:.2e}")


def has_clear_winners(net: ReferenceNet, images: Tensor, gap: float = 1e-5) -> Tensor:
    """Which images choose the same winners and signs in `net` after any rounding in float32.

    Two right answers have other gradients where two positions of a pooling window are nearly equal, or ReLU's input is
    nearly 0: in one of 64 images of noise, now and then.
    """
    clear, features = torch.ones(images.shape[0], dtype=torch.bool), images.double()
    with torch.no_grad():
        for convolution in (net.conv1, net.conv2):
            windows = convolution(features).unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
            first, second = windows.topk(2).values.unbind(-1)
            clear &= (((first > gap) & (first - second > gap)) | (first < -gap)).flatten(1).all(1)
            features = first.relu()
        features = features.flatten(1)
        for linear in (net.fc1, net.fc2):
            features = linear(features)
            clear &= (features.abs() > gap).all(1)
            features = features.relu()
    return clear


def threads(device: torch.device) -> Checks:
    """The same bits for any number of threads."""
    # Only our own kernels promise this; the vendor's may split a sum by the number of threads.
    if device.type == "cpu" and os.environ.get("LENET_EXT_ALGORITHM") != "vendor":
        yield "LeNet", _threads


def _threads() -> None:
    fused, images = Net(), torch.randn(67, 1, 32, 32)

    def compute(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        with torch.no_grad():
            logits = fused(images)
        output = fused.conv2(fused.conv1(images))
        return [logits, output, *torch.autograd.grad(output.square().sum(), list(fused.conv1.parameters()))]

    before = torch.get_num_threads()
    most = max(2, before)
    try:
        pairs = list(zip(compute(1), compute(most), strict=True))
    finally:
        torch.set_num_threads(before)
    for one, many in pairs:
        if not torch.equal(one, many):
            raise MismatchError(f"1 and {most} threads differ by {(one - many).abs().max():.2e}")
