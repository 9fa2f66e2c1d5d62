"""Finds the chains of layers that a fused layer can replace: conv -> ReLU -> max-pool and linear -> ReLU.

A chain is followed along the one use of each intermediate value, from call to call, and in and out of the modules that
it passes through, as long as nobody else can see the difference.
"""

from __future__ import annotations

import dis
import gc
import inspect
import types
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lenet_ext import functional
from lenet_ext.fusion.forward_graph import (
    ForwardGraphs,
    UnreadableError,
    has_hooks,
    instructions,
    is_attribute,
    is_local,
    own_classes,
    read_forward,
)

_RELUS = {torch.relu, torch.relu_, F.relu}
_MAX_POOLS = {torch.max_pool2d, F.max_pool2d}
_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
# What every module has; looked into in other ways.
_STATE = frozenset(nn.Module().__dict__)
# What walks over a module's children without naming them.
_WALKERS = {"_modules", "children", "modules", "named_children", "named_modules", "get_submodule", "__dict__", "apply"}

# What a method can do with `self` without getting at the members of a Sequential.
_HARMLESS = {"STORE_ATTR", "LOAD_SUPER_ATTR", "RETURN_VALUE"}


class Owner:
    """A module of the model, where it is, and what its ``forward`` does, or why that cannot be told."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.graphs: ForwardGraphs | None = None
        self.unreadable = ""
        # A class of torch calls its children and shows nobody what is between; Sequential is read like any other.
        self.is_stock = not self.is_sequential and not own_classes(type(module))
        if self.is_stock:
            self.unreadable = "is a module of torch"
            return
        try:
            self.graphs = read_forward(module)
        except UnreadableError as error:
            self.unreadable = str(error)

    @property
    def is_sequential(self) -> bool:
        # Statically: a script module's is a descriptor that cannot be asked for without an object.
        return inspect.getattr_static(type(self.module), "forward") is nn.Sequential.forward

    @property
    def name(self) -> str:
        return self.path or "the model"


@dataclass(frozen=True)
class Step:
    """One call in a branch of the owner's ``forward``."""

    owner: Owner
    branch: int
    node: fx.Node

    def child(self) -> nn.Module:
        return self.owner.module.get_submodule(str(self.node.target))

    def __str__(self) -> str:
        if self.node.op == "call_module":
            where = f"{self.owner.path}.{self.node.target}" if self.owner.path else str(self.node.target)
            return f"{type(self.child()).__name__} ({where})"
        target = self.node.target
        return target if isinstance(target, str) else getattr(target, "__name__", str(target))


@dataclass(frozen=True)
class Chain:
    """A layer, the calls that its fused form makes superfluous, and the pooling's options if it is a convolution."""

    layer: nn.Module
    pool: dict[str, Any] | None
    superfluous: tuple[Step, ...]
    owners: tuple[Owner, ...]


@dataclass(frozen=True)
class Mention:
    """A method of a module that names one of the modules in it, to call that, or to go on with it in any other way."""

    method: str
    named: nn.Module
    is_call: bool


class NoChainError(Exception):
    """Why a layer is left as it is."""


class Model:
    """What calls what in a model."""

    def __init__(self, root: nn.Module) -> None:
        self.owners = {id(module): Owner(path, module) for path, module in root.named_modules()}
        self.root = root
        self.calls: dict[int, list[Step]] = defaultdict(list)
        self.read: set[int] = set()
        self.held: dict[int, str] = {}
        self.mentions: list[Mention] = []
        for owner in self.owners.values():
            for index, branch in enumerate(owner.graphs.branches if owner.graphs else ()):
                for node in branch.graph.nodes:
                    if node.op == "call_module":
                        step = Step(owner, index, node)
                        self.calls[id(step.child())].append(step)
                    elif node.op == "get_attr":
                        self._note_read(owner, str(node.target))
            for path in owner.graphs.nones if owner.graphs else ():
                self._note_read(owner, path)
            for name, value in owner.module.__dict__.items():
                if name not in _STATE:
                    self.held |= dict.fromkeys(_held_modules(value), f"held by the attribute {name} of {owner.name}")
            self.mentions += _mentions(owner)

    def _note_read(self, owner: Owner, path: str) -> None:
        """Notes the module that has the attribute."""
        holder = path.rpartition(".")[0]
        if holder:
            self.read.add(id(owner.module.get_submodule(holder)))

    # --- who can see a module ---

    def _only_calls(self, module: nn.Module) -> list[Step]:
        """The calls of a module that is called at one place only: one per branch that it is in."""
        calls = self.calls[id(module)]
        if not calls:
            unreadable = [o for o in self.owners.values() if o.unreadable and not isinstance(o.module, _CONTAINERS)]
            holders = [owner for owner in unreadable if _holds(owner.module, module)]
            if not holders:
                raise NoChainError("never called")
            raise NoChainError(f"in {holders[-1].name}, which {holders[-1].unreadable}")  # the innermost
        places = {id(step.owner) for step in calls}
        if len(places) > 1 or len({step.branch for step in calls}) < len(calls):
            raise NoChainError("called more than once")
        self._check_hidden_callers(module)
        return calls

    def _check_hidden_callers(self, module: nn.Module) -> None:
        """Modules with a ``forward`` that cannot be read, other methods and attributes may call a module as well."""
        for owner in self.owners.values():
            if not owner.unreadable or isinstance(owner.module, _CONTAINERS):
                continue
            for path, child in _children(owner.module):
                if child is module:
                    raise NoChainError(f"maybe called by {owner.name}, which {owner.unreadable}")
                if not owner.is_stock and _holds(child, module) and _reaches_into(owner.module, path):
                    raise NoChainError(f"maybe called by {owner.name}, which {owner.unreadable}")
        if id(module) in self.held:
            raise NoChainError(f"also {self.held[id(module)]}")
        for mention in self.mentions:
            if mention.named is module:
                raise NoChainError(f"also called by {mention.method}")
            if not mention.is_call and _holds(mention.named, module):
                raise NoChainError(f"maybe called by {mention.method}")

    # --- along a value ---

    def _cross(self, owner: Owner) -> Step:
        """The one call of a module that a chain goes into or out of."""
        if owner.module is self.root:
            raise NoChainError("its output is the model's output")
        if has_hooks(owner.module):
            raise NoChainError(f"{owner.name} has hooks")
        try:
            call = self._only_calls(owner.module)[0]
        except NoChainError as error:
            raise NoChainError(f"{owner.name} is {error}") from None
        for module in (owner, call.owner):
            if module.graphs and len(module.graphs.branches) > 1:
                raise NoChainError(f"{module.name} has branches")
        return call

    def following(self, step: Step, passed: list[Owner]) -> Step:
        """The one call that takes the step's value; the owners of the calls on the way are added to `passed`."""
        owner, branch, node = step.owner, step.branch, step.node
        while True:
            passed.append(owner)
            uses = [user for user in node.users for use in _arguments(user) if use is node]
            if len(uses) != 1:
                raise NoChainError("its output is used more than once" if uses else "its output is not used")
            user = uses[0]
            if user.op == "output":
                if user.args[0] is not node:
                    raise NoChainError("its output is one of several outputs")
                call = self._cross(owner)
                owner, branch, node = call.owner, call.branch, call.node
                continue
            taker = Step(owner, branch, user)
            inner = self.owners[id(taker.child())] if user.op == "call_module" else None
            if inner is None or inner.graphs is None:
                return taker
            if user.args != (node,) or user.kwargs:
                raise NoChainError(f"followed by {taker}, which takes more than one argument")
            self._cross(inner)
            owner, branch, node = inner, 0, next(iter(inner.graphs.branches[0].graph.nodes))

    # --- chains ---

    def chain(self, layer: nn.Module) -> Chain:
        """The chain that starts at a convolution or a linear layer.

        Raises:
            NoChainError: there is none.
        """
        check_layer(layer)
        calls = self._only_calls(layer)
        if any(len(call.node.args) != 1 or call.node.kwargs for call in calls):
            raise NoChainError("called in an unusual way")
        found = [self._chain_from(layer, call) for call in calls]
        if any(chain.pool != found[0].pool for chain in found):
            raise NoChainError("followed by different poolings in different branches")
        superfluous = tuple(step for chain in found for step in chain.superfluous)
        return Chain(layer, found[0].pool, superfluous, tuple(o for chain in found for o in chain.owners))

    def _chain_from(self, layer: nn.Module, call: Step) -> Chain:
        is_conv = isinstance(layer, nn.Conv2d)
        owners: list[Owner] = []
        has_relu, pool, superfluous = False, None, []
        step = call
        while True:
            passed: list[Owner] = []
            try:
                step = self.following(step, passed)
                options = _pool_options(step) if is_conv and pool is None else None
                kind = "pool" if options is not None else _kind(step)
                if not kind:
                    raise NoChainError(f"followed by {step}")
                self._check_superfluous(step)
            except NoChainError as error:
                if has_relu and (pool is not None or not is_conv):
                    break
                reason = f"{error}"
                if has_relu:
                    reason = f"no max-pool after its ReLU: {error}"
                elif pool is not None:
                    reason = f"no ReLU after its max-pool: {error}"
                raise NoChainError(reason) from None
            owners += passed
            if kind == "identity":
                continue
            superfluous.append(step)
            if kind == "pool":
                pool = options
            else:
                has_relu = True
        if pool is not None:
            _check_pool(layer, pool)
        return Chain(layer, pool, tuple(superfluous), tuple(owners))

    def _check_superfluous(self, step: Step) -> None:
        if step.node.op != "call_module":
            return
        child = step.child()
        if has_hooks(child):
            raise NoChainError(f"{step} has hooks")
        if "forward" in child.__dict__:
            raise NoChainError(f"{step} has its forward replaced")
        if step.owner.is_sequential:
            # Its place in the Sequential is going to be taken, which whoever calls it there would notice.
            if any(not other.owner.is_sequential for other in self.calls[id(child)]):
                raise NoChainError(f"{step} is called elsewhere")
            if id(child) in self.read:
                raise NoChainError(f"followed by {step}, whose attributes are read")
            self._check_hidden_callers(child)

    def batch_norm_after(self, layer: nn.Module) -> list[Step]:
        """The calls of the BatchNorm2d that takes a convolution's output, and nobody else's.

        Raises:
            NoChainError: there is none.
        """
        check_layer(layer)
        steps = [self.following(call, []) for call in self._only_calls(layer)]
        norms = {id(step.child()) if step.node.op == "call_module" else None for step in steps}
        norm = steps[0].child() if len(norms) == 1 and None not in norms else None
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None or has_hooks(norm):
            raise NoChainError(f"followed by {steps[0]}")
        if "forward" in norm.__dict__ or id(layer) in self.read or id(norm) in self.read:
            raise NoChainError(f"followed by {steps[0]}, and one of the two is used in other ways")
        if {id(step.node) for step in self._only_calls(norm)} != {id(step.node) for step in steps}:
            raise NoChainError(f"{steps[0]} is called elsewhere")
        return steps


def check_layer(layer: nn.Module) -> None:
    """Raises NoChainError unless the layer does what stock's Conv2d or Linear does."""
    if type(layer) not in (nn.Conv2d, nn.Linear):
        raise NoChainError(f"a subclass of torch's layer: {type(layer).__name__}")
    if has_hooks(layer):
        raise NoChainError("has hooks")
    if "forward" in layer.__dict__:
        raise NoChainError("has its forward replaced")
    for name, parameter in layer.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:  # a quantized or distributed one, which has its own ways with F.linear
            raise NoChainError(f"its {name} is a {type(parameter).__name__}")
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise NoChainError(f"padding_mode={layer.padding_mode!r}")


def _arguments(node: fx.Node) -> list[fx.Node]:
    """The node's inputs, each as often as it is used."""
    inputs: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), inputs.append)
    return inputs


def _kind(step: Step) -> str:
    """relu, identity or, for everything else, nothing."""
    node = step.node
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        return {nn.ReLU: "relu", nn.Identity: "identity"}.get(type(step.child()), "")
    if node.op == "call_function" and node.target in _RELUS:
        return "relu"
    return "relu" if node.op == "call_method" and node.target in ("relu", "relu_") else ""


def _pool_options(step: Step) -> dict[str, Any] | None:
    """The options of a max-pooling that a fused layer can do, by the names that the layer has for them."""
    node = step.node
    if node.op == "call_module":
        module = step.child()
        if type(module) is not nn.MaxPool2d or len(node.args) != 1 or node.kwargs:
            return None
        given = {name: getattr(module, name) for name in _POOL_ARGUMENTS[1:]}
    elif node.op == "call_function" and node.target in _MAX_POOLS:
        given = dict(zip(_POOL_ARGUMENTS, node.args, strict=False)) | node.kwargs
    else:
        return None
    if given.pop("return_indices", False) is not False:
        return None
    given.pop("input", None)
    stride = given.get("stride")
    options = {
        "pool_kernel_size": given.get("kernel_size"),
        "pool_stride": given.get("kernel_size") if stride is None or stride in ((), []) else stride,
        "pool_padding": given.get("padding", 0),
        "pool_dilation": given.get("dilation", 1),
        "ceil_mode": given.get("ceil_mode", False),
    }
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    parts = [part for value in options.values() for part in (value if isinstance(value, tuple) else (value,))]
    if not all(isinstance(part, int) for part in parts):
        raise NoChainError(f"followed by {step}, whose options are computed")
    return options


def _check_pool(layer: nn.Module, pool: dict[str, Any]) -> None:
    try:
        # Any kernel will do: only "same" depends on it.
        conv = (layer.stride, layer.padding, layer.dilation, layer.groups)
        functional.normalize_options(*conv, *pool.values(), kernel_size=(1, 1))  # type: ignore[misc]
    except (RuntimeError, TypeError, ValueError) as error:
        raise NoChainError(str(error)) from None


# --- modules whose forward cannot be read ----------------------------------------------------------------------------


def _holds(holder: nn.Module, module: nn.Module) -> bool:
    return any(inner is module for inner in holder.modules() if inner is not holder)


def _children(module: nn.Module) -> Iterator[tuple[str | None, nn.Module]]:
    """The children with their names; those in a ModuleList or ModuleDict count as the module's own, without a name."""
    for name, child in module._modules.items():
        if isinstance(child, _CONTAINERS):
            yield from ((None, inner) for _, inner in _children(child))
        elif child is not None:
            yield name, child


def _methods(module: nn.Module) -> dict[str, list[types.FunctionType]]:
    """The functions that the module's classes define, torch's left out, by name."""
    found: dict[str, list[types.FunctionType]] = defaultdict(list)
    for cls in own_classes(type(module)):
        for name, value in cls.__dict__.items():
            value = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(value, types.FunctionType):
                found[name].append(value)
    return found


def _is_call(instruction: dis.Instruction) -> bool:
    """Is the attribute loaded in order to be called, and nothing else?"""
    if instruction.opname == "LOAD_METHOD":
        return True
    # From 3.12 on both are LOAD_ATTR, with the difference in the lowest bit.
    return instruction.opname == "LOAD_ATTR" and "LOAD_METHOD" not in dis.opmap and bool((instruction.arg or 0) & 1)


def _reaches_into(module: nn.Module, child: str | None) -> bool:
    """Could the module's ``forward`` call what is inside its child, rather than the child?"""
    methods = _methods(module)
    forward = inspect.getattr_static(type(module), "forward")
    if "forward" in module.__dict__ or not isinstance(forward, types.FunctionType):
        return True
    pending, seen = [forward], set()  # type: ignore[var-annotated]
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        myself = function.__code__.co_varnames[0] if function.__code__.co_varnames else ""
        for body in instructions(function.__code__):
            for position, instruction in enumerate(body):
                following = body[position + 1] if position + 1 < len(body) else None
                if is_local(instruction, myself) and not (
                    following and (is_attribute(following) or following.opname in ("STORE_ATTR", "LOAD_SUPER_ATTR"))
                ):
                    return True
                if is_attribute(instruction):
                    name = instruction.argval
                    if name in _WALKERS or (name == child and not _is_call(instruction)):
                        return True
                    if name in methods:
                        pending += methods[name]
    return False


# --- who else may call a module --------------------------------------------------------------------------------------


def _held_modules(value: Any) -> Iterator[int]:
    """The modules that an attribute's value leads to, by id: in lists, objects, closures, ..."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, (type, types.ModuleType, torch.Tensor, str, bytes, int, float)):
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            yield id(item)
        elif isinstance(item, types.FunctionType):  # not its globals, which lead everywhere
            pending += [*(item.__closure__ or ()), item.__defaults__, item.__kwdefaults__]
        else:
            pending += gc.get_referents(item)


def _mentions(owner: Owner) -> Iterator[Mention]:
    """What the methods mention that neither ``forward`` nor ``__init__`` uses."""
    methods = _methods(owner.module)
    known = set(owner.graphs.functions) if owner.graphs else set()
    pending = [*methods.get("__init__", ())]
    while pending:
        function = pending.pop()
        known.add(function)
        names = {i.argval for body in instructions(function.__code__) for i in body if is_attribute(i)}
        pending += [f for name in names if name in methods for f in methods[name] if f not in known]
    for name, functions in methods.items():
        for function in functions:
            if function not in known and name != "forward":
                for named, is_call in _named_modules(owner.module, function):
                    yield Mention(f"{type(owner.module).__name__}.{name}", named, is_call)


def _named_modules(module: nn.Module, method: types.FunctionType) -> Iterator[tuple[nn.Module, bool]]:
    """The modules that a method names as ``self.name``, ``self.name.name``, ... and whether it calls them."""
    names = method.__code__.co_varnames
    for body in instructions(method.__code__):
        for position, instruction in enumerate(body):
            if not (names and is_local(instruction, names[0])):
                continue
            named, last = module, instruction
            rest = iter(body[position + 1 :])
            following = next(rest, None)
            while following and is_attribute(following) and named._modules.get(following.argval) is not None:
                named, last = named._modules[following.argval], following  # type: ignore[assignment]
                following = next(rest, None)
            if following and is_attribute(following):
                if following.argval in ("forward", "__call__"):
                    yield named, True
            elif named is not module:
                yield named, _is_call(last)
            elif isinstance(module, nn.Sequential) and following and following.opname not in _HARMLESS:
                yield named, False
