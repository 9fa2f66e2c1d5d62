"""`lenet_ext.fuse`: which chains it swaps, which it must leave, and what of the model survives."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

import lenet_ext
from lenet_ext import fuse
from lenet_ext.nn import ConvReLUMaxPool2d, LinearReLU

FUSED = (ConvReLUMaxPool2d, LinearReLU, lenet_ext.nn.Linear)
IMAGES = (2, 3, 12, 12)


def fused_layers(model):
    """The paths of the fused layers; the report must say the same."""
    paths = [path for path, module in model.named_modules() if type(module) in FUSED]
    assert paths == [record.path for record in model.fusion_report if record.fused]
    assert all(bool(record.reason) != record.fused for record in model.fusion_report)
    return paths


def flat(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in (output.values() if isinstance(output, dict) else output) for t in flat(part)]


def run(model, *inputs, **options):
    """Outputs and gradients, of the input and of every parameter. The random numbers are the same in each run."""
    inputs = [i.clone().requires_grad_() if isinstance(i, torch.Tensor) else i for i in inputs]
    model.zero_grad()
    torch.manual_seed(1)
    outputs = flat(model(*inputs, **options))
    sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs).backward()
    gradients = [i.grad for i in inputs if isinstance(i, torch.Tensor)] + [p.grad for p in model.parameters()]
    return outputs, gradients


def assert_same(fused, model, *inputs, **options):
    for ours, stock in zip(run(fused, *inputs, **options), run(model, *inputs, **options), strict=True):
        for a, b in zip(ours, stock, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def check(model, expected, *inputs, **options):
    """Fuses, compares in both modes (twice, since switching must work), and counts the fused layers."""
    model = model.double()
    inputs = inputs or (torch.randn(IMAGES, dtype=torch.float64),)
    keys = list(model.state_dict())
    fused = fuse(model)
    assert fused is not model
    assert isinstance(fused, type(model))
    assert not any(isinstance(m, FUSED) for m in model.modules()), "the original was changed"
    assert list(fused.state_dict()) == keys
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert fused_layers(fused) == expected, fused.fusion_report
    for training in (True, False, True):
        assert_same(fused.train(training), model.train(training), *inputs, **options)
    return fused


def reason(model, path, **options):
    """Why `path` was left alone. The model must be equal all the same."""
    fused = check(model, [], **options)
    return next(record.reason for record in fused.fusion_report if record.path == path)


def conv(**options):
    return nn.Conv2d(3, 4, 3, **options)


class Conv(nn.Module):
    """A convolution and whatever a test does with it."""

    def __init__(self):
        super().__init__()
        self.conv = conv()


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 5)


def module_like(base, forward, **children):
    """A module of a class made for the test, with this forward."""
    made = type("Model", (base,), {"forward": forward})()
    for name, child in children.items():
        setattr(made, name, child)
    return made


# --- what is fused ---------------------------------------------------------------------------------------------------

CONV_FORWARDS = {
    "functional": lambda self, x: F.max_pool2d(F.relu(self.conv(x)), 2),
    "functional in place": lambda self, x: F.max_pool2d(F.relu(self.conv(x), inplace=True), 2),
    "F.relu_": lambda self, x: F.max_pool2d(F.relu_(self.conv(x)), 2),
    "torch": lambda self, x: torch.max_pool2d(torch.relu(self.conv(x)), 2),
    "torch in place": lambda self, x: torch.max_pool2d(torch.relu_(self.conv(x)), 2),
    "method": lambda self, x: F.max_pool2d(self.conv(x).relu(), 2),
    "method in place": lambda self, x: F.max_pool2d(self.conv(x).relu_(), 2),
    "pool first": lambda self, x: F.relu(F.max_pool2d(self.conv(x), 2)),
    "pool first, in place": lambda self, x: F.max_pool2d(self.conv(x), 2).relu_(),
    "relu twice": lambda self, x: F.max_pool2d(self.conv(x).relu().relu(), 2),
    "relu before and after": lambda self, x: F.max_pool2d(self.conv(x).relu(), 2).relu(),
    "options by position": lambda self, x: F.max_pool2d(F.relu(self.conv(x)), 3, 2, 1, 2, True),
    "options by name": lambda self, x: F.max_pool2d(
        F.relu(self.conv(x)), kernel_size=(3, 2), stride=[2, 1], padding=(1, 0), dilation=(2, 1), ceil_mode=True
    ),
    "torch options": lambda self, x: torch.max_pool2d(torch.relu(self.conv(x)), [3, 2], ceil_mode=True),
    "used later": lambda self, x: F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1).sin(),
    "input used elsewhere": lambda self, x: (F.max_pool2d(F.relu(self.conv(x)), 2), x.sin()),
    "pooled used twice": lambda self, x: {"a": (p := F.max_pool2d(F.relu(self.conv(x)), 2)), "b": p * 2},
}


@pytest.mark.parametrize("name", CONV_FORWARDS)
def test_conv_chains_in_a_forward(name):
    check(module_like(Conv, CONV_FORWARDS[name]), ["conv"])


LINEAR_FORWARDS = {
    "functional": lambda self, x: F.relu(self.fc(x)),
    "functional in place": lambda self, x: F.relu(self.fc(x), True),
    "torch": lambda self, x: torch.relu(self.fc(x)),
    "torch in place": lambda self, x: torch.relu_(self.fc(x)),
    "method": lambda self, x: self.fc(x).relu(),
    "method in place": lambda self, x: self.fc(x).relu_(),
    "then pooled": lambda self, x: F.max_pool2d(self.fc(x).relu(), 2),
}


@pytest.mark.parametrize("name", LINEAR_FORWARDS)
def test_linear_chains_in_a_forward(name):
    check(module_like(Linear, LINEAR_FORWARDS[name]), ["fc"])


@pytest.mark.parametrize("inplace", [False, True])
def test_modules_in_a_forward(inplace):
    children = {"relu": nn.ReLU(inplace), "pool": nn.MaxPool2d(3, 2, 1, ceil_mode=True)}
    check(module_like(Conv, lambda self, x: self.pool(self.relu(self.conv(x))), **children), ["conv"])
    check(module_like(Conv, lambda self, x: self.relu(self.pool(self.conv(x))), **children), ["conv"])
    check(module_like(Conv, lambda self, x: F.max_pool2d(self.relu(self.conv(x)), 2), **children), ["conv"])
    check(module_like(Linear, lambda self, x: self.relu(self.fc(x)), relu=nn.ReLU(inplace)), ["fc"])


def test_sequentials_in_any_nesting():
    relu, pool = nn.ReLU(), nn.MaxPool2d
    check(nn.Sequential(conv(), nn.ReLU(inplace=True), pool(2, dilation=2)), ["0"])
    check(nn.Sequential(conv(), pool((2, 3), (1, 2)), relu), ["0"])
    check(nn.Sequential(nn.Sequential(conv(), relu), pool(2)), ["0.0"])
    check(nn.Sequential(conv(), nn.Sequential(relu, nn.Sequential(pool(2)))), ["0"])
    check(nn.Sequential(nn.Sequential(conv()), nn.Sequential(), nn.Sequential(relu), nn.Sequential(pool(2))), ["0.0"])
    check(nn.Sequential(conv(), nn.Identity(), relu, nn.Sequential(nn.Identity()), pool(2)), ["0"])
    check(nn.Sequential(nn.Linear(12, 5), relu, nn.Sequential(nn.Linear(5, 4)), relu, nn.Linear(4, 3)), ["0", "2.0"])


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1, "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "groups": 1},
        {"padding": (0, 2), "stride": (2, 1)},
    ],
    ids=str,
)
def test_options_of_the_convolution(options):
    check(nn.Sequential(conv(**options), nn.ReLU(), nn.MaxPool2d(2)), ["0"])


def test_a_chain_that_passes_through_modules_with_a_forward_of_their_own():
    block = module_like(Conv, lambda self, x: F.relu(self.conv(x)))
    check(module_like(nn.Module, lambda self, x: F.max_pool2d(self.block(x), 2), block=block), ["block.conv"])
    check(nn.Sequential(block, nn.MaxPool2d(2)), ["0.conv"])
    tail = module_like(nn.Module, lambda self, x: F.max_pool2d(x.relu(), 2))
    check(nn.Sequential(conv(), tail), ["0"])


class Activation(nn.ReLU):
    """Its forward is stock's, which can be read."""


class SequentialSubclass(nn.Sequential):
    def __init__(self):
        super().__init__(conv(), Activation(), nn.MaxPool2d(2))


def test_subclasses_that_change_nothing():
    check(SequentialSubclass(), ["0"])


def test_loops_over_module_lists_and_dicts():
    layers = nn.ModuleList([conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3), nn.ReLU()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    check(module_like(nn.Module, forward, layers=layers), ["layers.0", "layers.4"])
    by_name = nn.ModuleDict({"conv": conv(), "act": nn.ReLU()})
    check(
        module_like(nn.Module, lambda self, x: F.max_pool2d(self.d["act"](self.d["conv"](x)), 2), d=by_name), ["d.conv"]
    )


def test_one_relu_and_one_pool_module_for_all_layers():
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    forward = lambda self, x: self.pool(self.relu(self.b(self.pool(self.relu(self.a(x))))))  # noqa: E731
    check(module_like(nn.Module, forward, a=conv(), b=nn.Conv2d(4, 5, 2), relu=relu, pool=pool), ["a", "b"])
    # The second use of each is not after a convolution, and must stay.
    check(nn.Sequential(conv(), relu, pool, nn.Sigmoid(), pool, relu), ["0"])
    forward = lambda self, x: self.relu(self.pool(self.relu(self.conv(x))) - 1)  # noqa: E731
    check(module_like(Conv, forward, relu=relu, pool=pool), ["conv"])


def test_helpers_methods_properties_and_super_are_followed():
    class Model(Conv):
        @property
        def size(self):
            return self.scale

        def forward(self, x):
            return self.activate(self.conv(x)) * self.size

        def activate(self, x):
            return pool_of_relu(x)

    class Child(Model):
        def forward(self, x):
            return super().forward(x) + 1

    model = Child()
    model.scale = 3
    fused = check(model, ["conv"])
    fused.scale = model.scale = 4
    assert_same(fused, model, torch.randn(IMAGES, dtype=torch.float64))


def pool_of_relu(x):
    return F.max_pool2d(F.relu(x), 2)


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
    "no pool": (nn.Sequential(conv(), nn.ReLU()), "no max-pool after its ReLU: its output is the model's output"),
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
        "used more than once",
    ),
    "conv used elsewhere": (lambda self, x: (F.max_pool2d(F.relu(y := self.conv(x)), 2), y), "used more than once"),
    "returned": (lambda self, x: (F.max_pool2d(y := F.relu(self.conv(x)), 2), y), "used more than once"),
    "in place, and used": (lambda self, x: ((y := self.conv(x)).relu_(), F.max_pool2d(y, 2))[1], "used more than once"),
    "shape": (lambda self, x: F.max_pool2d((y := F.relu(self.conv(x))), 2).sum() / y.shape[2], "used more than once"),
    "with itself": (lambda self, x: (lambda y: torch.cat([y, y]))(self.conv(x)), "used more than once"),
    "not used": (lambda self, x: (self.conv(x), x * 2)[1], "not used"),
    "one of several outputs": (lambda self, x: (self.conv(x), x), "one of several"),
    "scaled": (lambda self, x: F.max_pool2d(F.relu(self.conv(x) * 2), 2), "followed by mul"),
    "average": (lambda self, x: F.avg_pool2d(F.relu(self.conv(x)), 2), "followed by avg_pool2d"),
    "adaptive": (lambda self, x: F.adaptive_max_pool2d(F.relu(self.conv(x)), 2), "followed by adaptive_max_pool2d"),
    "indices": (
        lambda self, x: F.max_pool2d(F.relu(self.conv(x)), 2, return_indices=True)[0],
        "followed by max_pool2d",
    ),
    "computed": (lambda self, x: F.max_pool2d(F.relu(self.conv(x)), x.shape[2] // 4), "options are computed"),
    "dropout": (lambda self, x: F.max_pool2d(F.dropout(F.relu(self.conv(x)), 0.5, self.training), 2), "dropout"),
    "activation": (lambda self, x: F.max_pool2d(F.leaky_relu(self.conv(x)), 2), "followed by leaky_relu"),
    "twice": (lambda self, x: F.max_pool2d(self.conv(x).relu(), 2).sum() + self.conv(x).sum(), "more than once"),
    "gradient hook": (
        lambda self, x: ((y := self.conv(x)).register_hook(lambda g: g * 2), F.max_pool2d(F.relu(y), 2))[1],
        "cannot be traced",
    ),
}


@pytest.mark.parametrize("name", LEFT_FORWARDS)
def test_forwards_that_are_no_chain(name):
    forward, why = LEFT_FORWARDS[name]
    assert why in reason(module_like(Conv, forward), "conv")


def test_a_relu_after_another_operation_on_linear():
    assert "followed by sin" in reason(module_like(Linear, lambda self, x: F.relu(self.fc(x).sin())), "fc")


class OwnConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


class OwnReLU(nn.ReLU):
    def forward(self, input):
        return super().forward(input) + 1


def test_subclasses_with_a_forward_of_their_own():
    assert "subclass" in reason(nn.Sequential(OwnConv(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), "0")
    assert "followed by add" in reason(nn.Sequential(conv(), OwnReLU(), nn.MaxPool2d(2)), "0")


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
    assert "more than once" in reason(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU()), "0")
    assert "more than once" in reason(nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared), "0.0")
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
    assert "also called by WithAnotherMethod.features" in reason(WithAnotherMethod(), "conv")


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
    model = module_like(Conv, CONV_FORWARDS["functional"])
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


# --- nothing is frozen -----------------------------------------------------------------------------------------------


class Switches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = conv(), nn.Linear(100, 6)
        self.flag, self.mode, self.scale, self.features, self.p = True, "a", 2.0, 100, 0.5
        self.log = []

    def forward(self, x, add=None, double: bool = False, *, shift=0.0):
        x = F.max_pool2d(F.relu(self.conv(x)), 2).view(-1, self.features)
        if self.training:
            x = x + 1
        elif self.flag:
            x = x * self.scale
        self.log.append(x.detach())
        x = F.dropout(F.relu(self.fc(x)), self.p, self.training)
        if not self.flag or self.mode == "b":
            x = x.sin()
        if double:
            x = x * 2
        return x + shift


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


# --- what else may call or change a layer ----------------------------------------------------------------------------


class Remembers(nn.Module):
    """A side effect that its parent can read: an auxiliary loss, a cache, a state."""

    def __init__(self):
        super().__init__()
        self.last, self.flag = None, False

    def forward(self, x):
        self.last, self.flag = x.sum(), not self.flag
        return x


def _none_until_the_child_ran(self, x):
    x = self.child(pool_of_relu(self.conv(x)))
    return x if self.child.last is None else x + self.child.last


def _returns_what_the_child_left(self, x):
    return self.child(pool_of_relu(self.conv(x))), self.child.last


def _branches_on_what_the_child_left(self, x):
    x = self.child(pool_of_relu(self.conv(x)))
    return x * 3 if self.child.flag else x


def _calls_the_child_until_it_is_done(self, x):
    x = pool_of_relu(self.conv(x))
    while not self.child.flag:
        x = self.child(x)
    return x


@pytest.mark.parametrize(
    "forward",
    [
        _none_until_the_child_ran,
        _returns_what_the_child_left,
        _branches_on_what_the_child_left,
        _calls_the_child_until_it_is_done,
    ],
    ids=lambda f: f.__name__,
)
def test_an_attribute_that_a_child_changes(forward):
    model = module_like(Conv, forward, child=Remembers()).double()
    fused = fuse(model)
    assert fused_layers(fused) == []
    assert "child" in fused.fusion_report[0].reason
    x = torch.randn(IMAGES, dtype=torch.float64)
    for _ in range(3):
        for ours, stock in zip(flat(fused(x)), flat(model(x)), strict=True):
            torch.testing.assert_close(ours, stock)


class HookSetsAttribute(Conv):
    def __init__(self):
        super().__init__()
        self.tail, self.captured = nn.Tanh(), None
        self.tail.register_forward_hook(self.capture)

    def capture(self, module, inputs, output):
        self.captured = output

    def forward(self, x):
        x = self.tail(pool_of_relu(self.conv(x)))
        return x if self.captured is None else x + self.captured


def test_an_attribute_that_a_hook_of_a_child_changes():
    model = HookSetsAttribute().double()
    fused = fuse(model)
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    assert "may change captured" in fused.fusion_report[0].reason


def _branches_on_a_list(self, x):
    x = pool_of_relu(self.conv(x))
    self.log.append(1)
    return x * 3 if self.log else x


def test_a_branch_on_an_attribute_that_can_change_in_place():
    model = module_like(Conv, _branches_on_a_list, log=[]).double()
    fused = fuse(model)
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    assert "branches on" in fused.fusion_report[0].reason


def _counts_up_to_an_attribute(self, x):
    x, i = pool_of_relu(self.conv(x)), 0
    while i < self.steps:
        x, i = x * 2, i + 1
    return x


def _loops_until_an_attribute_is_set(self, x):
    x = pool_of_relu(self.conv(x))
    while True:
        x = x * 2
        if self.steps:
            return x


@pytest.mark.parametrize("forward", [_counts_up_to_an_attribute, _loops_until_an_attribute_is_set])
def test_a_loop_without_an_end_in_one_of_its_branches(forward):
    model = module_like(Conv, forward, steps=2)
    assert "branches" in reason(model, "conv")


class Holder:
    def __init__(self, module):
        self.module = module

    def run(self, x):
        return self.module(x)


HELD = {
    "list": (lambda conv: [conv], lambda self, x: self.held[0](x)),
    "dict": (lambda conv: {"a": (conv,)}, lambda self, x: self.held["a"][0](x)),
    "object": (Holder, lambda self, x: self.held.run(x)),
    "partial": (functools.partial, lambda self, x: self.held(x)),
    "closure": (lambda conv: lambda x: conv(x), lambda self, x: self.held(x)),
}


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_that_an_attribute_holds_as_well(kind, nested):
    """In place, because a copy leaves closures behind."""
    hold, call = HELD[kind]

    def forward(self, x):
        return self.tail(self.conv(x)).sum() + call(self, x).sum()

    model = module_like(Conv, forward, tail=nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))).double()
    if nested:
        model.conv = nn.Sequential(model.conv)
    model.held = hold(model.conv[0] if nested else model.conv)
    x = torch.randn(IMAGES, dtype=torch.float64)
    expected = model(x)
    fuse(model, inplace=True)
    assert "held by the attribute held" in model.fusion_report[0].reason
    torch.testing.assert_close(model(x), expected)


class Methods(nn.Module):
    """Methods beside `forward` that would notice."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))
        self.initialize()

    def forward(self, x):
        return self.features(x)

    def initialize(self):
        """Called by ``__init__`` only, like many a method that goes through the layers."""
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.zeros_(layer.bias)


class Harmless(Methods):
    def freeze(self):
        for parameter in self.features.parameters():
            parameter.requires_grad_(False)
        return self.features.training

    def logits(self, x):
        return self.features(x) * 2


class IndexesInAMethod(Methods):
    def first(self, x):
        return self.features[0](x)


class LoopsInAMethod(Methods):
    def taps(self, x):
        return [x := layer(x) for layer in self.features]


class SharesByAProperty(Methods):
    @property
    def stem(self):
        return self.features


class Trunk(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        return self


class Backbone(nn.Sequential):
    def taps(self, x):
        return [x := layer(x) for layer in self]


class Reaches(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = module_like(Conv, lambda self, x: pool_of_relu(self.conv(x)))

    def forward(self, x):
        return self.block(x)

    def raw(self, x):
        return self.block.conv(x)


def test_methods_that_do_not_notice():
    fused = check(Harmless(), ["features.0"])
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fused.logits(x), 2 * fused(x))
    check(Trunk(conv(), nn.ReLU(), nn.MaxPool2d(2)), ["0"])


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (IndexesInAMethod, "IndexesInAMethod.first"),
        (LoopsInAMethod, "LoopsInAMethod.taps"),
        (SharesByAProperty, "SharesByAProperty.stem"),
        (lambda: Backbone(conv(), nn.ReLU(), nn.MaxPool2d(2)), "Backbone.taps"),
        (Reaches, "Reaches.raw"),
    ],
)
def test_methods_that_would_notice(make, method):
    fused = check(make(), [])
    assert f"called by {method}" in fused.fusion_report[0].reason


def test_an_attribute_of_a_module_that_would_go():
    tail = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    model = module_like(Conv, lambda self, x: self.tail(self.conv(x)) * self.tail[1].kernel_size, tail=tail)
    assert "whose attributes are read" in reason(model, "conv")


def _not_set_yet():
    def forward(self, x):
        return pool_of_relu(self.conv(x)) if self.conv is not None else later

    if False:
        later = 1
    return forward


def _first_argument_is_not_self(this, self):
    return pool_of_relu(this.conv(self))


def test_a_variable_without_a_value_and_an_argument_called_self():
    assert "not set" in reason(module_like(Conv, _not_set_yet()), "conv")
    assert "argument named self" in reason(module_like(Conv, _first_argument_is_not_self), "conv")


def test_arguments_with_names_of_the_generated_code():
    def forward(model, input, /, branch_0=1, torch=2, *, last=3):
        return pool_of_relu(model.conv(input)) * branch_0 * torch * last

    check(module_like(Conv, forward), ["conv"])


class Packed(torch.Tensor):
    """A weight that only F.linear can use, like those of quantization libraries."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is F.linear:
            return super().__torch_function__(function, types, (arguments[0], arguments[1] * 2, arguments[2]), {})
        return super().__torch_function__(function, types, arguments, options or {})


def test_weights_of_another_class_than_parameter():
    model = nn.Sequential(nn.Linear(12, 5), nn.ReLU()).double()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Packed), requires_grad=False)
    x = torch.randn(2, 12, dtype=torch.float64)
    expected = model(x)
    fuse(model, inplace=True)  # torch cannot copy such a weight
    assert "its weight is a Packed" in model.fusion_report[0].reason
    assert torch.equal(model(x), expected)


# --- models that cannot be read --------------------------------------------------------------------------------------


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(100, 3)

    def forward(self, x):
        x = self.features(x)
        if x.sum() > 0:
            x = x * 2
        return F.relu(self.head(x.flatten(1)))


def test_inside_an_untraceable_model():
    fused = check(Untraceable(), ["features.0"])
    assert type(fused) is Untraceable
    assert "branches on a value" in fused.fusion_report[1].reason


class Taps(Untraceable):
    """A perceptual loss and the like: it walks through the Sequential by itself."""

    def forward(self, x):
        taps = []
        for layer in self.features:
            x = layer(x)
            if x.sum() > 0:
                taps.append(x)
        return taps


class Indexes(Untraceable):
    def forward(self, x):
        y = self.features[0](x)
        return self.features(x).sum() + (y if y.sum() > 0 else -y)


class Walks(Untraceable):
    def forward(self, x):
        for child in self.children():
            for layer in child.children() if isinstance(child, nn.Sequential) else [nn.Flatten()]:
                x = layer(x)
        return x


class Escapes(Untraceable):
    def forward(self, x):
        return first_layer(self, x) if x.sum() > 0 else -first_layer(self, x)


def first_layer(model, x):
    return model.features[0](x)


@pytest.mark.parametrize("kind", [Taps, Indexes, Walks, Escapes])
def test_an_untraceable_model_that_reaches_into_its_children(kind):
    assert "maybe called by the model" in reason(kind(), "features.0")


class ReadWalk(Untraceable):
    def forward(self, x):
        for layer in self.features:
            x = layer(x)
        return x


def test_a_readable_model_that_reaches_into_its_children():
    """Each layer has two callers now: the model, and the Sequential, should anyone call that."""
    assert "more than once" in reason(ReadWalk(), "features.0")


def test_a_chain_does_not_end_in_an_untraceable_module():
    block = module_like(Conv, lambda self, x: F.relu(self.conv(x)))
    model = module_like(nn.Module, _data_dependent_pool, block=block)
    assert "no max-pool" in reason(model, "block.conv")


def _data_dependent_pool(self, x):
    x = self.block(x)
    return F.max_pool2d(x, 2) if x.sum() > 0 else x


def test_layers_inside_torchs_own_modules():
    model = nn.TransformerEncoderLayer(12, 2, 8, batch_first=True, dropout=0.0)
    check(nn.Sequential(model, nn.Linear(12, 4), nn.ReLU()), ["1"], torch.randn(2, 5, 12, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_are_no_python():
    traced = torch.jit.trace(nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(IMAGES))
    x = torch.randn(IMAGES)
    fused = fuse(traced)
    assert torch.equal(fused(x), traced(x))
    graph_module = torch.fx.symbolic_trace(module_like(Conv, CONV_FORWARDS["functional"]))
    fused = fuse(graph_module)
    torch.testing.assert_close(fused(x), graph_module(x))


# --- what survives ---------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = conv(), nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(100, 100), nn.Linear(100, 3)
        self.tied = nn.Linear(100, 100)
        self.tied.weight = self.fc1.weight
        self.register_buffer("mean", torch.ones(3, 1, 1))
        self.classes = ("a", "b", "c")

    def forward(self, x):
        x = self.pool(F.relu(self.conv(x - self.mean))).flatten(1)
        x = F.relu(self.tied(F.relu(self.fc1(x))))
        return self.fc2(x * 2 if self.training else x)

    def name_of(self, x):
        return [self.classes[i] for i in self(x).argmax(1)]


def test_methods_attributes_buffers_ties():
    model = Whole()
    fused = check(model, ["conv", "fc1", "tied"])
    assert fused.classes == model.classes
    x = torch.randn(IMAGES, dtype=torch.float64)
    assert fused.name_of(x) == model.name_of(x)
    assert fused.tied.weight is fused.fc1.weight
    assert fused.tied.weight is not model.tied.weight
    assert [n for n, _ in fused.named_buffers()] == ["mean"]
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in model.named_modules()]


def test_inplace_keeps_every_object():
    model = Whole().double()
    twin = copy.deepcopy(model)
    modules, parameters, buffers = list(model.modules()), list(model.parameters()), list(model.buffers())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert fuse(model, inplace=True) is model
    assert fused_layers(model) == ["conv", "fc1", "tied"]
    for before, after in ((modules, model.modules()), (parameters, model.parameters()), (buffers, model.buffers())):
        assert all(a is b for a, b in zip(before, after, strict=True))
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(IMAGES, dtype=torch.float64)
        assert_same(model, twin, x)
        optimizer.step()
        twin_optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_original_is_untouched():
    model = Whole()
    before = pickle.dumps(model)
    fused = fuse(model)
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(1)
    assert pickle.dumps(model) == before
    assert not hasattr(model, "fusion_report")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_mode_dtype_and_device(device, dtype, training):
    model = Whole().to(device, dtype).train(training)
    model.fc2.eval()
    fused = fuse(model)
    assert [m.training for m in fused.modules()] == [m.training for m in model.modules()]
    for a, b in zip(fused.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.device) == (b.dtype, b.device)
    assert fused(torch.randn(IMAGES, dtype=dtype, device=device)).dtype == dtype


def test_meta_device():
    with torch.device("meta"):
        fused = fuse(Whole())
    assert fused_layers(fused) == ["conv", "fc1", "tied"]
    assert fused(torch.randn(IMAGES, device="meta")).shape == (2, 3)


def test_state_dicts_go_both_ways():
    model, fused = Whole(), fuse(Whole())
    fused.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(fused(x := torch.randn(IMAGES)), model(x))
    model.load_state_dict(fused.state_dict(), strict=True)
    fused.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    torch.testing.assert_close(fused(x), model(x))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), _saved],
    ids=["deep", "copy", "pickle", "save"],
)
def test_copies_and_pickles(copied):
    model = Switches().double()
    fused = fuse(model)
    again = copied(fused)
    assert isinstance(again, Switches)
    assert again.fusion_report == fused.fusion_report
    assert fused_layers(again) == ["conv", "fc"]
    x = torch.randn(IMAGES, dtype=torch.float64)
    for training in (True, False):
        assert_same(again.train(training), model.train(training), x)
    again = copied(again)
    assert_same(again, model, x)
    again.flag = model.flag = False
    assert_same(again, model, x)


def test_fusing_again_changes_nothing():
    for model in (
        Whole(),
        nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)),
        lenet_ext.Net(),
        lenet_ext.ReferenceNet(),
    ):
        once = fuse(model)
        twice = fuse(once)
        assert twice.fusion_report == once.fusion_report
        assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
        fused_layers(twice)


def test_several_threads():
    model = Switches().double().eval()
    fused = fuse(model)
    x = torch.randn(IMAGES, dtype=torch.float64)
    expected, results = model(x), []
    threads = [threading.Thread(target=lambda: results.append(fused(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("training", [True, False])
def test_compile_and_export(training):
    """A rewritten ``forward`` is plain Python, which both of them read."""
    fused = fuse(Whole().double().train(training))
    x = torch.randn(IMAGES, dtype=torch.float64)
    expected = flat(fused(x))
    torch.testing.assert_close(flat(torch.compile(fused, fullgraph=True, backend="aot_eager")(x)), expected)
    program = torch.export.export(fused, (x,))
    assert any("lenet_ext" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(flat(program.module()(x)), expected)


def test_functional_call_and_vmap():
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3), nn.ReLU()).double()
    fused = fuse(model)
    x = torch.randn(IMAGES, dtype=torch.float64)

    def per_sample(net):
        def loss(parameters, image):
            return torch.func.functional_call(net, parameters, (image[None],)).sin().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(net.named_parameters()), x)

    ours, stock = per_sample(fused), per_sample(model)
    assert ours.keys() == stock.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-10, atol=1e-10)


def test_compile_and_export():
    model = Whole()
    fused = fuse(model)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        for m in (fused, model):
            m.train(training)
        for batch in (2, 3):
            x = torch.randn(batch, *IMAGES[1:])
            torch.testing.assert_close(compiled(x), model(x))
    exported = torch.export.export(fused, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


# --- ties, NaN, infinities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool_first", [False, True])
def test_ties_zeros_nan_and_infinities(pool_first):
    """Small integers, so that ties and exact zeros abound. Both orders have the same values and gradients."""
    tail = [nn.MaxPool2d(3, 2, 1), nn.ReLU()] if pool_first else [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), *tail).double()
    with torch.no_grad():
        model[0].weight.fill_(1)
    x = torch.randint(-2, 2, (4, 1, 9, 9)).double()
    check(model, ["0"], x)
    x[0, 0, 1, 1] = float("nan")
    x[1, 0, 4, 4] = float("inf")
    x[2] = -float("inf")
    check(model, ["0"], x)


# --- arguments, report -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, torch.zeros(1), nn.ReLU, lambda x: x, [nn.Linear(1, 1)]], ids=repr)
def test_only_modules(model):
    with pytest.raises(TypeError, match=r"fuse: model must be an nn\.Module, got "):
        fuse(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ReLU(), nn.ModuleList([conv()]), nn.Module(), nn.Sequential()])
def test_models_with_nothing_to_fuse(model):
    assert fused_layers(fuse(model)) == []


def test_the_name_is_the_function():
    import lenet_ext.fuse  # the module has the same name

    assert callable(lenet_ext.fuse)
    assert "fuse" in lenet_ext.__all__


def test_report():
    model = nn.Sequential(Whole(), nn.Linear(3, 3), nn.Tanh())
    fused = fuse(model)
    assert isinstance(fused.fusion_report, tuple)
    assert [(r.path, r.what, r.fused, r.reason) for r in fused.fusion_report] == [
        ("0.conv", "Conv2d + ReLU + MaxPool2d", True, ""),
        ("0.fc1", "Linear + ReLU", True, ""),
        ("0.fc2", "Linear", False, "0 has branches"),
        ("0.tied", "Linear + ReLU", True, ""),
        ("1", "Linear", False, "followed by Tanh (2)"),
    ]
    with pytest.raises(AttributeError):
        fused.fusion_report[0].path = "x"
    assert not any("report" in key for key in fused.state_dict())


def test_verbose_prints_the_report(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    fuse(Whole())
    assert capsys.readouterr().out == ""
    fuse(Whole(), verbose=True)
    printed = capsys.readouterr().out
    for text in ("lenet_ext.fuse: Whole", "conv", "Conv2d + ReLU + MaxPool2d", "yes", "no", "its output is"):
        assert text in printed


# --- batch normalisation ---------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.conv, self.bn, self.pool = conv(bias=bias), nn.BatchNorm2d(4), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(F.relu(self.bn(self.conv(x))))


def _trained(model):
    """With statistics and affine parameters that are not those of an untrained one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.double().eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["forward", "sequential"])
def test_folded_batch_norm(kind, bias, affine):
    if kind == "forward":
        model = Normalised(bias)
        model.bn = nn.BatchNorm2d(4, affine=affine)
    else:
        model = nn.Sequential(conv(bias=bias), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.MaxPool2d(2))
    model = _trained(model)
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model, fold_batch_norm=True)
    assert len(fused_layers(fused)) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert not any("running" in key for key in fused.state_dict())
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert fused_layers(fuse(model)) == [], "folded without being asked to"


def test_batch_norm_that_cannot_be_folded():
    shared = nn.BatchNorm2d(4)
    no_statistics = nn.BatchNorm2d(4, track_running_stats=False)
    hooked = nn.BatchNorm2d(4)
    hooked.register_forward_hook(lambda m, i, o: o + 1)
    for model in (
        nn.Sequential(conv(), shared, nn.Conv2d(4, 4, 1), shared),
        nn.Sequential(conv(), no_statistics, nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(conv(), hooked, nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2)),
    ):
        model = model.double().eval()
        fused = fuse(model, fold_batch_norm=True)
        assert list(fused.state_dict()) == list(model.state_dict())
        x = torch.randn(IMAGES, dtype=torch.float64)
        torch.testing.assert_close(fused(x), model(x))


READS = {
    "weight": lambda self, x: self.bn(self.conv(x)) * self.conv.weight.sum(),
    "statistics": lambda self, x: self.bn(self.conv(x)) + self.bn.running_mean.sum(),
    "bias": lambda self, x: self.bn(self.conv(x)) * (2 if self.conv.bias is None else 3),
}


@pytest.mark.parametrize("what", READS)
def test_batch_norm_is_not_folded_where_its_values_are_read(what):
    model = _trained(module_like(nn.Module, READS[what], conv=conv(bias=False), bn=nn.BatchNorm2d(4)))
    fused = fuse(model, fold_batch_norm=True)
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    assert list(fused.state_dict()) == list(model.state_dict())


def test_batch_norm_with_its_forward_replaced_is_not_folded():
    model = _trained(Normalised(True))
    model.bn.forward = lambda x: x * 3
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fuse(model, fold_batch_norm=True)(x), model(x))


def test_folding_needs_evaluation_mode():
    model = Normalised(True)
    with pytest.raises(RuntimeError, match=r"fold_batch_norm=True needs a model in evaluation mode.*model\.eval\(\)"):
        fuse(model, fold_batch_norm=True)
    model.eval()
    model.bn.train()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        fuse(model, fold_batch_norm=True, inplace=True)
    assert isinstance(model.bn, nn.BatchNorm2d)
