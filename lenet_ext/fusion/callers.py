"""Who calls the modules of a model, and who gets hold of them in any other way, by the source of its methods.

A module is told by its name: ``self.conv``, ``self.features[0]``, ``self.block.conv``. What a method does with a module
so named is one of three things. It calls it, or it looks at it (its parameters, its options, whether it is None), or it
gives it away: to another function, to a variable, to whoever called the method. Who is given a module can do anything
with it and with all that is inside it.
"""

from __future__ import annotations

import ast
import gc
import inspect
import itertools
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lenet_ext.fusion.source import Source, own_nodes, read_source, stock_class
from lenet_ext.fusion.traced import trace_source
from lenet_ext.net import Net

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What every module has.
_STATE = frozenset(nn.Module().__dict__)
# Attributes of a module by which one gets at what is inside it, or calls it under another name.
_GIVES_AWAY = {"children", "modules", "named_children", "named_modules", "items", "values", "get_submodule", "_modules"}
_GIVES_AWAY |= {"forward", "_call_impl", "pop"}
# By these, anything can be had by a name that is not in the source.
_ANY_NAME = {"eval", "exec", "locals", "globals"}
_LOOKS = {"isinstance", "len", "type", "super", "hasattr", "id", "bool", "print", "repr", "str"}


@dataclass(frozen=True)
class Call:
    """A call of a module in a method of `caller`; of a ModuleList the loop that calls one member after the other."""

    caller: nn.Module
    method: str
    function: types.FunctionType
    source: Source
    node: ast.AST

    def __str__(self) -> str:
        return f"{stock_class(type(self.caller)).__name__}.{self.method}"


class Callers:
    """What the methods of a model do with its modules, all by the id of the module.

    Attributes:
        calls: where it is called by name. What a Sequential does by itself is not in here.
        looked_at: those of which an attribute is read.
        given_away: those that others can get hold of, and why.
    """

    def __init__(self, root: nn.Module) -> None:
        self.calls: dict[int, list[Call]] = defaultdict(list)
        self.looked_at: set[int] = set()
        self.given_away: dict[int, str] = {}
        self._names = {name for module in root.modules() for name in module._modules.keys()}  # noqa: SIM118  torchscript's
        methods = {kind: list(_methods(kind)) for kind in {type(module) for module in root.modules()}}
        self._in_forward = _used_by_forward(method for found in methods.values() for method in found)
        for path, module in root.named_modules():
            self._note_module(path or "the model", module)
            bound: list[tuple[str, Any]] = [
                (name, value.__func__)
                for name, value in module.__dict__.items()
                if isinstance(value, types.MethodType) and value.__self__ is module
            ]
            for name, function in methods[type(module)] + bound:
                self._note_function(module, name, function)

    def _give_away(self, module: nn.Module, why: str) -> None:
        for inner in module.modules():
            self.given_away.setdefault(id(inner), why)

    def _note_module(self, path: str, module: nn.Module) -> None:
        kind = type(module)
        if "forward" in module.__dict__:
            self._give_away(module, f"{path} has its forward replaced")
        if any(name in cls.__dict__ for cls in own_classes(kind) for name in ("__getattr__", "__getattribute__")):
            self._give_away(module, f"{path} looks up its attributes in its own way")
        if isinstance(module, fx.GraphModule):
            self._give_away(module, f"in {path}, which is a GraphModule")
        elif any(_is_torchs(c) and c not in (nn.Module, *CONTAINERS) for c in kind.__mro__):
            for child in module.children():
                self.given_away.setdefault(id(child), f"in {path}, which is a {kind.__name__}")
        for name, value in module.__dict__.items():
            if name not in _STATE and not name.startswith("_lenet_ext"):
                for held, is_near in _held_modules(value):
                    # An object that knows the whole model, such as what trains it, is not there to call a part of it.
                    if is_near or all(inner is not module for inner in held.modules()):
                        self._give_away(held, f"held by the attribute {name} of {path}")

    def _note_function(self, module: nn.Module, name: str, function: types.FunctionType) -> None:
        source = read_source(function) or trace_source(module, name, function)
        is_forward = name in self._in_forward or name in module.__dict__
        label = f"{type(module).__name__}.{name}"
        if source is None:
            if is_forward or (name != "__init__" and not self._names.isdisjoint(_names_in(function.__code__))):
                self._give_away(module, f"the source of {label} is not to be had")
            return
        why = f"maybe called by {label}"
        if is_forward and (not source.first_argument or not _ANY_NAME.isdisjoint(_names_in(function.__code__))):
            self._give_away(module, why)
        # While a module is built nothing is called that is not called anew later, but functions are made.
        unused = set(own_nodes(source.node)) if name == "__init__" else set()
        for use_of_self in source.uses:
            if use_of_self in unused:
                continue
            named: nn.Module = module
            expression: ast.AST = use_of_self
            while (longer := source.parents.get(expression)) and getattr(longer, "value", None) is expression:
                inner = _named_by(longer, named)
                if inner is None:
                    break
                named, expression = inner, longer
            use, parent = self._use(expression, source), source.parents[expression]
            calls = self._calls_of_members(named, expression, source)
            if use == "call" and (isinstance(parent, ast.Call) or is_walked(named)):
                self.calls[id(named)].append(Call(module, name, function, source, parent))
            elif use == "look":
                self.looked_at.add(id(named))
            elif calls is not None:
                for member, call in itertools.product(named.children(), calls):
                    if isinstance(call, ast.Call) or is_walked(member):
                        self.calls[id(member)].append(Call(module, name, function, source, call))
                    else:
                        self._give_away(member, why)
            # Other methods give the whole model to savers, exporters and the like, and put new modules into it.
            elif is_forward or isinstance(module, CONTAINERS) or (named is not module and _is_read(expression)):
                self._give_away(named, why)

    def _use(self, expression: ast.AST, source: Source) -> str:
        """What becomes of an expression that is a module: call, look or, for everything else, nothing."""
        parent = source.parents.get(expression)
        if not _is_read(expression):
            return ""
        if isinstance(parent, ast.Call):
            if parent.func is expression:
                return "call"
            return "look" if isinstance(parent.func, ast.Name) and parent.func.id in _LOOKS else ""
        if isinstance(parent, ast.Attribute):
            is_special = parent.attr.startswith("__") and parent.attr != "__class__"
            return "" if is_special or parent.attr in _GIVES_AWAY else "look"
        if calls_one_by_one(parent, source):
            return "call"
        if isinstance(parent, ast.Compare):
            return "look" if all(isinstance(o, (ast.Is, ast.IsNot)) for o in parent.ops) else ""
        asked = isinstance(parent, ast.UnaryOp) or getattr(parent, "test", None) is expression
        is_self = isinstance(expression, ast.Name) and expression.id == source.first_argument
        return "look" if asked or (is_self and isinstance(parent, ast.Return)) else ""

    def _calls_of_members(self, container: nn.Module, expression: ast.AST, source: Source) -> list[ast.AST] | None:
        """The calls of any one of a container's modules, or None if more is done with them than to call and look.

        They are had by a loop, or by an index that is computed.
        """
        parent = source.parents[expression]
        uses: list[ast.AST] = []
        if isinstance(parent, ast.Subscript) and parent.value is expression:
            if isinstance(parent.slice, ast.Slice) or not is_indexed(container):
                return None
            uses = [parent]
        elif (target := _loop_variable(expression, source)) is not None:
            names = [node for node in ast.walk(source.node) if isinstance(node, ast.Name) and node.id == target.id]
            uses = [name for name in names if _is_read(name)]
        else:
            return None
        goes_deep = getattr(parent, "attr", "") in ("modules", "named_modules")
        calls = []
        for use in uses:
            user = source.parents[use]
            is_child = isinstance(user, ast.Attribute) and user.attr in self._names
            kind = "" if is_child else self._use(use, source)
            if kind == "call" and not goes_deep:
                calls.append(user)
            elif kind != "look":
                return None
        return calls


def _is_read(expression: ast.AST) -> bool:
    return isinstance(getattr(expression, "ctx", None), ast.Load)


def _loop_variable(expression: ast.AST, source: Source) -> ast.Name | None:
    """What stands for one module after the other, in a loop or comprehension over those inside another."""
    parent, position = source.parents.get(expression), -1
    match parent:
        case ast.Attribute(attr="children" | "named_children" | "modules" | "named_modules" | "items" | "values"):
            call = source.parents.get(parent)
            expression = call if isinstance(call, ast.Call) and call.func is parent else expression
        case ast.Call(func=ast.Name(id="enumerate" | "reversed" | "zip" as name), args=arguments):
            position = arguments.index(expression) if name == "zip" else -1  # type: ignore[arg-type]
            expression = parent
    loop = source.parents.get(expression)
    if not isinstance(loop, (ast.For, ast.comprehension)) or loop.iter is not expression:
        return None
    target = loop.target.elts[position] if isinstance(loop.target, (ast.Tuple, ast.List)) else loop.target
    return target if isinstance(target, ast.Name) else None


def _is_torchs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "torch"


def own_classes(module_class: type) -> list[type]:
    """The classes of a module that somebody wrote for the model."""
    foreign = ("builtins", "abc", "typing")
    return [c for c in module_class.__mro__ if not _is_torchs(c) and c.__module__ not in foreign and c is not Net]


def first_function(method: Any) -> Any:
    """What a method was before it was decorated."""
    return inspect.unwrap(method) if isinstance(method, types.FunctionType) else method


def find_module(expression: ast.AST, module: nn.Module, self_name: str) -> nn.Module | None:
    """The module that an expression names: ``self``, ``self.name``, ``self.list[0]``, ..."""
    if isinstance(expression, ast.Name):
        return module if expression.id == self_name else None
    if isinstance(expression, (ast.Attribute, ast.Subscript)):
        holder = find_module(expression.value, module, self_name)
        return None if holder is None else _named_by(expression, holder)
    return None


def calls_one_by_one(loop: ast.AST | None, source: Source) -> bool:
    """Is it ``for layer in self.layers: x = layer(x)``?"""
    match loop:
        case ast.For(
            target=ast.Name(id=layer),
            body=[ast.Assign(targets=[ast.Name(id=to)], value=ast.Call(ast.Name(id=called), [ast.Name(id=taken)], []))],
            orelse=[],
        ) if called == layer and to == taken != layer:
            # Nobody calls the last one again, after the loop.
            reads = [n for n in ast.walk(source.node) if isinstance(n, ast.Name) and n.id == layer and _is_read(n)]
            return all(_is_in_loop(read, source) for read in reads)
    return False


def _is_in_loop(name: ast.Name, source: Source) -> bool:
    """Is it inside a loop that sets it?"""
    outer = source.parents.get(name)
    while outer is not None:
        if isinstance(outer, ast.For) and isinstance(outer.target, ast.Name) and outer.target.id == name.id:
            return True
        outer = source.parents.get(outer)
    return False


def is_walked(container: nn.Module) -> bool:
    """Does a loop over it go through its members?"""
    return any(has_stock(container, kind, "__iter__") for kind in (nn.Sequential, nn.ModuleList))


def is_indexed(container: nn.Module) -> bool:
    """Does an index into it give one of its members?"""
    return any(has_stock(container, kind, "__getitem__") for kind in CONTAINERS)


def has_stock(module: nn.Module, container: type, *names: str) -> bool:
    """Is it a torch container, or of a subclass that does not change these of its methods?"""
    kind = type(module)
    return issubclass(kind, container) and all(getattr(kind, n) is getattr(container, n) for n in names)


def _named_by(expression: ast.AST | None, holder: nn.Module) -> nn.Module | None:
    """The child of `holder` that an attribute of it, or an item with a constant key, is."""
    if isinstance(expression, ast.Attribute):
        hidden = expression.attr in holder.__dict__ or hasattr(type(holder), expression.attr)
        return None if hidden else holder._modules.get(expression.attr)
    if isinstance(expression, ast.Subscript) and is_indexed(holder):
        try:
            key = ast.literal_eval(expression.slice)
            item = holder[key]  # type: ignore[index]
        except (ValueError, TypeError, IndexError, KeyError, AttributeError):
            return None
        return item if isinstance(key, (int, str)) else None
    return None


def _methods(module_class: type) -> Iterator[tuple[str, types.FunctionType]]:
    """The functions that can be called with a module of the class."""
    found: dict[str, list[tuple[type, types.FunctionType]]] = {}
    for cls in own_classes(module_class):
        for name, value in cls.__dict__.items():
            found.setdefault(name, []).extend((cls, function) for function in _functions_in(value))
    # A method that a subclass replaced can only be reached by `super()`.
    names = [_names_in(function.__code__) for functions in found.values() for _, function in functions]
    inherited = set().union(*(n for n in names if "super" in n))
    for name, functions in found.items():
        yield from ((name, f) for cls, f in functions if cls is functions[0][0] or name in inherited)


def _used_by_forward(methods: Iterable[tuple[str, types.FunctionType]]) -> set[str]:
    """The names of the methods that may run when a model is called."""
    names: dict[str, set[str]] = defaultdict(set)
    for name, function in methods:
        names[name] |= _names_in(function.__code__)
    used, pending = {"forward", "__call__"}, ["forward", "__call__"]
    while pending:
        more = names[pending.pop()] & names.keys() - used
        used |= more
        pending += more
    return used


def _functions_in(value: Any) -> Iterator[types.FunctionType]:
    """The functions of a class that take an object of it: of a method, a property, a decorated method, ..."""
    if isinstance(value, (staticmethod, classmethod, type)):
        return
    inside = [value.fget, value.fset, value.fdel] if isinstance(value, property) else [value]
    if not isinstance(value, (types.FunctionType, nn.Module)):
        inside += getattr(value, "__dict__", {}).values()  # functools.cached_property and the like
    for item in inside:
        function = first_function(item)
        if isinstance(function, types.FunctionType):
            yield function


def _names_in(code: types.CodeType) -> set[str]:
    """All names but local variables: of globals, attributes, methods."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def _held_modules(value: Any) -> Iterator[tuple[nn.Module, bool]]:
    """The modules that an attribute's value leads to, and whether by no more than lists, closures and the like."""
    pending, seen = [(value, True)], set()
    while pending:
        item, is_near = pending.pop()
        if id(item) in seen or isinstance(item, (type, types.ModuleType, torch.Tensor, str, bytes, int, float)):
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            yield item, is_near
        elif isinstance(item, types.FunctionType):  # not its globals, which lead everywhere
            inside = [*(item.__closure__ or ()), item.__defaults__, item.__kwdefaults__]
            pending += ((inner, is_near) for inner in inside)
        else:
            is_near = is_near and isinstance(item, (list, tuple, dict, set, frozenset, types.CellType))
            pending += ((inner, is_near) for inner in gc.get_referents(item))
