"""`lenet_ext.fuse`: what it must leave as it is, because somebody could tell."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from fusing import IMAGES, Conv, Linear, check, conv, fused_layers, module_like, pool_of_relu, reason
from torch import nn

from lenet_ext import fuse

# --- what is left alone ----------------------------------------------------------------------------------------------

LEFT = {
    "batch norm": (nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), "followed by BatchNorm2d (1)"),
    "another activation": (nn.Sequential(conv(), nn.GELU(), nn.MaxPool2d(2)), "followed by GELU (1)"),
    "relu6": (nn.Sequential(conv(), nn.ReLU6(), nn.MaxPool2d(2)), "followed by ReLU6 (1)"),
    "average pooling": (nn.Sequential(conv(), nn.ReLU(), nn.AvgPool2d(2)), "followed by AvgPool2d (2)"),
    "adaptive pooling": (
        nn.Sequential(conv(), nn.ReLU(), nn.AdaptiveMaxPool2d(2)),
        "followed by AdaptiveMaxPool2d (2)",
    ),
    "dropout": (nn.Sequential(conv(), nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2)), "followed by Dropout (2)"),
    # Its p can be changed later.
    "dropout of nothing": (
        nn.Sequential(conv(), nn.ReLU(), nn.Dropout(0.0), nn.MaxPool2d(2)),
        "followed by Dropout (2)",
    ),
    "no relu": (nn.Sequential(conv(), nn.MaxPool2d(2)), "no ReLU after its max-pool"),
    "no pool": (nn.Sequential(conv(), nn.ReLU()), "no max-pool after its ReLU: its output is what the model returns"),
    "padding mode": (
        nn.Sequential(conv(padding=1, padding_mode="reflect"), nn.ReLU(), nn.MaxPool2d(2)),
        "padding_mode",
    ),
    "indices": (nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)), "followed by MaxPool2d (2)"),
}


@pytest.mark.parametrize("name", LEFT)
def test_modules_that_are_no_chain(name):
    model, why = LEFT[name]
    if name == "indices":
        fused = fuse(model.double())
        assert fused_layers(fused) == []
        x = torch.randn(IMAGES, dtype=torch.float64)
        torch.testing.assert_close(fused(x), model(x))
        assert why in fused.fusion_report[0].reason
    else:
        assert why in reason(model, "0")


LEFT_FORWARDS = {
    "used elsewhere": (
        lambda self, x: F.max_pool2d((y := F.relu(self.conv(x))), 2).sum() + y.sum(),
        "followed by `(y := F.relu(self.conv(x)))`",
    ),
    "conv used elsewhere": (lambda self, x: (F.max_pool2d(F.relu(y := self.conv(x)), 2), y), "followed by `(y := "),
    "returned": (lambda self, x: (F.max_pool2d(y := F.relu(self.conv(x)), 2), y), "followed by `(y := "),
    "in place, and used": (lambda self, x: ((y := self.conv(x)).relu_(), F.max_pool2d(y, 2))[1], "followed by `(y := "),
    "shape": (lambda self, x: F.max_pool2d((y := F.relu(self.conv(x))), 2).sum() / y.shape[2], "followed by `(y := "),
    "with itself": (lambda self, x: (lambda y: torch.cat([y, y]))(self.conv(x)), "followed by "),
    "not used": (lambda self, x: (self.conv(x), x * 2)[1], "followed by `(self.conv(x), x * 2)`"),
    "one of several outputs": (lambda self, x: (self.conv(x), x), "followed by `(self.conv(x), x)`"),
    "scaled": (lambda self, x: F.max_pool2d(F.relu(self.conv(x) * 2), 2), "followed by `self.conv(x) * 2`"),
    "average": (lambda self, x: F.avg_pool2d(F.relu(self.conv(x)), 2), "followed by F.avg_pool2d"),
    "adaptive": (lambda self, x: F.adaptive_max_pool2d(F.relu(self.conv(x)), 2), "followed by F.adaptive_max_pool2d"),
    "indices": (
        lambda self, x: F.max_pool2d(F.relu(self.conv(x)), 2, return_indices=True)[0],
        "followed by F.max_pool2d",
    ),
    "computed": (lambda self, x: F.max_pool2d(F.relu(self.conv(x)), x.shape[2] // 4), "options are computed"),
    "dropout": (lambda self, x: F.max_pool2d(F.dropout(F.relu(self.conv(x)), 0.5, self.training), 2), "dropout"),
    "activation": (lambda self, x: F.max_pool2d(F.leaky_relu(self.conv(x)), 2), "followed by F.leaky_relu"),
    "twice": (
        lambda self, x: F.max_pool2d(self.conv(x).relu(), 2).sum() + self.conv(x).sum(),
        "followed by `self.conv(x).sum`",
    ),
    "gradient hook": (
        lambda self, x: ((y := self.conv(x)).register_hook(lambda g: g * 2), F.max_pool2d(F.relu(y), 2))[1],
        "followed by `(y := ",
    ),
    "in a helper": (lambda self, x: pool_of_relu(self.conv(x)), "followed by pool_of_relu"),
}


@pytest.mark.parametrize("name", LEFT_FORWARDS)
def test_forwards_that_are_no_chain(name):
    forward, why = LEFT_FORWARDS[name]
    assert why in reason(module_like(Conv, forward), "conv")


def test_a_relu_after_another_operation_on_linear():
    assert "followed by `self.fc(x).sin`" in reason(module_like(Linear, lambda self, x: F.relu(self.fc(x).sin())), "fc")


class OwnConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


class OwnReLU(nn.ReLU):
    def forward(self, input):
        return super().forward(input) + 1


def test_subclasses_with_a_forward_of_their_own():
    assert "subclass" in reason(nn.Sequential(OwnConv(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), "0")
    assert "followed by OwnReLU (1)" in reason(nn.Sequential(conv(), OwnReLU(), nn.MaxPool2d(2)), "0")


def test_parametrized_layers():
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))
    nn.utils.parametrizations.weight_norm(model[0])
    assert "subclass" in reason(model, "0")


def test_pruned_layers():
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU())
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    (record,) = fuse(model, inplace=True).fusion_report  # in place: torch cannot copy it
    assert (record.fused, record.reason) == (False, "has hooks")


def test_a_forward_replaced_on_the_instance():
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))
    model[0].forward = lambda x: F.conv2d(x, torch.ones(1, 3, 1, 1, dtype=x.dtype))
    assert "forward replaced" in reason(model, "0")
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))
    model[1].forward = torch.sin
    assert "forward replaced" in reason(model, "0")
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))
    model.forward = lambda x: x.sin()
    fused = fuse(model)
    assert fused_layers(fused) == []


def test_a_shared_layer():
    shared = nn.Linear(12, 12)
    check(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU()), ["0"])
    assert "its output is what the model returns" in reason(
        nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared), "0.0"
    )
    # A block may well be used twice, as long as the chain is inside it.
    block = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
    check(nn.Sequential(block, nn.Sigmoid(), block), ["0.0"])
    # The last ReLU is outside of it: the other use of the block has none.
    block = nn.Sequential(nn.Linear(12, 12))
    assert "called more than once" in reason(nn.Sequential(block, nn.ReLU(), block), "0.0")


def test_a_member_that_is_also_called_directly():
    model = module_like(
        nn.Module,
        lambda self, x: self.block(x).sum() + self.block[1](x).sum(),
        block=nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)),
    )
    assert "called elsewhere" in reason(model, "block.0")


class WithAnotherMethod(Conv):
    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)

    def features(self, x):
        return self.conv(x)


def test_a_layer_that_another_method_calls():
    assert "its output is what WithAnotherMethod.features returns" in reason(WithAnotherMethod(), "conv")


# --- hooks -----------------------------------------------------------------------------------------------------------

HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda m, i, o: o + 1),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "backward": lambda module: module.register_full_backward_hook(lambda m, i, o: tuple(g * 2 for g in i)),
    "backward pre": lambda module: module.register_full_backward_pre_hook(lambda m, o: tuple(g * 2 for g in o)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", ["0.0", "0.1", "1", "0"])
def test_hooks_inside_a_chain_stop_it(kind, place):
    model = nn.Sequential(nn.Sequential(conv(), nn.ReLU()), nn.MaxPool2d(2))
    HOOKS[kind](model.get_submodule(place))
    assert "hooks" in reason(model, "0.0")


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_outside_of_a_chain_survive(kind):
    model = nn.Sequential(nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)), module_like(nn.Module, lambda s, x: x * 2))
    HOOKS[kind](model)
    HOOKS[kind](model[0])
    HOOKS[kind](model[1])
    check(model, ["0.0"])
    model = module_like(Conv, lambda self, x: F.max_pool2d(F.relu(self.conv(x)), 2))
    HOOKS[kind](model)
    check(model, ["conv"])


def test_hooks_on_all_modules_stop_everything():
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert "hooks" in reason(nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)), "0")
    finally:
        handle.remove()


def test_a_hook_on_a_relu_used_in_a_forward():
    model = module_like(Conv, lambda self, x: F.max_pool2d(self.relu(self.conv(x)), 2), relu=nn.ReLU())
    model.relu.register_forward_hook(lambda m, i, o: o + 1)
    assert "hooks" in reason(model, "conv")
