"""The data sets by name: pictures of 32x32 pixels and their labels, a whole set in memory.

In all but CIFAR-10 a picture is bright ink (255) on a black ground (0).
"""

from __future__ import annotations

import math
import string
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lenet_ext.environment.extras import require
from lenet_ext.training.cifar10 import read_cifar10
from lenet_ext.training.download import Log
from lenet_ext.training.idx_sets import IDX_SETS, read_idx_set
from lenet_ext.training.images import IMAGE_SIZE, LabelledImages, Normalization

__all__ = [
    "DATA_SETS",
    "IMAGE_SIZE",
    "DataSet",
    "LabelledImages",
    "Normalization",
    "load",
    "load_digits",
    "load_mnist",
]


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set without its files.

    Args:
        labels: what each class is called.
        normalization: constants, not computed at load time: a checkpoint must mean the same on whatever data.
    """

    labels: tuple[str, ...]
    normalization: Normalization

    @property
    def num_classes(self) -> int:
        """How many there are."""
        return len(self.labels)

    @property
    def channels(self) -> int:
        """1, or 3 for colors."""
        return self.normalization.channels

    def to_dict(self) -> dict[str, Any]:
        """What a file of weights says of it: plain values, fit for JSON."""
        return {"labels": list(self.labels), "normalization": asdict(self.normalization)}

    def changed_by(self, described: dict[str, Any]) -> DataSet:
        """The same, with what a file of weights says in its place: `to_dict`, or a part of it, among other things.

        Raises:
            ValueError: it is not of that form.
        """
        labels = described.get("labels", self.labels)
        if not isinstance(labels, (list, tuple)) or not all(isinstance(x, str) and x.isprintable() for x in labels):
            raise ValueError("labels must be a list of printable strings")
        normalization = described.get("normalization", asdict(self.normalization))
        try:
            mean, std = (_numbers(normalization[name]) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError("normalization must have a mean and a std, numbers or lists of numbers") from None
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError("normalization must have as many means as stds, and stds above 0")
        one = len(mean) == 1
        return DataSet(tuple(labels), Normalization(mean[0] if one else mean, std[0] if one else std))


def _numbers(value: object) -> tuple[float, ...]:
    numbers = tuple(map(float, value if isinstance(value, (list, tuple)) else (value,)))  # type: ignore[arg-type]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{numbers} are not finite")
    return numbers


_DIGITS = tuple(string.digits)
_GARMENTS = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_HIRAGANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Lower case is a class of its own only where it looks different from upper case.
_BALANCED = (*string.digits, *string.ascii_uppercase, *"abdefghnqrt")

# Means and standard deviations of the training pictures, padding included. Those of digits and mnist were computed; the
# others follow from what is commonly published for the pictures of 28x28 and for CIFAR-10.
DATA_SETS = {
    "digits": DataSet(_DIGITS, Normalization(mean=0.3051, std=0.3238)),
    "mnist": DataSet(_DIGITS, Normalization(mean=0.1000, std=0.2752)),
    "fashion-mnist": DataSet(_GARMENTS, Normalization(mean=0.2190, std=0.3318)),
    "kmnist": DataSet(_HIRAGANA, Normalization(mean=0.1469, std=0.3154)),
    "emnist-letters": DataSet(tuple(string.ascii_uppercase), Normalization(mean=0.1318, std=0.2986)),
    "emnist-balanced": DataSet(_BALANCED, Normalization(mean=0.1341, std=0.3008)),
    "cifar10": DataSet(_THINGS, Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))),
}


def load(name: str, root: str | Path | None = None, *, log: Log = None) -> tuple[LabelledImages, LabelledImages]:
    """Loads a data set.

    ``digits`` needs no files. The files of the others are looked for in ``root``; those that are not there are
    downloaded, compared with a checksum, and kept in ``root`` if given, else in the user's cache directory.

    Args:
        name: a key of `DATA_SETS`.
        root: directory with the files, as they are published (``.gz`` or not), in it or where torchvision puts them.
        log: told in one line what is being downloaded.

    Returns:
        Training set and test set.

    Raises:
        OSError: a file cannot be read, or cannot be had.
        ValueError: the name is unknown, or a file is damaged or does not fit the others.
        lenet_ext.environment.extras.MissingExtraError: an optional dependency is missing.
    """
    if name == "digits":
        return load_digits()
    if name not in DATA_SETS:
        raise ValueError(f"data must be one of {', '.join(DATA_SETS)}, found {name!r}")
    data_set = DATA_SETS[name]
    if name in IDX_SETS:
        train, test = read_idx_set(name, data_set.num_classes, root, log)
    else:
        train, test = read_cifar10(root, log)
    return (
        LabelledImages(*train, data_set.normalization, data_set.num_classes),
        LabelledImages(*test, data_set.normalization, data_set.num_classes),
    )


def load_mnist(root: str | Path | None = None, *, log: Log = None) -> tuple[LabelledImages, LabelledImages]:
    """`load` of ``"mnist"``."""
    return load("mnist", root, log=log)


def load_digits() -> tuple[LabelledImages, LabelledImages]:
    """The 1797 handwritten digits that come with scikit-learn, 8x8 pixels, resized to 32x32. No network.

    Every fifth picture of each class, in the order of the file, is for testing: the split needs no random numbers, and
    the classes are as frequent in both parts.

    Returns:
        Training set (1442 pictures) and test set (355).

    Raises:
        lenet_ext.environment.extras.MissingExtraError: scikit-learn is not installed.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.

    Example:
        >>> train, test = load_digits()
        >>> len(train), len(test)
        (1442, 355)
    """
    datasets = require("sklearn.datasets", "the digits data set", package="scikit-learn")
    bunch = datasets.load_digits()
    small = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)  # 0 to 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    large = F.interpolate(small, size=IMAGE_SIZE, mode="bilinear", antialias=True)
    images = large.mul(255 / 16).round().clamp(0, 255).to(torch.uint8)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[(labels == digit).nonzero().flatten()[4::5]] = True
    normalization = DATA_SETS["digits"].normalization
    return (
        LabelledImages(images[~is_test], labels[~is_test], normalization),
        LabelledImages(images[is_test], labels[is_test], normalization),
    )
