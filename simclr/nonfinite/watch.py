"""Every step's loss and gradient are looked at before the optimiser takes it; on a GPU without waiting for it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from simclr import distributed
from simclr.data import TrainLoader
from simclr.files import say_unwritten
from simclr.intact import DIVERGED
from simclr.nonfinite.dump import PREFIX, add_pixels, new_dump, whole_batch, write_dump
from simclr.paths import expanded, shown
from simclr.torch_internals import non_finite
from simclr.training.method import DEFAULT_METHOD, name_of

OnNonFinite = Literal["stop", "skip"]
MOST_IN_A_ROW = 10  # skipped steps: more, or as many and 1 % of the run in all, stop it
METRIC = "skipped_steps"
_RESCALED = 30  # steps in a row, each of which halves the scale of fp16, from 2^16: by then it is not the scale
_NAMED = 3  # images and parameters in a message


class NonFiniteStep(FloatingPointError):
    """A step that was not taken, because its loss or its gradient is not finite; its text says where to look."""


@dataclass
class _Step:
    """A step of the optimiser, from its first batch on."""

    number: int  # optimiser steps before it
    epoch: int
    mean: tuple[Any, int]  # of the epoch's loss before it: sum and count
    buffers: list[Tensor]
    batches: list[tuple[int, Tensor, Tensor | None]] = field(default_factory=list)  # number, index, images
    losses: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)  # what this rank has differentiated
    reason: str = ""
    norms: Tensor | None = None  # (parameters,), where the gradients will be others by the time they are asked for
    numbers: Tensor | None = None  # (2,), later on the host: the loss, and what is finite where the gradient is
    copied: Any = None  # the event by which they are there


class FiniteSteps(Callback):
    """Stops a run, or skips the step, where loss or gradient are NaN or infinite.

    The gradient looked at is the whole one, of all ranks and accumulated batches, before it is clipped. A loss that is
    not finite on one rank makes the gradient so on all, by the sum over ranks that DDP takes anyway: all decide alike.

    A step that is skipped leaves weights, the optimiser's state and the statistics of normalisation as they were, bit
    for bit. It counts as a step: the learning rate and the order of the images go on. More than ten in a row, or more
    than ten and 1 % of the run, stop it.

    On CUDA `stop` does not wait for the device: it looks at a step's numbers one step later, when they have long been
    copied, and keeps a copy of the weights until then. `skip` waits for the gradient of each step. The steps that the
    scaler of fp16 passes over while it looks for a scale are no error, unless it finds none.

    Args:
        run_dir: where the first such step is written down, for `simclr replay`; None for nowhere.
        on_nonfinite: stop or skip.
        say: takes a sentence.

    Attributes:
        skipped: steps that this run has skipped, before it was continued too.
        dump: what was written.
    """

    def __init__(
        self,
        run_dir: Path | None = None,
        on_nonfinite: OnNonFinite = "stop",
        say: Callable[[Trainer, str], None] | None = None,
    ):
        if on_nonfinite not in get_args(OnNonFinite):
            raise ValueError(f"on_nonfinite={on_nonfinite} is none of {', '.join(get_args(OnNonFinite))}.")
        self.run_dir, self.on_nonfinite = run_dir, on_nonfinite
        self.say = say or (lambda trainer, text: print(text, flush=True))
        self.skipped = self.in_a_row = 0
        self.dump: Path | None = None
        self._rescaled = 0
        self._now: _Step | None = None
        self._waiting: _Step | None = None  # whose numbers are on their way from the device
        self._weights: list[Tensor] = []  # before the step that waits
        self._buffers: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._said = False

    def check(self, trainer: Trainer) -> None:
        """Refuse to skip steps where each device holds a part of the gradient.

        Raises:
            ValueError: with what to use.
        """
        if self.on_nonfinite == "skip" and type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
            raise ValueError(
                f"on_nonfinite=skip is for one device and for DDP, not for {type(trainer.strategy).__name__}. "
                "Use --trainer.strategy ddp, or --on_nonfinite stop."
            )

    # Lightning's hooks, in the order of a step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on nobody else need look."""
        self.check(trainer)
        pl_module.step_log.watched = True
        self._now = self._waiting = None
        self._late = pl_module.device.type == "cuda" and self.on_nonfinite == "stop"
        self._names = {parameter: name for name, parameter in pl_module.named_parameters()}
        buffers = [buffer for buffer in pl_module.buffers() if buffer.is_floating_point()]
        counters = [buffer for buffer in pl_module.buffers() if not buffer.is_floating_point()]
        self._kept = [*buffers, *counters]
        # Two, in turn: a step's numbers may be looked at when the next one has begun.
        self._buffers = tuple([torch.empty_like(buffer) for buffer in self._kept] for _ in range(2))  # type: ignore[assignment]
        self._weights = [torch.empty_like(weight) for weight in self._names] if self._late else []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what a step begins with."""
        log = pl_module.step_log
        log.reason = ""
        if self._now is None or batch_idx % trainer.accumulate_grad_batches == 0:
            mean = (log.epoch_loss, log.epoch_steps) if batch_idx else (0.0, 0)
            number = trainer.global_step
            kept = self._buffers[number % 2]
            if kept:
                torch._foreach_copy_(kept, self._kept)
            self._now = _Step(number, trainer.current_epoch, mean, kept)
        images, index = batch
        again = isinstance(trainer.train_dataloader, TrainLoader)  # gives the pixels of an index at any time
        self._now.batches.append((batch_idx, index, None if again else images))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let a loss that is not finite on this rank reach all."""
        if self._now is None:
            return
        own, log = loss.detach(), pl_module.step_log
        self._now.losses.append(own if log.loss is None else log.loss)
        self._now.own.append(own)
        self._now.reason = self._now.reason or log.reason
        if trainer.world_size > 1 and loss.requires_grad:
            loss.register_hook(lambda gradient: torch.where(own.isfinite(), gradient, torch.nan))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the loss and the gradient of the step, or, on a GPU, of the step before.

        Raises:
            NonFiniteStep: on all ranks, if they are not finite and the step is not to be skipped.
        """
        self._settle(trainer, pl_module)
        now = self._now
        if now is None or not now.losses:
            return
        weights = [weight for weight in self._names if weight.grad is not None]
        loss = now.losses[0] if len(now.losses) == 1 else torch.stack(now.losses).sum()
        whole = type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)  # else each device has a part of it
        if not weights:
            gradient = loss.new_zeros(())
        elif self._late or not whole:
            now.norms = norms_of(weights)
            gradient = now.norms.sum()
        else:
            gradient = non_finite([weight.grad for weight in weights if weight.grad is not None])
        now.numbers = torch.stack((loss.to(gradient.dtype), gradient))
        if not whole:
            now.numbers = distributed.max_over_ranks(now.numbers.where(now.numbers.isfinite(), torch.inf))
        if not self._late:
            self._judge(trainer, pl_module, now, weights)
            return
        torch._foreach_copy_(self._weights, list(self._names))
        now.numbers, now.copied = send_to_host(now.numbers)
        self._waiting = now

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No epoch ends with a step that was not looked at."""
        self._settle(trainer, pl_module)
        if self.on_nonfinite == "skip" and not trainer.barebones:
            # The ranks agree; without sync_dist Lightning would warn that they might not.
            pl_module.log(METRIC, float(self.skipped), rank_zero_only=True, sync_dist=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Nor is one saved."""
        self._settle(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A method that raises by itself of what is not finite: write its step down too."""
        known = isinstance(exception, FloatingPointError) and not isinstance(exception, NonFiniteStep)
        if known and self._now is not None and self._now.batches:
            self._now.reason = str(exception)
            self._write(trainer, pl_module, self._now, None, {})

    def state_dict(self) -> dict[str, Any]:
        """The counts, if there is anything to count."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row} if self.skipped else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    # What follows from the numbers

    def _settle(self, trainer: Trainer, module: LightningModule) -> None:
        """Look at the step that waits. By now the device has its next one, and does not stand still meanwhile."""
        if self._waiting is not None:
            step, self._waiting = self._waiting, None
            step.copied.synchronize()
            self._judge(trainer, module, step, list(self._names))

    def _judge(self, trainer: Trainer, module: LightningModule, step: _Step, weights: list[Tensor]) -> None:
        assert step.numbers is not None  # looked at
        loss, gradient = step.numbers.tolist()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if math.isfinite(loss) and math.isfinite(gradient):
            self._rescaled = self.in_a_row = 0
            return
        if scaler is not None and math.isfinite(loss) and self._rescaled < _RESCALED:
            self._rescaled += 1  # the scaler passes over the step, and halves its scale
            return
        gradients = self._gradients(step, weights)
        rank = self._rank(step)
        what = self._what(trainer, step, rank, loss, gradients)
        place = self._write(trainer, module, step, rank, gradients)
        if self.on_nonfinite == "stop":
            raise NonFiniteStep(f"{what}. {DIVERGED}{place}")
        self._skip(trainer, module, step, weights, scaler)
        total = module.run.total_steps or 0
        if self.in_a_row > MOST_IN_A_ROW or self.skipped > max(MOST_IN_A_ROW, total // 100):
            count = f"{self.in_a_row} steps in a row" if self.in_a_row > MOST_IN_A_ROW else f"{self.skipped} steps"
            raise NonFiniteStep(f"{what}, as in {count}: too many to skip. {DIVERGED}{place}")
        if not self._said and trainer.is_global_zero:
            self.say(trainer, f"warning: {what}: the step is skipped, later ones are counted ({METRIC}).{place}")
        self._said = True

    def _skip(self, trainer: Trainer, module: LightningModule, step: _Step, weights: list[Tensor], scaler: Any) -> None:
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if scaler is None:  # which passes over the step by itself, and needs the gradients for it
            for weight in weights:
                weight.grad = None  # no optimiser touches such a weight, nor what it keeps of it
        if step.buffers:
            torch._foreach_copy_(self._kept, step.buffers)
        module.step_log.epoch_loss, module.step_log.epoch_steps = step.mean

    def _gradients(self, step: _Step, weights: list[Tensor]) -> dict[str, float]:
        """By parameter, the sum of absolute values."""
        values = (norms_of(weights) if step.norms is None else step.norms).tolist()
        return dict(zip((self._names[weight] for weight in weights), values, strict=False))

    def _rank(self, step: _Step) -> int | None:
        """Where it began; None where it is not known, or everywhere."""
        own = bool(step.reason) and not step.reason.startswith("rank ")
        ruined = any(not loss.isfinite() for loss in step.own)
        told = [2 * by_loss + by_value for by_loss, by_value in distributed.exchange([own, ruined])]
        ranks = [rank for rank, value in enumerate(told) if value == max(told)]
        return ranks[0] if max(told) and len(ranks) < len(told) else None

    def _what(
        self, trainer: Trainer, step: _Step, rank: int | None, loss: float, gradients: Mapping[str, float]
    ) -> str:
        """What is not finite, where, and in which images."""
        ruined = [name for name, value in gradients.items() if not math.isfinite(value)]
        where = f"at step {step.number}, epoch {step.epoch + 1}"
        where += f", rank {rank}" if rank is not None and trainer.world_size > 1 else ""
        why = step.reason.rstrip(".")
        if math.isfinite(loss):
            what = f"the gradient is not finite {where} (of {_some(ruined)}; the loss is {loss:g})"
        else:
            of = f"of {_some(ruined)}" if len(ruined) < len(gradients) else "of all parameters"
            what = f"the loss is {loss} {where}{why and f': {why}'}"
            what += f"; not finite either is the gradient {of}" if ruined else ""
        return f"{what}; the batch: {_some(self._images(trainer, step, rank))}"

    def _images(self, trainer: Trainer, step: _Step, rank: int | None) -> list[str]:
        """Those of the step, of one rank if it is known to be that one's; of a batch whose loss is not finite first."""
        ruined = [not loss.isfinite() for loss in step.losses]
        found = []
        for (number, index, images), bad in zip(step.batches, ruined, strict=False):
            if any(ruined) and not bad:
                continue
            batch = whole_batch(trainer, number, index, images)
            places = range(len(batch.index))
            if rank is not None and len(batch.index) > batch.share:
                places = range(rank * batch.share, (rank + 1) * batch.share)
            found += [shown(batch.name(place)) if batch.names else batch.name(place) for place in places]
        return found

    def _write(
        self,
        trainer: Trainer,
        module: LightningModule,
        step: _Step,
        rank: int | None,
        gradients: dict[str, float],
    ) -> str:
        """Write the first such step down; what to type to look at it."""
        if self.run_dir is None:
            return ""
        first = self.dump is None
        path = self.dump = self.dump or expanded(self.run_dir) / f"{PREFIX}{step.number}.pt"
        if first and trainer.is_global_zero:
            batches = [whole_batch(trainer, *batch) for batch in step.batches]
            for batch, loss in zip(batches, step.losses, strict=False):
                batch.loss = float(loss)
            add_pixels(trainer, batches)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            dump = new_dump(
                trainer,
                module,
                self._before(module, step),
                batches,
                step=step.number,
                epoch=step.epoch,
                rank=rank,
                found={"loss": [batch.loss for batch in batches], "gradients": gradients, "reason": step.reason},
                scale=None if scaler is None else scaler.get_scale(),
            )
            try:
                write_dump(path, dump)
            except OSError as error:
                say_unwritten(path, error, "the step cannot be replayed")
        if first and gradients:  # all ranks are here; one that ends early would have the launcher end the others
            distributed.exchange([0])
        own = "" if (name := name_of(module)) == DEFAULT_METHOD else f" --method {name}"
        return f" Look at it: simclr replay {path}{own}"

    def _before(self, module: LightningModule, step: _Step) -> dict[str, Tensor]:
        """The module's state before the step."""
        state = dict(module.state_dict())
        names = {id(buffer): name for name, buffer in module.named_buffers()}
        state |= {
            names[id(b)]: kept for b, kept in zip(self._kept, step.buffers, strict=False) if names[id(b)] in state
        }
        if self._weights:
            state |= {n: kept for n, kept in zip(self._names.values(), self._weights, strict=True) if n in state}
        return state


def norms_of(weights: Sequence[Tensor]) -> Tensor:
    """Of each weight, the sum of the absolute values of its gradient: not finite where one of them is not."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    dtype = torch.float32 if gradients[0].dtype.itemsize < 4 else None
    return torch.stack(torch._foreach_norm(gradients, 1, dtype=dtype))


def send_to_host(numbers: Tensor) -> tuple[Tensor, Any]:
    """Numbers of a CUDA device on their way to the host, and the event by which they are there."""
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
