"""Give the fused layers to a model that was written without them.

python fuse_your_model.py
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lenet_ext


class SmallVgg(nn.Module):
    """Modules, functions and methods: a chain is found however it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.MaxPool2d(2),  # the pooling may come first: it is the same function
            nn.ReLU(),
        )
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.normalized = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.hidden = nn.Linear(32 * 4, 64)
        self.output = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)
        x = F.max_pool2d(self.conv3(x).relu(), 2)
        x = F.max_pool2d(F.relu(self.norm(self.normalized(x))), 2)  # BatchNorm stands between: left as it is
        return self.output(torch.relu(self.hidden(x.flatten(1))))


def main() -> None:
    torch.manual_seed(0)
    model = SmallVgg()
    fused = lenet_ext.fuse(model, verbose=True)

    # The same names, the same numbers, forward and backward.
    assert list(fused.state_dict()) == list(model.state_dict())
    images = torch.randn(8, 3, 32, 32)
    output = fused(images)
    torch.testing.assert_close(output, model(images))
    output.square().mean().backward()
    model(images).square().mean().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    print(f"fused {sum(record.fused for record in fused.fusion_report)} of {len(fused.fusion_report)} layers")

    # For inference, BatchNorm can go into the convolution before it, which then has a chain as well.
    served = lenet_ext.fuse(copy.deepcopy(model).eval(), fold_batch_norm=True)
    torch.testing.assert_close(served(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    print(f"with BatchNorm folded: {sum(record.fused for record in served.fusion_report)}")


if __name__ == "__main__":
    main()
