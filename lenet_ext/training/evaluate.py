"""Loss, accuracy and confusion matrix of a network on a data set, and the pictures that it fails on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenet_ext.training.distributed import ALONE, Processes
from lenet_ext.training.images import LabelledImages

__all__ = ["Answer", "Evaluation", "evaluate", "worst_answers"]


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`. ``confusion[i, j]``: how many pictures of class i were taken for j."""

    loss: float
    accuracy: float
    confusion: Tensor

    def per_class(self) -> list[tuple[int, int, int, float, float]]:
        """Class, its number of pictures, how many of them are right, recall and precision (nan: none predicted)."""
        rows = []
        for label in range(len(self.confusion)):
            right = int(self.confusion[label, label])
            count = int(self.confusion[label].sum())
            predicted = int(self.confusion[:, label].sum())
            recall = right / count if count else float("nan")
            precision = right / predicted if predicted else float("nan")
            rows.append((label, count, right, recall, precision))
        return rows


def evaluate(
    model: nn.Module, data: LabelledImages, batch_size: int = 1024, processes: Processes = ALONE
) -> Evaluation:
    """Evaluates a network, without gradients and in eval mode (its mode is restored).

    Args:
        model: maps float32 (B, C, 32, 32) to scores (B, classes), on the device of the data.
        data: what to evaluate on; not empty.
        batch_size: pictures at a time.
        processes: those that share the work; all of them must call this, with the same arguments, and get the result.

    Returns:
        Mean cross-entropy, share of right answers, confusion matrix (int64, on the CPU).

    Raises:
        ValueError: the data set is empty.

    Example:
        >>> from lenet_ext.training.images import Normalization
        >>> pixels = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
        >>> data = LabelledImages(pixels, torch.arange(4), Normalization(0.0, 1.0))
        >>> evaluate(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), data).confusion.sum()
        tensor(4)
    """
    device = data.labels.device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    classes = data.num_classes
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    with _evaluating(model, data):
        for images, labels in data.batches(batch_size, share=(processes.rank, processes.size)):
            scores = model(images)
            loss += F.cross_entropy(scores.double(), labels, reduction="sum")
            confusion += torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2)
    processes.sum(loss)
    confusion = processes.sum(confusion).view(classes, classes).cpu()
    return Evaluation(loss.item() / len(data), confusion.diagonal().sum().item() / len(data), confusion)


@dataclass(frozen=True)
class Answer:
    """What a network takes the picture `index` of a data set for, and how probable it finds that."""

    index: int
    label: int
    predicted: int
    probability: float

    @property
    def is_right(self) -> bool:
        """Whether it is the true class."""
        return self.label == self.predicted


def worst_answers(model: nn.Module, data: LabelledImages, count: int, batch_size: int = 1024) -> list[Answer]:
    """The pictures that a network fails on most, evaluated as `evaluate` does.

    Args:
        model, data, batch_size: as for `evaluate`.
        count: how many at most.

    Returns:
        Wrong answers, beginning with the lowest probability of the true class; if none is wrong, right ones, beginning
        with the least certain.

    Raises:
        ValueError: the data set is empty.

    Example:
        >>> from lenet_ext.training.images import Normalization
        >>> pixels = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
        >>> data = LabelledImages(pixels, torch.arange(4), Normalization(0.0, 1.0))
        >>> [answer.is_right for answer in worst_answers(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), data, 2)]
        [False, False]
    """
    found = []
    with _evaluating(model, data):
        for images, labels in data.batches(batch_size):
            probabilities = model(images).double().softmax(1)
            highest, predicted = probabilities.max(1)
            true = probabilities.gather(1, labels[:, None]).squeeze(1)
            found.append(torch.stack((labels.double(), predicted.double(), highest, true)).cpu())
    labels, predicted, highest, true = torch.cat(found, dim=1)
    wrong = labels != predicted
    # Below zero where wrong.
    order = (true - wrong.double()).argsort(stable=True)[: min(count, int(wrong.sum()) or count)]
    return [Answer(i, int(labels[i]), int(predicted[i]), float(highest[i])) for i in order.tolist()]


@contextmanager
def _evaluating(model: nn.Module, data: LabelledImages) -> Iterator[None]:
    """Without gradients and in eval mode; restores the network's mode."""
    if len(data) == 0:
        raise ValueError("the data set is empty")
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
