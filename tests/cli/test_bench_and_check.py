"""`lenet-ext bench` and `lenet-ext check` in this process: what they do with their options and with what they find."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lenet_ext import selftest
from lenet_ext.bench.plan import Plan
from lenet_ext.bench.timing import Effort
from lenet_ext.cli import main
from lenet_ext.selftest import Result, calls, comparing, kernels, variants

CPU = torch.device("cpu")
BENCH = ("bench", "--device", "cpu", "--threads", "1", "--providers", "fused,eager")
FC3 = (*BENCH, "--cases", "fc3", "--modes", "forward", "--batch-sizes")


@pytest.fixture(autouse=True)
def _in_a_moment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fewer samples than anybody should trust."""
    effort = Effort(sample_s=0.0005, rounds=3, min_rounds=3, budget_s=0.1)
    for name in ("quick", "group"):
        made = getattr(Plan, name)
        short = lambda *args, made=made: Plan(**{**vars(made(*args)), "effort": effort})  # noqa: E731
        monkeypatch.setattr(Plan, name, staticmethod(short))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def lines(out: str) -> set[tuple[str, str, str]]:
    """Case, mode and batch of the lines of the table."""
    cells = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if line.startswith("│")]
    return {(case, mode, batch) for _, case, mode, batch, *_ in cells if batch.isdigit()}


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# --- bench ------------------------------------------------------------------------------------------------------------


def test_without_a_file_there_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *FC3, "1", "--quick")
    assert lines(out) == {("fc3", "forward", "1")}
    assert "wrote" not in out
    assert "targets" not in out, "few samples are no ground for a verdict"


def test_a_run_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--json", tmp_path / "b.json", "--csv", tmp_path / "b.csv")
    run(capsys, *FC3, "1,5", "--resume", *files)
    out = run(capsys, *FC3, "1,5,6", "--resume", *files)
    assert lines(out) == {("fc3", "forward", "6")}, "the others were measured before"
    content = json.loads((tmp_path / "b.json").read_text())
    assert [row["batch"] for row in content["rows"]] == [1, 1, 5, 5, 6, 6]
    assert len((tmp_path / "b.csv").read_text().splitlines()) == 1 + 6
    assert f"wrote {tmp_path / 'b.csv'}" in out


def test_a_file_of_another_machine_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.json"
    run(capsys, *FC3, "1", "--json", path)
    content = json.loads(path.read_text())
    content["machine"]["cpu"] = "Z80"
    path.write_text(json.dumps(content))
    line = refused(capsys, *FC3, "1", "--json", path)
    assert f"--json {path}: " in line
    assert "another machine: cpu Z80" in line
    assert "choose another file" in line
    assert json.loads(path.read_text()) == content
    assert "modes" in refused(capsys, *BENCH, "--cases", "fc3", "--modes", "backward")


def test_whole_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """--only without --cases, of the full run and of the quick one."""
    size = ("--batch-sizes", "1", "--modes", "forward")
    full = lines(run(capsys, *BENCH, *size, "--only", "overhead"))
    assert ("call_linear", "forward", "1") in full
    assert ("fc3", "forward", "1") not in full
    quick = lines(run(capsys, *BENCH, *size, "--quick"))
    assert quick == {(case, "forward", "1") for case in ("net", "conv1", "conv2", "fc1")}


def test_the_measurements_that_are_no_times_of_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int]] = []

    def memory(threads: int) -> list[dict[str, Any]]:
        asked.append(("memory", threads))
        return [{"provider": "fused", "batch": 4096, "threads": threads, "median_bytes": 3 * 2**20}]

    monkeypatch.setattr("lenet_ext.bench.memory.measure_memory", memory)
    monkeypatch.setattr("lenet_ext.bench.neighbour.neighbour_unavailable", lambda threads: "needs two cores")
    args = ("bench", "--device", "cpu", "--threads", "1,3", "--only", "memory,neighbour", "--json", tmp_path / "b.json")
    out = run(capsys, *args)
    assert "needs two cores" in out
    assert asked == [("memory", 3)]
    out = run(capsys, *args, "--resume")
    assert asked == [("memory", 3)], "the file has it"
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["memory"][0]["median_bytes"] == 3 * 2**20
    only_memory = (*args[:5], "--only", "memory", "--json", tmp_path / "b.json", "--resume")
    assert f"wrote {tmp_path / 'b.json'}" in run(capsys, *only_memory), "there was nothing to measure"


def test_beside_a_busy_neighbour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    times = {f"{name}_us": [1.0, 640.0, 3.0] for name in ("one_alone", "all_alone", "all_disturbed")}
    row = {"provider": "fused", "mode": "forward", "batch": 64, "threads": 2, "speedup": 1.25, **times}
    monkeypatch.setattr("lenet_ext.bench.neighbour.neighbour_unavailable", lambda threads: None)
    monkeypatch.setattr("lenet_ext.bench.neighbour.measure_neighbour", lambda threads: [row])
    assert "1.25" in run(capsys, "bench", "--device", "cpu", "--threads", "2", "--only", "neighbour")


def test_a_terminal_is_told_what_comes_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    monkeypatch.setattr("lenet_ext.bench.memory.measure_memory", lambda threads: [])
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: told.append(text))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's way to take any stream for a terminal
    run(capsys, *FC3, "1", "--quick")
    run(capsys, *BENCH, "--only", "memory")
    assert told == ["fc3 forward batch 1, threads: 1", "memory"]


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    monkeypatch.setattr(selftest, "_KERNELS", {"one": lambda device: iter([("a", lambda: None)])})
    monkeypatch.setattr(selftest, "_OTHERS", {"two": lambda device: iter([("b", lambda: None), ("c", lambda: None)])})
    monkeypatch.setattr(variants, "settings", lambda: [{"LENET_EXT_ALGORITHM": "vendor"}])
    monkeypatch.setattr(variants, "run_setting", lambda setting: (4, ()))
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: told.append(text))
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = run(capsys, "check", "--device", "cpu")
    assert told == ["one", "two", "other instruction sets and algorithms"]
    assert "kernels with LENET_EXT_ALGORITHM=vendor" in out
    assert "all 7 checks passed" in out
    assert [result.name for result in selftest.run_checks(CPU, kernels_only=True)] == ["one"]
    monkeypatch.setattr(variants, "settings", list)
    told.clear()
    assert "all 3 checks passed" in run(capsys, "check", "--device", "cpu")
    assert told == ["one", "two"]


def test_the_kernels_that_a_process_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"cpu_capability": "avx2", "cpu_capabilities": ["default", "avx2", "avx512"]}
    monkeypatch.setattr(variants.lenet_ext, "build_info", lambda: info)
    for name in ("LENET_EXT_CPU_CAPABILITY", "LENET_EXT_ALGORITHM"):
        monkeypatch.delenv(name, raising=False)
    default, direct = {"LENET_EXT_CPU_CAPABILITY": "default"}, {"LENET_EXT_ALGORITHM": "direct"}
    vendor = {"LENET_EXT_ALGORITHM": "vendor"}
    assert variants.settings() == [{**default, **direct}, vendor]
    monkeypatch.setenv("LENET_EXT_CPU_CAPABILITY", "avx2")
    assert variants.settings() == [direct, vendor]
    monkeypatch.setenv("LENET_EXT_ALGORITHM", "direct")
    assert variants.settings() == []
    monkeypatch.delenv("LENET_EXT_CPU_CAPABILITY")
    assert variants.settings() == [default]


@pytest.mark.parametrize(
    ("failures", "code", "printed"), [((), 0, "5\n"), (("no", "not at all"), 1, "group: no\ngroup: not at all\n")]
)
def test_a_process_prints_what_its_parent_reads(
    failures: tuple[str, ...],
    code: int,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(selftest, "run_checks", lambda device, kernels_only: [Result("group", 5, failures, 0.0)])
    assert selftest._child() == code
    assert capsys.readouterr().out == printed


def test_a_process_that_cannot_be_begun_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    count, (failure,) = variants.run_setting({})
    assert count == 1
    assert "/nowhere/python" in failure


def wrong_conv(change: Any) -> Any:
    right = kernels.functional.conv_relu_max_pool2d
    return lambda *args, **options: change(right(*args, **options))


@pytest.mark.parametrize(
    ("group", "name", "wrong", "message"),
    [
        ("layouts", "conv_relu_max_pool2d", lambda y: y.clone(memory_format=torch.contiguous_format), "has strides"),
        ("rounding", "conv_relu_max_pool2d", lambda y: y * 1.001, "error .*, stock"),
        ("rounding", "linear", lambda y: y * 1.001, "error .*, stock"),
        ("special_values", "linear_relu", lambda y: y[:, 1:], "has shape .*, expected"),
        ("special_values", "linear_relu", lambda y: y.half(), "is torch.float16, expected"),
    ],
)
def test_wrong_kernels_are_found(
    group: str, name: str, wrong: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(kernels.functional, name)
    monkeypatch.setattr(kernels.functional, name, lambda *args, **options: wrong(right(*args, **options)))
    result = selftest._run_group(group, getattr(kernels, group)(CPU))
    assert any(re.search(message, failure) for failure in result.failures), result.failures


def test_a_wrong_network_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = kernels.Net.forward
    monkeypatch.setattr(kernels.Net, "forward", lambda self, images: forward(self, images) * 1.01)
    with pytest.raises(comparing.MismatchError, match="logits differs by"):
        kernels._net(CPU, torch.float32, 1)


def test_images_with_nearly_equal_winners_are_left_out() -> None:
    """Their gradients depend on rounding, so a right network may fail on them."""
    torch.manual_seed(0)
    net = kernels.ReferenceNet(dtype=torch.float64)
    images = torch.randn(9, 1, 32, 32, dtype=torch.float64)
    images[4, :, 10:16, 10:16] = 1 + 1e-6 * torch.randn(6, 6, dtype=torch.float64)  # one window of conv1
    assert kernels.has_clear_winners(net, images, gap=1e-9).all()
    assert kernels.has_clear_winners(net, images, gap=1e-6).tolist() == [i != 4 for i in range(9)]


def test_threads_that_disagree_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = kernels.Net.forward
    monkeypatch.setattr(
        kernels.Net, "forward", lambda self, images: forward(self, images) + (torch.get_num_threads() > 1)
    )
    with pytest.raises(comparing.MismatchError, match=r"1 and \d+ threads differ by"):
        kernels._threads()
    monkeypatch.setenv("LENET_EXT_ALGORITHM", "vendor")
    assert list(kernels.threads(CPU)) == [], "the vendor promises nothing"


def test_a_bad_call_that_is_accepted_is_found() -> None:
    with pytest.raises(comparing.MismatchError, match="no ValueError"):
        calls._raises(ValueError, lambda: None)


def test_a_console_is_as_wide_as_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from lenet_ext.cli.common import make_console

    monkeypatch.setenv("COLUMNS", "47")
    assert make_console().width > 100, "a file's tables are not wrapped"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert make_console().width == Console().width == 47
