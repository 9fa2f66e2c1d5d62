"""`fuse`: the fused layers, in a model that was written without them.

First every module's ``forward`` is read into graphs of its own (``forward_graph``), in which the chains of layers are
found (``chains``). Then the model is changed, as little as will do. The convolution or linear layer keeps its object
and its parameters, and gets the class of the fused layer. The calls of ReLU and pooling, now superfluous, go: in a
``Sequential`` an ``Identity`` takes the place of the module; any other module whose ``forward`` makes such a call gets
a subclass of its class, in which nothing but ``forward`` differs. So nothing that hangs on modules or on parameters
(hooks, other methods, attributes, optimizers, ties) notices. Modules whose ``forward`` cannot be read keep it; what is
inside them is looked at all the same.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lenet_ext.fusion.chains import Chain, Model, NoChainError, Step
from lenet_ext.fusion.forward_graph import Recipe
from lenet_ext.net import _has_global_hooks
from lenet_ext.nn import ConvReLUMaxPool2d, Linear, LinearReLU

__all__ = ["FusionRecord", "fuse"]


@dataclass(frozen=True)
class FusionRecord:
    """What :func:`fuse` did with one convolution or linear layer.

    Attributes:
        path: the layer's name in ``model.named_modules()``.
        what: the layers concerned, for example ``"Conv2d + ReLU + MaxPool2d"``.
        fused: whether one kernel does them now.
        reason: why not, or nothing.
    """

    path: str
    what: str
    fused: bool
    reason: str = ""


def fuse(model: nn.Module, *, inplace: bool = False, verbose: bool = False, fold_batch_norm: bool = False) -> nn.Module:
    """Swaps every conv -> ReLU -> max-pool and linear -> ReLU chain of a model for the fused layer.

    Chains are found between modules (``nn.ReLU``, ``nn.MaxPool2d``, ``nn.Sequential`` in any nesting) and in what a
    ``forward`` calls (``F.relu``, ``torch.relu``, ``x.relu()``, ``F.max_pool2d``, in place or not), also with the
    pooling before the ReLU, which is the same function. A chain is swapped only where nobody can tell but by the speed:
    not where a value in between is used elsewhere, or could be seen by a hook, nor around any other operation, nor
    where another method or an attribute of the model reaches the layer by itself. Where it is not certain, the layer is
    left as it is.

    Parameters, buffers, attributes, methods, hooks and the keys of the ``state_dict`` are those of the model, and so is
    its class, or a subclass of it where its ``forward`` had to be rewritten. Attributes that ``forward`` reads,
    ``training`` among them, keep their effect when they change later. What changes the layers themselves comes first:
    replacing one of a fused model by another does not bring back the ReLU and the pooling that belonged to it, setting
    options of a pooling module has no effect any more, and weights that are quantized do not fit the fused kernels.

    Args:
        model: any module, on any device, in training or in evaluation mode.
        inplace: change and return the model itself, instead of a deep copy.
        verbose: print a table of what was fused, and what was not and why.
        fold_batch_norm: first fold each BatchNorm2d into the Conv2d before it, which is the same function in evaluation
            mode only. It changes weights, removes the BatchNorm2d's keys from the ``state_dict``, may add a bias to the
            convolution, and cannot be undone. For inference.

    Returns:
        The fused model. Its ``fusion_report`` is a tuple with a :class:`FusionRecord` for each Conv2d and Linear.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        RuntimeError: ``fold_batch_norm=True``, and the model or a part of it is in training mode.

    Example:
        >>> import torch, lenet_ext
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> fused = lenet_ext.fuse(model)
        >>> type(fused[0]).__name__
        'ConvReLUMaxPool2d'
        >>> fused.fusion_report
        (FusionRecord(path='0', what='Conv2d + ReLU + MaxPool2d', fused=True, reason=''),)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be an nn.Module, got {type(model).__name__}")
    if fold_batch_norm and any(module.training for module in model.modules()):
        raise RuntimeError(
            "fuse: fold_batch_norm=True needs a model in evaluation mode, because in training mode BatchNorm2d depends "
            "on the batch; call model.eval() first"
        )
    title = f"lenet_ext.fuse: {type(model).__name__}"
    if not inplace:
        model = copy.deepcopy(model)
    if fold_batch_norm:
        _fold_batch_norms(model)
    earlier = {record.path: record for record in getattr(model, "fusion_report", ())}
    # Past a __setattr__ of the model's own, which may pass it on or register it.
    report = tuple(_fuse_chains(model, earlier))
    object.__setattr__(model, "fusion_report", report)
    if verbose:
        _print_report(title, report)
    return model


def _fuse_chains(model: nn.Module, earlier: dict[str, FusionRecord]) -> list[FusionRecord]:
    records: list[FusionRecord] = []
    found: list[Chain] = []
    calls = Model(model)
    for path, layer in model.named_modules():
        if isinstance(layer, (ConvReLUMaxPool2d, Linear, LinearReLU)):
            records.append(earlier.get(path, FusionRecord(path, type(layer).__name__, True)))
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            stock = "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"
            try:
                if _has_global_hooks():
                    raise NoChainError("there are hooks on all modules")
                found.append(calls.chain(layer))
                parts = " + ReLU + MaxPool2d" if found[-1].pool is not None else " + ReLU"
                records.append(FusionRecord(path, stock + parts, True))
            except NoChainError as error:
                # A rewritten forward is not read again: what was said of it the first time still holds.
                records.append(earlier.get(path, FusionRecord(path, stock, False, str(error))))
    for chain in found:
        _swap(chain)
    _remove_calls({id(step.node): step for chain in found for step in chain.superfluous}.values())
    owners = {id(owner): owner for chain in found for owner in chain.owners}
    for owner in owners.values():
        changed = any(step.owner is owner for chain in found for step in chain.superfluous)
        # A forward that relies on an attribute being None is rewritten as well, to say so when that is no longer true.
        if owner.graphs is not None and not owner.is_sequential and (changed or owner.graphs.nones):
            owner.module.__class__ = Recipe(type(owner.module), owner.graphs).subclass()
    return records


def _swap(chain: Chain) -> None:
    """Gives the layer the class of the fused one; the object, and all that refers to it, stays."""
    layer = chain.layer
    if chain.pool is None:
        layer.__class__ = LinearReLU
        return
    layer.__class__ = ConvReLUMaxPool2d
    for name, value in chain.pool.items():
        setattr(layer, name, value)


def _remove_calls(steps: Iterable[Step]) -> None:
    for step in steps:
        if step.owner.is_sequential:
            _replace_by_identity(step)
        else:
            step.node.replace_all_uses_with(step.node.all_input_nodes[0])
            step.node.graph.erase_node(step.node)


def _replace_by_identity(step: Step) -> None:
    parent, _, name = str(step.node.target).rpartition(".")
    holder = step.owner.module.get_submodule(parent)
    holder._modules[name] = nn.Identity().train(step.child().training)


def _fold_batch_norms(model: nn.Module) -> None:
    calls = Model(model)
    if _has_global_hooks():
        return
    folds = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            with contextlib.suppress(NoChainError):
                folds.append((layer, calls.batch_norm_after(layer)))
    for conv, steps in folds:
        norm: Any = steps[0].child()
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        for step in steps:
            _replace_by_identity(step)


def _print_report(title: str, records: tuple[FusionRecord, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "operations", "fused", "why not", title=title)
    for record in records:
        table.add_row(record.path or "(the model)", record.what, "yes" if record.fused else "no", record.reason)
    Console().print(table)
