"""torch.compile and torch.export: the fused layers are operators that both know.

python compile_and_export.py
"""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

import lenet_ext


class Classifier(nn.Module):
    """A network around the network, so that there is something to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.net = lenet_ext.Net()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net((pixels - 0.5) / 0.25).log_softmax(-1)


def main() -> None:
    torch.manual_seed(0)
    model = Classifier()
    pixels = torch.rand(8, 1, 32, 32)
    expected = model(pixels)

    # One graph, forward and backward, for every batch size.
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    compiled(pixels).sum().backward()
    torch.testing.assert_close(compiled(pixels), expected)
    torch.testing.assert_close(compiled(pixels[:3]), expected[:3])
    print("compiled: the same scores, for 8 images and for 3")

    # A program without Python code of ours, that can be saved and loaded. Loading it needs `import lenet_ext`, which
    # registers the operators.
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (pixels,), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    torch.testing.assert_close(loaded(pixels[:5]), expected[:5])
    operators = sorted({str(node.target) for node in program.graph.nodes if "lenet_ext" in str(node.target)})
    print(f"exported, with the operators {', '.join(operators)}")


if __name__ == "__main__":
    main()
