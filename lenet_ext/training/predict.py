"""From a picture file to what it shows: pictures of any size and kind, brought to what the network was trained on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenet_ext.environment.extras import MissingExtraError, require
from lenet_ext.environment.files import naming
from lenet_ext.training.datasets import DATA_SETS, IMAGE_SIZE, Normalization

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "INK",
    "UNSURE",
    "frame_ink",
    "load_ink",
    "load_page",
    "load_photo",
    "load_picture",
    "open_picture",
    "picture_files",
    "predict",
]

_LARGEST = 512  # pixels along an edge; a digit needs no more, and photographs have millions
_LARGEST_PAGE = 2048
_ANY_SIZE = 1 << 16
# Of the data sets whose pictures lie in the middle of a frame of 28x28: how long their longer side is.
_LONGER_SIDE = {"fashion-mnist": 28, "kmnist": 28, "emnist-letters": 24, "emnist-balanced": 24}
INK = 0.2  # what is darker than this share of the darkest is part of the digit
# Below it, 1 in 3 answers of the network in the package is wrong on MNIST's test pictures; above it 1 in 400.
UNSURE = 0.8


def load_ink(path: str | Path) -> Tensor:
    """Reads a picture and tells ink from ground, whichever is the darker one.

    Args:
        path: a file in any format and mode that Pillow reads; transparency, 16 bits and EXIF rotation included.

    Returns:
        float32 (H, W), 0 is ground and 1 the strongest ink.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no picture, or damaged or too large, or there is nothing in it.
        lenet_ext.environment.extras.MissingExtraError: Pillow is not installed.
    """
    return _ink(path, _LARGEST)[0]


def load_page(path: str | Path) -> tuple[Tensor, float]:
    """`load_ink` of a picture with more than one digit, which is kept larger.

    Returns:
        float32 (H, W), and how many pixels of the picture, in each direction, are one of its pixels.
    """
    return _ink(path, _LARGEST_PAGE)


def _ink(path: str | Path, largest: int) -> tuple[Tensor, float]:
    gray, edge = _decoded(path, "L", _gray, largest)
    scale = largest / max(gray.shape)
    if scale < 1:
        gray = _resize(gray, max(1, round(gray.shape[0] * scale)), max(1, round(gray.shape[1] * scale)))
    ink = _separate(gray)
    if ink is None:
        raise ValueError(f"{path}: the picture is blank")
    return ink, edge / max(ink.shape)


def load_photo(path: str | Path) -> Tensor:
    """Reads a photograph: the square in its middle, in colors.

    Args:
        path: a file in any format and mode that Pillow reads; what is transparent is white.

    Returns:
        uint8 (3, 32, 32). A picture of 32x32 pixels comes unchanged.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no picture, or damaged or too large.
        lenet_ext.environment.extras.MissingExtraError: Pillow is not installed.
    """
    pixels, _ = _decoded(path, "RGB", _colors, _LARGEST)
    height, width = pixels.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[:, top : top + side, left : left + side]
    small = torch.stack([_resize(channel, IMAGE_SIZE, IMAGE_SIZE) for channel in square])
    return small.round().clamp(0, 255).to(torch.uint8)


def load_picture(path: str | Path, data: str) -> Tensor:
    """Reads a picture as one of a data set: `load_photo` for colors, else `load_ink` and `frame_ink`.

    Returns:
        uint8 (C, 32, 32).
    """
    return load_photo(path) if DATA_SETS[data].channels == 3 else frame_ink(load_ink(path), data)


_Read = TypeVar("_Read")


def _decoded(path: str | Path, mode: str, read: Callable[[Image], _Read], largest: int) -> tuple[_Read, int]:
    """Opens a picture, turned as it is shown, and reads it; what Pillow raises becomes an error that names the file.

    The picture may be read smaller than it is, but with more than `largest` pixels along its longer edge. How long that
    edge is in the file is returned beside.
    """
    pil = require("PIL.Image", "reading pictures", package="pillow")
    ops = require("PIL.ImageOps", "reading pictures", package="pillow")
    # Not by its name, by which Pillow would map some formats into memory: a mapped file that shrinks ends the process.
    with naming(path), open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is unusual in a file: it can be read, or it cannot
        try:
            picture = pil.open(file)
            # JPEG only: decode at a lower resolution that still exceeds the target.
            edge = max(picture.size)
            picture.draft(mode, (2 * largest, 2 * largest))
            return read(ops.exif_transpose(picture)), edge
        except MissingExtraError:
            raise
        except pil.UnidentifiedImageError:
            raise ValueError(f"{path}: not a picture in a known format") from None
        except pil.DecompressionBombError as error:
            raise ValueError(f"{path}: the picture is too large ({error})") from None
        except Exception as error:  # of damaged files Pillow tells by almost every kind of error
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path}: damaged picture ({error})") from None


def _colors(image: Image) -> Tensor:
    """Any mode -> float32 (3, H, W) from 0 to 255, laid over white."""
    numpy = require("numpy", "reading pictures")
    return torch.from_numpy(numpy.array(_on_white(image), dtype=numpy.float32)).permute(2, 0, 1)


def _on_white(image: Image) -> Image:
    """Any mode -> RGB, laid over white."""
    pil = require("PIL.Image", "reading pictures", package="pillow")
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel: the range is not known
        return pil.fromarray(_gray(image).mul(255).round().to(torch.uint8).numpy()).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _gray(image: Image) -> Tensor:
    """Any mode -> float32 (H, W) from 0 to 1, transparency laid over a ground that shows the digit."""
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel: the range is not known, take the one that occurs
        values = _tensor(image, "F").nan_to_num(0.0, 0.0, 0.0)
        values -= values.min()
        return values / values.max().clamp(min=1e-12)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return _tensor(image, "L") / 255
    image = image.convert("RGBA")
    alpha = _tensor(image.getchannel("A"), "L") / 255
    gray = _tensor(image.convert("RGB"), "L") / 255
    visible = (gray * alpha).sum() / alpha.sum().clamp(min=1e-12)
    ground = 0.0 if visible > 0.5 else 1.0
    return gray * alpha + ground * (1 - alpha)


def _tensor(image: Image, mode: str) -> Tensor:
    numpy = require("numpy", "reading pictures")
    return torch.from_numpy(numpy.array(image.convert(mode), dtype=numpy.float32))


def _separate(gray: Tensor) -> Tensor | None:
    """Gray values -> ink from 0 to 1; None where there is no contrast.

    The frame of the picture is taken to show the ground. A plane fitted to it removes light that falls off to one side,
    and its scatter gives the noise that is not ink. On a clean picture both are nothing.
    """
    height, width = gray.shape
    rows, columns = torch.meshgrid(
        torch.linspace(-1, 1, height, dtype=torch.float64),
        torch.linspace(-1, 1, width, dtype=torch.float64),
        indexing="ij",
    )
    edge_h, edge_w = max(1, height // 20), max(1, width // 20)
    frame = torch.ones(height, width, dtype=torch.bool)
    frame[edge_h : height - edge_h, edge_w : width - edge_w] = False
    values = gray.double()
    level = values[frame].median()
    spread = (values[frame] - level).abs().median()
    # Ink that touches the frame stays out of the fit.
    frame &= (values - level).abs() <= 4 * spread + 1e-6
    plane = torch.stack([torch.ones_like(rows), rows, columns], dim=-1)
    # A frame of a single level has nothing to fit, and leaves the value exact.
    ground: Tensor = level
    if spread > 0 and int(frame.sum()) >= 8:
        ground = plane @ torch.linalg.lstsq(plane[frame], values[frame].unsqueeze(1)).solution.squeeze(1)
    difference = values - ground
    if -difference.min() > difference.max():
        # Ink on paper takes away a share of the light that falls there, however bright or dim that is.
        difference = -difference / torch.as_tensor(ground).clamp(min=0.1)
    noise = 3 * difference[frame].abs().median()
    ink = (difference - noise).clamp(min=0)
    if ink.max() < 0.02:  # five levels of 255: nothing that a person would see
        return None
    return (ink / ink.max()).float()


def frame_ink(ink: Tensor, data: str, *, cut_out: bool = False) -> Tensor:
    """Puts a digit (or letter, or garment) into the frame in which the pictures of a data set show it.

    ``mnist``: the longer side is 20 pixels, the center of mass is the middle of 28x28, padded to 32x32.
    ``digits``: the whole height is filled, at a resolution of 8x8, resized to 32x32.
    The others: the longer side is 24 pixels (EMNIST) or 28, in the middle of 28x28, padded to 32x32.
    A picture that has the size of that data set's pictures already is taken to be one of them, and only resized, unless
    it was ``cut_out`` of another.

    Args:
        ink: float32 (H, W), 0 to 1, as `load_ink` returns it; not blank.
        data: name of the data set.
        cut_out: whether the size of the picture means nothing.

    Returns:
        uint8 (1, 32, 32).

    Raises:
        ValueError: the data set is unknown, or shows photographs.

    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits"; E. Alpaydin, C. Kaynak, "Optical
    Recognition of Handwritten Digits", both in the description of the files; G. Cohen and others, "EMNIST: an extension
    of MNIST to handwritten letters", 2017, section II. How kmnist frames its characters was not found; it is a guess.

    Example:
        >>> ink = torch.zeros(100, 60); ink[10:90, 28:32] = 1
        >>> frame_ink(ink, "mnist").shape
        torch.Size([1, 32, 32])
    """
    known = [name for name, data_set in DATA_SETS.items() if data_set.channels == 1]
    if data not in known:
        raise ValueError(f"data must be one of {', '.join(known)}, found {data!r}")
    size = ink.shape[0]
    if not cut_out and ink.shape[1] == size and size in (8 if data == "digits" else 28, IMAGE_SIZE):
        framed = F.pad(ink, (2,) * 4) if size == 28 else _resize(ink, IMAGE_SIZE, IMAGE_SIZE) if size == 8 else ink
    else:
        inked = ink > INK
        rows, columns = inked.any(1).nonzero().flatten(), inked.any(0).nonzero().flatten()
        ink = ink[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
        if data in _LONGER_SIDE:
            framed = _frame_in_the_middle(ink, _LONGER_SIDE[data])
        else:
            framed = _frame_by_mass(ink) if data == "mnist" else _frame_by_height(ink)
    return framed.mul(255).round().clamp(0, 255).to(torch.uint8).unsqueeze(0)


def _frame_by_mass(ink: Tensor) -> Tensor:
    scale = 20 / max(ink.shape)
    height, width = (max(1, round(size * scale)) for size in ink.shape)
    ink = _resize(ink, height, width)
    total = ink.sum()
    offsets = []
    for axis, size in enumerate((height, width)):
        mass = (ink.sum(1 - axis) * torch.arange(size)).sum() / total
        offset = round((IMAGE_SIZE - 1) / 2 - mass.item())
        offsets.append(min(max(offset, 0), IMAGE_SIZE - size))
    top, left = offsets
    return F.pad(ink, (left, IMAGE_SIZE - width - left, top, IMAGE_SIZE - height - top))


def _frame_in_the_middle(ink: Tensor, longer_side: int) -> Tensor:
    scale = longer_side / max(ink.shape)
    height, width = (max(1, round(size * scale)) for size in ink.shape)
    top, left = (IMAGE_SIZE - height) // 2, (IMAGE_SIZE - width) // 2
    return F.pad(_resize(ink, height, width), (left, IMAGE_SIZE - width - left, top, IMAGE_SIZE - height - top))


def _frame_by_height(ink: Tensor) -> Tensor:
    # Hardly a picture of that data set is wider than seven of its eight columns.
    width = min(max(1, round(ink.shape[1] * IMAGE_SIZE / ink.shape[0])), 28)
    left = (IMAGE_SIZE - width) // 2
    large = F.pad(_resize(ink, IMAGE_SIZE, width), (left, IMAGE_SIZE - width - left, 0, 0))
    return _resize(F.avg_pool2d(large[None], 4)[0], IMAGE_SIZE, IMAGE_SIZE)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image[None, None].float(), size=(height, width), mode="bilinear", antialias=True)[0, 0]


def predict(model: nn.Module, pictures: Tensor, normalization: Normalization) -> Tensor:
    """Probabilities of the classes.

    Args:
        model: on the CPU or elsewhere, as the pictures are.
        pictures: uint8 (N, C, 32, 32).
        normalization: that of the data set that the model was trained on.

    Returns:
        float32 (N, classes); each row sums to 1.
    """
    model.eval()
    with torch.inference_mode():
        return model(normalization(pictures)).float().softmax(1)


def open_picture(path: str | Path) -> Image:
    """The picture in colors and in its full size, as it is shown; what is transparent is white.

    Raises:
        As `load_photo`.
    """
    return _decoded(path, "RGB", _on_white, _ANY_SIZE)[0]


def picture_files(path: str | Path) -> list[Path]:
    """The pictures in a folder and in the folders within it, hidden ones left out.

    Args:
        path: the folder.

    Returns:
        Files whose names end as those of pictures that Pillow can read, in the order of their names.

    Raises:
        OSError: a folder cannot be read.
        lenet_ext.environment.extras.MissingExtraError: Pillow is not installed.
    """
    pil = require("PIL.Image", "reading pictures", package="pillow")
    endings = {ending for ending, kind in pil.registered_extensions().items() if kind in pil.OPEN}
    found: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(folder, name)
            for name in sorted(names)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings
        ]
    return found


def _raise(error: OSError) -> None:
    raise error
