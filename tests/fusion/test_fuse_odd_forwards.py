"""`lenet_ext.fuse`: forwards that hardly anybody writes, fused where nobody can tell and left alone elsewhere."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from fusing import IMAGES, Conv, check, conv, fused_layers, module_like, reason
from torch import nn

import lenet_ext
from lenet_ext import fuse, unfuse


def same_in_place(model):
    """Fuses a model that cannot be copied, or whose chains do not matter, and compares."""
    model = model.double()
    x = torch.randn(IMAGES, dtype=torch.float64)
    expected = model(x)
    fuse(model, inplace=True)
    torch.testing.assert_close(model(x), expected)
    return fused_layers(model)


# --- fused -----------------------------------------------------------------------------------------------------------


def test_a_value_given_by_name():
    check(module_like(Conv, lambda self, x: F.max_pool2d(F.relu(input=self.conv(x)), 2)), ["conv"])


def test_functions_of_the_scope_around():
    relu, pool = F.relu, F.max_pool2d

    def forward(self, x):
        return pool(relu(self.conv(x)), 2)

    check(module_like(Conv, forward), ["conv"])


def test_a_statement_in_an_else():
    class Branches(Conv):
        def forward(self, x, plain: bool = False):
            if plain:
                x = self.conv(x).sin()
            else:
                x = F.relu(self.conv(x))
                x = F.max_pool2d(x, 2)
            return x

    assert "followed by" in reason(Branches(), "conv")

    class InElse(Conv):
        def forward(self, x, plain: bool = False):
            if plain:
                x = x.sin()
            else:
                x = F.relu(self.conv(x))
                x = F.max_pool2d(x, 2)
            return x

    check(InElse(), ["conv"])


def test_a_helper_without_a_source_that_names_no_layer():
    scope = {}
    exec("def describe(self):\n    return 'a model'", scope)
    model = module_like(Conv, lambda self, x: F.max_pool2d(F.relu(self.conv(x)), 2))
    type(model).describe = scope["describe"]
    assert check(model, ["conv"]).describe() == "a model"


# --- left alone ------------------------------------------------------------------------------------------------------


def test_a_function_that_is_not_there_yet():
    def make():
        def forward(self, x):
            return F.max_pool2d(relu(self.conv(x)), 2)

        fused = fuse(model := module_like(Conv, forward).double())
        relu = torch.sin
        return fused, model

    fused, model = make()
    assert fused_layers(fused) == []
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))


def test_an_output_that_nobody_takes():
    def forward(self, x):
        self.conv(x)
        return F.max_pool2d(F.relu(x), 2)

    assert "its output is not used" in reason(module_like(Conv, forward), "conv")


class CopiedItsOwnWay(Conv):
    def __deepcopy__(self, memo):
        made = type(self)()
        made.load_state_dict(self.state_dict())
        return made.double()

    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)


class CountsItsSubclasses(Conv):
    made = 0

    def __init_subclass__(cls):
        super().__init_subclass__()
        CountsItsSubclasses.made += 1

    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (CopiedItsOwnWay, "belongs to a class with its own way to be copied"),
        (CountsItsSubclasses, "belongs to a class with its own __init_subclass__"),
    ],
)
def test_classes_that_would_notice_another_method(kind, why):
    fused = fuse(kind().double())
    assert fused_layers(fused) == []
    assert why in fused.fusion_report[0].reason
    assert CountsItsSubclasses.made == 0


class OfTorchsOwn(nn.Identity):
    """Whatever torch's class does with its children, nobody else may change them."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv())

    def forward(self, x):
        return F.max_pool2d(F.relu(self.features(x)), 2)


def test_a_child_of_a_class_that_extends_one_of_torchs():
    assert "features is in the model, which is a OfTorchsOwn" in reason(OfTorchsOwn(), "features.0")


class CallsItself(nn.Sequential):
    """What calls the model gets its output as it is, and not only this method calls it."""

    def pooled(self, x):
        return F.max_pool2d(F.relu(self(x)), 2)


def test_a_model_that_calls_itself():
    model = CallsItself(conv()).double()
    fused = fuse(model)
    assert fused_layers(fused) == []
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused.pooled(x), model.pooled(x))


class Backwards(nn.ModuleList):
    def __iter__(self):
        return reversed([*super().__iter__()])


class OwnIndex(nn.ModuleList):
    def __getitem__(self, index):
        return super().__getitem__(len(self) - 1 - index)


class LoopsOverLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Backwards([nn.MaxPool2d(2), nn.ReLU(), conv()])])

    def forward(self, x):
        for block in self.blocks:
            for layer in block:
                x = layer(x)
        return x


class IndexesAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = OwnIndex([nn.MaxPool2d(2), nn.ReLU(), conv()])

    def forward(self, x):
        for i in range(len(self.layers)):
            x = self.layers[i](x)
        return x


class TakesAPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x, count: int = 2):
        return self.layers(x).sum() + self.layers[:count](x).sum()


class CallsTheLastAgain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ReLU(), nn.MaxPool2d(2), conv()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return F.max_pool2d(F.relu(x), 2).sum() + layer(x[:, :3]).sum()


@pytest.mark.parametrize("kind", [LoopsOverLists, IndexesAList, TakesAPart, CallsTheLastAgain])
def test_lists_that_are_not_walked_as_they_look(kind):
    assert same_in_place(kind()) == []


# --- models that cannot run ------------------------------------------------------------------------------------------


def test_a_member_that_is_none():
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))
    model.register_module("3", None)
    fused = fuse(model)
    assert fused[3] is None
    with pytest.raises(TypeError):
        model(torch.randn(IMAGES))
    with pytest.raises(TypeError):
        fused(torch.randn(IMAGES))


def test_a_pooling_that_stock_refuses():
    fused = fuse(nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d((1, 2, 2))))
    assert fused_layers(fused) == []
    assert "pool_kernel_size" in fused.fusion_report[0].reason


def test_a_file_that_is_no_python_any_more(tmp_path, monkeypatch):
    """What runs was imported before."""
    path = tmp_path / "model_of_a_file.py"
    path.write_text(
        "import torch.nn.functional as F\nfrom fusing import Conv\n\n\nclass Model(Conv):\n"
        "    def forward(self, x):\n        return F.max_pool2d(F.relu(self.conv(x)), 2) * (2 - self.training)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("model_of_a_file").Model()
    path.write_text("def (:\n" * 10)
    try:
        assert "the source of Model.forward is not to be had" in reason(model, "conv")
    finally:
        sys.modules.pop("model_of_a_file", None)


# --- the way back ----------------------------------------------------------------------------------------------------


def test_a_net_with_a_stock_layer_stays():
    net = lenet_ext.Net()
    net.conv1 = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2))
    with pytest.warns(UserWarning, match="left as it was"):
        back = unfuse(net)
    assert type(back) is lenet_ext.Net
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(back(x), net(x))
