"""benchmarks/floors.py on two images, and its table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import floors  # noqa: E402
import summary  # noqa: E402
import tables  # noqa: E402

from lenet_ext.bench import CASES, flops_per_image, shown  # noqa: E402
from lenet_ext.bench.peak import cxx_compiler  # noqa: E402
from lenet_ext.bench.results import section_to_dict  # noqa: E402
from lenet_ext.bench.timing import Effort, Samples  # noqa: E402

SHORT = Effort(sample_s=0.0005, rounds=3, min_rounds=3, budget_s=0.1)


def test_operations_and_bytes() -> None:
    found = {kernel.title: kernel for kernel in floors.kernels(2)}
    inference = found["Net, inference"]
    assert inference.flops == 2 * flops_per_image(CASES["net"], "forward")
    layers = [kernel.flops for title, kernel in found.items() if "gradient" in title and not title.startswith("Net")]
    assert found["Net, gradients"].flops == sum(layers)
    backward = flops_per_image(CASES["net"], "training") - flops_per_image(CASES["net"], "forward")
    assert sum(layers) < 2 * backward  # which counts the windows that ReLU closed, too
    parameters = sum(parameter.numel() for parameter in floors.Net().parameters())
    assert inference.bytes == 4 * (2 * 32 * 32 + parameters + 2 * 10)
    winners = 2 * (6 * 14 * 14)
    assert found["conv1, keeping winners"].bytes == found["conv1, inference"].bytes + winners


def test_each_kernel_runs_and_computes_what_its_title_says() -> None:
    with torch.inference_mode():
        results = {kernel.title: kernel.run() for kernel in floors.kernels(2)}
    for title, result in results.items():
        if "gradient of" in title:
            wanted = [gradient.numel() > 0 for gradient in result]
            assert wanted == ([True, False, False] if title.endswith("input") else [False, True, True])
    assert results["Net, inference"].shape == (2, 10)
    assert len(results["Net, keeping winners"]) == 7
    assert len(results["Net, gradients"][1]) == 10


@pytest.mark.extended
@pytest.mark.skipif(cxx_compiler() is None, reason="the peak needs a compiler")
def test_the_table(tmp_path: Path) -> None:
    rows = floors.measure(2, SHORT)
    assert {row["batch"] for row in rows} == {2}
    raw = section_to_dict("floors", rows)
    made = tables.render("floors", [summary.read(summary.write(shown.of_run(raw), tmp_path))])
    line = next(line for line in made.splitlines() if line.startswith("| Net, inference |"))
    assert line.split(" | ")[1:3] == ["2", "833"]
    assert line.count("%") == 1


def test_the_greater_floor_counts() -> None:
    kernel = floors.Kernel("k", lambda: None, 2e9, ())
    samples = {name: Samples((us,) * 3, 1) for name, us in (("kernel", 8.0), ("copy", 3.0), ("peak", 2.0))}
    row = floors._row(kernel, 4, samples)
    assert (row["peak_us"], row["copy_us"], row["share"]) == (4.0, 3.0, 0.5)
    samples["copy"] = Samples((6.0,) * 3, 1)
    assert floors._row(kernel, 4, samples)["share"] == 0.75
