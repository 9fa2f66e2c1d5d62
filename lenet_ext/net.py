"""LeNet, fused and stock.

Source of the architecture: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
recognition", Proceedings of the IEEE 86(11), 1998, in the form that PyTorch's tutorial "Neural Networks" gives it
(ReLU, max pooling and plain linear layers).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenet_ext.nn import ConvReLUMaxPool2d, Linear, LinearReLU

__all__ = ["Net", "ReferenceNet"]


class Net(nn.Module):
    """The fused LeNet: conv 5x5 (6) and conv 5x5 (16), each with ReLU and 2x2 max pooling, then linear
    400 -> 120 -> 84 -> ``num_classes`` with ReLU in between.

    Parameters, their names, order and initial values (after the same ``torch.manual_seed``) are those of
    :class:`ReferenceNet`; state_dicts load both ways.

    Args:
        in_channels: channels of the input.
        num_classes: number of outputs.
        device, dtype: of the parameters.

    Shape:
        ``(N, in_channels, 32, 32)`` to ``(N, num_classes)``, or without ``N``.

    Example:
        >>> import torch, lenet_ext
        >>> lenet_ext.Net()(torch.randn(1, 1, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = ConvReLUMaxPool2d(in_channels, 6, 5, device=device, dtype=dtype)
        self.conv2 = ConvReLUMaxPool2d(6, 16, 5, device=device, dtype=dtype)
        self.fc1 = LinearReLU(16 * 5 * 5, 120, device=device, dtype=dtype)
        self.fc2 = LinearReLU(120, 84, device=device, dtype=dtype)
        self.fc3 = Linear(84, num_classes, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        features = self.conv2(self.conv1(input))
        return self.fc3(self.fc2(self.fc1(features.flatten(-3))))


class ReferenceNet(nn.Module):
    """The same network made of stock layers: the yardstick of tests and benchmarks. Arguments as :class:`Net`."""

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(6, 16, 5, device=device, dtype=dtype)
        self.fc1 = nn.Linear(16 * 5 * 5, 120, device=device, dtype=dtype)
        self.fc2 = nn.Linear(120, 84, device=device, dtype=dtype)
        self.fc3 = nn.Linear(84, num_classes, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.conv1(input)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        hidden = F.relu(self.fc2(F.relu(self.fc1(features.flatten(-3)))))
        return self.fc3(hidden)
