"""Net against ReferenceNet: parameters, logits, gradients, training; and everything people do to a module."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from reference import LAYOUTS, assert_accurate, assert_equal, integers
from torch import nn

from lenet_ext import Net, ReferenceNet

NAMES = [f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc1", "fc2", "fc3") for kind in ("weight", "bias")]


def pair_of_nets(**arguments) -> tuple[Net, ReferenceNet]:
    """The fused and the stock net with the same values."""
    torch.manual_seed(1)
    stock = ReferenceNet(**arguments)
    ours = Net(**arguments)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours, stock


def integer_nets(batch: int, seed: int = 0, **arguments) -> tuple[Net, ReferenceNet, torch.Tensor]:
    """Weights of -1, 0, 1: all sums are integers below 2**24, exact in float32 in any order."""
    torch.manual_seed(seed)
    ours, stock = pair_of_nets(**arguments)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        value = integers(*a.shape, low=-1, high=1)
        value *= torch.rand(a.shape) < (0.2 if a.dim() == 2 else 1)  # thinner where layers are wide
        a.data.copy_(value)
        b.data.copy_(value)
    return ours, stock, integers(batch, arguments.get("in_channels", 1), 32, 32, low=-1, high=1)


def assert_same_pass(ours, stock, x, grad_output=None, grad_input=True):
    """Logits and all gradients equal, float64 stock as the yardstick."""
    exact = copy.deepcopy(stock).double()
    results = []
    for net in (ours, exact):
        net.zero_grad()
        parameter = next(net.parameters())
        leaf = x.detach().to(parameter.device, parameter.dtype).requires_grad_(grad_input)
        output = net(leaf)
        output.backward(torch.ones_like(output) if grad_output is None else grad_output.to(output.dtype))
        results.append((output, leaf.grad, {name: p.grad for name, p in net.named_parameters()}))
    (a, a_input, a_grads), (e, e_input, e_grads) = results
    assert e.numel() == 0 or e.abs().max() < 2**24, "not exact in float32: choose smaller weights"
    assert_equal(a, e.to(a.dtype), "logits")
    if grad_input:
        assert_equal(a_input, e_input.to(a.dtype), "grad of input")
    for name, grad in e_grads.items():
        assert grad.abs().max() < 2**24
        assert_equal(a_grads[name], grad.to(a.dtype), f"grad of {name}")


# --- parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"in_channels": 3, "num_classes": 7}, {"dtype": torch.float64}], ids=str)
def test_same_seed_same_parameters(arguments):
    torch.manual_seed(5)
    ours = Net(**arguments)
    after_ours = torch.rand(3)
    torch.manual_seed(5)
    stock = ReferenceNet(**arguments)
    assert torch.equal(after_ours, torch.rand(3)), "the random generator was left elsewhere"
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()] == NAMES
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert_equal(a, b, name)
        assert a.requires_grad
        assert a.stride() == b.stride()


def test_shapes_of_the_tutorial():
    shapes = [tuple(p.shape) for p in Net().parameters()]
    assert shapes == [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]


def test_state_dicts_go_both_ways():
    torch.manual_seed(3)
    ours, stock = Net(), ReferenceNet()
    x = torch.randn(2, 1, 32, 32)
    before = stock(x)
    ours.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), before, rtol=1e-5, atol=1e-6)
    other = Net()
    fresh = ReferenceNet()
    fresh.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x), other(x), rtol=1e-5, atol=1e-6)
    assert list(ours.state_dict()) == list(stock.state_dict()) == NAMES


def test_state_dict_is_strict():
    state = ReferenceNet().state_dict()
    state["conv1.extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"conv1\.extra"):
        Net().load_state_dict(state, strict=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    net = Net()
    x = torch.randn(2, 1, 32, 32)
    expected = net(x)  # before the copy: a copy of a used net has to work as well
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert_equal(other(x), expected, "logits")
    with torch.no_grad():
        other.conv1.weight.zero_()
    assert_equal(net(x), expected, "logits of the original")
    assert not torch.equal(other(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_conversion_to_and_from_stock(device, dtype, training):
    net = Net(3, 7, device=device, dtype=dtype).train(training)
    net.conv1.weight.requires_grad_(False)
    net.fc2.train(not training)
    before = torch.get_rng_state()
    stock = net.to_reference()
    again = Net.from_reference(stock)
    assert torch.equal(torch.get_rng_state(), before)
    assert (type(stock), type(again)) == (ReferenceNet, Net)
    for other in (stock, again):
        modes = {name: module.training for name, module in other.named_modules()}
        assert modes == {name: module.training for name, module in net.named_modules()}
        for (name, value), (other_name, copied) in zip(net.named_parameters(), other.named_parameters(), strict=True):
            assert name == other_name
            assert torch.equal(value, copied)
            assert (copied.dtype, copied.device.type) == (dtype, device)
            assert copied.requires_grad == value.requires_grad
            assert copied.data_ptr() != value.data_ptr()
    x = torch.randn(2, 3, 32, 32, device=device, dtype=dtype)
    assert torch.equal(again(x), net(x))
    torch.testing.assert_close(stock(x), net(x), rtol=1e-2, atol=1e-2)


def test_conversion_of_another_network_is_refused():
    with pytest.raises(TypeError, match=r"must be a ReferenceNet, got Linear; .* lenet_ext\.fuse"):
        Net.from_reference(nn.Linear(2, 2))


def test_conversion_of_a_changed_net_is_refused():
    net = Net()
    net.fc2 = nn.Linear(120, 84, bias=False)
    with pytest.raises(RuntimeError, match=r"fc2\.bias"):
        net.to_reference()


# --- values ------------------------------------------------------------------------------------------------------

BATCHES = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100]


@pytest.mark.kernels
@pytest.mark.parametrize("batch", BATCHES)
def test_exact_at_every_batch_size(batch):
    """Batch sizes around every block a kernel may cut a batch into, ties everywhere."""
    ours, stock, x = integer_nets(batch, seed=batch)
    assert_same_pass(ours, stock, x, integers(batch, 10, low=-1, high=1))
    with torch.inference_mode():
        assert_equal(ours(x), copy.deepcopy(stock).double()(x.double()).float(), "inference")


@pytest.mark.kernels
@pytest.mark.parametrize(
    "arguments", [{"in_channels": 3}, {"num_classes": 1}, {"num_classes": 100}, {"in_channels": 17}], ids=str
)
@pytest.mark.parametrize("batch", [1, 17, 40])
def test_other_sizes(arguments, batch):
    ours, stock, x = integer_nets(batch, **arguments)
    assert_same_pass(ours, stock, x, integers(batch, ours.fc3.out_features, low=-1, high=1))
    with torch.no_grad():
        assert_equal(ours(x), copy.deepcopy(stock).double()(x.double()).float(), "inference")


@pytest.mark.kernels
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch", [3, 33])
def test_layouts_of_the_input(layout, batch, channels):
    ours, stock, x = integer_nets(batch, in_channels=channels)
    x = x[:1].expand(batch, channels, 32, 32) if layout == "expanded" else LAYOUTS[layout](x)
    assert_same_pass(ours, stock, x, integers(1, 1).expand(batch, 10))
    with torch.no_grad():
        assert_equal(ours(x), copy.deepcopy(stock).double()(x.double()).float(), "inference")


def test_unbatched():
    ours, stock, x = integer_nets(1)
    assert_same_pass(ours, stock, x[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_random_values(device, dtype):
    ours, stock = pair_of_nets()
    ours.to(device, dtype)
    exact = copy.deepcopy(stock).to(dtype).double()
    x = torch.randn(33, 1, 32, 32).to(dtype)
    # Four layers deep, relative to logits of about 0.1 made of terms that cancel.
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(ours(x.to(device)).double().cpu(), exact(x.double()), rtol=0, atol=tolerance)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_random_gradients_are_as_accurate_as_stock(device, batch):
    ours, stock = pair_of_nets()
    exact = copy.deepcopy(stock).double()
    x, target = torch.randn(batch, 1, 32, 32), torch.randint(10, (batch,))
    grads = []
    for net, dtype, place in (
        (ours.to(device), torch.float32, device),
        (stock, torch.float32, "cpu"),
        (exact, torch.float64, "cpu"),
    ):
        F.cross_entropy(net(x.to(place, dtype)), target.to(place)).backward()
        grads.append([p.grad.cpu() for p in net.parameters()])
    for name, a, s, e in zip(NAMES, *grads, strict=True):
        # The sum of absolute terms is not known here; the largest gradient of the tensor stands for it, a lower bound.
        assert_accurate(a, e, e.abs().max().expand(e.shape), f"grad of {name}", stock=s)


@pytest.mark.kernels
@pytest.mark.parametrize("batch", [20, 44])
def test_non_finite_input(batch):
    """NaN and infinity take the way they take in stock, forward and backward, in whole and in single images."""
    for value in (float("nan"), float("inf"), -float("inf")):
        ours, stock, x = integer_nets(batch)
        x[[3, batch - 1], 0, 10, 10] = value
        exact = copy.deepcopy(stock).double()
        output, expected = ours(x), exact(x.double())
        assert_equal(output, expected.float(), "logits")
        with torch.no_grad():
            assert_equal(ours(x), expected.float(), "inference")
        grad = integers(batch, 10, low=-1, high=1)
        output.backward(grad)
        expected.backward(grad.double())
        for (name, a), b in zip(ours.named_parameters(), exact.parameters(), strict=True):
            assert_equal(a.grad, b.grad.float(), f"grad of {name}")


@pytest.mark.kernels
@pytest.mark.parametrize("value", [float("inf"), 1e30])
def test_a_bias_that_makes_all_equal(value):
    """The first of a window wins, although the sums without the bias are not equal."""
    ours, _, x = integer_nets(44)
    parameters = [p.detach() for p in ours.parameters()]
    parameters[1][2] = value
    _, pooled, indices, *_ = torch.ops.lenet_ext.lenet_with_activations(x, parameters)
    assert (pooled[:, 2] == value).all()
    assert (indices[:, 2] == 0).all()


def test_non_finite_gradient():
    ours, stock, x = integer_nets(3)
    exact = copy.deepcopy(stock).double()
    grad = integers(3, 10, low=-1, high=1)
    grad[1, 2] = float("inf")
    ours(x).backward(grad)
    exact(x.double()).backward(grad.double())
    for (name, a), b in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert_equal(a.grad, b.grad.float(), f"grad of {name}")


@pytest.mark.kernels
@pytest.mark.parametrize("arguments", [{}, {"in_channels": 3}], ids=str)
def test_gradients_that_overflow_on_their_way(arguments):
    """Finite where they enter the convolutions, infinite where they leave them: everything here is positive."""
    ours, stock = pair_of_nets(**arguments)
    with torch.no_grad():
        for net in (ours, stock):
            for parameter in net.parameters():
                parameter.fill_(0.5)
            net.fc1.weight.fill_(1e36)
    x = torch.rand(3, arguments.get("in_channels", 1), 32, 32) + 0.5
    for net in (ours, stock):
        net(x).mul(1e-2).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"grad of {name}: {m}")
    assert ours.conv1.bias.grad.isinf().all()
    assert ours.fc1.bias.grad.isfinite().all()


# --- training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    return (images - images.mean()) / images.std(), torch.tensor(labels)


def _train(net, images, labels, steps, optimizer):
    losses = []
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        batch = torch.randint(len(images), (32,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Rounding grows from step to step, and Adam divides by gradients that may be small: 1e-16 and 1e-7 become these.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)], ids=str)
def test_fifty_steps_on_real_digits(device, digits, dtype, tolerance):
    images, labels = digits[0].to(device, dtype), digits[1].to(device)
    ours, stock = pair_of_nets(dtype=dtype)
    ours.to(device), stock.to(device)
    curves = [_train(net, images, labels, 50, torch.optim.Adam(net.parameters(), lr=2e-3)) for net in (ours, stock)]
    assert sum(curves[1][-5:]) < 0.5 * sum(curves[1][:5]), "nothing was learned, nothing was compared"
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=tolerance, atol=tolerance)
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_train_and_eval_are_the_same():
    net = Net()
    x = torch.randn(4, 1, 32, 32)
    assert_equal(net.train()(x), net.eval()(x), "logits")


# --- what people do to modules: nothing of it may be lost in a faster path -----------------------------


def test_forward_hooks_run():
    net, x = Net(), torch.randn(2, 1, 32, 32)
    seen = []
    for name, child in net.named_children():
        child.register_forward_hook(lambda m, i, o, name=name: seen.append((name, tuple(o.shape))))
    net(x)
    assert seen == [
        ("conv1", (2, 6, 14, 14)),
        ("conv2", (2, 16, 5, 5)),
        ("fc1", (2, 120)),
        ("fc2", (2, 84)),
        ("fc3", (2, 10)),
    ]


def test_forward_hook_changes_the_output():
    net, x = Net(), torch.randn(2, 1, 32, 32)
    handle = net.fc1.register_forward_hook(lambda m, i, o: torch.zeros_like(o))
    zeroed = net(x)
    handle.remove()
    assert_equal(zeroed[0], zeroed[1], "logits without information")
    assert not torch.equal(net(x), zeroed)


@pytest.mark.parametrize("kind", ["pre", "full backward", "full backward pre", "global"])
def test_other_hooks_run(kind):
    net, x = Net(), torch.randn(2, 1, 32, 32)
    seen = []
    note = lambda *a: seen.append(kind)  # noqa: E731
    if kind == "pre":
        handle = net.fc2.register_forward_pre_hook(note)
    elif kind == "full backward":
        handle = net.fc2.register_full_backward_hook(note)
    elif kind == "full backward pre":
        handle = net.fc2.register_full_backward_pre_hook(note)
    else:
        handle = nn.modules.module.register_module_forward_hook(note)
    try:
        net(x).sum().backward()
    finally:
        handle.remove()
    assert len(seen) == (6 if kind == "global" else 1)
    net(x).sum().backward()
    assert len(seen) == (6 if kind == "global" else 1)


def test_tensor_hooks_run():
    net, x = Net(), torch.randn(2, 1, 32, 32)
    seen = []
    for name, p in net.named_parameters():
        p.register_hook(lambda g, name=name: seen.append(name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    net(x).sum().backward()
    assert sorted(seen) == sorted(NAMES * 2)


def test_frozen_layers():
    """Fine-tuning: no gradient where none is wanted, the right one elsewhere."""
    for frozen in (
        ["conv1"],
        ["conv1", "conv2", "fc1"],
        ["fc3"],
        ["conv2", "fc2"],
        ["conv1", "conv2", "fc1", "fc2", "fc3"],
    ):
        ours, stock, x = integer_nets(4)
        exact = copy.deepcopy(stock).double()
        for net in (ours, exact):
            for name in frozen:
                getattr(net, name).requires_grad_(False)
        a, b = ours(x), exact(x.double())
        assert a.requires_grad == b.requires_grad
        if not b.requires_grad:
            continue
        a.sum().backward()
        b.sum().backward()
        for (name, p), q in zip(ours.named_parameters(), exact.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                assert_equal(p.grad, q.grad.float(), name)


def test_gradient_of_the_input_alone():
    ours, stock, x = integer_nets(4)
    ours.requires_grad_(False)
    exact = copy.deepcopy(stock).double()
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    ours(a).sum().backward()
    exact(b).sum().backward()
    assert_equal(a.grad, b.grad.float(), "grad of input")
    assert all(p.grad is None for p in ours.parameters())


def test_gradients_accumulate():
    ours, stock, x = integer_nets(4)
    for _ in range(3):
        ours(x).sum().backward()
    once = copy.deepcopy(stock).double()
    once(x.double()).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), once.parameters(), strict=True):
        assert_equal(p.grad, 3 * q.grad.float(), name)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "fc3", nn.Linear(84, 3)),
        lambda net: setattr(net, "fc2", nn.Sequential(nn.Linear(120, 84), nn.Tanh())),
        lambda net: setattr(net, "conv1", nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.AvgPool2d(2))),
        lambda net: setattr(net.conv1, "forward", lambda x: torch.ones(len(x), 6, 14, 14)),
        lambda net: setattr(net.fc1, "bias", None),
        lambda net: setattr(net.fc3, "bias", None),
        lambda net: setattr(net.conv2, "bias", None),
        lambda net: setattr(net.conv1, "weight", nn.Parameter(torch.randn(6, 1, 5, 5))),
        lambda net: nn.utils.parametrizations.weight_norm(net.fc1).parametrizations.weight.original0.data.mul_(2),
        lambda net: nn.utils.prune.l1_unstructured(net.fc1, "weight", amount=0.5),
        lambda net: nn.utils.parametrizations.spectral_norm(net.conv2),
    ],
    ids=["fc3", "fc2", "conv1", "forward", "no fc1.bias", "no fc3.bias", "no conv2.bias", "parameter", "weight_norm",
         "prune", "spectral_norm"],
)  # fmt: skip
def test_changed_nets_do_what_their_layers_say(change):
    """The layers one after the other are the definition; whatever is faster has to notice that they were changed."""
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(20, 1, 32, 32)
    original = net(x)
    with torch.no_grad():
        net(x)
    change(net)
    expected = net.fc3(net.fc2(net.fc1(net.conv2(net.conv1(x)).flatten(1))))
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected.detach(), rtol=1e-5, atol=1e-6)
    assert expected.shape != original.shape or not torch.allclose(expected, original)


def test_changed_options_are_seen():
    net, x = Net(), torch.randn(20, 1, 32, 32)
    net(x)
    net.conv1.ceil_mode = True
    net.conv1.padding = (2, 2)
    net.conv1.stride = (1, 1)
    net.conv2.pool_kernel_size, net.conv2.pool_stride = 3, 2  # 16 -> 12 -> 5 instead of 14 -> 10 -> 5
    features = F.max_pool2d(F.relu(F.conv2d(x, net.conv1.weight, net.conv1.bias, padding=2)), 2)
    features = F.max_pool2d(F.relu(F.conv2d(features, net.conv2.weight, net.conv2.bias)), 3, 2)
    expected = net.fc3(net.fc2(net.fc1(features.flatten(1))))
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)


def test_subclass_with_its_own_forward():
    class Deeper(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(10, 2)

        def forward(self, x):
            return self.extra(super().forward(x))

    net = Deeper()
    assert net(torch.randn(3, 1, 32, 32)).shape == (3, 2)


def test_tied_parameters():
    """fc2's bias tied to nothing sensible, but tied: the gradient is the sum of both."""
    ours, stock, x = integer_nets(4)
    exact = copy.deepcopy(stock).double()
    for net in (ours, exact):
        net.conv2.bias = nn.Parameter(net.conv2.bias.data.clone())
        net.fc3.weight = nn.Parameter(net.fc2.weight.data[:10, :84].clone())
        net.conv1.bias = nn.Parameter(net.conv1.bias.data.clone())
        net.fc3.bias = nn.Parameter(net.conv1.bias.data.new_zeros(10))
        net.fc2.bias = nn.Parameter(net.fc2.bias.data.clone())
    for net in (ours, exact):
        shared = nn.Parameter(torch.ones(6, dtype=net.conv1.bias.dtype))
        net.conv1.bias = shared
        net.register_parameter("alias", shared)
        (net(x.to(shared.dtype)).sum() + net.alias.sum()).backward()
    assert_equal(ours.alias.grad, exact.alias.grad.float(), "grad")


@pytest.mark.parametrize("bad", [(4, 1, 28, 28), (4, 3, 32, 32), (1, 32), (2, 2, 1, 32, 32), (4, 1, 32, 31)], ids=str)
def test_input_of_a_wrong_size(bad):
    """28x28 is what everybody tries first: a RuntimeError, as in stock."""
    ours, stock = pair_of_nets()
    with pytest.raises(RuntimeError):
        stock(torch.randn(bad))
    with pytest.raises(RuntimeError) as info:
        ours(torch.randn(bad))
    assert str(info.value).strip()


def test_input_of_a_wrong_kind():
    ours, _ = pair_of_nets()
    for bad in (
        torch.randn(1, 1, 32, 32, dtype=torch.float64),
        torch.randn(1, 1, 32, 32, device="meta"),
        torch.zeros(1, 1, 32, 32).int(),
    ):
        with pytest.raises(RuntimeError):
            ours(bad)
    for bad in (None, [1.0], "x"):
        with pytest.raises((TypeError, AttributeError)):
            ours(bad)


def test_meta_device_and_deferred_initialisation():
    net = Net(device="meta")
    assert all(p.device.type == "meta" for p in net.parameters())
    assert net(torch.empty(7, 1, 32, 32, device="meta")).shape == (7, 10)
    with torch.device("meta"):
        other = Net()
    other = other.to_empty(device="cpu")
    torch.manual_seed(0)
    for child in other.children():
        child.reset_parameters()
    torch.manual_seed(0)
    assert_equal(other.fc3.bias, Net().fc3.bias, "bias")
    assert other(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    state = {k: v.clone() for k, v in Net().state_dict().items()}
    torch.manual_seed(0)
    skipped = torch.nn.utils.skip_init(Net, num_classes=3)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert_equal(drawn, torch.rand(1), "skip_init draws no numbers")
    skipped.load_state_dict(Net(num_classes=3).state_dict())
    assert skipped(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    assigned = Net(device="meta")
    assigned.load_state_dict(state, assign=True)
    assert assigned(torch.zeros(2, 1, 32, 32)).isfinite().all()


def test_moves_between_dtypes():
    net = Net()
    x = torch.randn(3, 1, 32, 32)
    first = net(x)
    assert net.double()(x.double()).dtype == torch.float64
    assert net.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert net.half()(x.half()).dtype == torch.float16
    assert first.dtype == torch.float32


def test_channels_last_net():
    ours, stock, x = integer_nets(20)
    ours.to(memory_format=torch.channels_last)
    assert_same_pass(ours, stock, x.contiguous(memory_format=torch.channels_last))


def test_second_derivative_of_the_net(device):
    """A gradient penalty: the derivative of a gradient, through all five layers."""
    ours, stock = pair_of_nets(dtype=torch.float64)
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    grads = []
    for net, place in ((ours.to(device), device), (stock, "cpu")):
        leaf = x.to(place, copy=True).requires_grad_()
        (grad,) = torch.autograd.grad(net(leaf).pow(2).sum(), leaf, create_graph=True)
        net.zero_grad()
        grad.pow(2).sum().backward()
        grads.append([leaf.grad.cpu(), *(p.grad.cpu() for p in net.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(grads[1])
    assert any(g.any() for g in grads[1])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-14)


def test_second_derivative_in_float32():
    """float32 is the dtype of the whole-network operator; the derivative of its gradient must be there as well."""
    ours, stock = pair_of_nets()
    x = torch.randn(5, 1, 32, 32)
    grads = []
    for net in (ours, stock):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(leaf).pow(2).sum(), leaf, create_graph=True)
        assert grad.requires_grad
        net.zero_grad()
        (grad * 10).pow(2).sum().backward()
        grads.append([leaf.grad, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(grads[1])
    assert all(g.abs().max() > 0 for g in grads[1][1:3])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_gradient_of_some_parameters_only():
    ours, stock, x = integer_nets(4)
    exact = copy.deepcopy(stock).double()
    for names in (("conv1.weight",), ("fc2.bias", "conv2.bias"), ("fc3.weight",)):
        a = torch.autograd.grad(ours(x).sum(), [ours.get_parameter(n) for n in names])
        b = torch.autograd.grad(exact(x.double()).sum(), [exact.get_parameter(n) for n in names])
        for name, p, q in zip(names, a, b, strict=True):
            assert_equal(p, q.float(), name)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_several_gradients_at_once(how, create_graph):
    """As for a Jacobian: by layers, whose operators have rules for vmap."""
    ours, stock, x = integer_nets(3)
    exact = copy.deepcopy(stock).double()
    several = integers(2, 3, 10, low=-1, high=1)
    results = []
    for net, dtype in ((ours, torch.float32), (exact, torch.float64)):
        image = x.to(dtype).requires_grad_()
        output, wanted = net(image), [image, *net.parameters()]

        def gradients(vectors, output=output, wanted=wanted, **options):
            return torch.autograd.grad(output, wanted, vectors, create_graph=create_graph, **options)

        if how == "vmap":
            results.append(torch.func.vmap(gradients)(several.to(dtype)))
        else:
            results.append(gradients(several.to(dtype), is_grads_batched=True))
    for name, p, q in zip(["image", *NAMES], *results, strict=True):
        assert_equal(p, q.float(), name)


def test_backward_twice():
    net = Net()
    loss = net(torch.randn(2, 1, 32, 32)).sum()
    loss.backward(retain_graph=True)
    first = net.conv1.weight.grad.clone()
    loss.backward()
    assert_equal(net.conv1.weight.grad, 2 * first, "grad")
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_parameters_changed_before_backward():
    """optimizer.step() between forward and backward: an error, not a wrong gradient."""
    net = Net()
    output = net(torch.randn(2, 1, 32, 32))
    with torch.no_grad():
        net.conv2.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", [f"{layer}.bias" for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")])
def test_a_bias_changed_before_backward(name):
    """No gradient depends on it, and stock does not keep it."""
    ours, stock, x = integer_nets(3)
    exact = copy.deepcopy(stock).double()
    for net, batch in ((ours, x), (exact, x.double())):
        output = net(batch)
        with torch.no_grad():
            net.get_parameter(name).add_(1)
        output.sum().backward()
    for (name, p), q in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert_equal(p.grad, q.grad.float(), name)


def test_a_bias_changed_before_a_backward_pass_that_is_differentiated():
    """There the layers are computed anew: an error, not a wrong gradient."""
    net = Net()
    output = net(torch.randn(2, 1, 32, 32))
    with torch.no_grad():
        net.fc1.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), net.fc1.weight, create_graph=True)


def test_output_changed_in_place():
    """Legal in stock (the last layer is linear), so legal here."""
    ours, stock, x = integer_nets(3)
    exact = copy.deepcopy(stock).double()
    for net, batch in ((ours, x), (exact, x.double())):
        net(batch).mul_(2).add_(1).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert_equal(p.grad, q.grad.float(), name)


def test_inputs_are_left_alone():
    net, x = Net(), torch.randn(33, 1, 32, 32)
    before, state = x.clone(), copy.deepcopy(net.state_dict())
    net(x).sum().backward()
    with torch.no_grad():
        net(x)
    assert_equal(x, before, "input")
    for name, value in net.state_dict().items():
        assert_equal(value, state[name], name)


def test_saved_tensor_hooks_and_checkpoint():
    from torch.utils.checkpoint import checkpoint

    ours, _, x = integer_nets(4)
    ours(x).sum().backward()
    expected = [p.grad.clone() for p in ours.parameters()]
    count = 0

    def pack(t):
        nonlocal count
        count += 1
        return t.clone()

    ours.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = ours(x)
    output.sum().backward()
    assert count > 0
    for name, p, e in zip(NAMES, ours.parameters(), expected, strict=True):
        assert_equal(p.grad, e, name)
    for again in (
        lambda: checkpoint(ours, x, use_reentrant=False),
        lambda: checkpoint(ours, x.clone().requires_grad_(), use_reentrant=True),
    ):
        ours.zero_grad()
        again().sum().backward()
        for name, p, e in zip(NAMES, ours.parameters(), expected, strict=True):
            assert_equal(p.grad, e, name)
    ours.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        output = ours(x)
    output.sum().backward()
    for name, p, e in zip(NAMES, ours.parameters(), expected, strict=True):
        assert_equal(p.grad, e, name)


def test_inference_mode_and_no_grad():
    net, x = Net(), torch.randn(3, 1, 32, 32)
    with torch.inference_mode():
        assert net(x).is_inference()
    with torch.no_grad():
        assert not net(x).requires_grad
    assert net(x).requires_grad


def test_repr_shows_the_layers():
    text = repr(Net())
    for name in ("conv1", "conv2", "fc1", "fc2", "fc3", "ConvReLUMaxPool2d", "LinearReLU", "Linear("):
        assert name in text


def test_logits_do_not_depend_on_the_neighbours():
    """An image gives the same logits alone and in a batch, to rounding: no state leaks between images."""
    net, x = Net().eval(), torch.randn(50, 1, 32, 32)
    with torch.no_grad():
        together = net(x)
        alone = torch.cat([net(image[None]) for image in x])
        poisoned = x.clone()
        poisoned[7] = float("nan")
        rest = net(poisoned)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    keep = [i for i in range(50) if i != 7]
    assert_equal(rest[keep], together[keep], "logits of the others")
    assert bool(rest[7].isnan().all())
