"""What a network makes of a drawing: the answer, the way to it, and the time that it takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lenet_ext.bench.timing import Effort, ratio, time_interleaved
from lenet_ext.environment.system import cpu_model
from lenet_ext.net import Net
from lenet_ext.training.datasets import DataSet
from lenet_ext.training.predict import INK, UNSURE, frame_ink, predict

__all__ = ["SIDE", "Viewer"]

SIDE = 128  # pixels along an edge of a drawing
_MOST_CLASSES = 10  # that are shown
# Some 30 ms in all: an answer must not lag behind the hand.
_EFFORT = Effort(sample_s=0.001, rounds=9, min_rounds=5, budget_s=0.05)


class Viewer:
    """A network, its stock twin, and what they say of a drawing.

    Args:
        net: with one input channel; put into eval mode.
        data: the data set that it was trained on, which says how a drawing is framed.
        data_set: names of the classes, and how pictures are normalized.

    Raises:
        ValueError: the network looks at photographs, which nobody draws.

    Example:
        >>> import lenet_ext
        >>> from lenet_ext.training.datasets import DATA_SETS
        >>> viewer = Viewer(lenet_ext.Net(), "mnist", DATA_SETS["mnist"])
        >>> viewer.look(bytes(SIDE * SIDE)) is None  # nothing was drawn
        True
    """

    def __init__(self, net: Net, data: str, data_set: DataSet) -> None:
        if data_set.channels != 1:
            raise ValueError(f"a network trained on {data} looks at photographs: there is nothing to draw for it")
        self.net = net.eval()
        self.stock = self.net.to_reference()
        self.data = data
        self.data_set = data_set
        self.device = next(net.parameters()).device

    def about(self) -> dict[str, Any]:
        """What the page has to know before anything is drawn, fit for JSON."""
        on_gpu = self.device.type == "cuda"
        return {
            "side": SIDE,
            "data": self.data,
            "labels": self.data_set.labels[:_MOST_CLASSES],
            "classes": self.data_set.num_classes,
            "machine": torch.cuda.get_device_name(self.device) if on_gpu else cpu_model(),
        }

    def look(self, drawing: bytes | bytearray) -> dict[str, Any] | None:
        """Everything that the page shows of a drawing.

        Args:
            drawing: a byte for each of 128x128 pixels, row by row, from 0 (ground) to 255 (ink).

        Returns:
            None where there is no ink. Otherwise, fit for JSON: ``classes`` (label and probability, in their order; of
            more than ten, the ten most probable), ``best`` (one of them), whether it is ``sure``, ``layers`` (shape
            and bytes: the picture 1x32x32 and both fused layers' outputs, each scaled by its maximum), and ``times``.

        Raises:
            ValueError: the number of bytes is another.
        """
        if len(drawing) != SIDE * SIDE:
            raise ValueError(f"a drawing has {SIDE * SIDE} bytes, found {len(drawing)}")
        ink = torch.frombuffer(bytearray(drawing), dtype=torch.uint8).view(SIDE, SIDE) / 255
        if not bool((ink > INK).any()):
            return None
        picture = frame_ink(ink, self.data, cut_out=True).to(self.device)
        # A network with NaN among its weights has an answer too: nothing at all.
        probabilities = predict(self.net, picture[None], self.data_set.normalization)[0].nan_to_num(0.0)
        shown = list(range(len(probabilities)))
        if len(shown) > _MOST_CLASSES:
            shown = probabilities.topk(_MOST_CLASSES).indices.tolist()
        classes = [(self.data_set.labels[n], round(float(probabilities[n]), 6)) for n in shown]
        best = max(classes, key=lambda entry: entry[1])
        with torch.inference_mode():
            input = self.data_set.normalization(picture[None])
            first = self.net.conv1(input)
            layers = [picture, first[0], self.net.conv2(first)[0]]
            times = self._times(input)
        return {
            "classes": [{"label": label, "probability": probability} for label, probability in classes],
            "best": {"label": best[0], "probability": best[1]},
            "sure": best[1] >= UNSURE,
            "layers": [_bytes(layer) for layer in layers],
            "times": times,
        }

    def _times(self, input: Tensor) -> dict[str, Any]:
        """Of a forward pass, fused and stock, in turns: as ``lenet-ext bench`` measures, only shorter."""
        programs: dict[str, Callable[[], object]] = {
            "stock": partial(self.stock, input),
            "fused": partial(self.net, input),
        }
        samples = time_interleaved(programs, self.device, _EFFORT)
        return {
            "fused_us": round(samples["fused"].median_us, 2),
            "stock_us": round(samples["stock"].median_us, 2),
            "ratio": round(ratio(samples["stock"], samples["fused"])[0], 2),
            "rounds": len(samples["fused"].times_us),
            "threads": torch.get_num_threads(),
        }


def _bytes(maps: Tensor) -> dict[str, Any]:
    maps = maps.float()
    scaled = (maps / maps.max().clamp(min=1e-12)).nan_to_num(0.0).clamp(0, 1)
    return {"shape": list(maps.shape), "values": scaled.mul(255).round().to(torch.uint8).flatten().tolist()}
