"""PyTorch's tutorial "Neural Networks", step by step, with the fused Net in place of the one it writes."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim

from lenet_ext import Net


def test_define_the_network(capsys):
    net = Net()
    print(net)
    printed = capsys.readouterr().out
    assert printed.startswith("Net(")
    for layer in ("(conv1)", "(conv2)", "(fc1)", "(fc2)", "(fc3)"):
        assert layer in printed
    params = list(net.parameters())
    assert len(params) == 10
    assert params[0].size() == (6, 1, 5, 5)


def test_a_random_input_and_random_gradients(capsys):
    net = Net()
    input = torch.randn(1, 1, 32, 32)
    out = net(input)
    print(out)
    assert "grad_fn=<" in capsys.readouterr().out
    assert out.size() == (1, 10)
    assert out.grad_fn is not None
    net.zero_grad()
    out.backward(torch.randn(1, 10))
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


def test_loss_function(capsys):
    net = Net()
    output = net(torch.randn(1, 1, 32, 32))
    target = torch.randn(10)
    target = target.view(1, -1)
    criterion = nn.MSELoss()
    loss = criterion(output, target)
    print(loss)
    assert "grad_fn=<MseLossBackward0>" in capsys.readouterr().out
    print(loss.grad_fn)
    print(loss.grad_fn.next_functions[0][0])
    print(loss.grad_fn.next_functions[0][0].next_functions[0][0])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3, lines
    assert all(line.startswith("<") for line in lines), lines


def test_the_graph_leads_to_every_parameter():
    """Walking grad_fn.next_functions to the end finds the ten parameters, as the tutorial's picture shows."""
    net = Net()
    loss = nn.MSELoss()(net(torch.randn(1, 1, 32, 32)), torch.randn(1, 10))
    found, queue, seen = set(), [loss.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        queue += [edge[0] for edge in node.next_functions]
    assert found == {id(p) for p in net.parameters()}


def test_backprop(capsys):
    net = Net()
    loss = nn.MSELoss()(net(torch.randn(1, 1, 32, 32)), torch.randn(1, 10))
    net.zero_grad()
    print("conv1.bias.grad before backward")
    print(net.conv1.bias.grad)
    assert net.conv1.bias.grad is None
    loss.backward()
    print("conv1.bias.grad after backward")
    print(net.conv1.bias.grad)
    assert net.conv1.bias.grad.shape == (6,)
    assert net.conv1.bias.grad.any()
    assert "None" in capsys.readouterr().out


def test_update_the_weights_by_hand():
    net = Net()
    input, target = torch.randn(1, 1, 32, 32), torch.randn(1, 10)
    criterion = nn.MSELoss()
    net.zero_grad()
    before = criterion(net(input), target)
    before.backward()
    old = [p.detach().clone() for p in net.parameters()]
    learning_rate = 0.01
    for f in net.parameters():
        f.data.sub_(f.grad.data * learning_rate)
    for p, q in zip(net.parameters(), old, strict=True):
        torch.testing.assert_close(p.data, q - learning_rate * p.grad)
    assert criterion(net(input), target) < before


def test_optimizer():
    net = Net()
    input, target = torch.randn(1, 1, 32, 32), torch.randn(1, 10)
    criterion = nn.MSELoss()
    optimizer = optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        output = net(input)
        loss = criterion(output, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_every_optimizer_of_stock():
    input, target = torch.randn(4, 1, 32, 32), torch.randn(4, 10)
    for cls in (optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad, optim.NAdam):
        net = Net()
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = cls(net.parameters(), lr=1e-3)
        nn.MSELoss()(net(input), target).backward()
        optimizer.step()
        assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)), cls.__name__


def test_lbfgs_which_calls_a_closure_several_times():
    net = Net()
    input, target = torch.randn(4, 1, 32, 32), torch.randn(4, 10)
    optimizer = optim.LBFGS(net.parameters(), lr=0.1, max_iter=4)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = nn.MSELoss()(net(input), target)
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    assert len(losses) > 1
    assert losses[-1] < losses[0]


def test_iterate_over_a_data_set():
    images, labels = torch.randn(40, 1, 32, 32), torch.randint(10, (40,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16, shuffle=True)
    net = Net()
    optimizer = optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    seen = 0
    for _ in range(2):
        for inputs, targets in loader:  # 16, 16 and a last batch of 8
            optimizer.zero_grad()
            loss = F.cross_entropy(net(inputs), targets)
            loss.backward()
            optimizer.step()
            seen += len(inputs)
    assert seen == 80
    assert loss.isfinite()
