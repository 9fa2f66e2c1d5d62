"""Several digits in one picture: where they are, and each by itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lenet_ext.environment.extras import require
from lenet_ext.environment.files import atomic_path
from lenet_ext.training.plots import VERMILION
from lenet_ext.training.predict import INK, open_picture

__all__ = ["Box", "find_digits", "picture_format", "save_annotated"]

_MOST = 2000  # parts; a photograph of gravel has more
_SPECK = 0.2  # what is smaller than this share of the tallest part, both ways, is no digit and no part of one
# Parts one above the other are one digit if the gap between them, and the height of both, are at most this share of the
# tallest part.
_GAP, _TALLER = 0.15, 1.4
_WIDER = 4  # what is wider than this many times its height is a line


@dataclass(frozen=True)
class Box:
    """Where something is: columns from ``left`` up to ``right`` (excluded), rows from ``top`` up to ``bottom``."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.right, self.bottom

    def united(self, other: Box) -> Box:
        """The smallest box around both."""
        return Box(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )

    def scaled(self, factor: float) -> Box:
        """The same place in a picture that is larger by a factor."""
        return Box(*(round(factor * value) for value in self.edges))


def find_digits(ink: Tensor) -> list[tuple[Box, Tensor]]:
    """The digits (or letters) of a picture, each of connected strokes; a part above another, such as the bar of a 5, is
    of the same digit. Digits that touch are one.

    Args:
        ink: float32 (H, W), 0 to 1, as `lenet_ext.training.predict.load_page` returns it; not blank.

    Returns:
        Place and ink (1 is the strongest of each) of every digit, row by row and from left to right.

    Raises:
        ValueError: there are no digits, or far too many strokes.
        lenet_ext.environment.extras.MissingExtraError: SciPy is not installed.

    Example:
        >>> ink = torch.zeros(40, 60)
        >>> ink[10:30, 40:43] = ink[11:31, 10:13] = 1
        >>> [box for box, _ in find_digits(ink)]
        [Box(left=10, top=11, right=13, bottom=31), Box(left=40, top=10, right=43, bottom=30)]
    """
    ndimage = require("scipy.ndimage", "several digits in a picture", package="scipy")
    parts, count = ndimage.label((ink > INK).numpy(), structure=torch.ones(3, 3, dtype=torch.int32).numpy())
    if count > _MOST:
        raise ValueError(f"{count} separate strokes: this is no picture of digits")
    found = [
        (Box(columns.start, rows.start, columns.stop, rows.stop), [number])
        for number, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1)
    ]
    labels = torch.from_numpy(parts)
    digits = []
    found = _in_reading_order(_whole(found))
    if not found:
        raise ValueError("there are no digits in this picture")
    for box, numbers in found:
        rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
        # The stroke of a neighbor that reaches into the box stays out.
        mine = torch.isin(labels[rows, columns], torch.tensor(numbers, dtype=labels.dtype))
        alone = ink[rows, columns] * mine
        digits.append((box, alone / alone.max()))
    return digits


Found = list[tuple[Box, list[int]]]  # places, and the numbers of the parts that are there


def _whole(found: Found) -> Found:
    """Without specks and lines, and with what belongs together joined."""
    tallest = max(box.height for box, _ in found)
    joined: Found = []
    for box, numbers in sorted(found, key=lambda item: item[0].top):
        if max(box.height, box.width) < _SPECK * tallest:
            continue
        for index, (other, more) in enumerate(joined):
            if _belong_together(box, other, tallest):
                joined[index] = box.united(other), more + numbers
                break
        else:
            joined.append((box, numbers))
    return [(box, numbers) for box, numbers in joined if box.width <= _WIDER * box.height]


def _belong_together(one: Box, other: Box, tallest: int) -> bool:
    together = one.united(other)
    if together in (one, other):
        return True  # a digit does not lie within another one
    wide = min(one.right, other.right) - max(one.left, other.left)
    high = min(one.bottom, other.bottom) - max(one.top, other.top)  # below 0: the gap between them
    return (
        # One above the other, and not side by side with one leaning over the other ...
        2 * wide >= min(one.width, other.width)
        and 2 * high <= min(one.height, other.height)
        # ... nor in two rows.
        and -high <= _GAP * tallest
        and together.height <= _TALLER * tallest
    )


def _in_reading_order(found: Found) -> Found:
    rows: list[Found] = []
    for item in sorted(found, key=lambda item: item[0].top):
        box = item[0]
        for row in rows:
            # A line of writing is as high as its digits are on average, and each of them has a good part of it.
            top, bottom = (sum(edges) / len(row) for edges in zip(*((b.top, b.bottom) for b, _ in row), strict=True))
            common = min(box.bottom, bottom) - max(box.top, top)
            if common >= 0.3 * min(box.height, bottom - top):
                row.append(item)
                break
        else:
            rows.append([item])
    return [item for row in rows for item in sorted(row, key=lambda item: item[0].left)]


def picture_format(path: str | Path) -> str:
    """The format that a file's name ends in.

    Raises:
        ValueError: Pillow can write none of that ending.
        lenet_ext.environment.extras.MissingExtraError: Pillow is not installed.
    """
    pil = require("PIL.Image", "pictures", package="pillow")
    found: str | None = pil.registered_extensions().get(Path(path).suffix.lower())
    if found is None or found not in pil.SAVE:
        raise ValueError(f"{path}: the name must end as one of a picture, such as .png")
    return found


def save_annotated(source: str | Path, digits: Sequence[tuple[Box, str]], path: str | Path) -> None:
    """Writes a picture with a box around each digit, and what it is above it.

    Args:
        source: the picture.
        digits: places in it, and what to write.
        path: the picture to write, in the format that its name ends in.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the format is unknown.
        lenet_ext.environment.extras.MissingExtraError: Pillow is not installed.
    """
    draw = require("PIL.ImageDraw", "pictures", package="pillow")
    font = require("PIL.ImageFont", "pictures", package="pillow")
    kind = picture_format(path)
    image = open_picture(source)
    canvas = draw.Draw(image)
    line = max(1, round(max(image.size) / 400))
    for box, text in digits:
        outer = (box.left - 2 * line, box.top - 2 * line, box.right - 1 + 2 * line, box.bottom - 1 + 2 * line)
        canvas.rectangle(outer, outline=VERMILION, width=line)
        size = max(10, round(0.3 * box.height))
        # Above the box, or below it where the picture ends; a white rim keeps it legible on any ground.
        above = outer[1] >= 1.2 * size
        place = (outer[0], outer[1] - 2 * line) if above else (outer[0], outer[3] + 3 * line)
        anchor = "ls" if above else "lt"
        written = {"anchor": anchor, "stroke_width": max(1, size // 10), "stroke_fill": "white"}
        canvas.text(place, text, fill=VERMILION, font=font.load_default(size), **written)
    # In memory first: what Pillow says of a full disk does not mention it.
    buffer = io.BytesIO()
    image.save(buffer, kind)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
