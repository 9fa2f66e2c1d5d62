"""PyTorch's own sample inputs and error inputs for conv2d, max_pool2d and linear, composed, against ours."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
from failures import failure, kind

from lenet_ext import functional

methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
OPS = {op.name: op for op in methods.op_db if not op.variant_test_name}

POOL_NAMES = {
    "kernel_size": "pool_kernel_size",
    "stride": "pool_stride",
    "padding": "pool_padding",
    "dilation": "pool_dilation",
    "ceil_mode": "ceil_mode",
}
# Pools to put behind the convolutions of the samples, and convolutions to put in front of the pools.
POOLS = [
    {"pool_kernel_size": 2},
    {"pool_kernel_size": 1},
    {"pool_kernel_size": (2, 1), "pool_stride": 1, "ceil_mode": True},
]


def _conv_samples(device, dtype):
    for sample in OPS["nn.functional.conv2d"].sample_inputs(device, dtype, requires_grad=False):
        for pool in POOLS:
            yield (sample.input, *sample.args), {**sample.kwargs, **pool}


def _pool_samples(device, dtype):
    for sample in OPS["nn.functional.max_pool2d"].sample_inputs(device, dtype, requires_grad=False):
        image = sample.input
        if image.dim() not in (3, 4) or image.shape[-3] == 0:
            continue
        kwargs = dict(zip(POOL_NAMES, sample.args, strict=False)) | sample.kwargs
        kwargs.pop("return_indices", None)
        channels = image.shape[-3]
        weight = torch.ones(channels, 1, 1, 1, dtype=dtype, device=device)
        yield (image, weight), {"groups": channels, **{POOL_NAMES[k]: v for k, v in kwargs.items()}}


def _linear_samples(device, dtype):
    for sample in OPS["nn.functional.linear"].sample_inputs(device, dtype, requires_grad=False):
        yield (sample.input, *sample.args), sample.kwargs


SAMPLES = {
    ("conv_relu_max_pool2d", "conv2d"): _conv_samples,
    ("conv_relu_max_pool2d", "max_pool2d"): _pool_samples,
    ("linear", "linear"): _linear_samples,
    ("linear_relu", "linear"): _linear_samples,
}
# 1-ulp differences of a few terms of about 10: PyTorch's own defaults for these dtypes.
TOLERANCES = {torch.float32: {"rtol": 1.3e-6, "atol": 2e-5}, torch.float64: {"rtol": 1e-7, "atol": 1e-10}}


def _grads(function, args, kwargs, grad_output=None):
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    kwargs = {k: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    wanted = [t for t in [*leaves, *kwargs.values()] if isinstance(t, torch.Tensor)]
    output = function(*leaves, **kwargs)
    if grad_output is None:
        grad_output = torch.randn_like(output)
    return output, torch.autograd.grad(output, wanted, grad_output), grad_output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "op"), SAMPLES, ids=lambda v: v)
def test_samples(device, name, op, dtype):
    accepted = rejected = 0
    for args, kwargs in SAMPLES[name, op](device, dtype):
        stock_error = failure(getattr(reference, name), *args, **kwargs)
        if stock_error is not None:
            error = failure(getattr(functional, name), *args, **kwargs)
            assert error is not None, f"accepted where stock raises {stock_error!r}: {args}, {kwargs}"
            assert kind(error) is kind(stock_error), f"{error!r} where stock raises {stock_error!r}"
            rejected += 1
            continue
        expected, expected_grads, grad_output = _grads(getattr(reference, name), args, kwargs)
        actual, grads, _ = _grads(getattr(functional, name), args, kwargs, grad_output)
        torch.testing.assert_close(actual, expected, **TOLERANCES[dtype], equal_nan=True)
        torch.testing.assert_close(grads, expected_grads, **TOLERANCES[dtype], equal_nan=True)
        with torch.no_grad():
            inference = getattr(functional, name)(*args, **kwargs)
        torch.testing.assert_close(inference, expected.detach(), **TOLERANCES[dtype], equal_nan=True)
        accepted += 1
    assert accepted >= 5, f"only {accepted} samples accepted, {rejected} rejected: nothing was tested"


def _conv_errors(device):
    for error in OPS["nn.functional.conv2d"].error_inputs(device):
        sample = error.sample_input
        yield (sample.input, *sample.args), {**sample.kwargs, "pool_kernel_size": 1}


def _pool_errors(device):
    for error in OPS["nn.functional.max_pool2d"].error_inputs(device):
        sample = error.sample_input
        kwargs = dict(zip(POOL_NAMES, sample.args, strict=False)) | sample.kwargs
        kwargs.pop("return_indices", None)
        channels = sample.input.shape[-3] if sample.input.dim() >= 3 else 1
        weight = torch.ones(channels, 1, 1, 1, device=device, dtype=sample.input.dtype)
        yield (sample.input, weight), {"groups": channels, **{POOL_NAMES[k]: v for k, v in kwargs.items()}}


@pytest.mark.parametrize("errors", [_conv_errors, _pool_errors], ids=["conv2d", "max_pool2d"])
def test_error_inputs(device, errors):
    count = 0
    for args, kwargs in errors(device):
        stock_error = failure(reference.conv_relu_max_pool2d, *args, **kwargs)
        if stock_error is None:
            continue  # an error of the single layer that the composition does not have
        error = failure(functional.conv_relu_max_pool2d, *args, **kwargs)
        assert error is not None, f"accepted where stock raises {stock_error!r}: {kwargs}"
        assert kind(error) is kind(stock_error), f"{error!r} where stock raises {stock_error!r}"
        count += 1
    assert count >= 3, "nothing was tested"


def test_second_derivatives_of_samples(device):
    """gradgradcheck on the smallest samples of PyTorch's own, whose values are random: few, and in fast mode."""
    checked = 0
    for args, kwargs in itertools.islice(_conv_samples(device, torch.float64), 0, None, 7):
        if failure(reference.conv_relu_max_pool2d, *args, **kwargs) is not None or args[0].numel() > 400:
            continue
        tensors = [a.detach().clone().requires_grad_() for a in args if isinstance(a, torch.Tensor)]
        rest = args[len(tensors) :]
        named = {
            k: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()
        }
        assert torch.autograd.gradgradcheck(
            lambda *t, rest=rest, named=named: functional.conv_relu_max_pool2d(*t, *rest, **named),
            tensors,
            fast_mode=True,
        )
        checked += 1
    assert checked >= 3
