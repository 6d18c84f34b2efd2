"""Many processes: what the engines need of ``torch.distributed``, and nothing below it.

``torchrun --nproc-per-node=4 script.py`` starts the same script four times and describes the job in environment
variables. The first collective call here joins the processes into a group (gloo for tensors in host memory, NCCL for
those on CUDA devices); a group that the script has made itself is used as it is. Without either there is one rank and
every function is the identity: nothing is imported, opened or waited for.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["is_main", "rank", "sum_over_ranks", "world_size"]

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's number among the job's, from 0."""
    if _joined():
        return dist.get_rank()
    return int(os.environ["RANK"]) if _launched() else 0


def world_size() -> int:
    """The number of processes in the job, 1 without a launcher."""
    if _joined():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and gathers."""
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors of this shape, the same bits on each rank; the tensor itself in one process.

    The terms are added in the order of the ranks, so that the sum depends on nothing but them.
    """
    if world_size() == 1:
        return tensor
    _join()
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.stack(parts).sum(0)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _launched() -> bool:
    return dist.is_available() and all(name in os.environ for name in _LAUNCHER)


def _join() -> None:
    if not _joined():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
