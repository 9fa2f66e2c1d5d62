"""The derivatives in eager mode: which gradients are computed, what may be changed in place, the graph; and the
Functions that spell them out, which give bit by bit what the operators' own nodes give.
"""

from __future__ import annotations

import inspect
from typing import ClassVar

import pytest
import reference
import torch
from failures import failure, kind
from reference import assert_equal, integers
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lenet_ext import autograd, functional, ops

NAMES = ["conv_relu_max_pool2d", "linear", "linear_relu"]
SHAPES = {
    "conv_relu_max_pool2d": [(2, 3, 9, 9), (4, 3, 3, 3), (4,)],
    "linear": [(5, 7), (3, 7), (3,)],
    "linear_relu": [(5, 7), (3, 7), (3,)],
}
FUNCTIONS = {
    "conv_relu_max_pool2d": autograd.ConvReLUMaxPool2dFunction,
    "linear": autograd.LinearFunction,
    "linear_relu": autograd.LinearReLUFunction,
}
SUBSETS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


def _operands(name, wanted=(0, 1, 2), dtype=torch.float32, device="cpu"):
    tensors = [integers(*s, dtype=dtype, device=device) for s in SHAPES[name]]
    return [t.requires_grad_(i in wanted) for i, t in enumerate(tensors)]


class Recorder(TorchDispatchMode):
    """The operators that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def of(self, namespace):
        return [call for call in self.calls if call[0].namespace == namespace]


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_needs_input_grad(device, name, wanted):
    """Only the gradients that are wanted are computed, and they are the right ones."""
    tensors = _operands(name, wanted, device=device)
    expected = [t.detach().cpu().requires_grad_(t.requires_grad) for t in tensors]
    output = getattr(functional, name)(*tensors)
    with Recorder() as record:
        output.sum().backward()
    getattr(reference, name)(*expected).sum().backward()
    for i, (ours, stock) in enumerate(zip(tensors, expected, strict=True)):
        assert (ours.grad is None) == (i not in wanted)
        assert_equal(ours.grad, stock.grad, f"gradient {i}")
    masks = [args[-1] for func, args, _ in record.of("lenet_ext") if "backward" in func.name()]
    assert masks == [[i in wanted for i in range(3)]], "one call of the backward operator, with this mask"


@pytest.mark.parametrize("name", NAMES)
def test_one_operator_each_way(device, name):
    """No convolution, no ReLU, no pooling of stock anywhere: one kernel forward, one backward."""
    tensors = _operands(name, device=device)
    with Recorder() as record:
        output = getattr(functional, name)(*tensors)
        output.backward(torch.ones_like(output))
    ours = [func.name() for func, _, _ in record.of("lenet_ext")]
    assert len(ours) == 2, ours
    assert ours[1].endswith("_backward"), ours
    heavy = ("conv", "pool", "relu", "threshold", "mm", "linear", "sum")
    stock = [func.name() for func, _, _ in record.of("aten") if any(word in func.name() for word in heavy)]
    assert not stock, stock


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept_where_no_gradient_is_needed(device, name):
    tensors = [t.detach() for t in _operands(name, device=device)]
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context, Recorder() as record:
            output = getattr(functional, name)(*tensors)
        assert output.grad_fn is None
        assert not output.requires_grad
        assert [func.name() for func, _, _ in record.of("lenet_ext")] == [f"lenet_ext::{name}"], (
            "not the op that keeps indices"
        )


NODES = {
    "conv_relu_max_pool2d": "ConvReLUMaxPool2DBackward",
    "linear": "LinearBackward",
    "linear_relu": "LinearReLUBackward",
}


@pytest.mark.parametrize("name", NAMES)
def test_grad_fn(name):
    """The node in the graph is ours, and its edges lead to the operands, in their order."""
    tensors = _operands(name)
    output = getattr(functional, name)(*tensors)
    assert output.grad_fn.name() == NODES[name]
    edges = [edge[0] for edge in output.grad_fn.next_functions]
    assert [id(edge.variable) for edge in edges] == [id(t) for t in tensors]
    *_, bias = getattr(functional, name)(tensors[0].detach(), tensors[1]).grad_fn.next_functions
    assert bias[0] is None


# --- the Functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_setup_context_style(name):
    """What torch.func needs."""
    cls = FUNCTIONS[name]
    assert issubclass(cls, torch.autograd.Function)
    assert "ctx" not in inspect.signature(cls.forward).parameters
    assert cls.setup_context is not torch.autograd.Function.setup_context
    assert "\\partial" in (cls.__doc__ or ""), "the derivative in symbols"


OPTIONS = {
    "plain": {},
    "asymmetric padding": {"padding": (1, 0, 0, 2)},
    "strides and dilation": {"stride": (2, 1), "dilation": (1, 2)},
    "groups": {"groups": 3, "padding": (1, 1, 1, 1)},
    "overlapping, padded pool": {"pool_kernel_size": (3, 3), "pool_stride": (2, 1), "pool_padding": (1, 1)},
    "ceil, dilated pool": {"pool_stride": (1, 3), "pool_dilation": (2, 1), "ceil_mode": True},
}
DEFAULTS = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1, "pool_kernel_size": (2, 2)}
DEFAULTS |= {"pool_stride": (2, 2), "pool_padding": (0, 0), "pool_dilation": (1, 1), "ceil_mode": False}
CASES = [*(("conv_relu_max_pool2d", options) for options in OPTIONS), ("linear", "plain"), ("linear_relu", "plain")]


def _bits(tensors):
    return [None if t is None else t.detach().contiguous().view(torch.uint8) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_functions_give_bit_by_bit_what_the_operators_give(device, name, options, wanted, dtype):
    """Output, gradients, and the gradients of these."""
    chosen = {**DEFAULTS, **OPTIONS[options]}
    others = list(chosen.values()) if name == "conv_relu_max_pool2d" else []
    shapes = [(2, 6, 9, 10), (6, 6 // chosen["groups"], 3, 3), (6,)] if others else SHAPES[name]
    values = [torch.randn(s).to(device, dtype) for s in shapes]
    results = []
    for call in (getattr(ops, name), FUNCTIONS[name].apply):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(values)]
        output = call(*leaves, *others)
        output = output[0] if isinstance(output, tuple) else output
        chosen_leaves = [leaves[i] for i in wanted]
        first = torch.autograd.grad(output.cos().sum(), chosen_leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), chosen_leaves)
        results.append(_bits([output, *first, *second]))
    assert all(bits.any() for bits in results[0])
    for ours, spelled_out in zip(*results, strict=True):
        assert torch.equal(ours, spelled_out)


@pytest.mark.parametrize("name", NAMES)
def test_functions_have_no_forward_mode(name):
    """It is the operators': a tangent is refused, never dropped."""
    others = list(DEFAULTS.values()) if name == "conv_relu_max_pool2d" else []
    x, *rest = (t.detach() for t in _operands(name))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"(?i)forward[- ]mode"):
        FUNCTIONS[name].apply(forward_ad.make_dual(x, torch.ones_like(x)), *rest, *others)


def test_indices_of_the_function_have_no_gradient():
    output, indices = FUNCTIONS["conv_relu_max_pool2d"].apply(*_operands("conv_relu_max_pool2d"), *DEFAULTS.values())
    assert output.requires_grad
    assert indices.dtype == torch.uint8
    assert not indices.requires_grad


@pytest.mark.parametrize("mask", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_functions_under_vmap_of_grad(name, mask):
    others = list(DEFAULTS.values()) if name == "conv_relu_max_pool2d" else []
    operands = [torch.stack([t, t.flip(0), -t]).detach() for t in _operands(name, dtype=torch.float64)]

    def loss(function):
        def of(*tensors):
            output = function(*tensors, *others)
            return (output[0] if isinstance(output, tuple) else output).pow(2).sum()

        return torch.func.vmap(torch.func.grad(of, argnums=mask))(*operands)

    for actual, expected in zip(loss(FUNCTIONS[name].apply), loss(getattr(ops, name)), strict=True):
        assert expected.any()
        assert_equal(actual, expected, "grad")


def _grad(function, tensors, which):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves).sum(), leaves[which])[0]


# --- in place ----------------------------------------------------------------------------------------------------

CHANGES = {
    "add_": lambda output: output.add_(1),
    "mul_": lambda output: output.mul_(2),
    "relu_": lambda output: output.relu_(),
    "zero_": lambda output: output.zero_(),
    "setitem": lambda output: output.__setitem__(0, 0.5),
    "view": lambda output: output.view(-1).add_(1),
    "detach": lambda output: output.detach().add_(1),
    "data": lambda output: output.data.add_(0),
    "dropout": lambda output: torch.nn.functional.dropout(output, 1.0, inplace=True),
    "no_grad": lambda output: _without_grad(output),
}


def _without_grad(output):
    with torch.no_grad():
        output.add_(1)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [*NAMES, "conv_relu_max_pool2d unbatched"])
def test_output_changed_in_place(device, name, change):
    """Legal exactly where it is in stock, with the same gradients: on pooled and on linear output, not on ReLU's."""
    name, *unbatched = name.split()
    outcomes = []
    for module in (functional, reference):
        torch.manual_seed(1)
        tensors = [t.requires_grad_() for t in (integers(*s, device=device) for s in SHAPES[name])]
        operands = [tensors[0][0], *tensors[1:]] if unbatched else tensors

        def call(module=module, operands=operands):
            output = getattr(module, name)(*operands)
            CHANGES[change](output)
            output.sum().backward()

        outcomes.append((failure(call), tensors))
    (error, ours), (stock_error, stock) = outcomes
    assert (error is None) == (stock_error is None), f"{error!r} where stock has {stock_error!r}"
    if stock_error is None:
        for a, b in zip(ours, stock, strict=True):
            assert_equal(a.grad, b.grad, "grad")
    else:
        assert kind(error) is kind(stock_error)
        assert "modified by an inplace operation" in str(error)
        assert name == "linear_relu", "only ReLU needs its output"


def test_the_table_above_contains_both_outcomes():
    x, w = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)
    functional.linear(x, w).add_(1).sum().backward()
    with pytest.raises(RuntimeError, match="inplace"):
        functional.linear_relu(x, w).add_(1).sum().backward()


@pytest.mark.parametrize("which", [0, 1], ids=["input", "weight"])
@pytest.mark.parametrize("name", NAMES)
def test_operand_changed_before_backward(device, name, which):
    """The version counter notices: an error instead of the gradient of something else."""
    tensors = _operands(name, device=device)
    leaves = [t.clone() for t in tensors]
    output = getattr(functional, name)(*leaves)
    leaves[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_bias_may_be_changed_before_backward(name):
    """It is not needed for any derivative."""
    x, w, b = _operands(name)
    bias = b.clone()
    output = getattr(functional, name)(x, w, bias)
    bias.add_(1)
    output.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_gradients_may_be_changed_in_place(name):
    """Clipping, scaling, `grad.zero_()`: the next backward is not affected by the last one's memory."""
    x, w, b = _operands(name)
    output = getattr(functional, name)(x, w, b)
    grads = torch.autograd.grad(output.sum(), (x, w, b), retain_graph=True)
    copies = [g.clone() for g in grads]
    for g in grads:
        g.fill_(float("nan"))
    again = torch.autograd.grad(output.sum(), (x, w, b))
    for a, e in zip(again, copies, strict=True):
        assert_equal(a, e, "grad")


# --- the graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_backward_twice_needs_retain_graph(name):
    tensors = _operands(name)
    loss = getattr(functional, name)(*tensors).sum()
    loss.backward(retain_graph=True)
    first = tensors[1].grad.clone()
    loss.backward()
    assert_equal(tensors[1].grad, 2 * first, "grad")
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_saved_tensor_hooks(device, name):
    """Saved through save_for_backward, so that offloading and checkpointing see every tensor."""
    tensors = _operands(name, device=device)
    expected = torch.autograd.grad(getattr(functional, name)(*tensors).sum(), tensors)
    packed = []

    def pack(tensor):
        packed.append(tensor.dtype)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = getattr(functional, name)(*tensors)
    assert len(packed) >= 2
    if name == "conv_relu_max_pool2d":
        assert packed.count(torch.uint8) == 1, "one byte per output"
        assert len(packed) == 3, "input and weight besides, and nothing else"
    for a, e in zip(torch.autograd.grad(output.sum(), tensors), expected, strict=True):
        assert_equal(a, e, "grad")
    with torch.autograd.graph.save_on_cpu():
        output = getattr(functional, name)(*tensors)
    for a, e in zip(torch.autograd.grad(output.sum(), tensors), expected, strict=True):
        assert_equal(a, e, "grad with save_on_cpu")


def test_nothing_of_the_convolutions_size_is_saved():
    """The point of the fusion: memory for the backward pass is input, weight and one byte per pooled output."""
    x, w = torch.randn(4, 1, 32, 32), torch.randn(6, 1, 5, 5, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        functional.conv_relu_max_pool2d(x, w)
    assert sum(sizes) <= x.nbytes + w.nbytes + 4 * 6 * 14 * 14


def test_the_convolution_is_never_stored():
    """Neither forward nor backward allocates memory of the size of the convolution's output, 10 MB here."""
    x = torch.randn(512, 1, 32, 32, requires_grad=True)
    w, b = torch.randn(6, 1, 5, 5, requires_grad=True), torch.randn(6, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.no_grad():
            functional.conv_relu_max_pool2d(x, w, b)
        output = functional.conv_relu_max_pool2d(x, w, b)
        output.backward(torch.ones_like(output))
    conv_size = 512 * 6 * 28 * 28 * 4
    allocated = {e.name: e.self_cpu_memory_usage for e in profile.events() if "lenet_ext" in e.name}
    assert {name.split("::")[1] for name in allocated} == {
        "conv_relu_max_pool2d",  # also with a gradient: its node calls the operator that keeps the indices
        "conv_relu_max_pool2d_backward",
    }
    children = [e for e in profile.events() if e.cpu_parent is not None and "lenet_ext" in e.cpu_parent.name]
    sizes = [*allocated.values(), *(e.self_cpu_memory_usage for e in children)]
    assert sum(size for size in sizes if size > 0) > 512 * 6 * 14 * 14 * 4, "the profiler saw no allocation at all"
    assert max(sizes) < conv_size / 2, allocated


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing(name, use_reentrant):
    tensors = _operands(name)
    expected = torch.autograd.grad(getattr(functional, name)(*tensors).sum(), tensors)
    checkpoint(getattr(functional, name), *tensors, use_reentrant=use_reentrant).sum().backward()
    for t, e in zip(tensors, expected, strict=True):
        assert_equal(t.grad, e, "grad")


@pytest.mark.parametrize("name", NAMES)
def test_anomaly_mode(name):
    tensors = _operands(name)
    with torch.autograd.detect_anomaly(check_nan=True):
        getattr(functional, name)(*tensors).sum().backward()
    assert tensors[1].grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_unused_output(name):
    """A branch of the model that does not reach the loss: gradient None or zero, no crash."""
    tensors = _operands(name)
    getattr(functional, name)(*tensors)
    other = torch.ones(1, requires_grad=True)
    assert torch.autograd.grad(other.sum(), tensors, allow_unused=True) == (None, None, None)


@pytest.mark.parametrize("name", NAMES)
def test_output_used_twice(name):
    ours, stock = _operands(name), _operands(name)
    stock = [t.detach().requires_grad_() for t in ours]
    for module, tensors in ((functional, ours), (reference, stock)):
        output = getattr(module, name)(*tensors)
        (output.sum() + (output * output).sum()).backward()
    for a, b in zip(ours, stock, strict=True):
        assert_equal(a.grad, b.grad, "grad")


@pytest.mark.parametrize("name", NAMES)
def test_input_is_its_own_weight(name):
    """The same tensor twice: both gradients arrive."""
    shape = (4, 4, 3, 3) if name.startswith("conv") else (4, 4)
    options = {"pool_kernel_size": 1} if name.startswith("conv") else {}
    value = integers(*shape)
    grads = []
    for module in (functional, reference):
        t = value.clone().requires_grad_()
        getattr(module, name)(t, t, **options).sum().backward()
        grads.append(t.grad)
    assert_equal(*grads, "grad")


@pytest.mark.parametrize("name", NAMES)
def test_hooks_on_tensors(name):
    tensors = _operands(name)
    seen = []
    output = getattr(functional, name)(*tensors)
    output.register_hook(lambda g: seen.append("output") or g * 2)
    tensors[1].register_hook(lambda g: seen.append("weight"))
    output.sum().backward()
    assert seen == ["output", "weight"]
    assert_equal(tensors[1].grad, 2 * _grad(getattr(reference, name), tensors, 1), "grad")


@pytest.mark.parametrize("name", NAMES)
def test_create_graph_gives_the_same_gradient(device, name):
    """With a graph of the backward pass another code path runs; the numbers are the same."""
    tensors = _operands(name, device=device)
    loss = getattr(functional, name)(*tensors).sum()
    plain = torch.autograd.grad(loss, tensors, retain_graph=True)
    graph = torch.autograd.grad(loss, tensors, create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        assert_equal(b, a, "grad")
    assert graph[0].requires_grad
    assert graph[1].requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_gradient_penalty(device, name):
    """The second derivative where the first comes from a constant: of the gradient with the other operands alone."""
    tensors = _operands(name, device=device)
    found = []
    for function, leaves in (
        (getattr(functional, name), tensors),
        (getattr(reference, name), [t.detach().cpu().requires_grad_() for t in tensors]),
    ):
        (grad,) = torch.autograd.grad(function(*leaves).sum(), leaves[0], create_graph=True)
        found.append(torch.autograd.grad(grad.pow(2).sum(), leaves[1]))
    assert_equal(*(grad for (grad,) in found), "grad of weight")


@pytest.mark.parametrize("name", NAMES)
def test_torch_function_overrides(name):
    """Tensor subclasses and proxies (torch.fx) see the call under its own name."""

    class Logged(torch.Tensor):
        calls: ClassVar[list] = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.calls.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x, w, b = (t.detach() for t in _operands(name))
    result = getattr(functional, name)(x.as_subclass(Logged), w, b)
    assert getattr(functional, name) in Logged.calls
    assert_equal(result.as_subclass(torch.Tensor), getattr(reference, name)(x, w, b), "output")


@pytest.mark.parametrize("name", NAMES)
def test_subclass_without_overrides_works(name):
    class Plain(torch.Tensor):
        pass

    x, w, b = (t.detach() for t in _operands(name))
    result = getattr(functional, name)(x.as_subclass(Plain), w, b)
    assert_equal(result.as_subclass(torch.Tensor), getattr(reference, name)(x, w, b), "output")
    nn_parameter = torch.nn.Parameter(w)
    getattr(functional, name)(x, nn_parameter, b).sum().backward()
    assert nn_parameter.grad is not None


def test_threads_of_autograd():
    """backward() from several Python threads at once, each with its own graph, and all on one shared weight."""
    import threading

    x, w, _ = _operands("conv_relu_max_pool2d")
    expected = _grad(functional.conv_relu_max_pool2d, [x, w], 1)
    results, errors = [None] * 8, []

    def work(i):
        try:
            for _ in range(5):
                results[i] = torch.autograd.grad(functional.conv_relu_max_pool2d(x, w).sum(), w)[0]
        except Exception as error:  # an exception in a thread would otherwise be lost
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for result in results:
        assert_equal(result, expected, "grad")


# --- ReLU and average pooling, which has no parameters ---------------------------------------------------------------

AVERAGE = {
    "plain": ((2, 2), (2, 2), (0, 0), False, True, None),
    "overlapping": ((3, 2), (2, 1), (1, 1), True, False, None),
    "divisor": ((3, 3), (3, 3), (0, 1), False, True, 7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", AVERAGE)
def test_relu_avg_pool2d_by_its_function_and_by_its_node(device, name, dtype):
    """Output, gradient, and the gradient of this, bit by bit; one operator each way."""
    values, results = torch.randn(2, 3, 9, 10).to(device, dtype), []
    for call in (ops.relu_avg_pool2d, autograd.ReLUAvgPool2dFunction.apply):
        input = values.clone().requires_grad_()
        with Recorder() as record:
            output = call(input, *AVERAGE[name])
            grad_output = torch.ones_like(output).requires_grad_()
            (first,) = torch.autograd.grad(output, input, grad_output, create_graph=True)
        assert [func.name() for func, _, _ in record.of("lenet_ext")] == [
            "lenet_ext::relu_avg_pool2d",
            "lenet_ext::relu_avg_pool2d_backward",
        ]
        (second,) = torch.autograd.grad(first.sin().sum(), grad_output)
        results.append(_bits([output, first, second]))
    assert all(bits.any() for bits in results[0])
    for ours, spelled_out in zip(*results, strict=True):
        assert torch.equal(ours, spelled_out)


@pytest.mark.parametrize("change", CHANGES)
def test_output_of_relu_avg_pool2d_changed_in_place(change):
    """Legal, as it is in stock, and the gradients are stock's."""
    gradients = []
    for module in (functional, reference):
        torch.manual_seed(1)
        input = integers(2, 3, 8, 8).requires_grad_()
        output = module.relu_avg_pool2d(input, 2)
        CHANGES[change](output)
        output.sum().backward()
        gradients.append(input.grad)
    assert_equal(*gradients, "grad")


def test_input_of_relu_avg_pool2d_changed_before_backward():
    input = integers(2, 3, 8, 8).requires_grad_().clone()
    output = functional.relu_avg_pool2d(input, 2)
    input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_relu_avg_pool2d_keeps_its_input_and_nothing_else():
    input, kept = torch.randn(2, 3, 8, 8).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = functional.relu_avg_pool2d(input, 2)
        with torch.no_grad():
            functional.relu_avg_pool2d(input, 2)
        functional.relu_avg_pool2d(input.detach(), 2)
    assert [t.data_ptr() for t in kept] == [input.data_ptr()]
    assert output.grad_fn.name() == "ReLUAvgPool2DBackward"
