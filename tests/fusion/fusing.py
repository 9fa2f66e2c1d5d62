"""What the tests of `lenet_ext.fuse` have in common: small models, and a fused one compared with its original."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import lenet_ext
from lenet_ext import fuse
from lenet_ext.nn import ConvReLUMaxPool2d, LinearReLU

FUSED = (ConvReLUMaxPool2d, LinearReLU, lenet_ext.nn.Linear)
IMAGES = (2, 3, 12, 12)


def fused_layers(model):
    """The paths of the fused layers; the report must say the same."""
    paths = [path for path, module in model.named_modules() if type(module) in FUSED]
    assert paths == [record.path for record in model.fusion_report if record.fused]
    assert all(bool(record.reason) != record.fused for record in model.fusion_report)
    return paths


def flat(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in (output.values() if isinstance(output, dict) else output) for t in flat(part)]


def run(model, *inputs, **options):
    """Outputs and gradients, of the input and of every parameter. The random numbers are the same in each run."""
    inputs = [i.clone().requires_grad_() if isinstance(i, torch.Tensor) else i for i in inputs]
    model.zero_grad()
    torch.manual_seed(1)
    outputs = flat(model(*inputs, **options))
    sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs).backward()
    gradients = [i.grad for i in inputs if isinstance(i, torch.Tensor)] + [p.grad for p in model.parameters()]
    return outputs, gradients


def assert_same(fused, model, *inputs, **options):
    for ours, stock in zip(run(fused, *inputs, **options), run(model, *inputs, **options), strict=True):
        for a, b in zip(ours, stock, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def check(model, expected, *inputs, **options):
    """Fuses, compares in both modes (twice, since switching must work), and counts the fused layers."""
    model = model.double()
    inputs = inputs or (torch.randn(IMAGES, dtype=torch.float64),)
    keys = list(model.state_dict())
    fused = fuse(model)
    assert fused is not model
    assert isinstance(fused, type(model))
    assert not any(isinstance(m, FUSED) for m in model.modules()), "the original was changed"
    assert list(fused.state_dict()) == keys
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert fused_layers(fused) == expected, fused.fusion_report
    for training in (True, False, True):
        assert_same(fused.train(training), model.train(training), *inputs, **options)
    return fused


def reason(model, path, **options):
    """Why `path` was left alone. The model must be equal all the same."""
    fused = check(model, [], **options)
    return next(record.reason for record in fused.fusion_report if record.path == path)


def conv(**options):
    return nn.Conv2d(3, 4, 3, **options)


class Conv(nn.Module):
    """A convolution and whatever a test does with it."""

    def __init__(self):
        super().__init__()
        self.conv = conv()


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 5)


def module_like(base, forward, **children):
    """A module of a class made for the test, with this forward."""
    made = type("Model", (base,), {"forward": forward})()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def pool_of_relu(x):
    return F.max_pool2d(F.relu(x), 2)


class Switches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = conv(), nn.Linear(100, 6)
        self.flag, self.mode, self.scale, self.features, self.p = True, "a", 2.0, 100, 0.5
        self.log = []

    def forward(self, x, add=None, double: bool = False, *, shift=0.0):
        x = F.max_pool2d(F.relu(self.conv(x)), 2).view(-1, self.features)
        if self.training:
            x = x + 1
        elif self.flag:
            x = x * self.scale
        self.log.append(x.detach())
        x = F.dropout(F.relu(self.fc(x)), self.p, self.training)
        if not self.flag or self.mode == "b":
            x = x.sin()
        if double:
            x = x * 2
        return x + shift
