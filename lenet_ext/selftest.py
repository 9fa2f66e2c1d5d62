"""Self-test of the installed package on this machine: every kernel against stock torch in float64.

Most comparisons are exact. Small whole numbers, and small multiples of 1/8, go through convolutions and matrix products
without any rounding, so that the result must be equal bit for bit whatever the order of the additions, and ties
between the values of a pooling window are frequent. Rounding is tested apart, with random numbers, against the error
that stock torch makes in the same dtype.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lenet_ext
from lenet_ext import functional
from lenet_ext.environment.system import cpu_count
from lenet_ext.net import Net, ReferenceNet

__all__ = ["Result", "run_checks"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Result:
    """Outcome of one group of checks. `failures` is empty where all is well."""

    name: str
    count: int
    failures: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class ConvCase:
    """Arguments of one call of ``conv_relu_max_pool2d``."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, int, int, int]
    options: dict[str, Any]
    bias: bool = True


def _conv(name: str, input: tuple[int, ...], weight: tuple[int, int, int, int], **options: Any) -> ConvCase:
    return ConvCase(name, input, weight, {k: v for k, v in options.items() if k != "bias"}, options.get("bias", True))


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
_LINEAR_CASES: tuple[tuple[str, tuple[int, ...], int, bool], ...] = (
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


def run_checks(
    device: torch.device, on_group: Callable[[str], None] | None = None, *, kernels_only: bool = False
) -> list[Result]:
    """Runs all groups of checks.

    Args:
        device: where the kernels run; the reference is always computed on the CPU.
        on_group: told the name of the group that comes next.
        kernels_only: only the comparisons of the kernels with stock, without derivatives and child processes.

    Returns:
        One result for each group. Exceptions of the code under test are failures.

    Example:
        >>> all(not result.failures for result in run_checks(torch.device("cpu")))  # doctest: +SKIP
        True
    """
    groups: list[tuple[str, Callable[[torch.device], Iterable[tuple[str, Callable[[], None]]]]]] = [
        ("conv_relu_max_pool2d, exact", _conv_exact),
        ("linear and linear_relu, exact", _linear_exact),
        ("memory formats and strides", _layouts),
        ("NaN, infinities, signed zeros", _special_values),
        ("rounding, against twice stock's error", _rounding),
        ("Net against ReferenceNet", _net),
    ]
    if not kernels_only:
        groups += [
            ("threads do not change results", _threads),
            ("derivatives: gradcheck, gradgradcheck", _derivatives),
            ("operators: schema, fake implementation", _operators),
            ("bad calls raise", _bad_calls),
        ]
    results = []
    with _reproducible():
        for name, group in groups:
            if on_group is not None:
                on_group(name)
            results.append(_run_group(name, group(device)))
        if not kernels_only and device.type == "cpu":
            results += _other_variants(on_group)
    return results


def _run_group(name: str, checks: Iterable[tuple[str, Callable[[], None]]]) -> Result:
    failures, count = [], 0
    started = time.perf_counter()
    for what, check in checks:
        count += 1
        try:
            check()
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            failures.append(
                f"{what}: {'' if isinstance(error, _MismatchError) else type(error).__name__ + ': '}{message}"
            )
    return Result(name, count, tuple(failures), time.perf_counter() - started)


class _MismatchError(Exception):
    """Two results differ."""


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """The same random numbers on every run; the caller's generator and settings are left as they were."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


# --- what both sides compute ------------------------------------------------------------------------------------------


def _whole(shape: tuple[int, ...], bound: int = 1) -> Tensor:
    """Whole numbers from -bound to bound, in float64."""
    return torch.randint(-bound, bound + 1, shape).double()


def _eighths(shape: tuple[int, ...]) -> Tensor:
    """Multiples of 1/8 from -1 to 1, in float64."""
    return _whole(shape, 8) / 8


def _stock_conv(options: dict[str, Any]) -> Callable[..., Tensor]:
    """The stock composition with the options of ``conv_relu_max_pool2d``."""
    pool = {name: value for name, value in options.items() if name.startswith("pool_") or name == "ceil_mode"}
    conv = {name: value for name, value in options.items() if name not in pool}

    def compute(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        unbatched = input.dim() == 3
        hidden = F.relu(F.conv2d(input.unsqueeze(0) if unbatched else input, weight, bias, **conv))
        output = F.max_pool2d(
            hidden,
            pool.get("pool_kernel_size", 2),
            pool.get("pool_stride"),
            pool.get("pool_padding", 0),
            pool.get("pool_dilation", 1),
            pool.get("ceil_mode", False),
        )
        return output.squeeze(0) if unbatched else output

    return compute


def _with_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], grad_output: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Output of a function and the gradients of all tensors."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    present = [leaf for leaf in leaves if leaf is not None]
    return [output.detach(), *torch.autograd.grad(output, present, grad_output(output))]


def _expect_equal(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Equality; a gradient in bfloat16 may be a long sum, which is then rounded: by half a unit in the last place."""
    for number, (ours, stock) in enumerate(zip(found, expected, strict=True)):
        what = "output" if number == 0 else f"gradient {number}"
        if ours.shape != stock.shape:
            raise _MismatchError(f"{what} has shape {tuple(ours.shape)}, expected {tuple(stock.shape)}")
        if ours.dtype != dtype:
            raise _MismatchError(f"{what} is {ours.dtype}, expected {dtype}")
        ours, stock = ours.double().cpu(), stock.double()
        tolerance = 2.0**-7 * stock.abs().max() if dtype == torch.bfloat16 and number and stock.numel() else 0.0
        good = (ours == stock) | (ours.isnan() & stock.isnan()) | ((ours - stock).abs() <= tolerance)
        if not good.all():
            worst = (ours - stock).abs().max()
            raise _MismatchError(f"{what}: {int((~good).sum())} of {good.numel()} values differ, by up to {worst:.3g}")


# --- groups -----------------------------------------------------------------------------------------------------------


def _conv_exact(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    for case in _CONV_CASES:
        for draw in (_whole, _eighths):
            for dtype in _DTYPES:
                if draw is _eighths and dtype == torch.bfloat16:
                    continue  # sums of products of these have more bits than a bfloat16

                def check(case: ConvCase = case, draw: Any = draw, dtype: torch.dtype = dtype) -> None:
                    stock = _stock_conv(case.options)
                    tensors = [draw(case.input), draw(case.weight), draw(case.weight[:1]) if case.bias else None]

                    def upstream(output: Tensor) -> Tensor:
                        return grad.to(output)

                    with torch.no_grad():
                        shape = stock(*tensors).shape
                    grad = _whole(tuple(shape), 2)
                    expected = _with_gradients(stock, tensors, upstream)
                    moved = [None if tensor is None else tensor.to(device, dtype) for tensor in tensors]
                    found = _with_gradients(
                        lambda *t: functional.conv_relu_max_pool2d(*t, **case.options), moved, upstream
                    )
                    _expect_equal(found, expected, dtype)
                    with torch.no_grad():  # another operator: the one without winners
                        output = functional.conv_relu_max_pool2d(*moved, **case.options)  # type: ignore[arg-type]
                    _expect_equal([output], expected[:1], dtype)

                yield f"{case.name}, {_short(dtype)}", check


def _linear_exact(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, shape, out_features, has_bias in _LINEAR_CASES:
        for relu in (False, True):
            for dtype in _DTYPES:

                def check(
                    shape: tuple[int, ...] = shape,
                    out_features: int = out_features,
                    has_bias: bool = has_bias,
                    relu: bool = relu,
                    dtype: torch.dtype = dtype,
                ) -> None:
                    bias = _whole((out_features,)) if has_bias else None
                    tensors = [_whole(shape), _whole((out_features, shape[-1])), bias]
                    grad = _whole((*shape[:-1], out_features), 2)

                    def stock(*t: Tensor) -> Tensor:
                        return F.relu(F.linear(*t)) if relu else F.linear(*t)

                    ours = functional.linear_relu if relu else functional.linear
                    expected = _with_gradients(stock, tensors, lambda output: grad)
                    moved = [None if tensor is None else tensor.to(device, dtype) for tensor in tensors]
                    found = _with_gradients(ours, moved, lambda output: grad.to(output))
                    _expect_equal(found, expected, dtype)

                yield f"{'linear_relu' if relu else 'linear'} {name}, {_short(dtype)}", check


def _layouts(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    shape, weight_shape = (3, 4, 12, 14), (8, 4, 3, 3)

    def sliced(tensor: Tensor) -> Tensor:
        big = torch.full([2 * size for size in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
        view = big[tuple(slice(0, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)

    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "sliced": sliced,
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, layout in layouts.items():
        for dtype in _DTYPES:

            def check(
                name: str = name, layout: Callable[[Tensor], Tensor] = layout, dtype: torch.dtype = dtype
            ) -> None:
                tensors: list[Tensor | None] = [_whole(shape), _whole(weight_shape), _whole((8,))]
                expected = _with_gradients(_stock_conv({}), tensors, torch.ones_like)
                moved = [tensor.to(device, dtype) for tensor in tensors if tensor is not None]
                found = _with_gradients(
                    lambda images, weight, bias: functional.conv_relu_max_pool2d(layout(images), layout(weight), bias),
                    [*moved],
                    # Stride 0 in all dimensions, as the gradient that sum() sends back.
                    lambda output: output.new_ones(()).expand(output.shape),
                )
                _expect_equal(found, expected, dtype)
                want_channels_last = name == "channels_last"
                if found[0].is_contiguous(memory_format=torch.channels_last) != want_channels_last:
                    raise _MismatchError(f"output has strides {found[0].stride()} for a {name} input")

            yield f"{name}, {_short(dtype)}", check

    def transposed_linear() -> None:
        rows, matrix = _whole((9, 7)), _whole((9, 5))
        expected = [F.linear(rows.t(), matrix.t())]
        moved = [tensor.to(device, torch.float32) for tensor in (rows, matrix)]
        _expect_equal([functional.linear(moved[0].t(), moved[1].t())], expected, torch.float32)

    yield "linear, transposed", transposed_linear


def _special_values(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    for value in (torch.nan, torch.inf, -torch.inf, -0.0):
        for dtype in _DTYPES:

            def check(value: float = value, dtype: torch.dtype = dtype) -> None:
                images, weight, bias = _whole((2, 2, 12, 12)), _whole((6, 2, 3, 3)), _whole((6,))
                images[torch.rand(images.shape) < 0.02] = value
                expected = [_stock_conv({})(images, weight, bias), F.relu(F.linear(images, weight[0, 0].repeat(1, 4)))]
                moved = [tensor.to(device, dtype) for tensor in (images, weight, bias)]
                images, weight, bias = moved
                found = [
                    functional.conv_relu_max_pool2d(images, weight, bias),
                    functional.linear_relu(images, weight[0, 0].repeat(1, 4)),
                ]
                for ours, stock in zip(found, expected, strict=True):
                    _expect_equal([ours], [stock], dtype)

            yield f"{value}, {_short(dtype)}", check


def _rounding(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in _DTYPES:

        def check(dtype: torch.dtype = dtype) -> None:
            images = torch.randn(9, 6, 14, 14, dtype=torch.float64).to(dtype)
            weight = torch.randn(16, 6, 5, 5, dtype=torch.float64).div(12).to(dtype)
            rows, matrix = torch.randn(33, 400).to(dtype), torch.randn(120, 400).div(20).to(dtype)
            for ours, stock, tensors in (
                (functional.conv_relu_max_pool2d, _stock_conv({}), (images, weight)),
                (functional.linear, F.linear, (rows, matrix)),
            ):
                exact = stock(*(tensor.double() for tensor in tensors))
                theirs = (stock(*tensors).double() - exact).abs().max()
                found = ours(*(tensor.to(device) for tensor in tensors)).double().cpu()
                error = (found - exact).abs().max()
                # A few units in the last place, where stock happens to be exact or is itself in float64.
                if not error <= 2 * theirs + 4 * torch.finfo(dtype).eps * exact.abs().max():
                    raise _MismatchError(f"error {error:.2e}, stock {theirs:.2e}")

        yield _short(dtype), check


def _net(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in (torch.float64, torch.float32):
        for batch in (1, 7, 33, 64):

            def check(dtype: torch.dtype = dtype, batch: int = batch) -> None:
                reference = ReferenceNet(dtype=torch.float64)
                net = Net(dtype=dtype, device=device)
                net.load_state_dict(reference.state_dict())
                images, labels = torch.randn(batch, 1, 32, 32, dtype=dtype), torch.randint(10, (batch,))
                found, expected = net(images.to(device)), reference(images.double())
                F.cross_entropy(found, labels.to(device)).backward()
                F.cross_entropy(expected, labels).backward()
                with torch.no_grad():
                    pairs = [("logits", found, expected), ("logits without gradient", net(images.to(device)), expected)]
                parameters = zip(net.named_parameters(), reference.parameters(), strict=True)
                pairs += [(name, ours.grad, stock.grad) for (name, ours), stock in parameters]  # type: ignore[misc]
                tolerance = 1e-10 if dtype == torch.float64 else 1e-4
                for name, ours, stock in pairs:
                    error = torch.linalg.vector_norm(ours.detach().double().cpu() - stock.detach())
                    if not error <= tolerance * torch.linalg.vector_norm(stock.detach()):
                        raise _MismatchError(f"{name} differs by {error:.2e}")

            yield f"batch {batch}, {_short(dtype)}", check


def _threads(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    def check() -> None:
        net = Net(device=device)
        images = torch.randn(67, 1, 32, 32).to(device)

        def compute(threads: int) -> list[Tensor]:
            torch.set_num_threads(threads)
            with torch.no_grad():
                logits = net(images)
            output = net.conv2(net.conv1(images))
            return [logits, output, *torch.autograd.grad(output.square().sum(), list(net.conv1.parameters()))]

        threads = torch.get_num_threads()
        most = max(2, threads)
        try:
            pairs = list(zip(compute(1), compute(most), strict=True))
        finally:
            torch.set_num_threads(threads)
        for one, many in pairs:
            if not torch.equal(one, many):
                raise _MismatchError(f"1 and {most} threads differ by {(one - many).abs().max():.2e}")

    # Only our own kernels promise this; the vendor's may split a sum by the number of threads.
    if device.type == "cpu" and os.environ.get("LENET_EXT_ALGORITHM") != "vendor":
        yield "LeNet", check


def _derivatives(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device).requires_grad_()

    def gradients(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # thousands of tiny calls: waking another thread for each would take most of the time
        try:
            torch.autograd.gradcheck(function, tensors)
            torch.autograd.gradgradcheck(function, tensors)
        finally:
            torch.set_num_threads(threads)

    conv_options: dict[str, dict[str, Any]] = {
        "plain": {},
        "padded, strided, overlapping": {"stride": (2, 1), "padding": 1, "pool_kernel_size": 3, "pool_stride": 2},
        "dilated, grouped, ceil mode": {"dilation": 2, "padding": 2, "groups": 2, "ceil_mode": True},
    }
    for name, options in conv_options.items():

        def check_conv(options: dict[str, Any] = options) -> None:
            weight = leaf(4, 2 // options.get("groups", 1), 3, 2)

            def function(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return functional.conv_relu_max_pool2d(images, weight, bias, **options)

            gradients(function, (leaf(1, 2, 6, 7), weight, leaf(4)))

        yield f"conv_relu_max_pool2d, {name}", check_conv
    for function in (functional.linear, functional.linear_relu):

        def check_linear(function: Callable[..., Tensor] = function) -> None:
            gradients(function, (leaf(3, 5), leaf(4, 5), leaf(4)))

        yield function.__name__, check_linear


def _operators(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    images, weight, bias = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3), torch.randn(4)
    options = ((1, 1), (1, 1, 1, 1), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1))
    indices = torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    rows, matrix, grad = torch.randn(5, 7), torch.randn(4, 7), torch.randn(5, 4)
    mask = (True, True, True)
    calls: dict[str, tuple[Any, ...]] = {
        "conv_relu_max_pool2d": (images, weight, bias, *options, False),
        "conv_relu_max_pool2d_with_indices": (images, weight, bias, *options, False),
        "conv_relu_max_pool2d_backward": (
            *(torch.randn(2, 4, 4, 4), indices, images, weight),
            *(images.shape, weight.shape, *options, mask),
        ),
        "conv_at_indices": (images, weight, bias, indices, *options),
        "linear": (rows, matrix, bias),
        "linear_relu": (rows, matrix, bias),
        "linear_backward": (grad, rows, matrix, mask),
        "linear_relu_backward": (grad, torch.randn(5, 4), rows, matrix, mask),
    }
    if device.type == "cpu" and hasattr(torch.ops.lenet_ext, "lenet"):
        parameters = [parameter.detach() for parameter in Net().parameters()]
        pictures = torch.randn(3, 1, 32, 32)
        activations = torch.ops.lenet_ext.lenet_with_activations(pictures, parameters)[1:]
        calls["lenet"] = calls["lenet_with_activations"] = (pictures, parameters)
        calls["lenet_backward"] = (torch.randn(3, 10), pictures, parameters, *activations, True)
    for name, arguments in calls.items():

        def check(name: str = name, arguments: tuple[Any, ...] = arguments) -> None:
            moved = tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)
            operator = getattr(torch.ops.lenet_ext, name).default
            torch.library.opcheck(operator, moved, test_utils=("test_schema", "test_faketensor"))

        yield name, check


def _bad_calls(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    images, weight = torch.randn(2, 3, 8, 8, device=device), torch.randn(4, 3, 3, 3, device=device)
    calls: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
        "channels": (RuntimeError, lambda: functional.conv_relu_max_pool2d(images[:, :2], weight)),
        "dtypes": (RuntimeError, lambda: functional.conv_relu_max_pool2d(images, weight.double())),
        "kernel too large": (RuntimeError, lambda: functional.conv_relu_max_pool2d(images[..., :2], weight)),
        "stride": (RuntimeError, lambda: functional.conv_relu_max_pool2d(images, weight, stride=0)),
        "meta weight": (RuntimeError, lambda: functional.conv_relu_max_pool2d(images, weight.to("meta"))),
        "features": (RuntimeError, lambda: functional.linear(images, weight.flatten(1))),
        "no tensor": (TypeError, lambda: functional.linear_relu([1.0], weight)),  # type: ignore[arg-type]
    }
    for name, (expected, call) in calls.items():

        def check(expected: type[Exception] = expected, call: Callable[[], Any] = call) -> None:
            try:
                call()
            except expected:
                return
            raise _MismatchError(f"no {expected.__name__}")

        yield name, check


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the other instruction sets ---------------------------------------------------------------------------------------


def _other_variants(on_group: Callable[[str], None] | None) -> list[Result]:
    """The kernels once more with each lower instruction set, and with the vendor's algorithm for everything.

    These are chosen once per process, from the environment: each gets a process of its own, several run at a time.
    """
    info = lenet_ext.build_info()
    in_use, compiled = info["cpu_capability"], list(info["cpu_capabilities"])
    lower = []
    if not os.environ.get("LENET_EXT_CPU_CAPABILITY") and in_use in compiled:
        # The list is in ascending order; what lies above the one in use, this processor does not have.
        lower = [{"LENET_EXT_CPU_CAPABILITY": name} for name in compiled[: compiled.index(in_use)]]
    settings = lower
    if not os.environ.get("LENET_EXT_ALGORITHM"):
        direct = {"LENET_EXT_ALGORITHM": "direct"}
        settings = [{**setting, **direct} for setting in lower or [{}]] + [{"LENET_EXT_ALGORITHM": "vendor"}]
    if on_group is not None and settings:
        on_group("other instruction sets and algorithms")
    with ThreadPoolExecutor(max_workers=min(4, cpu_count())) as pool:
        return list(pool.map(_run_variant, settings))


def _run_variant(setting: dict[str, str]) -> Result:
    name = "kernels with " + " ".join(f"{key}={value}" for key, value in setting.items())
    # The parent's sys.path, so that a source tree in the current directory is not imported by mistake.
    code = (
        f"import sys; sys.path[:] = {json.dumps(sys.path)}; from lenet_ext import selftest; sys.exit(selftest._child())"
    )
    started = time.perf_counter()
    count = 1
    failures: tuple[str, ...] = ()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **setting, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        if done.returncode == 0:
            count = int(lines[-1])
        else:
            failures = tuple(lines[-5:]) or (f"exit code {done.returncode}",)
            count = len(failures)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        failures = (str(error),)
    return Result(name, count, failures, time.perf_counter() - started)


def _child() -> int:
    torch.set_num_threads(1)
    results = run_checks(torch.device("cpu"), kernels_only=True)
    failures = [f"{result.name}: {failure}" for result in results for failure in result.failures]
    print("\n".join(failures) if failures else sum(result.count for result in results))
    return 1 if failures else 0
