"""Files that are damaged, shrink, lie on a failing disk, are folders, or have names that are no text: one line each."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import subprocess
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from archives import idx_bytes
from PIL import Image
from programs import lines_of
from safetensors.torch import save

import lenet_ext
from lenet_ext.cli import main
from lenet_ext.cli.common import error_line
from lenet_ext.pretrained.files import load_weights
from lenet_ext.training.checkpoint import load_checkpoint, save_checkpoint
from lenet_ext.training.idx import read_idx
from lenet_ext.training.predict import load_ink, load_photo


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def picture() -> Image.Image:
    image = Image.new("L", (40, 40), 255)
    image.paste(0, (10, 10, 14, 30))
    return image


def one_line(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.rstrip("\n").isprintable(), stderr
    return stderr.rstrip("\n")


# --- damaged ----------------------------------------------------------------------------------------------------------


def as_picture(form: str, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    picture().convert(mode).save(buffer, form)
    return buffer.getvalue()


def as_checkpoint(**how: bool) -> bytes:
    buffer = io.BytesIO()
    state = {"model": {"weight": torch.ones(2, 3)}, "rng": torch.get_rng_state(), "history": [{"loss": 1.0}]}
    torch.save(state, buffer, **how)
    return buffer.getvalue()


WHOLE: dict[str, tuple[Callable[[], bytes], tuple[Callable[[Path], object], ...]]] = {
    "checkpoint": (as_checkpoint, (load_weights, load_checkpoint)),
    "checkpoint in the old form": (
        lambda: as_checkpoint(_use_new_zipfile_serialization=False),
        (load_weights, load_checkpoint),
    ),
    "safetensors": (lambda: save({"weight": torch.ones(2, 3)}, {"lenet_ext": "{}"}), (load_weights, load_checkpoint)),
    "IDX": (lambda: idx_bytes(torch.ones(2, 3, dtype=torch.uint8)), (read_idx,)),
    "gzipped IDX": (lambda: gzip.compress(idx_bytes(torch.ones(2, 3, dtype=torch.uint8))), (read_idx,)),
    "BMP": (lambda: as_picture("BMP"), (load_ink, load_photo)),
    "GIF": (lambda: as_picture("GIF"), (load_ink, load_photo)),
    "JPEG": (lambda: as_picture("JPEG"), (load_ink, load_photo)),
    "PNG": (lambda: as_picture("PNG", "RGBA"), (load_ink, load_photo)),
    "PPM": (lambda: as_picture("PPM", "RGB"), (load_ink, load_photo)),
    "TGA": (lambda: as_picture("TGA"), (load_ink, load_photo)),
    "TIFF": (lambda: as_picture("TIFF"), (load_ink, load_photo)),
    "WebP": (lambda: as_picture("WEBP", "RGB"), (load_ink, load_photo)),
}


def damaged(whole: bytes, chance: random.Random) -> bytes:
    content = bytearray(whole)
    for _ in range(chance.choice([1, 1, 2, 5])):
        # More often near the begin, where the headers are.
        place = min(int(chance.expovariate(1 / 200)), len(content) - 1)
        match chance.randrange(5):
            case 0:
                del content[place : place + chance.randrange(1, 50)]
            case 1:
                content[place:place] = chance.randbytes(chance.randrange(1, 9))
            case 2:
                del content[chance.randrange(1, len(content) + 1) :]
            case _:
                content[place] = chance.randrange(256)
        content = content or bytearray(b"?")
    return bytes(content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("times", [60, pytest.param(1000, marks=pytest.mark.extended)])
@pytest.mark.parametrize("kind", WHOLE)
def test_whatever_the_damage_the_error_is_one_line_with_the_name(tmp_path: Path, kind: str, times: int) -> None:
    make, readers = WHOLE[kind]
    whole, chance, path = make(), random.Random(0), tmp_path / "file"
    failures = 0
    for _ in range(times):
        path.write_bytes(damaged(whole, chance))
        for read in readers:
            try:
                read(path)
            except (OSError, ValueError) as error:
                failures += 1
                line = error_line(error)
                assert line.startswith(f"{path}: "), line
                assert line.isprintable()
                assert not any(advice in line for advice in ("weights_only", "torch.load", "allow", "trust")), line
    assert failures > times / 10


def test_a_compressed_checkpoint_is_not_uncompressed(tmp_path: Path) -> None:
    """Of 64 MB in 64 kB: torch.load would make room for what the archive states."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(64 << 20))
        archive.writestr("bomb/version", "3\n")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"bomb\.pt: not a checkpoint \(it is compressed\)"):
            load_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [8 << 20, 64 << 20])
def test_reading_takes_no_more_than_twice_what_the_header_states(tmp_path: Path, content: int) -> None:
    stated = 8 << 20
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, stated) + bytes(content), 1))
    tracemalloc.start()
    try:
        if content == stated:
            assert len(read_idx(path)) == stated
        else:
            with pytest.raises(ValueError, match=f"found {stated + 1} or more"):
                read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * stated
    finally:
        tracemalloc.stop()


def test_a_picture_that_is_large_is_read_without_a_word(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Pillow warns of pictures of half the size that it refuses."""
    picture().save(tmp_path / "7.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 - 1)
    assert load_ink(tmp_path / "7.png").shape == (40, 40)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 // 2 - 1)
    assert "7.png: the picture is too large" in one_line(capsys, "predict", tmp_path / "7.png")


# --- changed, failing, missing ----------------------------------------------------------------------------------------

SHRINKING = """
import json, os
import PIL.ImageOps
import lenet_ext
from lenet_ext.pretrained import files
from lenet_ext.training.predict import load_ink

# While the first bytes are being looked at, another program cuts the file off.
def after_the_begin(module, name):
    whole = getattr(module, name)
    def cutting(*arguments, **options):
        os.truncate(path, 100)
        return whole(*arguments, **options)
    setattr(module, name, cutting)

path = "w.safetensors"
lenet_ext.Net().save_pretrained(".")
os.rename("model.safetensors", path)
after_the_begin(files.json, "loads")
print(len(files.load_weights(path).state))

path = "picture.bmp"
PIL.Image.effect_noise((500, 500), 100).save(path)
after_the_begin(PIL.ImageOps, "exif_transpose")
try:
    load_ink(path)
except ValueError as error:
    print(error)
"""


def test_a_file_that_shrinks_while_it_is_read_does_not_end_the_process(tmp_path: Path) -> None:
    """Mapped into memory, what is no longer there would raise a signal, and nobody could say a word."""
    whole, cut = lines_of(f"import os\nos.chdir({str(tmp_path)!r})\n{SHRINKING}")
    assert whole == "10"
    assert cut.startswith("picture.bmp: damaged picture (")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="there is no file here that cannot be read")
def test_a_disk_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/proc/self/mem opens as a file, and fails when it is read where no memory is."""
    broken = tmp_path / "broken"
    for name in ("w.pt", "7.png", "net/model.safetensors", "data/train-images-idx3-ubyte"):
        (broken / name).parent.mkdir(parents=True, exist_ok=True)
        (broken / name).symlink_to("/proc/self/mem")
    save_checkpoint(broken / "good.pt", {"model": dict(lenet_ext.Net().state_dict())})
    for arguments, name in (
        (("eval", broken / "w.pt"), "w.pt"),
        (("train", "--resume", broken / "w.pt"), "w.pt"),
        (("predict", broken / "7.png"), "7.png"),
        (("export", broken / "net", "--format", "onnx", "--out", tmp_path / "o"), "net/model.safetensors"),
        (("train", "--data", "mnist", "--root", broken / "data"), "data/train-images-idx3-ubyte"),
    ):
        if "train" in arguments:
            arguments = (*arguments, "--out", tmp_path / "out")
        line = one_line(capsys, *arguments)
        assert line.endswith(f"error: {broken / name}: Input/output error")


def test_a_read_only_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro,size=100k", "tmpfs", str(folder)], check=False, timeout=20
        )
    except OSError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip("only root can mount")
    try:
        picture().save(tmp_path / "7.png")
        for arguments, name in (
            (("train", "--epochs", 0, "--out", folder), folder / "checkpoint.pt"),
            (("train", "--epochs", 0, "--out", folder / "run"), folder / "run"),
            (("export", "mnist", "--format", "safetensors", "--out", folder / "w"), folder / "w"),
            (("predict", tmp_path / "7.png", "--multiple", "--save", folder / "s.png"), folder / "s.png"),
        ):
            assert one_line(capsys, *arguments).endswith(f"error: {name}: Read-only file system")
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)


def test_a_folder_where_a_file_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    for name in ("checkpoint.pt", "net/model.safetensors", "described/config.json", "s.png"):
        (folder / name).mkdir(parents=True)
    (folder / "described/model.safetensors").write_bytes(save(lenet_ext.Net().state_dict()))
    picture().save(tmp_path / "7.png")
    for arguments, name in (
        (("train", "--resume", folder), folder),
        (("train", "--epochs", 0, "--out", folder), folder / "checkpoint.pt"),
        (("eval", folder / "net"), folder / "net/model.safetensors"),
        (("eval", folder / "described"), folder / "described/config.json"),
        (("export", "mnist", "--format", "safetensors", "--out", folder), folder),
        (("predict", tmp_path / "7.png", "--multiple", "--save", folder / "s.png"), folder / "s.png"),
    ):
        assert one_line(capsys, *arguments).endswith(f"error: {name}: Is a directory")


@pytest.mark.skipif(os.name == "nt", reason="names are not bytes there")
def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed of them is not the name, but all is read and written."""
    run = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"r\xff"))
    weights, saved = os.path.join(run, "model.safetensors"), os.path.join(run, "checkpoint.pt")
    for arguments in (
        ("train", "--epochs", "1", "--threads", "1", "--batch-size", "400", "--out", run, "--log", f"{run}-log"),
        ("train", "--epochs", "1", "--threads", "1", "--resume", saved),
        ("eval", weights),
        ("eval", saved),
        ("export", weights, "--format", "safetensors", "--out", os.path.join(run, "w")),
    ):
        assert main(arguments) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    printed = f"{tmp_path}/r\\udcff"
    assert any(line.startswith("wrote model.safetensors, checkpoint.pt, ") and line.endswith(printed) for line in lines)
    assert f"resumed {printed}/checkpoint.pt after epoch 1" in lines
    assert {"checkpoint.pt", "curves.png", "history.json", "model.safetensors", "w"} <= set(os.listdir(run))
    assert os.path.exists(f"{run}-log/metrics.csv")
