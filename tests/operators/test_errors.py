"""Bad calls: the exception class of stock, a message that names the argument, and nothing else happens.

Each row of a table is a change to a good call and what the message has to name: the argument as the signature spells
it and, where it is short, the value found. The class is not in the table: it is what stock raises when the test runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import pytest
import reference
import torch
from failures import failure, kind
from reference import assert_equal

from lenet_ext import Net, functional, nn

HUGE = 2**63


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def named(text: str) -> str:
    """A pattern for the name as a word of its own: "stride" is not found in "pool_stride"."""
    return rf"(?<![\w]){re.escape(text)}(?![\w])"


# name of the row: (change to the call, argument the message names, the value as the message shows it)
CONV = {
    "input 2-D": ({"input": t(8, 8)}, "input", "8, 8"),
    "input 5-D": ({"input": t(1, 2, 3, 8, 8)}, "input", "1, 2, 3, 8, 8"),
    "input 0-D": ({"input": t()}, "input", None),
    "input channels": ({"input": t(2, 2, 8, 8)}, "input", "2, 2, 8, 8"),
    "input channels, unbatched": ({"input": t(2, 8, 8)}, "input", "2"),
    "input empty in space": ({"input": t(2, 3, 0, 8)}, "input", "0"),
    "input empty in space, padded": ({"input": t(2, 3, 0, 8), "padding": 2}, "input", "0"),
    "input without channels": ({"input": t(2, 0, 8, 8), "weight": t(4, 0, 3, 3)}, "input", "0"),
    "input None": ({"input": None}, "input", "None"),
    "input a list": ({"input": [1.0]}, "input", "list"),
    "input float64": ({"input": t(2, 3, 8, 8, dtype=torch.float64)}, "input", "float64"),
    "input integer": ({"input": t(2, 3, 8, 8, dtype=torch.int64)}, "input|Input", "long"),  # said by stock itself
    "input sparse": ({"input": t(2, 3, 8, 8).to_sparse()}, None, None),
    "weight sparse": ({"weight": t(4, 3, 3, 3).to_sparse()}, None, None),
    "weight 3-D": ({"weight": t(4, 3, 3)}, "weight", "4, 3, 3"),
    "weight 5-D": ({"weight": t(1, 4, 3, 3, 3)}, "weight", "1, 4, 3, 3, 3"),
    "weight 1-D": ({"weight": t(4)}, "weight", "4"),
    "weight None": ({"weight": None}, "weight", "None"),
    "weight None, padding 'same'": ({"weight": None, "padding": "same"}, "weight", "None"),
    "weight a number": ({"weight": 1.0}, "weight", "float"),
    "weight float64": ({"weight": t(4, 3, 3, 3, dtype=torch.float64)}, "weight", "float64"),
    "weight bfloat16": ({"weight": t(4, 3, 3, 3, dtype=torch.bfloat16)}, "weight", "bfloat16"),
    "weight without outputs": ({"weight": t(0, 3, 3, 3), "bias": t(0)}, "weight", "0"),
    "weight without taps": ({"weight": t(4, 3, 0, 3)}, "weight", "0"),
    "weight larger than input": ({"weight": t(4, 3, 9, 9)}, "input", "8"),
    "weight taller than input": ({"weight": t(4, 3, 9, 1)}, "input", "8"),
    "bias 2-D": ({"bias": t(1, 4)}, "bias", "1, 4"),
    "bias 0-D": ({"bias": t()}, "bias", None),
    "bias short": ({"bias": t(3)}, "bias", "3"),
    "bias float64": ({"bias": t(4, dtype=torch.float64)}, "bias", "float64"),
    "bias a number": ({"bias": 1.0}, "bias", "float"),
    "bias a list": ({"bias": [1.0] * 4}, "bias", "list"),
    "stride 0": ({"stride": 0}, "stride", "0"),
    "stride (1, 0)": ({"stride": (1, 0)}, "stride", "1, 0"),
    "stride -1": ({"stride": -1}, "stride", "-1"),
    "stride of three": ({"stride": (1, 1, 1)}, "stride", "1, 1, 1"),
    "stride of none": ({"stride": ()}, "stride", "()"),
    "stride True": ({"stride": True}, "stride", "True"),
    "stride (True, 1)": ({"stride": (True, 1)}, "stride", "True"),
    "stride 1.5": ({"stride": 1.5}, "stride", "1.5"),
    "stride (1.0, 1)": ({"stride": (1.0, 1)}, "stride", "1.0"),
    "stride '1'": ({"stride": "1"}, "stride", "1"),
    "stride None": ({"stride": None}, "stride", "None"),
    "stride 2**63": ({"stride": HUGE}, "stride", str(HUGE)),
    "stride -2**63 - 1": ({"stride": -HUGE - 1}, "stride", str(-HUGE - 1)),
    "padding -1": ({"padding": -1}, "padding", "-1"),
    "padding (0, -1)": ({"padding": (0, -1)}, "padding", "-1"),
    "padding of three": ({"padding": (1, 2, 3)}, "padding", "1, 2, 3"),
    "padding of none": ({"padding": ()}, "padding", "()"),
    "padding True": ({"padding": True}, "padding", "True"),
    "padding 1.5": ({"padding": 1.5}, "padding", "1.5"),
    "padding None": ({"padding": None}, "padding", "None"),
    "padding 'full'": ({"padding": "full"}, "padding", "full"),
    "padding 'SAME'": ({"padding": "SAME"}, "padding", "SAME"),
    "padding ''": ({"padding": ""}, "padding", "''"),
    "padding 'same', stride 2": ({"padding": "same", "stride": 2}, "stride", "2"),
    "padding 'same', stride (1, 2)": ({"padding": "same", "stride": (1, 2)}, "stride", "1, 2"),
    "padding 2**63": ({"padding": HUGE}, "padding", str(HUGE)),
    "padding 2**62": ({"padding": 2**62}, "padding", None),
    "padding 2**40": ({"padding": 2**40}, None, None),
    "dilation of four letters": ({"dilation": tuple("full")}, "dilation", "f"),
    "dilation 0": ({"dilation": 0}, "dilation", "0"),
    "dilation -1": ({"dilation": -1}, "dilation", "-1"),
    "dilation of three": ({"dilation": (1, 1, 1)}, "dilation", "1, 1, 1"),
    "dilation True": ({"dilation": True}, "dilation", "True"),
    "dilation 1.5": ({"dilation": 1.5}, "dilation", "1.5"),
    "dilation None": ({"dilation": None}, "dilation", "None"),
    "dilation too wide": ({"dilation": 5}, "input", None),
    "dilation 2**63": ({"dilation": HUGE}, "dilation", str(HUGE)),
    "dilation 2**62": ({"dilation": 2**62}, None, None),
    "groups 0": ({"groups": 0}, "groups", "0"),
    "groups -1": ({"groups": -1}, "groups", "-1"),
    "groups 2": ({"groups": 2}, "groups", "2"),
    "groups do not divide": ({"groups": 3, "weight": t(4, 1, 3, 3)}, "groups", "3"),
    "groups True": ({"groups": True}, "groups", "True"),
    "groups 1.5": ({"groups": 1.5}, "groups", "1.5"),
    "groups None": ({"groups": None}, "groups", "None"),
    "groups (1,)": ({"groups": (1,)}, "groups", "1"),
    "groups 2**63": ({"groups": HUGE}, "groups", str(HUGE)),
    "groups 2**62": ({"groups": 2**62}, "groups", str(2**62)),
    "pool_kernel_size 0": ({"pool_kernel_size": 0}, "pool_kernel_size", "0"),
    "pool_kernel_size 0, stride 1": ({"pool_kernel_size": 0, "pool_stride": 1}, "pool_kernel_size", "0"),
    "pool_kernel_size -1": ({"pool_kernel_size": -1, "pool_stride": 1}, "pool_kernel_size", "-1"),
    "pool_kernel_size of three": ({"pool_kernel_size": (1, 1, 1)}, "pool_kernel_size", "1, 1, 1"),
    "pool_kernel_size of none": ({"pool_kernel_size": ()}, "pool_kernel_size", "()"),
    "pool_kernel_size True": ({"pool_kernel_size": True}, "pool_kernel_size", "True"),
    "pool_kernel_size 1.5": ({"pool_kernel_size": 1.5}, "pool_kernel_size", "1.5"),
    "pool_kernel_size '2'": ({"pool_kernel_size": "2"}, "pool_kernel_size", "2"),
    "pool_kernel_size None": ({"pool_kernel_size": None}, "pool_kernel_size", "None"),
    "pool_kernel_size too large": ({"pool_kernel_size": 7}, "pool_kernel_size", "7"),
    "pool_kernel_size 2**63": ({"pool_kernel_size": HUGE}, "pool_kernel_size", str(HUGE)),
    "pool_kernel_size 2**62": ({"pool_kernel_size": 2**62}, "pool_kernel_size", str(2**62)),
    "pool_kernel_size 2**32 + 1": ({"pool_kernel_size": 2**32 + 1}, "pool_kernel_size", str(2**32 + 1)),
    "pool_stride 0": ({"pool_stride": 0}, "pool_stride", "0"),
    "pool_stride -1": ({"pool_stride": -1}, "pool_stride", "-1"),
    "pool_stride of three": ({"pool_stride": (1, 1, 1)}, "pool_stride", "1, 1, 1"),
    "pool_stride True": ({"pool_stride": True}, "pool_stride", "True"),
    "pool_stride 1.5": ({"pool_stride": 1.5}, "pool_stride", "1.5"),
    "pool_stride 2**63": ({"pool_stride": HUGE}, "pool_stride", str(HUGE)),
    "pool_stride 2**62": ({"pool_stride": 2**62}, "pool_stride", str(2**62)),
    "pool_stride 2**32": ({"pool_stride": 2**32}, "pool_stride", str(2**32)),
    "pool_padding -1": ({"pool_padding": -1}, "pool_padding", "-1"),
    "pool_padding too wide": ({"pool_padding": 2}, "pool_padding", "2"),
    # Half of the kernel, not of its dilated reach: stock's own message on the CPU.
    "pool_padding too wide, dilated": (
        {"pool_kernel_size": 3, "pool_padding": (0, 2), "pool_dilation": 2},
        "pool_padding",
        "2",
    ),
    "pool_padding 'same'": ({"pool_padding": "same"}, "pool_padding", "same"),
    "pool_padding of none": ({"pool_padding": ()}, "pool_padding", "()"),
    "pool_padding True": ({"pool_padding": True}, "pool_padding", "True"),
    "pool_padding 1.5": ({"pool_padding": 1.5}, "pool_padding", "1.5"),
    "pool_padding None": ({"pool_padding": None}, "pool_padding", "None"),
    "pool_padding 2**63": ({"pool_padding": HUGE}, "pool_padding", str(HUGE)),
    "pool_dilation 0": ({"pool_dilation": 0}, "pool_dilation", "0"),
    "pool_dilation -1": ({"pool_dilation": -1}, "pool_dilation", "-1"),
    "pool_dilation of three": ({"pool_dilation": (1, 1, 1)}, "pool_dilation", "1, 1, 1"),
    "pool_dilation True": ({"pool_dilation": True}, "pool_dilation", "True"),
    "pool_dilation None": ({"pool_dilation": None}, "pool_dilation", "None"),
    "pool_dilation too wide": ({"pool_dilation": 10}, "pool_dilation|pool_kernel_size", None),
    "pool_dilation 2**63": ({"pool_dilation": HUGE}, "pool_dilation", str(HUGE)),
    "pool_dilation 2**62": ({"pool_dilation": 2**62}, "pool_dilation", str(2**62)),
    "ceil_mode 1": ({"ceil_mode": 1}, "ceil_mode", "1"),
    "ceil_mode None": ({"ceil_mode": None}, "ceil_mode", "None"),
    "ceil_mode 'True'": ({"ceil_mode": "True"}, "ceil_mode", "True"),
    "complex": (
        {"input": t(2, 3, 8, 8).cfloat(), "weight": t(4, 3, 3, 3).cfloat(), "bias": t(4).cfloat()},
        None,
        None,
    ),
    "unknown argument": ({"pool_kernel": 2}, "pool_kernel", None),
}

LINEAR = {
    "input 0-D": ({"input": t()}, "input", None),
    "input features": ({"input": t(2, 4)}, "input", "2, 4"),
    "input features, 3-D": ({"input": t(2, 3, 4)}, "input", "2, 3, 4"),
    "input features, 1-D": ({"input": t(4)}, "input", "4"),
    "input None": ({"input": None}, "input", "None"),
    "input a list": ({"input": [1.0]}, "input", "list"),
    "input float64": ({"input": t(2, 5, dtype=torch.float64)}, "input", "float64"),
    "weight 0-D": ({"weight": t(), "bias": None}, None, None),
    "weight 3-D": ({"weight": t(1, 3, 5)}, None, None),
    "weight None": ({"weight": None}, "weight", "None"),
    "weight float64": ({"weight": t(3, 5, dtype=torch.float64)}, "weight", "float64"),
    "bias short": ({"bias": t(2)}, "bias", "2"),
    "bias of another batch": ({"bias": t(7, 3)}, None, None),
    "bias float64": ({"bias": t(3, dtype=torch.float64)}, "bias", "float64"),
    "bias a number": ({"bias": 1.0}, "bias", "float"),
    "unknown argument": ({"bia": t(3)}, "bia", None),
}


def _good(name):
    if name == "conv_relu_max_pool2d":
        return {"input": t(2, 3, 8, 8), "weight": t(4, 3, 3, 3), "bias": t(4)}
    return {"input": t(2, 5), "weight": t(3, 5), "bias": t(3)}


ROWS = [("conv_relu_max_pool2d", row) for row in CONV]
ROWS += [(name, row) for name in ("linear", "linear_relu") for row in LINEAR]


def _row(name, row):
    change, argument, value = (CONV if name == "conv_relu_max_pool2d" else LINEAR)[row]
    call = {**_good(name), **change}
    tensors = {k: v for k, v in call.items() if isinstance(v, torch.Tensor)}
    return call, tensors, argument, value


def _check_message(error, argument, value):
    text = str(error)
    assert text.strip(), "an error without a message"
    if argument is not None:
        assert re.search("|".join(map(named, argument.split("|"))), text), f"{text!r} does not name {argument}"
    if value is not None:
        spelled = {"float64": "Double", "bfloat16": "BFloat16", "long": "int64"}.get(
            value, value
        )  # C++ names or Python's, both are read
        assert value in text or spelled in text, f"{text!r} does not show {value}"


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("name", "row"), ROWS, ids=str)
def test_bad_call(device, name, row, training):
    call, tensors, argument, value = _row(name, row)
    stock_error = failure(getattr(reference, name), **call)
    assert stock_error is not None, "stock accepts this: the row does not belong in the table"
    call = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    if training:
        for tensor in tensors.values():
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout == torch.strided:
                tensor.requires_grad_()
    before = {k: (v.detach().clone(), v._version) for k, v in tensors.items()}
    error = failure(getattr(functional, name), **call)
    assert error is not None, f"accepted, where stock raises {stock_error!r}"
    assert kind(error) is kind(stock_error), f"{error!r} where stock raises {stock_error!r}"
    _check_message(error, argument, value)
    for k, tensor in tensors.items():
        copy, version = before[k]
        assert tensor._version == version
        if tensor.layout == torch.strided:
            assert_equal(tensor, copy, k)
        tensor.requires_grad_(False)


@pytest.mark.parametrize(("name", "row"), ROWS, ids=str)
def test_bad_call_on_meta(name, row):
    """Shapes are checked without data as well: what stock refuses with data, ours refuses without."""
    call, _, argument, _ = _row(name, row)
    if any(isinstance(v, torch.Tensor) and v.layout != torch.strided for v in call.values()):
        pytest.skip("there is no sparse meta tensor to speak of")
    if row in ("padding 2**40", "complex"):
        pytest.skip("a question of memory, or of the kernel: nothing that shapes could tell")
    stock_error = failure(getattr(reference, name), **call)  # on the CPU: stock's meta functions check less
    call = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    error = failure(getattr(functional, name), **call)
    assert error is not None, f"accepted, where stock raises {stock_error!r}"
    assert kind(error) is kind(stock_error), f"{error!r} where stock raises {stock_error!r}"
    _check_message(error, argument, None)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("moved", [("weight",), ("bias",), ("weight", "bias"), ("input",)], ids="-".join)
@pytest.mark.parametrize("name", ["conv_relu_max_pool2d", "linear", "linear_relu"])
def test_tensors_on_different_devices(device, name, moved, training):
    """Stock takes a meta weight with a CPU input for a conv, and returns whatever was in memory. Ours refuses."""
    call = {k: v.to("meta" if k in moved else device).requires_grad_(training) for k, v in _good(name).items()}
    with pytest.raises(RuntimeError) as info:
        getattr(functional, name)(**call)
    text = str(info.value)
    assert "meta" in text, text
    assert torch.device(device).type in text, text
    assert any(re.search(named(argument), text) for argument in call), text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
@pytest.mark.parametrize("moved", ["weight", "bias", "input"])
@pytest.mark.parametrize("name", ["conv_relu_max_pool2d", "linear", "linear_relu"])
def test_cuda_and_cpu(name, moved):
    call = {k: v.to("cuda" if k == moved else "cpu") for k, v in _good(name).items()}
    with pytest.raises(RuntimeError, match="cuda"):
        getattr(functional, name)(**call)


def test_the_table_is_complete():
    """Each argument of the signature appears in the table."""
    import inspect

    for name, table in (("conv_relu_max_pool2d", CONV), ("linear", LINEAR), ("linear_relu", LINEAR)):
        changed = {key for change, _, _ in table.values() for key in change}
        missing = set(inspect.signature(getattr(functional, name)).parameters) - changed
        assert not missing, f"{name}: no bad call for {missing}"


@pytest.mark.parametrize("name", ["conv_relu_max_pool2d", "linear", "linear_relu"])
def test_missing_arguments(name):
    for args in ((), (t(2, 3, 8, 8),)):
        with pytest.raises(TypeError):
            getattr(functional, name)(*args)


def test_messages_say_what_was_expected():
    """A sample of sentences, read as a user would."""
    cases = [
        ({"input": t(2, 2, 8, 8)}, ["input", "3", "2"]),
        ({"bias": t(3)}, ["bias", "4", "3"]),
        ({"weight": t(4, 3, 3)}, ["weight", "4-D|4D|4 dim"]),
        ({"weight": t(4, 3, 3, 3, dtype=torch.float64)}, ["weight", "float64|Double", "float32|Float"]),
        ({"padding": "full"}, ["padding", "valid", "same"]),
        ({"ceil_mode": 1}, ["ceil_mode", "bool"]),
        ({"pool_padding": 2}, ["pool_padding", "half"]),
    ]
    for change, words in cases:
        error = failure(functional.conv_relu_max_pool2d, **{**_good("conv_relu_max_pool2d"), **change})
        for word in words:
            assert re.search(word, str(error)), f"{error} does not say {word}"


def test_a_bad_call_leaves_autograd_usable(device):
    """The call after the failed one works, gradient mode is as before, nothing hangs in between."""
    good = {k: v.to(device).requires_grad_() for k, v in _good("conv_relu_max_pool2d").items()}
    for _ in range(3):
        assert failure(functional.conv_relu_max_pool2d, **{**good, "stride": 0}) is not None
    assert torch.is_grad_enabled()
    functional.conv_relu_max_pool2d(**good).sum().backward()
    assert good["weight"].grad is not None


def test_wrong_gradient(device):
    output = functional.conv_relu_max_pool2d(
        **{k: v.to(device).requires_grad_() for k, v in _good("conv_relu_max_pool2d").items()}
    )
    for bad in (torch.ones(1, device=device), torch.ones(2, 4, 2, 2, device=device)):
        with pytest.raises(RuntimeError):
            output.backward(bad)


@pytest.mark.parametrize("padding", [0, "same"])
@pytest.mark.parametrize("pool_kernel_size", [2, 16], ids=["kernel", "stock"])
@pytest.mark.parametrize("value", [None, 1.0, [1.0]], ids=str)
def test_a_layer_names_an_input_that_is_no_tensor(value, pool_kernel_size, padding):
    layer = nn.ConvReLUMaxPool2d(3, 4, 3, padding=padding, pool_kernel_size=pool_kernel_size)
    with pytest.raises(TypeError, match=f"input must be a Tensor, got {type(value).__name__}"):
        layer(value)


@pytest.mark.parametrize("padding", [0, "same"])
def test_a_layer_names_a_weight_of_another_shape(padding):
    layer = nn.ConvReLUMaxPool2d(3, 4, 3, padding=padding)
    layer.weight = torch.nn.Parameter(t(4, 3, 3))
    with pytest.raises(RuntimeError, match=r"weight must be 4-D.*4, 3, 3"):
        layer(t(2, 3, 8, 8))


def test_a_layer_without_its_weight_names_it():
    layer = nn.ConvReLUMaxPool2d(3, 4, 3, padding="same")
    layer.weight = None
    with pytest.raises(TypeError, match="weight must be a Tensor, got NoneType"):
        layer(t(2, 3, 8, 8))


MODULES = [
    ({"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2}, torch.nn.Conv2d),
    ({"in_channels": 4, "out_channels": 3, "kernel_size": 3, "groups": 2}, torch.nn.Conv2d),
    ({"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 0}, torch.nn.Conv2d),
    ({"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": "full"}, torch.nn.Conv2d),
    ({"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": "same", "stride": 2}, torch.nn.Conv2d),
    ({"in_channels": 3, "out_channels": 4}, torch.nn.Conv2d),
    ({"in_features": 3}, torch.nn.Linear),
    ({"in_features": -1, "out_features": 3}, torch.nn.Linear),
]


@pytest.mark.parametrize(("arguments", "stock"), MODULES, ids=str)
def test_modules_refuse_at_construction_what_stock_refuses(arguments, stock):
    stock_error = failure(stock, **arguments)
    assert stock_error is not None
    for cls in [nn.ConvReLUMaxPool2d] if stock is torch.nn.Conv2d else [nn.Linear, nn.LinearReLU]:
        error = failure(cls, **arguments)
        assert type(error) is type(stock_error), f"{error!r} instead of {stock_error!r}"


# --- the operators themselves: reachable by anyone as torch.ops.lenet_ext.*, so they check what they are given --------

OPTIONS = {
    "stride": [1, 1],
    "padding": [0, 0, 0, 0],
    "dilation": [1, 1],
    "groups": 1,
    "pool_kernel_size": [2, 2],
    "pool_stride": [2, 2],
    "pool_padding": [0, 0],
    "pool_dilation": [1, 1],
}
BAD_OPTIONS = {
    "stride 0": {"stride": [0, 1]},
    "stride short": {"stride": [1, 1, 1]},
    "padding -1": {"padding": [0, -1, 0, 0]},
    "padding of two": {"padding": [0, 0]},
    "padding huge": {"padding": [2**62] * 4},
    "dilation 0": {"dilation": [1, 0]},
    "dilation huge": {"dilation": [2**62, 1]},
    "groups 0": {"groups": 0},
    "groups -1": {"groups": -1},
    "groups 2": {"groups": 2},
    "pool_kernel_size 0": {"pool_kernel_size": [0, 2]},
    "pool_kernel_size -1": {"pool_kernel_size": [-1, -1]},
    "pool_kernel_size huge": {"pool_kernel_size": [2**62, 2**62]},
    "window of 256": {"pool_kernel_size": [16, 16]},
    "pool_stride 0": {"pool_stride": [2, 0]},
    "pool_padding 2": {"pool_padding": [2, 2]},
    "pool_padding -1": {"pool_padding": [-1, 0]},
    "pool_dilation 0": {"pool_dilation": [0, 1]},
}


@pytest.mark.parametrize("row", BAD_OPTIONS)
@pytest.mark.parametrize("op", ["", "_with_indices", "_backward", "conv_at_indices"])
def test_operators_refuse_bad_options(device, op, row):
    options = {**OPTIONS, **BAD_OPTIONS[row]}
    x, w, b = t(2, 3, 20, 20, device=device), t(4, 3, 3, 3, device=device), t(4, device=device)
    indices, grad = torch.zeros(2, 4, 9, 9, dtype=torch.uint8, device=device), t(2, 4, 9, 9, device=device)
    ops = torch.ops.lenet_ext
    calls = {
        "": lambda: ops.conv_relu_max_pool2d(x, w, b, **options, ceil_mode=False),
        "_with_indices": lambda: ops.conv_relu_max_pool2d_with_indices(x, w, b, **options, ceil_mode=False),
        "_backward": lambda: ops.conv_relu_max_pool2d_backward(grad, indices, x, w, **options, output_mask=[True] * 3),
        "conv_at_indices": lambda: ops.conv_at_indices(x, w, b, indices, **options),
    }
    if row == "window of 256" and op == "":
        pytest.skip("no index needed")
    with pytest.raises((RuntimeError, ValueError)) as info:
        calls[op]()
    assert str(info.value).strip()


def _indices(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


BAD_BACKWARD = {
    "grad_output shape": {"grad_output": t(2, 4, 9, 8)},
    "grad_output dims": {"grad_output": t(4, 9, 9)},
    "grad_output dtype": {"grad_output": t(2, 4, 9, 9, dtype=torch.float64)},
    "grad_output device": {"grad_output": t(2, 4, 9, 9, device="meta")},
    "grad_output and indices shape": {"grad_output": t(2, 4, 90, 90), "indices": _indices(2, 4, 90, 90)},
    "grad_output and indices channels": {"grad_output": t(2, 40, 9, 9), "indices": _indices(2, 40, 9, 9)},
    "grad_output and indices batch": {"grad_output": t(9, 4, 9, 9), "indices": _indices(9, 4, 9, 9)},
    "indices shape": {"indices": _indices(2, 4, 9, 8)},
    "indices dims": {"indices": _indices(4, 9, 9)},
    "indices dtype": {"indices": _indices(2, 4, 9, 9, dtype=torch.int64)},
    "indices device": {"indices": _indices(2, 4, 9, 9).to("meta")},
    "input channels": {"input": t(2, 2, 20, 20)},
    "input dims": {"input": t(3, 20, 20)},
    "input dtype": {"input": t(2, 3, 20, 20, dtype=torch.bfloat16)},
    "weight dims": {"weight": t(4, 3, 3)},
    "weight channels": {"weight": t(4, 2, 3, 3)},
    "weight device": {"weight": t(4, 3, 3, 3, device="meta")},
    "weight larger than input": {"weight": t(4, 3, 30, 30), "weight_size": [4, 3, 30, 30]},
    "weight missing": {"weight": None},
    "input missing": {"input": None},
    "input_size": {"input_size": [2, 3, 19, 20]},
    "input_size dims": {"input_size": [3, 20, 20], "input": t(3, 20, 20)},
    "weight_size": {"weight_size": [4, 3, 3, 2]},
}


@pytest.mark.parametrize("row", BAD_BACKWARD)
def test_backward_operator_refuses_tensors_that_do_not_fit(row):
    good = {
        "grad_output": t(2, 4, 9, 9),
        "indices": _indices(2, 4, 9, 9),
        "input": t(2, 3, 20, 20),
        "weight": t(4, 3, 3, 3),
    }
    sizes = {"input_size": [2, 3, 20, 20], "weight_size": [4, 3, 3, 3]}
    op = torch.ops.lenet_ext.conv_relu_max_pool2d_backward
    op(**good, **sizes, **OPTIONS, output_mask=[True] * 3)
    with pytest.raises((RuntimeError, ValueError)) as info:
        op(**{**good, **sizes, **BAD_BACKWARD[row]}, **OPTIONS, output_mask=[True] * 3)
    assert re.search(r"grad_output|indices|input|weight", str(info.value)), str(info.value)


@pytest.mark.parametrize("name", ["linear_backward", "linear_relu_backward"])
@pytest.mark.parametrize(
    "change",
    [
        {"grad_output": t(2, 4)},
        {"grad_output": t(7, 3)},
        {"grad_output": t(3)},
        {"grad_output": t(2, 3, dtype=torch.float64)},
        {"input": t(2, 6)},
        {"input": t(2, 5, device="meta")},
        {"weight": t(5)},
        {"weight": t(3, 5, dtype=torch.bfloat16)},
    ],
    ids=lambda change: ", ".join(f"{k} {tuple(v.shape)} {v.dtype} {v.device}" for k, v in change.items()),
)
def test_linear_backward_operators_refuse_tensors_that_do_not_fit(name, change):
    good = {"grad_output": t(2, 3), "input": t(2, 5), "weight": t(3, 5)}
    if name == "linear_relu_backward":
        good["output"] = t(2, 3)
    op = getattr(torch.ops.lenet_ext, name)
    op(**good, output_mask=[True] * 3)
    with pytest.raises((RuntimeError, ValueError)) as info:
        op(**{**good, **change}, output_mask=[True] * 3)
    assert str(info.value).strip()


@pytest.mark.parametrize("name", ["grad_output", "pooled1", "indices1", "pooled2", "indices2", "hidden1", "hidden2"])
@pytest.mark.parametrize("change", ["batch", "size", "dims", "dtype", "device"])
def test_lenet_backward_operator_refuses_tensors_that_do_not_fit(name, change):
    parameters = [p.detach() for p in Net().parameters()]
    x = t(3, 1, 32, 32)
    ops = torch.ops.lenet_ext
    output, *activations = ops.lenet_with_activations(x, parameters)
    names = ("pooled1", "indices1", "pooled2", "indices2", "hidden1", "hidden2")
    good = {"grad_output": output, **dict(zip(names, activations, strict=True))}
    grad_input, grads = ops.lenet_backward(input=x, parameters=parameters, **good, input_gradient=True)
    assert grad_input.shape == x.shape
    assert [g.shape for g in grads] == [p.shape for p in parameters]
    tensor = good[name]
    bad = {
        "batch": lambda: tensor[:2],
        "size": lambda: tensor[..., :-1],
        "dims": lambda: tensor[0],
        "dtype": lambda: tensor.double(),
        "device": lambda: tensor.to("meta"),
    }[change]()
    with pytest.raises(RuntimeError, match=f"lenet_backward: {name} must be"):
        ops.lenet_backward(input=x, parameters=parameters, **{**good, name: bad}, input_gradient=True)


def _half(*shape):
    return t(*shape, dtype=torch.float16)


NO_KERNEL = {
    "conv_relu_max_pool2d": lambda op: op(_half(2, 3, 20, 20), _half(4, 3, 3, 3), None, **OPTIONS, ceil_mode=False),
    "conv_relu_max_pool2d_backward": lambda op: op(
        *(_half(2, 4, 9, 9), _indices(2, 4, 9, 9), _half(2, 3, 20, 20), _half(4, 3, 3, 3)),
        **{"input_size": [2, 3, 20, 20], "weight_size": [4, 3, 3, 3], **OPTIONS, "output_mask": [True] * 3},
    ),
    "conv_at_indices": lambda op: op(_half(2, 3, 20, 20), _half(4, 3, 3, 3), None, _indices(2, 4, 9, 9), **OPTIONS),
    "linear": lambda op: op(_half(2, 5), _half(3, 5), None),
    "linear_relu": lambda op: op(_half(2, 5), _half(3, 5), None),
    "linear_backward": lambda op: op(_half(2, 3), _half(2, 5), _half(3, 5), [True] * 3),
    "linear_relu_backward": lambda op: op(_half(2, 3), _half(2, 3), _half(2, 5), _half(3, 5), [True] * 3),
    "lenet": lambda op: op(_half(2, 1, 32, 32), [p.detach().half() for p in Net().parameters()]),
}


@pytest.mark.parametrize("name", NO_KERNEL)
def test_operators_refuse_dtypes_without_a_kernel(name):
    """The functions take stock's way for them. Whoever calls an operator is told which it has."""
    with pytest.raises(
        RuntimeError, match=f"{name}: on the CPU the dtype must be float32, float64 or bfloat16, got Half"
    ):
        NO_KERNEL[name](getattr(torch.ops.lenet_ext, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": None}, "input is undefined"),
        ({"weight": None}, "weight is undefined"),
        ({"input": t(2, 5).to_sparse()}, "input must be a dense tensor, got layout Sparse"),
        ({"weight": t(3, 5).to_sparse()}, "weight must be a dense tensor, got layout Sparse"),
        ({"weight": t(3, 5, device="meta")}, "weight is on meta and input is on cpu"),
        ({"bias": t(3, device="meta")}, "bias is on meta and input is on cpu"),
        ({"weight": t(5)}, r"weight must be 2-D \(out_features, in_features\), got shape \[5\]"),
        ({"weight": t(1, 3, 5)}, "weight must be 2-D"),
        ({"input": t()}, r"input must have shape \[..., 5\]"),
        ({"bias": t(4)}, r"bias must have shape \[3\], got \[4\]"),
    ],
)
@pytest.mark.parametrize("name", ["linear", "linear_relu"])
def test_kernels_look_for_themselves(name, change, message):
    """Also where the dispatcher, which refuses some of these by itself, was passed by."""
    op = getattr(torch.ops.lenet_ext, name).default
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    good = {"input": t(2, 5), "weight": t(3, 5), "bias": t(3)}
    assert op.redispatch(cpu, *good.values()).shape == (2, 3)
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        op.redispatch(cpu, *{**good, **change}.values())


def test_linear_relu_backward_needs_its_output():
    with pytest.raises(RuntimeError, match="linear_relu_backward: output is undefined"):
        torch.ops.lenet_ext.linear_relu_backward(t(2, 3), None, t(2, 5), t(3, 5), [True] * 3)


def _lenet_call(**change):
    parameters = [p.detach() for p in Net().parameters()]
    for index, tensor in change.pop("parameters", {}).items():
        parameters[index] = tensor
    return {"input": t(2, 1, 32, 32), "parameters": parameters[: change.pop("count", 10)], **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 9}, "parameters must hold 10 tensors, got 9"),
        ({"count": 0}, "parameters must hold 10 tensors, got 0"),
        ({"parameters": {8: t(84)}}, r"parameters\[8\] \(fc3.weight\) must be 2-D, got shape \[84\]"),
        ({"parameters": {0: t(6, 5, 5)}}, r"parameters\[0\] \(conv1.weight\) must have shape \[6, 1, 5, 5\]"),
        ({"parameters": {4: t(120, 399)}}, r"parameters\[4\] \(fc1.weight\) must have shape \[120, 400\]"),
        ({"parameters": {9: t(9)}}, r"parameters\[9\] \(fc3.bias\) must have shape \[10\], got \[9\]"),
        ({"parameters": {3: t(16, dtype=torch.float64)}}, r"parameters\[3\] \(conv2.bias\) is Double"),
        ({"input": t(1, 32, 32)}, r"input must have shape \[batch, 1, 32, 32\], got \[1, 32, 32\]"),
        ({"input": t(2, 3, 32, 32)}, r"input must have shape \[batch, 1, 32, 32\]"),
        ({"input": t(2, 1, 28, 32)}, r"got \[2, 1, 28, 32\]"),
        ({"input": t(2, 1, 32, 28)}, r"got \[2, 1, 32, 28\]"),
    ],
)
@pytest.mark.parametrize("name", ["lenet", "lenet_with_activations"])
def test_lenet_operators_refuse_tensors_that_do_not_fit(name, change, message):
    op = getattr(torch.ops.lenet_ext, name)
    op(**_lenet_call())
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        op(**_lenet_call(**change))


STATE = [torch.zeros(p.shape) for p in Net().parameters()]
ADAM = {"optimizer": "adam", "options": [0.1, 0.9, 0.999, 1e-8, 0.0, 0.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": t(0, 1, 32, 32), "targets": torch.zeros(0, dtype=torch.int64)}, "must have at least one image"),
        ({"count": 9}, "parameters must hold 10 tensors, got 9"),
        ({"loss": "nll"}, "loss must be 'cross_entropy' or 'mse', got 'nll'"),
        ({"targets": t(2)}, r"targets must be int64 of shape \[2\], got Float of shape \[2\]"),
        ({"targets": torch.zeros(2, 1, dtype=torch.int64)}, r"targets must be int64 of shape \[2\]"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets must be int64 of shape \[2\]"),
        ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, "targets must be on cpu, got meta"),
        ({"loss": "mse"}, r"targets must have the output's shape \[2, 10\] and dtype Float, got Long"),
        ({"loss": "mse", "targets": t(2, 9)}, r"targets must have the output's shape \[2, 10\]"),
        ({"label_smoothing": 1.5}, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"label_smoothing": -0.5}, "label_smoothing must be between 0 and 1, got -0.5"),
        ({"weight": t(9)}, r"weight must have shape \[10\], got \[9\]"),
        ({"weight": t(10, dtype=torch.float64)}, "weight is Double"),
        ({"optimizer": "rmsprop"}, "optimizer must be 'sgd', 'adam' or 'adamw', got 'rmsprop'"),
        ({"options": [0.1]}, "options must hold 7 numbers for all or for each of 10 parameters, got 1"),
        ({"state": [t(1)]}, "state must hold no tensor or one for each of 10 parameters, got 1 in all"),
        ({**ADAM, "state": [t(1)] * 10}, "state must hold 3 or 4 tensors for each of 10 parameters, got 10 in all"),
        ({"state": [t(1)] * 10}, r"state\[0\] must have shape \[6, 1, 5, 5\], got \[1\]"),
        ({**ADAM, "state": [*STATE, *STATE, *[t(1)] * 10]}, r"state\[20\] must have shape \[\], got \[1\]"),
        ({"state": [tensor.double() for tensor in STATE]}, "state is Double"),
    ],
)
def test_the_training_step_refuses_what_does_not_fit_and_changes_nothing(change, message):
    op = torch.ops.lenet_ext.lenet_training_step.default
    good = {"targets": torch.tensor([1, 2]), "weight": None, "state": [], "loss": "cross_entropy"}
    good |= {"label_smoothing": 0.0, "ignore_index": -100, "optimizer": "sgd", "options": [0.1, *[0.0] * 5, 1.0]}
    call = _lenet_call(**{**good, **change})
    call = {argument.name: call[argument.name] for argument in op._schema.arguments}
    before = [tensor.clone() for tensor in call["parameters"]]
    with pytest.raises(RuntimeError, match=f"lenet_training_step: .*{message}"):
        op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *call.values())  # targets may be elsewhere
    assert all(map(torch.equal, call["parameters"], before))


def test_indices_out_of_their_window_do_not_crash():
    """Garbage for indices gives garbage or an error, but reads and writes inside of the tensors only."""
    code = """
        import torch, lenet_ext
        options = dict(stride=[1, 1], padding=[0] * 4, dilation=[1, 1], groups=1, pool_kernel_size=[2, 2],
                       pool_stride=[2, 2], pool_padding=[0, 0], pool_dilation=[1, 1])
        ops = torch.ops.lenet_ext
        for seed in range(50):
            torch.manual_seed(seed)
            x, w, g = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 3, 3)
            indices = torch.randint(0, 256, (2, 4, 3, 3), dtype=torch.uint8)
            for call in (
                lambda: ops.conv_relu_max_pool2d_backward(g, indices, x, w, **options, output_mask=[True] * 3),
                lambda: ops.conv_at_indices(x, w, None, indices, **options),
            ):
                try:
                    call()
                except (RuntimeError, ValueError):
                    pass
        print("alive")
    """
    # glibc then checks the heap and overwrites what is freed, so that a write out of bounds shows.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "85"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "alive" in done.stdout
