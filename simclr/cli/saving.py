"""The newest checkpoint of a run, after every epoch and when it is told to stop."""

import functools
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from simclr import distributed
from simclr.checkpoint import LAST
from simclr.paths import expanded

_AGREE_EVERY = 8  # steps after which several ranks ask each other whether to stop


class NewestCheckpoint(ModelCheckpoint):
    """Lightning's checkpointing under a name of its own, so that it goes beside one that the user adds.

    For one that saves after epochs only. Lightning asks for the key before each hook of each step.
    """

    @functools.cached_property
    def state_key(self) -> str:
        """Lightning's, formatted once."""
        return super().state_key

    def on_train_batch_end(self, *args: Any) -> None:
        """Nothing: Lightning's would find out at every step that it has nothing to do."""


def newest_checkpoint(run_dir: Path) -> ModelCheckpoint:
    """Keeps `checkpoints/last.ckpt`, after every epoch."""
    return NewestCheckpoint(
        dirpath=run_dir / LAST.parent, filename=LAST.stem, save_on_train_epoch_end=True, enable_version_counter=False
    )


class SaveOnInterrupt(Callback):
    """On Ctrl-C or SIGTERM: finish the step, save a checkpoint that continues exactly from it, and stop.

    Several ranks, which may be told at different steps or not all, agree on the step.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path):
        self.path = expanded(run_dir) / LAST
        self.asked = self.agreed = self.saved = False
        self.previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the two signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        # Lightning agrees on a SIGTERM before every batch on the device, and so waits for all that is queued there
        # (its issue 21487). This callback agrees between the hosts.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if distributed.rank() == 0:
            print("\nfinishing this step, then saving; again to stop at once", file=sys.stderr, flush=True)

    def _agree(self) -> None:
        self.agreed |= any(asked for (asked,) in distributed.exchange([self.asked]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if asked to stop: after an optimiser step, because accumulated gradients are not in a checkpoint."""
        if trainer.world_size == 1 or batch_idx % _AGREE_EVERY == 0:
            self._agree()
        if self.agreed and (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)
            self.saved = True

    def on_train_batch_start(self, *args: Any) -> None:
        """Stop, once the loggers have the last step's metrics."""
        if self.saved:
            raise KeyboardInterrupt

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asked to stop in the last step of an epoch: what belongs to its end, the checkpoint too, has been done."""
        self._agree()
        if self.agreed:
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
