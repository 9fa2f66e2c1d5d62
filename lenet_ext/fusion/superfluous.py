"""ReLU and pooling modules whose work a fused layer does: they stay in the model, and say so.

They are what other tools look for, by their class: to hook them, above all. What such a hook would see is no longer
what the module would be given, so that registering one is an error.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn

_STOCK = "_lenet_ext_stock"
_REGISTRATIONS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_backward_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


@dataclass(frozen=True)
class _Refusal:
    """Stands in a module's attributes before the method of the same name."""

    message: str

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(self.message)


def refuse_hooks(module: nn.Module, name: str, layer: str) -> None:
    """Lets a module that a chain goes through, or ended in, refuse hooks. `name`, `layer`: paths, for the message."""
    message = (
        f"{name} ({type(module).__name__}) takes no hook: lenet_ext.fuse made its work, or that around it, a part of "
        f"{layer}, and a hook would see other values than before; lenet_ext.unfuse(model) gives the stock layers back"
    )
    for registration in _REGISTRATIONS:
        module.__dict__[registration] = _Refusal(message)


def accept_hooks(module: nn.Module) -> None:
    """Takes back :func:`refuse_hooks`."""
    for registration in _REGISTRATIONS:
        if isinstance(module.__dict__.get(registration), _Refusal):
            del module.__dict__[registration]


def stand_in(module: nn.Module) -> nn.Module:
    """A module of the same class and options that passes its input on, for a place where the other is called."""
    other = copy.copy(module)
    other.__dict__[_STOCK] = module  # no submodule: a model has the same modules and names as before
    other.forward = _pass_on
    other.__dict__["extra_repr"] = partial(_repr_of_stand_in, module)
    other.__dict__["__prepare_scriptable__"] = partial(_scriptable, module)
    return other


def _scriptable(module: nn.Module) -> nn.Module:
    """What torch.jit.script puts in a stand-in's place: it knows no ``forward`` but those of classes."""
    other = nn.Identity()
    other.__dict__[_STOCK] = module
    return other


def stands_for(module: nn.Module) -> nn.Module | None:
    """The module of which it is the :func:`stand_in`, or None."""
    return module.__dict__.get(_STOCK)


def _repr_of_stand_in(module: nn.Module) -> str:
    return ", ".join(filter(None, (module.extra_repr(), "done by the fused layer")))


def _pass_on(input: Tensor) -> Tensor:
    return input
