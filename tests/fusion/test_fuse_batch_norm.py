"""`lenet_ext.fuse(fold_batch_norm=True)`: BatchNorm2d goes into the convolution before it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from fusing import IMAGES, conv, fused_layers, module_like
from torch import nn

from lenet_ext import fuse


class Normalised(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.conv, self.bn, self.pool = conv(bias=bias), nn.BatchNorm2d(4), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(F.relu(self.bn(self.conv(x))))


def _trained(model):
    """With statistics and affine parameters that are not those of an untrained one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.double().eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["forward", "sequential"])
def test_folded_batch_norm(kind, bias, affine):
    if kind == "forward":
        model = Normalised(bias)
        model.bn = nn.BatchNorm2d(4, affine=affine)
    else:
        model = nn.Sequential(conv(bias=bias), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.MaxPool2d(2))
    model = _trained(model)
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model, fold_batch_norm=True)
    assert len(fused_layers(fused)) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert not any("running" in key for key in fused.state_dict())
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert fused_layers(fuse(model)) == [], "folded without being asked to"


def test_batch_norm_that_cannot_be_folded():
    shared = nn.BatchNorm2d(4)
    no_statistics = nn.BatchNorm2d(4, track_running_stats=False)
    hooked = nn.BatchNorm2d(4)
    hooked.register_forward_hook(lambda m, i, o: o + 1)
    for model in (
        nn.Sequential(conv(), shared, nn.Conv2d(4, 4, 1), shared),
        nn.Sequential(conv(), no_statistics, nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(conv(), hooked, nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2)),
    ):
        model = model.double().eval()
        fused = fuse(model, fold_batch_norm=True)
        assert list(fused.state_dict()) == list(model.state_dict())
        x = torch.randn(IMAGES, dtype=torch.float64)
        torch.testing.assert_close(fused(x), model(x))


READS = {
    "weight": lambda self, x: self.bn(self.conv(x)) * self.conv.weight.sum(),
    "statistics": lambda self, x: self.bn(self.conv(x)) + self.bn.running_mean.sum(),
    "bias": lambda self, x: self.bn(self.conv(x)) * (2 if self.conv.bias is None else 3),
}


@pytest.mark.parametrize("what", READS)
def test_batch_norm_is_not_folded_where_its_values_are_read(what):
    model = _trained(module_like(nn.Module, READS[what], conv=conv(bias=False), bn=nn.BatchNorm2d(4)))
    fused = fuse(model, fold_batch_norm=True)
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    assert list(fused.state_dict()) == list(model.state_dict())


def test_batch_norm_with_its_forward_replaced_is_not_folded():
    model = _trained(Normalised(True))
    model.bn.forward = lambda x: x * 3
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fuse(model, fold_batch_norm=True)(x), model(x))


def test_folding_needs_evaluation_mode():
    model = Normalised(True)
    with pytest.raises(RuntimeError, match=r"fold_batch_norm=True needs a model in evaluation mode.*model\.eval\(\)"):
        fuse(model, fold_batch_norm=True)
    model.eval()
    model.bn.train()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        fuse(model, fold_batch_norm=True, inplace=True)
    assert isinstance(model.bn, nn.BatchNorm2d)
