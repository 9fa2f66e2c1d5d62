"""benchmarks/left_to_stock.py on two small layers, and its tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import left_to_stock  # noqa: E402
import summary  # noqa: E402
import tables  # noqa: E402

from lenet_ext.bench import shown  # noqa: E402
from lenet_ext.bench.results import section_to_dict  # noqa: E402
from lenet_ext.bench.timing import Effort, Samples  # noqa: E402

SHORT = Effort(sample_s=0.0005, rounds=3, min_rounds=3, budget_s=0.1)
LAYERS = (
    left_to_stock.Layer("first", (1, 4, 3), (8, 8), (1, 2)),
    left_to_stock.Layer("", (5, 4, (3, 2), 2, 1), (9, 8), (1,)),
)
TITLES = ["1->4 k3 at 8x8 (first)", "5->4 k3x2 s2 p1 at 9x8"]


@pytest.mark.parametrize("name", ["relu_alone", "average_pooling"])
def test_a_row_for_each_layer_step_and_batch(name: str, tmp_path: Path) -> None:
    _, stock, fused = left_to_stock.SECTIONS[name]
    rows = left_to_stock.measure(LAYERS, stock, fused, 1, SHORT)
    assert [(row["layer"], row["mode"], row["batch"]) for row in rows] == [
        *((TITLES[0], mode, batch) for mode in ("forward", "training") for batch in (1, 2)),
        *((TITLES[1], mode, 1) for mode in ("forward", "training")),
    ]
    raw = section_to_dict(name, [*rows, *({**row, "threads": 2} for row in rows)])
    small = summary.read(summary.write(shown.of_run(raw), tmp_path))
    made = tables.render(name, [small])
    assert "1 / 2 threads below each other" in made
    first = next(line for line in made.splitlines() if line.startswith(f"| {TITLES[1]} | forward + backward |"))
    assert first.endswith("| - |")  # batch 2 was not measured
    assert first.count("<br>") == 1


def test_the_faster_layouts_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is first has 6 microseconds, the others 5, 4 and 3."""

    def timed(programs: dict[str, object], effort: Effort) -> dict[str, Samples]:
        return {name: Samples((6.0 - number,) * 3, 1) for number, name in enumerate(programs)}

    monkeypatch.setattr(left_to_stock, "_time", timed)
    for _, stock, fused in left_to_stock.SECTIONS.values():
        rows = left_to_stock.measure(LAYERS[:1], stock, fused, 1)
        assert [row["stock_us"] for row in rows] == [5.0] * 4
        assert [row["speedup"] for row in rows] == [[pytest.approx(5 / 3)] * 3] * 4


def test_what_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_to_stock.F, "relu", lambda values: values)
    with pytest.raises(RuntimeError, match="fused: output differs from stock eager"):
        left_to_stock.measure(LAYERS[:1], left_to_stock.ConvReLU, left_to_stock.conv_relu, 1, SHORT)
