"""The data sets: the IDX reader, the split, the batches, MNIST from files and from a (local) mirror."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import math
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("pooch")

from lenet_ext.environment import extras
from lenet_ext.training import datasets
from lenet_ext.training.idx import read_idx
from lenet_ext.training.idx_sets import IDX_SETS
from lenet_ext.training.images import _draw_motions, _moved

SHARED_MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
needs_mnist = pytest.mark.skipif(not SHARED_MNIST.is_dir(), reason=f"no MNIST in {SHARED_MNIST}")


def idx_bytes(values: torch.Tensor) -> bytes:
    """A uint8 tensor in the IDX format."""
    return struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape) + values.numpy().tobytes()


def write_mnist(directory: Path, *, name: Callable[[str], str] = str, compress: bool = False) -> None:
    """Four files like MNIST's, with 20 and 10 pictures."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("t10k", 10)):
        pictures = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        for stem, values in ((f"{part}-images-idx3-ubyte", pictures), (f"{part}-labels-idx1-ubyte", labels)):
            content = idx_bytes(values)
            path = directory / (name(stem) + (".gz" if compress else ""))
            path.write_bytes(gzip.compress(content) if compress else content)


# --- IDX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3), (1, 1, 1, 2)])
def test_idx_round_trip(tmp_path: Path, shape: tuple[int, ...], compress: bool) -> None:
    values = torch.randint(256, shape, dtype=torch.uint8)
    content = idx_bytes(values)
    # The content decides, not the name.
    (tmp_path / "file").write_bytes(gzip.compress(content) if compress else content)
    found = read_idx(tmp_path / "file")
    assert found.dtype == torch.uint8
    assert torch.equal(found, values)


GOOD = idx_bytes(torch.arange(6, dtype=torch.uint8).view(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG and more", "must begin with two zero bytes"),
        (b"\0\0\x0d" + GOOD[3:], "element type 0x0d, expected 0x08"),
        (GOOD[:7], "header ends early"),
        (b"\0\0\x08\0", "header ends early"),
        (GOOD[:-1], r"states \(2, 3\), that is 6 bytes of data, found 5"),
        (GOOD + b"x", "found 7"),
        (gzip.compress(GOOD, mtime=0)[:-9], "damaged gzip file"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"????" + gzip.compress(GOOD, mtime=0)[16:], "damaged gzip file"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "the header states"),
    ],
)
def test_damaged_idx_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "damaged-file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_missing_idx_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "absent")


# --- digits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[datasets.LabelledImages, datasets.LabelledImages]:
    return datasets.load("digits")


def test_digits_split_is_complete_stratified_and_fixed(
    digits: tuple[datasets.LabelledImages, datasets.LabelledImages],
) -> None:
    train, test = digits
    assert (len(train), len(test)) == (1442, 355)
    counts = torch.bincount(test.labels, minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 37
    torch.manual_seed(123)  # the split must not depend on it
    again = datasets.load("digits")
    assert torch.equal(again[0].images, train.images)
    assert torch.equal(again[1].labels, test.labels)


def test_digits_are_normalized(digits: tuple[datasets.LabelledImages, datasets.LabelledImages]) -> None:
    train, _ = digits
    pixels = train.normalization(train.images)
    assert pixels.shape == (1442, 1, 32, 32)
    assert pixels.dtype == torch.float32
    assert abs(pixels.mean()) < 1e-3
    assert abs(pixels.std() - 1) < 1e-3


def test_dataset_works_with_a_data_loader(digits: tuple[datasets.LabelledImages, datasets.LabelledImages]) -> None:
    _, test = digits
    images, labels = next(iter(torch.utils.data.DataLoader(test, batch_size=16)))
    ours, our_labels = next(iter(test.batches(16)))
    assert torch.equal(images, ours)
    assert torch.equal(labels, our_labels)


# --- batches ----------------------------------------------------------------------------------------------------------


def small_set(count: int = 10) -> datasets.LabelledImages:
    images = torch.randint(1, 256, (count, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return datasets.LabelledImages(images, torch.arange(count) % 10, datasets.Normalization(0.0, 1 / 255))


@pytest.mark.parametrize("batch_size", [1, 3, 10, 1000])
def test_batches_visit_everything_once(batch_size: int) -> None:
    dataset = small_set()
    for generator in (None, torch.Generator().manual_seed(5)):
        labels = torch.cat([labels for _, labels in dataset.batches(batch_size, generator=generator)])
        assert sorted(labels.tolist()) == list(range(10))


def test_nothing_has_no_batches() -> None:
    assert list(small_set(0).batches(4)) == []


def test_batches_pair_pictures_with_their_labels() -> None:
    dataset = small_set()
    for images, labels in dataset.batches(4, generator=torch.Generator().manual_seed(5)):
        assert torch.equal(images, dataset.images[labels].float())


def test_batches_are_shifted_within_bounds() -> None:
    dataset = small_set()
    padded = torch.nn.functional.pad(dataset.images.float(), (2,) * 4)
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for images, labels in dataset.batches(4, generator=generator, max_shift=2):
            for image, label in zip(images, labels, strict=True):
                places = [
                    (y, x)
                    for y in range(5)
                    for x in range(5)
                    if torch.equal(image, padded[int(label), :, y : y + 32, x : x + 32])
                ]
                assert len(places) == 1
                seen.add(places[0])
    assert len(seen) == 25


def middle_of_ink(picture: torch.Tensor) -> tuple[float, float]:
    """Of (32, 32), seen from the middle: x to the right and y down, in pixels."""
    places = torch.arange(32) - 15.5
    ink = picture.sum()
    return float((picture.sum(0) * places).sum() / ink), float((picture.sum(1) * places).sum() / ink)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_turned_within_bounds_and_never_mirrored(channels: int) -> None:
    # A dot ten pixels from the middle: to the right, below, and to the left.
    count, places = 200, ((26, 16), (16, 26), (5, 16))[:channels]
    pictures = torch.zeros(count, channels, 32, 32, dtype=torch.uint8)
    for channel, (x, y) in enumerate(places):
        pictures[:, channel, y - 1 : y + 1, x - 1 : x + 1] = 255
    whole = {1: datasets.Normalization(0.0, 1.0), 3: datasets.Normalization((0.0,) * 3, (1.0,) * 3)}[channels]
    data = datasets.LabelledImages(pictures, torch.zeros(count, dtype=torch.int64), whole)
    (images, _), *rest = data.batches(count, generator=torch.Generator().manual_seed(0), max_turn=10.0)
    assert not rest
    assert images.shape == (count, channels, 32, 32)
    before = [middle_of_ink(dot.float()) for dot in pictures[0]]
    turns, ways = [], []
    for image in images:
        after = [middle_of_ink(dot) for dot in image]
        for (x, y), (u, v) in zip(before, after, strict=True):
            # Half a pixel along each axis, seen from ten pixels away, is up to four degrees.
            turn = math.degrees(math.atan2(x * v - y * u, x * u + y * v))
            assert abs(turn) < 14.5
            assert abs(math.hypot(u, v) - math.hypot(x, y)) < 1
            turns.append(turn)
        assert image.sum() == pytest.approx(4 * channels, rel=0.02)
        ways.append([sum(u for u, _ in after), sum(v for _, v in after)])
    assert min(turns) < -8
    assert max(turns) > 8
    assert len({tuple(way) for way in ways}) == count


def test_turning_is_what_an_affine_grid_does() -> None:
    data = small_set(4)
    motions = _draw_motions(4, 10.0, torch.Generator().manual_seed(0))
    cos, sin, right, down = motions.unbind(1)
    theta = torch.stack((cos, -sin, right, sin, cos, down), dim=1).view(4, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, [4, 1, 32, 32], align_corners=False)
    expected = torch.nn.functional.grid_sample(data.images.float(), grid, align_corners=False)
    torch.testing.assert_close(_moved(data.images, motions), expected, rtol=1e-4, atol=1e-2)
    still = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(4, 4)
    assert torch.equal(_moved(data.images, still), data.images.float())


def test_same_seed_same_batches() -> None:
    options = {"max_shift": 3, "max_turn": 10.0}
    first, second = (
        [images for images, _ in small_set().batches(3, generator=torch.Generator().manual_seed(7), **options)]
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (0, {}, "batch_size must be 1 or more, found 0"),
        (-3, {}, "batch_size must be 1 or more, found -3"),
        (1, {"max_shift": -1}, "max_shift must be 0 or more, found -1"),
        (1, {"max_turn": -0.5}, r"max_turn must be 0 or more, found -0\.5"),
        (1, {"max_turn": math.nan}, "max_turn must be 0 or more, found nan"),
    ],
)
def test_bad_batches(size: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_set().batches(size, **options)


def test_images_must_have_the_right_form() -> None:
    with pytest.raises(ValueError, match=r"uint8 \(3, 1, 32, 32\), found torch.float32"):
        datasets.LabelledImages(
            torch.zeros(3, 1, 32, 32), torch.zeros(3, dtype=torch.int64), datasets.Normalization(0, 1)
        )


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"digits, mnist, .*cifar10, found 'cifar'"):
        datasets.load("cifar")


# --- MNIST files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("folder", [".", "MNIST/raw", "raw"])
def test_mnist_from_files(tmp_path: Path, folder: str, compress: bool) -> None:
    write_mnist(tmp_path / folder, compress=compress)
    train, test = datasets.load_mnist(tmp_path)
    assert (len(train), len(test)) == (20, 10)
    assert train.images.shape == (20, 1, 32, 32)
    assert train.labels.tolist() == [n % 10 for n in range(20)]
    border = train.images.clone()
    border[:, :, 2:30, 2:30] = 0
    assert border.count_nonzero() == 0


def test_mnist_other_spelling(tmp_path: Path) -> None:
    write_mnist(tmp_path, name=lambda stem: stem.replace("-idx", ".idx"))
    assert len(datasets.load_mnist(tmp_path)[0]) == 20


@pytest.mark.parametrize(
    ("stem", "values", "message"),
    [
        ("train-images-idx3-ubyte", torch.zeros(20, 27, 28, dtype=torch.uint8), r"\(N, 28, 28\), found \(20, 27, 28\)"),
        ("train-labels-idx1-ubyte", torch.zeros(19, dtype=torch.uint8), "expected 20 labels"),
        ("t10k-labels-idx1-ubyte", torch.full((10,), 10, dtype=torch.uint8), "labels must be 0 to 9, found 10"),
    ],
)
def test_mnist_files_that_do_not_fit(tmp_path: Path, stem: str, values: torch.Tensor, message: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / stem).write_bytes(idx_bytes(values))
    with pytest.raises(ValueError, match=message) as caught:
        datasets.load_mnist(tmp_path)
    assert stem in str(caught.value)


def test_mnist_files_without_examples(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(torch.zeros(0, 28, 28, dtype=torch.uint8)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(torch.zeros(0, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte: the file holds no examples"):
        datasets.load_mnist(tmp_path)


def test_root_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="found a file"):
        datasets.load_mnist(tmp_path / "file")


@needs_mnist
def test_real_mnist() -> None:
    train, test = datasets.load_mnist(SHARED_MNIST)
    assert (len(train), len(test)) == (60000, 10000)
    assert torch.bincount(train.labels).tolist()[:3] == [5923, 6742, 5958]
    pixels = train.images.double().div(255)
    assert abs(pixels.mean() - train.normalization.mean) < 1e-3
    assert abs(pixels.std() - train.normalization.std) < 1e-3
    for remote in IDX_SETS["mnist"].remotes:
        content = gzip.decompress((SHARED_MNIST / remote.name).read_bytes())
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == remote.checksum


# --- download ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Directory that a web server on this machine serves as the only mirror; the checksums are those of its files."""
    directory = tmp_path / "mirror"
    write_mnist(directory, compress=True)
    mnist = IDX_SETS["mnist"]
    remotes = tuple(
        replace(
            remote,
            checksum=f"sha256:{hashlib.sha256(gzip.decompress((directory / remote.name).read_bytes())).hexdigest()}",
        )
        for remote in mnist.remotes
    )
    monkeypatch.setitem(IDX_SETS, "mnist", replace(mnist, remotes=remotes))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(directory), **kwargs)  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("LENET_EXT_MNIST_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield directory
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_into_root_and_reuse(tmp_path: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    train, _ = datasets.load_mnist(tmp_path / "root", log=log.append)
    assert len(train) == 20
    assert len(log) == 4
    names = [remote.name for remote in IDX_SETS["mnist"].remotes]
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == sorted(names)
    monkeypatch.setenv("LENET_EXT_MNIST_URL", "http://127.0.0.1:9")
    assert len(datasets.load_mnist(tmp_path / "root")[0]) == 20


def test_download_into_the_cache(mirror: Path) -> None:
    log: list[str] = []
    datasets.load_mnist(log=log.append)
    datasets.load_mnist(log=log.append)
    assert len(log) == 4  # nothing twice


def test_download_with_a_wrong_checksum_is_refused(tmp_path: Path, mirror: Path) -> None:
    name = "train-images-idx3-ubyte"
    (mirror / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(torch.zeros(20, 28, 28, dtype=torch.uint8))))
    with pytest.raises(OSError, match=f"{name}.gz could not be downloaded.*SHA-256 of the content is") as caught:
        datasets.load_mnist(tmp_path / "root")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "root").iterdir()) == []  # nothing unverified stays


def test_download_that_is_cut_off_is_refused(tmp_path: Path, mirror: Path) -> None:
    path = mirror / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="could not be downloaded"):
        datasets.load_mnist(tmp_path / "root")


def test_a_mirror_that_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENET_EXT_MNIST_URL", "nonsense://here")
    with pytest.raises(OSError, match=r"could not be downloaded.*nonsense://here/: ValueError"):
        datasets.load_mnist(tmp_path)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENET_EXT_MNIST_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(OSError, match=r"could not be downloaded and is not in .*pass the directory") as caught:
        datasets.load_mnist(tmp_path)
    assert "\n" not in str(caught.value)


# --- extras -----------------------------------------------------------------------------------------------------------


def test_missing_extra_names_the_command() -> None:
    with pytest.raises(extras.MissingExtraError, match=r"no_such_thing is needed for dreams: pip install 'lenet_ext"):
        extras.require("no_such_thing", "dreams")


def test_extra_that_is_broken_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extra.py").write_text("import no_such_dependency_of_it\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency_of_it") as caught:
        extras.require("broken_extra", "anything")
    assert not isinstance(caught.value, extras.MissingExtraError)
