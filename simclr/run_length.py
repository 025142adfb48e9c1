"""How long a run is by the Trainer's settings: batches, optimiser steps, epochs. Known before it starts."""

import math
from typing import NamedTuple

from pytorch_lightning import Trainer


class RunLength(NamedTuple):
    """Where a run ends, unless something stops it earlier (max_time, a callback, Ctrl-C).

    Attributes:
        batches: of an epoch, as far as the Trainer's limits let it go.
        accumulate: batches to an optimiser step; the last step of an epoch may have fewer.
        steps: optimiser steps in all.
        epochs: the most it may begin; None if steps alone end it.
    """

    batches: int
    accumulate: int
    steps: int
    epochs: int | None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of a whole epoch."""
        return math.ceil(self.batches / self.accumulate)

    @property
    def in_epochs(self) -> float:
        """Epochs that the steps make, whole or not."""
        return self.steps / max(1, self.steps_per_epoch)

    def batches_of(self, epoch: int) -> int:
        """Batches that an epoch (from 0) trains on: fewer in the one that the last step falls into, then none."""
        left = self.steps - epoch * self.steps_per_epoch
        return max(0, min(self.batches, left * self.accumulate))

    def __str__(self) -> str:
        """As people read it: "4 steps an epoch, 2 epochs"; both units where a step takes several batches."""
        apart = self.accumulate > 1
        kind = "optimiser step" if apart else "step"
        an_epoch = f"{_counted(self.steps_per_epoch, kind)} an epoch"
        if apart:
            an_epoch = f"{_counted(self.batches, 'batch', 'batches')} and {an_epoch}"
        if self.epochs is not None and self.steps == self.epochs * self.steps_per_epoch:
            return f"{an_epoch}, {_counted(self.epochs, 'epoch')}"
        return f"{an_epoch}, {_counted(self.steps, kind)} in all"


def run_length(available: int, trainer: Trainer) -> RunLength:
    """The length of a run on this many batches an epoch, under a Trainer with an end (max_epochs or max_steps)."""
    limit = trainer.limit_train_batches  # overfit_batches sets it too
    batches = min(available, limit) if isinstance(limit, int) else int(available * limit)
    accumulate = trainer.accumulate_grad_batches
    epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
    by_epochs = math.inf if epochs is None else epochs * math.ceil(batches / accumulate)
    by_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    return RunLength(batches, accumulate, int(min(by_epochs, by_steps)), epochs)


def _counted(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or f'{singular}s'}"


def is_due(trainer: Trainer, every_n_epochs: int) -> bool:
    """Whether the epoch that ends is one of every n, or the last, also one that a limit of steps ends early."""
    return is_last(trainer) or (trainer.current_epoch + 1) % every_n_epochs == 0


def is_last(trainer: Trainer) -> bool:
    """Whether the epoch that ends is the last, also one that a limit of steps, or a callback, ends early."""
    out_of_steps = 0 <= trainer.max_steps <= trainer.global_step
    return trainer.current_epoch + 1 == trainer.max_epochs or out_of_steps or trainer.should_stop
