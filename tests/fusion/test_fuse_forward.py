"""`lenet_ext.fuse` takes calls out of a `forward`: all the rest of it stays, and works as before."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from fusing import IMAGES, Conv, Switches, assert_same, check, conv, module_like, reason
from torch import nn

from lenet_ext import fuse


def test_branches_on_attributes_and_arguments_keep_working():
    model = Switches()
    fused = check(model, ["conv", "fc"])
    x = torch.randn(IMAGES, dtype=torch.float64)
    for training in (True, False):
        for flag in (True, False):
            for mode in ("a", "b"):
                for m in (model.train(training), fused.train(training)):
                    m.flag, m.mode, m.scale, m.p = flag, mode, m.scale + 1, m.p / 2
                assert_same(fused, model, x)
                assert_same(fused, model, x, None, True, shift=3.0)
                assert_same(fused, model, x, double=True, shift=torch.ones(6, dtype=torch.float64))


def test_attributes_that_are_changed_or_called_by_forward():
    fused = check(Switches(), ["conv", "fc"])
    before = len(fused.log)
    fused(torch.randn(IMAGES, dtype=torch.float64))
    assert len(fused.log) == before + 1, "a side effect on an attribute was lost"


def _compares_with_infinity(self, x):
    x = F.max_pool2d(F.relu(self.conv(x)), 2)
    return x if self.limit == float("inf") else x.clamp(max=self.limit)


def test_a_branch_on_a_comparison_with_infinity():
    model = module_like(Conv, _compares_with_infinity, limit=float("inf"))
    fused = check(model, ["conv"])
    fused.limit = model.limit = 0.1
    assert_same(fused, model, torch.randn(IMAGES, dtype=torch.float64))


def test_signature_and_defaults_are_kept():
    fused = fuse(Switches().double())
    x = torch.randn(IMAGES, dtype=torch.float64)
    with pytest.raises(TypeError, match="positional arguments"):
        fused(x, None, False, 1.0)
    with pytest.raises(TypeError, match="missing 1 required"):
        fused()
    assert torch.equal(fused.eval()(x=x), fused(x))


def branch_in_the_chain(self, x):
    x = self.conv(x)
    if self.training:
        x = F.relu(x)
    return F.max_pool2d(x, 2)


def test_a_chain_in_one_branch_only():
    assert "x, is not used in the next statement" in reason(module_like(Conv, branch_in_the_chain), "conv")


def different_pools(self, x):
    if self.training:
        return F.max_pool2d(F.relu(self.conv(x)), 2)
    return F.max_pool2d(F.relu(self.conv(x)), 3)


def one_pool_in_a_condition(self, x):
    x = F.relu(self.conv(x))
    return F.max_pool2d(x, 2) if self.training else F.max_pool2d(x, 3)


def test_different_poolings_in_different_branches():
    assert "different poolings" in reason(module_like(Conv, different_pools), "conv")
    assert "may be used elsewhere" in reason(module_like(Conv, one_pool_in_a_condition), "conv")


def the_same_in_both(self, x):
    if self.training:
        return F.max_pool2d(F.relu(self.conv(x)), 2)
    return torch.relu(torch.max_pool2d(self.conv(x), 2)).sin()


def test_the_same_chain_in_both_branches():
    check(module_like(Conv, the_same_in_both), ["conv"])


class Downsample(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.conv, self.extra = conv(), extra

    def forward(self, x):
        if self.extra is not None:
            return self.extra(self.conv(x).relu())
        return F.max_pool2d(F.relu(self.conv(x)), 2)


class Optional(Downsample):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return x if self.extra is None else self.extra(x)


def test_an_attribute_that_is_none():
    assert "no max-pool" in reason(Downsample(None), "conv")
    fused = check(model := Optional(None), ["conv"])
    fused.extra = model.extra = nn.Sigmoid()
    assert_same(fused, model, torch.randn(IMAGES, dtype=torch.float64))


FACTOR = 2
COUNTS = [0]


def _prints(self, x):
    print(x.shape)
    return F.max_pool2d(F.relu(self.conv(x)), 2)


def _sets(self, x):
    self.last = F.max_pool2d(F.relu(self.conv(x)), 2)
    return self.last


def _no_grad(self, x):
    with torch.no_grad():
        x = x * 2
    return F.max_pool2d(F.relu(self.conv(x)), 2)


def _catches(self, x):
    try:
        return F.max_pool2d(F.relu(self.conv(x)), 2)
    except ValueError:
        return x


def _random(self, x):
    return F.max_pool2d(F.relu(self.conv(x)), 2) + torch.rand(1).item()


def _asks_for_the_type(self, x):
    if not isinstance(x, torch.Tensor):
        x = x[0]
    return F.max_pool2d(F.relu(self.conv(x)), 2)


def _asks_for_none(self, x, y=None):
    if y is not None:
        x = x + y
    return F.max_pool2d(F.relu(self.conv(x)), 2)


def _asks_for_grad_mode(self, x):
    return F.max_pool2d(F.relu(self.conv(x)), 2) * (2 if torch.is_grad_enabled() else 3)


def _reads_a_global(self, x):
    return F.max_pool2d(F.relu(self.conv(x)), 2) * FACTOR


def _counts(self, x):
    COUNTS[0] += 1
    return F.max_pool2d(F.relu(self.conv(x)), 2)


def _any_arguments(self, *args, **kwargs):
    return F.max_pool2d(F.relu(self.conv(*args, **kwargs)), 2)


def _depends_on_data(self, x):
    x = F.max_pool2d(F.relu(self.conv(x)), 2)
    return x * 2 if x.sum() > 0 else x


def _depends_on_shape(self, x):
    x = F.max_pool2d(F.relu(self.conv(x)), 2)
    return x * 2 if x.shape[0] == 2 else x


def _loops_over_shape(self, x):
    count = 1
    for size in x.shape[1:]:
        count *= size
    return F.max_pool2d(F.relu(self.conv(x)), 2) * count


EVERYTHING = [
    _prints,
    _sets,
    _no_grad,
    _catches,
    _random,
    _asks_for_the_type,
    _asks_for_none,
    _asks_for_grad_mode,
    _reads_a_global,
    _counts,
    _depends_on_data,
    _depends_on_shape,
    _loops_over_shape,
]


@pytest.mark.parametrize("forward", EVERYTHING, ids=lambda f: f.__name__)
def test_a_forward_that_cannot_be_traced(forward, capsys):
    fused = check(module_like(Conv, forward), ["conv"])
    printed = "torch.Size([2, 3, 12, 12])\n" * 6 if forward is _prints else ""
    assert capsys.readouterr().out == printed, "printed while fusing, or not when called"
    if forward is _asks_for_none:
        x = torch.randn(IMAGES, dtype=torch.float64)
        torch.testing.assert_close(fused(x, x), fused(x * 2))
    if forward is _counts:
        before = COUNTS[0]
        fused(torch.randn(IMAGES, dtype=torch.float64))
        assert COUNTS[0] == before + 1


def test_unusual_arguments_are_left():
    assert "in a way that cannot be followed" in reason(module_like(Conv, _any_arguments), "conv")


# --- variables -------------------------------------------------------------------------------------------------------


def _read_in_a_handler(self, x):
    try:
        x = self.conv(x)
        x = F.max_pool2d(F.relu(x), 20)
    except RuntimeError:
        x = x * 2
    return x


def _read_by_a_closure(self, x):
    later = lambda: x  # noqa: E731
    x = F.relu(self.conv(x))
    x = F.max_pool2d(x, 2)
    return x + later()


def _read_after_a_swallowed_error(self, x):
    with contextlib.suppress(RuntimeError):
        x = self.conv(x)
        x = F.max_pool2d(F.relu(x), 20)
    return x


def _read_by_name(self, x):
    x = self.conv(x)
    x = F.relu(x) + locals()["x"]
    return F.max_pool2d(x, 2)


def _added_to(self, x):
    y = self.conv(x)
    y += F.relu(y)
    return F.max_pool2d(y, 2)


def _read_in_the_next_round(self, x):
    total = 0
    for _ in range(2):
        y = self.conv(x)
        z = F.max_pool2d(F.relu(y), 2)
        total = total + z.sum() + y.sum()
    return total


def _deleted(self, x):
    y = self.conv(x)
    z = F.relu(y)
    del y
    return F.max_pool2d(z, 2)


def _in_place_without_a_name(self, x):
    x = self.conv(x)
    F.relu(x, inplace=True)
    return F.max_pool2d(x, 2)


def _one_of_two_targets(self, x):
    x = y = self.conv(x)
    x = F.relu(x)
    return F.max_pool2d(x, 2) + F.max_pool2d(y, 2)


def _in_a_comprehension(self, x):
    return sum(F.max_pool2d(F.relu(self.conv(y)), 2) for y in (x, x * 2))


def _global_variable(self, x):
    global STATE
    STATE = self.conv(x)
    STATE = F.relu(STATE)
    return F.max_pool2d(STATE, 2)


STATE = None


def _assigns_a_variable_to_itself(self, x):
    x = F.max_pool2d(F.relu(self.conv(x)), 2)
    if not self.training:
        x = x
    return x


def test_a_statement_without_an_effect_stays():
    check(module_like(Conv, _assigns_a_variable_to_itself), ["conv"])


VARIABLES = [
    _read_in_a_handler,
    _read_by_a_closure,
    _read_after_a_swallowed_error,
    _read_by_name,
    _added_to,
    _read_in_the_next_round,
    _deleted,
    _in_place_without_a_name,
    _one_of_two_targets,
    _in_a_comprehension,
    _global_variable,
]


@pytest.mark.parametrize("forward", VARIABLES, ids=lambda f: f.__name__)
def test_a_variable_that_others_may_read(forward):
    reason(module_like(Conv, forward), "conv")


# --- without a source ------------------------------------------------------------------------------------------------


def typed(*statements, arguments="self, x"):
    """A forward as if typed at a prompt: there is no file that it could be read from."""
    scope = {"F": F, "torch": torch, "nn": nn, "FACTOR": 2}
    exec("\n    ".join([f"def forward({arguments}):", *statements]), scope)
    tail = nn.Sequential(nn.Flatten(), nn.Linear(100, 3), nn.ReLU())
    model = module_like(Conv, scope["forward"], tail=tail, relu=nn.ReLU(), pool=nn.MaxPool2d(2))
    model.scale = 2
    return model


TYPED = {
    "nested": ["return self.tail(F.max_pool2d(F.relu(self.conv(x)), 2))"],
    "modules": ["x = self.pool(self.relu(self.conv(x)))", "return self.tail(x)"],
    "statements": [
        "x = self.conv(x)",
        "x = torch.relu(x)",
        "x = F.max_pool2d(x, 2)",
        "return self.tail(x.view(-1, 100))",
    ],
    "methods": ["x = self.conv(x).relu_()", "return self.tail(torch.max_pool2d(x, 2).view(x.size(0), -1)).sin() + 1"],
}


@pytest.mark.parametrize("name", TYPED)
def test_a_forward_typed_at_a_prompt(name):
    expected = ["tail.1"] if name == "methods" else ["conv", "tail.1"]
    check(typed(*TYPED[name]), expected)


NOT_THE_WHOLE_TRUTH = {
    "attribute": (["return F.max_pool2d(F.relu(self.conv(x)), 2) * self.scale"], "self, x"),
    "mode": (["return F.max_pool2d(F.relu(self.conv(x)), 2) * self.training"], "self, x"),
    "global": (["return F.max_pool2d(F.relu(self.conv(x)), 2) * FACTOR"], "self, x"),
    "builtin": (["print(end='')", "return F.max_pool2d(F.relu(self.conv(x)), 2)"], "self, x"),
    "type": (["return F.max_pool2d(F.relu(self.conv(x)), 2) * (type(x) is torch.Tensor)"], "self, x"),
    "context": (["with torch.no_grad():", "    x = x * 2", "return F.max_pool2d(F.relu(self.conv(x)), 2)"], "self, x"),
    "condition": (["x = F.max_pool2d(F.relu(self.conv(x)), 2)", "return x * 2 if x.sum() > 0 else x"], "self, x"),
    "random": (["return F.max_pool2d(F.relu(self.conv(x)), 2) + torch.rand(1)"], "self, x"),
    "argument": (["return F.max_pool2d(F.relu(self.conv(x)), 2 if y is None else 3)"], "self, x, y=None"),
    "function": (["return (lambda: F.max_pool2d(F.relu(self.conv(x)), 2))()"], "self, x"),
}


@pytest.mark.parametrize("name", NOT_THE_WHOLE_TRUTH)
def test_a_forward_that_a_trace_does_not_tell(name):
    statements, arguments = NOT_THE_WHOLE_TRUTH[name]
    assert "source of Model.forward is not to be had" in reason(typed(*statements, arguments=arguments), "conv")


def test_a_method_that_changed_since(tmp_path, monkeypatch):
    """What runs is not what is written any more, until it is imported anew."""
    text = "from torch.nn.functional import max_pool2d\ndef forward(self, x): return max_pool2d(self.conv(x).relu(), 2)"
    file = tmp_path / "edited_by_a_test.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    edited = importlib.import_module("edited_by_a_test")
    check(module_like(Conv, edited.forward), ["conv"])
    file.write_text(f"{text} + 1")
    changed = types.FunctionType(edited.forward.__code__.replace(), edited.forward.__globals__)  # not read yet
    assert "source of Model.forward is not to be had" in reason(module_like(Conv, changed), "conv")
    check(module_like(Conv, importlib.reload(edited).forward), ["conv"])
    del sys.modules["edited_by_a_test"]
