"""How far from the exact result ours and stock are: of each of the benchmark's layers the output and every gradient.

    python errors_in_ulp.py                          # prints the tables
    python errors_in_ulp.py --write                  # and puts them into results/, in a file of this processor
    python errors_in_ulp.py --cases conv1 fc1

Both compute on the same numbers of the dtype; exact is stock in float64. (float64 itself has no such yardstick: the
tests compare it on integers, whose sums are exact.) The error of a tensor is the root mean square over its elements, in
ulp: the distance of neighboring numbers of the dtype at the root mean square of the exact values. A single element may
be near 0 although its terms are not, and then says nothing. The gradient is 0 where two elements of a pool window are
so near that rounding decides between them, or an element so near to 0: two right answers differ there.

Stock is measured in both layouts, in which its library may take different kernels; where ours hands a layer to that
library, it does so on channels_last.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from datetime import datetime, timezone
from typing import Any

import summary
import torch
import torch.nn.functional as F
from tables import table, times
from torch import Tensor, nn

import lenet_ext
from lenet_ext.bench.cases import CASES, Case, Workload
from lenet_ext.bench.report import figures, where
from lenet_ext.bench.results import facts
from lenet_ext.environment.files import atomic_path
from lenet_ext.environment.system import git_commit

DTYPES = (torch.float32, torch.bfloat16)
SEEDS = 3
TENSORS = ("output", "grad of input", "grad of weight", "grad of bias")
LIMIT = 1.5  # more than so many times stock's is named below the table

Errors = list[tuple[float, float, float]]  # for each of TENSORS ours, stock's, and stock's on channels_last


def batch_of(case: Case) -> int:
    """As many images as float64 has done soon."""
    size = math.prod(case.input_shape)
    return 64 if size <= 4096 else 8 if size <= 65536 else 1


def clear(module: nn.Module, input: Tensor, gap: float) -> Tensor:
    """Which outputs rounding leaves where they are; `gap` is a part of the largest value before ReLU and pooling."""
    if isinstance(module, nn.Linear):
        before = F.linear(input, module.weight, module.bias)
        return (
            before.abs() > gap * before.abs().max() if isinstance(module, lenet_ext.nn.LinearReLU) else before == before
        )
    before = module._conv_forward(input, module.weight, module.bias)
    batch, channels = before.shape[:2]
    # Padding is 0 here, as is what ReLU takes away: neither wins over a number that is clearly positive.
    pool = {"stride": module.pool_stride, "padding": module.pool_padding, "dilation": module.pool_dilation}
    windows = F.unfold(before.relu().flatten(0, 1).unsqueeze(1), module.pool_kernel_size, **pool)
    first, second = windows.topk(2, dim=1).values.unbind(1)
    shape = F.max_pool2d(before, module.pool_kernel_size, **pool).shape
    return (first - second > gap * before.abs().max()).view(batch, channels, *shape[2:])


def results(module: nn.Module, input: Tensor, grad_output: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaf = input.clone().requires_grad_()
    output = module(leaf)
    return [output.detach(), *torch.autograd.grad(output, [leaf, module.weight, module.bias], grad_output)]


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square, in ulp."""
    scale = float(exact.square().mean().sqrt())
    ulp = torch.finfo(found.dtype).eps * 2.0 ** math.floor(math.log2(scale))
    return float((found.double() - exact).square().mean().sqrt()) / ulp


def errors(case: Case, dtype: torch.dtype) -> Errors:
    """The means over some seeds."""
    sums = [[0.0, 0.0, 0.0] for _ in TENSORS]
    for seed in range(SEEDS):
        work = Workload.make(case, "training", batch_of(case), torch.device("cpu"), seed)
        fused, stock, exact = case.fused(), case.stock(), case.fused()
        for module in (fused, stock):
            module.load_state_dict(work.state)
            module.to(dtype)
        exact.load_state_dict(fused.state_dict())
        yardstick = case.stock().double()
        yardstick.load_state_dict(fused.state_dict())
        input = work.input.to(dtype)
        with torch.no_grad():
            gap = 16 * torch.finfo(dtype).eps
            grad_output = (work.grad_output * clear(exact.double(), input.double(), gap)).to(dtype)
        expected = results(yardstick, input.double(), grad_output.double())
        last: dict[str, Any] = {"memory_format": torch.channels_last} if input.dim() == 4 else {}
        converted = copy.deepcopy(stock).to(**last) if last else stock
        sides = [(fused, input, grad_output), (stock, input, grad_output)]
        sides += [(converted, input.contiguous(**last), grad_output.contiguous(**last))]
        for side, arguments in enumerate(sides):
            for number, (found, e) in enumerate(zip(results(*arguments), expected, strict=True)):
                sums[number][side] += error(found, e) / SEEDS
    return [(ours, stock, channels_last) for ours, stock, channels_last in sums]


def ratio(found: tuple[float, float, float]) -> float:
    """Over stock's in the layout where its error is larger."""
    ours, stock = found[0], max(found[1:])
    return 1.0 if ours == stock else math.inf if stock == 0 else ours / stock


def measured(names: list[str]) -> dict[str, list[tuple[Case, Errors]]]:
    """By dtype."""
    found: dict[str, list[tuple[Case, Errors]]] = {}
    for dtype in DTYPES:
        for name in names:
            print(f"{dtype}: {name}", file=sys.stderr, flush=True)
            found.setdefault(str(dtype).removeprefix("torch."), []).append((CASES[name], errors(CASES[name], dtype)))
    return found


def markdown(found: dict[str, list[tuple[Case, Errors]]], content: dict[str, Any]) -> str:
    commit = (git_commit() or "unknown").replace("+changes", " with changes")
    # Stock's sums depend on the number of threads, ours do not.
    machine = f"{where(content)}, threads: {torch.get_num_threads()}"
    place = f"{machine}, commit {commit[:10]}{commit[40:]}, {datetime.now(timezone.utc):%Y-%m-%d}"
    lines = [
        "# Errors in ulp, ours / stock's / stock's on channels_last",
        "",
        f"{place}. `make numbers` makes this file;",
    ]
    lines += ["[errors_in_ulp.py](../errors_in_ulp.py) says what is measured.", ""]
    for dtype, rows in found.items():
        cells = [
            [case.title, str(batch_of(case)), *(" / ".join(map(figures, found)) for found in each)]
            for case, each in rows
        ]
        lines += [f"## {dtype}", "", table(["layer"], ["batch", *TENSORS], cells), ""]
        ratios = [
            (ratio(found), f"{case.title}, {what}")
            for case, each in rows
            for what, found in zip(TENSORS, each, strict=True)
        ]
        above = sorted((entry for entry in ratios if entry[0] > LIMIT), reverse=True)
        told = ";\n".join(f"{what}: {times(number)}" for number, what in above)
        told = told or f"none; at most {times(max(ratios)[0])}"
        lines += [f"More than {LIMIT} times stock's: {told}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layers = [name for name, case in CASES.items() if case.group in ("layers", "general")]
    parser.add_argument("--cases", nargs="+", choices=layers, default=layers, metavar="CASE")
    parser.add_argument("--write", action="store_true", help="into results/errors-PROCESSOR.md")
    arguments = parser.parse_args()
    content = {"source": "bench", "cpu_capability": lenet_ext.build_info()["cpu_capability"], **facts()}
    text = markdown(measured(arguments.cases), content)
    print(text)
    if arguments.write:
        with atomic_path(summary.RESULTS / f"errors-{summary.processor(content)}.md") as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
