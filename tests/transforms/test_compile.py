"""torch.compile, torch.export, make_fx, torch.fx: the operators are opaque nodes with known shapes, nothing breaks.

Values and gradients are in test_matrix.py; here is what else one expects: dtypes and layouts, no recompilation, files.
"""

from __future__ import annotations

import io
import shutil

import pytest
import torch
import torch.nn.functional as F
from reference import integers
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from lenet_ext import Net, functional, nn


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _exact_net(**arguments):
    torch.manual_seed(0)
    net = Net(**arguments)
    for p in net.parameters():
        p.data.copy_(integers(*p.shape, low=-1, high=1) * (torch.rand(p.shape) < (0.2 if p.dim() == 2 else 1)))
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_net_forward_and_backward(device, dtype, channels_last):
    net = _exact_net(dtype=torch.float32).to(device, dtype)
    x = integers(3, 1, 32, 32, low=-1, high=1, dtype=dtype, device=device)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (net, compiled):
        net.zero_grad()
        output = function(x)
        output.float().pow(2).mean().backward()
        grads.append([output.detach(), *(p.grad.clone() for p in net.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if dtype == torch.float32 else 0.02, atol=0)


def test_batch_size_is_dynamic_without_recompilation(device):
    net = Net().to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    for batch in (4, 2, 3, 5, 64, 7, 33):
        x = torch.randn(batch, 1, 32, 32, device=device)
        output = compiled(x)
        torch.testing.assert_close(output, net(x), rtol=1e-5, atol=1e-6)
        output.sum().backward()
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times"


def test_default_settles_after_one_recompilation(device):
    """dynamic=None: static first, dynamic as soon as a second batch size comes, then no more."""
    net = Net().to(device).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (4, 2, 3, 5, 64, 7, 33, 100):
            x = torch.randn(batch, 1, 32, 32, device=device)
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2, f"compiled {counter.frame_count} times"


def test_image_size_may_be_dynamic(device):
    layer = nn.ConvReLUMaxPool2d(2, 3, 3, padding="same", pool_kernel_size=3, pool_stride=2, ceil_mode=True).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for size in ((20, 30), (21, 31), (17, 12), (9, 40)):
        x = torch.randn(2, 2, *size, device=device)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count <= 2


def test_training_step(device):
    """Loss and backward inside of the compiled region's graph; the optimizer outside, as people write it."""
    torch.manual_seed(0)
    nets = [Net().to(device)]
    nets.append(Net().to(device))
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = torch.randn(8, 1, 32, 32, device=device), torch.randint(10, (8,), device=device)
    curves = []
    for net, wrap in zip(
        nets, (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")), strict=True
    ):
        step = wrap(lambda x, y, net=net: F.cross_entropy(net(x), y))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        curve = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = step(x, y)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)


# --- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_export_and_load_again(device, strict):
    net = Net().to(device).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    example = (torch.randn(3, 1, 32, 32, device=device),)
    program = torch.export.export(net, example, dynamic_shapes=({0: batch},), strict=strict)
    # Strict export keeps an autograd.Function as a subgraph of its own, so all modules are searched.
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = {str(node.target) for graph in graphs for node in graph.nodes}
    assert any(target.startswith("lenet_ext.") for target in targets), targets
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in (1, 2, 65):
        x = torch.randn(size, 1, 32, 32, device=device)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.extended
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
def test_ahead_of_time_package(tmp_path):
    """AOTInductor: compiled to a file without Python in it, that loads where the operators are registered."""
    net = Net().eval()
    example = (torch.randn(3, 1, 32, 32),)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=4096)
        program = torch.export.export(net, example, dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for size in (1, 65):
            x = torch.randn(size, 1, 32, 32)
            torch.testing.assert_close(loaded(x), net(x), rtol=1e-5, atol=1e-6)


def test_export_of_a_layer_with_every_option():
    layer = nn.ConvReLUMaxPool2d(
        4, 6, 3, padding="same", dilation=2, groups=2, pool_kernel_size=3, pool_stride=2, ceil_mode=True
    )
    x = torch.randn(2, 4, 15, 14)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    x = torch.randn(5, 4, 15, 14)
    torch.testing.assert_close(program.module()(x), layer(x))


# --- tracing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    net = Net().eval()
    parameters = {k: v.detach() for k, v in net.named_parameters()}
    x = torch.randn(3, 1, 32, 32)
    traced = make_fx(lambda p, x: torch.func.functional_call(net, p, (x,)), tracing_mode=mode)(parameters, x)
    assert any("lenet_ext" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(parameters, x), net(x), rtol=1e-5, atol=1e-6)


def test_symbolic_trace():
    """torch.fx records the fused functions as calls, so graph rewriters see them."""
    net = Net()
    traced = torch.fx.symbolic_trace(net)
    x = torch.randn(3, 1, 32, 32)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-5, atol=1e-6)
    assert len(list(traced.parameters())) == 10


def test_fake_tensor_mode():
    """Shapes without memory: a net on fake tensors allocates nothing and computes nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net = Net()
        output = net(torch.empty(100_000, 1, 32, 32))
        output.sum().backward()
        assert output.shape == (100_000, 10)
        assert net.conv1.weight.grad.shape == (6, 1, 5, 5)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.ConvReLUMaxPool2d(3, 4, 3), (2, 3, 8, 8)),
        (lambda: nn.Linear(5, 3), (2, 5)),
        (lambda: nn.LinearReLU(5, 3), (2, 5)),
        (Net, (2, 1, 32, 32)),
    ],
    ids=["conv_relu_max_pool2d", "linear", "linear_relu", "lenet"],
)
def test_compiled_autograd_of_a_first_layer(make, shape):
    """Nobody wants the gradient of the images, so that the graph does not have all that it could have."""
    layer, x = make(), torch.randn(shape)
    layer(x).square().sum().backward()
    expected = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    output = layer(x).square().sum()
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        output.backward()
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_errors_while_compiling():
    """A bad shape is an error at trace time that names the argument, not a wrong graph."""
    compiled = torch.compile(functional.conv_relu_max_pool2d, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="input"):
        compiled(torch.randn(2, 2, 8, 8), torch.randn(4, 3, 3, 3))
