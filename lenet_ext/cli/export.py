"""``lenet-ext export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lenet_ext.cli.common import say
from lenet_ext.training.export import FORMATS, export

_DESCRIPTION = """\
Write a trained network in a format of others, read the file again, and compare: a file that does not compute the same
is not left behind.

  onnx         for ONNX Runtime and others (pip install 'lenet_ext[onnx]')
  torchscript  for libtorch: torch.jit.load
  pt2          for torch.export.load(FILE).module()
  safetensors  the weights alone, for Net.from_pretrained and what else reads them

The programs take any number of pictures. They are of stock layers and run where lenet_ext is not installed; with
--model fused, torchscript and pt2 keep the fused operators, and want an `import lenet_ext` before they are loaded.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "export", help="ONNX, TorchScript, torch.export, safetensors", description=_DESCRIPTION
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="model.safetensors, checkpoint.pt, a folder of Net.save_pretrained, or mnist, which is in the package",
    )
    parser.add_argument("--format", choices=tuple(FORMATS), required=True)
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="the file to write")
    parser.add_argument("--model", choices=("fused", "reference"), default="reference", help="default: reference")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from lenet_ext.net import Net

    net = Net.from_pretrained(args.checkpoint)
    # The configuration of the run has paths of the machine that it ran on.
    about = {name: value for name, value in net.config.items() if name != "config"}
    difference = export(net if args.model == "fused" else net.to_reference(), args.out, args.format, about)
    normalization = about.get("normalization")
    made_of = "normalized as in training"
    if isinstance(normalization, dict) and normalization.keys() >= {"mean", "std"}:
        made_of = f"(byte / 255 - {normalization['mean']}) / {normalization['std']}"
    say(f"input   float32 (N, {net.conv1.in_channels}, 32, 32): {made_of}")
    say(f"output  float32 (N, {net.fc3.out_features}): scores of the classes")
    say(f"wrote {args.out}, {args.out.stat().st_size} bytes; read again, its scores differ by at most {difference:.1e}")
    return 0
