"""torch.func: grad, vmap, per-sample gradients, jacrev, functional_call, and forward mode."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_equal, integers
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

from lenet_ext import Net, ReferenceNet, functional

NAMES = ["conv_relu_max_pool2d", "linear", "linear_relu"]
SHAPES = {
    "conv_relu_max_pool2d": [(2, 4, 9, 8), (6, 2, 3, 3), (6,)],
    "linear": [(5, 7), (3, 7), (3,)],
    "linear_relu": [(5, 7), (3, 7), (3,)],
}
OPTIONS = {"conv_relu_max_pool2d": {"groups": 2, "padding": "same", "pool_kernel_size": 3, "pool_stride": 2}}


def _functions(name):
    options = OPTIONS.get(name, {})
    return [lambda *t, module=module: getattr(module, name)(*t, **options) for module in (functional, reference)]


def _operands(name, device, batch=None):
    return [
        integers(*(() if batch is None else (batch,)), *s, dtype=torch.float64, device=device) for s in SHAPES[name]
    ]


def _assert_close(actual, expected):
    """Trees of tensors, exact: small integers in float64."""
    a, b = torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected)
    assert len(a) == len(b) > 0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert_equal(x, y, f"result {i}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("argnums", [0, 1, 2, (0, 1, 2)], ids=str)
def test_grad(device, name, argnums):
    operands = _operands(name, device)
    ours, stock = (grad(lambda *t, f=f: f(*t).pow(2).sum(), argnums=argnums)(*operands) for f in _functions(name))
    _assert_close(ours, stock)


@pytest.mark.parametrize("name", NAMES)
def test_grad_of_grad(device, name):
    operands = _operands(name, device)

    def twice(f):
        inner = grad(lambda *t: f(*t).pow(2).sum(), argnums=(0, 1))
        return grad(lambda *t: sum((g * g).sum() for g in inner(*t)), argnums=(0, 1, 2))(*operands)

    _assert_close(*map(twice, _functions(name)))


IN_DIMS = [d for d in itertools.product((None, 0), repeat=3) if any(v is not None for v in d)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_vmap(device, name, in_dims):
    """Any operand mapped or shared: a batch of inputs, an ensemble of weights, or both."""
    operands = [_operands(name, device, None if d is None else 3)[i] for i, d in enumerate(in_dims)]
    _assert_close(*(vmap(f, in_dims=in_dims)(*operands) for f in _functions(name)))


@pytest.mark.parametrize("in_dims", [(1, None, None), (-1, 0, None), (2, 1, 1), (None, 3, 0)], ids=str)
@pytest.mark.parametrize("out_dims", [0, 1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_other_dimensions(device, name, in_dims, out_dims):
    operands = []
    for tensor, dim in zip(_operands(name, device, 3), in_dims, strict=True):
        if dim is None:
            operands.append(tensor[0])
        else:
            operands.append(tensor.movedim(0, min(dim, tensor.dim() - 1)))
    in_dims = tuple(None if d is None else min(d, t.dim() - 1) for d, t in zip(in_dims, operands, strict=True))
    _assert_close(*(vmap(f, in_dims=in_dims, out_dims=out_dims)(*operands) for f in _functions(name)))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_without_bias_and_unbatched(device, name):
    x, w, _ = _operands(name, device, 3)
    _assert_close(*(vmap(lambda x, w, f=f: f(x[0], w))(x, w) for f in _functions(name)))
    _assert_close(*(vmap(lambda x, f=f: f(x, w[0]))(x) for f in _functions(name)))


@pytest.mark.parametrize("sizes", [(0, 3), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("name", ["linear", "linear_relu"])
def test_vmap_without_features(device, name, sizes):
    """A sum of nothing for each sample, and as many gradients of nothing."""
    x, w = (integers(2, *s, dtype=torch.float64, device=device) for s in [(2, 3, sizes[0]), (sizes[1], sizes[0])])
    _assert_close(*(vmap(f)(x, w) for f in _functions(name)))
    _assert_close(*(vmap(grad(lambda x, w, f=f: f(x, w).sum(), argnums=(0, 1)))(x, w) for f in _functions(name)))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_in_vmap(device, name):
    shapes = SHAPES[name]
    x = integers(2, 3, *shapes[0], dtype=torch.float64, device=device)
    w = integers(3, *shapes[1], dtype=torch.float64, device=device)
    b = integers(2, *shapes[2], dtype=torch.float64, device=device)

    def nested(f):
        return vmap(lambda x, b: vmap(lambda x, w: f(x, w, b))(x, w))(x, b)

    _assert_close(*map(nested, _functions(name)))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_vmap_in_chunks(device, chunk_size):
    operands = _operands("conv_relu_max_pool2d", device, 5)
    _assert_close(*(vmap(f, chunk_size=chunk_size)(*operands) for f in _functions("conv_relu_max_pool2d")))


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_grad(device, name, in_dims):
    operands = [_operands(name, device, None if d is None else 3)[i] for i, d in enumerate(in_dims)]

    def mapped(f):
        return vmap(grad(lambda *t: f(*t).pow(2).sum(), argnums=(0, 1, 2)), in_dims=in_dims)(*operands)

    _assert_close(*map(mapped, _functions(name)))


@pytest.mark.parametrize("name", NAMES)
def test_grad_of_vmap(device, name):
    operands = _operands(name, device, 3)
    _assert_close(
        *(grad(lambda *t, f=f: vmap(f)(*t).pow(2).sum(), argnums=(0, 1, 2))(*operands) for f in _functions(name))
    )


@pytest.mark.parametrize("name", NAMES)
def test_backward_through_vmap(device, name):
    """vmap in an ordinary training loop: loss.backward() outside of any transform."""
    results = []
    for f in _functions(name):
        torch.manual_seed(0)
        operands = [t.requires_grad_() for t in _operands(name, device, 3)]
        vmap(f)(*operands).pow(2).sum().backward()
        results.append([t.grad for t in operands])
    _assert_close(*results)


@pytest.mark.parametrize("argnums", [0, 1, 2], ids=["input", "weight", "bias"])
@pytest.mark.parametrize("name", NAMES)
def test_jacrev(device, name, argnums):
    operands = _operands(name, device)
    operands[0] = operands[0][:1]
    _assert_close(*(jacrev(f, argnums=argnums)(*operands) for f in _functions(name)))


@pytest.mark.parametrize("name", NAMES)
def test_hessian_by_reverse_mode(device, name):
    operands = _operands(name, device)
    operands[0] = operands[0][:1, ..., :5] if name.startswith("conv") else operands[0][:1]
    x, w, b = operands

    def second(f):
        return jacrev(jacrev(lambda w: f(x, w, b).pow(2).sum()))(w)

    _assert_close(*map(second, _functions(name)))


def test_jacobian_of_torch_autograd(device):
    """The older interface, with its vectorised version."""
    x, w, b = _operands("linear_relu", device)
    for vectorize in (False, True):
        ours, stock = (
            torch.autograd.functional.jacobian(f, (x, w, b), vectorize=vectorize) for f in _functions("linear_relu")
        )
        _assert_close(ours, stock)
    x, w, b = _operands("conv_relu_max_pool2d", device)
    ours, stock = (
        torch.autograd.functional.jacobian(lambda w, f=f: f(x[:1], w, b), w, vectorize=True)
        for f in _functions("conv_relu_max_pool2d")
    )
    _assert_close(ours, stock)


@pytest.mark.parametrize("name", NAMES)
def test_vjp(device, name):
    operands = _operands(name, device)
    results = []
    for f in _functions(name):
        output, pullback = vjp(f, *operands)
        results.append((output, pullback(torch.ones_like(output)), pullback(2 * torch.ones_like(output))))
    _assert_close(*results)


@pytest.mark.parametrize("name", NAMES)
def test_is_grads_batched(device, name):
    """torch.autograd.grad(..., is_grads_batched=True) maps over our backward."""
    results = []
    for f in _functions(name):
        torch.manual_seed(0)
        operands = [t.requires_grad_() for t in _operands(name, device)]
        output = f(*operands)
        vectors = integers(4, *output.shape, dtype=torch.float64, device=device)
        results.append(torch.autograd.grad(output, operands, vectors, is_grads_batched=True))
    _assert_close(*results)


# --- the net -------------------------------------------------------------------------------------------------------


def _nets(dtype=torch.float64):
    torch.manual_seed(0)
    stock = ReferenceNet(dtype=dtype)
    ours = Net(dtype=dtype)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def _loss(net, parameters, x, y):
    return F.cross_entropy(functional_call(net, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_per_sample_gradients(device, dtype):
    """The tutorial of torch.func: vmap(grad(loss)) over a batch."""
    x, y = torch.randn(6, 1, 32, 32, dtype=dtype, device=device), torch.randint(10, (6,), device=device)
    results = []
    for net in _nets(dtype):
        net.to(device)
        parameters = {k: v.detach() for k, v in net.named_parameters()}
        per_sample = vmap(grad(lambda p, x, y, net=net: _loss(net, p, x, y)), in_dims=(None, 0, 0))(parameters, x, y)
        results.append(per_sample)
        # The mean of them is the gradient of the batch.
        F.cross_entropy(net(x), y).backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(per_sample[name].mean(0), p.grad, rtol=1e-4, atol=1e-5)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(*results, **tolerance)


def test_per_sample_gradients_of_a_channels_last_weight(device):
    """Laid out as the weight is, as without vmap; torch.func.vmap has no rule for what makes a tensor channels_last."""
    x, w, b = _operands("conv_relu_max_pool2d", device)
    w = w.contiguous(memory_format=torch.channels_last)

    def per_sample(f):
        gradient = grad(lambda w, x: f(x[None], w, b).sum())
        return vmap(gradient, in_dims=(None, 0))(w, x)

    ours, stock = map(per_sample, _functions("conv_relu_max_pool2d"))
    _assert_close(ours, stock)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


def test_functional_call(device):
    """With other parameters than the module's own, which stay as they are; grad_and_value on top."""
    x, y = torch.randn(1, 32, 32, dtype=torch.float64, device=device), torch.tensor(3, device=device)
    results = []
    for net in _nets():
        net.to(device)
        parameters = {k: v.detach() * 1.5 for k, v in net.named_parameters()}
        before = net.conv1.weight.detach().clone()
        results.append(grad_and_value(lambda p, net=net: _loss(net, p, x, y))(parameters))
        assert_equal(net.conv1.weight, before, "the module's own parameter")
        assert net.conv1.weight.grad is None
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_functional_call_without_transform():
    net = Net()
    zeros = {k: torch.zeros_like(v) for k, v in net.named_parameters()}
    x = torch.randn(3, 1, 32, 32)
    assert not functional_call(net, zeros, (x,)).any()
    assert net(x).any()


def test_ensemble(device):
    """Several nets at once with stacked parameters."""
    x = torch.randn(4, 1, 32, 32, dtype=torch.float64, device=device)
    results = []
    for cls in (Net, ReferenceNet):
        torch.manual_seed(0)
        nets = [cls(dtype=torch.float64, device=device) for _ in range(3)]
        parameters, buffers = stack_module_state(nets)
        base = cls(device="meta", dtype=torch.float64)
        results.append(vmap(lambda p, b, base=base: functional_call(base, (p, b), (x,)))(parameters, buffers))
        for net, output in zip(nets, results[-1], strict=True):
            torch.testing.assert_close(net(x), output, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_jacobian_of_the_net(device):
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64, device=device)
    ours, stock = (jacrev(net.to(device))(x) for net in _nets())
    assert ours.shape == (1, 10, 1, 1, 32, 32)
    assert stock.any()
    torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-12)


# --- forward mode ----------------------------------------------------------------------------------------------------


def _tangents(operands):
    return tuple(t.flip(0).roll(1, -1) for t in operands)


@pytest.mark.parametrize("argnums", [*IN_DIMS], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_jvp(device, name, argnums):
    """Tangents of some of the operands: each has a term of its own."""
    operands = _operands(name, device)
    which = [i for i, d in enumerate(argnums) if d is not None]

    def pushed(f):
        def of(*chosen):
            arguments = list(operands)
            for i, tensor in zip(which, chosen, strict=True):
                arguments[i] = tensor
            return f(*arguments)

        primals = tuple(operands[i] for i in which)
        return jvp(of, primals, _tangents(primals))

    _assert_close(*map(pushed, _functions(name)))


@pytest.mark.parametrize("name", NAMES)
def test_dual_numbers(device, name):
    """Without torch.func; also under no_grad, and of operands that require a gradient."""
    for no_grad, requires_grad in ((True, False), (False, False), (False, True)):
        results = []
        for f in _functions(name):
            torch.manual_seed(0)
            operands = [t.requires_grad_(requires_grad) for t in _operands(name, device)]
            with torch.set_grad_enabled(not no_grad), forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, d) for t, d in zip(operands, _tangents(operands), strict=True)]
                output = forward_ad.unpack_dual(f(*duals))
                results.append((output.primal, output.tangent))
        _assert_close(*results)


@pytest.mark.parametrize("name", NAMES)
def test_no_tangent_where_nothing_changes(name):
    """As in stock: None, not zeros."""
    for f in _functions(name):
        with forward_ad.dual_level():
            output = f(*_operands(name, "cpu"))
            assert forward_ad.unpack_dual(output).tangent is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("argnums", [0, 1, 2], ids=["input", "weight", "bias"])
def test_jacfwd_and_hessian(device, name, argnums):
    operands = _operands(name, device)
    operands[0] = operands[0][:1, ..., :5] if name.startswith("conv") else operands[0][:1]
    _assert_close(*(jacfwd(f, argnums=argnums)(*operands) for f in _functions(name)))
    _assert_close(*(hessian(lambda *t, f=f: f(*t).pow(2).sum(), argnums=argnums)(*operands) for f in _functions(name)))


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_jvp(device, name, in_dims):
    operands = [_operands(name, device, None if d is None else 3)[i] for i, d in enumerate(in_dims)]

    def mapped(f):
        return vmap(lambda *t: jvp(f, t, _tangents(t)), in_dims=in_dims)(*operands)

    _assert_close(*map(mapped, _functions(name)))


@pytest.mark.parametrize("name", NAMES)
def test_jvp_of_grad_and_grad_of_jvp(device, name):
    """Hessian-vector products: forward over reverse, reverse over forward, and forward over forward."""
    operands = tuple(_operands(name, device))

    def products(f):
        def loss(*t):
            return f(*t).pow(2).sum()

        def changed(*t):
            return jvp(loss, t, _tangents(operands))[1]

        forward_over_reverse = jvp(grad(loss, argnums=(0, 1, 2)), operands, _tangents(operands))[1]
        reverse_over_forward = grad(changed, argnums=(0, 1, 2))(*operands)
        _assert_close(forward_over_reverse, reverse_over_forward)
        return forward_over_reverse, jvp(changed, operands, _tangents(operands))

    _assert_close(*map(products, _functions(name)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("no_grad", [True, False])
def test_forward_mode_of_the_net(dtype, no_grad):
    """Also where no gradient is needed: the tangent must not be dropped in silence."""
    ours, stock = _nets(dtype)
    x, direction = torch.randn(2, 2, 1, 32, 32, dtype=dtype).unbind()
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    with torch.set_grad_enabled(not no_grad):
        expected = jvp(stock, (x,), (direction,))
        assert expected[1].any()
        torch.testing.assert_close(jvp(ours, (x,), (direction,)), expected, **tolerance)
        with forward_ad.dual_level():
            output = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, direction)))
            torch.testing.assert_close((output.primal, output.tangent), expected, **tolerance)
            assert forward_ad.unpack_dual(ours(x)).tangent is None


def test_forward_mode_of_the_net_with_a_dual_parameter():
    ours, stock = _nets()
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    results = []
    for net in (ours, stock):
        for name in ("conv1.weight", "conv2.bias", "fc2.weight", "fc3.bias"):
            value = dict(net.named_parameters())[name].detach()
            results.append(jvp(lambda v, net=net, name=name: functional_call(net, {name: v}, (x,)), (value,), (value,)))
    for actual, expected in zip(results[:4], results[4:], strict=True):
        assert expected[1].any()
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
