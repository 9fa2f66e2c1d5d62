"""``lenet-ext train``."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenet_ext.cli.common import (
    UsageError,
    add_data,
    add_device,
    add_threads,
    integer,
    learning_rate,
    make_console,
    percent,
    say,
)
from lenet_ext.training.config import OPTIMIZERS, RECIPES, SCHEDULES, TrainConfig

if TYPE_CHECKING:
    from lenet_ext.training.distributed import Processes
    from lenet_ext.training.evaluate import Answer
    from lenet_ext.training.metrics_log import MetricsLog
    from lenet_ext.training.trainer import Trainer

_DESCRIPTION = """\
Train LeNet, evaluate after each epoch, and write to --out:
  model.safetensors  weights, for eval and predict
  checkpoint.pt      everything that --resume needs
  history.json       configuration; losses, accuracy and speed of each epoch
  curves.png         losses and accuracy over the epochs
  confusion.png      how often each class was taken for each other one
  misclassified.png  the test pictures that went most wrong (or least certain)
  filters.png        the first layer's filters

With several processes or machines, each takes its share of every batch, and the result is that of one process:
  torchrun --nproc-per-node N -m lenet_ext train ...
"""


# What a run leaves in --out.
_FILES = (
    "model.safetensors",
    "checkpoint.pt",
    "history.json",
    "curves.png",
    "confusion.png",
    "misclassified.png",
    "filters.png",
)
_WORST = 40  # pictures in misclassified.png, at most
# The options that are values of the configuration, and those of them that a continued run must have had from the start.
_FIXED = ("data", "model", "batch_size", "lr", "optimizer", "schedule", "augment", "seed")
_OPTIONS = (*_FIXED, "epochs", "device", "threads", "root")


def _defaults(name: str) -> str:
    return ", ".join(f"{data} {getattr(recipe, name)}" for data, recipe in RECIPES.items())


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("train", help="train and evaluate", description=_DESCRIPTION)
    add_data(parser, "digits, which come with scikit-learn and need no files")
    parser.add_argument(
        "--root", metavar="DIR", help="directory of the data set's files as published; what is missing is downloaded"
    )
    parser.add_argument("--model", choices=("fused", "reference"), help="fused (default), or stock layers")
    parser.add_argument(
        "--epochs",
        type=integer(0),
        metavar="N",
        help=f"total number, 0 only evaluates (default: {_defaults('epochs')})",
    )
    parser.add_argument("--batch-size", type=integer(1), metavar="B", help="default: 64, digits 32")
    parser.add_argument(
        "--lr",
        type=learning_rate,
        metavar="X",
        help="the highest rate (default: one-cycle sgd 0.05 at batch 64, cifar10 0.02, adam 0.005; "
        "exponential sgd 0.02, adam 0.002)",
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="default: sgd, digits adamw")
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="of the rate: one-cycle rises and falls once in the whole run, exponential falls from epoch to epoch "
        "(default: one-cycle, digits exponential)",
    )
    parser.add_argument(
        "--augment",
        action="store_true",
        default=None,
        help="turn each training picture by a random angle of up to 10 degrees, and move it by fractions of a pixel, "
        "anew in each epoch: a little more accuracy in runs of dozens of epochs",
    )
    add_device(parser)
    add_threads(parser)
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), metavar="N", help="default: 0")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: runs/DATA-MODEL, or where the checkpoint to resume lies"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="CHECKPOINT",
        help="continue exactly from a checkpoint.pt, or start from the weights of a model.safetensors",
    )
    parser.add_argument(
        "--target", type=percent, metavar="ACC", help="stop after the epoch that reaches this test accuracy, in percent"
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="DIR",
        help="write metrics.csv there after each epoch, and events for TensorBoard where it is installed",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from lenet_ext.environment.extras import require

    # Missing extras are told now, not when an hour of training is to be written.
    require("safetensors", "checkpoints")
    require("matplotlib", "pictures")

    state, weights, config = _prepare(args)
    out = args.out or _default_out(args, state, config)
    out.mkdir(parents=True, exist_ok=True)

    from lenet_ext.training.distributed import join_processes

    with join_processes(config.device) as processes:
        _run(args, config, state, weights, out, processes)
    return 0


def _run(
    args: argparse.Namespace,
    config: TrainConfig,
    state: dict[str, Any] | None,
    weights: dict[str, Any] | None,
    out: Path,
    processes: Processes,
) -> None:
    from lenet_ext.pretrained.files import load_into
    from lenet_ext.training import datasets
    from lenet_ext.training.metrics_log import MetricsLog
    from lenet_ext.training.trainer import Trainer

    tell = say if processes.is_first else _say_nothing
    with processes.first_goes_ahead():
        train_data, test_data = datasets.load(config.data, config.root, log=tell)
    trainer = Trainer(config, train_data, test_data, processes)
    if state is not None:
        try:
            trainer.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{args.resume}: {error}") from None
        tell(f"resumed {args.resume} after epoch {trainer.epoch}")
    elif weights is not None:
        load_into(trainer.model, weights, args.resume)
        tell(
            f"starting from the weights of {args.resume}: weights only; optimizer, epochs and random numbers start anew"
        )

    import torch

    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    rest = ", augmented" if config.augment else ""
    rest += f", processes: {processes.size}" if processes.size > 1 else ""
    tell(
        f"{config.data}: {len(train_data)} pictures to train, {len(test_data)} to test; {config.model} network, "
        f"{parameters} parameters; {trainer.device}, threads: {torch.get_num_threads()}, seed: {config.seed}{rest}"
    )
    log = None if args.log is None or not processes.is_first else MetricsLog(args.log)
    _fit(trainer, 0 if args.epochs == 0 else config.epochs, out, args.target, log)
    if args.target is not None and trainer.history:
        tell(_outcome(trainer.history, args.target))
    _finish(trainer, out)
    if log is not None:
        log.close()
        tell(f"wrote {log.written} to {args.log}")


def _say_nothing(line: str) -> None:
    """What the other processes do where the first one speaks."""


def _prepare(args: argparse.Namespace) -> tuple[dict[str, Any] | None, dict[str, Any] | None, TrainConfig]:
    """Command line and checkpoint -> state to continue from, weights to start from, configuration."""
    from lenet_ext.pretrained.files import load_weights
    from lenet_ext.training.checkpoint import load_checkpoint

    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    if args.resume is None:
        return None, None, TrainConfig.for_data(given.pop("data", "digits"), given.pop("model", "fused"), **given)

    state = load_checkpoint(args.resume)
    if state is None:
        weights = load_weights(args.resume)
        data = given.pop("data", None) or weights.data or "digits"
        return None, weights.state, TrainConfig.for_data(data, given.pop("model", "fused"), **given)

    try:
        config = TrainConfig.from_dict(state["config"])
    except ValueError as error:
        raise ValueError(f"{args.resume}: {error}") from None
    # A cycle is as long as the run; --epochs 0 only evaluates.
    length = ("epochs",) if config.schedule == "one-cycle" and args.epochs else ()
    for name in (*_FIXED, *length):
        if name in given and given[name] != getattr(config, name):
            option, stored = f"--{name.replace('_', '-')}", getattr(config, name)
            # An option without a value can only be missing in the checkpoint.
            contradiction = (
                f"{option} contradicts the checkpoint, which was trained without it"
                if given[name] is True
                else f"{option} {given[name]} contradicts the checkpoint, which has {stored}"
            )
            raise UsageError(
                f"{contradiction}: leave {option} out to continue that run, or resume from its model.safetensors to "
                "start another one"
            )
    if args.epochs and args.epochs < state["epoch"]:
        raise UsageError(
            f"--epochs {args.epochs} is the total, and the checkpoint is at epoch {state['epoch']} already"
        )
    changes = {name: given[name] for name in ("epochs", "device", "threads", "root") if given.get(name)}
    return state, None, replace(config, **changes)


def _default_out(args: argparse.Namespace, state: dict[str, Any] | None, config: TrainConfig) -> Path:
    if state is not None:
        return Path(args.resume).parent
    return Path("runs") / f"{config.data}-{config.model}"


def _fit(trainer: Trainer, epochs: int, out: Path, target: float | None, log: MetricsLog | None) -> None:
    """Trains up to a number of epochs or to a test accuracy in percent, saving after each, with a progress bar if there
    is a terminal to draw it on."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    first = trainer.epoch
    remaining = max(0, epochs - first)
    if remaining == 0 or _reached(trainer.history, target):
        return
    console = make_console()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[speed]}left"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not (console.is_terminal and trainer.processes.is_first),
    )
    drawn = 0.0

    def description() -> str:
        best = f", best {max(map(_shown, trainer.history)):.2f}%" if trainer.history else ""
        return f"epoch {trainer.epoch + 1}/{epochs}, rate {trainer.rate:.2g}{best}"

    def speed() -> str:
        steps_per_second = progress.tasks[0].speed
        images_per_step = len(trainer.train_data) / trainer.steps_per_epoch
        return f"{steps_per_second * images_per_step:.0f} images/s, " if steps_per_second else ""

    def on_step(step: int) -> None:
        nonlocal drawn
        now = time.monotonic()
        if now - drawn >= 0.1:  # drawing costs about as much as a training step
            drawn = now
            done = (trainer.epoch - first) * trainer.steps_per_epoch + step
            progress.update(task, description=description(), speed=speed(), completed=done, refresh=True)

    with progress:
        task = progress.add_task(description(), total=remaining * trainer.steps_per_epoch, speed="")
        if trainer.processes.is_first:
            progress.console.print(_HEADER, markup=False, soft_wrap=True)
        try:
            for _ in range(remaining):
                progress.update(task, description=description())
                line = trainer.run_epoch(on_step)
                trainer.save(out)
                if log is not None:
                    log.write(trainer.history)
                if trainer.processes.is_first:
                    progress.console.print(_epoch_line(line, epochs), markup=False, soft_wrap=True)
                if _reached(trainer.history, target):
                    break
        except KeyboardInterrupt:
            checkpoint = out / "checkpoint.pt"
            hint = f"continue with --resume {checkpoint}" if trainer.epoch else "no epoch was finished"
            raise KeyboardInterrupt(hint) from None


def _shown(line: dict[str, Any]) -> float:
    """The test accuracy of an epoch in percent, as its line shows it: who reads 99.20% has reached 99.2."""
    return round(100 * float(line["test_accuracy"]), 2)


def _reached(history: list[dict[str, Any]], target: float | None) -> bool:
    return target is not None and bool(history) and _shown(history[-1]) >= target


def _outcome(history: list[dict[str, Any]], target: float) -> str:
    if _reached(history, target):
        return f"the target of {target:g}% was reached in epoch {history[-1]['epoch']}"
    best = max(history, key=_shown)
    return f"the target of {target:g}% was not reached; the best was {_shown(best):.2f}%, in epoch {best['epoch']}"


# The columns of `_epoch_line`, which fit a terminal of 80.
_HEADER = "  epoch  train loss  test loss  test accuracy  seconds  images/s     rate"


def _epoch_line(line: dict[str, Any], epochs: int) -> str:
    accuracy = f"{100 * line['test_accuracy']:.2f}%"
    return (
        f"{line['epoch']}/{epochs}".rjust(7)
        + f"  {line['train_loss']:10.4f}  {line['test_loss']:9.4f}  {accuracy:>13}"
        + f"  {line['seconds']:7.2f}  {line['images_per_second']:8.0f}  {line['lr']:7.2g}"
    )


def _finish(trainer: Trainer, out: Path) -> None:
    """Writes everything and says how the run ended."""
    from lenet_ext.training.evaluate import worst_answers
    from lenet_ext.training.plots import plot_answers, plot_confusion, plot_curves, plot_filters

    result = trainer.evaluate()
    trainer.save(out)
    if not trainer.processes.is_first:
        return
    title = f"LeNet ({trainer.config.model}) on {trainer.config.data}"
    plot_curves(out / "curves.png", trainer.history, title)
    labels = trainer.config.data_set.labels
    plot_confusion(
        out / "confusion.png", result.confusion, f"{title}: test accuracy {100 * result.accuracy:.2f}%", labels
    )
    right, total = int(result.confusion.diagonal().sum()), int(result.confusion.sum())
    answers = worst_answers(trainer.model, trainer.test_data, _WORST)
    which = _which(answers, total - right, total)
    plot_answers(out / "misclassified.png", trainer.test_data.images, answers, f"{title}: {which}", labels)
    plot_filters(
        out / "filters.png", trainer.model.get_parameter("conv1.weight"), f"{title}: the first layer's filters"
    )
    seconds = sum(line["seconds"] for line in trainer.history)
    say(
        f"test accuracy {100 * result.accuracy:.2f}% ({right} of {total}), test loss {result.loss:.4f}, "
        f"after {trainer.epoch} {'epoch' if trainer.epoch == 1 else 'epochs'} and {seconds:.1f} s of training"
    )
    say(f"wrote {', '.join(_FILES)} to {out}")


def _which(answers: list[Answer], wrong: int, total: int) -> str:
    """What is to be seen in misclassified.png, in words."""
    if not wrong:
        return f"none of {total} misclassified\nthe least certain answers, and their probability"
    shown = f"the {len(answers)} worst" if len(answers) < wrong else "what each was taken for"
    return f"{wrong} of {total} misclassified\n{shown}, and the probability of the answer"
