"""What a training step says: the loss of the global batch and what goes with it, at Lightning's own steps."""

from typing import NamedTuple

from pytorch_lightning import LightningModule
from torch import Tensor

from simclr import distributed
from simclr.contrast.engine import ContrastStats
from simclr.intact import DIVERGED
from simclr.training.internals import optimizer_batches


class ClassStats(NamedTuple):
    """What a step with labels says of the global batch.

    Attributes:
        loss: scalar, detached.
        accuracy: the part of its views whose class was found.
    """

    loss: Tensor
    accuracy: Tensor


class StepLog:
    """Sums the loss of an epoch and logs every `log_every_n_steps`; nothing waits for the device in between.

    Attributes:
        epoch_loss: summed over the steps of the epoch so far; a checkpoint keeps it.
        epoch_steps: how many they are.
        logged: what was logged last, by name; another object each time.
        loss: of the last batch, on its device.
        watched: whether someone looks at the numbers of every step (`simclr.nonfinite`), so that nobody else need.
        collected: whether someone takes what was logged into a row of more numbers (`simclr.step_figures`), so that
            Lightning need not.
        reason: why the last loss is not finite, where the loss itself has told.
    """

    def __init__(self) -> None:
        self.epoch_loss: Tensor | float = 0.0
        self.epoch_steps = 0
        self.logged: dict[str, Tensor | float] = {}
        self.loss: Tensor | None = None
        self.watched = False
        self.collected = False
        self.reason = ""

    def add(
        self,
        module: LightningModule,
        batch_idx: int,
        stats: ContrastStats | ClassStats | Tensor,
        cache_error: Tensor | None = None,
    ) -> None:
        """A step's numbers, alike on all ranks.

        Args:
            module: the method that trains.
            batch_idx: of the epoch, from 0.
            stats: of the global batch; of a loss that compares nothing and knows no classes its value, a detached
                scalar.
            cache_error: of a step in micro-batches: see `simclr.training.gradient_cache.Cached`.
        Raises:
            FloatingPointError: if the loss is not finite, in a step that looks at it, and nobody else does.
        """
        loss = self.loss = stats if isinstance(stats, Tensor) else stats.loss
        if batch_idx == 0:
            self.epoch_loss, self.epoch_steps = 0.0, 0
        self.epoch_loss, self.epoch_steps = self.epoch_loss + loss, self.epoch_steps + 1
        trainer = module.trainer
        every = trainer.log_every_n_steps
        logged = every > 0 and (optimizer_batches(trainer) + 1) % every == 0
        # A look at the value waits for the device.
        if not self.watched and (logged or trainer.is_last_batch) and not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {trainer.global_step}. {DIVERGED}")
        if not logged:
            return
        values = {"train_loss": loss, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
        if isinstance(stats, ContrastStats):
            values |= {"contrast_top1": stats.accuracy, "positive_cosine": stats.positive_cosine}
            values["negative_cosine"] = stats.negative_cosine
        if isinstance(stats, ClassStats):
            values["train_top1"] = stats.accuracy
        if cache_error is not None:
            values["gradient_cache_error"] = distributed.max_over_ranks(cache_error)
        self.logged = values
        if not self.collected:
            module.log_dict(values)

    def mean(self) -> float:
        """The mean loss of the global batches of this epoch so far."""
        return float(self.epoch_loss) / max(1, self.epoch_steps)

    def log_epoch(self, module: LightningModule) -> None:
        """The mean loss of the epoch, the same on all ranks."""
        if not module.trainer.barebones:  # which would warn that it logs nothing
            module.log("train_loss_epoch", self.mean(), prog_bar=True, rank_zero_only=True, sync_dist=True)
