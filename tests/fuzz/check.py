"""One call, tried: ours and the stock composition side by side. `check` returns what differs, or None.

Both get operands of the same values and strides. What they must agree on: whether there is an error and of which class;
shapes and dtypes; and the values, which are compared with stock in float64. Operands are small integers, mostly, whose
sums are exact; for random values `reference.assert_accurate` says how much rounding is allowed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import reference
import torch
import torch.nn.functional as F
from failures import kind
from torch import Tensor, nn

import lenet_ext
from lenet_ext import functional

from .calls import KERNEL_DTYPES, OPERANDS, SAVING, Call

Function = Callable[..., Tensor]
Results = list[tuple[str, Tensor]]


def check(call: Call) -> str | None:
    """What is wrong with this call, in a sentence; None where nothing is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(call.threads)
    try:
        if call.device == "meta":
            return _check_without_data(call)
        if _has_window_in_padding(call):
            return _check_window_in_padding(call)
        return _compare(call, _outcome(call, _ours, check_operands=True), _outcome(call, _stock))
    finally:
        torch.set_num_threads(threads)
        if call.compiled:
            torch._dynamo.reset()


def _compare(call: Call, ours: Results | Exception, stock: Results | Exception) -> str | None:
    if call.wrong is not None and call.wrong[1] == "meta":
        # Stock takes some of these, and returns whatever was in memory.
        refused = isinstance(ours, (RuntimeError, NotImplementedError))
        return None if refused else f"tensors on two devices: {ours!r} instead of a RuntimeError"
    if call.wrong is not None and call.wrong[0] == "bias" and isinstance(ours, RuntimeError):
        # Where stock adds the bias in a step of its own, that takes other dtypes as well.
        return None
    if call.mode in SAVING and isinstance(stock, RuntimeError) and not isinstance(ours, Exception):
        # Ours saves less than stock, so more is allowed; the gradients are what they would have been.
        kept = {what for what, _ in ours}
        stock = _outcome(replace(call, mode="backward"), _stock)
        stock = stock if isinstance(stock, Exception) else [row for row in stock if row[0] in kept]
        call = replace(call, mode="backward", wanted=tuple(key for key in OPERANDS if f"grad of {key}" in kept))
    if isinstance(ours, Exception) or isinstance(stock, Exception):
        same = isinstance(ours, Exception) and isinstance(stock, Exception) and kind(ours) is kind(stock)
        return None if same else f"ours: {_told(ours)}; stock: {_told(stock)}"
    for (what, a), (_, s) in zip(ours, stock, strict=True):
        if a.shape != s.shape or a.dtype != s.dtype:
            return f"{what}: {a.dtype} {tuple(a.shape)}, stock {s.dtype} {tuple(s.shape)}"
        # Stock takes the layout of a channels_last weight; so do calls that go to stock.
        as_stock = a.is_contiguous() or a.stride() == s.stride()
        if what == "output" and call.layouts[0] == "contiguous" and not as_stock:
            return f"{what} of a contiguous input: strides {a.stride()}"
    exact = _outcome(call, _stock, dtype="float64") if call.dtype in KERNEL_DTYPES else None
    if call.wrong is not None and isinstance(exact, Exception):
        exact = None  # the operands in float64 are contiguous: stock's checks depend on that
    if exact is None:
        pairs = [(what, a, s, s) for (what, a), (_, s) in zip(ours, stock, strict=True)]
        return next(filter(None, itertools.starmap(_unequal, pairs)), None)
    if isinstance(exact, Exception):
        return f"stock: {_told(stock)}, but in float64: {_told(exact)}"
    if call.values == "uniform":
        return _inaccurate(call, ours, stock, exact)
    triples = ((what, a, s, e) for (what, a), (_, s), (_, e) in zip(ours, stock, exact, strict=True))
    return next(filter(None, itertools.starmap(_unequal, triples)), None)


def _told(outcome: Results | Exception) -> str:
    if isinstance(outcome, Exception):
        return f"{type(outcome).__name__} ({str(outcome).strip().partition(chr(10))[0][:300]})"
    return f"accepted, {', '.join(f'{what} {tuple(t.shape)}' for what, t in outcome)}"


def _unequal(what: str, ours: Tensor, stock: Tensor, exact: Tensor) -> str | None:
    """Each element is the exact one, rounded, or else what stock has there: its own kernels differ on NaN."""
    ours, stock, expected = (t.detach() for t in (ours, stock, exact.detach().to(ours.dtype)))
    good = _same(ours, expected) | _same(ours, stock)
    if ours.dtype == torch.bfloat16:
        # Between the operators of a derivative of higher order stock rounds to bfloat16 as well.
        a, s, e = (t.double().nan_to_num(0, 0, 0) for t in (ours, stock, exact))
        largest = (s - e).abs().max() if e.numel() else 0
        near = (a - e).abs() <= torch.finfo(ours.dtype).eps * e.abs() + reference.STOCK_FACTOR * largest
        good |= near & ours.isfinite() & expected.isfinite()
    if bool(good.all()):
        return None
    at = tuple((~good).nonzero()[0].tolist())
    found = f"{ours[at].item()} instead of {expected[at].item()} (stock {stock[at].item()})"
    return f"{what}: {int((~good).sum())} of {good.numel()} differ, at {at} {found}"


def _same(a: Tensor, b: Tensor) -> Tensor:
    equal = a == b
    return equal | (a.isnan() & b.isnan()) if a.is_floating_point() or a.is_complex() else equal


def _inaccurate(call: Call, ours: Results, stock: Results, exact: Results) -> str | None:
    operands = _operands(call, "float64")
    grad = _uniform_grad(call, exact[0][1]) if call.mode == "backward" else torch.zeros_like(exact[0][1])
    if call.name == "conv_relu_max_pool2d":
        magnitude = reference.magnitudes(operands, call.options(), grad)
    elif call.name == "relu_avg_pool2d":
        magnitude = reference.run(reference.relu_avg_pool2d, operands[:1], call.options(), grad.abs())
    else:
        if call.name == "linear_relu":
            grad = grad * (exact[0][1] > 0)
        absolute = [None if t is None else t.abs() for t in operands]
        magnitude = reference.run(F.linear, absolute, {}, grad.abs())
    sizes = dict(magnitude.items())
    for (what, a), (_, s), (_, e) in zip(ours, stock, exact, strict=True):
        try:
            reference.assert_accurate(a, e.detach(), sizes[what], what, stock=s)
        except AssertionError as error:
            return str(error)
    return None


# --------------------------------------------------------------------------------------------------------------------
# The two sides


def _ours(call: Call) -> Function:
    options = call.options() | _wrong_option(call)
    if call.way == "nn":
        return _module(call, options, fused=True)
    if call.way == "functional":
        return lambda *operands: getattr(functional, call.name)(*_taken(call, operands), **options)
    operator = getattr(torch.ops.lenet_ext, call.name)
    if call.name == "relu_avg_pool2d":
        return lambda tensor, *_: operator(tensor, *functional._average_options(**options))
    if call.name != "conv_relu_max_pool2d":
        return operator

    def function(input: Any, weight: Any, bias: Any) -> Tensor:
        kernel = (*weight.shape[-2:],) if isinstance(weight, Tensor) and weight.dim() >= 2 else call.kernel
        return operator(input, weight, bias, *functional.normalize_options(**options, kernel_size=kernel))

    return function


def _stock(call: Call) -> Function:
    options = call.options() | _wrong_option(call)
    if call.way == "nn":
        return _module(call, options, fused=False)
    return lambda *operands: getattr(reference, call.name)(*_taken(call, operands), **options)


def _taken(call: Call, operands: Sequence[Any]) -> Sequence[Any]:
    return operands[:1] if call.name == "relu_avg_pool2d" else operands


class _StockConv(nn.Conv2d):
    def __init__(self, *args: Any, pool: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pool = pool

    def forward(self, input: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(super().forward(input)), *reference._pool_arguments(self.pool))


class _StockLinearReLU(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def _module(call: Call, options: dict[str, Any], fused: bool) -> Function:
    """A layer as a function of input, weight and bias."""
    if call.name == "relu_avg_pool2d":
        if fused:
            pooling: nn.Module = lenet_ext.nn.ReLUAvgPool2d(**options)
        else:
            pooling = nn.Sequential(nn.ReLU(), nn.AvgPool2d(**options))
        return lambda tensor, *_: pooling(tensor)
    if call.name == "conv_relu_max_pool2d":
        sizes = (call.groups * call.channels, call.groups * call.out_channels, call.kernel)
        convolution, pool = reference.conv_options(options), reference.pool_options(options)

        if fused:
            layer = lenet_ext.nn.ConvReLUMaxPool2d(*sizes, **convolution, **pool, bias=call.bias, device="meta")
        else:
            layer = _StockConv(*sizes, **convolution, pool=pool, bias=call.bias, device="meta")
    else:
        stock = {"linear": nn.Linear, "linear_relu": _StockLinearReLU}[call.name]
        ours = {"linear": lenet_ext.nn.Linear, "linear_relu": lenet_ext.nn.LinearReLU}[call.name]
        layer = (ours if fused else stock)(call.in_features, call.out_features, bias=call.bias, device="meta")

    def function(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        parameters = {"weight": weight} | ({"bias": bias} if call.bias else {})
        return torch.func.functional_call(layer, parameters, (input,))

    return function


# --------------------------------------------------------------------------------------------------------------------
# Operands


def _generator(call: Call, key: str) -> torch.Generator:
    names = (*OPERANDS, "grad", "grad of input", "grad of weight", "grad of bias", "grad of grad", "more")
    return torch.Generator().manual_seed(call.seed * len(names) + names.index(key))


def _integers(call: Call, key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randint(-1, 2, tuple(shape), generator=_generator(call, key)).to(dtype)


def _pattern(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Integers that are not random, which torch.func.vmap allows in the function that it maps."""
    number = torch.arange(torch.Size(shape).numel())
    return ((number * number * 17 + number * 5) % 101 % 3 - 1).to(dtype).view(shape)


def _uniform(call: Call, key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Numbers of `dtype` in [-1, 1]; float64 has the same ones as the call's own dtype."""
    values = torch.rand(tuple(shape), generator=_generator(call, key), dtype=torch.float64) * 2 - 1
    return values.to(getattr(torch, call.dtype)).to(dtype)


def _values(call: Call, key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if call.values == "uniform":
        return _uniform(call, key, shape, dtype)
    values = _integers(call, key, shape, dtype)
    if call.values == "zeros" and key == call.special:
        return -torch.zeros_like(values)
    if call.values in ("denormal", "large") and key in ("input", "bias"):
        # Of either dtype, and exact: a power of two times a small integer.
        small = {"float32": 2.0**-140, "float64": 2.0**-1060}.get(call.dtype, 1.0)
        return values * (small if call.values == "denormal" else 2.0**60)
    if call.values in ("nan", "infinite") and key == call.special and values.numel():
        flat = values.flatten()
        specials = (float("nan"),) if call.values == "nan" else (float("inf"), -float("inf"))
        for special in specials:
            flat[torch.randint(flat.numel(), (1,), generator=_generator(call, "more"))] = special
        return flat.view(values.shape)
    return values


def _laid_out(layout: str, t: Tensor) -> Tensor:
    if layout == "parameter":
        return nn.Parameter(t, requires_grad=False)
    if layout == "negative":  # a view that negates lazily
        return torch.complex(t, -t).conj().imag if t.dtype in (torch.float32, torch.float64) else t
    if t.numel() == 0 or t.dim() == 0 or (layout == "transposed" and t.dim() < 2):
        return t
    if layout in ("sliced", "every_other", "misaligned") and not t.is_floating_point():
        return t  # these put NaN around the values
    if layout == "expanded":
        return t[:1].expand(t.shape)
    if layout == "all expanded":
        return t[(slice(0, 1),) * t.dim()].expand(t.shape)
    if layout == "overlapping":  # rows that share all but their first element
        row = t.reshape(-1)
        strides = [1] * t.dim()
        return torch.cat([row, row]).as_strided(t.shape, strides)
    return reference.LAYOUTS[layout](t)


def _operands(call: Call, dtype: str) -> list[Any]:
    """Input, weight and bias; in the call's own dtype with its strides and what is wrong with one of them."""
    operands: list[Any] = []
    for (key, shape), layout in zip(call.shapes().items(), call.layouts, strict=False):
        tensor = None
        if shape is not None:
            # The layout may repeat values, which the float64 operands then do as well.
            tensor = _laid_out(layout, _values(call, key, shape, getattr(torch, call.dtype)))
            if call.wrong is not None and call.wrong[0] == key:
                tensor = _wrong_tensor(call.wrong[1], tensor)
            if dtype != call.dtype and isinstance(tensor, Tensor):
                tensor = tensor.to_dense().to(getattr(torch, dtype)).contiguous()
        operands.append(tensor)
    return operands


def _wrong_tensor(what: str, t: Tensor) -> Any:
    changes: dict[str, Callable[[], Any]] = {
        "None": lambda: None,
        "a list": t.tolist,
        "a number": lambda: 1.0,
        "meta": lambda: t.to("meta"),
        "sparse": t.to_sparse,
        "a dimension less": lambda: t[0] if t.dim() and t.shape[0] else t,
        "a dimension more": lambda: t[None],
        "longer": lambda: torch.cat([t, t], -1) if t.dim() else t,
        "shorter": lambda: t[..., :-1] if t.dim() else t,
        "empty": lambda: t[..., :0] if t.dim() else t,
        "nan everywhere": lambda: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    }
    return changes[what]() if what in changes else t.to(getattr(torch, what))


def _wrong_option(call: Call) -> dict[str, Any]:
    if call.wrong is None or call.wrong[0] in OPERANDS:
        return {}
    return {call.wrong[0]: eval(call.wrong[1], {"tensor": torch.tensor})}


# --------------------------------------------------------------------------------------------------------------------
# Modes


def _outcome(
    call: Call, side: Callable[[Call], Function], dtype: str | None = None, check_operands: bool = False
) -> Results | Exception:
    dtype = dtype or call.dtype
    operands = _operands(call, dtype)
    try:
        function = side(call)
        if call.compiled and side is _ours:
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = _RUN[call.mode](call, function, operands)
    except Exception as error:
        results = error
    if check_operands and call.mode != "operand changed":
        _assert_untouched(operands, _operands(call, dtype))
    return results


def _assert_untouched(operands: list[Any], before: list[Any]) -> None:
    for key, operand, copy in zip(OPERANDS, operands, before, strict=True):
        if isinstance(operand, Tensor) and operand.device.type == "cpu" and operand.layout == torch.strided:
            assert bool(_same(operand.detach(), copy.detach()).all()), f"the call changed {key}"


def _leaves(call: Call, operands: list[Any]) -> list[Any]:
    return [
        t.detach().requires_grad_(name in call.wanted) if isinstance(t, Tensor) else t
        for name, t in zip(OPERANDS, operands, strict=True)
    ]


def _named(call: Call, leaves: list[Any]) -> list[tuple[str, Tensor]]:
    wanted = ((name, t) for name, t in zip(OPERANDS, leaves, strict=True) if name in call.wanted)
    return [(f"grad of {name}", t) for name, t in wanted if isinstance(t, Tensor)]


def _grad(call: Call, output: Tensor) -> Tensor:
    if call.values == "uniform":
        return _uniform_grad(call, output)
    own = _laid_out(call.layouts[3], _values(call, "grad", output.shape, getattr(torch, call.dtype)))
    if call.compiled:  # where stock as well takes plain tensors alone for gradients
        own = own.detach()
    return own if output.dtype == own.dtype else own.to(output.dtype)


def _uniform_grad(call: Call, output: Tensor) -> Tensor:
    """Nothing goes where rounding may choose another winner; two right answers have different gradients there."""
    if call.name == "relu_avg_pool2d":  # its ReLU comes before anything is rounded
        return _uniform(call, "grad", output.shape, output.dtype)
    operands = _operands(call, "float64")
    if call.name == "conv_relu_max_pool2d":
        clear = reference.clear_winners(operands, call.options(), gap=1e-4)
    else:
        clear = F.linear(*operands).abs() > 1e-4
    return _uniform(call, "grad", output.shape, output.dtype) * clear


def _plain(call: Call, function: Function, operands: list[Any]) -> Results:
    return [("output", function(*operands))]


def _no_grad(call: Call, function: Function, operands: list[Any]) -> Results:
    with torch.no_grad():
        return _plain(call, function, _leaves(call, operands))


def _inference_mode(call: Call, function: Function, operands: list[Any]) -> Results:
    leaves = _leaves(call, operands)
    with torch.inference_mode():
        return _plain(call, function, leaves)


def _inference_tensors(call: Call, function: Function, operands: list[Any]) -> Results:
    """Made under inference_mode: autograd may not save them, so only what needs none of them has a gradient."""
    with torch.inference_mode():
        made = [t.clone() if isinstance(t, Tensor) and i == 0 else t for i, t in enumerate(operands)]
    leaves = [made[0], *_leaves(call, operands)[1:]]
    output = function(*leaves)
    named = [(name, leaf) for name, leaf in _named(call, leaves) if leaf is not made[0]]
    if not named:
        return [("output", output)]
    return [("output", output), *_gradients(output, named, _grad(call, output))]


def _gradients(output: Tensor, named: list[tuple[str, Tensor]], grad: Tensor, **options: Any) -> Results:
    grads = torch.autograd.grad(output, [leaf for _, leaf in named], grad, **options)
    return [(name, value) for (name, _), value in zip(named, grads, strict=True)]


def _backward(call: Call, function: Function, operands: list[Any]) -> Results:
    leaves = _leaves(call, operands)
    output = function(*leaves)
    named = _named(call, leaves)
    return [("output", output.detach()), *(_gradients(output, named, _grad(call, output)) if named else [])]


def _backward_twice(call: Call, function: Function, operands: list[Any]) -> Results:
    leaves = _leaves(call, operands)
    output = function(*leaves)
    for retain in (True, False):
        output.backward(_grad(call, output), retain_graph=retain)
    return [("output", output.detach()), *((name, leaf.grad) for name, leaf in _named(call, leaves))]


def _double_backward(call: Call, function: Function, operands: list[Any]) -> Results:
    leaves = _leaves(call, operands)
    output = function(*leaves)
    grad = _grad(call, output).detach().requires_grad_()
    named = _named(call, leaves)
    first = _gradients(output, named, grad, create_graph=True)
    if not any(value.requires_grad for _, value in first):
        return [("output", output.detach()), *first]
    total = sum((value * _integers(call, name, value.shape, value.dtype)).sum() for name, value in first)
    named = [*named, ("grad of grad", grad)]
    second = torch.autograd.grad(total, [leaf for _, leaf in named], materialize_grads=True)
    seconds = [(f"second {name}", value) for (name, _), value in zip(named, second, strict=True)]
    return [("output", output.detach()), *((name, value.detach()) for name, value in first), *seconds]


def _output_changed(call: Call, function: Function, operands: list[Any]) -> Results:
    """In place, before the backward pass: allowed where no saved tensor is the output."""
    leaves = _leaves(call, operands)
    output = function(*leaves)
    output.mul_(2)
    return [("output", output.detach().clone()), *_gradients(output, _named(call, leaves), _grad(call, output))]


def _operand_changed(call: Call, function: Function, operands: list[Any]) -> Results:
    """One operand, in place, between the passes: allowed where no wanted gradient needs it."""
    leaves = _leaves(call, operands)
    output = function(*leaves)
    result = output.detach().clone()
    changed = leaves[call.seed % 2]
    with torch.no_grad():
        changed.add_(1)
    return [("output", result), *_gradients(output, _named(call, leaves), _grad(call, output))]


def _numbers(call: Call) -> tuple[int, ...]:
    shapes = call.shapes()
    return tuple(i for i, name in enumerate(OPERANDS) if name in call.wanted and shapes[name] is not None)


def _tree(what: str, tree: Any) -> Results:
    return [(f"{what} {i}", leaf) for i, leaf in enumerate(torch.utils._pytree.tree_leaves(tree))]


def _scalar(call: Call, function: Function) -> Function:
    def total(*operands: Any) -> Tensor:
        output = function(*operands)
        return (output * _pattern(output.shape, output.dtype)).sum()

    return total


def _func_grad(call: Call, function: Function, operands: list[Any]) -> Results:
    numbers = _numbers(call) or (0,)
    return _tree("grad", torch.func.grad(_scalar(call, function), argnums=numbers)(*operands))


def _stacked(call: Call, operands: list[Any]) -> tuple[list[Any], tuple[int | None, ...]]:
    numbers = _numbers(call) or (0,)
    in_dims = tuple(0 if i in numbers and t is not None else None for i, t in enumerate(operands))
    stacked = [t if dim is None else torch.stack([t, -t]) for t, dim in zip(operands, in_dims, strict=True)]
    return stacked, in_dims


def _vmap(call: Call, function: Function, operands: list[Any]) -> Results:
    stacked, in_dims = _stacked(call, operands)
    return _tree("output", torch.func.vmap(function, in_dims=in_dims)(*stacked))


def _vmap_grad(call: Call, function: Function, operands: list[Any]) -> Results:
    stacked, in_dims = _stacked(call, operands)
    argnums = tuple(i for i in (0, 1) if call.shapes()[OPERANDS[i]] is not None)
    gradient = torch.func.grad(_scalar(call, function), argnums=argnums)
    return _tree("grad", torch.func.vmap(gradient, in_dims=in_dims)(*stacked))


def _varied(call: Call, function: Function, operands: list[Any]) -> tuple[Function, tuple[Tensor, ...]]:
    """The function of the wanted operands alone, and these."""
    numbers = _numbers(call) or (0,)

    def of_wanted(*wanted: Tensor) -> Tensor:
        arguments = list(operands)
        for number, tensor in zip(numbers, wanted, strict=True):
            arguments[number] = tensor
        return function(*arguments)

    return of_wanted, tuple(operands[number] for number in numbers)


def _tangents(call: Call, primals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(_integers(call, f"grad of {OPERANDS[i]}", t.shape, t.dtype) for i, t in enumerate(primals))


def _jvp(call: Call, function: Function, operands: list[Any]) -> Results:
    of_wanted, primals = _varied(call, function, operands)
    return _tree("output and tangent", torch.func.jvp(of_wanted, primals, _tangents(call, primals)))


def _jvp_grad(call: Call, function: Function, operands: list[Any]) -> Results:
    of_wanted, primals = _varied(call, function, operands)
    gradient = torch.func.grad(_scalar(call, of_wanted), argnums=tuple(range(len(primals))))
    return _tree("grad and tangent", torch.func.jvp(gradient, primals, _tangents(call, primals)))


_RUN: dict[str, Callable[[Call, Function, list[Any]], Results]] = {
    "plain": _plain,
    "no_grad": _no_grad,
    "inference_mode": _inference_mode,
    "inference tensors": _inference_tensors,
    "backward": _backward,
    "backward twice": _backward_twice,
    "double backward": _double_backward,
    "output changed": _output_changed,
    "operand changed": _operand_changed,
    "func.grad": _func_grad,
    "vmap": _vmap,
    "vmap(grad)": _vmap_grad,
    "jvp": _jvp,
    "jvp(grad)": _jvp_grad,
}


# --------------------------------------------------------------------------------------------------------------------
# Where stock is no yardstick


def _has_window_in_padding(call: Call) -> bool:
    """A pooling window without one number in it: stock's output there is -inf, and its backward writes elsewhere."""
    if call.name != "conv_relu_max_pool2d" or not any(call.pool_padding) or call.pool_dilation == (1, 1):
        return False
    plain = _outcome(replace(call, mode="plain", values="integers", wrong=None, device="cpu"), _stock, "float64")
    return not isinstance(plain, Exception) and bool((plain[0][1] == -float("inf")).any())


def _check_window_in_padding(call: Call) -> str | None:
    """The output is stock's; the gradients have to be there, and are tested in operators/test_odd_cases.py."""
    _outcome(call, _ours)
    plain = replace(call, mode="plain", values="integers", wrong=None)
    return _compare(plain, _outcome(plain, _ours), _outcome(plain, _stock))


def _check_without_data(call: Call) -> str | None:
    """Shape, dtype and strides are those of the output with data; what stock refuses is refused."""
    stock = _outcome(call, _stock)

    def moved(side: Callable[[Call], Function]) -> Callable[[Call], Function]:
        def moved_side(call: Call) -> Function:
            function = side(call)
            return lambda *operands: function(*(_on_meta(t) if isinstance(t, Tensor) else t for t in operands))

        return moved_side

    without = _outcome(call, moved(_ours))
    if isinstance(without, Exception) or isinstance(stock, Exception):
        return _compare(call, without, stock)
    # Stock's own convolution has another layout on meta than on the CPU.
    goes_to_stock = call.name == "conv_relu_max_pool2d" and math.prod(call.pool_kernel_size) > 255
    with_data = _outcome(call, moved(_stock) if goes_to_stock else _ours)
    if isinstance(with_data, Exception):
        return _compare(call, with_data, stock)
    for (what, a), (_, e) in zip(without, with_data, strict=True):
        if (a.shape, a.dtype, a.stride()) != (e.shape, e.dtype, e.stride()):
            return f"{what} on meta: {a.dtype} {tuple(a.shape)} {a.stride()}, on CPU {e.dtype} {e.shape} {e.stride()}"
    return None


def _on_meta(t: Tensor) -> Tensor:
    if t.layout != torch.strided:
        return t.to("meta")
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
