"""`lenet_ext.fuse` on well-known networks: the chains it must find, and outputs and gradients that must not change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lenet_ext import fuse
from lenet_ext.bench.zoo import ZOO, ZooModel

DIVISOR = 16


def build(zoo: ZooModel) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = zoo.make(DIVISOR).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that a mistake in folding would show in
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model, torch.randn(2, zoo.image[0], zoo.small_image, zoo.small_image, dtype=torch.float64)


def results(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    images = images.clone().requires_grad_()
    torch.manual_seed(1)  # dropout
    output = model(images)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), [images, *model.parameters()])]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ZOO)
def test_fused(name: str, training: bool) -> None:
    model, images = build(ZOO[name])
    model.train(training)
    fused = fuse(model)
    assert sum(record.fused for record in fused.fusion_report) == ZOO[name].chains, fused.fusion_report
    assert list(fused.state_dict()) == list(model.state_dict())
    for ours, stock in zip(results(fused, images), results(model, images), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("factor", [0, 1, 100])
def test_both_ways_of_a_path_that_depends_on_numbers(factor: float) -> None:
    model, images = build(ZOO["untraceable"])
    model.eval()
    fused = fuse(model)
    torch.testing.assert_close(fused(factor * images), model(factor * images), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ZOO)
def test_fused_with_batch_norm_folded(name: str) -> None:
    model, images = build(ZOO[name])
    fused = fuse(model.eval(), fold_batch_norm=True)
    assert sum(record.fused for record in fused.fusion_report) == ZOO[name].folded_chains, fused.fusion_report
    with torch.no_grad():
        torch.testing.assert_close(fused(images), model(images), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ZOO)
def test_networks_of_full_width(name: str) -> None:
    """On the meta device: shapes, without arithmetic. Where the path depends on numbers there is nothing to see."""
    if name == "untraceable":
        pytest.skip("its path depends on numbers")
    zoo = ZOO[name]
    with torch.device("meta"):
        model, images = zoo.make(1).eval(), torch.empty(2, *zoo.image)
    fused = fuse(model)
    assert sum(record.fused for record in fused.fusion_report) == zoo.chains
    assert fused(images).shape == model(images).shape
