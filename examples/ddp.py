"""DistributedDataParallel in a plain loop: every process sees its part of the data, the gradients are averaged.

torchrun --nproc-per-node 2 ddp.py

`torchrun --nproc-per-node 2 -m lenet_ext train` does the same with checkpoints, evaluation and everything else.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import lenet_ext
from lenet_ext.training.datasets import load_digits
from lenet_ext.training.distributed import let_go_of_tensors


def main() -> None:
    # Without torchrun: one process, so that the script also runs as it is.
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29511")):
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")
    try:
        rank = dist.get_rank()
        train_data, _ = load_digits()
        sampler: DistributedSampler = DistributedSampler(train_data, seed=0)
        loader = DataLoader(train_data, batch_size=64 // dist.get_world_size(), sampler=sampler)

        torch.manual_seed(0)  # the same initial weights everywhere
        net = lenet_ext.Net()
        parallel = DistributedDataParallel(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
        for epoch in range(1, 3):
            sampler.set_epoch(epoch)  # another order each time
            total = torch.zeros(2)
            for images, labels in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(parallel(images), labels)
                loss.backward()
                optimizer.step()
                total += torch.tensor([loss.item() * len(labels), len(labels)])
            dist.all_reduce(total)
            if rank == 0:
                print(f"epoch {epoch}: training loss {total[0] / total[1]:.3f}, processes: {dist.get_world_size()}")
        dist.barrier()
        let_go_of_tensors()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
