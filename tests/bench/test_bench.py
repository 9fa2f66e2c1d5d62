"""The benchmark: what is timed is what was compared, and the numbers are put together rightly."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lenet_ext
from lenet_ext.bench import (
    CASES,
    GROUPS,
    PROVIDERS,
    Plan,
    Program,
    Provider,
    Workload,
    flops_per_image,
    instruction_sets,
    merge,
    peak,
    print_results,
    read_results,
    report_to_dict,
    run_benchmarks,
    runner,
    timing,
    write_csv,
)
from lenet_ext.bench.providers import ModuleProvider
from lenet_ext.bench.timing import Effort, Samples, cold_time_us, percentile, ratio, time_interleaved

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


@pytest.mark.parametrize("collecting", [True, False])
def test_no_garbage_is_collected_meanwhile_and_then_as_before(collecting: bool) -> None:
    seen: list[bool] = []
    (gc.enable if collecting else gc.disable)()
    try:
        time_interleaved({"look": lambda: seen.append(gc.isenabled())}, CPU, SHORT)
        assert gc.isenabled() == collecting
    finally:
        gc.enable()
    assert not seen[-1]


def test_short_programs_are_called_often() -> None:
    samples = time_interleaved({"nothing": lambda: None}, CPU, SHORT)
    assert samples["nothing"].calls > 100


def test_a_turn_waits_for_the_threads_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool whose threads spin on for 60 ms after each call, on a clock that moves while somebody sleeps or works."""
    now, spins_until, worked = 0.0, 0.0, 0.0
    begun_while_spinning: list[bool] = []

    def let_pass(seconds: float) -> None:
        nonlocal now, worked
        worked += min(seconds, max(0.0, spins_until - now))
        now += seconds

    def pool() -> None:
        nonlocal spins_until
        let_pass(0.001)
        spins_until = now + 0.06

    def other() -> None:
        begun_while_spinning.append(now < spins_until)
        let_pass(0.03)

    clock = SimpleNamespace(
        perf_counter=lambda: now,
        perf_counter_ns=lambda: round(now * 1e9),
        process_time=lambda: worked,
        sleep=let_pass,
    )
    monkeypatch.setattr(timing, "time", clock)
    effort = Effort(sample_s=0.001, rounds=8, min_rounds=2, budget_s=0.2)
    samples = time_interleaved({"pool": pool, "other": other}, CPU, effort, settle=True)
    assert not any(begun_while_spinning[2:])  # after the calls that find out how long they take
    assert len(samples["other"].times_us) == 7  # of 31 ms each; the waits do not count


def test_threads_that_never_sleep_are_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(
        timing, "time", SimpleNamespace(perf_counter=lambda: now, process_time=lambda: now, sleep=sleep)
    )
    assert timing._wait_for_idle_threads() == pytest.approx(timing._PATIENCE_S, abs=2 * timing._LOOK_S)


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


@pytest.mark.parametrize("name", ["fused", "eager", "channels_last", "torchscript", "torchscript_cl"])
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


PLAINLY_COMPILED = ModuleProvider("compiled", "without the compiler of C++", compile_options={"backend": "eager"})


@pytest.mark.parametrize(
    "provider",
    [*(PROVIDERS[name] for name in ("fused", "eager", "channels_last")), PLAINLY_COMPILED],
    ids=lambda p: p.name,
)
@pytest.mark.parametrize("case", ["net", "net3"])
def test_a_step_of_each_is_that_of_the_reference(provider: Provider, case: str) -> None:
    work = Workload.make(CASES[case], "step", 3, CPU)
    program = provider.prepare(work)
    for _ in range(3):
        program.run()  # what came before must not count
    reference = CASES[case].stock()
    reference.load_state_dict(work.state)
    loss = torch.nn.functional.cross_entropy(reference(work.input), work.targets)
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    found = program.outputs()
    for ours, theirs in zip(found, [loss.detach(), *(-gradient for gradient in gradients)], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_cost_of_a_call_is_that_of_the_function_with_its_weights() -> None:
    rows = run_benchmarks(plan(cases=("call_linear",), batch_sizes=(1,)), CPU).rows
    assert [row.provider for row in rows] == ["fused", "eager"]


def test_ours_is_made_for_inference_where_the_case_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    case = dataclasses.replace(CASES["fc3"], for_inference=lambda module: made.append(module.training) or module)
    monkeypatch.setitem(CASES, "fc3", case)
    run_benchmarks(plan(modes=("forward", "training")), CPU)
    assert made == [False], "for the forward pass of ours alone"


def test_a_provider_is_measured_for_what_it_can() -> None:
    rows = run_benchmarks(plan(modes=("training",), providers=("eager", "torchscript")), CPU).rows
    assert [row.provider for row in rows] == ["eager"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_the_fused_network_says_why_it_cannot_run_on_a_gpu() -> None:
    assert "device cuda cannot be used" in (PROVIDERS["fused"].unavailable(torch.device("cuda")) or "")
    assert PROVIDERS["eager"].unavailable(torch.device("cuda")) is None


@pytest.mark.parametrize(("name", "packages"), [("onnxruntime", "onnxruntime, onnx"), ("openvino", "openvino")])
def test_other_libraries_are_optional(monkeypatch: pytest.MonkeyPatch, name: str, packages: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    reason = PROVIDERS[name].unavailable(CPU)
    assert reason == f"not installed: {packages} (pip install 'lenet_ext[bench]')"
    assert PROVIDERS[name].unavailable(torch.device("cuda")) == "compared on the CPU only"
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package)
    assert PROVIDERS[name].unavailable(CPU) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_other_libraries_compute_what_the_reference_does(name: str) -> None:
    if reason := PROVIDERS[name].unavailable(CPU):
        pytest.skip(reason)
    work = Workload.make(CASES["net"], "forward", 3, CPU)
    programs = [PROVIDERS[provider].prepare(work) for provider in (name, "eager")]
    for program in programs:
        program.run()
    torch.testing.assert_close(*(program.outputs() for program in programs), rtol=1e-3, atol=1e-4)


def test_only_whole_networks_take_steps() -> None:
    taken = plan(cases=("fc3", "net"), modes=("forward", "step")).workloads(1)
    assert [(case, mode) for case, mode, _ in taken] == [("fc3", "forward"), ("net", "forward"), ("net", "step")]


def test_compile_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    report = run_benchmarks(plan(providers=("fused", "eager", "compile")), CPU)
    assert "needs a C++ compiler, and none was found" in report.skipped["compile"]
    assert {row.provider for row in report.rows} == {"fused", "eager"}


KERNELBENCH = [case for case in CASES.values() if case.group == "kernelbench"]


def test_kernelbench_draws_its_own_images() -> None:
    for case in KERNELBENCH:
        work = Workload.make(case, "forward", 4, CPU)
        assert 0 <= float(work.input.min()) < 0.01 < 0.99 < float(work.input.max()) < 1
        assert work.grad_output.shape == (4, 20)


def test_kernelbench_is_measured_on_a_gpu_alone() -> None:
    report = run_benchmarks(Plan.group("kernelbench"), CPU)
    assert report.rows == []
    for case in KERNELBENCH:
        assert report.skipped[case.name] == "measured on cuda alone"


def test_kernelbench_has_its_own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Precision and clock are those of the case, and each element is compared for itself."""
    seen: list[bool] = []

    def clock(run: Callable[[], object], device: torch.device) -> float:
        seen.append(torch.backends.cudnn.allow_tf32)
        run()
        return 7.0

    monkeypatch.setattr(runner, "cold_time_us", clock)
    monkeypatch.setitem(PROVIDERS, "wrong", WrongProvider(1.01))
    for case in KERNELBENCH:
        monkeypatch.setitem(CASES, case.name, dataclasses.replace(case, device_types=("cpu",), batch_sizes=(2,)))
    before = torch.backends.cudnn.allow_tf32
    short = plan(cases=[case.name for case in KERNELBENCH], modes=("forward", "training"))
    rows = report_to_dict(run_benchmarks(short, CPU))["rows"]
    assert torch.backends.cudnn.allow_tf32 == before
    assert [(row["mode"], row["median_us"], row["calls_per_round"]) for row in rows] == [("forward", 7.0, 1)] * 4
    assert [row["precision"] for row in rows[::2]] == [case.rules.precision for case in KERNELBENCH]
    assert seen == [True] * 6 + [False] * 6
    with pytest.raises(RuntimeError, match=r"kernelbench, forward, batch 2: wrong: output .*, tolerance 1e-04"):
        run_benchmarks(plan(cases=("kernelbench",), providers=("eager", "wrong")), CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_clock_of_a_gpu_with_cold_caches() -> None:
    device = torch.device("cuda")
    matrix = torch.ones(2048, 2048, device=device)
    assert 1 < cold_time_us(lambda: matrix @ matrix, device) < 1e6


def test_code_for_a_forced_instruction_set_is_kept_apart(tmp_path: Path) -> None:
    """In a process of its own: the first that asks torch for the place settles it."""
    code = """
import os, torch
from lenet_ext.bench import Plan, run_benchmarks
from lenet_ext.bench.timing import Effort
torch.compile = lambda call, **_: call
plan = Plan(("fc3",), ("forward",), (2,), ("fused", "eager", "compile"), effort=Effort(budget_s=0.1, min_rounds=1))
run_benchmarks(plan, torch.device("cpu"))
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "TMPDIR": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "torchinductor-default"), done.stderr


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[:1], "gives 1 results, stock eager 4"),
        (lambda found: [found[0][:, :9], *found[1:]], r"output has shape \(2, 9\), stock eager \(2, 10\)"),
    ],
    ids=["too few", "smaller"],
)
def test_results_of_another_form_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list[torch.Tensor]], list[torch.Tensor]], message: str
) -> None:
    class Other(WrongProvider):
        def prepare(self, work: Workload) -> Program:
            right = PROVIDERS["eager"].prepare(work)
            return Program(right.run, lambda: change(right.outputs()))

    monkeypatch.setitem(PROVIDERS, "wrong", Other(1.0))
    with pytest.raises(RuntimeError, match=f"training, batch 2: wrong:? {message}"):
        run_benchmarks(plan(providers=("eager", "wrong"), modes=("training",)), CPU)


class Failing(Provider):
    """Cannot do what is asked."""

    name, title = "failing", "failing"

    def __init__(self) -> None:
        self.asked = 0

    def prepare(self, work: Workload) -> Program:
        self.asked += 1
        raise OSError("no such luck\nand more")


def test_a_provider_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing()
    monkeypatch.setitem(PROVIDERS, "failing", failing)
    report = run_benchmarks(plan(providers=("fused", "eager", "failing"), batch_sizes=(1, 2)), CPU)
    assert report.skipped == {"failing, fc3 forward": "OSError: no such luck and more"}
    assert len(report.comparisons) == 2
    assert failing.asked == 1, "it is not tried again"


@pytest.mark.parametrize("name", ["fused", "eager"])
def test_without_ours_or_stock_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    failing = Failing()
    failing.name = name
    monkeypatch.setitem(PROVIDERS, name, failing)
    with pytest.raises(OSError, match="no such luck"):
        run_benchmarks(plan(), CPU)


def test_a_slow_program_is_warmed_up_once() -> None:
    calls: list[float] = []
    runner._warm_up(Program(lambda: calls.append(time.sleep(0.31) or 0.0), list))
    assert len(calls) == 1


def test_workloads_are_told_of() -> None:
    told: list[str] = []
    run_benchmarks(plan(batch_sizes=(1, 2), threads=(1,)), CPU, told.append)
    assert told == ["fc3 forward batch 1, threads: 1", "fc3 forward batch 2, threads: 1"]


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
    assert comparison.best_eager == min(("eager", "channels_last"), key=medians.__getitem__)
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
        print_results(report_to_dict(report), console)
        assert "fc3" in console.export_text()


def test_quick_plan_is_a_part_of_the_full_one() -> None:
    quick, full = Plan.quick(), Plan()
    assert all(any(case in Plan.group(group).cases for group in GROUPS) for case in quick.cases)
    assert set(quick.batch_sizes) <= set(full.batch_sizes)
    assert quick.providers == full.providers
    assert dataclasses.asdict(quick.effort)["budget_s"] < full.effort.budget_s


def test_the_faster_of_our_layouts_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fast(WrongProvider):
        name, kind = "fused_channels_last", "fused"

        def prepare(self, work: Workload) -> Program:
            program = super().prepare(work)
            program.run()
            return Program(lambda: None, program.outputs)

    monkeypatch.setitem(PROVIDERS, "fused_channels_last", Fast(1.0))
    report = run_benchmarks(plan(cases=("conv2",), providers=("fused", "eager", "fused_channels_last")), CPU)
    (comparison,) = report.comparisons
    assert comparison.best_fused == "fused_channels_last"
    assert comparison.best_peer == "eager"
    assert comparison.speedup > 10


# --- floor ------------------------------------------------------------------------------------------------------------


class Rates:
    """In place of the microbenchmark: each version takes half of what the one before takes."""

    def fma_peak_versions(self) -> int:
        return 3

    def fma_peak_seconds(self, version: int, threads: int, seconds: float) -> float:
        return 8.0 / 2**version


@pytest.mark.parametrize(("forced", "seconds"), [("", 2.0), ("avx512", 2.0), ("avx2", 4.0), ("default", 8.0)])
def test_the_peak_is_that_of_the_forced_instruction_set(
    monkeypatch: pytest.MonkeyPatch, forced: str, seconds: float
) -> None:
    monkeypatch.setattr(peak, "_library", Rates)
    monkeypatch.setenv("LENET_EXT_CPU_CAPABILITY", forced)
    assert peak.peak_meter(1)() == seconds * 1e6


def test_the_peak_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "cxx_compiler", lambda: None)
    with pytest.raises(peak.PeakUnavailableError, match="no C\\+\\+ compiler was found"):
        peak._library.__wrapped__()


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo peak.cpp: error: no >&2; exit 1", "peak.cpp: error: no"), ("exit 3", "exit code 3")],
)
def test_a_microbenchmark_that_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, reason: str
) -> None:
    (tmp_path / "compiler").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "compiler").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    monkeypatch.setattr(peak, "_library", peak._library.__wrapped__)  # which remembers its answer
    report = run_benchmarks(plan(), CPU)
    assert reason in " ".join(report.skipped.values())
    assert {row.provider for row in report.rows} == {"fused", "eager"}


def test_operations_are_counted() -> None:
    # Every multiply-add is two operations.
    assert flops_per_image(CASES["net"], "forward") == 2 * 416520
    # fc3: the product, its two gradients.
    assert flops_per_image(CASES["fc3"], "training") == 3 * 2 * 84 * 10
    # conv1 has no input gradient, and only winners have a weight gradient: a quarter of the positions.
    forward = 2 * 6 * 25 * 28 * 28
    assert flops_per_image(CASES["conv1"], "training") == forward + forward // 4
    assert flops_per_image(CASES["call_linear"], "forward") is None


# --- results ----------------------------------------------------------------------------------------------------------


def results(**changes: object) -> dict:
    return json.loads(json.dumps(report_to_dict(run_benchmarks(plan(**changes), CPU))))


def test_pieces_of_a_run_add_up() -> None:
    one, other = results(batch_sizes=(1, 2)), results(batch_sizes=(2, 3))
    both = merge(one, other)
    assert [(row["batch"], row["provider"]) for row in both["rows"]] == [
        (batch, provider) for batch in (1, 2, 3) for provider in ("fused", "eager")
    ]
    assert [line["batch"] for line in both["comparisons"]] == [1, 2, 3]
    measured_again = [row for row in both["rows"] if row["batch"] == 2]
    assert measured_again == [row for row in other["rows"] if row["batch"] == 2]
    assert merge(None, one) == one


def test_results_of_another_machine_are_not_mixed_in() -> None:
    one = results()
    other = {**one, "machine": {**one["machine"], "cpu": "Z80"}}
    with pytest.raises(ValueError, match="another machine: cpu Z80, now"):
        merge(other, one)
    with pytest.raises(ValueError, match="of another cpu capability: Z80, now "):
        merge({**one, "cpu_capability": "Z80"}, one)


def test_a_forced_instruction_set_is_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in instruction_sets.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    own = results()
    assert "forced" not in own["machine"]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")  # as if it were not set
    other = results()
    assert other["machine"]["forced"] == {"ATEN_CPU_CAPABILITY": "default"}
    with pytest.raises(ValueError, match=r"another machine: forced None, now \{'ATEN_CPU"):
        merge(own, other)
    write_csv(other, tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        assert {line["forced"] for line in csv.DictReader(file)} == {"ATEN_CPU_CAPABILITY=default"}


def test_reading_other_files(tmp_path: Path) -> None:
    assert read_results(tmp_path / "none.json") is None
    (tmp_path / "text.json").write_text("no")
    with pytest.raises(ValueError, match="is not JSON"):
        read_results(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no results"):
        read_results(tmp_path / "list.json")


def test_csv_has_a_line_per_row(tmp_path: Path) -> None:
    content = results(batch_sizes=(1, 2))
    write_csv(content, tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["median_us"]) for line in lines] == [row["median_us"] for row in content["rows"]]
    assert {line["cpu"] for line in lines} == {content["machine"]["cpu"]}
