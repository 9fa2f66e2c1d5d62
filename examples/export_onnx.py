"""Export to ONNX, and check the result in ONNX Runtime.

ONNX has no fused operator, and needs none: a runtime fuses by itself. The exporter writes the stock layers that a fused
one stands for; the same goes for a model that `lenet_ext.fuse` has changed.

    pip install "lenet_ext[onnx]"
    python export_onnx.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import lenet_ext

try:
    import onnxruntime
    import onnxscript  # noqa: F401  torch's exporter is built on it
except ImportError as error:
    sys.exit(f"{error}: pip install 'lenet_ext[onnx]'")


def main() -> None:
    torch.manual_seed(0)
    net = lenet_ext.Net().eval()
    images = torch.randn(4, 1, 32, 32)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "lenet.onnx"
        torch.onnx.export(
            net,
            (images,),
            path,
            input_names=["images"],
            output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        # Any batch size, although the export saw one of 4.
        for batch in (1, 4, 100):
            images = torch.randn(batch, 1, 32, 32)
            (scores,) = session.run(None, {"images": images.numpy()})
            with torch.inference_mode():
                expected = net(images)
            torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-5, atol=1e-6)
            difference = (torch.from_numpy(scores) - expected).abs().max()
            print(f"batch {batch}: ONNX Runtime and lenet_ext differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
