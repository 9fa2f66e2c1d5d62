"""`lenet_ext.fuse` rewrites a `forward`: branches, attributes and arguments keep working, or it is left as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from fusing import IMAGES, Conv, Switches, assert_same, check, conv, fused_layers, module_like, pool_of_relu, reason
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
    x = pool_of_relu(self.conv(x))
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
    assert "no ReLU" in reason(module_like(Conv, branch_in_the_chain), "conv")


def different_pools(self, x):
    x = F.relu(self.conv(x))
    return F.max_pool2d(x, 2) if self.training else F.max_pool2d(x, 3)


def test_different_poolings_in_different_branches():
    assert "different poolings" in reason(module_like(Conv, different_pools), "conv")


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
        x = F.relu(self.conv(x))
        if self.extra is not None:
            x = self.extra(x)
        return F.max_pool2d(x, 2)


def test_an_attribute_that_was_none():
    """`is None` cannot be followed both ways; when the answer is another, it says so instead of computing nonsense."""
    assert "followed by Sigmoid" in reason(Downsample(nn.Sigmoid()), "conv")
    fused = check(Downsample(None), ["conv"])
    fused.extra = nn.Sigmoid()
    with pytest.raises(RuntimeError, match="extra was None when the model was fused"):
        fused(torch.randn(IMAGES, dtype=torch.float64))


class CallsTheTail(nn.Module):
    """Nothing in this forward is superfluous, but it says what is between the convolution and its ReLU."""

    def __init__(self):
        super().__init__()
        self.conv, self.tail, self.extra = conv(), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), None

    def forward(self, x):
        x = self.conv(x)
        if self.extra is not None:
            x = self.extra(x)
        return self.tail(x)


def test_an_attribute_that_was_none_where_only_modules_are_swapped():
    fused = check(CallsTheTail(), ["conv"])
    fused.extra = nn.Sigmoid()
    with pytest.raises(RuntimeError, match="extra was None"):
        fused(torch.randn(IMAGES, dtype=torch.float64))


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


UNREADABLE = [
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
    _any_arguments,
    _depends_on_data,
    _depends_on_shape,
    _loops_over_shape,
]


@pytest.mark.parametrize("forward", UNREADABLE, ids=lambda f: f.__name__)
def test_a_forward_that_tracing_would_change_is_left(forward, capsys):
    assert "in the model, which" in reason(module_like(Conv, forward), "conv")
    if forward is _prints:
        assert capsys.readouterr().out == "torch.Size([2, 3, 12, 12])\n" * 6, "printed while fusing, or not when called"


def test_fusing_runs_nothing_of_the_model_for_real():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return F.relu(self.fc(x)) + self.calls

    model = Counter()
    fused = fuse(model)
    assert fused_layers(fused) == ["fc"]
    assert model.calls == fused.calls == 0
    fused(torch.randn(2, 12))
    assert fused.calls == 1
