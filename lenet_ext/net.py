"""LeNet, fused and stock.

Source of the architecture: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
recognition", Proceedings of the IEEE 86(11), 1998, in the form that PyTorch's tutorial "Neural Networks" gives it
(ReLU, max pooling and plain linear layers).
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import torch.nn.modules.module as global_hooks
from torch import Tensor, nn

from lenet_ext import pretrained
from lenet_ext._C import call_lenet, is_ordinary_lenet, untouched_parameters
from lenet_ext.nn import ConvReLUMaxPool2d, Linear, LinearReLU
from lenet_ext.pretrained.files import load_into

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
        # What is known of pretrained weights. Without an annotation, which torch.jit.script would take for its own.
        self.config = dict[str, Any]()

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            output = self._as_one_operator(input)
            if output is not None:
                return output
        features = self.conv2(self.conv1(input))
        return self.fc3(self.fc2(self.fc1(features.flatten(-3))))

    def to_reference(self) -> ReferenceNet:
        """The same network from stock layers, for what knows no other: quantizers, tools that go by a type.

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

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Net:
        """A trained network.

        Args:
            name_or_path: ``"mnist"``, whose weights are in this package; a folder that :meth:`save_pretrained` or
                ``lenet-ext train`` wrote; or a file of weights (safetensors, or a state dict of ``torch.save``, also
                of a wrapped network and in half precision).
            device, dtype: of the parameters; by default the CPU's, and torch's default dtype.

        Returns:
            A network in eval mode. Its attribute ``config`` is what is known of the weights: ``data``, ``labels`` and
            ``normalization``, whose ``mean`` and ``std`` say what the network wants to see:
            ``(byte / 255 - mean) / std``, for MNIST of bright ink on a black ground.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it is damaged, or holds something else than the weights of LeNet.
            ImportError: safetensors is not installed (``pip install 'lenet_ext[train]'``).

        Example:
            >>> import torch, lenet_ext
            >>> net = lenet_ext.Net.from_pretrained("mnist")
            >>> net.config["normalization"], net.config["test_accuracy"] > 0.992
            ({'mean': 0.1, 'std': 0.2752}, True)
        """
        weights = pretrained.load_pretrained(name_or_path)
        # On the meta device first: initial values would only take time, and numbers from the random generator.
        net = cls(*(pretrained.sizes(weights.state) or ()), device="meta", dtype=dtype).to_empty(device=device or "cpu")
        load_into(net, weights.state, os.fspath(name_or_path))
        net.config = weights.metadata
        return net.eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, config: dict[str, Any] | None = None) -> None:
        """Writes the weights, and what else one must know to use them, for :meth:`from_pretrained` and ``lenet-ext``.

        Args:
            folder: gets ``model.safetensors`` and ``config.json``, and is created where it is missing.
            config: entries of ``config.json`` beside the sizes, all of them optional: ``data`` (the name of a data set
                that ``lenet-ext`` knows: how ``lenet-ext predict`` frames pictures), ``labels`` (a list, what the
                classes are called), ``normalization`` (``{"mean": m, "std": s}``, numbers or lists of one for each
                channel), and anything else that JSON can hold. By default those three, as ``config`` has them; what
                :meth:`from_pretrained` read of accuracy and training is no longer known to be true.

        Raises:
            OSError: a file cannot be written.
            TypeError, ValueError: JSON cannot hold ``config``.
            ImportError: safetensors is not installed (``pip install 'lenet_ext[train]'``).

        Example:
            >>> import tempfile, lenet_ext
            >>> net, folder = lenet_ext.Net(), tempfile.mkdtemp()
            >>> net.save_pretrained(folder, config={"normalization": {"mean": 0.5, "std": 0.25}})
            >>> lenet_ext.Net.from_pretrained(folder).config["normalization"]
            {'mean': 0.5, 'std': 0.25}
        """
        if config is None:
            config = {name: self.config[name] for name in ("data", "labels", "normalization") if name in self.config}
        sizes = {"in_channels": self.conv1.in_channels, "num_classes": self.fc3.out_features}
        pretrained.save_pretrained(folder, self, {**config, **sizes})

    def _as_one_operator(self, input: Tensor) -> Tensor | None:
        """The output, where the network can run as one operator with no observable difference; else None.

        It cannot if anything could look at or change what happens between the layers (hooks, replaced or subclassed
        children, parametrizations, dispatch modes, tracing, torch.compile, torch.func) or if the arguments are not what
        the operator takes, in which case the layers say what is wrong.
        """
        if torch.compiler.is_compiling() or _has_global_hooks():
            return None
        return call_lenet(self._modules, _CHILDREN, input)

    def _parameters_of_whole_network(self, input: Tensor) -> list[Tensor] | None:
        """The ten parameters, under the same conditions."""
        if not torch.compiler.is_compiling() and not _has_global_hooks():
            parameters = untouched_parameters(self._modules, _CHILDREN)
            if parameters is not None and is_ordinary_lenet(input, parameters):
                return parameters
        return None


# The options of both convolutions of an unmodified Net, as a layer stores them, and its children.
_CONVOLUTION = (
    ("stride", (1, 1)),
    ("padding", (0, 0)),
    ("dilation", (1, 1)),
    ("groups", 1),
    ("pool_kernel_size", 2),
    ("pool_stride", 2),
    ("pool_padding", 0),
    ("pool_dilation", 1),
    ("ceil_mode", False),
)
_CHILDREN: tuple[tuple[str, type[nn.Module], tuple[tuple[str, object], ...]], ...] = (
    ("conv1", ConvReLUMaxPool2d, _CONVOLUTION),
    ("conv2", ConvReLUMaxPool2d, _CONVOLUTION),
    ("fc1", LinearReLU, ()),
    ("fc2", LinearReLU, ()),
    ("fc3", Linear, ()),
)

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
