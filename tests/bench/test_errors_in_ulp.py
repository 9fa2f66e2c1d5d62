"""`benchmarks/errors_in_ulp.py`: its unit, the gradients that it leaves out, and the table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lenet_ext import nn
from lenet_ext.bench.cases import CASES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import errors_in_ulp


def test_an_ulp_is_the_distance_of_neighboring_numbers() -> None:
    exact = torch.tensor([3.0, -3.0], dtype=torch.float64)  # between 2 and 4, where neighbors are 2 epsilons apart
    eps = torch.finfo(torch.float32).eps
    assert errors_in_ulp.error(exact.float(), exact) == 0
    assert errors_in_ulp.error((exact + 2 * eps).float(), exact) == pytest.approx(1)


def test_no_gradient_goes_where_rounding_decides() -> None:
    layer = nn.ConvReLUMaxPool2d(1, 1, 1, bias=True, dtype=torch.float64)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    rows = [[1.0, 2.0, 5.0, 5.0, -1.0, -2.0, 1e-9, -1.0], [0.0, 1.0, 0.0, 1.0, -1.0, -2.0, -1.0, -1.0]]
    image = torch.tensor(rows, dtype=torch.float64)[None, None]
    assert errors_in_ulp.clear(layer, image, 1e-6).flatten().tolist() == [True, False, False, False]


@pytest.mark.parametrize("name", ["conv2", "fc2", "fc3"])
def test_ours_and_stock_are_a_few_ulp_away(name: str) -> None:
    for found in errors_in_ulp.errors(CASES[name], torch.float32):
        assert all(0 < side < 50 for side in found)


def test_long_sums_are_added_up_in_parts() -> None:
    """Of 576 terms; one after the other they leave an error of about 4.5 ulp."""
    found = errors_in_ulp.errors(CASES["conv64x128"], torch.float32)
    assert found[0][0] < 2.5


def test_the_table() -> None:
    rows = [(CASES["fc3"], [(1.0, 2.0, 3.0), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (4.0, 1.0, 2.0)])]
    content = {"machine": {"cpu": "Some CPU"}, "cpu_capability": "avx2", "versions": {"torch": "2.13.0"}}
    text = errors_in_ulp.markdown({"float32": rows}, content)
    assert "| 84->10 | 64 | 1.00 / 2.00 / 3.00 | 0.50 / 0.50 / 0.50 | 0.00 / 0.00 / 0.00 | 4.00 / 1.00 / 2.00 |" in text
    assert "More than 1.5 times stock's: 84->10, grad of bias: 2.00x." in text
