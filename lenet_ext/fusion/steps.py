"""The calls that a value goes through: the members of a ``Sequential``, and what a ``forward`` does with it."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from lenet_ext.fusion.callers import find_module, has_stock, own_classes
from lenet_ext.fusion.source import Source, look_up, own_nodes, stock_class, without_calls

_RELUS = (torch.relu, torch.relu_, F.relu, F.relu_)
_MAX_POOLS = (torch.max_pool2d, F.max_pool2d)
_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_COPYING = ("__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__", "__deepcopy__", "__copy__")
# With these one gets at local variables other than by their names.
_SEES_VARIABLES = {"locals", "vars", "dir", "eval", "exec"}


class NoChainError(Exception):
    """Why a layer is left as it is."""


@dataclass(frozen=True)
class Step:
    """A call that takes one value and gives another.

    Attributes:
        kind: relu, pool, average (a pooling), identity or, for everything else, nothing.
        what: the name of the class or function that is called.
        module: what is called, unless it is a function.
        container, name: where, if it is called as a member of a Sequential or, in a loop, of a ModuleList.
        method, call: where, if it is called in a method.
        inside: the Sequentials by which it is called, from the outside in.
        pool: a pooling's options, by the names that the fused layer has for them.
    """

    kind: str
    what: str
    module: nn.Module | None = None
    container: nn.Module | None = None
    name: str = ""
    method: Method | None = None
    call: ast.Call | None = None
    inside: tuple[nn.Module, ...] = ()
    pool: dict[str, Any] = field(default_factory=dict)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after the module, in its forward or its backward pass."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(module.__dict__[kind] for kind in kinds)


# --- modules ---------------------------------------------------------------------------------------------------------


def is_sequential(module: nn.Module) -> bool:
    """Does it call its members one after the other, and nothing else?"""
    # Statically: a script module's is a descriptor that cannot be asked for without an object.
    forward = inspect.getattr_static(type(module), "forward", None)
    calls_members = forward is nn.Sequential.forward and has_stock(module, nn.Sequential, "__iter__", "__call__")
    return calls_members and "forward" not in module.__dict__


def members(container: nn.Module, inside: tuple[nn.Module, ...] = ()) -> Iterator[Step]:
    """The steps of a container that calls its members one after the other."""
    for name, member in container._modules.items():
        if member is not None:
            yield from _module_steps(member, inside, container=container, name=name)


def _module_steps(module: nn.Module, inside: tuple[nn.Module, ...] = (), **place: Any) -> Iterator[Step]:
    if is_sequential(module):
        yield from members(module, (*inside, module))
        return
    kinds = {"relu": nn.ReLU, "pool": nn.MaxPool2d, "average": nn.AvgPool2d, "identity": nn.Identity}
    kind = next((kind for kind, cls in kinds.items() if has_stock(module, cls, "forward", "__call__")), "")
    pool = {}
    if kind == "pool":
        pool = _pool_options({name: getattr(module, name) for name in _POOL_ARGUMENTS[1:]})
        kind = "pool" if pool else ""
    yield Step(kind, type(module).__name__, module, inside=inside, pool=pool, **place)


def _pool_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a max-pooling as a fused layer has them; none, if it cannot do the same."""
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
    can_fuse = given.get("return_indices", False) is False and all(isinstance(part, int) for part in parts)
    return options if can_fuse else {}


# --- a method --------------------------------------------------------------------------------------------------------


class Method:
    """A method of a module, ``forward`` above all, as it is written.

    Attributes:
        cannot_change: why another method cannot take its place, or nothing.
    """

    def __init__(self, module: nn.Module, name: str, function: types.FunctionType, source: Source) -> None:
        self.module, self.name, self.function, self.source = module, name, function, source
        # Calls inside other functions, comprehensions and the like are not followed.
        self.nodes = set(own_nodes(source.node))
        kind = stock_class(type(module))
        self.cannot_change = ""
        if inspect.getattr_static(type(module), name, None) is not function:
            self.cannot_change = "is decorated or replaced"
        elif any(getattr(kind, copying, None) is not getattr(nn.Module, copying, None) for copying in _COPYING):
            self.cannot_change = "belongs to a class with its own way to be copied"
        elif any("__init_subclass__" in cls.__dict__ for cls in own_classes(kind)):
            self.cannot_change = "belongs to a class with its own __init_subclass__"

    def __str__(self) -> str:
        return f"{stock_class(type(self.module)).__name__}.{self.name}"

    def without(self, calls: set[ast.AST]) -> str:
        """The method as text, with these calls left out."""
        return without_calls(self.source, calls, self.name)

    def find_module(self, expression: ast.AST) -> nn.Module | None:
        return find_module(expression, self.module, self.source.first_argument)

    def steps(self, call: ast.Call) -> Iterator[Step]:
        """What a call does: one step, or all those of a Sequential."""
        what, kind, pool = ast.unparse(call.func), "", {}
        module = self.find_module(call.func)
        if module is not None and is_plain(call):
            yield from _module_steps(module, method=self, call=call)
            return
        # By position and by name, without the value itself.
        others: list[tuple[Any, ast.expr]] = list(zip(_POOL_ARGUMENTS[1:], call.args[1:], strict=False))
        others += [(keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg != "input"]
        target = look_up(self.function, call.func)
        if not all(_is_constant(value) for _, value in others):
            what += ", whose options are computed"
        elif any(target is relu for relu in _RELUS) or _is_relu_method(call):
            kind = "relu"
        elif any(target is max_pool for max_pool in _MAX_POOLS) and all(name in _POOL_ARGUMENTS for name, _ in others):
            pool = _pool_options({name: ast.literal_eval(value) for name, value in others})
            kind = "pool" if pool else ""
        yield Step(kind, what, method=self, call=call, pool=pool)

    def following(self, call: ast.Call) -> Iterator[Step]:
        """The steps that take a call's value one after the other, up to an end that is raised as NoChainError."""
        while True:
            call = self._taker(call)
            yield from self.steps(call)

    def _taker(self, value: ast.AST) -> Any:
        """The call that takes a value, which nothing else does."""
        while True:
            parent = self.source.parents[value]
            match parent:
                case ast.Call(args=[first, *_]) if first is value:
                    return parent
                case ast.keyword(arg="input") if isinstance(call := self.source.parents[parent], ast.Call):
                    return call
                case ast.Attribute() if _is_relu_method(call := self.source.parents[parent]):
                    return call
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    value = self._only_use(parent, name)
                case ast.Return() | ast.Lambda():
                    raise NoChainError(f"its output is what {self} returns")
                case ast.Expr():
                    raise NoChainError("its output is not used")
                case _:
                    raise NoChainError(_followed_by(parent))

    def _only_use(self, statement: ast.stmt, name: str) -> ast.Name:
        """The one use of the variable that a statement sets, if it is in the next statement and certainly the last."""
        parents = self.source.parents
        blocks = [getattr(parents[statement], part, []) for part in ("body", "orelse", "finalbody")]
        block = next(block for block in blocks if statement in block)
        following = next((s for s in block[block.index(statement) + 1 :] if not _frees_another(s, name)), None)
        if not isinstance(following, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)):
            raise NoChainError(f"its output, {name}, is not used in the next statement")
        names = [node for node in ast.walk(self.source.node) if isinstance(node, ast.Name)]
        uses = [node for node in names if node.id == name]
        reads = [use for use in uses if not isinstance(use.ctx, ast.Store) or isinstance(parents[use], ast.AugAssign)]
        inside = set(ast.walk(following))
        here = [use for use in reads if use in inside]
        # Other scopes, whoever sees all variables, and handlers of exceptions may read it at any time.
        outer = [n for node in self.nodes if isinstance(node, (ast.Global, ast.Nonlocal)) for n in node.names]
        is_local = name not in outer and all(use in self.nodes for use in uses)
        is_seen = any(node.id in _SEES_VARIABLES for node in names) or self._is_guarded(statement)
        if len(here) != 1 or is_seen or not is_local:
            raise NoChainError(f"its output, {name}, may be used elsewhere")
        targets = following.targets if isinstance(following, ast.Assign) else []
        is_last = isinstance(following, ast.Return) or [getattr(target, "id", "") for target in targets] == [name]
        if len(reads) > 1 and not is_last:
            raise NoChainError(f"its output, {name}, is used more than once")
        return here[0]

    def _is_guarded(self, statement: ast.stmt) -> bool:
        """Might the function go on after an exception in the statement?"""
        outer = self.source.parents.get(statement)
        while outer is not None:
            managers = outer.items if isinstance(outer, ast.With) else []
            if isinstance(outer, (ast.Try, getattr(ast, "TryStar", ast.Try))) or not all(
                map(self._is_torchs, managers)
            ):
                return True
            outer = self.source.parents.get(outer)
        return False

    def _is_torchs(self, manager: ast.withitem) -> bool:
        """Is it ``torch.no_grad()`` or the like, which let exceptions pass?"""
        made_by = look_up(self.function, getattr(manager.context_expr, "func", manager.context_expr))
        return (getattr(made_by, "__module__", None) or "").startswith("torch.")


def _frees_another(statement: ast.stmt, name: str) -> bool:
    """Is it ``other = None``, as torch.fx writes it?"""
    match statement:
        case ast.Assign(targets=[ast.Name(id=other)], value=ast.Constant(value=None)):
            return other != name
    return False


def is_plain(call: ast.AST) -> TypeGuard[ast.Call]:
    """Is it a call with one argument?"""
    match call:
        case ast.Call(args=[argument], keywords=[]):
            return not isinstance(argument, ast.Starred)
    return False


def _is_relu_method(call: ast.AST) -> bool:
    """Is it ``value.relu()``?"""
    match call:
        case ast.Call(func=ast.Attribute(attr="relu" | "relu_"), args=[], keywords=[]):
            return True
    return False


def _is_constant(expression: ast.AST) -> bool:
    try:
        ast.literal_eval(expression)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return False
    return True


def _followed_by(expression: ast.AST) -> str:
    text = ast.unparse(expression)
    return f"followed by `{text if len(text) < 50 else text[:47] + '...'}`"
