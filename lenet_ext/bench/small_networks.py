"""Small networks as people write them, of stock layers, for `lenet-ext bench --only networks`.

Sources: the MNIST example of pytorch/examples; PyTorch's tutorial "Training a classifier"; B. Shi, X. Bai, C. Yao, "An
end-to-end trainable neural network for image-based sequence recognition", arXiv:1507.05717 (the stem of a reader of
text lines); T. Sainath, C. Parada, "Convolutional neural networks for small-footprint keyword spotting", Interspeech
2015 (cnn-trad-pool2, on 100 frames); V. Mnih et al., "Human-level control through deep reinforcement learning", Nature
518 (2015). Dropout is left out: it is random, and the same for everybody.
"""

from __future__ import annotations

from torch import nn

from lenet_ext.net import ReferenceNet

__all__ = ["NETWORKS"]


def mnist_example() -> nn.Module:
    """The first convolution has no pooling behind its ReLU."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
        nn.LogSoftmax(1),
    )


def cifar10_tutorial() -> nn.Module:
    """LeNet on three channels."""
    return ReferenceNet(3)


def cifar_batch_norm() -> nn.Module:
    """Three blocks of convolution, BatchNorm, ReLU and pooling."""
    layers: list[nn.Module] = []
    for channels, width in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))


def text_line_stem() -> nn.Module:
    """The first blocks of a reader of text lines: the last pooling keeps the width, which is the time."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d((2, 1)),
    )


def keyword_spotting() -> nn.Module:
    """Words in 100 frames of 40 frequencies: large kernels that are not square, and pooling over frequencies."""
    return nn.Sequential(
        nn.Conv2d(1, 64, (20, 8)),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, (10, 4)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 31 * 13, 12),
    )


def deep_q_network() -> nn.Module:
    """Four frames of 84x84: strides instead of pooling."""
    return nn.Sequential(
        nn.Conv2d(4, 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3136, 512),
        nn.ReLU(),
        nn.Linear(512, 6),
    )


def lenet_average_pooling() -> nn.Module:
    """LeNet with ReLU and average pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


NETWORKS = {
    "mnist_example": ("PyTorch's MNIST example", mnist_example, (1, 28, 28)),
    "cifar10_tutorial": ("PyTorch's CIFAR-10 tutorial", cifar10_tutorial, (3, 32, 32)),
    "cifar_batch_norm": ("CIFAR network with BatchNorm", cifar_batch_norm, (3, 32, 32)),
    "text_line_stem": ("stem of a text-line reader", text_line_stem, (1, 32, 100)),
    "keyword_spotting": ("keyword spotting", keyword_spotting, (1, 100, 40)),
    "deep_q_network": ("deep Q-network", deep_q_network, (4, 84, 84)),
    "lenet_average_pooling": ("LeNet with average pooling", lenet_average_pooling, (1, 32, 32)),
}
"""Title, network and the shape of an image, by name."""
