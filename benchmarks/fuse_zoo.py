"""Well-known networks before and after `lenet_ext.fuse`: time per image, forward and training step.

Both take turns in one process, each in both layouts of the images; the faster layout of each counts. With --json the
rows become the section "zoo" of a results file of ``lenet-ext bench``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lenet_ext import fuse
from lenet_ext.bench.report import figures
from lenet_ext.bench.results import merge, read_results, section_to_dict
from lenet_ext.bench.timing import Effort, ratio, time_interleaved
from lenet_ext.bench.zoo import ZOO
from lenet_ext.environment.files import write_json

LAYOUTS = {"": torch.contiguous_format, ", channels last": torch.channels_last}


def forward(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """A program for `time_interleaved`: inference."""
    model.eval()

    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return run


def training(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """A program for `time_interleaved`: forward and backward."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # the same for both, and random
            module.eval()

    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(images).sum().backward()

    return run


def measure(name: str, batch: int, divisor: int, effort: Effort) -> list[dict[str, Any]]:
    """One network, both steps."""
    zoo = ZOO[name]
    torch.manual_seed(0)
    stock = zoo.make(divisor)
    fused = fuse(stock)
    images = torch.randn(batch, *zoo.image)
    rows = []
    for mode, make in (("forward", forward), ("training", training)):
        programs = {}
        for kind, model in (("stock", stock), ("fused", fused)):
            for title, layout in LAYOUTS.items():
                # A copy: the conversion changes parameters in place.
                laid_out = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
                programs[kind + title] = make(laid_out, images.to(memory_format=layout))
        outputs = [program() for program in programs.values()]
        if mode == "forward":
            for other in outputs[1:]:
                torch.testing.assert_close(other, outputs[0], rtol=1e-3, atol=1e-4)
        samples = time_interleaved(programs, torch.device("cpu"), effort)
        best = {
            kind: min((n for n in samples if n.startswith(kind)), key=lambda n: samples[n].median_us)
            for kind in ("stock", "fused")
        }
        speedup = ratio(samples[best["stock"]], samples[best["fused"]])
        rows.append(
            {
                "network": name,
                "mode": mode,
                "batch": batch,
                "threads": torch.get_num_threads(),
                "fused_layers": sum(record.fused for record in fused.fusion_report),  # type: ignore[union-attr]
                "us_per_image": {n: s.median_us / batch for n, s in samples.items()},
                "best_stock": best["stock"],
                "best_fused": best["fused"],
                "speedup": speedup[0],
                "speedup_p20": speedup[1],
                "speedup_p80": speedup[2],
            }
        )
    return rows


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(ZOO), default=[n for n in ZOO if n != "lenet_1998"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--divisor", type=int, default=1, help="of all widths; 1 for the networks of the papers")
    parser.add_argument("--budget", type=float, default=8.0, metavar="SECONDS", help="for one network and step")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    effort = Effort(min_rounds=5, budget_s=arguments.budget)
    rows = [row for name in arguments.networks for row in measure(name, arguments.batch, arguments.divisor, effort)]
    table = Table("network", "step", "fused layers", "stock, us per image", "fused", "speedup [20% - 80%]")
    for row in rows:
        best = [figures(row["us_per_image"][row[f"best_{kind}"]]) for kind in ("stock", "fused")]
        speedup = f"{row['speedup']:.2f}x \\[{row['speedup_p20']:.2f} - {row['speedup_p80']:.2f}]"
        table.add_row(row["network"], row["mode"], str(row["fused_layers"]), *best, speedup)
    Console().print(table)
    if arguments.json is not None:
        write_json(arguments.json, merge(read_results(arguments.json), section_to_dict("zoo", rows)))


if __name__ == "__main__":
    main()
