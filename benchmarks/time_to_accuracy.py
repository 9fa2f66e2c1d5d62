"""Seconds and epochs until a test accuracy on MNIST, fused and stock, same seeds, same data in the same order.

The two take turns seed by seed, and each goes first in every other one. ``training_seconds`` is what the optimizer's
steps took, ``total_seconds`` adds the evaluation after each epoch. With --json the runs become the section "accuracy"
of a results file of ``lenet-ext bench``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from lenet_ext.bench.results import merge, read_results, section_to_dict
from lenet_ext.environment.files import write_json
from lenet_ext.training import datasets
from lenet_ext.training.config import MODELS, TrainConfig
from lenet_ext.training.trainer import Trainer


def measure(model: str, seed: int, arguments: argparse.Namespace, images: tuple[Any, Any]) -> dict[str, Any]:
    """Trains until the accuracy is reached, or to the last epoch of the defaults."""
    options = {"seed": seed, "threads": arguments.threads, "device": arguments.device}
    config = TrainConfig.for_data("mnist", model, **options)
    trainer = Trainer(config, *images)
    reached = False
    begin = time.perf_counter()
    while trainer.epoch < config.epochs and not reached:
        line = trainer.run_epoch()
        reached = line["test_accuracy"] >= arguments.accuracy
        print(
            f"{model}, seed {seed}: epoch {line['epoch']}, {100 * line['test_accuracy']:.2f}%, {line['seconds']:.2f} s",
            flush=True,
        )
    return {
        "model": model,
        "seed": seed,
        "target": arguments.accuracy,
        "threads": torch.get_num_threads(),
        "batch": config.batch_size,
        "reached": reached,
        "epochs": trainer.epoch,
        "training_seconds": sum(line["seconds"] for line in trainer.history),
        "total_seconds": time.perf_counter() - begin,
        "test_accuracy": [line["test_accuracy"] for line in trainer.history],
    }


def main() -> None:
    """Reads the command line, measures both networks, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="directory of the MNIST files (default: downloaded)")
    parser.add_argument("--accuracy", type=float, default=0.99)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    images = datasets.load("mnist", arguments.root)
    runs = []
    for seed in range(arguments.seeds):
        for model in MODELS if seed % 2 == 0 else reversed(MODELS):
            runs.append(measure(model, seed, arguments, images))
    for model in MODELS:
        own = [run for run in runs if run["model"] == model]
        reached = sum(run["reached"] for run in own)
        medians = [
            statistics.median(run[key] for run in own) for key in ("training_seconds", "total_seconds", "epochs")
        ]
        print(
            f"{model}: {100 * arguments.accuracy:g}% reached by {reached} of {len(own)}; medians: "
            f"{medians[0]:.1f} s of training, {medians[1]:.1f} s with evaluation, {medians[2]:g} epochs"
        )
    if arguments.json is not None:
        write_json(arguments.json, merge(read_results(arguments.json), section_to_dict("accuracy", runs)))


if __name__ == "__main__":
    main()
