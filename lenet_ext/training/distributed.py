"""Several processes that train one network: started by ``torchrun``, each with a share of every batch.

The order of the data is drawn from the same seed in every process, and each takes its part of every global batch, so
that the run is that of one process with the same batch size, whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Processes", "join_processes", "let_go_of_tensors", "rank_of_environment"]


@dataclass(frozen=True)
class Processes:
    """The processes of a run: how many there are, and which one this is.

    Example:
        >>> Processes().sum(torch.ones(2))
        tensor([1., 1.])
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is this one that talks and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; all of them must call it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first process enters alone and the others after it, to find downloaded what it has downloaded."""
        if self.size > 1 and not self.is_first:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.is_first:
                dist.barrier()


ALONE = Processes()

# What torchrun sets beside WORLD_SIZE, and is needed here or by torch.
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank_of_environment() -> int:
    """This process's rank according to ``torchrun``, 0 where there is none, or none that is a number."""
    try:
        return _number_in_environment("RANK", 0) if _number_in_environment("WORLD_SIZE", 1) > 1 else 0
    except RuntimeError:  # said by who joins the processes
        return 0


def _number_in_environment(name: str, lowest: int) -> int:
    """A variable of ``torchrun``, which without it means one process: the lowest number."""
    text = os.environ.get(name) or str(lowest)
    if not (text.isascii() and text.isdigit() and int(text) >= lowest):
        raise RuntimeError(
            f"{name} must be a number from {lowest} on, as torchrun sets it, found {text!r}: unset it for one process"
        )
    return int(text)


@contextlib.contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Joins the processes that ``torchrun`` has started, and leaves them at the end.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``. They talk by NCCL where each can have a GPU of its own, which
            becomes its current one, and by gloo otherwise.

    Yields:
        The processes; `ALONE` where ``torchrun`` is not in the environment.

    Raises:
        RuntimeError: CUDA was asked for by name, and this machine has fewer GPUs than processes; or something else than
            ``torchrun`` has set a part of its environment, or to something else than numbers.
    """
    size = _number_in_environment("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"WORLD_SIZE is {size}, but of what torchrun sets {', '.join(missing)} is missing: "
            "start with torchrun, or unset WORLD_SIZE for one process"
        )
    _number_in_environment("RANK", 0)  # torch's, whose message for another word would not name it
    local_rank, local_size = _number_in_environment("LOCAL_RANK", 0), _number_in_environment("LOCAL_WORLD_SIZE", 1)
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and gpus < local_size:
        raise RuntimeError(f"{local_size} processes need as many GPUs, and this machine has {gpus}")
    use_gpus = gpus >= local_size
    if use_gpus:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if use_gpus else "gloo")
    # After an error there is no leaving in order: the others wait for this process, until torchrun ends them.
    yield Processes(dist.get_rank(), dist.get_world_size())
    dist.barrier()
    let_go_of_tensors()
    dist.destroy_process_group()


def let_go_of_tensors() -> None:
    """To be called between the last collective of a process and its end.

    A thread of gloo's lets go of a tensor only after the collective is over, and takes Python's lock for it. If the
    interpreter is already ending, that aborts the process, seen in one run of six. Asleep, this thread holds no lock.
    """
    time.sleep(0.1)
