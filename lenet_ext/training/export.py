"""LeNet in the formats of others: ONNX, TorchScript, torch.export, safetensors; each read again and compared."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lenet_ext.environment.extras import require
from lenet_ext.environment.files import atomic_path
from lenet_ext.net import Net, ReferenceNet
from lenet_ext.pretrained.files import METADATA_KEY, weights_as_bytes
from lenet_ext.training.images import IMAGE_SIZE

__all__ = ["FORMATS", "export"]

LeNet = Net | ReferenceNet
Program = Callable[[Tensor], Tensor]

_BATCHES = (1, 5, 64)  # any batch size must do, although the exporters see one of them


def export(net: LeNet, path: str | Path, format: str, about: dict[str, Any] | None = None) -> float:
    """Writes a network, reads the file again, and compares what comes out of it with the network.

    Args:
        net: on the CPU, in float32; its stock layers or its fused operators are what is written.
        path: the file to write; it stays as it was unless all goes well.
        format: a key of `FORMATS`. The program in the file maps float32 (N, C, 32, 32) to (N, classes), for any N.
        about: what is known of the weights, such as `lenet_ext.Net.config`. It goes into the file as JSON: as metadata
            of the name ``lenet_ext`` (ONNX, safetensors), as the extra file ``lenet_ext.json`` (TorchScript, pt2).

    Returns:
        The largest difference between the scores of both.

    Raises:
        OSError: the file cannot be written.
        RuntimeError: what was written does not compute the same.
        ValueError: the format is unknown, or JSON cannot hold ``about``.
        lenet_ext.environment.extras.MissingExtraError: ONNX needs packages that are not installed.

    Example:
        >>> import tempfile
        >>> export(Net(), Path(tempfile.mkdtemp()) / "lenet.safetensors", "safetensors")
        0.0
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, found {format!r}")
    write, read = FORMATS[format]
    net = net.eval()
    generator = torch.Generator().manual_seed(0)
    shape = (net.conv1.in_channels, IMAGE_SIZE, IMAGE_SIZE)
    batches = [torch.randn(batch, *shape, generator=generator) for batch in _BATCHES]
    with _quiet(), atomic_path(path) as temporary:
        temporary.write_bytes(write(net, batches[1], json.dumps(about or {}, allow_nan=False)))
        program = read(temporary.read_bytes(), net)
        worst = 0.0
        with torch.inference_mode():
            for images in batches:
                found, expected = program(images), net(images)
                try:
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
                except AssertionError as error:
                    raise RuntimeError(
                        f"{path}: not written, for what was read again computes otherwise: {error}"
                    ) from None
                worst = max(worst, (found - expected).abs().max().item())
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of their own plans and parts: TorchScript ends, there is no torchvision."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _write_onnx(net: LeNet, images: Tensor, about: str) -> bytes:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "ONNX", extra="onnx")
    program = torch.onnx.export(
        net,
        (images,),
        input_names=["images"],
        output_names=["scores"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # it is where no file is named
    model = program.model_proto
    model.metadata_props.add(key=METADATA_KEY, value=about)
    content: bytes = model.SerializeToString()
    return content


def _read_onnx(content: bytes, net: LeNet) -> Program:
    session = require("onnxruntime", "ONNX", extra="onnx").InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_torchscript(net: LeNet, images: Tensor, about: str) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(net), buffer, _extra_files={f"{METADATA_KEY}.json": about})
    return buffer.getvalue()


def _read_torchscript(content: bytes, net: LeNet) -> Program:
    program: Program = torch.jit.load(io.BytesIO(content))
    return program


def _write_pt2(net: LeNet, images: Tensor, about: str) -> bytes:
    buffer = io.BytesIO()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, buffer, extra_files={f"{METADATA_KEY}.json": about})
    return buffer.getvalue()


def _read_pt2(content: bytes, net: LeNet) -> Program:
    return torch.export.load(io.BytesIO(content)).module()


def _write_safetensors(net: LeNet, images: Tensor, about: str) -> bytes:
    return weights_as_bytes(net, json.loads(about))


def _read_safetensors(content: bytes, net: LeNet) -> Program:
    safetensors = require("safetensors.torch", "files of weights")
    other = type(net)(net.conv1.in_channels, net.fc3.out_features)
    other.load_state_dict(safetensors.load(content))
    return other.eval()


# How a network becomes the bytes of a file, given pictures to try it with and what is known of it, and how it is had
# back of them.
FORMATS: dict[str, tuple[Callable[[LeNet, Tensor, str], bytes], Callable[[bytes, LeNet], Program]]] = {
    "onnx": (_write_onnx, _read_onnx),
    "torchscript": (_write_torchscript, _read_torchscript),
    "pt2": (_write_pt2, _read_pt2),
    "safetensors": (_write_safetensors, _read_safetensors),
}
