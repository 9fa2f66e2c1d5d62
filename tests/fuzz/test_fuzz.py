"""The fuzzer's own tests: a few of its calls, what it found once, and that it notices."""

from __future__ import annotations

import dataclasses
import json

import pytest

from .__main__ import record
from .calls import Call, draw, minimal
from .child import SERVE, Child


@pytest.fixture(scope="module")
def child():
    with Child() as child:
        yield child


def differing(child: Child, seeds: range) -> list[str]:
    answers = ((seed, child.check(draw(seed))) for seed in seeds if not draw(seed).compiled)
    return [f"seed {seed}: {finding}" for seed, finding in answers if finding is not None]


def test_some_calls_are_answered_as_stock_does(child):
    """The same ones in every run; `make fuzz` draws others."""
    assert differing(child, range(250)) == []


@pytest.mark.extended
def test_many_calls_are_answered_as_stock_does(child):
    assert differing(child, range(250, 5000)) == []


@pytest.mark.extended
def test_compiled_calls_are_answered_as_stock_does(child):
    calls = [call for call in map(draw, range(5000, 9000)) if call.compiled]
    assert len(calls) > 5
    assert [(call, finding) for call in calls if (finding := child.check(call)) is not None] == []


# What was found once, each as small as it could be made.
CONV = {"name": "conv_relu_max_pool2d", "seed": 1}
CHANNELS_LAST = ("contiguous", "channels_last", "contiguous", "contiguous")
FOUND = [
    Call(mode="vmap(grad)", out_features=0),
    Call(mode="vmap(grad)", in_features=0),
    Call(name="linear_relu", mode="vmap", in_features=0),
    Call(**CONV, mode="vmap(grad)", wanted=("input",), layouts=CHANNELS_LAST, channels=2, kernel=(2, 2)),
    Call(**CONV, way="nn", wrong=("input", "a number")),
    Call(**CONV, way="nn", wrong=("input", "a list"), pool_kernel_size=(17, 16)),
    Call(**CONV, way="nn", wrong=("weight", "a dimension less"), padding="same"),
    Call(**CONV, way="nn", wrong=("dilation", "'full'")),
    Call(
        **CONV,
        device="meta",
        layouts=("channels_last", *("contiguous",) * 3),
        channels=2,
        out_channels=2,
        pool_kernel_size=(17, 16),
    ),
    Call(**CONV, batch=0, padding=(2, 2), margin=(-2, -1)),
    Call(**CONV, batch=0, padding=(2, 2), margin=(-2, -1), mode="backward"),
    Call(**CONV, batch=0, padding=(2, 2), margin=(-2, -1), device="meta"),
    Call(**CONV, way="ops", wrong=("weight", "shorter"), kernel=(2, 2), padding="same"),
    Call(**CONV, way="nn", wrong=("weight", "None"), padding="valid"),
    Call(**CONV, wrong=("ceil_mode", "2**63"), stride=(1, 2), padding="same"),
    Call(**CONV, wrong=("groups", "(1,)"), stride=(2, 2), padding="same"),
    Call(mode="backward", compiled=True, layouts=("contiguous", "contiguous", "sliced", "parameter")),
    Call(
        layouts=("all expanded", "contiguous", "all expanded", "transposed"),
        wrong=("weight", "a dimension less"),
        leading=(2, 1, 2, 2),
    ),
]


@pytest.mark.parametrize("call", FOUND, ids=str)
def test_what_was_found(child, call):
    assert child.check(call) is None


def test_a_seed_is_a_call():
    calls = [draw(seed) for seed in range(300)]
    assert calls == [draw(seed) for seed in range(300)]
    assert len(set(calls)) == 300
    for field in dataclasses.fields(Call):
        assert len({getattr(call, field.name) for call in calls}) > 1 or field.name == "compiled", field.name


def test_a_record_counts_every_call():
    content = record(map(draw, range(40)), (0, 39), 1.0, [])
    assert content["calls"] == 40
    for kind in ("name", "way", "mode", "dtype", "values", "threads"):
        assert sum(content["calls_by"][kind].values()) == 40
    assert json.loads(json.dumps(content))["seeds"] == [0, 39]


def test_a_failing_call_is_made_small():
    call = dataclasses.replace(draw(3), name="linear", leading=(2, 3), in_features=400, threads=3, bias=False)
    small = minimal(call, lambda call: call.in_features > 8 and call.leading != (1,))
    assert small == Call(in_features=9, leading=(2, 2))


WRONG = {
    "values": "lambda x, w, b=None: linear(x, w, b) + 1",
    "gradients": "lambda x, w, b=None: linear(x, w.detach(), b)",
    "an error": "lambda x, w, b=None: (_ for _ in ()).throw(KeyError('x'))",
    "operands": "lambda x, w, b=None: linear(x.detach().add_(1), w, b)",
    "crashes": "lambda x, w, b=None: os.abort()",
    "hangs": "lambda x, w, b=None: time.sleep(600)",
}


@pytest.mark.parametrize("what", WRONG)
def test_the_fuzzer_notices(what):
    call = Call(mode="backward", leading=(2,), in_features=3, out_features=2)
    code = f"""
import os, time
from lenet_ext import functional
linear = functional.linear
functional.linear = {WRONG[what]}
{SERVE}
"""
    with Child(timeout=1 if what == "hangs" else 300, code=code) as child:
        finding = child.check(call)
        child.timeout = 300
        assert finding is not None
        assert what not in ("crashes", "hangs") or finding.startswith(what)
        # A process that ended is begun again.
        assert child.check(dataclasses.replace(call, way="nn", name="linear_relu")) is None
