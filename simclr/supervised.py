"""Training with labels, which SimCLR is measured against (Chen et al. 2020: Figure 7, Tables 1 and 8).

The same encoder, images, views and optimisation as in pretraining, and one difference: in place of a projection head
and a contrastive loss a linear classifier on h and the cross entropy of its answers,

    - log softmax(W h + b)[label],    the mean over all views of all images.

Images that evaluation takes as test are not trained on, also where there is no test folder: see
`ImageData.train_with_labels`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr import distributed
from simclr.augment import SimCLRAugmentation
from simclr.data import ImageData
from simclr.encoders import Norm, Shortcut, Stem, build_encoder, default_encoder
from simclr.inputs import InputTransform, attach_transform
from simclr.optim import LrScaling, OptimizerName
from simclr.training.hooks import Pretraining
from simclr.training.network import CompileMode, Network
from simclr.training.objective import Objective
from simclr.training.parts import begin_step, step_in_parts
from simclr.training.profiled import profiled
from simclr.training.run import PretrainingRun
from simclr.training.settings import complete, refuse_bad_settings, refuse_sizes
from simclr.training.step_log import ClassStats, StepLog
from simclr.training.views import EpochViews


class Supervised(Pretraining):
    """Trains an encoder f and a linear classifier on h = f(x) with the labels of its images.

    A batch is that of `simclr.module.SimCLR`, images and their numbers, and so are views, optimisers, schedules, resume
    and evaluation: the same parts. Labels are looked up by the images' numbers in `simclr.data.ImageData`.
    """

    architecture: tuple[str, ...] = (
        "encoder",
        "image_size",
        "stem",
        "width",
        "depth",
        "phi",
        "shortcut",
        "norm",
        "channels",
        "num_classes",
    )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, and its gradient where that is made in micro-batches."""
        images, index = batch
        begin_step(self, index, batch_idx)
        self.targets = self.labels_of(index)
        if self.hparams.micro_batch_size is not None:
            return step_in_parts(self, images, index, batch_idx)
        loss, stats = self.loss(self.project(self.make_views(images, index)))
        self.step_log.add(self, batch_idx, stats)
        return loss

    @profiled("augmentation")
    def make_views(self, images: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """The views of each image in this epoch, (n, 3, S, S) each: a second call gives the same."""
        return self.views.make(images, index, self.current_epoch)

    @profiled("encoder")
    def project(self, views: tuple[Tensor, ...]) -> Tensor:
        """Logits, (views * n, C), view after view; views share BatchNorm's statistics."""
        return self.network(views, next(self.encoder.parameters()).dtype)  # runs `_classify` on all views

    @profiled("loss")
    def loss(self, logits: Tensor) -> tuple[Tensor, ClassStats]:
        """Cross entropy of this rank's share: its mean over ranks, and the gradient's, are those of the global batch.

        Args:
            logits: see `project`; their labels are `targets`, for each view.
        """
        targets = self.targets.to(logits.device, non_blocking=True).repeat(self.views.count)  # (views * n,)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits.to(dtype), targets)
        top1 = (logits.detach().argmax(1) == targets).to(dtype).mean()
        return loss, ClassStats(*distributed.mean_over_ranks(torch.stack((loss.detach(), top1))).unbind())

    def labels_of(self, index: Tensor) -> Tensor:
        """The labels of images by their numbers in the data set: (n,) integer -> (n,) int64 on the CPU.

        Raises:
            ValueError: if the images have none.
        """
        if self.labels is None:
            raise ValueError(
                "supervised training looks labels up in simclr.data.ImageData: give the Trainer one as datamodule."
            )
        return self.labels[index]

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
        num_classes: int | None = None,
        views: int = 2,
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
        """Builds the encoder and the views, and the classifier once it is known how many classes there are.

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
            weights: that the encoder begins with; see SimCLR. The classifier begins at random.
            weights_prefix: what the names of the encoder's weights begin with in another program's file.
            num_classes: C, classes of the images. If not given: as many as the training images have.
            views: of each image in a step, each with its label: 2 for as many images through the encoder as SimCLR has,
                1 for half of them.
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
            channels: of an image; see SimCLR.
            channels_last: memory layout of images and convolutions.
            compile_encoder: run encoder and classifier by torch.compile; see SimCLR.
            seed: of the views and the classifier's first weights. On the command line it comes from seed_everything.
            **augmentation: settings of SimCLRAugmentation.
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
        complete(settings, self.augment, encoder=encoder, stem=stem)
        options = dict[str, Any](stem=stem, width=width, depth=depth, phi=phi, shortcut=shortcut)
        options |= {"zero_init": zero_init, "norm": norm}
        self.encoder = build_encoder(encoder, image_size=image_size, channels=channels, **options)
        refuse_sizes(self.encoder, settings)
        attach_transform(self.encoder, InputTransform(image_size, self.augment.mean, self.augment.std))
        self.classifier: nn.Module = nn.Identity()  # until there are classes
        if num_classes is not None:
            self.add_classifier(num_classes)
        if channels_last:
            self.encoder.to(memory_format=torch.channels_last)
        self.views = EpochViews(self.augment, settings)
        self.network = Network(self._classify, settings)
        self.run = PretrainingRun(settings)
        self.step_log = StepLog()
        self.labels: Tensor | None = None  # (N,) of the training images, int64, on the CPU
        self.targets = torch.empty(0, dtype=torch.int64)  # of the step at hand
        self._of_images: dict[str, Any] = {}  # what a checkpoint says of the images

    def add_classifier(self, num_classes: int) -> None:
        """The linear classifier, whose first weights depend on the seed alone.

        Args:
            num_classes: C.
        """
        self.hparams["num_classes"] = num_classes
        feature_dim: Any = self.encoder.feature_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.hparams["seed"])
            weights = next(self.encoder.parameters())
            self.classifier = nn.Linear(feature_dim, num_classes).to(weights.device, weights.dtype)

    def meet(self, data: object) -> None:
        """Learn how many classes the images have, and have those kept away that evaluation takes as test.

        Args:
            data: the data module of the run; it need not be set up.
        Raises:
            ValueError: if it is no `ImageData`, has no labels, or other classes than the settings say.
        """
        if not isinstance(data, ImageData):
            raise ValueError(
                "supervised training looks labels up in simclr.data.ImageData: give the Trainer one as datamodule."
            )
        classes = data.train_with_labels()
        given = self.hparams.num_classes
        if given is None:
            self.add_classifier(len(classes))
        elif given != len(classes):
            raise ValueError(f"num_classes={given}, but the training images have {len(classes)}. Leave it out.")
        self._of_images = {"classes": list(classes)}

    def _classify(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x))

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """What a view goes through on its way to a class."""
        return self.encoder, self.classifier

    @staticmethod
    def objective(settings: Mapping[str, Any]) -> Objective:
        """What is minimised, for people."""
        classes, views = settings.get("num_classes"), settings.get("views", 2)
        parts = ["cross entropy", *([f"{classes} classes"] if classes else [])]
        parts += [f"{views} view{'s' if views != 1 else ''} of an image"] if views != 2 else []
        return Objective("cross entropy", ", ".join(parts), math.log(classes) if classes else None)

    # Beside what `Pretraining` answers Lightning:

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if self.labels is None or data is not None:  # a step that is computed again brings its labels
            self.meet(data)
            assert isinstance(data, ImageData)  # or it would have been refused
            data.setup()
            assert data.train is not None
            self.labels = data.train.labels
            self._of_images["kept_as_test"] = data.kept_as_test
        super().setup(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["method"] |= self._of_images
