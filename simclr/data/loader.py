"""Batches in an order that is a pure function of (seed, epoch): from any image set, for any rank, resumable."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from simclr.data.decode import too_slow
from simclr.data.sources import FileImages, ImageSet, MemoryImages
from simclr.data.watch import Stuck, look_every
from simclr.files import mark_sockets, remove_abandoned_sockets
from simclr.seeding import epoch_order

_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows ends a process by either
_TO_END = 2.0  # seconds in which a process whose connection broke is seen to be dead
_ORDER_AHEAD = 2**16  # images whose order is worked out at a time


class GlobalBatchSampler:
    """Which images each step trains on: this rank's share of one global batch per step.

    Step k of epoch e trains on epoch_order(seed, e, size)[k * B : (k + 1) * B], whatever the number of ranks and
    workers; rank r of W takes the r-th of W equal runs of it. What is left over at the end of an epoch is dropped:
    another part of the images in each epoch.

    Args:
        size: how many images there are.
        batch_size: B, the global batch.
        seed: the run's seed.
        rank, world_size: r and W.
        reshuffle: another order in each epoch; otherwise that of epoch 0 in all of them.
        held_out: (m,) int64, ascending: images that are never visited. The `size` others keep their numbers, of
            0 .. size + m - 1; their order is that of a set of `size`.
    Raises:
        ValueError: if the batch does not divide over the ranks or is larger than the set.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        reshuffle: bool = True,
        held_out: Tensor | None = None,
    ):
        if batch_size % world_size:
            raise ValueError(uneven_batch(batch_size, world_size))
        if not 1 <= batch_size <= size:
            raise ValueError(f"data.batch_size={batch_size} is not between 1 and the {size} images there are.")
        self.size, self.batch_size, self.seed, self.rank, self.world_size = size, batch_size, seed, rank, world_size
        self.reshuffle = reshuffle
        # How many of the images before each held-out one are visited.
        self._before = None if held_out is None or not len(held_out) else held_out - torch.arange(len(held_out))
        self.epoch = 0

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.size // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order `from_step` follows; Lightning calls this as each epoch starts."""
        self.epoch = epoch

    def global_batches(self, epoch: int, steps: int | None = None) -> Tensor:
        """(steps, B) int64: the image numbers of an epoch's first batches over all ranks; of all if None."""
        steps = len(self) if steps is None else min(steps, len(self))
        places = torch.arange(steps * self.batch_size)
        return self._order(epoch, places).view(steps, self.batch_size)

    def from_step(self, step: int) -> Iterator[Tensor]:
        """This rank's batches from this step of the epoch on, some steps at a time: (steps, B / W) int64 each."""
        share = self.batch_size // self.world_size
        own = torch.arange(share) + self.rank * share  # places in a global batch
        at_a_time = max(1, _ORDER_AHEAD // share)
        for first in range(step, len(self), at_a_time):
            steps = torch.arange(first, min(first + at_a_time, len(self)))
            places = (steps[:, None] * self.batch_size + own).flatten()
            yield self._order(self.epoch, places).view(-1, share)

    def _order(self, epoch: int, places: Tensor) -> Tensor:
        order = epoch_order(self.seed, epoch if self.reshuffle else 0, self.size, places)
        return order if self._before is None else order + torch.searchsorted(self._before, order, right=True)


def uneven_batch(batch_size: int, world_size: int) -> str:
    """The error line for a batch that does not divide over the ranks."""
    below = batch_size // world_size * world_size
    near = " or ".join(str(n) for n in (below, below + world_size) if n)
    return (
        f"data.batch_size={batch_size} does not divide over {world_size} devices. "
        f"Use a multiple of {world_size}, for example {near}."
    )


class TrainLoader:
    """The batches of an epoch, (images (n, C, S, S), index (n,) int64), in the form that Lightning resumes.

    An epoch starts at the number of batches already trained on. Under a Trainer that is its own count, asked for when
    the first batch is needed, so that a run resumes right wherever it was stopped: in a checkpoint of any callback, in
    the middle of a step, with batches prefetched or not.

    Args:
        source: the images.
        sampler: which of them, step by step.
        workers: processes that decode; 0 decodes here. A set in memory needs none.
        trained_batches: () -> how many batches of the current epoch have been trained on; none if not given.
    """

    def __init__(
        self,
        source: ImageSet,
        sampler: GlobalBatchSampler,
        workers: int = 0,
        trained_batches: Callable[[], int] = lambda: 0,
    ):
        self.source, self.sampler, self.trained_batches = source, sampler, trained_batches
        self._batches = Batches(source, workers)

    def __len__(self) -> int:
        """Steps in a whole epoch, also when resumed in the middle of one."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: nothing below runs before the first next(). Lightning calls iter() before it has restored its
        # counters and set the sampler's epoch, and next() after.
        yield from self._batches(self.sampler.from_step(self.trained_batches()))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the Trainer's own count. Lightning takes a loader with the two for resumable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go by: see `state_dict`, and `ImageData.load_state_dict` for the images."""


class EvalLoader:
    """Images and labels in a fixed order, (images (n, C, S, S), labels (n,) int64); the last batch may be small.

    Args:
        source: the images; `source.labels` must not be None.
        index: (M,) int64, which images, in which order.
        batch_size: images per batch.
        workers: as in TrainLoader.
    """

    def __init__(self, source: ImageSet, index: Tensor, batch_size: int, workers: int = 0):
        if source.labels is None:
            raise ValueError(f"{source.name} has no labels: evaluation needs class folders.")
        self.source, self.index, self.batch_size, self.workers = source, index, batch_size, workers
        self._labels = source.labels  # (N,), of the whole source
        self._batches = Batches(source, workers)

    @property
    def labels(self) -> Tensor:
        """(M,) int64, in the order of the batches."""
        return self._labels[self.index]

    def share(self, rank: int, ranks: int) -> "EvalLoader":
        """The batches of one rank, whole ones in a row: as many as of any other rank, or one more; none twice.

        Args:
            rank: 0 .. ranks - 1.
            ranks: that share the batches.
        """
        ends = [len(self) * place // ranks * self.batch_size for place in (rank, rank + 1)]
        return EvalLoader(self.source, self.index[ends[0] : ends[1]], self.batch_size, self.workers)

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, index in self._batches(part[None] for part in self.index.split(self.batch_size)):
            yield images, self._labels[index.cpu()].to(images.device)


class Batches:
    """Turns batches of image numbers into (images, index): from memory at once, from files through worker processes.

    Args:
        source: the images.
        workers: processes that decode, started at the first batch and kept; 0 decodes in this process.
    """

    def __init__(self, source: ImageSet, workers: int = 0):
        self.source = source
        self._order = _Order()
        self._loader: DataLoader | None = None
        self._workers = _Workers(workers, source.rules.timeout_s if isinstance(source, FileImages) else None)
        if not isinstance(source, MemoryImages):
            self._loader = DataLoader(
                _Decode(source, self._workers.table),
                batch_sampler=self._order,
                collate_fn=_as_it_is,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=torch.cuda.is_available(),
                # Forking a process that runs threads (decoding, OpenMP, loggers) can deadlock; these start clean.
                multiprocessing_context=start_method() if workers else None,
                worker_init_fn=_begin_worker if workers else None,
            )

    def __call__(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (n, C, S, S), index (n,) int64 on the CPU) for each row (n,) of the parts, in order.

        Args:
            parts: of the order: the image numbers of some batches, (batches, n) int64 each.
        """
        if self._loader is not None:
            self._order.batches = itertools.chain.from_iterable(parts)
            yield from self._decoded(self._loader)
            return
        source = self.source
        assert isinstance(source, MemoryImages)  # all others have a loader
        # A part goes to the images in one transfer, and the numbers are handed out as they are.
        pairs = (pair for part in parts for pair in zip(part, part.to(source.pixels.device), strict=True))
        if source.pin:
            yield from _ahead(source.pixels, pairs, pin=True)
            return
        for index, placed in pairs:
            yield source.images(placed), index

    def _decoded(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            with self._workers.watched():
                batches = iter(loader)
                while True:
                    with self._workers.awaited():
                        batch = next(batches, None)
                    if batch is None:
                        return
                    images, index = batch
                    if isinstance(images, str):
                        raise ValueError(images)
                    yield images, index
        # torch's word for workers that died, and what comes of one that dies while it hands over a batch.
        except (RuntimeError, EOFError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise ValueError(self._what_happened(str(error) or "its connection broke")) from error

    def _what_happened(self, reason: str) -> str:
        """What became of a worker, and of which image, as far as that can be told."""
        paths = self.source.paths
        if self._workers.ended:  # by us
            at = [paths[i] for i in self._workers.ended if i >= 0] if paths is not None else []
            if at:
                return str(too_slow(at, self._workers.limit_s))
            return (
                f"the processes that read images have done nothing for data.read_timeout_s={self._workers.limit_s:g} "
                "seconds, none at a file: were they stopped?"
            )
        lines = reason.strip().splitlines()
        what = f"a process that reads images died: {lines[-1].rstrip('.')}."
        at = [] if paths is None else [paths[i] for i in self._workers.images_of_dead()]
        reading = f" It was reading {', '.join(at[:3])}." if at else ""
        return f"{what}{reading} Is there too little memory?"


class _Workers:
    """What each worker process is at, which they write into memory that they share with this one.

    torch's own `timeout` of a DataLoader would tell no file, and tell of a worker that has died only after it.

    Args:
        count: of workers.
        limit_s: seconds that one file may take; None for no limit.

    Attributes:
        table: (count, 3) int64: a worker's process, the image that it reads or -1, and how many times that changed.
        ended: the images at which workers were ended, because they took too long; empty if none was.
    """

    def __init__(self, count: int, limit_s: float | None):
        self.table = torch.full((count, 3), -1, dtype=torch.int64).share_memory_()
        self.limit_s = limit_s
        self.ended: list[int] = []
        self._awaited = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within it a worker that takes too long is killed: torch finds that it is dead a few seconds later."""
        if not len(self.table) or self.limit_s is None:
            yield
            return
        over = threading.Event()
        threading.Thread(target=self._watch, args=(over, self.limit_s), daemon=True).start()
        try:
            yield
        finally:
            over.set()

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Within it somebody waits for the next batch."""
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False

    def _watch(self, over: threading.Event, limit_s: float) -> None:
        stuck = Stuck(limit_s)
        while not over.wait(look_every(limit_s)):
            rows = self.table.tolist()
            at: dict[Hashable, Hashable] = {pid: (image, times) for pid, image, times in rows if image >= 0}
            if self._awaited and any(pid > 0 for pid, _, _ in rows):
                at["all"] = tuple(times for _, _, times in rows)
            if late := stuck.look(at.items()):
                slow = [(pid, image) for pid, image, _ in rows if pid > 0 and (pid in late or "all" in late)]
                self.ended = [image for _, image in slow]
                for pid, _ in slow:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, _KILL)
                return

    def images_of_dead(self) -> list[int]:
        """The images that workers were reading when they died; a connection breaks a moment before its process ends."""
        until = time.monotonic() + _TO_END
        while True:
            dead = [image for pid, image, _ in self.table.tolist() if image >= 0 and not _alive(pid)]
            if dead or time.monotonic() >= until:
                return dead
            time.sleep(0.02)


def _alive(pid: int) -> bool:
    """Whether a process is there, and is no more than a name that its parent has not asked for yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # it has gone since, or the system has no /proc
        return not Path("/proc/self").exists()


def _ahead(pixels: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], pin: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of images on the CPU, gathered two ahead by a thread, while the device is busy.

    Args:
        pixels: (N, C, S, S).
        pairs: (n,) int64 twice, as the batch's index and as a place in `pixels`.
        pin: gather into page-locked memory, which torch keeps and gives again, and from which a GPU copies by itself.
    """

    def gather(index: Tensor, placed: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(len(placed), *pixels.shape[1:], dtype=pixels.dtype, pin_memory=pin)
        as_bits = torch.int16 if pixels.dtype == torch.uint16 else pixels.dtype  # as in MemoryImages
        torch.index_select(pixels.view(as_bits), 0, placed, out=out.view(as_bits))
        return out, index

    coming: deque[Future[tuple[Tensor, Tensor]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for pair in pairs:
            coming.append(thread.submit(gather, *pair))
            if len(coming) > 2:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def start_method() -> multiprocessing.context.BaseContext:
    """How processes that decode are started: never by a fork of this one, whose threads may hold locks."""
    remove_abandoned_sockets()
    mark_sockets()
    methods = multiprocessing.get_all_start_methods()
    if "forkserver" not in methods:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imported once for all workers, which share it in memory: else each imports torch for itself, in seconds.
    context.set_forkserver_preload([__name__])
    return context


def _begin_worker(worker: int) -> None:
    """In a worker: say who it is, and end when the process that wants its images has died, however it did.

    torch's own watchdog watches the worker's parent, which is the fork server: that one waits for its last worker. With
    the workers gone it ends too, and after it the process that clears up what all of them shared.
    """
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, _Decode)
    info.dataset.begin(worker)
    end_with_parent()


def end_with_parent() -> None:
    """In a process that was started by another: end when that one has, however it did."""
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()  # who asked for the worker, not the fork server
    assert parent is not None
    parent.join()
    os._exit(1)


class _Order:
    """The batch sampler of a DataLoader that outlives an epoch: iterates whatever batches it was given last."""

    def __init__(self) -> None:
        self.batches: Iterable[Tensor] = ()

    def __iter__(self) -> Iterator[list[int]]:
        for index in self.batches:
            yield index.tolist()


class _Decode(Dataset[tuple[Tensor | str, Tensor]]):
    """A map-style data set that is asked for whole batches, as torch's loader does of one with __getitems__.

    Args:
        source: the images.
        table: `_Workers.table`.
    """

    def __init__(self, source: ImageSet, table: Tensor):
        self.source, self.table = source, table
        self._row = np.zeros(3, np.int64)  # of this process

    def begin(self, worker: int) -> None:
        """In a worker: write down what it does."""
        self._row = self.table[worker].numpy()
        self._row[0] = os.getpid()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor | str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, index: list[int]) -> tuple[Tensor | str, Tensor]:
        try:
            return self._images(index), torch.tensor(index)
        except ValueError as error:  # its words alone: torch would put a traceback of the worker into them
            return str(error), torch.tensor(index)
        finally:
            self._at(-1)

    def _images(self, index: list[int]) -> Tensor:
        if isinstance(self.source, FileImages):
            return self.source.images(index, begun=lambda place: self._at(index[place]))
        return self.source.images(index)

    def _at(self, image: int) -> None:
        self._row[1] = image
        self._row[2] += 1


def _as_it_is(batch: Any) -> Any:  # a pair of `_Decode`, where torch's types expect a list
    return batch
