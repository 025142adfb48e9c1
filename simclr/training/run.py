"""How a method is trained: rates and schedule settled, refused where they do not go together, saved and taken up again.

Lightning's hooks of a method hand over to this object; each says which.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from simclr import distributed
from simclr.checkpoint import refuse_unfit, settle_progress
from simclr.continuation import (
    end_shorter_epoch,
    model_changes,
    planned_steps,
    refuse_changes,
    trainer_changes,
    trainer_settings,
)
from simclr.inputs import attach_transform
from simclr.intact import count_tensors, not_finite, refuse_ruined, unfit_to_continue
from simclr.optim import build_optimizer, default_rates, default_warmup, scale_lr, warmup_cosine
from simclr.seeding import ORDER_VERSION
from simclr.starting_weights import StartingWeights, read_starting_weights
from simclr.torch_internals import BatchNorm
from simclr.training.internals import synchronises_batch_norm, trainer_of
from simclr.training.method import record_of
from simclr.training.network import replays_graphs

# Settings that a run has once it begins.
_SETTLED = ("base_lr", "lr_scaling", "weight_decay", "warmup_epochs", "batch_size", "compile_encoder")
_ABSENT = {"channels": 3}  # what a method has that does not say
_RATES = {"model.base_lr", "model.lr_scaling", "model.weight_decay", "model.momentum"}
_SMALL_GROUP = 64  # views; batch statistics of fewer are noisy


class PretrainingRun:
    """The optimisation of one method over one run.

    Args:
        settings: the method's hyper-parameters. What of the optimisation is None is settled, once, as the run begins.

    Attributes:
        total_steps: the length of the run, which the learning rate goes by; None before `configure_optimizers`.
        on_purpose: settings, by their full names, that a continued run is meant to change, though they decide what is
            learned.
        starting: the weights of the settings, where they have been read before the run begins; not kept once it has.
        began_with: of a run that began with given weights, what a checkpoint keeps of them; else None.
    """

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.total_steps: int | None = None
        self.on_purpose: frozenset[str] = frozenset()
        self.starting: StartingWeights | None = None
        self.began_with: dict[str, Any] | None = None
        self._left_out = [name for name in _SETTLED if name in settings and settings[name] is None]
        self._continued: dict[str, Any] | None = None  # from where: see `simclr.checkpoint.Checkpoint.run`

    def adopt(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives what was left out the values that a run has which is continued.

        Args:
            checkpoint: the settings of its method.
        """
        for name in self._left_out:
            if checkpoint.get(name) is not None:
                self.settings[name] = checkpoint[name]

    def settle(self, batch_size: int | None, epochs: float | None = None) -> None:
        """Gives what was left out the values that it has in this run.

        Args:
            batch_size: the global batch of the data; None where they do not tell.
            epochs: the length of the run; None where it is not known yet.
        Raises:
            ValueError: if neither the method nor the data tell the batch.
        """
        settings = self.settings
        if settings.get("batch_size") is None:
            settings["batch_size"] = batch_size
        if settings["batch_size"] is None:
            raise ValueError("batch_size, the global batch, is needed with a loader that does not tell it.")
        for name, value in default_rates(settings["optimizer"], settings.get("base_lr"))._asdict().items():
            settings[name] = value if settings.get(name) is None else settings[name]
        if settings.get("warmup_epochs") is None and epochs is not None:
            settings["warmup_epochs"] = default_warmup(epochs)

    def setup(self, module: LightningModule) -> None:
        """In `setup`: settle what was left out, and refuse a data module of another batch or image size."""
        trainer = module.trainer
        given = {name: getattr(trainer.datamodule, name, None) for name in ("batch_size", "image_size", "channels")}
        differ = [
            f"{type(module).__name__} has {name}={self.settings.get(name, _ABSENT.get(name))}, the data module {value}"
            for name, value in given.items()
            if isinstance(value, int) and self.settings.get(name, _ABSENT.get(name)) not in (None, value)
        ]
        if differ:
            raise ValueError(f"{'; '.join(differ)}. Give both the same.")
        epochs = trainer.max_epochs
        whole = epochs is not None and epochs > 0 and trainer.max_steps < 0
        batch = given["batch_size"]
        self.settle(batch if isinstance(batch, int) else None, epochs if whole else None)
        given = {name: getattr(trainer.datamodule, name, None) for name in ("load_size", "sixteen_bit_max", "bits")}
        of_data = {"load_size": None} | {name: value for name, value in given.items() if value is not None}
        attach_transform(module.encoder, replace(module.encoder.transform, **of_data))
        self.check(trainer)
        group, views = self.batch_norm_group(module, trainer), self.settings.get("views", 2)
        few = group is not None and group < min(_SMALL_GROUP, views * self.settings["batch_size"])
        if few and self.settings.get("micro_batch_size") is not None:
            rank_zero_warn(
                f"BatchNorm's statistics are those of a micro-batch, only {group} views. The gradient is exact for "
                "that network; a larger model.micro_batch_size trains one nearer to the whole batch's."
            )

    def batch_norm_group(self, module: nn.Module, trainer: Trainer) -> int | None:
        """How many views share BatchNorm's statistics, small crops apart; None for a network without."""
        if not any(isinstance(part, BatchNorm) for part in module.modules()):
            return None
        images = self.settings.get("micro_batch_size") or self.settings["batch_size"] // trainer.world_size
        devices = trainer.world_size if synchronises_batch_norm(trainer) else 1
        return self.settings.get("views", 2) * images * devices

    def check(self, trainer: Trainer) -> None:
        """Refuse micro-batches that do not divide, and strategies that do not go with them or with CUDA graphs.

        Raises:
            ValueError: with what to use.
        """
        if replays_graphs(self.settings) and type(trainer.strategy) is not SingleDeviceStrategy:
            raise ValueError(
                f"model.compile_encoder={self.settings['compile_encoder']} is for one device, not for "
                f"{type(trainer.strategy).__name__}: CUDA graphs do not hold what devices exchange, gradients and the "
                "statistics of synchronised BatchNorm. Use --model.compile_encoder true, or --trainer.devices 1."
            )
        size, share = self.settings.get("micro_batch_size"), self.settings["batch_size"] // trainer.world_size
        if size is None:
            return
        if share % size:
            divisors = [n for n in range(1, share + 1) if share % n == 0]
            near = [n for n in divisors if n < size][-1:] + [n for n in divisors if n > size][:1]
            where = f" on each of {trainer.world_size} devices" if trainer.world_size > 1 else " of a batch"
            raise ValueError(
                f"model.micro_batch_size={size} does not divide the {share} images{where}. "
                f"Use a divisor, for example {' or '.join(map(str, near))}."
            )
        if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
            raise ValueError(
                f"model.micro_batch_size is for one device and for DDP, not for {type(trainer.strategy).__name__}. "
                "Use --trainer.strategy ddp, or leave it out."
            )

    def read_weights(self, module: LightningModule) -> None:
        """Read the weights that the settings let the encoder begin with, if they do, for `configure_optimizers`.

        Raises:
            FileNotFoundError, ValueError: if they do not serve.
        """
        if self.settings.get("weights") is not None:
            prefix = self.settings.get("weights_prefix")
            self.starting = read_starting_weights(self.settings["weights"], module.encoder, self.settings, prefix)

    def _begin(self, module: LightningModule) -> None:
        # Not in `setup`: there Lightning does not tell yet whether the run goes on from a checkpoint, and one that does
        # needs no weights to begin with.
        if self.began_with is not None or module.trainer.ckpt_path is not None:
            return
        if self.starting is None:
            self.read_weights(module)
        if self.starting is not None:
            module.encoder.load_state_dict(self.starting.weights)
            self.began_with, self.starting = self.starting.record, None

    def configure_optimizers(self, module: LightningModule) -> dict[str, Any]:
        """In `configure_optimizers`: weights to begin with, the optimiser, and warm-up and cosine by the step."""
        settings, trainer = self.settings, module.trainer
        self._begin(module)
        optimizer = self._optimizer(module)
        total_steps = trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError("a cosine needs an end: set trainer.max_epochs or trainer.max_steps.")
        trainer.fit_loop.setup_data()  # where max_steps alone ends the run, the batches are not counted yet
        self.total_steps = total_steps
        steps_per_epoch = _steps_per_epoch(trainer)
        if settings["warmup_epochs"] is None:
            settings["warmup_epochs"] = default_warmup(total_steps / steps_per_epoch)
        warmup_steps = round(settings["warmup_epochs"] * steps_per_epoch)

        def factor(step: int) -> float:
            assert self.total_steps is not None  # set above; `start` may set another length
            return warmup_cosine(step, warmup_steps, self.total_steps)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _optimizer(self, module: LightningModule) -> torch.optim.Optimizer:
        settings = self.settings
        return build_optimizer(
            settings["optimizer"],
            module,
            lr=scale_lr(settings["base_lr"], settings["batch_size"], settings["lr_scaling"]),
            weight_decay=settings["weight_decay"],
            momentum=settings["momentum"],
            fused=not module.trainer.gradient_clip_val and module.device.type in ("cpu", "cuda"),
        )

    def _change_rates(self, module: LightningModule, schedule: Any) -> None:
        """Rates that are changed on purpose, in place of those that came with the optimiser's state."""
        for group, fresh in zip(schedule.optimizer.param_groups, self._optimizer(module).param_groups, strict=True):
            group.update({name: value for name, value in fresh.items() if name != "params"}, initial_lr=fresh["lr"])
        schedule.base_lrs = [group["initial_lr"] for group in schedule.optimizer.param_groups]

    def start(self, module: LightningModule) -> None:
        """In `on_train_start`: the first step's learning rate is the schedule's, whatever length was planned before."""
        trainer, schedule = module.trainer, module.lr_schedulers()
        run, self._continued = self._continued, None
        if self.total_steps is None or schedule is None:  # another optimiser than `configure_optimizers` gives
            return
        if run is not None:
            lengths = trainer.max_epochs, trainer.max_steps
            self.total_steps = planned_steps(run, trainer.global_step, _steps_per_epoch(trainer), *lengths)
        if run is not None and self.on_purpose & _RATES:
            self._change_rates(module, schedule)
        for group, lr in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = lr * schedule.lr_lambdas[0](schedule.last_epoch)

    def save(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """In `on_save_checkpoint`: adds where the run stands, how long it is, and what of its Trainer decides its bits.

        And the loss so far: a run continued in the middle of an epoch reports the mean of the whole epoch.

        Raises:
            FloatingPointError: on every rank, if weights are not finite: they would take the place of good ones.
        """
        log, trainer = module.step_log, module.trainer
        ruined = not_finite(module, checkpoint.get("optimizer_states", ()))
        if any(on_rank for [on_rank] in distributed.exchange([bool(ruined)])):
            refuse_ruined(ruined or [""], trainer.global_step)
        checkpoint["method"] = record_of(module, self.settings)
        if self.began_with is not None:
            checkpoint["method"]["starting_weights"] = self.began_with
        checkpoint["epoch_loss"] = [float(log.epoch_loss), float(log.epoch_steps)]
        epochs, batches = settle_progress(checkpoint["loops"]["fit_loop"], trainer.num_training_batches)
        checkpoint["run"] = {}
        if self.total_steps is None:  # not the schedule of `configure_optimizers`
            return
        checkpoint["run"] = {
            "epochs": epochs,
            "steps_inside": batches // trainer.accumulate_grad_batches,
            "total_steps": self.total_steps,
            "steps_per_epoch": _steps_per_epoch(trainer),
            "order": ORDER_VERSION,
            "optimizer_tensors": count_tensors(checkpoint.get("optimizer_states", [])),
            **trainer_settings(trainer, module),
        }

    def load(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """In `on_load_checkpoint`: refuses to train on with a setting that decides what is learned and differs.

        A checkpoint that another tool wrote need not have what `save` adds.
        """
        log, trainer = module.step_log, trainer_of(module)
        if trainer is not None and trainer.training:
            refuse_unfit(unfit_to_continue(checkpoint), trainer.ckpt_path)
        log.epoch_loss, steps = checkpoint.get("epoch_loss", (0.0, 0.0))
        log.epoch_steps = int(steps)
        self.began_with = checkpoint.get("method", {}).get("starting_weights")
        if trainer is None or not trainer.training:  # only its weights are wanted
            return
        end_shorter_epoch(checkpoint, trainer)
        self._continued = checkpoint.get("run")
        self.adopt(checkpoint["hyper_parameters"])
        changes = model_changes(self.settings, checkpoint["hyper_parameters"])
        changes |= trainer_changes(trainer_settings(trainer, module), self._continued or {})
        refuse_changes(changes, "the checkpoint", self.on_purpose)


def _steps_per_epoch(trainer: Trainer) -> int:
    # Lightning also steps at the end of an epoch, with the batches that are left over.
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def to_device(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """A training batch's images on the device; their numbers stay on the CPU, where the views' parameters are drawn."""
    images, index = batch
    # Numbers copied back from a device would wait, every step, for all that is queued on it.
    # Not by Lightning's search through nested batches, which takes longer than a step's images may.
    return images.to(device, non_blocking=device.type == "cuda"), index.cpu()
