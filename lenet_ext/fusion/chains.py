"""Finds the chains that a fused layer can replace: conv -> ReLU -> max-pool and linear -> ReLU, and ReLU -> AvgPool2d.

A chain goes from step to step, in and out of Sequentials, as long as nobody else can see the difference.
"""

from __future__ import annotations

import ast
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lenet_ext import functional
from lenet_ext.fusion.callers import Call, Callers
from lenet_ext.fusion.steps import Method, NoChainError, Step, has_hooks, is_plain, is_sequential, members


@dataclass(frozen=True)
class Chain:
    """What a fused layer takes over.

    Attributes:
        layer: the convolution or linear layer, or the average pooling.
        pool: the max-pooling's options, if it is a convolution.
        superfluous: the calls that go.
        crossed: the modules that stay where the chain was, and see another value now.
    """

    layer: nn.Module
    pool: dict[str, Any]
    superfluous: tuple[Step, ...]
    crossed: tuple[nn.Module, ...]

    def changed_modules(self) -> list[nn.Module]:
        """The modules that are not called any more, or with another value."""
        return [*self.crossed, *(step.module for step in self.superfluous if step.module is not None)]


@dataclass(frozen=True)
class Run:
    """A call of a layer, of a Sequential, or of a ModuleList in a loop: its steps, and those that take its output."""

    steps: list[Step]
    after: Method | str
    call: ast.Call | None = None

    def following(self, index: int) -> Iterator[Step]:
        """The steps after the given one, up to an end that is raised as NoChainError."""
        yield from self.steps[index + 1 :]
        if isinstance(self.after, str):
            raise NoChainError(self.after)
        assert self.call
        yield from self.after.following(self.call)


class Chains:
    """The places where a model calls its layers, and the chains that begin there."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._paths = {id(module): path or "the model" for path, module in root.named_modules()}
        self._callers = Callers(root)
        self._methods: dict[tuple[int, Any], Method] = {}
        self._followed: set[Call] = set()
        self._runs: dict[int, list[tuple[Run, int]]] = defaultdict(list)  # by layer, and where it is in the run
        self._memberships: dict[int, int] = defaultdict(int)  # how often a module is called as a container's member
        sequentials = [module for module in root.modules() if is_sequential(module)]
        for container in sequentials:
            self._note_members(container)
        for module in root.modules():
            for call in self._callers.calls[id(module)]:
                self._follow(module, call)
        for module in sequentials:
            if not self._memberships[id(module)] and self._followed.isdisjoint(self._callers.calls[id(module)]):
                self._add_run(Run(list(members(module, (module,))), f"its output is what {self._name(module)} returns"))

    def _follow(self, module: nn.Module, call: Call) -> None:
        method = self._methods.get((id(call.caller), call.function))
        if method is None:
            method = Method(call.caller, call.method, call.function, call.source)
            self._methods[id(call.caller), call.function] = method
        if call.node in method.nodes:
            if isinstance(call.node, ast.For):
                self._note_members(module)
                self._add_run(Run(list(members(module)), "its output leaves a loop"), call)
            # Not the variable of a loop over modules, which stands for more than one.
            elif is_plain(call.node) and method.find_module(call.node.func) is module:
                self._add_run(Run(list(method.steps(call.node)), method, call.node), call)

    def _note_members(self, container: nn.Module) -> None:
        for member in container._modules.values():
            self._memberships[id(member)] += 1

    def _add_run(self, run: Run, call: Call | None = None) -> None:
        if call is not None:
            self._followed.add(call)
        for index, step in enumerate(run.steps):
            if isinstance(step.module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                self._runs[id(step.module)].append((run, index))

    def _name(self, module: nn.Module) -> str:
        return self._paths[id(module)]

    def _label(self, step: Step) -> str:
        return step.what if step.module is None else f"{step.what} ({self._name(step.module)})"

    # --- chains ---

    def find(self, layer: nn.Module) -> Chain:
        """The chain that starts at a convolution or a linear layer.

        Raises:
            NoChainError: there is none.
        """
        check_layer(layer)
        found = [self._chain(layer, run, index) for run, index in self._runs_of(layer)]
        if any(chain.pool != found[0].pool for chain in found):
            raise NoChainError("followed by different poolings at different places")
        superfluous = {_place_key(step): step for chain in found for step in chain.superfluous}
        crossed = {id(module): module for chain in found for module in chain.crossed}
        return Chain(layer, found[0].pool, tuple(superfluous.values()), tuple(crossed.values()))

    def _runs_of(self, layer: nn.Module) -> list[tuple[Run, int]]:
        """All places where a layer is called, if these can be told."""
        if id(layer) in self._callers.given_away:
            raise NoChainError(self._callers.given_away[id(layer)])
        for call in self._callers.calls[id(layer)]:
            if call not in self._followed:
                raise NoChainError(f"called by {call} in a way that cannot be followed")
        if not self._runs[id(layer)]:
            raise NoChainError("never called")
        return self._runs[id(layer)]

    def _chain(self, layer: nn.Module, run: Run, index: int) -> Chain:
        is_conv = isinstance(layer, nn.Conv2d)
        steps, superfluous = [run.steps[index]], []
        kinds: list[str] = []
        following = run.following(index)
        while not ("relu" in kinds and ("pool" in kinds or not is_conv)):
            try:
                step = next(following)
                if step.kind not in ("relu", "identity") and (step.kind != "pool" or not is_conv or "pool" in kinds):
                    raise NoChainError(f"followed by {self._label(step)}")
                self._check_step(step)
                self._check_crossing([*steps, step])
            except NoChainError as error:
                missing = "no max-pool after its ReLU: " if "relu" in kinds else "no ReLU after its max-pool: "
                raise NoChainError(f"{missing if kinds else ''}{error}") from None
            steps.append(step)
            if step.kind != "identity":
                kinds.append(step.kind)
                superfluous.append(step)
        pool = next((step.pool for step in superfluous if step.kind == "pool"), {})
        if pool:
            check_pool(layer, pool, before_relu=kinds.index("pool") < kinds.index("relu"))
        identities = [step.module for step in steps if step.kind == "identity"]
        return Chain(layer, pool, tuple(superfluous), (*filter(None, identities), *_crossed(steps)))

    def _check_step(self, step: Step) -> None:
        """Can the call be taken out?"""
        module = step.module
        if module is not None and has_hooks(module):
            raise NoChainError(f"{self._label(step)} has hooks")
        if module is not None and "forward" in module.__dict__:
            raise NoChainError(f"{self._label(step)} has its forward replaced")
        if step.method is not None:
            if step.method.cannot_change and step.kind != "identity":
                raise NoChainError(f"{step.method} {step.method.cannot_change}")
        elif id(module) in self._callers.given_away or self._callers.calls[id(module)]:
            # Another module will be in its place.
            raise NoChainError(f"followed by {self._label(step)}, which is also called elsewhere")

    def _check_crossing(self, steps: list[Step]) -> None:
        for sequential in _crossed(steps):
            name = self._name(sequential)
            if sequential is self._root:
                raise NoChainError("its output is the model's output")
            if has_hooks(sequential):
                raise NoChainError(f"{name} has hooks")
            if id(sequential) in self._callers.given_away:
                raise NoChainError(f"{name} is {self._callers.given_away[id(sequential)]}")
            if self._memberships[id(sequential)] + len(self._callers.calls[id(sequential)]) > 1:
                raise NoChainError(f"{name} is called more than once")

    def batch_norm_after(self, layer: nn.Module) -> nn.BatchNorm2d:
        """The BatchNorm2d that takes a convolution's output, and nobody else's.

        Raises:
            NoChainError: there is none.
        """
        check_layer(layer)
        heads = [(run.steps[index], next(run.following(index))) for run, index in self._runs_of(layer)]
        steps = [step for _, step in heads]
        norm = steps[0].module
        if type(norm) is not nn.BatchNorm2d or any(step.module is not norm for step in steps):
            raise NoChainError(f"followed by {self._label(steps[0])}")
        for pair in heads:
            self._check_crossing(list(pair))
        if norm.running_mean is None or has_hooks(norm) or not self._is_called_only_by(norm, steps):
            raise NoChainError(f"{self._label(steps[0])} cannot be folded")
        if id(layer) in self._callers.looked_at or id(norm) in self._callers.looked_at:
            raise NoChainError(f"values of {self._label(steps[0])} or of the convolution are read")
        return norm

    def _is_called_only_by(self, module: nn.Module, steps: list[Step]) -> bool:
        """Are these calls of the module all that there are?"""
        places = {_place_key(step) for step in steps}
        is_all = len(places) == self._memberships[id(module)] + len(self._callers.calls[id(module)])
        return is_all and id(module) not in self._callers.given_away

    # --- ReLU and average pooling ---

    def average_pools(self) -> Iterator[Chain]:
        """Of each AvgPool2d that is given nothing but ReLUs of what a convolution or a BatchNorm2d has computed.

        What these computed is then used by ReLU alone, so that it does not matter whether ReLU works in place.
        """
        found: dict[nn.Module, list[list[Step]]] = defaultdict(list)
        for layer in self._root.modules():
            if type(layer) in (nn.Conv2d, nn.BatchNorm2d) and _is_as_made(layer):
                with contextlib.suppress(NoChainError):
                    for run, index in self._runs_of(layer):
                        with contextlib.suppress(NoChainError):
                            steps = self._average_steps(run, index)
                            found[steps[-1].module].append(steps)  # type: ignore[index]
        for pool, chains in found.items():
            calls = [steps[-1] for steps in chains]
            if type(pool) is nn.AvgPool2d and _is_as_made(pool) and self._is_called_only_by(pool, calls):
                between = {_place_key(step): step for steps in chains for step in steps[1:-1]}.values()
                crossed = [step.module for step in between if step.kind == "identity"]
                crossed += [module for steps in chains for module in _crossed(steps)]
                relus = tuple(step for step in between if step.kind == "relu")
                yield Chain(pool, {}, relus, tuple(filter(None, crossed)))

    def _average_steps(self, run: Run, index: int) -> list[Step]:
        """From a layer by way of ReLU to an AvgPool2d."""
        steps = [run.steps[index]]
        for step in run.following(index):
            has_relu = any(before.kind == "relu" for before in steps)
            self._check_crossing([*steps, step])
            steps.append(step)
            if step.kind == "average" and has_relu:
                return steps
            if step.kind not in ("relu", "identity"):
                break
            self._check_step(step)
        raise NoChainError("no ReLU and AvgPool2d after it")


def _place_key(step: Step) -> tuple[Any, ...]:
    return id(step.container), step.name, id(step.method and step.method.module), step.call


def _crossed(steps: list[Step]) -> list[nn.Module]:
    """The Sequentials in which some of the steps are, but not all."""
    around = {id(module): module for step in steps for module in step.inside}
    return [m for m in around.values() if any(all(inner is not m for inner in step.inside) for step in steps)]


def _is_as_made(module: nn.Module) -> bool:
    """Has it neither hooks nor a forward of its own?"""
    return not has_hooks(module) and "forward" not in module.__dict__


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
        if parameter.layout is not torch.strided:
            raise NoChainError(f"its {name} is {parameter.layout}")
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise NoChainError(f"padding_mode={layer.padding_mode!r}")


def check_pool(layer: nn.Module, pool: dict[str, Any], before_relu: bool) -> None:
    """Raises NoChainError unless the fused layer can do such a pooling after ReLU in place of this one."""
    try:
        # Any kernel will do: only "same" depends on it.
        conv = (layer.stride, layer.padding, layer.dilation, layer.groups)
        options = functional.normalize_options(*conv, *pool.values(), kernel_size=(1, 1))  # type: ignore[misc]
    except (RuntimeError, TypeError, ValueError) as error:
        raise NoChainError(str(error)) from None
    # A window that lies wholly in padding gives -inf, which a ReLU before it does not change, but one after it does.
    # Without dilation there is no such window; with it, on a map that is smaller than the dilation.
    _, padding, dilation = options[5:8]
    if before_relu and any(p > 0 and d > 1 for p, d in zip(padding, dilation, strict=True)):
        raise NoChainError("a window of its dilated max-pool may lie wholly in padding, and ReLU comes after it")
