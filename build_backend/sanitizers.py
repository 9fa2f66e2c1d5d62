"""LENET_EXT_SANITIZE: a library that ends the process at the first mistake with memory, for `make sanitize`."""

from __future__ import annotations

import os
import sys

# vptr would need the type information that torch's libraries keep to themselves. At -O3 the instrumented kernels take
# the compiler minutes, and make no other mistakes.
SANITIZERS = {
    "address": [
        *("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
        *("-fno-omit-frame-pointer", "-g1", "-O1"),
    ]
}


def sanitizer_flags() -> list[str]:
    """For the compiler, after all others, and for the linker."""
    wanted = os.environ.get("LENET_EXT_SANITIZE", "")
    if wanted and wanted not in SANITIZERS:
        sys.exit(f"lenet_ext: LENET_EXT_SANITIZE must be {' or '.join(SANITIZERS)}, got {wanted!r}")
    return SANITIZERS.get(wanted, [])
