"""Trained networks: the one in the package, and what save_pretrained writes."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

import lenet_ext
from lenet_ext import pretrained
from lenet_ext.environment.extras import MissingExtraError
from lenet_ext.training import datasets
from lenet_ext.training.evaluate import evaluate

SHARED_MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


# --- in the package ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED_MNIST.is_dir(), reason=f"no MNIST in {SHARED_MNIST}")
def test_the_network_in_the_package_is_as_good_as_its_card_says() -> None:
    net = lenet_ext.Net.from_pretrained("mnist")
    _, test = datasets.load("mnist", SHARED_MNIST)
    found = evaluate(net, test).accuracy
    assert found >= 0.992
    # Rounding on another processor may turn a picture or two of ten thousand.
    assert found == pytest.approx(net.config["test_accuracy"], abs=3e-4)
    card = (Path(pretrained.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert f"{100 * net.config['test_accuracy']:.2f}%" in card


def test_the_network_in_the_package() -> None:
    assert pretrained.built_in() == ["mnist"]
    before = torch.get_rng_state()
    net = lenet_ext.Net.from_pretrained("mnist")
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.training
    assert all(value.requires_grad and value.dtype == torch.float32 for value in net.parameters())
    assert net.config["data"] == "mnist"
    assert net.config["labels"] == list("0123456789")
    # The same constants that training used; nothing of the machine that it ran on.
    assert net.config["normalization"] == datasets.DATA_SETS["mnist"].to_dict()["normalization"]
    assert net.config["config"]["root"] is None
    # A stroke, as the data set would show it.
    image = torch.zeros(1, 1, 32, 32)
    image[..., 6:26, 15:17] = 1
    normalization = net.config["normalization"]
    with torch.inference_mode():
        scores = net((image - normalization["mean"]) / normalization["std"])
    assert scores.argmax() == 1


def test_the_configuration_beside_the_weights_is_that_in_them() -> None:
    folder = Path(pretrained.__file__).parent
    config = json.loads((folder / "mnist.json").read_text(encoding="utf-8"))
    assert pretrained.files.load_weights(folder / "mnist.safetensors").metadata == config
    assert lenet_ext.Net.from_pretrained(folder / "mnist.safetensors").config == config
    assert (config["in_channels"], config["num_classes"]) == (1, 10)
    assert (folder / "mnist.safetensors").stat().st_size < 300_000


def test_a_folder_of_the_same_name_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lenet_ext.Net(num_classes=3).save_pretrained("mnist")
    assert lenet_ext.Net.from_pretrained("mnist").fc3.out_features == 10
    for folder in ("./mnist", Path("mnist")):
        assert lenet_ext.Net.from_pretrained(folder).fc3.out_features == 3


# --- saved and loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 10), (3, 26)])
def test_what_was_saved_comes_back(tmp_path: Path, sizes: tuple[int, int]) -> None:
    net = lenet_ext.Net(*sizes)
    config = {"normalization": {"mean": [0.5], "std": [0.25]}, "note": "by hand"}
    net.save_pretrained(tmp_path / "new" / "folder", config=config)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    for place in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "model.safetensors"):
        again = lenet_ext.Net.from_pretrained(place)
        assert_same_weights(again, net)
        assert again.config == {**config, "in_channels": sizes[0], "num_classes": sizes[1]}
    # The sizes are those of the network, whatever is said.
    net.save_pretrained(tmp_path, config={"num_classes": 99})
    assert lenet_ext.Net.from_pretrained(tmp_path).config["num_classes"] == sizes[1]


def test_saving_keeps_what_is_still_true(tmp_path: Path) -> None:
    net = lenet_ext.Net.from_pretrained("mnist")
    net.save_pretrained(tmp_path)
    kept = lenet_ext.Net.from_pretrained(tmp_path).config
    assert kept == {
        name: net.config[name] for name in ("in_channels", "num_classes", "data", "labels", "normalization")
    }


def test_dtype_and_half_precision(tmp_path: Path) -> None:
    net = lenet_ext.Net.from_pretrained("mnist", dtype=torch.float64)
    assert {value.dtype for value in net.parameters()} == {torch.float64}
    half = {f"module.{name}": value.half() for name, value in net.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    torch.save({"state_dict": half}, tmp_path / "half.pt")
    for name in ("half.safetensors", "half.pt"):
        again = lenet_ext.Net.from_pretrained(tmp_path / name)
        assert {value.dtype for value in again.parameters()} == {torch.float32}
        torch.testing.assert_close(again.fc3.weight, net.fc3.weight.float(), rtol=1e-3, atol=1e-3)
        assert again.config == {}


def test_copies_and_what_else_people_do_with_a_network() -> None:
    net = lenet_ext.Net.from_pretrained("mnist")
    image = torch.randn(2, 1, 32, 32)
    expected = net(image)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.jit.script(net), net.to_reference()):
        torch.testing.assert_close(other(image), expected, rtol=1e-4, atol=1e-4)
    assert copy.deepcopy(net).config == net.config
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    lenet_ext.ReferenceNet().load_state_dict(torch.load(buffer), strict=True)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^minst: neither a file nor a folder, nor .* package \(mnist\)$"):
        lenet_ext.Net.from_pretrained("minst")
    for place in (tmp_path / "absent.pt", tmp_path, str(tmp_path / "absent")):
        with pytest.raises(FileNotFoundError) as caught:
            lenet_ext.Net.from_pretrained(place)
        assert str(place) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json: not a configuration (it is no JSON)"),
        ("[" * 100_000, "config.json: not a configuration (it is no JSON)"),
        ("[1]", "config.json: not a configuration (it holds a list)"),
        ('{"num_classes": 11}', "config.json: num_classes is said to be 11, and is 10 in the weights"),
        ('{"in_channels": "1"}', "config.json: in_channels is said to be '1', and is 1 in the weights"),
    ],
)
def test_a_wrong_configuration(tmp_path: Path, content: str, message: str) -> None:
    lenet_ext.Net().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path}/{message}')}$"):
        lenet_ext.Net.from_pretrained(tmp_path)


@pytest.mark.parametrize("state", [{"weight": (3,)}, {"conv1.weight": (6,), "fc3.weight": (1, 1)}, {}])
def test_weights_of_another_network(tmp_path: Path, state: dict[str, Any]) -> None:
    save_file({name: torch.zeros(shape) for name, shape in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: not the weights of this network"):
        lenet_ext.Net.from_pretrained(tmp_path / "w.safetensors")


def test_a_configuration_that_json_cannot_hold_leaves_the_old_files(tmp_path: Path) -> None:
    net = lenet_ext.Net()
    net.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    for value in (torch.ones(1), float("nan")):
        with pytest.raises((TypeError, ValueError), match="JSON"):
            lenet_ext.Net().save_pretrained(tmp_path, config={"mean": value})
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    message = r"^safetensors is needed for files of weights: pip install 'lenet_ext\[train\]'$"
    with pytest.raises(MissingExtraError, match=message):
        lenet_ext.Net.from_pretrained("mnist")
    with pytest.raises(MissingExtraError, match=message):
        lenet_ext.Net().save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "described",
    [
        {"labels": "0123456789"},
        {"labels": [1, 2]},
        {"labels": ["a", "\x1b[31m"]},
        {"normalization": 3},
        {"normalization": {"mean": 0.1}},
        {"normalization": {"mean": "x", "std": 1}},
        {"normalization": {"mean": 0.1, "std": 0}},
        {"normalization": {"mean": [0.1, 0.2], "std": [1]}},
        {"normalization": {"mean": [], "std": []}},
        {"normalization": {"mean": float("nan"), "std": 1}},
    ],
)
def test_a_description_of_a_data_set_that_is_none(described: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^(labels|normalization) must "):
        datasets.DATA_SETS["mnist"].changed_by(described)


def test_a_description_of_a_data_set() -> None:
    for data_set in datasets.DATA_SETS.values():
        assert data_set.changed_by(json.loads(json.dumps(data_set.to_dict()))) == data_set
        assert data_set.changed_by({}) == data_set
    changed = datasets.DATA_SETS["mnist"].changed_by({"labels": ["a", "b"], "normalization": {"mean": [0.5], "std": 2}})
    assert (changed.num_classes, changed.normalization) == (2, datasets.Normalization(0.5, 2.0))
