"""Ranks and the gather with the right gradient. The only importer of torch.distributed.

Every function works without a process group too: then there is one rank, and a gather is the identity.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LIGHTNING = ("NODE_RANK", "LOCAL_RANK")
_FOR_EVER = timedelta(days=365)
# What torchrun tells a process of itself and of the others, beside names that begin with TORCHELASTIC_.
_TOLD = {f"{of}{what}" for of in ("", "LOCAL_", "GROUP_", "ROLE_") for what in ("RANK", "WORLD_SIZE")}
_TOLD |= {"MASTER_ADDR", "MASTER_PORT", "ROLE_NAME"}


def is_distributed() -> bool:
    """Whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """How many ranks share the training (1 without a process group)."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's number, 0 .. world_size - 1 (0 without a process group)."""
    return dist.get_rank() if is_distributed() else 0


def barrier() -> None:
    """Wait until every rank is here."""
    exchange([0.0])


def exchange_objects(mine: Any) -> list[Any]:
    """Every rank's object, which can be pickled, in rank order."""
    if world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine, group=_host_group(dist.group.WORLD))
    return everyone


def open_store(seconds: float = 10) -> Any:
    """A connection of its own to the store in which the ranks find each other; None if there is none to be found.

    It lives in the process of rank 0, or in torchrun's, which has it before there is a process group.

    Args:
        seconds: to wait for it, and for whatever is asked of it.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not (host and port.isdigit()):
        return None
    wait = timedelta(seconds=seconds)
    try:
        return dist.TCPStore(host, int(port), None, False, wait, wait_for_workers=False)
    except RuntimeError:  # torch's word for a connection that is refused
        return None


def launcher_has_store() -> bool:
    """Whether this process was launched by one that has the store: torchrun."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt() -> str:
    """A prefix for keys in that store, which outlives the ranks where their launcher starts them anew."""
    return f"simclr/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def launched_rank() -> int:
    """This process's number before any process group exists, as torchrun, SLURM or Lightning has set it.

    Lightning tells only the node and the place on it: then 0 is still the first process of all, and only that one.
    """
    names = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID",) if "SLURM_PROCID" in os.environ else _LIGHTNING
    return sum(int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit())


def launched_ranks() -> int:
    """How many processes share a command, as torchrun or its like has told each of them; 1 where none has."""
    told = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in told) else 1


def left_to_this_rank() -> bool:
    """Whether work that ranks do not share is this process's: rank 0's, which is alone from then on.

    What a launcher has told it is taken out of its environment, so that neither it nor a process that it starts waits
    for others.
    """
    if launched_ranks() == 1:
        return True
    if launched_rank() > 0:
        return False
    for name in [name for name in os.environ if name in _TOLD or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    return True


@contextmanager
def group_of_launched_ranks() -> Iterator[None]:
    """A process group between the hosts of the ranks that a launcher has started, as long as nothing fails.

    A wait in it has no limit of time: what one rank does alone may take long. One that dies is an error on the others
    all the same.
    """
    dist.init_process_group("gloo", timeout=_FOR_EVER)
    yield
    dist.destroy_process_group()


def _all_gather(gathered: Tensor, mine: Tensor, group: Any = None) -> None:
    """Every rank's `mine`, in rank order, into `gathered`, by the name that this torch has for it."""
    # torch 2.13 added the first name and warns of the second.
    of_this_torch = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, of_this_torch)(gathered, mine, group=group)


class _Gather(torch.autograd.Function):
    """Forward: every rank's rows, in rank order. Backward: the sum over ranks of what reaches this rank's rows."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        largest = max(counts)
        if len(x) < largest:  # a collective moves blocks of one size
            x = torch.cat((x, x.new_zeros(largest - len(x), *x.shape[1:])))
        gathered = x.new_empty(len(counts) * largest, *x.shape[1:])
        _all_gather(gathered, x.contiguous())
        if min(counts) == largest:
            return gathered
        return torch.cat([block[:n] for block, n in zip(gathered.split(largest), counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        # A rank's rows are used by every rank's loss, so their gradient is the sum over ranks: DDP's mean over ranks
        # then gives the gradient of the mean of the ranks' losses, which is the loss of the global batch.
        # Sum and slice rather than reduce_scatter, which gloo does not have in every version.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        start = sum(ctx.counts[: rank()])
        return grad[start : start + ctx.counts[rank()]], None


def gather(x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """The concatenation of every rank's x along dimension 0, in rank order, with the gradient of the sum over ranks.

    Args:
        x: (n, ...), of the same n on every rank unless `counts` says otherwise.
        counts: n of each rank, the same list on all of them.
    Returns:
        (sum of n, ...): rank 0's rows, then rank 1's, and so on.
    """
    return _Gather.apply(x, counts or [len(x)] * world_size()) if world_size() > 1 else x


def exchange(numbers: Sequence[float]) -> list[list[float]]:
    """Every rank's numbers, in rank order, as many on each: between the hosts, without waiting for a device."""
    if world_size() == 1:
        return [list(numbers)]
    group = _host_group(dist.group.WORLD)
    mine = torch.tensor(numbers, dtype=torch.float64)
    everyone = mine.new_empty(world_size() * len(mine))
    _all_gather(everyone, mine, group)
    return everyone.view(-1, len(mine)).tolist()


def from_rank_0(work: Callable[[], Any]) -> Any:
    """What `work()` returns on rank 0, on every rank. The others do not run it and wait, without a limit of time.

    Args:
        work: returns something that can be pickled; no rank waits for another in it.
    Raises:
        RuntimeError: on the other ranks, if it fails on rank 0, where its own error is raised.
    """
    if world_size() == 1:
        return work()
    group = _patient_group(dist.group.WORLD)  # first: the ranks make it together, within the time of any other step
    found, error = None, None
    if rank() == 0:
        try:
            found = work()
        except Exception as failure:
            error = failure
    told = [found, None if error is None else str(error)]
    dist.broadcast_object_list(told, src=0, group=group)
    if error is not None:
        raise error
    if told[1] is not None:
        raise RuntimeError(f"rank 0 failed: {told[1]}")
    return told[0]


def to_rank_0(mine: Any) -> list[Any]:
    """Every rank's object, which can be pickled, in rank order, on rank 0; nothing on the others."""
    if world_size() == 1:
        return [mine]
    everyone: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(mine, everyone, dst=0, group=_host_group(dist.group.WORLD))
    return everyone or []


def on_every_rank(work: Callable[[], Any]) -> Any:
    """What `work()` returns on this rank; what fails on one rank fails on all.

    Args:
        work: no rank waits for another in it.
    Raises:
        ValueError: on all ranks, with the words of the first of them where it has raised a ValueError or an OSError.
        RuntimeError: likewise for any other error.
    """
    if world_size() == 1:
        return work()
    found, error = None, None
    try:
        found = work()
    except Exception as failure:
        error = failure
    told = exchange_objects(None if error is None else (isinstance(error, ValueError | OSError), str(error)))
    first = next((place for place, said in enumerate(told) if said is not None), None)
    if first is None:
        return found
    if error is not None and first == rank():
        raise error
    refused, text = told[first]
    raise (ValueError if refused else RuntimeError)(text) from error


_host_group_of: tuple[Any, Any] | None = None  # the process group, and the one of its hosts
_patient_group_of: tuple[Any, Any] | None = None  # the same, of the one that waits


def _host_group(world: Any) -> Any:
    """A group of all ranks that moves numbers of the hosts: gloo, beside NCCL and its like. None: `world` itself."""
    global _host_group_of
    if dist.get_backend(world) == "gloo":
        return None
    if _host_group_of is None or _host_group_of[0] is not world:
        _host_group_of = world, dist.new_group(backend="gloo")
    return _host_group_of[1]


def _patient_group(world: Any) -> Any:
    """A group of all hosts whose wait does not time out; one that dies is an error on the others all the same."""
    global _patient_group_of
    if _patient_group_of is None or _patient_group_of[0] is not world:
        _patient_group_of = world, dist.new_group(backend="gloo", timeout=_FOR_EVER)
    return _patient_group_of[1]


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over ranks, element by element, without a gradient: for logging."""
    x = x.detach().clone()
    if is_distributed():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def max_over_ranks(x: Tensor) -> Tensor:
    """The largest over ranks, element by element, without a gradient: for logging."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x
