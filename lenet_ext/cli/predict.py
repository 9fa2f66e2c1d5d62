"""``lenet-ext predict``."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lenet_ext.cli.common import UsageError, add_data, add_device, add_threads, error_line, integer, printable, say
from lenet_ext.cli.evaluate import LoadedModel, load_model
from lenet_ext.training.predict import UNSURE

if TYPE_CHECKING:
    from torch import Tensor

_DESCRIPTION = """\
Say what each picture shows and print, one line per file and separated by tabs:
path, digit (or letter, or class), probability.

A picture shows one digit. Size and format do not matter, nor whether it is dark on light or light on dark;
the digit is cut out and framed as in the data set that the checkpoint was trained on. (For cifar10, whose pictures are
photographs, the square in the middle is taken.) A folder stands for all pictures in it and in its folders.

With --multiple, a picture may show several digits that do not touch: a line for each of them, in reading order, with
its place as the last column, left,top,right,bottom in pixels.

Without a CHECKPOINT, the network is the one in the package that was trained on MNIST. A file that cannot be read is a
line on the standard error, and so is an answer of low probability; after a file that could not be read the exit
code is 1.
"""
_BATCH = 256  # pictures at a time: bounds the memory, and is enough for the network to work at its full speed
_EDGES = ("left", "top", "right", "bottom")
_ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("predict", help="say what pictures show", description=_DESCRIPTION)
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="model.safetensors, checkpoint.pt, or a folder of Net.save_pretrained (default: mnist, in the package)",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="PNG, JPEG or another format that Pillow reads, or a folder"
    )
    parser.add_argument("--top", type=integer(1), default=1, metavar="K", help="the K most probable classes")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON array with an object per file")
    form.add_argument("--csv", action="store_true", help="print comma-separated values, with a line of names")
    parser.add_argument("--multiple", action="store_true", help="find all digits of a picture, and where they are")
    parser.add_argument("--save", metavar="FILE", help="with --multiple: write the picture with boxes in it")
    add_data(parser, "what the checkpoint was trained on")
    add_device(parser)
    add_threads(parser)
    parser.set_defaults(run=run, model="fused")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from lenet_ext.environment.extras import require

    require("PIL", "reading pictures", package="pillow")
    if args.checkpoint is not None and not _is_checkpoint(args.checkpoint):
        args.images.insert(0, args.checkpoint)
        args.checkpoint = None
    if args.checkpoint is None:
        args.checkpoint = "mnist"
        if _is_checkpoint(args.images[0]) and not os.path.isdir(args.images[0]):
            raise UsageError(f"{args.images[0]} is a checkpoint: the following arguments are required: IMAGE")
        if args.data not in (None, args.checkpoint):
            raise UsageError(f"--data {args.data} needs a CHECKPOINT that was trained on it")
    if args.save is not None:
        _check_save(args)
    loaded = load_model(args)
    if args.multiple and loaded.data_set.channels != 1:
        raise UsageError(f"--multiple is for digits and letters, not for the photographs of {loaded.data}")
    files = _Files(args.images, loaded, args.multiple)
    top = min(args.top, loaded.data_set.num_classes)
    rows: Iterable[Row] = _predictions(files, loaded, top)
    if args.save is not None:
        rows = _saved(list(rows), args)
    if args.json:
        _print_json(rows)
    elif args.csv:
        _print_csv(rows, top, args.multiple)
    else:
        for row in rows:
            fields = [printable(row.path), *(f"{label}\t{probability:.4f}" for label, probability in row.found)]
            say("\t".join(fields if row.box is None else [*fields, ",".join(map(str, row.box))]))
    return 1 if files.failed else 0


Box = tuple[int, int, int, int]  # left, top, right, bottom


class Row(NamedTuple):
    """What one digit was taken for: classes and their probabilities, the most probable first."""

    path: str
    found: list[tuple[str, float]]
    box: Box | None

    @property
    def is_sure(self) -> bool:
        """Whether the answer can be given without a word of doubt."""
        return self.found[0][1] >= UNSURE


class Item(NamedTuple):
    """One digit to look at: uint8 (C, 32, 32), and where it is if that was asked for."""

    path: str
    picture: Tensor
    box: Box | None


def _is_checkpoint(path: str) -> bool:
    """Whether the first argument names a network; a picture otherwise."""
    from lenet_ext.pretrained import CONFIG, WEIGHTS, built_in
    from lenet_ext.pretrained.files import is_weights

    if path in built_in():
        return True
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, name)) for name in (WEIGHTS, CONFIG))
    if path.lower().endswith(_ENDINGS):
        return True
    try:
        return os.path.isfile(path) and is_weights(path)
    except OSError:  # said of it when it is read
        return False


class _Files:
    """The pictures that were asked for, read one after the other; what cannot be read is told and left out."""

    def __init__(self, paths: Iterable[str], loaded: LoadedModel, multiple: bool) -> None:
        self.paths = paths
        self.data = loaded.data
        self.read = self._several if multiple else self._one
        self.failed = False

    def __iter__(self) -> Iterator[Item]:
        from lenet_ext.environment.extras import MissingExtraError

        for path in self._names():
            try:
                items = self.read(path)
            except MissingExtraError:
                raise
            except Exception as error:  # decoders raise whatever they like; the other files can still be read
                self._tell(path, error)
            else:
                yield from items

    def _one(self, path: str) -> list[Item]:
        from lenet_ext.training.predict import load_picture

        return [Item(path, load_picture(path, self.data), None)]

    def _several(self, path: str) -> list[Item]:
        from lenet_ext.training.predict import frame_ink, load_page
        from lenet_ext.training.segment import find_digits

        ink, scale = load_page(path)
        return [
            Item(path, frame_ink(digit, self.data, cut_out=True), box.scaled(scale).edges)
            for box, digit in find_digits(ink)
        ]

    def _names(self) -> Iterator[str]:
        from lenet_ext.training.predict import picture_files

        for path in self.paths:
            if not os.path.isdir(path):
                yield path
                continue
            try:
                names = picture_files(path)
                if not names:
                    raise ValueError("there are no pictures in this folder")
            except (OSError, ValueError) as error:
                self._tell(path, error)
            else:
                yield from map(str, names)

    def _tell(self, path: str, error: Exception) -> None:
        line, name = error_line(error), printable(path)
        print(f"lenet-ext predict: error: {line if line.startswith(name) else f'{name}: {line}'}", file=sys.stderr)
        self.failed = True


def _predictions(files: Iterable[Item], loaded: LoadedModel, top: int) -> Iterator[Row]:
    """The most probable classes of each digit that can be read, in their order."""
    batch: list[Item] = []
    for item in files:
        batch.append(item)
        if len(batch) == _BATCH:
            yield from _answer(batch, loaded, top)
            batch = []
    if batch:
        yield from _answer(batch, loaded, top)


def _answer(batch: list[Item], loaded: LoadedModel, top: int) -> Iterator[Row]:
    import torch

    from lenet_ext.training.predict import predict

    pictures = torch.stack([item.picture for item in batch]).to(loaded.device)
    best = predict(loaded.model, pictures, loaded.data_set.normalization).topk(top)
    labels = loaded.data_set.labels
    for item, values, indices in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
        row = Row(item.path, [(labels[index], p) for index, p in zip(indices, values, strict=True)], item.box)
        yield row
        if not row.is_sure:
            label, probability = row.found[0]
            where = "" if row.box is None else f" at {','.join(map(str, row.box))}"
            doubt = f"{label}{where} has a probability of only {probability:.2f}"
            print(f"lenet-ext predict: unsure: {printable(row.path)}: {doubt}", file=sys.stderr)


def _check_save(args: argparse.Namespace) -> None:
    """Found out before the work, not after."""
    from lenet_ext.training.segment import picture_format

    if not args.multiple:
        raise UsageError("--save needs --multiple: it draws where the digits are")
    if len(args.images) != 1 or os.path.isdir(args.images[0]):
        raise UsageError("--save takes one picture")
    try:
        picture_format(args.save)
    except ValueError as error:
        raise UsageError(f"--save {error}") from None


def _saved(rows: list[Row], args: argparse.Namespace) -> list[Row]:
    from lenet_ext.training.segment import Box as Place
    from lenet_ext.training.segment import save_annotated

    if rows:
        texts = [row.found[0][0] + ("" if row.is_sure else "?") for row in rows]
        places = [Place(*row.box) for row in rows if row.box is not None]
        save_annotated(rows[0].path, list(zip(places, texts, strict=True)), args.save)
    return rows


def _print_json(rows: Iterable[Row]) -> None:
    lines = []
    for row in rows:
        top = [{"label": label, "probability": round(probability, 6)} for label, probability in row.found]
        entry = {"path": row.path, **top[0], "sure": row.is_sure, "top": top}
        if row.box is not None:
            entry["box"] = dict(zip(_EDGES, row.box, strict=True))
        lines.append("  " + json.dumps(entry))
    say("[\n" + ",\n".join(lines) + "\n]" if lines else "[]")


def _print_csv(rows: Iterable[Row], top: int, multiple: bool) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    # Also where no picture can be read: a table without rows, for who expects a table.
    header = ["path", "label", "probability"]
    header += [f"{name}_{n}" for n in range(2, top + 1) for name in ("label", "probability")]
    writer.writerow([*header, *(_EDGES if multiple else ())])
    for row in rows:
        found = (value for label, probability in row.found for value in (label, f"{probability:.6f}"))
        writer.writerow([printable(row.path), *found, *(row.box or ())])
