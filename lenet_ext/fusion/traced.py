"""The source of a ``forward`` that was typed at a prompt, told by torch.fx.

A trace tells nothing of side effects, of attributes and globals that are read, of conditions. So it stands for the
source only where nothing of that kind can be: where the ``forward`` takes one argument, and all the names in it are
those of its child modules and of functions and methods of torch that a trace records.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types

import torch
import torch.nn.functional as F
from torch import fx, nn

from lenet_ext.fusion.source import Source, parse_method

_OTHER_FLAGS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace_source(module: nn.Module, name: str, function: types.FunctionType) -> Source | None:
    """The source of a module's ``forward``, or None where a trace would not be the whole truth."""
    code = function.__code__
    takes_one = code.co_argcount == 2 and not (code.co_kwonlyargcount or code.co_flags & _OTHER_FLAGS)
    makes_functions = any(isinstance(constant, types.CodeType) for constant in code.co_consts)
    is_forward = name == "forward" and inspect.getattr_static(type(module), name) is function
    if not is_forward or not takes_one or makes_functions or code.co_freevars or function.__defaults__:
        return None
    if function.__globals__.get("torch") is not torch or not all(_is_known(n, module, function) for n in code.co_names):
        return None
    try:
        recorded = _Tracer().trace(module).python_code("self")
    except Exception:  # whatever a forward raises when its argument is a stand-in
        return None
    source = parse_method(recorded.src.strip(), function)
    used = {node.id for node in ast.walk(source.node) if isinstance(node, ast.Name)}
    return source if used & recorded.globals.keys() <= {"torch"} else None


def _is_known(name: str, module: nn.Module, function: types.FunctionType) -> bool:
    if name in module.__dict__ or any(name in cls.__dict__ for cls in type(module).__mro__ if cls is not nn.Module):
        return False
    if name in function.__globals__:
        return function.__globals__[name] in (torch, nn, F)
    return name in module._modules or name in _recorded_names()


@functools.cache
def _recorded_names() -> frozenset[str]:
    functions = {f.__name__ for f in torch.overrides.get_testing_overrides() if hasattr(f, "__name__")}
    attributes = {name for name in dir(torch.Tensor) if not name.startswith("_")}
    return frozenset(functions | attributes | {"nn", "functional"}) - {"type"}  # which is the builtin, too
