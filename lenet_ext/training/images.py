"""Labelled pictures in memory, a whole set as one uint8 tensor.

A picture is stored in bytes, exactly as a PNG would store it, and becomes floating point a batch at a time: gathering
bytes moves a quarter of the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["IMAGE_SIZE", "LabelledImages", "Normalization"]

IMAGE_SIZE = 32


@dataclass(frozen=True)
class Normalization:
    """How bytes become what the network sees: ``(byte / 255 - mean) / std``; a number, or one for each channel."""

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    @property
    def channels(self) -> int:
        """Of the pictures; a single number is for one."""
        return len(self.mean) if isinstance(self.mean, tuple) else 1

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (..., C, H, W) -> float32 of the same shape; of any shape where there is a single number."""
        if isinstance(self.mean, tuple) or isinstance(self.std, tuple):
            scale, shift = _per_channel(self, images.device, torch.get_default_dtype())
            return images.mul(scale).sub_(shift)
        return images.mul(1 / (255 * self.std)).sub_(self.mean / self.std)


@functools.cache
def _per_channel(normalization: Normalization, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(value, dtype=torch.float64).view(-1, 1, 1) for value in (normalization.mean, normalization.std)
    )
    return (1 / (255 * std)).to(device, dtype), (mean / std).to(device, dtype)


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Pictures and labels in memory: a ``torch.utils.data.Dataset``, with a faster way to draw batches.

    Args:
        images: uint8 (N, C, 32, 32), with as many channels as the normalization has.
        labels: int64 (N,), 0 to ``num_classes - 1``.
        normalization: applied to whatever is handed out.
        num_classes: how many there are, whether they all occur or not.

    Example:
        >>> pixels = torch.zeros(5, 1, 32, 32, dtype=torch.uint8)
        >>> data = LabelledImages(pixels, torch.arange(5), Normalization(0.0, 1.0))
        >>> image, label = data[3]
        >>> image.shape, label, [len(labels) for _, labels in data.batches(2)]
        (torch.Size([1, 32, 32]), 3, [2, 2, 1])
    """

    def __init__(self, images: Tensor, labels: Tensor, normalization: Normalization, num_classes: int = 10) -> None:
        shape = (len(labels), normalization.channels, IMAGE_SIZE, IMAGE_SIZE)
        if images.dtype != torch.uint8 or tuple(images.shape) != shape:
            raise ValueError(f"images must be uint8 {shape}, found {images.dtype} {tuple(images.shape)}")
        self.images = images.contiguous()
        self.labels = labels
        self.normalization = normalization
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.normalization(self.images[index]), int(self.labels[index])

    def to(self, device: torch.device | str) -> LabelledImages:
        """The same data on another device."""
        return LabelledImages(self.images.to(device), self.labels.to(device), self.normalization, self.num_classes)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        max_shift: int = 0,
        max_turn: float = 0.0,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the data.

        Args:
            batch_size: pictures in a batch; the last batch has what is left.
            generator: draws a random order (on the CPU, so that every device sees the same one); in order without it.
            max_shift: with a generator, each picture is moved by up to that many pixels along both axes, filled up with
                zeros.
            max_turn: with a generator, and above 0, each picture is also turned about its middle by up to that many
                degrees, either way, and moved by up to half a pixel more.
            share: (which, of how many) parts of each batch to hand out. The parts together are the batch that there
                would be without this argument; where a batch is small, some of them are empty.

        Yields:
            float32 (B, C, 32, 32) and int64 (B,), on the device of the data.

        Raises:
            ValueError: ``batch_size`` is below 1, or ``max_shift`` or ``max_turn`` below 0.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, found {batch_size}")
        if max_shift < 0:
            raise ValueError(f"max_shift must be 0 or more, found {max_shift}")
        if not max_turn >= 0:
            raise ValueError(f"max_turn must be 0 or more, found {max_turn}")
        which, parts = share
        slices = [
            slice(begin + (end - begin) * which // parts, begin + (end - begin) * (which + 1) // parts)
            for begin, end in ((b, min(b + batch_size, len(self))) for b in range(0, len(self), batch_size))
        ]
        return self._batches(slices, generator, max_shift, max_turn)

    def _batches(
        self, slices: list[slice], generator: torch.Generator | None, max_shift: int, max_turn: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if generator is None:
            for group in _groups(slices):
                chosen = torch.cat([torch.arange(s.start, s.stop, device=self.labels.device) for s in group])
                yield from _cut(group, self.normalization(self.images[chosen]), self.labels[chosen])
            return
        device = self.images.device
        order = torch.randperm(len(self), generator=generator).to(device)
        shifts = torch.randint(2 * max_shift + 1, (2, len(self)), generator=generator).to(device)
        motions = _draw_motions(len(self), max_turn, generator).to(device) if max_turn else None
        # All (2 max_shift + 1)^2 positions of every padded picture as overlapping views of one buffer:
        # a shifted batch is then a single gather.
        width = IMAGE_SIZE + 2 * max_shift
        channels = self.images.shape[1]
        padded = F.pad(self.images, (max_shift,) * 4)
        windows = padded.as_strided(
            (len(self), 2 * max_shift + 1, 2 * max_shift + 1, channels, IMAGE_SIZE, IMAGE_SIZE),
            (channels * width * width, width, 1, width * width, width, 1),
        )
        for group in _groups(slices):
            chosen, down, right = (torch.cat([values[s] for s in group]) for values in (order, shifts[0], shifts[1]))
            images = windows[chosen, down, right]
            if motions is not None:
                images = _moved(images, torch.cat([motions[s] for s in group]))
            yield from _cut(group, self.normalization(images), self.labels[chosen])


def _draw_motions(count: int, max_turn: float, generator: torch.Generator) -> Tensor:
    """(count, 4) random motions: cosine and sine of a turn of up to `max_turn` degrees, and a way of up to half a pixel
    to the right and down. On the CPU, for all pictures at once: they do not depend on the device, nor on the share."""
    turn, right, down = torch.rand(3, count, generator=generator).mul(2).sub(1)
    turn = torch.deg2rad(turn * max_turn)
    return torch.stack((turn.cos(), turn.sin(), right / IMAGE_SIZE, down / IMAGE_SIZE), dim=1)


def _moved(images: Tensor, motions: Tensor) -> Tensor:
    """uint8 (B, C, 32, 32) and their motions -> floating point, between the pixels; beyond the edges all is zero.

    What ``F.affine_grid`` computes by a matrix product, whose last bit may depend on how many pictures there are.
    """
    cos, sin, right, down = motions[:, :, None, None].unbind(1)
    # Where the pixels' centres are, in a picture that reaches from -1 to 1.
    x = torch.arange(1 - IMAGE_SIZE, IMAGE_SIZE, 2, device=motions.device) / IMAGE_SIZE
    y = x[:, None]
    # In this order the sums over single rows and columns come first; and a stack of two planes is a plain copy.
    grid = torch.stack((right + cos * x - sin * y, down + sin * x + cos * y)).permute(1, 2, 3, 0)
    return F.grid_sample(images.to(grid.dtype), grid, align_corners=False)


# Pictures that are made ready at once. Each of the operations that this takes wakes all threads and waits for them:
# beside another process that keeps a core busy, too long a wait for each batch.
_AT_ONCE = 2048


def _groups(slices: list[slice]) -> Iterator[list[slice]]:
    group: list[slice] = []
    for chosen in slices:
        if group and sum(s.stop - s.start for s in [*group, chosen]) > _AT_ONCE:
            yield group
            group = []
        group.append(chosen)
    if group:
        yield group


def _cut(group: list[slice], images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    sizes = [s.stop - s.start for s in group]
    yield from zip(images.split(sizes), labels.split(sizes), strict=True)
