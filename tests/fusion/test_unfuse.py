"""`lenet_ext.unfuse` gives the stock layers back, for tools that go by the class of a module or hook it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from fusing import FUSED, IMAGES, Conv, Switches, assert_same, conv, fused_layers, module_like, run
from torch import nn

import lenet_ext
from lenet_ext import fuse, unfuse


class Functional(Conv):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return x * 2 if self.training else x


class Modules(nn.Module):
    """One ReLU for all, one module that is tied to another, a nested Sequential that a chain crosses."""

    def __init__(self):
        super().__init__()
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.conv = conv()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Identity())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), self.relu, nn.Dropout(0.1), nn.Linear(16, 16))
        self.head[4].weight = self.head[1].weight
        self.mean = nn.Buffer(torch.ones(3, 1, 1))

    def forward(self, x):
        x = self.pool(self.relu(self.conv(x - self.mean)))
        x = self.block(x)
        x = self.relu(x)
        return self.relu(self.head(self.pool(x)))


MODELS = {
    "functional": Functional,
    "modules": Modules,
    "switches": Switches,
    "sequential": lambda: nn.Sequential(
        conv(), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True), conv_block()
    ),
    "nested": lambda: nn.Sequential(nn.Sequential(conv(), nn.ReLU()), nn.MaxPool2d(2), nn.Identity()),
    "shared": lambda: nn.Sequential(conv(), relu := nn.ReLU(), pool := nn.MaxPool2d(2), nn.Tanh(), pool, relu),
    "nothing": lambda: nn.Sequential(conv(), nn.Tanh()),
}


def conv_block():
    return nn.Sequential(nn.Conv2d(4, 2, 1), nn.MaxPool2d(2), nn.ReLU())


def assert_stock(model, original):
    """The very same modules, by name, class, options and ties, and bit for bit the same function."""
    for (name, ours), (expected_name, expected) in zip(
        model.named_modules(remove_duplicate=False), original.named_modules(remove_duplicate=False), strict=True
    ):
        assert name == expected_name
        assert type(ours) is type(expected)
        assert ours.training == expected.training
        assert ours.__dict__.keys() == expected.__dict__.keys()
    assert repr(model) == repr(original)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in original.named_modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert list(model.state_dict()) == list(original.state_dict())
    for ours, expected in zip(model.state_dict().values(), original.state_dict().values(), strict=True):
        assert torch.equal(ours, expected)
    x = torch.randn(IMAGES, dtype=torch.float64)
    for training in (True, False):
        pairs = zip(run(model.train(training), x), run(original.train(training), x), strict=True)
        for ours, expected in (pair for both in pairs for pair in zip(*both, strict=True)):
            assert (ours is None) == (expected is None)
            assert ours is None or torch.equal(ours, expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_inverse_of_fuse(name):
    model = MODELS[name]().double()
    fused = fuse(model)
    assert bool(fused_layers(fused)) == (name != "nothing")
    back = unfuse(fused)
    assert_stock(back, model)
    again = fuse(back)
    assert again.fusion_report == fused.fusion_report
    x = torch.randn(IMAGES, dtype=torch.float64)
    assert_same(again.train(), model.train(), x)
    assert_stock(unfuse(again), model)
    assert [type(m) for m in fused.modules()] == [type(m) for m in again.modules()], "unfuse changed the original"


@pytest.mark.parametrize("name", MODELS)
def test_in_place(name):
    original = MODELS[name]().double()
    model = copy.deepcopy(original)
    modules, parameters = list(model.modules()), list(model.parameters())
    assert unfuse(fuse(model, inplace=True), inplace=True) is model
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert_stock(model, original)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_fused_models(name, copied):
    model = MODELS[name]().double()
    assert_stock(unfuse(copied(fuse(model))), model)
    assert_stock(copied(unfuse(fuse(model))), model)


def test_a_model_that_went_on():
    """Training, modes, devices and dtypes reach all that comes back."""
    model = Modules()
    fused = fuse(model).double()
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    fused(torch.randn(IMAGES, dtype=torch.float64)).sum().backward()
    optimizer.step()
    fused.eval()
    fused.head.train()
    back = unfuse(fused)
    assert [m.training for m in back.modules()] == [m.training for m in fused.modules()]
    for ours, expected in zip(back.state_dict().values(), fused.state_dict().values(), strict=True):
        assert torch.equal(ours, expected)
    model.double().load_state_dict(fused.state_dict())
    assert_stock(back.train(), model.train())


def test_hooks_and_attributes_come_along():
    model = Functional().double()
    model.register_forward_hook(lambda m, i, o: o + 1)
    model.conv.weight.register_hook(lambda grad: grad * 2)
    model.conv.weight.no_decay = True
    fused = fuse(model)
    fused.conv.register_forward_hook(lambda m, i, o: None)
    back = unfuse(fused)
    assert back.conv.weight.no_decay
    assert len(back.conv._forward_hooks) == 1
    back.conv._forward_hooks.clear()
    fused.conv._forward_hooks.clear()
    assert_stock(back, model)


def test_a_part_of_a_fused_model():
    fused = fuse(Modules())
    assert [type(m) for m in unfuse(fused.head)] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert type(unfuse(fused.conv)) is nn.Conv2d
    stood_in = unfuse(fused.head[2])
    assert torch.equal(stood_in(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))


def test_a_parametrization_of_a_fused_layer():
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)).double()
    fused = fuse(model)
    for m in (fused, model):
        nn.utils.parametrizations.weight_norm(m[0])
    back = unfuse(fused)
    assert type(back[0]).__name__ == "ParametrizedConv2d"
    assert isinstance(back[0], nn.Conv2d)
    assert not isinstance(back[0], FUSED)
    x = torch.randn(IMAGES, dtype=torch.float64)
    assert torch.equal(back(x), model(x))
    nn.utils.parametrize.remove_parametrizations(back[0], "weight")
    assert type(back[0]) is nn.Conv2d


# --- Net, and layers that fuse did not make --------------------------------------------------------------------------


def test_net():
    net = lenet_ext.Net(2, 7)
    net.fc1.weight.no_decay = True
    net.eval().fc2.train()
    stock = unfuse(net)
    assert type(net) is lenet_ext.Net
    assert type(stock) is lenet_ext.ReferenceNet
    assert [type(m) for m in stock.children()] == [nn.Conv2d, nn.Conv2d, nn.Linear, nn.Linear, nn.Linear]
    assert [m.training for m in stock.modules()] == [m.training for m in net.modules()]
    assert stock.fc1.weight.no_decay
    reference = lenet_ext.ReferenceNet(2, 7)
    reference.load_state_dict(net.state_dict(), strict=True)
    x = torch.randn(3, 2, 32, 32)
    assert torch.equal(stock(x), reference(x))
    parameters = list(net.parameters())
    assert unfuse(net, inplace=True) is net
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert torch.equal(net(x), reference(x))
    assert sum(record.fused for record in fuse(net).fusion_report) == 4


def test_net_inside_a_model_and_with_another_last_layer():
    net = lenet_ext.Net()
    net.fc3 = nn.Linear(84, 3)
    model = nn.Sequential(nn.ZeroPad2d(2), net)
    x = torch.randn(2, 1, 28, 28)
    back = unfuse(model)
    assert type(back[1]) is lenet_ext.ReferenceNet
    torch.testing.assert_close(back(x), model(x))


class OwnNet(lenet_ext.Net):
    pass


@pytest.mark.parametrize(
    "make",
    [
        OwnNet,
        lambda: nn.Sequential(lenet_ext.nn.LinearReLU(4, 3), lenet_ext.nn.Linear(3, 2)),
        lambda: lenet_ext.nn.ConvReLUMaxPool2d(1, 2, 3),
    ],
    ids=["subclass", "sequential", "layer"],
)
def test_layers_that_fuse_did_not_make_stay_and_it_says_so(make):
    model = make()
    with pytest.warns(UserWarning, match=r"not made by lenet_ext\.fuse.*: .+ \((LinearReLU|ConvReLUMaxPool2d)\)"):
        back = unfuse(model)
    assert [isinstance(m, FUSED[:2]) for m in back.modules()] == [isinstance(m, FUSED[:2]) for m in model.modules()]
    assert not any(isinstance(m, lenet_ext.nn.Linear) for m in back.modules())


def test_a_net_with_another_pooling_stays():
    net = lenet_ext.Net()
    net.conv1.pool_stride, net.conv1.pool_padding = 3, 1
    with pytest.warns(UserWarning, match=r"conv1 \(ConvReLUMaxPool2d\), conv2 "):
        back = unfuse(net)
    assert type(back) is lenet_ext.Net
    x = torch.randn(2, 1, 32, 32)
    if back.conv1(x).shape == net.conv1(x).shape:
        assert torch.equal(back.conv1(x), net.conv1(x))


@pytest.mark.parametrize("model", [None, torch.zeros(1), nn.ReLU, [nn.Linear(1, 1)]], ids=repr)
def test_only_modules(model):
    with pytest.raises(TypeError, match=r"unfuse: model must be an nn\.Module, got "):
        unfuse(model)


# --- other tools -----------------------------------------------------------------------------------------------------

REGISTRATIONS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
]


@pytest.mark.parametrize("registration", REGISTRATIONS)
def test_hooks_that_would_see_other_values_are_refused(registration):
    """They would see the pooled value, or never be called. Those of all other modules are welcome."""
    fused = fuse(Modules())
    for path in ("relu", "pool", "block", "block.1", "head", "head.2"):
        module = fused.get_submodule(path)
        with pytest.raises(RuntimeError, match=r"\) takes no hook: .*lenet_ext\.unfuse\(model\)"):
            getattr(module, registration)(lambda *_: None)
    for path in ("", "conv", "head.1", "head.3"):
        getattr(fused.get_submodule(path), registration)(lambda *_: None).remove()
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with pytest.raises(RuntimeError, match="takes no hook"):
            getattr(copied.pool, registration)(lambda *_: None)
    for module in unfuse(fused).modules():
        getattr(module, registration)(lambda *_: None)


def guided(model, x):
    """GuidedBackprop, as tools do it: by a hook on every ReLU, found by its class."""
    for module in model.modules():
        if type(module) is nn.ReLU:
            module.register_full_backward_hook(lambda m, i, o: tuple(g.clamp(min=0) for g in i))
    x = x.clone().requires_grad_()
    model(x).sum().backward()
    return x.grad


def test_guided_backpropagation():
    model = nn.Sequential(
        conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 20), nn.ReLU(), nn.Linear(20, 1)
    ).double()
    fused, x = fuse(model), torch.randn(IMAGES, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"lenet_ext\.unfuse"):
        guided(copy.deepcopy(fused), x)
    assert torch.equal(guided(unfuse(fused), x), guided(model, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    quantize = torch.ao.quantization.quantize_dynamic
    expected = quantize(model, {nn.Linear}, dtype=torch.qint8)
    ours = quantize(unfuse(fuse(model)), {nn.Linear}, dtype=torch.qint8)
    assert [type(m) for m in ours.modules()] == [type(m) for m in expected.modules()]
    assert type(ours[0]) is not nn.Linear
    x = torch.randn(3, 8)
    assert torch.equal(ours(x), expected(x))


def test_pruning_by_class():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    back = unfuse(fuse(model))
    for m in (model, back):
        parameters = [(layer, "weight") for layer in m.modules() if type(layer) is nn.Linear]
        torch.nn.utils.prune.global_unstructured(parameters, torch.nn.utils.prune.L1Unstructured, amount=0.5)
    x = torch.randn(3, 8)
    assert len(parameters) == 3
    assert torch.equal(back(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_to_mkldnn():
    import torch.utils.mkldnn

    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    with pytest.raises(RuntimeError, match=r"to_mkldnn cannot convert LinearReLU.*lenet_ext\.unfuse"):
        torch.utils.mkldnn.to_mkldnn(fuse(model))
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.utils.mkldnn.to_mkldnn(unfuse(fuse(model)))(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_the_modules_that_stand_in():
    fused = fuse(nn.Sequential(nn.Linear(8, 6), relu := nn.ReLU(), nn.Linear(6, 2)), inplace=True)
    x = torch.randn(3, 6)
    assert torch.equal(torch.jit.script(fused[1:])(x), fused[2](x))
    part = nn.Sequential(fused[1], fused[2])
    torch.jit.script(part)
    assert unfuse(part, inplace=True)[0] is relu


class Adapter(nn.Module):
    """Low-rank adaptation: ReLU comes after the sum."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def test_low_rank_adapters():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    back = unfuse(fuse(model))
    for m in (model, back):
        torch.manual_seed(1)
        m[0] = Adapter(m[0])
    x = torch.randn(3, 8)
    assert torch.equal(back(x), model(x))
    torch.testing.assert_close(fuse(back)(x), model(x))


def test_the_remaining_calls_of_a_shared_module_still_work():
    model = module_like(Conv, lambda self, x: self.relu(self.pool(self.relu(self.conv(x))) - 1))
    model.relu, model.pool = nn.ReLU(), nn.MaxPool2d(2)
    fused = fuse(model)
    x = torch.randn(IMAGES)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused.pool(x), model.pool(x))
    assert type(fused.relu) is nn.ReLU
