"""Libraries that watch themselves, for tests: LENET_EXT_SANITIZE reports mistakes with memory or between threads, and
LENET_EXT_COVERAGE counts which lines ran. `make sanitize` and `make coverage` know how to use them."""

from __future__ import annotations

import os
import sys

# vptr would need the type information that torch's libraries keep to themselves. At -O3 the instrumented kernels take
# the compiler minutes, and make no other mistakes.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread", "-DLENET_EXT_ALWAYS_PARALLEL"],
}
COVERAGE = ["--coverage", "-fprofile-abs-path", "-fprofile-update=atomic", "-g1", "-O1"]


def instrumentation_flags() -> list[str]:
    """For the compiler, after all others, and for the linker."""
    wanted = os.environ.get("LENET_EXT_SANITIZE", "")
    if wanted and wanted not in SANITIZERS:
        sys.exit(f"lenet_ext: LENET_EXT_SANITIZE must be {' or '.join(SANITIZERS)}, got {wanted!r}")
    flags = [*SANITIZERS[wanted], "-fno-omit-frame-pointer", "-g1", "-O1"] if wanted else []
    return flags + (COVERAGE if os.environ.get("LENET_EXT_COVERAGE", "0") not in ("", "0") else [])
