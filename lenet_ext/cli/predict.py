"""``lenet-ext predict``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lenet_ext.cli.common import add_device, add_threads, error_line, say
from lenet_ext.cli.evaluate import load_model

_DESCRIPTION = """\
Read the handwritten digit in each picture and print, one line per file and separated by tabs:
path, digit, probability.

A picture shows one digit. Size and format do not matter, nor whether it is dark on light or light on dark;
the digit is cut out and framed as in the data set that the checkpoint was trained on.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("predict", help="read digits from pictures", description=_DESCRIPTION)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="model.safetensors or checkpoint.pt")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG, JPEG or another format that Pillow reads")
    parser.add_argument("--data", choices=("digits", "mnist"), help="default: what the checkpoint was trained on")
    add_device(parser)
    add_threads(parser)
    parser.set_defaults(run=run, model="fused")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from lenet_ext.environment.extras import MissingExtraError, require
    from lenet_ext.training.predict import frame_ink, load_ink, predict

    require("PIL", "reading pictures", package="pillow")
    model, data, device = load_model(args)
    failed = False
    for path in args.images:
        try:
            picture = frame_ink(load_ink(path), data)
        except MissingExtraError:
            raise
        except Exception as error:  # decoders raise whatever they like; the other files can still be read
            line = error_line(error)
            print(f"lenet-ext predict: error: {line if path in line else f'{path}: {line}'}", file=sys.stderr)
            failed = True
            continue
        probabilities = predict(model, picture.unsqueeze(0).to(device), data)[0]
        digit = int(probabilities.argmax())
        say(f"{path}\t{digit}\t{probabilities[digit]:.4f}")
    return 1 if failed else 0
