"""The benchmark: what is timed is what was compared, and the numbers are put together rightly."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

import lenet_ext
from lenet_ext.bench import (
    CASES,
    PROVIDERS,
    Plan,
    Program,
    Provider,
    Workload,
    print_report,
    report_to_dict,
    run_benchmarks,
)
from lenet_ext.bench.timing import Effort, Samples, percentile, ratio, time_interleaved

CPU = torch.device("cpu")
SHORT = Effort(sample_s=0.0005, rounds=3, min_rounds=3, budget_s=0.1)


def plan(**changes: object) -> Plan:
    values = {"cases": ("fc3",), "modes": ("forward",), "batch_sizes": (2,), "providers": ("fused", "eager")}
    return Plan(effort=SHORT, **{**values, **changes})  # type: ignore[arg-type]


# --- timing -----------------------------------------------------------------------------------------------------------


def test_percentiles() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert percentile(values, 0.5) == 3.0
    assert percentile(values, 0.0) == 1.0
    assert percentile(values, 1.0) == 5.0
    assert percentile([7.0], 0.2) == 7.0


def test_ratio_is_taken_within_rounds() -> None:
    # The machine was ten times slower in the last round, for both: the ratio does not notice.
    assert ratio(Samples((4.0, 4.0, 40.0), 1), Samples((2.0, 2.0, 20.0), 1)) == (2.0, 2.0, 2.0)


def test_programs_take_turns() -> None:
    order: list[str] = []
    programs = {name: lambda name=name: order.append(name) or time.sleep(0.002) for name in "abc"}
    samples = time_interleaved(programs, CPU, Effort(sample_s=0.001, rounds=4, min_rounds=4))
    turns = order[6:]  # two calls of each to find out how long they take
    assert turns == list("abcbcacababc")
    assert all(len(s.times_us) == 4 and s.calls == 1 and s.median_us > 1900 for s in samples.values())


def test_short_programs_are_called_often() -> None:
    samples = time_interleaved({"nothing": lambda: None}, CPU, SHORT)
    assert samples["nothing"].calls > 100


# --- cases and providers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.group != "general"])
def test_stock_and_fused_modules_of_a_case_agree(name: str) -> None:
    case = CASES[name]
    stock, fused = case.stock(), case.fused()
    fused.load_state_dict(stock.state_dict(), strict=True)
    pictures = torch.randn(3, *case.input_shape)
    torch.testing.assert_close(fused(pictures), stock(pictures), rtol=1e-4, atol=1e-4)


def test_general_cases_have_the_same_shapes() -> None:
    for case in CASES.values():
        pictures = torch.empty(2, *case.input_shape, device="meta")
        assert case.fused().to("meta")(pictures).shape == case.stock().to("meta")(pictures).shape, case.name


def test_workloads_are_reproducible() -> None:
    one, other = (Workload.make(CASES["conv1"], "training", 3, CPU) for _ in range(2))
    assert torch.equal(one.input, other.input)
    assert torch.equal(one.grad_output, other.grad_output)
    assert all(torch.equal(value, other.state[name]) for name, value in one.state.items())


@pytest.mark.parametrize("name", ["fused", "eager", "channels_last", "torchscript"])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_provider_computes_what_the_reference_does(name: str, mode: str) -> None:
    provider = PROVIDERS[name]
    if mode not in provider.modes:
        return
    for case in ("conv2", "net"):
        work = Workload.make(CASES[case], mode, 3, CPU)
        program = provider.prepare(work)
        program.run()
        program.run()  # gradients must not add up
        reference = CASES[case].stock()
        reference.load_state_dict(work.state)
        pictures = work.input.clone().requires_grad_(CASES[case].input_grad)
        output = reference(pictures)
        expected = [output]
        if mode == "training":
            leaves = [*reference.parameters(), *([pictures] if CASES[case].input_grad else [])]
            expected += torch.autograd.grad(output, leaves, work.grad_output)
        found = program.outputs()
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-4)


def test_compile_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    report = run_benchmarks(plan(providers=("fused", "eager", "compile")), CPU)
    assert "needs a C++ compiler, and none was found" in report.skipped["compile"]
    assert {row.provider for row in report.rows} == {"fused", "eager"}


# --- runner -----------------------------------------------------------------------------------------------------------


class WrongProvider(Provider):
    """Computes something else."""

    name, title = "wrong", "wrong"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def prepare(self, work: Workload) -> Program:
        right = PROVIDERS["eager"].prepare(work)
        return Program(right.run, lambda: [tensor * self.factor for tensor in right.outputs()])


@pytest.mark.parametrize("factor", [1.01, -1.0, float("nan")])
def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setitem(PROVIDERS, "wrong", WrongProvider(factor))
    with pytest.raises(
        RuntimeError, match=r"fc3, forward, batch 2: wrong: output differs from stock eager .* not timed"
    ):
        run_benchmarks(plan(providers=("fused", "eager", "wrong")), CPU)


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class WrongGradient(WrongProvider):
        def prepare(self, work: Workload) -> Program:
            right = PROVIDERS["eager"].prepare(work)
            return Program(right.run, lambda: [right.outputs()[0], *(1.1 * t for t in right.outputs()[1:])])

    monkeypatch.setitem(PROVIDERS, "wrong", WrongGradient(1.0))
    with pytest.raises(RuntimeError, match="training, batch 2: wrong: gradient 1 differs"):
        run_benchmarks(plan(providers=("eager", "wrong"), modes=("training",)), CPU)


def test_a_provider_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Provider):
        name, title = "failing", "failing"

        def prepare(self, work: Workload) -> Program:
            raise OSError("no such luck\nand more")

    monkeypatch.setitem(PROVIDERS, "failing", Failing())
    report = run_benchmarks(plan(providers=("fused", "eager", "failing")), CPU)
    assert report.skipped == {"failing": "OSError: no such luck and more"}
    assert len(report.comparisons) == 1


def test_slow_providers_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(WrongProvider):
        name, slow_start = "slow", True

        def prepare(self, work: Workload) -> Program:
            time.sleep(0.05)
            return super().prepare(work)

    monkeypatch.setitem(PROVIDERS, "slow", Slow(1.0))
    budgeted = plan(providers=("eager", "slow"), batch_sizes=(1, 2, 3), slow_batch_sizes=(2, 3), slow_budget_s=0.01)
    report = run_benchmarks(budgeted, CPU)
    assert [(row.batch, row.provider) for row in report.rows if row.provider == "slow"] == [(2, "slow")]
    assert "compiling took" in report.skipped["slow"]


@pytest.mark.parametrize("kind", ["cases", "modes", "providers"])
def test_unknown_names(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind} must be among .*found 'nonsense'"):
        run_benchmarks(plan(**{kind: ("nonsense",)}), CPU)


def test_the_yardstick_is_the_best_of_stock() -> None:
    report = run_benchmarks(plan(cases=("net",), providers=("fused", "eager", "channels_last")), CPU)
    (comparison,) = report.comparisons
    medians = {row.provider: row.samples.median_us for row in report.rows}
    assert comparison.best_stock == min(("eager", "channels_last"), key=medians.__getitem__)
    assert comparison.speedup_p20 <= comparison.speedup <= comparison.speedup_p80


def test_report_is_strict_json_and_complete() -> None:
    report = run_benchmarks(plan(modes=("forward", "training"), batch_sizes=(1, 2)), CPU)
    content = json.loads(json.dumps(report_to_dict(report), allow_nan=False))
    assert {
        "date",
        "machine",
        "cpu_capability",
        "torch",
        "threads",
        "versions",
        "commit",
        "rows",
        "comparisons",
    } <= set(content)
    assert content["versions"]["lenet_ext"] == lenet_ext.build_info()["version"]
    assert len(content["rows"]) == 2 * 2 * 2


def test_table_fits_any_width() -> None:
    from rich.console import Console

    report = run_benchmarks(plan(), CPU)
    for width in (60, 80, 200):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        print_report(report, console)
        assert "fc3" in console.export_text()


def test_quick_plan_is_a_part_of_the_full_one() -> None:
    quick, full = Plan.quick(), Plan()
    assert set(quick.cases) <= set(full.cases)
    assert set(quick.batch_sizes) <= set(full.batch_sizes)
    assert quick.providers == full.providers
    assert dataclasses.asdict(quick.effort)["budget_s"] < full.effort.budget_s
