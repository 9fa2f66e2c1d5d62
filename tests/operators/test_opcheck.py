"""torch.library.opcheck on every registered operator: schema, aliasing, fake implementation, AOT dispatch.

Gradients through the raw operators are not promised (the autograd Functions stand outside of them), so the operands
here require none.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import LAYOUTS, integers
from torch.library import opcheck

import lenet_ext  # noqa: F401  registers the operators

CHECKS = ("test_schema", "test_faketensor")
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


def _check(op, args, kwargs, dynamic=False):
    """`dynamic` traces with symbolic sizes as torch.compile(dynamic=True) does: slow, so once per case."""
    result = opcheck(op, args, kwargs, test_utils=(*CHECKS, "test_aot_dispatch_dynamic") if dynamic else CHECKS)
    assert set(result.values()) == {"SUCCESS"}, result


# All shapes and layouts in float32, one of each in the other dtypes. A slice of nothing is left out: PyTorch's own
# check cannot copy such a tensor.
COMBINATIONS = [
    (case, layout, torch.float32)
    for case in CONV
    for layout in ("contiguous", "channels_last", "sliced")
    if (case, layout) != ("empty", "sliced")
]
COMBINATIONS += [("everything", "channels_last", torch.float64), ("everything", "contiguous", torch.bfloat16)]
MASKS = [list(mask) for mask in itertools.product([True, False], repeat=3) if any(mask)]


@pytest.mark.parametrize(("case", "layout", "dtype"), COMBINATIONS, ids=str)
class TestConv:
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("op", [OPS.conv_relu_max_pool2d, OPS.conv_relu_max_pool2d_with_indices], ids=str)
    def test_forward(self, device, case, layout, dtype, op, bias):
        x, w, b, options = _conv_operands(case, layout, dtype, device)
        _check(
            op.default,
            (x, w, b if bias else None),
            {**options, "ceil_mode": case == "everything"},
            layout != "sliced" and bias,
        )

    @pytest.mark.parametrize("mask", MASKS, ids=str)
    def test_backward(self, device, case, layout, dtype, mask):
        x, w, b, options = _conv_operands(case, layout, dtype, device)
        output, indices = OPS.conv_relu_max_pool2d_with_indices(x, w, b, **options, ceil_mode=False)
        grad = integers(*output.shape, dtype=dtype, device=device)
        _check(
            OPS.conv_relu_max_pool2d_backward.default,
            (grad, indices, x if mask[1] else None, w if mask[0] else None),
            {"input_size": x.shape, "weight_size": w.shape, **options, "output_mask": mask},
            all(mask),
        )

    def test_at_indices(self, device, case, layout, dtype):
        x, w, b, options = _conv_operands(case, layout, dtype, device)
        _, indices = OPS.conv_relu_max_pool2d_with_indices(x, w, b, **options, ceil_mode=True)
        _check(OPS.conv_at_indices.default, (x, w, b, indices), options, layout != "sliced")


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
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("op", [OPS.linear, OPS.linear_relu], ids=str)
    def test_forward(self, device, leading, layout, dtype, op, bias):
        x = LAYOUTS[layout](integers(*leading, 5, dtype=dtype, device=device))
        w, b = integers(4, 5, dtype=dtype, device=device), integers(4, dtype=dtype, device=device)
        _check(op.default, (x, w, b if bias else None), {}, layout == "contiguous")

    @pytest.mark.parametrize("mask", MASKS, ids=str)
    def test_backward(self, device, leading, dtype, mask):
        x, w = integers(*leading, 5, dtype=dtype, device=device), integers(4, 5, dtype=dtype, device=device)
        grad, output = (integers(*leading, 4, dtype=dtype, device=device) for _ in range(2))
        needed = (x if mask[1] else None, w if mask[0] else None)
        _check(OPS.linear_backward.default, (grad, *needed), {"output_mask": mask}, all(mask))
        _check(OPS.linear_relu_backward.default, (grad, output, *needed), {"output_mask": mask}, all(mask))


class TestLeNet:
    """The whole network: CPU, float32."""

    @staticmethod
    def _operands(batch):
        shapes = [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]
        return integers(batch, 1, 32, 32), [integers(*shape, low=-1, high=1) for shape in shapes]

    @pytest.mark.parametrize("batch", [0, 1, 3, 33])
    def test_forward(self, batch):
        x, parameters = self._operands(batch)
        _check(OPS.lenet.default, (x, parameters), {}, batch == 3)
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
        "lenet",
        "lenet_with_activations",
        "lenet_backward",
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
