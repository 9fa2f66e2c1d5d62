"""Which way a call takes: straight to the operator, through the autograd.Function, or the general code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lenet_ext._C import call_path, lenet_path, untouched_parameters
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lenet_ext
from lenet_ext.functional import FUNCTION, OPERATOR

GENERAL = 0


class Subclass(Tensor):
    pass


class Nothing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class NoDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def linear_arguments(**make: Any) -> list[Any]:
    return [torch.ones(2, 3, **make), torch.ones(4, 3, **make), torch.ones(4, **make)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ordinary(dtype: torch.dtype) -> None:
    x, w, b = linear_arguments(dtype=dtype)
    assert call_path(x, w, b) == OPERATOR
    assert call_path(x, w, None) == OPERATOR
    assert call_path(torch.ones(1, 1, 8, 8, dtype=dtype), torch.ones(4, 1, 3, 3, dtype=dtype), b) == OPERATOR
    for i in range(3):
        arguments = linear_arguments(dtype=dtype)
        arguments[i] = nn.Parameter(arguments[i]) if i else arguments[i].requires_grad_()
        assert call_path(*arguments) == FUNCTION
        with torch.no_grad():
            assert call_path(*arguments) == OPERATOR
        with torch.inference_mode():
            assert call_path(*arguments) == OPERATOR


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x, w, b: (x.to(torch.int32), w, b), id="dtype without a kernel"),
        pytest.param(lambda x, w, b: (x.to(torch.float16), w, b), id="float16 on the CPU"),
        pytest.param(lambda x, w, b: (x.to_sparse(), w, b), id="layout"),
        pytest.param(lambda x, w, b: (x.to("meta"), w, b), id="device"),
        pytest.param(lambda x, w, b: (x.as_subclass(Subclass), w, b), id="subclass as input"),
        pytest.param(lambda x, w, b: (x, w.as_subclass(Subclass), b), id="subclass as weight"),
        pytest.param(lambda x, w, b: (x, w, b.as_subclass(Subclass)), id="subclass as bias"),
        pytest.param(lambda x, w, b: (x, w[0], b), id="weight of one dimension"),
        pytest.param(lambda x, w, b: (x, torch.ones(4, 1, 3, 3), b), id="image of two dimensions"),
        pytest.param(lambda x, w, b: (x, w, b[:1]), id="bias that broadcasts"),
        pytest.param(lambda x, w, b: (x, w, b[0]), id="bias without dimensions"),
        pytest.param(lambda x, w, b: (None, w, b), id="no input"),
        pytest.param(lambda x, w, b: (x, w, 1.0), id="number as bias"),
        pytest.param(lambda x, w, b: (x, w), id="two arguments"),
    ],
)
def test_not_ordinary(change: Callable[..., tuple]) -> None:
    assert call_path(*change(*linear_arguments())) == GENERAL


@contextlib.contextmanager
def in_forward_mode() -> Any:
    with forward_ad.dual_level():
        yield


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "function mode": Nothing,
    "forward-mode AD": in_forward_mode,
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    net, image = lenet_ext.Net(), torch.ones(1, 1, 32, 32)
    parameters = list(net.parameters())
    assert call_path(*linear_arguments()) == OPERATOR
    assert lenet_path(image, parameters) == FUNCTION
    with MODES[mode]():
        assert call_path(*linear_arguments()) == GENERAL
        assert lenet_path(image, parameters) == GENERAL
    assert call_path(*linear_arguments()) == OPERATOR


def test_torch_func() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(call_path(torch.ones(2, 3), torch.ones(4, 3), None))
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    assert seen == [GENERAL, GENERAL]


def test_the_whole_network() -> None:
    net, image = lenet_ext.Net(), torch.ones(2, 1, 32, 32)
    parameters = list(net.parameters())
    assert lenet_path(image, parameters) == FUNCTION
    with torch.no_grad():
        assert lenet_path(image, parameters) == OPERATOR
    net.requires_grad_(False)
    assert lenet_path(image, parameters) == OPERATOR
    assert lenet_path(image.clone().requires_grad_(), parameters) == FUNCTION
    with NoDispatch():  # it would miss the layers
        assert lenet_path(image, parameters) == GENERAL
    for other in (image[0], image.double(), image[..., 1:], image.expand(2, 3, 32, 32), image.as_subclass(Subclass)):
        assert lenet_path(other, parameters) == GENERAL
    for i in range(10):
        plain: list[Any] = list(parameters)
        plain[i] = plain[i].detach()
        assert lenet_path(image, plain) == GENERAL
    for i in (0, 2, 4, 6):
        others: list[Any] = list(parameters)
        others[i] = nn.Parameter(others[i][:, :, 1:] if i < 4 else others[i][:, 1:])
        assert lenet_path(image, others) == GENERAL
    assert lenet_path(image, parameters[:9]) == GENERAL
    assert lenet_path(image, tuple(parameters)) == GENERAL


def test_untouched_parameters() -> None:
    class Child(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 3)
            self.size, self.pair = 1, (1, 1)

    def model() -> nn.Module:
        return nn.Sequential(Child(), nn.Linear(3, 3))

    children = (("0", Child, {"size": 1, "pair": (1, 1)}), ("1", nn.Linear, {}))
    plain = model()
    found = untouched_parameters(plain._modules, children)
    assert [id(p) for p in found] == [id(p) for p in plain.parameters()]

    def refuses(change: Callable[[Any], Any]) -> None:
        changed = model()
        change(changed)
        assert untouched_parameters(changed._modules, children) is None

    class Awkward:
        def __eq__(self, other: object) -> bool:
            raise ValueError("cannot be compared")

    refuses(lambda m: setattr(m[0], "size", 2))
    refuses(lambda m: setattr(m[0], "size", True))
    refuses(lambda m: setattr(m[0], "size", 1.0))
    refuses(lambda m: setattr(m[0], "size", Awkward()))
    refuses(lambda m: setattr(m[0], "pair", (1, True)))
    refuses(lambda m: setattr(m[0], "pair", (1, 1, 1)))
    refuses(lambda m: setattr(m[0], "pair", [1, 1]))
    refuses(lambda m: delattr(m[0], "size"))
    refuses(lambda m: setattr(m[1], "forward", lambda x: x))
    refuses(lambda m: setattr(m[1], "bias", None))
    refuses(lambda m: setattr(m, "1", Child()))
    refuses(lambda m: setattr(m, "1", None))
    refuses(lambda m: m.append(nn.ReLU()))
    refuses(lambda m: m.pop(1))
    refuses(lambda m: m[0].register_forward_hook(lambda *_: None))
    refuses(lambda m: m[0].register_forward_pre_hook(lambda *_: None))
    refuses(lambda m: m[1].register_full_backward_hook(lambda *_: None))
    refuses(lambda m: m[1].register_full_backward_pre_hook(lambda *_: None))
    refuses(lambda m: nn.utils.parametrizations.weight_norm(m[1]))
    assert untouched_parameters([], children) is None
