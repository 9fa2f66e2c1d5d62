"""`lenet_ext.fuse`: layers that somebody else calls, holds or changes are left as they are."""

from __future__ import annotations

import functools
import types

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from fusing import IMAGES, Conv, check, conv, flat, fused_layers, module_like, reason
from torch import nn

from lenet_ext import fuse

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
    x = self.child(F.max_pool2d(F.relu(self.conv(x)), 2))
    return x if self.child.last is None else x + self.child.last


def _returns_what_the_child_left(self, x):
    return self.child(F.max_pool2d(F.relu(self.conv(x)), 2)), self.child.last


def _branches_on_what_the_child_left(self, x):
    x = self.child(F.max_pool2d(F.relu(self.conv(x)), 2))
    return x * 3 if self.child.flag else x


def _calls_the_child_until_it_is_done(self, x):
    x = F.max_pool2d(F.relu(self.conv(x)), 2)
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
    assert fused_layers(fused) == ["conv"]
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
        x = self.tail(F.max_pool2d(F.relu(self.conv(x)), 2))
        return x if self.captured is None else x + self.captured


def test_an_attribute_that_a_hook_of_a_child_changes():
    model = HookSetsAttribute().double()
    fused = fuse(model)
    x = torch.randn(IMAGES, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(fused(x), model(x))


def _branches_on_a_list(self, x):
    x = F.max_pool2d(F.relu(self.conv(x)), 2)
    self.log.append(1)
    return x * 3 if self.log else x


def test_a_branch_on_an_attribute_that_can_change_in_place():
    model = module_like(Conv, _branches_on_a_list, log=[]).double()
    fused = fuse(model)
    x = torch.randn(IMAGES, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(fused(x), model(x))
    assert fused.log == [1, 1]


def _counts_up_to_an_attribute(self, x):
    x, i = F.max_pool2d(F.relu(self.conv(x)), 2), 0
    while i < self.steps:
        x, i = x * 2, i + 1
    return x


def _loops_until_an_attribute_is_set(self, x):
    x = F.max_pool2d(F.relu(self.conv(x)), 2)
    while True:
        x = x * 2
        if self.steps:
            return x


@pytest.mark.parametrize("forward", [_counts_up_to_an_attribute, _loops_until_an_attribute_is_set])
def test_a_loop_without_an_end_in_one_of_its_branches(forward):
    check(module_like(Conv, forward, steps=2), ["conv"])


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
        self.block = module_like(Conv, lambda self, x: F.max_pool2d(F.relu(self.conv(x)), 2))

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
    assert method in fused.fusion_report[0].reason


def test_an_attribute_of_a_module_that_would_go():
    tail = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    model = module_like(Conv, lambda self, x: self.tail(self.conv(x)) * self.tail[1].kernel_size, tail=tail)
    check(model, ["conv"])


def _not_set_yet():
    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2) if self.conv is not None else later

    if False:
        later = 1
    return forward


def _first_argument_is_not_self(this, self):
    return F.max_pool2d(F.relu(this.conv(self)), 2)


def test_a_variable_without_a_value_and_an_argument_called_self():
    check(module_like(Conv, _not_set_yet()), ["conv"])
    check(module_like(Conv, _first_argument_is_not_self), ["conv"])


def test_arguments_with_names_of_the_generated_code():
    def forward(model, input, /, branch_0=1, torch=2, *, last=3):
        return F.max_pool2d(F.relu(model.conv(input)), 2) * branch_0 * torch * last

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


class LambdaOfInit(Conv):
    def __init__(self):
        super().__init__()
        self.again = lambda x: self.conv(x)

    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2).sum() + self.again(x).sum()


class MethodOfTheObject(Conv):
    def __init__(self):
        super().__init__()
        self.again = types.MethodType(first_of_two, self)

    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2).sum() + self.again(x).sum()


def first_of_two(model, x):
    return model.conv(x)


class Evaluates(Conv):
    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2).sum() + eval("self.conv(x)").sum()


class OwnGetattr(Conv):
    def __getattr__(self, name):
        return super().__getattr__("conv" if name == "layer" else name)

    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2).sum() + self.layer(x).sum()


class ByName(Conv):
    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2).sum() + getattr(self, "co" + "nv")(x).sum()


class Private(nn.Module):
    def __init__(self):
        super().__init__()
        self.__features = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x):
        return self.__features(x).sum() + self.__features[0](x).sum()


class SwapsItsLayer(Conv):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        self.conv = self.conv
        return x


class Child(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.parent = [parent]

    def forward(self, x):
        return self.parent[0].conv(x)


class CallsBack(Conv):
    def __init__(self):
        super().__init__()
        self.child = Child(self)

    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2).sum() + self.child(x).sum()


class HelperOfAChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = WithAHelper()

    def forward(self, x):
        return self.child.run(x)


class WithAHelper(Conv):
    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)

    def run(self, x):
        return self(x).sum() + first_of_two(self, x).sum()


class DeepLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))])

    def forward(self, x):
        for block in self.blocks:
            x = block[0](x).sum() + block(x).sum()
        return x


class ReturnsOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))])

    def first(self):
        for block in self.blocks:
            return block
        return None

    def forward(self, x):
        return self.first()[0](x).sum() + self.blocks[0](x).sum()


class IndexesTwice(ReturnsOne):
    def forward(self, x):
        total = 0
        for i in range(len(self.blocks)):
            total = total + self.blocks[i](x).sum() + self.blocks[i][0](x).sum()
        return total


class NestedKeys(ReturnsOne):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"a": conv(), "b": nn.ReLU(), "c": nn.MaxPool2d(2)})])

    def forward(self, x):
        y = x
        for block in self.blocks:
            for key in block:
                y = block[key](y)
        return y.sum() + self.blocks[0]["a"](x).sum()


REACHING = [
    ReturnsOne,
    IndexesTwice,
    NestedKeys,
    LambdaOfInit,
    MethodOfTheObject,
    Evaluates,
    OwnGetattr,
    ByName,
    Private,
    SwapsItsLayer,
    CallsBack,
    HelperOfAChild,
    DeepLoop,
]


@pytest.mark.parametrize("kind", REACHING)
def test_other_ways_to_reach_a_layer(kind):
    """In place, because a copy leaves closures behind."""
    model = kind().double()
    x = torch.randn(IMAGES, dtype=torch.float64)
    expected = model(x)
    fuse(model, inplace=True)
    assert fused_layers(model) == []
    torch.testing.assert_close(model(x), expected)


class Stages(nn.Module):
    """Blocks in lists of lists, called by loops and indices."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList(linear_block() for _ in range(2)) for _ in range(2)])
        self.others = nn.ModuleList(linear_block() for _ in range(2))
        self.flat = nn.ModuleList([nn.Linear(12, 12), nn.ReLU()])

    def forward(self, x):
        for stage in self.stages:
            for block in stage:
                x = block(x)
        for i in range(2):
            x = x + self.others[i](x)
        for layer in self.flat:
            x = layer(x)
        return x


def linear_block():
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU())


def test_blocks_in_lists():
    paths = [f"stages.{i}.{j}.0" for i in range(2) for j in range(2)]
    check(Stages(), [*paths, "others.0.0", "others.1.0", "flat.0"])


class Trainer:
    def __init__(self, model):
        self.model = model


class Known(Conv):
    """The model is known to others, and goes through its own modules, without calling any of them by itself."""

    def __init__(self):
        super().__init__()
        self.trainer = Trainer(self)
        self.activation = self._activation
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(2)])
        self.norm = nn.BatchNorm2d(4)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.ones_(module.weight)

    def forward(self, x):
        x, outputs = F.max_pool2d(F.relu(self.conv(x)), 2), []
        for i, block in enumerate(self.blocks):
            x = block(x) + i
            outputs.append(x)
        return self.activation(self.norm(torch.cat([block(x) for block in self.blocks] + outputs, 2)))

    def _activation(self, x):
        return x.tanh()

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def save(self, path):
        torch.save(self, path)

    def count(self):
        return sum(p.numel() for name, m in self.blocks.named_children() for p in m.parameters())


def test_ways_that_do_not_matter():
    fused = check(Known(), ["conv", "blocks.0.0", "blocks.1.0"])
    assert fused.count() == 60
    assert not fused.train().norm.training


# --- models that reach into their children ----------------------------------------------------------------------------


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
    check(Untraceable(), ["features.0", "head"])


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
    reason(kind(), "features.0")


class Walks1By1(Untraceable):
    def forward(self, x):
        for layer in self.features:
            x = layer(x)
        return x


def test_a_model_that_calls_the_members_of_a_sequential_one_by_one():
    check(Walks1By1(), ["features.0"])


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
    graph_module = torch.fx.symbolic_trace(module_like(Conv, lambda self, x: F.max_pool2d(F.relu(self.conv(x)), 2)))
    fused = fuse(graph_module)
    torch.testing.assert_close(fused(x), graph_module(x))
