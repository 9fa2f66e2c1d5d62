"""The scripts in benchmarks/ that make small files of raw runs, and tables of small files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lenet_ext.bench import PROVIDERS, shown, targets
from lenet_ext.bench.instruction_sets import instruction_set

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))
import summary  # noqa: E402
import tables  # noqa: E402
import to_markdown  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GROUPS = {"net": "net", "conv1": "layers", "conv2": "layers", "call_linear": "overhead"}


def raw(medians: dict[tuple[str, str, int, int], dict[str, float]], **changes: Any) -> dict[str, Any]:
    """A file of ``lenet-ext bench --json`` with these times, by case, mode, batch and threads, and provider."""
    rows, comparisons = [], []
    for (case, mode, batch, threads), times in medians.items():
        place = {"case": case, "mode": mode, "batch": batch, "threads": threads}
        best = {
            kind: min((name for name in times if PROVIDERS[name].kind in kinds), key=times.__getitem__)
            for kind, kinds in {"fused": ["fused"], "eager": ["eager"], "peer": ["eager", "peer"]}.items()
        }
        for name, us in times.items():
            percentiles = {"p20_us": 0.9 * us, "median_us": us, "p80_us": 1.1 * us}
            ratios = {f"fused_speedup{suffix}": us / times["fused"] for suffix in ("_p20", "", "_p80")}
            rest = {"group": GROUPS[case], "provider": name, "peak_share": 0.5, "commit": COMMIT, "rounds": 31}
            rows.append({**place, **percentiles, **ratios, **rest})
        line = {f"best_{kind}": name for kind, name in best.items()}
        for prefix, name in (("", best["eager"]), ("peer_", best["peer"])):
            line |= {f"{prefix}speedup{suffix}": times[name] / times[best["fused"]] for suffix in ("_p20", "", "_p80")}
        comparisons.append({**place, **line})
    run = {"date": "2026-11-24T00:11:26+00:00", "commit": COMMIT, "skipped": {}, "load_average_before": 0.1}
    content = {
        "machine": {"cpu": "AMD EPYC", "processors": 2},
        "cpu_capability": "avx512",
        "versions": {"torch": "2.13.0+cpu"},
        "runs": dict.fromkeys({row["group"] for row in rows}, run),
        "rows": rows,
        "comparisons": comparisons,
    }
    return {**content, **changes}


NET = {
    ("net", "forward", 1, 1): {"fused": 20.0, "eager": 300.0, "channels_last": 240.0, "onnxruntime": 30.0},
    ("net", "forward", 1, 2): {"fused": 18.0, "eager": 200.0, "channels_last": 180.0, "onnxruntime": 27.0},
}


def read_back(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    return summary.read(summary.write(content, folder))


# --- small files ------------------------------------------------------------------------------------------------------


def test_a_small_file_keeps_what_is_shown(tmp_path: Path) -> None:
    layer = {"fused": 4.0, "fused_channels_last": 2.0, "eager": 30.0, "channels_last": 20.0, "openvino": 9.0}
    layer["torchscript"] = 8.0
    content = read_back(shown.of_run(raw({**NET, ("conv1", "training", 64, 1): layer})), tmp_path)
    cells = shown.workloads(content)
    assert set(cells["net", "forward", 1, 1]) == {"fused", "eager", "channels_last", "onnxruntime"}
    # The slower layouts and the slower peer are in no table.
    found = cells["conv1", "training", 64, 1]
    assert {name: row["over"] for name, row in found.items()} == {
        "fused_channels_last": 1,
        "channels_last": 10,
        "torchscript": 4,
    }
    assert found["torchscript"]["p20_us"] == pytest.approx(7.2)
    assert {row["group"] for row in found.values()} == {"layers"}
    assert cells["net", "forward", 1, 1]["eager"]["over"] == 15
    assert content["runs"]["net"] == {"date": "2026-11-24T00:11:26+00:00", "commits": [COMMIT]}


def test_a_small_file_has_a_line_for_each_cell(tmp_path: Path) -> None:
    memory = [{"provider": name, "batch": 4096, "threads": 2, "median_bytes": 10} for name in ("fused", "eager")]
    path = summary.write(shown.of_run(raw(NET, memory=memory)), tmp_path)
    lines = path.read_text().splitlines()
    assert sum(line.startswith('["net","forward",') for line in lines) == 8
    assert sum(line.startswith('{"provider":') for line in lines) == 2
    assert json.loads(path.read_text())["memory"] == memory
    assert '"rounds"' not in path.read_text()


def test_numbers_are_not_changed_by_more_than_they_are_shown() -> None:
    assert summary._rounded([1234567.0, 1.23456789, {"share": 0.1234567}, 2.0, None, "text", True]) == [
        1235000,
        1.235,
        {"share": 0.1235},
        2,
        None,
        "text",
        True,
    ]


@pytest.mark.parametrize(
    ("processor", "capability", "name"),
    [
        ("AMD EPYC", "avx512", "cpu-amd-epyc-avx512-2026-11-24.json"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "avx2", "cpu-intel-xeon-platinum-8488c-avx2-2026-11-24.json"),
    ],
)
def test_a_small_file_is_named_by_processor_and_date(processor: str, capability: str, name: str) -> None:
    machine = {"cpu": processor, "processors": 2}
    content = shown.of_run(raw(NET, machine=machine, cpu_capability=capability))
    assert summary.file_name(content) == name


def test_a_new_file_replaces_the_old_one_of_the_same_processor(tmp_path: Path) -> None:
    other = summary.write(shown.of_run(raw(NET, cpu_capability="avx2")), tmp_path)
    first = summary.write(shown.of_run(raw(NET)), tmp_path)
    later = raw(NET)
    later["runs"] = {"net": {**later["runs"]["net"], "date": "2026-12-01T00:00:00+00:00"}}
    second = summary.write(shown.of_run(later), tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([other, second])
    assert first != second


def test_what_a_later_run_leaves_out_is_kept(tmp_path: Path) -> None:
    """Workloads that were measured by themselves replace those, unless torch is another."""
    layers = {("conv1", "forward", 1, 1): {"fused": 3.0, "eager": 9.0}}
    memory = [{"case": "net", "mode": "training", "batch": 4, "threads": 1, "provider": "fused", "median_bytes": 5}]
    summary.write(shown.of_run(raw({**NET, **layers}, memory=memory)), tmp_path)
    later = raw({("net", "forward", 1, 1): {"fused": 10.0, "eager": 300.0}})
    later["runs"]["net"] = {**later["runs"]["net"], "date": "2026-12-01T00:00:00+00:00", "commit": "f" * 40}
    for row in later["rows"]:
        row["commit"] = "f" * 40
    content = read_back(shown.of_run(later), tmp_path)
    found = {
        (place, name): row["median_us"] for place, by in shown.workloads(content).items() for name, row in by.items()
    }
    one, two, layer = ("net", "forward", 1, 1), ("net", "forward", 1, 2), ("conv1", "forward", 1, 1)
    assert {name: us for (place, name), us in found.items() if place == one} == {"fused": 10.0, "eager": 300.0}
    assert {name: us for (place, name), us in found.items() if place == two} == NET[two]
    assert {name: us for (place, name), us in found.items() if place == layer} == {"fused": 3.0, "eager": 9.0}
    assert content["runs"]["net"]["commits"] == [COMMIT, "f" * 40]
    dates = {group: run["date"][:10] for group, run in content["runs"].items()}
    assert dates == {"net": "2026-12-01", "layers": "2026-11-24"}
    assert content["memory"] == memory
    alone = read_back(shown.of_run(raw(NET, versions={"torch": "2.14.0"})), tmp_path)
    assert {row["case"] for row in alone["rows"]} == {"net"}
    assert "memory" not in alone


def test_a_run_on_a_gpu_is_not_taken_for_its_processor() -> None:
    machine = {"cpu": "AMD EPYC", "gpu": "NVIDIA H100 80GB HBM3", "processors": 2}
    with pytest.raises(ValueError, match=r"gpu_check\.py measures those"):
        shown.of_run(raw(NET, machine=machine))


def test_a_raw_run_is_no_small_file(tmp_path: Path) -> None:
    (tmp_path / "raw.json").write_text(json.dumps(raw(NET)))
    with pytest.raises(ValueError, match=r"raw\.json is no summary; summary\.py makes one"):
        summary.read(tmp_path / "raw.json")


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tables_of_a_markdown_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = summary.write(shown.of_run(raw(NET)), tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:net -->\nstale\n<!-- /bench -->\nafter\n")

    def run(option: str) -> int:
        monkeypatch.setattr(sys, "argv", ["to_markdown", str(path), option, str(readme)])
        return to_markdown.main()

    assert run("--check") == 1
    assert "README.md is out of date" in capsys.readouterr().err
    assert run("--update") == 0
    assert run("--check") == 0
    written = readme.read_text()
    assert written.startswith("before\n<!-- bench:net -->\n")
    assert written.endswith("<!-- /bench -->\nafter\n")
    assert "stale" not in written
    assert "| LeNet | forward | 20.0 (12.0x, 1.50x, 50%)<br>18.0 (10.0x, 1.50x, 50%) |" in written
    assert "commit 0123456789, 2026-11-24." in written
    for name in ("memory", "nonsense"):
        readme.write_text(f"<!-- bench:{name} -->\n<!-- /bench -->")
        with pytest.raises(SystemExit):
            run("--update")
        assert f"no results for the table '{name}', found headline, net, peers, targets" in capsys.readouterr().err


def test_the_headline_has_columns_for_each_processor() -> None:
    faster = {place: {**times, "fused": times["fused"] / 2} for place, times in NET.items()}
    measured = {"avx512": NET, "avx2": faster}
    contents = [shown.of_run(raw(times, cpu_capability=name)) for name, times in measured.items()]
    title, _, head, _, *rows = tables.render("headline", contents).splitlines()
    assert "AMD EPYC, avx512, torch 2.13.0+cpu, 2 processors" in title
    assert head.count("us per image") == 2
    assert len(rows) == len(tables.HEADLINE) <= 10
    expected = ["20.0 / 18.0", "12.0x / 10.0x", "1.50x / 1.50x", "10.0 / 9.00", "24.0x / 20.0x", "3.00x / 3.00x"]
    assert rows[0] == f"| forward, batch 1 | {' | '.join(expected)} |"
    assert rows[1] == f"| forward, batch 64 | {' | '.join(['- / -'] * 6)} |"


def test_every_machine_has_its_own_table() -> None:
    contents = [shown.of_run(raw(NET, cpu_capability=name)) for name in ("avx512", "avx2")]
    made = tables.render("peers", contents)
    assert [made.count(f"AMD EPYC, {name},") for name in ("avx512", "avx2")] == [1, 1]
    assert made.count("| forward | ONNX Runtime | 30.0 / 27.0 |") == 2


def test_targets_take_the_worst_cell() -> None:
    times = {256: (10.0, 200.0, 120.0), 1024: (50.0, 300.0, 400.0), 4096: (10.0, 90.0, 99.0)}
    medians = {
        ("net", "forward", batch, 1): dict(zip(("fused", "eager", "channels_last"), us, strict=True))
        for batch, us in times.items()
    }
    content = raw(medians)
    for row in content["rows"]:
        row["peak_share"] = row["median_us"] / 100
    outcomes = {outcome.what: outcome for outcome in targets.outcomes(shown.of_run(content))}
    over_eager = outcomes["inference, batch 256 to 4096: over stock eager"]
    assert over_eager.measured == 6.0
    assert over_eager.where == "net, batch 1024, 1 thread, against eager"
    assert over_eager.verdict == "missed"
    assert outcomes["inference, batch 256 to 4096: share of peak"].measured == 0.1
    assert outcomes["inference, batch 8: over stock eager"].verdict == "not measured"
    with (console := Console(width=180)).capture() as printed:
        targets.print_targets(shown.of_run(content), console)
    (line,) = [line for line in printed.get().splitlines() if over_eager.what in line]
    assert "6.00x" in line
    assert "missed" in line
    assert "batch 8" not in printed.get()


# As the bench of an AVX2 processor would be, on one that has AVX-512.
FORCED = {
    "cpu": "AMD EPYC",
    "processors": 2,
    "instruction_sets": ["fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"],
    "forced": {
        "LENET_EXT_CPU_CAPABILITY": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}


def test_the_instruction_set_of_a_run_chooses_its_targets() -> None:
    medians = {("net", "training", 256, 1): {"fused": 10.0, "eager": 45.0, "channels_last": 60.0}}
    medians["conv2", "forward", 64, 1] = {"fused": 10.0, "eager": 12.0}
    content = shown.of_run(raw(medians))
    found = {}
    for name in ("avx512", "avx2"):
        content["cpu_capability"] = name
        found[name] = {outcome.what: outcome for outcome in targets.outcomes(content)}
    training = "forward + backward, batch 256 to 4096: over stock eager and torch.compile"
    assert [found[name][training].goal for name in found] == [targets.Goal(5.5, 7), targets.Goal(4, 5)]
    assert [found[name][training].verdict for name in found] == ["missed", "met"]
    # What AVX2 has no target of its own for is one of the other layers.
    assert found["avx512"]["6->16 k5: forward"].verdict == "missed"
    assert found["avx512"]["every other layer and size: forward"].measured is None
    assert "6->16 k5: forward" not in found["avx2"]
    assert found["avx2"]["every other layer and size: forward"].cells()[1:] == [
        "0.97x",
        "-",
        "1.20x",
        "conv2, batch 64, 1 thread, against eager",
        "met",
    ]


def test_the_baseline_and_a_run_that_is_forced_in_part_have_no_targets() -> None:
    alone = {**FORCED, "forced": {"LENET_EXT_CPU_CAPABILITY": "avx2"}}
    for content, why in (
        (raw(NET, cpu_capability="default"), "the baseline set is there so that the package runs"),
        (raw(NET, machine=alone, cpu_capability="avx2"), "ours and stock were held to different instruction sets"),
    ):
        small = shown.of_run(content)
        assert targets.outcomes(small) == []
        made = tables.render("targets", [small])
        assert why in made
        assert "|" not in made
    assert "AMD EPYC, avx2, with LENET_EXT_CPU_CAPABILITY=avx2, torch" in tables.render("net", [small])


def test_a_forced_run_beside_one_of_the_processor(tmp_path: Path) -> None:
    """Another file, the targets of the set, and the set in the title of each table; a picture is of the processor."""
    machine = {key: value for key, value in FORCED.items() if key != "forced"}
    own = summary.write(shown.of_run(raw(NET, machine=machine)), tmp_path)
    later = raw(NET, machine=FORCED, cpu_capability="avx2")
    later["runs"] = {"net": {**later["runs"]["net"], "date": "2026-11-29T00:00:00+00:00"}}
    forced = summary.write(shown.of_run(later), tmp_path)
    assert own.name == "cpu-amd-epyc-avx512-2026-11-24.json"
    assert forced.name == "cpu-amd-epyc-avx2-forced-2026-11-29.json"
    contents = [summary.read(path) for path in (forced, own)]
    titles = ["AVX2 forced on an AMD EPYC with AVX-512, torch 2.13.0+cpu", "AMD EPYC, avx512, torch 2.13.0+cpu"]
    for name in ("net", "peers", "targets"):
        made = tables.render(name, contents)
        assert [made.count(title) for title in titles] == [1, 1]
    targets_of_both = tables.render("targets", contents)
    assert [targets_of_both.count(text) for text in ("| 4.00x | 5.00x |", "| 5.50x | 7.00x |")] == [1, 2]
    one, both = (tables.render("headline", some).splitlines() for some in (contents[1:], contents))
    assert len(one) == len(both)
    assert "| AVX2 forced on an AMD EPYC with AVX-512: us per image | over stock" in both[2]


def test_everybody_has_to_be_held_to_the_same() -> None:
    def used(capability: str, **changes: str) -> str | None:
        machine = {**FORCED, "forced": {**FORCED["forced"], **changes}}
        return instruction_set({"machine": machine, "cpu_capability": capability})

    assert used("avx2") == "avx2"
    assert used("avx2", ONEDNN_MAX_CPU_ISA="AVX2_VNNI") == "avx2"
    assert used("avx2", MKL_ENABLE_INSTRUCTIONS="AVX2") == "avx2"
    assert used("avx2", MKL_ENABLE_INSTRUCTIONS="SSE4_2") is None
    assert used("avx2", ONEDNN_MAX_CPU_ISA="DEFAULT") is None
    assert used("avx2", ATEN_CPU_CAPABILITY="default") is None
    assert used("avx512", **dict.fromkeys(FORCED["forced"], "avx512_core")) == "avx512"
    assert used("default", LENET_EXT_CPU_CAPABILITY="default", ATEN_CPU_CAPABILITY="default") is None


def test_a_picture_is_of_the_newest_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(to_markdown, "plot_results", lambda content, *_: drawn.append(content["cpu_capability"]))
    monkeypatch.setattr(to_markdown, "shrink", lambda path: None)
    contents = [shown.of_run(raw(NET, cpu_capability=name)) for name in ("avx512", "avx2")]
    contents[1]["runs"]["net"]["date"] = "2026-12-01T00:00:00+00:00"
    to_markdown.plot_newest(contents, tmp_path / "net.png")
    assert drawn == ["avx2"]
    contents[1]["machine"] = FORCED
    to_markdown.plot_newest(contents, tmp_path / "net.png")
    assert drawn == ["avx2", "avx512"]
    with pytest.raises(ValueError, match="no processor has results of the whole net"):
        to_markdown.plot_newest([], tmp_path / "net.png")


# --- a GPU ------------------------------------------------------------------------------------------------------------


def gpu_report() -> dict[str, Any]:
    def row(case: str, **medians: float) -> dict[str, Any]:
        us = {name.replace("_", " "): {"median": m, "p10": 0.9 * m, "p90": 1.1 * m} for name, m in medians.items()}
        return {"case": case, "precision": "tf32", "us": us}

    net = [row("forward batch 64", ours_graph=10.0, ours_eager=20.0, stock_graph=40.0)]
    net += [row("step batch 64", ours_graph=70.0, stock_graph=140.0)]
    layers = [row("conv1 forward + backward batch 64", ours_graph=5.0, stock_graph=4.0)]
    steps = {
        "driver": {"status": "ok", "tail": "some\n1003 passed, 0 failed\n"},
        "tests": {"status": "failed", "tail": "==== 3 failed, 1600 passed in 57.0s ====\n"},
        "net tf32": {"status": "ok", "result": net},
        "layers tf32": {"status": "ok", "result": layers},
        "sweep": {"status": "ok", "result": [row("3 channels at 8 batch 1 forward", ours_graph=1.0)]},
        "mnist": {
            "status": "ok",
            "result": [{"model": "ours", "seed": 0, "epochs": 5, "seconds": 0.25, "accuracy": 0.991, "reached": True}],
        },
        "ncu": {"status": "skipped"},
        "kernelbench": {"status": "ok", "result": [row("kernelbench", fused=100.0, compile=700.0)]},
    }
    environment = {
        "torch": "2.11.0+cu130",
        "cuda": "13.0",
        "cudnn": 91900,
        "python": "3.12.3",
        "nvidia_smi": "name, driver_version\nNVIDIA H100 80GB HBM3, 580.159",
        "commit": COMMIT,
        "time": "2026-11-26T10:00:00Z",
    }
    return {"environment": environment, "steps": steps}


def test_the_small_file_of_a_gpu(tmp_path: Path) -> None:
    content = read_back(summary.of_gpu_check(gpu_report()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-h100-2026-11-26.json"]
    assert "| driver | ok | 1003 passed, 0 failed |" in tables.render("gpu_checks", [content])
    assert "| tests | failed | 3 failed, 1600 passed in 57.0s |" in tables.render("gpu_checks", [content])
    whole = tables.render("gpu_net", [content])
    assert "| TF32 | forward | 10.0 (4.00x) |" in whole
    assert "| TF32 | forward, eager | 20.0 |" in whole
    assert "| TF32 | training step | 70.0 (2.00x) |" in whole
    assert "| TF32 | conv1 | forward + backward | 5.00 (0.80x) |" in tables.render("gpu_layers", [content])
    assert "| ours | 1 | 50.0 | 5 |" in tables.render("gpu_mnist", [content])
    assert tables.render("gpu_ceilings", [content]) is None  # not measured
    assert tables.render("headline", [content]) is None
    assert content["kernelbench"][0]["us"]["fused"]["median"] == 100
    assert "ncu" not in content


# --- this repository's ------------------------------------------------------------------------------------------------

shipped = pytest.mark.skipif(not RESULTS.is_dir(), reason="a source distribution comes without results")


@shipped
@pytest.mark.parametrize("name", ["README.md", "benchmarks/results/README.md"])
def test_the_tables_of_the_repository_are_of_the_results(name: str) -> None:
    contents = [summary.read(path) for path in sorted(RESULTS.glob("*.json"))]
    text = (ROOT / name).read_text()
    assert "<!-- bench:" in text
    assert to_markdown.updated(text, contents) == text, f"make tables brings {name} up to date"


@shipped
def test_the_results_of_the_repository_are_small() -> None:
    paths = sorted(RESULTS.glob("*.json"))
    assert {path.name: summary.file_name(summary.read(path)) for path in paths} == {
        path.name: path.name for path in paths
    }
    assert all(path.stat().st_size < 150_000 for path in paths)
    assert (RESULTS / "net.png").stat().st_size < 200_000
