"""The CPU kernels: each source once per instruction set, from which the library chooses at run time."""

from __future__ import annotations

import platform
from pathlib import Path

from compile_objects import ObjectFile
from compiler import attempt

# No -march=native: the result must run on machines other than this one. No fast math: NaN, infinities and the order of
# additions are part of the contract. The three -f flags change no value (but for fusing a * b + c, which rounds once
# instead of twice).
STANDARD = "-std=c++17"  # the oldest that they are written in; CXXFLAGS may name a later one
FLAGS = [
    *("-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]

# name: (C++ namespace, bytes of a vector, flags)
CAPABILITIES = {"default": ("default_", 16, [])}
if platform.machine().lower() in ("x86_64", "amd64"):
    CAPABILITIES["avx2"] = ("avx2", 32, ["-mavx2", "-mfma"])
    CAPABILITIES["avx512"] = (
        "avx512",
        64,
        [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"),
            "-mprefer-vector-width=512",
        ],
    )


def supported_capabilities(compiler: list[str]) -> list[str]:
    return [name for name, (_, _, flags) in CAPABILITIES.items() if attempt(compiler, flags) is None]


def cpu_objects(
    compiler: list[str], capabilities: list[str], folder: Path, build_directory: Path, changed: list[str]
) -> list[ObjectFile]:
    """`compiler`: with the user's flags; `changed`: flags in place of some of FLAGS."""
    objects = []
    for source in sorted(folder.glob("*.cpp")):
        for name in capabilities:
            namespace, vector_bytes, flags = CAPABILITIES[name]
            definitions = [
                f"-DLENET_EXT_CPU_CAPABILITY={namespace}",
                f"-DLENET_EXT_VECTOR_BYTES={vector_bytes}",
            ]
            output = build_directory / f"{source.stem}.{name}.o"
            objects.append(ObjectFile(source, output, [*compiler, *FLAGS, *flags, *definitions, *changed]))
    return objects
