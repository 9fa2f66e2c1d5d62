"""Tensors that stock takes and no kernel of ours does: sparse, nested, of no dimension."""

from __future__ import annotations

import warnings

import pytest
import reference
import torch
import torch.nn.functional as F
from failures import failure, kind
from reference import assert_equal
from torch import nn, ones, tensor

import lenet_ext
from lenet_ext import functional

SPARSE = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
    "bsr": lambda t: t.to_sparse_bsr((1, 2)),
}


@pytest.fixture(autouse=True)
def _beta():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch's sparse and nested tensors are young
        yield


def same_as_stock(name, *arguments, **options):
    error, stock_error = (failure(getattr(m, name), *arguments, **options) for m in (functional, reference))
    assert (error is None) == (stock_error is None), f"{error!r} where stock has {stock_error!r}"
    if error is not None:
        assert kind(error) is kind(stock_error), f"{error!r} where stock has {stock_error!r}"
        return None
    output, expected = (getattr(m, name)(*arguments, **options) for m in (functional, reference))
    assert output.layout == expected.layout
    return output, expected


def test_a_sparse_weight():
    weight = torch.eye(3, 4).to_sparse_csr()
    assert_equal(functional.linear(ones(2, 4), weight), ones(2, 3), "output")
    assert_equal(functional.linear_relu(ones(2, 4), weight, -ones(3)), torch.zeros(2, 3), "output")


@pytest.mark.parametrize("what", ["input", "weight", "both"])
@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("name", ["linear", "linear_relu"])
def test_sparse_operands(name, layout, what):
    input, weight = reference.integers(2, 4), reference.integers(6, 4)
    input = SPARSE[layout](input) if what != "weight" else input
    weight = SPARSE[layout](weight) if what != "input" else weight
    for bias in (None, ones(6)):
        result = same_as_stock(name, input, weight, bias)
        if result is not None:
            assert_equal(result[0].to_dense(), result[1].to_dense(), "output")


@pytest.mark.parametrize("layout", SPARSE)
def test_a_sparse_weight_trains(layout):
    grads = []
    for module in (functional, reference):
        weight = SPARSE[layout](torch.eye(4)).requires_grad_()
        input = ones(2, 4, requires_grad=True)
        error = failure(lambda m=module, i=input, w=weight: m.linear(i, w).sum().backward())
        grads.append((None if error is None else kind(error), input.grad, weight.grad))
    (error, *ours), (stock_error, *stock) = grads
    assert error is stock_error
    for actual, expected in zip(ours, stock, strict=True):
        dense = [None if t is None else t.to_dense() for t in (actual, expected)]
        assert_equal(*dense, "gradient")


def test_sparse_images_and_kernels():
    image, kernel = ones(1, 1, 4, 4), ones(1, 1, 2, 2)
    same_as_stock("conv_relu_max_pool2d", image.to_sparse(), kernel)
    same_as_stock("conv_relu_max_pool2d", image, kernel.to_sparse())


def test_a_model_with_a_sparse_weight_is_fused_and_works():
    """In place: copy.deepcopy refuses such a parameter."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    model[0].weight = nn.Parameter(torch.eye(3, 4).to_sparse_csr(), requires_grad=False)
    expected = model(ones(2, 4))
    assert_equal(lenet_ext.fuse(model, inplace=True)(ones(2, 4)), expected, "output")


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", ["linear", "linear_relu"])
def test_nested_input(name, layout):
    """A batch of rows of several lengths, with gradients."""
    grads = []
    for module in (functional, reference):
        rows = [torch.arange(float(n * 4)).view(n, 4).sub(3) for n in (2, 3)]
        leaves = [row.requires_grad_() for row in rows]
        weight, bias = torch.eye(3, 4).requires_grad_(), tensor([1.0, 0, -1]).requires_grad_()
        output = getattr(module, name)(torch.nested.as_nested_tensor(leaves, layout=layout), weight, bias)
        assert output.is_nested
        assert output.layout == layout
        torch.cat([row.flatten() for row in output.unbind()]).pow(2).sum().backward()
        grads.append([*(row.detach() for row in output.unbind()), *(t.grad for t in (*leaves, weight, bias))])
    for actual, expected in zip(*grads, strict=True):
        assert expected.any()
        assert_equal(actual, expected, "output or gradient")


NUMBERS = {
    "padding": tensor(1),
    "stride": tensor(2, dtype=torch.int32),
    "dilation": tensor(2, dtype=torch.uint8),
    "groups": tensor(2, dtype=torch.int16),
    "pool_kernel_size": tensor(3),
    "pool_stride": tensor(1, dtype=torch.int8),
    "pool_dilation": tensor(2),
}


@pytest.mark.parametrize("name", [*NUMBERS, "pair", "pool_padding"])
def test_a_tensor_of_one_integer_as_an_int(name):
    image, kernel = reference.integers(1, 2, 9, 9), reference.integers(4, 1 if name == "groups" else 2, 3, 3)
    options = {name: NUMBERS.get(name)}
    if name == "pair":
        options = {"padding": (tensor(1), 2), "pool_kernel_size": (2, tensor(3))}
    elif name == "pool_padding":
        options = {"pool_kernel_size": 3, "pool_padding": tensor(1)}
    output, expected = same_as_stock("conv_relu_max_pool2d", image, kernel, **options)
    assert_equal(output, expected, "output")
    plain = {k: tuple(map(int, v)) if isinstance(v, tuple) else int(v) for k, v in options.items()}
    assert_equal(output, F.max_pool2d(F.relu(conv(image, kernel, plain)), *pool(plain)), "output")


def conv(image, kernel, options):
    return F.conv2d(image, kernel, **reference.conv_options(options))


def pool(options):
    size = options.get("pool_kernel_size", 2)
    return size, options.get("pool_stride"), options.get("pool_padding", 0), options.get("pool_dilation", 1)


@pytest.mark.parametrize(
    "value", [tensor(1.0), tensor(1.5), tensor(True), tensor([1]), tensor([1, 1]), tensor([])], ids=str
)
@pytest.mark.parametrize("name", ["padding", "stride", "pool_kernel_size"])
def test_other_tensors_are_refused_or_taken_as_in_stock(name, value):
    same_as_stock("conv_relu_max_pool2d", ones(1, 1, 6, 6), ones(1, 1, 2, 2), **{name: value})
