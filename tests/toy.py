"""A second method of the parts that every method has: views agree, their dimensions differ (Zbontar et al. 2021)."""

import torch
from torch import nn

from simclr import SimCLRAugmentation, build_encoder
from simclr.inputs import InputTransform, attach_transform
from simclr.training.hooks import Pretraining
from simclr.training.method import Objective
from simclr.training.run import PretrainingRun
from simclr.training.settings import complete
from simclr.training.step_log import StepLog
from simclr.training.views import EpochViews


# fmt: off
class Toy(Pretraining):
    architecture = ("encoder", "image_size", "stem", "width", "projection_dim")

    def __init__(self, encoder: str = "resnet8", *, image_size: int = 32, stem: str = "auto", width: float = 1.0,
                 projection_dim: int = 16, balance: float = 0.01, optimizer: str = "adamw",
                 base_lr: float | None = None,
                 lr_scaling: str | None = None, weight_decay: float | None = None, momentum: float = 0.9,
                 warmup_epochs: float | None = None, batch_size: int | None = None, seed: int = 0, **augmentation):
        super().__init__()
        self.save_hyperparameters()
        self.augment = SimCLRAugmentation(image_size, **augmentation)
        complete(self.hparams, self.augment)
        self.encoder = build_encoder(encoder, image_size=image_size, stem=stem, width=width,
                                     channels=self.augment.channels)
        attach_transform(self.encoder, InputTransform(image_size, self.augment.mean, self.augment.std))
        self.head = nn.Sequential(nn.Linear(self.encoder.feature_dim, projection_dim), nn.BatchNorm1d(projection_dim))
        self.networks = self.encoder, self.head
        self.views, self.step_log = EpochViews(self.augment, self.hparams), StepLog()
        self.run = PretrainingRun(self.hparams)

    def training_step(self, batch, batch_idx):
        a, b = (self.head(self.encoder(view)) for view in self.views.make(*batch, self.current_epoch))
        off = a.T @ b / len(a) - torch.eye(a.shape[1], device=a.device)
        loss = off.diagonal().square().sum() + self.hparams.balance * off.square().sum()
        self.step_log.add(self, batch_idx, loss.detach())
        return loss

    @staticmethod
    def objective(settings):
        return Objective("toy", f"toy, balance {settings['balance']:g}", None)
