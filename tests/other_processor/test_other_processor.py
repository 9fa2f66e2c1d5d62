"""The plain kernels, compiled for another kind of processor and run in its emulator: they must be right on ARM too. And
compiled for this one with AddressSanitizer and UndefinedBehaviorSanitizer, and with ThreadSanitizer. Their units of
work run on three threads.

Operands are small integers, so that every sum is exact and results are compared to the last bit.
"""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu.build import SANITIZERS, has_sanitizers
from reference import integers
from torch import Tensor

import lenet_ext

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
FLAGS += ["-Werror", "-DLENET_EXT_CPU_CAPABILITY=default_", "-DLENET_EXT_VECTOR_BYTES=16"]
# csrc/common/parallel.h insists on OpenMP, for torch's sake; here at::parallel_for is one of plain threads.
FLAGS += ["-D_OPENMP=1", "-DLENET_EXT_ALWAYS_PARALLEL", "-I", str(Path(__file__).with_name("threads")), "-pthread"]
HERE = ["c++", "g++", "clang++"]
UNDER = {"sanitizers": SANITIZERS, "thread sanitizer": ["-fsanitize=thread"]}
# (compiler, its flags, how to run what it makes). The first one is this machine itself: it checks the driver.
PROCESSORS = {
    "here": (HERE, ["-static"], [[]]),
    **{name: (HERE, [*flags, "-g1", "-O1"], [[]]) for name, flags in UNDER.items()},
    "aarch64": (["aarch64-linux-gnu-g++"], ["-static"], [["qemu-aarch64-static"], ["qemu-aarch64"]]),
}


@pytest.fixture(scope="module", params=PROCESSORS)
def driver(request, tmp_path_factory) -> list[str]:
    compilers, flags, runners = PROCESSORS[request.param]
    compiler = next((c for c in compilers if shutil.which(c)), None)
    runner = next((r for r in runners if not r or shutil.which(r[0])), None)
    if compiler is None or runner is None:
        pytest.skip(f"needs one of {compilers} and, to run, one of {[r[0] for r in runners if r]}")
    if request.param == "here" and platform.system() != "Linux":
        pytest.skip("-static is for Linux")
    if request.param in UNDER and not has_sanitizers(UNDER[request.param]):
        pytest.skip(f"the compiler has no {request.param}")
    program = tmp_path_factory.mktemp("driver") / "driver"
    sources = [
        Path(__file__).with_name("driver.cpp"),
        CSRC / "common/neighbour.cpp",
        *sorted((CSRC / "cpu").glob("*.cpp")),
    ]
    command = [compiler, *FLAGS, *flags, "-I", str(CSRC), *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [*runner, str(program)]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


class Answer:
    """What the driver wrote, taken array by array."""

    def __init__(self, driver: list[str], question: bytes) -> None:
        done = subprocess.run(driver, input=question, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        self.rest = done.stdout

    def take(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        bytes_wanted = torch.Size(shape).numel() * dtype.itemsize
        part, self.rest = self.rest[:bytes_wanted], self.rest[bytes_wanted:]
        assert len(part) == bytes_wanted
        return torch.frombuffer(bytearray(part), dtype=dtype).view(shape)


CASES = {
    "lenet's first": ((3, 1, 32, 32), (6, 1, 5, 5), {}),
    "lenet's second": ((5, 6, 14, 14), (16, 6, 5, 5), {}),
    "odd": ((2, 3, 11, 9), (5, 3, 3, 2), {"stride": (2, 1), "padding": (1, 2, 0, 1), "dilation": (1, 2)}),
    "groups": ((2, 8, 10, 10), (12, 2, 3, 3), {"groups": 4, "padding": (1, 1, 1, 1)}),
    "overlapping": ((2, 4, 12, 13), (9, 4, 3, 3), {"pool": ((3, 3), (2, 1), (1, 1), (1, 1))}),
    "dilated pool": ((1, 2, 14, 14), (18, 2, 3, 3), {"pool": ((2, 2), (2, 2), (0, 0), (2, 3))}),
}
LETTERS = {torch.float32: "f", torch.float64: "d", torch.bfloat16: "b"}


def problem(case: str, dtype: torch.dtype):
    image, weight, given = CASES[case]
    options = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1, **given}
    pool = options.pop("pool", ((2, 2), (2, 2), (0, 0), (1, 1)))
    x, w, b = integers(*image, dtype=dtype), integers(*weight, dtype=dtype), integers(weight[0], dtype=dtype)
    top, bottom, left, right = options["padding"]
    conv = F.conv2d(
        F.pad(x, (left, right, top, bottom)), w, b, options["stride"], 0, options["dilation"], options["groups"]
    )
    pooled = F.max_pool2d(F.relu(conv), *pool)
    kernel, stride, padding, dilation = pool
    shape = struct.pack(
        "28q",
        *image,
        weight[0],
        *weight[2:],
        options["groups"],
        *options["stride"],
        *options["padding"],
        *options["dilation"],
        *conv.shape[2:],
        *kernel,
        *stride,
        *padding,
        *dilation,
        *pooled.shape[2:],
    )
    arguments = [*options.values(), *pool]
    return x, w, b, conv, pooled, shape, arguments


@pytest.mark.parametrize("dtype", LETTERS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_convolution(driver, case, dtype):
    x, w, b, _, pooled, shape, options = problem(case, dtype)
    g = integers(*pooled.shape, dtype=dtype)
    answer = Answer(driver, LETTERS[dtype].encode() + shape + b"".join(map(raw, (x, w, b, g))))
    output, codes = answer.take(pooled.shape, dtype), answer.take(pooled.shape, torch.uint8)
    torch.testing.assert_close(output, pooled, rtol=0, atol=0)
    _, expected_codes = torch.ops.lenet_ext.conv_relu_max_pool2d_with_indices(x, w, b, *options, False)
    assert torch.equal(codes, expected_codes)
    # In float64, rounded at the end: stock's bfloat16 gradients are rounded on the way.
    exact = [t.double() for t in (g, codes, x, w)]
    expected = torch.ops.lenet_ext.conv_relu_max_pool2d_backward(
        exact[0], codes, exact[2], exact[3], x.shape, w.shape, *options, [True, True, True]
    )
    for name, like, want in zip(("grad_input", "grad_weight", "grad_bias"), (x, w, b), expected, strict=True):
        assert torch.equal(answer.take(like.shape, dtype), want.to(dtype)), name
    assert not answer.rest


@pytest.mark.parametrize("dtype", LETTERS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_relu_and_pool(driver, case, dtype):
    x, w, b, conv, pooled, shape, options = problem(case, dtype)
    g = integers(*pooled.shape, dtype=dtype)
    last = [t.permute(0, 2, 3, 1) for t in (conv, g)]
    answer = Answer(driver, LETTERS[dtype].upper().encode() + shape + b"".join(map(raw, last)))
    n, c, h, width = pooled.shape
    output = answer.take((n, h, width, c), dtype).permute(0, 3, 1, 2)
    codes = answer.take((n, h, width, c), torch.uint8).permute(0, 3, 1, 2)
    torch.testing.assert_close(output, pooled, rtol=0, atol=0)
    leaf = conv.detach().double().requires_grad_()
    kernel, stride, padding, dilation = options[-4:]
    F.max_pool2d(F.relu(leaf), kernel, stride, padding, dilation).backward(g.double())
    grad_conv = answer.take((n, *conv.shape[2:], c), dtype).permute(0, 3, 1, 2)
    assert torch.equal(grad_conv, leaf.grad.to(dtype))
    _, expected_codes = torch.ops.lenet_ext.conv_relu_max_pool2d_with_indices(x, w, b, *options, False)
    assert torch.equal(codes, expected_codes)
    assert not answer.rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 10, 84), (4, 120, 400), (7, 13, 5), (9, 33, 70), (65, 84, 120)]
)
def test_matrix_products(driver, m, n, k, dtype):
    a, weight, bias = integers(m, k, dtype=dtype), integers(n, k, dtype=dtype), integers(n, dtype=dtype)
    letter = {torch.float32: b"p", torch.float64: b"P"}[dtype]
    answer = Answer(driver, letter + struct.pack("3q", m, n, k) + b"".join(map(raw, (a, weight, bias))))
    expected = F.relu(F.linear(a, weight, bias))
    for name in ("dot products", "tiles"):
        assert torch.equal(answer.take((m, n), dtype), expected), name
    assert not answer.rest


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [((2, 6, 12, 28), 2, 2, 0), ((3, 5, 7, 11), 2, 2, 0), ((2, 9, 8, 9), 3, 2, 1), ((1, 2, 6, 7), 2, 3, 1)],
)
def test_relu_and_average_pool(driver, shape, kernel, stride, padding, dtype, channels_last):
    """Divided by 4, so that everything is exact."""
    order, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if channels_last else ((0, 1, 2, 3),) * 2
    x = integers(*shape, dtype=dtype)
    leaf = x.double().requires_grad_()
    expected = F.avg_pool2d(F.relu(leaf), kernel, stride, padding, divisor_override=4)
    g = integers(*expected.shape, dtype=dtype)
    expected.backward(g.double())
    both = ([kernel, stride, padding][i // 2] for i in range(6))
    sizes = struct.pack("12q?7xq?7x", *shape, *expected.shape[2:], *both, True, 4, channels_last)
    letter = {torch.float32: b"a", torch.float64: b"A", torch.bfloat16: b"h"}[dtype]
    answer = Answer(driver, letter + sizes + b"".join(raw(t.permute(order)) for t in (x, g)))
    for name, want in (("output", expected.detach()), ("grad_input", leaf.grad)):
        found = answer.take(want.permute(order).shape, dtype).permute(back)
        assert torch.equal(found, want.to(dtype)), name
    assert not answer.rest


ACTIVATIONS = ("output", "pooled1", "indices1", "pooled2", "indices2", "hidden1", "hidden2")


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize("channels", [1, 3])
def test_network(driver, channels, batch):
    net = lenet_ext.ReferenceNet(channels, num_classes=11).requires_grad_(False)
    x = torch.randn(batch, channels, 32, 32)
    question = b"n" + struct.pack("3q", batch, channels, 11) + raw(x) + b"".join(map(raw, net.parameters()))
    answer = Answer(driver, question)
    expected = torch.ops.lenet_ext.lenet_with_activations(x.double(), [p.double() for p in net.parameters()])
    for name, value in zip(("inference", *ACTIVATIONS), (expected[0], *expected), strict=True):
        found = answer.take(tuple(value.shape), torch.uint8 if name.startswith("indices") else torch.float32)
        torch.testing.assert_close(found.to(value.dtype), value, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
    assert not answer.rest


@pytest.mark.parametrize("driver", ["thread sanitizer"], indirect=True)
def test_a_race_is_noticed(driver):
    """That nothing was said of the kernels means something."""
    done = subprocess.run(driver, input=b"r", capture_output=True, timeout=120)
    assert done.returncode != 0
    assert b"data race" in done.stderr
