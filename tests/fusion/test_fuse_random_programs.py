"""`lenet_ext.fuse` on forwards that are written at random: whatever they do, nobody can tell but by the speed."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch
from fusing import flat, module_like
from torch import nn

from lenet_ext import fuse, unfuse

VARIABLES = ("x", "y", "z")
PROGRAMS, LAYERS = 40, 6
HEADER = """
import torch
import torch.nn.functional as F


def add(a, b):
    height, width = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    return a[..., :height, :width] + b[..., :height, :width]


def fit(x):
    return F.adaptive_avg_pool2d(x, (x.shape[2], 8))
"""
# `?` stands for an expression, `@` for a variable, and `#` for one of the layers of that name.
CALLS = (
    *(
        "self.conv1(?)",
        "self.conv2(?)",
        "self.fc1(fit(?))",
        "self.fc2(fit(?))",
        "self.features(?)",
        "self.head(fit(?))",
    ),
    *("F.relu(?)", "torch.relu(?)", "(?).relu()", "self.relu(?)", "self.tail(?)", "self.features[0](?)"),
    *("F.max_pool2d(?, 3, 1, 1)", "F.max_pool2d(?, kernel_size=2, stride=1, padding=1)", "self.pool(?)"),
    *("self.tanh(?)", "self.identity(?)", "self.blocks[0](fit(?))", "add(?, ?)", "(? if self.flag else ?)", "(@ := ?)"),
)
CHAINS = (
    ("@ = self.conv#(@)", "@ = F.relu(@)", "@ = self.pool(@)"),
    ("@ = self.conv#(@)", "@ = F.max_pool2d(@, 3, 1, 1)", "@ = self.relu(@)"),
    ("@ = self.fc#(fit(@))", "@ = @.relu()"),
    ("@ = F.relu(self.conv#(@))", "@ = self.pool(@)"),
)
BLOCKS = (
    ("if self.flag:",),
    ("if self.training:", "else:"),
    ("for _ in range(2):",),
    ("try:", "except ValueError:"),
    ("with torch.enable_grad():",),
)


class Writer:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.favourite = "x"

    def variable(self):
        """Mostly the same one, so that chains come about."""
        if self.random.random() < 0.2:
            self.favourite = self.random.choice(VARIABLES)
        return self.favourite

    def expression(self, depth=0):
        if depth > 3 or self.random.random() < 0.15:
            return self.variable()
        text = self.filled(self.random.choice(CALLS))
        while "?" in text:
            text = text.replace("?", self.expression(depth + 1), 1)
        return text

    def filled(self, text):
        while "@" in text:
            text = text.replace("@", self.variable(), 1)
        return text.replace("#", str(self.random.randrange(LAYERS)))

    def statements(self, count, indent):
        lines = []
        for _ in range(count):
            kind = self.random.random()
            if kind < 0.45:
                lines += [indent + self.filled(line) for line in self.random.choice(CHAINS)]
            elif kind < 0.7:
                lines.append(f"{indent}{self.variable()} = {self.expression()}")
            elif kind < 0.75:
                lines.append(f"{indent}{self.variable()} = (lambda: {self.variable()})()")
            elif kind < 0.8:
                lines.append(f"{indent}return {self.expression()}")
            elif len(indent) < 12:
                for head in self.random.choice(BLOCKS):
                    lines += [indent + head, *self.statements(2, indent + "    ")]
        return lines or [f"{indent}{self.variable()} = {self.expression()}"]

    def forward(self, name):
        body = [*self.statements(self.random.randrange(2, 6), "    "), f"    return {self.expression()}"]
        return "\n".join([f"\n\ndef {name}(self, x):", "    y = z = x", *body])


def model(forward):
    return module_like(
        nn.Module,
        forward,
        **{f"conv{i}": nn.Conv2d(2, 2, 3, padding=1) for i in range(LAYERS)},
        **{f"fc{i}": nn.Linear(8, 8) for i in range(LAYERS)},
        relu=nn.ReLU(),
        pool=nn.MaxPool2d(2, 1, 1),
        tanh=nn.Tanh(),
        identity=nn.Identity(),
        features=nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 1, 1)),
        tail=nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1)),
        head=nn.Sequential(nn.Linear(8, 8)),
        blocks=nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU())]),
        flag=True,
    ).double()


def results(net, image):
    image = image.clone().requires_grad_()
    net.zero_grad()
    output = net(image)
    output.square().sum().backward()
    return flat([output, image.grad, *(torch.zeros(()) if p.grad is None else p.grad for p in net.parameters())])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.extended) for seed in range(1, 10))])
def test_random_programs(seed, tmp_path):
    file = tmp_path / "programs.py"
    names = [f"forward{i}" for i in range(PROGRAMS)]
    file.write_text(HEADER + "".join(Writer(f"{seed} {name}").forward(name) for name in names))
    spec = importlib.util.spec_from_file_location(f"programs{seed}", file)
    programs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(programs)
    swapped = 0
    for name in names:
        stock = model(getattr(programs, name))
        fused = fuse(stock)
        swapped += sum(record.fused and "." not in record.path for record in fused.fusion_report)
        for training in (True, False):
            for flag in (True, False):
                image = torch.randn(2, 2, 6, 8, dtype=torch.float64)
                for net in (stock, fused):
                    net.train(training).flag = flag
                expected = results(stock, image)
                for ours, theirs in zip(results(fused, image), expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
                for ours, theirs in zip(results(unfuse(fused), image), expected, strict=True):
                    assert torch.equal(ours, theirs)
    assert swapped > PROGRAMS / 2, "the programs hardly have any chains"
