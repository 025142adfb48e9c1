"""A classifier on an encoder's features as one file: fitted to class folders, measured on images held out of them."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize

from simclr import __version__
from simclr.checkpoint import as_safetensors
from simclr.checks import listed
from simclr.data.sources import list_folder
from simclr.data.splits import stratified_split
from simclr.distributed import from_rank_0, on_every_rank, rank, world_size
from simclr.eval.features import frozen
from simclr.eval.knn import nearest
from simclr.eval.logreg import linear_probe
from simclr.files import write_atomically
from simclr.paths import expanded
from simclr.use.embed import OnError, default_batch_size, feature_batches_on_ranks, refuse_unlike_rank_0
from simclr.use.source import Source

VERSION = 1
UNLIKE = 0.99  # quantile of the distance from which on an image is not of the kind of the training images
_SETTINGS, _SHA256 = "simclr_classifier", "simclr_classifier_sha256"
_REFERENCE = 10_000  # training images that are kept to measure distances by
_HELD_OUT = 0.2  # of each class
_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a classifier says of N images.

    Attributes:
        classes: (N,) int64, the most probable.
        probability: (N,) of that class, 0 to 1, as the regression has it.
        distance: (N,) 1 - cosine similarity to the nearest training image.
        quantile: (N,) the share of training images that are nearer than that to their own nearest other one. 1: farther
            away than any.
    """

    classes: Tensor
    probability: Tensor
    distance: Tensor
    quantile: Tensor


@dataclass(frozen=True, eq=False)
class Classifier:
    """A logistic regression on features, and the training images' features to tell what it knows.

    Attributes:
        weight, bias: (C, F) and (C,) float32: logits = features @ weight.T + bias.
        reference: (R, F) float32, features of training images, of length 1.
        spacing: (R,) float32, ascending: 1 - cosine similarity of each to the nearest other.
        about: for JSON: `classes`, `encoder` (see `simclr.use.source.Source`), `held_out` (`accuracy`, `ci95`,
            `images`), `regularization`, `train_images`.
    """

    weight: Tensor
    bias: Tensor
    reference: Tensor
    spacing: Tensor
    about: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """The classes' names."""
        return self.about["classes"]

    def predict(self, features: Tensor) -> Prediction:
        """What images show.

        Args:
            features: (N, F) float32, of the encoder that it was fitted to.
        """
        classes, probability, distance = [], [], []
        for chunk in features.split(_CHUNK):
            p = (chunk.double() @ self.weight.double().T + self.bias.double()).softmax(1).max(1)
            classes.append(p.indices)
            probability.append(p.values)
            near = self.reference[nearest(chunk, self.reference, 1)[:, 0]]
            distance.append(_distance(chunk, near))
        far = torch.cat(distance)
        below = torch.searchsorted(self.spacing.contiguous(), far.float().contiguous(), right=False)
        return Prediction(torch.cat(classes), torch.cat(probability), far, below.double() / len(self.spacing))


def fit_classifier(
    images: str,
    source: Source,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    on_error: OnError = "raise",
    seed: int = 0,
    advance: Callable[[int, int], None] = lambda done, files: None,
) -> tuple[Classifier, list[str]]:
    """Fit a classifier to the features of images in class folders.

    A fifth of each class is held out. On the others the regularisation is chosen (`simclr.eval.logreg.linear_probe`,
    by a split of them) and a classifier fitted, whose accuracy on what was held out is the one that is stated. Then all
    images are fitted, with that regularisation. Several ranks share the features, each calling this; rank 0 fits.

    Args:
        images: a folder with a folder for each class.
        source: the encoder, on its device.
        batch_size, workers, advance: as for `simclr.use.embed.embed_folder`.
        on_error: of an image that cannot be read: raise, or skip.
        seed: of what is held out.
    Returns:
        The classifier, and a line for each file that was skipped, which is rank 0's to tell.
    Raises:
        ValueError: without two classes of three images and more, for files that cannot be read, for features that are
            not finite.
        NotConverged: if the regression does not converge.
    """
    folder = list_folder(images, "data.train_dir")
    if folder.classes is None or folder.labels is None:
        raise ValueError(
            f"data.train_dir={images} has no labels: needed two or more folders with the images of a class each, and "
            "none beside them."
        )
    names = folder.classes
    _refuse_few(folder.labels.bincount(minlength=len(names)), names, images)
    paths = [folder.paths[i] for i in range(len(folder.paths))]
    with frozen(source.encoder):
        features, kept, skipped = _features(paths, source, batch_size, workers, on_error, advance)
    labels = folder.labels[kept]
    found = from_rank_0(lambda: _fitted(images, features, labels, names, source, seed))
    return found, skipped


def _fitted(images: str, features: Tensor, labels: Tensor, names: list[str], source: Source, seed: int) -> Classifier:
    classes = len(names)
    _refuse_few(labels.bincount(minlength=classes), names, images)
    train, held = stratified_split(labels, _HELD_OUT, seed=seed)
    probe = linear_probe(features[train], labels[train], features[held], labels[held], num_classes=classes, seed=seed)
    chosen = probe.regularization
    assert chosen is not None  # of L-BFGS
    final = linear_probe(features, labels, features, labels, regularization=chosen, num_classes=classes)
    reference = torch.arange(len(labels))
    if len(labels) > _REFERENCE:
        reference = stratified_split(labels, 1 - _REFERENCE / len(labels), seed=seed)[0].sort().values
    bank = normalize(features[reference], dim=1)
    about = {
        "simclr_classifier": VERSION,
        "classes": names,
        "encoder": source.about,
        "held_out": {"accuracy": probe.accuracy, "ci95": list(probe.ci95), "images": len(held)},
        "regularization": chosen,
        "regularization_end": probe.regularization_end,
        "train_images": len(labels),
        "seed": seed,
        "simclr_version": __version__,
    }
    return Classifier(final.weight, final.bias, bank, _spacing(bank), about)


def _refuse_few(counts: Tensor, classes: list[str], images: str) -> None:
    few = [f"{name} ({count})" for name, count in zip(classes, counts.tolist(), strict=True) if count < 3]
    if few:
        raise ValueError(
            f"data.train_dir={images}: a class needs three images or more, to fit, to choose and to measure by: "
            f"{listed(few)}."
        )


def features_of(
    paths: list[str],
    source: Source,
    *,
    workers: int = 0,
    on_error: OnError = "raise",
    advance: Callable[[int, int], None] = lambda done, files: None,
) -> tuple[Tensor, Tensor, list[str]]:
    """Features of files in memory: (n, F); which files they are of, (n,) int64; and a line for each that was skipped.

    Several ranks share the work, each calling this; rank 0 gets it all, and the others nothing, n = 0.

    Args:
        paths, source, workers, on_error, advance: as for `fit_classifier`.
    """
    with frozen(source.encoder):
        return _features(paths, source, None, workers, on_error, advance)


def _features(
    paths: list[str],
    source: Source,
    batch_size: int | None,
    workers: int,
    on_error: OnError,
    advance: Callable[[int, int], None],
) -> tuple[Tensor, Tensor, list[str]]:
    size = batch_size or default_batch_size(source.transform.image_size)
    if world_size() > 1:
        listing = hashlib.sha256("\0".join(paths).encode("utf-8", "surrogateescape")).hexdigest()
        mine = {"images": listing, "weights": source.identity, "batch_size": size}
        first = from_rank_0(lambda: mine)
        on_every_rank(lambda: refuse_unlike_rank_0(mine, first))
    parts: list[Tensor] = []
    kept: list[int] = []
    skipped: list[str] = []
    for number, (rows, bad) in enumerate(feature_batches_on_ranks(paths, source, batch_size=size, workers=workers)):
        if bad and on_error == "raise":
            raise ValueError(f"cannot read {listed(bad.values(), 3)}. To leave such files out: --on_error skip.")
        last = min(len(paths), (number + 1) * size)
        kept += [i for i in range(number * size, last) if i - number * size not in bad]
        skipped += bad.values()
        parts.append(torch.from_numpy(np.array(rows)))
        advance(last, len(paths))
    if rank() > 0:
        return torch.empty(0, source.about["feature_dim"]), torch.empty(0, dtype=torch.int64), []
    if not kept:
        raise ValueError(f"none of the {len(paths):,} images can be read: {skipped[0]}.")
    return torch.cat(parts), torch.tensor(kept), skipped


def _distance(features: Tensor, others: Tensor) -> Tensor:
    return 1 - torch.nn.functional.cosine_similarity(features.double(), others.double())


def _spacing(bank: Tensor) -> Tensor:
    """1 - cosine similarity of each row to the nearest other, ascending."""
    found = []
    for start in range(0, len(bank), _CHUNK):
        chunk = bank[start : start + _CHUNK]
        two = nearest(chunk, bank, 2)
        own = torch.arange(start, start + len(chunk))
        other = torch.where(two[:, 0] == own, two[:, 1], two[:, 0])
        found.append(_distance(chunk, bank[other]))
    return torch.cat(found).float().sort().values


def save_classifier(classifier: Classifier, path: Path) -> None:
    """Write a classifier as one safetensors file, whole or not at all; `read_classifier` opens it."""
    tensors = {name: getattr(classifier, name).contiguous() for name in ("weight", "bias", "reference", "spacing")}
    text = json.dumps(classifier.about)
    write_atomically(path, as_safetensors(tensors, {_SETTINGS: text, _SHA256: _sha256(tensors, text)}))


def read_classifier(path: str | os.PathLike) -> Classifier:
    """Open what `simclr fit` has written.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another program or of another version.
    """
    file = expanded(path)
    if file.is_dir():
        file = file / "classifier.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"classifier={path} is no file. simclr fit writes one.")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: it is damaged, or no safetensors file ({error}).") from error
    if _SETTINGS not in metadata:
        raise ValueError(f"{path} is no classifier: simclr fit writes one.")
    if metadata.get(_SHA256) != _sha256(tensors, metadata[_SETTINGS]):
        raise ValueError(f"{path} is damaged: its numbers or settings are not those that were written.")
    about = json.loads(metadata[_SETTINGS])
    if about["simclr_classifier"] != VERSION:
        raise ValueError(
            f"{path} is a classifier of version {about['simclr_classifier']}; this simclr reads version {VERSION}. "
            "Fit it again."
        )
    return Classifier(**tensors, about=about)


def _sha256(tensors: dict[str, Tensor], text: str) -> str:
    whole = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        whole.update(f"{name} {tuple(value.shape)}".encode())
        whole.update(value.contiguous().numpy().data)
    return whole.hexdigest()
