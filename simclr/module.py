"""SimCLR (Chen et al. 2020): two views of each image, encoded, projected, and told apart from all others."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simclr.augment import SimCLRAugmentation
from simclr.contrast.engine import ContrastStats
from simclr.encoders import Norm, Shortcut, Stem, build_encoder, default_encoder
from simclr.heads import ProjectionHead
from simclr.inputs import InputTransform, attach_transform
from simclr.optim import LrScaling, OptimizerName
from simclr.training.hooks import Pretraining
from simclr.training.network import CompileMode, Network
from simclr.training.objective import LossName, Objective, Pairs, loss_of, objective_of
from simclr.training.parts import begin_step, step_in_parts
from simclr.training.profiled import profiled
from simclr.training.run import PretrainingRun
from simclr.training.settings import complete, refuse_bad_settings, refuse_sizes
from simclr.training.step_log import StepLog
from simclr.training.views import EpochViews
from simclr.training.views import small_crops as small_crops_of


class SimCLR(Pretraining):
    """Pretrains an encoder f by contrasting two views of each image through a projection head g.

    A batch is `(images, index)`: images (n, C, H, W), uint8, uint16 or float in [0, 1], and their numbers in the data
    set, (n,); n is this rank's share of the global batch. Views are made on the training device, as a pure function of
    (seed, epoch, index, view). What training leaves behind is `encoder`; the head is thrown away.

    `training_step` is the method; Lightning takes the gradient of what it returns and steps the optimiser. The objects
    that do the rest, each in a file of `simclr/training/`, are made at the end of `__init__`.
    """

    # Settings that decide which weights there are.
    architecture: tuple[str, ...] = ("encoder", "image_size", "stem", "width", "depth", "phi", "shortcut", "norm")
    architecture += ("channels", "head", "hidden_dim", "projection_dim", "head_layers", "head_batch_norm")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, and its gradient where that is made in micro-batches."""
        images, index = batch
        begin_step(self, index, batch_idx)  # refuses labels in place of numbers, clears gradients left over
        if self.hparams.micro_batch_size is not None:  # the lines below, for a part of the batch at a time
            return step_in_parts(self, images, index, batch_idx)
        views = self.make_views(images, index)
        loss, stats = self.loss(self.project(views))
        self.step_log.add(self, batch_idx, stats)
        return loss

    @profiled("augmentation")
    def make_views(self, images: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """The views of each image in this epoch, (n, C, S, S) each, small crops last: a second call gives the same."""
        return self.views.make(images, index, self.current_epoch)

    @profiled("encoder")
    def project(self, views: tuple[Tensor, ...]) -> Tensor:
        """Projections z = g(f(x)), (views * n, D), view after view; those of a size share BatchNorm's statistics."""
        return self.network(views, next(self.encoder.parameters()).dtype)  # runs `_encode_and_project` on all views

    @profiled("loss")
    def loss(self, z: Tensor) -> tuple[Tensor, ContrastStats]:
        """The contrastive loss of projections, view after view, among those of all ranks: see simclr.losses."""
        return loss_of(self.hparams, z.chunk(self.views.count), self.trainer.global_step, log=self.step_log)

    def forward(self, images: Tensor) -> Tensor:
        """The representation h of normalised images: (n, C, H, W) -> (n, feature_dim)."""
        return self.encoder(images)

    def __init__(
        self,
        encoder: str = "auto",
        *,
        image_size: int = 32,
        start_size: int | None = None,
        grow_epochs: int = 0,
        stem: Stem = "auto",
        width: float = 1.0,
        depth: float = 1.0,
        phi: int | None = None,
        shortcut: Shortcut = "B",
        zero_init: bool = True,
        norm: Norm = "batch",
        weights: str | None = None,
        weights_prefix: str | None = None,
        head: Literal["identity", "linear", "nonlinear", "deep"] = "nonlinear",
        hidden_dim: int | None = None,
        projection_dim: int = 128,
        head_layers: int = 3,
        head_batch_norm: bool | Literal["hidden"] = True,
        loss: LossName = "nt_xent",
        temperature: float = 0.2,
        margin: float = 0.5,
        semi_hard: bool = False,
        views: int = 2,
        small_crops: int = 0,
        small_crop_size: int | None = None,
        small_crop_scale: tuple[float, float] | None = None,
        pairs: Pairs = "all",
        micro_batch_size: int | None = None,
        optimizer: OptimizerName = "lars",
        base_lr: float | None = None,
        lr_scaling: LrScaling | None = None,
        weight_decay: float | None = None,
        momentum: float = 0.9,
        warmup_epochs: float | None = None,
        batch_size: int | None = None,
        channels: int = 3,
        channels_last: bool = True,
        compile_encoder: bool | CompileMode | None = None,
        seed: int = 0,
        **augmentation: Any,
    ):
        """Builds encoder, head and views.

        Args:
            encoder: a name that `build_encoder` knows: resnet18 ... resnet152, resnet8 ... resnet110 (CIFAR),
                efficientnet, or any torchvision or timm model. `auto`: resnet18 where there is a GPU; else resnet8
                which, with stem=auto and images up to 64 px, begins with stride 2: a network that CPUs train in
                minutes.
            image_size: side of a view, in pixels.
            start_size: progressive resolution: views of the first epoch have this side, and grow to image_size in steps
                of 32 pixels (of 4 if image_size is below 128). If not given: image_size throughout.
            grow_epochs: epochs from start_size to image_size.
            stem: `small` (3x3, stride 1), `small_stride2`, `imagenet` (7x7, stride 2, max-pool), or `auto` by
                image_size. Of `efficientnet` small halves the image twice less.
            width: multiplies every channel of a ResNet or of `efficientnet`.
            depth: multiplies the blocks of each of its stages, rounded up.
            phi: of `efficientnet`, 0 to 7: the width and depth of B0 to B7.
            shortcut: of a ResNet: A (zero padding), B (projection where dimensions grow), C (all projections) or none.
            zero_init: start each residual block as the identity (its last BN scale at zero).
            norm: `batch`, or `none` for a ResNet without normalisation.
            weights: that the encoder begins with: torchvision:NAME (such as IMAGENET1K_V2) or timm:NAME, which may
                download them; a file, a run folder or an export. All fit, or none. The head begins at random.
            weights_prefix: what the names of the encoder's weights begin with in another program's file: backbone.
            head: the projection head: identity, linear, nonlinear (one hidden layer) or deep (head_layers layers).
            hidden_dim: width of the head's hidden layers; the encoder's feature_dim if not given.
            projection_dim: size of a projection z.
            head_layers: layers of a deep head.
            head_batch_norm: batch normalisation in the head, as in google-research/simclr.
            loss: nt_xent; dcl, which leaves the positive pair out of the denominator; nt_logistic; margin_triplet;
                nt_xent_unnormalized, of dot products in place of cosines. See simclr.losses.
            temperature: tau of the loss, 0.0015 or more; not used by margin_triplet.
            margin: of margin_triplet, in cosines.
            semi_hard: nt_logistic and margin_triplet: compare with the nearest of the farther negatives instead of all.
            views: of each image. More than two need loss=nt_xent, which then compares all pairs of them.
            small_crops: multi-crop (Caron et al. 2020): so many views more, smaller ones of smaller crops, with
                loss=nt_xent. They go through encoder and head in a batch of their own, with BatchNorm's statistics of
                their own; its running statistics follow both, as in SwAV and solo-learn.
            small_crop_size: their side, in pixels. If not given: half of image_size.
            small_crop_scale: smallest and largest part of the image's area that they take. If not given: 0.05 to 0.2.
            pairs: of views that are compared: all, as solo-learn pairs them; or large: each with the large ones alone,
                as in SwAV (simclr.losses.nt_xent_to_large).
            micro_batch_size: images on a device at a time. The gradient is that of the whole batch, in the memory of
                one micro-batch (and of BatchNorm over one micro-batch), for about a third more time. If not given: all
                at once.
            optimizer: lars, sgd (Nesterov) or adamw. Biases and normalisation neither decay nor take LARS's trust
                ratio.
            base_lr: learning rate before scaling: per 256 images for lr_scaling=linear, per image for sqrt. If not
                given: the optimiser's own (simclr.optim.RATES).
            lr_scaling: linear: base_lr x batch_size / 256; sqrt: base_lr x sqrt(batch_size); none: base_lr. If not
                given: linear for a base_lr that is (none for adamw), else the optimiser's own.
            weight_decay: L2 for lars and sgd, decoupled for adamw. If not given: the optimiser's own.
            momentum: of lars and sgd.
            warmup_epochs: epochs of linear warm-up, by the step; half a cosine to zero follows. If not given: ten, and
                at most a tenth of the run.
            batch_size: the global batch, which lr_scaling goes by. If not given: the data module's. On the command line
                it comes from data.batch_size.
            channels: of an image: 3, RGB; 1, gray; or another number. On the command line it comes from data.channels.
            channels_last: memory layout of images and convolutions: faster on most devices, the same numbers up to
                rounding.
            compile_encoder: run encoder and head by torch.compile: a minute at the start, then faster steps on most
                GPUs; a CPU needs a C++ compiler. If not given: no; but the command line compiles for a CPU, views too,
                where it measures that the run is long enough to repay it. In place of true, one of its modes:
                reduce-overhead and max-autotune replay CUDA graphs, on one device, for steps of a few milliseconds;
                max-autotune and max-autotune-no-cudagraphs try kernels, for minutes.
            seed: of the views. On the command line it comes from seed_everything.
            **augmentation: settings of SimCLRAugmentation: strength, crop_scale, flip_prob, blur_prob, mean, std ...
        Raises:
            ValueError: for a setting out of its range, by its name.
        """
        super().__init__()
        self.save_hyperparameters()
        settings = self.hparams
        refuse_bad_settings(settings)
        if encoder == "auto":
            encoder, stem = default_encoder(stem, image_size)
        self.augment = SimCLRAugmentation(image_size, channels=channels, **augmentation)
        chosen = {"encoder": encoder, "stem": stem, **small_crops_of(settings)}
        complete(settings, self.augment, **chosen)  # with what was left open, for checkpoints
        options = dict[str, Any](stem=stem, width=width, depth=depth, phi=phi, shortcut=shortcut)
        options |= {"zero_init": zero_init, "norm": norm}
        self.encoder = build_encoder(encoder, image_size=image_size, channels=channels, **options)
        refuse_sizes(self.encoder, settings)
        # What measures the encoder while it learns feeds it as `load_encoder`'s users do.
        attach_transform(self.encoder, InputTransform(image_size, self.augment.mean, self.augment.std))
        feature_dim: Any = self.encoder.feature_dim
        sizes = dict[str, Any](hidden_dim=hidden_dim, projection_dim=projection_dim, layers=head_layers)
        self.head = ProjectionHead(feature_dim, kind=head, batch_norm=head_batch_norm, **sizes)
        if channels_last:
            self.encoder.to(memory_format=torch.channels_last)
        self.views = EpochViews(self.augment, settings)
        self.network = Network(self._encode_and_project, settings)
        self.run = PretrainingRun(settings)
        self.step_log = StepLog()

    def _encode_and_project(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """What a view goes through."""
        return self.encoder, self.head

    @staticmethod
    def objective(settings: Mapping[str, Any]) -> Objective:
        """What is minimised, for people."""
        return objective_of(settings)
