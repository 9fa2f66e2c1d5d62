"""Shared set-up of the test suite: devices, seeds, threads, hypothesis profile."""

from __future__ import annotations

import os
import tempfile

if "ATEN_CPU_CAPABILITY" in os.environ:
    # torch.compile keeps its code by what it computes, not by the instruction set that it was told to write for: code
    # for another one writes past the end of its buffers.
    _cache = os.path.join(tempfile.gettempdir(), f"torchinductor-{os.environ['ATEN_CPU_CAPABILITY']}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _cache)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers share the cores. Whoever tests threads asks for a number of them; so do the processes begun here.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# The same examples in every run: a red build can be repeated, and a green one does not depend on luck. `make test-all`
# takes more of them. To search for new examples on purpose: HYPOTHESIS_PROFILE=explore pytest.
_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    # A failing example is made small, but not explained: that runs the kernels many hundred times more.
    "phases": [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
}
settings.register_profile("repeatable", derandomize=True, max_examples=100, database=None, print_blob=True, **_COMMON)
settings.register_profile("thorough", parent=settings.get_profile("repeatable"), max_examples=500)
settings.register_profile("explore", max_examples=2000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# PyTorch's own sample inputs come with a module that, once imported, forbids setting torch.backends' flags in the whole
# process. The other tests set them as users do, and put them back.
torch.backends.disable_global_flags = lambda: None  # type: ignore[attr-defined]

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


# Of those that are longest, which are begun first: otherwise one of them is left when all others are done.
LONGEST = (
    "test_driver_under_the_sanitizers",
    "test_the_sdist_builds_and_installs_elsewhere",
    "test_hot_kernels_live_in_registers",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name not in LONGEST)


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine, the CPU always."""
    return request.param


@pytest.fixture(autouse=True)
def _repeatable():
    """A fixed seed, the number of threads as it was, and convolutions in float32 that mean float32.

    By default they may be TF32: stock's and ours on a GPU, and ours of test_cuda_on_cpu.py.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
