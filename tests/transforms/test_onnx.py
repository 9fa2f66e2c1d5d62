"""Exports to ONNX, by both of PyTorch's exporters, compute in ONNX Runtime what the models compute here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lenet_ext
from lenet_ext.nn import ConvReLUMaxPool2d, Linear, LinearReLU, ReLUAvgPool2d

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

EXPORTERS = [pytest.param(True, id="dynamo"), pytest.param(False, id="torchscript")]
# The exporter called "dynamo" takes a second or two for each model.
QUICK_EXPORTERS = [pytest.param(True, id="dynamo", marks=pytest.mark.extended), EXPORTERS[1]]


def exported(
    model: nn.Module, input: Tensor, folder: Path, dynamo: bool, dynamic_batch: bool = False
) -> Callable[[Tensor], Tensor]:
    file = folder / "model.onnx"
    options: dict[str, Any] = {}
    if dynamic_batch and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    elif dynamic_batch:
        options["dynamic_axes"] = {"given": {0: "batch"}}
    torch.onnx.export(model.eval(), (input,), file, dynamo=dynamo, input_names=["given"], verbose=False, **options)
    written = onnx.load(file)
    assert {node.domain for node in written.graph.node} == {""}, "an operator that is not ONNX's own"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(input: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"given": input.numpy()})[0])

    return run


def check(model: nn.Module, input: Tensor, folder: Path, dynamo: bool) -> None:
    output = exported(model, input, folder, dynamo)(input)
    torch.testing.assert_close(output, model(input).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_net(tmp_path: Path, dynamo: bool) -> None:
    net = lenet_ext.Net()
    run = exported(net, torch.randn(2, 1, 32, 32), tmp_path, dynamo, dynamic_batch=True)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 1, 32, 32)
        torch.testing.assert_close(run(images), net(images).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamo", QUICK_EXPORTERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (5,)])
@pytest.mark.parametrize("layer", [Linear, LinearReLU])
def test_linear(layer: type[nn.Linear], shape: tuple[int, ...], bias: bool, tmp_path: Path, dynamo: bool) -> None:
    check(layer(5, 4, bias=bias), torch.randn(shape), tmp_path, dynamo)


CONVOLUTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "same, not symmetric": {"padding": "same"},
    "pairs": {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "groups": {"groups": 2},
    "pooling": {"pool_kernel_size": (3, 2), "pool_stride": (2, 1), "pool_padding": (1, 0), "pool_dilation": (1, 2)},
    "ceil_mode": {"pool_kernel_size": 3, "pool_stride": 2, "ceil_mode": True},
    "ceil_mode, a last window in the padding": {
        "pool_kernel_size": 2,
        "pool_stride": 3,
        "pool_padding": 1,
        "ceil_mode": True,
    },
}


@pytest.mark.parametrize("dynamo", QUICK_EXPORTERS)
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(options: dict[str, Any], tmp_path: Path, dynamo: bool) -> None:
    check(ConvReLUMaxPool2d(4, 6, (2, 3), **options), torch.randn(2, 4, 14, 13), tmp_path, dynamo)


AVERAGES = {
    "plain": {"kernel_size": 2},
    "padded": {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1},
    "padding not counted": {"kernel_size": 3, "padding": 1, "count_include_pad": False},
    "ceil_mode": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
}


@pytest.mark.parametrize("dynamo", QUICK_EXPORTERS)
@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
def test_average_pooling(options: dict[str, Any], tmp_path: Path, dynamo: bool) -> None:
    check(ReLUAvgPool2d(**options), torch.randn(2, 4, 8, 7), tmp_path, dynamo)


@pytest.mark.parametrize("dynamo", QUICK_EXPORTERS)
def test_a_single_image(tmp_path: Path, dynamo: bool) -> None:
    check(ConvReLUMaxPool2d(2, 3, 3), torch.randn(2, 9, 9), tmp_path, dynamo)


@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_a_fused_model(tmp_path: Path, dynamo: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, (2, 3), padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(4 * 16, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    check(lenet_ext.fuse(model), torch.randn(2, 2, 8, 8), tmp_path, dynamo)


@pytest.mark.extended
def test_the_whole_network_as_one_operator(tmp_path: Path) -> None:
    class OneOperator(lenet_ext.Net):
        def forward(self, input: Tensor) -> Tensor:
            return torch.ops.lenet_ext.lenet(input, list(self.parameters()))

    check(OneOperator(), torch.randn(2, 1, 32, 32), tmp_path, dynamo=True)
