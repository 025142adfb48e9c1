"""Online figures without labels: what a run is worth while it trains, on images that it never trains on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping
from torch import Tensor

from simclr import distributed
from simclr.data import ImageData
from simclr.data.held_out import FRACTION, held_out_count
from simclr.eval.features import encode, frozen
from simclr.eval.quality import alignment, instance_retrieval, rank_me, spread, uniformity
from simclr.run_length import is_due
from simclr.seeding import epoch_order
from simclr.training.objective import loss_of

RETRIEVAL = "retrieval_top1"
BEFORE = f"{RETRIEVAL}_before"  # of the network before its first step
FIGURES = ("heldout_loss", "heldout_top1", "alignment", "uniformity", "z_spread", "rankme", RETRIEVAL, BEFORE)
_SEED = (
    20221005  # of the choice of images and of their views, which no run's seed may change: runs are compared by them
)
_AT_ONCE = 256  # images


class Measurer(Callback, ABC):
    """Measures the encoder while it learns, on rank 0, at the end of some epochs and of the last; all ranks log it.

    Where it cannot measure (see `why_not`) it says so once. A checkpoint or an early stopping that watches one of its
    figures decides in the epochs that measure it: a patience counts measurements.

    Args:
        every_n_epochs: how often; 0 for never.
    Attributes:
        figures: the names it logs.
        group: its settings on the command line.
        title: what it measures, for people.
        measured_epoch: the last one that has figures, from 0.
    """

    figures: ClassVar[tuple[str, ...]]
    group: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, every_n_epochs: int):
        self.every_n_epochs = every_n_epochs
        self.measured_epoch: int | None = None
        self._measures = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out whether there will be figures, and have those who watch them wait for each.

        Raises:
            ValueError: if a callback watches a figure that this run never measures.
        """
        if stage != "fit":
            return
        self.check(trainer, trainer.datamodule)
        reason = self.why_not(trainer, trainer.datamodule)
        self._measures = reason is None
        for callback in watching(trainer, *self.figures):
            decide_where_measured(callback, self)
        if reason and self.every_n_epochs and not trainer.barebones and trainer.is_global_zero:
            print(f"no {self.title}: {reason}", flush=True)  # no bar yet

    def check(self, trainer: Trainer, data: object) -> None:
        """Refuse callbacks that watch a figure which this run never measures.

        Args:
            data: the data module, set up.
        Raises:
            ValueError: with the reason.
        """
        waiting = watching(trainer, *self.figures)
        if waiting and (reason := self.why_not(trainer, data)):
            name, metric = type(waiting[0]).__name__, waiting[0].monitor
            raise ValueError(f"{name} watches {metric}, which this run never measures: {reason}.")

    def why_not(self, trainer: Trainer, data: object) -> str | None:
        """Why there will be no figures in this run; None if there will be. The same on every rank, and reads no image.

        Args:
            data: the data module, set up.
        """
        if self.every_n_epochs == 0:
            return f"{self.group}.every_n_epochs is 0"
        if trainer.barebones:
            return "trainer.barebones logs nothing"
        return self.why_not_on(data)

    @abstractmethod
    def why_not_on(self, data: object) -> str | None:
        """Why these images are not enough; None if they are."""

    @abstractmethod
    def figures_of(self, data: ImageData, module: LightningModule) -> dict[str, float]:
        """The figures by name, of a method as it stands."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure on rank 0 and log on all, which wait for as long as it takes."""
        if not self._measures or not is_due(trainer, self.every_n_epochs):
            return
        figures = distributed.from_rank_0(lambda: self.figures_of(trainer.datamodule, pl_module))
        # The ranks agree already; without sync_dist Lightning would warn that they might not.
        pl_module.log_dict(figures, rank_zero_only=True, sync_dist=True)
        self.measured_epoch = trainer.current_epoch


class OnlineQuality(Measurer):
    """Logs figures of two views of images that are never trained on; see `simclr.eval.quality`.

    They are those held out of the training folder (`data.held_out`) or else the test images; labels play no part.
    `heldout_loss` and `heldout_top1`, the loss and the contrastive accuracy in batches of the run's size; `alignment`,
    `uniformity` and `z_spread` of the projections; `rankme` and `retrieval_top1` of the representations, and beside it
    `retrieval_top1_before`, of the network before its first step. The network is in eval mode, in float32.

    Args:
        every_n_epochs: how often; 0 for never. The last epoch is always measured.
        images: how many, or fewer if there are fewer.
    """

    figures, group, title = FIGURES, "quality", "figures of images never trained on"

    def __init__(self, every_n_epochs: int = 5, images: int = 2000):
        if every_n_epochs < 0 or images < 2:
            raise ValueError(f"quality needs every_n_epochs >= 0 and images >= 2; got {every_n_epochs} and {images}.")
        super().__init__(every_n_epochs)
        self.images = images
        self.before: float | None = None  # retrieval of the network before its first step
        self.measured_images = 0  # how many they are of

    def why_not_on(self, data: object) -> str | None:
        if not isinstance(data, ImageData):
            return "the batches are not from simclr.data.ImageData"
        if data.unseen is not None:
            return None
        few = data.source == "folder" and held_out_count(None, data.training_images) == 0
        spare = f", too few to spare {FRACTION:.0%} unasked" if few else ""
        return (
            f"there are no test images (--data.test_dir), and none is held out of the {data.training_images:,} "
            f"training images{spare} (--data.held_out)"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the network that has not trained yet; a run that goes on has it from its checkpoint."""
        if self._measures and trainer.global_step == 0:
            self.before = distributed.from_rank_0(lambda: self._retrieval(trainer.datamodule, pl_module))

    def figures_of(self, data: ImageData, module: LightningModule) -> dict[str, float]:
        before = {} if self.before is None else {BEFORE: self.before}
        return self.measure(data, module) | before

    def measure(self, data: ImageData, module: LightningModule) -> dict[str, float]:
        """The figures by name, of a method as it stands.

        Args:
            data: set up, with images that are never trained on.
            module: a method; its `networks` lead from a view to h and on to z.
        """
        h, z = (torch.cat(parts) for parts in zip(*self._features(data, module), strict=True))  # (2 N, ...)
        self.measured_images = len(h) // 2
        h1, h2 = h.chunk(2)
        retrieval = instance_retrieval(h1, h2)  # in float32, where the network is
        z1, z2 = z.cpu().chunk(2)
        figures = _loss_and_top1(module.hparams, z1.double(), z2.double())
        figures |= {"alignment": alignment(z1, z2), "uniformity": uniformity(z1), "z_spread": spread(z1)}
        return figures | {"rankme": rank_me(h1.cpu()), RETRIEVAL: retrieval}

    def _retrieval(self, data: ImageData, module: LightningModule) -> float:
        """That one figure."""
        return instance_retrieval(*torch.cat([h for h, _ in self._features(data, module)]).chunk(2))

    def _features(self, data: ImageData, module: LightningModule) -> Iterator[tuple[Tensor, Tensor]]:
        """(h, z) of some images at a time, on the network's device: of view 1 of all of them, then of view 2."""
        assert data.unseen is not None  # `why_not` has asked
        source, numbers = data.unseen
        chosen = numbers[epoch_order(_SEED, 0, len(numbers))[: self.images].sort().values]
        encoder, *heads = module.networks
        whole = torch.nn.Sequential(encoder, *heads)
        with frozen(whole), torch.autocast(module.device.type, enabled=False):
            for view in range(2):
                for index in chosen.split(_AT_ONCE):
                    images = source.images(index).to(module.device)
                    h = z = encode(encoder, module.views.augment.view(images, index, 0, _SEED, view))
                    for head in heads:
                        z = head(z)
                    yield h.float(), z.float()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what the run's first process measured."""
        self.before = state_dict["before"]


def watching(trainer: Trainer, *metrics: str) -> list[Any]:
    """The callbacks that decide by one of these; Lightning calls them after all others at the end of an epoch."""
    deciding = (callback for callback in trainer.callbacks if isinstance(callback, Checkpoint | EarlyStopping))
    return [callback for callback in deciding if getattr(callback, "monitor", None) in metrics]


def decide_where_measured(callback: Callback, measurer: Any) -> None:
    """Have a callback decide only in epochs that have a number of a measurer, by its `measured_epoch`."""
    hook = type(callback).on_train_epoch_end
    callback.on_train_epoch_end = partial(_where_measured, measurer, hook, callback)


def _where_measured(
    measurer: Any, hook: Callable[..., object], callback: Callback, trainer: Trainer, pl_module: LightningModule
) -> None:
    """A watching callback's end of an epoch: nothing where the metrics hold an earlier epoch's number, or none."""
    if measurer.measured_epoch == trainer.current_epoch:
        hook(callback, trainer, pl_module)


def _loss_and_top1(settings: Any, z1: Tensor, z2: Tensor) -> dict[str, float]:
    """In batches of the run's size, or one of all images where they are fewer; nothing for a method without a loss."""
    if "loss" not in settings:
        return {}
    size = min(settings.batch_size, len(z1))
    pairs = [pair for pair in zip(z1.split(size), z2.split(size), strict=True) if len(pair[0]) == size]
    stats = [loss_of(settings, pair, gather=False)[1] for pair in pairs]
    means = {"heldout_loss": [s.loss for s in stats], "heldout_top1": [s.accuracy for s in stats]}
    return {name: float(torch.stack(values).double().mean()) for name, values in means.items()}
