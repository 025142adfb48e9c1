"""Several CPU ranks (gloo) for a test: each runs a function of a test module in its own process."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import forked


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, queue: Any, args: tuple, environment: dict
) -> None:
    try:
        forked.settle(environment)
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=timedelta(seconds=300)
        )
        result = function(*args)
        dist.barrier()
        queue.put((rank, result, None))
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """What `function(*args)`, from the top of a module, returns on each rank. A rank that dies or hangs is an error.

    Results travel as plain Python numbers, lists and NumPy arrays.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("forkserver")
    forked.warm()
    queue = context.Queue()
    processes = [
        context.Process(target=_rank, args=(function, rank, world_size, port, queue, args, dict(os.environ)))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            try:
                rank, result, error = queue.get(timeout=timeout)
            except Empty:
                raise RuntimeError(f"only ranks {sorted(results)} of {world_size} answered in {timeout} s") from None
            if error:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
            results[rank] = result
        for process in processes:
            process.join(timeout=timeout)
            if process.exitcode != 0:
                raise RuntimeError(f"a rank ended with exit code {process.exitcode}")
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over the ranks, without a gradient."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
