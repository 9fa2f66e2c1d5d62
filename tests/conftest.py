"""Shared set-up of the test suite: devices, seeds, hypothesis profile, markers."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# The same examples in every run: a red build can be repeated, and a green one does not depend on luck. To search for
# new examples on purpose: HYPOTHESIS_PROFILE=explore pytest.
_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    # A failing example is made small, but not explained: that runs the kernels many hundred times more.
    "phases": [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
}
settings.register_profile("repeatable", derandomize=True, max_examples=100, database=None, print_blob=True, **_COMMON)
# For test_variants.py, which runs the same files several times over.
settings.register_profile("variant", parent=settings.get_profile("repeatable"), max_examples=20)
settings.register_profile("explore", max_examples=2000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# PyTorch's own sample inputs come with a module that, once imported, forbids setting torch.backends' flags in the whole
# process. The other tests set them as users do, and put them back.
torch.backends.disable_global_flags = lambda: None  # type: ignore[attr-defined]

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernels: numbers of the kernels; test_variants.py reruns these per algorithm")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


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
