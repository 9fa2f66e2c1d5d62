"""Who computes a workload. To add one: subclass `Provider`, append it to `PROVIDERS`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenet_ext.bench.cases import MODES, FunctionCall, Workload
from lenet_ext.bench.peak import cxx_compiler
from lenet_ext.environment.device import resolve_device
from lenet_ext.training_step import TrainingStep

__all__ = ["DEFAULT_PROVIDERS", "EAGER_LAYOUTS", "FUSED_LAYOUTS", "PROVIDERS", "Program", "Provider", "surroundings"]


@dataclass(frozen=True)
class Program:
    """A workload made ready: `run` computes it once, in `surroundings`, `outputs` gives what the last run computed.

    The outputs of a forward pass are ``[output]``, those of forward and backward are the output, the gradients of the
    parameters in their order and, if the case asks for it, the gradient of the input; those of a step are the loss and
    by how much each parameter changed.
    """

    run: Callable[[], object]
    outputs: Callable[[], list[Tensor]]


def surroundings(mode: str) -> contextlib.AbstractContextManager[object]:
    """What programs of this mode run in: the forward pass in inference mode. It is entered once for many calls, as by
    whoever serves a model, because entering it takes microseconds, which are no network's."""
    return torch.inference_mode() if mode == "forward" else contextlib.nullcontext()


class Provider:
    """Base class.

    Attributes:
        name: for the command line and for files.
        title: for tables.
        modes: what it can do.
        kind: ``"fused"`` is this package, ``"eager"`` stock torch as it is commonly used, in either layout, and
            ``"peer"`` everything else.
        slow_start: whether it compiles for seconds before it runs; ``--quick`` then restricts it.
    """

    name = ""
    title = ""
    modes: tuple[str, ...] = MODES
    kind = "peer"
    slow_start = False

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        return None

    def prepare(self, work: Workload) -> Program:
        """Makes a workload ready to run. May raise whatever the library raises; the runner then leaves it out."""
        raise NotImplementedError


class ModuleProvider(Provider):
    """A module, perhaps in another memory format, perhaps compiled."""

    def __init__(
        self,
        name: str,
        title: str,
        *,
        fused: bool = False,
        channels_last: bool = False,
        compile_options: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.title = name, title
        self.kind = "fused" if fused else "eager" if compile_options is None else "peer"
        self.fused, self.channels_last, self.compile_options = fused, channels_last, compile_options
        self.slow_start = compile_options is not None
        if compile_options is not None and "freezing" in compile_options.get("options", {}):
            self.modes = ("forward",)
        elif fused and compile_options is not None:
            self.modes = ("forward", "training")  # a step of ours is one operator as it is

    def unavailable(self, device: torch.device) -> str | None:
        if self.fused:
            try:
                resolve_device(device.type)
            except RuntimeError as error:
                return str(error)
        if self.compile_options is not None and device.type == "cpu" and not cxx_compiler():
            return "torch.compile needs a C++ compiler, and none was found (CXX, g++, clang++)"
        return None

    def prepare(self, work: Workload) -> Program:
        module = (work.case.fused if self.fused else work.case.stock)().to(work.device)
        module.load_state_dict(work.state)
        if work.mode == "forward":
            module.eval()
            if self.fused and work.case.for_inference is not None:
                module = work.case.for_inference(module)
        # Copies: no provider sees tensors that another one has touched.
        images, grad_output = work.input.clone(), work.grad_output.clone()
        if self.channels_last:
            # Only the layout of what is four-dimensional changes.
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images, grad_output = _to_channels_last(images), _to_channels_last(grad_output)
        if work.mode == "step":
            return self._step_program(module, images, work)
        call: Callable[..., Tensor] = module.bound() if isinstance(module, FunctionCall) else module
        if self.compile_options is not None:
            # fullgraph: a workload that falls back to eager must not pass for a compiled one.
            call = torch.compile(call, fullgraph=True, dynamic=False, **self.compile_options)
        if work.mode == "forward":
            return _forward_program(call, images)
        return _training_program(call, list(module.parameters()), images, grad_output, work.case.input_grad)

    def _step_program(self, module: nn.Module, images: Tensor, work: Workload) -> Program:
        # The fused update is stock's fastest; the rate is so small that the thousandth step is as the first.
        optimizer = torch.optim.SGD(module.parameters(), lr=_RATE, momentum=0.9, fused=True)
        targets = work.targets
        loss_of = _LossOf(module)
        if self.fused:
            step: Callable[[Tensor, Tensor], Tensor] = TrainingStep(module, optimizer)
        else:
            if self.compile_options is not None:
                loss_of.compile(fullgraph=True, dynamic=False, **self.compile_options)

            def step(images: Tensor, targets: Tensor) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(images, targets)
                loss.backward()
                optimizer.step()
                return loss.detach()

        def outputs() -> list[Tensor]:
            """Of one step from the beginning, with a rate of 1."""
            module.load_state_dict(work.state)
            optimizer.state.clear()
            optimizer.param_groups[0]["lr"] = 1.0
            before = [parameter.detach().clone() for parameter in module.parameters()]
            loss = step(images, targets)
            changes = [parameter.detach() - old for parameter, old in zip(module.parameters(), before, strict=True)]
            optimizer.param_groups[0]["lr"] = _RATE
            return [loss, *changes]

        return Program(lambda: step(images, targets), outputs)


_RATE = 1e-6


class _LossOf(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.net(images), targets)


def _to_channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _forward_program(call: Callable[..., Any], input: Tensor) -> Program:
    result: list[Tensor] = []

    def run() -> None:
        result[:] = [call(input)]

    return Program(run, lambda: list(result))


def _training_program(
    call: Callable[..., Tensor], parameters: list[nn.Parameter], input: Tensor, grad_output: Tensor, input_grad: bool
) -> Program:
    leaves: list[Tensor] = list(parameters)
    if input_grad:
        leaves.append(input.requires_grad_())
    result: list[Tensor] = []

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        output = call(input)
        output.backward(grad_output)
        result[:] = [output.detach()]

    def outputs() -> list[Tensor]:
        return result + [leaf.grad for leaf in leaves if leaf.grad is not None]

    return Program(run, outputs)


class TorchScriptProvider(Provider):
    """TorchScript, frozen and optimized for inference."""

    modes = ("forward",)

    def __init__(self, name: str, title: str, *, channels_last: bool = False) -> None:
        self.name, self.title, self.channels_last = name, title, channels_last

    def prepare(self, work: Workload) -> Program:
        module = work.case.stock().to(work.device).eval()
        module.load_state_dict(work.state)
        images = work.input.clone()
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = _to_channels_last(images)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, which is known and no reason not to be measured
            traced = torch.jit.trace(module, images)
            frozen = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        return _forward_program(frozen, images)


class OnnxRuntimeProvider(Provider):
    """ONNX Runtime on the CPU."""

    name, title, modes = "onnxruntime", "ONNX Runtime", ("forward",)

    def unavailable(self, device: torch.device) -> str | None:
        return _missing(device, "onnxruntime", "onnx")

    def prepare(self, work: Workload) -> Program:
        import onnxruntime  # type: ignore[import-not-found, unused-ignore]

        module = work.case.stock().eval()
        module.load_state_dict(work.state)
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as directory:
            warnings.simplefilter("ignore")
            path = os.path.join(directory, "model.onnx")
            torch.onnx.export(module, (work.input,), path, input_names=["input"], dynamo=False)
            with open(path, "rb") as file:
                model = file.read()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = {"input": work.input.numpy()}
        result: list[Any] = []

        def run() -> None:
            result[:] = session.run(None, feed)

        return Program(run, lambda: [torch.from_numpy(array) for array in result])


class OpenVinoProvider(Provider):
    """OpenVINO on the CPU."""

    name, title, modes = "openvino", "OpenVINO", ("forward",)

    def unavailable(self, device: torch.device) -> str | None:
        return _missing(device, "openvino")

    def prepare(self, work: Workload) -> Program:
        import openvino  # type: ignore[import-not-found, unused-ignore]

        module = work.case.stock().eval()
        module.load_state_dict(work.state)
        model = openvino.convert_model(module, example_input=work.input, input=list(work.input.shape))
        threads = torch.get_num_threads()
        compiled = openvino.compile_model(
            # float32 throughout: on some processors the default would be a narrower type.
            model,
            "CPU",
            {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1},
        )
        request = compiled.create_infer_request()
        feed = {0: work.input.numpy()}
        result: list[Any] = []

        def run() -> None:
            result[:] = [request.infer(feed, share_inputs=True, share_outputs=True)[0]]

        return Program(run, lambda: [torch.from_numpy(array.copy()) for array in result])


def _missing(device: torch.device, *modules: str) -> str | None:
    if device.type != "cpu":
        return "compared on the CPU only"
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(absent)} (pip install 'lenet_ext[bench]')" if absent else None


_LIST: tuple[Provider, ...] = (
    ModuleProvider("fused", "fused", fused=True),
    ModuleProvider("eager", "stock eager"),
    ModuleProvider("channels_last", "stock channels last", channels_last=True),
    ModuleProvider("compile", "stock compile", compile_options={}),
    # From here on: on request.
    ModuleProvider("compile_cl", "compile channels last", channels_last=True, compile_options={}),
    ModuleProvider(
        "compile_max",
        "compile max",
        compile_options={"options": {"max_autotune": True, "freezing": True}},
    ),
    ModuleProvider("fused_channels_last", "fused channels last", fused=True, channels_last=True),
    ModuleProvider("fused_compile", "fused compile", fused=True, compile_options={}),
    TorchScriptProvider("torchscript", "TorchScript"),
    TorchScriptProvider("torchscript_cl", "TorchScript channels last", channels_last=True),
    OnnxRuntimeProvider(),
    OpenVinoProvider(),
)
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _LIST}
DEFAULT_PROVIDERS = ("fused", "eager", "channels_last", "compile")
FUSED_LAYOUTS = ("fused", "fused_channels_last")
"""Ours, of which the faster one is compared with others, where both were measured."""
EAGER_LAYOUTS = tuple(name for name, provider in PROVIDERS.items() if provider.kind == "eager")
