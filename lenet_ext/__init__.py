"""Fused C++ and CUDA kernels for small convolutional networks in PyTorch."""

import torch  # noqa: F401  loads the libraries that ours is linked against

from lenet_ext._build import build_info, check_build
from lenet_ext._version import __version__

check_build()

from lenet_ext import autograd, batching, decompositions, functional, nn  # noqa: E402, F401  only after the check
from lenet_ext.fusion.fuse import fuse  # noqa: E402
from lenet_ext.fusion.unfuse import unfuse  # noqa: E402
from lenet_ext.net import Net, ReferenceNet  # noqa: E402
from lenet_ext.on_import import register_on_import  # noqa: E402
from lenet_ext.training_step import TrainingStep  # noqa: E402

register_on_import()

__all__ = [
    "Net",
    "ReferenceNet",
    "TrainingStep",
    "__version__",
    "autograd",
    "build_info",
    "functional",
    "fuse",
    "nn",
    "unfuse",
]
