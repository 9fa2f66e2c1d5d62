"""`unfuse`: the stock layers again."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lenet_ext.fusion.fuse import MADE_BY_FUSE, deep_copy
from lenet_ext.fusion.source import stock_class
from lenet_ext.fusion.superfluous import accept_hooks, stands_for
from lenet_ext.net import Net, ReferenceNet
from lenet_ext.nn import ConvReLUMaxPool2d, Linear, LinearReLU, ReLUAvgPool2d

__all__ = ["unfuse"]

_STOCK_CLASSES: dict[type, type[nn.Module]] = {
    ConvReLUMaxPool2d: nn.Conv2d,
    LinearReLU: nn.Linear,
    Linear: nn.Linear,
    ReLUAvgPool2d: nn.AvgPool2d,
}
# What a fused convolution has in its attributes and a stock one has not.
_POOLING = ("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode")
_POOLING_OF_NET = (2, 2, 0, 1, False)


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Gives a fused model its stock layers back: the inverse of :func:`lenet_ext.fuse`, and of :class:`lenet_ext.Net`.

    For tools that go by the class of a module or hook it, and find nothing in a fused model, or the wrong thing:
    attribution (DeepLift, GuidedBackprop), ``quantize_dynamic``, low-rank adapters, pruning by class, ``to_mkldnn``.
    What they made of the model can be fused again.

    Every layer that :func:`~lenet_ext.fuse` swapped is a ``Conv2d``, ``Linear`` or ``AvgPool2d`` again, the same object
    with the same Parameters and hooks; its ReLU and pooling are where they were, modules under their names and calls in
    the ``forward`` that made them, and may be hooked again. The classes of the model's own modules are what they were.
    A :class:`~lenet_ext.Net` becomes a :class:`~lenet_ext.ReferenceNet`, and a :class:`lenet_ext.nn.Linear` a
    ``Linear``. A hook on a swapped layer that saw the fused output sees the convolution's or linear layer's output
    then. BatchNorm that was folded into a convolution does not come back, nor do options of the pooling that were
    changed since.

    Args:
        model: any module; one without fused layers comes back equal.
        inplace: change and return the model itself, instead of a deep copy.

    Returns:
        The model of stock layers, with the keys of the ``state_dict`` and the values that `model` has.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

    Warns:
        UserWarning: a fused layer stays, because it was not made by :func:`~lenet_ext.fuse`: written into a model as
            ``lenet_ext.nn.LinearReLU``, ``ConvReLUMaxPool2d`` or ``ReLUAvgPool2d``, it has no ReLU or pooling that
            could come back.

    Example:
        >>> import torch, lenet_ext
        >>> fused = lenet_ext.fuse(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()))
        >>> lenet_ext.unfuse(fused)
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: model must be an nn.Module, got {type(model).__name__}")
    if not inplace:
        model = deep_copy(model)
    modules: list[Any] = list(model.modules())
    for module in modules:
        accept_hooks(module)
        module.__dict__.pop("fusion_report", None)
        if stock_class(type(module)) is not type(module):
            object.__setattr__(module, "__class__", stock_class(type(module)))  # past a __setattr__ of its own
        for name, child in module._modules.items():
            if child is not None and (stock := stands_for(child)) is not None:
                accept_hooks(stock)
                module._modules[name] = stock.train(child.training)
        if type(module) is Net and all(_as_in_net(module._modules.get(name), kind) for name, kind in _LAYERS_OF_NET):
            module.__class__ = ReferenceNet  # type: ignore[assignment]
            for name, _ in _LAYERS_OF_NET:
                _make_stock(getattr(module, name))
    staying = []
    for path, module in model.named_modules():
        if isinstance(module, Linear) or MADE_BY_FUSE in module.__dict__:
            _make_stock(module)
        elif isinstance(module, (ConvReLUMaxPool2d, LinearReLU, ReLUAvgPool2d)):
            staying.append(f"{path or 'the model'} ({type(module).__name__})")
    if staying:
        warnings.warn(
            f"unfuse: left as it was, because it was not made by lenet_ext.fuse and has no stock ReLU that could come "
            f"back: {', '.join(staying)}",
            stacklevel=2,
        )
    return model


_LAYERS_OF_NET = (("conv1", ConvReLUMaxPool2d), ("conv2", ConvReLUMaxPool2d), ("fc1", LinearReLU), ("fc2", LinearReLU))


def _as_in_net(layer: Any, kind: type) -> bool:
    """Does ReferenceNet do after the stock layer what this fused one does?"""
    if _bare_class(layer) is not kind:
        return False
    return kind is LinearReLU or tuple(getattr(layer, name) for name in _POOLING) == _POOLING_OF_NET


def _bare_class(module: nn.Module) -> type:
    """The class without what ``torch.nn.utils.parametrize`` put around it."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _make_stock(layer: nn.Module) -> None:
    # An AvgPool2d has a ceil_mode of its own.
    added = () if isinstance(layer, ReLUAvgPool2d) else (*_POOLING, "_normalized")
    for name in (*added, MADE_BY_FUSE):
        layer.__dict__.pop(name, None)
    stock = _STOCK_CLASSES[_bare_class(layer)]
    if parametrize.is_parametrized(layer):  # around the stock class now
        names = {name: value for name, value in vars(type(layer)).items() if name != "__module__"}
        stock = type(f"Parametrized{stock.__name__}", (stock,), names)
    layer.__class__ = stock
