"""Well-known convolutional networks, as people write them, for `lenet_ext.fuse`: by tests and by ``fuse_zoo.py``.

Sources: K. Simonyan, A. Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015
(VGG); A. Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997 (AlexNet, one
column); K. He et al., "Deep residual learning for image recognition", CVPR 2016 (ResNet); F. Iandola et al.,
"SqueezeNet", arXiv:1602.07360.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenet_ext.net import ReferenceNet

__all__ = ["ZOO", "ZooModel"]


@dataclass(frozen=True)
class ZooModel:
    """One network.

    Args:
        name: short.
        make: takes the number by which all widths are divided; 1 is the network of the paper.
        image: shape of its input, without the batch, at full size.
        chains: how many chains `fuse` must find.
        folded_chains: the same with ``fold_batch_norm=True``.
        small_image: sides of an image that is large enough.
    """

    name: str
    make: Callable[[int], nn.Module]
    image: tuple[int, int, int]
    chains: int
    folded_chains: int
    small_image: int


class LeNetWithDropout(nn.Module):
    """LeNet in one Sequential, with dropout after ReLU."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 6, 5),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(400, 120),
                relu3=nn.ReLU(),
                dropout=nn.Dropout(0.5),
                fc2=nn.Linear(120, 84),
                relu4=nn.ReLU(),
                fc3=nn.Linear(84, 10),
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class LeNetOf1998(nn.Module):
    """Tanh and average pooling: nothing that could be fused."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(self.conv1(images).tanh(), 2)
        x = F.avg_pool2d(self.conv2(x).tanh(), 2)
        return self.fc3(self.fc2(self.fc1(x.flatten(1)).tanh()).tanh())


class Vgg(nn.Module):
    """`blocks`: convolutions of width 64, 128, 256, 512, 512, a pooling after each group."""

    def __init__(self, blocks: tuple[int, ...], divisor: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for count, width in zip(blocks, (64, 128, 256, 512, 512), strict=True):
            for _ in range(count):
                layers += [nn.Conv2d(channels, width // divisor, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width // divisor
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(7)
        hidden = 4096 // divisor
        self.classifier = nn.Sequential(
            nn.Linear(channels * 49, hidden),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(hidden, 1000 // divisor),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(images)), 1))


class AlexNet(nn.Module):
    """Overlapping pooling, dropout before the linear layers."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        a, b, c, d, e, hidden = (width // divisor for width in (64, 192, 384, 256, 256, 4096))
        self.features = nn.Sequential(
            nn.Conv2d(3, a, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c, d, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(d, e, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
        self.pool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(e * 36, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, 1000 // divisor),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(images)).flatten(1))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """The stem has a chain once its BatchNorm is folded."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        channels = 64 // divisor
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks = []
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            for step in (stride, 1):
                blocks.append(ResidualBlock(channels, width // divisor, step))
                channels = width // divisor
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 1000 // divisor)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.fc(F.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))


class Fire(nn.Module):
    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


class SqueezeNet(nn.Module):
    """A chain at the start; the other poolings follow a concatenation."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        a, b, c, d = (width // divisor for width in (64, 128, 256, 512))
        self.features = nn.Sequential(
            nn.Conv2d(3, a, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(a, a // 4, a),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(2 * a, b // 4, b),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(2 * b, c // 4, c),
        )
        self.classifier = nn.Conv2d(2 * c, d, 1)

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.relu(self.classifier(self.features(images))), 1).flatten(1)


class Untraceable(nn.Module):
    """Its path depends on the numbers, which torch.fx cannot trace."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        width = 64 // divisor
        self.features = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.extra = nn.Conv2d(width, width, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)
        if x.mean() > 0.1:
            x = F.max_pool2d(F.relu(self.extra(x)), 2)
        return x.mean((2, 3))


_LIST = (
    ZooModel("lenet", lambda divisor: ReferenceNet(), (1, 32, 32), 4, 4, 32),
    ZooModel("lenet_dropout", LeNetWithDropout, (1, 32, 32), 4, 4, 32),
    ZooModel("lenet_1998", LeNetOf1998, (1, 32, 32), 0, 0, 32),
    ZooModel("vgg11", lambda divisor: Vgg((1, 1, 2, 2, 2), divisor), (3, 224, 224), 7, 7, 32),
    ZooModel("vgg16", lambda divisor: Vgg((2, 2, 3, 3, 3), divisor), (3, 224, 224), 7, 7, 32),
    ZooModel("alexnet", AlexNet, (3, 224, 224), 5, 5, 67),
    ZooModel("resnet18", ResNet18, (3, 224, 224), 0, 1, 48),
    ZooModel("squeezenet", SqueezeNet, (3, 224, 224), 1, 1, 48),
    ZooModel("untraceable", Untraceable, (3, 64, 64), 2, 2, 16),
)
ZOO = {model.name: model for model in _LIST}
