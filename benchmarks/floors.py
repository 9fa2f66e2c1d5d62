"""The floor under each kernel of LeNet on this processor, and how near to it the kernel is.

No kernel can be faster than its multiply-adds at the processor's peak, nor than its tensors can be moved: each read or
written once, at the rate of a copy of as many bytes. Peak and copy take turns with the kernels, on one thread: what
several lose is not the kernels' loss. The gradients of a convolution count the winners alone, and of those the ones
that ReLU let through, as there are in the images. A call of the operator is part of the time: of one image it is much
of it. With --json the rows become the section "floors" of a results file of ``lenet-ext bench``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lenet_ext import Net, ops
from lenet_ext.bench.peak import peak_meter
from lenet_ext.bench.report import figures
from lenet_ext.bench.results import merge, read_results, section_to_dict
from lenet_ext.bench.timing import Effort, Samples, ratio, time_interleaved
from lenet_ext.environment.files import write_json

CPU = torch.device("cpu")
EFFORT = Effort(sample_s=0.005, rounds=31, min_rounds=11, budget_s=4.0)
OPTIONS = ((1, 1), (0, 0, 0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1))
INPUT, PARAMETERS = (True, False, False), (False, True, True)


@dataclass(frozen=True)
class Kernel:
    """One call of an operator.

    Args:
        title: for people.
        run: the call.
        flops: of a batch.
        moved: the tensors that it reads and writes.
    """

    title: str
    run: Callable[[], object]
    flops: float
    moved: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.moved)


def kernels(batch: int) -> list[Kernel]:
    """All of them, on the activations of one network."""
    net = Net()
    p = [parameter.detach() for parameter in net.parameters()]
    images, grad = torch.randn(batch, 1, 32, 32), torch.randn(batch, 10)
    output, pooled1, codes1, pooled2, codes2, hidden1, hidden2 = ops.lenet_with_activations(images, p)
    found = [
        *_convolution("conv1", images, p[0], p[1], pooled1, codes1, input_grad=False),
        *_convolution("conv2", pooled1, p[2], p[3], pooled2, codes2, input_grad=True),
        *_linear("fc1", pooled2.flatten(1), p[4], p[5], hidden1),
        *_linear("fc2", hidden1, p[6], p[7], hidden2),
        *_linear("fc3", hidden2, p[8], p[9], output),
    ]
    forward = sum(kernel.flops for kernel in found if kernel.title.endswith("inference"))
    backward = sum(kernel.flops for kernel in found if "gradient" in kernel.title)
    kept = (pooled1, codes1, pooled2, codes2, hidden1, hidden2)
    return [
        *found,
        Kernel("Net, inference", lambda: ops.lenet(images, p), forward, (images, *p, output)),
        Kernel(
            "Net, keeping winners",
            lambda: ops.lenet_with_activations(images, p),
            forward,
            (images, *p, output, *kept),
        ),
        Kernel(
            "Net, gradients",
            lambda: ops.lenet_backward(grad, images, p, *kept, False),
            backward,
            (images, *p, grad, *kept, *p),
        ),
    ]


def _convolution(
    name: str, input: Tensor, weight: Tensor, bias: Tensor, pooled: Tensor, codes: Tensor, *, input_grad: bool
) -> list[Kernel]:
    """Forward for inference and for training, and the gradients."""
    grad = torch.randn_like(pooled)
    taps = 2.0 * weight[0].numel()
    every, winners = taps * 4 * pooled.numel(), taps * int((codes != 255).sum())  # of 2x2 positions of a window one
    sizes = (input.shape, weight.shape)

    def gradient(wanted: tuple[bool, bool, bool]) -> Callable[[], object]:
        return lambda: ops.conv_relu_max_pool2d_backward(grad, codes, input, weight, *sizes, *OPTIONS, wanted)

    parameters, both = (weight, bias), (grad, codes)
    found = [
        Kernel(
            f"{name}, inference",
            lambda: ops.conv_relu_max_pool2d(input, weight, bias, *OPTIONS, False),
            every,
            (input, *parameters, pooled),
        ),
        Kernel(
            f"{name}, keeping winners",
            lambda: ops.conv_relu_max_pool2d_with_indices(input, weight, bias, *OPTIONS, False),
            every,
            (input, *parameters, pooled, codes),
        ),
        Kernel(f"{name}, gradient of weight and bias", gradient(PARAMETERS), winners, (*both, input, *parameters)),
    ]
    if input_grad:
        found.append(Kernel(f"{name}, gradient of input", gradient(INPUT), winners, (*both, weight, input)))
    return found


def _linear(name: str, input: Tensor, weight: Tensor, bias: Tensor, output: Tensor) -> list[Kernel]:
    """Forward, and the gradients."""
    grad = torch.randn_like(output)
    flops = 2.0 * weight.numel() * input.shape[0]
    call = ops.linear if name == "fc3" else ops.linear_relu

    def gradient(wanted: tuple[bool, bool, bool]) -> Callable[[], object]:
        if name == "fc3":
            return lambda: ops.linear_backward(grad, input, weight, wanted)
        return lambda: ops.linear_relu_backward(grad, output, input, weight, wanted)

    masks = () if name == "fc3" else (output,)
    return [
        Kernel(f"{name}, inference", lambda: call(input, weight, bias), flops, (input, weight, bias, output)),
        Kernel(
            f"{name}, gradient of weight and bias", gradient(PARAMETERS), flops, (grad, *masks, input, weight, bias)
        ),
        Kernel(f"{name}, gradient of input", gradient(INPUT), flops, (grad, *masks, weight, input)),
    ]


def measure(batch: int, effort: Effort = EFFORT) -> list[dict[str, Any]]:
    """A row for each kernel, on one thread."""
    torch.set_num_threads(1)
    peak = peak_meter(1)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for kernel in kernels(batch):
            half = kernel.bytes // 2
            source, target = (torch.zeros(half, dtype=torch.uint8) for _ in range(2))
            programs = {"kernel": kernel.run, "copy": lambda to=target, of=source: to.copy_(of)}
            samples = time_interleaved(programs, CPU, effort, meters={"peak": peak})
            rows.append(_row(kernel, batch, samples))
    return rows


def _row(kernel: Kernel, batch: int, samples: dict[str, Samples]) -> dict[str, Any]:
    at_peak = Samples(tuple(us * kernel.flops / 1e9 for us in samples["peak"].times_us), 1)
    return {
        "kernel": kernel.title,
        "batch": batch,
        "flops": kernel.flops,
        "bytes": kernel.bytes,
        "peak_us": at_peak.median_us,
        "copy_us": samples["copy"].median_us,
        "measured_us": samples["kernel"].median_us,
        "share": max(ratio(floor, samples["kernel"])[0] for floor in (at_peak, samples["copy"])),
    }


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256], metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = [row for batch in arguments.batches for row in measure(batch)]
    head = ("kernel", "batch", "kFLOP", "KB", "at peak", "copied", "measured", "share")
    table = Table(*head, title="us per image")
    for row in rows:
        counts = [figures(row[name] / row["batch"] / 1e3) for name in ("flops", "bytes")]
        times = [figures(row[f"{name}_us"] / row["batch"]) for name in ("peak", "copy", "measured")]
        table.add_row(row["kernel"], str(row["batch"]), *counts, *times, f"{row['share']:.0%}")
    Console().print(table)
    if arguments.json is not None:
        write_json(arguments.json, merge(read_results(arguments.json), section_to_dict("floors", rows)))


if __name__ == "__main__":
    main()
