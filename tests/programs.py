"""Programs that a test runs in an interpreter of their own, which may hang or crash."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

# Nothing here takes more than seconds. On a machine that is busy with other things it may take many more of them, but
# what takes this long hangs.
TIMEOUT = 600


def run(code: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python code; as a file in a folder if given, where processes that are not forked find its functions."""
    code = textwrap.dedent(code)
    arguments = ["-c", code]
    if folder is not None:
        (folder / "program.py").write_text(code)
        arguments = [str(folder / "program.py")]
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False)


def lines_of(code: str, folder: Path | None = None) -> list[str]:
    """What a program prints that ends well."""
    done = run(code, folder)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout.splitlines()
