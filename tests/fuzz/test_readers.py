"""Readers of files: good files, damaged ones, and what was found once."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("scipy")

from lenet_ext.training.config import TrainConfig

from .files import NAMES
from .readers import READERS, check


def test_the_names_are_those_of_the_readers() -> None:
    """`fuzz.files` cannot import them before what they are made of is instrumented."""
    assert tuple(READERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_good_and_damaged_files(tmp_path: Path, name: str) -> None:
    random = Random(0)
    for content in READERS[name].files():
        check(name, tmp_path, content)
        for _ in range(4):
            damaged = bytearray(content[: random.randrange(len(content) + 1)] if random.random() < 0.3 else content)
            for _ in range(random.randrange(4) if damaged else 0):
                damaged[random.randrange(len(damaged))] = random.randrange(256)
            check(name, tmp_path, bytes(damaged))


# What was found once, as small as it could be made.
FOUND: list[tuple[str, bytes]] = [
    ("configuration", b"[]"),
    ("configuration", json.dumps(TrainConfig.for_data("digits").to_dict() | {"lr": 10**400}).encode()),
    ("folder", b'{"normalization": {"mean": 1%s, "std": 1}}' % (b"0" * 400)),
    # The first byte of what LZMA compressed.
    ("emnist", READERS["emnist"].files()[3].replace(b"]\0\0\x80\0\0", b"]\0\0\x80\0\xff")),
]


@pytest.mark.parametrize(("name", "content"), FOUND, ids=[name for name, _ in FOUND])
def test_what_was_found(tmp_path: Path, name: str, content: bytes) -> None:
    check(name, tmp_path, content)
