"""Which C++ runtime a library uses: it has to be the shared one that torch uses, too.

With a private copy linked in (some compilers come with nothing else) the library loads and computes, and then crashes
the process at the first error message: an exception of one runtime meets the other.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path


def has_private_runtime(library: Path) -> bool:
    """Whether an ELF library needs no shared C++ runtime. False where nobody can tell (no readelf, another format)."""
    readelf = shutil.which("readelf")
    if readelf is None:
        return False
    done = subprocess.run([readelf, "--dynamic", str(library)], capture_output=True, text=True, check=False)
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", done.stdout)
    return bool(needed) and not any(name.startswith(("libstdc++.so", "libc++.so")) for name in needed)
