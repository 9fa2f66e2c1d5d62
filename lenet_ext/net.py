"""LeNet, fused and stock.

Source of the architecture: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
recognition", Proceedings of the IEEE 86(11), 1998, in the form that PyTorch's tutorial "Neural Networks" gives it
(ReLU, max pooling and plain linear layers).
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
import torch.nn.modules.module as global_hooks
from torch import Tensor, nn
from torch.autograd import forward_ad

from lenet_ext import autograd, ops
from lenet_ext._build import build_info
from lenet_ext.nn import ConvReLUMaxPool2d, Linear, LinearReLU

__all__ = ["Net", "ReferenceNet"]


class Net(nn.Module):
    """The fused LeNet: conv 5x5 (6) and conv 5x5 (16), each with ReLU and 2x2 max pooling, then linear
    400 -> 120 -> 84 -> ``num_classes`` with ReLU in between.

    Parameters, their names, order and initial values (after the same ``torch.manual_seed``) are those of
    :class:`ReferenceNet`; state_dicts load both ways.

    Args:
        in_channels: channels of the input.
        num_classes: number of outputs.
        device, dtype: of the parameters.

    Shape:
        ``(N, in_channels, 32, 32)`` to ``(N, num_classes)``, or without ``N``.

    Example:
        >>> import torch, lenet_ext
        >>> lenet_ext.Net()(torch.randn(1, 1, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = ConvReLUMaxPool2d(in_channels, 6, 5, device=device, dtype=dtype)
        self.conv2 = ConvReLUMaxPool2d(6, 16, 5, device=device, dtype=dtype)
        self.fc1 = LinearReLU(16 * 5 * 5, 120, device=device, dtype=dtype)
        self.fc2 = LinearReLU(120, 84, device=device, dtype=dtype)
        self.fc3 = Linear(84, num_classes, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        parameters = self._whole_network_parameters(input)
        if parameters is not None:
            if torch.is_grad_enabled() and (input.requires_grad or any(p.requires_grad for p in parameters)):
                return autograd.apply(autograd.LeNetFunction, *parameters, input)[0]
            return ops.lenet(input, parameters)
        features = self.conv2(self.conv1(input))
        return self.fc3(self.fc2(self.fc1(features.flatten(-3))))

    def to_reference(self) -> ReferenceNet:
        """The same network from stock layers, for what knows no other: exporters, quantizers, other runtimes.

        Returns:
            A network with copies of the parameters, on their device, of their dtype, trainable where they are, in the
            same mode. Hooks stay behind.

        Raises:
            RuntimeError: a layer was replaced by one with other parameters.

        Example:
            >>> import torch, lenet_ext
            >>> net, image = lenet_ext.Net(), torch.randn(1, 1, 32, 32)
            >>> torch.allclose(net.to_reference()(image), net(image), atol=1e-6)
            True
        """
        return _converted(self, ReferenceNet)

    @classmethod
    def from_reference(cls, reference: ReferenceNet) -> Net:
        """The fused network of a stock one: the inverse of :meth:`to_reference`, with the same guarantees.

        Args:
            reference: its parameters are copied.

        Raises:
            TypeError: it is no :class:`ReferenceNet`; for other networks there is :func:`lenet_ext.fuse`.
            RuntimeError: a layer was replaced by one with other parameters.
        """
        if not isinstance(reference, ReferenceNet):
            raise TypeError(
                f"from_reference: reference must be a ReferenceNet, got {type(reference).__name__}; for other networks "
                "there is lenet_ext.fuse"
            )
        return _converted(reference, cls)

    def _whole_network_parameters(self, input: Tensor) -> list[Tensor] | None:
        """The ten parameters if the network can run as one operator with no observable difference, else None.

        It cannot if anything could look at or change what happens between the layers (hooks, replaced or subclassed
        children, parametrizations, dispatch modes, tracing, torch.compile, torch.func) or if the arguments are not what
        the operator takes, in which case the layers say what is wrong.
        """
        on_cpu = type(input) is Tensor and input.is_cpu  # a fifth of the cost of asking for the device
        if (
            type(input) is not Tensor
            or input.dtype is not torch.float32
            or input.dim() != 4
            or not (on_cpu or (input.is_cuda and _has_cuda()))
            or input.layout is not torch.strided
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch.is_autocast_enabled("cpu" if on_cpu else "cuda")
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._len_torch_function_stack() > 0
            or forward_ad._current_level >= 0
            or _has_global_hooks()
        ):
            return None
        modules = self._modules
        if len(modules) != len(_CHILDREN):
            return None
        parameters: list[Tensor] = []
        for name, (kind, weight_shape) in _CHILDREN.items():
            child = modules.get(name)
            if type(child) is not kind or "forward" in child.__dict__ or _has_hooks(child):
                return None
            own = child.__dict__["_parameters"]
            weight, bias = own.get("weight"), own.get("bias")
            # Another dtype or device, or a bias of another size, is an error in the operator as in the layers.
            if (
                type(weight) is not nn.Parameter
                or type(bias) is not nn.Parameter
                or (weight_shape is not None and weight.shape != weight_shape)
                or (type(child) is ConvReLUMaxPool2d and child._options() != autograd.LENET_OPTIONS)
            ):
                return None
            parameters += (weight, bias)
        first = parameters[0].shape
        if first[0] != 6 or first[2:] != (5, 5) or input.shape[1:] != (first[1], 32, 32):
            return None
        return parameters


@cache
def _has_cuda() -> bool:
    """Otherwise the layers say how to build the package with CUDA."""
    return build_info()["cuda"] is not None


# The children of an unmodified Net, and the shapes of their weights where the constructor does not choose them.
_CHILDREN: dict[str, tuple[type[nn.Module], tuple[int, ...] | None]] = {
    "conv1": (ConvReLUMaxPool2d, None),
    "conv2": (ConvReLUMaxPool2d, (16, 6, 5, 5)),
    "fc1": (LinearReLU, (120, 400)),
    "fc2": (LinearReLU, (84, 120)),
    "fc3": (Linear, None),
}


_AnyNet = TypeVar("_AnyNet", "Net", "ReferenceNet")


def _converted(net: Net | ReferenceNet, kind: type[_AnyNet]) -> _AnyNet:
    # On the meta device: initial values would only take time, and numbers from the random generator.
    other = kind(net.conv1.in_channels, net.fc3.out_features, device="meta")
    copies = {name: value.detach().clone() for name, value in net.state_dict().items()}
    other.load_state_dict(copies, assign=True)
    for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    for name, module in other.named_modules():
        module.training = net.get_submodule(name).training
    return other


def _has_hooks(module: nn.Module) -> bool:
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


def _has_global_hooks() -> bool:
    return bool(
        global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or global_hooks._global_backward_hooks
        or global_hooks._global_backward_pre_hooks
    )


class ReferenceNet(nn.Module):
    """The same network made of stock layers: the yardstick of tests and benchmarks. Arguments as :class:`Net`."""

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(6, 16, 5, device=device, dtype=dtype)
        self.fc1 = nn.Linear(16 * 5 * 5, 120, device=device, dtype=dtype)
        self.fc2 = nn.Linear(120, 84, device=device, dtype=dtype)
        self.fc3 = nn.Linear(84, num_classes, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.conv1(input)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        hidden = F.relu(self.fc2(F.relu(self.fc1(features.flatten(-3)))))
        return self.fc3(hidden)
