"""`lenet_ext.fuse(average_pooling=True)`: an AvgPool2d does the ReLU before it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fusing import IMAGES, assert_same, conv, module_like
from torch import nn

from lenet_ext import fuse, unfuse
from lenet_ext.bench.small_networks import lenet_average_pooling
from lenet_ext.nn import ConvReLUMaxPool2d, LinearReLU, ReLUAvgPool2d


def pools(model):
    """The paths of the poolings that do ReLU; the report must say the same."""
    paths = [path for path, module in model.named_modules() if type(module) is ReLUAvgPool2d]
    assert paths == [record.path for record in model.fusion_report if record.what == "ReLU + AvgPool2d"]
    return paths


def check(model, expected):
    """Fuses, compares in both modes, and takes it back."""
    model = model.double()
    input = torch.randn(IMAGES, dtype=torch.float64)
    before, keys = copy.deepcopy(model), list(model.state_dict())
    fused = fuse(model, average_pooling=True)
    assert pools(fused) == expected, fused.fusion_report
    assert list(fused.state_dict()) == keys
    for training in (True, False, True):
        assert_same(fused.train(training), model.train(training), input)
        model.load_state_dict(before.state_dict())  # the running statistics
        fused.load_state_dict(before.state_dict())
    back = unfuse(fused)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert repr(back) == repr(model)
    assert [m.__dict__.keys() for m in back.modules()] == [m.__dict__.keys() for m in model.modules()]
    assert_same(back.train(), model.train(), input)
    assert pools(fuse(back, average_pooling=True)) == expected
    again = fuse(fused, average_pooling=True)
    assert [r for r in again.fusion_report if r.fused] == [r for r in fused.fusion_report if r.fused]
    return fused


def one_pool(forward):
    """With a pooling that the forward may call in several places."""
    children = {"conv": conv(), "second": nn.Conv2d(4, 4, 2), "pool": nn.AvgPool2d(2), "relu": nn.ReLU()}
    return module_like(nn.Module, forward, **children)


def everywhere(self, x):
    x = self.pool(F.relu(self.conv(x)))
    return self.pool(F.relu(self.second(x)))


FUSED_FORWARDS = {
    "function": lambda self, x: self.second(self.pool(torch.relu(self.conv(x)))),
    "method": lambda self, x: self.second(self.pool(self.conv(x).relu_())) + 1,
    "module": lambda self, x: self.second(self.pool(self.relu(self.conv(x)))),
    "everywhere": everywhere,
}


@pytest.mark.parametrize("name", FUSED_FORWARDS)
def test_fused_in_a_method_and_taken_back(name):
    check(one_pool(FUSED_FORWARDS[name]), ["pool"])


FUSED = {
    "sequential": (lambda: nn.Sequential(conv(), nn.ReLU(), nn.AvgPool2d(2)), ["2"]),
    "in place": (lambda: nn.Sequential(conv(), nn.ReLU(inplace=True), nn.AvgPool2d(3, 2, 1, ceil_mode=True)), ["2"]),
    "batch norm": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)), ["3"]),
    "nested": (lambda: nn.Sequential(nn.Sequential(conv(), nn.ReLU()), nn.Identity(), nn.AvgPool2d(2)), ["2"]),
    "shared relu": (
        lambda: nn.Sequential(conv(), relu := nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), relu, nn.Tanh()),
        ["2"],
    ),
    "shared pool": (
        lambda: nn.Sequential(conv(), nn.ReLU(), pool := nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU(), pool),
        ["2"],
    ),
    "beside a max-pool": (
        lambda: nn.Sequential(
            conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)
        ),
        ["6"],
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_and_taken_back(name):
    make, expected = FUSED[name]
    check(make(), expected)


class OwnPool(nn.AvgPool2d):
    pass


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


LEFT = {
    "no relu": lambda: nn.Sequential(conv(), nn.AvgPool2d(2)),
    "another activation": lambda: nn.Sequential(conv(), nn.Tanh(), nn.AvgPool2d(2)),
    "an operation between": lambda: nn.Sequential(conv(), nn.ReLU(), nn.Dropout(0.0), nn.AvgPool2d(2)),
    "an input that others have": lambda: nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)),
    "a subclass": lambda: nn.Sequential(conv(), nn.ReLU(), OwnPool(2)),
    "hooks on the pool": lambda: nn.Sequential(conv(), nn.ReLU(), hooked(nn.AvgPool2d(2))),
    "hooks on ReLU": lambda: nn.Sequential(conv(), hooked(nn.ReLU()), nn.AvgPool2d(2)),
    "hooks on the convolution": lambda: nn.Sequential(hooked(conv()), nn.ReLU(inplace=True), nn.AvgPool2d(2)),
    "once without ReLU": lambda: nn.Sequential(conv(), nn.ReLU(), pool := nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), pool),
    "another pooling": lambda: nn.Sequential(conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
}
LEFT_FORWARDS = {
    "ReLU used elsewhere": lambda self, x: self.second(self.pool(y := F.relu(self.conv(x)))).sum() + y.sum(),
    "input used elsewhere": lambda self, x: self.second(self.pool(F.relu(y := self.conv(x)))).sum() + y.sum(),
    "once without ReLU": lambda self, x: self.pool(self.second(self.pool(F.relu(self.conv(x))))),
    "given away": lambda self, x: next(map(self.pool, [F.relu(self.second(self.conv(x)))])),
    "a function": lambda self, x: self.second(F.avg_pool2d(F.relu(self.conv(x)), 2)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    assert_left_alone(LEFT[name]())


@pytest.mark.parametrize("name", LEFT_FORWARDS)
def test_left_alone_in_a_method(name):
    assert_left_alone(one_pool(LEFT_FORWARDS[name]))


def assert_left_alone(model):
    model = model.double()
    fused = fuse(model, average_pooling=True)
    assert pools(fused) == []
    assert not any("source of" in record.reason for record in fused.fusion_report), "left for want of its source"
    input = torch.randn(IMAGES, dtype=torch.float64)
    assert_same(fused, model, input)


def test_only_on_request():
    model = nn.Sequential(conv(), nn.ReLU(), nn.AvgPool2d(2))
    fused = fuse(model)
    assert [type(m) for m in fused] == [type(m) for m in model]


def test_what_the_report_says_and_what_the_model_shows():
    fused = fuse(nn.Sequential(conv(), nn.ReLU(), nn.AvgPool2d(2)), average_pooling=True)
    assert [(r.path, r.what, r.fused) for r in fused.fusion_report] == [
        ("0", "Conv2d", False),
        ("2", "ReLU + AvgPool2d", True),
    ]
    assert repr(fused[1]) == "ReLU(done by the fused layer)"
    assert repr(fused[2]) == "ReLUAvgPool2d(kernel_size=2, stride=2, padding=0)"
    with pytest.raises(RuntimeError, match="part of 2"):
        fused[1].register_forward_hook(print)
    fused[2].register_forward_hook(lambda *_: None)


def test_lenet_with_average_pooling():
    """The network that `lenet-ext bench --only networks` measures."""
    stock = lenet_average_pooling().double()
    fused = fuse(stock, average_pooling=True)
    kinds = [type(m) for m in fused]
    assert (kinds.count(ReLUAvgPool2d), kinds.count(LinearReLU), kinds.count(ConvReLUMaxPool2d)) == (2, 2, 0)
    assert_same(fused, stock, torch.randn(3, 1, 32, 32, dtype=torch.float64))


def test_a_model_may_end_before_its_pooling():
    assert pools(fuse(nn.Sequential(conv(), nn.ReLU()), average_pooling=True)) == []


def test_a_pool_written_into_a_model_stays():
    model = nn.Sequential(conv(), ReLUAvgPool2d(2))
    with pytest.warns(UserWarning, match="ReLUAvgPool2d"):
        assert type(unfuse(model)[1]) is ReLUAvgPool2d
