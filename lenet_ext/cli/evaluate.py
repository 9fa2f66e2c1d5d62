"""``lenet-ext eval``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lenet_ext.cli.common import UsageError, add_data, add_device, add_threads, make_console, say

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lenet_ext.training.datasets import DataSet

_DESCRIPTION = """\
Print loss, accuracy and a table of the classes, for a model.safetensors or checkpoint.pt, a folder of
Net.save_pretrained, or a network of the package (mnist; a folder of that name is ./mnist).
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("eval", help="loss, accuracy and a per-class table", description=_DESCRIPTION)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file, folder, or mnist")
    add_data(parser, "what the checkpoint was trained on")
    parser.add_argument("--root", metavar="DIR", help="directory of the data set's files; downloaded if missing")
    parser.add_argument("--model", choices=("fused", "reference"), default="fused", help="default: fused")
    add_device(parser)
    add_threads(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from rich.table import Table
    from rich.text import Text

    from lenet_ext.training import datasets
    from lenet_ext.training.evaluate import evaluate

    loaded = load_model(args)
    data, labels = loaded.data, loaded.data_set.labels
    _, test_data = datasets.load(data, args.root, log=say)
    if (len(labels), loaded.data_set.channels) != (test_data.num_classes, test_data.normalization.channels):
        raise ValueError(f"{args.checkpoint}: its pictures or classes are not those of {data}")
    test_data.normalization = loaded.data_set.normalization
    result = evaluate(loaded.model, test_data.to(loaded.device))
    right, total = int(result.confusion.diagonal().sum()), int(result.confusion.sum())
    say(f"data      {data}, {total} test pictures")
    say(f"loss      {result.loss:.4f}")
    say(f"accuracy  {100 * result.accuracy:.2f}% ({right} of {total})")
    table = Table()
    kind = "digit" if all(label.isdigit() for label in labels) else "class"
    for name in (kind, "pictures", "right", "recall", "precision", "most often taken for"):
        table.add_column(name, justify="right")
    for label, count, hits, recall, precision in result.per_class():
        wrong = result.confusion[label].clone()
        wrong[label] = 0
        worst = f"{labels[int(wrong.argmax())]} ({int(wrong.max())}x)" if int(wrong.max()) else "-"
        table.add_row(Text(labels[label]), str(count), str(hits), _percent(recall), _percent(precision), Text(worst))
    make_console().print(table)
    return 0


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.2f}%"


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode on its device, and what it was trained on."""

    model: nn.Module
    data: str
    data_set: DataSet
    device: torch.device


def load_model(args: argparse.Namespace) -> LoadedModel:
    """The network that ``args.checkpoint`` names: a file, a folder, or one of the package."""
    import torch

    from lenet_ext.environment.device import resolve_device
    from lenet_ext.pretrained import load_pretrained
    from lenet_ext.pretrained.files import load_into
    from lenet_ext.training.datasets import DATA_SETS
    from lenet_ext.training.trainer import build_model

    device = resolve_device(args.device or "auto", fused=args.model == "fused")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    weights = load_pretrained(args.checkpoint)
    data = args.data or weights.data
    if data is None:
        raise UsageError(f"{args.checkpoint} does not say which data set it was trained on: give --data")
    if data not in DATA_SETS:
        raise ValueError(f"{args.checkpoint}: trained on {data!r}, a data set that is not known here")
    try:
        # What the file says is of its own data set.
        data_set = DATA_SETS[data].changed_by(weights.metadata if weights.data in (None, data) else {})
    except ValueError as error:
        raise ValueError(f"{args.checkpoint}: {error}") from None
    model = build_model(args.model, data_set)
    load_into(model, weights.state, args.checkpoint)
    return LoadedModel(model.eval().to(device), data, data_set, device)
