"""What is measured: each case once from stock layers and once from ours, with the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenet_ext import functional
from lenet_ext import nn as fused_nn
from lenet_ext.bench.small_networks import NETWORKS
from lenet_ext.fusion.fuse import fuse
from lenet_ext.net import Net, ReferenceNet

__all__ = ["CASES", "GROUPS", "MODES", "Case", "FunctionCall", "Rules", "Workload"]

# forward: in inference mode. training: forward and backward, gradients of all parameters (and of the input, for a
# layer that is not the first); without loss and optimizer, which are the same for everybody. step: forward, cross
# entropy, backward and SGD with momentum, of a whole network.
MODES = ("forward", "training", "step")


class StockConvReLUMaxPool2d(nn.Conv2d):
    """``F.max_pool2d(F.relu(conv(x)), ...)`` with the parameters of `lenet_ext.nn.ConvReLUMaxPool2d`."""

    def __init__(self, *args: Any, pool: tuple[int, int, int] = (2, 2, 0), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pool = pool

    def forward(self, input: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(super().forward(input)), *self.pool)


class StockLinearReLU(nn.Linear):
    """``F.relu(linear(x))``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class FunctionCall(nn.Module):
    """A function of input, weight and bias as a module, so that it can be a case. `bound` is what to time: the function
    itself without a module's call around it.
    """

    def __init__(self, function: Callable[..., Tensor], *weight_shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(weight_shape))
        self.bias = nn.Parameter(torch.randn(weight_shape[0]))

    def bound(self) -> Callable[[Tensor], Tensor]:
        return partial(self.function, weight=self.weight, bias=self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input, self.weight, self.bias)


def _stock_conv_relu_max_pool2d(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(input, weight, bias)), 2)


def _stock_linear_relu(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


@dataclass(frozen=True)
class Rules:
    """What a case of somebody else's benchmark has to keep to, where that differs from ours (`agreement`, `timing`).

    Args:
        images: draws them, as ``torch.randn`` does.
        tolerance: of an output, relative and absolute, each element for itself.
        tf32_convolutions: whether everybody's convolutions may be rounded to TF32. Matrix products may not.
        cold: the GPU's caches hold nothing of the workload when a call begins.
    """

    images: Callable[..., Tensor] = torch.randn
    tolerance: float | None = None
    tf32_convolutions: bool = False
    cold: bool = False

    @property
    def precision(self) -> str:
        """The least that the arithmetic may have."""
        return "convolutions in TF32, products in float32" if self.tf32_convolutions else "float32"


@dataclass(frozen=True)
class Case:
    """One thing to compute.

    Args:
        name: short, for the command line and for files.
        title: for people.
        input_shape: without the batch.
        stock, fused: make the module; their state dicts are interchangeable.
        input_grad: whether a training step includes the gradient of the input.
        group: which part of a run it belongs to, one of `GROUPS`.
        batch_sizes: the only ones that make sense, or None.
        for_inference: what `fused` may become where it is not trained.
        modes: the only ones.
        device_types: where it is measured.
        rules: of a benchmark that is not ours.
    """

    name: str
    title: str
    input_shape: tuple[int, ...]
    stock: Callable[[], nn.Module]
    fused: Callable[[], nn.Module]
    input_grad: bool = True
    group: str = "layers"
    batch_sizes: tuple[int, ...] | None = None
    for_inference: Callable[[nn.Module], nn.Module] | None = None
    modes: tuple[str, ...] = MODES
    device_types: tuple[str, ...] = ("cpu", "cuda")
    rules: Rules = Rules()


@dataclass(frozen=True)
class Workload:
    """A case at a batch size, with the numbers to compute on: the same for every provider."""

    case: Case
    mode: str
    batch: int
    device: torch.device
    state: dict[str, Tensor]
    input: Tensor
    grad_output: Tensor

    @property
    def targets(self) -> Tensor:
        """The classes that the images of a training step belong to."""
        return self.grad_output.argmax(1)

    @classmethod
    def make(cls, case: Case, mode: str, batch: int, device: torch.device, seed: int = 0) -> Workload:
        """Draws parameters, input and output gradient."""
        # Drawn on the CPU from a generator of its own: the same numbers on every device, in every order of cases.
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = case.stock()
        images = case.rules.images(batch, *case.input_shape, generator=generator)
        with torch.inference_mode():
            shape = module(images[:1]).shape[1:]
        grad_output = torch.randn(batch, *shape, generator=generator)
        state = {name: value.to(device) for name, value in module.state_dict().items()}
        return cls(case, mode, batch, device, state, images.to(device), grad_output.to(device))


def _conv(name: str, shape: tuple[int, int, int], out_channels: int, kernel: int, **kwargs: Any) -> Case:
    options: dict[str, Any] = {
        "stride": kwargs.pop("stride", 1),
        "padding": kwargs.pop("padding", 0),
        "groups": kwargs.pop("groups", 1),
    }
    pool = kwargs.pop("pool", (2, 2, 0))
    sizes = dict(zip(("pool_kernel_size", "pool_stride", "pool_padding"), pool, strict=True))
    title = f"{shape[0]}->{out_channels} k{kernel}" + (f" s{options['stride']}" if options["stride"] > 1 else "")
    title += (f" p{options['padding']}" if options["padding"] else "") + f" at {shape[1]}x{shape[2]}"
    title += f", {options['groups']} groups" if options["groups"] > 1 else ""
    title += "" if pool == (2, 2, 0) else f", pool {pool[0]} s{pool[1]} p{pool[2]}"
    return Case(
        name,
        kwargs.pop("title", title),
        shape,
        lambda: StockConvReLUMaxPool2d(shape[0], out_channels, kernel, pool=pool, **options),
        lambda: fused_nn.ConvReLUMaxPool2d(shape[0], out_channels, kernel, **options, **sizes),
        **kwargs,
    )


def _general(name: str, *args: Any, batch_sizes: tuple[int, ...] = (1, 8), **kwargs: Any) -> Case:
    """A layer of another network; the larger the image, the fewer of them."""
    # The first layer of a network, which sees three channels, needs no gradient of its input.
    first = args[0][0] == 3
    return _conv(name, *args, group="general", batch_sizes=batch_sizes, input_grad=not first, **kwargs)


def _linear(name: str, in_features: int, out_features: int, *, relu: bool) -> Case:
    stock, fused = (StockLinearReLU, fused_nn.LinearReLU) if relu else (nn.Linear, fused_nn.Linear)
    title = f"{in_features}->{out_features}" + (" + ReLU" if relu else "")
    return Case(
        name,
        title,
        (in_features,),
        lambda: stock(in_features, out_features),
        lambda: fused(in_features, out_features),
    )


def _function(name: str, title: str, stock: Callable, fused: Callable, *shapes: tuple[int, ...]) -> Case:
    return _tiny(
        name, title, lambda: FunctionCall(stock, *shapes[1]), lambda: FunctionCall(fused, *shapes[1]), shapes[0]
    )


def _tiny(name: str, title: str, stock: Callable, fused: Callable, shape: tuple[int, ...]) -> Case:
    return Case(name, title, shape, stock, fused, group="overhead", batch_sizes=(1,))


def _network(name: str) -> Case:
    title, make, shape = NETWORKS[name]
    return Case(
        name,
        title,
        shape,
        make,
        lambda: fuse(make(), inplace=True, average_pooling=True),
        input_grad=False,
        group="networks",
        batch_sizes=(1, 64),
        for_inference=partial(fuse, inplace=True, fold_batch_norm=True, average_pooling=True),
    )


def _kernelbench(name: str, rules: Rules) -> Case:
    """Level 3, problem 4 of KernelBench (A. Ouyang et al., "KernelBench: Can LLMs Write Efficient GPU Kernels?", 2025):
    this network for 20 classes, forward, 4096 images with pixels from 0 to 1, float32 in and out.
    """
    return Case(
        name,
        f"KernelBench 3/4, {rules.precision}",
        (1, 32, 32),
        partial(ReferenceNet, num_classes=20),
        partial(Net, num_classes=20),
        input_grad=False,
        group="kernelbench",
        batch_sizes=(4096,),
        modes=("forward",),
        device_types=("cuda",),
        rules=rules,
    )


# The tiny problems have a dozen multiplications: what is left of the time is the cost of the call.
_IMAGE, _FILTER, _VECTOR, _MATRIX = (1, 2, 2), (1, 1, 1, 1), (2,), (2, 2)
_LIST = (
    Case("net", "LeNet", (1, 32, 32), ReferenceNet, Net, input_grad=False, group="net"),
    Case(
        "net3",
        "LeNet of 3 channels",
        (3, 32, 32),
        partial(ReferenceNet, 3),
        partial(Net, 3),
        input_grad=False,
        group="net",
        batch_sizes=(1, 64, 1024),
    ),
    _conv("conv1", (1, 32, 32), 6, 5, input_grad=False),
    _conv("conv2", (6, 14, 14), 16, 5),
    _linear("fc1", 400, 120, relu=True),
    _linear("fc2", 120, 84, relu=True),
    _linear("fc3", 84, 10, relu=False),
    _general("conv3x32", (3, 32, 32), 32, 3, padding=1, batch_sizes=(1, 64, 1024)),
    _general("stem224", (3, 224, 224), 64, 7, stride=2, padding=3, pool=(3, 2, 1)),
    _general("conv64x64", (64, 56, 56), 64, 3, padding=1),
    _general("conv128x256", (128, 28, 28), 256, 3, padding=1),
    _general("conv256x256", (256, 14, 14), 256, 3, padding=1),
    _general("alexnet1", (3, 224, 224), 64, 11, stride=4, padding=2, pool=(3, 2, 0)),
    _general("alexnet2", (64, 27, 27), 192, 5, padding=2, pool=(3, 2, 0)),
    _general("alexnet3", (192, 13, 13), 384, 3, padding=1, pool=(3, 2, 0)),
    _general("vgg1", (3, 224, 224), 64, 3, padding=1),
    _general("vgg2", (64, 112, 112), 128, 3, padding=1),
    _general("conv64x128", (64, 16, 16), 128, 3, padding=1, batch_sizes=(1, 64)),
    _general("conv16x32", (16, 32, 32), 32, 5, padding=2, batch_sizes=(1, 64)),
    _general("conv32x64", (32, 32, 32), 64, 3, padding=1, batch_sizes=(1, 64)),
    _general("conv20x50", (20, 12, 12), 50, 5, batch_sizes=(1, 64)),
    _general("pointwise", (96, 27, 27), 64, 1, batch_sizes=(1, 64)),
    _general("depthwise", (32, 28, 28), 32, 3, padding=1, groups=32, batch_sizes=(1, 64)),
    _general("grouped", (64, 28, 28), 64, 3, padding=1, groups=4, batch_sizes=(1, 64)),
    _general("overlapping", (32, 16, 16), 32, 3, padding=1, pool=(3, 1, 1), batch_sizes=(1, 64)),
    *map(_network, NETWORKS),
    _function(
        "call_conv",
        "conv_relu_max_pool2d()",
        _stock_conv_relu_max_pool2d,
        functional.conv_relu_max_pool2d,
        _IMAGE,
        _FILTER,
    ),
    _function("call_linear", "linear()", F.linear, functional.linear, _VECTOR, _MATRIX),
    _function("call_linear_relu", "linear_relu()", _stock_linear_relu, functional.linear_relu, _VECTOR, _MATRIX),
    _tiny(
        "module_conv",
        "nn.ConvReLUMaxPool2d",
        lambda: StockConvReLUMaxPool2d(1, 1, 1),
        lambda: fused_nn.ConvReLUMaxPool2d(1, 1, 1),
        _IMAGE,
    ),
    _tiny("module_linear", "nn.Linear", lambda: nn.Linear(2, 2), lambda: fused_nn.Linear(2, 2), _VECTOR),
    _tiny(
        "module_linear_relu", "nn.LinearReLU", lambda: StockLinearReLU(2, 2), lambda: fused_nn.LinearReLU(2, 2), _VECTOR
    ),
    # As KernelBench runs it, with torch's own defaults, under which stock rounds to TF32 in convolutions; and with the
    # same arithmetic on both sides.
    _kernelbench("kernelbench", Rules(torch.rand, 1e-4, tf32_convolutions=True, cold=True)),
    _kernelbench("kernelbench_float32", Rules(torch.rand, 1e-4, cold=True)),
)
CASES = {case.name: case for case in _LIST}
GROUPS = tuple(dict.fromkeys(case.group for case in _LIST))
