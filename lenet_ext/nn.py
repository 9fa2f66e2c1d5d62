"""The fused operations as modules: subclasses of stock's layers, with the same parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenet_ext import functional

__all__ = ["ConvReLUMaxPool2d", "Linear", "LinearReLU", "ReLUAvgPool2d"]


class ConvReLUMaxPool2d(nn.Conv2d):
    """``nn.Sequential(nn.Conv2d(...), nn.ReLU(), nn.MaxPool2d(...))`` in one kernel.

    Parameters, their initial values and the keys of the ``state_dict`` are those of ``nn.Conv2d``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: as in
            ``nn.Conv2d``.
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode: as in ``nn.MaxPool2d``.

    Shape:
        ``(N, C, H, W)`` or ``(C, H, W)`` to ``(N, O, H', W')`` or ``(O, H', W')``; see
        :func:`lenet_ext.functional.conv_relu_max_pool2d`, which also lists the errors.

    Example:
        >>> import torch, lenet_ext
        >>> lenet_ext.nn.ConvReLUMaxPool2d(1, 6, 5)(torch.randn(1, 1, 32, 32)).shape
        torch.Size([1, 6, 14, 14])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        pool_kernel_size: Any = 2,
        pool_stride: Any = None,
        pool_padding: Any = 0,
        pool_dilation: Any = 1,
        ceil_mode: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_kernel_size if pool_stride is None else pool_stride
        self.pool_padding = pool_padding
        self.pool_dilation = pool_dilation
        self.ceil_mode = ceil_mode

    def _options(self, weight: Tensor) -> tuple:
        """The normalised options, computed again only when an attribute was changed."""
        attributes = _option_attributes(self)
        # The shape of a replaced weight counts, not what the constructor was told.
        kernel_size = functional.kernel_size_of(weight) if isinstance(attributes[1], str) else (0, 0)
        cached = self.__dict__.get("_normalized")
        if cached is None or cached[0] != attributes or cached[1] != kernel_size:
            options = functional.normalize_options(*attributes, kernel_size)  # type: ignore[call-arg]
            if any(isinstance(attribute, list) for attribute in attributes):
                return options  # a list may change in place
            cached = self._normalized = (attributes, kernel_size, options)
        return cached[2]

    def _scripted(self, input: Tensor) -> Tensor:
        """What torch.jit.script makes of a forward pass: of Python it takes only a part."""
        size = self.pool_kernel_size
        window = size * size if isinstance(size, int) else size[0] * size[1]
        if input.dim() != 4 or window > 255 or not functional.scripted_has_kernel(input):
            return F.max_pool2d(
                F.relu(self._conv_forward(input, self.weight, self.bias)),
                self.pool_kernel_size,
                self.pool_stride,
                self.pool_padding,
                self.pool_dilation,
                self.ceil_mode,
            )
        if isinstance(self.padding, str):
            left, right, top, bottom = self._reversed_padding_repeated_twice
        else:
            top, left = self.padding
            bottom, right = self.padding
        return torch.ops.lenet_ext.conv_relu_max_pool2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            [top, bottom, left, right],
            self.dilation,
            self.groups,
            self.pool_kernel_size,
            self.pool_stride,
            self.pool_padding,
            self.pool_dilation,
            self.ceil_mode,
        )

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._scripted(input)
        weight, bias = self.weight, self.bias  # read once: a parametrized weight is computed at every reading
        if torch.compiler.is_compiling() or torch.overrides.has_torch_function_variadic(input, weight):
            return functional.conv_relu_max_pool2d(
                input,
                weight,
                bias,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                pool_kernel_size=self.pool_kernel_size,
                pool_stride=self.pool_stride,
                pool_padding=self.pool_padding,
                pool_dilation=self.pool_dilation,
                ceil_mode=self.ceil_mode,
            )
        return functional.conv_relu_max_pool2d_normalized(input, weight, bias, self._options(weight))

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        _refuse_to_mkldnn(self)
        return super().named_children()

    def extra_repr(self) -> str:
        pool = [f"pool_kernel_size={self.pool_kernel_size}"]
        if self.pool_stride != self.pool_kernel_size:
            pool.append(f"pool_stride={self.pool_stride}")
        if self.pool_padding not in (0, (0, 0)):
            pool.append(f"pool_padding={self.pool_padding}")
        if self.pool_dilation not in (1, (1, 1)):
            pool.append(f"pool_dilation={self.pool_dilation}")
        if self.ceil_mode:
            pool.append("ceil_mode=True")
        return ", ".join([super().extra_repr(), *pool])


# One call instead of nine: the options are asked for in every forward pass.
_option_attributes: Callable[[ConvReLUMaxPool2d], tuple[Any, ...]] = attrgetter(
    "stride",
    "padding",
    "dilation",
    "groups",
    "pool_kernel_size",
    "pool_stride",
    "pool_padding",
    "pool_dilation",
    "ceil_mode",
)


class Linear(nn.Linear):
    """``nn.Linear`` on the kernel of :func:`lenet_ext.functional.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


# --8<-- [start:linear-relu]
class LinearReLU(nn.Linear):
    """``nn.Sequential(nn.Linear(...), nn.ReLU())`` in one kernel, :func:`lenet_ext.functional.linear_relu`.

    Parameters, their initial values and the keys of the ``state_dict`` are those of ``nn.Linear``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear_relu(input, self.weight, self.bias)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        _refuse_to_mkldnn(self)
        return super().named_children()


# --8<-- [end:linear-relu]


class ReLUAvgPool2d(nn.AvgPool2d):
    """``nn.Sequential(nn.ReLU(), nn.AvgPool2d(...))`` in one pass, :func:`lenet_ext.functional.relu_avg_pool2d`.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as in ``nn.AvgPool2d``.

    Example:
        >>> import torch, lenet_ext
        >>> lenet_ext.nn.ReLUAvgPool2d(2)(torch.randn(1, 6, 28, 28)).shape
        torch.Size([1, 6, 14, 14])
    """

    def _scripted(self, input: Tensor) -> Tensor:
        """What torch.jit.script makes of a forward pass: of Python it takes only a part."""
        if input.dim() == 4 and functional.scripted_has_kernel(input):
            return torch.ops.lenet_ext.relu_avg_pool2d(
                input,
                self.kernel_size,
                self.stride,
                self.padding,
                self.ceil_mode,
                self.count_include_pad,
                self.divisor_override,
            )
        return F.avg_pool2d(
            F.relu(input),
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._scripted(input)
        return functional.relu_avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


def _refuse_to_mkldnn(layer: nn.Module) -> None:
    """``torch.utils.mkldnn.to_mkldnn`` takes the layer for the stock one that it is a subclass of.

    It would put a layer without ReLU and pooling in its place, but asks for its children before.
    """
    if sys._getframe(2).f_globals.get("__name__") == "torch.utils.mkldnn":
        raise RuntimeError(
            f"to_mkldnn cannot convert {type(layer).__name__}, whose ReLU it would leave out; "
            "lenet_ext.unfuse(model) makes it stock layers, which it can convert"
        )
