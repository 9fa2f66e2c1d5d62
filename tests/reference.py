"""What the fused functions must equal, and how near.

The references have the signatures of `lenet_ext.functional` and consist of stock layers only. Everything else in
this file measures distance to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_relu_max_pool2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    pool_kernel_size=2,
    pool_stride=None,
    pool_padding=0,
    pool_dilation=1,
    ceil_mode=False,
):
    conv = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return F.max_pool2d(F.relu(conv), pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)


def relu_avg_pool2d(input, *args, **kwargs):
    return F.avg_pool2d(F.relu(input), *args, **kwargs)


def linear(input, weight, bias=None):
    return F.linear(input, weight, bias)


# --8<-- [start:linear-relu]
def linear_relu(input, weight, bias=None):
    return F.relu(F.linear(input, weight, bias))


# --8<-- [end:linear-relu]


# --------------------------------------------------------------------------------------------------------------------
# Distance

# Rounding allowed, in units of the dtype's epsilon times the sum of the absolute values of the terms added up
# (so cancellation neither helps nor hurts). 4 leaves room for another order of summation, and magnitudes() adds some
# for long sums; there is none for a term left out or counted twice, for TF32 (eps 2**-10) or for a sum kept in
# bfloat16 (eps 2**-7).
# bfloat16 accumulates in float32 and rounds once at the end, hence 1 where the others have 4.
ROUNDINGS = {torch.float64: 4.0, torch.float32: 4.0, torch.float16: 1.0, torch.bfloat16: 1.0}

# Where stock's own error against float64 is larger than the bound above (very long sums), ours may be this many times
# stock's. Not 1: errors are random, and the largest of a few thousand differs by a small factor between two summation
# orders of equal quality.
STOCK_FACTOR = 3.0


def assert_equal(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    """Same values bit by bit, but for the sign of zero (stock's depends on the size) and the payload of NaN."""
    assert (actual is None) == (expected is None), f"{what}: {actual} instead of {expected}"
    if actual is None or expected is None:
        return
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if not bool(same.all()):
        at = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(f"{what}: {int((~same).sum())} of {same.numel()} differ, first at {at}: "
                             f"{actual[at].item()} instead of {expected[at].item()}")  # fmt: skip


def assert_accurate(actual: Tensor, expected64: Tensor, magnitude64: Tensor, what: str, stock: Tensor | None = None):
    """`actual` is `expected64` within the rounding of its dtype; see ROUNDINGS and STOCK_FACTOR."""
    assert actual.shape == expected64.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected64.shape)}"
    if actual.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    error = (actual.detach().double().cpu() - expected64).abs()
    allowed = ROUNDINGS[actual.dtype] * eps * magnitude64 + torch.finfo(actual.dtype).tiny
    if stock is not None:
        stock_error = (stock.detach().double().cpu() - expected64).abs().max()
        assert bool(stock_error.isfinite()), f"{what}: stock is no yardstick here"
        allowed = allowed.clamp(min=STOCK_FACTOR * float(stock_error))
    excess = torch.where(error <= allowed, 0.0, error / allowed)  # NaN stays, and fails
    assert bool((excess == 0).all()), (
        f"{what}: error {float(error.max()):.3g}, {float(excess.max()):.3g} times what {actual.dtype} allows"
    )


# --------------------------------------------------------------------------------------------------------------------
# Running a function forwards and backwards


@dataclasses.dataclass
class Result:
    """A forward and a backward pass: the output and the gradients of input, weight and bias."""

    output: Tensor
    grads: tuple[Tensor | None, ...]

    def items(self):
        names = ("grad of input", "grad of weight", "grad of bias")
        return [("output", self.output), *zip(names, self.grads, strict=False)]


def run(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], options: dict[str, Any], grad_output):
    """`grad_output` is a tensor, or a function that makes one from the output."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    output = function(*leaves, **options)
    grad = grad_output(output) if callable(grad_output) else grad_output
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(output, wanted, grad.to(output.device, output.dtype)))
    return Result(output.detach(), tuple(None if leaf is None else next(grads) for leaf in leaves))


def to64(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Contiguous float64 copies on the CPU: the yardstick's operands."""
    return [None if t is None else t.detach().to("cpu", torch.float64, copy=True).contiguous() for t in tensors]


def assert_exact(ours, stock, tensors, options: dict[str, Any], grad_output: Tensor) -> None:
    """Output and gradients equal float64 stock's, rounded to the dtype. Only for operands whose sums are exact."""
    dtype = next(t for t in tensors if t is not None).dtype
    actual = run(ours, tensors, options, grad_output)
    expected = run(stock, to64(tensors), options, grad_output.cpu())
    for (what, a), (_, e) in zip(actual.items(), expected.items(), strict=True):
        assert_equal(a, None if e is None else e.to(dtype), what)
    with torch.no_grad():  # another kernel, which keeps nothing for a backward pass
        assert_equal(ours(*tensors, **options), expected.output.to(dtype), "output without gradients")


# --------------------------------------------------------------------------------------------------------------------
# The convolution's pool windows, spelled out: slow, plain, and independent of stock's pooling


def pair(value) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    value = tuple(value)
    return (value[0], value[0]) if len(value) == 1 else value


def pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    spare = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (spare + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1  # the last window has to start inside the input or the left padding
    return out


def windows(conv: Tensor, pool_kernel_size=2, pool_stride=None, pool_padding=0, pool_dilation=1, ceil_mode=False):
    """(..., H, W) -> (..., OH, OW, KH*KW): each pool window in row-major order, -inf in the padding."""
    kernel, padding, dilation = pair(pool_kernel_size), pair(pool_padding), pair(pool_dilation)
    stride = kernel if pool_stride is None else pair(pool_stride)
    oh, ow = (pooled_size(conv.shape[i - 2], kernel[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1))
    reach_h = (oh - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1
    reach_w = (ow - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1
    after_h = max(0, reach_h - padding[0] - conv.shape[-2])
    after_w = max(0, reach_w - padding[1] - conv.shape[-1])
    padded = F.pad(conv, (padding[1], after_w, padding[0], after_h), value=-float("inf"))
    pieces = [
        padded[..., y : y + (oh - 1) * stride[0] + 1 : stride[0], x : x + (ow - 1) * stride[1] + 1 : stride[1]]
        for y in range(0, dilation[0] * kernel[0], dilation[0])
        for x in range(0, dilation[1] * kernel[1], dilation[1])
    ]
    return torch.stack(pieces, -1)


def pool_options(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k.startswith("pool_") or k == "ceil_mode"}


def conv_options(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in pool_options(options)}


def clear_winners(tensors: Sequence[Tensor | None], options: dict[str, Any], gap: float) -> Tensor:
    """Which outputs have a winner that rounding cannot change: ahead of the second and away from ReLU's kink by `gap`.

    Elsewhere two right answers have different gradients, so tests with random values send no gradient there.
    """
    conv = F.conv2d(*to64(tensors), **conv_options(options))
    values = windows(conv, **pool_options(options)).sort(-1, descending=True).values
    first = values[..., 0]
    clear = first.abs() > gap
    if values.shape[-1] > 1:
        clear &= first - values[..., 1] > gap
    return clear


def magnitudes(tensors: Sequence[Tensor | None], options: dict[str, Any], grad_output: Tensor) -> Result:
    """What rounding errors are proportional to: the sums of absolute values behind the output and each gradient.

    Where n terms of one sign are added one after another, the standard deviation of the error is sqrt(n) / 6 epsilons
    of their sum. Six of those are allowed where they are more than ROUNDINGS, but where sums are more accurate than
    what they are rounded to in the end.
    """
    x, w, b = to64(tensors)
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    conv = F.conv2d(x, w, b, **conv_options(options))
    conv_leaf = conv.detach().requires_grad_()
    output = F.max_pool2d(F.relu(conv_leaf), *_pool_arguments(options))
    (grad_conv,) = torch.autograd.grad(output, conv_leaf, grad_output.double().cpu().abs())

    def sums(of: Callable[[Tensor], Tensor]) -> Result:
        """Of the products of `of` of the operands, at the places where those themselves won their windows."""
        operands = [of(t.detach()).requires_grad_() for t in leaves]
        conv = F.conv2d(*operands, *([None] if b is None else []), **conv_options(options))
        grads = iter(torch.autograd.grad(conv, operands, of(grad_conv)))
        bound = F.max_pool2d(conv.detach(), *_pool_arguments(options))
        return Result(bound, tuple(None if t is None else next(grads) for t in (x, w, b)))

    absolute = sums(torch.abs)
    dtype = next(t for t in tensors if t is not None).dtype
    if dtype not in (torch.float32, torch.float64):
        return absolute
    counts = sums(lambda t: (t != 0).double())
    scaled = [
        None if total is None else total * (count.sqrt() / ROUNDINGS[dtype]).clamp(min=1)
        for (_, total), (_, count) in zip(absolute.items(), counts.items(), strict=True)
    ]
    return Result(scaled[0], tuple(scaled[1:]))


def _pool_arguments(options: dict[str, Any]) -> tuple[Any, ...]:
    return (
        options.get("pool_kernel_size", 2),
        options.get("pool_stride"),
        options.get("pool_padding", 0),
        options.get("pool_dilation", 1),
        options.get("ceil_mode", False),
    )


# --------------------------------------------------------------------------------------------------------------------
# Operands


def integers(*shape: int, low: int = -2, high: int = 2, dtype=torch.float32, device="cpu") -> Tensor:
    """Small integers: their products and sums are exact in every dtype, so results must be equal, and ties abound."""
    return torch.randint(low, high + 1, shape).to(device, dtype)


def distinct(*shape: int, dtype=torch.float64, device="cpu") -> Tensor:
    """Values spread evenly over [-1, 1] in random order, none at 0, no two nearer than a step."""
    count = max(1, torch.Size(shape).numel())
    values = (torch.randperm(count, dtype=torch.float64) + 0.5) / count * 2 - 1
    return values[: torch.Size(shape).numel()].reshape(shape).to(device, dtype)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def _sliced(t: Tensor) -> Tensor:
    """A window of a larger buffer that is NaN everywhere else: an element read outside of the view shows."""
    big = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = big[tuple(slice(1, n + 1) for n in t.shape)]
    return view.copy_(t)


def _every_other(t: Tensor) -> Tensor:
    big = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype, device=t.device)
    return big[..., ::2].copy_(t)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _batch_last(t: Tensor) -> Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def _misaligned(t: Tensor) -> Tensor:
    """Contiguous, but one element off the alignment of the allocator."""
    big = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
    return big[1:].view(t.shape).copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "every_other": _every_other,
    "batch_last": _batch_last,
    "misaligned": _misaligned,
}
