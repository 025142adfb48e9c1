"""Ranks and the gather with the right gradient. The only importer of torch.distributed.

Every function works without a process group too: then there is one rank, and a gather is the identity.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor

_LIGHTNING = ("NODE_RANK", "LOCAL_RANK")


def is_distributed() -> bool:
    """Whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """How many ranks share the training (1 without a process group)."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's number, 0 .. world_size - 1 (0 without a process group)."""
    return dist.get_rank() if is_distributed() else 0


def launched_rank() -> int:
    """This process's number before any process group exists, as torchrun, SLURM or Lightning has set it.

    Lightning tells only the node and the place on it: then 0 is still the first process of all, and only that one.
    """
    names = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID",) if "SLURM_PROCID" in os.environ else _LIGHTNING
    return sum(int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit())


class _Gather(torch.autograd.Function):
    """Forward: every rank's block, in rank order. Backward: the sum over ranks of what reaches this rank's block."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        gathered = x.new_empty(world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # A rank's block is used by every rank's loss, so its gradient is the sum over ranks: DDP's mean over ranks
        # then gives the gradient of the mean of the ranks' losses, which is the loss of the global batch.
        # Sum and slice rather than reduce_scatter, which gloo does not have in every version.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather(x: Tensor) -> Tensor:
    """The concatenation of every rank's x along dimension 0, in rank order, with the gradient of the sum over ranks.

    Args:
        x: (n, ...), of the same shape on every rank.
    Returns:
        (world_size * n, ...). Rank r's rows start at r * n.
    """
    return _Gather.apply(x) if world_size() > 1 else x


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over ranks, without a gradient: for logging."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x
