"""The gather's order and its gradient, and the rank helpers with and without a process group."""

import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from simclr import distributed


def gather_blocks() -> tuple[np.ndarray, np.ndarray, float]:
    rank = distributed.rank()
    x = torch.arange(4.0).reshape(2, 2).add(10 * rank).requires_grad_()
    gathered = distributed.gather(x)
    # Rank r weighs row i of the gathered tensor by (r + 1) * i.
    weights = (rank + 1) * torch.arange(len(gathered), dtype=torch.float32)[:, None]
    (gathered * weights).sum().backward()
    own = torch.tensor(float(rank))
    largest = distributed.max_over_ranks(own * (2 - own))  # 0, 1, 0: neither the first rank's nor the last's
    assert distributed.exchange([rank, -rank]) == [[0, 0], [1, -1], [2, -2]]
    return gathered.detach().numpy(), x.grad.numpy(), largest.item()


def test_gather_keeps_rank_order_and_sums_the_gradient_over_ranks():
    results = run_ranks(gather_blocks, 3)
    blocks = np.concatenate([np.arange(4.0).reshape(2, 2) + 10 * rank for rank in range(3)])
    for rank, (gathered, grad, largest) in enumerate(results):
        np.testing.assert_array_equal(gathered, blocks)
        rows = np.arange(2 * rank, 2 * rank + 2)[:, None]
        np.testing.assert_array_equal(grad, np.broadcast_to((1 + 2 + 3) * rows, (2, 2)))
        assert largest == 1.0


# torch's name since 2.14, and the one before it.
set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


def answers_of_rank_0() -> tuple[object, str]:
    distributed.from_rank_0(lambda: None)  # the ranks may start seconds apart, and make the group that waits together
    set_timeout(timedelta(seconds=1), dist.group.WORLD)
    answer = distributed.from_rank_0(lambda: time.sleep(2) or ["of rank", distributed.rank()])
    set_timeout(timedelta(seconds=60), dist.group.WORLD)
    with pytest.raises((ValueError, RuntimeError)) as failed:
        distributed.from_rank_0(fail)
    return answer, f"{failed.type.__name__}: {failed.value}"


def fail() -> None:
    raise ValueError("no such image")


def test_ranks_get_the_answer_of_rank_0_however_long_it_takes_and_fail_with_it():
    first, second = run_ranks(answers_of_rank_0, 2)
    assert first == (["of rank", 0], "ValueError: no such image")
    assert second == (["of rank", 0], "RuntimeError: rank 0 failed: no such image")


def test_one_process_gathers_nothing():
    x = torch.randn(3, 2)
    assert distributed.gather(x) is x
    assert (distributed.world_size(), distributed.rank(), distributed.is_distributed()) == (1, 0, False)
    assert distributed.max_over_ranks(x).equal(x)
    assert distributed.exchange([1.5]) == [[1.5]]
    assert distributed.from_rank_0(lambda: "mine") == "mine"


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),
        ({"LOCAL_RANK": "0", "NODE_RANK": "2"}, 2),
        ({"RANK": "0", "LOCAL_RANK": "0", "NODE_RANK": "1"}, 0),
        ({"RANK": "5", "LOCAL_RANK": "1"}, 5),
        ({"SLURM_PROCID": "3", "LOCAL_RANK": "1"}, 3),
    ],
)
def test_launched_rank_is_read_from_the_launcher(monkeypatch, environment, rank):
    for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.launched_rank() == rank
