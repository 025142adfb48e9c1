"""Work on files by processes that decode, in order, with some of it done ahead."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

import torch

from simclr.data.loader import end_with_parent, start_method

_AHEAD = 3  # tasks of each process that are asked for before the first is needed

Task = TypeVar("Task")
Done = TypeVar("Done")


def in_processes(work: Callable[[Task], Done], tasks: Iterable[Task], processes: int) -> Iterator[Done]:
    """What work makes of each task, in their order, done by others while the caller has its hands full.

    Args:
        work: that can be pickled; what it raises is raised here.
        tasks: that can be pickled, each worth some ms.
        processes: how many work; they end with this one, however it ends.
    Raises:
        concurrent.futures.process.BrokenProcessPool: if a process dies, of too little memory for example.
    """
    others, whole = set(multiprocessing.active_children()), False
    pool = ProcessPoolExecutor(processes, start_method(), _begin)
    try:
        coming: deque[Future[Done]] = deque()
        for task in tasks:
            coming.append(pool.submit(work, task))
            if len(coming) > _AHEAD * processes:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
        whole = True
    finally:
        if not whole:  # Ctrl-C, or one has died: the others may be waiting for a disk that does not answer
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a process that decodes: Ctrl-C is its parent's to answer, and it ends with that one, however it died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    end_with_parent()
