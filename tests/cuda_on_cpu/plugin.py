"""A pytest plugin: torch.ops.lenet_ext.* on CPU tensors becomes the CUDA side, run on the CPU.

`pytest -p cuda_on_cpu.plugin` (with tests/ on PYTHONPATH) makes any test of the operators a test of the CUDA host code
and kernels. LENET_EXT_ALGORITHM counts for both sides.
"""

from __future__ import annotations

import os
import warnings

import torch
from hypothesis import HealthCheck, settings

from cuda_on_cpu import build

# For HYPOTHESIS_PROFILE: fibers are slow, and the same tests run with more examples on the CPU's own kernels.
settings.register_profile(
    "cuda_on_cpu",
    derandomize=True,
    max_examples=8,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

_control = build.operators()
_algorithm = {None: -1, "direct": 0, "vendor": 1}[os.environ.get("LENET_EXT_ALGORITHM")]
_control.cuda_on_cpu_configure(_algorithm, 2, 1)
# The vendor is PyTorch's own convolution here: what oneDNN's does in bfloat16 depends on the processor, and NNPACK's
# algorithms round where sums of products do not.
torch.backends.mkldnn.enabled = False
torch.backends.nnpack.set_flags(False)
_overrides = torch.library.Library("lenet_ext", "IMPL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that a kernel is overridden is the point
    for _name in build.operator_names():
        _overrides.impl(_name, getattr(getattr(torch.ops, build.NAMESPACE), _name).default, "CPU")


def pytest_sessionfinish(session) -> None:
    """A run that never reached a kernel of ours has tested nothing."""
    if session.testscollected and _control.cuda_on_cpu_launches() == 0:
        session.exitstatus = 1
        print("no CUDA kernel was launched")
