"""Online accuracies on labelled images while the encoder learns: of kNN, and of a linear classifier.

Both are measured on *training* images, or on another labelled folder, so that choices made by them never touch the test
set. Neither changes the run: the encoder is read in eval mode, without gradients, and proven unchanged.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from simclr.data import EvalLoader, ImageData
from simclr.data.sources import Folder, list_folder
from simclr.eval import extract_features, knn_predict
from simclr.eval.logreg import predict_by_logreg
from simclr.online_quality import Measurer
from simclr.paths import stored
from simclr.seeding import epoch_order

METRIC, PROBE = "knn_top1", "probe_top1"
_QUERIES = 20260712  # seed of the choice of queries, which no run's seed may change: runs are compared by it


class OnlineAccuracy(Measurer):
    """What the online accuracies share: on which images they are measured, and how those are dealt out.

    Args:
        every_n_epochs: how often; 0 for never.
        images: the size of the sample, or fewer if there are fewer.
    """

    own_images = True  # measured on images that are trained on

    def __init__(self, every_n_epochs: int, images: int):
        super().__init__(every_n_epochs)
        self.images = images

    def why_not_on(self, data: object) -> str | None:
        if not isinstance(data, ImageData):
            return "the batches are not from simclr.data.ImageData, whose labelled images it is measured on"
        if data.learns_from_labels and self.own_images:
            return "the run learns the labels of the images that it would be measured on"
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

    def figures_of(self, data: ImageData, module: LightningModule) -> dict[str, float]:
        return {self.figures[0]: self.measure(module.encoder, self.loader(data), module.device)}

    def labels(self, data: ImageData) -> Tensor | None:
        """(n,) int64 of the images of `loader`; None without labels. Reads no image."""
        assert data.labelled_train is not None  # set up
        if data.labelled_train.labels is None:  # labelled test images are not for this
            return None
        return data.eval_loader("train", limit=self.images).labels

    def loader(self, data: ImageData) -> EvalLoader:
        """The images to measure on."""
        return data.eval_loader("train", limit=self.images)

    def measure(self, encoder: torch.nn.Module, loader: Iterable[Any], device: torch.device) -> float:
        """The accuracy (a fraction) on a fixed random fifth of a loader's images, the others being the bank."""
        features, labels = extract_features(encoder, loader, device=device)
        query, bank = _query_and_bank(len(labels))
        predictions = self.predict(features[bank], labels[bank], features[query], device)
        return (predictions == labels[query]).float().mean().item()

    @abstractmethod
    def predict(self, bank: Tensor, labels: Tensor, queries: Tensor, device: torch.device) -> Tensor:
        """The class given to each query, (m,) int64.

        Args:
            bank, labels: (n, F) float32 and (n,) int64, on the CPU.
            queries: (m, F) float32, on the CPU.
            device: the encoder's.
        """


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

    figures, group, title = (METRIC,), "knn", "online kNN"

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

    figures, group, title = (PROBE,), "probe", "online linear probe"

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
        self.own_images = train_dir is None
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
            own = ["image_size", "load_size", "workers", "memory_limit_gb", "cache_dir"]
            own += ["channels", "bits", "sixteen_bit_max"]
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
