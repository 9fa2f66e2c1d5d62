"""A plain training loop: nothing in it is particular to lenet_ext but one import.

python plain_loop.py --epochs 3
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import lenet_ext
from lenet_ext.training.datasets import load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() and lenet_ext.build_info()["cuda"] else "cpu"
    train_data, test_data = load_digits()
    loader = DataLoader(train_data, batch_size=64, shuffle=True)
    net = lenet_ext.Net().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)

    for epoch in range(1, epochs + 1):
        net.train()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()

        net.eval()
        right = 0
        with torch.inference_mode():
            for images, labels in DataLoader(test_data, batch_size=256):
                right += int((net(images.to(device)).argmax(1) == labels.to(device)).sum())
        print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {right / len(test_data):.1%}")


if __name__ == "__main__":
    main()
