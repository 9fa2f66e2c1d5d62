"""The CUDA kernels of the whole network, on the CPU, against its layers in float64."""

from __future__ import annotations

import ctypes
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cuda_on_cpu.stand_in import (
    DIRECT,
    NEEDS_COMPILER,
    ON_TENSOR_CORES,
    PLAIN,
    SCHEDULES,
    VENDOR,
    capability,
    dtype_of,
    extended,
    gradients,
    moved,
    shared_memory,
    tf32_allowed,
    under_schedules,
    without_tensor_cores,
)

pytestmark = NEEDS_COMPILER


def reference_net(channels, classes, dtype):
    from lenet_ext import ReferenceNet

    net = ReferenceNet(channels, classes, dtype=dtype)
    return net, [parameter.detach() for parameter in net.parameters()]


# Of values and of gradients, each to the largest of its tensor, against float64. TF32 and float16 have 11 bits of
# mantissa, bfloat16 has 8, and both the layers' inputs and their outputs are rounded.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1.5e-2}


def assert_gradients_close(got, want):
    """`got` was rounded once, from sums in float32."""
    for one, other in zip(got, want, strict=True):
        info = torch.finfo(one.dtype)
        scale = float(other.abs().max()) if other.numel() else 0.0
        atol = 1e-5 * scale + info.smallest_normal * info.eps  # float16 has few exponents
        torch.testing.assert_close(one.double(), other.double(), rtol=max(1e-5, info.eps / 2), atol=atol)


def exact_gradients(g, x, parameters, activations):
    """In float64, for these activations and winners."""
    exact = [a if a.dtype == torch.uint8 else a.double() for a in activations]
    return torch.ops.lenet_ext.lenet_backward(g.double(), x.double(), [p.double() for p in parameters], *exact, False)[
        1
    ]


def network(precision):
    """What is forced for the kernel that computes the whole network in a precision; in TF32 the rule never takes it."""
    return DIRECT if precision == "tf32" else -1


# At most 128 classes are one launch, but in float64, and for three channels in float32 alone; the others run layer by
# layer.
@pytest.mark.parametrize(
    ("batch", "channels", "classes", "precision"),
    [
        (0, 1, 10, "float32"),
        (1, 1, 10, "float32"),
        extended(33, 1, 10, "float32"),
        (4, 1, 128, "float32"),
        (4, 1, 1, "float32"),
        *[(batch, 3, 10, "float32") for batch in (0, 1, 3)],
        extended(33, 3, 128, "float32"),
        (3, 1, 130, "float32"),
        (3, 1, 10, "float64"),
        (0, 1, 10, "bfloat16"),
        *[(batch, 1, 10, precision) for batch in (1, 3) for precision in ("tf32", "float16", "bfloat16")],
        *[extended(batch, 1, 10, precision) for batch in (17, 33) for precision in ("tf32", "float16", "bfloat16")],
        (3, 1, 128, "tf32"),
        (3, 1, 128, "bfloat16"),
        (3, 3, 10, "bfloat16"),
    ],
    ids=str,
)
def test_the_whole_network(ops, control, batch, channels, classes, precision):
    dtype = dtype_of(precision)
    net, parameters = reference_net(channels, classes, dtype)
    x = torch.randn(batch, channels, 32, 32, dtype=dtype)
    expected = net.double()(leaf := x.double().requires_grad_())
    with tf32_allowed(precision == "tf32", precision == "tf32"):
        before = control.cuda_on_cpu_launches()
        output = under_schedules(control, network(precision), lambda: ops.lenet(x, parameters))[0]
        if classes <= 128 and (precision == "float32" or (dtype != torch.float64 and channels == 1)):
            assert control.cuda_on_cpu_launches() - before == len(SCHEDULES) * (batch > 0)
        activations = under_schedules(control, network(precision), lambda: ops.lenet_with_activations(x, parameters))
    tolerance = TOLERANCES[precision]

    def close(got, want):
        scale = float(want.detach().abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale)

    close(output, expected.detach())
    assert output.dtype == dtype
    assert torch.equal(activations[0], output)
    assert [tuple(a.shape) for a in activations[1:]] == [
        *[(batch, 6, 14, 14)] * 2,
        *[(batch, 16, 5, 5)] * 2,
        (batch, 120),
        (batch, 84),
    ]
    assert [a.dtype for a in activations[1:]] == [dtype, torch.uint8, dtype, torch.uint8, dtype, dtype]
    # What won each window, by its value.
    pooled1, indices1, pooled2, indices2 = activations[1:5]
    for i, images, pooled, indices in ((0, x, pooled1, indices1), (2, pooled1, pooled2, indices2)):
        operands = [t.double() for t in (images, parameters[i], parameters[i + 1])]
        close(pooled, ops.conv_at_indices(*operands, indices, *PLAIN.values()))

    g = torch.randn(batch, classes, dtype=dtype)
    grad_input, gradients = ops.lenet_backward(g, x, parameters, *activations[1:], True)
    if tolerance < 1e-4:
        wanted = torch.autograd.grad(expected, [*net.parameters(), leaf], g.double())
        for got, want in zip([*gradients, grad_input], wanted, strict=True):
            close(got, want)
        return
    # Where two positions of a window are nearly the same, another may win than in float64, and each takes a whole
    # gradient along: so the winners are given, and the arithmetic is compared, with that of the CPU in float64.
    exact = [a if a.dtype == torch.uint8 else a.double() for a in activations[1:]]
    wanted_input, wanted = torch.ops.lenet_ext.lenet_backward(
        g.double(), x.double(), [p.double() for p in parameters], *exact, True
    )
    bound = 1e-5 if dtype == torch.float32 else 2 * tolerance
    for got, want in zip([*gradients, grad_input], [*wanted, wanted_input], strict=True):
        assert float((got.double() - want).norm()) <= bound * float(want.norm())


@pytest.mark.parametrize(("convolutions", "products"), list(itertools.product([False, True], repeat=2)))
def test_tf32_only_where_both_flags_allow_it(ops, control, convolutions, products):
    """Otherwise the result is bit by bit that of the strict kernel."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    _, parameters = reference_net(1, 10, torch.float32)
    x = torch.randn(5, 1, 32, 32)
    with tf32_allowed(False, False):
        strict = ops.lenet(x, parameters), *ops.lenet_with_activations(x, parameters)
    with tf32_allowed(convolutions, products):
        got = ops.lenet(x, parameters), *ops.lenet_with_activations(x, parameters)
    same = [torch.equal(one, other) for one, other in zip(got, strict, strict=True)]
    if convolutions and products:
        assert not same[0]
        assert not same[1]
        torch.testing.assert_close(got[0], strict[0], rtol=0, atol=2e-3)
    else:
        assert all(same)


def test_tf32_by_the_newer_flags(ops, control):
    """torch.backends.*.fp32_precision; convolutions and RNNs may be set apart."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    _, parameters = reference_net(1, 10, torch.float32)
    x = torch.randn(2, 1, 32, 32)
    strict = ops.lenet(x, parameters)

    def layer():
        return ops.conv_relu_max_pool2d(x, *parameters[:2], *PLAIN.values(), False)

    strict_layer = layer()
    flags = [torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
    before = [flag.fp32_precision for flag in flags]
    try:
        for conv, rnn, matmul in itertools.product(["ieee", "tf32"], repeat=3):
            for flag, precision in zip(flags, (conv, rnn, matmul), strict=True):
                flag.fp32_precision = precision
            assert torch.equal(ops.lenet(x, parameters), strict) == (conv == "ieee" or matmul == "ieee")
            assert torch.equal(layer(), strict_layer) == (conv == "ieee")
    finally:
        for flag, precision in zip(flags, before, strict=True):
            flag.fp32_precision = precision
    assert torch.equal(ops.lenet(x, parameters), strict)


@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_a_gpu_without_tensor_cores_for_it(ops, control, precision):
    """float32 stays strict, the 16-bit types go layer by layer; both paths agree within the rounding."""
    control.cuda_on_cpu_configure(network(precision), 0, 0)
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    x = torch.randn(3, 1, 32, 32, dtype=dtype)
    with tf32_allowed(True, False):
        strict = ops.lenet(x, parameters)
    with tf32_allowed(True, precision == "tf32"):
        on_tensor_cores = ops.lenet(x, parameters)
        with without_tensor_cores(control):
            before = control.cuda_on_cpu_launches()
            got = ops.lenet(x, parameters)
            launches = control.cuda_on_cpu_launches() - before
    assert launches == (1 if precision == "tf32" else 4)  # in 16 bits the first linear layer is the vendor's
    if precision == "tf32":
        assert torch.equal(got, strict)
        assert not torch.equal(got, on_tensor_cores)
    torch.testing.assert_close(got, on_tensor_cores, rtol=0, atol=TOLERANCES[precision])


@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_the_tensor_cores_do_not_see_the_batch(ops, control, precision):
    """Bit by bit: an image's results do not depend on the batch's size, nor on its place in it, nor on addresses."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    moved = [torch.empty(p.numel() + 1, dtype=dtype)[1:].view(p.shape).copy_(p) for p in parameters]
    x = torch.randn(33, 1, 32, 32, dtype=dtype)
    odd = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)
    with tf32_allowed(True, precision == "tf32"):
        whole = ops.lenet_with_activations(x, parameters)
        for begin, end in [(0, 1), (5, 8), (16, 33)]:
            part = ops.lenet_with_activations(odd[begin:end], moved)
            for one, other in zip(part, whole, strict=True):
                assert torch.equal(one, other[begin:end])


@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_tensor_cores_keep_non_finite_pixels_where_they_belong(ops, control, value, precision):
    """The outputs that see such a pixel are those of stock, and no other changes."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    dtype = dtype_of(precision)
    net, parameters = reference_net(1, 10, dtype)
    x = torch.randn(4, 1, 32, 32, dtype=dtype)
    x[2, 0, 9, 14] = value
    with tf32_allowed(True, precision == "tf32"):
        output, pooled1, indices1, pooled2 = ops.lenet_with_activations(x, parameters)[:4]
        clean = ops.lenet_with_activations(x.where(x.isfinite(), 0), parameters)
    net = net.double()
    expected1 = F.max_pool2d(net.conv1(x.double()).relu(), 2)
    expected2 = F.max_pool2d(net.conv2(expected1).relu(), 2)
    tolerance = TOLERANCES[precision]
    for got, want in ((pooled1, expected1), (pooled2, expected2)):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * 4, equal_nan=True)
    assert torch.equal(indices1 == 255, pooled1 <= 0)
    keep = torch.arange(4) != 2
    for one, other in zip((output, pooled1, indices1, pooled2), clean[:4], strict=True):
        assert torch.equal(one[keep], other[keep])
    assert bool(output[2].isfinite().all()) == bool(net(x.double())[2].isfinite().all())


@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_a_layer_is_as_in_the_whole_network(ops, control, precision):
    """Bit by bit, non-finite pixels included, wherever in a batch or in memory an image lies."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    x = torch.randn(33, 1, 32, 32, dtype=dtype)
    x[6, 0, 9, 14], x[20, 0, 31, 0] = float("nan"), float("inf")
    moved = [torch.empty(p.numel() + 1, dtype=dtype)[1:].view(p.shape).copy_(p) for p in parameters[:4]]
    with tf32_allowed(True, precision == "tf32"):
        pooled1, indices1, pooled2, indices2 = ops.lenet_with_activations(x, parameters)[1:5]
        for images, (w, b), expected in (
            (x, moved[:2], (pooled1, indices1)),
            (pooled1, moved[2:], (pooled2, indices2)),
        ):
            odd = torch.empty(images.numel() + 1, dtype=dtype)[1:].view(images.shape).copy_(images)
            for begin, end in [(0, 33), (6, 7), (5, 8), (16, 33)]:
                part = odd[begin:end] if begin else images
                got = ops.conv_relu_max_pool2d_with_indices(part, w, b, *PLAIN.values(), False)
                for one, other in zip(got, expected, strict=True):
                    torch.testing.assert_close(one, other[begin:end], rtol=0, atol=0, equal_nan=True)


LAYERS, CLUSTERS, STRICT, TENSOR_CORES, LEAN, LEAN_CONVOLUTIONS = range(6)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.skipif(not RESULTS.is_dir(), reason="a source distribution comes without results")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_the_forward_pass_takes_what_was_fastest(control, ops, precision):
    """On the H100 of benchmarks/results, within 10%: where two are that close, it is the one with fewer launches."""
    table = json.loads((RESULTS / "gpu-h100-2026-11-26.json").read_text())
    median = {}
    for row in (dict(zip(table["columns"], values, strict=True)) for values in table["rows"]):
        if row["case"] == "net" and row["mode"] == "forward":
            median[row["precision"], row["batch"], row["provider"]] = row["median_us"]
    batches = sorted({batch for of, batch, _ in median if of == precision})
    assert len(batches) == 7
    for batch in batches:
        times = {LAYERS: median[precision, batch, "ours layered graph"]}
        strict = median["float32", batch, "ours graph"]
        if batch <= 128:
            times[CLUSTERS] = strict  # taken to be the same in 16 bits
        elif precision != "bfloat16":
            times[STRICT] = strict
        if precision != "float32":
            times[TENSOR_CORES] = median[precision, batch, "ours graph"]
        for training in (False, True):
            tf32 = [precision == "tf32"] * 2
            path = control.cuda_on_cpu_lenet_forward_path(precision == "bfloat16", *tf32, training, batch)
            if path == LEAN:  # not measured
                assert precision == "bfloat16"
                assert batch >= (2048 if training else 1024)
            elif path == LEAN_CONVOLUTIONS:  # nor these, in the place of the layers
                assert precision == "tf32"
                assert times[LAYERS] <= 1.1 * min(times.values())
            else:
                assert times[path] <= 1.1 * min(times.values()), f"{path} for {batch} images"


def test_each_way_through_the_network_can_be_forced(control, ops):
    cases = [(False, False, False, False), (False, True, True, False), (True, *[False] * 3), (True, False, False, True)]
    for batch, of_float32 in ((1, CLUSTERS), (65536, STRICT)):

        def paths(algorithm, batch=batch):
            control.cuda_on_cpu_configure(algorithm, 0, 0)
            return [control.cuda_on_cpu_lenet_forward_path(*case, batch) for case in cases]

        assert paths(DIRECT) == [of_float32, TENSOR_CORES, LEAN, TENSOR_CORES]
        assert paths(VENDOR) == [LAYERS] * 4


def test_convolutions_in_tf32_are_one_launch_from_some_batch_on(control, ops):
    """Alone, as torch allows it by default, from a larger one: each layer keeps to the flag of its own kind."""

    def paths(convolutions, products=False, training=False):
        batches = (64, 511, 512, 1024, 2048, 8191, 8192)
        return [
            control.cuda_on_cpu_lenet_forward_path(False, convolutions, products, training, batch) for batch in batches
        ]

    for training in (False, True):
        assert paths(True, True, training) == [CLUSTERS, STRICT, *[LEAN_CONVOLUTIONS] * 5]
        assert paths(True, False, training) == [CLUSTERS, *[STRICT] * 3, *[LEAN_CONVOLUTIONS] * 3]
        assert paths(False, True, training) == [CLUSTERS, *[STRICT] * 5, LAYERS]
        assert paths(False, False, training) == [CLUSTERS, *[STRICT] * 5, LAYERS]
    control.cuda_on_cpu_configure(VENDOR, 0, 0)
    assert paths(True, True) == [LAYERS] * 7
    control.cuda_on_cpu_configure(-1, 0, 0)
    with without_tensor_cores(control):
        assert paths(True, True) == [*[STRICT] * 6, LAYERS]
    with shared_memory(control, 99):
        assert paths(True, True) == [STRICT, STRICT, *[LAYERS] * 5]


def test_small_batches_are_strict_where_tf32_is_slower(control, ops):
    _, parameters = reference_net(1, 10, torch.float32)
    x = torch.randn(3, 1, 32, 32)
    strict = ops.lenet_with_activations(x, parameters)
    with tf32_allowed(True, True):
        assert torch.equal(ops.lenet(x, parameters), strict[0])
        for got, want in zip(ops.lenet_with_activations(x, parameters), strict, strict=True):
            assert torch.equal(got, want)


SIXTEEN_BITS = ["float16", "bfloat16"]


@pytest.mark.parametrize(("batch", "classes"), [(1, 10), (3, 1), (17, 7), (35, 128)])
@pytest.mark.parametrize("precision", SIXTEEN_BITS)
def test_inference_is_two_launches(ops, control, batch, classes, precision):
    dtype = dtype_of(precision)
    net, parameters = reference_net(1, classes, dtype)
    x = torch.randn(batch, 1, 32, 32, dtype=dtype)
    before = control.cuda_on_cpu_launches()
    output = under_schedules(control, DIRECT, lambda: ops.lenet(x, parameters))[0]
    assert control.cuda_on_cpu_launches() - before == 2 * len(SCHEDULES)
    expected = net.double()(x.double()).detach()
    tolerance = TOLERANCES[precision]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert torch.equal(ops.lenet(moved(x), [moved(p) for p in parameters]), output)


@pytest.mark.parametrize("precision", SIXTEEN_BITS)
def test_inference_does_not_see_the_batch(ops, control, precision):
    """Bit by bit, as in the other kernels on the tensor cores."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    _, parameters = reference_net(1, 10, dtype_of(precision))
    x = torch.randn(35, 1, 32, 32, dtype=dtype_of(precision))
    whole = ops.lenet(x, parameters)
    for begin, end in [(0, 1), (5, 8), (15, 33)]:
        assert torch.equal(ops.lenet(x[begin:end], parameters), whole[begin:end])


# A pixel that all eight positions of its patch see, and others; corners; the last one, behind which there is nothing.
@pytest.mark.parametrize("pixel", [(0, 0), (2, 3), (9, 14), (31, 31)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", SIXTEEN_BITS)
def test_inference_keeps_non_finite_pixels_where_they_belong(ops, control, precision, value, pixel):
    control.cuda_on_cpu_configure(DIRECT, 2, 3)
    dtype = dtype_of(precision)
    net, parameters = reference_net(1, 10, dtype)
    x = torch.randn(18, 1, 32, 32, dtype=dtype)
    clean = ops.lenet(x, parameters)
    x[17, 0, pixel[0], pixel[1]] = value
    output = ops.lenet(x, parameters)
    assert torch.equal(output[:17], clean[:17])
    expected = net.double()(x.double()).detach()
    torch.testing.assert_close(output.double(), expected, rtol=TOLERANCES[precision], atol=0.02, equal_nan=True)


@pytest.mark.parametrize("precision", SIXTEEN_BITS)
def test_inference_multiplies_no_infinity_by_padding(ops, control, precision):
    """Infinite hidden values that ReLU stops leave the logits finite."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    dtype = dtype_of(precision)
    net, parameters = reference_net(1, 10, dtype)
    net.fc1.bias.data[7] = float("inf")
    net.fc2.weight.data[:, 7] = -1
    x = torch.randn(3, 1, 32, 32, dtype=dtype)
    assert torch.equal(ops.lenet(x, parameters), net.fc3.bias.detach().expand(3, 10))


@pytest.mark.parametrize("precision", SIXTEEN_BITS)
def test_where_inference_has_no_kernels(ops, control, precision):
    """More classes, no tensor cores: layer by layer. Too little shared memory: in one launch."""
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    dtype = dtype_of(precision)
    x = torch.randn(3, 1, 32, 32, dtype=dtype)

    def launches(classes):
        net, parameters = reference_net(1, classes, dtype)
        before = control.cuda_on_cpu_launches()
        output = ops.lenet(x, parameters)
        expected, tolerance = net.double()(x.double()).detach(), TOLERANCES[precision]
        scale = float(expected.abs().max())
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance * scale)
        return control.cuda_on_cpu_launches() - before

    assert launches(128) == 2
    assert launches(129) == 5
    with without_tensor_cores(control):
        assert launches(10) == 5
    with shared_memory(control, 99):
        assert launches(10) == 1


@pytest.mark.extended
def test_large_batches_by_the_rule(ops, control):
    """16 bits: inference in its two launches, with gradients by layers; the linear ones are the vendor's."""
    _, parameters = reference_net(1, 10, torch.bfloat16)
    x = torch.randn(1024, 1, 32, 32, dtype=torch.bfloat16)
    before = control.cuda_on_cpu_launches()
    output = ops.lenet(x, parameters)
    assert control.cuda_on_cpu_launches() - before == 2
    torch.testing.assert_close(output, ops.lenet_with_activations(x, parameters)[0], rtol=0, atol=0.02)
    assert control.cuda_on_cpu_launches() - before == 4


@pytest.mark.extended
def test_a_large_batch_of_training_by_the_rule(ops, control):
    """16 bits: two launches forward; backward three for the linear layers and two for the convolutions."""
    batch = 2050
    net, parameters = reference_net(1, 10, torch.bfloat16)
    x, g = torch.randn(batch, 1, 32, 32).bfloat16(), torch.randn(batch, 10).bfloat16()
    before = control.cuda_on_cpu_launches()
    output, *activations = ops.lenet_with_activations(x, parameters)
    assert control.cuda_on_cpu_launches() - before == 2
    tolerance = TOLERANCES["bfloat16"]
    torch.testing.assert_close(output.double(), net.double()(x.double()).detach(), rtol=tolerance, atol=tolerance)
    for i, images, pooled, indices in ((0, x, *activations[:2]), (2, activations[0], *activations[2:4])):
        operands = [t.double() for t in (images, parameters[i], parameters[i + 1])]
        at_winners = torch.ops.lenet_ext.conv_at_indices(*operands, indices, *PLAIN.values())
        torch.testing.assert_close(pooled.double(), at_winners, rtol=tolerance, atol=tolerance)
    hidden = activations[2].flatten(1)
    for i, kept in ((4, activations[4]), (6, activations[5])):
        expected = F.relu(F.linear(hidden.double(), parameters[i].double(), parameters[i + 1].double()))
        torch.testing.assert_close(kept.double(), expected, rtol=tolerance, atol=tolerance)
        hidden = kept
    got = gradients(ops, g, x, parameters, activations)
    assert control.cuda_on_cpu_launches() - before == 7
    for one, other in zip(got[:-1], exact_gradients(g, x, parameters, activations), strict=True):
        assert float((one.double() - other).norm()) <= 2 * tolerance * float(other.norm())


def lean_convolutions(control, x, parameters, keep):
    """What the kernel computes in TF32: pooled1 and its winners, if they are kept, and pooled2 and its."""
    batch = len(x)
    pooled1, pooled2 = (torch.full((batch, *shape), float("nan")) for shape in ((6, 14, 14), (16, 5, 5)))
    indices1, indices2 = (torch.full(t.shape, 7, dtype=torch.uint8) for t in (pooled1, pooled2))
    addresses = (ctypes.c_void_p * 4)(*(p.data_ptr() for p in parameters[:4]))
    kept = [t.data_ptr() if keep else None for t in (pooled1, indices1, indices2)]
    control.cuda_on_cpu_lean_convolutions(batch, x.data_ptr(), addresses, *kept[:2], pooled2.data_ptr(), kept[2])
    return (pooled1, indices1, pooled2, indices2) if keep else (pooled2,)


@pytest.mark.parametrize("batch", [1, 3, 17, 35])
def test_both_convolutions_in_tf32_are_one_launch(ops, control, batch):
    net, parameters = reference_net(1, 10, torch.float32)
    x = torch.randn(batch, 1, 32, 32)
    before = control.cuda_on_cpu_launches()
    kept = under_schedules(control, -1, lambda: lean_convolutions(control, x, parameters, True))
    assert control.cuda_on_cpu_launches() - before == len(SCHEDULES)
    pooled1, indices1, pooled2, indices2 = kept
    inference = under_schedules(control, -1, lambda: lean_convolutions(control, x, parameters, False))
    assert torch.equal(inference[0], pooled2)
    net = net.double()
    expected1 = F.max_pool2d(net.conv1(x.double()).relu(), 2).detach()
    expected2 = F.max_pool2d(net.conv2(expected1).relu(), 2).detach()
    tolerance = TOLERANCES["tf32"]
    for got, want in ((pooled1, expected1), (pooled2, expected2)):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.max()))
    # What won each window, by its value; and that it is not rounded to what it is multiplied as.
    for i, images, pooled, indices in ((0, x, pooled1, indices1), (2, pooled1, pooled2, indices2)):
        operands = [t.double() for t in (images, parameters[i], parameters[i + 1])]
        at_winners = torch.ops.lenet_ext.conv_at_indices(*operands, indices, *PLAIN.values())
        torch.testing.assert_close(pooled.double(), at_winners, rtol=tolerance, atol=tolerance)
        assert torch.equal(indices == 255, pooled == 0)
        assert bool((pooled.view(torch.int32) & 0x1FFF).any())
    for begin, end in [(0, 1), (5, 8), (15, 33)]:
        part = lean_convolutions(control, x[begin:end].clone(), parameters, True)
        for one, other in zip(part, kept, strict=True):
            assert torch.equal(one, other[begin:end])


@pytest.mark.parametrize("pixel", [(0, 0), (2, 3), (9, 14), (31, 31)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_both_convolutions_in_tf32_keep_non_finite_pixels_where_they_belong(ops, control, value, pixel):
    control.cuda_on_cpu_configure(-1, 2, 3)
    net, parameters = reference_net(1, 10, torch.float32)
    x = torch.randn(10, 1, 32, 32)
    clean = lean_convolutions(control, x, parameters, True)
    x[9, 0, pixel[0], pixel[1]] = value
    got = lean_convolutions(control, x, parameters, True)
    for one, other in zip(got, clean, strict=True):
        assert torch.equal(one[:9], other[:9])
    net = net.double()
    expected1 = F.max_pool2d(net.conv1(x.double()).relu(), 2).detach()
    expected2 = F.max_pool2d(net.conv2(expected1).relu(), 2).detach()
    tolerance = TOLERANCES["tf32"]
    for pooled, want in ((got[0], expected1), (got[2], expected2)):
        torch.testing.assert_close(pooled.double(), want, rtol=tolerance, atol=4 * tolerance, equal_nan=True)
    for pooled, indices in ((got[0], got[1]), (got[2], got[3])):
        assert torch.equal(indices == 255, pooled <= 0)


def tf32_linears(control, features, parameters, keep):
    """The linear layers in TF32: the output, and the hidden layers, if they are kept."""
    batch, classes = len(features), len(parameters[8])
    output, hidden1, hidden2 = (torch.full((batch, width), float("nan")) for width in (classes, 120, 84))
    addresses = (ctypes.c_void_p * 10)(*(p.data_ptr() for p in parameters))
    kept = [t.data_ptr() if keep else None for t in (hidden1, hidden2)]
    error = control.cuda_on_cpu_tf32_linears(batch, classes, features.data_ptr(), addresses, *kept, output.data_ptr())
    assert error == 0
    return (output, hidden1, hidden2) if keep else (output,)


# A warp has 32 images; each multiprocessor gets one before one gets another.
@pytest.mark.parametrize(("batch", "classes"), [(1, 10), (31, 1), (33, 11), (70, 128), extended(300, 10)])
def test_the_linear_layers_in_tf32_are_one_launch(ops, control, batch, classes):
    net, parameters = reference_net(1, classes, torch.float32)
    features = torch.randn(batch, 400).relu()
    before = control.cuda_on_cpu_launches()
    kept = under_schedules(control, -1, lambda: tf32_linears(control, features, parameters, True))
    assert control.cuda_on_cpu_launches() - before == len(SCHEDULES)
    assert torch.equal(
        under_schedules(control, -1, lambda: tf32_linears(control, features, parameters, False))[0], kept[0]
    )
    net, expected = net.double(), [features.double()]
    for layer in (net.fc1, net.fc2, net.fc3):
        expected.append(layer(expected[-1] if layer is net.fc1 else expected[-1].relu()).detach())
    tolerance = TOLERANCES["tf32"]
    for got, want in zip(kept, (expected[3], expected[1].relu(), expected[2].relu()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    assert bool((kept[1].view(torch.int32) & 0x1FFF).any())  # not rounded to what it is multiplied as
    part = tf32_linears(control, features[batch // 2 :].clone(), parameters, True)
    for one, other in zip(part, kept, strict=True):
        assert torch.equal(one, other[batch // 2 :])
    # Infinities in an image are that image's alone; a weight behind the last output would make NaN of them.
    features[batch // 3, 5] = float("inf")
    got = tf32_linears(control, features, parameters, True)
    keep = torch.arange(batch) != batch // 3
    for one, other in zip(got, kept, strict=True):
        assert torch.equal(one[keep], other[keep])
    torch.testing.assert_close(got[1][batch // 3].isinf(), parameters[4][:, 5] > 0)


def test_where_the_linear_layers_in_tf32_are_taken(ops, control):
    def taken(products=True):
        return [control.cuda_on_cpu_has_linears_in_one_launch(products, batch) for batch in (4095, 4096)]

    assert taken() == [False, True]
    assert taken(products=False) == [False, False]
    with without_tensor_cores(control):
        assert taken() == [False, False]
    with shared_memory(control, 163):
        assert taken() == [False, False]


@pytest.mark.extended
def test_large_batches_in_tf32_by_the_rule(ops, control):
    """Both convolutions are a launch, the linear layers the vendor's; the gradients are five launches."""
    net, parameters = reference_net(1, 10, torch.float32)

    def repeated(tensor, times):
        return tensor.repeat(times, *[1] * (tensor.dim() - 1))

    few, g = torch.randn(19, 1, 32, 32), torch.randn(19, 10)
    x, g = repeated(few, 27), repeated(g, 27)
    with tf32_allowed(True, True):
        before = control.cuda_on_cpu_launches()
        output, *activations = ops.lenet_with_activations(x, parameters)
        assert control.cuda_on_cpu_launches() - before == 1
        for one, other in zip(activations[:4], lean_convolutions(control, few, parameters, True), strict=True):
            assert torch.equal(one, repeated(other, 27))
        many = [repeated(tensor, 4) for tensor in (g, x, *activations)]
        before = control.cuda_on_cpu_launches()
        got = gradients(ops, many[0], many[1], parameters, many[2:])
        assert control.cuda_on_cpu_launches() - before == 5
    expected = net.double()(x.double()).detach()
    torch.testing.assert_close(output.double(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
    for one, other in zip(got[:-1], exact_gradients(g, x, parameters, activations), strict=True):
        assert float((one.double() / 4 - other).norm()) <= 1e-3 * float(other.norm())


@pytest.mark.parametrize("training", [False, True])
def test_the_whole_network_with_nan_and_views(ops, training):
    """A NaN in one image reaches that image's outputs alone; parameters may be slices at any address."""
    _, parameters = reference_net(1, 10, torch.float32)
    moved = [torch.empty(p.numel() + 1)[1:].view(p.shape).copy_(p) for p in parameters]
    x = torch.randn(13, 1, 34, 33)[:, :, 1:33, :32]
    forward = ops.lenet_with_activations if training else ops.lenet
    output = forward(x, parameters)
    assert torch.equal(forward(x, moved)[0] if training else forward(x, moved), output[0] if training else output)
    x[6, 0, 15, 15] = float("nan")
    broken = forward(x, parameters)[0] if training else forward(x, parameters)
    output = output[0] if training else output
    assert bool(broken[6].isnan().all())
    keep = torch.arange(13) != 6
    assert torch.equal(broken[keep], output[keep])


@pytest.mark.parametrize("classes", [10, extended(1), extended(128)])
def test_an_image_is_the_same_in_a_batch_of_any_size(ops, control, classes):
    """Whether eight blocks, four or two compute it together or one block computes many, with or without gradients."""
    _, parameters = reference_net(1, classes, torch.float32)
    x = torch.randn(131, 1, 32, 32)
    x[3, 0, 9, 14], x[50, 0, 31, 0] = float("nan"), float("inf")
    odd = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    with capability(control, 80):  # no clusters
        expected = ops.lenet_with_activations(x, parameters)
    for begin, end in [(0, 1), (2, 18), (40, 72), (0, 64), (66, 131), (3, 131), (0, 131)]:
        for images in (x, odd):
            got = ops.lenet_with_activations(images[begin:end], parameters)
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other[begin:end], rtol=0, atol=0, equal_nan=True)
            output = ops.lenet(images[begin:end], parameters)
            torch.testing.assert_close(output, got[0], rtol=0, atol=0, equal_nan=True)


def test_a_colour_image_is_the_same_in_a_batch_of_any_size(ops):
    """In blocks of one image, of two, and of four, which have tiles of their own, with or without gradients."""
    _, parameters = reference_net(3, 10, torch.float32)
    x = torch.randn(257, 3, 32, 32)
    x[2] = x[2].sign()  # ties
    x[3, 1, 9, 14], x[128, 2, 31, 0] = float("nan"), float("inf")
    expected = ops.lenet_with_activations(x, parameters)
    torch.testing.assert_close(ops.lenet(x, parameters), expected[0], rtol=0, atol=0, equal_nan=True)
    for begin, end in [(0, 5), (127, 129), (0, 129)]:
        got = ops.lenet_with_activations(x[begin:end], parameters)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other[begin:end], rtol=0, atol=0, equal_nan=True)


def test_inference_of_many_images_looks_for_no_winners(ops, control):
    """Bit by bit with the values that training keeps, in the whole network and in its layers."""
    _, parameters = reference_net(1, 10, torch.float32)
    x = torch.randn(257, 1, 32, 32)
    x[100] = x[100].sign()  # ties
    x[3, 0, 9, 14], x[256, 0, 31, 0] = float("nan"), float("inf")
    output, pooled1, *_ = ops.lenet_with_activations(x, parameters)
    torch.testing.assert_close(ops.lenet(x, parameters), output, rtol=0, atol=0, equal_nan=True)
    control.cuda_on_cpu_configure(DIRECT, 2, 1)
    for images, (w, b) in ((x, parameters[:2]), (pooled1, parameters[2:4])):
        got = ops.conv_relu_max_pool2d(images, w, b, *PLAIN.values(), False)
        expected = ops.conv_relu_max_pool2d_with_indices(images, w, b, *PLAIN.values(), False)[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", SIXTEEN_BITS)
def test_an_image_is_the_same_in_clusters_of_any_size(ops, precision):
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    x = torch.randn(37, 1, 32, 32, dtype=dtype)
    x[3, 0, 9, 14], x[30, 0, 31, 0] = float("nan"), float("inf")
    expected = ops.lenet_with_activations(x, parameters)
    for begin, end in [(0, 1), (5, 25), (20, 36)]:
        got = ops.lenet_with_activations(moved(x[begin:end]), [moved(p) for p in parameters])
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other[begin:end], rtol=0, atol=0, equal_nan=True)


# From 257 images on, blocks take two each, from 513 on three: the launch is another one.
@pytest.mark.parametrize(
    ("batch", "classes", "schedules"),
    [(1, 10, 3), (2, 128, 3), (3, 1, 3), (17, 7, 3), (33, 10, 3), extended(257, 10, 1), extended(513, 10, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_whole_networks_backward_is_two_launches(ops, control, channels, dtype, batch, classes, schedules):
    net, parameters = reference_net(channels, classes, dtype)
    x, g = torch.randn(batch, channels, 32, 32, dtype=dtype), torch.randn(batch, classes, dtype=dtype)
    activations = ops.lenet_with_activations(x, parameters)[1:]
    control.cuda_on_cpu_configure(-1, 2, 0)
    before = control.cuda_on_cpu_launches()
    got = gradients(ops, g, x, parameters, activations)
    assert control.cuda_on_cpu_launches() == before + 2
    assert got[-1].shape == (0,)
    for schedule, seed in SCHEDULES[: schedules - 1]:
        control.cuda_on_cpu_configure(-1, schedule, seed)
        for one, other in zip(gradients(ops, g, x, parameters, activations), got, strict=True):
            assert torch.equal(one, other), "the result depends on the order of threads"

    assert_gradients_close(got[:-1], exact_gradients(g, x, parameters, activations))
    if dtype != torch.float32:  # whose winners are stock's, and whose layers' gradients are not rounded on the way
        return
    stock = torch.autograd.grad(net.double()(x.double()), list(net.parameters()), g.double())
    assert_gradients_close(got[:-1], stock)
    control.cuda_on_cpu_configure(VENDOR, 0, 0)
    assert_gradients_close(got[:-1], gradients(ops, g, x, parameters, activations)[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_whole_networks_backward_with_views_and_the_inputs_gradient(ops, control, dtype):
    """Operands may be slices at any address, or have any strides; the input's gradient is a third launch."""
    _, parameters = reference_net(1, 10, dtype)
    x, g = torch.randn(5, 1, 32, 32, dtype=dtype), torch.randn(5, 10, dtype=dtype)
    activations = ops.lenet_with_activations(x, parameters)[1:]
    before = control.cuda_on_cpu_launches()
    expected = gradients(ops, g, x, parameters, activations, True)
    assert control.cuda_on_cpu_launches() == before + 3
    without = gradients(ops, g, x, parameters, activations)
    for one, other in zip(without[:-1], expected[:-1], strict=True):
        assert torch.equal(one, other)

    def moved(tensor):
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)

    def strided(tensor):
        return torch.zeros(*tensor.shape, 2, dtype=tensor.dtype).select(-1, 1).copy_(tensor)

    for view in (moved, strided):
        operands = [view(t) for t in (g, x)], [view(p) for p in parameters], [view(a) for a in activations]
        got = gradients(ops, *operands[0], *operands[1:], True)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
        assert all(gradient.is_contiguous() for gradient in got)


# 100 images: clusters of two blocks. 520, 900, 1,290: blocks of 6, 8 and 10 images, which do not fit but for the last
# in 99 KB: they take all of it.
@pytest.mark.parametrize(
    ("precision", "batch", "kilobytes"),
    [
        ("float32", 100, 99),
        extended("float32", 1290, 64),
        extended("float32", 1290, 99),
        extended("tf32", 520, 64),
        extended("float16", 900, 50),
    ],
)
def test_the_whole_network_with_less_shared_memory(ops, control, precision, batch, kilobytes):
    """Fewer images pass through a block at once, with the same result."""
    control.cuda_on_cpu_configure(network(precision), 0, 0)
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    x = torch.randn(batch, 1, 32, 32, dtype=dtype)
    with tf32_allowed(precision == "tf32", precision == "tf32"):
        expected = ops.lenet(x, parameters)
        with shared_memory(control, kilobytes):
            assert torch.equal(ops.lenet(x, parameters), expected)


@pytest.mark.parametrize("kilobytes", [64, extended(80)])
def test_the_whole_networks_backward_with_less_shared_memory(ops, control, kilobytes):
    """Slices of three images pass one by one or by twos instead of together."""
    _, parameters = reference_net(1, 10, torch.float32)
    x, g = torch.randn(513, 1, 32, 32), torch.randn(513, 10)
    activations = ops.lenet_with_activations(x, parameters)[1:]
    expected = gradients(ops, g, x, parameters, activations)
    with shared_memory(control, kilobytes):
        got = gradients(ops, g, x, parameters, activations)
    assert_gradients_close(got, [gradient.double() for gradient in expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_whole_networks_backward_passes_nan_on(ops, control, dtype):
    """NaN in one image, or in the gradient of its output, reaches what it reaches layer by layer."""
    _, parameters = reference_net(1, 10, dtype)
    for where in ("input", "grad_output"):
        x, g = torch.randn(9, 1, 32, 32, dtype=dtype), torch.randn(9, 10, dtype=dtype)
        (x[6, 0, 15] if where == "input" else g[6, 3:4]).fill_(float("nan"))
        activations = ops.lenet_with_activations(x, parameters)[1:]
        control.cuda_on_cpu_configure(VENDOR, 0, 0)
        expected = gradients(ops, g, x, parameters, activations)
        for algorithm in (-1, DIRECT):
            control.cuda_on_cpu_configure(algorithm, 0, 0)
            got = gradients(ops, g, x, parameters, activations)
            for one, other in zip(got, expected, strict=True):
                assert torch.equal(one.isnan(), other.isnan())
            assert bool(got[0].isnan().any())


TWO_LAUNCHES, CONVOLUTIONS_ON_TENSOR_CORES = 1, 2


def test_each_way_through_the_backward_pass_can_be_forced(control, ops):
    def paths(algorithm, *of):
        control.cuda_on_cpu_configure(algorithm, 0, 0)
        return [control.cuda_on_cpu_lenet_backward_path(*of, batch) for batch in (0, 1, 2048, 2049, 65536)]

    # bfloat16, TF32 in convolutions, in products, gradient of the input
    strict = [(False, *flags, False) for flags in [(False, False), (True, False), (False, True)]]
    on_tensor_cores = [(False, True, True, False), (True, False, False, False)]
    input_gradient = [(False, True, True, True), (True, False, False, True)]
    small = [LAYERS, TWO_LAUNCHES, TWO_LAUNCHES]
    for of in strict + input_gradient:
        assert paths(-1, *of) == [*small, LAYERS, LAYERS]
        assert paths(DIRECT, *of) == [LAYERS, *[TWO_LAUNCHES] * 4]
    for of in on_tensor_cores:
        assert paths(-1, *of) == [*small, *[CONVOLUTIONS_ON_TENSOR_CORES] * 2]
        assert paths(DIRECT, *of) == [LAYERS, *[CONVOLUTIONS_ON_TENSOR_CORES] * 4]
        assert paths(VENDOR, *of) == [LAYERS] * 5
        with without_tensor_cores(control):
            assert paths(-1, *of) == [*small, LAYERS, LAYERS]
        with shared_memory(control, 64):
            assert paths(-1, *of) == [*small, LAYERS, LAYERS]


# 513 images: slices of four.
@pytest.mark.parametrize("batch", [1, 2, 3, 17, extended(513)])
@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_the_gradients_on_the_tensor_cores(ops, control, batch, precision):
    """Three launches for the linear layers, two for the convolutions; operands may be slices at any address."""
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    x, g = torch.randn(batch, 1, 32, 32, dtype=dtype), torch.randn(batch, 10, dtype=dtype)
    activations = ops.lenet_with_activations(x, parameters)[1:]
    control.cuda_on_cpu_configure(DIRECT, 0, 0)
    strict = gradients(ops, g, x, parameters, activations)
    with tf32_allowed(precision == "tf32", precision == "tf32"):
        before = control.cuda_on_cpu_launches()
        got = under_schedules(control, DIRECT, lambda: gradients(ops, g, x, parameters, activations))
        assert control.cuda_on_cpu_launches() - before == len(SCHEDULES) * (3 + 2)
        operands = moved(x), [moved(p) for p in parameters], [moved(a) for a in activations]
        for one, other in zip(gradients(ops, moved(g), *operands), got, strict=True):
            assert torch.equal(one, other)
    exact = exact_gradients(g, x, parameters, activations)
    for one, other in zip(got[:-1], exact, strict=True):
        assert float((one.double() - other).norm()) <= 2 * TOLERANCES[precision] * float(other.norm())
    if precision == "tf32":  # and that of one rounding a layer, not of several
        for i in range(4):
            assert not torch.equal(got[i], strict[i])
            assert float((got[i].double() - exact[i]).norm()) <= 2e-3 * float(exact[i].norm())


# Warps of 32 images, of which a product has 16; slices of 64; one step of the last layer's operands, or several.
@pytest.mark.parametrize(
    ("batch", "classes"),
    [(1, 1), (2, 20), *[extended(*case) for case in ((3, 7), (17, 128), (65, 10))]],
)
@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_the_linear_layers_gradients_on_the_tensor_cores(ops, control, batch, classes, precision):
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, classes, dtype)
    x, g = torch.randn(batch, 1, 32, 32, dtype=dtype), torch.randn(batch, classes, dtype=dtype)
    activations = ops.lenet_with_activations(x, parameters)[1:]
    with tf32_allowed(precision == "tf32", precision == "tf32"):
        got = under_schedules(control, DIRECT, lambda: gradients(ops, g, x, parameters, activations))
    for one, other in zip(got[4:-1], exact_gradients(g, x, parameters, activations)[4:], strict=True):
        assert float((one.double() - other).norm()) <= TOLERANCES[precision] * float(other.norm())


@pytest.mark.parametrize("precision", ["float16", "tf32"])
def test_the_linear_layers_gradients_keep_non_finite_values_where_they_belong(ops, control, precision):
    """As in the layers: ReLU lets pass where it is NaN; what fills up a product is zero times zero."""
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    x, g = torch.randn(18, 1, 32, 32, dtype=dtype), torch.randn(18, 10, dtype=dtype)
    clean = ops.lenet_with_activations(x, parameters)[1:]
    features, hidden1, hidden2 = 2, 4, 5  # among the activations
    nan, inf = float("nan"), float("inf")

    def results(algorithm, at, image, place, value):
        control.cuda_on_cpu_configure(algorithm, 2, 5)
        grad, kept = g.clone(), [tensor.clone() for tensor in clean]
        (grad if at is None else kept[at].view(18, -1))[image, place] = value
        with tf32_allowed(precision == "tf32", precision == "tf32"):
            return gradients(ops, grad, x, parameters, kept)[4:-1]

    tolerance = 4 * TOLERANCES[precision]
    for at, width in ((None, 10), (features, 400), (hidden1, 120), (hidden2, 84)):
        for image, place, value in ((0, 0, nan), (17, width - 1, inf), (9, width // 2, -inf)):
            direct, layers = (results(algorithm, at, image, place, value) for algorithm in (DIRECT, VENDOR))
            assert not all(bool(t.isfinite().all()) for t in layers)
            for one, other in zip(direct, layers, strict=True):
                finite = other[other.isfinite()]
                scale = float(finite.abs().max()) if finite.numel() else 0.0
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def test_where_the_linear_layers_gradients_are_no_kernels(ops, control):
    """More classes, or less shared memory than the weights take: each layer is two launches, as it is forced to be."""

    def launches(precision, classes):
        dtype = dtype_of(precision)
        _, parameters = reference_net(1, classes, dtype)
        x, g = torch.randn(2, 1, 32, 32, dtype=dtype), torch.randn(2, classes, dtype=dtype)
        activations = ops.lenet_with_activations(x, parameters)[1:]
        control.cuda_on_cpu_configure(DIRECT, 0, 0)
        before = control.cuda_on_cpu_launches()
        with tf32_allowed(precision == "tf32", precision == "tf32"):
            gradients(ops, g, x, parameters, activations)
        control.cuda_on_cpu_configure(-1, 0, 0)
        return control.cuda_on_cpu_launches() - before - 2  # of the convolutions

    assert launches("tf32", 128) == launches("bfloat16", 128) == 3
    assert launches("tf32", 129) == launches("bfloat16", 129) == 6
    with shared_memory(control, 163):
        assert launches("tf32", 10) == 6
        assert launches("bfloat16", 128) == 3


# Corners, whose taps no other pixel shares, and the middle; in the second image of a pass, and in one that is alone.
@pytest.mark.parametrize(("precision", "image"), [("bfloat16", 1), ("bfloat16", 2), ("tf32", 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_convolutions_gradients_keep_non_finite_values_where_they_belong(ops, control, value, precision, image):
    """They reach the taps that see them, and no other: what a product is filled up with is zero times zero."""
    dtype = dtype_of(precision)
    _, parameters = reference_net(1, 10, dtype)
    x, g = torch.randn(3, 1, 32, 32, dtype=dtype), torch.randn(3, 10, dtype=dtype)
    clean = ops.lenet_with_activations(x, parameters)[1:]
    of_images, of_pooled = [(0, 0), (0, 31), (9, 14), (31, 31)], [(0, 0), (0, 13), (7, 5), (13, 13)]
    for of_input, places in ((True, of_images), (False, of_pooled)):
        for place in places:
            images, pooled1 = x.clone(), clean[0].clone()
            (images if of_input else pooled1)[(image, -1, *place)] = value
            results = []
            for algorithm in (DIRECT, -1):
                control.cuda_on_cpu_configure(algorithm, 0, 0)
                with tf32_allowed(precision == "tf32", precision == "tf32"):
                    results.append(gradients(ops, g, images, parameters, [pooled1, *clean[1:]]))
            for one, other in zip(*results, strict=True):
                for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                    assert torch.equal(kind(one), kind(other))
            assert not bool(results[0][0 if of_input else 2].isfinite().all())


def test_the_whole_networks_backward_checks_its_activations(ops):
    """The kernels take addresses: what does not fit must not reach them."""
    _, parameters = reference_net(1, 10, torch.float32)
    x, g = torch.randn(3, 1, 32, 32), torch.randn(3, 10)
    names = ["pooled1", "indices1", "pooled2", "indices2", "hidden1", "hidden2"]
    good = dict(zip(names, ops.lenet_with_activations(x, parameters)[1:], strict=True))
    for name, tensor in good.items():
        for bad in (tensor[:2], tensor.double()):
            with pytest.raises(RuntimeError, match=f"lenet_backward: {name} must be"):
                gradients(ops, g, x, parameters, {**good, name: bad}.values())
    with pytest.raises(RuntimeError, match="lenet_backward: grad_output must be"):
        gradients(ops, g[:, :9], x, parameters, good.values())


# Loss, optimizer, its options as csrc/lenet/optimizer.h lists them, and how many tensors it keeps for a parameter.
STEPS = {
    "sgd": ("cross_entropy", "sgd", [0.05, *[0.0] * 6], 0),
    "momentum, first step": ("cross_entropy", "sgd", [0.05, 0.9, 0.0, 0.1, 1.0, 0.0, 1.0], 1),
    "momentum, later": ("mse", "sgd", [0.05, 0.9, 0.3, 0.1, 0.0, 1.0, 0.0], 1),
    "adam": ("cross_entropy", "adam", [0.01, 0.9, 0.99, 1e-3, 0.1, 0.0], 3),
    "adamw, amsgrad": ("mse", "adamw", [0.01, 0.5, 0.9, 1e-3, 0.1, 1.0], 4),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (5, 1), (3, 3), extended(300, 1)])
def test_a_training_step_is_two_launches(ops, control, batch, channels, name):
    """Against the operator of the CPU in float64, which is tested against PyTorch's own loop."""
    loss, optimizer, options, lists = STEPS[name]
    _, parameters = reference_net(channels, 10, torch.float32)
    images, targets = torch.randn(batch, channels, 32, 32), torch.randint(10, (batch,))
    weight = None
    if loss == "mse":
        targets = torch.randn(batch, 10)
    elif optimizer == "sgd":
        weight = torch.linspace(0.1, 2.0, 10)
        targets[1::3] = -100
    state = [torch.rand_like(p) for _ in range(min(lists, 4) - (lists >= 3)) for p in parameters]
    steps = [torch.tensor(3.0) for _ in parameters] if lists >= 3 else []

    def step(operators, dtype):
        changed = [p.to(dtype, copy=True) for p in parameters]
        kept = [s.to(dtype, copy=True) for s in state] + [s.clone() for s in steps]
        of_targets = targets.to(dtype) if loss == "mse" else targets
        value, correct = operators.lenet_training_step(
            images.to(dtype),
            of_targets,
            None if weight is None else weight.to(dtype),
            changed,
            kept,
            loss,
            0.1 if weight is not None else 0.0,
            -100,
            optimizer,
            options,
        )
        return value, correct, *changed, *kept

    before = control.cuda_on_cpu_launches()
    got = under_schedules(control, -1, lambda: step(ops, torch.float32))
    assert control.cuda_on_cpu_launches() - before == 2 * len(SCHEDULES)
    for one, other in zip(got, step(torch.ops.lenet_ext, torch.float64), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_image_is_trained_on_where_a_block_has_least_shared_memory(ops, control, channels):
    """64 KB, as GPUs of compute capability 7.5 have: the backward pass and the step have no other way."""
    _, parameters = reference_net(channels, 10, torch.float32)
    x, targets, g = torch.randn(1, channels, 32, 32), torch.tensor([3]), torch.randn(1, 10)
    activations = ops.lenet_with_activations(x, parameters)[1:]

    def both():
        changed = [p.clone() for p in parameters]
        options = [0.1, *[0.0] * 6]
        value, _ = ops.lenet_training_step(x, targets, None, changed, [], "cross_entropy", 0.0, -100, "sgd", options)
        return value, *changed, *gradients(ops, g, x, parameters, activations)

    expected = both()
    with without_tensor_cores(control), shared_memory(control, 64):
        got = both()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_training_steps_that_have_no_kernels(ops, control):
    """Other images, another dtype: forward pass, PyTorch's loss, backward pass, PyTorch's update."""
    for channels, dtype in [(2, torch.float32), (1, torch.float64)]:
        _, parameters = reference_net(channels, 10, dtype)
        images, targets = torch.randn(3, channels, 32, 32, dtype=dtype), torch.randint(10, (3,))
        results = []
        for operators in (ops, torch.ops.lenet_ext):
            changed = [p.clone() for p in parameters]
            value, _ = operators.lenet_training_step(
                images, targets, None, changed, [], "cross_entropy", 0.0, -100, "sgd", [0.1, *[0.0] * 6]
            )
            results.append([value, *changed])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
