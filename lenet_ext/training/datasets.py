"""The data sets: handwritten digits as 32x32 pictures, a whole set in memory as one uint8 tensor.

A picture is bright ink (255) on a black ground (0). It is stored in bytes, exactly as a PNG would store it, and becomes
floating point a batch at a time: gathering bytes moves a quarter of the memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from lenet_ext.environment.extras import require
from lenet_ext.training.idx import read_content, read_idx

__all__ = [
    "DATA_SETS",
    "IMAGE_SIZE",
    "NUM_CLASSES",
    "DigitImages",
    "Normalization",
    "load",
    "load_digits",
    "load_mnist",
]

IMAGE_SIZE = 32
NUM_CLASSES = 10


@dataclass(frozen=True)
class Normalization:
    """How bytes become what the network sees: ``(byte / 255 - mean) / std``."""

    mean: float
    std: float

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images of any shape -> float32 of the same shape."""
        return images.mul(1 / (255 * self.std)).sub_(self.mean / self.std)


# Mean and standard deviation of the training pictures, padding included. Constants, not computed at load time: a
# checkpoint must mean the same whatever it is evaluated on.
NORMALIZATION = {"digits": Normalization(mean=0.3051, std=0.3238), "mnist": Normalization(mean=0.1000, std=0.2752)}
DATA_SETS = tuple(NORMALIZATION)


class DigitImages(Dataset[tuple[Tensor, int]]):
    """Pictures and labels in memory: a ``torch.utils.data.Dataset``, with a faster way to draw batches.

    Args:
        images: uint8 (N, 1, 32, 32).
        labels: int64 (N,), 0 to 9.
        normalization: applied to whatever is handed out.

    Example:
        >>> data = DigitImages(torch.zeros(5, 1, 32, 32, dtype=torch.uint8), torch.arange(5), Normalization(0.0, 1.0))
        >>> image, label = data[3]
        >>> image.shape, label, [len(labels) for _, labels in data.batches(2)]
        (torch.Size([1, 32, 32]), 3, [2, 2, 1])
    """

    def __init__(self, images: Tensor, labels: Tensor, normalization: Normalization) -> None:
        shape = (len(labels), 1, IMAGE_SIZE, IMAGE_SIZE)
        if images.dtype != torch.uint8 or tuple(images.shape) != shape:
            raise ValueError(f"images must be uint8 {shape}, found {images.dtype} {tuple(images.shape)}")
        self.images = images.contiguous()
        self.labels = labels
        self.normalization = normalization

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.normalization(self.images[index]), int(self.labels[index])

    def to(self, device: torch.device | str) -> DigitImages:
        """The same data on another device."""
        return DigitImages(self.images.to(device), self.labels.to(device), self.normalization)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        max_shift: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the data.

        Args:
            batch_size: pictures in a batch; the last batch has what is left.
            generator: draws a random order (on the CPU, so that every device sees the same one); in order without it.
            max_shift: with a generator, each picture is moved by up to that many pixels along both axes, filled up with
                the ground.
            share: (which, of how many) parts of each batch to hand out. The parts together are the batch that there
                would be without this argument; where a batch is small, some of them are empty.

        Yields:
            float32 (B, 1, 32, 32) and int64 (B,), on the device of the data.

        Raises:
            ValueError: ``batch_size`` is below 1 or ``max_shift`` below 0.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, found {batch_size}")
        if max_shift < 0:
            raise ValueError(f"max_shift must be 0 or more, found {max_shift}")
        which, parts = share
        slices = [
            slice(begin + (end - begin) * which // parts, begin + (end - begin) * (which + 1) // parts)
            for begin, end in ((b, min(b + batch_size, len(self))) for b in range(0, len(self), batch_size))
        ]
        return self._batches(slices, generator, max_shift)

    def _batches(
        self, slices: list[slice], generator: torch.Generator | None, max_shift: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if generator is None:
            for chosen in slices:
                yield self.normalization(self.images[chosen]), self.labels[chosen]
            return
        device = self.images.device
        order = torch.randperm(len(self), generator=generator).to(device)
        shifts = torch.randint(2 * max_shift + 1, (2, len(self)), generator=generator).to(device)
        # All (2 max_shift + 1)^2 positions of every padded picture as overlapping views of one buffer:
        # a shifted batch is then a single gather.
        width = IMAGE_SIZE + 2 * max_shift
        padded = F.pad(self.images, (max_shift,) * 4)
        windows = padded.as_strided(
            (len(self), 2 * max_shift + 1, 2 * max_shift + 1, IMAGE_SIZE, IMAGE_SIZE),
            (width * width, width, 1, width, 1),
        )
        for chosen in slices:
            images = windows[order[chosen], shifts[0, chosen], shifts[1, chosen]]
            yield self.normalization(images).unsqueeze(1), self.labels[order[chosen]]


def load(
    name: str, root: str | Path | None = None, *, log: Callable[[str], None] | None = None
) -> tuple[DigitImages, DigitImages]:
    """Loads a data set.

    Args:
        name: ``"digits"`` or ``"mnist"``.
        root, log: for ``mnist``, see `load_mnist`.

    Returns:
        Training set and test set.

    Raises:
        ValueError: the name is unknown or a file is damaged.
        lenet_ext.environment.extras.MissingExtraError: an optional dependency is missing.
    """
    if name == "digits":
        return load_digits()
    if name == "mnist":
        return load_mnist(root, log=log)
    raise ValueError(f"data must be one of {', '.join(DATA_SETS)}, found {name!r}")


def load_digits() -> tuple[DigitImages, DigitImages]:
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
    for digit in range(NUM_CLASSES):
        is_test[(labels == digit).nonzero().flatten()[4::5]] = True
    normalization = NORMALIZATION["digits"]
    return (
        DigitImages(images[~is_test], labels[~is_test], normalization),
        DigitImages(images[is_test], labels[is_test], normalization),
    )


# SHA-256 of the uncompressed content: mirrors may compress differently, the data is the same.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# The public mirrors, in the order they are tried. LENET_EXT_MNIST_URL names another one to use instead.
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


def load_mnist(
    root: str | Path | None = None, *, log: Callable[[str], None] | None = None
) -> tuple[DigitImages, DigitImages]:
    """MNIST from its four IDX files, plain or gzipped, 28x28 zero-padded to 32x32.

    Files that are not there are downloaded, checked against a SHA-256, and kept: in ``root`` if given, else in the
    user's cache directory. Files that are there are taken as they are, so other data in the same format and of the
    same size can be used as well.

    Args:
        root: directory with the files (``MNIST/raw`` and ``raw`` below it are looked into as well).
        log: told in one line what is being downloaded.

    Returns:
        Training set and test set.

    Raises:
        OSError: a file cannot be read, or cannot be had.
        ValueError: a file is damaged or does not fit the others.
        lenet_ext.environment.extras.MissingExtraError: a download is needed and pooch is not installed.
    """
    parts = []
    for part in ("train", "t10k"):
        images_path = _mnist_file(f"{part}-images-idx3-ubyte", root, log)
        labels_path = _mnist_file(f"{part}-labels-idx1-ubyte", root, log)
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.dim() != 3 or images.shape[1:] != (28, 28):
            raise ValueError(f"{images_path}: expected images of shape (N, 28, 28), found {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{labels_path}: expected {len(images)} labels, found shape {tuple(labels.shape)}")
        if len(labels) == 0:
            raise ValueError(f"{labels_path}: the file holds no examples")
        if int(labels.max()) >= NUM_CLASSES:
            raise ValueError(f"{labels_path}: labels must be 0 to 9, found {int(labels.max())}")
        parts.append(DigitImages(F.pad(images.unsqueeze(1), (2,) * 4), labels.long(), NORMALIZATION["mnist"]))
    return parts[0], parts[1]


def _mnist_file(name: str, root: str | Path | None, log: Callable[[str], None] | None) -> Path:
    """Path of one of the four files: found in `root`, or else downloaded."""
    if root is not None:
        base = Path(root)
        if base.exists() and not base.is_dir():
            raise NotADirectoryError(f"root must be a directory, found a file: {base}")
        for folder in (base, base / "MNIST" / "raw", base / "raw"):
            # Both spellings are in circulation: train-images-idx3-ubyte and train-images.idx3-ubyte.
            for spelling in (name, name.replace("-idx", ".idx")):
                for candidate in (folder / spelling, folder / f"{spelling}.gz"):
                    if candidate.is_file():
                        return candidate
    return _download(name, None if root is None else Path(root), log)


def _download(name: str, directory: Path | None, log: Callable[[str], None] | None) -> Path:
    pooch = require("pooch", "the download of MNIST (or pass a directory that has the four IDX files as root)")
    directory = directory or Path(pooch.os_cache("lenet_ext")) / "mnist"
    target = directory / f"{name}.gz"
    if target.is_file() and _sha256_of_content(target) == MNIST_SHA256[name]:
        return target
    override = os.environ.get("LENET_EXT_MNIST_URL")
    mirrors = (override.rstrip("/") + "/",) if override else MNIST_MIRRORS
    reasons = []
    pooch.get_logger().setLevel("ERROR")
    for mirror in mirrors:
        # Downloaded under another name: what bears the final name has been verified.
        partial = directory / f"{name}.gz.{os.getpid()}.part"
        try:
            if log:
                log(f"downloading {mirror}{name}.gz")
            pooch.retrieve(f"{mirror}{name}.gz", known_hash=None, fname=partial.name, path=directory)
            found = _sha256_of_content(partial)
            if found == MNIST_SHA256[name]:
                os.replace(partial, target)
                return target
            reasons.append(f"{mirror}: SHA-256 of the content is {found}, expected {MNIST_SHA256[name]}")
        except Exception as error:  # requests, urllib3, ssl, the operating system: any of them may fail here
            reasons.append(f"{mirror}: {type(error).__name__}")
        finally:
            partial.unlink(missing_ok=True)
    where = "" if directory is None else f" and is not in {directory}"
    raise OSError(
        f"{name}.gz could not be downloaded{where} ({'; '.join(reasons)}); "
        "pass the directory that has the four IDX files as root"
    )


def _sha256_of_content(path: Path) -> str | None:
    try:
        return hashlib.sha256(read_content(path)).hexdigest()
    except ValueError:
        return None
