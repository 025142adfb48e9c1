"""Batches in an order that is a pure function of (seed, epoch): from any image set, for any rank, resumable."""

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simclr.data.decode import kills_its_reader
from simclr.data.sources import ImageSet, MemoryImages
from simclr.files import mark_sockets, remove_abandoned_sockets
from simclr.seeding import epoch_order

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
    ):
        if batch_size % world_size:
            raise ValueError(uneven_batch(batch_size, world_size))
        if not 1 <= batch_size <= size:
            raise ValueError(f"data.batch_size={batch_size} is not between 1 and the {size} images there are.")
        self.size, self.batch_size, self.seed, self.rank, self.world_size = size, batch_size, seed, rank, world_size
        self.reshuffle = reshuffle
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
        order = epoch_order(self.seed, epoch if self.reshuffle else 0, self.size, places)
        return order.view(steps, self.batch_size)

    def from_step(self, step: int) -> Iterator[Tensor]:
        """This rank's batches from this step of the epoch on, some steps at a time: (steps, B / W) int64 each."""
        share = self.batch_size // self.world_size
        own = torch.arange(share) + self.rank * share  # places in a global batch
        at_a_time = max(1, _ORDER_AHEAD // share)
        for first in range(step, len(self), at_a_time):
            steps = torch.arange(first, min(first + at_a_time, len(self)))
            places = (steps[:, None] * self.batch_size + own).flatten()
            epoch = self.epoch if self.reshuffle else 0
            yield epoch_order(self.seed, epoch, self.size, places).view(-1, share)


def uneven_batch(batch_size: int, world_size: int) -> str:
    """The error line for a batch that does not divide over the ranks."""
    below = batch_size // world_size * world_size
    near = " or ".join(str(n) for n in (below, below + world_size) if n)
    return (
        f"data.batch_size={batch_size} does not divide over {world_size} devices. "
        f"Use a multiple of {world_size}, for example {near}."
    )


class TrainLoader:
    """The batches of an epoch, (images (n, 3, S, S) uint8, index (n,) int64), in the form that Lightning resumes.

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
    """Images and labels in a fixed order, (images (n, 3, S, S) uint8, labels (n,) int64); the last batch may be small.

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
        self._batches = Batches(source, workers)

    @property
    def labels(self) -> Tensor:
        """(M,) int64, in the order of the batches."""
        return self.source.labels[self.index]

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, index in self._batches(part[None] for part in self.index.split(self.batch_size)):
            yield images, self.source.labels[index.cpu()].to(images.device)


class Batches:
    """Turns batches of image numbers into (images, index): from memory at once, from files through worker processes.

    Args:
        source: the images.
        workers: processes that decode, started at the first batch and kept; 0 decodes in this process.
    """

    def __init__(self, source: ImageSet, workers: int = 0):
        self.source = source
        self._order = _Order(ahead=2 * workers + 1)  # torch's loader has two batches in hand for each worker
        self._loader: DataLoader | None = None
        if not isinstance(source, MemoryImages):
            self._loader = DataLoader(
                _Decode(source),
                batch_sampler=self._order,
                collate_fn=_as_it_is,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=torch.cuda.is_available(),
                # Forking a process that runs threads (decoding, OpenMP, loggers) can deadlock; these start clean.
                multiprocessing_context=start_method() if workers else None,
                worker_init_fn=_die_with_parent if workers else None,
            )

    def __call__(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (n, 3, S, S) uint8, index (n,) int64 on the CPU) for each row (n,) of the parts, in order.

        Args:
            parts: of the order: the image numbers of some batches, (batches, n) int64 each.
        """
        if self._loader is not None:
            self._order.batches = itertools.chain.from_iterable(parts)
            yield from self._decoded()
            return
        # A part goes to the images in one transfer, and the numbers are handed out as they are.
        device = self.source.pixels.device
        pairs = (pair for part in parts for pair in zip(part, part.to(device), strict=True))
        if self.source.pin:
            yield from _ahead(self.source.pixels, pairs, pin=True)
            return
        for index, placed in pairs:
            yield self.source.images(placed), index

    def _decoded(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for images, index in self._loader:
                if isinstance(images, str):
                    raise ValueError(images)
                yield images, index
        except RuntimeError as error:  # torch's word for workers that died
            if "DataLoader worker" not in str(error):
                raise
            raise ValueError(self._what_happened(str(error))) from error

    def _what_happened(self, reason: str) -> str:
        """What became of a worker, and of which image, as far as that can be told."""
        lines = reason.strip().splitlines()
        what = f"a process that reads images died: {lines[-1] if lines else reason}."
        paths = [self.source.paths[i] for batch in self._order.handed_out for i in batch]
        if deadly := [path for path in dict.fromkeys(paths) if kills_its_reader(path)]:
            return f"{what} The pixels of {', '.join(deadly[:3])} are damaged. Repair or remove them."
        return f"{what} None of the {len(paths)} images that were being read is damaged: is there too little memory?"


def _ahead(pixels: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], pin: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of images on the CPU, gathered two ahead by a thread, while the device is busy.

    Args:
        pixels: (N, 3, S, S).
        pairs: (n,) int64 twice, as the batch's index and as a place in `pixels`.
        pin: gather into page-locked memory, which torch keeps and gives again, and from which a GPU copies by itself.
    """

    def gather(index: Tensor, placed: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(len(placed), *pixels.shape[1:], dtype=pixels.dtype, pin_memory=pin)
        return torch.index_select(pixels, 0, placed, out=out), index

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


def _die_with_parent(worker: int) -> None:
    """In a worker: end when the process that wants its images has died, however it did.

    torch's own watchdog watches the worker's parent, which is the fork server: that one waits for its last worker. With
    the workers gone it ends too, and after it the process that clears up what all of them shared.
    """
    end_with_parent()


def end_with_parent() -> None:
    """In a process that was started by another: end when that one has, however it did."""
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    multiprocessing.parent_process().join()  # of who asked for the worker, not of the fork server
    os._exit(1)


class _Order:
    """The batch sampler of a DataLoader that outlives an epoch: iterates whatever batches it was given last."""

    def __init__(self, ahead: int):
        self.batches: Iterable[Tensor] = ()
        self.handed_out: deque[list[int]] = deque(maxlen=ahead)  # the last of them

    def __iter__(self) -> Iterator[list[int]]:
        for index in self.batches:
            self.handed_out.append(index.tolist())
            yield self.handed_out[-1]


class _Decode:
    """A map-style data set that is asked for whole batches, as torch's loader does of one with __getitems__."""

    def __init__(self, source: ImageSet):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor | str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, index: list[int]) -> tuple[Tensor | str, Tensor]:
        try:
            return self.source.images(index), torch.tensor(index)
        except ValueError as error:  # its words alone: torch would put a traceback of the worker into them
            return str(error), torch.tensor(index)


def _as_it_is(batch):
    return batch
