"""The smallest pretraining runs that still do everything: built-in images of 16 pixels, an 8-layer network."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer

from simclr.cli import quiet
from simclr.cli.saving import SaveOnInterrupt
from simclr.data import ImageData
from simclr.module import SimCLR

IMAGES, BATCH = 64, 16
STEPS = IMAGES // BATCH  # in an epoch


def tiny_model(**settings: Any) -> SimCLR:
    torch.manual_seed(0)
    small = {"encoder": "resnet8", "image_size": 16, "width": 0.25, "projection_dim": 16}
    return SimCLR(**{**small, "warmup_epochs": 1, "batch_size": BATCH, **settings})


def tiny_data(**settings: Any) -> ImageData:
    small = {"shapes_train": IMAGES, "shapes_test": 32, "batch_size": BATCH, "image_size": 16, "workers": 0}
    return ImageData(**{**small, **settings})


def flags(settings: dict[str, Any]) -> list[str]:
    """Command-line flags of a tiny run with these settings."""
    small = {"model.encoder": "resnet8", "model.image_size": 16, "model.width": 0.25, "model.projection_dim": 16}
    small |= {"model.warmup_epochs": 1, "data.shapes_train": IMAGES, "data.shapes_test": 32, "data.batch_size": BATCH}
    small |= {"trainer.accelerator": "cpu", "trainer.max_epochs": 2}
    small |= {"dashboard.every_n_epochs": 0}  # its pictures take as long as all the rest
    return [f"--{name}={value}" for name, value in {**small, **settings}.items()]


class Record(Callback):
    """What a run logs: loss and learning rate of every step, the mean loss of every epoch."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []
        self.epochs: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.steps.append({name: trainer.callback_metrics[name].item() for name in ("train_loss", "lr")})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(pl_module.step_log.mean())


class StopAt(SaveOnInterrupt):
    """Ctrl-C during a step: what the command line does then."""

    def __init__(self, run_dir: Path, step: int):
        super().__init__(run_dir)
        self.step = step

    def on_train_start(self, *args: Any) -> None:
        """Leave the test's signal handlers alone."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.asked |= trainer.global_step == self.step
        super().on_train_batch_end(trainer, *args)


def fit(
    root: Path,
    model: SimCLR | None = None,
    data: Any = None,
    callbacks: Iterable[Callback] = (),
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Trainer:
    """Train on the CPU without files; returns the trainer, whose `lightning_module` is trained."""
    quiet()
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    plain = {**dict.fromkeys(off, False), "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "max_epochs": 3}
    trainer = Trainer(**{**plain, **settings}, default_root_dir=root, callbacks=list(callbacks))
    data = data or tiny_data()
    batches = {"datamodule" if isinstance(data, LightningDataModule) else "train_dataloaders": data}
    trainer.fit(model or tiny_model(), **batches, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer
