"""The command line on data sets with other classes and channels than digits have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from archives import emnist_content, write_cifar10, write_emnist_zip
from PIL import Image, ImageDraw

from lenet_ext.cli import main
from lenet_ext.training import plots, predict


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_emnist_zip(tmp_path / "gzip.zip", emnist_content("letters", 26, 1))
    write_cifar10(tmp_path, "python")
    return tmp_path


def letter(path: Path) -> Path:
    """An L, dark on light."""
    picture = Image.new("L", (80, 120), 230)
    ImageDraw.Draw(picture).line([(20, 15), (20, 100), (60, 100)], fill=20, width=8)
    picture.save(path)
    return path


def photo(path: Path, size: tuple[int, int] = (200, 100)) -> Path:
    Image.new("RGB", size, (200, 30, 60)).save(path)
    return path


@pytest.mark.parametrize(
    ("data", "labels", "kind"), [("emnist-letters", ("A", "Z"), "class"), ("cifar10", ("airplane", "truck"), "class")]
)
def test_from_training_to_prediction(
    root: Path, data: str, labels: tuple[str, str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = root / "run"
    given = ["--root", str(root), "--threads", "1", "--device", "cpu"]
    assert main(["train", "--data", data, *given, "--epochs", "1", "--out", str(out)]) == 0
    assert "pictures to train" in capsys.readouterr().out
    assert json.loads((out / "history.json").read_text())["config"]["data"] == data
    for name in ("model.safetensors", "checkpoint.pt"):
        assert main(["eval", str(out / name), "--root", str(root), "--threads", "1"]) == 0
        table = capsys.readouterr().out
        assert all(re.search(rf"\W{word}\W", table) for word in (*labels, kind)), table
    pictures = [str(letter(root / "letter.png")), str(photo(root / "photo.png"))][data == "cifar10" :][:1]
    assert main(["predict", str(out / "model.safetensors"), *pictures, "--threads", "1"]) == 0
    path, label, probability = capsys.readouterr().out.strip().split("\t")
    assert path == pictures[0]
    assert label.isupper() if data == "emnist-letters" else label.isalpha()
    assert 0 < float(probability) <= 1


def test_weights_of_another_number_of_classes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--root", str(root), "--threads", "1"]
    assert main(["train", "--data", "cifar10", *given, "--epochs", "0", "--out", str(root / "run")]) == 0
    capsys.readouterr()
    assert main(["eval", str(root / "run" / "model.safetensors"), "--data", "emnist-letters", *given]) == 1
    stderr = capsys.readouterr().err
    assert "model.safetensors: not the weights of this network" in stderr
    assert len(stderr.splitlines()) == 1


def test_photographs(tmp_path: Path) -> None:
    """The square in the middle, in colors; a picture of the right size comes unchanged; transparency is white."""
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste((200, 30, 60), (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    found = predict.load_picture(tmp_path / "wide.png", "cifar10")
    assert found.shape == (3, 32, 32)
    assert found.unique(dim=1).unique(dim=2).flatten().tolist() == [200, 30, 60]
    pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "small.png")
    assert torch.equal(predict.load_picture(tmp_path / "small.png", "cifar10"), pixels.permute(2, 0, 1))
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(tmp_path / "nothing.png")
    assert predict.load_picture(tmp_path / "nothing.png", "cifar10").min() == 255
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png: not a picture in a known format"):
        predict.load_picture(tmp_path / "text.png", "cifar10")


@pytest.mark.parametrize(("data", "side"), [("emnist-letters", 24), ("emnist-balanced", 24), ("fashion-mnist", 28)])
def test_letters_and_garments_lie_in_the_middle(tmp_path: Path, data: str, side: int) -> None:
    framed = predict.load_picture(letter(tmp_path / "letter.png"), data)[0]
    rows, columns = ((framed > 60).any(1 - axis).nonzero().flatten() for axis in (0, 1))
    assert abs(int(rows[-1] - rows[0]) + 1 - side) <= 1
    for places in (rows, columns):
        assert abs(int(places[0] + places[-1]) - 31) <= 2


def test_a_picture_of_many_classes(tmp_path: Path) -> None:
    confusion = torch.eye(47, dtype=torch.int64) * 400
    plots.plot_confusion(tmp_path / "c.png", confusion, "title", [f"class {n}" for n in range(47)])
    with Image.open(tmp_path / "c.png") as image:
        assert min(image.size) > 1500
