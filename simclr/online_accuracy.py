"""Online accuracies on labelled images while the encoder learns: of kNN, and of a linear classifier.

Both are measured on *training* images, or on another labelled folder, so that choices made by them never touch the test
set. Neither changes the run: the encoder is read in eval mode, without gradients, and proven unchanged.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from simclr import distributed
from simclr.data import EvalLoader, ImageData
from simclr.data.sources import Folder, list_folder
from simclr.eval import extract_features, knn_predict
from simclr.eval.logreg import predict_by_logreg
from simclr.online_quality import decide_where_measured, watching
from simclr.paths import stored
from simclr.run_length import is_due
from simclr.seeding import epoch_order

METRIC, PROBE = "knn_top1", "probe_top1"
_QUERIES = 20260712  # seed of the choice of queries, which no run's seed may change: runs are compared by it


class OnlineAccuracy(Callback):
    """What the online accuracies share: when and on which images, and who is told.

    Rank 0 reads the images and measures; every rank logs what it found. A checkpoint or an early stopping that watches
    the metric decides in the epochs that measure it: a patience counts measurements.

    Attributes:
        metric: its name.
        group: of its settings on the command line.
        kind: what it is called in messages.
        measured_epoch: the last one that has a number, from 0.
    """

    metric: ClassVar[str]
    group: ClassVar[str]
    kind: ClassVar[str]

    def __init__(self, every_n_epochs: int, images: int):
        self.every_n_epochs = every_n_epochs
        self.images = images
        self.measured_epoch: int | None = None
        self._measures = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out whether there will be a number, and have those who watch it wait for each.

        Raises:
            ValueError: if a callback watches a number that this run never measures.
        """
        if stage != "fit":
            return
        self.check(trainer, trainer.datamodule)
        reason = self.why_not(trainer, trainer.datamodule)
        self._measures = reason is None
        if reason and self.every_n_epochs and not trainer.barebones and trainer.is_global_zero:
            print(f"no {self.kind}: {reason}", flush=True)  # no bar yet
        for callback in watching(trainer, self.metric):
            decide_where_measured(callback, self)

    def check(self, trainer: Trainer, data: object) -> None:
        """Refuse callbacks that watch a number which this run never measures.

        Args:
            data: the data module, set up.
        Raises:
            ValueError: with the reason.
        """
        waiting = watching(trainer, self.metric)
        if waiting and (reason := self.why_not(trainer, data)):
            name = type(waiting[0]).__name__
            raise ValueError(f"{name} watches {self.metric}, which this run never measures: {reason}.")

    def why_not(self, trainer: Trainer, data: object) -> str | None:
        """Why there will be no number in this run; None if there will be. The same on every rank, and reads no image.

        Args:
            data: the data module, set up.
        """
        if self.every_n_epochs == 0:
            return f"{self.group}.every_n_epochs is 0"
        if trainer.barebones:
            return "trainer.barebones logs nothing"
        if not isinstance(data, ImageData):
            return "the batches are not from simclr.data.ImageData, whose labelled images it is measured on"
        try:
            labels = self.labels(data)
        except ValueError as error:  # none to hold out beside them
            return str(error).rstrip(".")
        if labels is None:
            return "there are no labelled training images to measure it on"
        query, bank = _query_and_bank(len(labels))
        if not len(query) or len(labels[bank].unique()) < 2:
            return "it takes 5 labelled images or more, of two classes among its neighbours"
        return None

    def labels(self, data: ImageData) -> Tensor | None:
        """(n,) int64 of the images of `loader`; None without labels. Reads no image."""
        assert data.labelled_train is not None  # set up
        if data.labelled_train.labels is None:  # labelled test images are not for this
            return None
        return data.eval_loader("train", limit=self.images).labels

    def loader(self, data: ImageData) -> EvalLoader:
        """The images to measure on."""
        return data.eval_loader("train", limit=self.images)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure on rank 0 and log on all, which wait for as long as it takes."""
        if not self._measures or not is_due(trainer, self.every_n_epochs):
            return

        def measure() -> float:
            return self.measure(pl_module.encoder, self.loader(trainer.datamodule), pl_module.device)

        accuracy = distributed.from_rank_0(measure)
        # The ranks agree already; without sync_dist Lightning would warn that they might not.
        pl_module.log(self.metric, accuracy, rank_zero_only=True, sync_dist=True)
        self.measured_epoch = trainer.current_epoch

    def measure(self, encoder: torch.nn.Module, loader: Iterable[Any], device: torch.device) -> float:
        """The accuracy (a fraction) on a fixed random fifth of a loader's images, the others being the bank."""
        features, labels = extract_features(encoder, loader, device=device)
        query, bank = _query_and_bank(len(labels))
        predictions = self.predict(features[bank], labels[bank], features[query], device)
        return (predictions == labels[query]).float().mean().item()

    def predict(self, bank: Tensor, labels: Tensor, queries: Tensor, device: torch.device) -> Tensor:
        """The class given to each query, (m,) int64.

        Args:
            bank, labels: (n, F) float32 and (n,) int64, on the CPU.
            queries: (m, F) float32, on the CPU.
            device: the encoder's.
        """
        raise NotImplementedError


class OnlineKNN(OnlineAccuracy):
    """Logs `knn_top1`, the accuracy of a kNN classifier on the representations, while the encoder learns.

    Both the bank and the queries are *training* images (four fifths and one fifth of a fixed sample), so that choices
    made by this number never touch the test set. Where that cannot be measured (see `why_not`) it says so once.

    Args:
        every_n_epochs: how often; 0 for never. The last epoch is always measured, also one that a limit of steps ends
            early.
        images: the size of the sample, or fewer if there are fewer.
        k: neighbours that vote.
        temperature: of the votes, exp(similarity / temperature).
    """

    metric, group, kind = METRIC, "knn", "online kNN"

    def __init__(self, every_n_epochs: int = 5, images: int = 10_000, k: int = 20, temperature: float = 0.1):
        if every_n_epochs < 0 or images < 10 or k < 1 or temperature <= 0:
            raise ValueError(
                f"knn needs every_n_epochs >= 0, images >= 10, k >= 1 and temperature > 0; "
                f"got {every_n_epochs}, {images}, {k} and {temperature}."
            )
        super().__init__(every_n_epochs, images)
        self.k = k
        self.temperature = temperature

    def predict(self, bank: Tensor, labels: Tensor, queries: Tensor, device: torch.device) -> Tensor:
        """By the votes of the nearest."""
        return knn_predict(bank, labels, queries, k=min(self.k, len(bank)), temperature=self.temperature)


class OnlineProbe(OnlineAccuracy):
    """Logs `probe_top1`, the accuracy of a linear classifier on the representations, while the encoder learns.

    A logistic regression is fitted by L-BFGS to the representations of four fifths of a fixed sample of the images
    and scored on the other fifth. It is fitted anew, from zero, in each epoch that measures it: the number depends on
    the encoder alone, without a learning rate, a state in the checkpoint, or work in a step. It costs one pass of
    the sample through the encoder, as the online kNN does, and the fit.

    Args:
        every_n_epochs: how often; 0 for never. The last epoch is always measured, also one that a limit of steps ends
            early.
        images: the size of the sample, or fewer if there are fewer.
        regularization: lambda of the squared weights, beside the sum over images; features are standardised.
        train_dir: a folder of labelled images, in class folders, to measure on in place of training images.
    """

    metric, group, kind = PROBE, "probe", "online linear probe"

    def __init__(
        self,
        every_n_epochs: int = 0,
        images: int = 10_000,
        regularization: float = 10.0,
        train_dir: str | None = None,
    ):
        if every_n_epochs < 0 or images < 10 or not 0 < regularization < math.inf:
            raise ValueError(
                f"probe needs every_n_epochs >= 0, images >= 10 and regularization > 0; "
                f"got {every_n_epochs}, {images} and {regularization}."
            )
        if train_dir is not None and every_n_epochs == 0:
            raise ValueError(
                f"probe.train_dir={train_dir} is not used with probe.every_n_epochs=0. Set --probe.every_n_epochs 5."
            )
        super().__init__(every_n_epochs, images)
        self.regularization = regularization
        self.train_dir = train_dir
        self._folder: Folder | None = None
        self._other: ImageData | None = None

    def check(self, trainer: Trainer, data: object) -> None:
        """Refuse a folder that cannot be measured on, too.

        Args:
            data: the data module, set up.
        Raises:
            ValueError: with the reason.
        """
        if self.train_dir is not None and self.folder.labels is None:
            raise ValueError(
                f"probe.train_dir={self.train_dir} has no labels: give a folder with two or more class folders, all "
                "images in them."
            )
        super().check(trainer, data)

    @property
    def folder(self) -> Folder:
        """What `train_dir` holds."""
        assert self.train_dir is not None
        if self._folder is None:
            self._folder = list_folder(stored(self.train_dir), "probe.train_dir", self.train_dir)
        return self._folder

    def labels(self, data: ImageData) -> Tensor | None:
        """(n,) int64 of the images of `loader`; None without labels. Reads no image."""
        if self.train_dir is None:
            return super().labels(data)
        return None if self.folder.labels is None else self.folder.labels[self._chosen()]

    def _chosen(self) -> Tensor:
        """Which images of the folder, ascending."""
        return epoch_order(_QUERIES, 1, len(self.folder.paths))[: self.images].sort().values

    def loader(self, data: ImageData) -> EvalLoader:
        """The images to measure on."""
        if self.train_dir is None:
            return super().loader(data)
        if self._other is None:
            own = ("image_size", "load_size", "workers", "memory_limit_gb", "cache_dir")
            self._other = ImageData(
                train_dir=stored(self.train_dir),
                batch_size=2,
                held_out=0,
                **{name: getattr(data, name) for name in own},
            )
            self._other.setup()
        assert self._other.train is not None
        return EvalLoader(self._other.train, self._chosen(), 512, data.workers or 0)

    def predict(self, bank: Tensor, labels: Tensor, queries: Tensor, device: torch.device) -> Tensor:
        """By a logistic regression fitted to the bank."""
        where = device if device.type == "cuda" else torch.device("cpu")  # it takes float64
        return predict_by_logreg(
            bank.to(where), labels.to(where), queries.to(where), regularization=self.regularization
        ).cpu()


def _query_and_bank(count: int) -> tuple[Tensor, ...]:
    """The places, among `count` images, of the fifth to classify and of their neighbours."""
    # At random, because images are often sorted by class or dealt out in turn: a run or a stride would hold classes
    # that the bank has not.
    return epoch_order(_QUERIES, 0, count).tensor_split([count // 5])
