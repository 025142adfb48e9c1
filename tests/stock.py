"""What a run is made of without this project's parts: torch's DataLoader, Lightning's ModelCheckpoint, random views.

All that Lightning's documentation says of a run that can be repeated and continued is done.
"""

import os
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from simclr.cli import quiet
from simclr.encoders import build_encoder
from tiny import BATCH, IMAGES


class Stock(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = build_encoder("resnet8", image_size=16, width=0.25)
        self.head = nn.Linear(self.encoder.feature_dim, 16)

    def training_step(self, batch, batch_idx):
        (images,) = batch
        views = torch.cat([images + 0.1 * torch.randn_like(images) for _ in range(2)])
        z = F.normalize(self.head(self.encoder(views)))
        logits = z @ z.T / 0.2 - 1e9 * torch.eye(len(z))
        return F.cross_entropy(logits, torch.arange(len(z)).roll(len(images)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(arguments: list[str]) -> None:
    """Train: --run_dir=FOLDER --trainer.max_epochs=N; goes on from the checkpoint of the last epoch."""
    given = dict(word.removeprefix("--").split("=") for word in arguments)
    quiet()
    seed_everything(0, workers=True)
    images = torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    keeps = ModelCheckpoint(
        dirpath=Path(given["run_dir"]) / "checkpoints",
        save_last=True,
        enable_version_counter=False,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=int(given["trainer.max_epochs"]),
        default_root_dir=given["run_dir"],
        callbacks=[keeps],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        deterministic=True,
    )
    last = Path(keeps.dirpath) / "last.ckpt"
    loader = DataLoader(TensorDataset(images), BATCH, shuffle=True)
    trainer.fit(Stock(), loader, ckpt_path=last if os.path.exists(last) else None, weights_only=False)
