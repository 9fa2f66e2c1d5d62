"""A step of training as one call: forward, loss, backward and update."""

from __future__ import annotations

from numbers import Integral, Real
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as global_hooks

from lenet_ext import ops
from lenet_ext._C import are_plain_leaves
from lenet_ext.net import Net

__all__ = ["TrainingStep"]

ONE_OPERATOR = "one operator"

_LOSSES = ("cross_entropy", "mse")
_OPTIMIZERS: dict[type[Optimizer], str] = {SGD: "sgd", Adam: "adam", AdamW: "adamw"}
_DTYPES = frozenset({torch.float32, torch.float64})


class TrainingStep:
    """What a training loop does with a batch, as one call::

        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), targets, weight=weight, ignore_index=..., label_smoothing=...)
        loss.backward()
        optimizer.step()

    For an unmodified :class:`lenet_ext.Net` with ``torch.optim.SGD``, ``Adam`` or ``AdamW`` this is one operator, which
    changes the network's parameters and the optimizer's state in place, without autograd. For everything else it is the
    loop above; :attr:`path` says which it is, and why. Either way the parameters, the optimizer's ``state_dict`` and
    the loss are those of the loop, within rounding, and a loop can go on where steps ended, or the other way round.
    ``param_groups`` are read at each call, so schedulers work.

    Args:
        net: the network; any module, and a :class:`lenet_ext.Net` for the one operator.
        optimizer: of the network's parameters.
        loss: ``"cross_entropy"`` (``F.cross_entropy``) or ``"mse"`` (``F.mse_loss``), the mean over the batch.
        label_smoothing, weight, ignore_index: of ``F.cross_entropy``.
        count_correct: count the right answers of each batch, for :attr:`correct`.

    Raises:
        TypeError: ``net`` is no module, ``optimizer`` no ``torch.optim.Optimizer``, ``weight`` no tensor,
            ``label_smoothing`` no number, or ``ignore_index`` no integer.
        ValueError: another loss; an option of cross entropy with ``"mse"``; ``label_smoothing`` outside [0, 1].

    Note:
        The one operator leaves ``.grad`` of the parameters as it was; the loop leaves the batch's gradients there.

    Example:
        >>> import torch, lenet_ext
        >>> net = lenet_ext.Net()
        >>> step = lenet_ext.TrainingStep(net, torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9))
        >>> loss = step(torch.randn(64, 1, 32, 32), torch.randint(10, (64,)))
        >>> loss.shape, step.path
        (torch.Size([]), 'one operator')
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        loss: str = "cross_entropy",
        *,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        count_correct: bool = False,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"TrainingStep: net must be an nn.Module, got {type(net).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"TrainingStep: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if loss not in _LOSSES:
            raise ValueError(f"TrainingStep: loss must be one of {', '.join(_LOSSES)}, got {loss!r}")
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"TrainingStep: weight must be a Tensor, got {type(weight).__name__}")
        for name, value, kind in (("label_smoothing", label_smoothing, Real), ("ignore_index", ignore_index, Integral)):
            if not isinstance(value, (kind, Tensor)):
                expected = "a number" if kind is Real else "an int"
                raise TypeError(f"TrainingStep: {name} must be {expected}, got {type(value).__name__}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"TrainingStep: label_smoothing must be between 0 and 1, got {label_smoothing}")
        if loss == "mse" and (label_smoothing != 0.0 or weight is not None or ignore_index != -100):
            raise ValueError(
                "TrainingStep: label_smoothing, weight and ignore_index belong to cross_entropy, not to mse"
            )
        self.net = net
        self.optimizer = optimizer
        self.loss = loss
        self.label_smoothing = float(label_smoothing)
        self.weight = weight
        self.ignore_index = int(ignore_index)
        self.count_correct = count_correct
        self.correct: Tensor | None = None
        """Of the last batch, with ``count_correct``: how many images the network had right before the update, a 0-dim
        int64 tensor on their device. Right is where the largest output is the target's, or where a target of the
        output's shape is largest too. Targets of ``ignore_index`` do not count."""
        self._path = ""
        self._view: _View | None = None

    @property
    def path(self) -> str:
        """How the last call was done: ``"one operator"``, or ``"plain loop: "`` and why. Empty before the first."""
        return self._path

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Trains on a batch.

        Args:
            images: ``(N, C, 32, 32)`` for a :class:`lenet_ext.Net`.
            targets: as the loss takes them: ``(N,)`` int64, or for ``"mse"`` of the output's shape.

        Returns:
            The batch's loss before the update, a 0-dim tensor without a graph. The host does not wait for the device.

        Raises:
            IndexError: a target is no class of the network (on the CPU).
            ValueError: there are not as many targets as images.
            RuntimeError: shapes, dtypes or devices do not fit together otherwise.
        """
        parameters = self._ordinary(images, targets)
        return (
            self._plain_loop(images, targets) if parameters is None else self._one_operator(parameters, images, targets)
        )

    def _plain_loop(self, images: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        output = self.net(images)
        if self.loss == "mse":
            loss = F.mse_loss(output, targets)
        else:
            loss = F.cross_entropy(
                output, targets, self.weight, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
            )
        loss.backward()
        self.optimizer.step()
        if self.count_correct:
            self.correct = _count_correct(output.detach(), targets, self.ignore_index)
        return loss.detach()

    def _ordinary(self, images: Tensor, targets: Tensor) -> list[Tensor] | None:
        """The network's parameters where one operator does what the loop would, else None; notes the path."""
        reason = None
        parameters = None
        if torch.compiler.is_compiling():
            reason = "torch.compile"
        elif type(self.net) is not Net:
            reason = f"the network is a {type(self.net).__name__}"
        elif _watched(self.net):
            reason = "the network has a hook or a forward of its own"
        elif not isinstance(images, Tensor) or (parameters := self.net._parameters_of_whole_network(images)) is None:
            reason = "the network was changed, has hooks, or does not take these images as one operator"
        else:
            reason = self._reason(parameters, images, targets)
        self._path = ONE_OPERATOR if reason is None else f"plain loop: {reason}"
        return parameters if reason is None else None

    def _reason(self, parameters: list[Tensor], images: Tensor, targets: Tensor) -> str | None:
        if type(self.optimizer) not in _OPTIMIZERS:
            return f"the optimizer is {type(self.optimizer).__name__}"
        if images.dtype not in _DTYPES:
            return f"the dtype is {images.dtype}"
        if not torch.is_grad_enabled() or torch.is_anomaly_enabled() or torch.is_inference_mode_enabled():
            return "gradients are switched off, or anomaly detection on"
        if images.requires_grad or not len(images):
            return "the images are none, or require a gradient"
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return "hooks on saved tensors"
        if not are_plain_leaves(parameters):
            return "a parameter is frozen or has a hook"
        if not self._fits(targets, images, parameters):
            return "the targets are not a class index for each image, or not of the output's shape"
        if self._view is None or not self._view.holds(self.optimizer, parameters):
            self._view = _View(self.optimizer, parameters)
        return self._view.reason or _reason_in_optimizer(self.optimizer)

    def _fits(self, targets: Any, images: Tensor, parameters: list[Tensor]) -> bool:
        if type(targets) is not Tensor or targets.requires_grad or targets.device != images.device:
            return False
        if self.weight is not None and (self.weight.requires_grad or type(self.weight) is not Tensor):
            return False
        if self.loss == "mse":
            return targets.dtype == images.dtype and targets.shape == (len(images), len(parameters[-1]))
        return targets.dtype == torch.int64 and targets.dim() == 1 and len(targets) == len(images)

    def _one_operator(self, parameters: list[Tensor], images: Tensor, targets: Tensor) -> Tensor:
        optimizer = self.optimizer
        assert self._view is not None
        state, options = self._view.read()
        try:
            loss, correct = ops.lenet_training_step(
                images,
                targets,
                self.weight,
                parameters,
                state,
                self.loss,
                self.label_smoothing,
                self.ignore_index,
                _OPTIMIZERS[type(optimizer)],
                options,
            )
        except BaseException:
            # Ctrl-C is told when the operator is through; after an error its new buffers hold nothing yet.
            if all(buffer._version for buffer in state):
                self._view.store()
            else:
                self._view = None
            raise
        self._view.store()
        if self.count_correct:
            self.correct = correct
        if "step" in optimizer.__dict__:
            optimizer._opt_called = True  # type: ignore[attr-defined] # what a scheduler asks for
        return loss


def _count_correct(output: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    dim = min(1, output.dim() - 1)  # the classes, which an output without a batch has first
    found = output.argmax(dim)
    if targets.is_floating_point():
        return (found == targets.argmax(dim)).sum()
    return ((found == targets) & (targets != ignore_index)).sum()


def _watched(net: Net) -> bool:
    """Could anything see or change what the network does as a whole?"""
    return bool(
        net._forward_hooks
        or net._forward_pre_hooks
        or net._backward_hooks
        or net._backward_pre_hooks
        or "forward" in net.__dict__
    )


def _reason_in_optimizer(optimizer: Optimizer) -> str | None:
    if (
        optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]
        or optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]
        or global_hooks._global_optimizer_pre_hooks
        or global_hooks._global_optimizer_post_hooks
    ):
        return "the optimizer has hooks"
    own_step = optimizer.__dict__.get("step")
    if own_step is not None and not getattr(own_step, "_wrapped_by_lr_sched", False):
        return "the optimizer's step was replaced"
    for group in optimizer.param_groups:
        if group.get("differentiable") or group.get("capturable") or isinstance(group["lr"], Tensor):
            return "the optimizer is differentiable, capturable, or has a tensor for its rate"
        if "betas" in group and any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "the optimizer has tensors for its betas"
    return None


class _View:
    """What an optimizer keeps for the network's parameters, found once, and again when something in it was replaced.

    Finding it costs more than a small kernel; whether it still holds is a matter of comparing identities.
    """

    def __init__(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.signature = self._signature()
        self.reason: str | None = None
        self.stored = True
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if count != len(parameters) or groups.keys() != {id(parameter) for parameter in parameters}:
            self.reason = "the optimizer's parameters are not those of the network"
            return
        self.groups: list[dict[str, Any]] = [groups[id(parameter)] for parameter in parameters]
        self.has_one_group = len(optimizer.param_groups) == 1
        self.kept: list[dict[str, Any]] = [optimizer.state.get(parameter) or {} for parameter in parameters]
        self.adam = type(optimizer) is not SGD
        self.amsgrad = self.groups[0].get("amsgrad", False)
        if any(group.get("amsgrad", False) != self.amsgrad for group in self.groups):
            self.reason = "the optimizer's groups differ in amsgrad"

    def _signature(self) -> list[int]:
        identities = [id(self.optimizer.state), *map(id, self.optimizer.state.values())]
        for group in self.optimizer.param_groups:
            identities += map(id, group["params"])
        return identities

    def holds(self, optimizer: Optimizer, parameters: list[Tensor]) -> bool:
        return (
            optimizer is self.optimizer
            and all(map(is_, parameters, self.parameters))
            and self.signature == self._signature()
            and self.amsgrad == optimizer.param_groups[0].get("amsgrad", False)
        )

    def read(self) -> tuple[list[Tensor], list[float]]:
        """State and options as the operator takes them: options once if all are in one group, else for each."""
        if self.adam:
            groups = self.groups[:1] if self.has_one_group else self.groups
            return self._adam_state(), [option for group in groups for option in self._adam_options(group)]
        buffers: list[Any] = [own.get("momentum_buffer") for own in self.kept]
        first = [buffer is None for buffer in buffers]
        if self.has_one_group and first.count(first[0]) == len(first):
            options = self._sgd_options(self.groups[0], first[0])
        else:
            options = [
                option
                for group, is_first in zip(self.groups, first, strict=True)
                for option in self._sgd_options(group, is_first)
            ]
        return self._sgd_state() if any(first) else buffers, options

    def _sgd_options(self, group: dict[str, Any], first: bool) -> list[float]:
        values = [group["lr"], group["momentum"], group["dampening"], group["weight_decay"]]
        return [*values, group["nesterov"], group["maximize"], first]

    def _adam_options(self, group: dict[str, Any]) -> list[float]:
        return [group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["maximize"]]

    def _sgd_state(self) -> list[Tensor]:
        if not any(group["momentum"] for group in self.optimizer.param_groups):
            return []
        for parameter, group, own in zip(self.parameters, self.groups, self.kept, strict=True):
            if own.get("momentum_buffer") is None:
                own["momentum_buffer"] = torch.empty_like(parameter, requires_grad=False) if group["momentum"] else None
                self.stored = False
        return [
            parameter if own["momentum_buffer"] is None else own["momentum_buffer"]  # one that is not read
            for parameter, own in zip(self.parameters, self.kept, strict=True)
        ]

    def _adam_state(self) -> list[Tensor]:
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else ("exp_avg", "exp_avg_sq")
        for parameter, group, own in zip(self.parameters, self.groups, self.kept, strict=True):
            if not own:
                own["step"] = _first_step(parameter, group)
                own.update((name, torch.zeros_like(parameter, requires_grad=False)) for name in names)
                self.stored = False
        return [own[name] for name in (*names, "step") for own in self.kept]

    def store(self) -> None:
        """Puts what is new into the optimizer's state. Only after the step: one that raised has changed nothing."""
        if not self.stored:
            for parameter, own in zip(self.parameters, self.kept, strict=True):
                if own.get("momentum_buffer", True) is not None:
                    self.optimizer.state[parameter] = own
            self.signature = self._signature()
            self.stored = True


def _first_step(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """As torch.optim.Adam makes it: on the device for its fused kernels, else on the CPU."""
    if group["fused"]:
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    return torch.zeros((), dtype=torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32)
