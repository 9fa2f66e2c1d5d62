"""Every transform of PyTorch on every operation: values and gradients are stock's, or both raise the same error.

A derivative that silently is zero or missing is what this table is there to find, so every result must hold a number
other than zero.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from failures import kind
from subjects import SUBJECTS, loss, subject, trained
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten_with_path, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Transform = Callable[[nn.Module, Tensor], Any]


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, **{"fullgraph": True, "backend": "aot_eager", **options})


# --- for torch.func: a module as a function of its parameters --------------------------------------------------------


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def called(module: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda values, x: functional_call(module, values, (x,))


def loss_of(module: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda values, x: loss(called(module)(values, x))


def of_first_bias(module: nn.Module) -> Callable[[Tensor], dict[str, Tensor]]:
    """All parameters as a function of the first bias: for Jacobians, whose size is a product."""
    values = parameters(module)
    name = next(name for name in values if name.endswith("bias"))
    return lambda bias: {**values, name: bias}


def first_bias(module: nn.Module) -> Tensor:
    return next(value for name, value in parameters(module).items() if name.endswith("bias"))


def per_sample(module: nn.Module) -> Callable[..., Any]:
    function = grad(lambda values, sample: loss_of(module)(values, sample[None]), argnums=(0, 1))
    return vmap(function, in_dims=(None, 0))


def tangents(primals: Any) -> Any:
    return tree_map(lambda t: torch.arange(t.numel()).remainder(3).sub(1).to(t).view(t.shape), primals)


def backward_through(function: Callable[..., Tensor], module: nn.Module, input: Tensor) -> Any:
    leaves = {name: value.requires_grad_() for name, value in parameters(module).items()}
    output = function(leaves, input)
    loss(output).backward()
    return output.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def func_trained(module: nn.Module, input: Tensor) -> Any:
    return backward_through(called(module), module, input)


def func_vjp(module: nn.Module, input: Tensor) -> Any:
    output, pullback = vjp(called(module), parameters(module), input)
    return output, pullback(torch.ones_like(output))


def func_jvp(module: nn.Module, input: Tensor) -> Any:
    primals = parameters(module), input
    return jvp(called(module), primals, tangents(primals))


def func_linearize(module: nn.Module, input: Tensor) -> Any:
    output, pushed = linearize(called(module), parameters(module), input)
    return output, pushed(*tangents((parameters(module), input)))


def func_grad_of_compiled(module: nn.Module, input: Tensor) -> Any:
    return grad(compiled(loss_of(module)), argnums=(0, 1))(parameters(module), input)


def jacobian(jac: Callable[..., Any]) -> Transform:
    def transform(module: nn.Module, input: Tensor) -> Any:
        bias, single = of_first_bias(module), input[:1]
        return jac(lambda value: called(module)(bias(value), single))(first_bias(module))

    return transform


def func_hessian(module: nn.Module, input: Tensor) -> Any:
    bias, single = of_first_bias(module), input[:1]
    return hessian(lambda value: loss_of(module)(bias(value), single))(first_bias(module))


def func_ensemble(module: nn.Module, input: Tensor) -> Any:
    several = {name: torch.stack([value, 2 * value, -value]) for name, value in parameters(module).items()}
    return vmap(grad_and_value(loss_of(module)), in_dims=(0, None))(several, input)


def double_backward(module: nn.Module, input: Tensor) -> Any:
    leaves = [input.clone().requires_grad_(), *module.parameters()]
    first = torch.autograd.grad(loss(module(leaves[0])), leaves, create_graph=True)
    return first, torch.autograd.grad(sum(loss(gradient) for gradient in first), leaves)


# --- graphs ----------------------------------------------------------------------------------------------------------


def exported(strict: bool = False, decompose: bool = False) -> Transform:
    def transform(module: nn.Module, input: Tensor) -> Any:
        program = torch.export.export(module, (input,), strict=strict)
        return eager((program.run_decompositions() if decompose else program).module(), input)

    return transform


def exported_dynamic(module: nn.Module, input: Tensor) -> Any:
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    return twice_eager(torch.export.export(module, (input,), dynamic_shapes=shapes).module(), input)


def saved_export(module: nn.Module, input: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, (input,)), buffer)
    buffer.seek(0)
    return eager(torch.export.load(buffer).module(), input)


def made_fx(mode: str) -> Transform:
    def transform(module: nn.Module, input: Tensor) -> Any:
        function = grad_and_value(loss_of(module), argnums=(0, 1))
        return make_fx(function, tracing_mode=mode)(parameters(module), input)(parameters(module), input)

    return transform


def made_fx_then_trained(module: nn.Module, input: Tensor) -> Any:
    return backward_through(make_fx(called(module))(parameters(module), input), module, input)


def jit_traced(module: nn.Module, input: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, input), buffer)
    buffer.seek(0)
    return twice_eager(torch.jit.load(buffer), input)


def jit_frozen(module: nn.Module, input: Tensor) -> Any:
    module.eval()
    with torch.no_grad():
        return torch.jit.freeze(torch.jit.trace(module, input))(input)


def compile_dynamic(module: nn.Module, input: Tensor) -> Any:
    function = compiled(module, dynamic=True)
    return [trained(function, module, other) for other in (input, torch.cat([input, input]))]


def compiled_autograd(module: nn.Module, input: Tensor) -> Any:
    with torch._dynamo.compiled_autograd._enable(compiled):
        return eager(module, input)


# --- the rest --------------------------------------------------------------------------------------------------------


def unpacked(saved: tuple[torch.device, Any]) -> Tensor:
    return torch.from_numpy(saved[1]).to(saved[0])


def with_saved_tensors_hooks(module: nn.Module, input: Tensor) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.device, t.cpu().numpy().copy()), unpacked):
        return eager(module, input)


def in_inference_mode(module: nn.Module, input: Tensor) -> Any:
    with torch.inference_mode():
        return module(input)


def checkpointed(use_reentrant: bool) -> Transform:
    def transform(module: nn.Module, input: Tensor) -> Any:
        return trained(lambda x: checkpoint(module, x, use_reentrant=use_reentrant), module, input)

    return transform


def selectively_checkpointed(module: nn.Module, input: Tensor) -> Any:
    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        ours = "lenet_ext" in str(operator)
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return trained(lambda x: checkpoint(module, x, use_reentrant=False, context_fn=contexts), module, input)


def pickled(module: nn.Module, input: Tensor) -> Any:
    return eager(pickle.loads(pickle.dumps(module)), input)


def deep_copied(module: nn.Module, input: Tensor) -> Any:
    return eager(copy.deepcopy(module), input)


class Row(NamedTuple):
    run: Transform
    plain: Transform  # what stock must give: the same without the transform, or the transform itself


def eager(module: nn.Module, input: Tensor) -> Any:
    return trained(module, module, input)


def twice_eager(module: nn.Module, input: Tensor) -> Any:
    return [eager(module, input), eager(module, torch.cat([input, input]))]


def func_grad(module: nn.Module, input: Tensor) -> Any:
    return grad(loss_of(module), argnums=(0, 1))(parameters(module), input)


def func_grad_and_value(module: nn.Module, input: Tensor) -> Any:
    return grad_and_value(loss_of(module), argnums=(0, 1))(parameters(module), input)


def func_vmap_of_grad(module: nn.Module, input: Tensor) -> Any:
    return per_sample(module)(parameters(module), input)


def output_alone(module: nn.Module, input: Tensor) -> Any:
    return module(input).detach()


def itself(transform: Transform) -> Row:
    return Row(transform, transform)


# Quick ones, tried on everything in `make test`.
TRANSFORMS = {
    "eager": itself(eager),
    "double backward": itself(double_backward),
    "functional_call": Row(lambda module, x: called(module)(parameters(module), x), output_alone),
    "inference_mode": Row(in_inference_mode, output_alone),
    "deepcopy": Row(deep_copied, eager),
    "pickle": Row(pickled, eager),
    "saved_tensors_hooks": Row(with_saved_tensors_hooks, eager),
    "checkpoint": Row(checkpointed(use_reentrant=False), eager),
    "reentrant checkpoint": Row(checkpointed(use_reentrant=True), eager),
    "selective checkpoint": Row(selectively_checkpointed, eager),
    "func.grad": itself(func_grad),
    "vjp": itself(func_vjp),
    "jvp": itself(func_jvp),
    "linearize": Row(func_linearize, func_jvp),
    "jacrev": itself(jacobian(jacrev)),
    "jacfwd": itself(jacobian(jacfwd)),
    "hessian": itself(func_hessian),
    "vmap(grad)": itself(func_vmap_of_grad),
    "vmap over parameters": itself(func_ensemble),
    "make_fx": Row(made_fx("real"), func_grad_and_value),
    "make_fx fake": Row(made_fx("fake"), func_grad_and_value),
    "make_fx then train": Row(made_fx_then_trained, func_trained),
    "jit.trace": Row(jit_traced, twice_eager),
    "jit.freeze": Row(jit_frozen, output_alone),
}
# A second or more each: in `make test` tried on one operation.
COMPILED = {
    "make_fx symbolic": Row(made_fx("symbolic"), func_grad_and_value),
    "export": Row(exported(), eager),
    "export strict": Row(exported(strict=True), eager),
    "export dynamic": Row(exported_dynamic, twice_eager),
    "export saved": Row(saved_export, eager),
    "run_decompositions": Row(exported(decompose=True), eager),
    "compile": Row(lambda module, x: trained(compiled(module), module, x), eager),
    "compile dynamic": Row(compile_dynamic, twice_eager),
    "compile inductor": Row(lambda module, x: trained(compiled(module, backend="inductor"), module, x), eager),
    "compile in inference_mode": Row(lambda module, x: in_inference_mode(compiled(module), x), output_alone),
    "compile(func.grad)": Row(compiled(func_grad), func_grad),
    "func.grad(compile)": Row(func_grad_of_compiled, func_grad),
    "compile(vmap(grad))": Row(compiled(func_vmap_of_grad), func_vmap_of_grad),
    "compile(vmap over parameters)": Row(compiled(func_ensemble), func_ensemble),
    "compile(vjp)": Row(compiled(func_vjp), func_vjp),
    "compile(jvp)": Row(compiled(func_jvp), func_jvp),
    "compile(jacrev)": Row(compiled(jacobian(jacrev)), jacobian(jacrev)),
    "compile(jacfwd)": Row(compiled(jacobian(jacfwd)), jacobian(jacfwd)),
    "compile(hessian)": Row(compiled(func_hessian), func_hessian),
    "compiled autograd": Row(compiled_autograd, eager),
}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(row: Row, name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    ours, stock, input = subject(name, dtype, device)
    try:
        actual = row.run(ours, input)
    except Exception as error:
        torch._dynamo.reset()
        with pytest.raises(kind(error)):  # or it is ours alone
            row.run(stock, input)
        return
    found, structure = tree_flatten_with_path(actual)
    wanted, stock_structure = tree_flatten_with_path(row.plain(stock, input))
    assert structure == stock_structure
    for (path, a), (_, e) in zip(found, wanted, strict=True):
        assert isinstance(a, Tensor), f"{path}: {a}"
        assert e.any(), f"{path}: stock's is zero, and nothing is tested"
        assert a.dtype == e.dtype, f"{path}: {a.dtype} instead of {e.dtype}"
        atol = torch.finfo(dtype).eps * 30 * float(e.detach().abs().max())
        torch.testing.assert_close(a, e, rtol=0, atol=atol, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_as_stock(device, transform, name, dtype):
    check(TRANSFORMS[transform], name, dtype, device)


SOONER = "linear_relu"


NO_COMPILER = shutil.which("g++") is None and shutil.which("clang++") is None


def marks(transform: str, name: str) -> list[pytest.MarkDecorator]:
    inductor = transform == "compile inductor"
    return [
        *([pytest.mark.extended] if inductor or name != SOONER else []),
        *([pytest.mark.skipif(NO_COMPILER, reason="inductor needs a compiler")] if inductor else []),
    ]


@pytest.mark.parametrize(
    ("transform", "name"), [pytest.param(t, n, marks=marks(t, n)) for t in COMPILED for n in SUBJECTS]
)
def test_compiled_as_stock(device, transform, name):
    check(COMPILED[transform], name, torch.float32, device)


def test_the_check_notices():
    """A derivative that is zero, one that is missing, and an error that is ours alone."""
    no_grad = Row(lambda module, x: trained(lambda x: module(x.detach()), module, x), eager)
    with pytest.raises(AssertionError, match="grad of input"):
        check(no_grad, "linear", torch.float32)
    zero = Row(lambda module, x: tree_map(lambda t: t * 0, eager(module, x)), eager)
    with pytest.raises(AssertionError, match="not close"):
        check(zero, "linear", torch.float32)

    def refused(module: nn.Module, input: Tensor) -> Any:
        if module.module_name == "lenet_ext.functional":
            raise NotImplementedError
        return eager(module, input)

    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(Row(refused, eager), "linear", torch.float32)
