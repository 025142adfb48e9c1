"""BYOL (Grill et al. 2020): a network predicts what a slow copy of itself makes of another view of the image.

Two networks see each image. The online one, f then g, is trained; the target one has the same shape, and its weights
are a moving average of the online ones. A predictor q on top of the online network predicts, from one view, the
target's projection of the other view. There are no negatives: what keeps all projections from becoming the same vector
is that the online network has a predictor and that no gradient goes into the target.

The loss of one image, with unit vectors, symmetric in its views v and w (equation 2 and below):

    |q(g(f(v))) - g'(f'(w))|^2 + |q(g(f(w))) - g'(f'(v))|^2,    |a - b|^2 = 2 - 2 cos(a, b)
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr import distributed
from simclr.augment import LARGEST_SMALL_VIEW, SimCLRAugmentation
from simclr.contrast.engine import ContrastStats
from simclr.encoders import Norm, Shortcut, Stem, build_encoder, default_encoder
from simclr.heads import ProjectionHead
from simclr.inputs import InputTransform, attach_transform
from simclr.optim import LrScaling, OptimizerName
from simclr.training.hooks import Pretraining
from simclr.training.network import CompileMode, Network
from simclr.training.objective import Objective
from simclr.training.parts import begin_step, step_in_parts
from simclr.training.profiled import profiled
from simclr.training.run import PretrainingRun
from simclr.training.settings import complete, refuse_bad_settings, refuse_sizes
from simclr.training.step_log import StepLog
from simclr.training.views import EpochViews

# The two views of an image are made differently (appendix B): one always blurred, the other rarely, and solarised.
# DeepMind's code jitters half as much as SimCLR's, and saturation by .2, where half of SimCLR's is .4.
VIEWS = {"strength": 0.5, "blur_prob": [1.0, 0.1], "solarize_prob": [0.0, 0.2]}


class BYOL(Pretraining):
    """Pretrains an encoder f by predicting one view's target projection from the other view, without negatives.

    A batch is that of `simclr.module.SimCLR`, and so are views, optimisers, schedules, resume and evaluation: the same
    parts. What training leaves behind is `encoder`, the online network's; `target["encoder"]` is its moving average.
    Both views go through a network in one batch, whose statistics BatchNorm takes; DeepMind's code has one a view.
    """

    architecture: tuple[str, ...] = ("encoder", "image_size", "stem", "width", "depth", "phi", "shortcut", "norm")
    architecture += ("channels", "hidden_dim", "projection_dim", "predictor", "head_batch_norm")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, and its gradient where that is made in micro-batches."""
        images, index = batch
        begin_step(self, index, batch_idx)
        if self.hparams.micro_batch_size is not None:
            return step_in_parts(self, images, index, batch_idx)
        loss, stats = self.loss(self.project(self.make_views(images, index)))
        self.step_log.add(self, batch_idx, stats)
        return loss

    @profiled("augmentation")
    def make_views(self, images: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """Both views of each image in this epoch, (n, C, S, S) each: a second call gives the same."""
        return self.views.make(images, index, self.current_epoch)

    @profiled("encoder")
    def project(self, views: tuple[Tensor, ...]) -> Tensor:
        """Predictions beside target projections, (2n, 2D), view after view; views share BatchNorm's statistics."""
        return self.network(views, next(self.encoder.parameters()).dtype)  # runs `_predict_beside_target`

    @profiled("loss")
    def loss(self, both: Tensor) -> tuple[Tensor, ContrastStats]:
        """The loss of this rank's share: its mean over ranks, and the gradient's, are those of the global batch.

        Args:
            both: see `project`.
        """
        predicted, target = both.chunk(2, dim=1)  # (2n, D) each, view after view
        target = torch.cat(target.chunk(2)[::-1])  # of the other view of the same image
        loss = regression_loss(predicted, target)
        return loss, _stats(loss.detach(), predicted.detach(), target.detach())

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """A step of the optimiser, and then one of the target towards the online network."""
        decay = target_decay(self.hparams.target_decay, self.trainer.global_step, self.run.total_steps or 1)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if any(p.grad is not None for p in self.encoder.parameters()):  # without, the step was skipped as not finite
            move_average(self.target, {"encoder": self.encoder, "head": self.head}, decay)

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
        hidden_dim: int | None = None,
        projection_dim: int = 256,
        predictor: Literal["nonlinear", "none"] = "nonlinear",
        head_batch_norm: Literal["hidden", False] = "hidden",
        target_decay: float = 0.99,
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
        """Builds both networks and the views.

        Args:
            encoder: a name that `build_encoder` knows; `auto` as in SimCLR.
            image_size: side of a view, in pixels.
            start_size: progressive resolution: the side of the views of the first epoch; see SimCLR.
            grow_epochs: epochs from start_size to image_size.
            stem: `small` (3x3, stride 1), `small_stride2`, `imagenet` (7x7, stride 2, max-pool), or `auto` by
                image_size. Of `efficientnet` small halves the image twice less.
            width: multiplies every channel of a ResNet or of `efficientnet`.
            depth: multiplies the blocks of each of its stages, rounded up.
            phi: of `efficientnet`, 0 to 7: the width and depth of B0 to B7.
            shortcut: of a ResNet: A, B, C or none.
            zero_init: start each residual block as the identity.
            norm: `batch`, or `none` for a ResNet without normalisation.
            weights: that both encoders, online and target, begin with; see SimCLR.
            weights_prefix: what the names of the encoder's weights begin with in another program's file.
            hidden_dim: width of the hidden layers of projector and predictor (the paper: 4096); the encoder's
                feature_dim if not given.
            projection_dim: size of a projection and of a prediction.
            predictor: nonlinear (one hidden layer), or none, without which projections collapse.
            head_batch_norm: hidden: batch normalisation in the hidden layers of projector and predictor, as published;
                false: nowhere.
            target_decay: tau of the target's moving average as the run begins; it rises to 1 by a cosine over the run.
                The paper: 0.99 for 300 epochs, 0.996 for 1000. 0 stays 0: the target is the online network of the step
                before.
            micro_batch_size: images on a device at a time. The gradient is that of the whole batch (with BatchNorm over
                one micro-batch). If not given: all at once.
            optimizer: lars, sgd (Nesterov) or adamw.
            base_lr: learning rate before scaling. If not given: the optimiser's own (simclr.optim.RATES).
            lr_scaling: linear, sqrt or none; see SimCLR.
            weight_decay: L2 for lars and sgd, decoupled for adamw. If not given: the optimiser's own.
            momentum: of lars and sgd.
            warmup_epochs: epochs of linear warm-up; half a cosine to zero follows. If not given: ten, and at most a
                tenth of the run.
            batch_size: the global batch, which lr_scaling goes by. If not given: the data module's. On the command line
                it comes from data.batch_size.
            channels: of an image: 3, RGB; 1, gray; or another number. On the command line it comes from data.channels.
            channels_last: memory layout of images and convolutions.
            compile_encoder: run both networks by torch.compile; see SimCLR.
            seed: of the views. On the command line it comes from seed_everything.
            **augmentation: settings of SimCLRAugmentation. If not given: strength 0.5; view 2 is solarised with
                probability 0.2, and above 64 px view 1 is always blurred and view 2 with probability 0.1, as published.
                (The published saturation is .2; half of SimCLR's is .4.)
        Raises:
            ValueError: for a setting out of its range, by its name.
        """
        super().__init__()
        self.save_hyperparameters()
        settings = self.hparams
        refuse_bad_settings(settings)
        if not 0 <= target_decay <= 1:
            raise ValueError(f"target_decay={target_decay} is not in [0, 1].")
        if encoder == "auto":
            encoder, stem = default_encoder(stem, image_size)
        small = image_size <= LARGEST_SMALL_VIEW  # not blurred: see simclr.augment.BY_SIZE
        of_views = {name: value for name, value in VIEWS.items() if not (small and name == "blur_prob")}
        if channels not in (1, 3):  # which cannot be solarised
            of_views.pop("solarize_prob")
        augmentation = {**of_views, **{name: value for name, value in augmentation.items() if value is not None}}
        self.augment = SimCLRAugmentation(image_size, channels=channels, **augmentation)
        settings.update(augmentation)
        complete(settings, self.augment, encoder=encoder, stem=stem)
        options = dict[str, Any](stem=stem, width=width, depth=depth, phi=phi, shortcut=shortcut)
        options |= {"zero_init": zero_init, "norm": norm}
        self.encoder = build_encoder(encoder, image_size=image_size, channels=channels, **options)
        refuse_sizes(self.encoder, settings)
        attach_transform(self.encoder, InputTransform(image_size, self.augment.mean, self.augment.std))
        feature_dim: Any = self.encoder.feature_dim
        hidden = hidden_dim or feature_dim
        sizes = dict[str, Any](hidden_dim=hidden, projection_dim=projection_dim, batch_norm=head_batch_norm)
        self.head = ProjectionHead(feature_dim, **sizes)
        self.predictor = ProjectionHead(projection_dim, **sizes) if predictor != "none" else nn.Identity()
        if channels_last:
            self.encoder.to(memory_format=torch.channels_last)
        self.target = nn.ModuleDict({"encoder": copy.deepcopy(self.encoder), "head": copy.deepcopy(self.head)})
        self.target.requires_grad_(False)
        self.views = EpochViews(self.augment, settings)
        self.network = Network(self._predict_beside_target, settings)
        self.run = PretrainingRun(settings)
        self.step_log = StepLog()

    def _predict_beside_target(self, x: Tensor) -> Tensor:
        predicted = self.predictor(self.head(self.encoder(x)))
        with torch.no_grad():
            target = self.target["head"](self.target["encoder"](x))
        return torch.cat((predicted, target), dim=1)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """What a view goes through on its way to a prediction."""
        predictor = (self.predictor,) if isinstance(self.predictor, ProjectionHead) else ()
        return self.encoder, self.head, *predictor

    @staticmethod
    def objective(settings: Mapping[str, Any]) -> Objective:
        """What is minimised, for people."""
        parts = ["BYOL", f"target decay {settings['target_decay']:g}"]
        parts += ["without a predictor"] if settings["predictor"] == "none" else []
        return Objective("BYOL", ", ".join(parts), None)

    # Beside what `Pretraining` answers Lightning:

    def configure_optimizers(self) -> dict[str, Any]:
        before = self.run.began_with
        configured = super().configure_optimizers()
        if self.run.began_with is not before:  # the encoder has just been given weights, and the target is its copy
            self.target["encoder"].load_state_dict(self.encoder.state_dict())
        return configured


def regression_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """BYOL's loss, equation 2, of both views: twice the mean over rows of |p - t|^2 for unit vectors p and t.

    Args:
        predicted: (2n, D), of any scale: normalised here.
        target: (2n, D), likewise, of the other view of the same images; it gets no gradient.
    Returns:
        Scalar, float32 (float64 for float64): the mean over n images of the sum over both views, in [0, 8].
    """
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    p, t = F.normalize(predicted.to(dtype), dim=1), F.normalize(target.detach().to(dtype), dim=1)
    return 2 * (p - t).square().sum(1).mean()


def target_decay(base: float, step: int, total_steps: int) -> float:
    """tau of the target's step: from `base` to 1 by half a cosine, 1 - (1 - base) (cos(pi k / K) + 1) / 2.

    Args:
        base: in [0, 1]. 0 stays 0 throughout: no target, but the online network of the step before (the paper's table
            5a), as 1 stays 1: a target that is fixed.
        step: k, optimiser steps taken before.
        total_steps: K, of the run.
    """
    if base == 0:
        return 0.0
    return 1 - (1 - base) * (math.cos(math.pi * min(step, total_steps) / total_steps) + 1) / 2


@torch.no_grad()
def move_average(target: nn.ModuleDict, online: Mapping[str, nn.Module], decay: float) -> None:
    """target <- decay * target + (1 - decay) * online, for all weights; running statistics are each network's own.

    Args:
        target: changed in place.
        online: its parts by the names that the target has.
        decay: tau in [0, 1].
    """
    for name, part in online.items():
        for slow, fast in zip(target[name].parameters(), part.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)


def _stats(loss: Tensor, predicted: Tensor, target: Tensor) -> ContrastStats:
    """What people are told: how far predictions are from the other view's target, and from those of other images.

    Nothing is trained by it. The part of the images that are nearest to their own target is of this rank's batch; all
    is averaged over ranks.
    """
    p, t = (F.normalize(x.float(), dim=1) for x in (predicted, target))
    cosines = p @ t.T  # (2n, 2n)
    own, n = cosines.diagonal(), len(p) // 2
    same_image = torch.arange(2 * n, device=p.device) % n
    others = same_image[:, None] != same_image
    nearest = torch.where(others, cosines, -torch.inf).amax(1)
    count = max(1, 2 * n * (2 * n - 2))
    top1 = (own > nearest).float().mean()
    numbers = torch.stack((loss.float(), top1, own.mean(), (cosines * others).sum() / count))
    return ContrastStats(*distributed.mean_over_ranks(numbers).unbind())
