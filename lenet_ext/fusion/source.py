"""The source of a function as a syntax tree, and a class with methods made from such a tree.

A tree is taken for a function's source only if it compiles to what the function runs: a file can have changed since it
was imported. That comparison asks the running interpreter and knows nothing of its instructions.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import itertools
import linecache
import threading
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

# Attributes of the classes and functions that are made here.
_BASE, _TEXT = "_lenet_ext_base", "_lenet_ext_text"
_NUMBERS = itertools.count(1)
# Reading and making are for one thread at a time: two would make two classes of one model, and Python's filters of
# warnings, which are those of all threads, would not be put back. Python may call on us while it makes a class.
_ONE_THREAD = threading.RLock()

Function = ast.FunctionDef | ast.Lambda
SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ClassDef,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
_FUTURE = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)


@dataclass(frozen=True, eq=False)
class Source:
    """A function as a syntax tree.

    Attributes:
        node: the tree.
        parents: the parent of every node in it.
        first_argument: its name, or nothing.
        uses: where that is used.
    """

    node: Function
    parents: dict[ast.AST, ast.AST]
    first_argument: str
    uses: tuple[ast.Name, ...]


@functools.lru_cache(maxsize=1024)
def read_source(function: types.FunctionType) -> Source | None:
    """The source of a function, or None where it is not to be had (typed at a prompt, changed since, ...)."""
    code = function.__code__
    text = getattr(function, _TEXT, "")
    if text:  # made by with_methods()
        return parse_method(text, function)
    with _ONE_THREAD:
        linecache.checkcache(code.co_filename)  # it may have been edited, and imported anew
        lines = linecache.getlines(code.co_filename, function.__globals__)
        nodes, codes = _file("".join(lines), code.co_flags & _FUTURE)
    found = [node for node in nodes if _looks_like(node, code)]
    if len(found) != 1 or not any(code == other for other in codes if other.co_firstlineno == code.co_firstlineno):
        return None
    return _source_of(found[0], function)


def parse_method(text: str, function: types.FunctionType) -> Source:
    """The source of a function, given as text."""
    return _source_of(ast.parse(text).body[0], function)


def _source_of(node: Any, function: types.FunctionType) -> Source:
    class_name = _class_name(function).lstrip("_")
    for attribute in ast.walk(node) if class_name else ():
        if isinstance(attribute, ast.Attribute) and attribute.attr.startswith("__") and attribute.attr[-2:] != "__":
            attribute.attr = f"_{class_name}{attribute.attr}"  # as Python does with private names
    parents = {child: parent for parent in ast.walk(node) for child in ast.iter_child_nodes(parent)}
    arguments = [*node.args.posonlyargs, *node.args.args]
    first = arguments[0].arg if arguments else ""
    return Source(node, parents, first, tuple(n for n in parents if isinstance(n, ast.Name) and n.id == first))


def _class_name(method: types.FunctionType) -> str:
    name = method.__qualname__.rpartition(".")[0].rpartition(".")[2]
    return name if name.isidentifier() else ""


def _looks_like(node: Function, code: types.CodeType) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    first_line = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    here = (first_line, getattr(node, "name", "<lambda>"), [argument.arg for argument in arguments])
    return here == (code.co_firstlineno, code.co_name, [*code.co_varnames[: len(arguments)]])


@functools.lru_cache(maxsize=64)
def _file(text: str, flags: int) -> tuple[list[Function], list[types.CodeType]]:
    """The functions of a file, as trees and as code."""
    try:
        tree = ast.parse(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codes = [compile(text, "<lenet_ext.fuse>", "exec", flags=flags, dont_inherit=True)]
    except (SyntaxError, ValueError):
        return [], []
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))], codes


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function's body, those of scopes inside it left out."""
    pending: list[ast.AST] = list(function.body) if isinstance(function, ast.FunctionDef) else [function.body]
    while pending:
        node = pending.pop()
        if not isinstance(node, SCOPES):
            yield node
            pending += ast.iter_child_nodes(node)


def look_up(function: types.FunctionType, expression: ast.AST) -> Any:
    """What ``name`` or ``module.name`` stands for in a function, or None: local variables are not known."""
    if isinstance(expression, ast.Attribute):
        holder = look_up(function, expression.value)
        return getattr(holder, expression.attr, None) if isinstance(holder, types.ModuleType) else None
    code = function.__code__
    if not isinstance(expression, ast.Name) or expression.id in code.co_varnames + code.co_cellvars:
        return None
    if expression.id in code.co_freevars:
        try:
            return (function.__closure__ or ())[code.co_freevars.index(expression.id)].cell_contents
        except ValueError:  # not set yet
            return None
    return function.__globals__.get(expression.id)


# --- a class with other methods -------------------------------------------------------------------------------------


def without_calls(source: Source, calls: set[ast.AST], name: str) -> str:
    """A function of this name, as text, that does the same but for some calls: their argument takes their place."""
    copies: dict[int, Any] = {}
    copied = copy.deepcopy(source.node, copies)
    node = _Without({id(copies[id(call)]) for call in calls}).visit(copied)
    if isinstance(node, ast.Lambda):
        return f"def {name}({ast.unparse(node.args)}):\n    return {ast.unparse(node.body)}\n"
    node.name, node.decorator_list = name, []
    return ast.unparse(node) + "\n"


class _Without(ast.NodeTransformer):
    def __init__(self, calls: set[int]) -> None:
        self.calls = calls

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if id(node) not in self.calls:
            return node
        given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "input")]
        return given[0] if given else node.func.value  # type: ignore[attr-defined]

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        is_shorter = id(node.value) in self.calls
        self.generic_visit(node)
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Name(id=value)) if is_shorter and target == value:
                return None  # nothing is left of `x = F.relu(x)`, which came after the statement that sets x
        return node


def stock_class(module_class: type[nn.Module]) -> type[nn.Module]:
    """The class that a class of :func:`with_methods` was made from, or the class itself."""
    return module_class.__dict__.get(_BASE, module_class)


def with_methods(module_class: Any, texts: dict[str, str]) -> type[nn.Module]:
    """A subclass in which nothing but some methods differs: they are made from text.

    They have the globals, closures and defaults of those that they replace. Modules of the class are copied and pickled
    by way of the stock class and the texts, so that the stock class alone has to be importable.
    """
    texts = {**module_class.__dict__.get(_TEXT, {}), **texts}
    base: Any = stock_class(module_class)
    with _ONE_THREAD:
        return _made(base, tuple(sorted(texts.items())))


@functools.cache
def _made(base: Any, texts: tuple[tuple[str, str], ...]) -> type[nn.Module]:
    names: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__, "__reduce_ex__": _reduce_ex}
    for name, text in texts:
        names[name] = _function_like(getattr(base, name), name, text)
    return type(base)(f"Fused{base.__name__}", (base,), {**names, _BASE: base, _TEXT: dict(texts)})


def _function_like(replaced: types.FunctionType, name: str, text: str) -> types.FunctionType:
    filename = f"<lenet_ext.fuse {replaced.__qualname__} {next(_NUMBERS)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)  # for tracebacks
    node: Any = ast.parse(text).body[0]
    # Annotations and defaults are those of the function that it replaces.
    node.args.defaults, node.args.kw_defaults, node.returns = [], [None] * len(node.args.kw_defaults), None
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    # Compiled inside a class of the same name, for `super()` and private names, and a function with the same closure.
    cells = dict(zip(replaced.__code__.co_freevars, replaced.__closure__ or (), strict=True))
    path = ["outer", _class_name(replaced) or "_", name]
    around: Any = ast.parse(f"def outer({', '.join(cells.keys() - {'__class__'})}):\n class {path[1]}:\n  pass")
    around.body[0].body[0].body = [node]
    code = compile(around, filename, "exec", flags=replaced.__code__.co_flags & _FUTURE, dont_inherit=True)
    for inner in path:
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == inner)
    closure = tuple(cells[variable] for variable in code.co_freevars)
    function = types.FunctionType(code, replaced.__globals__, name, replaced.__defaults__, closure)
    function.__kwdefaults__ = replaced.__kwdefaults__
    for attribute in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(function, attribute, getattr(replaced, attribute))
    setattr(function, _TEXT, text)
    return function


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple:
    base, texts = getattr(type(self), _BASE), getattr(type(self), _TEXT)
    state = super(with_methods(base, texts), self).__reduce_ex__(protocol)[2:]  # type: ignore[misc]
    return (_new, (base, texts), *state)


def _new(base: Any, texts: dict[str, str]) -> nn.Module:
    made: Any = with_methods(base, texts)
    return made.__new__(made)
