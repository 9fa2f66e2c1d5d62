"""A module's ``forward`` as graphs, one for each way it can branch, and a ``forward`` made from such graphs again.

Only what one module's own ``forward`` does is in its graphs: each child is one node, however it works inside. Nothing
is frozen that can change later. An attribute is a node that reads it (``self.training`` too), and where the code
branches on attributes, or on arguments that default to a bool, every branch is followed, so that the graphs together
say what ``forward`` does for all their values; the branch is chosen when ``forward`` begins, so what it is chosen by
must not change on the way. What such graphs cannot say (side effects, context managers, questions
about the type of an argument, ...) is recognised in the bytecode before any of it runs, and the module counts as
unreadable. One thing is taken as it is found, because ``is None`` cannot be intercepted: the attributes that are None.
They are listed.
"""

from __future__ import annotations

import builtins
import dis
import functools
import importlib
import inspect
import math
import operator
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer, Proxy

MAX_BRANCHES = 16
# A loop that ends for some values of an attribute only is recorded for the others as well.
_MAX_QUESTIONS = 1000

# --- what graphs cannot say ------------------------------------------------------------------------------------------


class UnreadableError(Exception):
    """Why a ``forward`` cannot be told by graphs, as the end of a sentence that begins with the module."""


_LOST_IN_A_GRAPH = {
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "sets a global",
    "DELETE_GLOBAL": "deletes a global",
    "IMPORT_NAME": "imports a module",
    "SETUP_WITH": "uses a context manager",
    "BEFORE_WITH": "uses a context manager",
    "BEFORE_ASYNC_WITH": "uses a context manager",
    "LOAD_SPECIAL": "uses a context manager",
    "SETUP_FINALLY": "handles exceptions",
    "PUSH_EXC_INFO": "handles exceptions",
}
_BUILTINS = frozenset(
    (
        abs,
        bool,
        dict,
        enumerate,
        float,
        getattr,
        int,
        len,
        list,
        max,
        min,
        range,
        reversed,
        slice,
        sum,
        super,
        tuple,
        zip,
    )
)
_CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_SPECIAL_METHODS = (
    "__call__",
    "_call_impl",
    "_wrapped_call_impl",
    "__getattribute__",
    "__getattr__",
    "__reduce__",
    "__reduce_ex__",
    "__deepcopy__",
)


@functools.cache
def _recorded_functions() -> frozenset[Callable]:
    """Functions that a graph records when they are given a value of it, and that depend on nothing but arguments."""
    functions = set(torch.overrides.get_testing_overrides())
    in_place = (getattr(torch, f"{f.__name__}_", None) for f in functions if hasattr(f, "__name__"))
    return frozenset(functions | {f for f in in_place if f is not None})


def instructions(code: types.CodeType) -> Iterator[list[dis.Instruction]]:
    """The instructions of a function and of those defined inside it, less those that do nothing."""
    noise = {"CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL", "RESUME", "NOT_TAKEN"}
    yield [i for i in dis.get_instructions(code) if i.opname not in noise]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from instructions(constant)


def is_attribute(instruction: dis.Instruction) -> bool:
    return instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")


def is_local(instruction: dis.Instruction, name: str) -> bool:
    """Is it the local variable `name` that ends up on top of the stack?"""
    if "LOAD_FAST" not in instruction.opname and instruction.opname != "LOAD_DEREF":
        return False
    loaded = instruction.argval
    return (loaded[-1] if isinstance(loaded, tuple) else loaded) == name


def own_classes(module_class: type) -> list[type]:
    """The classes of the module that are not torch's."""
    return [c for c in module_class.__mro__ if c is not object and c.__module__.partition(".")[0] != "torch"]


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after the module, in its forward or its backward pass."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


class _Screening:
    """Looks through functions for what graphs cannot say. `functions`: those that were looked through."""

    def __init__(self, module_class: type) -> None:
        self.module_class = module_class
        self.functions: set[types.FunctionType] = set()

    def check(self, function: Any, is_method: bool = True) -> None:
        if not isinstance(function, types.FunctionType):
            raise UnreadableError(f"calls {function!r}")
        if function in self.functions:
            return
        self.functions.add(function)
        code = function.__code__
        if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            raise UnreadableError("is not a plain function")
        cells: dict[str, Any] = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        for name, cell in cells.items():
            if name == "__class__":
                continue
            try:
                value = cell.cell_contents
            except ValueError:
                raise UnreadableError(f"reads the variable {name}, which is not set") from None
            self._check_value(name, value)
        for body in instructions(code):
            for position, instruction in enumerate(body):
                self._check_instruction(function, body, position, instruction, is_method)

    def _check_instruction(
        self,
        function: types.FunctionType,
        body: list[dis.Instruction],
        position: int,
        instruction: dis.Instruction,
        is_method: bool,
    ) -> None:
        name = instruction.opname
        if name in _LOST_IN_A_GRAPH:
            raise UnreadableError(_LOST_IN_A_GRAPH[name])
        if name == "STORE_DEREF" and instruction.argval in function.__code__.co_freevars:
            raise UnreadableError(f"sets the variable {instruction.argval} of an outer function")
        if name == "IS_OP" or name.endswith(("IF_NONE", "IF_NOT_NONE")):
            before = body[:position]
            if name == "IS_OP" and not (before and before[-1].opname == "LOAD_CONST" and before.pop().argval is None):
                raise UnreadableError("asks `is` of something else than None")
            if not before or not is_attribute(before[-1]):
                raise UnreadableError("asks whether a variable is None")
            while before and is_attribute(before[-1]):
                before.pop()
            arguments = function.__code__.co_varnames
            if not (is_method and before and is_local(before[-1], arguments[0])):
                raise UnreadableError("asks whether a variable is None")
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            self._check_global(function, body, position)

    def _check_global(self, function: types.FunctionType, body: list[dis.Instruction], position: int) -> None:
        name = full_name = body[position].argval
        scope = function.__globals__
        if name not in scope and not hasattr(builtins, name):
            raise UnreadableError(f"reads the unknown name {name}")
        value = scope[name] if name in scope else getattr(builtins, name)
        for following in body[position + 1 :]:
            if not isinstance(value, types.ModuleType) or not is_attribute(following):
                break
            full_name += f".{following.argval}"
            if value is math and isinstance(getattr(math, following.argval, None), float):
                return
            value = getattr(value, following.argval, None)
        if value is super:
            self._check_inherited(function)
        self._check_value(full_name, value)

    def _check_inherited(self, function: types.FunctionType) -> None:
        """`super()` finds methods behind the back of :class:`_Handle`, so all that it may find is looked through."""
        for cls in own_classes(self.module_class):
            for name in function.__code__.co_names:
                if isinstance(inherited := cls.__dict__.get(name), types.FunctionType):
                    self.check(inherited)

    def _check_value(self, name: str, value: Any) -> None:
        try:
            if value in _BUILTINS or value in _recorded_functions():
                return
        except TypeError:  # not hashable
            pass
        if isinstance(value, _CONSTANTS) or value is torch.jit.is_scripting:  # false wherever a fused layer can be
            return
        home = getattr(value, "__module__", None) or ""
        if isinstance(value, types.BuiltinFunctionType) and home in (math.__name__, operator.__name__):
            return
        if home == "lenet_ext.functional":
            return
        if isinstance(value, types.FunctionType) and home.partition(".")[0] != "torch":
            self.check(value, is_method=False)
            return
        raise UnreadableError(f"uses {name}")


# --- recording -------------------------------------------------------------------------------------------------------

_COMPARISONS = {
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}


class _Recorder(GraphAppendingTracer):
    """Records one run of ``forward``, which takes the given answers at its branches, then always True."""

    def __init__(self, screening: _Screening, bool_arguments: frozenset[str], answers: tuple[bool, ...]) -> None:
        super().__init__(fx.Graph())
        self.screening = screening
        self.bool_arguments = bool_arguments
        self.answers = answers
        self.conditions: dict[str, bool] = {}
        self.nones: set[str] = set()
        self.called: dict[str, nn.Module] = {}
        self.constants: set[str] = set()
        self.questions = 0

    def to_bool(self, obj: Proxy) -> bool:
        self.questions += 1
        condition = self._expression(obj.node)
        if condition not in self.conditions and len(self.conditions) == MAX_BRANCHES:
            raise UnreadableError(f"has more than {MAX_BRANCHES} branches")
        if self.questions > _MAX_QUESTIONS:
            raise UnreadableError("branches in a loop that does not end for every value it branches on")
        if condition not in self.conditions:
            count = len(self.conditions)
            self.conditions[condition] = self.answers[count] if count < len(self.answers) else True
        return self.conditions[condition]

    def _expression(self, value: Any) -> str:
        """Python source of a condition on attributes and arguments with a bool as default."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"float({str(value)!r})"
        if isinstance(value, (bool, int, float, str)):
            return repr(value)
        if isinstance(value, fx.Node):
            if value.op == "get_attr" and value.target in self.constants:
                self._check_settled(str(value.target))
                return f"self.{value.target}"
            if value.op == "placeholder" and value.target in self.bool_arguments:
                return str(value.target)
            if value.op == "call_function" and value.target in _COMPARISONS:
                left, right = (self._expression(argument) for argument in value.args)
                return f"({left} {_COMPARISONS[value.target]} {right})"  # type: ignore[index]
        raise UnreadableError("branches on a value that is known only when it runs")

    def _check_settled(self, path: str) -> None:
        """What is decided when ``forward`` begins must not depend on what a child leaves behind when it is called."""
        if path.rpartition(".")[2] == "training":  # nobody switches modes in the middle of a call
            return
        for called, child in self.called.items():
            if path.startswith(f"{called}.") or any(has_hooks(module) for module in child.modules()):
                raise UnreadableError(f"calls {called}, which may change {path}, and then branches on it")

    def call(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        self.called[path] = module
        return self.create_proxy("call_module", path, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _Handle):
            raise UnreadableError("passes a module on as an argument")
        if isinstance(a, torch.Tensor):
            raise UnreadableError("makes a tensor that depends on no argument")
        return super().create_arg(a)

    def attribute(self, path: str, value: Any) -> Any:
        if value is None:
            self._check_settled(path)
            self.nones.add(path)
            return None
        if isinstance(value, (bool, int, float, str)):
            self.constants.add(path)
        if isinstance(value, nn.Module):
            raise UnreadableError(f"uses {path}, which is not a registered submodule")
        return self.create_proxy("get_attr", path, (), {})


class _Handle:
    """Stands for a module while ``forward`` is recorded: reads become nodes, and so do calls of children."""

    __slots__ = ("_handle_module", "_handle_path", "_handle_recorder")

    def __init__(self, recorder: _Recorder, module: nn.Module, path: str) -> None:
        self._handle_recorder, self._handle_module, self._handle_path = recorder, module, path

    # `super()` asks for it.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._handle_module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._handle_path:
            raise UnreadableError("calls itself")
        return self._handle_recorder.call(self._handle_path, self._handle_module, args, kwargs)

    def _handle_child(self, name: str) -> Any:
        path = f"{self._handle_path}.{name}" if self._handle_path else name
        child = self._handle_module._modules[name]
        if child is None:
            return self._handle_recorder.attribute(path, None)
        return _Handle(self._handle_recorder, child, path)

    def __getattr__(self, name: str) -> Any:
        recorder, module = self._handle_recorder, self._handle_module
        path = f"{self._handle_path}.{name}" if self._handle_path else name
        of_class = inspect.getattr_static(type(module), name, None)
        if isinstance(of_class, property) and of_class.fget is not None:
            recorder.screening.check(of_class.fget)
            return of_class.fget(self)
        if name in module.__dict__:
            return recorder.attribute(path, module.__dict__[name])
        if isinstance(of_class, types.FunctionType):
            recorder.screening.check(of_class)
            return types.MethodType(of_class, self)
        if isinstance(of_class, staticmethod):
            recorder.screening.check(of_class.__func__, is_method=False)
            return of_class.__func__
        for registered in (module._parameters, module._buffers):
            if name in registered:
                return recorder.attribute(path, registered[name])
        if name in module._modules:
            return self._handle_child(name)
        if of_class is None:
            raise AttributeError(f"{type(module).__name__} has no attribute {name!r}")
        return recorder.attribute(path, of_class)

    def __bool__(self) -> bool:
        raise UnreadableError("asks whether a module is true")

    def _handle_container(self, *containers: type) -> dict:
        kind = type(self._handle_module)
        for container in containers:
            same = all(getattr(kind, n, None) is getattr(container, n, None) for n in ("__iter__", "__getitem__"))
            if issubclass(kind, container) and same:
                return self._handle_module._modules
        raise UnreadableError(f"looks into {self._handle_path}")

    def __len__(self) -> int:
        return len(self._handle_container(nn.Sequential, nn.ModuleList, nn.ModuleDict))

    def __iter__(self) -> Iterator[Any]:
        return iter([self._handle_child(name) for name in self._handle_container(nn.Sequential, nn.ModuleList)])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            self._handle_container(nn.ModuleDict)
            return self._handle_child(key)
        names = list(self._handle_container(nn.Sequential, nn.ModuleList))
        if not isinstance(key, int):
            raise UnreadableError(f"looks into {self._handle_path}")
        return self._handle_child(names[key])


@dataclass(frozen=True)
class Branch:
    """What ``forward`` does where the conditions (Python source, and whether it holds) are met."""

    conditions: tuple[tuple[str, bool], ...]
    graph: fx.Graph


@dataclass(frozen=True)
class ForwardGraphs:
    """All branches of a ``forward``; the attributes it found to be None; the functions that it consists of."""

    branches: tuple[Branch, ...]
    nones: tuple[str, ...]
    functions: frozenset[types.FunctionType]


def read_forward(module: nn.Module) -> ForwardGraphs:
    """The graphs of the module's ``forward``.

    Raises:
        UnreadableError: graphs cannot tell what it does.
    """
    module_class = type(module)
    if "forward" in module.__dict__:
        raise UnreadableError("has its forward replaced")
    if hasattr(module_class, "lenet_ext_recipe"):
        raise UnreadableError("was rewritten by an earlier fuse")
    for name in _SPECIAL_METHODS:
        if getattr(module_class, name, None) != getattr(nn.Module, name, None):
            raise UnreadableError(f"has its own {name}")
    if any("__init_subclass__" in cls.__dict__ for cls in own_classes(module_class)):
        raise UnreadableError("has its own __init_subclass__")
    forward = inspect.getattr_static(module_class, "forward")
    screening = _Screening(module_class)
    if forward is not nn.Sequential.forward:
        screening.check(forward)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise UnreadableError("takes any number of arguments")
    if any(p.name == "self" for p in parameters):
        raise UnreadableError("has an argument named self that is not its first")
    bool_arguments = frozenset(p.name for p in parameters if isinstance(p.default, bool))

    branches: list[Branch] = []
    nones: set[str] = set()
    pending: list[tuple[bool, ...]] = [()]
    while pending:
        if len(branches) == MAX_BRANCHES:
            raise UnreadableError(f"has more than {MAX_BRANCHES} branches")
        answers = pending.pop()
        recorder = _Recorder(screening, bool_arguments, answers)
        _record(recorder, module, forward, parameters)
        conditions = tuple(recorder.conditions.items())
        for count in range(len(answers), len(conditions)):
            pending.append((*(answer for _, answer in conditions[:count]), False))
        branches.append(Branch(conditions, recorder.graph))
        nones |= recorder.nones
    return ForwardGraphs(tuple(branches), tuple(sorted(nones)), frozenset(screening.functions))


def _record(
    recorder: _Recorder, module: nn.Module, forward: types.FunctionType, parameters: list[inspect.Parameter]
) -> None:
    arguments = [recorder.create_proxy("placeholder", p.name, (), {}) for p in parameters]
    positional = [a for a, p in zip(arguments, parameters, strict=True) if p.kind is not p.KEYWORD_ONLY]
    keyword = {p.name: a for a, p in zip(arguments, parameters, strict=True) if p.kind is p.KEYWORD_ONLY}
    try:
        output = forward(_Handle(recorder, module, ""), *positional, **keyword)  # type: ignore[arg-type]
        recorder.graph.output(recorder.create_arg(output))
    except UnreadableError:
        raise
    except Exception as error:  # whatever the model's own code raises when its tensors are stand-ins
        raise UnreadableError(f"cannot be traced ({str(error).strip().partition(chr(10))[0]})") from error


# --- a forward made from graphs --------------------------------------------------------------------------------------


class Recipe:
    """How to make the subclass of `base` whose ``forward`` runs the graphs: source code, which can be pickled.

    A module of that subclass is copied and pickled as `base` would be, plus its recipe.
    """

    def __init__(self, base: type[nn.Module], graphs: ForwardGraphs) -> None:
        self.base = base
        self.graphs = []
        for branch in graphs.branches:
            _drop_unused_reads(branch.graph)
            code = branch.graph.python_code("self")
            self.graphs.append((code.src, code.globals))
        signature = inspect.signature(base.forward)
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        # Source code cannot say every default: they are put into place afterwards.
        given = [p for p in bare if p.default is not p.empty]
        self.defaults = tuple(p.default for p in given if p.kind is not p.KEYWORD_ONLY)
        self.keyword_defaults = {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY}
        named = [p.replace(default=p.empty if p.default is p.empty else None) for p in bare]
        header = signature.replace(parameters=named, return_annotation=signature.empty)
        lines = [f"def forward{header}:".replace(f"({bare[0].name}", "(self", 1)]
        for path in graphs.nones:
            lines.append(f"    if self.{path} is not None:")
            lines.append(f"        raise RuntimeError(_lenet_ext_not_none.format({path!r}))")
        arguments = ", ".join(
            ["self", *(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in bare[1:])]
        )
        lines += _decision(list(enumerate(graphs.branches)), arguments, 1)
        self.source = "\n".join(lines)
        self._made: type[nn.Module] | None = None

    def subclass(self) -> type[nn.Module]:
        if self._made is None:
            scope: dict[str, Any] = {"_lenet_ext_not_none": _NOT_NONE}
            for index, (source, names) in enumerate(self.graphs):
                scope[f"{_BRANCH}{index}"] = _function(source, dict(names))
            forward = _function(self.source, scope)
            forward.__defaults__, forward.__kwdefaults__ = self.defaults, self.keyword_defaults
            forward.__doc__ = self.base.forward.__doc__
            names = {
                "__module__": self.base.__module__,
                "__doc__": self.base.__doc__,
                "__reduce_ex__": _reduce_ex,
                "forward": forward,
                "lenet_ext_recipe": self,
            }
            metaclass: Any = type(self.base)
            self._made = metaclass(f"Fused{self.base.__name__}", (self.base,), names)
        return self._made

    def __deepcopy__(self, memo: dict) -> Recipe:
        return self  # nothing in it changes

    def __getstate__(self) -> dict:
        graphs = [
            (source, {name: _Module(v.__name__) if isinstance(v, types.ModuleType) else v for name, v in names.items()})
            for source, names in self.graphs
        ]
        return self.__dict__ | {"graphs": graphs, "_made": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.graphs = [
            (source, {name: v.load() if isinstance(v, _Module) else v for name, v in names.items()})
            for source, names in self.graphs
        ]


_BRANCH = "_lenet_ext_branch_"  # unlike any argument
_NOT_NONE = "{} was None when the model was fused and is not now; set it first, then call lenet_ext.fuse"


@dataclass(frozen=True)
class _Module:
    """A Python module, in a pickle."""

    name: str

    def load(self) -> types.ModuleType:
        return importlib.import_module(self.name)


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple:
    recipe: Recipe = type(self).lenet_ext_recipe  # type: ignore[attr-defined]
    return (_new, (recipe,), *super(recipe.subclass(), self).__reduce_ex__(protocol)[2:])  # type: ignore[misc]


def _new(recipe: Recipe) -> nn.Module:
    made: Any = recipe.subclass()
    return made.__new__(made)


def _function(source: str, scope: dict[str, Any]) -> Any:
    exec(compile(source, "<lenet_ext.fuse>", "exec"), scope)
    return scope["forward"]


def _decision(branches: list[tuple[int, Branch]], arguments: str, depth: int) -> list[str]:
    """Source code that calls the branch whose conditions hold."""
    indent = "    " * depth
    index, branch = branches[0]
    if len(branches) == 1:
        return [f"{indent}return {_BRANCH}{index}({arguments})"]
    # Runs that have given the same answers so far stand before the same question.
    condition = branch.conditions[depth - 1][0]
    sides = [[b for b in branches if b[1].conditions[depth - 1][1] is answer] for answer in (True, False)]
    return [
        f"{indent}if {condition}:",
        *_decision(sides[0], arguments, depth + 1),
        f"{indent}else:",
        *_decision(sides[1], arguments, depth + 1),
    ]


def _drop_unused_reads(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.target in _COMPARISONS):
            graph.erase_node(node)
