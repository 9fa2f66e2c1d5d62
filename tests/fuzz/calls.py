"""What the fuzzer tries: whole calls, each a set of choices that is drawn from a seed.

A choice that is left at its default is the simplest one, and every combination of choices is a call, so a call that
shows a fault is made small by dropping its choices one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

OPERANDS = ("input", "weight", "bias")
KERNEL_DTYPES = ("float32", "float64", "bfloat16")
# First derivatives and what makes none: here random values have a yardstick. Elsewhere only integers do, whose sums
# are exact.
FIRST_ORDER = ("plain", "no_grad", "inference_mode", "backward")
# Errors come of what has been saved. Stock saves a copy of an operand whose strides do not suit it.
SAVING = ("inference tensors", "operand changed")
MODES = (
    *(*FIRST_ORDER, *SAVING, "backward twice", "double backward", "output changed"),
    *("func.grad", "vmap", "vmap(grad)", "jvp", "jvp(grad)"),
)


@dataclasses.dataclass(frozen=True, repr=False)
class Call:
    name: str = "linear"
    way: str = "functional"  # nn: the layer; ops: the registered operator
    mode: str = "plain"
    wanted: tuple[str, ...] = OPERANDS  # what requires a gradient, and what vmap and jvp vary
    compiled: bool = False
    device: str = "cpu"  # meta: shapes, strides and errors
    threads: int = 1
    dtype: str = "float32"
    values: str = "integers"
    special: str = "input"  # the operand, or "grad", that has the NaN or the infinity of `values`
    layouts: tuple[str, str, str, str] = ("contiguous",) * 4  # of the operands and the gradient of the output
    wrong: tuple[str, str] | None = None  # an argument, and what is passed for it: keys of WRONG_*
    bias: bool = True
    seed: int = 0  # of the values

    leading: tuple[int, ...] = (1,)  # linear: sizes of the input before the features
    in_features: int = 1
    out_features: int = 1

    batch: int | None = 1  # conv: None is an image without a batch
    channels: int = 1  # of a group, as are out_channels
    out_channels: int = 1
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: Any = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    pool_kernel_size: tuple[int, int] = (1, 1)
    pool_stride: tuple[int, int] | None = None
    pool_padding: tuple[int, int] = (0, 0)
    pool_dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True  # relu_avg_pool2d: the others are batch, channels, margin and pool_*
    divisor_override: int | None = None
    margin: tuple[int, int] = (0, 0)  # rows and columns beyond the fewest that give an output

    def choices(self) -> dict[str, Any]:
        """What differs from the simplest call."""
        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in chosen.items() if value != getattr(SIMPLEST, name)}

    def __repr__(self) -> str:
        return f"Call({', '.join(f'{name}={value!r}' for name, value in self.choices().items())})"

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        if self.name in ("linear", "linear_relu"):
            features = self.out_features, self.in_features
            return {
                "input": (*self.leading, features[1]),
                "weight": features,
                "bias": features[:1] if self.bias else None,
            }
        batch = () if self.batch is None else (self.batch,)
        if self.name == "relu_avg_pool2d":
            windows = zip(self.pool_kernel_size, self.pool_padding, self.margin, strict=True)
            size = [max(0, max(1, kernel - 2 * padding) + margin) for kernel, padding, margin in windows]
            return {"input": (*batch, self.channels, *size), "weight": None, "bias": None}
        size = []
        for i in (0, 1):
            reach = self.dilation[i] * (self.kernel[i] - 1) + 1
            around = {"valid": 0, "same": reach - 1}.get(self.padding) if isinstance(self.padding, str) else None
            around = 2 * self.padding[i] if around is None else around
            pool_reach = self.pool_dilation[i] * (self.pool_kernel_size[i] - 1) + 1
            convolved = max(1, pool_reach - 2 * self.pool_padding[i])
            size.append(max(0, max(1, (convolved - 1) * self.stride[i] + reach - around) + self.margin[i]))
        out_channels = self.groups * self.out_channels
        return {
            "input": (*batch, self.groups * self.channels, *size),
            "weight": (out_channels, self.channels, *self.kernel),
            "bias": (out_channels,) if self.bias else None,
        }

    def options(self) -> dict[str, Any]:
        if self.name == "relu_avg_pool2d":
            names = ("kernel_size", "stride", "padding")
            window = {name: getattr(self, f"pool_{name}") for name in names}
            return window | {
                name: getattr(self, name) for name in ("ceil_mode", "count_include_pad", "divisor_override")
            }
        if self.name != "conv_relu_max_pool2d":
            return {}
        names = ("stride", "padding", "dilation", "groups", "pool_kernel_size", "pool_stride", "pool_padding")
        return {name: getattr(self, name) for name in (*names, "pool_dilation", "ceil_mode")}


SIMPLEST = Call()


def minimal(call: Call, fails: Callable[[Call], bool]) -> Call:
    """Drops every choice that the failure does not need, until none can be dropped; then smaller numbers."""
    dropped = True
    while dropped:
        dropped = False
        for name in call.choices():
            simpler = dataclasses.replace(call, **{name: getattr(SIMPLEST, name)})
            if fails(simpler):
                call, dropped = simpler, True
    for name, value in call.choices().items():
        for smaller in _smaller(value):
            simpler = dataclasses.replace(call, **{name: smaller})
            if fails(simpler):
                call = simpler
                break
    return call


def _smaller(value: Any) -> list[Any]:
    """Simpler values of one choice, the simplest first."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [n for n in (0, 2, 3, 5, 9, 17) if n < value]
    if isinstance(value, tuple) and value and all(isinstance(v, int) for v in value):
        return [tuple(min(v, n) for v in value) for n in (2, 3, 5, 9) if n < max(value)]
    return []


# --------------------------------------------------------------------------------------------------------------------
# Drawing

# Each of these stands for an option, as it is written here.
WRONG_OPTIONS = (
    *("True", "1.5", "'1'", "'same'", "'full'", "None", "()", "(1,)", "[1, 1]", "(1, 1, 1)", "(1.0, 1)", "(True, 1)"),
    *("-1", "0", "1", "2", "(0, 1)", "(1, -1)", "2**62", "2**63", "tensor(1)", "tensor(1.5)", "tensor([1, 1])"),
)
WRONG_TENSORS = (
    *("None", "a list", "a number", "float64", "float16", "bfloat16", "int64", "complex64", "meta", "sparse"),
    *("a dimension less", "a dimension more", "longer", "shorter", "empty", "nan everywhere"),
)
UNSUPPORTED = ("float16", "int64", "complex64")  # dtypes without a kernel on the CPU
LAYOUTS = (
    *("channels_last", "transposed", "sliced", "every_other", "batch_last", "misaligned"),
    *("expanded", "all expanded", "overlapping", "negative", "parameter"),
)
STRIDED = tuple(name for name in LAYOUTS if name not in ("misaligned", "parameter"))
# The layers that have kernels of their own: channels, out_channels, margin of a 5x5 kernel and a 2x2 pool.
LENET = ((1, 6, 26), (6, 16, 8))


class _Draw(Random):
    def mostly(self, plain: Any, *others: Any, share: float = 0.75) -> Any:
        return plain if self.random() < share else self.choice(others)

    def pair(self, plain: int, *others: int, share: float = 0.75) -> tuple[int, int]:
        first = self.mostly(plain, *others, share=share)
        return first, self.mostly(first, plain, *others)


def draw(seed: int) -> Call:
    """The call of this seed: the same in every process and on every machine."""
    random = _Draw(seed)
    name = random.choice(("conv_relu_max_pool2d", "conv_relu_max_pool2d", "linear", "linear_relu"))
    call = _of_linear(random) if name != "conv_relu_max_pool2d" else _of_conv(random)
    # Drawn apart, so that the other seeds are the calls that they were before there was average pooling.
    average = _Draw(f"average pooling {seed}")
    if average.random() < 0.15:
        name, call = "relu_avg_pool2d", _of_average_pooling(average)
    call["name"] = name
    call["way"] = random.mostly("functional", "nn", "ops", share=0.6)
    call["mode"] = random.choice(MODES)
    call["dtype"] = random.choice((*KERNEL_DTYPES, "float32"))
    call["values"] = random.mostly("integers", "uniform", "nan", "infinite", "denormal", "large", "zeros", share=0.6)
    call["special"] = random.choice((*OPERANDS, "grad"))
    call["layouts"] = tuple(random.mostly("contiguous", *LAYOUTS, share=0.6) for _ in range(4))
    call["bias"] = random.random() < 0.7
    call["threads"] = random.mostly(1, 2, 3, 7)
    call["seed"] = seed
    if random.random() < 0.4:
        call["wanted"] = tuple(name for name in OPERANDS if random.random() < 0.5) or OPERANDS
    rare = random.random()
    if rare < 0.15:
        call["wrong"] = _wrong(random, call)
    elif rare < 0.2:
        call["dtype"] = random.choice(("float16", "float16", "complex64", "int64", "int32", "uint8", "bool"))
        if call["dtype"] not in ("float16", "complex64"):
            call["mode"] = "plain"
    elif rare < 0.25:
        call["device"], call["mode"] = "meta", "plain"
    elif rare < 0.254:
        call["compiled"] = True
        call["mode"] = random.choice(FIRST_ORDER)
    return Call(**_consistent(call))


def _of_linear(random: _Draw) -> dict[str, Any]:
    sizes = (*range(1, 18), 31, 32, 33, 64, 65, 84, 120, 400)
    leading = random.choice(((), (0,), (1,), (2,), (5,), (17,), (33,), (2, 3), (1, 0, 2), (3, 1, 2), (2, 1, 2, 3)))
    features = {key: random.mostly(random.choice(sizes), 0, share=0.98) for key in ("in_features", "out_features")}
    return {"leading": random.mostly(leading, (130,), (700,), share=0.97), **features}


def _of_conv(random: _Draw) -> dict[str, Any]:
    if random.random() < 0.1:
        channels, out_channels, margin = random.choice(LENET)
        call = {"channels": channels, "out_channels": out_channels, "kernel": (5, 5), "margin": (margin, margin)}
        return {**call, "pool_kernel_size": (2, 2), "batch": random.choice((None, 0, 1, 2, 5, 16, 17, 37))}
    pool_kernel_size = random.mostly((2, 2), random.pair(1, 2, 3, 4), (3, 3), (17, 16))
    call = {
        "batch": random.choice((None, 0, 1, 2, 3, 5)),
        "channels": random.choice((1, 2, 3, 4, 5, 8)),
        "out_channels": random.choice((1, 2, 3, 4, 6, 8, 15, 16, 17, 33)),
        "groups": random.mostly(1, 2, 3),
        "kernel": random.pair(3, 1, 2, 4, 5, share=0.3),
        "stride": random.pair(1, 2, 3),
        "padding": random.mostly((0, 0), random.pair(1, 0, 2, 3), "same", "valid", share=0.4),
        "dilation": random.pair(1, 2, 3),
        "pool_kernel_size": pool_kernel_size,
        "pool_stride": random.mostly(None, random.pair(1, 2, 3)),
        "pool_padding": tuple(random.mostly(0, n // 2) for n in pool_kernel_size),
        "pool_dilation": random.pair(1, 2, share=0.9),
        "ceil_mode": random.random() < 0.3,
        "margin": random.pair(0, 1, 2, 3, 5, 7, 16, share=0.2),
    }
    rare = random.random()
    if rare < 0.03:
        call["margin"] = random.pair(-1, -2, 0, share=0.5)
    elif rare < 0.05:
        call |= {"batch": 19, "channels": 16, "margin": (13, 12)}
    if call["padding"] == "same" and random.random() < 0.9:
        call["stride"] = (1, 1)
    return call


def _of_average_pooling(random: _Draw) -> dict[str, Any]:
    kernel = random.mostly((2, 2), random.pair(1, 2, 3, 4, share=0.3), (17, 16), share=0.4)
    margin = random.pair(0, 1, 2, 3, 5, 7, 16, 31, share=0.2)
    return {
        "batch": random.choice((None, 0, 1, 2, 3, 5)),
        "channels": random.choice((1, 2, 3, 4, 6, 8, 15, 16, 17, 33)),
        "pool_kernel_size": kernel,
        "pool_stride": random.mostly(None, random.pair(1, 2, 3)),
        "pool_padding": tuple(random.mostly(0, n // 2) for n in kernel),
        "ceil_mode": random.random() < 0.3,
        "count_include_pad": random.random() < 0.7,
        "divisor_override": random.mostly(None, 1, 2, 3, 7, -2),
        "margin": random.mostly(margin, (-1, 0), (-2, -1), share=0.97),
    }


def _wrong(random: _Draw, call: dict[str, Any]) -> tuple[str, str]:
    options = dataclasses.replace(SIMPLEST, name=call["name"]).options()
    if options and call["way"] != "ops" and random.random() < 0.6:
        option, value = random.choice([*options]), random.choice(WRONG_OPTIONS)
        # Where only one position is left stock takes any step, and ours one of 31 bits. In the pair that nn.Conv2d
        # makes of an int, a number of more than 64 bits is an error of another class than by itself.
        no_yardstick = (
            option in ("stride", "dilation") if value == "2**62" else value == "2**63" and call["way"] == "nn"
        )
        return option, "-1" if no_yardstick else value
    if call["name"] == "relu_avg_pool2d":
        # There is no second tensor whose device it could differ from, and a dtype without a kernel goes to stock.
        return "input", random.choice([what for what in WRONG_TENSORS if what != "meta" and what not in UNSUPPORTED])
    return random.choice(OPERANDS if call["bias"] else OPERANDS[:2]), random.choice(WRONG_TENSORS)


def _consistent(call: dict[str, Any]) -> dict[str, Any]:
    """Without what no yardstick exists for."""
    if call["way"] == "ops":
        # The operators take what has a kernel; the functions say so in the words of stock.
        call["batch"] = 1 if call.get("batch", 1) is None else call.get("batch", 1)
        call["dtype"] = call["dtype"] if call["dtype"] in KERNEL_DTYPES else "float32"
        if call.get("pool_kernel_size") == (17, 16):
            call["pool_kernel_size"] = (2, 2)
        if call.get("wrong") and call["wrong"][1] in (
            *WRONG_TENSORS[:3],
            "sparse",
            "a dimension less",
            "a dimension more",
        ):
            call["wrong"] = None
    if call["mode"] not in FIRST_ORDER and call["values"] != "zeros":
        call["values"] = "integers"
    if call["values"] in ("uniform", "denormal") and call["dtype"] == "bfloat16":
        call["values"] = "integers"  # the processor's bfloat16 instructions flush denormals, in stock as well
    if call["mode"] in SAVING:
        call["layouts"] = tuple("contiguous" if name in STRIDED else name for name in call["layouts"])
        call["padding"] = (0, 0) if call.get("padding") == "same" else call.get("padding", (0, 0))
    if call["mode"].startswith("jvp"):  # an assertion inside of stock fails
        call["layouts"] = tuple("contiguous" if name == "negative" else name for name in call["layouts"])
    if call.get("wrong"):
        call["mode"] = call["mode"] if call["mode"] in FIRST_ORDER else "plain"
        # One fault in a call, and a batch: of an empty one stock hardly checks anything.
        call["batch"] = call.get("batch", 1) or 1
        call["leading"] = tuple(n or 1 for n in call.get("leading", (1,))) or (1,)
        call["margin"] = tuple(max(0, n) for n in call.get("margin", (0, 0)))
    if call["values"] in ("nan", "infinite"):
        # Whether padding is multiplied with an infinity depends on the algorithm that stock takes.
        call["padding"] = (0, 0)
        if call["dtype"] == "bfloat16" and call["special"] != "grad":
            call["values"] = "integers"
    if call["dtype"] not in KERNEL_DTYPES or call.get("wrong") or call.get("compiled"):
        call["values"] = "integers"
    if call["name"] == "relu_avg_pool2d":
        call["wanted"], call["bias"] = ("input",), True
        call["special"] = "grad" if call["special"] == "grad" else "input"
        # The input is what the backward pass needs, as documented; of stock's composition it is the output of ReLU.
        call["mode"] = "backward" if call["mode"] == "operand changed" else call["mode"]
    if call["special"] == "bias" and not call["bias"]:
        call["special"] = "input"
    return call
