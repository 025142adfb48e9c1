"""What is borrowed from Lightning though it is not public, one function each; tests/test_internals.py says
whether it is still there and still means this. Nothing else in the package may reach for such names."""

import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies.launchers import subprocess_script

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
)  # of a callback, in each step


def call_only_own_hooks(callbacks: Iterable[Callback]) -> None:
    """Have Lightning pass over the hooks of a step that a callback's class does not define.

    It calls the empty ones too, each within a context for its profiler, and skips what cannot be called. Nine callbacks
    that look at a step now and then cost a third of a percent of a step of 20 ms by that alone.
    """
    for callback in callbacks:
        for hook in STEP_HOOKS:
            if getattr(type(callback), hook) is getattr(Callback, hook):
                vars(callback).setdefault(hook, None)


def optimizer_batches(trainer: Trainer) -> int:
    """Batches of the run that ended an optimiser's step before this one: the x-axis of what Lightning logs.

    `global_step` counts steps of all optimisers and moves within the batch, so that a row written while a batch is
    trained on would stand one step from Lightning's own.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def epoch_row(trainer: Trainer) -> tuple[dict[str, Any], int] | None:
    """What Lightning will log of an epoch that ends, after the last of its callbacks, and its step; None for nothing.

    `logged_metrics`, the public name, holds what was logged ever before too.
    """
    metrics = dict(trainer._logger_connector.metrics["log"])
    if not metrics:
        return None
    step = metrics.pop("step", None)
    if step is None:
        metrics.setdefault("epoch", trainer.current_epoch)
    return metrics, optimizer_batches(trainer) - 1 if step is None else int(step)


def gradient_scale(trainer: Trainer, optimizer: torch.optim.Optimizer) -> float:
    """What gradients are multiplied by, in float16, when `on_before_optimizer_step` is called; 1 if by nothing.

    Lightning divides before that hook, except for a fused optimiser, which does so itself, and whose mark is private.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    divides_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
    return scaler.get_scale() if scaler is not None and divides_itself else 1.0


def synchronises_batch_norm(trainer: Trainer) -> bool:
    """Whether BatchNorm's statistics are those of all devices. The strategy keeps `sync_batchnorm` nowhere else."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def trainer_of(module: LightningModule) -> Trainer | None:
    """The Trainer of a module, None if it has none, where `module.trainer` raises."""
    return module._trainer


def may_stop_early(trainer: Trainer) -> bool:
    """Whether `should_stop` would end the epoch where it stands: min_epochs and min_steps are behind."""
    return trainer.fit_loop._can_stop_early


def leave_signals_to_us(trainer: Trainer) -> None:
    """Do not let Lightning ask all ranks before every batch whether one got a SIGTERM.

    It asks on the device, and so waits for all that is queued there (its issue 21487).
    `simclr.cli.saving.SaveOnInterrupt` handles the signal and agrees between the hosts.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


@contextmanager
def children_watched_by(watch: Callable[[list[subprocess.Popen]], object]) -> Iterator[None]:
    """Within it the processes that Lightning launches are given to `watch`, not to Lightning's own observer.

    That one ends all by SIGKILL, itself too, and without a word.
    """
    observer = subprocess_script._launch_process_observer
    subprocess_script._launch_process_observer = watch
    try:
        yield
    finally:
        subprocess_script._launch_process_observer = observer


def wait_for_ranks(trainer: Trainer, limit: timedelta) -> bool:
    """How long a rank waits for the others; False where the strategy has no such limit. It takes one when built."""
    if not hasattr(trainer.strategy, "_timeout"):
        return False
    trainer.strategy._timeout = limit
    return True


def patience_of(trainer: Trainer) -> timedelta | None:
    """How long a rank waits for the others; None where the strategy has no such limit."""
    return getattr(trainer.strategy, "_timeout", None)


def count_last_batch(fit_loop: dict[str, Any]) -> None:
    """Count the batch during which a checkpoint was saved: Lightning counts it after its callbacks.

    Args:
        fit_loop: the state of Lightning's fit loop, as in a checkpoint; changed in place.
    """
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def as_saved_within_last_batch(fit_loop: dict[str, Any]) -> None:
    """Let a checkpoint saved before a batch tell what one tells that was saved at the end of the batch before.

    Lightning goes on from that one; of the other it counts the batch before twice.

    Args:
        fit_loop: the state of Lightning's fit loop, as in a checkpoint; changed in place.
    """
    for counter in (fit_loop["epoch_loop.batch_progress"][part] for part in ("total", "current")):
        counter["ready"] -= 1
        counter["completed"] -= 1
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
