"""The CUDA side, built for the CPU."""

from __future__ import annotations

import pytest
import torch

from cuda_on_cpu import build


@pytest.fixture(scope="session")
def library():
    """Loaded once: a process can register its operators only once."""
    return build.operators()


@pytest.fixture(scope="module")
def control(library):
    """The library's control functions; deterministic mode fills what is allocated with NaN."""
    torch.use_deterministic_algorithms(True)
    yield library
    library.cuda_on_cpu_configure(-1, 0, 0)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def ops(control):
    control.cuda_on_cpu_configure(-1, 0, 0)
    return torch.ops.lenet_ext_cuda_on_cpu
