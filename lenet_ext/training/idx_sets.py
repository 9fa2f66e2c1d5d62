"""MNIST, and the data sets that are published in its form: IDX files of pictures of 28x28 pixels."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch.nn.functional as F
from torch import Tensor

from lenet_ext.environment.files import naming
from lenet_ext.training.download import Log, Remote, directory_of, download, find_file
from lenet_ext.training.idx import read_idx, read_idx_from

__all__ = ["IDX_SETS", "IdxSet", "read_idx_set"]


@dataclass(frozen=True)
class IdxSet:
    """A data set of four IDX files.

    Args:
        names: of the files without ``.gz``: training pictures and labels, test pictures and labels.
        folders: below the root, looked into before the root itself; as torchvision lays out its downloads.
        cache: name of the data set as to downloads.
        mirrors: addresses of directories.
        remotes: the files to download, in the order of the names; or the one archive that holds them all.
        first_label: label of the first class.
        transposed: rows and columns are exchanged in the files.
    """

    names: tuple[str, str, str, str]
    folders: tuple[str, ...]
    cache: str
    mirrors: tuple[str, ...]
    remotes: tuple[Remote, ...]
    first_label: int = 0
    transposed: bool = False
    archives: tuple[str, ...] = field(default=())


_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _like_mnist(folder: str, cache: str, mirrors: tuple[str, ...], sums: tuple[str, ...], of_content: bool) -> IdxSet:
    remotes = tuple(
        Remote(f"{name}.gz", f"sha256:{checksum}", of_content) for name, checksum in zip(_NAMES, sums, strict=True)
    )
    return IdxSet(_NAMES, (f"{folder}/raw", ".", "raw"), cache, mirrors, remotes)


def _emnist(split: str, first_label: int) -> IdxSet:
    train, test = f"emnist-{split}-train", f"emnist-{split}-test"
    return IdxSet(
        names=(
            f"{train}-images-idx3-ubyte",
            f"{train}-labels-idx1-ubyte",
            f"{test}-images-idx3-ubyte",
            f"{test}-labels-idx1-ubyte",
        ),
        folders=("EMNIST/raw", ".", "raw", "gzip"),
        cache="emnist",
        mirrors=("https://biometrics.nist.gov/cs_links/EMNIST/",),
        remotes=(Remote("gzip.zip", "md5:58c8d27c78d21e728a6bc7b3cc06412e"),),
        first_label=first_label,
        transposed=True,
        archives=("gzip.zip", "emnist-gzip.zip", "emnist.zip"),
    )


# MNIST's checksums were compared with the files. The addresses and the checksums of the others are those that
# torchvision and TensorFlow Datasets publish; no download has verified them here, nor the forms of the files (EMNIST's
# transposed pictures, the first label of its letters, the names in its archive).
IDX_SETS = {
    "mnist": _like_mnist(
        "MNIST",
        "mnist",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        of_content=True,  # mirrors compress differently
    ),
    "fashion-mnist": _like_mnist(
        "FashionMNIST",
        "fashion-mnist",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
        of_content=False,
    ),
    "kmnist": _like_mnist(
        "KMNIST",
        "kmnist",
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        (
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        ),
        of_content=False,
    ),
    "emnist-letters": _emnist("letters", first_label=1),
    "emnist-balanced": _emnist("balanced", first_label=0),
}


def read_idx_set(data: str, num_classes: int, root: str | Path | None, log: Log) -> Iterator[tuple[Tensor, Tensor]]:
    """Reads a data set from its files, plain or gzipped, by name or within the archive that they come in.

    Files that are not there are downloaded, compared with a checksum, and kept: in ``root`` if given, else in the
    user's cache. Files that are there are taken as they are, so other data in the same form can be used as well.

    Args:
        data: a key of `IDX_SETS`.
        num_classes: labels must be below it.
        root: directory of the files.
        log: told in one line what is being downloaded.

    Yields:
        Training set, then test set: uint8 (N, 1, 32, 32), the pictures of 28x28 within a border of zeros, and int64
        (N,), from 0.

    Raises:
        OSError: a file cannot be read, or cannot be had.
        ValueError: a file is damaged or does not fit the others.
        lenet_ext.environment.extras.MissingExtraError: a download is needed and pooch is not installed.
    """
    idx_set = IDX_SETS[data]
    for part in (0, 2):
        (images_path, images), (labels_path, labels) = (_read(idx_set, which, root, log) for which in (part, part + 1))
        if images.dim() != 3 or images.shape[1:] != (28, 28):
            raise ValueError(f"{images_path}: expected images of shape (N, 28, 28), found {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{labels_path}: expected {len(images)} labels, found shape {tuple(labels.shape)}")
        if len(labels) == 0:
            raise ValueError(f"{labels_path}: the file holds no examples")
        low, high = idx_set.first_label, idx_set.first_label + num_classes - 1
        outside = labels[(labels < low) | (labels > high)]
        if len(outside):
            raise ValueError(f"{labels_path}: labels must be {low} to {high}, found {int(outside[0])}")
        if idx_set.transposed:
            images = images.transpose(1, 2)
        yield F.pad(images.unsqueeze(1), (2,) * 4), labels.long() - low


def _read(idx_set: IdxSet, which: int, root: str | Path | None, log: Log) -> tuple[str, Tensor]:
    """One of the four files, with what errors call it: found below the root, or else downloaded."""
    name = idx_set.names[which]
    folders: list[Path] = []
    if root is not None:
        base = directory_of(root)
        folders = [base / folder for folder in idx_set.folders]
    # Both spellings are in circulation: train-images-idx3-ubyte and train-images.idx3-ubyte.
    spellings = (name, name.replace("-idx", ".idx"))
    path = find_file(folders, [form for spelling in spellings for form in (spelling, f"{spelling}.gz")])
    if path is not None:
        return str(path), read_idx(path)
    archive = find_file(folders, idx_set.archives)
    if archive is None:
        hint = "pass the directory that has "
        hint += "its archive gzip.zip or the four IDX files" if idx_set.archives else "the four IDX files"
        remote = idx_set.remotes[0] if idx_set.archives else idx_set.remotes[which]
        path = download(idx_set.cache, remote, idx_set.mirrors, root, log, f"{hint} as root")
        if not idx_set.archives:
            return str(path), read_idx(path)
        archive = path
    return _read_member(archive, name)


def _read_member(archive: Path, name: str) -> tuple[str, Tensor]:
    try:
        with naming(archive), zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                if PurePosixPath(member.filename).name in (name, f"{name}.gz"):
                    where = f"{archive}: {member.filename}"
                    with file.open(member) as content:
                        return where, read_idx_from(content, where)  # type: ignore[arg-type]
    except Exception as error:  # each kind of compression raises what it likes
        if str(archive) in str(error):  # said already
            raise
        raise ValueError(f"{archive}: damaged archive ({error})") from None
    raise ValueError(f"{archive}: there is no {name}.gz in it")
