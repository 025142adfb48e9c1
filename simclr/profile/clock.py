"""The parts of a training step, timed in a real training."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.profilers import Profiler

from simclr.profile.limit import synchronize

PARTS = ("data", "augmentation", "encoder", "loss", "backward", "optimiser")
_BLOCK = 5  # steps at a time, timed in parts or untouched: close in time, so that a neighbour disturbs both
_WARM_UP = {"cpu": 5, "cuda": 10}  # steps: compiling, the choice of kernels, the first batches of workers

# Lightning tells a profiler of its hooks and loops, as `[Strategy]DDPStrategy.backward`; SimCLR of what it does within
# them. By the last word of the name; what is not here belongs to the part around it, if any.
_PART_OF = {
    "train_dataloader_next": "data",
    "transfer_batch_to_device": "data",
    "augmentation": "augmentation",
    "encoder": "encoder",
    "loss": "loss",
    "backward": "backward",
    "optimizer_step": "optimiser",  # around the whole step, which the others interrupt
    "optimizer_zero_grad": "optimiser",
    "training_step": "rest",
}


class StepParts(Profiler):
    """A profiler for Lightning's Trainer that adds up the seconds of each part of a step, while it is on.

    A part lasts from when the device has done all that was asked of it before to when it has done the part, so that on
    a GPU every part has its own time. One that begins within another interrupts it: every moment belongs to one part.

    Args:
        device_type: where the training runs, "cpu" or "cuda".
    Attributes:
        on: whether it times; otherwise it costs what no profiler does.
        seconds: by part.
        calls: how often each part ran.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type, self.on = device_type, False
        self.seconds: Any = Counter()  # of floats, for which there is no type
        self.calls: Counter[str] = Counter()
        self._stack: list[str] = []
        self._since = 0.0  # when the part at hand began or went on

    def now(self) -> float:
        """Seconds, once the device has done all that was asked of it."""
        synchronize(self.device_type)
        return time.perf_counter()

    def profile(self, action_name: str) -> AbstractContextManager[None]:
        """All that happens within belongs to the part of that name, but for the parts within it."""
        return self._range(action_name) if self._part(action_name) else nullcontext()

    @contextmanager
    def _range(self, action_name: str) -> Iterator[None]:
        self.start(action_name)
        try:
            yield
        finally:
            self.stop(action_name)

    def start(self, action_name: str) -> None:
        """A part begins, if the name is one's."""
        if part := self._part(action_name):
            self._switch()
            self._stack.append(part)
            self.calls[part] += 1

    def stop(self, action_name: str) -> None:
        """It ends."""
        if self._part(action_name):
            self._switch()
            self._stack.pop()

    def _part(self, action_name: str) -> str | None:
        return _PART_OF.get(action_name.rpartition(".")[2]) if self.on else None

    def _switch(self) -> None:
        now = self.now()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now


class StepClock(Callback):
    """Times the steps of a real training: some untouched, as many in parts, in turn.

    Waiting for the device makes a step in parts longer than an untouched one, which is timed as a block. The change of
    epochs is not counted.

    Args:
        steps: how many to time of either kind, rounded up to whole blocks.
        device_type: where the training runs, "cpu" or "cuda".
    Attributes:
        profiler: holds the parts; takes the place of the Trainer's while it trains.
        timed, untouched: seconds of each block, timed in parts and not.
    """

    def __init__(self, steps: int, device_type: str):
        self.blocks, self.profiler = -(-steps // _BLOCK), StepParts(device_type)
        self.warm_up = _WARM_UP.get(device_type, 5)
        self.timed: list[float] = []
        self.untouched: list[float] = []
        self._done, self._elapsed = 0, 0.0
        self._began: float | None = None
        self._other: Profiler | None = None  # the Trainer's own

    @property
    def steps_of_a_kind(self) -> int:
        """How many steps are timed in parts; as many untouched."""
        return _BLOCK * self.blocks

    @property
    def steps(self) -> int:
        """How many steps the training must have: with those to warm up."""
        return self.warm_up + 2 * self.steps_of_a_kind

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of the Trainer's profiler."""
        self._other, trainer.profiler = trainer.profiler, self.profiler

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave everything as it was."""
        self.profiler.on = False
        if self._other is not None:
            trainer.profiler, self._other = self._other, None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the block."""
        if self._done >= self.warm_up:
            self._began = self.profiler.now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Count the step; at the end of a block, or of an epoch within it, stop the clock."""
        self._done += 1
        counted = self._done - self.warm_up
        ends = counted % _BLOCK == 0 if counted > 0 else counted == 0
        if not (ends or (trainer.is_last_batch and counted > 0)):
            return
        now = self.profiler.now()
        if self._began is not None:
            self._elapsed += now - self._began
            self._began = None if trainer.is_last_batch else now
        if not ends:
            return
        if counted:
            (self.timed if self.profiler.on else self.untouched).append(self._elapsed)
        self._elapsed, self.profiler.on = 0.0, counted // _BLOCK % 2 == 1 and counted < 2 * self.steps_of_a_kind
        self._began = None if trainer.is_last_batch else self.profiler.now()
