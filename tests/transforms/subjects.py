"""What the tests of this folder transform: each operation as a module of ours and as the same one of stock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import reference
import torch
from reference import integers
from torch import Tensor, nn

from lenet_ext import Net, ReferenceNet, functional, fuse
from lenet_ext.nn import ReLUAvgPool2d


class Call(nn.Module):
    """A function of `lenet_ext.functional` or of `reference`, with its weight and bias as parameters."""

    def __init__(self, module: Any, name: str, weight: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        self.module_name, self.name, self.options = module.__name__, name, options
        self.weight, self.bias = nn.Parameter(torch.empty(weight)), nn.Parameter(torch.empty(weight[:1]))

    def forward(self, input: Tensor) -> Tensor:
        module = functional if self.module_name == functional.__name__ else reference
        return getattr(module, self.name)(input, self.weight, self.bias, **self.options)


class Subject(NamedTuple):
    ours: nn.Module
    stock: nn.Module
    input: Tensor


def calls(name: str, input: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Callable[[], tuple]:
    return lambda: (Call(functional, name, weight, **options), Call(reference, name, weight, **options), input)


def sequential() -> nn.Module:
    convolution = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolution, nn.Flatten(1), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))


def fused() -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    stock = sequential()
    ours = fuse(stock)
    assert [type(layer).__name__ for layer in ours][::4] == ["ConvReLUMaxPool2d", "LinearReLU"], "nothing is fused here"
    return ours, stock, (2, 2, 6, 7)


def average() -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    options = {"kernel_size": (3, 2), "stride": 2, "padding": 1, "count_include_pad": False}
    ours = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Identity(), ReLUAvgPool2d(**options))
    return ours, nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(**options)), (2, 2, 8, 7)


ODD = {"groups": 2, "padding": "same", "dilation": (1, 2), "pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}
_MAKE: dict[str, Callable[[], tuple[nn.Module, nn.Module, tuple[int, ...]]]] = {
    "conv": calls("conv_relu_max_pool2d", (2, 4, 7, 8), (6, 2, 2, 3), **ODD, ceil_mode=True),
    "linear": calls("linear", (5, 7), (3, 7)),
    "linear_relu": calls("linear_relu", (5, 7), (3, 7)),
    "relu_avg_pool2d": average,
    "net": lambda: (Net(), ReferenceNet(), (2, 1, 32, 32)),
    "fused": fused,
}
SUBJECTS = list(_MAKE)


def subject(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Subject:
    """The two with the same small integers as parameters: most sums are exact, and ties are the same ones."""
    ours, stock, shape = _MAKE[name]()
    values = {}
    for key, parameter in stock.named_parameters():
        sparse = torch.rand(parameter.shape) < (0.2 if parameter.numel() > 1000 else 1)
        values[key] = integers(*parameter.shape, low=-1, high=1) * sparse
    for module in (ours, stock):
        module.load_state_dict(values)
    return Subject(ours.to(device, dtype), stock.to(device, dtype), integers(*shape, dtype=dtype, device=device))


def loss(output: Tensor) -> Tensor:
    return output.pow(2).sum() + output.sum()


def trained(call: Callable[[Tensor], Tensor], module: nn.Module, input: Tensor) -> dict[str, Any]:
    """The output and every gradient; `call` is the module or what a transform made of it."""
    for parameter in module.parameters():
        parameter.grad = None
    leaf = input.clone().requires_grad_()
    output = call(leaf)
    loss(output).backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "grad of input": leaf.grad, **grads}
