"""How far a run is, while it trains: a bar in a terminal, a line now and then elsewhere. None of it changes the run.

Nothing here waits for the device between two looks at the loss, which are seconds apart.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar

LINE_SECONDS = 30.0  # between two lines where there is no terminal
_FIRST_STEPS, _FIRST_SECONDS = 10, 3.0  # that the first of them, an estimate of the whole, is made of
_BAR_SECONDS, _LOSS_SECONDS = 0.2, 5.0  # between two drawings of the bar, and two looks at the loss for it
LOG_STEPS = 25  # between two rows of step metrics, in a long run


class Pace:
    """How fast a run goes, measured on the CPU's clock from the end of its first step, which pays for what is set up.

    Args:
        trainer: in `fit`.
        batch_size: the global batch, images.
        work: of so many optimiser steps, the first one's being 1; see `work_of_steps`.
    """

    def __init__(self, trainer: Trainer, batch_size: int, work: Callable[[float], float] = float):
        self.total = trainer.estimated_stepping_batches  # optimiser steps of the whole run
        self.batch_size, self.work = batch_size, work
        self.batches = 0  # seen here
        self._from: tuple[float, int] | None = None  # time and optimiser step
        self._last: tuple[float, int] | None = None  # time and batches, when the speed was last asked for

    def step(self, trainer: Trainer, now: float) -> None:
        """A batch is done."""
        self.batches += 1
        if self._from is None:
            self._from, self._last = (now, trainer.global_step), (now, self.batches)

    def seconds_since_first(self, now: float) -> float:
        """Since the end of the first step."""
        return 0.0 if self._from is None else now - self._from[0]

    def images_per_second(self, now: float) -> float | None:
        """Over all devices, since this was last asked; None if no batch was done since."""
        if self._last is None or self.batches == self._last[1] or now <= self._last[0]:
            return None
        (then, before), self._last = self._last, (now, self.batches)
        return (self.batches - before) * self.batch_size / (now - then)

    def seconds_left(self, trainer: Trainer, now: float) -> float | None:
        """Of the whole run, at the mean pace so far, with all that stands between the steps; None at its ends."""
        if self._from is None or not self._from[1] < trainer.global_step < self.total:
            return None
        begun, done, whole = map(self.work, (self._from[1], trainer.global_step, self.total))
        return (now - self._from[0]) / (done - begun) * (whole - done)


def work_of_steps(trainer: Trainer, method: Any) -> Callable[[float], float]:
    """What `Pace` takes as `work` in a run of a method, whose views may grow from epoch to epoch."""
    batches = trainer.num_training_batches
    if batches == math.inf or method.hparams.get("start_size") is None:
        return float
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    return lambda steps: method.views.work(steps / per_epoch) * per_epoch


def duration(seconds: float) -> str:
    """Seconds for people: `45 s`, `13 min`, `2 h 13 min`, `3 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 60 * 48:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def _epoch(trainer: Trainer) -> str:
    last = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{last}"


def _speed_and_rest(speed: float | None, left: float | None) -> list[str]:
    said = [] if speed is None else [f"{speed:,.0f} images/s"]
    return said if left is None else [*said, f"{duration(left)} left"]


def fitting(room: int, loss: list[str], speed: list[str], left: list[str]) -> str:
    """What of a bar's words goes into so many columns: all of them, without the speed, or the time left alone."""
    texts = ["  ".join(words) for words in ([*loss, *speed, *left], [*loss, *left])]
    return next((text for text in texts if len(text) <= room), "  ".join(left or loss))


def _columns(bar: Any) -> int:
    """How wide the window of tqdm's bar is, as it finds out itself."""
    width = bar.dynamic_ncols(bar.fp)[0] if bar.dynamic_ncols else bar.ncols  # a tuple of columns and rows
    return width or 80


class ProgressLines(Callback):
    """Prints where the run is every 30 seconds, for a log file; a run that is shorter in all prints nothing.

    The first line comes after ten steps: until then nobody knows how long it will take.

    Args:
        seconds: between two lines.
    """

    def __init__(self, seconds: float = LINE_SECONDS):
        self.seconds = seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._pace = Pace(trainer, pl_module.hparams.batch_size, work_of_steps(trainer, pl_module))
        self._next = time.perf_counter() + self.seconds
        self._printed = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print the line, if it is time."""
        now = time.perf_counter()
        self._pace.step(trainer, now)
        if not trainer.is_global_zero or not (now >= self._next or self._first_is_due(trainer, now)):
            return
        self._next, self._printed = now + self.seconds, True
        words = [_epoch(trainer), f"step {trainer.global_step:,}/{self._pace.total:,}"]
        words += [f"loss {pl_module.step_log.mean():.3f}"]
        words += _speed_and_rest(self._pace.images_per_second(now), self._pace.seconds_left(trainer, now))
        print("  ".join(words), flush=True)

    def _first_is_due(self, trainer: Trainer, now: float) -> bool:
        if self._printed or self._pace.batches <= _FIRST_STEPS or self._pace.seconds_since_first(now) < _FIRST_SECONDS:
            return False
        left = self._pace.seconds_left(trainer, now)
        return left is not None and left > self.seconds


class ProgressBar(TQDMProgressBar):
    """Lightning's bar of the epoch, from 1, with the loss, the images per second and the time left of the whole run.

    In a narrow window the bar goes first, then the speed, then the loss: the epoch and the time left stay.
    """

    BAR_FORMAT = "{desc} {bar} {n_fmt}/{total_fmt}{postfix}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._pace = Pace(trainer, pl_module.hparams.batch_size, work_of_steps(trainer, pl_module))
        self._next = self._next_loss = 0.0
        self._loss = ""
        self._said: list[str] = []

    @property
    def train_description(self) -> str:
        """Before the first epoch."""
        return "starting"

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Begin anew, from 1 where Lightning counts from 0."""
        batches = self.total_train_batches
        self.train_progress_bar.reset(total=batches if math.isfinite(batches) else None)
        self.train_progress_bar.set_description_str(_epoch(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the bar, if it is time: drawing at every step would cost more than a small step."""
        now = time.perf_counter()
        self._pace.step(trainer, now)
        bar = self.train_progress_bar
        if bar.disable or (now < self._next and not trainer.is_last_batch):
            return
        self._next = now + _BAR_SECONDS
        if now >= self._next_loss or trainer.is_last_batch:  # whose loss is looked at anyway
            self._next_loss = now + (_LOSS_SECONDS if self._said else 1)
            self._loss = f"loss {pl_module.step_log.mean():.3f}"
            if speed := self._pace.images_per_second(now):  # over seconds: of single steps it would flicker
                self._said = _speed_and_rest(speed, None)
        left = _speed_and_rest(None, self._pace.seconds_left(trainer, now))
        bar.n = batch_idx + 1
        # The loss, the speed and the rest beside the epoch and the count of its batches.
        # tqdm gives the bar a column at least, and leaves the last one free.
        room = _columns(bar) - len(f"{_epoch(trainer)} | {bar.n}/{bar.total}, ") - 1
        bar.set_postfix_str(fitting(room, [self._loss], self._said, left))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the bar stays as the last batch left it."""


class LogInterval(Callback):
    """Where nobody set `log_every_n_steps`: every 25 steps, in a run of fewer than 250 ten times and more; and always
    the first step and the last.

    It goes by the length of the whole run: one that is continued logs the same steps.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it, once the length is known."""
        self._last = trainer.estimated_stepping_batches - 1
        trainer.log_every_n_steps = self._every = max(1, min(LOG_STEPS, int((self._last + 1) // 10)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Every step is one of each one."""
        trainer.log_every_n_steps = 1 if trainer.global_step in (0, self._last) else self._every
