"""The instruction set that a run is of: the processor's own, or a lesser one that everybody was held to.

The environment can hold ours, torch and torch's libraries to an instruction set, so that one processor stands in for
another. Results keep these variables as ``machine["forced"]``: a machine that was held to something is
another machine.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["SETS", "VARIABLES", "forced_by_environment", "instruction_set", "is_forced", "processor_title"]

SETS = ("default", "avx2", "avx512")
"""By their names in ``build_info()``, the least first."""
VARIABLES = ("LENET_EXT_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Of ours, of torch, of its convolutions, of its matrix products. The last does nothing on AMD's processors, for which
the library has kernels of AVX2 alone.
"""

_TITLES = {"default": "the baseline", "avx2": "AVX2", "avx512": "AVX-512"}
_FLAGS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}


def forced_by_environment() -> dict[str, str]:
    """Those of `VARIABLES` that are set, with their values."""
    return {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}


def instruction_set(content: dict[str, Any]) -> str | None:
    """The one that ours and stock were measured with, of `SETS`; None where they were held to different ones.

    Args:
        content: of a run, or the small file of a machine.

    Example:
        >>> machine = {"instruction_sets": ["avx2", "fma"], "forced": {"LENET_EXT_CPU_CAPABILITY": "default"}}
        >>> instruction_set({"machine": machine, "cpu_capability": "default"})
        >>> instruction_set({"machine": {"instruction_sets": ["avx2", "fma"]}, "cpu_capability": "avx2"})
        'avx2'
    """
    capability = content["cpu_capability"]
    forced = content["machine"].get("forced")
    if not forced:
        return capability
    own = _own(content)
    used = {min(own, _named(name, value), key=SETS.index) for name, value in forced.items()}
    if not forced.keys() >= set(VARIABLES[:3]):
        used.add(own)
    return capability if used == {capability} else None


def is_forced(content: dict[str, Any]) -> bool:
    """Whether the run is of something less than the processor offers."""
    return bool(content["machine"].get("forced")) and instruction_set(content) != _own(content)


def processor_title(content: dict[str, Any]) -> str:
    """The processor and its instruction set, for people.

    Example:
        >>> processor_title({"machine": {"cpu": "AMD EPYC"}, "cpu_capability": "avx512"})
        'AMD EPYC, avx512'
        >>> forced = dict.fromkeys(VARIABLES, "default") | {"ONEDNN_MAX_CPU_ISA": "SSE41"}
        >>> machine = {"cpu": "AMD EPYC", "instruction_sets": ["avx2", "fma"], "forced": forced}
        >>> processor_title({"machine": machine, "cpu_capability": "default"})
        'the baseline forced on an AMD EPYC with AVX2'
    """
    machine = content["machine"]
    if not is_forced(content):
        return f"{machine['cpu']}, {content['cpu_capability']}"
    used = instruction_set(content)
    if used is None:
        settings = " ".join(f"{name}={value}" for name, value in machine["forced"].items())
        return f"{machine['cpu']}, {content['cpu_capability']}, with {settings}"
    article = "an" if machine["cpu"][:1] in "AEIOU" else "a"
    return f"{_TITLES[used]} forced on {article} {machine['cpu']} with {_TITLES[_own(content)]}"


def _own(content: dict[str, Any]) -> str:
    """What the processor offers, as far as the system told."""
    flags = set(content["machine"].get("instruction_sets", ()))
    offered = [name for name in SETS if _FLAGS.get(name, set()) <= flags]
    return max([*offered, content["cpu_capability"]], key=SETS.index)


def _named(variable: str, value: str) -> str:
    value = value.lower()
    if variable == "ONEDNN_MAX_CPU_ISA" and value in ("all", "default"):
        return SETS[-1]  # no limit
    return next((name for name in ("avx512", "avx2") if value.startswith(name)), "default")
