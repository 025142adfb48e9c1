"""SimCLR (Chen et al. 2020): two views of each image, encoded, projected, and told apart from all others."""

import inspect
import warnings
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from simclr import distributed
from simclr.augment import SimCLRAugmentation
from simclr.encoders import Norm, Shortcut, Stem, build_encoder
from simclr.heads import ProjectionHead
from simclr.losses import nt_xent
from simclr.optim import LrScaling, OptimizerName, build_optimizer, scale_lr, warmup_cosine


class SimCLR(LightningModule):
    """Pretrains an encoder f by contrasting two views of each image through a projection head g.

    A batch is `(images, index)`: images (n, 3, H, W), uint8 or float in [0, 1], and their numbers in the data set,
    (n,); n is this rank's share of the global batch. Views are made on the training device, outside autocast, as a pure
    function of (seed, epoch, index, view). What training leaves behind is `encoder`; the head is thrown away.

    Args:
        encoder: a name that `build_encoder` knows: resnet18 ... resnet152, resnet8 ... resnet110 (CIFAR), or any
            torchvision or timm model.
        image_size: side of a view, in pixels.
        stem: `small` (3x3, stride 1), `small_stride2`, `imagenet` (7x7, stride 2, max-pool), or `auto` by image_size.
        width: multiplies every channel of a ResNet.
        shortcut: of a ResNet: A (zero padding), B (projection where dimensions grow), C (all projections) or none.
        zero_init: start each residual block as the identity (its last BN scale at zero).
        norm: `batch`, or `none` for a ResNet without normalisation.
        head: the projection head: identity, linear, nonlinear (one hidden layer) or deep (head_layers layers).
        hidden_dim: width of the head's hidden layers; the encoder's feature_dim if not given.
        projection_dim: size of a projection z.
        head_layers: layers of a deep head.
        head_batch_norm: batch normalisation in the head, as in google-research/simclr.
        temperature: tau > 0 of NT-Xent.
        optimizer: lars, sgd (Nesterov) or adamw. Biases and normalisation neither decay nor take LARS's trust ratio.
        base_lr: learning rate before scaling: per 256 images for lr_scaling=linear, per image for sqrt.
        lr_scaling: linear: base_lr x batch_size / 256; sqrt: base_lr x sqrt(batch_size); none: base_lr.
        weight_decay: L2 for lars and sgd, decoupled for adamw.
        momentum: of lars and sgd.
        warmup_epochs: epochs of linear warm-up, by the step; half a cosine to zero follows.
        batch_size: the global batch, which lr_scaling goes by. On the command line it comes from data.batch_size.
        channels_last: memory layout of images and convolutions: faster on most devices, the same numbers up to
            rounding.
        seed: of the views. On the command line it comes from seed_everything.
        **augmentation: settings of SimCLRAugmentation: strength, crop_scale, flip_prob, blur_prob, mean, std ...
    Raises:
        ValueError: for a setting out of its range, by its name.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        *,
        image_size: int = 32,
        stem: Stem = "auto",
        width: float = 1.0,
        shortcut: Shortcut = "B",
        zero_init: bool = True,
        norm: Norm = "batch",
        head: Literal["identity", "linear", "nonlinear", "deep"] = "nonlinear",
        hidden_dim: int | None = None,
        projection_dim: int = 128,
        head_layers: int = 3,
        head_batch_norm: bool | Literal["hidden"] = True,
        temperature: float = 0.2,
        optimizer: OptimizerName = "lars",
        base_lr: float = 1.0,
        lr_scaling: LrScaling = "linear",
        weight_decay: float = 1e-4,
        momentum: float = 0.9,
        warmup_epochs: float = 10,
        batch_size: int = 256,
        channels_last: bool = True,
        seed: int = 0,
        **augmentation: Any,
    ):
        super().__init__()
        positive = {"temperature": temperature, "base_lr": base_lr, "batch_size": batch_size}
        not_negative = {"weight_decay": weight_decay, "warmup_epochs": warmup_epochs}
        problems = [f"{name}={value} is not positive" for name, value in positive.items() if not value > 0]
        problems += [f"{name}={value} is negative" for name, value in not_negative.items() if not value >= 0]
        if not 0 <= momentum < 1:
            problems.append(f"momentum={momentum} is not in [0, 1)")
        if problems:
            raise ValueError(f"{'; '.join(problems)}.")
        self.augment = SimCLRAugmentation(image_size, **augmentation)
        self.save_hyperparameters()
        # A checkpoint states every setting, also those left at their defaults, in plain types that any tool can read.
        settings = inspect.signature(SimCLRAugmentation).bind(image_size, **augmentation)
        settings.apply_defaults()
        self.hparams.update(settings.arguments)
        self.hparams.update({k: list(v) for k, v in self.hparams.items() if isinstance(v, tuple)})
        self.encoder = build_encoder(
            encoder,
            image_size=image_size,
            stem=stem,
            width=width,
            shortcut=shortcut,
            zero_init=zero_init,
            norm=norm,
        )
        # What measures the encoder while it learns feeds it as `load_encoder`'s users do.
        self.encoder.image_size = image_size
        self.encoder.mean, self.encoder.std = self.augment.mean, self.augment.std
        self.head = ProjectionHead(
            self.encoder.feature_dim,
            kind=head,
            hidden_dim=hidden_dim,
            projection_dim=projection_dim,
            layers=head_layers,
            batch_norm=head_batch_norm,
        )
        if channels_last:
            self.encoder.to(memory_format=torch.channels_last)
        # Equal on all ranks already; NaN is looked for in `_log`.
        self.epoch_loss = MeanMetric(nan_strategy="disable", sync_on_compute=False)

    def setup(self, stage: str) -> None:
        """Refuse a data module whose batch is not the one that the learning rate goes by."""
        # Overridden on purpose, for every loader.
        message = "You have overridden `transfer_batch_to_device` in `LightningModule`"
        warnings.filterwarnings("ignore", message=message)
        given = getattr(self.trainer.datamodule, "batch_size", self.hparams.batch_size)
        if given != self.hparams.batch_size:
            raise ValueError(
                f"SimCLR has batch_size={self.hparams.batch_size}, the data module {given}. Give both the same."
            )

    def forward(self, images: Tensor) -> Tensor:
        """The representation h of normalised images: (n, 3, H, W) -> (n, feature_dim)."""
        return self.encoder(images)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a training batch's images; their numbers stay on the CPU, where the views' parameters are drawn."""
        if not self.trainer.training:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        images, index = batch
        # Numbers copied back from a device would wait, every step, for all that is queued on it.
        return super().transfer_batch_to_device(images, device, dataloader_idx), index.cpu()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turns a training batch on the device into its two views. Lightning calls this outside autocast."""
        if not self.trainer.training:
            return batch
        images, index = batch
        if self.trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0 and len(index.unique()) < len(index):
            raise ValueError(
                "a batch is (images, index) with the images' numbers in the data set, but numbers repeat in the first "
                "batch. Are they labels? simclr.data.ImageData yields what is needed."
            )
        return self.augment(images, index, epoch=self.current_epoch, seed=self.hparams.seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """NT-Xent of a batch of views, (n, 3, H, W) each."""
        views = torch.cat(batch)  # both views in one forward, so that they share BN statistics
        # Views are float32; under Lightning's bf16-true, 16-true and 64-true the weights are not.
        views = views.to(next(self.encoder.parameters()).dtype)
        if self.hparams.channels_last:
            views = views.contiguous(memory_format=torch.channels_last)
        z1, z2 = self.head(self.encoder(views)).chunk(2)
        loss = nt_xent(z1, z2, self.hparams.temperature)
        self._log(loss, first=batch_idx == 0)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A run continued in the middle of an epoch reports the mean loss of the whole epoch."""
        checkpoint["epoch_loss"] = [self.epoch_loss.mean_value.item(), self.epoch_loss.weight.item()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `on_save_checkpoint`; a checkpoint that another tool wrote need not have it."""
        if "epoch_loss" in checkpoint:
            mean_value, weight = checkpoint["epoch_loss"]
            self.epoch_loss.mean_value.fill_(mean_value)
            self.epoch_loss.weight.fill_(weight)

    def _log(self, loss: Tensor, first: bool) -> None:
        loss = distributed.mean_over_ranks(loss)  # the loss of the global batch
        # A look at the value waits for the device: only where it is logged in any case, and once at the end.
        step = self.trainer.global_step
        if (step % self.trainer.log_every_n_steps == 0 or self.trainer.is_last_batch) and not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}. "
                "Lower base_lr, lengthen warmup_epochs, or use bf16 in place of fp16."
            )
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict({"train_loss": loss, "lr": lr}, on_step=True, on_epoch=False)
        if first:
            self.epoch_loss.reset()
        self.epoch_loss.update(loss)
        self.log("train_loss_epoch", self.epoch_loss, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser, and warm-up and cosine by the step over the length of the run."""
        hparams = self.hparams
        lr = scale_lr(hparams.base_lr, hparams.batch_size, hparams.lr_scaling)
        optimizer = build_optimizer(
            hparams.optimizer, self, lr=lr, weight_decay=hparams.weight_decay, momentum=hparams.momentum
        )
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError("a cosine needs an end: set trainer.max_epochs or trainer.max_steps.")
        self.trainer.fit_loop.setup_data()  # where max_steps alone ends the run, the batches are not counted yet
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup_steps = round(hparams.warmup_epochs * steps_per_epoch)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, warmup_steps, total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
