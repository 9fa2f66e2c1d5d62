"""Looks for files that a reader answers with something else than their content or an error of one line.

    python -m fuzz.files --seconds 60               # each reader for so long; in the tests' folder
    python -m fuzz.files picture idx --seconds 600
    python -m fuzz.files picture --again FILE       # a file that was found

Files are made by libFuzzer, by way of atheris, which sees the lines that a file reaches in the Python of readers and of
the libraries beneath them. A finding's content is printed, if it is small, and kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("idx", "emnist", "cifar10-tar", "cifar10-pickle", "weights", "pickle", "folder", "configuration", "picture")
SECONDS_PER_FILE = 20
MEGABYTES = 3000  # torch, and the largest picture that Pillow allows


def serve(name: str, folder: str, again: str | None, arguments: list[str]) -> None:
    """Tries files until the time is over, which ends the process; or one file."""
    import atheris

    # What a change of a file may lead to lines of; all of torch would take minutes.
    with atheris.instrument_imports(include=["PIL", "gzip", "json", "pickle", "tarfile", "zipfile"]):
        import gzip, json, pickle, tarfile, zipfile  # noqa: E401, F401, I001
        from PIL import Image

        Image.init()
    import torch  # noqa: F401

    with atheris.instrument_imports(include=["lenet_ext"]):
        from .readers import READERS, check
    room = Path(folder, "room")
    room.mkdir()
    if again is not None:
        check(name, room, Path(again).read_bytes())
        return
    corpus = Path(folder, "corpus")
    corpus.mkdir()
    for number, content in enumerate(READERS[name].files()):
        (corpus / str(number)).write_bytes(content)
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], lambda content: check(name, room, content))
    atheris.Fuzz()


def fuzz(name: str, seconds: int, kept: Path, again: str | None) -> bool:
    """Whether there was a finding."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"-max_total_time={seconds}", f"-timeout={SECONDS_PER_FILE}", f"-rss_limit_mb={MEGABYTES}"]
        arguments += [f"-artifact_prefix={kept}/{name}-", "-print_final_stats=1", "-max_len=65536"]
        code = f"from fuzz.files import serve; serve({name!r}, {folder!r}, {again!r}, {arguments!r})"
        before = set(kept.iterdir())
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.PIPE, text=True)
    said = done.stderr.splitlines()
    runs = [line.split()[-1] for line in said if line.startswith("stat::number_of_executed_units")]
    print(f"{name}: {runs[0] if runs else 'no'} files, {'a finding' if done.returncode else 'no finding'}", flush=True)
    if done.returncode:
        print("\n".join(said[-60:]))
        for path in sorted(set(kept.iterdir()) - before):
            content = path.read_bytes()
            print(f"kept as {path}: {content if len(content) < 2000 else f'{len(content)} bytes'}")
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader (default: 60)")
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir(), "lenet_ext-fuzz"), metavar="FOLDER")
    parser.add_argument("--again", metavar="FILE", help="read this one, with the reader that is named")
    arguments = parser.parse_args()
    for name in arguments.readers:
        if name not in NAMES:
            parser.error(f"READER must be one of {', '.join(NAMES)}, found {name!r}")
    arguments.kept.mkdir(parents=True, exist_ok=True)
    findings = [
        fuzz(name, arguments.seconds, arguments.kept, arguments.again) for name in arguments.readers or list(NAMES)
    ]
    return 1 if any(findings) else 0


if __name__ == "__main__":
    sys.exit(main())
