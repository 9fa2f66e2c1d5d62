"""The history of a run for other programs, as it grows: a CSV file, and events for TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lenet_ext.environment.files import atomic_path

__all__ = ["MetricsLog"]

_COLUMNS = ("epoch", "train_loss", "test_loss", "test_accuracy", "lr", "seconds", "images_per_second")
_TAGS = {
    "loss/train": "train_loss",
    "loss/test": "test_loss",
    "accuracy/test": "test_accuracy",
    "rate": "lr",
    "images per second": "images_per_second",
}


class MetricsLog:
    """Writes the history of a run to a folder, after each epoch anew.

    Args:
        folder: gets ``metrics.csv`` and, where tensorboard is installed, a file of events; is created where it is
            missing. Of events that a run with the same folder left there, only those of this history are shown.

    Raises:
        OSError: the folder cannot be created.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> log = MetricsLog(folder)
        >>> log.write([{"epoch": 1, "train_loss": 0.5, "test_loss": 0.4, "test_accuracy": 0.9}])
        >>> (folder / "metrics.csv").read_text().splitlines()[1]
        '1,0.5,0.4,0.9,,,'
        >>> log.close()
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._events: Any = None
        self._epoch = 0  # the last one that is among the events
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._events = SummaryWriter(str(self.folder), purge_step=1)

    @property
    def written(self) -> str:
        """What is in the folder, in words."""
        return "metrics.csv" if self._events is None else "metrics.csv and events for TensorBoard"

    def write(self, history: Sequence[dict[str, Any]]) -> None:
        """Writes what there is by now; also of epochs before a resumption, of which this log has not been told.

        Raises:
            OSError: a file cannot be written.
        """
        text = io.StringIO()
        table = csv.DictWriter(text, _COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(history)
        with atomic_path(self.folder / "metrics.csv") as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")
        if self._events is None:
            return
        for line in history:
            if line["epoch"] > self._epoch:
                self._epoch = line["epoch"]
                for tag, name in _TAGS.items():
                    if name in line:
                        self._events.add_scalar(tag, line[name], self._epoch)
        self._events.flush()

    def close(self) -> None:
        """Ends the file of events."""
        if self._events is not None:
            self._events.close()
