"""What surrounds the kernels' values: derivatives, registration as operators, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lenet_ext import functional
from lenet_ext.net import Net
from lenet_ext.selftest.comparing import Checks, MismatchError

__all__ = ["bad_calls", "derivatives", "operators"]


def derivatives(device: torch.device) -> Checks:
    """First and second, against differences."""
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "padded, strided, overlapping": {"stride": (2, 1), "padding": 1, "pool_kernel_size": 3, "pool_stride": 2},
        "dilated, grouped, ceil mode": {"dilation": 2, "padding": 2, "groups": 2, "ceil_mode": True},
    }
    for name, chosen in options.items():
        shapes = ((1, 2, 6, 7), (4, 2 // chosen.get("groups", 1), 3, 2), (4,))
        function: Callable[..., Tensor] = partial(functional.conv_relu_max_pool2d, **chosen)
        yield f"conv_relu_max_pool2d, {name}", partial(_derivatives, device, function, *shapes)
    for function in (functional.linear, functional.linear_relu):
        yield function.__name__, partial(_derivatives, device, function, (3, 5), (4, 5), (4,))
    average = partial(functional.relu_avg_pool2d, kernel_size=3, stride=2, padding=1, count_include_pad=False)
    yield "relu_avg_pool2d", partial(_derivatives, device, average, (2, 2, 5, 6))


def _derivatives(device: torch.device, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
    tensors = tuple(torch.randn(shape, dtype=torch.float64).to(device).requires_grad_() for shape in shapes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of tiny calls: waking another thread for each would take most of the time
    try:
        torch.autograd.gradcheck(function, tensors)
        torch.autograd.gradgradcheck(function, tensors)
    finally:
        torch.set_num_threads(threads)


def operators(device: torch.device) -> Checks:
    """Each registered operator: its schema, and its fake implementation beside the kernel."""
    images, weight, bias = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3), torch.randn(4)
    options = ((1, 1), (1, 1, 1, 1), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1))
    indices = torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    rows, matrix, grad = torch.randn(5, 7), torch.randn(4, 7), torch.randn(5, 4)
    mask = (True, True, True)
    average = ((3, 3), (2, 2), (1, 1), False, True, None)
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
        "relu_avg_pool2d": (images, *average),
        "relu_avg_pool2d_backward": (torch.randn(2, 3, 5, 5), images, *average),
    }
    if device.type == "cpu" and hasattr(torch.ops.lenet_ext, "lenet"):
        parameters = [parameter.detach() for parameter in Net().parameters()]
        pictures = torch.randn(3, 1, 32, 32)
        activations = torch.ops.lenet_ext.lenet_with_activations(pictures, parameters)[1:]
        calls["lenet"] = calls["lenet_with_activations"] = (pictures, parameters)
        calls["lenet_backward"] = (torch.randn(3, 10), pictures, parameters, *activations, True)
    for name, arguments in calls.items():
        yield name, partial(_operator, device, name, arguments)


def _operator(device: torch.device, name: str, arguments: tuple[Any, ...]) -> None:
    moved = tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)
    operator = getattr(torch.ops.lenet_ext, name).default
    torch.library.opcheck(operator, moved, test_utils=("test_schema", "test_faketensor"))


def bad_calls(device: torch.device) -> Checks:
    """What stock rejects is rejected, with the same class of exception."""
    images, weight = torch.randn(2, 3, 8, 8, device=device), torch.randn(4, 3, 3, 3, device=device)
    conv, linear, linear_relu = functional.conv_relu_max_pool2d, functional.linear, functional.linear_relu
    calls: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
        "channels": (RuntimeError, lambda: conv(images[:, :2], weight)),
        "dtypes": (RuntimeError, lambda: conv(images, weight.double())),
        "kernel too large": (RuntimeError, lambda: conv(images[..., :2], weight)),
        "stride": (RuntimeError, lambda: conv(images, weight, stride=0)),
        "meta weight": (RuntimeError, lambda: conv(images, weight.to("meta"))),
        "features": (RuntimeError, lambda: linear(images, weight.flatten(1))),
        "padding": (RuntimeError, lambda: functional.relu_avg_pool2d(images, 2, padding=2)),
        "no tensor": (TypeError, lambda: linear_relu([1.0], weight)),  # type: ignore[arg-type]
    }
    for name, (expected, call) in calls.items():
        yield name, partial(_raises, expected, call)


def _raises(expected: type[Exception], call: Callable[[], Any]) -> None:
    try:
        call()
    except expected:
        return
    raise MismatchError(f"no {expected.__name__}")
