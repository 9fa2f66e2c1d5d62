"""`lenet_ext.fuse`: the chains that it swaps, what survives, and its report."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from fusing import (
    IMAGES,
    Conv,
    Linear,
    Switches,
    assert_same,
    check,
    conv,
    flat,
    fused_layers,
    module_like,
    reason,
)
from torch import nn

import lenet_ext
from lenet_ext import fuse
from lenet_ext.fusion import source

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


def test_a_forward_that_calls_a_sequential():
    block = nn.Sequential(conv(), nn.ReLU())
    check(module_like(nn.Module, lambda self, x: F.max_pool2d(self.block(x), 2), block=block), ["block.0"])
    tail = nn.Sequential(nn.ReLU(), nn.Sequential(nn.MaxPool2d(2)))
    check(module_like(Conv, lambda self, x: self.tail(self.conv(x)), tail=tail), ["conv"])
    check(module_like(Conv, lambda self, x: self.tail[0](self.conv(x)), tail=tail), [])


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


class InStatements(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.pool = conv(), nn.Conv2d(4, 5, 2), nn.MaxPool2d(2)
        self.fc1, self.fc2, self.relu = nn.Linear(20, 7), nn.Linear(7, 7), nn.ReLU()

    def forward(self, x):
        """Statements as people write them."""
        x = self.conv1(x)
        x = F.relu(x)
        x = self.pool(x)

        y = self.conv2(x)  # another name
        z = y.relu()
        x: torch.Tensor = self.pool(z)
        with torch.autocast("cpu", enabled=False):
            x = self.fc1(torch.flatten(x, 1))
            x = self.relu(x)
        x = self.fc2(x)
        return self.relu(x)


def test_statements():
    fused = check(InStatements(), ["conv1", "conv2", "fc1", "fc2"])
    text = inspect.getsource(type(fused).forward)
    assert text.count("self.conv1(x)") == 1
    assert "pool" not in text
    assert "relu" not in text


class InMethods(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = conv(), nn.Linear(100, 3)

    def forward(self, x):
        return self._head(self.features(x))

    def features(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)

    def _head(self, x, *, scale=2.0):
        x = self.fc(x.flatten(1))
        return F.relu(x) * scale


def test_chains_in_other_methods():
    model = InMethods()
    fused = check(model, ["conv", "fc"])
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fused.features(x), model.features(x))


class Base(Conv):
    scale = 3

    @property
    def factor(self):
        return self.scale

    def forward(self, x, /, *, shift=0.0):
        return F.max_pool2d(F.relu(self.conv(x)), 2) * self.factor + shift


class Inherits(Base):
    pass


class Replaces(Base):
    def forward(self, x):
        return super().train(self.training)._pooled(x)

    def _pooled(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)


class Extends(Base):
    def forward(self, x):
        return super().forward(x) + 1


def test_inherited_forwards():
    fused = check(Inherits(), ["conv"])
    torch.testing.assert_close(
        fused(x := torch.randn(IMAGES, dtype=torch.float64), shift=1.0) * 3 - 3, 4 * (fused(x) / 4 * 3)
    )
    assert "Extends.forward is decorated or replaced" in reason(Extends(), "conv")
    check(Replaces(), ["conv"])


class Private(Conv):
    def __init__(self):
        super().__init__()
        self.__hidden = 2

    def forward(self, x):
        factor = lambda: FACTOR * self.__hidden  # noqa: E731
        return F.max_pool2d(F.relu(self.conv(x)), 2) * factor()


FACTOR = 3


def test_private_names_closures_and_globals(monkeypatch):
    fused = check(Private(), ["conv"])
    x = torch.randn(IMAGES, dtype=torch.float64)
    before = fused(x)
    monkeypatch.setitem(globals(), "FACTOR", 6)
    torch.testing.assert_close(fused(x), before * 2)


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


class Counter:
    """A hook with a memory, which belongs to the model that it is registered in."""

    def __init__(self, model):
        self.model, self.calls = [model], 0

    def __call__(self, *_):
        self.calls += 1


def test_hooks_and_attributes_of_parameters():
    model = Whole().double()
    weight = model.fc1.weight  # tied
    weight.no_decay, model.conv.bias.groups = True, ["a"]
    model.mean.unit = "gray"
    weight.register_hook(lambda grad: grad * 3)
    weight.register_post_accumulate_grad_hook(counter := Counter(model))
    model.conv.bias.register_hook(lambda grad: grad + 1)
    model.conv.bias.requires_grad_(False)  # its hook waits until that changes
    fused = fuse(model)
    assert fused_layers(fused) == ["conv", "fc1", "tied"]
    assert fused.tied.weight is fused.fc1.weight
    assert fused.tied.weight.no_decay
    assert fused.conv.bias.groups == ["a"]
    assert fused.conv.bias.groups is not model.conv.bias.groups
    assert fused.mean.unit == "gray"
    copied = next(iter(fused.fc1.weight._post_accumulate_grad_hooks.values()))
    for m in (fused, model):
        m.conv.bias.requires_grad_(True)
    assert_same(fused, model, torch.randn(IMAGES, dtype=torch.float64))
    assert counter.calls == copied.calls == 1
    assert copied.model[0] is fused
    fused.fc1.weight.register_hook(lambda grad: grad * 2)
    assert len(model.fc1.weight._backward_hooks) == 1


def test_a_hook_of_a_copied_parameter_can_be_removed():
    model = nn.Sequential(nn.Linear(12, 5), nn.ReLU())
    model[0].weight.register_hook(lambda grad: grad * 0)
    fused = fuse(model)
    handle = fused[0].weight.register_hook(lambda grad: grad + 1)
    fused(torch.ones(1, 12)).sum().backward()
    assert (fused[0].weight.grad == 1).all()
    handle.remove()
    fused.zero_grad()
    fused(torch.ones(1, 12)).sum().backward()
    assert (fused[0].weight.grad == 0).all()
    assert model[0].weight.grad is None


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


def at_once(*functions):
    """What the functions return, each called in a thread of its own, when all are there."""
    barrier, results = threading.Barrier(len(functions)), {}

    def work(function):
        barrier.wait(60)
        results[function] = function()

    threads = [threading.Thread(target=work, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[function] for function in functions]


class SlowlyMade(type):
    """Long enough for another thread to begin one, too."""

    def __new__(cls, name, bases, names):
        time.sleep(0.2)
        return super().__new__(cls, name, bases, names)


def test_threads_that_fuse_at_once_make_one_class():
    class Model(Conv, metaclass=SlowlyMade):
        def forward(self, x):
            return F.max_pool2d(F.relu(self.conv(x)), 2)

    one, other = at_once(lambda: fuse(Model()), lambda: fuse(Model()))
    assert type(one) is type(other)
    assert type(one) is not Model
    for fused in (one, other):  # a copy asks for the class again
        assert type(copy.deepcopy(fused)) is type(one)


def test_threads_that_fuse_at_once_leave_the_filters_of_warnings(monkeypatch):
    def slowly(*arguments, simplefilter=warnings.simplefilter, **options):
        simplefilter(*arguments, **options)
        time.sleep(0.2)

    monkeypatch.setattr(warnings, "simplefilter", slowly)
    source.read_source.cache_clear()
    source._file.cache_clear()
    before = list(warnings.filters)
    # Begun one after the other, and ended in this order: each puts back what it found.
    at_once(lambda: fuse(Whole()), lambda: time.sleep(0.1) or fuse(lenet_ext.ReferenceNet()))
    assert warnings.filters == before


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


def test_relu_after_a_pooling_window_in_padding_is_zero():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.MaxPool2d(2, 1, 1, 2), nn.ReLU())
    nn.init.ones_(model[0].weight)
    assert fuse(model)(torch.ones(1, 1, 1, 1)).item() == 0


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (nn.MaxPool2d(2, 1, 1, 2), []),
        (nn.MaxPool2d((1, 2), 1, (0, 1), (1, 2)), []),
        (nn.MaxPool2d((2, 1), 1, (1, 0), (1, 2)), ["0"]),
        (nn.MaxPool2d(2, 1, 0, 2), ["0"]),
        (nn.MaxPool2d(3, 2, 1), ["0"]),
    ],
)
def test_a_pooling_window_that_lies_wholly_in_padding(pool, expected):
    """It gives -inf: the last value if the pooling comes after ReLU, 0 if ReLU comes after the pooling."""
    for tail in ([pool, nn.ReLU()], [nn.ReLU(), pool]):
        model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), *tail).double()
        with torch.no_grad():
            model[0].weight.fill_(1)
        layers = expected if tail[0] is pool else ["0"]
        for side in (1, 2, 5) if pool.padding else (5,):
            check(model, layers, torch.ones(1, 1, side, side, dtype=torch.float64))


# --- arguments, report -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, torch.zeros(1), nn.ReLU, lambda x: x, [nn.Linear(1, 1)]])
def test_only_modules(model):
    with pytest.raises(TypeError, match=r"fuse: model must be an nn\.Module, got "):
        fuse(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ReLU(), nn.ModuleList([conv()]), nn.Module(), nn.Sequential()])
def test_models_with_nothing_to_fuse(model):
    assert fused_layers(fuse(model)) == []


def test_the_name_is_the_function():
    import lenet_ext.fusion.fuse  # the module has the same name

    assert callable(lenet_ext.fuse)
    assert "fuse" in lenet_ext.__all__


def test_report():
    model = nn.Sequential(Whole(), nn.Linear(3, 3), nn.Tanh())
    fused = fuse(model)
    assert isinstance(fused.fusion_report, tuple)
    assert [(r.path, r.what, r.fused, r.reason) for r in fused.fusion_report] == [
        ("0.conv", "Conv2d + ReLU + MaxPool2d", True, ""),
        ("0.fc1", "Linear + ReLU", True, ""),
        ("0.fc2", "Linear", False, "its output is what Whole.forward returns"),
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


def test_the_printed_report_quotes_brackets(capsys, monkeypatch):
    """`[first]` is a style, and `[/]` the end of one, to whoever prints it as markup."""

    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)

        def forward(self, x, first=0):
            x = self.fc(x)[first]
            return {"[/x]": self.other(x)}["[/x]"]

    monkeypatch.setenv("COLUMNS", "160")
    fused = fuse(Indexed(), verbose=True)
    printed = capsys.readouterr().out
    assert "[first]" in fused.fusion_report[0].reason
    assert "[/x]" in fused.fusion_report[1].reason
    assert all(record.reason in printed for record in fused.fusion_report)
