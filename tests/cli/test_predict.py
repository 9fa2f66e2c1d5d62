"""``lenet-ext predict`` with the network of the package: many files, folders, forms of output, doubts."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("numpy")

from PIL import Image, ImageDraw

import lenet_ext
from lenet_ext.cli import main
from lenet_ext.cli import predict as command

# Strokes on a field of 100 by 100, as a hand would draw them.
STROKES = {
    "1": [[(52, 12), (50, 88)]],
    "7": [[(25, 20), (75, 20), (45, 85)]],
    "4": [[(35, 15), (25, 55), (75, 55)], [(65, 15), (62, 90)]],
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(path: Path, digit: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (100, 100), 255)
    for points in STROKES[digit]:
        ImageDraw.Draw(image).line(points, fill=20, width=8, joint="curve")
    image.save(path)
    return str(path)


def noise(path: Path) -> str:
    """A picture that is no digit."""
    generator = torch.Generator().manual_seed(0)
    blots = torch.rand(1, 1, 5, 5, generator=generator)
    large = torch.nn.functional.interpolate(blots, size=80)[0, 0].mul(255).to(torch.uint8)
    Image.fromarray(large.numpy(), "L").save(path)
    return str(path)


def predict(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, list[str]]:
    capsys.readouterr()
    code = main(["predict", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def test_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {digit: draw(tmp_path / f"{digit}.png", digit) for digit in STROKES}
    code, out, errors = predict(capsys, *paths.values())
    assert (code, errors) == (0, [])
    for line, (digit, path) in zip(out.splitlines(), paths.items(), strict=True):
        name, found, probability = line.split("\t")
        assert (name, found) == (path, digit)
        assert 0.8 <= float(probability) <= 1
        assert len(probability) == len("0.1234")
    # One picture alone, and the network by its name, say the same.
    assert predict(capsys, paths["7"])[1] == out.splitlines()[1] + "\n"
    assert predict(capsys, "mnist", *paths.values())[1] == out


@pytest.mark.parametrize("kind", ["folder", "file", "file without an ending", "pickle", "pickle without an ending"])
def test_a_checkpoint_is_told_from_a_picture(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = lenet_ext.Net.from_pretrained("mnist")
    with torch.no_grad():  # so that its answers are its own
        net.fc3.bias += torch.tensor([0.0] * 8 + [1e3, 0.0])
    net.save_pretrained(tmp_path / "net")
    checkpoint = tmp_path / "net"
    if kind.startswith("file"):
        checkpoint = checkpoint / "model.safetensors"
    if kind == "file without an ending":
        checkpoint = checkpoint.rename(tmp_path / "w")
    if kind.startswith("pickle"):
        checkpoint = tmp_path / ("w.pt" if kind == "pickle" else "w")
        torch.save(net.half().state_dict(), checkpoint)
    options = ("--data", "mnist") if kind.startswith("pickle") else ()
    path = draw(tmp_path / "7.png", "7")
    assert predict(capsys, checkpoint, path, *options) == (0, f"{path}\t8\t1.0000\n", [])
    # Options may stand anywhere.
    assert predict(capsys, checkpoint, "--threads", 1, path, *options)[1] == f"{path}\t8\t1.0000\n"


def test_without_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Found out with the first picture, and said once: the others cannot be read either."""
    paths = [draw(tmp_path / f"{digit}.png", digit) for digit in STROKES]
    monkeypatch.setitem(sys.modules, "numpy", None)
    code, out, errors = predict(capsys, *paths)
    assert (code, out, len(errors)) == (1, "", 1)
    assert "numpy is needed for reading pictures: pip install 'lenet_ext[train]'" in errors[0]


def test_a_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "1.png", "1")
    (tmp_path / "folder").mkdir()

    def scandir(path: Any, scandir: Any = os.scandir) -> Any:
        if os.fspath(path).endswith("folder"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", scandir)
    code, out, errors = predict(capsys, tmp_path / "folder", tmp_path / "1.png")
    assert code == 1
    assert len(out.splitlines()) == 1, errors
    assert "folder: Permission denied" in errors[0]


def test_options_among_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, seven = draw(tmp_path / "1.png", "1"), draw(tmp_path / "7.png", "7")
    expected = predict(capsys, "--csv", one, seven)
    assert expected[0] == 0
    assert predict(capsys, one, "--csv", seven) == predict(capsys, one, seven, "--csv") == expected
    with pytest.raises(SystemExit) as caught:
        main(["predict", one, "--absent", seven])
    assert caught.value.code == 2
    assert "--absent" in capsys.readouterr().err


def test_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    expected = [draw(folder / name, "1") for name in ("b.png", "c.JPG", "deep/er/a.png", "deep/z.bmp")]
    expected = [expected[0], expected[1], expected[3], expected[2]]
    for name in (".hidden.png", ".hidden/a.png"):
        draw(folder / name, "1")
    (folder / "notes.txt").write_text("no picture, and none that it was taken for")
    (folder / "bad.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    single = draw(tmp_path / "single.png", "7")
    code, out, errors = predict(capsys, folder, tmp_path / "empty", single, tmp_path / "absent")
    assert code == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [*expected, single]
    assert errors == [
        f"lenet-ext predict: error: {folder}/bad.png: not a picture in a known format",
        f"lenet-ext predict: error: {tmp_path}/empty: there are no pictures in this folder",
        f"lenet-ext predict: error: {tmp_path}/absent: No such file or directory",
    ]


def test_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(7):
        draw(tmp_path / f"{number}.png", list(STROKES)[number % 3])
    (tmp_path / "3.png").write_text("no picture")
    seen: list[int] = []
    forward = lenet_ext.Net.forward
    monkeypatch.setattr(lenet_ext.Net, "forward", lambda net, images: seen.append(len(images)) or forward(net, images))
    code, whole, errors = predict(capsys, tmp_path)
    assert (code, seen, len(errors)) == (1, [6], 1)
    monkeypatch.setattr(command, "_BATCH", 4)
    code, out, errors = predict(capsys, tmp_path)
    assert (code, seen, len(errors)) == (1, [6, 4, 2], 1)
    assert out == whole
    assert [line.split("\t")[0][-5] for line in out.splitlines()] == ["0", "1", "2", "4", "5", "6"]


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [draw(tmp_path / 'a "b".png', "7"), noise(tmp_path / "noise.png")]
    code, out, errors = predict(capsys, "--json", "--top", 3, *paths, tmp_path / "absent.png")
    assert code == 1
    assert len(errors) == 2
    seven, unsure = json.loads(out)
    assert [seven["path"], unsure["path"]] == paths
    assert (seven["label"], seven["sure"], unsure["sure"]) == ("7", True, False)
    for entry in (seven, unsure):
        probabilities = [place["probability"] for place in entry["top"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
        assert entry["top"][0] == {"label": entry["label"], "probability": entry["probability"]}
    assert predict(capsys, "--json", tmp_path / "absent.png")[1] == "[]\n"


def test_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = draw(tmp_path / 'a, "b".png', "7")
    code, out, _ = predict(capsys, "--csv", path)
    assert code == 0
    header, row = csv.reader(io.StringIO(out))
    assert header == ["path", "label", "probability"]
    assert row[:2] == [path, "7"]
    assert 0.8 < float(row[2]) <= 1
    header, row = csv.reader(io.StringIO(predict(capsys, "--csv", "--top", 2, path)[1]))
    assert header == ["path", "label", "probability", "label_2", "probability_2"]
    assert len(row) == 5
    # A table without rows.
    code, out, errors = predict(capsys, "--csv", "--top", 2, tmp_path / "absent.png")
    assert (code, out, len(errors)) == (1, ",".join(header) + "\n", 1)
    header, *rows = csv.reader(io.StringIO(predict(capsys, "--csv", "--multiple", tmp_path / "absent.png")[1]))
    assert (header, rows) == (["path", "label", "probability", "left", "top", "right", "bottom"], [])


def test_the_most_probable_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = draw(tmp_path / "7.png", "7")
    # More than there are is all of them.
    _, out, _ = predict(capsys, "--top", 99, path)
    fields = out.rstrip("\n").split("\t")
    assert fields[0] == path
    assert sorted(fields[1::2]) == list("0123456789")
    probabilities = [float(field) for field in fields[2::2]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-3)


def test_a_low_probability_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = noise(tmp_path / "noise.png")
    code, out, errors = predict(capsys, path)
    _, label, probability = out.rstrip("\n").split("\t")
    assert code == 0  # an answer, if a doubtful one
    assert float(probability) < 0.8
    doubt = f"{label} has a probability of only {float(probability):.2f}"
    assert errors == [f"lenet-ext predict: unsure: {path}: {doubt}"]


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are not bytes there")
def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "names"
    expected = draw(tmp_path / "1.png", "1")
    folder.mkdir()
    for name in (b"a\xff.png", b"b\x1b[31m\t.png", b"c\n.png"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(Path(expected).read_bytes())
    code, out, _ = predict(capsys, folder)
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == [
        f"{folder}/a?.png",
        f"{folder}/b?[31m?.png",
        f"{folder}/c?.png",
    ]
    found = json.loads(predict(capsys, folder, "--json")[1])
    assert os.fsencode(found[0]["path"]).endswith(b"a\xff.png")


def test_a_data_set_that_the_network_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = draw(tmp_path / "7.png", "7")
    assert predict(capsys, path, "--data", "mnist")[0] == 0
    code, out, errors = predict(capsys, path, "--data", "digits")
    assert (code, out, len(errors)) == (2, "", 1)
    assert "--data digits needs a CHECKPOINT that was trained on it" in errors[0]


@pytest.mark.parametrize("options", [("--json", "--csv"), ("--top", "0"), ("--top", "x")])
def test_bad_usage(options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["predict", draw(tmp_path / "1.png", "1"), *options])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_configuration_says_what_the_classes_are_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = lenet_ext.Net.from_pretrained("mnist")
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    net.save_pretrained(tmp_path / "net", config={**net.config, "labels": names})
    path = draw(tmp_path / "7.png", "7")
    assert predict(capsys, tmp_path / "net", path)[1].split("\t")[1] == "seven"
    net.save_pretrained(tmp_path / "net", config={**net.config, "labels": "0123456789"})
    assert predict(capsys, tmp_path / "net", path)[::2] == (
        1,
        [f"lenet-ext predict: error: {tmp_path}/net: labels must be a list of printable strings"],
    )
