"""Several digits in one picture: ``lenet-ext predict --multiple`` and ``--save``."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("numpy")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from PIL import Image, ImageDraw

import lenet_ext
from lenet_ext.cli import main
from lenet_ext.training.predict import load_page
from lenet_ext.training.segment import Box, find_digits, save_annotated

# Strokes on a field of 100 by 100, as a hand would draw them; the bar of the 5 lies apart.
STROKES = {
    "1": [[(52, 12), (50, 88)]],
    "4": [[(35, 15), (25, 55), (75, 55)], [(65, 15), (62, 90)]],
    "5": [[(32, 32), (30, 48), (55, 46), (68, 62), (58, 82), (28, 86)], [(34, 20), (70, 18)]],
    "7": [[(25, 20), (75, 20), (45, 85)]],
}
PLACES = [("1", 20, 20, 1.0), ("7", 150, 30, 1.2), ("5", 300, 0, 1.0), ("4", 420, 40, 1.0)]
PLACES += [("7", 40, 250, 1.0), ("5", 200, 240, 1.6), ("1", 500, 255, 1.0)]
EXPECTED = "1754751"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def page() -> Image.Image:
    """Two rows of digits, a line below them and a speck beside them."""
    image = Image.new("RGB", (900, 500), (240, 238, 220))
    canvas = ImageDraw.Draw(image)
    for digit, x, y, scale in PLACES:
        for stroke in STROKES[digit]:
            points = [(x + scale * a, y + scale * b) for a, b in stroke]
            canvas.line(points, fill=(20, 20, 90), width=round(8 * scale), joint="curve")
    canvas.line([(10, 480), (890, 480)], fill=(20, 20, 90), width=3)
    canvas.rectangle((700, 100, 703, 103), fill=(0, 0, 0))
    return image


def predict(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, list[str]]:
    capsys.readouterr()
    code = main(["predict", "--multiple", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


@pytest.mark.parametrize("how", ["png", "large jpeg", "turned", "small"])
def test_digits_and_their_places(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, path = page(), tmp_path / "page.png"
    scale = {"large jpeg": 6, "small": 0.6}.get(how, 1)
    image = image.resize((round(900 * scale), round(500 * scale)), Image.Resampling.BICUBIC)
    if how == "large jpeg":
        image.save(path := tmp_path / "page.jpg", quality=90)
    elif how == "turned":  # as a telephone stores it; places are those of the picture as it is shown
        exif = image.getexif()
        exif[0x0112] = 6
        image.rotate(90, expand=True).save(path, exif=exif)
    else:
        image.save(path)
    code, out, _ = predict(capsys, path)
    assert code == 0
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows] == [str(path)] * len(EXPECTED)
    assert "".join(row[1] for row in rows) == EXPECTED
    for row, (digit, x, y, size) in zip(rows, PLACES, strict=True):
        points = [(scale * (x + size * a), scale * (y + size * b)) for stroke in STROKES[digit] for a, b in stroke]
        width = 4 * size * scale + 4 * max(scale, 1)  # half a stroke, and what resizing blurs
        left, top, right, bottom = map(int, row[3].split(","))
        assert left == pytest.approx(min(a for a, _ in points), abs=width)
        assert top == pytest.approx(min(b for _, b in points), abs=width)
        assert right == pytest.approx(max(a for a, _ in points), abs=width)
        assert bottom == pytest.approx(max(b for _, b in points), abs=width)


def test_forms_of_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page().save(path := tmp_path / "page.png")
    places = [list(map(int, line.split("\t")[3].split(","))) for line in predict(capsys, path)[1].splitlines()]
    found = json.loads(predict(capsys, path, "--json")[1])
    assert "".join(entry["label"] for entry in found) == EXPECTED
    assert [list(entry["box"].values()) for entry in found] == places
    assert list(found[0]["box"]) == ["left", "top", "right", "bottom"]
    rows = list(csv.DictReader(io.StringIO(predict(capsys, path, "--csv", "--top", 2)[1])))
    assert "".join(row["label"] for row in rows) == EXPECTED
    assert [[int(row[edge]) for edge in ("left", "top", "right", "bottom")] for row in rows] == places
    assert all(float(row["probability"]) >= float(row["probability_2"]) for row in rows)


def test_the_annotated_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page().save(path := tmp_path / "page.png")
    before = path.read_bytes()
    code, out, _ = predict(capsys, path, "--save", tmp_path / "marked.jpg")
    assert code == 0
    assert len(out.splitlines()) == len(EXPECTED)
    with Image.open(tmp_path / "marked.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (900, 500))
    save_annotated(path, [(Box(300, 200, 350, 260), "3")], tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        difference = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(500, 900, 3).int()
    original = torch.frombuffer(bytearray(page().tobytes()), dtype=torch.uint8).view(500, 900, 3).int()
    rows, columns = (difference != original).any(2).nonzero().unbind(1)
    # Around the box and above it, and nowhere else; the box itself stays free.
    assert 160 <= rows.min() < 195 <= 260 <= rows.max() <= 270
    assert 290 <= columns.min() < 300 < 350 <= columns.max() <= 360
    assert not ((rows >= 200) & (rows < 260) & (columns >= 300) & (columns < 350)).any()
    assert path.read_bytes() == before


def test_a_picture_that_cannot_be_read_is_not_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.png").write_bytes(b"no picture")
    code, out, errors = predict(capsys, tmp_path / "page.png", "--save", tmp_path / "marked.png")
    assert (code, out) == (1, "")
    assert "not a picture in a known format" in errors[0]
    assert not (tmp_path / "marked.png").exists()


def test_what_cannot_be_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page().save(path := tmp_path / "page.png")
    for args, named in (
        ((path, path, "--save", tmp_path / "x.png"), "--save takes one picture"),
        ((tmp_path, "--save", tmp_path / "x.png"), "--save takes one picture"),
        ((path, "--save", tmp_path / "x.xyz"), "must end as one of a picture"),
        ((path, "--save", tmp_path / "x"), "must end as one of a picture"),
    ):
        code, out, errors = predict(capsys, *args)
        assert (code, out, len(errors)) == (2, "", 1)
        assert named in errors[0]
    assert main(["predict", str(path), "--save", str(tmp_path / "x.png")]) == 2
    assert "--save needs --multiple" in capsys.readouterr().err
    code, _, errors = predict(capsys, path, "--save", tmp_path / "page.png" / "x.png")
    assert code == 1
    assert len([line for line in errors if ": error: " in line]) == 1


def test_pictures_without_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (50, 50), 255).save(blank := tmp_path / "blank.png")
    line = Image.new("L", (200, 50), 255)
    ImageDraw.Draw(line).line([(10, 25), (190, 25)], fill=0, width=3)
    line.save(lined := tmp_path / "line.png")
    generator = torch.Generator().manual_seed(0)
    gravel = (torch.rand(400, 400, generator=generator) > 0.9).mul(255).to(torch.uint8)
    Image.fromarray(gravel.numpy()).save(stones := tmp_path / "gravel.png")
    page().save(good := tmp_path / "page.png")
    code, out, errors = predict(capsys, blank, lined, stones, good)
    assert code == 1
    assert len(out.splitlines()) == len(EXPECTED)
    errors = [text for text in errors if ": error: " in text]
    assert [text.partition(": error: ")[2].split(": ")[0] for text in errors] == [str(blank), str(lined), str(stones)]
    assert "blank" in errors[0]
    assert "no digits" in errors[1]
    assert "separate strokes" in errors[2]


def test_photographs_have_no_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lenet_ext.Net(3).save_pretrained(tmp_path / "net", config={"data": "cifar10"})
    page().save(path := tmp_path / "page.png")
    code, _, errors = predict(capsys, tmp_path / "net", path)
    assert code == 2
    assert "--multiple is for digits and letters" in errors[0]


def test_a_digit_alone_is_what_it_is_in_a_row() -> None:
    ink = torch.zeros(60, 120)
    ink[10:50, 20:24] = 0.5
    ink[12:52, 70:98] = 1  # 28 wide, and after cutting 40 high
    (first, one), (second, other) = find_digits(ink)
    assert first.edges == (20, 10, 24, 50)
    assert second.edges == (70, 12, 98, 52)
    assert torch.equal(one, torch.ones(40, 4))  # the strongest ink of each is 1
    assert torch.equal(other, torch.ones(40, 28))


def test_a_neighbor_that_leans_into_the_box_stays_out() -> None:
    ink = torch.zeros(60, 60)
    ink[10:50, 10:13] = ink[47:50, 10:40] = 1  # an L
    ink[5:40, 30:33] = 1  # a stroke over its foot
    found = {box.edges: digit for box, digit in find_digits(ink)}
    assert list(found) == [(10, 10, 40, 50), (30, 5, 33, 40)]
    assert found[10, 10, 40, 50].sum() == 40 * 3 + 3 * 27


def test_what_belongs_to_a_digit() -> None:
    ink = torch.zeros(100, 100)
    ink[10:60, 10:40] = 1
    ink[15:55, 15:35] = 0  # a ring ...
    ink[25:45, 22:28] = 1  # ... with a stroke within
    ink[70:95, 10:40] = 1  # and another digit below
    assert [box.edges for box, _ in find_digits(ink)] == [(10, 10, 40, 60), (10, 70, 40, 95)]


def test_a_page_keeps_what_a_single_digit_does_not_need(tmp_path: Path) -> None:
    page().resize((2700, 1500)).save(path := tmp_path / "page.png")
    ink, scale = load_page(path)
    assert tuple(ink.shape) == (1138, 2048)
    assert scale == pytest.approx(2700 / 2048)
