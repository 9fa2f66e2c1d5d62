"""Seconds of training until a test accuracy on MNIST: `lenet_ext.TrainingStep` and the stock loop, eager and
channels_last.

Each seed has the same initial weights, pictures and schedule for all of them (the defaults of ``lenet-ext train --data
mnist``), and they take turns: each seed another one begins. The accuracy is asked for after each epoch and not timed
(``total_seconds`` has it). A seed that does not reach it counts as one that never does.

    python time_to_accuracy.py --root DIR                                    # prints the table
    python time_to_accuracy.py --root DIR --json results/MACHINE.json        # and puts it into a machine's small file
    python time_to_accuracy.py --root DIR --json ../runs/bench/last.json     # or into a raw one of lenet-ext bench
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import summary
import torch
from tables import accuracy_lines

from lenet_ext.bench.results import merge, read_results, section_to_dict
from lenet_ext.environment.files import write_json
from lenet_ext.training import datasets
from lenet_ext.training.config import TrainConfig
from lenet_ext.training.images import LabelledImages
from lenet_ext.training.trainer import Trainer

# Who takes part: the network, and the layout of its parameters.
CONTENDERS = {
    "fused": ("fused", torch.contiguous_format),
    "reference": ("reference", torch.contiguous_format),
    "reference channels_last": ("reference", torch.channels_last),
}

Images = tuple[LabelledImages, LabelledImages]


def build(contender: str, seed: int, arguments: argparse.Namespace, images: Images) -> Trainer:
    """A run that has not begun."""
    model, layout = CONTENDERS[contender]
    options = {"seed": seed, "threads": arguments.threads, "device": arguments.device, "epochs": arguments.epochs}
    trainer = Trainer(TrainConfig.for_data("mnist", model, **options), *images)
    trainer.model.to(memory_format=layout)
    return trainer


def measure(contender: str, seed: int, arguments: argparse.Namespace, images: Images) -> dict[str, Any]:
    """Trains until the accuracy is reached, or to the last epoch."""
    trainer = build(contender, seed, arguments, images)
    reached = False
    begin = time.perf_counter()
    while trainer.epoch < trainer.config.epochs and not reached:
        line = trainer.run_epoch()
        reached = line["test_accuracy"] >= arguments.accuracy
        accuracy = f"{100 * line['test_accuracy']:.2f}%"
        print(f"{contender}, seed {seed}: epoch {line['epoch']}, {accuracy}, {line['seconds']:.2f} s", flush=True)
    return {
        "model": contender,
        "seed": seed,
        "target": arguments.accuracy,
        "threads": torch.get_num_threads(),
        "batch": trainer.config.batch_size,
        "reached": reached,
        "epochs": trainer.epoch,
        "training_seconds": sum(line["seconds"] for line in trainer.history),
        "total_seconds": time.perf_counter() - begin,
        "test_accuracy": [line["test_accuracy"] for line in trainer.history],
    }


def write(path: Path, runs: list[dict[str, Any]]) -> None:
    """Puts the runs into a results file of either kind, in place of those that it has.

    Raises:
        ValueError: it is of another machine.
    """
    section = section_to_dict("accuracy", runs)
    if path.exists() and "columns" in json.loads(path.read_text(encoding="utf-8")):
        summary.add_section(path, "accuracy", section)
    else:
        write_json(path, merge(read_results(path), section))


def main() -> None:
    """Reads the command line, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="directory of the MNIST files (default: downloaded)")
    parser.add_argument("--accuracy", type=float, default=0.99)
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to N-1 (default: 10)")
    parser.add_argument("--epochs", type=int, help="length of the schedule (default: that of lenet-ext train)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    images = datasets.load("mnist", arguments.root)
    for contender in CONTENDERS:  # what is imported and chosen at a first step belongs to no seed
        trainer = build(contender, 0, arguments, images)
        trainer.step(*next(trainer.train_data.batches(trainer.config.batch_size)))
        print(f"{contender}: {trainer.step.path}")
    runs = []
    names = list(CONTENDERS)
    for seed in range(arguments.seeds):
        first = seed % len(names)
        runs += [measure(name, seed, arguments, images) for name in names[first:] + names[:first]]
    print(f"\n{accuracy_lines(runs)}")
    if arguments.json is not None:
        write(arguments.json, runs)


if __name__ == "__main__":
    main()
