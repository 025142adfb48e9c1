"""What a step costs and does, beside its loss: norms of gradients and weights, images per second, the wait for images.

Two kinds. What the run decides (`FIGURES`) is the same however often it is killed and continued, and goes wherever the
loss goes. What the machine decides (`MACHINE`: seconds, speed, memory) never is, and has a file of its own beside
`metrics.csv`, which so ends in the same bits.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from simclr.training.internals import gradient_scale, optimizer_batches

IMAGES_SEEN = "images_seen"
CHANCE = "loss_chance"
NORMS = ("gradient_norm", "encoder_gradient_norm", "head_gradient_norm", "weight_norm")
FIGURES = (IMAGES_SEEN, CHANCE, *NORMS)
MACHINE = ("images_per_second", "step_seconds", "data_wait", "epoch_seconds", "device_memory_gib")


class StepFigures(Callback):
    """Logs figures of the steps that are logged, in a row with their loss, for which alone it waits for the device.

    `images_seen`, of all devices, is a second axis beside the step. `loss_chance` is the loss where no image is told
    from another, log(2N - 1) for NT-Xent: a line to read the curve by. `gradient_norm`, of its two parts too, is the
    2-norm before clipping; `weight_norm` that of the weights that the step begins with.

    Since the row before, epochs' ends left out: `step_seconds`, from the end of one optimiser step to that of the next;
    `images_per_second`, of all devices; `data_wait`, the share of that time between two batches, spent waiting for
    images. `epoch_seconds` is what an epoch took until its last step; `device_memory_gib` the most that a GPU has held.
    The first step of a process pays for what is set up and is not timed.
    """

    def __init__(self) -> None:
        self._norms: dict[str, Tensor] = {}
        self._loss: object = None  # of the row before
        self._chance: float | None = None
        self._epoch_began: float | None = None
        self._ended: float | None = None  # the batch before, in this epoch
        self._warm = False
        self._done = 0  # batches of this epoch
        self._restart(0)

    def _restart(self, step: int) -> None:
        self._since = step  # optimiser steps
        self._batches, self._seconds, self._waited = 0, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the run's settings say."""
        self._chance = pl_module.objective(pl_module.hparams).chance
        self._parameters = parameters_of(pl_module)
        self._has_norms = type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)  # others divide the weights
        pl_module.step_log.collected = True
        self._warm, self._ended, self._epoch_began = False, None, None
        self._restart(trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock: a run continued in the middle of an epoch does not start that epoch."""
        self._epoch_began, self._ended = time.perf_counter(), None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The images are there."""
        now = time.perf_counter()
        if self._ended is not None:
            self._waited += now - self._ended
            self._seconds += now - self._ended
        self._ended = now

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The gradients are whole, and not clipped."""
        if self._has_norms and _is_logged(trainer):
            self._norms = norms(self._parameters, gradient_scale(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, in a step that is logged."""
        now = time.perf_counter()
        if self._ended is not None:
            self._seconds += now - self._ended
        self._ended, self._batches, self._done = now, self._batches + 1, batch_idx + 1
        if not self._warm:
            self._warm = True
            self._restart(trainer.global_step)
        if not _is_logged(trainer) or ((batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch):
            return
        loss = pl_module.step_log.logged
        values: dict[str, Any] = {} if loss is self._loss else dict(loss)
        self._loss = loss
        values |= {IMAGES_SEEN: _images_seen(trainer, pl_module, batch_idx + 1), **self._norms}
        if self._chance is not None:
            values[CHANCE] = self._chance
        self._norms = {}
        log_row(trainer, {**values, **self._machine(trainer, pl_module)})
        self._restart(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A method that trains again, without this, logs its loss itself."""
        pl_module.step_log.collected = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        pl_module.step_log.collected = False

    def _machine(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        steps, found = trainer.global_step - self._since, {}
        if steps > 0 and self._seconds > 0:
            found["step_seconds"] = self._seconds / steps
            found["images_per_second"] = self._batches * module.hparams.batch_size / self._seconds
            found["data_wait"] = self._waited / self._seconds
        if module.device.type == "cuda":
            found["device_memory_gib"] = torch.cuda.max_memory_allocated(module.device) / 2**30
        return found

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The second axis of what is measured once an epoch, and what the epoch took."""
        if trainer.barebones:
            return
        values: dict[str, Any] = {IMAGES_SEEN: _images_seen(trainer, pl_module, self._done)}
        if self._epoch_began is not None and self._ended is not None:
            values["epoch_seconds"] = self._ended - self._epoch_began
        # Of rank 0; without sync_dist Lightning would warn that the ranks might differ.
        pl_module.log_dict(values, rank_zero_only=True, sync_dist=True)


def log_row(trainer: Trainer, values: Mapping[str, Tensor | float]) -> None:
    """Give numbers of a step to every logger as one row, and to callbacks; waits for the device once.

    `LightningModule.log_dict` keeps an object for each number, through which it goes in every later step, and copies
    each from the device by itself: twenty numbers took four times what all else here takes.

    Args:
        trainer: in the last hooks of a batch that ends a step of the optimiser.
        values: by name, scalars; the same on every rank but for those that nothing may watch.
    """
    tensors = [name for name, value in values.items() if isinstance(value, Tensor)]
    of_device = [name for name in tensors if values[name].device.type != "cpu"]  # type: ignore[union-attr]
    numbers = {name: float(value) for name, value in values.items() if name not in of_device}
    if of_device:
        copied = torch.stack([values[name].detach().float() for name in of_device]).tolist()  # type: ignore[union-attr]
        numbers |= dict(zip(of_device, copied, strict=True))
    told = {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}
    trainer.callback_metrics.update(told)
    trainer.logged_metrics.update(told)
    row = {**numbers, "epoch": trainer.current_epoch}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=optimizer_batches(trainer))
        logger.save()


def parameters_of(module: LightningModule) -> list[tuple[str, torch.nn.Parameter]]:
    """A method's parameters, each with its part. They are listed once: it takes longer than the norms."""
    encoder = {id(p) for p in module.encoder.parameters()}
    return [("encoder" if id(p) in encoder else "head", p) for p in module.parameters()]


def norms(parameters: Sequence[tuple[str, torch.nn.Parameter]], scale: float = 1.0) -> dict[str, Tensor]:
    """The 2-norms of a method's gradients and weights, as scalars on their device.

    Args:
        parameters: see `parameters_of`; after the backward pass.
        scale: what the gradients are multiplied by.
    """
    trained = [p for _, p in parameters if p.requires_grad]
    having = [(part, p.grad) for part, p in parameters if p.requires_grad and p.grad is not None]
    found = {"weight_norm": _total(torch._foreach_norm([p.detach() for p in trained]))} if trained else {}
    if not having:
        return found
    each = torch._foreach_norm([gradient for _, gradient in having])
    parts: dict[str, list[Tensor]] = {"encoder": [], "head": []}
    for (part, _), norm in zip(having, each, strict=True):
        parts[part].append(norm)
    of_parts = {name: _total(part) / scale for name, part in parts.items() if part}
    found |= {f"{name}_gradient_norm": norm for name, norm in of_parts.items()}
    return found | {"gradient_norm": _total([*of_parts.values()])}


def _total(norms: Sequence[Tensor]) -> Tensor:
    """The norm of all numbers, of the norms of some each."""
    return torch.linalg.vector_norm(torch.stack(list(norms)))


def _is_logged(trainer: Trainer) -> bool:
    every = getattr(trainer, "log_every_n_steps", 0) or 0
    return every > 0 and (optimizer_batches(trainer) + 1) % every == 0


def _images_seen(trainer: Trainer, module: LightningModule, batches: int) -> Tensor:
    """Of the epochs before and of so many batches of this one; exact, where float32 ends at 16 million."""
    whole = trainer.current_epoch * trainer.num_training_batches
    return torch.tensor((whole + batches) * module.hparams.batch_size, dtype=torch.float64)
