"""``lenet-ext predict``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lenet_ext.cli.common import add_data, add_device, add_threads, error_line, say
from lenet_ext.cli.evaluate import load_model

_DESCRIPTION = """\
Say what each picture shows and print, one line per file and separated by tabs:
path, digit (or letter, or class), probability.

A picture shows one digit. Size and format do not matter, nor whether it is dark on light or light on dark;
the digit is cut out and framed as in the data set that the checkpoint was trained on. (For cifar10, whose pictures are
photographs, the square in the middle is taken.)
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("predict", help="say what pictures show", description=_DESCRIPTION)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="model.safetensors or checkpoint.pt")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG, JPEG or another format that Pillow reads")
    add_data(parser, "what the checkpoint was trained on")
    add_device(parser)
    add_threads(parser)
    parser.set_defaults(run=run, model="fused")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from lenet_ext.environment.extras import MissingExtraError, require
    from lenet_ext.training.datasets import DATA_SETS
    from lenet_ext.training.predict import load_picture, predict

    require("PIL", "reading pictures", package="pillow")
    model, data, device = load_model(args)
    failed = False
    for path in args.images:
        try:
            picture = load_picture(path, data)
        except MissingExtraError:
            raise
        except Exception as error:  # decoders raise whatever they like; the other files can still be read
            line = error_line(error)
            print(f"lenet-ext predict: error: {line if path in line else f'{path}: {line}'}", file=sys.stderr)
            failed = True
            continue
        probabilities = predict(model, picture.unsqueeze(0).to(device), data)[0]
        label = int(probabilities.argmax())
        say(f"{path}\t{DATA_SETS[data].labels[label]}\t{probabilities[label]:.4f}")
    return 1 if failed else 0
