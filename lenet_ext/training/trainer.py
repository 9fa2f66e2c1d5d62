"""The training loop.

The same seed gives the same initial weights and the same pictures in the same order to the fused and to the reference
network, on every device and with any number of processes, so that their loss curves can be laid one over the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lenet_ext
from lenet_ext.environment.device import resolve_device
from lenet_ext.environment.files import write_json
from lenet_ext.net import Net, ReferenceNet
from lenet_ext.training import checkpoint
from lenet_ext.training.config import TrainConfig
from lenet_ext.training.datasets import DigitImages
from lenet_ext.training.distributed import ALONE, Processes
from lenet_ext.training.evaluate import Evaluation, evaluate

__all__ = ["Trainer", "build_model"]

# The learning rate never falls below this share of its first value, so that a long run keeps moving.
_LOWEST_RATE = 0.01


def build_model(name: str) -> nn.Module:
    """``"fused"`` -> `lenet_ext.Net`, ``"reference"`` -> `lenet_ext.ReferenceNet`."""
    return {"fused": Net, "reference": ReferenceNet}[name]()


class Trainer:
    """A run: network, optimizer, data order, history. Its whole state goes through `state_dict`.

    Args:
        config: what to do.
        train_data, test_data: on the CPU; moved to the device of the run.
        processes: those that train together, see `lenet_ext.training.distributed`. Each has a Trainer of its own, made
            of the same arguments, and calls the same methods; a batch is divided among them.

    Raises:
        RuntimeError: the device cannot be used.

    Example:
        >>> from lenet_ext.training.datasets import Normalization
        >>> pixels = torch.zeros(8, 1, 32, 32, dtype=torch.uint8)
        >>> data = DigitImages(pixels, torch.arange(8), Normalization(0.0, 1.0))
        >>> trainer = Trainer(TrainConfig.for_data("digits", model="reference", device="cpu"), data, data)
        >>> sorted(trainer.run_epoch())  # doctest: +NORMALIZE_WHITESPACE
        ['epoch', 'images_per_second', 'lr', 'seconds', 'test_accuracy', 'test_loss', 'train_loss']
    """

    def __init__(
        self,
        config: TrainConfig,
        train_data: DigitImages,
        test_data: DigitImages,
        processes: Processes = ALONE,
    ) -> None:
        self.config = config
        self.processes = processes
        self.device = resolve_device(config.device, fused=config.model == "fused")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.train_data = train_data.to(self.device)
        self.test_data = test_data.to(self.device)
        # Built on the CPU and then moved: the initial weights do not depend on the device.
        torch.manual_seed(config.seed)
        self.model = build_model(config.model).to(self.device)
        # What is called in training: averages the gradients over the processes.
        self.network = DistributedDataParallel(self.model) if processes.size > 1 else self.model
        self.optimizer = _build_optimizer(config, self.model)
        self.steps_per_epoch = math.ceil(len(train_data) / config.batch_size)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []

    def _rate(self, step: int) -> float:
        rate: float = self.config.decay ** (step / self.steps_per_epoch)
        return max(rate, _LOWEST_RATE)

    def run_epoch(self, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Trains for one epoch, evaluates, and appends to the history.

        Args:
            on_step: called after each step with its number, from 1.

        Returns:
            The epoch's line of the history. ``seconds`` and ``images_per_second`` are of training alone.

        Raises:
            FloatingPointError: the loss is not finite any more.
        """
        started = time.perf_counter()
        train_loss = self._train(on_step)
        seconds = time.perf_counter() - started
        epoch = self.epoch + 1
        if not math.isfinite(train_loss):
            raise FloatingPointError(f"the training loss became {train_loss} in epoch {epoch}: try a smaller --lr")
        result = self.evaluate()
        self.epoch = epoch
        self.history.append(
            {
                "epoch": epoch,
                "train_loss": train_loss,
                "test_loss": result.loss,
                "test_accuracy": result.accuracy,
                "seconds": seconds,
                "images_per_second": len(self.train_data) / seconds,
                "lr": self.scheduler.get_last_lr()[0],
            }
        )
        return self.history[-1]

    def _train(self, on_step: Callable[[int], None] | None) -> float:
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        rank, size = self.processes.rank, self.processes.size
        batches = self.train_data.batches(
            self.config.batch_size, generator=self.generator, max_shift=self.config.max_shift, share=(rank, size)
        )
        left = len(self.train_data)
        for step, (images, labels) in enumerate(batches, start=1):
            self.optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.network(images), labels, reduction="sum")
            # The mean over the whole batch, of which this process may have a smaller share than others; times the
            # number of processes, because their gradients are averaged.
            batch = min(left, self.config.batch_size)
            (loss * (size / batch)).backward()
            self.optimizer.step()
            self.scheduler.step()
            left -= batch
            total += loss.detach()
            if on_step is not None:
                on_step(step)
        return self.processes.sum(total).item() / len(self.train_data)

    def evaluate(self) -> Evaluation:
        """Evaluates on the test set."""
        return evaluate(self.model, self.test_data, processes=self.processes)

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs, on the CPU where it was there."""
        rng: dict[str, Any] = {"data": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "rng": rng,
            "config": self.config.to_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where the run that made `state` stood.

        Raises:
            RuntimeError: the state does not fit the network.
            ValueError: it does not fit the optimizer.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch = int(state["epoch"])
        self.history = list(state["history"])
        self.generator.set_state(state["rng"]["data"])
        torch.set_rng_state(state["rng"]["torch"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Starts from these weights; all else starts anew.

        Raises:
            RuntimeError: they do not fit the network.
        """
        self.model.load_state_dict(state)

    def save(self, directory: str | Path) -> None:
        """Writes ``model.safetensors``, ``checkpoint.pt`` and ``history.json``; of several processes the first does.

        Raises:
            OSError: a file cannot be written.
        """
        if not self.processes.is_first:
            return
        directory = Path(directory)
        checkpoint.save_checkpoint(directory / "checkpoint.pt", self.state_dict())
        metadata: dict[str, Any] = {"config": self.config.to_dict(), "epoch": self.epoch}
        if self.history:
            metadata["test_accuracy"] = self.history[-1]["test_accuracy"]
        checkpoint.save_weights(directory / "model.safetensors", self.model, metadata)
        environment = {
            "lenet_ext": lenet_ext.build_info()["version"],
            "torch": torch.__version__,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "processes": self.processes.size,
        }
        content = {"config": self.config.to_dict(), "environment": environment, "epochs": self.history}
        write_json(directory / "history.json", content)


def _build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    # fused=True: one call for all ten parameters, instead of a dozen small ones for each.
    parameters = model.parameters()
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.lr, fused=True)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.01, fused=True)
