"""Seconds and epochs until a test accuracy on MNIST, fused and stock, same seed, same data order.

Only training counts, not the evaluation after each epoch. The networks are trained one after the other: on a busy
machine, look at the images per second of each epoch before believing the sum.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from lenet_ext import data
from lenet_ext.config import MODELS, TrainConfig
from lenet_ext.files import write_json
from lenet_ext.system import cpu_model, git_commit
from lenet_ext.train import Trainer


def measure(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains until the accuracy is reached, or to the last epoch of the defaults."""
    options = {"seed": arguments.seed, "threads": arguments.threads, "device": arguments.device, "root": arguments.root}
    config = TrainConfig.for_data("mnist", model, **options)
    trainer = Trainer(config, *data.load("mnist", arguments.root))
    reached = False
    while trainer.epoch < config.epochs and not reached:
        line = trainer.run_epoch()
        reached = line["test_accuracy"] >= arguments.accuracy
        print(
            f"{model}: epoch {line['epoch']}, {100 * line['test_accuracy']:.2f}%, {line['seconds']:.2f} s", flush=True
        )
    return {
        "model": model,
        "reached": reached,
        "epochs": trainer.epoch,
        "seconds": sum(line["seconds"] for line in trainer.history),
        "history": trainer.history,
    }


def main() -> None:
    """Reads the command line, measures both networks, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="directory of the MNIST files")
    parser.add_argument("--accuracy", type=float, default=0.99)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runs = [measure(model, arguments) for model in MODELS]
    for run in runs:
        outcome = "reached" if run["reached"] else "not reached"
        print(
            f"{run['model']}: {100 * arguments.accuracy:.1f}% {outcome}, {run['seconds']:.1f} s, {run['epochs']} epochs"
        )
    if arguments.json is not None:
        content = {
            "accuracy": arguments.accuracy,
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": git_commit(),
            "runs": runs,
        }
        write_json(arguments.json, json.loads(json.dumps(content)))


if __name__ == "__main__":
    main()
