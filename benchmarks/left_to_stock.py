"""What `lenet_ext.fuse` leaves to stock unless it is asked: convolution + ReLU, alone and before average pooling.

Without pooling the fused kernel can do it, with windows of one value. Before average pooling the convolution stays
stock's, and ReLU and pooling are one pass behind it, as with ``fuse(model, average_pooling=True)``. Both layouts of
each take turns. With --json the rows become the sections "relu_alone" and "average_pooling" of a results file of
``lenet-ext bench``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lenet_ext import nn as fused_nn
from lenet_ext.bench.agreement import compare, stock_outputs
from lenet_ext.bench.cases import Case, Workload
from lenet_ext.bench.providers import EAGER_LAYOUTS, FUSED_LAYOUTS, PROVIDERS, Program, surroundings
from lenet_ext.bench.report import figures
from lenet_ext.bench.results import merge, read_results, section_to_dict
from lenet_ext.bench.timing import Effort, Samples, ratio, time_interleaved
from lenet_ext.environment.files import write_json
from lenet_ext.functional import relu_avg_pool2d

CPU = torch.device("cpu")
MODES = ("forward", "training")
EFFORT = Effort(sample_s=0.01, rounds=15, min_rounds=5, budget_s=2.0)


class ConvReLU(nn.Conv2d):
    """``F.relu(conv(x))``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def conv_relu(*sizes: Any) -> nn.Module:
    """The same in the fused kernel."""
    return fused_nn.ConvReLUMaxPool2d(*sizes, pool_kernel_size=1)


class ConvReLUAvgPool2d(nn.Conv2d):
    """``F.avg_pool2d(F.relu(conv(x)), 2)``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool2d(F.relu(super().forward(input)), 2)


class FusedConvReLUAvgPool2d(nn.Conv2d):
    """The same, with one pass behind the convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return relu_avg_pool2d(super().forward(input), 2)


@dataclass(frozen=True)
class Layer:
    """A convolution.

    Args:
        network: whose it is.
        convolution: the arguments of ``nn.Conv2d``.
        image: height and width.
        batches: the larger the work for an image, the fewer of them.
    """

    network: str
    convolution: tuple[Any, ...]
    image: tuple[int, int]
    batches: tuple[int, ...] = (1, 64)

    @property
    def title(self) -> str:
        channels, out_channels, kernel, stride, padding = (*self.convolution, 1, 0)[:5]
        size = f"{kernel[0]}x{kernel[1]}" if isinstance(kernel, tuple) else str(kernel)
        text = f"{channels}->{out_channels} k{size}" + f" s{stride}" * (stride > 1) + f" p{padding}" * (padding > 0)
        return f"{text} at {self.image[0]}x{self.image[1]}" + f" ({self.network})" * bool(self.network)

    def case(self, stock: Callable[..., nn.Module], fused: Callable[..., nn.Module]) -> Case:
        """As a case of the benchmark. The first layer of a network needs no gradient of its input."""
        channels = self.convolution[0]
        return Case(
            self.title,
            self.title,
            (channels, *self.image),
            lambda: stock(*self.convolution),
            lambda: fused(*self.convolution),
            input_grad=channels > 4,
        )


LENET = (Layer("LeNet", (1, 6, 5), (32, 32)), Layer("LeNet", (6, 16, 5), (14, 14)))
MNIST = (Layer("MNIST example", (1, 32, 3), (28, 28)), Layer("MNIST example", (32, 64, 3), (26, 26)))
OTHERS = (Layer("", (16, 32, 3, 1, 1), (32, 32)), Layer("", (32, 32, 3, 1, 1), (32, 32)))
RELU_ALONE = (
    *LENET,
    *MNIST,
    Layer("deep Q-network", (4, 32, 8, 4), (84, 84)),
    Layer("deep Q-network", (32, 64, 4, 2), (20, 20)),
    Layer("deep Q-network", (64, 64, 3), (9, 9)),
    Layer("keyword spotting", (64, 64, (10, 4)), (40, 16)),
    Layer("VGG", (128, 256, 3, 1, 1), (28, 28), (1,)),
    Layer("AlexNet", (384, 256, 3, 1, 1), (13, 13), (1,)),
    *OTHERS,
    Layer("", (96, 64, 1), (27, 27)),
)
AVERAGE_POOLING = (*LENET, *MNIST, *OTHERS)


# What is measured: the layers, as stock has them, as ours.
SECTIONS = {
    "relu_alone": (RELU_ALONE, ConvReLU, conv_relu),
    "average_pooling": (AVERAGE_POOLING, ConvReLUAvgPool2d, FusedConvReLUAvgPool2d),
}


def measure(
    layers: Iterable[Layer],
    stock: Callable[..., nn.Module],
    fused: Callable[..., nn.Module],
    threads: int,
    effort: Effort = EFFORT,
) -> list[dict[str, Any]]:
    """A row for each layer, step and batch size: ours over the faster layout of stock, above 1 where ours is faster."""
    rows = []
    for layer in layers:
        case = layer.case(stock, fused)
        for work in _workloads(case, layer.batches):
            expected = stock_outputs(work)
            programs = {name: PROVIDERS[name].prepare(work) for name in (*EAGER_LAYOUTS, *FUSED_LAYOUTS)}
            with surroundings(work.mode):
                for name, program in programs.items():
                    program.run()
                    compare(name, work, program.outputs(), expected)
                samples = _time(programs, effort)
            theirs, ours = _fastest(samples, EAGER_LAYOUTS), _fastest(samples, FUSED_LAYOUTS)
            rows.append(_row(work, threads, theirs, ours))
    return rows


def _workloads(case: Case, batches: Iterable[int]) -> list[Workload]:
    return [Workload.make(case, mode, batch, CPU) for mode in MODES for batch in batches]


def _time(programs: dict[str, Program], effort: Effort) -> dict[str, Samples]:
    return time_interleaved({name: program.run for name, program in programs.items()}, CPU, effort)


def _fastest(samples: dict[str, Samples], names: Iterable[str]) -> Samples:
    return min((samples[name] for name in names), key=lambda taken: taken.median_us)


def _row(work: Workload, threads: int, stock: Samples, fused: Samples) -> dict[str, Any]:
    median, low, high = ratio(stock, fused)
    times = {"stock_us": stock.median_us, "fused_us": fused.median_us, "speedup": [low, median, high]}
    return {"layer": work.case.title, "mode": work.mode, "batch": work.batch, "threads": threads, **times}


def _print(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table("layer", "step", "batch", "threads", "stock", "fused", "speedup [20% - 80%]", title=title)
    for row in rows:
        times = [figures(row[f"{name}_us"] / row["batch"]) for name in ("stock", "fused")]
        low, median, high = row["speedup"]
        place = [row["layer"], row["mode"], str(row["batch"]), str(row["threads"])]
        table.add_row(*place, *times, f"{median:.2f}x \\[{low:.2f} - {high:.2f}]")
    console.print(table)


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SECTIONS}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name, section in SECTIONS.items():
            rows[name] += measure(*section, threads)
    console = Console()
    _print(console, "convolution + ReLU, us per image", rows["relu_alone"])
    _print(console, "convolution + ReLU + average pooling, us per image", rows["average_pooling"])
    if arguments.json is not None:
        for name, found in rows.items():
            write_json(arguments.json, merge(read_results(arguments.json), section_to_dict(name, found)))


if __name__ == "__main__":
    main()
