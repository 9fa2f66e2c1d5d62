"""Small archives in the forms in which data sets are published, with made-up pictures."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import torch

CIFAR10_FOLDERS = {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"}
CIFAR10_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def idx_bytes(values: torch.Tensor) -> bytes:
    """A uint8 tensor in the IDX format."""
    return struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape) + values.numpy().tobytes()


def emnist_content(split: str, num_classes: int, first_label: int) -> dict[str, bytes]:
    """The four gzipped files by name: one picture a class for training, one of the first for testing."""
    content = {}
    for part, count in (("train", num_classes), ("test", 1)):
        pictures = torch.zeros(count, 28, 28, dtype=torch.uint8)
        pictures[:, 3, 20] = 200  # in the file: column 3, row 20
        labels = (torch.arange(count) + first_label).to(torch.uint8)
        for kind, values in (("images-idx3", pictures), ("labels-idx1", labels)):
            content[f"emnist-{split}-{part}-{kind}-ubyte.gz"] = gzip.compress(idx_bytes(values))
    return content


def write_emnist_zip(path: Path, contents: dict[str, bytes]) -> None:
    """As ``gzip.zip``: a folder of gzipped files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"gzip/{name}", content)


def cifar10_batch(number: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (count, 3, 32, 32) whose channels are 10, 20 and 30 plus the label, and labels."""
    labels = (torch.arange(count) + number) % 10
    channels = torch.tensor([10, 20, 30]).view(1, 3, 1, 1) + labels.view(-1, 1, 1, 1)
    return channels.expand(count, 3, 32, 32).to(torch.uint8).contiguous(), labels


def cifar10_content(kind: str, count: int = 4) -> dict[str, bytes]:
    """The files of one of the archives, by name."""
    content = {}
    for number, name in enumerate(CIFAR10_BATCHES):
        images, labels = cifar10_batch(number, count)
        if kind == "binary":
            rows = torch.cat([labels.to(torch.uint8).unsqueeze(1), images.view(count, -1)], 1)
            content[f"{name}.bin"] = rows.numpy().tobytes()
        else:
            batch = {b"batch_label": b"", b"labels": labels.tolist(), b"data": images.view(count, -1).numpy()}
            content[name] = pickle.dumps({**batch, b"filenames": [b"picture.png"] * count}, protocol=3)
    return {f"{CIFAR10_FOLDERS[kind]}/{name}": value for name, value in content.items()}


def write_cifar10(directory: Path, kind: str, content: dict[str, bytes] | None = None) -> Path:
    """One of the archives, with these files or the made-up ones."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"cifar-10-{kind}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, value in (content or cifar10_content(kind)).items():
            member = tarfile.TarInfo(name)
            member.size = len(value)
            archive.addfile(member, io.BytesIO(value))
    return path
