"""Linear evaluation of a run: the protocols of this folder on one checkpoint, beside the yardsticks, as one record."""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kornia
import pytorch_lightning
import torch
import torchvision
from torch import Tensor, nn

from simclr.checkpoint import (
    STARTING_ENCODER,
    Checkpoint,
    load_encoder,
    new_encoder,
    read_checkpoint,
    read_encoder,
    sha256_of,
)
from simclr.checks import listed, out_of_range, refuse
from simclr.data import EvalLoader, ImageData
from simclr.distributed import from_rank_0
from simclr.eval.classifier import ProbeResult
from simclr.eval.duplicates import HashedImages, duplicates_in_words, duplicates_record
from simclr.eval.features import encoder_sha256, raw_pixels
from simclr.eval.logreg import NotConverged, linear_probe
from simclr.eval.metrics import confusion_matrix, wilson_interval
from simclr.eval.predictions import packed
from simclr.eval.protocol import FrozenFeatures, find_protocol, settings_of
from simclr.eval.shares import features_on_ranks
from simclr.eval.supervised import read_supervised, refuse_seen_images, supervised_in_words, supervised_record
from simclr.files import write_atomically
from simclr.paths import expanded, stored

LINEAR = {"lbfgs": "logreg", "sgd": "linear"}  # the linear classifiers, as this record has always called them
RESULT = "linear_eval.json"  # in the run folder
_YARDSTICK_ITERATIONS = 2000  # twice linear_probe's: untrained features are slower to fit


@dataclass(frozen=True)
class LoadedImages:
    """The images of an evaluation loader by their place in it, as a protocol takes them."""

    loader: EvalLoader

    @property
    def labels(self) -> Tensor:
        return self.loader.labels

    def __len__(self) -> int:
        return len(self.loader.index)

    def images(self, index: Tensor) -> Tensor:
        return self.loader.source.images(self.loader.index[index], threads=max(1, self.loader.workers))


def linear_evaluation(
    checkpoint: str | Path,
    data: ImageData,
    *,
    protocol: str = "lbfgs",
    settings: Mapping[str, Any] | None = None,
    knn: Mapping[str, Any] | None = None,
    supervised: str | Path | None = None,
    device: torch.device | str = "cpu",
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a pretrained encoder, frozen: linear classifier and kNN, beside a random encoder and raw pixels.

    Several ranks share the images, each calling this; classifiers are rank 0's, and all return its numbers.

    The yardsticks go through logistic regression on the same images. The random encoder is the run's own encoder
    before its first step: same kind, same seed. (For runs from the command line, which seeds just before it builds the
    model; for others it is one of the same distribution.) A run that began with given weights has these as a third
    yardstick, `starting_weights_top1`, from the encoder that it keeps as it began.

    Args:
        checkpoint: a run folder or a checkpoint file.
        data: labelled images; see `ImageData.eval_loader` for what serves as test where there is no test set.
        protocol: of the classifier. `lbfgs`, fast, regularisation chosen on a split of the training data; `sgd`, the
            paper's, on cropped and flipped images, last epoch; or another of `simclr.eval.protocol`.
        settings: of the protocol, by the names of its signature.
        knn: settings of kNN, likewise.
        supervised: a run of the supervised method, the counterpart of this one: what its own classifier reaches on the
            same test images is `supervised_top1`.
        device: where to compute.
        command: recorded with the result.
        say: is told what goes on, a line at a time.
    Returns:
        The record that `linear_eval.json` holds: accuracies are fractions of the test images, `ci95` is Wilson's
        interval of `linear_top1`. A yardstick whose classifier did not converge is None, as is a top-5 of five
        classes or fewer. `duplicates` counts the test images that the classifiers were trained on, pixel for pixel as
        they are held, names some, and has the accuracies without them. `regularization_end` says of each classifier
        whether its regularisation was chosen at an end of its grid. `predictions` has the classes given to each test
        image, their labels (see `simclr.eval.predictions`) and a hash of the images.
    Raises:
        FileNotFoundError, ValueError: for a setting, checkpoint or data that do not serve, naming what is wrong.
        RuntimeError: if the encoder changed while it was measured, or its own classifier did not converge.
    """
    classifier = LINEAR.get(protocol, protocol)
    settings, votes = settings_of(classifier, settings or {}), settings_of("knn", knn or {})
    _refuse_out_of_range({**settings, **{f"knn_{name}": value for name, value in votes.items()}})
    started = time.perf_counter()
    read = read_checkpoint(checkpoint)
    began = _starting_encoder(read)
    network = None if supervised is None else read_supervised(supervised)
    encoder = load_encoder(read.path)
    sha256 = encoder_sha256(encoder)
    train_loader, test_loader = data.eval_loader("train"), data.eval_loader("test")
    refuse_unseen_classes(train_loader, test_loader)
    _refuse_too_many_neighbours(votes["k"], train_loader)
    if network is not None:
        refuse_seen_images(network, data, test_loader)
    say(f"features of {len(train_loader.index):,} training and {len(test_loader.index):,} test images")
    train_images, test_images = HashedImages(train_loader), HashedImages(test_loader)
    features = FrozenFeatures(
        encoder,
        features_on_ranks(encoder, train_images, device=device),
        features_on_ranks(encoder, test_images, device=device),
        LoadedImages(train_loader),
        device,
    )
    labels = features.test[1]
    say(f"linear classifier ({protocol})")
    linear = from_rank_0(lambda: find_protocol(classifier)(features, **settings))
    neighbours = from_rank_0(lambda: find_protocol("knn")(features, **votes))
    yardsticks = _yardsticks(read, began, train_loader, test_loader, device, say)
    with_labels: dict[str, Any] = {}
    if network is not None:
        say("yardstick: the supervised network")
        tested = features_on_ranks(network.encoder, test_loader, device=device)[0]
        top1, about_it = supervised_record(network, read, tested, test_loader)
        with_labels = {"supervised_top1": top1, "supervised": about_it}
    if encoder_sha256(encoder) != sha256:
        raise RuntimeError("the encoder changed during its evaluation: the numbers are void.")
    correct = int((linear.predictions == labels).sum())
    about = dict(linear.about)
    ends = {"linear": about.pop("regularization_end", None)}
    ends |= {name: found and found.regularization_end for name, found in yardsticks.items()}
    return {
        "linear_top1": correct / len(labels),
        "linear_top5": linear.top5,
        "ci95": list(wilson_interval(correct, len(labels))),
        "knn_top1": int((neighbours.predictions == labels).sum()) / len(labels),
        **{f"{name}_top1": found and found.accuracy for name, found in yardsticks.items()},
        **with_labels,
        "duplicates": duplicates_record(train_images, test_images, linear.predictions, neighbours.predictions),
        "encoder_sha256": sha256,
        "checkpoint": stored(read.path),
        "encoder": read.model["encoder"],
        "epoch": read.epochs,
        **({"starting_weights": read.about["starting_weights"]} if "starting_weights" in read.about else {}),
        "total_steps": read.run.get("total_steps"),
        "finished": read.finished,
        "global_step": read.global_step,
        "protocol": protocol,
        **about,
        "regularization_end": ends,
        **{f"knn_{name}": value for name, value in neighbours.about.items()},
        "data": data_record(data, train_loader, test_loader),
        "confusion_matrix": confusion_matrix(
            linear.predictions, labels, len(test_loader.source.classes or ()) or None
        ).tolist(),
        "predictions": {  # with these two runs can be compared image by image
            "linear": packed(linear.predictions),
            "knn": packed(neighbours.predictions),
            "labels": packed(labels),
            "images_sha256": hashlib.sha256(bytes(test_images.digests)).hexdigest(),
        },
        "command": command,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _starting_encoder(read: Checkpoint) -> nn.Module | None:
    """The encoder as a run began that was given weights; None for others, and where its file is not kept.

    Raises:
        ValueError: if what is kept is not what the checkpoint says that the run began with.
    """
    path, began = read.run_dir / STARTING_ENCODER, read.about.get("starting_weights")
    if began is None or not path.is_file():
        return None
    encoder = load_encoder(path)
    if sha256_of(read_encoder(path)[1]) != began["sha256"]:
        raise ValueError(
            f"{path} is not what the run began with: {began['source']}, SHA-256 {began['sha256'][:12]}. "
            "Move it away to measure without this yardstick."
        )
    return encoder


def _refuse_out_of_range(settings: Mapping[str, Any]) -> None:
    """Before the features are computed; a protocol refuses its own settings too, after them."""
    counts, positive = ("epochs", "batch_size", "max_iterations", "knn_k"), ("base_lr", "knn_temperature")
    refuse(out_of_range(settings, counts=counts, positive=positive, not_negative=("weight_decay",)))


def refuse_unseen_classes(train: EvalLoader, test: EvalLoader) -> None:
    """Refuse test images of classes that no training image is of, by name, before features are computed.

    Raises:
        ValueError: naming the classes.
    """
    # `check_split` refuses them too, by number.
    unseen = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unseen:
        names = listed(test.source.classes[i] if test.source.classes else i for i in unseen)
        raise ValueError(
            f"{test.source.name} has classes of which there is no training image in {train.source.name}: {names}."
        )


def _refuse_too_many_neighbours(knn_k: int | None, train: EvalLoader) -> None:
    # `knn_predict` refuses them too, after the features have been computed.
    if knn_k is not None and knn_k > len(train.index):
        raise ValueError(
            f"knn_k={knn_k} is more than the {len(train.index)} training images. "
            "Use fewer, or leave it out: it then follows from the sizes of the classes."
        )


def _yardsticks(
    read: Checkpoint,
    began: nn.Module | None,
    train: EvalLoader,
    test: EvalLoader,
    device: torch.device | str,
    say: Callable[[str], None],
) -> dict[str, ProbeResult | None]:
    """What a random encoder of the same kind, the starting weights if there are, and raw pixels reach."""
    say("yardstick: a random encoder of the same kind")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(read.model["seed"])  # the weights the run began with, if it was given none
        random = new_encoder(read)
    features = [part for loader in (train, test) for part in features_on_ranks(random, loader, device=device)]
    found = {"random_encoder": _yardstick(*features, device=device, say=say)}
    if began is not None:
        say("yardstick: the weights that the run began with")
        features = [part for loader in (train, test) for part in features_on_ranks(began, loader, device=device)]
        found["starting_weights"] = _yardstick(*features, device=device, say=say)
    say("yardstick: raw pixels")

    def of_pixels() -> ProbeResult | None:
        pixels = [part for loader in (train, test) for part in raw_pixels(loader)]
        return _fit_of_yardstick(*pixels, device=device, say=say)

    return {**found, "raw_pixels": from_rank_0(of_pixels)}


def _yardstick(*split: Tensor, device: torch.device | str, say: Callable[[str], None]) -> ProbeResult | None:
    return from_rank_0(lambda: _fit_of_yardstick(*split, device=device, say=say))


def _fit_of_yardstick(*split: Tensor, device: torch.device | str, say: Callable[[str], None]) -> ProbeResult | None:
    """The L-BFGS protocol, or None: features that are hard to fit must not cost the encoder its number."""
    try:
        return linear_probe(*split, max_iterations=_YARDSTICK_ITERATIONS, device=device)
    except NotConverged as error:
        say(f"no number for this yardstick: {error}")
        return None


def grid_end_in_words(record: dict[str, Any]) -> str | None:
    """Which classifiers of a record have a regularisation at an end of its grid; None if none."""
    names = {"linear": "linear classifier", "random_encoder": "random encoder"}
    names |= {"starting_weights": "starting weights", "raw_pixels": "raw pixels"}
    ends = {names[key]: end for key, end in record.get("regularization_end", {}).items() if end}
    if not ends:
        return None
    listed = ", ".join(f"{name} (the {end})" for name, end in ends.items())
    return f"regularisation chosen at the end of its grid, beyond which a better one may lie: {listed}"


def remarks(record: dict[str, Any]) -> list[str]:
    """What a reader of a record's numbers must know beside them, a line each."""
    found = (record["data"]["note"], duplicates_in_words(record), grid_end_in_words(record))
    return [remark for remark in found if remark] + supervised_in_words(record.get("supervised"))


def data_record(data: ImageData, train: EvalLoader, test: EvalLoader) -> dict[str, Any]:
    """What a record says of the images it is about, in plain types.

    Args:
        data: set up; its settings are told.
        train, test: the labelled images that classifiers are fitted to, and scored on.
    """
    return {
        "train": train.source.name,
        "test": test.source.name,
        "train_images": len(train.index),
        "test_images": len(test.index),
        "classes": test.source.classes,
        "metric": data.metric,
        "note": data.evaluation_note,
        "settings": {key: value for key, value in data.hparams.items() if value is not None},
    }


def versions() -> dict[str, str]:
    """Of the packages that decide a number, by name."""
    from simclr import __version__

    return {
        "simclr": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "kornia": kornia.__version__,
        "pytorch_lightning": pytorch_lightning.__version__,
        "python": platform.python_version(),
    }


def write_result(record: dict[str, Any], run_dir: Path, name: str = RESULT) -> Path:
    """Write a record into the folder of its run; an earlier result stays beside it under a number.

    Args:
        record: for JSON.
        run_dir: the folder.
        name: of the file.
    Returns:
        The file written.
    """
    path = expanded(run_dir) / name
    if path.exists():
        number = 1
        while (kept := path.with_suffix(f".{number}.json")).exists():
            number += 1
        write_atomically(kept, path.read_bytes())  # a copy: a result is there at every moment
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    return path
