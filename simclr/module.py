"""SimCLR (Chen et al. 2020): two views of each image, encoded, projected, and told apart from all others."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from simclr import distributed, losses
from simclr.augment import SimCLRAugmentation
from simclr.checkpoint import settle_progress
from simclr.continuation import (
    end_shorter_epoch,
    model_changes,
    planned_steps,
    refuse_changes,
    trainer_changes,
    trainer_settings,
)
from simclr.encoders import Norm, Shortcut, Stem, build_encoder, default_encoder, why_not
from simclr.gradient_cache import backward_in_parts
from simclr.heads import ProjectionHead
from simclr.inputs import InputTransform, attach_transform
from simclr.optim import (
    LrScaling,
    OptimizerName,
    build_optimizer,
    default_rates,
    default_warmup,
    scale_lr,
    warmup_cosine,
)

Loss = Literal["nt_xent", "dcl", "nt_logistic", "margin_triplet"]
CompileMode = Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]  # torch.compile's
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # the modes that replay them

# Settings that a run has once it begins; see `SimCLR.settle`.
_SETTLED = ("base_lr", "lr_scaling", "weight_decay", "warmup_epochs", "batch_size", "compile_encoder")
_SMALL_GROUP = 64  # views; batch statistics of fewer are noisy
_DIVERGED = "Lower base_lr, lengthen warmup_epochs, or use bf16 in place of fp16."


class SimCLR(LightningModule):
    """Pretrains an encoder f by contrasting two views of each image through a projection head g.

    A batch is `(images, index)`: images (n, 3, H, W), uint8 or float in [0, 1], and their numbers in the data set,
    (n,); n is this rank's share of the global batch. Views are made on the training device, outside autocast, as a pure
    function of (seed, epoch, index, view). What training leaves behind is `encoder`; the head is thrown away.

    Args:
        encoder: a name that `build_encoder` knows: resnet18 ... resnet152, resnet8 ... resnet110 (CIFAR), or any
            torchvision or timm model. `auto`: resnet18 where there is a GPU; else resnet8 which, with stem=auto and
            images up to 64 px, begins with stride 2: a network that CPUs train in minutes.
        image_size: side of a view, in pixels.
        start_size: progressive resolution: views of the first epoch have this side, and grow to image_size in steps of
            32 pixels (of 4 if image_size is below 128). If not given: image_size throughout.
        grow_epochs: epochs from start_size to image_size.
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
        loss: nt_xent; dcl, which leaves the positive pair out of the denominator; nt_logistic; margin_triplet. See
            simclr.losses.
        temperature: tau of the loss, 0.0015 or more; not used by margin_triplet.
        margin: of margin_triplet, in cosines.
        semi_hard: nt_logistic and margin_triplet: compare with the nearest of the farther negatives instead of all.
        views: of each image. More than two need loss=nt_xent, which then compares all pairs of them.
        micro_batch_size: images on a device at a time. The gradient is that of the whole batch, in the memory of one
            micro-batch (and of BatchNorm over one micro-batch), for about a third more time. If not given: all at once.
        optimizer: lars, sgd (Nesterov) or adamw. Biases and normalisation neither decay nor take LARS's trust ratio.
        base_lr: learning rate before scaling: per 256 images for lr_scaling=linear, per image for sqrt. If not given:
            the optimiser's own (simclr.optim.RATES).
        lr_scaling: linear: base_lr x batch_size / 256; sqrt: base_lr x sqrt(batch_size); none: base_lr. If not given:
            linear for a base_lr that is (none for adamw), else the optimiser's own.
        weight_decay: L2 for lars and sgd, decoupled for adamw. If not given: the optimiser's own.
        momentum: of lars and sgd.
        warmup_epochs: epochs of linear warm-up, by the step; half a cosine to zero follows. If not given: ten, and at
            most a tenth of the run.
        batch_size: the global batch, which lr_scaling goes by. If not given: the data module's. On the command line it
            comes from data.batch_size.
        channels_last: memory layout of images and convolutions: faster on most devices, the same numbers up to
            rounding.
        compile_encoder: run encoder and head by torch.compile: a minute at the start, faster steps after it on most
            GPUs. A CPU needs a C++ compiler. If not given: no; but the command line compiles for a CPU, views too,
            where it measures that the run is long enough to repay it. In place of true, one of its modes:
            reduce-overhead replays them as CUDA graphs, for steps of a few milliseconds, where launching kernels takes
            longer than they run; max-autotune also tries kernels, for minutes; max-autotune-no-cudagraphs only tries
            them. CUDA graphs are for one device, hold memory of their own, and are recorded again for each size of
            views that grow.
        seed: of the views. On the command line it comes from seed_everything.
        **augmentation: settings of SimCLRAugmentation: strength, crop_scale, flip_prob, blur_prob, mean, std ...
    Raises:
        ValueError: for a setting out of its range, by its name.
    """

    def __init__(
        self,
        encoder: str = "auto",
        *,
        image_size: int = 32,
        start_size: int | None = None,
        grow_epochs: int = 0,
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
        loss: Loss = "nt_xent",
        temperature: float = 0.2,
        margin: float = 0.5,
        semi_hard: bool = False,
        views: int = 2,
        micro_batch_size: int | None = None,
        optimizer: OptimizerName = "lars",
        base_lr: float | None = None,
        lr_scaling: LrScaling | None = None,
        weight_decay: float | None = None,
        momentum: float = 0.9,
        warmup_epochs: float | None = None,
        batch_size: int | None = None,
        channels_last: bool = True,
        compile_encoder: bool | CompileMode | None = None,
        seed: int = 0,
        **augmentation: Any,
    ):
        super().__init__()
        positive = {"temperature": temperature, "margin": margin, "base_lr": base_lr, "batch_size": batch_size}
        positive |= {"micro_batch_size": micro_batch_size}
        not_negative = {"weight_decay": weight_decay, "warmup_epochs": warmup_epochs}
        problems = [
            f"{name}={value} is not positive"
            for name, value in positive.items()
            if value is not None and not 0 < value < math.inf
        ]
        problems += [
            f"{name}={value} is negative"
            for name, value in not_negative.items()
            if value is not None and not value >= 0
        ]
        if 0 < temperature < losses.SMALLEST_TEMPERATURE:
            problems.append(
                f"temperature={temperature} is below {losses.SMALLEST_TEMPERATURE}, where logits overflow; try 0.05"
            )
        choices = (("loss", loss, Loss), ("optimizer", optimizer, OptimizerName), ("lr_scaling", lr_scaling, LrScaling))
        for name, value, allowed in choices:
            if value is not None and value not in get_args(allowed):
                problems.append(f"{name}={value} is none of {', '.join(get_args(allowed))}")
        if compile_encoder not in (None, True, False, *get_args(CompileMode)):
            modes = ", ".join(get_args(CompileMode))
            problems.append(f"compile_encoder={compile_encoder} is none of true, false, {modes}")
        if not 0 <= momentum < 1:
            problems.append(f"momentum={momentum} is not in [0, 1)")
        if semi_hard and loss not in ("nt_logistic", "margin_triplet"):
            problems.append(f"semi_hard=True is for loss=nt_logistic and margin_triplet, not for {loss}")
        if start_size is not None and not (1 <= start_size <= image_size and grow_epochs > 0):
            problems.append(
                f"start_size={start_size} with grow_epochs={grow_epochs}: use a size up to image_size={image_size} "
                "and 1 epoch or more"
            )
        if start_size is None and grow_epochs:
            problems.append(f"grow_epochs={grow_epochs} needs a start_size to grow from")
        if views < 2:
            problems.append(f"views={views} leaves an image without a positive: use 2 or more")
        if views > 2 and loss != "nt_xent":
            problems.append(f"views={views} works with loss=nt_xent only, not with {loss}: use 2")
        if problems:
            raise ValueError(f"{'; '.join(problems)}.")
        if encoder == "auto":
            encoder, stem = default_encoder(stem, image_size)
        self.augment = SimCLRAugmentation(image_size, **augmentation)
        self.save_hyperparameters()
        self._left_out = [name for name in _SETTLED if self.hparams[name] is None]
        # A checkpoint states every setting, also those left at their defaults, in plain types that any tool can read.
        settings = inspect.signature(SimCLRAugmentation).bind(image_size, **augmentation)
        settings.apply_defaults()
        self.hparams.update(settings.arguments)
        augment = self.augment
        self.hparams.update(strength=augment.strength, crop_scale=augment.crop_scale, blur_prob=augment.probs["blur"])
        self.hparams.update(encoder=encoder, stem=stem)
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
        if start_size is not None and (reason := why_not(self.encoder, start_size)):
            raise ValueError(f"start_size={start_size}: encoder {encoder} cannot take images of that size: {reason}.")
        # What measures the encoder while it learns feeds it as `load_encoder`'s users do.
        attach_transform(self.encoder, InputTransform(image_size, self.augment.mean, self.augment.std))
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
        self._smaller: SimCLRAugmentation | None = None  # of the epochs while views grow
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self.epoch_loss: Tensor | float = 0.0  # summed over the steps of the epoch so far
        self.epoch_steps = 0
        self.total_steps: int | None = None  # the length of the run, which the learning rate goes by
        self._continued: dict[str, Any] | None = None  # from where: see `simclr.checkpoint.Checkpoint.run`

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch, which looks for parameters, buffers and modules in whatever is set, but for one plain name."""
        if name == "_current_fx_name":  # Lightning notes here which hook runs, fifty times a step
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def adopt(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives the settings of optimisation that were left out the values that a run has which is continued.

        Args:
            checkpoint: its settings of `SimCLR`.
        """
        for name in self._left_out:
            if checkpoint.get(name) is not None:
                self.hparams[name] = checkpoint[name]

    def settle(self, batch_size: int | None, epochs: float | None = None) -> None:
        """Gives the settings of optimisation that were left out the values that they have in this run.

        Args:
            batch_size: the global batch of the data; None where they do not tell.
            epochs: the length of the run; None where it is not known yet.
        Raises:
            ValueError: if neither SimCLR nor the data tell the batch.
        """
        hparams = self.hparams
        hparams.batch_size = batch_size if hparams.batch_size is None else hparams.batch_size
        if hparams.batch_size is None:
            raise ValueError("SimCLR needs batch_size, the global batch, with a loader that does not tell it.")
        for name, value in default_rates(hparams.optimizer, hparams.base_lr)._asdict().items():
            hparams[name] = value if hparams[name] is None else hparams[name]
        if hparams.warmup_epochs is None and epochs is not None:
            hparams.warmup_epochs = default_warmup(epochs)

    def setup(self, stage: str) -> None:
        """Settle what was left out; refuse a data module of another batch, which the rate goes by, or image size."""
        # Overridden on purpose, for every loader.
        message = "You have overridden `transfer_batch_to_device` in `LightningModule`"
        warnings.filterwarnings("ignore", message=message)
        given = {name: getattr(self.trainer.datamodule, name, None) for name in ("batch_size", "image_size")}
        differ = [
            f"SimCLR has {name}={self.hparams[name]}, the data module {value}"
            for name, value in given.items()
            if isinstance(value, int) and self.hparams[name] not in (None, value)
        ]
        if differ:
            raise ValueError(f"{'; '.join(differ)}. Give both the same.")
        epochs = self.trainer.max_epochs
        whole = epochs is not None and epochs > 0 and self.trainer.max_steps < 0
        batch = given["batch_size"]
        self.settle(batch if isinstance(batch, int) else None, epochs if whole else None)
        held = getattr(self.trainer.datamodule, "load_size", None)
        attach_transform(self.encoder, replace(self.encoder.transform, load_size=held))
        self.check(self.trainer)
        group = self.batch_norm_group(self.trainer)
        few = group is not None and group < min(_SMALL_GROUP, self.hparams.views * self.hparams.batch_size)
        if few and self.hparams.micro_batch_size is not None:
            rank_zero_warn(
                f"BatchNorm's statistics are those of a micro-batch, only {group} views. The gradient is exact for "
                "that network; a larger model.micro_batch_size trains one nearer to the whole batch's."
            )

    def batch_norm_group(self, trainer: Trainer) -> int | None:
        """How many views share BatchNorm's statistics; None for a network without."""
        kinds = [module for module in self.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        if not kinds:
            return None
        images = self.hparams.micro_batch_size or self.hparams.batch_size // trainer.world_size
        synchronised = getattr(trainer.strategy, "_layer_sync", None) is not None
        return self.hparams.views * images * (trainer.world_size if synchronised else 1)

    def check(self, trainer: Trainer) -> None:
        """Refuse micro-batches that do not divide, and strategies that do not go with them or with CUDA graphs.

        Raises:
            ValueError: with what to use.
        """
        if self._cuda_graphs and type(trainer.strategy) is not SingleDeviceStrategy:
            raise ValueError(
                f"model.compile_encoder={self.hparams.compile_encoder} is for one device, not for "
                f"{type(trainer.strategy).__name__}: CUDA graphs do not hold what devices exchange, gradients and the "
                "statistics of synchronised BatchNorm. Use --model.compile_encoder true, or --trainer.devices 1."
            )
        size, share = self.hparams.micro_batch_size, self.hparams.batch_size // trainer.world_size
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

    def forward(self, images: Tensor) -> Tensor:
        """The representation h of normalised images: (n, 3, H, W) -> (n, feature_dim)."""
        return self.encoder(images)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a training batch's images; their numbers stay on the CPU, where the views' parameters are drawn."""
        if not self.trainer.training:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        images, index = batch
        # Numbers copied back from a device would wait, every step, for all that is queued on it.
        # Not by Lightning's search through nested batches, which takes longer than a step's images may.
        return images.to(device, non_blocking=device.type == "cuda"), index.cpu()

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
        if self.hparams.micro_batch_size is not None:
            return batch  # views are made as each micro-batch needs them
        with self.trainer.profiler.profile("augmentation"):
            return self._views(images, index)

    def _views(self, images: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """The views of this epoch, a pure function: a second call gives the same."""
        epoch, seed, augment = self.current_epoch, self.hparams.seed, self.augment_of(self.current_epoch)
        return tuple(augment.view(images, index, epoch, seed, view) for view in range(self.hparams.views))

    def view_size(self, epoch: int) -> int:
        """The side of the views of an epoch, in pixels: image_size, or less while a progressive resolution grows."""
        start, end, epochs = self.hparams.start_size, self.hparams.image_size, self.hparams.grow_epochs
        if start is None or epoch >= epochs:
            return end
        step = 32 if end >= 128 else 4
        return min(end, start + math.ceil((end - start) / step) * epoch // epochs * step)

    def augment_of(self, epoch: int) -> SimCLRAugmentation:
        """The augmentation of an epoch, at its resolution."""
        size = self.view_size(epoch)
        if size == self.hparams.image_size:
            return self.augment
        if size != getattr(self._smaller, "image_size", None):
            settings = {name: self.hparams[name] for name in inspect.signature(SimCLRAugmentation).parameters}
            self._smaller = SimCLRAugmentation(**{**settings, "image_size": size}).to(self.device)
        return self._smaller

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The loss of a batch of views, (n, 3, H, W) each; with micro-batches, of (images, index)."""
        if self._clears_gradients and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._clear_gradients()
        if self.hparams.micro_batch_size is not None:
            return self._step_in_parts(*batch, batch_idx)
        # Lightning knows no parts of this step; `simclr profile` and trainer.profiler show them by these names.
        with self.trainer.profiler.profile("encoder"):
            z = self._project(batch)
        with self.trainer.profiler.profile("loss"):
            loss, stats = self._loss(z)
        self._log(stats, batch_idx)
        return loss

    def _project(self, views: tuple[Tensor, ...]) -> Tensor:
        """Projections, (views * n, D), view after view."""
        x = torch.cat(views)  # all views in one forward, so that they share BN statistics
        # Views are float32; under Lightning's bf16-true, 16-true and 64-true the weights are not.
        x = x.to(next(self.encoder.parameters()).dtype)
        if self.hparams.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if not self.hparams.compile_encoder:
            return self._encode(x)
        if self._compiled is None:
            mode = self.hparams.compile_encoder
            # Not the whole step: logging inside it broke before.
            self._compiled = torch.compile(self._encode, mode=mode if isinstance(mode, str) else None)
        if not self._cuda_graphs:
            return self._compiled(x)
        # The next run overwrites this one's result. By itself torch takes any compiled function for the next step.
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(x).clone()

    @property
    def _cuda_graphs(self) -> bool:
        return self.hparams.compile_encoder in CUDA_GRAPHS

    @property
    def _clears_gradients(self) -> bool:
        """Whether a step does it as it begins; Lightning does it before backward, after `training_step`."""
        return self.hparams.micro_batch_size is not None or self._cuda_graphs

    def _clear_gradients(self) -> None:
        """Before the first forward pass of an optimiser's step."""
        added_up = self.hparams.micro_batch_size is not None or self.trainer.accumulate_grad_batches > 1
        # The gradients of a CUDA graph lie in memory that its next run overwrites, unless they are added to others.
        keep = self._cuda_graphs and added_up
        self.optimizers(use_pl_optimizer=False).zero_grad()
        for p in self.parameters() if keep else ():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)

    def _encode(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def _loss(self, z: Tensor) -> tuple[Tensor, losses.ContrastStats]:
        """The loss chosen, of projections view after view."""
        hparams, views = self.hparams, z.chunk(self.hparams.views)
        function = partial(getattr(losses, hparams.loss), *views, hparams.temperature)
        if len(views) > 2:
            function = partial(losses.sup_con, views, hparams.temperature)
        elif hparams.loss == "margin_triplet":
            function = partial(losses.margin_triplet, *views, hparams.margin, semi_hard=hparams.semi_hard)
        elif hparams.loss == "nt_logistic":
            function = partial(function, semi_hard=hparams.semi_hard)
        try:
            return function(return_stats=True)
        except FloatingPointError as error:
            step = self.trainer.global_step
            raise FloatingPointError(f"the loss is nan at step {step}: {error} {_DIVERGED}") from error

    def _step_in_parts(self, images: Tensor, index: Tensor, batch_idx: int) -> Tensor:
        """The step with a gradient cache: see `simclr.gradient_cache`. Views are made anew in its second pass."""
        size, views = self.hparams.micro_batch_size, self.hparams.views
        accumulate = self.trainer.accumulate_grad_batches
        profile = self.trainer.profiler.profile
        stats = []

        def project(some: Tensor, their_index: Tensor) -> Tensor:
            with profile("augmentation"):
                micro_batch = self._views(some, their_index)
            with profile("encoder"):
                return self._project(micro_batch)

        def loss_of(z: list[Tensor]) -> Tensor:
            by_view = [torch.cat(view) for view in zip(*(part.chunk(views) for part in z), strict=True)]
            loss, found = self._loss(torch.cat(by_view))
            stats.append(found)
            return loss

        def backward(surrogate: Tensor) -> None:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            surrogate = surrogate / accumulate  # as Lightning does to what this step returns
            # One all-reduce a step, that of the last part.
            with getattr(self.trainer.strategy, "block_backward_sync", nullcontext)(), profile("backward"):
                (scaler.scale(surrogate) if scaler else surrogate).backward()

        micro_batches = [partial(project, *pair) for pair in zip(images.split(size), index.split(size), strict=True)]
        cached = backward_in_parts(micro_batches, loss_of, backward, [self.encoder, self.head], profile)
        self._log(stats[0], batch_idx, cached.error)
        return cached.last

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Lightning calls this after `training_step`, when micro-batches have put their gradients there."""
        if not self._clears_gradients:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds where the run stands, how long it is, and the settings of the Trainer that decide its bits.

        A run continued in the middle of an epoch reports the mean loss of the whole epoch.
        """
        checkpoint["epoch_loss"] = [float(self.epoch_loss), float(self.epoch_steps)]
        trainer = self.trainer
        epochs, batches = settle_progress(checkpoint["loops"]["fit_loop"], trainer.num_training_batches)
        if self.total_steps is None:  # not the schedule of `configure_optimizers`
            return
        checkpoint["run"] = {
            "epochs": epochs,
            "steps_inside": batches // trainer.accumulate_grad_batches,
            "total_steps": self.total_steps,
            "steps_per_epoch": self._steps_per_epoch,
            **trainer_settings(trainer, self),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to train on with a setting that decides what is learned and differs; see `on_save_checkpoint`.

        A checkpoint that another tool wrote need not have what is added there.
        """
        self.epoch_loss, steps = checkpoint.get("epoch_loss", (0.0, 0.0))
        self.epoch_steps = int(steps)
        if self._trainer is None or not self._trainer.training:  # only its weights are wanted
            return
        end_shorter_epoch(checkpoint, self.trainer)
        self._continued = checkpoint.get("run")
        self.adopt(checkpoint["hyper_parameters"])
        changes = model_changes(self.hparams, checkpoint["hyper_parameters"])
        changes |= trainer_changes(trainer_settings(self.trainer, self), self._continued or {})
        refuse_changes(changes, "the checkpoint")

    @property
    def _steps_per_epoch(self) -> int:
        # Lightning also steps at the end of an epoch, with the batches that are left over.
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def on_train_start(self) -> None:
        """The learning rate of the first step is the schedule's, also where another length was planned before."""
        trainer, schedule = self.trainer, self.lr_schedulers()
        run, self._continued = self._continued, None
        if self.total_steps is None or schedule is None:  # another optimiser than `configure_optimizers` gives
            return
        if run is not None:
            lengths = trainer.max_epochs, trainer.max_steps
            self.total_steps = planned_steps(run, trainer.global_step, self._steps_per_epoch, *lengths)
        for group, lr in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = lr * schedule.lr_lambdas[0](schedule.last_epoch)

    def _log(self, stats: losses.ContrastStats, batch_idx: int, cache_error: Tensor | None = None) -> None:
        """Logs the loss of the global batch and what goes with it, alike on all ranks, every `log_every_n_steps`."""
        if batch_idx == 0:
            self.epoch_loss, self.epoch_steps = 0.0, 0
        self.epoch_loss, self.epoch_steps = self.epoch_loss + stats.loss, self.epoch_steps + 1
        trainer = self.trainer
        every, done = trainer.log_every_n_steps, trainer.fit_loop.epoch_loop._batches_that_stepped
        logged = every > 0 and (done + 1) % every == 0
        # A look at the value waits for the device.
        if (logged or trainer.is_last_batch) and not stats.loss.isfinite():
            raise FloatingPointError(f"the loss is {stats.loss.item()} at step {trainer.global_step}. {_DIVERGED}")
        if logged:
            values = {"train_loss": stats.loss, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
            values |= {"contrast_top1": stats.accuracy, "positive_cosine": stats.positive_cosine}
            values["negative_cosine"] = stats.negative_cosine
            if cache_error is not None:
                values["gradient_cache_error"] = distributed.max_over_ranks(cache_error)
            self._write(values)

    def _write(self, values: dict[str, Tensor | float]) -> None:
        """Gives metrics to the loggers, and to the callbacks as `callback_metrics`, at the step and epoch of Lightning.

        `log_dict` costs 0.1 ms more in the mean of all steps, at a write every 25 of them: what it holds is gone
        through again after every batch.
        """
        trainer = self.trainer
        tensors = {name: torch.as_tensor(value, device=self.device) for name, value in values.items()}
        trainer.callback_metrics.update(tensors)
        trainer.logged_metrics.update(tensors)
        if trainer.fit_loop._should_accumulate():  # a row is of the last batch of an optimiser step, as Lightning's
            return
        row = {name: tensor.item() for name, tensor in tensors.items()} | {"epoch": self.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(row, trainer.fit_loop.epoch_loop._batches_that_stepped)
            logger.save()

    def mean_epoch_loss(self) -> float:
        """The mean loss of the global batches of this epoch so far."""
        return float(self.epoch_loss) / max(1, self.epoch_steps)

    def on_train_epoch_end(self) -> None:
        """The mean loss of the epoch, the same on all ranks."""
        if not self.trainer.barebones:  # which would warn that it logs nothing
            self.log("train_loss_epoch", self.mean_epoch_loss(), prog_bar=True, rank_zero_only=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser, and warm-up and cosine by the step over the length of the run."""
        hparams = self.hparams
        lr = scale_lr(hparams.base_lr, hparams.batch_size, hparams.lr_scaling)
        optimizer = build_optimizer(
            hparams.optimizer,
            self,
            lr=lr,
            weight_decay=hparams.weight_decay,
            momentum=hparams.momentum,
            fused=not self.trainer.gradient_clip_val and self.device.type in ("cpu", "cuda"),
        )
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError("a cosine needs an end: set trainer.max_epochs or trainer.max_steps.")
        self.trainer.fit_loop.setup_data()  # where max_steps alone ends the run, the batches are not counted yet
        self.total_steps = total_steps
        if hparams.warmup_epochs is None:
            hparams.warmup_epochs = default_warmup(total_steps / self._steps_per_epoch)
        warmup_steps = round(hparams.warmup_epochs * self._steps_per_epoch)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, warmup_steps, self.total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
