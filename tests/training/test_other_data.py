"""CIFAR-10 and the relatives of MNIST, from small archives of the same form; nothing in an archive is trusted."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pooch")

from archives import (
    CIFAR10_BATCHES,
    CIFAR10_FOLDERS,
    cifar10_batch,
    cifar10_content,
    emnist_content,
    idx_bytes,
    write_cifar10,
    write_emnist_zip,
)

from lenet_ext.training import cifar10, datasets
from lenet_ext.training.config import RECIPES, TrainConfig
from lenet_ext.training.idx import read_idx
from lenet_ext.training.idx_sets import IDX_SETS
from lenet_ext.training.images import LabelledImages, Normalization
from lenet_ext.training.trainer import Trainer

# --- what is known without files --------------------------------------------------------------------------------------


def test_every_data_set_has_a_recipe_and_its_classes() -> None:
    assert list(RECIPES) == list(datasets.DATA_SETS)
    counts = {name: (data_set.num_classes, data_set.channels) for name, data_set in datasets.DATA_SETS.items()}
    assert counts == {
        "digits": (10, 1),
        "mnist": (10, 1),
        "fashion-mnist": (10, 1),
        "kmnist": (10, 1),
        "emnist-letters": (26, 1),
        "emnist-balanced": (47, 1),
        "cifar10": (10, 3),
    }
    balanced = datasets.DATA_SETS["emnist-balanced"].labels
    assert (balanced[0], balanced[10], balanced[35], balanced[36], balanced[46]) == ("0", "A", "Z", "a", "t")
    for name in RECIPES:
        assert TrainConfig.for_data(name).data == name


def test_the_rate_of_a_recipe_is_for_its_optimizer_and_schedule() -> None:
    assert TrainConfig.for_data("cifar10").lr == 0.02
    assert TrainConfig.for_data("cifar10", optimizer="adam").lr == TrainConfig.for_data("mnist", optimizer="adam").lr
    assert TrainConfig.for_data("cifar10", optimizer="adam", lr=0.5).lr == 0.5


# --- several channels -------------------------------------------------------------------------------------------------


def test_each_channel_has_its_own_normalization() -> None:
    normalization = Normalization((0.0, 0.5, 1.0), (1.0, 0.5, 0.25))
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = (images.double() / 255 - torch.tensor([0, 0.5, 1.0]).view(3, 1, 1)) / torch.tensor([1, 0.5, 0.25]).view(
        3, 1, 1
    )
    for found, wanted in ((normalization(images), expected), (normalization(images[1]), expected[1])):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_batches_of_colors_are_shifted_pictures() -> None:
    images = torch.randint(1, 256, (6, 3, 32, 32), dtype=torch.uint8)
    data = LabelledImages(images, torch.arange(6), Normalization((0.0,) * 3, (1 / 255,) * 3))
    padded = torch.nn.functional.pad(images.float(), (2,) * 4)
    for batch, labels in data.batches(4, generator=torch.Generator().manual_seed(0), max_shift=2):
        for image, label in zip(batch, labels, strict=True):
            places = (padded[int(label), :, y : y + 32, x : x + 32] for y in range(5) for x in range(5))
            assert sum(torch.allclose(image, place) for place in places) == 1


# --- the relatives of MNIST -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "folder"), [("fashion-mnist", "FashionMNIST/raw"), ("kmnist", ".")])
def test_sets_in_the_form_of_mnist(tmp_path: Path, name: str, folder: str) -> None:
    directory = tmp_path / folder
    directory.mkdir(parents=True, exist_ok=True)
    for stem in IDX_SETS[name].names:
        values = torch.full((3, 28, 28), 7) if "images" in stem else torch.tensor([0, 5, 9])
        (directory / f"{stem}.gz").write_bytes(gzip.compress(idx_bytes(values.to(torch.uint8))))
    train, test = datasets.load(name, tmp_path)
    assert train.labels.tolist() == test.labels.tolist() == [0, 5, 9]
    assert train.images.sum() == 3 * 28 * 28 * 7
    assert train.normalization == datasets.DATA_SETS[name].normalization


EMNIST = [("letters", 26, 1), ("balanced", 47, 0)]


@pytest.mark.parametrize(("split", "classes", "first"), EMNIST)
@pytest.mark.parametrize("form", ["zip", "files", "plain files"])
def test_emnist(tmp_path: Path, split: str, classes: int, first: int, form: str) -> None:
    content = emnist_content(split, classes, first)
    if form == "zip":
        write_emnist_zip(tmp_path / "gzip.zip", {"emnist-digits-train-images-idx3-ubyte.gz": b"?", **content})
    for name, value in content.items() if form != "zip" else ():
        plain = form == "plain files"
        path = tmp_path / ("EMNIST/raw" if plain else ".") / (name.removesuffix(".gz") if plain else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.decompress(value) if plain else value)
    train, test = datasets.load(f"emnist-{split}", tmp_path)
    assert train.labels.tolist() == list(range(classes))
    assert (test.num_classes, test.labels.tolist()) == (classes, [0])
    # The files are transposed: row 20, column 3 of the letter, within the border.
    assert train.images.nonzero()[:, 1:].tolist() == [[0, 22, 5]] * classes


@pytest.mark.parametrize("label", [0, 27])
def test_labels_outside_the_alphabet(tmp_path: Path, label: int) -> None:
    content = emnist_content("letters", 26, 1)
    labels = torch.full((26,), label, dtype=torch.uint8)
    content["emnist-letters-train-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(labels))
    write_emnist_zip(tmp_path / "gzip.zip", content)
    with pytest.raises(ValueError, match=f"train-labels-idx1-ubyte.gz: labels must be 1 to 26, found {label}"):
        datasets.load("emnist-letters", tmp_path)


@pytest.mark.parametrize("damage", ["not a zip", "member missing", "member damaged", "cut off"])
def test_damaged_emnist_archive(tmp_path: Path, damage: str) -> None:
    content = emnist_content("letters", 26, 1)
    name = "emnist-letters-train-images-idx3-ubyte.gz"
    if damage == "member missing":
        del content[name]
    if damage == "member damaged":
        content[name] = content[name][:40]
    write_emnist_zip(tmp_path / "gzip.zip", content)
    if damage in ("not a zip", "cut off"):
        whole = (tmp_path / "gzip.zip").read_bytes()
        (tmp_path / "gzip.zip").write_bytes(b"text" if damage == "not a zip" else whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"gzip\.zip") as caught:
        datasets.load("emnist-letters", tmp_path)
    assert "\n" not in str(caught.value)


def test_download_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By way of pooch, from a directory: an address of this machine that needs no server."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    write_emnist_zip(mirror / "gzip.zip", emnist_content("letters", 26, 1))
    served: list[str] = []

    def retrieve(url: str, known_hash: None, fname: str, path: Path) -> None:
        served.append(url)
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes((mirror / url.rpartition("/")[2]).read_bytes())

    monkeypatch.setattr("pooch.retrieve", retrieve)
    with pytest.raises(OSError, match=r"gzip.zip could not be downloaded.*MD5 of the file is .*archive gzip.zip or"):
        datasets.load("emnist-letters", tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []
    letters = IDX_SETS["emnist-letters"]
    md5 = hashlib.md5((mirror / "gzip.zip").read_bytes()).hexdigest()
    remote = replace(letters.remotes[0], checksum=f"md5:{md5}")
    monkeypatch.setitem(IDX_SETS, "emnist-letters", replace(letters, remotes=(remote,)))
    served.clear()
    for _ in range(2):
        assert len(datasets.load("emnist-letters", tmp_path / "root")[0]) == 26
    assert served == ["https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"]


# --- bounded reading --------------------------------------------------------------------------------------------------


def peak_of(function: Any, message: str) -> int:
    """Bytes allocated by a call that must fail."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_more_is_uncompressed_than_the_header_states(tmp_path: Path) -> None:
    header = idx_bytes(torch.zeros(1, 28, 28, dtype=torch.uint8))[:16]
    (tmp_path / "bomb").write_bytes(gzip.compress(header + bytes(64 << 20)))
    assert peak_of(lambda: read_idx(tmp_path / "bomb"), "784 bytes of data, found 785 or more") < 4 << 20


@pytest.mark.parametrize(
    ("shape", "message"), [((1 << 20, 28, 28), "found 100"), ((1 << 22, 28, 28), "more than 1073741824")]
)
def test_no_memory_for_what_is_only_stated(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    content = struct.pack(">HBB3I", 0, 8, 3, *shape) + bytes(100)
    for name, value in (("plain", content), ("gzipped", gzip.compress(content))):
        (tmp_path / name).write_bytes(value)
        assert peak_of(lambda name=name: read_idx(tmp_path / name), message) < 4 << 20


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def assert_made_up(loaded: tuple[LabelledImages, LabelledImages]) -> None:
    train, test = loaded
    batches = [cifar10_batch(number, 4) for number in range(6)]
    assert torch.equal(train.images, torch.cat([images for images, _ in batches[:5]]))
    assert torch.equal(train.labels, torch.cat([labels for _, labels in batches[:5]]))
    assert torch.equal(test.images, batches[5][0])
    assert torch.equal(test.labels, batches[5][1])


@pytest.mark.parametrize("kind", ["python", "binary"])
@pytest.mark.parametrize("extracted", [False, True])
def test_cifar10(tmp_path: Path, kind: str, extracted: bool) -> None:
    if extracted:
        for name, value in cifar10_content(kind).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(value)
    else:
        write_cifar10(tmp_path, kind)
    assert_made_up(datasets.load("cifar10", tmp_path))


def test_an_archive_that_is_not_the_published_one_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_cifar10(tmp_path, "python")
    log: list[str] = []
    datasets.load("cifar10", tmp_path, log=log.append)
    assert log == [f"{path} is not the published archive (its SHA-256 is another); reading it as it is"]
    monkeypatch.setitem(cifar10.ARCHIVES, path.name, f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    datasets.load("cifar10", tmp_path, log=log.append)
    assert len(log) == 1


def test_a_pickle_as_python_2_wrote_it(tmp_path: Path) -> None:
    """Its strings are not unicode, and the array's bytes are one of them."""
    pixels = bytes(range(256)) * 12
    pickled = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x03oneq\x03U\x06labelsq\x04]q\x05K\x06aU\x04dataq\x06"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + pixels + b"q\x0ctbu."
    )
    content = dict.fromkeys((f"{CIFAR10_FOLDERS['python']}/{name}" for name in CIFAR10_BATCHES), pickled)
    write_cifar10(tmp_path, "python", content)
    train, test = datasets.load("cifar10", tmp_path)
    assert train.labels.tolist() == [6] * 5
    assert test.images.flatten().tolist() == list(pixels)


class Executed:
    """What must not be called when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of the archive was executed",))


PICTURES = torch.zeros(2, 3072, dtype=torch.uint8).numpy()
# Instructions: make an array of 2**60 bytes, by numpy's own function; keep something at place 2**31 of the memo.
HUGE = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x8a\x08" + (1 << 60).to_bytes(8, "little")
HUGE += b"\x85X\x01\x00\x00\x00b\x87R."
FAR = b"\x80\x02N" + b"r\xff\xff\xff\x7f" + b"."


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Executed(), r"data_batch_1: not a batch .* read safely \(it asks for _pytest\.outcomes\.\w+\)"),
        ({b"labels": [1, 2], b"data": Executed()}, "it asks for"),
        (b"cposix\x1b[31m\nsystem\n.", r"\(it asks for an object\)"),
        (b"no pickle at all", "not a batch of CIFAR-10 that can be read safely"),
        # 2**30 bytes that do not follow, for which memory would be taken before they are looked for.
        (b"\x80\x05\x96" + (1 << 30).to_bytes(8, "little") + b".", r"\(it asks for a bytearray\)"),
        (b"", "not a batch of CIFAR-10"),
        (HUGE, "expected a dict, found _Array"),
        (FAR, "expected a dict, found NoneType"),
        ([1], "expected a dict, found list"),
        ({b"labels": [1, 2]}, "an array 'data' and a list 'labels'"),
        ({b"labels": [1], b"data": PICTURES}, r"shape \(1, 3072\), found 'u1' of shape \(2, 3072\)"),
        ({b"labels": [1, 2], b"data": PICTURES.astype("int16")}, "found 'i2'"),
        ({b"labels": [1, 2], b"data": PICTURES.T.copy().T}, "row by row"),
        ({b"labels": [1, 10], b"data": PICTURES}, "labels must be 0 to 9"),
        ({b"labels": [1, True], b"data": PICTURES}, "labels must be 0 to 9"),
        ({b"labels": [], b"data": PICTURES[:0]}, "expected bytes of shape"),
    ],
)
def test_nothing_in_a_pickle_is_trusted(tmp_path: Path, batch: Any, message: str) -> None:
    content = cifar10_content("python")
    name = f"{CIFAR10_FOLDERS['python']}/data_batch_1"
    content[name] = batch if isinstance(batch, bytes) else pickle.dumps(batch, protocol=3)
    write_cifar10(tmp_path, "python", content)
    assert peak_of(lambda: datasets.load("cifar10", tmp_path), message) < 32 << 20


def test_damaged_cifar10_archive(tmp_path: Path) -> None:
    path = write_cifar10(tmp_path, "binary")
    whole = path.read_bytes()
    last = bytearray(whole)
    last[-5] ^= 1  # the checksum of the gzip file
    for content in (whole[: len(whole) // 2], b"text", gzip.compress(b"text"), bytes(last)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz: (damaged archive|there is no)") as caught:
            datasets.load("cifar10", tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_batch_2.bin": None}, "there is no data_batch_2 in it"),
        ({"test_batch.bin": bytes(3072)}, "test_batch.bin: expected a multiple of 3073 bytes, found 3072"),
        ({"test_batch.bin": b""}, "expected a multiple of 3073 bytes, found 0"),
        ({"test_batch.bin": b"\x0a" + bytes(3072)}, "labels must be 0 to 9, found 10 to 10"),
        ({"test_batch.bin": bytes((64 << 20) + 1)}, "larger than"),
        ({"../cifar-10-batches-bin/data_batch_1.bin": bytes(3073)}, "data_batch_1 is there twice"),
    ],
)
def test_cifar10_archive_with_other_files(tmp_path: Path, change: dict[str, bytes | None], message: str) -> None:
    folder = CIFAR10_FOLDERS["binary"]
    content: dict[str, Any] = {**cifar10_content("binary"), **{f"{folder}/{k}": v for k, v in change.items()}}
    write_cifar10(tmp_path, "binary", {name: value for name, value in content.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_other_files_beside_the_batches_do_not_matter(tmp_path: Path, kind: str) -> None:
    """Both archives have a page of notes, and names of the classes."""
    others = {f"{CIFAR10_FOLDERS[kind]}/readme.html": b"<html>", "elsewhere/data_batch_1": b"no", "notes": b"no"}
    write_cifar10(tmp_path, kind, {**others, **cifar10_content(kind)})
    assert_made_up(datasets.load("cifar10", tmp_path))


def test_a_folder_without_one_of_its_batches(tmp_path: Path) -> None:
    for name, value in cifar10_content("binary").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if "data_batch_4" not in name:
            (tmp_path / name).write_bytes(value)
    with pytest.raises(ValueError, match="there is no data_batch_4 in it"):
        datasets.load("cifar10", tmp_path)


def test_a_member_is_not_as_large_as_its_header_states(tmp_path: Path) -> None:
    """What is skipped is not read, and would end behind any archive."""
    header = tarfile.TarInfo("notes")
    header.size = 1 << 40
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    with pytest.raises(ValueError, match="larger than CIFAR-10 is"):
        datasets.load("cifar10", tmp_path)


def test_headers_of_an_archive_do_not_decide_about_memory(tmp_path: Path) -> None:
    """A name of 200 MB, in an archive of 200 kB."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 200 << 20
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(200):
            file.write(bytes(1 << 20))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(buffer.getvalue())
    assert peak_of(lambda: datasets.load("cifar10", tmp_path), "larger than CIFAR-10 is") < 32 << 20


def test_download_of_cifar10_is_the_archive_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENET_EXT_CIFAR10_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(OSError, match=r"cifar-10-binary\.tar\.gz could not be downloaded and is not in") as caught:
        datasets.load("cifar10", tmp_path)
    assert "cifar-10-python.tar.gz as root" in str(caught.value)


# --- training on them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels", "classes"), [("cifar10", 3, 10), ("emnist-balanced", 1, 47)])
def test_training_fits_the_network_to_the_data(tmp_path: Path, name: str, channels: int, classes: int) -> None:
    if name == "cifar10":
        write_cifar10(tmp_path, "binary")
    else:
        write_emnist_zip(tmp_path / "gzip.zip", emnist_content("balanced", 47, 0))
    trainer = Trainer(TrainConfig.for_data(name, epochs=2, batch_size=4, device="cpu"), *datasets.load(name, tmp_path))
    assert trainer.model.conv1.in_channels == channels
    assert trainer.model.fc3.out_features == classes
    trainer.run_epoch()
    assert trainer.evaluate().confusion.shape == (classes, classes)
