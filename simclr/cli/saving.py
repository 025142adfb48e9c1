"""The newest checkpoint of a run, after every epoch and wherever it is told to stop."""

import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, Timer
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from pytorch_lightning.plugins.io import TorchCheckpointIO

from simclr import distributed
from simclr.checkpoint import LAST, STARTING_ENCODER, save_starting_encoder, write_checkpoint
from simclr.cli.messages import INTERRUPTED, TERMINATED
from simclr.files import reason_of, say_unwritten, write_atomically
from simclr.intact import refuse_flipped_bits
from simclr.loggers import MetricsCSV
from simclr.paths import expanded
from simclr.training.internals import as_saved_within_last_batch, epoch_row, leave_signals_to_us, may_stop_early

_AGREE_EVERY = 8  # steps after which several ranks ask each other whether to stop


class NewestCheckpoint(ModelCheckpoint):
    """Lightning's checkpointing under a name of its own, so that it goes beside one that the user adds."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, once the epoch's row is in metrics.csv: Lightning logs it later, and a kill between would lose it."""
        row = epoch_row(trainer)  # on every rank: some may agree on a number
        for logger in trainer.loggers:
            if row is not None and isinstance(logger, MetricsCSV):
                logger.log_metrics(*row)
                logger.save()
        super().on_train_epoch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember: there is one file, and Lightning warns of a state from another folder."""
        return {}


def newest_checkpoint(run_dir: Path) -> ModelCheckpoint:
    """Keeps `checkpoints/last.ckpt`, after every epoch."""
    return NewestCheckpoint(
        dirpath=run_dir / LAST.parent, filename=LAST.stem, save_on_train_epoch_end=True, enable_version_counter=False
    )


class KeepStartingEncoder(Callback):
    """Writes the encoder that a run began with, where weights were given: `linear-eval` measures it as a yardstick.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first step."""
        if trainer.is_global_zero and trainer.global_step == 0 and trainer.ckpt_path is None:
            save_starting_encoder(pl_module, self.run_dir / STARTING_ENCODER)


@dataclass
class Schedule:
    """How often a run is saved beside the end of every epoch, and what is kept.

    Args:
        every_n_steps: optimiser steps after which the newest checkpoint is replaced inside an epoch too.
        every_minutes: likewise, minutes; with several devices agreed on every eighth batch.
        keep: how many checkpoints to keep as `checkpoints/step-N.ckpt`, the newest included. last.ckpt is always kept.
    """

    every_n_steps: int | None = None
    every_minutes: float | None = None
    keep: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every_n_steps", 1), ("keep", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"checkpoint.{name}={value} is less than {least}.")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(f"checkpoint.every_minutes={self.every_minutes:g} is not positive.")


class InsideEpochs(Checkpoint):
    """Saves the newest checkpoint inside epochs, as a `Schedule` says.

    Before a step rather than after one: by then the loggers have the row of the step before, which a kill would lose.
    """

    def __init__(self, run_dir: Path, schedule: Schedule):
        self.path, self.schedule = expanded(run_dir) / LAST, schedule
        self.saved_at, self.saving = -1, False  # optimiser steps
        self.next = 0.0  # by time.monotonic

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here the steps and the minutes count."""
        self.saved_at = trainer.global_step
        self._wait()

    def _wait(self) -> None:
        self.next = time.monotonic() + 60 * (self.schedule.every_minutes or math.inf)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save, if it is time: after an optimiser step, because accumulated gradients are not in a checkpoint."""
        if batch_idx == 0:
            self.saved_at = trainer.global_step  # at the epoch's end
        if batch_idx % trainer.accumulate_grad_batches or trainer.global_step == self.saved_at:
            return
        if self._is_due(trainer, batch_idx):
            self.saving = True
            trainer.save_checkpoint(self.path)
            self.saving, self.saved_at = False, trainer.global_step
            self._wait()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What is saved here continues as what is saved at the end of a step does."""
        if self.saving:
            as_saved_within_last_batch(checkpoint["loops"]["fit_loop"])

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        steps = self.schedule.every_n_steps
        if steps and trainer.global_step % steps == 0:
            return True
        if self.schedule.every_minutes is None:
            return False
        if trainer.world_size == 1:
            return time.monotonic() >= self.next
        if batch_idx % _AGREE_EVERY:
            return False
        return any(late for (late,) in distributed.exchange([time.monotonic() >= self.next]))


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints whole or not at all; one that cannot be written is said, and the run goes on with the last.

    Lightning itself writes into the folder for temporary files, and then copies over the checkpoint that is there.

    Args:
        keep: how many of those written to last.ckpt to keep beside it, by their step.

    Attributes:
        failed: of the last save, the file and why it could not be written; None if it was.
    """

    def __init__(self, keep: int = 0) -> None:
        self.keep = keep
        self.failed: tuple[Path, str] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint to a file, or as Lightning does to an address (s3:// ...)."""
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        try:
            write_checkpoint(path, checkpoint)
        except OSError as error:
            self.failed = path, reason_of(error)
            kept = "the one before is kept" if path.exists() else "there is none before it"
            say_unwritten(path, error, f"{kept}, and the run goes on")
        else:
            self.failed = None
            if self.keep and path.name == LAST.name:
                _keep(path, checkpoint["global_step"], self.keep)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a checkpoint holds, its checksums compared, which torch does not."""
        if "://" not in str(path):
            try:
                refuse_flipped_bits(Path(path))
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}.") from error
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove one that another has replaced: not if that one could not be written."""
        if self.failed is None:
            super().remove_checkpoint(path)


def _keep(path: Path, step: int, count: int) -> None:
    """Let a checkpoint stand under the name of its step too, and remove the oldest of more than `count` such."""
    own = path.with_name(f"step-{step}.ckpt")
    try:
        own.unlink(missing_ok=True)
        try:
            os.link(path, own)  # the same file, until the next one replaces last.ckpt
        except OSError:  # a file system without links
            write_atomically(own, path.read_bytes())
        numbers = {
            int(p.stem.removeprefix("step-")): p for p in path.parent.glob("step-*.ckpt") if p.stem[5:].isdigit()
        }
        for number in sorted(numbers)[:-count]:
            numbers[number].unlink()
    except OSError as error:
        say_unwritten(own, error, "it is not kept, and the run goes on")


def take_over_checkpoints(trainer: Trainer, keep: int = 0) -> WholeCheckpoints | None:
    """Have a Trainer save by `WholeCheckpoints`; None if it was given another way."""
    if type(trainer.strategy.checkpoint_io) is not TorchCheckpointIO:
        return None
    trainer.strategy.checkpoint_io = WholeCheckpoints(keep)
    return trainer.strategy.checkpoint_io


class SaveOnInterrupt(Checkpoint):
    """Told to stop: finish the step, save a checkpoint that continues exactly from it, and stop.

    Told by a signal (Ctrl-C, SIGTERM), or by `trainer.should_stop`, which max_time, EarlyStopping and any other
    callback set. Lightning answers that by ending the epoch where it stands: the rest of it would be lost, and so would
    the gradients accumulated for a step. Here the step is finished, several ranks, which may be told at different steps
    or not all, agree on it, and nothing of an epoch's end is done where the epoch has not ended.

    A `Checkpoint` only so that Lightning calls it after every callback that may ask to stop.

    Args:
        run_dir: the run folder.

    Attributes:
        cause: what has set `should_stop`, by name; None if nothing has.
        signalled: whether a signal stops the run, on all ranks alike.
        exit_code: of a run that a signal stops, the same on all ranks unless it was cut short.
    """

    def __init__(self, run_dir: Path):
        self.path = expanded(run_dir) / LAST
        self.asked = self.signalled = self.agreed = self.saved = False
        self.cause: str | None = None
        self.exit_code = INTERRUPTED
        self.previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the two signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        leave_signals_to_us(trainer)

    def _ask(self, number: int, frame: Any) -> None:
        self.exit_code = TERMINATED if number == signal.SIGTERM else self.exit_code
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if distributed.rank() == 0:
            print("\nfinishing this step, then saving; again to stop at once", file=sys.stderr, flush=True)

    def _agree(self) -> None:
        told = distributed.exchange([self.asked, self.cause is not None, self.exit_code])
        self.signalled |= any(signalled for signalled, _, _ in told)
        self.agreed |= self.signalled or any(planned for _, planned, _ in told)
        self.exit_code = int(max(code for _, _, code in told))
        if self.agreed and not self.signalled and self.cause is None:
            self.cause = "a callback on another rank"

    def _listen(self, trainer: Trainer) -> None:
        """Takes note of `should_stop`, and takes it back: this rank would leave the epoch at once, and by itself."""
        if trainer.should_stop and may_stop_early(trainer):
            self.cause = self.cause or cause_of_stop(trainer)
            trainer.should_stop = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if asked to stop: after an optimiser step, because accumulated gradients are not in a checkpoint."""
        self._listen(trainer)
        if trainer.world_size == 1 or trainer.is_last_batch or batch_idx % _AGREE_EVERY == 0:
            self._agree()
        if trainer.is_last_batch:
            trainer.should_stop |= self.agreed and not self.signalled  # kNN is measured where a run ends
        elif self.agreed and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.path)
            self.saved = True

    def on_train_batch_start(self, *args: Any) -> None:
        """Stop, once the loggers have the last step's metrics."""
        if self.saved:
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asked to stop by what looks at epochs: all ranks leave together, with the checkpoint of the epoch."""
        self._listen(trainer)
        self._agree()
        trainer.should_stop |= self.agreed and not self.signalled

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asked to stop in the last step of an epoch: what belongs to its end, the checkpoint too, has been done."""
        self._agree()
        if self.signalled:
            raise KeyboardInterrupt

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A limit of time counts from the start of each command: the time spent is not handed on."""
        for callback in trainer.callbacks:
            if isinstance(callback, Timer):
                checkpoint.get("callbacks", {}).pop(callback.state_key, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def cause_of_stop(trainer: Trainer) -> str:
    """Who set `trainer.should_stop`, for people."""
    for callback in trainer.callbacks:
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            return "max_time"
        stopped = isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED
        if stopped and callback.stopped_epoch == trainer.current_epoch:  # not the reason of an earlier stop
            reason = (callback.stopping_reason_message or "").partition(" Signaling")[0].rstrip(".")
            return f"EarlyStopping ({reason})"
    ours = ("simclr.", "pytorch_lightning.")
    kinds = [kind.__name__ for kind in map(type, trainer.callbacks) if not kind.__module__.startswith(ours)]
    return kinds[0] if len(kinds) == 1 else "trainer.should_stop"
