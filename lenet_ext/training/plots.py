"""Pictures of a training run, drawn without a display.

All are dark on a white ground of their own, which reads as well on a dark page as on a light one.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import Tensor

from lenet_ext.environment.extras import require
from lenet_ext.environment.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lenet_ext.training.evaluate import Answer

__all__ = [
    "figure_format",
    "in_default_style",
    "new_figure",
    "plot_answers",
    "plot_confusion",
    "plot_curves",
    "plot_filters",
    "save_figure",
    "tidy",
]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Colors that stay apart for color-blind readers. Source: M. Okabe, K. Ito, "Color Universal Design".
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLORS = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY)


def in_default_style(draw: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorator of what draws: the colors chosen here do not go with those of a style of the user's own."""

    @functools.wraps(draw)
    def drawn(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with require("matplotlib.style", "pictures").context("default"):
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches. Made without pyplot: no global state, no window, no display needed."""
    # Inches: on a dark page the edge of the figure can be seen, and text is not to touch it.
    layout = require("matplotlib.layout_engine", "pictures").ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return require("matplotlib.figure", "pictures").Figure(figsize=(width, height), layout=layout)


def figure_format(path: str | Path) -> str:
    """The format that the name of a figure ends in, PNG if it has no ending.

    Raises:
        ValueError: matplotlib can write none of that ending.
        lenet_ext.environment.extras.MissingExtraError: matplotlib is not installed.
    """
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    if kind not in require("matplotlib.backend_bases", "pictures").FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"{path}: the name must end as one of a picture, such as .png")
    return kind


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure in the format that the name ends in, as `figure_format` has it, atomically.

    Raises:
        OSError: the file cannot be written.
        ValueError: the format is unknown.
    """
    kind = figure_format(path)
    # In memory first: what a full disk is called by the libraries beneath differs.
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def tidy(axes: Axes) -> None:
    """The look that all pictures here share: no box, light horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


@in_default_style
def plot_curves(path: str | Path, history: list[dict[str, Any]], title: str) -> None:
    """Draws loss and test accuracy over the epochs.

    Args:
        path: the picture to write.
        history: the ``epochs`` of ``history.json``; may be empty.
        title: above the picture.
    """
    figure = new_figure(9, 3.8)
    figure.suptitle(title)
    losses, accuracy = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in history]
    marker = "o" if len(epochs) < 40 else None
    style: dict[str, Any] = {"marker": marker, "markersize": 3.5, "linewidth": 1.6}
    losses.plot(epochs, [line["train_loss"] for line in history], color=BLUE, label="training", **style)
    losses.plot(epochs, [line["test_loss"] for line in history], color=VERMILION, label="test", **style)
    losses.set(xlabel="epoch", ylabel="cross-entropy")
    percent = [100 * line["test_accuracy"] for line in history]
    accuracy.plot(epochs, percent, color=VERMILION, label="test", **style)
    accuracy.set(xlabel="epoch", ylabel="test accuracy, %")
    ticker = require("matplotlib.ticker", "pictures")
    for axes in (losses, accuracy):
        tidy(axes)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if history:
        losses.set_yscale("log")
        losses.legend(frameon=False)
        accuracy.margins(y=0.12)
        accuracy.annotate(
            f"{percent[-1]:.2f}%",
            (epochs[-1], percent[-1]),
            textcoords="offset points",
            xytext=(0, 6),  # above the line, which rises
            ha="right",
            color=VERMILION,
        )
    else:
        for axes in (losses, accuracy):
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "no epoch trained", ha="center", transform=axes.transAxes, color="0.5")
    save_figure(figure, path)


@in_default_style
def plot_confusion(path: str | Path, confusion: Tensor, title: str, labels: Sequence[str] | None = None) -> None:
    """Draws a confusion matrix: counts as numbers, the share of each row as color.

    Args:
        path: the picture to write.
        confusion: int64 (classes, classes), rows are the true ones.
        title: above the picture.
        labels: of the classes; their numbers by default.
    """
    classes = range(len(confusion))
    names = list(labels or map(str, classes))
    # Room for each row, and for long names beside and below.
    side = max(5.6, 0.26 * len(classes) + 1.6) + 0.06 * max(map(len, names))
    figure = new_figure(side + 0.6, side)
    axes = figure.subplots()
    share = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    # A square root makes single mistakes visible beside hundreds of right answers.
    image = axes.imshow(share.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    size = 9 if len(classes) <= 10 else 6
    for row in classes:
        for column in classes:
            count = int(confusion[row, column])
            if count:
                color = "white" if share[row, column] > 0.3 else "0.15"
                axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=size)
    axes.set(xticks=classes, yticks=classes, xlabel="predicted", ylabel="true", title=title)
    axes.set_xticklabels(names, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticklabels(names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 0.1**0.5, 0.5**0.5, 1])
    bar.ax.set_yticklabels(["0%", "10%", "50%", "100%"])
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    save_figure(figure, path)


@in_default_style
def plot_answers(
    path: str | Path, images: Tensor, answers: Sequence[Answer], title: str, labels: Sequence[str] | None = None
) -> None:
    """Draws pictures with what they are, what they were taken for, and the probability of that.

    Args:
        path: the picture to write.
        images: uint8 (N, C, H, W), those that the answers' ``index`` counts; 1 channel, bright ink, or 3.
        answers: which to draw, and what to write over them; at least one.
        title: above the picture.
        labels: of the classes; their numbers by default.
    """
    columns = min(8, len(answers))
    rows = math.ceil(len(answers) / columns)
    names = list(labels or map(str, range(1 + max(max(answer.label, answer.predicted) for answer in answers))))
    # A cell's size, with a picture as the unit: room for two lines over it, and for long names.
    width, height = max(1.2, 0.07 * (max(map(len, names)) + 11)), 1.5
    # Wide enough for the title, however few they are.
    figure = new_figure(max(4.8, width * columns + 0.2), height * rows + 0.7)
    figure.suptitle(title, fontsize=11)
    # One for all of them: axes for each would take some times as long to draw.
    axes = figure.subplots()
    for number, answer in enumerate(answers):
        row, column = divmod(number, columns)
        left, bottom = column * width + (width - 1) / 2, (row + 1) * height
        pixels = images[answer.index].permute(1, 2, 0).cpu().numpy()  # colors as they are, ink dark on white
        axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=255, extent=(left, left + 1, bottom, bottom - 1))
        frame = [left, left + 1, left + 1, left, left], [bottom, bottom, bottom - 1, bottom - 1, bottom]
        axes.plot(*frame, color="0.8", linewidth=0.8)
        text = f"{names[answer.label]}\nas {names[answer.predicted]}, {answer.probability:.1%}"
        axes.text(left + 0.5, bottom - 1.06, text, ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(0, columns * width), ylim=(rows * height + 0.05, 0.15), aspect="equal")
    axes.set_axis_off()
    save_figure(figure, path)


@in_default_style
def plot_filters(path: str | Path, weight: Tensor, title: str) -> None:
    """Draws the filters of a convolution, with one scale for all of them.

    Args:
        path: the picture to write.
        weight: floating point (filters, C, H, W). For 1 channel blue is below zero and red above it; for 3, which are
            red, green and blue, zero is gray. What is not finite is drawn as zero.
        title: above the picture.
    """
    weight = weight.detach().float().cpu().nan_to_num(0.0, 0.0, 0.0)
    limit = float(weight.abs().max()) or 1.0
    columns = min(8, len(weight))
    rows = math.ceil(len(weight) / columns)
    figure = new_figure(max(4.8, 1.2 * columns + 0.8), 1.35 * rows + 0.6)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= len(weight):
            axes.set_axis_off()
            continue
        pixels = weight[number].permute(1, 2, 0)
        in_color = pixels if pixels.shape[2] == 1 else 0.5 + pixels / (2 * limit)
        image = axes.imshow(in_color.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_title(str(number + 1), fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("0.8")
    if weight.shape[1] == 1:
        bar = figure.colorbar(image, ax=grid, shrink=0.8, label="weight")
        bar.outline.set_visible(False)
    save_figure(figure, path)
