"""Choice of the device."""

from __future__ import annotations

import torch

import lenet_ext

__all__ = ["resolve_device", "synchronize"]


def resolve_device(name: str, *, fused: bool = True) -> torch.device:
    """``"auto"``, ``"cpu"`` or ``"cuda"`` -> a device that can be used.

    Args:
        name: ``"auto"`` is CUDA where both torch and, for the fused kernels, this package can use it.
        fused: whether the kernels of this package are to run on it.

    Raises:
        RuntimeError: CUDA was asked for by name and cannot be used; the message says why.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if name == "cpu":
        return torch.device("cpu")
    reason = _no_cuda_reason(fused)
    if reason is None:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "auto":
        return torch.device("cpu")
    raise RuntimeError(f"device cuda cannot be used: {reason}")


def _no_cuda_reason(fused: bool) -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    info = lenet_ext.build_info()
    if fused and info["cuda"] is None:
        return f"lenet_ext was built without CUDA ({info.get('cuda_reason') or 'no reason recorded'})"
    return None


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
