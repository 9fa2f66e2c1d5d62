"""Which calls are ordinary, so that they go straight to the operator; all else takes the general way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lenet_ext._C import (
    are_plain_leaves,
    call_conv_relu_max_pool2d,
    call_lenet,
    call_linear,
    call_linear_relu,
    call_relu_avg_pool2d,
    is_ordinary_lenet,
    untouched_parameters,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lenet_ext
from lenet_ext import ops
from lenet_ext.net import _CHILDREN

# As functional.normalize_options gives them.
CONVOLUTION = ((1, 1), (0, 0, 1, 1), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)


class Subclass(Tensor):
    pass


def is_ordinary(*arguments: Any) -> bool:
    """Whether the short way calls the operator."""
    weight = arguments[1]
    convolution = isinstance(weight, Tensor) and weight.dim() == 4
    output = call_conv_relu_max_pool2d(*arguments, CONVOLUTION) if convolution else call_linear(*arguments)
    return output is not None


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
    """With and without a gradient: derivatives are the operators' own."""
    x, w, b = linear_arguments(dtype=dtype)
    assert is_ordinary(x, w, None)
    assert is_ordinary(torch.ones(1, 1, 8, 8, dtype=dtype), torch.ones(4, 1, 3, 3, dtype=dtype), b)
    for tensors in ((x, w, b), (x.requires_grad_(), w, b), (x, nn.Parameter(w), nn.Parameter(b))):
        assert is_ordinary(*tensors)
        with torch.no_grad():
            assert is_ordinary(*tensors)
        with torch.inference_mode():
            assert is_ordinary(*tensors)


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
    assert not is_ordinary(*change(*linear_arguments()))


MODES = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "function mode": Nothing}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    net, image = lenet_ext.Net(), torch.ones(1, 1, 32, 32)
    parameters = list(net.parameters())
    assert is_ordinary(*linear_arguments())
    assert is_ordinary_lenet(image, parameters)
    with MODES[mode]():
        assert not is_ordinary(*linear_arguments())
        assert not is_ordinary_lenet(image, parameters)
    assert is_ordinary(*linear_arguments())


def test_forward_mode_is_ordinary() -> None:
    """The operators have tangents."""
    net = lenet_ext.Net()
    with forward_ad.dual_level():
        image = forward_ad.make_dual(torch.ones(1, 1, 32, 32), torch.ones(1, 1, 32, 32))
        assert is_ordinary(image, net.conv1.weight, net.conv1.bias)
        assert is_ordinary_lenet(image, list(net.parameters()))


def test_torch_func_looks_between_the_layers() -> None:
    net, seen = lenet_ext.Net(), []

    def function(x: Tensor) -> Tensor:
        seen.append(is_ordinary_lenet(torch.ones(1, 1, 32, 32), list(net.parameters())))
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    assert seen == [False, False]


def test_a_tracer_looks_between_the_layers() -> None:
    net, seen = lenet_ext.Net(), []

    def function(x: Tensor) -> Tensor:
        seen.append(is_ordinary_lenet(torch.ones(1, 1, 32, 32), list(net.parameters())))
        return x + 1

    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert seen == [False]


def test_the_whole_network() -> None:
    net, image = lenet_ext.Net(), torch.ones(2, 1, 32, 32)
    parameters = list(net.parameters())
    assert is_ordinary_lenet(image, parameters)
    with torch.no_grad():
        assert is_ordinary_lenet(image, parameters)
    assert is_ordinary_lenet(image.clone().requires_grad_(), parameters)
    assert is_ordinary_lenet(image.double(), list(lenet_ext.Net(dtype=torch.float64).parameters()))
    with NoDispatch():  # it would miss the layers
        assert not is_ordinary_lenet(image, parameters)
    for other in (image[0], image.bfloat16(), image[..., 1:], image.expand(2, 3, 32, 32), image.as_subclass(Subclass)):
        assert not is_ordinary_lenet(other, parameters)
    for i in range(10):
        plain: list[Any] = list(parameters)
        plain[i] = plain[i].detach()
        assert not is_ordinary_lenet(image, plain)
    for i in (0, 2, 4, 6):
        others: list[Any] = list(parameters)
        others[i] = nn.Parameter(others[i][:, :, 1:] if i < 4 else others[i][:, 1:])
        assert not is_ordinary_lenet(image, others)
    assert not is_ordinary_lenet(image, parameters[:9])
    assert not is_ordinary_lenet(image, tuple(parameters))


def test_untouched_parameters() -> None:
    class Child(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 3)
            self.size, self.pair = 1, (1, 1)

    def model() -> nn.Module:
        return nn.Sequential(Child(), nn.Linear(3, 3))

    children = (("0", Child, (("size", 1), ("pair", (1, 1)))), ("1", nn.Linear, ()))
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


def test_a_child_that_is_no_module_any_more() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    children = (("0", nn.Linear, {}),)
    assert untouched_parameters(model._modules, children) is not None
    del model[0].__dict__["_parameters"]
    assert untouched_parameters(model._modules, children) is None


def test_plain_leaves() -> None:
    parameters = list(nn.Linear(2, 3).parameters())
    assert are_plain_leaves(parameters)
    assert not are_plain_leaves(tuple(parameters))
    assert not are_plain_leaves([*parameters, torch.ones(1, requires_grad=True)])
    parameters[0].requires_grad_(False)
    assert not are_plain_leaves(parameters)


AVERAGE = ((2, 2), (2, 2), (0, 0), False, True, None)


def ordinary_calls() -> dict[str, tuple[Callable[[], Tensor | None], Callable[[], Tensor]]]:
    """The short way to each operator, and torch.ops."""
    x, w, b = (torch.randn(t.shape) for t in linear_arguments())
    image, kernel, bias = torch.randn(2, 1, 9, 9), torch.randn(4, 1, 3, 3), torch.randn(4)
    net, digit = lenet_ext.Net(), torch.randn(2, 1, 32, 32)
    return {
        "linear": (lambda: call_linear(x, w, b), lambda: ops.linear(x, w, b)),
        "linear without bias": (lambda: call_linear(x, w, None), lambda: ops.linear(x, w, None)),
        "linear_relu": (lambda: call_linear_relu(x, w, b), lambda: ops.linear_relu(x, w, b)),
        "conv_relu_max_pool2d": (
            lambda: call_conv_relu_max_pool2d(image, kernel, bias, CONVOLUTION),
            lambda: ops.conv_relu_max_pool2d(image, kernel, bias, *CONVOLUTION),
        ),
        "relu_avg_pool2d": (lambda: call_relu_avg_pool2d(image, AVERAGE), lambda: ops.relu_avg_pool2d(image, *AVERAGE)),
        "lenet": (
            lambda: call_lenet(net._modules, _CHILDREN, digit),
            lambda: ops.lenet(digit, list(net.parameters())),
        ),
    }


@pytest.mark.parametrize("name", ordinary_calls())
def test_a_call_from_here_is_a_call_of_the_operator(name: str) -> None:
    call, expected = ordinary_calls()[name]
    output = call()
    assert output is not None
    assert torch.equal(output, expected())
    assert output.requires_grad == (name == "lenet")  # whose parameters are Parameters
    with MODES["function mode"]():
        assert call() is None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    assert f"lenet_ext::{name.split()[0]}" in {event.name for event in profile.events()}


@pytest.mark.parametrize("name", ordinary_calls())
def test_a_tracer_is_not_gone_around(name: str) -> None:
    call, _ = ordinary_calls()[name]
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(call())
        return x + 1

    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert seen == [None]


def test_a_dispatch_mode_sees_the_operators() -> None:
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, w, b = linear_arguments()
    image, kernel = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3)
    with Log():
        call_linear(x, w, b)
        call_conv_relu_max_pool2d(image, kernel, None, CONVOLUTION)
        call_relu_avg_pool2d(image, AVERAGE)
    assert seen == [ops.linear, ops.conv_relu_max_pool2d, ops.relu_avg_pool2d]


def test_errors_are_the_operators() -> None:
    x, w, b = linear_arguments()
    with pytest.raises(
        RuntimeError, match=r"^linear: input must have shape \[\.\.\., 3\] for weight of shape \[4, 3\]"
    ):
        call_linear(x[:, :2], w, b)
    with pytest.raises(RuntimeError, match=r"^linear_relu: .*Double"):
        call_linear_relu(x, w.double(), b)
    with pytest.raises(RuntimeError, match=r"^conv_relu_max_pool2d: groups must be positive"):
        call_conv_relu_max_pool2d(
            torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3), None, (*CONVOLUTION[:3], 0, *CONVOLUTION[4:])
        )


# bool is a subclass of int, and 2**63 no int64.
STRANGE_OPTIONS = (1.0, "1", None, (1,), (1, 2, 3), (1, True), [1, 1], (1, 1.0), 2**63, (1, -(2**63) - 1))


@pytest.mark.parametrize("value", STRANGE_OPTIONS, ids=repr)
@pytest.mark.parametrize("at", range(len(CONVOLUTION)))
def test_options_that_are_not_normalized(at: int, value: Any) -> None:
    """They are Python's to look at, and to refuse."""
    options = (*CONVOLUTION[:at], value, *CONVOLUTION[at + 1 :])
    assert call_conv_relu_max_pool2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3), None, options) is None


def test_what_is_no_ordinary_call() -> None:
    x, w, b = linear_arguments()
    image = torch.ones(1, 1, 8, 8)
    for call in (call_linear, call_linear_relu):
        assert call(x, w) is None
        assert call(x.half(), w, b) is None
        assert call(x, w, b[:1]) is None
    assert call_conv_relu_max_pool2d(image[0], torch.ones(1, 1, 3, 3), None, CONVOLUTION) is None
    assert call_conv_relu_max_pool2d(image, torch.ones(1, 1, 3, 3), None) is None
    assert call_conv_relu_max_pool2d(image, torch.ones(1, 1, 3, 3), None, CONVOLUTION[:8]) is None
    assert call_conv_relu_max_pool2d(image, torch.ones(1, 1, 3, 3), None, list(CONVOLUTION)) is None
    assert call_relu_avg_pool2d(image[0], AVERAGE) is None
    assert call_relu_avg_pool2d(image) is None
    assert call_relu_avg_pool2d(image, (*AVERAGE[:5], 1.0)) is None
    assert call_relu_avg_pool2d(image, (*AVERAGE[:3], 0, *AVERAGE[4:])) is None
    net = lenet_ext.Net()
    assert call_lenet(net._modules, _CHILDREN) is None
    assert call_lenet(net._modules, _CHILDREN, torch.ones(1, 1, 28, 28)) is None
    net.fc1.register_forward_hook(lambda *_: None)
    assert call_lenet(net._modules, _CHILDREN, torch.ones(1, 1, 32, 32)) is None
