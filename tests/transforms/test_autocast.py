"""Autocast: casts as stock conv2d and linear do, in both directions, and leaves everything else alone."""

from __future__ import annotations

import copy
import functools

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_equal, integers
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_leaves

from lenet_ext import Net, ReferenceNet, functional

NAMES = ["conv_relu_max_pool2d", "linear", "linear_relu"]
SHAPES = {
    "conv_relu_max_pool2d": [(2, 3, 9, 9), (4, 3, 3, 3), (4,)],
    "linear": [(5, 7), (3, 7), (3,)],
    "linear_relu": [(5, 7), (3, 7), (3,)],
}
LOW = {"cpu": [torch.bfloat16], "cuda": [torch.bfloat16, torch.float16]}
MIXTURES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64, torch.float64),
]


def _autocasts(device):
    return LOW[torch.device(device).type]


def _operands(name, dtypes, device):
    return [integers(*s, low=-1, high=1).to(device, dtype) for s, dtype in zip(SHAPES[name], dtypes, strict=True)]


@pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients(device, name, dtypes):
    """Dtype of the output as in stock; values and gradients exact for small integers; gradients in the operands'."""
    for low in _autocasts(device):
        results = []
        for module in (functional, reference):
            torch.manual_seed(0)
            tensors = [t.requires_grad_() for t in _operands(name, dtypes, device)]
            with torch.autocast(torch.device(device).type, dtype=low):
                output = getattr(module, name)(*tensors)
            output.sum().backward()
            results.append((output, [t.grad for t in tensors]))
        (ours, grads), (stock, stock_grads) = results
        assert_equal(ours, stock, "output")
        assert ours.dtype == (torch.float64 if dtypes[0] == torch.float64 else low)
        for gradient, expected, dtype in zip(grads, stock_grads, dtypes, strict=True):
            assert gradient.dtype == dtype
            assert_equal(gradient, expected, "gradient")


@pytest.mark.parametrize("name", NAMES)
def test_without_bias_and_without_gradients(device, name):
    for low in _autocasts(device):
        x, w, _ = _operands(name, [torch.float32] * 3, device)
        with torch.autocast(torch.device(device).type, dtype=low), torch.no_grad():
            assert_equal(getattr(functional, name)(x, w), getattr(reference, name)(x, w), "output")


@pytest.mark.parametrize("name", NAMES)
def test_disabled_region(device, name):
    """autocast(enabled=False) inside of autocast: float32 stays float32, and a mixture is an error again."""
    kind = torch.device(device).type
    x, w, b = _operands(name, [torch.float32] * 3, device)
    with torch.autocast(kind, dtype=LOW[kind][0]), torch.autocast(kind, enabled=False):
        assert getattr(functional, name)(x, w, b).dtype == torch.float32
        with pytest.raises(RuntimeError, match="weight"):
            getattr(functional, name)(x.to(LOW[kind][0]), w, b)


@pytest.mark.parametrize("name", NAMES)
def test_mixture_outside_of_autocast_names_both_dtypes(device, name):
    x, w, b = _operands(name, [torch.bfloat16, torch.float32, torch.float32], device)
    with pytest.raises(RuntimeError, match=r"(?i)bfloat16") as info:
        getattr(functional, name)(x, w, b)
    assert "Float" in str(info.value) or "float32" in str(info.value)


@pytest.mark.parametrize("name", NAMES)
def test_bad_calls_are_errors_under_autocast(name):
    x, w, b = _operands(name, [torch.float32] * 3, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="input"):
            getattr(functional, name)(None, w, b)
        with pytest.raises(RuntimeError):
            getattr(functional, name)(x[..., :1], w, b)


def test_net_trains(device):
    """Mixed-precision training: losses as stock's within bfloat16, float32 gradients, a falling loss."""
    kind = torch.device(device).type
    torch.manual_seed(0)
    stock = ReferenceNet().to(device)
    ours = Net().to(device)
    ours.load_state_dict(stock.state_dict())
    x, target = torch.randn(16, 1, 32, 32, device=device), torch.randint(10, (16,), device=device)
    losses = []
    for net in (ours, stock):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        curve = []
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast(kind, dtype=torch.bfloat16):
                logits = net(x)
                loss = F.cross_entropy(logits, target)
            assert logits.dtype == torch.bfloat16
            loss.backward()
            assert all(p.grad.dtype == torch.float32 for p in net.parameters())
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0][-1] < losses[0][0]
    # Both round to bfloat16 (2**-8) at every layer, ours once where stock does it three times.
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=0.02)


def test_gradients_in_autocast_are_near_float32(device):
    kind = torch.device(device).type
    torch.manual_seed(0)
    net = Net().to(device)
    exact = copy.deepcopy(net)
    x, target = torch.randn(64, 1, 32, 32, device=device), torch.randint(10, (64,), device=device)
    with torch.autocast(kind, dtype=torch.bfloat16):
        F.cross_entropy(net(x), target).backward()
    F.cross_entropy(exact(x), target).backward()
    for (name, p), q in zip(net.named_parameters(), exact.named_parameters(), strict=True):
        assert torch.nn.functional.cosine_similarity(p.grad.flatten(), q[1].grad.flatten(), dim=0) > 0.99, name


def test_grad_scaler():
    """The scaler's unscale and overflow check see ordinary float32 gradients."""
    net = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = net.fc3.bias.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(torch.randn(4, 1, 32, 32)).float().pow(2).mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, net.fc3.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "float32"])
def test_grad_scaler_skips_the_step_after_an_overflow(device, dtype):
    net = Net(device=device)
    kind = torch.device(device).type
    kind = kind if kind == "cuda" else "cpu"
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**120)  # 2^120 times such a gradient is infinite
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
        loss = net(torch.ones(4, 1, 32, 32, device=device)).float().pow(2).sum() * 2.0**20
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not all(p.grad.isfinite().all() for p in net.parameters())
    for p, b in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, b)
    assert scaler.get_scale() == 2.0**119


def test_second_derivative_under_autocast():
    results = []
    for module in (functional, reference):
        torch.manual_seed(0)
        x, w, b = (t.requires_grad_() for t in _operands("conv_relu_max_pool2d", [torch.float32] * 3, "cpu"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = module.conv_relu_max_pool2d(x, w, b)
        (gradient,) = torch.autograd.grad(output.float().pow(2).sum(), x, create_graph=True)
        gradient.sum().backward()
        results.append((x.grad, w.grad))
    for a, b in zip(*results, strict=True):
        # Sums of up to about 100 products of values up to 30, rounded to bfloat16 at different places.
        torch.testing.assert_close(a, b, rtol=0.03, atol=2.0)
    assert results[1][0].abs().max() > 20


def _assert_as_stock(actual, expected):
    """Small integers: exact in bfloat16, but for the sums of gradients, which stock rounds once more or less."""
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert e.any()
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=2**-7, atol=2**-7 * float(e.abs().max()))


@pytest.mark.parametrize("outside", [False, True], ids=["autocast inside", "autocast outside"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled(device, name, outside):
    torch._dynamo.reset()
    kind = torch.device(device).type
    lower = functools.partial(torch.autocast, kind, dtype=torch.bfloat16)
    results = []
    for module in (functional, reference):

        def function(*tensors, module=module):
            with lower(enabled=not outside or module is reference):
                return getattr(module, name)(*tensors)

        if module is functional:
            function = getattr(module, name) if outside else function
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)
        tensors = [t.requires_grad_() for t in _operands(name, [torch.float32] * 3, device)]
        with lower(enabled=outside):
            output = function(*tensors)
        output.float().pow(2).sum().backward()
        assert output.dtype == torch.bfloat16
        results.append([output.detach(), *(t.grad for t in tensors)])
    _assert_as_stock(*results)


def _gradients(function):
    return grad(lambda *t: function(*t).float().pow(2).sum(), argnums=(0, 1, 2))


OF_FUNCTIONS = {
    "vmap": lambda function: vmap(function, (0, None, None)),
    "vmap over weights": lambda function: vmap(lambda w, x, b: function(x, w, b), (0, 0, None)),
    "grad": _gradients,
    "vmap(grad)": lambda function: vmap(_gradients(function), (0, None, None)),
    "jvp": lambda function: lambda *t: jvp(function, t, tuple(x.flip(0) for x in t)),
}


@pytest.mark.parametrize("transform", OF_FUNCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_torch_func(device, name, transform):
    kind = torch.device(device).type
    x, w, b = _operands(name, [torch.float32] * 3, device)
    arguments = {
        "vmap": (torch.stack([x, -x]), w, b),
        "vmap over weights": (torch.stack([w, -w]), torch.stack([x, x]), b),
        "vmap(grad)": (torch.stack([x, -x]), w, b),
    }.get(transform, (x, w, b))
    results = []
    for module in (functional, reference):
        with torch.autocast(kind, dtype=torch.bfloat16):
            results.append(OF_FUNCTIONS[transform](getattr(module, name))(*arguments))
    if transform in ("vmap", "vmap over weights"):
        # Ours casts here as everywhere. Stock's is taken apart before autocast sees it, and on the CPU some of the
        # parts are not on autocast's list: float32 for the same values.
        assert results[0].dtype == torch.bfloat16
        results[1] = results[1].bfloat16()
    _assert_as_stock(*results)


def test_compiled_net_of_per_sample_gradients_under_autocast():
    """All of it together, for the network."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = ReferenceNet()
    ours = Net()
    ours.load_state_dict(stock.state_dict())
    images, targets = torch.randn(3, 1, 1, 32, 32), torch.randint(10, (3, 1))
    results = []
    for net in (ours, stock):
        values = {name: parameter.detach() for name, parameter in net.named_parameters()}

        def loss(values, image, target, net=net):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return F.cross_entropy(functional_call(net, values, (image,)).float(), target)

        per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
        if net is ours:
            per_sample = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
        results.append(per_sample(values, images, targets))
    for name, expected in results[1].items():
        actual = results[0][name]
        assert actual.dtype == torch.float32
        assert F.cosine_similarity(actual.flatten(1), expected.flatten(1)).min() > 0.99, name


def test_float16_on_the_cpu_goes_through_stock():
    x, w, b = _operands("conv_relu_max_pool2d", [torch.float32] * 3, "cpu")
    with torch.autocast("cpu", dtype=torch.float16):
        assert_equal(functional.conv_relu_max_pool2d(x, w, b), reference.conv_relu_max_pool2d(x, w, b), "output")


@pytest.mark.parametrize("dtypes", MIXTURES[1:3], ids=["input", "weight"])
@pytest.mark.parametrize(("low", "options"), [(torch.float16, {}), (torch.bfloat16, {"pool_kernel_size": 16})], ids=str)
def test_a_mixture_that_goes_through_stock(dtypes, low, options):
    """No kernel for the dtype, or for the window: conv2d casts, as it does in a second layer, behind a cast one."""
    tensors = [
        integers(2, 3, 20, 20, low=-1, high=1),
        *_operands("conv_relu_max_pool2d", [torch.float32] * 3, "cpu")[1:],
    ]
    tensors = [t.to(low if dtype == torch.bfloat16 else dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    with torch.autocast("cpu", dtype=low):
        output = functional.conv_relu_max_pool2d(*tensors, **options)
        assert output.dtype == low
        assert_equal(output, reference.conv_relu_max_pool2d(*tensors, **options), "output")
        with pytest.raises(RuntimeError, match="input must have 3 channels"):
            functional.conv_relu_max_pool2d(tensors[0][:, :2], *tensors[1:], **options)


def test_net_in_float16_on_the_cpu():
    ours, image = Net(), torch.randn(2, 1, 32, 32)
    stock = ReferenceNet()
    stock.load_state_dict(ours.state_dict())
    with torch.autocast("cpu", dtype=torch.float16):
        torch.testing.assert_close(ours(image), stock(image))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_average_pooling_is_not_cast(device, dtype):
    """As in stock."""
    kind = torch.device(device).type
    results = []
    for module in (functional, reference):
        torch.manual_seed(0)
        input = integers(2, 3, 8, 8, device=device, dtype=dtype).requires_grad_()
        with torch.autocast(kind, dtype=LOW[kind][0]):
            output = module.relu_avg_pool2d(input, 2)
        output.sum().backward()
        results.append((output, input.grad))
    for ours, stock in zip(*results, strict=True):
        assert_equal(ours, stock, "output or gradient")
