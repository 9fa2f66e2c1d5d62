"""`fuse`: the fused layers, in a model that was written without them.

First the chains of layers are found (``chains``), by the source of every module's methods and in the Sequentials.
Then the model is changed, as little as will do. The convolution or linear layer keeps its object and its parameters,
and gets the class of the fused layer. The calls of ReLU and pooling, now superfluous, go: in a ``Sequential`` another
module stands in for the ReLU or pooling and passes its input on; any other module that makes such a call in a method
gets a subclass of its class, in which nothing but that method differs, and that only by the call. So nothing that hangs
on modules or on parameters (hooks, other methods, attributes, optimizers, ties) notices, and ``unfuse`` takes it back.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lenet_ext.fusion.chains import Chain, Chains
from lenet_ext.fusion.source import with_methods
from lenet_ext.fusion.steps import Method, NoChainError, Step
from lenet_ext.fusion.superfluous import refuse_hooks, stand_in
from lenet_ext.net import _has_global_hooks
from lenet_ext.nn import ConvReLUMaxPool2d, Linear, LinearReLU, ReLUAvgPool2d

__all__ = ["FusionRecord", "fuse"]

# An attribute of the layers that fuse made: their ReLU and pooling are somewhere in the model.
MADE_BY_FUSE = "_made_by_lenet_ext_fuse"


@dataclass(frozen=True)
class FusionRecord:
    """What :func:`fuse` did with one convolution or linear layer, or with an average pooling.

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


def fuse(
    model: nn.Module,
    *,
    inplace: bool = False,
    verbose: bool = False,
    fold_batch_norm: bool = False,
    average_pooling: bool = False,
) -> nn.Module:
    """Swaps every conv -> ReLU -> max-pool and linear -> ReLU chain of a model for the fused layer.

    Chains are found between modules (``nn.ReLU``, ``nn.MaxPool2d``, ``nn.Sequential`` in any nesting) and in what the
    methods of a module call (``F.relu``, ``torch.relu``, ``x.relu()``, ``F.max_pool2d``, in place or not), nested or in
    one statement after the other, also with the pooling before the ReLU, which is the same function. A chain is swapped
    only where nobody can tell but by the speed: not where a value in between is used elsewhere, or seen by a hook, nor
    around any other operation, nor where the layer is called in any other way as well, or handed out by a method or an
    attribute of the model. Where it is not certain, the layer is left as it is.

    Parameters, buffers, attributes, methods, hooks and the keys of the ``state_dict`` are those of the model, and so is
    its class, or a subclass of it in which the calls of ReLU and pooling are left out of a method's source. All else
    that the method does stays as it is written, whether torch.fx could trace it or not. A method is read from its file,
    or Jupyter's cell; a ``forward`` that was typed at a prompt is traced, if a trace can be the whole truth.

    What would see or change the layers themselves comes first, or after :func:`lenet_ext.unfuse`, which gives the stock
    layers back. ReLU and pooling modules that became a part of a fused layer stay under their names, but refuse hooks,
    which would see other values than before. A hook on a fused layer sees what the fused layer returns. Putting another
    module in the place of a fused layer, of its ReLU or its pooling, or setting the options of such a pooling, does not
    do what it would have done to the original. Weights that are quantized do not fit the fused kernels.

    Args:
        model: any module, on any device, in training or in evaluation mode.
        inplace: change and return the model itself, instead of a deep copy.
        verbose: print a table of what was fused, and what was not and why.
        fold_batch_norm: first fold each BatchNorm2d into the Conv2d before it, which is the same function in evaluation
            mode only. It changes weights, removes the BatchNorm2d's keys from the ``state_dict``, may add a bias to the
            convolution, and cannot be undone. For inference.
        average_pooling: also let each ``nn.AvgPool2d`` that takes ReLU's output, behind an ``nn.Conv2d`` or
            ``nn.BatchNorm2d``, do that ReLU as a :class:`lenet_ext.nn.ReLUAvgPool2d`. The convolution is torch's own.

    Returns:
        The fused model. Its ``fusion_report`` is a tuple with a :class:`FusionRecord` for each Conv2d and Linear, and
        for each AvgPool2d that does its ReLU.

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
        model = deep_copy(model)
    if fold_batch_norm and not _has_global_hooks():
        _fold_batch_norms(model)
    earlier = {record.path: record for record in getattr(model, "fusion_report", ())}
    # Past a __setattr__ of the model's own, which may pass it on or register it.
    report = tuple(_fuse_chains(model, earlier, average_pooling))
    object.__setattr__(model, "fusion_report", report)
    if verbose:
        _print_report(title, report)
    return model


def deep_copy(model: nn.Module) -> nn.Module:
    """A deep copy with the hooks and attributes of parameters and buffers, which ``copy.deepcopy`` leaves out."""
    memo: dict[int, Any] = {}
    copied = copy.deepcopy(model, memo)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        other = memo.get(id(tensor))
        if other is None:  # a module copies itself in its own way
            continue
        other.__dict__.update(copy.deepcopy(tensor.__dict__, memo))
        # The dictionaries themselves: registering anew is refused where no gradient is wanted at present.
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(tensor, hooks):
                setattr(other, hooks, copy.deepcopy(getattr(tensor, hooks), memo))
    return copied


def _fuse_chains(model: nn.Module, earlier: dict[str, FusionRecord], average_pooling: bool) -> list[FusionRecord]:
    records: list[FusionRecord] = []
    found: dict[str, Chain] = {}
    chains = Chains(model)
    averaging = average_pooling and not _has_global_hooks()
    averages = {id(chain.layer): chain for chain in chains.average_pools()} if averaging else {}
    for path, layer in model.named_modules():
        if isinstance(layer, (ConvReLUMaxPool2d, Linear, LinearReLU, ReLUAvgPool2d)):
            records.append(earlier.get(path, FusionRecord(path, type(layer).__name__, True)))
        elif id(layer) in averages:
            found[path] = averages[id(layer)]
            records.append(FusionRecord(path, "ReLU + AvgPool2d", True))
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            stock = "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"
            try:
                if _has_global_hooks():
                    raise NoChainError("there are hooks on all modules")
                found[path] = chain = chains.find(layer)
                what = " + ReLU + MaxPool2d" if chain.pool else " + ReLU"
                records.append(FusionRecord(path, stock + what, True))
            except NoChainError as error:
                records.append(FusionRecord(path, stock, False, str(error)))
    # Only now, when nothing is asked of the model any more.
    paths = {id(module): path for path, module in model.named_modules()}
    for path, chain in found.items():
        _swap(chain)
        for module in chain.changed_modules():
            refuse_hooks(module, paths[id(module)], path)
    _remove_calls([step for chain in found.values() for step in chain.superfluous])
    return records


_FUSED_CLASSES = {nn.Conv2d: ConvReLUMaxPool2d, nn.Linear: LinearReLU, nn.AvgPool2d: ReLUAvgPool2d}


def _swap(chain: Chain) -> None:
    """Gives the layer the class of the fused one; the object, and all that refers to it, stays."""
    chain.layer.__class__ = _FUSED_CLASSES[type(chain.layer)]
    for name, value in {**chain.pool, MADE_BY_FUSE: True}.items():
        setattr(chain.layer, name, value)


def _remove_calls(steps: list[Step]) -> None:
    calls: dict[Method, set[ast.AST]] = defaultdict(set)
    for step in steps:
        if step.method is not None and step.call is not None:
            calls[step.method].add(step.call)
        elif step.container is not None and step.module is not None:
            step.container._modules[step.name] = stand_in(step.module)
    for method, superfluous in calls.items():
        rewritten = with_methods(type(method.module), {method.name: method.without(superfluous)})
        object.__setattr__(method.module, "__class__", rewritten)  # past a __setattr__ of its own


def _fold_batch_norms(model: nn.Module) -> None:
    chains = Chains(model)
    folds = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            with contextlib.suppress(NoChainError):
                folds.append((layer, chains.batch_norm_after(layer)))
    for conv, norm in folds:
        mean, variance = norm.running_mean, norm.running_var
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            mean,  # type: ignore[arg-type]
            variance,  # type: ignore[arg-type]
            norm.eps,
            norm.weight,
            norm.bias,
        )
    folded = {id(norm): nn.Identity().train(norm.training) for _, norm in folds}
    for holder in list(model.modules()):
        for name, child in holder._modules.items():
            if id(child) in folded:
                holder._modules[name] = folded[id(child)]


def _print_report(title: str, records: tuple[FusionRecord, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("layer", "operations", "fused", "why not", title=title)
    for record in records:
        cells = (record.path or "(the model)", record.what, "yes" if record.fused else "no", record.reason)
        table.add_row(*map(Text, cells))  # a reason quotes the model's source, whose brackets are no markup
    Console().print(table)
