"""``lenet-ext predict``."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from lenet_ext.cli.common import UsageError, add_data, add_device, add_threads, error_line, integer, printable, say
from lenet_ext.cli.evaluate import LoadedModel, load_model

_DESCRIPTION = """\
Say what each picture shows and print, one line per file and separated by tabs:
path, digit (or letter, or class), probability.

A picture shows one digit. Size and format do not matter, nor whether it is dark on light or light on dark;
the digit is cut out and framed as in the data set that the checkpoint was trained on. (For cifar10, whose pictures are
photographs, the square in the middle is taken.) A folder stands for all pictures in it and in its folders.

Without a CHECKPOINT, the network is the one in the package that was trained on MNIST. A file that cannot be read is a
line on the standard error, and so is an answer of low probability; after a file that could not be read the exit
code is 1.
"""
_BATCH = 256  # pictures at a time: bounds the memory, and is enough for the network to work at its full speed
# Below it, 1 in 3 answers of the network in the package is wrong on MNIST's test pictures; above it 1 in 400.
_UNSURE = 0.8
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
    loaded = load_model(args)
    files = _Files(args.images, loaded)
    rows = _predictions(files, loaded, min(args.top, loaded.data_set.num_classes))
    if args.json:
        _print_json(rows)
    elif args.csv:
        _print_csv(rows)
    else:
        for path, found in rows:
            say("\t".join([printable(path), *(f"{label}\t{probability:.4f}" for label, probability in found)]))
    return 1 if files.failed else 0


Found = list[tuple[str, float]]  # classes and their probabilities, the most probable first


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

    def __init__(self, paths: Iterable[str], loaded: LoadedModel) -> None:
        self.paths = paths
        self.data = loaded.data
        self.failed = False

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        from lenet_ext.environment.extras import MissingExtraError
        from lenet_ext.training.predict import load_picture

        for path in self._names():
            try:
                picture = load_picture(path, self.data)
            except MissingExtraError:
                raise
            except Exception as error:  # decoders raise whatever they like; the other files can still be read
                self._tell(path, error)
            else:
                yield path, picture

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


def _predictions(files: _Files, loaded: LoadedModel, top: int) -> Iterator[tuple[str, Found]]:
    """Path and most probable classes of each picture that can be read, in their order."""
    batch: list[tuple[str, Any]] = []
    for item in files:
        batch.append(item)
        if len(batch) == _BATCH:
            yield from _answer(batch, loaded, top)
            batch = []
    if batch:
        yield from _answer(batch, loaded, top)


def _answer(batch: list[tuple[str, Any]], loaded: LoadedModel, top: int) -> Iterator[tuple[str, Found]]:
    import torch

    from lenet_ext.training.predict import predict

    pictures = torch.stack([picture for _, picture in batch]).to(loaded.device)
    best = predict(loaded.model, pictures, loaded.data_set.normalization).topk(top)
    labels = loaded.data_set.labels
    for (path, _), values, indices in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
        found = [(labels[index], value) for index, value in zip(indices, values, strict=True)]
        yield path, found
        if not _is_sure(found):
            label, probability = found[0]
            doubt = f"{label} has a probability of only {probability:.2f}"
            print(f"lenet-ext predict: unsure: {printable(path)}: {doubt}", file=sys.stderr)


def _print_json(rows: Iterable[tuple[str, Found]]) -> None:
    lines = []
    for path, found in rows:
        top = [{"label": label, "probability": round(probability, 6)} for label, probability in found]
        lines.append("  " + json.dumps({"path": path, **top[0], "sure": _is_sure(found), "top": top}))
    say("[\n" + ",\n".join(lines) + "\n]" if lines else "[]")


def _print_csv(rows: Iterable[tuple[str, Found]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    header: list[str] = []
    for path, found in rows:
        if not header:
            header = ["path", "label", "probability"]
            header += [f"{name}_{place}" for place in range(2, len(found) + 1) for name in ("label", "probability")]
            writer.writerow(header)
        writer.writerow([printable(path), *(value for label, p in found for value in (label, f"{p:.6f}"))])


def _is_sure(found: Found) -> bool:
    return found[0][1] >= _UNSURE
