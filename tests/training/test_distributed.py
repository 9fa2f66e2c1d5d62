"""Training by several processes: the same run as by one, one of them writes, and it survives the death of another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from lenet_ext.cli import main
from lenet_ext.pretrained.files import load_weights
from lenet_ext.training import checkpoint
from lenet_ext.training.datasets import LabelledImages, Normalization
from lenet_ext.training.distributed import ALONE, join_processes

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")

SOME_DIGITS = """
    import torch
    from lenet_ext.training.datasets import LabelledImages, Normalization

    def some_digits(count):
        generator = torch.Generator().manual_seed(3)
        images = torch.randint(256, (count, 1, 32, 32), generator=generator, dtype=torch.uint8)
        return LabelledImages(images, torch.randint(10, (count,), generator=generator), Normalization(0.5, 0.3))
"""


def torchrun(*command: object, cwd: Path, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False
    )


# --- the shares of a batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("shuffled", "moves"), [(False, {}), (True, {"max_shift": 2}), (True, {"max_shift": 1, "max_turn": 10.0})]
)
def test_the_shares_are_the_batch(parts: int, shuffled: bool, moves: dict[str, float]) -> None:
    count, size = 23, 6  # the last batch has 5
    images = torch.randint(256, (count, 1, 32, 32), dtype=torch.uint8)
    data = LabelledImages(images, torch.arange(count), Normalization(0.5, 0.3))

    def batches(share: tuple[int, int]):
        options = {"generator": torch.Generator().manual_seed(5), **moves} if shuffled else {}
        return list(data.batches(size, share=share, **options))

    shares = [batches((which, parts)) for which in range(parts)]
    for whole, *pieces in zip(batches((0, 1)), *shares, strict=True):
        for number, tensor in enumerate(whole):
            assert torch.equal(torch.cat([piece[number] for piece in pieces]), tensor)
        lengths = [len(labels) for _, labels in pieces]
        assert max(lengths) - min(lengths) <= 1


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_processes("cpu") as processes:
        assert processes == ALONE
        assert processes.is_first


# --- the same run -----------------------------------------------------------------------------------------------------

RUN = (
    SOME_DIGITS
    + """
    import sys
    from lenet_ext.training.config import TrainConfig
    from lenet_ext.training.distributed import join_processes
    from lenet_ext.training.trainer import Trainer

    torch.set_default_dtype(torch.float64)
    out, model, optimizer, augment = sys.argv[1:]
    with join_processes("cpu") as processes:
        # 25 pictures in batches of 8: shares of 4, or of 3 and 2; the last batch has one picture, so a share is empty.
        config = TrainConfig.for_data(
            "digits", model, batch_size=8, device="cpu", optimizer=optimizer, lr=0.01, augment=augment == "True"
        )
        trainer = Trainer(config, some_digits(25), some_digits(11), processes)
        for _ in range(3):
            trainer.run_epoch()
        confusion = trainer.evaluate().confusion
        torch.save([trainer.model.state_dict(), trainer.history, confusion], f"{out}-{processes.rank}.pt")
"""
)


@pytest.mark.parametrize(
    ("model", "optimizer", "augment", "processes"),
    [("fused", "sgd", True, 2), pytest.param("fused", "adamw", False, 3, marks=pytest.mark.extended)],
)
def test_the_run_is_that_of_one_process(
    tmp_path: Path, model: str, optimizer: str, augment: bool, processes: int
) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))
    done = torchrun(script, tmp_path / "together", model, optimizer, augment, cwd=tmp_path, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = [sys.executable, str(script), str(tmp_path / "alone"), model, optimizer, str(augment)]
    subprocess.run(alone, cwd=tmp_path, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    expected, expected_history, expected_confusion = torch.load(tmp_path / "alone-0.pt")
    for rank in range(processes):
        weights, history, confusion = torch.load(tmp_path / f"together-{rank}.pt")
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, msg=name)
        assert torch.equal(confusion, expected_confusion)
        for line, other in zip(history, expected_history, strict=True):
            for key in ("epoch", "train_loss", "test_loss", "test_accuracy", "lr"):
                assert line[key] == pytest.approx(other[key], rel=1e-10), key


# The run above is in float64, layer by layer. In float32 the network is one operator, with one node in the graph.
ONE_OPERATOR = """
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from torch.profiler import profile
    from lenet_ext import Net
    from lenet_ext.training.distributed import join_processes

    with join_processes("cpu") as processes:
        torch.manual_seed(0)
        alone, images, factors = Net(), torch.randn(5, 1, 32, 32), torch.randn(5, 10)
        (alone(images) * factors).sum().backward()
        expected = {name: p.grad for name, p in alone.named_parameters()}
        # 3 images and 2; 5 and none.
        for share in ((slice(0, 3), slice(3, 5))[processes.rank], (slice(0, 5), slice(5, 5))[processes.rank]):
            for options in ("gradient_as_bucket_view", "static_graph", "find_unused_parameters"):
                for frozen in (False, True):
                    net = Net()
                    net.load_state_dict(alone.state_dict())
                    net.conv1.requires_grad_(not frozen)
                    parallel = DistributedDataParallel(net, **{options: True})
                    with profile() as record:
                        (parallel(images[share]) * factors[share]).sum().backward()
                    ran = {event.key for event in record.key_averages()}
                    # With a frozen layer, by layers: the whole network's backward pass would keep what nobody needs.
                    assert ("lenet_ext::linear_backward" if frozen else "lenet_ext::lenet_backward") in ran, ran
                    for name, p in net.named_parameters():
                        assert (p.grad is None) == (not p.requires_grad), name
                        if p.requires_grad:  # the mean over the processes
                            torch.testing.assert_close(p.grad * 2, expected[name], rtol=1e-4, atol=1e-4, msg=name)
        if processes.is_first:
            print("the same gradients")
"""


@pytest.mark.extended
def test_the_network_as_one_operator(tmp_path: Path) -> None:
    script = tmp_path / "one_operator.py"
    script.write_text(textwrap.dedent(ONE_OPERATOR))
    done = torchrun(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same gradients" in done.stdout


# --- the command line -------------------------------------------------------------------------------------------------

TRAIN = ["train", "--data", "digits", "--epochs", "3", "--batch-size", "256", "--device", "cpu"]
DYING = """
    import os, signal, sys
    from lenet_ext import cli
    from lenet_ext.training import trainer as train

    run_epoch = train.Trainer.run_epoch

    def dying(self, on_step=None):
        def step(number):
            if self.epoch == 1 and number == 3 and self.processes.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return run_epoch(self, step)

    train.Trainer.run_epoch = dying
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.extended
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_run_goes_on_after_a_process_was_killed(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script = tmp_path / "dying.py"
    script.write_text(textwrap.dedent(DYING))
    killed = torchrun(script, *TRAIN, "--out", "killed", cwd=tmp_path)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    # One process speaks and writes, and what it has written is whole.
    assert killed.stdout.count(" 1/3 ") == 1
    assert checkpoint.load_checkpoint(tmp_path / "killed" / "checkpoint.pt")["epoch"] == 1

    resumed = torchrun("-m", "lenet_ext", "train", "--resume", "killed/checkpoint.pt", "--device", "cpu", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stdout.count("after epoch 1") == 1
    assert resumed.stdout.count(" 3/3 ") == 1
    assert "processes: 2" in resumed.stdout
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        "model.safetensors",
        "checkpoint.pt",
        "history.json",
        "curves.png",
        "confusion.png",
        "misclassified.png",
        "filters.png",
    }

    through = torchrun("-m", "lenet_ext", *TRAIN, "--out", "through", cwd=tmp_path)
    assert through.returncode == 0, through.stderr[-3000:]
    one, other = (load_weights(tmp_path / name / "checkpoint.pt").state for name in ("killed", "through"))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("killed", "through")]
    assert [line["train_loss"] for line in histories[0]["epochs"]] == [
        line["train_loss"] for line in histories[1]["epochs"]
    ]


def test_a_wrong_command_line_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["bench", "--resume"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_half_an_environment_is_an_error_that_names_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As job schedulers leave it that set WORLD_SIZE and nothing else."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2.*LOCAL_RANK, MASTER_ADDR, MASTER_PORT.*torchrun"):
        join_processes("cpu").__enter__()


def test_as_many_gpus_as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in {**given, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="2 processes need as many GPUs, and this machine has 1"):
        join_processes("cuda").__enter__()


@pytest.mark.parametrize("changed", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "-1"}, {"RANK": "first"}])
def test_an_environment_without_numbers_is_one_line(
    changed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rank is asked for by what tells an error, too."""
    given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**given, **changed}.items():
        monkeypatch.setenv(name, value)
    (name, value), *_ = changed.items()
    assert main(["train", "--device", "cpu", "--epochs", "0", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"lenet-ext train: error: {name} must be a number from "), error
    assert repr(value) in error
    assert len(error.splitlines()) == 1


def test_a_failure_says_in_which_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rank without WORLD_SIZE is not torchrun's.
    for rank, size, who in (("0", "2", ""), ("1", "2", "process 1: "), ("1", "1", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        assert main(["eval", str(tmp_path / "absent.pt")]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"lenet-ext eval: error: {who}{tmp_path}"), error
        assert len(error.splitlines()) == 1
