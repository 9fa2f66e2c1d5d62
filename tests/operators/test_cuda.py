"""What only a GPU can show: streams, CUDA graphs, several devices, determinism, precision flags, very large tensors.

The operators' values and gradients on `cuda` are tested where those of the CPU are (the `device` fixture), and the CUDA
code without a GPU in test_cuda_on_cpu.py.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from lenet_ext import Net, ReferenceNet, build_info
from lenet_ext.functional import conv_relu_max_pool2d, linear, linear_relu

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(build_info()["cuda"] is None, reason="lenet_ext was built without CUDA"),
]

LAYERS = {
    "conv1": (conv_relu_max_pool2d, (1, 32, 32), (6, 1, 5, 5)),
    "conv2": (conv_relu_max_pool2d, (6, 14, 14), (16, 6, 5, 5)),
    "small": (conv_relu_max_pool2d, (3, 9, 9), (5, 3, 3, 3)),
    "vendor": (conv_relu_max_pool2d, (64, 32, 32), (64, 64, 3, 3)),
    "fc1": (linear_relu, (400,), (120, 400)),
    "fc3": (linear, (84,), (10, 84)),
}


def operands(name, batch, device="cuda", dtype=torch.float32):
    function, image, weight = LAYERS[name]
    make = torch.Generator().manual_seed(1)
    shapes = [(batch, *image), weight, weight[:1]]
    tensors = [torch.randn(s, generator=make, dtype=torch.float64).to(device, dtype) for s in shapes]
    return function, [t.requires_grad_() for t in tensors]


def forward_and_backward(function, tensors):
    output = function(*tensors)
    return [output.detach(), *torch.autograd.grad(output, tensors, torch.ones_like(output))]


@pytest.mark.parametrize("name", LAYERS)
def test_current_stream(name):
    """Work on a side stream waits for what that stream does, and for nothing else."""
    function, tensors = operands(name, 16)
    expected = forward_and_backward(function, tensors)
    late = [torch.full_like(t, float("nan")) for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read the NaN
        for to, value in zip(late, tensors, strict=True):
            to.copy_(value.detach())
        got = forward_and_backward(function, [t.requires_grad_() for t in late])
    stream.synchronize()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_synchronises(name):
    function, tensors = operands(name, 16)
    forward_and_backward(function, tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(function, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch", [1, 64])
def test_training_step_in_a_graph(batch):
    """Captured once, replayed on other data: as eager on that data."""
    net = Net(device="cuda")
    images = [torch.randn(batch, 1, 32, 32, device="cuda") for _ in range(3)]
    static = images[0].clone()

    def step():
        for parameter in net.parameters():
            parameter.grad = None
        loss = net(static).square().mean()
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = [parameter.grad for parameter in net.parameters()]
    for image in images[1:]:
        static.copy_(image)
        graph.replay()
        results = [loss.detach().clone(), *(grad.clone() for grad in captured)]
        expected = [step().detach(), *(parameter.grad for parameter in net.parameters())]
        for one, other in zip(results, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "vendor"])
def test_bitwise_the_same_in_20_runs(name, dtype):
    function, tensors = operands(name, 61, dtype=dtype)
    first = forward_and_backward(function, tensors)
    for _ in range(19):
        for one, other in zip(forward_and_backward(function, tensors), first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_an_image_does_not_depend_on_its_batch(name, dtype):
    function, tensors = operands(name, 300, dtype=dtype)
    whole = function(*tensors)
    for begin, end in [(0, 1), (7, 20), (299, 300)]:
        assert torch.equal(function(tensors[0][begin:end], *tensors[1:]), whole[begin:end])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", LAYERS)
def test_second_device(name):
    """Tensors on cuda:1 while cuda:0 is current."""
    expected = forward_and_backward(*operands(name, 8, "cuda:0"))
    with torch.cuda.device(0):
        got = forward_and_backward(*operands(name, 8, "cuda:1"))
        assert torch.cuda.current_device() == 0
    for one, other in zip(got, expected, strict=True):
        assert one.device == torch.device("cuda:1")
        torch.testing.assert_close(one.cpu(), other.cpu())


@pytest.mark.parametrize("name", LAYERS)
def test_tensors_on_two_devices_are_refused(name):
    function, (x, w, b) = operands(name, 2)
    with pytest.raises(RuntimeError, match="device"):
        function(x, w.cpu(), b)


@contextlib.contextmanager
def tf32_allowed(convolutions, products):
    """Sets what torch.backends says of TF32; elsewhere in these tests it is not allowed."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", ["conv1", "conv2", "fc1"])
def test_float32_is_tf32_only_where_stocks_convolution_may_be(name):
    """Of our kernels for a layer, those of the convolutions have a TF32 variant; otherwise the error is float32's."""
    # The first layer is faster in TF32 from 256 images on; a linear layer of so many rows is the vendor's.
    function, tensors = operands(name, 256 if name == "conv1" else 32)
    expected = function(*[t.double() for t in tensors])

    def error(output):
        return float((output - expected).abs().max() / expected.abs().max())

    strict = function(*tensors)
    assert error(strict) < 1e-5
    with tf32_allowed(False, True):
        assert torch.equal(function(*tensors), strict)
    with tf32_allowed(True, False):
        got = function(*tensors)
    rounds = name != "fc1" and torch.cuda.get_device_capability() >= (8, 0)
    assert torch.equal(got, strict) == (not rounds)
    assert error(got) < (2e-3 if rounds else 1e-5)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="no tensor cores for these"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_on_the_tensor_cores_is_as_in_the_whole_network(dtype):
    """Bit by bit, wherever in its batch an image lies."""
    torch.manual_seed(0)
    parameters = [p.detach() for p in Net(device="cuda", dtype=dtype).parameters()]
    x = torch.randn(300, 1, 32, 32, device="cuda", dtype=dtype)
    with torch.no_grad():
        pooled1, _, pooled2, *_ = torch.ops.lenet_ext.lenet_with_activations(x, parameters)[1:]
        for begin, end in [(0, 300), (7, 20), (299, 300)]:
            assert torch.equal(conv_relu_max_pool2d(x[begin:end], *parameters[:2]), pooled1[begin:end])
            assert torch.equal(conv_relu_max_pool2d(pooled1[begin:end], *parameters[2:4]), pooled2[begin:end])


# Of values, to numbers of about one.
MANY_IMAGES = {"tf32": (torch.float32, 0.003), "float16": (torch.float16, 0.003), "bfloat16": (torch.bfloat16, 0.02)}


@pytest.mark.parametrize("precision", MANY_IMAGES)
@pytest.mark.parametrize("batch", [1024, 5003])
def test_inference_of_many_images(batch, precision):
    """By the cost rule kernels of their own, against those of slices, which in float32 are strict."""
    torch.manual_seed(0)
    dtype, tolerance = MANY_IMAGES[precision]
    parameters = [p.detach() for p in Net(device="cuda", dtype=dtype).parameters()]
    x = torch.randn(batch, 1, 32, 32, device="cuda", dtype=dtype)
    x[batch // 2, 0, 9, 14], x[batch - 1, 0, 31, 31] = float("nan"), float("inf")
    with tf32_allowed(precision == "tf32", precision == "tf32"):
        output = torch.ops.lenet_ext.lenet(x, parameters)
    expected = torch.cat([torch.ops.lenet_ext.lenet(part, parameters) for part in x.split(1000)])
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("precision", MANY_IMAGES)
@pytest.mark.parametrize("batch", [2050, 5003])
def test_training_with_many_images(batch, precision):
    """Both passes by the cost rule, against those of slices, which take others of our kernels, strict in float32."""
    torch.manual_seed(0)
    dtype, tolerance = MANY_IMAGES[precision]
    parameters = [p.detach() for p in Net(device="cuda", dtype=dtype).parameters()]
    x = torch.randn(batch, 1, 32, 32, device="cuda", dtype=dtype)
    g = torch.randn(batch, 10, device="cuda", dtype=dtype)
    with tf32_allowed(precision == "tf32", precision == "tf32"):
        activations = torch.ops.lenet_ext.lenet_with_activations(x, parameters)
    parts = [torch.ops.lenet_ext.lenet_with_activations(part, parameters) for part in x.split(1000)]
    for one, others in zip(activations, zip(*parts, strict=True), strict=True):
        if one.dtype != torch.uint8:  # near ties may have other winners
            torch.testing.assert_close(one, torch.cat(others), rtol=tolerance, atol=tolerance)
    kept = activations[1:]
    with tf32_allowed(precision == "tf32", precision == "tf32"):
        got = torch.ops.lenet_ext.lenet_backward(g, x, parameters, *kept, False)[1]
        again = torch.ops.lenet_ext.lenet_backward(g, x, parameters, *kept, False)[1]
    for one, other in zip(got[:4], again[:4], strict=True):
        assert torch.equal(one, other)
    slices = zip(g.split(1000), x.split(1000), *[tensor.split(1000) for tensor in kept], strict=True)
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for part_g, part_x, *part_kept in slices:
        of_part = torch.ops.lenet_ext.lenet_backward(part_g, part_x, parameters, *part_kept, False)[1]
        expected = [total + gradient for total, gradient in zip(expected, of_part, strict=True)]
    for one, other in zip(got, expected, strict=True):
        assert float((one - other).norm()) <= 2 * tolerance * float(other.norm())


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, True]], ids=str)
@pytest.mark.parametrize("precision", MANY_IMAGES)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layers_gradients_of_many_images(layer, precision, mask):
    """By the cost rule on the tensor cores, against float64; the same every time, an image's whatever its batch."""
    torch.manual_seed(0)
    dtype, tolerance = MANY_IMAGES[precision]
    weight = list(Net(device="cuda", dtype=dtype).parameters())[2 * layer].detach()
    x = torch.randn(1301, *[(1, 32, 32), (6, 14, 14)][layer], device="cuda", dtype=dtype)
    options = [[1, 1], [0, 0, 0, 0], [1, 1], 1, [2, 2], [2, 2], [0, 0], [1, 1]]
    output, indices = torch.ops.lenet_ext.conv_relu_max_pool2d_with_indices(x, weight, None, *options, False)
    g = torch.randn_like(output)

    def backward(convert, images=slice(None)):
        tensors = convert(g[images]), indices[images], convert(x[images]), convert(weight)
        sizes = x[images].shape, weight.shape
        return torch.ops.lenet_ext.conv_relu_max_pool2d_backward(*tensors, *sizes, *options, mask)

    with tf32_allowed(precision == "tf32", False):
        got, again = backward(torch.clone), backward(torch.clone)
        part = backward(torch.clone, slice(3, 900))
    for wanted, one, other, exact in zip(mask, got, again, backward(torch.Tensor.double), strict=True):
        assert torch.equal(one, other)
        if wanted:
            assert float((one - exact).norm()) <= tolerance * float(exact.norm())
    if mask[0]:
        assert torch.equal(part[0], got[0][3:900])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    torch.manual_seed(0)
    net, x = Net(device="cuda"), torch.randn(32, 1, 32, 32, device="cuda")
    reference = ReferenceNet(device="cuda")
    reference.load_state_dict(net.state_dict())
    with torch.autocast("cuda", dtype):
        output, expected = net(x), reference(x)
    assert output.dtype == expected.dtype == dtype
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.003
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    output.float().square().sum().backward()
    expected.float().square().sum().backward()
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        assert one.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad, other.grad, rtol=0.1, atol=10 * tolerance * float(other.grad.abs().max()))


def test_compile():
    torch.manual_seed(0)
    net, x = Net(device="cuda"), torch.randn(16, 1, 32, 32, device="cuda")
    expected = net(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    output = torch.compile(net, fullgraph=True)(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), list(net.parameters())), expected_grads)


def test_more_than_two_to_the_31_elements():
    """2.2 million images: 9 GB of input, offsets beyond 32 bits."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs a GPU with 60 GB")
    batch = 2_200_000
    function, (_, w, b) = operands("conv1", 1)
    x = torch.empty(batch, 1, 32, 32, device="cuda").uniform_(-1, 1)
    x[-1] = x[0]
    with torch.no_grad():
        output = function(x, w, b)
    assert torch.equal(output[-1], output[0])
    torch.testing.assert_close(output[-3:], function(x[-3:], w, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_the_whole_network_is_one_operator(training, dtype):
    """And under autocast it is its layers, which cast."""
    torch.manual_seed(0)
    net, x = Net(device="cuda", dtype=dtype), torch.randn(16, 1, 32, 32, device="cuda", dtype=dtype)

    def operators(call):
        # By the profiler: under a dispatch mode the network would go layer by layer.
        with torch.profiler.profile() as profile:
            call()
        return {event.name for event in profile.events() if event.name.startswith("lenet_ext::")}

    with torch.set_grad_enabled(training):
        assert operators(lambda: net(x)) == {"lenet_ext::lenet_with_activations" if training else "lenet_ext::lenet"}
        with torch.autocast("cuda", torch.bfloat16):
            assert not any("lenet_ext::lenet" in name for name in operators(lambda: net(x)))


# Blocks take one, two or four images at a time; 2,500 go layer by layer.
@pytest.mark.parametrize("batch", [1, 61, 300, 1000, 2500])
def test_the_whole_networks_gradients(batch):
    """Bitwise the same in 20 runs, and close to stock's in float64 (the odd winner of a near tie differs)."""
    torch.manual_seed(0)
    net, reference = Net(device="cuda"), ReferenceNet(device="cuda", dtype=torch.float64)
    reference.load_state_dict(net.state_dict())
    x, g = torch.randn(batch, 1, 32, 32, device="cuda"), torch.randn(batch, 10, device="cuda")
    first = torch.autograd.grad(net(x), list(net.parameters()), g)
    for _ in range(19):
        for one, other in zip(torch.autograd.grad(net(x), list(net.parameters()), g), first, strict=True):
            assert torch.equal(one, other)
    stock = torch.autograd.grad(reference(x.double()), list(reference.parameters()), g.double())
    for one, other in zip(first, stock, strict=True):
        assert float((one - other).norm()) <= 1e-2 * float(other.norm())


@pytest.mark.parametrize("batch", [1, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_whole_networks_gradients_in_16_bits(batch, dtype):
    """Bitwise the same in 20 runs, and those of float64 for the same activations, rounded once."""
    torch.manual_seed(0)
    parameters = [p.detach() for p in Net(device="cuda", dtype=dtype).parameters()]
    x, g = (torch.randn(s, device="cuda", dtype=dtype) for s in [(batch, 1, 32, 32), (batch, 10)])
    activations = torch.ops.lenet_ext.lenet_with_activations(x, parameters)[1:]
    _, first = torch.ops.lenet_ext.lenet_backward(g, x, parameters, *activations, False)
    for _ in range(19):
        _, again = torch.ops.lenet_ext.lenet_backward(g, x, parameters, *activations, False)
        for one, other in zip(again, first, strict=True):
            assert torch.equal(one, other)

    def exact(tensor):
        return tensor.cpu() if tensor.dtype == torch.uint8 else tensor.cpu().double()

    operands = exact(g), exact(x), [exact(p) for p in parameters], *[exact(a) for a in activations]
    _, expected = torch.ops.lenet_ext.lenet_backward(*operands, False)
    for one, other in zip(first, expected, strict=True):
        atol = 1e-5 * float(other.abs().max()) + 1e-7
        torch.testing.assert_close(exact(one), other, rtol=torch.finfo(dtype).eps / 2, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("input_gradient", [False, True])
def test_the_whole_networks_backward_is_two_kernels(input_gradient, dtype):
    torch.manual_seed(0)
    make = {"device": "cuda", "dtype": dtype}
    net, x = Net(**make), torch.randn(64, 1, 32, 32, **make, requires_grad=input_gradient)
    output, g = net(x), torch.randn(64, 10, **make)
    leaves = [*net.parameters(), *([x] if input_gradient else [])]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(output, leaves, g)
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_gpu if "kernel" in name]  # not what the profiler itself put there
    assert [name for name in kernels if "lenet_backward_data_kernel" in name]
    assert [name for name in kernels if "lenet_backward_weight_kernel" in name]
    assert len(kernels) == 2 + input_gradient, kernels
