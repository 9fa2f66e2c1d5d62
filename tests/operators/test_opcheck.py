"""torch.library.opcheck on every registered operator, with all that it checks: schema and aliasing, how the derivative
is registered, the fake implementation, and outputs and gradients as torch.compile would get them; for every choice of
gradients. And the fake implementation on CUDA, for which no GPU is needed.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import LAYOUTS, integers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

import lenet_ext  # noqa: F401  registers the operators

OPS = torch.ops.lenet_ext

CONV = {
    "plain": ((2, 3, 9, 9), (4, 3, 3, 3), {}),
    "one image": ((1, 1, 6, 6), (2, 1, 3, 3), {}),
    "empty": ((0, 3, 9, 9), (4, 3, 3, 3), {}),
    "everything": (
        (2, 4, 12, 11),
        (6, 2, 3, 2),
        {
            "stride": [2, 1],
            "padding": [1, 2, 0, 1],
            "dilation": [1, 2],
            "groups": 2,
            "pool_kernel_size": [3, 2],
            "pool_stride": [2, 1],
            "pool_padding": [1, 0],
            "pool_dilation": [1, 2],
        },
    ),
    "overlapping": ((2, 3, 13, 12), (5, 3, 3, 3), {"pool_kernel_size": [3, 3]}),
}
OPTIONS = {
    "stride": [1, 1],
    "padding": [0, 0, 0, 0],
    "dilation": [1, 1],
    "groups": 1,
    "pool_kernel_size": [2, 2],
    "pool_stride": [2, 2],
    "pool_padding": [0, 0],
    "pool_dilation": [1, 1],
}


def _conv_operands(case, layout, dtype, device):
    image, weight, options = CONV[case]
    x = LAYOUTS[layout](integers(*image, dtype=dtype, device=device))
    w, b = integers(*weight, dtype=dtype, device=device), integers(weight[0], dtype=dtype, device=device)
    return x, w, b, {**OPTIONS, **options}


def _metadata(value):
    return tuple(value.shape), value.stride(), value.dtype, value.requires_grad


def _check(op, args, kwargs, dynamic=False):
    """`dynamic` traces with symbolic sizes as torch.compile(dynamic=True) does, twice: slow, so once per case."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_static", "test_aot_dispatch_dynamic"] if dynamic else []
    result = opcheck(op, args, kwargs, test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}, result

    detached = tree_map_only(torch.Tensor, lambda t: t.detach().clone(memory_format=torch.preserve_format), args)
    expected = tree_map_only(torch.Tensor, _metadata, op(*detached, **kwargs))
    with FakeTensorMode():
        fake = tree_map_only(
            torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"), detached
        )
        outputs = op(*fake, **kwargs)
    assert {t.device.type for t in torch.utils._pytree.tree_leaves(outputs)} == {"cuda"}
    assert tree_map_only(torch.Tensor, _metadata, outputs) == expected


def _requiring(wanted, *tensors):
    return [t if t is None else t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]


# All shapes and layouts in float32, one of each in the other dtypes. A slice of nothing is left out: PyTorch's own
# check cannot copy such a tensor.
COMBINATIONS = [
    (case, layout, torch.float32)
    for case in CONV
    for layout in ("contiguous", "channels_last", "sliced")
    if (case, layout) != ("empty", "sliced")
]
COMBINATIONS += [("everything", "channels_last", torch.float64), ("everything", "contiguous", torch.bfloat16)]
_SOONER = [(True, True, True), (True, False, False), (False, True, False)]
MASKS = [
    pytest.param(list(mask), marks=() if mask in _SOONER else pytest.mark.extended)
    for mask in itertools.product((True, False), repeat=3)
]


def _marked(case, layout, dtype):
    """Each shape once in `make test`, one of them in another layout."""
    sooner = (layout == "contiguous" and dtype == torch.float32) or (case, layout) == ("everything", "channels_last")
    return pytest.param(case, layout, dtype, marks=() if sooner else pytest.mark.extended)


@pytest.mark.parametrize(("case", "layout", "dtype"), [_marked(*c) for c in COMBINATIONS], ids=str)
class TestConv:
    @pytest.mark.parametrize("wanted", MASKS, ids=str)
    @pytest.mark.parametrize("op", [OPS.conv_relu_max_pool2d, OPS.conv_relu_max_pool2d_with_indices], ids=str)
    def test_forward(self, device, case, layout, dtype, op, wanted):
        x, w, b, options = _conv_operands(case, layout, dtype, device)
        arguments = (*_requiring(wanted, x, w, b if wanted[1] or wanted[2] else None),)
        traced = case == "everything" and layout == "channels_last" and dtype == torch.float32
        _check(op.default, arguments, {**options, "ceil_mode": case == "everything"}, traced)

    @pytest.mark.parametrize("mask", MASKS, ids=str)
    @pytest.mark.parametrize("differentiated", [False, True])
    def test_backward(self, device, case, layout, dtype, mask, differentiated):
        x, w, b, options = _conv_operands(case, layout, dtype, device)
        output, indices = OPS.conv_relu_max_pool2d_with_indices(x, w, b, **options, ceil_mode=False)
        grad = integers(*output.shape, dtype=dtype, device=device)
        # As the derivative calls it: with the operands that the wanted gradients need.
        grad, x, w = _requiring([differentiated] * 3, grad, x if mask[1] else None, w if mask[0] else None)
        sizes = (CONV[case][0], CONV[case][1])
        traced = case == "everything" and layout == "channels_last" and dtype == torch.float32
        _check(
            OPS.conv_relu_max_pool2d_backward.default,
            (grad, indices, x, w, *sizes),
            {**options, "output_mask": mask},
            traced and any(mask),
        )

    @pytest.mark.parametrize("wanted", [[True] * 3, [False] * 3], ids=str)
    def test_at_indices(self, device, case, layout, dtype, wanted):
        x, w, b, options = _conv_operands(case, layout, dtype, device)
        _, indices = OPS.conv_relu_max_pool2d_with_indices(x, w, b, **options, ceil_mode=True)
        arguments = (*_requiring(wanted, x, w, b), indices)
        _check(OPS.conv_at_indices.default, arguments, options, layout == "channels_last")


LINEAR = [
    ((3,), torch.float32),
    ((), torch.float32),
    ((0,), torch.float32),
    ((2, 3), torch.float64),
    ((3,), torch.bfloat16),
]


@pytest.mark.parametrize(("leading", "dtype"), LINEAR, ids=str)
class TestLinear:
    @pytest.mark.parametrize("layout", ["contiguous", "every_other"])
    @pytest.mark.parametrize("wanted", MASKS, ids=str)
    @pytest.mark.parametrize("op", [OPS.linear, OPS.linear_relu], ids=str)
    def test_forward(self, device, leading, layout, dtype, op, wanted):
        x = LAYOUTS[layout](integers(*leading, 5, dtype=dtype, device=device))
        w, b = integers(4, 5, dtype=dtype, device=device), integers(4, dtype=dtype, device=device)
        arguments = (*_requiring(wanted, x, w, b if wanted[1] or wanted[2] else None),)
        _check(op.default, arguments, {}, (leading, layout) == ((2, 3), "every_other"))

    @pytest.mark.parametrize("mask", MASKS, ids=str)
    @pytest.mark.parametrize("differentiated", [False, True])
    def test_backward(self, device, leading, dtype, mask, differentiated):
        x = integers(*leading, 5, dtype=dtype, device=device) if mask[1] else None
        w = integers(4, 5, dtype=dtype, device=device) if mask[0] else None
        grad, output = (integers(*leading, 4, dtype=dtype, device=device) for _ in range(2))
        grad, x, w = _requiring([differentiated] * 3, grad, x, w)
        traced = leading == (2, 3) and any(mask)
        _check(OPS.linear_backward.default, (grad, x, w), {"output_mask": mask}, traced)
        _check(OPS.linear_relu_backward.default, (grad, output, x, w), {"output_mask": mask}, traced)


class TestLeNet:
    """The whole network: CPU, float32."""

    @staticmethod
    def _operands(batch):
        shapes = [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]
        return integers(batch, 1, 32, 32), [integers(*shape, low=-1, high=1) for shape in shapes]

    @pytest.mark.parametrize("wanted", ["nothing", "all", "part", "input", "parameters"])
    @pytest.mark.parametrize("batch", [0, 1, 3, 33])
    def test_forward(self, batch, wanted):
        x, parameters = self._operands(batch)
        x.requires_grad_(wanted in ("all", "input"))
        for i, parameter in enumerate(parameters):
            parameter.requires_grad_(wanted in ("all", "parameters") or (wanted == "part" and i % 3 == 0))
        _check(OPS.lenet.default, (x, parameters), {}, batch == 3)

    @pytest.mark.parametrize("batch", [0, 1, 3, 33])
    def test_with_activations(self, batch):
        x, parameters = self._operands(batch)
        _check(OPS.lenet_with_activations.default, (x, parameters), {}, batch == 3)

    @pytest.mark.parametrize("input_gradient", [True, False])
    @pytest.mark.parametrize("batch", [0, 1, 3, 33])
    def test_backward(self, batch, input_gradient):
        x, parameters = self._operands(batch)
        output, *activations = OPS.lenet_with_activations(x, parameters)
        _check(
            OPS.lenet_backward.default,
            (integers(*output.shape), x, parameters, *activations, input_gradient),
            {},
            batch == 3,
        )

    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    @pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
    def test_training_step(self, optimizer, loss):
        """It changes the parameters and what the optimizer keeps, and says so in its schema."""
        x, parameters = self._operands(3)
        targets = torch.tensor([1, 0, 9]) if loss == "cross_entropy" else integers(3, 10)
        state = [torch.zeros_like(p) for p in parameters * (1 if optimizer == "sgd" else 2)]
        state += [] if optimizer == "sgd" else [torch.zeros(()) for _ in parameters]
        options = [0.1, 0.9, 0.0, 0.0, False, False, True] if optimizer == "sgd" else [0.1, 0.9, 0.99, 1e-8, 0.0, False]
        arguments = (x, targets, None, parameters, state, loss, 0.0, -100, optimizer, options * len(parameters))
        _check(OPS.lenet_training_step.default, arguments, {}, optimizer == "sgd")


@pytest.mark.parametrize("op", [OPS.lenet_with_activations, OPS.lenet_backward], ids=str)
def test_what_has_no_derivative_says_so(op):
    """The inside of the network's derivative: called by hand with what requires a gradient it would give none."""
    x, parameters = TestLeNet._operands(2)
    output, *activations = OPS.lenet_with_activations(x, parameters)
    arguments = [x, parameters] if op is OPS.lenet_with_activations else [output, x, parameters, *activations, True]
    for i, argument in enumerate(arguments):
        changed = list(arguments)
        if isinstance(argument, list):
            changed[i] = [*argument[:-1], argument[-1].clone().requires_grad_()]
        elif isinstance(argument, torch.Tensor) and argument.dtype.is_floating_point:
            changed[i] = argument.clone().requires_grad_()
        else:
            continue
        with pytest.raises(NotImplementedError, match="no derivative"):
            op(*changed)
        with torch.no_grad():
            op(*changed)


AVERAGE = {
    "plain": ([2, 2], [2, 2], [0, 0], False, True, None),
    "overlapping": ([3, 2], [2, 1], [1, 1], True, False, None),
    "divisor": ([3, 3], [2, 2], [1, 0], True, True, 5),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("name", AVERAGE)
def test_relu_avg_pool2d(device, name, layout):
    input = LAYOUTS[layout](torch.randn(2, 3, 8, 9, dtype=torch.float64, device=device))
    dynamic = layout == "contiguous" and name == "overlapping"
    _check(OPS.relu_avg_pool2d.default, (input.requires_grad_(), *AVERAGE[name]), {}, dynamic)
    grad = torch.randn_like(OPS.relu_avg_pool2d(input, *AVERAGE[name])).detach()
    for wanted in (False, True):
        tensors = grad.clone().requires_grad_(), input.detach().requires_grad_(wanted)
        _check(OPS.relu_avg_pool2d_backward.default, (*tensors, *AVERAGE[name]), {}, dynamic and wanted)


def test_every_operator_is_checked_here():
    names = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("lenet_ext::")
    }
    checked = {
        "conv_relu_max_pool2d",
        "conv_relu_max_pool2d_with_indices",
        "conv_relu_max_pool2d_backward",
        "conv_at_indices",
        "linear",
        "linear_relu",
        "linear_backward",
        "linear_relu_backward",
        "relu_avg_pool2d",
        "relu_avg_pool2d_backward",
        "lenet",
        "lenet_with_activations",
        "lenet_backward",
        "lenet_training_step",
    }
    assert names == checked, "an operator that this file does not check, or one that is gone"


def test_indices_of_the_winner():
    """The winner's place in its window, row by row; 255 where nothing is alive."""
    x = torch.tensor([[1.0, 2, 0, 0, -1, -2], [3, 0, 7, 7, -1, -3]])[None, None]
    _, indices = OPS.conv_relu_max_pool2d_with_indices(x, torch.ones(1, 1, 1, 1), None, **OPTIONS, ceil_mode=False)
    assert indices.dtype == torch.uint8
    assert indices.flatten().tolist() == [2, 2, 255]


def test_conv_at_indices_is_the_forward_at_the_winners(device):
    x, w, b, options = _conv_operands("everything", "contiguous", torch.float32, device)
    output, indices = OPS.conv_relu_max_pool2d_with_indices(x, w, b, **options, ceil_mode=False)
    assert torch.equal(OPS.conv_at_indices(x, w, b, indices, **options), output)
    assert output.any()
